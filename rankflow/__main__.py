"""`python -m rankflow`."""

from rankflow.cli.app import main

main()

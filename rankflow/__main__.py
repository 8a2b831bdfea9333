"""`python -m rankflow`."""

from rankflow.cli.cli import main

main()

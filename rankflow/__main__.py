"""`python -m rankflow`."""

from rankflow.cli import main

main()

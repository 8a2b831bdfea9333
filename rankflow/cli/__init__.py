"""The command line: an application in `app`, which the commands of every other module here join."""

from importlib import import_module

for _module in ("squeeze", "adapters", "policies", "runs"):  # in the order in which `rankflow --help` lists them
    import_module(f"rankflow.cli.{_module}")

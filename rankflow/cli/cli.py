"""The command line."""

from __future__ import annotations

from rankflow.cli import adapters as looking
from rankflow.cli import runs
from rankflow.cli import squeeze as adapters
from rankflow.cli.app import app

__all__ = ["adapters", "app", "looking", "main", "runs"]


def main() -> None:
    app()

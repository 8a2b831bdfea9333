"""The command line."""

from __future__ import annotations

from rankflow.commands import adapters, looking, runs
from rankflow.terminal import app

__all__ = ["adapters", "app", "looking", "main", "runs"]


def main() -> None:
    app()

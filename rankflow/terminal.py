"""The terminal: the application that commands join, and how they print, show progress and say what went wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from rankflow.errors import RankFlowError

if TYPE_CHECKING:
    from rankflow.crew import Progress


class _Group(TyperGroup):
    """A user's mistake is one message on stderr and status 2, never a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (RankFlowError, OSError) as e:
            typer.echo(f"rankflow: {e}", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Group,
    name="rankflow",
    help="Adaptive rank for LoRA adapters: squeeze and inspect saved ones, check policies, look at runs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def print_table(table: Any) -> None:
    from rich.console import Console

    console = Console(markup=False, emoji=False)  # names are what they are, whatever is in them
    if not console.is_terminal:
        console.width = 120  # a file or a pipe has no width of its own
    console.print(table)


@contextmanager
def bar(what: str) -> Iterator[Progress]:
    """A progress bar on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    with Bar(console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task(what, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


def write_json(path: Path, data: Any) -> None:
    from rankflow.formats.atomic import atomic_file

    with atomic_file(path) as partial:
        partial.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2, allow_nan=False))

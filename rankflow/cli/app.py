"""The application that commands join, and how they print, show progress and report errors."""

from __future__ import annotations

import json
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from rankflow.errors import RankFlowError, first_line
from rankflow.plans.names import shown

_left: ContextVar[bool] = ContextVar("whether stdout is left to an output", default=False)

if TYPE_CHECKING:
    from rich.console import Console

    from rankflow.linalg.parallel import Progress
    from rankflow.serving.verdicts import Verdict


_UsageError: Any = typer.BadParameter.__base__  # click's, or typer's own copy of it
_TRACEBACK = "RANKFLOW_TRACEBACK"  # set it to see where an error came from
_LONGEST = 4000  # characters of a message
_RENAMED = {  # options of the last version
    "--for": "--engine",
    "--format": "--to-format",
    "--from": "--from-format",
    "--gate": "--accept",
    "--global": "--across",
    "--keep-tail": "--keep-residual",
}
_STATUS_INTERRUPTED = 130
_NO_ROOM = ("can't allocate memory", "not enough memory", "out of memory")  # torch's on Linux and macOS, Windows, GPUs
# What damaged or hostile input can make Python and torch raise; anything else is a fault of ours
_OF_THE_INPUT = (ArithmeticError, EOFError, MemoryError, OSError, RecursionError, RuntimeError, ValueError)
_OF_ADAPTERS = {
    "--engine",
    "--for",
    "--from-format",
    "--from",
    "--base",
    "--json",
}  # options of `check` alone


class _Group(TyperGroup):
    """Runs a command and reports whatever goes wrong in one message and a status, without a traceback.

    Ctrl-C, SIGTERM and SIGHUP let the process remove unfinished files before it ends.
    """

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **options: Any) -> Any:
        with _usage_shown():
            return super().make_context(info_name, _by_new_names(args), *rest, **options)

    def invoke(self, ctx: Any) -> Any:
        _left.set(False)
        words = [*getattr(ctx, "_protected_args", ()), *ctx.args]
        try:
            with _usage_shown(), _warnings_shown(), _ending():
                return super().invoke(ctx)
        except (typer.Exit, typer.Abort, _UsageError, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            say("rankflow: interrupted", err=True)
            raise typer.Exit(_STATUS_INTERRUPTED) from None
        except RankFlowError as e:
            message = str(e)
            for word in words:  # a name of several lines makes none of them
                message = message.replace(word, shown(word)) if "\n" in word else message
            say(f"rankflow: {message}", err=True)
        except Exception as e:
            if os.environ.get(_TRACEBACK):
                raise
            say(f"rankflow: {_what(e)}, in: rankflow {shown(' '.join(words), most=400)}{_whose(e)}", err=True)
        raise typer.Exit(2)


def _by_new_names(words: list[str]) -> list[str]:
    """Return the words of a command line with options by their present names, and say on stderr which were old.

    `--plugin MODULE` goes to the front, as it is an option of all commands.
    """
    end = words.index("--") if "--" in words else len(words)
    words, rest = [part for word in words[:end] for part in _apart(word)], words[end:]
    names = dict(_RENAMED)
    if {"--dynamic-method", "--dynamic-param"} <= {*words[:-1]}:  # sv_fro and 0.9, say
        at = words.index("--dynamic-method")
        names["--dynamic-param"] = f"--{words.pop(at + 1).replace('_', '-')}"
        del words[at]
    plugins: list[str] = []
    while "--plugin" in words[:-1]:
        at = words.index("--plugin")
        plugins += words[at : at + 2]
        del words[at : at + 2]
    if words[:1] == ["check"] and not _OF_ADAPTERS & {*words} and any(map(_is_policy, words[1:])):
        names["check"] = "validate"
    for old in dict.fromkeys(word for word in words if word in names):
        if old in _RENAMED and any(word.partition("=")[0] == names[old] for word in words):
            raise typer.BadParameter(f"{old} is the old name of {names[old]}, which is given too; leave out {old}")
        say(f"rankflow: {old} is now {names[old]}; the old name goes with the next version", err=True)
    return [*plugins, *(names.get(word, word) for word in words), *rest]


def _is_policy(word: str) -> bool:
    """Whether a word is a policy, which `check` took before there was `validate`."""
    if word.startswith("-"):
        return False
    from rankflow.config.load import shipped

    return Path(word).suffix in (".yaml", ".yml") or (word in shipped() and not Path(word).exists())


def _apart(word: str) -> list[str]:
    """Split `--option=value` of an old name into two words."""
    name, equals, value = word.partition("=")
    return [name, value] if equals and (name in _RENAMED or name.startswith(("--dynamic-", "--plugin"))) else [word]


def _of_memory(e: Exception) -> bool:
    """Whether an error says that memory ran out; torch raises a RuntimeError for that."""
    return isinstance(e, MemoryError) or (isinstance(e, RuntimeError) and any(word in str(e) for word in _NO_ROOM))


def _what(e: Exception) -> str:
    if _of_memory(e):
        return f"not enough memory ({first_line(e)})"
    if isinstance(e, OSError):
        return str(e)
    return f"{type(e).__name__} ({first_line(e)})"


def _whose(e: Exception) -> str:
    if isinstance(e, OSError) or _of_memory(e):
        return ""
    fault = "the input is damaged, or rankflow" if isinstance(e, _OF_THE_INPUT) else "rankflow"
    return f"; {fault} is at fault: please report it, with what {_TRACEBACK}=1 shows"


@contextmanager
def _usage_shown() -> Iterator[None]:
    """Escape what was typed, or what a shell made of the names of files, in errors about usage."""
    try:
        yield
    except _UsageError as e:
        e.message = shown(e.message, lines=True, most=_LONGEST)
        raise


@contextmanager
def _warnings_shown() -> Iterator[None]:
    """Show warnings as one-line messages."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"rankflow: {shown(message, lines=True, most=_LONGEST)}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def say(text: str, *, err: bool = False) -> None:
    """Print a sentence with control characters escaped; with `print_table` and `print_json` the only way to print."""
    typer.echo(shown(text, lines=True, most=_LONGEST), err=err or _left.get())


def say_outputs(picture: Path | None, page: Path | None) -> None:
    """Say what was drawn and what was written besides tables."""
    if picture is not None:
        say(f"Drew {picture}.")
    if page is not None:
        say(f"Wrote {page}.")


@contextmanager
def _ending() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into an exception, so that unfinished files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ends = [s for name in ("SIGTERM", "SIGHUP") if (s := getattr(signal, name, None)) is not None]
    before = {s: found for s in ends if (found := signal.getsignal(s)) not in (signal.SIG_IGN, None)}  # nohup: ignored

    def end(number: int, frame: object) -> None:
        for s in before:
            signal.signal(s, signal.SIG_IGN)  # what is under way is the cleaning up
        raise SystemExit(128 + number)

    for s in before:
        signal.signal(s, end)
    try:
        yield
    finally:
        for s, found in before.items():
            signal.signal(s, found)


app = typer.Typer(
    cls=_Group,
    name="rankflow",
    help="Adaptive rank for LoRA adapters: squeeze and inspect saved ones, check policies, look at runs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def main() -> None:
    app()


@app.callback()
def _of_all_commands(
    plugin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE", help="Import this Python module first, for the policies, formats and engines it adds."
        ),
    ] = None,
) -> None:
    from rankflow.plugins import import_plugin

    for module in plugin or ():
        import_plugin(module)


def console(**options: Any) -> Console:
    """Return a console that escapes strings as `say` does and takes none for markup."""
    from rich.console import Console

    class Shown(Console):
        def render_str(self, text: str, **options: Any) -> Any:
            return super().render_str(shown(text, lines=True), **options)

    return Shown(markup=False, emoji=False, **options)


def print_table(table: Any) -> None:
    where = console(stderr=_left.get())
    if not where.is_terminal:
        where.width = 120  # a file or a pipe has no width of its own
    where.print(table)


def show_verdict(found: Verdict) -> None:
    """Print what an engine or the base model would get wrong with an adapter, or that there is nothing."""
    from rankflow.render.adapter_tables import verdict_table

    if found.problems:
        print_table(verdict_table(found))
        return
    well = [f"{found.engine} loads it as it is"] if found.engine else []
    on_base = [f"{found.base} has all its modules"] if found.base and not found.hint else []
    say(f"{found.source}: {'. '.join(filter(None, [*well, *on_base, found.hint]))}")


def leave_stdout(*outputs: Path | None) -> None:
    """Print on stderr from here on if one of a command's outputs goes to stdout, so that the two do not mix."""
    _left.set(any(str(out) in ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1") for out in outputs))


@contextmanager
def bar(what: str) -> Iterator[Progress]:
    """Show a progress bar on stderr, where that is a terminal."""
    from rich.progress import Progress as Bar

    where = console(stderr=True)
    with Bar(console=where, transient=True, disable=not where.is_terminal) as drawn:
        task = drawn.add_task(what, total=None)
        yield lambda done, total: drawn.update(task, completed=done, total=total)


def write_json(path: Path, data: Any, *, force: bool = False) -> None:
    """
    Raises:
        ConfigError: `path` is there already, and `force` was not given.
    """
    from rankflow.formats.io.atomic import atomic_file
    from rankflow.formats.io.outputs import check_output

    check_output(path, force=force)
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2, allow_nan=False))  # which escapes all that is not ASCII

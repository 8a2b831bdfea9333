"""Commands on runs, by their ledgers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from rankflow.cli import options
from rankflow.cli.app import app, console, leave_stdout, print_json, print_table, say, say_outputs
from rankflow.errors import ConfigError


@app.command(
    epilog="Example: [bold]rankflow report out/rankflow.jsonl -o ranks.png[/bold]; "
    "or [bold]rankflow report out --against other[/bold]"
)
def report(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="Ledger of a run (.jsonl), or the folder that holds it or its adapter."),
    ],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Picture to draw; <LEDGER>.png if left out.")] = None,
    html: options.Html = None,
    against: Annotated[
        Path | None,
        typer.Option(metavar="OTHER", help="Another run: say whether both decided the same."),
    ] = None,
    force: options.ForceAll = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")] = False,
) -> None:
    """Show what a run did: events, what gates came to, and the rank of every module, as tables and as a picture. The
    losses that the Trainer logged are drawn with the ranks, where its trainer_state.json lies beside the ledger.

    With --html or --json the picture is drawn only where -o says. With --against, where two runs first decided
    differently, what each did there and how close it was; the status is 1 if they did.
    """
    from rankflow.analysis.run import find_ledger, losses_beside

    ledger = find_ledger(run) if run.is_dir() else run
    if against is not None:
        if out is not None or html is not None:
            raise ConfigError("--against compares decisions and draws nothing; leave out -o and --html")
        _compare(ledger, find_ledger(against) if against.is_dir() else against, as_json)
        return
    from rankflow.formats.io.outputs import check_apart
    from rankflow.training.ledger import Ledger

    default = ledger.with_suffix(".png") if out is None and html is None and not as_json else None
    out = out or default
    leave_stdout(out, html)
    read = Ledger.read(ledger)
    if html is not None:
        from rankflow.render.html import check_page_file

        check_page_file(html, {"the ledger": ledger}, force=force)
    if out is not None:
        from rankflow.render.figure import check_picture, picture_of
        from rankflow.render.run_figure import source_of

        replaced = force or (out == default and picture_of(out) == source_of(read))  # that of an earlier report
        check_picture(out, {"the ledger": ledger}, force=replaced)
    check_apart([path for path in (out, html) if path is not None])
    there = {path for path in (out, html) if path is not None and os.path.lexists(path)}
    from rankflow.render.run_figure import plot_ledger
    from rankflow.render.run_tables import events_table, gates_table, ranks_table

    history = read.history()
    losses = losses_beside(ledger) if out is not None or html is not None else []
    if out is not None:
        plot_ledger(read, out, losses, force=out in there)
    if html is not None:
        from rankflow.render.html import write_page
        from rankflow.render.reports import run_page

        write_page(run_page(read, str(ledger), losses), html, force=html in there)
    if as_json:
        from rankflow.analysis.run import run_of

        print_json(run_of(read, str(ledger)).to_json())
        return
    print_table(events_table(read.events))
    for fold in (e for e in read.events if e["event"] == "fold" and e["gates"]):
        print_table(gates_table(fold))
    print_table(ranks_table(history))
    say_outputs(out, html)


@app.command(epilog="Example: [bold]rankflow watch out[/bold], while training writes to out/rankflow.jsonl")
def watch(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, or its ledger (.jsonl).")],
    every: Annotated[float, typer.Option(metavar="SECONDS", min=0.1, help="How often to look.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Show where the run stands and end.")] = False,
) -> None:
    """Follow a run that goes on elsewhere: ranks by type and layer, budget, last events, time to the next decision."""
    import time

    from rich.live import Live

    from rankflow.analysis.run import find_ledger, follow
    from rankflow.render.watch import view

    path = find_ledger(run)
    if once:
        ledger = next(follow(path, every))
        if ledger is None:
            raise ConfigError(f"{path}: there is no ledger yet; without --once it is waited for")
        print_table(view(ledger, time.time()))
        return
    try:
        with Live(console=console(), auto_refresh=False, vertical_overflow="visible") as live:
            for ledger in follow(path, every):
                live.update(f"waiting for {path}" if ledger is None else view(ledger, time.time()), refresh=True)
    except KeyboardInterrupt:
        raise typer.Exit() from None


# -- parts ----------------------------------------------------------------------------------------------------------


def _compare(first: Path, second: Path, as_json: bool) -> None:
    """
    Raises:
        typer.Exit: with status 1, if they did not decide the same.
    """
    from rankflow.analysis.run_comparison import compare
    from rankflow.render.run_tables import comparison_table
    from rankflow.training.ledger import Ledger

    found = compare(Ledger.read(first), Ledger.read(second), (str(first), str(second)))
    if as_json:
        print_json(found.to_json())
    else:
        say(f"{found.first} and {found.second}: {found}")
        if not found.same:
            print_table(comparison_table(found))
    if not found.same:
        raise typer.Exit(1)

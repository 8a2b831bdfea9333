"""The command line. Everything heavy is imported by the command that needs it, so that --help answers at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from rankflow.errors import ConfigError, RankFlowError

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

Adapter = Annotated[
    Path, typer.Argument(metavar="ADAPTER", help="PEFT adapter folder, or its .safetensors or .bin file.")
]


def main() -> None:
    app()


@app.command(epilog="Example: [bold]rankflow squeeze out/checkpoint-500 --target-rank 8[/bold]")
def squeeze(
    adapter: Adapter,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder to write; <ADAPTER>-r8 and the like if left out.")
    ] = None,
    target_rank: Annotated[
        int | None, typer.Option(metavar="N", help="One rank for all modules that have more.")
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(metavar="E", help="Share of its squared singular values every module keeps, e.g. 0.9."),
    ] = None,
    max_params: Annotated[
        int | None, typer.Option(metavar="N", help="LoRA parameters in all, spent where they keep most.")
    ] = None,
    metric: Annotated[str, typer.Option(help="What is preserved: weights.")] = "weights",
    backend: Annotated[
        str, typer.Option(help="SVD: exact, or randomised on the full update: torch, fbpca, sklearn.")
    ] = "exact",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; as the source has it if left out.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute, e.g. cpu or cuda:0.")] = "cpu",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would come out and write nothing.")] = False,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report as JSON too.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an adapter that is there already.")] = False,
) -> None:
    """Write a smaller adapter: the best of its rank, as plain PEFT LoRA. Needs no base model; the source is only read.

    Give exactly one of --target-rank, --energy and --max-params.
    """
    if report is not None and not report.parent.is_dir():
        raise ConfigError(f"{report.parent}: no such folder to write the report into")
    from rankflow.checkpoint import squeeze as run
    from rankflow.tables import squeeze_table

    with _bar("squeezing") as progress:
        done = run(
            adapter,
            out,
            target_rank=target_rank,
            energy=energy,
            max_params=max_params,
            metric=metric,
            backend=backend,  # type: ignore[arg-type]  # checked there
            dtype=dtype,
            device=device,
            force=force,
            dry_run=dry_run,
            progress=progress,
        )
    if report is not None:
        _write_json(report, done.to_json())
    _print(squeeze_table(done))
    if done.out is None:
        typer.echo("Nothing was written (--dry-run).")
        return
    typer.echo(f"Wrote {done.out} in {done.seconds:.1f} s.")
    if done.copied:
        typer.echo(f"Copied along: {', '.join(done.copied)}.")


@app.command(epilog="Example: [bold]rankflow inspect out/checkpoint-500 --plot spectra.png[/bold]")
def inspect(
    adapter: Adapter,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the spectra, e.g. spectra.png.")] = None,
) -> None:
    """Show every module's spectrum: effective rank, and the energy that 1, 2, 4, 8 and 16 directions hold."""
    from rankflow.inspection import inspect as run
    from rankflow.tables import inspection_table

    with _bar("inspecting") as progress:
        found = run(adapter, progress=progress)
    if plot is not None:
        from rankflow.report import plot_spectra

        plot_spectra(found, plot)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2, allow_nan=False))
        return
    _print(inspection_table(found))
    if plot is not None:
        typer.echo(f"Drew {plot}.")


@app.command(
    epilog="Example: [bold]rankflow check policies/increlora.yaml --model out/adapter --total-steps 3000[/bold]"
)
def check(
    policy: Annotated[str, typer.Argument(help="Policy file, or the name of a shipped one.")],
    model: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Adapter folder, or transformers model folder, to check it against."),
    ] = None,
    total_steps: Annotated[int, typer.Option(metavar="N", help="Optimizer steps of the run, for percentages.")] = 1000,
    target_modules: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="With a model folder: what PEFT adapts; repeatable. All linears if left out."
        ),
    ] = None,
    rank: Annotated[int, typer.Option(metavar="N", help="With a model folder: the adapter's rank at the start.")] = 8,
) -> None:
    """Say what a policy means for a model: the modules its limits reach, its budgets, and the steps it decides on."""
    from rankflow.config import load_policy
    from rankflow.tables import limits_table, phases_table

    lifecycle = load_policy(policy)
    if model is None:
        typer.echo(f"{lifecycle.source} is well formed; give --model to see what it means for one.")
        return
    layout, phases = lifecycle.resolve(total_steps, _layout(model, target_modules, rank))
    _print(phases_table(phases, layout, f"{lifecycle.source} over {total_steps} steps"))
    _print(limits_table(layout))


@app.command(epilog="Example: [bold]rankflow policies increlora[/bold]")
def policies(
    name: Annotated[str | None, typer.Argument(help="One policy, with its parameters.")] = None,
) -> None:
    """List the policies there are, with their parameters, defaults and meaning."""
    from rankflow.config import describe
    from rankflow.config import shipped as files
    from rankflow.tables import policies_table, policy_table

    found = {d.name: d for d in describe()}
    if name is not None and name not in found:
        raise ConfigError(f"no policy is called {name!r}; there are {', '.join(found)}")
    if name is None:
        _print(policies_table(list(found.values()), files()))
    for description in found.values():
        if name == description.name or (name is None and description.settings):
            _print(policy_table(description))


@app.command(epilog="Example: [bold]rankflow report out/rankflow.jsonl -o ranks.png[/bold]")
def report(
    ledger: Annotated[Path, typer.Argument(help="Ledger of a run (.jsonl).")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Picture to draw; <LEDGER>.png if left out.")] = None,
) -> None:
    """Show what a run did: events, and the rank of every module over the steps, as tables and as a picture."""
    from rankflow.ledger import Ledger
    from rankflow.report import plot_ledger
    from rankflow.tables import events_table, ranks_table

    read = Ledger.read(ledger)
    history = read.history()
    picture = plot_ledger(read, out if out is not None else ledger.with_suffix(".png"))
    _print(events_table(read.events))
    _print(ranks_table(history))
    typer.echo(f"Drew {picture}.")


# -- parts ----------------------------------------------------------------------------------------------------------


def _print(table: Any) -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = 120  # a file or a pipe has no width of its own
    console.print(table)


@contextmanager
def _bar(what: str) -> Iterator[Progress]:
    """A progress bar on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _write_json(path: Path, data: Any) -> None:
    partial = path.with_name(f".{path.name}.part")
    try:
        partial.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _layout(folder: Path, target_modules: list[str] | None, rank: int) -> Any:
    """What a policy would find: a saved adapter's layout, or that of a new adapter on a model that is never loaded."""
    if (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        from rankflow.blank import blank_layout

        return blank_layout(folder, target_modules, rank)
    from rankflow.formats.peft import PeftAdapter

    return PeftAdapter(folder).layout

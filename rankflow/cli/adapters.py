"""Commands on saved adapters, other than those that choose ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from rankflow.cli import options
from rankflow.cli.app import app, bar, leave_stdout, print_json, print_table, say, say_outputs, show_verdict
from rankflow.compress.output import Output


@app.command(
    epilog="Example: [bold]rankflow calibrate out/checkpoint-500 --base models/llama --data texts.jsonl "
    "-o stats.safetensors[/bold]"
)
def calibrate(
    adapter: options.Adapter,
    base: Annotated[str, typer.Option(metavar="MODEL", help="Base model's folder or name.")],
    data: Annotated[
        Path,
        typer.Option(metavar="FILE", help="A .txt with a text a line; .jsonl, .csv, .parquet with text and label."),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Statistics file (.safetensors) to write.")],
    metric: Annotated[
        str, typer.Option(help="What it is for: loss, which serves outputs too, or outputs, which needs no labels.")
    ] = "loss",
    batches: Annotated[int, typer.Option(metavar="N", help="Batches, at most.")] = 64,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Texts a batch.")] = 8,
    max_length: Annotated[int, typer.Option(metavar="N", help="Tokens a text, at most.")] = 512,
    device: options.Device = "cpu",
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there already.")] = False,
) -> None:
    """Run data through an adapter on its base model and keep what `squeeze --metric outputs` or `loss` needs of it: two
    r x r averages a module."""
    from rankflow.calibration.base_model import calibrate_saved
    from rankflow.calibration.statistics import check_statistics_file

    leave_stdout(out)
    check_statistics_file(out, {"its own source": adapter, "its base": base, "its data": data}, force=force)
    there = os.path.lexists(out)
    with bar("calibrating") as progress:
        found = calibrate_saved(
            adapter,
            base,
            data,
            metric=metric,
            batches=batches,
            batch_size=batch_size,
            max_length=max_length,
            device=device,
            progress=progress,
        )
    found.save(out, force=there)
    say(f"Wrote {out}: {len(found.measured)} modules, {found.tokens:,} tokens in {found.batches} batches.")


@app.command(epilog="Example: [bold]rankflow expand out/small residual.safetensors -o out/whole[/bold]")
def expand(
    adapter: options.Adapter,
    residual: Annotated[Path, typer.Argument(metavar="RESIDUAL", help="What `squeeze --keep-residual` kept.")],
    out: options.Out,
    force: options.Force = False,
) -> None:
    """Put a squeezed adapter and its residual together again."""
    from rankflow.compress.residual import expand as run

    with bar("expanding") as progress:
        ranks = run(adapter, residual, out, force=force, progress=progress)
    say(f"Wrote {out}: {len(ranks)} modules, total rank {sum(ranks.values()):,}.")


@app.command(epilog="Example: [bold]rankflow canonicalize out/checkpoint-500 -o out/sorted[/bold]")
def canonicalize(
    adapter: options.Adapter,
    out: options.Out,
    from_format: options.From = None,
    base: options.Base = None,
    force: options.Force = False,
) -> None:
    """Sort every module's directions, so that the first k of them are the best adapter of rank k."""
    from rankflow.compress.squeeze import canonicalize as run

    with bar("sorting") as progress:
        done = run(adapter, out, from_format=from_format, base=base, force=force, progress=progress)
    say(f"Wrote {done.out}: {len(done.modules)} modules, same ranks, same DeltaW.")


@app.command(epilog="Example: [bold]rankflow pad out/checkpoint-500 --rank 16 -o out/padded[/bold]")
@options.made_of(output=(Output, "engine", "to_format", "force"))
def pad(
    adapter: options.Adapter,
    rank: Annotated[int | None, typer.Option(metavar="N", help="Rank of every module; the engine's choice.")] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", rich_help_panel="Out", help="Folder or file to write.")
    ] = None,
    output: Any = None,
    from_format: options.From = None,
    base: options.Base = None,
) -> None:
    """Fill every module up to one rank with zeros: same DeltaW; in PEFT's format with alpha = r and no patterns."""
    from rankflow.compress.squeeze import pad as run
    from rankflow.render.adapter_tables import squeeze_table

    with bar("padding") as progress:
        done = run(adapter, out, rank=rank, from_format=from_format, base=base, progress=progress, **output)
    print_table(squeeze_table(done))
    say(f"Wrote {done.out} in {done.seconds:.1f} s.")


@app.command(epilog="Example: [bold]rankflow diff out/checkpoint-500 out/checkpoint-500-r8[/bold]")
def diff(
    first: options.Adapter,
    second: options.Adapter,
    from_format: Annotated[
        list[str] | None,
        typer.Option(
            "--from-format", metavar="FORMAT", help="As in squeeze: of both, or given twice, of one and the other."
        ),
    ] = None,
    base: options.Base = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")] = False,
) -> None:
    """Say how far apart two adapters of one model are, whatever their ranks."""
    from rankflow.analysis.difference import diff as run
    from rankflow.render.adapter_tables import difference_table

    with bar("comparing") as progress:
        kinds = from_format[0] if from_format and len(from_format) == 1 else from_format or None
        found = run(first, second, from_format=kinds, base=base, progress=progress)
    if as_json:
        print_json(found.to_json())
    else:
        print_table(difference_table(found))


@app.command(epilog="Example: [bold]rankflow inspect out/checkpoint-500 --plot spectra.png[/bold]")
def inspect(
    ctx: typer.Context,
    adapter: options.Adapter,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Statistics from `rankflow calibrate`: spectra in outputs and loss too."),
    ] = None,
    from_format: options.From = None,
    base: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Base model's folder: intruder dimensions are counted against its weights."),
    ] = None,
    top_k: Annotated[int, typer.Option(metavar="N", help="With --base: directions of each module to look at.")] = 10,
    epsilon: Annotated[
        float, typer.Option(metavar="E", help="With --base: a direction without a cosine of E is an intruder.")
    ] = 0.5,
    modules: Annotated[bool, typer.Option("--modules", help="Show every module, below the means by type.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the spectra, e.g. spectra.png.")] = None,
    html: options.Html = None,
    force: options.ForceAll = False,
) -> None:
    """Show the means of every type of module, and with --modules every module's spectrum: effective and stable rank,
    how many directions are above the noise, and the energy that 1, 2, 4, 8 and 16 hold."""
    from rankflow.formats.io.outputs import check_apart

    leave_stdout(plot, html)
    reads = options.read({"its own source": adapter}, ctx.params)
    if html is not None:
        from rankflow.render.html import check_page_file

        check_page_file(html, reads, force=force)
    if plot is not None:
        from rankflow.render.figure import check_picture

        check_picture(plot, reads, force=force)
    writes = [path for path in (plot, html) if path is not None]
    check_apart(writes)
    there = {path for path in writes if os.path.lexists(path)}
    from rankflow.analysis.inspection import inspect as run
    from rankflow.render.adapter_tables import inspection_table, types_table

    with bar("inspecting") as progress:
        found = run(
            adapter,
            from_format=from_format,
            calibration=calibration,
            base=base,
            top_k=top_k,
            epsilon=epsilon,
            progress=progress,
        )
    if plot is not None:
        from rankflow.render.run_figure import plot_spectra

        plot_spectra(found, plot, force=plot in there)
    if html is not None:
        from rankflow.render.html import write_page
        from rankflow.render.reports import inspection_page

        write_page(inspection_page(found), html, force=html in there)
    if as_json:
        print_json(found.to_json())
        return
    print_table(types_table(found))
    if modules:
        print_table(inspection_table(found))
    say_outputs(plot, html)


@app.command(epilog="Example: [bold]rankflow check out/adapter --engine vllm --base models/llama[/bold]")
@options.made_of(output=(Output, "engine"))
def check(
    adapter: options.Adapter,
    output: Any = None,
    from_format: options.From = None,
    base: options.BaseLookedUp = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")] = False,
) -> None:
    """Say what an engine would get wrong with an adapter as it is, and which of its modules a base model does not have;
    the status is 1 if there is anything.
    """
    from rankflow.serving.verdicts import check as run

    found = run(adapter, output["engine"], from_format=from_format, base=base)
    if as_json:
        print_json(found.to_json())
    else:
        show_verdict(found)
    if found.problems:
        raise typer.Exit(1)

"""The command that looks at a saved adapter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from rankflow.cli import options
from rankflow.cli.app import app, bar, leave_stdout, print_json, print_table, say
from rankflow.cli.squeeze import Adapter, ForceAll


@app.command(epilog="Example: [bold]rankflow inspect out/checkpoint-500 --plot spectra.png[/bold]")
def inspect(
    ctx: typer.Context,
    adapter: Adapter,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Statistics from `rankflow calibrate`: spectra in outputs and loss too."),
    ] = None,
    kind: options.From = None,
    base: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Base model's folder: intruder dimensions are counted against its weights."),
    ] = None,
    top_k: Annotated[int, typer.Option(metavar="N", help="With --base: directions of each module to look at.")] = 10,
    epsilon: Annotated[
        float, typer.Option(metavar="E", help="With --base: a direction without a cosine of E is an intruder.")
    ] = 0.5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the spectra, e.g. spectra.png.")] = None,
    html: options.Html = None,
    force: ForceAll = False,
) -> None:
    """Show every module's spectrum and every type's mean: effective and stable rank, how many directions are above the
    noise, and the energy that 1, 2, 4, 8 and 16 hold."""
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
    from rankflow.render.tables import inspection_table, types_table

    with bar("inspecting") as progress:
        found = run(
            adapter, kind=kind, calibration=calibration, base=base, top_k=top_k, epsilon=epsilon, progress=progress
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
    print_table(inspection_table(found))
    print_table(types_table(found))
    if plot is not None:
        say(f"Drew {plot}.")
    if html is not None:
        say(f"Wrote {html}.")

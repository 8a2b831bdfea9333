"""Commands that choose ranks for a saved adapter: squeeze it, or plan to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from rankflow.cli import options
from rankflow.cli.app import app, bar, leave_stdout, print_table, say, show_verdict, write_json
from rankflow.compress.output import Output
from rankflow.compress.target import Target
from rankflow.errors import ConfigError


@app.command(epilog="Example: [bold]rankflow squeeze out/checkpoint-500 --target-rank 8[/bold]")
@options.made_of(target=Target, output=Output)
def squeeze(
    ctx: typer.Context,
    adapter: options.Adapter,
    ranks: Annotated[
        str | None,
        typer.Option(
            rich_help_panel="How much",
            metavar="N,N,..",
            help="Several uniform ranks, one output each, decomposed once.",
        ),
    ] = None,
    accept: Annotated[
        str | None,
        typer.Option(
            rich_help_panel="How much",
            metavar="CMD",
            help="The smallest rank for which CMD {} succeeds; {} is a candidate's path.",
        ),
    ] = None,
    target: Any = None,
    from_format: options.From = None,
    base: options.Base = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            rich_help_panel="Out",
            help="Folder or file to write; <ADAPTER>-r8 and the like if left out. With --ranks a stem.",
        ),
    ] = None,
    output: Any = None,
    report: Annotated[
        Path | None, typer.Option(rich_help_panel="Out", metavar="FILE", help="Write the report as JSON too.")
    ] = None,
    html: options.Html = None,
    metric: options.Metric = "weights",
    calibration: options.Calibration = None,
    backend: options.Backend = None,
    device: options.Device = "cpu",
) -> None:
    """Write a smaller adapter: the best of its rank, in its own format. Needs no base model; the source is only read.

    Give exactly one target: --target-rank, --ranks, --energy, --error, --auto, --sv-ratio, --sv-fro, --sv-cumulative,
    --max-params, --size, --budget or --plan; or --accept. With --engine or --to-format it may be left out, and ranks
    stay as they are.
    """
    from rankflow.formats.io.outputs import Around, check_apart, check_harmless, check_output

    force, dry_run, keep_residual, engine, to_format = (
        output[name] for name in ("force", "dry_run", "keep_residual", "engine", "to_format")
    )
    leave_stdout(out, report, html, keep_residual)
    reads = options.read({"its own source": adapter}, ctx.params)
    if report is not None:
        check_output(report, reads, force=force or dry_run, parents=False)
    if html is not None:
        from rankflow.render.html import check_page_file

        if ranks is not None:
            raise ConfigError(f"{html}: a report is of one adapter; leave --html out, or give one rank")
        check_page_file(html, reads, force=force or dry_run)
    from rankflow.compress.accept import acceptance_command
    from rankflow.compress.each import squeeze_each
    from rankflow.formats.io.atomic import is_plain
    from rankflow.formats.io.outputs import suffixed
    from rankflow.render.adapter_tables import acceptance_table, squeeze_table
    from rankflow.serving.export import fitting_for

    fitting_for(engine, to_format=to_format, base=base)  # refuses before any data are run through the model
    targets = options.targets(target, ctx.params, keep=engine is not None or to_format is not None)
    judge = None if accept is None else acceptance_command(accept)
    outs = None
    if out is not None:
        outs = [out] if ranks is None else [suffixed(out, target.suffix) for target in targets]
    besides = [path for path in (report, html) if path is not None]
    writes = [*besides, *(outs or ()), *([] if keep_residual is None else [keep_residual])]
    for path in writes:  # before any data are run through the model
        check_harmless(path, reads)
        if path not in besides and not dry_run and base is not None:
            check_output(path, force=force, folder=path.is_dir())
    check_apart(writes)
    there = {path for path in besides if os.path.lexists(path)}
    statistics = options.statistics(ctx.params)
    with bar("squeezing" if accept is None else "trying ranks") as progress:
        reports = squeeze_each(
            adapter,
            targets,
            outs,
            metric=metric,
            calibration=statistics,
            backend=backend,  # type: ignore[arg-type]  # checked there
            device=device,
            accept=judge,
            from_format=from_format,
            base=base,
            around=Around(reads, besides),
            progress=progress,
            **output,
        )
    written = [path for path in besides if not dry_run or is_plain(path)]
    if report in written:
        found = [done.to_json() for done in reports]
        write_json(report, found if ranks is not None else found[0], force=report in there)
    if html in written:
        from rankflow.render.html import write_page
        from rankflow.render.reports import squeeze_page

        write_page(squeeze_page(reports[0]), html, force=html in there)
    for done in reports:
        if done.trials:
            print_table(acceptance_table(done.trials))
        print_table(squeeze_table(done))
        if done.out is not None:
            say(f"Wrote {done.out} in {done.seconds:.1f} s.")
            if done.copied:
                say(f"Copied along: {', '.join(done.copied)}.")
    if options.needless_base(ctx.params):  # which is then to be compared with the adapter
        from rankflow.serving.verdicts import check

        show_verdict(check(adapter, from_format=from_format, base=base))
    if dry_run:
        left = [str(path) for path in besides if path not in written]
        say(f"Nothing was written{', nor ' + ' and '.join(left) if left else ''} (--dry-run).")


@app.command(epilog="Example: [bold]rankflow plan out/checkpoint-500 --energy 0.9 -o plan.yaml[/bold]")
@options.made_of(target=Target)
def plan(
    ctx: typer.Context,
    adapter: options.Adapter,
    out: Annotated[Path, typer.Option("-o", "--out", help="Plan file to write.")],
    target: Any = None,
    from_format: options.From = None,
    base: options.Base = None,
    metric: options.Metric = "weights",
    calibration: options.Calibration = None,
    backend: options.Backend = None,
    device: options.Device = "cpu",
    force: Annotated[bool, typer.Option("--force", help="Replace a plan that is there already.")] = False,
) -> None:
    """Write down the ranks a squeeze would come to, to be read and edited; `squeeze --plan` does exactly that."""
    from rankflow.formats.io.outputs import check_output

    leave_stdout(out)
    check_output(out, options.read({"its own source": adapter}, ctx.params), force=force, parents=False)
    there = os.path.lexists(out)
    from rankflow.compress.each import squeeze_each
    from rankflow.compress.plan_file import write_plan
    from rankflow.render.adapter_tables import squeeze_table

    targets = options.targets(target, ctx.params)
    statistics = options.statistics(ctx.params)
    with bar("planning") as progress:
        (found,) = squeeze_each(
            adapter,
            targets,
            metric=metric,
            calibration=statistics,
            backend=backend,  # type: ignore[arg-type]  # checked there
            device=device,
            dry_run=True,
            from_format=from_format,
            base=base,
            progress=progress,
        )
    print_table(squeeze_table(found))
    say(f"Wrote {write_plan(found, out, force=there)}; follow it with: rankflow squeeze {adapter} --plan {out}")

"""Commands on saved adapters."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from rankflow.cli import options
from rankflow.cli.app import app, bar, leave_stdout, print_json, print_table, say, write_json
from rankflow.errors import ConfigError

Adapter = Annotated[
    Path,
    typer.Argument(
        metavar="ADAPTER",
        help="Adapter folder or file: PEFT, kohya, LyCORIS, ComfyUI, diffusers; or a whole model, with --base.",
    ),
]
Out = Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an adapter that is there already.")]
ForceAll = Annotated[bool, typer.Option("--force", help="Replace outputs that are there already.")]


@app.command(epilog="Example: [bold]rankflow squeeze out/checkpoint-500 --target-rank 8[/bold]")
def squeeze(
    ctx: typer.Context,
    adapter: Adapter,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", help="Folder or file to write; <ADAPTER>-r8 and the like if left out. With --ranks a stem."
        ),
    ] = None,
    target_rank: options.TargetRank = None,
    ranks: Annotated[
        str | None, typer.Option(metavar="N,N,..", help="Several uniform ranks, one output each, decomposed once.")
    ] = None,
    energy: options.Energy = None,
    error: options.Error = None,
    across: options.Across = False,
    auto: options.Auto = False,
    dynamic_method: options.DynamicMethod = None,
    dynamic_param: options.DynamicParam = None,
    max_params: options.MaxParams = None,
    size: options.Size = None,
    budget: options.BudgetYaml = None,
    plan: Annotated[Path | None, typer.Option(metavar="FILE", help="Ranks as `rankflow plan` wrote them.")] = None,
    exact: options.Exact = False,
    max_rank: options.MaxRank = None,
    rank_multiple: options.RankMultiple = 1,
    metric: options.Metric = "weights",
    calibration: options.Calibration = None,
    base: options.Base = None,
    backend: options.Backend = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; as the source has it if left out.")
    ] = None,
    device: options.Device = "cpu",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would come out and write nothing.")] = False,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report as JSON too.")] = None,
    html: options.Html = None,
    keep_tail: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep what is cut off; `rankflow expand` puts it back.")
    ] = None,
    gate: Annotated[
        str | None,
        typer.Option(metavar="CMD", help="The smallest rank for which CMD {} succeeds; {} is a candidate's path."),
    ] = None,
    kind: options.From = None,
    to: options.Format = None,
    engine: options.For = None,
    force: ForceAll = False,
) -> None:
    """Write a smaller adapter: the best of its rank, in its own format. Needs no base model; the source is only read.

    Give exactly one target: --target-rank, --ranks, --energy, --error, --auto, --dynamic-method, --max-params, --size,
    --budget or --plan; or --gate. With --for or --format it may be left out, and ranks stay as they are.
    """
    from rankflow.formats.io.outputs import Around, check_apart, check_harmless, check_output

    leave_stdout(out, report, html, keep_tail)
    reads = options.read({"its own source": adapter}, ctx.params)
    if report is not None:
        check_output(report, reads, force=force or dry_run, parents=False)
    if html is not None:
        from rankflow.render.html import check_page_file

        if ranks is not None:
            raise ConfigError(f"{html}: a report is of one adapter; leave --html out, or give one rank")
        check_page_file(html, reads, force=force or dry_run)
    from rankflow.compress.accept import command_gate
    from rankflow.compress.squeeze import squeeze_each
    from rankflow.formats.io.atomic import is_plain
    from rankflow.formats.io.tensors import suffixed
    from rankflow.render.tables import squeeze_table, trials_table
    from rankflow.serving.export import fitting_for

    fitting = fitting_for(engine, to=to, base=base)
    targets = options.targets(ctx.params, keep=engine is not None or to is not None)
    accept = None if gate is None else command_gate(gate)
    outs = None
    if out is not None:
        outs = [out] if ranks is None else [suffixed(out, target.suffix) for target in targets]
    besides = [path for path in (report, html) if path is not None]
    writes = [*besides, *(outs or ()), *([] if keep_tail is None else [keep_tail])]
    for path in writes:  # before any data are run through the model
        check_harmless(path, reads)
        if path not in besides and not dry_run and base is not None:
            check_output(path, force=force, folder=path.is_dir())
    check_apart(writes)
    there = {path for path in besides if os.path.lexists(path)}
    with bar("calibrating") as progress:
        statistics = options.statistics(ctx.params, progress)
    with bar("squeezing" if gate is None else "trying ranks") as progress:
        reports = squeeze_each(
            adapter,
            targets,
            outs,
            metric=metric,
            statistics=statistics,
            backend=backend,  # type: ignore[arg-type]  # checked there
            dtype=dtype,
            device=device,
            force=force,
            dry_run=dry_run,
            keep_tail=keep_tail,
            gate=accept,
            kind=kind,
            fitting=fitting,
            around=Around(reads, besides),
            progress=progress,
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
            print_table(trials_table(done.trials))
        print_table(squeeze_table(done))
        if done.out is not None:
            say(f"Wrote {done.out} in {done.seconds:.1f} s.")
            if done.copied:
                say(f"Copied along: {', '.join(done.copied)}.")
    if dry_run:
        left = [str(path) for path in besides if path not in written]
        say(f"Nothing was written{', nor ' + ' and '.join(left) if left else ''} (--dry-run).")


@app.command(epilog="Example: [bold]rankflow plan out/checkpoint-500 --energy 0.9 -o plan.yaml[/bold]")
def plan(
    ctx: typer.Context,
    adapter: Adapter,
    out: Annotated[Path, typer.Option("-o", "--out", help="Plan file to write.")],
    target_rank: options.TargetRank = None,
    energy: options.Energy = None,
    error: options.Error = None,
    across: options.Across = False,
    auto: options.Auto = False,
    dynamic_method: options.DynamicMethod = None,
    dynamic_param: options.DynamicParam = None,
    max_params: options.MaxParams = None,
    size: options.Size = None,
    budget: options.BudgetYaml = None,
    exact: options.Exact = False,
    max_rank: options.MaxRank = None,
    rank_multiple: options.RankMultiple = 1,
    metric: options.Metric = "weights",
    calibration: options.Calibration = None,
    base: options.Base = None,
    backend: options.Backend = None,
    device: options.Device = "cpu",
    kind: options.From = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a plan that is there already.")] = False,
) -> None:
    """Write down the ranks a squeeze would come to, to be read and edited; `squeeze --plan` does exactly that."""
    from rankflow.formats.io.outputs import check_output

    leave_stdout(out)
    check_output(out, options.read({"its own source": adapter}, ctx.params), force=force, parents=False)
    there = os.path.lexists(out)
    from rankflow.compress.plan_file import write_plan
    from rankflow.compress.squeeze import squeeze_each
    from rankflow.render.tables import squeeze_table
    from rankflow.serving.export import fitting_for

    targets = options.targets(ctx.params)
    with bar("calibrating") as progress:
        statistics = options.statistics(ctx.params, progress)
    with bar("planning") as progress:
        (found,) = squeeze_each(
            adapter,
            targets,
            metric=metric,
            statistics=statistics,
            backend=backend,  # type: ignore[arg-type]  # checked there
            device=device,
            dry_run=True,
            kind=kind,
            fitting=fitting_for(None, base=base),
            progress=progress,
        )
    print_table(squeeze_table(found))
    say(f"Wrote {write_plan(found, out, force=there)}; follow it with: rankflow squeeze {adapter} --plan {out}")


@app.command(
    epilog="Example: [bold]rankflow calibrate out/checkpoint-500 --base models/llama --data texts.jsonl "
    "-o stats.safetensors[/bold]"
)
def calibrate(
    adapter: Adapter,
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


@app.command(epilog="Example: [bold]rankflow expand out/small tail.safetensors -o out/whole[/bold]")
def expand(
    adapter: Adapter,
    tail: Annotated[Path, typer.Argument(metavar="TAIL", help="What `squeeze --keep-tail` kept.")],
    out: Out,
    force: Force = False,
) -> None:
    """Put a squeezed adapter and its tail together again."""
    from rankflow.compress.tail import expand as run

    with bar("expanding") as progress:
        ranks = run(adapter, tail, out, force=force, progress=progress)
    say(f"Wrote {out}: {len(ranks)} modules, total rank {sum(ranks.values()):,}.")


@app.command(epilog="Example: [bold]rankflow canonicalize out/checkpoint-500 -o out/sorted[/bold]")
def canonicalize(
    adapter: Adapter, out: Out, kind: options.From = None, base: options.Base = None, force: Force = False
) -> None:
    """Sort every module's directions, so that the first k of them are the best adapter of rank k."""
    from rankflow.compress.squeeze import canonicalize as run

    with bar("sorting") as progress:
        done = run(adapter, out, kind=kind, base=base, force=force, progress=progress)
    say(f"Wrote {done.out}: {len(done.modules)} modules, same ranks, same DeltaW.")


@app.command(epilog="Example: [bold]rankflow pad out/checkpoint-500 --rank 16 -o out/padded[/bold]")
def pad(
    adapter: Adapter,
    rank: Annotated[int | None, typer.Option(metavar="N", help="Rank of every module; the engine's choice.")] = None,
    engine: options.For = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder or file to write.")] = None,
    kind: options.From = None,
    to: options.Format = None,
    base: options.Base = None,
    force: Force = False,
) -> None:
    """Fill every module up to one rank with zeros: same DeltaW; in PEFT's format with alpha = r and no patterns."""
    from rankflow.compress.squeeze import pad as run
    from rankflow.render.tables import squeeze_table

    with bar("padding") as progress:
        done = run(adapter, out, rank=rank, engine=engine, force=force, kind=kind, to=to, base=base, progress=progress)
    print_table(squeeze_table(done))
    say(f"Wrote {done.out} in {done.seconds:.1f} s.")


@app.command(epilog="Example: [bold]rankflow diff out/checkpoint-500 out/checkpoint-500-r8[/bold]")
def diff(
    first: Adapter,
    second: Adapter,
    kind: Annotated[
        list[str] | None,
        typer.Option("--from", metavar="FORMAT", help="As in squeeze: of both, or given twice, of one and the other."),
    ] = None,
    base: options.Base = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")] = False,
) -> None:
    """Say how far apart two adapters of one model are, whatever their ranks."""
    from rankflow.analysis.difference import diff as run
    from rankflow.render.tables import difference_table

    with bar("comparing") as progress:
        kinds = kind[0] if kind and len(kind) == 1 else kind or None
        found = run(first, second, kind=kinds, base=base, progress=progress)
    if as_json:
        print_json(found.to_json())
    else:
        print_table(difference_table(found))

"""Options that several commands share, and the targets they spell."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rankflow.errors import ConfigError

if TYPE_CHECKING:
    from rankflow.calibration.statistics import Statistics
    from rankflow.compress.target import Target
    from rankflow.linalg.parallel import Progress

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
TargetRank = Annotated[int | None, typer.Option(metavar="N", help="One rank for all modules that have more.")]
Energy = Annotated[
    float | None, typer.Option(metavar="E", help="Share of its squared singular values every module keeps, e.g. 0.9.")
]
Error = Annotated[
    float | None, typer.Option(metavar="E", help="Relative error |change| / |DeltaW| of every module, e.g. 0.1.")
]
Across = Annotated[
    bool, typer.Option("--global", help="With --energy or --error: of all modules together, not of each.")
]
Auto = Annotated[
    bool, typer.Option("--auto", help="Directions above the noise threshold (Marchenko-Pastur, from the median).")
]
DynamicMethod = Annotated[
    str | None, typer.Option(metavar="RULE", help="As in sd-scripts: sv_ratio, sv_fro or sv_cumulative ...")
]
DynamicParam = Annotated[float | None, typer.Option(metavar="P", help="... and its parameter.")]
MaxParams = Annotated[int | None, typer.Option(metavar="N", help="LoRA parameters in all, spent where they keep most.")]
Size = Annotated[str | None, typer.Option(metavar="SIZE", help="Bytes of the file in all, e.g. 32MiB.")]
BudgetYaml = Annotated[
    Path | None, typer.Option("--budget", metavar="FILE", help="YAML with budget, limits, tie and rank_buckets.")
]
Exact = Annotated[
    bool, typer.Option("--exact", help="With --max-params, --size or --budget: the very best ranks of that cost.")
]
MaxRank = Annotated[int | None, typer.Option(metavar="N", help="No module has a higher rank.")]
RankMultiple = Annotated[int, typer.Option(metavar="N", help="Ranks are multiples of this.")]
Metric = Annotated[
    str, typer.Option(help="What is preserved: weights; with --calibration the layers' outputs, or the loss.")
]
Calibration = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Statistics from `rankflow calibrate`, or data as it takes them, with --base."),
]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Base model's folder: to take from a whole model, for adapters of shapes unknown, for gguf; or with data.",
    ),
]
Backend = Annotated[
    str | None,
    typer.Option(
        help="SVD: exact, or randomised on the full update: torch, fbpca, sklearn. Exact from factors if not"
        " given, else torch."
    ),
]
For = Annotated[
    str | None,
    typer.Option(
        "--engine",
        metavar="ENGINE",
        help="vllm, sglang, lorax, tensorrt-llm, llamacpp, diffusers, comfyui or peft: write what that loads rightly.",
    ),
]
Format = Annotated[
    str | None,
    typer.Option("--to-format", metavar="FORMAT", help="Write peft, kohya, diffusers or gguf; as the source is."),
]
From = Annotated[
    str | None,
    typer.Option(
        "--from-format",
        metavar="FORMAT",
        help="peft, kohya, comfyui, diffusers or full (a whole model); told from the file if left out.",
    ),
]
BaseLookedUp = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="MODEL",
        help="With an adapter: its base model's folder, to say which modules it lacks, or for adapters of shapes"
        " unknown and for gguf.",
    ),
]
Html = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="Write a report to look at in a browser, one file.")
]
Device = Annotated[str, typer.Option(help="Where to compute, e.g. cpu or cuda:0.")]


_AS_THEY_STAND = (
    "target_rank",
    "energy",
    "error",
    "across",
    "auto",
    "max_params",
    "exact",
    "max_rank",
    "rank_multiple",
)


def statistics(given: Mapping[str, Any], progress: Progress) -> Statistics | Path | None:
    """What --calibration names, or what comes of it if it is data.

    Raises:
        ConfigError: --base without data, or data without it; else as `rankflow.calibration.base_model.calibrate_saved`.
    """
    from rankflow.formats.open import uses_base

    found, base = given["calibration"], given["base"]
    data = None if found is None or found.suffix == ".safetensors" else found
    for_gguf = given.get("to_format") == "gguf" or given.get("engine") == "llamacpp"
    needless = base is not None and not for_gguf and not uses_base(given["adapter"])
    together = "--calibration DATA and --base MODEL go together; a statistics file needs no base"
    if base is None and data is not None:
        raise ConfigError(together)
    if data is None and needless:
        raise ConfigError(f"{given['adapter']}: is read without its base; {together}")
    if base is None or data is None:
        return found
    from rankflow.calibration.base_model import calibrate_saved

    return calibrate_saved(
        given["adapter"], base, data, metric=given["metric"], device=given["device"], progress=progress
    )


_READ = {"plan": "its plan", "calibration": "its statistics or data", "base": "its base", "budget": "its budget"}


def read(source: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What a command reads, by what it is to it: its source, and what options name."""
    return {**source, **{what: given.get(option) for option, what in _READ.items()}}


_GOALS = (
    *("target_rank", "energy", "error", "auto", "max_params", "size", "dynamic_method", "budget", "plan", "ranks"),
    "accept",
)


def targets(given: Mapping[str, Any], *, keep: bool = False) -> list[Target]:
    """One target for each output, from all that a command was given (`typer.Context.params`); it need not have every
    option there is. With `keep` ranks stay as they are where no target was given.

    Raises:
        ConfigError: none or several targets, or options that do not go together.
    """
    from rankflow.compress.plan_file import read_budget, read_plan
    from rankflow.compress.target import SV_RULES, Target, every_rank
    from rankflow.config.schema import parse_size
    from rankflow.formats.open import open_adapter

    goal: dict[str, Any] = {name: given[name] for name in _AS_THEY_STAND}
    goal["keep"] = keep and not any(given.get(name) for name in _GOALS)
    method, param = given["dynamic_method"], given["dynamic_param"]
    if (method is None) != (param is None):
        raise ConfigError("--dynamic-method and --dynamic-param go together; give both or neither")
    if method is not None:
        if method not in SV_RULES:
            raise ConfigError(f"--dynamic-method {method!r} is not one of {', '.join(SV_RULES)}")
        goal[method] = param
    if (size := given["size"]) is not None:
        try:
            goal["size"] = parse_size(int(size) if size.isdigit() else size)
        except ValueError as e:
            raise ConfigError(f"--size: {e}") from None
    if given["budget"] is not None:
        goal["budget"], goal["limits"] = read_budget(given["budget"])
        others = [name for name in _GOALS if name != "budget" and given.get(name)]
        if goal["budget"] is None and not (goal["keep"] or others):
            raise ConfigError(f"{given['budget']}: has no budget; add one, or give a target beside it")
    if given.get("plan") is not None:
        goal["ranks"] = read_plan(given["plan"])
    ranks = given.get("ranks")
    if given.get("accept") is not None:
        if ranks is not None:
            raise ConfigError("acceptance looks for the rank by itself, so --ranks cannot be given too; leave out one")
        return every_rank(open_adapter(given["adapter"], given["from_format"], given["base"]).layout, **goal)
    if ranks is None:
        return [Target(**goal)]
    if re.fullmatch(r"\d+(,\d+)*", ranks) is None:
        raise ConfigError(f"--ranks {ranks!r} is not a list of whole numbers such as 4,8,16")
    if goal["target_rank"] is not None:
        raise ConfigError("--ranks and --target-rank are two targets; give one")
    return [Target(**{**goal, "target_rank": rank}) for rank in dict.fromkeys(map(int, ranks.split(",")))]

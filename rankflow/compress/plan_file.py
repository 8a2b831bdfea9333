"""Read and write plans for saved adapters: YAML files with the rank of every module."""

from __future__ import annotations

import os
from pathlib import Path

import yaml
from pydantic import TypeAdapter

from rankflow.compress.report import SqueezeReport
from rankflow.config.load import limits_of, validated
from rankflow.config.schema import BudgetFile, PlanFile
from rankflow.config.yaml import read_yaml
from rankflow.errors import ConfigError
from rankflow.formats.io.atomic import atomic_file
from rankflow.formats.io.outputs import check_output
from rankflow.plans.budget import Budget
from rankflow.plans.limits import Limits


def write_plan(report: SqueezeReport, out: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Write the ranks that a (dry) squeeze came to, one line a module with what it keeps.

    Raises:
        ConfigError: `out` is there already and `force` was not given, or is of the adapter.
    """
    path = Path(out)
    check_output(path, {"the adapter": report.source}, force=force)
    head = {
        "adapter": report.source,
        "target": report.target,
        "summary": f"{report.energy_kept:.2%} of the energy in {report.params_after:,} of {report.params_before:,} "
        "parameters",
    }
    lines = ["# Ranks to squeeze to; edit them, then: rankflow squeeze ADAPTER --plan THIS_FILE"]
    lines += yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=120).splitlines()
    lines.append("ranks:")
    names = [f"{_key(m.name)}: {m.rank_after}" for m in report.modules]
    wide = max(map(len, names))
    for line, m in zip(names, report.modules, strict=True):
        lines.append(f"  {line:<{wide}}  # of {m.rank_before}, keeps {m.energy_kept:.2%}")
    with atomic_file(path) as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _key(name: str) -> str:
    """Return a module's name as YAML has it, on one line however long it is."""
    return yaml.safe_dump(name, width=10_000, allow_unicode=True).removesuffix("\n...\n").rstrip("\n")


def read_plan(path: str | os.PathLike[str]) -> dict[str, int]:
    """Return module -> rank, as a plan file has it.

    Raises:
        ConfigError: no plan, or everything that is wrong in it.
    """
    return dict(validated(TypeAdapter(PlanFile), _mapping(Path(path), "ranks:"), str(path)).ranks)


def read_budget(path: str | os.PathLike[str]) -> tuple[Budget | None, Limits]:
    """Read a budget file: `budget`, and the `limits`, `tie`, `rank_buckets` and `rank_multiple` of policy files.

    Raises:
        ConfigError: no such file, or everything that is wrong in it.
    """
    data = _mapping(Path(path), "budget: or limits:")
    spec = validated(TypeAdapter(BudgetFile), data, str(path))
    return spec.budget.build() if spec.budget is not None else None, limits_of(spec, data)


def _mapping(path: Path, wanted: str) -> dict[str, object]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: not a mapping with {wanted}")
    return data

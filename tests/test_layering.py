"""Imports run downwards only: core <- runtime <- edges, and nothing imports the command line."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "rankflow"
CORE = [
    "errors",
    "seeds",
    "patterns",
    "inits",
    "plan",
    "schedule",
    "limits",
    "budget",
    "knapsack",
    "margins",
    "metrics",
    "gate",
    "learnt",
    "policy",
    "opening",
    "pruning",
    "scores",
    "lowering",
    "triplets",
    "linalg",
    "spectra",
    "nearest",
    "roots",
    "carry",
    "growth",
    "pca",
    "rsvd",
    "statistics",
    "transitions",
    "sparing",
    "idleness",
    "names",
    "summary",
    "hardconcrete",
    "bits",
    "policies",
]
RUNTIME = [
    "interrupts",
    "disk",
    "journal",
    "sites",
    "base_weight",
    "moments",
    "staging",
    "gated",
    "gates",
    "heldout",
    "adapters",
    "optim",
    "handlers",
    "blockwise",
    "optimizers",
    "ramps",
    "rooms",
    "eagerness",
    "probes",
    "recorder",
    "signals",
    "studies",
    "averages",
    "hearing",
    "sharing",
    "listeners",
    "holders",
    "surgeon",
    "ledger",
    "seals",
    "penalties",
    "shards",
    "processes",
    "operations",
    "ema",
    "recompiles",
    "attachments",
    "controller",
]
EDGES = [
    "grammar",
    "config",
    "distributed",
    "fsdp",
    "wire",
    "formats",
    "engines",
    "mismatches",
    "fitting",
    "base_names",
    "verdicts",
    "crew",
    "inspection",
    "intruders",
    "against_base",
    "squeezed",
    "targets",
    "trials",
    "devices",
    "batches",
    "cutting",
    "corpus",
    "measured",
    "calibration",
    "pretrained",
    "base_model",
    "yardstick",
    "planning",
    "tails",
    "in_memory",
    "difference",
    "options",
    "divergence",
    "canvas",
    "panels",
    "tables",
    "ran",
    "json_schemas",
    "page",
    "page_of",
    "policy_tables",
    "blank",
    "costs",
    "checkpoint",
    "quantized",
    "resume",
    "loop",
    "trainer",
    "report",
    "watching",
    "terminal",
    "commands",
    "cli",
    "__main__",
    "__init__",
]
TOP = ("terminal", "commands", "cli", "__main__")
LAYER = {name: rank for rank, names in enumerate((CORE, RUNTIME, EDGES)) for name in names}
FILES = sorted(ROOT.rglob("*.py"))


def room(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0]


def imports(path: Path) -> list[str]:
    """Dotted names of everything a file imports, inside functions and TYPE_CHECKING blocks too."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def own(name: str) -> str | None:
    """The room of ours that an imported name lives in."""
    head, _, rest = name.partition(".")
    return rest.split(".")[0] if head == "rankflow" and rest else None


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downwards(path: Path):
    here = room(path)
    assert here in LAYER, f"{here} has no layer; add it to one in this test"
    for name in imports(path):
        target = own(name)
        if target is None or target not in LAYER:
            continue
        assert LAYER[target] <= LAYER[here], f"{here} imports {name}, which lies above it"
        assert target not in TOP or here in TOP, f"{here} imports the command line"


@pytest.mark.parametrize("path", [p for p in FILES if room(p) in CORE], ids=lambda p: str(p.relative_to(ROOT)))
def test_core_is_pure(path: Path):
    for name in imports(path):
        assert name.split(".")[0] not in ("peft", "transformers", "accelerate", "safetensors", "pathlib", "os"), (
            f"{path.name} imports {name}"
        )


@pytest.mark.parametrize("path", sorted((ROOT / "policies").glob("*.py")), ids=lambda p: p.stem)
def test_policies_know_only_the_core_and_not_each_other(path: Path):
    for name in imports(path):
        target = own(name)
        assert target is None or (target in CORE and target != "policies"), f"{path.name} imports {name}"


def test_only_one_file_knows_the_trainer_and_one_the_peft_layers():
    for path in FILES:
        for name in imports(path):
            if name.startswith("transformers.trainer") or name in (
                "transformers.Trainer",
                "transformers.TrainerCallback",
            ):
                assert path.stem == "trainer", f"{path.name} imports {name}"
            if name.startswith("peft.tuners.") and ".layer" in name:
                assert path.stem == "adapters", f"{path.name} imports {name}"

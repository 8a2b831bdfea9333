"""Imports run down the list of folders, and nothing but folders is listed."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "rankflow"

# From the bottom to the top: a folder imports itself and those before it. CONTRIBUTING says what is in each.
FOLDERS = [
    "linalg",
    "plans",
    "policies",
    "config",
    "formats",
    "lora",
    "distributed",
    "optim",
    "observe",
    "gating",
    "surgery",
    "training",
    "serving",
    "calibration",
    "compress",
    "analysis",
    "render",
    "cli",
]
PURE = FOLDERS[: FOLDERS.index("config")]
FILES = sorted(ROOT.rglob("*.py"))


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


def folder_of(name: str) -> str | None:
    """The folder of ours that an imported name lives in."""
    head, _, rest = name.partition(".")
    folder = rest.split(".")[0]
    return folder if head == "rankflow" and folder in FOLDERS else None


def test_the_folders_are_those_listed():
    assert {path.name for path in ROOT.iterdir() if (path / "__init__.py").is_file()} == set(FOLDERS)


def test_no_file_imports_from_above():
    upwards = set()
    for path in FILES:
        here = path.relative_to(ROOT).parts[0]
        if here in FOLDERS:
            above = FOLDERS[FOLDERS.index(here) + 1 :]
            upwards |= {
                (path.relative_to(ROOT).as_posix(), folder_of(n)) for n in imports(path) if folder_of(n) in above
            }
    assert not upwards


@pytest.mark.parametrize("folder", PURE)
def test_what_is_pure_knows_neither_files_nor_live_models(folder: str):
    for path in sorted((ROOT / folder).rglob("*.py")):
        for name in imports(path):
            assert name.split(".")[0] not in ("peft", "transformers", "accelerate", "safetensors", "pathlib", "os"), (
                f"{path.name} imports {name}"
            )


@pytest.mark.parametrize("path", sorted((ROOT / "policies" / "methods").glob("*.py")), ids=lambda p: p.stem)
def test_policies_do_not_know_each_other(path: Path):
    for name in imports(path):
        assert not name.startswith("rankflow.policies.methods"), f"{path.name} imports {name}"


TRAINER = {"training/trainer.py", "training/trainer_patches.py"}
PEFT_DATA = {"peft.LoraConfig", "peft.PeftType"}
# Files outside lora/ that use live PEFT models: what loads them, what makes them, and the Trainer's.
LIVE_PEFT = {
    "training/trainer_patches.py",
    "training/checkpoint.py",
    "calibration/base_model.py",
    "analysis/forecast.py",
}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_only_named_files_know_the_trainer_and_live_peft_models(path: Path):
    here = path.relative_to(ROOT).as_posix()
    for name in imports(path):
        if name.startswith("transformers.trainer") or name in ("transformers.Trainer", "transformers.TrainerCallback"):
            assert here in TRAINER, f"imports {name}"
        if name.startswith("peft.tuners"):
            assert here.startswith("lora/"), f"imports {name}"
        if name.startswith("peft.") and name not in PEFT_DATA:
            assert here.startswith("lora/") or here in LIVE_PEFT, f"imports {name}"

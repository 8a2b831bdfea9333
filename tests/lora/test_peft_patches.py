"""The list of patches of PEFT: each is of a method that exists, was tried with this PEFT, and has its tests."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from rankflow.lora.peft_patches import PATCHES, Patch

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.methods[0][1])
def test_every_patch_was_tried_with_the_installed_peft_and_names_its_tests(patch: Patch):
    assert ".".join(metadata.version("peft").split(".")[:2]) in patch.tried
    assert patch.why
    assert patch.tests
    for test in patch.tests:
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / file).read_text()
    assert all(callable(getattr(cls, name)) for cls, name in patch.methods)


def test_no_other_file_replaces_a_method_of_peft():
    for path in (ROOT / "rankflow").rglob("*.py"):
        lines = path.read_text().splitlines()
        ours = [line for line in lines if line.strip().startswith(("PeftModel.", "BaseTuner.", "setattr(BaseTuner"))]
        assert not ours or path.name == "peft_patches.py", f"{path}: {ours[0]}"


class Owner:
    def method(self, x: int) -> int:
        """Its own words."""
        return x


def test_a_patch_is_put_on_once_and_keeps_name_and_signature():
    patch = Patch(((Owner, "method"),), "to see", ("tests/lora/test_peft_patches.py",), ("0.21",))

    def around(method: Any) -> Any:
        return lambda self, x: method(self, x) + 1

    patch.install(around)
    patch.install(around)
    assert Owner().method(1) == 2
    assert Owner.method.__name__ == "method"
    assert Owner.method.__doc__ == "Its own words."

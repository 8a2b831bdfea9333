"""The restoration example: what it does to photographs, and that it runs from end to end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Generator

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_degradations_spoil_images_the_same_way_every_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import degradations as d

    train, held_out = d.photographs()
    clean = d.crops([*train, *held_out], 7, 48, Generator().manual_seed(0))
    assert clean.shape == (7, 3, 48, 48)
    assert 0 <= clean.min() < clean.max() <= 1
    for degradation in (d.blur, d.noise, d.rain, d.blocking, d.random_order, *d.HELD_OUT.values()):
        once, again, other = (d.spoil(clean, degradation, Generator().manual_seed(seed)) for seed in (1, 1, 2))
        assert torch.equal(once, again)
        assert not torch.equal(once, other)
        assert once.shape == clean.shape
        assert bool((once != clean).flatten(1).any(1).all())


@pytest.mark.slow
def test_the_example_runs_and_leaves_its_pictures(tmp_path: Path):
    command = [sys.executable, str(EXAMPLES / "image_restoration.py"), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for arm in ("not at all", "uniform ranks", "in full"):
        assert arm in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"haze.png", "haze-ranks.png"}

"""The smallest rank a gate accepts: the search against trying every rank, and real commands from end to end."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from rankflow import ConfigError, squeeze
from rankflow.compress import each
from rankflow.compress.accept import acceptance_command, accepted, contradictions, search
from rankflow.formats.peft.adapter import PeftAdapter
from tests.cli.test_app import run


@pytest.fixture(autouse=True)
def scratch(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    """Where candidates go; nothing may be left there."""
    folder = tmp_path_factory.mktemp("scratch")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not list(folder.iterdir())


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Two modules, of ranks 12 and 5."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    g = torch.Generator().manual_seed(0)
    tensors = {}
    for name, rank in (("q_proj", 12), ("up_proj", 5)):
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, 16, generator=g)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(20, rank, generator=g)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 12, "lora_alpha": 12, "target_modules": ["q_proj", "up_proj"]}
    config |= {"rank_pattern": {"up_proj": 5}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


# -- the search -------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60, unique=True).map(sorted), st.data())
def test_a_monotone_gate_gets_the_smallest_rank_in_few_trials(ranks: list[int], data: st.DataObject):
    least = data.draw(st.sampled_from([*ranks, ranks[-1] + 1]))
    trials = search(ranks, lambda rank: rank >= least)
    assert len(trials) <= 2 + len(ranks).bit_length()
    assert len({trial.rank for trial in trials}) == len(trials)
    assert trials[0].rank == ranks[-1]
    assert contradictions(trials) == ()
    if least > ranks[-1]:
        with pytest.raises(ConfigError, match="accepted was none of ranks"):
            accepted(trials)
    else:
        assert accepted(trials) == least


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_any_gate_gets_a_rank_that_passed_and_is_contradicted_where_that_was_seen(passes: list[bool]):
    trials = search(range(1, len(passes) + 1), lambda rank: passes[rank - 1])
    assert all(trial.passed == passes[trial.rank - 1] for trial in trials)
    if any(trial.passed for trial in trials):
        rank = accepted(trials)
        assert passes[rank - 1]
        assert rank == 1 or not passes[rank - 2], "the next smaller one failed"
    seen = any(a.passed and not b.passed and a.rank < b.rank for a in trials for b in trials)
    assert bool(contradictions(trials)) == seen


# -- commands ---------------------------------------------------------------------------------------------------------

JUDGE = """
import sys
from safetensors import safe_open
*_, least, path = sys.argv
with safe_open(path + "/adapter_model.safetensors", "numpy") as file:
    rank = max(file.get_slice(key).get_shape()[0] for key in file.keys() if "lora_A" in key)
print("rank", rank)
sys.exit(not eval(least))
"""


@pytest.fixture
def judge(tmp_path: Path) -> str:
    (tmp_path / "my judge.py").write_text(JUDGE)
    return f"{sys.executable} '{tmp_path}/my judge.py'"


def test_the_smallest_rank_a_command_accepts_is_written(adapter: Path, tmp_path: Path, judge: str):
    report = tmp_path / "report.json"
    result = run("squeeze", adapter, "--accept", f"{judge} 'rank >= 7' {{}}", "--report", report)
    out = tmp_path / "adapter-accepted"
    assert PeftAdapter(out).layout.ranks == {"q_proj": 7, "up_proj": 5}
    squeeze(adapter, tmp_path / "plain", target_rank=7)
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (out, tmp_path / "plain"))
    assert all(torch.equal(one[key], other[key]) for key in one | other)
    trials = json.loads(report.read_text())["trials"]
    assert [(t["rank"], t["passed"]) for t in trials] == [(12, True), (6, False), (9, True), (8, True), (7, True)]
    shown = " ".join(result.stdout.split())
    assert "12 passed" in shown
    assert "6 failed" in shown
    assert "rank 12" not in result.stdout, "what the command prints is not for stdout"
    assert "not monotone" not in shown


def test_a_gate_that_is_not_monotone_is_said_to_be(adapter: Path, tmp_path: Path, judge: str):
    result = run("squeeze", adapter, "--accept", f"{judge} '4 <= rank < 10'", "-o", tmp_path / "out")
    assert PeftAdapter(tmp_path / "out").layout.ranks == {"q_proj": 4, "up_proj": 4}
    assert "acceptance is not monotone: rank 12 failed where rank 4 passed" in " ".join(result.stdout.split())


def test_nothing_accepted_is_an_error_and_nothing_is_written(adapter: Path, tmp_path: Path, judge: str):
    before = {p.name for p in tmp_path.iterdir()}
    result = run("squeeze", adapter, "--accept", f"{judge} False", status=2)
    assert "accepted was none of ranks 12, 6, 9, 11, tried in that order; nothing is written" in result.stderr
    assert {p.name for p in tmp_path.iterdir()} == before


def test_candidates_are_what_limits_allow_and_decomposed_once(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scratch: Path
):
    decomposed: list[str] = []
    spectrum = each.Metric.spectrum
    monkeypatch.setattr(
        each.Metric,
        "spectrum",
        lambda self, name, *rest: decomposed.append(name) or spectrum(self, name, *rest),
    )
    seen: list[Path] = []

    def gate(candidate: Path) -> bool:
        assert candidate.is_relative_to(scratch)
        assert len(list(scratch.iterdir())) == 1, "one candidate at a time"
        seen.append(candidate)
        return max(PeftAdapter(candidate).layout.ranks.values()) >= 3

    report = squeeze(adapter, tmp_path / "out", accept=gate, max_rank=10, rank_multiple=2)
    assert [trial.rank for trial in report.trials] == [10, 6, 4, 2]
    assert report.ranks == {"q_proj": 4, "up_proj": 4}
    assert report.target == {"target_rank": 4, "max_rank": 10, "rank_multiple": 2}
    assert sorted(decomposed) == ["q_proj", "up_proj"]
    assert not any(path.exists() for path in seen)
    dry = squeeze(adapter, accept=gate, dry_run=True)
    assert (dry.out, dry.ranks) == (None, {"q_proj": 3, "up_proj": 3})
    assert {p.name for p in tmp_path.iterdir()} == {"adapter", "out"}


def test_a_candidate_in_one_file_is_a_file(tmp_path: Path):
    stem = "lora_unet_down_blocks_0_attentions_0_proj_in"
    tensors = {f"{stem}.lora_down.weight": torch.randn(12, 16), f"{stem}.lora_up.weight": torch.randn(20, 12)}
    save_file({**tensors, f"{stem}.alpha": torch.tensor(6.0)}, tmp_path / "style.safetensors")
    report = squeeze(tmp_path / "style.safetensors", accept=lambda path: path.is_file() and path.stat().st_size > 1200)
    assert report.out == str(tmp_path / "style-accepted.safetensors")
    assert 1 < max(report.ranks.values()) < 12


def test_a_gate_judges_what_is_written_for_an_engine(adapter: Path, tmp_path: Path):
    run("squeeze", adapter, "--accept", "true", "--engine", "vllm", "--rank-multiple", 5, "-o", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (8, 8, {})


def test_a_gate_that_breaks_leaves_nothing(adapter: Path, tmp_path: Path):
    def gate(candidate: Path) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        squeeze(adapter, tmp_path / "out", accept=gate)
    assert {p.name for p in tmp_path.iterdir()} == {"adapter"}


def test_no_shell_sees_the_command(adapter: Path, tmp_path: Path):
    show = f"{sys.executable} -c 'import sys; open(sys.argv[-1], \"w\").write(repr(sys.argv[1:]))'"
    out = tmp_path / "said"
    assert acceptance_command(f"{show} '$(id)' '; rm -rf x' '*' 'a{{}}b' {out}")(tmp_path / "my adapter")
    assert eval(out.read_text()) == ["$(id)", "; rm -rf x", "*", f"a{tmp_path}/my adapterb", str(out)]


def test_mistakes(adapter: Path, tmp_path: Path):
    def refused(*options: object) -> str:
        result = run("squeeze", adapter, *options, status=2)
        assert {p.name for p in tmp_path.iterdir()} == {"adapter"}
        return result.stderr

    assert "--accept is empty" in refused("--accept", " ")
    assert "No closing quotation" in refused("--accept", "'x")
    assert "--accept: nobody-has-this cannot be run (No such file" in refused("--accept", "nobody-has-this {}")
    assert "looks for the rank by itself, so energy cannot" in refused("--accept", "true", "--energy", 0.9)
    assert "looks for the rank by itself, so target_rank cannot" in refused("--accept", "true", "--target-rank", 2)
    assert "looks for the rank by itself, so --ranks cannot" in refused("--accept", "true", "--ranks", "2,4")
    assert "max_rank is 0" in refused("--accept", "true", "--max-rank", 0)
    assert "rank_multiple is 0" in refused("--accept", "true", "--rank-multiple", 0)
    assert "its own source" in refused("--accept", "true", "-o", adapter)

"""What is set against tuned LoRA on six tasks: calibration errors, verdicts, tables, and the tasks' batches."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "benchmarks"))

from comparison.arms import ARMS
from comparison.arms import PROTOCOL as SHARED
from comparison.calibration import adaptive_calibration_error, calibration
from comparison.jobs import Job, Results
from comparison.paired_tables import Verdict, calibration_table, paired_tables, summary_table, tasks_table
from comparison.plan import OURS, Protocol, paired, plan, sweep
from comparison.settings import SETTINGS
from comparison.tables import NOT_RUN, foreign
from comparison.tasks import Task
from comparison.training import groups, train

PROTOCOL = Protocol()


def fields(loss: float, **more: float) -> dict:
    scored = {"accuracy": 0.5, "se": 0.01, "loss": loss, **more}
    return {"validation": scored, "test": scored, "params": 1, "cpu_seconds": 1.0, "seconds": 1.0, "peak_mb": 1}


def run_lora(results: Results, task: str, best: float = 2e-3) -> list[Job]:
    """Its sweep, least at `best`, and every seed, of loss 1 + seed; the jobs of the seeds."""
    for job in sweep(results, task, "lora", 4, SETTINGS[task].steps).missing:
        results.append(job, **fields(1 + abs(job.rate - best)))
    jobs = paired(results, PROTOCOL, task, "lora", 4)
    assert jobs is not None
    for job in jobs[1:]:
        results.append(job, **fields(1.0 + job.seed, ece=0.1, mce=0.2, ace=0.3))
    return jobs


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path)


@pytest.fixture
def ours(monkeypatch):
    """The arm of our own, whatever policies are shipped."""
    monkeypatch.setitem(ARMS, OURS, replace(ARMS[OURS], policy="gora"))
    return OURS


def test_confidence_of_nine_tenths_that_is_right_six_times_in_ten_is_three_tenths_off():
    probabilities = torch.tensor([[0.9, 0.1]]).repeat(10, 1)
    labels = torch.tensor([0] * 6 + [1] * 4)
    found = calibration(probabilities, labels)
    assert found["ece"] == pytest.approx(0.3, abs=1e-5)
    assert found["mce"] == pytest.approx(0.3, abs=1e-5)
    assert adaptive_calibration_error(probabilities, labels, bins=1) == pytest.approx(0.3)


def test_the_adaptive_error_is_the_mean_over_classes_and_bins_of_like_size():
    first = torch.tensor([0.9, 0.1, 0.8, 0.2])
    labels = torch.tensor([0, 1, 0, 0])
    # Class 0, sorted: (0.1, 0.2) is it in 1 of 2, (0.8, 0.9) in 2 of 2; class 1: (0.1, 0.2) in none, (0.8, 0.9) in one
    expected = (abs(0.5 - 0.15) + abs(1 - 0.85) + abs(0 - 0.15) + abs(0.5 - 0.85)) / 4
    assert adaptive_calibration_error(torch.stack([first, 1 - first], 1), labels, bins=2) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("differences", "below", "surely", "worse"),
    [
        ([-0.3, -0.1, -0.2], True, False, False),  # 4.303 * 0.1 / sqrt(3) = 0.248 > 0.2
        ([-0.3, -0.1, -0.2, -0.2, -0.2], True, True, False),
        ([0.3, 0.1, 0.2], False, False, True),  # one standard error is 0.058
        ([0.3, -0.1, -0.1], False, False, False),  # 0.033 above, of a standard error of 0.133
        ([-0.2], True, False, False),  # one seed has no interval
    ],
)
def test_verdicts_on_paired_differences(differences, below, surely, worse):
    verdict = Verdict(differences)
    assert (verdict.below, verdict.surely_below, verdict.worse) == (below, surely, worse)


def test_five_seeds_are_planned_at_the_rate_of_lora(results, ours):
    jobs = run_lora(results, "restorer", best=1e-2)
    assert [(job.rate, job.seed, job.steps) for job in jobs] == [(1e-2, seed, 100) for seed in range(5)]
    missing = [job for job in plan(results, PROTOCOL, ("lora_rate",)) if job.arm == ours and job.task == "restorer"]
    assert [(job.rate, job.seed) for job in missing] == [(1e-2, seed) for seed in range(5)]
    own = {job.rate for job in plan(results, PROTOCOL, ("own_rate",)) if job.task == "restorer"}
    assert own == set(SETTINGS["restorer"].rates or ())


def test_tables_pair_seeds_and_say_not_run(results, ours):
    for job in run_lora(results, "newsgroups"):
        results.append(Job("newsgroups", ours, 4, job.rate, job.seed, 200), **fields(0.9 + job.seed, ece=0.05))
    (row,) = (r for r in tasks_table(results, PROTOCOL, 4, own=False).splitlines() if "Newsgroups" in r)
    assert row.endswith("| -0.1000 ± 0.0000 |")
    assert "| 5 | 0.002 |" in row
    others = [r for r in tasks_table(results, PROTOCOL, 4, own=False).splitlines()[2:] if "Newsgroups" not in r]
    assert len(others) == 5
    assert all(NOT_RUN in other for other in others)
    (row,) = (r for r in summary_table(results, PROTOCOL).splitlines() if f"{ARMS[ours].title}, rate of LoRA" in r)
    assert row.endswith("| 1 of 6 | 5 | 1 | 1 | none |")
    assert foreign(results, PROTOCOL) == 0


def test_calibration_stands_beside_accuracy_where_a_line_has_it(results):
    run_lora(results, "vision", best=1e-3)
    row = calibration_table(results, PROTOCOL, "vision").splitlines()[2]  # the line of seed 0 is of the sweep
    assert row == "| LoRA, fixed rank | 50.0 ± 0.0 | 10.0 ± 0.0 | 20.0 ± 0.0 | 30.0 ± 0.0 | 4 |"


def test_a_default_that_is_spelt_out_later_leaves_the_lines_as_they_are(monkeypatch):
    job = Job("recovery", "sora", 4, 1e-3, 0, 200)
    before = job.digest
    assert ARMS["sora"].run_as(job.settings)["when"] == {**job.settings["when"], "stop": "100%"}
    monkeypatch.setitem(ARMS, "sora", replace(ARMS["sora"], spelt_out={}))
    assert job.digest == before


def test_all_tables_are_drawn_from_nothing(results):
    for make in paired_tables(results, PROTOCOL).values():
        assert all(NOT_RUN in row for row in make().splitlines()[2:])


def test_a_restorer_has_the_parameters_and_the_pairs_that_its_setting_says():
    from comparison.restoration import PAIRS, Restorer, restorer

    task = restorer()
    convolutions = dict(Restorer().named_modules())
    each = [convolutions[name] for name in task.modules]
    per_rank = sum(c.in_channels * c.kernel_size[0] * c.kernel_size[1] + c.out_channels for c in each)
    assert per_rank == SETTINGS["restorer"].per_rank
    own, study, other = (
        {hash(image.numpy().tobytes()) for batch in islice(task.batches(seed, 8), 40) for image in batch["target"]}
        for seed in (3, 1_003, 4)
    )
    assert own | study == own
    assert len(own) == PAIRS
    assert not own & other


def test_pictures_come_as_the_vision_model_wants_them():
    from comparison.vision import Vision

    task = Vision("vision", 10, {"train": ([[i] for i in range(6)], [0, 1, 2, 3, 4, 5])})
    task.images = torch.arange(6, dtype=torch.uint8)[:, None, None].expand(6, 28, 28).contiguous()
    batch = next(task.batches(0, 4))
    assert batch["pixel_values"].shape == (4, 3, 56, 56)
    shown = (batch["pixel_values"][:, 0, 0, 0] * 0.226 + 0.45) * 255
    assert shown.round().int().tolist() == batch["labels"].tolist()


def test_a_text_is_its_own_label_for_a_language_model():
    from comparison.language import LENGTH, Language

    task = Language("language", 0, {"train": ([[i] * LENGTH for i in range(8)], [0] * 8)})
    batch = next(task.batches(0, 4))
    assert batch["input_ids"].shape == (4, LENGTH)
    assert batch["labels"] is batch["input_ids"]
    assert len(batch["input_ids"].unique()) == 4


class Toy(nn.Module):
    """Learns to give its input back; notes at each step whether its adapter is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 6)
        self.classifier = nn.Linear(6, 6)
        self.trained: list[bool] = []

    def forward(self, x: Tensor) -> SimpleNamespace:
        if isinstance(self.fc1, LoraLayer):  # not in the passes before there is an adapter
            self.trained.append(self.fc1.lora_A["default"].weight.requires_grad)
        return SimpleNamespace(loss=(self.classifier(self.fc1(x)) - x).square().mean())


class ToyTask(Task):
    task_type = None
    modules: ClassVar[list[str]] = ["fc1"]
    head: ClassVar[list[str] | None] = ["classifier"]

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return Toy()

    def batches(self, seed: int, size: int) -> Iterator[dict[str, Tensor]]:
        return repeat({"x": torch.ones(size, 6)})


def toy(arm: str, steps: int = 20) -> tuple[PeftModel, Job, ToyTask]:
    job, task = Job("recovery", arm, 2, 1e-3, 0, steps), ToyTask("toy", 0, {})
    return train(job, task)[0], job, task


def test_only_the_head_is_trained_at_first_where_an_arm_says_so():
    assert toy("lora_head_first")[0].base_model.model.trained == [False] * 2 + [True] * 18
    assert all(toy("lora")[0].base_model.model.trained)


def test_b_has_sixteen_times_the_rate_of_a_with_lora_plus_and_the_head_its_own():
    found = groups(*toy("lora_plus"))
    assert [group["lr"] for group in found] == [1e-3, 1.6e-2, SHARED["head_lr"]]
    assert [len(group["params"]) for group in found] == [1, 1, 2]


@pytest.mark.filterwarnings("ignore:Full backward hook")  # of LoRA-GA, on the first module of a network
@pytest.mark.parametrize("arm", ["peft_pissa", "peft_lora_ga", "rslora"])
def test_peers_start_as_peft_has_it(arm):
    model, *_ = toy(arm)
    config = model.peft_config["default"]
    assert {name: getattr(config, name) for name in ARMS[arm].config} == ARMS[arm].config
    assert ARMS[arm].runs_on(SETTINGS["restorer"]) == (arm == "rslora")  # it has convolutions

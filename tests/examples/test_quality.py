"""The comparison's book-keeping: what is missing, what a killed run leaves behind, what the tables may show."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "benchmarks"))

from comparison import arms, jobs
from comparison.arms import ARMS
from comparison.jobs import Job, Results, append_line
from comparison.plan import ALSO_LONG, Protocol, Sweep, halving, long_seeds, long_sweep, plan, seeds, sweep
from comparison.tables import NOT_RUN, foreign, long_table, main_table, spread, tables

PROTOCOL = Protocol(main="newsgroups", side="rotten_tomatoes")
STEPS = PROTOCOL.steps


def fields(accuracy: float, loss: float) -> dict:
    scored = {"accuracy": accuracy, "se": 0.01, "loss": loss, "labels": 1000}
    return {
        "validation": scored,
        "test": scored,
        "params": 165_888,
        "total_rank": 144,
        "losses": [2.0, 1.0],
        "events": 0,
        "seconds": 60.0,
        "cpu_seconds": 50.0,
        "peak_mb": 800,
    }


def fill(results: Results, found: Sweep, best: float) -> None:
    """Lines for every missing job; validation loss is least at the rate `best`."""
    for job in found.missing:
        distance = abs(job.rate - best) / best
        results.append(job, **fields(0.3 - 0.01 * distance, 1 + distance))


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path)


def test_at_first_the_sweep_of_plain_lora_is_missing_and_no_seed_can_be_planned(results):
    missing = plan(results, PROTOCOL)
    assert {job.arm for job in missing[:20]} == {"lora"}  # born at each rank, the middle of the grid first
    assert {job.rate for job in missing[:10]} == set(sorted(ARMS["lora"].rates)[1:3])
    assert {job.seed for job in missing} == {0}
    assert len(missing) == len(set(missing))
    assert all(ARMS[job.arm].available for job in missing)
    assert seeds(results, PROTOCOL, "newsgroups", "lora", 4) is None


def test_seeds_follow_at_the_best_rate_and_are_not_planned_twice(results):
    fill(results, sweep(results, "newsgroups", "lora", 4, STEPS), best=2e-3)
    rows = [job for job in plan(results, PROTOCOL, ("seeds",)) if job.arm == "lora"]
    assert [(job.rate, job.seed) for job in rows] == [(2e-3, 1), (2e-3, 2)]  # seed 0 is the sweep's
    results.append(rows[0], **fields(0.3, 1.0))
    assert [job.seed for job in plan(results, PROTOCOL, ("seeds",)) if job.arm == "lora"] == [2]


@pytest.mark.parametrize(("best", "added"), [(1e-1, 1.6e-2), (1e-4, 5e-4)])
def test_a_best_rate_at_an_edge_of_the_grid_adds_one_beyond_it(results, best, added):
    for _ in range(2):
        fill(results, sweep(results, "newsgroups", "lora", 4, STEPS), best)
    assert added in sweep(results, "newsgroups", "lora", 4, STEPS).rates


def test_a_sweep_ends_even_when_the_best_stays_at_the_edge_and_says_so(results):
    for _ in range(10):
        fill(results, sweep(results, "newsgroups", "lora", 4, STEPS), best=100.0)
    found = sweep(results, "newsgroups", "lora", 4, STEPS)
    assert found.best == max(found.rates)
    assert found.edge
    assert "*" in main_table(results, PROTOCOL, "newsgroups", 4)


def test_halving_tries_all_rates_at_half_the_steps_and_the_better_half_at_all(results, monkeypatch):
    monkeypatch.setitem(ARMS, "rigl", replace(ARMS["rigl"], policy="hold"))
    first = halving(results, "newsgroups", "rigl", 4, STEPS)
    assert [job.steps for job in first.missing] == [STEPS // 2] * 4
    fill(results, first, best=2e-3)
    second = halving(results, "newsgroups", "rigl", 4, STEPS)
    assert sorted((job.rate, job.steps) for job in second.missing) == [(1e-3, STEPS), (2e-3, STEPS)]
    fill(results, second, best=2e-3)
    assert halving(results, "newsgroups", "rigl", 4, STEPS).best == 2e-3


def test_longer_runs_try_the_best_rate_of_the_usual_length_and_its_neighbours(results):
    for arm in ALSO_LONG:  # which no other stage tries at every rate
        assert {(job.arm, job.steps) for job in plan(results, PROTOCOL, ("long",))} == {(arm, STEPS)}
        fill(results, sweep(results, "newsgroups", arm, 4, STEPS), best=2e-3)
        fill(results, long_sweep(results, PROTOCOL, arm), best=2e-3)
        assert {(job.arm, job.seed) for job in plan(results, PROTOCOL, ("long",))} == {(arm, 1), (arm, 2)}
        for job in plan(results, PROTOCOL, ("long",)):
            results.append(job, **fields(0.3, 1.0))
    assert plan(results, PROTOCOL, ("long",)) == []  # of no other arm a rate is known to start from
    fill(results, sweep(results, "newsgroups", "lora", 4, STEPS), best=2e-3)
    found = long_sweep(results, PROTOCOL, "lora")
    assert [(job.rate, job.steps) for job in found.missing] == [(r, 4 * STEPS) for r in (1e-3, 2e-3, 4e-3)]
    fill(results, found, best=1e-3)
    assert long_seeds(results, PROTOCOL, "lora") is None  # the best is at the edge: one more
    assert [job.rate for job in plan(results, PROTOCOL, ("long",))] == [5e-4]
    fill(results, long_sweep(results, PROTOCOL, "lora"), best=1e-3)
    rows = long_seeds(results, PROTOCOL, "lora")
    assert [(job.rate, job.seed, job.steps) for job in rows] == [(1e-3, seed, 4 * STEPS) for seed in range(3)]
    assert f"| LoRA, fixed rank | 30.0 | 1.0 | 1.0000 |  | 1 | {1e-3:g} |" in long_table(results, PROTOCOL)
    assert foreign(results, PROTOCOL) == 0


def test_a_torn_line_costs_its_own_run_only(results, tmp_path):
    first, second, third = sweep(results, "newsgroups", "lora", 4, STEPS).jobs[:3]
    results.append(first, **fields(0.2, 1.0))
    results.append(second, **fields(0.3, 1.0))
    path = tmp_path / "newsgroups.jsonl"
    path.write_bytes(path.read_bytes()[:-40])  # killed while writing
    again = Results(tmp_path)
    assert again.of(first) is not None
    assert again.of(second) is None
    assert second in plan(again, PROTOCOL)
    again.append(third, **fields(0.4, 1.0))
    again.append(second, **fields(0.3, 1.0))
    assert all(Results(tmp_path).of(job) is not None for job in (first, second, third))


def test_writers_side_by_side_leave_whole_lines(tmp_path):
    path = tmp_path / "x.jsonl"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: append_line(path, {"digest": str(i), "filling": "x" * 5000}), range(200)))
    assert {json.loads(line)["digest"] for line in path.read_text().splitlines()} == set(map(str, range(200)))


@pytest.mark.parametrize("change", ["protocol", "version", "task", "policy"])
def test_a_line_of_another_configuration_is_not_used(results, monkeypatch, change):
    arm = "squeeze" if change == "policy" else "lora"
    fill(results, sweep(results, "newsgroups", arm, 4, STEPS), best=2e-3)
    assert "30.0" in main_table(results, PROTOCOL, "newsgroups", 4)
    assert foreign(results, PROTOCOL) == 0
    match change:
        case "protocol":
            monkeypatch.setitem(arms.PROTOCOL, "head_lr", 0.5)
        case "version":
            monkeypatch.setitem(ARMS, arm, replace(ARMS[arm], version=99))
        case "task":
            monkeypatch.setattr(jobs, "TASK_VERSION", 99)
        case "policy":
            monkeypatch.setitem(ARMS, arm, replace(ARMS[arm], params={"metric": "loss"}))
    table = main_table(results, PROTOCOL, "newsgroups", 4)
    assert "30.0" not in table
    assert foreign(results, PROTOCOL) == 4


def test_an_unfinished_sweep_shows_its_best_run_and_says_so(results):
    job = sweep(results, "newsgroups", "lora", 4, STEPS).jobs[0]
    results.append(job, **fields(0.3, 1.0))
    assert "| LoRA, fixed rank | 30.0 (1 of 4 rates) |" in main_table(results, PROTOCOL, "newsgroups", 4)
    assert "30.0" not in main_table(results, PROTOCOL, "newsgroups", 2)


def test_arms_without_a_policy_are_not_run(results, monkeypatch):
    monkeypatch.setitem(ARMS, "sora", replace(ARMS["sora"], title="Absent", policy="no_such_policy"))
    assert "sora" not in {job.arm for job in plan(results, PROTOCOL)}
    assert f"| Absent | {NOT_RUN} |" in main_table(results, PROTOCOL, "newsgroups", 4)


def test_every_table_says_not_run_before_anything_ran_and_shows_the_mean_after(results):
    for text in tables(results, PROTOCOL).values():
        assert all(NOT_RUN in row for row in text.splitlines()[2:])
    fill(results, sweep(results, "newsgroups", "lora", 4, STEPS), best=2e-3)
    for job, accuracy in zip(seeds(results, PROTOCOL, "newsgroups", "lora", 4), (0.2, 0.3, 0.4), strict=True):
        results.append(job, **fields(accuracy, 1.0))
    # mean 0.3, standard deviation 0.1, Student's t of 2 degrees of freedom 4.303: 4.303 * 0.1 / sqrt(3)
    assert "| LoRA, fixed rank | 30.0 ± 24.8 | 1.0 | 1.0000 ± 0.0000 |  | 3 |" in main_table(
        results, PROTOCOL, "newsgroups", 4
    )
    assert spread([25.04]) == "25.0"


def test_an_arm_is_set_against_lora_of_the_same_seed(results):
    for arm in ("lora", "squeeze"):
        fill(results, sweep(results, "newsgroups", arm, 4, STEPS), best=2e-3)
        for job in seeds(results, PROTOCOL, "newsgroups", arm, 4):
            results.append(job, **fields(0.5, 1.0 + job.seed + (0.01 if arm == "squeeze" else 0.0)))
    row = next(r for r in main_table(results, PROTOCOL, "newsgroups", 4).splitlines() if "LoRA-Squeeze" in r)
    assert "| 2.0100 ± 2.4841 | 0.0100 ± 0.0000 | 3 |" in row  # between seeds losses differ by 1, within one by 0.01


def test_recovery_asks_a_pruned_model_for_what_the_unharmed_one_says():
    from comparison.recovery import Embedder, Recovery

    rows = [[101, 2000 + 7 * i, 3000 + i, 102] for i in range(8)]
    task = Recovery("recovery", 0, {"test": (rows, [0] * 8)})
    harmed = task.model(0)
    for module in harmed.modules():
        if isinstance(module, torch.nn.Linear):
            kept = module.weight[module.weight != 0].abs()
            assert kept.numel() == pytest.approx(module.weight.numel() / 2, rel=1e-3)
    score = task.score(harmed, "test")
    assert 0.1 < score["loss"] < 1  # halving a model does harm
    assert task.score(Embedder(), "test") == {"accuracy": 1.0, "se": 0.0, "loss": pytest.approx(0, abs=1e-6)}
    (batch,) = task.held_out("test")
    harmed.eval()
    assert harmed(**batch).loss.item() == pytest.approx(score["loss"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["lora", "peft_adalora", "squeeze"])
def test_arms_end_at_the_same_size_and_scale(arm):
    from comparison.tasks import load
    from comparison.training import sizes, train

    job = Job("rotten_tomatoes", arm, 2, 1e-3, 0, 20)
    task = load("rotten_tomatoes")
    model, losses, _ = train(job, task)
    if arm == "peft_adalora":  # it counts ranks, not parameters
        assert sizes(model)["total_rank"] == 2 * 36
    else:
        assert 0.97 * job.params <= sizes(model)["params"] <= job.params
    assert all(loss > 0 for loss in losses)
    scales = set()
    for module in model.modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            ranknum = float(module.ranknum["default"]) if hasattr(module, "ranknum") else 1.0
            scales.add(round(module.scaling["default"] / ranknum, 6))
    assert scales == {2.0}
    assert task.score(model, "validation") == task.score(model, "validation")

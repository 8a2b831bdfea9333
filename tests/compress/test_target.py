"""How far to squeeze: every rule counted out by hand, global ones against brute force, and what binds beside them."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import load_file
from typer.testing import CliRunner

from rankflow import ConfigError, Target, inspect, squeeze, squeeze_each
from rankflow.cli.app import app
from rankflow.compress.rules import noise_threshold
from rankflow.linalg.decompose import spectrum
from rankflow.plans.allocate import allocate
from rankflow.plans.budget import Budget
from rankflow.plans.knapsack import allocate_exactly, cover, upper_bound
from rankflow.plans.layout import Layout, Slot
from rankflow.plans.limits import Limit, Limits
from tests.compress.test_squeeze import saved

SIGMA = (10, 5, 2.5, 1, 0.5, 0.1, 0.05, 0.01)


def made(*sigmas: tuple[float, ...], width: int = 32) -> tuple[Layout, dict]:
    """A layout, and spectra, of modules with these singular values."""
    layout, spectra = {}, {}
    for n, sigma in enumerate(sigmas):
        g = torch.Generator().manual_seed(n)
        q = torch.linalg.qr(torch.randn(width, width, generator=g, dtype=torch.float64)).Q
        s = torch.tensor(sigma, dtype=torch.float64)
        a, b = s[:, None] * q[: len(s)], q[:, -len(s) :]
        layout[f"m{n}"] = Slot(len(s), width, width, 1.0)
        spectra[f"m{n}"] = spectrum(a, b, 1.0)
    return Layout(layout), spectra


def chosen(target: Target, *sigmas: tuple[float, ...]) -> list[int]:
    return list(target.choose(*made(*sigmas)).values())


# counted by hand: sums of squares 100, 125, 131.25, 132.25, 132.5, ...; of sigma 10, 15, 17.5, 18.5, 19, 19.1, ...
@pytest.mark.parametrize(
    ("rule", "rank"),
    [
        ({"energy": 0.75}, 1),  # 100 / 132.51 = 0.7547
        ({"energy": 0.76}, 2),
        ({"energy": 1.0}, 8),
        ({"error": 0.5}, 1),  # sqrt(1 - 0.7547) = 0.495
        ({"error": 0.1}, 3),  # sqrt(1.26 / 132.51) = 0.0975
        ({"sv_ratio": 5}, 3),  # above 2, where sd-scripts keeps 4
        ({"sv_ratio": 1}, 1),
        ({"sv_fro": 0.8}, 1),  # sqrt(0.7547) = 0.869, where sd-scripts keeps 2
        ({"sv_fro": 0.95}, 2),  # sqrt(0.9433) = 0.9713; sd-scripts keeps 3
        ({"sv_cumulative": 0.5}, 1),  # 10 / 19.16 = 0.522
        ({"sv_cumulative": 0.9}, 3),  # 17.5 / 19.16 = 0.913
        ({"target_rank": 5}, 5),
    ],
    ids=str,
)
def test_each_rule_keeps_as_many_as_it_says(rule, rank):
    assert chosen(Target(**rule), SIGMA) == [rank]


def test_auto_tells_what_was_learnt_from_what_only_noise_has_moved():
    r, rows, columns = 32, 512, 384
    for seed, spikes in itertools.product(range(3), (1, 3, 8)):
        g = torch.Generator().manual_seed(seed)
        a = torch.randn(r, columns, generator=g, dtype=torch.float64) / columns**0.5
        b = torch.randn(rows, r, generator=g, dtype=torch.float64) / rows**0.5
        b[:, :spikes] *= 3
        found = spectrum(a, b, 1.0)
        layout = Layout({"m": Slot(r, columns, rows, 1.0)})
        assert Target(auto=True).choose(layout, {"m": found}) == {"m": spikes}
        noise = spectrum(a, b / torch.linalg.vector_norm(b, dim=0), 1.0)
        assert float(noise.sigma[0]) < 1.02 * noise_threshold(noise.sigma.tolist(), layout["m"])


def test_across_spends_on_the_module_that_has_the_energy():
    strong, weak = (8.0, 6.0, 1.0), (2.0, 1.0, 0.5)
    assert chosen(Target(energy=0.9), strong, weak) == [2, 2]
    assert chosen(Target(energy=0.9, across=True), strong, weak) == [2, 0]  # 100 of 106.25
    assert chosen(Target(error=0.23, across=True), strong, weak) == [2, 1]  # 1 - 0.23^2 = 0.9471; 104 of 106.25


@given(
    st.lists(st.lists(st.floats(0.01, 10), min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(1, 7), min_size=3, max_size=3),
    st.floats(0.05, 1.0),
    st.integers(1, 60),
)
@settings(max_examples=150, deadline=None)
def test_bounds_and_exact_answers_against_brute_force(gains, widths, share, amount):
    gains = {f"m{i}": sorted(g, reverse=True) for i, g in enumerate(gains)}
    layout = Layout({n: Slot(len(g), widths[i], 1, 1.0) for i, (n, g) in enumerate(gains.items())})
    every = [
        (sum(k * layout[n].params_per_rank for n, k in zip(gains, ranks, strict=True)),
         math.fsum(x for g, k in zip(gains.values(), ranks, strict=True) for x in g[:k]))
        for ranks in itertools.product(*(range(len(g) + 1) for g in gains.values()))
    ]  # fmt: skip
    budget = Budget("max_params", amount)
    best = max(gain for cost, gain in every if cost <= amount)

    def gain(ranks: dict[str, int]) -> float:
        return math.fsum(x for n, g in gains.items() for x in g[: ranks[n]])

    if best > 0:
        exact = allocate_exactly(gains, layout, budget)
        assert gain(exact) == pytest.approx(best, rel=1e-12)
        assert sum(k * layout[n].params_per_rank for n, k in exact.items()) <= amount
        assert upper_bound(gains, layout, budget) >= best * (1 - 1e-9)
        assert gain(allocate(gains, layout, budget)) <= best * (1 + 1e-9)
    total = math.fsum(x for g in gains.values() for x in g)
    covered = cover(gains, layout, share)
    assert gain(covered) >= share * total * (1 - 1e-9)
    least = min(cost for cost, kept in every if kept >= share * total * (1 - 1e-12))
    cost = sum(k * layout[n].params_per_rank for n, k in covered.items())
    assert cost < least + max(slot.params_per_rank for slot in layout.values())
    if len(set(widths[: len(gains)])) == 1:
        assert cost == least


def test_exact_beats_the_greedy_answer_where_costs_differ():
    layout = Layout({"wide": Slot(1, 9, 1, 1.0), "a": Slot(1, 4, 1, 1.0), "b": Slot(1, 4, 1, 1.0)})
    gains, budget = {"wide": [10.0], "a": [5.1], "b": [4.8]}, Budget("max_params", 10)
    assert allocate(gains, layout, budget) == {"wide": 0, "a": 1, "b": 1}  # 9.9: per parameter "a" is the best
    assert allocate_exactly(gains, layout, budget) == {"wide": 1, "a": 0, "b": 0}
    huge = Layout({f"m{i}": Slot(64, 4097 + i, 4096, 1.0) for i in range(200)})
    with pytest.raises(ConfigError, match="too many to find the exact optimum"):
        allocate_exactly({n: [1.0] * 64 for n in huge}, huge, Budget("max_params", 10**8))


def test_options_that_bind_beside_a_target():
    assert chosen(Target(energy=1.0, max_rank=3), SIGMA, SIGMA[:2]) == [3, 2]
    assert chosen(Target(energy=0.99, rank_multiple=4), SIGMA, SIGMA[:2]) == [4, 2]  # 2 has no multiple of 4: as it is
    assert chosen(Target(target_rank=5, rank_multiple=4), SIGMA) == [8]
    assert chosen(Target(target_rank=7, max_rank=6, rank_multiple=4), SIGMA) == [4]
    buckets = Limits((Limit("m1", max=2),), buckets=(2, 4))
    assert chosen(Target(energy=0.98, limits=buckets), SIGMA, SIGMA) == [4, 2]
    assert chosen(Target(energy=0.5, limits=Limits(ties=(("*",),))), SIGMA, (1.0,) * 8) == [4, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no target: give one of target_rank, energy"),
        ({"auto": True, "energy": 0.9}, "energy and auto are 2 targets"),
        ({"error": 1.0}, "error is 1.0; it is the share to lose"),
        ({"sv_fro": 1.5}, "sv_fro is 1.5"),
        ({"sv_ratio": 0.5}, "sv_ratio is 0.5"),
        ({"sv_ratio": math.nan}, "sv_ratio is nan"),
        ({"size": 0}, "size is 0"),
        ({"energy": 0.9, "rank_multiple": 0}, "rank_multiple is 0"),
        ({"target_rank": 4, "across": True}, "across all modules is said of energy and error; target_rank"),
        ({"energy": 0.9, "exact": True}, "exact is said of max_params, size and budget; energy"),
        ({"ranks": {"m0": 2, "m7": 1}}, "m7 is not in the adapter"),
        ({"ranks": {}}, "m0 is not in the plan"),
        ({"ranks": {"m0": 9}}, "m0: rank 9 is planned, 0 to 8 can be had"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ConfigError, match=message):
        chosen(Target(**options), SIGMA)


# -- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return saved(tmp_path / "src", LoraConfig(r=6, lora_alpha=12, target_modules=["q", "up"]))


def run(*args: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == status, result.output
    return result.stdout if status == 0 else result.stderr


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_file_is_no_larger_than_the_size_asked_for(adapter, tmp_path, dtype):
    whole = (adapter / "adapter_model.safetensors").stat().st_size
    for share in (0.4, 0.55, 0.8):
        out = tmp_path / f"{dtype}-{share}"
        report = squeeze(adapter, out, size=int(share * whole), dtype=dtype)
        assert 0.5 * share * whole < (out / "adapter_model.safetensors").stat().st_size <= share * whole
        assert 0 <= report.shortfall < 0.1
    with pytest.raises(ConfigError, match="what is not LoRA factors already takes"):
        squeeze(adapter, tmp_path / "x", size=100)


def test_exact_keeps_no_less_and_the_shortfall_bounds_what_greed_loses(adapter, tmp_path):
    for params in range(150, 700, 50):
        greedy = squeeze(adapter, max_params=params, dry_run=True)
        exact = squeeze(adapter, max_params=params, exact=True, dry_run=True)
        assert greedy.energy_kept <= exact.energy_kept + 1e-12 <= greedy.energy_kept + greedy.shortfall + 2e-12
        assert exact.shortfall == 0
        assert exact.params_after <= params


def test_several_ranks_at_once_are_each_what_one_alone_is(adapter, tmp_path):
    squeeze_each(adapter, [Target(target_rank=k) for k in (4, 2)], [tmp_path / "a4", tmp_path / "a2"])
    for k in (4, 2):
        squeeze(adapter, tmp_path / f"b{k}", target_rank=k)
        ours, theirs = (load_file(tmp_path / f"{x}{k}" / "adapter_model.safetensors") for x in "ab")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    with pytest.raises(ConfigError, match="as many different outputs"):
        squeeze_each(adapter, [Target(target_rank=2)] * 2, [tmp_path / "c", tmp_path / "c"])
    run("squeeze", adapter, "--ranks", "4,2", "-o", tmp_path / "many", "--report", tmp_path / "many.json")
    assert [r["out"] for r in json.loads((tmp_path / "many.json").read_text())] == [
        str(tmp_path / f"many-r{k}") for k in (4, 2)
    ]


def test_a_plan_is_followed_to_the_letter(adapter, tmp_path):
    text = run("plan", adapter, "--energy", 0.8, "-o", tmp_path / "plan.yaml")
    assert "squeeze" in text
    plan = yaml.safe_load((tmp_path / "plan.yaml").read_text())
    assert plan["ranks"] == squeeze(adapter, energy=0.8, dry_run=True).ranks
    assert "is there already" in run("plan", adapter, "--energy", 0.8, "-o", tmp_path / "plan.yaml", status=2)
    name = next(iter(plan["ranks"]))
    plan["ranks"][name] = 5
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    run("squeeze", adapter, "--plan", tmp_path / "plan.yaml", "-o", tmp_path / "out")
    assert {m.name: m.rank for m in inspect(tmp_path / "out").modules} == plan["ranks"]
    plan["ranks"][name] = 99
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    assert "rank 99 is planned" in run(
        "squeeze", adapter, "--plan", tmp_path / "plan.yaml", "-o", tmp_path / "x", status=2
    )
    (tmp_path / "plan.yaml").write_text("rnaks: {}\n")
    assert "unknown key" in run("squeeze", adapter, "--plan", tmp_path / "plan.yaml", "-o", tmp_path / "x", status=2)
    assert not (tmp_path / "x").exists()


def test_a_budget_file_holds_a_budget_and_limits(adapter, tmp_path):
    budget = tmp_path / "budget.yaml"
    budget.write_text("budget: {mean_rank: 3}\nlimits: {'*.up': {max: 2}}\nrank_buckets: [2, 4]\n")
    run("squeeze", adapter, "--budget", budget, "-o", tmp_path / "out")
    ranks = {m.name: m.rank for m in inspect(tmp_path / "out").modules}
    assert set(ranks.values()) <= {2, 4}
    assert all(rank <= 2 for name, rank in ranks.items() if name.endswith("up"))
    assert sum(ranks.values()) <= 3 * 6
    budget.write_text("limits: {'*.up': {max: 2}}\n")
    run("squeeze", adapter, "--budget", budget, "--energy", 1.0, "-o", tmp_path / "capped")
    assert {m.rank for m in inspect(tmp_path / "capped").modules if m.name.endswith("up")} == {2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--sv-fro", 2), "sv_fro is 2"),
        (("--sv-ratio", 2, "--sv-fro", 0.9), "are 2 targets"),
        (("--size", "big"), "--size: 'big' is neither"),
        (("--ranks", "4,x"), "'4,x' is not a list"),
        (("--ranks", "4,8", "--target-rank", 2), "two targets"),
        (("--ranks", "0,8"), "target_rank is 0"),
        (("--plan", "nowhere.yaml"), "nowhere.yaml: no such file"),
    ],
)
def test_mistakes_on_the_command_line(adapter, options, message):
    assert message in run("squeeze", adapter, *options, status=2)
    assert [p.name for p in adapter.parent.iterdir()] == ["src"]


def test_the_rules_of_sd_scripts_are_options_by_their_names_and_by_those_of_sd_scripts(adapter, tmp_path):
    old = ("--dynamic-method", "sv_fro", "--dynamic-param", 0.9)
    for out, rule in (("a", ("--sv-fro", 0.9)), ("b", ("--energy", 0.81)), ("c", old)):
        run("squeeze", adapter, *rule, "--max-rank", 3, "-o", tmp_path / out)
    ours, theirs, as_before = ({m.name: m.rank for m in inspect(tmp_path / x).modules} for x in "abc")
    assert ours == theirs == as_before
    assert max(ours.values()) <= 3

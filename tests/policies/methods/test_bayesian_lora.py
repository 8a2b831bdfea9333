"""Bayesian-LoRA: quantiser, gates and penalty against the published formulas, and what becomes of an adapter."""

from __future__ import annotations

import copy
import itertools
import json
import math
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from helpers import KINDS, lora, loss_of, outputs, reload
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import Run, same_weights, tiny_llama, token_batches, weights
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import rankflow
from rankflow.compress.quantized import FILE
from rankflow.config.load import load_policy
from rankflow.errors import CheckpointError, ConfigError
from rankflow.gating.gates import Gates
from rankflow.lora.adapter import Adapter
from rankflow.optim.optimizer_state import OptimizerState
from rankflow.plans.budget import Budget
from rankflow.plans.layout import Layout, Slot
from rankflow.plans.schedule import When
from rankflow.policies import _quantizer as bits
from rankflow.policies import _quantizer as hardconcrete
from rankflow.policies.bits_and_rank import BitsAndRank
from rankflow.policies.lifecycle import Lifecycle
from rankflow.policies.methods.bayesian_lora import BayesianLora
from rankflow.policies.methods.hold import Hold
from rankflow.policies.observation import Observation, Signal
from rankflow.training.trainer import RankFlowCallback
from tests.training.test_trainer import default_weights, trainer

LEVELS = (4, 8, 16, 32)
values = st.floats(-2, 2, width=32)
ranges = st.floats(0.015625, 2, width=32)
chains = [[1.0] * n + [0.0] * (4 - n) for n in range(5)]


def f32(x) -> Tensor:
    return torch.tensor(x, dtype=torch.float32)


# -- the quantiser ----------------------------------------------------------------------------------------------------


def reference(x: float, c: float, z: list[float]) -> tuple[float, list[float]]:
    """x_q, and how far from the boundary between two levels each rounding was, in steps. Python floats."""
    x = max(-c * (1 - 1e-6), min(c * (1 - 1e-6), x))
    s = 2 * c / 3
    total = quantised = s * round(x / s)
    margins, product = [0.5 - abs(x / s - round(x / s))], 1.0
    for b, gate in zip(LEVELS, z, strict=True):
        s /= 2 ** (b // 2) + 1
        e = s * round((x - total) / s)
        margins.append(0.5 - abs((x - total) / s - round((x - total) / s)))
        product *= gate
        total, quantised = total + e, quantised + product * e
    return quantised, margins


@settings(max_examples=300, deadline=None)
@given(values, ranges, st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4))
def test_the_nested_sum_is_the_published_one(x, c, z):
    wanted, margins = reference(x, c, z)
    if min(margins[:3]) < 1e-3:
        return  # so near a boundary float32 may round the other way; finer steps are too small to matter here
    got = float(bits.nested(f32(x), f32(c), hardconcrete.chain(f32(z))))
    assert got == pytest.approx(wanted, abs=4e-5 * c)


@settings(max_examples=200, deadline=None)
@given(values, ranges, st.sampled_from(chains))
def test_hard_gates_are_one_rounding_to_the_last_grid_that_is_on(x, c, chain):
    width = 2 ** (1 + int(sum(chain)))
    step = bits.step(f32(c), f32(chain))
    assert float(step) == pytest.approx(2 * c / (2**width - 1), rel=1e-6)
    assert int(bits.width(f32(chain))) == width
    once, summed = bits.rounded(f32(x), f32(c), step), bits.nested(f32(x), f32(c), f32(chain))
    clipped = max(-c, min(c, x))
    for got in (once, summed):
        assert abs(float(got) - clipped) <= float(step) / 2 + 2e-6 * c
    if reference(x, c, chain)[1][0] > 1e-3:
        assert float(once) == pytest.approx(float(summed), abs=float(step) + 1e-6 * c)


def test_grids_are_symmetric_and_odd_and_zero_stays_zero():
    for chain, count in zip(chains[:3], (3, 15, 255), strict=True):
        c = f32(0.37)
        k = bits.integers(torch.linspace(-1, 1, 20001), c, bits.step(c, f32(chain)))
        assert sorted(set(k.tolist())) == list(range(-(count // 2), count // 2 + 1))
    for chain in chains:
        small = bits.integers(torch.tensor([0.0, -0.0, -1e-12, 1e-12]), f32(1.0), bits.step(f32(1.0), f32(chain)))
        assert not small.signbit().any()


def test_nothing_is_ever_rounded_off_the_grid():
    c = torch.cat([torch.rand(20000, generator=torch.Generator().manual_seed(0)) * 3 + 1e-6, f32([1.5, 1e-6])])
    for chain in chains:
        most = 2 ** (int(bits.width(f32(chain))) - 1) - 1
        step = bits.step(c, f32(chain).expand(len(c), 4))
        for edge in (10 * c, -10 * c, c, -c):
            k = bits.integers(edge, c, step).double()
            assert float(k.abs().max()) <= most
            assert (k.sign() == edge.sign()).all()


def test_a_gate_without_those_before_it_has_no_effect():
    x, c = torch.linspace(-0.5, 0.5, 101), f32(0.4)
    off, alone = (bits.nested(x, c, hardconcrete.chain(f32(z))) for z in ([0, 0, 0, 0], [0, 1, 1, 1]))
    assert torch.equal(off, alone)
    errors = [float((bits.nested(x, c, f32(chain)) - x.clamp(-0.4, 0.4)).abs().max()) for chain in chains]
    assert errors == sorted(errors, reverse=True)


@settings(max_examples=100, deadline=None)
@given(st.floats(-2, 2), st.floats(0.1, 2), st.lists(st.just(0.0) | st.floats(1e-9, 1), min_size=4, max_size=4))
def test_gradients_go_straight_through_and_to_range_and_gates(x, c, z):
    """In float64: d x_q/dx is 1 inside, 0 outside; of gates, what they multiply; of the range, from steps and clip."""
    wanted, margins = reference(x, c, z)
    if min(margins) < 1e-4 or abs(abs(x) - c) < 1e-3:
        return
    tx, tc, tz = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (x, c, z))
    got = bits.nested(tx, tc, hardconcrete.chain(tz))
    gx, gc, gz = torch.autograd.grad(got, (tx, tc, tz))
    assert got.item() == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    inside = abs(x) < c * (1 - 1e-6)
    assert float(gx) == pytest.approx(1.0 if inside else 0.0, abs=1e-6)
    # x_q = sum_b (g_b - g_2b) q_b with q_b = s_b round(x / s_b), whose slope in c is (round - x / s_b) s_b / c
    clipped = max(-c * (1 - 1e-6), min(c * (1 - 1e-6), x))
    product, steps, q = [1.0], [2 * c / 3], []
    for b, gate in zip(LEVELS, z, strict=True):
        product.append(product[-1] * gate)
        steps.append(steps[-1] / (2 ** (b // 2) + 1))
    q = [s * round(clipped / s) for s in steps]
    slope = sum(
        (g - after) * (round(clipped / s) - clipped / s) * s / c
        for g, after, s in zip(product, [*product[1:], 0.0], steps, strict=True)
    )
    slope += 0 if inside else math.copysign(1 - 1e-6, x)
    assert float(gc) == pytest.approx(slope, rel=1e-5, abs=1e-6)
    for i in range(4):
        through = sum(
            math.prod(z[:i] + z[i + 1 : j + 1]) * (q[j + 1] - q[j]) for j in range(i, 4)
        )  # every product that holds z_i, without it
        assert float(gz[i]) == pytest.approx(through, rel=1e-5, abs=1e-8)


# -- hard-concrete gates ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("logit", "q"), [(6, 0.9995), (2, 0.973), (0, 0.8318), (-2, 0.40), (-6, 0.012)])
def test_the_probability_of_being_above_zero_is_how_often_it_is(logit, q):
    u = torch.rand(100_000, generator=torch.Generator().manual_seed(logit + 10))
    z = hardconcrete.sample(torch.full_like(u, logit), u)
    assert float((z > 0).float().mean()) == pytest.approx(q, abs=1e-2)
    assert float(hardconcrete.probability(f32(float(logit)))) == pytest.approx(q, abs=2e-3)
    assert float(z.min()) >= 0
    assert float(z.max()) <= 1
    if -4 < logit < 4:
        assert (z == 0).any()
        assert (z == 1).any()


@given(st.floats(-8, 8, width=32), st.floats(1 / 1024, 1023 / 1024, width=32))
def test_a_gate_is_the_published_function_of_its_noise(logit, u):
    t = 1 / (1 + math.exp(-(math.log(u / (1 - u)) + logit) * 1.5))
    wanted = min(1.0, max(0.0, t * 1.2 - 0.1))
    assert float(hardconcrete.sample(f32(logit), f32(u))) == pytest.approx(wanted, abs=1e-5)


def test_noise_at_the_ends_is_survived():
    logit = torch.zeros(4, requires_grad=True)
    z = hardconcrete.sample(logit, torch.tensor([0.0, 1.0, 0.5, 1e-9]))
    z.sum().backward()
    assert z.tolist()[:2] == [0.0, 1.0]
    assert logit.grad is not None
    assert bool(logit.grad.isfinite().all())


def test_at_inference_a_gate_is_on_where_it_is_closed_with_a_probability_below_034():
    logits = torch.linspace(-3, 3, 6001)
    closed = 1 / (1 + (logits.double() - 2 / 3 * math.log(0.1 / 1.1)).exp())
    clear = (closed - 0.34).abs() > 1e-6
    assert torch.equal(hardconcrete.is_on(logits)[clear], (closed < 0.34)[clear])
    assert pytest.approx(-0.9353, abs=5e-5) == hardconcrete.THRESHOLD


# -- the penalty ------------------------------------------------------------------------------------------------------


def theta_of(rank: int, tensors: int, size: tuple[int, int, int], seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    theta = {
        "rank": torch.randn(rank, generator=random),
        "bits": torch.randn(tensors, 4, generator=random),
        "range": torch.full((tensors,), 0.5),
        "size": f32([float(n) for n in size]),
    }
    return {**theta, "e": torch.ones(rank)} if tensors == 3 else theta


def reference_penalty(thetas: dict[str, dict[str, Tensor]], mu: float, nested: bool, bop: bool) -> Tensor:
    """mu sum_T 1/r sum_i Q_i (w2 + w4 q4 + w8 q4 q8 + ...), in float64."""
    shift = 2 / 3 * math.log(0.1 / 1.1)
    macs = {n: [t["size"][0] * m for m in (t["size"][1], t["size"][2], 1.0)] for n, t in thetas.items()}
    most = max(float(m) for n, t in thetas.items() for m in macs[n][: len(t["bits"])])
    total = torch.zeros((), dtype=torch.float64)
    for n, t in thetas.items():
        for tensor in range(len(t["bits"])):
            for i in range(len(t["rank"])):
                ranked = t["rank"][: i + 1] if nested else t["rank"][i : i + 1]
                q = torch.sigmoid(ranked - shift).prod()
                inner, product = torch.tensor(2.0 if bop else 1.0, dtype=torch.float64), 1.0
                for b, phi in zip(LEVELS, t["bits"][tensor], strict=True):
                    product = product * torch.sigmoid(phi - shift)
                    inner = inner + (b if bop else 1) * product
                total = total + q * inner * (macs[n][tensor] / most if bop else 1) / t["size"][0]
    return mu * total


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("bop", [False, True])
@pytest.mark.parametrize("tensors", [2, 3])
def test_the_penalty_and_its_gradients_are_the_published_bound(nested, bop, tensors):
    gate = BitsAndRank(mu=0.3, nested=nested, by_cost=bop, diagonal=tensors == 3, last=10)
    thetas = {"m": theta_of(3, tensors, (4, 12, 10), 1), "n": theta_of(5, tensors, (5, 30, 8), 2)}
    wide = {n: {k: v.double().requires_grad_(k in ("rank", "bits")) for k, v in t.items()} for n, t in thetas.items()}
    thetas = {n: {k: v.requires_grad_() for k, v in t.items()} for n, t in thetas.items()}
    found, wanted = gate.penalty(thetas, 1), reference_penalty(wide, 0.3, nested, bop)
    assert found is not None
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-7)
    found.backward()
    wanted.backward()
    for n, t in thetas.items():
        assert all(t[k].grad is None for k in t if k not in ("rank", "bits"))
        for k in ("rank", "bits"):
            torch.testing.assert_close(t[k].grad.double(), wide[n][k].grad, rtol=1e-4, atol=1e-8)
            assert bool((t[k].grad > 0).all()), "more of any gate costs more"


def test_a_child_s_pull_is_scaled_by_its_parents():
    gate = BitsAndRank(mu=1.0, last=1)

    def pull(parent: float) -> float:
        theta = theta_of(2, 2, (2, 8, 8), 0)
        with torch.no_grad():
            theta["bits"][0, 0] = parent
        theta["bits"].requires_grad_()
        found = gate.penalty({"m": theta}, 1)
        assert found is not None
        found.backward()
        assert theta["bits"].grad is not None
        return float(theta["bits"].grad[0, 3])

    q = [float(hardconcrete.probability(f32(p))) for p in (3.0, -3.0)]
    assert pull(-3.0) / pull(3.0) == pytest.approx(q[1] / q[0], rel=1e-4)


def test_fixed_gates_pay_nothing():
    gate = BitsAndRank(last=10)
    theta = {"m": theta_of(2, 2, (2, 8, 8), 0)}
    assert gate.penalty(theta, 10) is not None
    assert gate.penalty(theta, 11) is None


# -- the gate of one module -------------------------------------------------------------------------------------------


def noise_of(gate: BitsAndRank, theta: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    return gate.noise(theta, torch.Generator().manual_seed(seed))


def test_a_nested_direction_counts_only_while_all_before_it_are_open():
    theta = theta_of(4, 2, (4, 8, 8), 0) | {"rank": f32([2.0, -3.0, 2.0, 2.0])}
    assert BitsAndRank().open(theta).tolist() == [True, False, True, True]
    assert BitsAndRank(nested=True).open(theta).tolist() == [True, False, False, False]
    q = 1 / (1 + math.exp(-2 - 1.5985968)), 1 / (1 + math.exp(3 - 1.5985968))
    wanted = [q[0], q[0] * q[1], q[0] ** 2 * q[1], q[0] ** 3 * q[1]]
    assert BitsAndRank(nested=True).score(theta).tolist() == pytest.approx(wanted, rel=1e-5)
    draw = BitsAndRank(nested=True).draw_one(theta, noise_of(BitsAndRank(), theta))
    single = BitsAndRank().draw_one(theta, noise_of(BitsAndRank(), theta))
    assert torch.allclose(draw["value"], single["value"].cumprod(0))


@pytest.mark.parametrize("noisy", [False, True])
def test_a_diagonal_of_zeros_makes_the_update_zero_and_one_is_on_every_grid(noisy):
    gate = BitsAndRank(diagonal=True)
    fresh = gate.init(Slot(3, 8, 8, 1.0), torch.Generator())
    for chain in chains:
        theta = fresh | {"rank": torch.full((3,), 30.0), "bits": (f32(chain) * 60 - 30).expand(3, 4)}
        noise = noise_of(gate, theta) if noisy else None
        assert torch.allclose(gate.draw_one(theta, noise)["value"], torch.ones(3), rtol=1e-6)
        draw = gate.draw_one(theta | {"e": torch.zeros(3)}, noise)
        assert not gate.a(draw, torch.randn(3, 8)).any()


def test_ranges_come_from_the_factors_and_from_a_constant_where_they_are_zero():
    gate = BitsAndRank(zeros=0.25)
    theta = gate.init(Slot(2, 3, 3, 1.0), torch.Generator())
    made = gate.calibrate(theta, torch.tensor([[0.1, -0.7, 0.0], [0.2, 0.0, 0.0]]), torch.zeros(3, 2))
    assert made["range"].tolist() == pytest.approx([0.7, 0.25])


@given(
    st.integers(0, 9),
    st.integers(0, 500),
    st.integers(1, 500),
    st.sampled_from((2, 4, 8, 16, 32)),
    st.sampled_from((2, 4, 8, 16, 32)),
)
def test_bit_operations(rank, inputs, outputs, bits_a, bits_b):
    """MACs times the bits of both operands, activations at 32."""
    wanted = rank * inputs * bits_a * 32 + rank * outputs * bits_b * 32
    sizes = (rank, inputs, outputs)
    assert bits.bit_operations(*sizes, bits_a=bits_a, bits_b=bits_b) == wanted
    assert bits.bit_operations(*sizes, bits_a=bits_a, bits_b=bits_b, bits_e=4) == wanted + rank * 4 * 32
    whole = bits.bit_operations(*sizes, bits_a=bits_a, bits_b=bits_b, frozen=True)
    assert whole == wanted + inputs * outputs * 32 * 32


def test_what_is_reported():
    theta = theta_of(4, 3, (8, 100, 50), 0) | {"rank": f32([2.0, -3.0, 2.0, -3.0])}
    theta["bits"] = f32([[3, 3, -3, 3], [-3, 3, 3, 3], [3, 3, 3, 3]])
    report = BitsAndRank(diagonal=True).report(theta)
    bops, full = 2 * (100 * 8 + 50 * 2 + 32) * 32, 8 * (100 + 50 + 1) * 32 * 32
    assert report == {
        "rank": 2,
        "bits_a": 8,
        "bits_b": 2,
        "bits_e": 32,
        "bops": bops,
        "bops_fp32": full,
        "bops_frozen": 100 * 50 * 1024,
        "relative_bops": bops / full,
        "relative_bops_with_frozen": (bops + 5000 * 1024) / (full + 5000 * 1024),
    }
    json.dumps(report)
    other = BitsAndRank(diagonal=True).report(theta | {"rank": f32([2.0, 2.0, 2.0, 2.0])})
    total = BitsAndRank().total({"m": report, "n": other})
    assert total == {
        "rank": 6,
        "bops": 3 * bops,
        "bops_fp32": 2 * full,
        "bops_frozen": 2 * 5000 * 1024,
        "relative_bops": pytest.approx(1.5 * bops / full),
        "relative_bops_with_frozen": pytest.approx((1.5 * bops + 5000 * 1024) / (full + 5000 * 1024)),
    }


# -- on live adapters -------------------------------------------------------------------------------------------------


def under(model: torch.nn.Module, gate: BitsAndRank) -> Gates:
    adapter = Adapter(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    gates = Gates(adapter, OptimizerState(optimizer, adapter), seed=0)
    gates.install(gate)
    return gates


def scramble(gates: Gates, seed: int = 0) -> None:
    """Gates some of which are open, one width after the other."""
    random = torch.Generator().manual_seed(seed)
    width = itertools.cycle(chains)
    with torch.no_grad():
        for theta in gates._training.theta.values():
            theta["rank"].copy_(torch.randn(theta["rank"].shape, generator=random))
            theta["rank"][0] = 3.0
            for logits in theta["bits"]:
                logits.copy_(4 * f32(next(width)) - 2)
            if "e" in theta:
                theta["e"].copy_(torch.randn(theta["e"].shape, generator=random))
            theta["range"].mul_(0.7)
    gates._forward.draw(None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_integers_give_the_saved_adapter_bit_for_bit(tmp_path, kind, dtype):
    model = lora(kind, dtype=dtype)
    gates = under(model, BitsAndRank(diagonal=dtype == torch.bfloat16, last=5))
    scramble(gates)
    wanted = outputs(model.eval(), kind, dtype=dtype)
    live = SimpleNamespace(stored=gates.stored())
    gates.fold()
    assert all(torch.equal(t, gates.stored()[n][k]) for n, form in live.stored.items() for k, t in form.items()), (
        "what was folded is kept"
    )
    torch.testing.assert_close(outputs(model, kind, dtype=dtype), wanted)
    torch.testing.assert_close(outputs(reload(model, kind, dtype=dtype), kind, dtype=dtype), wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of target_parameters
        model.save_pretrained(tmp_path)
    rankflow.save_quantized(live, tmp_path)
    modules = rankflow.load_quantized(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.dtype for t in saved.values()} == {dtype}
    adapter = Adapter(model)
    for name, module in modules.items():
        site = adapter.sites[name]
        for found, wanted_ in zip(module.factors(), (site.a(), site.b()), strict=True):
            assert torch.equal(found.to(dtype), wanted_)
        for t, b in zip((module.A, module.B, module.E), module.bits, strict=True):
            assert int(t.abs().max()) <= 2 ** (b - 1) - 1
    assert len({b for m in modules.values() for b in m.bits[:2]}) > 2


def test_files_are_as_narrow_as_their_bits(tmp_path):
    random = torch.Generator().manual_seed(0)
    for width, per in ((2, 4), (4, 2), (8, 1), (16, 0.5), (32, 0.25)):
        most = 2 ** (width - 1) - 1
        t = torch.randint(-most, most + 1, (3, 7), generator=random)
        packed = rankflow.compress.quantized._pack(t, width)
        assert packed.numel() * packed.element_size() == math.ceil(21 / per)
        assert torch.equal(rankflow.compress.quantized._unpack(packed, width, [3, 7]), t)


def saved_pair(tmp_path) -> tuple[PeftModel, SimpleNamespace]:
    model = lora("linear", dtype=torch.float32)
    gates = under(model, BitsAndRank(last=5))
    scramble(gates)
    gates.fold()
    model.save_pretrained(tmp_path)
    return model, SimpleNamespace(stored=gates.stored())


def test_an_adapter_that_is_another_one_by_now_is_refused(tmp_path):
    model, flow = saved_pair(tmp_path)
    rankflow.save_quantized(flow, tmp_path)
    before = (tmp_path / FILE).read_bytes()
    name, p = next((n, p) for n, p in model.named_parameters() if "lora_B" in n)
    with torch.no_grad():
        p[0, 0] = torch.nextafter(p[0, 0], f32(9.0))
    model.save_pretrained(tmp_path)
    module = name.removeprefix("base_model.model.").partition(".lora_B")[0]
    for call in (lambda: rankflow.save_quantized(flow, tmp_path), lambda: rankflow.load_quantized(tmp_path)):
        with pytest.raises(CheckpointError, match=f"{module}: B of the adapter is not what its integers give"):
            call()
    assert (tmp_path / FILE).read_bytes() == before
    assert {f.name for f in tmp_path.iterdir()} == {
        FILE, "README.md", "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip


def test_damaged_files_and_runs_without_integers_are_refused(tmp_path):
    _, flow = saved_pair(tmp_path)
    with pytest.raises(CheckpointError, match="no quantised adapter"):
        rankflow.load_quantized(tmp_path)
    with pytest.raises(ConfigError, match="no quantised factors"):
        rankflow.save_quantized(SimpleNamespace(stored={}), tmp_path)
    path = rankflow.save_quantized(flow, tmp_path)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["rankflow_quantized"])
    name = next(iter(about["modules"]))

    def refused(words: str, tensors: dict[str, Tensor], about: dict) -> None:
        save_file(tensors, path, {"rankflow_quantized": json.dumps(about)})
        with pytest.raises(CheckpointError, match=words):
            rankflow.load_quantized(tmp_path)

    refused("has format 9", tensors, about | {"format": 9})
    refused("damaged", {k: t for k, t in tensors.items() if k != f"{name}.A"}, about)
    refused("damaged", tensors | {f"{name}.A": tensors[f"{name}.A"][:3].clone()}, about)
    refused("damaged", tensors, about | {"modules": {name: {"bits": [4, 4]}}})
    fewer = {n: m for n, m in about["modules"].items() if n != name}
    refused(f"{name} is in the adapter or among its integers", tensors, about | {"modules": fewer})
    path.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="no quantised adapter"):
        rankflow.load_quantized(tmp_path)


def test_training_forwards_differ_and_evaluation_does_not():
    model = tiny_llama(dropout=0.0, r=4)
    gates = under(model, BitsAndRank(last=1, first=0.5))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B.default" in name:
                p.normal_()
    batch = token_batches(1)[0]
    model.train()
    assert not torch.equal(model(**batch).loss, model(**batch).loss)
    model.eval()
    assert torch.equal(model(**batch).loss, model(**batch).loss)
    model.train()
    gates.step()  # to step 1, the last with noise
    assert torch.equal(model(**batch).loss, model(**batch).loss)


def test_with_every_gate_closed_the_model_is_the_base_model():
    model = lora("linear", dtype=torch.float32)
    gates = under(model, BitsAndRank())
    with torch.no_grad():
        for theta in gates._training.theta.values():
            theta["rank"].fill_(-3.0)
    gates._forward.draw(None)
    with model.disable_adapter():
        wanted = outputs(model.eval(), "linear", dtype=torch.float32)
    assert torch.equal(outputs(model, "linear", dtype=torch.float32), wanted)


def test_a_trained_adapter_comes_under_the_gates_unchanged():
    model = lora("linear", dtype=torch.float32)
    before = outputs(model.eval(), "linear", dtype=torch.float32)
    under(model, BitsAndRank(diagonal=True))
    torch.testing.assert_close(outputs(model, "linear", dtype=torch.float32), before, rtol=1e-4, atol=1e-5)


def test_a_forward_with_noise_does_not_stay_in_what_is_folded():
    model = lora("linear", dtype=torch.float32)
    gates = under(model, BitsAndRank(last=5, first=0.5))
    wanted = outputs(model.eval(), "linear", dtype=torch.float32)
    outputs(model.train(), "linear", dtype=torch.float32)
    gates.fold()
    torch.testing.assert_close(outputs(model.eval(), "linear", dtype=torch.float32), wanted)


def test_a_step_under_the_gates_does_not_wait_for_the_device():
    model = lora("linear", dtype=torch.float32).train()
    gates = under(model, BitsAndRank(last=5, first=0.0, diagonal=True, nested=True, by_cost=True))
    with torch.profiler.profile() as profile:
        loss_of(model, "linear", dtype=torch.float32).backward()
        gates.collect()
    assert all(theta["rank"].grad is not None for theta in gates._training.theta.values())
    assert "aten::_local_scalar_dense" not in {event.key for event in profile.key_averages()}


def test_a_range_stays_positive():
    gate = BitsAndRank()
    assert float(gate.prox({"range": f32([-1.0, 0.2])}, 0.1, 1)["range"].min()) > 0


def test_bf16_factors_train():
    model = lora("linear", dtype=torch.bfloat16).train()
    gates = under(model, BitsAndRank(last=5, diagonal=True))
    loss_of(model, "linear", dtype=torch.bfloat16).backward()
    gates.collect()
    for theta in gates._training.theta.values():
        for key in ("rank", "bits", "range", "e"):
            assert theta[key].dtype == torch.float32
            assert theta[key].grad is not None


# -- under the controller ---------------------------------------------------------------------------------------------


def bayesian(**settings) -> BayesianLora:
    return BayesianLora(**{"gate_lr": 0.4, "gate_init": 1.0, "mu": 1e-4, "when": When(5, 5), **settings})


def events(run: Run, *kinds: str) -> list[dict]:
    return [e for e in run.flow.ledger.events if e["event"] in kinds]


@pytest.mark.parametrize(
    "options", [{}, {"rank_gates": "nested", "weights": "bop", "diagonal": True, "mu": 1e-5}], ids=["plain", "all"]
)
def test_gates_close_ranks_fall_and_a_plain_quantised_adapter_is_left(tmp_path, options):
    run = Run(bayesian(**options), 20, model=tiny_llama(r=4))
    run.until(15)
    run.model.save_pretrained(tmp_path / "half", selected_adapters=["default"])
    rankflow.save_quantized(run.flow, tmp_path / "half")
    fixed = {n: {k: t.detach().clone() for k, t in of.items()} for n, of in run.flow._gates._training.theta.items()}
    run.until(20)
    for name, theta in run.flow._gates._training.theta.items():
        for key, t in theta.items():
            moved = not torch.equal(t, fixed[name][key][: len(t)])
            assert moved == (key in ("range", "e")), f"{key} after the gates were fixed"
    run.model.eval()
    wanted = run.model(**run.batches[0]).logits
    run.flow.finish()
    assert run.flow.layout.total_rank < 40
    assert all(e["reason"] for e in events(run, "resize", "skip"))
    (fold,) = events(run, "fold")
    assert {n: s.rank for n, s in run.flow.layout.items() if s.rank} == {n: g["rank"] for n, g in fold["gates"].items()}
    assert len({g["bits_b"] for g in fold["gates"].values()}) > 1
    assert fold["total"]["rank"] == run.flow.layout.total_rank
    assert 0 < fold["total"]["relative_bops"] < fold["total"]["relative_bops_with_frozen"] < 1
    torch.testing.assert_close(run.model(**run.batches[0]).logits, wanted)
    run.model.save_pretrained(tmp_path, selected_adapters=["default"])
    rankflow.save_quantized(run.flow, tmp_path)
    modules = rankflow.load_quantized(tmp_path)
    assert {n: m.bits[:2] for n, m in modules.items()} == {
        n: (g["bits_a"], g["bits_b"]) for n, g in fold["gates"].items()
    }
    base = tiny_llama().unload()
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(loaded(**run.batches[0]).logits, wanted)


def test_the_trainer_s_door_resumes_under_noise_and_ends_quantised(tmp_path):
    policy = {"policy": "bayesian_lora", "when": {"start": 4, "every": 4}}
    policy["params"] = {"gate_lr": 0.4, "gate_init": 1.0, "mu": 1e-4}
    options = {"save_strategy": "steps", "save_steps": 5, "max_steps": 12}
    whole = trainer(tmp_path / "run", RankFlowCallback(policy), model=tiny_llama(r=4), **options)
    whole.train()
    callback = RankFlowCallback(policy)
    resumed = trainer(tmp_path / "run", callback, model=tiny_llama(r=4), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"))
    assert same_weights(default_weights(whole.model), default_weights(resumed.model))
    resumed.model.save_pretrained(tmp_path, selected_adapters=["default"])
    rankflow.save_quantized(callback.flow, tmp_path)
    assert rankflow.load_quantized(tmp_path).keys() == callback.flow.stored.keys()


def test_nested_gates_remove_suffixes():
    run = Run(bayesian(rank_gates="nested", mu=1e-5), 10, model=tiny_llama(r=4))
    run.until(10)
    kept = [op["idx"] for e in events(run, "resize") for ops in e["plan"]["ops"].values() for op in ops if "idx" in op]
    assert kept
    assert all(idx == list(range(len(idx))) for idx in kept)


@pytest.mark.parametrize("least", [0, 1])
def test_a_run_in_which_every_gate_closes_goes_on(tmp_path, least):
    settings = {"policy": "bayesian_lora", "limits": {"*": {"min": least}}, "when": {"start": 4, "every": 4}}
    params = {"mu": 10.0, "gate_lr": 1.0, "gate_init": 1.0}
    run = Run(load_policy({**settings, "params": params}), 12, model=tiny_llama(r=3))
    with nullcontext() if least else pytest.warns(UserWarning, match="every module that trains"):
        run.until(12)
    ranks = run.flow.layout.ranks
    assert sorted(ranks.values()) == ([0] * 9 + [1] if least == 0 else [1] * 10)
    reasons = " ".join(e["reason"] for e in events(run, "resize", "skip"))
    said = "keeps one of its directions" if least == 0 else "no gate is open in 10 that keep their best direction"
    assert said in reasons
    run.flow.finish()
    run.model.eval()
    with run.model.disable_adapter():
        base = run.model(**run.batches[0]).logits
    assert torch.equal(run.model(**run.batches[0]).logits, base)
    run.model.save_pretrained(tmp_path, selected_adapters=["default"])
    rankflow.save_quantized(run.flow, tmp_path)
    rankflow.load_quantized(tmp_path)


def test_a_budget_holds_after_the_last_event_and_the_weakest_go():
    run = Run(bayesian(mu=0.0, budget=Budget("mean_rank", 1.5), when=When(4, 4)), 10, model=tiny_llama(r=4))
    run.until(7)
    before = run.flow.layout.ranks
    assert sum(before.values()) > 15
    run.step()
    assert run.flow.layout.total_rank == 15
    assert "to be within total rank 15" in events(run, "resize")[-1]["reason"]
    run.until(10)
    assert run.flow.within_budget


def test_the_weakest_are_those_of_least_probability():
    layout = Layout({f"m{i}": Slot(3, 8, 8, 1.0) for i in range(2)})
    policy = bayesian(budget=Budget("total_rank", 3), when=When(5, 5).resolve(10))
    scores = {"m0": [0.9, 0.7, 0.95], "m1": [0.8, 0.3, 0.99]}
    record = {
        n: {Signal.GATE_SCORE: torch.tensor(s), Signal.GATE_OPEN: torch.tensor(s) > 0.66} for n, s in scores.items()
    }
    early, last = (policy.decide({}, Observation(step, record), layout, step) for step in (5, 10))
    assert {n: ops[0].idx for n, ops in early.ops.items()} == {"m1": (0, 2)}
    assert {n: ops[0].idx for n, ops in last.ops.items()} == {"m0": (0, 2), "m1": (2,)}


@pytest.mark.parametrize("stop", [4, 7, 9])
@pytest.mark.parametrize("options", [{}, {"diagonal": True, "rank_gates": "nested"}], ids=["plain", "nested"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, stop, options):
    def make(**more):
        policy = bayesian(fix_at=0.6, when=When(3, 3), **options)
        return Run(Lifecycle((("bayesian_lora", policy, "80%"), ("hold", Hold(), None))), 10, **more)

    whole = make(model=tiny_llama(r=4)).until(10)
    part = make(model=tiny_llama(r=4)).until(stop)
    state = copy.deepcopy(part.flow.state_dict())
    part.model.save_pretrained(tmp_path, selected_adapters=["default", "other"])
    model = tiny_llama(r=4)
    rankflow.restore(model, tmp_path)
    resumed = make(model=model, state=state)
    resumed.optimizer.load_state_dict(part.optimizer.state_dict())
    resumed.scheduler.load_state_dict(part.scheduler.state_dict())
    resumed.until(10)
    assert whole.flow.layout.total_rank < 40
    assert same_weights(weights(whole.model), weights(resumed.model))
    assert whole.flow.layout == resumed.flow.layout


def test_training_on_makes_the_integers_stale(tmp_path):
    policy = bayesian(when=When(2, 2))
    lifecycle = Lifecycle((("bayesian_lora", policy, "50%"), ("hold", Hold(), None)))
    with pytest.warns(UserWarning, match="none can change anything"):
        run = Run(lifecycle, 8, model=tiny_llama(r=4)).until(8)
    run.flow.finish()
    run.model.save_pretrained(tmp_path, selected_adapters=["default"])
    with pytest.raises(CheckpointError, match="trained on or changed after its gates were folded"):
        rankflow.save_quantized(run.flow, tmp_path)


def test_gates_are_fixed_for_the_last_quarter_of_the_phase():
    for begin, end, last in ((0, None, 75), (40, 80, 70), (60, None, 90)):
        gate = BayesianLora(when=When(every=5).resolve(100, begin, end)).gate
        assert [step for step in range(1, 101) if gate.noisy(step)][-1] == last
        assert gate.trains("bits", last)
        assert not gate.trains("rank", last + 1)
        assert gate.trains("range", 100)
        assert gate.trains("e", 100)
    never = BayesianLora(fix_at=1.0, when=When(every=5).resolve(100)).gate
    assert never.noisy(100)
    assert (gate.rate("rank", 0.5), gate.rate("range", 0.5), gate.rate("e", 0.5)) == (1e-3, 1e-3, 0.5)


def test_a_run_too_short_for_any_gate_to_close_is_told_so():
    (note,) = BayesianLora(when=When(10, 10).resolve(1000)).notes
    assert "in the 750 steps that gates are trained none gets from 6 to -0.935" in note
    assert "gate_lr 0.018 would" in note
    assert not BayesianLora(gate_lr=0.018, when=When(10, 10).resolve(1000)).notes


def test_what_cannot_be_is_said_at_the_start():
    layout = Layout({f"m{i}": Slot(4, 8, 8, 1.0) for i in range(3)})
    with pytest.raises(ConfigError, match="bayesian_lora has no due step"):
        BayesianLora(when=When(90).resolve(60)).check(layout)
    with pytest.raises(ConfigError, match="bayesian_lora only lowers ranks"):
        BayesianLora(budget=Budget("total_rank", 40), when=When(10, 10).resolve(60)).check(layout)
    with pytest.raises(ConfigError, match=r"gate_init: should be greater than -0\.935"):
        load_policy(BayesianLora(gate_init=-2.0))
    with pytest.raises(ConfigError, match="not resolved"):
        _ = BayesianLora().gate

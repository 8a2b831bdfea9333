"""bitsandbytes: optimizer state in 8-bit codes or 32 bits through changes of rank; base weights of 4 and 8 bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import lora, loss_of, same
from loops import GROW_THEN_SQUEEZE, Run, resumed, same_weights, trained
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import rankflow
from rankflow.errors import ConfigError, OptimizerError
from rankflow.lora.adapter import Adapter
from rankflow.lora.base_weight import base_weight
from rankflow.plans.ops import Drop, Grow, Keep, Refactor
from rankflow.plans.plan import RankPlan
from rankflow.surgery.surgeon import Surgeon
from tests.optim.test_optim import Lion, assert_steps_are_sane, mixing

bnb = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")

F32 = torch.float32
STEP = 0.5 / 64  # half the widest gap between codes, of the largest in the block
CLASSES = ["Adam8bit", "AdamW8bit", "PagedAdamW8bit", "Lion8bit", "SGD8bit", "RMSprop8bit", "Adagrad8bit"]
WIDE = ["Adam", "AdamW32bit", "PagedAdamW32bit", "Lion", "SGD"]


def make(name: str, parameters: list[nn.Parameter], smallest: int = 1) -> Optimizer:
    options: dict[str, Any] = {"momentum": 0.9} if name.startswith("SGD") else {}
    return getattr(bnb.optim, name)(parameters, lr=1e-3, min_8bit_size=smallest, **options)


def started(name: str, smallest: int = 1, steps: int = 3) -> tuple[PeftModel, Optimizer, Surgeon]:
    model = lora("linear", dtype=F32)
    optimizer = make(name, [p for p in model.parameters() if p.requires_grad], smallest)
    steps_of(model, optimizer, steps)
    return model, optimizer, Surgeon(Adapter(model), optimizer)


def steps_of(model: nn.Module, optimizer: Optimizer, steps: int = 1, first: int = 0) -> None:
    for i in range(first, first + steps):
        loss_of(model, "linear", seed=i, dtype=F32).backward()
        optimizer.step()
        optimizer.zero_grad()


def numbers(state: dict[str, Any]) -> dict[str, Tensor]:
    """The moments as numbers, worked out from the codes."""
    found = {}
    for key in ("state1", "state2"):
        if key in state and state[key].dtype == torch.uint8:
            values, largest = state[f"qmap{key[-1]}"], state[f"absmax{key[-1]}"]
            flat = values[state[key].long().flatten()]
            blocks = [block * size for block, size in zip(flat.split(256), largest, strict=True)]
            found[key] = torch.cat(blocks).view(state[key].shape)
        elif key in state:
            found[key] = state[key]
    return found


PLANS: dict[str, list[Any]] = {
    "grow": [Grow(2)],
    "shrink": [Keep((3, 0))],
    "refactor": [Refactor(mixing(4)[:3], mixing(4).inverse()[:, :3])],
    "all": [Refactor(mixing(4)[:3], mixing(4).inverse()[:, :3]), Keep((0, 2)), Grow(3)],
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", CLASSES)
def test_codes_go_where_numbers_would_have_gone(name, plan):
    """The same resize of the same run with its moments in 32 bits, to within half a gap between codes."""
    model, optimizer, surgeon = started(name)
    twin = copy.deepcopy(model)
    exact = make(name.replace("8bit", "32bit"), [p for p in twin.parameters() if p.requires_grad])
    for p, q in zip(optimizer.param_groups[0]["params"], exact.param_groups[0]["params"], strict=True):
        state = optimizer.state[p]
        assert state["state1"].dtype == torch.uint8
        exact.state[q] = {"step": state["step"], **numbers(state)}
    other = Surgeon(Adapter(twin), exact)
    for s in (surgeon, other):
        s.apply(RankPlan(dict.fromkeys(s.layout, PLANS[plan])))
    for n, site in surgeon.adapter.sites.items():
        for role, p in site.tensors().items():
            state, wanted = optimizer.state[p], exact.state[other.adapter.sites[n].tensors()[role]]
            assert state["step"] == wanted["step"] == 3
            for key, t in numbers(state).items():
                assert state[key].dtype == torch.uint8
                assert wanted[key].dtype == F32
                error = (t - wanted[key]).abs().flatten().split(256)
                size = wanted[key].abs().flatten().split(256)
                gap = STEP if key == "state1" else 2 * STEP  # second moments may be rounded up
                assert all(bool((e <= gap * b.max()).all()) for e, b in zip(error, size, strict=True)), (n, role, key)
    assert all(torch.equal(a, b) for a, b in zip(trained(model).values(), trained(twin).values(), strict=True))
    for i in range(3):
        for m, o in ((model, optimizer), (twin, exact)):
            steps_of(m, o, first=20 + i)
    assert_steps_are_sane(model, optimizer)
    if name.startswith("Adam"):
        for a, b in zip(trained(model).values(), trained(twin).values(), strict=True):
            assert float((a - b).abs().mean()) < 2e-4  # of steps of 1e-3


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["AdamW32bit", "SGD32bit", "Lion32bit", "RMSprop32bit", "Adagrad32bit"])
def test_numbers_go_where_those_of_torch_go(name, plan):
    model, optimizer, surgeon = started(name)
    twin = copy.deepcopy(model)
    relatives: dict[str, tuple[Any, dict[str, str]]] = {
        "AdamW32bit": (torch.optim.AdamW, {"state1": "exp_avg", "state2": "exp_avg_sq"}),
        "SGD32bit": (torch.optim.SGD, {"state1": "momentum_buffer"}),
        "Lion32bit": (Lion, {"state1": "exp_avg"}),
        "RMSprop32bit": (torch.optim.RMSprop, {"state1": "square_avg"}),
        "Adagrad32bit": (torch.optim.Adagrad, {"state1": "sum"}),
    }
    relative, keys = relatives[name]
    other = relative([p for p in twin.parameters() if p.requires_grad], lr=1e-3)
    for p, q in zip(optimizer.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        state = optimizer.state[p]
        other.state[q] = {"step": torch.tensor(3.0), **{keys[k]: state[k].clone() for k in keys}}
    for s in (surgeon, Surgeon(Adapter(twin), other)):
        s.apply(RankPlan(dict.fromkeys(s.layout, PLANS[plan])))
    for p, q in zip(optimizer.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        for key, theirs in keys.items():
            torch.testing.assert_close(optimizer.state[p][key], other.state[q][theirs], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", [*CLASSES, *WIDE])
def test_training_goes_on_after_every_kind_of_op(name):
    model, optimizer, _ = started(name)
    surgeon = Surgeon(Adapter(model), optimizer, warmup=3)
    names = list(surgeon.layout)
    for i, ops in enumerate(
        (
            {n: [Grow(1)] for n in names},
            {n: [Refactor(mixing(5)[:4], mixing(5).inverse()[:, :4])] for n in names},
            {n: [Keep((3, 0, 2))] for n in names},
            {names[1]: [Drop()]},
            {names[1]: [Grow(2)], names[0]: [Drop(), Grow(2)]},
        )
    ):
        surgeon.apply(RankPlan(ops), step=i)
        for k in range(2):
            loss_of(model, "linear", seed=k, dtype=F32).backward()
            surgeon.ramps.before_step()
            optimizer.step()
            surgeon.ramps.after_step()
            optimizer.zero_grad()
        assert_steps_are_sane(model, optimizer)


def test_state_in_32_bits_stays_bit_for_bit():
    _, optimizer, surgeon = started("AdamW8bit", smallest=10**6)
    site = next(iter(surgeon.adapter.sites.values()))
    before = {k: t.clone() for k, t in optimizer.state[site.A].items() if isinstance(t, Tensor)}
    others = {id(p): dict(s) for p, s in optimizer.state.items() if p is not site.A and p is not site.B}
    surgeon.apply(RankPlan({site.name: [Keep((2, 1)), Grow(1)]}))
    for key, t in before.items():
        assert torch.equal(optimizer.state[site.A][key][:2], t[[2, 1]])
    for p, state in optimizer.state.items():
        assert id(p) not in others or same(state, others[id(p)])


def test_the_form_of_the_state_follows_the_size():
    """bitsandbytes keeps small parameters in 32 bits; the form it would choose for the new size is what it finds."""
    model, optimizer, surgeon = started("AdamW8bit", smallest=70)
    site = next(s for s in surgeon.adapter.sites.values() if tuple(s.A.shape) == (4, 16))
    keys = {"state1", "state2", "step"}
    codes = {"qmap1", "absmax1", "qmap2", "absmax2"}
    for ops, shape in (((), (4, 16)), ([Grow(1)], (5, 16)), ([Keep((0, 1, 4))], (3, 16)), ([Grow(3)], (6, 16))):
        if ops:
            surgeon.apply(RankPlan({site.name: ops}))
        eight = site.A.numel() >= 70
        state = optimizer.state[site.A]
        assert tuple(site.A.shape) == tuple(state["state1"].shape) == shape
        assert set(state) == (keys | codes if eight else keys)
        assert state["state1"].dtype == state["state2"].dtype == (torch.uint8 if eight else F32)
        fresh = make("AdamW8bit", [nn.Parameter(site.A.detach().clone())], smallest=70)
        p = fresh.param_groups[0]["params"][0]
        p.grad = torch.ones_like(p)
        fresh.step()
        for key, value in fresh.state[p].items():
            assert torch.as_tensor(value).dtype == torch.as_tensor(state[key]).dtype
            assert torch.as_tensor(value).shape == torch.as_tensor(state[key]).shape
            assert not key.startswith("qmap") or torch.equal(value, state[key])
        steps_of(model, optimizer)
    assert_steps_are_sane(model, optimizer)


def to_the_nearest(t: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Any]:
    """As GPUs quantise; the kernel for CPUs makes next to nothing 2e-5 of the largest."""
    blocks = t.flatten().split(blocksize)
    largest = torch.stack([b.abs().max() for b in blocks])
    codes = [((b / b.abs().max())[:, None] - code).abs().argmin(1) for b in blocks]
    return torch.cat(codes).view(t.shape).to(torch.uint8), SimpleNamespace(absmax=largest)


@pytest.mark.parametrize("kernel", ["own", "nearest"])
def test_codes_never_make_a_step_larger(kernel, monkeypatch):
    """Directions of very different size share a block: rounding to the nearest code would leave some of them a first
    moment over no second one."""
    if kernel == "nearest":
        monkeypatch.setattr("bitsandbytes.functional.quantize_blockwise", to_the_nearest)
    _, optimizer, surgeon = started("AdamW8bit", smallest=10**6)
    site = next(iter(surgeon.adapter.sites.values()))
    size = torch.logspace(0, -7, 4)[:, None]
    m = size * torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    optimizer.state[site.A].update(state1=m, state2=m.square() * (1 - 0.999**1000), step=1000)
    optimizer.args.min_8bit_size = 1
    again = Surgeon(surgeon.adapter, optimizer)
    again.apply(RankPlan({site.name: [Keep((0, 1, 2, 3))]}))
    state = optimizer.state[site.A]
    assert state["state1"].dtype == torch.uint8
    found = numbers(state)
    m, v = found["state1"] / (1 - 0.9**1000), found["state2"] / (1 - 0.999**1000)
    assert bool((m[2] != 0).any()), "the case needs small moments that have a code"
    top = m.abs() == m.abs().max()  # has no code above it
    assert bool((m.abs() <= v.sqrt() * (1 + 1e-5) + 0.01 * top).all())


def test_steps_that_were_large_before_stay_what_they_were():
    """After a jump of the gradient |m| is above sqrt(v): kept directions keep that, to within a code."""
    _, optimizer, surgeon = started("AdamW8bit", smallest=10**6)
    site = next(iter(surgeon.adapter.sites.values()))
    m = torch.linspace(0.5, 1.0, 64).view(4, 16)
    optimizer.state[site.A].update(state1=m, state2=m.square() / 9, step=10**5)
    optimizer.args.min_8bit_size = 1
    Surgeon(surgeon.adapter, optimizer).apply(RankPlan({site.name: [Keep((0, 1, 2, 3))]}))
    found = numbers(optimizer.state[site.A])
    torch.testing.assert_close(found["state1"] / found["state2"].sqrt(), torch.full((4, 16), 3.0), rtol=0.05, atol=0)


def resume_of(name: str) -> Callable[[list[nn.Parameter]], Optimizer]:
    return lambda parameters: make(name, parameters, smallest=100)


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit", "AdamW32bit"])
def test_a_run_grows_shrinks_and_resumes_bit_for_bit(name, tmp_path: Path):
    make = resume_of(name)
    whole = Run(GROW_THEN_SQUEEZE, 20, make=make).until(20)
    assert whole.flow.layout.total_rank == 20
    for stop in (8, 15):
        first = Run(GROW_THEN_SQUEEZE, 20, make=make).until(stop)
        second = resumed(first, GROW_THEN_SQUEEZE, 20, tmp_path / str(stop), make=make).until(20)
        assert same_weights(trained(whole.model), trained(second.model))


def test_what_cannot_be_carried_is_refused_by_name():
    mask = {**GROW_THEN_SQUEEZE, "mode": "mask"}
    with pytest.raises(ConfigError, match="AdamW8bit"):
        Run(mask, 20, make=resume_of("AdamW8bit"))
    Run(mask, 20, make=resume_of("AdamW32bit"))
    for name in ("AdEMAMix8bit", "LAMB8bit"):
        _, _, surgeon = started(name)
        with pytest.raises(OptimizerError, match=rf"{name} keeps '\w+'"):
            surgeon.apply(RankPlan({n: [Grow(1)] for n in surgeon.layout}))


def test_settings_by_identity_are_refused():
    model, optimizer, surgeon = started("AdamW8bit")
    p = next(iter(surgeon.adapter.parameters()))
    manager = bnb.optim.GlobalOptimManager.get_instance()
    manager.override_config(p, "optim_bits", 32)
    try:
        with pytest.raises(OptimizerError, match="GlobalOptimManager"):
            Surgeon(Adapter(model), optimizer)
    finally:
        manager.pid2config.clear()


# -- base weights -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose sizes are whole blocks of 64."""
    torch.manual_seed(0)
    where = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    LlamaForCausalLM(config).save_pretrained(where)
    return where


def quantised(folder: Path, bits: int) -> LlamaForCausalLM:
    config = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=F32
    )
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": "cpu"}, dtype=F32)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_grows_squeezes_saves_and_reloads(folder: Path, bits: int, tmp_path: Path):
    def adapted() -> PeftModel:
        config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"])
        return get_peft_model(quantised(folder, bits), config)

    probe = torch.arange(10)[None]
    run = Run(GROW_THEN_SQUEEZE, 20, model=adapted(), scheduled=False)
    assert {type(s.layer).__name__ for s in run.flow._adapter.sites.values()} == {
        "Linear4bit" if bits == 4 else "Linear8bitLt"
    }
    exact = dict(LlamaForCausalLM.from_pretrained(folder, dtype=F32).named_parameters())
    for name, site in run.flow._adapter.sites.items():
        weight = exact[f"{name}.weight"].detach()
        got = base_weight(site)
        assert got.shape == weight.shape
        assert float((got.float() - weight).norm() / weight.norm()) < (0.15 if bits == 4 else 0.02)
    run.until(7)
    before = run.model(input_ids=probe).logits.detach()
    run.until(20)
    assert run.flow.layout.total_rank == 8
    after = run.model(input_ids=probe).logits.detach()
    assert not torch.allclose(before, after)
    run.flow.finish()
    rankflow.resize(run.model, 6, run.optimizer)
    torch.testing.assert_close(run.model(input_ids=probe).logits.detach(), after, rtol=1e-5, atol=1e-6)
    run.model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantised(folder, bits), tmp_path).train()
    torch.testing.assert_close(loaded(input_ids=probe).logits.detach(), after, rtol=1e-5, atol=1e-6)


def test_a_weight_that_inference_has_packed_is_read_as_what_it_is(folder: Path):
    """On CPUs with bfloat16 of their own, a forward in eval mode leaves another order of the codes behind, as here."""
    model = get_peft_model(quantised(folder, 4), LoraConfig(r=2, target_modules=["q_proj"])).eval()
    site = next(iter(Adapter(model).sites.values()))
    before = base_weight(site).clone()
    weight = site.layer.get_base_layer().weight
    weight.data, weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    torch.testing.assert_close(base_weight(site), before, rtol=1e-2, atol=1e-4)

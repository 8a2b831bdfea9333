"""EVA: against PEFT's own initialisation, against SVDs of all inputs at once, and what it refuses."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers import lora, wrap
from loops import Run, tiny_llama, token_batches, weights
from peft import EvaConfig, LoraConfig, PeftModel
from peft.tuners.lora.eva import get_eva_state_dict
from peft.utils.incremental_pca import IncrementalPCA
from synthetic import World
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import rankflow
from rankflow.config.load import load_policy
from rankflow.errors import AdapterError, ConfigError, PlanError
from rankflow.lora.adapter import Adapter
from rankflow.plans.budget import Budget
from rankflow.plans.limits import Limit, Limits
from rankflow.plans.ops import Drop, Grow, Refactor
from rankflow.policies.methods.eva import Eva
from rankflow.policies.observation import Observation, Signal
from rankflow.training.trainer import RankFlowCallback
from tests.training.test_trainer import trainer

TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def llama() -> LlamaForCausalLM:
    """Inputs of very different spread: embeddings that differ in length, norms that favour some entries."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                fall = -3.0 if "input" in name else -1.5
                p.copy_(torch.exp(torch.linspace(0, fall, len(p)))[torch.randperm(len(p))])
        model.get_input_embeddings().weight.mul_(20)
    return model


def padded_batches(n: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    batches = []
    for _ in range(n):
        ids = torch.randint(0, 61, (16, 12), generator=generator)
        mask = torch.ones_like(ids)
        mask[::3, 8:] = 0
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids})
    return batches


def started(model: torch.nn.Module, batches: list[dict[str, Tensor]], **policy) -> rankflow.Controller:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return rankflow.attach(model, optimizer, {"policy": "eva", **policy}, total_steps=4, batches=batches)


# -- against others ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rho", "exact"), [(1.0, True), (2.0, True), (3.0, True), (2.0, False)])
def test_ranks_and_directions_are_those_of_pefts_initialisation(rho, exact, monkeypatch: pytest.MonkeyPatch):
    """PEFT goes round its data until directions settle, so it is given one batch: twice the same is the same. Its
    randomised SVD is a little off in the last directions, so it is compared with an exact one in its place as well."""
    if exact:
        monkeypatch.setattr(IncrementalPCA, "_svd_fn_lowrank", IncrementalPCA._svd_fn_full)
    batches = padded_batches(1)
    settings = {"r": 4, "target_modules": TARGETS}
    theirs = wrap(llama(), LoraConfig(**settings, init_lora_weights="eva", eva_config=EvaConfig(rho=rho)))
    expected = get_eva_state_dict(theirs, batches, show_progress_bar=False)
    flow = started(wrap(llama(), LoraConfig(**settings)), batches, params={"rho": rho})
    ranks = {name.removeprefix("base_model.model."): len(rows) for name, rows in expected.items()}
    assert flow.layout.ranks == ranks
    assert rho == 1 or len(set(ranks.values())) > 2, "ranks were redistributed"
    for name, rows in expected.items():
        A = Adapter(flow.model).sites[name.removeprefix("base_model.model.")].A.detach()
        torch.testing.assert_close(A @ A.T, torch.eye(len(A)), rtol=0, atol=1e-5)
        cosines = torch.linalg.svdvals(A.double() @ rows.double().T)
        assert float(cosines.min()) > 1 - (1e-6 if exact else 1e-3), f"{name}: another subspace"
        if exact:
            alike = torch.cosine_similarity(A.double(), rows.double()).abs()
            assert float(alike.min()) > 1 - 1e-4, f"{name}: other directions"


@pytest.mark.parametrize("kind", ["linear", "conv1d_transformers"])
def test_ranks_and_directions_are_those_of_the_stacked_inputs(kind):
    model = lora(kind, trained=False)
    batches = [{"input_ids": b["input_ids"], "labels": b["labels"]} for b in token_batches(3)]
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for name, site in Adapter(model).sites.items():
        keep = seen.setdefault(name, [])
        handles.append(
            site.layer.register_forward_pre_hook(lambda m, args, keep=keep: keep.append(args[0].detach().flatten(0, 1)))
        )
    with torch.no_grad():
        before = [model(**batch).logits for batch in batches]
    for handle in handles:
        handle.remove()
    flow = started(model, batches, limits={"*": {"min": 0}})

    shares: list[tuple[float, int, int, str]] = []
    directions = {}
    for place, (name, parts) in enumerate(seen.items()):
        x = torch.cat(parts)
        _, sigma, directions[name] = torch.linalg.svd(x - x.mean(0), full_matrices=False)
        explained = sigma.square() / sigma.square().sum()
        shares += [(-float(f"{share:.5e}"), i, place, name) for i, share in enumerate(explained[:8].tolist())]
    chosen = [name for *_, name in sorted(shares)[: 4 * len(seen)]]
    assert flow.layout.ranks == {name: chosen.count(name) for name in seen}
    for name, site in Adapter(model).sites.items():
        if site.present:
            cosines = torch.cosine_similarity(site.A.detach(), directions[name][: site.rank]).abs()
            torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=0, atol=1e-6)
            assert not site.B.any()
    with torch.no_grad():
        assert all(torch.equal(model(**batch).logits, logits) for batch, logits in zip(batches, before, strict=True))


# -- the rule ---------------------------------------------------------------------------------------------------------


def explaining(world: World, shares: dict[str, list[float]]) -> Observation:
    """Inputs that explain `shares` of a variance of 1 along the axes."""
    records = {}
    for name, share in shares.items():
        a, b = world.factors[name]
        inputs = torch.tensor(share, dtype=torch.float64).sqrt().diag() @ torch.eye(len(share), a.shape[1]).double()
        records[name] = {Signal.A: a, Signal.B: b, Signal.INPUTS: inputs, Signal.INPUT_ENERGY: torch.tensor(1.0)}
    return Observation(0, records, "inputs")


def ranks_of(policy: Eva, world: World, shares: dict[str, list[float]]) -> dict[str, int]:
    return policy.decide({}, explaining(world, shares), world.layout, 0).apply_to(world.layout).ranks


def test_the_largest_shares_win_up_to_rho():
    world = World((2, 2, 2), zero_b=True)
    shares = {"m0": [0.3, 0.2, 0.15, 0.14, 0.13, 0.08], "m1": [0.6, 0.1, 0.01], "m2": [0.12, 0.11, 0.05]}
    assert ranks_of(Eva(rho=5), world, shares) == {"m0": 5, "m1": 1, "m2": 0}
    assert ranks_of(Eva(rho=2), world, shares) == {"m0": 4, "m1": 1, "m2": 1}
    assert ranks_of(Eva(rho=1.5), world, shares) == {"m0": 3, "m1": 1, "m2": 2}
    assert ranks_of(Eva(rho=1), world, shares) == {"m0": 2, "m1": 2, "m2": 2}
    assert ranks_of(Eva(rho=2, budget=Budget("total_rank", 9)), world, shares) == {"m0": 5, "m1": 2, "m2": 2}
    assert ranks_of(Eva(rho=1.5, budget=Budget("total_rank", 6)), world, shares) == {"m0": 3, "m1": 1, "m2": 2}
    world.layout = Limits((Limit("*", 1), Limit("m0", max=3))).apply(world.layout)
    assert ranks_of(Eva(rho=5), world, shares) == {"m0": 3, "m1": 1, "m2": 2}


def test_a_budget_of_parameters_counts_shares_by_what_they_cost():
    world = World((2, 2, 2, 2), zero_b=True)  # 22, 22, 24, 24 parameters a direction
    shares = {"m0": [0.230] * 3, "m1": [0.1] * 3, "m2": [0.240] * 3, "m3": [0.1] * 3}
    ranks = ranks_of(Eva(budget=Budget("max_params", 136)), world, shares)  # of which 3 are twice the mean
    assert ranks == {"m0": 3, "m1": 1, "m2": 2, "m3": 0}, "m2 explains more by the direction, less by the parameter"


@pytest.mark.parametrize("total", [3, 6, 17, 40])
def test_limits_that_hold_some_down_let_the_others_pass_rho(total):
    world = World((4,) * 6, zero_b=True)
    world.layout = Limits((Limit("m0", max=1), Limit("m1", max=1))).apply(world.layout)
    shares = {name: [0.5, 0.25, 0.125] for name in world.layout}
    for rho in (1.0, 2.0):
        assert sum(ranks_of(Eva(rho=rho, budget=Budget("total_rank", total)), world, shares).values()) == total


def test_what_the_inputs_do_not_have_is_made_up_for():
    """Fewer directions than rank: the others are a new LoRA's, and the budget is met all the same."""
    world = World((4, 4), zero_b=True)
    plan = Eva(budget=Budget("total_rank", 8)).decide(
        {}, explaining(world, {"m0": [1.0], "m1": [1.0]}), world.layout, 0
    )
    assert plan.apply_to(world.layout).ranks == {"m0": 4, "m1": 4}
    for ops in plan.ops.values():
        drop, grow, stretch = ops
        assert isinstance(drop, Drop)
        assert isinstance(grow, Grow)
        assert isinstance(stretch, Refactor)
    one = {"input_ids": torch.full((2, 3), 5), "labels": torch.full((2, 3), 5)}
    flow = started(lora("linear", trained=False), [one], limits={"*": {"min": 4, "max": 4}})
    assert all(bool(site.A.any(1).all()) for site in Adapter(flow.model).sites.values())


def test_nothing_to_go_by_is_said_and_changes_nothing():
    world = World((4, 4), zero_b=True)
    plan = Eva().decide({}, explaining(world, {name: [0.0, 0.0] for name in world.layout}), world.layout, 0)
    assert not plan
    assert "every score is zero" in plan.reason
    still = {name: dict(record) for name, record in explaining(world, {"m0": [0.0], "m1": [0.0]}).items()}
    for record in still.values():
        record[Signal.INPUT_ENERGY] = torch.tensor(0.0)
    assert "every score is zero" in Eva().decide({}, Observation(0, still, "inputs"), world.layout, 0).reason


def test_keeping_a_changes_ranks_alone():
    model = tiny_llama(r=4)
    before = weights(model)
    Run({"policy": "eva", "params": {"init_a": "keep"}}, 3, model=model, batches=token_batches(2))
    after = weights(model)
    assert any(new.shape != before[name].shape for name, new in after.items())
    for name, new in after.items():
        k = min(len(new), len(before[name]))
        assert "lora_A" not in name or torch.equal(new[:k], before[name][:k])
        assert "lora_B.default" not in name or not new.any()


# -- its place in a run -----------------------------------------------------------------------------------------------

THEN_SQUEEZE = {
    "phases": [
        {"policy": "eva", "until": 1, "params": {"batches": 2}},
        {"policy": "squeeze", "until": 8, "budget": {"mean_rank": 2}, "when": {"start": 4, "every": 2}},
        {"policy": "hold"},
    ],
    "limits": {"*": {"min": 1, "max": 8}},
}


def test_new_directions_learn_at_full_speed_and_a_squeeze_may_follow():
    run = Run({**THEN_SQUEEZE, "step": "free"}, 10, model=tiny_llama(r=4), batches=token_batches(2))
    assert run.flow.layout.total_rank == 40
    assert not run.flow.state_dict()["ramps"]["young"], "there was no training that new directions could disturb"
    assert run.flow.ledger.layout() == run.flow.layout
    before = weights(run.model)
    run.until(1)
    moved = [(weights(run.model)[n] - t).abs().max() for n, t in before.items() if "lora_B.default" in n]
    assert float(min(moved)) > 0.9e-2, "Adam's first step is lr"
    run.until(10)
    assert run.flow.layout.total_rank == 20


def test_the_trainer_runs_it_and_a_resumed_run_does_not_start_again(tmp_path):
    policy = {**THEN_SQUEEZE, "phases": THEN_SQUEEZE["phases"][:1]}
    callback = RankFlowCallback(policy, batches=token_batches(2))
    run = trainer(tmp_path, callback, model=tiny_llama(r=4), max_steps=6, save_strategy="steps", save_steps=3)
    run.train()
    ranks = callback.flow.layout.ranks
    assert sum(ranks.values()) == 40
    assert len(set(ranks.values())) > 1
    again = RankFlowCallback(policy, batches=token_batches(2))
    resumed = trainer(tmp_path, again, model=tiny_llama(r=4), max_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.flow.layout.ranks == ranks
    after = weights(run.model)
    assert all(torch.equal(t, after[n]) for n, t in weights(resumed.model).items() if ".default." in n)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(tiny_llama(r=4).unload(), tmp_path / "checkpoint-6")
    assert all(torch.equal(t, after[n]) for n, t in weights(loaded).items())


def test_what_it_refuses():
    data = {"batches": token_batches(2)}
    with pytest.raises(ConfigError, match=r"policy eva studies 16 batches .*give them with batches=\.\.\."):
        Run("eva", 10)
    with pytest.raises(ConfigError, match=r"phases\[1\] \(eva\): decides before the first step; put it first"):
        load_policy({"phases": [{"policy": "hold", "until": 2}, {"policy": "eva"}]}).resolve(10, World((4,)).layout)
    with pytest.raises(PlanError, match=r"neither A nor B is zero.*a new adapter"):
        Run("eva", 10, model=tiny_llama(init_lora_weights=False), **data)
    with pytest.raises(AdapterError, match="emb: signal 'inputs' does not exist for embedding layers"):
        started(lora("embedding", trained=False), [{"ids": torch.zeros(1, 2, dtype=torch.long)}])
    with pytest.raises(ConfigError, match=r"params.rho: should be greater than or equal to 1, not 0.5"):
        load_policy({"policy": "eva", "params": {"rho": 0.5}})

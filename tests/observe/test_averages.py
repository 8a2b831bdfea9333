"""Averages of a live model: heard alike however backward comes about, carried by the surgeon, resumed to the bit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from helpers import lora, same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loops import Run, resumed
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import rankflow
from rankflow.errors import AdapterError, RankFlowError
from rankflow.lora.adapter import Adapter
from rankflow.lora.transaction import Transaction
from rankflow.observe.averages import AVERAGED, sources
from rankflow.observe.probes import Probes
from rankflow.plans.layout import Layout
from rankflow.plans.ops import Drop, Grow, Keep, Train
from rankflow.plans.plan import RankPlan
from rankflow.plans.schedule import When
from rankflow.policies.base import Policy
from rankflow.policies.lifecycle import Lifecycle
from rankflow.policies.observation import Observation, Signal
from rankflow.surgery.surgeon import Surgeon
from tests.gating.test_gates import Rounded, Spread
from tests.observe.test_probes import checkpointed, encoder, reviews, sentence_loss
from tests.observe.test_statistics import mixing, ops_from
from tests.training.test_controller import STEPS, CountingMode, assert_one_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listening(Policy):
    """Asks for all averages on the steps given, and keeps what it got."""

    steps: frozenset[int] = frozenset(range(1, 100))
    signals: frozenset[Signal] = AVERAGED
    seen: list[Observation] = dataclasses.field(default_factory=list)
    plans: dict[int, RankPlan] = dataclasses.field(default_factory=dict)

    @property
    def decay(self) -> float:
        return 0.8

    def listen(self, step):
        return self.signals if step in self.steps else frozenset()

    def observe(self, state, obs, step):
        self.seen.append(obs)
        return state

    def decide(self, state, obs, layout, step):
        return self.plans.get(step, RankPlan(reason="listens"))


def listening(**fields: Any) -> tuple[Lifecycle, Listening]:
    policy = Listening(when=When(start=1, every=1), **fields)
    return Lifecycle((("listening", policy, None),)), policy


def averages_of(model: nn.Module, losses: Iterable[Iterable[Callable[[], Tensor]]]) -> Observation:
    """What a policy sees after one step for each group of micro-batches; nothing is learnt meanwhile."""
    lifecycle, policy = listening()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    steps = list(losses)
    with rankflow.attach(model, optimizer, lifecycle, total_steps=len(steps)) as flow:
        for micro in steps:
            for loss in micro:
                loss().backward()
            flow.before_step()
            optimizer.step()
            flow.after_step()
            optimizer.zero_grad()
    return policy.seen[-1]


def close(one: Observation, other: Observation, tolerance: float = 1e-5) -> None:
    assert list(one) == list(other)
    assert one
    for name in one:
        assert one[name].keys() == AVERAGED
        for signal in AVERAGED:
            a, b = one[name][signal], other[name][signal]
            assert a.dtype == torch.float64
            assert b.any(), f"{name}: {signal.value} is zero"
            assert (a - b).norm() <= tolerance * b.norm(), f"{name} {signal.value}: {a} against {b}"


# -- however backward comes about -------------------------------------------------------------------------------------


class FixedDropout(nn.Module):
    """Drops the same features of every token, so that it does not matter how a batch is cut up."""

    def forward(self, x: Tensor) -> Tensor:
        keep = torch.arange(x.shape[-1], device=x.device) % 10 != 3
        return x * keep / 0.9


def llama(reentrant: bool | None, fixed: bool) -> tuple[nn.Module, Callable[[dict[str, Tensor]], Tensor]]:
    model = lora("linear", lora_dropout=0.1, dtype=torch.float32).train()
    return prepared(model, reentrant, fixed), lambda batch: model(**batch, labels=batch["input_ids"]).loss


def minilm(reentrant: bool | None, fixed: bool) -> tuple[nn.Module, Callable[[dict[str, Tensor]], Tensor]]:
    model = encoder(dropout=0.1)
    return prepared(model, reentrant, fixed), lambda batch: sentence_loss(model, batch)


def prepared(model: nn.Module, reentrant: bool | None, fixed: bool) -> nn.Module:
    if fixed:
        for site in Adapter(model).sites.values():
            if site.kind != "embedding":
                site.layer.lora_dropout["default"] = FixedDropout()
    return checkpointed(model, reentrant)


def batches(n: int = 2) -> list[dict[str, Tensor]]:
    """Half of each is as long as the other."""
    found = []
    for seed in range(n):
        batch = {k: torch.cat([v[:3], v[:3]]) for k, v in reviews(seed=seed).items()}
        batch["input_ids"] = torch.randint(
            0, 60, batch["input_ids"].shape, generator=torch.Generator().manual_seed(seed)
        )
        found.append(batch)
    return found


def halves(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{k: v[i : i + 3] for k, v in batch.items()} for i in (0, 3)]


@pytest.mark.parametrize("make", [llama, pytest.param(minilm, marks=pytest.mark.slow)])
def test_checkpointing_and_accumulation_change_nothing(make):
    def observe(reentrant: bool | None, *, split: bool, fixed: bool) -> Observation:
        model, loss = make(reentrant, fixed)
        torch.manual_seed(3)
        steps = [[lambda m=m: loss(m) / 2 for m in halves(b)] if split else [lambda b=b: loss(b)] for b in batches()]
        return averages_of(model, steps)

    plain, fixed = observe(None, split=False, fixed=False), observe(None, split=False, fixed=True)
    for reentrant in (True, False):
        close(observe(reentrant, split=False, fixed=False), plain)
    for reentrant in (None, True, False):
        close(observe(reentrant, split=True, fixed=True), fixed)
    tokens = sum(int(b["attention_mask"].sum()) * 0.8 ** (1 - i) for i, b in enumerate(batches()))
    assert all(torch.allclose(t, torch.tensor(tokens).double()) for t in plain.gather(Signal.MEASURED).values())


def test_a_longer_batch_counts_by_its_tokens_whatever_its_mean_loss_was_divided_by():
    """The averages are those of the summed loss, over all tokens: a mean loss divides d by the tokens of its batch."""
    model, loss = llama(None, fixed=True)
    short, long = batches(1)[0], {k: v.repeat(3, 1) for k, v in batches(1)[0].items()}
    once, thrice = averages_of(model, [[lambda: loss(short)]]), averages_of(model, [[lambda: loss(long)]])
    for name in once:
        assert torch.allclose(once[name][Signal.MEAN_ZZ], thrice[name][Signal.MEAN_ZZ], rtol=1e-4)
        assert torch.allclose(once[name][Signal.MEAN_DD], thrice[name][Signal.MEAN_DD], rtol=1e-4)
        assert torch.allclose(3 * once[name][Signal.MEASURED], thrice[name][Signal.MEASURED])


def test_the_averages_are_those_of_z_and_d_of_the_summed_loss():
    model, loss = llama(None, fixed=False)
    model.eval()
    batch = {k: v[:, :5] for k, v in batches(1)[0].items()}  # no token of it is hidden
    name = "model.layers.1.mlp.down_proj"
    site = Adapter(model).sites[name]
    kept: dict[str, Tensor] = {}
    handle = site.layer.base_layer.register_forward_hook(
        lambda m, args, y: kept.update(x=args[0], y=y) or y.retain_grad()
    )
    (loss(batch) * batch["input_ids"].numel()).backward()
    handle.remove()
    z, d = kept["x"].flatten(0, 1) @ site.A.T, site.scaling * kept["y"].grad.flatten(0, 1) @ site.B
    model.zero_grad()
    seen = averages_of(model, [[lambda: loss(batch)]])[name]
    torch.testing.assert_close(seen[Signal.MEAN_ZZ], (z.T @ z / len(z)).double().detach(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(seen[Signal.MEAN_DD], (d.T @ d / len(z)).double().detach(), rtol=1e-4, atol=1e-9)
    assert seen[Signal.MEASURED].tolist() == [30.0] * 4


# -- through the surgeon ----------------------------------------------------------------------------------------------


class Side(nn.Module):
    """Two layers side by side, so that what becomes of one says nothing to the other; linear, so d is what it is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = (nn.Linear(6, 5, dtype=torch.float64) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.two(x)


class Patient:
    def __init__(self) -> None:
        config = LoraConfig(r=3, lora_alpha=5, target_modules=["one", "two"], init_lora_weights=False)
        self.model = get_peft_model(Side(), config, autocast_adapter_dtype=False)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-3)
        self.surgeon = Surgeon(Adapter(self.model), self.optimizer)
        slots = {name: dataclasses.replace(slot, max_rank=99) for name, slot in self.surgeon.layout.items()}
        self.surgeon.layout = Layout(slots)
        self.averages = self.surgeon.averages

    def hear(self, averages: Any = None) -> Observation:
        x, g = (torch.randn(20, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (6, 5))
        probes = Probes(self.surgeon.adapter)
        probes.arm(sources(AVERAGED), 1)
        (self.model(x) * g).sum().backward()
        self.optimizer.zero_grad()
        return (averages or self.averages).take(probes.collect(), AVERAGED, 0.5)

    def state(self) -> dict[str, dict[str, Tensor]]:
        return {
            name: {k: t.clone() for k, t in tensors.items()} for name, tensors in self.averages.state_dict().items()
        }


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_what_the_surgeon_carries_is_what_would_be_heard_now(data):
    patient = Patient()
    patient.hear()
    rank = 3
    for step in range(3):
        ops = [op for op in data.draw(ops_from(rank, mixed=True, most=2)) if not isinstance(op, Train)]
        patient.surgeon.apply(RankPlan({"one": ops}), step)
        rank = patient.surgeon.layout["one"].rank
        carried = patient.averages.state_dict()
        assert carried["one"]["measured"].shape == (rank,)
        heard = patient.hear(type(patient.averages)(patient.surgeon.adapter))
        for name, record in heard.items():
            known = carried[name]["measured"] > 0
            for signal in (Signal.MEAN_ZZ, Signal.MEAN_DD):
                was, now = (t[known][:, known] for t in (carried[name][signal.value], record[signal]))
                assert torch.linalg.matrix_norm(was - now) <= 1e-10 * torch.linalg.matrix_norm(now)
    assert (carried["two"]["measured"] == 20).all()


def test_a_resize_that_fails_leaves_them_to_the_bit_at_whatever_write(monkeypatch):
    patient = Patient()
    patient.hear()
    before, plan = patient.state(), RankPlan({"one": [mixing(2, 3, 0), Grow(2)], "two": [Keep((2, 0))]})

    def unsound(*_: object) -> None:
        raise RankFlowError("after the last write")

    with monkeypatch.context() as patch:
        patch.setattr(Surgeon, "_verify", unsound)
        with pytest.raises(RankFlowError, match="after the last write"):
            patient.surgeon.apply(plan)
    assert same(patient.state(), before)
    write, left = Transaction.write, 0

    def failing(self: Transaction, do: Callable[[], object], undo: Callable[[], object]) -> None:
        nonlocal left
        left -= 1
        write(self, do, undo)
        if left == 0:
            raise RankFlowError("broken")

    monkeypatch.setattr(Transaction, "write", failing)
    for fail_at in range(1, 1000):
        left = fail_at
        try:
            patient.surgeon.apply(plan)
        except RankFlowError:
            assert same(patient.state(), before)
        else:
            break
    assert fail_at > 10
    assert patient.state()["one"]["measured"].tolist() == [20, 20, 0, 0]
    assert patient.state()["two"]["measured"].tolist() == [20, 20]


def test_a_module_that_comes_back_starts_unmeasured():
    patient = Patient()
    patient.hear()
    patient.surgeon.apply(RankPlan({"one": [Drop()]}))
    assert "one" not in patient.hear()
    patient.surgeon.apply(RankPlan({"one": [Grow(2)]}))
    assert patient.state()["one"]["measured"].tolist() == [0, 0]
    assert patient.hear()["one"][Signal.MEASURED].tolist() == [20, 20]


@pytest.mark.parametrize("gate", [Spread(), Spread(scope="module"), Rounded()], ids=["value", "module", "rounded"])
def test_what_was_heard_under_a_gate_is_what_would_be_heard_after_folding(gate):
    patient = Patient()
    patient.surgeon.gates.install(gate)
    gated = patient.hear()
    assert patient.surgeon.gates
    patient.surgeon.gates.fold()
    assert not patient.surgeon.gates
    close(gated, patient.hear(type(patient.averages)(patient.surgeon.adapter)), 1e-6)  # gates are float32


# -- in a run ---------------------------------------------------------------------------------------------------------


def test_what_was_heard_before_counts_on_and_only_steps_that_listen_are_heard():
    lifecycle, policy = listening(steps=frozenset({2, 3, 6}))
    run = Run(lifecycle, STEPS).until(5)
    kept = run.flow.state_dict()["averages"]
    run.until(8)
    assert [obs.step for obs in policy.seen] == [2, 3, 6]
    name = next(iter(run.flow.layout))
    tokens = [float(obs[name][Signal.MEASURED][0]) for obs in policy.seen]
    assert tokens == pytest.approx([80, 80 * 1.8, 80 * (0.8**2 + 0.8 + 1)])
    assert torch.equal(policy.seen[1][name][Signal.MEAN_ZZ], kept[name]["mean_zz"])
    assert run.flow.state_dict()["averages"].keys() == run.flow.layout.keys()


def test_a_policy_gets_what_it_asked_for_and_nothing_is_kept_for_one_that_asks_for_none():
    lifecycle, policy = listening(signals=frozenset({Signal.MEAN_ZZ, Signal.GRAD_B}))
    Run(lifecycle, STEPS).until(1)
    assert all(record.keys() == {Signal.MEAN_ZZ, Signal.GRAD_B} for record in policy.seen[0].values())
    lifecycle, policy = listening(signals=frozenset({Signal.S_A, Signal.TOKENS}))
    run = Run(lifecycle, STEPS).until(1)
    assert all(record.keys() == {Signal.S_A, Signal.TOKENS} for record in policy.seen[0].values())
    assert run.flow.state_dict()["averages"] == {}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_has_no_part_in_them(bad):
    lifecycle, policy = listening()
    run = Run(lifecycle, STEPS).until(2)
    before = run.flow.state_dict()["averages"]
    for micro in run.batches[:2]:
        (run.model(**micro).loss * bad).backward()
    run.flow.before_step()
    run.optimizer.zero_grad()
    run.optimizer.step()
    run.flow.after_step()
    assert run.flow.step == len(policy.seen) == 3
    assert same(run.flow.state_dict()["averages"], before)


def test_a_skipped_step_has_no_part_in_them():
    lifecycle, policy = listening()
    run = Run(lifecycle, STEPS)
    run.model(**run.batches[0]).loss.backward()
    run.flow.before_step()
    run.flow.after_step()  # a loss scaler that skips never calls optimizer.step
    assert run.flow.state_dict()["averages"] == {}
    assert not policy.seen


def test_a_frozen_module_keeps_what_was_heard_of_it():
    lifecycle, policy = listening()
    run = Run(lifecycle, STEPS).until(1)
    first, *_, last = run.flow.layout
    for name, p in run.model.named_parameters():
        if "layers.0" in name:
            p.requires_grad_(False)
    run.until(2)
    one, two = policy.seen
    assert torch.equal(one[first][Signal.MEAN_DD], two[first][Signal.MEAN_DD])
    assert not torch.equal(one[last][Signal.MEAN_DD], two[last][Signal.MEAN_DD])


def test_a_step_that_only_listens_never_asks_the_device():
    lifecycle, policy = listening()
    lifecycle = Lifecycle((("listening", dataclasses.replace(policy, when=When(start=5)), None),))
    run = Run(lifecycle, STEPS).until(1)  # the first step makes optimizer state
    waits = []
    for flow in (False, True):
        for micro in run.batches[:2]:
            run.model(**micro).loss.backward()
        with CountingMode() as mode:
            if flow:
                run.flow.before_step()
            run.optimizer.step()
            if flow:
                run.flow.after_step()
        waits.append(mode.ops.count("aten._local_scalar_dense.default"))
    assert len(policy.seen) == 2
    assert waits[0] == waits[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_that_only_listens_never_waits_for_the_gpu():
    patient = Patient()
    patient.model.cuda()
    x = torch.randn(20, 6, dtype=torch.float64, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(2):
            probes = Probes(patient.surgeon.adapter)
            probes.arm(sources(AVERAGED), step)
            patient.model(x).sum().backward()
            seen = patient.averages.take(probes.collect(), AVERAGED, 0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert seen["one"][Signal.MEASURED].tolist() == [30] * 3


@pytest.mark.parametrize("stop", [4, 7])
def test_a_resumed_run_has_them_to_the_bit_and_cuts_by_them_alike(tmp_path, stop):
    policy = {
        "policy": "squeeze",
        "budget": {"mean_rank": 1},
        "when": {"start": 4, "every": 4, "stop": 9},
        "params": {"metric": "loss", "window": 2, "shape": "linear"},
    }
    whole = Run(policy, STEPS).until(stop)
    second = resumed(whole, policy, STEPS, tmp_path)
    assert same(second.flow.state_dict()["averages"], whole.flow.state_dict()["averages"])
    whole.until(9)
    assert_one_run(whole, second.until(9), stop)
    assert same(second.flow.state_dict()["averages"], whole.flow.state_dict()["averages"])
    cuts = [e["plan"]["ops"] for e in whole.flow.ledger.events if e["event"] == "resize"]
    assert [e["total_rank"] for e in whole.flow.ledger.events if e["event"] == "resize"] == [15, 10]
    metrics = {op["metric"] for ops in cuts for made in ops.values() for op in made if op["op"] == "refactor"}
    assert metrics == {"loss"}


@pytest.mark.parametrize(
    ("kind", "changes", "what"),
    [("attention", {}, "attention"), ("experts", {}, "experts"), ("linear", {"use_dora": True}, "DoRA")],
)
def test_layers_without_activations_between_factors_are_refused_by_name(kind, changes, what):
    model = lora(kind, **changes)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(AdapterError, match=f"does not exist for {what}.*weights") as caught:
        rankflow.attach(model, optimizer, listening()[0], total_steps=5)
    assert str(caught.value).partition(":")[0] in Adapter(model).sites

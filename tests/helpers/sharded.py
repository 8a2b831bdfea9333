"""What processes do in tests of adapters that FSDP2 has in shards, each function in every one of them."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from loops import GROW_THEN_SQUEEZE, tiny_llama, token_batches
from peft import PeftModel
from replicas import INCRELORA, SIZE, SORA, train
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

import rankflow

STEPS = 22
SMALL = {"*": {"min": 0, "max": 6}}
SHRINK = {"policy": "squeeze", "when": {"start": 6, "every": 3, "stop": 12}, "budget": {"mean_rank": 1.5}}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "squeeze": ({**SHRINK, "limits": SMALL}, {"r": 5}),
    "squeeze by loss": ({**SHRINK, "params": {"metric": "loss"}}, {"r": 5}),
    "increlora": ({**INCRELORA, "limits": SMALL}, {"r": 3}),
    "phases": ({**GROW_THEN_SQUEEZE, "limits": SMALL}, {"r": 2}),
    "sora": (SORA | {"limits": {"*": {"min": 1}}}, {"r": 4}),
    "adalora": (
        {"policy": "adalora", "when": {"start": 4, "every": 4, "stop": 13}, "budget": {"mean_rank": 2}},
        {"r": 4},
    ),
    "leave and return": (
        {
            "phases": [
                {
                    "policy": "squeeze",
                    "until": "35%",
                    "budget": {"mean_rank": 0.7},
                    "when": {"start": 3, "every": 3},
                },
                {"policy": "hold", "until": "50%"},  # those without a direction leave: there is no room for any
                {**INCRELORA, "until": "80%", "budget": {"mean_rank": 2}, "when": {"every": 2}},
                {"policy": "hold"},
            ],
            "limits": SMALL,
        },
        {"r": 2},
    ),
    "accumulating": ({**INCRELORA, "limits": SMALL}, {"r": 3, "micro": 2}),
    "recomputing": ({**SHRINK, "params": {"metric": "loss"}}, {"r": 5, "checkpoint": True}),
    "dora": ({**SHRINK, "limits": SMALL}, {"r": 5, "use_dora": True}),
    "embedding": ({**INCRELORA, "limits": SMALL}, {"r": 3, "target_modules": ["embed_tokens", "q_proj", "up_proj"]}),
    "rigl": ({"policy": "rigl", "when": {"start": 4, "every": 4, "stop": 12}, "limits": SMALL}, {"r": 3}),
    "lisa": ({"policy": "lisa", "when": {"start": 4, "every": 4}, "params": {"active": 1}}, {"r": 3}),
}
CASES = {name: ({**policy, "mode": "mask"}, model) for name, (policy, model) in CASES.items()}
FAILURES = ("shards _made 3", "shards _regroup 1", "surgeon _verify 0")
QUICK = ("adalora", "phases", "leave and return", "sora", "gated", "refusals", "fails at shards _made 3")
ALL = (*CASES, "gated", "refusals", "resumed", *(f"fails at {at}" for at in FAILURES))
WHOLE = StateDictOptions(full_state_dict=True)


def made(shard: bool, model: dict[str, Any]) -> tuple[Any, Any]:
    model = {key: value for key, value in model.items() if key != "micro"}
    recomputes = model.pop("checkpoint", False)
    net = tiny_llama(dropout=0.0, **model).double().train()
    if recomputes:
        net.enable_input_require_grads()
        base = net.get_base_model()
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if shard:
        net = sharded(net)
    return net, torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)


def sharded(net: Any, **options: Any) -> Any:
    options = {"mesh": init_device_mesh("cpu", (SIZE,)), **options}
    for layer in net.base_model.model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(net, **options)


def whole(net: Any) -> dict[str, Any]:
    return {n: t.clone() for n, t in get_model_state_dict(net, options=WHOLE).items() if "lora_" in n}


def outcome(net: Any, flow: Any, optimizer: Any) -> dict[str, Any]:
    weights = whole(net)
    moments = {}
    for name, site in flow._adapter.sites.items():
        for role, p in site.tensors().items():
            moments |= {f"{name} {role} {k}": _full(v) for k, v in optimizer.state.get(p, {}).items()}
    return {
        "ranks": flow.layout.ranks,
        "weights": weights,
        "moments": moments,
        "events": flow.ledger.events,
        "config": net.peft_config["default"].to_dict(),
        "after": whole_outputs(net),
    }


def _full(t: Any) -> Any:
    return t.full_tensor() if isinstance(t, DTensor) else t


def whole_outputs(net: Any) -> torch.Tensor:
    net.eval()
    with torch.no_grad():
        return net(**token_batches(1, seed=5)[0]).logits


@cache
def alone(name: str) -> dict[str, Any]:
    """One process that accumulates what each of several gets."""
    policy, model = CASES[name]
    net, optimizer = made(False, model)
    flow = rankflow.attach(net, optimizer, policy, total_steps=STEPS)
    micro = model.get("micro", 1)
    train(net, flow, optimizer, token_batches(SIZE * STEPS * micro), SIZE * micro)
    flow.finish()
    return outcome(net, flow, optimizer)


def run(rank: int, name: str) -> Any:
    policy, model = CASES[name]
    net, optimizer = made(True, model)
    flow = rankflow.attach(net, optimizer, policy, total_steps=STEPS)
    assert any(site.capacity > site.rank for site in flow._adapter.sites.values()) or not flow.phase.policy.grows
    micro = model.get("micro", 1)
    batches, managed = token_batches(SIZE * STEPS * micro)[rank::SIZE], []
    for at in range(0, len(batches), micro):
        train(net, flow, optimizer, batches[at : at + micro], micro)
        managed.append(sum(len(group.fsdp_params) for group in flow_shards(flow)._groups()))
    assert all(isinstance(p, DTensor) for p in net.parameters())
    whole_outputs(net.eval())  # leaves the outermost module whole
    flow.finish()
    found = {"managed": managed, **outcome(net, flow, optimizer)}
    assert all(isinstance(t, DTensor) for p in net.parameters() for t in optimizer.state.get(p, {}).values() if t.ndim)
    return found


def fails(rank: int, name: str, at: str) -> Any:
    """A run in which process 1 cannot write something, once: nothing has changed then, and with the cause gone all go
    on to the same end."""
    policy, model = CASES[name]
    net, optimizer = made(True, model)
    flow = rankflow.attach(net, optimizer, policy, total_steps=STEPS)
    batches = token_batches(SIZE * STEPS)[rank::SIZE]
    failures, real = [], flow.after_step

    def after_step() -> Any:
        if flow._phases.counted == flow.step or not flow._phases.looks_at_factors():
            return real()
        before = everything(net, optimizer, flow)
        try:
            with breaking(flow, at if rank == 1 and not failures else "nowhere"):
                return real()
        except (MemoryError, rankflow.RankFlowError) as e:
            failures.append(f"{type(e).__name__}: {e}")
        same(before, everything(net, optimizer, flow))
        return real()

    flow.after_step = after_step
    train(net, flow, optimizer, batches)
    flow.finish()
    return {"failures": failures, **outcome(net, flow, optimizer)}


@contextmanager
def breaking(flow: Any, at: str) -> Iterator[None]:
    """In the block, a method of the shards or the surgeon fails after some calls."""
    if at == "nowhere":
        yield
        return
    where, name, after = at.split()
    owner = {"shards": flow_shards(flow), "surgeon": flow._surgeon}[where]
    real, left = getattr(owner, name), [int(after)]

    def broken(*args: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise MemoryError("no room")
        return real(*args)

    setattr(owner, name, broken)
    try:
        yield
    finally:
        delattr(owner, name)


def flow_shards(flow: Any) -> Any:
    return flow._processes._shards


def everything(net: Any, optimizer: Any, flow: Any) -> dict[str, Any]:
    """Objects by identity, and what tensors hold."""
    local = {n: p.to_local().clone() for n, p in net.named_parameters()}
    state = {
        (i, k): (t.to_local() if isinstance(t, DTensor) else t).clone()
        for i, p in enumerate(q for g in optimizer.param_groups for q in g["params"])
        for k, t in optimizer.state.get(p, {}).items()
    }
    return {
        "parameters": {n: id(p) for n, p in net.named_parameters()},
        "held": [id(p) for g in optimizer.param_groups for p in g["params"]],
        "groups": [[id(of) for of in group.fsdp_params] for group in flow_shards(flow)._groups()],
        "sharded": [[id(of.sharded_param) for of in group.fsdp_params] for group in flow_shards(flow)._groups()],
        "hooks": [len(m._load_state_dict_post_hooks) for m in net.modules()],
        "ranks": flow.layout.ranks,
        "size": {n: (site.capacity, site.rank) for n, site in flow._adapter.sites.items()},
        "local": local,
        "state": state,
    }


def same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key in before.keys() - {"local", "state"}:
        assert before[key] == after[key], key
    for key in ("local", "state"):
        assert before[key].keys() == after[key].keys()
        for name, t in before[key].items():
            assert torch.equal(t, after[key][name]), name


def resumes(rank: int, name: str) -> Any:
    """A run that is stopped in the middle of a phase, and gone on with in other objects."""
    policy, model = CASES[name]
    net, optimizer = made(True, model)
    flow = rankflow.attach(net, optimizer, policy, total_steps=STEPS)
    batches = token_batches(SIZE * STEPS)[rank::SIZE]
    half = 8
    train(net, flow, optimizer, batches[:half])
    state, config = flow.state_dict(), net.peft_config["default"]
    weights, moments = whole(net), get_optimizer_state_dict(net, optimizer, options=WHOLE)
    flow.detach()
    settings = {"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern}
    plain = tiny_llama(dropout=0.0, **{**model, "r": config.r, "lora_alpha": config.lora_alpha, **settings}).double()
    assert not plain.load_state_dict(weights, strict=False).unexpected_keys
    net = sharded(plain.train())
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    set_optimizer_state_dict(net, optimizer, moments, options=WHOLE)
    flow = rankflow.attach(net, optimizer, policy, total_steps=STEPS, state=state)
    train(net, flow, optimizer, batches[half:])
    flow.finish()
    return outcome(net, flow, optimizer)


def gated(rank: int, folder: str) -> Any:
    """Saved and given up while factors are under gates, some of which are closed."""
    policy, model = CASES["sora"]
    net, optimizer = made(True, model)
    flow = rankflow.attach(net, optimizer, policy, total_steps=STEPS)
    train(net, flow, optimizer, token_batches(SIZE * STEPS)[rank::SIZE][:6])
    outputs, weights = whole_outputs(net), get_model_state_dict(net, options=WHOLE)
    if rank == 0:
        net.save_pretrained(f"{folder}/gated", state_dict=weights)
    dist.barrier()
    plain = PeftModel.from_pretrained(tiny_llama().get_base_model().double(), f"{folder}/gated")
    found = {"open": float(flow._gates.values()["model.layers.0.self_attn.q_proj"].min()), "outputs": outputs}
    try:
        flow.state_dict()
    except rankflow.RankFlowError as e:
        found["state"] = str(e)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        flow.detach()
    found["detached"] = [str(warning.message) for warning in said]
    return {**found, "plain": whole_outputs(plain.double()), "sizes": [p.shape for p in flow.parameters()]}


def refusal(shard: Callable[[Any], Any], policy: dict[str, Any], **options: Any) -> str:
    net = tiny_llama(dropout=0.0).train()
    shard(net)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    before = {n: id(p) for n, p in net.named_parameters()}
    try:
        rankflow.attach(net, optimizer, policy, total_steps=STEPS, **options)
    except rankflow.RankFlowError as e:
        assert before == {n: id(p) for n, p in net.named_parameters()}
        return f"{type(e).__name__}: {e}"
    return "not refused"


def apart(net: Any) -> None:
    for name, module in net.named_modules():
        if name.endswith("lora_A.default"):
            fully_shard(module, mesh=init_device_mesh("cpu", (SIZE,)))
    sharded(net)


def partly(net: Any) -> None:
    sharded(net, ignored_params={p for n, p in net.named_parameters() if "q_proj.lora_" in n})


def by_columns(p: Any) -> Shard:
    return Shard(1 if p.ndim > 1 and p.shape[1] % SIZE == 0 else 0)


def refusals(rank: int) -> dict[str, str]:
    masked = {**INCRELORA, "mode": "mask", "limits": SMALL}
    gora = {"policy": "gora", "budget": {"mean_rank": 2}, "limits": SMALL, "mode": "mask"}
    mesh = init_device_mesh("cpu", (SIZE, 1), mesh_dim_names=("replicate", "shard"))
    return {
        "resize": refusal(sharded, INCRELORA),
        "study": refusal(sharded, gora, batches=token_batches(8)),
        "loss": refusal(sharded, masked, penalty="in_loss"),
        "replicated too": refusal(partial(sharded, mesh=mesh), masked),
        "offloaded": refusal(partial(sharded, offload_policy=CPUOffloadPolicy(pin_memory=False)), masked),
        "by columns": refusal(partial(sharded, shard_placement_fn=by_columns), masked),
        "factors apart": refusal(apart, masked),
        "partly": refusal(partly, masked),
    }


def together(folder: Path, names: Collection[str]) -> list[dict[str, Any]]:
    """What these come to in each of `SIZE` processes over gloo, by name; the traceback of what one raises."""
    torch.multiprocessing.spawn(_child, (str(folder), names), nprocs=SIZE)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(SIZE)]


def _child(rank: int, folder: str, names: Collection[str]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=SIZE)
    work: dict[str, Callable[[], Any]] = {name: partial(run, rank, name) for name in CASES}
    work["resumed"] = partial(resumes, rank, "phases")
    work["gated"] = partial(gated, rank, folder)
    work["refusals"] = partial(refusals, rank)
    for at in FAILURES:
        work[f"fails at {at}"] = partial(fails, rank, "phases", at)
    found = {}
    for name in names:
        try:
            found[name] = work[name]()
        except Exception:  # noqa: PERF203  # the next is to run all the same
            found[name] = traceback.format_exc()
    torch.save(found, Path(folder) / f"{rank}.pt")

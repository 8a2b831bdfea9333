"""What processes that train together do in tests, each function in every one of them."""

from __future__ import annotations

import copy
import os
import socket
import time
import traceback
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from loops import GROW_THEN_SQUEEZE, tiny_llama, token_batches
from torch import distributed as dist
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import rankflow

SIZE = 2
STEPS = 12
INCRELORA = {
    "policy": "increlora",
    "when": {"start": 3, "every": 3},
    "budget": {"mean_rank": 4},
    "params": {"score_fraction": 1.0},
}
SORA = {"policy": "sora", "when": {"start": 4, "every": 4}, "params": {"lam": 10.0, "gate_lr": 0.05}}
SQUEEZE = {
    "policy": "squeeze",
    "when": {"start": 6, "every": 3},
    "budget": {"mean_rank": 1},
    "params": {"metric": "loss"},
}
LISA = {"policy": "lisa", "when": {"every": 3}, "params": {"group": "module", "active": 3}}

FSDP = {"fsdp": True}  # in place of options of DistributedDataParallel
CASES = {
    "increlora": (INCRELORA, {}, {}),
    "increlora, gradients as views": (INCRELORA, {}, {"gradient_as_bucket_view": True, "find_unused_parameters": True}),
    "increlora, accumulating": (INCRELORA, {}, {"micro": 2}),
    "squeeze by loss": (SQUEEZE, {"r": 8}, {"bucket_cap_mb": 0.01}),
    "squeeze, one graph for all steps": (SQUEEZE, {"r": 8}, {"static_graph": True}),
    "squeeze, a hook of its own": (SQUEEZE, {"r": 8}, {"hook": "ALLREDUCE"}),
    "squeeze, masked": (SQUEEZE | {"mode": "mask"}, {"r": 8}, {"hook": "ALLREDUCE"}),
    "sora": (SORA, {"r": 4}, {}),
    "increlora, base in shards": (INCRELORA, {}, FSDP),
    "sora, base in shards": (SORA, {"r": 4}, FSDP),
    "lisa": (LISA, {}, {}),
    "lisa, gradients as views": (LISA, {}, {"gradient_as_bucket_view": True}),
    "lisa, wrapper found later": (LISA, {}, {"bare": True}),
    "lisa, base in shards": (LISA, {}, FSDP),
    "sora, nothing closed": (SORA | {"params": {"lam": 4.0, "gate_lr": 0.05}}, {"r": 4}, {}),
}
OTHERS = ("one_sees_infinity", "one_starts_elsewhere")
FAILURES = (
    "all_in_shards",
    "unscaled_too_early",
    "joined",
    "base_in_tensor_parallel",
    "adapter_in_tensor_parallel",
    "fsdp1",
    "without_wrapper",
    "one_fails",
    *("different_policies", "different_seeds", "different_steps", "different_adapters", "different_ranks"),
    *("data_in_one", "one_is_ahead", "one_is_silent", "one_leaves", "one_never_attaches"),
)  # after the last there is nobody to talk to


def together(folder: Path) -> list[dict[str, Any]]:
    """What every case and failure comes to in each of `SIZE` processes over gloo, by its name; the traceback of what
    it raises. One start for all, since that takes longer than they do."""
    torch.multiprocessing.spawn(_child, (str(folder),), nprocs=SIZE)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(SIZE)]


def under_the_trainer(folder: Path) -> list[dict[str, Any]]:
    """A run of the Trainer in `SIZE` processes, as torchrun starts them: whole, and stopped and resumed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_trainer_child, (str(folder), port), nprocs=SIZE)
    return [torch.load(folder / f"trainer-{rank}.pt", weights_only=False) for rank in range(SIZE)]


def _trainer_child(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(SIZE), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from tests.training.test_trainer import trainer

    found: dict[str, Any] = {}
    options = {"ddp_backend": "gloo", "save_strategy": "steps", "save_steps": 8}
    for name, resume in (("whole", None), ("resumed", f"{folder}/whole/checkpoint-8")):
        callback = rankflow.RankFlowCallback(GROW_THEN_SQUEEZE)
        made = trainer(Path(folder) / name, callback, **options)
        made.train(resume_from_checkpoint=resume)
        assert isinstance(made.model_wrapped, DistributedDataParallel)
        found[name] = outcome(made.model, callback.flow)
    torch.save(found, Path(folder) / f"trainer-{rank}.pt")


def _child(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=SIZE)
    work = {name: partial(run, rank, *case, f"{folder}/{name}.jsonl") for name, case in CASES.items()}
    work |= {name: partial(globals()[name], rank) for name in (*OTHERS, *FAILURES)}
    found = {}
    for name, do in work.items():
        try:
            found[name] = do()
        except Exception:  # noqa: PERF203  # the next is to run all the same
            found[name] = traceback.format_exc()
    torch.save(found, Path(folder) / f"{rank}.pt")


def wrapped(model: Any, *, fsdp: bool = False, hook: str | None = None, **options: Any) -> Any:
    """Under DistributedDataParallel, or with the base model in shards and the adapter whole."""
    if not fsdp:
        ddp = DistributedDataParallel(model, **options)
        if hook is not None:
            ddp._register_builtin_comm_hook(getattr(dist.BuiltinCommHookType, hook))
        return ddp
    mesh = init_device_mesh("cpu", (SIZE,))
    adapter = {p for n, p in model.named_parameters() if "lora_" in n}
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh, ignored_params=adapter)
    fully_shard(model, mesh=mesh, ignored_params=adapter)
    return model


def train(model: Any, flow: Any, optimizer: Any, batches: list[Any], micro: int = 1) -> None:
    """`micro` batches a step, of a loss divided by their number; gradients are reduced after the last."""
    for at in range(0, len(batches), micro):
        *early, last = batches[at : at + micro]
        with model.no_sync() if early and isinstance(model, DistributedDataParallel) else nullcontext():
            for batch in early:
                (model(**batch).loss / micro).backward()
        (model(**last).loss / micro).backward()
        flow.before_step()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        flow.after_step()
        optimizer.zero_grad()


def outcome(model: Any, flow: Any) -> dict[str, Any]:
    return {
        "ranks": flow.layout.ranks,
        "weights": {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n},
        "events": flow.ledger.events,
        "path": flow.ledger.path is not None,
        "averages": flow.state_dict()["averages"],
    }


def alone(policy: dict[str, Any], micro: int = 1, **model: Any) -> dict[str, Any]:
    """One process that accumulates what each of several gets."""
    net = tiny_llama(dropout=0.0, **model).train()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    flow = rankflow.attach(net, optimizer, policy, total_steps=STEPS)
    train(net, flow, optimizer, token_batches(SIZE * STEPS * micro), SIZE * micro)
    flow.finish()
    return outcome(net, flow)


def run(rank: int, policy: dict[str, Any], model: dict[str, Any], options: dict[str, Any], ledger: str) -> Any:
    """A run whose batches are those of `alone`, dealt out."""
    net, micro = tiny_llama(dropout=0.0, **model).train(), options.get("micro", 1)
    ddp = wrapped(net, **{key: value for key, value in options.items() if key not in ("micro", "bare")})
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    flow = rankflow.attach(net if "bare" in options else ddp, optimizer, policy, total_steps=STEPS, ledger=ledger)
    train(ddp, flow, optimizer, token_batches(SIZE * STEPS * micro)[rank::SIZE], micro)
    flow.finish()
    if "hook" in options:
        assert options["hook"] in ddp._get_ddp_logging_data()["comm_hook"]
    return outcome(net, flow)


def base_in_shards() -> tuple[Any, Any, Any]:
    net = wrapped(tiny_llama(dropout=0.0).train(), fsdp=True)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    return net, optimizer, rankflow.attach(net, optimizer, INCRELORA, total_steps=STEPS)


def one_sees_infinity(rank: int) -> Any:
    """Losses that overflow in one process, under a loss scaler, the base in shards: all skip the step."""
    net, optimizer, flow = base_in_shards()
    start = next(p for n, p in net.named_parameters() if "lora_" in n)
    scaler, moved = torch.amp.GradScaler("cpu", init_scale=4.0), []
    for at, batch in enumerate(token_batches(SIZE * STEPS)[rank::SIZE]):
        before = start.detach().clone()
        loss = net(**batch).loss
        scaler.scale(loss * (torch.inf if at == 2 and rank == 1 else 1)).backward()
        flow.before_step(scaler)
        scaler.step(optimizer)
        scaler.update()
        flow.after_step()
        optimizer.zero_grad()
        start = next(p for n, p in net.named_parameters() if "lora_" in n)
        moved.append(start.shape != before.shape or not torch.equal(start, before))
    assert all(p.isfinite().all() for n, p in net.named_parameters() if "lora_" in n)
    return {"moved": moved, "scale": scaler.get_scale(), **outcome(net, flow)}


def unscaled_too_early(rank: int) -> Any:
    net, optimizer, flow = base_in_shards()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(net(**token_batches(1)[0]).loss).backward()
    scaler.unscale_(optimizer)
    flow.before_step(scaler)


def joined(rank: int) -> Any:
    """torch's way to let one process have fewer batches."""
    ddp = wrapped(tiny_llama(dropout=0.0).train())
    optimizer = torch.optim.AdamW([p for p in ddp.parameters() if p.requires_grad], lr=1e-2)
    flow = rankflow.attach(ddp, optimizer, INCRELORA, total_steps=STEPS)
    with Join([ddp]):
        train(ddp, flow, optimizer, token_batches(STEPS - rank))


def base_in_tensor_parallel(rank: int) -> Any:
    tensor_parallel("model.layers.0.mlp.up_proj.base_layer")


def adapter_in_tensor_parallel(rank: int) -> Any:
    tensor_parallel("model.layers.0.self_attn.q_proj.lora_A.default")


def tensor_parallel(module: str) -> None:
    net = tiny_llama(dropout=0.0).train()
    parallelize_module(net.base_model.model, init_device_mesh("cpu", (SIZE,)), {module: ColwiseParallel()})
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    rankflow.attach(net, optimizer, INCRELORA, total_steps=STEPS)


def fsdp1(rank: int) -> Any:
    net = FullyShardedDataParallel(tiny_llama(dropout=0.0).train(), use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    rankflow.attach(net, optimizer, INCRELORA, total_steps=STEPS)


def one_starts_elsewhere(rank: int) -> Any:
    """Adapters that were initialised apart become that of process 0; what does not train stays."""
    net = tiny_llama(dropout=0.0).train()
    with torch.no_grad():
        for n, p in net.named_parameters():
            p.add_(rank if ".default" in n else 0)
    net = wrapped(net, fsdp=True)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    return outcome(net, rankflow.attach(net, optimizer, INCRELORA, total_steps=STEPS))


def all_in_shards(rank: int) -> Any:
    """FSDP2 that was not told to leave the adapter out."""
    net = tiny_llama(dropout=0.0).train()
    fully_shard(net, mesh=init_device_mesh("cpu", (SIZE,)))
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    rankflow.attach(net, optimizer, INCRELORA, total_steps=STEPS)


def without_wrapper(rank: int) -> Any:
    """Nobody reduces gradients: the first decision finds out."""
    net = tiny_llama(dropout=0.0).train()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    flow = rankflow.attach(net, optimizer, INCRELORA, total_steps=STEPS)
    train(net, flow, optimizer, token_batches(SIZE * STEPS)[rank::SIZE])


def one_fails(rank: int) -> Any:
    """An error that one process alone meets while it resizes."""
    net = tiny_llama(dropout=0.0).train()
    ddp = wrapped(net)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    flow = rankflow.attach(ddp, optimizer, INCRELORA, total_steps=STEPS)
    before = copy.deepcopy({n: p.detach() for n, p in net.named_parameters()})
    if rank == 1:

        def full(*args: Any) -> Any:
            raise MemoryError("no room for the new factors")

        flow._surgeon.apply = full
    try:
        train(ddp, flow, optimizer, token_batches(SIZE * STEPS)[rank::SIZE])
    finally:
        assert before.keys() == dict(net.named_parameters()).keys()


def attached(**options: Any) -> tuple[Any, Any, Any]:
    """The wrapped model, the optimizer and the flow of a process whose `options` may not be those of the other."""
    net = tiny_llama(dropout=0.0, r=options.pop("r", 2)).train()
    ddp = wrapped(net)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    policy = options.pop("policy", INCRELORA)
    return ddp, optimizer, rankflow.attach(ddp, optimizer, policy, **{"total_steps": STEPS, **options})


def different_policies(rank: int) -> Any:
    attached(policy=INCRELORA | {"when": {"start": 3, "every": 3 + rank}})


def different_seeds(rank: int) -> Any:
    attached(seed=rank)


def different_steps(rank: int) -> Any:
    attached(total_steps=STEPS + rank)


def different_adapters(rank: int) -> Any:
    net = tiny_llama(dropout=0.0).train()
    net.set_adapter(name := ("default", "other")[rank])
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    rankflow.attach(net, optimizer, INCRELORA, total_steps=STEPS, adapter_name=name)


def different_ranks(rank: int) -> Any:
    net = tiny_llama(dropout=0.0).train()
    rankflow.resize(net, {"*up_proj": 2 + rank})
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    rankflow.attach(net, optimizer, INCRELORA, total_steps=STEPS)


def data_in_one(rank: int) -> Any:
    attached(batches=token_batches(2) if rank else None)


def one_is_ahead(rank: int) -> Any:
    """The run ends in one process while the other decides."""
    ddp, optimizer, flow = attached()
    train(ddp, flow, optimizer, token_batches(SIZE * 2)[rank::SIZE])
    ddp(**token_batches(1)[0]).loss.backward()
    flow.finish() if rank else flow.before_step()


def one_is_silent(rank: int) -> Any:
    *_, flow = attached(timeout=1)
    if rank == 0:
        began = time.monotonic()
        try:
            flow.finish()
        finally:
            assert time.monotonic() - began < 4
    time.sleep(3)


def one_never_attaches(rank: int) -> Any:
    if rank == 0:
        net = tiny_llama(dropout=0.0).train()
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
        rankflow.attach(net, optimizer, INCRELORA, total_steps=STEPS, timeout=1)


def one_leaves(rank: int) -> Any:
    """A process that ends before the others decide."""
    net = tiny_llama(dropout=0.0).train()
    ddp = wrapped(net)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    flow = rankflow.attach(ddp, optimizer, SQUEEZE | {"params": {}}, total_steps=STEPS)
    batches = token_batches(SIZE * STEPS)[rank::SIZE]
    train(ddp, flow, optimizer, batches[:5])
    if rank == 1:
        return "left"
    flow._phases._decide(rankflow.policies.observation.Observation(5))
    return "decided alone"

"""Factors that FSDP2 keeps in shards, made whole for a block of code and sharded again after it.

Inside, everything that looks at an adapter or writes to it works as in a single process, on plain tensors, the same in
all processes. The shards stay as they were until the block ends, so what fails inside costs them nothing. At its end
they take over what was written, in place where shapes are the same. A factor of another shape gets an `FSDPParam` of
its own, made as `fully_shard` makes it, in the place of the old one. No other process is needed for that.

FSDP2 has no way of its own to replace a parameter; what is used of its insides is checked before anything is done.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from rankflow.errors import ConfigError
from rankflow.lora.adapter import Adapter
from rankflow.lora.dtensor import REMEDY, part, rows, spread, whole
from rankflow.lora.transaction import Transaction

Role = tuple[str, str]  # a module's name, and what the parameter is to it
_MADE_FROM = (
    "self",
    "param",
    "module_info",
    "mesh_info",
    "post_forward_mesh_info",
    "device",
    "shard_placement_fn",
    "mp_policy",
    "offload_policy",
)


def at_rest(model: nn.Module) -> None:
    """Shard the parameters again that a forward without a backward has left whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@dataclass
class _Piece:
    """One parameter of the adapter, in shards and whole."""

    group: Any  # FSDPParamGroup
    managed: Any  # FSDPParam
    sharded: nn.Parameter
    state: dict[str, Any]  # of the optimizer, in shards
    whole: nn.Parameter


class Shards:
    """The shards of one adapter.

    Raises:
        ConfigError: shards of a kind that this cannot put together again, or a torch whose FSDP2 works otherwise.
    """

    def __init__(self, model: nn.Module, adapter: Adapter):
        self._model = model
        self._adapter = adapter
        self._open = False
        self._check()

    @contextmanager
    def gathered(
        self, optimizer: Optimizer | None, transaction: Transaction, attempt: Callable[[Callable[[], None]], object]
    ) -> Iterator[None]:
        """Factors, their gradients and their state in `optimizer` are whole in the block; all processes have to enter
        it. Without `optimizer`, gradients alone may be written to.

        `attempt` is handed the writing of the shards at its end. With `transaction` all of it is undone, and it has to
        be where the block raises.
        """
        if self._open:
            yield
            return
        at_rest(self._model)
        pieces = self._gather(optimizer)
        self._open = True
        try:
            for piece in pieces.values():
                _hold(transaction, piece.managed._module_info, piece.whole)
            if optimizer is None:
                yield
                for piece in pieces.values():
                    _hold(transaction, piece.managed._module_info, piece.sharded)
                    _give_gradient(transaction, piece)
                return
            state = {p.whole: {key: whole(v) for key, v in p.state.items()} for p in pieces.values() if p.state}
            _exchange(transaction, optimizer, {id(p.sharded): p.whole for p in pieces.values()}, state)
            yield
            attempt(lambda: self._spread(transaction, optimizer, pieces))
        finally:
            self._open = False

    def _gather(self, optimizer: Optimizer | None) -> dict[Role, _Piece]:
        managed = self._managed()
        pieces: dict[Role, _Piece] = {}
        for role, p in self._parameters().items():
            group, of = managed[id(p)]
            full = nn.Parameter(whole(p), p.requires_grad)
            full.grad = None if p.grad is None else whole(p.grad)
            state = {} if optimizer is None else dict(optimizer.state.get(p, {}))
            pieces[role] = _Piece(group, of, p, state, full)
        return pieces

    # -- back into shards -------------------------------------------------------------------------------------------

    def _spread(self, transaction: Transaction, optimizer: Optimizer, pieces: Mapping[Role, _Piece]) -> None:
        now = self._parameters()
        to: dict[int, nn.Parameter] = {}
        state: dict[nn.Parameter, dict[str, Any]] = {}
        groups = {id(group): group for group in self._groups()}
        members = {key: list(group.fsdp_params) for key, group in groups.items()}
        for role, piece in pieces.items():
            if now.get(role) is piece.whole:
                self._refill(transaction, piece)
                to[id(piece.whole)] = piece.sharded
            else:
                _forget(transaction, piece.managed)
                if role not in now:
                    members[id(piece.group)].remove(piece.managed)
        for role, p in now.items():
            if id(p) in to:
                continue
            old = pieces.get(role)
            group = self._home(role) if old is None else old.group
            new = self._made(transaction, group, role, p)
            to[id(p)] = new.sharded_param
            among = members[id(group)]
            if old is None:
                among.append(new)
            else:
                new._param_fqn = old.managed._param_fqn
                among[among.index(old.managed)] = new
        by_whole = {id(piece.whole): piece for piece in pieces.values()}
        for p in now.values():
            if entries := optimizer.state.get(p):
                had = by_whole[id(p)].state if id(p) in by_whole else {}
                state[to[id(p)]] = {key: _put(transaction, had.get(key), v, to[id(p)]) for key, v in entries.items()}
        _exchange(transaction, optimizer, to, state)
        for key, group in groups.items():
            self._regroup(transaction, group, members[key])

    def _refill(self, transaction: Transaction, piece: _Piece) -> None:
        """Write what was changed in the whole factors into the shards that there are."""
        sharded, full = piece.sharded, piece.whole
        _hold(transaction, piece.managed._module_info, sharded)
        _put(transaction, sharded, full.detach(), sharded)
        if sharded.requires_grad != full.requires_grad:
            transaction.attr(sharded, "requires_grad", full.requires_grad)
        _give_gradient(transaction, piece)

    def _made(self, transaction: Transaction, group: Any, role: Role, p: nn.Parameter) -> Any:
        """FSDP2's record of a parameter, made for a new one."""
        from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, ParamModuleInfo

        module, name = self._holder(role, p)
        transaction.contents(module._parameters, module._parameters)
        policies = (group.mp_policy, group.offload_policy)
        info = ParamModuleInfo(module, name)
        new = FSDPParam(p, info, group.mesh_info, group.post_forward_mesh_info, group.device, None, *policies)
        transaction.undo(lambda: new._post_load_hook_handle.remove())
        new.init_dtype_attrs(group.mp_policy)
        return new

    def _regroup(self, transaction: Transaction, group: Any, members: list[Any]) -> None:
        moved = {of._module_info.module for of in members} != {of._module_info.module for of in group.fsdp_params}
        started = hasattr(group, "_orig_dtype")  # before the first forward it is yet to do all of this

        def follow() -> None:
            if started:
                group._init_mp_dtypes()
            if started and moved:
                hooks = (
                    group._module_to_pre_save_state_dict_hook_handle,
                    group._module_to_pre_load_state_dict_hook_handle,
                )
                for held in hooks:
                    for handle in held.values():
                        handle.remove()
                    held.clear()
                group._register_state_dict_hooks()

        transaction.undo(follow)
        transaction.contents(group.fsdp_params, members)
        follow()

    # -- finding ----------------------------------------------------------------------------------------------------

    def _parameters(self) -> dict[Role, nn.Parameter]:
        return {(n, role): p for n, site in self._adapter.sites.items() for role, p in site.tensors().items()}

    def _groups(self) -> list[Any]:
        states: Any = (m._get_fsdp_state() for m in self._model.modules() if isinstance(m, FSDPModule))
        return list({id(g): g for state in states for g in _groups_of(state)}.values())

    def _managed(self) -> dict[int, tuple[Any, Any]]:
        return {id(of.sharded_param): (group, of) for group in self._groups() for of in group.fsdp_params}

    def _holder(self, role: Role, p: nn.Parameter) -> tuple[nn.Module, str]:
        layer: Any = self._adapter.sites[role[0]].layer
        for module in layer.modules():
            for name, held in module._parameters.items():
                if held is p:
                    return module, name
        raise AssertionError(role)

    def _home(self, role: Role) -> Any:
        """The group that a parameter which comes back belongs to: that of the innermost module around it."""
        layer, home = self._adapter.sites[role[0]].layer, None
        for module in self._model.modules():  # from the outside to the inside
            if isinstance(module, FSDPModule) and any(inner is layer for inner in module.modules()):
                home = next(iter(_groups_of(module._get_fsdp_state())), home)
        if home is None:
            raise ConfigError(f"{role[0]}: no module around it is sharded, and its factors would have no place")
        return home

    # -- refusing ---------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        try:
            from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
        except ImportError:
            FSDPParam = None
        if FSDPParam is None or tuple(inspect.signature(FSDPParam.__init__).parameters) != _MADE_FROM:
            raise ConfigError(f"torch {torch.__version__} keeps shards in a way rankflow does not know; {REMEDY}")
        at_rest(self._model)
        managed = self._managed()
        mine: dict[int, int] = {}
        for (name, role), p in self._parameters().items():
            if (reason := self._problem(p, managed)) is not None:
                raise ConfigError(f"{name}: its {role} {reason}; {REMEDY}")
            group = managed[id(p)][0]
            mine[id(group)] = mine.get(id(group), 0) + 1
        for name, site in self._adapter.sites.items():
            if site.kind not in ("linear", "embedding"):
                raise ConfigError(f"{name}: factors of {site.kind} layers cannot be in shards; {REMEDY}")
            if site.has_factors and managed[id(site.A)][0] is not managed[id(site.B)][0]:
                raise ConfigError(f"{name}: its factors are sharded apart; call fully_shard on the layer around it")
        for group in self._groups():
            if len(group.fsdp_params) == mine.get(id(group)):
                raise ConfigError("fully_shard was called on LoRA factors alone; call it on the layers they are in")

    def _problem(self, p: nn.Parameter, managed: Mapping[int, tuple[Any, Any]]) -> str | None:
        if not isinstance(p, DTensor):
            return "is not in shards, and other factors are"
        if id(p) not in managed:
            return "is in shards, but not by a fully_shard of this model or a module in it"
        group, of = managed[id(p)]
        if p.placements != (Shard(0),) or p.device_mesh.size() != dist.get_world_size() or of.is_dtensor:
            return f"is spread as {p.placements} over {p.device_mesh}, not by rows over all processes"
        if isinstance(group.offload_policy, CPUOffloadPolicy):
            return "is offloaded to the CPU"
        if of._module_info.shared_modules:
            return "belongs to more modules than one"
        return None


def _put(transaction: Transaction, held: Any, value: Any, like: Any) -> Any:
    """Return `value` in shards as `like` is, written into those that are `held` if any. Values of another shape
    stay."""
    if not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    if not isinstance(held, DTensor) or held.shape != value.shape:
        return spread(value, like)
    mine = rows(held)
    transaction.tensor(part(held), value[mine.start : mine.stop])
    return held


def _give_gradient(transaction: Transaction, piece: _Piece) -> None:
    sharded, grad = piece.sharded, piece.whole.grad
    if grad is not None or sharded.grad is not None:
        transaction.attr(sharded, "grad", None if grad is None else _put(transaction, sharded.grad, grad, sharded))


def _hold(transaction: Transaction, info: Any, p: nn.Parameter) -> None:
    transaction.contents(info.module._parameters, {**info.module._parameters, info.param_name: p})


def _forget(transaction: Transaction, managed: Any) -> None:
    """Take off FSDP2's hook that follows when weights are loaded into a module whose parameter is another now."""

    def again() -> None:
        register = managed._module_info.module.register_load_state_dict_post_hook
        managed._post_load_hook_handle = register(lambda *args, **kwargs: managed.reset_sharded_param())

    transaction.write(managed._post_load_hook_handle.remove, again)


def _exchange(
    transaction: Transaction,
    optimizer: Optimizer,
    to: Mapping[int, nn.Parameter],
    state: Mapping[nn.Parameter, dict[str, Any]],
) -> None:
    """Put other parameters with this state into the optimizer, in the places of these."""
    for group in optimizer.param_groups:
        transaction.contents(group["params"], [to.get(id(p), p) for p in group["params"]])
    kept = {p: entries for p, entries in optimizer.state.items() if id(p) not in to}
    transaction.contents(optimizer.state, {**kept, **state})  # type: ignore[arg-type, dict-item]


def _groups_of(state: Any) -> list[Any]:
    """The parameter groups of one `fully_shard`; older versions have one at most."""
    if hasattr(state, "_fsdp_param_groups"):
        return state._fsdp_param_groups
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []

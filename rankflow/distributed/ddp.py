"""Wrappers that train a model in several processes: which ones rankflow works under, and a new reducer for
DistributedDataParallel when parameters were replaced."""

from __future__ import annotations

from typing import Any

from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from rankflow.errors import ConfigError


def refuse(model: nn.Module) -> None:
    """Refuse a model that is laid out over processes in a way in which no adapter can be managed.

    Raises:
        ConfigError: `model` is laid out over processes in a way in which no adapter can be managed.
    """
    if not isinstance(model, nn.Module):  # a PipelineStage, say
        raise ConfigError(
            f"{type(model).__name__} is not a module with an adapter; hand over the model. One that is cut into stages "
            "of a pipeline cannot be managed: train with DDP or FSDP2"
        )
    names = {type(m).__name__ for m in model.modules()}
    for name in ("DeepSpeedEngine", "FullyShardedDataParallel"):
        if name in names:
            raise ConfigError(f"{name} keeps parameters of its own and would undo a resize; train with DDP or FSDP2")
    if not sharded(model) and any(isinstance(p, DTensor) for p in model.parameters()):
        raise ConfigError(
            "the model is spread by tensor parallelism, in which a module's inputs and outputs are in parts; train "
            "with DDP or FSDP2"
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, for passes that are not to reduce gradients."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def sharded(model: nn.Module) -> bool:
    """Return whether FSDP2 has spread some of the model's parameters over processes."""
    return any(isinstance(m, FSDPModule) for m in model.modules())


def rebuild(ddp: DistributedDataParallel) -> None:
    """Give the wrapper a reducer for the parameters that its module has now, with the options it was made with.

    Communication hooks stay, built-in ones too; what PowerSGD remembers is of buckets that are no more, and goes.

    Differs: the constructor would do it too, and forget communication hooks and the options it is not given.
    """
    builtin = _builtin_hook(ddp)
    kept = [p for n, p in ddp.module.named_parameters() if n not in ddp.parameters_to_ignore]
    ddp._module_parameters = kept  # else the wrapper would hold the old ones
    parameters, sparse = ddp._build_params_for_reducer()
    names = ddp._build_debug_param_to_name_mapping(parameters)
    ddp._ddp_init_helper(parameters, sparse, names, ddp.static_graph)
    if builtin is not None:
        ddp._register_builtin_comm_hook(builtin)
    for hook, state in ddp._comm_hooks:
        for memory in ("error_dict", "p_memory_dict", "q_memory_dict"):
            getattr(state, memory, {}).clear()
        dist._register_comm_hook(ddp.reducer, state, hook)  # pyright: ignore[reportPrivateImportUsage]


def _builtin_hook(ddp: DistributedDataParallel) -> Any:
    """The built-in communication hook of the wrapper, which only its log remembers, by name."""
    name = "" if ddp._comm_hooks else ddp._get_ddp_logging_data().get("comm_hook", "")
    known = dist.BuiltinCommHookType.__members__.values()  # pyright: ignore[reportPrivateImportUsage]
    return next((kind for kind in known if str(kind) == name), None)

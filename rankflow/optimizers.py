"""Which handler knows an optimizer's state, and which optimizers no resize can be carried through."""

from __future__ import annotations

from torch.optim import Optimizer

from rankflow.blockwise import blockwise_handler
from rankflow.errors import OptimizerError
from rankflow.handlers import (
    AdafactorHandler,
    Handler,
    MuonHandler,
    RMSpropHandler,
    RpropHandler,
    TransformersAdafactorHandler,
)

_ADAM = Handler("exp_avg", "exp_avg_sq", "max_exp_avg_sq", betas=True)
_SCHEDULE_FREE = Handler(second="exp_avg_sq", points=("z",))  # the parameter is an average of z
_HANDLERS: dict[tuple[str, str], Handler] = {  # by package and class; "" is any package
    ("torch.optim", "Adam"): _ADAM,
    ("torch.optim", "AdamW"): _ADAM,
    ("torch.optim", "NAdam"): _ADAM,
    ("torch.optim", "RAdam"): _ADAM,
    ("torch.optim", "RMSprop"): RMSpropHandler(),
    ("torch.optim", "Adamax"): Handler("exp_avg", "exp_inf", betas=True, roots=frozenset({"exp_inf"})),
    ("torch.optim", "Adadelta"): Handler(second="square_avg", strides=("acc_delta",)),
    ("torch.optim", "Adagrad"): Handler(second="sum", eager=True),
    ("torch.optim", "ASGD"): Handler(points=("ax",)),  # the average of what the parameter was
    ("torch.optim", "Rprop"): RpropHandler("prev", strides=("step_size",), roots=frozenset({"step_size"})),
    ("torch.optim", "SGD"): Handler("momentum_buffer"),
    ("torch.optim", "Muon"): MuonHandler("momentum_buffer", shape_dependent=True, elementwise=False),
    ("torch.optim", "Adafactor"): AdafactorHandler(elementwise=False),
    ("transformers", "Adafactor"): TransformersAdafactorHandler(elementwise=False),
    ("schedulefree", "AdamWScheduleFree"): _SCHEDULE_FREE,
    ("schedulefree", "RAdamScheduleFree"): _SCHEDULE_FREE,
    ("schedulefree", "SGDScheduleFree"): Handler(points=("z",)),
    ("", "Lion"): Handler("exp_avg"),  # every package has its own, all with the one average
}

# PEFT's optimizers that hold parameters, or state by name, outside of groups and state
_REFUSED = {
    "LoraFAOptimizer": "LoRA-FA keeps A frozen, its state by name and one scaling per pair",
    "RiemannianPreconditionedOptimizer": "it holds the (A, B) pairs themselves, which a resize replaces",
}


def find_handler(optimizer: Optimizer) -> Handler | None:
    """The handler of the optimizer's class or of its nearest known ancestor.

    Raises:
        OptimizerError: an optimizer that a resize would break.
    """
    for cls in type(optimizer).__mro__:
        if cls.__module__.startswith("bitsandbytes."):
            return blockwise_handler(optimizer)
        name = cls.__qualname__.rpartition(".")[2]
        if name in _REFUSED and cls.__module__.startswith("peft."):
            raise OptimizerError(f"{name} cannot follow a resize: {_REFUSED[name]}. Use torch.optim.AdamW")
        for (package, known), handler in _HANDLERS.items():
            if name == known and cls.__module__.startswith(package):
                return handler
    return None

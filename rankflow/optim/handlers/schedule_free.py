"""Schedule-free optimizers (arXiv 2405.15682): the parameter is an average of the iterates z."""

from __future__ import annotations

from rankflow.optim.handler import Handler

_ADAM = Handler(second="exp_avg_sq", points=("z",))

HANDLERS = {
    "schedulefree.AdamWScheduleFree": _ADAM,
    "schedulefree.RAdamScheduleFree": _ADAM,
    "schedulefree.SGDScheduleFree": Handler(points=("z",)),
}

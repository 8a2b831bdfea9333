"""Schedule-free optimizers (arXiv 2405.15682): the parameter is an average of the iterates z."""

from __future__ import annotations

from rankflow.optim.handler import Handler, State


class ScheduleFreeHandler(Handler):
    """A schedule-free optimizer's. The parameter is drawn towards an average as well as moved, so its whole change is
    no step that could be held, and the step is left free."""

    def rank_exponent(self, group: State) -> float:
        return 0.0


_ADAM = ScheduleFreeHandler(second="exp_avg_sq", points=("z",))

HANDLERS = {
    "schedulefree.AdamWScheduleFree": _ADAM,
    "schedulefree.RAdamScheduleFree": _ADAM,
    "schedulefree.SGDScheduleFree": ScheduleFreeHandler(points=("z",)),
}

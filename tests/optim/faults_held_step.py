"""Faults that `test_held_step.py` must notice."""

from __future__ import annotations

from fault import Fault

FAULTS = [
    Fault(
        "a cap makes steps longer as well",
        "optim/warmup.py",
        "max(1.0, times) if self._capped else times",
        "times",
        "tests/optim/test_held_step.py",
    ),
    Fault(
        "the step is held the wrong way round",
        "optim/warmup.py",
        "held / self.too_long ** handler",
        "held * self.too_long ** handler",
        "tests/optim/test_held_step.py",
    ),
    Fault(
        "a resumed run forgets what its rate is for",
        "optim/warmup.py",
        'state.get("rate_rank"), bool(state.get("capped"))',
        'None, bool(state.get("capped"))',
        "tests/optim/test_held_step.py",
    ),
    Fault(
        "the mean rank is not looked at again after a resize",
        "optim/warmup.py",
        'transaction.attr(self, "_mean_rank", self._mean())',
        "pass",
        "tests/optim/test_held_step.py",
    ),
]

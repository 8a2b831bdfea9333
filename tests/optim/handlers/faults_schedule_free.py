"""What `test_schedule_free.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "schedule-free: map the iterate as gradients are",
        "optim/moments.py",
        "_carry(z, f64(M).mT, f64(N).mT, factor)",
        "_carry(z, N, M, factor)",
    ),
    Fault(
        "schedule-free: start the iterate of a new direction at zero",
        "optim/moments.py",
        "lambda t: append(t, new),",
        "lambda t: append(t, 0.0),",
    ),
    Fault(
        "schedule-free: fold a gate without the iterate",
        "optim/moments.py",
        "lambda t: multiply(t, 1),\n            lambda t: multiply(t, 2)",
        "lambda t: t,\n            lambda t: multiply(t, 2)",
    ),
    Fault(
        "schedule-free: let the iterate of young directions run ahead",
        "optim/warmup.py",
        "moved += [(state[key], old) for key, old in note.points.items()]",
        "pass",
    ),
    Fault(
        "schedule-free: take a resize to be before the first step for good",
        "optim/warmup.py",
        "return {key: state.get(key, p) for key in self._optimizer_state.handler.points}",
        "return {key: p for key in self._optimizer_state.handler.points}",
    ),
]

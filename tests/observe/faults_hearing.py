"""What `test_hearing.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "count a step without a gradient for nothing, not for one of zero",
        "training/controller.py",
        "return self._hearing.with_silence(heard)",
        "return heard",
    ),
    Fault(
        "take whatever trains for reached",
        "observe/hearing.py",
        "frozenset(training - self.reached) if self.reached else frozenset()",
        "frozenset()",
    ),
    Fault(
        "let what is frozen go with what is not reached",
        "policies/_sensitivity.py",
        "0.0 if slot.trainable else top",
        "0.0",
    ),
    Fault(
        "let a policy take out the last module that trains",
        "training/phases.py",
        "lambda: self._sparing(ask())",
        "ask",
    ),
]

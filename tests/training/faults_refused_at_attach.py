"""What `test_refused_at_attach.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "learn what an optimizer keeps at the first decision",
        "training/checks.py",
        "            optimizer_state.check_carried()\n",
        "            pass\n",
        "-k attach",
    ),
    Fault(
        "believe every subclass of a known optimizer",
        "optim/introspection.py",
        "return not found.anybodys and all(same)",
        "return True",
        "-k follow",
    ),
    Fault(
        "let an optimizer keep what it likes in attributes",
        "optim/introspection.py",
        "    if elsewhere:\n",
        "    if False:\n",
        "-k follow",
    ),
    Fault(
        "try an optimizer with what the original keeps",
        "optim/introspection.py",
        "        return value.detach().clone()",
        "        return value",
        "-k moves",
    ),
    Fault(
        "try an optimizer for one step",
        "optim/introspection.py",
        "_STEPS = 12",
        "_STEPS = 1",
        "-k follow",
    ),
    Fault(
        "try an optimizer through a scheduler's step",
        "optim/introspection.py",
        "type(optimizer).step(copied)",
        'vars(optimizer).get("step", lambda: type(optimizer).step(copied))()',
        "-k moves",
    ),
    Fault(
        "count a step within a step",
        "training/controller.py",
        "        if self._steps_open <= 0:\n",
        "        if True:\n",
        "-k follow",
    ),
    Fault(
        "manage an adapter that is not active",
        "lora/adapter.py",
        "if present and self.name not in active:",
        "if False:",
        "-k nobody",
    ),
    Fault(
        "take a dataset of examples for batches",
        "observe/study.py",
        "if isinstance(batches, Dataset) or",
        "if",
        "-k batches",
    ),
    Fault(
        "lose the batch that was looked at",
        "observe/study.py",
        "return itertools.chain(first, batches)",
        "return batches",
        "-k batches",
    ),
]

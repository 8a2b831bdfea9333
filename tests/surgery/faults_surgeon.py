"""What `test_surgeon.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "let live cuts move factors to the sorted basis",
        "plans/shrink.py",
        'gauge: Gauge = "nearest"',
        'gauge: Gauge = "keep"',
    ),
    Fault(
        "leave stale optimizer state",
        "optim/optimizer_state.py",
        "new_state[new] = state.pop(id(new))",
        "new_state[new] = entries",
        "tests/training/test_controller.py",
    ),
    Fault(
        "grow with columns of B that are not zero",
        "surgery/staging.py",
        "b.new_zeros(*b.shape[:-1], op.n)",
        "b.new_full((*b.shape[:-1], op.n), 1e-6)",
    ),
    Fault(
        "do not roll back",
        "lora/transaction.py",
        "            if kind is not None:\n                self.rollback()",
        "            pass",
        "tests/lora/test_adapter.py",
    ),
    Fault(
        "draw the same new directions at every step",
        "surgery/surgeon.py",
        "keyed_generator(self.seed, step, target[name].shared or name)",
        "keyed_generator(self.seed, 0, target[name].shared or name)",
        "tests/training/test_controller.py",
    ),
    Fault(
        "train what its owner had frozen",
        "lora/site_edits.py",
        "flags = {role: on if role in roles else was for role, was in _flags(site).items()}",
        "flags = dict.fromkeys(_flags(site), on)",
        "tests/policies/methods/test_lisa.py",
    ),
    Fault(
        "keep the gradients of what is frozen",
        "lora/site_edits.py",
        '            transaction.attr(p, "grad", None)\n\n\ndef build',
        "            pass\n\n\ndef build",
    ),
]

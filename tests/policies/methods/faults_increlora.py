"""What `test_increlora.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "count reserves in the budget",
        "policies/methods/increlora.py",
        "if budget.spent(bare) >= budget.amount:",
        "if budget.spent(layout) >= budget.amount:",
    ),
    Fault(
        "open reserves all the way",
        "policies/methods/increlora.py",
        "range(rank + kept, rank + reserve)), self.reserve_gate)",
        "range(rank + kept, rank + reserve)))",
    ),
    Fault(
        "grow beside a reserve instead of opening it",
        "policies/methods/increlora.py",
        "opened = min(held, rank - slot.rank)",
        "opened = 0",
    ),
    Fault(
        "do not ask a policy that leaves",
        "training/phases.py",
        "self._change(lambda: self.policy.leave(self.state, self.layout))",
        "pass",
    ),
]

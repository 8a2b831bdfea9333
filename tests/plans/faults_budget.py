"""What `test_budget.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "pass the budget at the last growth",
        "plans/allocate.py",
        "new = _next_rank(moving[i], ranks[i], want, left // costs[i])",
        "new = _next_rank(moving[i], ranks[i], want, want)",
        "tests/policies/methods/test_increlora.py",
    ),
]

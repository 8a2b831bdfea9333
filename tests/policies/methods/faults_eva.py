"""What `test_eva.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "find first directions beside the old rows",
        "policies/_initial.py",
        'grown = [*ops_to(0, slot.rank, first(())), Grow(rank, "grad", sketch)]',
        'grown = [Grow(rank, "grad", sketch), Keep(tuple(range(slot.rank, slot.rank + rank)))]',
    ),
    Fault(
        "let one module have all the rank",
        "policies/methods/eva.py",
        "max(rank, round(self.rho * mean), 1)",
        "layout[name].max_rank",
    ),
]

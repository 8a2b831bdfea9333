"""What `test_allocate.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "let a direction that is too dear stand for the closest",
        "plans/allocate.py",
        "if j != i and dear <= price + spare)",
        "if j != i)",
    ),
    Fault(
        "take a module's own next direction for its rival",
        "plans/allocate.py",
        "for other, dear, j in left if j != i and dear",
        "for other, dear, j in left if dear",
    ),
    Fault(
        "measure the margin of growth against modules that could not grow",
        "plans/allocate.py",
        "elif unit.rank < unit.span[1]:",
        "else:",
    ),
]

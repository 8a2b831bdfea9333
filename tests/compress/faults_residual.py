"""What `test_residual.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "keep the wrong end of what was cut off",
        "compress/cutting.py",
        "_rounded(b[..., rank:], dtype, name))",
        "_rounded(b[..., : slot.rank - rank], dtype, name))",
    ),
    Fault(
        "add two adapters instead of subtracting",
        "analysis/difference.py",
        "else -1.0 for pair in present",
        "else 1.0 for pair in present",
    ),
    Fault(
        "bad files: believe a residual about any size",
        "compress/residual.py",
        "or math.prod(shape) > _LARGEST",
        "or False",
        "::test_a_residual_that_claims_more_than_there_can_be_is_none",
    ),
]

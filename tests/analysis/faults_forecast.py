"""What `test_forecast.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "foretell averages without the sums they come from",
        "analysis/forecast.py",
        "heard = [(sources(signals), q) for",
        "heard = [(signals, q) for",
    ),
    Fault(
        "foretell one module's statistics for all",
        "analysis/forecast.py",
        "for numbers, q in wanted for slot in layout.values() if slot.rank)",
        "for numbers, q in wanted for slot in list(layout.values())[:1] if slot.rank)",
    ),
]

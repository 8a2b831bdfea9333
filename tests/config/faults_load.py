"""What `test_load.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "stop at a policy that there is not",
        "config/load.py",
        "    errors |= _beside_unknown_policies(model, data, several)\n",
        "",
    ),
]

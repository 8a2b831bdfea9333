"""What `test_attachments.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "keep a dropped run alive by its hooks",
        "training/controller.py",
        "        if (bound := weakly()) is not None:\n            bound()",
        "        method()",
    ),
    Fault(
        "leave the noise of a run that is gone",
        "training/attachments.py",
        "        self._surgeon.gates.fall_silent()\n",
        "",
    ),
    Fault(
        "take the run of somebody off without asking",
        "training/attachments.py",
        "    if (run := there.run()) is not None:\n        raise",
        "    if (run := None) is not None:\n        raise",
    ),
]

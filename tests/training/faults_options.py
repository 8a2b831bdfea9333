"""What `test_options.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "take any word for an option",
        "training/options.py",
        "if (given := getattr(self, name)) not in words:",
        "if (given := getattr(self, name)) is None:",
    ),
    Fault(
        "look at no data before it is needed",
        "training/options.py",
        "                check_batches(data, name, self.loss_fn)",
        "                pass",
    ),
]

"""What `test_ema.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "let new directions of an average start as others than the model's",
        "surgery/surgeon.py",
        "added=None if added is None else iter(added[name])",
        "added=None",
        "-k algebra",
    ),
    Fault(
        "average factors under a gate without it",
        "surgery/ema.py",
        "return as_used(self._model)",
        "return self._model.parameters()",
        "-k gate",
    ),
]

"""What `test_bitsandbytes.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "8-bit: round second moments to nothing",
        "optim/handlers/bitsandbytes.py",
        "_raise(new, key, least)",
        "pass",
        "-k larger",
    ),
    Fault(
        "8-bit: raise second moments that were small before",
        "optim/handlers/bitsandbytes.py",
        "torch.where(before <= v, after, torch.minimum(after, v))",
        "after",
        "-k before",
    ),
    Fault(
        "8-bit: codes for small parameters too",
        "optim/handlers/bitsandbytes.py",
        "if all(t.numel() < self.smallest for t in exact.values()):",
        "if self.smallest == float('inf'):",
        "-k form",
    ),
    Fault(
        "8-bit: leave codes beside numbers",
        "optim/handlers/bitsandbytes.py",
        "{k: v for k, v in state.items() if k not in beside}",
        "dict(state)",
        "-k form",
    ),
    Fault(
        "8-bit: signed codes for squares",
        "optim/handlers/bitsandbytes.py",
        'signed=key == "state1"',
        "signed=True",
        "-k form",
    ),
    Fault(
        "8-bit: forget which beta corrects",
        "optim/handlers/bitsandbytes.py",
        '"betas": True',
        '"betas": False',
    ),
    Fault(
        "8-bit: take blocks for elementwise",
        "optim/handlers/bitsandbytes.py",
        "elementwise=not eight,",
        "elementwise=True,",
        "-k refused",
    ),
    Fault(
        "8-bit: overlook settings by identity",
        "optim/handlers/bitsandbytes.py",
        "if self.overridden(p):",
        "if False:",
        "-k refused",
    ),
    Fault(
        "read a 4-bit weight that is packed for inference",
        "lora/base_weight.py",
        'getattr(getattr(getattr(base, "weight", None), "quant_state", None), "packing_format_for_cpu", False)',
        "False",
        "-k packed",
    ),
]

"""What `test_precision.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "hand back half-precision factors in float32",
        "surgery/staging.py",
        "nn.Parameter(raw.to(like.device).contiguous(), like.requires_grad)",
        "nn.Parameter(raw.to(like.device).float().contiguous(), like.requires_grad)",
        "-k bf16",
    ),
]

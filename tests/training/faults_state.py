"""What `test_state.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "lost: believe a state whose checksum is another",
        "training/state.py",
        'if state.get("checksum") != _checksum(',
        "if None == _checksum(",
    ),
    Fault(
        "lost: leave tensors out of the checksum",
        "training/state.py",
        "return [str(value.dtype), list(value.shape), hashlib.sha256(raw).hexdigest()]",
        "return [str(value.dtype), list(value.shape), len(raw)]",
    ),
    Fault(
        "lost: hand out tensors that training changes",
        "training/state.py",
        'return value.detach().to("cpu", copy=True).contiguous()',
        "return value.detach()",
    ),
    Fault(
        "lost: read a newer format",
        "training/state.py",
        "if written != FORMAT:",
        "if written < FORMAT:",
    ),
    Fault(
        "lost: believe files that are not those of their sums",
        "training/checkpoint.py",
        "if (folder / SUMS).read_bytes() != _sums(files).encode():",
        "if not (folder / SUMS).read_bytes():",
    ),
    Fault(
        "lost: write a checkpoint's state in its place",
        "training/checkpoint.py",
        "with atomic_folder(folder) as partial:",
        "partial = folder\n    partial.mkdir(exist_ok=True)\n    if True:",
    ),
]

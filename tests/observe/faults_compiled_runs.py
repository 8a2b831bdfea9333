"""What `test_compiled_runs.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "let a compiled graph pass scored steps by",
        "observe/probes.py",
        'if hooked & _TAPPED and "torch._dynamo" in sys.modules:',
        "if False:",
    ),
]

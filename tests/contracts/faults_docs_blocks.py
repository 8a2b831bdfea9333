"""What `test_docs_blocks.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "call an option otherwise than the documents do",
        "cli/runs.py",
        '"--once"',
        '"--one"',
        "-k reading-results",
    ),
]

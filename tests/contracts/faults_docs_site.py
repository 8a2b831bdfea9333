"""What `test_docs_site.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "describe settings without what they mean",
        "config/load.py",
        '.description or ""',
        '.title or ""',
        "-k increlora",
    ),
]

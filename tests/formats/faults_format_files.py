"""What `test_format_files.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "leave the formats of packages out",
        "formats/single_file/registry.py",
        "for found in added}}",
        "for found in added if False}}",
    ),
    Fault(
        "describe files of other formats as they were",
        "formats/convert.py",
        "self._to.describe(self.metadata, modules, own)",
        "dict(self.metadata)",
    ),
]

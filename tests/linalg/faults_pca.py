"""What `test_pca.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "forget that the means of two batches differ",
        "linalg/pca.py",
        "stacked = torch.cat([self.rows, spread, shift[None]])",
        "stacked = torch.cat([self.rows, spread])",
    ),
]

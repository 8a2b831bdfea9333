"""What `test_statistics.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "carry d as z is carried",
        "observe/averages.py",
        "M.mT @ self.mean_dd @ M, torch.where",
        "N @ self.mean_dd @ N.mT, torch.where",
    ),
    Fault(
        "take new directions for measured",
        "observe/averages.py",
        "torch.nn.functional.pad(self.measured, (0, n))",
        "torch.nn.functional.pad(self.measured, (0, n), value=1.0)",
    ),
    Fault(
        "take a mixed direction for as measured as the best of it",
        "observe/averages.py",
        "torch.where(into, self.measured, torch.inf).amin(-1)",
        "torch.where(into, self.measured, 0.0).amax(-1)",
    ),
    Fault(
        "average what is not finite",
        "observe/averages.py",
        "return torch.where(usable, mixed, mean)",
        "return mixed",
    ),
]

"""What `test_adalora.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "scale AdaLoRA by the rank that is left",
        "formats/as_lora/adalora.py",
        "torch.tensor(ranknums.get(name, init_r))",
        "torch.tensor(float(ranks[name]))",
    ),
    Fault(
        "overlook a ranknum that the file holds",
        "formats/as_lora/adalora.py",
        "ranknums.get(name, init_r)",
        "init_r",
    ),
    Fault(
        "keep masked directions",
        "formats/as_lora/adalora.py",
        "return (e[:, 0] != 0).nonzero()[:, 0]",
        "return torch.arange(len(e))",
    ),
]

"""What `test_single_file.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "keep alpha as it was at the old rank",
        "formats/single_file/writer.py",
        "self.slot.scaling * rank, dtype",
        "self.slot.scaling * self.slot.rank, dtype",
    ),
    Fault(
        "round alpha to half precision",
        "formats/single_file/writer.py",
        "return own if torch.equal(own.double(), value) else value.float()",
        "return own",
    ),
    Fault(
        "take a scale of rank where alpha is missing",
        "formats/single_file/base.py",
        "return 1.0 if alpha is None else alpha / rank",
        "return 1.0 / rank if alpha is None else alpha / rank",
    ),
    Fault(
        "swap the two sides of a Tucker core",
        "formats/single_file/lycoris.py",
        '"ij...,jc->ic..."',
        '"ji...,jc->ic..."',
    ),
    Fault(
        "hash the header of the model too",
        "formats/single_file/kohya.py",
        "        file.seek(writer.base)\n",
        "",
    ),
    Fault(
        "look 1 MiB into this file and not into the one of training",
        "formats/single_file/kohya.py",
        "max(0, _MEGABYTE - len(plain))",
        "max(0, _MEGABYTE - writer.base)",
    ),
    Fault(
        "lay tensors of one width down by name alone",
        "formats/io/writers.py",
        "(_ORDER[specs[k][0]], k)",
        "(-specs[k][0].itemsize, k)",
    ),
    Fault(
        "leave mixed ranks out of diffusers' header",
        "formats/single_file/diffusers.py",
        "if always or mixed(ranks) else ()",
        "if always else ()",
    ),
]

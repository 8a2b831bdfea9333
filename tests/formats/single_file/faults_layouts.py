"""What `test_layouts.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "carry along what is called a factor",
        "formats/single_file/keys.py",
        "if not _NO_FACTOR.search(key) and _WORD.search(_METHOD.sub",
        "if not _NO_FACTOR.search(key) and False and _WORD.search(_METHOD.sub",
    ),
    Fault(
        "carry along what has the shape of a factor",
        "formats/single_file/keys.py",
        "if other is not None and times * rank < min(",
        "if other is not None and times * rank > min(",
    ),
    Fault(
        "carry an alpha along whose module is not read",
        "formats/single_file/base.py",
        "        refuse_unused_alphas(extra, path)\n",
        "",
    ),
    Fault(
        "tell a layout by XLabs' numbers no more",
        "formats/single_file/keys.py",
        r"(?P<stem>.+_lora\d+)",
        r"(?P<stem>.+_lora_\d+)",
    ),
    Fault(
        "write a header that diffusers looks into in vain",
        "formats/single_file/diffusers.py",
        " and not self._foreign(name)",
        "",
    ),
    Fault(
        "leave what is carried along out of reports",
        "compress/each.py",
        "carried=dict(adapter.extra_tensors),",
        "",
    ),
]

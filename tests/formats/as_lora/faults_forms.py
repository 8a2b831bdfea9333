"""What `test_forms.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "another form: leave out the vector that scales VeRA's inner directions",
        "formats/as_lora/vera.py",
        "(wide(d)[:, None] * wide(A[:, :n]))[:rank]",
        "wide(A[:, :n])[:rank]",
        "-k live_model",
    ),
    Fault(
        "another form: draw VeRA's shared matrices with another key",
        "formats/as_lora/vera.py",
        "manual_seed(seed)",
        "manual_seed(seed + 1)",
        "-k draws",
    ),
    Fault(
        "another form: put the middle matrix in transposed",
        "formats/as_lora/lora_xs.py",
        "return tensors[left].to(dtype) @ tensors[right].to(dtype)",
        "return tensors[left].to(dtype).mT @ tensors[right].to(dtype)",
        "-k middle",
    ),
    Fault(
        "another form: swap the factors of LoKr's Kronecker product",
        "formats/as_lora/loha_lokr.py",
        "lambda: kron(left.a(), right.a())",
        "lambda: kron(right.a(), left.a())",
        "-k live_model",
    ),
    Fault(
        "another form: pair LoHa's directions in another order",
        "formats/as_lora/loha_lokr.py",
        'torch.einsum("in,jn->ijn", first, second)',
        'torch.einsum("in,jn->jin", first, second)',
        "-k live_model",
    ),
    Fault(
        "another form: take GraLoRA's parts for those of the other block",
        "formats/as_lora/gralora.py",
        "columns[j, :, :, j] =",
        "columns[j, :, :, k - 1 - j] =",
        "-k live_model",
    ),
    Fault(
        "take other inputs for a row of MiSS",
        "formats/as_lora/miss.py",
        "torch.arange(inside) % len(block)]",
        "torch.arange(inside) // -(-inside // len(block))]",
        "-k MiSS",
    ),
]

"""What `test_bayesian_lora.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "quantise what gates have left instead of what rounding has",
        "policies/_quantizer.py",
        "quantised, residual_of = quantised + on * e, residual_of + e",
        "quantised, residual_of = quantised + on * e, residual_of + on * e",
    ),
    Fault(
        "round off the grid at its edge",
        "policies/_quantizer.py",
        "_INSIDE = 1 - 1e-6",
        "_INSIDE = 1.0",
    ),
    Fault(
        "leave gates on that are mostly closed",
        "policies/_quantizer.py",
        "return torch.sigmoid(_SHIFT - logit) < MOST_CLOSED",
        "return torch.sigmoid(_SHIFT - logit) < 1 - MOST_CLOSED",
    ),
    Fault(
        "charge bits whose parents are off",
        "policies/bits_and_rank.py",
        'chain(probability(t["bits"])).unbind(-1)',
        'probability(t["bits"]).unbind(-1)',
    ),
    Fault(
        "never fix the gates",
        "policies/bits_and_rank.py",
        "return step <= self.last",
        "return True",
    ),
    Fault(
        "fold the noise of the last forward",
        "gating/gates.py",
        "            self._forward.draw(None)  # the last forward may have been one with noise",
        "",
    ),
    Fault(
        "keep integers that are not the adapter's",
        "compress/quantized.py",
        "_check(modules, path)\n    check_output",
        "check_output",
    ),
    Fault(
        "unpack small integers without their sign",
        "compress/quantized.py",
        "torch.where(flat >= 2 ** (bits - 1), flat - 2**bits, flat)",
        "flat",
    ),
]

"""What `test_fine_tune.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "a full update: forget what lies outside of the sketch",
        "formats/as_lora/dense.py",
        "math.fsum(map(float, residual))",
        "0.0",
    ),
    Fault(
        "a full update: reckon shares of what was looked at",
        "compress/target.py",
        "(gains.sum() + spectrum.outside)",
        "gains.sum()",
        "-k energy",
    ),
    Fault(
        "a full update: take the fine-tune from its base",
        "formats/as_lora/fine_tune.py",
        "(ours.to(wide) - theirs.to(wide))",
        "(theirs.to(wide) - ours.to(wide))",
        "-k report",
    ),
    Fault(
        "a full update: leave Conv1D's weights as they lie",
        "formats/as_lora/fine_tune.py",
        "flip = transposed and",
        "flip = False and",
        "-k whole",
    ),
    Fault(
        "say of RandLoRA's LoRA that it has one module",
        "formats/as_lora/randlora.py",
        '"target_modules": sorted(deltas)',
        '"target_modules": sorted(deltas)[:1]',
        "::test_randlora_is_looked_at_through_its_leading_directions",
    ),
]

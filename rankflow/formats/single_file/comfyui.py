"""Single files by the names of the models' own checkpoints: `diffusion_model.` and `text_encoders.` as ComfyUI has
them, with another prefix, or with none, as BFL, DiffSynth, OneTrainer and others do; factors in any spelling.

Which names there are: ComfyUI's `lora.py` and `lora_convert.py`, diffusers' `lora_conversion_utils.py`.
"""

from __future__ import annotations

from rankflow.formats.single_file.base import SingleFile
from rankflow.formats.single_file.keys import Factor

# What stands before names of the diffusion model, longest first
PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.")


class ComfyAdapter(SingleFile):
    """An adapter as ComfyUI and many trainers of its models write it; the scale is alpha / r, 1 without alpha."""

    kind = "comfyui"

    def name_of(self, factor: Factor) -> str:
        stem = factor.stem
        return "diffusion_model." + stem.removeprefix(PREFIXES[1]) if stem.startswith(PREFIXES[1]) else stem

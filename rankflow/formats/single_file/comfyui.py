"""Single files by the names of the models' own checkpoints: `diffusion_model.` and `text_encoders.` as ComfyUI has
them, with another prefix, or with none, as BFL, DiffSynth, OneTrainer and others do; factors in any spelling.

Which names there are: ComfyUI's `lora.py` and `lora_convert.py`, diffusers' `lora_conversion_utils.py`.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from rankflow.errors import ConfigError
from rankflow.formats.single_file.base import SingleFile
from rankflow.formats.single_file.keys import Factor, Fit, Names
from rankflow.formats.single_file.names import COMPONENTS, IMAGE, ORIGINAL, ORIGINAL_ROOTS

# What stands before names of the diffusion model, longest first
PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.")


# What names begin with: of ComfyUI, and of OneTrainer, which has them of the Open Model Initiative
_ROOTS = {"diffusion_model", "diffusion_model_2", "text_encoders", "clip_l", "clip_g", "t5", "t5xxl", "llama"}
# Of the same models, and of Wan, where only a whole file tells that it is of an image model
_BESIDE_BLOCKS = ("blocks", "img_in", "txt_in", "time_in", "vector_in", "guidance_in", "final_layer")


class ComfyAdapter(SingleFile):
    """An adapter as ComfyUI and many trainers of its models write it; the scale is alpha / r, 1 without alpha."""

    kind = "comfyui"
    writes = False  # since which names the model's own checkpoint has depends on the model

    @classmethod
    def recognises(cls, names: Names) -> Fit:
        if names.roots & _ROOTS or any(module.startswith("model.diffusion_model.") for module in names.modules):
            return Fit.CERTAIN
        # Where every module has an alpha, its scale is known whatever its name
        alphas = names.stems and all(f"{stem}.alpha" in names.keys for stem in names.stems)
        return Fit.POSSIBLE if alphas or any(map(IMAGE.match, names.modules)) else Fit.NONE

    @classmethod
    def to_common(cls, names: Collection[str]) -> list[str]:
        return [from_comfyui(name) for name in names]

    @classmethod
    def places(cls, name: str) -> list[tuple[str, str]]:
        if name.startswith(f"{ORIGINAL}."):
            inner = name.removeprefix(f"{ORIGINAL}.")
            return [(part, inner) for part in ("unet", "transformer", "transformer_2", ORIGINAL)]
        return super().places(name)

    def name_of(self, factor: Factor) -> str:
        stem = factor.stem
        return "diffusion_model." + stem.removeprefix(PREFIXES[1]) if stem.startswith(PREFIXES[1]) else stem


def from_comfyui(name: str) -> str:
    """Return the common name of a module.

    Raises:
        ConfigError: a part of the model that other formats have no name for.
    """
    name = name.removeprefix("base_model.model.")
    if name.partition(".")[0] in (*ORIGINAL_ROOTS, *_BESIDE_BLOCKS):
        return f"{ORIGINAL}.{name}"
    if not re.match(rf"{ORIGINAL}\.|({'|'.join(COMPONENTS)})\.", name):
        raise ConfigError(f"{name}: is of a part that no other format has a name for; keep the format")
    return name

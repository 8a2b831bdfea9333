"""ComfyUI's own single files: `diffusion_model.` and `text_encoders.` names, in any spelling its loader knows."""

from __future__ import annotations

from rankflow.formats.single import SingleFile


class ComfyAdapter(SingleFile):
    """An adapter as ComfyUI and many trainers of its models write it; the scale is alpha / r, 1 without alpha."""

    kind = "comfyui"

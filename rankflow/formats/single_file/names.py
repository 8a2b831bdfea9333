"""Module names from one format's into another's, where that is possible without the model.

Between formats a module is called by a component and its name in it: `unet.` and so on as diffusers has them, and
`diffusion_model.` for what goes by the names of the model's own checkpoint, as ComfyUI and much of kohya do.

Files outlive the libraries whose names they have. transformers from 5.6 on has no `text_model` level in its
CLIPTextModel (OneTrainer pull request 1506, diffusers issue 13984), and diffusers' attention had no list for `to_out`
at first; sd-scripts, ComfyUI and the files there are know `text_model` and `to_out.0` alone, whatever wrote the source.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from rankflow.errors import ConfigError

COMPONENTS = (
    "unet",
    "prior",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "transformer",
    "transformer_2",
    "connectors",
)
ORIGINAL = "diffusion_model"  # the component of what goes by the names of the model's own checkpoint

ORIGINAL_ROOTS = ("input_blocks", "output_blocks", "middle_block", "double_blocks", "single_blocks", "joint_blocks")
# How the names within a component begin, for PEFT, which does not say which it is
_ROOTS = {
    "down_blocks": "unet",
    "up_blocks": "unet",
    "mid_block": "unet",
    "text_model": "text_encoder",
    "transformer_blocks": "transformer",
    "single_transformer_blocks": "transformer",
    **dict.fromkeys(ORIGINAL_ROOTS, ORIGINAL),
}


# Blocks of diffusers' models, before which no component is named: Qwen-Image-Lightning, `save_lora_adapter`
BLOCKS = ("transformer_blocks", "single_transformer_blocks", "down_blocks", "mid_block", "up_blocks")
# Modules of image and video models under any names: BFL's, XLabs', fal's, DiffSynth's, Wan's, Z-Image's and others
IMAGE = re.compile(
    rf"(?:{'|'.join(BLOCKS)})\.|(?:model\.)?diffusion_model\.|(?:unet|transformer)\.base_model\.model\."
    r"|(?:double|single|joint|input|output|double_stream|single_stream)_blocks\.\d|middle_block\.\d"
    r"|(?:visual|text)_transformer_blocks\.\d|(?:noise|context)_refiner\.\d"
    r"|blocks\.\d+\.(?:self_attn|cross_attn)\.(?:[qkvo]|[kv]_img)$|blocks\.\d+\.ffn\.\d"
    r"|blocks\.\d+\.(?:attn\d?|processor)\.\w*(?:to_\w+|qkv\w*|proj\w*)|blocks\.\d+\.a_to_\w+"
    r"|layers\.\d+\.(?:attention\.(?:qkv|out|to_\w+)|adaLN_modulation)\b"
)
# Those of language models that call themselves a transformer: GPT-2, Falcon, DistilBERT, ChatGLM, MPT
LANGUAGE = re.compile(r"transformer\.(?:h|layer|encoder|wte|word_embeddings)\.|transformer\.blocks\.\d+\.attn\.Wqkv")

# What a library called modules at some time -> what the formats call them, by the component they are in
_RENAMED = (
    (re.compile(r"^(text_encoder(?:_2)?\.)(?=encoder\.layers\.|embeddings\.|final_layer_norm$)"), r"\1text_model."),
    (re.compile(r"^((?:unet|prior|transformer(?:_2)?)\..*\bto_out)$"), r"\1.0"),
)
# The same where dots are underscores
_RENAMED_FLAT = (
    (re.compile(r"^(lora_te[12]?_)(?=encoder_layers_|embeddings_|final_layer_norm$)"), r"\1text_model_"),
    (re.compile(r"^(lora_(?:prior_)?unet_(?:down|up|mid)_block.*_attn[12]_to_out)$"), r"\1_0"),
)
_CLIP = re.compile(r"^encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])$")


def renamed(name: str) -> str:
    """A module, named by component, as the formats call it."""
    return _by(_RENAMED, name)


def renamed_flat(stem: str) -> str:
    """The same for a name of kohya's."""
    return _by(_RENAMED_FLAT, stem)


def renamed_key(key: str) -> str:
    """The same for the key of a tensor, whose module it is, if it is one of kohya's."""
    stem, dot, part = key.partition(".")
    return renamed_flat(stem) + dot + part


def _by(table: Iterable[tuple[re.Pattern[str], str]], name: str) -> str:
    for pattern, new in table:
        name = pattern.sub(new, name)
    return name


def component_of(names: Collection[str]) -> str:
    """The component that an adapter's modules belong to.

    Raises:
        ConfigError: no module tells.
    """
    found = {_ROOTS[root] for root in (name.partition(".")[0] for name in names) if root in _ROOTS}
    if names and all(map(_CLIP.match, names)):
        found = {"text_encoder"}
    if len(found) != 1:
        raise ConfigError(
            "module names do not tell what part of an image model they are of (U-Net, transformer, text encoder): "
            f"{next(iter(names))}; kohya and diffusers have no format for others"
        )
    return found.pop()


def of_image_model(names: Iterable[str]) -> bool:
    """Whether modules, named as PEFT names them, are of a diffusion model, as far as the names tell."""
    return any(name.partition(".")[0] in _ROOTS for name in names)


def component_length(names: Collection[str]) -> int:
    """Length of the component's name, with its dot, that all modules begin with.

    Raises:
        ConfigError: there are several, and PEFT saves one model's adapter at a time.
    """
    components = sorted({name.partition(".")[0] for name in names})
    if len(components) > 1:
        raise ConfigError(
            f"the adapter is of {' and '.join(components)}, and a PEFT adapter is of one model; choose another format"
        )
    return len(components[0]) + 1


def split(name: str) -> tuple[str, str]:
    """(component with its dot, module), the component empty where the name has none."""
    head, dot, rest = name.partition(".")
    return (head + dot, rest) if head in COMPONENTS else ("", name)

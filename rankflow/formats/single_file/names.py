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
from rankflow.formats.single_file.diffusers import COMPONENTS

_ORIGINAL = "diffusion_model"

# Parts of module names that have an underscore inside, of diffusers' and of original U-Nets, CLIP, SD3 and FLUX. A
# kohya name is translated if there is one way to read it with these, with words that stand alone, and numbers.
_PARTS = (
    "down_blocks up_blocks mid_block transformer_blocks single_transformer_blocks "
    "input_blocks output_blocks middle_block double_blocks single_blocks joint_blocks motion_modules "
    "to_q to_k to_v to_out to_add_out add_q_proj add_k_proj add_v_proj q_proj k_proj v_proj out_proj self_attn "
    "proj_in proj_out proj_mlp time_emb_proj time_embedding add_embedding time_embed label_emb text_embedder "
    "timestep_embedder guidance_embedder time_text_embed context_embedder x_embedder "
    "conv_in conv_out conv_shortcut conv_norm_out skip_connection in_layers out_layers emb_layers "
    "text_model text_projection position_embedding token_embedding final_layer_norm layer_norm1 layer_norm2 "
    "ff_context norm1_context norm_out img_attn txt_attn img_mlp txt_mlp img_mod txt_mod img_in txt_in "
    "vector_in time_in guidance_in final_layer adaLN_modulation context_block x_block linear_1 linear_2"
)
_WORDS = (
    "attentions resnets downsamplers upsamplers attn attn1 attn2 ff net proj conv conv1 conv2 op h encoder layers "
    "mlp fc1 fc2 lin linear linear1 linear2 modulation qkv norm norm1 norm2 norm3 query_norm key_norm"
)
_LAST = ("proj", "linear")  # nothing comes after these: proj_mlp and linear_1 are one part
_TOKENS = {tuple(part.split("_")) for part in f"{_PARTS} {_WORDS}".split()}
_LONGEST = max(map(len, _TOKENS))

_KOHYA = {
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_te_": "text_encoder",
    "lora_transformer_": "transformer",
    "lora_unet_": "unet",
    "lora_prior_unet_": "prior",
}
_ORIGINAL_ROOTS = ("input_blocks", "output_blocks", "middle_block", "double_blocks", "single_blocks", "joint_blocks")
# Of the same models, and of Wan, where only a whole file tells that it is of an image model
_BESIDE_BLOCKS = ("blocks", "img_in", "txt_in", "time_in", "vector_in", "guidance_in", "final_layer")
# How the names within a component begin, for PEFT, which does not say which it is
_ROOTS = {
    "down_blocks": "unet",
    "up_blocks": "unet",
    "mid_block": "unet",
    "text_model": "text_encoder",
    "transformer_blocks": "transformer",
    "single_transformer_blocks": "transformer",
    **dict.fromkeys(_ORIGINAL_ROOTS, _ORIGINAL),
}


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
_T5 = re.compile(r"^encoder_block_(\d+)_layer_(\d+)_(SelfAttention|DenseReluDense)_(q|k|v|o|wi|wi_0|wi_1|wo)$")
_CLIP = re.compile(r"^encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])$")
_FLUX = re.compile(r"(?:double|single)_blocks|single_transformer_blocks")


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


def from_kohya(stem: str, stems: Collection[str] = ()) -> str:
    """
    Args:
        stems: all of the file's, of which some tell what model it is for.

    Raises:
        ConfigError: an underscore of `stem` may be a dot or not.
    """
    stem = renamed_flat(stem)
    prefix = next((p for p in _KOHYA if stem.startswith(p)), None)
    if prefix is None:
        raise ConfigError(
            f"{stem}: kohya's names begin with {', '.join(_KOHYA)}; of what model this is a part is not known"
        )
    flat = stem.removeprefix(prefix).replace(".", "_")
    if found := _T5.match(flat):  # te3 to sd-scripts; text_encoder_2 of FLUX, which has no third, to diffusers
        block, layer, part, last = found.groups()
        component = "text_encoder_2" if any(map(_FLUX.search, stems)) else _KOHYA[prefix]
        return f"{component}.encoder.block.{block}.layer.{layer}.{part}.{last}"
    name = _dotted(flat, stem)
    component = _ORIGINAL if name.partition(".")[0] in _ORIGINAL_ROOTS else _KOHYA[prefix]
    return f"{component}.{name}"


def _dotted(flat: str, stem: str) -> str:
    words = flat.split("_")
    ways: list[list[tuple[str, ...]]] = [[()]]  # of reading the first n words
    for end in range(1, len(words) + 1):
        here = []
        for start in range(max(0, end - _LONGEST), end):
            piece = tuple(words[start:end])
            known = piece in _TOKENS or (len(piece) == 1 and piece[0].isdecimal())
            if known and (end == len(words) or piece[0] not in _LAST or len(piece) > 1):
                here += [(*way, "_".join(piece)) for way in ways[start]]
        ways.append(here[:2])  # two are one too many already
    if len(ways[-1]) != 1:
        why = "can be read in more than one way" if ways[-1] else "has parts that are not known"
        raise ConfigError(
            f"{stem}: kohya writes dots of a name as underscores, and this one {why}; without the model it cannot be "
            "translated, so keep the kohya format"
        )
    return ".".join(ways[-1][0])


def to_kohya(name: str, names: Collection[str]) -> str:
    """
    Raises:
        ConfigError: kohya has no name for it.
    """
    component, _, module = renamed(name).partition(".")
    if component == _ORIGINAL:
        prefix = "lora_unet_"
    elif component.startswith("text_encoder") and _T5.match(module.replace(".", "_")):
        prefix = "lora_te3_"  # of FLUX too, whose second it is
    elif component == "text_encoder":
        # sd-scripts numbers text encoders where a model has several, as those have that are no U-Net
        several = any(re.match(r"text_encoder_[23]\.|transformer\.", n) or _FLUX.search(n) for n in names)
        prefix = "lora_te1_" if several else "lora_te_"
    else:
        prefix = next((p for p, c in _KOHYA.items() if c == component), "")
    if not prefix:
        raise ConfigError(f"{name}: kohya has no name for modules of {component!r}; keep the format, or choose peft")
    return prefix + module.replace(".", "_")


def from_peft(names: Collection[str]) -> str:
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


def to_peft(names: Collection[str]) -> int:
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


def to_diffusers(name: str) -> str:
    """
    Raises:
        ConfigError: the name is that of the original checkpoint, which diffusers' differ from.
    """
    if name.partition(".")[0] not in COMPONENTS:
        raise ConfigError(
            f"{name}: goes by the names of the original checkpoint, and which of diffusers' modules that is depends on "
            "the model; keep the format, which diffusers' load_lora_weights translates itself"
        )
    return renamed(name)


def from_comfyui(name: str) -> str:
    """
    Raises:
        ConfigError: a part of the model that other formats have no name for.
    """
    name = name.removeprefix("base_model.model.")
    if name.partition(".")[0] in (*_ORIGINAL_ROOTS, *_BESIDE_BLOCKS):
        return f"{_ORIGINAL}.{name}"
    if not re.match(rf"{_ORIGINAL}\.|({'|'.join(COMPONENTS)})\.", name):
        raise ConfigError(f"{name}: is of a part that no other format has a name for; keep the format")
    return name

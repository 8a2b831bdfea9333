"""kohya's sd-scripts and LyCORIS LoCon: one file, modules named with underscores, `lora_down`, `lora_up` and `alpha`.

The header says what was trained (`ss_...`), and holds two hashes by which sd-webui knows the file again.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from rankflow.errors import ConfigError
from rankflow.formats.base import SavedModule
from rankflow.formats.io.writers import SafetensorsWriter, header
from rankflow.formats.single_file.base import SingleFile
from rankflow.formats.single_file.keys import Fit, Names
from rankflow.formats.single_file.names import ORIGINAL, ORIGINAL_ROOTS, renamed, renamed_flat
from rankflow.formats.single_file.writer import Module

_MODEL_HASH, _LEGACY_HASH = "sshs_model_hash", "sshs_legacy_hash"
_MEGABYTE = 0x100000


# Names of sd-scripts and LyCORIS; WanVideoWrapper has dots in the rest of them
_KOHYA_NAME = re.compile(r"(?:lora|lycoris)_[^.]+$|lora_(?:unet|te\d?|transformer|prior_unet|prior_te)_\w")
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
# A kohya name's prefix -> the components it may be of
_PLACES = {
    "lora_te1_": ("text_encoder",),
    "lora_te2_": ("text_encoder_2",),
    "lora_te3_": ("text_encoder_3", "text_encoder_2"),
    "lora_te_": ("text_encoder",),
    "lora_transformer_": ("transformer",),
    "lora_unet_": ("unet", "transformer", "transformer_2", "diffusion_model"),
    "lora_prior_unet_": ("prior",),
}
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
_T5 = re.compile(r"^encoder_block_(\d+)_layer_(\d+)_(SelfAttention|DenseReluDense)_(q|k|v|o|wi|wi_0|wi_1|wo)$")
_FLUX = re.compile(r"(?:double|single)_blocks|single_transformer_blocks")


class KohyaAdapter(SingleFile):
    """An adapter as sd-scripts and LyCORIS write it."""

    kind = "kohya"

    @classmethod
    def recognises(cls, names: Names) -> Fit:
        return Fit.UNMISTAKABLE if names.stems and all(map(_KOHYA_NAME.match, names.stems)) else Fit.NONE

    @classmethod
    def to_common(cls, names: Collection[str]) -> list[str]:
        return [from_kohya(name, names) for name in names]

    @classmethod
    def from_common(cls, names: Collection[str]) -> list[str]:
        return [to_kohya(name, names) for name in names]

    @classmethod
    def place(cls, entry: SavedModule, stem: str) -> Module:
        keys = (f"{stem}.lora_down.weight", f"{stem}.lora_up.weight")
        return Module(entry.slot, *keys, entry.a_shape, entry.b_shape, entry.dtype, alpha_key=f"{stem}.alpha")

    @classmethod
    def describe(
        cls, metadata: Mapping[str, str], modules: Mapping[str, Module], ranks: Mapping[str, int]
    ) -> dict[str, str]:
        new = {"ss_network_module": "networks.lora", "ss_network_dim": "", **metadata}
        return kohya_metadata(new, modules, ranks)

    @classmethod
    def finish(cls, writer: SafetensorsWriter, partial: Path, metadata: Mapping[str, str]) -> None:
        writer.relabel({**metadata, **kohya_hashes(writer, partial, metadata)})

    @classmethod
    def places(cls, name: str) -> list[tuple[str, str]]:
        prefix = next((prefix for prefix in _PLACES if name.startswith(prefix)), "")
        return [(component, name.removeprefix(prefix)) for component in _PLACES.get(prefix, ("",))]

    def described(self, ranks: Mapping[str, int]) -> dict[str, str]:
        return kohya_metadata(self.metadata, self.entries, ranks)


def from_kohya(stem: str, stems: Collection[str] = ()) -> str:
    """Return the common name of a module, given kohya's.

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
    component = ORIGINAL if name.partition(".")[0] in ORIGINAL_ROOTS else _KOHYA[prefix]
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
    """Return kohya's name of a module, given its common one.

    Raises:
        ConfigError: kohya has no name for it.
    """
    component, _, module = renamed(name).partition(".")
    if component == ORIGINAL:
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


def kohya_metadata(
    metadata: Mapping[str, str], modules: Mapping[str, Module], ranks: Mapping[str, int]
) -> dict[str, str]:
    """Header metadata at other ranks, with room for the hashes.

    `ss_network_dim` and `ss_network_alpha` are those of the modules without a kernel (of all, where there are none), or
    "Dynamic" where they differ, as sd-scripts' `resize_lora.py` has it. Nothing is said about ranks that did not
    change, nor of training in a file that never told.
    """
    new = {**metadata, _MODEL_HASH: "0" * 64, _LEGACY_HASH: "0" * 8}
    if all(module.slot.rank == ranks[name] for name, module in modules.items()) and "ss_network_dim" in metadata:
        return new
    present = {name: module for name, module in modules.items() if ranks[name]}
    linear = {name: module for name, module in present.items() if math.prod(module.a_shape[2:]) == 1} or present
    dims = {str(ranks[name]) for name in linear}
    alphas = {str(module.slot.scaling * ranks[name]) for name, module in linear.items()}
    if "ss_network_dim" in metadata:
        was = metadata["ss_network_dim"]
        now = next(iter(dims)) if len(dims) == 1 else "Dynamic"
        comment = metadata.get("ss_training_comment", "")
        new["ss_training_comment"] = f"dimension is resized from {was} to {now}; {comment}"
    if metadata.keys() & {"ss_network_dim", "ss_network_alpha", "ss_network_module"}:
        new["ss_network_dim"] = dims.pop() if len(dims) == 1 else "Dynamic"
        new["ss_network_alpha"] = alphas.pop() if len(alphas) == 1 else "Dynamic"
    return new


def kohya_hashes(writer: SafetensorsWriter, partial: Path, metadata: Mapping[str, str]) -> dict[str, str]:
    """The two hashes of a written file, by sd-scripts' `precalculate_safetensors_hashes`.

    `sshs_model_hash` is the SHA-256 of all bytes after the header. `sshs_legacy_hash` is the first 8 hex digits of the
    SHA-256 of 64 KiB at 1 MiB into the file, were its metadata the `ss_` entries alone.
    """
    model, legacy = hashlib.sha256(), hashlib.sha256()
    plain, _, _ = header(writer.specs, {k: v for k, v in metadata.items() if k.startswith("ss_")})
    with partial.open("rb") as file:
        file.seek(writer.base)
        while chunk := file.read(_MEGABYTE):
            model.update(chunk)
        # Where the plain header is longer than that, the window begins in it
        window = plain[_MEGABYTE : _MEGABYTE + 0x10000]
        file.seek(writer.base + max(0, _MEGABYTE - len(plain)))
        legacy.update(window + file.read(0x10000 - len(window)))
    return {_MODEL_HASH: model.hexdigest(), _LEGACY_HASH: legacy.hexdigest()[:8]}

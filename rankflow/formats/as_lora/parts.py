"""Parts that reading another kind of adapter as plain LoRA is made of: keys by module, lazy tensors, the config."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rankflow.errors import AdapterError
from rankflow.formats.base import is_scale
from rankflow.plans.peft_patterns import alpha_for, rank_config

PREFIX = "base_model.model."
SHARED = "base_model"  # under which PEFT saves what all modules share
Make = Callable[[], Tensor]
MOST = 1 << 28  # numbers of one tensor that is made from smaller ones: as many as the largest weights there are

# What PEFT's configs of all kinds have in common and LoRA's means the same by
_KEPT = (
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "peft_version",
    "revision",
    "target_modules",
    "task_type",
)


class Folded(NamedTuple):
    """The plain LoRA that an adapter equals, as its config and file would have it, with notes about the conversion."""

    config: dict[str, Any]
    tensors: Mapping[str, Tensor]
    notes: list[str]


class Form(NamedTuple):
    """A kind of adapter that equals a plain LoRA. A file of this folder lists those it reads as `FORMS`.

    peft_type: as PEFT's config has it. fold: gives the LoRA, of (config, tensors, path for messages), and of the base
    model's folder or None as well where `needs_base`. applies: whether it is one, by the keys of its tensors.
    """

    peft_type: str
    fold: Callable[..., Folded]
    needs_base: bool = False
    applies: Callable[[Iterable[str]], bool] = lambda keys: True


class Factors(NamedTuple):
    """One module's A ``[rank, in, *kernel]`` and B ``[out, rank, *1]``, computed on demand: DeltaW = scaling B A.

    `size` are the numbers of the larger, or of what has to be made on the way to it.
    """

    rank: int
    a: Make
    b: Make
    size: int
    scaling: float = 1.0


class Lazy(Mapping[str, Tensor]):
    """Tensors that are computed anew at each access."""

    def __init__(self, makers: Mapping[str, Make]):
        self._makers = dict(makers)

    def __getitem__(self, key: str) -> Tensor:
        return self._makers[key]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


class Parts(Mapping[str, Mapping[str, Tensor]]):
    """A file's tensors by module and part, for a kind of adapter whose parts have names of their own.

    Keys are ``<module>.<part>``, with or without an adapter's name or ``weight`` after it; `rest` are all others.
    """

    def __init__(self, tensors: Mapping[str, Tensor], names: Collection[str], kind: str, path: Path):
        """
        Raises:
            AdapterError: no such part, one that is there twice, is empty, or is no floating-point tensor.
        """
        self.kind, self.path = kind, path
        pattern = re.compile(rf"^(?P<module>.+)\.(?P<part>{'|'.join(names)})(?:\.[^.]+)?$")
        found: dict[str, dict[str, Tensor]] = defaultdict(dict)
        self.rest: dict[str, Make] = {}
        for key, t in tensors.items():
            if not (match := pattern.match(key)):
                self.rest[key] = lambda key=key: tensors[key]
                continue
            module, part = match["module"], match["part"]
            if part in found[module]:
                raise AdapterError(f"{path}: {module} has {part} twice; save each adapter by itself")
            if "indices" not in part and not (t.is_floating_point() and t.itemsize > 1):
                raise AdapterError(f"{path}: {key} is {t.dtype} and not floating point; the file is damaged")
            if not t.numel():
                raise AdapterError(
                    f"{path}: {key} has shape {list(t.shape)}; the file is damaged, or of sharded weights"
                )
            found[module][part] = t
        if not found:
            raise AdapterError(f"{path}: has no tensor of {kind}; config and weights do not belong together")
        self._found = dict(found)

    def __getitem__(self, module: str) -> Mapping[str, Tensor]:
        return self._found[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    @property
    def modules(self) -> list[str]:
        """Return the modules, without what they share.

        Raises:
            AdapterError: there are none.
        """
        found = [module for module in self if module != SHARED]
        if not found:
            raise AdapterError(f"{self.path}: has what modules of {self.kind} share and no module; it is incomplete")
        return found

    def of(self, module: str, *names: str) -> list[Tensor]:
        """Return these parts of a module.

        Raises:
            AdapterError: the module lacks one of them.
        """
        found = self._found.get(module, {})
        if lacking := [name for name in names if name not in found]:
            name = module.removeprefix(PREFIX)
            raise AdapterError(f"{self.path}: {name} has no {lacking[0]}; the file is incomplete, save it again")
        return [found[name] for name in names]

    def require(self, module: str, fits: bool) -> None:
        """Refuse a module whose tensors do not fit each other.

        Raises:
            AdapterError: the module's tensors do not fit each other.
        """
        if not fits:
            shapes = ", ".join(f"{part} {list(t.shape)}" for part, t in self._found[module].items())
            name = module.removeprefix(PREFIX)
            raise AdapterError(f"{self.path}: {name} has {shapes}, which make no {self.kind}; the file is damaged")


def check_size(module: str, factors: Factors, path: Path) -> None:
    """Refuse factors that are too large.

    Raises:
        AdapterError: factors that are to be made of smaller ones would be larger than any model's weight.
    """
    if factors.size > MOST:
        raise AdapterError(
            f"{path}: {module.removeprefix(PREFIX)} comes to {factors.size:.3g} numbers as a LoRA of rank "
            f"{factors.rank}, of at most {MOST:.3g}; no weight is that large, the file is damaged"
        )


def number(config: Mapping[str, Any], field: str, path: Path, default: Any = None) -> float:
    """Return a field of the config that is a positive number.

    Raises:
        AdapterError: the field holds no positive number.
    """
    return positive(config.get(field, default), field, path)


def positive(value: Any, what: str, path: Path) -> float:
    if not is_scale(value):
        raise AdapterError(f"{path}: {what} is {repr(value)[:80]}; it must be a positive number")
    return float(value)


def whole(config: Mapping[str, Any], field: str, path: Path) -> int:
    """Return the field as a whole number, or 0 if it holds none.

    Raises:
        AdapterError: the field holds something else.
    """
    value = config.get(field) or 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise AdapterError(f"{path}: {field} is {repr(value)[:80]}; it must be a whole number")
    return value


def are_indices(t: Tensor, count: int) -> bool:
    """Whether a tensor holds whole numbers that are indices of `count` things, at least one of them."""
    whole_numbers = not t.is_floating_point() and t.dtype != torch.bool and t.numel() > 0
    return whole_numbers and 0 <= int(t.min()) <= int(t.max()) < count


def common(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of one of PEFT's configs that LoRA's config has too."""
    bias = str(config.get("bias") or "none")
    kept = {field: config[field] for field in _KEPT if field in config}
    return {**kept, "bias": "lora_only" if bias.endswith("_only") else bias}


def folded(
    config: Mapping[str, Any], modules: Mapping[str, Factors], rest: Mapping[str, Make], notes: list[str], path: Path
) -> Folded:
    """Return the plain LoRA of these modules, named as keys are. `rest` are tensors that stay as they are.

    Raises:
        AdapterError: it would be larger than any model, `check_size`.
    """
    for module, factors in modules.items():
        check_size(module, factors, path)
    named = {module.removeprefix(PREFIX): factors for module, factors in modules.items()}
    fields = rank_config(
        {name: f.rank for name, f in named.items()},
        {name: alpha_for(f.scaling, f.rank, False) for name, f in named.items()},
    )
    new = common(config) | {"peft_type": "LORA", **fields._asdict()}
    if new.get("target_modules") is None:
        new["target_modules"] = sorted(named)
    makers = dict(rest)
    for module, factors in modules.items():
        makers |= {f"{module}.lora_A.weight": factors.a, f"{module}.lora_B.weight": factors.b}
    return Folded(new, Lazy(makers), notes)

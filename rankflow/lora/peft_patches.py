"""Every patch of PEFT: the methods that are wrapped, why, and the versions of PEFT that was tried with.

Methods are wrapped on their classes, once a process: the Trainer loads and saves through them before any callback runs,
and people call them by hand. Models and adapters that no run manages pass through. What happens around a method is
given by the package that needs it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from transformers import PreTrainedModel

Method = Callable[..., Any]


@dataclass(frozen=True)
class Patch:
    """Methods that are wrapped for one reason.

    methods: class and name of each. why: what goes wrong without it. tests: which tests turn red without it. tried: the
    minor versions of PEFT that those tests have passed with.
    """

    methods: tuple[tuple[type, str], ...]
    why: str
    tests: tuple[str, ...]
    tried: tuple[str, ...]

    def install(self, around: Callable[[Method], Method]) -> None:
        """Put `around(method)` in the place of each method, unless that was done already."""
        for cls, name in self.methods:
            method = getattr(cls, name)
            if getattr(method, "_rankflow_patch", None) is self:
                continue
            wrapped = functools.wraps(method)(around(method))
            wrapped._rankflow_patch = self  # type: ignore[attr-defined]
            setattr(cls, name, wrapped)


LOADING = Patch(
    ((PeftModel, "load_adapter"),),
    why="PEFT refuses tensors of other ranks and ignores the saved scaling, and the Trainer resumes through it",
    tests=(
        "tests/training/test_trainer.py::test_resume_is_bit_for_bit_across_growth_and_squeeze",
        "tests/training/test_trainer.py::test_best_any_keeps_the_trainers_choice_warns_and_restores_that_layout",
    ),
    tried=("0.18", "0.19", "0.20", "0.21"),
)
SAVING = Patch(
    ((PeftModel, "save_pretrained"), (PreTrainedModel, "save_pretrained")),
    why="a file would hold factors as they are before their gate, which no reader of plain LoRA applies",
    tests=(
        "tests/gating/test_gates.py::test_forward_merge_and_files_see_the_gated_factors_and_state_dict_the_raw_ones",
    ),
    tried=("0.18", "0.19", "0.20", "0.21"),
)
MERGING = Patch(
    tuple((BaseTuner, name) for name in ("merge_adapter", "unmerge_adapter", "merge_and_unload")),
    why="base weights would get factors with the noise that their gate drew for the last forward",
    tests=("tests/gating/test_gates.py::test_after_a_noisy_forward_files_and_merges_hold_what_has_no_noise",),
    tried=("0.18", "0.19", "0.20", "0.21"),
)
PATCHES = (LOADING, SAVING, MERGING)


def wrap_loading(load_with: Method) -> None:
    """Call `load_with(load, model, model_id, adapter_name, *args, **kwargs)` in place of `PeftModel.load_adapter`.

    `load` is PEFT's own method.
    """

    def around(load: Method) -> Method:
        def load_adapter(self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
            return load_with(load, self, model_id, adapter_name, *args, **kwargs)

        return load_adapter

    LOADING.install(around)


def wrap_saving(written: Callable[[nn.Module, Mapping[str, Tensor] | None], dict[str, Tensor] | None]) -> None:
    """Save adapters with the state dict that `written(model, state)` returns, or with their own where it returns None.
    `state` is the one that `save_pretrained` was given, if any."""

    def around(save: Method) -> Method:
        def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
            state = written(self, kwargs.get("state_dict"))
            return save(self, *args, **(kwargs if state is None else {**kwargs, "state_dict": state}))

        return save_pretrained

    SAVING.install(around)


def wrap_merging(prepare: Callable[[nn.Module], None]) -> None:
    """Call `prepare(model)` before adapters are merged into base weights, or taken out of them."""

    def around(merge: Method) -> Method:
        def prepared(self: Any, *args: Any, **kwargs: Any) -> Any:
            prepare(self)
            return merge(self, *args, **kwargs)

        return prepared

    MERGING.install(around)

"""What is compared. Every arm ends at the same number of adapter parameters, or where its method counts ranks at the
same total rank; only the way there differs.

All arms share the model, its modules, batches, steps, head and schedule (`PROTOCOL`), and alpha / r = 2. PEFT's AdaLoRA
divides by the rank it began with, whatever it prunes, so its alpha is 2 x that rank: the same effective scale.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import yaml

from rankflow.config.load import shipped

PROTOCOL: dict[str, Any] = {
    "modules": "all linears of the encoder",
    "batch": 8,
    "scale": 2.0,  # alpha / r
    "head_lr": 5e-3,
    "warmup": 0.05,  # of the steps, then linearly down to 0
    "clip": 1.0,
    "optimizer": "AdamW, no weight decay",
}

Kind = Literal["lora", "adalora", "policy", "post"]


@dataclass(frozen=True)
class Arm:
    """`start`: rank at the first step, as a multiple of the final mean rank, at least 1.

    A policy is its shipped file with `when` and `params` changed where given, None leaving one out; its budget, where
    the file has one or `budget` says so, is the parameters of LoRA at the final rank, and `limits` are multiples of
    that rank. `version` goes up when the code behind an arm changes what it computes.
    """

    title: str
    tier: int
    kind: Kind = "policy"
    policy: str = ""
    start: float = 1.0
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3)
    when: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    limits: tuple[float, float] | None = None
    budget: bool = False
    version: int = 1

    @property
    def available(self) -> bool:
        return self.kind != "policy" or self.policy in _files()

    def start_rank(self, rank: int) -> int:
        return max(1, round(self.start * rank))

    def settings(self, rank: int, params: int) -> dict[str, Any]:
        """The policy mapping for a final mean rank of `rank`, which is `params` parameters; {} where there is none."""
        if self.kind != "policy" or not self.available:
            return {}
        mapping = dict(_files()[self.policy])
        for key, changes in (("when", self.when), ("params", self.params)):
            if changes:
                changed = {**mapping.get(key, {}), **changes}
                mapping[key] = {name: value for name, value in changed.items() if value is not None}
        if self.limits is not None:
            low, high = (max(1, round(times * rank)) for times in self.limits)
            mapping["limits"] = {"*": {"min": low, "max": high}}
        if self.budget or "budget" in mapping:
            mapping["budget"] = {"max_params": params}
        return mapping


@cache
def _files() -> dict[str, dict[str, Any]]:
    """The shipped policy files, by name."""
    return {name: yaml.safe_load(path.read_text(encoding="utf-8")) for name, path in shipped().items()}


ARMS: dict[str, Arm] = {
    "lora": Arm("LoRA, fixed rank", 1, "lora"),
    "peft_adalora": Arm("PEFT AdaLoRA, from 1.5 x", 1, "adalora", start=1.5, rates=(4e-3, 8e-3, 1.6e-2, 3.2e-2)),
    "increlora": Arm("IncreLoRA, from 1/4", 1, policy="increlora", start=0.25),
    "squeeze": Arm("LoRA-Squeeze, from 4 x", 1, policy="squeeze", start=4, version=2),
    # Its budget closes directions, so that gates may follow the learning rate that is swept
    "sora": Arm("SoRA, from 2 x", 1, policy="sora", start=2, budget=True, params={"lam": 1.0, "gate_lr": None}),
    "diffora": Arm("DiffoRA, from 2 x", 1, policy="diffora", start=2),
    "colora": Arm("CoLoRA", 1, policy="colora", version=2),
    "adalora": Arm("AdaLoRA, from 1.5 x", 2, policy="adalora", start=1.5),
    "elalora": Arm("ElaLoRA", 2, policy="elalora"),
    "rigl": Arm("RigL", 2, policy="rigl"),
    "gora": Arm("GoRA", 2, policy="gora", limits=(0.5, 4)),
    "eva": Arm("EVA", 2, policy="eva"),
    "lisa": Arm("LISA", 2, policy="lisa"),
    "bayesian_lora": Arm("Bayesian-LoRA, from 2 x", 2, policy="bayesian_lora", start=2),
    "post": Arm("one run, squeezed after its end", 0, "post", rates=()),
}

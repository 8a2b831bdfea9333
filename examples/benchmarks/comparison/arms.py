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

from comparison.settings import Setting
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

HEAD_FIRST = 0.1  # of the steps, with the adapters held still: as long as gradient_start waits

EARLIER_CUTS = {"start": "40%", "every": "10%", "stop": "80%"}  # the shipped ones, when these runs were made
SMALL = (2.5e-4, 5e-4, 1e-3, 2e-3)  # rates of arms whose steps are longer

Kind = Literal["lora", "adalora", "policy", "post"]
SPECIAL = ("config", "b_rate", "modules", "rates_of", "head_first")


@dataclass(frozen=True)
class Arm:
    """`start`: rank at the first step, as a multiple of the final mean rank, at least 1.

    A policy is its shipped file with `when` and `params` changed where given, None leaving one out; its budget, where
    the file has one or `budget` says so, is the parameters of LoRA at the final rank, and `limits` are multiples of
    that rank. `version` goes up when the code behind an arm changes what it computes. `spelt_out` is what was a default
    when an arm's runs were recorded and is none any more: it is run so, and their lines stay theirs.

    Of plain LoRA: `config` goes to PEFT's LoraConfig, `b_rate` is the rate of B over that of A (LoRA+), `modules` the
    share of the modules, drawn by the seed, that have adapters at all, and `rates_of` names an arm after whose ranks
    each module's rate goes, as (rank / mean rank)^1/2, while all ranks stay equal.
    `head_first`: the share of the steps in which only the head is trained, before anything else is looked at.
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
    spelt_out: dict[str, dict[str, Any]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    b_rate: float = 1.0
    modules: float = 1.0
    rates_of: str = ""
    head_first: float = 0.0
    step: str = ""  # held, capped or free, which it is if left out

    @property
    def available(self) -> bool:
        policies = (self.policy, ARMS[self.rates_of].policy if self.rates_of else "")
        return all(name in _files() for name in policies if name)

    def runs_on(self, setting: Setting) -> bool:
        """PEFT starts adapters of convolutions in one way only."""
        return setting.linears or "init_lora_weights" not in self.config

    @property
    def special(self) -> list[dict[str, Any]]:
        """What only some arms have: [] for the others, so that their lines stay theirs."""
        plain = Arm("", 0)
        found = {name: getattr(self, name) for name in SPECIAL if getattr(self, name) != getattr(plain, name)}
        if self.rates_of:
            found["rates_of"] = ARMS[self.rates_of].settings(1, 1)
        return [found] if found else []

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
        if self.step:
            mapping["step"] = self.step
        if self.budget or "budget" in mapping:
            mapping["budget"] = {"max_params": params}
        return mapping

    def run_as(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The settings with what is spelt out, and the step free where the arm does not say: so they were recorded."""
        return {
            "step": "free",
            **settings,
            **{key: {**settings.get(key, {}), **more} for key, more in self.spelt_out.items()},
        }


@cache
def _files() -> dict[str, dict[str, Any]]:
    """The shipped policy files, by name."""
    return {name: yaml.safe_load(path.read_text(encoding="utf-8")) for name, path in shipped().items()}


ARMS: dict[str, Arm] = {
    "lora": Arm("LoRA, fixed rank", 1, "lora"),
    "peft_adalora": Arm("PEFT AdaLoRA, from 1.5 x", 1, "adalora", start=1.5, rates=(4e-3, 8e-3, 1.6e-2, 3.2e-2)),
    "increlora": Arm("IncreLoRA, from 1/4", 1, policy="increlora", start=0.25),
    "squeeze": Arm("LoRA-Squeeze, from 4 x", 1, policy="squeeze", start=4, when=EARLIER_CUTS, version=2),
    # Its budget closes directions, so that gates may follow the learning rate that is swept
    "sora": Arm(
        "SoRA, from 2 x",
        1,
        policy="sora",
        start=2,
        budget=True,
        params={"lam": 1.0, "gate_lr": None},
        spelt_out={"when": {"stop": "100%"}},
    ),
    "diffora": Arm("DiffoRA, from 2 x", 1, policy="diffora", start=2),
    "colora": Arm("CoLoRA", 1, policy="colora", version=2),
    "adalora": Arm("AdaLoRA, from 1.5 x", 2, policy="adalora", start=1.5),
    "elalora": Arm("ElaLoRA", 2, policy="elalora"),
    "rigl": Arm("RigL", 2, policy="rigl"),
    "gora": Arm("GoRA", 2, policy="gora", limits=(0.5, 4)),
    "eva": Arm("EVA", 2, policy="eva"),
    "lisa": Arm("LISA", 2, policy="lisa"),
    "bayesian_lora": Arm("Bayesian-LoRA, from 2 x", 2, policy="bayesian_lora", start=2, version=2),
    # Our own, and what its gain is made of. Where there is a new head it looks after a tenth of the run
    "gradient_start": Arm("gradient_start", 3, policy="gradient_start"),
    "gradient_start_at_once": Arm(
        "gradient_start, head not first", 3, policy="gradient_start", params={"head_first": 0}
    ),
    "uniform_directions": Arm(
        "uniform ranks, A along the gradient", 3, policy="gradient_start", params={"at_least": 1, "at_most": 1}
    ),
    "allocated_random": Arm("the same ranks, A at random", 3, policy="gora", limits=(0.5, 4), head_first=HEAD_FIRST),
    "lora_rates": Arm("LoRA, the allocation's rates", 3, "lora", rates_of="gradient_start_at_once"),
    "lora_head_first": Arm("LoRA, head first", 3, "lora", head_first=HEAD_FIRST),
    # Whether other ranks leave the length of the model's steps as it is: held_step.py
    **{
        f"{name}_{step}": Arm(f"{title}, step {step}", 6, policy=name, start=start, step=step)
        for name, title, start in (
            ("squeeze", "LoRA-Squeeze, from 4 x", 4),
            ("increlora", "IncreLoRA, from 1/4", 0.25),
            ("adalora", "AdaLoRA, from 1.5 x", 1.5),
        )
        for step in ("held", "free")
    },
    # Single claims of papers, in miniature
    "random_modules": Arm("LoRA of twice the rank on half the modules, at random", 5, "lora", start=2, modules=0.5),
    "squeeze_equal": Arm("LoRA-Squeeze, equally long at every rank", 5, policy="squeeze", start=4),
    "eva_rho_1": Arm("EVA, rho 1: its directions, uniform ranks", 5, policy="eva", params={"rho": 1.0}),
    "eva_rho_2": Arm("EVA, rho 2", 5, policy="eva", params={"rho": 2.0}),
    # Peers, as PEFT has them
    "peft_eva": Arm("PEFT EVA", 4, "lora", config={"init_lora_weights": "eva"}),
    "peft_lora_ga": Arm("PEFT LoRA-GA", 4, "lora", config={"init_lora_weights": "lora_ga"}),
    "peft_pissa": Arm("PEFT PiSSA", 4, "lora", config={"init_lora_weights": "pissa"}, rates=SMALL),
    "lora_plus": Arm("LoRA+, B at 16 x", 4, "lora", b_rate=16.0, rates=SMALL),
    "rslora": Arm("rsLoRA", 4, "lora", config={"use_rslora": True}),
    "post": Arm("one run, squeezed after its end", 0, "post", rates=()),
}

"""The gate of Bayesian-LoRA: it learns which directions a module keeps, and how many bits each of its factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rankflow.plans.layout import Slot
from rankflow.policies import _quantizer as bits
from rankflow.policies._quantizer import chain, is_on, probability, sample
from rankflow.policies.gate import Draw, Gate, Theta

_LEAST_RANGE = 1e-6  # ranges are positive
_E = 2  # in `bits` and `range` of theta: A, B, and the diagonal where there is one


@dataclass(frozen=True, kw_only=True)
class BitsAndRank(Gate):
    """DeltaW = scaling * Q(B) diag(z Q(E)) Q(A): a hard-concrete gate z per direction, and per tensor a quantiser Q
    whose bits are hard-concrete gates too (`rankflow.policies._quantizer`). Without `diagonal` there is no E.

    Gates are drawn anew for every training forward up to step `last`; in evaluation, and after that step, they are 0 or
    1, and A' and B' are what `stored` says.

    Parameters of a module of r directions and of its T = 2 or 3 tensors A, B, E: logits `rank` ``[r]`` and `bits`
    ``[T, 4]``; `range` ``[T]``; `e` ``[r]``; and constants, `size` ``[3]``: r to begin with, in and out features.
    """

    nested: bool = False
    diagonal: bool = False
    mu: float = 1e-4
    by_cost: bool = False  # whether bits weigh what they cost in multiply-accumulates, or all alike
    first: float = 6.0  # logit that gates begin with
    gate_lr: float = 1e-3
    range_lr: float = 1e-3
    zeros: float = 0.1  # range of a factor of zeros
    last: int = 0  # the last step whose update trains logits

    per_direction: ClassVar[frozenset[str]] = frozenset({"rank", "e"})

    def init(self, slot: Slot, generator: torch.Generator) -> dict[str, Tensor]:
        tensors = 3 if self.diagonal else 2
        inputs = 0 if slot.kind == "embedding" else slot.in_features  # rows that are looked up are not multiplied
        theta = {
            "rank": torch.full((slot.rank,), self.first),
            "bits": torch.full((tensors, len(bits.WIDTHS)), self.first),
            "range": torch.full((tensors,), 1.5),  # E is 1, which with a range of 1.5 is on every grid
            "size": torch.tensor([float(slot.rank), inputs, slot.out_features]),
        }
        return {**theta, "e": torch.ones(slot.rank)} if self.diagonal else theta

    def calibrate(self, theta: Theta, A: Tensor, B: Tensor) -> Theta:
        """Ranges of A and B: their largest entries, or `zeros` where all are 0, as those of a new LoRA's B."""
        largest = torch.stack([A.float().abs().amax(), B.float().abs().amax()])
        largest = torch.where(largest > 0, largest.clamp(min=_LEAST_RANGE), self.zeros)
        return {"range": torch.cat([largest, theta["range"][_E:]])}

    # -- in the forward pass ----------------------------------------------------------------------------------------

    def noisy(self, step: int) -> bool:
        return step <= self.last

    def noise(self, theta: Theta, generator: torch.Generator) -> dict[str, Tensor]:
        return {key: torch.rand(theta[key].shape, generator=generator) for key in ("rank", "bits")}

    def draw_one(self, theta: Theta, noise: Draw | None) -> dict[str, Tensor]:
        """`value` ``[r]``, `range` ``[T]`` and, with noise, `chain` ``[T, 4]``, else `step` ``[3]``."""
        if noise is None:
            steps = self._steps(theta)
            return {"value": steps[_E] * self._diagonal(theta, steps), "range": theta["range"], "step": steps}
        z = sample(theta["rank"], noise["rank"])
        z = chain(z) if self.nested else z
        bit_chain = chain(sample(theta["bits"], noise["bits"]))
        e = bits.nested(theta["e"], theta["range"][_E], bit_chain[_E]) if self.diagonal else 1.0
        return {"value": z * e, "range": theta["range"], "chain": bit_chain}

    def a(self, draw: Draw, A: Tensor) -> Tensor:
        return (draw["value"][:, None] * self._quantised(draw, 0, A)).to(A.dtype)

    def b(self, draw: Draw, B: Tensor) -> Tensor:
        return self._quantised(draw, 1, B).to(B.dtype)

    def _quantised(self, draw: Draw, tensor: int, x: Tensor) -> Tensor:
        c = draw["range"][tensor]
        if "step" in draw:
            return bits.rounded(x.float(), c, draw["step"][tensor])
        return bits.nested(x.float(), c, draw["chain"][tensor])

    def _chain(self, theta: Theta) -> Tensor:
        """Gates of bits at inference, ``[T, 4]`` of 0 and 1."""
        return chain(is_on(theta["bits"]).float())

    def _steps(self, theta: Theta) -> Tensor:
        """Steps of A, B and E at inference, ``[3]``; without a diagonal that of E is 1."""
        steps = bits.step(theta["range"], self._chain(theta))
        return steps if self.diagonal else torch.cat([steps, steps.new_ones(1)])

    def _diagonal(self, theta: Theta, steps: Tensor) -> Tensor:
        """E at inference in whole steps ``[r]``, 0 where gates are closed."""
        ones = torch.ones_like(theta["rank"])
        e = bits.integers(theta["e"], theta["range"][_E], steps[_E]) if self.diagonal else ones
        return torch.where(self.open(theta), e, 0.0)

    def open(self, theta: Theta) -> Tensor:
        on = is_on(theta["rank"])
        return chain(on) if self.nested else on

    def score(self, theta: Theta) -> Tensor:
        """Q of every direction: the probability that its gate, and with `nested` every one before it, is above 0."""
        q = probability(theta["rank"])
        return chain(q) if self.nested else q

    # -- training ---------------------------------------------------------------------------------------------------

    def trains(self, key: str, step: int) -> bool:
        return {"e": True, "range": True, "size": False}.get(key, self.noisy(step))

    def rate(self, key: str, lr: float) -> float:
        return {"e": lr, "range": self.range_lr}.get(key, self.gate_lr)

    def prox(self, theta: Theta, lr: float, step: int) -> Theta:
        return {"range": theta["range"].clamp(min=_LEAST_RANGE)}

    def penalty(self, theta: Mapping[str, Theta], step: int) -> Tensor | None:
        """mu * sum over modules and tensors of R = 1/r sum_i Q_i (w2 + w4 q4 + w8 q4 q8 + ...), Q_i and q_b the
        probabilities that gates are above 0. It bounds the divergence from a prior that holds gates for closed."""
        if not theta or not self.noisy(step):
            return None
        first, *widths = (2, *bits.WIDTHS) if self.by_cost else (1,) * (1 + len(bits.WIDTHS))
        macs = [self._macs(t) for t in theta.values()]
        device = macs[0].device
        most = torch.stack([m.amax().to(device) for m in macs]).amax()
        terms = []
        for t, m in zip(theta.values(), macs, strict=True):
            q = chain(probability(t["bits"])).unbind(-1)
            charged = first + torch.stack([w * x for w, x in zip(widths, q, strict=True)]).sum(0)  # [T]
            weight = m / most.to(m.device) if self.by_cost else 1.0
            terms.append((self.score(t).sum() / t["size"].detach()[0] * (weight * charged).sum()).to(device))
        return self.mu * torch.stack(terms).sum()

    def _macs(self, theta: Theta) -> Tensor:
        """Multiply-accumulates per token of every tensor at the rank that the module began with, ``[T]``."""
        rank, inputs, outputs = theta["size"].detach().unbind()
        return rank * torch.stack([inputs, outputs, torch.ones_like(rank)][: len(theta["range"])])

    # -- what came of it ----------------------------------------------------------------------------------------------

    def report(self, theta: Theta) -> dict[str, float]:
        """Open directions, bits of every tensor, and bit operations per token (`bits.bit_operations`): of the adapter,
        the same at the rank it began with and 32 bits, of the frozen weights, and relative to 32 bits without and with
        the latter."""
        rank, (first, inputs, outputs) = int(self.open(theta).sum()), map(int, theta["size"].tolist())
        chosen = dict(zip(("bits_a", "bits_b", "bits_e"), bits.width(self._chain(theta)).tolist(), strict=False))
        bops = bits.bit_operations(rank, inputs, outputs, **chosen)
        full = bits.bit_operations(first, inputs, outputs, bits_e=bits.FULL if self.diagonal else 0)
        frozen = bits.bit_operations(0, inputs, outputs, frozen=True)
        return {"rank": rank, **chosen, **_operations(bops, full, frozen)}

    def total(self, reports: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """Open directions and bit operations of the whole adapter; bits belong to a tensor each."""
        summed = [math.fsum(r[key] for r in reports.values()) for key in ("rank", "bops", "bops_fp32", "bops_frozen")]
        return {"rank": summed[0], **_operations(*summed[1:])} if reports else {}

    def stored(self, theta: Theta, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        """Integers `A`, `B` and `E` ``[r]``, and the `step` and `bits` of each, ``[3]``: A' = (E step_E) (A step_A) row
        by row, B' = B step_B, every product rounded to float32. Without a diagonal E is 0 or 1, at 2 bits."""
        c, steps = theta["range"], self._steps(theta)
        width = bits.width(self._chain(theta))
        return {
            "A": bits.integers(A.float(), c[0], steps[0]),
            "B": bits.integers(B.float(), c[1], steps[1]),
            "E": self._diagonal(theta, steps),
            "step": steps,
            "bits": width if self.diagonal else torch.cat([width, width.new_full((1,), 2)]),
        }


def _operations(bops: float, full: float, frozen: float) -> dict[str, float]:
    return {
        "bops": bops,
        "bops_fp32": full,
        "bops_frozen": frozen,
        "relative_bops": bops / full,
        "relative_bops_with_frozen": (bops + frozen) / (full + frozen),
    }

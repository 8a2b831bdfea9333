"""New directions start slowly, and other ranks leave the step's length: updates, not gradients, are scaled.

The updates of a new direction go from 1 / warmup up to 1. Those of the whole adapter are times (r0 / r)^p where the
step is held: r is the mean rank, r0 the one that the learning rate is for, and r^p how the optimizer's step of DeltaW
grows with the rank.

Scaling gradients would do nothing under an optimizer that divides by their size. So the young rows of A and columns of
B are noted before an optimizer step, and what the step did to them is scaled afterwards, in float32 or better. So is
what it did to points beside them: an average of scaled steps is the average scaled.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rankflow.lora.adapter import Adapter
from rankflow.lora.dtensor import part, rows
from rankflow.lora.site import Site
from rankflow.lora.transaction import Transaction
from rankflow.optim.optimizer_state import OptimizerState
from rankflow.plans.ops import Drop, Grow, Keep, Op, Open, Refactor


class Youth(NamedTuple):
    """Optimizer steps a direction has taken, and after how many it is grown up."""

    age: int
    span: int

    @property
    def scale(self) -> float:
        """The factor of the direction's next update."""
        return min(1.0, (self.age + 1) / self.span) if self.span > 0 else 1.0


_GROWN = Youth(0, 0)


@dataclass(frozen=True)
class _Note:
    """What `before_step` leaves for `after_step`, of one factor in its stored shape."""

    parameter: nn.Parameter
    dim: int  # which counts directions
    index: Tensor | None  # along it, of the directions whose update is scaled; all of them
    scale: Tensor | float  # broadcastable
    old: Tensor  # those directions before the step, times the weight decay that is not scaled; of shards this process's
    points: dict[str, Tensor]  # and of the points that the optimizer keeps beside the parameter, by state key


class Ramps:
    """Ages of young directions. The controller calls `before_step` and `after_step` around each real optimizer step.

    Through later resizes of a module, kept directions keep their age. A refactorisation mixes directions, so all of
    the module take the age of the youngest.

    Under an optimizer whose step depends on the shape of a parameter (Muon), the module's factor is held at what it
    was at its first rank, so that a resize does not move the step size.
    """

    def __init__(self, adapter: Adapter, optimizer_state: OptimizerState | None):
        self._adapter = adapter
        self._optimizer_state = optimizer_state
        self._young: dict[str, tuple[Youth, ...]] = {}  # modules with a young direction, one Youth per direction
        self._held: dict[str, int] = {}  # resized module -> rank whose shape factor is held
        self.rate_rank: float | None = None  # mean rank that the learning rate is for; None: the step is free
        self._capped = False  # only longer steps are scaled
        self._mean_rank = self._mean()
        self._notes: list[_Note] = []

    def __bool__(self) -> bool:
        """Whether there is anything to do around the next step."""
        return bool(self._young or self._held or self.too_long != 1)

    @property
    def too_long(self) -> float:
        """How many times the mean rank is the one that the learning rate is for; 1 where that is to change nothing."""
        if self.rate_rank is None or not self._mean_rank:
            return 1.0
        times = self._mean_rank / self.rate_rank
        return max(1.0, times) if self._capped else times

    def hold(self, rate_rank: float | None, *, capped: bool) -> None:
        """Hold the length of the step at what it is at this mean rank, or only keep it from being longer if `capped`;
        None: let it go."""
        self.rate_rank, self._capped = rate_rank, capped

    def _mean(self) -> float:
        sites = self._adapter.sites
        return sum(site.rank for site in sites.values()) / len(sites) if sites else 0.0

    def before_step(self) -> None:
        self._notes = []
        if not self:
            return
        for name in self._adapter.sites if self.too_long != 1 else {**self._young, **self._held}:
            site = self._adapter.sites[name]
            if site.rank == 0:  # within a capacity
                continue
            for role, dim in (("A", 0), ("B", 1)):
                if (p := site.tensors().get(role)) is not None and p.grad is not None:
                    self._note(name, site, p, dim)

    def after_step(self) -> None:
        """Scale what the step did to young directions. It must follow a step that was really taken."""
        with torch.no_grad():
            for note in self._notes:
                moved = [(note.parameter, note.old)]
                if note.points and self._optimizer_state is not None:
                    state = self._optimizer_state.optimizer.state[note.parameter]
                    moved += [(state[key], old) for key, old in note.points.items()]
                for t, old in ((part(t), old) for t, old in moved):
                    if note.index is None:
                        t.copy_(old + (t.to(old.dtype) - old) * note.scale)
                        continue
                    step = t.index_select(note.dim, note.index).to(old.dtype) - old
                    t.index_copy_(note.dim, note.index, (old + step * note.scale).to(t.dtype))
        stepped = {id(note.parameter) for note in self._notes}
        self._notes = []
        for name, youths in list(self._young.items()):
            if not stepped & {id(p) for p in self._adapter.sites[name].tensors().values()}:
                continue
            older = tuple(Youth(y.age + 1, y.span) for y in youths)
            if any(y.scale < 1 for y in older):
                self._young[name] = older
            else:
                del self._young[name]

    def _note(self, name: str, site: Site, p: nn.Parameter, dim: int) -> None:
        youths = self._young.get(name, (_GROWN,) * site.rank)
        held, decay = self._factors(name, site, p, dim)
        scales = [youth.scale * held for youth in youths]
        young = [i for i, scale in enumerate(scales) if scale != 1.0]
        if not young:
            return
        dtype = torch.promote_types(p.dtype, torch.float32)
        if len(set(scales)) == 1:  # as on most steps where there is anything to scale
            points = {key: part(t.detach()).to(dtype, copy=True) for key, t in self._points(p).items()}
            self._notes.append(_Note(p, dim, None, scales[0], part(p.detach()).to(dtype) * decay, points))
            return
        r, experts = site.capacity, range(site.experts)  # stored expert-major in A, expert-minor in B
        index = [e * r + i if dim == 0 else i * len(experts) + e for i in young for e in experts]
        scales = [scales[i] for i in young for _ in experts]
        if dim == 0:
            here = rows(p)
            scales = [scale for i, scale in zip(index, scales, strict=True) if i in here]
            index = [i - here.start for i in index if i in here]
        at = torch.tensor(index, dtype=torch.long, device=p.device)
        scale = torch.tensor(scales, dtype=dtype, device=p.device)
        scale = scale.reshape([-1 if d == dim else 1 for d in range(p.ndim)])
        points = {
            key: part(t.detach()).index_select(dim, at).to(dtype)  # a copy: steps write in place
            for key, t in self._points(p).items()
        }
        self._notes.append(_Note(p, dim, at, scale, part(p.detach()).index_select(dim, at).to(dtype) * decay, points))

    def _points(self, p: nn.Parameter) -> dict[str, Tensor]:
        """Return what moves beside `p` in a step. What is not there yet, the step makes as a copy of `p`."""
        if self._optimizer_state is None or self._optimizer_state.handler is None:
            return {}
        state = self._optimizer_state.optimizer.state.get(p, {})
        return {key: state.get(key, p) for key in self._optimizer_state.handler.points}

    def _factors(self, name: str, site: Site, p: nn.Parameter, dim: int) -> tuple[float, float]:
        """The correction of the step for the parameter's shape, and the part of weight decay that is not scaled."""
        handler = self._optimizer_state.handler if self._optimizer_state is not None else None
        if self._optimizer_state is None or handler is None:
            return 1.0, 1.0
        group = self._optimizer_state.groups.of(p)
        shape = list(p.shape)
        shape[dim] = shape[dim] // site.rank * self._held.get(name, site.rank)
        held = handler.shape_factor(group, torch.Size(shape)) / handler.shape_factor(group, p.shape)
        return held / self.too_long ** handler.rank_exponent(group), handler.decay(group)

    # -- resizes ----------------------------------------------------------------------------------------------------

    def after(self, name: str, ops: Sequence[Op], rank: int, warmup: int, rewarm: int | None) -> tuple[Youth, ...]:
        """Return the youth of each direction of a module of `rank` after `ops`; with `rewarm`, all of them are new."""
        youths = self._young.get(name, (_GROWN,) * rank)
        for op in ops:
            match op:
                case Keep():
                    youths = tuple(youths[i] for i in op.idx)
                case Refactor():
                    youngest = min(youths, key=lambda y: y.scale, default=_GROWN)
                    youths = (youngest,) * op.N.shape[-2]
                case Grow():
                    youths += (Youth(0, warmup),) * op.n
                case Open():
                    youths = tuple(Youth(0, warmup) if i in op.idx else y for i, y in enumerate(youths))
                case Drop():
                    youths = ()
        return youths if rewarm is None else (Youth(0, rewarm),) * len(youths)

    def write(
        self, transaction: Transaction, youths: Mapping[str, tuple[Youth, ...]], before: Mapping[str, int]
    ) -> None:
        """Write what `after` returned for modules that had the ranks `before`."""
        handler = self._optimizer_state.handler if self._optimizer_state is not None else None
        young = {n: y for n, y in {**self._young, **youths}.items() if any(i.scale < 1 for i in y)}
        if self._optimizer_state is not None and handler is None and young:
            warnings.warn(
                f"{self._optimizer_state.title} is an optimizer rankflow does not know: new directions start at full "
                "speed",
                stacklevel=4,
            )
        transaction.contents(self._young, young if handler is not None else {})
        if handler is not None and handler.shape_dependent:
            transaction.contents(self._held, {**{n: before[n] for n in youths if before[n]}, **self._held})
        transaction.attr(self, "_mean_rank", self._mean())

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "young": {name: [[y.age, y.span] for y in youths] for name, youths in self._young.items()},
            "held": dict(self._held),
            "rate_rank": self.rate_rank,
            "capped": self._capped,
        }

    def load_state_dict(self, state: Mapping[str, Any], transaction: Transaction) -> None:
        transaction.keep(self, "_young", "_held", "_notes", "rate_rank", "_capped", "_mean_rank")
        self._notes = []
        self._young = {name: tuple(Youth(int(a), int(s)) for a, s in ys) for name, ys in state["young"].items()}
        self._held = {name: int(rank) for name, rank in state["held"].items()}
        self.rate_rank, self._capped = state.get("rate_rank"), bool(state.get("capped"))
        self._mean_rank = self._mean()

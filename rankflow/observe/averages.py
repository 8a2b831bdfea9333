"""Running averages of z z^T and d d^T of every module of one adapter, and how they follow a change of rank.

z = A x and d = s B^T g (see `rankflow.linalg.decompose`) are linear in the factors. So through A' = N A, B' = B M the
averages become N E[z z^T] N^T and M^T E[d d^T] M, exactly what the same tokens would have given had the change come
before them. Only growth brings directions of which nothing is known, so every direction has its own count of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankflow.lora.adapter import Adapter
from rankflow.lora.transaction import Transaction
from rankflow.plans.ops import Drop, Grow, Keep, Op, Open, Refactor, Share, Train
from rankflow.policies.observation import AVERAGED, Observation, Signal

_SUMS = frozenset({Signal.S_A, Signal.S_B, Signal.TOKENS})
MIX_EPS = 1e-3  # of the largest part of a mixed direction: smaller ones are not asked whether they were measured


def sources(signals: frozenset[Signal]) -> frozenset[Signal]:
    """Return the signals that the probes have to take so that `Averages.take` can give `signals`."""
    return signals - AVERAGED | _SUMS if signals & AVERAGED else signals


@dataclass(frozen=True, eq=False)
class Running:
    """Exponential averages over the tokens of one module, in float64. Nothing here waits for a device.

    `mean_zz` and `mean_dd` ``[*e, r, r]`` are positive semidefinite, always. `measured` ``[r]`` is how many tokens each
    direction's averages rest on, older ones counting for less; what is said of a direction at 0 means nothing. The
    three are the plain form: `Running(**running.tensors())` is the same again.

    Directions measured over the same tokens have their weighted mean. For a pair of which one has w_i tokens and the
    other, younger one w_j, the product is summed over those both were there for and divided by sqrt(w_i w_j): the pair
    seems less correlated than it is, by sqrt(w_j / w_i), until their counts have drawn level. Dividing by w_j would not
    have that bias, but could show directions as redundant that are not.
    """

    mean_zz: Tensor
    mean_dd: Tensor
    measured: Tensor

    @classmethod
    def empty(cls, rank: int, experts: Sequence[int] = (), device: torch.device | str | None = None) -> Running:
        """Return averages of nothing, for factors with leading dimensions `experts`."""
        zz, dd = (torch.zeros(*experts, rank, rank, dtype=torch.float64, device=device) for _ in range(2))
        return cls(zz, dd, zz.new_zeros(rank))

    def tensors(self) -> dict[str, Tensor]:
        return {"mean_zz": self.mean_zz, "mean_dd": self.mean_dd, "measured": self.measured}

    def add(self, S_A: Tensor, S_B: Tensor, tokens: Tensor, decay: float = 1.0) -> Running:
        """Return the averages after `tokens` ``[]`` more tokens, with sums S_A of z z^T and S_B of d d^T ``[*e, r,
        r]``.

        What was measured before counts `decay` times as much as before, in (0, 1]; 0 forgets it. Sums that are not
        finite, or of no token at all, change nothing. The result is on the sums' device.
        """
        zz, dd, measured = (t.to(S_A.device) for t in (self.mean_zz, self.mean_dd, self.measured))
        usable = S_A.isfinite().all() & S_B.isfinite().all() & (tokens > 0)
        total = decay * measured + tokens
        old, new = (decay * measured / total).sqrt(), total.rsqrt()

        def averaged(mean: Tensor, sums: Tensor) -> Tensor:
            mixed = old[:, None] * mean * old + new[:, None] * sums.double() * new
            return torch.where(usable, mixed, mean)

        return Running(averaged(zz, S_A), averaged(dd, S_B), torch.where(usable, total, measured))

    # -- through a resize -------------------------------------------------------------------------------------------

    def after(self, ops: Iterable[Op]) -> Running:
        """Return the averages of the directions that `ops` leave, in order."""
        out = self
        for op in ops:
            match op:
                case Keep():
                    out = out.keep(op.idx)
                case Refactor():
                    out = out.refactor(op.N, op.M)
                case Grow():
                    out = out.grow(op.n)
                case Open():
                    rest, back = op.apart(len(out.measured))
                    out = out.keep(rest).grow(len(op.idx)).keep(back)
                case Drop():
                    out = out.keep(())
                case Train() | Share():
                    pass
        return out

    def keep(self, idx: Sequence[int]) -> Running:
        at = torch.tensor(idx, dtype=torch.long, device=self.measured.device)
        return Running(self.mean_zz[..., at, :][..., at], self.mean_dd[..., at, :][..., at], self.measured[at])

    def refactor(self, N: Tensor, M: Tensor) -> Running:
        """Return the averages after A' = N A and B' = B M, N ``[*e, k, r]``, M ``[*e, r, k]``.

        A mixed direction is as measured as the least measured one of those that go into it in earnest: whose entry, in
        its row of N or its column of M, is above `MIX_EPS` of the largest there. One of whose two halves nothing is
        left, as in a revived direction, starts unmeasured: what the other half will do with it is not known.
        """
        N, M = (t.to(self.measured.device, torch.float64) for t in (N, M))
        parts = torch.stack([N, M.mT]).abs().flatten(0, -3)
        largest = parts.amax(-1, keepdim=True)
        into, whole = (parts > MIX_EPS * largest).any(0), (largest > 0).all(0).squeeze(-1)
        least = torch.where(into, self.measured, torch.inf).amin(-1)
        return Running(N @ self.mean_zz @ N.mT, M.mT @ self.mean_dd @ M, torch.where(whole, least, 0.0))

    def grow(self, n: int) -> Running:
        """Return the averages with `n` more directions, which are not measured."""
        zz, dd = (torch.nn.functional.pad(t, (0, n, 0, n)) for t in (self.mean_zz, self.mean_dd))
        return Running(zz, dd, torch.nn.functional.pad(self.measured, (0, n)))

    def to(self, device: torch.device | str) -> Running:
        return Running(*(t.to(device) for t in self.tensors().values()))


class Averages:
    """A `Running` for every module that was ever heard on a step for which a policy asked for an averaged signal.

    Here d is that of the loss summed over tokens. What backward saw is taken for the mean over the tokens of the whole
    step, accumulation divided out, as losses usually are; its tokens are those of the module that had most. So steps
    count by their tokens, however many they have. For a loss that is no such mean, steps of another size weigh more or
    less than that, in all modules alike: no ranking of modules that heard the same steps depends on it.

    z and d under a gate are those of the gated factors, which folding makes the factors: averages stay what they are.
    """

    def __init__(self, adapter: Adapter):
        self._adapter = adapter
        self._running: dict[str, Running] = {}

    def remember(self, transaction: Transaction) -> None:
        """Let `transaction` undo what is taken from here on."""
        transaction.keep(self, "_running")

    def take(self, observed: Observation, wanted: frozenset[Signal], decay: float) -> Observation:
        """Add what was heard on a step that listened to `sources(wanted)`, and give the Observation that was wanted.

        Earlier steps count `decay` times as much from now on. A module in whose sums something is not finite has no
        part in this step. Nothing here waits for the device.
        """
        if not wanted & AVERAGED:
            return observed
        heard = {name: record for name, record in observed.items() if Signal.TOKENS in record}
        tokens = [record[Signal.TOKENS] for record in heard.values()]
        most = torch.stack([t.to(tokens[0].device) for t in tokens]).amax() if tokens else torch.zeros(())
        for name, record in heard.items():
            S_A, S_B = record[Signal.S_A], record[Signal.S_B]
            summed = S_B * most.square().to(S_B.device)
            running = self._running.get(name)
            if running is None:  # made where the sums are: a copy to a device would wait for it
                running = Running.empty(len(S_A), device=S_A.device)
            self._running[name] = running.add(S_A, summed, record[Signal.TOKENS], decay)
        return observed.only(wanted, {name: _signals(running) for name, running in self._running.items()})

    def carry(self, transaction: Transaction, ops: Mapping[str, Sequence[Op]]) -> None:
        """Take the averages through what a plan does to each module."""
        moved = {name: running.after(ops.get(name, ())) for name, running in self._running.items()}
        transaction.contents(self._running, moved)

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {name: running.tensors() for name, running in self._running.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._running = {name: Running(**tensors) for name, tensors in state.items()}
        for name, running in self._running.items():
            if (site := self._adapter.sites[name]).present:
                self._running[name] = running.to(site.A.device)


def _signals(running: Running) -> dict[Signal, Tensor]:
    return {Signal(key): value for key, value in running.tensors().items()}

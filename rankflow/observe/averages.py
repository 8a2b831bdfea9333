"""Running averages of every module of one adapter: fed by the probes, moved by the surgeon, offered to the policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rankflow.lora.adapter import Adapter
from rankflow.lora.transaction import Transaction
from rankflow.observe.statistics import Running
from rankflow.plans.ops import Op
from rankflow.policies.observation import Observation, Signal

AVERAGED = frozenset({Signal.MEAN_ZZ, Signal.MEAN_DD, Signal.MEASURED})
_SUMS = frozenset({Signal.S_A, Signal.S_B, Signal.TOKENS})


def sources(signals: frozenset[Signal]) -> frozenset[Signal]:
    """What the probes have to take so that `Averages.take` can give `signals`."""
    return signals - AVERAGED | _SUMS if signals & AVERAGED else signals


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
        """What is taken from here on is undone with `transaction`."""
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

"""Many processes, played by threads that exchange the real messages: all do what the first decides, or all stop."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "benchmarks"))

from agreement import decision, together

from rankflow.distributed.replicas import Replicas
from rankflow.errors import DistributedError
from rankflow.plans.layout import Layout, Slot
from rankflow.policies.observation import Observation, Signal

LAYOUT = Layout({"q": Slot(4, 8, 8, 1.0)})


def test_all_get_the_plan_of_the_first_and_messages_hardly_grow_with_their_number():
    sent = {}
    for size in (2, 16):
        found, wires = together(size, decision(modules=6))
        for plan in found:
            assert plan.to_json() == found[0].to_json()
            assert torch.equal(plan.pack(), found[0].pack())
        sent[size] = wires[-1].sent
    assert sent[16] < 2.1 * sent[2], "a ring sends twice the share that two exchange, whatever its length"


def seen(replica: Replicas, *signals: Signal, rank: int = 4) -> Observation:
    values = {Signal.S_A: torch.eye(rank).double(), Signal.GRAD_A: torch.full((2,), replica._wire.rank + 1.0)}
    return Observation(1, {"q": {signal: values[signal] for signal in signals}})


def test_what_only_some_have_seen_counts_as_zero_in_the_others():
    def work(replica: Replicas) -> Observation:
        return replica.average(seen(replica, Signal.S_A, *[Signal.GRAD_A][replica._wire.rank % 2 :]))

    for observed in together(4, work)[0]:
        assert torch.equal(observed["q"][Signal.S_A], 4 * torch.eye(4).double())  # a sum over tokens
        torch.testing.assert_close(observed["q"][Signal.GRAD_A].double(), torch.full((2,), (1 + 3) / 4).double())


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (lambda replica: replica.average(seen(replica, Signal.S_A, rank=4 + (replica._wire.rank == 2))), "has shape"),
        (lambda replica: replica.agree(lambda: 1 / 0, LAYOUT, 7 + (replica._wire.rank == 2)), "process 2 is at step 8"),
        (
            lambda replica: replica.resized(
                LAYOUT.with_ranks({"q": 3}) if replica._wire.rank == 2 else LAYOUT, 7, replaced=False
            ),
            "ranks of process 2 are not those of process 0",
        ),
    ],
    ids=["shapes", "steps", "layouts"],
)
def test_one_that_differs_stops_all(fault, says: str):
    for error in together(4, fault)[0]:
        assert isinstance(error, DistributedError)
        assert says in str(error)

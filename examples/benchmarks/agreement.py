"""What it costs many processes to agree on a decision, and how that grows with them and with modules.

Every process is a thread here, with the real messages, as bytes, between them: what each listened to is summed up,
step, layout and factors are compared, process 0's plan goes to all and is checked, and all is compared again. Given are
the bytes that one process sends and receives and the processor time it takes, not what a network would add.

Run: python examples/benchmarks/agreement.py
"""

from __future__ import annotations

import argparse
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from harness import console, machine, table
from rich.progress import track
from torch import Tensor, nn

from rankflow.distributed.comm import Wire
from rankflow.distributed.replicas import Replicas
from rankflow.plans.layout import Layout, Slot
from rankflow.plans.ops import Refactor
from rankflow.plans.plan import RankPlan
from rankflow.policies.observation import Observation, Signal

RANK, TARGET, WIDTH = 16, 8, 4096
_PATIENCE = 60  # seconds that others wait for one that has failed


class Hub:
    """Where threads meet: nobody leaves before all have said what they have to say."""

    def __init__(self, size: int):
        self.size = size
        self.said: list[bytes] = [b""] * size
        self.total: Tensor | None = None
        self.lock = threading.Lock()
        self.barrier = threading.Barrier(size, timeout=_PATIENCE)


@dataclass
class Thread(Wire):
    """One of them. `sent` and `received` count bytes; a sum goes round a ring, so all but 1 / size of it goes and comes
    twice."""

    hub: Hub
    rank: int
    sent: float = 0
    received: float = 0
    seconds: float = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.size = self.hub.size
        self.about = "a decision"

    def gather(self, what: str, message: Any) -> list[Any]:
        self.hub.said[self.rank] = data = pickle.dumps(message)
        self.sent += len(data)
        self.hub.barrier.wait()
        said = list(self.hub.said)
        self.received += sum(map(len, said)) - len(data)
        self.hub.barrier.wait()
        return [pickle.loads(each) for each in said]

    def broadcast(self, what: str, message: Any) -> Any:
        if self.rank == 0:
            self.hub.said[0] = pickle.dumps(message)
            self.sent += len(self.hub.said[0])
        self.hub.barrier.wait()
        data = self.hub.said[0]
        self.hub.barrier.wait()
        self.received += len(data) if self.rank else 0
        return pickle.loads(data)

    def sum(self, what: str, t: Tensor) -> Tensor:
        with self.hub.lock:
            self.hub.total = t.clone() if self.hub.total is None else self.hub.total.add_(t)
        self.hub.barrier.wait()
        total = self.hub.total
        assert total is not None
        t.copy_(total)
        if self.hub.barrier.wait() == 0:
            self.hub.total = None
        self.hub.barrier.wait()
        self.sent += 2 * t.nbytes * (1 - 1 / self.size)
        self.received += 2 * t.nbytes * (1 - 1 / self.size)
        return t


def together(size: int, work: Callable[[Replicas], Any]) -> tuple[list[Any], list[Thread]]:
    """What `work` gives in each of `size` processes, or what it raises; and what they told one another."""
    hub = Hub(size)
    wires = [Thread(hub, rank) for rank in range(size)]
    factor = nn.Parameter(torch.ones(2, 2))
    adapter: Any = SimpleNamespace(parameters=lambda: iter([factor]), model=nn.Identity())
    found: list[Any] = [None] * size

    def run(rank: int) -> None:
        replica = Replicas(nn.Identity(), adapter, wires[rank])
        began = time.thread_time()
        try:
            found[rank] = work(replica)
        except Exception as e:  # told to whoever asked
            found[rank] = e
        wires[rank].seconds = time.thread_time() - began

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found, wires


def decision(modules: int) -> Callable[[Replicas], RankPlan]:
    """As of `squeeze` by loss: statistics of every module, and every module in a new basis."""
    layout = Layout({f"model.layers.{i // 7}.m{i % 7}": Slot(RANK, WIDTH, WIDTH, 1.0) for i in range(modules)})
    eye = torch.eye(RANK, dtype=torch.float64)
    plan = RankPlan({name: (Refactor(eye[:TARGET], eye[:, :TARGET]),) for name in layout}, "squeeze")
    after = plan.apply_to(layout)

    def work(replica: Replicas) -> RankPlan:
        sums = {name: {Signal.S_A: eye, Signal.S_B: eye, Signal.TOKENS: eye[0, 0]} for name in layout}
        replica.average(Observation(1, sums))
        agreed = replica.agree(lambda: plan, layout, 1)
        replica.attempt(lambda: agreed.apply_to(layout))
        replica.resized(after, 1, replaced=False)
        return agreed

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 8, 32, 128, 512])
    parser.add_argument("--modules", type=int, nargs="+", default=[56, 224, 896])
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Sequence[str]] = []
    cases = [(modules, size) for modules in options.modules for size in options.processes]
    for modules, size in track(cases, "agreeing", console=console, transient=True):
        found, (first, *others) = together(size, decision(modules))
        bad = next((each for each in found if isinstance(each, Exception)), None)
        if bad is not None:
            raise bad
        last = others[-1]
        megabytes = [f"{n / 1e6:.2f}" for n in (first.sent, last.sent, last.received)]
        seconds = [first.seconds, sum(each.seconds for each in others) / len(others)]
        rows.append((f"{modules}", f"{size}", *megabytes, *(f"{1e3 * s:.0f}" for s in seconds)))
    columns = ("modules", "processes", "first sends, MB", "others send", "receive", "first, CPU ms", "others, CPU ms")
    table(f"One decision over all modules, rank {RANK} to {TARGET} ({machine()})", columns, rows)


if __name__ == "__main__":
    main()

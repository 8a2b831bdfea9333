"""What `test_nothing_lost.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "leave ramps those of a state that could not be loaded",
        "optim/warmup.py",
        'transaction.keep(self, "_young", "_held", "_notes", "rate_rank", "_capped", "_mean_rank")',
        "pass",
        "-k go_back",
    ),
    Fault(
        "leave gates those of a state that could not be loaded",
        "gating/gates.py",
        "        self._remember(transaction)\n        self.remove()\n",
        "        self.remove()\n",
        "-k go_back",
    ),
    Fault(
        "listen no more where a state could not be loaded",
        "training/controller.py",
        "        except BaseException:\n            self._phases.listen()\n            raise\n",
        "        finally:\n            pass\n",
        "-k go_back",
    ),
    Fault(
        "write what a state told of a ledger, whatever comes of it",
        "training/ledger.py",
        "        if self._waiting is not None:\n            yield\n            return\n",
        "",
        "-k go_back",
    ),
    Fault(
        "lost: who is frozen by a step that has not happened",
        "training/controller.py",
        'transaction.keep(self._phases.operations, "frozen")',
        "pass",
    ),
    Fault(
        "lost: keep the event of a line that was not written",
        "training/ledger.py",
        "        del events[known:]\n",
        "",
        "tests/formats/io/test_disk.py",
    ),
    Fault(
        "lost: write each line of a step by itself",
        "training/ledger.py",
        'transaction.attr(self, "_waiting", [])',
        'transaction.attr(self, "_waiting", None)',
    ),
    Fault(
        "lost: forget what was heard when a step fails",
        "training/controller.py",
        '"step", "pending", "index"',
        '"step", "index"',
    ),
    Fault(
        "lost: stay in the phase that could not be entered",
        "training/controller.py",
        '"index", "state")',
        '"state")',
    ),
    Fault(
        "lost: take averages twice",
        "observe/averages.py",
        '        transaction.keep(self, "_running")',
        "        pass",
    ),
    Fault(
        "lost: leave gates off what they were taken off",
        "surgery/surgeon.py",
        "self.gates.follow(transaction)\n            for s in staged:\n"
        "                self._commit(transaction, s, target[",
        "for s in staged:\n                self._commit(transaction, s, target[",
    ),
    Fault(
        "lost: keep the layout of a resize that was undone later",
        "surgery/surgeon.py",
        '            transaction.attr(self, "_layout", target)',
        "            self._layout = target",
    ),
    Fault(
        "lost: keep a held-out update of a step that failed",
        "gating/gates.py",
        "self._remember(transaction, lambda: self._training.resume(before))",
        "self._remember(transaction)",
    ),
    Fault(
        "lost: go on to other held-out batches after a failure",
        "training/data.py",
        'transaction.undo(partial(setattr, held_out, "position", held_out.position))',
        "pass",
    ),
    Fault(
        "lost: leave hooks of probes that were not all put on",
        "observe/probes.py",
        "            recorder.install(self._handles)",
        "            recorder.install(found := [])\n            self._handles += found",
        "-m slow -k cut",
    ),
]

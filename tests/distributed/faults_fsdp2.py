"""What `test_fsdp2.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "leave a factor of another shape out of FSDP2's groups",
        "distributed/fsdp2.py",
        "                among[among.index(old.managed)] = new\n",
        "                pass\n",
        "-k phases",
    ),
    Fault(
        "give all processes the first rows",
        "distributed/fsdp2.py",
        "transaction.tensor(part(held), value[mine.start : mine.stop])",
        "transaction.tensor(part(held), value[: len(mine)])",
        "-k phases",
    ),
    Fault(
        "ramp nothing up of what is in shards by rows",
        "optim/warmup.py",
        "here = rows(p)",
        "here = rows(p) if not hasattr(p, 'device_mesh') else range(0)",
        "-k phases",
    ),
    Fault(
        "leave factors in shards at their capacity",
        "training/controller.py",
        "            self._phases.operations.set_capacity({}, self._phases.now)\n",
        "            pass\n",
        "-k what_one_does",
    ),
    Fault(
        "let what is in shards stay beside a failure",
        "distributed/fsdp2.py",
        "        transaction.undo(lambda: new._post_load_hook_handle.remove())\n",
        "",
        "-k cannot_write",
    ),
    Fault(
        "tell FSDP2 of no module that comes back",
        "distributed/fsdp2.py",
        "                among.append(new)\n",
        "                pass\n",
        "-k return",
    ),
    Fault(
        "write what penalties add to the whole gradient alone",
        "distributed/fsdp2.py",
        "                    _give_gradient(transaction, piece)\n",
        "",
        "-k adalora",
    ),
    Fault(
        "take no gradients of what is in shards",
        "observe/hooks.py",
        "            if parameter.requires_grad:\n                self._accumulated(factor, parameter)\n",
        "            self.trained = self.trained or parameter.grad is not None\n",
        "-k adalora",
    ),
    Fault(
        "show FSDP2 what a gate makes of shards",
        "gating/parametrize.py",
        'return raw if hasattr(raw, "device_mesh") else fitted(raw)',
        "return fitted(raw)",
        "-k sora",
    ),
    Fault(
        "save the raw factors of shards under gates",
        "gating/parametrize.py",
        "return fitted[name](saved, fitted[name].still)",
        "return saved",
        "-k gates",
    ),
    Fault(
        "let factors in shards be resized",
        "training/checks.py",
        'if lifecycle.mode != "mask":',
        'if lifecycle.mode == "none":',
        "-k refused",
    ),
]

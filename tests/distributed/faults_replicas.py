"""What `test_replicas.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "leave DistributedDataParallel with the old parameters",
        "distributed/replicas.py",
        "            rebuild(self._ddp)",
        "            pass",
    ),
    Fault(
        "decide by what one process alone has seen",
        "training/controller.py",
        "heard = self._processes.average(self._processes.attempt(lambda: self._probes.collect(scale)))",
        "heard = self._probes.collect(scale)",
    ),
    Fault(
        "let gates follow the gradients of their own process",
        "gating/training.py",
        "        average(everything)\n",
        "",
        "-k nothing",
    ),
    Fault(
        "take gradients of a share of the loss for those of all of it",
        "distributed/replicas.py",
        "return self._wire.size**2",
        "return self._wire.size**4",
        "-k loss",
    ),
    Fault(
        "sum gradients beside shards and do not divide",
        "distributed/replicas.py",
        'mean = self._wire.sum("the sum of gradients", torch.cat([g.flatten() for g in gradients])) / self._wire.size',
        'mean = self._wire.sum("the sum of gradients", torch.cat([g.flatten() for g in gradients]))',
    ),
    Fault(
        "go on reducing the parameters there were before a resize",
        "distributed/replicas.py",
        "        self._loose = None\n        self._others",
        "        self._others",
    ),
    Fault(
        "let processes start under different settings",
        "distributed/replicas.py",
        "            if differ:\n",
        "            if False:\n",
    ),
    Fault(
        "take what is said about one thing for an answer to another",
        "distributed/comm.py",
        "if len(set(places)) > 1:",
        "if False:",
    ),
    Fault(
        "let the wrapper wait for gradients of modules that a plan has frozen",
        "training/phases.py",
        "replaced=self._trained != before",
        "replaced=self._trained[0] != before[0]",
    ),
    Fault(
        "forget a built-in communication hook",
        "distributed/ddp.py",
        "ddp._register_builtin_comm_hook(builtin)",
        "pass",
    ),
]

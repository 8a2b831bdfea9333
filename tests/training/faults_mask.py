"""What `test_mask.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "mask: leave what was there beyond the rank",
        "lora/site_edits.py",
        "transaction.tensor(p, value)",
        "transaction.tensor(p, torch.where(value != 0, value, p))",
        "-k squeeze",
    ),
    Fault(
        "mask: forget the optimizer's state with every decision",
        "optim/optimizer_state.py",
        "new = swap.state.get(role) or self.fresh(p, swap.site)",
        "new = self.fresh(p, swap.site)",
        "-k squeeze",
    ),
    Fault(
        "mask: keep the capacity of the phase before",
        "training/phases.py",
        "capacities(self.policy, self.layout), self.now)",
        "{n: max(k, self.adapter.sites[n].capacity) "
        "for n, k in capacities(self.policy, self.layout).items()}, self.now)",
    ),
    Fault(
        "mask: open gates of directions that are not there",
        "gating/forward.py",
        'F.pad(draw["value"], (0, site.capacity - site.rank))',
        'F.pad(draw["value"], (site.capacity - site.rank, 0))',
        "-k adalora",
    ),
    Fault(
        "mask: resume without knowing ranks",
        "training/state.py",
        'phases.surgeon.set_masked_ranks(state.get("held", {}), transaction)',
        "pass",
        "-k resume",
    ),
    Fault(
        "mask: let Adafactor see zeros",
        "optim/handlers/adafactor.py",
        'AdafactorHandler(elementwise=False),\n    "transformers.',
        'AdafactorHandler(),\n    "transformers.',
        "-k refused",
    ),
]

"""Adam and its like: two moments, with a bias that goes with the steps."""

from __future__ import annotations

from rankflow.optim.handler import Handler

_ADAM = Handler("exp_avg", "exp_avg_sq", "max_exp_avg_sq", betas=True)

HANDLERS = {
    "torch.optim.Adam": _ADAM,
    "torch.optim.AdamW": _ADAM,
    "torch.optim.NAdam": _ADAM,
    "torch.optim.RAdam": _ADAM,
    "torch.optim.Adamax": Handler("exp_avg", "exp_inf", betas=True, roots=frozenset({"exp_inf"})),
}

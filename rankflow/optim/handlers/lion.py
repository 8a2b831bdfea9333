"""Lion (arXiv 2302.06675): every package has its own, all with the one average."""

from __future__ import annotations

from rankflow.optim.handler import Handler

HANDLERS = {"Lion": Handler("exp_avg")}

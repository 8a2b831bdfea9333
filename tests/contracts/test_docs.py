"""What the documents show runs as shown."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import torch
from loops import tiny_llama, token_batches

import rankflow
from rankflow.plans.schedule import When
from rankflow.policies.lifecycle import Lifecycle

ROOT = Path(__file__).parents[2]


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


def test_the_example_policy_trims_what_carries_nothing():
    module = types.ModuleType("trim")
    sys.modules["trim"] = module  # dataclasses look their module up
    exec(blocks("docs/extending/policy.md", "python")[0], module.__dict__)
    model = tiny_llama(r=4, dropout=0.0).train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B.default" in name:
                p.copy_(torch.randn_like(p))
                p[:, 1] = 0
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    lifecycle = Lifecycle((("trim", module.Trim(when=When(start=1)), None),))
    flow = rankflow.attach(model, optimizer, lifecycle, total_steps=1)
    model(**token_batches(1)[0]).loss.backward()
    flow.before_step()
    optimizer.step()
    flow.after_step()
    assert set(flow.layout.ranks.values()) == {3}


def test_public_names_are_there_and_documented():
    for name in rankflow.__all__:
        assert getattr(rankflow, name).__doc__, name

"""Adapters on base weights that others have quantised: torchao, HQQ, and PEFT's layers for GPTQ and AWQ.

torchao and HQQ are not among what tests install, as PEFT imports them wherever they are; .ci/run does, for these tests.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import peft.tuners.lora.awq
import peft.tuners.lora.gptq
import peft.utils.other
import pytest
import torch
from loops import GROW_THEN_SQUEEZE, Run
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import rankflow
from rankflow.errors import AdapterError
from rankflow.lora.adapter import Adapter
from rankflow.lora.base_weight import base_weight

pytestmark = pytest.mark.filterwarnings("ignore")  # what those libraries say of this machine

TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    where = tmp_path_factory.mktemp("base")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=61, max_position_embeddings=32, **sizes)).save_pretrained(where)
    return where


def torchao(folder: Path) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    return LlamaForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    )


def hqq(folder: Path) -> nn.Module:
    quantize = pytest.importorskip("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=32)
    return replaced(folder, lambda m: quantize.HQQLinear(m, config, compute_dtype=torch.float32, device="cpu"))


def replaced(folder: Path, by: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in TARGETS:
            model.set_submodule(name, by(module))
    return model


class Coded(nn.Module):
    """A linear layer whose weight is integers in packed buffers, as GPTQ's and AWQ's are."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.infeatures, self.outfeatures = linear.in_features, linear.out_features
        scales = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scales", scales)
        self.register_buffer("qweight", (linear.weight.detach() / scales).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.qweight * self.scales)


class CodedForAwq(Coded):
    SUPPORTS_METHODS = (SimpleNamespace(value="awq"),)


def stand_in(kind: type[Coded]) -> Callable[[Path], nn.Module]:
    return lambda folder: replaced(folder, kind)


@pytest.fixture(autouse=True)
def gptqmodel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package that has both, which needs a newer torch, as far as PEFT asks for it."""
    package, layers, qlinear = (ModuleType(name) for name in ("gptqmodel", "nn_modules", "qlinear"))
    qlinear.BaseQuantLinear = Coded  # type: ignore[attr-defined]
    for module, name in ((package, ""), (layers, ".nn_modules"), (qlinear, ".nn_modules.qlinear")):
        monkeypatch.setitem(sys.modules, f"gptqmodel{name}", module)
    for user in (peft.tuners.lora.gptq, peft.tuners.lora.awq, peft.utils.other):
        monkeypatch.setattr(user, "is_gptqmodel_available", lambda: True)


KINDS = {
    "TorchaoLoraLinear": torchao,
    "HqqLoraLinear": hqq,
    "GPTQLoraLinear": stand_in(Coded),
    "AwqLoraLinear": stand_in(CodedForAwq),
}


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_grow_anneal_and_change_in_one_shot_on_it(folder: Path, kind: str, tmp_path: Path):
    def adapted() -> PeftModel:
        return get_peft_model(KINDS[kind](folder), LoraConfig(r=2, lora_alpha=8, target_modules=TARGETS))

    probe = torch.arange(10)[None]
    run = Run(GROW_THEN_SQUEEZE, 20, model=adapted(), scheduled=False)
    assert {type(s.layer).__name__ for s in run.flow._adapter.sites.values()} == {kind}
    ranks = [run.flow.layout.ranks]
    for step in range(1, 21):
        run.until(step)
        ranks += [run.flow.layout.ranks] if run.flow.layout.ranks != ranks[-1] else []
    assert len(ranks) > 3, "grown and annealed"
    assert run.flow.layout.total_rank == 8
    after = run.model(input_ids=probe).logits.detach()
    run.flow.finish()
    rankflow.resize(run.model, {"*q_proj": 6, "*1*down_proj": 4}, run.optimizer)
    torch.testing.assert_close(run.model(input_ids=probe).logits.detach(), after, rtol=1e-5, atol=1e-6)
    run.model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(KINDS[kind](folder), tmp_path).train()
    torch.testing.assert_close(loaded(input_ids=probe).logits.detach(), after, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_weight_is_read_or_said_to_be_out_of_reach(folder: Path, kind: str):
    model = get_peft_model(KINDS[kind](folder), LoraConfig(r=2, target_modules=TARGETS))
    exact = dict(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())
    for name, site in Adapter(model).sites.items():
        if kind in ("GPTQLoraLinear", "AwqLoraLinear"):
            with pytest.raises(AdapterError, match=r"quantised in a way that PEFT cannot undo.*increlora"):
                base_weight(site)
            continue
        weight = exact[f"{name}.weight"].detach()
        assert float((base_weight(site).float() - weight).norm() / weight.norm()) < 0.15

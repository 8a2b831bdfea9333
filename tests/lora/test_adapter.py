from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from helpers import BASES, KINDS, base_of, config_of, lora, outputs, randomise, reload, same, snapshot, wrap
from loops import tiny_llama
from peft import AdaLoraConfig, LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

import rankflow
from rankflow.errors import AdapterError
from rankflow.lora.adapter import Adapter, reshape
from rankflow.lora.transaction import Transaction
from rankflow.plans.peft_patterns import alpha_for, anchored, exclude_modules, rank_config


def delta(site) -> torch.Tensor:
    """DeltaW as the canonical factors give it ``[*experts, out, in]``."""
    return site.scaling * site.b().detach() @ site.a().detach()


def peft_delta(site) -> torch.Tensor:
    """DeltaW as PEFT itself materialises it, brought to ``[*experts, out, in]``."""
    with torch.no_grad():
        d = site.layer.get_delta_weight("default")
    slot = site.slot()
    if site.kind == "conv":
        return d.flatten(1)
    return d if d.shape[-2:] == (slot.out_features, slot.in_features) else d.mT


# -- sites and views --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_canonical_factors_give_the_delta_that_peft_applies(kind):
    adapter = Adapter(lora(kind))
    for site in adapter.sites.values():
        if site.layer.__class__.__name__ == "MultiheadAttention":
            continue  # get_delta_weight of the whole is that of in_proj, checked below through merging
        torch.testing.assert_close(delta(site), peft_delta(site), rtol=1e-12, atol=1e-12)


def test_attention_sites_are_the_input_and_the_output_projection():
    model = lora("attention")
    adapter = Adapter(model)
    assert list(adapter.sites) == ["attn", "attn.out_proj", "head"]
    before = base_of("attention").attn
    merged = copy.deepcopy(model).merge_and_unload().attn
    torch.testing.assert_close(merged.in_proj_weight - before.in_proj_weight, delta(adapter.sites["attn"]))
    inner = model.base_model.model.attn.base_layer.out_proj
    torch.testing.assert_close(inner.get_delta_weight("default"), delta(adapter.sites["attn.out_proj"]))
    assert adapter.layout()["attn"].tie == adapter.layout()["attn.out_proj"].tie == "attn"


@pytest.mark.parametrize("kind", KINDS)
def test_raw_undoes_the_canonical_view(kind):
    for site in Adapter(lora(kind)).sites.values():
        assert torch.equal(site.raw_a(site.a().detach()), site.A)
        assert torch.equal(site.raw_b(site.b().detach()), site.B)
        grad = torch.arange(site.A.numel(), dtype=torch.float64).reshape(site.A.shape)
        assert torch.equal(site.raw_a(site.a(grad)), grad)


def test_layout_names_sizes_and_order_are_those_of_peft():
    model = lora("linear", rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 10}, use_rslora=True)
    layout = Adapter(model).layout()
    modules = [n for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")]
    assert list(layout) == modules
    slot = layout["model.layers.0.self_attn.q_proj"]
    assert (slot.rank, slot.in_features, slot.out_features, slot.itemsize) == (2, 16, 16, 8)
    assert slot.scaling == pytest.approx(10 / 2**0.5)
    assert layout["model.layers.0.self_attn.v_proj"].scaling == pytest.approx(6 / 4**0.5)
    assert layout.params == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, on importing its own compiler
def test_injected_wrapped_and_compiled_models_have_the_same_sites():
    expected = list(Adapter(lora("linear")).sites)
    injected = inject_adapter_in_model(config_of("linear"), base_of("linear"))
    assert list(Adapter(injected).sites) == expected
    assert list(Adapter(nn.Sequential(lora("linear"))).sites) == expected
    assert list(Adapter(torch.compile(lora("linear"))).sites) == expected
    inner = lora("linear")
    layers = inner.base_model.model.model.layers
    layers[0] = torch.compile(layers[0])
    assert list(Adapter(inner).sites) == expected


def test_parameters_are_all_of_this_adapter_and_nothing_else():
    model = lora("linear", use_dora=True, modules_to_save=["lm_head"])
    model.add_adapter("other", config_of("linear", r=2))
    mine = {n for n, p in model.named_parameters() if any(p is q for q in Adapter(model).parameters())}
    assert mine == {n for n, _ in model.named_parameters() if "lora_" in n and ".default" in n}


# -- refusals ---------------------------------------------------------------------------------------------------------


def refuse(model, *words, name="default"):
    with pytest.raises(AdapterError) as e:
        Adapter(model, name)
    for word in words:
        assert word in str(e.value), e.value


def test_refuses_what_is_not_there():
    refuse(base_of("linear"), "no LoRA")
    model = lora("linear")
    model.add_adapter("other", config_of("linear"))
    refuse(model, "'nobody'", "default", "other", name="nobody")
    refuse(nn.ModuleList([lora("linear"), lora("linear")]), "2 models")


def test_refuses_a_merged_adapter_by_module():
    model = lora("linear")
    model.merge_adapter()
    refuse(model, "model.layers.0.self_attn.q_proj", "merged", "unmerge_adapter")
    model.unmerge_adapter()
    Adapter(model)


def test_refuses_grouped_convolutions_and_other_tuners():
    grouped = wrap(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), LoraConfig(r=4, target_modules=["0"]))
    refuse(grouped, "0:", "grouped")
    ada = wrap(base_of("linear"), AdaLoraConfig(target_modules=["q_proj"], total_step=10, init_r=4))
    refuse(ada, "ADALORA")


@pytest.mark.parametrize(
    ("changes", "variant"),
    [
        ({"init_lora_weights": "mica"}, "MiCA"),
        ({"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"}, "ALora"),
    ],
)
def test_refuses_variants_that_depend_on_basis_or_input_by_name(changes, variant):
    model = wrap(base_of("linear", dtype=torch.float32), config_of("linear", **changes))
    refuse(model, "model.layers.0.self_attn.q_proj", variant)


def test_refuses_factors_shared_between_modules():
    model = lora("linear")
    sites = Adapter(model).sites
    q0, q1 = (sites[f"model.layers.{i}.self_attn.q_proj"] for i in (0, 1))
    q1.layer.lora_A["default"].weight = q0.A
    refuse(model, q0.name, q1.name, "share")


def test_modules_on_one_base_weight_are_tied_and_stay():
    base = base_of("linear")
    base.model.layers[1].self_attn.q_proj.weight = base.model.layers[0].self_attn.q_proj.weight
    layout = Adapter(wrap(base, config_of("linear"))).layout()
    q0, q1 = (layout[f"model.layers.{i}.self_attn.q_proj"] for i in (0, 1))
    assert q0.tie == q1.tie
    assert q0.tie is not None
    assert (q0.min_rank, layout["model.layers.0.self_attn.v_proj"].min_rank) == (1, 0)


# -- reshape and what is saved ----------------------------------------------------------------------------------------


def other_ranks(layout):
    """A mix of smaller, larger and zero ranks that ties and least ranks allow."""
    ranks, cycle = {}, [2, 0, 5, 3]
    for i, (name, slot) in enumerate(layout.items()):
        ranks[name] = 3 if slot.tie else max(cycle[i % 4], slot.min_rank)
    return ranks if any(ranks.values()) else dict.fromkeys(layout, 3)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_reshaped_adapter_survives_save_and_load(kind, rslora):
    model = lora(kind, use_rslora=rslora)
    adapter = Adapter(model)
    first = adapter.layout()
    ranks = other_ranks(first)
    assert reshape(adapter, ranks).ranks == ranks
    randomise(model, 5)
    loaded = reload(model, kind)
    torch.testing.assert_close(outputs(loaded, kind), outputs(model, kind), rtol=1e-12, atol=1e-12)
    again = Adapter(loaded).layout()
    assert again.ranks == {n: r for n, r in ranks.items() if r}
    assert all(again[n].scaling == pytest.approx(first[n].scaling, rel=1e-15) for n in again)
    reshape(adapter, first)
    assert adapter.layout() == first
    assert model.peft_config["default"].exclude_modules is None
    assert model.peft_config["default"].rank_pattern == {}


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv"])
def test_a_module_at_rank_zero_computes_nothing(kind):
    model = lora(kind)
    adapter = Adapter(model)
    names = list(adapter.sites)
    silenced = copy.deepcopy(model)
    for name in names[1:]:
        with torch.no_grad():
            Adapter(silenced).sites[name].B.zero_()
    reshape(adapter, dict.fromkeys(names[1:], 0))
    torch.testing.assert_close(outputs(model, kind), outputs(silenced, kind), rtol=1e-12, atol=1e-12)
    assert [adapter.sites[n].present for n in names] == [True] + [False] * (len(names) - 1)
    assert [s.rank for s in Adapter(model).layout().values()][1:] == [0] * (len(names) - 1)  # a new Adapter knows too
    with pytest.raises(AdapterError, match="rank 0"):
        _ = adapter.sites[names[1]].A


def test_leaving_and_coming_back_restores_everything_but_the_values():
    model = lora("linear", dtype=torch.float32, lora_dropout=0.1, use_dora=True).train()
    model.add_adapter("other", config_of("linear", r=2))
    model.set_adapter("default")
    adapter = Adapter(model)
    name = "model.layers.0.mlp.down_proj"
    site = adapter.sites[name]
    site.A.requires_grad_(False)
    site.layer.lora_dropout["default"].p = 0.25
    order = [n for n, _ in model.named_parameters()]
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    rng = torch.random.get_rng_state()
    reshape(adapter, {name: 0})
    assert site.layer.active_adapters == ["default"]
    assert list(site.layer.r) == ["other"]
    reshape(adapter, {name: 4})
    assert torch.equal(rng, torch.random.get_rng_state())
    assert [n for n, _ in model.named_parameters()] == order
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert site.layer.lora_dropout["default"].p == 0.25
    assert site.layer.lora_dropout["default"].training
    assert not site.B.any()
    assert site.dora
    assert site.scaling == 1.5


def test_returning_keeps_the_dtype_of_the_adapter_not_of_the_base():
    model = wrap(base_of("linear", dtype=torch.bfloat16), config_of("linear"))  # PEFT casts factors to fp32
    adapter = Adapter(model)
    name = next(iter(adapter.sites))
    reshape(adapter, {name: 0})
    reshape(adapter, {name: 2})
    assert adapter.sites[name].A.dtype == torch.float32


def test_another_adapter_on_the_same_layers_is_untouched():
    model = lora("linear")
    model.add_adapter("other", config_of("linear", r=2, lora_alpha=3))
    before = {n: (id(p), p.detach().clone()) for n, p in model.named_parameters() if ".other" in n}
    config = copy.deepcopy(model.peft_config["other"].to_dict())
    adapter = Adapter(model)
    reshape(adapter, other_ranks(adapter.layout()))
    assert same({n: (id(p), p.detach()) for n, p in model.named_parameters() if ".other" in n}, before)
    assert model.peft_config["other"].to_dict() == config
    model.set_adapter("other")
    assert not adapter.enabled
    assert torch.isfinite(outputs(model, "linear")).all()


def test_enabled_follows_peft():
    model = lora("linear")
    adapter = Adapter(model)
    assert adapter.enabled
    model.base_model.disable_adapter_layers()
    assert not adapter.enabled
    model.base_model.enable_adapter_layers()
    assert adapter.enabled


def test_scaling_in_force_is_not_written_into_the_config():
    model = lora("linear")
    adapter = Adapter(model)
    name = next(iter(adapter.sites))
    adapter.sites[name].layer.scale_layer(0.5)
    reshape(adapter, {name: 3})
    assert adapter.sites[name].scaling == 0.75
    assert adapter.sites[name].alpha == 4.5
    adapter.sites[name].layer.unscale_layer()
    assert adapter.sites[name].scaling == 1.5


def test_reshape_refuses_before_it_writes():
    model = lora("attention")
    adapter = Adapter(model)
    before = snapshot(model)
    for ranks, word in ({"nobody": 2}, "nobody"), ({"head": 2, "attn": 0}, "attn"):
        with pytest.raises(AdapterError, match=word):
            reshape(adapter, ranks)
    linear = Adapter(lora("linear"))
    with pytest.raises(AdapterError, match="no module would stay"):
        reshape(linear, dict.fromkeys(linear.sites, 0))
    assert same(snapshot(model), before)


def test_a_layer_resized_by_somebody_else_is_noticed():
    adapter = Adapter(lora("linear"))
    site = next(iter(adapter.sites.values()))
    site.layer.lora_A["default"].weight = nn.Parameter(torch.zeros(3, 16))
    with pytest.raises(AdapterError, match=f"{re.escape(site.name)}.*rank 4"):
        adapter.layout()


def test_memory_format_of_convolutions_does_not_matter():
    model = lora("conv", dtype=torch.float32)
    expected = {n: s.a().clone() for n, s in Adapter(model).sites.items()}
    c2 = Adapter(model).sites["c2"].layer
    c2.to(memory_format=torch.channels_last)
    for name, site in Adapter(model).sites.items():
        assert torch.equal(site.a(), expected[name])


# -- patterns ---------------------------------------------------------------------------------------------------------


def test_suffix_names_are_excluded_one_by_one():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(6, 6)
            self.inner = nn.ModuleDict({"q": nn.Linear(6, 6)})

        def forward(self, x):
            return self.q(x) + self.inner["q"](x).tanh()

    torch.manual_seed(0)
    base = Two()
    model = wrap(copy.deepcopy(base), LoraConfig(r=3, target_modules=["q"], exclude_modules=None))
    adapter = Adapter(model)
    reshape(adapter, {"q": 0, "inner.q": 2})
    config = model.peft_config["default"]
    assert isinstance(config.exclude_modules, str)
    fresh = wrap(copy.deepcopy(base), config)
    assert Adapter(fresh).layout().ranks == {"inner.q": 2}
    reshape(adapter, {"q": 1})
    assert config.exclude_modules is None


def test_exclude_keeps_what_the_user_excluded():
    assert exclude_modules({"head"}, ["a", "b"], ["c"]) == ["head", "c"]
    assert exclude_modules(["c", "head"], ["a", "b", "c"], []) == ["head"]
    regex = exclude_modules(r".*\.head|x", ["a", "b"], ["c.d"])
    assert isinstance(regex, str)
    assert [bool(re.fullmatch(regex, n)) for n in ("m.head", "x", "c.d", "cxd", "a")] == [
        True,
        True,
        True,
        False,
        False,
    ]
    assert exclude_modules(regex, ["a", "b", "c.d"], []) == r".*\.head|x"
    both = exclude_modules(["head"], ["m.c"], ["c"])
    assert isinstance(both, str)
    assert [bool(re.fullmatch(both, n)) for n in ("head", "m.head", "c", "m.c")] == [True, True, True, False]
    assert exclude_modules(None, ["a"], []) is None


def test_patterns_are_anchored_and_only_for_those_that_differ():
    config = rank_config({"a.q": 8, "b.q": 4, "c.q": 8}, {"a.q": 16, "b.q": 8, "c.q": 24})
    assert config == (8, 16, {anchored("b.q"): 4}, {anchored("b.q"): 8, anchored("c.q"): 24})
    assert re.match(rf"(.*\.)?({anchored('b.q')})$", "vision.b.q") is None
    assert re.match(rf"(.*\.)?({anchored('b.q')})$", "bxq") is None


@pytest.mark.parametrize("rslora", [False, True])
def test_alpha_gives_back_the_very_scaling(rslora):
    for alpha, rank in [(16, 8), (32, 12), (1, 3), (7, 5), (0.1, 7)]:
        scaling = alpha / (rank**0.5 if rslora else rank)
        for other in range(1, 80):
            new = alpha_for(scaling, other, rslora)
            assert abs(new / (other**0.5 if rslora else other) / scaling - 1) < 2.3e-16
        same_rank = alpha_for(scaling, rank, rslora)
        assert same_rank == pytest.approx(alpha)
        if isinstance(alpha, int) and not rslora:
            assert isinstance(same_rank, int)


# -- transaction -------------------------------------------------------------------------------------------------------


def test_journal_undoes_in_reverse_and_keeps_order_and_identity():
    owner = nn.Linear(2, 2)
    d, l = {"a": 1, "b": 2}, [1, 2]

    def fail_after_writing():
        with Transaction() as transaction:
            transaction.attr(owner, "in_features", 5)
            transaction.attr(owner, "in_features", 6)
            transaction.contents(d, {"b": 3, "a": 4})
            transaction.contents(l, [3])
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_after_writing()
    assert owner.in_features == 2
    assert list(d.items()) == [("a", 1), ("b", 2)]
    assert l == [1, 2]


def test_every_kind_has_a_builder():
    assert set(BASES) == set(KINDS)


def test_adapters_that_were_made_with_one_config_keep_their_own_ranks(tmp_path: Path):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(tiny_llama().unload(), config)
    model.add_adapter("ref", config)
    assert model.peft_config["ref"] is model.peft_config["default"]
    rankflow.resize(model, dict.fromkeys(Adapter(model).sites, 2))
    model.save_pretrained(tmp_path)
    assert {m.rank for m in rankflow.inspect(tmp_path).modules} == {2}
    assert {m.rank for m in rankflow.inspect(tmp_path / "ref").modules} == {4}

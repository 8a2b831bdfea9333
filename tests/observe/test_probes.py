"""What the probes hear, against dense matrices worked out from the base model alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers import base_of, inputs_of, lora, loss_of, minilm_base, outputs, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from rankflow.errors import AdapterError, RankFlowError
from rankflow.lora.adapter import Adapter
from rankflow.lora.base_weight import base_weight
from rankflow.observe.averages import AVERAGED
from rankflow.observe.contractions import (
    RandomProjection,
    conv_contraction,
    delta_score,
    linear_contraction,
    touched_columns,
)
from rankflow.observe.probes import Probes
from rankflow.policies.observation import GATE_SIGNALS, Observation, Signal

INPUT = frozenset({Signal.INPUTS, Signal.INPUT_ENERGY})  # of linear layers only
_APART = {Signal.A, Signal.B, Signal.SINGULAR_VALUES, Signal.INPUT_SAMPLE}
HOOKED = frozenset(Signal) - _APART - GATE_SIGNALS - INPUT - AVERAGED
LINEAR_IN_BATCH = HOOKED - {Signal.DELTA_SCORE, Signal.DELTA_SCORE_SAMPLED}
KINDS = ["linear", "conv1d_transformers", "embedding", "conv"]


def hear(model: nn.Module, run: Callable[[], Any], signals=HOOKED, *, step: int = 1, **options) -> Observation:
    model.zero_grad()
    probes = Probes(Adapter(model), **options)
    probes.arm(signals, step)
    run()
    return probes.collect()


def close(one: Observation, other: Observation, signals=HOOKED, tolerance: float = 1e-5) -> None:
    assert list(one) == list(other)
    for name in one:
        for signal in signals:
            a, b = one[name][signal].double(), other[name][signal].double()
            assert (a - b).norm() <= tolerance * b.norm(), f"{name} {signal.value}: {a} against {b}"


def hooks_on(model: nn.Module) -> int:
    modules = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())
    return modules + sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())


class Dense:
    """The base model with DeltaW as a dense leaf beside every adapted weight, and inputs and output gradients kept."""

    def __init__(self, kind: str, model: nn.Module):
        self.base = base_of(kind)
        self.adapter = Adapter(model)
        self.delta, self.x, self.dy, self.weight, parameters = {}, {}, {}, {}, {}
        for name, site in self.adapter.sites.items():
            self.delta[name] = (site.scaling * site.b() @ site.a()).detach().requires_grad_()
            module = self.base.get_submodule(name)
            transposed = kind == "conv1d_transformers" or site.kind == "embedding"
            self.weight[name] = module.weight.detach().T if transposed else module.weight.detach().flatten(1)
            delta = self.delta[name].T if transposed else self.delta[name]
            parameters[f"{name}.weight"] = module.weight.detach() + delta.reshape(module.weight.shape)
            module.register_forward_hook(partial(self._keep, name))
        call = partial(torch.func.functional_call, self.base, parameters)
        loss_of(lambda x: call((x,)), kind).backward()

    def _keep(self, name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.x[name] = args[0].detach()
        output.register_hook(partial(self.dy.__setitem__, name))

    def z_and_d(self, name: str) -> tuple[Tensor, Tensor]:
        """A x and s B^T g of every token, [tokens, r]."""
        site, module = self.adapter.sites[name], self.base.get_submodule(name)
        x, dy, A, B = self.x[name], self.dy[name], site.A.detach(), site.b().detach()
        if site.kind == "embedding":
            z = A.T[x.flatten()]
        elif site.kind == "conv":
            conv = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
            z = conv(x, A, stride=module.stride, padding=module.padding).movedim(1, -1).flatten(0, -2)
            dy = dy.movedim(1, -1)
        else:
            z = x.flatten(0, -2) @ A.T
        return z, site.scaling * dy.flatten(0, -2) @ B


@pytest.mark.parametrize("kind", KINDS)
def test_signals_are_those_of_a_dense_delta(kind: str):
    model = lora(kind)
    heard = hear(model, lambda: loss_of(model, kind).backward(), sample_rows=1000, seed=5)
    dense = Dense(kind, model)
    sites = Adapter(model).sites
    assert list(heard) == list(sites) == list(dense.delta)
    for name, site in sites.items():
        delta, G = dense.delta[name].detach(), dense.delta[name].grad
        score = (delta * G).abs().sum() / math.sqrt(delta.numel())
        z, d = dense.z_and_d(name)
        expected = {
            Signal.GRAD_A: site.a(site.A.grad),
            Signal.GRAD_B: site.b(site.B.grad),
            Signal.DELTA_SCORE: score,
            Signal.DELTA_SCORE_SAMPLED: score,  # every row is in the sample
            Signal.S_A: z.T @ z,
            Signal.S_B: d.T @ d,
            Signal.TOKENS: torch.tensor(float(len(z))),
            Signal.SKETCH: RandomProjection((5, 1, name), 64, 16).omega(delta) @ G,
            Signal.WEIGHT_SCORE: (dense.weight[name] * G).abs().mean(),
            Signal.PATH_SCORE: (delta * G).abs().sum(),
        }
        assert score > 0
        for signal in HOOKED:
            torch.testing.assert_close(
                heard[name][signal], expected[signal].to(heard[name][signal].dtype), rtol=1e-10, atol=1e-14
            )
        assert heard[name][Signal.S_A].dtype == torch.float64
    assert hooks_on(model) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_any_size_add_up_to_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch):
    model = lora(kind)
    whole = hear(model, lambda: loss_of(model, kind).backward())
    monkeypatch.setattr("rankflow.observe.contractions.BLOCK", 50)
    scores = {Signal.DELTA_SCORE, Signal.PATH_SCORE}
    close(hear(model, lambda: loss_of(model, kind).backward()), whole, scores, 1e-12)


def test_the_sampled_score_is_unbiased():
    A, B, x, g = (torch.randn(s, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
                  for i, s in enumerate([(3, 7), (20, 3), (9, 7), (20, 9)]))  # fmt: skip
    exact = delta_score(A, B, g, linear_contraction(x))
    samples = torch.stack([
        delta_score(A, B, g, linear_contraction(x), RandomProjection((0, step, "m"), 5, 0).rows(20, g.device)) * 20 / 5
        for step in range(400)
    ])  # fmt: skip
    assert abs(samples.mean() - exact) < 4 * samples.std() / math.sqrt(400)
    assert samples.std() > 0


def test_the_weight_score_of_a_sample_of_rows_is_unbiased():
    model = lora("conv")
    exact = hear(model, lambda: loss_of(model, "conv").backward(), {Signal.WEIGHT_SCORE}, sample_rows=7)
    samples = torch.stack([
        hear(model, lambda: loss_of(model, "conv").backward(), {Signal.WEIGHT_SCORE}, sample_rows=3, seed=seed)["c2"][
            Signal.WEIGHT_SCORE
        ]
        for seed in range(150)
    ])  # fmt: skip
    assert abs(samples.mean() - exact["c2"][Signal.WEIGHT_SCORE]) < 4 * samples.std() / math.sqrt(150)
    assert samples.std() > 0


def test_modules_that_share_a_weight_are_scored_by_their_own_use_of_it():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = (nn.Linear(6, 6, bias=False, dtype=torch.float64) for _ in range(2))
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.tanh(self.one(x)))

    torch.manual_seed(0)
    base = Twice()
    x, W = torch.randn(5, 6, dtype=torch.float64), base.one.weight.detach()
    first, second = W.clone().requires_grad_(), W.clone().requires_grad_()
    (torch.tanh(x @ first.T) @ second.T).square().sum().backward()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["one", "two"]), autocast_adapter_dtype=False)
    heard = hear(model, lambda: model(x).square().sum().backward(), {Signal.WEIGHT_SCORE})
    for name, weight in (("one", first), ("two", second)):
        torch.testing.assert_close(heard[name][Signal.WEIGHT_SCORE], (W * weight.grad).abs().mean())


def test_quantised_weights_are_read_through_peft_or_refused_by_name(monkeypatch: pytest.MonkeyPatch):
    class Params4bit(nn.Parameter):
        pass

    model = lora("linear")
    site = Adapter(model).sites["model.layers.0.self_attn.q_proj"]
    whole, base = base_weight(site), site.layer.get_base_layer()
    packed = torch.zeros(whole.numel() // 2, 1, dtype=torch.uint8)
    base.weight = Params4bit(packed, requires_grad=False)
    monkeypatch.setattr("rankflow.lora.base_weight.dequantize_module_weight", lambda module: whole)
    assert torch.equal(base_weight(site), whole)
    base.weight = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(AdapterError, match=r"layers\.0\.self_attn\.q_proj: .*Linear.* cannot be read.*quantised"):
        Probes(Adapter(model)).arm(frozenset({Signal.WEIGHT_SCORE}), 1)


def test_the_sketch_keeps_the_size_of_the_gradient():
    model = lora("conv")
    norms = []
    for seed in range(60):
        heard = hear(model, lambda: loss_of(model, "conv").backward(), {Signal.SKETCH}, seed=seed)
        norms.append(heard["c1"][Signal.SKETCH].square().sum())
    G = Dense("conv", model).delta["c1"].grad
    assert float(torch.stack(norms).mean()) == pytest.approx(float(G.square().sum()), rel=0.2)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(max_examples=25, deadline=None)
@given(
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.one_of(st.tuples(st.integers(0, 2), st.integers(0, 1)), st.sampled_from(["valid", "same"])),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    dilation=st.integers(1, 2),
    seed=st.integers(0, 1000),
)
def test_the_convolution_contraction_is_autograds(stride, padding, kernel, dilation, seed):
    torch.manual_seed(seed)
    stride = (1, 1) if padding == "same" else stride
    conv = nn.Conv2d(3, 4, kernel, stride, padding, dilation, bias=False, dtype=torch.float64)
    x = torch.randn(2, 3, 9, 10, dtype=torch.float64)
    y = conv(x)
    g = torch.randn_like(y)
    y.backward(g)
    assert torch.allclose(conv_contraction(conv, x)(g.movedim(1, 0)), conv.weight.grad.flatten(1))


@settings(max_examples=40, deadline=None)
@given(ids=st.lists(st.integers(0, 6), min_size=1, max_size=12))
def test_touched_columns_hold_the_whole_embedding_gradient(ids: list[int]):
    A = torch.arange(14.0).reshape(2, 7)
    g = torch.randn(3, len(ids), generator=torch.Generator().manual_seed(0))
    columns, contract = touched_columns(torch.tensor(ids), A)
    G = torch.zeros(3, 7).index_add_(1, torch.tensor(ids), g)
    assert torch.allclose(contract(g) @ columns.T, G @ A.T, atol=1e-5)
    assert torch.allclose(contract(g).abs().sum(), G.abs().sum())


# -- dropout, masks, scales -----------------------------------------------------------------------------------------


def test_grams_are_taken_before_dropout_and_scores_after_it():
    model = lora("linear", lora_dropout=0.5).train()
    seen: dict[str, list[Tensor]] = {"raw": [], "dropped": []}
    layer = Adapter(model).sites["model.layers.0.self_attn.q_proj"].layer
    layer.lora_dropout["default"].register_forward_hook(lambda m, args, out: seen["raw"].append(args[0]))
    layer.lora_A["default"].register_forward_pre_hook(lambda m, args: seen["dropped"].append(args[0]))
    gradients: list[Tensor] = []
    layer.register_forward_hook(lambda m, args, y: gradients.append(y) or y.retain_grad())
    heard = hear(model, lambda: loss_of(model, "linear").backward())["model.layers.0.self_attn.q_proj"]
    site = Adapter(model).sites["model.layers.0.self_attn.q_proj"]
    x, dropped, dy = (t[0].detach().flatten(0, -2) for t in (seen["raw"], seen["dropped"], [gradients[0].grad]))
    assert not torch.equal(x, dropped)
    z, G = x @ site.A.T, dy.T @ dropped
    torch.testing.assert_close(heard[Signal.S_A], (z.T @ z).detach())
    score = (site.scaling * site.B @ site.A * G).abs().sum() / math.sqrt(G.numel())
    torch.testing.assert_close(heard[Signal.DELTA_SCORE], score.detach())


@pytest.mark.parametrize("kind", ["linear", "conv1d_transformers"])
def test_inputs_are_those_of_the_module_before_dropout_about_their_mean(kind: str):
    model = lora(kind, lora_dropout=0.5).train()
    seen: dict[str, list[Tensor]] = {}
    for name, site in Adapter(model).sites.items():
        keep = seen.setdefault(name, [])
        site.layer.register_forward_pre_hook(lambda m, args, keep=keep: keep.append(args[0].detach().flatten(0, -2)))
    run = lambda: [loss_of(model, kind, seed=seed).backward() for seed in (3, 4)]  # noqa: E731
    heard = hear(model, run, INPUT, sketch_rows=100)
    for name, batches in seen.items():
        x = torch.cat(batches)
        x = x - x.mean(0)
        rows = heard[name][Signal.INPUTS]
        torch.testing.assert_close(rows.T @ rows, x.T @ x, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(heard[name][Signal.INPUT_ENERGY], x.square().sum())
        torch.testing.assert_close(rows.norm(dim=1)[:9], torch.linalg.svdvals(x)[:9], rtol=1e-6, atol=1e-9)
    assert hooks_on(model) == len(seen)


def test_a_sample_has_some_of_the_inputs_and_no_hidden_token():
    model, batch = encoder().double(), reviews()
    seen: dict[str, list[Tensor]] = {}
    for name, site in linear_part(model).sites.items():
        keep = seen.setdefault(name, [])
        site.layer.register_forward_pre_hook(lambda m, args, keep=keep: keep.append(args[0].detach()))
    run = [lambda: sentence_loss(model, batch).backward()] * 2
    probes = Probes(linear_part(model))
    probes.arm(frozenset({Signal.INPUT_SAMPLE}), 1)
    for once in run:
        once()
    for name, rows in probes.collect().gather(Signal.INPUT_SAMPLE).items():
        shown = seen[name][0][batch["attention_mask"].bool()].float()
        where = [torch.nonzero((shown == row).all(1)).flatten().tolist() for row in rows]
        assert all(where), "each is an input of a token that is shown"
        first, second = where[:16], where[16:]
        assert len({index[0] for index in first}) == 16
        assert first != second, "another pass draws others"


def test_convolutions_have_no_sample():
    model = lora("conv")
    signals = frozenset({Signal.INPUT_SAMPLE, Signal.SKETCH})
    heard = hear(model, lambda: loss_of(model, "conv").backward(), signals)
    assert all(set(record) == {Signal.SKETCH} for record in heard.values())


def test_inputs_leave_hidden_tokens_out():
    model = encoder().double()
    batch = reviews()
    alone = [
        {"input_ids": ids[None, : mask.sum()], "attention_mask": mask[None, : mask.sum()]}
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]

    def inputs(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        probes = Probes(linear_part(model), sketch_rows=400)
        probes.arm(INPUT, 1)
        for one in batches:
            sentence_loss(model, one).backward()
        return probes.collect().gather(Signal.INPUTS)

    padded, unpadded = inputs([batch]), inputs(alone)
    for name, rows in padded.items():
        torch.testing.assert_close(rows.T @ rows, unpadded[name].T @ unpadded[name], rtol=1e-6, atol=1e-9)


def linear_part(model: nn.Module) -> Adapter:
    """The adapter without its embeddings, which have no inputs to speak of."""
    adapter = Adapter(model)
    adapter.sites = {name: site for name, site in adapter.sites.items() if site.kind == "linear"}
    return adapter


@pytest.mark.parametrize("kind", ["embedding", "conv"])
def test_inputs_of_other_layers_are_refused_by_name(kind: str):
    with pytest.raises(AdapterError, match=f"'inputs' does not exist for {kind} layers.*gora"):
        Probes(Adapter(lora(kind))).arm(frozenset({Signal.INPUTS}), 1)


def test_an_input_that_is_not_finite_shows():
    model = lora("linear")
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.weight[int(inputs_of("linear")[0, 0])] = math.inf
    heard = hear(model, lambda: outputs(model, "linear").square().sum().backward(), INPUT)
    assert all(bool(record[Signal.INPUT_ENERGY].isnan()) for record in heard.values())


def encoder(*, dropout: float = 0.0) -> nn.Module:
    """MiniLM with adapters on two layers' attention and feed-forward, its embeddings among them."""
    torch.manual_seed(0)
    base = minilm_base()
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    targets = r"embeddings.word_embeddings|encoder\.layer\.[05]\.(attention\.self\.query|output\.dense)"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name on its way out
        model = get_peft_model(base, LoraConfig(r=3, target_modules=targets, lora_dropout=dropout))
    randomise(model)
    return model.train()


def reviews(n: int = 6, length: int = 8, *, seed: int = 0, padded: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1000, 2000, (n, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        for i in range(n):
            mask[i, length - i % 4 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def sentence_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    pooled = (hidden * mask).sum(1) / mask.sum(1)
    return pooled.cumsum(-1).tanh().mean()


@pytest.mark.parametrize("door", ["keyword", "position", "mapping"])
def test_masked_tokens_are_no_tokens(door: str):
    model = encoder().double()
    batch = reviews()
    signals = frozenset({Signal.S_A, Signal.S_B, Signal.TOKENS})

    class Pipe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, features: dict[str, Tensor]) -> Any:
            return self.model(**features)

    def call(batch: dict[str, Tensor]) -> Any:
        if door == "keyword":
            return model(**batch)
        return model(batch["input_ids"], batch["attention_mask"]) if door == "position" else root(batch)

    root = Pipe() if door == "mapping" else model
    probes = Probes(Adapter(root))
    prefix = "model.base_model.model." if door == "mapping" else ""
    probes.arm(signals, 1)
    hidden = call(batch).last_hidden_state
    (hidden.tanh() * batch["attention_mask"].unsqueeze(-1)).sum().backward()
    heard = probes.collect()

    alone = None
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        row = ids[: mask.sum()].unsqueeze(0)
        probes = Probes(Adapter(model))
        probes.arm(signals, 1)
        model(row).last_hidden_state.tanh().sum().backward()
        one = probes.collect()
        add = {n: {s: one[n][s] + (alone[n][s] if alone else 0) for s in signals} for n in one}
        alone = add
    assert alone is not None
    for name in alone:
        key = next(n for n in heard if n.removeprefix(prefix) == name)
        for signal in signals:
            torch.testing.assert_close(heard[key][signal], alone[name][signal], rtol=1e-6, atol=1e-12)
    assert heard[key][Signal.TOKENS] == batch["attention_mask"].sum()


def test_hidden_tokens_that_reach_the_loss_are_left_out_of_both_grams():
    class Tokenwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(5, 4, dtype=torch.float64)

        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.lin(x).square().sum()

    model = get_peft_model(Tokenwise(), LoraConfig(r=2, target_modules=["lin"]), autocast_adapter_dtype=False)
    randomise(model)
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [False, True, True]])
    signals = frozenset({Signal.S_A, Signal.S_B, Signal.TOKENS})
    close(hear(model, lambda: model(x, mask).backward(), signals),
          hear(model, lambda: model(x[mask].unsqueeze(0)).backward(), signals), signals, 1e-12)  # fmt: skip


def test_the_loss_scale_is_undone():
    model = lora("embedding")
    plain = hear(model, lambda: loss_of(model, "embedding").backward())
    model.zero_grad()
    probes = Probes(Adapter(model))
    probes.arm(HOOKED, 1)
    (loss_of(model, "embedding") * 1024).backward()
    close(probes.collect(loss_scale=1024.0), plain, tolerance=1e-12)


def test_an_embedding_that_scales_its_output_is_scored_as_what_it_computes():
    class Scaled(nn.Embedding):
        embed_scale = torch.tensor(3.0, dtype=torch.float64)

        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * self.embed_scale

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = Scaled(9, 5, dtype=torch.float64)

        def forward(self, ids: Tensor) -> Tensor:
            return self.emb(ids)

    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["emb"]), autocast_adapter_dtype=False)
    randomise(model)
    ids = torch.tensor([[1, 2, 2, 8]])
    heard = hear(model, lambda: model(ids).square().sum().backward())["emb"]
    site = Adapter(model).sites["emb"]
    delta = (site.scaling * site.b() @ site.a()).detach().requires_grad_()
    base = model.base_model.model.emb.base_layer.weight
    (F.embedding(ids, base + delta.T) * 3.0).square().sum().backward()
    score = (delta * delta.grad).abs().sum() / math.sqrt(45)
    torch.testing.assert_close(heard[Signal.DELTA_SCORE], score.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_does_not_reach_the_sums(dtype: torch.dtype):
    model = lora("linear", dtype=torch.float32)

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = loss_of(model, "linear", dtype=torch.float32)
        loss.backward()

    heard, exact = hear(model, run), hear(model, lambda: loss_of(model, "linear", dtype=torch.float32).backward())
    close(heard, exact, HOOKED, 0.05)
    assert all(t.dtype in (torch.float32, torch.float64) for record in heard.values() for t in record.values())


# -- the ways a backward pass comes about ---------------------------------------------------------------------------


def checkpointed(model: nn.Module, reentrant: bool | None) -> nn.Module:
    base = model.get_base_model()
    if reentrant is not None:
        base.enable_input_require_grads()
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": reentrant})
    return model


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["minilm", "llama"])
def test_checkpointing_changes_nothing(name: str, reentrant: bool):
    def observe(checkpointing: bool | None) -> Observation:
        if name == "minilm":
            model = checkpointed(encoder(dropout=0.1), checkpointing)
            run = lambda: sentence_loss(model, reviews()).backward()  # noqa: E731
        else:
            model = checkpointed(lora("linear", lora_dropout=0.1, dtype=torch.float32).train(), checkpointing)
            run = lambda: loss_of(model, "linear", dtype=torch.float32).backward()  # noqa: E731
        torch.manual_seed(3)
        return hear(model, run)

    close(observe(reentrant), observe(None))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_does_not_show_inputs_twice(reentrant: bool):
    def observe(checkpointing: bool | None) -> dict[str, Tensor]:
        model = checkpointed(lora("linear", lora_dropout=0.1, dtype=torch.float32).train(), checkpointing)
        torch.manual_seed(3)
        heard = hear(model, lambda: loss_of(model, "linear", dtype=torch.float32).backward(), INPUT)
        return {name: rows.T @ rows for name, rows in heard.gather(Signal.INPUTS).items()}

    plain = observe(None)
    for name, covariance in observe(reentrant).items():
        torch.testing.assert_close(covariance, plain[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_accumulation_adds_up(reentrant: bool | None):
    model = checkpointed(encoder(), reentrant)
    batch = reviews()
    halves = [{k: v[i : i + 3] for k, v in batch.items()} for i in (0, 3)]

    def run(micro: list[dict[str, Tensor]]) -> None:
        for m in micro:
            (sentence_loss(model, m) / len(micro)).backward()

    close(hear(model, lambda: run(halves)), hear(model, lambda: run([batch])), LINEAR_IN_BATCH)
    twice = {k: torch.cat([v, v]) for k, v in halves[0].items()}
    scores = {Signal.DELTA_SCORE, Signal.DELTA_SCORE_SAMPLED}
    close(hear(model, lambda: run([halves[0], halves[0]])), hear(model, lambda: run([twice])), scores)


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_only_what_is_backwarded_counts(reentrant: bool | None):
    model = checkpointed(encoder(), reentrant)
    batch, other = reviews(), reviews(seed=9, padded=False)

    def run() -> None:
        sentence_loss(model, other)  # dropped
        loss = sentence_loss(model, batch)
        model.eval()
        with torch.no_grad():
            sentence_loss(model, other)  # an evaluation in the middle
        model.train()
        loss.backward()

    plain = hear(model, lambda: sentence_loss(model, batch).backward())
    close(hear(model, run), plain, tolerance=1e-6)


@pytest.mark.parametrize("reentrant", [None, False])
def test_two_forwards_before_one_backward_stay_apart(reentrant: bool | None):
    model = checkpointed(encoder(), reentrant)
    one, two = reviews(), reviews(seed=9, padded=False)

    def apart() -> None:
        sentence_loss(model, one).backward()
        sentence_loss(model, two).backward()

    def together() -> None:
        (sentence_loss(model, one) + sentence_loss(model, two)).backward()

    close(hear(model, together), hear(model, apart))


def test_gradients_are_taken_before_clipping():
    model = lora("conv")
    probes = Probes(Adapter(model))
    probes.arm(frozenset({Signal.GRAD_A, Signal.GRAD_B}), 1)
    loss_of(model, "conv").backward()
    raw = {n: (s.a(s.A.grad).clone(), s.b(s.B.grad).clone()) for n, s in Adapter(model).sites.items()}
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    heard = probes.collect()
    for name, (a, b) in raw.items():
        assert torch.equal(heard[name][Signal.GRAD_A], a)
        assert torch.equal(heard[name][Signal.GRAD_B], b)


def test_an_armed_step_trains_exactly_as_another():
    outcomes = []
    for armed in (False, True):
        model = lora("linear", lora_dropout=0.1).train()
        torch.manual_seed(0)
        before = torch.get_rng_state()
        probes = Probes(Adapter(model))
        if armed:
            probes.arm(frozenset(Signal) - AVERAGED, 1)
        assert torch.equal(torch.get_rng_state(), before)
        loss = loss_of(model, "linear")
        loss.backward()
        if armed:
            probes.collect()
        outcomes.append(
            (loss.detach(), torch.get_rng_state(), *(p.grad for p in model.parameters() if p.requires_grad))
        )
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


# -- several adapters, other layers, other states -------------------------------------------------------------------


def test_each_adapter_is_heard_by_itself():
    model = lora("linear")
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    both = [Probes(Adapter(model, name)) for name in ("default", "other")]
    for probes in both:
        probes.arm(HOOKED, 1)
    loss_of(model, "linear").backward()
    for probes, name, rank in zip(both, ("default", "other"), (4, 2), strict=True):
        heard = probes.collect()
        q = "model.layers.1.self_attn.q_proj"
        assert heard[q][Signal.S_A].shape == (rank, rank)
        site = Adapter(model, name).sites[q]
        assert torch.equal(heard[q][Signal.GRAD_A], site.A.grad)
    model.base_model.set_adapter("other")
    both[0].arm(HOOKED, 2)
    loss_of(model, "linear").backward()
    with pytest.raises(RankFlowError, match="no backward pass reached"):
        both[0].collect()


def test_an_embedding_whose_adapter_is_not_in_use_is_not_heard():
    model = lora("embedding")
    model.add_adapter("other", LoraConfig(r=2, target_modules=["emb"], init_lora_weights=False))
    model.set_adapter("other")
    with pytest.raises(RankFlowError, match="no backward pass reached"):
        hear(model, lambda: loss_of(model, "embedding").backward())


@pytest.mark.parametrize(
    ("kind", "changes", "what"),
    [("attention", {}, "attention"), ("experts", {}, "experts"), ("linear", {"use_dora": True}, "DoRA")],
)
def test_layers_without_activations_between_factors_are_refused_by_name(kind: str, changes: dict, what: str):
    model = lora(kind, **changes)
    adapter = Adapter(model)
    probes = Probes(adapter)
    for signal in (Signal.S_A, Signal.DELTA_SCORE, Signal.SKETCH):
        with pytest.raises(AdapterError, match=f"'{signal.value}' does not exist for {what}.*weights") as caught:
            probes.arm(frozenset({signal}), 1)
        assert str(caught.value).partition(":")[0] in adapter.sites
        assert not probes.armed
        assert hooks_on(model) == 0
    heard = hear(model, lambda: loss_of(model, kind).backward(), frozenset({Signal.GRAD_A, Signal.GRAD_B}))
    for name, site in adapter.sites.items():
        assert torch.equal(heard[name][Signal.GRAD_A], site.a(site.A.grad))
        assert torch.equal(heard[name][Signal.GRAD_B], site.b(site.B.grad))
        assert heard[name][Signal.GRAD_A].shape == site.a().shape


def test_a_frozen_module_is_heard_where_gradients_pass_and_missing_where_not():
    model = lora("linear")
    sites = Adapter(model).sites
    first, last = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
    scores = hear(model, lambda: loss_of(model, "linear").backward())
    for name in (first, last):
        sites[name].A.requires_grad_(False)
        sites[name].B.requires_grad_(False)
    heard = hear(model, lambda: loss_of(model, "linear").backward())
    assert first not in heard.gather(Signal.DELTA_SCORE)
    assert last not in heard.gather(Signal.GRAD_A)
    torch.testing.assert_close(heard[last][Signal.DELTA_SCORE], scores[last][Signal.DELTA_SCORE])


def test_reading_factors_needs_no_hook():
    model = lora("linear")
    probes = Probes(Adapter(model))
    probes.arm(frozenset({Signal.A, Signal.B, Signal.SINGULAR_VALUES}), 7)
    assert probes.armed
    assert hooks_on(model) == 0
    heard = probes.collect()
    assert heard.step == 7
    for name, site in Adapter(model).sites.items():
        sigma = torch.linalg.svdvals((site.scaling * site.b() @ site.a()).double())[:4]
        torch.testing.assert_close(heard[name][Signal.SINGULAR_VALUES], sigma.detach())
        assert torch.equal(heard[name][Signal.A], site.a())
        heard[name][Signal.A].zero_()
        assert site.a().abs().sum() > 0


def test_what_was_never_armed_or_never_heard_is_an_error_and_no_zero():
    model = lora("linear")
    probes = Probes(Adapter(model))
    with pytest.raises(RankFlowError, match="not armed"):
        probes.collect()
    probes.arm(HOOKED, 4)
    with pytest.raises(RankFlowError, match=r"no backward pass reached.*step 4"):
        probes.collect()
    probes.disarm()
    loss = loss_of(model, "linear")
    probes.arm(HOOKED, 5)
    loss.backward()
    with pytest.raises(RankFlowError, match=r"layers\.0\.self_attn\.q_proj: signal .*heard no backward"):
        probes.collect()
    probes.disarm()
    assert not probes.armed
    assert hooks_on(model) == 0


def test_arming_again_starts_afresh():
    model = lora("conv")
    once = hear(model, lambda: loss_of(model, "conv").backward())
    probes = Probes(Adapter(model))
    model.zero_grad()
    probes.arm(HOOKED, 1)
    loss_of(model, "conv").backward()
    probes.arm(HOOKED, 1)
    model.zero_grad()
    loss_of(model, "conv").backward()
    close(probes.collect(), once, tolerance=1e-12)


def test_random_choices_depend_on_seed_step_and_module_alone():
    model = lora("linear")
    run = lambda: loss_of(model, "linear").backward()  # noqa: E731
    signals = frozenset({Signal.DELTA_SCORE_SAMPLED, Signal.SKETCH})
    options = {"sample_rows": 4, "sketch_rows": 2}
    first = hear(model, run, signals, step=3, seed=1, **options)
    torch.rand(5)
    close(hear(model, run, signals, step=3, seed=1, **options), first, signals, 0)
    for change in ({"step": 4, "seed": 1}, {"step": 3, "seed": 2}):
        other = hear(model, run, signals, **change, **options)
        assert all((other[n][Signal.SKETCH] != first[n][Signal.SKETCH]).any() for n in first)
        assert any(other[n][Signal.DELTA_SCORE_SAMPLED] != first[n][Signal.DELTA_SCORE_SAMPLED] for n in first)


def test_a_compiled_model_runs_a_scored_step_eagerly():
    model = lora("embedding")
    expected = hear(model, lambda: loss_of(model, "embedding").backward())
    compiled = torch.compile(model, backend="eager")
    outputs(compiled, "embedding")
    heard = hear(model, lambda: loss_of(compiled, "embedding").backward())
    close(heard, expected, HOOKED - {Signal.GRAD_A, Signal.GRAD_B}, 1e-12)
    frames = torch._dynamo.utils.counters["frames"]["ok"]
    outputs(compiled, "embedding")
    assert torch._dynamo.utils.counters["frames"]["ok"] == frames  # compiled again, without being compiled anew


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_recording_never_waits_for_the_device(kind: str):
    model = lora(kind).cuda()
    x = inputs_of(kind).cuda()
    probes = Probes(Adapter(model))

    def run() -> None:
        out = model(x)
        (out.logits if hasattr(out, "logits") else out).square().sum().backward()

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        probes.arm(HOOKED, 1)
        run()
        heard = probes.collect()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(t).all() for record in heard.values() for t in record.values())

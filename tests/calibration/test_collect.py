"""Statistics of data: against sums worked out with hooks of our own, from every door, in and out of files."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import llama_base, lora, loss_of, minilm_base, minilm_folder, randomise, same, snapshot, wrap
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import rankflow
from rankflow import AdapterError, ConfigError, RankFlowError, Signal, Statistics, calibrate, squeeze, squeeze_model
from rankflow.calibration.base_model import calibrate_saved
from rankflow.calibration.statistics import digest
from rankflow.compress.plan_file import read_plan
from rankflow.formats.peft.adapter import PeftAdapter
from rankflow.lora.adapter import Adapter
from tests.cli.test_app import run

WORDS = [f"w{i}" for i in range(60)]


def llama(r: int = 4, **config: Any) -> PeftModel:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": 0.1, **config}
    model = wrap(llama_base(), LoraConfig(r=r, lora_alpha=6, task_type="CAUSAL_LM", **settings))
    randomise(model)
    return model


def minilm(**config: Any) -> PeftModel:
    targets = r"encoder\.layer\.[05]\.(attention\.self\.query|output\.dense)"
    settings: dict[str, Any] = {"r": 6, "target_modules": targets, "alpha_pattern": {"query": 40}, **config}
    model = wrap(minilm_base(), LoraConfig(task_type="FEATURE_EXTRACTION", **settings))
    randomise(model)
    return model


def token_batches(seed: int = 0, *, vocabulary: int = 60, labels: bool = True) -> list[dict[str, Tensor]]:
    """Two batches, one of twice the size, with padding at the ends of rows."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for rows, length in ((3, 9), (6, 9)):
        ids = torch.randint(4, vocabulary, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        for i in range(rows):
            mask[i, length - i % 4 :] = 0
        batch = {"input_ids": ids, "attention_mask": mask}
        batches.append(batch | ({"labels": ids.masked_fill(mask == 0, -100)} if labels else {}))
    return batches


def sentence_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return ((hidden * mask).sum(1) / mask.sum(1)).cumsum(-1).tanh().mean()


@contextmanager
def heard(model: nn.Module) -> Iterator[dict[str, dict[str, Tensor]]]:
    """Inputs and outputs of every adapted layer, from hooks on the layers themselves; outputs keep their gradients."""
    found: dict[str, dict[str, Tensor]] = {}

    def listen(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            if y.requires_grad:
                y.retain_grad()
            found[name] = {"x": args[0], "y": y}

        return hook

    handles = [site.layer.register_forward_hook(listen(name)) for name, site in Adapter(model).sites.items()]
    yield found
    for handle in handles:
        handle.remove()


def reference(model: nn.Module, batches: Iterable[Any], loss_of: Callable[[nn.Module, Any], Tensor]) -> dict[str, Any]:
    """E[z z^T] and E[d d^T] by module over all tokens that are not padding, d that of each batch's loss summed over
    its tokens, in float64."""
    model = model.double().eval()
    sums: dict[str, list[Any]] = {}
    for batch in batches:
        model.zero_grad()
        seen = batch["attention_mask"].bool()
        with heard(model) as found:
            (loss_of(model, batch) * seen.sum()).backward()
        for name, site in Adapter(model).sites.items():
            x, g = found[name]["x"][seen], found[name]["y"].grad
            z, d = x @ site.A.T, site.scaling * g[seen] @ site.B
            old = sums.get(name, [0, 0, 0])
            sums[name] = [old[0] + z.T @ z, old[1] + d.T @ d, old[2] + len(z)]
    return {name: ((zz / n).detach(), (dd / n).detach(), n) for name, (zz, dd, n) in sums.items()}


def its_loss(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).loss


MODELS = {"llama": (llama, its_loss, 60), "minilm": (minilm, sentence_loss, 3000)}


# -- what is collected ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", MODELS)
def test_statistics_are_those_of_a_float64_reference(which: str):
    make, loss, vocabulary = MODELS[which]
    model = make().train()
    batches = token_batches(vocabulary=vocabulary, labels=which == "llama")
    before = snapshot(model)
    found = calibrate(model, batches, loss_fn=None if which == "llama" else loss)
    assert same(snapshot(model), before), "neither modes nor gradients nor weights"
    wanted = reference(model, batches, loss)
    assert found.measured.keys() == wanted.keys()
    assert (found.tokens, found.batches) == (sum(int(b["attention_mask"].sum()) for b in batches), 2)
    for name, (zz, dd, n) in wanted.items():
        averages = found.measured[name]
        assert averages[Signal.MEASURED].tolist() == [n] * len(zz)
        for mine, other in ((averages[Signal.MEAN_ZZ], zz), (averages[Signal.MEAN_DD], dd)):
            assert mine.dtype == torch.float64
            assert (mine - other).norm() <= 1e-4 * other.norm(), name
            assert other.norm() > 0


def test_outputs_need_no_loss_and_are_the_same_without_one():
    model, batches = llama(), token_batches()
    plain = [{k: v for k, v in b.items() if k != "labels"} for b in batches]
    whole, part = calibrate(model, batches), calibrate(model, plain, metric="outputs")
    for name, averages in part.measured.items():
        assert averages.keys() == {Signal.MEAN_ZZ, Signal.MEASURED}
        torch.testing.assert_close(averages[Signal.MEAN_ZZ], whole.measured[name][Signal.MEAN_ZZ])
    with pytest.raises(RankFlowError, match="labels"):
        calibrate(model, plain)


def test_a_policy_in_training_measures_the_same_and_cuts_the_same(tmp_path: Path):
    """A run at learning rate 0 hears the very batches that are then run through the finished model and its file."""
    model = llama()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.save_pretrained(tmp_path / "adapter")
    batches = token_batches()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    policy = {
        "policy": "squeeze",
        "budget": {"mean_rank": 2},
        "when": {"start": 3, "every": 3},
        "params": {"metric": "loss", "memory": 10**12, "gauge": "balanced", "allocate": "uniform"},
    }
    with pytest.warns(UserWarning, match="after step 3, the last of the run"):
        flow = rankflow.attach(model, optimizer, policy, total_steps=3)

    def step(batch: dict[str, Tensor]) -> None:
        model(**batch).loss.backward()
        flow.before_step()
        optimizer.step()
        flow.after_step()
        optimizer.zero_grad()

    for batch in batches:
        step(batch)
    trained = Statistics.load(rankflow.save_statistics(flow, tmp_path / "trained.safetensors"))
    apart = copy.deepcopy(model)  # the run would hear what runs through its own model
    studied = calibrate(apart, batches)
    assert trained.digests == studied.digests
    for name, averages in studied.measured.items():
        for signal, value in averages.items():
            torch.testing.assert_close(trained.measured[name][signal], value, rtol=1e-6, atol=0)

    whole = calibrate(apart, [*batches, batches[0]])
    options: dict[str, Any] = {"target_rank": 2, "metric": "loss", "calibration": whole}
    report = squeeze(tmp_path / "adapter", tmp_path / "file", **options)
    step(batches[0])
    assert set(flow.layout.ranks.values()) == {2}
    flow.finish()
    filed = PeftAdapter(tmp_path / "file")
    for name, site in Adapter(model).sites.items():
        a, b = filed.factors(name)
        size = torch.linalg.matrix_norm(site.B @ site.A)
        assert torch.linalg.matrix_norm(site.B @ site.A - b @ a) <= 1e-5 * size, name
    assert report.metric == "loss"


@pytest.mark.parametrize("target", [{"target_rank": 2}, {"energy": 0.8}, {"max_params": 400}], ids=str)
@pytest.mark.parametrize("metric", ["outputs", "loss"])
def test_a_model_in_memory_and_its_file_are_squeezed_alike(tmp_path: Path, target: dict, metric: str):
    model = llama()
    model.save_pretrained(tmp_path / "src")
    statistics = calibrate(model, token_batches())
    options = {"metric": metric, "calibration": statistics, "gauge": "keep", **target}
    filed = squeeze(tmp_path / "src", tmp_path / "file", **options)
    live = squeeze_model(model, **options)
    assert live.ranks == filed.ranks
    assert live.relative_error == pytest.approx(filed.relative_error)
    assert live.weight_error == pytest.approx(filed.weight_error)
    model.save_pretrained(tmp_path / "live")
    one, other = PeftAdapter(tmp_path / "live"), PeftAdapter(tmp_path / "file")
    for name in one.layout:
        assert all(torch.equal(*pair) for pair in zip(one.factors(name), other.factors(name), strict=True))


# -- what comes of it -------------------------------------------------------------------------------------------------


def inputs_of(model: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Every token's input of every adapted layer, ``[tokens, in]`` float64."""
    found: dict[str, list[Tensor]] = {}
    model.eval()
    for batch in batches:
        with heard(model) as records, torch.no_grad():
            model(**batch)
        for name, record in records.items():
            found.setdefault(name, []).append(record["x"][batch["attention_mask"].bool()])
    return {name: torch.cat(parts).double() for name, parts in found.items()}


def updates(folder: Path) -> dict[str, Tensor]:
    adapter = PeftAdapter(folder)
    pairs = {name: [t.double() for t in adapter.factors(name)] for name in adapter.layout}
    return {name: adapter.layout[name].scaling * b @ a for name, (a, b) in pairs.items()}


@pytest.mark.parametrize("which", MODELS)
def test_outputs_change_least_and_as_predicted(tmp_path: Path, which: str):
    make, _, vocabulary = MODELS[which]
    model = make()
    model.save_pretrained(tmp_path / "src")
    batches = token_batches(vocabulary=vocabulary, labels=False)
    statistics = calibrate(model, batches, metric="outputs")
    seen = inputs_of(model, batches)
    before = updates(tmp_path / "src")
    error, weights = {}, {}
    for metric in ("weights", "outputs"):
        options = {} if metric == "weights" else {"calibration": statistics}
        report = squeeze(tmp_path / "src", tmp_path / metric, target_rank=2, metric=metric, **options)
        assert set(report.ranks.values()) == {2}
        after = updates(tmp_path / metric)
        changes = {n: (seen[n] @ (after[n] - before[n]).T).square().sum(-1).mean().sqrt().item() for n in before}
        norms = {n: (seen[n] @ before[n].T).square().sum(-1).mean().sqrt().item() for n in before}
        error[metric] = math.hypot(*changes.values()) / math.hypot(*norms.values())
        weights[metric] = math.hypot(*(torch.linalg.matrix_norm(after[n] - before[n]).item() for n in before))
        weights[metric] /= math.hypot(*(torch.linalg.matrix_norm(before[n]).item() for n in before))
        assert report.weight_error == pytest.approx(weights[metric], rel=1e-4)
        for module in report.modules:
            size = torch.linalg.matrix_norm(before[module.name])
            off = torch.linalg.matrix_norm(after[module.name] - before[module.name]) / size
            assert module.weight_error == pytest.approx(off.item(), rel=1e-4)
            if metric == "outputs":
                assert module.error == pytest.approx(changes[module.name], rel=1e-4)
                assert module.relative_error == pytest.approx(changes[module.name] / norms[module.name], rel=1e-4)
    assert report.relative_error == pytest.approx(error["outputs"], rel=1e-4)
    assert error["outputs"] < 0.99 * error["weights"]
    assert weights["outputs"] > weights["weights"]


def test_the_predicted_change_of_the_loss_is_that_of_its_gradients(tmp_path: Path):
    """Kronecker-factored: E[d d^T] and E[z z^T] on the two sides of what is cut, from the reference's own sums."""
    model = llama()
    model.save_pretrained(tmp_path / "src")
    batches = token_batches()
    options: dict[str, Any] = {"metric": "loss", "calibration": calibrate(model, batches)}
    report = squeeze(tmp_path / "src", tmp_path / "out", target_rank=2, **options)
    plain = squeeze(tmp_path / "src", tmp_path / "plain", target_rank=2)
    sums = reference(model, batches, its_loss)
    before = PeftAdapter(tmp_path / "src")

    def lost(name: str, folder: str) -> tuple[float, float]:
        (a, b), (c, d) = ([t.double() for t in f.factors(name)] for f in (before, PeftAdapter(tmp_path / folder)))
        cut = torch.eye(len(a)).double() - torch.linalg.pinv(b) @ d @ c @ torch.linalg.pinv(a)
        zz, dd, _ = sums[name]
        return tuple(float((torch.trace(D.T @ dd @ D @ zz)).sqrt()) for D in (cut, torch.eye(len(a)).double()))

    for module in report.modules:
        change, whole = lost(module.name, "out")
        assert module.error == pytest.approx(change, rel=1e-3)
        assert module.relative_error == pytest.approx(change / whole, rel=1e-3)
        assert change < lost(module.name, "plain")[0]
    assert report.weight_error > plain.weight_error


def test_a_module_with_too_few_tokens_is_cut_by_its_weights_and_the_report_says_so(tmp_path: Path):
    model = llama()
    model.save_pretrained(tmp_path / "src")
    whole = calibrate(model, token_batches())
    poor = "model.layers.1.self_attn.v_proj"
    few = {**whole.measured[poor], Signal.MEASURED: torch.tensor([50.0, 50.0, 3.9, 50.0]).double()}
    statistics = Statistics({**whole.measured, poor: few}, whole.digests, whole.tokens)
    options: dict[str, Any] = {"metric": "outputs", "calibration": statistics}
    report = squeeze(tmp_path / "src", tmp_path / "each", target_rank=2, **options)
    assert {m.metric for m in report.modules if m.name != poor} == {"outputs"}
    (module,) = (m for m in report.modules if m.name == poor)
    assert module.metric == "weights"
    assert module.relative_error == module.weight_error
    assert any(f"1 of {len(report.modules)} modules are cut by their weights" in n and poor in n for n in report.notes)
    plain = squeeze(tmp_path / "src", tmp_path / "plain", target_rank=2)
    assert torch.equal(updates(tmp_path / "each")[poor], updates(tmp_path / "plain")[poor])
    counted = [m for m in report.modules if m.name != poor]
    assert report.error == pytest.approx(math.hypot(*(m.error for m in counted)))

    shared = squeeze(tmp_path / "src", tmp_path / "shared", max_params=400, **options)
    assert {m.metric for m in shared.modules} == {"weights"}
    assert shared.metric == "weights"
    assert any(f"{len(plain.modules)} of {len(plain.modules)} modules" in note for note in shared.notes)
    assert shared.ranks == squeeze(tmp_path / "src", tmp_path / "by weights", max_params=400).ranks


def test_data_decide_who_gets_the_ranks(tmp_path: Path):
    """A module whose inputs are tiny gives its directions up, however large its weights are."""
    model = lora("linear", dtype=torch.float64)
    model.save_pretrained(tmp_path / "src")
    whole = calibrate(model, [{"input_ids": torch.arange(60).reshape(4, 15)}], metric="outputs")
    quiet = next(iter(whole.measured))
    silent = {**whole.measured[quiet], Signal.MEAN_ZZ: whole.measured[quiet][Signal.MEAN_ZZ] * 1e-12}
    statistics = Statistics({**whole.measured, quiet: silent}, whole.digests, whole.tokens)
    options: dict[str, Any] = {"dry_run": True, "energy": 0.9, "across": True}
    assert squeeze(tmp_path / "src", metric="outputs", calibration=statistics, **options).ranks[quiet] == 0
    assert squeeze(tmp_path / "src", **options).ranks[quiet] > 0


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An adapter and its statistics."""
    folder = tmp_path_factory.mktemp("saved")
    model = llama()
    model.save_pretrained(folder / "adapter")
    calibrate(model, token_batches(), base="some/base", data="texts.jsonl").save(folder / "stats.safetensors")
    return folder / "adapter", folder / "stats.safetensors"


def test_a_file_holds_all_there_is(saved: tuple[Path, Path], tmp_path: Path):
    adapter, path = saved
    found = Statistics.load(path)
    assert (found.base, found.data, found.batches) == ("some/base", "texts.jsonl", 2)
    assert list(found.measured) == list(found.digests)
    assert found.digests == {n: digest(*PeftAdapter(adapter).factors(n)) for n in PeftAdapter(adapter).layout}
    again = Statistics.load(found.save(tmp_path / "again.safetensors"))
    assert again.digests == found.digests
    assert same([dict(m) for m in again.measured.values()], [dict(m) for m in found.measured.values()])
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    with pytest.raises(ConfigError, match="is there already"):
        found.save(tmp_path / "again.safetensors")
    with pytest.raises(ConfigError, match=r"a \.safetensors file"):
        found.save(tmp_path / "again.bin")


def other_factors(folder: Path) -> None:
    randomise(model := llama(), seed=9)
    model.save_pretrained(folder)


OTHERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "weights": (other_factors, "another adapter: the factors of model.layers.0.* are not those"),
    "ranks": (lambda folder: llama(r=3).save_pretrained(folder), "another adapter: .* rank 4 in them and 3 here"),
    "modules": (lambda folder: llama(target_modules=["q_proj"]).save_pretrained(folder), "rank 4 in them and none"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_statistics_of_another_adapter_are_refused(saved: tuple[Path, Path], tmp_path: Path, case: str):
    make, message = OTHERS[case]
    make(tmp_path / "other")
    for target in ({"target_rank": 2}, {"energy": 0.9}, {"ranks": dict.fromkeys(Statistics.load(saved[1]).digests, 1)}):
        with pytest.raises(ConfigError, match=message):
            squeeze(tmp_path / "other", tmp_path / "out", metric="outputs", calibration=saved[1], **target)
    assert [p.name for p in tmp_path.iterdir()] == ["other"]
    model = llama()
    squeeze_model(model, target_rank=3)
    with pytest.raises(ConfigError, match="another adapter"):
        squeeze_model(model, target_rank=2, metric="outputs", calibration=saved[1])


IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"metric": "vibes"}, "unknown metric 'vibes'; known: weights, outputs, loss"),
    "missing": ({"metric": "outputs", "calibration": None}, "needs statistics of data"),
    "needless": ({"metric": "weights"}, "no use for statistics"),
    "noise": ({"target_rank": None, "auto": True}, "auto knows the noise of weights only"),
    "residual": ({"keep_residual": "residual.safetensors"}, "leaves nothing that puts it back"),
    "backend": ({"backend": "torch"}, "works in metric 'weights' only"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_options(saved: tuple[Path, Path], tmp_path: Path, case: str):
    changes, message = IMPOSSIBLE[case]
    options = {"target_rank": 2, "metric": "outputs", "calibration": saved[1], **changes}
    if "keep_residual" in options:
        options["keep_residual"] = tmp_path / options["keep_residual"]
    with pytest.raises(ConfigError, match=message):
        squeeze(saved[0], tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_statistics_without_a_loss_serve_outputs_only(saved: tuple[Path, Path], tmp_path: Path):
    part = calibrate(llama(), token_batches(), metric="outputs").save(tmp_path / "part.safetensors")
    squeeze(saved[0], tmp_path / "out", target_rank=2, metric="outputs", calibration=part)
    with pytest.raises(ConfigError, match="collected without one"):
        squeeze(saved[0], tmp_path / "more", target_rank=2, metric="loss", calibration=part)


def spoilt(path: Path, out: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> Path:
    """A copy of a statistics file with tensors and header changed."""
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        header = json.loads(file.metadata()["rankflow_statistics"])
    change(tensors, header)
    save_file(tensors, out, {"rankflow_statistics": json.dumps(header)})
    return out


ZZ = "model.layers.0.self_attn.q_proj.mean_zz"
MEASURED = "model.layers.0.self_attn.q_proj.measured"

DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, Any]], object], str]] = {
    "NaN": (lambda t, h: t[ZZ].__setitem__((0, 0), math.nan), "holds NaN or infinity"),
    "infinity": (lambda t, h: t[ZZ].__setitem__((0, 0), math.inf), "holds NaN or infinity"),
    "asymmetric": (lambda t, h: t[ZZ].__setitem__((0, 1), t[ZZ][1, 0] + 1), "no average of products"),
    "negative": (lambda t, h: t[ZZ].neg_(), "no average of products"),
    "shape": (lambda t, h: t.update({ZZ: t[ZZ][:2].clone()}), r"mean_zz is torch.float64 \[2, 4\], beside 4"),
    "dtype": (lambda t, h: t.update({ZZ: t[ZZ].float()}), "mean_zz is torch.float32"),
    "tokens": (lambda t, h: t[MEASURED].neg_(), "measured is not a number of tokens"),
    "tokens' shape": (lambda t, h: t.update({MEASURED: t[MEASURED].reshape(2, 2)}), r"measured is .*\[2, 2\]"),
    "nothing": (lambda t, h: t.update({MEASURED: t[MEASURED][:0].clone()}), r"measured is .*\[0\]"),
    "missing": (lambda t, h: t.pop(ZZ), "q_proj.mean_zz does not go with"),
    "half a loss": (lambda t, h: t.pop(ZZ.replace("zz", "dd")), "q_proj.mean_dd does not go with"),
    "surplus": (lambda t, h: t.update({"../x": torch.zeros(1)}), r"\.\./x does not go with"),
    "no module": (lambda t, h: (t.clear(), h["digests"].clear(), t.update(x=torch.zeros(1))), "does not go with"),
    "version": (lambda t, h: h.update(version=2), "version of the statistics"),
    "header": (lambda t, h: h.update(code="import os"), "code of the statistics"),
    "digests": (lambda t, h: h.update(digests=[1]), "digests of the statistics"),
    "count": (lambda t, h: h.update(tokens=-1), "tokens of the statistics"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_statistics_are_one_clear_error(saved: tuple[Path, Path], tmp_path: Path, case: str):
    change, message = DAMAGE[case]
    path = spoilt(saved[1], tmp_path / "bad.safetensors", change)
    with pytest.raises(AdapterError, match=message):
        squeeze(saved[0], tmp_path / "out", target_rank=2, metric="outputs", calibration=path)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.safetensors"]


def test_other_files_are_no_statistics(saved: tuple[Path, Path], tmp_path: Path):
    with pytest.raises(AdapterError, match="is not a statistics file"):
        Statistics.load(saved[0] / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="no such file"):
        Statistics.load(tmp_path / "nowhere.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "bad.safetensors", {"rankflow_statistics": "{{"})
    with pytest.raises(AdapterError, match="header of the statistics"):
        Statistics.load(tmp_path / "bad.safetensors")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_flipped_and_lost_bytes_are_an_error_or_nothing(
    saved: tuple[Path, Path], tmp_path_factory, data: st.DataObject
):
    raw = bytearray(saved[1].read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1) | st.integers(0, 2000))
    if data.draw(st.booleans()):
        raw = raw[:at]
    else:
        raw[at] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("bytes") / "stats.safetensors"
    path.write_bytes(raw)
    try:
        found = Statistics.load(path)
    except AdapterError as e:
        assert str(path) in str(e)  # noqa: PT017
    else:
        assert all(bool(t.isfinite().all()) for m in found.measured.values() for t in m.values())


def test_a_run_that_measured_nothing_has_no_statistics(tmp_path: Path):
    model = llama()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with rankflow.attach(model, optimizer, "hold", total_steps=1) as flow, pytest.raises(ConfigError, match="nothing"):
        rankflow.save_statistics(flow, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_calibrated_says_why():
    model = llama()
    with pytest.raises(ConfigError, match="no batch"):
        calibrate(model, [])
    with pytest.raises(ConfigError, match="takes no data"):
        calibrate(model, token_batches(), metric="weights")
    with pytest.raises(AdapterError, match="does not exist for DoRA"):
        calibrate(llama(use_dora=True), token_batches())
    with pytest.raises(AdapterError, match="no adapter 'x'"):
        calibrate(model, token_batches(), adapter_name="x")


def test_modules_that_were_never_heard_are_there_as_unmeasured(tmp_path: Path):
    model = wrap(minilm_base(), LoraConfig(r=2, target_modules=["pooler.dense", "query"]))
    randomise(model)
    found = calibrate(model, token_batches(vocabulary=3000, labels=False), loss_fn=sentence_loss)
    assert found.measured["pooler.dense"][Signal.MEASURED].tolist() == [0.0, 0.0]
    report = squeeze_model(model, target_rank=1, metric="loss", calibration=found)
    assert [m.name for m in report.modules if m.metric == "weights"] == ["pooler.dense"]
    whole = calibrate(model, token_batches(vocabulary=3000, labels=False), metric="outputs")
    assert whole.measured["pooler.dense"][Signal.MEASURED].min() > 0


@pytest.mark.parametrize("kind", ["embedding", "conv", "conv1d_transformers"])
def test_layers_of_every_kind_are_the_same_to_a_file(tmp_path: Path, kind: str):
    model = lora(kind, dtype=torch.float32)
    model.save_pretrained(tmp_path / "src")
    statistics = calibrate(model, [None], loss_fn=lambda model, _: loss_of(model, kind, dtype=torch.float32))
    options: dict[str, Any] = {"target_rank": 2, "metric": "loss", "calibration": statistics, "gauge": "keep"}
    filed = squeeze(tmp_path / "src", tmp_path / "file", **options)
    live = squeeze_model(model, **options)
    assert {m.metric for m in live.modules} == {"loss"}
    assert [m.error for m in live.modules] == pytest.approx([m.error for m in filed.modules])
    assert 0 < live.relative_error < 1


# -- from files alone -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer, without a pad token, in `base`; an adapter; texts."""
    folder = tmp_path_factory.mktemp("home")
    words = {word: i for i, word in enumerate(["<unk>", "</s>", *WORDS])}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", eos_token="</s>")
    tokenizer.save_pretrained(folder / "base")
    model = llama()
    model.save_pretrained(folder / "adapter")
    model.unload().save_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 9, (20,), generator=generator).tolist()
    texts = [" ".join(WORDS[i] for i in torch.randint(0, 60, (n,), generator=generator)) for n in lengths]
    (folder / "texts.txt").write_text("\n".join(texts))
    return folder


def test_a_saved_adapter_on_its_base_is_measured_as_a_live_one(home: Path):
    progress: list[tuple[int, int]] = []
    found = calibrate_saved(
        home / "adapter",
        home / "base",
        home / "texts.txt",
        batches=3,
        batch_size=4,
        max_length=6,
        progress=lambda done, total: progress.append((done, total)),
    )
    assert progress == [(1, 3), (2, 3), (3, 3)]
    texts = [[2 + WORDS.index(w) for w in t.split()][:6] for t in (home / "texts.txt").read_text().splitlines()[:12]]
    batches = []
    for at in range(0, 12, 4):
        some = texts[at : at + 4]
        wide = max(map(len, some))
        ids = torch.tensor([t + [1] * (wide - len(t)) for t in some])
        mask = torch.tensor([[1] * len(t) + [0] * (wide - len(t)) for t in some])
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    live = calibrate(llama(), batches)
    assert found.digests == live.digests
    assert found.tokens == sum(map(len, texts))
    assert (found.base, found.data) == (str(home / "base"), "texts.txt")
    for name, averages in live.measured.items():
        for signal, value in averages.items():
            torch.testing.assert_close(found.measured[name][signal], value, rtol=1e-5, atol=1e-12)
    found.check(PeftAdapter(home / "adapter").layout, "loss")


def test_a_classifier_is_loaded_with_its_head_and_labels_by_name_or_number(tmp_path: Path):
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(minilm_folder(), num_labels=3)
    model = wrap(base, LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query"]))
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    rows = [("a fine film", 0), ("no good at all", 2), ("so so, I would say", "1"), ("dull", "LABEL_2")]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": t, "label": n}) for t, n in rows))
    found = calibrate_saved(tmp_path / "adapter", minilm_folder(), tmp_path / "x.jsonl")

    from transformers import AutoTokenizer

    batch = dict(
        AutoTokenizer.from_pretrained(minilm_folder())([t for t, _ in rows], padding=True, return_tensors="pt")
    )
    live = calibrate(model, [{**batch, "labels": torch.tensor([0, 2, 1, 2])}])
    for name, averages in live.measured.items():
        for signal, value in averages.items():
            torch.testing.assert_close(found.measured[name][signal], value, rtol=1e-4, atol=1e-12)
    for label in (3, -1, "LABEL_9", None, True, 1.5):
        (tmp_path / "x.jsonl").write_text(json.dumps({"text": "a", "label": label}))
        with pytest.raises(ConfigError, match="neither a number below 3 nor one of LABEL_0, LABEL_1, LABEL_2"):
            calibrate_saved(tmp_path / "adapter", minilm_folder(), tmp_path / "x.jsonl")
        calibrate_saved(tmp_path / "adapter", minilm_folder(), tmp_path / "x.jsonl", metric="outputs")


def test_an_encoder_has_outputs_and_no_loss(tmp_path: Path):
    minilm().save_pretrained(tmp_path / "adapter")
    (tmp_path / "x.txt").write_text("a fine film\n\nno good at all\n")
    found = calibrate_saved(tmp_path / "adapter", minilm_folder(), tmp_path / "x.txt", metric="outputs")
    assert found.tokens == 5 + 6
    with pytest.raises(ConfigError, match="no loss of its own; use metric 'outputs'"):
        calibrate_saved(tmp_path / "adapter", minilm_folder(), tmp_path / "x.txt")


def configured(folder: Path, source: Path, **changes: Any) -> Path:
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_what_cannot_be_loaded_says_why(home: Path, tmp_path: Path):
    adapter, base, data = home / "adapter", home / "base", home / "texts.txt"
    with pytest.raises(ConfigError, match="no config that transformers loads"):
        calibrate_saved(adapter, tmp_path / "nowhere", data)
    with pytest.raises(ConfigError, match=r"PEFT cannot put .* on it|has no module"):
        calibrate_saved(adapter, minilm_folder(), data, metric="outputs")
    odd = configured(tmp_path / "odd", adapter, task_type="TOKEN_CLS")
    with pytest.raises(ConfigError, match="task type TOKEN_CLS is not among CAUSAL_LM"):
        calibrate_saved(odd, base, data)
    plain = configured(tmp_path / "plain", adapter, task_type=None)
    assert calibrate_saved(plain, base, data, batches=1).digests
    wider = configured(tmp_path / "wider", adapter)
    llama(target_modules=["q_proj", "o_proj"]).save_pretrained(wider)
    assert len(calibrate_saved(wider, base, data, batches=1).measured) == 4
    for option in ("batches", "batch_size", "max_length"):
        with pytest.raises(ConfigError, match=f"{option} is 0"):
            calibrate_saved(adapter, base, data, **{option: 0})
    with pytest.raises(ConfigError, match="cuda:99"):
        calibrate_saved(adapter, base, data, device="cuda:99")
    with pytest.raises(ConfigError, match="takes no data"):
        calibrate_saved(adapter, base, data, metric="weights")


def test_from_the_command_line(home: Path, tmp_path: Path):
    stats, texts = tmp_path / "stats.safetensors", home / "texts.txt"
    result = run("calibrate", home / "adapter", "--base", home / "base", "--data", texts, "-o", stats, "--batches", 2)
    found = Statistics.load(stats)
    assert f"6 modules, {found.tokens} tokens in 2 batches" in result.stdout
    assert "is there already" in run(
        "calibrate", home / "adapter", "--base", home / "base", "--data", texts, "-o", stats, status=2
    ).stderr  # fmt: skip
    common = ("squeeze", home / "adapter", "--target-rank", 2, "--metric", "loss")
    shown = run(*common, "--calibration", stats, "-o", tmp_path / "one", "--report", tmp_path / "one.json").stdout
    report = json.loads((tmp_path / "one.json").read_text())
    last = next(line for line in shown.splitlines() if line.split()[:1] == ["all"])
    assert last.split()[3:6] == [f"{report[k]:.2%}" for k in ("energy_kept", "weight_error", "relative_error")]
    headings = shown.partition("\n─")[0].split()  # which break over lines
    assert headings.count("error") == 2
    assert {"weight", "loss"} <= {*headings}
    assert report["energy_kept"] == pytest.approx(1 - report["relative_error"] ** 2)

    run(*common, "--calibration", texts, "--base", home / "base", "-o", tmp_path / "two")
    whole = calibrate_saved(home / "adapter", home / "base", texts)
    squeeze(home / "adapter", tmp_path / "three", target_rank=2, metric="loss", calibration=whole)
    two, three = (updates(tmp_path / folder) for folder in ("two", "three"))
    assert all(torch.equal(two[name], three[name]) for name in two)

    plan = tmp_path / "plan.yaml"
    run("plan", home / "adapter", "--energy", 0.8, "--across", "--metric", "loss", "--calibration", stats, "-o", plan)
    options = {"energy": 0.8, "across": True, "metric": "loss", "calibration": stats, "dry_run": True}
    assert read_plan(plan) == squeeze(home / "adapter", **options).ranks


def test_mistakes_on_the_command_line(home: Path, tmp_path: Path):
    def refused(*options: object) -> str:
        result = run("squeeze", home / "adapter", "--target-rank", 2, "-o", tmp_path / "out", *options, status=2)
        assert result.stderr.count("\n") == 1
        assert not list(tmp_path.iterdir())
        return result.stderr

    texts = home / "texts.txt"
    assert "needs statistics of data" in refused("--metric", "outputs")
    assert "go together" in refused("--metric", "outputs", "--base", home / "base")
    assert "go together" in refused("--metric", "outputs", "--calibration", texts)
    assert "go together" in refused("--metric", "loss", "--calibration", "x.safetensors", "--base", home / "base")
    (tmp_path / "out").mkdir()
    assert (
        "is there already"
        in run(
            *("squeeze", home / "adapter", "--target-rank", 2, "-o", tmp_path / "out", "--metric", "loss"),
            *("--calibration", home / "nowhere.txt", "--base", home / "base"),
            status=2,
        ).stderr
    )
    (tmp_path / "out").rmdir()
    assert "takes no data" in refused("--calibration", texts, "--base", home / "base")
    assert "no such file" in refused("--metric", "loss", "--calibration", tmp_path / "x.safetensors")
    assert "no such file" in refused("--metric", "loss", "--calibration", tmp_path / "x.txt", "--base", home / "base")

"""At every moment of saving there is a checkpoint to resume from, and what cannot be loaded changes nothing."""

from __future__ import annotations

import builtins
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same, snapshot
from loops import same_weights, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Trainer

import rankflow
from rankflow.errors import AdapterError, CheckpointError
from rankflow.training.checkpoint import incomplete
from rankflow.training.trainer import RankFlowCallback
from tests.training.test_trainer import EVALUATED, Metric, default_weights, trainer

ONE = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "logging_strategy": "no"}
GROW = {
    "policy": "increlora",
    "budget": {"mean_rank": 4},
    "when": {"start": 1, "every": 1},
    "params": {"score_fraction": 1.0, "window": 1},
}


class Killed(BaseException):
    """Where the process ends: nothing of it catches this, and it cleans nothing up (`killed_at`)."""


@contextmanager
def killed_at(place: int) -> Iterator[Callable[[], int]]:
    """The process ends before the file operation of that number, inside the saving of a checkpoint; what is yielded
    tells how many there were. From then on nothing on disk changes."""
    count, dead = 0, False
    with pytest.MonkeyPatch.context() as patch:

        def guard(owner: Any, name: str, counts: Callable[..., bool] = lambda *a, **k: True) -> None:
            real = getattr(owner, name)

            def operation(*args: Any, **kwargs: Any) -> Any:
                nonlocal count, dead
                if counts(*args, **kwargs):
                    if dead or count == place:
                        dead = True
                        raise Killed
                    count += 1
                return real(*args, **kwargs)

            patch.setattr(owner, name, operation)

        guard(builtins, "open", lambda file, mode="r", *a, **k: any(c in mode for c in "wax+"))
        for name in ("mkdir", "replace", "rename", "unlink", "remove", "rmdir"):
            guard(os, name)
        guard(torch, "save")
        guard(PeftModel, "save_pretrained")
        yield lambda: count


def run_of(out: Path, **options: Any) -> Trainer:
    best = [Metric({2: 1.0, 4: 0.5, 6: 0.7})] if options.get("load_best_model_at_end") else []
    return trainer(out, RankFlowCallback(GROW, best="any"), *best, **{**ONE, "max_steps": 6, **options})


BEST = {**EVALUATED, "save_steps": 2, "eval_steps": 2}
ALL_KINDS: list[dict[str, Any]] = [{}, BEST, {"save_only_model": True}]


@pytest.mark.parametrize("options", ALL_KINDS, ids=["one", "best", "only model"])
@pytest.mark.parametrize("share", [23, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.*cannot be resumed from", "ignore:.*was saved without its optimizer")
def test_wherever_saving_is_killed_a_checkpoint_is_left_that_resumes(tmp_path: Path, options: Any, share: int):
    whole = run_of(tmp_path / "whole", **options)
    whole.train()
    resumed = 0
    for times in range(10**4):
        out = tmp_path / f"{times}"
        save, saves = Trainer._save_checkpoint, 0

        def second(self: Trainer, *args: Any, save: Any = save, at: int = share * times, **kwargs: Any) -> Any:
            nonlocal saves, places
            saves += 1
            if saves < 2:
                return save(self, *args, **kwargs)
            with killed_at(at) as count:
                try:
                    return save(self, *args, **kwargs)
                finally:
                    places = count()

        places = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "_save_checkpoint", second)
            try:
                run_of(out, **options).train()
            except Killed:
                pass
            else:
                break
        again = run_of(out, **options)
        again.train(resume_from_checkpoint=True)
        resumed += 1
        if not options.get("save_only_model"):
            assert same_weights(default_weights(again.model), default_weights(whole.model)), places
        shutil.rmtree(out)
    assert resumed > 20 / share


def three(out: Path) -> list[Path]:
    """Checkpoints of steps 2, 4, 6."""
    run_of(out, save_total_limit=3).train()
    return [out / f"checkpoint-{step}" for step in (2, 4, 6)]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


HALVES: dict[str, Callable[[Path], object]] = {
    "no trainer state": lambda c: (c / "trainer_state.json").unlink(),
    "trainer state cut short": lambda c: cut(c / "trainer_state.json"),
    "no rank state": lambda c: shutil.rmtree(c / "rankflow"),
    "rank state cut short": lambda c: cut(c / "rankflow" / "state.safetensors"),
    "no adapter": lambda c: (c / "adapter_model.safetensors").unlink(),
    "adapter cut short": lambda c: cut(c / "adapter_model.safetensors"),
    "no adapter config": lambda c: (c / "adapter_config.json").unlink(),
    "optimizer cut short": lambda c: cut(c / "optimizer.pt"),
    "rank state of another save": lambda c: (
        shutil.rmtree(c / "rankflow"),
        shutil.copytree(c.parent / "checkpoint-2" / "rankflow", c / "rankflow"),
    ),
    "empty": lambda c: (shutil.rmtree(c), c.mkdir()),
}


def test_half_checkpoints_are_passed_by_for_the_newest_whole_one_and_refused_where_they_are_named(tmp_path: Path):
    first, second, third = three(tmp_path / "run")
    for what, damage in HALVES.items():
        out = tmp_path / what
        shutil.copytree(first.parent, out)
        half = out / third.name
        damage(half)
        assert incomplete(half, "default"), what
        assert incomplete(out / second.name, "default") is None
        if what not in ("no rank state", "optimizer cut short"):  # they are all told apart in one place
            continue
        with pytest.warns(UserWarning, match=f"{half} cannot be resumed from: .* Going on from {out / second.name}"):
            run_of(out, save_strategy="no").train(resume_from_checkpoint=True)
        run = run_of(out)
        before = snapshot(run.model)
        with pytest.raises(CheckpointError, match=str(out / second.name)):
            run.train(resume_from_checkpoint=str(half))
        assert same(snapshot(run.model), before), what
        shutil.rmtree(out)
    for checkpoint in (first, second, third):
        (checkpoint / "trainer_state.json").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-6.*checkpoint-4.*checkpoint-2"):
        run_of(first.parent).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="No valid checkpoint"):  # the Trainer's own words
        run_of(tmp_path / "nothing").train(resume_from_checkpoint=True)


def test_a_checkpoint_that_is_written_over_is_not_taken_for_a_whole_one(tmp_path: Path):
    first, *_ = three(tmp_path)

    def fail(self: PeftModel, *args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PeftModel, "save_pretrained", fail)
        with pytest.raises(OSError, match="No space"):
            run_of(tmp_path).train()
    with pytest.raises(CheckpointError, match="checkpoint-6"):
        run_of(tmp_path).train(resume_from_checkpoint=str(first))


def test_a_model_saved_alone_resumes_and_says_what_begins_anew(tmp_path: Path):
    run_of(tmp_path, save_only_model=True, save_total_limit=3).train()
    run = run_of(tmp_path, save_only_model=True)
    with pytest.warns(UserWarning, match="without its optimizer"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert run.state.global_step == 6


def test_a_best_model_that_cannot_be_loaded_leaves_the_run_as_it_was(tmp_path: Path):
    bad = three(tmp_path)[0]
    late = run_of(tmp_path / "late", save_total_limit=3)
    callback = next(c for c in late.callback_handler.callbacks if isinstance(c, RankFlowCallback))
    step = callback.on_step_end
    seen = []

    def then_back(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step(args, state, control, **kwargs)
        if state.global_step == 3:
            assert callback.flow is not None
            before = snapshot(late.model, late.optimizer), callback.flow.state_dict()
            with pytest.raises(CheckpointError, match="NaN"):
                late.model.load_adapter(str(bad), "default", is_trainable=True)
            assert same((snapshot(late.model, late.optimizer), callback.flow.state_dict()), before)
            seen.append(state.global_step)

    spoil(bad, lambda tensors: next(iter(tensors.values())).fill_(float("nan")))
    callback.on_step_end = then_back  # type: ignore[method-assign]
    late.train()
    assert seen == [3]


# -- restore ----------------------------------------------------------------------------------------------------------


def spoil(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def config(folder: Path, **fields: Any) -> None:
    said = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**said, **fields}))


def key(tensors: dict[str, torch.Tensor], part: str) -> str:
    return next(k for k in tensors if part in k)


MISFITS: dict[str, Callable[[Path], object]] = {
    "a NaN": lambda f: spoil(f, lambda t: t[key(t, "o_proj.lora_B")].view(-1)[-1:].fill_(float("nan"))),
    "an infinity": lambda f: spoil(f, lambda t: t[key(t, "lora_A")].view(-1)[:1].fill_(-float("inf"))),
    "half a module": lambda f: spoil(f, lambda t: t.pop(key(t, "down_proj.lora_B"))),
    "another width": lambda f: spoil(
        f, lambda t: t.update({k: torch.randn(len(v), 31) for k, v in t.items() if "q_proj.lora_A" in k})
    ),
    "what has no place": lambda f: spoil(
        f, lambda t: t.update({"base_model.model.model.norm.lora_magnitude_vector": torch.ones(3)})
    ),
    "a module of another model": lambda f: spoil(
        f, lambda t: t.update({k.replace("layers.1", "layers.9"): t.pop(k) for k in list(t) if "layers.1" in k})
    ),
    "a damaged config": lambda f: (f / "adapter_config.json").write_text('{"r": 2,'),
    "another kind": lambda f: config(f, peft_type="IA3"),
    "no number for a rank": lambda f: config(f, r="two"),
    "no weights": lambda f: (f / "adapter_model.safetensors").unlink(),
    "weights cut short": lambda f: cut(f / "adapter_model.safetensors"),
}  # fmt: skip


def test_what_cannot_be_restored_changes_nothing(tmp_path: Path):
    saved = tiny_llama()
    rankflow.resize(saved, {"*q_proj": 5, "*v_proj": 1})
    saved.save_pretrained(tmp_path / "saved")
    model = tiny_llama()
    before = snapshot(model)
    for what, change in MISFITS.items():
        folder = tmp_path / what
        shutil.copytree(tmp_path / "saved", folder)
        change(folder)
        with pytest.raises(CheckpointError, match=what):  # names the folder
            rankflow.restore(model, folder)
        assert same(snapshot(model), before), what
    with pytest.raises(AdapterError, match="nobody"):
        rankflow.restore(model, tmp_path / "saved", "nobody")
    other = get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 4)), LoraConfig(r=2, target_modules=["0"]))
    other_before = snapshot(other)
    with pytest.raises(CheckpointError, match="not in the model"):
        rankflow.restore(other, tmp_path / "saved")
    assert same(snapshot(other), other_before)
    assert same(snapshot(model), before)
    rankflow.restore(model, tmp_path / "saved")
    assert same_weights(default_weights(model), default_weights(saved))


def test_modules_to_save_that_are_missing_or_not_finite_are_not_restored(tmp_path: Path):
    def made() -> PeftModel:
        torch.manual_seed(0)
        base = torch.nn.ModuleDict({"body": torch.nn.Linear(5, 6), "head": torch.nn.Linear(6, 2)})
        base.forward = lambda x: base["head"](base["body"](x))  # type: ignore[method-assign]
        return get_peft_model(base, LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"]))

    made().save_pretrained(tmp_path / "saved")
    model = made()
    before = snapshot(model)
    changes: list[Callable[[dict[str, torch.Tensor]], object]] = [
        lambda t: t.pop(key(t, "head.weight")),
        lambda t: t[key(t, "head.bias")].fill_(float("inf")),
    ]
    for i, change in enumerate(changes):
        shutil.copytree(tmp_path / "saved", tmp_path / str(i))
        spoil(tmp_path / str(i), change)
        with pytest.raises(CheckpointError, match=r"head\.(weight|.*bias)"):
            rankflow.restore(model, tmp_path / str(i))
        assert same(snapshot(model), before)

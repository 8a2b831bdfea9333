"""Files of strangers: none of their code is run, none of their claims acted on before it is bounded, and nothing of the
machine that they point at comes along."""

from __future__ import annotations

import ast
import builtins
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, EncoderDecoderConfig, PreTrainedTokenizerFast, ViTConfig

import rankflow
from rankflow import ConfigError, RankFlowError
from rankflow.base_model import calibrate_saved
from rankflow.blank import blank_layout
from rankflow.pretrained import load_config

ROOT = Path(__file__).parents[1]


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
    model.save_pretrained(home / "adapter")
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
    with pytest.raises(ConfigError, match="no config that transformers loads"):
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

"""Every code block of the README and of docs/ runs as printed, or says on the line before it why it does not:

<!-- not run: it needs a GPU -->

Blocks of a page run in order, in a folder that holds what `made` puts there. Python blocks share the names of
`started`; bash blocks may hold `rankflow` commands, `> FILE` and `export`; yaml blocks are policy files, or keys of
one.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from loops import token_batches
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments
from typer.testing import CliRunner

import rankflow
from rankflow.cli.app import app
from rankflow.config import registry

ROOT = next(parent for parent in Path(__file__).parents if (parent / "pyproject.toml").is_file())
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"^(?: *<!-- not run: (?P<reason>[^\n]+) -->\n)?(?P<indent> *)```(?P<language>[^\n]*)\n(?P<code>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)
SHOWN = {"text", "json", "toml", "diff", "mermaid", "dockerfile"}  # languages that nothing runs
MAY_SAY_NO = {"check", "validate", "report"}  # commands whose status is 1 where the answer is no


@dataclass(frozen=True)
class Block:
    """A code block: its page, the line it begins on, and, if it is not run, the reason."""

    page: Path
    line: int
    language: str
    code: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        code = re.sub(f"^{match['indent']}", "", match["code"], flags=re.MULTILINE)
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(Block(page, line, match["language"].strip(), code, match["reason"]))
    return found


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


RUN = [page for page in PAGES if any(b.reason is None and b.language not in SHOWN for b in blocks(page))]


# -- what a page finds ------------------------------------------------------------------------------------------------


def tiny_base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )  # fmt: skip
    return LlamaForCausalLM(config)


def adapted(rank: int = 2) -> Any:
    model = get_peft_model(tiny_base(), LoraConfig(r=rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    return model.train()


def started() -> dict[str, Any]:
    """The names that Python blocks may use without a line that makes them."""
    model = adapted()
    return {
        "torch": torch,
        "rankflow": rankflow,
        "model": model,
        "peft_model": model,
        "optimizer": torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]),
        "loader": token_batches(30),
        "batches": token_batches(4),
        "data": [{key: value[0] for key, value in batch.items()} for batch in token_batches(8)],
        "args": TrainingArguments("out", max_steps=30, per_device_train_batch_size=2, report_to=[], save_strategy="no"),
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that commands are shown with."""
    folder = tmp_path_factory.mktemp("made")
    words = [f"w{i}" for i in range(61)]
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", "</s>", *words])}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", eos_token="</s>")
    tokenizer.save_pretrained(folder / "base-model")
    tiny_base().save_pretrained(folder / "base-model")
    model = adapted(16)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.02)
    model.save_pretrained(folder / "my-adapter")
    lines = [f'{{"text": "{" ".join(words[i : i + 6])}"}}' for i in range(40)]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    style = {}
    for name in ("down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", "mid_block_attentions_0_proj_in"):
        style[f"lora_unet_{name}.lora_down.weight"] = torch.randn(16, 24)
        style[f"lora_unet_{name}.lora_up.weight"] = torch.randn(32, 16)
        style[f"lora_unet_{name}.alpha"] = torch.tensor(8.0)
    save_file(style, folder / "style.safetensors")
    (folder / "policy.yaml").write_text("policy: increlora\nbudget: {mean_rank: 4}\nwhen: {start: 10%, every: 10%}\n")
    return folder


@pytest.fixture
def there(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of that folder to work in; what a page does to the environment and registers is undone."""
    monkeypatch.setattr(registry.PLUGINS, "_registered", {})
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    yield tmp_path
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The page's own module, which dataclasses look up by its name."""
    page = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)
    return page


# -- tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_every_block_says_what_it_is(page: Path):
    for block in blocks(page):
        assert block.language in {"python", "bash", "yaml", *SHOWN}, f"{block}: {block.language!r}"


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_every_fence_and_every_marker_belongs_to_a_block(page: Path):
    text, found = page.read_text(encoding="utf-8"), blocks(page)
    assert len(re.findall("^ *```", text, re.MULTILINE)) == 2 * len(found)
    assert len(re.findall("^ *<!-- not run:", text, re.MULTILINE)) == sum(b.reason is not None for b in found)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # TRL's, of its own arguments
@pytest.mark.parametrize("page", RUN, ids=names(RUN))
def test_the_blocks_of_a_page_run(page: Path, there: Path, module: types.ModuleType):
    vars(module).update(started())
    for block in blocks(page):
        if block.reason is None and block.language not in SHOWN:
            {"python": run_python, "bash": run_bash, "yaml": read_policy}[block.language](block, module)


def run_python(block: Block, module: types.ModuleType) -> None:
    code = "\n" * (block.line - 1) + block.code
    exec(compile(code, str(block.page), "exec", dont_inherit=True), vars(module))


def run_bash(block: Block, module: types.ModuleType) -> None:
    for line in commands(block.code):
        words = shlex.split(line, comments=True)
        if words[0] == "export":
            os.environ.update(word.split("=", 1) for word in words[1:])
            continue
        to = words[words.index(">") + 1] if ">" in words else os.devnull
        words = words[: words.index(">")] if ">" in words else words
        assert words[0] == "rankflow", f"{block}: {line}: only rankflow's commands are run; say why this is not"
        done = CliRunner().invoke(app, words[1:])
        assert done.exit_code <= (words[1] in MAY_SAY_NO), f"{block}: {line}\n{done.output}"
        Path(to).write_text(done.stdout)


def commands(code: str) -> Iterator[str]:
    """The lines of a shell's block, those that end in a backslash joined, without empty ones and comments."""
    for line in code.replace("\\\n", " ").splitlines():
        if shlex.split(line, comments=True):
            yield line


def read_policy(block: Block, module: types.ModuleType) -> None:
    keys = yaml.safe_load(block.code)
    whole = keys if {"policy", "phases"} & keys.keys() else {"policy": "increlora", **keys}
    Path("block.yaml").write_text(yaml.safe_dump(whole))
    rankflow.load_policy("block.yaml")

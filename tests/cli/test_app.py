"""The command line as people and scripts meet it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import minilm_base, minilm_folder
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import rankflow
from rankflow import plugins
from rankflow.analysis.forecast import blank_layout
from rankflow.cli.app import app
from rankflow.config.load import shipped
from rankflow.lora.adapter import Adapter
from rankflow.plans.layout import Layout, Slot
from rankflow.plans.ops import Grow
from rankflow.plans.plan import RankPlan
from rankflow.render.table import Column
from rankflow.training.ledger import Ledger

COMMANDS = [
    *(
        "squeeze",
        "plan",
        "calibrate",
        "expand",
        "canonicalize",
        "pad",
        "diff",
        "inspect",
        "check",
        "validate",
        "policies",
        "report",
    ),
]


PLUGIN = """
from dataclasses import dataclass
from rankflow import Policy, register_policy

@dataclass(frozen=True)
class OfAPlugin(Policy):
    '''Keep every rank.'''

register_policy(OfAPlugin)
"""


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    g = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(2):
        for name, width in (("q_proj", 16), ("up_proj", 24)):
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(6, 16, generator=g)
            tensors[f"{key}.lora_B.weight"] = torch.randn(width, 6, generator=g)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 6, "lora_alpha": 12, "target_modules": ["q_proj", "up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    layout = Layout({f"layers.{i}.{t}": Slot(2, 16, 16, 2.0) for i in range(2) for t in ("q", "up")})
    written = Ledger(tmp_path / "rankflow.jsonl")
    written.append("attach", 0, layout=layout.to_json(), total_steps=40, seed=0)
    written.append("phase", 0, policy="increlora", end=41, notes=[])
    plan = RankPlan({"layers.0.q": [Grow(3)]}, "highest score")
    written.append("resize", 10, plan, policy="increlora", reason=plan.reason, ranks={"layers.0.q": 5})
    written.append("skip", 20, policy="increlora", reason="layers.1.q is not finite")
    written.append("finish", 40, total_rank=11, params=352)
    return tmp_path / "rankflow.jsonl"


def run(*args: object, status: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == status, result.output
    return result


def refused(*args: object) -> str:
    """The one line a mistake is answered with."""
    result = run(*args, status=2)
    assert result.stdout == ""
    assert result.stderr.startswith("rankflow: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    return result.stderr


def test_every_command_shows_an_example():
    for command in COMMANDS:
        assert f"Example: rankflow {command} " in " ".join(run(command, "--help").stdout.split())
    assert all(command in run("--help").stdout for command in COMMANDS)


def test_help_imports_nothing_heavy():
    code = "import sys, rankflow.cli.app; print({'torch', 'peft', 'matplotlib', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def own(stderr: str) -> str:
    """Without what bitsandbytes says on some CPUs when PEFT imports it."""
    return "".join(line for line in stderr.splitlines(keepends=True) if "gemm_4bit_forward" not in line)


def test_as_a_module_with_its_exit_status(adapter: Path, tmp_path: Path):
    command = [sys.executable, "-m", "rankflow", "squeeze", str(adapter), "--target-rank"]
    done = subprocess.run([*command, "2"], capture_output=True, text=True)
    assert (done.returncode, own(done.stderr)) == (0, "")
    assert (tmp_path / "adapter-r2" / "adapter_model.safetensors").is_file()
    done = subprocess.run([*command, "2"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert own(done.stderr).count("\n") == 1
    assert "is there already" in done.stderr


def test_squeeze_writes_beside_the_source_and_reports(adapter: Path, tmp_path: Path):
    before = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in adapter.iterdir()}
    result = run("squeeze", adapter, "--target-rank", 3, "--report", tmp_path / "out.json", "--dtype", "bf16")
    assert "adapter-r3" in result.stdout.replace("\n", "")
    report = json.loads((tmp_path / "out.json").read_text())
    assert {m["rank_after"] for m in report["modules"]} == {3}
    assert report["serving_bucket"] == 8  # of vLLM's 1, 8, 16, ...
    assert "largest rank 3: vLLM --max-lora-rank 8" in " ".join(result.stdout.split())
    assert report["out"] == str(tmp_path / "adapter-r3")
    tensors = load_file(tmp_path / "adapter-r3" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in adapter.iterdir()} == before
    run("squeeze", adapter, "--energy", 0.5, "-o", tmp_path / "half")
    run("squeeze", adapter, "--max-params", 300, "-o", tmp_path / "half", "--force")
    assert json.loads((tmp_path / "half" / "adapter_config.json").read_text())["rank_pattern"]


def test_dry_run_writes_nothing(adapter: Path, tmp_path: Path):
    result = run("squeeze", adapter, "--energy", 0.5, "--dry-run")
    assert "Nothing was written" in result.stdout
    assert {p.name for p in tmp_path.iterdir()} == {"adapter"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "no target"),
        (("--target-rank", 0), "target_rank is 0"),
        (("--target-rank", 2, "--energy", 0.5), "target_rank and energy are 2 targets"),
        (("--energy", 95), "energy is 95"),
        (("--energy", "nan"), "energy is nan"),
        (("--max-params", 1), "does not buy"),
        (("--target-rank", 2, "--metric", "loss"), "metric 'loss'"),
        (("--target-rank", 2, "--backend", "abacus"), "abacus"),
        (("--target-rank", 2, "--dtype", "int4"), "int4"),
        (("--target-rank", 2, "--device", "cuda:99"), "cuda:99"),
        (("--target-rank", 2, "-o", "{adapter}"), "its own source"),
        (("--target-rank", 2, "--report", "{adapter}/nowhere/out.json"), "no such folder"),
    ],
)
def test_mistakes_in_options(adapter: Path, tmp_path: Path, options: tuple, message: str):
    options = tuple(str(o).format(adapter=adapter) for o in options)
    assert message in refused("squeeze", adapter, *options)
    assert {p.name for p in tmp_path.iterdir()} == {"adapter"}
    assert {p.name for p in adapter.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_mistakes_in_arguments(adapter: Path, tmp_path: Path):
    assert "no such file or folder" in refused("squeeze", tmp_path / "nowhere", "--target-rank", 2)
    assert "no such file or folder" in refused("inspect", tmp_path / "nowhere")
    assert "no such ledger" in refused("report", tmp_path / "nowhere.jsonl")
    assert "no such file" in refused("validate", tmp_path / "nowhere.yaml")
    assert "nobody" in refused("policies", "nobody")
    assert "not a ledger event" in refused("report", adapter / "adapter_model.safetensors")
    assert "a picture is one of" in refused("inspect", adapter, "--plot", tmp_path / "x.docx")
    assert {p.name for p in tmp_path.iterdir()} == {"adapter"}


def test_a_full_disk_is_one_line_too(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from rankflow.formats.io import writers

    def full(self, key, tensor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writers.SafetensorsWriter, "put", full)
    assert "No space left" in refused("squeeze", adapter, "--target-rank", 2)
    assert {p.name for p in tmp_path.iterdir()} == {"adapter"}


def test_unknown_options_and_wrong_types_have_status_2(adapter: Path):
    assert "No such option" in run("squeeze", adapter, "--rnak", 2, status=2).stderr
    assert "valid integer" in run("squeeze", adapter, "--target-rank", "two", status=2).stderr


def test_old_names_of_options_work_for_a_version_and_say_so(adapter: Path, tmp_path: Path):
    old = ["--from", "peft", "--format=peft", "--for", "vllm", "--max-rank", 3, "-o", tmp_path / "old"]
    new = ["--from-format", "peft", "--to-format=peft", "--engine", "vllm", "--max-rank", 3, "-o", tmp_path / "new"]
    warned = run("squeeze", adapter, *old)
    assert [line.split()[1] for line in warned.stderr.splitlines()] == ["--from", "--format", "--for"]
    assert run("squeeze", adapter, *new).stderr == ""
    old_file, new_file = (load_file(tmp_path / x / "adapter_model.safetensors") for x in ("old", "new"))
    assert old_file.keys() == new_file.keys()
    assert "No such option" in run("squeeze", adapter, "--target-rank", 2, "--to", "peft", status=2).stderr
    run("squeeze", adapter, "--target-rank", 2, "-o", tmp_path / "x", "--keep-tail", tmp_path / "r.safetensors")
    run("squeeze", adapter, "--gate", "true", "--dry-run")


def test_runs_are_compared_by_their_decisions_and_the_status_says_so(ledger: Path, tmp_path: Path):
    other = tmp_path / "other" / "rankflow.jsonl"
    other.parent.mkdir()
    other.write_text(ledger.read_text())
    same = run("report", tmp_path, "--against", other.parent)
    assert f"{ledger} and {other}: the same 2 decisions" in " ".join(same.stdout.split())
    other.write_text(ledger.read_text().replace("layers.0.q", "layers.1.q"))
    other.write_text("".join([ledger.read_text().splitlines(True)[0], *other.read_text().splitlines(True)[1:]]))
    apart = run("report", ledger, "--against", other, status=1).stdout
    assert "at step 10 they part" in apart
    assert "2 to 5" in apart
    told = json.loads(run("report", ledger, "--against", other, "--json", status=1).stdout)
    assert (told["same"], told["step"], len(told["modules"])) == (False, 10, 2)
    assert "no such ledger" in refused("report", ledger, "--against", tmp_path / "nowhere.jsonl")
    assert "leave out -o and --html" in refused("report", ledger, "--against", other, "-o", tmp_path / "x.png")
    assert not list(tmp_path.rglob("*.png"))


def test_inspect_shows_every_module_and_its_json_is_nothing_but_json(adapter: Path, tmp_path: Path):
    summary, table = run("inspect", adapter).stdout, run("inspect", adapter, "--modules").stdout
    assert all(f"_proj {i} " in table and f"_proj {i} " not in summary for i in range(2))
    result = run("inspect", adapter, "--json", "--plot", tmp_path / "x.png")
    data = json.loads(result.stdout)
    assert result.stderr == ""
    assert [set(m["energy"]) for m in data["modules"]] == [{"1", "2", "4", "8", "16"}] * 4
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_validate_against_an_adapter(adapter: Path, tmp_path: Path):
    policy = tmp_path / "mine.yaml"
    policy.write_text("policy: squeeze\nbudget: {mean_rank: 3}\nlimits: {'*.q_proj': {max: 2}}\nwhen: {every: 25%}\n")
    result = " ".join(run("validate", policy, "--model", adapter, "--total-steps", 200).stdout.split())
    assert "50, 100 total rank 12" in result, "half of the run at each of two ranks"
    policy.write_text("policy: squeeze\nbudget: {mean_rank: 3}\nlimits: {'*.z_proj': {max: 2}}\n")
    assert "z_proj" in refused("validate", policy, "--model", adapter)
    policy.write_text("policy: eva")
    result = " ".join(run("validate", policy, "--model", adapter, "--total-steps", 200).stdout.split())
    assert "eva 0 to 200 1 0 as it is" in result, "one decision, before the first step"
    policy.write_text("policy: squeeze\nbudget: {mean_rank: 30}\n")
    assert "squeeze only lowers ranks" in refused("validate", policy, "--model", adapter)
    policy.write_text("policy: rigl\nwhen: {start: 100%}\n")
    late = run("validate", policy, "--model", adapter, "--total-steps", 200).stdout
    assert "rigl: decides after step 200" in late
    assert "well formed" in run("validate", "increlora").stdout


@pytest.mark.parametrize("both", [("--for", "vllm", "--engine=vllm"), ("--engine", "vllm", "--for=vllm")])
def test_an_option_by_its_old_and_its_new_name_is_refused(adapter: Path, both: tuple[str, ...]):
    assert "--engine" in run("check", adapter, *both, status=2).stderr


def test_check_takes_policies_for_a_version_and_says_what_to_type(adapter: Path, tmp_path: Path):
    policy = tmp_path / "mine.yaml"
    policy.write_text("policy: hold\n")
    for words in ((policy,), ("hold",), ("--model", adapter, policy)):
        done = run("check", *words)
        assert done.stderr.startswith("rankflow: check is now validate")
        assert done.stdout == run("validate", *words).stdout
    assert run("check", adapter, "--engine", "peft").stderr == ""
    assert "mine.yaml" in refused("check", policy, "--engine", "vllm"), "which is no adapter"
    assert "No such option" in run("check", adapter, "--model", adapter, status=2).stderr


def test_policies_and_policy_files_are_found_by_one_command():
    listed = " ".join(run("policies").stdout.split())
    for name in shipped():
        assert name in listed
        assert run("policies", name).stdout.rstrip().endswith(shipped()[name].read_text().rstrip())
    assert "instead of a budget" in " ".join(run("policies", "squeeze").stdout.split())


def test_a_plugin_is_imported_where_it_is_typed_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "typed_plugin.py").write_text(PLUGIN)
    (tmp_path / "mine.yaml").write_text("policy: of_a_plugin\n")
    assert "of_a_plugin" in refused("validate", "mine.yaml")
    try:
        assert "well formed" in run("validate", "mine.yaml", "--plugin", "typed_plugin").stdout
        assert "of_a_plugin" in run("--plugin=typed_plugin", "policies").stdout
        assert "nobody" in refused("policies", "--plugin", "nobody")
    finally:
        plugins._REGISTERED["rankflow.policies"].pop("of_a_plugin", None)
        sys.modules.pop("typed_plugin", None)


def test_a_report_replaces_its_own_picture_and_no_other(ledger: Path, tmp_path: Path):
    picture = ledger.with_suffix(".png")
    run("report", ledger)
    with ledger.open("a") as file:
        file.write(ledger.read_text().splitlines(True)[-1].replace('"step": 40', '"step": 41'))
    first = picture.read_bytes()
    run("report", tmp_path)
    assert picture.read_bytes() != first
    assert "is there already" in refused("report", ledger, "-o", picture)
    Figure().savefig(picture)
    assert "is there already" in refused("report", ledger)
    other = ledger.read_text().replace('"seed": 0', '"seed": 1')
    run("report", ledger, "--force")
    ledger.write_text(other)
    assert "is there already" in refused("report", ledger), "of another run"


def test_a_base_that_an_engine_does_not_need_is_compared_with_the_adapter(tmp_path: Path):
    good = tmp_path / "good"
    get_peft_model(minilm_base(), LoraConfig(r=2, target_modules=["query"])).save_pretrained(good)
    base = minilm_folder()
    done = run("squeeze", good, "--engine", "peft", "--base", base, "-o", tmp_path / "out")
    assert "has all its modules" in " ".join(done.stdout.split())
    assert "go together" in refused("squeeze", good, "--target-rank", 1, "--base", base)


@pytest.mark.parametrize("kind", ["kohya", "comfyui", "diffusers"])
def test_a_peft_folder_is_refused_where_another_format_was_given(adapter: Path, tmp_path: Path, kind: str):
    assert f"peft folder, not {kind}" in refused(
        "squeeze", adapter, "--from-format", kind, "--target-rank", 1, "-o", tmp_path / "o"
    )
    assert not (tmp_path / "o").exists()
    run("squeeze", adapter, "--from-format", "peft", "--target-rank", 1, "-o", tmp_path / "o")


@pytest.mark.parametrize("columns", [["a step sends"], ["a resize, at most", "parameters"]])
def test_a_heading_is_no_wider_than_the_numbers_below_it(columns: list[str]):
    heads = [Column("module", text=True), *map(Column, columns)]
    headings = [column.heading for column in heads]
    assert [heading.replace("\n", " ") for heading in headings] == ["module", *columns]
    assert max(len(line) for heading in headings for line in heading.split("\n")) <= 10


def test_validate_against_a_model_that_has_no_adapter_yet(tmp_path: Path):
    model = minilm_folder()
    result = run(
        "validate", "increlora", "--model", model, "--target-modules", "query", "--target-modules", "value", "--rank", 2
    ).stdout
    assert "12 modules, total rank 24" in " ".join(result.split())
    assert "PEFT cannot adapt" in refused("validate", "increlora", "--model", model, "--target-modules", "nothing")
    (tmp_path / "config.json").write_text("{}")
    assert "no transformers model" in refused("validate", "increlora", "--model", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("targets", [None, ["query", "value"]], ids=str)
def test_validate_foretells_what_the_real_model_turns_out_to_be(targets: list[str] | None):
    """`validate` reads a config and makes no weights; here they are loaded, the adapter is made, a run begins."""
    folder = minilm_folder()
    model = get_peft_model(minilm_base(), LoraConfig(r=4, target_modules=targets or "all-linear"))
    assert blank_layout(folder, targets, 4) == Adapter(model).layout()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    options = [option for target in targets or () for option in ("--target-modules", target)]
    told = run("validate", "increlora", "--model", folder, *options, "--rank", 4, "--total-steps", 60).stdout
    with rankflow.attach(model, optimizer, "increlora", total_steps=60) as flow:
        layout = flow.layout
    summary = f"{len(layout)} modules, total rank {layout.total_rank}, {layout.params:,} parameters at the start"
    assert summary in " ".join(told.split())
    assert len(layout) == (12 if targets else 37)


def test_policies_shows_parameters_and_their_meaning():
    listed = run("policies").stdout
    assert all(name in listed for name in ("increlora", "squeeze", "hold"))
    one = run("policies", "increlora").stdout
    assert "grow_by" in one
    assert "allocate" not in one


def test_report_draws_and_tells(ledger: Path, tmp_path: Path):
    result = run("report", ledger).stdout
    assert all(word in result for word in ("highest", "finite", "increlora"))
    assert "q 0" in result
    assert (tmp_path / "rankflow.png").read_bytes().startswith(b"\x89PNG")
    run("report", ledger, "-o", tmp_path / "other.svg")
    assert "<svg" in (tmp_path / "other.svg").read_text()


@pytest.mark.parametrize(
    ("names", "to", "told"),
    [(["model.layers.0.self_attn.q_proj"], None, True), (["down_blocks.0.attentions.0.to_q"], None, False),
     (["down_blocks.0.attentions.0.to_q"], "kohya", False)],
    ids=["language model", "image model", "kohya"],
)  # fmt: skip
def test_only_a_language_models_adapter_is_told_of_vllm(tmp_path: Path, names: list[str], to: str | None, told: bool):
    from tests.analysis.test_inspection import make  # which imports this file

    src = make(tmp_path / "src", names)
    if to is not None:
        done = rankflow.squeeze(src, tmp_path / "other.safetensors", target_rank=2, to_format=to)
        src = Path(str(done.out))
    done = rankflow.squeeze(src, tmp_path / "out", target_rank=1, dry_run=True)
    assert done.language_model is told
    result = run("squeeze", src, "--target-rank", 1, "--dry-run").stdout
    assert ("--max-lora-rank" in result) is told

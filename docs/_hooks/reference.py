"""Writes the reference from the package while mkdocs builds the site.

A line `<!-- made: NAME -->` in a page is replaced by what `MADE[NAME]` returns. Each policy gets a page of its own.
"""

from __future__ import annotations

import html
import importlib
import inspect
import json
import pkgutil
import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import typer
from mkdocs.structure.files import File
from rich.text import Text

import rankflow
from rankflow.cli.app import app
from rankflow.cli.json_schemas import schemas
from rankflow.config.load import describe, shipped
from rankflow.config.registry import policy_class
from rankflow.serving import engines as engine_files

HEADINGS = {  # a paragraph of a policy's docstring that begins with this word and a colon -> a section of its page
    "Differs": "Differences from the source",
    "Reconstruction": "What is reconstructed",
    "When to use": "When to use it",
}
TOPICS = {  # folders of the package -> a section of the Python API; what is elsewhere comes last
    "Training": ["training", "surgery"],
    "Saved adapters": ["compress", "analysis", "serving"],
    "Calibration": ["calibration"],
    "Policies": ["config", "policies", "plans"],
    "Errors": ["errors"],
    "Other names": [],
}
SCALES = {  # how an engine scales a module -> in words
    "module": "each module's own alpha and rank",
    "config": "one lora_alpha / r for all modules",
    "tensor": "one lora_alpha, over each tensor's rank",
}
FATES = {  # what becomes of what an engine does not load -> in words
    "refused": "Refused",
    "silent": "Left out without an error",
    "not known": "Not loaded; whether it says so is not known",
}


# -- what mkdocs calls ------------------------------------------------------------------------------------------------


def on_config(config: Any) -> Any:
    """Names the policies' pages in the navigation."""
    (reference,) = (part["Reference"] for part in config.nav if "Reference" in part)
    (pages,) = (part["Policies"] for part in reference if "Policies" in part)
    pages += [{name: f"reference/policies/{name}.md"} for name in policies()]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds a page for each policy."""
    for name in policies():
        files.append(File.generated(config, f"reference/policies/{name}.md", content=policy_page(name)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fills in what is made from the package."""
    return re.sub(r"^<!-- made: (\w+) -->$", lambda match: MADE[match[1]](), markdown, flags=re.MULTILINE)


# -- policies ---------------------------------------------------------------------------------------------------------


@cache
def policies() -> Mapping[str, Any]:
    """Name -> description of every policy."""
    return {policy.name: policy for policy in describe()}


def policies_table() -> str:
    """The policies, and the policy files that have several."""
    rows = ([f"[`{p.name}`]({p.name}.md)", p.summary, p.source] for p in policies().values())
    parts = [table(["policy", "what it does", "source"], rows), "## Lifecycles that ship"]
    for file, text in policy_files_that_ship().items():
        if file not in policies():
            parts.append(f"### {file} {{ #{file} }}\n\n{fenced('yaml', text)}")
    return "\n\n".join(parts)


def policy_page(name: str) -> str:
    """What a policy's docstring says, its settings, and the policy file of its name."""
    policy = policies()[name]
    docstring = inspect.getdoc(policy_class(name)) or ""
    about, *sections = re.split(rf"\n\n(?=(?:{'|'.join(HEADINGS)}):)", docstring)
    parts = [f"# {name}", about, f"**Source:** {policy.source}."]
    for section in sections:
        word, _, text = section.partition(":")
        parts += [f"## {HEADINGS[word]}", text.strip()[:1].upper() + text.strip()[1:]]
    parts += ["## Settings", settings_table(policy)]
    files = policy_files_that_ship()
    if name in files:
        parts += ["## Policy file", f"`{name}` by name, as it ships:", fenced("yaml", files[name])]
    others = [file for file in files if file not in policies() and re.search(rf"policy: {name}\b", files[file])]
    if others:
        links = ", ".join(f"[`{file}`](index.md#{file})" for file in others)
        parts.append(f"It is also a phase of {links}.")
    return lists_apart("\n\n".join(parts))


@cache
def policy_files_that_ship() -> Mapping[str, str]:
    """Name -> text of every policy file, without the line that is for editors."""
    texts = {file: path.read_text(encoding="utf-8") for file, path in shipped().items()}
    return {file: text.removeprefix("# yaml-language-server: $schema=schema.json\n") for file, text in texts.items()}


def settings_table(policy: Any) -> str:
    shared = "`budget` and `when` are the same for all policies: [policy files](../policy-files.md)."
    if not policy.settings:
        return f"It has no `params`. {shared}"
    rows = (
        [f"`{s.name}`", f"`{s.type}`", f"`{'null' if s.default is None else s.default}`", s.meaning]
        for s in policy.settings
    )
    return f"Under `params:`; {shared}\n\n{table(['name', 'type', 'default', 'meaning'], rows)}"


# -- the command line -------------------------------------------------------------------------------------------------


def command_line() -> str:
    """Every command, with its arguments and its options by panel; first the options of all."""
    group: Any = typer.main.get_command(app)
    context = typer.Context(group, info_name="rankflow")
    commands = (command_section(name, command) for name, command in group.commands.items() if not command.hidden)
    return "\n\n".join(["## Options of all commands", *panels(group, context), *commands])


def command_section(name: str, command: Any) -> str:
    context = typer.Context(command, info_name=f"rankflow {name}")
    parts = [f"## `rankflow {name}`", escaped(plain(command.help)), fenced("text", command.get_usage(context))]
    parts += [*panels(command, context), escaped(plain(command.epilog))]
    return "\n\n".join(filter(None, parts))


def panels(command: Any, context: Any) -> list[str]:
    """The arguments and options of a command, one table for each panel of its help."""
    rows: dict[str, list[list[str]]] = {}
    for param in command.get_params(context):
        if (record := param.get_help_record(context)) is not None:
            default = "Arguments" if param.param_type_name == "argument" else "Options"
            panel = getattr(param, "rich_help_panel", None) or default
            rows.setdefault(panel, []).append([f"`{record[0]}`", plain(record[1])])
    return [table([panel, ""], of_it) for panel, of_it in rows.items()]


def plain(markup: str | None) -> str:
    """A help text without rich's markup."""
    return Text.from_markup(inspect.cleandoc(markup or "")).plain


# -- schemas ----------------------------------------------------------------------------------------------------------


def policy_files() -> str:
    """The keys of policy files; those of `params` have pages of their own."""
    (schema_file,) = {path.parent / "schema.json" for path in shipped().values()}
    defs = json.loads(schema_file.read_text(encoding="utf-8"))["$defs"]
    several = defs["Lifecycle"]["properties"]
    own = {key: value for key, value in defs["HoldFile"]["properties"].items() if key not in several}
    own |= {"policy": {**own["policy"], "const": "its name"}, "params": {**own["params"], "$ref": "mapping"}}
    phase = own | {"until": defs["HoldPhase"]["properties"]["until"]}
    shared = {key: value for key, value in several.items() if key != "phases"}
    limit = next(option for option in shared["limits"]["additionalProperties"]["anyOf"] if "properties" in option)
    parts = ["## A policy", keys(own), "## A phase", keys(phase), "## The whole file", keys(shared)]
    for key, schema in {"budget": defs["BudgetSpec"], "when": defs["WhenSpec"], "limits": limit}.items():
        parts += [f"## `{key}`", escaped(schema["description"]), keys(schema["properties"])]
    return "\n\n".join(parts)


def json_outputs() -> str:
    """Every document that a command prints as JSON, with the parts it is made of."""
    parts = []
    for name, schema in schemas().items():
        parts += [f"## {name}.json", described_keys(schema)]
        for part, inner in schema.get("$defs", {}).items():
            parts += [f"### {part} {{ #{name}-{part.lower()} }}", described_keys(inner)]
    return "\n\n".join(parts)


def described_keys(schema: Mapping[str, Any]) -> str:
    """A schema's description and its keys; `key: meaning` in the description is moved to that key's row."""
    properties = schema.get("properties", {})
    name = rf"(?:{'|'.join(properties)})"
    about, *rest = re.split(rf"(?:^|\s)({name}(?:, {name})*): ", schema.get("description", ""))
    meanings = {key: text for names, text in zip(rest[::2], rest[1::2], strict=True) for key in names.split(", ")}
    found = {key: {"description": meanings.get(key, ""), **value} for key, value in properties.items()}
    return f"{escaped(about)}\n\n{keys(found) if found else f'`{type_of(schema)}`'}"


def keys(properties: Mapping[str, Any]) -> str:
    """The keys of a mapping as a table, without a column that would be empty."""
    rows = [
        [
            f"`{key}`",
            f"`{type_of(value)}`",
            "" if value.get("default") is None else f"`{json.dumps(value['default'])}`",
            description_of(value),
        ]
        for key, value in properties.items()
    ]
    header = ["key", "type", "default", "meaning"]
    used = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return table([header[i] for i in used], ([row[i] for i in used] for row in rows))


def description_of(schema: Mapping[str, Any]) -> str:
    """What a schema says about itself, or the first of its alternatives does."""
    inner = (option.get("description", "") for option in schema.get("anyOf", ()))
    return schema.get("description") or next(filter(None, inner), "")


def type_of(schema: Mapping[str, Any]) -> str:
    """A schema's type in a few words."""
    if "$ref" in schema:
        return schema["$ref"].rpartition("/")[2]
    if "anyOf" in schema:
        return " | ".join(dict.fromkeys(type_of(option) for option in schema["anyOf"]))
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    if schema.get("type") == "array":
        return f"list of {type_of(schema.get('items', {}))}"
    if isinstance(inner := schema.get("additionalProperties"), dict):
        return f"mapping to {type_of(inner)}"
    return schema.get("type", "any")


# -- Python and engines -----------------------------------------------------------------------------------------------


def python_api() -> str:
    """A mkdocstrings block for every public name, by the folder that defines it."""
    folders = {folder: topic for topic, folders in TOPICS.items() for folder in folders}
    sections: dict[str, list[str]] = {topic: [] for topic in TOPICS}
    for name in sorted(rankflow.__all__, key=str.lower):
        folder = getattr(rankflow, name).__module__.split(".")[1]
        block = f"::: rankflow.{name}\n    options:\n      heading_level: 3"
        sections[folders.get(folder, "Other names")].append(block)
    return "\n\n".join("\n\n".join([f"## {topic}", *blocks]) for topic, blocks in sections.items() if blocks)


def engines() -> str:
    """What each engine does with adapters: all records in one table, then the facts of each with their source."""
    files = [
        importlib.import_module(f"{engine_files.__name__}.{file.name}")
        for file in pkgutil.iter_modules(engine_files.__path__)
    ]
    rows = (
        [
            f"[`{engine.name}`](#{engine.name})",
            ", ".join(engine.reads),
            SCALES[engine.scale],
            "yes" if engine.rslora else "no",
            ", ".join(map(str, engine.ranks)) or "any",
            f"`{engine.setting}`" if engine.setting else "",
        ]
        for engine in (file.ENGINE for file in files)
    )
    header = ["engine", "reads", "scales by", "heeds rsLoRA", "maximal ranks", "set by"]
    _, _, about = (inspect.getdoc(engine_files) or "").partition("\n\n")
    return "\n\n".join([table(header, rows), about, *(engine_facts(file) for file in files)])


def engine_facts(file: Any) -> str:
    """What an engine's file says of it, and what it does not load."""
    _, _, facts = (inspect.getdoc(file) or "").partition("\n\n")
    fates = {
        label: [what for what, fate in file.ENGINE.fates.items() if fate.value == value]
        for value, label in FATES.items()
    }
    lines = [f"- {label}: {'; '.join(features)}." for label, features in fates.items() if features]
    return lists_apart(f"### {file.ENGINE.name}\n\n{facts}\n\n" + "\n".join(lines))


# -- Markdown ---------------------------------------------------------------------------------------------------------


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *([cell(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(text: str) -> str:
    return escaped(" ".join(text.split()), bar="\\|")


def escaped(text: str, bar: str = "|") -> str:
    """Text without what Markdown takes for HTML; code stays as it is."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else html.escape(p, quote=False).replace("|", bar) for p in parts)


def fenced(language: str, text: str) -> str:
    return f"```{language}\n{text.strip()}\n```"


def lists_apart(text: str) -> str:
    """Text with an empty line before each list, without which Markdown takes a list for part of the paragraph."""
    return re.sub(r"^((?!- |  ).+)\n(?=- )", r"\1\n\n", text, flags=re.MULTILINE)


MADE = {
    "policies": policies_table,
    "command_line": command_line,
    "policy_files": policy_files,
    "json_outputs": json_outputs,
    "python_api": python_api,
    "engines": engines,
}

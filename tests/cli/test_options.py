"""Options are made from the fields of dataclasses: what is added to one is on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from rankflow import Output, Target
from rankflow.cli.app import app
from rankflow.cli.options import made_of
from rankflow.compress.option import option, options_of
from rankflow.compress.output import OutputOptions
from rankflow.compress.target import Goal
from rankflow.errors import ConfigError


def _halves(word: str) -> Mapping[str, Any]:
    return {"halves": int(word) * 2}


@dataclass(frozen=True)
class Wider(Target):
    """A target with two fields more, and nothing else."""

    sharpness: float | None = option(None, "How sharp.", metavar="S")
    halves: int | None = option(None, "Whole ones.", panel="Advanced", name="wholes", type=str, read=_halves)


def params_of(command: str | None, of: typer.Typer) -> dict[str, Any]:
    """Option -> click's parameter."""
    group: Any = typer.main.get_command(of)
    found = group.commands[command] if command else group
    return {name: param for param in found.params for name in param.opts}


def test_a_field_more_is_an_option_more():
    scratch, got = typer.Typer(), []

    @scratch.command()
    @made_of(target=Wider)
    def squeeze(adapter: str, target: Any = None) -> None:
        got.append((adapter, target))

    params = params_of(None, scratch)
    assert (params["--sharpness"].help, params["--sharpness"].metavar) == ("How sharp.", "S")
    assert params["--sharpness"].rich_help_panel == params["--energy"].rich_help_panel == Target.panel
    assert params["--wholes"].rich_help_panel == "Advanced"
    done = CliRunner().invoke(scratch, ["x", "--sharpness", "0.5", "--wholes", "3", "--energy", "0.9"])
    assert done.exit_code == 0, done.output
    [(adapter, values)] = got
    assert (adapter, values["sharpness"], values["halves"], values["energy"]) == ("x", 0.5, 6, 0.9)
    assert Wider(**values).given == {"energy": 0.9, "sharpness": 0.5, "halves": 6}
    done = CliRunner().invoke(scratch, ["x", "--wholes", "many"])
    assert isinstance(done.exception, ConfigError)
    assert str(done.exception).startswith("--wholes: ")


@pytest.mark.parametrize(
    ("command", "of", "but"),
    [
        ("squeeze", Target, ()),
        ("squeeze", Output, ()),
        ("plan", Target, ()),
        ("pad", Output, ("dtype", "keep_residual", "dry_run")),
    ],
)
def test_commands_have_an_option_for_each_field(command: str, of: type, but: tuple[str, ...]):
    params = params_of(command, app)
    for name, about in options_of(of).items():
        flag = f"--{(about.name or name).replace('_', '-')}"
        assert (flag in params) != (name in but), flag
        if name not in but:
            default = next(f.default for f in fields(of) if f.name == name)
            assert params[flag].default == default
            assert params[flag].help == about.help


@pytest.mark.parametrize(("typed", "of"), [(Goal, Target), (OutputOptions, Output)])
def test_keyword_arguments_are_typed_for_each_field(typed: type, of: type):
    assert set(typed.__annotations__) == {f.name for f in fields(of)}
    assert {f.name: f.type for f in fields(of)} == {
        name: hint.__forward_arg__ for name, hint in typed.__annotations__.items()
    }

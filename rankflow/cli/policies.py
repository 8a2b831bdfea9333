"""Commands on policies; `check` takes an adapter too."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rankflow.cli import options
from rankflow.cli.app import app, print_json, print_table, say
from rankflow.errors import ConfigError


@app.command(
    epilog="Example: [bold]rankflow check policies/increlora.yaml --model out/adapter --total-steps 3000[/bold]; "
    "or [bold]rankflow check out/adapter --engine vllm --base models/llama[/bold]"
)
def check(
    subject: Annotated[
        str, typer.Argument(metavar="POLICY|ADAPTER", help="Policy file, or the name of a shipped one; or an adapter.")
    ],
    engine: Annotated[
        str | None,
        typer.Option("--engine", metavar="ENGINE", help="With an adapter: what is to serve it, as in squeeze."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With an adapter: print JSON, and nothing else.")] = False,
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Adapter folder, or a transformers model's folder or config.json, to check it against; no weights.",
        ),
    ] = None,
    total_steps: Annotated[int, typer.Option(metavar="N", help="Optimizer steps of the run, for percentages.")] = 1000,
    target_modules: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="With a model folder: what PEFT adapts; repeatable. All linears if left out."
        ),
    ] = None,
    rank: Annotated[int, typer.Option(metavar="N", help="With a model folder: the adapter's rank at the start.")] = 8,
    from_format: options.From = None,
    base: options.BaseLookedUp = None,
) -> None:
    """Say what a policy means for a model: the modules its limits reach, its budgets, the steps it decides on, and what
    the run takes in memory and in messages between processes. Models may be of any size: only their config is read. The
    status is 1 if there is a phase in which no decision can change anything.

    Or what an engine would get wrong with an adapter as it is, and which of its modules a base model does not have; the
    status is 1 if there is anything.
    """
    from rankflow.config.load import load_policy, shipped
    from rankflow.formats.open import looks_like_adapter

    given = {"--engine": engine, "--from-format": from_format, "--base": base, "--json": as_json or None}
    of_adapters = [option for option, value in given.items() if value is not None]
    is_policy = Path(subject).suffix in (".yaml", ".yml") or (subject in shipped() and not Path(subject).exists())
    if of_adapters and is_policy:
        raise ConfigError(f"{subject}: is a policy, and {of_adapters[0]} goes with an adapter; leave it out")
    if of_adapters or looks_like_adapter(Path(subject)):
        if model is not None:
            raise ConfigError(f"{subject}: is an adapter, and --model goes with a policy; give its base with --base")
        _check_adapter(Path(subject), engine, as_json, from_format, base)
        return
    from rankflow.analysis.forecast import foretell
    from rankflow.policies.idleness import idle_phases
    from rankflow.render.policy_tables import costs_table, limits_table, phases_table

    lifecycle = load_policy(subject)
    if model is None:
        say(f"{lifecycle.source} is well formed; give --model to see what it means for one.")
        return
    layout, phases = lifecycle.resolve(total_steps, _layout(model, target_modules, rank))
    print_table(phases_table(phases, layout, f"{lifecycle.source} over {total_steps} steps"))
    print_table(limits_table(layout))
    print_table(costs_table(foretell(layout, phases)))
    if idle := idle_phases(layout, phases):
        say("\n".join(idle))
        raise typer.Exit(1)


@app.command(epilog="Example: [bold]rankflow policies increlora[/bold]")
def policies(
    name: Annotated[str | None, typer.Argument(help="One policy, with its parameters.")] = None,
) -> None:
    """List the policies there are, with their parameters, defaults and meaning."""
    from rankflow.config.load import describe
    from rankflow.config.load import shipped as files
    from rankflow.render.policy_tables import policies_table, policy_table

    found = {d.name: d for d in describe()}
    if name is not None and name not in found:
        raise ConfigError(f"no policy is called {name!r}; there are {', '.join(found)}")
    if name is None:
        print_table(policies_table(list(found.values()), files()))
    for description in found.values():
        if name == description.name or (name is None and description.settings):
            print_table(policy_table(description))


# -- parts ----------------------------------------------------------------------------------------------------------


def _check_adapter(adapter: Path, engine: str | None, as_json: bool, from_format: str | None, base: str | None) -> None:
    """
    Raises:
        typer.Exit: with status 1, if anything would go wrong.
    """
    from rankflow.render.adapter_tables import verdict_table
    from rankflow.serving.verdicts import check as run

    found = run(adapter, engine, from_format=from_format, base=base)
    if as_json:
        print_json(found.to_json())
    elif found.problems:
        print_table(verdict_table(found))
    else:
        well = [f"{engine} loads it as it is"] if engine else []
        on_base = [f"{base} has all its modules"] if base and not found.hint else []
        say(f"{found.source}: {'. '.join(filter(None, [*well, *on_base, found.hint]))}")
    if found.problems:
        raise typer.Exit(1)


def _layout(folder: Path, target_modules: list[str] | None, rank: int) -> Any:
    """What a policy would find: a saved adapter's layout, or that of a new adapter on a model that is never loaded."""
    if folder.is_file() or ((folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file()):
        from rankflow.analysis.forecast import blank_layout

        return blank_layout(folder, target_modules, rank)
    from rankflow.formats.peft.adapter import PeftAdapter

    return PeftAdapter(folder).layout

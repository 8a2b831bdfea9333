"""Commands on policies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rankflow.cli.app import app, print_table, say
from rankflow.errors import ConfigError


@app.command(
    epilog="Example: [bold]rankflow validate policies/increlora.yaml --model out/adapter --total-steps 3000[/bold]"
)
def validate(
    policy: Annotated[str, typer.Argument(metavar="POLICY", help="Policy file, or the name of a shipped one.")],
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
) -> None:
    """Say what a policy means for a model: the modules its limits reach, its budgets, the steps it decides on, and what
    the run takes in memory and in messages between processes. Models may be of any size: only their config is read. The
    status is 1 if there is a phase in which no decision can change anything.
    """
    from rankflow.analysis.forecast import foretell
    from rankflow.config.load import load_policy
    from rankflow.policies.idleness import idle_phases, late_phases
    from rankflow.render.policy_tables import costs_table, limits_table, phases_table

    lifecycle = load_policy(policy)
    if model is None:
        say(f"{lifecycle.source} is well formed; give --model to see what it means for one.")
        return
    layout, phases = lifecycle.resolve(total_steps, _layout(model, target_modules, rank))
    print_table(phases_table(phases, layout, f"{lifecycle.source} over {total_steps} steps"))
    print_table(limits_table(layout))
    print_table(costs_table(foretell(layout, phases)))
    if late := late_phases(phases, total_steps):
        say("\n".join(late))
    if idle := idle_phases(layout, phases):
        say("\n".join(idle))
        raise typer.Exit(1)


@app.command(epilog="Example: [bold]rankflow policies increlora[/bold]")
def policies(
    name: Annotated[
        str | None, typer.Argument(help="One policy, with its parameters, or one shipped policy file.")
    ] = None,
) -> None:
    """List the policies there are, with their parameters, defaults and meaning, and the policy files that ship."""
    from rankflow.config.load import describe, shipped
    from rankflow.render.policy_tables import policies_table, policy_table

    found, files = {d.name: d for d in describe()}, shipped()
    if name is not None and name not in {*found, *files}:
        raise ConfigError(f"no policy or policy file is called {name!r}; there are {', '.join({**found, **files})}")
    if name in found and found[name].broken:
        raise ConfigError(found[name].summary)
    if name is None:
        print_table(policies_table(list(found.values()), files))
    for description in found.values():
        if name == description.name or (name is None and description.settings):
            print_table(policy_table(description))
    if name in files:
        say(f"{files[name]}:\n\n{files[name].read_text(encoding='utf-8').rstrip()}")


# -- parts ----------------------------------------------------------------------------------------------------------


def _layout(folder: Path, target_modules: list[str] | None, rank: int) -> Any:
    """Return the layout of a saved adapter, or that of a new adapter on a model that is never loaded."""
    if folder.is_file() or ((folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file()):
        from rankflow.analysis.forecast import blank_layout

        return blank_layout(folder, target_modules, rank)
    from rankflow.formats.peft.adapter import PeftAdapter

    return PeftAdapter(folder).layout

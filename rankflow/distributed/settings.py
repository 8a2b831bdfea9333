"""The settings that must be the same in all processes of a run when it begins."""

from __future__ import annotations

from importlib import metadata

from rankflow._version import __version__
from rankflow.plans.layout import Layout
from rankflow.policies.lifecycle import Lifecycle


def settings_in_force(lifecycle: Lifecycle, layout: Layout, **options: object) -> dict[str, str]:
    """Settings of this process by name, as text: versions, the policy's, the adapter's modules, and `options`.

    An option that is neither text nor a number only counts as given or not.
    """
    return {
        **lifecycle.settings(),
        **_versions(),
        **{name: _in_words(value) for name, value in options.items()},
        **{f"module {name}": slot.summary for name, slot in layout.items()},
    }


def _versions() -> dict[str, str]:
    found = {"rankflow": __version__, **{name: metadata.version(name) for name in ("torch", "peft")}}
    return {f"version of {name}": version.partition("+")[0] for name, version in found.items()}


def _in_words(value: object) -> str:
    if value is None:
        return "not given"
    return str(value) if isinstance(value, str | int | float) else "given"

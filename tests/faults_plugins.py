"""Planted faults that the tests of plugins must notice."""

from __future__ import annotations

from fault import Fault

FAULTS = [
    Fault(
        "let a package take the name of something shipped",
        "plugins.py",
        "        self.refuse_clash(name)\n",
        "",
    ),
    Fault(
        "let a script take the name of something shipped",
        "plugins.py",
        "if name in self._shipped():",
        "if False:",
    ),
]

"""Reads YAML files of strangers: no key twice, nothing executed, nothing that fills the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from rankflow.errors import ConfigError

_LARGEST = 100_000  # values that a file may come to, aliases spelt out
_DEEPEST = 64


class _Loader(yaml.SafeLoader):
    """safe_load, but a key that stands twice in a mapping is an error instead of silently winning, and so are aliases
    of aliases that a small file would fill the memory with."""

    def __init__(self, stream: str):
        super().__init__(stream)
        self._sizes: dict[int, int] = {}  # of nodes, aliases spelt out
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise yaml.constructor.ConstructorError(None, None, "nested too deeply", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None and id(node) not in self._sizes:
            inside = node.value if isinstance(node, yaml.CollectionNode) else ()
            parts = (part for item in inside for part in (item if isinstance(item, tuple) else (item,)))
            size = 1 + sum(self._sizes.get(id(part), 0) for part in parts)
            if size > _LARGEST:
                raise yaml.constructor.ConstructorError(None, None, "too many values", node.start_mark)
            self._sizes[id(node)] = size
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen if isinstance(key, yaml.ScalarNode) else False:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file. A key that stands twice is an error.

    Raises:
        ConfigError: the file cannot be read, or is not YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: cannot be read: {e}") from None
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except RecursionError:
        raise ConfigError(f"{path}: not valid YAML: nested too deeply") from None
    except (ValueError, TypeError, AttributeError, KeyError) as e:  # what becomes of a date or number that is none
        raise ConfigError(f"{path}: not valid YAML: a value is not what its form or tag says: {e}") from None
    except yaml.MarkedYAMLError as e:
        place = f"line {e.problem_mark.line + 1}: " if e.problem_mark is not None else ""
        hint = "; a pattern that begins with * needs quotes" if "alias" in f"{e.context} {e.problem}" else ""
        raise ConfigError(f"{path}: {place}not valid YAML: {e.problem}{hint}") from None
    except yaml.YAMLError as e:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(e).split())}") from None

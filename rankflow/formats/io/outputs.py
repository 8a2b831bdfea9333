"""Whether a path may be written: one rule for every output of every command and function, asked before any work.

Never a file of any input, whatever name leads to it; never two outputs in one place; nothing that is there already,
unless it may be replaced. Devices, pipes and `-` take what they are given.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from rankflow.errors import ConfigError
from rankflow.formats.io.atomic import is_plain
from rankflow.formats.io.disk import identity
from rankflow.formats.io.tensors import TENSOR_FILES

Reads = Mapping[str, str | Path | None]  # what it is, as a message says -> where; names on the hub too


@dataclass(frozen=True)
class Around:
    """What a command reads and writes beside what the function that it calls is told of."""

    reads: Reads = field(default_factory=dict)
    writes: Sequence[Path] = ()


def check_output(
    out: Path, reads: Reads | None = None, *, force: bool = False, folder: bool = False, parents: bool = True
) -> None:
    """Refuse a path that an output may not be written to.

    Args:
        reads: files and folders that must not be replaced, or added to.
        force: whether what is there may be replaced.
        folder: whether the output is one.
        parents: whether folders that it is to be in are made.

    Raises:
        ConfigError: `out` is or holds a file of an input, would become part of one, is there already and `force` was
            not given, is a folder and should be a file, or cannot be written.
    """
    if folder and is_plain(out):
        raise ConfigError(f"{out}: is no folder, which this output is; choose another name with -o")
    check_harmless(out, reads or {})
    if is_plain(out):
        return
    target = _target(out)
    if target.is_dir() and not folder:
        raise ConfigError(f"{out}: is a folder; choose another name")
    if os.path.lexists(target) and not force:
        raise ConfigError(f"{out}: is there already; choose another name, or replace it with --force")
    _check_parents(out, target.parent, parents)


def check_destination(out: Path, src: Path, *, force: bool) -> None:
    """Refuse, before any work, to write an adapter's folder where something would be lost.

    Raises:
        ConfigError: as `check_output`; or a folder that is not an adapter, which not even `force` replaces.
    """
    check_output(out, {"its own source": src}, force=force, folder=True)
    if not out.exists():
        return
    if not out.is_dir() or (any(out.iterdir()) and not (out / "adapter_config.json").is_file()):
        raise ConfigError(f"{out}: is not an adapter folder, so --force does not replace it; choose another name")


def check_file(out: Path, src: Path, *, force: bool) -> None:
    """Do what `check_destination` does, for an adapter in one file.

    Raises:
        ConfigError: also if the name does not end as such a file's.
    """
    if out.suffix not in TENSOR_FILES and not is_plain(out):
        raise ConfigError(f"{out}: this format is one file; give it a name like {out.name or 'small'}.safetensors")
    if out.is_dir():
        raise ConfigError(f"{out}: is a folder, and this format is one file; choose another name")
    check_output(out, {"its own source": src}, force=force)


def suffixed(path: Path, suffix: str) -> Path:
    """`path` under a name that ends in -`suffix`, before what says that it is a file of tensors.

    Raises:
        ConfigError: it has no name of its own, as `.` and `/` have none.
    """
    if path.name in ("", ".."):
        raise ConfigError(f"{path}: has no name that those of several outputs could begin with; choose another")
    if path.suffix in (*TENSOR_FILES, ".gguf"):
        return path.with_name(f"{path.stem}-{suffix}{path.suffix}")
    return path.with_name(f"{path.name}-{suffix}")


def check_harmless(out: Path, reads: Reads) -> None:
    """
    Raises:
        ConfigError: as `check_output`, of inputs only.
    """
    target = _target(out)
    for what, given in reads.items():
        for source in _places(given):
            if (harmed := _harmed(target, source)) is not None:
                raise ConfigError(
                    f"{out}: the output would replace {what} ({harmed}), which is only read; choose another name"
                )
            if _becomes_part(target, source):
                raise ConfigError(
                    f"{out}: would become part of {what} ({source}), which is only read; put it elsewhere"
                )


def check_apart(outs: Iterable[Path]) -> None:
    """
    Raises:
        ConfigError: two outputs in one place, or one inside another.
    """
    places = [(out, _target(out)) for out in outs if not is_plain(out)]
    for i, (out, target) in enumerate(places):
        for other, place in places[:i]:
            if _same(target, place):
                raise ConfigError(f"{out}: is where another output goes ({other}); give each a name of its own")
            for inner, outer, name in ((target, place, out), (place, target, other)):
                if inner.is_relative_to(outer):
                    raise ConfigError(f"{name}: is in {outer}, another output, which is replaced as a whole; move it")


# -- parts ----------------------------------------------------------------------------------------------------------


def _target(out: Path) -> Path:
    """Return the path that would be replaced. Links are followed, also those that lead nowhere yet.

    Raises:
        ConfigError: no name that this file system takes.
    """
    try:
        target = Path(os.path.realpath(out))
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.stat(target)
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else e
        raise ConfigError(f"{str(out)!a}: cannot be written ({reason}); choose another name") from None
    return target


def _check_parents(out: Path, parent: Path, made: bool) -> None:
    above = next(folder for folder in (parent, *parent.parents) if os.path.lexists(folder))
    if not above.is_dir():
        raise ConfigError(f"{out}: {above} is a file, not a folder; choose another name")
    if above != parent and not made:
        raise ConfigError(f"{out.parent}: no such folder to write {out.name} into")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(f"{out}: nothing may be written into {above}; choose another place")


def _same(one: Path, other: Path) -> bool:
    if one == other or (identity(one) is not None and identity(one) == identity(other)):
        return True
    return str(one).casefold() == str(other).casefold() and _ignores_case(one.parent)


def _ignores_case(folder: Path) -> bool:
    """Whether names that differ in case only are one name there, by an ancestor that has letters in its name."""
    for above in (folder, *folder.parents):
        if above.name.swapcase() != above.name and identity(above) is not None:
            return identity(above) == identity(above.with_name(above.name.swapcase()))
    return False


def _places(given: str | Path | None) -> Iterator[Path]:
    """Where an input is: its path, or what the hub's cache has of that name."""
    if given is None:
        return
    path = Path(given)
    if not os.path.lexists(path):
        path = _cached(str(given))
    if os.path.lexists(path):
        yield path


def _cached(name: str) -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"


def _harmed(target: Path, source: Path) -> Path | None:
    """The file of an input that would be gone if `target` were replaced, by whatever names."""
    as_named = Path(os.path.realpath(source.parent)) / source.name
    if any(path.is_relative_to(target) for path in (as_named, Path(os.path.realpath(source)))):
        return source
    if not target.exists():
        return None
    lost = {identity(path) for path in _files(target)}
    return next((file for file in (*_files(source), *_beside(source)) if identity(file) in lost), None)


def _files(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
    for folder, _, names in os.walk(path):
        yield from (Path(folder) / name for name in names)


def _beside(source: Path) -> Iterator[Path]:
    """Return the files that are read along with an adapter's file."""
    from rankflow.formats.peft_config import CONFIG

    if source.is_file() and (source.parent / CONFIG).is_file():
        yield from (file for file in source.parent.iterdir() if _is_part(file.name))


def _becomes_part(target: Path, source: Path) -> bool:
    """Return whether a new name in an input's folder would be read as one of its files."""
    from rankflow.formats.peft_config import CONFIG

    folder = source if source.is_dir() else source.parent
    if target.exists() or identity(target.parent) is None or identity(target.parent) != identity(folder):
        return False
    whole = source.is_dir() or (folder / CONFIG).is_file()
    return target.name == CONFIG or (whole and _is_part(target.name))


def _is_part(name: str) -> bool:
    from rankflow.formats.io.models import MODEL_FILES
    from rankflow.formats.peft.files import COMPANIONS, WEIGHTS
    from rankflow.formats.peft_config import CONFIG
    from rankflow.formats.single_file.diffusers import FILES

    known = (CONFIG, "config.json", "*.index.json", *WEIGHTS, *FILES, *MODEL_FILES, *COMPANIONS)
    return any(fnmatch(name, pattern) for pattern in known)

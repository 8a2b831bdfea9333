"""Which formats keep an adapter in a single file, and which of them a file is of."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from rankflow.formats import single_file
from rankflow.formats.added import loadable
from rankflow.formats.single_file.base import SingleFile
from rankflow.formats.single_file.keys import Fit, Names
from rankflow.plugins import files_of


@cache
def shipped() -> Mapping[str, type[SingleFile]]:
    """Kind -> class of every format that a file of this folder defines."""
    found = [
        value
        for file in files_of(single_file)
        for value in vars(file).values()
        if isinstance(value, type) and issubclass(value, SingleFile) and value.__module__ == file.__name__
    ]
    return {value.kind: value for value in found if value is not SingleFile}


def single_file_formats() -> dict[str, type[SingleFile]]:
    """Kind -> class of every format: those of this folder, and those that were added to them."""
    added = (found for found in loadable() if isinstance(found, type))
    return {**shipped(), **{found.kind: found for found in added}}


def best_fit(names: Names) -> tuple[str, Fit]:
    """The format that the names in a file are of, and how surely."""
    fits = {kind: found.recognises(names) for kind, found in single_file_formats().items()}
    kind = max(fits, key=fits.__getitem__)
    return kind, fits[kind]

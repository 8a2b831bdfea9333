"""Old names of arguments, which go on working for one version and say what to write instead."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def renamed_arguments(**new_names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function so that it takes keyword arguments by their old names too.

    ::

        @renamed_arguments(statistics="calibration")
        def squeeze(..., calibration=None): ...

    A call with `statistics=` gives a `FutureWarning` that points at the caller's line.

    Args:
        new_names: old name -> new name.

    Raises:
        TypeError: from the function itself, when it is called with an argument by both names.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            for old in new_names.keys() & kwargs.keys():
                new = new_names[old]
                if new in kwargs:
                    raise TypeError(f"{function.__name__}() got both {new}= and {old}=, its old name; give {new}=")
                warnings.warn(
                    f"{function.__name__}({old}=...) is now {new}=; the old name goes with the next version",
                    FutureWarning,
                    stacklevel=2,
                )
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return wrapper

    return decorate

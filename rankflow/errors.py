"""Everything rankflow raises on purpose. Catch `RankFlowError` to catch them all."""

from collections.abc import Iterator
from contextlib import contextmanager

_LONGEST = 200  # of what others say, characters


class RankFlowError(Exception):
    """Base of all errors that a user can cause and mend; the message names the thing and the remedy."""


class ConfigError(RankFlowError):
    """A policy file, an option or an argument is wrong, or asks for what cannot be."""


class BaseNeeded(ConfigError):
    """What is asked for depends on the base model, which is neither given nor at hand."""


class PlanError(RankFlowError):
    """A plan does not fit the layout it is to be applied to."""


class AdapterError(RankFlowError):
    """A live model, or an adapter file, cannot be managed: not a LoRA, damaged, or an unsupported variant."""


class OptimizerError(RankFlowError):
    """The optimizer does not hold the adapter's parameters, or holds state nobody knows how to resize."""


class DistributedError(RankFlowError):
    """Processes that train together have parted: one failed, is gone, or is at other ranks."""


class CheckpointError(RankFlowError):
    """Training state on disk is missing, damaged, or belongs to another run."""


@contextmanager
def naming(source: object, *others: object) -> Iterator[None]:
    """Errors from within that name none of these files say that they are about the first."""
    try:
        yield
    except RankFlowError as e:
        if any(str(file) in str(e) for file in (source, *others)):
            raise
        raise type(e)(f"{source}: {e}") from None


def first_line(e: BaseException) -> str:
    """What a foreign error says, in one line that can be shown."""
    line = next(filter(None, (line.strip() for line in str(e).splitlines())), type(e).__name__)[:_LONGEST]
    return "".join(c if c.isprintable() else "?" for c in line)

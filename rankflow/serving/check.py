"""Find what an engine would get wrong with an adapter file, and what rewriting the file cannot mend.

`rankflow.serving.verdicts` and `rankflow.serving.export` both go by this, so that what one says is what the other does.
"""

from __future__ import annotations

from collections.abc import Collection

from rankflow.formats.as_lora.fine_tune import KIND as FULL
from rankflow.formats.base import SavedAdapter
from rankflow.formats.peft.adapter import PeftAdapter
from rankflow.formats.peft_fields import unknown
from rankflow.serving.engine import Engine, Fate, Problem
from rankflow.serving.engines import engines
from rankflow.serving.features import (
    ALORA,
    FEATURES,
    MEGATRON,
    OF_THE_FILE,
    OTHER_NAMES,
    REPLICATED,
    no_plain_lora,
)

ELSEWHERE = "serve it with another engine, or merge the adapter into its base model"
_FIELDS = "see what these settings do, and whether the engine heeds them; without them it is known what is loaded"


def problems(adapter: SavedAdapter, engine: Engine) -> list[Problem]:
    """Everything that an engine would get wrong with the file as it is."""
    kind = adapter.source.kind
    if kind == FULL or adapter.kind not in engine.reads:
        what = "whole model and no adapter" if kind == FULL else f"{adapter.kind} file"
        where = f"is a {what}; {engine.name} loads {', '.join(engine.reads)}"
        unread = Problem("format", where, Fate.REFUSED, engine.rewrite(adapter))
        return [unread, *_above(adapter, engine), *lasting(adapter, engine)]
    mended = [feature for feature in OF_THE_FILE if _mended(feature, engine)]
    of_file = [*_features(adapter, engine, mended), *_above(adapter, engine), *lasting(adapter, engine)]
    if no_plain_lora(adapter):  # of which ranks and scales are not those of any tensor
        return of_file
    return [*of_file, *engine.rank_problems(adapter), *engine.scale_problems(adapter)]


def lasting(adapter: SavedAdapter, engine: Engine) -> list[Problem]:
    """The problems that no other way of writing the file takes away."""
    kept = [feature for feature in FEATURES if not _mended(feature, engine)]
    found = [*_features(adapter, engine, kept), *engine.layer_problems(adapter)]
    if fields := sorted({field for config in adapter.peft_configs for field in unknown(config)}):
        found.append(Problem("", f"may or may not heed {', '.join(fields)}", Fate.UNKNOWN, _FIELDS, tuple(fields)))
    return found


def _mended(feature: str, engine: Engine) -> bool:
    """Return whether the problem is gone once the file is rewritten. Names that an engine may have too are kept for
    it."""
    return feature in OF_THE_FILE and (feature != OTHER_NAMES or not engine.library_names)


_NOT_MERGED = (ALORA, REPLICATED, MEGATRON)  # which act by the tokens, or on another model than the base is
_SAID = {Fate.REFUSED: "does not load", Fate.SILENT: "leaves out", Fate.UNKNOWN: "may or may not load"}


def _features(adapter: SavedAdapter, engine: Engine, features: Collection[str]) -> list[Problem]:
    found = []
    for feature, fate in engine.fates.items():
        if feature in features and (where := FEATURES[feature](adapter)):
            remedy = engine.rewrite(adapter) if _mended(feature, engine) else _elsewhere(feature)
            found.append(Problem("", f"{_SAID[fate]} {feature}", fate, remedy, tuple(where)))
    return found


def _elsewhere(feature: str) -> str:
    """What is left to do; merging needs what PEFT itself merges."""
    if feature not in _NOT_MERGED:
        return ELSEWHERE
    heed = [e.name for e in engines().values() if feature not in e.fates and PeftAdapter.kind in e.reads]
    return f"serve it with what heeds that: {', '.join(heed)}"


def _above(adapter: SavedAdapter, engine: Engine) -> list[Problem]:
    """A rank that no setting of the engine serves."""
    most = max(adapter.layout.ranks.values())
    if engine.room(most) is not None:
        return []
    remedy = f"{engine.rewrite(adapter)} --max-rank {engine.ranks[-1]}"
    return [Problem(f"rank {most}", f"serves at most {engine.ranks[-1]}", Fate.REFUSED, remedy)]

"""The JSON Schemas of what `--json` and `--report` give, published in `rankflow/cli/schemas/`."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from rankflow.analysis.inspection import Inspection
from rankflow.analysis.run import Run
from rankflow.analysis.run_comparison import Comparison
from rankflow.compress.report import SqueezeReport

_DOCUMENTS = {
    "inspection": (Inspection, "What `rankflow inspect --json` prints."),
    "squeeze": (SqueezeReport, "What `rankflow squeeze --report` writes; with --ranks, a list of such."),
    "run": (Run, "What `rankflow report --json` prints."),
    "comparison": (Comparison, "What `rankflow report --against --json` prints."),
}
_WHOLE = {"type": "integer"}
_PARAMS = {**_WHOLE, "description": "numbers in all factors"}
_MORE = {  # what `to_json` adds
    "comparison": {"same": {"type": "boolean", "description": "whether all decisions are the same"}},
    "squeeze": {
        "params_before": _PARAMS,
        "params_after": _PARAMS,
        "serving_bucket": {
            "anyOf": [_WHOLE, {"type": "null"}],
            "description": "vLLM's smallest sufficient maximal rank",
        },
    },
}


def schemas() -> dict[str, dict[str, Any]]:
    """Return file name without its end -> schema."""
    found = {}
    for name, (document, what) in _DOCUMENTS.items():
        schema = TypeAdapter(document).json_schema()
        schema["properties"] |= _MORE.get(name, {})
        about = f"{what} {schema['description']}"
        found[name] = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "description": about}
    return found

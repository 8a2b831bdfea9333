"""What `test_writer.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "keep the rows of q and k as transformers has them",
        "formats/gguf/names.py",
        "return b[order]",
        "return b",
    ),
    Fault(
        "turn the rows of k by the number of query heads",
        "formats/gguf/names.py",
        '"k_proj": self._key_heads',
        '"k_proj": self._heads',
    ),
    Fault(
        "give GGUF an alpha beside scales that are in the factors",
        "formats/gguf/writer.py",
        "gguf.Keys.Adapter.LORA_ALPHA, 0.0",
        "gguf.Keys.Adapter.LORA_ALPHA, 1.0",
    ),
    Fault(
        "take any number of heads for one",
        "formats/gguf/names.py",
        '_number(config, base, "num_key_value_heads") if grouped else heads',
        'config["num_key_value_heads"] if grouped else heads',
    ),
]

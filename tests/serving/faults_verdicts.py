"""What `test_verdicts.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "keep the level that transformers took out of CLIP",
        "formats/single_file/kohya.py",
        'component, _, module = renamed(name).partition(".")',
        'component, _, module = name.partition(".")',
        "-k names",
    ),
    Fault(
        "pass a setting that nobody knows",
        "formats/peft_fields.py",
        "is_set(value) and f not in (*READ, *HARMLESS, *ACTS)",
        "is_set(value) and f in ACTS and not ACTS[f]",
        "-k nobody",
    ),
    Fault(
        "lose the tokens from which on an aLoRA acts",
        "formats/gguf/writer.py",
        "if invocation:  # as uint32",
        "if False:  # as uint32",
        "-k alora",
    ),
    Fault(
        "pass what could not be written",
        "serving/verdicts.py",
        "if settled or any(",
        "if found is not None or any(",
        "-k check_says",
    ),
    Fault(
        "take an adapter's folder for a model whatever is said",
        "formats/open.py",
        "(kind is None and is_model(path))",
        "is_model(path)",
        "-k beside",
    ),
    Fault(
        "heed rsLoRA of experts in vllm",
        "serving/engine.py",
        "heeds = self.rslora and (self.rslora_experts or not expert)",
        "heeds = self.rslora",
        "-k experts",
    ),
    Fault(
        "refuse a file that an engine reads where it has no other form",
        "serving/export.py",
        "if source.kind not in loads or to not in loads:",
        "if True:",
    ),
    Fault(
        "leave an adapter's name in the keys of a single file",
        "formats/open.py",
        "renamed_key(without_name(new))",
        "renamed_key(new)",
    ),
]

"""What `test_engines.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "leave the scale out of factors that are to be at scale 1",
        "formats/base.py",
        "return b if scaling == 1 else b.double() * scaling",
        "return b",
        "tests/formats/gguf/test_writer.py",
    ),
    Fault(
        "put the zero columns of B before its own",
        "serving/export.py",
        "torch.nn.functional.pad(b, (0, more))",
        "torch.nn.functional.pad(b, (more, 0))",
    ),
    Fault(
        "leave rsLoRA on where the scale is in the factors",
        "formats/peft/adapter.py",
        'found.config = {**self.config, "use_rslora": False}',
        "found.config = dict(self.config)",
    ),
    Fault(
        "forget that the bias of B is scaled too",
        "formats/peft/adapter.py",
        "biases.get(stem, 1.0) if factor else 1.0",
        "1.0",
    ),
    Fault(
        "let modules of rank 0 go from what an engine joins",
        "serving/export.py",
        "rows if rank or fills else 0",
        "rows if rank else 0",
    ),
    Fault(
        "believe that SGLang heeds rsLoRA",
        "serving/engines/sglang.py",
        "    rslora=False,\n",
        "",
    ),
    Fault(
        "make room for less than the rank asked for",
        "serving/engine.py",
        "if rank >= most), None)",
        "if rank <= most), None)",
        "-k room",
    ),
    Fault(
        "let tensors of fewer rows than r pass where there have to be as many",
        "serving/engine.py",
        'rank > r or (self.rows == "r" and rank != r)',
        "rank > r",
    ),
    Fault(
        "take full matrices for the plain LoRA that they are read as",
        "serving/features.py",
        "    if isinstance(source, DenseAdapter):\n",
        "    if False:\n",
        "-k plain_lora",
    ),
    Fault(
        "let LoRAX skip what it cannot open",
        "serving/engines/lorax.py",
        "OTHER_TYPES: Fate.REFUSED",
        "OTHER_TYPES: Fate.SILENT",
        "-k plain_lora",
    ),
    Fault(
        "advise what cannot be done without the base model",
        "serving/verdicts.py",
        'return replace(problem, remedy=problem.remedy + "".join(given))',
        "return problem",
        "-k plain_lora",
    ),
    Fault(
        "advise GGUF of full matrices",
        "serving/engine.py",
        'gguf = self.writes == "gguf" and',
        'gguf = self.writes == "none" and',
        "-k way_to_llamacpp",
    ),
    Fault(
        "trust ComfyUI to read headers",
        "serving/export.py",
        "METADATA in source.metadata",
        "not source.metadata",
    ),
]

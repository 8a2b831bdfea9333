"""PEFT's live LoRA layers: the only package that knows them."""

"""GGUF adapters."""

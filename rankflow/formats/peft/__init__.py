"""PEFT's own adapter files."""

"""rankflow: the rank of LoRA adapters, managed instead of guessed."""

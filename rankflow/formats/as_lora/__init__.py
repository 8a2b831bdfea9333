"""One file a form of adapter that equals a plain LoRA."""

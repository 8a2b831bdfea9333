"""Tensors, JSON and folders on disk: read within bounds, written atomically."""

"""Adapters on disk, one file per format: read lazily, written whole or not at all."""

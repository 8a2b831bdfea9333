"""Inspecting and comparing adapters and runs."""

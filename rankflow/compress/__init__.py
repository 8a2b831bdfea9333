"""Squeezing saved adapters."""

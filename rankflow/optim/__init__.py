"""Optimizer state carried through a change of rank."""

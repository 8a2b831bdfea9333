"""Runs of several processes: one, DDP, FSDP2."""

"""Managed training: `attach`, the Trainer's callback, the controller, its state and ledger."""

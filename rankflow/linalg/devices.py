"""Devices to compute on."""

from __future__ import annotations

import torch

from rankflow.errors import ConfigError, first_line


def usable(device: str) -> torch.device:
    """A device to compute on, in float64 and with real numbers.

    Raises:
        ConfigError: it is none, or is not there.
    """
    try:
        torch.zeros(1, device=device, dtype=torch.float64).item()
        return torch.device(device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as e:
        raise ConfigError(f"device {device!r} cannot be used: {first_line(e)}") from None

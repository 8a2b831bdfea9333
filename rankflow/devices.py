"""Devices to compute on."""

from __future__ import annotations

import torch

from rankflow.errors import ConfigError


def usable(device: str) -> torch.device:
    """A device to compute on, in float64 and with real numbers.

    Raises:
        ConfigError: it is none, or is not there.
    """
    try:
        torch.zeros(1, device=device, dtype=torch.float64).item()
        return torch.device(device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as e:
        raise ConfigError(f"device {device!r} cannot be used: {str(e).splitlines()[0]}") from None

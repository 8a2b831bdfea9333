"""How far a classifier's confidence is from how often it is right: ECE, MCE and ACE, as HypeLoRA's tables have them."""

from __future__ import annotations

from typing import Any, TypedDict

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

BINS = 15


class Calibration(TypedDict):
    ece: float
    mce: float
    ace: float


def calibration(probabilities: Tensor, labels: Tensor) -> Calibration:
    """The expected, the maximum and the adaptive calibration error of [n, classes] for n labels, each in 0 ... 1."""
    common: dict[str, Any] = {"num_classes": probabilities.shape[1], "n_bins": BINS}
    return {
        "ece": round(float(multiclass_calibration_error(probabilities, labels, norm="l1", **common)), 5),
        "mce": round(float(multiclass_calibration_error(probabilities, labels, norm="max", **common)), 5),
        "ace": round(adaptive_calibration_error(probabilities, labels), 5),
    }


def adaptive_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """The mean over classes and bins of |share of that class - mean probability of it| (arXiv 1904.01685, ACE).

    For each class the n probabilities of it are sorted and cut into bins of like size (at most one text apart).
    """
    gaps = []
    for k, column in enumerate(probabilities.double().unbind(1)):
        order = column.argsort()
        confidence, right = column[order], (labels == k)[order].double()
        cuts = min(bins, len(order))
        parts = zip(right.tensor_split(cuts), confidence.tensor_split(cuts), strict=True)
        gaps += [(r.mean() - c.mean()).abs() for r, c in parts]
    return float(torch.stack(gaps).mean())

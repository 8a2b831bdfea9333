"""Options of a run: the same words, with the same meaning, for `rankflow.attach` and for `RankFlowCallback`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, get_args

from torch import Tensor, nn

from rankflow.errors import ConfigError
from rankflow.observe.study import check_batches
from rankflow.optim.optimizer_state import OnUnknownState
from rankflow.training.gradients import PenaltyMode


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What `rankflow.attach` and `RankFlowCallback` take beside model, optimizer and policy.

    Args:
        adapter_name: which adapter of the model.
        batches: training data for policies that study it before or during training: a list of batches or a DataLoader,
            which can be gone through more than once.
        outer_batches: held-out training data, for policies whose gates learn from it.
        loss_fn: `loss_fn(model, batch)` returns the loss of a batch of either, a scalar; `model(**batch).loss` by
            default. Give the loss that you train with, where that is another one (label smoothing, say, or under the
            Trainer `compute_loss_func` or a `compute_loss` of its own).
        seed: of new directions. The global random state is never touched.
        on_unknown_state: `error` refuses optimizer state that nobody knows how to resize, `reset` starts it afresh.
        penalty: where a policy's penalty on the factors goes. `gradient`: `before_step` adds its gradient, after
            clipping if that is where you call it. `in_loss`: you add `flow.penalty()` to your loss.
        timeout: seconds that a process waits for the others of a distributed run before it gives up; when left out,
            RANKFLOW_TIMEOUT of the environment, or 60. Give more than one of them may evaluate or save by itself.

    Raises:
        ConfigError: data that is no collection of batches, or a word that is not among those above.
    """

    adapter_name: str = "default"
    batches: Iterable[Any] | None = None
    outer_batches: Iterable[Any] | None = None
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None
    seed: int = 0
    on_unknown_state: OnUnknownState = "error"
    penalty: PenaltyMode = "gradient"
    timeout: float | None = None

    def __post_init__(self) -> None:
        for name, words in (("on_unknown_state", get_args(OnUnknownState)), ("penalty", get_args(PenaltyMode))):
            if (given := getattr(self, name)) not in words:
                raise ConfigError(f"{name}: {given!r} is neither {' nor '.join(map(repr, words))}")
        for name in ("batches", "outer_batches"):
            if (data := getattr(self, name)) is not None:
                check_batches(data, name, self.loss_fn)

    def alike(self) -> dict[str, object]:
        """The options that all processes of a run must have alike, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "timeout"}

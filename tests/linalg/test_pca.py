"""Incremental PCA against SVDs of everything at once, and against PEFT's."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.incremental_pca import IncrementalPCA
from torch import Tensor

from rankflow.linalg import pca
from rankflow.linalg.pca import Principal


def rows(count: int, n: int, seed: int, *, decay: float = 0.7) -> Tensor:
    """Of falling spread, about a mean that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    spread = torch.randn(count, n, generator=generator, dtype=torch.float64) * decay ** torch.arange(n)
    return 3.0 + spread @ basis


def feed(batches: list[Tensor], components: int, seen: list[Tensor] | None = None) -> Principal:
    state = Principal.empty(components, batches[0].shape[1], torch.device("cpu"))
    for i, batch in enumerate(batches):
        state = state.add(batch, None if seen is None else seen[i])
    return state


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=5),
    st.integers(1, 9),
    st.integers(1, 6),
    st.integers(0, 1000),
)
def test_nothing_is_lost_while_there_is_room(sizes, n, block, seed):
    x = rows(sum(sizes), n, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pca, "BLOCK", block)
        state = feed(list(x.split(sizes)), n)
    centred = x - x.mean(0)
    torch.testing.assert_close(state.mean, x.mean(0))
    assert float(state.count) == len(x)
    torch.testing.assert_close(state.rows.T @ state.rows, centred.T @ centred, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state.energy, centred.square().sum(), rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=5), st.integers(0, 1000))
def test_rows_that_are_hidden_are_no_rows(masks, seed):
    x = rows(4 * len(masks), 5, seed)
    marked = torch.tensor(masks)
    x[~marked.flatten()] = math.nan
    state = feed(list(x.split(4)), 5, list(marked))
    shown = x[marked.flatten()]
    centred = shown - shown.mean(0) if len(shown) else shown
    torch.testing.assert_close(state.rows.T @ state.rows, centred.T @ centred, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state.energy, centred.square().sum())


def test_truncation_keeps_the_energy_and_nearly_the_best_directions():
    x = rows(600, 40, 1, decay=0.8)
    state = feed(list(x.split(50)), 12)
    centred = x - x.mean(0)
    _, sigma, Vh = torch.linalg.svd(centred, full_matrices=False)
    assert state.rows.shape == (12, 40)
    torch.testing.assert_close(state.energy, centred.square().sum())
    kept = state.rows.square().sum(1)
    assert bool((kept[:-1] >= kept[1:]).all())
    assert bool((kept <= sigma[:12].square() * (1 + 1e-9)).all()), "no direction explains more than the best one"
    torch.testing.assert_close(kept[:6], sigma[:6].square(), rtol=1e-2, atol=0)
    unit = state.rows[:6] / state.rows[:6].norm(dim=1, keepdim=True)
    assert float(torch.linalg.svdvals(unit @ Vh[:6].T).min()) > 0.99
    gram = state.rows @ state.rows.T
    assert float((gram - gram.diag().diag()).abs().max()) < 1e-9 * float(gram[0, 0])


def test_it_is_what_peft_computes_from_the_same_batches(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pca, "BLOCK", 50)  # one SVD a batch, as there
    batches = list(rows(300, 20, 2, decay=0.6).split(50))
    state, theirs = feed(batches, 8), IncrementalPCA(n_components=8)
    for batch in batches:
        theirs.partial_fit(batch)
    torch.testing.assert_close(state.rows.norm(dim=1), theirs.singular_values_, rtol=1e-8, atol=0)
    torch.testing.assert_close(
        state.rows.square().sum(1) / state.energy, theirs.explained_variance_ratio_, rtol=1e-8, atol=0
    )
    cosines = torch.cosine_similarity(state.rows, theirs.components_.double())
    torch.testing.assert_close(cosines.abs(), torch.ones(8, dtype=torch.float64), rtol=0, atol=1e-8)


def test_what_is_not_finite_shows_in_the_energy_alone():
    x = rows(6, 3, 0)
    spoilt = torch.cat([x, torch.tensor([[math.inf, 0, 0]], dtype=torch.float64)])
    state = feed([spoilt, x], 3)
    assert bool(state.energy.isnan())
    assert bool(state.rows.isfinite().all())


def test_equal_rows_have_no_spread():
    state = feed([torch.full((7, 4), 2.0)] * 3, 4)
    assert float(state.energy) == pytest.approx(0, abs=1e-20)
    assert float(state.rows.abs().max()) < 1e-9

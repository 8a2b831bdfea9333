"""Factor-space linear algebra against dense float64 references worked out here."""

import math
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rankflow.errors import AdapterError, ConfigError, RankFlowError
from rankflow.linalg.decompose import refactor, spectra, spectrum
from rankflow.linalg.growth import new_rows, rows_from_sketch
from rankflow.linalg.svd import dominant_sign, low_rank
from rankflow.optim.moments import carry_first, carry_second

METRICS = ["weights", "outputs", "loss"]
BACKENDS = ["exact", "torch", "fbpca", "sklearn"]
F64 = torch.float64


def gen(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=gen(seed), dtype=F64).to(dtype)


def orthonormal(n, k, seed):
    return torch.linalg.qr(randn(n, k, seed=seed)).Q


def delta(A, B, s):
    return s * B.to(F64) @ A.to(F64)


def applied(A, B, cut):
    """Factors after a cut, in float64."""
    return refactor(A.to(F64), B.to(F64), cut.N, cut.M)


def sqrt_psd(S):
    w, Q = torch.linalg.eigh(S)
    return Q @ torch.diag(w.clamp(min=0).sqrt()) @ Q.T


class Whitened:
    """Second moments of inputs and output gradients, and the dense optimum under them."""

    def __init__(self, metric, A, B, s, seed=0, tokens=300):
        fan_out, fan_in = B.shape[-2], A.shape[-1]
        x = randn(tokens, fan_in, seed=seed + 1) * torch.linspace(0.3, 3, fan_in, dtype=F64)
        g = randn(tokens, fan_out, seed=seed + 2) @ randn(fan_out, fan_out, seed=seed + 3)
        self.X = x.T @ x / tokens if metric != "weights" else torch.eye(fan_in, dtype=F64)
        self.G = g.T @ g / tokens if metric == "loss" else torch.eye(fan_out, dtype=F64)
        self.left, self.right = sqrt_psd(self.G), sqrt_psd(self.X)
        A, B = A.to(F64), B.to(F64)
        self.kwargs = {"metric": metric}
        if metric != "weights":
            self.kwargs["S_A"] = A @ self.X @ A.mT
        if metric == "loss":
            self.kwargs["S_B"] = s * s * B.mT @ self.G @ B
        self.U, self.sigma, self.Vh = torch.linalg.svd(self.left @ delta(A, B, s) @ self.right, full_matrices=False)

    def best(self, k):
        dense = self.U[:, :k] @ torch.diag(self.sigma[:k]) @ self.Vh[:k]
        return torch.linalg.solve(self.left, dense) @ torch.linalg.inv(self.right)

    def distance(self, change):
        return torch.linalg.norm(self.left @ change @ self.right).item()


# -- optimality -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("gauge", ["nearest", "keep", "balanced"])
@pytest.mark.parametrize(("r", "fan_in", "fan_out"), [(8, 30, 20), (5, 12, 40), (1, 7, 7), (12, 12, 12)])
def test_cut_is_the_dense_optimum(metric, gauge, r, fan_in, fan_out):
    A, B, s = randn(r, fan_in, seed=1), randn(fan_out, r, seed=2), 0.75
    ref = Whitened(metric, A, B, s)
    spec = spectrum(A, B, s, **ref.kwargs)
    torch.testing.assert_close(spec.sigma, ref.sigma[:r], rtol=1e-10, atol=1e-11 * ref.sigma[0].item())
    assert spec.rank == r
    for k in {1, (r + 1) // 2, r}:
        cut = spec.cut(k, gauge)
        assert (cut.N.shape, cut.M.shape, cut.fresh) == ((k, r), (r, k), 0)
        assert cut.N.dtype == cut.M.dtype == F64
        new = delta(*applied(A, B, cut), s)
        torch.testing.assert_close(new, ref.best(k), rtol=0, atol=1e-10 * ref.best(r).abs().max().item())
        change = delta(A, B, s) - new
        assert ref.distance(change) == pytest.approx(spec.error(k), rel=1e-9, abs=1e-10 * ref.sigma[0].item())
        energy = ref.sigma[:k].square().sum() / ref.sigma.square().sum()
        assert spec.energy(k) == pytest.approx(energy.item(), rel=1e-10)


def test_no_other_cut_of_the_same_rank_changes_the_outputs_less():
    """The optimum of the metric, seen from the data: measured on outputs, it beats the optimum of the weights."""
    A, B, s, k = randn(8, 30, seed=1), randn(20, 8, seed=2), 2.0, 3
    x = randn(500, 30, seed=3) * torch.logspace(0, -2, 30, dtype=F64)
    z = x @ A.T
    change = {}
    for metric, extra in (("weights", {}), ("outputs", {"S_A": z.T @ z / 500})):
        A2, B2 = applied(A, B, spectrum(A, B, s, metric=metric, **extra).cut(k))
        change[metric] = ((x @ (delta(A, B, s) - delta(A2, B2, s)).T).square().sum(-1).mean()).item()
    assert change["outputs"] < 0.9 * change["weights"]
    assert spectrum(A, B, s, metric="outputs", S_A=z.T @ z / 500).error(k) ** 2 == pytest.approx(change["outputs"])


@pytest.mark.parametrize("metric", METRICS)
def test_full_rank_cut_leaves_the_function_alone(metric):
    A, B = randn(6, 40, seed=1, dtype=torch.float32), randn(30, 6, seed=2, dtype=torch.float32)
    ref = Whitened(metric, A, B, 4.0)
    cut = spectrum(A, B, 4.0, **ref.kwargs).cut(6)
    A2, B2 = refactor(A, B, cut.N, cut.M)
    assert A2.dtype == torch.float32
    torch.testing.assert_close(4.0 * B2 @ A2, 4.0 * B @ A, rtol=1e-5, atol=1e-5 * (4.0 * B @ A).abs().max().item())
    torch.testing.assert_close(cut.N @ cut.M, torch.eye(6, dtype=F64), rtol=0, atol=1e-10)


def test_energy_and_error_are_monotone_and_complete():
    A, B = randn(10, 40, seed=1), randn(30, 10, seed=2)
    spec = spectrum(A, B, 1.0)
    energies = [spec.energy(k) for k in range(1, 11)]
    errors = [spec.error(k) for k in range(1, 11)]
    assert energies == sorted(energies)
    assert errors == sorted(errors, reverse=True)
    assert energies[-1] == pytest.approx(1.0)
    assert errors[-1] == 0.0
    assert spec.error(0) ** 2 == pytest.approx(delta(A, B, 1.0).square().sum().item())
    torch.testing.assert_close(spec.gains.cumsum(0) / spec.gains.sum(), torch.tensor(energies, dtype=F64))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999, 1.0])
def test_rank_for_is_the_smallest_rank_with_that_energy(share):
    spec = spectrum(randn(10, 40, seed=1), randn(30, 10, seed=2), 1.0)
    k = spec.rank_for(share)
    assert k == 10 or spec.energy(k) >= share
    assert k == 1 or spec.energy(k - 1) < share


def test_scale_enters_once_so_modules_compare():
    A, B = randn(4, 20, seed=1), randn(10, 4, seed=2)
    torch.testing.assert_close(spectrum(A, B, 3.0).sigma, 3.0 * spectrum(A, B, 1.0).sigma)
    torch.testing.assert_close(spectrum(A, B, -3.0).sigma, 3.0 * spectrum(A, B, 1.0).sigma)
    cut = spectrum(A, B, -3.0).cut(2)
    U, S, Vh = torch.linalg.svd(delta(A, B, -3.0), full_matrices=False)
    torch.testing.assert_close(delta(*applied(A, B, cut), -3.0), (U[:, :2] * S[:2]) @ Vh[:2])


def test_nothing_of_the_size_of_the_update_is_formed():
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.numel())
            return out

    A, B = randn(4, 500, seed=1), randn(400, 4, seed=2)
    B[:, 3] = 0  # the factors themselves are needed, and a direction is revived
    with Watch():
        cut = spectrum(A, B, 1.0).cut(4)
        refactor(A, B, cut.N, cut.M)
    assert 0 < largest <= 4 * 500


# -- hostile numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["A", "B", "both"])
def test_ill_conditioned_factors_keep_small_directions(side):
    """Singular values over twelve orders, hidden in dense factors: a Gram matrix alone loses all below 1e-8."""
    r, spread = 12, torch.logspace(0, -12, 12, dtype=F64)
    bent = orthonormal(r, r, 3) @ torch.diag(spread) @ orthonormal(r, r, 4).T
    A, B = orthonormal(50, r, 1).T, orthonormal(40, r, 2)
    if side in ("A", "both"):
        A = bent @ A
    if side in ("B", "both"):
        B = B @ bent
    dense = torch.linalg.svdvals(delta(A, B, 1.0))[:r]
    spec = spectrum(A, B, 1.0)
    torch.testing.assert_close(spec.sigma, dense, rtol=0, atol=1e-13 * dense[0].item())
    for k in range(1, r + 1):
        A2, B2 = applied(A, B, spec.cut(k))
        error = torch.linalg.matrix_norm(delta(A, B, 1.0) - delta(A2, B2, 1.0)).item()
        best = dense[k:].square().sum().sqrt().item()
        assert error - best <= 1e-6 * dense[0].item()
        if k <= spec.rank:
            assert error == pytest.approx(best, rel=1e-5, abs=1e-13 * dense[0].item())


@pytest.mark.parametrize("condition", [1e2, 1e6])
def test_spectrum_does_not_depend_on_the_gauge(condition):
    r = 6
    A, B = randn(r, 40, seed=1), randn(30, r, seed=2)
    R = (
        orthonormal(r, r, 3)
        @ torch.diag(torch.logspace(0, -math.log10(condition), r, dtype=F64))
        @ orthonormal(r, r, 4).T
    )
    A2, B2 = R @ A, B @ torch.linalg.inv(R)
    one, two = spectrum(A, B, 1.0), spectrum(A2, B2, 1.0)
    atol = 1e-14 * condition * one.sigma[0].item()
    torch.testing.assert_close(two.sigma, one.sigma, rtol=0, atol=atol)
    for k in (1, 3, 6):
        a = delta(*applied(A, B, one.cut(k)), 1.0)
        torch.testing.assert_close(delta(*applied(A2, B2, two.cut(k)), 1.0), a, rtol=0, atol=10 * atol)


def test_rows_of_very_different_size_cost_no_accuracy():
    d = torch.logspace(0, -14, 8, dtype=F64)
    A, B = randn(8, 40, seed=1), randn(30, 8, seed=2)
    graded = spectrum(A * d[:, None], B / d, 1.0)
    torch.testing.assert_close(graded.sigma, spectrum(A, B, 1.0).sigma, rtol=1e-11, atol=0)
    assert graded.rank == 8
    S_A = A @ A.T
    graded = spectrum(A * d[:, None], B / d, 1.0, metric="outputs", S_A=S_A * d[:, None] * d)
    torch.testing.assert_close(graded.sigma, spectrum(A, B, 1.0).sigma, rtol=1e-11, atol=0)


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_unused_directions_cost_no_accuracy_at_any_size(size):
    A, B = randn(5, 40, seed=1) * size, randn(30, 5, seed=2)
    A[2], B[:, 3] = 0, 0
    spec = spectrum(A, B, 1.0)
    dense = torch.linalg.svdvals(delta(A, B, 1.0))[:5]
    torch.testing.assert_close(spec.sigma, dense, rtol=0, atol=1e-14 * dense[0].item())
    assert spec.rank == 3
    S_A = A @ A.T
    data = spectrum(A, B, 1.0, metric="outputs", S_A=S_A)
    torch.testing.assert_close(data.sigma, dense, rtol=0, atol=1e-14 * dense[0].item())
    assert data.rank == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_stored_precision_is_taken_at_its_word(dtype):
    A, B = randn(6, 40, seed=1, dtype=dtype), randn(30, 6, seed=2, dtype=dtype)
    spec = spectrum(A, B, 2.0)
    short_sums = dtype == torch.bfloat16
    assert spec.wide == (torch.float32 if short_sums else F64)
    rtol = 1e-6 if short_sums else 1e-11
    torch.testing.assert_close(spec.sigma, torch.linalg.svdvals(delta(A, B, 2.0))[:6], rtol=rtol, atol=0)
    cut = spec.cut(3)
    A2, B2 = refactor(A, B, cut.N, cut.M)
    assert A2.dtype == B2.dtype == dtype
    torch.testing.assert_close(A2.to(F64), cut.N @ A.to(F64), rtol=torch.finfo(dtype).eps, atol=0)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_adapter_is_cut_within_1e_5_of_the_optimum(data):
    r = data.draw(st.integers(1, 9), label="r")
    fan_in, fan_out = data.draw(st.integers(1, 24), label="in"), data.draw(st.integers(1, 24), label="out")
    s = data.draw(st.sampled_from([1e-4, 0.5, 2.0, 1e4]), label="scaling")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, F64]), label="dtype")
    seed = data.draw(st.integers(0, 10**6), label="seed")
    decay = data.draw(st.sampled_from([0, 3, 9]), label="decay")
    A = randn(r, fan_in, seed=seed) * 10.0 ** data.draw(st.integers(-6, 6), label="log A")
    B = randn(fan_out, r, seed=seed + 1) * torch.logspace(0, -decay, r, dtype=F64)
    for j in range(r):
        fault = data.draw(st.sampled_from(["", "", "", "zero b", "zero a", "copy a", "copy b"]), label=f"fault {j}")
        if fault == "zero b":
            B[:, j] = 0
        elif fault == "zero a":
            A[j] = 0
        elif fault == "copy a":
            A[j] = A[0]
        elif fault == "copy b":
            B[:, j] = B[:, 0]
    A, B = A.to(dtype), B.to(dtype)
    k = data.draw(st.integers(1, r), label="k")
    gauge = data.draw(st.sampled_from(["keep", "balanced"]), label="gauge")

    spec = spectrum(A, B, s)
    dense = torch.linalg.svdvals(delta(A, B, s))
    top = dense[0].item()
    best = dense[k:].square().sum().sqrt().item()
    cut = spec.cut(k, gauge)
    A2, B2 = applied(A, B, cut)
    assert A2.shape == (k - cut.fresh, fan_in)
    assert B2.shape == (fan_out, k - cut.fresh)
    assert A2.isfinite().all()
    assert B2.isfinite().all()
    error = torch.linalg.matrix_norm(delta(A, B, s) - delta(A2, B2, s)).item()
    assert error <= best + 1e-5 * top
    assert error == pytest.approx(spec.error(k), rel=1e-6, abs=(1e-9 if spec.wide == F64 else 1e-5) * top)
    assert spec.rank <= min(torch.linalg.matrix_rank(A.to(F64)), torch.linalg.matrix_rank(B.to(F64)))
    # what was revived: no part in the function, unit-scale rows at right angles
    live = min(k, spec.rank)
    assert (B2[:, live:] == 0).all() or not A.any()
    if A.any():
        rms = torch.linalg.norm(A.to(F64)) / math.sqrt(r)
        new = A2[live:] / rms
        atol = 1e-8 if dtype != torch.bfloat16 else 1e-4  # Gram matrices to a few 1e-8, over pivots of 1e-3
        torch.testing.assert_close(new @ new.T, torch.eye(len(new), dtype=F64), rtol=0, atol=atol)
        old = A2[:live] / torch.linalg.norm(A2[:live], dim=-1, keepdim=True)
        assert (new @ old.T).abs().max().item() < atol if new.numel() and old.numel() else True
        assert cut.fresh == max(0, k - live - max(0, int(torch.linalg.matrix_rank(A.to(F64))) - live))


ENTRIES = {
    "normal": torch.randn,
    "positive": torch.rand,  # sums that only grow round the most
    "heavy": lambda *shape, **kw: torch.randn(*shape, **kw) ** 5,
    "sparse": lambda *shape, **kw: torch.randn(*shape, **kw) * (torch.rand(*shape, **kw) < 0.02),
}


@settings(max_examples=60, deadline=None)
@given(
    r=st.sampled_from([2, 8, 24]),
    fan_in=st.integers(24, 1500),
    fan_out=st.integers(24, 1500),
    dtype=st.sampled_from([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32]),
    entries=st.sampled_from(sorted(ENTRIES)),
    decades=st.sampled_from([0, 1, 2, 3, 5, 8]),
    mixed=st.booleans(),
    log_size=st.sampled_from([-30, -12, -3, 0, 3, 12, 30]),
    seed=st.integers(0, 10**6),
)
def test_cuts_of_any_dtype_are_within_1e_5_of_the_optimum(
    r, fan_in, fan_out, dtype, entries, decades, mixed, log_size, seed
):
    """Long sums, columns near and far apart, numbers of any size: bfloat16 included, whose sums are shorter."""
    make = ENTRIES[entries]
    A, B = make(r, fan_in, generator=gen(seed), dtype=F64), make(fan_out, r, generator=gen(seed + 1), dtype=F64)
    B = B * torch.logspace(0, -decades, r, dtype=F64)
    if mixed:
        B = B @ orthonormal(r, r, seed)
    size = 10.0 ** (log_size if dtype != torch.float16 else 0)
    A, B = (A * size).to(dtype), (B / size).to(dtype)
    spec = spectrum(A, B, 2.0)
    R_B, R_A = torch.linalg.qr(2.0 * B.to(F64)).R, torch.linalg.qr(A.to(F64).T).R
    dense = torch.linalg.svdvals(R_B @ R_A.T)  # those of the update, without forming it
    torch.testing.assert_close(spec.sigma, dense, rtol=0, atol=1e-5 * dense[0].item())
    for k in {1, r // 2, r}:
        cut = spec.cut(k, "balanced")
        residual = torch.eye(r, dtype=F64) - cut.M @ cut.N if not cut.fresh else None
        error = math.inf if residual is None else torch.linalg.matrix_norm(R_B @ residual @ R_A.T).item()
        best = dense[k:].square().sum().sqrt().item()
        assert cut.fresh or error <= best + 1e-5 * dense[0].item()
        assert spec.error(k) == pytest.approx(best, abs=1e-5 * math.sqrt(r) * dense[0].item())
        # and what is made of it in fewer digits is what float64 makes of it, long before bfloat16 could show it
        wide, fewer = refactor(A.to(F64), B.to(F64), cut.N, cut.M), refactor(A, B, cut.N, cut.M, wide=spec.wide)
        for one, other in zip(wide, fewer, strict=True):
            assert torch.linalg.norm(one - other) <= 1e-5 * torch.linalg.norm(one)


def test_bfloat16_is_summed_in_float64_where_digits_count():
    """Twin columns that differ in the last bit of a few entries, and numbers whose squares float32 does not hold."""
    A, B = randn(4, 900, seed=1, dtype=torch.bfloat16), randn(700, 4, seed=2, dtype=torch.bfloat16)
    assert spectrum(A, B, 1.0).wide == torch.float32
    assert spectrum(A, B.float(), 1.0).wide == F64
    twins = B.clone()
    twins[:, 3] = twins[:, 2]
    twins[:2, 3] *= 1 + 2**-6
    for a, b in ((A, twins), (A * 1e-22, B), (A, B * 1e20), (A, B * torch.tensor([1, 1, 1, 0]))):
        spec = spectrum(a, b, 1.0)
        assert spec.wide == F64
        dense = torch.linalg.svdvals(delta(a, b, 1.0))[:4]
        # A is summed in float32 all the same, where it may be
        torch.testing.assert_close(spec.sigma, dense, rtol=1e-6, atol=1e-13 * dense[0].item())


def test_rank_counts_real_directions_only():
    A, B = randn(6, 40, seed=1, dtype=torch.float32), randn(30, 6, seed=2, dtype=torch.float32)
    assert spectrum(A, B * torch.tensor([1, 1, 1, 1, 1, 1e-6]), 1.0).rank == 6
    A[5] = A[4]
    assert spectrum(A, B, 1.0).rank == 5
    B[:, 3] = B[:, 2] * 0.5
    assert spectrum(A, B, 1.0).rank == 4
    B[:, 0] = 0
    assert spectrum(A, B, 1.0).rank == 3
    assert spectrum(A, torch.zeros_like(B), 1.0).rank == 0


@pytest.mark.parametrize("both", [False, True])
def test_deficiency_shows_through_a_rounded_change_of_basis(both):
    """Rank 3 stored as rank 6 in float32: rounding is not a direction."""
    A, B, C = randn(3, 40, seed=1), randn(30, 3, seed=2), orthonormal(6, 3, 3)
    A6 = C @ A if both else randn(6, 40, seed=4)
    assert spectrum(A6.float(), (B @ C.T).float(), 1.0).rank == 3


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_deficiency_shows_in_statistics_of_either_precision(dtype):
    for seed in range(8):  # rounding makes the smallest eigenvalue negative as often as positive
        A, B = randn(6, 40, seed=seed), randn(30, 6, seed=50)
        x = randn(300, 40, seed=51)
        full = (A @ x.T @ x @ A.T).to(dtype)
        assert spectrum(A, B, 1.0, metric="outputs", S_A=full).rank == 6
        A[5] = 0.7 * A[4] - 0.4 * A[3]
        assert spectrum(A, B, 1.0, metric="outputs", S_A=(A @ x.T @ x @ A.T).to(dtype)).rank == 5


# -- revival --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gauge", ["nearest", "keep", "balanced"])
@pytest.mark.parametrize("k", [1, 4, 8])
def test_a_fresh_adapter_comes_out_fresh(gauge, k):
    A, B = torch.rand(8, 64, generator=gen(0)) * 0.25 - 0.125, torch.zeros(32, 8)
    spec = spectrum(A, B, 2.0)
    assert spec.rank == 0
    assert spec.energy(1) == 1.0
    assert spec.error(1) == 0.0
    cut = spec.cut(k, gauge)
    A2, B2 = refactor(A, B, cut.N, cut.M)
    assert cut.fresh == 0
    assert (cut.M == 0).all()
    assert (cut.N.gather(1, cut.N.abs().argmax(1, keepdim=True)) > 0).all()
    assert (B2 == 0).all()
    rms = A.norm() / math.sqrt(8)
    torch.testing.assert_close(A2 @ A2.T, rms.square() * torch.eye(k), rtol=1e-5, atol=1e-5)
    learned = nn.Parameter(B2)
    (randn(5, 64, seed=3, dtype=torch.float32) @ A2.T @ learned.T).square().sum().backward()
    ((randn(5, 64, seed=3, dtype=torch.float32) @ A2.T @ learned.T) + 1).square().sum().backward()
    assert learned.grad is not None
    assert (learned.grad.abs().amax(0) > 0).all()


@pytest.mark.parametrize("metric", METRICS)
def test_directions_grown_but_not_yet_trained_survive_in_another_basis(metric):
    A, B = randn(6, 40, seed=1), randn(30, 6, seed=2)
    B[:, 4:] = 0
    ref = Whitened(metric, A, B, 1.0)
    spec = spectrum(A, B, 1.0, **ref.kwargs)
    assert spec.rank == 4
    cut = spec.cut(6)
    A2, B2 = applied(A, B, cut)
    torch.testing.assert_close(delta(A2, B2, 1.0), delta(A, B, 1.0), rtol=1e-9, atol=1e-9)
    assert (cut.M[:, 4:] == 0).all()
    torch.testing.assert_close(A2[4:].norm(dim=1), (A.norm() / 6**0.5).expand(2), rtol=1e-9, atol=0)
    assert (A2[4:] @ A2[:4].T).abs().max() < 1e-7
    assert torch.linalg.matrix_rank(torch.cat([A, A2], 0)) == 6  # still A's row space
    torch.testing.assert_close(A2.norm() / B2.norm(), A.norm() / B.norm(), rtol=1e-9, atol=0)


def test_revival_goes_by_direction_not_by_size():
    A = randn(6, 40, seed=1) * torch.logspace(0, -12, 6, dtype=F64)[:, None]
    cut = spectrum(A, torch.zeros(30, 6, dtype=F64), 1.0).cut(6)
    assert cut.fresh == 0
    A2 = cut.N @ A
    torch.testing.assert_close(A2 @ A2.T, A.square().sum() / 6 * torch.eye(6, dtype=F64), rtol=1e-9, atol=1e-9)


def test_exhausted_row_space_is_reported_as_fresh():
    A, B = randn(5, 40, seed=1), randn(30, 5, seed=2)
    A[3], A[4] = A[0], 2 * A[1] - A[2]
    spec = spectrum(A, B, 1.0)
    assert spec.rank == 3
    cut = spec.cut(5)
    assert cut.fresh == 2
    assert cut.N.shape == (3, 5)
    A2, B2 = applied(A, B, cut)
    torch.testing.assert_close(delta(A2, B2, 1.0), delta(A, B, 1.0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(A2.norm() / B2.norm(), A.norm() / B.norm(), rtol=1e-9, atol=0)
    assert spec.cut(3).fresh == 0
    assert spectrum(randn(8, 3, seed=1), randn(9, 8, seed=2), 1.0).cut(8).fresh == 5  # wider than the module
    assert spectrum(randn(4, 9, seed=1), randn(9, 4, seed=2), 1.0).cut(6).fresh == 2  # more than there ever was


def test_a_fresh_embedding_adapter_keeps_its_random_side():
    A, B = torch.zeros(6, 50), randn(16, 6, seed=1, dtype=torch.float32)
    cut = spectrum(A, B, 1.0).cut(4)
    A2, B2 = refactor(A, B, cut.N, cut.M)
    assert cut.fresh == 0
    assert (A2 == 0).all()
    torch.testing.assert_close(B2.T @ B2, B.square().sum() / 6 * torch.eye(4), rtol=1e-5, atol=1e-4)


def test_two_zero_factors_have_nothing_to_give():
    cut = spectrum(torch.zeros(4, 9), torch.zeros(7, 4), 1.0).cut(3)
    assert (cut.N.shape, cut.M.shape, cut.fresh) == ((0, 4), (4, 0), 3)


# -- gauges ---------------------------------------------------------------------------------------------------------


def test_balanced_factors_carry_the_singular_values_evenly():
    A, B = randn(6, 40, seed=1) * 100, randn(30, 6, seed=2)
    spec = spectrum(A, B, 0.5)
    A2, B2 = applied(A, B, spec.cut(4, "balanced"))
    even = torch.diag(spec.sigma[:4] / 0.5)
    torch.testing.assert_close(A2 @ A2.T, even, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(B2.T @ B2, even, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("metric", METRICS)
def test_gauges_set_norms_in_every_metric(metric):
    A, B = randn(6, 40, seed=1) * 10, randn(30, 6, seed=2)
    ref = Whitened(metric, A, B, 0.5)
    spec = spectrum(A, B, 0.5, **ref.kwargs)
    for k in (2, 6):
        A2, B2 = applied(A, B, spec.cut(k, "keep"))
        torch.testing.assert_close(A2.norm() / B2.norm(), A.norm() / B.norm(), rtol=1e-9, atol=0)
        A3, B3 = applied(A, B, spec.cut(k, "balanced"))
        torch.testing.assert_close(A3.norm(dim=1), B3.norm(dim=0), rtol=1e-8, atol=0)
        torch.testing.assert_close(delta(A2, B2, 0.5), delta(A3, B3, 0.5), rtol=1e-9, atol=1e-9)


def test_keep_leaves_an_orthogonal_adapter_where_it_is():
    """Two trained directions and four untrained ones, all at right angles: the gauge has nothing to correct."""
    A = orthonormal(40, 6, 1).T
    B = orthonormal(30, 6, 2) * torch.tensor([3e-3, 3e-3, 0, 0, 0, 0], dtype=F64)
    A2, B2 = applied(A, B, spectrum(A, B, 2.0).cut(6))
    torch.testing.assert_close(A2.norm(dim=1), torch.ones(6, dtype=F64), rtol=1e-9, atol=0)
    torch.testing.assert_close(B2.norm(dim=0)[:2], B.norm(dim=0)[:2], rtol=1e-9, atol=0)


@pytest.mark.parametrize("metric", METRICS)
def test_nearest_moves_nothing_where_nothing_is_cut(metric):
    A, B = randn(6, 40, seed=1), randn(30, 6, seed=2)
    cut = spectrum(A, B, 0.5, **Whitened(metric, A, B, 0.5).kwargs).cut(6, "nearest")
    assert torch.equal(cut.N, torch.eye(6, dtype=F64))
    assert torch.equal(cut.M, torch.eye(6, dtype=F64))


def off_identity(cut, old):
    one = torch.eye(len(old), dtype=F64)
    return (cut.N[:, old] - one).square().sum() + (cut.M[old] - one).square().sum()


def test_nearest_is_nearer_than_any_other_choice_of_a_small_change():
    """Four directions at right angles, two weak ones a little askew: the four go on, each at its place and size."""
    A = orthonormal(40, 6, 1).T
    B = orthonormal(30, 6, 2) * torch.tensor([1, 2, 0.03, 3, 0.02, 1.5], dtype=F64) + 0.01 * randn(30, 6, seed=3)
    spec = spectrum(A, B, 1.0)
    cut, old = spec.cut(4, "nearest"), [0, 1, 3, 5]
    assert off_identity(cut, old) < 1e-3
    assert off_identity(spec.cut(4, "keep"), old) > 1
    for seed in range(20):  # G N and M G^-1 for a G near 1
        G = torch.eye(4, dtype=F64) + 0.01 * randn(4, 4, seed=seed)
        assert off_identity(cut, old) < off_identity(replace(cut, N=G @ cut.N, M=cut.M @ torch.linalg.inv(G)), old)


def test_nearest_splits_what_is_lost_evenly_and_without_turning():
    """On the old directions that go on, N is a symmetric root, M the same one turned; the function is what it was."""
    A, B, k = randn(8, 40, seed=1), randn(30, 8, seed=2), 5
    spec = spectrum(A, B, 1.0)
    cut, kept = spec.cut(k, "nearest"), spec.cut(k, "keep")
    projector = cut.M @ cut.N
    torch.testing.assert_close(projector, kept.M @ kept.N, rtol=0, atol=1e-10)
    torch.testing.assert_close(cut.N @ cut.M, torch.eye(k, dtype=F64), rtol=0, atol=1e-10)
    size = (A.norm(dim=1) / B.norm(dim=0)).sqrt()
    found = min(combinations(range(8), k), key=lambda old: float(off_identity(cut, list(old))))
    old = list(found)
    N = cut.N[:, old] / size[old, None] * size[old]
    M = cut.M[old] / size[old, None] * size[old]
    torch.testing.assert_close(N, N.T, rtol=0, atol=1e-10)
    assert (torch.linalg.eigvalsh(N) > 0).all()
    torch.testing.assert_close(M.T @ M, N @ N, rtol=0, atol=1e-10)


def test_nearest_does_not_depend_on_the_scales_of_directions():
    A, B = randn(8, 40, seed=1), randn(30, 8, seed=2)
    scale = torch.logspace(-3, 3, 8, dtype=F64)
    one = applied(A, B, spectrum(A, B, 1.0).cut(4, "nearest"))
    scaled = scale[:, None] * A, B / scale
    other = applied(*scaled, spectrum(*scaled, 1.0).cut(4, "nearest"))
    torch.testing.assert_close(other[0].norm(dim=1) * other[1].norm(dim=0), one[0].norm(dim=1) * one[1].norm(dim=0))
    torch.testing.assert_close(delta(*other, 1.0), delta(*one, 1.0), rtol=1e-9, atol=1e-9)


def test_nearest_chooses_old_directions_that_differ():
    """Two copies of one direction and three of another, where both copies of the first are kept more than any other."""
    U, V = orthonormal(40, 2, 1), orthonormal(30, 2, 2)
    copies = [0, 0, 1, 1, 1]
    A, B = U.T[copies], V[:, copies]
    cut = spectrum(A, B, 1.0).cut(2, "nearest")
    share = torch.tensor([[2.0], [3.0]], dtype=F64) ** -0.5  # P is the mean over copies; its rows over sqrt(P[i, i])
    torch.testing.assert_close(cut.N, torch.tensor([[1.0, 1, 0, 0, 0], [0, 0, 1, 1, 1]], dtype=F64) * share)
    torch.testing.assert_close(cut.M, cut.N.T)


@pytest.mark.parametrize("seed", range(6))
def test_nearest_loses_no_digits_to_cancellation(seed):
    """Oblique projectors, of which no old directions may stand for what is kept: float32 factors carry all they can."""
    mix = randn(16, 16, seed=seed + 200) * torch.logspace(0, -5, 16, dtype=F64)
    A = (mix @ randn(16, 40, seed=seed)).float()
    B = (randn(30, 16, seed=seed + 100) @ torch.linalg.inv(mix)).float()
    spec = spectrum(A, B, 1.0)
    for k in (1, 8, 15):
        best, cut = delta(*applied(A, B, spec.cut(k)), 1.0), spec.cut(k, "nearest")
        assert (delta(*refactor(A, B, cut.N, cut.M), 1.0) - best).norm() < 1e-6 * best.norm()


@pytest.mark.parametrize("gauge", ["keep", "balanced"])
@pytest.mark.parametrize("metric", METRICS)
def test_cutting_twice_is_cutting_once(metric, gauge):
    A, B, s = randn(8, 40, seed=1), randn(30, 8, seed=2), 2.0
    ref = Whitened(metric, A, B, s)
    once = applied(A, B, spectrum(A, B, s, **ref.kwargs).cut(3, gauge))
    halfway = applied(A, B, spectrum(A, B, s, **ref.kwargs).cut(5, gauge))
    again = Whitened(metric, *halfway, s)
    twice = applied(*halfway, spectrum(*halfway, s, **again.kwargs).cut(3, gauge))
    torch.testing.assert_close(delta(*twice, s), delta(*once, s), rtol=1e-8, atol=1e-9)
    # once canonical, a cut to the same rank moves nothing, signs included
    same = spectrum(*once, s, **Whitened(metric, *once, s).kwargs).cut(3, gauge)
    torch.testing.assert_close(same.N, torch.eye(3, dtype=F64), rtol=0, atol=1e-7)
    torch.testing.assert_close(same.M, torch.eye(3, dtype=F64), rtol=0, atol=1e-7)


def test_cuts_are_reproducible_and_nested():
    A, B = randn(8, 40, seed=1), randn(30, 8, seed=2)
    one, two = spectrum(A, B, 1.0).cut(5, "balanced"), spectrum(A.clone(), B.clone(), 1.0).cut(5, "balanced")
    assert torch.equal(one.N, two.N)
    assert torch.equal(one.M, two.M)
    largest = one.N.gather(1, one.N.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()
    small = spectrum(A, B, 1.0).cut(2, "balanced")
    torch.testing.assert_close(small.N, one.N[:2])
    torch.testing.assert_close(small.M, one.M[:, :2])


def test_inputs_are_left_alone_and_carry_no_graph():
    A, B = nn.Parameter(randn(4, 20, seed=1)), nn.Parameter(randn(10, 4, seed=2))
    before = A.detach().clone(), B.detach().clone()
    cut = spectrum(A, B, 1.0).cut(2)
    A2, B2 = refactor(A, B, cut.N, cut.M)
    assert not any(t.requires_grad for t in (cut.N, cut.M, A2, B2))
    assert torch.equal(A, before[0])
    assert torch.equal(B, before[1])


# -- experts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
def test_experts_are_cut_each_for_itself(metric):
    E, r = 3, 5
    A, B = randn(E, r, 20, seed=1), randn(E, 12, r, seed=2)
    B[1] *= 1e-3
    refs = [Whitened(metric, A[e], B[e], 2.0, seed=e) for e in range(E)]
    stats = {key: torch.stack([ref.kwargs[key] for ref in refs]) for key in refs[0].kwargs if key != "metric"}
    spec = spectrum(A, B, 2.0, metric=metric, **stats)
    assert spec.sigma.shape == (E, r)
    for gauge in ("nearest", "keep", "balanced"):
        cut = spec.cut(3, gauge)
        A2, B2 = refactor(A, B, cut.N, cut.M)
        assert (A2.shape, B2.shape) == ((E, 3, 20), (E, 12, 3))
        for e in range(E):
            alone = spectrum(A[e], B[e], 2.0, **refs[e].kwargs).cut(3, gauge)
            torch.testing.assert_close(cut.N[e], alone.N, rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(cut.M[e], alone.M, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(spec.gains, sum(ref.sigma[:r].square() for ref in refs))
    best = sum(ref.sigma[3:].square().sum() for ref in refs)
    assert spec.error(3) == pytest.approx(math.sqrt(best), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
@pytest.mark.parametrize("experts", [(), (2,)], ids=["linear", "experts"])
def test_modules_factorised_at_once_are_each_as_if_alone(experts, dtype):
    A, B = randn(4, *experts, 5, 20, seed=1), randn(4, *experts, 30, 5, seed=2)
    B[1] *= 1e-3
    B[2, ..., -1] = 0  # deficient, so that the stack leaves Gram matrices
    pairs = list(zip(A.to(dtype), B.to(dtype), strict=True))
    scalings = [2.0, 0.5, -1.0, 3.0]
    for (a, b), s, found in zip(pairs, scalings, spectra(pairs, scalings), strict=True):
        alone = spectrum(a, b, s)
        torch.testing.assert_close(found.sigma, alone.sigma, rtol=1e-5, atol=1e-9)
        assert found.rank == alone.rank
        cut, expected = found.cut(3, "balanced"), alone.cut(3, "balanced")
        torch.testing.assert_close(cut.M @ cut.N, expected.M @ expected.N, rtol=1e-4, atol=1e-6)
        assert found.weight_change(2) == pytest.approx(alone.weight_change(2), rel=1e-5)


def test_the_module_at_fault_among_those_factorised_at_once_is_named_as_if_alone():
    good, bad = (randn(3, 8), randn(6, 3)), (randn(3, 8), randn(6, 3) * math.nan)
    with pytest.raises(AdapterError, match=r"B \[6, 3\] holds NaN"):
        spectra([good, bad], [1.0, 1.0])
    with pytest.raises(ConfigError, match="scaling is 0"):
        spectra([good, good], [1.0, 0.0])


def test_experts_of_different_rank_share_one_shape():
    A, B = randn(3, 4, 20, seed=1), randn(3, 12, 4, seed=2)
    B[1] = 0  # an expert no token ever reached
    B[2, :, 1:] = 0
    spec = spectrum(A, B, 1.0)
    assert spec.rank == 4
    cut = spec.cut(3)
    assert (cut.N.shape, cut.fresh) == ((3, 3, 4), 0)
    A2, B2 = refactor(A, B, cut.N, cut.M)
    torch.testing.assert_close(delta(A2[1:], B2[1:], 1.0), delta(A[1:], B[1:], 1.0), rtol=1e-9, atol=1e-9)
    assert (B2[1] == 0).all()
    assert (B2[2, :, 1:] == 0).all()
    assert (A2.norm(dim=-1) > 0.1).all()


def test_an_expert_without_room_gets_zero_rows():
    A, B = randn(2, 3, 20, seed=1), randn(2, 12, 3, seed=2)
    A[1, 2] = A[1, 0]
    cut = spectrum(A, B, 1.0).cut(3)
    assert cut.fresh == 0
    A2, B2 = refactor(A, B, cut.N, cut.M)
    torch.testing.assert_close(delta(A2, B2, 1.0), delta(A, B, 1.0), rtol=1e-9, atol=1e-9)
    assert (A2[1, 2] == 0).all()
    assert (B2[1, :, 2] == 0).all()


# -- moments --------------------------------------------------------------------------------------------------------


def linear_model_gradients(A, B, s, batches):
    A, B = nn.Parameter(A.clone()), nn.Parameter(B.clone())
    out = []
    for x, y in batches:
        loss = (x @ (s * B @ A).T - y).square().mean()
        out.append(torch.autograd.grad(loss, (A, B)))
    return out


@pytest.mark.parametrize("metric", METRICS)
def test_first_moments_are_those_of_the_reparametrised_model(metric):
    """Rank kept, function unchanged: an average of gradients maps onto the average the new factors would have seen."""
    A, B, s = randn(4, 12, seed=1), randn(9, 4, seed=2), 1.5
    batches = [(randn(6, 12, seed=10 + i), randn(6, 9, seed=20 + i)) for i in range(5)]
    cut = spectrum(A, B, s, **Whitened(metric, A, B, s).kwargs).cut(4)
    moments = []
    for factors in ((A, B), applied(A, B, cut)):
        m_A, m_B = torch.zeros_like(A), torch.zeros_like(B)
        for grad_A, grad_B in linear_model_gradients(*factors, s, batches):
            m_A, m_B = 0.9 * m_A + 0.1 * grad_A, 0.9 * m_B + 0.1 * grad_B
        moments.append((m_A, m_B))
    torch.testing.assert_close(carry_first(moments[0][0], cut.N, cut.M, "A"), moments[1][0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(carry_first(moments[0][1], cut.N, cut.M, "B"), moments[1][1], rtol=1e-9, atol=1e-9)


def test_second_moments_are_exact_where_directions_only_rescale():
    d = torch.tensor([2.0, 0.5, 4.0], dtype=F64)
    N, M = torch.diag(d), torch.diag(1 / d)
    g_A, g_B = randn(50, 3, 8, seed=1), randn(50, 6, 3, seed=2)
    v_A, v_B = g_A.square().mean(0), g_B.square().mean(0)
    torch.testing.assert_close(carry_second(v_A, None, N, M, "A"), (M.T @ g_A).square().mean(0))
    torch.testing.assert_close(carry_second(v_B, None, N, M, "B"), (g_B @ N.T).square().mean(0))


def test_second_moments_are_compared_bias_corrected():
    """One Adam step: m = (1 - b1) g and v = (1 - b2) g^2 mean |update| = 1 in every entry, before and after."""
    b1, b2 = 0.9, 0.999
    g, (N, M) = randn(4, 10, seed=1), (randn(3, 4, seed=2), randn(4, 3, seed=3))
    m = carry_first((1 - b1) * g, N, M, "A")
    v = carry_second((1 - b2) * g.square(), m, N, M, "A", bias_first=1 - b1, bias_second=1 - b2)
    ratio = (m / (1 - b1)).abs() / (v / (1 - b2)).sqrt()
    assert ratio.max() <= 1 + 1e-12
    assert ratio.max() > 0.999  # the bound is met, not merely kept: v is no larger than it has to be
    plain = (M * M).T @ ((1 - b2) * g.square())
    assert ((v - plain).abs() < 1e-15).any()
    assert (v >= plain * (1 - 1e-12)).all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    r=st.integers(1, 8),
    k=st.integers(1, 8),
    step=st.sampled_from([1, 2, 100, 10**6]),
    log_size=st.sampled_from([-30, -22, -12, 0, 6, 15, 35]),
    log_map=st.sampled_from([-6, 0, 6]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, F64]),
    factor=st.sampled_from(["A", "B"]),
    experts=st.booleans(),
)
def test_carried_moments_stay_finite_and_never_push_harder(seed, r, k, step, log_size, log_map, dtype, factor, experts):
    lead = (2,) if experts else ()
    N = randn(*lead, k, r, seed=seed) * 10.0**log_map
    M = randn(*lead, r, k, seed=seed + 1) * 10.0**-log_map
    M[..., :, 0] = 0  # as for a revived direction
    shape = (*lead, r, 7) if factor == "A" else (*lead, 7, r)
    b1, b2 = 1 - 0.9**step, 1 - 0.999**step
    m = (randn(*shape, seed=seed + 2) * 10.0**log_size).to(dtype)
    slack = 1.1 if seed % 2 else 0.0  # without slack some updates are above 1 already
    v = (m.to(F64) / b1).square() * b2 * (slack + randn(*shape, seed=seed + 3).square())
    v = v.clamp(max=torch.finfo(dtype).max).to(dtype)

    m2 = carry_first(m, N, M, factor)
    v2 = carry_second(v, m2, N, M, factor, bias_first=b1, bias_second=b2)
    assert m2.dtype == v2.dtype == dtype
    assert m2.shape == ((*lead, k, 7) if factor == "A" else (*lead, 7, k))
    assert m2.isfinite().all()
    assert v2.isfinite().all()
    assert (v2 >= 0).all()

    def ratio(m, v):
        m, v = m.to(F64).abs() / b1, (v.to(F64) / b2).sqrt()
        return torch.where(m > 0, m / v, 0.0).max().item()

    if v2.max() < torch.finfo(dtype).max:
        assert ratio(m2, v2) <= max(1.0, ratio(m, v)) * (1 + 1e-12)


def test_moments_too_large_for_their_dtype_stay_finite():
    big = torch.full((2, 3), 1e38)
    N = M = 1e6 * torch.eye(2, dtype=F64)
    for factor, m in (("A", big), ("B", big.T)):
        assert carry_first(m, N, M, factor).isfinite().all()
        assert carry_second(m, carry_first(m, N, M, factor), N, M, factor).isfinite().all()


# -- growth ---------------------------------------------------------------------------------------------------------


def test_new_rows_are_drawn_as_peft_draws_a():
    A = torch.zeros(4, 400, dtype=torch.bfloat16)
    state = torch.get_rng_state()
    rows = new_rows(200, A.float(), gen(3))
    assert torch.equal(torch.get_rng_state(), state)
    peft_like = torch.empty(200, 400)
    nn.init.kaiming_uniform_(peft_like, a=math.sqrt(5))
    assert rows.abs().max() <= 1 / math.sqrt(400)
    assert rows.std() == pytest.approx(peft_like.std().item(), rel=0.02)
    assert rows.mean().abs() < 1e-3
    assert torch.equal(new_rows(2, A, gen(3)), new_rows(2, A.float(), gen(3)).bfloat16())
    assert not torch.equal(new_rows(2, A, gen(3)), new_rows(2, A, gen(4)))
    assert new_rows(2, torch.zeros(0, 9), gen(0)).shape == (2, 9)
    assert new_rows(2, torch.zeros(3, 4, 9), gen(0)).shape == (3, 2, 9)
    assert new_rows(3, torch.zeros(4, 5000), gen(0), kind="embedding").std() == pytest.approx(1.0, rel=0.05)


def test_sketch_rows_point_where_the_gradient_points_and_a_does_not():
    A = randn(3, 40, seed=1) * 0.2
    directions = orthonormal(40, 5, 2).T
    sketch = (
        randn(12, 5, seed=3) @ torch.diag(torch.tensor([9.0, 5, 3, 2, 1], dtype=F64)) @ directions + randn(12, 3) @ A
    )
    rows = rows_from_sketch(2, A, sketch)
    # independent: project with a dense projector, then a dense SVD
    P = torch.eye(40, dtype=F64) - torch.linalg.pinv(A) @ A
    Vh = torch.linalg.svd(sketch @ P)[2][:2]
    norm = A.norm() / math.sqrt(3)
    torch.testing.assert_close((rows @ Vh.T).abs(), norm * torch.eye(2, dtype=F64), rtol=1e-9, atol=1e-9)
    assert (rows @ A.T).abs().max() < 1e-12
    assert torch.equal(rows, rows_from_sketch(2, A, sketch))
    torch.testing.assert_close(rows, rows_from_sketch(2, A, -sketch))  # a direction has no sign of its own
    assert (rows.gather(1, rows.abs().argmax(1, keepdim=True)) > 0).all()


def test_a_short_sketch_says_how_far_it_goes():
    A = randn(3, 40, seed=1, dtype=torch.float32)
    outside = randn(1, 40, seed=2, dtype=torch.float32)
    sketch = torch.cat([randn(4, 3, seed=3, dtype=torch.float32) @ A, outside, 2 * outside])
    rows = rows_from_sketch(3, A, sketch)
    assert rows.shape == (1, 40)
    assert rows.dtype == torch.float32
    assert rows_from_sketch(3, A, randn(4, 3, seed=3, dtype=torch.float32) @ A).shape == (0, 40)
    assert rows_from_sketch(3, A, torch.zeros(2, 40)).shape == (0, 40)
    assert rows_from_sketch(5, A, randn(2, 40, seed=4)).shape == (2, 40)


def test_a_zero_row_of_a_blocks_no_direction():
    A = torch.zeros(2, 6, dtype=F64)
    A[0, 0] = 1
    rows = rows_from_sketch(5, A, torch.eye(6, dtype=F64))
    assert rows.shape == (5, 6)
    assert (rows[:, 0].abs() < 1e-12).all()
    assert rows_from_sketch(6, A * 0, torch.eye(6, dtype=F64)).shape == (6, 6)


def test_sketch_rows_of_an_empty_module_have_the_initial_norm():
    for A in (torch.zeros(0, 300), torch.zeros(4, 300)):
        rows = rows_from_sketch(2, A, randn(5, 300, seed=1))
        torch.testing.assert_close(
            rows.norm(dim=1), torch.full((2,), new_rows(4000, A, gen(0)).norm(dim=1).mean()), rtol=0.01, atol=0
        )
    rows = rows_from_sketch(1, torch.zeros(0, 300), randn(5, 300, seed=1), kind="embedding")
    assert rows.norm().item() == pytest.approx(math.sqrt(300), rel=1e-5)


def test_sketch_rows_of_experts():
    A, sketch = randn(2, 3, 20, seed=1), randn(2, 6, 20, seed=2)
    sketch[1, 1:] = sketch[1, :1]
    assert rows_from_sketch(3, A, sketch).shape == (2, 1, 20)  # the expert with the fewest decides
    rows = rows_from_sketch(2, A, randn(2, 6, 20, seed=2))
    torch.testing.assert_close(rows[1], rows_from_sketch(2, A[1], randn(2, 6, 20, seed=2)[1]))


# -- randomised SVD -------------------------------------------------------------------------------------------------


def decaying(m=120, n=90, seed=0):
    return orthonormal(m, 80, seed) @ torch.diag(torch.logspace(0, -3, 80, dtype=F64)) @ orthonormal(n, 80, seed + 1).T


@pytest.mark.parametrize("backend", BACKENDS)
def test_low_rank_of_any_size(backend):
    """Powers of two change no digit, as far as float32 goes; beyond it there is an error."""
    delta = randn(20, 3, dtype=torch.float32) @ randn(3, 16, dtype=torch.float32)
    U, S, Vh = low_rank(delta, 3, backend)
    for power in (2.0**-100, 2.0**120):
        found = low_rank(delta * power, 3, backend)
        assert torch.equal(found[0], U)
        assert torch.equal(found[1], S * power)
        assert torch.equal(found[2], Vh)
    with pytest.raises(RankFlowError, match="too large"):
        low_rank(torch.full((64, 64), 3e38), 3, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(120, 90), (90, 120)])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_low_rank_is_within_one_percent_of_the_optimum(backend, shape, dtype):
    M = decaying(*shape).to(dtype)
    U, S, Vh = low_rank(M, 8, backend, seed=1)
    assert (U.shape, S.shape, Vh.shape) == ((shape[0], 8), (8,), (8, shape[1]))
    assert U.dtype == (F64 if dtype == F64 else torch.float32)
    best = torch.linalg.svdvals(M.to(F64))[8:].square().sum().sqrt()
    assert torch.linalg.norm(M.to(F64) - (U * S).to(F64) @ Vh.to(F64)) <= 1.01 * best
    assert (S.diff() <= 0).all()
    torch.testing.assert_close(U.T @ U, torch.eye(8, dtype=U.dtype), rtol=0, atol=1e-5)
    assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_low_rank_is_seeded_and_leaves_global_random_state_alone(backend):
    M = randn(60, 50, seed=1)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    one, two = low_rank(M, 4, backend, n_iter=0, seed=5), low_rank(M, 4, backend, n_iter=0, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    other = low_rank(M, 4, backend, n_iter=0, seed=6)
    assert torch.equal(one[1], other[1]) == (backend == "exact")
    assert torch.equal(torch.get_rng_state(), torch_state)
    after = np.random.get_state()  # noqa: NPY002
    assert np.array_equal(after[1], numpy_state[1])
    assert after[2:] == numpy_state[2:]


@pytest.mark.parametrize("backend", ["torch", "fbpca"])
def test_low_rank_is_seeded_in_threads_too(backend):
    matrices = [randn(60, 50, seed=i) for i in range(6)]
    alone = [low_rank(M, 4, backend, n_iter=0) for M in matrices]
    state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    with ThreadPoolExecutor(3) as pool:
        for _ in range(5):
            together = pool.map(lambda M: low_rank(M, 4, backend, n_iter=0), matrices)
            assert all(torch.equal(a[1], b[1]) for a, b in zip(alone, together, strict=True))
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])  # noqa: NPY002


def test_signs_do_not_hang_on_the_last_bit():
    rows = torch.tensor([[-1.0, 1.0], [-1.0, 1.0 + 1e-9], [0.5, -2.0], [0.0, 0.0]], dtype=F64)
    assert dominant_sign(rows).tolist() == [-1, -1, -1, 1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (1, 6), (6, 1)])
def test_low_rank_of_small_matrices_is_exact(backend, shape):
    M = randn(*shape, seed=1)
    U, S, Vh = low_rank(M, min(shape), backend)
    torch.testing.assert_close((U * S) @ Vh, M, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["torch", "fbpca", "sklearn"])
@pytest.mark.parametrize("experts", [False, True])
def test_randomised_cuts_of_factors(backend, experts):
    r, k = 40, 6
    B = randn(70, r, seed=2) * torch.logspace(0, -2, r, dtype=F64)
    A = randn(r, 60, seed=1)
    lead = (2,) if experts else ()
    A, B = A.expand(*lead, r, 60).contiguous(), B.expand(*lead, 70, r).contiguous()
    exact, spec = spectrum(A, B, 2.0), spectrum(A, B, 2.0, backend=backend, seed=3)
    torch.testing.assert_close(spec.sigma, exact.sigma)
    cut = spec.cut(k)
    assert cut.N.shape == (*lead, k, r)
    A2, B2 = applied(A, B, cut)
    error = torch.linalg.norm(delta(A, B, 2.0) - delta(A2, B2, 2.0)).item()
    assert exact.error(k) * (1 - 1e-12) <= error <= 1.01 * exact.error(k)
    assert error > exact.error(k) * (1 + 1e-13)  # it is the randomised one
    torch.testing.assert_close(A2.norm() / B2.norm(), A.norm() / B.norm())


@pytest.mark.parametrize("backend", ["torch", "fbpca", "sklearn"])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_randomised_cuts_revive_like_exact_ones(backend, dtype):
    A, B = randn(5, 30, seed=1, dtype=dtype), torch.zeros(20, 5, dtype=dtype)
    cut, exact = spectrum(A, B, 1.0, backend=backend).cut(3), spectrum(A, B, 1.0).cut(3)
    torch.testing.assert_close(cut.N, exact.N)
    assert (cut.M == 0).all()
    B[:, :2] = randn(20, 2, seed=2, dtype=dtype)
    cut = spectrum(A, B, 1.0, backend=backend).cut(5)
    assert (cut.N.shape, cut.fresh) == ((5, 5), 0)
    torch.testing.assert_close(delta(*applied(A, B, cut), 1.0), delta(A, B, 1.0), rtol=1e-4, atol=1e-4)
    assert spectrum(randn(6, 3, seed=1), randn(9, 6, seed=2), 1.0, backend=backend).cut(6).fresh == 3


@pytest.mark.parametrize(("backend", "package"), [("fbpca", "fbpca"), ("sklearn", "sklearn.utils.extmath")])
def test_a_missing_package_is_named_with_the_remedy(backend, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=r'pip install "rankflow-lora\[rsvd\]"'):
        low_rank(randn(9, 9), 2, backend)


# -- bad input ------------------------------------------------------------------------------------------------------

GOOD_A, GOOD_B, S = randn(4, 20, seed=1), randn(10, 4, seed=2), torch.eye(4, dtype=F64)
NAN = torch.tensor(float("nan"))


def with_one(t, value):
    t = t.clone()
    t.view(-1)[3] = value
    return t


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "match"),
    [
        (
            (GOOD_A, GOOD_B, 1.0),
            {"metric": "weight"},
            ConfigError,
            "unknown metric 'weight'; known: weights, outputs, loss",
        ),
        ((GOOD_A, GOOD_B, 1.0), {"metric": "outputs"}, ConfigError, "S_A was not given"),
        ((GOOD_A, GOOD_B, 1.0), {"metric": "loss", "S_A": S}, ConfigError, "S_B was not given"),
        ((GOOD_A, GOOD_B, 1.0), {"S_A": S}, ConfigError, "S_A was given"),
        ((GOOD_A, GOOD_B, 1.0), {"metric": "outputs", "S_A": S, "S_B": S}, ConfigError, "S_B was given"),
        ((GOOD_A, GOOD_B, 1.0), {"metric": "outputs", "S_A": S[:3]}, ConfigError, r"S_A is .*\[3, 4\]"),
        ((GOOD_A, GOOD_B, 1.0), {"metric": "outputs", "S_A": S * NAN}, RankFlowError, "S_A .* not finite"),
        ((GOOD_A, GOOD_B, 0.0), {}, ConfigError, "scaling is 0"),
        ((GOOD_A, GOOD_B, math.nan), {}, ConfigError, "scaling is nan"),
        ((GOOD_A, GOOD_B[:, :3], 1.0), {}, AdapterError, r"\[4, 20\] and B \[10, 3\]"),
        ((GOOD_A[None], GOOD_B, 1.0), {}, AdapterError, "do not fit"),
        ((GOOD_A[0], GOOD_B, 1.0), {}, AdapterError, "A is .* matrix"),
        ((GOOD_A.long(), GOOD_B, 1.0), {}, AdapterError, "floating-point"),
        ((GOOD_A[:0], GOOD_B[:, :0], 1.0), {}, AdapterError, "rank 0"),
        ((with_one(GOOD_A, math.nan), GOOD_B, 1.0), {}, AdapterError, "^A .* NaN or infinity"),
        ((GOOD_A, with_one(GOOD_B.float(), math.inf), 1.0), {}, AdapterError, "^B .* NaN or infinity"),
        ((GOOD_A, GOOD_B, 1.0), {"backend": "arpack"}, ConfigError, "unknown SVD backend 'arpack'"),
        ((GOOD_A, GOOD_B, 1.0), {"backend": "torch", "metric": "outputs", "S_A": S}, ConfigError, "'weights' only"),
    ],
)
def test_bad_spectra(args, kwargs, error, match):
    with pytest.raises(error, match=match):
        spectrum(*args, **kwargs)


def test_bad_cuts_and_sketches():
    spec = spectrum(GOOD_A, GOOD_B, 1.0)
    with pytest.raises(ConfigError, match="rank 0"):
        spec.cut(0)
    with pytest.raises(ConfigError, match="unknown gauge 'even'"):
        spec.cut(1, "even")
    with pytest.raises(ConfigError, match=r"\[5, 19\] does not fit A \[4, 20\]"):
        rows_from_sketch(1, GOOD_A, randn(5, 19))
    with pytest.raises(RankFlowError, match="NaN or infinity"):
        rows_from_sketch(1, GOOD_A, randn(5, 20) * NAN)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "match"),
    [
        ((GOOD_A, 5), {}, ConfigError, "5 directions of a 4 x 20"),
        ((GOOD_A, 0), {}, ConfigError, "0 directions"),
        ((GOOD_A[0], 1), {}, RankFlowError, r"\[20\]"),
        ((GOOD_A * NAN, 1), {}, RankFlowError, "NaN"),
        ((GOOD_A, 1, "full"), {}, ConfigError, "known: exact, torch, fbpca, sklearn"),
        ((GOOD_A, 1, "torch"), {"n_iter": -1}, ConfigError, "negative"),
    ],
)
def test_bad_low_rank(args, kwargs, error, match):
    with pytest.raises(error, match=match):
        low_rank(*args, **kwargs)

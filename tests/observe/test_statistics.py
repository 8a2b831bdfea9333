"""Averages carried through a resize, against averages of the same data taken after it, worked out token by token."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from rankflow.linalg.random import keyed_generator
from rankflow.observe.averages import Running
from rankflow.plans.ops import Drop, Grow, Keep, Op, Refactor, Train

IN, OUT, SCALING = 6, 5, 1.5


def normal(*shape: int, key: object = 0) -> Tensor:
    return torch.randn(*shape, generator=keyed_generator("statistics", key), dtype=torch.float64)


class Module:
    """Factors of one module, what is known of it, and since which step each direction has been measured."""

    def __init__(self, rank: int, decay: float = 1.0):
        self.A, self.B = normal(rank, IN, key="A"), normal(OUT, rank, key="B")
        self.running = Running.empty(rank)
        self.decay = decay
        self.data: list[tuple[Tensor, Tensor]] = []
        self.birth = [0] * rank

    def measure(self, tokens: int) -> None:
        x, g = normal(tokens, IN, key=("x", len(self.data))), normal(tokens, OUT, key=("g", len(self.data)))
        self.data.append((x, g))
        z, d = x @ self.A.T, SCALING * g @ self.B
        self.running = self.running.add(z.T @ z, d.T @ d, torch.tensor(float(tokens)), self.decay)

    def apply(self, op: Op) -> None:
        if isinstance(op, Keep):
            at = list(op.idx)
            self.A, self.B, self.birth = self.A[at], self.B[:, at], [self.birth[i] for i in at]
        elif isinstance(op, Refactor):
            self.A, self.B = op.N @ self.A, self.B @ op.M
            self.birth = [max(b for b, part in zip(self.birth, row, strict=True) if part) for row in op.N.tolist()]
        elif isinstance(op, Grow):
            self.A = torch.cat([self.A, normal(op.n, IN, key=("rows", len(self.data), len(self.A)))])
            self.B = torch.cat([self.B, normal(OUT, op.n, key=("columns", len(self.data), len(self.A)))], 1)
            self.birth += [len(self.data)] * op.n
        elif isinstance(op, Drop):
            self.A, self.B, self.birth = self.A[:0], self.B[:, :0], []
        self.running = self.running.after([op])

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """The class docstring's formula, pair by pair, for the factors as they are now."""
        r, last = len(self.A), len(self.data) - 1
        zz, dd, tokens = torch.zeros(r, r).double(), torch.zeros(r, r).double(), torch.zeros(r).double()
        for step, (x, g) in enumerate(self.data):
            there = torch.tensor([birth <= step for birth in self.birth], dtype=torch.float64)
            z, d = (x @ self.A.T) * there, SCALING * (g @ self.B) * there
            weight = self.decay ** (last - step)
            zz += weight * z.T @ z
            dd += weight * d.T @ d
            tokens += weight * len(x) * there
        norm = (tokens[:, None] * tokens).sqrt().clamp(min=1e-300)
        return zz / norm, dd / norm, tokens

    def check(self) -> None:
        zz, dd, tokens = self.expected()
        torch.testing.assert_close(self.running.measured, tokens, rtol=1e-12, atol=0)
        known = tokens > 0
        for mean, reference in ((self.running.mean_zz, zz), (self.running.mean_dd, dd)):
            assert mean.dtype == torch.float64
            mean, reference = mean[known][:, known], reference[known][:, known]
            assert torch.linalg.matrix_norm(mean - reference) <= 1e-10 * torch.linalg.matrix_norm(reference)


def mixing(k: int, r: int, key: object) -> Refactor:
    """Matrices without small entries: every old direction goes into every new one."""
    N, M = (normal(*shape, key=(key, name)) for shape, name in (((k, r), "N"), ((r, k), "M")))
    return Refactor(N.sign() * (0.1 + N.abs()), M.sign() * (0.1 + M.abs()))


@st.composite
def ops_from(draw: st.DrawFn, rank: int, mixed: bool, most: int = 5) -> list[Op]:
    """Ops that are legal one after the other from `rank`; without `mixed`, refactorisations stretch and reorder."""
    ops: list[Op] = []
    for i in range(draw(st.integers(1, most))):
        kind = draw(st.sampled_from(["keep", "refactor", "grow", "drop", "train"])) if rank else "grow"
        order = draw(st.permutations(range(rank)))
        if kind == "keep":
            ops.append(Keep(tuple(order[: draw(st.integers(1, rank))])))
        elif kind == "refactor" and mixed:
            ops.append(mixing(draw(st.integers(1, rank)), rank, i))
        elif kind == "refactor":
            stretch = draw(st.floats(0.2, 5)) * torch.eye(rank, dtype=torch.float64)
            ops.append(Refactor(stretch[list(order)], stretch[list(order)].T))
        elif kind == "grow":
            ops.append(Grow(draw(st.integers(1, 3))))
        else:
            ops.append(Drop() if kind == "drop" else Train(False))
        rank = ops[-1].rank_after(rank)
    return ops


# -- exactness --------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(1, 4), st.sampled_from([1.0, 0.7]))
def test_what_was_measured_before_a_resize_is_what_would_be_measured_after_it(data, rank, decay):
    module = Module(rank, decay)
    for tokens in (7, 30, 11):
        module.measure(tokens)
    for op in data.draw(ops_from(rank, mixed=True)):
        module.apply(op)
    module.check()


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(1, 4), st.sampled_from([1.0, 0.7]))
def test_measuring_goes_on_between_resizes(data, rank, decay):
    module = Module(rank, decay)
    for tokens in (12, 5, 40):
        module.measure(tokens)
        for op in data.draw(ops_from(rank, mixed=False, most=2)):
            module.apply(op)
        rank = len(module.A)
        module.check()
    module.measure(9)
    module.check()


def test_each_of_several_experts_goes_its_own_way():
    modules = [Module(3) for _ in range(2)]
    modules[1].A, modules[1].B = normal(3, IN, key="A1"), normal(OUT, 3, key="B1")
    for module in modules:
        module.measure(20)
    parts = [m.running for m in modules]
    both = Running(torch.stack([p.mean_zz for p in parts]), torch.stack([p.mean_dd for p in parts]), parts[0].measured)
    each = [mixing(2, 3, i) for i in range(2)]
    both = both.after([Refactor(torch.stack([op.N for op in each]), torch.stack([op.M for op in each])), Grow(1)])
    shared = mixing(2, 3, "shared")
    after = both.after([shared])
    for i, op in enumerate(each):
        alone = parts[i].after([op, Grow(1), shared])
        torch.testing.assert_close(after.mean_zz[i], alone.mean_zz, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(after.mean_dd[i], alone.mean_dd, rtol=1e-12, atol=1e-12)
        assert torch.equal(after.measured, alone.measured)
    assert Running.empty(3, (2,)).mean_dd.shape == (2, 3, 3)


# -- averages ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(1, 4))
def test_averages_are_positive_semidefinite_whatever_happens(data, rank):
    """And a pair never seems more correlated than 1, though its two directions rest on different tokens."""
    module = Module(rank, 0.8)
    for step in range(4):
        module.measure(1 + 3 * step)
        for op in data.draw(ops_from(rank, mixed=True, most=2)):
            module.apply(op)
        rank = len(module.A)
        for mean in (module.running.mean_zz, module.running.mean_dd):
            assert torch.equal(mean, mean.T) or torch.allclose(mean, mean.T, rtol=1e-12, atol=0)
            if rank:
                assert float(torch.linalg.eigvalsh(mean)[0]) >= -1e-12 * float(mean.trace())


def test_a_young_direction_has_its_own_mean_square_at_once_and_its_correlations_in_time():
    x, g = normal(50, IN, key="x"), normal(50, OUT, key="g")
    module = Module(2)

    def add(running: Running) -> Running:
        z, d = x @ module.A.T, SCALING * g @ module.B
        return running.add(z.T @ z, d.T @ d, torch.tensor(50.0), 0.9)

    for _ in range(30):
        module.running = add(module.running)
    module.apply(Grow(1))
    truth = (x @ module.A.T).T @ (x @ module.A.T) / 50
    shares = []
    for _ in range(60):
        module.running = add(module.running)
        zz = module.running.mean_zz
        torch.testing.assert_close(zz.diagonal(), truth.diagonal(), rtol=1e-10, atol=0)
        torch.testing.assert_close(zz[:2, :2], truth[:2, :2], rtol=1e-10, atol=0)
        share = zz[2, :2] / truth[2, :2]
        torch.testing.assert_close(share[0], share[1])
        shares.append(float(share[0]))
    assert shares == sorted(shares)
    assert shares[0] == pytest.approx(math.sqrt(1 / (10 * (1 - 0.9**31))))
    assert shares[-1] == pytest.approx(1, abs=1e-2)


def test_decay_says_what_older_tokens_count():
    squares = [torch.full((1, 1), v, dtype=torch.float64) for v in (4.0, 10.0)]
    first = Running.empty(1).add(squares[0], squares[1], torch.tensor(2.0), 0.5)
    both = first.add(squares[1], squares[0], torch.tensor(5.0), 0.5)
    assert float(first.mean_zz) == pytest.approx(4 / 2)
    assert float(both.measured) == 0.5 * 2 + 5
    assert float(both.mean_zz) == pytest.approx((0.5 * 4 + 10) / 6)
    assert float(both.mean_dd) == pytest.approx((0.5 * 10 + 4) / 6)
    assert float(first.add(squares[1], squares[0], torch.tensor(5.0), 0.0).mean_zz) == pytest.approx(10 / 5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["S_A", "S_B", "tokens"])
def test_sums_that_are_not_finite_or_of_no_token_change_nothing(which, bad):
    good = {"S_A": torch.eye(2).double(), "S_B": torch.eye(2).double(), "tokens": torch.tensor(3.0)}
    change = {which: torch.tensor(0.0) if which == "tokens" else good[which] * bad}
    for before in (Running.empty(2), Running.empty(2).add(**good)):
        after = before.add(**{**good, **change}, decay=0.5)
        assert all(torch.equal(after.tensors()[key], value) for key, value in before.tensors().items())


# -- counts -----------------------------------------------------------------------------------------------------------


def aged() -> Running:
    """Three directions, measured over 30, 20 and no tokens."""
    return Running(torch.eye(3).double(), torch.eye(3).double(), torch.tensor([30.0, 20.0, 0.0]).double())


def matrix(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(
    ("N", "M", "measured"),
    [
        (matrix([0, 2, 0], [3, 0, 0]), matrix([0, 1], [1, 0], [0, 0]), [20, 30]),  # nothing is mixed
        (matrix([1, 1, 0]), matrix([1], [1], [0]), [20]),  # the least measured of two
        (matrix([1, 0, 0]), matrix([1], [-1], [0]), [20]),  # that only B's half has both is enough
        (matrix([1, 1, 1], [1, 0, 0]), matrix([1, 1], [1, 0], [1, 0]), [0, 30]),  # row by row
        (matrix([1, 0, 1e-4]), matrix([1], [0], [1e-4]), [30]),  # not in earnest
        (matrix([1, 0, 1e-2]), matrix([1], [0], [0]), [0]),
        (matrix([1e-7, 0, 0]), matrix([1e7], [0], [0]), [30]),  # scale means nothing
        (matrix([1, 0, 0], [0, 1, 0]), matrix([1, 0], [0, 0], [0, 0]), [30, 0]),  # revived: its column of B is 0
        (matrix([1, 0, 0], [0, 0, 0]), matrix([1, 0], [0, 1], [0, 0]), [30, 0]),
        (torch.zeros(0, 3).double(), torch.zeros(3, 0).double(), []),
    ],
)
def test_a_mixed_direction_is_as_measured_as_the_least_that_goes_into_it(N, M, measured):
    after = aged().after([Refactor(N, M)])
    assert after.measured.tolist() == measured
    assert torch.equal(after.mean_zz, N @ N.T)
    assert torch.equal(after.mean_dd, M.T @ M)


def test_growth_and_a_return_from_rank_zero_start_unmeasured():
    grown = aged().after([Grow(2)])
    assert grown.measured.tolist() == [30, 20, 0, 0, 0]
    assert torch.equal(grown.mean_zz, torch.diag(torch.tensor([1.0, 1, 1, 0, 0]).double()))
    back = aged().after([Drop(), Train(True), Grow(2)])
    assert back.measured.tolist() == [0, 0]
    assert not back.mean_dd.any()
    assert aged().after([Drop()]).mean_zz.shape == (0, 0)


def test_the_plain_form_goes_through_a_file():
    running = aged().after([mixing(2, 3, 0)]).add(torch.eye(2), torch.eye(2), torch.tensor(4.0))
    again = Running(**load(save(running.tensors())))
    assert all(torch.equal(again.tensors()[key], value) for key, value in running.tensors().items())
    assert again.to("cpu").measured.tolist() == running.measured.tolist()

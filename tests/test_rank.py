"""Rank and low rank: exact elimination against known matrices, singular values against their definitions."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipeft import rank
from minipeft.backend import get_namespace, to_numpy

EPS = np.finfo(np.float64).eps


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


@st.composite
def products(draw):
    """(M, r): an integer matrix of rank exactly r, as L·R with unit triangular parts in L and R."""
    m, n = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    r = draw(st.integers(0, min(m, n)))
    entry = st.integers(-3, 3)
    L = [[1 if i == j else draw(entry) if i > j else 0 for j in range(r)] for i in range(m)]
    R = [[1 if i == j else draw(entry) if i < j else 0 for j in range(n)] for i in range(r)]
    return [[sum(L[i][k] * R[k][j] for k in range(r)) for j in range(n)] for i in range(m)], r


# --- exact ranks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("M", "expected"),
    [
        ([[0]], 0),
        ([[5]], 1),
        ([[1, 2], [2, 4]], 1),
        ([[1, 2], [3, 4]], 2),
        ([[0, 1], [1, 0]], 2),  # a zero where the first pivot would be
        ([[0, 0, 3], [0, 0, 5]], 1),
        ([[1, 2, 3], [4, 5, 6], [7, 8, 9]], 2),
        ([[1, 2, 3]], 1),
        ([[1], [2], [3]], 1),
        ([[Fraction(1, 3), Fraction(1, 2)], [Fraction(2, 3), 1]], 1),
        ([[Fraction(1, 3), Fraction(1, 2)], [Fraction(2, 3), Fraction(2, 1)]], 2),
        (((1, 0), (0, 1)), 2),
        (np.eye(4, dtype=int), 4),
        ([np.array([1, 2]), np.array([2, 4])], 1),
        ([], 0),
    ],
)
def test_exact_ranks_of_known_matrices(M, expected):
    assert rank.row_rank_exact(M) == expected
    assert rank.column_rank_exact(M) == expected


@given(products())
def test_row_rank_equals_column_rank_and_the_rank_a_product_was_made_with(case):
    M, r = case
    assert rank.row_rank_exact(M) == r
    assert rank.column_rank_exact(M) == r


@given(products(), st.integers(1, 9))
def test_exact_rank_is_untouched_by_row_operations_and_fractions(case, divisor):
    M, r = case
    M = [[Fraction(x, divisor) for x in row] for row in M]
    M.append([a + 2 * b for a, b in zip(M[0], M[-1], strict=True)])
    assert rank.row_rank_exact(M) == r


def test_exact_rank_tells_apart_what_floats_cannot():
    big = 10**17
    M = [[big, big + 1], [big + 1, big + 2]]  # determinant −1; as floats all four entries are equal
    assert rank.row_rank_exact(M) == 2
    assert rank.matrix_rank(np.array(M, dtype=float)) == 1


def test_exact_rank_of_machine_integers_does_not_overflow():
    big = np.int64(2**62)
    M = [[big, big - 1], [big - 1, big - 2]]
    assert rank.row_rank_exact(M) == 2
    assert rank.row_rank_exact(np.array(M)) == 2


def test_exact_rank_leaves_its_argument_as_it_was():
    M = [[1, 2], [3, 4]]
    rank.row_rank_exact(M)
    assert M == [[1, 2], [3, 4]]


def test_exact_rank_of_a_device_array(xp):
    assert rank.row_rank_exact(xp.asarray([[1, 2], [2, 4]])) == 1


@pytest.mark.parametrize("exact", [rank.row_rank_exact, rank.column_rank_exact])
@pytest.mark.parametrize(
    ("M", "error", "words"),
    [
        ([[1.0, 2.0]], TypeError, "float"),
        (np.ones((2, 2)), TypeError, "float"),
        ([["a"]], TypeError, "'a'"),
        ([[1, 2], [3]], ValueError, "rows of one length"),
        ([1, 2], ValueError, "expected a matrix"),
        (np.array([1, 2]), ValueError, "expected a matrix"),
        (np.array(3), ValueError, "expected a matrix"),
        (5, ValueError, "expected a matrix"),
        (None, ValueError, "expected a matrix"),
        (np.ones((1, 1, 1), dtype=int), TypeError, "list"),
    ],
)
def test_exact_rank_refuses_what_has_none(exact, M, error, words):
    with pytest.raises(error, match=words):
        exact(M)


# --- singular values --------------------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_truncated_svd_gives_orthonormal_factors_and_numpys_values(m, n, data):
    r = data.draw(st.integers(1, min(m, n)))
    W = gaussian(m, n, seed=10 * m + n)
    U, S, Vt = rank.truncated_svd(W, r)
    assert (U.shape, S.shape, Vt.shape) == ((m, r), (r,), (r, n))
    # 20 ε: orthonormality and values of an SVD of at most 9 × 9 are exact to a few ε
    np.testing.assert_allclose(U.T @ U, np.eye(r), atol=20 * EPS)
    np.testing.assert_allclose(Vt @ Vt.T, np.eye(r), atol=20 * EPS)
    np.testing.assert_allclose(S, np.linalg.svd(W, compute_uv=False)[:r], rtol=20 * EPS, atol=20 * EPS)
    np.testing.assert_allclose(W @ Vt.T, U * S, atol=100 * EPS)  # what a singular triple is


def test_truncated_svd_at_full_rank_gives_the_matrix_back(xp):
    W = xp.asarray(gaussian(5, 7))
    U, S, Vt = rank.truncated_svd(W, 5)
    assert get_namespace(U) is xp
    np.testing.assert_allclose(to_numpy((U * S) @ Vt), to_numpy(W), atol=100 * EPS)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dtype_and_library_are_kept(xp, dtype):
    W = xp.asarray(gaussian(6, 4).astype(dtype))
    for array in (*rank.truncated_svd(W, 2), rank.best_rank_r(W, 2), rank.singular_values(W)):
        assert get_namespace(array) is xp
        assert array.dtype == dtype
    for number in (rank.effective_rank(W), rank.stable_rank(W), rank.energy(W, 2)):
        assert type(number) is float
    assert type(rank.matrix_rank(W)) is int


@given(st.integers(2, 8), st.integers(2, 8), st.data())
def test_no_random_factors_come_nearer_than_the_best_rank_r(m, n, data):
    """Eckart–Young; the competitors get their optimal B for a random A, so they are as good as such factors can be."""
    r = data.draw(st.integers(1, min(m, n) - 1))
    W = gaussian(m, n, seed=m * n)
    best = rank.best_rank_r(W, r)
    error = np.linalg.norm(W - best)
    S = np.linalg.svd(W, compute_uv=False)
    np.testing.assert_allclose(error**2, (S[r:] ** 2).sum(), rtol=1e-12)  # squares of values exact to a few ε
    np.testing.assert_allclose(np.linalg.norm(W - best, 2), S[r], rtol=1e-12)
    for seed in range(5):
        A = gaussian(r, n, seed=seed)
        B = W @ np.linalg.pinv(A)
        assert np.linalg.norm(W - B @ A) >= error
        assert np.linalg.norm(W - B @ A, 2) >= S[r] * (1 - 1e-12)


def test_descent_from_the_best_rank_r_finds_nothing_nearer():
    W, r, rng = gaussian(8, 6), 2, np.random.default_rng(1)
    U, S, Vt = rank.truncated_svd(W, r)
    error = np.linalg.norm(W - rank.best_rank_r(W, r))
    for _ in range(200):
        B, A = U * S + 0.01 * rng.standard_normal(U.shape), Vt + 0.01 * rng.standard_normal(Vt.shape)
        assert np.linalg.norm(W - B @ A) > error


@given(products())
def test_matrix_rank_equals_the_exact_rank_of_integer_matrices(case):
    M, r = case
    assert rank.matrix_rank(np.array(M, dtype=float)) == r


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 8))
def test_matrix_rank_agrees_with_numpy(m, n, r):
    W = gaussian(m, min(r, m, n), seed=1) @ gaussian(min(r, m, n), n, seed=2)
    assert rank.matrix_rank(W) == np.linalg.matrix_rank(W) == min(r, m, n)


def test_matrix_rank_counts_what_is_above_the_tolerance():
    W = np.diag([1.0, 1e-3, 1e-6])
    assert [rank.matrix_rank(W, tol=t) for t in (2.0, 0.1, 1e-4, 1e-9)] == [0, 1, 2, 3]
    assert rank.matrix_rank(np.zeros((3, 3))) == 0
    for small, expected in ((1e-14, 2), (1e-16, 1)):  # left out, it is 2 · ε = 4.4e-16 here
        assert rank.matrix_rank(np.diag([1.0, small])) == expected


def test_a_low_rank_update_has_at_most_rank_r():
    W = gaussian(20, 3, seed=1) @ gaussian(3, 30, seed=2)
    assert rank.matrix_rank(W) == 3
    assert rank.matrix_rank(W.astype(np.float32)) == 3  # the tolerance grows with the dtype's ε


# --- measures of rank -------------------------------------------------------------------------------------------------

MEASURES = [rank.effective_rank, rank.stable_rank]


@pytest.mark.parametrize("measure", MEASURES)
def test_measures_are_one_for_rank_one_and_n_for_equal_singular_values(measure):
    assert measure(np.outer([1.0, 2, 3], [4.0, 5])) == pytest.approx(1, abs=1e-12)
    Q = np.linalg.qr(gaussian(5, 5))[0]
    assert measure(7 * Q) == pytest.approx(5, abs=1e-12)  # 1e-12: a few ε in each singular value
    assert measure(np.zeros((2, 3))) == 0


@pytest.mark.parametrize("measure", MEASURES)
@given(m=st.integers(1, 7), n=st.integers(1, 7), scale=st.sampled_from([1e-200, 1e-3, 1.0, 1e5, 1e200]))
def test_measures_lie_between_one_and_the_rank_and_do_not_see_scale_or_transposition(measure, m, n, scale):
    W = gaussian(m, n, seed=7 * m + n)
    value = measure(W)
    assert 1 - 1e-12 <= value <= min(m, n) + 1e-12
    assert measure(W * scale) == pytest.approx(value, rel=1e-10)
    assert measure(W.T) == pytest.approx(value, rel=1e-10)


def test_effective_rank_is_the_exponential_of_the_entropy_of_the_spectrum():
    W = np.diag([4.0, 2.0, 1.0, 1.0])
    p = np.array([4, 2, 1, 1]) / 8
    assert rank.effective_rank(W) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-14)


def test_stable_rank_is_the_ratio_of_norms():
    W = gaussian(6, 4)
    expected = np.linalg.norm(W) ** 2 / np.linalg.norm(W, 2) ** 2
    assert rank.stable_rank(W) == pytest.approx(expected, rel=1e-13)


def test_stable_rank_hardly_sees_tiny_singular_values_that_the_rank_counts():
    W = np.diag([1.0, 1e-6, 1e-6, 1e-6])
    assert rank.matrix_rank(W) == 4
    assert rank.stable_rank(W) == pytest.approx(1, abs=1e-11)


def test_singular_values_too_small_to_have_a_share_do_not_spoil_the_entropy():
    assert rank.effective_rank(np.diag([1e200, 1e-200])) == pytest.approx(1)


@given(st.integers(1, 7), st.integers(1, 7))
def test_energy_grows_to_one_and_is_what_the_best_approximation_keeps(m, n):
    W = gaussian(m, n, seed=m + 9 * n)
    shares = [rank.energy(W, r) for r in range(1, min(m, n) + 1)]
    assert all(0 < a <= b for a, b in itertools.pairwise(shares))
    assert shares[-1] == pytest.approx(1, abs=1e-14)
    for r, share in enumerate(shares, start=1):
        kept = (np.linalg.norm(rank.best_rank_r(W, r)) / np.linalg.norm(W)) ** 2
        assert share == pytest.approx(kept, rel=1e-12)


def test_energy_of_zeros_is_one_and_scale_does_not_matter():
    W = gaussian(4, 4)
    assert rank.energy(np.zeros((2, 2)), 1) == 1
    for scale in (1e-200, 1e200):  # whose squares leave float64's range
        assert rank.energy(W * scale, 2) == pytest.approx(rank.energy(W, 2), rel=1e-10)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_dtypes_that_lapack_does_not_have_are_widened(dtype):
    W = (8 * gaussian(6, 4)).astype(dtype)
    exact = W.astype("float64")
    assert rank.effective_rank(W) == pytest.approx(rank.effective_rank(exact), rel=1e-5)
    assert rank.matrix_rank(W) == 4
    np.testing.assert_allclose(rank.best_rank_r(W, 2), rank.best_rank_r(exact, 2), atol=1e-4)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [0, -1, 4])
@pytest.mark.parametrize("function", [rank.truncated_svd, rank.best_rank_r, rank.energy])
def test_a_rank_that_the_matrix_cannot_have_is_refused(function, r):
    with pytest.raises(ValueError, match=rf"r: got {r}; .*1 to 3 is accepted"):
        function(np.ones((3, 5)), r)


@pytest.mark.parametrize("r", [1.5, "2", None, True])
@pytest.mark.parametrize("function", [rank.truncated_svd, rank.best_rank_r, rank.energy])
def test_a_rank_that_is_no_integer_is_refused(function, r):
    with pytest.raises(TypeError, match="r: expected an int"):
        function(np.ones((3, 5)), r)


@pytest.mark.parametrize("W", [np.ones(3), np.ones((2, 2, 2)), np.float64(3), np.ones((0, 3)), [[1.0]]])
@pytest.mark.parametrize(
    "function",
    [
        lambda W: rank.truncated_svd(W, 1),
        lambda W: rank.best_rank_r(W, 1),
        lambda W: rank.energy(W, 1),
        rank.matrix_rank,
        rank.effective_rank,
        rank.stable_rank,
        rank.singular_values,
    ],
)
def test_what_is_no_matrix_is_refused(function, W):
    with pytest.raises(ValueError, match="W: expected a matrix"):
        function(W)


@pytest.mark.parametrize("function", [lambda W: rank.best_rank_r(W, 1), rank.matrix_rank, rank.effective_rank])
def test_numbers_that_are_not_finite_or_not_real_are_refused(function):
    for value in (np.inf, np.nan):  # LAPACK's singular values of a matrix with infinity are NaN: a rank of 0
        with pytest.raises(ValueError, match="W: it has numbers that are not finite"):
            function(np.array([[1.0, value], [2.0, 3.0]]))
    for W in (np.eye(2, dtype=complex), np.array([["a"]])):
        with pytest.raises(TypeError, match="W: expected real numbers, got dtype"):
            function(W)

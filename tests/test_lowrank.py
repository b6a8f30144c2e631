"""What adapters add to a linear, compiled, against NumPy's products."""

import numpy as np
import pytest

from edgeq.kernels import backend

RNG = np.random.default_rng(0)


def stacked(heights, ranks, cols):
    """A (r, cols) and B (rows, r) of pairs of matrices that are stacked; rank 0 for one without a pair."""
    b, row, col = np.zeros((sum(heights), sum(ranks)), np.float32), 0, 0
    for height, rank in zip(heights, ranks, strict=True):
        b[row : row + height, col : col + rank] = RNG.standard_normal((height, rank))
        row, col = row + height, col + rank
    return RNG.standard_normal((sum(ranks), cols)).astype(np.float32), b


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    ("heights", "ranks", "cols"),
    [
        ((64,), (16,), 96),
        ((576, 192, 192), (16, 16, 16), 576),
        ((64, 48, 32), (5, 0, 3), 33),
        ((8, 24), (2, 40), 64),
        ((10, 7), (1, 2), 20),
        ((2048,), (64,), 1536),
    ],
)
def test_pairs_are_added(heights, ranks, cols, n, threads):
    a, b = stacked(heights, ranks, cols)
    x = RNG.standard_normal((n, cols)).astype(np.float32)
    y = RNG.standard_normal((n, len(b))).astype(np.float32)
    expected = backend("numpy").low_rank(a, b)(x, y)
    ops = backend("numba")
    f = ops.low_rank(a, b)
    for _ in range(20):  # a token's is one job, whose threads wait for each other
        with ops.computing(threads):
            found = f(x, y.copy())
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("tall", [1e-6, 1.0, 1e9])
def test_pairs_of_any_height_are_as_exact(tall):
    a, b = stacked((64,), (4,), 64)
    x, y = RNG.standard_normal((1, 64)).astype(np.float32), np.zeros((1, 64), np.float32)
    found = backend("numba").low_rank(a * np.float32(tall), b / np.float32(tall))(x, y.copy())
    expected = x @ a.T @ b.T
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 * np.abs(expected).max())


def test_an_adapter_that_learned_nothing_adds_nothing():
    a, b = stacked((64,), (4,), 64)
    x, y = RNG.standard_normal((2, 1, 64)).astype(np.float32)
    np.testing.assert_array_equal(backend("numba").low_rank(a, 0 * b)(x, y.copy()), y)

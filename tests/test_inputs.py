"""Inputs that are rounded as a file says: by definition, and the same in both backends, for any number of
tokens.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import random_tensor

from edgeq import formats, kernels
from edgeq.inputs import Inputs, rounded
from edgeq.kernels import numba_backend
from edgeq.kernels.lanes import RUN

SHARES = [Inputs("tensor", 0.02), Inputs("tensor", 0.03, -77), Inputs("tensor", 1e-3, 127)]
SHARES += [Inputs("token"), Inputs("block")]


def test_by_hand():
    x = np.array([[1.0, -0.25, 0.5, 9.0], [0, 0, 0, 0]], np.float32)
    # scale 0.5, zero 2: codes 4, 2 (1.5 to even), 3, 20
    np.testing.assert_array_equal(rounded(x, Inputs("tensor", 0.5, 2)), [[1, 0, 0.5, 9], [0, 0, 0, 0]])
    # beyond the codes: 127 * 0.05, and (127 + 100) * 0.05 with a zero point of -100
    np.testing.assert_allclose(rounded(x, Inputs("tensor", 0.05))[0, 3], 6.35)
    np.testing.assert_allclose(rounded(-x, Inputs("tensor", 0.05))[0, 3], -6.4)
    np.testing.assert_allclose(rounded(x, Inputs("tensor", 0.05, -100))[0, 3], 9)
    # 9 / 127 is the step of the first token; the second has none
    step = 9 / 127
    np.testing.assert_allclose(rounded(x, Inputs("token")), [[14 * step, -4 * step, 7 * step, 9], [0] * 4])
    assert rounded(x, None) is x


def test_blocks_are_of_32():
    x = np.random.default_rng(0).standard_normal((3, 80)).astype(np.float32)
    pieces = [rounded(x[:, at : at + 32], Inputs("token")) for at in (0, 32, 64)]
    np.testing.assert_array_equal(rounded(x, Inputs("block")), np.concatenate(pieces, axis=1))


@settings(deadline=None, max_examples=40)
@given(
    inputs=st.sampled_from(SHARES),
    name=st.sampled_from(["i8", "q4_1"]),
    rows=st.integers(1, 70),
    cols=st.integers(1, 300),
    n=st.sampled_from([1, 2, 9, 40]),
    seed=st.integers(0, 2**32 - 1),
)
def test_backends_agree(inputs, name, rows, cols, n, seed):
    """To float32's precision: the codes are the same, and their sums are exact."""
    rng = np.random.default_rng(seed)
    tensor = random_tensor(name, rows, cols, rng)._replace(inputs=inputs)
    x = rng.standard_normal((n, tensor.cols)).astype(np.float32)
    bias = rng.standard_normal(rows).astype(np.float32)
    got = numba_backend.linear([tensor], bias)(x)
    w = formats.dequantize(tensor).astype(np.float64)
    want = rounded(x, inputs).astype(np.float64) @ w.T + bias
    size = np.abs(rounded(x, inputs)).astype(np.float64) @ np.abs(w).T + abs(inputs.zero * inputs.scale)
    assert np.all(np.abs(got - want) <= 8e-6 * (size + np.abs(w).sum(axis=1) + 1))


@pytest.mark.parametrize("n", [1, 5, 33])
def test_a_row_of_many_columns_is_one_integer_sum(n):
    """With one scale for a matrix, and whole numbers for scales, float32 has no rounding to do."""
    rng = np.random.default_rng(1)
    tensor = random_tensor("i8", 48, 1536, rng)
    tensor = tensor._replace(parts={"scale": np.ones(48, np.float32)}, inputs=Inputs("tensor", 1.0))
    x = rng.integers(-127, 128, (n, 1536)).astype(np.float32)
    exact = x.astype(np.int64) @ tensor.data.view(np.int8).reshape(48, 1536).astype(np.int64).T
    assert np.abs(exact).max() < 2**24
    for backend in kernels.BACKENDS:
        np.testing.assert_array_equal(kernels.backend(backend).linear([tensor])(x), exact)


def test_stacked_matrices_with_inputs_of_their_own():
    rng = np.random.default_rng(2)
    tensors = [random_tensor("i8", rows, 96, rng) for rows in (32, 16, 20, 16)]
    kinds = [SHARES[0], SHARES[0], SHARES[1], None]
    tensors = [t._replace(inputs=inputs) for t, inputs in zip(tensors, kinds, strict=True)]
    x = rng.standard_normal((3, 96)).astype(np.float32)
    for backend in kernels.BACKENDS:
        ops = kernels.backend(backend)
        alone = np.concatenate([ops.linear([t])(x) for t in tensors], axis=1)
        np.testing.assert_allclose(ops.linear(tensors)(x), alone, rtol=1e-6, atol=1e-6)
    assert len(numba_backend.linear(tensors).products) == 3


@pytest.mark.parametrize("inputs", SHARES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("backend", kernels.BACKENDS)
@pytest.mark.parametrize("n", [1, 40])
def test_no_plausible_number_comes_of_one_that_is_none(inputs, bad, backend, n):
    rng = np.random.default_rng(8)
    x = rng.standard_normal((n, 256)).astype(np.float32)
    x[-1, 100] = bad
    tensor = random_tensor("i8", 20, 256, rng)._replace(inputs=inputs)
    y = kernels.backend(backend).linear([tensor])(x)
    assert np.isfinite(y[:-1]).all()
    assert not np.isfinite(y[-1]).any()


def test_a_part_of_a_matrix_keeps_them():
    tensor = random_tensor("i8", 8, RUN, np.random.default_rng(0))._replace(inputs=SHARES[1])
    assert formats.take(tensor, np.arange(3)).inputs == SHARES[1]

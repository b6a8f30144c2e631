"""Products of floats on the matrix unit: near those of float64, and the same for any number of threads."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq.kernels import pool, simd

if not simd.PATH.amx:
    pytest.skip("needs a matrix unit", allow_module_level=True)

from edgeq.kernels import product

SIZES = st.integers(32, 300)


@settings(deadline=None, max_examples=60)
@given(SIZES, SIZES, st.integers(32, 1500), st.booleans(), st.booleans(), st.integers(0, 2**32 - 1))
def test_products_of_any_size_and_layout(m, n, inner, turned_a, turned_b, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((m, inner), np.float32), rng.standard_normal((inner, n), np.float32)
    expected = a.astype(np.float64) @ b
    a = np.asfortranarray(a) if turned_a else a
    b = np.asfortranarray(b) if turned_b else b
    found = []
    for threads in (1, 2, 3):
        with pool.computing(threads):
            found.append(product.dot(a, b).copy())
    # each product of two numbers is wrong by 2⁻¹⁶ of it at most
    most = np.abs(a).astype(np.float64) @ np.abs(b) * 2.0**-15
    assert (np.abs(found[0] - expected) <= most).all()
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


@settings(deadline=None, max_examples=20)
@given(st.integers(128, 1500), st.integers(130, 300), st.integers(0, 2**32 - 1))
def test_a_matrix_and_its_transpose(rows, cols, seed):
    x = np.random.default_rng(seed).standard_normal((rows, cols), np.float32)
    with pool.computing(2):
        whole = product.dot(x.T, x.copy()).copy()
        half = product.dot(x.T, x).copy()
    np.testing.assert_array_equal(half, half.T)
    upper = np.triu_indices(cols)
    np.testing.assert_array_equal(half[upper], whole[upper])


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 1500), st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_inputs_rounded_for_their_gram_matrix(rows, cols, seed):
    x = np.random.default_rng(seed).standard_normal((rows, cols), np.float32)
    x[:: max(1, rows // 3), :: max(1, cols // 2)] *= 1e4  # inputs that stand out, as models have them
    found = []
    for threads in (1, 2, 3):
        with pool.computing(threads):
            found.append(product.gram(x).copy())
    np.testing.assert_array_equal(found[0], found[0].T)
    # rounding to 8 bits moves a number by 2⁻⁸ of it, and a product by twice that
    most = np.abs(x).T.astype(np.float64) @ np.abs(x) * 2.0**-6.99
    assert (np.abs(found[0] - x.T.astype(np.float64) @ x) <= most).all()
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


def test_parts_of_arrays_and_small_ones():
    x = np.random.default_rng(0).standard_normal((200, 700), np.float32)
    with pool.computing(2):
        for a, b in [(x[::2, 10:600], x[:100, 10:600].T), (x[:3], x.T), (x[:, :0], x[:, :0].T)]:
            np.testing.assert_allclose(product.dot(a, b), a @ b, rtol=3e-5, atol=2e-3)

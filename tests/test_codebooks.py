"""Products with matrices in AQLM, compiled, against their weights: odd sizes, any codebooks, any threads."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq import formats
from edgeq.kernels import numba_backend, numpy_backend, pool
from edgeq.kernels.program import Program
from edgeq.tensor import Tensor

aqlm = formats.get("aqlm")
SCHEMES = [
    (1, 8, 8),
    (2, 8, 8),
    (3, 8, 8),
    (8, 8, 32),
    (1, 16, 8),
    (2, 5, 4),
    (1, 3, 7),
    (1, 10, 12),
    (2, 9, 1),
]


def random_tensor(rows: int, groups: int, scheme: tuple[int, int, int], rng: np.random.Generator) -> Tensor:
    """A matrix (rows, groups * group)."""
    count, bits, group = scheme
    return aqlm.pack(
        rng.integers(0, 1 << bits, (rows, groups, count)),
        rng.standard_normal((count, 1 << bits, group)).astype(rng.choice([np.float16, np.float32])),
        rng.random(rows).astype(np.float16),
    )


def check(tensors: list[Tensor], x: np.ndarray, threads: int = 1, bias: np.ndarray | None = None) -> None:
    """The compiled product agrees with float64."""
    w = np.concatenate([formats.dequantize(t) for t in tensors]).astype(np.float64)
    with pool.computing(threads):
        got = numba_backend.linear(tensors, bias)(x)
    want = x @ w.T + (0 if bias is None else bias)
    size = np.abs(x) @ np.abs(w).T
    assert got.shape == want.shape
    assert got.dtype == np.float32
    assert (np.abs(got - want) <= 3e-6 * (size + size.mean()) + 1e-30).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 8, 9, 40, 200])
def test_product(scheme, n):
    rng = np.random.default_rng(n)
    for rows, groups in ((40, 64), (1, 1), (17, 33)):
        tensor = random_tensor(rows, groups, scheme, rng)
        check([tensor], rng.standard_normal((n, tensor.cols)).astype(np.float32))


@settings(max_examples=40)
@given(
    scheme=st.sampled_from(SCHEMES),
    rows=st.integers(1, 70),
    groups=st.integers(1, 40),
    n=st.sampled_from([1, 1, 3, 12]),
    seed=st.integers(0, 2**32 - 1),
    threads=st.integers(1, 4),
)
def test_odd_sizes(scheme, rows, groups, n, seed, threads):
    rng = np.random.default_rng(seed)
    tensor = random_tensor(rows, groups, scheme, rng)
    check([tensor], rng.standard_normal((n, tensor.cols)).astype(np.float32), threads)


def test_codes_at_the_ends_of_codebooks():
    rng = np.random.default_rng(0)
    for scheme in SCHEMES:
        tensor = random_tensor(16, 40, scheme, rng)
        codes = aqlm.codes(tensor)
        for code in (0, (1 << scheme[1]) - 1):
            codes[:] = code
            check([tensor], rng.standard_normal((1, tensor.cols)).astype(np.float32))
            check([tensor], rng.standard_normal((12, tensor.cols)).astype(np.float32))


@pytest.mark.parametrize("n", [1, 12])
def test_matrices_side_by_side(n):
    """Each has its own codebooks, one is of another format, and heights are no sixteens."""
    rng = np.random.default_rng(n)
    parts = [random_tensor(rows, 16, (2, 8, 8), rng) for rows in (33, 16, 7)]
    floats = rng.standard_normal((20, 128)).astype(np.float32)
    parts.insert(1, Tensor("", "f32", floats.shape, floats.reshape(-1).view(np.uint8)))
    x = rng.standard_normal((n, 128)).astype(np.float32)
    check(parts, x, 2)
    check(parts, x, 2, rng.standard_normal(76).astype(np.float32))


@pytest.mark.parametrize("scheme", [(2, 8, 8), (1, 16, 8)], ids=str)
def test_no_data_race(scheme):
    """Large enough for threads to overlap: the same bits twenty times, with one thread or with all."""
    rng = np.random.default_rng(0)
    tensor = random_tensor(1024, 4096 // 8, scheme, rng)
    linear = numba_backend.linear([tensor])
    x = rng.standard_normal((1, 4096)).astype(np.float32)
    with pool.computing(1):
        want = linear(x).copy()
    np.testing.assert_allclose(want, x @ formats.dequantize(tensor).T, rtol=1e-3, atol=1e-2)
    with pool.computing(4):
        for _ in range(20):
            assert np.array_equal(linear(x), want)


@pytest.mark.parametrize("scheme", [(2, 8, 8), (1, 16, 8)], ids=str)
def test_calls_that_are_recorded(scheme):
    rng = np.random.default_rng(0)
    linear = numba_backend.linear([random_tensor(48, 16, scheme, rng)])
    for n in (1, 3):
        x = rng.standard_normal((2, n, 128)).astype(np.float32)
        program = Program(linear, x[0])
        np.testing.assert_array_equal(program(x[1]), linear(x[1]))


def test_codes_that_name_no_row_are_refused():
    tensor = random_tensor(4, 4, (2, 5, 8), np.random.default_rng(0))
    tensor.data[3] = 32
    with pytest.raises(ValueError, match="codes up to 32, the codebooks have 32 rows"):
        numba_backend.linear([tensor])


def test_rows_that_are_taken():
    tensor = random_tensor(9, 4, (2, 8, 8), np.random.default_rng(0))
    rows = np.array([3, 0, 8, 3])
    taken = formats.take(tensor, rows)
    np.testing.assert_array_equal(formats.dequantize(taken), formats.dequantize(tensor)[rows])
    np.testing.assert_array_equal(formats.dequantize(tensor, 2, 5), formats.dequantize(tensor)[2:5])
    np.testing.assert_array_equal(
        numba_backend.embedding(tensor)(rows), numpy_backend.embedding(tensor)(rows)
    )


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_weights_by_definition(scheme):
    tensor = random_tensor(5, 3, scheme, np.random.default_rng(0))
    assert aqlm.scheme(tensor) == scheme
    codes, group = aqlm.codes(tensor), scheme[2]
    books, scale = (tensor.parts[key].astype(np.float64) for key in ("codebooks", "scale"))
    want = np.zeros(tensor.shape)
    for row, j, m in np.ndindex(codes.shape):
        want[row, j * group : (j + 1) * group] += scale[row] * books[m, codes[row, j, m]]
    np.testing.assert_allclose(formats.dequantize(tensor), want, rtol=1e-5, atol=1e-5)
    assert formats.unpack(tensor)[1] is None

"""GPTQ against the paper's equations in torch (tools/make_gptq_goldens.py) and against OBQ, on every grid."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from edgeq import formats, ranges
from edgeq.grid import decode, encode
from edgeq.quantizers.gptq import gptq, inverse_root
from edgeq.quantizers.objective import damped, error, toward
from edgeq.quantizers.obq import obq
from edgeq.quantizers.target import target as grids

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "gptq.npz"))
CASES = [key.removeprefix("codes-") for key in GOLDEN if key.startswith("codes-")]
target = partial(grids, compiled=False)


def layer(rows=8, cols=256, tokens=700, seed=0):
    """Weights, and XXᵀ of inputs that depend on each other and are not equally large."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, cols)) @ (
        rng.standard_normal((cols, cols)) / np.sqrt(cols) + np.eye(cols) / 2
    )
    x *= np.exp(rng.standard_normal(cols))
    return rng.standard_normal((rows, cols)).astype(np.float32) / 20, (x.T @ x).astype(np.float32)


SCALAR = [
    *[(name, {}) for name in formats.names() if hasattr(formats.get(name), "SPACE")],
    *[(name, {}) for name in ("iq4_nl", "iq4_xs", "mxfp4", "tq1_0", "tq2_0")],
    *[
        (f"i{bits}", {"per": per, "symmetric": symmetric})
        for bits in (2, 3, 4, 8)
        for per in (32, 64, 128, "row")
        for symmetric in (True, False)
    ],
]
SCALAR = [case for n, case in enumerate(SCALAR) if case not in SCALAR[:n]]
ids = [f"{name}-{'-'.join(map(str, o.values()))}" if o else name for name, o in SCALAR]


@pytest.mark.parametrize("case", CASES)
def test_the_equations_in_torch_give_the_same(case):
    bits, group, kind = case.split("-")
    w, h = GOLDEN["w"], GOLDEN["h"]
    to = target(f"i{bits}", w.shape[1], per=int(group), symmetric=kind == "sym", choose=ranges.minmax)
    codes, grid = gptq(w, h, to)
    assert error(w, decode(codes, grid), h) == pytest.approx(GOLDEN[f"error-{case}"].item(), rel=1e-4)
    assert (codes != GOLDEN[f"codes-{case}"]).mean() < 0.002  # ties, which float32 grids decide


@pytest.mark.parametrize(("name", "options"), SCALAR, ids=ids)
def test_better_than_rounding_on_every_grid(name, options):
    w, h = layer()
    to = target(name, w.shape[1], **options)
    grid = to.fit(w, np.diagonal(h))
    rounded = error(w, decode(encode(w, grid), grid), h)
    for order, static in ((None, False), ("columns", True), ("groups", False)):
        codes, grid = gptq(w, h, to, order=order, static=static)
        assert error(w, decode(codes, grid), h) < 0.9 * rounded
        # what a file keeps of it is all of it
        packed = formats.pack(name, codes, grid)
        np.testing.assert_array_equal(formats.dequantize(packed), decode(codes, grid))


@pytest.mark.parametrize(("name", "options"), [("q4_1", {}), ("q3_k", {}), ("i4", {"per": 64}), ("i3", {})])
@pytest.mark.parametrize("order", [None, "columns", "groups"])
def test_bytes_do_not_depend_on_the_block_size(name, options, order):
    w, h = layer(rows=16, cols=512, seed=1)
    to = target(name, 512, **options)
    codes, grid = gptq(w, h, to, order=order)
    for block in (1, 7, 32, 512):
        other, other_grid = gptq(w, h, to, order=order, block=block)
        np.testing.assert_array_equal(codes, other)
        for a, b in zip(grid, other_grid, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("name", "options"), [("q4_k", {}), ("i3", {"per": 32, "symmetric": False}), ("i8", {"per": "tensor"})]
)
def test_bytes_do_not_depend_on_the_threads(name, options):
    w, h = layer(rows=1100, seed=2)
    to = grids(name, 256, **options)
    codes, grid = gptq(w, h, to, sweeps=1, threads=1)
    other, other_grid = gptq(w, h, to, sweeps=1, threads=3)
    np.testing.assert_array_equal(codes, other)
    for a, b in zip(grid, other_grid, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("name", "options"), [("q4_0", {}), ("q4_1", {}), ("i2", {"per": 16, "symmetric": False})]
)
@pytest.mark.parametrize("seed", range(4))
def test_obq_in_a_fixed_order_is_gptq(name, options, seed):
    w, h = layer(rows=6, cols=64, seed=seed)
    to = target(name, 64, **options)
    by_columns = np.argsort(-np.diagonal(damped(h, 0.01)), kind="stable")
    for order, columns in ((None, range(64)), ("columns", by_columns.tolist())):
        codes, grid = gptq(w, h, to, order=order, static=True)
        other, other_grid = obq(w, h, to, order=columns)
        if order:  # the grids of both are fit with the inputs' squares
            np.testing.assert_array_equal(grid.scale, other_grid.scale)
        np.testing.assert_array_equal(codes, other)


def test_obq_greedily():
    """By hand: of two weights the one is rounded that costs less, and the other makes up for it."""
    h = np.array([[1.0, 0.5], [0.5, 1.0]])
    to = target("i4", 2)
    w = np.array([[7.0, 2.4]], np.float32)  # steps of 1; the first is on the grid
    codes, _ = obq(w, h, to, damp=0)
    assert (codes.astype(int) - 8).tolist() == [[7, 2]]
    w = np.array([[7.0, -7.0, 1.4, 1.45]], np.float32)
    h = np.eye(4)
    h[2, 3] = h[3, 2] = 0.9
    # 1.4 costs less than 1.45; its error of 0.4 adds 0.9 * 0.4 to the other, 1.81
    codes, _ = obq(w, h, target("i4", 4), damp=0)
    assert (codes.astype(int) - 8).tolist() == [[7, -7, 1, 2]]


def by_definition(w, h, values):
    """OBQ of one row without its recursions: of all weights that are left the one is rounded whose rounding
    lets the others, chosen by linear equations, keep the error of the row least.
    """
    fixed, current, original = {}, w.copy(), w.copy()

    def answer(fixed):
        """The best weights when some are fixed, and their error."""
        best, free = original.copy(), [i for i in range(len(w)) if i not in fixed]
        held = list(fixed)
        best[held] = [fixed[i] for i in held]
        e = (best - original)[held]
        if free:
            best[free] -= np.linalg.solve(h[np.ix_(free, free)], h[np.ix_(free, held)] @ e)
        return best, (best - original) @ h @ (best - original)

    while len(fixed) < len(w):
        rounded = {i: values[np.abs(values - current[i]).argmin()] for i in range(len(w)) if i not in fixed}
        step = values[1] - values[0]
        beyond = {i: abs(v - current[i]) for i, v in rounded.items() if abs(v - current[i]) > 0.50001 * step}
        if beyond:
            p = max(beyond, key=beyond.get)
        else:
            p = min(rounded, key=lambda i: answer(fixed | {i: rounded[i]})[1])
        fixed[p] = rounded[p]
        current, _ = answer(fixed)
    return current


@pytest.mark.parametrize("seed", range(6))
def test_obq_is_what_it_is_defined_to_be(seed):
    w, h = layer(rows=3, cols=16, seed=seed)
    codes, grid = obq(w, h, target("i3", 16))
    values = np.arange(-4, 4) * grid.scale.astype(np.float64)
    for row, expected, steps in zip(decode(codes, grid), w.astype(np.float64), values, strict=True):
        np.testing.assert_allclose(row, by_definition(expected, damped(h, 0.01), steps), rtol=1e-5, atol=1e-7)


def test_root_of_the_inverse():
    _, h = layer()
    h = damped(h, 0.01)
    u = inverse_root(h, 0.01)
    np.testing.assert_allclose(u.T @ u @ h, np.eye(len(h)), atol=1e-9)
    assert (np.tril(u, -1) == 0).all()
    np.testing.assert_allclose(u, np.linalg.cholesky(np.linalg.inv(h)).T, rtol=1e-7, atol=1e-12)


def test_inputs_that_were_always_zero():
    w, h = layer(cols=64)
    h[[3, 40]] = 0
    h[:, [3, 40]] = 0
    to = target("q8_0", 64)
    codes, grid = gptq(w, h, to)
    coded = decode(codes, grid)
    np.testing.assert_allclose(coded[:, [3, 40]], w[:, [3, 40]], atol=np.abs(w).max() / 100)
    # the other columns neither give them anything nor take from them
    w[:, 3] *= 0.5
    other = decode(*gptq(w, h, to, static=True))
    kept = np.delete(np.arange(64), [3, 40])
    np.testing.assert_allclose(other[:, kept], coded[:, kept], atol=np.abs(w).max() / 60)


def test_unsound_input():
    w, h = layer(cols=64)
    to = target("q4_0", 64)
    with pytest.raises(ValueError, match="all inputs were zero"):
        gptq(w, np.zeros_like(h), to)
    with pytest.raises(ValueError, match="no finite numbers, or negative squares"):
        gptq(w, np.where(h == h[0, 0], np.nan, h), to)
    x = np.ones((3, 64))
    with pytest.raises(ValueError, match="not positive definite with damping 0: .* more text, or damp more"):
        gptq(w, -1e-3 * np.eye(64) + x.T @ x, to, damp=0)
    with pytest.raises(ValueError, match="square"):
        gptq(w, h[:3], to)
    with pytest.raises(ValueError, match="unknown order"):
        gptq(w, h, to, order="rows")
    with pytest.raises(ValueError, match="weights that are no finite numbers"):
        gptq(w * np.inf, h, to)
    with pytest.raises(ValueError, match="60 columns, q4_0 needs a multiple of 32"):
        target("q4_0", 60)
    with pytest.raises(ValueError, match="64 columns are no whole groups of 48"):
        target("i4", 64, per=48)
    with pytest.raises(ValueError, match="f16 has no grid"):
        target("f16", 64)


def test_compiled_fits_are_the_same():
    w, h = layer(rows=20)
    for name in ("q4_0", "q4_1", "q4_k", "q6_k", "iq4_nl", "i3"):
        slow, fast = (gptq(w, h, grids(name, 256, compiled=compiled)) for compiled in (False, True))
        np.testing.assert_array_equal(slow[0], fast[0])
        for importance in (None, np.diagonal(h)):
            a, b = (grids(name, 256, compiled=c).fit(w, importance) for c in (False, True))
            for x, y in zip(a, b, strict=True):
                np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in ("q4_0", "q4_1", "q3_k", "q4_k", "q6_k", "iq4_nl", "mxfp4")),
        *(("i3", {"per": 64, "symmetric": s}) for s in (True, False)),
        ("i8", {"symmetric": False}),
    ],
)
def test_descent_never_rises(name, options):
    w, h = layer(rows=12)
    whole, errors = damped(h, 0.01), []
    for sweeps in range(4):
        for compiled in (False, True):
            to = grids(name, 256, compiled=compiled, **options)
            codes, grid = gptq(w, h, to, sweeps=sweeps)
            errors.append(error(w, decode(codes, grid), whole))
            packed = formats.pack(name, codes, grid)
            np.testing.assert_array_equal(formats.dequantize(packed), decode(codes, grid))
        assert errors[-1] == errors[-2]
    assert (np.diff(errors[::2]) <= 1e-9).all()
    assert errors[-1] < 0.99 * errors[0]


def test_where_descent_ends_no_single_code_is_better():
    w, h = layer(rows=2, cols=64)
    to = target("q4_0", 64)
    codes, grid = gptq(w, h, to, sweeps=40)
    whole = damped(h, 0.01)
    coded = decode(codes, grid)
    least = np.einsum("ri,ij,rj->r", w - coded, whole, w - coded)
    for column in range(64):
        for other in range(16):
            changed = codes.copy()
            changed[:, column] = other
            left = w - decode(changed, grid)
            assert (np.einsum("ri,ij,rj->r", left, whole, left) >= least * (1 - 1e-4)).all()


def test_toward_what_inputs_were():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((300, 24)), rng.standard_normal((5, 24)).astype(np.float32)
    first = x + 0.3 * rng.standard_normal((300, 24))
    aim = toward(w, x.T @ x, (first - x).T @ x, 0.0)
    apart = []
    for _ in range(5):
        v = w + rng.standard_normal(w.shape)
        ours, theirs = (((aim - v) @ x.T) ** 2).sum(), ((w @ first.T - v @ x.T) ** 2).sum()
        apart.append(theirs - ours)
    np.testing.assert_allclose(apart, apart[0], rtol=1e-4)

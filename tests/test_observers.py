"""Observers against PyTorch's (golden/observers.md), and against all values at once."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq import observers, ranges
from edgeq.observers import OBSERVERS, Histogram, make

GOLDEN = np.load(Path(__file__).parent / "golden" / "observers.npz")
BATCHES = [GOLDEN[f"batch{i}"] for i in range(5)]
ALL = np.concatenate(BATCHES)


def after(name, batches=BATCHES, per="tensor", **options):
    """An observer that has seen some batches."""
    observer = make(name, per, **options)
    for x in batches:
        observer.look(x)
    return observer


# ---- against PyTorch


@pytest.mark.parametrize("name", ["minmax", "moving_average"])
@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_ends_and_grids_are_torchs(name, per):
    low, high = after(name, per=per).range(8, False)
    theirs = {k: GOLDEN[f"{name}{'' if per == 'tensor' else '_channel'}_{k}"] for k in ("low", "high")}
    np.testing.assert_allclose(low[:, 0], theirs["low"].reshape(-1), rtol=1e-6)
    np.testing.assert_allclose(high[:, 0], theirs["high"].reshape(-1), rtol=1e-6)
    scale, zero = ranges.grid_parameters(low, high, 8, False)
    for ours, key in ((scale, "scale"), (zero, "zero")):
        golden = GOLDEN[f"{name}{'' if per == 'tensor' else '_channel'}_{key}"]
        np.testing.assert_allclose(ours[:, 0], golden.reshape(-1), rtol=1e-6)


def test_histograms_are_torchs_but_for_the_pieces_of_moved_bins():
    bins = len(GOLDEN["mse_histogram"])
    observer = after("mse", bins=bins)
    np.testing.assert_array_equal([end[0, 0] for end in observer.ends], [ALL.min(), ALL.max()])
    np.testing.assert_array_equal(GOLDEN["mse_low"], ALL.min())
    counts, theirs = observer.counts[0], GOLDEN["mse_histogram"]
    assert counts.sum() == pytest.approx(theirs.sum()) == ALL.size
    assert np.abs(np.cumsum(counts) - np.cumsum(theirs)).max() < 0.02 * ALL.size
    # and theirs is no nearer to that of all values at once
    exact = np.histogram(ALL, bins, (ALL.min(), ALL.max()))[0]
    ours, other = (np.abs(np.cumsum(c - exact)).max() for c in (counts, theirs))
    assert ours <= 1.02 * other


def test_the_squared_error_is_about_torchs():
    """There the two ends are moved apart from each other, here the range shrinks as a whole."""

    def error(low, high):
        return float(((ALL - ranges.rounded(ALL, low, high, 8, False)) ** 2).sum())

    scale, zero = GOLDEN["mse_scale"][0], np.float32(GOLDEN["mse_zero"][0])
    theirs = error(-zero * scale, (255 - zero) * scale)
    low, high = after("mse").range(8, False)
    assert error(low[0, 0], high[0, 0]) <= 1.02 * theirs
    assert theirs <= error(ALL.min(), ALL.max())


# ---- by hand


def test_a_running_mean():
    """0 … 1, then 10 times as much: 1 + (10 - 1) * 0.01."""
    observer = after("moving_average", [np.array([[0, 1]], np.float32), np.array([[-1, 10]], np.float32)])
    np.testing.assert_allclose(observer.range(8, True), [[[-0.01]], [[1.09]]], rtol=1e-6)


def test_bins_move_as_a_whole_where_the_new_ones_are_as_wide():
    """0 … 4 in bins of 1, then 0 … 8 in bins of 2: each takes in two."""
    observer = Histogram(ranges.mse, bins=4)
    observer.look(np.array([[0, 1, 1.5, 2, 3.5, 4]], np.float32))
    np.testing.assert_array_equal(observer.counts, [[1, 2, 1, 2]])
    observer.look(np.array([[8, 5]], np.float32))
    np.testing.assert_array_equal(observer.counts, [[3, 3, 1, 1]])
    observer.look(np.array([[-8]], np.float32))
    np.testing.assert_array_equal(observer.counts, [[1, 0, 6, 2]])


# ---- against all values at once


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", ["percentile", "mse", "entropy"])
@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_ranges_of_histograms_are_those_of_the_values(name, symmetric, per):
    rng = np.random.default_rng(1)
    batches = [rng.standard_t(6, (4000, 3)).astype(np.float32) for _ in range(3)]
    options = {"percent": 99.0} if name == "percentile" else {}
    low, high = after(name, batches, per, **options).range(8, symmetric)
    values = np.concatenate(batches)
    rows = values.reshape(1, -1) if per == "tensor" else np.ascontiguousarray(values.T)
    wide = {"shrinks": observers.SHRINKS} if name == "mse" else options
    want = getattr(ranges, name)(rows, 8, symmetric, **wide)
    np.testing.assert_allclose(low, want[0], rtol=0.2)  # the best are alike far around
    np.testing.assert_allclose(high, want[1], rtol=0.2)


def test_an_outlier_is_cut_off():
    rng = np.random.default_rng(2)
    batches = [rng.standard_normal((512, 64)).astype(np.float32) for _ in range(4)]
    batches[2][7, 5] = 60
    assert after("minmax", batches).range(8, True)[1] == 60
    for name in ("percentile", "mse", "entropy"):
        assert after(name, batches).range(8, True)[1] < 55, name


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1),
    name=st.sampled_from(sorted(OBSERVERS)),
    symmetric=st.booleans(),
    per=st.sampled_from(["tensor", "channel"]),
)
def test_ranges_lie_within_the_values_and_memory_does_not_grow(seed, name, symmetric, per):
    rng = np.random.default_rng(seed)
    batches = [(rng.standard_normal((20, 3)) * 10 ** rng.uniform(-2, 2)).astype(np.float32) for _ in range(4)]
    observer = after(
        name, batches, per, **({"bins": 512} if name not in ("minmax", "moving_average") else {})
    )
    low, high = observer.range(8, symmetric)
    rows = 1 if per == "tensor" else 3
    assert low.shape == high.shape == (rows, 1)
    assert low.dtype == high.dtype == np.float32
    largest = max(np.abs(b).max() for b in batches)
    assert (np.maximum(-low, high) <= largest * 1.0001).all()
    assert (low <= high).all()
    if isinstance(observer, Histogram):
        assert observer.counts.shape == (rows, 512)
        np.testing.assert_allclose(observer.counts.sum(), 4 * 60)


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("value", [0, 3, -3])
def test_equal_values(name, value):
    x = np.full((8, 4), value, np.float32)
    low, high = after(name, [x, x]).range(8, False)
    np.testing.assert_allclose(ranges.rounded(x, low, high, 8, False), x, rtol=0.01)


def test_what_is_refused():
    with pytest.raises(ValueError, match="unknown observer 'max'; edgeq has minmax, moving_average"):
        make("max")
    with pytest.raises(ValueError, match="of each 'row'"):
        make("mse", "row")
    with pytest.raises(ValueError, match="has seen nothing"):
        make("mse").range(8, True)
    with pytest.raises(ValueError, match="no finite numbers"):
        make("minmax").look(np.array([[np.nan]], np.float32))

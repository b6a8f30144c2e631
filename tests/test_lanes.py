"""Prepared lanes hold exactly the weights of the file."""

import numpy as np
import pytest
from matrices import random_lanes, random_tensor

from edgeq import formats
from edgeq.grid import Grid, decode
from edgeq.kernels import lanes
from edgeq.tensor import Tensor


@pytest.mark.parametrize("name", formats.names())
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (16, 2), (40, 3), (300, 5)])
def test_lanes_decode_to_the_weights_of_the_file(name, rows, blocks):
    rng = np.random.default_rng(rows)
    block = formats.get(name).BLOCK
    tensor = random_tensor(name, rows, max(block, 32) * blocks, rng)
    found, expected = lanes.decode(lanes.prepare([tensor])), formats.dequantize(tensor)
    off = 0.004 if name == "nf4" else 0  # whose levels are no integers
    np.testing.assert_allclose(found, expected, rtol=0, atol=off * np.abs(expected).max())


@pytest.mark.parametrize("name", ["f32", "f16", "bf16", "i8"])
def test_columns_that_are_no_whole_runs(name):
    tensor = random_tensor(name, 24, 50, np.random.default_rng(0))
    assert np.array_equal(lanes.decode(lanes.prepare([tensor])), formats.dequantize(tensor))


@pytest.mark.parametrize("name", ["q4_1", "q6_k", "f16"])
def test_stacked_tensors_are_one_matrix(name):
    rng = np.random.default_rng(1)
    stack = [random_tensor(name, rows, 256, rng) for rows in (32, 272, 7)]
    want = np.concatenate([formats.dequantize(t) for t in stack])
    assert np.array_equal(lanes.decode(lanes.prepare(stack)), want)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [16, 32, 64, 128])
@pytest.mark.parametrize("offset", [False, True])
def test_any_number_of_bits_and_any_group(bits, group, offset):
    rng = np.random.default_rng(bits)
    codes, grid, prepared = random_lanes(bits, group, offset, rng)
    assert np.array_equal(lanes.decode(prepared), decode(codes, grid))
    record = prepared.data.dtype
    columns = prepared.cols // prepared.data.shape[1]
    stored = sum(record[p].itemsize for p in lanes.PLANE_BYTES if p in record.names)
    assert stored * 8 == 16 * columns * bits


def test_records_start_at_cache_lines():
    prepared = lanes.prepare([random_tensor("q4_1", 64, 256, np.random.default_rng(0))])
    assert prepared.data.ctypes.data % 64 == 0
    assert prepared.data.dtype.itemsize % 64 == 0


def test_groups_that_no_lane_holds_are_refused():
    grid = Grid(np.arange(16), np.ones((16, 8), np.float16))
    with pytest.raises(ValueError, match="groups of 8 columns"):
        lanes.layout(grid, 64)


def test_levels_that_no_table_holds_are_refused():
    grid = Grid(np.array([-1, 0.5, 1], np.float32), np.ones((16, 2), np.float16))
    with pytest.raises(ValueError, match="table holds at most 16"):
        lanes.layout(grid, 64)


def test_padding_rows_stay_zero():
    tensor = Tensor("w", "f32", (3, 5), np.ones(15, np.float32).view(np.uint8))
    data = lanes.prepare([tensor]).data
    assert data.shape == (1, 5, 16)
    assert data.sum() == 15

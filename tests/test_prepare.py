"""The kernel that prepares lanes makes the same bytes as NumPy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import random_tensor

from edgeq import formats
from edgeq.kernels import lanes, pool, prepare
from edgeq.tensor import Tensor

# formats that compute: digits of base three, powers of two, scales apart from the codes
COMPUTED = {"tq1_0", "mxfp4", "i8"}


def random_bytes(name: str, rows: int, cols: int, seed: int) -> Tensor:
    """A tensor of any bytes, NaN among its scales."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, rows * formats.row_bytes(name, cols), np.uint8)
    apart = formats.parts(formats.get(name))
    parts = {"scale": rng.standard_normal(rows, np.float32)} if apart else {}
    return Tensor(name, name, (rows, cols), data, parts)


def check(tensors: list[Tensor], threads: int = 1) -> None:
    with pool.computing(threads):
        got = prepare.prepare(tensors)
    want = lanes.prepare(tensors)
    assert got[:2] == want[:2]
    assert got.data.dtype == want.data.dtype
    assert got.data.tobytes() == want.data.tobytes()
    assert np.array_equal(got.table, want.table)
    assert got.zero == want.zero


@pytest.mark.parametrize("name", formats.names())
@settings(max_examples=12)
@given(
    rows=st.integers(1, 70), blocks=st.integers(1, 6), seed=st.integers(0, 2**32), threads=st.integers(1, 3)
)
def test_any_bytes(name: str, rows: int, blocks: int, seed: int, threads: int) -> None:
    cols = max(formats.get(name).BLOCK, 32) * blocks
    check([random_bytes(name, rows, cols, seed)], threads)


@pytest.mark.parametrize("name", ["f32", "f16", "bf16", "i8"])
@settings(max_examples=12)
@given(rows=st.integers(1, 40), cols=st.integers(1, 140), seed=st.integers(0, 2**32))
def test_any_columns(name: str, rows: int, cols: int, seed: int) -> None:
    check([random_bytes(name, rows, cols, seed)])


@pytest.mark.parametrize("name", formats.names())
def test_stacks(name: str) -> None:
    rng = np.random.default_rng(0)
    check([random_tensor(name, rows, 512, rng) for rows in (16, 272, 7)], threads=2)


@pytest.mark.parametrize("name", ["q8_0", "q6_k"])
def test_many_steps_and_units(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "STEP_BYTES", 1 << 16)
    check([random_tensor(name, 3000, 1024, np.random.default_rng(0))], threads=2)


@pytest.mark.parametrize("name", formats.names())
def test_which_formats_only_move_bits(name: str) -> None:
    if not formats.parts(formats.get(name)):  # else scales are not among its bytes
        assert (prepare.format_wiring(name, 512) is None) == (name in COMPUTED)


@pytest.mark.parametrize("name", ["q4_0", "tq1_0"])
def test_memory_that_is_not_needed_is_let_go(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "STEP_BYTES", 1 << 16)
    tensor = random_tensor(name, 999, 1024, np.random.default_rng(0))
    let_go: list[np.ndarray] = []
    prepare.prepare([tensor], let_go.append)
    assert np.array_equal(np.concatenate([part.reshape(-1) for part in let_go]), tensor.data)


def test_memory_begins_at_cache_lines() -> None:
    memory = lanes.Memory()
    taken = [memory.take((n,), np.dtype("<f4")) for n in (1, 100, memory.BLOCK // 8, memory.BLOCK, 3, 40)]
    for i, array in enumerate(taken):
        assert array.ctypes.data % 64 == 0
        array[:] = i
    assert all((array == i).all() for i, array in enumerate(taken))

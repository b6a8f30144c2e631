"""The limits do the work that they claim, which tells that no compiler left any of it out."""

import numpy as np
import pytest

from edgeq.kernels import limits, pool


@pytest.fixture
def bounds(monkeypatch: pytest.MonkeyPatch) -> limits.Limits:
    """Limits over little memory, random, its bytes below 128: AVX2 would saturate at more."""
    monkeypatch.setattr(limits, "BYTES", limits.BYTES // 8201 * 3)
    made = limits.Limits()
    made.data[:] = np.random.default_rng(0).integers(0, 128, made.data.size, np.uint8)
    return made


@pytest.mark.parametrize("streams", limits.STREAMS)
@pytest.mark.parametrize("threads", [1, 3])
def test_every_byte_is_read(bounds: limits.Limits, streams: int, threads: int) -> None:
    with pool.computing(threads):
        assert bounds.read(streams) == bounds.data.size
    want = np.bitwise_xor.reduce(bounds.data.view(np.int32).reshape(limits.UNITS, -1), axis=1)
    np.testing.assert_array_equal(bounds.out, want)


def test_every_product_is_made(bounds: limits.Limits) -> None:
    turns = 2
    with pool.computing(2):
        assert bounds.multiply(turns) == limits.UNITS * turns * limits.ROUNDS * limits.CHAINS * 64
    lines = bounds.data[: 64 * (limits.CHAINS + 1)].reshape(-1, 16, 4)
    sums, w = lines[:-1].copy().view(np.int32)[:, :, 0], lines[-1].astype(np.int32)
    for i in [*range(limits.CHAINS)] * limits.ROUNDS * turns:
        x = sums[(i + 1) % limits.CHAINS].copy().view(np.int8).reshape(16, 4)
        sums[i] += (w * x).sum(axis=1, dtype=np.int32)
    assert (bounds.out == np.bitwise_xor.reduce(sums, axis=None)).all()

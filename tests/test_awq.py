"""AWQ: its search by hand, and what it promises."""

from functools import partial

import numpy as np
import pytest

from edgeq import ranges
from edgeq.grid import decode, encode
from edgeq.quantizers import target as room
from edgeq.quantizers.awq import CLIPS, clip, rounded, scale_of, search_scale
from edgeq.quantizers.gptq import costs, gptq
from edgeq.quantizers.objective import error

target = partial(room.target, compiled=False)
PLAIN = {"per": 32, "symmetric": False, "choose": ranges.minmax}


def layer(rows=24, cols=128, tokens=400, seed=0):
    """Weights, XXᵀ and mean |x| of inputs of which a few are large, and the inputs themselves."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((cols, tokens)) * np.exp(1.5 * rng.standard_normal((cols, 1)))
    x += rng.standard_normal((1, tokens))
    return rng.standard_normal((rows, cols)).astype(np.float32) / 20, x @ x.T, np.abs(x).mean(axis=1), x


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_search_by_definition(bits):
    """Equation 4 of the paper, with the inputs themselves."""
    w, h, magnitude, x = layer()
    to = target(f"i{bits}", w.shape[1], **PLAIN)
    found = search_scale([w[:8], w[8:]], h, magnitude, to)
    for i, measured in enumerate(found.errors):
        s = magnitude ** (i / 20)
        s = (s / np.sqrt(s.max() * s.min())).astype(np.float32)
        groups = (w * s).reshape(-1, 32)
        low, high = np.minimum(groups.min(1), 0), np.maximum(groups.max(1), 0)
        step = ((high - low) / (2**bits - 1))[:, None]
        zero = np.rint(-low[:, None] / step)
        q = np.clip(np.rint(groups / step.astype(np.float16) + zero), 0, 2**bits - 1)
        coded = ((q - zero) * step.astype(np.float16)).reshape(w.shape) / s
        assert measured == pytest.approx(np.square((w - coded) @ x).sum(), rel=0.01)  # rounded ties differ
    assert found.alpha == found.errors.argmin() / 20
    np.testing.assert_array_equal(found.scale, scale_of(magnitude, found.alpha))
    assert found.errors.min() < 0.8 * found.errors[0]


def test_exponent_zero_is_plain_rounding():
    w, h, magnitude, _ = layer()
    to = target("q4_1", w.shape[1])
    np.testing.assert_array_equal(scale_of(magnitude, 0), np.ones(w.shape[1], np.float32))
    grid = to.fit(w, None)
    plain = error(w, decode(encode(w, grid), grid), h)
    found = search_scale([w], h, magnitude, to)
    assert found.errors[0] / np.vdot(w @ h, w) == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_scales_for_gptq_are_better_than_none(bits):
    w, h, magnitude, _ = layer(rows=64, seed=bits)
    to = target(f"i{bits}", w.shape[1], **PLAIN)
    found = search_scale([w], h, magnitude, to, None, costs(h, to, 0.01, "groups"))

    def left(s):
        codes, grid = gptq(w * s, h / np.outer(s, s), to, order="groups")
        return error(w, decode(codes, grid) / s, h)

    alone = left(np.ones(len(h), np.float32))
    assert found.alpha > 0
    assert left(found.scale) < 0.99 * alone
    assert left(found.scale) <= left(search_scale([w], h, magnitude, to).scale)
    # what the search takes for the error is near what GPTQ leaves
    assert found.errors[0] / np.vdot(w @ h, w) == pytest.approx(alone, rel=0.3)


def test_inputs_of_one_source_share_a_scale():
    w, h, magnitude, _ = layer()
    source = np.tile(np.arange(32), 4)
    found = search_scale([w], h, magnitude, target("i3", w.shape[1], **PLAIN), source)
    assert found.alpha > 0
    np.testing.assert_array_equal(found.scale, np.tile(found.scale[:32], 4))


def test_inputs_that_were_always_zero():
    w, h, magnitude, x = layer()
    x[5] = magnitude[5] = 0
    found = search_scale([w], x @ x.T, magnitude, target("i4", w.shape[1], **PLAIN))
    assert np.isfinite(found.errors).all()
    assert np.isfinite(w * found.scale).all()


@pytest.mark.parametrize("bits", [2, 3])
def test_clipping_by_definition(bits):
    w, h, _, x = layer(rows=6, cols=64)
    to = target(f"i{bits}", 64, **PLAIN)
    cut = clip(w, h, to)
    for row in range(6):
        for group in (slice(0, 32), slice(32, 64)):
            own = w[row : row + 1, group]
            tried = [np.clip(own, own.min() * part, own.max() * part) for part in CLIPS]
            narrow = target(f"i{bits}", 32, **PLAIN)
            errors = [np.square((own - rounded(t, narrow)) @ x[group]).sum() for t in tried]
            np.testing.assert_allclose(cut[row : row + 1, group], tried[int(np.argmin(errors))], rtol=1e-6)
    assert error(w, rounded(cut, to), h) < error(w, rounded(w, to), h)

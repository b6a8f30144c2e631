"""Encoders against gguf-py byte for byte, against llama.cpp's errors, and NumPy against the compiled twin."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq import formats
from edgeq.files.gguf import read
from edgeq.grid import Grid, decode, encode, expand
from edgeq.kernels import encode as compiled
from edgeq.search import Space
from edgeq.tensor import Tensor

NAMES = formats.names()
SEARCHED = [n for n in NAMES if hasattr(formats.get(n), "SPACE")]
FLOATS = [n for n in NAMES if formats.get(n).fit(np.zeros((1, 256), np.float32)) is None]
CODED = [n for n in NAMES if n not in FLOATS]
EQUAL = ["f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "tq1_0", "tq2_0", "mxfp4"]
QUANTIZERS = {"numpy": formats.quantize, "compiled": compiled.quantize}


def weights(kind: str, rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """float32 (rows, cols)"""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal((rows, cols)).astype(np.float32)
    return {
        "normal": normal * np.float32(0.02),
        "heavy tails": rng.standard_t(3, (rows, cols)) * 0.02,
        "one sign": np.abs(normal) + 1,
        "zero": np.zeros_like(normal),
        "zeros of both signs": normal * 0,
        "equal": np.full_like(normal, 0.7),
        "equal, negative": np.full_like(normal, -0.7),
        "outlier": np.where(np.arange(cols) % 256 == 17, 1000, normal * 1e-3),
        "large": normal * 1e4,
        "small": normal * 1e-6,
        "subnormal": normal * 1e-38,
        "ties": rng.integers(-16, 17, (rows, cols)) / 2,
        "both ends": np.where(rng.random((rows, cols)) < 0.5, -3, 3),
        "in half precision": normal.astype(np.float16),
    }[kind].astype(np.float32)


KINDS = [
    "normal", "heavy tails", "one sign", "zero", "zeros of both signs", "equal", "equal, negative", "outlier",
    "large", "small", "subnormal", "ties", "both ends", "in half precision",
]  # fmt: skip


def by_gguf(name: str, w: np.ndarray) -> np.ndarray:
    """The bytes that gguf-py makes."""
    with np.errstate(all="ignore"):
        encoded = gguf.quants.quantize(w, gguf.GGMLQuantizationType[name.upper()])
    return np.ascontiguousarray(encoded).view(np.uint8).reshape(-1)


def error(w: np.ndarray, tensor: Tensor, importance: np.ndarray | float = 1.0) -> float:
    """Weighted squared error, summed in float64."""
    return float((importance * (w.astype(np.float64) - formats.dequantize(tensor)) ** 2).sum())


# ---- against gguf-py


@pytest.mark.parametrize("quantize", QUANTIZERS.values(), ids=QUANTIZERS.keys())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EQUAL)
def test_bytes_are_those_of_gguf(name, kind, quantize):
    w = weights(kind, 7, 512)
    ours = quantize(name, w)
    if name not in FLOATS and kind == "subnormal":
        # gguf-py casts infinities and negative exponents to bytes there; the scales are zero, or next to it
        assert np.abs(formats.dequantize(ours)).max() < 1e-37
    elif kind == "zeros of both signs":
        assert name in FLOATS or not formats.dequantize(ours).any()
    else:
        np.testing.assert_array_equal(ours.data, by_gguf(name, w))


@pytest.mark.parametrize("name", EQUAL)
@given(seed=st.integers(0, 2**32 - 1), power=st.integers(-12, 10))
@settings(max_examples=20)
def test_random_bytes_are_those_of_gguf(name, seed, power):
    w = weights("heavy tails", 16, 256, seed) * np.float32(2.0**power)
    for quantize in QUANTIZERS.values():
        np.testing.assert_array_equal(quantize(name, w).data, by_gguf(name, w))


@pytest.mark.model
@pytest.mark.parametrize("name", EQUAL)
def test_real_bytes_are_those_of_gguf(name, gemma3_path):
    _, tensors = read(gemma3_path)
    for tensor in ("blk.0.ffn_down.weight", "blk.9.attn_q.weight", "token_embd.weight"):
        w = formats.dequantize(tensors[tensor], 0, 64)
        w = w[:, : w.shape[1] // 256 * 256]
        np.testing.assert_array_equal(compiled.quantize(name, w).data, by_gguf(name, w))


@pytest.mark.parametrize("name", FLOATS)
def test_numbers_that_bf16_and_f16_cannot_hold(name):
    """Every upper half of a float32, with lower halves that round down, up and to even."""
    bits = (np.arange(0x7F80, dtype=np.uint32)[:, None] << 16) | np.array(
        [0, 1, 0x7FFF, 0x8000, 0x8001], np.uint32
    )
    w = np.concatenate([bits.view(np.float32), -bits.view(np.float32)])
    w = w[np.abs(w).max(axis=1) <= (65504 if name == "f16" else 3.38e38)]
    theirs = w.view(np.uint8).reshape(-1) if name == "f32" else by_gguf(name, w)
    np.testing.assert_array_equal(formats.quantize(name, w).data, theirs)


# ---- the verbs


def random_grid(name: str, seed: int, rows: int = 8) -> tuple[np.ndarray, Grid, Tensor]:
    """Codes, grid and tensor of a format, with scales of a usual size."""
    w = weights("heavy tails", rows, 256, seed)
    tensor = formats.quantize(name, w)
    codes, grid = formats.unpack(tensor)
    codes = np.random.default_rng(seed).integers(0, codes.max(), codes.shape, np.uint8, True)
    return codes, grid, tensor


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_pack_inverts_unpack(name, seed):
    module = formats.get(name)
    blocks = np.random.default_rng(seed).integers(0, 256, (24, module.BYTES), np.uint8)
    if name in ("bf16", "f16"):
        blocks[:, 1] &= 0xBF  # no NaN: which one it is need not be kept
    if name in ("tq2_0", "ternary"):
        blocks[:, : module.BLOCK // 4] &= ~(blocks[:, : module.BLOCK // 4] >> 1 & 0x55)  # no code 3
    if name == "tq1_0":  # 243 of 256 bytes are five digits, and the last four bytes have four
        blocks = module.pack(*module.unpack(blocks))
    apart = {"scale": np.ones(24, np.float32)} if formats.parts(module) else {}
    codes, grid = module.unpack(blocks, **apart)
    packed = module.pack(codes, grid)
    assert packed.dtype == np.uint8
    np.testing.assert_array_equal(packed, blocks)


@pytest.mark.parametrize("name", CODED)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=10)
def test_encode_takes_the_nearest(name, seed):
    codes, grid, _ = random_grid(name, seed)
    w = weights("heavy tails", *codes.shape, seed + 1)
    chosen = decode(encode(w, grid), grid)
    every = np.stack([decode(np.full_like(codes, c), grid) for c in range(len(grid.levels))])
    least = np.abs(every - w).min(axis=0)
    np.testing.assert_allclose(np.abs(chosen - w), least, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", CODED)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=10)
def test_values_of_a_grid_encode_to_themselves(name, seed):
    codes, grid, _ = random_grid(name, seed)
    w = decode(codes, grid)
    np.testing.assert_array_equal(decode(encode(w, grid), grid), w)


@pytest.mark.parametrize("name", CODED)
def test_fit_gives_the_grid_that_is_stored(name):
    w = weights("heavy tails", 6, 512)
    for importance in (None, np.random.default_rng(0).random(512, np.float32)):
        grid = formats.fit(name, w, importance)
        tensor = formats.quantize(name, w, importance)
        codes, stored = formats.unpack(tensor)
        for ours, theirs in zip(grid[1:], stored[1:], strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                assert ours.dtype == theirs.dtype
                np.testing.assert_array_equal(ours, theirs)
        packed = formats.pack(name, codes, grid)
        np.testing.assert_array_equal(packed.data, tensor.data)
        assert packed.parts.keys() == tensor.parts.keys()
        if name not in EQUAL or importance is not None:  # those are rounded by the scale before it is
            # tq2_0 can hold a fourth level, which no encoder writes
            np.testing.assert_array_equal(encode(w, stored._replace(levels=grid.levels)), codes)


def test_a_grid_that_no_file_holds_is_refused():
    w = weights("normal", 2, 64)
    grid = formats.fit("q4_0", w)
    with pytest.raises(ValueError, match="the grid is not as q4_0 stores it: its blocks would have 20 bytes"):
        formats.pack("q4_0", encode(w, grid), grid._replace(scale=grid.scale.astype(np.float32)))


@pytest.mark.parametrize("name", SEARCHED)
@given(seed=st.integers(0, 2**32 - 1), power=st.integers(-3, 3))
@settings(max_examples=10)
def test_twice_the_weights_are_twice_the_scales(name, seed, power):
    """Nothing in a search depends on the size of the weights."""
    w = weights("large", 4, 256, seed) / 64  # float16 has all scales at full precision
    factor = np.float32(2.0**power)
    importance = np.random.default_rng(seed).random(256, np.float32)
    for given_importance in (None, importance):
        once = formats.dequantize(compiled.quantize(name, w, given_importance))
        again = compiled.quantize(name, w * factor, given_importance)
        np.testing.assert_array_equal(formats.dequantize(again), once * factor)


# ---- the compiled twin


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SEARCHED)
def test_compiled_bytes_are_those_of_numpy(name, kind):
    w = weights(kind, 3, 512)
    importance = np.random.default_rng(1).lognormal(0, 3, 512).astype(np.float32)
    for given_importance in (None, importance, np.eye(1, 512, 5, dtype=np.float32)[0]):
        ours = formats.quantize(name, w, given_importance).data
        np.testing.assert_array_equal(compiled.quantize(name, w, given_importance).data, ours)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CODED)
def test_compiled_rounding_is_that_of_numpy(name, kind):
    w = weights(kind, 3, 512)
    grid = formats.fit(name, w)
    if (np.diff(grid.levels.astype(np.float32)) <= 0).any():
        pytest.skip("its levels are in another order")
    np.testing.assert_array_equal(compiled.rounded(w, grid), decode(encode(w, grid), grid))
    if hasattr(formats.get(name), "SPACE"):
        fitted = compiled.fit(formats.get(name), w, None)
        np.testing.assert_array_equal(compiled.rounded(w, fitted), decode(encode(w, grid), grid))


@pytest.mark.parametrize("name", NAMES)
@given(rows=st.integers(1, 40), blocks=st.integers(1, 3), half=st.booleans())
@settings(max_examples=8)
def test_any_number_of_rows(name, rows, blocks, half):
    """A row's bytes do not depend on the rows around it, nor on what float type it comes as."""
    w = weights("in half precision", rows, blocks * max(32, formats.get(name).BLOCK))
    whole = compiled.quantize(name, w.astype(np.float16) if half else w)
    assert whole.shape == w.shape
    assert whole.data.shape == (rows * formats.row_bytes(name, w.shape[1]),)
    last = formats.quantize(name, w[-1:])
    np.testing.assert_array_equal(whole.data.reshape(rows, -1)[-1], last.data)
    for key, values in whole.parts.items():
        np.testing.assert_array_equal(values[-1:], last.parts[key])


@pytest.mark.parametrize("name", NAMES)
def test_panels_and_higher_shapes(name, monkeypatch):
    w = weights("normal", 6, 256)
    whole = formats.quantize(name, w)
    monkeypatch.setattr(formats, "PANEL", 512)
    for quantize in QUANTIZERS.values():
        np.testing.assert_array_equal(quantize(name, w.reshape(2, 3, 256)).data, whole.data)
        np.testing.assert_array_equal(quantize(name, w[0]).data, whole.data[: whole.data.size // 6])


# ---- errors


@pytest.mark.parametrize(
    "names", [("i2", "i3", "i4", "i8"), ("q2_k", "q4_k", "q5_k", "q8_0"), ("q3_k", "q6_k")]
)
@pytest.mark.parametrize("kind", ["normal", "heavy tails"])
def test_more_bits_have_less_error(names, kind):
    w = weights(kind, 16, 512)
    errors = [error(w, compiled.quantize(name, w)) for name in names]
    assert sorted(errors, reverse=True) == errors


@pytest.mark.parametrize("name", SEARCHED)
def test_search_beats_rounding(name):
    """Also where rounding is what one gets without importance."""
    w = weights("heavy tails", 16, 512)
    ones = np.ones(512, np.float32)
    assert error(w, compiled.quantize(name, w, ones)) <= error(w, compiled.quantize(name, w))


@pytest.mark.parametrize("name", [*SEARCHED, "mxfp4", "i4", "i3", "i2", "binary"])
def test_importance_lowers_the_error_that_it_weighs(name):
    w = weights("heavy tails", 16, 512)
    importance = np.random.default_rng(0).lognormal(0, 2, 512).astype(np.float32)
    plain = compiled.quantize(name, w, np.ones_like(importance))
    assert error(w, compiled.quantize(name, w, importance), importance) < error(w, plain, importance)


@pytest.mark.parametrize("name", [n for n in SEARCHED if n not in ("q2_k", "q3_k", "tq1_0", "tq2_0")])
def test_a_block_that_fits_is_kept(name):
    """Weights that lie on some grid of the format come back, up to what float16 takes from the scale."""
    space: Space = formats.get(name).SPACE
    rng = np.random.default_rng(3)
    codes = rng.integers(0, len(space.levels), (8, 256))
    codes[:, ::16], codes[:, 1::16] = 0, len(space.levels) - 1
    offset = -4 if space.offset else 0
    w = (space.levels[codes] + offset).astype(np.float32) * np.float32(0.01)
    got = formats.dequantize(compiled.quantize(name, w, np.ones(256, np.float32)))
    np.testing.assert_allclose(got, w, atol=1e-3 * np.abs(w).max())


@pytest.mark.parametrize("name", [n for n in SEARCHED if formats.get(n).SPACE.steps])
def test_blocks_stay_as_large_as_they_were(name):
    """Least squares alone would take 7 % of q2_k's, and 2 % of q3_k's."""
    w = weights("normal", 32, 512).astype(np.float64)
    got = formats.dequantize(compiled.quantize(name, w.astype(np.float32)))
    assert (w * got).sum() == pytest.approx((w * w).sum(), rel=0.01)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_refused(name, value):
    w = weights("normal", 2, 256)
    w[1, 200] = value
    for quantize in QUANTIZERS.values():
        with pytest.raises(ValueError, match=f"weights up to .*; {name} holds"):
            quantize(name, w)


@pytest.mark.parametrize("name", ["f16", *SEARCHED])
def test_weights_beyond_the_scales_are_refused(name):
    w = weights("normal", 2, 256)
    reach = formats.get(name).SPACE.reach if name != "f16" else formats.get(name).LARGEST
    w[0, 0], w[1, 7] = reach, -reach
    grid = formats.unpack(compiled.quantize(name, w))[1]
    assert grid is None or np.isfinite(expand(grid.scale, grid.scale_steps)).all()
    w[0, 0] *= 1.1
    with pytest.raises(ValueError, match="holds .* at most"):
        compiled.quantize(name, w)


def test_importance_of_other_columns_is_refused():
    with pytest.raises(ValueError, match=r"importance of \(255,\), the weights have 256 columns"):
        formats.quantize("q4_k", weights("normal", 2, 256), np.ones(255, np.float32))


@pytest.mark.parametrize("name", [n for n in NAMES if formats.get(n).BLOCK > 1])
def test_rows_of_broken_blocks_are_refused(name):
    with pytest.raises(ValueError, match="needs a multiple of"):
        formats.quantize(name, np.zeros((2, formats.get(name).BLOCK + 1), np.float32))


# ---- against llama.cpp


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    """Rows of two matrices of a model, the importance of their columns, and the errors of llama.cpp's
    encoders (tools/encoder_errors.py). It is SmolLM2-135M-Instruct (Apache-2.0), moved off the grid of Q4_1.
    """
    return dict(np.load(Path(__file__).parent / "golden" / "encoders.npz"))


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("name", [n for n in SEARCHED if not n.startswith("tq")])
def test_errors_are_at_most_those_of_llama_cpp(name, weighted, golden):
    for matrix in ("down", "gate"):
        if f"{matrix} {name}" not in golden:
            continue
        w = golden[matrix].astype(np.float32)
        importance = golden[f"{matrix} importance"] if weighted else None
        ours = error(w, compiled.quantize(name, w, importance), importance if weighted else 1.0)
        theirs = golden[f"{matrix} {name}"][int(weighted)]
        if name in EQUAL and not weighted:
            assert ours == pytest.approx(theirs, rel=1e-9)
        else:
            assert ours <= theirs

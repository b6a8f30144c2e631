"""Every format against gguf-py bit for bit, and against a block whose answer was worked out by hand.

The folder is the list: a new format is tested without an edit here, as far as gguf-py knows it.
"""

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq import formats
from edgeq.files.gguf import read
from edgeq.tensor import Tensor

ROWS, BLOCKS = 5, 3


def gguf_type(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType(formats.get(name).GGML)


def reference(name: str, encoded: np.ndarray) -> np.ndarray:
    """Encoded rows uint8 (rows, bytes) -> float32 (rows, cols), by gguf-py."""
    with np.errstate(all="ignore"):  # random scales are often inf or NaN
        return gguf.quants.dequantize(encoded, gguf_type(name)).reshape(len(encoded), -1)


def known_to_gguf(name: str) -> bool:
    try:
        reference(name, np.zeros((1, formats.get(name).BYTES), np.uint8))
    except NotImplementedError:
        return False
    return True


def has_encoder(name: str) -> bool:
    try:
        gguf.quants.quantize(np.ones((1, formats.get(name).BLOCK), np.float32), gguf_type(name))
    except NotImplementedError:
        return False
    return True


IN_GGUF = [n for n in formats.names() if formats.get(n).GGML is not None]
KNOWN = [n for n in IN_GGUF if known_to_gguf(n)]
ENCODED = [n for n in KNOWN if has_encoder(n)]


def tensor_of(name: str, encoded: np.ndarray, **parts: np.ndarray) -> Tensor:
    """Encoded rows uint8 (rows, bytes) as a Tensor over a read-only buffer that is aligned to nothing."""
    module = formats.get(name)
    rows, width = encoded.shape
    data = np.frombuffer(b"\0" + encoded.tobytes(), np.uint8, offset=1)
    return Tensor("w", name, (rows, width // module.BYTES * module.BLOCK), data, parts)


def random_tensor(name: str, seed: int, rows: int = ROWS) -> tuple[Tensor, np.ndarray]:
    """A tensor of random bytes, and the bytes as rows."""
    rng = np.random.default_rng(seed)
    encoded = rng.integers(0, 256, (rows, BLOCKS * formats.get(name).BYTES), np.uint8)
    parts = {"scale": rng.standard_normal(rows, np.float32)} if formats.parts(formats.get(name)) else {}
    return tensor_of(name, encoded, **parts), encoded


def dequantize(tensor: Tensor, *span: int) -> np.ndarray:
    with np.errstate(all="ignore"):
        return formats.dequantize(tensor, *span)


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    """Equal bit for bit, the sign of zero included; one NaN is as good as another."""
    assert actual.dtype == expected.dtype == np.float32
    assert actual.shape == expected.shape
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), nan)
    np.testing.assert_array_equal(actual.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])


# ---- against gguf-py


@pytest.mark.parametrize("name", IN_GGUF)
def test_sizes_and_numbers(name):
    module = formats.get(name)
    assert gguf.GGML_QUANT_SIZES[gguf_type(name)] == (module.BLOCK, module.BYTES)
    assert gguf_type(name).name.lower() == name
    assert formats.from_ggml(module.GGML) == name


@pytest.mark.parametrize("name", KNOWN)
@given(seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=25)
def test_random_bytes(name, seed):
    tensor, encoded = random_tensor(name, seed)
    assert_same_bits(dequantize(tensor), reference(name, encoded))


SCALES = {
    "zero": 0x0000,
    "minus zero": 0x8000,
    "smallest denormal": 0x0001,
    "largest denormal": 0x03FF,
    "one": 0x3C00,
    "largest": 0x7BFF,
    "inf": 0x7C00,
    "minus inf": 0xFC00,
    "nan": 0x7E00,
    "signalling nan": 0x7D00,
}


@pytest.mark.parametrize("bits", SCALES.values(), ids=SCALES.keys())
@pytest.mark.parametrize("name", KNOWN)
def test_extreme_scales(name, bits):
    """The value, at every place of two bytes in turn: one of the places is the scale, another the offset."""
    size = formats.get(name).BYTES
    encoded = np.random.default_rng(bits).integers(0, 256, (size // 2, size), np.uint8)
    for i, row in enumerate(encoded):
        row[2 * i : 2 * i + 2] = bits & 255, bits >> 8
    assert_same_bits(dequantize(tensor_of(name, encoded)), reference(name, encoded))


def weights_of(kind: str, cols: int) -> np.ndarray:
    """float32 (1, cols)"""
    rng = np.random.default_rng(7)
    w = {
        "normal": rng.standard_normal(cols),
        "zero": np.zeros(cols),
        "equal": np.full(cols, 0.7),
        "negative": -np.full(cols, 0.7),
        "outlier": np.where(np.arange(cols) == 17, 1000.0, rng.standard_normal(cols) * 1e-3),
        "denormal": rng.standard_normal(cols) * 1e-40,
        "large": rng.standard_normal(cols) * 1e4,
    }[kind]
    return w.astype(np.float32)[None]


@pytest.mark.parametrize("kind", ["normal", "zero", "equal", "negative", "outlier", "denormal", "large"])
@pytest.mark.parametrize("name", ENCODED)
def test_encoded_by_gguf(name, kind):
    w = weights_of(kind, 4 * 256)
    with np.errstate(all="ignore"):
        encoded = np.ascontiguousarray(gguf.quants.quantize(w, gguf_type(name))).view(np.uint8)
    decoded = dequantize(tensor_of(name, encoded))
    assert_same_bits(decoded, reference(name, encoded))
    assert np.isfinite(decoded).all()
    assert np.abs(decoded - w).max() <= np.abs(w).max()  # it is w, not something else in the same order


@pytest.mark.model
@pytest.mark.parametrize("path", ["smollm2_path", "gemma3_path"])
def test_real_blocks(path, request):
    """The first and last rows of the first two tensors of each format in the file."""
    _, tensors = read(request.getfixturevalue(path))  # gguf-py's reader takes 15 s for Gemma's vocabulary
    seen: dict[str, int] = {}
    for tensor in tensors.values():
        name = tensor.format
        seen[name] = seen.get(name, 0) + 1
        if seen[name] <= 2:
            encoded = tensor.data.reshape(tensor.rows, -1)
            for start, stop in ((0, min(64, tensor.rows)), (max(0, tensor.rows - 64), tensor.rows)):
                assert_same_bits(dequantize(tensor, start, stop), reference(name, encoded[start:stop]))
    assert len(seen) > 1


# ---- by hand

HALF, ONE, TWO = 0x3800.to_bytes(2, "little"), 0x3C00.to_bytes(2, "little"), 0x4000.to_bytes(2, "little")

# name: (bytes that are not zero, by their place in the block), (weights, by their place; later ones win)
BY_HAND = {
    # 0x3fc00000 = 1.5
    "f32": ({0: b"\0\0\xc0\x3f"}, [(0, 1.5)]),
    # 0x3e00 = 1.5
    "f16": ({0: b"\0\x3e"}, [(0, 1.5)]),
    # 0x3fc0 = 1.5
    "bf16": ({0: b"\xc0\x3f"}, [(0, 1.5)]),
    # d = 1/2; codes are 0, but code 3 = 1 and code 19 = 15: w = (code - 8) / 2
    "q4_0": ({0: HALF, 2 + 3: b"\xf1"}, [(slice(32), -4), (3, -3.5), (19, 3.5)]),
    # d = 1/2, m = 1; code 3 = 1, code 19 = 15: w = code / 2 + 1
    "q4_1": ({0: HALF, 2: ONE, 4 + 3: b"\xf1"}, [(slice(32), 1), (3, 1.5), (19, 8.5)]),
    # d = 1/2; code 3 = 1, code 19 = 15 + 16, by bit 19 of qh: w = (code - 16) / 2
    "q5_0": ({0: HALF, 2 + 2: b"\x08", 6 + 3: b"\xf1"}, [(slice(32), -8), (3, -7.5), (19, 7.5)]),
    # d = 1/2, m = 1; code 3 = 1, code 19 = 15 + 16: w = code / 2 + 1
    "q5_1": ({0: HALF, 2: ONE, 4 + 2: b"\x08", 8 + 3: b"\xf1"}, [(slice(32), 1), (3, 1.5), (19, 16.5)]),
    # d = 1/2; the int8 at 3 is -127, at 19 it is 127
    "q8_0": ({0: HALF, 2 + 3: b"\x81", 2 + 19: b"\x7f"}, [(slice(32), 0), (3, -63.5), (19, 63.5)]),
    # d = 1/2, dmin = 2. Group 4: s = 3, m = 1, w = 1.5 code - 2, and code 67 = 32*2 + 3 is 2 (bits 4, 5).
    # Group 15: s = 1, m = 0, w = code / 2, and code 250 = 128 + 32*3 + 26 is 3 (bits 6, 7 of run 1).
    "q2_k": (
        {80: HALF, 82: TWO, 4: b"\x13", 15: b"\x01", 16 + 3: b"\x20", 16 + 32 + 26: b"\xc0"},
        [(slice(256), 0), (slice(64, 80), -2), (67, 1), (250, 1.5)],
    ),
    # d = 1/2, s = -32, code 0: w = 1/2 * -32 * -4 = 64. Group 9: s = 0b100101 - 32 = 5, w = 2.5 (code - 4),
    # and code 150 = 128 + 22 = 32*4 + 22 is 0b111 (low bits in run 1, top bit is bit 4 of hmask).
    "q3_k": (
        {108: HALF, 96 + 1: b"\x50", 96 + 8 + 1: b"\x20", 22: b"\x10", 32 + 32 + 22: b"\x03"},
        [(slice(256), 64), (slice(144, 160), -10), (150, 7.5)],
    ),
    # d = 1/2, dmin = 2. Group 2: s = 4, m = 1, w = 2 code - 2, and code 69 = 64 + 5 is 15.
    # Group 5 = 1 + 4: s = 0b100011 = 35, m = 0b010001 = 17, w = 17.5 code - 34, and code 163 = 160 + 3 is 2.
    "q4_k": (
        {0: HALF + TWO, 4 + 2: b"\x04", 8 + 2: b"\x01", 4 + 1: b"\x80", 8 + 1: b"\x40", 12 + 1: b"\x13"}
        | {16 + 32 + 5: b"\x0f", 16 + 64 + 3: b"\x20"},
        [(slice(256), 0), (slice(64, 96), -2), (69, 28), (slice(160, 192), -34), (163, 1)],
    ),
    # As Q4_K, and bit 2 of qh at 5 and bit 5 at 3 add 16 to the codes: 31 and 18.
    "q5_k": (
        {0: HALF + TWO, 4 + 2: b"\x04", 8 + 2: b"\x01", 4 + 1: b"\x80", 8 + 1: b"\x40", 12 + 1: b"\x13"}
        | {16 + 5: b"\x04", 16 + 3: b"\x20", 48 + 32 + 5: b"\x0f", 48 + 64 + 3: b"\x20"},
        [(slice(256), 0), (slice(64, 96), -2), (69, 60), (slice(160, 192), -34), (163, 281)],
    ),
    # d = 1/2. Group 2: s = -3, w = -1.5 (code - 32), and code 37 = quarter 1, 5 is 0b011111.
    # Group 15: s = 2, w = code - 32, and code 250 = 128 + quarter 3, 26 is 0b100101.
    "q6_k": (
        {208: HALF, 192 + 2: b"\xfd", 192 + 15: b"\x02", 32 + 5: b"\x0f", 128 + 5: b"\x04"}
        | {64 + 32 + 26: b"\x50", 128 + 32 + 26: b"\x80"},
        [(slice(256), 0), (slice(32, 48), 48), (37, 1.5), (slice(240, 256), -32), (250, 5)],
    ),
    # d = 1/2. Byte 1 has the digits 22222: ceil(242 * 256/243) = 255. Byte 32 + 3 has 20100:
    # ceil(171 * 256/243) = 181. Byte 48 + 2 has 1200, then 0: ceil(135 * 256/243) = 143.
    "tq1_0": (
        {52: HALF, 1: b"\xff", 32 + 3: b"\xb5", 48 + 2: b"\x8f"},
        [(slice(256), -0.5), (slice(1, 160, 32), 0.5), (163, 0.5), (195, 0), (242, 0), (246, 0.5)],
    ),
    # d = 1/2; code 35 = 32*1 + 3 is 1, code 250 = 128 + 32*3 + 26 is 2
    "tq2_0": ({64: HALF, 3: b"\x04", 32 + 26: b"\x80"}, [(slice(256), -0.5), (35, 0), (250, 0.5)]),
    # d = 1/2; code 0 is level -127, code 8 is level 1, code 15 is level 113
    "iq4_nl": ({0: HALF, 2 + 3: b"\xf8"}, [(slice(32), -63.5), (3, 0.5), (19, 56.5)]),
    # d = 1/2, s = -32, code 0: w = 1/2 * -32 * -127 = 2032. Group 5: s = 0b100011 - 32 = 3, w = 1.5 level,
    # and code 163 = 160 + 3 is 15, level 113.
    "iq4_xs": (
        {0: HALF, 2 + 1: b"\x08", 4 + 2: b"\x30", 8 + 5 * 16 + 3: b"\x0f"},
        [(slice(256), 2032), (slice(160, 192), -190.5), (163, 169.5)],
    ),
    # e = 128: scale 2. Code 3 is E2M1 0.001 = 0.5, code 19 is 1.111 = -6.
    "mxfp4": ({0: b"\x80", 1 + 3: b"\xf1"}, [(slice(32), 0), (3, 1), (19, -12)]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    patches, weights = BY_HAND[name]
    module = formats.get(name)
    block = bytearray(module.BYTES)
    for at, patch in patches.items():
        block[at : at + len(patch)] = patch
    expected = np.zeros(module.BLOCK, np.float32)
    for at, value in weights:
        expected[at] = value
    np.testing.assert_array_equal(dequantize(tensor_of(name, np.array([block])))[0], expected)


def test_i8_by_hand():
    encoded = np.array([[0x81, 0x00, 0x7F], [0x80, 0x01, 0xFF]], np.uint8)
    scaled = tensor_of("i8", encoded, scale=np.array([0.5, 2], np.float32))
    np.testing.assert_array_equal(dequantize(scaled), [[-63.5, 0, 63.5], [-256, 2, -2]])
    np.testing.assert_array_equal(dequantize(scaled, 1, 2), [[-256, 2, -2]])


def test_i8_without_scale_is_its_integers():
    """As a GGUF file has it: gguf-py hands such a tensor over as an int8 array."""
    codes, grid = formats.unpack(tensor_of("i8", np.array([[0x81, 0x00, 0x7F]], np.uint8)))
    assert grid is None
    assert codes.dtype == np.int8
    np.testing.assert_array_equal(codes, [[-127, 0, 127]])


@pytest.mark.parametrize("e", [0, 1, 2, 127, 254, 255])
def test_mxfp4_scale_is_exact(e):
    tensor = tensor_of("mxfp4", np.array([[e] + [0x01] * 16], np.uint8))  # low nibbles: E2M1 0.5
    assert dequantize(tensor)[0, 0] == 2.0 ** (e - 128)


# ---- what unpack promises


@pytest.mark.parametrize("name", formats.names())
def test_codes_and_grid(name):
    tensor, _ = random_tensor(name, seed=1, rows=300)
    codes, grid = formats.unpack(tensor)
    assert codes.shape == tensor.shape
    if grid is None:
        assert codes.dtype.kind == "f"
        return
    assert codes.dtype == np.uint8
    assert grid.levels.ndim == 1
    assert codes.max() == len(grid.levels) - 1  # every code has a level, and no level is beyond the codes
    assert grid.levels.dtype in (np.int8, np.float32)
    groups = (grid.scale if grid.scale_steps is None else grid.scale_steps).shape[1]
    assert tensor.cols % groups == 0
    for unit, steps in ((grid.scale, grid.scale_steps), (grid.offset, grid.offset_steps)):
        if unit is not None:
            assert unit.dtype in (np.float16, np.float32)
            assert unit.shape[0] == tensor.rows
            assert groups % unit.shape[1] == 0
        if steps is None:
            assert unit is None or unit.shape[1] == groups
        else:
            assert steps.dtype in (np.int8, np.uint8)
            assert steps.shape == (tensor.rows, groups)


@pytest.mark.parametrize("name", formats.names())
@given(seed=st.integers(0, 99), start=st.integers(0, ROWS - 1), count=st.integers(1, ROWS))
@settings(deadline=None, max_examples=10)
def test_slice_of_rows(name, seed, start, count):
    tensor, _ = random_tensor(name, seed)
    stop = min(start + count, ROWS)
    assert_same_bits(dequantize(tensor, start, stop), dequantize(tensor)[start:stop])
    assert_same_bits(dequantize(tensor, start), dequantize(tensor)[start:])


@pytest.mark.parametrize("name", formats.names())
def test_take_rows(name):
    tensor, _ = random_tensor(name, seed=6)
    rows = np.array([3, 0, 3])
    assert_same_bits(dequantize(formats.take(tensor, rows)), dequantize(tensor)[rows])


@pytest.mark.parametrize("name", formats.names())
def test_higher_shapes(name):
    """A stack of matrices is its rows one after the other; a vector is one row."""
    tensor, _ = random_tensor(name, seed=2, rows=6)
    assert_same_bits(dequantize(tensor._replace(shape=(2, 3, tensor.cols))), dequantize(tensor))
    vector, _ = random_tensor(name, seed=3, rows=1)
    assert_same_bits(dequantize(vector._replace(shape=(vector.cols,))), dequantize(vector))


@pytest.mark.parametrize("name", [n for n in formats.names() if formats.get(n).BLOCK > 1])
def test_row_of_broken_blocks(name):
    block = formats.get(name).BLOCK
    with pytest.raises(ValueError, match=f"{block + 1} columns, {name} needs a multiple of {block}"):
        formats.row_bytes(name, block + 1)
    tensor, _ = random_tensor(name, seed=4)
    with pytest.raises(ValueError, match="needs a multiple"):
        formats.unpack(tensor._replace(shape=(ROWS, tensor.cols + 1)))


@pytest.mark.parametrize("name", formats.names())
def test_data_too_short(name):
    tensor, _ = random_tensor(name, seed=5)
    for short in (tensor.data[:-1], tensor.data[: -formats.get(name).BYTES], tensor.data[:0]):
        with pytest.raises(ValueError, match="reshape"):
            formats.unpack(tensor._replace(data=short))


@pytest.mark.parametrize("name", formats.names())
def test_row_bytes(name):
    module = formats.get(name)
    assert formats.row_bytes(name, 0) == 0
    assert formats.row_bytes(name, 7 * module.BLOCK) == 7 * module.BYTES


def test_unknown_format():
    with pytest.raises(ValueError, match="unknown format 'q9_z'; edgeq has bf16, binary"):
        formats.get("q9_z")
    assert formats.from_ggml(9999) is None


@pytest.mark.parametrize("name", formats.names())
def test_layout_is_drawn(name):
    """The module's docstring says what a reader needs: name, bytes, bits per weight, source."""
    module = formats.get(name)
    doc = " ".join(module.__doc__.split())
    assert doc.startswith(f"{name.upper()}: ")
    assert f"{8 * module.BYTES / module.BLOCK:g} bits per weight" in doc
    assert "byte" in doc
    assert "Source: " in doc

"""Activations as integers, made on the fly: one scale for 32 numbers of a token, or as a file says.

    coarse, 8 bits    d = max|x| / 127            q = round(x / d)           x ≈ d * q
    fine, 16 bits     d = max|x| / (127 * 256)    256 q + r = round(x / d)   x ≈ d * (256 q + r), |r| <= 127

Coarse is what llama.cpp's Q8_0 and Q8_1 are, and what products of many tokens use, whose limit is arithmetic
(unless the processor has a matrix unit, see matmul_amx.py).
Its error is that of an 8-bit format for the activations, and a model's outliers make it felt: a mean |ΔNLL|
of 0.04 on SmolLM2. A product of few tokens waits for the weights to come from memory, and the second byte
costs it little.

A file that says how its inputs are rounded (see inputs.py) gets just that, coarse codes with a scale of the
token, or a fixed one. Blocks then all have the same scale: the sums of a row that follow are those of one
integer sum, but for float32's rounding. A zero point leaves -scale * zero * Σ w of each row to the bias.

With the codes go their sums Σ x over a group of weights: what an offset o or the zero code z of the weights
multiplies in a product, Σ (s·(code - z) + o)·x = s·(Σ code·x - z·Σ x) + o·Σ x, costs one operation a group
instead of one a weight. They are kept as the product adds them, once for all rows:

    float32    d * Σ q     for weights with an offset
    int32      -z * Σ q    for all others: what their integer sums begin with

A tile of tokens goes through a product together, and what belongs to the same columns lies together:

    codes    (tiles, runs, planes, 8, tokens, 4)    int8; fine codes have a plane of q and one of r
    scale    (tiles, runs, tokens)
    sums     (tiles, runs or 2 runs, tokens)
"""

import numpy as np
from numba import njit, types
from numba.extending import overload

from ..inputs import LARGEST, SMALLEST, Inputs, encode
from . import lanewise, simd
from .lanes import RUN

OF_BLOCK, OF_TOKEN = np.float32(0), np.float32(-1)  # in place of a fixed scale: made for these
ANY = Inputs("block")
# code of a fixed scale; AVX2's product of signed bytes needs the negatives of codes, so there one is lost
LOWEST = np.float32(-127 if simd.PATH.name == "avx2" else -128)


def quantize_numpy(
    x: np.ndarray, fine: bool, inputs: Inputs = ANY
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x float32 (n, cols), cols a multiple of 32 -> codes (n, cols) int8, or int16 when fine; scales f32 (n,
    runs); sums of every 16 codes int32 (n, 2 runs).
    """
    codes, scale = encode(x, inputs, 256 * LARGEST if fine else LARGEST)
    codes = codes.astype(np.int16 if fine else np.int8)
    if fine:
        codes += (codes & 255) == 128  # 128 is -128 as a signed byte, which some paths cannot negate
    runs = x.shape[1] // RUN
    sums = codes.reshape(len(x), 2 * runs, RUN // 2).sum(axis=2, dtype=np.int32)
    return codes, np.repeat(scale, runs // scale.shape[1], axis=1), sums


def rule(inputs: Inputs | None) -> tuple[np.float32, np.float32]:
    """`given` and `shift` of `quantize_row`."""
    match inputs:
        case Inputs("tensor", scale, zero):
            return np.float32(scale), np.float32(zero)
        case Inputs("token"):
            return OF_TOKEN, np.float32(0)
    return OF_BLOCK, np.float32(0)


def kept_sum(sums, total, scale, zero):
    """What is kept of a sum of codes, by the type of the array that keeps it."""


@overload(kept_sum)
def _kept_sum(sums, total, scale, zero):
    if sums.dtype == types.float32:
        return lambda sums, total, scale, zero: scale * np.float32(total)
    return lambda sums, total, scale, zero: np.int32(-zero * total)


@njit(nogil=True)
def largest_of_row(x, token):
    """max |x| of a token."""
    cols, top = x.shape[1], simd.splat(np.float32(0))
    for i in range(cols // 16):
        top = simd.maximum(top, simd.magnitude(simd.load(x, token * cols + 16 * i)))
    out = simd.largest(top)
    for i in range(cols - cols % 16, cols):
        out = max(out, abs(x[token, i]))
    return out


@njit(nogil=True)
def quantize_row(x, codes, scale, sums, zero, given, shift, token):
    """Quantize token number `token`; x (n, cols) is padded with zeros to whole runs, and the others are laid
    out in tiles, codes as int8 or int16 (n, columns).

    given, shift : scale and zero of all codes, or OF_BLOCK, OF_TOKEN and 0.
    """
    cols = x.shape[1]
    shared = given
    if given == OF_TOKEN:
        shared = largest_of_row(x, token) / np.float32(simd.code_limit(codes))
    runs, tokens = scale.shape[1], scale.shape[2]
    tile, t = token // tokens, token % tokens
    for r in range(runs):
        at = token * cols + RUN * r
        if RUN * r + RUN <= cols:
            a, b = simd.load(x, at), simd.load(x, at + 16)
        else:
            pad = np.full(RUN, -shift * given)  # what gets the code 0
            for i in range(cols - RUN * r):
                pad[i] = x[token, RUN * r + i]
            a, b = simd.load(pad, 0), simd.load(pad, 16)
        d = shared
        if given == OF_BLOCK:
            top = simd.largest(simd.maximum(simd.magnitude(a), simd.magnitude(b)))
            d = top / np.float32(simd.code_limit(codes))
        # a maximum passes over NaN, a sum does not: a NaN must not come out as a plausible number
        d += np.float32(0) * simd.total(simd.add(a, b))
        usable = np.float32(SMALLEST) < d < np.float32(np.inf)
        if not usable:
            a, b = simd.splat(np.float32(0)), simd.splat(np.float32(0))
        inverse = simd.splat(np.float32(1) / d if usable else np.float32(0))
        scale[tile, r, t] = d
        a, b = simd.mul(a, inverse), simd.mul(b, inverse)
        if given > 0:
            a = lanewise.clip(simd.add(a, simd.splat(shift)), LOWEST, np.float32(LARGEST))
            b = lanewise.clip(simd.add(b, simd.splat(shift)), LOWEST, np.float32(LARGEST))
        first = simd.store_codes(codes, tile * runs + r, 0, tokens, t, a)
        second = simd.store_codes(codes, tile * runs + r, 4, tokens, t, b)
        if sums.shape[1] == runs:
            sums[tile, r, t] = kept_sum(sums, first + second, d, zero)
        else:
            sums[tile, 2 * r, t] = kept_sum(sums, first, d, zero)
            sums[tile, 2 * r + 1, t] = kept_sum(sums, second, d, zero)

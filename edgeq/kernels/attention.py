"""Attention over the interleaved cache, compiled. Its specification is `attention` in numpy_backend.py.

First the new tokens' queries and keys are normed (where the model does) and turned, and keys and values
stored. Then positions are taken in spans of SPAN, whose bounds are the same for every token:

    scores   a lane is a position:  Σ_d key[d, 16 positions] * query[d]
    weights  exp(score - largest)
    output   a lane is a dimension: Σ_p value[p, 16 dimensions] * weight[p]

and a span's output joins the former ones' by the usual rescaling with the largest score (arXiv 1805.02867).
Keys and values are widened to float32 once for all rows of a unit of work (a row is one query head of one
token; the query heads of a group share the keys). Many tokens are cut into units by rows; a few tokens have
few rows, so that their spans are shared out, too, and joined at the end. What is added to what in which order
is the same either way: a token's result does not depend on how many are computed with it, nor on the number
of threads.
"""

import math

import numpy as np
from numba import njit, types
from numba.extending import overload

from . import simd
from .cache import GROUP
from .jit import kernel
from .pool import job, run

SPAN, CHUNK = 256, 64  # positions that are joined at once, and that are widened at once
# A register tile: ROWS rows times WIDE vectors of positions, or of dimensions.
ROWS, WIDE = (4, 4) if simd.PATH.tokens > 4 else (4, 1)
TILES = 16  # that share what is widened, when there are many rows
FEW = 16  # tokens at most whose spans are shared out
zero_tile = simd.make_zero(ROWS, WIDE)
zero_row = simd.make_zero(1, WIDE)


# ---- the cache's element types: float32, float16 (as int16), and q8_0 records


def load_key(keys, head, block, i):
    """Number i of a head's keys of the sixteen positions of a block, as float32."""


def load_value(values, head, position, i):
    """Numbers i .. i + 15 of a head's value at a position, as float32."""


def value_size(values):
    """Numbers that a value has room for, whole vectors."""


def store_key(keys, head, position, key):
    """Store a head's key, f32 (head_dim,)."""


def store_value(values, head, position, value):
    """Store a head's value, f32 (head_dim,)."""


@overload(load_key)
def _load_key(keys, head, block, i):
    def of_floats(keys, head, block, i):
        return simd.load(keys, ((head * keys.shape[1] + block) * keys.shape[2] + i) * 16)

    def of_q8(keys, head, block, i):
        record = (head * keys.shape[1] + block) * keys.shape[2] + i // GROUP
        codes = simd.load_field(keys, record, "codes", i % GROUP * 16)
        return simd.mul(codes, simd.load_field(keys, record, "scale", 0))

    return of_q8 if isinstance(keys.dtype, types.Record) else of_floats


@overload(load_value)
def _load_value(values, head, position, i):
    def of_floats(values, head, position, i):
        return simd.load(values, (head * values.shape[1] + position) * values.shape[2] + i)

    def of_q8(values, head, position, i):
        record = (head * values.shape[1] + position) * values.shape[2] + i // GROUP
        codes = simd.load_field(values, record, "codes", i % GROUP)
        return simd.mul(codes, simd.splat(simd.from_half(values[head, position, i // GROUP].scale)))

    return of_q8 if isinstance(values.dtype, types.Record) else of_floats


@overload(value_size)
def _value_size(values):
    group = GROUP if isinstance(values.dtype, types.Record) else 1
    return lambda values: values.shape[2] * group


@overload(store_key)
def _store_key(keys, head, position, key):
    def of_floats(keys, head, position, key):
        at = (head * keys.shape[1] + position // 16) * keys.shape[2] * 16 + position % 16
        for i in range(len(key)):
            simd.store_one(keys, at + 16 * i, key[i])

    def of_q8(keys, head, position, key):
        for g in range(keys.shape[2]):
            record = keys[head, position // 16, g]
            inverse, record.scale[position % 16] = scale_of(key, g)
            for i in range(GROUP):
                record.codes[i, position % 16] = np.int8(np.rint(key[g * GROUP + i] * inverse))

    return of_q8 if isinstance(keys.dtype, types.Record) else of_floats


@overload(store_value)
def _store_value(values, head, position, value):
    def of_floats(values, head, position, value):
        at = (head * values.shape[1] + position) * values.shape[2]
        for i in range(len(value)):
            simd.store_one(values, at + i, value[i])

    def of_q8(values, head, position, value):
        for g in range(values.shape[2]):
            record = values[head, position, g]
            inverse, record.scale = scale_of(value, g)
            for i in range(GROUP):
                record.codes[i] = np.int8(np.rint(value[g * GROUP + i] * inverse))

    return of_q8 if isinstance(values.dtype, types.Record) else of_floats


@njit(nogil=True)
def scale_of(x, group):
    """What a group of numbers is multiplied by to become codes, and its scale as float16: ggml's q8_0."""
    top = np.float32(0)
    for i in range(group * GROUP, group * GROUP + GROUP):
        top = max(top, abs(x[i]))
    scale = top / np.float32(127)
    return (np.float32(1) / scale if scale > 0 else np.float32(0)), simd.to_half(scale)


# ---- new tokens


@njit(nogil=True)
def turn(x, at, head_dim, norm, eps, cos, sin, position, interleaved, out):
    """Norm (unless `norm` is empty) and turn a head, x[at:at + head_dim], into out (head_dim,)."""
    factor = np.float32(1)
    if norm.size:
        squares = np.float32(0)
        for i in range(head_dim):
            squares += x[at + i] * x[at + i]
        factor = np.float32(1) / np.float32(math.sqrt(squares / np.float32(head_dim) + eps))
    for i in range(head_dim):
        out[i] = x[at + i] * factor * norm[i] if norm.size else x[at + i]
    half = cos.shape[1]
    for i in range(half):
        first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        a, b, c, s = out[first], out[second], cos[position, i], sin[position, i]
        out[first], out[second] = a * c - b * s, a * s + b * c


@njit(nogil=True)
def store_token(t, qkv, keys, values, cos, sin, interleaved, q_norm, k_norm, eps, start, queries):
    """Turn the token's queries into `queries` (n, heads, head_dim), and store its keys and values."""
    kv_heads, heads, head_dim = keys.shape[0], queries.shape[1], queries.shape[2]
    position = start + t
    at = t * (heads + 2 * kv_heads) * head_dim
    for h in range(heads):
        turn(qkv, at + h * head_dim, head_dim, q_norm, eps, cos, sin, position, interleaved, queries[t, h])
    at += heads * head_dim
    key = np.empty(head_dim, np.float32)
    for h in range(kv_heads):
        turn(qkv, at + h * head_dim, head_dim, k_norm, eps, cos, sin, position, interleaved, key)
        store_key(keys, h, position, key)
        value = at + (kv_heads + h) * head_dim
        store_value(values, h, position, qkv[value : value + head_dim])


# ---- a unit of work


@njit(nogil=True)
def attend(
    unit, queries, keys, values, scale, window, start, tiles, first_span, share, shares, parts, tops, sums,
    out,
):  # fmt: skip
    """Compute `tiles` tiles of rows of a head over `share` spans, into parts, tops and sums; and into out
    when the rows have no other shares.
    """
    heads, head_dim = queries.shape[1], queries.shape[2]
    group = heads // keys.shape[0]
    head, first_row, rows = place(unit // shares, tiles, queries.shape[0] * group, keys.shape[0])
    scaled = np.zeros((tiles * ROWS, head_dim), np.float32)
    for r in range(rows):
        query = queries[(first_row + r) // group, head * group + (first_row + r) % group]
        for i in range(head_dim):
            scaled[r, i] = query[i] * scale
    part, top, total = parts[unit], tops[unit], sums[unit]
    part[:], top[:], total[:] = 0, -np.inf, 0
    width = part.shape[1]
    scores = np.empty((tiles * ROWS, SPAN), np.float32)
    new, new_top, new_sum = np.empty_like(part), np.empty_like(top), np.empty_like(total)
    wide = np.empty((max(head_dim, CHUNK), WIDE * 16), np.float32)
    low = max(0, start + first_row // group - window + 1) if window else 0
    high = start + (first_row + rows - 1) // group + 1
    span = first_span + unit % shares * share
    for base in range(span * SPAN, (span + share) * SPAN, SPAN):
        stop = min(base + SPAN, high)
        if stop <= max(base, low):
            continue
        for p in range(base, stop, WIDE * 16):
            for i in range(head_dim):
                for c in range(WIDE):
                    simd.store(wide, (i * WIDE + c) * 16, 0, load_key(keys, head, p // 16 + c, i))
            for r in range(0, rows, ROWS):
                acc = zero_tile()
                for i in range(head_dim):
                    acc = simd.outer(acc, load_wide(wide, i), scaled, r * head_dim + i, head_dim)
                simd.store(scores, r * SPAN + p - base, SPAN, acc)
        seen = -(-(stop - base) // (WIDE * 16)) * (WIDE * 16)
        for r in range(rows):
            position = start + (first_row + r) // group
            first = position - window + 1 - base if window else 0
            new_top[r], new_sum[r] = weigh(scores, r, first, position + 1 - base, seen)
        for i in range(0, width, WIDE * 16):
            for p in range(base, stop, CHUNK):
                count = min(CHUNK, stop - p)
                widen_values(values, head, p, count, i, wide)
                for r in range(0, rows, ROWS):
                    acc = zero_tile()
                    if p > base:
                        acc = simd.load_rows(new, r * width + i, width, new.size, acc)
                    for k in range(count):
                        acc = simd.outer(acc, load_wide(wide, k), scores, r * SPAN + p - base + k, SPAN)
                    simd.store(new, r * width + i, width, acc)
        for r in range(rows):
            top[r], total[r] = merge(part[r], top[r], total[r], new[r], new_top[r], new_sum[r])
    if shares == 1:
        finish(unit, tiles, 1, keys.shape[0], parts, tops, sums, out)


@njit(nogil=True)
def load_wide(wide, i):
    """Row i of the widened keys or values."""
    return simd.load_rows(wide, i * WIDE * 16, 0, wide.size, zero_row())


@njit(nogil=True)
def place(block, tiles, rows, kv_heads):
    """Head, first row, and number of rows of a block of tiles, of all the rows of a head."""
    blocks = -(-rows // (tiles * ROWS))
    first = block % blocks * tiles * ROWS
    return block // blocks, first, min(tiles * ROWS, rows - first)


@njit(nogil=True)
def widen_values(values, head, first, count, i, wide):
    """Numbers i .. i + 16 WIDE - 1 of the values of `count` positions, into the rows of `wide`."""
    vectors = min(WIDE, (value_size(values) - i) // 16)
    for k in range(count):
        for c in range(vectors):
            simd.store(wide, (k * WIDE + c) * 16, 0, load_value(values, head, first + k, i + 16 * c))


@njit(nogil=True)
def weigh(scores, r, first, last, seen):
    """Turn row r's scores of a span into weights, and return the largest score and the sum of the weights.

    The row sees the span's positions first .. last - 1; scores[r, :seen], whole vectors, are computed.
    """
    for p in range(min(first, seen)):
        scores[r, p] = -np.inf
    for p in range(max(last, 0), seen):
        scores[r, p] = -np.inf
    largest = simd.splat(np.float32(-np.inf))
    for i in range(0, seen, 16):
        largest = simd.maximum(largest, simd.load(scores, r * SPAN + i))
    top = simd.largest(largest)
    if top == -np.inf:  # the row sees nothing of it
        for p in range(seen):
            scores[r, p] = 0
        return top, np.float32(0)
    minus, sums = simd.splat(-top), simd.splat(np.float32(0))
    for i in range(0, seen, 16):
        e = simd.exp(simd.add(simd.load(scores, r * SPAN + i), minus))
        sums = simd.add(sums, e)
        simd.store(scores, r * SPAN + i, 0, e)
    return top, simd.total(sums)


@njit(nogil=True)
def merge(part, top, total, new, new_top, new_total):
    """Join a span's output, largest score and sum to those of the spans before, and return the last two."""
    best = max(top, new_top)
    if new_top == -np.inf:
        return top, total
    old, fresh = np.float32(math.exp(top - best)), np.float32(math.exp(new_top - best))
    for i in range(len(part)):
        part[i] = part[i] * old + new[i] * fresh
    return best, total * old + new_total * fresh


@njit(nogil=True)
def finish(block, tiles, shares, kv_heads, parts, tops, sums, out):
    """Join the shares of a block of tiles, and write its rows of out."""
    group, head_dim = out.shape[1] // kv_heads, out.shape[2]
    head, first_row, rows = place(block, tiles, out.shape[0] * group, kv_heads)
    unit = block * shares
    for r in range(rows):
        part, top, total = parts[unit, r], tops[unit, r], sums[unit, r]
        for s in range(1, shares):
            top, total = merge(part, top, total, parts[unit + s, r], tops[unit + s, r], sums[unit + s, r])
        y = out[(first_row + r) // group, head * group + (first_row + r) % group]
        for i in range(head_dim):
            y[i] = part[i] / total


@kernel()
def attention(
    state, qkv, keys, values, cos, sin, interleaved, q_norm, k_norm, eps, scale, window, starts, queries,
    parts, tops, sums, out,
):  # fmt: skip
    """qkv f32 (n * (heads + 2 kv_heads) * head_dim,) -> out f32 (n, heads, head_dim).

    keys, values: the layer's cache; cos, sin (positions, dims / 2); q_norm, k_norm (head_dim,) or empty;
    starts (1,): tokens before these. Scratch: queries, shaped like out, and parts (units, rows, width), tops
    and sums (units, rows) of the size that `scratch` says.
    """
    n, start, kv_heads = out.shape[0], starts[0], keys.shape[0]
    run(
        state,
        n,
        job(store_token, (qkv, keys, values, cos, sin, interleaved, q_norm, k_norm, eps, start, queries)),
    )
    tiles = parts.shape[1] // ROWS
    first_span = max(0, start - window + 1) // SPAN if window else 0
    spans = -(-(start + n) // SPAN) - first_span
    share = 1 if n <= FEW else spans
    shares = -(-spans // share)
    blocks = kv_heads * -(-n * (out.shape[1] // kv_heads) // (tiles * ROWS))
    cut = window, start, tiles, first_span, share, shares
    run(state, blocks * shares, job(attend, (queries, keys, values, scale, *cut, parts, tops, sums, out)))
    if shares > 1:
        for block in range(blocks):
            finish(block, tiles, shares, kv_heads, parts, tops, sums, out)


def scratch(n, heads, capacity):
    """Shape (units, rows, width) of the scratch for n tokens of a sequence of up to `capacity`."""
    rows = n * heads.heads // heads.kv_heads
    width = -(-heads.head_dim // (WIDE * 16)) * WIDE * 16
    if n > FEW:
        return heads.kv_heads * -(-rows // (TILES * ROWS)), TILES * ROWS, width
    tiles = min(TILES, -(-rows // ROWS))
    spans = -(-capacity // SPAN)
    if heads.window:
        spans = min(spans, -(-(heads.window + n) // SPAN) + 1)
    return heads.kv_heads * -(-rows // (tiles * ROWS)) * spans, tiles * ROWS, width

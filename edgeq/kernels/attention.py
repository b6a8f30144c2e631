"""Attention over the interleaved cache, compiled. Its specification is `attention` in numpy_backend.py.

First the new tokens' queries and keys are normed (where the model does) and turned, and keys and values
stored. Then a unit of work is a key/value head, ROWS rows (a row is one query head of one token; the query
heads of a group share the keys), and a share of the positions, in spans:

    scores   a lane is a position:  Σ_d key[d, 16 positions] * query[d]
    weights  exp(score - largest)
    output   a lane is a dimension: Σ_p value[p, 16 dimensions] * weight[p]

A span's output joins the former ones' by the usual rescaling with the largest score (arXiv 1805.02867). One
token alone has few heads for many threads, so its positions are shared out too, and the shares joined at the
end; how they are cut depends on the length alone, so that the result does not depend on the number of
threads.
"""

import math

import numpy as np
from numba import njit

from . import pool, simd
from .jit import kernel

ROWS = max(4, simd.PATH.tokens)  # that share what is loaded, as the registers allow
SPAN = 256
zero_rows = simd.make_zero(ROWS)


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
    kv_heads, blocks, heads, head_dim = keys.shape[0], keys.shape[1], queries.shape[1], queries.shape[2]
    position = start + t
    at = t * (heads + 2 * kv_heads) * head_dim
    for h in range(heads):
        turn(qkv, at + h * head_dim, head_dim, q_norm, eps, cos, sin, position, interleaved, queries[t, h])
    at += heads * head_dim
    key = np.empty(head_dim, np.float32)
    for h in range(kv_heads):
        turn(qkv, at + h * head_dim, head_dim, k_norm, eps, cos, sin, position, interleaved, key)
        to = (h * blocks + position // 16) * head_dim * 16 + position % 16
        for i in range(head_dim):
            simd.store_one(keys, to + 16 * i, key[i])
        value, to = at + (kv_heads + h) * head_dim, (h * blocks * 16 + position) * values.shape[2]
        for i in range(head_dim):
            simd.store_one(values, to + i, qkv[value + i])


@njit(nogil=True)
def attend(unit, queries, keys, values, scale, window, start, shares, parts, tops, weights, out):
    """Compute a unit: its share of the positions into parts, tops and weights, and into out when it has no
    others.
    """
    heads, head_dim, width = queries.shape[1], queries.shape[2], values.shape[2]
    kv_heads, blocks = keys.shape[0], keys.shape[1]
    group = heads // kv_heads
    h, first_row, rows = place(unit // shares, out.shape[0] * group, kv_heads)
    low = max(0, start + first_row // group - window + 1) if window else 0
    high = start + (first_row + rows - 1) // group + 1
    size = -(-(high - low) // (shares * 16)) * 16
    low = min(low + unit % shares * size, high)
    high = min(low + size, high)

    scores = np.empty((ROWS, SPAN), np.float32)
    scaled = np.zeros((ROWS, head_dim), np.float32)
    for r in range(rows):
        query = queries[(first_row + r) // group, h * group + (first_row + r) % group]
        for i in range(head_dim):
            scaled[r, i] = query[i] * scale
    part, top, weight = parts[unit], tops[unit], weights[unit]
    for r in range(ROWS):
        top[r], weight[r] = -np.inf, 0
        for i in range(width):
            part[r, i] = 0
    for span in range(low // 16 * 16, high, SPAN):
        stop = min(span + SPAN, high)
        for p in range(span, stop, 16):
            acc = zero_rows()
            at = (h * blocks + p // 16) * head_dim * 16
            for i in range(head_dim):
                acc = simd.outer(acc, simd.load(keys, at + 16 * i), scaled, i, head_dim)
            simd.store(scores, p - span, SPAN, acc)
        for r in range(ROWS):
            position = start + (first_row + r) // group
            first = max(low, position - window + 1) if window else low
            weigh(
                r,
                first - span,
                min(stop, position + 1) - span,
                -(-(stop - span) // 16) * 16,
                scores,
                part,
                top,
                weight,
            )
        for i in range(0, width, 16):
            acc = simd.load_rows(part, i, width, part.size, zero_rows())
            at = (h * blocks * 16 + span) * width + i
            for p in range(stop - span):
                acc = simd.outer(acc, simd.load(values, at + p * width), scores, p, SPAN)
            simd.store(part, i, width, acc)
    if shares == 1:
        join(unit, 1, parts, tops, weights, out, kv_heads)


@njit(nogil=True)
def place(tile, rows, kv_heads):
    """Head, first row, and number of rows of a tile, of all the rows of a head."""
    tiles = -(-rows // ROWS)
    first = tile % tiles * ROWS
    return tile // tiles, first, min(ROWS, rows - first)


@njit(nogil=True)
def weigh(r, first, last, padded, scores, part, top, weight):
    """Turn row r's scores of a span into weights, and rescale what the row has gathered, part[r] and
    weight[r].

    The row sees the span's positions first .. last - 1; scores[r, :padded], whole vectors, are computed.
    """
    for p in range(min(first, padded)):
        scores[r, p] = -np.inf
    for p in range(max(last, 0), padded):
        scores[r, p] = -np.inf
    largest = simd.splat(np.float32(-np.inf))
    for i in range(0, padded, 16):
        largest = simd.maximum(largest, simd.load(scores, r * SPAN + i))
    best = max(top[r], simd.largest(largest))
    if best == -np.inf:  # the row sees nothing yet
        for p in range(padded):
            scores[r, p] = 0
        return
    shrink = np.float32(math.exp(top[r] - best))
    minus, sums = simd.splat(-best), simd.splat(np.float32(0))
    for i in range(0, padded, 16):
        e = simd.exp(simd.add(simd.load(scores, r * SPAN + i), minus))
        sums = simd.add(sums, e)
        simd.store(scores, r * SPAN + i, 0, e)
    top[r] = best
    weight[r] = weight[r] * shrink + simd.total(sums)
    for i in range(part.shape[1]):
        part[r, i] *= shrink


@njit(nogil=True)
def join(first_unit, shares, parts, tops, weights, out, kv_heads):
    """Write a tile's rows of out from the shares of its positions."""
    group = out.shape[1] // kv_heads
    h, first_row, rows = place(first_unit // shares, out.shape[0] * group, kv_heads)
    units = range(first_unit, first_unit + shares)
    for r in range(rows):
        y = out[(first_row + r) // group, h * group + (first_row + r) % group]
        best = np.float32(-np.inf)
        for unit in units:
            best = max(best, tops[unit, r])
        total = np.float32(0)
        for unit in units:
            total += weights[unit, r] * np.float32(math.exp(tops[unit, r] - best))
        for i in range(len(y)):
            y[i] = 0
        for unit in units:
            factor = np.float32(math.exp(tops[unit, r] - best)) / total
            for i in range(len(y)):
                y[i] += parts[unit, r, i] * factor


CACHE = "i2" if simd.PATH.half else "f4"


@kernel(
    f"void(i8[::1], f4[::1], {CACHE}[:, :, :, ::1], {CACHE}[:, :, ::1], f4[:, ::1], f4[:, ::1], b1, f4[::1],"
    "f4[::1], f4, f4, i8, i8, i8, f4[:, :, ::1], f4[:, :, ::1], f4[:, ::1], f4[:, ::1], f4[:, :, ::1])"
)
def attention(
    state,
    qkv,
    keys,
    values,
    cos,
    sin,
    interleaved,
    q_norm,
    k_norm,
    eps,
    scale,
    window,
    start,
    shares,
    queries,
    parts,
    tops,
    weights,
    out,
):
    """qkv f32 (n * (heads + 2 kv_heads) * head_dim,) -> out f32 (n, heads, head_dim).

    keys, values: the layer's cache; cos, sin (positions, dims / 2); q_norm, k_norm (head_dim,) or empty;
    start: tokens before these; shares: pieces that the positions are cut into. Scratch: queries, shaped like
    out; parts (units, ROWS, width), tops and weights (units, ROWS), for kv_heads * tiles of rows * shares
    units.
    """
    tokens = pool.job(
        store_token, (qkv, keys, values, cos, sin, interleaved, q_norm, k_norm, eps, start, queries)
    )
    pool.run(state, out.shape[0], tokens)
    units = pool.job(attend, (queries, keys, values, scale, window, start, shares, parts, tops, weights, out))
    pool.run(state, len(parts), units)
    if shares > 1:
        for unit in range(0, len(parts), shares):
            join(unit, shares, parts, tops, weights, out, keys.shape[0])

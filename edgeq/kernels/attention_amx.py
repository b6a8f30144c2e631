"""Attention of many tokens on the matrix unit: what attention.py computes, with every factor as the sum of
two bfloat16.

A unit of work is a block of rows of a head. For each span of positions it makes tiles of the head's keys and
values, which all its rows meet, 32 at a time:

    scores   x: rows of queries,  w: pairs of dimensions, 16 positions
    output   x: rows of weights,  w: pairs of positions, 16 dimensions
"""

import numpy as np
from numba import njit

from . import amx, simd
from .amx import COLS, PAIR, TILE
from .attention import SPAN, load_key, load_value, merge, store_token, weigh
from .jit import kernel
from .pool import job, run

ROWS = 128  # of a block
RUNS = SPAN // COLS  # of positions in a span


@njit(nogil=True)
def queries_as_tiles(queries, head, group, first, rows, scale, x):
    """Write a block of a key head's queries, times scale, to x: (rows / 16, dim / 32) tiles, high and low.

    A row is one of the head's `group` queries of a token; the last one is repeated up to a pair of tiles.
    """
    dim = queries.shape[2]
    factor = simd.splat(scale)
    for r in range(-(-rows // PAIR) * PAIR):
        row = first + min(r, rows - 1)
        at = (row // group * queries.shape[1] + head * group + row % group) * dim
        for d in range(0, dim, COLS):
            a = simd.mul(simd.load(queries, at + d), factor)
            b = simd.mul(simd.load(queries, at + d + 16), factor)
            to = (r // amx.ROWS * dim + d) * amx.ROWS + r % amx.ROWS * COLS
            amx.split_row(x, to, ROWS * dim + to, a, b)


@njit(nogil=True)
def keys_as_tiles(keys, head, dim, base, stop, w):
    """Write keys of positions base .. stop - 1 to w: (positions / 16, dim / 32) tiles, high and low."""
    for b in range(-(-(stop - base) // PAIR) * 2):
        block = min(base // amx.ROWS + b, keys.shape[1] - 1)  # what is not there is not looked at
        for d in range(0, dim, 2):
            to = b * amx.ROWS * dim + d // 2 * COLS
            pair = load_key(keys, head, block, d), load_key(keys, head, block, d + 1)
            amx.split_pair(w, to, SPAN * dim + to, pair[0], pair[1])


@njit(nogil=True)
def values_as_tiles(values, head, dim, base, stop, w):
    """Write values of positions base .. stop - 1 to w: (dim / 16, positions / 32) tiles, high and low; zeros
    for positions from `stop` on.
    """
    zero = simd.splat(np.float32(0))
    for p in range(base, base + -(-(stop - base) // COLS) * COLS, 2):
        for d in range(0, dim, 16):
            a = load_value(values, head, p, d) if p < stop else zero
            b = load_value(values, head, p + 1, d) if p + 1 < stop else zero
            to = d * SPAN + (p - base) // COLS * TILE + (p - base) % COLS * 16
            amx.split_pair(w, to, SPAN * dim + to, a, b)


@njit(nogil=True)
def attend(unit, queries, keys, values, scale, window, start, out):
    """Compute a block of rows of a key head, into out."""
    heads, dim, kv_heads = queries.shape[1], queries.shape[2], keys.shape[0]
    group = heads // kv_heads
    blocks = -(-queries.shape[0] * group // ROWS)
    head, first_row = unit // blocks, unit % blocks * ROWS
    rows = min(ROWS, queries.shape[0] * group - first_row)
    # the high halves of numbers, and from here on the low ones
    x_low, w_low, weights_low = ROWS * dim, SPAN * dim, PAIR * SPAN
    x, weights = amx.room(2 * x_low), amx.room(2 * weights_low)
    w_keys, w_values = amx.room(2 * w_low), amx.room(2 * w_low)
    queries_as_tiles(queries, head, group, first_row, rows, scale, x)
    part, new = np.zeros((ROWS, dim), np.float32), np.empty((PAIR, dim), np.float32)
    top, total = np.full(ROWS, -np.inf, np.float32), np.zeros(ROWS, np.float32)
    scores = np.empty((PAIR, SPAN), np.float32)
    new_top, new_sum = np.empty(PAIR, np.float32), np.empty(PAIR, np.float32)
    low = max(0, start + first_row // group - window + 1) if window else 0
    high = start + (first_row + rows - 1) // group + 1
    amx.configure(amx.CONFIG)
    for base in range(low // SPAN * SPAN, high, SPAN):
        stop = min(base + SPAN, high)
        keys_as_tiles(keys, head, dim, base, stop, w_keys)
        values_as_tiles(values, head, dim, base, stop, w_values)
        for r0 in range(0, rows, PAIR):
            count = min(PAIR, rows - r0)
            earliest = start + (first_row + r0) // group
            latest = start + (first_row + r0 + count - 1) // group
            runs = min(RUNS, (latest - base) // COLS + 1)  # of positions that a row of the pair may see
            if runs <= 0 or (window and base + SPAN <= earliest - window + 1):
                continue
            at, below = r0 * dim, (r0 + amx.ROWS) * dim
            for b in range(0, runs * PAIR * dim, PAIR * dim):
                amx.start()
                beside = b + amx.ROWS * dim
                amx.multiply_split(x, at, below, x_low, w_keys, b, beside, w_low, dim // COLS)
                amx.finish(scores, b // dim, SPAN, 16)
            for r in range(count):
                position = start + (first_row + r0 + r) // group
                first = position - window + 1 - base if window else 0
                new_top[r], new_sum[r] = weigh(scores, r, first, position + 1 - base, runs * COLS)
                for p in range(0, runs * COLS, COLS):
                    a, b = simd.load(scores, r * SPAN + p), simd.load(scores, r * SPAN + p + 16)
                    to = (r // amx.ROWS * SPAN + p) * amx.ROWS + r % amx.ROWS * COLS
                    amx.split_row(weights, to, weights_low + to, a, b)
            for d in range(0, dim, PAIR):
                amx.start()
                at, beside = d * SPAN, (d + 16) * SPAN
                below = amx.ROWS * SPAN
                amx.multiply_split(weights, 0, below, weights_low, w_values, at, beside, w_low, runs)
                amx.finish(new, d, dim, 16)
            for r in range(count):
                i = r0 + r
                top[i], total[i] = merge(part[i], top[i], total[i], new[r], new_top[r], new_sum[r])
    amx.release()
    for r in range(rows):
        y = out[(first_row + r) // group, head * group + (first_row + r) % group]
        for i in range(dim):
            y[i] = part[r, i] / total[r]


@kernel()
def attention(
    state, qkv, keys, values, cos, sin, interleaved, q_norm, k_norm, eps, scale, window, starts, queries, out
):
    """What `attention.attention` does, for heads of a multiple of 32 numbers; its arguments, without the
    scratch for shares.
    """
    n, start, kv_heads = out.shape[0], starts[0], keys.shape[0]
    turns = qkv, keys, values, cos, sin, interleaved, q_norm, k_norm, eps, start, queries
    run(state, n, job(store_token, turns))
    blocks = kv_heads * -(-n * (out.shape[1] // kv_heads) // ROWS)
    run(state, blocks, job(attend, (queries, keys, values, scale, window, start, out)))

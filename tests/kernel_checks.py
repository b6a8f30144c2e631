"""Checks of the compiled kernels against NumPy, on the path that this process was started with.

A module of its own, because a path is chosen when Numba starts: `python kernel_checks.py q4_0 q8_0` runs the
checks for these formats and prints the path's name.
"""

import sys

import numpy as np
from matrices import random_tensor

from edgeq import kernels
from edgeq.kernels import activations, host, lanes, numba_backend, numpy_backend, prepare
from edgeq.kernels.cache import KVCache
from edgeq.kernels.heads import Heads
from edgeq.kernels.rope import rope
from edgeq.tensor import Tensor


def expected_product(prepared: lanes.Lanes, x: np.ndarray) -> np.ndarray:
    """x Wᵀ in float64, from the weights in the lanes and from activations as the kernels round them."""
    w = lanes.decode(prepared)
    if prepared.is_float:
        x64 = x.astype(np.float64)
    elif on_matrix_unit(len(x)):
        x64, w = bfloat16(x), bfloat16(w)
    else:
        padded = np.pad(x, ((0, 0), (0, -x.shape[1] % lanes.RUN)))
        fine = len(x) < numba_backend.FINE_TOKENS and not numba_backend.is_ternary(prepared)
        codes, scale, _ = activations.quantize_numpy(padded, fine)
        x64 = (codes.reshape(*scale.shape, -1) * scale[:, :, None].astype(np.float64)).reshape(len(x), -1)
        x64 = x64[:, : prepared.cols]
    return x64.astype(np.float64) @ w.astype(np.float64).T


def on_matrix_unit(n: int) -> bool:
    """Whether a product of n tokens is of bfloat16."""
    return host.path().amx and n >= numba_backend.FINE_TOKENS


def bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 rounded to the nearest bfloat16, half to even; NaN and infinities stay."""
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return np.where(np.isfinite(x), rounded, x)


def check_product(tensor: Tensor, x: np.ndarray) -> None:
    """Lanes are prepared as NumPy does, and their compiled product agrees with float64."""
    prepared = prepare.prepare([tensor])
    assert prepared.data.tobytes() == lanes.prepare([tensor]).data.tobytes()
    check_lanes(prepared, x)


def check_lanes(prepared: lanes.Lanes, x: np.ndarray) -> None:
    """The compiled product of prepared lanes agrees with float64 to float32's precision."""
    got = numba_backend.Linear([numba_backend.Product(prepared)], None)(x)
    want = expected_product(prepared, x)
    size = np.abs(x).astype(np.float64) @ np.abs(lanes.decode(prepared)).astype(np.float64).T
    assert got.shape == want.shape
    assert got.dtype == np.float32
    # rounding is relative to the sum of magnitudes; a weight halfway between two bfloat16 may go either way
    tolerance = 2e-5 if on_matrix_unit(len(x)) else 4e-6
    assert np.all(np.abs(got - want) <= tolerance * (size + size.mean()) + 1e-30), (
        prepared.data.dtype,
        x.shape,
    )


def check_attention(
    rng: np.random.Generator,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    before: int,
    n: int,
    window: int = 0,
    norms: bool = False,
    interleaved: bool = False,
    dims: int | None = None,
    kind: str | None = None,
    tolerance: float = 4e-3,
) -> None:
    """The compiled attention agrees with the NumPy one, over the same past."""
    table = rope(before + n, dims or head_dim, 10000.0, interleaved=interleaved)
    kinds = kind or numba_backend.CACHE_TYPES[0], "f32"
    caches = [KVCache(before + n, kv_heads, head_dim, [table], k, k) for k in kinds]
    past = [rng.standard_normal((before, kv_heads, head_dim)).astype(np.float32) for _ in range(2)]
    for cache in caches:
        cache.tokens = [0] * (before + n)
        cache.write(0, 0, *past)
    gains = [rng.random(head_dim).astype(np.float32) + 0.5 if norms else None for _ in range(2)]
    spec = Heads(heads, kv_heads, head_dim, head_dim**-0.5, window, *gains, 1e-6)
    qkv = rng.standard_normal((n, (heads + 2 * kv_heads) * head_dim)).astype(np.float32)
    got = numba_backend.attention(qkv, [caches[0]], 0, spec)
    want = numpy_backend.attention(qkv, [caches[1]], 0, spec)
    np.testing.assert_allclose(got, want, atol=tolerance)
    np.testing.assert_allclose(
        caches[0].read_keys(0, before + n), caches[1].read_keys(0, before + n), atol=tolerance
    )


def check_gates_and_norms(rng: np.random.Generator) -> None:
    """The elementwise kernels agree with NumPy."""
    for size in (1, 16, 37, 172):
        x = (rng.standard_normal((3, 2 * size)) * 8).astype(np.float32)
        for activation in numpy_backend.ACTIVATIONS:
            got, want = (kernels.backend(b).gated(x, activation) for b in kernels.BACKENDS)
            np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)
        gain = rng.random(2 * size).astype(np.float32)
        got, want = (kernels.backend(b).rms_norm(x, gain, 1e-5) for b in kernels.BACKENDS)
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-7)


def main(names: list[str]) -> None:
    """Everything, for these formats."""
    rng = np.random.default_rng(0)
    for name in names:
        tensor = random_tensor(name, 40, 512, rng)
        for n in (1, 3, 11, numba_backend.FINE_TOKENS + 5):
            check_product(tensor, rng.standard_normal((n, tensor.cols)).astype(np.float32))
    for n in (1, 5):
        check_attention(rng, heads=6, kv_heads=2, head_dim=16, before=37, n=n, norms=True, window=20)
    check_gates_and_norms(rng)
    print(host.path().name)


if __name__ == "__main__":
    main(sys.argv[1:])

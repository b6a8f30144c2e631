"""Powers that are the same on every machine: x**p for 0 < p < 1, to about 1e-6 of the value.

    x = 2**e * m        m from √½ to √2, from the bits of x
    x**p = 2**(p * e + p * log2(m))

with polynomials for log2(m) / (m - 1) and for 2**g, |g| <= ½, of the least relative error. What a library's
own powers return depends on the library; here each step is one rounding, so that compiled kernels (see
kernels/halfquadratic.py) find just the same.
"""

import numpy as np

LEAST = 0x3F3504F3  # bits of √½
LOG2 = (
    1.442695,
    -0.7213475,
    0.48091078,
    -0.3606921,
    0.28790176,
    -0.2391949,
    0.21611913,
    -0.20570561,
    0.12280528,
)
EXP2 = (1.0, 0.6931472, 0.24022646, 0.05550329, 0.00961852, 0.001339986, 0.00015337577)
FARTHEST = 120.0  # exponents beyond are this one, so that 0**p is no number that matters


def power(x: np.ndarray, p: float) -> np.ndarray:
    """x**p, float32 as x, which is not negative."""
    exponent = np.float32(p)
    bits = x.view(np.int32)
    e = (bits - np.int32(LEAST)) >> 23
    f = (bits - (e << 23)).view(np.float32) - np.float32(1)
    y = e.astype(np.float32) * exponent + horner(LOG2, f) * f * exponent
    y = np.minimum(np.maximum(y, np.float32(-FARTHEST)), np.float32(FARTHEST))
    k = np.rint(y)
    z = horner(EXP2, y - k)
    return (z.view(np.int32) + (k.astype(np.int32) << 23)).view(np.float32)


def horner(coefficients: tuple[float, ...], x: np.ndarray) -> np.ndarray:
    """Σ coefficients[i] * x**i"""
    out = np.full_like(x, coefficients[-1])
    for c in coefficients[-2::-1]:
        out = out * x + np.float32(c)
    return out

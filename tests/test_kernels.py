"""The compiled kernels against their NumPy twins: every format, odd sizes, any number of threads."""

import os
import subprocess
import sys

import kernel_checks
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import random_lanes, random_tensor

from edgeq import formats
from edgeq.inputs import Inputs
from edgeq.kernels import activations, jit, matmul, numba_backend, simd
from edgeq.kernels.cache import KVCache
from edgeq.kernels.heads import Heads
from edgeq.kernels.jit import kernel
from edgeq.kernels.rope import rope

THREADS = 4  # more than the cores of a small machine: threads must not be needed to run at once


@pytest.mark.parametrize("name", formats.names())
@pytest.mark.parametrize("n", [1, 2, 11])
def test_product(name, n):
    rng = np.random.default_rng(n)
    for rows, cols in ((40, 512), (1, 256), (17, 768)):
        tensor = random_tensor(name, rows, cols, rng)
        kernel_checks.check_product(tensor, rng.standard_normal((n, tensor.cols)).astype(np.float32))


@pytest.mark.parametrize("name", ["q4_1", "q6_k", "q8_0", "iq4_xs", "tq2_0", "f16"])
@pytest.mark.parametrize("rows", [1, 40, 96])
def test_product_of_many_tokens(name, rows):
    rng = np.random.default_rng(5)
    for cols in (512, 2304):
        tensor = random_tensor(name, rows, cols, rng)
        for n in (numba_backend.FINE_TOKENS, numba_backend.FINE_TOKENS + 5):
            kernel_checks.check_product(tensor, rng.standard_normal((n, tensor.cols)).astype(np.float32))


@pytest.mark.parametrize("bits", [1, 2, 3, 6, 8])
@pytest.mark.parametrize("group", [16, 32, 128])
def test_lanes_of_any_bits(bits, group):
    rng = np.random.default_rng(bits)
    _, _, prepared = random_lanes(bits, group, bits in (1, 3), rng)
    kernel_checks.check_lanes(prepared, rng.standard_normal((1, 128)).astype(np.float32))


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(["q4_1", "q8_0", "q6_k", "i8", "f16", "f32"]),
    rows=st.integers(1, 70),
    cols=st.integers(1, 300),
    n=st.integers(1, 20),
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(["normal", "zero", "equal", "outlier", "tiny", "huge"]),
)
def test_product_of_odd_sizes_and_edge_values(name, rows, cols, n, seed, kind):
    rng = np.random.default_rng(seed)
    tensor = random_tensor(name, rows, cols, rng)
    x = rng.standard_normal((n, tensor.cols)).astype(np.float32)
    if kind == "zero":
        x[:] = 0
    elif kind == "equal":
        x[:] = 3
    elif kind == "outlier":
        x[:, 0] = 1e4
    elif kind == "tiny":
        x *= np.float32(1e-30)
    elif kind == "huge":
        x *= np.float32(1e30)
    kernel_checks.check_product(tensor, x)


@pytest.mark.parametrize("name", ["q4_1", "q8_0", "tq2_0", "f32"])
@pytest.mark.parametrize("n", [1, 9, 130])
def test_the_same_bytes_for_any_number_of_threads_every_time(name, n):
    rng = np.random.default_rng(3)
    tensor = random_tensor(name, 2048, 1024, rng)  # large enough for the threads to overlap
    x = rng.standard_normal((n, 1024)).astype(np.float32)
    product = numba_backend.linear([tensor])
    first = product(x).tobytes()
    for threads in range(1, THREADS + 1):
        for _ in range(10):
            with numba_backend.computing(threads):
                assert product(x).tobytes() == first


def test_stacked_products_of_several_formats_with_odd_rows():
    rng = np.random.default_rng(4)
    tensors = [
        random_tensor(name, rows, 256, rng) for name, rows in (("q5_0", 20), ("q5_0", 16), ("q8_0", 3))
    ]
    tensors += [random_tensor("f32", rows, 256, rng) for rows in (172, 172)]
    bias = rng.random(sum(t.rows for t in tensors)).astype(np.float32)
    stacked = numba_backend.linear(tensors, bias)
    for n in (1, 3):
        x = rng.standard_normal((n, 256)).astype(np.float32)
        want = np.concatenate([numba_backend.linear([t])(x) for t in tensors], axis=1) + bias
        np.testing.assert_array_equal(stacked(x), want)


def test_inputs_of_another_shape_or_layout():
    rng = np.random.default_rng(9)
    product = numba_backend.linear([random_tensor("q8_0", 20, 64, rng)])
    x = rng.standard_normal((6, 128))
    want = product(np.ascontiguousarray(x[::2, ::2], np.float32))
    np.testing.assert_array_equal(product(x[::2, ::2]), want)
    with pytest.raises(ValueError, match="expected 64 columns, found 128"):
        product(x)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("n", [1, 4, 130])
def test_no_plausible_number_comes_of_one_that_is_none(bad, n):
    rng = np.random.default_rng(8)
    x = rng.standard_normal((n, 256)).astype(np.float32)
    x[-1, 100] = bad
    for name in ("q8_0", "f16"):
        y = numba_backend.linear([random_tensor(name, 20, 256, rng)])(x)
        assert np.isfinite(y[:-1]).all()
        assert not np.isfinite(y[-1]).any()


@pytest.mark.parametrize(
    ("fine", "inputs"),
    [(False, activations.ANY), (True, activations.ANY), (False, Inputs("token"))]
    + [(False, Inputs("tensor", 0.03, zero)) for zero in (0, -90, 127)],
)
def test_activation_codes_are_the_twins(fine, inputs):
    rng = np.random.default_rng(7)
    x = (rng.standard_normal((7, 96)) * 10 ** rng.uniform(-3, 3, (7, 1))).astype(np.float32)
    x[0] = 0
    codes = np.empty(x.shape, np.int16 if fine else np.int8)
    scale = np.empty((7, 3, 1), np.float32)
    want, want_scale, want_sums = activations.quantize_numpy(x, fine, inputs)
    for parts, kind, zero in ((1, np.int32, 8), (2, np.int32, 128), (1, np.float32, 0)):
        sums = np.empty((7, 3 * parts, 1), kind)
        quantize_rows(x, codes, scale, sums, np.int32(zero), *activations.rule(inputs))
        of_groups = want_sums.reshape(7, 3 * parts, -1).sum(axis=2)
        kept = of_groups * want_scale if kind is np.float32 else -zero * of_groups
        np.testing.assert_array_equal(sums[:, :, 0], kept.astype(kind))
    planes = codes.view(np.int8).reshape(7, 3, -1, 32).astype(np.int16)
    codes = (planes[:, :, 0] * 256 + planes[:, :, 1] if fine else planes[:, :, 0]).reshape(7, 96)
    np.testing.assert_array_equal(codes, want)
    np.testing.assert_array_equal(scale[:, :, 0], want_scale)


def quantize_rows(x, codes, scale, sums, zero, given, shift):
    """Quantize every token by the compiled function."""
    for token in range(len(x)):
        activations.quantize_row(x, codes, scale, sums, zero, given, shift, token)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 5),
    head_dim=st.sampled_from([8, 16, 24, 64]),
    before=st.one_of(st.integers(0, 70), st.integers(500, 1200)),
    n=st.integers(1, 40),
    window=st.sampled_from([0, 0, 1, 5, 17, 300]),
    norms=st.booleans(),
    interleaved=st.booleans(),
)
def test_attention(seed, kv_heads, group, head_dim, before, n, window, norms, interleaved):
    kernel_checks.check_attention(
        np.random.default_rng(seed),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=head_dim,
        before=before,
        n=n,
        window=window,
        norms=norms,
        interleaved=interleaved,
        dims=head_dim if head_dim != 24 else 16,
    )


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    head_dim=st.sampled_from([24, 32, 64, 96, 256]),
    before=st.one_of(st.integers(1, 70), st.integers(500, 700)),
    more=st.integers(0, 70),
    window=st.sampled_from([0, 0, 1, 17, 300]),
    norms=st.booleans(),
    kind=st.sampled_from(["f32", numba_backend.CACHE_TYPES[0]]),
)
def test_attention_of_many_tokens(seed, kv_heads, group, head_dim, before, more, window, norms, kind):
    kernel_checks.check_attention(
        np.random.default_rng(seed),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=head_dim,
        before=before,
        n=numba_backend.FINE_TOKENS + more,
        window=window,
        norms=norms,
        kind=kind,
        tolerance=1e-4 if kind == "f32" else 4e-3,
    )


def test_attention_of_one_token_to_a_long_past_is_shared_out():
    rng = np.random.default_rng(11)
    kernel_checks.check_attention(rng, heads=9, kv_heads=3, head_dim=64, before=5000, n=1)
    kernel_checks.check_attention(rng, heads=4, kv_heads=1, head_dim=32, before=3000, n=1, window=1024)


@pytest.mark.parametrize("n", [1, 40, numba_backend.FINE_TOKENS + 3])
def test_attention_over_a_cache_of_q8_0(n):
    rng = np.random.default_rng(12)
    for head_dim in (32, 96):
        kernel_checks.check_attention(
            rng, heads=6, kv_heads=2, head_dim=head_dim, before=300, n=n, kind="q8_0", tolerance=0.03
        )


@pytest.mark.parametrize("window", [0, 300])
def test_attention_of_a_token_does_not_depend_on_its_company(window):
    rng = np.random.default_rng(13)
    spec = Heads(6, 2, 48, 0.2, window)
    qkv = rng.standard_normal((700, 10 * 48)).astype(np.float32)
    results = []
    for pieces in ([700], [1] * 700, [17, 3, 16, 500, 100, 1, 1, 2, 60]):
        cache = KVCache(1024, 2, 48, [rope(1024, 48, 10000.0, interleaved=True)])
        at, out = 0, []
        for n in pieces:
            cache.tokens.extend([0] * n)
            out.append(numba_backend.attention(qkv[at : at + n], [cache], 0, spec))
            at += n
        results.append(np.concatenate(out))
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


def test_gates_and_norms():
    kernel_checks.check_gates_and_norms(np.random.default_rng(2))


@kernel("void(f4[::1], f4[::1])")
def exp_of(x, out):
    for i in range(0, len(x), 16):
        simd.store(out, i, 0, simd.exp(simd.load(x, i)))


def test_exp():
    x = np.linspace(-87, 88, 16000).astype(np.float32)
    out = np.empty_like(x)
    exp_of(x, out)
    np.testing.assert_allclose(out, np.exp(x.astype(np.float64)), rtol=3e-7)
    edge = np.array([-np.inf, -1000, 0, -0.0, 1000, -104] + [0] * 10, np.float32)
    exp_of(edge, out)
    assert out[:2].max() < 1e-37
    assert (out[2:4] == 1).all()
    assert np.isfinite(out[4])


def test_processes_that_start_at_once_on_an_empty_cache(tmp_path):
    command = [sys.executable, kernel_checks.__file__, "q4_0", "f16"]
    env = os.environ | {"EDGEQ_CACHE": str(tmp_path)}
    running = [
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(3)
    ]
    for process in running:
        output = process.communicate()[0].decode()
        assert process.returncode == 0, output
    assert list(tmp_path.rglob("*.o"))


def test_kernels_of_several_processes_meet_in_one(tmp_path):
    # each numbers its types by itself, so that names of their functions are equal
    env = os.environ | {"EDGEQ_CACHE": str(tmp_path)}
    for names in (["tq1_0"], ["q4_0"], ["q8_0"], ["q8_0", "q4_0"]):
        done = subprocess.run(
            [sys.executable, kernel_checks.__file__, *names],
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]


def test_the_cache_folder_is_named_by_the_sources(tmp_path, monkeypatch):
    before = jit.folder()
    changed = tmp_path / "kernels"
    changed.mkdir()
    for source in jit.SOURCES.glob("*.py"):
        (changed / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(jit, "SOURCES", changed)
    assert jit.folder.__wrapped__() == before
    (changed / "simd.py").write_text("# another")
    assert jit.folder.__wrapped__() != before


def test_kernels_of_old_sources_are_deleted_after_a_month(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEQ_CACHE", str(tmp_path))
    old, recent = (tmp_path / "kernels" / name for name in ("old", "recent"))
    for other in (old, recent):
        other.mkdir(parents=True)
    os.utime(old, (0, 0))
    assert jit.folder.__wrapped__().is_dir()
    assert recent.exists()
    assert not old.exists()


def test_warmup_compiles_without_running(monkeypatch):
    monkeypatch.setattr(formats, "names", lambda: ("q4_0",))
    seen = []
    numba_backend.want_everything()
    numba_backend.ready(lambda stage, done, total: seen.append((stage, done, total)))
    assert all(stage.startswith("compiling kernels") for stage, _, _ in seen)
    product = numba_backend.linear([random_tensor("q4_0", 16, 64, np.random.default_rng(0))]).products[0]
    assert product.one.code
    assert product.many.code
    assert product.coarse.code
    assert matmul.TOKENS >= 1

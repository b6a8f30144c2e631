"""Gradients: each operation against differences in float64, whole networks against torch (see
tools/make_train_goldens.py).
"""

import json
from pathlib import Path

import numpy as np
import pytest

from edgeq import files
from edgeq.arch import huggingface
from edgeq.kernels.numpy_backend import ACTIVATIONS
from edgeq.kernels.rope import rope
from edgeq.train import tape
from edgeq.train.backend import Network
from edgeq.train.tape import Var

GOLDEN = Path(__file__).parent / "golden"
TORCH = json.loads((GOLDEN / "gradients.json").read_text())
TINY = sorted(p.name for p in (GOLDEN / "arch").iterdir() if p.is_dir())
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape)


def turned(interleaved):
    table = rope(6, 4, 100.0, interleaved=interleaved)
    return lambda x: tape.rotary(x, table.cos, table.sin, interleaved, 2)


IDS, WEIGHTS = np.array([2, 0, 2, 4]), np.array([0.5, 0, 2.0, 1.0], np.float32)
TEACHER = normal(4, 5).astype(np.float32)
OPERATIONS = {
    "add": (tape.add, [normal(3, 4), normal(3, 4)]),
    "add a row": (tape.add, [normal(3, 4), normal(1, 4)]),
    "mul": (tape.mul, [normal(3, 4), normal(3, 4)]),
    "mul by a row": (tape.mul, [normal(3, 4), normal(4)]),
    "mul by a number": (lambda x: x * 0.3, [normal(3, 4)]),
    "matmul": (tape.matmul, [normal(3, 4), normal(5, 4)]),
    "reshape": (lambda x: tape.reshape(x, 2, 6), [normal(3, 4)]),
    "part": (lambda x: tape.part(x, 1, 3), [normal(3, 4)]),
    "concatenate": (lambda x, y: tape.concatenate([x, y]), [normal(3, 4), normal(3, 2)]),
    "add_columns": (lambda x, y: tape.add_columns(x, 1, y), [normal(3, 4), normal(3, 2)]),
    "embedding": (lambda t: tape.embedding(t, IDS), [normal(5, 3)]),
    "rms_norm": (lambda x, g: tape.rms_norm(x, g, 1e-3), [normal(3, 4), normal(4)]),
    "rms_norm of heads": (lambda x, g: tape.rms_norm(x, g, 1e-3), [normal(3, 2, 4), normal(4)]),
    "gated by silu": (lambda x: tape.gated(x, "silu"), [3 * normal(3, 8)]),
    "gated by gelu": (lambda x: tape.gated(x, "gelu"), [3 * normal(3, 8)]),
    "rotary, interleaved": (turned(True), [normal(6, 3, 6)]),
    "rotary, halves": (turned(False), [normal(6, 3, 6)]),
    "attention": (lambda x: tape.attention(x, 1, 2, 2, 0.5), [normal(6, 6, 4)]),
    "attention of groups": (lambda x: tape.attention(x, 1, 6, 2, 0.5), [normal(6, 10, 4)]),
    "attention of sequences": (lambda x: tape.attention(x, 2, 2, 1, 0.5), [normal(6, 4, 4)]),
    "attention in a window": (lambda x: tape.attention(x, 1, 4, 2, 0.5, 3), [normal(9, 8, 4)]),
    "cross_entropy": (lambda x: tape.cross_entropy(x, IDS, WEIGHTS), [normal(4, 5)]),
    "divergence": (lambda x: tape.divergence(x, TEACHER, WEIGHTS), [normal(4, 5)]),
    "a sum that is used twice": (lambda x, y: tape.mul(s := tape.add(x, y), s), [normal(3, 4), normal(3, 4)]),
    "recompute": (lambda x: tape.recompute(lambda x: tape.mul(x, x), x), [normal(3, 4)]),
}


def product(y, g):
    return tape.total(tape.mul(y, g))


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_are_the_limits_of_differences(name, monkeypatch):
    monkeypatch.setattr(tape, "QUERIES", 4)  # attention in several blocks
    f, arguments = OPERATIONS[name]
    g = normal(*np.shape(f(*arguments)))
    variables = [Var(a) for a in arguments]
    tape.backward(product(f(*variables), g))
    for i, a in enumerate(arguments):
        estimate, step = np.empty_like(a), 1e-5
        for at in np.ndindex(a.shape):
            up, down = a.copy(), a.copy()
            up[at] += step
            down[at] -= step
            sides = [product(f(*arguments[:i], x, *arguments[i + 1 :]), g) for x in (up, down)]
            estimate[at] = (sides[0] - sides[1]) / (2 * step)
        np.testing.assert_allclose(variables[i].grad, estimate, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_keep_the_dtype_and_leave_their_arguments_alone(name):
    f, arguments = OPERATIONS[name]
    small = [a.astype(np.float32) for a in arguments]
    before = [a.copy() for a in small]
    variables = [Var(a) for a in small]
    y = f(*variables)
    tape.backward(y, np.ones_like(y.value))
    assert {y.value.dtype, *(v.grad.dtype for v in variables)} == {np.dtype("f4")}
    for a, b in zip(small, before, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_slopes_of_large_numbers_are_finite(name):
    x = Var(np.array([[-1e4, -90, 0, 90, 1e4] + 5 * [1.0]], np.float32))
    tape.backward(tape.total(tape.gated(x, name)))
    np.testing.assert_allclose(x.grad[0, :5], [0, 0, 0.5, 1, 1], atol=1e-6)


def test_what_needs_no_gradient_is_an_array_and_nothing_is_kept_for_it():
    assert isinstance(tape.matmul(normal(3, 4), normal(5, 4)), np.ndarray)
    x = normal(3, 4)
    y = tape.matmul(Var(x), normal(5, 4))
    ((_, pull),) = y.node.edges
    kept = [cell.cell_contents for cell in pull.__closure__]
    assert all(k.shape == (5, 4) for k in kept)


def test_gradients_add_up_until_they_are_taken():
    w = Var(np.ones((1, 2)))
    for _ in range(2):
        tape.backward(tape.total(tape.matmul(np.full((1, 2), 3.0), w)))
    np.testing.assert_array_equal(w.grad, [[6, 6]])


def learning(name, **options):
    path = GOLDEN / "arch" / name
    return Network(*files.read(path), path, **options), np.load(path / "golden.npz")


def loss_of(network, ids):
    weights = np.full(len(ids) - 1, 1 / (len(ids) - 1), np.float32)
    return tape.cross_entropy(network.head(network.hidden(ids[None, :-1])), ids[1:], weights)


@pytest.mark.parametrize("name", TINY)
def test_gradients_of_whole_networks_are_those_of_torch(name):
    network, golden = learning(name, trained=lambda name: not name.startswith("rope"))
    loss = loss_of(network, golden["ids"])
    tape.backward(loss)
    assert loss.value == pytest.approx(TORCH[name]["loss"], rel=1e-5)
    names = {v: k for k, v in network.module.HF_NAMES.items()}
    theirs = {huggingface.gguf_name(n, names): prints for n, prints in TORCH[name]["gradients"].items()}
    assert theirs.keys() == network.parameters.keys()
    for key, var in network.parameters.items():
        g, at = var.grad.reshape(-1).astype(np.float64), np.arange(var.grad.size)
        ours = [np.linalg.norm(g), g @ np.cos(at), g @ np.cos(0.1 * at)]
        np.testing.assert_allclose(ours, theirs[key], atol=2e-5 * theirs[key][0] + 1e-7, err_msg=key)


@pytest.mark.parametrize("name", TINY)
def test_logits_are_those_of_transformers(name):
    network, golden = learning(name)
    got = network.head(network.hidden(golden["ids"][None]))
    np.testing.assert_allclose(got, golden["logits"], atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_recomputed_layers_give_the_same_gradients_to_the_bit(name):
    found = []
    for again in (False, True):
        network, golden = learning(name, trained=lambda name: "attn" in name, again=again)
        tape.backward(loss_of(network, golden["ids"]))
        found.append({k: v.grad for k, v in network.parameters.items()})
    assert found[0].keys() == found[1].keys()
    for key, grad in found[0].items():
        np.testing.assert_array_equal(grad, found[1][key])


def test_sequences_of_a_batch_do_not_see_each_other():
    network, golden = learning("mistral")
    ids = golden["ids"][:48].reshape(2, 24)
    both = network.hidden(ids)
    each = np.concatenate([network.hidden(row[None]) for row in ids])
    np.testing.assert_allclose(both, each, atol=1e-5)


def test_weights_that_are_not_held_go_through_panels(monkeypatch):
    from edgeq.train import backend

    monkeypatch.setattr(backend, "PANEL", 1000)
    found = []
    for hold in (True, False):
        network, golden = learning("llama", trained=lambda name: "norm" in name, hold=hold)
        tape.backward(loss_of(network, golden["ids"]))
        found.append(network.parameters["blk.0.attn_norm.weight"].grad)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4, atol=1e-7)

"""The command line, as it is typed."""

import inspect
import io
import json
import re
import select
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import pytest
from gguf_bytes import model as gguf_model

import edgeq
from edgeq import cli, formats, memory
from edgeq.cli import _bench_kernels, _console, _model, bench, chat, run
from edgeq.errors import EdgeqError
from edgeq.kernels import limits, simd
from edgeq.sample import Sampling

COMMAND = [sys.executable, "-m", "edgeq"]
FRANCE = "What is the capital of France?"


class Result(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """A function that does in this process what typing `edgeq` and these words would do."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # main replaces it

    def type_in(*words: object, stdin: str = "") -> Result:
        monkeypatch.setattr(sys, "argv", ["edgeq", *map(str, words)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return Result(caught.value.code or 0, *capsys.readouterr())

    return type_in


Typed = Callable[..., Result]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A GGUF file of a llama with one layer, and a name that would turn a terminal red."""
    tensors = {
        "token_embd.weight": np.zeros((32, 64), np.float32),
        "output_norm.weight": np.ones(64, np.float32),
    }
    tensors["blk.0.ffn_up.weight"] = (2, (64, 64), bytes(64 * 36))  # Q4_0
    numbers = {
        "block_count": 1,
        "context_length": 100,
        "embedding_length": 64,
        "feed_forward_length": 64,
        "attention.head_count": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }
    meta = {f"llama.{key}": value for key, value in numbers.items()}
    meta |= {"general.architecture": "llama", "general.name": "\x1b[31mred", "tokenizer.chat_template": "x"}
    meta |= {"tokenizer.ggml.tokens": [f"t{i}" for i in range(32)]}
    path = tmp_path / "tiny.gguf"
    path.write_bytes(gguf_model(meta, tensors))
    return path


# Usage and errors


def test_version(typed: Typed) -> None:
    assert typed("--version") == (0, f"edgeq, version {edgeq.__version__}\n", "")


def test_every_verb_has_help(typed: Typed) -> None:
    for verb in cli.edgeq.list_commands(click.Context(cli.edgeq)):
        assert typed(verb, "--help").out.startswith(f"Usage: edgeq {verb} ")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["run"], "there is no prompt"),
        (["run", "-p", "a", "-f", __file__], "-p and -f"),
        (["run", "a", "b", "c"], "in quotes"),
        (["run", "-m", "m", "a", "b"], "in quotes"),
        (["run", "--temp", "-1", "hello"], "--temp"),
        (["run", "-l", "12", "hello"], "15043+1"),
        (["run", "--backend", "cuda", "hello"], "numba"),
        (["chat", "a", "-m", "b"], "twice"),
        (["bench", "-p", "1,x"], "1,x"),
        (["bench", "-d", "-1"], "less than 0"),
        (["bench", "-b", "0"], "less than 1"),
        (["bench", "-p", "0", "-n", "0"], "nothing to measure"),
        (["bench", "--formats", "q4_0"], "--formats needs --kernels"),
        (["bench", "--kernels", "-m", "smollm2"], "-m does not go with --kernels"),
        (["bench", "--kernels", "--formats", "q4_0,q9"], "unknown format 'q9'"),
        (["rm"], "MODEL"),
    ],
)
def test_wrong_usage(typed: Typed, words: list[str], says: str) -> None:
    result = typed(*words)
    assert (result.status, result.out) == (2, "")
    assert says in result.err


def test_an_error_is_one_line(typed: Typed, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"\x1b[31m is no model")
    result = typed("run", path, "hello")
    assert (result.status, result.out) == (1, "")
    assert result.err.startswith(f"edgeq: {path}: ")
    assert result.err.count("\n") == 1
    assert "\x1b" not in result.err
    assert typed("run", tmp_path / "y.gguf", "hello").status == 1


def test_debugging_shows_where_an_error_comes_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGEQ_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["edgeq", "inspect", str(tmp_path / "x.gguf")])
    with pytest.raises(EdgeqError):
        cli.main()


def test_warnings_are_one_line() -> None:
    code = "import sys, warnings; from edgeq import cli; cli.edgeq = lambda **k: None\n"
    code += "cli.edgeq.main = lambda **k: warnings.warn('look out'); cli.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "edgeq: look out\n")


# What the words mean


@pytest.mark.parametrize(
    ("words", "model", "prompt", "expected"),
    [
        (["Hello"], None, None, (None, "Hello")),
        (["smollm2"], None, None, ("smollm2", None)),
        (["hf:who/what"], None, None, ("hf:who/what", None)),
        (["nowhere.gguf"], None, None, ("nowhere.gguf", None)),
        (["smollm2", "Hello"], None, None, ("smollm2", "Hello")),
        (["mistyped", "Hello"], None, None, ("mistyped", "Hello")),
        (["smollm2"], "m", None, ("m", "smollm2")),
        (["m"], None, "Hello", ("m", "Hello")),
        ([], "m", "Hello", ("m", "Hello")),
        (["smollm2", "-"], None, None, ("smollm2", "-")),
    ],
)
def test_words(words: list[str], model: str | None, prompt: str | None, expected: tuple) -> None:
    assert run.split_words(words, model, prompt) == expected


def test_the_prompt_s_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_text("from a file\n\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("from stdin\n"))
    assert run.read_prompt(None, tmp_path / "f") == "from a file\n"
    assert run.read_prompt("given", None) == "given"
    assert run.read_prompt("-", None) == "from stdin"


def test_options_have_the_names_of_the_python_interface() -> None:
    stream = set(inspect.signature(edgeq.LLM.stream).parameters) | set(Sampling.__annotations__)
    assert {option.name for option in _model.SAMPLING} == stream - {
        "self", "prompt", "sampling", "logprobs", "progress",
    }  # fmt: skip
    load = set(inspect.signature(edgeq.load).parameters)
    own = {"chat_template_file", "check_tensors", "force", "verbose"}
    assert {option.name for option in _model.LOADING} - own == load - {"name_or_path", "check", "progress"}


def test_options_have_the_defaults_of_the_python_interface() -> None:
    command = run.command.make_context("run", ["hello"])
    given = _model.pick(command.params, _model.SAMPLING)
    functions = (edgeq.LLM.stream, edgeq.sample.make_sampler)
    defaults = {n: p.default for f in functions for n, p in inspect.signature(f).parameters.items()}
    assert {name: value or None for name, value in given.items()} == {
        name: defaults[name] or None for name in given
    }


def test_llama_cpp_s_words_for_none() -> None:
    words = ["x", "-n", "-2", "-s", "-1", "-c", "0", "-t", "-1", "-l", "5-inf", "-l", "6+.5"]
    given = run.command.make_context("run", words).params
    assert [given[name] for name in ("max_tokens", "seed", "ctx", "threads")] == [None] * 4
    assert given["logit_bias"] == {5: -np.inf, 6: 0.5}


# Models and files


def test_the_cache(typed: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEQ_CACHE", str(tmp_path))

    def listed(name: str) -> str:
        return next(row for row in typed("list").out.splitlines() if row.split()[:1] == [name])

    assert "yes" not in listed("smollm2")
    assert "yes" in listed("nano")  # lies in models/
    assert typed("rm", "smollm2").status == 1
    entry = edgeq.catalog.entries()["smollm2"]
    (tmp_path / "models" / "smollm2").mkdir(parents=True)
    with open(tmp_path / "models" / "smollm2" / entry.file, "wb") as f:
        f.truncate(entry.size)
    assert "yes" in listed("smollm2")
    result = typed("pull", "smollm2")
    assert result.status == 1
    assert "sha256" in result.err
    assert typed("rm", "smollm2") == (0, "", "removed smollm2, 93.8 MiB\n")


def test_inspect(typed: Typed, file: Path) -> None:
    result = typed("inspect", file)
    assert (result.status, result.err) == (0, "")
    assert "\x1b" not in result.out
    for text in (
        "[31mred",
        "bits per weight",
        "blk.0.ffn_up.weight",
        "64 x 64",
        "q4_0",
        "context of 100 tokens",
    ):
        assert text in result.out


def test_inspect_for_programs(typed: Typed, file: Path) -> None:
    found = json.loads(typed("inspect", file, "--json").out)
    assert found["architecture"] == "llama"
    assert found["parameters"] == 32 * 64 + 64 + 64 * 64
    assert found["formats"] == {"f32": 4 * (32 * 64 + 64), "q4_0": 64 * 36}
    assert found["bits_per_weight"] == round(8 * found["bytes"] / found["parameters"], 4)
    assert found["memory"]["cache"] >= 2 * 100 * 64 * 2
    assert found["memory"]["total"] == sum(
        found["memory"][part] for part in ("weights", "program", "cache", "work")
    )
    assert found["chat_template_sha256"] == "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    assert found["metadata"]["tokenizer.ggml.tokens"] == {"length": 32, "first": [f"t{i}" for i in range(8)]}
    assert found["tensors"][2] == {
        "name": "blk.0.ffn_up.weight", "format": "q4_0", "shape": [64, 64], "bytes": 64 * 36,
    }  # fmt: skip
    full = json.loads(typed("inspect", file, "--json", "--full").out)
    assert len(full["metadata"]["tokenizer.ggml.tokens"]) == 32


def test_inspect_what_edgeq_does_not_run(typed: Typed, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_model({"general.architecture": "mamba"}, {}))
    found = json.loads(typed("inspect", path, "--json").out)
    assert (found["memory"], found["bits_per_weight"]) == (None, None)


def test_doctor(typed: Typed) -> None:
    found = json.loads(typed("doctor", "--json").out)
    assert found["edgeq"] == edgeq.__version__
    assert found["available_memory"] == pytest.approx(memory.available(), rel=0.5)
    assert found["path"] in typed("doctor").out


# Progress and safe text


def test_progress_shows_what_takes_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_console, "PATIENCE", 0.01)
    with _console.progress() as report:
        report("short", 0, 2)
        report("short", 2, 2)
        report("long", 0, 2)
        time.sleep(0.2)
        report("long", 1, 2)
        report("longer", 1 << 20, 3 << 20)
        time.sleep(0.2)
    assert capsys.readouterr() == ("", "long, 0 / 2 ...\nlonger, 1.0 / 3.0 MiB ...\n")


def test_logs_tell_from_time_to_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_console, "PATIENCE", 0.01)
    monkeypatch.setattr(_console, "LOG_EVERY", 0.0)
    with _console.progress() as report:
        report("long", 0, 1000)
        time.sleep(0.2)
        report("long", 1, 1000, "PPL 2")
        report("long", 1000, 1000, "PPL 3")
    first, second = capsys.readouterr().err.splitlines()
    assert first == "long, 0 / 1000 ..."
    assert re.fullmatch(r"long, 1 / 1000, PPL 2, 0:0\d:\d\d left ...", second)


def test_text_cannot_steer_the_terminal() -> None:
    assert _console.printable("a\x1b[2Jb\x9bc\x7f\r\n\td é 漢") == "a[2Jbc\n\td é 漢"


@pytest.mark.parametrize(
    ("typed_lines", "messages"),
    [
        ("one\ntwo\n", ["one", "two"]),
        ('"""\none\n\ntwo\n"""\nthree\n', ["one\n\ntwo", "three"]),
        ("one\\\ntwo\n", ["one\ntwo"]),
        ('"""\n"""\nx', ["", "x"]),
        ("one\\\n", []),
    ],
)
def test_messages_of_several_lines(
    monkeypatch: pytest.MonkeyPatch, typed_lines: str, messages: list[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed_lines))
    assert list(iter(chat.read_message, None)) == messages


# With a model


def test_a_model_that_does_not_fit_is_refused(
    typed: Typed, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available", lambda: 1 << 20)
    result = typed("run", file, "hello")
    assert result.status == 1
    assert "1.0 MiB are available" in result.err
    assert "tensor" in typed("run", file, "hello", "--force").err  # it has too few


def test_weights_that_are_no_numbers_are_refused_on_request(typed: Typed, file: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[:-36] + b"\xff" * 36)  # the last block's scale becomes NaN
    result = typed("run", file, "hello", "--check-tensors")
    assert result.status == 1
    assert "blk.0.ffn_up.weight" in result.err


@pytest.mark.model
def test_run(typed: Typed, smollm2_path: Path) -> None:
    result = typed("run", FRANCE, "-n", 24, "--temp", 0)
    assert result.status == 0
    assert "Paris" in result.out
    assert result.out.count("\n") == 1
    assert typed("run", "smollm2", "-n", 24, "--temp", 0, stdin=FRANCE + "\n")[:2] == result[:2]
    assert typed("run", "-f", "-", "-n", 24, stdin="x").status == 2


@pytest.mark.model
def test_a_run_is_told_about(typed: Typed, smollm2_path: Path) -> None:
    result = typed("run", smollm2_path, FRANCE, "-n", 4, "-v", "-sys", "Be brief.", "-c", 128)
    for text in ("memory: weights", "context of 128 tokens", "prompt: ", "answer: 4 tokens", "tokens/s"):
        assert text in result.err


@pytest.mark.model
def test_guesses_are_told_about(typed: Typed, smollm2_path: Path) -> None:
    words = ["run", "--raw", "a b c d e f a b c d e f a b c", "-n", 9, "--temp", 0]
    plain, guessed = typed(*words), typed(*words, "--prompt-lookup", 4, "-v")
    assert guessed.out == plain.out
    assert re.search("prompt lookup: [1-9] of [1-9] guesses were right", guessed.err)


@pytest.mark.model
def test_the_same_seed_gives_the_same_text(typed: Typed, smollm2_path: Path) -> None:
    texts = [typed("run", "Hello", "-n", 8, "--temp", 2, "-s", seed).out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.model
def test_raw_text_goes_on_as_in_transformers(typed: Typed, smollm2_path: Path, shared: Path) -> None:
    golden = json.loads((shared / "data" / "golden" / "smollm2.json").read_text())["cases"][0]
    result = typed("run", golden["prompt"], "--raw", "--temp", 0, "-n", 4)
    assert golden["greedy_text"].startswith(result.out.removesuffix("\n"))


@pytest.mark.model
def test_options_out_of_range_are_wrong_usage(typed: Typed, smollm2_path: Path) -> None:
    for words in (["-c", 1 << 20], ["-l", "999999+1"], ["-n", 0]):
        result = typed("run", *words, "hello")
        assert (result.status, result.out) == (2, "")
        assert "expected" in result.err
    assert typed("run", "-c", 8, "hello").status == 1  # ContextFull


@pytest.mark.model
def test_chat(typed: Typed, smollm2_path: Path) -> None:
    lines = ["", "/nonsense", FRANCE, "/stats", "/clear", "/system", "/help", "/exit", "never said"]
    result = typed("chat", "-n", 16, "--temp", 0, "-sys", "You know all capitals.", stdin="\n".join(lines))
    assert result.status == 0
    assert "Paris" in result.out
    assert result.out.count("\n") == 1
    for text in ("no /nonsense", "of 4096 tokens", "/system TEXT"):
        assert text in result.err


@pytest.mark.model
def test_a_conversation_is_remembered(smollm2_path: Path) -> None:
    with edgeq.load(smollm2_path) as llm:
        talk = chat.Conversation(llm, "Be brief.", {"max_tokens": 3, "seed": 1}, verbose=False)
        talk.answer("Hello")
        assert [m["role"] for m in talk.messages] == ["system", "user", "assistant"]
        talk.options["max_tokens"] = 10_000
        talk.answer("This cannot be answered at that length")
        assert [m["role"] for m in talk.messages] == ["system", "user", "assistant"]
        talk.begin(None)
        assert talk.messages == []


@pytest.mark.model
def test_bench(typed: Typed, smollm2_path: Path) -> None:
    words = ["bench", "-p", 8, "-n", 2, "-d", "0,4", "-b", "1,3", "-r", 2, "-t", 1]
    found = json.loads(typed(*words, "--json").out)
    tests = ["pp8", "pp8 @ d4", "tg2", "tg2 x3", "tg2 @ d4", "tg2 x3 @ d4"]
    assert [row["test"] for row in found] == tests
    for row in found:
        tokens = row["n_prompt"] + row["n_gen"] * row["n_sequences"]
        assert row["samples_ts"] == pytest.approx([1e9 * tokens / ns for ns in row["samples_ns"]])
        assert row["avg_ts"] == pytest.approx(np.mean(row["samples_ts"]))
        assert row["stddev_ts"] == pytest.approx(np.std(row["samples_ts"], ddof=1))
        assert (row["n_threads"], row["model_filename"]) == (1, str(smollm2_path))
    table = bench.markdown(bench.model_rows(found)).splitlines()
    assert len({len(line) for line in table}) == 1
    assert table[0].split("|")[1].strip() == "model"


def test_bench_of_kernels(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, small in (("STREAMED", 1 << 16), ("ROWS", 256), ("TOKENS", 3)):
        monkeypatch.setattr(_bench_kernels, name, small)
    monkeypatch.setattr(limits, "BYTES", limits.BYTES // 8201)
    words = ["bench", "--kernels", "--formats", "q4_0,f16", "-r", 1, "-t", "1,2"]
    found = json.loads(typed(*words, "--json").out)
    assert [(row["format"], row["n_threads"]) for row in found] == [
        ("q4_0", 1), ("f16", 1), ("q4_0", 2), ("f16", 2),
    ]  # fmt: skip
    for row in found:
        assert row["bits_per_weight"] == {"q4_0": 4.5, "f16": 16}[row["format"]]
        assert row["path"] == simd.PATH.name
        assert row["one_share"] == row["one_gbs"] / row["read_gbs"] > 0
        assert row["many_share"] == row["many_gmacs"] / row["multiply_gmacs"] > 0
    result = typed(*words[:-2], "-t", "1")
    table = result.out.splitlines()
    assert len({len(line) for line in table}) == 1
    assert [line.split()[1] for line in table[2:]] == ["q4_0", "f16"]


@pytest.mark.parametrize("name", formats.names())
def test_kernels_are_measured_on_ordinary_weights(name: str) -> None:
    weights = formats.dequantize(_bench_kernels.matrix(name))
    assert np.isfinite(weights).all()
    assert weights.std() > 0
    assert np.abs(weights[weights != 0]).min() > np.finfo(np.float32).tiny


# Signals and pipes


@pytest.mark.model
def test_ctrl_c_ends_a_run(smollm2_path: Path) -> None:
    words = ["run", "Tell me a story.", "-n", "2000"]
    with subprocess.Popen(COMMAND + words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
    assert b"Traceback" not in err


@pytest.mark.model
def test_a_pipe_that_closes_ends_a_run_quietly(smollm2_path: Path) -> None:
    words = ["run", "Tell me a story.", "-n", "2000"]
    with subprocess.Popen(COMMAND + words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 1
    assert b"rror" not in err


@pytest.mark.model
def test_ctrl_c_ends_an_answer_and_not_the_chat(smollm2_path: Path) -> None:
    on_a_terminal = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    words = [sys.executable, "-c", on_a_terminal, *COMMAND, "chat", "--temp", "0"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:

        def press(keys: bytes, until: bytes) -> None:
            """Type keys, again and again, until the terminal shows a text."""
            seen = b""
            while until not in seen:
                process.stdin.write(keys)
                while until not in seen and select.select([process.stdout], [], [], 1)[0]:
                    piece = process.stdout.read(4096)
                    assert piece, "the chat has ended"
                    seen += piece

        press(b"", until=b"> ")
        press(b"Tell me a very long story about a dragon.\n", until=b"dragon.\r\n")
        press(b"\x03", until=b"> ")
        press(b"\x03", until=b"leaves")
        press(b"/stats\n", until=b"of 4096 tokens")
        process.stdin.write(b"/exit\n")
        process.communicate()
    assert process.returncode == 0

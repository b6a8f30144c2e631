"""LLM: a model, its tokenizer and its chat template, for programs that want text.

    llm = edgeq.load("smollm2")
    llm.generate("Once upon a time", max_tokens=32)
    for piece in llm.stream("Once upon a time"): print(piece, end="", flush=True)
    llm.chat([{"role": "user", "content": "Hello"}])
    llm.generate(["Once upon a time", "In the beginning"], max_tokens=32)   # together, in less time

Threads: any number may use one LLM, and any number of its streams may be open. One computes at a time, and
the turn is free again after each token (and each chunk of a prompt), so a stream that nobody reads stops no
other. Each open stream has a cache of its own. When it ends, the cache waits for the next stream, which
computes only what its prompt does not share with the last one: a chat that grows is read once.
"""

import operator
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack, cast, overload

import numpy as np

from . import arch, catalog, files, template, tokenizer
from .arch import Model
from .arch.weights import Progress
from .chat import chat_ids
from .errors import ContextFull, EdgeqError
from .generate import Continuation, Token, generate, reuse
from .generate.batch import Batch
from .generate.lookup import MOST, Lookup
from .generate.stream import Stops, Stream, Timings, alone
from .kernels.cache import KVCache
from .sample import Sampling, make_sampler
from .tensor import Tensor
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .train.applied import Adapters

Prompt = str | Sequence[int]
Prompts = list[str] | tuple[str, ...] | Sequence[Sequence[int]]  # a str is a Sequence[str], too
Conversation = Sequence[Mapping[str, Any]]
DEFAULT_CTX = 4096  # the whole context that today's models allow would be gigabytes of cache
PARALLEL = 8  # prompts at once


class Options(Sampling, total=False):
    """The options of `LLM.stream`, for functions that pass them on."""

    max_tokens: int | None
    stop: str | Sequence[str]
    logprobs: int | None
    context_shift: bool
    keep: int
    prompt_lookup: int
    progress: Progress | None


class LLM:
    """A model that writes; `edgeq.load` makes one from a name or a path.

    Parameters
    ----------
    model, tokenizer : from ``arch.load`` and ``tokenizer.load``.
    ctx : most tokens of a sequence; None takes the model's own limit, but no more than 4096.
    chat_template : Jinja source, the name of a built-in template (``"chatml"``), or the Path of a file; None
        takes the tokenizer's.

    Attributes
    ----------
    tokenizer, ctx, chat_template : as given, with defaults filled in.
    timings : of the latest generation, of several prompts together; each `Stream` has its own, too.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        *,
        ctx: int | None = None,
        chat_template: str | Path | None = None,
    ) -> None:
        limit = model.config.context_length
        ctx = min(limit, DEFAULT_CTX) if ctx is None else ctx
        if not 1 <= ctx <= limit:
            raise ValueError(f"ctx is {ctx}, expected 1 to {limit}, the model's own limit")
        if isinstance(chat_template, Path) or chat_template in template.names():
            chat_template = template.load(str(chat_template))
        self.tokenizer, self.ctx = tokenizer, ctx
        self.chat_template = tokenizer.chat_template if chat_template is None else chat_template
        self.timings = Timings()
        self._model: Model | None = model
        self._idle: deque[KVCache] = deque(maxlen=1)

    def __repr__(self) -> str:
        return f"<LLM {self.config.name}, context {self.ctx}>" if self._model else "<LLM, closed>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the weights and of the cache; what is called afterwards raises EdgeqError."""
        self._model = None
        self._idle = deque(maxlen=0)  # where the caches of open streams go when they end

    @property
    def model(self) -> Model:
        """The model itself: ``model(ids, cache) -> logits``."""
        if self._model is None:
            raise EdgeqError("this LLM has been closed")
        return self._model

    @property
    def threads(self) -> int:
        """Threads that compute."""
        return self.model.threads

    @property
    def config(self) -> Any:
        """Shape of the model: name, layers, dim, heads, vocab_size, context_length, ..."""
        return self.model.config

    def use_lora(self, adapters: "Adapters") -> None:
        """Take other adapters, without loading the model again; streams that are open must have ended.

        Parameters
        ----------
        adapters : a folder as PEFT writes it or a GGUF file, with a scale or without: ``"pirate"``,
            ``("pirate", 0.5)``, or a list of such. Of several, all are added. An empty list takes all away.
        """
        from .train import applied

        applied.load(self.model, adapters)
        self._idle.clear()  # keys and values of the tokens in there were others

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Ids of a text, see `Tokenizer.encode`."""
        return self.tokenizer.encode(text, add_special=add_special, parse_special=parse_special)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        return self.tokenizer.decode(ids)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits of the next token after each of these, float32 (len(ids), vocab)."""
        if len(ids) > self.ctx:
            raise ContextFull(
                f"{len(ids)} tokens do not fit the context of {self.ctx}; load with a larger ctx"
            )
        return self.model(ids, self.model.new_cache(len(ids)), "all")

    @overload
    def generate(self, prompt: Prompt, *, parallel: int = ..., **options: Unpack[Options]) -> str: ...

    @overload
    def generate(self, prompt: Prompts, *, parallel: int = ..., **options: Unpack[Options]) -> list[str]: ...

    def generate(
        self, prompt: Prompt | Prompts, *, parallel: int = PARALLEL, **options: Unpack[Options]
    ) -> str | list[str]:
        """Go on with a text, or with each of several, and return what was added.

        The options are those of `stream`, and of `streams` for several.
        """
        if _several(prompt):
            answers = self.streams(cast(Prompts, prompt), parallel=parallel, **options)
            return ["".join(answer) for answer in answers]
        return "".join(self.stream(cast(Prompt, prompt), **options))

    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        logprobs: int | None = None,
        context_shift: bool = False,
        keep: int = 0,
        prompt_lookup: int = 0,
        progress: Progress | None = None,
        **sampling: Unpack[Sampling],
    ) -> Stream:
        """Go on with a text, and give what is added as it comes.

        Parameters
        ----------
        prompt : text, in which names of special tokens mean nothing, or token ids.
        max_tokens : end after this many; None goes on until the model ends, or the context is full.
        stop : text, or texts, that end the answer and are no part of it.
        logprobs : None, or how many alternatives to record with each token in ``Stream.tokens``, with the
            log-probabilities that the model gives before any sampling option.
        context_shift : when the context is full, forget the older half of what comes after the first `keep`
            tokens, and go on.
        keep : tokens of the prompt that a shift never forgets; -1 for all. BOS is always kept.
        prompt_lookup : up to how many tokens to guess ahead from the text so far, at most 15; 0 guesses none.
            The answer is the same. It comes sooner the more it repeats, and a little later if it does not.
        progress : called with (stage, done, total) while the prompt is computed.
        **sampling : temperature, top_k, seed, ...: see ``sample.make_sampler``.

        Raises
        ------
        ContextFull
            The prompt, or the prompt and `max_tokens` without `context_shift`, exceed the context.
        """
        ids = self.tokenize(prompt) if isinstance(prompt, str) else list(map(operator.index, prompt))
        if not ids:
            raise ValueError("the prompt has no tokens")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}, expected at least 1, or None")
        if logprobs is not None and logprobs < 0:
            raise ValueError(f"logprobs is {logprobs}, expected at least 0, or None")
        if not 0 <= prompt_lookup <= MOST:
            raise ValueError(f"prompt_lookup is {prompt_lookup}, expected 0 to {MOST}")
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in stop:
            raise ValueError("a stop string is empty: it would end every answer before it begins")
        kept = None
        if context_shift:
            kept = len(ids) if keep < 0 else min(max(keep, self.tokenizer.add_bos), len(ids))
        self._check_room(len(ids), max_tokens, kept)
        sampler = make_sampler(**sampling)
        begin = partial(Continuation, sampler=sampler, max_tokens=max_tokens, keep=kept, logprobs=logprobs)
        answer = Stream(self.tokenizer, ids, Stops(stop), begin)

        def tokens(cache: KVCache) -> Generator[Token, None, None]:
            step = Lookup(self._compute, ids, prompt_lookup, answer.timings) if prompt_lookup else None
            return generate(self._compute, begin(cache), ids[cache.length :], step=step, progress=progress)

        answer.follow(alone(answer, self._cache(ids, self._idle), tokens))
        self.timings = answer.timings
        return answer

    def streams(
        self, prompts: Prompts, *, parallel: int = PARALLEL, **options: Unpack[Options]
    ) -> list[Stream]:
        """Go on with several texts, which are computed together: a step loads each weight once for all.

        Parameters
        ----------
        prompts : texts, or token ids of each.
        parallel : how many to compute at once; when one ends, the next takes its place.
        **options : those of `stream` for each, but `seed` may be as many numbers as there are prompts, and
            `progress` is called with ("answers", done, total). Prompt lookup is for one prompt.

        Returns
        -------
        list of Stream
            In the order of the prompts. Reading one goes on with all of them. With the same seed, the text of
            each is the one that its prompt would get alone.
        """
        if parallel < 1:
            raise ValueError(f"parallel is {parallel}, expected at least 1")
        if options.get("prompt_lookup"):
            raise ValueError("prompt_lookup is for one prompt: several share their steps already")
        progress, seed = options.pop("progress", None), options.pop("seed", None)
        seeds = seed if isinstance(seed, Sequence) else [seed] * len(prompts)
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts")
        answers: list[Stream] = []
        for prompt, options["seed"] in zip(cast(Sequence[Prompt], prompts), seeds, strict=True):
            try:
                answers.append(self.stream(prompt, **options))
            except (ContextFull, ValueError) as error:
                raise type(error)(f"prompt {len(answers)}: {error}") from None
        idle: deque[KVCache] = deque()
        batch = Batch(
            answers,
            self._compute,
            lambda ids, caches: self.model.step(ids, caches),
            lambda ids: self._cache(ids, idle),
            parallel,
            progress,
        )
        self.timings = batch.timings
        return answers

    def _compute(self, *arguments: Any) -> np.ndarray:
        """What `model` computes, as long as this is open."""
        return self.model(*arguments)

    @overload
    def chat(
        self,
        messages: Conversation,
        *,
        stream: Literal[False] = ...,
        parallel: int = ...,
        variables: Mapping[str, Any] | None = ...,
        **options: Unpack[Options],
    ) -> str: ...

    @overload
    def chat(
        self,
        messages: Conversation,
        *,
        stream: Literal[True],
        parallel: int = ...,
        variables: Mapping[str, Any] | None = ...,
        **options: Unpack[Options],
    ) -> Stream: ...

    @overload
    def chat(
        self,
        messages: Sequence[Conversation],
        *,
        stream: Literal[False] = ...,
        parallel: int = ...,
        variables: Mapping[str, Any] | None = ...,
        **options: Unpack[Options],
    ) -> list[str]: ...

    @overload
    def chat(
        self,
        messages: Sequence[Conversation],
        *,
        stream: Literal[True],
        parallel: int = ...,
        variables: Mapping[str, Any] | None = ...,
        **options: Unpack[Options],
    ) -> list[Stream]: ...

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        *,
        stream: bool = False,
        parallel: int = PARALLEL,
        variables: Mapping[str, Any] | None = None,
        **options: Unpack[Options],
    ) -> str | Stream | list[str] | list[Stream]:
        """Answer a conversation, or each of several.

        Parameters
        ----------
        messages : ``{"role": "user", "content": "Hello"}`` and so on, oldest first. Names of special tokens
            in them are plain text to the model. A list of conversations gets a list of answers.
        stream : return a `Stream` instead of the whole answer.
        parallel : how many conversations to answer at once.
        variables : more for the chat template to see, such as ``{"enable_thinking": False}``.
        **options : those of `stream`, and of `streams` for several.
        """
        if self.chat_template is None:
            raise EdgeqError("this model has no chat template; load it with chat_template=...")
        several = _several(messages)
        talks = cast(Sequence[Conversation], messages if several else [messages])
        prompts = [chat_ids(self.tokenizer, self.chat_template, m, **(variables or {})) for m in talks]
        if several:
            answers = self.streams(prompts, parallel=parallel, **options)
            return answers if stream else ["".join(answer) for answer in answers]
        answer = self.stream(prompts[0], **options)
        return answer if stream else "".join(answer)

    def _check_room(self, prompt: int, max_tokens: int | None, keep: int | None) -> None:
        """Raise ContextFull for a generation that cannot be finished as it was asked for."""
        advice = f"load with a larger ctx (the model allows {self.config.context_length})"
        if prompt > self.ctx:
            raise ContextFull(f"the prompt has {prompt} tokens, the context holds {self.ctx}; {advice}")
        if keep is not None and keep >= self.ctx:
            raise ContextFull(
                f"{keep} tokens are to be kept in a context of {self.ctx}; keep fewer, or {advice}"
            )
        # the last token of an answer is not computed, so it needs no room
        if keep is None and max_tokens is not None and prompt + max_tokens - 1 > self.ctx:
            raise ContextFull(
                f"a prompt of {prompt} tokens and max_tokens {max_tokens} exceed the context of {self.ctx}; "
                f"ask for fewer tokens, {advice}, or pass context_shift=True"
            )

    @contextmanager
    def _cache(self, ids: Sequence[int], idle: deque[KVCache]) -> Iterator[KVCache]:
        """A cache for one stream, cut to what it has of a prompt: one left behind, or else a new one."""
        try:
            cache = idle.pop()
        except IndexError:
            cache = self.model.new_cache(self.ctx)
        try:
            reuse(cache, ids)
            yield cache
        finally:
            idle.append(cache)


def _several(prompts: Any) -> bool:
    """Whether this is a list of prompts or of conversations, and not one."""
    return len(prompts) > 0 and not isinstance(prompts, str) and isinstance(prompts[0], Sequence | np.ndarray)


def load(
    name_or_path: str | os.PathLike[str],
    *,
    backend: Literal["numba", "numpy"] = "numba",
    threads: int | None = None,
    ctx: int | None = None,
    cache_type_k: Literal["f32", "f16", "q8_0"] | None = None,
    cache_type_v: Literal["f32", "f16", "q8_0"] | None = None,
    chat_template: str | Path | None = None,
    unknown_pre: str | None = None,
    lora: "Adapters" = (),
    check: Callable[[Path, dict[str, Any], dict[str, Tensor]], None] | None = None,
    progress: Progress | None = None,
) -> LLM:
    """Load a model.

    Parameters
    ----------
    name_or_path : a name in the catalog (``"smollm2"``), ``"hf:user/repo"``, an https address, a .gguf file,
        or a Hugging Face folder. What is not on this machine is fetched once.
    backend : "numba" is fast; "numpy" is exact, in float32 from the unpacked weights.
    threads : threads that compute; None takes one for each core.
    ctx : most tokens of a sequence; None takes the model's own limit, but no more than 4096. The cache takes
        memory as it fills.
    cache_type_k, cache_type_v : what keys and values are kept as; None takes "f16", for the numpy backend
        "f32". "q8_0" takes half the memory of "f16", and its heads must be multiples of 32 numbers.
    chat_template : Jinja source, the name of a built-in template (``"gemma"``), or the Path of a file, to use
        instead of the model's own.
    unknown_pre : the pre-tokenizer to go on with where a GGUF file names one that edgeq does not know, see
        ``tokenizer.from_gguf``.
    lora : adapters to begin with, see `LLM.use_lora`.
    check : called with (path, metadata, tensors) when these have been read; an exception refuses the model.
    progress : called with (stage, done, total) while the model is fetched, prepared and compiled.

    Returns
    -------
    LLM

    Raises
    ------
    ModelNotFound
        Nothing goes by that name, or it could not be fetched.
    FormatError
        The file is damaged, or of a kind that edgeq does not run.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}, expected at least 1, or None")
    path = catalog.resolve(name_or_path, progress)
    meta, tensors = files.read(path)
    if check is not None:
        check(path, meta, tensors)
    model = arch.load(
        meta,
        tensors,
        backend=backend,
        path=path,
        threads=threads,
        cache_types=(cache_type_k, cache_type_v),
        progress=progress,
        release=files.release,
    )
    if path.is_dir():
        words = tokenizer.from_huggingface(path)
    else:
        words = tokenizer.from_gguf(meta, path, unknown_pre=unknown_pre)
    llm = LLM(model, words, ctx=ctx, chat_template=chat_template)
    if lora:
        llm.use_lora(lora)
    return llm

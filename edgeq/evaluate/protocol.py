"""Which tokens of a text are scored, and what the model sees before each.

Perplexities of one model on one text differ by tens of percent between the ways to measure in use, so no
number means anything without its protocol:

    llama.cpp   chunks of 512 tokens; a model that begins texts with BOS sees it in place of each chunk's
                first token; the second half of a chunk is scored, so that all see at least 256 tokens
    gptq        the text's lines joined by blank ones, chunks of 2048 tokens, all but each one's first scored;
                the protocol of the papers on GPTQ, AWQ, OmniQuant, and with 4096 tokens of AQLM and QuIP#

Chunks do not overlap, and what is left at the end of the text is not read.
"""

import hashlib
import io
from dataclasses import dataclass

import numpy as np

from ..errors import EdgeqError
from ..tokenizer import Tokenizer

CTX = {"llama.cpp": 512, "gptq": 2048}  # tokens of a chunk, unless it is said otherwise
LEAST_CTX = 8


@dataclass(frozen=True)
class Protocol:
    """How a text was measured: numbers compare where all of this is the same.

    Attributes
    ----------
    name : "llama.cpp" or "gptq".
    text_sha256 : of the text in UTF-8, before any joining.
    text_tokens : tokens of the whole text.
    ctx, chunks : tokens of a chunk, and chunks that were read.
    first_scored : position, from 0, of the first token of a chunk that is scored; so are all after it.
    bos : where the model saw BOS: "each chunk", "text" (at its beginning) or "none".
    """

    name: str
    text_sha256: str
    text_tokens: int
    ctx: int
    chunks: int
    first_scored: int
    bos: str

    @property
    def scored(self) -> int:
        """Tokens scored in all."""
        return self.chunks * (self.ctx - self.first_scored)


def cut(
    text: str, tokenizer: Tokenizer, name: str, ctx: int | None = None, chunks: int | None = None
) -> tuple[Protocol, np.ndarray]:
    """The chunks of a text to read, int64 (chunks, ctx); all that it has, or the first `chunks`."""
    if name not in CTX:
        raise ValueError(f"unknown protocol {name!r}; there are {', '.join(CTX)}")
    ctx = CTX[name] if ctx is None else ctx
    if ctx < LEAST_CTX:
        raise ValueError(f"ctx is {ctx}, expected at least {LEAST_CTX}")
    if chunks is not None and chunks < 1:
        raise ValueError(f"chunks is {chunks}, expected at least 1, or None")
    sha256 = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    ids = np.array(tokenizer.encode(joined_lines(text) if name == "gptq" else text), np.int64)
    whole = len(ids) // ctx
    if not whole:
        raise EdgeqError(
            f"the text has {len(ids)} tokens, and a chunk takes {ctx}: take more, or smaller ones"
        )
    chunks = min(whole, chunks or whole)
    windows = ids[: chunks * ctx].reshape(chunks, ctx)
    bos = "none"
    if tokenizer.bos_id is not None and tokenizer.add_bos:
        bos = "text"
        if name == "llama.cpp":
            bos, windows[:, 0] = "each chunk", tokenizer.bos_id
    first_scored = ctx // 2 + 1 if name == "llama.cpp" else 1
    return Protocol(name, sha256, len(ids), ctx, chunks, first_scored, bos), windows


def joined_lines(text: str) -> str:
    """A text as the papers read it: a data set of lines, empty if blank, joined by two newlines."""
    return "\n\n".join(line if line.strip() else "" for line in io.StringIO(text))

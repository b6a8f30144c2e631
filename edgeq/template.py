"""Chat templates: messages to the text that a model was trained to answer.

render        messages through the Jinja source of a template, as Transformers does it
load          the source of a built-in template by its name (templates/NAME.jinja), or of a file
fingerprint   a short hash, to tell whether two files bring the same template
"""

import hashlib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from .sandbox import MAX_SOURCE, SECONDS, UNITS, UNITS_FOR_INPUT, Meter, Sandbox, TemplateError, weigh

__all__ = ["TemplateError", "fingerprint", "load", "names", "render"]


def render(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    bos_token: str = "",
    eos_token: str = "",
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """Text of a conversation, up to where the answer begins.

    Parameters
    ----------
    source : Jinja source, which need not be trusted: see `edgeq.sandbox` for what it may do, and how much.
    messages : the conversation: ``{"role": "user", "content": "Hello"}``, ... Some templates also
        take a list of parts for content.
    bos_token, eos_token : what the tokens that begin and end a text are written as.
    add_generation_prompt : end with the beginning of an answer.
    variables : more for the template to see, such as ``tools`` or ``enable_thinking``.

    Raises
    ------
    TemplateError : when the template is wrong, asks for too much, or refuses the messages.
    """
    if len(source) > MAX_SOURCE:
        raise TemplateError(f"the chat template has {len(source):,} characters, more than {MAX_SOURCE:,}")
    for i, message in enumerate(messages):
        _check(i, message)
    context = {"tools": None, "documents": None} | _plain({"messages": list(messages), **variables})
    context |= {
        "bos_token": bos_token,
        "eos_token": eos_token,
        "add_generation_prompt": add_generation_prompt,
    }
    environment = Sandbox(Meter(UNITS + UNITS_FOR_INPUT * weigh(context), SECONDS))
    try:
        return environment.from_string(source).render(context)
    except TemplateError:
        raise
    except jinja2.TemplateSyntaxError as e:
        raise TemplateError(f"the chat template is wrong in line {e.lineno}: {e.message}") from None
    except RecursionError:
        raise TemplateError("the chat template goes too deep") from None
    except Exception as e:  # any, as it is somebody else's program
        raise TemplateError(f"the chat template failed: {e}") from e


def names() -> list[str]:
    """Names of the built-in templates."""
    folder = files(__package__).joinpath("templates")
    return sorted(file.name.removesuffix(".jinja") for file in folder.iterdir())


def load(template: str) -> str:
    """Source of a built-in template by its name, or of the template in a file by its path."""
    if template in names():
        return files(__package__).joinpath("templates", f"{template}.jinja").read_text(encoding="utf-8")
    try:
        return Path(template).read_text(encoding="utf-8")
    except (OSError, ValueError) as e:
        known = ", ".join(names())
        raise TemplateError(
            f"no chat template {template!r}: edgeq has {known}, and it is no file: {e}"
        ) from e


def fingerprint(source: str) -> str:
    """The first 12 hexadecimal digits of a template's SHA-256."""
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def _check(i: int, message: object) -> None:
    """TemplateError unless this is a message."""
    if not isinstance(message, Mapping):
        raise TemplateError(f"message {i}: {type(message).__name__}, not a dict with role and content")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise TemplateError(f"message {i}: the role is {role!r}, not a name such as 'user'")
    if not isinstance(content, str | list | tuple) and not (content is None and "tool_calls" in message):
        raise TemplateError(
            f"message {i}: the content is {type(content).__name__}, not text or a list of parts"
        )


def _plain(value: Any) -> Any:
    """The value rebuilt from plain types, so that a template meets no method of anything else."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    raise TemplateError(f"a chat template cannot be given a value of type {type(value).__name__}")

"""Jinja for templates that nobody has read: what they may use, and how much of it.

A chat template is a program that comes with a model, from whoever made the file. It runs in Jinja's immutable
sandbox, with the filters and methods named below and no others, and all that it makes is charged to a Meter:

    turns of loops      one unit and the literal text in the loop, each turn
    values              their characters and items, down to the last, when an expression makes them
    output              the same, for what is written, also inside of macros
    growth in one step  x * n, replace, join, indent, format: before it happens, as it could fill the memory

So a template ends within SECONDS or a little more, and holds a few bytes for each of its UNITS at the most.
"""

import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import wraps
from string import Formatter
from typing import Any

import jinja2.filters
import jinja2.tests
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.runtime import BlockReference, Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from .errors import EdgeqError

SECONDS = 5.0
UNITS = 8_000_000
UNITS_FOR_INPUT = 100  # more units for each one in the messages
MAX_SOURCE = 1 << 16  # characters of a template; the largest in use have a quarter of it

FILTERS = """
abs capitalize count d default dictsort e escape first float int items last length list lower map max min
reject rejectattr reverse safe select selectattr sort string title trim truncate unique upper wordcount
"""
TEXT_METHODS = """
capitalize casefold count endswith find format index isalnum isalpha isascii isdecimal isdigit islower
isnumeric isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex
rpartition rsplit rstrip split splitlines startswith strip swapcase title upper
"""
METHODS = {
    str: TEXT_METHODS.split(),
    dict: ["get", "items", "keys", "values"],
    list: ["count", "index"],
    tuple: ["count", "index"],
    int: [],
    float: [],
}


class TemplateError(EdgeqError):
    """A chat template is wrong, asks for too much, or refuses the messages; the message says which."""


class Meter:
    """What a template may still spend."""

    def __init__(self, units: int, seconds: float) -> None:
        self.left, self.seconds = units, seconds
        self.deadline = time.monotonic() + seconds

    def spend(self, units: int) -> None:
        self.left -= max(units, 0)  # templates can have a hand in the number
        if self.left < 0:
            raise TemplateError("the chat template makes too much text")
        if time.monotonic() > self.deadline:
            raise TemplateError(f"the chat template takes longer than {self.seconds:g} seconds")


def weigh(value: Any, limit: float = math.inf) -> int:
    """Units of a value with all that is in it; any number above the limit where it is beyond that."""
    total, stack = 0, [value]
    while stack and total <= limit:
        v = stack.pop()
        total += len(v) if isinstance(v, str) else 8
        if isinstance(v, dict):
            stack += v
            stack += v.values()
        elif isinstance(v, list | tuple):
            stack += v
    return total


class Sandbox(ImmutableSandboxedEnvironment):
    """A Jinja environment that charges a meter for what a template makes; for one template, rendered once."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, meter: Meter) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # nothing is computed before the meter runs
            finalize=self._written,
            extensions=[loopcontrols, _Generation],
        )
        self.meter, self.literal = meter, 0
        self.filters = {name: self._metered(jinja2.filters.FILTERS[name]) for name in FILTERS.split()} | {
            "indent": self._indent,
            "join": self._join,
            "replace": self._replace,
            "tojson": self._tojson,
            "_made": self._made,
            "_turns": self._turns,
        }
        self.tests = {name: self._metered(test) for name, test in jinja2.tests.TESTS.items()}
        self.globals = {
            "range": self.globals["range"],
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),  # not the class, which has methods
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    # What the template is made of, as Jinja asks for it.

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        self.literal = _literal(tree)
        return _Metered().visit(tree)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        allowed = next((names for kind, names in METHODS.items() if isinstance(obj, kind)), None)
        return super().is_safe_attribute(obj, attr, value) and (allowed is None or attr in allowed)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for items, times in ((left, right), (right, left)):
                if isinstance(items, str | list | tuple) and isinstance(times, int):
                    self.meter.spend(weigh(items, self.meter.left) * max(times, 0))
        elif operator == "**" and not (isinstance(right, int | float) and abs(right) <= 64):
            raise SecurityError("** with an exponent above 64")
        elif operator == "%" and isinstance(left, str):
            raise SecurityError("% of a string")
        value = super().call_binop(context, operator, left, right)
        if isinstance(value, int) and value.bit_length() > 64:
            raise SecurityError("a number of more than 64 bits")
        return self._made(value)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        method = getattr(obj, "__wrapped__", obj)  # Jinja wraps str.format
        text, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(obj, Macro | BlockReference):
            self.meter.spend(1 + self.literal)
        elif isinstance(text, str) and args:
            if name == "replace":
                return self._replace(text, *args)
            if name == "join":
                return self._join(args[0], text)
            if name in ("format", "format_map"):
                if any(spec or conversion for _, _, spec, conversion in Formatter().parse(text)):
                    raise SecurityError("a format with more than the place of a value")
                self.meter.spend(text.count("{") * sum(len(str(v)) for v in (*args, *kwargs.values())))
        return self._made(super().call(context, obj, *args, **kwargs))

    # What the template makes, charged.

    @jinja2.pass_context  # which also keeps constants from being written at compile time
    def _written(self, context: Context, value: Any) -> Any:
        return self._made(value)

    def _made(self, value: Any) -> Any:
        self.meter.spend(weigh(value, self.meter.left))
        return value

    def _turns(self, values: Iterable[Any], literal: int) -> Iterator[Any]:
        for value in values:
            self.meter.spend(1 + literal)
            yield value

    def _metered(self, function: Any) -> Callable[..., Any]:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            return self._made(function(*args, **kwargs))

        return run

    # The filters that make much from little: charged first.

    def _replace(self, text: Any, old: Any, new: Any, count: int | None = None) -> str:
        text, old, new = str(text), str(old), str(new)
        self.meter.spend(len(text) + text.count(old) * len(new))
        return text.replace(old, new, -1 if count is None else count)

    def _join(self, values: Iterable[Any], d: Any = "", attribute: str | int | None = None) -> str:
        texts: list[str] = []
        for value in values if attribute is None else map(make_attrgetter(self, attribute), values):
            texts.append(str(value))
            self.meter.spend(len(texts[-1]) + len(str(d)))
        return str(d).join(texts)

    def _indent(self, text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        text = str(text)
        self.meter.spend(
            len(text) + (1 + len(text.splitlines())) * (len(width) if isinstance(width, str) else width)
        )
        return jinja2.filters.do_indent(text, width, first, blank)

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        if indent is not None and (len(indent) if isinstance(indent, str) else indent) > 16:
            raise SecurityError("JSON with an indent above 16")
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        return "".join(map(self._made, encoder.iterencode(value)))


class _Metered(NodeTransformer):
    """Puts the meter where Jinja would not ask: around loops, and what is made without a call."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.recursive:
            raise TemplateError("the chat template has a recursive loop")
        literal = _literal(node)
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_turns", nodes.Const(literal))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        return _filtered(self.generic_visit(node), "_made")

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        sliced = isinstance(node.arg, nodes.Slice)
        self.generic_visit(node)
        return _filtered(node, "_made") if sliced else node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return _filtered(self.generic_visit(node), "_made")

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return _filtered(self.generic_visit(node), "_made")

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "_made") if node.ctx == "load" else node


def _filtered(node: Any, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


def _literal(node: nodes.Node) -> int:
    """Characters of literal text under a node: as much as one run through it can write of that."""
    return sum(len(data.data) for data in node.find_all(nodes.TemplateData))


class _Generation(Extension):
    """``{% generation %}``, with which templates mark answers for training: here it changes nothing."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Namespace(Namespace):
    """Jinja's, without names that reach into Python, and without writing out what it holds."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self = args[0]
        Namespace.__init__(self)
        for name, value in dict(*args[1:], **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace with {name!r}")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"


def _raise_exception(message: object) -> None:
    raise TemplateError(f"the chat template refuses: {message}")


def _strftime_now(format: str) -> str:
    if re.search(r"%[^a-zA-Z]*\d", format):
        raise SecurityError("a date with a width")
    return datetime.now().strftime(format)

"""Chat templates: what Transformers renders, and what a hostile template cannot do.

golden/templates.json has the texts and says who made them.
"""

import json
import time
import tracemalloc
from pathlib import Path

import pytest

from edgeq import template
from edgeq.errors import EdgeqError

GOLDEN = json.loads((Path(__file__).parent / "golden" / "templates.json").read_text(encoding="utf-8"))
MESSAGES, BUILT_IN = GOLDEN["messages"], GOLDEN["built in"]


def render(source, messages=MESSAGES, **variables):
    return template.render(source, messages, bos_token="<s>", eos_token="</s>", **variables)


@pytest.mark.parametrize("name", GOLDEN["templates"])
def test_what_transformers_renders(name):
    golden = GOLDEN["templates"][name]
    assert render(golden["source"], tools=GOLDEN["tools"]) == golden["text"]


def test_without_the_beginning_of_an_answer():
    source = template.load("chatml")
    assert render(source, MESSAGES[:1], add_generation_prompt=False) == "<|im_start|>user\n Hi\n<|im_end|>\n"


def test_built_in_templates():
    texts = {name: render(template.load(name), BUILT_IN["messages"]) for name in template.names()}
    assert texts == BUILT_IN["texts"]


def test_the_date():
    assert render("{{ strftime_now('%Y-%m') }}") == time.strftime("%Y-%m")


def test_load_takes_a_file_and_names_the_built_in_ones(tmp_path):
    (tmp_path / "own.jinja").write_text("{{ messages | length }}")
    assert render(template.load(str(tmp_path / "own.jinja"))) == "3"
    with pytest.raises(template.TemplateError, match="'chatnl': edgeq has chatml, gemma"):
        template.load("chatnl")


def test_fingerprint():
    assert template.fingerprint("") == "e3b0c44298fc"  # the beginning of SHA-256 of nothing


def test_the_templates_own_message_reaches_the_user():
    with pytest.raises(template.TemplateError, match="Conversation roles must alternate user/assistant"):
        render(GOLDEN["templates"]["gemma"]["source"], MESSAGES[:1] * 2)
    assert issubclass(template.TemplateError, EdgeqError)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\nb{% if %}", "line 2"),
        ("{{ 'open", "line 1"),
        ("{{ nothing.here }}", "'nothing' is undefined"),
        ("{{ 1 // 0 }}", "division"),
        ("{% include 'x' %}", "no loader"),
        ("{{ 'a' | shout }}", "No filter named 'shout'"),
        ("x" * 100_000, "100,000 characters"),
    ],
)
def test_wrong_templates_are_errors(source, message):
    with pytest.raises(template.TemplateError, match=message):
        render(source)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (["hi"], "message 0: str"),
        ([MESSAGES[0], {"role": "user"}], "message 1: the content is NoneType"),
        ([{"content": "x"}], "message 0: the role is None"),
        ([{"role": "user", "content": b"x"}], "message 0: the content is bytes"),
        ([{"role": "user", "content": "x", "image": object()}], "type object"),
    ],
)
def test_wrong_messages_are_errors(messages, message):
    with pytest.raises(template.TemplateError, match=message):
        render("x", messages)


def test_a_call_needs_no_content():
    messages = [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    assert render("{{ messages[0].tool_calls[0].name }}", messages) == "f"


def test_templates_meet_plain_values_only():
    class Text(str):
        def format(self, *args):
            return "reached"

    assert render("{{ messages[0].content.format(1) }}", [{"role": "user", "content": Text("{}")}]) == "1"


# What would go on for a very long time, or fill the memory, without the meter: values that grow in each turn,
GROW = "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = VALUE %}{% endfor %}{{ ns.x }}"
GROWING = [
    "ns.x ~ ns.x",
    "ns.x + ns.x",
    "ns.x * 2",
    "ns.x | replace('a', ns.x)",
    "ns.x.replace('', ns.x)",
    "ns.x.join(ns.x)",
    "ns.x | join(ns.x)",
    "('{0}' * 99).format(ns.x)",
    "[ns.x, ns.x]",
    "(ns.x, ns.x)",
    "{'a': ns.x, 'b': ns.x}",
    "dict(a=ns.x, b=ns.x)",
    "[ns.x] * 2",
    "[ns.x] + [ns.x]",
    "m(ns.x)",
]
# or something else.
X = "{% set x = 'a' * 4000000 %}"
GREEDY = [
    *("{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}" + GROW.replace("VALUE", value) for value in GROWING),
    "{{ 'a' * 10**10 }}",
    "{{ [1] * 9999999999 }}",
    "{{ 10**10**10 }}",
    "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "{% for a in range(100000) %}{% for b in range(100000) %}{{ 'a' | upper }}{% endfor %}{% endfor %}",
    "{% for a in range(100000) %}{% for b in range(100000) %}" + "x" * 10000 + "{% endfor %}{% endfor %}",
    X + "{% set ns = namespace(y=[]) %}{% for i in range(999) %}{% set ns.y = ns.y + [x[1:]] %}{% endfor %}",
    X + "{% macro m() %}{% for i in range(999) %}{{ x }}{% endfor %}{% endmacro %}{{ m() }}",
    X + "{% set y %}{% for i in range(999) %}{{ x }}{% endfor %}{% endset %}",
    X + "{{ ([x] * 99999) | join }}",
    X + "{{ x[1:] ~ 'b' in [x] * 99999 }}",
    X + "{{ range(99999) | map(attribute='no', default=x) | list | length }}",
    "{% set x = range(99999) | list %}{{ range(99999) | map('string') | select('in', x) | list }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(99) }}",
    "{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "{% block b %}{{ self.b() }}{{ self.b() }}{% endblock %}",
    "{% for m in messages recursive %}{{ loop(messages) }}{{ loop(messages) }}{% endfor %}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '%9999999999d' | format(1) }}",
    "{{ 'a'.center(9999999999) }}",
    "{{ 'a\t'.expandtabs(9999999999) }}",
    "{{ (1).to_bytes(9999999999, 'big') }}",
    "{{ 'a\nb' | indent(9999999999) }}",
    "{{ 'a' | indent(-9999999999) }}{{ 'a' * 9999999 }}",
    "{{ [1] | batch(9999999999, 1) | list }}",
    "{{ 1 | round(999999999, 'floor') }}",
    "{{ [1] | tojson(indent=999999999) }}",
    "{{ lipsum(9999999) }}",
    "{{ strftime_now('%999999999Y') }}",
    "{% autoescape 10**10**10 %}{% endautoescape %}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ 1" + " + 1" * 2000 + " }}",
]


@pytest.mark.parametrize("source", GREEDY, ids=range(len(GREEDY)))
def test_greedy_templates_are_stopped(source, monkeypatch):
    monkeypatch.setattr(template, "SECONDS", 0.3)
    tracemalloc.start()
    try:
        with pytest.raises(template.TemplateError):
            render(source)
        assert tracemalloc.get_traced_memory()[1] < 200_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages | attr('__class__') }}",
        "{{ messages | map(attribute='__class__') | map(attribute='__mro__') | list }}",
        "{{ raise_exception.__globals__['__builtins__'] }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ namespace(__class__=1) }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
    ],
)
def test_nothing_of_python_is_in_reach(source):
    with pytest.raises(template.TemplateError):
        render(source)


def test_long_conversations_are_no_greed():
    messages = [
        {"role": "user", "content": "word " * 2000},
        {"role": "assistant", "content": "x" * 10_000},
    ] * 50
    text = render(template.load("llama3"), messages)  # a megabyte
    assert text.count("<|eot_id|>") == 100

"""The comparison as one page of HTML: a table, three pictures, and how all of it was measured.

The page has no script, and loads nothing from anywhere. Every number in it is one of the JSON's, in an
attribute data-value, or of a picture's point in data-x and data-y, as it was measured.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from .chart import COLORS, Axis, Point, Series, axis, chart

Row = Mapping[str, Any]

HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>"""

END = "</main>\n</body>\n</html>\n"


class Column(NamedTuple):
    """A column of the table.

    Attributes
    ----------
    title, unit : of the heading.
    key : where a row has its value, with dots; of an estimate both that and its error are shown.
    scale, digits : what a value is multiplied with to be shown, and decimals.
    best : `min` or `max`, where one of them is best.
    """

    title: str
    unit: str
    key: str
    scale: float = 1
    digits: int = 2
    best: Callable[..., float] | None = None


KLD, SAME = "estimates.kld_mean", "estimates.same_top"
SIZE = Column("Size", "MB", "bytes", 1e-6, 1, min)
SPEED = Column("Answer", "tokens/s", "decode", 1, 1, max)
COLUMNS = (
    SIZE,
    Column("Bits", "per weight", "bits_per_weight", 1, 2),
    Column("Perplexity", "", "estimates.ppl", 1, 2),
    Column("KL divergence", "mean", KLD, 1, 4, min),
    Column("Same top token", "%", SAME, 100, 1, max),
    Column("Δ probability", "RMS, %", "estimates.dp_rms", 100, 2, min),
    Column("Weight error", "RMS, %", "weight_error", 100, 2, min),
    Column("Prompt", "tokens/s", "prefill", 1, 0, max),
    SPEED,
    Column("Peak memory", "MB", "peak_memory", 1e-6, 0, min),
    Column("Quantized in", "s", "quantize_seconds", 1, 1),
)

MEANINGS = {
    "Perplexity": "how many tokens the model hesitates between, on average; lower predicts the text better.",
    "KL divergence": "how far its probabilities of all next tokens are from the base's, averaged over the "
    "scored tokens; 0 is the base itself.",
    "Same top token": "how often it finds the same next token most probable as the base.",
    "Δ probability": "root mean square change of the probability of the right token.",
    "Weight error": "root mean square difference of its matrices from the base's, relative to their size.",
    "Prompt, answer": "tokens a second that it reads at once, and that it makes one by one.",
    "Peak memory": "the most that the process held which measured the speed, Python included.",
}


def page(about: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The page of a `Comparison`."""
    base, models = rows[0], sorted(rows[1:], key=lambda row: value(row, KLD))
    colors = {row["name"]: i for i, row in enumerate(models)}
    title = f"{base['name']}: what quantizing costs"
    style = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    sections = {
        "All numbers": table(base, models, colors),
        "Quality against size": quality_against(base, models, colors, SIZE, "Size (MB)"),
        "Quality against speed": quality_against(base, models, colors, SPEED, "Speed of answers (tokens/s)"),
        "Where the error lies": by_layer(models, colors),
        "How to read this": definitions(MEANINGS),
        "How it was measured": measured(about, rows),
    }
    body = [f"<h2>{heading}</h2>\n{content}" for heading, content in sections.items()]
    head = [HEAD.format(title=escape(title), style=style), f"<h1>{escape(title)}</h1>"]
    return "\n".join([*head, summary(about, base, models), glance(base, models), *body, END])


def summary(about: Mapping[str, Any], base: Row, models: Sequence[Row]) -> str:
    """What was measured, where and how."""
    machine, how = about["machine"], about["protocol"]
    told = [
        f"{len(models)} quantized {'model' if len(models) == 1 else 'models'} beside {base['name']} of "
        f"{base['parameters'] / 1e6:,.3g} million weights",
        f"{machine['cpu']}, {machine['threads']} threads",
        f"{Path(about['text']).name}, {how['name']} protocol, {how['scored']:,} tokens scored",
        f"edgeq {about['edgeq_version']}, {about['date'][:10]}",
    ]
    return f'<p class="soft">{escape(" · ".join(told))}</p>'


def estimate(row: Row, key: str) -> tuple[float, float] | None:
    """The number that a row has there and its error, 0 where it has none; None for no number."""
    found: Any = row
    for part in key.split("."):
        found = None if found is None else found.get(part)
    if isinstance(found, Mapping):
        return None if found["value"] is None else (found["value"], found["error"] or 0.0)
    return None if found is None else (found, 0.0)


def value(row: Row, key: str) -> float:
    """The number that a row has there; infinity for none."""
    return (estimate(row, key) or (math.inf, 0.0))[0]


def glance(base: Row, models: Sequence[Row]) -> str:
    """What to know if one reads no further."""
    closest = min(models, key=lambda row: value(row, KLD))
    smallest = min(models, key=lambda row: value(row, SIZE.key))
    fastest = max(models, key=lambda row: value(row, SPEED.key))
    times_smaller = value(base, SIZE.key) / value(smallest, SIZE.key)
    times_faster = value(fastest, SPEED.key) / value(base, SPEED.key)
    told = (
        ("closest", closest, f"the base's top token in {100 * value(closest, SAME):.1f} % of places"),
        ("smallest", smallest, f"{times_smaller:.1f} times smaller than the base"),
        ("fastest to answer", fastest, f"{times_faster:.1f} times as fast as the base"),
    )
    items = [
        f"<li><span>{what}</span><b>{escape(row['name'])}</b><span>{how}</span></li>"
        for what, row, how in told
    ]
    return f'<ul class="glance">{"".join(items)}</ul>'


def table(base: Row, models: Sequence[Row], colors: Mapping[str, int]) -> str:
    """A row for each model, the base first, then by distance from it."""
    heads = [f'<th scope="col">{c.title}<small>{c.unit}</small></th>' for c in COLUMNS]
    best = {}
    for c in COLUMNS:
        known = [found[0] for row in models if (found := estimate(row, c.key))]
        best[c.key] = c.best(known) if c.best and len(known) > 1 else None
    lines = []
    for row in (base, *models):
        name, ill = (
            escape(row["name"]),
            "".join(f'<span class="ill">{escape(p)}</span>' for p in row["problems"][:3]),
        )
        if row is base:
            lines.append(f'<tr class="base"><th scope="row">{name}{ill}</th>')
        else:
            dot = f'<i class="key c{colors[row["name"]] % COLORS}"></i>'
            lines.append(f'<tr><th scope="row">{dot}{name}{ill}</th>')
        lines += [cell(c, estimate(row, c.key), None if row is base else best[c.key]) for c in COLUMNS]
        lines.append("</tr>")
    return "\n".join(
        [
            '<div class="scroll"><table>',
            "<caption>The base, then its quantizations, closest first. The best of each column is marked. "
            "± is the standard error. Speeds are medians, ± the standard deviation of the runs.</caption>",
            f'<thead><tr><th scope="col">Model</th>{"".join(heads)}</tr></thead>',
            f"<tbody>{''.join(lines)}</tbody></table></div>",
        ]
    )


def cell(c: Column, found: tuple[float, float] | None, best: float | None) -> str:
    """A number, and its error."""
    if found is None:
        return "<td>–</td>"
    shown, off = (f"{x * c.scale:,.{c.digits}f}" for x in found)
    more = f" <small>± {off}</small>" if found[1] else ""
    kind = ' class="best"' if found[0] == best else ""
    return f'<td{kind} data-key="{c.key}" data-value="{found[0]!r}">{shown}{more}</td>'


def quality_against(
    base: Row, models: Sequence[Row], colors: Mapping[str, int], across: Column, title: str
) -> str:
    """KL divergence on the way up, size or speed across, and the models that no other one beats in both."""
    points = {}
    for row in models:
        (x, dx), (y, dy) = estimate(row, across.key) or (0.0, 0.0), estimate(row, KLD) or (0.0, 0.0)
        tip = f"{row['name']}: KL divergence {y:.4g}, {x * across.scale:,.1f} {across.unit}"
        points[row["name"]] = Point(x * across.scale, y, tip, (dx * across.scale, dy))
    at_base = value(base, across.key) * across.scale
    reach = [x for p in points.values() for x in (p.x - p.error[0], p.x + p.error[0])]
    sign = 1 if across.best is min else -1
    front: list[Point] = []
    for p in sorted(points.values(), key=lambda p: (sign * p.x, p.y)):
        if not front or p.y < front[-1].y:
            front.append(p)
    drawn = chart(
        f"KL divergence from {base['name']} against {title.partition(' (')[0].lower()}",
        "; ".join(p.tip for p in points.values()),
        axis(title, [*reach, at_base]),
        divergences([p.y for p in points.values()]),
        [Series(name, colors[name], [p]) for name, p in points.items()],
        frontier=front,
        marks=[(at_base, f"base: {base['name']}")],
    )
    return figure(
        drawn,
        f"Lower and further to the {'left' if sign > 0 else 'right'} is better. The line joins the models "
        "that no other one beats in both. The dotted one is the base, whose divergence is 0.",
    )


def divergences(values: Sequence[float]) -> Axis:
    """A logarithmic axis; a model that is the base itself lies at its low end."""
    positive = [v for v in values if v > 0] or [1.0]
    found = axis("Mean KL divergence from the base (nats)", positive, log=True)
    return found._replace(low=found.low / 2) if min(values, default=1) <= 0 else found


def by_layer(models: Sequence[Row], colors: Mapping[str, int]) -> str:
    """Relative error of the matrices of each layer."""
    present = {layer for row in models for layer, e in row["layers"].items() if e}
    if not present:
        return "<p>No matrix differs from the base's.</p>"
    numbers = sorted(int(layer) for layer in present if layer.isdigit())
    order = [name for name in ("embedding", *map(str, numbers), "output") if name in present]
    series = []
    for row in models:
        points = [
            Point(i, 100 * e, f"{row['name']}, {'layer ' * layer.isdigit()}{layer}: {100 * e:.3g} %")
            for i, layer in enumerate(order)
            if (e := row["layers"].get(layer))
        ]
        series += [Series(row["name"], colors[row["name"]], points, line=True)] * bool(points)
    every = max(1, math.ceil(len(numbers) / 12))
    short = {"embedding": "emb.", "output": "out"}
    # the name of the embedding takes the room of the first layer's number where layers are narrow
    shown = {*short, *map(str, numbers if every == 1 else numbers[every::every])}
    labels = [(i, short.get(n, n)) for i, n in enumerate(order) if n in shown]
    heights = [p.y for s in series for p in s.points]
    drawn = chart(
        "Relative error of the weights of each layer",
        "; ".join(f"{row['name']}: {100 * row['weight_error']:.3g} % overall" for row in models),
        Axis("Layer", -0.5, len(order) - 0.5, labels=labels),
        axis("Relative error of the weights (%)", heights, log=max(heights) > 8 * min(heights), zero=True),
        series,
    )
    return figure(
        drawn,
        "Root mean square difference of all matrices of a layer from the base's, relative to their size. "
        "Peaks are layers that got fewer bits, or that are harder to round.",
    )


def figure(drawn: str, caption: str) -> str:
    """A picture and what it shows."""
    return f"<figure>{drawn}<figcaption>{caption}</figcaption></figure>"


def definitions(terms: Mapping[str, str]) -> str:
    """Terms and what they mean."""
    return f"<dl>{''.join(f'<dt>{escape(t)}</dt><dd>{escape(m)}</dd>' for t, m in terms.items())}</dl>"


def measured(about: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The protocol, the machine, hashes, and the commands that give all numbers again."""
    p, speed = about["protocol"], about["speed"]
    facts = {
        "Text": f"{about['text']}, {p['text_tokens']:,} tokens, sha256 {p['text_sha256']}",
        "Protocol": f"{p['name']}: {p['chunks']} chunks of {p['ctx']} tokens, tokens {p['first_scored']} to "
        f"{p['ctx'] - 1} of each scored, {p['scored']:,} in all; BOS: {p['bos']}",
        "Speed": f"a prompt of {speed['prompt']} tokens and an answer of {speed['gen']}, "
        f"{speed['repetitions']} times in each of {speed['rounds']} rounds, in which all models take turns",
        "Machine": f"{about['machine']['cpu']}, {about['machine']['threads']} threads",
        "Measured": f"{about['date']}, edgeq {about['edgeq_version']}",
    }
    for row in rows:
        files = [f"{name} {digest}" for name, digest in row["sha256"].items()]
        facts[row["name"]] = f"{row['path']}; sha256 {', '.join(files[:3])}" + (
            " …" if len(files) > 3 else ""
        )
    commands = "\n".join(escape(c) for row in rows for c in row["commands"])
    return (
        f"{definitions(facts)}\n<details><summary>Commands that give every number again</summary>"
        f"<pre>{commands}</pre></details>"
    )

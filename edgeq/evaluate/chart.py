"""Pictures as SVG, drawn with a few lines of our own: points, lines, axes that are linear or logarithmic.

Colors and fonts are classes, which the page that holds a picture gives their meaning, for light and for dark
screens. Each point tells its numbers when the pointer rests on it, and to programs as data-x and data-y.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 74, 20, 16, 52  # margins in which axes have their labels
NAMES = 150  # margin on the right for the names of lines
LINE, LETTER = 15, 6.7  # height and width of a label's line and letter
RADIUS = 5.5
COLORS = 8  # that the page knows; further series have the same ones, drawn in another way

Box = tuple[float, float, float, float]  # left, top, right, bottom


class Axis(NamedTuple):
    """An axis: its title with the unit, its range, and whether equal steps are equal factors."""

    title: str
    low: float
    high: float
    log: bool = False
    labels: Sequence[tuple[float, str]] = ()

    def share(self, value: float) -> float:
        """Where a value lies, from 0 at the low end to 1 at the high one."""
        if not self.log:
            return (value - self.low) / (self.high - self.low)
        value = max(value, self.low)  # zero is below all of them
        return math.log(value / self.low) / math.log(self.high / self.low)

    def ticks(self) -> Sequence[tuple[float, str]]:
        """Round values between the ends, with their labels."""
        return self.labels or [(v, number(v)) for v in (decades(self) if self.log else steps(self))]


class Point(NamedTuple):
    """A point; `error` is what it may be off by, along x and y, and `tip` tells its numbers."""

    x: float
    y: float
    tip: str = ""
    error: tuple[float, float] = (0, 0)


class Series(NamedTuple):
    """Points of one name and color; joined by a line, or with the name beside the one point."""

    name: str
    color: int
    points: Sequence[Point]
    line: bool = False


def axis(title: str, values: Sequence[float], *, log: bool = False, zero: bool = False) -> Axis:
    """An axis that has room for all of these; a linear one may begin at zero."""
    low, high = min(values), max(values)
    if log:
        factor = (high / low) ** 0.08 if high > low else 2
        return Axis(title, low / factor, high * factor, log=True)
    room = 0.08 * (high - low) or abs(high) or 1
    return Axis(title, 0 if zero else low - room, high + room)


def steps(axis: Axis) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, about six."""
    rough = (axis.high - axis.low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    return [i * step for i in range(math.ceil(axis.low / step), math.floor(axis.high / step) + 1)]


def decades(axis: Axis) -> list[float]:
    """Powers of ten, and where these are few, two and five times them."""
    powers = range(math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high)) + 1)
    span = math.log10(axis.high / axis.low)
    factors = (1,) if span > 4 else (1, 2, 5) if span > 0.9 else (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)
    return [m * 10.0**p for p in powers for m in factors if axis.low <= m * 10.0**p <= axis.high]


def number(value: float) -> str:
    """A tick's label."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}" if value else "0"


def chart(
    title: str,
    description: str,
    x: Axis,
    y: Axis,
    series: Sequence[Series],
    *,
    frontier: Sequence[Point] = (),
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """A picture.

    Parameters
    ----------
    title, description : what a screen reader says of it.
    x, y : the axes.
    series : what is drawn; the names of lines stand at their ends, on the right.
    frontier : points that steps of a line join, behind all else.
    marks : values of x with vertical lines and their names.
    """
    right = NAMES if any(s.line for s in series) else RIGHT
    wide, high = WIDTH - LEFT - right, HEIGHT - TOP - BOTTOM

    def at(a: float, b: float) -> tuple[float, float]:
        return LEFT + wide * x.share(a), TOP + high * (1 - y.share(b))

    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>{escape(title)}</title>']
    out += [f"<desc>{escape(description)}</desc>", *_axes(x, y, wide, high)]
    for value, name in marks:
        across = LEFT + wide * x.share(value)
        out.append(f'<path class="mark" d="M{across:.1f} {TOP}v{high}"/>')
        out.append(_text(across, TOP + 10, name, "end" if x.share(value) > 0.5 else "start", 6))
    if frontier:
        corners = [at(p.x, p.y) for p in frontier]
        path = "".join(f"H{a:.1f}V{b:.1f}" for a, b in corners[1:])
        out.append(f'<path class="frontier" d="M{corners[0][0]:.1f} {corners[0][1]:.1f}{path}"/>')
    for s in series:
        out += _series(s, at)
    ends = [(s, *at(s.points[-1].x, s.points[-1].y)) for s in series]
    if right == NAMES:
        out += _names_at_ends(ends, high)
    else:
        bars = [
            (at(p.x - p.error[0], p.y + p.error[1]), at(p.x + p.error[0], p.y - p.error[1]))
            for s in series
            for p in s.points
        ]
        out += _names_beside(ends, [(*low, *top) for low, top in bars], wide, high)
    return "\n".join([*out, "</svg>"])


def _axes(x: Axis, y: Axis, wide: float, high: float) -> Iterator[str]:
    """Grid, labels and titles."""
    for value, label in y.ticks():
        up = TOP + high * (1 - y.share(value))
        yield f'<path class="grid" d="M{LEFT} {up:.1f}h{wide}"/>'
        yield _text(LEFT - 8, up + 4, label, "end")
    for value, label in x.ticks():
        across = LEFT + wide * x.share(value)
        yield f'<path class="grid" d="M{across:.1f} {TOP}v{high}"/>'
        yield _text(across, TOP + high + 18, label, "middle")
    yield f'<path class="axis" d="M{LEFT} {TOP}v{high}h{wide}"/>'
    for title, place in (
        (x.title, f"translate({LEFT + wide / 2:.1f} {HEIGHT - 8})"),
        (y.title, f"translate(16 {TOP + high / 2:.1f}) rotate(-90)"),
    ):
        yield f'<text class="title" transform="{place}" text-anchor="middle">{escape(title)}</text>'


def _series(s: Series, at: Callable[[float, float], tuple[float, float]]) -> Iterator[str]:
    """Its line, error bars and points."""
    kind = f"c{s.color % COLORS}" + (" again" if s.color >= COLORS else "")
    if s.line:
        path = "L".join("{:.1f} {:.1f}".format(*at(p.x, p.y)) for p in s.points)
        yield f'<path class="line {kind}" d="M{path}"/>'
    radius = RADIUS / 2 if s.line else RADIUS
    for p in s.points:
        a, b = at(p.x, p.y)
        for dx, dy in ((p.error[0], 0), (0, p.error[1])):
            if dx or dy:
                ends = (*at(p.x - dx, p.y - dy), *at(p.x + dx, p.y + dy))
                yield '<path class="bar {}" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>'.format(kind, *ends)
        yield (
            f'<circle class="dot {kind}" cx="{a:.1f}" cy="{b:.1f}" r="{radius}" data-name="{escape(s.name)}" '
            f'data-x="{p.x!r}" data-y="{p.y!r}"><title>{escape(p.tip or s.name)}</title></circle>'
        )


def _names_at_ends(ends: Sequence[tuple[Series, float, float]], high: float) -> Iterator[str]:
    """Names of lines, on the right at the height of their ends, or as near as there is room."""
    ordered = sorted(ends, key=lambda end: end[2])
    heights: list[float] = []
    for i, (_, _, b) in enumerate(ordered):
        lowest = TOP + high - LINE * (len(ordered) - 1 - i)  # leaves room for those below
        heights.append(max(min(b, lowest), heights[-1] + LINE if heights else TOP))
    for (s, a, b), height in zip(ordered, heights, strict=True):
        yield f'<path class="leader c{s.color % COLORS}" d="M{a + 5:.1f} {b:.1f}L{a + 18:.1f} {height:.1f}"/>'
        yield _text(a + 22, height + 4, s.name, "start")


def _names_beside(
    ends: Sequence[tuple[Series, float, float]], bars: Sequence[Box], wide: float, high: float
) -> Iterator[str]:
    """Names of points: to the right, the left, above or below, where they cover least."""
    taken = [(a - 7, b - 7, c + 7, d + 7) for a, b, c, d in bars]
    for s, a, b in ends:
        length = LETTER * len(s.name)
        spots = [
            (a + 10, b + 4, "start"),
            (a - 10 - length, b + 4, "end"),
            (a - length / 2, b - 11, "middle"),
            (a - length / 2, b + 20, "middle"),
            (a + 8, b - 9, "start"),
            (a + 8, b + 17, "start"),
            (a - 8 - length, b - 9, "end"),
            (a - 8 - length, b + 17, "end"),
        ]
        left, base, anchor = min(spots, key=lambda spot: _covered(spot, length, taken, wide, high))
        taken.append((left, base - 11, left + length, base + 3))
        place = {"start": left, "middle": left + length / 2, "end": left + length}[anchor]
        yield _text(place, base, s.name, anchor)


def _covered(
    spot: tuple[float, float, str],
    length: float,
    taken: Sequence[Box],
    wide: float,
    high: float,
) -> float:
    """Area of other things that a name would cover; being outside of the picture counts more."""
    left, base, _ = spot
    box = left, base - 11, left + length, base + 3
    outside = box[0] < LEFT or box[2] > LEFT + wide + RIGHT or box[1] < TOP - 8 or box[3] > TOP + high
    overlaps = (
        max(0.0, min(box[2], t[2]) - max(box[0], t[0])) * max(0.0, min(box[3], t[3]) - max(box[1], t[1]))
        for t in taken
    )
    return sum(overlaps) + 1e4 * outside


def _text(x: float, y: float, text: str, anchor: str, dx: float = 0) -> str:
    x += dx if anchor == "start" else -dx
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'

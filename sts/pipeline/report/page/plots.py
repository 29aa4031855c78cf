"""Plots as SVG for a page: no script draws them, style sheets colour them. A mark with `data-tip`
says its values where a pointer or the arrow keys are on it; one with `data-row` can be hidden."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
from contourpy import contour_generator
from markupsafe import Markup
from matplotlib.ticker import LogLocator, MaxNLocator

from sts.pipeline.report.figures.layers import CHANCES

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 400, 44, 8, 12, 40  # a phone is that wide
LINE = 15  # height of a line of text
LEAST = 1e-6  # on an axis of logarithms
PALETTE = 7  # colours of the style sheet


class Frame(NamedTuple):
    """What the edges of a plot stand for, and its height in pixels."""

    x: tuple[float, float]
    y: tuple[float, float]
    height: int = 300
    has_log_y: bool = False
    left: int = LEFT

    def place_x(self, x: float) -> float:
        """Pixels from the left."""
        share = (x - self.x[0]) / (self.x[1] - self.x[0])
        return round(self.left + share * (WIDTH - self.left - RIGHT), 1)

    def place_y(self, y: float) -> float:
        """Pixels from the top."""
        y, low, high = np.log([max(y, LEAST), *self.y]) if self.has_log_y else (y, *self.y)
        share = (y - low) / (high - low)
        return round(float(self.height - BOTTOM - share * (self.height - TOP - BOTTOM)), 1)


def framed(points: Iterable[tuple[float, float]], has_log_y: bool = False) -> Frame:
    """The frame that holds these points, with some room around them."""
    xs, ys = (np.array(values, float) for values in zip(*points, strict=True))
    rooms = [0.06 * (np.ptp(v) or abs(v[0]) or 1) for v in (xs, ys)]
    x = (float(xs.min() - rooms[0]), float(xs.max() + rooms[0]))
    if has_log_y:
        low, high = (max(float(end), LEAST) for end in (ys.min(), ys.max()))
        return Frame(x, (low / 1.1, high * 1.1), has_log_y=True)
    return Frame(x, (float(ys.min() - rooms[1]), float(ys.max() + rooms[1])))


def plot(frame: Frame, marks: Iterable[str], label: str, x_title: str, y_title: str = "") -> Markup:
    """Marks with their axes. label: what the plot shows, for who can't see it."""
    bottom, parts = frame.height - BOTTOM, []
    for tick in _ticks(frame.x, 6):
        x = frame.place_x(tick)
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{x}" y="{bottom + LINE}" text-anchor="middle">{tick:g}</text>')
    for tick in _ticks(frame.y, 5, frame.has_log_y) if y_title else ():
        y = frame.place_y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    middle = (frame.left + WIDTH - RIGHT) / 2
    parts.append(text(middle, frame.height - 6, x_title, anchor="middle"))
    if y_title:
        turned = f'transform="translate(11 {(TOP + bottom) / 2}) rotate(-90)"'
        parts.append(f'<text {turned} text-anchor="middle">{escape(y_title)}</text>')
    return svg([*parts, *marks], frame.height, label)


def svg(parts: Iterable[str], height: float, label: str) -> Markup:
    """A drawing that the keyboard reaches."""
    head = f'<svg class="plot" viewBox="0 0 {WIDTH} {height:g}" role="img" tabindex="0"'
    return Markup(f'{head} aria-label="{escape(label)}">{"".join(parts)}</svg>')


def _ticks(ends: tuple[float, float], count: int, is_log: bool = False) -> list[float]:
    locator: Any = MaxNLocator(count, steps=[1, 2, 5, 10])
    if is_log:
        locator = LogLocator(subs=(1, 2, 5))
    ticks = [round(float(tick), 10) for tick in locator.tick_values(*ends)]
    return [tick for tick in ticks if ends[0] <= tick <= ends[1]]


def text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    """A line of text at a place in pixels, cut where a plot would end."""
    words = words if len(words) <= 66 else f"{words[:65]}…"
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>'


def mark(shape: str, kind: str, row: str = "", tip: str = "") -> str:
    """An element with its class, the row that it is of, and what it says."""
    more = f' data-row="{escape(row)}"' if row else ""
    more += f' data-tip="{escape(tip)}"' if tip else ""
    return f'<{shape} class="{kind}"{more}/>'


def dot(frame: Frame, x: float, y: float, size: float, *of_mark: str) -> str:
    """A point: class, row and tip as in `mark`."""
    return mark(f'circle cx="{frame.place_x(x)}" cy="{frame.place_y(y)}" r="{size}"', *of_mark)


def line(frame: Frame, points: Iterable[tuple[float, float]], *of_mark: str) -> str:
    """A curve: class, row and tip as in `mark`."""
    places = " ".join(f"{frame.place_x(x)},{frame.place_y(y)}" for x, y in points)
    return mark(f'polyline points="{places}"', *of_mark)


def colour(place: int) -> str:
    """Classes of the row at a place: a colour, and a dash where colours begin again."""
    return f"c{place % PALETTE} d{place // PALETTE % 4}"


def forest(
    intervals: Sequence[tuple[str, str, Sequence[str], tuple[float, float, float], str]],
    label: str,
    x: str,
) -> Markup:
    """Means with their intervals, each under its words, beside no difference. intervals: (row,
    colour, lines of words, (mean, low, high), tip)."""
    height = TOP + BOTTOM + sum(26 + LINE * len(words) for _, _, words, *_ in intervals)
    ends = [0.0, *(end for *_, values, _ in intervals for end in values)]
    room = 0.05 * (max(ends) - min(ends) or 1)
    frame = Frame((min(ends) - room, max(ends) + room), (0, 1), height, left=8)
    zero, y = frame.place_x(0), TOP
    parts = [mark(f'line x1="{zero}" x2="{zero}" y1="{TOP}" y2="{height - BOTTOM}"', "zero")]
    for row, kind, lines, values, tip in intervals:
        for words in lines:
            y += LINE
            parts.append(text(8, y, words, kind="halo"))
        y, (mean, low, high) = y + 10, map(frame.place_x, values)
        parts.append(mark(f'line x1="{low}" x2="{high}" y1="{y}" y2="{y}"', f"whisker {kind}", row))
        parts.append(mark(f'circle cx="{mean}" cy="{y}" r="5"', f"dot {kind}", row, tip))
        y += 16
    return plot(frame, parts, label, x)


def bars(rows: Mapping[str, Mapping[str, float]], kinds: Sequence[str], label: str) -> Markup:
    """Seconds of the parts of each row, one after the other, under the row's name."""
    height = 36 * len(rows) + TOP + BOTTOM
    most = max(sum(parts.values()) for parts in rows.values())
    frame = Frame((0, 1.02 * most), (0, 1), height, left=8)
    drawn = []
    for i, (name, parts) in enumerate(rows.items()):
        y, start = TOP + 36 * i + 12, 0.0
        drawn.append(text(8, y, name, kind="halo"))
        for part, seconds in parts.items():
            left, right = frame.place_x(start), frame.place_x(start + seconds)
            shape = f'rect x="{left}" y="{y + 4}" width="{right - left:.1f}" height="14"'
            kind = f"bar c{1 + kinds.index(part) % (PALETTE - 1)}"
            drawn.append(mark(shape, kind, tip=f"{name}: {part}, {seconds:.3g} s"))
            start += seconds
    return plot(frame, drawn, label, "seconds of a step")


def heat(skipped: np.ndarray, chances: np.ndarray, steps: int, label: str) -> Markup:
    """[layers, bins] shares skipped as shades, and the chances asked for as lines of equal height.
    steps: of the stage, over all bins."""
    layers, bins = skipped.shape
    frame = Frame((0, steps), (-0.5, layers - 0.5))
    wide = (WIDTH - LEFT - RIGHT) / bins
    tall = (frame.height - TOP - BOTTOM) / layers
    parts = []
    for (layer, bin), share in np.ndenumerate(skipped):
        x, y = LEFT + bin * wide, frame.place_y(layer + 0.5)
        shape = f'rect x="{x:.1f}" y="{y}" width="{wide + 0.3:.1f}" height="{tall + 0.3:.1f}"'
        tip = f"layer {layer}, step {round((bin + 0.5) * steps / bins)}: {100 * share:.0f} % "
        tip += f"skipped, {100 * chances[layer, bin]:.0f} % asked for"
        parts.append(mark(f'{shape} fill-opacity="{share:.2f}"', "heat", tip=tip))
    if min(chances.shape) > 1:
        middles = (np.arange(bins) + 0.5) * steps / bins
        contours = contour_generator(middles, np.arange(layers), chances)
        for level in CHANCES:
            for points in map(np.asarray, contours.lines(level)):
                parts.append(line(frame, points, "level"))
                x, y = points[len(points) // 2]
                parts.append(
                    text(frame.place_x(x), frame.place_y(y) - 3, f"{level:g}", kind="halo")
                )
    return plot(frame, parts, label, "optimizer step", "decoder layer")

"""Curves: a picture of how a network learnt, beside its model file."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import monotonic

from PIL import Image, ImageDraw, ImageFont

from pipeline.store.labels import colour_of
from pipeline.store.location import Location
from pipeline.unet.training.course import Validation, best_of

_SIZE = (960, 640)
_LEFT, _RIGHT, _TOP, _BOTTOM, _BETWEEN = 76, 232, 48, 56, 40
_FINE = 3  # lines are drawn on a grid as much finer, and smoothed
_WHITE, _INK, _PALE, _BEST = (255, 255, 255), (38, 38, 38), (225, 225, 225), (120, 120, 120)
_BLUE, _RED, _BROWN = colour_of(5), colour_of(6), (148, 103, 60)
_MOST_CLASSES = 8
_SECONDS_BETWEEN = 5.0
_LONGEST_NAME = 18
_DECADE = 10.0

Points = list[tuple[float, float | None]]


@dataclass(slots=True)
class CurvesFile:
    """The picture of a training that runs, written anew at most every 5 seconds.

    Attributes
    ----------
    path : path or URL
    title : what is learnt
    classes : their names
    """

    path: str
    title: str
    classes: tuple[str, ...]
    _curve: list[Validation] = field(default_factory=list)
    _written_s: float = -math.inf

    def put(self, now: Validation) -> None:
        """Take a validation."""
        self._curve.append(now)
        if monotonic() - self._written_s > _SECONDS_BETWEEN:
            self.write()

    def write(self) -> None:
        """Write the picture as it is now, in place of the one before, at once or not at all."""
        Location(self.path).write_bytes(draw_curves(self._curve, title=self.title, classes=self.classes))
        self._written_s = monotonic()


@dataclass(frozen=True, slots=True)
class _Line:
    """A curve and what the legend says of it."""

    name: str
    colour: tuple[int, int, int]
    points: Points
    at_best: float | None


@dataclass(frozen=True, slots=True)
class _Scale:
    """From values to pixels along one axis; ``first`` lies at ``start``, ``last`` at ``stop``; ``whole``: in ones."""

    first: float
    last: float
    start: float
    stop: float
    log: bool = False
    whole: bool = False

    def __call__(self, value: float) -> float:
        a, b, v = (map(math.log10, (self.first, self.last, value))) if self.log else (self.first, self.last, value)
        return self.start + (v - a) / (b - a) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Return round values within the scale: 1, 2 and 5 times powers of ten."""
        if self.log:
            powers = range(math.floor(math.log10(self.first)), math.ceil(math.log10(self.last)) + 1)
            marks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
            return [mark for mark in marks if self.first <= mark <= self.last]
        step = nice_step((self.last - self.first) / 7)
        step = max(step, 1.0) if self.whole else step
        return [n * step for n in range(math.ceil(self.first / step - 1e-9), math.floor(self.last / step + 1e-9) + 1)]


def nice_step(least: float) -> float:
    """Return the smallest of 1, 2 and 5 times a power of ten that is at least this, above 0."""
    power = 10.0 ** math.floor(math.log10(least))
    return next((digit * power for digit in (1, 2, 5) if digit * power >= least * (1 - 1e-9)), 10 * power)


def draw_curves(curve: Sequence[Validation], *, title: str, classes: tuple[str, ...]) -> bytes:
    """Return a PNG: the loss of training and held out above, Dice of the classes or PSNR below, the best step marked.

    The losses are on a logarithmic scale where they span more than a factor of 10. Of more than 8 classes, the mean
    and the worst are shown. ``curve`` has one validation at least.
    """
    best, (width, height) = best_of(curve), _SIZE
    middle = (height - _TOP - _BOTTOM - _BETWEEN) // 2
    x = _Scale(0, max(each.step for each in curve), _LEFT, width - _RIGHT, whole=True)
    upper = [
        _Line("training", _RED, [(each.step, each.train_loss) for each in curve], best.train_loss),
        _Line("held out", _BLUE, [(each.step, each.loss) for each in curve], best.loss),
    ]
    lower, below = _dice_lines(curve, best, classes) if classes else _psnr_lines(curve, best), height - _BOTTOM
    y_upper = _range_of(upper, start=_TOP + middle, stop=_TOP)
    y_lower = _Scale(0.0, 1.0, below, below - middle) if classes else _range_of(lower, start=below, stop=below - middle)
    told = "Dice held out" if classes else "PSNR held out, dB"
    fine = Image.new("RGB", (width * _FINE, height * _FINE), _WHITE)
    for lines, y in ((upper, y_upper), (lower, y_lower)):
        _draw_lines(ImageDraw.Draw(fine), lines, x, y, best=best)
    picture = fine.resize(_SIZE, Image.Resampling.BOX)
    draw = ImageDraw.Draw(picture)
    draw.text((_LEFT, 16), f"{title}: best at step {best.step:,}", fill=_INK, font=_font(17))
    for lines, y, name in ((upper, y_upper, "loss"), (lower, y_lower, told)):
        _draw_axes(draw, x, y, name=name)
        _draw_legend(draw, lines, y)
    draw.text(((x.start + x.stop) / 2, height - 14), "step", fill=_INK, font=_font(13), anchor="mm")
    content = io.BytesIO()
    picture.save(content, format="PNG", optimize=True)
    return content.getvalue()


def _psnr_lines(curve: Sequence[Validation], best: Validation) -> list[_Line]:
    """Return how far values are from the target."""
    return [_Line("PSNR", _BLUE, [(each.step, each.psnr) for each in curve], best.psnr)]


def _dice_lines(curve: Sequence[Validation], best: Validation, classes: tuple[str, ...]) -> list[_Line]:
    """Return Dice of each class, or of many classes the mean and the worst."""
    if len(classes) <= _MOST_CLASSES:
        return [
            _Line(name, _on_white(i), [(each.step, each.dice[i]) for each in curve], best.dice[i])
            for i, name in enumerate(classes)
        ]

    def line(name: str, colour: tuple[int, int, int], figure: str) -> _Line:
        return _Line(name, colour, [(each.step, _over(each, figure)) for each in curve], _over(best, figure))

    return [line("mean of classes", _BLUE, "mean"), line("worst class", _RED, "worst")]


def _on_white(label: int) -> tuple[int, int, int]:
    """Return a class's colour, a little darker; the first, which pictures leave clear, is brown."""
    red, green, blue = colour_of(label)
    return (red * 4 // 5, green * 4 // 5, blue * 4 // 5) if label else _BROWN


def _over(each: Validation, figure: str) -> float | None:
    known = [dice for dice in each.dice if dice is not None]
    if not known:
        return None
    return min(known) if figure == "worst" else sum(known) / len(known)


def _range_of(lines: list[_Line], *, start: float, stop: float) -> _Scale:
    """Return a scale that holds all points, with some air; from zero unless it is logarithmic."""
    values = [value for line in lines for _, value in line.points if value is not None] or [0.0]
    low, high = min(values), max(values)
    if low > 0 and high > _DECADE * low:
        return _Scale(low / 1.15, high * 1.15, start, stop, log=True)
    low = min(0.0, low)
    return _Scale(low, low + ((high - low) * 1.06 or 1.0), start, stop)


def _draw_lines(draw: ImageDraw.ImageDraw, lines: list[_Line], x: _Scale, y: _Scale, *, best: Validation) -> None:
    """Draw grid, best step and curves, on the finer grid."""

    def at(step: float, value: float) -> tuple[float, float]:
        return x(step) * _FINE, y(value) * _FINE

    for value in y.ticks():
        draw.line((x.start * _FINE, y(value) * _FINE, x.stop * _FINE, y(value) * _FINE), _PALE, _FINE)
    for step in x.ticks():
        draw.line((x(step) * _FINE, y.start * _FINE, x(step) * _FINE, y.stop * _FINE), _PALE, _FINE)
    for dash in range(int(y.stop), int(y.start), 8):
        draw.line((x(best.step) * _FINE, dash * _FINE, x(best.step) * _FINE, (dash + 4) * _FINE), _BEST, _FINE)
    for line in lines:
        for part in _runs(line.points):
            places = [at(*point) for point in part]
            draw.line(places, line.colour, 2 * _FINE, joint="curve")
            for place in places if len(places) == 1 else ():
                draw.circle(place, 3 * _FINE, line.colour)
        if line.at_best is not None:
            draw.circle(at(best.step, line.at_best), 4.5 * _FINE, _WHITE, line.colour, 2 * _FINE)


def _runs(points: Points) -> list[list[tuple[float, float]]]:
    """Return the parts of a curve that have no gap."""
    runs: list[list[tuple[float, float]]] = [[]]
    for step, value in points:
        if value is None:
            runs.append([])
        else:
            runs[-1].append((step, value))
    return [run for run in runs if run]


def _draw_axes(draw: ImageDraw.ImageDraw, x: _Scale, y: _Scale, *, name: str) -> None:
    """Draw the frame, the numbers at the ticks and what the upright axis shows."""
    draw.line((x.start, y.stop, x.start, y.start, x.stop, y.start), _INK, 1)
    for step in x.ticks():
        draw.line((x(step), y.start, x(step), y.start + 4), _INK, 1)
        draw.text((x(step), y.start + 7), f"{step:,.0f}", fill=_INK, font=_font(12), anchor="mt")
    for value in y.ticks():
        draw.line((x.start - 4, y(value), x.start, y(value)), _INK, 1)
        draw.text((x.start - 8, y(value)), f"{value:.3g}", fill=_INK, font=_font(12), anchor="rm")
    label = Image.new("L", (200, 20), 0)
    ImageDraw.Draw(label).text((100, 10), name, fill=255, font=_font(13), anchor="mm")
    turned, centre = label.rotate(90, expand=True), int((y.start + y.stop) / 2)
    draw.bitmap((8, centre - turned.height // 2), turned, fill=_INK)


def _draw_legend(draw: ImageDraw.ImageDraw, lines: list[_Line], y: _Scale) -> None:
    """Draw what each curve is, and its value at the best step."""
    left, right = _SIZE[0] - _RIGHT + 18, _SIZE[0] - 16
    draw.text((right, y.stop), "at best", fill=_BEST, font=_font(12), anchor="rt")
    for row, line in enumerate(lines, start=1):
        height = y.stop + 6 + 22 * row
        name = line.name if len(line.name) <= _LONGEST_NAME else f"{line.name[: _LONGEST_NAME - 1]}…"
        draw.line((left, height, left + 20, height), line.colour, 3)
        draw.text((left + 28, height), name, fill=_INK, font=_font(13), anchor="lm")
        value = "-" if line.at_best is None else f"{line.at_best:.4f}"
        draw.text((right, height), value, fill=_INK, font=_font(13), anchor="rm")


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return the font that Pillow brings along."""
    return ImageFont.load_default(size)

"""The pictures of a run: a strip per image and the curves of the whole, from arrays alone."""

import functools
import heapq
import json
import unicodedata
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import contourpy
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from blemish.metrics.metrics import GOOD
from blemish.metrics.ranking import FPR_LIMIT
from blemish.types import ANOMALOUS, IGNORED, NO_TRUTH, NORMAL, UNKNOWN

PANEL_LEAST, PANEL_MOST = 224, 640  # px: small images are to_image by a whole number to reach the first, large ones reduced to the second
MARGIN, GAP, BAR = 14, 12, 10  # px around the strip, between panels, width of the colour bar
PAPER, INK, QUIET, FAINT = (255, 255, 255), (26, 26, 26), (95, 95, 95), (236, 236, 236)
ALARM, TRUTH, CASING = (0, 229, 255), (255, 255, 255), (0, 0, 0)  # lines around alarms and truth, and what sets them off
VEIL = 0.75  # opacity of the map's colour in an overlay at the upper end of the scale
DASH = 5.0  # px on, px off
COLOURS = (matplotlib.colormaps["inferno"](np.linspace(0, 1, 256))[:, :3] * 255).round().astype(np.uint8)  # (256, 3)
GROUND = np.full((256, 3), 128, np.uint8)  # colours of the truth: grey where it is not known, or not looked at
GROUND[[0, 1]] = [[20, 20, 20], [255, 255, 255]]
BLUE, RED = "#0072b2", "#c04a00"  # images or normal, pixels or anomalous: apart in hue and in lightness
STYLE = {"image": {"color": BLUE, "linestyle": "-"}, "pixel": {"color": RED, "linestyle": (0, (4, 1.5))}}


def to_scale(values: np.ndarray, scale: tuple[float, float]) -> np.ndarray:
    """Map values as float32 in [0, 1] between the ends of the scale; NaN counts as the upper end."""
    low, high = scale
    unit = (values.astype(np.float64) - low) / (high - low if high > low else 1.0)
    return np.nan_to_num(unit, nan=1.0, posinf=1.0, neginf=0.0).clip(0, 1).astype(np.float32)


def colour(values: np.ndarray, scale: tuple[float, float]) -> np.ndarray:
    """A map (H, W) as colours (H, W, 3) uint8 of a perceptually even colour map, dark to bright between the ends of the scale."""
    return COLOURS[(to_scale(values, scale) * 255).round().astype(np.uint8)]


def overlay(
    image: np.ndarray,
    values: np.ndarray,
    scale: tuple[float, float],
    threshold: float | None,
    mask: np.ndarray | None = None,
    size: tuple[int, int] | None = None,
) -> Image.Image:
    """The map's colours over the picture, the more opaque the larger the value, with contours.

    image (H, W, 3) uint8, map (H, W), mask (H, W) uint8 or None; a solid line surrounds values above the threshold, a dashed one the
    mask's anomalous pixels. `size` is (width, height) of the result in px, by default the image's.
    """
    opacity = VEIL * to_scale(values, scale)[..., None]  # (H, W, 1)
    picture = _sized((image * (1 - opacity) + colour(values, scale) * opacity).round().astype(np.uint8), size or image.shape[1::-1])
    if mask is not None and (mask == 1).any():
        outline(picture, (mask == 1).astype(np.float32), 0.5, TRUTH, DASH)
    if threshold is not None and np.isfinite(threshold):
        outline(picture, values, threshold, ALARM, None)
    return picture


def outline(picture: Image.Image, values: np.ndarray, level: float, line: tuple[int, int, int], dash: float | None) -> None:
    """Draw the level line of `values` (h, w) over the whole picture, cased in black; dashed if `dash` px are given."""
    height, width = values.shape
    finite = values[np.isfinite(values)]
    reach = float(np.abs(finite - level).max(initial=0.0)) or 1.0
    field = np.nan_to_num(values.astype(np.float64), nan=level - reach, posinf=level + reach, neginf=level - reach)
    # a border below the level closes the regions that touch the edge
    paths = contourpy.contour_generator(z=np.pad(field, 1, constant_values=level - reach)).lines(level)
    if not paths:
        return
    fine = 2  # lines are drawn at twice the size and averaged, for smooth edges
    zoom = np.array([picture.width / width, picture.height / height])
    stroke = max(1.5, picture.width / 200)
    cover = Image.new("L", (picture.width * fine, picture.height * fine))
    casing = cover.copy()
    pen, casing_pen = ImageDraw.Draw(cover), ImageDraw.Draw(casing)
    for path in paths:
        points = ((path - 0.5) * zoom).clip(0.5, [picture.width - 1.5, picture.height - 1.5]) * fine
        for piece in [points] if dash is None else dashes(points, dash * fine):
            corners = piece.ravel().tolist()
            casing_pen.line(corners, fill=220, width=round((stroke + 2) * fine), joint="curve")
            pen.line(corners, fill=255, width=round(stroke * fine), joint="curve")
    for layer, ink in ((casing, CASING), (cover, line)):
        picture.paste(ink, (0, 0, *picture.size), layer.reduce(fine))


def dashes(points: np.ndarray, length: float) -> list[np.ndarray]:
    """Every other piece of `length` of a polyline (n, 2)."""
    steps = np.hypot(*np.diff(points, axis=0).T)
    along = np.concatenate([[0.0], np.cumsum(steps)])
    pieces = []
    for begin in np.arange(0, along[-1], 2 * length):
        end = min(begin + length, along[-1])
        first, last = ([np.interp(at, along, points[:, axis]) for axis in (0, 1)] for at in (begin, end))
        pieces.append(np.stack([first, *points[(along > begin) & (along < end)], last]))
    return pieces


def caption(name: str, defect: str, label: int, score: float, threshold: float | None) -> str:
    """Two lines for the head of a strip: what the image is, and what was said of it."""
    truth = {NORMAL: "normal", ANOMALOUS: "anomalous", UNKNOWN: "truth unknown"}[label]
    parts = [defect if defect in ("unknown", truth) else f"{defect} ({truth})", f"score {number(score)}"]
    if threshold is None:
        parts.append("no threshold")
    else:
        decision = ANOMALOUS if score > threshold else NORMAL
        parts += [f"threshold {number(threshold)}", f"decision {'anomalous' if decision == ANOMALOUS else 'normal'}"]
        if label != UNKNOWN:
            wrong = "false alarm" if decision == ANOMALOUS else "missed"
            parts.append("✓ right" if decision == label else f"✗ wrong ({wrong})")
    return f"{name}\n{' · '.join(parts)}"


def number(value: float) -> str:
    """Four significant digits, with a true minus sign."""
    return f"{value:.4g}".replace("-", "−").replace("inf", "∞")


def strip(
    image: np.ndarray,
    mask: np.ndarray | None,
    values: np.ndarray | None,
    scale: tuple[float, float] | None,
    threshold: float | None,
    title: str,
    reconstruction: np.ndarray | None = None,
) -> Image.Image:
    """One image of the record: input, ground truth, map with its colour bar, overlay, under a title of one or two lines.

    image and, where there is one, reconstruction (H, W, 3) uint8; mask (H, W) uint8 or None; map (H, W) or None for an image-level
    method; scale is the map's value at the two ends of the colours, the same for every strip of a run; threshold is the map's, None for
    no contour. The picture's info says under "Panels", in JSON, which box (left, top, right, bottom) each picture in it has.
    """
    width, height = size = panel_size(*image.shape[:2])
    text = int(np.clip(width // 20, 12, 17))
    cell = max(width, 16 * text)  # room for the words over a narrow panel
    numbers = [] if values is None else bar_numbers(scale, threshold)
    bar = 0 if values is None else GAP // 2 + BAR + 5 + max(int(font(text - 1).getlength(words)) for _, words in numbers)
    head = MARGIN + 2 * round(1.6 * text) + 6
    top = head + round(1.6 * text)
    count = 4 if reconstruction is None else 5
    sheet = Image.new("RGB", (2 * MARGIN + count * cell + (count - 1) * GAP + bar, top + height + MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    for line, words in enumerate(title.split("\n")[:2]):
        face, ink = (font(text + 1, bold=True), INK) if line == 0 else (font(text + 1), QUIET)
        pen.text((MARGIN, MARGIN + line * round(1.6 * text)), elided(words, face, sheet.width - 2 * MARGIN), ink, face)

    truth = None if mask is None or np.isin(mask, (NO_TRUTH, IGNORED)).all() else _sized(GROUND[mask], size)
    painted = None if values is None else _sized(colour(values, scale), size)
    both = None if values is None else overlay(image, values, scale, threshold, mask, size)
    panels = [
        ("input", _sized(image, size), ""),
        *([] if reconstruction is None else [("reconstruction", _sized(reconstruction, size), "")]),
        ("ground truth", truth, "no ground truth"),
        ("map", painted, "no map"),
        ("overlay", both, "no map"),
    ]
    boxes = {}
    for index, (name, picture, absent) in enumerate(panels):
        left = MARGIN + index * (cell + GAP) + (bar if name == "overlay" else 0)
        box = (left + (cell - width) // 2, top)
        pen.text((left, head), name, INK, font(text))
        if picture is None:
            pen.rectangle((*box, box[0] + width - 1, box[1] + height - 1), FAINT)
            pen.text((box[0] + width / 2, box[1] + height / 2), absent, QUIET, font(text), anchor="mm")
        else:
            sheet.paste(picture, box)
            boxes[name] = (*box, box[0] + width, box[1] + height)
        if name == "map" and picture is not None:
            _bar(pen, (box[0] + width + GAP // 2, top, height), scale, numbers, text - 1)
        if name == "overlay" and picture is not None:
            drawn = [("truth", TRUTH, True)] if mask is not None and (mask == 1).any() else []
            drawn += [("alarm", ALARM, False)] if threshold is not None and (values > threshold).any() else []
            _legend(pen, left + cell, head, drawn, text)
    sheet.info["Panels"] = json.dumps(boxes)
    return sheet


def panel_size(height: int, width: int) -> tuple[int, int]:
    """(width, height) in px at which an image (height, width) is shown."""
    longest = max(height, width)
    if longest > PANEL_MOST:
        return max(1, round(width * PANEL_MOST / longest)), max(1, round(height * PANEL_MOST / longest))
    factor = -(-PANEL_LEAST // longest)
    return width * factor, height * factor


def bar_numbers(scale: tuple[float, float], threshold: float | None) -> list[tuple[float, str]]:
    """The values a colour bar names: its ends, and the threshold where it lies between them."""
    low, high = scale
    inner = [threshold] if threshold is not None and low < threshold < high else []
    return [(value, number(value)) for value in (low, *inner, high)]


def elided(text: str, face: ImageFont.FreeTypeFont, width: float) -> str:
    """The text on one line no wider than `width` px, its middle left out if it must be."""
    # names of files may hold line breaks, and surrogates for bytes that are not UTF-8
    text = "".join(sign if sign.isprintable() else "?" for sign in text)
    if face.getlength(text) <= width:
        return text
    kept = len(text) - 1
    while kept > 0 and face.getlength(f"{text[: kept // 2]}…{text[len(text) - (kept - kept // 2) :]}") > width:
        kept -= 1
    return f"{text[: kept // 2]}…{text[len(text) - (kept - kept // 2) :]}"


@functools.cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The sans serif that matplotlib brings along, at a size in px."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _sized(array: np.ndarray, size: tuple[int, int]) -> Image.Image:
    picture = Image.fromarray(np.ascontiguousarray(array))
    return picture.resize(size, Image.Resampling.BOX if size[0] < picture.width else Image.Resampling.NEAREST)


def _bar(pen: ImageDraw.ImageDraw, place: tuple[int, int, int], scale: tuple[float, float], numbers: list, text: int) -> None:
    """The colours of the scale, bright end up, `place` = (left, top, height), with numbers on its right."""
    left, top, height = place
    face = font(text)
    for row in range(height):
        shade = tuple(COLOURS[round(255 * (1 - row / max(height - 1, 1)))].tolist())
        pen.line((left, top + row, left + BAR - 1, top + row), shade)
    low, high = scale
    for value, words in numbers:
        y = top + (height - 1) * (1 - (value - low) / ((high - low) or 1.0))
        inner = low < value < high
        if inner:
            pen.line((left, y, left + BAR + 2, y), CASING, 3)
            pen.line((left, y, left + BAR + 2, y), ALARM, 1)
        # a number that would run into those of the ends is left out; its tick stays
        if not inner or 1.6 * text < y - top < height - 1.6 * text:
            pen.text((left + BAR + 5, y), words, INK, face, anchor="lm" if inner else "la" if value == high else "ld")


def _legend(pen: ImageDraw.ImageDraw, right: float, top: float, drawn: list[tuple[str, tuple, bool]], text: int) -> None:
    """Line samples with their words, set right-aligned on the line of the panel's name."""
    y = top + 0.62 * text
    for words, ink, dashed in reversed(drawn):
        right -= font(text - 1).getlength(words)
        pen.text((right, top + 1), words, QUIET, font(text - 1))
        begin = right - 4 - 2 * text
        pen.line((begin, y, right - 5, y), CASING, 5)
        for left in np.arange(begin, right - 5, 2 * DASH) if dashed else [begin]:
            pen.line((left, y, min(left + DASH, right - 5) if dashed else right - 5, y), ink, 2)
        right = begin - 10


def curves(
    image: dict[str, np.ndarray],
    pixel: dict[str, np.ndarray],
    figures: dict[str, float | None],
    score: np.ndarray,
    label: np.ndarray,
    threshold: float | None,
) -> Figure:
    """ROC, precision-recall and PRO curves and the histogram of image scores on one page.

    image, pixel: {"roc": (K, 2), "pr": (K, 2)} and, for pixels, "pro"; a curve of no points is left out. figures: the values for the
    legends, as metrics.json has them. score, label (N,): the images.
    """
    panels = [_roc, _precision_recall, *([_pro] if len(pixel["pro"]) else []), _histogram]
    rows = 2 if len(panels) == 4 else 1
    figure = Figure(figsize=(4.6 * len(panels) / rows, 4.3 * rows), dpi=120, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    for axes, panel in zip(figure.subplots(rows, len(panels) // rows).flat, panels, strict=True):
        panel(axes, image, pixel, figures) if panel is not _histogram else _histogram(axes, score, label, threshold)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _square(axes: Axes, title: str, x: str, y: str, right: float = 1.0) -> None:
    axes.set(title=title, xlabel=x, ylabel=y, xlim=(-0.02 * right, 1.02 * right), ylim=(-0.02, 1.02))
    axes.set_box_aspect(1)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


def _legend_of(axes: Axes, where: str) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc=where, frameon=True, framealpha=0.9, edgecolor="0.85", fontsize=9)
    else:
        axes.text(0.5, 0.5, "needs normal and anomalous", color="0.4", ha="center", va="center", transform=axes.transAxes)


def _value(figures: dict[str, float | None], name: str) -> str:
    return "–" if figures.get(name) is None else f"{figures[name]:.4f}"


def _roc(axes: Axes, image: dict, pixel: dict, figures: dict) -> None:
    _square(axes, "ROC", "false positive rate", "true positive rate")
    axes.plot([0, 1], [0, 1], color="0.75", linewidth=1)
    for kind, points in (("image", image["roc"]), ("pixel", pixel["roc"])):
        if len(points):
            axes.plot(*points.T, label=f"{kind}s: AUROC {_value(figures, f'{kind}_auroc')}", **STYLE[kind])
    _legend_of(axes, "lower right")


def _precision_recall(axes: Axes, image: dict, pixel: dict, figures: dict) -> None:
    _square(axes, "Precision and recall", "recall", "precision")
    for kind, points in (("image", image["pr"]), ("pixel", pixel["pr"])):
        if len(points):
            axes.plot(*points.T, label=f"{kind}s: AP {_value(figures, f'{kind}_ap')}", **STYLE[kind])
    _legend_of(axes, "best")


def _pro(axes: Axes, image: dict, pixel: dict, figures: dict) -> None:
    _square(axes, "Per-region overlap", "false positive rate of pixels", "mean share of a region found", FPR_LIMIT)
    rate, overlap = pixel["pro"].T
    axes.plot(rate, overlap, **STYLE["pixel"])
    axes.fill_between(rate, overlap, color=RED, alpha=0.15, linewidth=0, label=f"AUPRO {_value(figures, 'aupro')} (to {FPR_LIMIT})")
    _legend_of(axes, "lower right")


def _histogram(axes: Axes, score: np.ndarray, label: np.ndarray, threshold: float | None) -> None:
    edges = bins(score)
    if edges[0] > 0 and edges[-1] / edges[0] > 50:
        axes.set_xscale("log")
    looks = {
        NORMAL: ("normal", {"color": BLUE, "alpha": 0.55}),
        ANOMALOUS: ("anomalous", {"edgecolor": RED, "facecolor": "none", "hatch": "////", "histtype": "step", "linewidth": 1.6}),
        UNKNOWN: ("unknown", {"color": "0.35", "histtype": "step", "linestyle": ":", "linewidth": 1.4}),
    }
    for kind, (name, look) in looks.items():
        own = score[label == kind]
        if len(own):
            axes.hist(own, edges, weights=np.full(len(own), 1 / len(own)), label=f"{name} ({len(own)})", **look)
    if threshold is not None:
        axes.axvline(threshold, color="black", linewidth=1.4, linestyle="--", label=f"threshold {number(threshold)}")
    axes.set(title="Image scores", xlabel="score", ylabel="share of the images of a kind")
    axes.set_box_aspect(1)
    axes.margins(y=0.25)  # room for the legend
    _legend_of(axes, "upper right")


def bins(score: np.ndarray) -> np.ndarray:
    """Edges of 40 bins over all scores (N,), of equal ratio where they are positive and few large ones would crowd the others."""
    low, high, middle = score.min(), score.max(), np.median(score)
    if low > 0 and high > 20 * middle:
        return np.geomspace(low, high, 41)
    edges = np.linspace(low, high, 41)
    if (np.diff(edges) > 0).all():
        return edges
    room = max(0.5, 1e-6 * max(abs(low), abs(high)))  # one bin where numbers do not resolve forty
    return np.array([low - room, high + room])


def simplified(line: np.ndarray, most: int, tolerance: float = 0.0005) -> np.ndarray:
    """At most `most` of the vertices (K, 2) of a line, its ends among them, from which the others are as near as can be.

    The vertex farthest from the line so far is added until all are within `tolerance` of the line's extent (Douglas and Peucker, 1973).
    """
    if len(line) <= 2:
        return line
    extent = np.ptp(line, axis=0)
    unit = line / np.where(extent > 0, extent, 1)

    def worst(first: int, last: int) -> tuple[float, int, int, int]:
        offset, chord = unit[first + 1 : last] - unit[first], unit[last] - unit[first]
        if len(offset) == 0:
            return 0.0, first, first, last
        along = (offset @ chord / max(chord @ chord, 1e-30)).clip(0, 1)
        distance = np.hypot(*(offset - along[:, None] * chord).T)
        index = int(distance.argmax())
        return -float(distance[index]), first, first + 1 + index, last

    kept, gaps = {0, len(line) - 1}, [worst(0, len(line) - 1)]
    while gaps and len(kept) < most:
        distance, first, middle, last = heapq.heappop(gaps)
        if -distance <= tolerance:
            break
        kept.add(middle)
        heapq.heappush(gaps, worst(first, middle))
        heapq.heappush(gaps, worst(middle, last))
    return line[sorted(kept)]


def choose(samples: Iterable[Any], pictures: int) -> set[str]:
    """Keys of the `pictures` samples to draw, −1 for all, as evenly over the defect types and within each as goes, good images first."""
    groups: dict[str, list[str]] = {}
    for sample in samples:
        groups.setdefault(sample.defect, []).append(sample.key)
    names = sorted(groups, key=lambda name: (name != GOOD, name))
    left = sum(map(len, groups.values())) if pictures < 0 else min(pictures, sum(map(len, groups.values())))
    share = dict.fromkeys(names, 0)
    while left > 0:
        for name in names:
            if left > 0 and share[name] < len(groups[name]):
                share[name] += 1
                left -= 1
    return {keys[(2 * i + 1) * len(keys) // (2 * n)] for name, n in share.items() for keys in [groups[name]] for i in range(n)}


def file_names(defects: dict[str, str]) -> dict[str, str]:
    """{key: defect type} as {key: file name of its strip}: defect_stem.png, fit for every file system, no two alike."""
    names, taken = {}, set()
    for key, defect in defects.items():
        path, _, region = key.partition("#")
        stem = PurePosixPath(path).stem + (f"_{region}" if region else "")
        plain = unicodedata.normalize("NFC", f"{defect}_{stem}")
        plain = "".join(sign if ("_" + sign).isidentifier() or sign in "-." else "-" for sign in plain).lstrip(".")
        plain = plain.encode()[:180].decode(errors="ignore")  # file systems allow 255 bytes
        name, count = plain, 1
        while name.casefold() in taken:
            count += 1
            name = f"{plain}-{count}"
        taken.add(name.casefold())
        names[key] = f"{name}.png"
    return names

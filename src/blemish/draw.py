"""Pictures of a run, drawn from arrays: a strip for each image. Also which images are drawn, and their file names."""

import functools
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import contourpy
import matplotlib
import numpy as np
from numpy import ndarray
from PIL import Image, ImageDraw, ImageFont

from blemish.metrics.image import GOOD
from blemish.types import ANOMALOUS, IGNORED, NO_TRUTH, NORMAL, UNKNOWN

Scale = tuple[float, float, float]  # map values: where the colours begin, where normal images end, where the colours end

PANEL_LEAST, PANEL_MOST = 224, 640  # px: small images are enlarged by a whole number to reach the first, large ones reduced to the second
MARGIN, GAP, BAR = 14, 12, 10  # px around the strip, between panels, width of the colour bar
PAPER, INK, QUIET, FAINT = (255, 255, 255), (26, 26, 26), (95, 95, 95), (236, 236, 236)
ALARM, TRUTH, CASING = (0, 229, 255), (255, 255, 255), (0, 0, 0)  # lines around alarms and truth, and their edges
VEIL = (0.35, 0.75)  # opacity of the map's colour in an overlay where normal images end, and at the upper end of the scale
VERDICTS = {True: ("anomalous", (176, 32, 32)), False: ("normal", (24, 96, 48)), None: ("no threshold", (60, 60, 60))}  # and their paper
DASH = 5.0  # px on, px off
COLOURS = (matplotlib.colormaps["inferno"](np.linspace(0, 1, 256))[:, :3] * 255).round().astype(np.uint8)  # (256, 3)
GROUND = np.full((256, 3), 128, np.uint8)  # colours of the truth: grey where it is unknown or ignored
GROUND[[0, 1]] = [[20, 20, 20], [255, 255, 255]]


def to_scale(values: ndarray, scale: Scale) -> ndarray:
    """Map values as float32 in [0, 1] between the ends of the scale; NaN becomes the upper end."""
    low, *_, high = scale
    unit = (values.astype(np.float64) - low) / (high - low if high > low else 1.0)
    return np.nan_to_num(unit, nan=1.0, posinf=1.0, neginf=0.0).clip(0, 1).astype(np.float32)


def colour(values: ndarray, scale: Scale) -> ndarray:
    """A map (H, W) in the colours (H, W, 3) uint8 of a perceptually uniform colour map, dark to bright between the ends of the scale."""
    return COLOURS[(to_scale(values, scale) * 255).round().astype(np.uint8)]


def overlay(
    image: ndarray,
    values: ndarray,
    scale: Scale | None,
    threshold: float | None,
    mask: ndarray | None = None,
    size: tuple[int, int] | None = None,
) -> Image.Image:
    """An image (H, W, 3) uint8 with a map (H, W) in colours where it is above what normal images show.

    The larger a value the more opaque; nothing is coloured without a scale. A solid line surrounds values above the threshold, a dashed
    one the anomalous pixels of the mask (H, W). `size`: (width, height) of the result.
    """
    if scale is not None:
        least, most = VEIL
        above = ~(values <= scale[1])  # NaN among them
        opacity = np.where(above, least + (most - least) * to_scale(values, scale[1:]), np.float32(0))[..., None]  # (H, W, 1)
        image = (image * (1 - opacity) + colour(values, scale) * opacity).round().astype(np.uint8)
    picture = _sized(image, size or image.shape[1::-1])
    if mask is not None and (mask == 1).any():
        outline(picture, (mask == 1).astype(np.float32), 0.5, TRUTH, DASH)
    if threshold is not None and np.isfinite(threshold):
        outline(picture, values, threshold, ALARM, None)
    return picture


def outline(picture: Image.Image, values: ndarray, level: float, line: tuple[int, int, int], dash: float | None) -> None:
    """Draw the level line of `values` (h, w), stretched to the picture, with black edges; `dash`: px of a dash, None for a solid line."""
    height, width = values.shape
    finite = values[np.isfinite(values)]
    reach = float(np.abs(finite - level).max(initial=0.0)) or 1.0
    field = np.nan_to_num(values.astype(np.float64), nan=level - reach, posinf=level + reach, neginf=level - reach)
    # a border below the level closes the lines that touch the edge
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


def dashes(points: ndarray, length: float) -> list[ndarray]:
    """Every other piece of `length` of a polyline (n, 2)."""
    steps = np.hypot(*np.diff(points, axis=0).T)
    along = np.concatenate([[0.0], np.cumsum(steps)])
    pieces = []
    for begin in np.arange(0, along[-1], 2 * length):
        end = min(begin + length, along[-1])
        first, last = ([np.interp(at, along, points[:, axis]) for axis in (0, 1)] for at in (begin, end))
        pieces.append(np.stack([first, *points[(along > begin) & (along < end)], last]))
    return pieces


def stamp(picture: Image.Image, score: float, decision: bool | None, above: ndarray) -> None:
    """Write verdict and score on an overlay: at its top, or at its bottom where only the top has pixels `above` (H, W) what is normal.

    In one line, or two where the picture is narrow; nothing where it is too small for letters.
    """
    verdict, paper = VERDICTS[decision]
    words = f"{verdict} · score {number(score)}"
    size = max(10, round(min(picture.size) / 28))
    lines = [words] if font(size).getlength(words) <= picture.width - size else [verdict, number(score)]
    while size > 7 and max(map(font(size).getlength, lines)) > picture.width - 4:
        size -= 1
    face, step, edge = font(size), round(1.25 * size), max(1, size // 4)
    width, height = max(map(face.getlength, lines)) + 2 * edge, step * len(lines) + edge
    if width > picture.width or height > 0.6 * picture.height:
        return
    rows = -(-height * len(above) // picture.height)
    top = picture.height - height if above[:rows].any() and not above[-rows:].any() else 0
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, top, width - 1, top + height - 1), paper)
    pen.multiline_text((edge, top + edge // 2), "\n".join(lines), PAPER, face, spacing=step - size)


def caption(name: str, defect: str, label: int, score: float, threshold: float | None) -> str:
    """Two lines for the head of a strip: the image, and the result."""
    truth = {NORMAL: "normal", ANOMALOUS: "anomalous", UNKNOWN: "truth unknown"}[label]
    parts = [defect if defect in ("unknown", truth) else f"{defect} ({truth})", f"score {number(score)}"]
    if threshold is None:
        return f"{name}\n{' · '.join([*parts, 'no threshold'])}"
    alarm = score > threshold
    parts += [f"threshold {number(threshold)}", f"decision {'anomalous' if alarm else 'normal'}"]
    if label != UNKNOWN:
        parts.append("✓ right" if alarm == (label == ANOMALOUS) else f"✗ wrong ({'false alarm' if alarm else 'missed'})")
    return f"{name}\n{' · '.join(parts)}"


def number(value: float) -> str:
    """Four significant digits, with a true minus sign."""
    return f"{value:.4g}".replace("-", "−").replace("inf", "∞")


def strip(
    image: ndarray,  # (H, W, 3) uint8
    mask: ndarray | None,  # (H, W) uint8
    values: ndarray | None,  # (H, W), None for a method without maps
    scale: Scale | None,  # the same for every strip of a run
    threshold: float | None,  # of the map, None for no contour
    title: str,  # one or two lines
    reconstruction: ndarray | None = None,  # (H, W, 3) uint8
) -> Image.Image:
    """A row of panels under a title: input, reconstruction if there is one, ground truth, map with its colour bar, overlay.

    The picture's info has in "Panels" a JSON object with the box [left, top, right, bottom] of each panel that was drawn.
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

    has_map, has_truth = values is not None, mask is not None and not np.isin(mask, (NO_TRUTH, IGNORED)).all()
    panels = {"input": _sized(image, size)}
    if reconstruction is not None:
        panels["reconstruction"] = _sized(reconstruction, size)
    panels["ground truth"] = _sized(GROUND[mask], size) if has_truth else None
    panels["map"] = _sized(colour(values, scale), size) if has_map else None
    panels["overlay"] = overlay(image, values, scale, threshold, mask, size) if has_map else None
    boxes = {}
    for index, (name, picture) in enumerate(panels.items()):
        left = MARGIN + index * (cell + GAP) + (bar if name == "overlay" else 0)
        box = (left + (cell - width) // 2, top)
        pen.text((left, head), name, INK, font(text))
        if picture is None:
            pen.rectangle((*box, box[0] + width - 1, box[1] + height - 1), FAINT)
            words = "no ground truth" if name == "ground truth" else "no map"
            pen.text((box[0] + width / 2, box[1] + height / 2), words, QUIET, font(text), anchor="mm")
            continue
        sheet.paste(picture, box)
        boxes[name] = (*box, box[0] + width, box[1] + height)
        if name == "map":
            _bar(pen, (box[0] + width + GAP // 2, top, height), scale, numbers, text - 1)
        if name == "overlay":
            drawn = [("truth", TRUTH, True)] if mask is not None and (mask == 1).any() else []
            drawn += [("alarm", ALARM, False)] if threshold is not None and (values > threshold).any() else []
            _legend(pen, left + cell, head, drawn, text)
    sheet.info["Panels"] = json.dumps(boxes)
    return sheet


def panel_size(height: int, width: int) -> tuple[int, int]:
    """(width, height) in px of the panels of an image (height, width)."""
    longest = max(height, width)
    if longest > PANEL_MOST:
        return max(1, round(width * PANEL_MOST / longest)), max(1, round(height * PANEL_MOST / longest))
    factor = -(-PANEL_LEAST // longest)
    return width * factor, height * factor


def bar_numbers(scale: Scale, threshold: float | None) -> list[tuple[float, str]]:
    """The labelled values of a colour bar: its ends, and the threshold where it is between them."""
    low, _, high = scale
    inner = [threshold] if threshold is not None and low < threshold < high else []
    return [(value, number(value)) for value in (low, *inner, high)]


def elided(text: str, face: ImageFont.FreeTypeFont, width: float) -> str:
    """The text on one line no wider than `width` px, shortened in its middle if it must be."""
    # names of files may hold line breaks, and surrogates for bytes that are not UTF-8
    short = text = "".join(sign if sign.isprintable() else "?" for sign in text)
    kept = len(text)
    while kept > 0 and face.getlength(short) > width:
        kept -= 1
        short = f"{text[: kept // 2]}…{text[len(text) - (kept - kept // 2) :]}"
    return short


@functools.cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """matplotlib's own sans serif, at a size in px."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _sized(array: ndarray, size: tuple[int, int]) -> Image.Image:
    picture = Image.fromarray(np.ascontiguousarray(array))
    return picture.resize(size, Image.Resampling.BOX if size[0] < picture.width else Image.Resampling.NEAREST)


def _bar(pen: ImageDraw.ImageDraw, place: tuple[int, int, int], scale: Scale, numbers: list, text: int) -> None:
    """The colours of the scale at `place` = (left, top, height), bright end up, with numbers at the right."""
    left, top, height = place
    for row in range(height):
        shade = tuple(COLOURS[round(255 * (1 - row / max(height - 1, 1)))].tolist())
        pen.line((left, top + row, left + BAR - 1, top + row), shade)
    low, _, high = scale
    for value, words in numbers:
        y = top + (height - 1) * (1 - (value - low) / ((high - low) or 1.0))
        inner = low < value < high
        if inner:
            pen.line((left, y, left + BAR + 2, y), CASING, 3)
            pen.line((left, y, left + BAR + 2, y), ALARM, 1)
        # a number that would run into those of the ends is left out; its tick stays
        if not inner or 1.6 * text < y - top < height - 1.6 * text:
            pen.text((left + BAR + 5, y), words, INK, font(text), anchor="lm" if inner else "la" if value == high else "ld")


def _legend(pen: ImageDraw.ImageDraw, right: float, top: float, drawn: list[tuple[str, tuple, bool]], text: int) -> None:
    """Line samples with their words, right-aligned beside the panel's name."""
    y = top + 0.62 * text
    for words, ink, dashed in reversed(drawn):
        right -= font(text - 1).getlength(words)
        pen.text((right, top + 1), words, QUIET, font(text - 1))
        begin = right - 4 - 2 * text
        pen.line((begin, y, right - 5, y), CASING, 5)
        for left in np.arange(begin, right - 5, 2 * DASH) if dashed else [begin]:
            pen.line((left, y, min(left + DASH, right - 5) if dashed else right - 5, y), ink, 2)
        right = begin - 10


def choose(samples: Iterable[Any], pictures: int) -> set[str]:
    """Keys of the `pictures` samples to draw, −1 for all: as evenly as possible over the defect types and within each, good ones first."""
    groups: dict[str, list[str]] = {}
    for sample in samples:
        groups.setdefault(sample.defect, []).append(sample.key)
    order = sorted((i, name != GOOD, name) for name, keys in groups.items() for i in range(len(keys)))
    share = Counter(name for *_, name in order[: pictures if pictures >= 0 else None])
    return {groups[name][(2 * i + 1) * len(groups[name]) // (2 * n)] for name, n in share.items() for i in range(n)}


def file_names(defects: dict[str, str]) -> dict[str, str]:
    """{key: defect type} as {key: file name of its strip}: defect_stem.png, valid in every file system, no two alike."""
    names, used = {}, set()
    for key, defect in defects.items():
        path, _, tile = key.partition("#")
        stem = PurePosixPath(path).stem + (f"_{tile}" if tile else "")
        plain = unicodedata.normalize("NFC", f"{defect}_{stem}")
        plain = "".join(sign if ("_" + sign).isidentifier() or sign in "-." else "-" for sign in plain).lstrip(".")
        plain = plain.encode()[:180].decode(errors="ignore")  # file systems allow 255 bytes
        name, count = plain, 1
        while name.casefold() in used:
            count += 1
            name = f"{plain}-{count}"
        used.add(name.casefold())
        names[key] = f"{name}.png"
    return names

"""The result of one image, from a detector or its export, as a picture, as JSON and as files. Pillow for pictures, SciPy for boxes."""

import json
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import InputError
from .selection import regions_at_most

if TYPE_CHECKING:
    from PIL.Image import Image

TINT = ((255, 225, 0), (255, 120, 0), (200, 0, 40))  # from the level to as far above it again as it is above `low`
OUTLINE = (0, 229, 255)
OPACITY = (0.4, 0.7)
VERDICTS = {True: "anomalous", False: "normal", None: "no threshold"}


@dataclass(frozen=True, repr=False, eq=False)
class Result:
    """The result of one image, in its own pixels."""

    score: float  # larger is more anomalous
    p_value: float | None  # (1 + held-out normal images that score at least as high) / (1 + all of them); None without any
    decision: bool | None  # True for at most a share alpha of normal images; None without a threshold
    map: np.ndarray | None  # (H, W) float32; None for a method that only scores images
    path: Path | None = None  # of a file
    image: np.ndarray | None = None  # (H, W) or (H, W, 3) uint8; None where it was not kept
    threshold: float | None = None  # of the score
    map_threshold: float | None = None  # of a pixel of the map: what the maps of normal images seldom exceed; None where that is not known
    low: float | None = None  # what the maps of normal images have at least
    inside: np.ndarray | None = None  # ROI (H, W) bool, None for the full image
    region_levels: tuple[float, ...] = ()  # of the map, see `selection.region_levels`; empty where nothing is proven
    product: str | None = None  # that the image shows, of a detector of several
    product_p_value: float | None = None  # of its showing one of them, as p_value
    unknown_product: bool | None = None  # that p-value is at most alpha: no threshold is meant for the image

    @cached_property
    def boxes(self) -> list[tuple[int, int, int, int]]:
        """(x, y, w, h) of the components of the map above its threshold, the most anomalous first; empty without a threshold."""
        if self.map is None or self.map_threshold is None:
            return []
        try:
            from .boxes import boxes_of

            return boxes_of(self._seen, self.map_threshold)
        except ImportError as error:
            raise InputError("boxes: found with SciPy, which is not here (pip install scipy)") from error

    def regions(self, threshold: float) -> tuple[int, int | None]:
        """The number of regions of the map above a threshold, and how many of them at most are false, for all thresholds at once.

        The bound holds with 95 % confidence for an image whose part without defects is like a normal image; None where none is proven.
        """
        if self.map is None:
            raise InputError("regions: this result has no map; `predict` keeps it")
        from .boxes import boxes_of

        found, most = len(boxes_of(self._seen, threshold)), regions_at_most(self.region_levels, threshold)
        return found, None if most is None else min(most, found)

    @property
    def _seen(self) -> np.ndarray | None:
        """The map with −∞ outside the ROI."""
        return self.map if self.map is None or self.inside is None else np.where(self.inside, self.map, np.float32(-np.inf))

    def __repr__(self) -> str:
        parts = [] if self.path is None else [str(self.path)]
        parts += [] if self.product is None else ["unknown product" if self.unknown_product else self.product]
        parts += [VERDICTS[self.decision], f"score={self.score:.4g}"]
        parts += [] if self.p_value is None else [f"p_value={self.p_value:.3g}"]
        parts += [] if self.map is None else [f"map={self.map.shape[0]}×{self.map.shape[1]}"]
        return f"Result({', '.join(parts)})"

    def overlay(self) -> "Image":
        """The image with its decision and score, tinted and outlined where the map is above what normal images show."""
        if self.image is None:
            raise InputError("overlay: this result has no image; `predict` keeps it, `test` has written the overlay")
        return overlay(self.image, self._seen, self.low, self.map_threshold, f"{VERDICTS[self.decision]}, score {self.score:.4g}")

    def plot(self) -> Any:
        """Draw image, map and overlay side by side; returns matplotlib's axes, for `axes[0].figure.savefig(…)`."""
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise InputError("plot: drawn with matplotlib, which is not here (pip install matplotlib); or use overlay()") from error
        panels = {"image": self.image, "overlay": self.overlay()} | ({} if self.map is None else {"map": self.map})
        figure, ((*axes,),) = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 4), layout="constrained", squeeze=False)
        for ax, (name, panel) in zip(axes, panels.items(), strict=True):
            shown = ax.imshow(panel, cmap="inferno" if name == "map" else "gray")
            ax.set(title=name, xticks=[], yticks=[])
            if name == "map":
                figure.colorbar(shown, ax=ax)
        return axes

    def to_dict(self) -> dict[str, Any]:
        """Path, score, p_value, decision, threshold and boxes, for JSON; boxes are None without a threshold of the map or without SciPy."""
        boxes, path = None, None if self.path is None else str(self.path)
        with suppress(InputError):
            boxes = None if self.map_threshold is None else [list(box) for box in self.boxes]
        values = {"score": self.score, "p_value": self.p_value, "decision": self.decision, "threshold": self.threshold}
        names = () if self.product is None else ("product", "product_p_value", "unknown_product")
        return {"path": path, **values, "boxes": boxes, **{name: getattr(self, name) for name in names}}

    def save(self, folder: str | Path, name: str | None = None) -> list[Path]:
        """Write NAME_overlay.png, NAME_map.png (16 bit), NAME_mask.png and NAME.json, and return their paths.

        `name` is that of the file without its ending; an array needs one. InputError where a file of the user's, or the result of another
        image, would be replaced.
        """
        from .outputs import Outputs, encoded

        if name is None and self.path is None:
            raise InputError("save: an array has no name; expected save(folder, name=...)")
        folder, name, outputs, content = Path(folder).expanduser(), name or self.path.stem, Outputs(), self.to_dict()
        pictures = {} if self.image is None else {"overlay": self.overlay()}
        if self.map is not None:
            content |= {"map_min": float(self.map.min()), "map_max": float(self.map.max())}
            spread = max(content["map_max"] - content["map_min"], 1e-30)
            pictures["map"] = ((self.map - content["map_min"]) / spread * 65535).round().astype(np.uint16)
            if self.map_threshold is not None:
                pictures["mask"] = (self._seen > self.map_threshold).astype(np.uint8) * 255
        paths = {kind: folder / f"{name}_{kind}.png" for kind in pictures}
        table = folder / f"{name}.json"
        outputs.check([*paths.values(), table], "another folder or name=...")
        if table.exists() and (other := json.loads(table.read_bytes())["path"]) != content["path"]:
            raise InputError(f"{table}: the result of {other}; expected another folder or name=...")
        content["files"] = [path.name for path in paths.values()]
        for kind, path in paths.items():
            outputs.write(path, encoded(pictures[kind]))
        outputs.write(table, (json.dumps(content, indent=2) + "\n").encode())
        return [*paths.values(), table]

    def without_map(self) -> "Result":
        """The same with its boxes, but without map and image."""
        bare = replace(self, map=None, image=None, inside=None)
        bare.__dict__["boxes"] = self.boxes
        return bare


def overlay(image: np.ndarray, map: np.ndarray | None, low: float | None, level: float | None, text: str) -> "Image":
    """An image (H, W) or (H, W, 3) uint8 with a text on it, tinted and outlined where its map (H, W) is above a level, None for nowhere.

    The tint grows until the map is as far above `level` as that is above `low`, by default the least of the map.
    """
    from PIL import Image, ImageFilter

    pixels = np.array(image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2))
    above = np.zeros(image.shape[:2], bool) if map is None or level is None else map > level
    if above.any():
        low = map[np.isfinite(map)].min() if low is None else low
        strength = ((map[above] - level) / max(level - low, 1e-30)).clip(0, 1)[:, None]  # (n, 1)
        colour = np.hstack([np.interp(strength, (0, 0.5, 1), channel) for channel in zip(*TINT, strict=True)])  # (n, 3)
        opacity = OPACITY[0] + (OPACITY[1] - OPACITY[0]) * strength
        pixels[above] = (pixels[above] * (1 - opacity) + colour * opacity).round()
        stroke = max(1, round(max(above.shape) / 400))
        blurred = Image.fromarray(above.astype(np.uint8) * 255).filter(ImageFilter.BoxBlur(stroke))
        pixels[(np.asarray(blurred) > 0) & ~above] = OUTLINE
    picture = Image.fromarray(pixels)
    write_on(picture, text)
    return picture


def write_on(picture: "Image", text: str) -> None:
    """Write a text in the upper left corner, on black, as large as suits the picture and fits into it."""
    from PIL import ImageDraw, ImageFont

    size = min(max(picture.width // 28, 12), 60)
    while size > 7 and ImageFont.load_default(size).getlength(text) > picture.width - size:
        size -= 1
    pen, face = ImageDraw.Draw(picture), ImageFont.load_default(size)
    pen.rectangle((0, 0, face.getlength(text) + size, 1.6 * size), (0, 0, 0))
    pen.text((size / 2, 0.8 * size), text, (255, 255, 255), face, anchor="lm")

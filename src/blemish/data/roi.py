"""Regions of interest: one mask for all images, or a folder with a mask for each."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from blemish.data.masks import binary, read_mask
from blemish.edge.errors import InputError
from blemish.edge.geometry import nearest
from blemish.edge.reading import digest_of, file_digest, find_images
from blemish.files import picture_info

Part = tuple[int, int, int, int]  # (x, y, w, h) in pixels


class Roi:
    """A region of interest, scaled to the size of each image by nearest neighbour.

    source: a mask (file or array, see `masks.interpret`), or a folder of masks. A mask in a folder has its image's path relative to
    `root`, or its image's name if it is at the top of the folder; suffixes do not matter. InputError for anything else, or an empty mask.
    """

    def __init__(self, source: str | Path | np.ndarray, root: str | Path = "."):
        self.root, self.folder, self.mask = Path(root), None, None
        self.digests: dict[Path | None, str] = {}
        if isinstance(source, np.ndarray):
            self.name = "an array"
            try:
                self.mask = binary(source)
            except InputError as error:
                raise InputError(f"data.roi: {error}") from None
        else:
            self.name = path = Path(source).expanduser()
            if not path.exists():
                raise InputError(f"data.roi={source}: no such file or folder; expected a mask, or a folder with a mask for each image")
            self.folder = path if path.is_dir() else None
            self.mask = None if self.folder else read_mask(path)
        if self.mask is not None:
            self.mask = _not_empty(self.mask, f"data.roi: {self.name}")
        found = find_images(self.folder, results=True) if self.folder else []
        self.files = {path.relative_to(self.folder).with_suffix(""): path for path in reversed(found)}

    def inside(
        self, path: Path | None, height: int, width: int, part: Part | None = None, load: Callable[[Path], np.ndarray] = read_mask
    ) -> np.ndarray:
        """The ROI (H, W) bool of an image (height, width), or (h, w) of a part of it; InputError for an image without a mask."""
        mask = self.mask if self.folder is None else self._mask_of(path, load)
        x, y, w, h = part or (0, 0, width, height)
        if mask.shape == (height, width):
            return mask[y : y + h, x : x + w]
        return mask[np.ix_(nearest(mask.shape[0], height)[y : y + h], nearest(mask.shape[1], width)[x : x + w])]

    def _mask_of(self, path: Path | None, load: Callable[[Path], np.ndarray]) -> np.ndarray:
        if path is None:
            raise InputError(f"data.roi={self.folder}: arrays have no path to find a mask by; expected one mask for all, not a folder")
        file = self.file(path)
        try:
            return _not_empty(load(file), str(file))
        except InputError as error:
            raise InputError(f"{path}: the mask of its ROI cannot be used: {error}") from None

    def file(self, path: Path) -> Path:
        """The mask file of an image."""
        if self.folder is None:
            return self.name
        relative = path.relative_to(self.root) if path.is_relative_to(self.root) else Path(path.name)
        bare = relative.with_suffix("")
        found = self.files.get(bare) or self.files.get(Path(bare.name))
        if found is None:
            raise InputError(f"{path}: no mask of its ROI; expected {self.folder / bare}.png or {self.folder / bare.name}.png")
        return found

    def digest(self, path: Path | None = None) -> str:
        """16 hex digits that identify the mask of an image, or all masks."""
        file = self.file(path) if self.folder and path else None
        if file not in self.digests:
            masks = [self.mask.tobytes(), str(self.mask.shape).encode()] if self.folder is None else []
            masks += [f"{name}\n{file_digest(one)}".encode("utf-8", "replace") for name, one in sorted(self.files.items()) if file is None]
            self.digests[file] = file_digest(file) if file else digest_of(b"\n".join(masks))
        return self.digests[file]

    def save(self, path: Path) -> None:
        """Write the one mask for all images as a PNG, white on black."""
        Image.fromarray(self.mask).save(path, pnginfo=picture_info())


def _not_empty(mask: np.ndarray, name: str) -> np.ndarray:
    if not mask.any():
        raise InputError(f"{name} is a mask without a white pixel; expected white on the ROI")
    return mask.astype(bool)

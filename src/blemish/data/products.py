"""Several products at once: the images of several data modules, each with the name of its product."""

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from blemish.data.manifest import Sample
from blemish.data.module import ImageData
from blemish.data.ranges import fit_ranges
from blemish.edge.errors import InputError


@dataclass(kw_only=True, eq=False, repr=False)
class ProductData(ImageData):
    """The images of the data modules `parts`, by product: each has been split by itself, and all come to one size.

    root: folder above all of theirs, null for the deepest one. InputError for a product without images of its own, for an image of two
    products, for a ROI of a part, and for deep images without a window that is the same whatever the products are.
    """

    name, published, layout = "products", "of each product", ""

    root: str | None
    parts: Mapping[str, ImageData]

    def __post_init__(self) -> None:
        for name, part in self.parts.items():
            if part.roi or part.source:
                raise InputError(f"{name}: {'has a ROI of its own' if part.roi else 'is not made of files'}; expected image files without")
        self.root = self.root or os.path.commonpath([part.root.resolve() for part in self.parts.values()])
        super().__post_init__()

    def folder(self):
        return self.root

    def scan(self) -> list[Sample]:
        found, owner = [], {}
        for name, part in self.parts.items():
            own, root = part.root.resolve(), self.root.resolve()
            if not own.is_relative_to(root):
                raise InputError(f"data.root={self.root}: {part.root} of {name} is not below it")
            prefix = own.relative_to(root)

            def moved(path: str, prefix: Path = prefix) -> str:
                return (prefix / path).as_posix() if path else ""

            for sample in part.listed():
                found.append(sample._replace(path=moved(sample.path), mask=moved(sample.mask), product=name))
                if owner.setdefault(found[-1].path, name) != name:
                    raise InputError(f"{self.root / found[-1].path}: of the products {owner[found[-1].path]} and {name}; expected one")
            self.skipped |= {moved(key): reason for key, reason in part.skipped.items()}
        return found

    def _held_out(self, samples: list[Sample]) -> list[Sample]:
        return samples  # the parts have done so

    def setup(self, stage: str | None = None) -> None:
        if self.digest:
            return
        chosen = self.window
        super().setup(stage)
        for name in self.parts:
            for split in (self.split_of("train"), "test"):
                if not any((sample.product, sample.split) == (name, split) for sample in self.samples):
                    raise InputError(f"{name}: no {split} image; expected some of every product")
        if chosen == "auto" and self.window:
            raise InputError("data.window=auto: would depend on which products there are; expected dtype, or [lo, hi] for all of them")

    def of(self, product: str) -> "ProductData":
        """The images of one product, and the ranges of their values."""
        own = copy.copy(self)
        own.samples = [sample for sample in self.samples if sample.product == product]
        paths = sorted({sample.path for sample in own.samples_of("train")})
        own.ranges = fit_ranges([self.root / path for path in paths], self.values_in_roi)
        return own

"""One detector for several products: a detector for each, which one an image is given to, and whether it shows any of them."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blemish.detector import Detector, Maps
from blemish.edge.errors import InputError
from blemish.edge.ranges import Range
from blemish.ops.maps import apply_ignore_mask
from blemish.types import Batch, ProductPrediction


class Gallery(nn.Module):
    """The global features of a product's normal images, and how far each is from the nearest of the others."""

    def __init__(self):
        super().__init__()
        self.register_buffer("rows", torch.empty(0))  # (n, D)
        self.register_buffer("apart", torch.empty(0))  # (n,) squared distances

    def fit(self, rows: Tensor) -> None:
        self.rows = rows
        self.apart = squared_distances(rows, rows).fill_diagonal_(torch.inf).amin(1)

    def compare(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Squared distances (B,) of rows (B, D) to the nearest of the product, and their p-values (B,), float64.

        Of n images and one more of the same product, exchangeable, (1 + #{i: apart_i ≥ distance}) / (n + 1) is ≤ p with probability ≤ p:
        the one more could only bring the others nearer to each other, as for a complete memory bank (docs/calibration.md).
        """
        distance = squared_distances(rows, self.rows).amin(1)
        return distance, (1 + (self.apart >= distance[:, None]).sum(1).double()) / (len(self.rows) + 1)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name in self._buffers:  # their size is not known before
            self._buffers[name] = state_dict[prefix + name].to(self._buffers[name].device)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Products(Detector):
    """A detector of one method for each product, by name, and one backbone for all.

    An image is given to the product that has the nearest global feature among its normal images, and its score is that of this product's
    detector, which is calibrated by itself: no part depends on another, so that they can be added and removed. The p-value of a
    prediction is the largest that the image has as one of a product: an image of any of them has p ≤ α with probability ≤ α, and a small
    one says that the product is unknown.

    InputError for a method whose scores do not come from the backbone's maps.
    """

    not_exportable = "it is of several products; export the run of each"

    def __init__(self, parts: Mapping[str, Detector]):
        super().__init__()
        self.parts, self.galleries, self.names = nn.ModuleList(), nn.ModuleList(), []
        for name, part in sorted(parts.items()):
            self.add(name, part)

    def add(self, name: str, part: Detector, gallery: Gallery | None = None) -> None:
        """Add or replace a product: its detector with or without a backbone of its own, and its gallery if it has been fitted."""
        if not (part.needs_fit and part.inputs_for("test")[0]):
            raise InputError(f"{type(part).__name__}: does not score a backbone's maps, which tell products apart; expected another method")
        if name in self.names:
            self.remove(name)
        if not self.names:
            self.backbone, self.map_share = part.backbone, part.map_share
        place = sorted([*self.names, name]).index(name)
        self.names.insert(place, name)
        self.parts.insert(place, part)
        self.galleries.insert(place, gallery or Gallery())
        self._share(part)
        self.join_ranges()

    def remove(self, name: str) -> None:
        """Remove a product, so that nothing of it is left."""
        if name not in self.names or len(self.names) == 1:
            raise InputError(f"{name}: {'the only product' if name in self.names else 'no product here'}; found {', '.join(self.names)}")
        place = self.names.index(name)
        del self.parts[place], self.galleries[place], self.names[place]
        self.join_ranges()

    def part(self, name: str) -> Detector:
        return self.parts[self.names.index(name)]

    @contextmanager
    def fitting(self, name: str) -> Iterator[tuple[Detector, Gallery]]:
        """The detector of a product, with the backbone as a part of it, and the gallery, to be fitted in the block."""
        part = self.part(name)
        part.backbone = self.backbone
        try:
            yield part, self.galleries[self.names.index(name)]
        finally:
            self._share(part)
            self.join_ranges()

    def _share(self, part: Detector) -> None:
        """Let a part use the backbone without owning it, so that a checkpoint has it once."""
        part._modules.pop("backbone", None)
        part.__dict__["backbone"] = self.backbone

    def join_ranges(self) -> None:
        """Set `ranges` to what the images of all products have."""
        parts = [part.ranges for part in self.parts]
        joined = {dtype: zip(*(own[dtype] for own in parts if dtype in own), strict=True) for own in parts for dtype in own}
        self.ranges = {dtype: Range(min(lo), max(hi), min(least)) for dtype, (lo, hi, least) in joined.items()}

    def recognise(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The product (B,) of images with these global features (B, D), and the p-value (B,) of their being one of them."""
        distances, p_values = zip(*(one.compare(rows) for one in self.galleries), strict=True)
        return torch.stack(distances, 1).argmin(1), torch.stack(p_values, 1).amax(1)

    def score(self, maps: Maps, size: tuple[int, int]) -> ProductPrediction:
        product, p_value = self.recognise(global_feature(maps))
        score, map = torch.empty(len(product), device=product.device), None
        for place in product.unique().tolist():
            chosen = (product == place).nonzero().flatten()
            found = self.parts[place].score([stage[chosen] for stage in maps], size)
            score[chosen] = found.score.float()
            if found.map is not None:
                map = torch.empty(len(product), *found.map.shape[1:], device=product.device) if map is None else map
                map[chosen] = found.map.float()
        return ProductPrediction(score, map, product, p_value)

    def test_step(self, batch: Batch, index: int) -> ProductPrediction:
        found = self.score(self.maps(batch), tuple(batch.image.shape[-2:]))
        return ProductPrediction(*apply_ignore_mask(found, batch.ignore_mask, self.map_share), found.product, found.p_value)


def global_feature(maps: Maps) -> Tensor:
    """The mean of each stage over its cells, of unit length for each stage: (B, ΣC), which no other image has a part in."""
    return torch.cat([F.normalize(stage.float().mean((2, 3)), dim=1) for stage in maps], 1)


@torch.no_grad()
def global_features(part: Detector, batches: Iterable[Batch]) -> Tensor:
    """`global_feature` (n, ΣC) of all images of some loaders, in the order of their keys."""
    found = {}
    for batch in batches:
        found |= dict(zip(batch.path, global_feature(part.maps(batch)), strict=True))
    return torch.stack([found[key] for key in sorted(found)])


def squared_distances(rows: Tensor, others: Tensor) -> Tensor:
    """‖a − b‖² of rows (B, D) and others (n, D): (B, n)."""
    return torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist").square()

"""SPADE: correspondences with the nearest normal images (Cohen, Hoshen 2020, arXiv 2005.02357)."""

import tempfile
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.svm import OneClassSVM
from torch import Tensor, nn

from blemish.detector import COUNT, Maps, OnePassDetector, RowBuffer, Stages, distributed, number
from blemish.edge.checks import check_stages
from blemish.edge.errors import InputError
from blemish.features.extractor import Features
from blemish.ops.maps import check_blur, smooth_upsample
from blemish.ops.neighbours import nearest
from blemish.types import Prediction

TILE = 2**22  # squared distances, or feature values, held at a time
BLOCK = 32  # images of the gallery moved at a time
BEAM = 16  # pairs of cells followed down to guess a distance


class SPADE(OnePassDetector):
    """Anomaly of an image = mean L2 distance to its `neighbors` nearest normal images (section 3.2), by the mean over `global_stage`.

    Anomaly of a position = distance to the nearest among all positions of those images (section 3.3, κ = 1) in the concatenated `stages`,
    resized to the finest; the map is upsampled and blurred by `sigma` pixels. `outlier_filter="ocsvm"` leaves out training images that a
    one-class SVM with an RBF kernel calls outliers, at most a share `nu` of them. The gallery of stages is mapped from a temporary
    file after the fit and from the checkpoint later, so that only the nearest images need be in memory.
    """

    map_not_exportable = (
        "the search among all positions of the nearest images branches on the data, and without branches it is a product of all positions "
        "with all; use maps=false for its score, or export patchcore for a map"
    )

    def __init__(
        self,
        backbone: str,
        stages: Stages,
        global_stage: int | str,
        weights: str,
        neighbors: int,
        outlier_filter: str | None,
        nu: float,
        sigma: float,
        score: str | float,
        seed: int,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.set_score(score, "neighbors")
        check_stages(stages=stages, global_stage=[global_stage])
        self.check_arguments(neighbors=COUNT, outlier_filter=("none", "ocsvm", None), nu=number("(0, 1)"), sigma=check_blur)
        stages = list(stages)
        self.backbone = Features(backbone, stages if global_stage in stages else [*stages, global_stage], weights, seed)
        self.local = len(stages)
        self.deep = stages.index(global_stage) if global_stage in stages else len(stages)
        self.neighbors, self.outlier_filter, self.nu, self.sigma = neighbors, outlier_filter, nu, sigma
        self.names = [f"stage{s}" for s in range(self.local)]
        self.add_buffers("images")  # (N, C) float32 means of the global stage
        for name in self.names:  # (N, P_s, C_s) float16, on the stage's own grid, mapped from disk
            self.register_buffer(name, torch.empty(0, dtype=torch.float16))

    def new_state(self, images: int) -> "Gallery":
        return Gallery(images, self.local)

    def restore(self, state: "Gallery") -> None:
        if self.outlier_filter == "ocsvm":
            raise InputError("update: model.outlier_filter=ocsvm needs all images at once; fit them together, or use none")
        for start in range(0, len(self.images), BLOCK):
            state.update([getattr(self, name)[start : start + BLOCK] for name in ("images", *self.names)])

    def collect(self, maps: Maps) -> list[Tensor]:
        return [describe(maps[self.deep])] + [rows(stage).half() for stage in maps[: self.local]]

    def fit(self, state: "Gallery") -> None:
        images, *stages = state.compute()
        for name, stage in zip(self.names, stages, strict=True):
            if not all(image.isfinite().all() for image in stage):
                raise InputError(f"{name}: features beyond ±65504, the largest number of the gallery's float16; choose other stages")
        if self.outlier_filter == "ocsvm":
            normal = inliers(images, self.nu)
            images, stages = images[normal], [select(stage, normal) for stage in stages]
        for name, value in zip(["images", *self.names], [images, *stages], strict=True):
            setattr(self, name, value)

    def score(self, maps: Maps, size: tuple[int, int]) -> Prediction:
        grids = tuple(tuple(stage.shape[-2:]) for stage in maps[: self.local])
        gallery = [getattr(self, name) for name in self.names]
        if any(h * w != stage.shape[1] for (h, w), stage in zip(grids, gallery, strict=True)):
            raise InputError(f"image_size: SPADE's gallery has {gallery[0].shape[1]} positions and now gets {grids[0]}; keep the size")
        distance, index = nearest(describe(maps[self.deep]), self.images, min(self.neighbors, len(self.images)))  # (B, K)
        if torch.compiler.is_exporting():
            return Prediction(distance.mean(1))
        stages = [rows(stage) for stage in maps[: self.local]]
        images = zip(*stages, strict=True)
        found = [correspondences(image, [stage[near] for stage in gallery], grids) for image, near in zip(images, index, strict=True)]
        map = smooth_upsample(torch.stack(found).unflatten(1, grids[0]), size, self.sigma)  # (B, H, W)
        return self.from_map(map, distance.mean(1))


def describe(map: Tensor) -> Tensor:
    """Global average pooling of (B, C, h, w)."""
    return map.float().mean((2, 3))  # (B, C)


def rows(map: Tensor) -> Tensor:
    return map.float().flatten(2).transpose(1, 2).contiguous()  # (B, P, C)


def inliers(features: Tensor, nu: float) -> Tensor:
    """Which of features (N, C) a one-class SVM with an RBF kernel exp(-‖x - y‖² / (C · variance)) does not call outliers, (N,) bool.

    Outliers are at most a share `nu`. Those on the boundary, whose decision value is 0 within the solver's tolerance, are inliers.
    """
    x = features.double().cpu().numpy()
    svm = OneClassSVM(kernel="rbf", gamma="scale", nu=nu, tol=1e-6).fit(x)
    return torch.from_numpy(svm.decision_function(x) > -1e-5).to(features.device)


def select(rows: Tensor, which: Tensor) -> Tensor:
    """The rows where `which` (N,) is True, on disk like all of them."""
    file = Rows()
    for i in which.nonzero()[:, 0].tolist():
        file.append(rows[i : i + 1])
    return file.mapped()


class Gallery(nn.Module):
    """The state of a fit: the images' descriptions in memory, and the rows of their stages on disk."""

    def __init__(self, images: int, stages: int):
        super().__init__()
        self.images = RowBuffer(images)
        self.files = [Rows() for _ in range(stages)]

    def update(self, parts: Sequence[Tensor]) -> None:
        self.images.update(parts[0])
        for file, part in zip(self.files, parts[1:], strict=True):
            file.append(part)

    def gather(self) -> None:
        self.images.gather()
        if distributed():
            self.files = [file.gathered(self.images.device) for file in self.files]

    def compute(self) -> list[Tensor]:
        return [self.images.compute(), *(file.mapped() for file in self.files)]


class Rows:
    """Tensors of one shape (…) and dtype, one after the other in a temporary file without a name, which a killed process cannot leave."""

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile(prefix="blemish-")  # noqa: SIM115 `mapped` closes it
        self.count, self.like = 0, torch.empty(0, 0)  # number of rows, and an empty tensor of them

    def append(self, rows: Tensor) -> None:
        """Write rows (n, …)."""
        try:
            rows.cpu().contiguous().numpy().tofile(self.file)
        except OSError as error:
            folder = tempfile.gettempdir()
            raise InputError(f"{folder}: the gallery cannot be written there ({error}); make room, or set TMPDIR=PATH") from error
        self.count, self.like = self.count + len(rows), rows[:0].cpu()

    def mapped(self) -> Tensor:
        """All rows (count, …), read from disk on access; the last call."""
        with self.file:
            if not self.count:
                return self.like
            self.file.flush()
            shape = (self.count, *self.like.shape[1:])
            return torch.from_numpy(np.memmap(self.file, self.like.numpy().dtype, mode="c", shape=shape))  # copy on write

    def gathered(self, device: torch.device) -> "Rows":
        """The rows of all processes, exchanged in blocks; the last call."""
        own, rank, result = self.mapped(), torch.distributed.get_rank(), Rows()
        metadata = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(metadata, (len(own), own.shape[1:], own.dtype))
        shape, dtype = next((shape, dtype) for count, shape, dtype in metadata if count)
        for sender, (count, *_) in enumerate(metadata):
            for start in range(0, count, BLOCK):
                stop = min(start + BLOCK, count)
                block = own[start:stop].to(device) if sender == rank else torch.empty(stop - start, *shape, dtype=dtype, device=device)
                torch.distributed.broadcast(block, sender)
                result.append(block)
        return result


@torch.no_grad()
def correspondences(query: Sequence[Tensor], gallery: Sequence[Tensor], grids: tuple[tuple[int, int], ...]) -> Tensor:
    """Distance (P,) of every position of an image to the nearest of all positions of K others, in the stages resized and concatenated.

    query[s] is (P_s, C_s) and gallery[s] (K, P_s, C_s) on grids[s], the first of which is the finest. Coarse stages are resized by
    `nearest` (the official code: bilinearly): squared distances then add up over the stages, those of a coarse stage are shared by all
    positions it covers, and a pair that is too far apart there needs no finer look. The result is exact except for rounding.
    """
    with torch.autocast(query[0].device.type, enabled=False):
        centres = [stage.float().mean((0, 1)) for stage in gallery]  # centring reduces cancellation
        query = [left(stage.float() - centre) for stage, centre in zip(query, centres, strict=True)]
        gallery = [right(stage.float() - centre) for stage, centre in zip(gallery, centres, strict=True)]
        return _Descent(query, gallery, levels(grids)).run().clamp_(min=0).sqrt_()


class _Descent:
    """Branch and bound over pairs of cells, one of the image and one of the gallery (numbered k·G + g), from the coarsest level down.

    Squared distances grow from level to level. `_guess` follows the BEAM best pairs of every cell down to positions, which bounds
    the true distances from above; `_refine` follows all pairs that are still below the bound of one of their positions.
    """

    def __init__(self, query: list[Tensor], gallery: list[Tensor], cells: list["Level"]):
        self.cells = [Level(*(part.to(query[0].device) for part in level)) for level in cells]
        self.query = [stage[level.at] for stage, level in zip(query, self.cells, strict=True)]  # (G, C+2) each
        self.gallery = [stage[:, level.at] for stage, level in zip(gallery, self.cells, strict=True)]  # (K, G, C+2) each
        self.best = [stage.new_full((len(stage),), torch.inf) for stage in self.query]  # (G,), of a cell the largest of its positions
        for level, coarser in enumerate(self.cells[1:]):  # contiguous what is read together: (G above, m, C+2), (K·G above, m, C+2)
            self.query[level] = self.query[level][coarser.children]
            self.gallery[level] = self.gallery[level][:, coarser.children].flatten(0, 1)

    def run(self) -> Tensor:
        top = len(self.cells) - 1
        others = self.gallery[top].flatten(0, 1)  # (K·G, C+2)
        for cells in torch.arange(len(self.query[top]), device=others.device).split(max(1, TILE // len(others))):
            square = self.query[top][cells] @ others.T  # (a, K·G)
            if top == 0:
                self.best[0][cells] = square.amin(1)
                continue
            self._guess(cells, square)
            own, other = (square < self.best[top][cells, None]).nonzero().unbind(1)
            self._refine(top - 1, cells[own], other, square[own, other])
        return self.best[0]

    def _children(self, level: int, own: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cells (n, m) of `level` below own (n,), and (n, w·m) below other (n, w), and their squared distances (n, m, w·m)."""
        table, count = self.cells[level + 1].children, len(self.best[level])
        image, cell = other // len(table), other % len(table)
        under = (image[..., None] * count + table[cell]).flatten(1)
        gallery = self.gallery[level]  # n may be 0, so that the shape has to be given
        rows = gallery.index_select(0, other.flatten()).view(*under.shape, gallery.shape[-1])  # (n, w·m, C+2)
        return table[own], under, self.query[level].index_select(0, own) @ rows.mT

    def _guess(self, cells: Tensor, square: Tensor) -> None:
        top, own = len(self.cells) - 1, cells
        value, other = square.topk(min(BEAM, square.shape[1]), dim=1, largest=False)  # (a, w)
        for level in range(top - 1, -1, -1):
            below, under, step = self._children(level, own, other)
            value = (step + value.repeat_interleave(under.shape[1] // value.shape[1], 1)[:, None]).flatten(0, 1)  # (a·m, w·m)
            value, order = value.topk(min(BEAM, value.shape[1]), dim=1, largest=False)
            own, other = below.flatten(), under.repeat_interleave(below.shape[1], 0).gather(1, order)
        self.best[0][own] = value[:, 0]
        for level in range(top):
            self.best[level + 1] = self.best[level][self.cells[level + 1].children].amax(1)

    def _refine(self, level: int, own: Tensor, other: Tensor, value: Tensor) -> None:
        step = max(1, TILE // self.query[level][0].numel())
        for own_, other_, value_ in zip(own.split(step), other.split(step), value.split(step), strict=True):
            below, under, square = self._children(level, own_, other_[:, None])
            square = square + value_[:, None, None]  # (n, m, m)
            if level == 0:
                self.best[0].scatter_reduce_(0, below.flatten(), square.amin(2).flatten(), "amin")
                continue
            pair, i, j = (square < self.best[level][below][:, :, None]).nonzero().unbind(1)
            self._refine(level - 1, below[pair, i], under[pair, j], square[pair, i, j])


class Level(NamedTuple):
    """Cells that share their position in a stage and in every coarser one."""

    at: Tensor  # (G,) that position in the stage
    children: Tensor  # (G, m) the cells of the next finer level in each, the first repeated where there are fewer than m


@lru_cache(maxsize=8)
def levels(grids: tuple[tuple[int, int], ...]) -> list[Level]:
    """The cells of every stage's level for `nearest` resizing to the first grid; the cells of the first level are its positions."""
    index = [torch.arange(h * w, dtype=torch.float64).view(1, 1, h, w) for h, w in grids]
    places = torch.stack([F.interpolate(i, grids[0], mode="nearest").flatten().long() for i in index], 1)  # (P, S)
    result, finer = [], torch.arange(len(places))  # the finer cell of a position (P,)
    for s in range(len(grids)):
        cells, cell = places[:, s:].unique(dim=0, return_inverse=True)  # (G, S-s), the cell of a position (P,)
        parent = torch.empty(int(finer.max()) + 1, dtype=torch.long).scatter_(0, finer, cell)
        order, size = parent.argsort(stable=True), parent.bincount()
        first, place = size.cumsum(0) - size, torch.arange(int(size.max())).expand(len(size), -1)
        result.append(Level(cells[:, 0], order[first[:, None] + place.where(place < size[:, None], 0)]))
        finer = cell
    return result


def left(x: Tensor) -> Tensor:
    """Rows whose product with those of `right` is the squared distance."""
    return torch.cat([-2 * x, x.square().sum(-1, keepdim=True), torch.ones_like(x[..., :1])], -1)


def right(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[..., :1]), x.square().sum(-1, keepdim=True)], -1)

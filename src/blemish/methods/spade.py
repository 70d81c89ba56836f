"""SPADE: correspondences with the nearest normal images (Cohen, Hoshen 2020, arXiv 2005.02357)."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from sklearn.svm import OneClassSVM
from torch import Tensor, nn

from blemish.detector import COUNT, Maps, OnePassDetector, Stages, number
from blemish.edge.calibration import CROSS, FULL
from blemish.edge.checks import check_stages
from blemish.edge.errors import InputError
from blemish.features.extractor import Features
from blemish.ops.accumulators import RowBuffer, distributed
from blemish.ops.maps import align as aligned
from blemish.ops.maps import check_blur, joined, smooth_upsample
from blemish.ops.neighbours import nearest
from blemish.types import Prediction

TILE = 2**19  # squared distances that a thread holds at a time: small enough for its cache
QUERIES = 2048  # positions that a thread takes at a time; a GPU takes all, as the gallery comes to it with every part
BLOCK = 32  # images of the gallery moved at a time


class SPADE(OnePassDetector):
    """Anomaly of an image = mean L2 distance to its `neighbors` nearest normal images (section 3.2), by the mean over `global_stage`.

    Anomaly of a position = distance to the nearest among all positions of those images (section 3.3, κ = 1): matching=concatenated compares
    all `stages` at once, resized to the finest grid as `align` says; per_stage each stage on its own grid, and the map is the mean of the
    stages'. It is upsampled and blurred by `sigma` pixels. score=neighbors is the paper's, others are of the map.
    `outlier_filter="ocsvm"` leaves out training images that a one-class SVM with an RBF kernel calls outliers, at most a share `nu` of
    them. The gallery of stages is mapped from a temporary file after the fit and from the checkpoint later, so that only the nearest
    images need be in memory.
    """

    map_not_exportable = (
        "the gallery holds the features of all training images; use maps=false for score=neighbors, or export patchcore for a map"
    )

    def __init__(
        self,
        backbone: str,
        stages: Stages,
        global_stage: int | str,
        weights: str,
        neighbors: int,
        matching: str,
        align: str,
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
        self.check_arguments(matching=("concatenated", "per_stage"), align=("bilinear", "nearest"))
        stages = list(stages)
        self.backbone = Features(backbone, stages if global_stage in stages else [*stages, global_stage], weights, seed)
        self.local = len(stages)
        self.deep = stages.index(global_stage) if global_stage in stages else len(stages)
        self.neighbors, self.outlier_filter, self.nu, self.sigma = neighbors, outlier_filter, nu, sigma
        self.per_stage, self.align = matching == "per_stage", align
        if self.map_share is not None:
            self.not_exportable = f"model.score={score} needs the map, and {self.map_not_exportable}"
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

    @property
    def left_out(self) -> str | None:
        # one more is only nearer where each image has enough others; it may replace one with nearer patches, as the map's score shows
        kind = FULL if len(self.images) > self.neighbors and self.map_share is None else CROSS
        return None if self.outlier_filter == "ocsvm" else kind

    def leave_one_out(self, maps: Maps, size: tuple[int, int], rows: Sequence[int]) -> Prediction:
        others = torch.arange(len(self.images), device=self.device)
        found = [self._score([stage[b : b + 1] for stage in maps], size, others[others != row]) for b, row in enumerate(rows)]
        return joined(found)

    def score(self, maps: Maps, size: tuple[int, int]) -> Prediction:
        return self._score(maps, size, None)

    def _score(self, maps: Maps, size: tuple[int, int], chosen: Tensor | None) -> Prediction:
        """The prediction from the gallery's images `chosen`, None for all."""
        grids = tuple(tuple(stage.shape[-2:]) for stage in maps[: self.local])
        gallery = [getattr(self, name) for name in self.names]
        if any(h * w != stage.shape[1] for (h, w), stage in zip(grids, gallery, strict=True)):
            raise InputError(f"image_size: SPADE's gallery has {gallery[0].shape[1]} positions and now gets {grids[0]}; keep the size")
        images = self.images if chosen is None else self.images[chosen]
        distance, index = nearest(describe(maps[self.deep]), images, min(self.neighbors, len(images)))  # (B, K)
        index = index if chosen is None else chosen[index]
        if torch.compiler.is_exporting():
            return Prediction(distance.mean(1))
        stages = list(range(self.local))
        found = []
        for group in [[s] for s in stages] if self.per_stage else [stages]:  # stages that are compared together
            query = rows(aligned([maps[s].float() for s in group], self.align))  # (B, P, C)
            own = [gallery[s] for s in group], [grids[s] for s in group]
            step = QUERIES if query.device.type == "cpu" else query.shape[1]
            tasks = [(part, near) for image, near in zip(query, index, strict=True) for part in image.split(step)]
            part = by_threads(lambda task, own=own: nearest_distance(task[0], self.images_of(*own, task[1], task[0])), tasks, query.device)
            found.append(smooth_upsample(torch.cat(part).view(len(query), *grids[group[0]]), size, self.sigma))
        return self.from_map(torch.stack(found).mean(0), distance.mean(1))

    def images_of(self, gallery: Sequence[Tensor], grids: Sequence[tuple[int, int]], index: Tensor, like: Tensor) -> Iterator[Tensor]:
        """The rows (P, C) of training images (K,), one after the other, from their stages (N, P_s, C_s) on `grids`."""
        for i in index.tolist():
            stages = [
                stage[i].to(like).T.unflatten(1, grid)[None] for stage, grid in zip(gallery, grids, strict=True)
            ]  # (1, C_s, h_s, w_s)
            yield rows(aligned(stages, self.align))[0]


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
def nearest_distance(query: Tensor, gallery: Iterable[Tensor]) -> Tensor:
    """Distance (P,) of every row (P, C) to the nearest of all rows of all parts (n, C) of a gallery, as many of which are held as come."""
    best, centre = None, query.mean(0)  # centring reduces cancellation
    with torch.autocast(query.device.type, enabled=False):
        query = query - centre
        own = query.square().sum(1)  # (P,) the same for all
        query = torch.cat([query, torch.ones_like(query[:, :1])], 1)  # (P, C + 1): the part's square is one more product
        for part in gallery:
            part = (part - centre).T
            part = torch.cat([-2 * part, part.square().sum(0, keepdim=True)])  # (C + 1, n), contiguous, which the product is quicker with
            found = torch.cat([(some @ part).amin(1) for some in query.split(max(1, TILE // part.shape[1]))])
            best = found if best is None else torch.minimum(best, found)
    return (best + own).clamp_min(0).sqrt()


def by_threads(task: Callable[[Any], Tensor], items: Sequence[Any], device: torch.device) -> list[Tensor]:
    """What `task` makes of each item; on a CPU each of torch's threads takes others, as those of one small product wait for each other."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        return [task(item) for item in items]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(task, items))
    finally:
        torch.set_num_threads(threads)

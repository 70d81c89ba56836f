"""PatchCore: distance to a coreset of all normal patches (Roth, Pemula, Zepeda, Schölkopf, Brox, Gehler 2022, arXiv 2106.08265)."""

import logging
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from blemish.detector import COUNT, Maps, OnePassDetector, RowBuffer, Stages, integer, number
from blemish.edge.errors import InputError
from blemish.features.extractor import Features
from blemish.ops.coreset import farthest_first, project
from blemish.ops.maps import align, check_blur, smooth_upsample
from blemish.ops.memory import available_memory
from blemish.ops.neighbours import distances, nearest
from blemish.types import Prediction

log = logging.getLogger(__name__)

FEW_PATCHES = 10  # in the bank, below which it says little of what is normal
NEIGHBOURS = 9  # b of `reweight: true`; the paper leaves it open


class PatchCore(OnePassDetector):
    """Anomaly = distance of a patch to the nearest of the memory bank (paper, eq. 6), a coreset of all normal patches (eq. 5, algorithm 1).

    A patch is the 3×3 means of the stages (section 3.1), pooled to `embed_dim` channels. The coreset is `coreset_ratio` of all patches,
    chosen farthest first after a sparse random projection to `projection` dimensions drawn from `seed`. `bank` is in the order of choice,
    and `radius[i]` is the largest projected distance of a normal patch to its first i + 1 rows (after an update, which adds
    `coreset_ratio` of the new patches, an upper bound of it).
    The image's score is its largest distance, re-weighted by eq. 7 over b = `reweight` neighbours (`true`: 9, `false`: not at all);
    the map is upsampled and blurred by `sigma` pixels. With another `score` than max it is that of the map.
    """

    def __init__(
        self,
        backbone: str,
        stages: Stages,
        weights: str,
        embed_dim: int | None,
        coreset_ratio: float,
        projection: int,
        reweight: bool | int,
        sigma: float,
        score: str | float,
        seed: int,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.set_score(score, "max")
        self.check_arguments(coreset_ratio=number("(0, 1]"), embed_dim=integer(1, also=(None,)), projection=COUNT, sigma=check_blur)
        self.check_arguments(reweight=integer(2, also=(True, False)))  # with b = 1 eq. 7 multiplies by 1 - 1
        self.neighbours = {True: NEIGHBOURS, False: 0}[reweight] if isinstance(reweight, bool) else reweight
        self.backbone = Features(backbone, stages, weights, seed)
        self.embed_dim, self.coreset_ratio, self.projection, self.sigma, self.seed = embed_dim, coreset_ratio, projection, sigma, seed
        self.add_buffers("bank", "radius")  # (M, D), (M,)
        self.register_buffer("patches", torch.zeros((), dtype=torch.long))  # number of patches of all training images
        self.register_buffer("nested", torch.tensor(True))  # no update: the first rows are a coreset of all patches themselves

    def new_state(self, images: int) -> RowBuffer:
        # of images fitted before, only the bank is left
        return PatchBuffer(images - int(self.fitted) if self.updating else images, self.projection)

    def collect(self, maps: Maps) -> Tensor:
        return embed(maps, self.embed_dim)

    def fit(self, state: RowBuffer) -> None:
        patches = state.compute().flatten(0, 1)  # (N·P, D)
        generator = torch.Generator().manual_seed(self.seed)
        count = coreset_size(len(patches), self.coreset_ratio)
        projected = project(patches, self.projection, generator)
        if self.updating:  # farthest first continues among the new patches, from the present bank
            start = project(self.bank, self.projection, torch.Generator().manual_seed(self.seed))
            indices, radius = farthest_first(projected, count, start)
            # the old patches keep their radius, though new rows may be nearer to them
            self.radius = torch.cat([self.radius, radius.clamp_min(self.radius[-1])])
            self.bank, self.nested = torch.cat([self.bank, patches[indices]]), torch.full_like(self.nested, False)
        else:
            indices, self.radius = farthest_first(projected, count, generator)
            self.bank, self.nested = patches[indices], torch.full_like(self.nested, True)
            self.patches.zero_()
        self.patches += len(patches)
        if len(self.bank) < FEW_PATCHES:
            found = len(self.bank), int(self.patches), self.coreset_ratio
            log.warning("the bank has %d of %d patches (model.coreset_ratio=%g): expected a larger ratio, or more images", *found)
        log.info("coreset: %d of %d patches, covering radius %.4g", len(self.bank), self.patches, self.radius[-1])

    def restore(self, state: RowBuffer) -> None:
        """Do nothing: `fit` uses the bank, and the patches it was chosen from are gone."""

    def cut(self, ratio: float) -> None:
        """Reduce the bank to the coreset of a smaller `coreset_ratio`, as a fit with it would have given: greedy choices are nested.

        Calibration scores belong to the larger bank and are dropped. InputError if the ratio is not in (0, the present one], or if
        the bank was updated: its second part depends on the first.
        """
        if not self.nested:
            raise InputError(f"ratio={ratio}: an updated bank cannot be cut; cut the run before its update")
        count = coreset_size(int(self.patches), ratio) if ratio > 0 else 0
        if not 1 <= count <= len(self.bank):
            present = len(self.bank) / max(1, int(self.patches))
            raise InputError(f"ratio={ratio}: expected a share in (0, {present:.4g}], the present coreset of {len(self.bank)} patches")
        self.bank, self.radius = self.bank[:count].clone(), self.radius[:count].clone()
        self.calibration = self.calibration.new_empty(0, 2)

    def score(self, maps: Maps, size: tuple[int, int]) -> Prediction:
        x = embed(maps, self.embed_dim)  # (B, P, D)
        distance, index = (v.view(x.shape[:2]) for v in nearest(x.flatten(0, 1), self.bank, 1))  # (B, P)
        map = smooth_upsample(distance.unflatten(1, maps[0].shape[-2:]), size, self.sigma)  # (B, H, W)
        if self.map_share is not None:
            return self.from_map(map)
        score, worst = distance.max(1)  # (B,)
        if self.neighbours and len(self.bank) > 1:
            x = x.gather(1, worst[:, None, None].expand(-1, 1, x.shape[2]))[:, 0]  # (B, D)
            score = score * weight(x, score, self.bank, index.gather(1, worst[:, None])[:, 0], self.neighbours)
        return self.from_map(map, score)


def embed(maps: Maps, embed_dim: int | None) -> Tensor:
    """Patch features (B, P, D) of the stages on the finest one's grid: 3×3 means, with channels pooled to `embed_dim` unless that is None.

    As in the official code borders are padded by zeros, coarse stages are resized bilinearly, and every stage is pooled before all are,
    which gives each the same share. An `embed_dim` above the number C of channels would only repeat them: D is then C, and the
    distances are those of the pooled features.
    """
    channels = tuple(stage.shape[1] for stage in maps)
    pooled = embed_dim is not None and embed_dim < sum(channels)
    smooth = [F.avg_pool2d(stage.float(), 3, stride=1, padding=1) for stage in maps]
    if pooled:  # pooling channels and resizing are both linear: on the stage's own grid pooling costs less
        smooth = [pool(part.flatten(2).mT, embed_dim).mT.unflatten(2, part.shape[-2:]) for part in smooth]
    x = align(smooth, mode="bilinear").flatten(2).transpose(1, 2)  # (B, P, ΣC)
    if embed_dim is None:
        return x.contiguous()
    return pool(x, embed_dim) if pooled else x @ pooling_root(channels, embed_dim).to(x)


def pool(x: Tensor, count: int) -> Tensor:
    """Adaptive average pooling of the channels of (B, P, C) to `count`."""
    if torch.compiler.is_exporting():  # as a product with a constant
        return x @ F.adaptive_avg_pool1d(torch.eye(x.shape[-1])[None], count)[0]
    return F.adaptive_avg_pool1d(x, count)


@lru_cache(maxsize=8)
def pooling_root(channels: tuple[int, ...], embed_dim: int) -> Tensor:
    """The symmetric (C, C) float64 matrix whose product with channels has the same norm as their pooling, stage by stage and then all."""
    with torch.inference_mode(False):
        ones = torch.eye(sum(channels), dtype=torch.float64).split(channels, dim=1)
        stages = torch.cat([F.adaptive_avg_pool1d(one[None], embed_dim)[0] for one in ones], 1)  # (C, S·embed_dim)
        pool = F.adaptive_avg_pool1d(stages[None], embed_dim)[0]  # (C, embed_dim)
        value, vector = torch.linalg.eigh(pool @ pool.T)
        # unlike a triangular factor the symmetric root is unique, so that a bank fits the queries of another machine
        return (vector * value.clamp(min=0).sqrt()) @ vector.T


def weight(x: Tensor, distance: Tensor, bank: Tensor, index: Tensor, count: int) -> Tensor:
    """The factor (B,) of eq. 7 for patches x (B, D) at `distance` (B,) from their nearest bank rows `index` (B,).

    1 - exp‖x - m*‖ / Σ exp‖x - m‖ over the `count` rows m of the bank nearest to m*, including itself: smallest where the bank is
    dense, near 1 where it is sparse.
    """
    _, around = nearest(bank[index], bank, min(count, len(bank)))  # (B, b)
    return 1 - torch.exp(distance - distances(x, bank[around]).logsumexp(1))


def coreset_size(patches: int, ratio: float) -> int:
    return max(1, int(ratio * patches))


class PatchBuffer(RowBuffer):
    """Patches (count, P, D) of images; InputError at the first batch if all of them will not fit into the device's memory."""

    def __init__(self, capacity: int, projection: int):
        super().__init__(capacity)
        self.projection = projection

    def update(self, rows: Tensor) -> None:
        if self.count == 0:
            positions, dim = rows.shape[1:]
            needed, free = forecast(self.capacity, positions, dim, self.projection), available_memory(rows.device)
            if needed > free:
                raise InputError(
                    f"PatchCore needs {needed / 2**30:.3g} GiB of memory for {self.capacity} images × {positions} patches × {dim} channels "
                    f"and {free / 2**30:.3g} GiB are available; choose a smaller image_size or model.embed_dim, fewer or coarser "
                    "model.stages, or one category at a time"
                )
        super().update(rows)


def forecast(images: int, positions: int, dim: int, projection: int) -> int:
    """Upper bound on the bytes of the patches of all training images and of the search for their coreset."""
    projected = min(dim, projection)
    # the float32 patches, their projection (if there is one) and its centred copy, and the search's 8-byte columns
    floats = dim + (projected if projected < dim else 0) + projected
    return images * positions * (4 * floats + 64)

"""PatchCore: distance to a coreset of all normal patches (Roth, Pemula, Zepeda, Schölkopf, Brox, Gehler 2022, arXiv 2106.08265)."""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blemish.detector import COUNT, SHARE_OR_COUNT, Maps, OnePassDetector, Stages, integer
from blemish.edge.calibration import CROSS, FULL
from blemish.edge.errors import InputError
from blemish.features.extractor import Features
from blemish.ops.accumulators import RowBuffer, RunningCovariance, distributed
from blemish.ops.coreset import farthest_first, project
from blemish.ops.maps import align, check_blur, joined, smooth_upsample
from blemish.ops.memory import available_memory
from blemish.ops.neighbours import distances, nearest
from blemish.types import Prediction

log = logging.getLogger(__name__)

FEW_PATCHES = 10  # in the bank, below which it says little of what is normal
NEIGHBOURS = 9  # b of `reweight: true`; the paper leaves it open
KEPT, HELD = 4, 16  # times the rows of a bounded bank to which those held are reduced, and at which they are
SHRINKAGE = 0.01  # share of the mean variance that is added to every principal component's before patches are whitened


class PatchCore(OnePassDetector):
    """Anomaly = distance of a patch to the nearest of the memory bank (paper, eq. 6), a coreset of all normal patches (eq. 5, algorithm 1).

    A patch is made of `patch_size` × `patch_size` cells of the stages (section 3.1) by `embedding`, see `embed`; whiten: distances are
    those of patches whose covariance is 1, see `whitening`. The coreset is `coreset_ratio` of all patches: `greedy` takes the farthest
    first, after a sparse random projection to `projection` dimensions drawn from `seed`, `random` draws them, `none` takes all. A whole
    number of them, the farthest first, by merge and reduce, see `BoundedBuffer`: memory does not grow with the images. `bank` is in the
    order of choice. `radius[i]`, of a greedy coreset only, is the largest projected distance of a normal patch to the first i + 1 rows
    (after an update, which adds `coreset_ratio` of the new patches, an upper bound of it; of a bounded bank, among
    the patches that it was last chosen from).
    A patch's distance is the mean of those to its `num_neighbors` nearest rows. The image's score is the largest of them, re-weighted by
    eq. 7 over b = `reweight` neighbours (`true`: 9, `false`: not at all); the map is upsampled and blurred by `sigma` pixels. With another
    `score` than max it is that of the map.
    """

    def __init__(
        self,
        backbone: str,
        stages: Stages,
        weights: str,
        embedding: str,
        patch_size: int,
        embed_dim: int,
        coreset: str,
        coreset_ratio: float | int,
        whiten: bool,
        projection: int,
        num_neighbors: int,
        reweight: bool | int,
        sigma: float,
        score: str | float,
        seed: int,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.set_score(score, "max")
        self.check_arguments(embedding=("official", "mean", "concatenate"), patch_size=(1, 3, 5, 7, 9), embed_dim=COUNT, sigma=check_blur)
        self.check_arguments(coreset=("greedy", "random", "none"), coreset_ratio=SHARE_OR_COUNT, projection=COUNT, num_neighbors=COUNT)
        self.check_arguments(whiten=(True, False))
        self.check_arguments(reweight=integer(2, also=(True, False)))  # with b = 1 eq. 7 multiplies by 1 - 1
        self.neighbours = {True: NEIGHBOURS, False: 0}[reweight] if isinstance(reweight, bool) else reweight
        self.backbone = Features(backbone, stages, weights, seed)
        self.embedding, self.patch_size, self.embed_dim = embedding, patch_size, embed_dim
        self.dims = sum(self.backbone.channels) if embedding == "concatenate" else embed_dim
        self.coreset, self.coreset_ratio, self.projection = coreset, coreset_ratio, projection
        self.num_neighbors, self.sigma, self.seed = num_neighbors, sigma, seed
        self.whiten, self.bounded = whiten, isinstance(coreset_ratio, int) and coreset == "greedy"
        self.add_buffers("bank", "radius", "center", "whitener")  # (M, D), (M,), (D,), (D, D)
        self.register_buffer("patches", torch.zeros((), dtype=torch.long))  # number of patches of all training images
        self.register_buffer("nested", torch.tensor(True))  # no update: the first rows are a coreset of all patches themselves

    @property
    def left_out(self) -> str | None:
        if self.whiten or self.bounded:
            return None  # every image has a part in what a row is
        # one more image brings patches nearer and none farther, but for the choice of a coreset, and eq. 7
        return FULL if (self.coreset == "none" or self.coreset_ratio == 1) and not self.neighbours else CROSS

    def new_state(self, images: int) -> RowBuffer:
        # of images fitted before, only the bank is left
        capacity = images - int(self.fitted) if self.updating else images
        if self.bounded:
            return BoundedBuffer(self.coreset_ratio, self.thin, self.whiten)
        return PatchBuffer(capacity, self.projection if self.coreset == "greedy" else 0, self.whiten)

    def collect(self, maps: Maps) -> Tensor:
        return embed(maps, self.embedding, self.patch_size, self.embed_dim)

    def whitened(self, patches: Tensor) -> Tensor:
        return (patches - self.center) @ self.whitener if self.whiten else patches

    def fit(self, state: RowBuffer) -> None:
        if self.whiten:
            self.center, self.whitener = whitening(*state.moments.compute())
        patches = self.whitened(state.compute().flatten(0, -2))  # (N·P, D), fewer of a bounded bank
        chosen, radius = self.choose(patches)
        rows = patches[chosen]
        if self.updating:
            if len(radius):  # the old patches keep their radius, though new rows may be nearer to them
                radius = torch.cat([self.radius, radius.clamp_min(self.radius[-1])])
            rows = torch.cat([self.bank, rows])
        else:
            self.patches.zero_()
        self.bank, self.radius = rows, radius
        self.nested = torch.full_like(self.nested, not self.updating and self.coreset != "none" and not self.bounded)
        self.patches += int(state.seen) if self.bounded else len(patches)
        if not self.bounded:
            self.owner = chosen // state.rows.shape[1]  # (M,) place of each row's image in the state
        if len(self.bank) < FEW_PATCHES:
            found = len(self.bank), int(self.patches), self.coreset_ratio
            log.warning("the bank has %d of %d patches (model.coreset_ratio=%g): expected a larger ratio, or more images", *found)
        covering = f", covering radius {self.radius[-1]:.4g}" if len(radius) else ""
        log.info("coreset: %d of %d patches%s", len(self.bank), self.patches, covering)

    def choose(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """The places (M,) of the coreset in patches (N, D), which continues the bank's in an update, and its covering radius after each."""
        if self.coreset == "none":
            return torch.arange(len(patches), device=patches.device), patches.new_empty(0)
        count, generator = coreset_size(len(patches), self.coreset_ratio), torch.Generator().manual_seed(self.seed)
        if self.coreset == "random":
            return torch.randperm(len(patches), generator=generator)[:count].to(patches.device), patches.new_empty(0)
        projected = project(patches, self.projection, generator)
        start = project(self.bank, self.projection, torch.Generator().manual_seed(self.seed)) if self.updating else generator
        return farthest_first(projected, count, start)

    def thin(self, patches: Tensor, count: int, moments: RunningCovariance) -> Tensor:
        """The coreset (`count`, D) of patches (N, D), by distances of patches that are whitened by the moments so far."""
        if self.whiten:
            self.center, self.whitener = whitening(*moments.compute())
        projected = project(self.whitened(patches), self.projection, torch.Generator().manual_seed(self.seed))
        return patches[farthest_first(projected, count, 0).indices]

    def restore(self, state: RowBuffer) -> None:
        """Do nothing: `fit` uses the bank, and the patches it was chosen from are gone."""
        if self.whiten or self.bounded:
            raise InputError(f"update: model.whiten={self.whiten}, model.coreset_ratio={self.coreset_ratio}: fit it again on all images")

    def cut(self, ratio: float) -> None:
        """Reduce the bank to the coreset of a smaller `coreset_ratio`, as a fit with it would have given: greedy choices are nested.

        Calibration scores belong to the larger bank and are dropped. InputError if the ratio is not in (0, the present one], if the
        bank was updated (its second part depends on the first), or if it is in no order of choice (`coreset: none`).
        """
        if not self.nested:
            raise InputError(f"ratio={ratio}: a bank that was updated, or is no coreset, cannot be cut; cut the run before, or fit again")
        count = coreset_size(int(self.patches), float(ratio)) if ratio > 0 else 0
        if not 1 <= count <= len(self.bank):
            present = len(self.bank) / max(1, int(self.patches))
            raise InputError(f"ratio={ratio}: expected a share in (0, {present:.4g}], the present coreset of {len(self.bank)} patches")
        self.bank, self.radius = self.bank[:count].clone(), self.radius[:count].clone()
        self.calibration = self.calibration.new_empty(0, 2)

    def score(self, maps: Maps, size: tuple[int, int]) -> Prediction:
        return self._score(self.whitened(self.collect(maps)), self.bank, maps[0].shape[-2:], size)

    def leave_one_out(self, maps: Maps, size: tuple[int, int], rows: Sequence[int]) -> Prediction:
        images = zip(self.collect(maps).split(1), rows, strict=True)
        return joined([self._score(x, self.bank[self.owner != row], maps[0].shape[-2:], size) for x, row in images])

    def _score(self, x: Tensor, bank: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Prediction:
        """The prediction for patches (B, P, D) of images on a `grid`, from a bank (M, D)."""
        if not len(bank):
            raise InputError("model.coreset_ratio: all patches of the bank are of one image; expected a larger ratio")
        distance, index = nearest(x.flatten(0, 1), bank, min(self.num_neighbors, len(bank)))  # (B·P, n)
        patch, first, index = (v.view(x.shape[:2]) for v in (distance.mean(1), distance[:, 0], index[:, 0]))  # (B, P)
        map = smooth_upsample(patch.unflatten(1, grid), size, self.sigma)  # (B, H, W)
        if self.map_share is not None:
            return self.from_map(map)
        score, worst = patch.max(1, keepdim=True)  # (B, 1)
        if self.neighbours and len(bank) > 1:
            x = x.gather(1, worst[:, :, None].expand(-1, -1, x.shape[2]))[:, 0]  # (B, D)
            first, index = first.gather(1, worst), index.gather(1, worst)[:, 0]
            score = score * weight(x, first[:, 0], bank, index, self.neighbours, self.dims)[:, None]
        return self.from_map(map, score[:, 0])


class PatchCoreEnsemble(OnePassDetector):
    """The mean of PatchCores on several backbones, each with a bank of its own, in units of the spread of its rows.

    The official code scales the scores, and the maps, of each to [0, 1] over all test images, which no single image allows.
    """

    def __init__(self, members: Sequence[PatchCore]):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.map_share = members[0].map_share
        self.add_buffers("spread")  # (M,)

    def features(self, image: Tensor) -> Maps:
        return [stage for member in self.members for stage in member.features(image)]

    def parts(self, maps: Maps) -> Iterator[tuple[PatchCore, Maps]]:
        """The members, each with its maps."""
        rest = iter(maps)
        return ((member, list(islice(rest, len(member.backbone.stages)))) for member in self.members)

    @property
    def left_out(self) -> str | None:
        return None if None in [member.left_out for member in self.members] else CROSS  # the spread depends on all images

    def new_state(self, images: int) -> "States":
        for member in self.members:
            member.updating, member.fitted = self.updating, self.fitted.clone()
        return States(member.new_state(images) for member in self.members)

    def restore(self, state: "States") -> None:
        for member, own in zip(self.members, state, strict=True):
            member.restore(own)

    def collect(self, maps: Maps) -> list[Tensor]:
        return [member.collect(own) for member, own in self.parts(maps)]

    def fit(self, state: "States") -> None:
        for member, own in zip(self.members, state, strict=True):
            member.fit(own)
        self.spread = torch.stack([(member.bank - member.bank.mean(0)).square().sum(1).mean().sqrt() for member in self.members])

    def score(self, maps: Maps, size: tuple[int, int]) -> Prediction:
        return self.mean_of([member.score(own, size) for member, own in self.parts(maps)])

    def leave_one_out(self, maps: Maps, size: tuple[int, int], rows: Sequence[int]) -> Prediction:
        return self.mean_of([member.leave_one_out(own, size, rows) for member, own in self.parts(maps)])

    def mean_of(self, found: Sequence[Prediction]) -> Prediction:
        """The mean of the members' scores, and that of their maps."""
        parts = [Prediction(one.score / spread, one.map / spread) for one, spread in zip(found, self.spread, strict=True)]
        return Prediction(torch.stack([one.score for one in parts]).mean(0), torch.stack([one.map for one in parts]).mean(0))


PatchCore.ensemble = PatchCoreEnsemble


class States(nn.ModuleList):
    """The states of the members of an ensemble."""

    def update(self, parts: Sequence[Tensor]) -> None:
        for state, part in zip(self, parts, strict=True):
            state.update(part)

    def gather(self) -> None:
        for state in self:
            state.gather()


def embed(maps: Maps, embedding: str, patch_size: int, embed_dim: int) -> Tensor:
    """Patch features (B, P, D) of the stages on the finest one's grid, of k×k cells each (k = `patch_size`), padded by zeros.

    `official`, as the authors' code: the C·k² values of a patch of each stage are pooled to D = `embed_dim`, and then those of all stages
    together, which gives each stage the same share. `mean`: means over the k×k cells come first, then the same two poolings, of
    channels. `concatenate`: these means as they are, D = ΣC. Coarse stages are resized bilinearly. A share of D larger than the number of
    values that are pooled would only repeat them: there are then as many, turned so that distances are those of the pooled ones.
    """
    parts, count, k = [], len(maps), patch_size
    for stage in maps:
        part = stage.float().contiguous(memory_format=torch.channels_last)  # so that D is contiguous at the end
        if embedding == "official":
            part = F.conv2d(part, pooling(part.shape[1], k, embed_dim, count).to(part), padding=k // 2)
        else:
            part = F.avg_pool2d(part, k, stride=1, padding=k // 2)
        if embedding == "mean":
            part = F.conv2d(part, pooling(part.shape[1], 1, embed_dim, count).to(part))
        parts.append(part)
    x = align(parts, mode="bilinear").movedim(1, 3).flatten(1, 2)  # (B, P, D), or (B, P, S·D)
    if embedding != "concatenate" and x.shape[2] > embed_dim:
        x = x @ pooling(x.shape[2], 1, embed_dim, 1)[:, :, 0, 0].mT.to(x)
    return x.contiguous()


@lru_cache(maxsize=8)
def pooling(channels: int, patch_size: int, embed_dim: int, stages: int) -> Tensor:
    """Adaptive average pooling of the C·k² values around a cell to `embed_dim`, as the weight (D, C, k, k) of a convolution.

    Where the second pooling, of D values of each of S stages to D, mixes no two stages, it is included: (D / S, C, k, k). If that has more
    rows than there are values, the symmetric root of the same norms takes its place: (C·k², C, k, k).
    """
    with torch.inference_mode(False):
        length, at = channels * patch_size**2, torch.arange(embed_dim)[:, None]
        index = torch.arange(length)
        inside = (index >= at * length // embed_dim) & (index < ((at + 1) * length + embed_dim - 1) // embed_dim)  # (D, C·k²)
        rows = inside / inside.sum(1, keepdim=True)
        if embed_dim % stages == 0:
            rows = rows.unflatten(0, (-1, stages)).mean(1)
            if len(rows) > length:
                value, vector = torch.linalg.eigh(rows.double().T @ rows.double())
                # unlike a triangular factor the symmetric root is unique, so that a bank fits the queries of another machine
                rows = ((vector * value.clamp(min=0).sqrt()) @ vector.T).float()
        return rows.unflatten(1, (channels, patch_size, patch_size))


def weight(x: Tensor, distance: Tensor, bank: Tensor, index: Tensor, count: int, dims: int) -> Tensor:
    """The factor (B,) of eq. 7 for patches x (B, D) at `distance` (B,) from their nearest bank rows `index` (B,).

    1 - exp(‖x - m*‖ / √D) / Σ exp(‖x - m‖ / √D), D = `dims`, over the `count` rows m of the bank nearest to m*, including itself:
    smallest where the bank is dense, near 1 where it is sparse. The paper does not divide; its exponentials then saturate at distances
    in the tens.
    """
    _, around = nearest(bank[index], bank, min(count, len(bank)))  # (B, b)
    scale = dims**0.5
    return 1 - torch.exp(distance / scale - (distances(x, bank[around]) / scale).logsumexp(1))


def coreset_size(patches: int, ratio: float | int) -> int:
    return min(ratio, patches) if isinstance(ratio, int) else max(1, int(ratio * patches))


def whitening(count: Tensor, mean: Tensor, scatter: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and matrix W (D, D) with which (x − mean) W has covariance 1, from moments (), (1, D), (1, D, D) of `RunningCovariance`.

    W = V (Λ + s λ̄)^−½ with the principal components V and their variances Λ, of which s = SHRINKAGE of the mean λ̄ is added to each.
    """
    variance, axes = torch.linalg.eigh(scatter[0].double() / max(int(count) - 1, 1))
    variance = variance.clamp_min(0) + SHRINKAGE * variance.clamp_min(0).mean() + 1e-12
    return mean[0], (axes / variance.sqrt()).to(mean)


class PatchBuffer(RowBuffer):
    """Patches (count, P, D) of images, and their `moments` to whiten them.

    InputError at the first batch if all of them will not fit into the device's memory.
    """

    def __init__(self, capacity: int, projection: int, whiten: bool):
        super().__init__(capacity)
        self.projection, self.whiten, self.moments = projection, whiten, RunningCovariance()

    def add_moments(self, rows: Tensor) -> None:
        if self.whiten:
            self.moments.update(rows.flatten(0, -2)[:, None].float())  # (n, 1, D)

    def gather(self) -> None:
        super().gather()
        if self.whiten:
            self.moments.gather()

    def update(self, rows: Tensor) -> None:
        self.add_moments(rows)
        if self.count == 0:
            positions, dim = rows.shape[1:]
            needed, free = forecast(self.capacity, positions, dim, self.projection), available_memory(rows.device)
            needed *= 1 + self.whiten  # a whitened copy
            if needed > free:
                raise InputError(
                    f"PatchCore needs {needed / 2**30:.3g} GiB of memory for {self.capacity} images × {positions} patches × {dim} channels "
                    f"and {free / 2**30:.3g} GiB are available; choose a smaller image_size or model.embed_dim, fewer or coarser "
                    "model.stages, or one category at a time"
                )
        super().update(rows)


class BoundedBuffer(PatchBuffer):
    """Patches (count, D) by merge and reduce: batches join those held, and HELD · `most` or more are thinned to KEPT · `most` again.

    A coreset of coresets covers all patches within the sum of their radii, of which the larger coresets' are small.
    thin(patches, count, moments) does it.
    """

    def __init__(self, most: int, thin: Callable[[Tensor, int, RunningCovariance], Tensor], whiten: bool):
        super().__init__(most, 0, whiten)
        self.thin = thin
        self.add_state("seen", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")  # patches of all batches

    def update(self, rows: Tensor) -> None:
        self.add_moments(rows)
        rows = rows.flatten(0, 1)  # (B·P, D)
        self.seen += len(rows)
        self.rows = torch.cat([self.rows, rows]) if self.count else rows
        if len(self.rows) >= HELD * self.capacity:
            self.rows = self.thin(self.rows, KEPT * self.capacity, self.moments)
        self.count.fill_(len(self.rows))

    def gather(self) -> None:
        super().gather()
        if distributed():
            torch.distributed.all_reduce(self.seen)


def forecast(images: int, positions: int, dim: int, projection: int) -> int:
    """Upper bound on the bytes of the patches of all training images and of the search for their coreset."""
    projected = min(dim, projection)
    # the float32 patches, their projection (if there is one) and its centred copy, and the search's 8-byte columns
    floats = dim + (projected if projected < dim else 0) + projected
    return images * positions * (4 * floats + 64)

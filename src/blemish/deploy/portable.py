"""Methods as graphs: the same scores in operations that exporters know, where a method searches, solves or draws."""

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blemish.backbone.features import Features
from blemish.detector import Detector, Maps
from blemish.methods.cflow import CFlow
from blemish.methods.dfkde import DFKDE
from blemish.methods.lake import LAKE
from blemish.methods.noise_residual import NoiseResidual
from blemish.methods.padim import PaDiM
from blemish.methods.patch_svdd import SIZES, PatchSVDD
from blemish.methods.patchcore import PatchCore, pooling_root
from blemish.methods.riad import RIAD, deal
from blemish.methods.self_similarity import SelfSimilarity
from blemish.methods.spade import SPADE, describe
from blemish.ops import pca
from blemish.ops.flow import log_likelihood
from blemish.ops.maps import align, paint, smooth_upsample, starts
from blemish.ops.randomness import stream
from blemish.types import InputError, Prediction

BLOCKS = 4  # of rows of a triangular matrix: what is above them is left out of the product


class Form(nn.Module):
    """A fitted method as `features`, then `score`; where it has no maps of a backbone, `features` is None and `score` takes the image.

    With its own methods by default. A subclass restates what exporters cannot follow; equal but for rounding, which the parity check of
    every export measures.
    """

    def __init__(self, model: Detector, size: tuple[int, int]):
        super().__init__()
        # a copy that shares all tensors: what its graph does not use is taken from it alone
        self.model, self.size = copy.copy(model), size
        self.model._buffers = dict(model._buffers)
        self.features: Callable[[Tensor], Maps] | None = self.model.features if splits(model) else None

    def score(self, maps: Maps) -> Prediction:
        return self.model.score(maps, self.size)

    def forward(self, image: Tensor) -> Prediction:
        return self.score(self.features(image)) if self.features else self.whole(image)

    def whole(self, image: Tensor) -> Prediction:
        return self.model(image)


def splits(model: Detector) -> bool:
    """Whether a method is `score` of the maps of its backbone and nothing else."""
    return isinstance(getattr(model, "backbone", None), Features) and type(model).forward is Detector.forward


class PaDiMForm(Form):
    """Squared distances by one product a position with L⁻¹, whose upper triangle is left out as far as BLOCKS blocks of rows allow."""

    def __init__(self, model: PaDiM, size: tuple[int, int]):
        super().__init__(model, size)
        drawn, channels = model.drawn, model.backbone.channels
        for s, (first, count) in enumerate(zip(model.first, channels, strict=True)):
            self.register_buffer(f"drawn{s}", drawn[(drawn >= first) & (drawn < first + count)] - first)
        self.register_buffer("mean", model.mean[:, None])  # (P, 1, d)
        self.dims = len(drawn)
        self.ends = [round(self.dims * (i + 1) / BLOCKS) for i in range(BLOCKS)] if len(model.cholesky) else []
        for i, (start, end) in enumerate(zip([0, *self.ends], self.ends, strict=False)):
            self.register_buffer(f"block{i}", model.cholesky[:, start:end, :end].mT.contiguous())  # (P, end, end - start)
        if not self.ends:
            self.register_buffer("woodbury", model.woodbury.permute(1, 2, 0).contiguous())  # (P, d, N)

    def score(self, maps: Maps) -> Prediction:
        drawn = [getattr(self, f"drawn{s}") for s in range(len(maps))]
        parts = [m.index_select(1, which).float() for s, (m, which) in enumerate(zip(maps, drawn, strict=True)) if len(which) or s == 0]
        grid = maps[0].shape[-2:]
        y = align(parts, self.model.align).flatten(2).permute(2, 0, 1) - self.mean  # (P, B, d)
        if self.ends:
            square = sum((y[..., :end] @ getattr(self, f"block{i}")).square().sum(2) for i, end in enumerate(self.ends))
        else:
            square = (y.square().sum(2) - (y @ self.woodbury).square().sum(2)).div(self.model.epsilon).clamp_min(0)
        map = smooth_upsample(square.sqrt().T.unflatten(1, grid), self.size, self.model.sigma)  # (B, H, W)
        return Prediction(map.amax((1, 2)), map)


class Nearest(nn.Module):
    """The k rows of a bank (M, D) nearest to each query, proposed by a matrix product; their distances are taken by differences."""

    def __init__(self, bank: Tensor, k: int):
        super().__init__()
        # of rows that rounding cannot tell apart any will do where one is asked for
        self.k, self.proposed = k, 1 if k == 1 else min(k + 8, len(bank))
        self.register_buffer("bank", bank.float())
        self.register_buffer("centre", self.bank.mean(0))
        centred = self.bank - self.centre
        self.register_buffer("factor", -2 * centred.T.contiguous())  # (D, M)
        self.register_buffer("square", centred.square().sum(1))  # (M,)

    def forward(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Distances (Q, k), ascending, and indices (Q, k) for queries (Q, D)."""
        about = (query - self.centre) @ self.factor + self.square  # (Q, M) without ‖q‖²
        index = about.argmin(1, keepdim=True) if self.proposed == 1 else about.topk(self.proposed, dim=1, largest=False).indices
        distance = (query[:, None] - self.bank[index]).square().sum(2).sqrt()  # (Q, proposed)
        if self.proposed == self.k == 1:
            return distance, index
        distance, order = distance.topk(self.k, dim=1, largest=False)
        return distance, index.gather(1, order)


class PatchCoreForm(Form):
    """Nearest rows by one product with the whole bank, pooling by constant matrices."""

    def __init__(self, model: PatchCore, size: tuple[int, int]):
        super().__init__(model, size)
        self.nearest = Nearest(model.bank, 1)
        self.around = Nearest(model.bank, min(model.neighbours, len(model.bank))) if model.neighbours and len(model.bank) > 1 else None
        channels, dim = tuple(model.backbone.channels), model.embed_dim
        self.pooled = dim is not None and dim < sum(channels)
        for s, count in enumerate(channels if self.pooled else ()):
            self.register_buffer(f"pool{s}", F.adaptive_avg_pool1d(torch.eye(count)[None], dim)[0])  # (C, dim)
        if self.pooled:
            self.register_buffer("mixing", F.adaptive_avg_pool1d(torch.eye(dim * len(channels))[None], dim)[0])
        elif dim is not None:
            self.register_buffer("mixing", pooling_root(channels, dim).float())
        else:
            self.mixing = None

    def embed(self, maps: Maps) -> Tensor:
        parts = [F.avg_pool2d(stage.float(), 3, stride=1, padding=1) for stage in maps]
        if self.pooled:
            parts = [(m.movedim(1, -1) @ getattr(self, f"pool{s}")).movedim(-1, 1) for s, m in enumerate(parts)]
        x = align(parts).flatten(2).transpose(1, 2)  # (B, P, C)
        return x if self.mixing is None else x @ self.mixing

    def score(self, maps: Maps) -> Prediction:
        x = self.embed(maps)  # (B, P, D)
        distance, index = (v.unflatten(0, x.shape[:2])[..., 0] for v in self.nearest(x.flatten(0, 1)))  # (B, P)
        score, worst = distance.max(1, keepdim=True)  # (B, 1)
        if self.around is not None:
            patch = x.gather(1, worst[..., None].expand(-1, -1, x.shape[2]))  # (B, 1, D)
            centre = self.nearest.bank[index.gather(1, worst)[:, 0]]  # (B, D)
            others = self.nearest.bank[self.around(centre)[1]]  # (B, b, D)
            spread = (patch - others).square().sum(2).sqrt().logsumexp(1, keepdim=True)
            score = score * (1 - torch.exp(score - spread))
        map = smooth_upsample(distance.unflatten(1, maps[0].shape[-2:]), self.size, self.model.sigma)
        return Prediction(score[:, 0], map)


class PatchSVDDForm(Form):
    """Nearest rows by one product with each bank."""

    def __init__(self, model: PatchSVDD, size: tuple[int, int]):
        super().__init__(model, size)
        self.nearest = nn.ModuleList(Nearest(getattr(model, f"bank{side}"), 1) for side in SIZES)

    def whole(self, image: Tensor) -> Prediction:
        map = 1
        for side, nearest in zip(SIZES, self.nearest, strict=True):
            codes = self.model.patches(image, side)  # (B, h, w, D)
            distance = nearest(codes.flatten(0, 2))[0].view(codes.shape[:3])
            map = map * paint(distance, self.size, side, self.model.strides[side])  # (B, H, W)
        return Prediction(map.amax((1, 2)), map)


class SPADEForm(Form):
    """The image's score alone: the search among all positions of the nearest images follows its data."""

    def __init__(self, model: SPADE, size: tuple[int, int]):
        super().__init__(model, size)
        self.nearest = Nearest(model.images, min(model.neighbors, len(model.images)))

    def score(self, maps: Maps) -> Prediction:
        return Prediction(self.nearest(describe(maps[self.model.deep]))[0].mean(1))


class Density(nn.Module):
    """Log density of `ops.kde` with the inverse of its factor in the place of a triangular system."""

    def __init__(self, points: Tensor, factor: Tensor, centre: Tensor):
        super().__init__()
        eye = torch.eye(len(centre), dtype=torch.float64)
        self.register_buffer("points", points.double())  # (N, k)
        self.register_buffer("inverse", torch.linalg.solve_triangular(factor.double(), eye, upper=False).T.contiguous())  # (k, k)
        self.register_buffer("centre", centre.double())
        self.level = float(math.log(len(points)) + 0.5 * len(centre) * math.log(2 * math.pi) + factor.double().diagonal().log().sum())

    def forward(self, rows: Tensor) -> Tensor:
        rows = (rows.double() - self.centre) @ self.inverse  # (B, k)
        return (-0.5 * (rows[:, None] - self.points).square().sum(2)).logsumexp(1) - self.level


class DFKDEForm(Form):
    """DFKDE, and DFKDM with the same density."""

    def __init__(self, model: DFKDE, size: tuple[int, int]):
        super().__init__(model, size)
        self.density = Density(model.points, model.factor, model.centre) if getattr(model, "density", "kde") == "kde" else None

    def score(self, maps: Maps) -> Prediction:
        if self.density is None:
            return super().score(maps)
        return Prediction(-self.density(pca.transform(self.model.space, self.model.embed(maps)) / self.model.length).float())


class LAKEForm(Form):
    def __init__(self, model: LAKE, size: tuple[int, int]):
        super().__init__(model, size)
        self.density = Density(model.points, model.factor, model.centre) if model.density == "kde" else None

    def whole(self, image: Tensor) -> Prediction:
        if self.density is None:
            return super().whole(image)
        rows = pca.transform(self.model.space, self.model.standardised(self.model.vectors(image)))
        return Prediction(-self.density(rows).float())


class CFlowForm(Form):
    """All vectors of a stage at once; the method scores them in parts for its processor's cache."""

    def score(self, maps: Maps) -> Prediction:
        normal = 0
        for s, map in enumerate(maps):
            rows, places = self.model.rows(map), torch.arange(map.shape[-2] * map.shape[-1])  # (B, P, C), (P,)
            condition = self.model.condition_at(s, places, self.model.encodings(map))
            logs = log_likelihood(*self.model.flows[s](rows, condition)) / map.shape[1]  # (B, P)
            relative = (logs - self.model.highest[s]).exp().unflatten(1, map.shape[-2:])
            normal = normal + smooth_upsample(relative, self.size, 0.0)  # (B, H, W)
        map = -normal.clamp_min(torch.finfo(torch.float32).tiny).log()
        return Prediction(map.amax((1, 2)), map)


class RIADForm(Form):
    """The masks that the method draws anew, and alike, for every image, drawn once."""

    def __init__(self, model: RIAD, size: tuple[int, int]):
        super().__init__(model, size)
        model.inpaint(torch.zeros(1, 3, *size), model.cells[0], stream(0))  # an image size that does not fit is an error here
        for cell in model.cells:
            self.register_buffer(f"masks{cell}", deal(size, cell, model.sets, stream(model.hparams.seed, cell))[:, None, None])

    def whole(self, image: Tensor) -> Prediction:
        inpaintings = []
        for cell in self.model.cells:
            masks = getattr(self, f"masks{cell}")  # (n, 1, 1, H, W)
            hidden = (image * (1 - masks)).flatten(0, 1)  # (n·B, 3, H, W)
            inpaintings.append((self.model.net(hidden).unflatten(0, (self.model.sets, -1)) * masks).sum(0))
        return self.model.judged(image, inpaintings)


class SelfSimilarityForm(Form):
    """Tiles by their rows and columns, all of them at once, resized by two products."""

    def __init__(self, model: SelfSimilarity, size: tuple[int, int]):
        super().__init__(model, size)
        tiles = model.backbone
        sides = [min(tiles.tile, side) for side in size]
        for name, side, length in zip(("rows", "columns"), sides, size, strict=True):
            self.register_buffer(name, starts(length, tiles.tile, tiles.stride)[:, None] + torch.arange(side))  # (h, tile)
            eye = torch.eye(side)[None, None]
            shape = (tiles.tile_input, side)
            self.register_buffer(f"{name}_up", F.interpolate(eye, shape, mode="bilinear", antialias=True, align_corners=False)[0, 0])
        self.features = self.tiled

    def tiled(self, image: Tensor) -> list[Tensor]:
        tiles = image[:, :, self.rows][..., self.columns].permute(0, 2, 4, 1, 3, 5)  # (B, h, w, 3, tile, tile)
        # rows last: OpenVINO takes a product with a constant on the right for a layer, and its columns for the channels to be normalised
        tiles = self.rows_up @ (tiles.flatten(0, 2) @ self.columns_up.T)
        pooled = torch.cat([stage.mean((2, 3)) for stage in Features.forward(self.model.backbone, tiles)], 1)  # (n, D)
        return [pooled.unflatten(0, (-1, len(self.rows), len(self.columns))).movedim(-1, 1)]

    def score(self, maps: Maps) -> Prediction:
        model = self.model
        x = pca.transform(model.space, maps[0].movedim(1, -1), whiten=True)  # (B, h, w, k)
        distance = (x[..., None, :] - model.words).square().sum(-1).sqrt()  # (B, h, w, words)
        near = distance.topk(min(model.neighbors, len(model.words)), largest=False).values.mean(-1)  # (B, h, w)
        map = paint(near, self.size, model.tile, model.stride)
        return Prediction(map.amax((1, 2)), map)


FORMS: dict[type[Detector], type[Form]] = {
    CFlow: CFlowForm,
    DFKDE: DFKDEForm,
    LAKE: LAKEForm,
    PaDiM: PaDiMForm,
    PatchCore: PatchCoreForm,
    PatchSVDD: PatchSVDDForm,
    RIAD: RIADForm,
    SelfSimilarity: SelfSimilarityForm,
    SPADE: SPADEForm,
}


@torch.no_grad()
def portable(model: Detector, size: tuple[int, int], maps: bool) -> Form:
    """The graph form of a fitted method for images of `size` (H, W) pixels; InputError for what has none, with what to use instead."""
    if isinstance(model, NoiseResidual):
        raise InputError(
            "noise_residual cannot be exported: it searches each image's own patches by trees that grow with the image, which is no fixed "
            "graph; use `predict run=…`, or export padim or patchcore"
        )
    if isinstance(model, SPADE) and maps:
        raise InputError(
            "spade cannot be exported with its map: the search among all positions of the nearest images branches on the data, and without "
            "branches it is a product of all positions with all; use maps=false for its score, or export patchcore for a map"
        )
    form = next((FORMS[kind] for kind in type(model).__mro__ if kind in FORMS), Form)
    return form(model, size).eval()

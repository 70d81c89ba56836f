"""Anomaly detection as detection in noise (Davy, Ehret, Morel, Delbracio, ICIP 2018; Ehret et al., IPOL 2019): one image, or references."""

import importlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import yaml
from torch import Tensor

from blemish.detector import COUNT, POSITIVE, Detector, Maps, OnePassDetector, integer
from blemish.edge.checks import check_stages
from blemish.edge.errors import InputError
from blemish.features.extractor import Features
from blemish.noise import background, patches
from blemish.noise.false_alarms import (
    Alarms,
    Detection,
    Law,
    detections,
    false_alarms,
    law_of,
    least,
    number_of_tests,
    original_false_alarms,
    statistics,
    tests_of,
)
from blemish.noise.gaussianise import gaussianise
from blemish.noise.patches import Index
from blemish.noise.pyramid import from_cells, grow, mirror, mirrored, pyramid
from blemish.ops.accumulators import RowBuffer
from blemish.types import Prediction

BORDER = 32  # mirrored pixels around the image of a network, whose own padding would stand out as an anomaly
LEVELS = ("bank", "deviation", "law", "white_mean", "white_axes", "axes", "keys", "leaves", "directions", "limits")  # of every scale
NO_OPERATORS = "ONNX has no medians and no logarithm of a normal tail, which it computes; use `predict run=…`, or export padim or patchcore"


class NoiseResidual(OnePassDetector):
    """Subtract from an image what patches explain, its own or those of references, and test the residual as noise at every pixel and scale.

    The score is −min log10 NFA and the map −log10 NFA; `detect` gives the components of NFA ≤ `epsilon`, of which noise alone has no more
    than `epsilon` on average. Without `references` nothing is trained: the patches are the image's own, and the law of the residual is
    Gauss's (`mode: calibrated`), or has the tails that the image itself shows (`measured`, which keeps the bound on textures at the cost
    of power); `original` repeats the authors' program, including its known mistakes. With `references`, a number of training images or a
    folder, the patches are theirs, and the law is measured on residuals of one half of them by the other. An update adds as many of the new
    training images.

    `residual_of` is the run folder of a trained reconstruction method: image minus reconstruction then replaces the patch model's residual.
    """

    needs_fit = False
    quick = ("model.mode=calibrated",)
    decides_by_map = True
    not_exportable = (
        "it searches each image's own patches by trees that grow with the image, which is no fixed graph; use `predict run=…`, or export "
        "padim or patchcore"
    )

    def __init__(
        self,
        source: str,
        backbone: str,
        stages: Sequence[int | str],
        weights: str,
        components: int,
        channels: int,
        scales: int,
        patch: int,
        patch_cells: int,
        neighbors: int,
        h: float,
        h_relative: float,
        radii: Sequence[int],
        statistic: str,
        epsilon: float,
        bound: str,
        search: str,
        tile: int,
        mode: str,
        references: int | str | None,
        residual_of: str | None,
        seed: int,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.check_arguments(source=("pixels", "features"), search=("trees", "exact"), bound=("tests", "map"), patch=integer(2))
        self.check_arguments(mode=("calibrated", "measured", "original"), channels=(1, 3), h=POSITIVE, h_relative=POSITIVE)
        self.check_arguments(components=COUNT, scales=COUNT, neighbors=COUNT, radii=integer(1, each=True), epsilon=POSITIVE)
        self.check_arguments(patch_cells=integer(2), statistic=("mean", "energy", "both"))
        check_stages(stages=stages)
        if isinstance(references, str):
            self.reference_folder = references
        else:
            self.check_arguments(references=integer(2, also=(None,)))
        self.features_too = source == "features" and residual_of is None
        self.grids = len(stages) if self.features_too else 1  # of every scale
        patch = patch_cells if self.features_too else patch
        self.check_arguments(tile=integer(2 * patch + 1, 16383))
        if references is not None and (residual_of is not None or mode == "original"):
            raise InputError(f"references={references}: not with residual_of or mode=original; use null")
        self.backbone = Features(backbone, stages, weights, seed) if self.features_too else None
        self.reconstruction = reconstruction(Path(residual_of)) if residual_of is not None else None
        self.components, self.grey, self.scales, self.radii, self.epsilon = components, channels == 1, scales, tuple(radii), epsilon
        self.original, self.measured, self.bound, self.references = mode == "original", mode == "measured", bound, references
        self.statistic = statistic
        self.needs_fit, self.patch, self.neighbors, self.seed = references is not None, patch, neighbors, seed
        if references is not None:
            self.not_exportable = NO_OPERATORS
            self.add_buffers("images", *(f"{name}{level}" for level in range(scales * self.grids) for name in LEVELS))
        self.similarity = {
            "patch": patch,
            "neighbors": neighbors,
            "h": h_relative if self.features_too else h,
            "relative": self.features_too,
            "box": (-patch, patch - 1) if self.original else (-patch, patch),
            "search": search,
            "tile": tile,
            "seed": seed,
        }

    @property
    def map_threshold(self) -> float:
        return -math.log10(self.epsilon)

    @property
    def bound_kind(self) -> str:
        """What the bound of `epsilon` rests on."""
        if self.references is not None:
            return f"bound measured on {len(self.images)} references"
        kind = {"measured": "measured on the image itself", "calibrated": "for Gaussian residuals only", "original": "none"}
        return f"bound {kind[self.hparams.mode]}"

    def new_state(self, images: int) -> "Spread":
        kept, fitted = (len(self.images), int(self.fitted)) if self.updating else (0, 0)
        return Spread(images - fitted, images if self.reference_folder else self.references or 0, kept)

    def restore(self, state: "Spread") -> None:
        if not self.fits_training_images:
            raise InputError(f"update: references={self.references} are no training images; expected a number, or a new run")
        state.keep(self.images)

    def features(self, image: Tensor) -> Maps:
        return [image]

    def collect(self, maps: Maps) -> Tensor:
        return maps[0]

    def fit(self, state: RowBuffer) -> None:
        """Index the references, and measure the law of the residuals of each half of them by the other."""
        if self.references is None:
            return
        kept, new = state.compute().tensor_split([len(self.images) if self.updating else 0])
        count = len(new) if self.reference_folder else min(self.references, len(new))
        self.images = images = torch.cat([kept, new[torch.linspace(0, len(new) - 1, count).round().long()]])
        if len(images) < 2:
            raise InputError(f"references={self.references}: found {len(images)} image; expected 2 or more")
        for level, x in enumerate(self.levels(images)):
            if self.features_too:
                mean, axes = background.whitening(x.movedim(1, 0).flatten(1)[None], self.components)
                self.set_buffers(level, white_mean=mean, white_axes=axes)
                x = background.whiten(x, mean, axes)
            if not self.has_room(x):
                continue
            halves = x[::2], x[1::2]
            residual = torch.cat([self.redrawn(a, b, patches.build(b, self.patch, self.seed)) for a, b in (halves, halves[::-1])])
            deviation = residual.square().mean((0, 2, 3), keepdim=True).sqrt().clamp_min(1e-30)  # (1, C, 1, 1)
            index = patches.build(x, self.patch, self.seed)._asdict()
            self.set_buffers(level, bank=x, deviation=deviation, law=self.measure(residual / deviation), **index)

    def set_buffers(self, level: int, **values: Tensor) -> None:
        for name, value in values.items():
            setattr(self, f"{name}{level}", value)

    def of_level(self, level: int, *names: str) -> list[Tensor]:
        return [getattr(self, f"{name}{level}") for name in names]

    def redrawn(self, x: Tensor, bank: Tensor, index: Index) -> Tensor:
        return background.residual(x, **self.similarity, bank=bank, index=index)

    def measure(self, residual: Tensor) -> Tensor:
        """The laws (R, 5, max(C, 2)) of residuals (N, C, h, w), all images together: rows as in `Law`."""
        rows = []
        for mean, energy, share in statistics(residual, self.radii, 0, self.statistic):
            together = [None if a is None else a.transpose(0, 1).flatten(1, 2)[None] for a in (mean, energy)]  # (1, C, N·h, w)
            law = law_of(*together, share.repeat(1, 1, len(residual), 1), measured=True)
            width = max(residual.shape[1], 2)
            rows.append(torch.stack([torch.nn.functional.pad(v.flatten(), (0, width - v.numel())) for v in law]))
        return torch.stack(rows)

    def laws(self, level: int) -> list[Law] | None:
        if self.references is None:
            return None
        bank, law = self.of_level(level, "bank", "law")
        means = 0 if self.statistic == "energy" else bank.shape[1]
        tests = tests_of(self.statistic, means)
        sums = 0 if self.statistic == "mean" else tests
        return [Law(*(v[:n].view(1, n, 1, 1) for v, n in zip(rows, (means, sums, sums, tests, tests), strict=True))) for rows in law]

    @torch.no_grad()
    def forward(self, image: Tensor) -> Prediction:
        nfa = self.alarms(image).log10_nfa
        return self.from_map(-nfa)

    def detect(self, image: Tensor) -> list[list[Detection]]:
        """The detections of every image (B, 3, H, W) in [0, 1], strongest first."""
        return detections(self.alarms(image), self.epsilon)

    @torch.no_grad()
    def alarms(self, image: Tensor) -> Alarms:
        """The smallest number of false alarms over channels, discs and scales at every pixel."""
        height, width = image.shape[2:]
        residuals = self.residuals(image)
        of_stage = Counter(level % self.grids for level in residuals)  # scales with room
        found = []
        for level, x in residuals.items():
            scale, stage = divmod(level, self.grids)
            side = (-(-height // 2**scale), -(-width // 2**scale))
            if self.original:
                nfa, radius = original_false_alarms(gaussianise(x), self.radii, math.prod(side))
            else:
                channels, finest = tests_of(self.statistic, x.shape[1]), residuals[stage].shape[2:]
                tests = number_of_tests(channels, len(self.radii), *finest, of_stage[stage], self.bound)
                tests *= len(of_stage)  # every stage may spend the same part of ε, however many cells it has
                x = gaussianise(x) if self.references is None else x / getattr(self, f"deviation{level}")
                nfa, radius = false_alarms(x, self.radii, tests, self.margin(scale), self.measured, self.statistic, self.laws(level))
            radius = radius * round(height / x.shape[2])
            found.append([grow(from_cells(a, *side), height, width, scale) for a in (nfa, radius)])
        scales = torch.tensor([level // self.grids for level in residuals], device=image.device)
        alarms = least(found)
        return alarms._replace(scale=scales[alarms.scale])

    def margin(self, level: int) -> int:
        """Pixels at the border left out: a reconstruction's residual is halved itself, and mirroring turns fine grain into coarse noise."""
        return 0 if self.reconstruction is None else mirrored(level)

    def residuals(self, image: Tensor) -> dict[int, Tensor]:
        """The residual (B, C, h, w) of every level that has room for patches: scales, finest first, and the stages of each."""
        if self.reconstruction is not None:
            residual = 255 * (image - self.reconstruction.reconstruct(image))
            residual = residual.mean(1, keepdim=True) if self.grey else residual
            room = 4 * max(self.radii)
            return {s: r for s, r in enumerate(pyramid(residual, self.scales)) if s == 0 or min(r.shape[2:]) - 2 * mirrored(s) > room}
        residuals, largest = {}, None
        for level, x in enumerate(self.levels(image)):
            largest = x.shape[2:] if largest is None else largest
            if not self.has_room(x) or (self.references is not None and not len(*self.of_level(level, "bank"))):
                continue
            if self.features_too:
                white = (
                    self.of_level(level, "white_mean", "white_axes")
                    if self.references
                    else background.whitening(x.flatten(2), self.components)
                )
                x = background.whiten(x, *white)
            if self.references is None:
                residuals[level] = background.residual(x, **self.similarity)
            else:
                residuals[level] = self.redrawn(x, *self.of_level(level, "bank"), Index(*self.of_level(level, *Index._fields)))
        if not residuals:
            raise InputError(
                f"an image of {image.shape[2]}×{image.shape[3]} px has {largest[0]}×{largest[1]} positions, where a patch of side "
                f"{self.patch} has fewer than neighbors={self.neighbors} others outside its exclusion box; expected 32 a side"
            )
        return residuals

    def has_room(self, x: Tensor) -> bool:
        return patches.enough(*x.shape[2:], self.patch, self.neighbors, self.patch)

    def levels(self, image: Tensor) -> Iterator[Tensor]:
        """What is modelled of images (B, 3, H, W) in [0, 1] at every scale: grey levels of 255, or each stage before it is whitened."""
        for u in pyramid(image, self.scales):
            if self.features_too:
                yield from self.maps_of(u)
            else:
                yield 255 * (u.mean(1, keepdim=True) if self.grey else u)

    def maps_of(self, image: Tensor) -> Maps:
        """The network's maps of an image with mirrored borders, without what the borders became."""
        height, width = image.shape[2:]
        rows, cols = (mirror(size, BORDER, image.device) for size in (height, width))
        maps = []
        for map in self.backbone(image.index_select(2, rows).index_select(3, cols)):
            stride = round((height + 2 * BORDER) / map.shape[2])
            first = BORDER // stride
            maps.append(background.signed_root(map[:, :, first : first - (-height // stride), first : first - (-width // stride)]))
        return maps


class Spread(RowBuffer):
    """Rows evenly spread over all batches, about `wanted` of `images`, after `kept` that stay."""

    def __init__(self, images: int, wanted: int, kept: int = 0):
        super().__init__(max(1, kept + 2 * wanted))
        self.step, self.seen = max(1, images // max(1, wanted)), 0

    def keep(self, rows: Tensor) -> None:
        super().update(rows)

    def update(self, rows: Tensor) -> None:
        first = -self.seen % self.step
        self.seen += len(rows)
        rows = rows[first :: self.step][: self.capacity - int(self.count)]
        if self.count and len(rows) and rows.shape[1:] != self.rows.shape[1:]:
            raise InputError("image_size=null: references have one size; use a number")
        if len(rows):
            super().update(rows)


def reconstruction(run: Path) -> Detector:
    """The fitted method of a run folder, frozen; InputError unless it has `reconstruct(image) -> image`."""
    config, checkpoint = run / "config.yaml", run / "model.ckpt"
    for path in (config, checkpoint):
        if not path.is_file():
            raise InputError(f"residual_of={run}: no {path.name}; expected the folder of a finished run")
    arguments = dict(yaml.safe_load(config.read_text(encoding="utf-8"))["model"])
    module, _, name = arguments.pop("_target_").rpartition(".")
    # a config may come from a stranger: it may name one of our methods and nothing else
    method = getattr(importlib.import_module(module), name) if module.startswith("blemish.methods.") else None
    if getattr(method, "reconstruct", None) is None:
        raise InputError(f"residual_of={run}: {module}.{name} does not reconstruct images; expected the run of a method that does")
    if "weights" in arguments:
        arguments["weights"] = "checkpoint"
    model = method(**arguments)
    model.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"])
    return model.eval().requires_grad_(False)

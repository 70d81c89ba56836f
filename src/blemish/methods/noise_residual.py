"""Anomaly detection as detection in noise, in one single image (Davy, Ehret, Morel, Delbracio, ICIP 2018; Ehret et al., IPOL 2019)."""

import importlib
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from torch import Tensor

from blemish.detector import COUNT, POSITIVE, Detector, integer
from blemish.edge.checks import check_stages
from blemish.edge.errors import InputError
from blemish.features.extractor import Features
from blemish.noise import background, patches
from blemish.noise.false_alarms import Alarms, Detection, detections, false_alarms, least, number_of_tests, reference_false_alarms
from blemish.noise.gaussianise import gaussianise
from blemish.noise.pyramid import from_cells, grow, mirrored, pyramid
from blemish.types import Prediction


class NoiseResidual(Detector):
    """Subtract from an image what its own patches explain, and test the residual against Gaussian noise at every pixel and scale.

    The score is −min log10 NFA and the map −log10 NFA; `detect` gives the components of NFA ≤ `epsilon`, of which noise alone has no more
    than `epsilon` on average, without any training. `residual_of` is the run folder of a trained reconstruction method: image minus
    reconstruction then replaces the patch model's residual. `mode: measured` measures the tails of the discs' means too, which keeps the
    bound on textures at the cost of power; `mode: reference` repeats the authors' program, including its known mistakes.
    """

    needs_fit = False
    decides_by_map = True
    not_exportable = (
        "it searches each image's own patches by trees that grow with the image, which is no fixed graph; use `predict run=…`, or export "
        "padim or patchcore"
    )

    def __init__(
        self,
        source: str,
        backbone: str,
        stage: int | str,
        weights: str,
        components: int,
        channels: int,
        scales: int,
        patch: int,
        neighbors: int,
        h: float,
        h_relative: float,
        radii: Sequence[int],
        epsilon: float,
        bound: str,
        search: str,
        tile: int,
        mode: str,
        residual_of: str | None,
        seed: int,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.check_arguments(source=("pixels", "features"), search=("trees", "exact"), bound=("tests", "map"), patch=integer(2))
        self.check_arguments(mode=("calibrated", "measured", "reference"), channels=(1, 3), h=POSITIVE, h_relative=POSITIVE)
        self.check_arguments(components=COUNT, scales=COUNT, neighbors=COUNT, radii=integer(1, each=True), epsilon=POSITIVE)
        self.check_arguments(tile=integer(2 * patch + 1, 16383))
        check_stages(stage=[stage])
        self.backbone = Features(backbone, [stage], weights, seed) if source == "features" and residual_of is None else None
        self.reconstruction = reconstruction(Path(residual_of)) if residual_of is not None else None
        self.components, self.grey, self.scales, self.radii, self.epsilon = components, channels == 1, scales, tuple(radii), epsilon
        self.reference, self.measured, self.bound = mode == "reference", mode == "measured", bound
        self.patch, self.neighbors = patch, neighbors
        self.similarity = {
            "patch": patch,
            "neighbors": neighbors,
            "h": h if source == "pixels" else h_relative,
            "relative": source == "features",
            "box": (-patch, patch - 1) if self.reference else (-patch, patch),
            "search": search,
            "tile": tile,
            "seed": seed,
        }

    @property
    def map_threshold(self) -> float:
        return -math.log10(self.epsilon)

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
        noise = [gaussianise(r) for r in self.residuals(image)]  # S × (B, C, h, w)
        channels, cells = noise[0].shape[1], noise[0].shape[2:]
        tests = number_of_tests(channels, len(self.radii), *cells, len(noise), self.bound)
        found = []
        for level, x in enumerate(noise):
            if self.reference:
                alarms = reference_false_alarms(x, self.radii, cells.numel())
            else:
                alarms = false_alarms(x, self.radii, tests, self.margin(level), self.measured)
            side = (-(-height // 2**level), -(-width // 2**level))
            found.append([grow(from_cells(a, *side), height, width, level) for a in alarms])
        return least(found)

    def margin(self, level: int) -> int:
        """Pixels at the border left out: a reconstruction's residual is halved itself, and mirroring turns fine grain into coarse noise."""
        return 0 if self.reconstruction is None else mirrored(level)

    def residuals(self, image: Tensor) -> list[Tensor]:
        """The residual (B, C, h, w) of every scale that has room for patches, finest first."""
        if self.reconstruction is not None:
            residual = self.in_channels(255 * (image - self.reconstruction.reconstruct(image)))
            room = 4 * max(self.radii)
            return [r for s, r in enumerate(pyramid(residual, self.scales)) if s == 0 or min(r.shape[2:]) - 2 * mirrored(s) > room]
        residuals = []
        for u in pyramid(image, self.scales):
            x = self.in_channels(255 * u) if self.backbone is None else self.components_of(u)
            if not patches.enough(*x.shape[2:], self.patch, self.neighbors, self.patch):
                break
            residuals.append(background.residual(x, **self.similarity))
        if not residuals:
            raise InputError(
                f"an image of {image.shape[2]}×{image.shape[3]} px has {x.shape[2]}×{x.shape[3]} positions, where a patch of side "
                f"{self.patch} has fewer than neighbors={self.neighbors} others outside its exclusion box; expected 32 a side"
            )
        return residuals

    def in_channels(self, image: Tensor) -> Tensor:
        return image.mean(1, keepdim=True) if self.grey else image

    def components_of(self, image: Tensor) -> Tensor:
        (map,) = self.backbone(image)
        return background.whiten(background.signed_root(map), self.components)


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

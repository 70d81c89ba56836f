"""Configs composed as the tools do it, images made on the spot, and methods fitted without a trainer."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from hydra.utils import get_class
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from blemish.detector import Detector, OnePassDetector, TrainedDetector
from blemish.run.config import composed
from blemish.run.train import expected_warnings
from blemish.types import NORMAL, Batch

CONFIGS = Path(__file__).parents[1] / "configs"
METHODS = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))
UNDRAWN, DRAWN = ["save.pictures=0", "save.curves=false"], ["save.pictures=4", "save.curves=true"]


def slow(*values: object):
    """The values of a case that is left to `make test-full`, for pytest's parametrize."""
    return pytest.param(*values, marks=pytest.mark.slow)


def class_of(method: str) -> type[Detector]:
    return get_class(OmegaConf.load(CONFIGS / "model" / f"{method}.yaml").model._target_)


def make(method: str, side: int = 64, **changes) -> Detector:
    """A method by the arguments in its yaml and `changes` of them, with timm's test network, for images of `side` pixels."""
    cfg = OmegaConf.load(CONFIGS / "model" / f"{method}.yaml")
    cfg = OmegaConf.merge(cfg, {"backbone": "test_resnet", "weights": "random", "image_size": side, "crop": None, "seed": 0})
    arguments = OmegaConf.to_container(cfg.model, resolve=True)
    del arguments["_target_"]
    return class_of(method)(**arguments | changes)


def methods_of(base: type) -> list[str]:
    """The methods whose class is a `base`."""
    return [name for name in METHODS if issubclass(class_of(name), base)]


def quick(method: str) -> list[str]:
    """The overrides that make a method learn 24 small images in seconds."""
    return list(class_of(method).quick)


def tiny_overrides(root: Path) -> list[str]:
    """What makes a quick run on `tiny` with timm's test network, that draws nothing."""
    data = ["data=folder", f"data.root='{root}'", "data.normal_test=normal_test", "data.abnormal=[square]", "data.masks=masks"]
    quick = ["backbone=test_resnet", "weights=random", "image_size=64", "trainer=cpu", "trainer.enable_progress_bar=false", "logger=none"]
    return [*data, "data.calibration=0.2", *quick, "batch_size=8", "epoch_size=null", *UNDRAWN]


def tiny_run(root: Path, run_dir: Path, *overrides: str) -> DictConfig:
    """The config of a quick run on `tiny`."""
    method = next((override.removeprefix("model=") for override in overrides if override.startswith("model=")), None)
    return composed(*tiny_overrides(root), f"run_dir='{run_dir}'", *(quick(method) if method else []), *overrides)


def check_gross_defect(metrics: dict) -> None:
    """What every method must reach on `tiny`."""
    assert metrics["image_auroc"] >= 0.9
    if metrics["pixel_auroc"] is not None:
        assert metrics["pixel_auroc"] >= 0.8


def images(n: int, seed: int = 0, side: int = 64) -> Tensor:
    """Images (n, 3, side, side) of uniform noise."""
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def stripes(n: int, seed: int, side: int = 32) -> Tensor:
    """Grey waves (n, 3, side, side) of one length and direction, each with a phase of its own."""
    phase = 6.28 * torch.rand(n, 1, 1, 1, generator=torch.Generator().manual_seed(seed))
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return (0.5 + 0.25 * torch.sin(0.5 * x + 0.3 * y + phase)).repeat(1, 3, 1, 1)


@contextlib.contextmanager
def coarse_products() -> Iterator[None]:
    """A block in which matrix products of float32 are rounded to bfloat16 where the code allows it."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def draw_squares(image: np.ndarray, mask: np.ndarray, generator: np.random.Generator) -> None:
    """A white and a black square, gross for a whole image of 64 px, yet small beside it; alike, they would explain each other."""
    for (y, x), grey in zip(generator.integers(2, 51, (2, 2)), (255, 0), strict=True):
        image[y : y + 11, x : x + 11], mask[y : y + 11, x : x + 11] = grey, 255


def bricks(count: int, seed: int) -> Tensor:
    """Crops (count, 3, 64, 64) of one photograph."""
    photo, generator = skimage.data.brick(), np.random.default_rng(seed)
    corners = generator.integers(0, np.array(photo.shape) - 64, (count, 2))
    crops = np.stack([photo[y : y + 64, x : x + 64] for y, x in corners])
    return torch.from_numpy(crops).float().div(255)[:, None].repeat(1, 3, 1, 1)


def batch(pictures: Tensor, maps: list[Tensor] | None = None) -> Batch:
    """Normal images (n, 3, H, W) on their way to a detector."""
    n = len(pictures)
    mask = torch.zeros(n, *pictures.shape[-2:], dtype=torch.uint8)
    return Batch(pictures, torch.full((n,), NORMAL), mask, [str(i) for i in range(n)], maps)


def trained(
    model: TrainedDetector, pictures: Tensor, steps: int, rate: float | None = None, maps: list[Tensor] | None = None
) -> tuple[TrainedDetector, list[float]]:
    """The method in eval mode, and its losses, after plain steps of its own optimiser on all pictures, which may bring their maps."""
    optimizer, losses = model.configure_optimizers(), []
    if rate is not None:
        optimizer.param_groups[0]["lr"] = rate
    model.train()
    for _ in range(steps):
        loss = model.loss(batch(pictures, maps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return model.eval(), losses


def trained_by_lightning(
    model: TrainedDetector, pictures: Tensor, epochs: int, size: int = 8, **options
) -> tuple[TrainedDetector, Trainer]:
    """The method in eval mode after a training on batches of `size`, and its trainer."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", devices=1, max_epochs=epochs, log_every_n_steps=1, **quiet, **options)
    with expected_warnings():
        trainer.fit(model, DataLoader(list(pictures), batch_size=size, collate_fn=lambda rows: batch(torch.stack(rows))))
    return model.eval(), trainer


@torch.no_grad()
def remembered(model: OnePassDetector, pictures: Tensor, batch: int = 5, images: int | None = None):
    """The state of a method after images (N, 3, H, W) in batches; `images`: their number in all processes."""
    state = model.new_state(images or len(pictures))
    for part in pictures.split(batch):
        state.update(model.collect(model.features(part)))
    state.gather()
    return state


@torch.no_grad()
def fitted(model: OnePassDetector, pictures: Tensor, batch: int = 5, images: int | None = None) -> OnePassDetector:
    """The method fitted to images (N, 3, H, W)."""
    model.fit(remembered(model, pictures, batch, images))
    return model


# what every data module needs beside its root and category
DATA = {"image_size": 32, "crop": None, "batch_size": 4, "workers": 0, "seed": 0}
DATA |= {"protocol": "clean", "calibration": 0.1, "window": "auto", "on_error": "stop"}


def save(path: Path, array: np.ndarray, **options) -> Path:
    """Write an image, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path

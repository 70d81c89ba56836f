"""Configs composed as the tools do it, and one-pass methods fitted without a trainer."""

from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor

from blemish.detector import OnePassDetector

CONFIGS = Path(__file__).parents[1] / "configs"

# what a method that trains changes of its paper's recipe to learn 24 small images in seconds
QUICK: dict[str, list[str]] = {}


def composed(*overrides: str, config: str = "train") -> DictConfig:
    """The config that a tool would get from these command-line overrides."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(config, overrides=list(overrides))


def tiny_run(root: Path, run_dir: Path, *overrides: str) -> DictConfig:
    """The config of a quick run on `tiny` with timm's test network."""
    data = [
        "data=folder",
        f"data.root='{root}'",
        "data.normal_test=normal_test",
        "data.abnormal=[square]",
        "data.masks=masks",
        "data.calibration=0.2",
    ]
    quick = ["backbone=test_resnet", "weights=random", "image_size=64", "trainer=cpu", "trainer.enable_progress_bar=false", "logger=none"]
    method = next((override.removeprefix("model=") for override in overrides if override.startswith("model=")), "")
    return composed(*data, *quick, "batch_size=8", "save.pictures=4", f"run_dir='{run_dir}'", *QUICK.get(method, []), *overrides)


def images(n: int, seed: int = 0, side: int = 64) -> Tensor:
    """Images (n, 3, side, side) of uniform noise."""
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def remembered(model: OnePassDetector, pictures: Tensor, batch: int = 5):
    """What a method keeps of images (N, 3, H, W) that come in batches."""
    kept = model.accumulator(len(pictures))
    for part in pictures.split(batch):
        kept.update(model.keep(model.features(part)))
    kept.gather()
    return kept


@torch.no_grad()
def fitted(model: OnePassDetector, pictures: Tensor, batch: int = 5) -> OnePassDetector:
    """The method after its one look at the images."""
    model.estimate(remembered(model, pictures, batch))
    return model

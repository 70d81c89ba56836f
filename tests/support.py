"""Configs composed as the tools do it."""

from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

CONFIGS = Path(__file__).parents[1] / "configs"


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
    return composed(*data, *quick, "batch_size=8", "save.pictures=4", f"run_dir='{run_dir}'", *overrides)

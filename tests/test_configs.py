"""Every file in configs/ composes, and what it describes can be made."""

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import OmegaConf
from support import CONFIGS, composed

from blemish.run import build, module_of
from blemish.types import InputError


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def test_every_group_is_known():
    known = {"data", "launch", "logger", "model", "paper", "recipe", "store", "sweep", "trainer"}
    assert {path.name for path in CONFIGS.iterdir() if path.is_dir()} <= known


@pytest.mark.parametrize("name", names("data"))
def test_data(name, tmp_path):
    cfg = composed(f"data={name}", f"data.root='{tmp_path}'")
    data = build(cfg.data)
    assert data.name == name
    assert cfg.data.batch_size == cfg.batch_size


@pytest.mark.parametrize("name", names("model"))
def test_model(name):
    cfg = composed(f"model={name}", "backbone=test_resnet", "weights=random", "seed=3")
    assert cfg.model._target_.startswith(f"blemish.methods.{name}.")
    model = build(cfg.model)
    assert model.hparams.get("seed", 3) == 3


@pytest.mark.parametrize("name", names("trainer"))
def test_trainer(name):
    cfg = composed(f"trainer={name}")
    if cfg.trainer.accelerator == "gpu":
        cfg.trainer.accelerator = "cpu"  # composes here, runs where there is one
    build(cfg.trainer, logger=False, enable_checkpointing=False)


@pytest.mark.parametrize("name", names("logger"))
def test_logger(name, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    cfg = composed(f"logger={name}", f"run_dir='{tmp_path}'")
    if cfg.logger._target_:
        assert build(cfg.logger).save_dir is not None


@pytest.mark.parametrize("name", names("recipe"))
def test_recipe(name):
    cfg = composed(f"recipe={name}")
    cfg.run_dir = "out"
    OmegaConf.to_container(cfg, resolve=True)  # nothing it interpolates is missing
    if name != "bundled":
        assert module_of(cfg.model) == name  # a recipe brings its method along
        build(cfg.model)


@pytest.mark.parametrize("name", [path.stem for path in CONFIGS.glob("*.yaml")])
def test_tools(name):
    composed(config=name)
    assert not HydraConfig.initialized()


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_the_model():
    assert composed("model=padim").backbone == "resnet18"
    assert composed("model=padim", "recipe=bundled").backbone == "tf_efficientnet_lite0"
    cfg = composed("model=padim", "recipe=bundled", "backbone=tf_efficientnet_lite1", "image_size=320")
    assert cfg.model.backbone == "tf_efficientnet_lite1"
    assert cfg.data.image_size == 320


def test_wrong_choices_name_the_right_ones():
    with pytest.raises(MissingConfigException, match=r"(?s)padin.*padim"):
        composed("model=padin")
    with pytest.raises(ConfigCompositionException, match="n_featurs"):
        composed("model=padim", "model.n_featurs=3")
    with pytest.raises(InputError, match="protocol=fast: expected clean or paper"):
        build(composed("data=folder", "data.root=x", "protocol=fast").data)

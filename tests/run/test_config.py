"""Every file in configs/ composes, and what it describes can be made."""

import copy
import math

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from support import CONFIGS, composed

from blemish.api import AnomalyDetector
from blemish.edge.errors import InputError
from blemish.run.config import OPTIONAL, build, check_overrides, module_of, plain, resolve_groups, run_cli
from blemish.run.results import preprocessing_of
from blemish.run.train import train


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("[!_]*.yaml"))


DATA = [name for name in names("data") if name != "products"]  # which is made of others


def test_every_group_is_known():
    known = {"data", "launch", "logger", "model", "paper", "recipe", "store", "sweep", "trainer"}
    assert {path.name for path in CONFIGS.iterdir() if path.is_dir()} <= known


@pytest.mark.parametrize("name", DATA)
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
    if name not in ("bundled", "auto"):
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


@pytest.mark.parametrize("group", [path.name for path in CONFIGS.iterdir() if path.is_dir()])
def test_a_misspelt_choice_of_any_group_names_the_nearest(group):
    name = next((name for name in names(group) if len(name) > 3), "on")
    typo = name[:-1] + "qz"
    for text in (f"{group}={typo}", f"+{group}={typo}"):
        with pytest.raises(InputError, match=rf"^{group}={typo}: .*choose .*{name}"):
            composed(text, config="reproduce")
    with pytest.raises(InputError, match=rf"^{group}={typo}: .*choose .*{name}"):
        check_overrides([f"{group}={name},{typo}"], "reproduce", several=True)


@pytest.mark.parametrize("group", OPTIONAL)
def test_none_of_a_group_may_be_chosen(group):
    assert plain(composed(f"{group}=null", config="reproduce")) == plain(composed(config="reproduce"))
    assert resolve_groups([f"{group}="], "train") == resolve_groups([f"{group}=''"], "train") == [f"~{group}"]
    assert resolve_groups(["recipe=padim", "recipe=null"], "train") == ["~recipe"]
    assert resolve_groups(["recipe=null", "recipe=padim"], "train") == ["recipe=padim"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model.n_featurs=3", "model.n_featurs: .*model.n_features"),
        ("modle.sigma=4", "modle.sigma: .*model.sigma"),
        ("sigma=4", "sigma: .*model.sigma"),
        ("image_sise=64", "image_sise: .*image_size"),
        ("recipes=padim", "recipes: .*recipe"),
        ("+alhpa=1", "alhpa: .*alpha"),
        ("+save.picturs=1", "save.picturs: .*save.pictures"),
        ("recipe@other=padim", "recipe@other"),
        ("+recipe=padim", "recipe"),
        ("paper=padim", r"\+paper=padim"),
        ("alpha", "alpha"),
        ("model=null", "model=null: .*padim"),
    ],
)
def test_what_does_not_exist_is_told_in_one_line(text, says):
    with pytest.raises(InputError, match=f"^[^\n]*{says}[^\n]*$"):
        composed(text)


def test_an_interruption_says_how_to_go_on(tmp_path, capsys):
    def stop(cfg):
        raise KeyboardInterrupt

    def said(cfg) -> str:
        with pytest.raises(SystemExit) as stopped:
            run_cli(stop, cfg, "python tools/train.py")
        assert stopped.value.code == 130
        return capsys.readouterr().err

    cfg = composed()
    assert "nothing to resume" in said(cfg)
    cfg.run_dir = str(tmp_path / "a run")
    (tmp_path / "a run").mkdir()
    assert "nothing to resume" in said(cfg)
    (tmp_path / "a run" / "model.ckpt").touch()
    assert f"'run={cfg.run_dir}'" in said(cfg)
    (tmp_path / "a run" / "last.ckpt").touch()
    assert said(cfg).endswith(f": python tools/train.py 'resume={cfg.run_dir}'\n")
    assert said(composed(config="table")) == said(None) == "stopped\n"


def scalars(cfg, place: str = ""):
    """(key, value) of every number of a resolved config that a command line can set."""
    for name, value in cfg.items():
        if isinstance(value, dict):
            yield from scalars(value, f"{place}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{place}{name}", value


ABSURD = (math.nan, math.inf, -1e9, "high", True, [1, 2], {"a": 1})


def refused(cfg, key: str, value, work) -> None:
    """Check that a value is refused by its key."""
    changed = copy.deepcopy(cfg)
    OmegaConf.update(changed, key, value, merge=False)
    with pytest.raises(InputError) as error:
        work(changed)
    shown = key.split(".")[1] if key in ("model.image_size", "data.image_size", "data.batch_size", "data.workers", "data.seed") else key
    assert f"{shown}=" in str(error.value), f"{key}={value}: {error.value}"


@pytest.mark.parametrize("name", names("model"))
def test_every_number_of_a_method_is_checked_before_anything_is_read(name, tmp_path):
    """As the images are not there, they would be what is told of otherwise; `reweight: true` is a number too."""
    cfg = composed(f"model={name}", "backbone=test_resnet", "weights=random", "data=folder", f"data.root='{tmp_path}/none'", "trainer=cpu")
    cfg.run_dir = str(tmp_path / "run")
    OmegaConf.set_struct(cfg, False)
    for key, _ in scalars(plain(cfg)["model"], "model."):
        if key.startswith("model.strides."):
            continue
        for value in ABSURD:
            if value != "high" or not key.endswith("stage"):  # a layer may have a name
                refused(cfg, key, value, train)
    for key, value in (("model.stages", 3), ("model.radii", 2), ("model.betas", [0.5, 2]), ("model.cells", [0]), ("model.strides", 4)):
        if OmegaConf.select(cfg, key) is not None:
            refused(cfg, key, value, train)
    assert not (tmp_path / "run").exists()


def test_every_number_of_a_run_is_checked_before_anything_is_read(tmp_path):
    cfg = composed("backbone=test_resnet", "weights=random", "data=folder", f"data.root='{tmp_path}/none'", "trainer=cpu", "store=on")
    cfg.run_dir, cfg.tiling = str(tmp_path / "run"), 128
    OmegaConf.set_struct(cfg, False)
    keys = [key for key, _ in scalars({key: value for key, value in plain(cfg).items() if key != "model"})]
    assert {"alpha", "pixel_limit", "save.pictures", "overlap", "trainer.max_epochs", "store.max_gb", "data.calibration"} <= set(keys)
    for key in keys:
        if (key not in ("trainer.devices",) and not key.startswith("data.")) or key in ("data.calibration", "data.test_share"):
            for value in ABSURD:
                refused(cfg, key, value, train)
    values = {"pixel_limit": -1, "save.pictures": -2, "overlap": 128, "trainer.max_epochs": 0, "seed": -1, "sweep.minutes": 0}
    values |= {
        "sweep.threads": -1,
        "sweep.without": "mutuall",
        "objective": "foo",
        "batch_size": 0.5,
        "protocol": "fast",
        "save": 3,
        "weights": None,
        "backbone": 3,
    }
    switches = ("save.checkpoint", "save.curves", "overwrite", "store.enabled", "store.images", "trainer.enable_progress_bar")
    for key, value in [*(("alpha", alpha) for alpha in (0.0, 1.0, 5.0)), *values.items(), *((key, "no") for key in switches)]:
        refused(cfg, key, value, train)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", DATA)
def test_every_number_of_a_data_set_is_checked_before_anything_is_read(name, tmp_path):
    cfg = composed(f"data={name}", f"data.root='{tmp_path}/none'", *(["data.unit=tile"] if name == "gdxray" else []))
    OmegaConf.set_struct(cfg, False)
    for key, _ in scalars(plain(cfg)["data"], "data."):
        for value in ABSURD:
            refused(cfg, key, value, lambda cfg: build(cfg.data))


def test_tiles_of_a_radiograph_have_their_own_size_unless_told_otherwise(tmp_path):
    def sizes(*overrides):
        cfg = composed("data=gdxray", *overrides)
        return cfg.image_size, cfg.data.image_size, cfg.crop

    assert sizes("data.unit=tile", "recipe=padim") == (96, 96, None) and sizes("data.unit=tile", "data.tile=64") == (64, 64, None)
    assert sizes("data.unit=tile", "image_size=128", "crop=112") == (128, 128, 112) and sizes() == (256, 256, None)
    cfg = composed("data=gdxray", "data.unit=tile", "data.stride=80", "data.window=dtype")
    assert preprocessing_of(cfg)[2:4] == (96, 16)  # whole radiographs are cut into such tiles
    assert preprocessing_of(composed("data=gdxray"))[2] is None


def test_a_share_and_a_count_are_told_apart_by_the_point():
    for value in (1, 1.0, 0.97, 40):
        assert build(composed("model=dfm", "backbone=test_resnet", "weights=random", f"model.keep={value}").model).share == value
    for value in (0, 0.0, 1.5, 40.0, -1):
        with pytest.raises(InputError, match=rf"model.keep={value}"):
            build(composed("model=dfm", "backbone=test_resnet", "weights=random", f"model.keep={value}").model)


def test_an_option_of_python_is_checked_as_the_command_line_is():
    for option, value in (("n_features", 0), ("sigma", "high"), ("alpha", 5), ("seed", -1), ("epochs", 0), ("recipe", "padin")):
        with pytest.raises(InputError, match=option):
            AnomalyDetector("padim", backbone="test_resnet", weights="random", **{option: value})

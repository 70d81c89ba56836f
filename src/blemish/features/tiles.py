"""The backbone on tiles: each one small image, and its pooled feature one cell of a map."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from blemish.features.extractor import Features
from blemish.ops.maps import starts

PIXELS = 2**20  # of resized tiles that go through the network at a time
RESIZE = {"mode": "bilinear", "antialias": True, "align_corners": False}


class TileFeatures(Features):
    """One map (B, D, h, w): the stages' means over all positions, of each tile of `tile` pixels at `stride`, resized to `tile_input`."""

    def __init__(self, backbone: str, stages: Iterable[int | str], weights: str, seed: int, tile: int, stride: int, tile_input: int):
        super().__init__(backbone, stages, weights, seed)
        self.tile, self.stride, self.tile_input = tile, stride, tile_input
        # the store keeps the map by this name, which has all it depends on besides the network
        self.stages = [f"tiles-{tile}-{stride}-{tile_input}-of-{'-'.join(str(stage) for stage in self.stages)}"]
        self.channels, self.named = [sum(self.channels)], True  # named: the digest is that of all stages

    @torch.no_grad()
    def forward(self, image: Tensor) -> list[Tensor]:
        """The map of images (B, 3, H, W) in [0, 1], of any size."""
        height, width = image.shape[-2:]
        y, x = starts(height, self.tile, self.stride), starts(width, self.tile, self.stride)
        if torch.compiler.is_exporting():
            rows = self._in_graph(image, y, x)
        else:
            every = image.unfold(2, min(self.tile, height), 1).unfold(3, min(self.tile, width), 1).permute(0, 2, 3, 1, 4, 5)
            places = torch.cartesian_prod(torch.arange(len(image)), y, x).to(image.device)  # (B·h·w, 3)
            parts = places.split(max(1, PIXELS // self.tile_input**2))
            tiles = (F.interpolate(every[tuple(part.T)], [self.tile_input] * 2, **RESIZE) for part in parts)  # (n, 3, side, side)
            rows = torch.cat([self._pooled(some) for some in tiles])
        return [rows.unflatten(0, (-1, len(y), len(x))).movedim(-1, 1)]

    def _in_graph(self, image: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """The features of all tiles at once, cut by rows and columns and resized by two products, which exporters know."""
        at, up = [], []
        for start, length in zip((y, x), image.shape[-2:], strict=True):
            side = min(self.tile, length)
            at.append(start[:, None] + torch.arange(side))  # (h, tile)
            up.append(F.interpolate(torch.eye(side)[None, None], (self.tile_input, side), **RESIZE)[0, 0])
        tiles = image[:, :, at[0]][..., at[1]].permute(0, 2, 4, 1, 3, 5)  # (B, h, w, 3, tile, tile)
        # rows last: OpenVINO would take a product with a constant on the right for a layer, and normalise its columns as channels
        return self._pooled(up[0] @ (tiles.flatten(0, 2) @ up[1].T))

    def _pooled(self, tiles: Tensor) -> Tensor:
        return torch.cat([stage.mean((2, 3)) for stage in super().forward(tiles)], 1)  # (n, D)

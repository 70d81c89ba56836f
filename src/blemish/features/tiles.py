"""The backbone on tiles: each one small image, and its pooled feature one cell of a map."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from blemish.features.extractor import Features
from blemish.ops.maps import starts

PIXELS = 2**20  # of tiles resized for the network that go through it at a time


class TileFeatures(Features):
    """One map (B, D, h, w): the stages' means over all positions, of every tile of `tile` pixels at `stride`, resized to `tile_input`."""

    def __init__(self, backbone: str, stages: Iterable[int | str], weights: str, seed: int, tile: int, stride: int, tile_input: int):
        super().__init__(backbone, stages, weights, seed)
        self.tile, self.stride, self.tile_input = tile, stride, tile_input
        # the one name under which the store keeps the map, with all it depends on beside the network
        self.stages = [f"tiles-{tile}-{stride}-{tile_input}-of-{'-'.join(str(stage) for stage in self.stages)}"]
        self.channels = [sum(self.channels)]

    @torch.no_grad()
    def forward(self, image: Tensor) -> list[Tensor]:
        """The map of images (B, 3, H, W) in [0, 1], of any size."""
        height, width = image.shape[-2:]
        if torch.compiler.is_exporting():
            return [self.in_graph(image)]
        every = image.unfold(2, min(self.tile, height), 1).unfold(3, min(self.tile, width), 1).permute(0, 2, 3, 1, 4, 5)
        y, x = starts(height, self.tile, self.stride), starts(width, self.tile, self.stride)
        places = torch.cartesian_prod(torch.arange(len(image)), y, x)  # (B·h·w, 3)
        rows = []
        for some in places.to(image.device).split(max(1, PIXELS // self.tile_input**2)):
            tiles = every[tuple(some.T)]  # (n, 3, tile, tile), the only copy
            tiles = F.interpolate(tiles, [self.tile_input] * 2, mode="bilinear", antialias=True, align_corners=False)
            rows.append(torch.cat([stage.mean((2, 3)) for stage in super().forward(tiles)], 1))  # (n, D)
        return [torch.cat(rows).unflatten(0, (len(image), len(y), len(x))).movedim(-1, 1)]

    def in_graph(self, image: Tensor) -> Tensor:
        """The map by all tiles at once, cut by their rows and columns and resized by two products, which exporters know."""
        at, up = [], []
        for length in image.shape[-2:]:
            side = min(self.tile, length)
            at.append(starts(length, self.tile, self.stride)[:, None] + torch.arange(side))  # (h, tile)
            shape = (self.tile_input, side)
            up.append(F.interpolate(torch.eye(side)[None, None], shape, mode="bilinear", antialias=True, align_corners=False)[0, 0])
        tiles = image[:, :, at[0]][..., at[1]].permute(0, 2, 4, 1, 3, 5)  # (B, h, w, 3, tile, tile)
        # rows last: OpenVINO takes a product with a constant on the right for a layer, and its columns for the channels to be normalised
        tiles = up[0] @ (tiles.flatten(0, 2) @ up[1].T)
        pooled = torch.cat([stage.mean((2, 3)) for stage in super().forward(tiles)], 1)  # (n, D)
        return pooled.unflatten(0, (-1, len(at[0]), len(at[1]))).movedim(-1, 1)

    def digest(self, stage: int | str | None = None) -> str:
        """That of the whole network, cut behind its last wanted stage."""
        return super().digest()

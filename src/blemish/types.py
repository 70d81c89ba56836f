"""What travels between the rooms: a batch of images in, a prediction out, and the error a user can act on."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # tools that only read results do not wait for torch
    from torch import Tensor

NORMAL, ANOMALOUS, UNKNOWN = 0, 1, -1  # image labels
NO_TRUTH = 255  # mask value of a pixel whose truth is not known; pixel metrics leave it out
IGNORED = 254  # mask value of a pixel that is not looked at: beside an image in a letterbox, or outside the roi of interest


class Batch(NamedTuple):
    """Images on their way to a detector, with the truth that only the metrics look at."""

    image: Tensor  # (B, 3, H, W) float32 in [0, 1]
    label: Tensor  # (B,) int64: NORMAL, ANOMALOUS or UNKNOWN
    mask: Tensor  # (B, H, W) uint8: 0 normal, 1 anomalous, NO_TRUTH where unknown, IGNORED where nothing is looked at
    path: list[str]  # B keys of the manifest: the relative path, with "#x,y,w,h" behind it for a tile
    maps: list[Tensor] | None = None  # stored maps (B, C, h, w), one per stage; image is then (B, 0, H, W) unless the method wants both
    ignore_mask: Tensor | None = None  # (B, H, W) bool, where the mask is IGNORED; None where it is nowhere


class Prediction(NamedTuple):
    """What a detector says of a batch; larger is more anomalous."""

    score: Tensor  # (B,) float32
    map: Tensor | None = None  # (B, H, W) float32 in the pixels of the network's input, None for an image-level method


class ProductPrediction(Prediction):
    """A prediction by a detector of several products, see `products.Products`, that unpacks as any other."""

    product: Tensor  # (B,) int64 which of them each image shows
    p_value: Tensor  # (B,) float64 of its being one of them at all

    def __new__(cls, score: Tensor, map: Tensor | None, product: Tensor, p_value: Tensor) -> ProductPrediction:
        prediction = super().__new__(cls, score, map)
        prediction.product, prediction.p_value = product, p_value
        return prediction

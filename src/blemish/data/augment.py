"""Random changes of training images."""

from dataclasses import dataclass

import torch
from kornia.geometry.transform import rotate
from torch import Tensor

from blemish.edge.checks import check_number, check_switch, check_whole
from blemish.edge.errors import InputError


@dataclass(frozen=True)
class Augment:
    """Rotation by up to `rotate` degrees, mirroring left to right with probability 1/2, and a square of `crop` pixels at a random place.

    Each image is changed by itself. A rotation takes the nearest pixel and leaves black corners, as torchvision's. InputError for values
    that cannot be used.
    """

    rotate: float = 0
    flip: bool = False
    crop: int | None = None

    def __post_init__(self) -> None:
        check_number("augment", "[0, 180]", rotate=self.rotate)
        check_switch("augment", flip=self.flip)
        check_whole("augment", 8, also=(None,), crop=self.crop)

    def __bool__(self) -> bool:
        return bool(self.rotate or self.flip or self.crop)

    def __call__(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """Changed images (B, 3, H, W) or (B, 3, crop, crop) of images (B, 3, H, W); `generator` is on their device."""
        chance = torch.rand(4, len(image), generator=generator, device=image.device)  # (4, B): the same numbers whatever is switched on
        if self.rotate:
            image = rotate(image, self.rotate * (2 * chance[0] - 1), mode="nearest", padding_mode="zeros")
        if self.flip:
            image = torch.where((chance[1] < 0.5)[:, None, None, None], image.flip(3), image)
        if self.crop:
            room = [side - self.crop for side in image.shape[-2:]]
            if min(room) < 0:
                raise InputError(f"augment.crop={self.crop}: larger than the images, {tuple(image.shape[-2:])}")
            corners = [(place * (most + 1)).long().tolist() for place, most in zip(chance[2:], room, strict=True)]
            image = torch.stack(
                [one[:, top : top + self.crop, left : left + self.crop] for one, top, left in zip(image, *corners, strict=True)]
            )
        return image

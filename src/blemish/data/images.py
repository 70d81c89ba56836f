"""Arrays to network inputs, and anomaly maps back to image pixels, in torch; `edge.geometry` does the same in numpy."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from blemish.edge import geometry as edge
from blemish.edge.errors import InputError
from blemish.edge.geometry import GREY, UINT16, Geometry, fill_masked, ignore_mask_in_network, middle
from blemish.types import IGNORED


def to_unit(array: np.ndarray, window: Mapping[str, tuple[float, float]]) -> Tensor:
    """Scale an image (H, W) or (H, W, 3) to (3, H, W) float32: (value − lo) / (hi − lo), clamped to [0, 1].

    window: (lo, hi) by dtype. uint8 is always 0..255, uint16 is 0..65535 without an entry; InputError for float32 without one.
    """
    dtype = array.dtype.name
    ranges = {"uint16": UINT16, **window, "uint8": (0.0, 255.0)}
    if dtype not in ranges:
        raise InputError(f"data.window: no range for {dtype} images; expected [lo, hi], or auto with training images of that dtype")
    lo, hi = ranges[dtype]
    unit = array.astype(np.float32)
    unit -= lo
    unit /= hi - lo
    image = torch.from_numpy(unit.clip(0, 1, out=unit))
    return image.permute(2, 0, 1) if image.ndim == 3 else image.expand(3, *image.shape)  # (3, H, W)


def to_network(image: Tensor, geometry: Geometry) -> Tensor:
    """Resize (antialiased bilinear), pad and crop an image (C, H, W), float in [0, 1] or uint8; InputError if the crop does not fit."""
    resized, padded, crop = geometry.resized(*image.shape[-2:]), geometry.padded(*image.shape[-2:]), geometry.crop
    is_float = image.is_floating_point()
    if image.shape[-2:] != resized:
        # torch 2.14 on a CPU reads wrong rows of floats where the output is one pixel wide; transposed, it does not
        turned = resized[1] == 1 and is_float
        image, shape = (image.mT.contiguous(), resized[::-1]) if turned else (image, resized)
        image = F.interpolate(image[None], shape, mode="bilinear", antialias=True, align_corners=False)[0]
        image = image.mT if turned else image
        image = image.clamp_(0, 1) if is_float else image
    if resized != padded:
        square = image.new_full((*image.shape[:-2], *padded), GREY / 255 if is_float else GREY)
        square[..., *middle(padded, resized)] = image
        image = square
    if crop is None:
        return image
    if crop > min(padded):
        raise InputError(f"data.crop={crop} of an image of {padded[1]}×{padded[0]} pixels; expected at most {min(padded)}, or crop=null")
    return image[..., *middle(padded, (crop, crop))]


def mask_to_network(mask: Tensor, geometry: Geometry) -> Tensor:
    """Move a mask (H, W) uint8 to where `to_network` puts its image, by nearest neighbour; padding becomes IGNORED."""
    # numpy: interpolate's nearest-exact starts threads within threads
    return torch.from_numpy(edge.mask_to_network(mask.numpy(), geometry, IGNORED))


def prepare(array: np.ndarray, window: Mapping[str, tuple[float, float]], geometry: Geometry, inside: np.ndarray | None = None) -> Tensor:
    """The network input (3, h, w) float32 in [0, 1] of an image: `to_unit`, then `to_network`, with grey outside its ROI `inside` (H, W).

    uint8 images are resized as uint8, which is faster and within one grey level.
    """
    array = array if inside is None else fill_masked(array, inside, window)
    if array.dtype == np.uint8:
        image = torch.from_numpy(array)
        image = image.permute(2, 0, 1) if image.ndim == 3 else image[None]  # (3, H, W) or (1, H, W)
        return restored(to_network(image, geometry))
    return to_network(to_unit(array, window)[: 1 if array.ndim == 2 else 3], geometry).expand(3, -1, -1)


def compact(image: Tensor) -> Tensor:
    """An image (3, H, W) in [0, 1] in as few bytes as are lossless: uint8 where possible, (1, H, W) if grey; `restored` undoes it."""
    image = image[:1] if torch.equal(image, image[:1].expand_as(image)) else image
    bytes = (image * 255).round().byte()
    return bytes if torch.equal(restored(bytes)[: len(image)], image) else image.clone()  # one channel must not hold on to three


def restored(stored: Tensor) -> Tensor:
    """The image (3, H, W) float32 that `compact` was given, to the last bit."""
    # divided in numpy: torch would start threads within threads
    image = torch.from_numpy(stored.numpy() / np.float32(255)) if stored.dtype == torch.uint8 else stored.float()
    return image.expand(3, -1, -1)


def ignore_mask(height: int, width: int, geometry: Geometry, inside: np.ndarray | None) -> Tensor | None:
    """The ignored pixels (h, w) bool of an image's network input, None if there are none; InputError if all are ignored."""
    where = ignore_mask_in_network(height, width, geometry, inside)
    if where is None:
        return None
    check_not_all_ignored(where)
    return torch.from_numpy(where)


def check_not_all_ignored(ignore_mask: np.ndarray | Tensor) -> None:
    if ignore_mask.all():
        raise InputError("no pixel of its ROI is left at the size of the network; expected a larger ROI")


def to_image(map: Tensor, height: int, width: int, geometry: Geometry, inside: np.ndarray | None = None) -> Tensor:
    """Resize an anomaly map (h, w) back to image pixels (height, width), float32: bilinear, without the padding.

    Pixels outside the crop get the map's minimum, pixels outside the ROI the minimum inside it. InputError for a map of the wrong size.
    """
    resized, padded, crop = geometry.resized(height, width), geometry.padded(height, width), geometry.crop
    expected = padded if crop is None else (crop, crop)
    if tuple(map.shape) != expected:
        raise InputError(f"a map of {tuple(map.shape)}; expected {expected} with image_size={geometry.size} and crop={crop}")
    map = map.float()
    if crop is not None:
        full = map.new_full(padded, map.min())  # (size, size)
        full[middle(padded, expected)] = map
        map = full
    map = map[middle(padded, resized)]
    if resized != (height, width):
        map = F.interpolate(map[None, None], (height, width), mode="bilinear", antialias=True, align_corners=False)[0, 0]
    if inside is None:
        return map
    inside = torch.from_numpy(inside)
    return torch.where(inside, map, map[inside].min())

"""The way from an array to the network's input and back, in torch; files become arrays in `edge.reading`."""

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
    """An image (H, W) or (H, W, 3) of any dtype as (3, H, W) float32 in [0, 1]: (value − lo) / (hi − lo), clamped.

    `window` has (lo, hi) for "uint16" and "float32" in the units of the file; uint8 is 0..255 always, uint16 is 0..65535
    without an entry, float32 without an entry is an InputError.
    """
    dtype = array.dtype.name
    ranges = {"uint16": UINT16, **window, "uint8": (0.0, 255.0)}
    if dtype not in ranges:
        raise InputError(f"data.window: no range for {dtype} images; expected [lo, hi], or auto with training images of that kind")
    lo, hi = ranges[dtype]
    unit = array.astype(np.float32)
    unit -= lo
    unit /= hi - lo
    image = torch.from_numpy(unit.clip(0, 1, out=unit))
    return image.permute(2, 0, 1) if image.ndim == 3 else image.expand(3, *image.shape)  # (3, H, W)


def to_network(image: Tensor, geometry: Geometry) -> Tensor:
    """An image (3, H, W), float or uint8, as its geometry brings it to the network, by antialiased bilinear interpolation.

    InputError if the crop is larger than what it is cut from.
    """
    resized, padded, crop = geometry.resized(*image.shape[-2:]), geometry.padded(*image.shape[-2:]), geometry.crop
    if image.shape[-2:] != resized:
        # torch 2.14 on a CPU takes wrong rows of floats where the width becomes 1: on its side an image is resized right;
        # bytes are right as they are, and rounded after one axis and then the other
        turned = resized[1] == 1 and image.is_floating_point()
        image, shape = (image.mT.contiguous(), resized[::-1]) if turned else (image, resized)
        image = F.interpolate(image[None], shape, mode="bilinear", antialias=True, align_corners=False)[0]
        image = image.mT if turned else image
        image = image.clamp_(0, 1) if image.is_floating_point() else image
    if resized != padded:
        whole = image.new_full((*image.shape[:-2], *padded), GREY / 255 if image.is_floating_point() else GREY)
        whole[..., *middle(padded, resized)] = image
        image = whole
    if crop is None:
        return image
    if crop > min(padded):
        raise InputError(f"data.crop={crop} of an image of {padded[1]}×{padded[0]} pixels; expected at most {min(padded)}, or crop=null")
    return image[..., *middle(padded, (crop, crop))]


def mask_to_network(mask: Tensor, geometry: Geometry) -> Tensor:
    """Move a mask (H, W) uint8 to where `to_network` puts its image, by nearest neighbour; padding is IGNORED."""
    # numpy: interpolate's nearest-exact starts threads within threads
    return torch.from_numpy(edge.mask_to_network(mask.numpy(), geometry, IGNORED))


def prepare(array: np.ndarray, window: Mapping[str, tuple[float, float]], geometry: Geometry, inside: np.ndarray | None = None) -> Tensor:
    """`to_unit`, then `to_network`: (3, h, w) float32 in [0, 1]; bytes are resized as bytes, which is quicker and within one grey level.

    Where an image (H, W) is not `inside` it is painted before.
    """
    array = array if inside is None else fill_masked(array, inside, window)
    if array.dtype == np.uint8:
        image = torch.from_numpy(array)
        image = image.permute(2, 0, 1) if image.ndim == 3 else image[None]  # (3, H, W) or (1, H, W)
        image = torch.from_numpy(to_network(image, geometry).numpy() / np.float32(255))  # torch would start threads within threads
    else:
        image = to_network(to_unit(array, window)[: 1 if array.ndim == 2 else 3], geometry)
    return image.expand(3, -1, -1)


def compact(image: Tensor) -> Tensor:
    """An image (3, H, W) in [0, 1] as the bytes it was made of if there are such, and (1, H, W) if it is grey; see `restored`."""
    image = image[:1] if torch.equal(image, image[:1].expand_as(image)) else image
    bytes = (image * 255).round().byte()
    return bytes if torch.equal(restored(bytes)[: len(image)], image) else image.clone()  # one channel must not hold on to three


def restored(stored: Tensor) -> Tensor:
    """What `compact` was given, (3, H, W) float32, to the last bit."""
    image = torch.from_numpy(stored.numpy() / np.float32(255)) if stored.dtype == torch.uint8 else stored.float()  # divided as in `prepare`
    return image.expand(3, -1, -1)


def ignore_mask(height: int, width: int, geometry: Geometry, inside: np.ndarray | None) -> Tensor | None:
    """Ignored pixels of the network input (h, w) of an image (height, width), None if there are none, see `edge.geometry`.

    InputError if nothing is left.
    """
    where = ignore_mask_in_network(height, width, geometry, inside)
    if where is None:
        return None
    check_some_inside(where)
    return torch.from_numpy(where)


def check_some_inside(ignore_mask: np.ndarray | Tensor) -> None:
    """InputError if an image is ignored altogether."""
    if ignore_mask.all():
        raise InputError("no pixel of its ROI is left at the size of the network; expected a larger ROI")


def to_image(map: Tensor, height: int, width: int, geometry: Geometry, inside: np.ndarray | None = None) -> Tensor:
    """A map (h, w) in the network's pixels back in the pixels of the input image, (height, width) float32, bilinearly.

    Padding is cut off. Pixels outside the crop take the minimum of the map, pixels outside the ROI that of the others.
    InputError if the map is not of the size that `to_network` makes.
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

"""The way from an array to the network's input and back, in torch; files become arrays in `edge.reading`."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from blemish.edge import geometry as edge
from blemish.edge.errors import InputError
from blemish.edge.geometry import GREY, UINT16, Geometry, middle, painted, unseen
from blemish.types import OUTSIDE


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


def place(image: Tensor, geometry: Geometry) -> Tensor:
    """An image (3, H, W), float or uint8, as its geometry brings it to the network, by antialiased bilinear interpolation.

    InputError if the crop is larger than what it is cut from.
    """
    inner, outer, crop = geometry.inner(*image.shape[-2:]), geometry.outer(*image.shape[-2:]), geometry.crop
    if image.shape[-2:] != inner:
        # torch 2.14 on a CPU takes wrong rows of floats where the width becomes 1: on its side an image is resized right;
        # bytes are right as they are, and rounded after one axis and then the other
        turned = inner[1] == 1 and image.is_floating_point()
        image, shape = (image.mT.contiguous(), inner[::-1]) if turned else (image, inner)
        image = F.interpolate(image[None], shape, mode="bilinear", antialias=True, align_corners=False)[0]
        image = image.mT if turned else image
        image = image.clamp_(0, 1) if image.is_floating_point() else image
    if inner != outer:
        whole = image.new_full((*image.shape[:-2], *outer), GREY / 255 if image.is_floating_point() else GREY)
        whole[..., *middle(outer, inner)] = image
        image = whole
    if crop is None:
        return image
    if crop > min(outer):
        raise InputError(f"data.crop={crop} of an image of {outer[1]}×{outer[0]} pixels; expected at most {min(outer)}, or crop=null")
    return image[..., *middle(outer, (crop, crop))]


def place_mask(mask: Tensor, geometry: Geometry) -> Tensor:
    """A mask (H, W) uint8 to where `place` puts its image, by the nearest pixel so that no value is made up; OUTSIDE lies beside it."""
    # numpy: interpolate's nearest-exact starts threads within threads
    return torch.from_numpy(edge.place_mask(mask.numpy(), geometry, OUTSIDE))


def prepare(array: np.ndarray, window: Mapping[str, tuple[float, float]], geometry: Geometry, seen: np.ndarray | None = None) -> Tensor:
    """`to_unit`, then `place`: (3, h, w) float32 in [0, 1]; bytes are resized as bytes, which is quicker and within one grey level.

    Where an image (H, W) is not `seen` it is painted before.
    """
    array = array if seen is None else painted(array, seen, window)
    if array.dtype == np.uint8:
        image = torch.from_numpy(array)
        image = image.permute(2, 0, 1) if image.ndim == 3 else image[None]  # (3, H, W) or (1, H, W)
        image = torch.from_numpy(place(image, geometry).numpy() / np.float32(255))  # torch would start threads within threads
    else:
        image = place(to_unit(array, window)[: 1 if array.ndim == 2 else 3], geometry)
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


def hidden(height: int, width: int, geometry: Geometry, seen: np.ndarray | None) -> Tensor | None:
    """Where in the network's input (h, w) of an image (height, width) nothing is looked at, see `edge.geometry.unseen`; None where all is.

    InputError if nothing is left.
    """
    where = unseen(height, width, geometry, seen)
    if where is None:
        return None
    check_seen(where)
    return torch.from_numpy(where)


def check_seen(hidden: np.ndarray | Tensor) -> None:
    """InputError where all of an image is hidden."""
    if hidden.all():
        raise InputError("nothing of its region is in this image at its size in the network; expected a region with a pixel of it")


def unplace(map: Tensor, height: int, width: int, geometry: Geometry, seen: np.ndarray | None = None) -> Tensor:
    """A map (h, w) in the network's pixels back in the pixels of the input image, (height, width) float32, bilinearly.

    What lay beside the image is gone. What lay outside the crop takes the map's minimum, and what is not `seen` (height, width) that of the
    rest. InputError if the map is not of the size that `place` makes.
    """
    inner, outer, crop = geometry.inner(height, width), geometry.outer(height, width), geometry.crop
    expected = outer if crop is None else (crop, crop)
    if tuple(map.shape) != expected:
        raise InputError(f"a map of {tuple(map.shape)}; expected {expected} with image_size={geometry.size} and crop={crop}")
    map = map.float()
    if crop is not None:
        padded = map.new_full(outer, map.min())
        padded[middle(outer, expected)] = map
        map = padded  # (size, size)
    map = map[middle(outer, inner)]
    if inner != (height, width):
        map = F.interpolate(map[None, None], (height, width), mode="bilinear", antialias=True, align_corners=False)[0, 0]
    if seen is None:
        return map
    seen = torch.from_numpy(seen)
    return torch.where(seen, map, map[seen].min())

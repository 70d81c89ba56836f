"""Boxes of the anomalous parts of a map; needs SciPy."""

import numpy as np


def boxes_of(map: np.ndarray, level: float) -> list[tuple[int, int, int, int]]:
    """Return (x, y, w, h) of every 8-connected component of a map (H, W) above a level, that with the largest value first."""
    from scipy import ndimage

    label, _ = ndimage.label(map > level, structure=np.ones((3, 3)))
    boxes = []
    for number, (y, x) in enumerate(ndimage.find_objects(label), 1):
        peak = map[y, x].max(where=label[y, x] == number, initial=-np.inf)
        boxes.append((peak, (x.start, y.start, x.stop - x.start, y.stop - y.start)))
    return [box for _, box in sorted(boxes, key=lambda one: -one[0])]

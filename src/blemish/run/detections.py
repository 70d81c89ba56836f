"""The noise-residual detector on single images: no run and no training, each image in its own pixels."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from blemish.data.images import prepare
from blemish.data.roi import Roi
from blemish.edge.errors import InputError
from blemish.edge.geometry import Geometry
from blemish.files import Outputs, atomic_write, picture_info, write_csv, write_json
from blemish.methods.noise_residual import NoiseResidual
from blemish.noise.false_alarms import Alarms, Detection, detections, overlay, strength
from blemish.run.results import Failure, output_path

KINDS = ("detections.csv", "detections.json", "overlay.png", "mask.png", "map.png")
COLUMNS = ("path", "score", "detections", "strength", "map_min", "map_max")


@torch.inference_mode()
def detect(
    model: NoiseResidual,
    paths: Sequence[Path],
    window: Mapping,
    names: Mapping[Path, Path],
    output: Path,
    roi: Roi | None,
    load: Callable[[Path], np.ndarray],
    failed: list[Failure],
    outputs: Outputs,
) -> Iterator[tuple]:
    """Write what is found in each image, and yield its row of scores.csv, see COLUMNS; the score is −min log10 NFA.

    `<name>_detections.csv` and `.json` list box, area, radius, scale and log10 NFA, strongest first; `_overlay.png` colours them by
    strength; `_mask.png` is NFA ≤ ε; the 16 bits of `_map.png` run from map_min to map_max, values of −log10 NFA. Nothing is detected
    outside of a roi; what is there still serves as noise, so that a roi's border is none of the picture's. An image that cannot be
    used is added to `failed`.
    """
    for path in paths:
        try:
            image, alarms = alarms_of(model, path, load, window, roi)
        except InputError as error:
            failed.append(Failure(path, str(error).removeprefix(f"{path}: ")))
            continue
        (found,) = detections(alarms, model.epsilon)
        map = -alarms.log10_nfa[0].double().cpu().numpy()  # (H, W)
        low, high = float(map.min()), float(map.max())
        stem, header = output / names[path], (*Detection._fields, "strength")
        rows = [(*detection, strength(detection.log10_nfa)) for detection in found]
        write_csv(output_path(stem, "detections.csv"), header, rows, outputs)
        write_json(output_path(stem, "detections.json"), [dict(zip(header, row, strict=True)) for row in rows], outputs)
        coloured = overlay(image[0], alarms.log10_nfa[0])  # (3, H, W)
        pictures = {
            "overlay": (coloured * 255).round().byte().permute(1, 2, 0).cpu().numpy(),
            "mask": (-map <= np.log10(model.epsilon)).astype(np.uint8) * 255,
            "map": ((map - low) / max(high - low, 1e-30) * 65535).round().astype(np.uint16),
        }
        for kind, picture in pictures.items():
            with atomic_write(output_path(stem, f"{kind}.png"), outputs) as temporary:
                Image.fromarray(picture).save(temporary, pnginfo=picture_info())
        yield str(path), high, len(found), strength(-high), low, high


def alarms_of(
    model: NoiseResidual, path: Path, load: Callable[[Path], np.ndarray], window: Mapping, roi: Roi | None
) -> tuple[Tensor, Alarms]:
    """An image (1, 3, H, W) and its alarms, those inside the roi."""
    array = load(path)
    inside = roi and roi.inside(path, *array.shape[:2])
    image = prepare(array, dict(window), Geometry())[None].to(model.device)  # (1, 3, H, W)
    alarms = model.alarms(image)
    return image, alarms if inside is None else in_roi(alarms, torch.from_numpy(inside).to(image.device), model.epsilon, path)


def in_roi(alarms: Alarms, inside: Tensor, epsilon: float, path: Path) -> Alarms:
    """Alarms of the ROI (H, W); NFA outside is its largest inside, and above ε. The number of tests stays, so the bound holds."""
    if not inside.any():
        raise InputError(f"{path}: no pixel of this image is inside its ROI")
    rest = alarms.log10_nfa[:, inside].amax().clamp_min(math.log10(epsilon) + 1)
    return alarms._replace(log10_nfa=torch.where(inside, alarms.log10_nfa, rest))

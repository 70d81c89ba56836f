"""What one bag of all images costs with calibrate=full, for one image at 256 px on one thread: python benchmarks/bag.py

The network and the score of an image, and the scores of its bag of n training images and itself, for the recipes of the methods that score
one. The features are those of random images. Writes results/performance/bag.json and the table of docs/calibration.md.
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from blemish.files import write_json
from blemish.report.formats import between
from blemish.run.config import build, composed
from blemish.run.record import environment

ROOT = Path(__file__).parents[1]
FILE, DOC = ROOT / "results" / "performance" / "bag.json", ROOT / "docs" / "calibration.md"
METHODS = {
    "dfm, lite0": ["recipe=dfm"],
    "dfm, ResNet-50": ["model=dfm", "weights=random"],
    "dfkde, lite0": ["recipe=dfkde"],
    "dfkdm, lite0": ["recipe=dfkdm"],
    "subspace, lite0": ["recipe=subspace"],
}
NUMBERS, REPEATS, SIZE = (20, 40, 80), 15, (256, 256)


def milliseconds(call: Callable) -> float:
    """The shortest time of some calls."""
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return 1e3 * min(times)


@torch.inference_mode()
def measured(overrides: list[str]) -> dict:
    """Milliseconds of an image, and of its bag by the number of training images."""
    model = build(composed(*overrides, "data=textures", "logger=none").model).eval()
    model.expects_bag = True
    pictures = torch.rand(NUMBERS[-1] + 1, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    rows, one = [], model.features(pictures[-1:])
    for part in pictures.split(4):
        rows += model.collect(model.features(part))
    found = {}
    for n in NUMBERS:
        state = model.new_state(n)
        state.update(torch.stack(rows[:n]))
        model.fit(state)
        found.setdefault("image", milliseconds(lambda: model(pictures[-1:])))
        model.bag(rows[-1], one)  # what is known before the image is computed once
        found[n] = milliseconds(lambda: model.bag(rows[-1], one))
    return found


def main() -> None:
    torch.set_num_threads(1)
    result = {"environment": environment(), "methods": {name: measured(overrides) for name, overrides in METHODS.items()}}
    write_json(FILE, result)
    columns = ["method", "image, ms", *(f"its bag of {n} + 1, ms" for n in NUMBERS)]
    lines = [f"| {' | '.join(columns)} |", "| --- |" + " ---: |" * (len(columns) - 1)]
    for name, found in result["methods"].items():
        lines.append(f"| {name} | " + " | ".join(f"{value:.3g}" for value in found.values()) + " |")
    machine = result["environment"]
    lines += ["", f"{machine['cpu']}, one thread, torch {machine['packages']['torch']}."]
    between(DOC, "bag", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

"""On drawn textures of 64 px each trained method finds a gross defect better than its untrained network does."""

import numpy as np
import pytest
from PIL import Image
from support import bricks, draw_squares, methods_of, tiny_run

from blemish.detector import TrainedDetector
from blemish.run.train import train

SIDE, BLOCK = 64, 24
MARGIN = 0.1  # of AUROC
# method: (texture, defect, deviation of the noise in grey levels, metric, changes of the method's quick settings)
TURNED = ("waves", "turned", 4, "pixel_auroc", [])
TASKS = dict.fromkeys(["autoencoder", "cflow", "dfr", "reverse_distillation", "riad", "stfpm", "supersimplenet"], TURNED) | {
    "ganomaly": ("bricks", "squares", 4, "image_auroc", []),
    "lake": ("waves", "squares", 60, "image_auroc", []),
    "patch_svdd": ("ramp", "mirrored", 50, "pixel_auroc", ["trainer.max_epochs=20"]),
    "vae": ("waves", "turned", 4, "pixel_auroc", ["trainer.max_epochs=25", "model.kl_weight=0.02"]),
}


def texture(kind: str, noise: float, generator: np.random.Generator) -> np.ndarray:
    """Waves with a phase of their own, a ramp from left to right, or a crop of a photograph; grey levels (64, 64) as floats."""
    if kind == "bricks":
        clean = 255 * bricks(1, int(generator.integers(2**31)))[0, 0].numpy()
        return clean + generator.normal(0, noise, clean.shape)
    y, x = np.mgrid[:SIDE, :SIDE]
    clean = 128 + 60 * np.sin(0.5 * x + 0.3 * y + generator.uniform(0, 2 * np.pi)) if kind == "waves" else 60 + 130 * x / SIDE
    return clean + generator.normal(0, noise, (SIDE, SIDE))


def spoil(image: np.ndarray, defect: str, generator: np.random.Generator) -> np.ndarray:
    """Draw the defect into an image, and return its mask (64, 64)."""
    mask = np.zeros(image.shape, np.uint8)
    if defect == "squares":
        draw_squares(image, mask, generator)
        return mask
    y, x = generator.integers(4, SIDE - BLOCK - 4, 2)
    part = slice(y, y + BLOCK), slice(x, x + BLOCK)
    image[part], mask[part] = image[part][::-1].T if defect == "turned" else image[part][:, ::-1], 255
    return mask


def write(root, kind: str, defect: str, noise: float) -> None:
    """24 normal images for training, 12 normal and 12 with the defect for the test, as `support.tiny_overrides` names their folders."""
    generator = np.random.default_rng(0)
    for name, count in (("masks", 0), ("normal", 24), ("normal_test", 12), ("square", 12)):
        (root / name).mkdir(parents=True)
        for i in range(count):
            image = texture(kind, noise, generator)
            if name == "square":
                Image.fromarray(spoil(image, defect, generator)).save(root / "masks" / f"{i:03}.png")
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / name / f"{i:03}.png")


def test_every_method_that_trains_has_a_task():
    assert methods_of(TrainedDetector) == sorted(TASKS)


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(TASKS))
def test_training_beats_the_untrained_network(method, tmp_path):
    kind, defect, noise, metric, more = TASKS[method]
    write(tmp_path / "data", kind, defect, noise)
    found = []
    for name, options in (("untrained", ["trainer.max_epochs=1", "model.learning_rate=1e-12"]), ("trained", more)):
        run = tiny_run(tmp_path / "data", tmp_path / name, f"model={method}", *options)
        found.append(train(run)[metric])
    assert found[1] >= 0.7, found
    assert found[1] > found[0] + MARGIN, found

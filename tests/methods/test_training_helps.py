"""No recipe of a method that trains loses to its own network before the first step."""

import pytest
from support import UNDRAWN

from blemish.run.config import composed
from blemish.run.train import train

UNTRAINED = ["trainer.max_epochs=1", "epoch_size=16", "model.learning_rate=1e-12"]  # BatchNorm has seen some images
# method: the metrics that have to be better, on crops of the photograph of bricks
RECIPES = {
    "autoencoder": ["image_auroc", "pixel_auroc"],
    "cflow": ["image_auroc", "pixel_auroc"],
    "dfr": ["image_auroc", "pixel_auroc"],
    "ganomaly": ["image_auroc"],
    "lake": ["image_auroc"],
    "patch_svdd": ["image_auroc", "pixel_auroc"],
    "reverse_distillation": ["image_auroc", "pixel_auroc"],
    "riad": ["image_auroc", "pixel_auroc"],
    "stfpm": ["image_auroc", "pixel_auroc"],
    "vae": ["image_auroc", "pixel_auroc"],
}

# what is trained where it is not the recipe, which does not train
SCHEDULES = {"patch_svdd": ["batch_size=8", "epoch_size=1600", "model.pairs=1", "model.learning_rate=3e-4"]}


@pytest.mark.slow
@pytest.mark.parametrize("method", RECIPES)
def test_a_recipe_beats_its_untrained_network(method, tmp_path):
    quiet = ["protocol=paper", "trainer.enable_progress_bar=false", "logger=none", "save.checkpoint=false", *UNDRAWN]
    found = []
    for name, options in (("untrained", UNTRAINED), ("trained", SCHEDULES.get(method, []))):
        run = composed(f"recipe={method}", "data=textures", f"run_dir='{tmp_path / name}'", *quiet, *options)
        found.append(train(run))
    for metric in RECIPES[method]:
        before, after = (metrics[metric] for metrics in found)
        assert after > before, (metric, before, after)

"""Which settings a recipe should have: python benchmarks/recipes.py --data FOLDER… [--sizes 256 384] [--backbones …] [--output CSV].

FOLDER is what `tools/data.py synthesize` made: training images alone, a part of them held out, once as they are and once with a drawn
defect each. Every candidate is fitted to the rest and ranked by its image AUROC on the held-out pairs; no test image of any data set is
read. One pass of the network per backbone and size serves all candidates of all methods. The CSV gets a row per candidate.
"""

import argparse
import csv
import time
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from rich.console import Console
from sklearn.metrics import roc_auc_score

from blemish.data.images import prepare
from blemish.detector import OnePassDetector
from blemish.edge.geometry import Geometry
from blemish.edge.reading import find_images, read
from blemish.features.extractor import Features
from blemish.methods.spade import SPADE, describe
from blemish.ops.neighbours import nearest
from blemish.run.config import build

CONFIGS = Path(__file__).parents[1] / "configs"
STAGES = [1, 2, 3, 4]
CANDIDATES = {
    "padim": ["", "model.stages=[2,3]", "model.stages=[2,3] model.n_features=200"],
    "patchcore": ["", "model.stages=[2]", "model.stages=[3]", "model.reweight=false"],
    "dfm": ["", "model.stages=[2]", "model.stages=[4]", "model.stages=[2,3]", "model.pool=2", "model.keep=0.9", "model.keep=0.995"],
    "dfkde": ["", "model.stages=[3]", "model.stages=[2]", "model.stages=[2,3]", "model.stages=[2,3,4]", "model.components=64"],
    "dfkdm": ["model.density=gaussian", "model.density=gaussian model.stages=[2,3]", "model.density=gaussian model.components=64"],
    "spade": ["", "model.neighbors=5", "model.global_stage=3", "model.global_stage=3 model.neighbors=5", "model.neighbors=1"],
}
BATCH = 16


@torch.inference_mode()
def maps_of(features: Features, paths: list[Path], size: int) -> list[list[torch.Tensor]]:
    """The maps of all images in batches, float16."""
    batches = [paths[i : i + BATCH] for i in range(0, len(paths), BATCH)]
    images = (torch.stack([prepare(read(path), {}, Geometry(size)) for path in batch]) for batch in batches)
    return [[stage.half() for stage in features(image)] for image in images]


def near(model: SPADE, maps: list[torch.Tensor]) -> torch.Tensor:
    return nearest(describe(maps[model.deep]), model.images, min(model.neighbors, len(model.images)))[0].mean(1)


@torch.inference_mode()
def rank(model: OnePassDetector, train: list, good: list, bad: list, size: int) -> float:
    """Image AUROC of a method fitted to the maps `train`; SPADE is judged by its image score, without its costly map."""
    wanted = [STAGES.index(stage) for stage in model.backbone.stages]

    def chosen(batch):
        return [batch[i].float() for i in wanted]

    state = model.new_state(sum(len(batch[0]) for batch in train))
    for batch in train:
        state.update(model.collect(chosen(batch)))
    state.gather()
    model.fit(state)
    score = near if isinstance(model, SPADE) else lambda model, maps: model.score(maps, (size, size)).score
    scores = [torch.cat([score(model, chosen(batch)) for batch in part]) for part in (good, bad)]
    label = torch.cat([torch.full((len(score),), value) for value, score in enumerate(scores)])
    return roc_auc_score(label, torch.cat(scores))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 384])
    parser.add_argument("--backbones", nargs="+", default=["tf_efficientnet_lite0", "tf_efficientnet_lite2"])
    parser.add_argument("--methods", nargs="+", default=list(CANDIDATES))
    parser.add_argument("--output", type=Path, default=Path("results/recipes.csv"))
    args = parser.parse_args()

    console = Console(highlight=False)
    new = not args.output.exists()
    with args.output.open("a", newline="") as file, initialize_config_dir(str(CONFIGS), version_base="1.3"):
        table = csv.writer(file, lineterminator="\n")
        if new:
            table.writerow(("data", "backbone", "image_size", "method", "settings", "image_auroc", "seconds"))
        for folder in args.data:
            for backbone in args.backbones:
                features = Features(backbone, STAGES, "bundled", 0)
                for size in args.sizes:
                    parts = [maps_of(features, find_images(folder / name), size) for name in ("normal", "normal_test", "defects")]
                    for method in args.methods:
                        for settings in CANDIDATES[method]:
                            overrides = [f"model={method}", f"backbone={backbone}", "weights=bundled", *settings.split()]
                            started = time.perf_counter()
                            value = rank(build(compose("train", overrides=overrides).model).eval(), *parts, size)
                            row = (folder.name, backbone, size, method, settings, f"{value:.4f}", f"{time.perf_counter() - started:.1f}")
                            table.writerow(row)
                            file.flush()
                            console.print(*row)


if __name__ == "__main__":
    main()

"""What `mutual` finds in a folder of which nothing is known.

    python benchmarks/unlabelled.py "SETTINGS" … --data "data=mtd" … [--seeds 0 1 2] [--count 80]

From each data set so many normal images and defects, at most --count of either, are drawn by the seed, whatever split they
are in, and scored with protocol=unlabelled. SETTINGS and data are overrides, as "recipe=mutual model.stages=[2]". A normal image of
the same name as a drawn defect, in a folder of `tools/data.py synthesize` the image that it was drawn on, is left out. Every run is a
row of the CSV, and rows that it has are not measured again; the means over the data sets are printed last.
"""

import argparse
import csv
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path

from hydra import compose, initialize_config_dir
from recipes import rows_of
from rich.console import Console

from blemish.data.manifest import Sample, write_manifest
from blemish.data.samplers import shuffled
from blemish.run.config import build
from blemish.run.train import train
from blemish.types import ANOMALOUS, NORMAL

ROOT = Path(__file__).parents[1]
METRICS = ("image_auroc", "pixel_auroc", "aupro")
HEADER = ("data", "settings", "seed", "normal", "defects", *METRICS, "cpu_seconds")
QUIET = ("logger=none", "save.checkpoint=false", "save.state=false", "save.scores=false", "save.curves=false", "save.pictures=0")


def draw(samples: list[Sample], count: int, seed: int) -> list[Sample]:
    """At most `count` normal images and as many defects, all to be tested."""
    defects = shuffled([sample for sample in samples if sample.label == ANOMALOUS], seed)[:count]
    names = {Path(sample.path).name for sample in defects}
    normal = [sample for sample in samples if sample.label == NORMAL and Path(sample.path).name not in names]
    return [sample._replace(split="test") for sample in sorted([*shuffled(normal, seed)[:count], *defects], key=lambda sample: sample.key)]


def measure(data: str, settings: str, count: int, seed: int) -> list[str]:
    """The numbers of images, metrics and CPU seconds of one run."""
    overrides = [*settings.split(), *data.split(), "store=on", "protocol=unlabelled", f"seed={seed}", *QUIET]
    drawn = draw(build(compose("train", overrides=overrides).data).listed(), count, seed)
    with tempfile.TemporaryDirectory() as folder:
        write_manifest(Path(folder, "manifest.csv"), drawn)
        started = time.process_time()
        metrics = train(compose("train", overrides=[*overrides, f"data.manifest={folder}/manifest.csv", f"run_dir={folder}/run"]))
        seconds = time.process_time() - started
    defects = sum(sample.label == ANOMALOUS for sample in drawn)
    values = ["" if metrics.get(name) is None else f"{metrics[name]:.4f}" for name in METRICS]
    return [str(len(drawn) - defects), str(defects), *values, f"{seconds:.1f}"]


def name_of(data: str) -> str:
    """The data set without paths: "drawn screw" for a folder of drawn defects, otherwise the category or the overrides' first value."""
    keys = dict(text.split("=", 1) for text in data.split())
    if keys["data"] == "folder":
        return f"drawn {Path(keys['data.root']).name}"
    return keys.get("data.category", keys["data"].rpartition("/")[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+")
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--count", type=int, default=80)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "unlabelled.csv")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    console = Console(highlight=False, width=160)
    rows = rows_of(args.output, HEADER, 3)
    with initialize_config_dir(os.fspath(ROOT / "configs"), version_base="1.3"):
        for settings in args.settings:
            found = []
            for data in args.data:
                for seed in args.seeds:
                    key = (name_of(data), settings, str(seed))
                    if key not in rows:
                        rows[key] = [*key, *measure(data, settings, args.count, seed)]
                        with args.output.open("a", newline="") as file:
                            csv.writer(file, lineterminator="\n").writerow(rows[key])
                    console.print(*rows[key], markup=False)
                    found.append(float(rows[key][5]))
            console.print(f"MEAN [{settings}] {statistics.fmean(found):.3f}", markup=False)


if __name__ == "__main__":
    main()

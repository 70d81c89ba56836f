"""What known kinds of defects do for unknown ones: python benchmarks/defect_types.py "SETTINGS" data=mtd … [--seeds 0 1 2] [--count 100].

SETTINGS (overrides, as "recipe=supersimplenet") are trained without labels, with labelled defects of all types (half of each), and once for
each type with those of all others. All are tested on the same images: the other halves and the normal ones, of each at most --count, drawn
by the seed. Writes the image AUROC of every type in every training and prints the means.
"""

import argparse
import csv
import logging
import os
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from recipes import rows_of
from rich.console import Console
from sklearn.metrics import roc_auc_score

from blemish.data.manifest import Sample, write_manifest
from blemish.data.samplers import shuffled
from blemish.run.config import build
from blemish.run.train import train
from blemish.types import ANOMALOUS, NORMAL

ROOT = Path(__file__).parents[1]
HEADER = ("data", "settings", "seed", "type", "known", "labelled", "tested", "image_auroc", "fit_seconds")
QUIET = ("logger=none", "save.checkpoint=false", "save.state=false", "save.curves=false", "save.pictures=0", "pixel_limit=0")


def split(samples: Sequence[Sample], known: Sequence[str], count: int, seed: int) -> list[Sample]:
    """The samples with half of the drawn defects to be tested, and the other halves of the `known` types labelled."""
    tested = shuffled([sample for sample in samples if sample.split == "test"], seed)
    now = {}
    for name in {sample.defect for sample in tested}:
        drawn = [sample for sample in tested if sample.defect == name][:count]
        if drawn[0].label == ANOMALOUS:
            now |= {sample.key: "defects" for sample in drawn[::2] if name in known}
            drawn = drawn[1::2]
        now |= {sample.key: "test" for sample in drawn}
    return [sample._replace(split=now.get(sample.key, "skipped")) if sample.split == "test" else sample for sample in samples]


def measure(overrides: Sequence[str], samples: Sequence[Sample]) -> tuple[dict[str, list[float]], float]:
    """The scores of the tested images by type, and the seconds of the fit."""
    found = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        write_manifest(Path(folder, "manifest.csv"), samples)
        metrics = train(compose("train", overrides=[*overrides, f"data.manifest={folder}/manifest.csv", f"run_dir={folder}/run"]))
        with Path(folder, "run", "scores.csv").open() as file:
            for row in csv.DictReader(file):
                found[row["defect"]].append(float(row["score"]))
    return found, metrics["fit_seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings")
    parser.add_argument("data", nargs="+", help="overrides that choose the data set")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "defect_types.csv")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    console = Console(highlight=False, width=160)
    rows = rows_of(args.output, HEADER, 5)
    means = defaultdict(list)
    with initialize_config_dir(os.fspath(ROOT / "configs"), version_base="1.3"):
        for seed in args.seeds:
            overrides = [*args.settings.split(), *args.data, "store=on", "protocol=paper", f"seed={seed}", *QUIET]
            cfg = compose("train", overrides=overrides)
            samples = build(cfg.data).listed()
            normal = {sample.defect for sample in samples if sample.label == NORMAL}
            kinds = sorted({sample.defect for sample in samples if sample.label == ANOMALOUS})
            for unknown in (None, "", *kinds):  # None: nothing is known; "": all types are
                name = {None: "none", "": "all"}.get(unknown, "others")
                known = [] if unknown is None else [kind for kind in kinds if kind != unknown]
                keys = [
                    (cfg.data.category or args.data[0].rpartition("=")[2], args.settings, str(seed), kind, name)
                    for kind in [unknown] * bool(unknown) or kinds
                ]
                if any(key not in rows for key in keys):
                    drawn = split(samples, known, args.count, seed)
                    scores, seconds = measure(overrides, drawn)
                    good = [score for kind in normal for score in scores[kind]]
                    labelled = sum(sample.split == "defects" for sample in drawn)
                    with args.output.open("a", newline="") as file:
                        for key in keys:
                            bad = scores[key[3]]
                            auroc = roc_auc_score([0] * len(good) + [1] * len(bad), good + bad)
                            rows[key] = [*key, str(labelled), str(len(bad)), f"{auroc:.4f}", f"{seconds:.1f}"]
                            csv.writer(file, lineterminator="\n").writerow(rows[key])
                for key in keys:
                    console.print(*rows[key], markup=False)
                    means[name].append(float(rows[key][7]))
    for name, values in means.items():
        console.print(f"MEAN, known {name}: image AUROC {statistics.fmean(values):.3f}")


if __name__ == "__main__":
    main()

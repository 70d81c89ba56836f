"""Which settings a recipe should have, on drawn defects: python benchmarks/recipes.py METHOD ["SETTINGS" …] --data FOLDER… [--seeds 0 1 2].

FOLDER is what `tools/data.py synthesize` made: training images alone, a part of them held out, once as they are and once with a drawn
defect each. Every candidate, a string of overrides such as "model.stages=[2,3] image_size=384" or "recipe=METHOD", is a run of its own on
each folder; no test image of any data set is read. The maps of a frozen backbone are computed once for all candidates. Rows that the CSV
has are not measured again; the means over the folders are printed last.
"""

import argparse
import csv
import logging
import statistics
import tempfile
from pathlib import Path

from hydra import compose, initialize_config_dir
from rich.console import Console

from blemish.run.train import train

CONFIGS = Path(__file__).parents[1] / "configs"
METRICS = ("image_auroc", "pixel_auroc", "aupro")
HEADER = ("data", "backbone", "method", "settings", "seed", *METRICS, "fit_seconds")


def measure(folder: Path, overrides: list[str], seed: int) -> list[str]:
    """One run on a folder of drawn defects; returns its metrics and seconds of fitting."""
    parts = [f"{key}={folder / name}" for key, name in (("data.root", "."), ("data.masks", "masks"))]
    fixed = ["data=folder", "data.normal=normal", "data.normal_test=normal_test", "data.abnormal=[defects]", *parts, "protocol=paper"]
    quiet = ["logger=none", "save.checkpoint=false", "save.state=false", "save.scores=false", "save.curves=false", "save.pictures=0"]
    with tempfile.TemporaryDirectory() as run:
        metrics = train(compose("train", overrides=[*overrides, *fixed, *quiet, f"seed={seed}", f"run_dir={run}/run"]))
    fit = metrics.get("fit_seconds")
    return [f"{metrics[name]:.4f}" if metrics.get(name) is not None else "" for name in METRICS] + [f"{fit or 0:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method")
    parser.add_argument("settings", nargs="*", default=[""])
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, help="by default results/recipes/METHOD.csv")
    args = parser.parse_args()
    args.output = args.output or Path("results/recipes", f"{args.method}.csv")

    logging.disable(logging.INFO)
    console = Console(highlight=False, width=160)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if not args.output.exists():
        args.output.write_text(",".join(HEADER) + "\n")
    with args.output.open() as file:
        rows = {tuple(row[:5]): row for row in csv.reader(file)}
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        for settings in args.settings:
            mine = []
            for folder in args.data:
                for seed in args.seeds:
                    key = (folder.name, args.backbone, args.method, settings, str(seed))
                    if key not in rows:
                        chosen = [f"model={args.method}", f"backbone={args.backbone}", "weights=bundled", "store=on", *settings.split()]
                        rows[key] = [*key, *measure(folder.resolve(), chosen, seed)]
                        with args.output.open("a", newline="") as file:
                            csv.writer(file, lineterminator="\n").writerow(rows[key])
                        console.print(*rows[key][:5], *rows[key][5:])
                    mine.append(rows[key])
            means = [statistics.fmean(values) for values in ([float(row[i]) for row in mine if row[i]] for i in (5, 6, 7, 8)) if values]
            console.print(f"MEAN {args.method} [{settings}]", *(f"{value:.3f}" for value in means), markup=False)


if __name__ == "__main__":
    main()

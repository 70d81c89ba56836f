"""Which settings a recipe should have, on drawn defects: python benchmarks/recipes.py METHOD ["SETTINGS" …] --data FOLDER… [--seeds 0 1 2].

FOLDER is what `tools/data.py synthesize` made: training images alone, a part of them held out, once as they are and once with a drawn
defect each. Every candidate, a string of overrides such as "model.stages=[2,3] image_size=384" or "recipe=METHOD", is a run of its own on
each folder; no test image of any data set is read. The maps of a frozen backbone are computed once for all candidates. Rows that the CSV
has are not measured again; the means over the folders are printed last. Without METHOD the table of docs/choosing.md is written from the
CSV files of results/recipes.
"""

import argparse
import csv
import logging
import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from rich.console import Console

from blemish.run.train import train

CONFIGS = Path(__file__).parents[1] / "configs"
METRICS = ("image_auroc", "pixel_auroc", "aupro")
HEADER = ("data", "backbone", "method", "settings", "seed", *METRICS, "fit_seconds")


def folder_of(folder: Path) -> list[str]:
    """Overrides for a run on a folder of drawn defects that writes nothing but its metrics."""
    parts = [f"{key}={folder / name}" for key, name in (("data.root", "."), ("data.masks", "masks"))]
    data = ["data=folder", "data.normal=normal", "data.normal_test=normal_test", "data.abnormal=[defects]", *parts, "protocol=paper"]
    quiet = ["logger=none", "save.checkpoint=false", "save.state=false", "save.scores=false", "save.curves=false", "save.pictures=0"]
    return data + quiet


def measure(folder: Path, overrides: list[str], seed: int) -> list[str]:
    """One run on a folder of drawn defects; returns its metrics and seconds of fitting."""
    with tempfile.TemporaryDirectory() as run:
        metrics = train(compose("train", overrides=[*overrides, *folder_of(folder), f"seed={seed}", f"run_dir={run}/run"]))
    fit = metrics.get("fit_seconds")
    return [f"{metrics[name]:.4f}" if metrics.get(name) is not None else "" for name in METRICS] + [f"{fit or 0:.1f}"]


def tabulate() -> None:
    """Write the means of the candidates that were measured on the most folders, over these, into docs/choosing.md."""
    lines = [
        "| method | settings | sets | image AUROC | worst set | pixel AUROC | AUPRO |",
        "| --- | --- | ---: | ---: | --- | ---: | ---: |",
    ]
    for path in sorted((CONFIGS.parent / "results" / "recipes").glob("*.csv")):
        with path.open() as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != HEADER:
                continue
            found: dict[str, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
            for row in reader:
                found[row["settings"]][row["data"]].append(row)
        most = max(map(len, found.values()))
        found = {settings: sets for settings, sets in found.items() if len(sets) == most}
        shared = set.intersection(*(set(sets) for sets in found.values()))
        for settings, sets in sorted(found.items(), key=lambda item: -mean_of(item[1], shared, METRICS[0])):
            image = {data: mean_of(sets, {data}, METRICS[0]) for data in sorted(shared)}
            worst = min(image, key=image.get)
            values = [f"{mean_of(sets, shared, name):.3f}" if sets[worst][0][name] else "–" for name in METRICS[1:]]
            cells = (path.stem, f"`{settings}`" if settings else "own", f"{len(shared)}", f"{statistics.fmean(image.values()):.3f}")
            lines.append("| " + " | ".join((*cells, f"{worst} {image[worst]:.3f}", *values)) + " |")
    page = CONFIGS.parent / "docs" / "choosing.md"
    text = page.read_text(encoding="utf-8")
    page.write_text(re.sub(r"(?s)(<!-- recipes: begin -->\n).*(\n<!-- recipes: end -->)", lambda m: m[1] + "\n".join(lines) + m[2], text))


def mean_of(sets: dict[str, list[dict]], names: set[str], metric: str) -> float:
    """The mean of a metric over folders, of the means over their seeds."""
    return statistics.fmean(statistics.fmean(float(row[metric] or 0) for row in sets[name]) for name in names)


def rows_of(output: Path, header: Sequence[str], key: int) -> dict[tuple[str, ...], list[str]]:
    """The rows of a CSV by their first `key` cells; a file that is not there is made, with its header."""
    if not output.exists():
        output.write_text(",".join(header) + "\n")
    with output.open() as file:
        return {tuple(row[:key]): row for row in csv.reader(file)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", nargs="?")
    parser.add_argument("settings", nargs="*", default=[""])
    parser.add_argument("--data", type=Path, nargs="+", default=[])
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, help="by default results/recipes/METHOD.csv")
    args = parser.parse_args()
    if args.method is None:
        tabulate()
        return
    args.output = args.output or Path("results/recipes", f"{args.method}.csv")

    logging.disable(logging.INFO)
    console = Console(highlight=False, width=160)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    rows = rows_of(args.output, HEADER, 5)
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

"""The course of a training on drawn defects: python benchmarks/course.py METHOD ["SETTINGS" …] --data FOLDER… --steps STEPS….

The FOLDERs and SETTINGS are those of recipes.py, which measures whole runs. Here one training is tested in its middle,
after each of STEPS (batches, of `accumulate_grad_batches` together), by the method's own score and by the mean of the largest 1 % of its
map; results/recipes/by_step.csv gets a row each. Rows that the CSV has are not measured again. Without METHOD the table of
docs/choosing.md is written: means over the sets of every training that was followed on three sets or more.
"""

import argparse
import csv
import logging
import warnings
from collections import defaultdict
from pathlib import Path
from statistics import mean

from hydra import compose, initialize_config_dir
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig
from recipes import CONFIGS, METRICS, folder_of
from rich.console import Console

from blemish.features.extractor import Features
from blemish.ops.maps import TOP
from blemish.report.formats import between
from blemish.run.evaluate import Evaluate
from blemish.run.timing import StageTimes
from blemish.run.train import build_model, described, set_up, stored, trainer_of

OUTPUT = Path("results/recipes/by_step.csv")
LITE = "backbone=tf_efficientnet_lite0 "  # is not shown
SHOWN = ("image_auroc", "image_auroc_top", "pixel_auroc")  # of the table

console = Console(highlight=False, width=180)


class Course(Callback):
    """Test the model after some steps of its training and write a row for each."""

    def __init__(self, cfg: DictConfig, key: tuple[str, ...], steps: list[int]):
        self.cfg, self.key, self.steps = cfg, key, set(steps)

    def on_train_batch_end(self, trainer, model, outputs, batch, index) -> None:
        step = trainer.fit_loop.total_batch_idx + 1
        if step % trainer.accumulate_grad_batches or (step := step // trainer.accumulate_grad_batches) not in self.steps:
            return
        self.steps.remove(step)
        modes = {module: module.training for module in model.modules()}
        model.eval()
        model.after_training(model._batches())
        share, found = model.map_share, {}
        for model.map_share in dict.fromkeys((share, share if share is None else TOP)):
            evaluate = Evaluate(0, self.cfg.pixel_limit, 0.05, None)
            trainer_of(self.cfg, [evaluate]).test(model, datamodule=trainer.datamodule, verbose=False)
            found[model.map_share] = evaluate.metrics(None, None)
        model.map_share, model.trainer = share, trainer
        for module, mode in modes.items():
            module.training = mode
        own, top = found[share], found.get(TOP, {})
        values = [f"{value:.3f}" if value is not None else "" for value in (*(own[name] for name in METRICS), top.get("image_auroc"))]
        row = (*self.key, "", str(step), *values)
        with OUTPUT.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(row)
        console.print(*row, markup=False)
        if not self.steps:
            trainer.should_stop = True


def tabulate() -> None:
    """Write the means over the sets after each number of steps into docs/choosing.md."""
    found: dict[tuple[str, str], dict[str, dict[int, dict]]] = defaultdict(lambda: defaultdict(dict))
    with OUTPUT.open() as file:
        for row in csv.DictReader(file):
            if not row["first_weights"]:
                found[row["method"], row["settings"]][row["data"]][int(row["step"])] = row
    lines = [
        "| method | settings | sets | step | image AUROC | by the largest 1 % | pixel AUROC |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for (method, settings), sets in sorted(found.items()):
        for step in sorted(set.intersection(*map(set, sets.values()))) if len(sets) > 2 else []:
            rows = [steps[step] for steps in sets.values()]
            means = [f"{mean(map(float, values)):.3f}" if all(values := [row[name] for row in rows]) else "–" for name in SHOWN]
            lines.append("| " + " | ".join((method, f"`{settings.removeprefix(LITE)}`", " ".join(sorted(sets)), f"{step}", *means)) + " |")
    between("docs/choosing.md", "course", "\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", nargs="?")
    parser.add_argument("settings", nargs="*", default=[""])
    parser.add_argument("--data", type=Path, nargs="+", default=[])
    parser.add_argument("--steps", type=int, nargs="+", default=[])
    args = parser.parse_args()
    if args.method is None:
        tabulate()
        return
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    with OUTPUT.open() as file:
        done = {(*row[:3], row[4]) for row in csv.reader(file)}
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        for folder in args.data:
            for settings in args.settings:
                key = (folder.name, args.method, settings)
                if steps := [step for step in args.steps if (*key, str(step)) not in done]:
                    chosen = [f"model={args.method}", "weights=bundled", "trainer.max_epochs=100000", "store=on", *settings.split()]
                    cfg = compose("train", overrides=[*chosen, *folder_of(folder.resolve()), "seed=0"])
                    times, data, model = StageTimes(Features), described(cfg), build_model(cfg)
                    trainer = trainer_of(cfg, [Course(cfg, key, steps)])
                    set_up(cfg, data)
                    trainer.fit(model, datamodule=stored(cfg, data, model, trainer, times))


if __name__ == "__main__":
    main()

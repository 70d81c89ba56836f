"""The course of a training on drawn defects: python benchmarks/course.py METHOD ["SETTINGS" …] --data FOLDER… --steps STEPS….

The FOLDERs and SETTINGS are those of recipes.py, which measures whole runs. Here one training is tested in its middle,
after each of STEPS (batches, of `accumulate_grad_batches` together), by the method's own score and by the mean of the largest 1 % of its
map; results/recipes/by_step.csv gets a row each. Rows that the CSV has are not measured again.
"""

import argparse
import csv
import logging
import warnings
from pathlib import Path

from hydra import compose, initialize_config_dir
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig
from recipes import CONFIGS, METRICS, folder_of
from rich.console import Console

from blemish.features.extractor import Features
from blemish.ops.maps import TOP
from blemish.run.evaluate import Evaluate
from blemish.run.timing import StageTimes
from blemish.run.train import build_model, described, set_up, stored, trainer_of

OUTPUT = Path("results/recipes/by_step.csv")
HEADER = ("data", "method", "settings", "first_weights", "step", *METRICS, "image_auroc_top")

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method")
    parser.add_argument("settings", nargs="*", default=[""])
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--steps", type=int, nargs="+", required=True)
    args = parser.parse_args()
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

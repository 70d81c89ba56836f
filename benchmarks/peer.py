"""blemish beside anomalib on the same images, with the same network, weights and settings, on the same machine.

    python -m venv peer && peer/bin/pip install torch==2.14.1 torchvision==0.29.1 'anomalib==2.7.*'
    python benchmarks/peer.py --peer-python peer/bin/python --data FOLDER… [--methods padim patchcore] [--repeats 2] [--output JSON]

FOLDER is a category in the layout of MVTec AD; one whose images are no PNGs is copied as numbered PNGs first, as anomalib's data module
reads no others. Every run has a process of its own, in turn blemish, anomalib, blemish, anomalib, … Settings of both:
tf_efficientnet_lite0 with the bundled weights and its own normalisation, 256 px, batches of 32. PaDiM: 100 channels of stages 1 to 3,
resized by nearest neighbour. PatchCore: stages 2 and 3 with their own channels, a coreset of 1 %, 9 neighbours.

bare     Fit to all training images, then score and map of every test image. Timed: listing the folder, decoding, network, fit; not the
         import of packages, nor the making of the network. anomalib without post-processor, evaluator, pictures, validation, progress
         bar and checkpoint, and with a worker for each core in place of its 8.
default  The whole process, as each library does by itself: blemish's tools/train.py with protocol=clean alpha=0.05, all metrics, curves
         and a picture of every test image; anomalib's Engine.fit, then Engine.test. False alarms are normal test images above the
         threshold, missed are anomalous ones that are not. blemish takes it from normal training images that it holds out; anomalib,
         in Engine.fit, takes the one with the largest F1 on its validation images, and these are all test images with their labels
         (val_split_mode=same_as_test; the result says how many).

The areas under the curve are computed by one function from what the bare runs scored. MB is the largest resident set of the process, or
of one of its worker processes, which are not added up. Writes results/performance/peer.json and docs/performance.md.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

import numpy as np
import timm
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch import Callback
from PIL import Image
from rich.console import Console
from sklearn.metrics import roc_auc_score

from blemish.detector import Detector
from blemish.features.weights import bundled_state
from blemish.files import write_json
from blemish.report.formats import Grid, between, markdown, show
from blemish.run.config import build
from blemish.run.record import environment
from blemish.run.train import described, expected_warnings, set_up, trainer_of

ROOT = Path(__file__).parents[1]
LIBRARIES = ("blemish", "anomalib")
VARIANTS = ("bare", "default")
BACKBONE = "tf_efficientnet_lite0"
SETTINGS = {
    "padim": {"stages": [1, 2, 3], "n_features": 100},
    "patchcore": {"stages": [2, 3], "coreset_ratio": 0.01, "neighbors": 9},
}
# what blemish has to be told to do as anomalib does
ALIKE = {"padim": ["model.align=nearest"], "patchcore": ["model.embedding=concatenate"]}
NAMES = {"neighbors": "reweight"}


class Scores(Callback):
    """Path, score and map of every image that is scored."""

    def __init__(self):
        self.path, self.score, self.map = [], [], []

    def on_predict_batch_end(self, trainer, module: Detector, outputs, batch, batch_idx, dataloader_idx=0):
        self.path += batch.path
        self.score.append(outputs.score)
        self.map.append(outputs.map)


def overrides(job: dict) -> list[str]:
    """The job as blemish's command line has it."""
    folder = Path(job["folder"])
    settings = [f"model.{NAMES.get(name, name)}={value}" for name, value in SETTINGS[job["method"]].items()]
    data = ["data=mvtec", f"data.root='{folder.parent}'", f"data.category={folder.name}"]
    size = [f"image_size={job['image_size']}", f"batch_size={job['batch_size']}"]
    return [
        f"model={job['method']}",
        f"backbone={BACKBONE}",
        "weights=bundled",
        *data,
        *size,
        *settings,
        *ALIKE[job["method"]],
        "trainer=cpu",
    ]


def clocks() -> tuple[float, float]:
    """As peer_anomalib.clocks."""
    return time.perf_counter(), sum(os.times()[:4])


def bare(job: dict, folder: Path) -> dict:
    """As peer_anomalib.bare."""
    quiet = ["protocol=paper", "trainer.enable_progress_bar=false", "logger=none"]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("train", overrides=[*overrides(job), *quiet])
    model, scores = build(cfg.model), Scores()
    with expected_warnings():
        started = clocks()
        data = set_up(cfg, described(cfg))
        trainer = trainer_of(cfg, [scores])
        trainer.fit(model, datamodule=data)
        fitted = clocks()
        trainer.predict(model, dataloaders=data.test_dataloader(), return_predictions=False)
        scored = clocks()
    score, maps = torch.cat(scores.score).numpy(), torch.cat(scores.map).numpy()
    np.savez(folder / "scores.npz", path=scores.path, score=score, map=maps)
    wall, cpu = ((b - a, c - b) for a, b, c in zip(started, fitted, scored, strict=True))
    return {"fit": wall[0], "score": wall[1], "fit_cpu": cpu[0], "score_cpu": cpu[1]}


def default(run: Path) -> dict:
    """As peer_anomalib.default, from the files of a run that tools/train.py has made."""
    metrics = json.loads((run / "metrics.json").read_text())
    record = json.loads((run / "record.json").read_text())
    normal, anomalous, rate = metrics["images_normal"], metrics["images_anomalous"], metrics["image_false_alarm_rate"]
    return {
        "fit": metrics["fit_seconds"],
        "test": metrics["test_seconds"],
        "calibration": record["calibration"],
        "false_alarms": None if rate is None else round(rate * normal),
        "normal": normal,
        "missed": None if rate is None else anomalous - round(metrics["image_recall"] * anomalous),
        "anomalous": anomalous,
    }


def as_png(folder: Path, scratch: Path) -> Path:
    """The category itself if all its images are PNGs, else a copy of PNGs with numbers for names, which anomalib's data module pairs."""
    images = sorted(path for part in ("train", "test") for path in (folder / part).rglob("*") if path.is_file())
    if all(path.suffix == ".png" for path in images):
        return folder
    for number, path in enumerate(images):
        defect, name = path.parent.name, f"{number:04d}"
        target = scratch / folder.name / path.relative_to(folder).with_name(f"{name}.png")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).save(target)
        if defect != "good":
            mask = scratch / folder.name / "ground_truth" / defect / f"{name}_mask.png"
            mask.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / "ground_truth" / defect / f"{path.stem}_mask.png", mask)
    return scratch / folder.name


def command(library: str, job: dict, folder: Path, peer: str) -> list[str]:
    if library == "anomalib":
        return [peer, str(ROOT / "benchmarks" / "peer_anomalib.py"), json.dumps(job), str(folder)]
    if job["variant"] == "bare":
        return [sys.executable, __file__, "--job", json.dumps(job), str(folder)]
    train = [sys.executable, str(ROOT / "tools" / "train.py"), *overrides(job), "save.pictures=-1"]
    return [*train, f"run_dir='{folder / 'run'}'"]


def once(library: str, job: dict, folder: Path, peer: str) -> dict:
    """What one process took and found."""
    folder.mkdir()
    with (folder / "log.txt").open("w") as log:
        started = time.perf_counter()
        process = subprocess.Popen(command(library, job, folder, peer), stdout=log, stderr=subprocess.STDOUT, cwd=folder)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit((folder / "log.txt").read_text()[-4000:])
    found = (
        default(folder / "run")
        if library == "blemish" and job["variant"] == "default"
        else json.loads((folder / "result.json").read_text())
    )
    row = {"library": library, "category": Path(job["folder"]).name, "method": job["method"], "variant": job["variant"]}
    row |= {**found, "process": seconds, "process_cpu": usage.ru_utime + usage.ru_stime, "MB": usage.ru_maxrss / 1024}
    return row | (areas(folder / "scores.npz", Path(job["folder"])) if job["variant"] == "bare" else {})


def areas(file: Path, folder: Path) -> dict[str, float]:
    """AUROC of the scores, and of the maps at their own size with the masks reduced to it by nearest neighbour."""
    found = np.load(file)
    side = found["map"].shape[1:]
    masks = [mask_of(folder, Path(str(path)), side) for path in found["path"]]
    label = [Path(str(path)).parent.name != "good" for path in found["path"]]
    pixels = roc_auc_score(np.stack(masks).ravel(), found["map"].ravel())
    return {"images": len(label), "image_auroc": roc_auc_score(label, found["score"]), "pixel_auroc": pixels}


def mask_of(folder: Path, path: Path, side: tuple[int, int]) -> np.ndarray:
    """The mask of test/<defect>/<name>.png, nothing for a normal image."""
    if path.parent.name == "good":
        return np.zeros(side, bool)
    mask = Image.open(folder / "ground_truth" / path.parent.name / f"{path.stem}_mask.png").convert("L")
    return np.asarray(mask.resize(side[::-1], Image.Resampling.NEAREST)) > 127


COLUMNS = {
    "bare": {"fit": 1, "score": 1, "MB": 0, "image_auroc": 3, "pixel_auroc": 3},
    "default": {"process": 1, "MB": 0, "false_alarms": None, "missed": None},
}  # digits; None for a count
OUT_OF = {"false_alarms": "normal", "missed": "anomalous"}


def grids(result: dict) -> list[Grid]:
    """A table of each variant: medians over the repeats, counts of the first; a ratio is anomalib's seconds over ours, pair by pair."""
    runs, machine, peer = result["runs"], result["environment"], result["peer"]

    def values(name: str, library: str, case: tuple) -> list:
        return [run[name] for run in runs if (run["library"], run["variant"], run["category"], run["method"]) == (library, *case)]

    def cells(name: str, digits: int | None, case: tuple) -> list[str]:
        ours, theirs = (values(name, library, case) for library in LIBRARIES)
        if digits is None:
            images = values(OUT_OF[name], LIBRARIES[0], case)[0]
            return ["–" if found[0] is None else f"{found[0]} of {images}" for found in (ours, theirs)]
        shown = [f"{statistics.median(column):.{digits}f}" for column in (ours, theirs)]
        return shown + ([f"{statistics.median(b / a for a, b in zip(ours, theirs, strict=True)):.1f}×"] if digits == 1 else [])

    tables = []
    cases = list(dict.fromkeys((run["category"], run["method"]) for run in runs))
    note = f"Seconds; {machine['cpu']}, {machine['cores_usable']} cores, torch {machine['packages']['torch']}; "
    note += f"anomalib {peer['anomalib']}, torch {peer['torch']}; medians of {result['repeats']} runs each, in turn."
    for variant in dict.fromkeys(run["variant"] for run in runs):
        columns = ["data", "method"]
        for name, digits in COLUMNS[variant].items():
            columns += [f"{name.replace('_', '-')} {which}" for which in (*LIBRARIES, *["ratio"] * (digits == 1))]
        rows = [[*case] for case in cases]
        for row, case in zip(rows, cases, strict=True):
            row += [cell for name, digits in COLUMNS[variant].items() for cell in cells(name, digits, (variant, *case))]
        tables.append(Grid(variant, columns, 2, rows, set(), [note]))
    return tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, help="the Python in which anomalib is installed")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="categories in the layout of MVTec AD")
    parser.add_argument("--methods", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "performance" / "peer.json")
    args = parser.parse_args()

    runs, console = [], Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    config = timm.create_model(BACKBONE).pretrained_cfg
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch, "weights.pth")
        torch.save(bundled_state(BACKBONE), weights)
        fixed = {"image_size": args.image_size, "batch_size": 32, "backbone": BACKBONE, "weights": str(weights), "workers": os.cpu_count()}
        fixed |= {"mean": config["mean"], "std": config["std"]}
        folders = [as_png(folder.resolve(), Path(scratch)) for folder in args.data]
        for number, (repeat, folder, method, variant, library) in enumerate(
            product(range(args.repeats), folders, args.methods, args.variants, LIBRARIES)
        ):
            job = {"variant": variant, "method": method, "folder": str(folder), **SETTINGS[method], **fixed}
            runs.append({"repeat": repeat, **once(library, job, Path(scratch, str(number)), args.peer_python)})
            shown = {name: value for name, value in runs[-1].items() if isinstance(value, str | int | float)}
            console.print(*(f"{name}={value:.3f}" if isinstance(value, float) else f"{name}={value}" for name, value in shown.items()))
    peer = next(run["packages"] for run in runs if run["library"] == "anomalib")
    result = {"settings": SETTINGS, **fixed, "repeats": args.repeats, "peer": peer, "runs": runs, "environment": environment()}
    result.pop("weights")
    write_json(args.output, result)
    tables = grids(result)
    for grid in tables:
        show(console, grid, bold=False)
    if args.output == parser.get_default("output"):
        between(ROOT / "docs" / "performance.md", "peer", "\n".join(markdown(grid, bold=False) for grid in tables))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        place = Path(sys.argv[3])
        (place / "result.json").write_text(json.dumps(bare(json.loads(sys.argv[2]), place)))
    else:
        main()

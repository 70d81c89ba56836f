"""The half of benchmarks/peer.py that runs under the Python in which anomalib is installed: PYTHON benchmarks/peer_anomalib.py JOB FOLDER.

JOB is the job as JSON; result.json and, of a bare run, scores.npz are left in FOLDER. Knows nothing of blemish.
"""

import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from anomalib.models import Padim, Patchcore
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback
from torchvision.transforms.v2 import Compose, Normalize, Resize


class Scores(Callback):
    """Label and raw score of every tested image, noted before the post-processor rescales the batch."""

    def __init__(self):
        self.labels, self.scores = [], []

    def on_test_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        self.labels.append(outputs.gt_label.clone())
        self.scores.append(outputs.pred_score.clone())


def model_of(job: dict, **parts):
    """The method with the job's weights in its network; every tensor of the network must be among them."""
    size = (job["image_size"], job["image_size"])
    parts["pre_processor"] = PreProcessor(Compose([Resize(size, antialias=True), Normalize(job["mean"], job["std"])]))
    common = {"backbone": job["backbone"], "layers": job["stages"], "pre_trained": False, **parts}
    if job["method"] == "padim":
        model = Padim(n_features=job["n_features"], **common)
    else:
        model = Patchcore(coreset_sampling_ratio=job["coreset_ratio"], num_neighbors=job["neighbors"], **common)
    network = model.model.feature_extractor.feature_extractor
    state = torch.load(job["weights"], weights_only=True)
    network.load_state_dict({key: state[key] for key in network.state_dict()})
    return model


def data_of(job: dict, **options) -> MVTecAD:
    folder = Path(job["folder"])
    return MVTecAD(folder.parent, folder.name, train_batch_size=job["batch_size"], eval_batch_size=job["batch_size"], **options)


def clocks() -> tuple[float, float]:
    """Wall seconds, and processor seconds of this process and of those that it has started and that have ended."""
    return time.perf_counter(), sum(os.times()[:4])


def bare(job: dict, folder: Path) -> dict:
    """Seconds to fit, and to give the score and the map of every test image; nothing else is done.

    Without post-processor, evaluator, pictures, validation, progress bar and checkpoint.
    """
    model, data = model_of(job, post_processor=False, evaluator=False, visualizer=False), data_of(job, num_workers=job["workers"])
    engine = Engine(barebones=True, limit_val_batches=0, default_root_dir=folder)
    started = clocks()
    engine.fit(model=model, datamodule=data)
    fitted = clocks()
    batches = engine.predict(model=model, datamodule=data)
    scored = clocks()
    np.savez(
        folder / "scores.npz",
        path=[str(Path(path).relative_to(job["folder"])) for batch in batches for path in batch.image_path],
        score=torch.cat([batch.pred_score.flatten() for batch in batches]).numpy(),
        map=torch.cat([batch.anomaly_map.reshape(-1, *batch.anomaly_map.shape[-2:]) for batch in batches]).numpy(),
    )
    wall, cpu = ((b - a, c - b) for a, b, c in zip(started, fitted, scored, strict=True))
    return {"fit": wall[0], "score": wall[1], "fit_cpu": cpu[0], "score_cpu": cpu[1]}


def default(job: dict, folder: Path) -> dict:
    """Seconds of Engine.fit and Engine.test with their defaults, and the false alarms of the threshold that they choose."""
    model, data, scores = model_of(job), data_of(job), Scores()
    engine = Engine(callbacks=[scores], default_root_dir=folder)
    started = time.perf_counter()
    engine.fit(model=model, datamodule=data)
    fitted = time.perf_counter()
    engine.test(model=model, datamodule=data)
    tested = time.perf_counter()
    label, score = torch.cat(scores.labels).bool(), torch.cat(scores.scores).flatten()
    threshold = float(model.post_processor.image_threshold)
    return {
        "fit": fitted - started,
        "test": tested - fitted,
        "threshold": threshold,
        "false_alarms": int((score[~label] > threshold).sum()),
        "normal": int((~label).sum()),
        "missed": int((score[label] <= threshold).sum()),
        "anomalous": int(label.sum()),
        "pictures": len([*folder.rglob("images/**/*.png")]),
        "validated_on": data.val_split_mode.value,
        "validated_images": len(data.val_data),
        "of_which_tested": len({*data.val_data.samples.image_path} & {*data.test_data.samples.image_path}),
    }


def main() -> None:
    job, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    result = (bare if job["variant"] == "bare" else default)(job, folder)
    packages = {name: importlib.metadata.version(name) for name in ("anomalib", "torch", "torchvision", "timm", "lightning")}
    (folder / "result.json").write_text(json.dumps({**result, "packages": packages}))


if __name__ == "__main__":
    main()

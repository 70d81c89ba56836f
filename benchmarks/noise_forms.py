"""The noise detector's three forms on real images: BLEMISH_DATA=folder python benchmarks/noise_forms.py.

With ten references on all test images of each set; alone, which takes longer, on evenly spread ones of each label: 24 from features, 12
from pixels. Writes results/noise_forms.json, and from it a table of docs/methods/noise_residual.md. The settings of features were chosen on
drawn defects (results/recipes/noise_residual.csv). Rows that the file has stay.
"""

import json
import os
import tempfile
from pathlib import Path

import torch
from false_alarms import ROOT, keep, put
from hydra import compose, initialize_config_dir
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F

from blemish.data.images import prepare
from blemish.data.manifest import Sample, write_manifest
from blemish.edge.geometry import Geometry
from blemish.edge.reading import read
from blemish.run.config import build
from blemish.run.train import train
from blemish.types import ANOMALOUS, NORMAL

DOC, RESULTS = ROOT / "docs" / "methods" / "noise_residual.md", ROOT / "results" / "noise_forms.json"
FEATURES = "backbone=tf_efficientnet_lite0 weights=bundled model.source=features model.stages=[1,2,3] model.scales=1"
FEATURES += " model.patch_cells=2 model.components=16"
FORMS = {  # settings, and how many test images of each label
    "features, 10 references": (f"{FEATURES} model.statistic=both model.references=10", None),
    "features, 10 references, energy": (f"{FEATURES} model.statistic=energy model.references=10", None),
    "features, alone": (f"{FEATURES} model.statistic=energy", 24),
    "pixels, alone": ("", 12),
}
SETS = {"MTD": "mtd", "cookie": "cookie", "screw": "screw", "C0001, tiles": "C0001"}
TRAIN = 20  # images kept
DRAWING, PASTED = "hieroglyphs", (1047 / 2066, 1564 / 2066)  # columns of the section


def thinned(samples: list[Sample], test: int | None) -> list[Sample]:
    """At most TRAIN training images, and `test` test images of each label or all, evenly spread in their order."""
    kept = []
    for split, label in (("train", NORMAL), ("test", NORMAL), ("test", ANOMALOUS)):
        group, most = [s for s in samples if (s.split, s.label) == (split, label)], TRAIN if split == "train" else test
        most = most or len(group)
        kept += [group[i * len(group) // most] for i in range(most)] if len(group) > most else group
    return kept


def measure(data: str, settings: str, test: int | None) -> dict:
    """Image and pixel AUROC of one form on a set."""
    grey = ["model.channels=1"] if data != "cookie" else []
    quiet = ["logger=none", "save.checkpoint=false", "save.scores=false", "save.curves=false", "save.pictures=0", "protocol=paper"]
    with tempfile.TemporaryDirectory() as folder:
        chosen = ["model=noise_residual", f"data=benchmark/{data}", *grey, *settings.split(), *quiet]
        manifest = Path(folder) / "manifest.csv"
        module = build(compose("train", overrides=chosen).data)
        samples = thinned(module.listed(), test)
        write_manifest(manifest, samples)
        metrics = train(compose("train", overrides=[*chosen, f"data.manifest='{manifest}'", f"run_dir='{folder}/run'"]))
    tested = [sample.label for sample in samples if sample.split == "test"]
    return {
        "normal": tested.count(0),
        "defective": tested.count(1),
        **{key: round(metrics[key], 4) for key in ("image_auroc", "pixel_auroc")},
    }


def section(settings: str, root: Path) -> dict:
    """AUROC of the map of the drawing, at half its size, against the pasted section; references are crops of the other drawings."""

    def half(name: str) -> torch.Tensor:
        return F.avg_pool2d(prepare(read(root / DRAWING / name), {}, Geometry()), 2)[None]

    image = half("test/test1.png")
    model = build(compose("train", overrides=["model=noise_residual", "model.channels=1", *settings.split(), "data=textures"]).model).eval()
    if model.needs_fit:
        others = [half(name) for name in ("train/train1.png", "train/train2.png", "val/val1.png", "val/val2.png")]
        height = min(x.shape[2] for x in others)
        crops = torch.cat([part for x in others for part in x[:, :, :height].split(256, 3) if part.shape[3] == 256])
        state = model.new_state(len(crops))
        state.update(model.collect(model.features(crops)))
        model.fit(state)
    with torch.inference_mode():
        map = model(image).map[0]
    truth = torch.zeros_like(map)
    begin, end = (round(share * map.shape[1]) for share in PASTED)
    truth[:, begin:end] = 1
    return {"normal": 0, "defective": 1, "image_auroc": None, "pixel_auroc": round(float(roc_auc_score(truth.ravel(), map.ravel())), 4)}


def table(rows: list[dict]) -> str:
    found = {(row["data"], row["form"]): row for row in rows}
    lines = ["| data, normal + defective images | " + " | ".join(reversed(FORMS)) + " |", "|---|" + "--:|" * len(FORMS)]
    for data in (*SETS, DRAWING):
        cells = []
        for form in reversed(FORMS):
            row = found[data, form]
            cells.append(" / ".join(f"{row[key]:.3f}" for key in ("image_auroc", "pixel_auroc") if row[key] is not None))
        row = found[data, next(iter(FORMS))]
        title = f"{data}, {row['normal']} + {row['defective']}" if data in SETS else f"{data}, map against the pasted section"
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    root = Path(os.environ["BLEMISH_DATA"])
    rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else []
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        for form, (settings, test) in FORMS.items():
            for data in (DRAWING, *SETS):
                if any((row["data"], row["form"]) == (data, form) for row in rows):
                    continue
                found = section(settings, root) if data == DRAWING else measure(SETS[data], settings, test)
                rows.append({"data": data, "form": form, "settings": settings, **found})
                keep(rows, RESULTS)
                print(rows[-1], flush=True)
    put(DOC, "forms", table(rows))


if __name__ == "__main__":
    main()

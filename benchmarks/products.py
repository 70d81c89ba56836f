"""One detector for six products against one for each: python benchmarks/products.py [--methods padim patchcore subspace]

Trains one run of screws, magnetic tiles, cookies and three series of castings, and a run of each of them with the same settings, and leaves
each product out of the detector in turn, to see how many of its images are found to show none of the others. Writes results/products.json,
and from it the table of docs/products.md; `--root` is the folder with mvtec, mtd, cookie and gdxray, `--runs` that of the runs.
"""

import argparse
from pathlib import Path

import torch

from blemish.files import read_json, write_json
from blemish.products import Products, global_features
from blemish.report.formats import between
from blemish.run.checkpoint import load
from blemish.run.config import composed
from blemish.run.train import described, train

ROOT = Path(__file__).parents[1]
FILE, DOC = ROOT / "results" / "products.json", ROOT / "docs" / "products.md"
OF = {
    "C0002": "data=gdxray data.root={root}/gdxray data.category=C0002",
    "C0045": "data=gdxray data.root={root}/gdxray data.category=C0045",
    "C0047": "data=gdxray data.root={root}/gdxray data.category=C0047",
    "cookie": "data=mvtec data.root={root} data.category=cookie",
    "screw": "data=mvtec data.root={root}/mvtec data.category=screw",
    "tile": "data=mtd data.root={root}/mtd",
}
COMMON = ["logger=none", "image_size=128", "save.pictures=0", "overwrite=true", "store=on", "trainer.enable_progress_bar=false"]
METHODS = {
    "padim": ["model=padim", "recipe=padim"],
    "patchcore": ["model=patchcore", "recipe=patchcore", "model.coreset=greedy", "model.coreset_ratio=2000"],
    "subspace": ["model=subspace", "recipe=subspace", "model.rotations=0"],
}


@torch.inference_mode()
def left_out(run: Path) -> dict[str, dict]:
    """Shares of a product's test images that are found to show an unknown one, where it is one of those of the run and where it is not."""
    cfg, model = load(run, "cpu")
    assert isinstance(model, Products)
    cfg.data.manifest = str(run / "manifest.csv")
    data = described(cfg)
    data.setup()
    found = {}
    for name in list(model.names):
        own = data.of(name)
        normal = torch.tensor([sample.label == 0 for sample in sorted(own.samples_of("test"), key=lambda sample: sample.key)])
        rows = global_features(model, [batch._replace(maps=model.features(batch.image)) for batch in own.test_dataloader()])
        _, known = model.recognise(rows)
        place, part, gallery = model.names.index(name), model.part(name), model.galleries[model.names.index(name)]
        model.remove(name)
        _, unknown = model.recognise(rows)
        model.add(name, part, gallery)
        assert model.names.index(name) == place
        entry = {"images": len(rows), "known": float((known[normal] <= cfg.alpha).double().mean())}
        found[name] = entry | {"left_out": float((unknown <= cfg.alpha).double().mean())}
    return found


def measured(method: str, root: str, runs: Path) -> dict:
    names = {name: text.format(root=root) for name, text in OF.items()}
    run = runs / method / "unified"
    of = "{" + ", ".join(f"{name}: '{text}'" for name, text in names.items()) + "}"
    train(composed(*METHODS[method], *COMMON, "data=products", f"data.of={of}", f"run_dir='{run}'"))
    unified, thresholds = read_json(run / "metrics.json"), read_json(run / "record.json")["calibration"]["products"]
    unknown, result = left_out(run), {}
    for name, text in names.items():
        own = runs / method / name
        train(composed(*METHODS[method], *COMMON, *text.split(), f"run_dir='{own}'"))
        alone, together = read_json(own / "metrics.json"), unified["products"][name]
        result[name] = {"bound": thresholds[name]["alpha"], "normal": together["images_normal"], **unknown[name]}
        for key in ("image_auroc", "image_false_alarm_rate", "image_recall"):
            result[name] |= {key: together[key], f"{key}_alone": alone[key]}
        result[name] |= {"recognised": together["recognised"]}
        print(method, name, result[name], flush=True)
    return result


def table(results: dict) -> str:
    lines = ["| method | product | image AUROC, difference | false alarms (bound) | recognised | unknown: as known | when left out |"]
    lines.append("|" + " --- |" * 7)
    for method, products in sorted(results.items()):
        for name, one in products.items():
            alarms = f"{round(one['image_false_alarm_rate'] * one['normal'])} of {one['normal']} ({100 * one['bound']:.3g} %)"
            cells = f"{one['image_auroc']:.3f}, {one['image_auroc'] - one['image_auroc_alone']:+.4f} | {alarms} | {one['recognised']:.3f}"
            lines.append(f"| {method} | {name} | {cells} | {one['known']:.3f} of normal | {one['left_out']:.3f} of {one['images']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--root", default="data")
    parser.add_argument("--runs", type=Path, default=Path("results/runs/products"))
    options = parser.parse_args()
    for method in options.methods:
        found = measured(method, options.root, options.runs)
        write_json(FILE, (read_json(FILE) or {}) | {method: found})  # with those of other methods
    between(DOC, "products", table(read_json(FILE)) + "\n")


if __name__ == "__main__":
    main()

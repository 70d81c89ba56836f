"""What the store saves: `python benchmarks/store.py --root DATA/mvtec --category screw [--model padim --second spade]`.

Fits and tests of a method without the store, with an empty one that it fills, and with a filled one; then a second method, without and
with what the first has left. All in one process, one after the other, so that the ratios hold where the seconds do not; on a busy machine
look at the CPU seconds. The figures beside the times may differ by what float16 rounding does.
"""

import argparse
import tempfile
import time
from pathlib import Path

from hydra import compose, initialize_config_dir

from blemish.run.record import read_record
from blemish.run.train import expected_warnings, train

CONFIGS = Path(__file__).parents[1] / "configs"
METRICS = ("image_auroc", "pixel_auroc", "aupro")
RATIOS = [
    ("store, empty", "without a store"),
    ("store, filled", "without a store"),
    ("second method, filled", "second method, without"),
]


def run(folder: Path, overrides: list[str]) -> tuple[dict, dict]:
    """Metrics and record of a run with these overrides."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", overrides=[*overrides, f"run_dir='{folder}'"])
    with expected_warnings():
        return train(cfg), read_record(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="a data set in the layout of MVTec AD")
    parser.add_argument("--category", default="screw")
    parser.add_argument("--model", default="padim")
    parser.add_argument("--second", nargs="*", default=["padim", "model.stages=[2,3]"], help="the second method and its overrides")
    parser.add_argument("overrides", nargs="*", default=[], help="overrides of all runs, after --")
    args = parser.parse_args()

    common = ["data=mvtec", f"data.root='{args.root}'", f"data.category={args.category}", "recipe=bundled", "trainer=cpu", "logger=none"]
    common += ["trainer.enable_progress_bar=false", "save.curves=false", "save.checkpoint=false", "save.pictures=0", *args.overrides]
    first, second = [f"model={args.model}"], [f"model={args.second[0]}", *args.second[1:]]
    with tempfile.TemporaryDirectory() as scratch:
        store = ["store=on", f"store.root='{scratch}/store'"]
        cases = {
            "without a store": first,
            "store, empty": [*first, *store],
            "store, filled": [*first, *store],
            "second method, without": second,
            "second method, filled": [*second, *store],
        }
        for path in (args.root / args.category).rglob("*.png"):
            path.read_bytes()  # all cases then find the files in memory
        print(
            f"{'':26}{'CPU s':>8}{'fit s':>8}{'test s':>8}{'decode':>8}{'network':>8}{'computed':>10}"
            + "".join(f"{n:>13}" for n in METRICS)
        )
        cpu, seconds = {}, {}
        for number, (name, overrides) in enumerate(cases.items()):
            begun = time.process_time()
            metrics, record = run(Path(scratch, str(number)), [*common, *overrides])
            cpu[name], seconds[name] = time.process_time() - begun, metrics["fit_seconds"]
            computed = record["store"]["computed"] if record["store"] else sum(record["counts"].values())
            times = "".join(f"{s:8.2f}" for s in (cpu[name], seconds[name], metrics["test_seconds"], *list(record["seconds"].values())[:2]))
            print(f"{name:26}{times}{computed:>10}" + "".join(f"{metrics[n]:13.5f}" for n in METRICS), flush=True)
            if record["store"]:
                size = record["store"]["bytes"] / 1e6
        print(f"store {size:.0f} MB in use by the last run")
        for case, base in RATIOS:
            print(f"{case} / {base}: fit {seconds[case] / seconds[base]:.2f}, CPU of the whole run {cpu[case] / cpu[base]:.2f}")


if __name__ == "__main__":
    main()

"""The tables of docs/calibration.md and the figure of docs/decisions.md from results/conformal.json: python benchmarks/conformal_page.py"""

import json
from pathlib import Path

import matplotlib as mpl
import numpy as np
from scipy.stats import beta

from blemish.edge.calibration import rank
from blemish.report.formats import between

ROOT = Path(__file__).parents[1]
FILE, DOC, FIGURE = ROOT / "results" / "conformal.json", ROOT / "docs" / "calibration.md", ROOT / "docs" / "decisions.svg"
ALPHA, HELD_OUT = 0.05, 19
CALIBRATION = 100  # images held out for the folders that are resampled from the scores of one detector
SHOWN = 80  # images of the figure, which has the quantiles of the false alarms over the draws


def write_page() -> None:
    """Replace the tables of the page and its figure."""
    results = json.loads(FILE.read_text())
    for name, table in tables(results).items():
        between(DOC, name, table + "\n")
    figure(results)


def tables(results: dict) -> dict[str, str]:
    """The tables of the page, by the name of their marks."""
    results = sorted(results.items())
    lines = ["| method, images | n | way | bound | false alarms | deviation | defects found | deviation |", "|" + " --- |" * 8]
    compared = ["| method, images | n | false alarms | defects found |", "|" + " --- |" * 4]
    for key, result in results:
        for n, ways in result["draws"].items():
            for way, one in ways.items():
                alarms, found = one["false_alarms"], one["found"]
                cells = f"{100 * one['bound']:.3g} % | {alarms['mean']:.3f} ± {alarms['half']:.3f} | {alarms['deviation']:.3f}"
                cells += f" | {found['mean']:.3f} ± {found['half']:.3f} | {found['deviation']:.3f}"
                lines.append(f"| {key} | {n} | {f'`{way}`' if way in ('full', 'split') else way} | {cells} |")
                if "ratios" in one:
                    cells = " | ".join("{:.2f} ({:.2f} to {:.2f})".format(*one["ratios"][name]) for name in ("false_alarms", "found"))
                    compared.append(f"| {key} | {n} | {cells} |")
    few = [
        "| p-values | defects | bound too small somewhere | false of the alarms at 5 % | their bound | FDR at `fdr=0.1` |",
        "|" + " --- |" * 6,
    ]
    for key, result in results:
        few += [folder_line(f"{key}, {CALIBRATION} held out", one) for one in result.get("mixtures", [])]
        for n, ways in result["draws"].items():
            if key.endswith("magnetic tiles"):
                few += [
                    folder_line(f"{key}, `{way}` of {n}", one) for way in ("split", "full") for one in ways.get(way, {}).get("folders", [])
                ]
    rows = ["| method | way | false alarms | bound too small somewhere |", "|" + " --- |" * 4]
    for key, result in results:
        for way, one in result.get("sequence", {}).items():
            alarms, folder = one["false_alarms"], one["folders"]
            cells = f"{alarms['mean']:.3f} ± {alarms['half']:.3f} | {folder['violations']:.3f} ± {folder['half']:.3f}"
            rows.append(f"| {key} | {way} | {cells} |")
    return {"draws": "\n".join(lines), "ratios": "\n".join(compared), "folders": "\n".join(few), "sequence": "\n".join(rows)}


def folder_line(name: str, one: dict) -> str:
    cells = f"{one['violations']:.3f} ± {one['half']:.3f} | {one['false_alarms']:.1f} | {one['bound']:.1f} | {one['fdr']:.3f}"
    return f"| {name} | {100 * one['share']:.0f} % | {cells} |"


def figure(results: dict) -> None:
    """Write the distribution of the false alarm rate over the draws of 80 images: its law for held-out scores, and what was measured."""
    mpl.use("Agg")
    mpl.rcParams |= {"svg.hashsalt": "blemish", "svg.fonttype": "none", "font.size": 9}
    from matplotlib import pyplot

    found = results.get("padim, magnetic tiles", {}).get("draws", {})
    found = found.get(str(SHOWN), {})
    fig, ax = pyplot.subplots(figsize=(6, 2.6), layout="constrained")
    x = np.linspace(0, 0.2, 200)
    for way, n, color in (("split", HELD_OUT, "tab:orange"), ("full", SHOWN, "tab:blue")):
        k = rank(n, ALPHA)
        ax.plot(x, beta.cdf(x, n + 1 - k, k), color=color, label=f"calibrate={way}: {n} of {SHOWN} images calibrate")
        if way in found:
            ax.plot(found[way]["quantiles"], np.linspace(0, 1, 101), drawstyle="steps-post", color=color, lw=0.8, ls=":", label="measured")
    ax.axvline(ALPHA, color="black", lw=0.8, label="α")
    ax.set(xlabel="share of other normal images that are called anomalous", ylabel="share of draws", xlim=(0, 0.2), ylim=(0, 1))
    ax.legend(frameon=False, loc="lower right")
    fig.savefig(FIGURE, metadata={"Date": None})


if __name__ == "__main__":
    write_page()

"""The curves of a run on one page, and lines thinned for its report."""

import heapq
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy import ndarray

from blemish.draw import number
from blemish.metrics.ranking import FPR_LIMIT
from blemish.types import ANOMALOUS, NORMAL, UNKNOWN

Lines = Mapping[str, ndarray]

BLUE, RED = "#0072b2", "#c04a00"  # images or normal, pixels or anomalous: different in hue and in lightness
STYLE = {"image": {"color": BLUE, "linestyle": "-"}, "pixel": {"color": RED, "linestyle": (0, (4, 1.5))}}
# curve: title, x axis, its end, y axis, figure in the legend, place of the legend
PANELS = {
    "roc": ("ROC", "false positive rate", 1.0, "true positive rate", "auroc", "lower right"),
    "pr": ("Precision and recall", "recall", 1.0, "precision", "ap", "best"),
    "pro": ("Per-region overlap", "false positive rate of pixels", FPR_LIMIT, "mean share of a region found", "aupro", "lower right"),
}


def draw_curves(
    image: Lines, pixel: Lines, figures: Mapping[str, float | None], score: ndarray, label: ndarray, threshold: float | None
) -> Figure:
    """ROC, precision-recall and PRO curves, those without points left out, and the histogram of the image scores (N,) on one page.

    image, pixel: {"roc": (K, 2), "pr": (K, 2)} and, for pixels, "pro". figures: the values for the legends, as in metrics.json.
    """
    names = [name for name in PANELS if name != "pro" or len(pixel["pro"])]
    rows, columns = (2, 2) if "pro" in names else (1, 3)
    figure = Figure(figsize=(4.6 * columns, 4.3 * rows), dpi=120, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    *curved, last = figure.subplots(rows, columns).flat
    for axes, name in zip(curved, names, strict=True):
        _curve(axes, name, {"image": image, "pixel": pixel} if name != "pro" else {"pixel": pixel}, figures)
    _histogram(last, score, label, threshold)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _curve(axes: Axes, name: str, lines: Mapping[str, Lines], figures: Mapping[str, float | None]) -> None:
    title, x, right, y, figure, where = PANELS[name]
    axes.set(title=title, xlabel=x, ylabel=y, xlim=(-0.02 * right, 1.02 * right), ylim=(-0.02, 1.02))
    axes.set_box_aspect(1)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    if name == "roc":
        axes.plot([0, 1], [0, 1], color="0.75", linewidth=1)
    for kind, of in lines.items():
        value = figures.get(figure if name == "pro" else f"{kind}_{figure}")
        value = f"{figure.upper()} {'–' if value is None else f'{value:.4f}'}"
        if len(of[name]):
            axes.plot(*of[name].T, label=None if name == "pro" else f"{kind}s: {value}", **STYLE[kind])
        if name == "pro":
            axes.fill_between(*of[name].T, color=RED, alpha=0.15, linewidth=0, label=f"{value} (to {FPR_LIMIT})")
    _legend_of(axes, where)


def _legend_of(axes: Axes, where: str) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc=where, frameon=True, framealpha=0.9, edgecolor="0.85", fontsize=9)
    else:
        axes.text(0.5, 0.5, "needs normal and anomalous", color="0.4", ha="center", va="center", transform=axes.transAxes)


def _histogram(axes: Axes, score: ndarray, label: ndarray, threshold: float | None) -> None:
    edges = bins(score)
    if edges[0] > 0 and edges[-1] / edges[0] > 50:
        axes.set_xscale("log")
    looks = {
        NORMAL: ("normal", {"color": BLUE, "alpha": 0.55}),
        ANOMALOUS: ("anomalous", {"edgecolor": RED, "facecolor": "none", "hatch": "////", "histtype": "step", "linewidth": 1.6}),
        UNKNOWN: ("unknown", {"color": "0.35", "histtype": "step", "linestyle": ":", "linewidth": 1.4}),
    }
    for kind, (name, look) in looks.items():
        own = score[label == kind]
        if len(own):
            axes.hist(own, edges, weights=np.full(len(own), 1 / len(own)), label=f"{name} ({len(own)})", **look)
    if threshold is not None:
        axes.axvline(threshold, color="black", linewidth=1.4, linestyle="--", label=f"threshold {number(threshold)}")
    axes.set(title="Image scores", xlabel="score", ylabel="share of the images of a kind")
    axes.set_box_aspect(1)
    axes.margins(y=0.25)  # room for the legend
    _legend_of(axes, "upper right")


def bins(score: ndarray) -> ndarray:
    """Edges of 40 bins over all scores (N,), of equal ratio where they are positive and a few large ones would crowd the others."""
    low, high = score.min(), score.max()
    if low > 0 and high > 20 * np.median(score):
        return np.geomspace(low, high, 41)
    edges = np.linspace(low, high, 41)
    if (np.diff(edges) > 0).all():
        return edges
    room = max(0.5, 1e-6 * max(abs(low), abs(high)))  # a single bin where the numbers do not resolve forty
    return np.array([low - room, high + room])


def simplified(line: ndarray, most: int, tolerance: float = 0.0005) -> ndarray:
    """The vertices (K, 2) of a line thinned to `most`, its ends among them, so that the others are as near to it as can be.

    The vertex farthest from the line so far is added until all are within `tolerance` of the line's extent (Douglas and Peucker, 1973;
    scikit-image's approximate_polygon has no limit on the number of vertices).
    """
    if len(line) <= 2:
        return line
    extent = np.ptp(line, axis=0)
    unit, kept, gaps = line / np.where(extent > 0, extent, 1), {0, len(line) - 1}, []

    def push(first: int, last: int) -> None:
        if last - first > 1:
            offset, chord = unit[first + 1 : last] - unit[first], unit[last] - unit[first]
            along = (offset @ chord / max(chord @ chord, 1e-30)).clip(0, 1)
            distance = np.hypot(*(offset - along[:, None] * chord).T)
            heapq.heappush(gaps, (-distance.max(), first, first + 1 + int(distance.argmax()), last))

    push(0, len(line) - 1)
    while gaps and len(kept) < most and -gaps[0][0] > tolerance:
        _, first, vertex, last = heapq.heappop(gaps)
        kept.add(vertex)
        push(first, vertex)
        push(vertex, last)
    return line[sorted(kept)]

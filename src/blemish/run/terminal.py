"""What a run prints when it has been tested."""

from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.table import Table

from blemish.edge.calibration import CONFIDENCE, CROSS, RARE, chance_of_alarms
from blemish.run.record import METRICS, read_record


def summary(metrics: Mapping) -> Table:
    """Return the content of metrics.json as a table: a row per defect type, or per product of several, and one for all."""
    table = Table(title="test metrics", caption="f1_max: at the threshold that is best in hindsight", caption_justify="right")
    table.add_column("product" if "products" in metrics else "defect")
    for name in ("images", *METRICS):
        table.add_column(name.replace("_", "\n", 1), justify="right")
    rows = {**metrics.get("products", metrics["defects"]), "all": metrics}
    for name, row in rows.items():
        cells = ["–" if row[column] is None else f"{row[column]:.4f}" for column in METRICS]
        table.add_row(name, str(row["images"]), *cells, style="bold" if name == "all" else "")
    return table


def decisions(metrics: Mapping, calibration: Mapping) -> list[str]:
    """Return lines on the defects found and the false alarms beside their bound, with a warning where these are too many by chance.

    calibration: of the run's record, see `Evaluate.calibration_metadata`.
    """
    if found := metrics.get("products"):
        pairs = [(name, [*decisions(own, calibration["products"][name]), recognition(own)]) for name, own in found.items()]
        return [f"{name}: {line}" for name, lines in pairs for line in lines]
    if calibration.get("value") is None:
        return ["no decisions: there is no threshold without held-out normal images; protocol=clean holds some out"]
    defective, normal = metrics["images_anomalous"], metrics["images_normal"]
    alpha, requested, n = (calibration[name] for name in ("alpha", "requested", "n"))
    bound = f"about {100 * alpha:.3g} %, not proven" if calibration.get("promise") == CROSS else f"bound {100 * alpha:.3g} %"
    if at_most := calibration.get("conditional"):
        bound += f"; {100 * at_most:.3g} % with {100 * CONFIDENCE:.3g} % confidence"
    bound += "" if calibration["reachable"] else f", {n} image{'s' * (n != 1)} cannot promise {100 * requested:.3g} %"
    parts, warnings = [], []
    if defective:
        parts.append(f"found {round(metrics['image_recall'] * defective)} of {defective} defective")
    if normal:
        alarms = round(metrics["image_false_alarm_rate"] * normal)
        parts.append(f"false alarms {alarms} of {normal} ({bound})")
        if (chance := chance_of_alarms(alarms, normal, requested, n)) < RARE:
            warnings.append(
                f"warning: so many false alarms have a probability of {chance:.1g} if the normal test images are like the {n} calibration "
                "images; they differ from the training images (light, position, product?), and the bound does not hold for them"
            )
    return [", ".join(parts), *warnings] if parts else []


def recognition(metrics: Mapping) -> str:
    """Return a line on the images of a product that are found to show it, or none of the products."""
    count, normal = metrics["images"], metrics["images_normal"]
    unknown = "" if metrics["unknown_rate"] is None else f", unknown product {round(metrics['unknown_rate'] * normal)} of {normal} normal"
    return f"recognised {round(metrics['recognised'] * count)} of {count}{unknown}"


@rank_zero_only
def report(metrics: dict, folder: str) -> None:
    """Print the table of metrics, the decisions, and the run folder."""
    console = Console(soft_wrap=True, highlight=False)
    console.print(summary(metrics))
    calibration = (read_record(Path(folder)) or {}).get("calibration") or {}
    for line in [*decisions(metrics, calibration), f"run folder: {folder}"]:
        console.print(line, markup=False)

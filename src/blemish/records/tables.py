"""Tables made from what runs recorded."""

from collections.abc import Mapping

from rich.table import Table

COLUMNS = ("image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "pixel_ap", "aupro")


def summary(metrics: Mapping) -> Table:
    """metrics.json for the terminal: a row per defect type and one for all; image_f1_max is at the best threshold in hindsight."""
    table = Table(title="test metrics", caption="f1_max: at the threshold that is best in hindsight", caption_justify="right")
    table.add_column("defect")
    table.add_column("images", justify="right")
    for name in COLUMNS:
        table.add_column(name.replace("_", "\n", 1), justify="right")
    rows = {**{name: row for name, row in metrics["defects"].items() if name != "good"}, "all": metrics}
    for name, row in rows.items():
        cells = ["–" if row[column] is None else f"{row[column]:.4f}" for column in COLUMNS]
        table.add_row(name, str(row["images"]), *cells, style="bold" if name == "all" else "")
    return table

"""Score images with a finished run, or with a method that needs no fit, and write pictures and tables."""

import contextlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from blemish import draw
from blemish.data.module import DTYPE, plain_window
from blemish.data.ranges import ValueCheck, fit_window
from blemish.data.roi import Roi
from blemish.data.tiles import bands, largest_blocks, mean_blocks, reduction
from blemish.detector import Detector
from blemish.edge.boxes import boxes_of
from blemish.edge.calibration import CONFIDENCE, CROSS, SPLIT
from blemish.edge.checks import LARGEST_SEED, check_choice, check_number, check_whole, nearest
from blemish.edge.errors import InputError
from blemish.edge.geometry import Geometry
from blemish.edge.monitor import NOT_CLAIMED, Monitor, unusual
from blemish.edge.reading import read
from blemish.edge.selection import adjusted, false_alarm_bounds
from blemish.files import Outputs, atomic_write, locked, picture_info, remove_stale, write_csv, write_json, write_json_lines
from blemish.noise import false_alarms
from blemish.run.checkpoint import device_of, load, newest_run, saved_scale
from blemish.run.config import build, module_of, renaming
from blemish.run.results import (
    RECOGNISED,
    ImageResult,
    Preprocessing,
    Rule,
    fit_to_folder,
    images_at,
    output_names,
    preprocessing_of,
    recognised,
)
from blemish.run.results import predict as predict_images

log = logging.getLogger(__name__)

ELSEWHERE = "choose another folder with output=FOLDER"
LARGEST = 4096  # pixels of the longer side of an overlay; that of a larger image is reduced
TABLES = ("scores.csv", "failed.csv", "results.jsonl")
PICTURES = ("overlay", "mask", "map")
LISTS = ("detections.csv", "detections.json")  # endings of the files of an image beside its pictures
COLUMNS = ("path", "score", "threshold", "decision", "p_value", "map_min", "map_max", "threshold_from")
BY_HAND = "set by hand: no bound on false alarms"
BOUND = "bound"  # column of a monitored prediction: whether the bound on false alarms is claimed


class Written(NamedTuple):
    """What was found in the map of an image, and the files written of it."""

    ends: tuple[float | None, float | None] = (None, None)  # smallest and largest value
    boxes: list[tuple[int, int, int, int]] | None = None  # (x, y, w, h) above the level in pixels of the image; None without a level
    files: Sequence[Path] = ()


class Predicted(NamedTuple):
    """The outcome of a prediction."""

    rows: list[tuple]  # of scores.csv
    failed: list[tuple[Path, str]]  # of failed.csv
    summary: list[str]  # lines to print
    output: Path


@renaming(r"(?<![\w.])data\.(?=(roi|window)\b)", "")
def predict(cfg: DictConfig) -> Predicted:
    """Score the image or the folder `cfg.input` and write the results to `cfg.output`.

    Images that cannot be scored do not stop the others. InputError where none can.
    """
    check_settings(cfg)
    paths, output, failed = images_at(cfg.input), Path(cfg.output), []
    source = Path(cfg.input).expanduser()
    root = source if source.is_dir() else source.parent
    names, alone = output_names(paths, root), cfg.run is None
    run = None if alone else newest_run(cfg.run)
    saved, model = (cfg, single_image_model(cfg)) if alone else load(run, cfg.device)
    if alone:
        normal = images_at(model.reference_folder) if model.reference_folder else []
        preprocessing = Preprocessing(
            Geometry(), fit_window(filter(is_readable, [*paths, *normal])), roi=Roi(cfg.roi, root) if cfg.roi else None
        )
    else:
        preprocessing = preprocessing_of(saved, cfg.roi, root)
    if preprocessing.tile and not saved.get("tiling") and len(model.calibration):
        log.warning(
            "data.unit=tile: the threshold was calibrated on tiles; its bound is for each tile of %d px, not for an image",
            preprocessing.tile,
        )
    window = chosen_window(cfg)
    preprocessing = preprocessing._replace(window=preprocessing.window | window)
    if alone and model.reference_folder:
        fit_to_folder(model, preprocessing)
    values = ValueCheck(model.ranges, preprocessing.window, "window", named=window)
    chosen = dict(saved.get("by_hand") or {})
    if cfg.alpha is not None or cfg.fdr is not None:
        chosen.pop("threshold", None)
    chosen |= {key: cfg[key] for key in ("threshold", "map_threshold") if cfg[key] is not None}
    rule = Rule.of(model, cfg.alpha or saved.alpha or 0.5, chosen)  # without a run there is nothing to calibrate
    if (key := next((key for key in ("alpha", "fdr") if cfg[key] is not None), None)) and not rule.calibrated:
        raise InputError(f"{key}={cfg[key]}: the run has no calibration images, as with protocol=paper; expected threshold=NUMBER")
    if cfg.monitor in ("on", True) and rule.products:
        raise InputError("monitor=on: follows the scores of one product; expected the run of one")
    if cfg.fdr is not None:
        rule.select_by(cfg.fdr)
    scale = None if alone else saved_scale(run, saved)
    with locked(output, ELSEWHERE), Progress(console=Console(stderr=True)) as progress:
        memory = Path(cfg.monitor_file).expanduser() if cfg.monitor_file else output / "monitor.json"
        monitor = Monitor.open(memory, cfg.monitor in ("on", True), cfg.monitor_rate, rule.scores, saved.seed)
        images, reader = progress.track(paths, description="predicting"), values.loading(read, preprocessing.inside)
        results = predict_images(model, images, preprocessing, saved.get("batch_size", 1), output, reader, failed, alone)
        rows = write(results, rule, names, output, scale, failed, monitor, cfg.save)
    values.report()
    if monitor.on and rule.threshold.promise != SPLIT:
        log.warning("monitor=on: its rate is proven for held-out calibration images alone, as with calibrate=split")
    if monitor.on:
        log.log(logging.INFO if monitor.alarm is None else logging.WARNING, monitor.explain())
    elif warning := unusual(anomalous(rows), len(rows), rule.threshold):
        log.warning(warning)
    return Predicted(rows, failed, summary(rows, rule, chosen, names, output, monitor.alarm is None), output)


def check_settings(cfg: DictConfig) -> None:
    """InputError for values that cannot be used, or not together, before anything is read."""
    device_of(cfg.device)
    check_choice("", ("on", "off", True, False), monitor=cfg.monitor)  # YAML reads a bare on as true
    check_whole("", 0, LARGEST_SEED, seed=cfg.seed)
    check_pictures(cfg.save)
    given = [key for key in ("threshold", "alpha", "fdr", "map_threshold") if cfg[key] is not None]
    for key in ("monitor_rate", *given):
        check_number("", "(-inf, inf)" if "threshold" in key else "(0, 1)", **{key: cfg[key]})
    if len(ways := [f"{key}={cfg[key]}" for key in given if key != "map_threshold"]) > 1:
        raise InputError(f"{' and '.join(ways)}: expected one of them, each decides by itself")
    if given and cfg.run is None:
        raise InputError(f"{given[0]}={cfg[given[0]]}: only with a run; expected run=FOLDER, or model.epsilon=NUMBER for noise_residual")


def check_pictures(save: Sequence[str]) -> None:
    """InputError for anything but a list of PICTURES."""
    names = [save] if isinstance(save, str) or not isinstance(save, Sequence) else save
    wrong = next((name for name in names if name not in PICTURES), None)
    if wrong is not None or names is not save:
        choose = f"expected a list of {', '.join(PICTURES)}, or save=[] for no picture"
        raise InputError(f"save={save}: {nearest(str(wrong), PICTURES) if wrong else ''}{choose}")


def single_image_model(cfg: DictConfig) -> Detector:
    """Return the method that scores each image by itself; InputError for one that needs a fit."""
    if "model" not in cfg:
        raise InputError("run: none given; expected run=<folder of a finished run>, or model=noise_residual, which needs none")
    model = build(cfg.model)
    if model.fits_training_images:
        raise InputError(f"model={module_of(cfg.model)}: has to be fitted first; expected run=<folder of its run>, or model=noise_residual")
    return model.eval().to(device_of(cfg.device))


def chosen_window(cfg: DictConfig) -> dict[str, tuple[float, float]]:
    """Return (lo, hi) by dtype as `window` sets it; InputError for anything else."""
    window = {} if cfg.window is None else plain_window(OmegaConf.to_container(cfg)["window"])
    if window == "auto":
        raise InputError("window=auto: the default; expected [lo, hi], {uint16: [lo, hi]} or dtype")
    return DTYPE if window == "dtype" else window


def is_readable(path: Path) -> bool:
    with contextlib.suppress(InputError):
        return read(path) is not None
    return False


def write(
    results: Iterable[ImageResult],
    rule: Rule,
    names: Mapping[Path, Path],
    output: Path,
    scale: draw.Scale | None,
    failed: Sequence[tuple[Path, str]] = (),
    monitor: Monitor | None = None,
    save: Sequence[str] = PICTURES,
) -> list[tuple]:
    """Write the PICTURES to `save` of each image, then scores.csv, results.jsonl and failed.csv; returns the rows of COLUMNS.

    `scale` is that of the run, see `draw.Scale`, None for overlays without colours. After an interruption the tables are written, but a
    monitor is not saved. InputError, before any image is scored, where an output would replace a file that blemish did not write there, and
    at the end where no image could be scored.
    """
    outputs, rows, lines = Outputs(), [], []
    tables, kinds = [output / name for name in TABLES], (*(f"{name}.png" for name in save), *LISTS)
    outputs.check(tables + [output_path(output / name, kind) for name in names.values() for kind in kinds])
    remove_stale(output)

    def add(result: ImageResult) -> None:
        written = Written()
        if result.map is not None:
            written = write_files(result, rule, scale, output / names[result.path], outputs, save)
        own = rule.at(result.product)
        more = recognised(result.product, result.product_p_value, rule.alpha) if rule.products else ()
        rows.append((str(result.path), result.score, *own.columns(result.score), *written.ends, own.source, *more))
        line = {key: rows[-1][COLUMNS.index(key)] for key in ("path", "score", "p_value", "decision", "threshold")}
        files = [file.relative_to(output).as_posix() for file in written.files]
        lines.append(line | {"decision": own.decide(result.score), "boxes": written.boxes, "files": files})
        lines[-1] |= dict(zip(RECOGNISED, more, strict=False)) | ({RECOGNISED[-1]: bool(more[-1])} if more else {})

    def write_tables() -> None:
        bounds = monitor.take([row[1] for row in rows]) if monitor else []
        certify(rows, lines, rule, NOT_CLAIMED not in bounds)
        header, found = (*COLUMNS, *RECOGNISED) if rule.products else COLUMNS, rows
        if monitor and monitor.on:
            bounds = [NOT_CLAIMED if rule.threshold.by_hand else bound for bound in bounds]
            header, found = (*COLUMNS, BOUND), [(*row, bound) for row, bound in zip(rows, bounds, strict=True)]
        write_csv(tables[0], header, found, outputs)
        write_json_lines(tables[2], lines, outputs)
        if failed:
            write_csv(tables[1], ("path", "reason"), failed, outputs)
        else:
            tables[1].unlink(missing_ok=True)

    try:
        for result in results:
            add(result)
    except BaseException:
        if rows:
            with contextlib.suppress(InputError):  # the error to raise is the one that ended the work
                write_tables()
        raise
    write_tables()
    if monitor:
        monitor.save()
    if not rows:
        more = f"; and {len(failed) - 5} more" if len(failed) > 5 else ""
        raise InputError("; ".join(f"{path}: {reason}" for path, reason in failed[:5]) + more)
    return rows


def product_of(row: tuple) -> str | None:
    """Return the product that the image of a row is found to show, None for a detector of one product."""
    return row[len(COLUMNS)] if len(row) > len(COLUMNS) else None


def certify(rows: list[tuple], lines: list[dict], rule: Rule, claimed: bool) -> None:
    """Add to the lines of results.jsonl what the p-values of all images say together, and decide by it where the rule is by `fdr`.

    `adjusted` is the least `fdr` that selects the image; `false_at_most` bounds, for all images at once, the normal ones among those that
    score as high, and is None where it is not proven: without held-out images, and where the monitor has raised an alarm. Of several
    products it is for those that show the image's own.
    """
    found = [row[COLUMNS.index("p_value")] for row in rows]
    if not found or None in found:
        for line in lines:
            line |= {"adjusted": None, "false_at_most": None}
        return
    bounds = false_at_most(rows, rule, claimed)
    for line, value, bound in zip(lines, adjusted(found).tolist(), bounds, strict=True):
        line |= {"adjusted": value, "false_at_most": bound}
    if rule.fdr is not None:
        chosen, most = rule.selected(found)
        place = COLUMNS.index("threshold")
        for i, one in enumerate(chosen.tolist()):
            threshold = rule.at(product_of(rows[i])).quantile(most)  # None where no image is selected
            rows[i] = (*rows[i][:place], threshold, int(one), *rows[i][place + 2 :])
            lines[i] |= {"threshold": threshold, "decision": one}


def false_at_most(rows: Sequence[tuple], rule: Rule, claimed: bool) -> Sequence[int | None]:
    """Return the `false_alarm_bounds` of images, among those of their product, None where they are not proven."""
    bounds: list[int | None] = [None] * len(rows)
    for product in dict.fromkeys(map(product_of, rows)):
        own = rule.at(product)
        if claimed and own.scores and own.threshold.promise == SPLIT:
            places = [i for i, row in enumerate(rows) if product_of(row) == product]
            scores, p_values = ([rows[i][COLUMNS.index(name)] for i in places] for name in ("score", "p_value"))
            for i, bound in zip(places, false_alarm_bounds(scores, p_values, len(own.scores)).tolist(), strict=True):
                bounds[i] = bound
    return bounds


def write_files(
    result: ImageResult, rule: Rule, scale: draw.Scale | None, stem: Path, outputs: Outputs, save: Sequence[str] = PICTURES
) -> Written:
    """Write the PICTURES to `save` of an image with a map, and its detections as CSV and JSON, strongest first.

    The overlay of an image with a side above LARGEST has the means of its blocks and their largest map values, and its boxes are made of
    blocks. Detections are coloured by their strength.
    """
    rule = rule.at(result.product)
    map, inside, level, files = result.map, result.inside, rule.level, []

    def place(kind: str) -> Path:
        files.append(output_path(stem, kind))
        return files[-1]

    def picture(image: Image.Image, kind: str, compress_level: int = 6) -> None:
        with atomic_write(place(f"{kind}.png"), outputs) as temporary:
            image.save(temporary, pnginfo=picture_info(), compress_level=compress_level)

    ends = [(float(band.min()), float(band.max())) for band in bands(map)]
    low, high = min(least for least, _ in ends), max(most for _, most in ends)
    if "map" in save:
        picture(Image.fromarray(sixteen_bits(map, low, high)), "map", compress_level=1)
    if "mask" in save and level is not None:
        mask = np.concatenate([(band > level).astype(np.uint8) * 255 for band in bands(map)])
        picture(Image.fromarray(mask if inside is None else mask * inside), "mask")
        del mask
    side = reduction(map.shape, LARGEST)
    shown = largest_blocks(map, side)
    shown = shown if inside is None else np.where(largest_blocks(inside, side), shown, -np.inf)
    if "overlay" in save:
        own = rule.scale(scale)
        if result.detections is None:
            overlay = draw.overlay(mean_blocks(result.image, side), shown, own, level)
        else:
            image = torch.from_numpy(result.image.copy()).permute(2, 0, 1) / 255  # (3, H, W)
            coloured = false_alarms.overlay(image, -torch.from_numpy(map)).permute(1, 2, 0)
            overlay = Image.fromarray((coloured * 255).round().byte().numpy())
        draw.stamp(overlay, result.score, rule.decide(result.score), shown > (own[1] if own else np.inf))
        picture(overlay, "overlay")
    if result.detections is not None:
        rows = [one._asdict() | {"strength": false_alarms.strength(one.log10_nfa)} for one in result.detections]
        header = (*false_alarms.Detection._fields, "strength")
        write_csv(place(LISTS[0]), header, [row.values() for row in rows], outputs)
        write_json(place(LISTS[1]), rows, outputs)
    return Written((low, high), None if level is None else boxes_in_image(shown, level, side, map.shape), files)


def boxes_in_image(shown: np.ndarray, level: float, side: int, shape: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """Return the boxes of a map of blocks of side × side pixels, in pixels of its image (height, width)."""
    height, width = shape
    found = ((x * side, y * side, w * side, h * side) for x, y, w, h in boxes_of(shown, level))
    return [(x, y, min(w, width - x), min(h, height - y)) for x, y, w, h in found]


def sixteen_bits(map: np.ndarray, low: float, high: float) -> np.ndarray:
    """Scale a map (H, W) to uint16."""
    deep = np.empty(map.shape, np.uint16)
    for part, band in zip(bands(deep), bands(map), strict=True):
        part[:] = ((band - low) / np.float32(max(high - low, 1e-30)) * 65535).round()
    return deep


def output_path(stem: Path, kind: str) -> Path:
    return stem.with_name(f"{stem.name}_{kind}")


def anomalous(rows: Sequence[tuple]) -> int:
    """Return the number of rows with a decision for anomalous."""
    return sum(bool(row[COLUMNS.index("decision")]) for row in rows)


def summary(
    rows: Sequence[tuple], rule: Rule, chosen: Mapping[str, float], names: Mapping[Path, Path], output: Path, claimed: bool
) -> list[str]:
    """Return lines to print on the decisions and on where the results are; `claimed`: no drift has been found."""
    lines = []
    groups = {product_of(row) for row in rows} if rule.fdr is None else {None}  # `fdr` is that of all products together
    for product in sorted(groups, key=str):
        own = [row for row in rows if product in (None, product_of(row))]
        lines += [f"{product}: {line}" if product else line for line in decisions(own, rule.at(product), chosen, claimed)]
    if rule.products:
        count = sum(row[-1] for row in rows)
        lines.append(f"unknown product: {count} of {len(rows)} (of images of a known one {100 * rule.alpha:.3g} % are expected at most)")
    highest = output_path(output / names[Path(max(rows, key=lambda row: row[1])[0])], "overlay.png")
    lines += [f"highest score: {highest}"] if highest.is_file() and not rule.products else []
    return [*lines, f"{len(rows)} images scored: {output / TABLES[0]}"]


def decisions(rows: Sequence[tuple], rule: Rule, chosen: Mapping[str, float], claimed: bool) -> list[str]:
    """Return lines on the decisions on images of one product."""
    threshold, found = rule.threshold, anomalous(rows)
    if rule.fdr is not None:
        proven = "" if threshold.promise == SPLIT else ", which is not proven without held-out images"
        lines = [f"{found} of {len(rows)} anomalous (of these at most {100 * rule.fdr:.3g} % false alarms on average{proven})"]
    elif threshold.value is None:
        lines = ["no decision: the run has no calibration images, as with protocol=paper; set threshold=NUMBER"]
    else:
        least = "about" if threshold.promise == CROSS else "bound on false alarms"
        bound = f"{least} {100 * threshold.alpha:.3g} %" if rule.source == "calibration" else rule.bound_kind or BY_HAND
        lines = [f"{found} of {len(rows)} anomalous (threshold {threshold.value:.6g}, {bound})"]
    if "map_threshold" in chosen:
        maps = any(row[COLUMNS.index("map_max")] is not None for row in rows)
        lines.append(f"masks: map above {rule.level:.6g}, set by hand" if maps else f"map_threshold={rule.level:.6g}: there is no map")
    if threshold.value is not None and not threshold.reachable:
        lines.append(threshold.explain())
    bounds = false_at_most(rows, rule, claimed)
    if found and bounds[0] is not None and len({product_of(row) for row in rows}) == 1:
        bound = max(bound for bound, row in zip(bounds, rows, strict=True) if row[COLUMNS.index("decision")])
        lines.append(f"of these {found} at most {bound} are normal images, with {100 * CONFIDENCE:.3g} % confidence")
    return lines

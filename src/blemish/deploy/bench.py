"""How long a run takes from file to decision: every stage of it, by torch and by the engines that exports are for."""

import contextlib
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.table import Table
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from blemish.data.images import prepare, to_image
from blemish.deploy.export import ExportModule, chosen, example, geometry_metadata, loaded, splits, to_onnx, traced
from blemish.detector import Detector
from blemish.edge import geometry as edge
from blemish.edge import runtime
from blemish.edge.checks import check_choice, check_number, check_size, check_switch, check_whole
from blemish.edge.errors import InputError
from blemish.edge.reading import read
from blemish.files import Outputs, write_json
from blemish.report.tables import between
from blemish.run.record import environment, read_record
from blemish.run.results import Preprocessing, preprocessing_of

log = logging.getLogger(__name__)

COLUMNS = ("engine", "batch", "stage", "median", "p95", "p99", "calls")


class Row(NamedTuple):
    """Milliseconds that a stage takes for `batch` images."""

    engine: str
    batch: int
    stage: str
    median: float
    p95: float
    p99: float
    calls: int


class Engine(NamedTuple):
    """One way to compute a method. What there is to be waited for is done when a call returns."""

    resize: Callable[[np.ndarray], Any]  # a decoded image to what `stack` takes
    stack: Callable[[list], Any]  # several of them to a batch
    backbone: Callable[[Any], Any] | None  # batch to maps; None for a method that has none
    score: Callable[[Any], Sequence] | None  # maps to (score, map) or (score,)
    whole: Callable[[Any], Sequence]  # batch to (score, map) or (score,)
    enlarge: Callable[[Any, int, int], Any]  # a map (h, w) to the pixels of its image
    batch: int | None  # the batch size, None for any


class Plan(NamedTuple):
    """How calls are repeated, see configs/bench.yaml."""

    warmup: int
    repeats: int
    seconds: float


class Backbone(nn.Module):
    """A graph's first part: images to the maps of its method's backbone."""

    def __init__(self, graph: ExportModule):
        super().__init__()
        self.complete = graph  # torch.fx has a `graph` of its own

    @property
    def model(self) -> Detector:  # registered once, with the graph: torch.export keeps one name of a parameter
        return self.complete.model

    def forward(self, image: Tensor) -> list[Tensor]:
        return list(self.model.features(self.complete.unit(image)))


class Score(nn.Module):
    """A graph's second part: those maps to (score, map) or (score,)."""

    def __init__(self, graph: ExportModule):
        super().__init__()
        self.model, self.size, self.maps = graph.model, graph.size, graph.maps

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, ...]:
        score, map = self.model.score(maps, self.size)
        return (score, map) if self.maps and map is not None else (score,)


def bench_run(cfg: Any, load: Callable, build: Callable) -> list[Row]:
    """Measure a run folder as configs/bench.yaml says, and write what was found; `load` and `build` as for `export_run`."""
    run = Path(cfg.run)
    if isinstance(cfg.engines, str):
        raise InputError(f"engines={cfg.engines}: expected a list, engines=[{cfg.engines}]")
    if unknown := set(cfg.engines) - {"torch", "onnxruntime", "openvino"}:
        raise InputError(f"engines={list(cfg.engines)}: no {', '.join(sorted(unknown))}; expected torch, onnxruntime, openvino")
    check_whole("", 1, batch=cfg.batch, threads=cfg.threads, repeats=cfg.repeats, n=cfg.n, opset=cfg.opset)
    check_whole("", 0, warmup=cfg.warmup)
    check_number("", "(0, inf)", seconds=cfg.seconds)
    check_switch("", maps=cfg.maps)
    check_size(size=cfg.size)
    check_choice("", ("cpu", "gpu", "cuda", "auto"), device=cfg.device)
    output, outputs = Path(cfg.output) if cfg.output else run / "bench.json", Outputs()
    outputs.check([output], "output=FILE")
    saved, model = load(run, cfg.device)
    preprocessing = preprocessing_of(saved)
    if preprocessing.tile:
        raise InputError(
            f"run={run}: it scores an image by its tiles (tiling={preprocessing.tile}), here are stages of whole ones; expected another"
        )
    images = chosen(cfg.images, run, partial(build, saved.data), cfg.n)
    arrays = [loaded(*image) for image in images]
    side = preprocessing.geometry.side
    size = (side, side) if side else tuple(cfg.size or arrays[0].shape[:2])
    arrays = [array for array in arrays if preprocessing.geometry.size or array.shape[:2] == size]
    plan, batches = Plan(cfg.warmup, cfg.repeats, cfg.seconds), sorted({1, cfg.batch})
    rows, versions = [], {"torch": torch.__version__}
    with limited(cfg.threads), tempfile.TemporaryDirectory() as folder:
        rows.append(row("any", 1, "decode", timed(read, [path for path, _ in images], plan)))
        for name in cfg.engines:
            if name == "torch":
                engine = torch_engine(model, preprocessing)
            elif find_spec(name):
                input = "uint8" if arrays[0].dtype == np.uint8 else "float"
                try:
                    engine = graph_engine(
                        name, load(run, "cpu")[1], preprocessing, size, input, cfg.maps, cfg.threads, cfg.opset, Path(folder)
                    )
                except InputError as error:
                    log.warning("%s is left out: %s", name, error)
                    continue
                versions[name] = version(name)
            else:
                log.warning("%s is left out, as it is not installed", name)
                continue
            for batch in batches:
                if engine.batch in (None, batch):
                    rows += measured(name, engine, arrays, batch, cfg.maps, plan)
    metadata = {
        "run": str(run),
        "method": (read_record(run) or {}).get("method"),
        "backbone": saved.get("backbone"),
        "size": size,
        "images": [arrays[0].shape, len(images)],
        "maps": cfg.maps,
        "threads": cfg.threads,
        "device": cfg.device,
        **plan._asdict(),
        "versions": versions,
        "environment": environment(),
    }
    write_json(output, {**metadata, "milliseconds": [row._asdict() for row in rows]}, outputs)
    if cfg.doc:
        between(cfg.doc, "latency", page(rows, metadata))
    return rows


@contextlib.contextmanager
def limited(threads: int) -> Iterator[None]:
    """So many threads for torch and for numpy's products."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(threads):
            yield
    finally:
        torch.set_num_threads(before)


def torch_engine(model: Detector, preprocessing: Preprocessing) -> Engine:
    """The run as `predict` computes it: maps are made whether they are asked for or not."""

    def synchronised(work: Callable) -> Callable:
        @torch.inference_mode()
        def call(*given: Any) -> Any:
            found = work(*given)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            return found

        return call

    size = None

    def whole(batch: Tensor) -> Sequence:
        return tuple(value for value in model(batch.to(model.device)) if value is not None)

    def backbone(batch: Tensor) -> Any:
        nonlocal size
        size = tuple(batch.shape[-2:])
        return model.features(batch.to(model.device))

    def score(maps: Any) -> Sequence:
        return tuple(value for value in model.score(maps, size) if value is not None)

    return Engine(
        resize=lambda array: prepare(array, preprocessing.window, preprocessing.geometry),
        stack=torch.stack,
        backbone=synchronised(backbone) if splits(model) else None,
        score=synchronised(score) if splits(model) else None,
        whole=synchronised(whole),
        enlarge=lambda map, height, width: to_image(map.cpu(), height, width, preprocessing.geometry),
        batch=None,
    )


def graph_engine(
    name: str,
    model: Detector,
    preprocessing: Preprocessing,
    size: tuple[int, int],
    input: str,
    maps: bool,
    threads: int,
    opset: int,
    folder: Path,
) -> Engine:
    """The run's export, whole and in two parts, run as `blemish.edge.runtime` runs it."""
    whole, images = ExportModule(model, size, input, None, preprocessing, maps).eval(), example(input, size)
    parts: dict[str, tuple[nn.Module, Any]] = {"full_pass": (whole, images)}
    if splits(model):
        with torch.no_grad():
            parts |= {"backbone": (Backbone(whole), images), "score": (Score(whole), Backbone(whole)(images))}
    calls, batches = {}, []
    for part, (module, given) in parts.items():
        program, batch = traced(module, given)
        to_onnx(program, folder / f"{part}.onnx", opset, names=None)
        _, calls[part] = (runtime.by_onnxruntime if name == "onnxruntime" else runtime.by_openvino)(folder / f"{part}.onnx", threads)
        batches.append(batch)
    window, apart = {dtype: list(ends) for dtype, ends in preprocessing.window.items()}, calls.get("score")
    metadata = {"input": input, "source": None, "size": list(size), "window": window, **geometry_metadata(preprocessing.geometry)}
    return Engine(
        resize=lambda array: runtime.prepared(array, metadata),
        stack=np.stack,
        backbone=calls.get("backbone"),
        score=apart and (lambda maps: apart(*maps)),
        whole=calls["full_pass"],
        enlarge=partial(edge.to_image, geometry=preprocessing.geometry),
        batch=1 if 1 in batches else None,
    )


def measured(name: str, engine: Engine, arrays: Sequence[np.ndarray], batch: int, maps: bool, plan: Plan) -> list[Row]:
    """The rows of one engine with so many images a call, which take turns."""
    turn = cycle(arrays)
    drawn = [[next(turn) for _ in range(batch)] for _ in arrays]

    def resize(some: Sequence[np.ndarray]) -> Any:
        return engine.stack([engine.resize(array) for array in some])

    def enlarge(made: tuple[Any, Sequence[np.ndarray]]) -> None:
        for map, array in zip(*made, strict=True):
            engine.enlarge(map, *array.shape[:2])

    ready = [resize(some) for some in drawn]
    found = [engine.whole(some) for some in ready]
    stages: dict[str, tuple[Callable, Sequence]] = {"resize": (resize, drawn)}
    if engine.backbone:
        stages["backbone"] = engine.backbone, ready
        stages["score"] = engine.score, [engine.backbone(some) for some in ready]
    else:
        stages["score"] = engine.whole, ready
    mapped = maps and len(found[0]) > 1
    if mapped:
        stages["map"] = enlarge, [(made[1], some) for made, some in zip(found, drawn, strict=True)]
    stages["image to score"] = lambda some: engine.whole(resize(some)), drawn
    if mapped:
        stages["image to map"] = lambda some: enlarge((engine.whole(resize(some))[1], some)), drawn
    return [row(name, batch, stage, timed(work, given, plan)) for stage, (work, given) in stages.items()]


def timed(work: Callable[[Any], Any], given: Sequence, plan: Plan) -> list[float]:
    """Milliseconds of each of the calls that count, of what is given by turns."""
    found, begun, turn = [], time.perf_counter(), cycle(given)
    for i in range(plan.warmup + plan.repeats):
        one = next(turn)
        start = time.perf_counter()
        work(one)
        end = time.perf_counter()
        if i >= plan.warmup:
            found.append(1e3 * (end - start))
        if found and end - begun > plan.seconds:
            break
    return found


def row(engine: str, batch: int, stage: str, values: Sequence[float]) -> Row:
    return Row(engine, batch, stage, *(float(np.percentile(values, q)) for q in (50, 95, 99)), len(values))


def table(rows: Sequence[Row]) -> Table:
    """What a person wants to see; `map` is the way to the image's own pixels."""
    grid = Table(*COLUMNS, title="milliseconds a call")
    for r in rows:
        grid.add_row(r.engine, str(r.batch), r.stage, *(f"{value:.2f}" for value in (r.median, r.p95, r.p99)), str(r.calls))
    return grid


def page(rows: Sequence[Row], metadata: dict) -> str:
    """The table in Markdown, and below it what it was measured on."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "| --- | ---: | --- | ---: | ---: | ---: | ---: |"]
    lines += [f"| {r.engine} | {r.batch} | {r.stage} | {r.median:.2f} | {r.p95:.2f} | {r.p99:.2f} | {r.calls} |" for r in rows]
    (height, width), (shape, count) = metadata["size"], metadata["images"]
    versions = ", ".join(f"{name} {value}" for name, value in metadata["versions"].items())
    seen = f"{metadata['method']}, {metadata['backbone']}, {width}×{height} px from {shape[1]}×{shape[0]}, {count} test images, "
    seen += f"maps={str(metadata['maps']).lower()}; {metadata['environment']['cpu']}, {metadata['threads']} threads, {versions}"
    return "\n".join([*lines, "", f"Milliseconds a call: {seen}; {metadata['warmup']} calls before those that count."]) + "\n"

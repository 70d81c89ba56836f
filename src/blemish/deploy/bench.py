"""How long a run takes from file to decision: each of its stages, by torch and by the engines that exports are for."""

import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.table import Table
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from blemish.data.images import prepare, to_image
from blemish.deploy.export import ExportModule, check_exportable, chosen, example, geometry_metadata, loaded, traced
from blemish.detector import Detector
from blemish.edge import geometry as edge
from blemish.edge import runtime
from blemish.edge.checks import check_choice, check_number, check_size, check_switch, check_whole
from blemish.edge.errors import InputError
from blemish.edge.reading import read
from blemish.features.engine import onnx_of
from blemish.features.extractor import Features
from blemish.files import Outputs, write_json
from blemish.report.formats import between
from blemish.run.checkpoint import load, newest_run
from blemish.run.record import environment, read_record
from blemish.run.results import Preprocessing, preprocessing_of

log = logging.getLogger(__name__)

ENGINES = ("torch", "onnxruntime", "openvino")


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
    """One way to compute a method; a call returns when its result is there."""

    resize: Callable[[np.ndarray], Any]  # a decoded image to what `stack` takes
    stack: Callable[[list], Any]  # several of them to a batch
    calls: dict[str, Callable]  # full: batch to (score, map) or (score,); for a method that splits: backbone, batch to maps; score of them
    enlarge: Callable[[Any, int, int], Any]  # a map (h, w) to the pixels of its image
    batch: int | None = None  # the batch size, None for any


def bench_run(cfg: Any) -> list[Row]:
    """Measure a run folder as configured by configs/bench.yaml, and write the result."""
    if isinstance(cfg.engines, str) or set(cfg.engines) - set(ENGINES):
        raise InputError(f"engines={cfg.engines}: expected a list of {', '.join(ENGINES)}")
    check_whole("", 1, batch=cfg.batch, threads=cfg.threads, repeats=cfg.repeats, n=cfg.n, opset=cfg.opset)
    check_whole("", 0, warmup=cfg.warmup)
    check_number("", "(0, inf)", seconds=cfg.seconds)
    check_switch("", maps=cfg.maps)
    check_size(size=cfg.size)
    check_choice("", ("cpu", "gpu", "cuda", "auto"), device=cfg.device)
    run, outputs = newest_run(cfg.run), Outputs()
    output = Path(cfg.output) if cfg.output else run / "bench.json"
    outputs.check([output], "output=FILE")
    saved, model = load(run, cfg.device)
    preprocessing = preprocessing_of(saved)
    if preprocessing.tile:
        raise InputError(f"run={run}: has tiling={preprocessing.tile}, and each tile its stages; expected a run that scores full images")
    images = chosen(cfg.images, run, saved.data, cfg.n)
    arrays = [loaded(*image) for image in images]
    side = preprocessing.geometry.side
    size = (side, side) if side else tuple(cfg.size or arrays[0].shape[:2])
    arrays = [array for array in arrays if preprocessing.geometry.size or array.shape[:2] == size]
    versions = {"torch": torch.__version__}
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(cfg.threads)
        stack.enter_context(threadpool_limits(cfg.threads))  # of numpy's products
        rows = [row("any", 1, "decode", timed(read, [path for path, _ in images], cfg))]
        for name in cfg.engines:
            if not find_spec(name):
                log.warning("%s is left out, as it is not installed", name)
                continue
            try:
                if name == "torch":
                    engine = torch_engine(model, preprocessing, size)
                else:
                    input = "uint8" if arrays[0].dtype == np.uint8 else "float"
                    engine = graph_engine(name, load(run, "cpu")[1], preprocessing, size, input, cfg)
            except InputError as error:
                log.warning("%s is left out: %s", name, error)
                continue
            versions[name] = version(name)
            for batch in sorted({1, cfg.batch}):
                if engine.batch in (None, batch):
                    rows += measured(name, engine, arrays, batch, cfg)
    metadata = {
        "run": str(run),
        "method": (read_record(run) or {}).get("method"),
        "backbone": saved.get("backbone"),
        "size": size,
        "images": [arrays[0].shape, len(images)],
        **{key: cfg[key] for key in ("maps", "threads", "device", "warmup", "repeats", "seconds")},
        "versions": versions,
        "environment": environment(),
    }
    write_json(output, {**metadata, "milliseconds": [row._asdict() for row in rows]}, outputs)
    if cfg.doc:
        between(cfg.doc, "latency", page(rows, metadata))
    return rows


def parts_of(model: Detector, *options: Any) -> dict[str, ExportModule]:
    """The modules to measure: the complete one, and its parts where the method is `score` of the maps of its backbone and nothing else."""
    splits = isinstance(getattr(model, "backbone", None), Features) and type(model).forward is Detector.forward
    parts = ("full", "backbone", "score") if splits else ("full",)
    return {part: ExportModule(model, *options, part=part).eval() for part in parts}


def torch_engine(model: Detector, preprocessing: Preprocessing, size: tuple[int, int]) -> Engine:
    """The run as `predict` computes it: maps are made whether they are asked for or not."""

    @torch.inference_mode()
    def call(module: nn.Module, x: Any) -> Sequence[Tensor]:
        found = module(x.to(model.device) if isinstance(x, Tensor) else x)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return found

    parts = parts_of(model, size, "float", None, preprocessing, True)
    return Engine(
        resize=lambda array: prepare(array, preprocessing.window, preprocessing.geometry),
        stack=torch.stack,
        calls={name: partial(call, module) for name, module in parts.items()},
        enlarge=lambda map, height, width: to_image(map.cpu(), height, width, preprocessing.geometry),
    )


def graph_engine(name: str, model: Detector, preprocessing: Preprocessing, size: tuple[int, int], input: str, cfg: Any) -> Engine:
    """The run's export, complete and in two parts, run as `edge.runtime` runs it; `cfg` has maps, threads and opset."""
    check_exportable(model, cfg.maps)
    parts = parts_of(model, size, input, None, preprocessing, cfg.maps)
    inputs, calls, batches = example(input, size), {}, []
    for part, module in parts.items():
        with torch.no_grad():
            program, batch = traced(module, parts["backbone"](inputs) if part == "score" else inputs)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "part.onnx"
            path.write_bytes(onnx_of(program, cfg.opset, names=(None, None)).SerializeToString())
            run = (runtime.by_onnxruntime if name == "onnxruntime" else runtime.by_openvino)(path, cfg.threads)[1]
        calls[part] = (lambda maps, run=run: run(*maps)) if part == "score" else run
        batches.append(batch)
    metadata = {"input": input, "source": None, "size": list(size), **geometry_metadata(preprocessing)}
    resize, enlarge = partial(runtime.to_input, metadata=metadata), partial(edge.to_image, geometry=preprocessing.geometry)
    return Engine(resize, np.stack, calls, enlarge, 1 if 1 in batches else None)


def measured(name: str, engine: Engine, arrays: Sequence[np.ndarray], batch: int, cfg: Any) -> list[Row]:
    """The rows of one engine with so many images a call, which take turns."""
    turn, calls = cycle(arrays), engine.calls
    drawn = [list(islice(turn, batch)) for _ in arrays]

    def resize(some: Sequence[np.ndarray]) -> Any:
        return engine.stack([engine.resize(array) for array in some])

    def enlarge(maps: Sequence, some: Sequence[np.ndarray]) -> None:
        for map, array in zip(maps, some, strict=True):
            engine.enlarge(map, *array.shape[:2])

    ready = [resize(some) for some in drawn]
    found = [calls["full"](one) for one in ready]
    stages: dict[str, tuple[Callable, Sequence]] = {"resize": (resize, drawn), "score": (calls["full"], ready)}
    if "backbone" in calls:
        stages["backbone"] = calls["backbone"], ready
        stages["score"] = calls["score"], [calls["backbone"](one) for one in ready]
    stages["image to score"] = lambda some: calls["full"](resize(some)), drawn
    if cfg.maps and len(found[0]) > 1:
        stages["map"] = lambda pair: enlarge(*pair), [(one[1], some) for one, some in zip(found, drawn, strict=True)]
        stages["image to map"] = lambda some: enlarge(calls["full"](resize(some))[1], some), drawn
    order = ("resize", "backbone", "score", "map", "image to score", "image to map")
    return [row(name, batch, stage, timed(*stages[stage], cfg)) for stage in order if stage in stages]


def timed(work: Callable[[Any], Any], inputs: Sequence, cfg: Any) -> list[float]:
    """Milliseconds of each call that counts, with the inputs taking turns; `cfg` has warmup, repeats and seconds."""
    found, begun = [], time.perf_counter()
    for i, x in zip(range(cfg.warmup + cfg.repeats), cycle(inputs), strict=False):
        start = time.perf_counter()
        work(x)
        end = time.perf_counter()
        if i >= cfg.warmup:
            found.append(1e3 * (end - start))
        if found and end - begun > cfg.seconds:
            break
    return found


def row(engine: str, batch: int, stage: str, values: Sequence[float]) -> Row:
    return Row(engine, batch, stage, *(float(np.percentile(values, q)) for q in (50, 95, 99)), len(values))


def cells(r: Row) -> list[str]:
    return [r.engine, str(r.batch), r.stage, *(f"{value:.2f}" for value in (r.median, r.p95, r.p99)), str(r.calls)]


def table(rows: Sequence[Row]) -> Table:
    """The rows for the terminal."""
    grid = Table(*Row._fields, title="milliseconds a call")
    for r in rows:
        grid.add_row(*cells(r))
    return grid


def page(rows: Sequence[Row], metadata: dict) -> str:
    """The rows in Markdown, and below them what they were measured on."""
    lines = [Row._fields, ["---", "---:", "---", *["---:"] * 4], *map(cells, rows)]
    (height, width), (shape, count) = metadata["size"], metadata["images"]
    versions = ", ".join(f"{name} {value}" for name, value in metadata["versions"].items())
    run = f"{metadata['method']}, {metadata['backbone']}, {width}×{height} px from {shape[1]}×{shape[0]}, {count} test images, "
    run += f"maps={str(metadata['maps']).lower()}; {metadata['environment']['cpu']}, {metadata['threads']} threads, {versions}"
    note = f"Milliseconds a call: {run}; {metadata['warmup']} calls before those that count."
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", note]) + "\n"

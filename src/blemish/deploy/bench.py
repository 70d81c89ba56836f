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
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.table import Table
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from blemish.data.images import prepare, to_image
from blemish.deploy.export import ExportModule, check_exportable, example, geometry_metadata, splits, traced
from blemish.deploy.parity import chosen, loaded
from blemish.detector import Detector
from blemish.edge import geometry as edge
from blemish.edge import runtime
from blemish.edge.checks import check_choice, check_number, check_size, check_switch, check_whole
from blemish.edge.errors import InputError
from blemish.edge.reading import read
from blemish.features.engine import onnx_of, quiet
from blemish.files import Outputs, write_json
from blemish.report.formats import between
from blemish.run.checkpoint import load, newest_run
from blemish.run.progress import steps
from blemish.run.record import environment, read_record
from blemish.run.results import Preprocessing, preprocessing_of

log = logging.getLogger(__name__)

ENGINES = ("torch", "onnxruntime", "openvino")


class Row(NamedTuple):
    """Milliseconds that a stage takes for `batch` images; of engine `roof`, that it would take at the speed of a copy and of a product."""

    engine: str
    batch: int
    stage: str
    median: float
    p95: float
    p99: float
    calls: int


class Rate(NamedTuple):
    """Images per second from the network's input to score and map."""

    engine: str
    threads: int
    batch: int
    images_per_second: float


class Part(NamedTuple):
    """A part of a method as a program."""

    program: Any
    batch: int | None  # the batch size, None for any
    operations: float  # of one image, a multiplication and an addition are two
    bytes: int  # of constants, and of inputs and outputs of one image


class Engine(NamedTuple):
    """One way to compute a method; a call returns when its result is there."""

    resize: Callable[[np.ndarray], Any]  # a decoded image to what `stack` takes
    stack: Callable[[list], Any]  # several of them to a batch
    calls: dict[str, Callable]  # full: batch to (score, map) or (score,); for a method that splits: backbone, batch to maps; score of them
    enlarge: Callable[[Any, int, int], Any]  # a map (h, w) to the pixels of its image
    batch: int | None = None  # the batch size, None for any


def bench_run(cfg: Any) -> tuple[list[Row], list[Rate]]:
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
    input, versions, rates = "uint8" if arrays[0].dtype == np.uint8 else "float", {"torch": torch.__version__}, []
    engines = [name for name in cfg.engines if find_spec(name)]
    if absent := sorted(set(cfg.engines) - set(engines)):
        log.warning("%s: left out, as not installed", ", ".join(absent))
    with ExitStack() as stack:
        step = stack.enter_context(steps("graphs", "decode", *engines, *(f"throughput of {name}" for name in engines)))
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(cfg.threads)
        stack.enter_context(threadpool_limits(cfg.threads))  # of numpy's products
        step("graphs")
        try:
            parts = parts_as_programs(load(run, "cpu")[1], preprocessing, size, input, cfg.maps)
        except InputError as error:
            log.warning("%s", error)
            parts, engines = {}, [name for name in engines if name == "torch"]
        graphs = graphs_of(parts, cfg.opset) if set(engines) - {"torch"} else {}
        step("decode")
        rows = [row("any", 1, "decode", timed(read, [path for path, _ in images], cfg))]
        rows += roof(parts)

        def engine_of(name: str, threads: int) -> Engine:
            torch.set_num_threads(threads)
            if name == "torch":
                return torch_engine(model, preprocessing, size)
            return graph_engine(name, graphs, preprocessing, size, input, threads)

        for name in engines:
            step(name)
            engine, versions[name] = engine_of(name, cfg.threads), version(name)
            for batch in sorted({1, cfg.batch}):
                if engine.batch in (None, batch):
                    rows += measured(name, engine, arrays, batch, cfg)
        for name in engines:
            step(f"throughput of {name}")
            for threads in range(1, cfg.threads + 1):
                rates += throughput(name, engine_of(name, threads), arrays, threads, cfg)
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
    found = {"milliseconds": [row._asdict() for row in rows], "throughput": [rate._asdict() for rate in rates]}
    write_json(output, metadata | found, outputs)
    if cfg.doc:
        between(cfg.doc, "latency", page(rows, rates, metadata))
    return rows, rates


def parts_of(model: Detector, *options: Any) -> dict[str, ExportModule]:
    """The modules to measure: the complete one, and its parts where the method is `score` of the maps of its backbone and nothing else."""
    parts = ("full", "backbone", "score") if splits(model) else ("full",)
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


def parts_as_programs(model: Detector, preprocessing: Preprocessing, size: tuple[int, int], input: str, maps: bool) -> dict[str, Part]:
    """The method complete and in its two parts; InputError for one that has no export."""
    check_exportable(model, maps)
    modules, inputs, found = parts_of(model, size, input, None, preprocessing, maps), example(input, size), {}
    for name, module in modules.items():
        with torch.no_grad():
            given = modules["backbone"](inputs) if name == "score" else inputs
            program, batch = traced(module, given)
            one = [part[:1] for part in given] if name == "score" else given[:1]
            with FlopCounterMode(display=False) as counter, quiet():
                results = program.module()(one if batch else given)
        shown = [*(one if name == "score" else [one]), *(value[:1] for value in results)]
        constants = [value for value in [*program.state_dict.values(), *program.constants.values()] if isinstance(value, Tensor)]
        size_of = sum(value.nbytes for value in [*shown, *constants])
        found[name] = Part(program, batch, counter.get_total_flops() / (1 if batch else 2), size_of)
    return found


def graphs_of(parts: dict[str, Part], opset: int) -> dict[str, tuple[bytes, int | None]]:
    """Each part as ONNX, and its batch size."""
    return {name: (onnx_of(part.program, opset, (None, None)).SerializeToString(), part.batch) for name, part in parts.items()}


def graph_engine(name: str, graphs: dict, preprocessing: Preprocessing, size: tuple[int, int], input: str, threads: int) -> Engine:
    """The run's export, complete and in two parts, run as `edge.runtime` runs it."""
    calls = {}
    for part, (content, _) in graphs.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "part.onnx"
            path.write_bytes(content)
            run = (runtime.by_onnxruntime if name == "onnxruntime" else runtime.by_openvino)(path, threads)[1]
        calls[part] = (lambda maps, run=run: run(*maps)) if part == "score" else run
    metadata = {"input": input, "source": None, "size": list(size), **geometry_metadata(preprocessing)}
    resize, enlarge = partial(runtime.to_input, metadata=metadata), partial(edge.to_image, geometry=preprocessing.geometry)
    return Engine(resize, np.stack, calls, enlarge, 1 if any(batch == 1 for _, batch in graphs.values()) else None)


def roof(parts: dict[str, Part]) -> list[Row]:
    """For each part the longer of two times: its bytes at the speed of a sum, and its operations at that of a product of matrices."""
    if not parts:
        return []
    matrix, stream = torch.ones(1024, 1024), torch.ones(2**26)

    def fastest(work: Callable[[], Any]) -> float:
        return min(timed(lambda _: work(), [None], SimpleNamespace(warmup=1, repeats=5, seconds=1))) / 1e3

    operations, bytes = 2 * 1024**3 / fastest(lambda: matrix @ matrix), stream.nbytes / fastest(stream.sum)
    log.info("roof: %.0f GB/s read by a sum, %.0f GFLOP/s by a product of float32", bytes / 1e9, operations / 1e9)
    needed = {name: 1e3 * max(part.bytes / bytes, part.operations / operations) for name, part in parts.items()}
    names = {"full": "image to score", "backbone": "backbone", "score": "score"} if "backbone" in parts else {"full": "score"}
    return [Row("roof", 1, stage, *[needed[name]] * 3, 0) for name, stage in names.items()]


def throughput(name: str, engine: Engine, arrays: Sequence[np.ndarray], threads: int, cfg: Any) -> list[Rate]:
    """The rates of batches of 1, 2, 4 and so on up to the configured one."""
    found = []
    for batch in sorted({*(2**i for i in range(cfg.batch.bit_length())), cfg.batch}):
        if engine.batch in (None, batch):
            inputs = engine.stack([engine.resize(array) for array in islice(cycle(arrays), batch)])
            plan = SimpleNamespace(warmup=1, repeats=cfg.repeats, seconds=cfg.seconds / 4)
            found.append(Rate(name, threads, batch, 1e3 * batch / float(np.median(timed(engine.calls["full"], [inputs], plan)))))
    return found


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


def best(rates: Sequence[Rate]) -> list[str]:
    """A line for each engine and number of threads: its rates by batch size, the largest first."""
    lines = []
    for key in dict.fromkeys((rate.engine, rate.threads) for rate in rates):
        own = sorted((rate for rate in rates if (rate.engine, rate.threads) == key), key=lambda rate: -rate.images_per_second)
        lines.append(f"{key[0]}, {key[1]} threads: " + ", ".join(f"{one.images_per_second:.3g} in batches of {one.batch}" for one in own))
    return lines


def table(rows: Sequence[Row]) -> Table:
    """The rows for the terminal."""
    grid = Table(*Row._fields, title="milliseconds a call")
    for r in rows:
        grid.add_row(*cells(r))
    return grid


def page(rows: Sequence[Row], rates: Sequence[Rate], metadata: dict) -> str:
    """The rows and rates in Markdown, and below them what they were measured on."""
    lines = [Row._fields, ["---", "---:", "---", *["---:"] * 4], *map(cells, rows)]
    (height, width), (shape, count) = metadata["size"], metadata["images"]
    versions = ", ".join(f"{name} {value}" for name, value in metadata["versions"].items())
    run = f"{metadata['method']}, {metadata['backbone']}, {width}×{height} px from {shape[1]}×{shape[0]}, {count} test images, "
    run += f"maps={str(metadata['maps']).lower()}; {metadata['environment']['cpu']}, {metadata['threads']} threads, {versions}"
    note = f"Milliseconds a call: {run}; {metadata['warmup']} calls before those that count."
    many = ["", "Images a second:", "", *(f"- {line}" for line in best(rates))] if rates else []
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", note, *many]) + "\n"

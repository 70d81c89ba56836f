"""The command `blemish`, in this process: its words, its exits, and that each stands for the tool of its name."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from PIL import Image
from report.test_tables import recorded
from support import CONFIGS, DRAWN, METHODS, composed, tiny_overrides

from blemish import AnomalyDetector, cli
from blemish.data.manifest import read_manifest
from blemish.run.config import keys_of
from blemish.run.help import groups, names, sections


@pytest.fixture
def blemish(tmp_path, monkeypatch, capsys):
    """The command with these arguments: (exit status, what it printed, what it complained of)."""
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def run(*arguments: str):
        monkeypatch.setattr(sys, "argv", ["/somewhere/blemish", *arguments])
        status = 0
        try:
            cli.main()
        except SystemExit as done:
            status = done.code or 0
        return status, *capsys.readouterr()

    yield run
    HydraConfig.instance().cfg = None  # its help leaves one behind, and each job its way of logging
    root.handlers[:] = handlers
    root.setLevel(level)


def test_help_has_a_line_for_every_command(blemish):
    status, out, _ = blemish("--help")
    assert status == 0
    assert blemish("-h")[1] == blemish()[1] == out
    for name, work in cli.COMMANDS.items():
        assert f"  {name:10}{work.__doc__}\n" in out
        assert len(f"  {name:10}{work.__doc__}") <= 120


def test_every_tool_is_a_command():
    tools = {path.stem for path in (CONFIGS.parent / "tools").glob("*.py")}
    assert tools == set(cli.COMMANDS)
    assert all((CONFIGS / f"{name}.yaml").is_file() for name in cli.COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian"], "trian: no command of blemish; choose train, test"),
        (["data"], "found nothing; choose check or synthesize"),
        (["data", "data=folder"], "found data=folder; choose check or synthesize"),
        (["data", "check", "data=folder", "data.root=nowhere"], "nowhere: no such folder"),
        (["test", "run=nowhere"], "run=nowhere: no config.yaml there"),
        (["predict", "input=nowhere"], "nowhere: no such file"),
        (["train", "data=folder", "data.root=nowhere", "logger=none"], "nowhere: no such folder"),
        (["train", "recipe=bundeld"], "recipe=bundeld: no such file of configs/recipe; did you mean 'bundled'?"),
        (["train", "-m", "recipe=padim,bundeld"], "recipe=bundeld: no such file of configs/recipe; did you mean 'bundled'?"),
        (["train", "-m", "model=padim,patchcoer"], "model=patchcoer: no such file of configs/model; did you mean 'patchcore'?"),
        (["train", "-m", "model=padim,dfm", "model.n_features=3"], "model=dfm: model.n_features: no such key"),
        (["train", "-m", "sweep=one_pass", "model.n_features=3"], "model.n_features: no such key"),
        (["train", "-m", "model=glob(pxatch*)"], "model=glob(pxatch*): matches none of"),
        (["train", "seed=1,2"], "seed=1,2: several values; -m"),
        (["train", "++foo=3"], "foo: no such key of train; --help"),
        (["train", "--alpha"], "unrecognized arguments: --alpha; --hydra-help"),
        (["train", "--cfg", "jobs"], "'jobs'"),
        (["train", "~alpha"], "~alpha: cannot be removed"),
        (
            ["train", "data=folder", "data.root=nowhere", "+data.tset_share=1"],
            "data.tset_share: no such key of Folder; did you mean 'data.test_share'?",
        ),
        (["export", "model=padim"], "model: no such key of export"),
        (["test", "+model=padim"], "model: no such key of test"),
        (["train", "data=folder", "data.root=nowhere", "alpha=5"], "alpha=5"),
        (["predict", "input=nowhere", "model=noise_residul"], "model=noise_residul: no such file of configs/model"),
        (["predict", "input=nowhere", "monitor_rate=2"], "monitor_rate=2"),
        (["predict", "input=nowhere", "device=phone"], "device=phone"),
        (["reproduce", "paper=padin"], "paper=padin: no such file of configs/paper; did you mean 'padim'?"),
        (["reproduce", "paper=padim", "data.root=nowhere", "tolerance=nan"], "tolerance=nan"),
        (["data", "synthesize", "data=folder", "data.root=nowhere", "share=2"], "share=2"),
        (["data", "synthesize", "data=folder", "data.root=nowhere", "sides=[0.5,0.2]"], "sides=[0.5, 0.2]: expected [from, to]"),
        (["data", "synthesize", "data=folder", "data.root=nowhere", "sides=[0.5,2]"], "sides="),
        (["report", "runs=nowhere", "max_mb=0"], "max_mb=0"),
        (["table", "runs=nowhere", "by=colour"], "by=colour"),
        (["bench", "run=nowhere", "n=0"], "n=0"),
        (["bench", "run=nowhere", "seconds=nan"], "seconds=nan"),
        (["export", "run=nowhere", "tolerance=high"], "tolerance=high"),
        (["watch", "model=nowhere", "input=.", "output=../out"], "run=nowhere: no config.yaml there"),
        (["watch", "run=nowhere", "input=.", "output=out"], "output=out: inside of input=."),
        (["watch", "run=nowhere", "input=there", "settle=-1"], "settle=-1"),
    ],
)
def test_what_cannot_be_done_ends_with_two(blemish, arguments, says):
    status, out, err = blemish(*arguments)
    assert status == 2
    assert says in err
    assert "Traceback" not in out + err
    assert err.count("error: ") == 1


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_a_misspelt_key_of_any_command_names_the_nearest(blemish, name, tmp_path):
    key = "runs" if name in ("table", "report") else "output" if name not in ("train",) else "run_dir"
    words = ["check"] if name == "data" else []
    for text in (f"{key}z=1", f"+{key}z=1", f"++{key}z=1"):
        status, _, err = blemish(name, *words, text)
        assert status == 2 and err == f"error: {key}z: no such key of {name}; did you mean {key!r}?\n"
    assert not list(tmp_path.iterdir()), "a failed start leaves nothing"


ODD = ["schräg", "gut (1)", "[a]", "a$b", "5%", "loch #2", "a, b", "a=b", "0012", "12", "{x}", "it's"]


@pytest.mark.parametrize("name", ODD)
def test_a_folder_has_any_name_unquoted(blemish, tmp_path, name):
    for number, part in enumerate(("n", "v", "t", "d", "m")):
        folder = tmp_path / name / f"{part}{name}"
        folder.mkdir(parents=True)
        for image in range(2):
            gray = 0 if part == "m" else 10 * number + image
            Image.new("L", (16, 16), gray + 200 * (part == "m")).save(folder / f"{part.replace('m', 'd')}{image}.png")
    keys = [f"data.{key}={part}{name}" for key, part in zip(("normal", "validation", "normal_test", "masks"), "nvtm", strict=True)]
    listed = f"d{name}" if "," not in name else f"'d{name}'"
    command = ["data", "check", "data=folder", "data.root=.", f"data.category={name}", *keys, f"data.abnormal=[{listed}]"]
    status, out, err = blemish(*command)
    assert status == 0, out + err
    samples = read_manifest(tmp_path / "manifest.csv")
    assert {(s.split, Path(s.path).parent.name[0], s.defect, bool(s.mask)) for s in samples} == {
        ("train", "n", "good", False),
        ("calibrate", "v", "good", False),
        ("test", "t", "good", False),
        ("test", "d", f"d{name}", True),
    }
    assert {Path(s.path).parent.parent.name for s in samples} == {name}


def test_names_in_lists_and_sweeps():
    assert cli.path_as_typed("data.abnormal=[kratzer,loch #2]", False) == "data.abnormal=['kratzer','loch #2']"
    assert cli.path_as_typed("+change.data.normal=[1, '2, 3']", False) == "+change.data.normal=['1','2, 3']"
    assert cli.path_as_typed("data.category=schräg,a=b", True) == "data.category='schräg','a=b'"
    for text in ("data.abnormal=[]", "data.masks=null", "data.category=glob(*)", "data.category=a,b"):
        assert cli.path_as_typed(text, True) == text


CHOSEN = [("train", f"model={name}") for name in METHODS] + [("train", f"data={name}") for name in names("data")]
CHOSEN += [("train", f"recipe={name}") for name in names("recipe")] + [("train", f"trainer={name}") for name in names("trainer")]
CHOSEN += [("reproduce", f"paper={name}") for name in names("paper")] + [("predict", "model=noise_residual"), ("data", "data=gdxray")]
CHOSEN += [("train", "store=on"), ("train", "logger=wandb"), ("train", "sweep=search"), ("train", "launch=joblib")]


@pytest.mark.parametrize(("name", "choice"), [*((name, "") for name in cli.COMMANDS), *CHOSEN])
def test_help_lists_every_key_with_its_default(name, choice):
    listed = {key: value for keys in sections(name, [choice]).values() for key, (value, _) in keys.items() if not key.endswith(".")}
    cfg = composed(*filter(None, [choice]), config=name)
    composed_to = {key for key in keys_of(cfg) if not key.endswith("_target_")}
    assert {key for key in composed_to if not any(f"{key}.".startswith(f"{other}.") for other in listed)} == set()
    for key in set(listed) - set(groups(name)):
        value = OmegaConf.to_container(cfg, resolve=False)
        for part in key.split("."):
            value = value[part]
        assert listed[key] == value or OmegaConf.to_container(OmegaConf.create(f"a: {listed[key]}"), resolve=False)["a"] == value


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_the_help_of_a_command(blemish, name):
    status, out, _ = blemish(name, "--help")
    assert status == 0
    assert out.startswith(f"usage: blemish {name} ")
    assert f"  {'runs' if name in ('table', 'report') else 'output' if name != 'train' else 'run_dir'}=" in out
    for key, (_, comment) in sections(name, [])["keys"].items():
        assert comment, f"{key}: a comment in configs/{name}.yaml is its line of help"


def test_help_is_of_what_was_chosen(blemish):
    out = blemish("train", "model=noise_residual", "data=folder", "-h")[1]
    assert "model.h_relative=2.0" in out and "data.abnormal=[]" in out and "model.n_features" not in out
    assert "your own images" in out.lower()
    assert blemish("train", "model=padmi", "--help")[::2] == (2, blemish("train", "model=padmi")[2])


def test_the_commands_do_the_work_of_the_tools(blemish, tiny, tmp_path):
    assert blemish("data", "check", *tiny_overrides(tiny)[:5])[0] == 0
    assert len(read_manifest(tmp_path / "manifest.csv")) == 36
    status, out, _ = blemish("train", "model=padim", *tiny_overrides(tiny), *DRAWN, "run_dir=runs/one")
    assert status == 0
    assert "run folder: runs/one" in out
    record = json.loads(Path("runs/one/record.json").read_text())
    assert record["command"].startswith("/somewhere/blemish train model=padim ")
    assert blemish("test", "run=runs/one", "device=cpu")[0] == 0
    assert Path("runs/one/retest/metrics.json").is_file()
    out = blemish("predict", "run=runs/one", f"input={tiny / 'square'}", "output=out", "device=cpu")[1]
    assert "6 images scored: out/scores.csv" in out
    assert "written to table.csv" in blemish("table", "runs=runs", "output=table.csv")[1]
    assert "1 run: runs/report.html" in blemish("report", "runs=runs")[1]
    assert {path.name for path in tmp_path.iterdir()} == {".blemish", "manifest.csv", "runs", "out", "table.csv"}  # nothing of Hydra's own


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("manifest.csv", ["data", "check"]),
        ("mine.csv", ["data", "check", "output=mine.csv"]),
        ("table.csv", ["table", "runs=.", "output=table.csv"]),
        ("table.md", ["table", "runs=.", "output=table.csv", "markdown=table.md"]),
        ("table.tex", ["table", "runs=.", "output=table.csv", "latex=table.tex"]),
        ("report.html", ["report", "runs=.", "output=report.html"]),
    ],
)
def test_no_tool_replaces_a_file_of_the_users(blemish, name, arguments, tiny, tmp_path):
    data = tiny_overrides(tiny)[:5] if arguments[0] == "data" else []
    path = tmp_path / name
    path.write_text("mine")
    status, _, err = blemish(*arguments, *data)
    assert status == 2 and name in err and "output=" in err
    assert path.read_text() == "mine"
    path.unlink()
    if arguments[0] == "data":
        assert blemish(*arguments, *data)[0] == blemish(*arguments, *data)[0] == 0, "its own it does"
        path.write_text(path.read_text().replace("test", "train"))
        assert blemish(*arguments, *data)[0] == 2, "unless somebody has edited it"


def test_what_is_said_of_a_prediction(blemish, tiny, tmp_path):
    bad = tmp_path / "in"
    bad.mkdir()
    (bad / "a.png").write_bytes((tiny / "square" / "000.png").read_bytes())
    options = ["predict", "model=noise_residual", "model.mode=calibrated", "model.channels=1", "input=in", "output=out"]
    status, out, _ = blemish(*options)
    assert status == 0
    assert "1 of 1 anomalous" in out and "out/a_overlay.png" in out and "1 images scored: out/scores.csv" in out
    (bad / "b.png").write_bytes(b"")
    status, out, err = blemish(*options)
    assert status == 1
    assert "1 images scored" in out and "in/b.png" in err and "out/failed.csv" in err
    (bad / "a.png").write_bytes(b"")
    assert blemish(*options)[0] == 2


@pytest.mark.parametrize(
    ("line", "choices"),
    [
        ("blemish tr", " ".join(cli.COMMANDS)),
        ("blemish train model=padi", "model=padim"),
        ("/bin/blemish data check data=m", "data=mtd data=mvtec"),
        ("blemish train model=padim model.n", "model.n_features="),
        ("blemish table readm", "readme="),
    ],
)
def test_the_shell_completes(blemish, monkeypatch, line, choices):
    monkeypatch.setenv("COMP_LINE", line)
    assert blemish("-sc", "query=bash") == (0, f"{choices}\n", "")
    assert blemish("-sc", "install=bash")[1].endswith(" blemish\n")


@pytest.mark.slow
def test_a_sweep_is_the_tools_sweep(blemish, tiny, monkeypatch):
    monkeypatch.setenv("BLEMISH_COMMAND", "")  # is as before afterwards
    status, _, err = blemish("train", "-m", "model=padim", "seed=1", *tiny_overrides(tiny), "sweep.name=one")
    assert status == 0, err
    assert "1 cells, 1 finished" in err
    assert len(list(Path("results/runs/sweeps/one").glob("*/metrics.json"))) == 1


WITHOUT_TORCH = """
import subprocess
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "lightning", "timm"):
            raise ImportError(f"{name} is imported")

sys.meta_path.insert(0, Refuse())
from blemish import cli
cli.main()
"""


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["train", "model=padim", "--help"], 0),
        (["train", "recipe=bundeld"], 2),
        (["table", "runs=runs", "output=table.csv"], 0),
        (["report", "runs=runs"], 0),
    ],
)
def test_what_only_reads_does_not_wait_for_torch(tmp_path, arguments, status):
    recorded(tmp_path / "runs" / "one", "padim", "screw", 0, 0.9)
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr


def test_watch_scores_with_a_run_what_comes(blemish, tiny, tmp_path):
    """A saved detector, files that are damaged among others, and frames, which are no files."""
    detector = AnomalyDetector("padim", backbone="test_resnet", weights="random", image_size=64, progress=False, device="cpu", recipe=False)
    detector.train(tiny / "normal").save(tmp_path / "saved.ckpt")
    (source := tmp_path / "in").mkdir()
    for path in (*sorted((tiny / "square").glob("*.png"))[:2], *sorted((tiny / "normal_test").glob("*.png"))[:2]):
        shutil.copy(path, source / f"{path.parent.name}-{path.name}")
    (source / "bad.png").write_text("no image")
    options = ["once=true", "settle=0", "patience=0", "stdout=true", "interval=0.01", "device=cpu"]
    status, out, err = blemish("watch", "model=saved.ckpt", "input=in", "output=out", *options)
    found = {Path(line["name"]).name: line for line in map(json.loads, out.splitlines())}
    assert status == 0 and "watch: 5 images, 1 failed" in err and len(found) == 5 and "error" in found.pop("bad.png")
    for name, line in found.items():
        expected = detector.predict(source / name)
        assert (line["score"], line["decision"], line["p_value"]) == (expected.score, expected.decision, expected.p_value)
    scorer = cli.scorer_of_run(str(tmp_path / "saved.ckpt"), "cpu")
    frame = np.asarray(Image.open(source / name))
    assert scorer.predict(frame).score == line["score"] and len(scorer.calibration) == detector.threshold.n

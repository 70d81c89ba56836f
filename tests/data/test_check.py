"""`data check`: the table, the files with problems, and the exit status."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from support import DATA, save

from blemish.data.check import check, is_faulty
from blemish.data.folder import Folder
from blemish.data.manifest import read_manifest

TOOL = Path(__file__).parents[2] / "tools" / "data.py"


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "set"
    for i in range(8):
        save(root / f"normal/{i}.png", np.zeros((20, 20 + i), np.uint8 if i else np.uint16))
    for name in "abcd":
        save(root / f"crack/{name}.png", np.zeros((20, 30, 3), np.uint8))
    save(root / "truth/a.png", np.full((20, 30), 255, np.uint8))
    save(root / "truth/b.png", np.zeros((20, 30), np.uint8))
    save(root / "truth/c.png", np.full((20, 31), 255, np.uint8))
    return root


def folder(root):
    folders = {"normal": "normal", "validation": None, "normal_test": None, "abnormal": "crack", "masks": "truth", "test_share": 0.25}
    return Folder(root, None, **folders, **{**DATA, "protocol": "paper"})


def test_rows_count_what_is_there(root):
    (root / "crack/d.png").write_bytes(b"\x89PNG")
    train, crack, good = check(folder(root))
    assert [train[key] for key in ("split", "defect", "images", "no mask")] == ["train", "good", 6, 0] and not is_faulty(train)
    assert [good[key] for key in ("split", "defect", "images")] == ["test", "good", 2]
    assert [crack[key] for key in ("defect", "images", "masks", "no mask")] == ["crack", 4, 3, 1] and is_faulty(crack)
    assert crack["empty"] == ["truth/b.png"]
    (wrong,), (unreadable,) = crack["wrong size"], crack["unreadable"]
    assert "truth/c.png: 31×20 pixels, its image 30×20" in wrong and str(root / "crack/d.png") in unreadable
    assert crack["sizes"] == "30×20" and crack["kinds"] == "uint8 colour 3"
    assert train["sizes"].endswith("× 20–20")  # more sizes than are listed
    kinds = [kind for row in (train, good) for kind in row["kinds"].split(", ")]
    assert "uint16 grey 1" in kinds and sum(int(kind.split()[-1]) for kind in kinds) == 8


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """The tool with these arguments, in this process: (exit status, stdout, stderr)."""

    def tool(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(TOOL), *arguments])
        with pytest.raises(SystemExit) as done:
            runpy.run_path(str(TOOL), run_name="__main__")
        return done.value.code, *capsys.readouterr()

    return tool


def test_tool_prints_writes_and_exits(root, tmp_path, run):
    arguments = ["check", "data=folder", f"data.root={root}", "data.abnormal=[crack]", "data.masks=truth"]
    code, out, err = run(*arguments)
    assert code == 1 and "truth/c.png" in out and "crack" in out and not err
    assert len(read_manifest(tmp_path / "manifest.csv")) == 12
    save(root / "truth/c.png", np.full((20, 30), 255, np.uint8))
    assert run(*arguments, "output=new/m.csv")[0] == 0
    assert len(read_manifest(tmp_path / "new/m.csv")) == 12
    assert sorted(path.name for path in tmp_path.iterdir()) == [".blemish", "manifest.csv", "new", "set"]  # no folder of Hydra's


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "found nothing; choose check or synthesize"),
        (("chek", "data=folder"), "found chek; choose check or synthesize"),
        (("check", "data=folder"), "data.root"),
        (("check", "data=folder", "data.root=nowhere"), "nowhere: no such folder"),
        (("check", "data=folder", "data.root=.", "data.on_error=x"), "data.on_error=x"),
    ],
)
def test_what_is_wrong_is_one_line(run, arguments, says):
    code, _, err = run(*arguments)
    assert code == 2 and says in err and "Traceback" not in err


def test_what_masks_mark_is_listed(root, run):
    painted = np.zeros((20, 30, 4), np.uint8)
    painted[5:10, 5:17, 3] = 255
    classes = np.zeros((20, 30), np.uint8)
    classes[5:10, 5:11], classes[5:10, 11:17] = 50, 100
    for name, mask in {"a": painted, "b": painted, "c": classes, "d": 255 * (classes == 0).astype(np.uint8)}.items():
        save(root / f"truth/{name}.png", mask)
    _, crack, _ = check(folder(root))
    assert crack["marked"] == "10 % (10–90)" and crack["levels"] == "0 50 100 classes ×1, 0 255 ×1, alpha 0 255 ×2"
    assert len(crack["odd"]) == 1 and "truth/d.png" in crack["odd"][0] and not is_faulty(crack) and not crack["empty"]
    arguments = ["check", "data=folder", f"data.root={root}", "data.abnormal=[crack]", "data.masks=truth"]
    code, out, _ = run(*arguments, f"data.roi={root}/truth/a.png")
    assert code == 0 and "truth/d.png" in out and f"data.roi={root}/truth/a.png: 10 %" in out
    code, out, _ = run(*arguments, f"data.roi={root}/truth")
    assert code == 1 and f"{root}/normal/1.png: no mask" in out


def test_contradictions_are_named_with_path_and_line(root, run):
    save(root / "crack/d.png", np.zeros((20, 20), np.uint16))
    (root / "normal/9.png").write_bytes((root / "normal/0.png").read_bytes())
    (root / "crack/d.png").write_bytes((root / "normal/0.png").read_bytes())
    truth = "path,split,label,defect,mask\n"
    rows = ["normal/0.png,train,0,good,", "normal/1.png,train,0,good,truth/a.png", "normal/9.png,train,0,good,", "crack/b.png,train,1,x,"]
    (root / "m.csv").write_text(truth + "\n".join([*rows, "crack/d.png,test,1,x,"]))
    save(root / "truth/a.png", np.full((20, 21), 255, np.uint8))
    arguments = ["check", "data=folder", f"data.root={root}", f"data.manifest={root}/m.csv", "protocol=paper"]
    code, out, _ = run(*arguments)
    assert code == 1 and "crack/b.png (line 2): label 1 in split train" in out
    assert "normal/1.png (line 5): label 0, but truth/a.png marks pixels" in out
    assert "crack/d.png (line 3) in test, normal/0.png (line 4) in train, normal/9.png (line 6) in train: the same content" in out

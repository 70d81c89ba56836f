"""Manifests: written, read again, and refused with file and line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blemish.data.manifest import Sample, manifest_digest, parse_boxes, parse_tile, read_manifest, write_manifest
from blemish.edge.errors import InputError

ROWS = [
    Sample("train/good/ein Bild ä.png", "train", 0, "good", digest="0123456789abcdef"),
    Sample('test/a "b", c/1.png', "test", 1, "crack", mask="masks/1.png"),
    Sample("big.tif", "test", 1, "pore", boxes="1 2 3 4;10 20 30 40", tile="0,0,64,64"),
    Sample("big.tif", "unlabelled", -1, "unknown", tile="64,0,64,64"),
]


def test_manifest_comes_back_as_written(tmp_path):
    path = tmp_path / "new folder" / "manifest.csv"
    write_manifest(path, ROWS)
    assert read_manifest(path) == ROWS
    assert [file.name for file in path.parent.iterdir()] == ["manifest.csv"]  # nothing of the writing is left


def test_manifest_edited_in_a_spreadsheet_is_read(tmp_path):
    path = tmp_path / "m.csv"
    path.write_bytes("\ufeffpath,split,label,defect\r\na.png,train,0,good\r\n".encode())
    assert read_manifest(path) == [Sample("a.png", "train", 0, "good")]


def test_a_failed_write_leaves_the_old_manifest(tmp_path):
    path = tmp_path / "m.csv"
    write_manifest(path, ROWS)

    def rows():
        yield ROWS[0]
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_manifest(path, rows())
    assert read_manifest(path) == ROWS and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no column path"),
        ("path,split,label\na,train,0\n", "no column defect"),
        ("path,split,label,defect\n", "no rows"),
        ("path,split,label,defect\na,training,0,good\n", "line 2: split 'training'"),
        ("path,split,label,defect\na,train,2,good\n", "label '2'"),
        ("path,split,label,defect\n/a,train,0,good\n", "relative to data.root"),
        ("path,split,label,defect\n../a,train,0,good\n", "relative to data.root"),
        ("path,split,label,defect\n,train,0,good\n", "relative to data.root"),
        ("path,split,label,defect\na,train,0,good\na,test,0,good\n", "line 3: a is on line 2 too"),
        ("path,split,label,defect,boxes\na,test,1,x,1 2 3\n", "boxes '1 2 3'"),
        ("path,split,label,defect,boxes\na,test,1,x,5 2 3 4\n", "x1 < x2"),
        ('path,split,label,defect,tile\na,test,1,x,"1,2,3"\n', "tile '1,2,3'"),
        ("path,split,label,defect\na,train,0,good,extra\n", "fields"),
        ("path,split,label,defect\na,train\n", "fields"),
    ],
)
def test_unusable_manifest_names_file_and_line(tmp_path, text, says):
    path = tmp_path / "m.csv"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        read_manifest(path)
    assert says in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_absent_and_binary_manifest(tmp_path, content):
    if content:
        (tmp_path / "m.csv").write_bytes(content)
    with pytest.raises(InputError, match=r"m\.csv"):
        read_manifest(tmp_path / "m.csv")


@given(st.permutations(ROWS), st.integers(0, 3), st.sampled_from(Sample._fields))
def test_digest_knows_no_order_but_every_field(rows, index, field):
    assert manifest_digest(rows) == manifest_digest(ROWS)
    changed = list(rows)
    changed[index] = changed[index]._replace(**{field: 7 if field == "label" else "other"})
    assert manifest_digest(changed) != manifest_digest(ROWS)
    assert len(manifest_digest(ROWS)) == 16


def test_keys_boxes_and_tiles():
    assert [row.key for row in ROWS[1:3]] == ['test/a "b", c/1.png', "big.tif#0,0,64,64"]
    assert parse_boxes(ROWS[2].boxes) == [(1, 2, 3, 4), (10, 20, 30, 40)]
    assert parse_boxes("") == [] and parse_boxes("1 2 3 4;") == [(1, 2, 3, 4)]
    assert parse_tile("") is None and parse_tile("64,0,64,32") == (64, 0, 64, 32)

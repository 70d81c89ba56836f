"""Folders of one's own: splits, defect types, and the mask of each image."""

import numpy as np
import pytest
import yaml
from support import CONFIGS, save

from blemish.data.folder import Folder
from blemish.edge.errors import InputError

PLAIN = {"image_size": 32, "crop": None, "resize": "stretch", "batch_size": 4, "workers": 0, "seed": 0, "protocol": "paper"}


def folder(root, **changes):
    """As configs/data/folder.yaml has it, except the values it takes from the run."""
    shared, own = (yaml.safe_load((CONFIGS / "data" / f"{name}.yaml").read_text()) for name in ("_shared", "folder"))
    values = {**shared, **own}
    assert (values.pop("defaults")[0], values.pop("_target_")) == ("_shared", "blemish.data.folder.Folder")
    return Folder(**{**values, **PLAIN, "root": root, **changes})


def make(root, *names, value=None):
    """Grey images, each of its own level unless one is given."""
    for name in names:
        save(root / name, np.full((16, 20), sum(name.encode()) % 251 if value is None else value, np.uint8))


@pytest.fixture
def root(tmp_path):
    make(tmp_path, *(f"normal/{i}.png" for i in range(10)))
    make(tmp_path, "crack/a.png", "crack/deep er/b.PNG", "höle ü/a.bmp", "höle ü/c.jpg")
    return tmp_path


def masks_of(data):
    return {s.path: s.mask for s in data.scan() if s.label == 1}


def test_splits_and_defect_types(root):
    (root / "normal" / ".hidden.png").write_text("no image")
    (root / "normal" / "notes.txt").write_text("no image")
    samples = folder(root, abnormal=["crack", "höle ü"]).scan()
    assert {(s.path, s.split, s.label, s.defect) for s in samples if s.label} == {
        ("crack/a.png", "test", 1, "crack"),
        ("crack/deep er/b.PNG", "test", 1, "crack"),
        ("höle ü/a.bmp", "test", 1, "höle ü"),
        ("höle ü/c.jpg", "test", 1, "höle ü"),
    }
    assert sum(s.split == "test" and not s.label for s in samples) == 2 and sum(s.split == "train" for s in samples) == 8
    assert samples == folder(root, abnormal=["crack", "höle ü"]).scan()
    kept = {tuple(s.path for s in folder(root, seed=seed).scan() if s.split == "test") for seed in range(8)}
    assert len(kept) > 3


def test_normal_test_several_folders_and_category(root):
    make(root, "part/good/x.png", "part/also/y.png", "part/ok/z.png", "part/bad/crack/0.png")
    data = folder(root, category="part", normal=["good", "also"], normal_test="ok", abnormal="bad/crack")
    data.setup()
    assert [(s.path, s.split, s.defect) for s in data.samples] == [
        ("part/also/y.png", "train", "good"),
        ("part/bad/crack/0.png", "test", "crack"),
        ("part/good/x.png", "train", "good"),
        ("part/ok/z.png", "test", "good"),
    ]


@pytest.mark.parametrize("protocol", ["clean", "paper"])
def test_validation_images_are_for_the_threshold_alone(root, protocol):
    make(root, *(f"val/{i}.png" for i in range(3)), "val2/deep/0.png")
    data = folder(root, validation=["val", "val2"], abnormal="crack", protocol=protocol, test_share=0)
    data.setup()
    splits = {s.path: s.split for s in data.samples}
    assert [path for path in splits if splits[path] == "calibrate"] == ["val/0.png", "val/1.png", "val/2.png", "val2/deep/0.png"]
    assert [path for path in splits if splits[path] == "train"] == [f"normal/{i}.png" for i in range(10)]
    assert {path for path in splits if splits[path] == "test"} == {"crack/a.png", "crack/deep er/b.PNG"}
    with pytest.raises(InputError, match=r"two of the folders of .*data\.validation"):
        folder(root, validation="normal").setup()


def test_symlinked_folder(root, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("else where")
    make(elsewhere, "1.png", "2.png")
    (root / "linked").symlink_to(elsewhere)
    data = folder(root, normal="linked")
    assert {s.path for s in data.scan()} == {"linked/1.png", "linked/2.png"}
    data.setup()


@pytest.mark.parametrize(
    "layout",
    [
        ["crack/a.png", "crack/deep er/b.png", "höle ü/a.png", "höle ü/c.png"],
        ["crack/a_mask.png", "crack/deep er/b_mask.tif", "höle ü/a_mask.png", "höle ü/c.bmp"],
        ["crack/a.png", "b_mask.png", "höle ü/a.png", "some/where/c.png"],
    ],
    ids=["relative path", "_mask", "stem"],
)
def test_masks_are_found(root, layout):
    make(root, *(f"truth/{name}" for name in layout), value=255)
    make(root, "truth/0.png", "truth/normal/1_mask.png")  # of normal images: allowed and not used
    found = masks_of(folder(root, abnormal=["crack", "höle ü"], masks="truth"))
    images = ["crack/a.png", "crack/deep er/b.PNG", "höle ü/a.bmp", "höle ü/c.jpg"]
    assert found == {image: f"truth/{mask}" for image, mask in zip(images, layout, strict=True)}


def test_masks_inside_the_defect_folder_and_under_nested_names(root):
    make(root, "test/scratch/1.png", "gt/scratch/1_mask.png")
    assert masks_of(folder(root, abnormal=["test/scratch"], masks="gt")) == {"test/scratch/1.png": "gt/scratch/1_mask.png"}
    make(root, "flaw/1.png", "flaw/masks/1.png")
    assert masks_of(folder(root, abnormal="flaw", masks="flaw/masks")) == {"flaw/1.png": "flaw/masks/1.png"}


def test_an_image_without_a_mask_is_image_level_only(root):
    make(root, "truth/crack/a.png")
    found = masks_of(folder(root, abnormal=["crack", "höle ü"], masks="truth"))
    assert found == {"crack/a.png": "truth/crack/a.png", "crack/deep er/b.PNG": "", "höle ü/a.bmp": "", "höle ü/c.jpg": ""}


def test_ambiguous_masks(root):
    make(root, "truth/a.png")
    with pytest.raises(InputError, match=r"truth/a\.png: fits .*crack/a\.png.*höle ü/a\.bmp"):
        folder(root, abnormal=["crack", "höle ü"], masks="truth").scan()
    make(root, "truth/a.tif")
    with pytest.raises(InputError, match=r"crack/a\.png: 2 masks fit"):
        folder(root, abnormal="crack", masks="truth").scan()


def test_mask_with_no_image_is_listed(root):
    make(root, "truth/crack/a.png", "truth/crack/lost.png", "truth/crack/gone_mask.png")
    with pytest.raises(InputError) as error:
        folder(root, abnormal="crack", masks="truth").setup()
    assert "lost.png" in str(error.value) and "gone_mask.png" in str(error.value) and "crack/a.png" not in str(error.value)


def test_a_mask_in_a_defect_folder_is_not_lent_to_another(root):
    make(root, "crack/1.png", "höle ü/2.png", "truth/höle ü/1.png")  # no image höle ü/1, but crack/1 and normal/1
    with pytest.raises(InputError, match=r"höle ü/1\.png: a mask without an image"):
        folder(root, abnormal=["crack", "höle ü"], masks="truth").scan()


def test_masks_of_a_defect_left_out_are_no_orphans(root):
    make(root, "test/hole/0.png", "test/scratch/0.png", "gt/hole/0_mask.png", "gt/scratch/0_mask.png")
    assert masks_of(folder(root, abnormal="test/hole", masks="gt")) == {"test/hole/0.png": "gt/hole/0_mask.png"}
    (root / "gt/hole/0_mask.png").unlink()
    assert masks_of(folder(root, abnormal="test/hole", masks="gt")) == {"test/hole/0.png": ""}  # not that of the scratch


def test_folders_outside_of_the_root(root, tmp_path_factory):
    make(tmp_path_factory.mktemp("other") / "masks", "a.png")
    elsewhere = next(tmp_path_factory.getbasetemp().glob("other*/masks"))
    with pytest.raises(InputError, match=r"outside of data\.root"):
        folder(root, abnormal="crack", masks=str(elsewhere)).scan()
    with pytest.raises(InputError, match=r"outside of data\.root"):
        folder(root / "crack", normal="../normal").scan()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"normal": "god"}, "god: no such folder; found crack, empty, höle ü, normal"),
        ({"normal": "empty"}, "empty: no image in it"),
        ({"abnormal": ["crack", "empty"]}, "empty: no image in it"),
        ({"masks": "nowhere", "abnormal": "crack"}, "nowhere: no such folder (data.masks)"),
        ({"category": "crak"}, "did you mean 'crack'?"),
        ({"normal_test": "normal"}, "in two of the folders"),
        ({"normal": ".", "abnormal": "crack"}, "in two of the folders"),
        ({"abnormal": ["crack", "crack/deep er"]}, "in two of the folders"),
    ],
)
def test_layouts_that_cannot_be(root, changes, says):
    (root / "empty").mkdir()
    with pytest.raises(InputError) as error:
        folder(root, **changes).setup()
    assert says in str(error.value) and str(root) in str(error.value)


@pytest.mark.parametrize(("key", "value"), [("test_share", 1), ("normal", [])])
def test_values(tmp_path, key, value):
    with pytest.raises(InputError, match=rf"data\.{key}"):
        folder(tmp_path, **{key: value})


def test_normal_images_alone_are_enough_to_train(root, caplog):
    data = folder(root)
    data.setup()
    assert "data.abnormal" in caplog.text and len(list(data.test_dataloader())) == 1


def test_too_few_images_are_explained_by_the_key(tmp_path):
    make(tmp_path, "normal/0.png", "crack/0.png")
    with pytest.raises(InputError, match=r"no train image; .*data\.test_share=0\.2"):
        folder(tmp_path, abnormal="crack").setup()
    with pytest.raises(InputError, match=r"no test image; .*data\.abnormal=.*data\.test_share=0"):
        folder(tmp_path, test_share=0).setup()


VISA = """object,split,label,image,mask
a,train,normal,a/0.png,
a,test,normal,a/1.png,
a,test,anomaly,a/2.png,a/m/2.png
b,test,normal,b.png,
"""
# files and what they are: split, defect type and mask
LAYOUTS = {
    "MVTec AD": {
        "train/good/0.png": "train good",
        "test/good/0.png": "test good",
        "test/hole/0.png": "test hole ground_truth/hole/0_mask.png",
        "validation/good/7.png": "calibrate good",
    },
    "BTAD": {"train/ok/0.png": "train good", "test/ok/0.png": "test good", "test/ko/0.png": "test ko ground_truth/ko/0.bmp"},
    "masks beside images": {
        "kos1/Part0.jpg": "train good",
        "kos1/Part1.jpg": "train good",
        "kos1/Part2.jpg": "test defect kos1/Part2_label.bmp",
    },
    "VisA": {"a/0.png": "train good", "a/1.png": "test good", "a/2.png": "test anomaly a/m/2.png"},
    "normal images alone": {"0.png": "train good", "1.jfif": "train good"},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_recognised(tmp_path, caplog, name):
    expected = {path: kind.split(" ") for path, kind in LAYOUTS[name].items()}
    for path, (*_, last) in expected.items():
        if path.endswith(".jfif"):
            save(tmp_path / path, np.zeros((16, 20), np.uint8), format="JPEG")
            continue
        make(tmp_path, path)
        make(tmp_path, *[last] * ("." in last), value=255)
    category = None
    if name == "VisA":
        (tmp_path / "split_csv").mkdir()
        (tmp_path / "split_csv/1cls.csv").write_text(VISA)
        category = "a"
        with pytest.raises(InputError, match=r"data\.category=null: .*1cls\.csv; found a, b"):
            folder(tmp_path).scan()
    if name == "masks beside images":
        make(tmp_path, "kos1/Part0_label.bmp", "kos1/Part1_label.bmp", value=0)
    with caplog.at_level("INFO"):
        found = {s.path: [s.split, s.defect, s.mask] for s in folder(tmp_path, category=category, test_share=0).scan()}
    assert found == {path: [*kind, ""][:3] for path, kind in expected.items()} and name in caplog.text
    make(tmp_path, "another.png")
    make(tmp_path, "deep/one.png")
    if name in ("masks beside images", "normal images alone"):
        with pytest.raises(InputError, match=r"data\.normal=<folder>"):
            folder(tmp_path).scan()


def test_an_official_split_with_masks_beside_its_images(tmp_path, caplog):
    for part in ("train", "test"):
        make(tmp_path, f"{part}/0.png", f"{part}/1.png")
        make(tmp_path, f"{part}/0_GT.png", value=0)
        make(tmp_path, f"{part}/1_GT.png", value=255)
    with caplog.at_level("INFO"):
        found = {s.path: (s.split, s.label) for s in folder(tmp_path).scan()}
    assert found == {"train/0.png": ("train", 0), "test/0.png": ("test", 0), "test/1.png": ("test", 1)}
    assert "1 defective images of train/ are left out" in caplog.text


def test_masks_beside_images_are_no_images(root, caplog):
    make(root, "normal/3_mask.png", "normal/gas_mask.png", value=0)
    make(root, "crack/a_label.bmp", value=255)
    with caplog.at_level("INFO"):
        data = folder(root, abnormal="crack", test_share=0)
        data.setup()
    assert masks_of(data) == {"crack/a.png": "crack/a_label.bmp", "crack/deep er/b.PNG": ""}
    assert {s.path for s in data.samples if not s.label} == {*(f"normal/{i}.png" for i in range(10)), "normal/gas_mask.png"}
    assert "2 masks beside their images" in caplog.text
    make(root, "normal/3_mask.png", value=255)
    with pytest.raises(InputError, match=r"normal/3\.png: label 0, but normal/3_mask\.png marks pixels"):
        folder(root, abnormal="crack").setup()

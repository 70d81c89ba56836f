"""A run that takes in more images is the run that would have been fitted to all of them."""

import shutil
from pathlib import Path

import pytest
import torch
from support import tiny_run

from blemish.edge.errors import InputError
from blemish.run.checkpoint import load
from blemish.run.train import train

# what an update must reproduce of a fit to all images; PatchCore's bank is another coreset by design
EXACT = ["padim", "padim-woodbury", "dfkde", "dfkdm", "dfm", "spade"]


@pytest.fixture(scope="module")
def halves(tiny, tmp_path_factory) -> tuple[Path, Path]:
    """The tiny data set with 16 of its 24 normal images, and with all of them."""
    root = tmp_path_factory.mktemp("halves")
    for name in ("first", "all"):
        shutil.copytree(tiny, root / name)
    for path in sorted((root / "first" / "normal").iterdir())[16:]:
        path.unlink()
    return root / "first", root / "all"


def method_of(name: str) -> list[str]:
    return ["model=padim", "model.n_features=100"] if name == "padim-woodbury" else [f"model={name}"] + few(name)


def few(name: str) -> list[str]:
    return ["model.n_features=6"] if name == "padim" else []


@pytest.mark.parametrize("name", EXACT)
def test_an_update_gives_what_a_fit_to_all_gives(name, halves, tmp_path):
    first, both = halves
    options = ["protocol=paper", *method_of(name)]
    train(tiny_run(first, tmp_path / "first", *options))
    metrics = train(tiny_run(both, tmp_path / "updated", *options, f"update='{tmp_path / 'first'}'"))
    expected = train(tiny_run(both, tmp_path / "both", *options))
    for key in ("image_auroc", "pixel_auroc"):
        assert metrics[key] == pytest.approx(expected[key], abs=1e-4)
    updated, model = (load(tmp_path / folder, "cpu")[1] for folder in ("updated", "both"))
    assert updated.fitted == model.fitted == 24
    image = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(updated(image).score, model(image).score, rtol=1e-4, atol=1e-5)


def test_padim_passes_from_samples_to_moments(halves, tmp_path):
    first, both = halves
    options = ["protocol=paper", "model=padim", "model.n_features=20"]  # 16 ≤ 20 < 24
    train(tiny_run(first, tmp_path / "first", *options))
    train(tiny_run(both, tmp_path / "updated", *options, f"update='{tmp_path / 'first'}'"))
    train(tiny_run(both, tmp_path / "both", *options))
    updated, model = (load(tmp_path / folder, "cpu")[1] for folder in ("updated", "both"))
    assert updated.woodbury.numel() == 0
    torch.testing.assert_close(updated.mean, model.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(updated.cholesky, model.cholesky, rtol=1e-4, atol=1e-4)


def test_a_bank_keeps_what_it_has_and_covers_the_new(halves, tmp_path):
    first, both = halves
    options = ["protocol=paper", "model=patchcore", "model.coreset_ratio=0.1"]
    train(tiny_run(first, tmp_path / "first", *options))
    train(tiny_run(both, tmp_path / "updated", *options, f"update='{tmp_path / 'first'}'"))
    old, new = (load(tmp_path / folder, "cpu")[1] for folder in ("first", "updated"))
    assert torch.equal(new.bank[: len(old.bank)], old.bank)
    assert int(new.patches) == 24 * int(old.patches) // 16
    assert len(new.bank) == int(old.patches * 0.1) + int((new.patches - old.patches) * 0.1)
    assert new.radius[-1] >= old.radius[-1]
    with pytest.raises(InputError, match="updated bank cannot be cut"):
        new.cut(0.01)


def test_the_threshold_comes_from_old_and_new_calibration_images(halves, tmp_path):
    first, both = halves
    for path in sorted((first / "normal").iterdir()):
        shutil.copy(path, tmp_path)
    train(tiny_run(first, tmp_path / "first", "model=padim"))
    old = load(tmp_path / "first", "cpu")[1].calibration
    fresh = tmp_path / "fresh"
    shutil.copytree(both, fresh)
    for path in sorted((fresh / "normal").iterdir())[:16]:
        path.unlink()
    train(tiny_run(fresh, tmp_path / "updated", "model=padim", f"update='{tmp_path / 'first'}'"))
    model = load(tmp_path / "updated", "cpu")[1]
    assert len(model.calibration) == len(old) + 2  # a fifth of 8, and what is held out anyway
    assert model.fitted == 16 - len(old) + 6
    again = tiny_run(fresh, tmp_path / "again", "model=padim", f"update='{tmp_path / 'updated'}'")
    with pytest.raises(InputError, match="no new image"):
        train(again)


def test_errors(halves, tmp_path):
    first, both = halves
    train(tiny_run(first, tmp_path / "first", "model=self_similarity", "image_size=64"))
    with pytest.raises(InputError, match="update: SelfSimilarity"):
        train(tiny_run(both, tmp_path / "updated", f"update='{tmp_path / 'first'}'"))
    with pytest.raises(InputError, match="no config.yaml there"):
        train(tiny_run(both, tmp_path / "updated", f"update='{tmp_path / 'nothing'}'"))
    with pytest.raises(InputError, match="choose another folder"):
        train(tiny_run(both, tmp_path / "first", f"update='{tmp_path / 'first'}'"))

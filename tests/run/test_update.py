"""A run that takes in more images is the run that would have been fitted to all of them."""

import shutil
from pathlib import Path

import pytest
import torch
from support import tiny_run

from blemish.detector import OnePassDetector
from blemish.edge.errors import InputError
from blemish.run.checkpoint import load
from blemish.run.train import train

# what an update must reproduce of a fit to all images; PatchCore's bank is another coreset by design
EXACT = [["model=padim", "model.n_features=6"], ["model=padim", "model.n_features=100"]]  # Gaussians and, with few images, samples
EXACT += [[f"model={name}"] for name in ("dfkde", "dfkdm", "dfm", "spade")]


@pytest.fixture(scope="module")
def halves(tiny, tmp_path_factory) -> tuple[Path, Path]:
    """The tiny data set with 16 of its 24 normal images, and with all of them."""
    root = tmp_path_factory.mktemp("halves")
    for name in ("first", "all"):
        shutil.copytree(tiny, root / name)
    for path in sorted((root / "first" / "normal").iterdir())[16:]:
        path.unlink()
    return root / "first", root / "all"


def updated(halves: tuple[Path, Path], place: Path, *options: str) -> tuple[dict, OnePassDetector]:
    """Metrics and model of a run on all images that updates one on the first, which lies in place/first."""
    train(tiny_run(halves[0], place / "first", *options))
    metrics = train(tiny_run(halves[1], place / "updated", *options, f"update='{place / 'first'}'"))
    return metrics, load(place / "updated", "cpu")[1]


def complete(halves: tuple[Path, Path], place: Path, *options: str) -> tuple[dict, OnePassDetector]:
    """Metrics and model of a fit to all images."""
    return train(tiny_run(halves[1], place / "both", *options)), load(place / "both", "cpu")[1]


@pytest.mark.parametrize("options", EXACT, ids=" ".join)
def test_an_update_gives_what_a_fit_to_all_gives(options, halves, tmp_path):
    (metrics, found), (expected, model) = (run(halves, tmp_path, "protocol=paper", *options) for run in (updated, complete))
    for key in ("image_auroc", "pixel_auroc"):
        assert metrics[key] == pytest.approx(expected[key], abs=1e-4)
    assert found.fitted == model.fitted == 24
    image = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(found(image).score, model(image).score, rtol=1e-4, atol=1e-5)


def test_padim_passes_from_samples_to_moments(halves, tmp_path):
    options = ["protocol=paper", "model=padim", "model.n_features=20"]  # 16 ≤ 20 < 24
    (_, found), (_, model) = (run(halves, tmp_path, *options) for run in (updated, complete))
    assert found.woodbury.numel() == 0
    torch.testing.assert_close(found.mean, model.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.cholesky, model.cholesky, rtol=1e-4, atol=1e-4)


def test_a_bank_keeps_what_it_has_and_covers_the_new(halves, tmp_path):
    _, new = updated(halves, tmp_path, "protocol=paper", "model=patchcore", "model.coreset_ratio=0.1")
    old = load(tmp_path / "first", "cpu")[1]
    assert torch.equal(new.bank[: len(old.bank)], old.bank)
    assert int(new.patches) == 24 * int(old.patches) // 16
    assert len(new.bank) == int(old.patches * 0.1) + int((new.patches - old.patches) * 0.1)
    assert new.radius[-1] >= old.radius[-1]
    with pytest.raises(InputError, match="was updated"):
        new.cut(0.01)


def test_the_threshold_comes_from_old_and_new_calibration_images(halves, tmp_path):
    first, both = halves
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
    cases = [("updated", "first", "SelfSimilarity"), ("updated", "nothing", r"config\.yaml"), ("first", "first", "choose another folder")]
    for folder, past, match in cases:
        with pytest.raises(InputError, match=match):
            train(tiny_run(both, tmp_path / folder, f"update='{tmp_path / past}'"))

"""PatchCore against its paper written plainly, its nested coresets, and its refusal to outgrow the memory."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import gaussian_filter
from support import fitted, images, make, tiny_run

from blemish.api import AnomalyDetector
from blemish.edge.errors import InputError
from blemish.methods import patchcore
from blemish.methods.patchcore import PatchCoreEnsemble, embed, forecast, weight
from blemish.ops.coreset import project
from blemish.run.checkpoint import load
from blemish.run.train import train


def detector(ratio=0.05, **changes):
    return make("patchcore", coreset_ratio=ratio, **{"embedding": "concatenate", "projection": 1000, **changes})


def plain_patches(model, pictures):
    """Patch features (B, h, w, D) in float64."""
    maps = [F.avg_pool2d(stage.double(), 3, 1, 1) for stage in model.features(pictures)]
    maps = [F.interpolate(stage, maps[0].shape[-2:], mode="bilinear", align_corners=False) for stage in maps]
    return torch.cat(maps, 1).movedim(1, -1).numpy()


def plain_coreset(patches, count, start):
    """The textbook's greedy k-center: every patch is looked at for every centre."""
    chosen = [start]
    while len(chosen) < count:
        chosen.append(int(np.min([np.linalg.norm(patches - patches[c], axis=1) for c in chosen], axis=0).argmax()))
    return chosen


def plain_score(patches, bank, n, b):
    """Distances (h, w) and the score by eq. 6 and 7, the exponents divided by √D, for the patches (h, w, D) of one image."""
    distance = np.array([[np.sort(np.linalg.norm(bank - x, axis=1))[:n].mean() for x in row] for row in patches])
    test = patches[np.unravel_index(distance.argmax(), distance.shape)]
    nearest = bank[np.linalg.norm(bank - test, axis=1).argmin()]
    around = bank[np.linalg.norm(bank - nearest, axis=1).argsort()[:b]]
    exponents = [np.linalg.norm(rows - test, axis=-1) / np.sqrt(len(test)) for rows in (nearest, around)]
    factor = 1 - np.exp(exponents[0]) / np.exp(exponents[1]).sum() if b else 1
    return distance, factor * distance.max()


@pytest.mark.parametrize(("reweight", "b", "n"), [(True, 9, 1), (False, 0, 1), (4, 4, 3)])
def test_is_the_paper(reweight, b, n):
    model = fitted(detector(reweight=reweight, num_neighbors=n), images(6))
    flat = plain_patches(model, images(6)).reshape(-1, sum(model.backbone.channels))
    start = int(torch.randint(len(flat), (1,), generator=torch.Generator().manual_seed(0)))  # nothing was drawn for a projection
    chosen = plain_coreset(flat, int(0.05 * len(flat)), start)
    np.testing.assert_allclose(model.bank, flat[chosen], rtol=1e-4, atol=1e-5)
    left = np.min([np.linalg.norm(flat - flat[c], axis=1) for c in chosen], axis=0)
    assert float(model.radius[-1]) == pytest.approx(left.max(), rel=1e-4)

    found = model(images(3, seed=1))
    for patches, score, map in zip(plain_patches(model, images(3, seed=1)), *found, strict=True):
        distance, expected = plain_score(patches, flat[chosen], n, b)
        assert float(score) == pytest.approx(expected, rel=1e-4)
        up = F.interpolate(torch.from_numpy(distance)[None, None], (64, 64), mode="bilinear", align_corners=False)[0, 0].numpy()
        np.testing.assert_allclose(map, gaussian_filter(up, 4.0, mode="reflect", truncate=4), rtol=1e-3)


def test_the_reweighting_matters():
    """With distances in the tens exp saturates unless they are divided by √D: the factor would be that of the nearest row alone, 0."""
    bank = torch.randn(50, 1024, generator=torch.Generator().manual_seed(0))
    x = bank[:1] + 2 * torch.randn(8, 1024, generator=torch.Generator().manual_seed(1))  # distances of about 64 and 72
    factor = weight(x, (x - bank[0]).norm(dim=1), bank, torch.zeros(8, dtype=torch.long), 9, 1024)
    assert ((factor > 0.85) & (factor < 0.95)).all()


def test_the_coreset_is_chosen_in_the_projection_and_kept_unprojected():
    model = fitted(detector(projection=8, seed=4), images(6))
    generator = torch.Generator().manual_seed(4)
    flat = model.collect(model.features(images(6))).flatten(0, 1)
    small = project(flat, 8, generator)
    start = int(torch.randint(len(flat), (1,), generator=generator))
    torch.testing.assert_close(model.bank, flat[plain_coreset(small.double().numpy(), len(model.bank), start)], rtol=1e-4, atol=1e-5)


def plain_pooling(x, count):
    """Adaptive average pooling of the last axis, window by window."""
    length = x.shape[-1]
    return np.stack([x[..., i * length // count : -(-(i + 1) * length // count)].mean(-1) for i in range(count)], -1)


def plain_embedding(maps, embedding, k, embed_dim):
    """The order of the authors' code: the k×k values of every cell, resized, each stage pooled, all pooled; or of their means."""
    parts = []
    for stage in maps:
        cells = F.unfold(stage.double(), k, padding=k // 2).unflatten(1, (-1, k * k)).unflatten(3, stage.shape[2:])  # (B, C, k², h, w)
        cells = cells.flatten(1, 2) if embedding == "official" else cells.mean(2)
        cells = F.interpolate(cells, maps[0].shape[-2:], mode="bilinear").flatten(2).mT.numpy()
        parts.append(cells if embedding == "concatenate" else plain_pooling(cells, embed_dim))
    x = np.concatenate(parts, -1)
    return x if embedding == "concatenate" else plain_pooling(x, embed_dim)


@pytest.mark.parametrize("embedding", ["official", "mean", "concatenate"])
@pytest.mark.parametrize(("patch_size", "embed_dim"), [(1, 7), (3, 20), (3, 55), (5, 64), (3, 300)])
def test_embeddings(embedding, patch_size, embed_dim):
    maps = [torch.rand(2, 16, 6, 6), torch.rand(2, 40, 3, 3)]
    found = embed(maps, embedding, patch_size, embed_dim)
    expected = plain_embedding(maps, embedding, patch_size, embed_dim)
    assert found.is_contiguous()
    if found.shape[2] == expected.shape[2]:
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    else:  # a stage's share of 32 or 150 values made of 16 or 40
        assert embed_dim // 2 > 16 and found.shape[2] < embed_dim
        expected = torch.from_numpy(expected).flatten(0, 1)
        torch.testing.assert_close(torch.pdist(found.flatten(0, 1).double()), torch.pdist(expected), rtol=1e-4, atol=1e-5)


def test_three_stages_get_equal_shares():
    maps = [torch.rand(2, channels, 8 // 2**i, 8 // 2**i) for i, channels in enumerate((10, 12, 22))]
    for embedding in ("official", "mean"):
        for embed_dim in (30, 31):
            expected = plain_embedding(maps, embedding, 3, embed_dim)
            np.testing.assert_allclose(embed(maps, embedding, 3, embed_dim), expected, rtol=1e-4, atol=1e-5)


def test_a_random_coreset_and_none():
    every, drawn, few = (
        fitted(detector(ratio, coreset=coreset), images(6)) for ratio, coreset in ((0.1, "none"), (0.2, "random"), (0.1, "random"))
    )
    assert len(every.bank) == every.patches == 384
    assert len(drawn.bank) == 76
    assert every(images(6)).map.abs().max() == 0
    assert not len(drawn.radius)
    assert len({tuple(row) for row in drawn.bank.tolist()} & {tuple(row) for row in every.bank.tolist()}) == len(drawn.bank)
    drawn.cut(0.1)
    assert torch.equal(drawn.bank, few.bank)
    with pytest.raises(InputError, match=r"ratio=0\.1"):
        every.cut(0.1)


def test_a_cut_is_a_fit_at_the_smaller_ratio():
    large, small = (fitted(detector(ratio, projection=8), images(8)) for ratio in (0.2, 0.03))
    large.calibration = torch.ones(5, 2)
    large.cut(0.03)
    assert large.state_dict().keys() == small.state_dict().keys()
    for key, value in small.state_dict().items():
        assert torch.equal(large.state_dict()[key], value), key
    assert torch.equal(large(images(2, 1)).map, small(images(2, 1)).map)
    for ratio in (0.5, 0.0, -1.0):
        with pytest.raises(InputError, match=r"ratio=.*\(0, 0.0"):
            large.cut(ratio)


def test_more_centres_cover_better():
    radius = fitted(detector(0.3), images(4)).radius
    assert (radius.diff() <= 0).all()
    assert fitted(detector(1.0), images(2)).radius[-1] == 0


def test_the_coreset_depends_on_the_seed():
    a, b = (fitted(detector(projection=8, seed=seed), images(8)).bank for seed in (0, 1))
    assert not torch.equal(a, b)


def test_normal_patches_of_a_full_bank_are_at_distance_zero():
    assert fitted(detector(1.0), images(3))(images(3)).map.abs().max() == 0


def test_other_image_sizes_are_scored_by_the_same_bank():
    assert fitted(detector(), images(4))(images(2, side=96)).map.shape == (2, 96, 96)


def test_a_bank_of_one_patch_scores_its_distance():
    model = fitted(detector(1e-9), images(4))
    assert len(model.bank) == 1
    score = model(images(2, 1)).score
    torch.testing.assert_close(score, torch.cdist(model.collect(model.features(images(2, 1))), model.bank).amax((1, 2)))


def test_refuses_before_it_outgrows_the_memory(monkeypatch):
    monkeypatch.setattr(patchcore, "available_memory", lambda device: 2**20)
    with pytest.raises(InputError, match=r"4\.79 GiB.*5000.*64.*image_size.*model\.embed_dim.*model\.stages"):
        detector().new_state(5000).update(torch.empty(1, 64, 2000))
    detector().new_state(2).update(torch.empty(1, 64, 128))


def test_forecast_covers_what_a_fit_takes():
    """The large tensors of a fit, counted by hand: patches, their projection, its centred copy, four columns of 8 bytes."""
    assert forecast(10, 100, 300, 128) >= 10 * 100 * (4 * (300 + 128 + 128) + 4 * 8)
    assert forecast(10, 100, 50, 128) < forecast(10, 100, 51, 128) <= 1.1 * 10 * 100 * (8 * 51 + 64)


def test_whitened_patches_have_covariance_one():
    model = fitted(detector(whiten=True, coreset="none"), images(12))
    np.testing.assert_allclose(model.bank.mean(0), 0, atol=1e-3)
    variance = np.linalg.eigvalsh(np.cov(model.bank.numpy().T))
    assert variance.max() == pytest.approx(1, abs=0.01)
    flat = plain_patches(model, images(12)).reshape(len(model.bank), -1)
    spread, axes = np.linalg.eigh(np.cov(flat.T))
    expected = (flat - flat.mean(0)) @ axes / np.sqrt(spread + patchcore.SHRINKAGE * spread.mean())
    np.testing.assert_allclose(model.bank @ model.bank.T, expected @ expected.T, rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("whiten", [True, False])
def test_a_bounded_bank_covers_all_patches(whiten, monkeypatch):
    monkeypatch.setattr(patchcore, "KEPT", 1)
    monkeypatch.setattr(patchcore, "HELD", 3)
    model = detector(20, whiten=whiten)
    state = model.new_state(40)
    for part in images(40).split(2):
        state.update(model.collect(model.features(part)))
        assert len(state.compute()) < 3 * 20 + 2 * 64
    model.fit(state)
    assert len(model.bank) == 20
    assert int(model.patches) == 40 * 64
    patches = model.whitened(model.collect(model.features(images(40)))).flatten(0, 1)
    assert torch.cdist(model.bank, patches).amin(1).max() < 1e-2  # they are patches
    full = fitted(detector(20 / len(patches) + 1e-9, whiten=whiten), images(40))
    far = [torch.cdist(patches, bank).amin(1).max() for bank in (model.bank, full.bank)]
    assert far[0] < 2 * far[1]
    with pytest.raises(InputError, match="update"):
        model.restore(state)


def test_a_bounded_bank_of_few_patches_is_that_of_all(monkeypatch):
    monkeypatch.setattr(patchcore, "HELD", 100)
    bounded, full = (fitted(detector(ratio), images(6)) for ratio in (19, 0.05))
    torch.testing.assert_close(bounded.bank, full.bank)


def ensemble(pictures, *backbones):
    return fitted(PatchCoreEnsemble([detector(0.5, backbone=name) for name in backbones]), pictures)


@torch.no_grad()
def test_an_ensemble_is_the_mean_in_units_of_each_banks_spread():
    names, pictures, tested = ("test_resnet", "test_efficientnet"), images(8), images(3, seed=1)
    found, expected = ensemble(pictures, *names)(tested), []
    for name in names:
        one = fitted(detector(0.5, backbone=name), pictures)
        spread = (one.bank - one.bank.mean(0)).norm(dim=1).square().mean().sqrt()
        expected.append([part / spread for part in one(tested)])
    for mine, parts in zip(found, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(mine, torch.stack(parts).mean(0))


@torch.no_grad()
def test_an_ensemble_of_one_backbone_twice_ranks_as_it_does():
    model, twice, tested = fitted(detector(0.5), images(8)), ensemble(images(8), "test_resnet", "test_resnet"), images(3, seed=1)
    torch.testing.assert_close(twice(tested).map * twice.spread[0], model(tested).map)
    rows, maps = [0, 3], model.features(images(8)[[0, 3]])
    left = twice.leave_one_out([*maps, *maps], (64, 64), rows)
    torch.testing.assert_close(left.score * twice.spread[0], model.leave_one_out(maps, (64, 64), rows).score)


ENSEMBLE = ["model=patchcore", "model.coreset_ratio=0.3", "backbone=[test_resnet,test_efficientnet]"]


def test_an_ensemble_trains_and_loads(tiny, tmp_path):
    metrics = train(tiny_run(tiny, tmp_path / "run", *ENSEMBLE, "calibrate=cross"))
    assert metrics["image_auroc"] > 0.9
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["backbone"] == "test_resnet+test_efficientnet" and record["weights_digest"].count("+") == 1
    assert record["calibration"]["promise"] == "cross" and record["calibration"]["n"] == 24
    assert AnomalyDetector.load(tmp_path / "run", device="cpu").predict(next((tiny / "square").iterdir())).decision


def test_an_ensemble_is_updated(tiny, tmp_path):
    fresh = shutil.copytree(tiny, tmp_path / "fresh")
    for path in (fresh / "normal").iterdir():
        Image.open(path).transpose(Image.Transpose.ROTATE_180).save(path)
    train(tiny_run(tiny, tmp_path / "run", *ENSEMBLE, "protocol=paper"))
    train(tiny_run(fresh, tmp_path / "more", *ENSEMBLE, "protocol=paper", f"update='{tmp_path / 'run'}'"))
    old, new = (load(tmp_path / name, "cpu")[1] for name in ("run", "more"))
    for before, after in zip(old.members, new.members, strict=True):
        assert len(after.bank) > len(before.bank) and torch.equal(after.bank[: len(before.bank)], before.bank)


def test_an_ensemble_from_python(tiny, tmp_path):
    detector = AnomalyDetector("patchcore", backbone=["test_resnet", "test_efficientnet"], weights="random", image_size=64, device="cpu")
    detector.train(tiny / "normal")
    detector.save(tmp_path / "x.ckpt")
    path = next((tiny / "square").iterdir())
    assert AnomalyDetector.load(tmp_path / "x.ckpt", device="cpu").predict(path).score == detector.predict(path).score


@pytest.mark.parametrize(("options", "says"), [
    (["model=patchcore", "backbone=[test_resnet,nothing]"], "nothing"),
    (["model=padim", "backbone=[test_resnet,test_efficientnet]"], "expected one name"),
    (["model=patchcore", "backbone=[test_resnet]"], "expected one name"),
    (["model=patchcore", "backbone=[test_resnet,test_efficientnet]", "calibrate=full", "model.coreset=none"], "no proof"),
])  # fmt: skip
def test_what_is_no_ensemble_is_refused(options, says, tiny, tmp_path):
    with pytest.raises(InputError, match=says):
        train(tiny_run(tiny, tmp_path / "run", *options))

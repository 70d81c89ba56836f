"""PatchCore against its paper written plainly, its nested coresets, and its refusal to outgrow the memory."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from support import fitted, images, make

from blemish.edge.errors import InputError
from blemish.methods import patchcore
from blemish.methods.patchcore import embed, forecast
from blemish.ops.coreset import project


def detector(ratio=0.05, **changes):
    return make("patchcore", coreset_ratio=ratio, **{"embed_dim": None, "projection": 1000, **changes})


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


def plain_score(patches, bank, b):
    """Distances (h, w) and the score by eq. 6 and 7 for the patches (h, w, D) of one image."""
    distance = np.array([[np.linalg.norm(bank - x, axis=1).min() for x in row] for row in patches])
    test = patches[np.unravel_index(distance.argmax(), distance.shape)]
    nearest = bank[np.linalg.norm(bank - test, axis=1).argmin()]
    around = bank[np.linalg.norm(bank - nearest, axis=1).argsort()[:b]]
    factor = 1 - np.exp(np.linalg.norm(test - nearest)) / np.exp(np.linalg.norm(around - test, axis=1)).sum() if b else 1
    return distance, factor * distance.max()


@pytest.mark.parametrize(("reweight", "b"), [(True, 9), (False, 0), (4, 4)])
def test_is_the_paper(reweight, b):
    model = fitted(detector(reweight=reweight), images(6))
    flat = plain_patches(model, images(6)).reshape(-1, sum(model.backbone.channels))
    start = int(torch.randint(len(flat), (1,), generator=torch.Generator().manual_seed(0)))  # nothing was drawn for a projection
    chosen = plain_coreset(flat, int(0.05 * len(flat)), start)
    np.testing.assert_allclose(model.bank, flat[chosen], rtol=1e-4, atol=1e-5)
    left = np.min([np.linalg.norm(flat - flat[c], axis=1) for c in chosen], axis=0)
    assert float(model.radius[-1]) == pytest.approx(left.max(), rel=1e-4)

    found = model(images(3, seed=1))
    for patches, score, map in zip(plain_patches(model, images(3, seed=1)), *found, strict=True):
        distance, expected = plain_score(patches, flat[chosen], b)
        assert float(score) == pytest.approx(expected, rel=1e-4)
        up = F.interpolate(torch.from_numpy(distance)[None, None], (64, 64), mode="bilinear", align_corners=False)[0, 0].numpy()
        np.testing.assert_allclose(map, gaussian_filter(up, 4.0, mode="reflect", truncate=4), rtol=1e-3)


def test_the_coreset_is_chosen_in_the_projection_and_kept_unprojected():
    model = fitted(detector(projection=8, seed=4), images(6))
    generator = torch.Generator().manual_seed(4)
    flat = model.collect(model.features(images(6))).flatten(0, 1)
    small = project(flat, 8, generator)
    start = int(torch.randint(len(flat), (1,), generator=generator))
    torch.testing.assert_close(model.bank, flat[plain_coreset(small.double().numpy(), len(model.bank), start)], rtol=1e-4, atol=1e-5)


def plain_pooling(maps, embed_dim):
    """The official order: 3×3 means, resized, each stage pooled, all pooled."""
    size = maps[0].shape[-2:]
    parts = [F.interpolate(F.avg_pool2d(m, 3, 1, 1), size, mode="bilinear").flatten(2).transpose(1, 2) for m in maps]
    return F.adaptive_avg_pool1d(torch.cat([F.adaptive_avg_pool1d(p, embed_dim) for p in parts], 2), embed_dim)


@pytest.mark.parametrize("embed_dim", [1, 7, 20, 55])
def test_pools_the_stages_to_equal_shares(embed_dim):
    maps = [torch.rand(2, 16, 6, 6), torch.rand(2, 40, 3, 3)]
    torch.testing.assert_close(embed(maps, embed_dim), plain_pooling(maps, embed_dim))


@pytest.mark.parametrize("embed_dim", [56, 64, 1000])
def test_pooling_to_more_channels_keeps_its_distances_in_no_more_room(embed_dim):
    maps = [torch.rand(2, 16, 6, 6), torch.rand(2, 40, 3, 3)]
    x = embed(maps, embed_dim)
    assert x.shape == (2, 36, 56)
    expected = plain_pooling([m.double() for m in maps], embed_dim).flatten(0, 1)
    torch.testing.assert_close(torch.pdist(x.flatten(0, 1).double()), torch.pdist(expected), rtol=1e-4, atol=1e-5)


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

"""SPADE against its paper written plainly, its search, and its outlier filter."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from sklearn.metrics import pairwise_distances
from support import fitted, images, make

from blemish.edge.errors import InputError
from blemish.methods import spade
from blemish.methods.spade import by_threads, inliers, nearest_distance


def detector(**changes):
    return make("spade", **{"neighbors": 3, "nu": 0.1, **changes})


def resized(stage, grid, align):
    """A stage (B, C, h', w') on a grid (h, w): the nearest sample by integer arithmetic, or torch's bilinear resizing in float64."""
    h, w = grid
    if align == "bilinear":
        return F.interpolate(stage.double(), grid, mode="bilinear", align_corners=False)
    return stage.double()[:, :, [i * stage.shape[2] // h for i in range(h)]][..., [j * stage.shape[3] // w for j in range(w)]]


def plain_map(query, gallery):
    """Distance (h, w) of each position (h, w, C) to the nearest of all positions of the gallery (K, h, w, C)."""
    others = gallery.reshape(-1, gallery.shape[-1])
    return np.array([[np.linalg.norm(others - x, axis=1).min() for x in row] for row in query])


@pytest.mark.parametrize(("matching", "align"), [("concatenated", "bilinear"), ("concatenated", "nearest"), ("per_stage", "bilinear")])
@pytest.mark.parametrize(("stages", "global_stage"), [((1, 2, 3), 4), ((2,), 3), ((1, 3), 1)])
def test_is_the_paper(stages, global_stage, matching, align):
    model, test = fitted(detector(stages=list(stages), global_stage=global_stage, matching=matching, align=align), images(7)), images(2, 1)
    train_maps, test_maps = model.features(images(7)), model.features(test)
    at = list(dict.fromkeys([*stages, global_stage])).index(global_stage)
    globals_ = [maps[at].double().mean((2, 3)).numpy() for maps in (train_maps, test_maps)]
    count = len(stages)
    for b, (score, map) in enumerate(zip(*model(test), strict=True)):
        away = np.linalg.norm(globals_[0] - globals_[1][b], axis=1)
        near = away.argsort()[:3]
        assert float(score) == pytest.approx(away[near].mean(), rel=1e-5)
        expected = []
        for group in [[s] for s in range(count)] if matching == "per_stage" else [range(count)]:
            grid = train_maps[group[0]].shape[-2:]
            parts = ([resized(maps[s][keep], grid, align) for s in group] for maps, keep in ((test_maps, [b]), (train_maps, near)))
            query, gallery = (torch.cat(part, 1).permute(0, 2, 3, 1).numpy() for part in parts)
            distance = torch.from_numpy(plain_map(query[0], gallery))
            expected.append(F.interpolate(distance[None, None], (64, 64), mode="bilinear", align_corners=False)[0, 0].numpy())
        np.testing.assert_allclose(map, gaussian_filter(np.mean(expected, 0), 4.0, mode="reflect", truncate=4), rtol=2e-3)


def test_the_score_may_be_the_maps():
    model, other = (fitted(detector(score=score), images(5)) for score in ("max", "neighbors"))
    score, map = model(images(2, 1))
    assert torch.equal(score, map.amax((1, 2))) and torch.equal(map, other(images(2, 1)).map)
    assert model.not_exportable and not other.not_exportable


@pytest.mark.parametrize("tile", [2**20, 50])
def test_nearest_distances_are_those_to_all_parts(tile, monkeypatch):
    monkeypatch.setattr(spade, "TILE", tile)
    g = torch.Generator().manual_seed(0)
    query, *parts = (5 + torch.randn(n, 6, generator=g) for n in (30, 20, 7, 25))
    expected = pairwise_distances(query.double().numpy(), torch.cat(parts).double().numpy()).min(1)
    np.testing.assert_allclose(nearest_distance(query, parts), expected, rtol=1e-4)
    assert nearest_distance(query, [parts[0], query]).max() < 1e-2


def test_threads_take_items_in_order_and_leave_the_number_of_threads_as_it_was():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        inner = by_threads(lambda i: torch.tensor([i, torch.get_num_threads()]), range(7), torch.device("cpu"))
        assert torch.equal(torch.stack(inner), torch.tensor([[i, 1] for i in range(7)]))
        with pytest.raises(ZeroDivisionError):
            by_threads(lambda i: torch.tensor(1 // i), range(3), torch.device("cpu"))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_training_image_finds_itself():
    model = fitted(detector(neighbors=1), images(4))
    score, map = model(images(4))
    largest = model(images(1, seed=1)).map.max()
    assert score.abs().max() < 1e-4
    assert map.max() < 0.02 * largest  # the gallery is held in float16


def test_all_images_if_fewer_than_the_neighbours():
    few, all_ = (fitted(detector(neighbors=n), images(4))(images(2, 1)) for n in (50, 4))
    assert torch.equal(few.score, all_.score)
    assert torch.equal(few.map, all_.map)


def test_the_gallery_is_coarse_stages_as_they_are_in_float16():
    model = fitted(detector(), images(6))
    held = sum(getattr(model, name).nbytes for name in model.names)
    c = model.backbone.channels
    assert held == 6 * 2 * (c[0] * 16 * 16 + c[1] * 8 * 8 + c[2] * 4 * 4)


def file_backed(tensor):
    """Whether the first byte lies in a mapping of a file, by the kernel's list."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            return len(line.split()) > 5 and "/" in line.split()[5]
    return False


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc to ask where memory comes from")
@pytest.mark.parametrize("outlier_filter", ["none", "ocsvm"])
def test_the_gallery_stays_on_disk(tmp_path, outlier_filter):
    model = fitted(detector(outlier_filter=outlier_filter), images(12))
    torch.save(model.state_dict(), tmp_path / "model.ckpt")
    loaded = detector(outlier_filter=outlier_filter)
    loaded.load_state_dict(torch.load(tmp_path / "model.ckpt", weights_only=True, mmap=True))
    for name in model.names:
        assert file_backed(getattr(model, name)) and file_backed(getattr(loaded, name))
        assert torch.equal(getattr(model, name), getattr(loaded, name))
    for a, b in zip(model(images(2, 1)), loaded(images(2, 1)), strict=True):
        assert torch.equal(a, b)


def test_updated_is_fitted_to_all():
    old, new = detector(), detector()
    fitted(old, images(7))
    state = new.new_state(12)
    old.restore(state)
    state.update(new.collect(new.features(images(12)[7:])))
    state.gather()
    new.fit(state)
    whole = fitted(detector(), images(12))
    torch.testing.assert_close(new(images(2, 1)).map, whole(images(2, 1)).map, rtol=1e-3, atol=1e-3)
    with pytest.raises(InputError, match="ocsvm"):
        fitted(detector(outlier_filter="ocsvm"), images(7)).restore(state)


def test_ocsvm_leaves_out_a_planted_outlier():
    """Noise of a narrow range among which one image is black and white stripes."""
    pictures = 0.5 + 0.1 * images(40)
    pictures[17] = (torch.arange(64) % 8 < 4).float()
    plain, filtered = (fitted(detector(neighbors=1, outlier_filter=name), pictures) for name in ("none", "ocsvm"))
    assert len(plain.images) == len(plain.stage0) == 40
    kept = len(filtered.images)
    assert 36 <= kept < 40
    assert all(len(getattr(filtered, name)) == kept for name in filtered.names)
    assert plain(pictures[17:18]).score < 1e-4
    assert filtered(pictures[17:18]).score > 10 * filtered(0.5 + 0.1 * images(5, 1)).score.max()


def test_outliers_are_at_most_a_share_of_nu():
    g = torch.Generator().manual_seed(0)
    for x in (torch.randn(400, 5, generator=g), torch.randn(60, 300, generator=g), torch.rand(50, 8, generator=g)):
        for nu in (0.05, 0.3):
            assert (~inliers(x, nu)).float().mean() <= nu
    far = torch.cat([torch.randn(95, 5, generator=g), 10 + 5 * torch.randn(5, 5, generator=g)])
    assert not inliers(far, 0.1)[95:].any()


def test_features_beyond_float16_are_refused():
    model = detector()
    state = model.new_state(2)
    state.update(model.collect([1e6 * m for m in model.features(images(2))]))
    with pytest.raises(InputError, match="65504"):
        model.fit(state)

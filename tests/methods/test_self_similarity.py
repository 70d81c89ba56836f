"""Self-similarity against its steps written plainly, tile by tile and pixel by pixel, and the bounds on what it holds."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler
from support import batch, composed, make, tiny_run

from blemish.data.images import prepare
from blemish.data.manifest import read_manifest
from blemish.edge.geometry import Geometry
from blemish.edge.reading import read
from blemish.features import tiles
from blemish.features.extractor import Features
from blemish.methods import self_similarity
from blemish.methods.self_similarity import threshold_of
from blemish.ops.maps import starts
from blemish.run import checkpoint, train


def detector(neighbors=2, mode="cdf", value=0.95, validation=0.2, most_tiles=1000, normalize="l1"):
    rule = {"mode": mode, "value": value}
    return make("self_similarity", neighbors=neighbors, threshold=rule, validation=validation, most_tiles=most_tiles, normalize=normalize)


def images(n, seed=0, height=56, width=72):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, height // 8, width // 8, generator=generator)
    return F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False).clamp(0, 1)


@torch.no_grad()
def fitted(model, parts):
    state = model.new_state(sum(len(part) for part in parts))
    for part in parts:
        state.update(model.collect(model.features(part)))
    state.gather()
    model.fit(state)
    return model, state.compute()


def tiles_of(image, tile=32, stride=8):
    """Corners of all tiles by brute force: steps of the stride, and one flush with each border."""
    height, width = image.shape[-2:]
    rows, columns = ([*range(0, side - tile, stride), side - tile] for side in (height, width))
    return [(y, x) for y in rows for x in columns]


@torch.no_grad()
def plain_features(model, image, normalize="none"):
    crops = [image[None, :, y : y + 32, x : x + 32] for y, x in tiles_of(image)]
    resized = [F.interpolate(crop, (64, 64), mode="bilinear", align_corners=False) for crop in crops]
    rows = np.stack([Features.forward(model.backbone, tile)[0].double().mean((2, 3))[0].numpy() for tile in resized])  # (P, D)
    return rows / np.abs(rows).sum(1, keepdims=True) if normalize == "l1" else rows


@pytest.mark.parametrize("normalize", ["l1", "none"])
def test_is_the_plain_chain(normalize):
    train, image = images(5), images(1, seed=1, height=60, width=67)[0]
    model, _ = fitted(detector(normalize=normalize), train.split(2))
    rows = np.concatenate([plain_features(model, one, normalize) for one in train[1:]])  # one of five is held out
    reduce = PCA(0.95, svd_solver="full").fit(rows)
    scale = StandardScaler().fit(reduce.transform(rows))
    words = model.words.double().numpy() * np.sign(np.sum(model.axes.numpy() * reduce.components_, 1))  # axes may point either way
    assert words.shape == (10, reduce.n_components_)

    def standardised(x):
        # scikit-learn's variance has n in the denominator, ours n − 1
        return scale.transform(reduce.transform(x)) * np.sqrt(1 - 1 / len(rows))

    z = standardised(rows)
    inertia = ((z[:, None] - words) ** 2).sum(2).min(1).sum()
    assert inertia <= 1.05 * KMeans(10, n_init=10, random_state=0).fit(z).inertia_

    z = standardised(plain_features(model, image, normalize))
    distance = np.sort(np.linalg.norm(z[:, None] - words, axis=2), 1)[:, :2].mean(1)
    total, times = np.zeros(image.shape[1:]), np.zeros(image.shape[1:])
    for (y, x), value in zip(tiles_of(image), distance, strict=True):
        total[y : y + 32, x : x + 32] += value
        times[y : y + 32, x : x + 32] += 1
    score, map = model(image[None])
    np.testing.assert_allclose(map[0], total / times, rtol=1e-3)
    np.testing.assert_allclose(score[0], (total / times).max(), rtol=1e-3)


@given(st.integers(1, 300), st.integers(1, 80), st.integers(1, 80))
def test_tiles_cover_every_pixel(length, tile, stride):
    first, stride = starts(length, tile, min(stride, tile)), min(stride, tile)
    assert {p for s in first.tolist() for p in range(s, s + min(tile, length))} == set(range(length))
    assert ((first.diff() > 0) & (first.diff() <= stride)).all()


@torch.no_grad()
def test_images_of_any_size():
    model, _ = fitted(detector(), [images(1, i, *size) for i, size in enumerate([(64, 64), (40, 200), (33, 32), (16, 40)])])
    for height, width in [(64, 64), (48, 100), (8, 8), (32, 33)]:
        score, map = model(images(1, 9, height, width))
        assert map.shape == (1, height, width)
        assert map.isfinite().all()
        assert score[0] == map.max()


@torch.no_grad()
def test_large_images_go_through_in_pieces(monkeypatch):
    model, _ = fitted(detector(), [images(5)])
    whole, seen = model(images(2, 1)), []
    monkeypatch.setattr(tiles, "PIXELS", 64 * 64 * 7)
    model.backbone.net.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    torch.testing.assert_close(model(images(2, 1)).map, whole.map, rtol=1e-4, atol=1e-4)
    assert max(seen) == 7


@pytest.mark.parametrize("most", [1, 10, 30, 100, 10_000])
@torch.no_grad()
def test_the_state_holds_no_more_than_allowed(most):
    model = detector(most_tiles=most)
    state = model.new_state(10)
    for part in images(10).split(3):
        state.update(model.collect(model.features(part)))
    rows = state.compute()
    assert (rows[:, 1] > 0).sum() <= max(most, 2)  # one tile of each of the two validation images at least
    assert (rows[:, 1] == 0).sum() <= max(most, 8)  # and of each of the eight others
    each = len(tiles_of(images(1)))
    assert len(rows) == 10 * each or most < 10 * each
    if most >= 10:
        state.gather()
        model.fit(state)
        assert model.threshold.isfinite()


def test_validation_images_are_not_in_the_dictionary():
    model, rows = fitted(detector(normalize="none"), images(10).split(4))
    each = len(tiles_of(images(1)))
    assert (rows[:, 1] > 0).sum() == 2 * each
    assert (rows[:, 1] == 0).sum() == 8 * each
    seen = torch.cat([model.features(image[None])[0].flatten(2)[0].T for image in images(10)[:2]])
    torch.testing.assert_close(rows[rows[:, 1] > 0, 2:], seen, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("n", "validation"), [(1, 0.2), (3, 0.0)])
def test_without_images_to_hold_out_the_first_serves_for_both(n, validation):
    model, rows = fitted(detector(validation=validation), [images(n)])
    assert (rows[:, 1] == 0).sum() == n * len(tiles_of(images(1)))
    assert (model(images(1)).map <= model.threshold).float().mean() >= 0.95


def test_thresholds():
    values = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    assert threshold_of(values, "cdf", 0.95) == pytest.approx(np.quantile(values, 0.95, method="inverted_cdf"))
    assert threshold_of(values, "cdf", 1.0) == float(values.max())
    assert threshold_of(values, "zscore", 1.645) == pytest.approx(values.mean() + 1.645 * values.std())
    assert threshold_of(values, "fixed", 7.0) == 7.0


def test_the_threshold_is_that_of_the_held_out_pixels():
    """56×72 pixels are whole steps of tiles, so the kept tiles give the very maps of the images."""
    model, _ = fitted(detector(), [images(10)])
    pixels = model(images(10)[:2]).map
    assert model.map_threshold == pytest.approx(np.quantile(pixels, 0.95, method="inverted_cdf"), rel=1e-5)
    model.calibrate([batch(images(3, 5)[:2]), batch(images(3, 5)[2:])])
    assert model.map_threshold == pytest.approx(np.quantile(model(images(3, 5)).map, 0.95, method="inverted_cdf"), rel=1e-5)


def test_calibration_thins_maps_to_its_bound_and_leaves_out_what_is_ignored(monkeypatch):
    model, _ = fitted(detector(), [images(10)])
    pictures = images(3, 5)
    map = model(pictures).map
    ignored = torch.zeros(map.shape, dtype=torch.bool)
    ignored[:, :6] = ignored[1, :, :9] = True
    for most, step in ((map.numel(), 1), (map.numel() - 1, 2), (map.numel() // 4 - 1, 4)):
        monkeypatch.setattr(self_similarity, "MOST", most)
        parts = batch(pictures)._replace(ignore_mask=ignored)
        model.calibrate(
            [parts._replace(image=pictures[:2], ignore_mask=ignored[:2]), parts._replace(image=pictures[2:], ignore_mask=ignored[2:])]
        )
        seen = map[:, ::step, ::step][~ignored[:, ::step, ::step]]
        assert model.map_threshold == pytest.approx(np.quantile(seen, 0.95, method="inverted_cdf"), rel=1e-5)


def test_a_fixed_threshold_holds_out_nothing():
    model, rows = fitted(detector(mode="fixed", value=3.5), [images(4)])
    assert model.map_threshold == 3.5
    assert (rows[:, 1] == 0).all()


@torch.no_grad()
def test_the_dictionary_does_not_depend_on_who_saw_which_image():
    """The numbers of two processes, whose rows come one behind the other, and a repeat at the end of the second's."""
    one, dealt, pictures = detector(most_tiles=60), detector(most_tiles=60), torch.cat([images(1, number) for number in range(7)])
    fitted(one, pictures.split(3))
    state = dealt.new_state(7)
    for numbers in ([0, 2, 4, 6], [1, 3, 5, 7]):
        dealt.numbers = iter(numbers)
        state.update(dealt.collect(dealt.features(pictures[[number % 7 for number in numbers]])))
    dealt.fit(state)
    for name in ("mean", "axes", "variance", "words", "threshold"):
        torch.testing.assert_close(getattr(dealt, name), getattr(one, name), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("protocol", ["paper", "clean"])
def test_calibration_images_set_the_threshold(tiny, tmp_path, protocol):
    """Of a run: from a validation folder, else from what the protocol holds out; the dictionary then has all training images."""
    split = ["data.validation=normal_test", "data.normal_test=null", "data.test_share=0"] if protocol == "paper" else []
    options = ["model=self_similarity", "image_size=null", "batch_size=1", "model.stride=16", f"protocol={protocol}", *split]
    train.train(tiny_run(tiny, tmp_path / "run", *options))
    _, model = checkpoint.load(tmp_path / "run", "cpu")
    held = [sample.path for sample in read_manifest(tmp_path / "run" / "manifest.csv") if sample.split == "calibrate"]
    assert len(held) == 6
    pixels = torch.cat([model(prepare(read(tiny / path), {}, Geometry())[None]).map.flatten() for path in held])
    assert model.map_threshold == pytest.approx(np.quantile(pixels, 0.95, method="inverted_cdf"), rel=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_foreign_script_among_hieroglyphs(real_data, tmp_path):
    """The pasted section of cuneiform, columns 1041 to 1561 of the test drawing, where strokes are cut off on either side."""
    folder = real_data / "hieroglyphs"
    if not folder.is_dir():
        pytest.skip("BLEMISH_DATA has no hieroglyphs/")
    data = ["data=folder", f"data.root='{folder}'", "data.normal=train", "data.validation=val", "data.abnormal=[test]", "data.test_share=0"]
    plain = ["trainer=cpu", "logger=none", "trainer.enable_progress_bar=false", "save.pictures=0", f"run_dir='{tmp_path}/run'"]
    train.train(composed("model=self_similarity", "recipe=self_similarity", *data, *plain))
    _, model = checkpoint.load(tmp_path / "run", "cpu")
    drawing = {path.stem: prepare(read(path), {}, Geometry())[None] for path in sorted(folder.rglob("*.png"))}
    map = model(drawing["test1"]).map[0]  # (H, W)

    def inside_and_recall():
        marked = map > model.map_threshold
        inside = marked[:, 1041:1562]
        return float(inside.sum() / marked.sum()), float(inside.float().mean())

    inside, recall = inside_and_recall()
    assert inside >= 0.9
    assert recall >= 0.8
    validation = [batch(drawing[name]) for name in ("val1", "val2")]
    by_cdf = model.map_threshold
    for mode, value in (("zscore", 1.645), ("fixed", by_cdf)):
        model.rule = {"mode": mode, "value": value}
        model.calibrate(validation)
        inside, recall = inside_and_recall()
        assert inside >= 0.85
        assert recall >= 0.8

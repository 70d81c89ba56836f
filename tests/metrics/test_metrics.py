"""Image and pixel metrics against scikit-learn and a brute-force AUPRO, then what must not change them, then the contract."""

import pickle
from collections import deque

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score
from torchmetrics.classification import BinaryAUROC

from blemish.edge.errors import InputError
from blemish.metrics import pixel
from blemish.metrics.image import ImageMetrics
from blemish.metrics.pixel import PixelMetrics
from blemish.types import IGNORED

METRICS = ("pixel_auroc", "pixel_ap", "aupro", "pixel_f1_max")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))]


# ---- references ----


def flood(mask):
    """8-connected regions of a mask as lists of (row, column), by breadth-first search."""
    left, regions = set(zip(*np.nonzero(mask == 1), strict=True)), []
    while left:
        queue, region = deque([left.pop()]), []
        while queue:
            y, x = queue.popleft()
            region.append((y, x))
            for near in {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left:
                left.remove(near)
                queue.append(near)
        regions.append(region)
    return regions


def brute_aupro(maps, masks, limit=0.3):
    """The definition, threshold by threshold and region by region."""
    normal = np.concatenate([m[t == 0] for m, t in zip(maps, masks, strict=True)])
    regions = [np.array([m[p] for p in r]) for m, t in zip(maps, masks, strict=True) for r in flood(t)]
    counted = np.concatenate([m[t != 255] for m, t in zip(maps, masks, strict=True)])
    x, y = [0.0], [0.0]
    for threshold in sorted(set(counted.tolist()), reverse=True):
        x.append(np.mean(normal >= threshold))
        y.append(np.mean([np.mean(region >= threshold) for region in regions]))
    area = 0.0
    for k in range(1, len(x)):
        if x[k - 1] >= limit:
            break
        end = min(x[k], limit)
        height = y[k] if x[k] == x[k - 1] else y[k - 1] + (y[k] - y[k - 1]) * (end - x[k - 1]) / (x[k] - x[k - 1])
        area += (end - x[k - 1]) * (y[k - 1] + height) / 2
    return area / limit


def reference(kind, score, label):
    """The metrics of `kind` "image" or "pixel" by scikit-learn, without AUPRO."""
    precision, recall, threshold = precision_recall_curve(label, score)
    f1 = np.divide(2 * precision * recall, precision + recall, out=np.zeros_like(recall), where=precision + recall > 0)[:-1]
    best = threshold[np.flatnonzero(f1 >= f1.max() - 1e-12)].max()
    values = roc_auc_score(label, score), average_precision_score(label, score), f1.max(), best
    return dict(zip((f"{kind}_{name}" for name in ("auroc", "ap", "f1_max", "f1_max_threshold")), values, strict=True))


def images(seed, count=12, side=24, levels=None, types=("crack", "hole"), ignored=0.0, shift=1.0):
    """Maps with (levels) or without ties, masks with several regions, and groups; every third image is good."""
    rng = np.random.default_rng(seed)
    maps = rng.normal(size=(count, side, side)).astype(np.float32)
    masks, groups = np.zeros((count, side, side), np.uint8), []
    for k in range(count):
        groups.append("good" if k % 3 == 0 else types[k % len(types)])
        for _ in range(0 if k % 3 == 0 else rng.integers(1, 5)):
            y, x = rng.integers(0, side - 4, 2)
            h, w = rng.integers(1, 5, 2)
            masks[k, y : y + h, x : x + w] = 1
    maps += shift * masks
    if levels:
        maps = np.round(maps * levels) / levels
    masks[rng.random(masks.shape) < ignored] = 255
    return torch.from_numpy(maps), torch.from_numpy(masks), groups


def seen(batches, limit=10**9):
    result = PixelMetrics(limit)
    for maps, masks, groups in batches:
        result.update(maps, masks, groups)
    return result


def of_images(score, label):
    """The pooled image metrics."""
    result = ImageMetrics()
    result.update(score, label, ["dent"] * len(label))
    return result.compute()["pooled"]


# ---- reference ----


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_image_figures_are_scikit_learns(data):
    n = data.draw(st.integers(2, 40))
    score = data.draw(arrays(np.float64, n, elements=st.sampled_from([-3.0, -0.0, 0.0, 1e-30, 0.5, 7.0, 1e9]) | st.floats(-1e6, 1e6)))
    label = np.array(data.draw(st.lists(st.integers(0, 1), min_size=n, max_size=n)))
    label[:2] = 0, 1
    assert of_images(torch.from_numpy(score), torch.from_numpy(label)) == pytest.approx(reference("image", score, label), abs=1e-12)


@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize("ignored", [0.0, 0.2])
def test_pixel_figures_are_scikit_learns_and_the_definitions(levels, ignored):
    maps, masks, groups = images(seed=1, count=9, side=16, levels=levels, ignored=ignored)
    table = seen([(maps, masks, groups)]).compute()
    assert set(table) == {"pooled", "crack", "hole"}
    for row, names in {"pooled": set(groups), "crack": {"crack", "good"}, "hole": {"hole", "good"}}.items():
        keep = [k for k, name in enumerate(groups) if name in names]
        score, label = maps.numpy()[keep], masks.numpy()[keep]
        expected = reference("pixel", score[label != 255], label[label != 255]) | {"aupro": brute_aupro(score, label)}
        assert table[row] == pytest.approx(expected, abs=1e-12)


def test_figures_are_those_of_the_pixels_that_are_looked_at():
    maps, masks, groups = images(seed=5, ignored=0.1)
    region = np.hypot(*(np.mgrid[:24, :24] - 11)) < 10
    masks[:, torch.from_numpy(~region)] = IGNORED
    maps[:, torch.from_numpy(~region)] = 1e30
    table = seen([(maps, masks, groups)]).compute()["pooled"]
    cut = np.where(masks == IGNORED, 255, masks)
    expected = reference("pixel", maps.numpy()[masks < 2], masks.numpy()[masks < 2]) | {"aupro": brute_aupro(maps.numpy(), cut)}
    assert table == pytest.approx(expected, abs=1e-12)
    # cut out and put side by side, they are the same pixels
    masks[masks == IGNORED] = 255
    maps[masks == 255] = torch.nan
    assert seen([(maps, masks, groups)]).compute()["pooled"] == table


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_aupro_of_small_masks_is_the_definition(data):
    shape = (data.draw(st.integers(1, 3)), data.draw(st.integers(2, 6)), data.draw(st.integers(2, 6)))
    masks = data.draw(arrays(np.uint8, shape, elements=st.sampled_from([0, 0, 1, 255])))
    masks[0, 0, :2] = 0, 1
    maps = data.draw(arrays(np.float32, shape, elements=st.integers(-2, 3).map(float) | st.floats(-1, 1, width=32)))
    table = seen([(torch.from_numpy(maps), torch.from_numpy(masks), ["dent"] * shape[0])]).compute()
    assert table["pooled"]["aupro"] == pytest.approx(brute_aupro(maps, masks), abs=1e-12)


def test_distances_beyond_one_are_not_squashed():
    # torchmetrics' default puts a batch that leaves [0, 1] through a sigmoid: far distances all become 1 and tie
    score, label = torch.tensor([100.0, 110.0, 120.0, 130.0]), torch.tensor([0, 0, 1, 1])
    raw = BinaryAUROC(normalization=None)
    raw.update(score[::2], label[::2])
    raw.update(score[1::2], label[1::2])
    found = of_images(score, label)
    assert raw.compute() == found["image_auroc"] == found["image_ap"] == 1.0


# ---- invariants ----


def test_zero_has_no_sign():
    maps = torch.tensor([[[0.0, -0.0, 0.0, -0.0]]])
    masks = torch.tensor([[[0, 1, 1, 0]]], dtype=torch.uint8)
    assert seen([(maps, masks, ["dent"])]).compute()["pooled"]["pixel_auroc"] == 0.5
    assert of_images(torch.tensor([-0.0, 0.0]), torch.tensor([1, 0]))["image_auroc"] == 0.5


@pytest.mark.parametrize("limit", [10**9, 700])
@pytest.mark.parametrize("bins", [2**16, 50])
def test_batches_order_and_processes_do_not_matter(limit, bins, monkeypatch):
    monkeypatch.setattr(pixel, "BINS", bins)
    maps, masks, groups = images(seed=4, ignored=0.1)
    whole = seen([(maps, masks, groups)], limit)
    single = [(maps[k : k + 1], masks[k : k + 1], groups[k : k + 1]) for k in np.random.default_rng(0).permutation(len(maps))]
    first, second = seen(single[:5], limit), seen(single[5:], limit)
    idle = PixelMetrics(limit)
    idle.merge(pickle.loads(pickle.dumps(first)))
    first.compute()  # looking must not change
    idle.merge(second)
    second.merge(first)
    expected = whole.compute()
    for other in (seen(single, limit), idle, second):
        result = other.compute()
        assert {row: pytest.approx(figures, abs=1e-12) for row, figures in expected.items()} == result
        assert whole.bounds()["pooled"] == pytest.approx(other.bounds()["pooled"], abs=1e-12)
    if limit == 10**9:
        assert idle.compute() == expected  # to the last bit


def test_merge_of_histograms_with_different_bins(monkeypatch):
    monkeypatch.setattr(pixel, "BINS", 200)
    narrow, wide = images(seed=14, levels=20), images(seed=15, count=24)
    expected = seen([narrow, wide], limit=100).compute()["pooled"]
    for first, second in ((narrow, wide), (wide, narrow)):
        merged, other = seen([first], limit=100), seen([second], limit=100)
        assert merged._shift != other._shift
        merged.merge(other)
        assert merged.compute()["pooled"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_device_float_and_layout(device, dtype):
    maps, masks, groups = images(seed=5, levels=4)
    expected = seen([(maps, masks, groups)]).compute()
    strange = maps.to(device, dtype).transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    assert seen([(strange, masks.to(device), groups)]).compute() == expected


# ---- histograms ----


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10**6), bins=st.integers(2, 300), levels=st.sampled_from([None, 2, 20]), shift=st.floats(-1, 6))
def test_bounds_of_the_histograms_hold(seed, bins, levels, shift):
    maps, masks, groups = images(seed, count=6, side=12, levels=levels, ignored=0.1, shift=shift)
    exact = seen([(maps, masks, groups)]).compute()
    before, pixel.BINS = pixel.BINS, bins
    try:
        coarse = seen([(maps, masks, groups)], limit=0)
    finally:
        pixel.BINS = before
    for row, bounds in coarse.bounds().items():
        for key in METRICS:
            if exact[row][key] is None:
                assert coarse.compute()[row][key] is bounds[key] is None
            else:
                assert abs(coarse.compute()[row][key] - exact[row][key]) <= bounds[key] + 1e-12, (row, key)
        assert bounds["pixel_f1_max"] is None or coarse.compute()[row]["pixel_f1_max"] <= exact[row]["pixel_f1_max"] + 1e-12


def test_histograms_are_close_and_small():
    exact, coarse = PixelMetrics(10**9), PixelMetrics(10**5)
    for seed in range(8):
        maps, masks, groups = images(seed, count=6, side=128)
        maps = maps.exp() * 3.7  # right-skewed, as distances are
        exact.update(maps, masks, groups)
        coarse.update(maps, masks, groups)
    assert coarse._kept <= 10**5
    truth, result, bounds = exact.compute(), coarse.compute(), coarse.bounds()
    assert exact.bounds()["pooled"] == dict.fromkeys(METRICS, 0.0)
    assert all(len(g.normal_bins.value) <= 2**16 and not g.normal and not g.defect for g in coarse._groups.values())
    assert 0 < bounds["pooled"]["pixel_auroc"] < 1e-4
    assert 0 < bounds["pooled"]["aupro"] < 2e-4
    for row in truth:
        assert all(abs(truth[row][key] - result[row][key]) <= bounds[row][key] for key in METRICS)


# ---- curves ----


@pytest.mark.parametrize("levels", [None, 2])
def test_whole_curves_have_the_figures_as_their_area(levels):
    maps, masks, groups = images(seed=10, levels=levels)
    result = seen([(maps, masks, groups)])
    curves, pooled = result.curves(points=10**6), result.compute()["pooled"]
    assert auc(*curves["roc"].T) == pytest.approx(pooled["pixel_auroc"], abs=1e-12)
    assert auc(*curves["pro"].T) / 0.3 == pytest.approx(pooled["aupro"], abs=1e-12)
    assert (np.diff(curves["pr"][:, 0]) * curves["pr"][1:, 1]).sum() == pytest.approx(pooled["pixel_ap"], abs=1e-12)
    assert curves["pro"][-1, 0] == 0.3


def test_thinned_curves_stay_on_the_curve():
    maps, masks, groups = images(seed=11, side=96)
    masks[1::2, :40, :30] = 1
    result = seen([(maps, masks, groups)])
    whole, thinned, pooled = result.curves(10**7), result.curves(), result.compute()["pooled"]
    for name, curve in thinned.items():
        assert 300 < len(curve) <= 1000
        assert (np.diff(curve[:, 0]) >= 0).all()
        np.testing.assert_array_equal(curve[[0, -1]], whole[name][[0, -1]])
        assert set(map(tuple, curve)) <= set(map(tuple, whole[name]))
    assert auc(*thinned["roc"].T) == pytest.approx(pooled["pixel_auroc"], abs=1e-4)
    assert auc(*thinned["pro"].T) / 0.3 == pytest.approx(pooled["aupro"], abs=2e-3)


# ---- contract ----


def test_pixels_without_truth_contribute_nothing():
    maps, masks, groups = images(seed=12)
    expected = seen([(maps, masks, groups)]).compute()
    unknown = torch.full_like(masks[:2], 255)
    result = seen([(maps, masks, groups), (torch.full_like(maps[:2], torch.nan), unknown, ["unknown", "hole"])])
    assert result.compute() == expected


def test_an_absent_class_has_no_figure():
    keys = (*METRICS, "pixel_f1_max_threshold")
    nothing = PixelMetrics(10)
    assert nothing.compute() == {"pooled": dict.fromkeys(keys)}
    assert all(curve.shape == (0, 2) for curve in nothing.curves().values())
    maps, masks = torch.rand(1, 8, 8), torch.zeros(1, 8, 8, dtype=torch.uint8)
    for limit in (0, 10**6):
        clean = seen([(maps, masks, ["good"]), (maps, masks, ["dent"])], limit)
        assert clean.compute() == {"pooled": dict.fromkeys(keys), "dent": dict.fromkeys(keys)}
        assert clean.bounds()["dent"] == dict.fromkeys(METRICS)
        assert seen([(maps, masks + 1, ["dent"])], limit).compute()["pooled"] == dict.fromkeys(keys)
    for label in ([0, 0], [1, 1], [-1, 1]):
        assert set(of_images(torch.tensor([1.0, 2.0]), torch.tensor(label)).values()) == {None}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_are_no_numbers_are_refused(bad):
    maps, masks, groups = images(seed=13)
    maps[4, 3, 2], masks[4, 3, 2] = bad, 0
    with pytest.raises(InputError, match="map.*'crack'.*NaN"):
        PixelMetrics(10**6).update(maps, masks, groups)
    with pytest.raises(InputError, match="score: 1 of 2"):
        ImageMetrics().update(torch.tensor([bad, 0.0]), torch.tensor([0, 1]), ["good", "dent"])


def test_a_defect_type_cannot_be_called_as_the_row_of_all_images():
    maps, masks, _ = images(seed=13, count=1)
    with pytest.raises(InputError, match="group: 'pooled'"):
        PixelMetrics(10**6).update(maps, masks, ["pooled"])
    with pytest.raises(InputError, match="group: 'pooled'"):
        ImageMetrics().update(torch.zeros(1), torch.zeros(1), ["pooled"])


def test_image_metrics_rows_merge_and_curves():
    rng = np.random.default_rng(0)
    score = torch.from_numpy(rng.integers(0, 12, 60).astype(np.float32))
    group = [("good", "crack", "hole")[k % 3] for k in range(60)]
    label = torch.tensor([int(name != "good") for name in group])
    label[::7] = -1
    whole, first, second = ImageMetrics(), ImageMetrics(), ImageMetrics()
    whole.update(score, label, group)
    first.update(score[:25], label[:25], group[:25])
    second.update(score[25:].double(), label[25:], group[25:])
    first.merge(second)
    assert first.compute() == whole.compute()
    for row, names in {"pooled": {"good", "crack", "hole"}, "hole": {"good", "hole"}}.items():
        keep = torch.tensor([name in names for name in group]) & (label >= 0)
        assert whole.compute()[row] == pytest.approx(reference("image", score[keep].numpy(), label[keep].numpy()), abs=1e-12)
    curves = whole.curves()
    assert auc(*curves["roc"].T) == pytest.approx(whole.compute()["pooled"]["image_auroc"], abs=1e-12)
    assert set(ImageMetrics().compute()["pooled"].values()) == {None}
    assert ImageMetrics().curves()["pr"].shape == (0, 2)

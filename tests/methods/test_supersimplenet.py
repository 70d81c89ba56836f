"""SuperSimpleNet: Perlin noise, losses and truth against loops and formulas, and what labelled defects teach."""

import math

import pytest
import torch
import torch.nn.functional as F
from support import batch, bricks, images, make, tiny_run

from blemish.detector import TrainedDetector
from blemish.files import read_json
from blemish.methods.supersimplenet import draw_masks, focal, perlin, segmentation_loss, truth_of
from blemish.run.train import train
from blemish.types import IGNORED, NO_TRUTH


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("cells", [(1, 1), (2, 4), (8, 1)])
def test_perlin_noise_is_that_of_a_loop_over_pixels(cells):
    size = (8, 12)
    angle = 2 * math.pi * torch.rand(cells[0] + 1, cells[1] + 1, generator=generator())

    def fade(t):
        return 6 * t**5 - 15 * t**4 + 10 * t**3

    expected = torch.empty(size)
    for i in range(size[0]):
        for j in range(size[1]):
            y, x = i * cells[0] / size[0], j * cells[1] / size[1]
            top, left = int(y), int(x)
            value = 0.0
            for down in (0, 1):
                for right in (0, 1):
                    a = float(angle[top + down, left + right])
                    slope = math.cos(a) * (y - top - down) + math.sin(a) * (x - left - right)
                    value += slope * (fade(y - top) if down else 1 - fade(y - top)) * (fade(x - left) if right else 1 - fade(x - left))
            expected[i, j] = math.sqrt(2) * value
    found = perlin(list(size), list(cells), generator())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found[:: size[0] // cells[0], :: size[1] // cells[1]].abs().max() < 1e-5  # at the corners of the squares
    assert found.abs().max() <= 1


def test_about_half_of_the_masks_are_empty_and_none_is_full():
    masks = draw_masks(200, [32, 32], 0.2, generator())
    shares = masks.float().mean((1, 2))
    assert 0.35 < (shares == 0).float().mean() < 0.7
    assert shares.max() < 1
    assert torch.equal(masks, draw_masks(200, [32, 32], 0.2, generator()))
    assert draw_masks(3, [1, 2], 0.2, generator()).shape == (3, 1, 2)


def test_losses_are_those_of_the_official_formulas():
    logits, truth = torch.randn(2, 3, 4, generator=generator()), torch.randint(-1, 2, (2, 3, 4), generator=generator())
    p, known = logits.sigmoid(), truth >= 0
    right = torch.where(truth == 1, p, 1 - p)
    expected = (-((1 - right) ** 4) * right.log())[known]
    torch.testing.assert_close(focal(logits[known], truth[known].float()), expected)
    truncated = (logits[truth == 0] + 0.5).clip(min=0).mean() + (0.5 - logits[truth == 1]).clip(min=0).mean()
    torch.testing.assert_close(segmentation_loss(logits, truth, 0.5), truncated + expected.mean())
    assert segmentation_loss(logits, torch.full_like(truth, -1), 0.5) == 0  # without a mask only the label counts


def test_truth_of_a_cell():
    mask = torch.zeros(1, 8, 8, dtype=torch.uint8)
    mask[0, 0, 0], mask[0, 7, 7], mask[0, 0, 7], mask[0, 1, 6] = 1, NO_TRUTH, IGNORED, 1
    assert truth_of(mask, [2, 2]).tolist() == [[[1, 1], [0, -1]]]


def test_unlabelled_defects_count_as_normal():
    model, pictures = make("supersimplenet"), images(4)
    unknown = batch(pictures)._replace(label=torch.full((4,), -1), mask=torch.full((4, 64, 64), NO_TRUTH, dtype=torch.uint8))
    model.train()
    assert torch.equal(model.loss(batch(pictures)), model.loss(unknown))


def test_standardized_features_do_not_depend_on_their_scale():
    model, pictures = make("supersimplenet", standardize=True), bricks(4, 0)
    maps = model.features(pictures)
    embedded = []
    for factor in (1, 100):
        model.before_training([batch(pictures, [factor * stage + factor for stage in maps])])
        embedded.append(model.embed([factor * stage + factor for stage in maps]))
    torch.testing.assert_close(*embedded, rtol=1e-3, atol=1e-3)


def test_labelled_defects_are_learnt_and_not_tested(tiny, tmp_path):
    metrics = train(tiny_run(tiny, tmp_path / "run", "model=supersimplenet", "data.defects=3"))
    record = read_json(tmp_path / "run" / "record.json")
    assert record["knowledge"] == "3 defects"
    assert record["counts"]["defects/square"] == 3
    assert metrics["images_anomalous"] == record["counts"]["test/square"]
    assert metrics["image_auroc"] > 0.9


def test_labelled_defects_pass_the_gradient_into_the_map():
    model, pictures = make("supersimplenet"), bricks(4, 0)
    x = model.adaptor(model.embed(model.features(pictures)))
    for known in (False, True):
        model.known = [([], torch.empty(0))] * known
        model.zero_grad()
        model.heads(x)[1].sum().backward(retain_graph=True)
        assert (model.segment[0].weight.grad is not None) == known
    assert issubclass(type(model), TrainedDetector)


def test_a_score_of_the_map_trains_the_head_for_defects_without_a_mask_alone():
    pictures, marked = bricks(4, 0), torch.ones(1, 64, 64, dtype=torch.uint8)
    unmarked = torch.full_like(marked, NO_TRUTH)
    cases = [("head", [], True), ("head", [marked], True), ("top", [], False), ("top", [marked], False)]
    for score, masks, needed in [*cases, ("top", [unmarked], True), ("top", [marked, unmarked], True)]:
        model = make("supersimplenet", score=score)
        if masks:
            model.learn_defects([batch(pictures[:1])._replace(mask=mask) for mask in masks])
        model.loss(batch(pictures)).backward()
        parameters = [*model.head.parameters(), *model.decide.parameters()]
        assert all(p.requires_grad == needed and (p.grad is not None) == needed for p in parameters)
        assert all(p.grad is not None for p in [*model.adaptor.parameters(), *model.segment.parameters()])
        assert model.eval()(pictures).score.shape == (4,)


def test_noise_is_added_at_the_cells_of_the_masks_alone_with_its_deviation():
    model, pictures, seen = make("supersimplenet", noise=2.0, upscale=4), bricks(4, 0), []
    model.segment.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].detach()))
    model.train()
    model.loss(batch(pictures))
    (x,) = seen  # (2B, D, h, w)
    added = (x - model.adaptor(model.embed(model.features(pictures))).detach().repeat(2, 1, 1, 1)).movedim(1, -1)  # (2B, h, w, D)
    noisy = draw_masks(len(x), list(x.shape[-2:]), model.hparams.perlin, model.generator())
    assert torch.equal(added.abs().amax(-1) > 1e-4, noisy)
    assert 0 < noisy.float().mean() < 0.5
    assert added[noisy].mean().abs() < 0.05
    assert added[noisy].std() == pytest.approx(2, rel=0.05)


def test_defects_fill_half_of_a_batch():
    model, pictures = make("supersimplenet"), bricks(4, 0)
    mask = F.pad(torch.ones(1, 8, 8, dtype=torch.uint8), (0, 56, 0, 56))
    model.learn_defects([batch(pictures[:1])._replace(mask=mask)])
    (stages, truth), seen = model.known[0], []
    assert truth.sum() == truth.numel() // 64
    assert [stage.ndim for stage in stages] == [3] * len(stages)
    model.adaptor.register_forward_hook(lambda layer, inputs, output: seen.append(len(output)))
    model.train()
    assert model.loss(batch(pictures)).isfinite()
    assert seen == [4]

"""What every method must satisfy, whatever it computes: the battery runs over each configs/model/*.yaml."""

import csv
from pathlib import Path

import pytest
import torch
from support import METHODS, check_gross_defect, tiny_run

from blemish.features.extractor import Features
from blemish.run.checkpoint import load
from blemish.run.config import build
from blemish.run.record import read_record
from blemish.run.train import train
from blemish.types import Batch

# methods with settings that make another kind of them
FORMS = {"noise_residual references": ("noise_residual", "model.references=6", "model.scales=2")}


@pytest.fixture(scope="module", params=[*METHODS, *FORMS])
def chosen(request) -> list[str]:
    """The overrides of one method."""
    method, *more = FORMS.get(request.param, (request.param,))
    return [f"model={method}", *more]


@pytest.fixture(scope="module")
def run(chosen, tiny, tmp_path_factory):
    """(folder, config, metrics) of one short training."""
    folder = tmp_path_factory.mktemp("method") / "run"
    cfg = tiny_run(tiny, folder, *chosen)
    return folder, cfg, train(cfg)


@pytest.fixture(scope="module")
def batch(run) -> Batch:
    data = build(run[1].data)
    data.setup()
    return next(iter(data.test_dataloader()))


@pytest.fixture(scope="module")
def model(run):
    return load(run[0], "cpu")[1]


def scores_of(folder: Path) -> dict[str, float]:
    with (folder / "scores.csv").open() as file:
        return {row["path"]: float(row["score"]) for row in csv.DictReader(file)}


@torch.inference_mode()
def test_shapes_and_finite(model, batch):
    # images of one value come from a covered lens, or a lamp that is out
    blank = torch.tensor([0.0, 0.5, 1.0])[:, None, None, None].expand(3, *batch.image.shape[1:])
    for image in (batch.image, blank):
        score, map = model(image)
        assert score.shape == (len(image),)
        assert score.isfinite().all()
        if map is not None:
            assert map.shape == (len(image), *image.shape[-2:])
            assert map.isfinite().all()


def test_a_gross_defect_is_found(run):
    check_gross_defect(run[2])


@torch.inference_mode()
def test_reload_is_bit_equal(run, model, batch):
    written = scores_of(run[0])
    assert model(batch.image).score.tolist() == [written[key] for key in batch.path]


@torch.inference_mode()
def test_one_image_is_as_in_a_batch(model, batch):
    together = model(batch.image)
    for i in range(2):
        one = model(batch.image[i : i + 1])
        torch.testing.assert_close(one.score, together.score[i : i + 1], rtol=1e-3, atol=1e-4)
        if together.map is not None:
            torch.testing.assert_close(one.map, together.map[i : i + 1], rtol=1e-3, atol=1e-3)


def test_same_seed_same_scores(run, chosen, tiny, tmp_path):
    again = tiny_run(tiny, tmp_path / "again", *chosen)
    first, second = ({k: v for k, v in m.items() if not k.endswith("_seconds")} for m in (run[2], train(again)))
    assert first == second
    assert scores_of(tmp_path / "again") == scores_of(run[0])


def test_backbone_stays_frozen(run, model):
    backbones = [part for part in model.modules() if isinstance(part, Features)]
    assert all(part.digest() == read_record(run[0])["weights_digest"] for part in backbones)
    assert not any(p.requires_grad for part in backbones for p in part.parameters())


@torch.inference_mode()
def test_prediction_neither_sees_the_truth_nor_changes_the_state(model, batch):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flipped = batch._replace(label=1 - batch.label, mask=255 - batch.mask)
    assert torch.equal(model.test_step(batch, 0).score, model.test_step(flipped, 0).score)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)

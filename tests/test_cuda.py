"""On a CUDA device each method fits, finds the gross defect, and scores as the same weights do on the CPU; skipped where there is none."""

import pytest
import torch
from support import METHODS, bricks, check_gross_defect, make, tiny_run

from blemish.ops.coreset import farthest_first
from blemish.ops.neighbours import nearest
from blemish.run.checkpoint import load
from blemish.run.config import build
from blemish.run.record import read_record
from blemish.run.train import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module", params=METHODS)
def run(request, tiny, tmp_path_factory):
    """(folder, config, metrics) of one short training on the device."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    cfg = tiny_run(tiny, folder, f"model={request.param}", "trainer=gpu")
    return folder, cfg, train(cfg)


def test_a_gross_defect_is_found(run):
    check_gross_defect(run[2])


@torch.inference_mode()
def test_both_devices_score_alike(run):
    folder, cfg, _ = run
    data = build(cfg.data)
    data.setup()
    image = next(iter(data.test_dataloader())).image
    here, there = load(folder, "cpu")[1](image), load(folder, "gpu")[1](image.cuda())
    # convolutions on the device round their factors to ten bits
    spread = float(here.score.std())
    torch.testing.assert_close(there.score.cpu(), here.score, rtol=0.01, atol=0.05 * spread)
    if here.map is not None:
        difference = (there.map.cpu() - here.map).abs()
        assert difference.mean() < 0.02 * here.map.std()


def test_the_record_tells_the_device_and_its_memory(run):
    record = read_record(run[0])
    assert record["environment"]["gpus"]
    assert record["peak_memory_mb"]["gpu"] > 0


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("method", ["autoencoder", "stfpm", "reverse_distillation", "cflow"])
def test_mixed_precision_learns(method, precision, tiny, tmp_path):
    run = tiny_run(tiny, tmp_path / "run", f"model={method}", "trainer=gpu", f"trainer.precision={precision}")
    assert train(run)["image_auroc"] >= 0.9


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("dim", [8, 200])
def test_neighbours_are_those_of_the_cpu(k, dim):
    generator = torch.Generator().manual_seed(0)
    query, bank = torch.randn(500, dim, generator=generator), torch.randn(3000, dim, generator=generator)
    for here, there in zip(nearest(query, bank, k), nearest(query.cuda(), bank.cuda(), k), strict=True):
        torch.testing.assert_close(there.cpu().double(), here.double(), rtol=1e-4, atol=1e-4)


def test_the_coreset_is_that_of_the_cpu():
    rows = torch.randn(2000, 32, generator=torch.Generator().manual_seed(0))
    assert farthest_first(rows.cuda(), 100, 0).indices.tolist() == farthest_first(rows, 100, 0).indices.tolist()


@pytest.mark.parametrize("changes", [{}, {"search": "exact"}, {"mode": "original"}, {"mode": "measured"}, {"channels": 1}], ids=str)
@torch.inference_mode()
def test_the_noise_detector_is_that_of_the_cpu(changes):
    model = make("noise_residual", **changes).eval()
    image = torch.cat([bricks(1, 0), bricks(1, 1)], 3)  # (1, 3, 64, 128)
    image[:, :, 20:32, 60:72] *= 0.3
    here = model(image)
    there = model.cuda()(image.cuda())
    torch.testing.assert_close(there.score.cpu(), here.score, rtol=0.05, atol=0.1)
    assert (there.map.cpu() - here.map).abs().mean() < 0.05 * here.map.std()

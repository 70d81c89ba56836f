import csv
import math
import shutil
from pathlib import Path

import pytest
import skimage.data
import torch
import yaml
from PIL import Image
from support import bricks, composed, fitted, make, tiny_run
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from blemish.detector import Detector
from blemish.edge.errors import InputError
from blemish.run.checkpoint import load
from blemish.run.predict import predict
from blemish.run.record import read_record
from blemish.run.train import train


def detector(**changes) -> Detector:
    return make("noise_residual", **{"mode": "calibrated"} | changes).eval()


def texture(height: int, width: int) -> torch.Tensor:
    """Grey brick as an image (1, 3, H, W) of three equal channels."""
    return torch.tensor(skimage.data.brick()[:height, :width].copy()).float().div(255).expand(1, 3, -1, -1).clone()


def stained(height: int, width: int, y: int, x: int) -> torch.Tensor:
    """The texture with a dark blob of 12 pixels at (y, x)."""
    image = texture(height, width)
    image[:, :, y : y + 12, x : x + 12] *= 0.3
    return image


class OnDeviceOnly(FakeTensorMode):
    """Tensors without data on a device that is not there: whatever would wait for a value, or come back to the host, is refused."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        came_from_device = any(isinstance(a, torch.Tensor) and a.device.type == "cuda" for a in args)
        if came_from_device and isinstance(out, torch.Tensor):
            assert out.device.type == "cuda", f"{func} takes a tensor back to the host"
        return out


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"search": "exact"},
        {"channels": 1, "bound": "map"},
        {"mode": "original"},
        {"mode": "measured"},
        {"source": "features", "stages": [1], "scales": 2},
        {"source": "features", "stages": [1, 2], "patch_cells": 2, "neighbors": 4, "scales": 2, "statistic": "both"},
        {"tile": 48},
        {"statistic": "both"},
    ],
    ids=str,
)
def test_the_forward_pass_stays_on_the_device(changes):
    model, size = detector(**changes), (96, 104) if "source" in changes else (56, 64)
    with OnDeviceOnly() as mode:
        state = {name: mode.from_tensor(value).to("cuda") for name, value in (*model.named_parameters(), *model.named_buffers())}
        image = torch.empty(2, 3, *size, device="cuda")
        score, map = functional_call(model, state, image)
    assert (score.device.type, map.device.type) == ("cuda", "cuda")
    assert (score.shape, map.shape) == ((2,), (2, *size))


@pytest.mark.parametrize(
    "breach",
    [lambda x: x.sum().item(), lambda x: x.cpu(), lambda x: x[x > 0], lambda x: x.nonzero()],
    ids=["item", "cpu", "mask", "nonzero"],
)
def test_the_proof_would_notice_a_breach(breach):
    with pytest.raises(Exception, match=r"_local_scalar_dense|nonzero|host"), OnDeviceOnly():
        breach(torch.empty(4, device="cuda"))


@pytest.mark.parametrize(
    "changes", [{}, {"channels": 1}, {"source": "features"}, {"search": "exact", "scales": 1}, {"mode": "measured"}], ids=str
)
def test_a_stain_is_detected_where_it_is(changes):
    model, (height, width) = detector(**changes), (96, 112) if "source" in changes else (64, 80)
    y, x = height // 2 - 6, width // 2 - 6
    image = stained(height, width, y, x)
    score, map = model(image)
    assert map.shape == (1, height, width)
    assert score.item() == map.max().item()
    peak_y, peak_x = divmod(int(map[0].argmax()), width)
    assert max(abs(peak_y - y - 6), abs(peak_x - x - 6)) <= 10
    if model.measured:
        return  # with its discs the stain is more than the 0.5 % of such a small image that tails are not measured on
    first = model.detect(image)[0]
    assert model(texture(height, width)).score < score
    if model.backbone is None:
        assert first[0].log10_nfa == pytest.approx(-score.item(), abs=1e-5)
        assert first[0].x1 <= peak_x < first[0].x2


REFERENCES = [
    {"references": 4, "channels": 1, "scales": 2},
    {"references": 4, "source": "features", "stages": [0, 1], "scales": 1, "statistic": "both"},
]


@pytest.mark.parametrize("changes", REFERENCES, ids=str)
def test_references_show_what_is_normal(changes, tmp_path):
    """Bricks are noise to bricks; a stain is not, nor is a wall of something else, which explains itself."""
    model = fitted(detector(**changes), bricks(12, 0)).eval()
    assert model.bound_kind == "bound measured on 4 references"
    normal, stain, other = bricks(2, 7), bricks(2, 7), bricks(1, 8).flip(2).mT.roll(3, 2) * 0.5 + 0.4
    stain[:, :, 24:34, 30:40] *= 0.2
    assert model(normal).score.max() < model(stain).score.min()
    assert model(normal).score.max() < model(other).score.min()
    y, x = divmod(int(model(stain).map[0].argmax()), 64)
    assert max(abs(y - 29), abs(x - 35)) <= 8
    again = detector(**changes)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(again(stain).map, model(stain).map)


def test_references_of_a_run(tiny, tmp_path):
    """Training images or a folder, read back from the run; an update adds references; a single image takes the folder without a run."""
    few = ["model=noise_residual", "model.channels=1", "model.scales=1"]
    first = train(tiny_run(tiny, tmp_path / "run", *few, "model.references=6"))
    by_folder = train(tiny_run(tiny, tmp_path / "folder", *few, f"model.references='{tiny / 'normal_test'}'"))
    assert min(first["image_auroc"], by_folder["image_auroc"]) > 0.9
    (_, model), (_, other) = (load(tmp_path / name, "cpu") for name in ("run", "folder"))
    assert (model.bound_kind, len(model.bank0)) == ("bound measured on 6 references", 6)
    assert read_record(tmp_path / "run")["bound_kind"] == model.bound_kind
    assert len(other.bank0) == len(list((tiny / "normal_test").iterdir()))
    more = shutil.copytree(tiny, tmp_path / "more")
    for path in sorted((more / "normal").iterdir())[:12]:
        Image.open(path).rotate(180).save(path)
    train(tiny_run(more, tmp_path / "updated", f"update='{tmp_path / 'run'}'"))
    updated = load(tmp_path / "updated", "cpu")[1]
    assert 6 < len(updated.images) <= 12
    assert torch.equal(updated.images[:6], model.images)
    with pytest.raises(InputError, match="references="):
        other.restore(None)
    options = [*few, f"model.references='{tiny / 'normal'}'", f"input='{tiny / 'square'}'", f"output='{tmp_path / 'out'}'"]
    found = predict(composed(*options, config="predict"))
    assert all(row[3] for row in found.rows)
    assert "bound measured on" in found.summary[0]


def test_references_need_a_second_image_and_no_other_residual():
    with pytest.raises(InputError, match="references=4"):
        fitted(detector(references=4, scales=1), bricks(1, 0))
    with pytest.raises(InputError, match="references=4"):
        detector(references=4, mode="original")


@pytest.mark.parametrize(("count", "batch"), [(12, 5), (13, 1), (40, 7)])
def test_references_are_spread_over_the_training_images(count, batch):
    model = detector(references=4)
    images = torch.arange(count)[:, None, None, None].expand(-1, 3, 8, 8).float()
    state = model.new_state(count)
    for part in images.split(batch):
        state.update(model.collect(model.features(part)))
    numbers = state.compute()[:, 0, 0, 0].tolist()
    assert numbers == list(range(0, count, count // 4))[: len(numbers)]
    assert 4 <= len(numbers) <= 8


def test_images_of_two_sizes_are_no_references():
    model = detector(references=4)
    state = model.new_state(4)
    state.update(torch.zeros(1, 3, 40, 40))
    with pytest.raises(InputError, match="image_size"):
        state.update(torch.zeros(1, 3, 40, 48))


def test_features_have_no_border_of_their_own():
    """A flat image has flat features up to its rim, which a network's zero padding would not leave; any size keeps its grid."""
    model = detector(source="features", stages=[1, 2])
    assert [tuple(map.shape[2:]) for map in model.maps_of(texture(64, 96))] == [(16, 24), (8, 12)]
    assert [tuple(map.shape[2:]) for map in model.maps_of(texture(50, 61))] == [(13, 16), (7, 8)]
    for flat in model.maps_of(torch.full((1, 3, 64, 64), 0.4)):
        assert (flat - flat.mean((2, 3), keepdim=True)).abs().max() < 1e-3 * flat.abs().max()


def test_stages_share_the_bound_and_say_their_scale():
    """Each of two stages may spend half of ε, and the scale is that of the pyramid, also where a stage has no room."""
    image = stained(96, 112, 40, 50)
    kinds = {"source": "features", "patch_cells": 2, "neighbors": 4, "statistic": "both"}
    both, fine, coarse = (detector(stages=stages, scales=1, **kinds).alarms(image).log10_nfa for stages in ([1, 2], [1], [2]))
    torch.testing.assert_close(both, torch.minimum(fine, coarse) + math.log10(2))
    halved = detector(stages=[1, 4], scales=2, **kinds)
    assert list(halved.residuals(image)) == [0, 2]  # twice the first stage: 3×4 cells of the last have too few patches
    assert set(halved.alarms(image).scale.unique().tolist()) <= {0, 1}


def test_the_radius_is_in_pixels_of_the_image():
    found = detector(mode="calibrated").detect(stained(64, 80, 26, 34))[0][0]
    assert found.radius in {radius * 2**found.scale for radius in (2, 4)}


def test_images_do_not_see_each_other():
    model = detector()
    a, b = stained(64, 72, 20, 30), texture(64, 72)
    together = model(torch.cat([a, b]))
    for i, alone in enumerate((model(a), model(b))):
        torch.testing.assert_close(together.map[i], alone.map[0], rtol=1e-3, atol=5e-3)


def test_three_equal_channels_cost_a_factor_of_three():
    image = stained(64, 72, 20, 30)
    one, three = detector(channels=1)(image).score, detector(channels=3)(image).score
    assert (one - three).item() == pytest.approx(math.log10(3), abs=0.1)  # near ties may fall to another sixteenth neighbour


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 64), (128, 40)])
def test_any_size_from_32(size):
    score, map = detector()(texture(*size))
    assert map.shape == (1, *size)
    assert map.isfinite().all()
    assert score.isfinite().all()


def test_too_small_says_so():
    with pytest.raises(InputError, match="20×20 px"):
        detector()(texture(20, 20))


def test_a_flat_image_has_no_alarm():
    assert detector()(torch.full((1, 3, 64, 64), 0.4)).score < 0


def test_residual_of_something_else_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no config\.yaml"):
        detector(residual_of=str(tmp_path))
    (tmp_path / "model.ckpt").touch()
    for target in ("blemish.methods.padim.PaDiM", "os.system"):
        (tmp_path / "config.yaml").write_text(f"model: {{_target_: {target}}}")
        with pytest.raises(InputError, match=r"residual_of=.*(PaDiM|system)"):
            detector(residual_of=str(tmp_path))


def test_residual_of_a_trained_reconstruction(tiny, tmp_path, monkeypatch):
    """An autoencoder of one epoch, then its residual, both as tools/train.py does it, and pictures scored by the finished run."""
    monkeypatch.chdir(tmp_path)
    train(tiny_run(tiny, Path("autoencoder"), "model=autoencoder", "model.latent=16", "trainer.max_epochs=1"))
    options = ["model=noise_residual", "model.residual_of=autoencoder", "model.channels=1"]
    metrics = train(tiny_run(tiny, Path("residual"), *options))
    assert metrics["image_auroc"] > 0.8  # squares of 11 px that three steps of training cannot redraw
    assert metrics["pixel_auroc"] > 0.5
    _, first = load(Path("autoencoder"), "cpu")
    _, model = load(Path("residual"), "cpu")
    image = stained(64, 64, 20, 30)
    with torch.inference_mode():
        left = 255 * (image - first.reconstruct(image)).mean(1, keepdim=True)
        torch.testing.assert_close(model.residuals(image)[0], left)
        assert model(image).score > model(texture(64, 64)).score
    assert not any(p.requires_grad for p in model.reconstruction.parameters())
    with torch.inference_mode():
        assert torch.equal(detector(residual_of="autoencoder", channels=1)(image).map, model(image).map)
    assert str(tmp_path) not in Path("residual/record.json").read_text(encoding="utf-8")
    assert yaml.safe_load(Path("residual/config.yaml").read_text(encoding="utf-8"))["model"]["residual_of"] == "autoencoder"
    predict(composed("run=residual", f"input='{tiny / 'square'}'", "output=out", config="predict"))
    with Path("out/scores.csv").open(encoding="utf-8") as file:
        scores = list(csv.DictReader(file))
    assert len(scores) == 6

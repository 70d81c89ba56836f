"""Promises that several methods share."""

import pytest
import torch
import yaml
from scipy.ndimage import gaussian_filter
from support import batch, bricks, fitted, images, make, methods_of, quick, trained_by_lightning

from blemish.detector import OnePassDetector, TrainedDetector
from blemish.edge.errors import InputError

TEACHERS = ["cflow", "dfr", "reverse_distillation", "stfpm"]
WRONG = {
    "autoencoder": [{"loss": "l1"}, {"score": "mean"}, {"image_size": 40}, {"window": 10}, {"sigma": -1}],
    "cflow": [{"condition": 6}, {"fibre_batch": 0}],
    "dfkdm": [{"density": "mixture"}],
    "dfkde": [{"scaling": "none"}],
    "dfm": [{"score": "likelihood"}, {"groups": 0}],
    "dfr": [{"region": 0}, {"latent": 0}, {"latent": 1.5}, {"latent": 0.0}, {"relative": "yes"}],
    "ganomaly": [{"image_size": 40}, {"clip": 0.0}],
    "lake": [{"density": "histogram"}],
    "noise_residual": [
        *(
            {"source": "pixel"},
            {"search": "fast"},
            {"mode": "paper"},
            {"channels": 2},
            {"scales": 0},
            {"tile": 8},
            {"references": 1},
            {"statistic": "sum"},
            {"stages": 1},
        ),
    ],
    "padim": [{"align": "cubic"}, {"draws": 0}],
    "patch_svdd": [{"strides": {64: 16, 32: 3}}],
    "patchcore": [
        *({"coreset_ratio": 0.0}, {"coreset_ratio": 1.5}, {"embed_dim": 0}, {"reweight": 1}, {"reweight": -2}, {"projection": 0}),
        *({"embedding": "max"}, {"patch_size": 2}, {"coreset": "all"}, {"num_neighbors": 0}),
    ],
    "reverse_distillation": [{"loss": "mean"}, {"stages": [1, 3]}, {"stages": ["layer1"]}],
    "riad": [{"smooth": 4}, {"scales": 0}],
    "self_similarity": [
        {"normalize": "l2"},
        {"threshold": {"mode": "best"}},
        {"threshold": {"mode": "cdf", "value": 95}},
        {"neighbors": 11},
    ],
    "spade": [{"matching": "all"}, {"align": "cubic"}, {"neighbors": 0}, {"outlier_filter": "svm"}, {"nu": 1.0}, {"nu": 0.0}],
    "stfpm": [{"stages": ["layer1"]}],
    "mutual": [{"share": 0.0}, {"neighborhoods": [2]}, {"rescore": []}, {"rescore": [0]}],
    "subspace": [{"keep": 0.0}, {"rotations": -1}, {"score": 0}, {"score": 1.5}],
    "supersimplenet": [{"upscale": 0}, {"perlin": 1.0}, {"noise": 0.0}, {"standardize": 1}, {"score": "map"}],
    "vae": [{"score": "reconstruction"}, {"sigma": -1}],
}


@pytest.mark.parametrize(("method", "change"), [(method, change) for method, changes in WRONG.items() for change in changes], ids=str)
def test_a_wrong_value_is_refused_by_its_key(method, change):
    (key,) = change
    with pytest.raises(InputError, match=f"{key}[=.]"):
        make(method, **change)


@pytest.mark.parametrize(
    ("method", "side"),
    [*((method, 96) for method in ("autoencoder", "ganomaly", "lake", "padim", "spade", "vae")), ("dfm", 128), ("riad", 72)],
)
def test_another_image_size_is_refused(method, side):
    model = make(method)
    model = fitted(model, images(8)) if isinstance(model, OnePassDetector) else model.eval()
    with pytest.raises(InputError, match="image_size"):
        model(images(1, side=side))


@pytest.mark.parametrize("method", methods_of(OnePassDetector))
def test_a_fit_does_not_depend_on_the_batches(method):
    a, b = (fitted(make(method, 64), bricks(12, 0), size)(bricks(2, 1)) for size in (12, 5))
    torch.testing.assert_close(a.score, b.score, rtol=1e-3, atol=1e-3)
    if a.map is not None:
        torch.testing.assert_close(a.map, b.map, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("method", methods_of(TrainedDetector))
def test_first_weights_come_from_the_seed_alone(method):
    stream, states = torch.get_rng_state(), []
    for seed in (0, 0, 1):
        model = make(method, seed=seed)
        model.before_training([batch(images(5))])
        states.append(torch.cat([p.flatten() for p in model.parameters() if p.requires_grad]))
    assert torch.equal(torch.get_rng_state(), stream)
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize("method", [method for method in methods_of(TrainedDetector) if method != "patch_svdd"])
def test_the_loss_falls(method):
    changes = dict(override.removeprefix("model.").split("=") for override in quick(method) if override.startswith("model."))
    changes = {key: yaml.safe_load(value) for key, value in changes.items()}
    first, last = (trained_by_lightning(make(method, **changes), bricks(8, 0), epochs)[1].callback_metrics["loss"] for epochs in (1, 6))
    assert last < 0.95 * first


@pytest.mark.parametrize("options", [{"gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}])
@pytest.mark.parametrize("method", TEACHERS)
def test_trainer_options(method, options):
    model, trainer = trained_by_lightning(make(method), images(16), epochs=2, **options)
    score, map = model(images(2, seed=1))
    assert torch.isfinite(trainer.callback_metrics["loss"])
    assert score.dtype == map.dtype == torch.float32
    assert score.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("method", TEACHERS)
def test_cached_maps_bfloat16_and_any_size(method):
    model, pictures = make(method).eval(), images(3)
    model.before_training([batch(pictures)])
    model.after_training([batch(pictures)])
    model.eval()
    loss, maps = model.loss(batch(pictures)), [m.half() for m in model.features(pictures)]
    if method != "cflow":  # its loss is that of a part of the batch
        torch.testing.assert_close(model.loss(batch(pictures, maps)), loss, rtol=1e-3, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model.loss(batch(pictures))
        assert rough.dtype == torch.float32
        torch.testing.assert_close(rough, loss, rtol=0.05, atol=0)
    images_too = method == "stfpm"
    assert (model.inputs_for("train"), model.inputs_for("test")) == ((True, images_too), (not images_too, images_too))
    for size in ((64, 64), (65, 97), (40, 33)):
        score, map = model(torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)))
        assert map.shape == (1, *size)
        assert score.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize(("method", "changes"), [("autoencoder", {"loss": "l2"}), ("autoencoder", {"loss": "ssim"}), ("vae", {})], ids=str)
def test_a_blurred_map_has_a_score_of_its_own(method, changes):
    x = images(3)
    expected = gaussian_filter(make(method, **changes)(x).map.double().numpy(), (0, 2.5, 2.5), mode="reflect", truncate=4)
    score, blurred = make(method, sigma=2.5, **changes)(x)
    torch.testing.assert_close(blurred, torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-6)
    assert torch.equal(score, blurred.amax((1, 2)))

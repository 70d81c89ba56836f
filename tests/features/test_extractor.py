"""The frozen backbone: its weights are whose they should be, its stages where they should be, and folding changes nothing."""

import pytest
import skimage.data
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config

from blemish.edge.errors import InputError
from blemish.features.extractor import Features, fold_batchnorm
from blemish.features.weights import BUNDLED, bundled_state

TABBY, TIGER_CAT, EGYPTIAN_CAT, ESPRESSO, CUP = 281, 282, 285, 967, 968  # ImageNet classes


def images(n=2, side=64):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("backbone", BUNDLED)
def test_bundled_network_knows_a_cat_and_a_cup(backbone):
    net = timm.create_model(backbone).eval()
    net.load_state_dict(bundled_state(backbone))  # strict: every key and shape
    transform = create_transform(**resolve_model_data_config(net))
    photographs = [skimage.data.chelsea(), skimage.data.coffee()]
    with torch.no_grad():
        best = net(torch.stack([transform(Image.fromarray(p)) for p in photographs])).argmax(1).tolist()
    assert best[0] in (TABBY, TIGER_CAT, EGYPTIAN_CAT)
    assert best[1] in (ESPRESSO, CUP)


def test_a_large_batch_goes_through_in_chunks(monkeypatch):
    features, batch, seen = Features("test_resnet", [1, 2], "random", seed=0), images(7), []
    expected = features.maps(batch)
    monkeypatch.setattr("blemish.features.extractor.CHUNK_BYTES", 3.5 * features.pixel_bytes * 64 * 64)
    features.net.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    for one, other in zip(features(batch), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert one.is_contiguous(memory_format=torch.channels_last)
    assert seen == [3, 3, 1]


def test_stages_are_timms_own():
    features = Features("tf_efficientnet_lite0", [1, 2, 3], "bundled", seed=0)
    full = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(1, 2, 3)).eval()
    state = bundled_state("tf_efficientnet_lite0")
    full.load_state_dict({key: state[key] for key in full.state_dict()})
    with torch.no_grad():
        expected = full(images() * 2 - 1)  # this backbone's mean and std are .5
    for got, want in zip(features(images()), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert features.channels == [24, 40, 112]
    assert [m.shape[-1] for m in features(images())] == [16, 8, 4]


@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet", "test_convnext", "test_vit", "resnet18", "mobilenetv3_small_050"])
def test_folding_leaves_the_output(backbone):
    net = timm.create_model(backbone, features_only=True).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # statistics of a trained network, not of a fresh one
            for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                tensor.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
    side = 160 if backbone == "test_vit" else 64
    folded = fold_batchnorm(net, images(1, side))
    with torch.no_grad():
        for got, want in zip(folded(images(2, side)), net(images(2, side)), strict=True):
            assert (got - want).norm() < 1e-4 * want.norm()
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())


def test_stage_is_a_stride_in_every_family():
    for backbone in ("test_resnet", "test_efficientnet", "test_convnext", "test_nfnet"):
        maps = Features(backbone, [1, 2], "random", seed=0)(images())
        assert [m.shape[-1] for m in maps] == [16, 8], backbone


def test_channels_come_second_also_from_transformers():
    features = Features("swin_tiny_patch4_window7_224", [1, 2], "random", seed=0)
    assert [tuple(m.shape) for m in features(images(1, 224))] == [(1, 96, 56, 56), (1, 192, 28, 28)]


def test_layers_by_name_with_batchnorm_are_the_stages():
    named = Features("tf_efficientnet_lite0", ["blocks.1", "blocks.4"], "bundled", seed=0)
    stages = Features("tf_efficientnet_lite0", [1, 3], "bundled", seed=0)
    for got, want in zip(named(images()), stages(images()), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_frozen_and_seeded():
    before = torch.random.get_rng_state()
    features = Features("test_resnet", [1], "random", seed=0).train()
    assert torch.equal(before, torch.random.get_rng_state())
    again, other = (Features("test_resnet", [1], "random", seed=seed) for seed in (0, 1))
    assert features.digest() == again.digest() != other.digest()
    assert not any(module.training for module in features.modules())
    assert not any(p.requires_grad for p in features.parameters())


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_from_a_file(tmp_path, suffix):
    net = timm.create_model("test_resnet")
    path = tmp_path / f"weights.{suffix}"
    save_file(net.state_dict(), path) if suffix == "safetensors" else torch.save({"state_dict": net.state_dict()}, path)
    features = Features("test_resnet", [1, 2], str(path), seed=0)
    reference = timm.create_model("test_resnet", features_only=True, out_indices=(1, 2)).eval()
    reference.load_state_dict(net.state_dict(), strict=False)
    mean, std = (torch.tensor(net.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        expected = reference((images() - mean) / std)
    torch.testing.assert_close(features(images())[1], expected[1], rtol=1e-4, atol=1e-4)


class Malicious:
    def __reduce__(self):
        return (eval, ("1/0",))


def test_wrong_weights_are_refused_with_the_way_out(tmp_path):
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "vit.pth")
    torch.save(Malicious(), tmp_path / "malicious.pth")
    for weights, words in (
        (tmp_path / "none.pth", "none.pth.*bundled"),
        ("bundled", "test_resnet.*tf_efficientnet_lite0"),
        (tmp_path / "vit.pth", "vit.pth.* backbone"),
        (tmp_path / "malicious.pth", "malicious.pth.*code"),
    ):
        with pytest.raises(InputError, match=f"weights=.*{words}"):
            Features("test_resnet", [1], str(weights), seed=0)
    with pytest.raises(InputError, match="backbone='resnet19'"):
        Features("resnet19", [1], "random", seed=0)
    with pytest.raises(InputError, match=r"stages=\[9\]"):
        Features("test_resnet", [9], "random", seed=0)


def test_impossible_download_names_the_offline_ways(monkeypatch, tmp_path):
    def unreachable(*_, **__):
        raise OSError("no name server")

    monkeypatch.setattr("blemish.features.weights.socket.getaddrinfo", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("timm.models._hub._hub_cache_dir", lambda: str(tmp_path), raising=False)
    with pytest.raises(InputError, match=r"(?s)weights=pretrained.*weights=bundled.*safetensors"):
        Features("resnet18", [1], "pretrained", seed=0)

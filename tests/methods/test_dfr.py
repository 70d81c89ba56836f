"""DFR: regional features, latent width, autoencoder and map against plain versions."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from support import batch, images, make
from torch import nn

from blemish.edge.errors import InputError
from blemish.methods.dfr import DFR, autoencoder, regional
from blemish.types import Batch


def dfr(**changes) -> DFR:
    return make("dfr", **{"stages": [1, 2], **changes})


def prepared(model: DFR, pictures: torch.Tensor) -> DFR:
    with torch.no_grad():
        model.before_training(batch(part) for part in pictures.split(5))
    return model.eval()


@pytest.mark.parametrize("cells", [(16, 16), (7, 3), (64, 48), (1, 1)])
def test_regional_features_are_resized_then_averaged(cells):
    map = torch.randn(2, 5, *cells, generator=torch.Generator().manual_seed(0))
    expected = F.avg_pool2d(F.interpolate(map, (64, 48), mode="bilinear", align_corners=False), 4)  # (B, C, 16, 12)
    for given in (map, map.contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(regional(given, (64, 48), 4).movedim(-1, 1), expected)


def test_regions_reach_over_all_pixels():
    """A size that the region does not divide: nothing is cut off, and a constant stays one."""
    assert regional(torch.ones(1, 2, 9, 9), (66, 63), 4).shape == (1, 17, 16, 2)
    torch.testing.assert_close(regional(torch.ones(1, 2, 9, 9), (66, 63), 4), torch.ones(1, 17, 16, 2))
    corner = torch.zeros(1, 1, 66, 66)
    corner[..., -1, -1] = 1
    assert regional(corner, (66, 66), 4)[0, -1, -1, 0] > 0


@pytest.mark.parametrize("share", [0.6, 0.9])
def test_latent_width_is_the_number_of_principal_components(share):
    model = prepared(dfr(latent=share), images(12))
    rows = model.embed(model.features(images(12)), (64, 64)).flatten(0, 1)
    assert model.autoencoder.linear2.out_features == PCA(share, svd_solver="full").fit(rows.double().numpy()).n_components_


@pytest.mark.parametrize("batch_norm", [True, False])
def test_autoencoder_is_one_of_1x1_convolutions(batch_norm):
    torch.manual_seed(0)
    rows = autoencoder(10, 3, batch_norm)
    convs, norms = [], []
    for layer in rows:
        if isinstance(layer, nn.Linear):
            conv = nn.Conv2d(layer.in_features, layer.out_features, 1)
            conv.weight.data, conv.bias.data = layer.weight.data[..., None, None], layer.bias.data
            convs.append(conv)
        elif isinstance(layer, nn.BatchNorm1d):
            norms.append(nn.BatchNorm2d(layer.num_features))
    assert [c.in_channels for c in convs] + [convs[-1].out_channels] == [10, 8, 6, 3, 6, 8, 10]
    assert len(norms) == (4 if batch_norm else 0)
    norm = iter(norms)
    image = x = torch.randn(2, 10, 5, 4)
    for i, conv in enumerate(convs):
        x = conv(x)
        if i not in (2, 5):
            x = F.relu(next(norm)(x) if batch_norm else x)
    got = rows(image.permute(0, 2, 3, 1).flatten(0, 2)).view(2, 5, 4, 10).permute(0, 3, 1, 2)
    torch.testing.assert_close(got, x)


@pytest.mark.parametrize("relative", [False, True])
def test_loss_and_map(relative):
    model = prepared(dfr(latent=4, relative=relative), images(8))
    pictures = images(3, seed=1)
    with torch.no_grad():
        x = model.embed(model.features(pictures), (64, 64))  # (B, P, D)
        difference = (x - model.autoencoder(x.flatten(0, 1)).view_as(x)).double().numpy()
        assert float(model.loss(batch(pictures))) == pytest.approx((difference**2).mean(), rel=1e-5)
        score, map = model(pictures)
    errors = np.linalg.norm(difference, axis=-1) / (np.linalg.norm(x.double(), axis=-1) if relative else 1)
    cells = torch.from_numpy(errors.reshape(3, 1, 16, 16))
    expected = F.interpolate(cells, (64, 64), mode="bilinear", align_corners=False)[:, 0]
    np.testing.assert_allclose(map, expected, rtol=1e-4)
    np.testing.assert_allclose(score, expected.amax((1, 2)), rtol=1e-4)


def test_a_state_brings_its_own_width():
    model = prepared(dfr(), images(8))
    other = dfr()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(images(2)).score, model(images(2)).score)
    with pytest.raises(InputError, match="not trained"):
        dfr()(images(1))


def test_layers_by_name_and_stored_maps():
    model = prepared(dfr(stages=["layer1.0", "layer2", "layer3"]), images(8))
    maps = model.features(images(2))
    empty = Batch(torch.empty(2, 0, 64, 64), torch.zeros(2).long(), torch.zeros(2, 64, 64).byte(), ["a", "b"], maps)
    torch.testing.assert_close(model.loss(empty), model.loss(batch(images(2))))
    assert model(images(1)).map.shape == (1, 64, 64)

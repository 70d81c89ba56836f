"""Mutual scores against a brute-force loop over images, patches and their matches."""

import pytest
import torch
import torch.nn.functional as F
from support import fitted, images, tiny_run

from blemish.edge.errors import InputError
from blemish.methods.mutual import Mutual, matches, mutual_matches
from blemish.run.record import read_record
from blemish.run.train import train


def mutual(neighborhoods=(3,), share=0.3, stages=(2, 3), rescore=(1,)):
    return Mutual("test_resnet", list(stages), "random", list(neighborhoods), share, 0.0, "max", list(rescore), seed=0)


def by_hand(model, pictures, query, side, share):
    """The map (h, w) of picture `query` for the first stage, compared with all others by a loop."""
    stage = F.avg_pool2d(model.features(pictures)[0].double(), side, 1, side // 2, count_include_pad=False)
    patches = F.normalize(stage.flatten(2).mT, dim=2)  # (N, P, C)
    nearest = torch.stack([torch.cdist(patches[query], other).amin(1) for i, other in enumerate(patches) if i != query])  # (N − 1, P)
    return nearest.sort(0).values[: max(int(share * len(nearest)), 1)].mean(0).unflatten(0, stage.shape[2:])


@pytest.mark.parametrize(("side", "share"), [(1, 0.3), (3, 0.3), (3, 1.0), (5, 0.01)])
def test_an_image_of_the_fit_is_compared_with_all_others(side, share):
    pictures = images(9)
    model = mutual([side], share, [2])
    model = fitted(model, pictures)
    score, map = model(pictures[4:6])
    for row, query in enumerate((4, 5)):
        cells = by_hand(model, pictures, query, side, share)
        expected = F.interpolate(cells[None, None], (64, 64), mode="bilinear")[0, 0]
        torch.testing.assert_close(map[row].double(), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(score, map.amax((1, 2)))


def test_chunks_change_nothing(monkeypatch):
    patches, others = torch.randn(2, 5, 3), torch.randn(7, 4, 3)
    expected = torch.cdist(patches[:, None], others[None]).amin(3).mT  # (B, P, N)
    for values in (1, 100, 2**24):
        monkeypatch.setattr("blemish.methods.mutual.VALUES", values)
        torch.testing.assert_close(matches(patches, others), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("values", "held"), [(2**20, 2**28), (1, 1), (16, 7 * 4 * 4), (50, 7 * 4 * 3)])
def test_blocks_of_images_change_nothing(values, held, monkeypatch):
    patches = torch.randn(7, 4, 3)
    monkeypatch.setattr("blemish.methods.mutual.VALUES", values)
    monkeypatch.setattr("blemish.methods.mutual.MATCHES", held)
    found = list(mutual_matches(patches))
    assert [block.start for block, _ in found] == list(range(0, 7, min(7, max(held // 28, 1))))
    expected = torch.cdist(patches[:, None], patches[None]).amin(3).mT  # (N, P, N)
    torch.testing.assert_close(torch.cat([distance for _, distance in found]), expected, rtol=1e-4, atol=2e-3)


def test_a_folder_compared_at_once_has_the_scores_of_its_images():
    pictures = torch.cat([images(8), images(8)[2:3]])  # one of them twice
    model = fitted(mutual([1, 3]), pictures)
    maps = model.features(pictures)
    for one, other in zip(model.among([stage.shape[1:] for stage in maps]), model.compare(maps)[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_scores_are_smoothed_as_by_the_official_matrices():
    pictures = images(9)
    model = fitted(mutual(stages=[2], rescore=[1, 2, 4]), pictures)
    similarity = model.means @ model.means.T
    torch.testing.assert_close(similarity.diagonal(), torch.ones(9))
    expected = []
    for k in (1, 2, 4):
        kept = torch.where(similarity >= similarity.sort(1, descending=True).values[:, k - 1 : k], similarity, 0)
        expected.append(kept / kept.sum(1, keepdim=True) @ model.scores)
    torch.testing.assert_close(model(pictures).score, torch.stack(expected).mean(0), rtol=1e-4, atol=1e-5)
    plain = fitted(mutual(stages=[2]), pictures)
    torch.testing.assert_close(model(pictures).map, plain(pictures).map)
    cells = plain.compare(plain.features(pictures))[0]
    torch.testing.assert_close(model.scores, cells[0].amax((1, 2)), rtol=1e-4, atol=1e-5)


def test_a_stranger_among_alike_images_stands_out():
    alike = images(1).repeat(8, 1, 1, 1) + 0.02 * images(8, seed=1)
    pictures = torch.cat([alike, images(1, seed=2)])
    score = fitted(mutual(), pictures)(pictures).score
    assert score.argmax() == 8


def test_arguments():
    with pytest.raises(InputError, match=r"model\.neighborhoods"):
        mutual(neighborhoods=[2])
    with pytest.raises(InputError, match="image_size"):
        fitted(mutual(), images(4))(images(1, side=96))


def test_unlabelled_test_images_score_each_other(tiny, tmp_path):
    metrics = train(tiny_run(tiny, tmp_path / "run", "model=mutual", "protocol=unlabelled"))
    assert metrics["image_auroc"] > 0.7
    assert read_record(tmp_path / "run")["protocol"] == "unlabelled"

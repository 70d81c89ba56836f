import time

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from blemish.run.timing import STAGES, StageTimes

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # waiting for batches is what is measured
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),  # lightning 2.6 on torch 2.14
]
DECODE, FEATURES, STEP, METRICS = 0.02, 0.015, 0.01, 0.012  # seconds an image, a forward pass, a step, a batch


class Slow(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        time.sleep(DECODE)
        return torch.full((1,), float(index))


class Backbone(nn.Module):
    def forward(self, x):
        time.sleep(FEATURES)
        return x


class Toy(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone = Backbone()
        self.head = nn.Linear(1, 1)

    def training_step(self, batch, index):
        x = self.backbone(batch)
        time.sleep(STEP)
        return self.head(x).sum()

    def test_step(self, batch, index):
        x = self.backbone(batch)
        time.sleep(STEP)
        return self.head(x)

    predict_step = test_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


class Validated(Toy):
    def validation_step(self, batch, index):
        time.sleep(STEP)


class Metrics(pl.Callback):
    def __init__(self, times):
        self.times = times

    def on_test_batch_end(self, *_):
        with self.times.stage("metrics"):
            time.sleep(METRICS)


def trainer_of(*callbacks):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(accelerator="cpu", devices=1, max_epochs=2, callbacks=list(callbacks), log_every_n_steps=1, **quiet)


def close(seconds, expected):
    assert expected <= seconds <= expected + 1.0  # a busy machine sleeps longer; time charged wrongly fails another stage's lower bound


@pytest.mark.parametrize("first", ["times", "metrics"])
def test_stages_are_what_was_slept_and_add_up_to_the_wall_time(first):
    times, model = StageTimes(Backbone), Toy()
    metrics = Metrics(times)
    trainer = trainer_of(*([times, metrics] if first == "times" else [metrics, times]))
    loader = DataLoader(Slow(), batch_size=2)
    began = time.perf_counter()
    trainer.test(model, loader, verbose=False)
    wall, total = time.perf_counter() - began, times.total()
    assert list(total) == list(STAGES)
    close(total["decode"], 6 * DECODE)
    close(total["features"], 3 * FEATURES)
    close(total["score"], 3 * STEP)
    close(total["metrics"], 3 * METRICS)
    assert total["fit"] == 0
    assert wall - 0.5 < sum(total.values()) <= wall

    began = time.perf_counter()
    trainer.fit(model, loader)
    wall, before, total = time.perf_counter() - began, total, times.total()
    close(total["decode"] - before["decode"], 2 * 6 * DECODE)
    close(total["features"] - before["features"], 2 * 3 * FEATURES)
    close(total["fit"], 2 * 3 * STEP)
    assert total["score"] == before["score"]
    spent = sum(total.values()) - sum(before.values())
    assert wall - 0.5 < spent <= wall

    trainer.predict(model, loader, return_predictions=False)
    before, total = total, times.total()
    close(total["decode"] - before["decode"], 6 * DECODE)
    close(total["score"] - before["score"], 3 * STEP)
    assert not model.backbone._forward_hooks
    assert not model.backbone._forward_pre_hooks


def test_between_the_blocks_nothing_is_charged_and_in_them_it_is_known_at_any_time():
    times = StageTimes(Backbone)
    with times.stage("metrics"):
        time.sleep(0.01)
        first = times.total()["metrics"]
        time.sleep(0.01)
    before = times.total()
    time.sleep(0.02)
    assert times.total() == before
    assert 0.01 <= first <= before["metrics"] - 0.01


def test_validation_counts_as_fit():
    times = StageTimes(Backbone)
    trainer_of(times).fit(Validated(), DataLoader(Slow(), batch_size=2), DataLoader(Slow(), batch_size=6))
    close(times.total()["decode"], 2 * 6 * DECODE)
    assert times.total()["fit"] >= 2 * (6 * DECODE + STEP)


def test_an_error_in_the_backbone_closes_the_clock():
    class Broken(Backbone):
        def forward(self, x):
            raise RuntimeError("broken")

    times, model = StageTimes(Backbone), Toy()
    model.backbone = Broken()
    with pytest.raises(RuntimeError, match="broken"):
        trainer_of(times).test(model, DataLoader(Slow(), batch_size=2), verbose=False)
    assert times.current is None
    assert not model.backbone._forward_hooks
    before = times.total()
    time.sleep(0.01)
    assert times.total() == before

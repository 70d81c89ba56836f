"""Where the wall time of a run goes: decode, features, fit, score, metrics."""

import contextlib
import time
from collections.abc import Iterator

import torch
from lightning import Callback
from torch import nn

STAGES = ("decode", "features", "fit", "score", "metrics")


class StageTimes(Callback):
    """A clock that always charges exactly one stage, so that the stages of a trainer's run add up to its wall time.

    decode: the trainer waits for a batch. features: inside a module of `backbone_type`. fit: the rest of training. score: the rest of test
    and predict. metrics: inside `with times.stage("metrics")`. On a GPU every change of stage waits for the work that was launched.
    Lightning's profiler does not do: its actions are nested, so they do not add up, and it does not see the backbone inside a step.
    """

    def __init__(self, backbone_type: type[nn.Module]):
        self.backbone_type = backbone_type
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.current = None  # None between the trainer's runs: charged to nothing
        self.since = 0.0
        self.base = None  # the stage beside decode: "fit" or "score"
        self.before = []  # the stages that forward passes in progress were called from
        self.hooks = []

    def total(self) -> dict[str, float]:
        """Return the seconds of each of STAGES so far."""
        self.enter(self.current)
        return dict(self.seconds)

    def enter(self, stage: str | None) -> str | None:
        """Charge the time since the last change to the current stage, make `stage` the current one, and return the former."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        former = self.current
        if former is not None:
            self.seconds[former] += now - self.since
        self.current, self.since = stage, now
        return former

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Charge the block to `name`, one of STAGES, also outside of a trainer's run."""
        former = self.enter(name)
        try:
            yield
        finally:
            self.enter(former)

    def setup(self, trainer, module, stage) -> None:
        self.base = "fit" if stage == "fit" else "score"
        self.enter(self.base)

    def _open(self, trainer, module) -> None:
        self._unhook()
        self.enter(self.base)
        for part in module.modules():
            if isinstance(part, self.backbone_type):
                self.hooks.append(part.register_forward_pre_hook(lambda *_: self.before.append(self.enter("features"))))
                self.hooks.append(part.register_forward_hook(self._leave_features, always_call=True))

    def _leave_features(self, *_) -> None:
        if self.before:
            self.enter(self.before.pop())

    def _unhook(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks, self.before = [], []

    def _close(self, *_) -> None:
        self._unhook()
        self.enter(None)

    def teardown(self, trainer, module, stage) -> None:
        self._close()

    def on_exception(self, trainer, module, error) -> None:
        self._close()

    def _wait(self, *_) -> None:
        self.enter("decode")

    def _work(self, *_) -> None:
        self.enter(self.base)

    on_fit_start = on_test_start = on_predict_start = _open
    # a trainer fetches the next batch between the end of one hook of these and the start of another
    on_train_epoch_start = on_train_batch_end = on_validation_end = _wait
    on_test_epoch_start = on_test_batch_end = on_predict_epoch_start = on_predict_batch_end = _wait
    on_train_batch_start = on_train_epoch_end = on_validation_start = _work
    on_test_batch_start = on_test_epoch_end = on_predict_batch_start = on_predict_epoch_end = _work

"""The contract of a method: three base classes."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from blemish.edge.calibration import PROMISES, SPLIT
from blemish.edge.checks import check_choice, check_number, check_share_or_count, check_whole
from blemish.edge.errors import InputError
from blemish.edge.ranges import Range
from blemish.edge.selection import region_levels
from blemish.features.extractor import Features
from blemish.ops.accumulators import RowBuffer, RunningCovariance
from blemish.ops.maps import TOP, apply_ignore_mask, top_mean
from blemish.ops.rng import stream
from blemish.types import Batch, Prediction

Maps = Sequence[Tensor]  # (B, C, h, w) of each stage
Stages = Sequence[int | str]  # numbers or names, as `Features` has them
DTYPES = ("uint8", "uint16", "float32")
FEW_IMAGES = 5  # training images below which a run warns
AUGMENT = 1  # the purpose of its random numbers, which are not those of a loss
NO_RANGE = Range(math.inf, -math.inf, math.inf)  # of a dtype that no training image had

log = logging.getLogger(__name__)


def number(interval: str, **options) -> Callable[..., None]:
    """A rule for `check_arguments`, see `check_number`."""
    return partial(check_number, "model", interval, **options)


def integer(least: int, most: int | None = None, **options) -> Callable[..., None]:
    """A rule for `check_arguments`, see `check_whole`."""
    return partial(check_whole, "model", least, most, **options)


COUNT, SHARE_OR_COUNT = integer(1), partial(check_share_or_count, "model")
POSITIVE, NOT_NEGATIVE = number("(0, inf)"), number("[0, inf)")


class Detector(pl.LightningModule):
    """A method that needs no training implements `forward(image (B, 3, H, W) in [0, 1]) -> Prediction`.

    A method with a `backbone` implements `score(maps, size) -> Prediction` instead, so that cached maps can be scored, and
    `features(image) -> maps` if its maps are not simply the backbone's. `calibration` (n, 2) holds score and largest map value of each
    calibration image, and `ranges` the values of the training images by dtype; both are empty until then.
    """

    calibration: Tensor
    training_values: Tensor
    needs_images = False  # training needs the images beside the maps of `features`
    learns_defects = False  # trains on labelled defects too, see `TrainedDetector.learn_defects`
    min_images = 1  # smallest number of training images
    expects_calibration = False  # set before a fit that `calibrate` will follow
    expects_bag = False  # set before a fit that calibrate=full will follow
    map_threshold: float | None = None  # the method's own threshold for maps
    map_share: float | None = 0.0  # of the map whose largest values are averaged for the score, see `set_score`; None: it is not the map's
    decides_by_map = False  # without calibration images, a score above `map_threshold` makes an image anomalous
    reconstruct: Callable[[Tensor], Tensor] | None = None  # images (B, 3, H, W) to their reconstruction in [0, 1], if the method has one
    not_exportable: str | None = None  # why the method cannot be exported, and what to use instead
    map_not_exportable: str | None = None  # likewise, where only the score can be exported
    needs_fit = True  # False: a single image can be scored by `alarms(image)`, without any training
    reference_folder: str | None = None  # of normal images to fit to, instead of the training images
    scores_bag = False  # can score a new image and all training images, each by a fit to others
    whole_bag = False  # does so for every image: calibrate=full where no formula bounds the scores of the training images
    bound_kind: str | None = None  # what the method's own bound on false alarms rests on
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None  # of the images of a training step, without cached maps
    ensemble: ClassVar[type["Detector"] | None] = None  # takes detectors of this class, each with a backbone of its own
    quick: ClassVar[tuple[str, ...]] = ()  # overrides for tests that make it learn 24 small images in seconds

    def __init__(self):
        super().__init__()
        self.register_buffer("calibration", torch.empty(0, 2))
        self.register_buffer("training_values", torch.tensor([NO_RANGE] * len(DTYPES)))  # rows of DTYPES, columns of Range
        self.register_buffer("calibrated_as", torch.zeros((), dtype=torch.long))  # the place of `promise` in PROMISES
        self.register_buffer("region_levels", torch.empty(0))  # (J,) `selection.region_levels` of held-out images

    @property
    def fits_training_images(self) -> bool:
        return self.needs_fit and self.reference_folder is None

    @property
    def promise(self) -> str:
        """What thresholds from `calibration` promise, one of `edge.calibration.PROMISES`."""
        return list(PROMISES)[int(self.calibrated_as)]

    def set_calibration(self, values: Tensor, promise: str = SPLIT, peaks: Tensor | None = None) -> None:
        """Set `calibration` to values (n, 2) that were scored as `promise` says, and `region_levels` from `peaks` (n, K) of their maps."""
        self.calibration = values.to(self.device)
        self.calibrated_as.fill_(list(PROMISES).index(promise))
        levels = () if peaks is None else region_levels(peaks.cpu().numpy())
        self.region_levels = torch.tensor(levels, dtype=torch.float32, device=self.device)

    def check_arguments(self, **rules: tuple | Callable[..., None]) -> None:
        """Check saved hyperparameters by name; a rule is a tuple of choices, or a check that takes the value by its name."""
        for name, rule in rules.items():
            check = partial(check_choice, "model", rule) if isinstance(rule, tuple) else rule
            check(**{name: self.hparams[name]})

    def set_score(self, score: str | float, *own: str) -> None:
        """Choose how `from_map` scores images: max of the map, mean of its top 1 %, or of a share in (0, 1]; or a rule of the method's own.

        InputError for anything else.
        """
        self.check_arguments(score=number("(0, 1]", also=tuple(dict.fromkeys([*own, "max", "top"]))))
        self.map_share = None if score in own else {"max": 0.0, "top": TOP}.get(score, score)

    def from_map(self, map: Tensor, own: Tensor | None = None) -> Prediction:
        """The prediction for anomaly maps (B, H, W); `own` are the scores (B,) of the method's own rule, where that is chosen."""
        return Prediction(own if self.map_share is None else top_mean(map, self.map_share), map)

    def add_buffers(self, *names: str) -> None:
        """Register buffers that stay empty until the fit."""
        for name in names:
            self.register_buffer(name, torch.empty(0))

    @property
    def ranges(self) -> dict[str, Range]:
        rows = zip(DTYPES, self.training_values.tolist(), strict=True)
        return {dtype: Range(*row) for dtype, row in rows if row[0] <= row[1]}

    @ranges.setter
    def ranges(self, ranges: Mapping[str, Range]) -> None:
        self.training_values.copy_(torch.tensor([ranges.get(dtype, NO_RANGE) for dtype in DTYPES]))

    def features(self, image: Tensor) -> Maps:
        """Feature maps of images (B, 3, H, W), the costly frozen part of `forward`; unless overridden they may come from the cache."""
        return self.backbone(image)

    def maps(self, batch: Batch) -> Maps:
        """The maps that a batch brings, or else those of its images."""
        return self.features(batch.image) if batch.maps is None else batch.maps

    def inputs_for(self, split: str) -> tuple[bool, bool]:
        """Return (accepts_cached_maps, needs_images) for a split."""
        maps = type(self).features is Detector.features and isinstance(getattr(self, "backbone", None), Features)
        if split in ("train", "defects"):
            maps = maps and self.augment is None
            return maps, not maps or self.needs_images
        maps = maps and type(self).forward is Detector.forward
        return maps, not maps

    def score(self, maps: Maps, size: tuple[int, int]) -> Prediction:
        """The prediction for images of `size` (H, W) from their feature maps."""
        raise NotImplementedError(f"{type(self).__name__} has no feature maps")

    def forward(self, image: Tensor) -> Prediction:
        return self.score(self.features(image), tuple(image.shape[-2:]))

    def calibrate(self, batches: Iterable[Batch]) -> None:
        """Set what depends on held-out normal images, of which each process gets its share; called between fit and their scoring."""

    def test_step(self, batch: Batch, index: int) -> Prediction:
        prediction = self(batch.image) if batch.maps is None else self.score(batch.maps, tuple(batch.image.shape[-2:]))
        return apply_ignore_mask(prediction, batch.ignore_mask, self.map_share)

    predict_step = test_step

    def check_images(self, count: int, held_out: int) -> None:
        """Raise InputError for fewer training images than the fit takes, and warn where they say little of what is normal."""
        method, found = type(self).__module__.rpartition(".")[2], f"found {count} to train on and {held_out} held out for the threshold"
        if self.fits_training_images and count < self.min_images:
            raise InputError(f"train: {method} compares whole images and takes {self.min_images} at least; {found}")
        if self.fits_training_images and count < FEW_IMAGES:
            log.warning("train: so few images hardly show what is normal, expected %d or more; %s", FEW_IMAGES, found)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.setdefault(prefix + "region_levels", torch.empty(0))  # older files have none
        # the size of a fitted buffer is not known before: replace an empty one by the saved tensor, which may be mapped from disk
        for name, buffer in self._buffers.items():
            saved = state_dict.get(prefix + name)
            if saved is not None and buffer is not None and buffer.numel() == 0:
                self._buffers[name] = saved.to(buffer.device)
        super()._load_from_state_dict(state_dict, prefix, *args)


class OnePassDetector(Detector):
    """A method fitted in a single pass over the training images: `collect` from each batch, then `fit` to the state of all.

    `left_out` is FULL or CROSS of `edge.calibration.PROMISES` where training images can be scored without themselves by `leave_one_out`:
    FULL if no image put in the place of the one that was left out could raise its score further. Then the bound on false alarms of split
    conformal prediction holds (docs/calibration.md), as it does with `scores_bag`.
    """

    left_out: str | None = None
    leaving_out = False  # `predict_step` scores training images by `leave_one_out`

    def __init__(self):
        super().__init__()
        # automatic optimisation of one idle scalar: DDP wants a parameter, and global_step must move for a checkpoint to be written
        self.idle = nn.Parameter(torch.zeros(()))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.long))  # number of training images
        self.updating = False
        self.order: list[str] = []  # keys of the training images in the order of the state

    def new_state(self, images: int) -> RowBuffer | RunningCovariance:
        """An empty accumulator for what `collect` returns of `images` training images."""
        return RowBuffer(images)

    def collect(self, maps: Maps) -> Tensor:
        """The part of a batch's maps that the fit needs."""
        raise NotImplementedError

    def fit(self, state: RowBuffer | RunningCovariance) -> None:
        """Turn the state of all training images into buffers."""
        raise NotImplementedError

    def leave_one_out(self, maps: Maps, size: tuple[int, int], rows: Sequence[int]) -> Prediction:
        """The predictions of training images as if each had not been one, from their places `rows` among the rows of the state."""
        raise NotImplementedError

    def restore(self, state: RowBuffer | RunningCovariance) -> None:
        """Fill an empty state with that of the images fitted so far, from the buffers alone."""
        raise InputError(f"update: {type(self).__name__} cannot be updated with more images; fit it again on all of them")

    def update(self, trainer: pl.Trainer, data: pl.LightningDataModule) -> None:
        """Add the training images of `data` to a fitted method in one pass of `trainer`, without those it was fitted to.

        The result is a fit to all images, except for PatchCore, whose bank is extended by a coreset of the new patches. Calibration
        scores are dropped, as they belong to the detector before the update. InputError if the method cannot be updated.
        """
        self.updating = True
        try:
            trainer.fit(self, datamodule=data)
        finally:
            self.updating = False
        self.calibration = self.calibration.new_empty(0, 2)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.idle], lr=0.0)

    def on_train_start(self) -> None:
        if self.trainer.max_epochs != 1:
            raise InputError(f"trainer.max_epochs={self.trainer.max_epochs}: {type(self).__name__} fits in a single pass; use 1")
        loader = self.trainer.train_dataloader
        if getattr(order := order_of(loader), "epoch_size", None):
            raise InputError(f"epoch_size={len(order)}: {type(self).__name__} fits in a single pass over all images; use null")
        self.total = len(loader.dataset) + (int(self.fitted) if self.updating else 0)
        self.order = []
        self.state = self.new_state(self.total).to(self.device)
        if self.updating and self.global_rank == 0:
            with torch.no_grad():
                self.restore(self.state)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        with torch.inference_mode():
            maps = self.maps(batch)
        with torch.no_grad():
            self.state.update(self.collect(maps))
        self.order += batch.path
        return self.idle * 0.0

    def predict_step(self, batch: Batch, index: int) -> Prediction:
        if not self.leaving_out:
            return self.test_step(batch, index)
        rows = [self.order.index(key) for key in batch.path]
        return apply_ignore_mask(
            self.leave_one_out(self.maps(batch), tuple(batch.image.shape[-2:]), rows), batch.ignore_mask, self.map_share
        )

    @torch.no_grad()
    def on_train_end(self) -> None:
        self.state.gather()
        self.fit(self.state)
        self.fitted.fill_(self.total)
        del self.state


class TrainedDetector(Detector):
    """A method fitted by gradient descent: `loss`, and `configure_optimizers` as in its paper; one constructor argument is `seed`.

    A loss gets the maps of a frozen teacher from `maps(batch)`; if it needs nothing else, the method sets `needs_images = False`.
    `before_training` and `after_training` see all training images, in every process, before the first step and after the last.
    """

    needs_images = True
    clipped_by = "trainer.gradient_clip_val"  # the config key that bounds its gradients

    def before_training(self, batches: Iterable[Batch]) -> None:
        """Compute statistics needed before the optimiser is made; called again when a training is resumed."""

    def learn_defects(self, batches: Iterable[Batch]) -> None:
        """Keep what the loss needs of the labelled defects; called after `before_training` of a method that `learns_defects`."""

    def loss(self, batch: Batch) -> Tensor:
        """The paper's training loss, a scalar."""
        raise NotImplementedError

    def after_training(self, batches: Iterable[Batch]) -> None:
        """Compute statistics under the trained network, which is in eval mode."""

    @property
    def processes(self) -> int:
        return self.trainer.world_size if self._trainer else 1

    def generator(self, *purpose: int) -> torch.Generator:
        """Random numbers of one step, from seed, step, process and purpose alone, so that a resumed training draws the same."""
        step = self.trainer.fit_loop.total_batch_idx if self._trainer else 0
        return stream(self.hparams.seed, step, self.global_rank, *purpose, device=self.device)

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.to(self.trainer.strategy.root_device)
            self.trainer.fit_loop.setup_data()
            with torch.no_grad():
                self.before_training(self._batches())
                data = self.trainer.datamodule
                if self.learns_defects and data is not None and any(sample.split == "defects" for sample in data.samples):
                    loader = data.loader("defects", sharded=False)
                    self.learn_defects(self.trainer.strategy.batch_to_device(batch) for batch in loader)

    @torch.no_grad()
    def on_train_end(self) -> None:
        self.eval()
        if self.processes > 1:
            for buffer in self.buffers():  # the last batch has moved each process's BatchNorm its own way
                first = buffer.contiguous()
                torch.distributed.broadcast(first, 0)
                buffer.copy_(first)
        self.after_training(self._batches())

    def _batches(self) -> Iterator[Batch]:
        # every process iterates over all images, so that all get the same result
        loader = self.trainer.datamodule.loader("train", sharded=False) if self.processes > 1 else self.trainer.train_dataloader
        with getattr(order_of(loader), "full_pass", nullcontext)():  # every image once, whatever an epoch is
            for batch in loader:
                yield self.trainer.strategy.batch_to_device(batch)

    def augmented(self, batch: Batch) -> Batch:
        """The batch of a training step with its images changed at random; the masks, which no loss looks at, stay as they are."""
        return batch if self.augment is None else batch._replace(image=self.augment(batch.image, self.generator(AUGMENT)))

    def training_step(self, batch: Batch, index: int) -> Tensor:
        batch = self.augmented(batch)
        loss = self.loss(batch)
        self.watch(loss, batch)
        return loss * self.share(batch)

    def watch(self, loss: Tensor, batch: Batch) -> None:
        """Log a step's loss; InputError unless it is finite."""
        if not torch.isfinite(loss):
            raise InputError(
                f"the loss is {float(loss.detach())} in epoch {self.current_epoch}, step {self.trainer.fit_loop.total_batch_idx}; choose a "
                f"smaller model.learning_rate, {self.clipped_by}=1, or trainer.precision=32-true if it is another"
            )
        self.log("loss", loss.detach(), prog_bar=True, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(batch.image))

    def summed(self, value: float) -> float:
        """The sum of a number over all processes."""
        if self.processes == 1:
            return value
        return float(self.trainer.strategy.reduce(torch.tensor(float(value), device=self.device), reduce_op="sum"))

    def share(self, batch: Batch) -> float:
        """The weight of this process's loss whose mean over the processes is the mean over all images of the batch."""
        return len(batch.image) * self.processes / self.summed(len(batch.image))

    def apart(self) -> AbstractContextManager:
        """A block of passes that DDP takes no part in, as several backward passes a step or parts of the parameters; `average` follows."""
        return self.trainer.strategy.block_backward_sync() if self.processes > 1 else nullcontext()

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace the gradients of the parameters, the same ones in every process, by their mean over the processes."""
        if self.processes == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        mean = self.trainer.strategy.reduce(torch.cat([gradient.flatten() for gradient in gradients]))  # one message for all
        for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view(gradient.shape))


def order_of(loader: DataLoader) -> Sampler | None:
    """The sampler that draws the rows of a loader, also where processes share its batches; with `epoch_size` it has `full_pass`."""
    return getattr(loader.batch_sampler, "sampler", None)

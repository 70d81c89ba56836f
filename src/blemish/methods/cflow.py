"""CFlow: the likelihood of every feature vector given its place, by normalising flows (Gudovskiy et al. 2021, arXiv 2107.12571)."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blemish.detector import COUNT, POSITIVE, Maps, Stages, TrainedDetector, integer
from blemish.edge.errors import InputError
from blemish.features.extractor import Features
from blemish.ops.flow import ConditionalFlow, log_likelihood, positional_encoding
from blemish.ops.maps import smooth_upsample
from blemish.ops.rng import seeded
from blemish.types import Batch, Prediction

META_EPOCHS, WARM_UP = 25, 2  # the official code's: the learning rate falls in so many steps, and rises during so many first ones
ROWS = 2048  # vectors at a time: their hidden units stay in a processor's cache


class FibreBatch(NamedTuple):
    """Vectors of one stage for one step of the optimiser."""

    stage: int
    vectors: Tensor  # (n, C)
    places: Tensor  # (n,) on the map, line by line
    grid: tuple[Tensor, Tensor]  # encodings of its columns and rows, (w, condition/2) and (h, condition/2)


class CFlow(TrainedDetector):
    """Anomaly = −log of the likelihoods of a position's feature vectors, summed over the stages.

    Each stage has a flow of `blocks` couplings, clamped at `clamp`, whose condition is a sinusoidal encoding of the position in `condition`
    numbers. The vectors of a stage, from all positions and images of a batch in random order, are split into groups of `fibre_batch`, and
    each group is one step of the optimiser. The score is the map's maximum.
    """

    quick = ("trainer.max_epochs=4", "model.learning_rate=0.002", "model.blocks=4")
    needs_images = False

    def __init__(
        self,
        backbone: str,
        stages: Stages,
        weights: str,
        blocks: int,
        condition: int,
        clamp: float,
        fibre_batch: int,
        learning_rate: float,
        score: str | float,
        seed: int,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.set_score(score)
        self.check_arguments(blocks=COUNT, fibre_batch=COUNT, clamp=POSITIVE, learning_rate=POSITIVE, condition=integer(4))
        if condition % 4:
            raise InputError(f"model.condition={condition}: expected a multiple of 4, sin and cos in two directions")
        self.backbone = Features(backbone, stages, weights, seed)
        with seeded(seed):
            self.flows = nn.ModuleList(ConditionalFlow(channels, condition, blocks, clamp) for channels in self.backbone.channels)
        self.register_buffer("highest", torch.zeros(len(self.flows)))  # log-likelihood per dimension, of the training images
        self.condition, self.fibre_batch, self.learning_rate = condition, fibre_batch, learning_rate
        self.queue: list[FibreBatch] = []  # of the current batch, last first

    def loss(self, batch: Batch) -> Tensor:
        """The loss of the next fibre batch; when none is left, new ones are made from the batch's maps."""
        if not self.queue:
            self.queue = list(self.fibre_batches(self.maps(batch)))[::-1]
        stage, x, places, grid = self.queue.pop()
        flow, count, total = self.flows[stage], len(x), 0.0
        for part, at in zip(x.split(ROWS), places.split(ROWS), strict=True):
            likelihood = log_likelihood(*flow(part, flow.project(*grid), split(at, grid)))  # (n,)
            # the official code's loss: the paper's eq. 6 is the mean of −log p itself, which has no lower bound
            loss = -F.logsigmoid(likelihood / x.shape[-1]).sum() / count
            total = total + (differentiated(loss, list(flow.parameters())) if count > ROWS else loss)
        return total

    def fibre_batches(self, maps: Maps) -> Iterator[FibreBatch]:
        """Batches of at least `fibre_batch` vectors, where there are so many, with every position of every image once."""
        generator = self.generator()
        for stage, map in enumerate(maps):
            rows, grid = self.rows(map).flatten(0, 1), self.encodings(map)  # (B·P, C)
            order = torch.randperm(len(rows), generator=generator, device=rows.device)
            # the official code drops an incomplete last batch; here its vectors are spread over the others
            for drawn in order.tensor_split(max(1, int(self.summed(len(rows))) // self.fibre_batch)):
                yield FibreBatch(stage, rows[drawn], drawn % map[0, 0].numel(), grid)

    def rows(self, map: Tensor) -> Tensor:
        return map.flatten(2).mT.float()  # (B, P, C)

    def encodings(self, map: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = (positional_encoding(self.condition // 2, length, map.device) for length in map.shape[-2:])
        return columns, rows

    def configure_optimizers(self) -> dict:
        if self.trainer.accumulate_grad_batches != 1:
            raise InputError(f"trainer.accumulate_grad_batches={self.trainer.accumulate_grad_batches}: CFlow steps within a batch; use 1")
        optimizer = torch.optim.Adam(self.flows.parameters(), self.learning_rate)
        batches = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda batch: learning_rate_factor(batch / batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_step(self, epoch: int, index: int, optimizer: torch.optim.Optimizer, closure: Callable) -> None:
        with self.apart():  # each step changes one stage's flow
            optimizer.step(closure)  # the closure computes the loss, which makes the fibre batches
            while self.queue:
                optimizer.step(closure)

    def on_after_backward(self) -> None:
        self.average(self.flows.parameters())

    def likelihood(self, maps: Maps) -> list[Tensor]:
        """Log-likelihood of every position divided by the number of dimensions, (B, h, w) per stage."""
        likelihoods = []
        for flow, map in zip(self.flows, maps, strict=True):
            rows, grid = self.rows(map), self.encodings(map)  # (B, P, C)
            tables = flow.project(*grid)
            # an exported graph takes all rows at once, as its batch size is free
            step = rows.shape[1] if torch.compiler.is_exporting() else max(1, ROWS // len(map))
            places = torch.arange(rows.shape[1], device=map.device).split(step)
            parts = zip(rows.split(step, dim=1), places, strict=True)
            logs = [log_likelihood(*flow(x, tables, split(at, grid))) for x, at in parts]  # (B, p) each
            likelihoods.append(torch.cat(logs, 1).unflatten(1, map.shape[-2:]) / map.shape[1])
        return likelihoods

    def after_training(self, batches: Iterable[Batch]) -> None:
        peaks = [torch.stack([logs.amax() for logs in self.likelihood(self.maps(batch))]) for batch in batches]  # (S,) each
        # the official code subtracts the test images' maximum, which no image may depend on here
        self.highest = torch.stack(peaks).amax(0)

    def score(self, maps: Maps, size: tuple[int, int]) -> Prediction:
        # 1: the likeliest in training
        relative = [(logs - top).exp() for logs, top in zip(self.likelihood(maps), self.highest, strict=True)]
        # with half-pixel centres, where the official code aligns corners
        normal = sum(smooth_upsample(stage, size, 0.0) for stage in relative)  # (B, H, W)
        # the official map is the maximum of all sums minus the sum: the same order, but float32 could not distinguish small sums
        map = -normal.clamp_min(torch.finfo(torch.float32).tiny).log()  # (B, H, W)
        return self.from_map(map)


def split(places: Tensor, grid: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The columns and rows (n,) of places (n,), see `FibreBatch`."""
    width = len(grid[0])
    return places % width, places // width


def differentiated(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """The same loss with its gradient taken at once, so that what the way to it needed is given back: it is linear in the parameters."""
    if not loss.requires_grad:
        return loss
    gradients = torch.autograd.grad(loss, parameters)
    return loss.detach() + sum(((p - p.detach()) * g).sum() for p, g in zip(parameters, gradients, strict=True))


def learning_rate_factor(progress: float) -> float:
    """The factor of the learning rate at a share of the training in [0, 1], as in the official code.

    A cosine from 1 to 10⁻³ in META_EPOCHS steps; in the first WARM_UP of them a straight line from 1/10 to the cosine's value there.
    """

    def cosine(epoch: float) -> float:
        return 1e-3 + (1 - 1e-3) * (1 + math.cos(math.pi * epoch / META_EPOCHS)) / 2

    epoch = progress * META_EPOCHS
    return 0.1 + epoch / WARM_UP * (cosine(WARM_UP) - 0.1) if epoch < WARM_UP else cosine(math.floor(epoch))

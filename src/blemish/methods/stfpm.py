"""STFPM: student-teacher feature pyramid matching (Wang, Han, Ding, Huang 2021, arXiv 2103.04257)."""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from blemish.detector import NOT_NEGATIVE, POSITIVE, Maps, Stages, TrainedDetector, number
from blemish.features.extractor import Features, create
from blemish.ops.maps import smooth_upsample
from blemish.types import Batch, Prediction


class STFPM(TrainedDetector):
    """Anomaly = where a student, taught on normal images alone, does not give its frozen teacher's features.

    The student is the teacher's network from scratch, drawn from `seed`. Its loss is the mean over the positions of `matching_error`,
    summed over the stages (paper, eq. 1 to 3 with α = 1); the map is the product of the stages' errors, and the image's score its maximum.
    """

    quick = ("trainer.max_epochs=8",)

    def __init__(
        self,
        backbone: str,
        stages: Stages,
        weights: str,
        learning_rate: float,
        momentum: float,
        weight_decay: float,
        score: str | float,
        seed: int,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.set_score(score)
        self.check_arguments(learning_rate=POSITIVE, momentum=number("[0, 1)"), weight_decay=NOT_NEGATIVE)
        self.backbone = Features(backbone, stages, weights, seed)
        # a seed of its own: with weights=random the student would start as its teacher and have nothing to learn
        student = create(backbone, list(stages), "random", seed + 1, named=False).requires_grad_(True).train()
        self.student = student.to(memory_format=torch.channels_last)

    def errors(self, image: Tensor, taught: Maps) -> list[Tensor]:
        """`matching_error` (B, h, w) of every stage, for images and their teacher maps."""
        image = ((image - self.backbone.mean) / self.backbone.std).contiguous(memory_format=torch.channels_last)
        learnt = [m.movedim(-1, 1) if last else m for m, last in zip(self.student(image), self.backbone.channels_at_end, strict=True)]
        return [matching_error(t.float(), s.float()) for t, s in zip(taught, learnt, strict=True)]

    def loss(self, batch: Batch) -> Tensor:
        # the official code leaves out eq. 1's ½, which doubles what the learning rate means
        return sum(error.mean() for error in self.errors(batch.image, self.maps(batch)))

    def forward(self, image: Tensor) -> Prediction:
        size = tuple(image.shape[-2:])
        errors = self.errors(image, self.features(image))
        # eq. 4 brings every stage to the image's size before it multiplies; the official code multiplies at 64 × 64 and resizes the product
        map = prod(smooth_upsample(error, size, sigma=0.0) for error in errors)  # (B, H, W)
        return self.from_map(map)  # the maximum, in paper and code

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # the official code keeps the epoch that is best on 20 % of the normal images; here all of them train, and the last epoch counts
        rate, momentum, decay = (self.hparams[name] for name in ("learning_rate", "momentum", "weight_decay"))
        return torch.optim.SGD(self.student.parameters(), rate, momentum, weight_decay=decay)


def matching_error(taught: Tensor, learnt: Tensor) -> Tensor:
    """½‖t/‖t‖ - s/‖s‖‖² over the channels of maps (B, C, h, w): (B, h, w), from 0 to 2 (paper, eq. 1)."""
    return (F.normalize(taught, dim=1) - F.normalize(learnt, dim=1)).square().sum(1) / 2

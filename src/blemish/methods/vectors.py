"""What DFM and DFKDE share: a fit to one vector of each training image, which can be repeated without each of them.

And, with Subspace: calibrate=full by further fits with each new image.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from blemish.detector import Maps, OnePassDetector
from blemish.edge.calibration import CROSS, FULL
from blemish.ops.accumulators import RowBuffer
from blemish.ops.bag import FEW, FOLDS, folds, placed
from blemish.ops.maps import joined
from blemish.types import Prediction

FEW_REFITS = 200  # training images up to which a fit without each is worth its time


class BagDetector(OnePassDetector):
    """A method that keeps `rows` (N, …) of the training images, to score them and a new image each by a fit to others."""

    fold_counts = FOLDS  # of a bag of up to FEW images, and of more

    def __init__(self):
        super().__init__()
        self.add_buffers("rows")

    def bag(self, row: Tensor, maps: Maps) -> Tensor:
        """Scores (N + 1,) of `rows` and a new one, each by a fit to those of other folds; `maps` are those of any image."""
        raise NotImplementedError

    def folds(self, count: int) -> Tensor:
        """The fold (N,) of each row of a bag."""
        return folds(count, self.fold_counts[count > FEW], self.hparams.seed)

    @property
    def whole_bag(self) -> bool:
        return len(self.calibration) > 0 and self.promise == FULL != self.left_out

    def in_bag(self, found: Prediction, rows: Tensor, maps: Maps) -> Prediction:
        """The prediction of images from their rows; with `whole_bag` each score moves to where its p-value is that among its bag's."""
        if torch.compiler.is_exporting() or not self.whole_bag:
            return found
        bags = torch.stack([self.bag(row, maps) for row in rows])  # (B, N + 1)
        return found._replace(score=placed(found.score, bags, self.calibration[:, 0]))


class VectorDetector(BagDetector):
    """A method that is fitted to the vectors (N, D) of the training images, `rows`, and keeps them."""

    min_images = 2
    is_plain = False  # the score is that of one Gaussian of all directions, so that no choice of components depends on an image

    @property
    def left_out(self) -> str | None:
        return FULL if self.is_plain else CROSS if len(self.rows) <= FEW_REFITS else None

    def leave_one_out(self, maps: Maps, size: tuple[int, int], rows: Sequence[int]) -> Prediction:
        kept, every, found = dict(self._buffers), self.rows, []
        for b, row in enumerate(rows):
            state = RowBuffer(len(every) - 1)
            state.update(torch.cat([every[:row], every[row + 1 :]]))
            self.fit(state)
            found.append(self.score([stage[b : b + 1] for stage in maps], size))
        self._buffers.update(kept)
        return joined(found)

    def bag_scores(self, rows: Tensor, fold: Tensor, maps: Maps) -> Tensor:
        """Scores (N,) of vectors (N, D), each by a fit to those of other folds (N,); `maps` are those of any image."""
        raise NotImplementedError

    def bag(self, row: Tensor, maps: Maps) -> Tensor:
        return self.bag_scores(torch.cat([self.rows, row[None]]), self.folds(len(self.rows) + 1), maps)

    def restore(self, state: RowBuffer) -> None:
        state.update(self.rows)

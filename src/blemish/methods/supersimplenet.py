"""SuperSimpleNet: noise in feature space teaches what is not normal, labelled defects teach more (Rolih et al. 2024, arXiv 2408.03143)."""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blemish.detector import COUNT, NOT_NEGATIVE, POSITIVE, Maps, Stages, TrainedDetector, number
from blemish.features.extractor import Features
from blemish.ops.maps import smooth_upsample
from blemish.ops.rng import seeded
from blemish.types import ANOMALOUS, IGNORED, Batch, Prediction

UNKNOWN = -1  # a cell whose truth no loss counts
SCALES = 6  # number of scales of Perlin noise, 1, 2, 4, … cells a side
DECAY, ADAPTOR_DECAY = 1e-5, 1e-2  # AdamW's weight decay, the official code's


class SuperSimpleNet(TrainedDetector):
    """Anomaly = what two small heads tell from normal features: a map of single positions, and a score of the image from map and features.

    Features of `stages` on a grid `upscale` times as fine as the first one's are adapted by one linear layer. In training Gaussian noise
    with a deviation of `noise` is added where Perlin noise is above `perlin`; these positions, and labelled defects, are to be told from
    the others. standardize: each channel has mean 0 and deviation 1 on the training images, so that `noise` fits any backbone.
    """

    quick = ("trainer.max_epochs=40", "model.learning_rate=0.003", "model.hidden=64", "model.channels=16", "model.upscale=1")
    quick += ("model.standardize=true", "model.noise=1.0", "model.sigma=1", "model.score=max")
    needs_images = False
    learns_defects = True

    def __init__(
        self,
        backbone: str,
        stages: Stages,
        weights: str,
        upscale: int,
        standardize: bool,
        noise: float,
        perlin: float,
        hidden: int,
        channels: int,
        margin: float,
        learning_rate: float,
        sigma: float,
        score: str | float,
        seed: int,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.set_score(score, "head")
        self.check_arguments(upscale=COUNT, standardize=(True, False), noise=POSITIVE, perlin=number("[0, 1)"), hidden=COUNT)
        self.check_arguments(channels=COUNT, margin=NOT_NEGATIVE, learning_rate=POSITIVE, sigma=NOT_NEGATIVE)
        self.backbone = Features(backbone, stages, weights, seed)
        dim = sum(self.backbone.channels)
        with seeded(seed):
            self.adaptor = nn.Conv2d(dim, dim, 1)
            self.segment = nn.Sequential(
                nn.Conv2d(dim, hidden, 1), nn.BatchNorm2d(hidden), nn.LeakyReLU(0.2), nn.Conv2d(hidden, 1, 1, bias=False)
            )
            self.head = nn.Sequential(nn.Conv2d(dim + 1, channels, 5, padding="same"), nn.BatchNorm2d(channels), nn.ReLU())
            self.decide = nn.Linear(2 * channels + 2, 1)
            for layer in self.modules():
                if isinstance(layer, nn.Linear | nn.Conv2d) and layer.weight.requires_grad:
                    nn.init.xavier_normal_(layer.weight)
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))
        self.train_head(self.map_share is None)
        self.known: list[tuple[list[Tensor], Tensor]] = []  # maps (C, h, w) of each stage, and truth (h, w), of each labelled defect

    def embed(self, maps: Maps) -> Tensor:
        """Features (B, D, h, w): the stages on one grid, then means of 3×3 cells."""
        size = [self.hparams.upscale * side for side in maps[0].shape[-2:]]
        x = torch.cat([F.interpolate(m.float(), size, mode="bilinear", align_corners=True) for m in maps], 1)
        x = (x - self.mean[:, None, None]) / self.scale[:, None, None]
        return F.avg_pool2d(x.contiguous(memory_format=torch.channels_last), 3, 1, 1)  # products of single positions are twice as fast so

    def train_head(self, needed: bool) -> None:
        """Train the head of the score or leave it out: it takes up to half of the time, and a score of the map may do without."""
        self.has_head = needed
        for part in (self.head, self.decide):
            part.requires_grad_(needed)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Map (B, 1, h, w) and score (B,), if it `has_head`, of adapted features (B, D, h, w), both logits of being anomalous."""
        map = self.segment(x)
        if not self.has_head:
            return map, None
        passed = map if self.known else map.detach()  # the official code lets the score teach the map where there are labels
        seen = self.head(torch.cat((x, passed), 1))  # (B, channels, h, w)
        return map, self.decide(torch.cat((seen.amax((2, 3)), seen.mean((2, 3)), passed.amax((2, 3)), passed.mean((2, 3))), 1))[:, 0]

    def before_training(self, batches: Iterable[Batch]) -> None:
        if not self.hparams.standardize:
            return
        self.mean.zero_()
        self.scale.fill_(1)
        count, total, square = 0, 0.0, 0.0
        for batch in batches:
            x = self.embed(self.maps(batch)).double()
            count += x[:, 0].numel()
            total, square = total + x.sum((0, 2, 3)), square + x.square().sum((0, 2, 3))
        self.mean.copy_(total / count)
        self.scale.copy_((square / count - (total / count) ** 2).clamp_min(1e-12).sqrt())

    def learn_defects(self, batches: Iterable[Batch]) -> None:
        self.known = []
        for batch in batches:
            maps = self.maps(batch)
            truth = truth_of(batch.mask, [self.hparams.upscale * side for side in maps[0].shape[-2:]])
            self.known += [([stage[i] for stage in maps], truth[i]) for i in range(len(truth))]
        marked = all((truth == 1).any() for _, truth in self.known)
        self.train_head(self.map_share is None or not marked)  # through it a defect without a mask teaches the map

    def loss(self, batch: Batch) -> Tensor:
        generator = self.generator()
        maps = self.maps(batch)
        size = [self.hparams.upscale * side for side in maps[0].shape[-2:]]
        normal = torch.where(batch.mask == IGNORED, batch.mask, 0)  # what is trained on counts as normal, whatever it is
        truth, label = truth_of(normal, size), torch.zeros(len(normal), device=self.device)
        if self.known:  # half of the batch are labelled defects
            keep = max(len(truth) // 2, 1)
            drawn = torch.randint(len(self.known), (keep,), generator=generator, device=self.device).tolist()
            defects = [torch.stack(stages) for stages in zip(*(self.known[i][0] for i in drawn), strict=True)]
            maps = [torch.cat((stage[:keep], defect)) for stage, defect in zip(maps, defects, strict=True)]
            truth = torch.cat((truth[:keep], torch.stack([self.known[i][1] for i in drawn])))
            label = torch.cat((label[:keep], torch.ones(keep, device=self.device)))
        x, truth, label = self.adaptor(self.embed(maps)), truth.repeat(2, 1, 1), label.repeat(2)
        noisy = draw_masks(len(truth), size, self.hparams.perlin, generator) & (truth == 0)  # (2B, h, w)
        cells = x.permute(0, 2, 3, 1).repeat(2, 1, 1, 1)  # (2B, h, w, D)
        noise = torch.randn(int(noisy.sum()), cells.shape[-1], generator=generator, device=self.device)
        cells[noisy] += self.hparams.noise * noise
        map, score = self.heads(cells.permute(0, 3, 1, 2))
        truth = torch.where(noisy, 1, truth)
        label = torch.maximum(label, noisy.flatten(1).any(1).float())
        loss = segmentation_loss(map[:, 0], truth, self.hparams.margin)
        return loss if score is None else loss + focal(score, label).mean()

    def score(self, maps: Maps, size: tuple[int, int]) -> Prediction:
        map, score = self.heads(self.adaptor(self.embed(maps)))
        return self.from_map(smooth_upsample(map[:, 0].float(), size, self.hparams.sigma), None if score is None else score.float())

    def configure_optimizers(self) -> dict:
        rate, heads = self.hparams.learning_rate, [*self.segment.parameters(), *self.head.parameters(), *self.decide.parameters()]
        adaptor = {"params": self.adaptor.parameters(), "lr": rate / 2, "weight_decay": ADAPTOR_DECAY}
        optimizer = torch.optim.AdamW([adaptor, {"params": heads}], rate, weight_decay=DECAY)
        epochs = self.trainer.max_epochs if self._trainer else 10
        milestones = [int(share * epochs) for share in (0.8, 0.9)]
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, 0.4)}


def segmentation_loss(map: Tensor, truth: Tensor, margin: float) -> Tensor:
    """Truncated L1 of the logits (B, h, w) of normal and anomalous cells, to be below −margin and above it, plus their focal loss."""
    normal, anomalous = map[truth == 0], map[truth == 1]
    parts = [F.relu(normal + margin), F.relu(margin - anomalous), focal(map[truth != UNKNOWN], truth[truth != UNKNOWN].float())]
    return sum(part.mean() for part in parts if part.numel())


def focal(logits: Tensor, target: Tensor) -> Tensor:
    """Focal loss (1 − p)⁴·(−log p) of each logit, p the probability of its target 0 or 1."""
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")  # −log p
    return (1 - torch.exp(-entropy)) ** 4 * entropy


def truth_of(mask: Tensor, size: list[int]) -> Tensor:
    """Truth (B, h, w) of the cells of masks (B, H, W): 1 with a pixel of a defect, else UNKNOWN with one that is not known, else 0."""
    defect, unknown = (F.adaptive_max_pool2d(part.float(), size) > 0 for part in (mask == ANOMALOUS, mask > ANOMALOUS))
    return torch.where(defect, 1, torch.where(unknown, UNKNOWN, 0))


def draw_masks(count: int, size: list[int], threshold: float, generator: torch.Generator) -> Tensor:
    """Random masks (count, h, w): where Perlin noise of random scales is above the threshold, and nowhere in about half of them."""
    device, most = generator.device, min(SCALES, max(int(math.log2(min(size))), 1))  # finer noise would be 0 in every cell
    scales = torch.randint(most, (count, 2), generator=generator, device=device).tolist()
    masks = torch.stack([perlin(size, [2**scale for scale in pair], generator) > threshold for pair in scales])
    return masks & (torch.rand(count, 1, 1, generator=generator, device=device) <= 0.5)


def perlin(size: list[int], cells: list[int], generator: torch.Generator) -> Tensor:
    """Perlin noise (h, w) between −1 and 1 of cells[0] × cells[1] squares, with a random direction at each corner."""
    device = generator.device
    angle = 2 * math.pi * torch.rand(cells[0] + 1, cells[1] + 1, generator=generator, device=device)
    axes = [torch.arange(side, device=device) * (number / side) for side, number in zip(size, cells, strict=True)]
    (top, y), (left, x) = ((axis.long(), axis - axis.floor()) for axis in axes)  # corner and place in the square

    def corner(down: int, right: int) -> Tensor:
        at = angle[(top + down)[:, None], (left + right)[None]]  # (h, w)
        return at.cos() * (y - down)[:, None] + at.sin() * (x - right)[None]

    y_weight, x_weight = ((6 * t**5 - 15 * t**4 + 10 * t**3) for t in (y, x))
    upper, lower = (torch.lerp(corner(down, 0), corner(down, 1), x_weight.expand(size)) for down in (0, 1))
    return math.sqrt(2) * torch.lerp(upper, lower, y_weight[:, None].expand(size))

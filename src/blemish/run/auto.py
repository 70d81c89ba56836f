"""recipe=auto: the recipe that fits the number of images and labels, by the curves of docs/choosing.md."""

from collections.abc import Sequence

from rich.console import Console

from blemish.edge.errors import InputError
from blemish.run.config import build, composed, parse, products_of
from blemish.types import NORMAL

AUTO = "auto"
FEW = 1  # normal images up to which a subspace ranks better than a memory bank
LABELLED, BESIDE = 10, 31  # labelled defects with masks, and normal images beside them, from which learning from them ranks better


def choose(normal: int, defects: int, unlabelled: bool = False) -> tuple[str, str]:
    """The recipe for so many normal images and defects with masks, or for images of which nothing is known, and the reason."""
    if unlabelled or not normal:
        return "mutual", "no image is known to be normal: they are compared with each other"
    known = f"{normal} normal images" + (f", {defects} labelled defects with masks" if defects else "")
    if defects >= LABELLED and normal >= BESIDE:
        return "supersimplenet", f"{known}: from {LABELLED} with {BESIDE} normal images on, a network that learns from them"
    if normal <= FEW:
        return "subspace", f"{known}: up to {FEW}, a subspace of their patches"
    return "patchcore", f"{known}: more than {FEW}, a memory bank of their patches"


def resolve(overrides: Sequence[str]) -> list[str]:
    """The overrides of a training with recipe=auto replaced by the recipe chosen for its data, which is printed with the reason."""
    found = parse(overrides)
    if not any(one.key_or_group == "recipe" and one.value() == AUTO for one in found):
        return list(overrides)
    cfg = composed(*overrides)
    if names := products_of(cfg):
        raise InputError(f"recipe=auto: found {len(names)} products; expected a recipe for all of them")
    samples = build(cfg.data).listed()
    normal = sum(sample.split in ("train", "calibrate") and sample.label == NORMAL for sample in samples)
    defects = sum(sample.split == "defects" and bool(sample.mask or sample.boxes) for sample in samples)
    recipe, reason = choose(normal, defects, cfg.protocol == "unlabelled")
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"recipe={recipe}: {reason} (recipe=auto)", markup=False)
    return [f"recipe={recipe}" if one.key_or_group == "recipe" else one.input_line for one in found]

"""One of the processes of test_distributed: python distributed_worker.py RANK WORLD FOLDER METHOD…; writes FOLDER/RANK.json."""

import json
import sys
from pathlib import Path

import torch
from support import composed, images

from blemish.detector import OnePassDetector
from blemish.run.config import build

IMAGES = 25  # an odd number: the halves differ in size


def scores(name: str, pictures: torch.Tensor) -> list[float]:
    """Scores of three images by a method fitted on pictures, which are this process's share of IMAGES."""
    model: OnePassDetector = build(composed(f"model={name}", "backbone=test_resnet", "weights=random").model).eval()
    with torch.no_grad():
        state = model.new_state(IMAGES)
        for part in pictures.split(4):
            state.update(model.collect(model.features(part)))
        state.gather()
        model.fit(state)
        return model(images(3, 1)).score.tolist()


def main(rank: int, world: int, folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    # every second image, as a distributed sampler deals them
    found = {name: scores(name, images(IMAGES, 0)[rank::world]) for name in names}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])

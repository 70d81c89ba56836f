"""One of the processes of test_distributed: python distributed_worker.py RANK WORLD FOLDER METHOD…; writes FOLDER/RANK.json."""

import json
import sys
from pathlib import Path

import torch
from support import fitted, images, make

IMAGES = 25  # an odd number: the halves differ in size


def scores(name: str, pictures: torch.Tensor) -> list[float]:
    """Scores of three images by a method fitted to pictures, which are this process's share of IMAGES."""
    return fitted(make(name).eval(), pictures, batch=4, images=IMAGES)(images(3, 1)).score.tolist()


def main(rank: int, world: int, folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    # every second image, as a distributed sampler deals them
    found = {name: scores(name, images(IMAGES, 0)[rank::world]) for name in names}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])

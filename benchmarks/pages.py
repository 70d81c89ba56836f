"""What it saves that freed memory is kept: python benchmarks/pages.py writes docs/performance.md.

Five steps of training EfficientNet-Lite0's stages on 16 images of 256 px, one thread, as glibc comes and as `run.keep_pages` sets it, each
in a process of its own; processor seconds of the last three.
"""

import json
import resource
import subprocess
import sys
from pathlib import Path

import timm
import torch

from blemish.report.formats import between
from blemish.run.record import environment
from blemish.run.train import keep_pages

ROOT = Path(__file__).parents[1]


def steps(keep: bool) -> dict[str, float]:
    """Processor seconds of the arithmetic and of the kernel, page faults, and peak memory."""
    torch.set_num_threads(1)
    if keep:
        keep_pages()
    network = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(1, 2, 3)).train()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    image = torch.rand(16, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    for step in range(5):
        if step == 2:
            before = resource.getrusage(resource.RUSAGE_SELF)
        optimizer.zero_grad()
        sum(map.square().mean() for map in network(image)).backward()
        optimizer.step()
    after = resource.getrusage(resource.RUSAGE_SELF)
    names = {"user": "ru_utime", "system": "ru_stime", "faults": "ru_minflt"}
    return {key: getattr(after, name) - getattr(before, name) for key, name in names.items()} | {"MB": after.ru_maxrss / 1024}


def main() -> None:
    if sys.argv[1:]:
        print(json.dumps(steps(sys.argv[1] == "kept")))
        return
    lines = ["| freed memory is | arithmetic, s | kernel, s | page faults | peak MB |", "| --- | ---: | ---: | ---: | ---: |"]
    for way in ("given back", "kept"):
        done = subprocess.run([sys.executable, __file__, way], check=True, capture_output=True, text=True)
        row = json.loads(done.stdout)
        lines.append(f"| {way} | {row['user']:.2f} | {row['system']:.2f} | {row['faults']} | {row['MB']:.0f} |")
    machine = environment()
    lines.append(f"\n{machine['cpu']}, one thread, torch {machine['packages']['torch']}.\n")
    between(ROOT / "docs" / "performance.md", "pages", "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()

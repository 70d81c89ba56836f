"""Memory that can still be allocated on a device."""

import contextlib
from pathlib import Path

import psutil
import torch


def available_memory(device: torch.device) -> float:
    """Bytes that can still be allocated on a device, in control groups also within their limits."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return min(psutil.virtual_memory().available, cgroup_memory())


def cgroup_memory(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes left by the limits of this process's control groups (version 1 or 2), inf without one; page cache counts as free."""
    left = [float("inf")]
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        base, names = root, ("memory.max", "memory.current", "inactive_file")
        if "memory" in controllers.split(","):
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        limit, used, cache = names
        for folder in (inner := base / path.strip("/"), *inner.parents):
            with contextlib.suppress(OSError, ValueError):  # there is no limit: no such file, or "max" in it
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                total = int((folder / limit).read_text()) + int(stat.get(cache, 0))
                left.append(max(0, total - int((folder / used).read_text())))
    return min(left)

"""The store: maps of a frozen backbone, and resized images, computed once per image and kept on disk."""

import hashlib
import json
import logging
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import numpy as np
import safetensors.torch
import timm
import torch
from lightning import LightningDataModule
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from blemish.data.dataset import Images, collate, ignore_mask_of, threaded
from blemish.data.images import compact, mask_to_network, restored
from blemish.data.manifest import Sample
from blemish.data.module import ImageData
from blemish.data.roi import Roi
from blemish.features.extractor import Features
from blemish.files import fsync
from blemish.types import NO_TRUTH, NORMAL, Batch

FORMAT = 1  # to be raised whenever stored tensors change their meaning
SUFFIX, PART = ".safetensors", ".part-"
STALE = 3600  # seconds after which an unfinished file is removed

log = logging.getLogger(__name__)


def packed(x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The rows of x (B, …) as `dtype`, or as float32 where `dtype` would change a value by more than 2⁻¹¹ of the row's largest."""
    small = x.to(dtype)
    fits = (small.float() - x).abs().flatten(1).amax(1) <= 2**-11 * x.abs().flatten(1).amax(1)  # (B,)
    return [low if fit else high for low, high, fit in zip(small.cpu(), x.cpu(), fits.tolist(), strict=True)]


def pack_maps(maps: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Maps (B, C, h, w) as they are stored, each (h, w, C): in the memory order in which the network made them."""
    return packed(maps.float().movedim(1, -1).contiguous(), dtype)


def unpack_maps(stored: list[Tensor]) -> Tensor:
    """The maps (B, C, h, w) float32, channels last in memory, that `pack_maps` was given."""
    # by numpy, as torch would share each copy among threads that wait for each other
    return torch.from_numpy(np.stack([map.numpy() for map in stored], dtype=np.float32)).movedim(-1, 1)


def pack_image(image: Tensor, dtype: torch.dtype) -> Tensor:
    """An image (3, H, W) in [0, 1] as its bytes where it has been made of bytes, else `packed`; `restored` is the inverse."""
    small = compact(image)
    return (small if small.dtype == torch.uint8 else packed(small[None], dtype)[0]).contiguous()


def content_key(sample: Sample, roi: Roi | None = None) -> str:
    """Identifies a sample's pixels by the content of its file, its tile, and its ROI; not by its path."""
    return f"{sample.digest}#{sample.tile}" + (f"@{roi.digest(roi.root / sample.path)}" if roi else "")


class Store:
    """A folder of at most `max_gb`·10⁹ bytes (None: no bound) that several processes may use at once.

    Its files are complete or absent and never altered. What one process removes stays readable for those that have it open (Windows
    refuses to remove it).
    """

    def __init__(self, root: str | Path, dtype: str, max_gb: float | None):
        self.root, self.dtype, self.max_gb = Path(root).expanduser(), getattr(torch, dtype), float("inf") if max_gb is None else max_gb
        self.used: dict[Path, int] = {}  # shards that this process has open, and their bytes

    def shards(self) -> list[tuple[float, int, Path]]:
        """(time of last use, bytes, path) of every shard, oldest first; removes what killed writers have left."""
        found = []
        for path in self.root.rglob("*"):
            with suppress(OSError):  # another process was quicker
                status = path.stat()
                if path.name.startswith(PART) and time.time() - status.st_mtime > STALE:
                    path.unlink()
                elif path.suffix == SUFFIX:
                    found.append((status.st_mtime, status.st_size, path))
        return sorted(found)

    def make_room(self, more: int) -> None:
        """Remove the least recently used shards until `more` bytes fit; OSError if only those of this process are left."""
        shards = self.shards()
        excess = more + sum(size for _, size, _ in shards) - 1e9 * self.max_gb
        for _, size, path in shards:
            if excess > 0 and path not in self.used:
                with suppress(OSError):
                    path.unlink()
                    excess -= size
        if excess > 0:
            raise OSError(f"store.max_gb={self.max_gb:g} is too small for this data set")

    def check(self, more: int) -> None:
        """OSError if `more` bytes, besides what this process has open, exceed the bound or the disk."""
        needed = (more + sum(self.used.values())) / 1e9
        if needed > self.max_gb:
            raise OSError(f"store.max_gb={self.max_gb:g} is too small for this data set, which needs about {needed:.3g} GB")
        self.root.mkdir(parents=True, exist_ok=True)
        if more > (free := shutil.disk_usage(self.root).free):
            raise OSError(f"{free / 1e9:.3g} GB are free there, about {more / 1e9:.3g} GB are needed")


class Shards:
    """The stored tensors of one kind by key, in a folder of safetensors files; `origin` is all they depend on besides the image."""

    def __init__(self, store: Store, title: str, origin: dict):
        self.store, self.origin = store, json.dumps(origin, sort_keys=True)
        digest = hashlib.blake2b(self.origin.encode(), digest_size=8).hexdigest()
        self.folder = store.root / (re.sub(r"[^\w.-]", "_", title) + f"-{digest}")
        self.keys: dict[Path, set[str]] = {}  # of the shards looked into so far
        self.found: dict[str, Tensor] = {}  # memory-mapped

    def absent(self, keys: Iterable[str]) -> set[str]:
        """The keys that are not stored; opens the shards that hold the others."""
        absent = set(keys) - self.found.keys()
        for path in sorted(self.folder.glob(f"*{SUFFIX}")) if absent else ():
            if path not in self.keys or self.keys[path] & absent:
                self._open(path, absent)
                absent -= self.found.keys()
        return absent

    def _open(self, path: Path, wanted: set[str]) -> None:
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
                sums = json.loads(metadata["crc32"])
                tensors = {key: file.get_tensor(key) for key in sums.keys() & wanted}
            if metadata["metadata"] != self.origin or any(zlib.crc32(tensor.numpy()) != sums[key] for key, tensor in tensors.items()):
                raise ValueError
        except OSError:  # removed since it was listed, or another user's
            return
        except (SafetensorError, ValueError, KeyError, TypeError):
            log.warning("%s is damaged; removed, its content is computed again", path)
            sums, tensors = {}, {}
            with suppress(OSError):
                path.unlink()
        self.keys[path] = set(sums)
        self.found |= tensors
        if tensors:
            with suppress(OSError):  # removed by another process, or not ours to touch
                self.store.used[path] = path.stat().st_size
                os.utime(path)

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Write those contiguous tensors that are not stored as one shard and open it; OSError if that fails."""
        tensors = {key: tensor for key, tensor in tensors.items() if key not in self.found}
        if not tensors:
            return
        sums = {key: zlib.crc32(tensor.numpy()) for key, tensor in tensors.items()}
        data = safetensors.torch.save(tensors, {"metadata": self.origin, "crc32": json.dumps(sums)})
        self.store.make_room(len(data))
        self.folder.mkdir(parents=True, exist_ok=True)
        name = os.urandom(8).hex()
        part = self.folder / f"{PART}{name}"
        try:
            with part.open("wb") as file:
                file.write(data)
                fsync(file)
            path = part.replace(self.folder / f"{name}{SUFFIX}")
        finally:
            part.unlink(missing_ok=True)
        self.found |= tensors  # another process may remove the file before it is opened
        self._open(path, set(tensors))


def absent(kinds: list[Shards], keys: Iterable[str]) -> set[str]:
    """The keys that some kind of tensor lacks."""
    return {key for kind in kinds for key in kind.absent(keys)}


class StoredData(LightningDataModule):
    """A data module whose batches bring stored maps and images: with maps alone, no image is decoded and no network is run.

    `inputs_for(split)` tells whether batches of a split need maps, those of `features`, and images. Missing ones are computed on `device`
    when a loader is asked for; where they cannot be stored, a warning is logged and the loaders are those of `data`. `charge(name)`
    is a context that counts its time as "decode" or "features".
    """

    def __init__(
        self,
        store: Store,
        data: ImageData,
        features: Features | None,
        inputs_for: Callable[[str], tuple[bool, bool]],
        images: bool,
        device: torch.device,
        charge: Callable[[str], AbstractContextManager],
        progress: bool,
    ):
        super().__init__()
        self.store, self.data, self.features, self.inputs_for = store, data, features, inputs_for
        self.device, self.charge, self.progress = device, charge, progress
        self.samples, self.sample, self.image = data.samples, data.sample, data.image
        self.read = self.computed = 0  # images
        self.maps: list[Shards] = []  # one for each stage
        self.images: list[Shards] = []  # one, or none
        side = data.geometry.side
        if side is None:
            log.warning("store: images of their own sizes are not stored; expected image_size=<pixels>")
            return
        origin = {"format": FORMAT, "torch": torch.__version__, "dtype": str(store.dtype), "window": data.window}
        origin |= {"size": data.geometry.size, "crop": data.geometry.crop, "resize": data.geometry.resize}
        if images:
            self.images = [Shards(store, f"image-{side}", origin | {"stage": "image"})]
        if features is not None and any(inputs_for(split)[0] for split in ("train", "test")):
            origin |= {"backbone": features.backbone, "timm": timm.__version__, "device": device.type}
            origin |= {"mean": features.mean.flatten().tolist(), "std": features.std.flatten().tolist()}
            for stage in features.stages:
                own = {"stage": stage, "weights": features.digest(stage)}
                self.maps.append(Shards(store, f"{features.backbone}-{stage}-{side}", origin | own))

    def metadata(self) -> dict:
        """The store's entry of a run record: images read and computed, and the bytes of the files in use."""
        return {"path": self.store.root, "read": self.read, "computed": self.computed, "bytes": sum(self.store.used.values())}

    def train_dataloader(self) -> DataLoader:
        return self.loader("train", shuffle=True)

    def calibrate_dataloader(self) -> DataLoader:
        return self.loader("calibrate")

    def test_dataloader(self) -> DataLoader:
        return self.loader("test")

    def loader(self, split: str, shuffle: bool = False, sharded: bool = True) -> DataLoader:
        """The loader of a split, see `ImageData.loader`, with stored maps, stored images or both in its batches."""
        with_maps, with_images = self.inputs_for(split)
        maps, images = self.maps if with_maps else [], self.images if with_images else []
        if not (maps or images):
            return self.data.loader(split, shuffle, sharded)
        samples = self.data.samples_of(split)
        try:
            self.fill(samples, maps, images)
        except OSError as error:
            log.warning("store.root=%s: %s; maps are computed and not stored", self.store.root, error)
            self.maps, self.images = [], []
            return self.data.loader(split, shuffle, sharded)
        stored = Stored(self.data.images(samples), [kind.found for kind in maps], [kind.found for kind in images], with_images)
        return self.data.batches(stored, shuffle, lambda batch: batch, 0, sharded)  # reading pages needs no worker processes

    def fill(self, samples: list[Sample], maps: list[Shards], images: list[Shards]) -> None:
        """Compute and write what is missing of `samples`; OSError if it cannot be written."""
        by_key = {content_key(sample, self.data.roi): sample for sample in samples}
        missing = sorted(absent(maps + images, by_key))
        self.read += len(by_key) - len(missing)
        if not missing:
            return
        # processes that fill the same store go through it in different orders and skip what another has finished
        order = torch.randperm(len(missing), generator=torch.Generator().manual_seed(os.getpid()))
        missing, size = [missing[i] for i in order], self.data.batch_size
        rows = self.data.images([by_key[key] for key in missing])
        batches = iter(self.data.batches(rows, False, collate, self.data.workers, sharded=False))
        steps = range(0, len(missing), size)
        for start in track(steps, "storing maps", console=Console(stderr=True), disable=not self.progress):
            with self.charge("decode"):
                image = next(batches).image
            made = self._compute(image, missing[start : start + size], maps, images)
            if start == 0:
                self.store.check(sum(x.nbytes for kind in made for x in made[kind].values()) * len(missing) // len(image))
            for kind, tensors in made.items():
                kind.write(tensors)

    def _compute(self, image: Tensor, keys: list[str], maps: list[Shards], images: list[Shards]) -> dict[Shards, dict[str, Tensor]]:
        wanted = absent(maps + images, keys)
        rows = [row for row, key in enumerate(keys) if key in wanted]
        image, keys, made = image[rows], [keys[row] for row in rows], {}
        self.computed += len(keys)
        if absent(maps, keys):
            with self.charge("features"):
                stages = self.features.to(self.device)(image.to(self.device))
                made = {kind: pack_maps(stage, self.store.dtype) for kind, stage in zip(maps, stages, strict=True)}
        made |= {kind: [pack_image(one, self.store.dtype) for one in image] for kind in images}
        return {kind: dict(zip(keys, tensors, strict=True)) for kind, tensors in made.items()}


class Stored(Dataset):
    """Batches of `rows` from the store: `maps` by key for each stage, and `images` by key, or decoded where there are none.

    Without images, a batch has an image of (B, 0, H, W), so that code that looks at pixels fails.
    """

    def __init__(self, rows: Images, maps: list[dict[str, Tensor]], images: list[dict[str, Tensor]], with_images: bool):
        self.rows, self.maps, self.images, self.with_images, self.side = rows, maps, images, with_images, rows.geometry.side

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> Batch:
        samples = [self.rows.samples[index] for index in indices]
        keys = [content_key(sample, self.rows.roi) for sample in samples]
        maps = [unpack_maps([stage[key] for key in keys]) for stage in self.maps] or None
        if self.with_images and not self.images:
            return collate(self.rows.__getitems__(indices))._replace(maps=maps)
        image = torch.empty(len(keys), 0, self.side, self.side)
        for stored in self.images:
            image = torch.stack([restored(stored[key]) for key in keys])  # (B, 3, H, W)
        mask = torch.stack(threaded(self.mask, samples))  # (B, H, W)
        label, path = torch.tensor([sample.label for sample in samples]), [sample.key for sample in samples]
        return Batch(image, label, mask, path, maps, ignore_mask_of(mask))

    def mask(self, sample: Sample) -> Tensor:
        """The mask (H, W) uint8 of a sample, whose image is not decoded."""
        rows = self.rows
        if not (sample.mask or sample.boxes or rows.roi or rows.geometry.resize == "letterbox"):
            return torch.full((self.side, self.side), 0 if sample.label == NORMAL else NO_TRUTH, dtype=torch.uint8)
        size = rows.source.size(rows.root / sample.path)[::-1]
        return mask_to_network(torch.from_numpy(rows.mask(sample, size)), rows.geometry)

"""Maps of a frozen backbone, and resized images, computed once per image and kept on disk."""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterable
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
from blemish.edge.checks import check_choice, check_number
from blemish.edge.reading import size_of
from blemish.features.extractor import Features
from blemish.types import NO_TRUTH, NORMAL, Batch

FORMAT = 1  # one more whenever what is stored changes its meaning
ENDING, PART = ".safetensors", ".part-"
SHARD_IMAGES, SHARD_BYTES = 32, 2**26  # a shard is written when it has this many images or bytes
STALE = 3600  # seconds after which a file that was never finished is removed
DTYPES = {"float16": torch.float16, "float32": torch.float32}

log = logging.getLogger(__name__)


class NoRoom(Exception):
    """The store cannot take what it should: the run computes instead."""


def packed(x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The rows of `x` (B, …) as `dtype`, or as float32 where that would change a value by more than 2⁻¹¹ of the row's largest.

    float16 does so above 65504 and where a row is tiny throughout.
    """
    small = x.to(dtype)
    fits = (small.float() - x).abs().flatten(1).amax(1) <= 2**-11 * x.abs().flatten(1).amax(1)  # (B,)
    return [low if fit else high for low, high, fit in zip(small.cpu(), x.cpu(), fits.tolist(), strict=True)]


def pack_maps(maps: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Maps (B, C, h, w) as they are stored, each (h, w, C): in the order in which the network made them."""
    return packed(maps.float().movedim(1, -1).contiguous(), dtype)


def unpack_maps(stored: list[Tensor]) -> Tensor:
    """What `pack_maps` was given, (B, C, h, w) float32 with the channels last in memory."""
    out = np.empty((len(stored), *stored[0].shape), dtype=np.float32)  # (B, h, w, C)
    for i, map in enumerate(stored):
        out[i] = map.numpy()  # torch would share every row among threads that wait for each other
    return torch.from_numpy(out).movedim(-1, 1)


def pack_image(image: Tensor, dtype: torch.dtype) -> Tensor:
    """An image (3, H, W) in [0, 1] as `compact` has it, and what is not bytes as `packed`; `restored` gives it back."""
    small = compact(image)
    return (small if small.dtype == torch.uint8 else packed(small[None], dtype)[0]).contiguous()


def name_of(sample: Sample, roi: Roi | None = None) -> str:
    """What a sample's pixels are known by: the content of its file, its tile, and what is looked at of it; not its path."""
    return f"{sample.digest}#{sample.tile}" + (f"@{roi.digest(roi.root / sample.path)}" if roi else "")


def check_store(dtype: str, max_gb: float | None) -> None:
    """Raise InputError for an invalid store setting, before anything is read."""
    check_choice("store", DTYPES, dtype=dtype)
    check_number("store", "(0, inf)", also=(None,), max_gb=max_gb)


class Store:
    """A folder of at most `max_gb`·10⁹ bytes (None: no bound) in `dtype`, "float16" or "float32"; InputError for other values.

    Every file is whole: written aside, then renamed. Several processes may use the folder at once; what one of them removes stays
    readable for those that have it open (Windows refuses to remove such a file, which is then left).
    """

    def __init__(self, root: str | Path, dtype: str, max_gb: float | None):
        check_store(dtype, max_gb)
        self.root, self.dtype = Path(root).expanduser(), DTYPES[dtype]
        self.most = float("inf") if max_gb is None else max_gb * 1e9
        self.used: dict[Path, int] = {}  # shards this process has open, with their bytes

    def shards(self) -> list[tuple[float, int, Path]]:
        """(time of last use, bytes, path) of every shard; leftovers of killed writers are removed on the way."""
        found = []
        for folder, _, names in os.walk(self.root):
            for name in names:
                path = Path(folder, name)
                with contextlib.suppress(OSError):  # another process was quicker
                    metadata = path.stat()
                    if path.suffix == ENDING:
                        found.append((metadata.st_mtime, metadata.st_size, path))
                    elif name.startswith(PART) and time.time() - metadata.st_mtime > STALE:
                        path.unlink()
        return sorted(found)

    def make_room(self, more: int) -> None:
        """Remove the shards used longest ago until `more` bytes fit; NoRoom if only this process's own are left."""
        shards = self.shards()
        total = more + sum(size for _, size, _ in shards)
        for _, size, path in shards:
            if total <= self.most:
                return
            if path not in self.used:
                with contextlib.suppress(OSError):
                    path.unlink()
                    total -= size
        if total > self.most:
            raise NoRoom(f"store.max_gb={self.most / 1e9:g} is too little for this data set")

    def check(self, more: int) -> None:
        """NoRoom if `more` bytes beside what this process has open are beyond the bound or the disk."""
        needed = more + sum(self.used.values())
        if needed > self.most:
            raise NoRoom(f"store.max_gb={self.most / 1e9:g} is too little for this data set, which needs about {needed / 1e9:.3g} GB")
        self.root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.root).free
        if more > free:
            raise NoRoom(f"{free / 1e9:.3g} GB are free there and about {more / 1e9:.3g} needed")


class Shelf:
    """The stored tensors of one kind, by name; `metadata` are all that they depend on beside the image."""

    def __init__(self, store: Store, title: str, metadata: dict):
        self.store, self.metadata = store, json.dumps(metadata, sort_keys=True)
        digest = hashlib.blake2b(self.metadata.encode(), digest_size=8).hexdigest()
        self.folder = store.root / (re.sub(r"[^\w.-]", "_", title) + f"-{digest}")
        self.names: dict[Path, set[str]] = {}  # what is in the shards seen so far
        self.found: dict[str, Tensor] = {}  # memory-mapped
        self.pending: dict[str, Tensor] = {}

    def find(self, wanted: Iterable[str]) -> None:
        """Open what the folder holds of the wanted names."""
        missing = set(wanted) - self.found.keys()
        for path in sorted(self.folder.glob(f"*{ENDING}")) if missing else ():
            if path not in self.names or self.names[path] & missing:
                self._open(path, missing)
                missing -= self.found.keys()

    def _open(self, path: Path, missing: set[str]) -> None:
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata()
                sums = json.loads(about["crc32"])
                self.names[path] = set(sums)
                chosen = {name: file.get_tensor(name) for name in sums.keys() & missing}
            sound = about["metadata"] == self.metadata and all(crc32(tensor) == sums[name] for name, tensor in chosen.items())
        except OSError:  # removed since it was listed, or another user's
            return
        except (SafetensorError, ValueError, KeyError, TypeError):
            sound = False
        if not sound:
            log.warning("%s is damaged; removed, its maps are computed again", path)
            self.names[path] = set()
            with contextlib.suppress(OSError):
                path.unlink()
        elif chosen:
            self.found |= chosen
            with contextlib.suppress(OSError):  # another process removed it, or may write here and we may not
                self.store.used[path] = path.stat().st_size
                os.utime(path)

    def add(self, name: str, tensor: Tensor) -> None:
        """Remember a contiguous tensor for `write`."""
        self.pending[name] = tensor

    @property
    def pending_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.pending.values())

    def write(self) -> None:
        """Make one shard of what was added, and open it; OSError or NoRoom if it cannot be written."""
        if not self.pending:
            return
        sums = {name: crc32(tensor) for name, tensor in self.pending.items()}
        data = safetensors.torch.save(self.pending, {"metadata": self.metadata, "crc32": json.dumps(sums)})
        self.store.make_room(len(data))
        self.folder.mkdir(parents=True, exist_ok=True)
        name = os.urandom(8).hex()
        part = self.folder / f"{PART}{name}"
        try:
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # a name must not survive a power cut that its content does not
            path = part.replace(self.folder / f"{name}{ENDING}")
        finally:
            part.unlink(missing_ok=True)
        self._open(path, set(self.pending))
        self.found = self.pending | self.found  # another process may have removed the file already
        self.pending = {}


def crc32(tensor: Tensor) -> int:
    return zlib.crc32(tensor.view(-1).view(torch.uint8).numpy().data)


class StoredData(LightningDataModule):
    """A data module whose batches bring stored maps, so that neither images are decoded nor the network is run; stored images likewise.

    `inputs_for(split)` says whether batches of a split are to bring maps and whether images; the maps are those of `features`. What is
    missing is computed on `device` when a loader is asked for; where it cannot be stored the data module's own loader takes over, with
    one warning. `charge(name)` charges the time of a block to decode or features.
    """

    def __init__(
        self,
        store: Store,
        data: ImageData,
        features: Features | None,
        inputs_for: Callable[[str], tuple[bool, bool]],
        images: bool,
        device: torch.device,
        charge: Callable[[str], contextlib.AbstractContextManager],
        progress: bool,
    ):
        super().__init__()
        self.store, self.data, self.features, self.inputs_for = store, data, features, inputs_for
        self.device, self.charge, self.progress = device, charge, progress
        self.read = self.computed = 0  # images
        self.side = data.geometry.side
        self.useful = self.side is not None
        if not self.useful:
            log.warning("store: images of their own sizes are not stored; expected image_size=<pixels>")
        window = data.window if isinstance(data.window, dict) else {}
        common = {
            "format": FORMAT,
            "size": data.geometry.size,
            "crop": data.geometry.crop,
            "window": window,
            "dtype": str(store.dtype),
            "resize": data.geometry.resize,
            "torch": torch.__version__,
        }
        self.maps = []
        if features is not None and any(inputs_for(split)[0] for split in ("train", "test")):
            network = {"backbone": features.backbone, "timm": timm.__version__, "device": device.type}
            network |= {"mean": features.mean.flatten().tolist(), "std": features.std.flatten().tolist()}
            for stage in features.stages:
                metadata = {**common, **network, "stage": stage, "weights": features.digest(stage)}
                self.maps.append(Shelf(store, f"{features.backbone}-{stage}-{self.side}", metadata))
        self.images = Shelf(store, f"image-{self.side}", {**common, "stage": "image"}) if images else None

    @property
    def samples(self) -> list[Sample]:
        return self.data.samples

    def sample(self, key: str) -> Sample:
        return self.data.sample(key)

    def image(self, key: str) -> Tensor:
        return self.data.image(key)

    def metadata(self) -> dict:
        """What a record says of the store: images whose maps were read and computed, and the bytes of the files in use."""
        return {"path": self.store.root, "read": self.read, "computed": self.computed, "bytes": sum(self.store.used.values())}

    def train_dataloader(self) -> DataLoader:
        return self.loader("train", shuffle=True)

    def calibrate_dataloader(self) -> DataLoader:
        return self.loader("calibrate")

    def test_dataloader(self) -> DataLoader:
        return self.loader("test")

    def loader(self, split: str, shuffle: bool = False, dealt: bool = True) -> DataLoader:
        """As the data module's, with stored maps, stored images or both in its batches."""
        samples = [sample for sample in self.samples if sample.split == split]
        bring_maps, bring_images = self.inputs_for(split)
        maps = self.maps if bring_maps else []
        images = self.images if bring_images else None
        if not (maps or images) or not self.useful:
            return self.data.loader(split, shuffle, dealt)
        try:
            self.fill(samples, maps, images)
        except (NoRoom, OSError) as error:
            log.warning("store.root=%s: %s; maps are computed and not stored", self.store.root, error)
            self.useful = False
            for shelf in (*maps, images) if images else maps:
                shelf.pending.clear()
            return self.data.loader(split, shuffle, dealt)
        rows = self.data.images(samples)
        stored = Stored(rows, [shelf.found for shelf in maps], images and images.found, bring_images, self.side)
        return self.data.batches(stored, shuffle, as_it_is, 0, dealt)  # reading pages takes no processes

    def fill(self, samples: list[Sample], maps: list[Shelf], images: Shelf | None) -> None:
        """Compute and write what is not there of `samples`; NoRoom or OSError if it cannot be written."""
        shelves = [*maps, images] if images else maps
        by_name = {name_of(sample, self.data.roi): sample for sample in samples}

        def absent(names: Iterable[str]) -> list[str]:
            for shelf in shelves:
                shelf.find(names)
            return [name for name in names if any(name not in shelf.found and name not in shelf.pending for shelf in shelves)]

        missing = absent(by_name)
        self.read += len(by_name) - len(missing)
        # processes that fill the same store go through it in different orders and leave out what another has done
        order = torch.randperm(len(missing), generator=torch.Generator().manual_seed(os.getpid()))
        todo = [by_name[missing[i]] for i in order]
        batches = self.data.batches(self.data.images(todo), False, collate, self.data.workers if todo else 0, dealt=False)
        bar = track(batches, "storing maps", console=Console(stderr=True), disable=not self.progress or not todo)
        for count, batch in enumerate(self._timed(bar)):
            chosen = todo[count * self.data.batch_size :][: len(batch.image)]
            called = [name_of(sample, self.data.roi) for sample in chosen]
            names = absent(called)
            rows = [row for row, name in enumerate(called) if name in names]
            if rows:
                self._compute(batch.image[rows], names, maps, images)
            if count == 0:
                each = sum(shelf.pending_bytes for shelf in shelves) / max(len(rows), 1)
                self.store.check(int(each * len(todo)))
            for shelf in shelves:
                if len(shelf.pending) >= SHARD_IMAGES or shelf.pending_bytes >= SHARD_BYTES:
                    shelf.write()
        for shelf in shelves:
            shelf.write()

    def _timed(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        rest = iter(batches)
        while True:
            with self.charge("decode"):
                batch = next(rest, None)
            if batch is None:
                return
            yield batch

    def _compute(self, image: Tensor, names: list[str], maps: list[Shelf], images: Shelf | None) -> None:
        self.computed += len(names)
        if maps and any(name not in shelf.found for shelf in maps for name in names):
            with self.charge("features"):
                made = self.features.to(self.device)(image.to(self.device))
                for shelf, stage in zip(maps, made, strict=True):
                    for name, map in zip(names, pack_maps(stage, self.store.dtype), strict=True):
                        if name not in shelf.found:
                            shelf.add(name, map)
        for name, one in zip(names, image, strict=True) if images else ():
            if name not in images.found:
                images.add(name, pack_image(one, self.store.dtype))


class Stored(Dataset):
    """Batches of samples from the store: `maps` by name per stage, and images by name from `images`, decoded if that is None.

    A batch that is to bring no images has none: its image is (B, 0, H, W), so that whoever looks at pixels all the same will fail.
    """

    def __init__(self, rows: Images, maps: list[dict[str, Tensor]], images: dict[str, Tensor] | None, bring_images: bool, side: int):
        self.rows, self.maps, self.images, self.bring_images, self.side = rows, maps, images, bring_images, side

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> Batch:
        samples = [self.rows.samples[index] for index in indices]
        names = [name_of(sample, self.rows.roi) for sample in samples]
        maps = [unpack_maps([stage[name] for name in names]) for stage in self.maps] or None
        if self.bring_images and self.images is None:
            return collate(self.rows.__getitems__(indices))._replace(maps=maps)
        image = torch.empty(len(names), 0, self.side, self.side)
        if self.images is not None:
            image = torch.stack([restored(self.images[name]) for name in names])  # (B, 3, H, W)
        mask = torch.stack(threaded(self.mask, samples))  # (B, H, W)
        label, path = torch.tensor([sample.label for sample in samples]), [sample.key for sample in samples]
        return Batch(image, label, mask, path, maps, ignore_mask_of(mask))

    def mask(self, sample: Sample) -> Tensor:
        """The mask (H, W) uint8 of a sample without its image."""
        rows = self.rows
        if not (sample.mask or sample.boxes or rows.roi or rows.geometry.resize == "letterbox"):
            return torch.full((self.side, self.side), 0 if sample.label == NORMAL else NO_TRUTH, dtype=torch.uint8)
        load = rows.recent.mask
        whole = load(rows.root / sample.mask).shape[:2] if sample.mask else size_of(rows.root / sample.path)[::-1]
        return mask_to_network(torch.from_numpy(rows.truth_of(sample, whole, load)), rows.geometry)


def as_it_is(batch: Batch) -> Batch:
    return batch

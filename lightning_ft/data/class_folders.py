"""A folder with one folder for each class: images, or tensors that were saved one by one."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_ft.data.episode_draw import Draw, refuse_shared, split_classes, without_twins
from lightning_ft.data.sources import digest_of
from lightning_ft.engine.episodes import Episode, Rows
from lightning_ft.functional.errors import Refusal

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".ppm")
TENSORS = (".npy", ".pt")


def class_files(folder: Path, suffixes: Sequence[str]) -> dict[str, list[Path]]:
    """Class -> its files of these kinds, sorted; hidden files and others are passed over, and classes that have none."""
    found: dict[str, list[Path]] = {}
    for child in sorted(folder.iterdir()):
        if child.is_dir() and not child.name.startswith("."):
            inside = (p for p in child.rglob("*") if p.suffix.lower() in suffixes)
            # "._1.png" is what macOS keeps beside 1.png, and no image.
            files = sorted(p for p in inside if not any(part.startswith(".") for part in p.relative_to(child).parts))
            if files:
                found[child.name] = files
    return found


def classes_in(
    folder: Path, suffixes: Sequence[str] = (*IMAGES, *TENSORS), said: str = "images or tensors"
) -> dict[str, list[Path]]:
    """The same of a folder that is to have classes.

    Raises:
        Refusal: fewer than two folders in it hold a file that can be read.
    """
    found = class_files(folder, suffixes)
    if len(found) < 2:
        raise Refusal(
            f"{folder} holds {len(found)} folders with {said}, and each class needs one ({folder}/CLASS/FILE, of "
            f"{', '.join(suffixes)})."
        )
    return found


def files_of_splits(
    path: str, others: Mapping[str, Any], val: int | Sequence[str], test: int | Sequence[str], *, seed: int
) -> dict[str, dict[str, list[Path]]]:
    """Split -> class -> its files.

    Args:
        path: the folder whose classes are dealt, see `lightning_ft.data.episode_draw.split_classes`.
        others: ``val`` or ``test`` -> a folder of its own.
        val: classes of ``path`` for validation.
        test: likewise.
        seed: of the choice.

    Raises:
        Refusal: a folder that is none, or a class in two splits.
    """
    found = classes_in(Path(path).expanduser())
    dealt = split_classes(list(found), val, test, seed=seed, owner="EpisodeData")
    files = {split: {name: found[name] for name in names} for split, names in dealt.items()}
    for split, given in others.items():
        folder = Path(str(given)).expanduser()
        if not folder.is_dir():
            raise Refusal(f"EpisodeData.{split}_path {given} is no folder of classes, as path is.")
        files[split] = classes_in(folder)
    refuse_shared({split: set(classes) for split, classes in files.items()}, "EpisodeData")
    return files


def pools_of_files(classes: Mapping[str, list[Path]]) -> tuple[list[Path], dict[str, np.ndarray]]:
    """All files one after the other; class -> the numbers of its own, without twins (see `without_twins`)."""
    items = [file for files in classes.values() for file in files]
    ends = np.cumsum([0, *(len(files) for files in classes.values())])
    pools = {name: np.arange(begin, end) for name, begin, end in zip(classes, ends[:-1], ends[1:], strict=True)}
    return items, without_twins(pools, contents_of(items))[0]


def contents_of(files: Sequence[Path]) -> list[tuple[int, str]]:
    """What tells files apart: their size, and where several have it the hash of their bytes; others are not read."""
    sizes = [file.stat().st_size for file in files]
    times = Counter(sizes)
    return [(size, digest_of(file) if times[size] > 1 else "") for file, size in zip(files, sizes, strict=True)]


class FileReader:
    """Reads items as float32 tensors of one shape, and keeps what it has read.

    Args:
        image_size: height and width to which images are resized (bilinear, the whole image).
        channels: 1 for grey, 3 for RGB.
        kept_bytes: of the items that stay in memory, those used last: 2 GiB hold 100,000 images of 84 x 84.
    """

    def __init__(self, *, image_size: int, channels: int, kept_bytes: int = 2 << 30) -> None:
        self.image_size, self.channels, self.kept_bytes = image_size, channels, kept_bytes
        self._kept: OrderedDict[Path, np.ndarray] = OrderedDict()
        self._bytes = 0
        self._shape: tuple[tuple[int, ...], Path] | None = None

    def batch(self, files: list[Path]) -> torch.Tensor:
        """(N, ...) float32; images (N, channels, size, size) from 0 to 1.

        Raises:
            Refusal: a file that cannot be read, or has another shape than the first.
        """
        items = []
        for file in files:
            item = self._read(file)
            if self._shape is None:
                self._shape = (item.shape, file)
            elif item.shape != self._shape[0]:
                raise Refusal(
                    f"{file} has shape {item.shape}, and {self._shape[1]} {self._shape[0]}: all must be alike."
                )
            items.append(item)
        stacked = torch.from_numpy(np.stack(items))
        return stacked.float() / 255 if stacked.dtype == torch.uint8 else stacked

    def episodes(self, files: Sequence[Path], draws: Sequence[Draw]) -> Episode:
        """Episodes in one, of files by their number."""
        sides = []
        for side in ("support", "query"):
            x = torch.stack([self.batch([files[n] for n in getattr(draw, side)]) for draw in draws])
            y = torch.stack([torch.from_numpy(getattr(draw, f"{side}_labels")) for draw in draws])
            sides.append(Rows(x, y))
        return Episode(*sides)

    def _read(self, file: Path) -> np.ndarray:
        """An item from memory or from its file; what was not used for the longest gives way."""
        if file in self._kept:
            self._kept.move_to_end(file)
            return self._kept[file]
        self._kept[file] = item = self._item(file)
        self._bytes += item.nbytes
        while self._bytes > self.kept_bytes:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return item

    def _item(self, file: Path) -> np.ndarray:
        suffix = file.suffix.lower()
        try:
            if suffix == ".npy":
                return np.load(file).astype(np.float32)  # without pickle, by default
            if suffix == ".pt":
                return torch.load(file, map_location="cpu", weights_only=True).float().numpy()  # type: ignore[no-any-return]
            return self._image(file)
        except Refusal:
            raise
        except Exception as error:
            raise Refusal(f"{file} cannot be read ({type(error).__name__}: {error}).") from error

    def _image(self, file: Path) -> np.ndarray:
        try:
            from PIL import Image
        except ImportError as error:
            raise Refusal('Images need Pillow, which is not installed: pip install "lightning-ft[vision]".') from error
        with Image.open(file) as opened:
            image = opened.convert("L" if self.channels == 1 else "RGB")
            image = image.resize((self.image_size, self.image_size), Image.Resampling.BILINEAR)
            pixels = np.asarray(image, dtype=np.uint8)
        return pixels[None] if self.channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


__all__ = [
    "IMAGES",
    "TENSORS",
    "FileReader",
    "class_files",
    "classes_in",
    "contents_of",
    "files_of_splits",
    "pools_of_files",
]

"""``folder:PATH``: the images of a folder, in ImageFolder layout (class subfolders) or flat.

A folder of a ``train`` and a ``val`` folder is a dataset with a train split.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import xxhash
from PIL import Image

from probekit.datasets.dataset import BadImage, Dataset, combine, decode, is_shortage, openable, to_rgb
from probekit.errors import DataError, UsageError

__all__ = ["FolderDataset", "find_folder", "load", "open_folder", "to_rgb"]

# Looked for whatever this Pillow can do, so that a missing decoder is a named bad image, not silence.
_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
_UNDECODABLE = frozenset({".jxl", ".heic", ".heif", ".hif", ".avif", ".jp2"})
_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test"})
_HELD_OUT = frozenset({"val", "validation", "test"})
_HASH_THREADS = 8  # reading, not hashing, is what takes the time
_HASH_CHUNK = 512  # files in flight: bounds memory, and how long Ctrl-C waits


class FolderDataset(Dataset):
    """The images under `root`.

    ids:     paths relative to the folder, with ``/``
    classes: names of the subfolders, sorted (an empty one keeps its number); None when flat
    labels:  the number of the subfolder an image is in, however deep; None when flat

    Images are ordered by class, then by id. Hidden files and folders and files without an image's suffix
    are left out and counted in `notes`. Symbolic links are followed, except into a folder that contains
    the link.
    """

    def __init__(self, root: Path, *, name: str | None = None):
        self.root = root
        self.name = name or f"folder:{root}"
        self._paths: list[str] = []
        self.labels: list[int] | None = None
        self.classes: list[str] | None = None
        scan = _Scan(str(root))
        flat, folders = scan.listing("")
        self.classes = folders
        labels: list[int] = []
        for label, folder in enumerate(folders):
            found = scan.images(folder)
            self._paths += found
            labels += [label] * len(found)
        notes = []
        if self._paths:
            self.labels = labels
            if empty := len(folders) - len(set(labels)):
                notes.append(f"{empty} of {_count(len(folders), 'class folder')} hold no images")
            if flat:
                notes.append(f"ignored {_count(len(flat), 'image')} beside the class folders")
            if _SPLITS.issuperset(name.lower() for name in folders):
                these = ", ".join(map(repr, folders))
                notes.append(f"the classes are {these}: for one split, name its own folder")
        else:
            self.classes = None
            self._paths = flat
        self.ids = [_id(path) for path in self._paths]
        self.notes = [*notes, *scan.notes()]

    def image(self, index: int) -> Image.Image:
        """The image as RGB, in memory. Raises `BadImage` naming the file and the cause."""
        try:
            with self.open(index) as file:
                return decode(file, self.ids[index])
        except OSError as error:
            if is_shortage(error):
                raise
            raise BadImage(self.ids[index], _os_reason(error)) from error

    def fingerprint(self, indices: Sequence[int]) -> str:
        """Hash over (id, label, content) of the listed files in order; reads every byte of them.

        Sizes and times play no part: a changed file with the same ones changes the fingerprint, a copied
        or touched folder doesn't.
        """
        return combine(self, indices, self.contents(indices))

    def contents(self, indices: Sequence[int]) -> Iterator[bytes]:
        """A hash of each listed file, in order."""
        with ThreadPoolExecutor(_HASH_THREADS) as pool:
            for start in range(0, len(indices), _HASH_CHUNK):
                yield from pool.map(self._content, indices[start : start + _HASH_CHUNK])

    def _content(self, index: int) -> bytes:
        digest = xxhash.xxh3_128()
        try:
            with self.open(index) as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        except OSError as error:
            if is_shortage(error):
                raise
            return b"unreadable"
        return digest.digest()

    def keep(self, positions: Sequence[int]) -> None:
        """Leave out the images at all other positions."""
        self._paths = [self._paths[k] for k in positions]
        self.ids = [self.ids[k] for k in positions]
        if self.labels is not None:
            self.labels = [self.labels[k] for k in positions]

    def open(self, index: int) -> BinaryIO:
        """The image's file. Raises `OSError`."""
        return open(os.path.join(self.root, self._paths[index]), "rb")


def load(argument: str) -> FolderDataset:
    """The dataset ``folder:argument``. Raises `DataError` where there is no such folder or no image in it."""
    return open_folder("folder", argument)


def open_folder(dataset: str, argument: str, kind: type[FolderDataset] = FolderDataset) -> FolderDataset:
    """The folder's images as a `kind`. Raises as `load` does.

    Where its subfolders are ``train`` and one of ``val``, ``validation`` and ``test``: the images of the
    latter, with those of the former as `train`.
    """
    root = find_folder(dataset, argument)
    _, folders = _Scan(str(root)).listing("")
    held_out = [folder for folder in folders if folder in _HELD_OUT]
    if len(folders) != 2 or "train" not in folders or not held_out:
        return _images(kind, root, f"{dataset}:{argument}", argument)
    (split,) = held_out
    found = _images(kind, root / split, f"{dataset}:{argument}", os.path.join(argument, split))
    train = os.path.join(argument, "train")
    found.train = _images(kind, root / "train", f"{dataset}:{train}", train)
    found.notes = [f"the images are those of {split!r}; those of 'train' are its train split", *found.notes]
    return found


def _images(kind: type[FolderDataset], root: Path, name: str, shown: str) -> FolderDataset:
    found = kind(root, name=name)
    if not len(found):
        notes = f" ({'; '.join(found.notes)})" if found.notes else ""
        raise DataError(
            f"folder {shown!r} holds no images{notes}",
            hint="it should hold images, or one subfolder of images for each class",
        )
    return found


def find_folder(dataset: str, argument: str) -> Path:
    """The folder `argument` names, ``~`` resolved. Raises `DataError` where there is none."""
    if not argument:
        raise UsageError(
            f"dataset {dataset!r} needs a path", hint=f"for example --dataset {dataset}:/data/val"
        )
    try:
        root = Path(argument).expanduser()
        mode = root.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"there is no folder {argument!r}", hint=_nearest_parent(argument)) from None
    except PermissionError:
        raise DataError(
            f"folder {argument!r} may not be read", hint=f"check its rights: ls -ld {argument}"
        ) from None
    except (OSError, RuntimeError, ValueError) as error:
        reason = _os_reason(error) if isinstance(error, OSError) else str(error)
        raise DataError(f"folder {argument!r} can't be opened: {reason}") from error
    if not stat.S_ISDIR(mode):
        if root.suffix.lower() in (".zip", ".tar", ".tgz", ".gz", ".7z"):
            hint = "unpack it and give the folder"
        else:
            hint = f"give the folder it is in: {dataset}:{root.parent}"
        raise DataError(f"{argument!r} is a file, not a folder", hint=hint)
    return root


class _Scan:
    """One walk over a folder, counting what it leaves out."""

    def __init__(self, root: str):
        self.root = root
        self.suffixes = _SUFFIXES | {suffix for suffix, _ in openable()}
        self.ignored: Counter[str] = Counter()
        self.hidden = 0
        self.loops = 0

    def images(self, folder: str) -> list[str]:
        """Paths of all images below `folder`, relative to the root, in the order of their ids."""
        found: list[str] = []
        inside = (self._identity(""), self._identity(folder))
        if inside[0] == inside[1]:
            self.loops += 1
            return []
        pending = [(folder, inside)]
        while pending:
            here, ancestors = pending.pop()
            files, folders = self.listing(here)
            found += files
            for name in folders:
                identity = self._identity(name)
                if identity in ancestors:  # a link back up: following it would never end
                    self.loops += 1
                else:
                    pending.append((name, (*ancestors, identity)))
        return sorted(found, key=_id)

    def listing(self, folder: str) -> tuple[list[str], list[str]]:
        """(image files, subfolders) directly in `folder`, sorted, as paths relative to the root."""
        files, folders = [], []
        try:
            with os.scandir(os.path.join(self.root, folder)) as entries:
                for entry in entries:
                    path = f"{folder}/{entry.name}" if folder else entry.name
                    if entry.name.startswith("."):
                        self.hidden += 1
                    elif _is_folder(entry):
                        folders.append(path)
                    elif self._is_image(entry):
                        files.append(path)
        except OSError as error:
            shown = os.path.join(self.root, folder) if folder else self.root
            raise DataError(
                f"folder {shown!r} can't be read: {_os_reason(error)}",
                hint="give yourself the right to read it, or take it out of the dataset",
            ) from error
        return sorted(files, key=_id), sorted(folders, key=_id)

    def _is_image(self, entry: os.DirEntry[str]) -> bool:
        suffix = os.path.splitext(entry.name)[1].lower()
        # a link to nothing stays in, and is reported as unreadable; a pipe would block whoever opens it
        if suffix in self.suffixes and (os.path.isfile(entry.path) or not os.path.exists(entry.path)):
            return True
        self.ignored[suffix or "no suffix"] += 1
        return False

    def _identity(self, folder: str) -> tuple[int, int]:
        try:
            status = os.stat(os.path.join(self.root, folder))
        except OSError as error:
            raise DataError(f"folder {folder!r} can't be read: {_os_reason(error)}") from error
        return status.st_dev, status.st_ino

    def notes(self) -> list[str]:
        notes = []
        if total := self.ignored.total():
            most = ", ".join(f"{suffix} {n}" for suffix, n in self.ignored.most_common(4))
            more = ", ..." if len(self.ignored) > 4 else ""
            notes.append(f"ignored {_count(total, 'file')} without an image's suffix ({most}{more})")
        if missing := sorted(_UNDECODABLE & self.ignored.keys()):
            these = ", ".join(missing)
            notes.append(f"this Pillow has no decoder for {these}: install a Pillow plugin to use such files")
        if self.hidden:
            notes.append(f"ignored {_count(self.hidden, 'hidden file or folder', 'hidden files or folders')}")
        if self.loops:
            notes.append(f"did not follow {_count(self.loops, 'link')} back to a folder that contains it")
        return notes


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _id(path: str) -> str:
    # a name that isn't UTF-8 must still be storable in JSON and HDF5
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _os_reason(error: OSError) -> str:
    reasons = {FileNotFoundError: "there is no such file", PermissionError: "it may not be read"}
    text = reasons.get(type(error)) or error.strerror or str(error)
    return text[:1].lower() + text[1:]


def _nearest_parent(argument: str) -> str:
    path = Path(argument).expanduser()
    there = next((parent for parent in path.parents if parent.is_dir()), None)
    if there is None or there == path.parent:
        return "check the path: ls " + str(path.parent)
    return f"the path exists up to {str(there)!r}"


def _count(n: int, noun: str, plural: str | None = None) -> str:
    return f"{n} {noun if n == 1 else plural or noun + 's'}"

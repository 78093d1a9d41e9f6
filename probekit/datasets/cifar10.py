"""``cifar10:PATH``: CIFAR-10 (Krizhevsky 2009) from a zip or folder of images, or from its Python batches."""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

from probekit.datasets.archive import Archive, ZipImages, said
from probekit.datasets.cifar10_batches import Batches, read_batch
from probekit.datasets.dataset import Dataset
from probekit.datasets.folder import FolderDataset
from probekit.errors import DataError, UsageError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_BATCH_NAMES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
_BATCH = re.compile(r"(?:.*/)?(data_batch_[1-5]|test_batch)")
_IMAGE = re.compile(r"(?:.*/)?(train|test)/([^/]+)/[^/]+\.(?:png|jpe?g)", re.IGNORECASE)
_LAYOUTS = "it holds train/CLASS/*.png and test/CLASS/*.png (or jpg), or the official Python batches"


def load(argument: str) -> Dataset:
    """The test images of ``cifar10:argument``, with the training images as `train`.

    Raises `DataError` where there is no such file or folder, or none with a known layout in it.
    """
    if not argument:
        raise UsageError(
            "dataset 'cifar10' needs a path", hint="for example --dataset cifar10:/data/cifar10.zip"
        )
    name = f"cifar10:{argument}"
    try:
        path = Path(argument).expanduser()
        if path.is_dir():
            found = _folder(path, name)
        elif not path.is_file():
            raise DataError(
                f"there is no file or folder {argument!r}",
                hint="give CIFAR-10 as a zip, a tar.gz or a folder",
            )
        elif path.name.lower().endswith((".tar.gz", ".tgz", ".tar")):
            found = _tar(path, name)
        else:
            found = _zip(path, name)
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"{argument!r} can't be read: {said(error)}") from error
    if found is None:
        raise DataError(f"{argument!r} holds no CIFAR-10 in a layout that is known", hint=_LAYOUTS)
    return found


def _folder(path: Path, name: str) -> Dataset | None:
    for root in (path, *sorted(child for child in path.iterdir() if child.is_dir())):
        batches = {batch: root / batch for batch in _BATCH_NAMES if (root / batch).is_file()}
        if batches:
            return _batches({batch: file.read_bytes for batch, file in batches.items()}, name, path)
        if (root / "test").is_dir():
            found = _classes(root / "test", name)
            if (root / "train").is_dir():
                found.train = _classes(root / "train", f"{name}/train")
            return found
    return None


def _classes(root: Path, name: str) -> FolderDataset:
    found = FolderDataset(root, name=name)
    for folder in found.classes or ():
        _class(folder, str(root))
    if found.labels is None:
        raise DataError(f"folder {str(root)!r} holds no images in folders named by class", hint=_LAYOUTS)
    # CIFAR-10's own numbers, also where the folders are in capitals or one is missing
    found.labels = [_class(found.classes[label], str(root)) for label in found.labels]
    found.classes = list(CLASSES)
    return found


def _class(folder: str, where: str) -> int:
    if folder.lower() not in CLASSES:
        raise DataError(
            f"folder {folder!r} in {where!r} is no class of CIFAR-10",
            hint=f"its classes are {', '.join(CLASSES)}; folder:PATH takes any",
        )
    return CLASSES.index(folder.lower())


def _zip(path: Path, name: str) -> Dataset | None:
    archive = Archive(path)
    batches = {m[1]: member for member in archive.names if (m := _BATCH.fullmatch(member))}
    if batches:
        return _batches(
            {batch: _reader(archive.read, member) for batch, member in batches.items()}, name, path
        )
    splits: dict[str, list[tuple[str, str, int]]] = {"train": [], "test": []}
    for member in archive.names:
        found = _IMAGE.fullmatch(member)
        if found and not any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(member).parts):
            label = _class(found[2], str(path))
            id = f"{found[2]}/{PurePosixPath(member).name}"
            splits[found[1].lower()].append((member, id, label))
    for members in splits.values():
        members.sort(key=lambda member: (member[2], member[1]))
    if not splits["test"]:
        return None
    dataset = ZipImages(archive, splits["test"], CLASSES, name)
    if splits["train"]:
        dataset.train = ZipImages(archive, splits["train"], CLASSES, f"{name}/train")
    return dataset


def _tar(path: Path, name: str) -> Dataset | None:
    try:
        with tarfile.open(path) as archive:
            contents = {}
            for member in archive:
                found = _BATCH.fullmatch(member.name)
                if found and member.isfile():
                    contents[found[1]] = archive.extractfile(member).read()
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(
            f"{str(path)!r} is damaged, or no tar file ({said(error)})", hint="download or copy it again"
        ) from error
    readers = {batch: _reader(contents.__getitem__, batch) for batch in contents}
    return _batches(readers, name, path) if readers else None


def _reader(read: Callable[[str], bytes], member: str) -> Callable[[], bytes]:
    return lambda: read(member)


def _batches(readers: Mapping[str, Callable[[], bytes]], name: str, path: Path) -> Dataset:
    if "test_batch" not in readers:
        raise DataError(f"{str(path)!r} holds training batches but no 'test_batch'", hint=_LAYOUTS)
    read = {}
    for batch in _BATCH_NAMES:
        if batch in readers:
            try:
                read[batch] = read_batch(readers[batch]())
            except DataError as error:
                where = f"{batch!r} in {str(path)!r}"
                raise DataError(f"{where} can't be used: {error.message}", hint=error.hint) from error
    dataset = Batches([("test_batch", *read.pop("test_batch"))], CLASSES, name)
    if read:
        train = [(batch, *content) for batch, content in read.items()]
        dataset.train = Batches(train, CLASSES, f"{name}/train")
    return dataset

"""Images inside a zip file, without unpacking it."""

from __future__ import annotations

import io
import lzma
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from probekit.datasets.dataset import BadImage, Dataset, combine, decode
from probekit.errors import DataError

_MOST_BYTES = 1 << 28  # of one file unpacked; a zip of a few bytes can claim any


class Archive:
    """A zip file opened once in each process that reads it: a file's position is shared with forked ones.

    Raises `DataError` for a file that can't be opened or is no zip.
    """

    def __init__(self, path: Path):
        self.path = path
        self._open: tuple[int, zipfile.ZipFile] | None = None
        self.names = [info.filename for info in self.opened().infolist() if not info.is_dir()]

    def read(self, member: str) -> bytes:
        """One file of it. Raises `DataError`, the cause alone, for one that can't be unpacked."""
        archive = self.opened()
        if (size := archive.getinfo(member).file_size) > _MOST_BYTES:
            raise DataError(f"it has {size} bytes, too many for one image")
        try:
            return archive.read(member)
        except (zipfile.BadZipFile, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
            raise DataError(f"it is damaged in the zip file ({said(error)})") from error
        except RuntimeError as error:  # another compression, a password
            raise DataError(f"it can't be unpacked ({said(error)})") from error

    def digest(self, member: str) -> bytes:
        info = self.opened().getinfo(member)
        return f"{info.CRC} {info.file_size}".encode()

    def opened(self) -> zipfile.ZipFile:
        """This process's own handle."""
        if self._open is None or self._open[0] != os.getpid():
            try:
                self._open = os.getpid(), zipfile.ZipFile(self.path)
            except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
                raise DataError(
                    f"{str(self.path)!r} is damaged, or no zip file ({said(error)})",
                    hint="download or copy it again",
                ) from error
            except OSError as error:
                raise DataError(f"{str(self.path)!r} can't be read: {said(error)}") from error
        return self._open[1]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": None}


class ZipImages(Dataset):
    """Images inside a zip file, decoded from it one by one.

    members: (name in the zip, id, label) of each
    """

    def __init__(
        self, archive: Archive, members: Sequence[tuple[str, str, int]], classes: Sequence[str], name: str
    ):
        self.archive, self.name = archive, name
        self._members = [member for member, _, _ in members]
        self.ids = [id for _, id, _ in members]
        self.labels = [label for _, _, label in members]
        self.classes = list(classes)

    def image(self, index: int) -> Image.Image:
        try:
            content = self.archive.read(self._members[index])
        except DataError as error:
            raise BadImage(self.ids[index], error.message) from error
        return decode(io.BytesIO(content), self.ids[index])

    def fingerprint(self, indices: Sequence[int]) -> str:
        """From the sizes and CRC-32s the zip lists; nothing is unpacked."""
        return combine(self, indices, (self.archive.digest(self._members[index]) for index in indices))


def said(error: BaseException) -> str:
    """An error's own words, as the end of a sentence."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    text = " ".join(text.split())
    return text[:1].lower() + text[1:]

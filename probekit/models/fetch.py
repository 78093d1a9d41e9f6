"""Published weights: downloaded in one place, resumed, checked, kept.

    <cache>/weights/vit-b-300ep.pth.tar         the file, under its name only when it is whole
    <cache>/weights/vit-b-300ep.pth.tar.json    where it came from and its SHA-256
    <cache>/weights/vit-b-300ep.pth.tar.part    what has arrived so far, and .part.json: of which version

`<cache>` is ``$PROBEKIT_CACHE`` or the user's cache folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from probekit.errors import WeightsError
from probekit.specs import Weights

if TYPE_CHECKING:
    import httpx2

Progress = Callable[[int, int | None], None]
"""Called with bytes done and bytes in all (None where unknown)."""

_ATTEMPTS = 5  # in a row without a byte of progress
_CHUNK = 1 << 22
_SPARE = 64 << 20  # bytes left free on the disk
_TIMEOUT = 30.0  # seconds without an answer


@dataclass(frozen=True)
class Fetched:
    """A published file on this machine, and the SHA-256 it was found to have."""

    path: Path
    sha256: str


def sha256(path: str | Path, progress: Progress | None = None) -> str:
    """SHA-256 of a file, hex. `progress` hears of every 4 MiB."""
    path = Path(path)
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            if progress:
                progress(done, total)
    return digest.hexdigest()


def looks_like_html(head: bytes) -> bool:
    """Whether a file that begins with `head` is a web page."""
    start = head[:256].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return start.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml", b"<!--"))


def cache_dir() -> Path:
    """Where published files are kept: ``$PROBEKIT_CACHE/weights`` or the user's cache folder."""
    if chosen := os.environ.get("PROBEKIT_CACHE"):
        return Path(chosen).expanduser() / "weights"
    import platformdirs

    return Path(platformdirs.user_cache_dir("probekit", appauthor=False)) / "weights"


def cached_path(weights: Weights) -> Path:
    """Where the published file is, or where a user without network puts it."""
    return cache_dir() / weights.filename


def fetch(weights: Weights, *, progress: Progress | None = None) -> Path:
    """The published file's path, downloaded if it isn't there. See `fetch_checked`."""
    return fetch_checked(weights, progress=progress).path


def fetch_checked(weights: Weights, *, progress: Progress | None = None) -> Fetched:
    """The published file, downloaded if it isn't there, its size and SHA-256 checked every time.

    The SHA-256 is the one the spec gives; where the publisher gives none, the one recorded at first
    use. `progress` hears of bytes done and in all; without it a bar is drawn where standard error is
    a terminal. The licence is printed before a download.
    Raises WeightsError: no network, no such file, a web page in place of the file, another hash or
    size, a full disk, a cache folder that can't be written.
    """
    if not weights.url:
        raise WeightsError("no weights are published for this model", hint="give your own file with @PATH")
    path = cached_path(weights)
    from filelock import FileLock

    try:
        if path.is_file():
            return _check_cached(path, weights)
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if path.is_file():  # another process fetched it while we waited
                return _check_cached(path, weights)
            _announce(weights)
            with _bar(weights.filename) if progress is None else contextlib.nullcontext(progress) as report:
                return _download(path, weights, report)
    except OSError as error:
        raise WeightsError(
            f"can't use '{error.filename or path}': {error.strerror or error}",
            hint="free some space, or set PROBEKIT_CACHE to a folder that can be read and written",
        ) from error


@contextlib.contextmanager
def hub() -> Iterator[None]:
    """Inside, the Hugging Face hub fails at once where it can't be reached, or answers from its cache.

    Its own client tries every file of a repository six times, three quarters of a minute in all.
    """
    import httpx2
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    if not offline:
        try:
            httpx2.head(constants.ENDPOINT, timeout=10)
        except httpx2.TransportError:
            offline = True
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, offline
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def hub_answer(error: Exception) -> str:
    """Why the hub gave nothing, in a few words."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if "GatedRepoError" in names:
        return "its authors give it only to those who ask them on the hub first"
    if "RepositoryNotFoundError" in names or "RevisionNotFoundError" in names:
        return "there is no such repository, or it is private"
    text = str(error).strip().splitlines()
    if names & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "TransportError"} or (
        text and "couldn't connect to" in text[0]
    ):
        return "the Hugging Face hub can't be reached, and nothing of it is cached here"
    return text[0].rstrip(".") if text else type(error).__name__


def _announce(weights: Weights) -> None:
    size = f", {weights.bytes / 1e6:,.0f} MB" if weights.bytes else ""
    print(f"fetching {weights.filename}{size}; licence: {weights.licence}", file=sys.stderr)


@contextlib.contextmanager
def _bar(name: str) -> Iterator[Progress]:
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("  {task.description}"), BarColumn(), DownloadColumn())
    console = Console(stderr=True)
    with RichProgress(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


# ------------------------------------------------------------------------------- a file that is there


def _check_cached(path: Path, weights: Weights) -> Fetched:
    digest = sha256(path)
    record = _read_json(_beside(path))
    for expected, who in ((weights.sha256, "published"), (record.get("sha256"), "first fetched")):
        if expected and digest != expected:
            raise WeightsError(
                f"'{path}' isn't the file that was {who}: its SHA-256 is {digest[:12]}...,"
                f" not {expected[:12]}...",
                hint=f"delete '{path}' and '{_beside(path).name}' beside it, and run again to fetch it anew",
            )
    _check_size(path, weights)
    if not record:  # put there by hand
        _write_record(path, weights, digest)
    return Fetched(path, digest)


def _check_size(path: Path, weights: Weights) -> None:
    size = path.stat().st_size
    if weights.bytes and size != weights.bytes:
        raise WeightsError(
            f"'{path}' has {size:,} bytes where {weights.bytes:,} were published",
            hint="delete it and run again to fetch it anew",
        )


def _write_record(path: Path, weights: Weights, digest: str) -> None:
    record = {
        "url": weights.url,
        "sha256": digest,
        "sha256_given_by_publisher": weights.sha256 is not None,
        "bytes": path.stat().st_size,
        "licence": weights.licence,
        "first_used": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    _write_json(_beside(path), record)


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_json(path: Path, content: dict) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


# ------------------------------------------------------------------------------------- the download


def _download(path: Path, weights: Weights, report: Progress) -> Fetched:
    import httpx2

    part = path.with_name(path.name + ".part")
    failures, before, pause = 0, -1, 0.2
    with httpx2.Client(follow_redirects=True, timeout=_TIMEOUT) as client:
        while True:
            try:
                _transfer(client, part, weights, path, report)
                break
            except httpx2.TransportError as error:
                arrived = part.stat().st_size if part.exists() else 0
                failures = 0 if arrived > before else failures + 1
                before = arrived
                if failures >= _ATTEMPTS or (arrived == 0 and _never_connected(error)):
                    raise _unreachable(error, weights, path, arrived) from error
                time.sleep(min(pause * 2**failures, 10))
            except (httpx2.HTTPStatusError, httpx2.TooManyRedirects, httpx2.InvalidURL) as error:
                raise _refused(error, weights, path) from error
    digest = sha256(part)
    try:
        _check_size(part, weights)
        if weights.sha256 and digest != weights.sha256:
            raise WeightsError(
                f"'{weights.filename}' arrived with SHA-256 {digest[:12]}... where {weights.sha256[:12]}..."
                " is published, and was thrown away",
                hint="try again; if it happens twice, the published file changed: tell the pack's author",
            )
    except WeightsError:
        part.unlink()
        raise
    finally:
        _beside(part).unlink(missing_ok=True)
    _beside(path).unlink(missing_ok=True)  # of a file deleted since, whose hash isn't this one's
    part.replace(path)
    _write_record(path, weights, digest)
    return Fetched(path, digest)


def _transfer(client: httpx2.Client, part: Path, weights: Weights, path: Path, report: Progress) -> None:
    """One request, from where `part` ends. Returns when all has arrived; raises httpx2's errors."""
    known = _read_json(_beside(part))
    offset = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"}
    if offset and known.get("url") == weights.url and known.get("validator"):
        headers |= {
            "Range": f"bytes={offset}-",
            "If-Range": known["validator"],
        }  # the same version, or all anew
    else:
        offset = 0
    with client.stream("GET", str(weights.url), headers=headers) as response:
        if response.status_code == 416 and offset:  # nothing left to send, or another file: start over
            part.unlink()
            return _transfer(client, part, weights, path, report)
        response.raise_for_status()
        resumed = response.status_code == 206 and _range_start(response) == offset
        if not resumed:
            offset = 0
        length = response.headers.get("Content-Length")
        total = offset + int(length) if length and length.isdigit() else weights.bytes
        _check_space(path, (total or 0) - offset)
        if not resumed:
            validator = response.headers.get("ETag", "")
            if not validator or validator.startswith("W/"):  # a weak tag doesn't promise the same bytes
                validator = response.headers.get("Last-Modified", "")
            _write_json(_beside(part), {"url": weights.url, "validator": validator})
        with part.open("ab" if resumed else "wb") as file:
            report(offset, total)
            for chunk in response.iter_raw():
                if offset == 0 and looks_like_html(chunk):
                    file.truncate(0)
                    raise _web_page(weights, path)
                file.write(chunk)
                offset += len(chunk)
                report(offset, total)
            file.flush()
            os.fsync(file.fileno())
    return None


def _range_start(response: httpx2.Response) -> int | None:
    unit, _, rest = response.headers.get("Content-Range", "").partition(" ")
    start = rest.partition("-")[0]
    return int(start) if unit == "bytes" and start.isdigit() else None


def _check_space(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if needed + _SPARE > free:
        raise WeightsError(
            f"'{path.name}' needs {needed / 1e6:,.0f} MB more and '{path.parent}' has"
            f" {free / 1e6:,.0f} MB free",
            hint="free some space, or set PROBEKIT_CACHE to a folder on another disk",
        )


# ------------------------------------------------------------------------------------------ messages


def _never_connected(error: Exception) -> bool:
    import httpx2

    kinds = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError, httpx2.UnsupportedProtocol)
    return isinstance(error, kinds)


def _by_hand(weights: Weights, path: Path) -> str:
    return f"download {weights.url} elsewhere and put it at '{path}', or give a file with @PATH"


def _unreachable(error: Exception, weights: Weights, path: Path, arrived: int) -> WeightsError:
    if arrived:
        return WeightsError(
            f"the download of '{weights.filename}' broke off after {arrived / 1e6:,.1f} MB: {_why(error)}",
            hint="run again to go on from there",
        )
    return WeightsError(
        f"can't fetch '{weights.filename}': {_why(error)}; it belongs at '{path}'",
        hint=f"without a network here, {_by_hand(weights, path)}",
    )


def _refused(error: Exception, weights: Weights, path: Path) -> WeightsError:
    response = getattr(error, "response", None)
    answer = f"the server answered {response.status_code}" if response is not None else _why(error)
    return WeightsError(f"can't fetch '{weights.filename}': {answer}", hint=_by_hand(weights, path))


def _web_page(weights: Weights, path: Path) -> WeightsError:
    return WeightsError(
        f"the server sent a web page in place of '{weights.filename}': a sign-in, a quota or a warning page",
        hint=f"open {weights.url} in a browser, download the file and put it at '{path}'",
    )


def _why(error: Exception) -> str:
    text = re.sub(r"^\[Errno -?\d+\] ", "", str(error).strip()).rstrip(".") or type(error).__name__
    return f"{text[:1].lower()}{text[1:]}"

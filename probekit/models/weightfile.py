"""Weight files, read as data: nothing in them is executed.

PyTorch's restricted unpickler reads the file, and the settings objects that training scripts leave
beside the weights are replaced by inert stand-ins of ours, so that their classes are never imported.
What names anything else is refused.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from probekit.errors import WeightsError
from probekit.models.fetch import looks_like_html

_CHUNK = 1 << 22

# Modules whose objects sit in published checkpoints as settings or counters, beside the weights.
# Listing one is no trust in it: its objects are replaced by the stand-ins below, never imported.
_SETTINGS = {
    *("argparse", "yacs", "easydict", "omegaconf", "ml_collections", "addict", "mmcv", "mmengine", "fvcore"),
    *("detectron2", "pathlib", "datetime", "enum", "numpy", "collections", "pytorch_lightning", "lightning"),
    *("lightning_fabric", "__main__"),
}
_SETTINGS_NAMES = {"types.SimpleNamespace", "copyreg._reconstructor"}
_PLAIN = {"bool", "bytes", "dict", "float", "frozenset", "int", "list", "object", "str", "tuple"}
_DICT_LIKE = {
    *("CfgNode", "EasyDict", "AttrDict", "DictConfig", "ConfigDict", "Config", "AttributeDict", "Dict"),
    *("defaultdict", "dict"),
}


class _Blank:
    """Stands in for an object of a class that isn't imported: takes anything, keeps nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        return object.__new__(cls)

    def __init__(self, *args: object, **kwargs: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _Settings:
    """The same for a dict-like class: PyTorch's unpickler sets items on an exact OrderedDict only."""

    def __new__(cls, *args: object, **kwargs: object) -> OrderedDict:  # type: ignore[misc]
        return OrderedDict()


def load(path: str | Path) -> Mapping[str, Any]:
    """What a checkpoint file holds: a mapping, perhaps nested, on the CPU, memory-mapped where possible.

    Raises WeightsError for a file that is absent, empty, cut short, not a checkpoint, or that needs
    code to load.
    """
    path = Path(path)
    if not path.exists():
        raise WeightsError(f"there is no checkpoint '{path}'", hint="check the path after '@'")
    if not path.is_file():
        raise WeightsError(f"'{path}' is a folder, not a checkpoint file", hint="name the file inside it")
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise WeightsError(f"can't read '{path}': {error.strerror}") from error
    _refuse_other_files(path, head)
    if path.suffix == ".safetensors" or _is_safetensors(head):
        return _load_safetensors(path)
    content = _load_torch(path, zipped=head.startswith(b"PK"))
    if not isinstance(content, Mapping):
        raise WeightsError(
            f"'{path}' holds a {type(content).__name__}, not a mapping of names to tensors",
            hint="save `model.state_dict()`",
        )
    return content


def _refuse_other_files(path: Path, head: bytes) -> None:
    again = "fetch it again, or give another file with @PATH"
    if not head:
        raise WeightsError(f"'{path}' is empty", hint=again)
    if head.startswith(b"version https://git-lfs"):
        raise WeightsError(
            f"'{path}' is a Git LFS pointer, not the weights themselves",
            hint="run `git lfs pull` where it came from",
        )
    if looks_like_html(head):
        raise WeightsError(
            f"'{path}' is a web page, not weights: a sign-in or warning page was saved in their place",
            hint="download it in a browser, then give that file with @PATH",
        )
    packed = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf")
    if head.startswith(packed) or head[257:262] == b"ustar":
        raise WeightsError(
            f"'{path}' is a packed archive", hint="unpack it and give the file inside with @PATH"
        )
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        raise WeightsError(f"'{path}' is an HDF5 file, not a PyTorch or safetensors checkpoint")
    if head.startswith(b"\x93NUMPY") or path.suffix in (".npz", ".npy"):
        raise WeightsError(
            f"'{path}' is a NumPy file, not a PyTorch or safetensors checkpoint",
            hint="convert it first; timm's `load_pretrained` reads the JAX files of its own models",
        )


def _is_safetensors(head: bytes) -> bool:
    return len(head) > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(path, device="cpu")
    except Exception as error:
        raise _damaged(path) from error


def _load_torch(path: Path, *, zipped: bool) -> object:
    """Read with the restricted unpickler; what it refuses gets a stand-in, if it may, and it tries again."""
    inert: list[tuple[type, str]] = []
    while True:
        try:
            with torch.serialization.safe_globals(inert), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about what becomes an error below
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except pickle.UnpicklingError as error:
            refused = _refused_global(str(error)) or _foreign_global(path, zipped)
            if refused is None:
                raise _damaged(path) from error
            stand_in = _stand_in(refused)
            if stand_in is None or any(name == refused for _, name in inert) or len(inert) > 200:
                raise _needs_code(path, refused) from error
            inert.append((stand_in, refused))
        except Exception as error:
            if "TorchScript" in str(error) or "torch.jit" in str(error):
                raise _needs_code(path, "a TorchScript program") from error
            raise _damaged(path) from error


def _refused_global(message: str) -> str | None:
    found = re.search(r"GLOBAL ([\w.]+)", message)
    if found is None:
        return "torch.distributed.tensor.DTensor" if "DTensor" in message else None
    name = found.group(1)
    return f"builtins.{name}" if name in _PLAIN else name  # PyTorch's message drops "builtins."


def _stand_in(name: str) -> type | None:
    """The inert class to put in place of the global `name`, None where a file that names it is refused."""
    root, _, last = name.partition(".")[0], *name.rpartition(".")[1:]
    if root == "builtins":
        known = last in _PLAIN
    else:
        known = root in _SETTINGS or name in _SETTINGS_NAMES
    if not known:
        return None
    return _Settings if last in _DICT_LIKE else _Blank


def _foreign_global(path: Path, zipped: bool) -> str | None:
    """The first class or function from outside PyTorch that a pickle names, read without running it.

    For pickles of a protocol that PyTorch's unpickler doesn't know, so that a file which wants to
    run code is told from a damaged one. None where there is none, or no pickle.
    """
    strings: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(_pickle_of(path, zipped)):
            name = None
            if opcode.name in ("GLOBAL", "INST"):
                name = str(argument).replace(" ", ".")
            elif opcode.name == "STACK_GLOBAL":
                name = ".".join(strings[-2:])
            elif isinstance(argument, str):
                strings.append(argument)
            if name and not name.startswith("torch.") and name != "collections.OrderedDict":
                return name
    except (ValueError, OSError, IndexError, StopIteration, zipfile.BadZipFile):
        return None
    return None


def _pickle_of(path: Path, zipped: bool) -> bytes:
    if zipped:
        with zipfile.ZipFile(path) as archive:
            return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    with path.open("rb") as file:
        return file.read(_CHUNK)


def _needs_code(path: Path, what: str) -> WeightsError:
    return WeightsError(
        f"'{path}' needs code to load ('{what}') and was refused",
        hint="if you trust it, load it yourself where it can do no harm and keep only the tensors, then give"
        " that file with @PATH:\n    found = torch.load(FILE, weights_only=False)\n    "
        "state = found.state_dict() if hasattr(found, 'state_dict') else found.get('state_dict', found)\n    "
        "safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, 'weights.safetensors')",
    )


def _damaged(path: Path) -> WeightsError:
    return WeightsError(
        f"'{path}' is cut short, damaged, or not a PyTorch or safetensors checkpoint",
        hint="compare its size with the published one and fetch it again",
    )

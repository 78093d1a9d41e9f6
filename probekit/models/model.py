"""A model: an `nn.Module` as its author wrote it, with its weights' identity and its preprocessing."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from probekit.anatomy import Declared
from probekit.errors import PluginError, ProbekitError, UsageError, WeightsError
from probekit.models import candidates
from probekit.models.checkpoints import Accounting, adopt, choose, landing
from probekit.models.fetch import Progress, fetch_checked, sha256
from probekit.models.weightfile import load
from probekit.plugins.loading import blamed, describe
from probekit.specs import Layout, ModelSpec, Preprocessing, Weights


@dataclass(frozen=True)
class WeightsIdentity:
    """What weights a model has, so that results computed with others are never taken for its own.

    kind:   "file" (a checkpoint; `sha256` is the file's), "bundled" (one that comes with the pack),
            "random", "hub" (fetched by timm or transformers) or "module" (came with a module from Python);
            for the last three `sha256` is that of the state dict, see `state_sha256`
    source: the path, address, ``package:file``, repository or seed
    note:   how the file's keys were accounted for
    """

    kind: str
    source: str
    sha256: str
    note: str = ""


@dataclass
class Model:
    """A module ready to be watched.

    forward:       ``forward(module, images)``, for a module that needs more than ``module(images)``
    preprocessing: how an image becomes its input; None where a module came from Python without any
    declared:      geometry that can't be inferred, declared by a pack
    weights:       their identity; None until `load_model` has set it
    name:          the reference it was loaded by, "" for a module given from Python
    spec:          the catalog's entry, None without one
    pack:          whose it is, with the version, for messages
    """

    module: nn.Module
    forward: Callable[[nn.Module, Tensor], Any] | None = None
    preprocessing: Preprocessing | None = None
    declared: Declared | None = None
    weights: WeightsIdentity | None = None
    name: str = ""
    spec: ModelSpec | None = None
    accounting: Accounting | None = None
    pack: str = ""

    def __call__(self, images: Tensor) -> Any:
        """One forward pass. images: (B, 3, H, W), normalised."""
        return self.run(self.module, images)

    def run(self, module: nn.Module, images: Tensor) -> Any:
        """A forward pass of `module`, which is this model's own or what is inside a wrapper of it.

        What the author's code raises by mistake becomes a `PluginError` that names the model.
        """
        try:
            return module(images) if self.forward is None else self.forward(module, images)
        except (ProbekitError, MemoryError, torch.OutOfMemoryError):  # ours, or the machine's
            raise
        except (Exception, SystemExit) as error:
            raise PluginError(
                f"the forward pass of {self.who} raised {describe(error)}", hint="--debug shows where"
            ) from error

    @property
    def who(self) -> str:
        """For messages: ``'moco:vit-b16@random' of pack 'moco 0.1'``."""
        return _who(self.name or type(self.module).__name__, self.pack)

    def check(self) -> None:
        """Raise `PluginError` where a part is not what it has to be."""
        kinds = {"preprocessing": Preprocessing, "declared": Declared, "weights": WeightsIdentity}
        fits = {
            "module": isinstance(self.module, nn.Module),
            "forward": self.forward is None or callable(self.forward),
            **{part: isinstance(getattr(self, part), kind | None) for part, kind in kinds.items()},
        }
        if wrong := next((part for part, fit in fits.items() if not fit), None):
            needed = {"module": "an nn.Module", "forward": "a function of module and images"}
            needed |= {part: f"a probekit.{kind.__name__}" for part, kind in kinds.items()}
            raise PluginError(
                f"model {self.who} has a '{type(getattr(self, wrong)).__name__}' as its '{wrong}'",
                hint=f"it has to be {needed[wrong]}",
            )


def state_sha256(module: nn.Module) -> str:
    """SHA-256 over a module's parameters and persistent buffers: names, dtypes, shapes and bytes, by name."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if not isinstance(value, Tensor):  # a module's extra state
            continue
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(memoryview(data.numpy()))
    return digest.hexdigest()


def wrap(module: nn.Module, preprocessing: Preprocessing | None = None) -> Model:
    """A plain module from Python as a Model. The module isn't changed, its training mode included."""
    if not isinstance(module, nn.Module):
        raise UsageError(
            f"a model must be an nn.Module or a name, not a '{type(module).__name__}'",
            hint="`probekit list models` shows the names",
        )
    identity = WeightsIdentity("module", type(module).__name__, state_sha256(module))
    return Model(module, preprocessing=preprocessing, weights=identity)


def load_model(
    ref: Any,
    catalog: Any,
    *,
    seed: int = 0,
    image_size: tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> Model:
    """The model a reference names, in eval mode, float32, on the CPU.

    ref:        ``NAME[:VARIANT][:key=value]...[@WEIGHTS]`` as text or `ModelRef`, or a callable of the
                user's own, ``pkg.module:callable`` or ``./file.py:callable``, that returns a module
    catalog:    a `probekit.plugins.catalog.Catalog`
    seed:       of everything a builder draws, ``@random`` weights above all; the caller's generator
                is left as it was
    image_size: (rows, columns) of the input, for a model built at another size than its own
    progress:   hears of bytes fetched, and of bytes read to check a file
    Raises UsageError, PluginError (the builder failed) or WeightsError.
    """
    entry = catalog.model(ref)
    name, pack = str(entry.ref), " ".join(part for part in (entry.pack, entry.version) if part)
    with blamed(f"model {_who(name, pack)}"):
        return load_entry(
            entry.spec,
            catalog.resolve_target(entry),
            variant=entry.variant,
            options=entry.options,
            weights=entry.ref.weights,
            seed=seed,
            image_size=image_size,
            name=name,
            pack=pack,
            own=not entry.pack,
            progress=progress,
        )


def _who(name: str, pack: str) -> str:
    return f"'{name}' of pack '{pack}'" if pack else f"'{name}'"


def load_entry(
    spec: ModelSpec,
    build: Callable[..., Any],
    *,
    variant: str | None = None,
    options: Mapping[str, Any] | None = None,
    weights: str | None = None,
    seed: int = 0,
    image_size: tuple[int, int] | None = None,
    name: str = "",
    pack: str = "",
    own: bool = False,
    progress: Progress | None = None,
) -> Model:
    """A spec's model, from its target. See `load_model`.

    weights: "random", a path, or None for the published ones
    pack:    whose it is, for messages
    own:     a callable of the user's own, which is called without a variant and comes with whatever
             weights it makes
    """
    name = name or spec.full_name
    variant = spec.variant if variant is None else variant
    path, digest, source = _locate(spec, weights, name, own=own, progress=progress)
    arguments = dict(options or {})
    if not own or (image_size is not None and _takes(build, "image_size")):
        arguments["image_size"] = image_size
    place = None
    if own and path is not None:  # words of ours, as `timm:` takes them, unless the callable has its own
        words = [word for word in ("container", "prefix") if not _takes(build, word)]
        place = {word: str(arguments.pop(word)) for word in words if word in arguments}
    if spec.loads_weights:
        arguments["weights"] = path or ("random" if weights == "random" else "published")

    model = _built(build, () if own else (variant,), arguments, seed, name, pack)
    if place is not None:
        model.accounting = _load_own(model.module, path, name.partition("@")[0], place)
    elif path is not None and not spec.loads_weights:
        model.accounting = _load_weights(model.module, path, spec, arguments, name)
    settle(model.module)
    if model.weights is None:
        kind = "random" if weights == "random" else "module" if own else "hub"
        source = {"random": f"seed {seed}", "hub": variant, "module": name}[kind] if not digest else source
        sha = digest or state_sha256(model.module)
        if digest:
            kind = "bundled" if spec.weights and source == spec.weights.bundled else "file"
        model.weights = WeightsIdentity(kind, source, sha, str(model.accounting or ""))
    preprocessing = model.preprocessing or spec.preprocessing
    return replace(model, preprocessing=_resized(preprocessing, image_size), spec=spec)


def _locate(
    spec: ModelSpec, weights: str | None, name: str, *, own: bool, progress: Progress | None
) -> tuple[Path | None, str, str]:
    """The weights' file, its SHA-256 and where it came from; nothing where no file is involved."""
    if weights == "random" or (weights is None and (own or spec.loads_weights)):
        return None, "", ""
    if weights is not None:
        path = Path(weights).expanduser()
        if not path.exists():
            raise WeightsError(f"there is no file '{path}'", hint="a path follows the '@' of a model's name")
        return path, sha256(path, progress) if path.is_file() else "", str(path)
    if spec.weights is not None and spec.weights.bundled:
        path = _bundled(spec.weights.bundled, name)
        return path, sha256(path, progress), spec.weights.bundled
    if spec.weights is None or not spec.weights.url:
        raise WeightsError(
            f"no weights are published for '{name}'",
            hint=f"give a file, '{name}@PATH', or take untrained weights, '{name}@random'",
        )
    fetched = fetch_checked(spec.weights, progress=progress)
    return fetched.path, fetched.sha256, spec.weights.url


def _bundled(place: str, name: str) -> Path:
    package, _, file = place.partition(":")
    path = Path(str(resources.files(package) / file))
    if not path.is_file():
        raise PluginError(
            f"the weights of '{name}' are missing: its pack '{package}' came without '{file}'",
            hint="reinstall the pack",
        )
    return path


def settle(module: nn.Module) -> nn.Module:
    """Eval mode, float32, on the CPU."""
    return module.eval().float().cpu()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Weights drawn on the CPU from a seed, its generator put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # alone: torch's own function reseeds the GPU's too
        yield


def _built(
    build: Callable[..., Any],
    positional: tuple[str, ...],
    arguments: dict[str, Any],
    seed: int,
    name: str,
    pack: str,
) -> Model:
    who = _who(name, pack)
    try:
        with seeded(seed):
            built = build(*positional, **arguments)
    except (ProbekitError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        raise PluginError(f"{who} failed to build: {describe(error)}", hint="--debug shows where") from error
    if not isinstance(built, nn.Module | Model):
        raise PluginError(
            f"the builder of {who} returned a '{type(built).__name__}'",
            hint="it has to return an nn.Module or a probekit.Model",
        )
    model = replace(Model(built) if isinstance(built, nn.Module) else built, name=name, pack=pack)
    model.check()
    return model


def _load_own(module: nn.Module, path: Path, name: str, place: Mapping[str, str]) -> Accounting:
    """A checkpoint of the user's own into a callable's module: found by its names, then taken strictly."""
    source = str(path)
    found = candidates.choose(load(path), module.state_dict(), source=source, target=name, **place)
    taken = adopt(module, found.tensors, Layout(), source=source)
    used = tuple(f"{found.prefix}{key}" for key in taken.used)
    layout = f"from {found.where}" if found.container or found.prefix else ""
    return replace(taken, used=used, ignored=found.outside, layout=layout)


def _load_weights(
    module: nn.Module, path: Path, spec: ModelSpec, options: Mapping[str, Any], name: str
) -> Accounting:
    state = load(path)
    known = spec.weights or Weights()  # the model's own keys
    layouts = known.suiting(options)
    if not layouts:
        raise PluginError(f"'{name}' has no layout for the options {dict(options)}")
    layout = choose(module, state, layouts)
    if not landing(module, state, layout):  # perhaps a file for other options: name it
        for other in (known.layout, *known.layouts):
            if other not in layouts and landing(module, state, other):
                wanted = ":".join(
                    [spec.full_name, *(f"{key}={value}" for key, value in other.options.items())]
                )
                asked = name.partition("@")[0]
                raise WeightsError(
                    f"'{path}' is a {other.name or 'file'} for '{wanted}', not for '{asked}'",
                    hint=f"take '{wanted}@{path}'",
                )
    return adopt(module, state, layout, source=str(path))


def _resized(preprocessing: Preprocessing, size: tuple[int, int] | None) -> Preprocessing:
    if size is None:
        return preprocessing
    rows, columns = size
    return preprocessing.model_copy(update={"size": (int(rows), int(columns))})


def _takes(function: Callable[..., Any], name: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())

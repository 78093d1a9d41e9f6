"""Any model of timm by its name, with timm's weights, random ones, or a checkpoint of the user's own.

A name is timm's (``vit_tiny_patch16_224``, with or without a tag), ``hf-hub:ORG/NAME`` or
``local-dir:FOLDER``, whose config.json says which model it is.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import resolve_model_data_config
from timm.layers import resample_abs_pos_embed
from timm.models import create_model, get_pretrained_cfg, is_model, list_models
from torch import Tensor, nn

from probekit.errors import PluginError, UsageError, WeightsError
from probekit.models.checkpoints import SPARE_KEYS, check_heads
from probekit.models.fetch import hub, hub_answer, sha256
from probekit.models.model import Model, WeightsIdentity
from probekit.models.timm_own import OwnWeights, weights_in
from probekit.specs import Preprocessing

HUB, FOLDER = "hf-hub:", "local-dir:"


def build(
    variant: str,
    *,
    weights: str | Path,
    image_size: tuple[int, int] | None = None,
    container: str = "",
    prefix: str = "",
) -> Model:
    """`timm.create_model` with strict weights and timm's own data config as preprocessing.

    variant:    a timm name, with or without a tag, ``hf-hub:ORG/NAME`` or ``local-dir:FOLDER``
    weights:    "published" (timm's, the repository's, the folder's), "random", or the path of a
                checkpoint. There the weights are found by the model's names (`candidates`), go
                through timm's filter for that architecture and must then fit without a key to spare;
                the classifier takes the file's number of classes, none where the file has no classifier
    image_size: (rows, columns), through timm's ``img_size``
    container, prefix: where in the checkpoint the weights lie, if several places would do
    Raises UsageError for an unknown name or a size the model can't take, WeightsError.
    """
    local = isinstance(weights, Path)
    if variant.startswith(FOLDER):
        variant = FOLDER + str(Path(variant.removeprefix(FOLDER)).expanduser())
        if weights == "published":
            weights = weights_in(Path(variant.removeprefix(FOLDER)))
    if not variant.startswith((HUB, FOLDER)):
        _check_name(variant)
    if (container or prefix) and not isinstance(weights, Path):
        raise UsageError(
            "'container' and 'prefix' say where in a checkpoint the weights lie, and no checkpoint is given",
            hint=f"write 'timm:{variant}:container=NAME@PATH'",
        )
    own = None
    arguments: dict[str, Any] = {}
    if isinstance(weights, Path):
        blank = _create(variant, {}, image_size, weights, blank=True)
        own = OwnWeights.find(weights, blank, f"timm:{variant}", container, prefix)
        arguments = own.arguments()
    elif weights == "published":
        _check_published(variant)
        arguments = {"pretrained": True}
    module = _create(variant, arguments, image_size, weights, where=own.place.where if own else "")
    module.pretrained_cfg.pop("state_dict", None)  # our own file's tensors, of no more use
    if image_size is not None:
        _check_patch(module, image_size, variant)
    model = Model(module, preprocessing=preprocessing_of(module))
    if own is not None:
        check_heads(module, own.state, str(weights))
        model.accounting = own.accounting(module)
        if not local:
            note = str(model.accounting)
            model.weights = WeightsIdentity("file", str(weights), sha256(weights), note)
    return model


def preprocessing_of(module: nn.Module) -> Preprocessing:
    """timm's data config of a module as Preprocessing: mean, std, interpolation, crop, size."""
    config = resolve_model_data_config(module)
    channels, rows, columns = config["input_size"]
    if channels != 3:
        raise UsageError(f"the model takes {channels} channels, and probekit gives it RGB images")
    return Preprocessing(
        mean=config["mean"],
        std=config["std"],
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
        size=(rows, columns),
    )


def fit_grid(state: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """A layout's `convert` for models built at another size than their checkpoint's.

    Position embeddings (1, prefix + N, C) go through timm's resampling, relative-position tables
    (distances, heads) through `resample_table`. Tensors that fit already stay as they are, and those
    that differ in more than the grid are left for the accounting to refuse. The file's grid is taken
    to be square.
    """
    state = dict(state)
    expected = module.state_dict()
    for key in state.keys() & expected.keys():
        old, new = state[key], expected[key]
        if key == "pos_embed" and old.dim() == new.dim() == 3 and old.shape[-1] == new.shape[-1]:
            prefix = (
                0 if getattr(module, "no_embed_class", False) else getattr(module, "num_prefix_tokens", 1)
            )
            if math.isqrt(old.shape[1] - prefix) ** 2 == old.shape[1] - prefix:
                grid = module.patch_embed.grid_size
                state[key] = resample_abs_pos_embed(old.float(), new_size=grid, num_prefix_tokens=prefix)
        elif key.endswith("relative_position_bias_table") and old.shape[1:] == new.shape[1:]:
            window = module.get_submodule(key.rpartition(".")[0]).window_size
            state[key] = resample_table(old, window, len(new) - (2 * window[0] - 1) * (2 * window[1] - 1))
    return state


def resample_table(table: Tensor, window: tuple[int, int], extra: int) -> Tensor:
    """A relative-position table (distances, heads) for another window, (rows, columns) in tokens.

    The table's own window is square; `extra` rows at its end belong to the class token and stay. As in
    BEiT's and SimMIM's fine-tuning, known offsets are spread over the new range at geometrically growing
    steps, so that near offsets keep their meaning, and values between them interpolated, here linearly.
    An axis whose length stays is left as it is, which timm's own function doesn't do.
    """
    side = math.isqrt(len(table) - extra)
    if side * side != len(table) - extra or side % 2 == 0 or all(2 * length - 1 == side for length in window):
        return table
    body = table[: side * side].reshape(side, side, -1).double()
    down, right = (_spread(side, 2 * length - 1) for length in window)
    resampled = torch.einsum("ij,kl,jlh->ikh", down, right, body).flatten(0, 1)
    return torch.cat([resampled.to(table.dtype), table[side * side :]])


def _spread(source: int, target: int) -> Tensor:
    """Weights (target, source) from offsets -source // 2 ... source // 2 to a longer axis's, float64."""
    near, far = source // 2, target // 2
    low, high = 1.0, float(max(far, 2))
    for _ in range(
        60
    ):  # the growth at which `near` steps reach `far`; 1, and the ends cut off, where they do anyway
        growth = (low + high) / 2
        low, high = (low, growth) if sum(growth**step for step in range(near)) > far else (growth, high)
    steps = np.concatenate([[0.0], np.cumsum(low ** np.arange(near))])
    known = np.concatenate([-steps[:0:-1], steps])
    wanted = np.arange(-far, far + 1)
    columns = [np.interp(wanted, known, unit) for unit in np.eye(source)]
    return torch.from_numpy(np.stack(columns, axis=1))


def check_multiple(image_size: tuple[int, int], patch: tuple[int, int], name: str) -> None:
    """Raises UsageError where patches don't tile the image: the rest would be cut off in silence."""
    if any(size % step or size < step for size, step in zip(image_size, patch, strict=True)):
        fitting = [max(round(size / step), 1) * step for size, step in zip(image_size, patch, strict=True)]
        raise UsageError(
            f"'{name}' has patches of {patch[0]} x {patch[1]} px, which don't tile"
            f" {image_size[0]} x {image_size[1]}",
            hint=f"take `--image-size {fitting[0]}x{fitting[1]}`",
        )


def _check_name(variant: str) -> None:
    base, _, tag = variant.partition(".")
    if not is_model(base):
        near = difflib.get_close_matches(base, list_models(), n=3, cutoff=0.6)
        found = f"did you mean {' or '.join(repr(f'timm:{name}') for name in near)}? " if near else ""
        raise UsageError(
            f"timm has no model '{base}'", hint=f"{found}`timm.list_models('*vit*')` shows its names"
        )
    if tag and get_known(variant) is None:
        tags = [name.partition(".")[2] for name in list_models(f"{base}.*", pretrained=True)]
        near = difflib.get_close_matches(tag, tags, n=1, cutoff=0) or tags
        hint = f"did you mean 'timm:{base}.{near[0]}'? " if near else ""
        raise UsageError(
            f"timm's '{base}' has no weights '{tag}'", hint=f"{hint}it has {', '.join(tags) or 'none'}"
        )


def get_known(variant: str) -> Any:
    """timm's config of a name with a tag; None where it knows no such tag."""
    try:
        return get_pretrained_cfg(variant, allow_unregistered=False)
    except RuntimeError:
        return None


def _check_published(variant: str) -> None:
    if variant.startswith(HUB):
        return
    config = get_known(variant)
    if config is None or not config.has_weights:
        base = variant.partition(".")[0]
        tagged = list_models(f"{base}.*", pretrained=True)
        other = f"'timm:{tagged[0]}' has some; or " if tagged else ""
        raise WeightsError(
            f"timm has no weights for '{variant}'",
            hint=f"{other}give a file, 'timm:{variant}@PATH', or take untrained weights,"
            f" 'timm:{variant}@random'",
        )


def _create(
    variant: str,
    arguments: dict[str, Any],
    image_size: tuple[int, int] | None,
    weights: str | Path,
    *,
    blank: bool = False,
    where: str = "",
) -> nn.Module:
    """The module; `blank` without memory for its weights, for their names and shapes alone."""
    size = {} if image_size is None else {"img_size": tuple(image_size)}
    source = str(weights) if isinstance(weights, Path) else variant
    fetching = weights == "published" or variant.startswith(HUB)
    try:
        with hub() if fetching else nullcontext(), torch.device("meta") if blank else nullcontext():
            return _sized(variant, arguments, size)
    except (UsageError, WeightsError, MemoryError):
        raise
    except Exception as error:
        if variant.startswith(FOLDER) and isinstance(error, (OSError, ValueError, KeyError)):
            raise WeightsError(
                f"'{variant.removeprefix(FOLDER)}' is no folder of a timm model: {error}",
                hint="it holds config.json and model.safetensors, as timm's `save_for_hf` writes them",
            ) from error
        if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _NETWORK:
            raise _offline(variant, error) from error
        if isinstance(error, RuntimeError) and "loading state_dict" in str(error):
            raise _misfit(source, variant, str(error), where) from error
        if isinstance(weights, Path) and not blank:
            raise WeightsError(
                f"timm can't read '{source}' as weights of '{variant}': {type(error).__name__}: {error}",
                hint="the file is of another architecture, or needs a model pack that knows its layout",
            ) from error
        if image_size is not None:
            raise UsageError(
                f"'timm:{variant}' can't be built for images of {image_size[0]} x {image_size[1]}: {error}",
                hint="leave --image-size out, or take a size its windows and patches divide",
            ) from error
        raise PluginError(f"timm failed to build '{variant}': {type(error).__name__}: {error}") from error


_NETWORK = {"httpx", "httpx2", "httpcore", "httpcore2", "huggingface_hub"}


def _sized(variant: str, arguments: dict[str, Any], size: dict[str, Any]) -> nn.Module:
    try:
        return create_model(variant, **arguments, **size)
    except TypeError as error:
        if "img_size" not in size or "img_size" not in str(error):
            raise
        config = get_known(variant)
        if config is not None and config.fixed_input_size:
            own = "{} x {}".format(*config.input_size[-2:])
            raise UsageError(
                f"'timm:{variant}' takes images of {own} only", hint="leave --image-size out"
            ) from error
        return create_model(variant, **arguments)  # convolutional position codes: any size will do


def _check_patch(module: nn.Module, image_size: tuple[int, int], variant: str) -> None:
    embed = getattr(module, "patch_embed", None)
    patch = getattr(embed, "patch_size", None)
    if getattr(module, "stages", None) is None and isinstance(patch, tuple) and len(patch) == 2:
        check_multiple(image_size, patch, f"timm:{variant}")


def _misfit(source: str, variant: str, message: str, where: str) -> WeightsError:
    """PyTorch's list of every key, as one sentence with the first few."""
    parts = []
    for label, pattern in (
        ("missing", r"Missing key\(s\)[^:]*: (.*)"),
        ("unexpected", r"Unexpected key\(s\)[^:]*: (.*)"),
    ):
        if found := re.search(pattern, message):
            keys = re.findall(r'"([^"]+)"', found.group(1))
            parts.append(
                f"{len(keys)} {label} ({', '.join(map(repr, keys[:3]))}{', ...' if len(keys) > 3 else ''})"
            )
    shapes = re.findall(
        r"size mismatch for ([^:]+):.*?torch\.Size\((\[[^]]*\]).*?torch\.Size\((\[[^]]*\])", message
    )
    if shapes:
        shown = ", ".join(f"'{key}' {have} where the model has {want}" for key, have, want in shapes[:3])
        parts.append(f"{len(shapes)} of another shape ({shown}{', ...' if len(shapes) > 3 else ''})")
    place = f" ({where})" if where else ""
    return WeightsError(
        f"'{source}'{place} doesn't fit 'timm:{variant}': keys {'; '.join(parts)}",
        hint=SPARE_KEYS
        if len(parts) == 1 and "unexpected" in parts[0]
        else "the file is of another architecture, or one that a model pack reads: `probekit list models`",
    )


def _offline(variant: str, error: Exception) -> WeightsError:
    if variant.startswith(HUB):
        return WeightsError(
            f"can't fetch '{variant.removeprefix(HUB)}' from the Hugging Face hub: {hub_answer(error)}",
            hint="without a network, copy the repository's files into a folder: 'timm:local-dir:FOLDER'",
        )
    config = get_known(variant)
    repository = getattr(config, "hf_hub_id", None)
    where = f" ('{repository}' on the Hugging Face hub)" if repository else ""
    return WeightsError(
        f"can't fetch timm's weights of '{variant}'{where}: {hub_answer(error)}",
        hint=f"without a network, download model.safetensors elsewhere and give it: 'timm:{variant}@PATH';"
        f" or take untrained weights, 'timm:{variant}@random'",
    )

"""A vision model of Hugging Face transformers, by its repository on the hub or its folder."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from probekit.errors import PluginError, UsageError, WeightsError
from probekit.models.checkpoints import own_state
from probekit.models.fetch import hub, hub_answer
from probekit.models.model import Model, WeightsIdentity, settle, state_sha256
from probekit.models.timm import check_multiple
from probekit.specs import Preprocessing

_INTERPOLATION = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # PIL's numbers
_HEAD = re.compile(
    r"(\w*classifier|decoder|lm_head|head|\w+\.pooler|pooler)\b"
)  # what files hold beyond the encoder
_BESIDE_VISION = re.compile(r"text_|visual_projection\b|logit_")  # of a model of images and text
_POOLER = "pooler."  # a head of its own that no layer's numbers pass through; absent from many files


def build(variant: str, *, weights: str | Path, image_size: tuple[int, int] | None = None) -> Model:
    """`transformers.AutoModel` with its image processor's preprocessing.

    variant:    a repository ("facebook/vit-mae-base") or a folder
    weights:    "published" (the repository's), "random" (from its config alone), or the path of a
                checkpoint or folder for that config
    Of a model of images and text (CLIP, SigLIP) it is the vision tower.
    image_size: (rows, columns); the position embeddings are interpolated where the model can
    Attention goes through `scaled_dot_product_attention` where the model can, by hand otherwise.
    Remote code is never run. Raises UsageError, PluginError (transformers isn't installed),
    WeightsError.
    """
    transformers = _transformers()
    with hub(), _quiet(transformers):
        config = _asked(variant, transformers.AutoConfig.from_pretrained, variant, trust_remote_code=False)
        _check_vision(config, variant)
        paired = hasattr(config, "text_config") and hasattr(config, "vision_config")
        if paired:
            config = _vision_tower(transformers, config, variant)
        masked = hasattr(config, "mask_ratio")
        if masked:
            config.mask_ratio = 0.0
        own = weights if isinstance(weights, Path) else None
        folder = str(own) if own is not None and own.is_dir() else variant
        if own is not None and not own.is_dir():
            module = _pretrained(transformers, str(own), config, own_state(own), paired=paired)
        elif weights == "random":
            module = _from_config(transformers, config)
        else:
            module = _pretrained(transformers, folder, config, paired=paired)
        _check_input(module, variant)
        preprocessing = _preprocessing(transformers, variant, config)
    if image_size is not None:
        _check_size(module, config, image_size, variant)
    model = Model(module, forward=_forward(module, config, image_size, masked), preprocessing=preprocessing)
    if (
        Path(folder).is_dir()
        and weights != "random"
        and not (isinstance(weights, Path) and weights.is_file())
    ):
        model.weights = WeightsIdentity("file", folder, state_sha256(settle(module)))
    return model


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise PluginError(
            "models named 'hf:...' need the transformers library", hint='`pip install "vit-probekit[hf]"`'
        ) from error
    return transformers


def _asked(variant: str, ask: Any, *arguments: Any, **options: Any) -> Any:
    """A call to transformers, its many errors as ours."""
    try:
        return ask(*arguments, **options)
    except (MemoryError, WeightsError):
        raise
    except ImportError as error:
        raise PluginError(
            f"'hf:{variant}' needs a library that isn't installed: {_first_line(error)}"
        ) from error
    except Exception as error:
        text = str(error)
        if "trust_remote_code" in text or "custom code" in text:
            raise WeightsError(
                f"'hf:{variant}' needs code from its repository to load, and was refused",
                hint="install that code as a package of its own and name its builder: pkg.module:callable",
            ) from error
        if Path(variant).is_dir() or isinstance(error, ValueError):
            raise WeightsError(
                f"'hf:{variant}' isn't a model that transformers can load: {_first_line(error)}",
                hint="a folder needs config.json and model.safetensors, as `save_pretrained` writes them",
            ) from error
        if "Repo id must" in text or variant.startswith((".", "/", "~")):
            raise WeightsError(
                f"there is no folder '{variant}', and it can't be a repository's name"
            ) from error
        raise WeightsError(
            f"can't fetch '{variant}' from the Hugging Face hub: {hub_answer(error)}",
            hint="without a network, copy the repository's files into a folder and name that: 'hf:./FOLDER'",
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _check_vision(config: Any, variant: str) -> None:
    if not any(
        hasattr(config, name) for name in ("image_size", "patch_size", "num_channels", "vision_config")
    ):
        raise UsageError(
            f"'hf:{variant}' is no vision model but a '{config.model_type}'",
            hint="name a model that takes images",
        )


def _vision_tower(transformers: Any, config: Any, variant: str) -> Any:
    """The part of a model of images and text that takes images. Raises `UsageError` where it is no model."""
    tower = config.vision_config
    if type(tower) not in transformers.MODEL_MAPPING:
        raise UsageError(
            f"'hf:{variant}' is a '{config.model_type}', whose vision tower transformers can't build alone",
            hint="name a builder of your own that takes it out: pkg.module:callable",
        )
    tower.name_or_path = variant
    return tower


def _check_input(module: nn.Module, variant: str) -> None:
    """Raises `UsageError` where a batch of images is not all that the model needs."""
    name = getattr(module, "main_input_name", "pixel_values")
    kind = type(module).__name__
    if name != "pixel_values":
        what = "videos" if "video" in name else f"'{name}'"
        raise UsageError(f"'hf:{variant}' is a '{kind}', which takes {what}, no images")
    if hasattr(module.config, "num_frames"):
        raise UsageError(f"'hf:{variant}' is a '{kind}', which takes videos, no images")
    required = [
        p.name
        for p in inspect.signature(module.forward).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if more := [n for n in required if n != name]:
        raise UsageError(
            f"'hf:{variant}' is a '{kind}', which needs '{more[0]}' beside the images",
            hint="name a builder of your own that makes it from them: pkg.module:callable",
        )


def _with_attention(make: Any) -> nn.Module:
    """Through the fused call where the class has one: it is watched as well, and faster."""
    try:
        return make("sdpa")
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error) and "sdpa" not in str(error):
            raise
    return make("eager")


def _from_config(transformers: Any, config: Any) -> nn.Module:
    def make(attention: str) -> nn.Module:
        return transformers.AutoModel.from_config(
            config, attn_implementation=attention, trust_remote_code=False
        )

    return _asked(getattr(config, "name_or_path", "") or config.model_type, _with_attention, make)


def _pretrained(
    transformers: Any, source: str, config: Any, state: dict[str, Tensor] | None = None, *, paired: bool
) -> nn.Module:
    """From a repository, a folder, or `state`; refused where a weight would stay random.

    paired: `config` is the vision tower's of a model of images and text

    transformers itself renames keys of older versions and strips or adds the prefix of a model with
    a head; what it reports as missing, unexpected or of another shape is ours to refuse.
    """
    kind = transformers.AutoModel
    if state is not None:
        with torch.device("meta"):
            kind = type(_from_config(transformers, config))

    def make(attention: str) -> tuple[nn.Module, dict[str, Any]]:
        return kind.from_pretrained(
            source if state is None else None,
            config=config,
            **({} if state is None else {"state_dict": dict(state)}),
            attn_implementation=attention,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **({"trust_remote_code": False} if state is None else {}),
        )

    module, info = _asked(source, _with_attention, make)
    problems = {
        "missing": [str(key) for key in info["missing_keys"] if not str(key).startswith(_POOLER)],
        "unexpected": [
            key
            for key in map(str, info["unexpected_keys"])
            if not _HEAD.match(key) and not (paired and _BESIDE_VISION.match(key))
        ],
        "of another shape": [
            f"{key} {tuple(have)} where the model has {tuple(want)}"
            for key, have, want in info["mismatched_keys"]
        ],
    }
    found = [
        f"{len(keys)} {label} ({', '.join(sorted(keys)[:3])}{', ...' if len(keys) > 3 else ''})"
        for label, keys in problems.items()
        if keys
    ]
    if found:
        raise WeightsError(
            f"'{source}' doesn't fit the model of its config: keys {'; '.join(found)}",
            hint="the config and the weights belong to different models",
        )
    return module


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without transformers' bars and load reports: what matters of them becomes an error here."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _patch(config: Any) -> tuple[int, int] | None:
    patch = getattr(config, "patch_size", None)
    if isinstance(patch, int):
        return patch, patch
    return tuple(patch) if isinstance(patch, (list, tuple)) and len(patch) == 2 else None


def _check_size(module: nn.Module, config: Any, image_size: tuple[int, int], variant: str) -> None:
    if patch := _patch(config):
        check_multiple(image_size, patch, f"hf:{variant}")
    if tuple(image_size) != _own_size(config) and not _accepts(module, "interpolate_pos_encoding"):
        # Models with relative or convolutional positions take any size; others say so at the first batch.
        positions = [name for name, _ in module.named_parameters() if "position_embeddings" in name]
        if positions:
            raise UsageError(
                f"'hf:{variant}' takes images of {' x '.join(map(str, _own_size(config)))} only",
                hint="leave --image-size out",
            )


def _own_size(config: Any) -> tuple[int, int]:
    size = getattr(config, "image_size", 224)
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _accepts(module: nn.Module, name: str) -> bool:
    return name in inspect.signature(module.forward).parameters


def _forward(module: nn.Module, config: Any, image_size: tuple[int, int] | None, masked: bool) -> Any:
    """What the model needs beside the images; None where that is nothing.

    MAE shuffles its tokens by random noise even when it masks none of them: noise that ascends
    keeps them in the image's order.
    """
    options: dict[str, Any] = {}
    first = next(iter(inspect.signature(module.forward).parameters))
    if image_size is not None and _accepts(module, "interpolate_pos_encoding"):
        options["interpolate_pos_encoding"] = True
    noisy = masked and _accepts(module, "noise")
    if not options and not noisy and first == "pixel_values":
        return None
    rows, columns = _patch(config) or (1, 1)

    def forward(module: nn.Module, images: Tensor) -> Any:
        if noisy:
            count = (images.shape[-2] // rows) * (images.shape[-1] // columns)
            ascending = torch.arange(count, dtype=torch.float32, device=images.device)
            options["noise"] = ascending.expand(images.shape[0], -1)
        return module(pixel_values=images, **options)

    return forward


def _preprocessing(transformers: Any, variant: str, config: Any) -> Preprocessing:
    """The image processor's resize, crop, mean and std; ImageNet's where the repository has no processor."""
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(variant, trust_remote_code=False)
    except (OSError, ValueError, ImportError):
        return Preprocessing(size=_own_size(config))
    size, crop = dict(processor.size or {}), dict(getattr(processor, "crop_size", None) or {})
    shortest = size.get("shortest_edge")
    target = crop if getattr(processor, "do_center_crop", False) and crop else size
    rows = target.get("height") or shortest or _own_size(config)[0]
    columns = target.get("width") or shortest or _own_size(config)[1]
    # Either the short side is scaled and the middle cut out, or the image is squeezed into the size.
    centred = bool(shortest) or target is crop
    scaled = shortest or size.get("height") or rows
    normalised = getattr(processor, "do_normalize", True)
    return Preprocessing(
        mean=tuple(processor.image_mean) if normalised and processor.image_mean else (0.0, 0.0, 0.0),
        std=tuple(processor.image_std) if normalised and processor.image_std else (1.0, 1.0, 1.0),
        interpolation=_INTERPOLATION.get(int(getattr(processor, "resample", 3) or 0), "bicubic"),
        crop_pct=min(rows / scaled, 1.0) if centred else 1.0,
        crop_mode="center" if centred else "squash",
        size=(int(rows), int(columns)),
    )

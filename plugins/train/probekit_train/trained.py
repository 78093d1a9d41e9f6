"""Finished checkpoints: safetensors that say what they are, and the models they become again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from probekit import Declared, Model
from probekit.errors import UsageError, WeightsError
from probekit.models.checkpoints import adopt
from probekit.models.timm import check_multiple
from probekit.models.weightfile import load
from probekit.names import parse_model, quoted
from probekit.specs import Layout, Preprocessing
from probekit.store.sealing import write_bytes
from probekit_train.backbone import Description
from probekit_train.local_attention import restrict
from probekit_train.objectives.mae import Autoencoder, by_part

FORMAT = 1
_KEY = "probekit"
_PUBLISHED_BY = "a file of `probekit pretrain` or `probekit finetune`"


@dataclass(frozen=True)
class Tuned:
    """A network of another pack that was fine-tuned: a reference to it, its classifier, its changes."""

    reference: str
    img_size: int
    classes: int
    pool: str
    local_attention: int | None = None

    def build(self) -> Model:
        """The network untrained. Raises UsageError for a reference that is no pack's: it would run code."""
        from probekit.models.model import load_model
        from probekit.plugins.catalog import Catalog

        reference = parse_model(self.reference)
        if reference.is_file or reference.is_module or reference.weights is not None:
            raise UsageError(f"{quoted(self.reference)} is not the name of a pack's model")
        if reference.name == "trained":
            raise UsageError(f"{quoted(self.reference)} is a checkpoint, not the name of a network")
        size = (self.img_size, self.img_size)
        model = load_model(f"{self.reference}@random", Catalog.load(), image_size=size)
        classify(model.module, self.classes, self.pool)
        if self.local_attention is not None:
            restrict(model.module, self.local_attention)
        return model


def classify(module: nn.Module, classes: int, pool: str) -> None:
    """Give a network of timm a new classifier, in place. Raises UsageError for what isn't timm's."""
    if not hasattr(module, "reset_classifier") or not hasattr(module, "forward_head"):
        raise UsageError(
            f"a {type(module).__name__} can't be given a classifier: it is no network of timm",
            hint="take a model of 'timm:', 'moco', 'simmim', 'beit' or 'trained@FILE'; of MAE the encoder"
            " alone ('mae:vit-b16') or what `probekit pretrain` wrote, not another autoencoder",
        )
    try:
        module.reset_classifier(classes, pool)
    except (AssertionError, TypeError) as error:
        raise UsageError(f"this network can't pool by '{pool}': {error}") from error
    head = module.get_classifier()
    if isinstance(head, nn.Linear):
        nn.init.trunc_normal_(head.weight, std=2e-5)
        nn.init.zeros_(head.bias)


def write(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any], *, half: bool = False) -> None:
    """Seal a checkpoint, in float32 or float16. Raises StoreError."""
    kind = torch.float16 if half else torch.float32
    state = {
        name: (value.to(kind) if value.is_floating_point() else value).contiguous()
        for name, value in tensors.items()
    }
    text = json.dumps({"format": FORMAT, **about}, sort_keys=True)
    write_bytes(path, safetensors.torch.save(state, metadata={_KEY: text}))


def about(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself. Raises WeightsError."""
    if not path.is_file():
        raise WeightsError(f"there is no checkpoint '{path}'", hint="`trained@FILE` names one")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
        content = json.loads(text) if text else None
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"'{path}' is no safetensors file, or damaged") from error
    if not isinstance(content, dict) or "architecture" not in content:
        raise WeightsError(
            f"'{path}' doesn't say what network it is of", hint=f"'trained' reads {_PUBLISHED_BY}"
        )
    if content.get("format") != FORMAT:
        raise WeightsError(
            f"'{path}' was written by a newer version of the pack",
            hint="update it: `pip install -U vit-probekit-train`",
        )
    return content


def build(variant: str, *, weights: Path | str, image_size: tuple[int, int] | None = None) -> Model:
    """The model a checkpoint holds, weights and all.

    variant: the objective it must have been trained with; "" for any
    Raises WeightsError, UsageError.
    """
    if not isinstance(weights, Path):
        raise WeightsError(
            "'trained' is whatever a checkpoint says, and none is given",
            hint="write 'trained@FILE'; `probekit pretrain` makes such files",
        )
    said = about(weights)
    if variant and said.get("objective") != variant:
        raise WeightsError(
            f"'{weights}' was trained with {quoted(said.get('objective'))}, not {quoted(variant)}",
            hint=f"take 'trained@{weights}'",
        )
    model = rebuild(said, weights)
    size = said["preprocessing"]["size"][0]
    if image_size is not None and image_size != (size, size):
        _resize(model.module, image_size, str(weights))
    state = load(weights)
    if "decoder" in said:
        state = by_part(state)
    layout = Layout(name=f"checkpoint of {said['objective']}", convert="probekit.models.timm:fit_grid")
    model.accounting = adopt(model.module, state, layout, source=str(weights))
    return model


def rebuild(said: Mapping[str, Any], source: Path) -> Model:
    """The network that a checkpoint's metadata describes, untrained, ready to be watched."""
    try:
        preprocessing = Preprocessing.model_validate(said["preprocessing"])
        if "reference" in said["architecture"]:
            model = Tuned(**said["architecture"]).build()
            model.preprocessing = preprocessing
            return model
        module: nn.Module = Description.model_validate(said["architecture"]).build()
        if "decoder" not in said:
            return Model(module, preprocessing=preprocessing)
        decoder = {key: int(said["decoder"][key]) for key in ("width", "depth", "heads")}
        autoencoder = Autoencoder(module, **decoder)
    except (ValidationError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"'{source}' describes no network that can be built") from error
    declared = Declared(parts={"decoder_blocks": "decoder"})
    return Model(autoencoder, preprocessing=preprocessing, declared=declared)


def preprocessing_for(size: int, crop_pct: float) -> Preprocessing:
    """Of a network trained from nothing: ImageNet's mean and deviation."""
    return Preprocessing(size=(size, size), crop_pct=crop_pct)


def _resize(module: nn.Module, size: tuple[int, int], source: str) -> None:
    masked = any(hasattr(part, "local_mask") for part in module.modules())
    if masked or not hasattr(module, "set_input_size"):
        raise UsageError(
            f"the model of '{source}' can't take images of another size than its own",
            hint="leave --image-size out",
        )
    check_multiple(size, module.patch_embed.patch_size, source)
    module.set_input_size(img_size=size)

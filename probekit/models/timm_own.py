"""A checkpoint of the user's own for one of timm's models: where its weights are, and what became of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from probekit.errors import WeightsError
from probekit.models import candidates
from probekit.models.candidates import Candidate
from probekit.models.checkpoints import Accounting, check_finite
from probekit.models.weightfile import load

_FILES = ("model.safetensors", "pytorch_model.bin")


def weights_in(folder: Path) -> Path:
    """The weights' file of a folder as timm saves models. Raises WeightsError."""
    held = [folder / name for name in _FILES if (folder / name).is_file()]
    held = held or sorted(
        path for path in folder.glob("*") if path.suffix in (".safetensors", ".bin", ".pth")
    )
    if len(held) == 1 or any(path.name in _FILES for path in held):
        return held[0]
    what = "no weights" if not held else "several files of weights"
    raise WeightsError(
        f"'{folder}' holds {what}",
        hint=f"say which file: 'timm:local-dir:{folder}@PATH'; or take '@random'",
    )


@dataclass(frozen=True)
class OwnWeights:
    """What was found of a model's weights in a file.

    place:   where they lie
    state:   they, by the names they have there
    left:    names behind the prefix that are no part of the model: another head in the classifier's place
    classes: the file's number of classes, 0 where it has no classifier
    changed: position embeddings and tables that timm resamples, with their shape and the model's
    """

    target: str
    place: Candidate
    state: dict[str, Tensor]
    left: tuple[str, ...]
    classes: int | None
    changed: tuple[str, ...]

    @classmethod
    def find(cls, path: Path, blank: nn.Module, target: str, container: str, prefix: str) -> OwnWeights:
        """blank: the model, for its names and shapes. Raises WeightsError."""
        config = blank.pretrained_cfg
        names = config.get("classifier") or ()
        classifiers = (names,) if isinstance(names, str) else tuple(names)
        heads = tuple(f"{name.partition('.')[0]}." for name in classifiers)
        own = blank.state_dict()
        place = candidates.choose(
            load(path),
            [name for name in own if not name.startswith(heads or "\0")],
            source=str(path),
            target=target,
            container=container,
            prefix=prefix,
        )
        state = dict(place.tensors)
        for name, tensor in state.items():
            check_finite(name, tensor, str(path))
        # A published file may call the classifier by an older name, "head" for timm's "head.fc".
        weight = next(
            (state[f"{n}.weight"] for c in classifiers[:1] for n in (c, c.partition(".")[0])
             if f"{n}.weight" in state), None,
        )  # fmt: skip
        left = () if weight is not None else tuple(name for name in state if name.startswith(heads or "\0"))
        for name in left:
            del state[name]
        _check_patches(state, own, config, str(path), target)
        changed = tuple(
            f"{name} {tuple(value.shape)} resampled to {tuple(own[name].shape)}"
            for name, value in state.items()
            if name in own and value.shape != own[name].shape and name.endswith(("pos_embed", "table"))
        )
        classes = None if not classifiers else 0 if weight is None else weight.shape[0]
        return cls(target, place, state, left, classes, changed)

    def arguments(self) -> dict[str, Any]:
        """Arguments of `timm.create_model` that load the weights through timm's filter, strictly."""
        overlay: dict[str, Any] = {"state_dict": dict(self.state), "source": "", "label_offset": 0}
        arguments: dict[str, Any] = {"pretrained": True, "pretrained_cfg_overlay": overlay}
        if self.classes is not None:
            # Said to be the config's number too: timm throws the head away, and loads the rest with
            # strict=False, where the two differ.
            arguments["num_classes"] = overlay["num_classes"] = self.classes
        return arguments

    def accounting(self, module: nn.Module) -> Accounting:
        """What became of every key, and what no key says: the number of heads."""
        inside = tuple(f"{self.place.prefix}{name}" for name in self.state)
        dropped = tuple(f"{self.place.prefix}{name}" for name in self.left)
        heads = sorted(
            {m.num_heads for m in module.modules() if isinstance(getattr(m, "num_heads", None), int)}
        )
        notes = [*self.changed]
        if heads:
            counts = ", ".join(map(str, heads))
            notes.append(f"{counts} heads as in '{self.target}': no shape in a file shows their number")
        return Accounting(
            used=inside,
            ignored=(*self.place.outside, *dropped),
            layout=f"'{self.target}' from {self.place.where}",
            note="; ".join(notes),
        )


def _check_patches(
    state: dict[str, Tensor], own: dict[str, Tensor], config: dict[str, Any], source: str, target: str
) -> None:
    """Refuse patches of another size, which timm would resample without a word."""
    first = config.get("first_conv")
    for name in (first,) if isinstance(first, str) else first or ():
        have, want = state.get(f"{name}.weight"), own.get(f"{name}.weight")
        if have is None or want is None or have.dim() != 4 or have.shape[-2:] == want.shape[-2:]:
            continue
        raise WeightsError(
            f"'{source}' has patches of {have.shape[-2]} x {have.shape[-1]} px and '{target}' of"
            f" {want.shape[-2]} x {want.shape[-1]}",
            hint="take the model of timm whose name says the file's patch size",
        )

"""Whether a decision follows shape or texture where they conflict (Park et al., ICLR 2023, Fig. 8a)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from probekit.errors import DoesNotApply, UsageError
from probekit.metric import Row, Traces
from probekit.metrics.depth import image_coordinate
from probekit.metrics.readout import (
    WILSON,
    Readout,
    baseline,
    chosen,
    class_names,
    dataset,
    numbers,
    share,
)
from probekit.metrics.trials import count


@dataclass(frozen=True)
class Decisions:
    """What a classifier said of the conflict images.

    decided:   (rows, images) class numbers
    decidable: the class numbers it could have said
    settings:  further variables of the result
    """

    rows: Sequence[Row]
    decided: np.ndarray
    decidable: np.ndarray
    settings: dict[str, xr.Variable]


class ShapeBias(Readout):
    """100 n_shape / (n_shape + n_texture): of the decisions for either cue, those for the shape, in %.

    A trial is counted where its cues differ and both classes can be decided, that is occur in the train
    split. Pooled over trials (`shape_bias`), by the shape's class (`shape_bias_category`), and as the mean
    over these classes (`shape_bias_mean`). NaN where nothing was decided for either. `shape_bias_either`: the
    share of counted trials decided for either cue.

    classifier: whose decisions: ``probe``, trained on the train split, or ``own``, the model's own, for
                which the probe's options say nothing. Of an ImageNet classifier a category has the mean
                probability of its classes (Geirhos et al.)
    """

    name = "shape_bias"
    requires = frozenset({"train", "cues"})
    units = {
        name: "%" for name in ("shape_bias", "shape_bias_mean", "shape_bias_category", "shape_bias_either")
    }
    figure = "Fig. 8a"

    def __init__(self, classifier: str = "probe", **shared):
        super().__init__({"classifier": classifier}, **shared)
        if classifier not in ("probe", "own"):
            raise UsageError(f"classifier is 'probe' or 'own', not '{classifier}'")
        self.own = classifier == "own"
        if self.own:
            self.source, self.requires, self.conventions = "class_scores", frozenset({"cues"}), {}
        self.conventions |= {
            "definition": "Geirhos et al. 2019, cue conflict; Park et al. 2023, Fig. 8a",
            "trials": "shape and texture differ, both among the classes that can be decided",
            "classifier": "the model's own; mean probability of the classes of a category"
            if self.own
            else "linear probe trained on the train split, deciding among all its classes",
            "zero_by_zero": "NaN",
            "reading": "Above 50: where shape and texture conflict, more decisions follow the shape.",
            "does_not_show": (
                "A poor classifier decides for neither: see shape_bias_either. The bias is that of network "
                "and probe together, and of the images the probe was trained on."
            ),
        }

    def summarize(self, traces: Traces) -> xr.Dataset:
        made = self.decide(traces)
        shape, texture = (np.asarray(traces.cues[cue]) for cue in ("shape", "texture"))
        names = class_names(traces)
        counts = count(made.decided, shape, texture, made.decidable, len(names))
        if not counts.counted.any():
            raise DoesNotApply("no image's shape and texture are two different classes that can be decided")
        by_shape, either = counts.by_shape, counts.by_shape + counts.by_texture
        categories = np.unique(shape[counts.counted])
        trials, rows = int(counts.counted.sum()), len(made.rows)
        per_class = share(
            "shape_bias_category", by_shape[:, categories], either[:, categories], ("layer", "category")
        )
        values = per_class["shape_bias_category"].values
        per_class["shape_bias_category"].attrs |= {
            "long_name": "shape bias by the shape's class",
            "picture": "dots",
            "picture_line": "shape_bias",
        }
        some = (either[:, categories] > 0).sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.where(np.isnan(values), 0.0, values).sum(1) / some
        unknown = np.full(rows, np.nan)
        variables = {
            **share("shape_bias", by_shape.sum(1), either.sum(1)),
            **numbers("shape_bias_mean", mean, unknown, unknown, "%"),
            **per_class,
            **share("shape_bias_either", either.sum(1), trials),
            "chance": baseline(50.0, rows),
            "chance_either": baseline(200 / len(made.decidable), rows),
            "n_shape": xr.Variable(("layer",), by_shape.sum(1)),
            "n_texture": xr.Variable(("layer",), (either - by_shape).sum(1)),
            "decisions": xr.Variable(("layer", "image"), made.decided.astype(np.int32)),
            "shape": xr.Variable(("image",), shape.astype(np.int32)),
            "texture": xr.Variable(("image",), texture.astype(np.int32)),
            "counted": xr.Variable(("image",), counts.counted.astype(np.int8)),
            **made.settings,
        }
        coordinates = {
            "image": image_coordinate(traces),
            "class": xr.Variable(("class",), names),
            "category": xr.Variable(("category",), names[categories]),
        }
        return dataset(
            self,
            traces,
            made.rows,
            variables,
            WILSON.format(over="the trials decided for either cue"),
            coordinates,
            trials=trials,
            same_cue=int((~counts.conflict).sum()),
            undecidable=int((counts.conflict & ~counts.counted).sum()),
            decidable_classes=len(made.decidable),
        )

    def decide(self, traces: Traces) -> Decisions:
        if self.own:
            return _own_decisions(traces)
        heads = self.heads(traces)
        seen = np.bincount(traces.train.labels, minlength=len(class_names(traces)))
        images = {"train_images": xr.Variable(("class",), seen)}
        return Decisions(heads.rows, heads.decide(traces), heads.known, chosen(heads) | images)


def _own_decisions(traces: Traces) -> Decisions:
    """Raises `DoesNotApply` where the model's outputs can't be told to be these classes, or ImageNet's."""
    scores = np.asarray(traces["class_scores"], dtype=np.float64)  # (images, 1, outputs), log-probabilities
    names, outputs = class_names(traces), scores.shape[-1]
    if outputs == len(names):
        numbered = np.arange(outputs)
    elif outputs == 1000 and traces.class_of is not None:
        from timm.data import ImageNetInfo

        found = [traces.class_of(wnid) for wnid in ImageNetInfo("imagenet-1k").label_names()]
        numbered = np.array([-1 if number is None else number for number in found])
    else:
        raise DoesNotApply(
            f"the model returns {outputs} numbers, neither the dataset's {len(names)} classes nor ImageNet's"
        )
    decidable = np.unique(numbered[numbered >= 0])
    if len(decidable) < 2:
        raise DoesNotApply("the model's classes are not those of the dataset")
    share = np.exp(scores)
    means = np.stack([share[..., numbered == number].mean(-1) for number in decidable], -1)
    return Decisions(list(traces.rows), decidable[means.argmax(-1)].T, decidable, {})

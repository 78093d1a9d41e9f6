"""Tokens of a few images in two dimensions, and whether their neighbours agree (Park et al., Fig. E.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import xarray as xr
from torch import Tensor

from probekit.errors import DoesNotApply, UsageError
from probekit.metric import Metric, Row, Traces
from probekit.metrics.choosing import of_classes
from probekit.metrics.depth import depth_curve, image_coordinate, last_layer
from probekit.summaries import layer_coordinates, result_attributes

if TYPE_CHECKING:
    from probekit.layer import Layer

NEIGHBOURS = 10
PERPLEXITY = 20

_PAIRS = 2**22  # distances at once (32 MB)


class TokenEmbedding(Metric):
    """t-SNE of the patch tokens of a few images, and the purity of their neighbourhoods in the features.

    coordinates: (layer, token, 2), all tokens of all images together: scikit-learn's TSNE with
        perplexity 20 (less below 61 tokens: (tokens - 1) / 3), learning_rate auto, init random, 1000
        iterations, random_state the run's seed; no PCA, no standardisation. Or UMAP with its defaults.
    purity: over each token's 10 nearest others (Euclidean, in the features, not in the picture), the share
        that is of the same image (`image_purity`) or of the same class (`token_embedding`); a mean over
        tokens. `class_purity_across` searches among the tokens of *other* images, so an image's own tokens
        can't help.

    method: ``tsne`` or ``umap``, which needs the package umap-learn
    images, classes: so many images of so many classes, spread over the dataset
    layer: the tokens after layer 1 .. L, or 0 for the embedding; -1 the last layer (of the encoder)
    """

    name = "token_embedding"
    needs = frozenset({"tokens"})
    dims: ClassVar[Mapping[str, tuple[str, ...]]] = {"tokens": ("token", "channel")}
    units: ClassVar[Mapping[str, str]] = {"tokens": "1"}
    requires = frozenset({"labels"})
    figure = "Fig. E.2"
    windows = "own"

    def __init__(self, method: str = "tsne", images: int = 18, classes: int = 3, layer: int = -1):
        super().__init__(method=method, images=images, classes=classes, layer=layer)
        if method not in ("tsne", "umap"):
            raise UsageError(f"method is 'tsne' or 'umap', not '{method}'")
        if method == "umap" and find_spec("umap") is None:
            raise UsageError(
                "method 'umap' needs the package 'umap-learn', which isn't installed",
                hint="pip install umap-learn, or method=tsne",
            )
        if not 1 < classes <= images:
            raise UsageError(
                f"{images} images of {classes} classes: at least 2 classes, and an image of each"
            )
        self.method, self.images, self.classes, self.layer = method, images, classes, layer
        self.conventions = {
            "definition": "Park et al. 2023, Fig. E.2; cl-vs-mim, representation_analysis.ipynb (16 images)",
            "prefix": "dropped",
            "picture": "t-SNE: perplexity 20, 1000 iterations, init random, no PCA; seeded (published: not)"
            if method == "tsne"
            else "UMAP, its defaults; seeded",
            "purity": f"{NEIGHBOURS} nearest other tokens, Euclidean, in the features; mean over tokens",
            "token_embedding": "purity of the class; tokens of the same image count",
            "reading": "1: a token's neighbours are of its class. At chance the classes mix.",
            "does_not_show": (
                "The picture has no scale: distances between clusters, and their sizes, mean nothing. A few "
                "images of a few classes; another choice or seed gives another picture."
            ),
        }

    def rows(self, rows: Sequence[Row]) -> Sequence[Row]:
        """The one site asked for; none where the model has no such layer."""
        if self.layer == -1 and rows:
            return [rows[last_layer(rows)]]
        site = "out" if self.layer else "embed"
        return [row for row in rows if row.site == site and row.depth == self.layer][:1]

    def sample(self, count: int, labels: Sequence[int] | None) -> Sequence[int] | None:
        return None if labels is None else of_classes(labels, classes=self.classes, images=self.images)

    def measure(self, layer: Layer) -> Mapping[str, Tensor]:
        """(B, N, C)."""
        return {"tokens": layer.tokens}

    def summarize(self, traces: Traces) -> xr.Dataset:
        """`coordinates` (layer, token, axis2) of all images' tokens, whose image and class are `token_image`
        and `token_class` (token); `token_embedding`, `class_purity_across` and `image_purity` (layer) with
        what they are for tokens without any structure: `chance`, `across_by_chance`, `image_by_chance`.

        Raises `DoesNotApply` for images of a single class.
        """
        labels = np.asarray(traces.labels)
        if len(np.unique(labels)) < 2:
            raise DoesNotApply("the images are of a single class")
        tokens = traces["tokens"][:, 0].astype(np.float64)
        images, count, channels = tokens.shape
        image, label = np.repeat(np.arange(images), count), np.repeat(labels, count)
        flat = tokens.reshape(-1, channels)
        near = nearest(flat, NEIGHBOURS)
        across = nearest(flat, NEIGHBOURS, apart=image)
        numbers = {
            self.name: (label[near] == label[:, None]).mean(),
            "class_purity_across": (label[across] == label[:, None]).mean(),
            "image_purity": (image[near] == image[:, None]).mean(),
        }
        total = images * count
        of_class = count * np.repeat((labels[:, None] == labels).sum(0), count)  # tokens of a token's class
        chance = {
            "chance": ((of_class - 1) / (total - 1)).mean(),
            "across_by_chance": ((of_class - count) / (total - count)).mean(),
            "image_by_chance": (count - 1) / (total - 1),
        }
        attrs = {"units": "1", "role": "mean"}
        variables = {name: xr.Variable(("layer",), [value], attrs) for name, value in numbers.items()}
        # only the main value's may be drawn as a baseline
        roles = {"chance": "baseline"}
        variables |= {
            name: xr.Variable(("layer",), [value], {"units": "1", "role": roles.get(name, "by chance")})
            for name, value in chance.items()
        }
        purity = variables[self.name].values
        variables |= depth_curve(self.name, purity, units="1", long_name="purity of the class")
        picture = {
            "units": "1",
            "role": "picture",
            "long_name": f"{'t-SNE' if self.method == 'tsne' else 'UMAP'} of patch tokens",
            "picture": "points",
            "picture_colour": "token_class",
        }
        points = _two_dimensions(flat, self.method, traces.seed)
        variables["coordinates"] = xr.Variable(("layer", "token", "axis2"), points[None], picture)
        variables["token_image"] = xr.Variable(("token",), image_coordinate(traces).values[image])
        names = traces.classes or [str(number) for number in range(labels.max() + 1)]
        variables["token_class"] = xr.Variable(("token",), np.array([names[number] for number in label]))
        attrs = {**result_attributes(self, traces), "interval": "none"}
        return xr.Dataset(variables, layer_coordinates(traces.rows), attrs)


def nearest(points: np.ndarray, count: int, *, apart: np.ndarray | None = None) -> np.ndarray:
    """Numbers of each point's `count` nearest other points, (n, count) in no order; Euclidean, float64.

    apart: (n,) groups; only points of other groups than one's own are searched
    """
    n = len(points)
    groups = np.arange(n) if apart is None else apart
    count = min(count, n - int(np.unique(groups, return_counts=True)[1].max()))
    centred = points - points.mean(0)  # the differences below lose less
    squares = np.square(centred).sum(1)
    found = np.empty((n, count), dtype=np.int64)
    height = max(1, _PAIRS // n)
    for start in range(0, n, height):
        part = slice(start, start + height)
        distances = squares - 2 * (centred[part] @ centred.T)  # less the row's own square
        distances[groups[part, None] == groups] = np.inf
        found[part] = np.argpartition(distances, count - 1, axis=1)[:, :count]
    return found


def _two_dimensions(points: np.ndarray, method: str, seed: int) -> np.ndarray:
    """(n, C) -> (n, 2)."""
    if method == "umap":
        from umap import UMAP

        return UMAP(random_state=seed).fit_transform(points)
    from sklearn.manifold import TSNE

    perplexity = min(PERPLEXITY, (len(points) - 1) / 3)
    made = TSNE(
        n_components=2,
        perplexity=perplexity,
        learning_rate="auto",
        init="random",
        max_iter=1000,
        random_state=seed,
    )
    return made.fit_transform(points.astype(np.float32))

"""What one plan pass saw: attention calls, additions, who descends from whom, and what stayed hidden."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probekit.watch.contraction import Contraction
from probekit.watch.geometry import Lead, TokenLayout, token_layout
from probekit.watch.positions import Where


@dataclass(frozen=True)
class Node:
    """One call whose result descends from the image. `ancestors` and `calls` are bit sets.

    base: the node of which it is a multiple by parameters alone; mostly its own number
    """

    ancestors: int
    calls: int
    base: int


@dataclass(frozen=True)
class ScoreProduct:
    """The product of queries and keys that an explicit softmax was taken of.

    ordinal: which product; form: in einsum letters; lead: what its shared axes are
    keys_first: its first operand are the keys (scores were made as k q^T)
    """

    ordinal: int
    form: Contraction
    lead: Lead
    keys_first: bool


@dataclass
class Call:
    """One attention call as the plan pass saw it.

    kind:    fused (F.scaled_dot_product_attention), mha (F.multi_head_attention_forward), explicit
    ordinal: which call of its kind in KINDS (explicit: which product, the one with the values)
    node:    its result's
    asks:    node of the queries, or of the scores: what the residual stream must be an ancestor of
    queries, keys: (image, y, x) positions of shape (lead..., Q) and (lead..., K); None where lost
    lead:    what the axes before queries and keys are; None where positions were lost
    allowed: (windows, Q, K) bool, pairs with any probability in two images; None when attention is global
    form:    explicit only: the product of probabilities and values in einsum letters
    map_first: explicit only: the probabilities are the first operand
    scores:  explicit only: the product that made the scores
    softmax: explicit only: ordinal of the softmax and its axes in the order (image, head, query, key), where
             the product's factor isn't row-stochastic itself
    shared:  queries are the same in every window; they are taken to stand where they write to
    run:     which run of a module makes the call
    values:  node of what is weighed; None where it isn't seen
    over_channels: a query's features are of several places
    """

    kind: str
    ordinal: int
    path: str
    number: int
    node: int
    asks: int
    queries: tuple[Tensor, ...] | None
    keys: tuple[Tensor, ...] | None
    lead: Lead | None = None
    allowed: Tensor | None = None
    form: Contraction | None = None
    map_first: bool = True
    map_node: int | None = None
    scores: ScoreProduct | None = None
    softmax: tuple[int, tuple[int, ...]] | None = None
    shared: bool = False
    run: int = 0
    values: int | None = None
    over_channels: bool = False
    note: str = ""


@dataclass(frozen=True)
class Add:
    """An addition of two tensors that both descend from the image.

    path:    the module that adds
    places:  which of its arguments they are
    memory:  addresses of the two operands' and the result's storage
    """

    ordinal: int
    path: str
    places: tuple[int, int]
    nodes: tuple[int, int]
    result: int
    wheres: tuple[Where | None, Where | None]
    where: Where | None
    memory: tuple[int, int, int]
    shape: torch.Size

    @cached_property
    def layouts(self) -> tuple[tuple[TokenLayout, np.ndarray] | None, ...]:
        """Token layouts, with their positions, of the two operands and of the result."""
        return tuple(
            token_layout(w.rows) if w is not None and w.keys is None else None
            for w in (*self.wheres, self.where)
        )


@dataclass
class Record:
    """What one plan pass saw.

    unnormalised: modules that weigh tokens by scores whose rows don't sum to 1
    opaque:       modules with calls that hide attention, and which
    unused:       modules with a softmax over token-to-token scores that no product of probabilities and
                  values was seen to use
    silent:       attention modules in which no attention was seen
    cut:          modules whose result torch's calls don't connect with their input
    lost:         where the trail of positions ended: module -> call
    written:      storage addresses that were written to in place
    subtracted:   nodes of the two operands of every subtraction
    output:       what the forward pass returned
    """

    calls: list[Call] = field(default_factory=list)
    adds: list[Add] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    unnormalised: list[str] = field(default_factory=list)
    opaque: list[tuple[str, str]] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)
    written: set[int] = field(default_factory=set)
    subtracted: list[tuple[int, int]] = field(default_factory=list)
    output: Any = None

"""Which images a metric of few images takes: spread over the dataset, the same in every run."""

from __future__ import annotations

from collections.abc import Sequence


def evenly(count: int, wanted: int) -> list[int]:
    """At most `wanted` positions among `count`: the middles of as many equal parts."""
    wanted = min(wanted, count)
    return [(2 * part + 1) * count // (2 * wanted) for part in range(wanted)]


def of_classes(labels: Sequence[int], *, classes: int, images: int) -> list[int]:
    """Positions, ascending, of at most `images` images in all: as many of each of `classes` classes.

    Classes are spread over those with enough images (over the largest ones where these are too few), images
    over their class.
    """
    members: dict[int, list[int]] = {}
    for position, label in enumerate(labels):
        members.setdefault(int(label), []).append(position)
    each = max(1, images // classes)
    fitting = sorted(label for label, positions in members.items() if len(positions) >= each)
    if len(fitting) < classes:
        fitting = sorted(sorted(members, key=lambda label: (-len(members[label]), label))[:classes])
    chosen = [fitting[place] for place in evenly(len(fitting), classes)]
    return sorted(members[label][place] for label in chosen for place in evenly(len(members[label]), each))

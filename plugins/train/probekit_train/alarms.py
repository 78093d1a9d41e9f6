"""Signs of a training that learns nothing, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping

# Before this share of the schedule a network may still look collapsed because it has hardly begun.
_BEGUN = 0.1


def alarms(row: Mapping[str, float], progress: float, negatives: int) -> dict[str, str]:
    """What is wrong by the latest averages, a sentence by its kind; empty where nothing is.

    row:       the log's columns: feature_std, info_nce
    negatives: keys that each query is compared with, its own included
    """
    if progress < _BEGUN:
        return {}
    found = {}
    if row.get("feature_std", 1.0) < 0.01:
        found["collapse"] = (
            f"the features of different images are nearly one (spread {row['feature_std']:.4f} of at most 1):"
            " the network has collapsed"
        )
    chance = math.log(negatives)
    if row.get("info_nce", 0.5) > 0.98 * chance:
        found["chance"] = (
            f"InfoNCE is {row['info_nce']:.2f}, at chance (log {negatives} = {chance:.2f}): views of one"
            " image are no more alike than of two"
        )
    if row.get("info_nce", 0.5) < 0.01:
        found["floor"] = (
            f"InfoNCE is {row['info_nce']:.4f}, at its floor: something trivial tells the views of an image"
        )
    return found

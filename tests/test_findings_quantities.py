"""What a claim takes from a metric's values."""

from __future__ import annotations

import numpy as np

from probekit.findings.quantities import Rank, reduced


def test_a_rank_relative_to_one_that_is_not_there() -> None:
    """Rows of three ranks and of one: the second has no rank 2 to be relative to."""
    values = np.array([[[5.0, 3.0, 2.0], [4.0, np.nan, np.nan]], [[6.0, 1.0, 0.0], [7.0, np.nan, np.nan]]])
    found, places = reduced(values, Rank(64, less=2), None)
    np.testing.assert_array_equal(found, [[-1, np.nan], [-1, np.nan]])
    assert places == [3, 1]
    found, _ = reduced(values, Rank(64, less=1), None)
    np.testing.assert_array_equal(found, [[-3, 0], [-6, 0]])
    found, _ = reduced(values, Rank(1), None)
    np.testing.assert_array_equal(found, [[5, 4], [6, 7]])

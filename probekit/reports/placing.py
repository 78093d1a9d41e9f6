"""Where labels go: moved apart, shortened, left out."""

from __future__ import annotations

from collections.abc import Sequence


def apart(places: Sequence[float], gap: float, height: float) -> list[float]:
    """Sorted places moved as little as needed to be `gap` apart and within 0 and `height`.

    Neighbours that would overlap become a block around the mean of where they want to be. With more than
    fit, the last ones leave `height`.
    """
    blocks: list[tuple[float, int]] = []  # (sum of where the first one should be, how many)

    def first(block: tuple[float, int]) -> float:
        total, count = block
        return max(0.0, min(total / count, height - (count - 1) * gap))

    for place in places:
        blocks.append((place, 1))
        while len(blocks) > 1 and first(blocks[-2]) + blocks[-2][1] * gap > first(blocks[-1]):
            total, count = blocks.pop()
            before, many = blocks.pop()
            blocks.append((before + total - count * many * gap, many + count))
    return [first(block) + n * gap for block in blocks for n in range(block[1])]


def shortened(text: str, limit: int) -> str:
    """Cut in the middle: both ends of a model's name tell something."""
    if len(text) <= limit or limit < 3:
        return text
    head = (limit - 1) * 3 // 5
    return f"{text[:head]}\u2026{text[len(text) - (limit - 1 - head) :]}"


def fitting(label: str, room: float) -> str:
    """The longest form of a section's label of at most `room` characters, "" where there is none."""
    forms = (label, label.replace("stage ", ""), f"{label[:3]}." if len(label) > 4 else label)
    return next((form for form in forms if len(form) <= room), "")


def tick_room(limits: tuple[float, float], nbins: int) -> float:
    """Width in px, an upper estimate, of the numbers that matplotlib writes beside an upright axis."""
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    formatter = ScalarFormatter(useOffset=False)
    formatter.create_dummy_axis()
    formatter.axis.set_view_interval(*limits)
    return 8.0 * max(map(len, formatter.format_ticks(MaxNLocator(nbins).tick_values(*limits))))

"""Small charts as inline SVG in the page's own colors, readable in light and dark mode."""

from collections.abc import Sequence

from markupsafe import Markup, escape

_WIDTH, _HEIGHT = 640, 180
_LEFT, _BOTTOM, _TOP = 44, 22, 10


def sparkline(counts: Sequence[int], label: str) -> Markup:
    """A histogram without axes, e.g. of confidence from 0 to 1; `label` is its text for screen readers."""
    top, step = max([*counts, 1]), 96 / max(len(counts), 1)
    bars = [
        f'<rect x="{i * step:.1f}" y="{22 - 22 * count / top:.1f}" width="{step - 0.8:.1f}" '
        f'height="{22 * count / top:.1f}"/>'
        for i, count in enumerate(counts)
        if count
    ]
    return Markup(
        f'<svg class="spark" viewBox="0 0 96 24" role="img" aria-label="{escape(label)}">'
        f'<path class="axis" d="M0 23H96"/>{"".join(bars)}</svg>'
    )


def bars(values: Sequence[float], label: str, first: str, last: str, unit: str) -> Markup:
    """Bars with a value axis in `unit`; `first` and `last` label the ends of the other axis."""
    top = _nice(max([*values, 0.0]))
    across, height = _WIDTH - _LEFT, _HEIGHT - _BOTTOM - _TOP
    step = across / max(len(values), 1)
    drawn = [
        f'<rect x="{_LEFT + i * step:.1f}" y="{_TOP + height * (1 - value / top):.1f}" '
        f'width="{max(step - 1.5, 0.5):.1f}" height="{height * value / top:.1f}"/>'
        for i, value in enumerate(values)
        if value > 0
    ]
    ticks = [
        f'<path class="axis" d="M{_LEFT} {_TOP + height * (1 - share):.1f}H{_WIDTH}"/>'
        f'<text x="{_LEFT - 6}" y="{_TOP + 4 + height * (1 - share):.1f}" text-anchor="end">{top * share:g}</text>'
        for share in (0.0, 0.5, 1.0)
    ]
    ends = (
        f'<text x="{_LEFT}" y="{_HEIGHT - 4}">{escape(first)}</text>'
        f'<text x="{_WIDTH}" y="{_HEIGHT - 4}" text-anchor="end">{escape(last)}</text>'
        f'<text x="{(_LEFT + _WIDTH) / 2:.0f}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(unit)}</text>'
    )
    return Markup(
        f'<svg class="bars" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{''.join(ticks)}{''.join(drawn)}{ends}</svg>"
    )


def _nice(value: float) -> float:
    """Round `value` up to 1, 2 or 5 times a power of ten."""
    if value <= 0:
        return 1.0
    power: float = 10.0 ** (len(f"{value:.0f}") - 1) if value >= 1 else 0.01
    while True:
        for factor in (1, 2, 5):
            if factor * power >= value:
                return factor * power
        power *= 10

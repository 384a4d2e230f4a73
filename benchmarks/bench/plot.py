"""Bar charts in SVG."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

WIDTH, LABEL, ROW, TOP = 720, 190, 24, 56
OURS, OTHERS = "#2f6f9f", "#b8b8b8"


def bars(title: str, subtitle: str, rows: Sequence[tuple[str, float, bool]], unit: str) -> str:
    """A chart of ROWS: (label, value, whether it is of ours); a row without a label leaves a gap."""
    height = TOP + ROW * len(rows) + 12
    most = max((value for _, value, _ in rows), default=0) or 1
    scale = (WIDTH - LABEL - 90) / most
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="12" y="22" font-size="16" font-weight="bold">{escape(title)}</text>',
        f'<text x="12" y="42" fill="#555">{escape(subtitle)}</text>',
    ]
    for number, (label, value, is_ours) in enumerate(rows):
        if not label:
            continue
        y, long = TOP + number * ROW, max(value * scale, 1)
        weight = ' font-weight="bold"' if is_ours else ""
        fill = OURS if is_ours else OTHERS
        lines += [
            f'<text x="{LABEL - 8}" y="{y + 16}" text-anchor="end"{weight}>{escape(label)}</text>',
            f'<rect x="{LABEL}" y="{y + 3}" width="{long:.1f}" height="{ROW - 7}" fill="{fill}"/>',
            f'<text x="{LABEL + long + 6:.1f}" y="{y + 16}"{weight}>{value:.3g} {escape(unit)}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])

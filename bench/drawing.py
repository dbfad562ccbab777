"""A small SVG canvas: the same bytes for the same calls, readable on a light and a dark page."""

from __future__ import annotations

from xml.sax.saxutils import escape

INK, SOFT, FAINT, PAPER = "#1f2328", "#59636e", "#d1d9e0", "#ffffff"
FONT = "ui-sans-serif, system-ui, 'Segoe UI', Helvetica, Arial, sans-serif"


class Canvas:
    """Shapes in pixels, y downwards, on a white card of this size.

    The card is part of the picture: hosts show it on pages of any colour.
    """

    def __init__(self, width: float, height: float, title: str) -> None:
        self.size = width, height
        self.title = title
        self.parts: list[str] = []

    def box(
        self, x: float, y: float, width: float, height: float, fill: str = "none",
        stroke: str = "none", line: float = 1, dash: str = "", radius: float = 0,
    ) -> None:  # fmt: skip
        """A rectangle."""
        extra = f' stroke-dasharray="{dash}"' if dash else ""
        extra += f' rx="{_n(radius)}"' if radius else ""
        self.parts.append(
            f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" '
            f'fill="{fill}" stroke="{stroke}" stroke-width="{_n(line)}"{extra}/>'
        )

    def text(
        self, x: float, y: float, text: str, size: float = 13, color: str = INK,
        anchor: str = "middle", bold: bool = False, turned: bool = False,
    ) -> None:  # fmt: skip
        """One line of text; y is its baseline. `turned`: upwards."""
        extra = ' font-weight="600"' if bold else ""
        extra += f' transform="rotate(-90 {_n(x)} {_n(y)})"' if turned else ""
        self.parts.append(
            f'<text x="{_n(x)}" y="{_n(y)}" font-size="{_n(size)}" fill="{color}" '
            f'text-anchor="{anchor}"{extra}>{escape(text)}</text>'
        )

    def path(self, data: str, stroke: str, line: float = 1.5, dash: str = "") -> None:
        """A line along an SVG path, without filling."""
        extra = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(
            f'<path d="{data}" fill="none" stroke="{stroke}" stroke-width="{_n(line)}" '
            f'stroke-linejoin="round"{extra}/>'
        )

    def arrow(self, x: float, y: float, color: str) -> None:
        """The head of an arrow that comes from above and ends at this point."""
        points = f"{_n(x)},{_n(y)} {_n(x - 4)},{_n(y - 7)} {_n(x + 4)},{_n(y - 7)}"
        self.parts.append(f'<polygon points="{points}" fill="{color}"/>')

    def dot(self, x: float, y: float, radius: float, color: str) -> None:
        """A filled circle."""
        self.parts.append(f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{_n(radius)}" fill="{color}"/>')

    def __str__(self) -> str:
        width, height = map(_n, self.size)
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
                f'width="{width}" height="{height}" role="img" font-family="{FONT}">',
                f"<title>{escape(self.title)}</title>",
                f'<rect x="0.5" y="0.5" width="{_n(self.size[0] - 1)}" '
                f'height="{_n(self.size[1] - 1)}" rx="8" fill="{PAPER}" stroke="{FAINT}"/>',
                *self.parts,
                "</svg>\n",
            ]
        )


def _n(value: float) -> str:
    return f"{round(value, 2):g}"

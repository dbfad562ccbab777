"""Lines at the bottom of a terminal that are redrawn in place, below what scrolls by.

Only lines that changed are written, in one piece, so nothing flickers and little goes over a slow
connection. The cursor stays visible: whatever kills the process leaves a usable terminal.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from scmini.console import mute

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

Line = tuple[tuple[str, str], ...]
"""Parts of a line: text, and its style in the words of rich ("" for none)."""
_NO_WRAP, _WRAP = "\x1b[?7l", "\x1b[?7h"
_REST_OF_LINE, _REST_OF_SCREEN = "\x1b[K", "\x1b[J"


@dataclass(frozen=True)
class Glyphs:
    """The signs of a view, all of them one cell wide."""

    done: str = "✓"
    kept: str = "="
    running: str = "▸"
    waiting: str = "·"
    failed: str = "✗"
    stopped: str = "■"
    full: str = "━"
    rest: str = "─"
    cut: str = "…"
    sparks: str = "▁▂▃▄▅▆▇█"


ASCII = Glyphs("+", "=", ">", ".", "!", "o", "#", "-", "~", "_.-:=+*#")
"""For locales without Unicode."""


def is_live(stream: IO[str]) -> bool:
    """Whether this is a terminal that can redraw (not a pipe, not TERM=dumb)."""
    return stream.isatty() and os.environ.get("TERM", "").lower() not in ("", "dumb", "unknown")


class Screen:
    """The lower lines of a terminal.

    Args:
        console: where to draw; it knows the size, the colours (NO_COLOR) and the encoding.
    """

    def __init__(self, console: "Console") -> None:
        self.console = console
        self.glyphs = ASCII if console.options.ascii_only else Glyphs()
        self._shown: list[Line] = []
        self._size = console.size
        self._broken = False

    def draw(self, lines: Sequence[Line]) -> None:
        """Show these lines instead of the last ones, as many as the height allows."""
        with self._while_there():
            self._draw(lines)

    def _draw(self, lines: Sequence[Line]) -> None:
        width, height = self.console.size
        new = [self._fitted(line, width - 1) for line in lines[: max(1, height - 1)]] or [()]
        if self.console.size != self._size:
            self._write(self._erased() + self._whole(new))
        elif new != self._shown:
            self._write(self._changed(new))
        self._shown = new

    def above(self, text: "Text") -> None:
        """Print lines that stay, above those that are redrawn."""
        with self._while_there():
            with self.console.capture() as printed:
                self.console.print(text)
            self._write(self._erased() + self._encodable(printed.get()) + self._whole(self._shown))

    def close(self, *, keep: bool) -> None:
        """Leave the last lines on the screen, or take them away; text goes on below."""
        with self._while_there():
            self._write("" if not self._shown else "\n" if keep else self._erased())
        self._shown = []

    @contextmanager
    def _while_there(self) -> Iterator[None]:
        """The work goes on when the terminal is gone."""
        try:
            yield
        except OSError:
            self._broken = True
            mute(self.console.file)

    def _whole(self, lines: list[Line]) -> str:
        if not lines:
            return ""
        return f"{_NO_WRAP}{_REST_OF_SCREEN}{chr(10).join(map(self._ansi, lines))}\r{_WRAP}"

    def _changed(self, new: list[Line]) -> str:
        """From the last lines to the new ones; the cursor stands on the last line, at its left."""
        if not self._shown:
            return self._whole(new)
        parts = [_NO_WRAP, _up(len(self._shown) - 1)]
        for number, line in enumerate(new):
            same = number < len(self._shown) and self._shown[number] == line
            parts.append("" if same else f"{self._ansi(line)}{_REST_OF_LINE}")
            parts.append("\n" if number < len(new) - 1 else "")
        if len(new) < len(self._shown):
            parts.append(f"\r{self._ansi(new[-1])}{_REST_OF_SCREEN}")
        return "".join([*parts, "\r", _WRAP])

    def _erased(self) -> str:
        """To the first of the last lines, and everything from there on away.

        A terminal that became narrower has broken the longer ones by now.
        """
        width, height = self._size = self.console.size
        widths = [sum(_cells(text) for text, _ in line) for line in self._shown[:-1]]
        rows = sum(max(1, math.ceil(each / width)) for each in widths)
        return f"\r{_up(min(rows, height - 1))}{_REST_OF_SCREEN}"

    def _fitted(self, line: Line, width: int) -> Line:
        """Printable, encodable and not wider than the screen."""
        parts = [(self._encodable(_printable(text)), style) for text, style in line]
        if sum(_cells(text) for text, _ in parts) <= width:
            return tuple(parts)
        kept, room = [], width - 1
        for text, style in parts:
            if _cells(text) > room:
                from rich.cells import set_cell_size

                kept.append((f"{set_cell_size(text, room).rstrip()}{self.glyphs.cut}", style))
                break
            kept.append((text, style))
            room -= _cells(text)
        return tuple(kept)

    def _encodable(self, text: str) -> str:
        encoding = self.console.encoding
        return text.encode(encoding, "replace").decode(encoding)

    def _ansi(self, line: Line) -> str:
        from rich.text import Text

        with self.console.capture() as drawn:
            self.console.print(Text.assemble(*line), end="", soft_wrap=True, highlight=False)
        return drawn.get()

    def _write(self, text: str) -> None:
        if not self._broken:
            self.console.file.write(text)
            self.console.file.flush()


def _up(rows: int) -> str:
    return f"\r\x1b[{rows}A" if rows > 0 else "\r"


def _printable(text: str) -> str:
    """Text that stays on its line, in its order: no controls, line ends or changes of direction."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " for c in text)


def _cells(text: str) -> int:
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)

"""A terminal in a few lines: enough of one to say what a person reads in the end."""

import io
import re

from rich.cells import cell_len
from rich.console import Console

_TOKEN = re.compile(r"\x1b\[\??([0-9]*)(?:;[0-9]+)*([A-Za-z])|(\r)|(\n)|([^\x1b\r\n])", re.DOTALL)


class FakeTerminal:
    """Rows of text that scroll up without end; `height` of them, the last ones, can be written.

    Long lines go on in the next row unless wrapping is off; narrowing breaks rows, as most
    terminals do.
    """

    def __init__(self, width: int, height: int, *, encoding: str = "utf-8", **options: str) -> None:
        self.width, self.height = width, height
        self.rows: list[list[str]] = [[]]
        self.row = self.column = 0
        self.wraps = True
        self.raw = io.BytesIO()
        file = io.TextIOWrapper(self.raw, encoding, "backslashreplace", write_through=True)
        self.console = Console(
            file=file,
            force_terminal=True,
            width=width,
            height=height,
            color_system="standard",
            _environ=options,
        )
        self._read = 0

    @property
    def text(self) -> list[str]:
        """All rows so far, without spaces at their ends and empty rows at the end."""
        self._take()
        rows = ["".join(row).rstrip() for row in self.rows]
        while rows and not rows[-1]:
            rows.pop()
        return rows

    def written(self) -> str:
        """All that was ever written, with its escape sequences."""
        return self.raw.getvalue().decode(self.console.encoding)

    def resize(self, width: int, height: int) -> None:
        """Change the size as terminals do that break the lines anew."""
        self._take()
        rows: list[list[str]] = []
        place = 0
        for number, row in enumerate(self.rows):
            if number == self.row:
                place = len(rows) + self.column // width
            rows += [row[at : at + width] for at in range(0, max(1, len(row)), width)]
        self.rows, self.row, self.column = rows, place, self.column % width
        self.width, self.height = width, height
        self.console.width, self.console.height = width, height

    def _take(self) -> None:
        text = self.written()
        fresh, self._read = text[self._read :], len(text)
        end = 0
        for found in _TOKEN.finditer(fresh):
            assert found.start() == end, f"unknown sequence: {fresh[end : end + 12]!r}"
            end = found.end()
            number, command, back, down, character = found.groups()
            if command:
                self._command(int(number or 0), command)
            elif back:
                self.column = 0
            elif down:
                self._down()
                self.column = 0
            elif character:
                self._put(character)
        assert end == len(fresh)

    def _command(self, number: int, command: str) -> None:
        row = self.rows[self.row]
        if command == "A":
            self.row = max(self.row - max(1, number), len(self.rows) - self.height, 0)
        elif command in "KJ":
            del row[self.column :]
            if command == "J":
                del self.rows[self.row + 1 :]
        elif command in "lh":
            self.wraps = command == "h"
        else:
            assert command == "m", command

    def _down(self) -> None:
        self.row += 1
        if self.row == len(self.rows):
            self.rows.append([])

    def _put(self, character: str) -> None:
        cells = cell_len(character)
        if self.column + cells > self.width:
            assert self.wraps, "a line of the view is too wide"
            self._down()
            self.column = 0
        row = self.rows[self.row]
        row += [" "] * (self.column - len(row))
        row[self.column : self.column + cells] = [character, ""][:cells] if cells else []
        self.column += cells

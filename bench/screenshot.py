"""The live view of a run as a picture, taken in the middle of a training:

    python bench/screenshot.py docs/pictures/screen.svg -c demo -o runs/demo

runs what is not finished, as `scmini run all` would, and draws what a terminal shows then.
"""

import argparse
import io
import re
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from scmini import pipeline
from scmini.config_file import load_config
from scmini.view.live import RunDisplay

WIDTH, HEIGHT = 92, 30


def main(words: list[str]) -> None:
    """Run, and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path)
    parser.add_argument("-c", "--config", default="demo")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--task", default="dpo self-contrast-4", help="taken while this one runs")
    parser.add_argument("--share", type=float, default=0.6, help="when so much of it is done")
    arguments = parser.parse_args(words)

    class Photographed(RunDisplay):
        """Takes one picture of itself."""

        taken = False

        def __init__(self, title: str, run_dir: Path, tasks: Any) -> None:
            console = Console(file=io.StringIO(), force_terminal=True, width=WIDTH, height=HEIGHT)
            super().__init__(title, Path("runs") / run_dir.name, tasks, live=True, console=console)

        def tick(self, pid: int | None) -> None:
            super().tick(pid)
            now = self.running()
            if self.taken or now is None or now.label != arguments.task or not now.total:
                return
            if now.done / now.total >= arguments.share:
                self.taken = True
                draw(self, arguments.picture)

    pipeline.RunDisplay = Photographed  # type: ignore[misc]
    config = load_config(arguments.config, arguments.overrides)
    pipeline.run(config, arguments.output)


def draw(display: RunDisplay, picture: Path) -> None:
    """Write the view as an SVG that fetches nothing."""
    paper = Console(file=io.StringIO(), force_terminal=True, width=WIDTH, record=True)
    for line in display.view():
        paper.print(Text.assemble(*line), no_wrap=True, overflow="ellipsis")
    drawn = paper.export_svg(title="scmini run all")
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_text(re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

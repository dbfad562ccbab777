"""Documents with parts that programs write: exchanging a part, writing, saying what is stale."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

Markers = tuple[str, str]


def replaced(document: str, markers: Markers, text: str, name: str = "the document") -> str:
    """The document with what stands between its two markers exchanged.

    Raises:
        SystemExit: it has no such block, or more than one; `name` says which document.
    """
    begin, end = markers
    if document.count(begin) != 1 or document.count(end) != 1:
        raise SystemExit(f"{name} has no block {begin} ... {end}")
    before, _, rest = document.partition(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}"


def parser(description: str | None) -> argparse.ArgumentParser:
    """A command line with --check."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    made.add_argument("--check", action="store_true", help="only say what is stale")
    return made


def finish(
    fresh: Mapping[Path, str], program: str, *, check: bool, must_exist: Iterable[Path] = ()
) -> int:
    """Write the texts to their paths; with `check`, only name those that say something else.

    Args:
        must_exist: files that are named, and not compared.

    Returns:
        The exit code: 1 where `check` found something stale.
    """
    if not check:
        for path, text in fresh.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return 0
    stale = [p for p, text in fresh.items() if not p.exists() or p.read_text("utf-8") != text]
    stale += [path for path in must_exist if not path.exists()]
    for path in stale:
        print(f"{path} is stale: run python bench/{program}", file=sys.stderr)
    return int(bool(stale))

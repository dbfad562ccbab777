"""What the fuzzers share: strategies, and the property that each of them checks.

A reader of files from outside gives a right result, or raises a `ScminiError` whose message is
short, printable and names the file; nothing else, and in less than `SECONDS`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scmini.errors import ScminiError

SECONDS = 5
MOST_LINES, MOST_CHARACTERS = 8, 2000


@dataclass(frozen=True)
class Fuzzer:
    """One kind of input.

    Attributes:
        values: what is tried.
        check: reads a value in a folder of its own, through `survives`.
    """

    name: str
    values: st.SearchStrategy[Any]
    check: Callable[[Any, Path], None]
    share: float = 1.0
    """Of the number of examples that is asked for; below 1 where one is slow."""


def survives(
    action: Callable[[], object], named: str, most_lines: int = MOST_LINES
) -> ScminiError | None:
    """Do it; the error that a person would read, if there was one."""
    error = _error_of(action)
    if error is not None:
        lines = str(error).split("\n")
        assert named in lines[0], f"{lines[0]!r} does not name {named}"
        assert all(line.isprintable() for line in lines), lines
        assert len(lines) <= most_lines, lines
        assert len(str(error)) <= MOST_CHARACTERS * most_lines / MOST_LINES, lines
    return error


def _error_of(action: Callable[[], object]) -> ScminiError | None:
    try:
        action()
    except ScminiError as error:
        return error
    return None


def fuzz(fuzzer: Fuzzer, examples: int, folder: Path, *, same_every_time: bool) -> int:
    """Try that many values; how many there really were."""
    tried = 0

    @settings(
        max_examples=max(1, round(examples * fuzzer.share)),
        deadline=timedelta(seconds=SECONDS),
        suppress_health_check=list(HealthCheck),
        derandomize=same_every_time,
        database=None,
    )
    @given(fuzzer.values)
    def once(value: Any) -> None:
        nonlocal tried
        tried += 1
        fuzzer.check(value, folder)

    once()
    return tried


odd_text = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        [
            *(
                "",
                " ",
                "\0",
                "\x1b[31mred\x1b[0m",
                "\x1b]0;title\x07",
                "\u202eabc",
                "\ufeff",
                "\x85",
            ),
            *("\u2028", "\ud800", "a" * 3000, "../../etc", "/dev/null", "~", "1e999", "NaN", "-0"),
            *(
                "\n\nHuman: a\n\nAssistant: b",
                "\n\nHuman: ",
                "Assistant:",
                "<s>",
                "hf_" + "a1" * 15,
            ),
        ]
    ),
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**30, -(10**30), 10**400, 2**31, 0, -1]),
    st.floats(),
    odd_text,
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(odd_text, inner, max_size=4)
    ),
    max_leaves=12,
)


@st.composite
def mutated(draw: st.DrawFn, row: Any) -> Any:
    """A copy of a JSON value with a few places changed, taken out or doubled."""
    made = json.loads(json.dumps(row))
    for _ in range(draw(st.integers(0, 3))):
        made = _changed(draw, made)
    return made


def _changed(draw: st.DrawFn, value: Any) -> Any:
    if isinstance(value, (dict, list)) and value and draw(st.integers(0, 3)):
        keys = sorted(value) if isinstance(value, dict) else range(len(value))
        key = draw(st.sampled_from(list(keys)))
        what = draw(st.sampled_from(["inside", "inside", "inside", "gone", "twice"]))
        if what == "gone":
            del value[key]
        elif what == "twice" and isinstance(value, list):
            value.insert(key, value[key])
        elif what == "twice":
            value[draw(odd_text)] = value[key]
        else:
            value[key] = _changed(draw, value[key])
        return value
    return draw(values)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes with a few of them changed, cut out, doubled or put in."""
    made = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(made) - 1)))
        size = draw(st.sampled_from([1, 1, 2, 8, 40]))
        kind = draw(st.sampled_from(["change", "change", "cut", "insert", "double", "end"]))
        if kind == "change":
            made[at : at + size] = draw(st.binary(min_size=size, max_size=size))
        elif kind == "cut":
            del made[at : at + size]
        elif kind == "insert":
            made[at:at] = draw(st.binary(min_size=1, max_size=size))
        elif kind == "double":
            made[at:at] = made[at : at + size]
        else:
            del made[at:]
    return bytes(made)


def lines(rows: list[Any]) -> bytes:
    """JSON lines, as somebody else's program may write them."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)

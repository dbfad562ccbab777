"""Foreign text inside messages: short, on one line, nothing that could steer a terminal, no key.

Names, values and errors of libraries come from files that anybody may have written. `plain` is for
text, `quoted` for values of any kind, `redact` for whatever is going to be shown or kept.
"""

import os
import re
import reprlib
from typing import Any

_KEYED = re.compile(r"(?:^|_)(?:TOKEN|KEY|KEYS|SECRET|PASSWORD|PASSWD)$")
_SHORTEST_SECRET = 12
"""Shorter values are placeholders or words (EMPTY, postgres), which occur in any text."""
_SECRETS = re.compile(
    r"(?P<lead>://)[^/?#\s@]+(?=@)"  # name and password, or a token, in an address
    r"|(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{20,}|gh[oprsu]_[A-Za-z0-9]{20,}|AIza[\w-]{30,}"
    r"|sk-(?=[\w-]*\d)[\w-]{20,})"
    r"|(?P<field>[?&](?:[\w.-]*[_-])?(?:key|token|secret|password|sig|signature)=)[^&#\s]+",
    re.IGNORECASE | re.ASCII,
)
"""What hub and judges call a key, and where an address may carry one."""


def plain(text: object, most: int = 300) -> str:
    """Text on one line of at most `most` characters, with `\\x1b` and its like written out.

    What `str.isprintable` denies goes: control characters, lone surrogates, and those that turn
    the direction of writing. An object that is no text gives what `str` makes of it.
    """
    found = " ".join(str(text)[: 4 * most].split())
    written = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in found)
    return written if len(written) <= most else written[: most - 3] + "..."


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxdict = 3, 4, 4
        self.maxstring = self.maxlong = self.maxother = 60

    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to write numbers of thousands of digits."""
        return super().repr_int(x, level) if x.bit_length() < 4096 else "a number of many digits"


_short = _Short()


def quoted(value: Any, most: int = 80) -> str:
    """`repr` of a value, cut: also where it is large, nested deeply, or many digits long."""
    return plain(_short.repr(value), most)


def redact(text: str) -> str:
    """Text with *** for every key: known by its look, or the value of a variable that holds one."""
    for secret in _known():
        text = text.replace(secret, "***")
    return _SECRETS.sub(lambda m: f"{m['lead'] or m['field'] or ''}***", text)


def holds_secret(text: str) -> bool:
    """Whether `redact` would change the text."""
    return redact(text) != text


def _known() -> list[str]:
    """Values of environment variables that are called like keys, the longest first."""
    values = {
        value.strip()
        for name, value in os.environ.items()
        if _KEYED.search(name.upper()) and not value.startswith(("/", "~", "."))  # a file's name
    }
    return sorted((v for v in values if len(v) >= _SHORTEST_SECRET), key=len, reverse=True)

"""YAML as configurations use it, read in bounded time and memory.

PyYAML follows YAML 1.1, where `5e-7` is text, `no` is False and `1:30` is ninety: `_Loader` reads
the core schema of YAML 1.2 instead, and refuses what a configuration never needs: duplicate keys,
aliases (so no billion laughs), tags (`!!python/object`), more than `MAX_NODES` values.
"""

import re
import typing
from typing import Any

import yaml

from scmini.errors import ConfigError
from scmini.quoting import plain, quoted, redact

MAX_NODES = 50_000
"""Keys and values of a file; a configuration with a few thousand data files has fewer."""
_TAG = "tag:yaml.org,2002:"
_FLOAT = re.compile(
    r"[-+]?(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?$|[-+]?\d+[eE][-+]?\d+$|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars; no duplicate key, no alias, no tag."""

    yaml_implicit_resolvers: typing.ClassVar[dict[str, Any]] = {}  # type: ignore[misc]
    nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise yaml.YAMLError(
                f"{_where(event.start_mark)}: more than {MAX_NODES:,} values; this cannot be a "
                "configuration"
            )
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(f"{_where(event.start_mark)}: aliases (*name) are not allowed")
        if event.tag is not None:
            tag = event.tag.replace(_TAG, "!!", 1)
            raise yaml.YAMLError(
                f"{_where(event.start_mark)}: tags ({quoted(tag)}) are not allowed; "
                "write the value alone"
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name is None or key.tag != _TAG + "str":
                raise yaml.YAMLError(
                    f"{_where(key.start_mark)}: a key must be text, got {quoted(name)}"
                )
            if name in seen:
                raise yaml.YAMLError(f"{_where(key.start_mark)}: key {quoted(name)} is given twice")
            seen.add(name)
        return super().construct_mapping(node, deep)


def _number(loader: _Loader, node: yaml.ScalarNode) -> int:
    try:
        return int(loader.construct_scalar(node))
    except ValueError:  # Python reads no more than a few thousand digits
        raise yaml.YAMLError(f"{_where(node.start_mark)}: a number of too many digits") from None


for _kind, _pattern, _first in (
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    ("null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("int", re.compile(r"[-+]?\d+$"), "-+0123456789"),
    ("float", _FLOAT, "-+0123456789."),
):
    _Loader.add_implicit_resolver(_TAG + _kind, _pattern, list(_first))
_Loader.add_constructor(_TAG + "int", _number)


class _Dumper(yaml.SafeDumper):
    """Quotes whatever this loader or a YAML 1.1 loader would not read as text."""


_Dumper.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+0123456789."))


def parse(content: bytes | str, source: str) -> Any:
    """The value that a YAML text describes: mappings, lists, texts, numbers, bool, None.

    Raises:
        ConfigError: no such text; names `source` and, where known, the line.
    """
    try:
        return yaml.load(content, Loader=_Loader)
    except RecursionError:
        raise ConfigError(f"{source}: nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = redact(plain(error.problem))
        raise ConfigError(f"{source}, {_where(mark) if mark else 'YAML'}: {said}") from None
    except yaml.reader.ReaderError as error:
        raise ConfigError(f"{source}: {_unreadable(error)}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{source}: {redact(plain(error))}") from None


def dump(value: Any) -> str:
    """YAML text that `parse` reads as the same value, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _where(mark: Any) -> str:
    return f"line {mark.line + 1}"


def _unreadable(error: yaml.reader.ReaderError) -> str:
    if error.encoding != "unicode":
        return f"not UTF-8 at byte {error.position}; save it as UTF-8"
    return (
        f"a character that YAML does not allow (U+{error.character:04X}) at position "
        f"{error.position}; is it saved as UTF-8?"
    )

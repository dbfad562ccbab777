"""Reads a configuration from YAML and `--set`, and writes a resolved one back.

Every mistake is found before anything is said. What a file says comes back in messages cut and
escaped, and never if it looks like a key.
"""

import difflib
import math
import re
import stat
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from scmini import console
from scmini.config import Config
from scmini.errors import ConfigError
from scmini.quoting import holds_secret, plain, quoted, redact
from scmini.sections import Section
from scmini.yaml_text import dump, parse

MAX_BYTES = 1 << 20
_MOST_SHOWN = 20
"""Mistakes that are told one by one."""
_LONGEST_LINE = 400
_MOST_EXTENDED = 20
_DEEPEST_NAME = 10
_UNWRITABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""What would steer a terminal, or cannot be in a file's name or in UTF-8."""
_NO_EFFECT = re.compile(r"(?P<key>[\w.]+) has no effect")
_KEPT_OUT = (
    "this looks like a key or password, which would be copied into run folders and reports: take "
    "it out, and put it into an environment variable (HF_TOKEN; for a judge the one that "
    "judge.api_key_variable names)"
)


def load_config(name_or_path: str | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a shipped name or a file, with `--set` overrides applied.

    Args:
        name_or_path: `demo` and the like, or a YAML file; None for `demo`.
        overrides: texts `section.key=value`, the value written as in YAML.

    Raises:
        ConfigError: with one line for every mistake, the dotted name first.
    """
    path = find_config(name_or_path or "demo")
    return _checked(_read(path), str(path), overrides)


def parse_config(content: bytes | str, source: str, overrides: Sequence[str] = ()) -> Config:
    """Like `load_config`, from YAML text that extends no other; `source` names it in messages."""
    return _checked(_table(content, source), source, overrides)


def _read(path: Path, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The keys of a file over those of the file that it `extends`."""
    try:
        with open(path, "rb") as handle:
            content = handle.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name a file that can be read") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path}: larger than 1 MiB; this cannot be a configuration")
    table = _table(content, str(path))
    name = table.pop("extends", None)
    if name is None:
        return table
    if not isinstance(name, str):
        raise ConfigError(f"{path}: extends: expected a shipped name or a file, got {quoted(name)}")
    try:
        beside = path.parent / name
        base = beside if _is_file(beside) else find_config(name)
    except ConfigError as error:
        raise ConfigError(f"{path}: extends: {error}") from None
    chain = (*extended_by, path.resolve())
    if base.resolve() in chain:
        raise ConfigError(f"{path}: extends: {plain(name)} extends this file in turn")
    if len(chain) > _MOST_EXTENDED:
        raise ConfigError(f"{path}: extends: more than {_MOST_EXTENDED} files, one on another")
    return _laid_over(_read(base, chain), table)


def _laid_over(base: dict[str, Any], table: dict[str, Any]) -> dict[str, Any]:
    """Sections key by key; anything else is replaced."""
    for key, value in table.items():
        inner = base.get(key)
        if isinstance(inner, dict) and isinstance(value, dict):
            value = _laid_over(inner, value)
        base[key] = value
    return base


def _table(content: bytes | str, source: str) -> dict[str, Any]:
    table = parse(content, source)
    if table is None:
        table = {}
    if not isinstance(table, dict):
        raise ConfigError(
            f"{source}: expected sections (keys and values), got {type(table).__name__}"
        )
    return table


def _checked(table: dict[str, Any], source: str, overrides: Sequence[str]) -> Config:
    """The configuration that a table with `--set` overrides describes."""
    problems: list[str] = []
    file_is_right = bool(overrides) and _is_right(table)
    overridden = {name for item in overrides if (name := _override(table, item, problems))}
    while True:
        problems += _unfit_values(table)
        try:
            config = Config.model_validate(table, strict=True)
        except ValidationError as error:
            if file_is_right and _drop_ineffective(table, overridden, error):
                continue
            problems += _sentences(error)
        break
    if problems:
        at_fault = "--set" if file_is_right else source
        raise ConfigError(_complaint(at_fault, list(dict.fromkeys(problems))))
    return config


def _complaint(source: str, problems: Sequence[str]) -> str:
    """All that is wrong, one line for each of the first mistakes."""
    lines = [plain(redact(problem), _LONGEST_LINE) for problem in problems[:_MOST_SHOWN]]
    if len(problems) > _MOST_SHOWN:
        lines.append(f"... and {len(problems) - _MOST_SHOWN} more")
    return "\n  ".join([f"{source}: {len(problems)} to fix", *lines])


def config_to_yaml(config: Config) -> str:
    """Every key with its resolved value, in an order people read; loads back to an equal `Config`.

    A key that may not be written, because it has no effect beside the others, is left out.
    """
    return dump(_written(config))


def shipped_configs() -> dict[str, Path]:
    """Name -> file of the configurations that come with scmini.

    An installed wheel has them beside the package as `scmini_configs/`; a checkout, or an editable
    installation of one, as `configs/`.
    """
    beside = Path(__file__).resolve().parent.parent
    folder = beside / "scmini_configs"
    if not folder.is_dir():
        folder = beside / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config(name_or_path: str) -> Path:
    """The file behind `-c`: a shipped name, else a path."""
    shipped = shipped_configs()
    if name_or_path in shipped:
        return shipped[name_or_path]
    path, shown = Path(name_or_path), redact(plain(name_or_path))
    if _is_file(path):
        return path
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise ConfigError(
            f"{shown}: {_what_it_is(path)}; name a file, or one of {_shipped_names()}"
        )
    near = difflib.get_close_matches(shown, shipped, n=1)
    hint = f"did you mean {near[0]}?" if near else f"shipped are: {_shipped_names()}"
    raise ConfigError(f"{shown}: neither a shipped configuration nor a file; {hint}")


def _shipped_names() -> str:
    return ", ".join(shipped_configs()) or "none"


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name of a thousand letters, a folder that may not be read
        return False


def _what_it_is(path: Path) -> str:
    """What stands in the place of a file."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "no such file"
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or "no name of a file"
    return "is a folder" if stat.S_ISDIR(mode) else "no ordinary file"


def _override(table: dict[str, Any], item: str, problems: list[str]) -> str | None:
    """Apply one `--set`; returns its dotted name."""
    name, sign, text = item.partition("=")
    name = name.strip()
    if not sign or not all(name.split(".")):
        problems.append(f"--set {item}: write it as section.key=value")
        return None
    if name.count(".") > _DEEPEST_NAME:
        problems.append(f"{plain(name, 80)}: no such key")
        return None
    try:
        value = parse(text, f"--set {plain(name, 80)}")
    except ConfigError as error:
        problems.append(str(error))
        return None
    *sections, key = name.split(".")
    for section in sections:
        inner = table.get(section)
        if inner is None:
            inner = table[section] = {}
        if not isinstance(inner, dict):
            problems.append(f"{name}: no such key; {section} is not a section")
            return None
        table = inner
    table[key] = value
    return name


def _is_right(table: dict[str, Any]) -> bool:
    try:
        Config.model_validate(table, strict=True)
    except ValidationError:
        return False
    return True


def _drop_ineffective(table: dict[str, Any], overridden: set[str], error: ValidationError) -> bool:
    """Take a key out of the file's table that has no effect beside an override. True if one was."""
    for detail in error.errors():
        found = _NO_EFFECT.match(str(detail.get("ctx", {}).get("error", "")))
        if not found:
            continue
        *sections, key = [str(part) for part in detail["loc"]] + found["key"].split(".")
        inner: Any = table
        for section in sections:
            inner = inner.get(section, {})
        name = ".".join([*sections, key])
        if key in inner and name not in overridden:
            del inner[key]
            console.warn(f"left out {name} of the file: {detail['ctx']['error']}")
            return True
    return False


def _unfit_values(value: Any, name: str = "") -> Iterator[str]:
    """Values that no key may have: a number that is none, a key or password, control characters."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if holds_secret(key):
                yield f"{name}.***: {_KEPT_OUT}"
            yield from _unfit_values(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _unfit_values(inner, name)
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{name}: must be a finite number, got {value}"
    elif isinstance(value, str):
        if _UNWRITABLE.search(value):
            yield f"{name}: holds a character that no name has, got {quoted(value)}"
        if holds_secret(value):
            yield f"{name}: {_KEPT_OUT}"


def _sentences(error: ValidationError) -> Iterator[str]:
    """One sentence for each wrong key."""
    said: set[str] = set()
    for detail in error.errors(include_url=False):
        name, annotation = _field_at(detail["loc"])
        if name in said and detail["type"] != "value_error":
            continue  # the alternatives of one union
        said.add(name)
        if detail["type"] == "extra_forbidden" and len(said) > _MOST_SHOWN:
            text = "no such key"  # looking for the nearest takes time, and nobody sees it
        else:
            text = _sentence(detail, name, annotation)
        yield f"{name}: {text}" if name else text


def _sentence(detail: ErrorDetails, name: str, annotation: Any) -> str:
    kind, context, got = detail["type"], detail.get("ctx", {}), detail["input"]
    if kind == "extra_forbidden":
        return f"no such key; {_nearest(name)}"
    if kind == "value_error":
        return str(context["error"])
    bounds = {
        "greater_than": ("gt", "above"),
        "greater_than_equal": ("ge", "at least"),
        "less_than": ("lt", "below"),
        "less_than_equal": ("le", "at most"),
    }
    if kind in bounds:
        key, word = bounds[kind]
        return f"must be {word} {context[key]}, got {quoted(got)}"
    if kind == "string_pattern_mismatch":
        return f"must match {context['pattern']}, got {quoted(got)}"
    return f"expected {_described(annotation)}, got {quoted(got)}"


def _field_at(loc: tuple[int | str, ...]) -> tuple[str, Any]:
    """Dotted name and annotation of the field that an error is about.

    pydantic appends list positions and the tried alternatives of unions to a location; these go.
    """
    names: list[str] = []
    model: Any = Config
    for part in loc:
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            break
        names.append(str(part))
        field = model.model_fields.get(str(part))
        if field is None:
            return ".".join(names), None
        model = field.annotation
    return ".".join(names), model


def _described(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_described(arg) for arg in args)
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin is list:
        return f"a list of {_described(args[0])}"
    if origin is not None:
        return _described(args[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a section (keys and values)"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words.get(annotation, "null")


def _names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of all keys and sections."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _names(field.annotation, f"{prefix}{name}.")


def _nearest(name: str) -> str:
    """What was probably meant: a key beside it, else the same or a similar key elsewhere."""
    known = list(_names(Config))
    section, _, key = name.rpartition(".")
    prefix = f"{section}." if section else ""
    beside = [
        n[len(prefix) :] for n in known if n.startswith(prefix) and "." not in n[len(prefix) :]
    ]
    if not section:
        beside.append("extends")
    near = difflib.get_close_matches(key, beside, n=1) or [n for n in beside if n.startswith(key)]
    if near:
        return f"did you mean {prefix}{near[0]}?"
    leaves = {n.rpartition(".")[2] for n in known}
    for leaf in difflib.get_close_matches(key, leaves, n=1, cutoff=0.75):
        elsewhere = [n for n in known if n.rpartition(".")[2] == leaf]
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"keys here: {', '.join(beside)}"


def _written(section: Section) -> dict[str, Any]:
    given = {
        name: getattr(section, name)
        for name in section.model_fields_set
        if not isinstance(getattr(section, name), Section)
    }
    result: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            result[name] = _written(value)
        elif name in given or isinstance(section, Config) or _may_be_written(section, given, name):
            result[name] = value
    return result


def _may_be_written(section: Section, given: Mapping[str, Any], name: str) -> bool:
    try:
        type(section).model_validate({**given, name: getattr(section, name)}, strict=True)
    except ValidationError:
        return False
    return True

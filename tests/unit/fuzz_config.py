"""Fuzzers of the configuration: any text, real files changed, any value under a real key."""

from pathlib import Path
from typing import Any

import yaml
from fuzz_helpers import Fuzzer, damaged, odd_text, survives, values
from hypothesis import strategies as st
from pydantic import BaseModel

from scmini.config import Config
from scmini.config_file import config_to_yaml, load_config, parse_config, shipped_configs

LINES = 22
"""One line for each of the first twenty mistakes."""


def _names(model: type[BaseModel], prefix: str = "") -> list[str]:
    found = []
    for name, field in model.model_fields.items():
        found.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += _names(field.annotation, f"{prefix}{name}.")
    return found


KEYS = _names(Config)
_TOKENS = st.sampled_from(
    [
        *("seed", "dpo", "beta", "methods", "data", "path", "judge", "extends", "name", "?", "|"),
        *(": ", ":", "\n", "\n  ", "\n    ", "- ", "{", "}", "[", "]", ",", "&a ", "*a", "<<: "),
        *("!!python/object:os.system ", "!!binary ", "!x ", "'", '"', '"\\e"', "#", "---", "..."),
        *(
            "1",
            "5e-7",
            "0x10",
            "1:30",
            ".nan",
            ".inf",
            "~",
            "null",
            "true",
            "9" * 5000,
            "%YAML 9.9",
        ),
        *("\t", "\x1b[31m", "é", "\U0001f600", ">\n", "@", "`", "\0", "\ufeff", "\x85"),
    ]
)
texts = st.one_of(
    st.lists(_TOKENS, max_size=25).map("".join), st.text(max_size=60), st.binary(max_size=60)
)
_shipped = [path.read_bytes() for path in shipped_configs().values()]


def check_text(content: bytes | str, folder: Path) -> None:
    survives(lambda: _right(parse_config(content, "some.yaml")), "some.yaml", LINES)


def check_file(content: bytes, folder: Path) -> None:
    path = folder / "config.yaml"
    path.write_bytes(content)
    survives(lambda: _right(load_config(str(path))), "config", LINES)


def check_values(given: dict[str, Any], folder: Path) -> None:
    table: dict[str, Any] = {}
    for name, value in given.items():
        *sections, key = name.split(".")
        inner = table
        for section in sections:
            inner = inner.setdefault(section, {})
            if not isinstance(inner, dict):
                return
        inner[key] = value
    content = yaml.safe_dump(table, allow_unicode=True)
    survives(lambda: _right(parse_config(content, "some.yaml")), "some.yaml", LINES)


def check_overrides(overrides: list[str], folder: Path) -> None:
    survives(lambda: _right(load_config("demo", overrides)), "--set", LINES)


def check_extends(name: str, folder: Path) -> None:
    path = folder / "child.yaml"
    path.write_text(f"extends: {yaml.safe_dump(name)}", encoding="utf-8", errors="replace")
    survives(lambda: _right(load_config(str(path))), "child.yaml", LINES)


def _right(config: Config) -> None:
    assert isinstance(config, Config)
    assert parse_config(config_to_yaml(config), "again") == config


keys = st.sampled_from(KEYS)
overrides = st.lists(
    st.one_of(
        odd_text,
        st.builds("{}={}".format, keys, odd_text),
        st.builds("{}={}".format, keys, values.map(str)),
        st.builds("{}.{}={}".format, keys, keys, st.integers()),
    ),
    min_size=1,
    max_size=3,
)
FUZZERS = [
    Fuzzer("YAML text", texts, check_text),
    Fuzzer(
        "shipped configurations, damaged", st.sampled_from(_shipped).flatmap(damaged), check_file
    ),
    Fuzzer("values under real keys", st.dictionaries(keys, values, max_size=4), check_values),
    Fuzzer("--set", overrides, check_overrides, share=0.5),
    Fuzzer("extends", odd_text, check_extends, share=0.5),
]

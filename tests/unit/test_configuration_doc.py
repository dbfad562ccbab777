"""docs/configuration.md says what the models of the configuration say."""

import re
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import configuration

from scmini.config import Config
from scmini.config_file import config_to_yaml, load_config
from scmini.sections import recipe_section

KEYS = list(configuration.keys())
TEXT = configuration.DOCUMENT.read_text("utf-8")


def _has_text(key: configuration.Key) -> bool:
    return any(configuration.texts(model).get(key.last) for model in key.model.__mro__)


def test_the_document_is_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    assert configuration.rewritten(TEXT) == TEXT, "python bench/configuration.py"
    monkeypatch.setattr(configuration, "tables", lambda: "other tables")
    assert configuration.main(["--check"]) == 1


def test_every_key_appears_once() -> None:
    rows = Counter(re.findall(r"^\| `([\w.]+)` \|", TEXT, flags=re.MULTILINE))
    assert rows == Counter(key.name for key in KEYS)


def test_the_keys_are_those_that_config_prints() -> None:
    def leaves(value: object, prefix: str = "") -> set[str]:
        if not isinstance(value, dict):
            return {prefix}
        return {name for k, v in value.items() for name in leaves(v, f"{prefix}.{k}".strip("."))}

    assert leaves(Config().model_dump()) == {key.name for key in KEYS}
    assert "tokens_per_microbatch" in config_to_yaml(load_config(None))


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
def test_every_key_has_a_meaning(key: configuration.Key) -> None:
    assert len(key.meaning) > 5, f"{key.name}: write a text below the field"
    assert "\n" not in key.row
    assert len(re.findall(r"(?<!\\)\|", key.row)) == 5


def test_no_meaning_is_left_over() -> None:
    """A text below the field hides one of `COMMON`; a key that is gone needs none."""
    needed = {key.last for key in KEYS if not _has_text(key) and key.name not in configuration.OWN}
    assert needed == set(configuration.COMMON)
    assert set(configuration.OWN) <= {key.name for key in KEYS}


def test_the_marked_keys_are_those_outside_recipes() -> None:
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and configuration.is_section(field.annotation):
            counted = recipe_section(getattr(Config(), name))
            for key in configuration.keys(field.annotation, f"{name}."):
                marked = f"| `{key.name}` |" in TEXT and key.row.rpartition(" | ")[2][0] == "("
                if key.name.count(".") == 1:
                    assert marked == (key.last not in counted), key.name


def test_values_limits_and_defaults_are_said() -> None:
    rows = {key.name: key.row for key in KEYS}
    assert "| `float32`, `bfloat16`, `float16` | `bfloat16` |" in rows["model.dtype"]
    assert "| whole number or empty, at least 1 | empty |" in rows["data.num_train"]
    assert "| number, at least 0, below 0.5 | `0` |" in rows["dpo.label_smoothing"]
    assert "`data`" in rows["sample.engine"].split("|")[2]
    assert "`data`" not in rows["generate.engine"]
    assert "| list of `mt-bench`, `alpaca-eval`," in rows["benchmark.tasks"]


def test_a_document_without_a_block() -> None:
    with pytest.raises(SystemExit, match="has no block"):
        configuration.rewritten("nothing")

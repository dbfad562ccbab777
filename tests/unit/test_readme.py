"""What README, docs/ and the shipped configurations say is what the program does."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from scmini import errors
from scmini.arguments import build_parser
from scmini.config import Config
from scmini.config_file import config_to_yaml, load_config, parse_config, shipped_configs

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in DOCUMENTS}
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
SECTIONS = [
    name
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
]


def _commands() -> list[str]:
    """Every `scmini ...` line of the README and of docs/: fenced, indented, or after `&&`."""
    found = []
    for line in "\n".join(TEXTS.values()).splitlines():
        line = re.split(r"\s{3,}(?=\S)", line.strip())[0]
        for part in line.split("&&"):
            if part.strip().startswith("scmini ") and "..." not in part:
                found.append(part.strip())
    return list(dict.fromkeys(found))


def test_the_first_screen_has_two_commands() -> None:
    fenced = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = [line for block in fenced for line in block.splitlines() if line.strip()]
    assert lines == [
        "pip install -e . && scmini run all",
        "pip install -e '.[test]' && pytest -n auto --dist loadfile",
    ]
    assert README.index(lines[1]) < 2500, "below the first screen"


@pytest.mark.parametrize("command", _commands())
def test_commands_parse(command: str) -> None:
    build_parser().parse_args(shlex.split(command)[1:])


def test_there_are_commands_to_parse() -> None:
    assert len(_commands()) >= 5


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_shipped_configurations_load_and_round_trip(name: str) -> None:
    config = load_config(name, [])
    assert config.name == name
    assert parse_config(config_to_yaml(config), name, []) == config


def test_the_files_that_are_named_exist() -> None:
    paths = {
        (name, path)
        for name, text in TEXTS.items()
        for path in re.findall(r"`((?:scmini|kernels|configs|tests|bench|docs)/[\w./-]+)`", text)
    }
    assert len(paths) > 10
    assert not [pair for pair in sorted(paths) if not (ROOT / pair[1]).exists()]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    found = re.findall(r"\]\((?!https?:)([^)#\s]+)(?:#[\w-]+)?\)", TEXTS[path.name])
    assert not [link for link in found if not (path.parent / link).exists()]


def _keys(model: type[BaseModel], prefix: str = "") -> set[str]:
    found = set()
    for name, field in model.model_fields.items():
        found.add(f"{prefix}{name}")
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= _keys(field.annotation, f"{prefix}{name}.")
    return found


def _named_keys(text: str) -> list[str]:
    """Everything written like a key of a section, in code or not; names of files are none."""
    names = rf"(?<![\w./-])((?:{'|'.join(SECTIONS)})\.[a-z][\w.]*\w)"
    return [key for key in re.findall(names, text) if not key.endswith((".md", ".py", ".jsonl"))]


def test_keys_that_are_named_exist() -> None:
    assert _named_keys("see [data.md](data.md), --set dpo.beta=1 and `judge.x.y`.") == [
        "dpo.beta",
        "judge.x.y",
    ]
    named = {(name, key) for name, text in TEXTS.items() for key in _named_keys(text)}
    assert len(named) > 100
    keys = _keys(Config)
    assert not [pair for pair in sorted(named) if pair[1] not in keys]


def _words(*folders: str) -> set[str]:
    """Every word of the code in these folders."""
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    files = [path for path in files if path.suffix in (".py", ".sh", ".yaml", ".j2")]
    return set(re.findall(r"\w+", "\n".join(path.read_text(encoding="utf-8") for path in files)))


def test_names_in_backticks_exist_in_the_code() -> None:
    """Functions, keys without their section, fields of files: whatever has an underscore."""
    words = _words("scmini", "kernels", "configs", "bench")
    words |= {path.stem for path in ROOT.glob("*/**/*.*") if "results" not in path.parts}
    missing = {
        (name, word)
        for name, text in TEXTS.items()
        for code in re.findall(r"`([^`\n]+)`", text)
        for word in re.findall(r"\b\w+_\w+", code)
        if word not in words
    }
    assert not missing


def test_environment_variables_that_are_named_exist() -> None:
    words = _words("scmini", "kernels")
    named = {name for text in TEXTS.values() for name in re.findall(r"\bSCMINI_[A-Z_]+\b", text)}
    assert {"SCMINI_STORE", "SCMINI_TRACEBACK"} <= named <= words


def test_exit_codes_that_are_named_exist() -> None:
    """The table has each once; a code in a sentence is one of them."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    codes = {kind.exit_code for kind in kinds if hasattr(kind, "exit_code")} | {0}
    table = re.findall(r"^\| (\d) \|", TEXTS["pipeline.md"], flags=re.MULTILINE)
    assert list(map(int, table)) == sorted(codes)
    named = re.findall(r"exit(?:s with|s| code)? (\d)\b", "\n".join(TEXTS.values()))
    assert named
    assert set(map(int, named)) <= codes


@pytest.mark.parametrize("name", [name for name, text in TEXTS.items() if PYTHON.search(text)])
def test_python_blocks_run(name: str) -> None:
    """One after the other, as a reader would paste them."""
    space: dict[str, object] = {}
    for block in PYTHON.findall(TEXTS[name]):
        exec(compile(block, name, "exec"), space)


def test_there_are_python_blocks() -> None:
    assert len(PYTHON.findall(TEXTS["kernels.md"])) >= 4


@pytest.mark.parametrize("name", ["readme_numbers", "tree_pictures"])
def test_what_programs_write_is_fresh(name: str) -> None:
    program = [sys.executable, str(ROOT / "bench" / f"{name}.py"), "--check"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        program, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr

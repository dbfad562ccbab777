"""What the README and the shipped configurations say is what the program does."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from scmini.arguments import build_parser
from scmini.config_file import config_to_yaml, load_config, parse_config, shipped_configs

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _commands() -> list[str]:
    """Every `scmini ...` line of the README and of docs/: fenced, indented, or after `&&`."""
    found = []
    documents = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))]
    for line in "\n".join([README, *documents]).splitlines():
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


def test_the_files_that_the_readme_names_exist() -> None:
    paths = re.findall(r"`((?:scmini|kernels|configs|tests|bench)/[\w./-]+)`", README)
    assert paths
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing


def test_the_numbers_are_those_of_the_result_files() -> None:
    program = [sys.executable, str(ROOT / "bench" / "readme_numbers.py"), "--check"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        program, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr

"""Configurations, folders and variables that nobody would write on purpose: a sentence each."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from fake_stages import config

from scmini import cli, pipeline
from scmini.config_file import MAX_BYTES, load_config, parse_config
from scmini.errors import ConfigError, EnvironmentProblem
from scmini.yaml_text import MAX_NODES


def told(arguments: Sequence[str], code: int, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints to stderr; it fails with this exit code, and without a traceback."""
    assert cli.main(arguments) == code
    found = capsys.readouterr()
    assert found.out == ""
    assert "Traceback" not in found.err
    assert "SCMINI_TRACEBACK" not in found.err
    assert all(line.isprintable() for line in found.err.splitlines())
    return found.err


BOMBS = {
    "laughs": "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n",
    "merge": "a: &a {b: 1}\nc: {<<: *a}\n",
    "deep list": "a: " + "[" * 100_000,
    "deep map": "{a: " * 100_000,
    "deep block": "".join(" " * n + "a:\n" for n in range(900)),
    "dashes": "- " * 100_000,
    "many values": "[" + "1," * 300_000 + "]",
    "many keys": "".join(f"k{n}: 1\n" for n in range(40_000)),
    "many mistakes": "".join(f"k{n}: 1\n" for n in range(5_000)),
    "long text": "name: '" + "a" * (MAX_BYTES - 10) + "'",
    "long key": f"? {'k' * 500_000}\n: 1",
    "large": "# " + "x" * MAX_BYTES,
    "digits": "seed: " + "9" * 100_000,
    "quotes": "name: " + "'" * 300_000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each in seconds; without bounds, most would take minutes or all memory."""
    path = tmp_path / "bomb.yaml"
    path.write_text(BOMBS[name])
    start = time.process_time()
    error = told(["config", "-c", str(path)], 2, capsys)
    assert time.process_time() - start < 10
    assert str(path) in error.splitlines()[0]
    assert len(error.splitlines()) <= 22
    assert len(error) < 12_000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: !!python/object/apply:os.system [touch x]", "line 1: tags ('!!python/object/apply"),
        ("\nseed: !!timestamp foo", "line 2: tags ('!!timestamp') are not allowed"),
        ("seed: !!bool foo", "line 1: tags ('!!bool')"),
        ("seed: !x 1", "line 1: tags ('!x') are not allowed; write the value alone"),
        ("dpo: {beta: .nan}", "dpo.beta: must be a finite number, got nan"),
        ("dpo: {beta: 1e999}", "dpo.beta: must be a finite number, got inf"),
        ("dpo: {beta: [.inf]}", "dpo.beta: must be a finite number, got inf"),
        (f"seed: {10**2000}", "seed: must be below 2147483648, got a number of many digits"),
        (f"dpo: {{beta: {10**2000}}}", "dpo.beta: expected a number, got a number of many digits"),
        (f"methods: [{'x' * 99_999}]", "methods: unknown method 'xxx"),
        ('"a\\e[31m": 1', r"a\x1b[31m: no such key; keys here: name"),
        ('data: {"pa\\nth": x}', "data.pa th: no such key; did you mean data.path?"),
        (
            'model: {model_name_or_path: "a\\0b"}',
            r"holds a character that no name has, got 'a\x00b'",
        ),
        ('data: {path: ["a\\e]0;x\\ab"]}', r"data.path: holds a character that no name has"),
        (
            'name: "\\u202Etxt"',
            r"name: must match ^[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}$, got '\u202etxt'",
        ),
        ("name: ..", "name: must match"),
        (f"name: {'a' * 101}", "name: must match"),
        ("seed: one", "seed: expected a whole number, got 'one'"),
        ("seed: {a: [b]}", "seed: expected a whole number, got {'a': ['b']}"),
        ("sft: [1]", "sft: expected a section (keys and values), got [1]"),
    ],
)
def test_what_a_key_may_not_be(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(str(tmp_path / "c.yaml"))
    message = str(caught.value)
    assert said in message
    assert "c.yaml" in message
    assert len(message) < 1000
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"seed: \xff", "not UTF-8 at byte 6; save it as UTF-8"),
        (b"\0s\0e\0e\0d", "U+0000"),
        (b"seed: 1\0", "U+0000"),
        (b"seed: \x1b[31m", "U+001B"),
        (b"\xef\xbb\xbfseed: 3", None),
        ("seed: 3".encode("utf-16"), None),
        (b"", None),
    ],
)
def test_encodings(content: bytes, said: str | None) -> None:
    if said is None:
        assert parse_config(content, "c.yaml").seed == (3 if content else 0)
        return
    with pytest.raises(ConfigError, match=r"c\.yaml: ") as caught:
        parse_config(content, "c.yaml")
    assert said in str(caught.value)


def test_overrides_that_go_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    for override, said in {
        "a." * 50_000 + "b=1": "no such key",
        "seed=" + "[" * 5_000: "--set seed: nested too deeply",
        "seed=*x": "--set seed: line 1: aliases",
        "=": "write it as section.key=value",
        "seed\x1b[31m=1": r"seed\x1b[31m: no such key; did you mean seed?",
        "seed=\ud800": "U+D800",
    }.items():
        assert said in told(["config", "--set", override], 2, capsys)


def test_a_file_with_many_values_is_no_bomb() -> None:
    many = ", ".join(f"data/part-{n}.jsonl" for n in range(MAX_NODES // 10))
    found = parse_config(f"data: {{format: jsonl, path: [{many}]}}\nreward: {{grader: none}}", "c")
    assert found.data.path is not None
    assert len(found.data.path) == MAX_NODES // 10


def odd_files(folder: Path) -> dict[str, Path]:
    os.mkfifo(folder / "pipe.yaml")
    (folder / "loop.yaml").symlink_to("loop.yaml")
    (folder / "folder.yaml").mkdir()
    return {
        "no ordinary file": folder / "pipe.yaml",
        "symbolic links": folder / "loop.yaml",
        "is a folder": folder / "folder.yaml",
        "no such file": folder / ".." / "nowhere" / "x.yaml",
        "File name too long": folder / ("x" * 400 + ".yaml"),
        "no name of a file": folder / "a\0b.yaml",
    }


def test_files_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for said, path in odd_files(tmp_path).items():
        assert f"{said}; name a file" in told(["config", "-c", str(path)], 2, capsys)
        child = tmp_path / "child.yaml"
        child.write_text(f'extends: "{path}"'.replace("\0", "\\0"))
        error = told(["config", "-c", str(child)], 2, capsys)
        assert f"{child}: extends: " in error
        assert said in error


def test_a_long_chain_of_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(100):
        (tmp_path / f"{number}.yaml").write_text(f"extends: {number + 1}.yaml\n")
    (tmp_path / "100.yaml").write_text("seed: 1")
    error = told(["config", "-c", str(tmp_path / "0.yaml")], 2, capsys)
    assert "more than 20 files, one on another" in error
    assert load_config(str(tmp_path / "85.yaml")).seed == 1


def test_a_store_that_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for place in (tmp_path / "file", tmp_path / "loop", Path("/dev/null")):
        monkeypatch.setenv("SCMINI_STORE", str(place))
        for command in (["run", "data"], ["status"]):
            error = told([*command, "-c", "demo", "-o", str(tmp_path / "run")], 3, capsys)
            assert f"SCMINI_STORE: {place} is no folder; name one, or unset it" in error
    monkeypatch.setenv("SCMINI_STORE", "")
    assert pipeline.store_root(tmp_path / "run") == tmp_path / ".store"


def test_a_run_folder_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("pipe", "loop"):
        error = told(["run", "all", "-c", "demo", "-o", str(tmp_path / name)], 2, capsys)
        assert f"{tmp_path / name}: a file of this name is in the way; name a folder" in error


@pytest.mark.parametrize(
    "variables",
    [
        {"COLUMNS": "abc", "LINES": "-3", "TERM": "nonsense\x1b", "SCMINI_TRACEBACK": "maybe"},
        {"HF_HOME": "/dev/null", "HF_ENDPOINT": "nonsense", "CUDA_VISIBLE_DEVICES": "zz"},
        {"SCMINI_EVENTS": "seven", "LOCAL_RANK": "x", "WORLD_SIZE": "", "NO_COLOR": "\t"},
    ],
)
def test_variables_that_make_no_sense(
    variables: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for command in (["status", "-o", str(tmp_path)], ["config"], ["plan"]):
        assert cli.main([*command, "-c", "demo"]) == 0
    assert "Traceback" not in capsys.readouterr().err


def test_a_store_without_the_right_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the stage's process, which root may do everything in: so the system's word is played."""
    from scmini import worker
    from scmini.stage_graph import Task

    error = PermissionError(13, "Permission denied", str(tmp_path / "x"))
    known = worker._as_known(config(), Task("data"), error)
    assert isinstance(known, EnvironmentProblem)
    assert str(known) == f"{tmp_path / 'x'}: Permission denied; give this user the right"

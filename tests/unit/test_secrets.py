"""Keys and tokens reach the servers that they are for, and nothing that a person keeps or shows."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from download_helpers import config as hub_config
from download_helpers import connected
from fake_judge import Http, Judge, judge, said
from fake_stages import WORKER
from fake_stages import config as toy
from judge_helpers import inquiry, session

from scmini import cli, console, download, pipeline
from scmini.config_file import config_to_yaml, parse_config
from scmini.errors import ConfigError, EnvironmentProblem, ScminiError, ServiceError
from scmini.quoting import holds_secret, plain, quoted, redact

__all__ = ["judge"]

SECRETS = {
    "HF_TOKEN": "hf_canaryCANARY0123456789abcdef",
    "OPENAI_API_KEY": "sk-canary/OPENAI+0123456789=abc",
    "WANDB_API_KEY": "ca9a4900ca9a4901ca9a4902ca9a4903ca9a4904",
    "SOME_JUDGE_KEY": "canary.of.somebody.else",
    "HTTPS_PROXY_PASSWORD": "canary-of-a-proxy",
}


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return SECRETS


def assert_clean(*texts: str | bytes, folder: Path | None = None) -> None:
    """No secret in a text, nor in the names or the bytes of the files of a folder."""
    found = [text.encode() if isinstance(text, str) else text for text in texts]
    if folder is not None:
        paths = sorted(folder.rglob("*"))
        found += [str(path).encode() for path in paths]
        found += [path.read_bytes() for path in paths if path.is_file()]
    for name, secret in SECRETS.items():
        for spelling in (secret, secret.replace("/", "\\/"), secret.replace("/", "%2F")):
            assert not any(spelling.encode() in text for text in found), name


FAULTS = {
    "RuntimeError": "a crash",
    "scmini.errors.DataError": "an error that is expected",
    "OSError": "the system's word",
}


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_a_run_keeps_no_secret(
    fault: str | None,
    secrets: dict[str, str],
    tmp_path: Path,
    executed: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its stages say the keys aloud, and fail with messages that quote them all."""
    values = f"' '.join(os.environ[name] for name in {list(SECRETS)})"
    told = f"import scmini.errors; raise {fault}({values})"
    text = WORKER.replace('raise RuntimeError("out \\x1b[31mof ideas")', told)
    text = text.replace('print("library noise of", task.key)', f"console.say({values})")
    assert text.count(values) == 2
    place = tmp_path / "runs"
    (tmp_path / "noisy.py").write_text(text)
    monkeypatch.setattr(pipeline, "WORKER", [sys.executable, str(tmp_path / "noisy.py")])
    if fault is not None:
        monkeypatch.setenv("FAKE_BEHAVIOUR", json.dumps({"sample": "crash"}))
    (tmp_path / "toy.yaml").write_text(config_to_yaml(toy()))
    common = ["-c", str(tmp_path / "toy.yaml"), "-o", str(place / "toy")]
    assert (cli.main(["run", "all", "--until", "reward", *common]) == 0) == (fault is None)
    assert "data" in executed()
    for command in (["status"], ["status", "--json"], ["plan"], ["repair", "--dry-run"]):
        cli.main([*command, *common])
    cli.main(["config", "-c", str(tmp_path / "toy.yaml")])
    assert (place / "toy" / "run.json").is_file()
    shown = capsys.readouterr()
    assert "***" in shown.err
    assert_clean(shown.out, shown.err, folder=place)


def test_the_judge_may_echo_all_that_it_was_sent(
    judge: Judge, secrets: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def echo(status: int) -> Callable[..., Any]:
        def answer(body: Any, before: int) -> Any:
            sent = json.dumps(judge.headers[-1])
            if status == 200:
                return said(f"You sent {sent}. Rating: [[6]]")
            message = json.dumps({"error": {"message": f"no: {sent}"}}).replace("/", "\\/")
            return Http(status, message.encode())

        return answer

    asked = session(judge, tmp_path / "work", api_key_variable="OPENAI_API_KEY")
    for number, status in enumerate((200, 400, 401, 403, 404, 422, 429, 500, 503)):
        judge.answer = echo(status)
        try:
            texts = [repr(verdict) for verdict in asked.ask([inquiry(f"question {number}")])]
        except ServiceError as error:
            texts = [str(error)]
        assert_clean(*texts)
    assert judge.headers[0]["Authorization"] == f"Bearer {secrets['OPENAI_API_KEY']}"
    shown = capsys.readouterr()
    assert_clean(shown.out, shown.err, folder=tmp_path)


@pytest.mark.parametrize("gated", [False, "manual"])
def test_the_token_of_the_hub(
    gated: bool | str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with connected(tmp_path, monkeypatch) as hub:
        for name, value in SECRETS.items():
            monkeypatch.setenv(name, value)
        hub.repos["models", "some/model"].gated = gated
        message = ""
        try:
            done = download.download(hub_config())
            message = download.text(done) + json.dumps(download.document(done))
            done.check()
        except ScminiError as error:
            message += str(error)
        assert f"Bearer {SECRETS['HF_TOKEN']}" in {asked.token for asked in hub.asked}
        assert message
    shown = capsys.readouterr()
    assert_clean(message, shown.out, shown.err, folder=tmp_path)


PASTED = [
    "judge: {base_url: 'https://me:CANARY-123456@host/v1'}",
    "judge: {base_url: 'https://CANARY-123456@host/v1'}",
    "judge: {base_url: 'https://host/v1?api-version=7&api-key=CANARY-123456'}",
    "judge: {base_url: 'https://host/v1?access_token=CANARY-123456'}",
    "judge: {api_key_variable: sk-CANARY-0123456789abcdef}",
    "judge: {api_key_variable: hf_CANARY0123456789abcdef0}",
    "judge: {api_key: sk-CANARY-0123456789abcdef}",
    "model: {model_name_or_path: hf_CANARY0123456789abcdef0}",
    "model: {model_name_or_path: 'https://me:hf_CANARY0123456789abcdef0@huggingface.co/a/b'}",
    "data: {format: jsonl, path: [a, 'https://me:CANARY-1@host/rows.jsonl']}",
    "seed: sk-CANARY-0123456789abcdef",
    "methods: [sk-CANARY-0123456789abcdef]",
    "sk-CANARY-0123456789abcdef: 1",
    "seed: [sk-CANARY-0123456789abcdef]",
    "? {hf_CANARY0123456789abcdef0: 1}\n: 2",
    "hf_CANARY0123456789abcdef0: 1\nhf_CANARY0123456789abcdef0: 2",
    "seed: !hf_CANARY0123456789abcdef0 1",
    "embed: {encoder: 'canary.of.somebody.else'}",
]


@pytest.mark.parametrize("text", PASTED)
def test_a_key_that_was_pasted_is_refused_and_not_repeated(
    text: str,
    secrets: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "c.yaml").write_text(text)
    run = tmp_path / "run"
    assert cli.main(["run", "all", "-c", str(tmp_path / "c.yaml"), "-o", str(run)]) == 2
    shown = capsys.readouterr()
    assert "canary" not in (shown.out + shown.err).lower()
    assert not run.exists()


def test_a_pasted_key_is_told_where_it_belongs() -> None:
    with pytest.raises(
        ConfigError, match=r"model\.model_name_or_path: this looks like a key.*HF_TOKEN"
    ):
        parse_config("model: {model_name_or_path: hf_CANARY0123456789abcdef0}", "c.yaml")
    plain_ones = "judge: {base_url: 'https://host/v1?api-version=7'}"
    assert parse_config(plain_ones, "c.yaml").judge.base_url.endswith("?api-version=7")


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "sk-CANARY-0123456789abcdef"],
        ["run", "all", "--sk-CANARY-0123456789abcdef"],
        ["config", "-c", "sk-CANARY-0123456789abcdef"],
        ["config", "-c", "https://me:CANARY-123456@host/c.yaml"],
        ["config", "--set", "judge.api_key=sk-CANARY-0123456789abcdef"],
        ["config", "--set", "sk-CANARY-0123456789abcdef"],
        ["config", "--set", "seed=sk-CANARY-0123456789abcdef"],
        ["status", "-o", "hf_CANARY0123456789abcdef0"],
    ],
)
def test_a_key_on_the_command_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert "CANARY" not in shown.out + shown.err


def test_what_is_redacted(secrets: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for secret in SECRETS.values():
        assert redact(f"a {secret}, b") == "a ***, b"
        assert holds_secret(secret)
    monkeypatch.setenv("SHORT_KEY", "EMPTY")
    monkeypatch.setenv("KEY_OF_A_FILE_TOKEN", "/home/somebody/token")
    for harmless in (
        *("EMPTY", "/home/somebody/token", "sk-learn-is-a-package-of-python", "hf_short", "a@b.c"),
        *(
            "https://host/v1?api-version=7",
            "task-0123456789-0123456789",
            "https://host/a@b",
            "key=1",
        ),
        *("meta-llama/Llama-2-7b-chat-hf", "monkey=banana", "http://localhost:8000/v1"),
    ):
        assert redact(harmless) == harmless
        assert not holds_secret(harmless)
    assert redact("git https://u:p@h/x?token=abc&b=1#c") == "git https://***@h/x?token=***&b=1#c"


def test_all_that_is_shown_is_redacted(
    secrets: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    text = " ".join(SECRETS.values())
    console.say(text)
    console.warn(text)
    console.example(text, [("prompt", text)])
    assert cli._fail(EnvironmentProblem(text), text, 3) == 3
    shown = capsys.readouterr()
    assert shown.err.count("***") >= 4 * len(SECRETS)
    assert_clean(shown.out, shown.err)


def test_foreign_text_in_messages() -> None:
    assert plain("a\n\n b\x1b[31m\u202e\ud800 c") == r"a b\x1b[31m\u202e\ud800 c"
    assert plain("x" * 999, 10) == "xxxxxxx..."
    assert plain(ValueError("a\tb")) == "a b"
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    for value in (
        deep,
        10**9999,
        "x" * 10**6,
        {"a": deep},
        [1] * 10**6,
        b"\xff" * 999,
        float("nan"),
    ):
        assert len(quoted(value)) <= 80
        assert quoted(value).isprintable()
    assert quoted({"role": "a"}) == "{'role': 'a'}"

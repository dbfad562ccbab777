"""The command line: words, exit codes, and what is not imported."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scmini import __version__, cli, pipeline
from scmini.config_file import load_config, parse_config
from scmini.console import clean, duration, progress, size, table
from scmini.display import Display
from scmini.errors import DataError, DoesNotFit, Interrupted, ServiceError, StageFailed, StoreBusy
from scmini.planning import cards
from scmini.planning.cards import CARDS
from scmini.stage_graph import Task

REPOSITORY = Path(cli.__file__).parent.parent


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SCMINI_STORE", raising=False)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Calls of `pipeline.run`, which does nothing here and says that the report is finished."""
    calls: list[tuple[Any, ...]] = []

    def run(*args: Any, **kwargs: Any) -> dict[Task, None]:
        calls.append((*args, kwargs))
        return {Task("report"): None} if kwargs["until"] is None else {}

    monkeypatch.setattr(pipeline, "run", run)
    return calls


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rum", "all"], "no command 'rum'; did you mean run?"),
        (
            ["frobnicate"],
            "commands are: run, status, repair, plan, download, doctor, verify, chat, export, "
            "config",
        ),
        (["export", "pears"], "no kind 'pears'; did you mean pairs?"),
        (["export", "xyz"], "no kind 'xyz'; kinds are: pairs"),
        (["export"], "arguments are required: KIND"),
        (["export", "pairs"], "arguments are required: --format"),
        (["export", "pairs", "--format", "tlr"], "invalid choice: 'tlr'"),
        (["export", "pairs", "--format", "tlr"], "did you mean trl?"),
        (["export", "pairs", "--format", "trl", "--layuot", "x"], "did you mean --layout?"),
        (["export", "pairs", "--format", "trl"], "runs/demo: no such run folder"),
        (["run", "al"], "no stage 'al'; did you mean all?"),
        (["run", "genrate"], "no stage 'genrate'; did you mean generate?"),
        (
            ["run", "all", "--untl", "dpo"],
            "unrecognized arguments: --untl dpo; did you mean --until?",
        ),
        (["run", "all", "--until", "dpoo"], "no stage 'dpoo'; did you mean dpo?"),
        (["run", "dpo", "--from", "sft"], "--from and --until go with"),
        (["run", "all", "--set"], "expected one argument"),
        (["run", "all", "--set", "dpo.bta=0.1"], "dpo.bta: no such key; did you mean dpo.beta?"),
        (["config", "-c", "dmo"], "did you mean demo?"),
        (["config", "-c", "no/such.yaml"], "no/such.yaml: no such file"),
        (["status", "-o", "nowhere"], "nowhere: no such run folder"),
        (["run"], "arguments are required"),
        ([], "arguments are required: COMMAND"),
    ],
)
def test_mistakes_exit_2_with_a_hint(words: list[str], said: str, capsys: Any) -> None:
    assert cli.main(words) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert said in error
    assert "Traceback" not in error
    assert len(error.splitlines()) <= 3
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (StoreBusy("x"), 3),
        (DoesNotFit("x"), 4),
        (DataError("x"), 5),
        (Interrupted("x"), 6),
        (KeyboardInterrupt(), 6),
        (ServiceError("x"), 7),
        (OSError(5, "Input/output error", "x"), 3),
        (BrokenPipeError(32, "Broken pipe"), 3),
        (StageFailed("sft", 5, "x"), 5),
        (ZeroDivisionError("x"), 1),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(pipeline, "run", fail)
    assert cli.main(["run", "all"]) == code
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("SCMINI_TRACEBACK", "1")
    assert cli.main(["run", "all"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_without_c_the_demo_runs_and_says_so(ran: list[tuple[Any, ...]], capsys: Any) -> None:
    assert cli.main(["run", "all"]) == 0
    assert "no -c given: running the embedded demo (configs/demo.yaml)" in capsys.readouterr().err
    config, run_dir, options = ran[0]
    assert (config, run_dir) == (load_config("demo", []), Path("runs/demo"))
    assert cli.main(["run", "all", "--set", "seed=3"]) == 0
    assert "(configs/demo.yaml) with what --set changes\n" in capsys.readouterr().err
    assert options == {"only": None, "from_": None, "until": None, "force": False, "planned": {}}


@pytest.mark.parametrize("card", [None, CARDS["rtx-4090"]])
def test_what_the_plan_knows_goes_along(
    card: Any, ran: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for module in (cli, cards):
        monkeypatch.setattr(module, "local_card", lambda: card)
    monkeypatch.setattr(cli.download, "not_fetched", lambda _: [])
    words = ["run", "all", "-c", "hh-rlhf-7b"]
    assert cli.main(words) == 0
    assert cli.main([*words, "--set", "model.model_name_or_path=nobody/knows-it"]) == 0
    known, unknown = (options["planned"] for _, _, options in ran)
    assert unknown == {}
    assert ("no GPU found" in capsys.readouterr().err) == (card is None)
    if card is None:
        assert known == {}
    else:
        assert known[Task("dpo", "self-contrast-16")] > known[Task("dpo", "self-contrast-1")] > 60
        assert Task("report") not in known


def test_words_reach_the_pipeline(ran: list[tuple[Any, ...]]) -> None:
    Path("my.yaml").write_text("name: mine\nmethods: [sft]\n")
    words = ["run", "all", "-c", "my.yaml", "--set", "seed=3", "--set", "dpo.beta=5e-1"]
    assert cli.main([*words, "--from", "sft", "--until", "dpo", "--force"]) == 0
    assert cli.main(["run", "dpo", "-c", "my.yaml", "-o", "there"]) == 0
    config, run_dir, options = ran[0]
    assert (config.seed, config.dpo.beta, run_dir) == (3, 0.5, Path("runs/mine"))
    assert options == {
        **{"only": None, "from_": "sft", "until": "dpo", "force": True},
        "planned": {},
    }
    assert ran[1][1:] == (
        Path("there"),
        {"only": "dpo", "from_": None, "until": None, "force": False, "planned": {}},
    )


def test_an_existing_run_folder_brings_its_configuration(
    ran: list[tuple[Any, ...]], capsys: Any
) -> None:
    Path("there").mkdir()
    Path("there/config.yaml").write_text("name: mine\nseed: 9\nmethods: [sft]\n")
    assert cli.main(["run", "all", "-o", "there"]) == 0
    assert ran[0][0].seed == 9
    assert "configuration of the run, there/config.yaml" in capsys.readouterr().err
    assert cli.main(["status", "-o", "there", "--json"]) == 0
    out, _ = capsys.readouterr()
    found = json.loads(out)
    assert found["run"] == "there"
    assert found["stages"][0] == {
        **{"name": "data", "method": None, "state": "missing", "reason": "never run"},
        **{"seconds": None, "bytes": None, "path": None},
    }
    assert cli.main(["run", "all", "-o", "there", "-c", "demo"]) == 0
    assert ran[1][0].name == "demo"


def test_status_for_people(capsys: Any) -> None:
    assert cli.main(["status"]) == 0
    out, error = capsys.readouterr()
    assert out.splitlines()[0].split() == ["stage", "method", "state", "time", "size", "reason"]
    assert out.splitlines()[1].split() == ["data", "missing", "never", "run"]
    assert "demo" in error
    assert not Path("runs").exists()


def test_config_prints_what_it_means(capsys: Any) -> None:
    assert cli.main(["config", "-c", "demo", "--set", "dpo.beta=0.25"]) == 0
    out, error = capsys.readouterr()
    assert error == ""
    assert parse_config(out, "out") == load_config("demo", ["dpo.beta=0.25"])


def test_results_go_to_stdout(ran: list[tuple[Any, ...]], capsys: Any) -> None:
    report = Path("runs/demo/report")
    report.mkdir(parents=True)
    row = {
        **{"win_rate": 50.0, "win_rate_ci95": [45.0, 55.25], "mean_sigmoid_reward": 0.1, "n": 500},
        **{"mean_reward": 0.8004, "mean_reward_ci95": [0.79, 0.8126], "mean_length": 12.0},
        "benchmarks": {},
    }
    (report / "results.json").write_text(json.dumps({"methods": {"self-contrast-4": row}}))
    assert cli.main(["run", "all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == [
        "self-contrast-4",
        "80.0",
        "[79.0,",
        "81.3]",
        "50.0",
        "[45.0,",
        "55.2]",
        "500",
    ]
    assert lines[2] == "runs/demo/report/index.html"
    score = {"metric": "m", "value": 6.5, "ci95": [6, 7], "n": 9, "failed": 1, "details": {}}
    nobody = {key: None for key in row if key != "n"} | {
        "n": 500,
        "benchmarks": {"mt-bench": score},
    }
    methods = {"sft": {**nobody, "benchmarks": {}}, "dpo": nobody}
    (report / "results.json").write_text(json.dumps({"methods": methods}))
    assert cli.main(["run", "all"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[:3] == [
        *("method mt-bench n", "sft - 500", "dpo 6.50 [6.00, 7.00], 1 failed 500"),
    ]
    assert cli.main(["run", "all", "--until", "data"]) == 0
    assert capsys.readouterr().out == "", "the report of another configuration"


def test_a_narrow_status_has_room_for_reasons() -> None:
    whole = {"name": "sft", "method": None, "state": "done", "reason": "", "path": "x"}
    done = {**whole, "seconds": 65.0, "bytes": 1024}
    reason = "waits for dpo self-contrast-16-unfiltered"
    waits = {
        **{"name": "generate", "method": "self-contrast-16-unfiltered", "state": "missing"},
        **{"reason": reason, "seconds": None, "bytes": None, "path": None},
    }
    lines = cli._status_table({"stages": [done, waits]}, narrow=True).splitlines()
    assert lines[0].split("  ")[-1] == "time or reason"
    assert lines[1].endswith("1:05")
    assert lines[2].endswith(reason)
    assert len(lines[2]) <= 92
    assert " 1.0 KiB" in cli._status_table({"stages": [done, waits]})


def test_torn_results_are_said(ran: list[tuple[Any, ...]], capsys: Any) -> None:
    report = Path("runs/demo/report")
    report.mkdir(parents=True)
    (report / "results.json").write_text('{"methods": {"sft"')
    assert cli.main(["run", "all"]) == 5
    out, error = capsys.readouterr()
    assert out == ""
    assert "results.json: damaged; scmini repair -o runs/demo sets it aside" in error


@pytest.mark.parametrize(
    ("folder", "code", "said"),
    [
        ("taken", 2, "-o taken: a file of this name is in the way; name a folder"),
        ("taken/below", 3, "taken/below: Not a directory"),
        ("/proc/x", 3, "/proc/x: No such file or directory"),
    ],
)
def test_a_run_folder_that_cannot_be(folder: str, code: int, said: str, capsys: Any) -> None:
    Path("taken").touch()
    assert cli.main(["run", "all", "-c", "demo", "-o", folder]) == code
    assert capsys.readouterr().err == f"scmini: {said}\n"


def start(*words: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "words",
    [["--help"], ["run", "--help"], ["status"], ["config"], ["--version"], ["export", "--help"]],
)
def test_start_without_heavy_imports(words: list[str]) -> None:
    done = start("-X", "importtime", "-m", "scmini", *words)
    assert done.returncode == 0
    modules = {
        line.rpartition("|")[2].strip().split(".")[0]
        for line in done.stderr.splitlines()
        if "|" in line
    }
    assert "argparse" in modules
    assert not modules & {"torch", "transformers", "numpy", "pyarrow", "rich", "matplotlib"}
    if words == ["--version"]:
        assert done.stdout == f"scmini {__version__}\n"
    if words[0] == "export":
        assert "pairs " in done.stdout


def test_a_closed_pipe_is_no_fault() -> None:
    command = f"{sys.executable} -m scmini config | true"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "fault" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_nobody_reads_the_progress() -> None:
    """The work goes on, and so does what is said to stdout."""
    script = (
        "import sys\nfrom scmini import cli, pipeline\nfrom scmini.console import say\n"
        "from scmini.display import Display\n"
        "def run(*_, **__):\n"
        "    with Display() as display:\n"
        "        for _ in range(3): say('x'); display.start('sft')\n"
        "    print('went on'); return {}\n"
        "pipeline.run = run\nsys.exit(cli.main(['run', 'all']))\n"
    )
    receive, send = os.pipe()
    os.close(receive)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=send, text=True, check=False
    )
    os.close(send)
    assert (done.returncode, done.stdout) == (0, "went on\n")


def test_plain_lines_are_few_and_show_first_and_last(capsys: Any) -> None:
    display = Display(live=False)
    with display:
        display.start("sft")
        for done in range(0, 1001):
            event = {
                "done": done,
                "total": 1000,
                "unit": "steps",
                "figures": {"loss": 0.123456, "at": "x"},
            }
            display.progress("sft", event)
        display.finish("sft", "done in 3.0 s")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "sft: starts"
    assert lines[1] == "sft: 0/1000 steps (0 %), loss 0.1235, at x"
    assert lines[2].startswith("sft: 1000/1000 steps (100 %), ")
    assert lines[3:] == ["sft: done in 3.0 s"]


def test_the_live_view_escapes(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    display = Display(live=True)
    with display:
        display.start("sft")
        display.progress(
            "sft", {"done": 1, "total": 2, "unit": "[b]", "figures": {"text": "\x1b[2J[red]"}}
        )
        display.line("[bold]an answer\x1b[2J\x07")
        display.finish("sft", "done")
    error = capsys.readouterr().err
    assert "[bold]an answer" in error
    assert "sft: done" in error
    assert "\x1b[2J" not in error
    assert "\x07" not in error


def test_progress_without_a_parent_is_silent(capsys: Any) -> None:
    progress(1, 2, "steps")
    assert capsys.readouterr() == ("", "")


def test_numbers_for_people() -> None:
    assert [duration(s) for s in (0.04, 59.9, 59.97, 245, 7800)] == [
        "0.0 s",
        "59.9 s",
        "1:00",
        "4:05",
        "2:10:00",
    ]
    assert [size(b) for b in (0, 1023, 1024, 5 << 20, 3 << 40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "5.0 MiB",
        "3.0 TiB",
    ]
    assert clean("a\x1b[31mb\x1b]0;c\x00\td\n") == "ab]0;c\td\n"
    assert table(["a", "bb"], [["ccc", "d"]]) == "a    bb\nccc  d"

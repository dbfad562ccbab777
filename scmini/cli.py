"""Words typed by a person, and the exit codes they get back.

    0 done   1 a fault of ours   2 usage or configuration   3 environment   4 out of memory
    5 data   6 stopped by a signal, progress kept   7 an outside service

Results go to stdout, everything else to stderr. Nothing here imports torch.
"""

import argparse
import difflib
import json
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from scmini import __version__, export, pipeline, verify
from scmini.config import Config
from scmini.config_file import config_to_yaml, load_config
from scmini.console import duration, mute, say, size, table, to_stderr, warn
from scmini.errors import EnvironmentProblem, Interrupted, ScminiError, UsageError
from scmini.planning import plan, show
from scmini.stage_graph import STAGES, Task


class _Parser(argparse.ArgumentParser):
    """Says what was probably meant, in a line or two, instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{_with_hint(message)}\nsee {self.prog} --help")


def _with_hint(message: str) -> str:
    choice = re.match(r"argument (\S+): invalid choice: '([^']*)'", message)
    if choice:
        name, word = choice.groups()
        choices = _choices(build_parser(), name)
        near = difflib.get_close_matches(word, choices, n=1)
        if name.startswith("-"):
            return f"{message}; did you mean {near[0]}?" if near else message
        what = name.lower()
        hint = f"did you mean {near[0]}?" if near else f"{what}s are: {', '.join(choices)}"
        return f"no {what} {word!r}; {hint}"
    unknown = re.match(r"unrecognized arguments: (\S+)", message)
    if unknown:
        word = unknown[1].partition("=")[0]
        flags = {flag for action in _actions(build_parser()) for flag in action.option_strings}
        near = difflib.get_close_matches(word, [f for f in flags if f.startswith("--")], n=1)
        return f"{message}; did you mean {near[0]}?" if near else message
    return message


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Every option and argument of a parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _actions(inner)


def _choices(parser: argparse.ArgumentParser, name: str) -> list[str]:
    """What may stand for an argument, named as argparse names it in messages."""
    for action in _actions(parser):
        if action.choices and name in ("/".join(action.option_strings), action.metavar):
            return list(action.choices)
    return []


def build_parser() -> _Parser:
    parser = _Parser(
        prog="scmini",
        description="Self-Contrast alignment on one GPU, from raw data to the figure.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"scmini {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    run = commands.add_parser(
        "run",
        help="run all stages, or one; what is finished is not run again",
        description="Run all stages, or one. What is finished is kept; what was stopped goes on.",
        epilog=f"stages: {', '.join(STAGES)}",
        allow_abbrev=False,
    )
    run.add_argument("stage", metavar="all|STAGE")
    _add_config(run)
    _add_output(run)
    run.add_argument(
        "--from", dest="from_", metavar="STAGE", help="begin here; what is before must be done"
    )
    run.add_argument("--until", metavar="STAGE", help="stop after this stage")
    run.add_argument("--force", action="store_true", help="run again what is finished")
    status = commands.add_parser(
        "status",
        help="what is done, stale (and why), missing, running",
        description="What is done, stale (and why), missing or running, with sizes and times.",
        allow_abbrev=False,
    )
    _add_config(status)
    _add_output(status)
    status.add_argument("--json", action="store_true", help="one JSON document on stdout")
    _add_plan(commands)
    _add_verify(commands)
    _add_export(commands)
    config = commands.add_parser(
        "config",
        help="print the resolved configuration, ready to save",
        description="Print the resolved configuration: every key with its value, ready to save.",
        allow_abbrev=False,
    )
    _add_config(config)
    return parser


def _add_plan(commands: Any) -> None:
    parser = commands.add_parser(
        "plan",
        help="GPU memory, disk and hours of every stage, before anything is loaded",
        description="GPU memory, disk and hours of every stage, before anything is downloaded or "
        "loaded. Exit code 4 if a stage cannot fit the card, with the smallest change that would.",
        allow_abbrev=False,
    )
    _add_config(parser)
    _add_output(parser, default="none; with it, what finished stages took is shown beside")
    parser.add_argument("--gpu", metavar="NAME", help="a card (default: this machine's, else all)")
    for what in ("prompt", "response"):
        parser.add_argument(
            f"--{what}-tokens", type=_positive, metavar="N", help=f"mean length of a {what}"
        )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def _add_verify(commands: Any) -> None:
    parser = commands.add_parser(
        "verify",
        help="prove on this machine that the fast ways give what the slow ones give",
        description="Prove on this machine that fast equals slow: packed rows = separate "
        "sequences, every kernel = plain PyTorch, a step in micro-batches = the whole step, "
        "step-0 rewards = 0. A table of measured and allowed errors; exit code 1 if one is larger.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="where to compute (default: cuda if there is one)"
    )
    parser.add_argument(
        "--model",
        metavar="FOLDER|NAME",
        help="a model, loaded in NF4 as a run would (default: a tiny one of random weights)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")


def _add_export(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="write what a run made as files for other programs",
        description="Write what a run made as files for other programs.",
        allow_abbrev=False,
    )
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    pairs = kinds.add_parser(
        "pairs",
        help="chosen and rejected answers, for TRL, LLaMA-Factory or the original project",
        description="Write the pairs on which methods are trained. --layout flattened: a row for "
        "each rejected answer; grouped: a row for each prompt, with all its rejected answers (the "
        "original project's trainer reads only the first of them, LLaMA-Factory none).",
        allow_abbrev=False,
    )
    pairs.add_argument("--format", choices=tuple(export.FORMATS), required=True)
    pairs.add_argument(
        "--layout", choices=export.LAYOUTS, default="flattened", help="default: flattened"
    )
    pairs.add_argument(
        "--method",
        dest="methods",
        action="append",
        default=[],
        metavar="M",
        help="a method of the run; may be repeated (default: every method that has pairs)",
    )
    _add_output(pairs, default="runs/demo")
    pairs.add_argument(
        "--to", type=Path, metavar="FOLDER", help="where to write (default: RUN/export/FORMAT)"
    )
    pairs.add_argument(
        "--force", action="store_true", help="write even if other files are in the folder"
    )
    pairs.set_defaults(export=_export_pairs)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-c",
        "--config",
        metavar="NAME|FILE",
        help="a shipped configuration or a YAML file (default: demo)",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one key, for example --set dpo.beta=0.2; may be repeated",
    )


def _add_output(
    parser: argparse.ArgumentParser, default: str = "runs/<name of the configuration>"
) -> None:
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="RUN",
        help=f"run folder (default: {default})",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Do one command; returns the exit code."""
    try:
        arguments = build_parser().parse_args(argv)
        actions = {
            **{"run": _run, "status": _status, "plan": _plan, "verify": _verify},
            "config": _config,
            "export": lambda arguments: arguments.export(arguments),
        }
        actions[arguments.command](arguments)
        return 0
    except ScminiError as error:
        return _fail(error, str(error), error.exit_code)
    except KeyboardInterrupt as error:
        return _fail(error, "stopped", Interrupted.exit_code)
    except OSError as error:
        text = f"{error.filename or 'file system'}: {error.strerror or error}"
        return _fail(error, text, EnvironmentProblem.exit_code)
    except Exception as error:
        text = f"a fault of scmini: {type(error).__name__}: {error}"
        return _fail(error, f"{text}\nSCMINI_TRACEBACK=1 shows where", 1)


def _fail(error: BaseException, message: str, code: int) -> int:
    if os.environ.get("SCMINI_TRACEBACK") == "1":
        to_stderr("".join(traceback.format_exception(error)))
    to_stderr(f"scmini: {message}")
    return code


def _print(text: str) -> None:
    """A result, to stdout."""
    try:
        print(text, flush=True)
    except OSError as error:
        mute(sys.stdout)
        if not isinstance(error, BrokenPipeError):  # `head`, for example, has seen enough
            raise


def _run(arguments: argparse.Namespace) -> None:
    only = None if arguments.stage == "all" else arguments.stage
    if only and (arguments.from_ or arguments.until):
        raise UsageError("--from and --until go with `scmini run all`")
    config = _load(arguments, arguments.output)
    run_dir = arguments.output or _default_folder(config)
    finished = pipeline.run(
        config,
        run_dir,
        only=only,
        from_=arguments.from_,
        until=arguments.until,
        force=arguments.force,
    )
    if Task("report") in finished:  # else what lies there is of another configuration
        _print_results(run_dir / "report")


def _status(arguments: argparse.Namespace) -> None:
    output = arguments.output
    if output is not None and arguments.config is None and not output.is_dir():
        raise UsageError(f"{output}: no such run folder")
    if output is None and arguments.config is None:
        output = Path("runs") / "demo"
    config = _load(arguments, output)
    found = pipeline.status(config, output or _default_folder(config))
    _print(json.dumps(found, indent=1) if arguments.json else _status_table(found))


def _plan(arguments: argparse.Namespace) -> None:
    made = plan.plan(
        _load(arguments, arguments.output),
        gpu=arguments.gpu,
        prompt_tokens=arguments.prompt_tokens,
        response_tokens=arguments.response_tokens,
        run_dir=arguments.output,
    )
    _print(json.dumps(plan.document(made), indent=1) if arguments.json else show.text(made))
    made.check()


def _verify(arguments: argparse.Namespace) -> None:
    found = verify.verify(arguments.device, arguments.model)
    if arguments.json:
        _print(json.dumps(found, indent=1))
    elif sys.stdout.isatty():
        verify.show_on_terminal(found)
    else:
        _print(verify.plain_text(found))
    if not found["passed"]:
        raise ScminiError(f"verification failed: {verify.summary(found)}")


def _config(arguments: argparse.Namespace) -> None:
    _print(config_to_yaml(_load(arguments, None)).rstrip("\n"))


def _export_pairs(arguments: argparse.Namespace) -> None:
    done = export.export_pairs(
        arguments.output or Path("runs") / "demo",
        arguments.format,
        layout=arguments.layout,
        methods=arguments.methods,
        to=arguments.to,
        force=arguments.force,
    )
    for file in done.files:
        for reason, count in sorted(file.left_out.items()):
            total = file.prompts + sum(file.left_out.values())
            warn(f"{file.method}: {count} of {total} prompts left out: {reason}")
    rows = [[f.method, str(f.prompts), str(f.rows), str(f.path)] for f in done.files]
    _print(f"{table(['method', 'prompts', 'rows', 'file'], rows)}\nto load: {done.how_to_load}")


def _load(arguments: argparse.Namespace, output: Path | None) -> Config:
    """The configuration: `-c`, else that of an existing run folder, else the embedded demo."""
    if output is not None and output.exists() and not output.is_dir():
        raise UsageError(f"-o {output}: a file of this name is in the way; name a folder")
    name = arguments.config
    if name is None and output is not None and (output / "config.yaml").is_file():
        name = str(output / "config.yaml")
        say(f"no -c given: using the configuration of the run, {name}")
    elif name is None:
        verb = "running" if arguments.command == "run" else "taking"
        say(f"no -c given: {verb} the embedded demo (configs/demo.yaml)")
    return load_config(name, arguments.overrides)


def _default_folder(config: Config) -> Path:
    return Path("runs") / config.name


def _status_table(found: dict[str, Any]) -> str:
    rows = [
        [
            stage["name"],
            stage["method"] or "",
            stage["state"],
            duration(stage["seconds"]) if stage["seconds"] is not None else "",
            size(stage["bytes"]) if stage["bytes"] is not None else "",
            " ".join(stage["reason"].split()),
        ]
        for stage in found["stages"]
    ]
    return table(["stage", "method", "state", "time", "size", "reason"], rows)


def _print_results(report: Path) -> None:
    """The table of results.json, if the report is there, and where the page is."""
    try:
        methods = json.loads((report / "results.json").read_bytes())["methods"]
    except FileNotFoundError:
        return
    rows = [
        [
            name,
            _interval(row["mean_reward"], row["mean_reward_ci95"], 3),
            _interval(row["win_rate"], row["win_rate_ci95"], 1),
            str(row["n"]),
        ]
        for name, row in methods.items()
    ]
    head = ["method", "mean reward [95 %]", "win rate % [95 %]", "n"]
    _print(f"{table(head, rows)}\n{report / 'index.html'}")


def _interval(value: float, bounds: Sequence[float], digits: int) -> str:
    low, high = bounds
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"

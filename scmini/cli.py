"""Words typed by a person, and the exit codes they get back.

    0 done   1 a fault of ours   2 usage or configuration   3 environment   4 out of memory
    5 data   6 stopped by a signal, progress kept   7 an outside service

Results go to stdout, everything else to stderr. Nothing here imports torch.
"""

import argparse
import json
import os
import shlex
import shutil
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scmini import chatting, doctor, download, pipeline, repair, verify
from scmini.arguments import build_parser
from scmini.config import Config
from scmini.config_file import config_to_yaml, load_config
from scmini.console import duration, mute, say, size, table, to_stderr, warn
from scmini.errors import (
    EnvironmentProblem,
    Interrupted,
    ScminiError,
    StoreDamaged,
    UsageError,
)
from scmini.exporting import pairs as export
from scmini.planning import plan, show
from scmini.planning.cards import local_card
from scmini.stage_graph import Task
from scmini.view import watching
from scmini.view.running import read_progress


def main(argv: Sequence[str] | None = None) -> int:
    """Do one command; returns the exit code."""
    try:
        arguments = build_parser().parse_args(argv)
        actions = {
            **{
                "run": _run,
                "status": _status,
                "plan": _plan,
                "verify": _verify,
                "repair": _repair,
                "chat": _chat,
            },
            **{"config": _config, "download": _download, "doctor": _doctor, "export": _export},
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
    planned = _look_ahead(config, arguments.config)
    finished = pipeline.run(
        config,
        run_dir,
        only=only,
        from_=arguments.from_,
        until=arguments.until,
        force=arguments.force,
        planned=planned,
    )
    if Task("report") in finished:  # else what lies there is of another configuration
        _print_results(run_dir / "report", config.grader)


def _look_ahead(config: Config, name: str | None) -> dict[Task, float]:
    """Of a run with a named model: say that there is no GPU, or which models are not here yet; it
    may go on all the same. Returns the planned seconds of its tasks, as far as they are known."""
    if config.model.model_name_or_path is None:
        return {}
    card = local_card()
    if card is None:
        warn("no GPU found: this will run on the CPU, where a 7B model takes weeks")
    missing = download.not_fetched(config)
    if missing:
        command = f"scmini download -c {name}" if name else "scmini download"
        say(f"from the hub, as they are needed: {', '.join(missing)}; beforehand: {command}")
    if card is None:
        return {}
    try:
        stages = plan.plan(config).on_cards[0].stages
    except ScminiError:  # a model whose sizes are not known: it is a help, no condition
        return {}
    return {each.task: each.seconds for each in stages if each.parts and each.seconds}


def _status(arguments: argparse.Namespace) -> None:
    config, run_dir = _existing(arguments)
    if arguments.watch and arguments.json:
        raise UsageError("--watch has no use with --json")
    if arguments.watch:
        watching.watch(
            lambda: pipeline.status(config, run_dir),
            lambda found: _status_table(found, narrow=_is_narrow()),
            running=lambda: read_progress(run_dir),
        )
        return
    found = pipeline.status(config, run_dir)
    _print(json.dumps(found, indent=1) if arguments.json else _status_table(found))


def _repair(arguments: argparse.Namespace) -> None:
    config, run_dir = _existing(arguments)
    done = repair.repair(config, run_dir, dry_run=arguments.dry_run)
    _print(json.dumps(repair.document(done), indent=1) if arguments.json else repair.text(done))
    if arguments.dry_run and done.damaged:
        raise StoreDamaged(
            f"{run_dir}: damaged; to set it aside: scmini repair -o {shlex.quote(str(run_dir))}"
        )


def _existing(arguments: argparse.Namespace) -> tuple[Config, Path]:
    """Configuration and folder of a run that is there, the demo's where none is named."""
    output = arguments.output
    if output is not None and arguments.config is None and not output.is_dir():
        raise UsageError(f"{output}: no such run folder; scmini run all -o {output} makes it")
    if output is None and arguments.config is None:
        output = Path("runs") / "demo"
    config = _load(arguments, output)
    return config, output or _default_folder(config)


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


def _download(arguments: argparse.Namespace) -> None:
    made = download.download(_load(arguments, None), dry_run=arguments.dry_run)
    _print(json.dumps(download.document(made), indent=1) if arguments.json else download.text(made))
    made.check()


def _doctor(arguments: argparse.Namespace) -> None:
    config = _load(arguments, arguments.output)
    found = doctor.examine(config, arguments.output or _default_folder(config))
    _print(json.dumps(doctor.document(found), indent=1) if arguments.json else doctor.text(found))
    if not doctor.passed(found):
        wrong = ", ".join(finding.name for finding in found if finding.state == "wrong")
        raise EnvironmentProblem(f"not as it should be: {wrong}")


def _chat(arguments: argparse.Namespace) -> None:
    chatting.chat(
        _run_of(arguments),
        arguments.method,
        arguments.versus,
        temperature=arguments.temperature,
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
        system=arguments.system,
    )


def _export(arguments: argparse.Namespace) -> None:
    kinds = {
        **{"pairs": _export_pairs, "adapter": _export_adapter, "merged": _export_merged},
        "report": _export_report,
    }
    kinds[arguments.kind](arguments)


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


def _export_adapter(arguments: argparse.Namespace) -> None:
    from scmini.exporting import models as export_model

    done = export_model.export_adapter(_run_of(arguments), arguments.method, **_target(arguments))
    _print(export_model.text(done))


def _export_merged(arguments: argparse.Namespace) -> None:
    from scmini.exporting import models as export_model

    done = export_model.export_merged(
        _run_of(arguments),
        arguments.method,
        dtype=arguments.dtype,
        max_shard_size=arguments.max_shard_size,
        check_prompts=arguments.check_prompts,
        **_target(arguments),
    )
    _print(export_model.text(done))


def _export_report(arguments: argparse.Namespace) -> None:
    from scmini.exporting import models as export_model

    done = export_model.export_report(_run_of(arguments), to=arguments.to, force=arguments.force)
    _print(export_model.text(done))


def _run_of(arguments: argparse.Namespace) -> Path:
    return arguments.output or Path("runs") / "demo"


def _target(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("to", "force", "push_to_hub", "private")
    return {name: getattr(arguments, name) for name in names}


def _load(arguments: argparse.Namespace, output: Path | None) -> Config:
    """The configuration: `-c`, else that of an existing run folder, else the embedded demo."""
    if output is not None and os.path.lexists(output) and not output.is_dir():
        raise UsageError(f"-o {output}: a file of this name is in the way; name a folder")
    name = arguments.config
    if name is None and output is not None and (output / "config.yaml").is_file():
        name = str(output / "config.yaml")
        say(f"no -c given: using the configuration of the run, {name}")
    elif name is None:
        verb = "running" if arguments.command == "run" else "taking"
        changed = " with what --set changes" if arguments.overrides else ""
        say(f"no -c given: {verb} the embedded demo (configs/demo.yaml){changed}")
    return load_config(name, arguments.overrides)


def _default_folder(config: Config) -> Path:
    return Path("runs") / config.name


def _status_table(found: dict[str, Any], *, narrow: bool = False) -> str:
    rows = []
    for stage in found["stages"]:
        seconds = duration(stage["seconds"]) if stage["seconds"] is not None else ""
        taken = size(stage["bytes"]) if stage["bytes"] is not None else ""
        reason = " ".join(stage["reason"].split())
        row = [stage["name"], stage["method"] or "", stage["state"]]
        rows.append([*row, reason or seconds] if narrow else [*row, seconds, taken, reason])
    last = ["time or reason"] if narrow else ["time", "size", "reason"]
    return table(["stage", "method", "state", *last], rows)


def _is_narrow() -> bool:
    """Whether stdout is a terminal that has no room for all columns."""
    return sys.stdout.isatty() and shutil.get_terminal_size().columns < 100


def _print_results(report: Path, grader: str) -> None:
    """The table of results.json, if the report is there, in its page's units, and where that is."""
    try:
        methods = json.loads((report / "results.json").read_bytes())["methods"]
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError):
        raise StoreDamaged(
            f"{report / 'results.json'}: damaged; scmini repair -o "
            f"{shlex.quote(str(report.parent))} sets it aside, and the next run makes it anew"
        ) from None
    from scmini.evaluation.report.wording import unit_of

    unit = unit_of(grader)
    grades = {
        f"mean reward{unit.range} [95 %]": ("mean_reward", unit.scale, unit.digits),
        "win rate % [95 %]": ("win_rate", 1, 1),
    }
    graded = any(row["win_rate"] is not None for row in methods.values())
    measured = dict.fromkeys(name for row in methods.values() for name in row["benchmarks"])
    head = ["method", *grades] if graded else ["method"]
    rows = []
    for name, row in methods.items():
        cells = [
            _interval(row[key], row[f"{key}_ci95"], digits, scale)
            for key, scale, digits in grades.values()
            if graded
        ]
        cells += [_benchmark(row["benchmarks"].get(each)) for each in measured]
        rows.append([name, *cells, str(row["n"])])
    _print(f"{table([*head, *measured, 'n'], rows)}\n{report / 'index.html'}")


def _benchmark(found: dict[str, Any] | None) -> str:
    """A score with its interval, and how many answers got none."""
    if found is None or found["value"] is None:
        return "-"
    text = _interval(found["value"], found["ci95"], 2)
    return f"{text}, {found['failed']} failed" if found["failed"] else text


def _interval(
    value: float | None, bounds: Sequence[float] | None, digits: int, scale: float = 1
) -> str:
    if value is None:
        return "-"
    if bounds is None:
        return f"{scale * value:.{digits}f}"
    low, high = bounds
    return f"{scale * value:.{digits}f} [{scale * low:.{digits}f}, {scale * high:.{digits}f}]"

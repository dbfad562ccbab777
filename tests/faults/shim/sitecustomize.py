"""Loaded by every Python process that has this folder on its path: faults at named steps.

A step is a change of the file system below the watched folder: opening a file for writing, rename,
remove, mkdir, symlink, truncate, fsync. Each is appended to a log, `role <tab> task <tab> step`;
at the one that the plan names, the fault happens, before the step does.

SCMINI_FAULTS names a JSON file, see `fault_plan.Plan`. Without it nothing is touched.
"""

import json
import os
import re
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

FOLDER = re.compile(
    r"\.store/\.?(?P<task>[a-z][a-zA-Z0-9-]*?)-[0-9a-f]{12}(?P<kind>\.[a-z]+(-\d+)?)?(?P<rest>/.*)?"
)
KINDS = {".partial": "work", ".old": "replaced", ".lock": "lock", None: "final"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
WORDS = {"os.mkdir": "mkdir", "os.remove": "remove", "os.rmdir": "remove", "os.symlink": "link"}
METHODS = re.compile(r"(self-contrast-\d+|sft-continued|spin-\d+|spin|dpo|sft)(?=$|[./])")
MODELS = re.compile(r"(/\.?(?:checkpoint-N|adapter|model|reward_model)(?:\.tmp)?)/.*")
SEALING = re.compile(r"fsync work/(?!log/seals)((?!\.[^/]*\.tmp).)*|remove work/scratch/.*")
"""What happens to every file when a stage is sealed."""
PASSING = ".progress.json"
"""What a second terminal shows: written now and then."""
OWN = ("config.yaml", "run.json", "lock")


def role_of(arguments: list[str]) -> str | None:
    """`run` for the command that a person types, `stage` for the process of a stage."""
    if "scmini.worker" in arguments:
        return "stage"
    return "run" if "scmini" in arguments else None


def named(path: str) -> tuple[str, str]:
    """The task that a path in the store belongs to, and the path without what differs by run."""
    found = FOLDER.fullmatch(path)
    if not found:
        return "", _named_in_run(path)
    kind = KINDS.get(found["kind"], (found["kind"] or "").strip(".0123456789-"))
    rest = re.sub(r"(?<=[-.])\d+", "N", METHODS.sub("METHOD", found["rest"] or ""))
    if found["task"] == "report" and rest and not re.match(r"/(log|\.?manifest)", rest):
        rest = "/.page.tmp" if rest.endswith(".tmp") else "/page"
    return found["task"], kind + MODELS.sub(r"\1/*", rest)


def _named_in_run(path: str) -> str:
    """All links are one, and so are all jobs: which there are depends on the methods."""
    if path == ".store":
        return "store"
    name = path.rpartition("/")[2]
    if "/" not in path:
        return "run"
    if name.startswith(".job-"):
        return "run/.job.json"
    if name.removeprefix(".").removesuffix(".tmp") in OWN:
        return f"run/{name}"
    return "run/.link.tmp" if name.endswith(".tmp") else "run/link"


class Injector:
    """Logs the steps of this process, and does what the plan says."""

    def __init__(self, plan: dict[str, Any], role: str) -> None:
        self.plan, self.role = plan, role
        self.root = plan["root"].rstrip("/") + "/"
        self.log = os.open(plan["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.left = plan["count"]
        self.busy = False

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        """See `sys.addaudithook`; what it raises ends the step."""
        if event == "open" and _opens_for_writing(arguments):
            self.step("open", arguments[0])
        elif event == "os.rename":
            self.step("rename", arguments[0], arguments[1])
        elif event in WORDS:
            path = arguments[1] if event == "os.symlink" else arguments[0]
            folder = arguments[1] if event in ("os.remove", "os.rmdir") else -1
            self.step(WORDS[event], path, folder=folder)

    def fsync(self, number: int) -> None:
        """Stands for os.fsync."""
        self.step("fsync", os.readlink(f"/proc/self/fd/{number}"))
        fsync(number)

    def step(self, what: str, *paths: Any, folder: int = -1) -> None:
        if self.busy or not isinstance(paths[0], str | bytes | os.PathLike):
            return
        whole = [os.fsdecode(os.fspath(path)) for path in paths]
        if folder is not None and folder >= 0:
            whole = [os.path.join(os.readlink(f"/proc/self/fd/{folder}"), whole[0])]
        whole = [os.path.abspath(path) for path in whole]
        if not whole[0].startswith(self.root) or PASSING in whole[0]:
            return
        found = [named(path.removeprefix(self.root)) for path in whole]
        task, step = found[0][0], f"{what} {' -> '.join(name for _, name in found)}"
        if SEALING.fullmatch(step):
            step = step.partition("work/")[0] + "work/*"
        os.write(self.log, f"{self.role}\t{task}\t{step}\n".encode())
        wanted = self.plan
        if (wanted["role"], wanted["step"]) == (self.role, step) and wanted["task"] in ("*", task):
            self.left -= 1
            if self.left == 0:
                os.write(self.log, f"{self.role}\t{task}\tFAULT\n".encode())
                self.fault(whole[0])

    def fault(self, path: str) -> None:
        act = self.plan["act"]
        if act == "fail":
            raise OSError(self.plan["errno"], os.strerror(self.plan["errno"]), path)
        if act == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.plan["bytes"],) * 2)
        elif act == "pause":
            self._wait(Path(self.plan["log"] + ".paused"), Path(self.plan["log"] + ".go"))
        elif self.plan["delay"]:
            threading.Timer(self.plan["delay"], self._signal).start()
        else:
            self._signal()

    def _wait(self, paused: Path, go: Path) -> None:
        self.busy = True
        paused.touch()
        end = time.monotonic() + 120
        while not go.exists() and time.monotonic() < end:
            time.sleep(0.02)
        self.busy = False

    def _signal(self) -> None:
        """Signal the stage, the run, or both; the target is there only if its process is."""
        stage = self.role == "stage"
        targets = {"stage": [os.getpid()] if stage else [], "run": [os.getppid()] if stage else []}
        if not stage:
            targets["run"] = [os.getpid()]
        whom = self.plan["target"]
        for pid in targets["run"] + targets["stage"] if whom == "both" else targets[whom]:
            os.kill(pid, getattr(signal, self.plan["signal"]))


def _opens_for_writing(arguments: tuple[Any, ...]) -> bool:
    path, mode, flags = arguments
    if not isinstance(path, str | bytes | os.PathLike):
        return False
    if mode is not None:
        return any(letter in mode for letter in "wax+")
    return bool((flags or 0) & WRITING)


def hide(names: tuple[str, ...]) -> None:
    """Let libraries seem missing."""
    sys.modules.update(dict.fromkeys(names))  # type: ignore[arg-type]


if "SCMINI_FAULTS" in os.environ and (role := role_of(sys.orig_argv)):
    # What others import if it is there, and this run does not need: half of a process's time.
    hide(("bitsandbytes", "datasets"))
    if not sys.orig_argv[-1].endswith(".job-embed.json"):
        hide(("sklearn", "scipy"))
    injector = Injector(json.loads(Path(os.environ["SCMINI_FAULTS"]).read_bytes()), role)
    fsync, os.fsync = os.fsync, injector.fsync
    sys.addaudithook(injector.hook)

"""One run in real processes at the smallest size, and what two of them are compared by."""

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scmini.partial import MANIFEST
from scmini.store import Store, sha256_of

ROOT = Path(__file__).resolve().parents[2]
SHORT = ("sft", "self-contrast-1")
LONG = ("sft", "sft-continued", "dpo", "spin", "self-contrast-1", "self-contrast-2")
SETTINGS = {
    "model.load_in_4bit": "false",
    **{"base.vocab_size": 400, "base.hidden_size": 64, "base.intermediate_size": 64},
    **{"base.num_hidden_layers": 1, "base.num_attention_heads": 2, "base.num_key_value_heads": 1},
    **{"base.save_steps": 10, "base.dialogues_per_step": 16, "data.num_pretraining": 640},
    **{"data.num_train": 24, "data.num_test": 6},
    **{"sft.num_train_epochs": 1, "sft.prompts_per_step": 8, "sft.save_steps": 1},
    **{"sample.n": 6, "sample.num_prompts": 12, "sample.max_new_tokens": 32},
    **{"sample.shard_size": 3, "sample.batch_size": 6, "filter.keep_fraction": 1.0},
    **{"dpo.prompts_per_step": 4, "dpo.save_steps": 1, "dpo.num_train_epochs": 1},
    **{"generate.max_new_tokens": 16, "report.bootstrap_samples": 100},
}
CONTINUED = {
    **{"sft_continued.num_prompts": 16, "sft_continued.num_train_epochs": 1},
    **{"sft_continued.prompts_per_step": 8, "sft_continued.save_steps": 1},
}
TIMES = re.compile(r"^train_|perf/|memory/|runtime|per_second")
NOTES = ("peak_gib", "device")
UNITS = re.compile(
    r"rename work/(scratch/)?\.(part-N\.(parquet|npy|jsonl)|checkpoint-N)\.tmp -> .*"
)
"""The steps with which a shard or a checkpoint is there."""


@dataclass(frozen=True)
class Plan:
    """What tests/faults/shim/sitecustomize.py does in the processes of a run."""

    root: str
    """Steps below this folder count."""
    log: str
    role: str = ""
    """`run` or `stage`: whose step it is."""
    task: str = "*"
    step: str = ""
    count: int = 1
    """The fault happens at so many such steps."""
    act: str = "signal"
    """`signal`, `fail`, `limit` or `pause`."""
    signal: str = "SIGKILL"
    target: str = "stage"
    """`stage`, `run` or `both`."""
    delay: float = 0.0
    """Seconds from the step to the signal."""
    errno: int = 0
    bytes: int = 0
    """Limit of the size of a file, from the step on."""


@dataclass
class Ended:
    """A command that ended."""

    code: int
    output: str
    hit: bool
    """Whether the fault of its plan happened."""


class TinyRun:
    """A run folder with its store in a folder of their own."""

    def __init__(self, root: Path, methods: tuple[str, ...], name: str = "toy") -> None:
        self.root, self.path, self.methods = root, root / "disk" / name, methods
        self.store = Store(root / "disk" / ".store")
        (root / "disk").mkdir(parents=True, exist_ok=True)
        self.log = root / "steps"
        self.log.touch()

    def moved(self, to: Path) -> "TinyRun":
        """The same elsewhere. Runs are compared that were at the same place: adapters name it."""
        self.root.rename(to)
        return TinyRun(to, self.methods, self.path.name)

    def plan(self, **what: Any) -> Plan:
        return Plan(root=str(self.root / "disk"), log=str(self.log), **what)

    def start(
        self, *words: str, plan: Plan | None = None, sets: bool = True
    ) -> "subprocess.Popen[str]":
        """`scmini WORDS` for this run; without a plan its steps are only logged."""
        more = CONTINUED if "sft-continued" in self.methods else {}
        keys = {"methods": f"[{', '.join(self.methods)}]", "name": "toy", **SETTINGS, **more}
        texts = [text for key, value in keys.items() for text in ("--set", f"{key}={value}")]
        chosen = ["-c", "demo", *texts] if sets else []
        (self.root / "plan.json").write_text(json.dumps(asdict(plan or self.plan())))
        shim = Path(__file__).parent / "shim"
        paths = [str(shim), str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        environment = {
            **{k: v for k, v in os.environ.items() if k != "SCMINI_STORE"},
            **{"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"},
            **{"OMP_NUM_THREADS": "1", "SCMINI_FAULTS": str(self.root / "plan.json")},
        }
        return subprocess.Popen(
            [sys.executable, "-m", "scmini", *words, "-o", str(self.path), *chosen],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # Shells start what runs in the background with SIGINT ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def end(self, process: "subprocess.Popen[str]", before: int) -> Ended:
        output, _ = process.communicate(timeout=600)
        hit = any(line.endswith("\tFAULT") for line in self.steps()[before:])
        return Ended(process.returncode, output, hit)

    def do(self, *words: str, plan: Plan | None = None, sets: bool = True) -> Ended:
        """Run a command to its end."""
        before = len(self.steps())
        return self.end(self.start(*words, plan=plan, sets=sets), before)

    def steps(self) -> list[str]:
        """role <tab> task <tab> step, of all commands so far."""
        return self.log.read_text().splitlines()

    def units(self) -> Counter[str]:
        """Shards and checkpoints that were finished, by task, over all commands so far."""
        rows = (line.split("\t") for line in self.steps())
        whole = (row for row in rows if len(row) == 3)  # a limited file size tears a row of the log
        return Counter(task for _, task, step in whole if UNITS.fullmatch(step))

    def partials(self) -> list[Path]:
        return sorted(self.store.root.glob(".*.partial"))

    def folders(self) -> list[Path]:
        """Finished stages."""
        return sorted(p for p in self.store.root.glob("[a-z]*") if ".damaged-" not in p.name)


def task_of(folder: Path) -> str:
    """`sft-sft-continued` of `.sft-sft-continued-0123456789ab.partial`."""
    return folder.name.removesuffix(".partial").removeprefix(".")[:-13]


def result(run: TinyRun) -> dict[str, Any]:
    """All that a run made, without times: what must not depend on faults."""
    record = json.loads((run.path / "run.json").read_bytes())
    found: dict[str, Any] = {"run.json": record}
    for task, entry in record["stages"].items():
        finished = run.store.load(entry["folder"])
        assert finished is not None, task
        run.store.verify(finished)
        notes = {k: v for k, v in finished.manifest["notes"].items() if k not in NOTES}
        found[task] = {"counts": finished.manifest["counts"], "notes": notes}
        for name in finished.manifest["files"]:
            if (content := _content(finished.path / name, name)) is not None:
                found[f"{task}/{name}"] = content
    for link in sorted(p for p in run.path.rglob("*") if p.is_symlink()):
        found[f"link {link.relative_to(run.path)}"] = os.readlink(link)
    return found


def _content(path: Path, name: str) -> Any:
    """What is compared of a file; None where it holds nothing but times."""
    if name.startswith("log/") or name == "index.html" or path.suffix in (".png", ".bin"):
        return None
    if path.name == "metrics.jsonl":
        rows = map(json.loads, path.read_text().splitlines())
        return [{k: v for k, v in row.items() if not TIMES.search(k)} for row in rows]
    if path.name == "trainer_state.json":
        rows = json.loads(path.read_bytes())["log_history"]
        return [{k: v for k, v in row.items() if not TIMES.search(k)} for row in rows]
    if name == "results.json":
        results = json.loads(path.read_bytes())
        for key in ("stages", "device"):
            del results[key]
        return _without_times(results)
    if name == "results.csv":
        return None  # the same rows
    return sha256_of(path)


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_times(v) for k, v in value.items() if k not in ("seconds", "peak_gib")}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def leftovers(run: TinyRun) -> list[str]:
    """What no run may leave behind."""
    names = [p for p in run.root.joinpath("disk").rglob("*") if p.name != MANIFEST]
    return sorted(
        str(p.relative_to(run.root))
        for p in names
        if p.name.endswith((".tmp", ".partial", ".old", ".lock"))
        or p.name.startswith(".job-")
        or p.name in ("forced", "sessions.json")
    )

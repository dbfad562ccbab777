"""Small stand-ins for the stages, run in real child processes, and how tests speak of them."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from scmini import pipeline
from scmini.config import Config
from scmini.config_file import parse_config
from scmini.stage_graph import Task

WORKER = '''
"""A worker whose stages write a digest of what they read instead of thinking."""
import hashlib, json, os, signal, sys, time
from pathlib import Path
from scmini import console, worker
from scmini.config import methods_with_pairs
from scmini.sections import Section, recipe_section
from scmini.errors import DataError
from scmini.stage_graph import Task, inputs, sections

def digest_of_all(config, folders, work, task):
    seen = [recipe_section(getattr(config, name)) for name in sections(task)] + [work.method]
    for key, source in sorted(inputs(config, task).items()):
        for pattern in source.patterns:
            for path in sorted(folders[key].glob("**/*" if pattern == "*" else pattern)):
                if path.is_file() and path.name not in ("manifest.json", "metrics.jsonl"):
                    seen.append(hashlib.sha256(path.read_bytes()).hexdigest())
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()

def load(name):
    def run(config, folders, work):
        task = Task(name, work.method)
        text = digest_of_all(config, folders, work, task)
        log = Path(os.environ["FAKE_LOG"])
        with open(log, "a") as handle:
            handle.write(f"{task.key} {os.getpid()}\\n")
        print("library noise of", task.key)
        behave(task, config, work)
        def write(path, content=text):
            (work.path / path).parent.mkdir(parents=True, exist_ok=True)
            (work.path / path).write_text(content)
        for path in FILES[name]:
            write(path)
        if name == "filter":
            for method in methods_with_pairs(config, work.method):
                write(f"pairs/{method}.jsonl", text + method)
        if name == "reference":
            for path in (folders["filter"] / "pairs").iterdir():
                write(f"by-method/{path.stem}.parquet", path.read_text())
        console.progress(1, 1, "steps", loss=0.5)
    return run

FILES = {
    "data": ["train.jsonl", "test.jsonl", "corpus.jsonl"], "base": ["model/config.json"],
    "sft": ["adapter/a", "metrics.jsonl"], "sample": ["part-00000.parquet"],
    "embed": ["part-00000.npy"], "filter": ["similarity/part-0.parquet", "used.jsonl"],
    "reference": ["logps.parquet"], "dpo": ["adapter/a"], "generate": ["generations.jsonl"],
    "reward": ["rewards.jsonl"], "benchmark": ["scores.json", "mt_bench/answers.jsonl"],
    "judge": ["scores.json"], "report": ["index.html", "results.json"],
}

def behave(task, config, work):
    what = json.loads(os.environ.get("FAKE_BEHAVIOUR", "{}")).get(task.key)
    if what == "crash":
        raise RuntimeError("out \\x1b[31mof ideas")
    if what == "data":
        raise DataError("rows.jsonl, line 3: field 'id' is missing")
    if what == "memory":
        raise MemoryError
    if what == "import":
        import package_that_is_not_there
    if what == "segfault":
        os.kill(os.getpid(), 11)
    if what == "sleep" and not (work.path / "shard-0").exists():
        (work.path / "shard-0").write_text("half of the work")
        console.say("asleep")
        time.sleep(60)
    if what == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (work.path / "shard-0").write_text("half of the work")
        time.sleep(60)

worker.load_stage = load
sys.exit(worker.main(Path(sys.argv[1])))
'''
METHODS = ["sft", "sft-continued", "dpo", "self-contrast-1", "self-contrast-4"]


def config(*overrides: str) -> Config:
    return parse_config("", "x", [f"methods={json.dumps(METHODS)}", "name=toy", *overrides])


def states(found: dict[str, Any]) -> dict[str, str]:
    keys = (Task(row["name"], row["method"]).key for row in found["stages"])
    return dict(zip(keys, (row["state"] for row in found["stages"]), strict=True))


def behave(monkeypatch: pytest.MonkeyPatch, **how: str) -> None:
    monkeypatch.setenv(
        "FAKE_BEHAVIOUR", json.dumps({k.replace("__", ":"): v for k, v in how.items()})
    )


def put_in_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let runs use the stand-ins for the stages; returns the file in which they put their keys."""
    (folder / "worker.py").write_text(WORKER)
    log = folder / "executed"
    log.touch()
    monkeypatch.setenv("FAKE_LOG", str(log))
    monkeypatch.delenv("FAKE_BEHAVIOUR", raising=False)
    monkeypatch.delenv("SCMINI_STORE", raising=False)
    monkeypatch.setattr(pipeline, "WORKER", [sys.executable, str(folder / "worker.py")])
    return log

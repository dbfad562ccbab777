"""An "interpreter" that stands for an environment with vLLM: it speaks the engine's protocol.

`FAKE_VLLM` names a JSON file that says how to behave:

    vllm        whether the environment has it
    greeting    what its Python prints whenever it starts
    memory      [[free, total] bytes of each GPU], or one such list for each time it is asked
    start       errors of the first starts, one each; after them it starts
    poison      tokens that kill the engine
    refuse      tokens that are refused
    die_after   answers after which it dies, each time
    silent      tokens at which it stops saying anything, beats included
"""

import json
import os
import stat
import sys
import time
from pathlib import Path
from typing import Any


def install(folder: Path, **behaviour: Any) -> Path:
    """The executable; what it is told and asked goes to lines of folder/log."""
    told = folder / "behaviour.json"
    told.write_text(json.dumps({"vllm": True, "memory": []} | behaviour))
    made = folder / "python"
    made.write_text(f'#!/bin/sh\nFAKE_VLLM={told} exec {sys.executable} {__file__} "$@"\n')
    made.chmod(made.stat().st_mode | stat.S_IXUSR)
    return made


def log(folder: Path) -> list[dict[str, Any]]:
    path = folder / "log"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _note(**entry: Any) -> None:
    with open(Path(os.environ["FAKE_VLLM"]).with_name("log"), "a") as handle:
        handle.write(json.dumps(entry) + "\n")


def _times(kind: str) -> int:
    return sum(entry["kind"] == kind for entry in log(Path(os.environ["FAKE_VLLM"]).parent))


def _probe(behaviour: dict[str, Any]) -> None:
    memory = behaviour["memory"]
    if memory and isinstance(memory[0][0], list):
        memory = memory[min(_times("probe"), len(memory) - 1)]
    _note(kind="probe")
    print(json.dumps({"vllm": behaviour["vllm"], "memory": memory}))


def _serve(behaviour: dict[str, Any]) -> None:
    job = json.loads(sys.stdin.readline())
    errors = behaviour.get("start", [])
    starts = _times("start")
    _note(kind="start", job=job)
    if starts < len(errors):
        _say({"error": errors[starts]})
        sys.exit(1)
    _say({"ready": {"vllm": "fake", "device": "fake"}})
    answered = 0
    for line in sys.stdin:
        request = json.loads(line)
        _note(kind="request", **request)
        prompt = request["prompt"]
        if set(prompt) & set(behaviour.get("poison", [])) or answered == behaviour.get("die_after"):
            os._exit(9)
        if set(prompt) & set(behaviour.get("refuse", [])):
            _say({"id": request["id"], "refused": "no such token"})
            continue
        if set(prompt) & set(behaviour.get("silent", [])):
            time.sleep(3600)
        _say({"beat": True})
        end = job["stop_token_ids"][0]
        answers = [[[*prompt[-1:], 5 + i, end], "stop"] for i in range(request["n"])]
        _say({"id": request["id"], "answers": answers})
        answered += 1
    _say({"ended": {"peak_gib": 1.5}})


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    settings = json.loads(Path(os.environ["FAKE_VLLM"]).read_text())
    print(settings.get("greeting", ""), end="", flush=True)
    (_probe if sys.argv[1] == "-c" else _serve)(settings)

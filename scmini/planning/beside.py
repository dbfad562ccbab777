"""The plan that the report puts beside what was used: on the card that the stages ran on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scmini.config import Config
from scmini.errors import ScminiError
from scmini.planning import cards
from scmini.planning.plan import BENCH, on_card, subject_of
from scmini.planning.workload import workload
from scmini.store import write_atomic

PLAN = "plan.json"


def write_plan(config: Config, inputs: Mapping[str, Path], folder: Path) -> None:
    """Write plan.json, as the stage `report` reads it in its own folder.

    Args:
        inputs: finished folders of the stages, whose manifests name the device they ran on.
    """
    document = json.dumps(plan_beside(config, _devices(inputs)), indent=1)
    write_atomic(folder / PLAN, document.encode())


def plan_beside(config: Config, devices: set[str]) -> dict[str, Any]:
    """{"gpu", "stages": {key: {"seconds", "peak_gib"}}}, or {"reason": why there is no plan}.

    Args:
        devices: graphics cards that stages ran on, by the names that torch has for them.
    """
    if not devices:
        return {"reason": "plans are made for graphics cards, and this run used none"}
    if len(devices) > 1:
        return {"reason": f"the stages ran on different cards: {', '.join(sorted(devices))}"}
    (device,) = devices
    here = cards.local_card()
    if here is None or cards.recognised(device, here.memory_gib).name != here.name:
        return {"reason": f"the stages ran on {device}, which is not in this machine now"}
    try:
        subject = subject_of(config, workload(config, None, None))
        found = on_card(subject, cards.with_measurements(here, BENCH))
    except ScminiError as error:
        return {"reason": str(error).splitlines()[0].rstrip(".")}
    stages = {
        each.task.key: {"seconds": each.seconds, "peak_gib": round(each.peak / cards.GIB, 3)}
        for each in found.stages
        if each.parts
    }
    return {"gpu": here.name, "stages": stages}


def _devices(inputs: Mapping[str, Path]) -> set[str]:
    """Without "cpu"."""
    names = set()
    for folder in inputs.values():
        manifest = json.loads((folder / "manifest.json").read_bytes())
        names.add(str(manifest["notes"].get("device") or "cpu"))
    return names - {"cpu"}

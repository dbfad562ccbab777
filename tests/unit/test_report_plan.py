"""The plan that stands beside what a run used: for the card it ran on, or the reason why not."""

import json
from pathlib import Path

import pytest

from scmini.config import Config
from scmini.planning import beside, cards
from scmini.stages.report import PLAN, read_plan

NAMED = {
    "name": "named",
    "methods": ["sft", "dpo", "self-contrast-4"],
    "model": {"model_name_or_path": "mistralai/Mistral-7B-v0.1"},
    "data": {"format": "jsonl", "path": "nowhere.jsonl"},
    "reward": {"grader": "none"},
}
CARD = "NVIDIA GeForce RTX 4090"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "local_card", lambda: cards.recognised(CARD, 23.99))


@pytest.mark.usefixtures("here")
def test_stages_with_a_card_have_a_plan(tmp_path: Path) -> None:
    folders = {}
    for number, device in enumerate(("cpu", CARD, None)):
        folders[str(number)] = tmp_path / str(number)
        folders[str(number)].mkdir()
        manifest = {"notes": {"device": device} if device else {}}
        (folders[str(number)] / "manifest.json").write_text(json.dumps(manifest))
    config = Config.model_validate(NAMED)
    beside.write_plan(config, folders, tmp_path)
    plan = read_plan(tmp_path)
    assert plan["gpu"] == "rtx-4090"
    assert {"sft", "sample", "reference", "dpo:dpo", "generate:sft"} <= set(plan["stages"])
    assert not {"data", "filter", "report"} & set(plan["stages"])  # they need no card
    assert 5 < plan["stages"]["dpo:dpo"]["peak_gib"] < 24
    assert plan["stages"]["dpo:self-contrast-4"]["seconds"] > 3600
    assert beside.PLAN == PLAN


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("devices", "change", "reason"),
    [
        (set(), {}, "this run used none"),
        ({CARD, "NVIDIA L4"}, {}, f"different cards: {CARD}, NVIDIA L4"),
        ({"NVIDIA L4"}, {}, "ran on NVIDIA L4, which is not in this machine now"),
        ({CARD}, {"model": {"model_name_or_path": "no/such-model"}}, "model.model_name_or_path"),
    ],
)
def test_why_there_is_no_plan(devices: set[str], change: dict[str, object], reason: str) -> None:
    found = beside.plan_beside(Config.model_validate({**NAMED, **change}), devices)
    assert set(found) == {"reason"}
    assert reason in found["reason"]


def test_no_plan_was_made(tmp_path: Path) -> None:
    assert read_plan(tmp_path) == {"reason": "none was made for this run"}

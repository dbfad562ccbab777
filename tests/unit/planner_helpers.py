"""A 7B configuration for the planner's tests, and a machine without a GPU."""

from pathlib import Path

import pytest

from scmini.config import Config
from scmini.config_file import config_to_yaml, parse_config
from scmini.planning.cards import CARDS
from scmini.planning.plan import subject_of
from scmini.planning.stages import Subject
from scmini.planning.workload import workload

SEVEN = [
    "name=seven",
    "model.model_name_or_path=mistralai/Mistral-7B-v0.1",
    "embed.encoder=WhereIsAI/UAE-Large-V1",
    "reward.model_name_or_path=berkeley-nest/Starling-RM-7B-alpha",
    "data.format=jsonl",
    "data.path=not-there.jsonl",
    "data.num_train=20000",
    "sample.n=32",
    "methods=[sft, dpo, spin, self-contrast-1, self-contrast-16]",
]
CARD = CARDS["rtx-4090"]


def seven(*overrides: str) -> Config:
    return parse_config("", "test", [*SEVEN, *overrides])


def written(config: Config) -> str:
    Path("seven.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    return "seven.yaml"


def subject(*overrides: str, prompt: int = 128, response: int = 256) -> Subject:
    config = seven(*overrides)
    return subject_of(config, workload(config, prompt, response))


@pytest.fixture
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a GPU on which nothing was downloaded."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.chdir(tmp_path)

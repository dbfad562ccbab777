"""A finished run of tiny models, as the stages leave it, for the tests of exported models."""

import json
from pathlib import Path
from typing import Any

import torch
from training_helpers import dialogues, write_model

from scmini.config import Config
from scmini.models import loading
from scmini.records import Example, Pair, write_examples, write_jsonl
from scmini.run_folder import RunFolder
from scmini.sections import recipe_section
from scmini.stage_graph import Task, tasks
from scmini.store import Finished, Recipe, Store, digest_of

METHOD = "self-contrast-2"
ADAPTER = ("adapter/*",)


def config(base: Path | None = None, **sections: Any) -> Config:
    model: dict[str, Any] = {"load_in_4bit": False, "dtype": "float32", "max_length": 128}
    return Config.model_validate(
        {
            **{"name": "toy", "methods": ["sft", METHOD, "sft-temperature-0.3"]},
            "model": model | ({"model_name_or_path": str(base)} if base else {}),
            "reward": {"grader": "none"} if base else {},
            "sft": {"lora_r": 4, "lora_alpha": 8},
            **sections,
        }
    )


class MadeRun:
    """A run folder beside its store. Stages are sealed and linked by scmini's own code."""

    def __init__(self, root: Path, config: Config) -> None:
        self.config, self.path = config, root / "toy"
        self.store = Store(root / ".store")
        self.folder = RunFolder(self.path)
        self.folder.begin(config, tasks(config))
        self.done: dict[Task, Finished] = {}

    def stage(
        self, task: Task, write: Any, settings: dict[str, Any], inputs: dict[str, str]
    ) -> Finished:
        sources = {}
        name = self.config.model.model_name_or_path
        if task.stage in ("sft", "dpo") and name and not Path(name).is_dir():
            sources["model.model_name_or_path"] = f"{name}@main"
        recipe = Recipe(task.stage, task.method, 1, settings, sources, inputs)
        with self.store.building(recipe) as work:
            assert work is not None
            write(work)
        found = self.store.find(recipe)
        assert found is not None
        self.folder.finish(task, found)
        self.done[task] = found
        return found

    def digest(self, task: Task, *patterns: str) -> str:
        return digest_of(self.done[task].manifest, patterns)


def make_run(root: Path, config: Config, source: Path | None = None) -> MadeRun:
    """All stages that exports read.

    Args:
        source: where the base model really is, if the configuration names one on the hub.
    """
    run = MadeRun(root, config)
    data = Task("data")
    settings = {"data": recipe_section(config.data), "seed": 0}
    run.stage(data, _data, settings, {})
    inputs = {"data": run.digest(data, "train.jsonl")}
    if config.model.model_name_or_path is None:
        base = run.stage(
            Task("base"), lambda work: write_model(work.path / "model"), {"base": {}}, {}
        )
        inputs["base"] = run.digest(Task("base"), "model/*")
        source = base.path / "model"
    source = source or Path(str(config.model.model_name_or_path))
    model = {"model": recipe_section(config.model)}
    _train(run, Task("sft"), source, 1, model | {"sft": recipe_section(config.sft)}, inputs)
    pairs = f"pairs/{METHOD}.jsonl"
    run.stage(Task("filter"), lambda work: _pairs(work.path / pairs), {"filter": {}}, {})
    inputs = inputs | {"filter": run.digest(Task("filter"), pairs)}
    dpo = Task("dpo", METHOD)
    _train(run, dpo, source, 2, model | {"dpo": recipe_section(config.dpo)}, inputs)
    judged = {f"train:{m}": Task("sft") for m in config.methods} | {f"train:{METHOD}": dpo}
    inputs = {key: run.digest(task, *ADAPTER) for key, task in judged.items()}
    run.stage(Task("report"), lambda work: _report(work, config), {"report": {}}, inputs)
    return run


def _data(work: Any) -> None:
    rows = [
        Example(f"e{i}", row["messages"][:1], row["messages"][1]["content"])
        for i, row in enumerate(dialogues(14))
    ]
    write_examples(work.path / "train.jsonl", rows[:8])
    write_examples(work.path / "test.jsonl", rows[8:])
    work.note("rows", {"train": 8, "test": 6})
    work.count("target longer than <data.max_target_chars>", 3)


def _pairs(path: Path) -> None:
    ask = [{"role": "user", "content": "Who?"}]
    rows = [Pair(f"e{i}", ask, "A fox.", ["No.", "Yes."], [0.1, 0.2], [0, 1]) for i in range(5)]
    path.parent.mkdir(parents=True)
    write_jsonl(path, rows)


def _train(
    run: MadeRun,
    task: Task,
    source: Path,
    seed: int,
    settings: dict[str, Any],
    inputs: dict[str, str],
) -> None:
    def write(work: Any) -> None:
        save_random_adapter(run.config, str(source), work.path / "adapter", seed)
        rows = [{"step": 1, "loss": 0.9}, {"step": 2, "loss": 0.5, "rewards/margins": 1.25}]
        write_jsonl(work.path / "metrics.jsonl", rows)
        work.note("steps", 2)
        work.note("device", "cpu")

    run.stage(task, write, settings | {"seed": 0}, inputs)


def save_random_adapter(config: Config, source: str, folder: Path, seed: int = 1) -> Path:
    """A LoRA adapter on every linear layer, with a B that is not zero, and the tokenizer."""
    model = loading.fresh_adapter(config.model, source, config.sft, seed=seed)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    loading.save_adapter(model, folder, loading.load_tokenizer(source))
    return folder


def _report(work: Any, config: Config) -> None:
    row = {
        **{"win_rate": 61.25, "win_rate_ci95": [55.5, 66.5], "mean_length": 41.2, "n": 6},
        **{"mean_reward": 0.75, "mean_reward_ci95": [0.5, 0.9], "training": {}},
    }
    ungraded = row | dict.fromkeys(("win_rate", "win_rate_ci95", "mean_reward"), None)
    bench = {"metric": "exact | match", "value": 12.5, "ci95": [1.0, 30.0], "n": 8, "failed": 1}
    bench = {"gsm8k": bench, "mt-bench": bench | {"value": None, "ci95": None}}
    results = {
        "grader": "program",
        "methods": {
            "targets": row,
            "sft": ungraded,
            METHOD: row | {"benchmarks": bench},
            "sft-temperature-0.3": row,
        },
        "config": config.model_dump(mode="json"),
    }
    (work.path / "results.json").write_text(json.dumps(results))
    (work.path / "results.csv").write_text("method\n")
    (work.path / "index.html").write_text("<!doctype html>")
    (work.path / "mt_bench").mkdir()
    (work.path / "mt_bench" / "question.jsonl").write_text("{}\n")
    (work.path / "log" / "text.log").write_text("secret /home/jane\n")


def change_json(path: Path, **values: Any) -> None:
    """Set values of an object in a file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))

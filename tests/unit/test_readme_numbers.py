"""The README's numbers come from result files by a program, and it notices when they are stale."""

import json
import sys
from pathlib import Path
from typing import Any

import fake_run
import numpy as np
import pytest

from scmini.stages import report
from scmini.store import Work

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import collect_demo
import readme_numbers

SEEDS = (1, 2)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bench/results/demo/ as collect_demo makes it from two run folders."""
    root = tmp_path_factory.mktemp("runs")
    for seed in SEEDS:
        run, config = root / f"run-{seed}", fake_run.config(seed=seed)
        inputs = fake_run.stage_folders(root / f"store-{seed}", config, prompts=60)
        work = Work(run / "report")
        work.path.mkdir(parents=True)
        report.run(config, inputs, work)
        (run / "rewards").mkdir()
        for method in config.methods:
            link = run / "rewards" / f"{method}.jsonl"
            link.symlink_to(inputs[f"reward:{method}"] / "rewards.jsonl")
    folder = root / "results"
    arguments = [str(root / f"run-{seed}") for seed in SEEDS]
    assert collect_demo.main([*arguments, "--to", str(folder)]) == 0
    return folder


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    path = tmp_path / "README.md"
    path.write_text(f"# Before\n{readme_numbers.BEGIN}\nold\n{readme_numbers.END}\nAfter\n")
    return path


def run(results: Path, readme: Path, *more: str) -> int:
    return readme_numbers.main(["--results", str(results), "--readme", str(readme), *more])


def load(results: Path) -> list[dict[str, Any]]:
    return [json.loads((results / f"seed-{seed}.json").read_text()) for seed in SEEDS]


def test_block_is_written_and_checked(results: Path, readme: Path) -> None:
    assert run(results, readme, "--check") == 1
    assert "old" in readme.read_text()
    assert run(results, readme) == 0
    text = readme.read_text("utf-8")
    assert text.startswith("# Before\n")
    assert text.endswith("After\n")
    assert "\nold\n" not in text
    assert run(results, readme, "--check") == 0
    readme.write_text(text.replace("Seeds 1, 2", "Seeds 1, 3"))
    assert run(results, readme, "--check") == 1
    assert (results / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert (results / "demo.svg").read_text().startswith("<?xml")


def test_pooled_numbers_equal_a_slow_recount(results: Path, readme: Path) -> None:
    run(results, readme)
    text = readme.read_text("utf-8")
    files = load(results)
    for method in ("targets", *fake_run.METHODS):
        rewards = [x for file in files for x in file["per_prompt"][method]]
        line = next(line for line in text.splitlines() if line.startswith(f"| {method} |"))
        assert f"| {100 * np.mean(rewards):.1f} (" in line
        by_seed = " / ".join(f"{100 * np.mean(file['per_prompt'][method]):.1f}" for file in files)
        assert by_seed in line
    ours, sft = (
        np.concatenate([file["per_prompt"][name] for file in files])
        for name in ("self-contrast-16", "sft")
    )
    assert f"than sft (+{100 * (ours - sft).mean():.1f}, interval" in text
    assert "| sample | 20.0 s |" in text
    assert f"Seeds 1, 2, {len(ours)} test prompts" in text


def test_result_files_are_results_with_rewards(results: Path) -> None:
    file = load(results)[0]
    assert set(file["per_prompt"]) == set(file["methods"])
    assert file["config"]["seed"] == 1
    for method, row in file["methods"].items():
        assert np.mean(file["per_prompt"][method]) == pytest.approx(row["mean_reward"], abs=1e-4)


def test_mistakes_are_named(results: Path, readme: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no result file"):
        run(tmp_path / "empty", readme)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    first, second = load(results)
    second["config"]["dpo"]["beta"] = 0.7
    for number, file in enumerate((first, second)):
        (mixed / f"{number}.json").write_text(json.dumps(file))
    with pytest.raises(SystemExit, match="another configuration: dpo"):
        run(mixed, readme)
    readme.write_text("no markers")
    with pytest.raises(SystemExit, match="has no block"):
        run(results, readme)
    assert collect_demo.main([str(tmp_path / "nowhere"), "--to", str(tmp_path)]) == 1

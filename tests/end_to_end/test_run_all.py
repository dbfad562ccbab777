"""`scmini run all` as a person types it, at toy size: whole, again, changed, with real data."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("SCMINI_SHARED", ROOT.parent / "shared"))
HH = SHARED / "data" / "hh_helpful-base_raw.jsonl.gz"
METHODS = ["sft", "sft-continued", "dpo", "self-contrast-1", "self-contrast-3"]
TOY = {
    "methods": f"[{', '.join(METHODS)}]",
    "base.vocab_size": 400,
    "base.hidden_size": 64,
    "base.intermediate_size": 64,
    "base.num_hidden_layers": 2,
    "base.num_attention_heads": 2,
    "base.num_key_value_heads": 1,
    "base.save_steps": 4,
    "data.num_pretraining": 320,
    "data.num_train": 48,
    "data.num_test": 12,
    "sft.num_train_epochs": 1,
    "sft.prompts_per_step": 8,
    "sft.save_steps": 2,
    "sft_continued.num_prompts": 16,
    "sft_continued.num_train_epochs": 1,
    "sample.n": 6,
    "sample.num_prompts": 16,
    "sample.max_new_tokens": 24,
    "sample.shard_size": 4,
    "filter.keep_fraction": 0.75,
    "dpo.prompts_per_step": 8,
    "dpo.save_steps": 1,
    "generate.max_new_tokens": 24,
    "report.bootstrap_samples": 200,
}


def _command(run: Path, toy: dict[str, object], *extra: str, verb: str = "run") -> list[str]:
    sets = [text for key, value in toy.items() for text in ("--set", f"{key}={value}")]
    what = ["run", "all"] if verb == "run" else [verb]
    return [sys.executable, "-m", "scmini", *what, "-c", "demo", "-o", str(run), *sets, *extra]


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def _scmini(run: Path, toy: dict[str, object], *extra: str, verb: str = "run") -> str:
    done = subprocess.run(
        _command(run, toy, *extra, verb=verb), env=_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout if verb != "run" else done.stdout + done.stderr


def _folders(run: Path) -> dict[str, float]:
    """Finished folders of the store with the time at which each was made."""
    return {
        p.name: p.stat().st_mtime for p in (run.parent / ".store").iterdir() if p.name[0] != "."
    }


def _pairs(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "pairs").glob("*.jsonl"))}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "toy"
    _scmini(run, TOY)
    return run


def test_files_of_a_run(finished: Path) -> None:
    for name in (
        *(
            "config.yaml",
            "run.json",
            "data/train.jsonl",
            "data/test.jsonl",
            "similarity/part-00000.parquet",
        ),
        *("sft/adapter/adapter_model.safetensors", "sft/adapter/tokenizer.json"),
        *("samples/part-00000.parquet", "embeddings/part-00000.npy", "reference/logps.parquet"),
        *(f"pairs/{m}.jsonl" for m in METHODS[2:]),
        *(f"models/{m}/adapter/adapter_config.json" for m in METHODS),
        *(f"models/{m}/metrics.jsonl" for m in METHODS),
        *(f"generations/{m}.jsonl" for m in METHODS),
        *(f"rewards/{m}.jsonl" for m in METHODS),
        *(
            f"report/{name}"
            for name in ("index.html", "win_rate.png", "win_rate.svg", "results.csv")
        ),
    ):
        assert (finished / name).is_file(), f"{name} is missing"
    results = json.loads((finished / "report" / "results.json").read_text())
    for method in METHODS:
        row = results["methods"][method]
        assert 0 <= row["win_rate_ci95"][0] <= row["win_rate"] <= row["win_rate_ci95"][1] <= 100
        assert row["n"] == TOY["data.num_test"]
    assert {"config", "versions", "device", "stages"} <= results.keys()


def test_metrics_have_the_names_of_trl(finished: Path) -> None:
    lines = (finished / "models" / "self-contrast-3" / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    names = "loss learning_rate grad_norm rewards/chosen rewards/rejected rewards/accuracies"
    names += " rewards/margins logps/chosen logps/rejected rewards/accuracies_all"
    assert set(names.split()) <= first.keys()
    assert abs(first["rewards/chosen"]) < 1e-3, "before the first step the policy is the reference"


def test_negatives_are_nested(finished: Path) -> None:
    one, three = (
        [json.loads(line) for line in (finished / "pairs" / f"{m}.jsonl").read_text().splitlines()]
        for m in ("self-contrast-1", "self-contrast-3")
    )
    first = {row["id"]: row["response_index"][0] for row in one}
    assert three
    assert all(first[row["id"]] == row["response_index"][0] for row in three)


def test_a_second_run_does_nothing(finished: Path) -> None:
    before, start = _folders(finished), time.monotonic()
    _scmini(finished, TOY)
    assert time.monotonic() - start < 10
    assert _folders(finished) == before
    states = {
        stage["state"]
        for stage in json.loads(_scmini(finished, TOY, "--json", verb="status"))["stages"]
    }
    assert states == {"done"}


def test_a_changed_key_reruns_what_depends_on_it(finished: Path) -> None:
    run, before = finished.parent / "beta", _folders(finished)
    _scmini(run, TOY | {"dpo.beta": 0.2})
    made = {name.rsplit("-", 1)[0] for name in _folders(run).keys() - before.keys()}
    trained = METHODS[2:]
    expected = {f"{stage}-{m}" for stage in ("dpo", "generate", "reward") for m in trained} | {
        "report"
    }
    assert made == expected


@pytest.mark.skipif(not HH.exists(), reason="the HH-RLHF sample is not here (SCMINI_SHARED)")
def test_real_dialogues_in_nf4(tmp_path: Path) -> None:
    """The demo's configuration turned to raw transcripts; the reward model is trained there too."""
    run = tmp_path / "runs" / "hh"
    toy = TOY | {
        "data.format": "hh-rlhf",
        "data.path": HH,
        "data.max_prompt_chars": 300,
        "data.max_target_chars": 200,
        "model.load_in_4bit": "true",
        "base.reward_model.num_train_epochs": 0.2,
    }
    _scmini(run, toy)
    results = json.loads((run / "report" / "results.json").read_text())
    assert set(METHODS) <= results["methods"].keys()
    rewards = [
        json.loads(line) for line in (run / "rewards" / "sft.jsonl").read_text().splitlines()
    ]
    assert len({row["target_reward"] for row in rewards}) > 1, (
        "the reward model tells answers apart"
    )

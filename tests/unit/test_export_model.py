"""`scmini export adapter|merged|report`: what others open, and what goes wrong."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from export_helpers import METHOD, MadeRun, config, make_run
from peft import AutoPeftModelForCausalLM, PeftModel
from training_helpers import write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from scmini.errors import (
    DataError,
    DoesNotFit,
    ScminiError,
    StoreDamaged,
    UsageError,
)
from scmini.exporting import models as export_model
from scmini.exporting.models import bytes_of, export_adapter, export_merged, export_report
from scmini.training import merged_check

IDS = torch.arange(5, 25)[None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    return make_run(tmp_path_factory.mktemp("runs"), config())


@pytest.fixture
def run(whole: MadeRun) -> Path:
    shutil.rmtree(whole.path / "export", ignore_errors=True)
    return whole.path


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    """A run on a model in a local folder, in bfloat16."""
    root = tmp_path_factory.mktemp("named")
    base = write_model(root / "mist ral", dtype=torch.bfloat16)
    return make_run(root / "runs", config(base))


def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def own_logits(run: Path, method: str, base: Path) -> torch.Tensor:
    """What the run's own adapter says, through PEFT alone."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return logits(PeftModel.from_pretrained(model, str(run / "models" / method / "adapter")))


def texts(folder: Path) -> str:
    files = [p for p in folder.rglob("*") if p.suffix in (".json", ".md", ".jinja", ".jsonl")]
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


def left_behind(to: Path) -> list[str]:
    return [path.name for path in to.parent.iterdir() if path.name.startswith(".")]


def test_adapter_opens_in_peft(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = export_adapter(run, METHOD)
    assert done.folder == run / "export" / f"{METHOD}-adapter"
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= set(done.files)
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= set(done.files)
    assert done.files["README.md"] == (done.folder / "README.md").stat().st_size
    monkeypatch.chdir(done.folder)  # it names its base as base_model
    expected = own_logits(run, METHOD, run / "base" / "model")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(".")), expected)
    assert str(run.parent) not in texts(done.folder), "nothing names this machine"
    assert AutoTokenizer.from_pretrained(".").chat_template
    assert left_behind(done.folder) == []


def test_what_is_said_of_an_adapter(run: Path) -> None:
    done = export_adapter(run, METHOD)
    load, serve, _ = done.how_to_use
    assert load.startswith("PEFT: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(")
    scope = {"PeftModel": PeftModel, "AutoModelForCausalLM": AutoModelForCausalLM}
    found = logits(eval(load.removeprefix("PEFT: "), scope))
    assert torch.equal(found, own_logits(run, METHOD, run / "base" / "model"))
    assert "--enable-lora --max-lora-rank 8 --lora-modules self-contrast-2=" in serve
    assert str(done.folder) in export_model.text(done)


def test_adapter_on_a_named_base(named: MadeRun) -> None:
    done = export_adapter(named.path, "sft")
    settings = json.loads((done.folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == named.config.model.model_name_or_path
    assert not (done.folder / "base_model").exists()
    card = (done.folder / "README.md").read_text()
    assert "the local folder mist ral" in card
    assert "vllm serve 'mist ral' --tokenizer sft-adapter" in card
    assert str(named.path.parents[1]) not in card
    assert "base_model" not in card.split("---")[1], "not on the hub"


def test_adapter_on_a_base_of_the_hub(tmp_path: Path) -> None:
    base = write_model(tmp_path / "hub")
    sections = {"model_name_or_path": "nobody/tiny-1B", "revision": "v2", "load_in_4bit": False}
    made = config(model=sections, reward={"grader": "none"})
    run = make_run(tmp_path / "runs", made, source=base)
    done = export_adapter(run.path, METHOD)
    settings = json.loads((done.folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "nobody/tiny-1B"
    assert settings["revision"] == "v2"
    assert '"nobody/tiny-1B", revision="v2", dtype=' in done.how_to_use[0]
    front = (done.folder / "README.md").read_text().split("---")[1]
    assert "base_model: nobody/tiny-1B" in front


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged(dtype: Any, named: MadeRun, capfd: pytest.CaptureFixture[str]) -> None:
    done = export_merged(named.path, METHOD, dtype=dtype, force=True)
    model = AutoModelForCausalLM.from_pretrained(done.folder, dtype=torch.float32)
    expected = own_logits(named.path, METHOD, Path(str(named.config.model.model_name_or_path)))
    near = 1e-4 if dtype == "float32" else 0.2
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=near)
    assert "adapter_model.safetensors" not in done.files
    assert str(named.path.parents[1]) not in texts(done.folder)
    assert done.check is not None
    assert "4 answers" in done.check
    assert done.check in (done.folder / "README.md").read_text()
    assert done.how_to_use[1] == f"vLLM: vllm serve '{done.folder}'" or " " not in str(done.folder)
    assert "warning" not in capfd.readouterr().err


def test_merged_into_a_base_of_the_run(run: Path) -> None:
    done = export_merged(run, "sft", dtype="float32", check_prompts=0, max_shard_size="100kB")
    model = AutoModelForCausalLM.from_pretrained(done.folder)
    expected = own_logits(run, "sft", run / "base" / "model")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert done.check is None
    assert "were not compared" in (done.folder / "README.md").read_text()
    assert "model.safetensors.index.json" in done.files


def test_a_wrong_merge_is_not_exported(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from scmini.models.merging import _Merger

    good = _Merger._sum
    with monkeypatch.context() as patch:
        patch.setattr(_Merger, "_sum", lambda self, weight, delta: good(self, weight, delta) * 3)
        with pytest.raises(ScminiError, match=r"times what rounding explains.*nothing was export"):
            export_merged(run, METHOD, dtype="float32")
        assert not (run / "export" / f"{METHOD}-merged").exists()
        assert left_behind(run / "export" / "x") == []
    # A little beyond rounding is told, not refused.
    monkeypatch.setattr(_Merger, "_sum", lambda s, w, d: good(s, w, d) + 3e-5 * w.sign())
    monkeypatch.setattr(merged_check, "tolerance", lambda *_: 1e-4)
    monkeypatch.setattr(merged_check, "ABSURD", 1e9)
    assert export_merged(run, METHOD, dtype="float32").check
    assert "more than rounding usually does" in capfd.readouterr().err


@pytest.mark.parametrize(
    "error", [DoesNotFit("no"), MemoryError(), RuntimeError("CUDA out of memory. Tried")]
)
def test_out_of_memory_costs_the_check_alone(
    error: Exception,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(merged_check, "load_policy", fails)
    done = export_merged(run, METHOD)
    assert done.check is None
    assert "not compared: out of memory; --check-prompts 0" in capfd.readouterr().err
    assert (done.folder / "model.safetensors").is_file()


def test_no_test_prompts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, config())
    with pytest.raises(UsageError, match="--check-prompts -1: 0 or more"):
        export_merged(run.path, METHOD, check_prompts=-1)
    path = (run.path / "data" / "test.jsonl").resolve()
    rows = path.read_text()
    path.write_text(rows.replace('"target": "', '"target": "' + "far too long " * 99))
    assert export_merged(run.path, METHOD).check is None
    assert "no target fits model.max_length" in capfd.readouterr().err
    path.unlink()
    assert export_merged(run.path, METHOD).check is None
    assert "test.jsonl is not there" in capfd.readouterr().err


def test_check_says_what_the_adapter_does(run: Path) -> None:
    """Against a base that nothing was merged into, the difference is the adapter itself."""
    base = run / "base" / "model"
    adapter = run / "models" / METHOD / "adapter"
    pairs = [(list(range(5, 15)), list(range(20, 30))), ([7, 8], [9])]
    model = config().model
    found = merged_check.check_merged(model, str(base), adapter, base, pairs, "float32")
    assert found.prompts == 2
    assert found.tokens == 11
    assert found.excess > merged_check.ABSURD
    assert found.mean_per_token == pytest.approx(found.adapter_per_token, rel=1e-4)
    assert found.max_per_token >= found.mean_per_token > 0
    assert found.max_per_sequence >= found.mean_per_sequence > 0


def test_report(run: Path) -> None:
    done = export_report(run)
    assert sorted(done.files) == [
        *("index.html", "mt_bench/question.jsonl", "results.csv", "results.json")
    ]
    assert "secret" not in texts(done.folder)
    assert done.files == {n: (run / "report" / n).stat().st_size for n in done.files}


# ---------------------------------------------------------------- what is asked for


def test_methods_that_are_not_there(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no method 'self-contrst-2'; did you mean self-contrast"):
        export_adapter(run, "self-contrst-2")
    with pytest.raises(UsageError, match=r"no method 'x'; there are: sft, self-contrast-2"):
        export_merged(run, "x")
    with pytest.raises(UsageError, match="no such run folder; -o names one"):
        export_adapter(tmp_path / "nowhere", "sft")
    with pytest.raises(UsageError, match="no such run folder; -o names one"):
        export_report(tmp_path / "nowhere")
    begun = MadeRun(tmp_path / "a b", config())
    command = r"scmini run all --until dpo -o '.*a b/toy'"
    with pytest.raises(UsageError, match=f"{METHOD} is not trained yet; this does it: {command}"):
        export_merged(begun.path, METHOD)
    with pytest.raises(UsageError, match=r"sft is not trained yet; .* --until sft -o"):
        export_adapter(begun.path, "sft-temperature-0.3")
    with pytest.raises(UsageError, match=r"no report yet; this makes it: scmini run all -o '"):
        export_report(begun.path)


def test_a_temperature_has_the_weights_of_sft(run: Path) -> None:
    done = export_adapter(run, "sft-temperature-0.3")
    assert done.method == "sft"
    assert done.folder.name == "sft-adapter"
    assert "sft-temperature-0.3 (these weights)" in (done.folder / "README.md").read_text()


def test_damage(tmp_path: Path) -> None:
    run = make_run(tmp_path, config())
    weights = run.path / "models" / "sft" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(StoreDamaged, match="changed after it was written"):
        export_merged(run.path, "sft")
    (run.path / "models" / "sft" / "manifest.json").write_text("{")
    with pytest.raises(StoreDamaged, match=r"manifest\.json: damaged"):
        export_adapter(run.path, "sft")


def test_the_base_that_the_adapter_was_trained_on(tmp_path: Path) -> None:
    """Another base in the run folder is passed over; the right one is found in the store."""
    run = make_run(tmp_path, config())
    expected = own_logits(run.path, METHOD, run.path / "base" / "model")
    (run.path / "base").unlink()
    shutil.copytree(run.path / "data", run.path / "base")
    done = export_merged(run.path, METHOD, dtype="float32")
    found = logits(AutoModelForCausalLM.from_pretrained(done.folder))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    (folder,) = run.store.root.glob("base-*")
    aside = folder.with_name("base-000000000000.damaged-1")  # comes first by name
    aside.mkdir()
    (aside / "manifest.json").write_text("{")
    export_adapter(run.path, METHOD)
    shutil.rmtree(folder)
    with pytest.raises(UsageError, match="its base model is not in"):
        export_adapter(run.path, METHOD)


def test_a_local_base_that_changed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = write_model(tmp_path / "base")
    run = make_run(tmp_path / "runs", config(base))
    manifest = run.path / "models" / "sft" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["recipe"]["sources"] = {"model.model_name_or_path": "0" * 64}
    manifest.write_text(json.dumps(content))
    export_adapter(run.path, "sft")
    assert "changed since the adapter was trained on it" in capfd.readouterr().err


def test_adapter_of_another_base(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    run = make_run(tmp_path / "runs", config(base))
    settings = json.loads((base / "config.json").read_text())
    shutil.rmtree(base)
    from training_helpers import tiny_model

    tiny_model().save_pretrained(base)
    assert settings["hidden_size"] == 64
    with pytest.raises(DataError, match=r"not made for the base model.*model_name_or_path"):
        export_merged(run.path, "sft")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5GB", 5 * 10**9), ("500 MiB", 500 << 20), ("1.5kb", 1500), ("77", 77), ("2G", 2 * 10**9)],
)
def test_sizes(text: str, expected: int) -> None:
    assert bytes_of(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "0", "-1GB", "5 giga", "0.1", "1e9", "IB", "5\nGBx"])
def test_no_sizes(text: str, run: Path) -> None:
    with pytest.raises(UsageError, match=r"--max-shard-size .*a size such as 5GB or 500MiB"):
        export_merged(run, METHOD, max_shard_size=text)

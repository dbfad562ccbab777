"""The benchmarks: that all implementations agree, and what is made of the rows."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import operations
import plot
import rows
import run
import step
from cases import Case, Shape
from peers import models, worker
from peers.implementations import IMPLEMENTATIONS, Setup

TINY = Shape("tiny", 2, 32, 4, 2, 8, 48, 64, rank=4)
CASE = Case(12, 7, 3, prompts=2)


@pytest.mark.parametrize(
    ("kind", "message", "expected"),
    [
        ("OutOfMemoryError", "CUDA out of memory. Tried to allocate 2.00 GiB", True),
        (
            "RuntimeError",
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`",
            True,
        ),
        ("AcceleratorError", "CUDA error: out of memory", True),
        ("RuntimeError", "CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_what_counts_as_out_of_memory(kind: str, message: str, expected: bool) -> None:
    assert worker._is_out_of_memory(kind, message) == expected


@pytest.mark.parametrize("text", ["", "1,2", "1,2,3,4", "a,b,c", "0,1,1", "1,1,-1"])
def test_a_bad_case_is_a_usage_error(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run.main(["step", f"--case={text}"])
    assert stop.value.code == 2
    assert "expected P,R,k" in capsys.readouterr().err


def test_options_that_have_no_effect_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["head", "--precomputed"]) == 2
    assert run.main(["step", "--device", "cpu", "--cap-gib", "24"]) == 2
    assert run.main(["filter", "--vocab", "9"]) == 2
    assert run.main(["sample", "--prompts", "9"]) == 2
    assert run.main(["filter", "--python", "python"]) == 2
    assert "--python belongs to sample" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert run.main(["step", "--device", "cuda"]) == 3


@pytest.mark.parametrize("what", rows.KINDS)
def test_tests_of_a_benchmark_exist(what: str) -> None:
    for pattern in run.TESTS[what]:
        assert list(rows.ROOT.glob(pattern)), pattern


def test_nothing_is_measured_when_tests_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "tests_pass", lambda what, device: False)
    arguments = ["packing", "--device", "cpu", "--case", "8,4,1", "--rounds", "1"]
    arguments += ["--out", str(tmp_path)]
    assert run.main(arguments) == 1
    assert not list(tmp_path.rglob("*.jsonl"))
    assert run.main([*arguments, "--skip-tests"]) == 0
    found = rows.read(tmp_path / "cpu" / "packing.jsonl")
    assert {row["peer"] for row in found} == {"pack", "move", "plan", "tiles"}
    assert run.main([*arguments, "--skip-tests"]) == 0
    assert len(rows.read(tmp_path / "cpu" / "packing.jsonl")) == 2 * len(found), "rows were lost"


def test_newest_row_of_each_case_and_peer() -> None:
    case = {"P": 1, "R": 1, "k": 1}
    old = {"device": "cpu", "case": case, "peer": "a", "run": 1}
    other = {**old, "peer": "b"}
    assert rows.newest([old, other, {**old, "run": 2}]) == [{**old, "run": 2}, other]
    assert len(rows.newest([old, {**old, "cap_gib": 24.0}])) == 2


def test_torn_rows_are_named(tmp_path: Path) -> None:
    path = tmp_path / "step.jsonl"
    path.write_text('{"a": 1}\n{"b"')
    with pytest.raises(SystemExit, match="line 2"):
        rows.read(path)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of every benchmark at a tiny size, the step's from processes of their own."""
    folder = tmp_path_factory.mktemp("results")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for found in step.measure([(TINY, CASE)], "cpu", rounds=2):
            rows.append(folder / "cpu" / "step.jsonl", found)
        for what in ("head", "attention", "packing"):
            for found in operations.measure(
                what, [(TINY, Case(12, 7, 3)), (TINY, Case(9, 5, 1))], "cpu", rounds=2
            ):
                rows.append(folder / "cpu" / f"{what}.jsonl", found)
    finally:
        torch.set_num_threads(threads)
    return folder


def test_all_implementations_take_the_same_step(results: Path) -> None:
    pytest.importorskip("trl")
    found = rows.read(results / "cpu" / "step.jsonl")
    expected = {name for name, each in IMPLEMENTATIONS.items() if not each.precomputed}
    assert {row["peer"] for row in found} == expected
    by_peer = {row["peer"]: row for row in found}
    for row in found:
        assert row["error"]["compared_with"] == "trl"
        assert row["error"]["loss_error"] < 1e-6
        assert row["error"]["worst_cosine"] > 1 - 1e-6
        assert row["error"]["norm_ratio"] == pytest.approx(1, abs=1e-5)
        assert abs(row["error"]["loss"] - 0.6931) > 1e-3, "rewards are zero: nothing is compared"
        assert row["seconds"]["p20"] <= row["seconds"]["median"] <= row["seconds"]["p80"]
        assert len(row["seconds"]["samples"]) == 2
        assert row["peak_bytes"] > 0
    assert by_peer["trees"]["measured_ratio"] == 1
    assert by_peer["trees"]["predicted_ratio"] == 1
    assert by_peer["pairs"]["tokens"] == 2 * 3 * 2 * 19
    assert by_peer["pairs"]["predicted_ratio"] > by_peer["grouped"]["predicted_ratio"] > 1
    # TRL multiplies its policy's logits three times, and at every position on the CPU.
    assert by_peer["trl"]["predicted_ratio"] > by_peer["pairs"]["predicted_ratio"]


def test_single_operations_agree_with_fp64(results: Path) -> None:
    found = [
        row for what in ("head", "attention") for row in rows.read(results / f"cpu/{what}.jsonl")
    ]
    peers = {row["peer"] for row in found}
    assert {"scmini, PyTorch", "SDPA, dense mask", "SDPA, k+1 sequences", "bare products"} <= peers
    for row in found:
        if row["peer"] != "bare products":
            assert row["error"]["value"] < 1e-5, row["peer"]
            assert ("gradient" in row["error"]) == (row["mode"] != "forward")
            assert row["error"].get("gradient", 0) < 1e-5, row["peer"]
        assert row["absent"].keys().isdisjoint(peers)
    pairs = {row["case"]["k"] for row in found if row["mode"] == "dpo"}
    assert pairs == {1}


def test_document_and_pictures_come_from_rows(results: Path, tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text(f"before\n{plot.BEGIN}\nold\n{plot.END}\nafter\n")
    arguments = ["--results", str(results), "--document", str(document)]
    assert plot.main([*arguments, "--check"]) == 1
    assert "old" in document.read_text()
    assert plot.main(arguments) == 0
    text = document.read_text("utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "\nold\n" not in text
    assert plot.main([*arguments, "--check"]) == 0
    pairs = next(r for r in rows.read(results / "cpu/step.jsonl") if r["peer"] == "pairs")
    assert f"| {pairs['measured_ratio']:.2f} or " in text
    assert f" ({pairs['predicted_ratio']:.2f}) |" in text
    assert "### GPU\n\nNot measured" in text
    for name in ("speedup", "memory", "roofline", "errors"):
        assert (results / "cpu" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (results / "cpu" / f"{name}.svg").read_text().startswith("<?xml")
    assert not (results / "cpu" / "memory-k.png").exists(), "one k is no curve"
    rows.append(results / "cpu" / "step.jsonl", [{**pairs, "measured_ratio": 77.77}])
    assert plot.main([*arguments, "--check"]) == 1
    assert plot.main(arguments) == 0
    assert "77.77" in document.read_text("utf-8")


def test_memory_against_k_and_what_did_not_fit(tmp_path: Path, results: Path) -> None:
    """GPU rows cannot be made here; the CPU's, renamed, go the same way."""
    shown = next(r for r in rows.read(results / "cpu/step.jsonl") if r["peer"] == "trees")
    fits = [
        {**shown, "device": "some-gpu", "case": {**shown["case"], "k": k}, "cap_gib": 24.0}
        for k in (1, 4)
    ]
    keys = ("seconds", "peak_bytes", "total_peak_bytes", "measured_ratio", "error")
    failed = {key: value for key, value in fits[1].items() if key not in keys}
    failed |= {"peer": "pairs", "failed": "out of memory"}
    rows.append(tmp_path / "some-gpu" / "step.jsonl", [*fits, failed])
    document = tmp_path / "page.md"
    document.write_text(f"{plot.BEGIN}\n{plot.END}\n")
    assert plot.main(["--results", str(tmp_path), "--document", str(document)]) == 0
    assert (tmp_path / "some-gpu" / "memory-k.png").exists()
    text = document.read_text("utf-8")
    assert "out of memory" in text
    assert "### CPU\n\nNot measured" in text
    assert "within 24 GiB" in text


def test_the_summary_is_of_the_same_rows(results: Path, tmp_path: Path) -> None:
    for name in ("page.md", "readme.md"):
        (tmp_path / name).write_text(f"before\n{plot.BEGIN}\nold\n{plot.END}\nafter\n")
    paths = ["--document", str(tmp_path / "page.md"), "--summary", str(tmp_path / "readme.md")]
    assert plot.main(["--results", str(results), *paths]) == 0
    text = (tmp_path / "readme.md").read_text("utf-8")
    pairs = rows.newest(rows.read(results / "cpu/step.jsonl"))
    pairs = next(row for row in pairs if row["peer"] == "pairs")
    assert f"| {pairs['measured_ratio']:.2f} or " in text
    assert "No GPU has been measured yet." in text
    (tmp_path / "readme.md").write_text(text.replace("No GPU", "A GPU"))
    assert plot.main(["--results", str(results), *paths, "--check"]) == 1


def test_nothing_measured_is_said(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text(f"{plot.BEGIN}\n{plot.END}\n")
    assert plot.main(["--results", str(tmp_path), "--document", str(document)]) == 0
    text = document.read_text("utf-8")
    assert text.count("Not measured") == 2
    assert "|" not in text
    document.write_text("no markers")
    with pytest.raises(SystemExit, match="no block"):
        plot.main(["--results", str(tmp_path), "--document", str(document)])


def test_the_shipped_document_is_fresh() -> None:
    assert plot.main(["--check"]) == 0


class _Fake(step.Live):
    """An implementation whose first step is given."""

    def __init__(self, name: str, loss: float, gradient: torch.Tensor, folder: Path) -> None:
        path = folder / f"{name}.pt"
        torch.save({"weight": gradient}, path)
        super().__init__(IMPLEMENTATIONS[name], None, None, path, [{"loss": loss}])  # type: ignore


def test_disagreement_stops_the_run(tmp_path: Path) -> None:
    gradient = torch.randn(50, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(50, generator=torch.Generator().manual_seed(1))
    setup = Setup(TINY, "cpu", quantised=False, checkpointing=False)

    def compare(loss: float, other: torch.Tensor) -> dict[str, Any]:
        peers = [
            _Fake("trl", 0.8, gradient, tmp_path),
            _Fake("trees", loss, other, tmp_path),
        ]
        return step._compare(peers, setup)

    fine = compare(0.8 * (1 + 5e-5), gradient * (1 + 5e-4))
    assert fine["trees"]["compared_with"] == "trl"
    for loss, other in (
        (0.8 * (1 + 2e-4), gradient),
        (0.8, gradient * 1.002),
        (0.8, gradient + 0.05 * noise),
        (0.8, -gradient),
        (float("nan"), gradient),
    ):
        with pytest.raises(step.Disagreement, match="trees and trl differ"):
            compare(loss, other)
    with pytest.raises(step.Disagreement, match="log 2"):
        step._compare([_Fake("trl", 0.693147, gradient, tmp_path)], setup)


def test_quantised_step_on_the_path_of_the_gpu() -> None:
    """NF4 and checkpointing, which only CUDA gets by default; in bfloat16, so roughly equal."""
    pytest.importorskip("bitsandbytes")
    shape = replace(TINY, hidden=64, head_dim=16, ffn=64)
    ((first, *others),) = step.measure(
        [(shape, CASE)], "cpu", 1, precomputed=True, quantised=True, checkpointing=True
    )
    assert first["dtype"] == "nf4, bfloat16"
    assert first["checkpointing"]
    if others[-1]["error"]["compared_with"] == "trl":
        assert len(others) == len(IMPLEMENTATIONS) - 1
    for row in (first, *others):
        assert row["error"]["loss_error"] < step.HALF_LOSS
        assert row["error"]["cosine"] > 0.999
        if row["peer"].startswith("trees"):
            assert row["seconds"]["median"] > 0


def test_a_peer_that_fails_is_a_row_and_ours_an_error() -> None:
    def broken() -> None:
        raise RuntimeError("no such kernel\nmore")

    common = {"mode": "train", "rounds": 1, "tflop": 1.0, "ceilings": {"gemm_tflops": 1.0}}
    found = operations._measured(common, {"bad": broken, "good": lambda: None}, {}, "cpu")
    assert found[0]["failed"] == "RuntimeError: no such kernel"
    assert "seconds" in found[1]
    with pytest.raises(RuntimeError, match="no such kernel"):
        operations._measured(common, {"scmini, PyTorch": broken}, {}, "cpu")


def test_quantised_model_on_the_path_of_the_gpu() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    shape = replace(TINY, hidden=64, head_dim=16, ffn=64)
    setup = Setup(shape, "cpu", quantised=True, checkpointing=True)
    model = models.base_model(setup)
    linears = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(linears) == 7 * shape.layers
    assert model.lm_head.weight.dtype == torch.bfloat16
    again = models.base_model(setup)
    with torch.no_grad():
        first, second = (each(torch.arange(2, 9)[None]).logits for each in (model, again))
    assert first.isfinite().all()
    assert torch.equal(first, second), "two processes would have different weights"


def test_rows_are_json_lines(results: Path) -> None:
    for what in run.WITH_CASES:
        for line in (results / "cpu" / f"{what}.jsonl").read_text().splitlines():
            row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in a row"))
            assert row["what"] == what
            assert {"run", "date", "commit", "versions", "threads", "processor"} <= row.keys()
            assert row["ceilings"]["gemm_tflops"] > 0

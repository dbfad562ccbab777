"""Measure, against every peer that is installed, after the matching tests have passed.

    python bench/run.py step                         one optimizer step of DPO, against TRL
    python bench/run.py head                         log-probabilities without logits
    python bench/run.py attention                    attention over a prefix tree
    python bench/run.py packing                      what the host does per batch
    python bench/run.py filter                       cosines of answers with their targets
    python bench/run.py sample --python PATH         tokens per second, against a bare vLLM loop
    python bench/run.py step --case 128,64,4 --vocab 8192 --rounds 5

Rows are appended to bench/results/<device>/<what>.jsonl; python bench/plot.py draws from them and
writes docs/benchmarks.md. Off CUDA everything runs on one thread.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Before torch is imported: timings of several threads on a shared machine mean nothing.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import rows
import torch
from cases import Case, selected

TESTS = {
    "step": ["tests/unit/test_trl_equality.py", "tests/kernels/test_tree.py"],
    "head": ["tests/kernels/test_linear_logprob*.py"],
    "attention": ["tests/kernels/test_tree_attention*.py"],
    "packing": ["tests/kernels/test_tree.py"],
    "filter": ["tests/unit/test_filter*.py", "tests/unit/test_similarity.py"],
    "sample": [f"tests/unit/test_{name}.py" for name in ("sampler", "vllm_sampler", "answering")],
}
ROUNDS = {"step": 3, "head": 20, "attention": 20, "packing": 20, "filter": 5, "sample": 3}
WITH_CASES = ("step", "head", "attention", "packing")
BELONG_TO = {
    "case": WITH_CASES,
    "vocab": WITH_CASES,
    "precomputed": ("step",),
    "cap_gib": ("step",),
    "prompts": ("filter",),
    "python": ("sample",),
}
"""Options that not every benchmark has."""


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        rows.say("--device cuda: no CUDA device")
        return 3
    for name, kinds in BELONG_TO.items():
        if getattr(options, name) and options.what not in kinds:
            rows.say(f"--{name.replace('_', '-')} belongs to {', '.join(kinds)}")
            return 2
    if options.cap_gib is not None and device == "cpu":
        rows.say("--cap-gib needs --device cuda")
        return 2
    if device == "cpu":
        torch.set_num_threads(1)
    if missing := _missing(options):
        rows.say(missing[1])
        return missing[0]
    if not options.skip_tests and not tests_pass(options.what, device):
        rows.say(f"the tests of {options.what} failed: nothing is measured")
        return 1
    path = options.out / rows.device_name(device) / f"{options.what}.jsonl"
    with orderly_end():
        for found in _measurements(options, device):
            rows.append(path, found)
            rows.say(f"{len(found)} rows appended to {path}")
    return 0


@contextmanager
def orderly_end() -> Iterator[None]:
    """Told to stop (SIGTERM), delete what is temporary, many GB of it, and end what was started."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def tests_pass(what: str, device: str) -> bool:
    """Run the tests that what is measured rests on; on CUDA also those for real sizes."""
    files = [str(path) for pattern in TESTS[what] for path in sorted(rows.ROOT.glob(pattern))]
    marks = "not slow" if device == "cuda" else "not slow and not gpu"
    command = [sys.executable, "-m", "pytest", "-q", "-m", marks, *files]
    rows.say("$ " + " ".join(command[1:]))
    return subprocess.run(command, cwd=rows.ROOT, stdout=sys.stderr, check=False).returncode == 0


def _missing(options: argparse.Namespace) -> tuple[int, str] | None:
    """Exit code and reason, where something is not there that takes no measuring to know."""
    if options.what == "filter":
        import filtering

        reason = filtering.missing_disk(_size(options), Path(tempfile.gettempdir()))
        return (4, reason) if reason else None
    if options.what == "sample":
        import sampling

        if not sampling.has_vllm(_python(options)):
            return 3, (
                f"{_python(options)} has no vLLM: name the interpreter of an environment that has "
                f"it by --python or in {sampling.PYTHON}"
            )
    return None


def _size(options: argparse.Namespace) -> Any:
    import filtering

    return filtering.Size(options.prompts or filtering.PROMPTS)


def _python(options: argparse.Namespace) -> str:
    import sampling

    return str(options.python or os.environ.get(sampling.PYTHON) or sys.executable)


def _measurements(options: argparse.Namespace, device: str) -> Iterable[list[rows.Row]]:
    rounds = options.rounds or ROUNDS[options.what]
    if options.what == "filter":
        import filtering

        return filtering.measure(_size(options), device, rounds)
    if options.what == "sample":
        import sampling

        draws, shape = sampling.DRAWS[device], sampling.SHAPES[device]
        return sampling.measure(draws, shape, device, rounds, _python(options))
    chosen = selected(options.what, device, options.case, options.vocab)
    if options.what == "step":
        import step

        return step.measure(
            chosen, device, rounds, precomputed=options.precomputed, cap_gib=options.cap_gib
        )
    import operations

    return operations.measure(options.what, chosen, device, rounds)


def _case(text: str) -> Case:
    try:
        prompt, response, k = (int(part) for part in text.split(","))
        return Case(prompt, response, k)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected P,R,k ({error})") from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, at least 1")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("what", choices=rows.KINDS)
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    parser.add_argument("--case", type=_case, metavar="P,R,k", help="instead of the usual cases")
    parser.add_argument("--vocab", type=_positive, help="instead of the usual vocabularies")
    usual = ", ".join(f"{what}: {number}" for what, number in ROUNDS.items())
    parser.add_argument("--rounds", type=_positive, help=f"measured rounds ({usual})")
    parser.add_argument("--out", type=Path, default=rows.RESULTS, help="folder of the rows")
    parser.add_argument("--skip-tests", action="store_true", help="measure without testing")
    parser.add_argument(
        "--precomputed",
        action="store_true",
        help="step: also with the reference's log-probabilities made beforehand",
    )
    parser.add_argument(
        "--cap-gib", type=float, metavar="GIB", help="step on CUDA: GPU memory of each process"
    )
    parser.add_argument("--prompts", type=_positive, help="filter: instead of 200,000")
    parser.add_argument("--python", help="sample: interpreter with vLLM; else SCMINI_VLLM_PYTHON")
    return parser


if __name__ == "__main__":
    sys.exit(main())

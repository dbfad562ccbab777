"""Measure, against every peer that is installed, after the matching tests have passed.

    python bench/run.py step                         one optimizer step of DPO, against TRL
    python bench/run.py head                         log-probabilities without logits
    python bench/run.py attention                    attention over a prefix tree
    python bench/run.py packing                      what the host does per batch
    python bench/run.py step --case 128,64,4 --vocab 8192 --rounds 5

Rows are appended to bench/results/<device>/<what>.jsonl; python bench/plot.py draws from them and
writes docs/benchmarks.md. Off CUDA everything runs on one thread.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

# Before torch is imported: timings of several threads on a shared machine mean nothing.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import rows
import torch
from cases import Case, Shape, selected

TESTS = {
    "step": ["tests/unit/test_trl_equality.py", "tests/kernels/test_tree.py"],
    "head": ["tests/kernels/test_linear_logprob*.py"],
    "attention": ["tests/kernels/test_tree_attention*.py"],
    "packing": ["tests/kernels/test_tree.py"],
}
ROUNDS = {"step": 3, "head": 20, "attention": 20, "packing": 20}


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        rows.say("--device cuda: no CUDA device")
        return 3
    if options.what != "step" and (options.cap_gib is not None or options.precomputed):
        rows.say("--cap-gib and --precomputed belong to step")
        return 2
    if options.cap_gib is not None and device == "cpu":
        rows.say("--cap-gib needs --device cuda")
        return 2
    if device == "cpu":
        torch.set_num_threads(1)
    if not options.skip_tests and not tests_pass(options.what, device):
        rows.say(f"the tests of {options.what} failed: nothing is measured")
        return 1
    path = options.out / rows.device_name(device) / f"{options.what}.jsonl"
    chosen = selected(options.what, device, options.case, options.vocab)
    for found in _measurements(options, device, chosen):
        rows.append(path, found)
        rows.say(f"{len(found)} rows appended to {path}")
    return 0


def tests_pass(what: str, device: str) -> bool:
    """Run the tests that what is measured rests on; on CUDA also those for real sizes."""
    files = [str(path) for pattern in TESTS[what] for path in sorted(rows.ROOT.glob(pattern))]
    marks = "not slow" if device == "cuda" else "not slow and not gpu"
    command = [sys.executable, "-m", "pytest", "-q", "-m", marks, *files]
    rows.say("$ " + " ".join(command[1:]))
    return subprocess.run(command, cwd=rows.ROOT, stdout=sys.stderr, check=False).returncode == 0


def _measurements(
    options: argparse.Namespace, device: str, chosen: Sequence[tuple[Shape, Case]]
) -> Iterable[list[rows.Row]]:
    rounds = options.rounds or ROUNDS[options.what]
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
    parser.add_argument("--rounds", type=_positive, help="measured rounds (step: 3, others: 20)")
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
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""Copy the results of demo runs into bench/results/demo/, one file per seed, for the README.

    python bench/collect_demo.py runs/demo-1 runs/demo-2 runs/demo-3

A file is the run's results.json plus "per_prompt": the rewards of every method's answers and of the
targets, prompt by prompt, without which runs could not be pooled and methods not be paired.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from scmini.errors import ScminiError
from scmini.records import read_rewards

FOLDER = Path(__file__).resolve().parent / "results" / "demo"
TARGETS = "targets"


def collect(run: Path) -> dict[str, Any]:
    """results.json of a run folder with its "per_prompt" rewards, rounded to 4 digits."""
    results: dict[str, Any] = json.loads((run / "report" / "results.json").read_text("utf-8"))
    per_prompt: dict[str, list[float]] = {}
    order: list[str] = []
    for method in results["methods"]:
        if method == TARGETS:
            continue
        rewards = read_rewards(run / "rewards" / f"{method}.jsonl")
        ids = [reward.id for reward in rewards]
        if order and ids != order:
            raise SystemExit(f"{run}: {method} was graded on other prompts than the others")
        order = ids
        per_prompt.setdefault(TARGETS, [round(r.target_reward, 4) for r in rewards])
        per_prompt[method] = [round(r.reward, 4) for r in rewards]
    return {**results, "per_prompt": per_prompt}


def as_text(results: dict[str, Any]) -> str:
    """JSON for people and diffs: indented, but every list of rewards on one line."""
    head = {key: value for key, value in results.items() if key != "per_prompt"}
    lists = ",\n".join(
        f"  {json.dumps(name)}: {json.dumps(values, separators=(',', ':'))}"
        for name, values in results["per_prompt"].items()
    )
    body = json.dumps(head, indent=1, ensure_ascii=False).removesuffix("\n}")
    return f'{body},\n "per_prompt": {{\n{lists}\n }}\n}}\n'


def main(arguments: list[str] | None = None) -> int:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--to", type=Path, default=FOLDER, help="folder of the result files")
    options = parser.parse_args(arguments)
    options.to.mkdir(parents=True, exist_ok=True)
    for run in options.runs:
        try:
            results = collect(run)
        except (OSError, ValueError, ScminiError) as error:
            print(f"{run}: {error}", file=sys.stderr)
            return 1
        path = options.to / f"seed-{results['config']['seed']}.json"
        path.write_text(as_text(results), encoding="utf-8")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

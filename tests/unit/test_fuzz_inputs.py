"""Whatever a person, a program or a bad disk put into a file: a right result, or a sentence.

`pytest -m slow tests/unit/test_fuzz_inputs.py -s` tries at least 10,000 inputs and prints how many;
`SCMINI_FUZZ_EXAMPLES` asks for more of each kind.
"""

import os
from pathlib import Path

import fuzz_config
import fuzz_data
import fuzz_records
import pytest
from fuzz_helpers import Fuzzer, fuzz, survives
from hypothesis import strategies as st

from scmini.errors import DataError

FUZZERS = [*fuzz_config.FUZZERS, *fuzz_data.FUZZERS, *fuzz_records.FUZZERS]
FEW, MANY, AT_LEAST = 150, 600, 10_000
quiet = pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")


@quiet
@pytest.mark.parametrize("fuzzer", FUZZERS, ids=lambda fuzzer: fuzzer.name.replace(" ", "-"))
def test_any_input(fuzzer: Fuzzer, tmp_path: Path) -> None:
    tried = fuzz(fuzzer, FEW, tmp_path, same_every_time=True)
    assert tried >= FEW * fuzzer.share * 0.9


@quiet
@pytest.mark.slow
def test_many_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examples = int(os.environ.get("SCMINI_FUZZ_EXAMPLES", MANY))
    tried = {}
    for number, fuzzer in enumerate(FUZZERS):
        folder = tmp_path / str(number)
        folder.mkdir()
        tried[fuzzer.name] = fuzz(fuzzer, examples, folder, same_every_time=False)
    rows = [*tried.items(), ("all", sum(tried.values()))]
    with capsys.disabled():
        print("\n" + "\n".join(f"{name:<40}{count:>8,} inputs" for name, count in rows))
    assert sum(tried.values()) >= AT_LEAST


@pytest.mark.parametrize(
    "message",
    ["what happened", "x.yaml: a\x1b[31mb", "x.yaml: " + "long " * 900, "x.yaml:" + "\nline" * 9],
)
def test_the_property_can_fail(message: str, tmp_path: Path) -> None:
    def refuse() -> None:
        raise DataError(message)

    with pytest.raises(AssertionError):
        survives(refuse, "x.yaml")
    broken = Fuzzer("broken", st.integers(), lambda number, folder: survives(lambda: 1 / 0, ""))
    with pytest.raises(ZeroDivisionError):
        fuzz(broken, 5, tmp_path, same_every_time=True)

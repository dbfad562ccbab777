"""Every kernel variant, compiled for every supported GPU without one: does it fit, does it spill?

Against limits of the hardware and against the committed table, ahead_of_time.json. After a change
of a kernel, of its configurations or of Triton: `python tests/kernels/ahead_of_time.py --write`,
and read the difference.
"""

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest

from scmini_kernels.triton.variants import SHARED_LIMIT
from tests.kernels import ahead_of_time

TABLE = json.loads(ahead_of_time.TABLE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def all_rows():
    """What the script prints for every compute capability, with all cores at work."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, ahead_of_time.__file__],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(params=SHARED_LIMIT, ids=lambda capability: f"sm_{capability}")
def capability(request):
    return request.param


@pytest.fixture
def rows(all_rows, capability):
    """Of one compute capability: {name in the table: row}."""
    found = [row for row in all_rows if row["capability"] == capability]
    assert found
    by_name = {ahead_of_time.key(row): row for row in found}
    assert len(by_name) == len(found), "two variants of a module have the same name"
    return by_name


def test_shared_memory_fits_the_card(rows, capability):
    too_much = {name: row["shared"] for name, row in rows.items()}
    limit = SHARED_LIMIT[capability]
    assert {name: shared for name, shared in too_much.items() if shared > limit} == {}


def test_registers_and_spills_are_those_of_the_table(rows, capability):
    expected = {
        name: row for name, row in TABLE["rows"].items() if name.endswith(f" on sm_{capability}")
    }
    got = {name: ahead_of_time.table_row(row) for name, row in rows.items()}
    if importlib.metadata.version("triton") == TABLE["triton"]:
        assert got == expected, "run python tests/kernels/ahead_of_time.py --write and compare"
        return
    # Another compiler allocates registers in another way, but it must not spill.
    assert set(got) == set(expected)
    more = {
        name: (row["stack"], expected[name]["stack"])
        for name, row in got.items()
        if row["stack"] > expected[name]["stack"] + 16 or row["registers"] > 255
    }
    assert more == {}


def test_matrix_units_are_used_by_the_kernels_that_multiply(rows, capability):
    wrong = {}
    for name, row in rows.items():
        units = row["hmma"] + row["hgmma"]
        if (units > 0) != row["multiplies"]:
            wrong[name] = units
    assert wrong == {}
    if capability == 90:
        assert [n for n, row in rows.items() if row["multiplies"] and not row["hgmma"]] == []


def test_pipelined_kernels_copy_asynchronously(rows):
    pipelined = {n: row for n, row in rows.items() if row["multiplies"] and row["num_stages"] > 1}
    assert [name for name, row in pipelined.items() if not row["async_copies"]] == []


def test_the_table_has_every_card():
    cards = {int(name.rpartition("sm_")[2]) for name in TABLE["rows"]}
    assert cards == set(SHARED_LIMIT)

"""Compile every kernel variant for every supported GPU, on a machine that needs none, and look.

    python tests/kernels/ahead_of_time.py [--capability 90 ...] [--module NAME ...]     JSON rows
    python tests/kernels/ahead_of_time.py --write                     refresh the committed table

A row says what one variant takes on one compute capability: shared memory in bytes, registers per
thread, bytes of stack, and how many instructions of a kind its machine code has: spills (STL, LDL),
matrix multiplications (HMMA; HGMMA, those of a whole warp group on Hopper) and asynchronous copies
to shared memory (LDGSTS, or the bulk copies of the tensor memory accelerator).

Not a test itself: Triton cannot compile in a process where its interpreter is on, as in the tests.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("ahead_of_time.json")
PACKAGE = "scmini_kernels.triton"
INSTRUCTIONS = {
    "spills": r"\b(?:STL|LDL)\b",
    "hmma": r"\bHMMA\b",
    "hgmma": r"\bHGMMA\b",
    "async_copies": r"\b(?:LDGSTS|UTMALDG|UBLKCP)\b",
}
# Two copies of Triton and PyTorch fit everywhere; more processes than cores gain nothing.
PROCESSES = 2


@cache
def modules() -> dict[str, ModuleType]:
    """The modules of the kernels' package that say what they compile."""
    path = importlib.import_module(PACKAGE).__path__
    found = {
        info.name: importlib.import_module(f"{PACKAGE}.{info.name}")
        for info in pkgutil.iter_modules(path)
    }
    return {name: module for name, module in found.items() if hasattr(module, "variants")}


def measure(module: str, index: int, capability: int) -> dict[str, Any]:
    """The row of one variant."""
    variant = modules()[module].variants(capability)[index]
    started = time.perf_counter()
    compiled = _compile(variant, capability)
    return {
        "module": module,
        "variant": variant.name,
        "capability": capability,
        "multiplies": variant.multiplies,
        "num_stages": variant.num_stages,
        "shared": compiled.metadata.shared,
        **_inspect(compiled.asm["cubin"]),
        "seconds": round(time.perf_counter() - started, 1),
    }


def _compile(variant: Any, capability: int) -> Any:
    """As the just-in-time compiler would, divisible arguments included: without them it neither
    vectorises nor pipelines, and what is measured is another program."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    given = {*variant.signature, *variant.constants}
    if given != set(names):
        raise ValueError(
            f"{variant.name}: arguments without a type or a value, or unknown to the kernel: "
            f"{sorted(given ^ set(names))}"
        )
    source = ASTSource(
        fn=variant.kernel,
        signature={name: variant.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in variant.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in variant.divisible},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _inspect(cubin: bytes) -> dict[str, int]:
    """Registers, stack and instruction counts, by the tools that Triton brings."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

    def dump(option: str) -> str:
        return subprocess.run(
            [str(tool), option, file.name], check=True, capture_output=True, text=True
        ).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = dump("--dump-resource-usage"), dump("-sass")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None or "EXIT" not in code:
        raise ValueError(f"cuobjdump says neither registers nor code:\n{usage}{code[:1000]}")
    counts = {name: len(re.findall(pattern, code)) for name, pattern in INSTRUCTIONS.items()}
    return {"registers": int(found[1]), "stack": int(found[2]), **counts}


def measure_all(capabilities: list[int], names: list[str]) -> Iterator[dict[str, Any]]:
    """Rows in a fixed order, each as soon as it is known."""
    jobs = [
        (name, index, capability)
        for capability in capabilities
        for name, module in modules().items()
        if not names or name in names
        for index in range(len(module.variants(capability)))
    ]
    workers = min(PROCESSES, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(measure, *zip(*jobs, strict=True), chunksize=4)


def key(row: dict[str, Any]) -> str:
    """What a row is called in the table."""
    return f"{row['module']}: {row['variant']} on sm_{row['capability']}"


def table_row(row: dict[str, Any]) -> dict[str, int]:
    """What the table keeps of a row."""
    columns = ("shared", "registers", "stack", *INSTRUCTIONS)
    return {name: row[name] for name in columns}


def write_table(rows: list[dict[str, Any]]) -> None:
    """One line a row, so that a change shows as one line."""
    import triton

    lines = [f"  {json.dumps(key(row))}: {json.dumps(table_row(row))}" for row in rows]
    body = ",\n".join(lines)
    TABLE.write_text(f'{{"triton": "{triton.__version__}", "rows": {{\n{body}\n}}}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="refresh the committed table")
    parser.add_argument("--capability", type=int, nargs="*", help="default: all")
    parser.add_argument("--module", nargs="*", default=[], help=f"of {PACKAGE}; default: all")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing")
    if arguments.write and (arguments.capability or arguments.module):
        parser.error("--write takes the whole table")

    from scmini_kernels.triton.variants import SHARED_LIMIT

    rows = []
    for row in measure_all(arguments.capability or list(SHARED_LIMIT), arguments.module):
        rows.append(row)
        print(json.dumps(row), flush=True)
        print(f"{len(rows)}: {key(row)}, {row['seconds']} s", file=sys.stderr, flush=True)
    if arguments.write:
        write_table(rows)


# The worker processes import this file under another name, and then from the checkout.
if str(ROOT / "kernels") not in sys.path:
    sys.path.insert(0, str(ROOT / "kernels"))

if __name__ == "__main__":
    main()

"""An adapter merged into its base weights: a plain 16-bit checkpoint that any engine serves."""

import os
import shutil
from pathlib import Path

from scmini.models.loading import load_for_merging, load_tokenizer
from scmini.sections import ModelConfig


def merge_adapter(config: ModelConfig, source: str, adapter: Path, out: Path) -> Path:
    """Write base plus adapter to the folder `out`, in `config.dtype`; kept where it is there.

    The base is read in full precision, never through NF4, and the product is added to it before it
    is rounded. Needs the memory of the whole model, on the CPU.

    Returns:
        `out`, with model and tokenizer. It is there whole or not at all.

    Raises:
        DataError: the adapter does not fit the base.
    """
    if out.is_dir():
        return out
    torn = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(torn, ignore_errors=True)
    load_for_merging(config, source, adapter).save_pretrained(torn, safe_serialization=True)
    load_tokenizer(str(adapter)).save_pretrained(torn)
    for path in torn.iterdir():
        with open(path, "rb") as handle:
            os.fsync(handle.fileno())
    os.replace(torn, out)
    return out

"""Fuzzers of what stages hand to one another, of manifests and of replies and weights."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from fake_stages import config
from fuzz_helpers import Fuzzer, damaged, lines, mutated, odd_text, survives, values
from hypothesis import strategies as st
from safetensors.torch import save

from scmini import pipeline, records
from scmini.data.answers import read_answers
from scmini.data.vectors import read_vectors_shard
from scmini.evaluation.judge.cache import VerdictCache
from scmini.evaluation.judge.reply import Reply, read_reply, to_json
from scmini.exporting.source import read_manifest
from scmini.models import checkpoint_files, loading, starling
from scmini.run_folder import RunFolder
from scmini.stage_graph import Task
from scmini.store import Recipe, Store, digest_of

_PROMPT = [{"role": "user", "content": "a"}]
ROWS: dict[str, Any] = {
    "examples": {"id": "1", "prompt": _PROMPT, "target": "t", "rejected": ["r"]},
    "pairs": {
        **{"id": "1", "prompt": _PROMPT, "chosen": "c", "rejected": ["r"]},
        **{"similarity": [0.5], "response_index": [3]},
    },
    "generations": {"id": "1", "prompt": _PROMPT, "response": "r", "target": "t"},
    "rewards": {"id": "1", "reward": 0.5, "target_reward": -1},
}
_READERS: dict[str, Callable[[Path], list[Any]]] = {
    "examples": records.read_examples,
    "pairs": records.read_pairs,
    "generations": records.read_generations,
    "rewards": records.read_rewards,
}


def check_rows(given: tuple[str, bytes], folder: Path) -> None:
    kind, content = given
    path = folder / "rows.jsonl"
    path.write_bytes(content)

    def read() -> None:
        found = _READERS[kind](path)
        records.write_jsonl(folder / "written.jsonl", found)
        assert _READERS[kind](folder / "written.jsonl") == found

    survives(read, "rows.jsonl")


def check_shard(content: bytes, folder: Path) -> None:
    path = folder / "part-00000.parquet"
    path.write_bytes(content)

    def read() -> None:
        found = records.read_samples_shard(path)
        records.write_samples(folder / "written.parquet", found)
        assert records.read_samples_shard(folder / "written.parquet") == found

    survives(read, "part-00000.parquet")
    survives(lambda: json.dumps([vars(a) for a in read_answers(path)]), "part-00000.parquet")


def check_vectors(given: tuple[bytes, bytes], folder: Path) -> None:
    path = folder / "part-00000.npy"
    path.write_bytes(given[0])
    path.with_suffix(".ids.json").write_bytes(given[1])

    def read() -> None:
        groups, vectors = read_vectors_shard(path)
        assert np.asarray(vectors).shape[0] == sum(rows for _, rows in groups)

    survives(read, "part-00000")


def check_manifest(content: bytes, folder: Path) -> None:
    path = folder / ".store" / "data-0123456789ab"
    path.mkdir(parents=True, exist_ok=True)
    (path / "manifest.json").write_bytes(content)
    store = Store(folder / ".store")

    def read() -> None:
        found = store.load(path.name)
        if found is not None:
            json.dumps([found.seconds, found.size, found.recipe.digest])
            digest_of(found.manifest)
            store.verify(found)

    survives(read, "data-0123456789ab")
    survives(lambda: read_manifest(path), "manifest.json")


def check_run(content: bytes, folder: Path) -> None:
    (folder / "run.json").write_bytes(content)

    def read() -> None:
        made = RunFolder(folder)
        assert isinstance(made.finished_stages, set)
        assert isinstance(made.entry(Task("data")), dict)
        json.dumps(pipeline.status(config(), folder))

    survives(read, "")


def check_reply(text: str, folder: Path) -> None:
    reply = read_reply(text)
    assert isinstance(reply, Reply)
    path = folder / "cache.jsonl"
    path.unlink(missing_ok=True)
    if reply.paid:
        VerdictCache(path).add("key", "model", reply)
        assert VerdictCache(path).replies("key") == [reply]


def check_cache(content: bytes, folder: Path) -> None:
    path = folder / "cache.jsonl"
    path.write_bytes(content)
    cache = VerdictCache(path)
    assert cache.damaged <= content.count(b"\n") + 1
    for reply in cache.replies("k"):
        json.dumps(to_json(reply))


def check_index(content: bytes, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_bytes(content)
    (folder / "a.safetensors").write_bytes(_WEIGHTS)
    survives(lambda: _inside(folder, checkpoint_files.weight_files(folder)), folder.name)
    survives(lambda: list(checkpoint_files.stored_tensors(folder)), folder.name)
    survives(lambda: _inside(folder, starling.weight_files(folder)), folder.name)


def _inside(folder: Path, files: Any) -> None:
    assert all((folder / file).parent == folder for file in files), files


def check_weights(content: bytes, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(content)

    def read() -> None:
        for tensor in checkpoint_files.stored_tensors(folder):
            found = checkpoint_files.read_tensor(folder, tensor)
            assert tuple(found.shape) == tensor.shape

    survives(read, "model.safetensors")
    survives(lambda: starling.read([path]), "model.safetensors")


def check_pickle(content: bytes, folder: Path) -> None:
    path = folder / "pytorch_model.bin"
    path.write_bytes(content)
    survives(lambda: starling.read([path]), "pytorch_model.bin")


def check_adapter(content: bytes, folder: Path) -> None:
    (folder / "adapter_config.json").write_bytes(content)
    (folder / "adapter_model.safetensors").write_bytes(_WEIGHTS)
    survives(lambda: loading.check_adapter_folder(folder), "adapter_config.json")


_SAMPLE = {
    **{"id": "1", "prompt_token_ids": [1, 2], "failure": None},
    "responses": [{"text": "a", "token_ids": [3], "finish_reason": "stop"}],
}


def _table(row: Any) -> bytes:
    """A Parquet file of whatever the columns' types turn out to be; broken where there is none."""
    out = io.BytesIO()
    try:
        pq.write_table(pa.Table.from_pylist([row, row]), out)
    except Exception:
        return b"PAR1"
    return out.getvalue()


def _saved(array: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def _checkpoint() -> bytes:
    out = io.BytesIO()
    torch.save({"v_head.weight": torch.ones(1, 2), "a": torch.arange(3)}, out)
    return out.getvalue()


_WEIGHTS = save({"a": torch.ones(2, 3), "v_head.weight": torch.ones(1, 2)})
_IDS = [{"id": "1", "rows": 2, "responses": 1}]
_MANIFEST = {
    "recipe": vars(Recipe("data", None, 1, {"seed": 1})),
    **{"digest": "0", "products": "0", "seconds": 1.0, "finished": "", "counts": {}, "notes": {}},
    **{"versions": {}, "files": {"a": {"bytes": 1, "sha256": "0"}}},
}
_RUN = {
    "name": "toy",
    "stages": {
        "data": {"folder": "data-0123456789ab", "failed": {"digest": "0", "message": "m"}},
        "dpo:dpo": {"folder": "dpo-dpo-0123456789ab"},
    },
}
_INDEX = {"metadata": {}, "weight_map": {"a": "a.safetensors", "b": "../a.safetensors"}}
_REPLY = {
    "choices": [
        {
            **{"message": {"role": "assistant", "content": "[[5]]"}, "finish_reason": "stop"},
            "logprobs": {"content": [{"top_logprobs": [{"token": "m", "logprob": -0.1}]}]},
        }
    ],
    "usage": {"prompt_tokens": 5, "completion_tokens": 6},
}
_CACHED = {
    "key": "k",
    "outcome": "answered",
    "text": "t",
    "top_logprobs": {"m": -1},
    "tokens": [1, 2],
}
_ADAPTER = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}


def as_json(row: Any) -> st.SearchStrategy[bytes]:
    """JSON that is nearly right, or any bytes."""
    return st.one_of(
        mutated(row).map(lambda made: json.dumps(made).encode()),
        mutated(row).map(lambda made: json.dumps(made).encode()),
        damaged(json.dumps(row).encode()),
        st.binary(max_size=60),
        values.map(lambda made: json.dumps(made).encode()),
    )


rows = st.sampled_from(sorted(ROWS)).flatmap(
    lambda kind: st.tuples(
        st.just(kind),
        st.one_of(
            st.lists(mutated(ROWS[kind]), max_size=3).map(lines),
            damaged(lines([ROWS[kind]])),
            st.binary(max_size=60),
        ),
    )
)
shards = st.one_of(mutated(_SAMPLE).map(_table), damaged(_table(_SAMPLE)), st.binary(max_size=60))
vectors = st.tuples(
    st.one_of(
        damaged(_saved(np.ones((2, 3), np.float16))),
        st.sampled_from(
            [
                *(np.ones((2, 3), np.float16), np.ones(2), np.ones((2, 3)), np.zeros((0, 0), "e")),
                *(np.array([{}, 1], dtype=object), np.array(["a"]), np.ones((2, 1, 1), np.float16)),
            ]
        ).map(_saved),
    ),
    as_json(_IDS),
)
pickles = st.one_of(
    damaged(_checkpoint()),
    st.binary(max_size=60),
    values.map(lambda value: pickle.dumps(value, protocol=2)),
    st.binary(max_size=60).map(
        lambda data: _zip({"archive/data.pkl": data, "archive/version": b"3"})
    ),
)


def _zip(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


FUZZERS = [
    Fuzzer("rows of records", rows, check_rows, share=2.0),
    Fuzzer("shards of answers", shards, check_shard, share=0.5),
    Fuzzer("shards of vectors", vectors, check_vectors, share=0.5),
    Fuzzer("manifests", as_json(_MANIFEST), check_manifest),
    Fuzzer("run.json", as_json(_RUN), check_run, share=0.1),
    Fuzzer("replies of a judge", st.one_of(mutated(_REPLY).map(json.dumps), odd_text), check_reply),
    Fuzzer("caches of a judge", as_json(_CACHED), check_cache),
    Fuzzer("indexes of checkpoints", as_json(_INDEX), check_index, share=0.5),
    Fuzzer(
        "weights", st.one_of(damaged(_WEIGHTS), st.binary(max_size=60)), check_weights, share=0.5
    ),
    Fuzzer("pickles", pickles, check_pickle, share=0.5),
    Fuzzer("configurations of adapters", as_json(_ADAPTER), check_adapter, share=0.5),
]

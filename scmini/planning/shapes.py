"""The sizes of a model that decide what it costs: of known models, or from a config.json."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from scmini.errors import ConfigError, DataError

_DOWNLOAD_COMMAND = "hf download {name} --include '*.json' --local-dir FOLDER"


@dataclass(frozen=True)
class Shape:
    """A transformer. A `decoder` is a Llama: seven linears a layer and no biases; an `encoder` is a
    BERT: six linears a layer, learned positions, a pooler."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool = False
    """Whether the output embedding is the input embedding."""
    kind: Literal["decoder", "encoder"] = "decoder"
    positions: int = 0
    """Learned position embeddings (encoders)."""
    file_bytes: int = 2
    """Of one weight in the published files."""

    @property
    def query(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Width of all key heads together; values have the same."""
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of the linears of one layer."""
        attention = (
            (self.hidden, self.query),
            (self.hidden, self.kv),
            (self.hidden, self.kv),
            (self.query, self.hidden),
        )
        up, down = (self.hidden, self.ffn), (self.ffn, self.hidden)
        return (*attention, up, down) if self.kind == "encoder" else (*attention, up, up, down)

    @property
    def linear_weights(self) -> int:
        """Weights of all linears of all layers: those that NF4 packs and LoRA adapts."""
        return self.layers * sum(a * b for a, b in self.linears)

    def lora_weights(self, rank: int) -> int:
        """Of an adapter on all linears."""
        return self.layers * rank * sum(a + b for a, b in self.linears)

    @property
    def head_weights(self) -> int:
        """Of the output embedding, whether or not it is kept a second time."""
        return self.vocab * self.hidden

    @property
    def other_weights(self) -> int:
        """All weights but the linears': embeddings, output embedding, norms; an encoder's biases
        and pooler."""
        if self.kind == "encoder":
            biases = self.layers * sum(outputs for _, outputs in self.linears)
            norms = (4 * self.layers + 2) * self.hidden
            rows = self.vocab + self.positions + 2  # two token types
            return rows * self.hidden + biases + norms + self.hidden * (self.hidden + 1)
        norms = (2 * self.layers + 1) * self.hidden
        return (1 if self.tied else 2) * self.head_weights + norms

    @property
    def weights(self) -> int:
        return self.linear_weights + self.other_weights

    @property
    def kv_weights_per_token(self) -> int:
        """Numbers that a token leaves in the KV cache of all layers."""
        return 2 * self.layers * self.kv


def _mistral(name: str) -> Shape:
    return Shape(name, 32, 4096, 32, 8, 128, 14336, 32000)


def _llama_2(name: str) -> Shape:
    return Shape(name, 32, 4096, 32, 32, 128, 11008, 32000)


def _bert(name: str, layers: int, hidden: int, heads: int) -> Shape:
    size, ffn = hidden // heads, 4 * hidden
    return Shape(
        *(name, layers, hidden, heads, heads, size, ffn, 30522),
        kind="encoder",
        positions=512,
        file_bytes=4,
    )


# From the config.json of each. Starling-RM's own head is 4096 weights more on the body of
# Llama-2-7b-chat, and its lm_head is not kept; it is counted, since the difference is 2 %.
KNOWN = {
    shape.name: shape
    for shape in (
        _mistral("mistralai/Mistral-7B-v0.1"),
        _mistral("alignment-handbook/zephyr-7b-sft-full"),
        _llama_2("meta-llama/Llama-2-7b-chat-hf"),
        _llama_2("berkeley-nest/Starling-RM-7B-alpha"),
        _bert("WhereIsAI/UAE-Large-V1", 24, 1024, 16),
        _bert("sentence-transformers/all-MiniLM-L6-v2", 6, 384, 12),
    )
}

_ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert", "mpnet", "distilbert", "electra")
_TIED_BY_DEFAULT = ("gemma", "cohere")
_OTHER_NAMES = {  # DistilBERT
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
}


def shape_of(key: str, name: str, revision: str | None = None) -> Shape:
    """The shape of a model that the configuration names under `key`: a folder, a known name, or a
    name whose config.json the Hugging Face cache has. Nothing is fetched.

    Raises:
        ConfigError: it is none of these, or a kind of model that cannot be planned.
        DataError: the folder or its config.json is missing or broken.
    """
    folder = _folder(key, name)
    if folder is None:
        if name in KNOWN:
            return KNOWN[name]
        folder = cached_folder(name, revision)
    if folder is None or not _config_file(folder).is_file():
        if folder is not None and Path(name).is_dir():
            raise DataError(f"{key}: {name} has no config.json")
        raise ConfigError(
            f"{key}: the sizes of {name} are not known here, and planning downloads nothing; give "
            f"a local folder with its config.json ({_DOWNLOAD_COMMAND.format(name=name)}), or one "
            f"of {', '.join(KNOWN)}"
        )
    path = _config_file(folder)
    try:
        table = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{key}: {path}: cannot be read ({error})") from None
    if not isinstance(table, dict):
        raise DataError(f"{key}: {path}: expected an object, got {type(table).__name__}")
    return shape_from_config(table, name, f"{key}: {path}")


def _folder(key: str, name: str) -> Path | None:
    """The local folder that a name stands for; a name on the hub gives None."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise DataError(f"{key}: the folder {name} does not exist")
    return None


def _config_file(folder: Path) -> Path:
    inner = folder / "0_Transformer" / "config.json"  # of older sentence-transformers folders
    return inner if inner.is_file() else folder / "config.json"


def cached_folder(name: str, revision: str | None = None) -> Path | None:
    """The newest version of a model in the Hugging Face cache, or the named revision of it."""
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE", f"{home}/hub")).expanduser()
    folder = hub / f"models--{name.replace('/', '--')}"
    commit = revision or "main"
    with suppress(OSError, UnicodeDecodeError):  # else it is a commit itself
        commit = (folder / "refs" / commit).read_text(encoding="utf-8").strip()
    found = folder / "snapshots" / commit
    return found if found.is_dir() else None


def is_here(name: str, revision: str | None = None) -> bool:
    """Whether a model's weights need no download."""
    if Path(name).expanduser().is_dir():
        return True
    folder = cached_folder(name, revision)
    return folder is not None and any(any(folder.rglob(p)) for p in ("*.safetensors", "*.bin"))


def shape_from_config(table: Mapping[str, Any], name: str, where: str) -> Shape:
    """The shape that a transformers config.json describes; `where` names it in messages."""
    inner = table.get("text_config")
    if isinstance(inner, dict):
        table = {**table, **inner}
    kind = str(table.get("model_type", ""))
    if any(table.get(key) for key in ("num_local_experts", "num_experts", "n_routed_experts")):
        raise ConfigError(f"{where}: a mixture of experts cannot be planned")
    hidden = _size(table, "hidden_size", where)
    heads = _size(table, "num_attention_heads", where)
    encoder = kind in _ENCODERS
    tied = table.get("tie_word_embeddings")
    wide = str(table.get("dtype") or table.get("torch_dtype") or "bfloat16") == "float32"
    return Shape(
        name=name,
        layers=_size(table, "num_hidden_layers", where),
        hidden=hidden,
        heads=heads,
        kv_heads=_size(table, "num_key_value_heads", where, heads),
        head_dim=_size(table, "head_dim", where, hidden // heads),
        ffn=_size(table, "intermediate_size", where),
        vocab=_size(table, "vocab_size", where),
        tied=not encoder and (kind.startswith(_TIED_BY_DEFAULT) if tied is None else bool(tied)),
        kind="encoder" if encoder else "decoder",
        positions=_size(table, "max_position_embeddings", where, 512) if encoder else 0,
        file_bytes=4 if wide else 2,
    )


def _size(table: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = table.get(key)
    if value is None:
        value = table.get(_OTHER_NAMES.get(key, key), default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise DataError(f"{where}: {key}: expected a whole number above 0, got {value!r:.40}")
    return value

"""Encoders of sentence-transformers, fed in batches of a fixed number of tokens."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scmini.console import say
from scmini.errors import ConfigError, DataError, DoesNotFit, EnvironmentProblem
from scmini.models.hashed_ngrams import Flags, Vectors
from scmini.quoting import quoted
from scmini.sections import EmbedConfig

Ids = NDArray[np.int64]

_TEXTS = 256
"""Texts tokenised at a time: the tokenizer's own records are far larger than the ids."""
_CPU_TOKENS = 2048
"""Larger batches fall out of a CPU's cache and are slower."""


class SentenceTransformerEncoder:
    """A sentence-transformers model, on the GPU if there is one.

    Tokens become one vector as `embed.pooling` says, else as the model's own files say; of a plain
    transformers folder, which says nothing, sentence-transformers takes the mean (of a causal
    language model the last token). The transformer computes in `embed.dtype`, all that follows it
    (pooling, projections, normalisation) in float32. The model reads `embed.max_length` tokens, its
    special tokens included, or fewer if it was made for fewer.
    """

    def __init__(self, config: EmbedConfig) -> None:
        import torch

        from scmini.models.loading import device

        self._device = device()
        dtype = _dtype(config.dtype, self._device)
        self._model = _load_sentence_transformer(config.encoder, dtype, self._device)
        self._tokenizer = _text_tokenizer(self._model, config.encoder)
        if config.pooling is not None:
            _set_pooling(self._model, config.pooling, config.encoder)
        if dtype != torch.float32:
            _widen_after_first(self._model)
        self._model.eval()
        self._prompt = _default_prompt(self._model)
        self._before, self._after = _special_ids(self._tokenizer, config.encoder)
        specials = len(self._before) + len(self._after)
        self._room = _limit(self._model, config) - specials
        if self._room < 1:
            raise ConfigError(
                f"embed.max_length: {config.encoder} puts {specials} tokens around every text; "
                "raise it above that"
            )
        self._in_pieces = config.long_texts == "mean"
        self._budget = config.tokens_per_batch
        if self._device.type == "cpu":
            self._budget = min(self._budget, _CPU_TOKENS)
        self.dimensions = int(self._forward(self._tokenize(["a"])).shape[1])

    def fit(self, batches: Iterable[list[str]], kept: Path | None = None) -> None:
        """Nothing is learned, nothing is read."""

    def encode(
        self, texts: list[str], on_share: Callable[[float], None] = lambda share: None
    ) -> tuple[Vectors, Flags]:
        """As `scmini.models.encoders.Encoder` says; numbers that are not finite are passed on.

        With `embed.long_texts: mean` a long text is cut into pieces, each with special tokens of
        its own. Its vector is the mean of theirs, each of length 1, weighted by their tokens
        without the special ones, and brought to length 1 again.

        Raises:
            DoesNotFit: the memory does not even hold one text.
        """
        pieces: list[Ids] = []
        owners: list[int] = []
        long = np.zeros(len(texts), np.bool_)
        for place, ids in enumerate(self._tokenize(texts)):
            long[place] = len(ids) > self._room
            end = len(ids) if self._in_pieces else min(len(ids), self._room)
            for start in range(0, end, self._room):
                pieces.append(ids[start : min(start + self._room, end)])
                owners.append(place)
        vectors = np.zeros((len(texts), self.dimensions), np.float32)
        if pieces:
            read = np.array([len(piece) for piece in pieces])
            shares = read / np.bincount(owners, read, len(texts))[owners]
            parts = _unit(self._forward_all(pieces, read, on_share))
            parts *= shares[:, None].astype(np.float32)
            np.add.at(vectors, owners, parts)
        return _unit(vectors), long

    def _tokenize(self, texts: list[str]) -> list[Ids]:
        """Ids of each text without special tokens; none for a blank one."""
        found = [np.zeros(0, np.int64)] * len(texts)
        places = [place for place, text in enumerate(texts) if text.strip()]
        for start in range(0, len(places), _TEXTS):
            chunk = places[start : start + _TEXTS]
            made = self._tokenizer(
                [self._prompt + texts[place] for place in chunk],
                add_special_tokens=False,
                truncation=False,
                padding=False,
                verbose=False,
            )
            for place, ids in zip(chunk, made["input_ids"], strict=True):
                found[place] = np.array(ids, np.int64)
        return found

    def _forward_all(
        self, pieces: list[Ids], read: NDArray[np.int64], on_share: Callable[[float], None]
    ) -> Vectors:
        """Longest first, in batches of at most the budget; on out-of-memory that is halved."""
        widths = read + len(self._before) + len(self._after)
        order = np.argsort(-widths, kind="stable")
        finished = np.cumsum(widths[order]) / widths.sum()
        vectors = np.empty((len(pieces), self.dimensions), np.float32)
        done = 0
        while done < len(order):
            width = int(widths[order[done]])
            batch = order[done : done + max(1, self._budget // width)]
            made = self._attempt([pieces[place] for place in batch])
            if made is not None:
                vectors[batch] = made
                done += len(batch)
                on_share(float(finished[done - 1]))
            elif len(batch) > 1:
                self._budget = len(batch) * width // 2
            else:
                raise DoesNotFit(
                    f"embed: one text of {width} tokens does not fit into the memory; "
                    "lower embed.max_length"
                )
        return vectors

    def _attempt(self, pieces: list[Ids]) -> Vectors | None:
        """None if it does not fit into the memory."""
        import torch

        try:
            return self._forward(pieces)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
        torch.cuda.empty_cache()  # here, for the error above held on to the tensors
        return None

    def _forward(self, pieces: list[Ids]) -> Vectors:
        """[pieces, dimensions] float32 as the model's last module leaves them."""
        import torch

        rows = [np.concatenate([self._before, piece, self._after]) for piece in pieces]
        width = max(len(row) for row in rows)
        ids = np.full((len(rows), width), self._tokenizer.pad_token_id or 0, np.int64)
        mask = np.zeros_like(ids)
        for number, row in enumerate(rows):
            start = width - len(row) if self._tokenizer.padding_side == "left" else 0
            ids[number, start : start + len(row)] = row
            mask[number, start : start + len(row)] = 1
        features = {"input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in self._tokenizer.model_input_names:
            features["token_type_ids"] = np.zeros_like(ids)
        with torch.inference_mode():
            tensors = {key: torch.from_numpy(x).to(self._device) for key, x in features.items()}
            made = self._model(tensors)["sentence_embedding"]
            made = made[:, : getattr(self._model, "truncate_dim", None)]
            vectors: Vectors = made.float().cpu().numpy()
        return vectors


def _unit(vectors: Vectors) -> Vectors:
    """In place to length 1; zeros stay. Squares are summed in float64, where none overflows."""
    lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64))
    with np.errstate(invalid="ignore"):  # what is not finite is passed on
        vectors /= np.where(lengths == 0, 1, lengths)[:, None].astype(np.float32)
    return vectors


def _is_out_of_memory(error: RuntimeError) -> bool:
    import torch

    signs = ("CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)


def _dtype(name: str, device: Any) -> Any:
    """`auto`: bfloat16 on a GPU that computes in it (compute capability 8.0), else float16."""
    import torch

    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        return torch.float32
    has_bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if has_bfloat16 else torch.float16


def _load_sentence_transformer(name: str, dtype: Any, device: Any) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise EnvironmentProblem(
            f"embed.encoder: {name} needs a package that is missing ({error}); "
            "pip install sentence-transformers"
        ) from None
    from safetensors import SafetensorError

    from scmini.models.loading import quietly

    local = name.startswith(("/", ".", "~")) or name.count("/") > 1
    if local and not Path(name).is_dir():
        raise DataError(f"embed.encoder: the folder {name} does not exist")
    _refuse_code(Path(name))
    options = {"use_safetensors": True, "dtype": dtype}
    try:
        with quietly():
            return SentenceTransformer(
                name, device=str(device), trust_remote_code=False, model_kwargs=options
            )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        if Path(name).is_dir():
            raise DataError(f"embed.encoder: {name} holds no usable encoder ({reason})") from None
        raise EnvironmentProblem(
            f"embed.encoder: {name} could not be fetched ({reason}); check the name and the "
            "connection, or download it elsewhere and give the folder"
        ) from None


def _refuse_code(folder: Path) -> None:
    """DataError for a local encoder made of Python files of its own.

    Before version 6 sentence-transformers ran what lies in a local folder without being told to.
    """
    try:
        modules = json.loads((folder / "modules.json").read_bytes())
        kinds = [str(module["type"]) for module in modules]
    except OSError:
        return
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(
            f"embed.encoder: {folder / 'modules.json'}: damaged; fetch the encoder again"
        ) from None
    for kind in kinds:
        if not kind.startswith("sentence_transformers."):
            raise DataError(
                f"embed.encoder: {folder} needs Python code that comes with it ({quoted(kind)} in "
                "modules.json), which scmini never runs; name another encoder"
            )


def _text_tokenizer(model: Any, name: str) -> Any:
    """The tokenizer of a model that reads plain text; `DataError` for one that does not."""
    from transformers import PreTrainedTokenizerBase

    tokenizer = getattr(model[0], "tokenizer", None)
    reads = getattr(model, "modalities", ["text"])  # not before sentence-transformers 5.3
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or "message" in reads:
        raise DataError(
            f"embed.encoder: {name} is no text encoder with a transformers tokenizer "
            f"({type(model[0]).__name__}, which reads {', '.join(map(str, reads))})"
        )
    return tokenizer


def _set_pooling(model: Any, pooling: str, name: str) -> None:
    """Put another pooling in place of the model's own."""
    for key, module in model.named_children():
        if type(module).__name__ == "Pooling":
            settings = module.get_config_dict()
            width = settings.get("embedding_dimension") or settings["word_embedding_dimension"]
            setattr(model, key, type(module)(width, pooling))
            return
    raise ConfigError(f"embed.pooling: {name} has no pooling layer that could be replaced")


def _widen_after_first(model: Any) -> None:
    """The transformer's output, and what is made of it, in float32."""
    import torch

    def widen(module: Any, arguments: Any, features: dict[str, Any]) -> dict[str, Any]:
        return {
            key: value.float() if torch.is_tensor(value) and value.is_floating_point() else value
            for key, value in features.items()
        }

    first, *others = model.children()
    first.register_forward_hook(widen)
    for module in others:
        module.float()


def _default_prompt(model: Any) -> str:
    """What the model's files put before every text; most put nothing."""
    prompts, name = model.prompts or {}, model.default_prompt_name
    return str(prompts.get(name, ""))


def _special_ids(tokenizer: Any, name: str) -> tuple[Ids, Ids]:
    """Special tokens that the tokenizer puts before and after every text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if bare and whole[start : start + len(bare)] == bare:
            after = whole[start + len(bare) :]
            return np.array(whole[:start], np.int64), np.array(after, np.int64)
    raise DataError(f"embed.encoder: {name} has a tokenizer that does not keep texts in one piece")


def _limit(model: Any, config: EmbedConfig) -> int:
    """Tokens of a text that are read, special ones included."""
    positions = getattr(getattr(model[0], "auto_model", None), "config", None)
    own = [model.max_seq_length, getattr(positions, "max_position_embeddings", None)]
    limit = min([config.max_length, *(number for number in own if number)])
    if limit < config.max_length:
        say(f"{config.encoder} reads {limit} tokens of a text, fewer than embed.max_length")
    return limit

"""Models, adapters and templates that are broken or mean harm: nothing runs, and it is said."""

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import CHATML, tokenizer
from safetensors.torch import load_file, save_file
from training_helpers import write_model

from scmini import chat
from scmini.errors import DataError, ScminiError
from scmini.models import loading, sentence_encoder, starling
from scmini.models.checkpoint_files import stored_tensors
from scmini.models.merging import merge_adapter
from scmini.models.reward_loading import load_model
from scmini.sections import EmbedConfig, ModelConfig, SFTConfig

PLAIN = ModelConfig(load_in_4bit=False, dtype="float32")
NF4 = ModelConfig(dtype="float32")
Spoil = Callable[[Path], object]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and an adapter of it."""
    folder = tmp_path_factory.mktemp("made")
    source = Path(write_model(folder / "model"))
    model = loading.fresh_adapter(PLAIN, str(source), SFTConfig(lora_r=4), seed=1)
    loading.save_adapter(model, folder / "adapter", None)
    return source, folder / "adapter"


@pytest.fixture
def source(made: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[0], tmp_path / "model"))


@pytest.fixture
def adapter(made: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[1], tmp_path / "adapter"))


def settings(name: str, **changes: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def weights(name: str, change: Callable[[dict[str, Any]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name, metadata={"format": "pt"})

    return spoil


def content(name: str, change: Callable[[bytes], bytes]) -> Spoil:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def index(file: str) -> Spoil:
    """The weights one folder up, and an index that names a file there or elsewhere."""

    def spoil(folder: Path) -> None:
        names = load_file(folder / "model.safetensors")
        os.rename(folder / "model.safetensors", folder.parent / "model.safetensors")
        text = json.dumps({"weight_map": dict.fromkeys(names, file)})
        (folder / "model.safetensors.index.json").write_text(text)

    return spoil


def adapter_instead(folder: Path) -> None:
    """transformers would load the model that it names, from wherever that is."""
    (folder / "model.safetensors").unlink()
    text = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "somebody/else"})
    (folder / "adapter_config.json").write_text(text)


CONFIG, WEIGHTS = "config.json", "model.safetensors"
MODELS: list[tuple[Spoil, ModelConfig, str]] = [
    (settings(CONFIG, hidden_size=48), PLAIN, "other shapes than its config.json says"),
    (settings(CONFIG, hidden_size=48), NF4, "other shapes than its config.json says"),
    (settings(CONFIG, intermediate_size=80), NF4, "other shapes than its config.json says"),
    (settings(CONFIG, vocab_size=2**62), PLAIN, "other shapes than its config.json says"),
    (settings(CONFIG, hidden_size="x"), PLAIN, "hidden_size"),
    (settings(CONFIG, num_attention_heads=0), PLAIN, "is not readable"),
    (settings(CONFIG, model_type="evil"), PLAIN, "does not recognize this architecture"),
    (settings(CONFIG, hidden_act="os.system"), PLAIN, "os.system"),
    (content(CONFIG, lambda _: b"[]"), PLAIN, "is not readable"),
    (content(CONFIG, lambda _: b"\xff{"), PLAIN, "not a valid JSON file"),
    (weights(WEIGHTS, lambda t: t.pop("model.norm.weight")), PLAIN, "no weights for model.norm"),
    (
        weights(WEIGHTS, lambda t: t.pop("model.layers.0.mlp.up_proj.weight")),
        NF4,
        "no weights for model.layers.0.mlp.up_proj",
    ),
    (content(WEIGHTS, lambda data: data[:-40]), PLAIN, "not fully covered"),
    (content(WEIGHTS, lambda data: b"\xff" * 8 + data[8:]), PLAIN, "header too large"),
    (content(WEIGHTS, lambda _: b""), PLAIN, "header too small"),
    (index("../model.safetensors"), PLAIN, "is no name of a file beside it"),
    (index("/etc/passwd"), PLAIN, "is no name of a file beside it"),
    (index("model-00001-of-00002.safetensors"), PLAIN, "missing; fetch the model again"),
    (index("a\x1b[31m\0b"), PLAIN, r"a\\x1b[31m\\x00b"),
    (adapter_instead, PLAIN, "no weights in safetensors"),
]


@pytest.mark.parametrize(("spoil", "config", "said"), MODELS)
def test_a_model_that_is_none(spoil: Spoil, config: ModelConfig, said: str, source: Path) -> None:
    spoil(source)
    with pytest.raises(DataError, match=r"model\.model_name_or_path: ") as caught:
        loading.load_base(config, str(source))
    message = str(caught.value)
    assert said.replace("\\\\", "\\") in message
    assert str(source) in message
    assert message.isprintable()


TOKENIZERS: list[tuple[Spoil, str]] = [
    (content("tokenizer.json", lambda _: b'{"model": {"type": "Evil"}}'), "is not readable"),
    (content("tokenizer.json", lambda data: data[:100]), "model_name_or_path"),
    (content("tokenizer_config.json", lambda _: b"[1]"), "is not readable"),
    (settings("tokenizer_config.json", eos_token=5), "eos_token"),
]


@pytest.mark.parametrize(("spoil", "said"), TOKENIZERS)
def test_a_tokenizer_that_is_none(spoil: Spoil, said: str, source: Path) -> None:
    spoil(source)
    with pytest.raises(DataError, match=said) as caught:
        loading.load_tokenizer(str(source))
    assert str(source) in str(caught.value)


ADAPTERS: list[tuple[Spoil, str]] = [
    (settings("adapter_config.json", r="x"), "not a PEFT configuration"),
    (settings("adapter_config.json", r=0), "should be a positive integer"),
    (settings("adapter_config.json", peft_type="EVIL"), "EVIL"),
    (settings("adapter_config.json", target_modules=["nope"]), "nope"),
    (settings("adapter_config.json", target_modules="("), "unterminated subpattern"),
    (settings("adapter_config.json", target_modules=5), "not iterable"),
    (settings("adapter_config.json", lora_alpha="x"), "unsupported operand"),
    (settings("adapter_config.json", use_dora=True), "no weights for"),
    (content("adapter_config.json", lambda _: b"{}"), "not made for the base model"),
    (content("adapter_model.safetensors", lambda data: data[:-9]), "damaged"),
    (
        weights("adapter_model.safetensors", lambda t: t.update({min(t): torch.ones(3, 3)})),
        "size mismatch",
    ),
    (weights("adapter_model.safetensors", lambda t: t.pop(min(t))), "has no weights for"),
    (weights("adapter_model.safetensors", lambda t: t.update(evil=torch.ones(2))), "for evil"),
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("spoil", "said"), ADAPTERS)
def test_an_adapter_of_something_else(spoil: Spoil, said: str, source: Path, adapter: Path) -> None:
    spoil(adapter)
    with pytest.raises(DataError) as caught:
        loading.load_policy(PLAIN, str(source), adapter, trainable=True)
    assert said in str(caught.value)
    assert str(adapter) in str(caught.value)
    assert len(str(caught.value)) < 900


def test_the_name_of_the_base_in_an_adapter_is_never_followed(source: Path, adapter: Path) -> None:
    settings("adapter_config.json", base_model_name_or_path="somebody/else")(adapter)
    loading.load_policy(PLAIN, str(source), adapter, trainable=False)


class Payload:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def _pickles(folder: Path, proof: Path) -> list[Path]:
    whole = {"v_head.weight": torch.ones(1, 4), "evil": Payload(proof)}
    torch.save(whole, folder / "new.bin")
    torch.save(whole, folder / "old.bin", _use_new_zipfile_serialization=False)
    (folder / "plain.pt").write_bytes(pickle.dumps(Payload(proof)))
    with zipfile.ZipFile(folder / "made.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Payload(proof)))
    return sorted(folder.iterdir())


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
def test_no_pickle_runs(tmp_path: Path) -> None:
    proof, folder = tmp_path / "proof", tmp_path / "model"
    folder.mkdir()
    for path in _pickles(folder, proof):
        with pytest.raises(DataError) as caught:
            starling.read([path])
        assert str(path) in str(caught.value)
        assert not proof.exists()
    pickle.loads((folder / "plain.pt").read_bytes())
    assert proof.exists()  # it would have worked


CODE = (
    "import pathlib\npathlib.Path({proof!r}).touch()\nclass C: pass\nclass M: pass\nclass T: pass\n"
)


@pytest.fixture
def with_code(source: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A model of an unknown kind with a Python file of its own, and what that would make."""
    proof = tmp_path / "proof"
    names = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    names["AutoModelForSequenceClassification"] = "evil.M"
    settings(CONFIG, model_type="evil", auto_map=names)(source)
    tokens = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.T", None]}}
    settings("tokenizer_config.json", **tokens)(source)
    (source / "evil.py").write_text(CODE.format(proof=str(proof)))
    return source, proof


@pytest.mark.parametrize(
    "load",
    [
        lambda folder, _: loading.load_base(PLAIN, str(folder)),
        lambda folder, _: loading.load_tokenizer(str(folder)),
        lambda folder, adapter: merge_adapter(PLAIN, str(folder), adapter, folder / "out"),
        lambda folder, _: load_model(
            str(folder), revision=None, body=None, dtype="float32", load_in_4bit=False
        ),
    ],
    ids=["model", "tokenizer", "merge", "reward"],
)
def test_code_of_a_model_is_never_run(
    load: Any, with_code: tuple[Path, Path], adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does anybody ask: transformers would, and would take a `yes` that is piped in."""
    source, proof = with_code
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run it"))
    with pytest.raises(ScminiError) as caught:
        load(source, adapter)
    assert str(source) in str(caught.value)
    assert not proof.exists()


def test_what_code_would_be_needed_is_said(with_code: tuple[Path, Path]) -> None:
    for load in (lambda s: loading.load_base(PLAIN, s), loading.load_tokenizer):
        with pytest.raises(DataError, match=r"auto_map in config\.json.*transformers has itself"):
            load(str(with_code[0]))


def test_code_of_an_encoder_is_never_run(source: Path, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    (source / "evil.py").write_text(CODE.format(proof=str(proof)))
    modules = [{"idx": 0, "name": "0", "path": "", "type": "evil.M"}]
    (source / "modules.json").write_text(json.dumps(modules))
    for text, said in ((json.dumps(modules), r"'evil\.M' in modules\.json"), ("[3]", "damaged")):
        (source / "modules.json").write_text(text)
        with pytest.raises(DataError, match=rf"embed\.encoder: {source}.*{said}"):
            sentence_encoder.SentenceTransformerEncoder(EmbedConfig(encoder=str(source)))
    assert not proof.exists()


TEMPLATES = [
    ("{{ cycler.__init__.__globals__.os.system('touch PROOF') }}", "unsafe"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    ("{{ '{0.__class__}'.format(messages) }}", "leaves nothing of a prompt"),
    ("{{ messages.append(1) }}", "unsafe"),
    ("{% include '/etc/passwd' %}", "no loader"),
    ("{{ raise_exception('roles\x1b[31m\\nmust alternate') }}", r"roles\x1b[31m must alternate"),
    ("{{ 1 / 0 }}", "division by zero"),
    ("{{ 'a' + 1 }}", "concatenate"),
    ("{% for i in range(10 ** 9) %}x{% endfor %}", "Range too big"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ("{{ messages[5].content }}", "no element 5"),
    ("{{", "unexpected"),
    ("{# nothing #}", "leaves nothing of a prompt"),
]


@pytest.mark.parametrize(("template", "said"), TEMPLATES)
def test_a_chat_template_is_held_in_its_sandbox(template: str, said: str, tmp_path: Path) -> None:
    made = tokenizer(template.replace("PROOF", str(tmp_path / "proof")))
    with pytest.raises(DataError, match="chat template") as caught:
        chat.prompt_ids(made, [{"role": "user", "content": "a"}])
    assert said in str(caught.value)
    assert str(caught.value).isprintable()
    assert not (tmp_path / "proof").exists()


def test_a_template_that_writes_a_prefix_differently() -> None:
    """The earlier answer is learned nowhere, or as it stands: never cut at the wrong place."""
    upper = CHATML.replace("m['content']", "(m['content'] if loop.last else m['content'] | upper)")
    made = tokenizer(upper)
    turns = [
        *({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}),
        {"role": "user", "content": "c"},
    ]
    assert "B<|im_end|>" in made.decode(chat.prompt_ids(made, turns))
    with pytest.raises(DataError, match=r"differently once another turn follows.*loss_on: last"):
        chat.conversation_ids(made, turns, "d", "all")


def test_a_tokenizer_without_end_or_template() -> None:
    made = tokenizer(None)
    with pytest.raises(DataError, match=r"no chat template; put one into the folder"):
        chat.check_tokenizer(made)
    made = tokenizer(CHATML)
    made.eos_token = None
    with pytest.raises(DataError, match=r"no end token; set eos_token in tokenizer_config\.json"):
        chat.check_tokenizer(made)


def test_header_with_a_shape_that_is_not_there(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,8]}}'
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    with pytest.raises(DataError, match=r"model\.safetensors: damaged .*fetch it again"):
        list(stored_tensors(tmp_path))


def test_a_long_prompt_on_one_line() -> None:
    made = tokenizer(CHATML)
    for text in ("x" * 300_000, " " * 300_000, "<|im_end|>" * 30_000):
        ids = chat.prompt_ids(made, [{"role": "user", "content": text}])
        assert text in made.decode(ids)

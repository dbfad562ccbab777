"""Configuration files: YAML, overrides, messages, and the way back to YAML."""

from pathlib import Path

import pytest

from scmini.config import Config
from scmini.config_file import (
    config_to_yaml,
    find_config,
    load_config,
    parse_config,
    shipped_configs,
)
from scmini.errors import ConfigError
from scmini.sections import DPOConfig, recipe_section


def is_right(text: str) -> bool:
    try:
        parse_config(text, "test.yaml")
    except ConfigError:
        return False
    return True


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "test.yaml", overrides)
    head, *lines = str(caught.value).splitlines()
    at_fault = "--set" if overrides and is_right(text) else "test.yaml"
    assert head == f"{at_fault}: {len(lines)} to fix"
    return [line.removeprefix("  ") for line in lines]


def test_what_is_wrong_is_looked_for_where_it_was_typed() -> None:
    def head(text: str) -> str:
        with pytest.raises(ConfigError) as caught:
            parse_config(text, "test.yaml", ["dpo.bta=1"])
        return str(caught.value).splitlines()[0]

    assert head("") == "--set: 1 to fix"
    assert head("dpo: {beta: text}") == "test.yaml: 2 to fix"


def refusal(text: str | bytes) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "test.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-7", 5e-7),
        ("1e5", 1e5),
        ("2E+3", 2000.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("3", 3.0),
    ],
)
def test_numbers_are_numbers(text: str, value: float) -> None:
    assert parse_config(f"dpo: {{learning_rate: {text}}}", "x").dpo.learning_rate == value


@pytest.mark.parametrize(
    "text", ["no", "yes", "on", "off", "y", "n", "2024-01-01", "1:30", "0x10", "1_000"]
)
def test_other_plain_words_are_text(text: str) -> None:
    assert parse_config(f"data: {{format: jsonl, path: {text}}}", "x").data.path == text


def test_leading_zero_is_decimal() -> None:
    assert parse_config("seed: 010", "x").seed == 10


@pytest.mark.parametrize("word", ["true", "false"])
def test_booleans(word: str) -> None:
    assert parse_config(f"model: {{load_in_4bit: {word}}}", "x").model.load_in_4bit is (
        word == "true"
    )


def test_every_mistake_is_reported_at_once() -> None:
    found = problems(
        """
        seed: true
        methods: sft
        sft_continued: {num_train_epochs: 0}
        dpo: {beta: '0.1', bta: 0.2, label_smoothing: 0.7, loss_type: dpo}
        sft: {lora_r: 0}
        sample: 3
        filter: {mode: default, allow_fewer: true, common_subset: true}
        base: {reward_model: {pairs_per_step: 1.5}}
        """,
        "sft.warmup_ratio=2",
        "nonsense",
    )
    assert found == [
        "--set nonsense: write it as section.key=value",
        "seed: expected a whole number, got True",
        "methods: expected a list of text, got 'sft'",
        "base.reward_model.pairs_per_step: expected a whole number, got 1.5",
        "sft.warmup_ratio: must be at most 1.0, got 2",
        "sft.lora_r: must be at least 1, got 0",
        "sft_continued.num_train_epochs: must be above 0.0, got 0",
        "sample: expected a section (keys and values), got 3",
        "filter: allow_fewer and common_subset exclude each other",
        "dpo.beta: expected a number, got '0.1'",
        "dpo.loss_type: expected one of sigmoid, ipo, hinge, softmax, got 'dpo'",
        "dpo.label_smoothing: must be below 0.5, got 0.7",
        "dpo.bta: no such key; did you mean dpo.beta?",
    ]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("dpo.bta", "dpo.beta"),
        ("sft.beta", "dpo.beta"),
        ("beta", "dpo.beta"),
        ("dpp", "dpo"),
        ("sample.max_new_token", "sample.max_new_tokens"),
        ("base.reward_model.pairs", "base.reward_model.pairs_per_step"),
        ("embed.encodr", "embed.encoder"),
    ],
)
def test_the_nearest_key_is_named(name: str, meant: str) -> None:
    assert problems("", f"{name}=1") == [f"{name}: no such key; did you mean {meant}?"]


def test_a_key_like_no_other_gets_the_list() -> None:
    assert problems("", "reference.zzz=1") == [
        "reference.zzz: no such key; keys here: tokens_per_microbatch"
    ]


def test_unions_give_one_sentence() -> None:
    assert problems("data: {format: jsonl, path: 3}") == [
        "data.path: expected text or a list of text or null, got 3"
    ]


def test_fields_that_do_not_fit_together() -> None:
    assert problems("methods: [self-contrast-64]") == [
        "methods: self-contrast-64 needs sample.n of at least 64, got 32"
    ]
    assert problems("dpo: {loss_type: hinge, label_smoothing: 0.1}") == [
        "dpo: label_smoothing has no effect with loss_type: hinge"
    ]


@pytest.mark.parametrize("text", [".inf", ".nan", "1e999"])
def test_numbers_are_finite(text: str) -> None:
    assert "dpo.beta: must be a finite number" in problems("", f"dpo.beta={text}")[0]


def test_overrides_beat_the_file_and_are_yaml() -> None:
    config = parse_config(
        "dpo: {beta: 0.3}\nseed: 4",
        "x",
        ["dpo.beta=5e-1", "methods=[sft, dpo]", "base.reward_model.learning_rate=1e-4"],
    )
    assert (config.dpo.beta, config.seed, config.methods) == (0.5, 4, ["sft", "dpo"])
    assert config.base.reward_model.learning_rate == 1e-4


def test_an_override_may_make_a_key_of_the_file_pointless(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = parse_config("filter: {keep_fraction: 0.5}", "x", ["filter.mode=all"])
    assert config.filter.mode == "all"
    assert "left out filter.keep_fraction" in capsys.readouterr().err
    both = problems("", "filter.mode=all", "filter.keep_fraction=0.5")
    assert both == ["filter: keep_fraction has no effect with mode: all"]
    assert problems("filter: {keep_fraction: 0.5, mode: all}", "seed=3") == both


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nseed: 2", "test.yaml: line 2: key 'seed' is given twice"),
        ("sft: {lora_r: 1, lora_r: 2}", "test.yaml: line 1: key 'lora_r' is given twice"),
        ("a: &x [1]\nb: *x", "test.yaml: line 2: aliases (*name) are not allowed"),
        ("1: 2", "test.yaml: line 1: a key must be text, got '1'"),
        ("[1]: 2", "test.yaml: line 1: a key must be text, got None"),
        ("- seed", "test.yaml: expected sections (keys and values), got list"),
        ("seed: 1\n bad: [", "test.yaml, line 2: mapping values are not allowed here"),
        (
            "seed: !!python/object/apply:os.getcwd []",
            "test.yaml: line 1: tags ('!!python/object/apply:os.getcwd') are not allowed",
        ),
        ("[" * 5000, "test.yaml: nested too deeply"),
        (b"seed: \xff", "test.yaml: "),
        ("a: 1\n---\nb: 1", "test.yaml, line 2: but found another document"),
    ],
)
def test_what_is_refused(text: str | bytes, said: str) -> None:
    message = refusal(text)
    assert message.startswith(said)
    assert "\n" not in message


def test_large_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    path.write_text("# " + "x" * (1 << 20))
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        load_config(str(path), [])


def test_an_empty_file_is_all_defaults() -> None:
    assert parse_config("", "x") == Config()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("demoo", "did you mean demo"),
        ("a/b.yaml", "a/b.yaml: no such file"),
        ("zzz", "shipped are: demo"),
    ],
)
def test_a_wrong_name(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        find_config(name)


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_shipped_configurations_survive_the_way_to_yaml_and_back(name: str) -> None:
    config = load_config(name, [])
    text = config_to_yaml(config)
    again = parse_config(text, "again")
    assert again == config
    assert config_to_yaml(again) == text


_REWARD = ["reward.model_name_or_path=r"]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["embed.encoder=some/model"],
        ["embed.dimensions=64"],
        ["filter.mode=lastdedup-50"],
        ["data.format=jsonl", "data.path=no", "reward.model_name_or_path='1e5'"],
        ["data.format=jsonl", "data.path=[a, 'true']", "data.max_prompt_chars=10"],
        ["model.model_name_or_path=m", "model.revision='12'"],
        ["data={format: auto, path: x, columns: {prompt: 'no', target: a}}", *_REWARD],
        ["data={format: ultrachat, dataset_name: a/b, dataset_test_split: t}", *_REWARD],
    ],
)
def test_the_way_to_yaml_and_back(overrides: list[str]) -> None:
    config = parse_config("", "x", overrides)
    text = config_to_yaml(config)
    assert parse_config(text, "again") == config
    keys = {line.split(":")[0] for line in text.splitlines() if not line.startswith((" ", "-"))}
    assert keys == set(Config.model_fields)
    assert ("dimensions" in text) == (config.embed.encoder == "hashed-ngrams")


def test_machine_keys_stay_out_of_recipes() -> None:
    section = recipe_section(DPOConfig())
    assert "beta" in section
    assert not {"tokens_per_microbatch", "save_steps", "report_to"} & set(section)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("data.num_test", 10**6, "no more than"),
        ("data.num_train", 10**6, "no more than"),
        ("base.num_attention_heads", 128, "must be even"),
    ],
)
def test_what_the_demo_cannot_be(key: str, value: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config("demo", [f"{key}={value}"])


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("{dataset_name: a/b}", "dataset_name has no effect with format: zoo"),
        ("{test_prompts: first-turn}", "test_prompts has no effect with format: zoo"),
        ("{columns: {prompt: q}}", "columns has no effect with format: zoo"),
        ("{format: auto}", "format: auto needs path, the file to read, or dataset_name"),
        ("{format: jsonl}", "format: jsonl needs path, the file to read"),
        ("{format: jsonl, dataset_name: a/b}", "dataset_name has no effect with format: jsonl"),
        ("{format: auto, dataset_name: a/b, path: c}", "dataset_name has no effect with path"),
        ("{format: auto, path: c, revision: v1}", "revision has no effect without dataset_name"),
        (
            "{format: nectar, path: c, columns: {id: x}}",
            "columns has no effect with format: nectar",
        ),
    ],
)
def test_sources_of_data(data: str, says: str) -> None:
    assert problems(f"data: {data}") == [f"data: {says}"]


def test_wrong_names_of_columns() -> None:
    assert problems("data: {format: auto, path: c, columns: {promt: q}}") == [
        "data.columns.promt: no such key; did you mean data.columns.prompt?"
    ]


def test_files_in_the_place_of_a_data_set() -> None:
    """What a recipe takes from the hub can be read from files, by one override."""
    text = "data: {format: hh-rlhf, dataset_name: a/b, dataset_split: train, revision: v1}"
    config = parse_config(text, "x", ["data.path=[a.jsonl.gz]", *_REWARD])
    assert config.data.path == ["a.jsonl.gz"]
    assert config.data.dataset_name is None


def test_what_judges_costs_and_hides() -> None:
    tasks = {"tasks": ["alpaca-eval"]}
    prices = {"usd_per_million_input_tokens": 1, "usd_per_million_output_tokens": 1, "max_usd": 1}
    with pytest.raises(ValueError, match="max_usd cannot limit"):
        Config.model_validate(
            {"benchmark": tasks, "judge": {"alpaca_eval_annotator": "x"} | prices}
        )
    with pytest.raises(ConfigError, match="a name or password in the address") as caught:
        load_config(None, ["judge.base_url=http://me:quite-secret@host/v1"])
    assert "quite-secret" not in str(caught.value)
    address = {"model": "x", "base_url": "https://host/v1?api-key=quite-secret"}
    config = Config.model_validate({"benchmark": tasks, "judge": address})
    shown = config.to_show()
    assert "quite-secret" not in config_to_yaml(shown) + str(shown.model_dump())
    assert shown.judge.base_url == "https://host/v1"
    assert config.judge.base_url == address["base_url"]

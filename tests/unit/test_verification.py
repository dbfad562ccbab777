"""The checks of `scmini verify` by themselves: they pass, and fail when something is broken."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from training_helpers import write_model

from scmini.errors import ScminiError
from scmini.models import attention
from scmini.models.attention import plain_model
from scmini.training import tree_trainer
from scmini.verification import checks, model, separate, session
from scmini.verification.checks import Check, Finding, Row
from scmini.verification.kernels import ATTENTION, HEAD, kernel_checks
from scmini_kernels import linear_logprob, tree_attention

CPU = torch.device("cpu")


def collect(*todo: Check) -> list[Row]:
    rows: list[Row] = []
    checks.run(todo, lambda _: None, rows.append)
    return rows


def test_what_becomes_of_checks() -> None:
    def crash() -> Iterator[Finding]:
        yield Finding("first", 1.0, 1.0)
        raise ZeroDivisionError("two\nlines")

    def refuse() -> Iterator[Finding]:
        raise ScminiError("a sentence")

    nan = float("nan")
    rows = collect(
        Check("a", "torch", "float32", crash),
        Check("b", "torch", "float32", refuse),
        Check("c", "torch", "float32", lambda: [Finding("x", nan, 1.0), Finding("y", 1.0, nan)]),
        Check("d", "torch", "float32", lambda: []),
        Check("e", "triton", "float32", crash, skip="no triton"),
        Check("f", "torch", "float32", lambda: [Finding("x", 1.01, 1.0)]),
    )
    assert [(row.name, row.passed, row.message) for row in rows] == [
        ("a: first", True, ""),
        ("a", False, "ZeroDivisionError: two lines"),
        ("b", False, "a sentence"),
        ("c: x", False, "not finite: error nan, allowed 1.0"),
        ("c: y", False, "not finite: error 1.0, allowed nan"),
        ("d", False, "nothing was measured"),
        ("e", None, "no triton"),
        ("f: x", False, ""),
    ]


class _Scaled(torch.autograd.Function):
    """The identity, with a gradient that is off by a thousandth of a percent."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * (1 + 1e-5)


def off(x: torch.Tensor) -> torch.Tensor:
    return _Scaled.apply(x)


def wrong_attention(what: str, q: Any, k: Any, v: Any, tree: Any, **options: Any) -> torch.Tensor:
    if what == "causal":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    if what == "window":
        options["window"] = options["window"] + 1 if "window" in options else None
    if what == "softcap":
        options["softcap"] = None
    q, k, v = (off(x) if name == what else x for name, x in (("q", q), ("k", k), ("v", v)))
    return tree_attention(q, k, v, tree, **options)


def wrong_logprob(what: str, h: Any, w: Any, *indices: Any, bias: Any, **options: Any) -> Any:
    if what == "bf16 logits":
        logits = (h.bfloat16()[indices[0]] @ w.bfloat16().T).float() + bias
        logits = logits * options.get("logit_scale", 1.0)
        return logits.log_softmax(-1).gather(1, indices[1][:, None])[:, 0]
    if what == "softcap":
        options["softcap"] = None
    h, w, bias = (off(x) if n == what else x for n, x in (("h", h), ("w", w), ("b", bias)))
    return linear_logprob(h, w, *indices, bias=bias, **options)


@pytest.mark.parametrize(
    ("operation", "what", "failed"),
    [
        ("attention", "nothing", set()),
        ("attention", "causal", {f"tree_attention, {name}" for name in ATTENTION}),
        ("attention", "window", {"tree_attention, sliding window"}),
        ("attention", "softcap", {"tree_attention, softcap"}),
        *(("attention", x, {f"tree_attention, {name}" for name in ATTENTION}) for x in "qkv"),
        ("logprob", "bf16 logits", {f"linear_logprob, {name}" for name in HEAD}),
        ("logprob", "softcap", {"linear_logprob, trainable head, softcap"}),
        ("logprob", "h", {f"linear_logprob, {name}" for name in HEAD}),
        *(("logprob", x, {f"linear_logprob, {n}" for n in HEAD if n[0] == "t"}) for x in "wb"),
    ],
)
def test_wrong_operations_fail(operation: str, what: str, failed: set[str]) -> None:
    wrong = {"attention": wrong_attention, "logprob": wrong_logprob}[operation]
    options: Any = {operation: functools.partial(wrong, what)}
    rows = collect(*kernel_checks(CPU, torch.float32, "torch", "torch", **options))
    found = {row.name.partition(":")[0] for row in rows if not row.passed}
    assert found == failed
    assert all(row.error is not None for row in rows)
    if what in ("q", "k", "v"):  # the gradient of this input and nothing else
        bad = {row.name.partition(": ")[2] for row in rows if not row.passed}
        assert bad == {f"gradient of {what}"}


@pytest.fixture
def subject() -> torch.nn.Module:
    if torch.cuda.is_available():
        pytest.skip("what is broken here is the CPU's way")
    return model.tiny_subject(torch.float32)


def model_rows(subject: torch.nn.Module) -> dict[str, Row]:
    return {row.name: row for row in collect(*model.model_checks(subject, "torch"))}


def test_a_wrong_model_fails(subject: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale that is off by a thousandth: finite, plausible, and wrong."""
    real = tree_attention
    monkeypatch.setattr(
        attention, "tree_attention", lambda *x, **o: real(*x, **(o | {"scale": 0.1251}))
    )
    rows = model_rows(subject)
    assert rows["packed = separate sequences: log-probabilities"].passed is False
    assert rows["packed = separate sequences: gradients of the adapter"].passed is False
    assert rows["step-0 rewards = 0: log-ratio, in nats"].passed, "wrong in the same way twice"


def test_wrong_parts_fail(subject: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part with the loss of its own sequences alone: the coupling is lost."""

    def backward(self: Any, model: Any, batch: Any, scale: float) -> torch.Tensor:
        total = torch.zeros(())
        for tree in batch.part_trees():
            loss = -model(tree).sum() * 0.05
            (loss * scale).backward()
            total = total + loss.detach()
        return total

    monkeypatch.setattr(tree_trainer.TreeTrainer, "_backward_parts", backward)
    rows = model_rows(subject)
    bad = [name for name, row in rows.items() if row.passed is False]
    assert len(bad) == 2
    assert "loss with tokens_per_microbatch" in bad[0]
    assert "gradients with tokens_per_microbatch" in bad[1]


def test_a_wrong_reference_fails(subject: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    score = model.score
    monkeypatch.setattr(
        model, "score", lambda *x: [[value + 0.1 for value in row] for row in score(*x)]
    )
    row = collect(model.model_checks(subject, "torch")[2])[0]
    assert row.passed is False
    assert "the reference is not the policy's start" in row.message


def test_a_chosen_model_is_loaded_as_a_run_does(tmp_path: Path) -> None:
    """In NF4 and bf16, where the truth is fp32 on the same decoded weights."""
    pytest.importorskip("bitsandbytes")
    chosen = model.chosen_subject(str(write_model(tmp_path)))
    assert plain_model(chosen).dtype == torch.bfloat16
    assert any(hasattr(module, "quant_state") for module in chosen.modules())
    rows = model_rows(chosen)
    assert all(row.passed for row in rows.values()), rows
    assert all(row.dtype == "bfloat16" for row in rows.values())


def test_wider_products_are_of_the_decoded_weights(tmp_path: Path) -> None:
    """bitsandbytes decodes NF4 to its input's dtype, so from fp32 to weights of more digits."""
    functional = pytest.importorskip("bitsandbytes").functional
    chosen = model.chosen_subject(str(write_model(tmp_path)))
    layer: Any = next(m for m in chosen.modules() if hasattr(m, "quant_state"))
    weight = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert weight.dtype == torch.bfloat16
    x = torch.randn(5, layer.in_features, device=weight.device)
    with separate.widened(chosen):
        found = layer(x)
    torch.testing.assert_close(found, x @ weight.float().T, rtol=1e-5, atol=1e-5)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_widening_leaves_no_trace(dtype: torch.dtype) -> None:
    subject = model.tiny_subject(dtype)
    before = {k: x.clone() for k, x in subject.state_dict().items()}
    with separate.widened(subject) as wide:
        assert {x.dtype for x in subject.parameters()} == {wide}
        assert wide == (torch.float64 if dtype == torch.float32 else torch.float32)
    after = subject.state_dict()
    assert all(torch.equal(x, after[k]) and x.dtype == after[k].dtype for k, x in before.items())


def test_the_slow_twin_uses_nothing_of_the_fast_way(
    subject: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither operation, nor the LoRA layers' replaced forward."""

    def never(*args: Any, **options: Any) -> Any:
        raise AssertionError("called")

    for name in ("tree_attention", "linear_logprob", "hidden_states"):
        monkeypatch.setattr(attention, name, never)
    layer = next(m for n, m in subject.named_modules() if n.endswith("layers.0.self_attn.q_proj"))
    monkeypatch.setitem(vars(layer), "forward", never)
    result = separate.separate(subject, model.random_groups(50)[:1], lambda x: torch.ones_like(x))
    assert result.logps.shape == (9,)
    assert vars(layer)["forward"] is never
    with pytest.raises(AssertionError, match="called"):
        layer(torch.zeros(1, 128))


def test_errors_of_gradients(subject: torch.nn.Module) -> None:
    """Relative to each parameter's own; a gradient that never came is as wrong as can be."""
    none = separate.take_gradients(subject)
    assert set(none) == {n for n, p in subject.named_parameters() if p.requires_grad}
    assert separate.gradient_error(none, none) == 0
    exact = {name: torch.ones_like(grad) for name, grad in none.items()}
    name = sorted(exact)[3]
    exact[name] *= 1e-6
    assert separate.gradient_error({**exact, name: exact[name] * 1.5}, exact) == pytest.approx(0.5)
    assert separate.gradient_error({**exact, name: none[name]}, exact) == 1
    assert separate.gradient_error(exact, {**exact, name: none[name]}) > 1e6
    nan = torch.full_like(exact[name], float("nan"))
    assert not separate.gradient_error({**exact, name: nan}, exact) < 1e6


@pytest.mark.parametrize(
    ("triton", "numpy", "runs"),
    [("3.6.0", "2.4.1", False), ("3.6.0", "2.3.5", True), ("3.7.1", "2.4.6", True)],
)
def test_an_interpreter_that_fails_by_itself_is_skipped(
    monkeypatch: pytest.MonkeyPatch, triton: str, numpy: str, runs: bool
) -> None:
    versions = {"triton": triton, "numpy": numpy}
    monkeypatch.setattr(session.importlib.metadata, "version", versions.__getitem__)
    monkeypatch.setattr(session.importlib.util, "find_spec", lambda name: object())
    assert (session.interpreter_is_missing() == "") == runs

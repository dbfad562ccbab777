"""Liger's kernels for the element-wise work of a decoder layer, on one model instance.

What they are worth, by bytes moved per token and layer (Mistral-7B: d 4096, q 4096, k 1024, f
14336; bf16, statistics in fp32, adapter apart). Unfused is transformers' code, counted operation by
operation; B per element, then KB:

                     forward unfused   fused      backward unfused   fused
    RMSNorm, twice    36 d     295      4   33     76 d     623      6   49
    residual, twice    6 d      49      6   49      6 d      49      6   49
    RoPE            20(q+k)    102      4   20   30(q+k)    154      4   20
    SwiGLU            10 f     143      6   86     18 f     258     10  143
                               589         188             1084         261

A step with the reference in it is three forwards (policy, recomputation, reference) and a backward:
2851 KB unfused, 825 KB fused. At T = 5632 (two prompts of P, R, k = 512, 256, 8), 32 layers and
90 % of an RTX 4090's 1008 GB/s that is 0.57 s and 0.16 s, beside 2.38 s for everything else (linear
2.07, decoding NF4 0.07, attention 0.11, LoRA 0.10, head 0.03): 19 % of the step unfused, 6 % fused,
a step 1.16 x as fast. Modelled, not measured. A 3090 has half the FLOP per byte: half the share.

Why Liger's and none of our own: all three are independent of how a row is packed. RMSNorm and
SwiGLU work on single rows; RoPE reads cos and sin [1, T, Dh] row by row, which transformers made
from `position_ids`, so positions may restart anywhere. What is not taken is Liger's cross-entropy:
`linear_logprob` needs two products with the head where that needs three. What Liger cannot serve:
Cohere (its LayerNorm has no bias, and it rotates interleaved pairs), and the CPU, with Triton's
interpreter or without (its RMSNorm calls libdevice).

Liger patches names of transformers' modeling module for the whole process, also when it is given an
instance. Here they are put back, and this instance alone keeps the kernels.
"""

import importlib.util
import sys
import types
from typing import Any

import torch
from transformers import PreTrainedModel

from scmini.errors import ConfigError, EnvironmentProblem

MODEL_TYPES = ("gemma2", "gemma3_text", "granite", "llama", "mistral", "phi3", "qwen2", "qwen3")
"""Kinds of models whose layers Liger's instance patching covers as transformers has them."""


def check_liger() -> None:
    """EnvironmentProblem if Liger's kernels cannot run here."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise EnvironmentProblem(
            "model.use_liger_kernel needs the package liger-kernel: pip install 'scmini[liger]', "
            "or set it to false"
        )
    if not torch.cuda.is_available():
        raise EnvironmentProblem(
            "model.use_liger_kernel needs a CUDA device, and there is none; set it to false"
        )


def apply_liger(model: PreTrainedModel) -> None:
    """Let this instance compute RMSNorm, RoPE and SwiGLU (Gemma: GeGLU) with Liger's kernels.

    Before adapters are put on. Parameters, modules and state dict stay as they are; results differ
    by rounding. The kernels overwrite their inputs' gradients, so a graph can be walked once only.

    Raises:
        ConfigError: a kind of model that is not in MODEL_TYPES.
    """
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    kind = model.config.model_type
    if kind not in MODEL_TYPES:
        raise ConfigError(
            f"model.use_liger_kernel: not for models of type {kind!r} (only "
            f"{', '.join(MODEL_TYPES)}); set it to false"
        )
    modeling = sys.modules[type(model).__module__]
    before = dict(vars(modeling))
    try:
        _apply_liger_kernel_to_instance(
            model, cross_entropy=False, fused_linear_cross_entropy=False
        )
        changed = {n: v for n, v in vars(modeling).items() if before.get(n) is not v}
    finally:
        vars(modeling).update(before)
    functions = {n: v for n, v in changed.items() if not isinstance(v, type)}
    for module in model.modules():
        forward: Any = type(module).forward
        if functions.keys() & set(_names_in(forward)):
            bound = types.MethodType(_with_globals(forward, functions), module)
            vars(module).setdefault("forward", bound)


def _with_globals(function: types.FunctionType, names: dict[str, Any]) -> types.FunctionType:
    """A copy of a function for which global names mean something else."""
    copy = types.FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _names_in(function: Any) -> tuple[str, ...]:
    """Global names (and attributes) that a function's own code mentions."""
    return function.__code__.co_names if isinstance(function, types.FunctionType) else ()

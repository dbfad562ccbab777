"""Tree attention in Triton: launchers, autograd, and the choice of configurations.

The kernels are in tree_attention_kernels.py, the tables that say which program does what in
tiles.py. No kernel argument that is specialised by the compiler depends on the number of rows, so
batches of any lengths run the code compiled for the first: strides come from tensors laid out
(T, H, Dh), or are multiples of 16 elements; windows and row counts are `do_not_specialize`; tables
start on 16 bytes.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from scmini_kernels.tree import PrefixTree
from scmini_kernels.triton import tree_attention_kernels as kernels
from scmini_kernels.triton.tiles import AttentionTiles, TileShape, attention_tiles
from scmini_kernels.triton.variants import Variant

_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_MAX_HEAD_DIM = 256
_LOG2_E = math.log2(math.e)
# With TRITON_INTERPRET=1 in the environment `triton.jit` makes another class.
_INTERPRETED = not isinstance(kernels.forward_kernel, triton.JITFunction)
# Pieces of key tiles per multiprocessor, and packed queries below which a piece is not worth the
# detour over a slot, which moves as many bytes as some hundred of them.
_PIECES_PER_PROCESSOR = 4
_MIN_PIECE = 2048
_SLOT_ROWS = 16
_DELTA_ROWS = 32


class Blocks(NamedTuple):
    """A kernel's tile: BLOCK_M packed queries by BLOCK_N keys, and how it is compiled."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


class Configuration(NamedTuple):
    """The tiles of the three kernels."""

    forward: Blocks
    query_gradient: Blocks
    key_gradient: Blocks


# By the largest head size that they are for. Chosen ahead of time, by what compiles without spills:
# the largest tiles that fit 99 KiB of shared memory (consumer cards, and every card not named) ...
_DEFAULT = {
    64: Configuration(Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2), Blocks(32, 64, 8, 2)),
    127: Configuration(Blocks(64, 64, 8, 2), Blocks(64, 64, 8, 2), Blocks(32, 64, 8, 2)),
    128: Configuration(Blocks(128, 32, 8, 3), Blocks(64, 64, 8, 2), Blocks(32, 64, 8, 2)),
    256: Configuration(Blocks(64, 32, 8, 2), Blocks(64, 16, 8, 2), Blocks(32, 32, 8, 2)),
}
# For sm_80, and in Triton 3.6 for sm_120, the compiler finds registers for fewer keys at a time.
_FEWER_KEYS = {
    **_DEFAULT,
    256: _DEFAULT[256]._replace(forward=Blocks(64, 16, 8, 3)),
}
# ... or 227 KiB, in multiples of the 64 rows that Hopper's matrix instructions take.
_HOPPER = {
    64: Configuration(Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2), Blocks(64, 128, 8, 2)),
    128: Configuration(Blocks(128, 64, 8, 3), Blocks(128, 32, 8, 2), Blocks(32, 64, 8, 2)),
    256: Configuration(Blocks(64, 32, 8, 2), Blocks(64, 32, 8, 2), Blocks(16, 64, 8, 2)),
}
# Full fp32 products run on the ordinary units, whose operands all pass through registers.
_FP32 = {
    64: Configuration(Blocks(32, 32, 4, 1), Blocks(16, 16, 8, 1), Blocks(16, 32, 8, 1)),
    128: Configuration(Blocks(32, 32, 8, 1), Blocks(16, 32, 8, 1), Blocks(16, 32, 8, 1)),
    256: Configuration(Blocks(16, 16, 8, 1), Blocks(16, 16, 8, 1), Blocks(16, 16, 8, 1)),
}
# Small, so that small tests have many tiles.
_INTERPRETER = Configuration(Blocks(32, 16, 4, 1), Blocks(16, 16, 4, 1), Blocks(16, 16, 4, 1))


class _Problem(NamedTuple):
    """What forward and backward share besides tensors."""

    tiles: AttentionTiles
    configuration: Configuration
    scale: float
    window: int | None
    softcap: float | None


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree: PrefixTree,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """`tree_attention` in Triton, for arguments that it has checked.

    Args:
        q: (1, Hq, T, Dh) bf16, fp16 or fp32, Dh <= 256, on a CUDA device (on any with
            TRITON_INTERPRET=1 set before the import of triton). Any strides; what is not laid out
            in aligned rows of Dh is copied.
        k: (1, Hkv, T, Dh), q's dtype and device; Hkv divides Hq.
        v: like k.
        tree: the packed forest, on the same device.
        scale: factor on the scores.
        window: None where it hides nothing.
        softcap: bound on the scores.

    Returns:
        (1, Hq, T, Dh) in q's dtype, contiguous as (1, T, Hq, Dh).

    Gradients: to q, k and v, once; what needs none is not computed. Bits repeat from run to run on
    the same device.

    Memory: (T, Hq) fp32 twice; in backward some tens of MiB of partial sums where rows are seen by
    so many queries that several programs share the work.

    Raises:
        ValueError: other dtypes, larger heads, tensors on the CPU without the interpreter.
    """
    if q.dtype not in _DTYPES:
        raise ValueError(f"impl='triton': expected bf16, fp16 or fp32, got {q.dtype}")
    if q.shape[-1] > _MAX_HEAD_DIM:
        raise ValueError(
            f"impl='triton': expected a head size of at most {_MAX_HEAD_DIM}, got {q.shape[-1]}"
        )
    if not q.is_cuda and not _INTERPRETED:
        raise ValueError(
            f"impl='triton': expected CUDA tensors, got {q.device.type} (or set TRITON_INTERPRET=1 "
            "before triton is imported, to interpret the kernels)"
        )
    configuration = _configuration(q)
    limit = min(blocks.queries for blocks in configuration)
    group = q.shape[1] // k.shape[1]
    if group > limit:  # a group must fit a tile: give each part of it its own copy of the keys
        parts = group // max(n for n in range(1, limit + 1) if group % n == 0)
        k, v = (x[:, :, None].expand(-1, -1, parts, -1, -1).flatten(1, 2) for x in (k, v))
    shape = _tile_shape(configuration, q, k)
    problem = _Problem(attention_tiles(tree, shape, window), configuration, scale, window, softcap)
    out: Tensor = _TreeAttention.apply(q, k, v, problem)
    return out


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, problem: _Problem) -> Tensor:
        q, k, v = (_addressable(x) for x in (q, k, v))
        out = _empty_rows_first(q)
        lse = torch.empty(q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)
        rest = torch.empty_like(lse) if _is_exact(q.dtype) else lse
        with _on_device(q):
            _launch_forward(q, k, v, out, lse, rest, problem)
        ctx.save_for_backward(q, k, v, out, lse, rest)
        ctx.problem = problem
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, rest = ctx.saved_tensors
        needs_q, needs_k, needs_v, _ = ctx.needs_input_grad
        dq = dk = dv = None
        grad_out = _rows_first(grad_out)
        delta = torch.empty_like(lse)
        with _on_device(q):
            if _is_exact(q.dtype):
                _launch_query_gradient(q, k, v, grad_out, lse, rest, delta, None, ctx.problem)
            else:
                _launch_delta(out, grad_out, delta)
            if needs_q:
                dq = _empty_rows_first(q)
                _launch_query_gradient(q, k, v, grad_out, lse, rest, delta, dq, ctx.problem)
            if needs_k or needs_v:
                dk, dv = _empty_rows_first(k), _empty_rows_first(v)
                _launch_key_gradient(q, k, v, grad_out, lse, rest, delta, dk, dv, ctx.problem)
        return dq, dk if needs_k else None, dv if needs_v else None, None


def _launch_forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rest: Tensor, problem: _Problem
) -> None:
    tiles, blocks = problem.tiles, problem.configuration.forward
    kernels.forward_kernel[(len(tiles.query_tiles) * k.shape[1],)](
        q, k, v, out, lse, rest, tiles.query_tiles, tiles.nodes, tiles.ends, tiles.positions,
        *_factors(problem), problem.window or 0, k.shape[1], *_strides(q, k, v),
        **_call_constants(q, k, problem, blocks),
    )  # fmt: skip


def _launch_delta(out: Tensor, grad_out: Tensor, delta: Tensor) -> None:
    kernels.delta_kernel[(triton.cdiv(delta.numel(), _DELTA_ROWS),)](
        out, grad_out, delta, delta.numel(),
        HEAD_DIM=out.shape[-1], BLOCK_D=_block_d(out.shape[-1]), BLOCK_M=_DELTA_ROWS, num_warps=4,
        num_stages=1,
    )  # fmt: skip


def _launch_query_gradient(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, lse: Tensor, rest: Tensor, delta: Tensor,
    dq: Tensor | None, problem: _Problem,
) -> None:  # fmt: skip
    """Fill dq; without one, fill delta.

    delta = out . grad_out is half of the work, but its rounding does not cancel against that of the
    weights' gradients: fp32 gradients of short rows would err several times as much as autograd's.
    """
    tiles, blocks = problem.tiles, problem.configuration.query_gradient
    kernels.query_gradient_kernel[(len(tiles.gradient_tiles) * k.shape[1],)](
        q, k, v, grad_out, lse, rest, delta, dq,
        tiles.gradient_tiles, tiles.nodes, tiles.ends, tiles.positions,
        *_factors(problem), problem.scale, problem.window or 0, k.shape[1], *_strides(q, k, v),
        DELTA=dq is None, **_call_constants(q, k, problem, blocks),
    )  # fmt: skip


def _launch_key_gradient(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, lse: Tensor, rest: Tensor, delta: Tensor,
    dk: Tensor, dv: Tensor, problem: _Problem,
) -> None:  # fmt: skip
    tiles, blocks = problem.tiles, problem.configuration.key_gradient
    kv_heads, block_d = k.shape[1], _block_d(k.shape[-1])
    partials = torch.empty(
        (tiles.num_slots, kv_heads, 2, blocks.keys, block_d), dtype=torch.float32, device=q.device
    )
    kernels.key_gradient_kernel[(len(tiles.key_pieces) * kv_heads,)](
        q, k, v, grad_out, lse, rest, delta, dk, dv, partials,
        tiles.key_pieces, tiles.ends, tiles.positions,
        *_factors(problem), problem.scale, problem.window or 0, kv_heads, *_strides(q, k, v),
        **_call_constants(q, k, problem, blocks),
    )  # fmt: skip
    if tiles.num_slots:
        parts = len(tiles.split_tiles) * kv_heads * (blocks.keys // _SLOT_ROWS)
        kernels.sum_slots_kernel[(parts,)](
            partials, tiles.split_tiles, dk, dv, kv_heads,
            HEAD_DIM=k.shape[-1], BLOCK_D=block_d, BLOCK_N=blocks.keys, ROWS=_SLOT_ROWS,
            num_warps=4, num_stages=1,
        )  # fmt: skip


def _factors(problem: _Problem) -> tuple[float, float]:
    """(factor, cap) of the kernels: scores in base 2 are q k factor, or cap tanh(q k factor)."""
    if problem.softcap is None:
        return problem.scale * _LOG2_E, 0.0
    return problem.scale / problem.softcap, problem.softcap * _LOG2_E


def _strides(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    return tuple(x.stride(dim) for x in (q, k, v) for dim in (2, 1))


def _call_constants(q: Tensor, k: Tensor, problem: _Problem, blocks: Blocks) -> dict[str, Any]:
    return _constants(
        q.shape[1] // k.shape[1],
        q.shape[-1],
        q.dtype,
        problem.window is not None,
        problem.softcap is not None,
        blocks,
    )


def _constants(
    group: int, head_dim: int, dtype: torch.dtype, window: bool, softcap: bool, blocks: Blocks
) -> dict[str, Any]:
    """The compile-time arguments of the three large kernels."""
    return {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_D": _block_d(head_dim),
        "BLOCK_M": blocks.queries,
        "BLOCK_N": blocks.keys,
        "WINDOW": window,
        "SOFTCAP": softcap,
        "EXACT": _is_exact(dtype),
        "UPCAST": _INTERPRETED and dtype == torch.bfloat16,  # bf16 is raw bits there
        "num_warps": blocks.num_warps,
        "num_stages": blocks.num_stages,
    }


def _is_exact(dtype: torch.dtype) -> bool:
    """Whether the roundings that 16 bits drown are worth avoiding."""
    return dtype == torch.float32


def _block_d(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def _rows_first(x: Tensor) -> Tensor:
    """x (1, H, T, Dh), contiguous as (1, T, H, Dh) and starting on 16 bytes."""
    rows = x.transpose(1, 2).contiguous()
    if rows.data_ptr() % 16:
        rows = rows.clone()
    return rows.transpose(1, 2)


def _empty_rows_first(x: Tensor) -> Tensor:
    _, heads, rows, size = x.shape
    return torch.empty((1, rows, heads, size), dtype=x.dtype, device=x.device).transpose(1, 2)


def _addressable(x: Tensor) -> Tensor:
    """x, or a copy, with strides that the kernels can read and that never cause a recompilation."""
    aligned = x.stride(1) % 16 == 0 and x.stride(2) % 16 == 0 and x.data_ptr() % 16 == 0
    return x if x.stride(3) == 1 and aligned else _rows_first(x)


def _on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _tile_shape(configuration: Configuration, q: Tensor, k: Tensor) -> TileShape:
    group = q.shape[1] // k.shape[1]
    processors = (
        torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
    )
    return TileShape(
        queries=configuration.forward.queries // group,
        gradient_queries=configuration.query_gradient.queries // group,
        keys=configuration.key_gradient.keys,
        step=configuration.key_gradient.queries // group,
        pieces=max(1, processors * _PIECES_PER_PROCESSOR // k.shape[1]),
        min_piece=_MIN_PIECE // group,
    )


def _configuration(q: Tensor) -> Configuration:
    if _INTERPRETED:
        return _INTERPRETER
    major, minor = torch.cuda.get_device_capability(q.device)
    return choose_configuration(10 * major + minor, q.dtype, q.shape[-1])


def choose_configuration(capability: int, dtype: torch.dtype, head_dim: int) -> Configuration:
    """What runs on a card of compute capability major * 10 + minor; bf16 and fp16 alike."""
    half = {80: _FEWER_KEYS, 90: _HOPPER, 120: _FEWER_KEYS}.get(capability, _DEFAULT)
    table = _FP32 if dtype == torch.float32 else half
    return table[min(size for size in table if size >= head_dim)]


_VARIANTS = [
    # dtype, head size, window, softcap
    (torch.bfloat16, 64, False, False),
    (torch.bfloat16, 96, False, False),
    (torch.bfloat16, 128, False, False),
    (torch.bfloat16, 128, True, True),
    (torch.bfloat16, 256, False, False),
    (torch.bfloat16, 256, True, True),
    (torch.float32, 64, False, False),
    (torch.float32, 128, False, False),
    (torch.float32, 256, True, True),
]


def variants(capability: int) -> list[Variant]:
    """The forms to compile ahead of time: 4 query heads per key head, fp16 being like bf16."""
    found = []
    for dtype, head_dim, window, softcap in _VARIANTS:
        configuration = choose_configuration(capability, dtype, head_dim)
        name = f"{_DTYPES[dtype]}/Dh{head_dim}{'/window+softcap' if window else ''}"
        forms: list[tuple[str, Any, Blocks, dict[str, Any]]] = [
            ("forward", kernels.forward_kernel, configuration.forward, {}),
            ("query_gradient", kernels.query_gradient_kernel, configuration.query_gradient,
             {"DELTA": False}),
            ("key_gradient", kernels.key_gradient_kernel, configuration.key_gradient, {}),
        ]  # fmt: skip
        if dtype == torch.float32 and head_dim == 128:
            forms.append(("delta", kernels.query_gradient_kernel, configuration.query_gradient,
                          {"DELTA": True}))  # fmt: skip
        for kind, kernel, blocks, extra in forms:
            constants = _constants(4, head_dim, dtype, window, softcap, blocks) | extra
            found.append(_variant(f"{kind}/{name}", kernel, dtype, constants))
    head = {"HEAD_DIM": 128, "BLOCK_D": 128}
    for name, kernel, constants in (
        ("delta/bf16/Dh128", kernels.delta_kernel, {**head, "BLOCK_M": _DELTA_ROWS}),
        ("sum_slots/bf16/Dh128", kernels.sum_slots_kernel,
         {**head, "BLOCK_N": 64, "ROWS": _SLOT_ROWS}),
    ):  # fmt: skip
        constants |= {"num_warps": 4, "num_stages": 1}
        found.append(_variant(name, kernel, torch.bfloat16, constants))
    return found


# Arguments that are not pointers to the operands' dtype.
_ARGUMENT_TYPES = {
    **dict.fromkeys(("lse", "rest", "delta", "partials"), "*fp32"),
    **dict.fromkeys(("tiles", "nodes", "ends", "positions", "pieces", "split_tiles"), "*i32"),
    **dict.fromkeys(("factor", "cap", "scale"), "fp32"),
    **dict.fromkeys(("window", "kv_heads", "rows"), "i32"),
    **dict.fromkeys(("q_row", "q_head", "k_row", "k_head", "v_row", "v_head"), "i32"),
}


def _variant(name: str, kernel: Any, dtype: torch.dtype, constants: dict[str, Any]) -> Variant:
    compiled = {key: constants.pop(key) for key in ("num_warps", "num_stages")}
    signature = {
        argument: _ARGUMENT_TYPES.get(argument, f"*{_DTYPES[dtype]}")
        for argument in kernel.arg_names
        if argument not in constants
    }
    return Variant(
        name=name,
        kernel=kernel,
        signature=signature,
        constants=constants,
        divisible=tuple(
            argument
            for argument, kind in signature.items()
            if kind.startswith("*") or argument.endswith(("_row", "_head"))
        ),
        multiplies="GROUP" in constants and dtype != torch.float32,
        **compiled,
    )

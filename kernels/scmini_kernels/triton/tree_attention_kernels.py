# mypy: disable-error-code="no-untyped-def"
"""The kernels of tree attention: forward, gradients of queries and of keys, and two helpers.

How rows are cut and what the tables hold is told in tiles.py. A tile of queries is packed over the
group of heads that share keys: packed row r of a tile that begins at position `first` is position
first + r // GROUP of head key_head * GROUP + r % GROUP. GROUP need not be a power of two; what is
left over of a block is masked.

The log-sum-exp of a row is kept as one number, `lse`; with EXACT (fp32) as the sum of two, `lse`
(the largest score) and `rest`: its own rounding would cost as much as everything else.

Scores are held in base 2: log2(e) is folded into `factor` (or into `cap`), so that softmax is exp2.
Softmax and all sums are fp32; probabilities and score gradients are rounded to the dtype of the
operands before they are multiplied. No atomics: every value is written by one program, in one
order.

Only last dimensions are contiguous in q, k and v; `*_row` and `*_head` are the strides of T and H
in elements. Outputs are contiguous (T, H, Dh). Offsets that grow with T are int64.
"""

import triton
import triton.language as tl

# Below every score; finite, so that rows that have seen no key yet make no NaN.
_LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _load_rows(
    base, offsets, valid, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """(rows, BLOCK_D) at base + offsets, zero outside the head and, if MASKED, in invalid rows."""
    dims = tl.arange(0, BLOCK_D)
    pointers = base + offsets[:, None] + dims[None, :]
    if MASKED:
        if HEAD_DIM < BLOCK_D:
            x = tl.load(pointers, mask=valid[:, None] & (dims[None, :] < HEAD_DIM), other=0.0)
        else:
            x = tl.load(pointers, mask=valid[:, None], other=0.0)
    else:
        if HEAD_DIM < BLOCK_D:
            x = tl.load(pointers, mask=dims[None, :] < HEAD_DIM, other=0.0)
        else:
            x = tl.load(pointers)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def _load_numbers(base, offsets, valid, MASKED: tl.constexpr):
    """One number per row, 0 in invalid rows if MASKED."""
    return tl.load(base + offsets, mask=valid, other=0.0) if MASKED else tl.load(base + offsets)


@triton.jit
def _store_rows(base, offsets, x, valid, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    dims = tl.arange(0, BLOCK_D)
    mask = valid[:, None] & (dims[None, :] < HEAD_DIM)
    tl.store(base + offsets[:, None] + dims[None, :], x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _tanh(x, EXACT: tl.constexpr):
    """tanh to about 1e-7 absolute; with EXACT, to a few units in the last place near 0 too."""
    y = 1.0 - 2.0 / (1.0 + tl.exp2(x * 2.8853900817779268))
    if EXACT:
        z = x * x
        series = z * -0.008863235529902197 + 0.021869488536155203
        series = series * z - 0.05396825396825397
        series = series * z + 0.13333333333333333
        series = series * z - 0.3333333333333333
        y = tl.where(tl.abs(x) < 0.3, x + x * (series * z), y)
    return y


@triton.jit
def _scores(left, right, factor, cap, SOFTCAP: tl.constexpr, EXACT: tl.constexpr):
    """(left @ right.T scaled and capped, in base 2; derivative of the cap), fp32."""
    scores = tl.dot(left, tl.trans(right), input_precision="ieee") * factor
    slope = scores
    if SOFTCAP:
        bounded = _tanh(scores, EXACT)
        scores = bounded * cap
        slope = 1.0 - bounded * bounded
    return scores, slope


@triton.jit
def _unpack(first, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """(position row, head in its group) of the packed rows of a block that begins at `first`."""
    packed = tl.arange(0, BLOCK)
    return first + packed // GROUP, packed % GROUP


@triton.jit
def _keys_of_block(
    ends, positions, query, query_position, start, stop, window,
    BLOCK_N: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """((BLOCK_N,) keys inside [start, stop), (BLOCK_M, BLOCK_N) whether a query sees a key)."""
    key = start + tl.arange(0, BLOCK_N)
    inside = key < stop
    end = tl.load(ends + key, mask=inside, other=0)
    visible = (key[None, :] <= query[:, None]) & (query[:, None] < end[None, :])
    if WINDOW:
        key_position = tl.load(positions + key, mask=inside, other=0)
        visible = visible & (query_position[:, None] - key_position[None, :] < window)
    return inside, visible


@triton.jit
def _next_interval(nodes, node, last):
    """(lo, bound, hi, next node) of a node; see `tiles.AttentionTiles`. Empty for node 0."""
    entry = nodes + node * 4
    lo = tl.load(entry)
    hi = tl.load(entry + 1)
    bound = tl.where(tl.load(entry + 2) >= last, hi, lo)
    return lo, bound, hi, tl.load(entry + 3)


@triton.jit
def _clip(positions, lo, node, oldest):
    """(lo, next node) without what lies left of the position `oldest`."""
    hidden = tl.maximum(oldest - tl.load(positions + lo), 0)
    return lo + hidden, tl.where(hidden > 0, 0, node)


@triton.jit
def _forward_block(
    acc, total, peak, q, key_base, value_base, key_row, value_row, inside, visible, factor, cap,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over BLOCK_N keys."""
    rows = tl.arange(0, BLOCK_N)
    k = _load_rows(key_base, rows * key_row, inside, MASKED, HEAD_DIM, BLOCK_D, UPCAST)
    scores, _ = _scores(q, k, factor, cap, SOFTCAP, EXACT)
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new_peak[:, None])
    rescale = tl.exp2(peak - new_peak)
    total = total * rescale + tl.sum(weights, axis=1)
    v = _load_rows(value_base, rows * value_row, inside, MASKED, HEAD_DIM, BLOCK_D, UPCAST)
    acc = acc * rescale[:, None]
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
    return acc, total, new_peak


@triton.jit(do_not_specialize=["window"])
def forward_kernel(
    q, k, v, out, lse, rest, tiles, nodes, ends, positions, factor, cap, window, kv_heads,
    q_row, q_head, k_row, k_head, v_row, v_head,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, EXACT: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """out (T, Hq, Dh), lse and rest (T, Hq) of one query tile and one key head."""
    head = tl.program_id(0) % kv_heads
    tile = tiles + tl.program_id(0) // kv_heads * 5
    first = tl.load(tile)
    last = tl.load(tile + 1)
    lo = tl.load(tile + 2)
    bound = tl.load(tile + 3)
    node = tl.load(tile + 4)
    hi = last

    query, inner = _unpack(first, GROUP, BLOCK_M)
    valid = query < last
    heads = kv_heads * GROUP
    query_head = head * GROUP + inner
    q_offsets = query.to(tl.int64) * q_row + query_head.to(tl.int64) * q_head
    q_tile = _load_rows(q, q_offsets, valid, True, HEAD_DIM, BLOCK_D, UPCAST)
    query_position = query
    oldest = 0
    if WINDOW:
        query_position = tl.load(positions + query, mask=valid, other=2147483647)
        oldest = tl.min(query_position, axis=0) - window + 1
    k_head_base = k + head.to(tl.int64) * k_head
    v_head_base = v + head.to(tl.int64) * v_head

    peak = tl.full([BLOCK_M], _LOWEST, dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    while lo < hi:
        steady = lo
        if WINDOW:
            lo, node = _clip(positions, lo, node, oldest)
            steady = lo
        else:
            steady = lo + (bound - lo) // BLOCK_N * BLOCK_N
        key_base = k_head_base + lo.to(tl.int64) * k_row
        value_base = v_head_base + lo.to(tl.int64) * v_row
        if not WINDOW:
            for _ in range(lo, steady, BLOCK_N):
                acc, total, peak = _forward_block(
                    acc, total, peak, q_tile, key_base, value_base, k_row, v_row, None, None,
                    factor, cap, False, SOFTCAP, EXACT, UPCAST, HEAD_DIM, BLOCK_N, BLOCK_D,
                )  # fmt: skip
                key_base += k_row * BLOCK_N
                value_base += v_row * BLOCK_N
        for start in range(steady, hi, BLOCK_N):
            inside, visible = _keys_of_block(
                ends, positions, query, query_position, start, hi, window, BLOCK_N, WINDOW
            )
            acc, total, peak = _forward_block(
                acc, total, peak, q_tile, key_base, value_base, k_row, v_row, inside, visible,
                factor, cap, True, SOFTCAP, EXACT, UPCAST, HEAD_DIM, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            key_base += k_row * BLOCK_N
            value_base += v_row * BLOCK_N
        lo, bound, hi, node = _next_interval(nodes, node, last)

    total = tl.where(valid, total, 1.0)
    out_rows = query.to(tl.int64) * heads + query_head
    _store_rows(out, out_rows * HEAD_DIM, acc / total[:, None], valid, HEAD_DIM, BLOCK_D)
    if EXACT:
        tl.store(lse + out_rows, peak, mask=valid)
        tl.store(rest + out_rows, tl.log2(total), mask=valid)
    else:
        tl.store(lse + out_rows, peak + tl.log2(total), mask=valid)


@triton.jit(do_not_specialize=["rows"])
def delta_kernel(
    out, grad_out, delta, rows,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta (rows,) = sum over Dh of out * grad_out, both contiguous (rows, Dh).

    Equal to the sum over keys of weight * weight's gradient, and cheaper.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < rows
    o = _load_rows(out, row * HEAD_DIM, valid, True, HEAD_DIM, BLOCK_D, True)
    g = _load_rows(grad_out, row * HEAD_DIM, valid, True, HEAD_DIM, BLOCK_D, True)
    tl.store(delta + row, tl.sum(o * g, axis=1), mask=valid)


@triton.jit
def _query_gradient_block(
    acc, q, grad, lse, rest, delta, key_base, value_base, key_row, value_row, inside, visible,
    factor, cap, DELTA: tl.constexpr,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """acc with the part of BLOCK_N keys added: dq, not yet scaled, or with DELTA its delta."""
    rows = tl.arange(0, BLOCK_N)
    k = _load_rows(key_base, rows * key_row, inside, MASKED, HEAD_DIM, BLOCK_D, UPCAST)
    v = _load_rows(value_base, rows * value_row, inside, MASKED, HEAD_DIM, BLOCK_D, UPCAST)
    scores, slope = _scores(q, k, factor, cap, SOFTCAP, EXACT)
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    scores -= lse[:, None]
    if EXACT:
        scores -= rest[:, None]
    weights = tl.exp2(scores)
    grad_weights = tl.dot(grad, tl.trans(v), input_precision="ieee")
    if DELTA:
        acc += tl.sum(weights * grad_weights, axis=1)
    else:
        grad_scores = weights * (grad_weights - delta[:, None])
        if SOFTCAP:
            grad_scores *= slope
        acc = tl.dot(grad_scores.to(k.dtype), k, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["window"])
def query_gradient_kernel(
    q, k, v, grad_out, lse, rest, delta, dq, tiles, nodes, ends, positions,
    factor, cap, scale, window, kv_heads, q_row, q_head, k_row, k_head, v_row, v_head,
    DELTA: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    EXACT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq (T, Hq, Dh) of one query tile and one key head; walks the keys as the forward does.

    With DELTA, instead: delta (T, Hq) as the sum over keys of weight * weight's gradient.
    """
    head = tl.program_id(0) % kv_heads
    tile = tiles + tl.program_id(0) // kv_heads * 5
    first = tl.load(tile)
    last = tl.load(tile + 1)
    lo = tl.load(tile + 2)
    bound = tl.load(tile + 3)
    node = tl.load(tile + 4)
    hi = last

    query, inner = _unpack(first, GROUP, BLOCK_M)
    valid = query < last
    query_head = head * GROUP + inner
    q_offsets = query.to(tl.int64) * q_row + query_head.to(tl.int64) * q_head
    q_tile = _load_rows(q, q_offsets, valid, True, HEAD_DIM, BLOCK_D, UPCAST)
    out_rows = query.to(tl.int64) * (kv_heads * GROUP) + query_head
    grad = _load_rows(grad_out, out_rows * HEAD_DIM, valid, True, HEAD_DIM, BLOCK_D, UPCAST)
    lse_tile = tl.load(lse + out_rows, mask=valid, other=0.0)
    rest_tile = lse_tile  # read by EXACT alone
    if EXACT:
        rest_tile = tl.load(rest + out_rows, mask=valid, other=0.0)
    if DELTA:
        delta_tile = lse_tile  # not read
        acc = tl.zeros([BLOCK_M], dtype=tl.float32)
    else:
        delta_tile = tl.load(delta + out_rows, mask=valid, other=0.0)
        acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    query_position = query
    oldest = 0
    if WINDOW:
        query_position = tl.load(positions + query, mask=valid, other=2147483647)
        oldest = tl.min(query_position, axis=0) - window + 1
    k_head_base = k + head.to(tl.int64) * k_head
    v_head_base = v + head.to(tl.int64) * v_head

    while lo < hi:
        steady = lo
        if WINDOW:
            lo, node = _clip(positions, lo, node, oldest)
            steady = lo
        else:
            steady = lo + (bound - lo) // BLOCK_N * BLOCK_N
        key_base = k_head_base + lo.to(tl.int64) * k_row
        value_base = v_head_base + lo.to(tl.int64) * v_row
        if not WINDOW:
            for _ in range(lo, steady, BLOCK_N):
                acc = _query_gradient_block(
                    acc, q_tile, grad, lse_tile, rest_tile, delta_tile, key_base, value_base,
                    k_row, v_row, None, None, factor, cap, DELTA, False, SOFTCAP, EXACT, UPCAST,
                    HEAD_DIM, BLOCK_N, BLOCK_D,
                )  # fmt: skip
                key_base += k_row * BLOCK_N
                value_base += v_row * BLOCK_N
        for start in range(steady, hi, BLOCK_N):
            inside, visible = _keys_of_block(
                ends, positions, query, query_position, start, hi, window, BLOCK_N, WINDOW
            )
            acc = _query_gradient_block(
                acc, q_tile, grad, lse_tile, rest_tile, delta_tile, key_base, value_base,
                k_row, v_row, inside, visible, factor, cap, DELTA, True, SOFTCAP, EXACT, UPCAST,
                HEAD_DIM, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            key_base += k_row * BLOCK_N
            value_base += v_row * BLOCK_N
        lo, bound, hi, node = _next_interval(nodes, node, last)

    if DELTA:
        tl.store(delta + out_rows, acc, mask=valid)
    else:
        _store_rows(dq, out_rows * HEAD_DIM, acc * scale, valid, HEAD_DIM, BLOCK_D)


@triton.jit
def _key_gradient_block(
    dk, dv, k, v, q_base, row_base, grad_out, lse, rest, delta, q_offsets, row_offsets,
    inside, visible, factor, cap,
    MASKED: tl.constexpr, PARTIAL: tl.constexpr, SOFTCAP: tl.constexpr, EXACT: tl.constexpr,
    UPCAST: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk, not yet scaled, and dv, with the part of a block of packed queries added.

    PARTIAL: not every packed row is `inside`. The others are read as zeros, so that they add
    nothing; `visible` (keys, queries) need not know of them.
    """
    q = _load_rows(q_base, q_offsets, inside, PARTIAL, HEAD_DIM, BLOCK_D, UPCAST)
    grad = _load_rows(
        grad_out + row_base * HEAD_DIM, row_offsets * HEAD_DIM, inside, PARTIAL, HEAD_DIM, BLOCK_D,
        UPCAST,
    )  # fmt: skip
    scores, slope = _scores(k, q, factor, cap, SOFTCAP, EXACT)
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    scores -= _load_numbers(lse + row_base, row_offsets, inside, PARTIAL)[None, :]
    if EXACT:
        scores -= _load_numbers(rest + row_base, row_offsets, inside, PARTIAL)[None, :]
    weights = tl.exp2(scores)
    dv = tl.dot(weights.to(grad.dtype), grad, dv, input_precision="ieee")
    grad_weights = tl.dot(v, tl.trans(grad), input_precision="ieee")
    row_delta = _load_numbers(delta + row_base, row_offsets, inside, PARTIAL)
    grad_scores = weights * (grad_weights - row_delta[None, :])
    if SOFTCAP:
        grad_scores *= slope
    dk = tl.dot(grad_scores.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["window"])
def key_gradient_kernel(
    q, k, v, grad_out, lse, rest, delta, dk, dv, partials, pieces, ends, positions,
    factor, cap, scale, window, kv_heads, q_row, q_head, k_row, k_head, v_row, v_head,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, EXACT: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """dk and dv (T, Hkv, Dh) of one key tile and one key head, or one slot's part of them.

    partials: (slots, Hkv, 2, BLOCK_N, BLOCK_D) fp32.
    """
    STEP: tl.constexpr = BLOCK_M // GROUP
    head = tl.program_id(0) % kv_heads
    piece = pieces + tl.program_id(0) // kv_heads * 6
    first = tl.load(piece)
    last = tl.load(piece + 1)
    begin = tl.load(piece + 2)
    steady = tl.load(piece + 3)
    stop = tl.load(piece + 4)
    slot = tl.load(piece + 5)

    columns = tl.arange(0, BLOCK_N)
    key = first + columns
    key_valid = key < last
    key_end = tl.load(ends + key, mask=key_valid, other=0)
    k_base = k + first.to(tl.int64) * k_row + head.to(tl.int64) * k_head
    v_base = v + first.to(tl.int64) * v_row + head.to(tl.int64) * v_head
    k_tile = _load_rows(k_base, columns * k_row, key_valid, True, HEAD_DIM, BLOCK_D, UPCAST)
    v_tile = _load_rows(v_base, columns * v_row, key_valid, True, HEAD_DIM, BLOCK_D, UPCAST)

    heads = kv_heads * GROUP
    shift, inner = _unpack(0, GROUP, BLOCK_M)
    q_offsets = shift.to(tl.int64) * q_row + inner.to(tl.int64) * q_head
    row_offsets = shift * heads + inner
    q_head_base = q + (head * GROUP).to(tl.int64) * q_head
    whole = shift < STEP
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)

    if WINDOW:
        # Positions from which a key is out of the window.
        key_horizon = tl.load(positions + key, mask=key_valid, other=0) + window
        horizon = tl.max(key_horizon, axis=0)
        while begin < stop:
            # Positions grow by at most one a row, so the next `reach` rows may see a key. A row
            # beyond the horizon hides its whole subtree.
            reach = tl.maximum(horizon - tl.load(positions + begin), 0)
            seen = tl.minimum(begin + reach, stop)
            row = begin.to(tl.int64)
            q_base = q_head_base + row * q_row
            row_base = row * heads + head * GROUP
            for start in range(begin, seen, STEP):
                query = start + shift
                inside = whole & (query < seen)
                query_position = tl.load(positions + query, mask=inside, other=0)
                visible = (key[:, None] <= query[None, :]) & (query[None, :] < key_end[:, None])
                visible = visible & (query_position[None, :] < key_horizon[:, None])
                dk_acc, dv_acc = _key_gradient_block(
                    dk_acc, dv_acc, k_tile, v_tile, q_base, row_base, grad_out, lse, rest, delta,
                    q_offsets, row_offsets, inside, visible, factor, cap, True, True, SOFTCAP,
                    EXACT, UPCAST, HEAD_DIM, BLOCK_D,
                )  # fmt: skip
                q_base += q_row * STEP
                row_base += heads * STEP
            begin = tl.where(reach > 0, seen, tl.load(ends + begin))
    else:
        # The blocks without a mask are whole: the odd one stands before them.
        steady = stop - (stop - steady) // STEP * STEP
        row = begin.to(tl.int64)
        q_base = q_head_base + row * q_row
        row_base = row * heads + head * GROUP
        for start in range(begin, steady, STEP):
            query = start + shift
            inside = whole & (query < steady)
            visible = (key[:, None] <= query[None, :]) & (query[None, :] < key_end[:, None])
            dk_acc, dv_acc = _key_gradient_block(
                dk_acc, dv_acc, k_tile, v_tile, q_base, row_base, grad_out, lse, rest, delta,
                q_offsets, row_offsets, inside, visible, factor, cap, True, True, SOFTCAP,
                EXACT, UPCAST, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
            q_base += q_row * STEP
            row_base += heads * STEP
        row = steady.to(tl.int64)
        q_base = q_head_base + row * q_row
        row_base = row * heads + head * GROUP
        for _ in range(steady, stop, STEP):
            dk_acc, dv_acc = _key_gradient_block(
                dk_acc, dv_acc, k_tile, v_tile, q_base, row_base, grad_out, lse, rest, delta,
                q_offsets, row_offsets, whole, None, factor, cap, False, BLOCK_M % GROUP != 0,
                SOFTCAP, EXACT, UPCAST, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
            q_base += q_row * STEP
            row_base += heads * STEP

    dk_acc *= scale
    if slot < 0:
        key_rows = (key.to(tl.int64) * kv_heads + head) * HEAD_DIM
        _store_rows(dk, key_rows, dk_acc, key_valid, HEAD_DIM, BLOCK_D)
        _store_rows(dv, key_rows, dv_acc, key_valid, HEAD_DIM, BLOCK_D)
    else:
        part = partials + (slot.to(tl.int64) * kv_heads + head) * (2 * BLOCK_N * BLOCK_D)
        inside_part = columns[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
        tl.store(part + inside_part, dk_acc)
        tl.store(part + BLOCK_N * BLOCK_D + inside_part, dv_acc)


@triton.jit
def sum_slots_kernel(
    partials, split_tiles, dk, dv, kv_heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dk and dv of ROWS keys of a tile that was cut into pieces: the sum of its slots, in order."""
    PARTS: tl.constexpr = BLOCK_N // ROWS
    program = tl.program_id(0)
    tile = split_tiles + program // (kv_heads * PARTS) * 4
    head = program // PARTS % kv_heads
    first = tl.load(tile)
    last = tl.load(tile + 1)
    slot = tl.load(tile + 2)
    count = tl.load(tile + 3)

    row = program % PARTS * ROWS + tl.arange(0, ROWS)
    inside_part = row[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    stride = kv_heads * (2 * BLOCK_N * BLOCK_D)
    part = partials + slot.to(tl.int64) * stride + head * (2 * BLOCK_N * BLOCK_D)
    dk_acc = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    dv_acc = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    for _ in range(count):
        dk_acc += tl.load(part + inside_part)
        dv_acc += tl.load(part + BLOCK_N * BLOCK_D + inside_part)
        part += stride
    key = first + row
    valid = key < last
    key_rows = (key.to(tl.int64) * kv_heads + head) * HEAD_DIM
    _store_rows(dk, key_rows, dk_acc, valid, HEAD_DIM, BLOCK_D)
    _store_rows(dv, key_rows, dv_acc, valid, HEAD_DIM, BLOCK_D)

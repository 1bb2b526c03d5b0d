"""Bytes of packed weights and of cached tokens from shapes alone: the arithmetic of `packed.h` and `int8_block.h`, for
plans. Needs no torch."""

import math
from collections.abc import Mapping
from typing import Any

HEADER, TAIL, LINE, OUTPUTS = 128, 64, 64, 16
TILE_INPUTS = {"bf16": 32, "int8": 64}


def packed_weight_bytes(
    kernel: str, n: int, k: int, zero_share: float = 0.0, group_size: int = 64, has_zero_codes: bool = True
) -> int:
    """Size of the buffer into which a kernel packs a weight [n, k].

    kernel      its name, as in `native.LINEAR`
    zero_share       share of zero weights that a sparse kernel skips; of block_sparse_linear of zero vectors (16
                outputs by 2 inputs). Spread evenly: a block of 16 outputs has its share, which rounds to whole lines
    group_size       inputs that share a scale on int4
    has_zero_codes  int4 keeps the code of 0 of each group, as it does unless 0 is the middle one everywhere
    """
    blocks, int8 = math.ceil(n / OUTPUTS), "int8" in kernel
    inputs = group_size if "int4" in kernel else TILE_INPUTS["int8" if int8 else "bf16"]
    tiles = math.ceil(k / inputs)
    lanes = 2 * 4 * OUTPUTS * blocks if int8 else 0  # scales, and sums of codes
    if "int4" in kernel:
        stream = blocks * (_round_up_to_cache_line(tiles * (40 if has_zero_codes else 32)) + tiles * group_size * 8)
    elif "block" in kernel:
        vectors = round(math.ceil(k / 2) * (1 - zero_share))
        stream = blocks * (LINE + _round_up_to_cache_line(2 * vectors) + LINE * vectors)
    elif "sparse" in kernel:
        rows = [OUTPUTS] * (n // OUTPUTS) + [n % OUTPUTS] * (n % OUTPUTS > 0)
        masks, width = (128, 1) if int8 else (64, 2)
        stream = sum(
            _round_up_to_cache_line(masks * tiles + width * round(count * k * (1 - zero_share))) for count in rows
        )
    else:
        stream = blocks * 1024 * tiles
    return _round_up_to_cache_line(HEADER + 8 * (blocks + 1) + lanes) + stream + TAIL


def kv_bytes_per_token(slot: Mapping[str, Any]) -> int:
    """Bytes of a token's keys and values in a slot of a native plan."""
    key, value = slot["head_dim"], slot.get("value_dim", slot["head_dim"])
    if slot.get("numbers") != "int8":
        return 2 * slot["kv_heads"] * (key + value)
    groups = math.ceil(key / 32)  # of numbers of a key that share a scale
    return slot["kv_heads"] * (32 * groups + 16 * math.ceil(value / 16) + 2 * (groups + 1))


def _round_up_to_cache_line(count: int) -> int:
    return -(-count // LINE) * LINE

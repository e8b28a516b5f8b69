"""Compile the kernels for GPUs that are not here; print registers, stack, shared memory and code.

`python -m tests.tools.compile_kernels [sm ...]`; shows type errors that the interpreter hides.
"""

import os
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from mm_sparse.kernels.hopper import backward, forward, pipeline
from mm_sparse.kernels.paged import placed_lists
from mm_sparse.kernels.triton import (
    attention_backward,
    attention_decode,
    attention_forward,
    attention_mass,
    block_scores,
    few_row_scores,
    merge_outputs,
    pooling,
    topk,
    two_stage_scores,
)

POINTERS = {
    "Q",
    "K",
    "V",
    "Out",
    "Dout",
    "Dq",
    "Dk",
    "Dv",
    "X",
    "Mean",
    "High",
    "Low",
    "Rows",
    "Keys",
    "Parts",
    "Other",
    "OutQ",
    "OutK",
}
FLOATS = {"Part", "Weight", "Lse", "Delta", "Values", "Bias", "Floor", "Sums"}
FLOATS |= {"Log", "OtherLog", "Whole", "Logits", "SumsK", "SumsV"}
NARROW = {"Exists": "i1", "Sinks": "i1", "TileKind": "i8", "UnitKind": "i8", "Budget": "i64"}
NARROW |= {"WholeBudget": "i64", "Index": "i16", "Order": "i16", "Runs": "i16", "Placed": "i32"}
NARROW |= dict.fromkeys(("SampledLists", "All"), "i16")
WIDE = (
    attention_mass._attention_mass,
    block_scores._block_scores,
    few_row_scores.few_row_shares,
    two_stage_scores._two_stage_block_scores,
)
DESCRIBED = {"Kd": "keys", "Vd": "keys", "Qd": "queries", "Dd": "queries"}
SUMS = ("Dkd", "Dvd")
CONTIGUOUS = {"PageTable": None, "PAGE_UNITS": 0, "PAGE_STRIDE": 0}
# As an engine has them that puts keys beside values, heads before tokens.
PAGED = {"PAGE_UNITS": 8, "PAGE_STRIDE": 64, "REGULAR": True, "Kd": None, "Vd": None}
SHARED = {80: 166912, 86: 101376, 90: 232448, 100: 232448, 120: 101376}


def code_size(cubin: bytes) -> int:
    """Bytes of the sections of an ELF file that hold instructions."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count = struct.unpack_from("<HH", cubin, 58)
    total = 0
    for i in range(count):
        flags, _, _, length = struct.unpack_from("<4Q", cubin, table + i * size + 8)
        total += length if flags & 4 else 0
    return total


def compile_one(kernel, dtype: str, constants: dict, target: int, warps: int, stages: int) -> str:
    """One kernel with every pointer and stride aligned to 16, as contiguous tensors have them."""
    signature, attributes = {}, {}
    gluon = kernel.is_gluon()
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name in SUMS:
            box = f"1, {min(constants['UNIT'], constants['COLS'])}, 32"
            signature[name] = f"tensordesc<fp32[{box}],{backward.BOXED_SUMS.value!r}>"
            continue
        if name in DESCRIBED and gluon:
            box = f"1, 1, {min(constants['UNIT'], constants['COLS'])}, 64"
            signature[name] = f"tensordesc<{dtype}[{box}],{pipeline.BOXED.value!r}>"
            continue
        if name in DESCRIBED:
            rows = constants["COLS" if DESCRIBED[name] == "keys" else "ROWS"]
            signature[name] = f"tensordesc<{dtype}[1, 1, {rows}, {constants['BLOCK_D']}]>"
            continue
        if name in FLOATS or (name == "Out" and kernel in WIDE):
            signature[name] = "*fp32"
        elif name in POINTERS:
            signature[name] = f"*{dtype}"
        elif name in NARROW:
            signature[name] = f"*{NARROW[name]}"
        elif name[0].isupper():
            signature[name] = "*i32"
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
        if signature[name][0] == "*" or name.startswith("stride"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    own = {k: v for k, v in constants.items() if k in kernel.arg_names}
    source = (GluonASTSource if gluon else ASTSource)(kernel, signature, own, attributes)
    options = {"num_warps": warps, "num_stages": stages}
    built = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = (re.search(f"{n}:(\\d+)", usage)[1] for n in ("REG", "STACK"))
    if built.metadata.shared > SHARED[target]:
        raise SystemExit(f"sm_{target} has {SHARED[target]} B of shared memory, {built.metadata}")
    code = code_size(built.asm["cubin"]) / 1024
    shared = built.metadata.shared
    return f"registers {registers}, stack {stack} B, shared {shared} B, code {code:.1f} KiB"


def scoring(constants: dict, target: int) -> list[tuple]:
    """The kernels around attention, learned scores with codes of rank 64."""
    dim, unit, group = constants["D"], constants["UNIT"], constants["GROUP"]
    wide = dim + 64
    rows = triton.next_power_of_2(group * 4)
    size = 4 if constants["PRECISION"] == "ieee" else 2
    order, cols, stages = block_scores.share_blocks(rows, wide, size, target // 10)
    together, block, steps, warps = pooling.pool_blocks(unit, dim, size)
    pooled = {
        "SIZE": unit, "WIDTH": unit, "BLOCK_W": block, "STEPS": steps, "TOGETHER": together,
        "EXTREMES": True,
    }  # fmt: skip
    tokens = constants["TOKENS"]
    q_together, q_block, q_steps, _ = pooling.pool_blocks(-(-tokens // 4), dim, size)
    both = {
        "TILE": tokens, "WIDTH": -(-tokens // 4), "Q_TOGETHER": q_together, "Q_BLOCK": q_block,
        "Q_STEPS": q_steps, "K_TOGETHER": together, "K_BLOCK": block, "K_STEPS": steps,
    }  # fmt: skip
    share = {
        "QUERY_POOLS": 4, "ORDER": order, "COLS": cols, "F": wide,
        "BLOCK_F": triton.next_power_of_2(wide), "KINDS": 3, "BUCKETS": 24, "LARGEST": False,
        "BIASED": True, "PARTS": 1,
    }  # fmt: skip
    few_rows = {
        **share, "ORDER": block_scores.row_order(rows, max(16, rows)),
        "COLS": few_row_scores.units_of_block(1, size), "READ": few_row_scores.READ_UNITS,
    }  # fmt: skip
    few_rows_of_parts = {
        **few_rows, "F": dim, "BLOCK_F": max(triton.next_power_of_2(dim), 16), "PARTS": 4,
        "COLS": few_row_scores.units_of_block(4, size),
    }  # fmt: skip
    own = {**share, "F": dim, "BLOCK_F": max(triton.next_power_of_2(dim), 16), "PARTS": 4}
    own["ORDER"], cols, fine_stages = block_scores.share_blocks(rows, dim, size, target // 10)
    own["COLS"] = max(cols // 2, 16)
    true_mass = {
        "ROWS": 64 if size == 2 else 16, "SPLITS": 1, "LARGEST": True,
        "COLS": max(64 if size == 2 else 16, unit),
    }  # fmt: skip
    keep = {"KINDS": 3, "BLOCK_U": 4096, "FILL": 1024, "SAMPLED": False, "COARSE": 1}
    of_runs = {**keep, "KINDS": 0, "COARSE": 16}
    some = {"ROWS": max(rows, 16), "COLS": two_stage_scores.COLS, "COARSE": 16}
    few = two_stage_scores.run_warps(some["ROWS"], size)
    drawn = {**keep, "SAMPLED": True}
    merged = {"BLOCK_R": 32}
    return [
        (pooling._pool_means, pooled, warps, 2), (pooling._pool_queries_and_keys, both, warps, 2),
        (block_scores._block_scores_lse, share, 4, stages),
        (block_scores._block_scores, {**share, "COLS": min(share["COLS"], 32)}, 4, stages),
        (block_scores._block_scores, own, 4, fine_stages),
        (few_row_scores.few_row_logits, few_rows, 4, stages),
        (few_row_scores.few_row_logits, few_rows_of_parts, 4, stages),
        (few_row_scores.few_row_shares, few_rows, 4, stages),
        (few_row_scores.few_row_shares, few_rows_of_parts, 4, stages),
        (attention_mass._attention_mass, true_mass, 4, 2),
        (topk._topk_registers, keep, topk.keep_warps(4096), 2),
        (topk._topk_registers, drawn, topk.keep_warps(4096), 2),
        (merge_outputs._merge_outputs, merged, 4, 2),
        (topk._topk_registers, of_runs, topk.keep_warps(4096), 2),
        (topk._topk_chunked, {"CHUNK": topk.CHUNK, "COARSE": 1}, 8, 2),
        (topk._topk_chunked, {"CHUNK": topk.CHUNK, "COARSE": 16}, 8, 2),
        (two_stage_scores._two_stage_block_scores, {**share, **some}, few, 2),
        (two_stage_scores._two_stage_block_scores, {**own, **some}, few, 2),
    ]  # fmt: skip


def special(constants: dict, dtype: str, rows: int, target: int) -> list[tuple]:
    """The kernels for few queries and for Hopper, where they serve."""
    wide = dtype == "fp32"
    part = {"ROWS": 16, "COLS": 32 if wide else 64}
    stages = 1 if wide else 3
    found = [
        (attention_decode._block_sparse_attention_split_kv, part, 4, stages),
        (attention_decode._merge_splits, {"WIDTH": 16}, 4, 2),
    ]
    found.append((pipeline.sort_lists, {"LENGTH": 128, "WIDTH": 1024}, 4, 2))
    found.append((attention_backward._add_list_chunks, {"COLS": min(constants["UNIT"], 64)}, 4, 2))
    if target == 90 and not wide and rows == 128:
        for dim, (cols, stages, _) in forward.BLOCKS.items():
            for unit in (16, 64, 128):
                more = {"D": dim, "COLS": cols, "STAGES": stages, "UNIT": unit}
                found.append((forward._block_sparse_attention_fwd_hopper, more, 4, 2))
                found.append(
                    (forward._block_sparse_attention_fwd_hopper, {**more, "EVEN": False}, 4, 2)
                )
                found.append(
                    (
                        forward._block_sparse_attention_fwd_hopper,
                        {**more, "EVEN_TILES": False},
                        4,
                        2,
                    )
                )
        for dim, (cols, stages) in backward.BLOCKS.items():
            for unit in (16, 128):
                more = {"D": dim, "COLS": cols, "STAGES": stages, "UNIT": unit}
                found.append((backward._block_sparse_attention_bwd_hopper, more, 4, 2))
                found.append(
                    (backward._block_sparse_attention_bwd_hopper, {**more, "EVEN": False}, 4, 2)
                )
    return found


def paged(constants: dict, dtype: str, rows: int, target: int, size: int) -> None:
    """The kernels that read keys or descriptors from pages."""
    dim, unit = constants["D"], constants["UNIT"]
    r, c, warps, stages = attention_forward.forward_blocks(rows, unit, dim, size, target // 10)
    blocks = {"ROWS": r, "COLS": c, "CUT_COLS": min(c, 64), "SPLITS": rows // r}
    part = {"ROWS": 16, "COLS": 32 if size == 4 else 64}
    kinds = [
        (attention_forward._block_sparse_attention_fwd, blocks, warps, stages),
        (attention_decode._block_sparse_attention_split_kv, part, 4, 1 if size == 4 else 3),
        (placed_lists._placed_lists, {"WIDTH": 1024}, 4, 2),
    ]
    scores = (
        block_scores._block_scores_lse, block_scores._block_scores, few_row_scores.few_row_logits
    )  # fmt: skip
    kinds += [kind for kind in scoring(constants, target) if kind[0] in scores]
    for kernel, more, warps, stages in kinds:
        own = {**constants, **more, **PAGED}
        own.pop("PageTable")
        usage = compile_one(kernel, dtype, own, target, warps, stages)
        print(f"sm_{target} {kernel.__name__} in pages: {usage}", flush=True)


def main(targets: list[int]) -> None:
    """A plain and an awkward problem for each kernel and GPU."""
    for target in targets:
        for name, dim, unit, rows, group, regular, dtype, size in (
            ("D128", 128, 128, 128, 1, True, "bf16", 2),
            ("D80 G3 ragged", 80, 16, 64, 3, False, "fp16", 2),
            ("D64 fp32", 64, 16, 64, 1, True, "fp32", 4),
        ):
            constants = {
                "GROUP": group, "TOKENS": rows // group, "UNIT": unit, "D": dim,
                "BLOCK_D": triton.next_power_of_2(dim), "REGULAR": regular,
                "EVEN": regular, "EVEN_TILES": regular, "REGULAR_TILES": regular,
                "PRECISION": "ieee" if size == 4 else "tf32", **CONTIGUOUS,
            }  # fmt: skip
            for kernel, (r, c, warps, stages) in (
                (
                    attention_forward._block_sparse_attention_fwd,
                    attention_forward.forward_blocks(rows, unit, dim, size, target // 10),
                ),
                (
                    attention_backward._block_sparse_attention_bwd_dq,
                    attention_backward.query_chunks(rows, dim, size, target // 10),
                ),
                (
                    attention_backward._block_sparse_attention_bwd_dkv,
                    attention_backward.key_blocks(rows, unit, dim, size, target // 10),
                ),
            ):
                blocks = {"ROWS": r, "COLS": c, "CUT_COLS": min(c, 64), "SPLITS": rows // r}
                blocks["EARLY"] = max(attention_backward.EARLY_KEYS // unit, 1)
                if target < 90 or size == 4 or not regular:
                    blocks |= dict.fromkeys(DESCRIBED)
                usage = compile_one(kernel, dtype, {**constants, **blocks}, target, warps, stages)
                print(f"sm_{target} {name} {kernel.__name__} {r}x{c}: {usage}", flush=True)
            paged(constants, dtype, rows, target, size)
            kinds = scoring(constants, target) + special(constants, dtype, rows, target)
            for kernel, more, warps, stages in kinds:
                usage = compile_one(kernel, dtype, {**constants, **more}, target, warps, stages)
                kind = ""
                if kernel.is_gluon():
                    even = more.get("EVEN", True) and more.get("EVEN_TILES", True)
                    kind = f" D{more['D']} unit {more['UNIT']} {'even' if even else 'any'}"
                print(f"sm_{target} {name} {kernel.__name__}{kind}: {usage}", flush=True)


if __name__ == "__main__":
    main([int(x) for x in sys.argv[1:]] or [80, 90])

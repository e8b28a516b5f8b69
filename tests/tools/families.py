"""Try `sparsify` on every family of models that the installed libraries have, and write the page.

python -m tests.tools.families                 # all: writes docs/results/data/families-cpu.json
python -m tests.tools.families llama t5 vit    # some model types: prints what became of them
python -m tests.tools.families --update llama  # the same, and into the JSON
python -m tests.tools.families --page          # docs/reference/supported-models.md from the JSON
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mm_sparse as mms
from tests.support import tiny_configs

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "docs/results/data/families-cpu.json"
PAGE = ROOT / "docs/reference/supported-models.md"
WHOLE = mms.SparseConfig(ratio=1.0, dense_below=0)
FEW = mms.SparseConfig(ratio=0.05, dense_below=0, sinks=0, window=0, query_pools=1)
CLOSE, SECONDS, WORKERS = 1e-4, 60, 3
# Auto mappings of transformers in the order in which a type's class is looked for.
MAPPINGS = (
    ("MULTIMODAL_LM", ""), ("IMAGE_TEXT_TO_TEXT", ""), ("MASKED_LM", "text encoders"),
    ("SPEECH_SEQ_2_SEQ", "speech to text"), ("SEQ_TO_SEQ_CAUSAL_LM", "text to text"),
    ("CAUSAL_LM", "causal language models"), ("CTC", "audio encoders"),
    ("IMAGE", "vision encoders"), ("TEXT_ENCODING", "text encoders"), ("", ""),
)  # fmt: skip
# Not models of transformers themselves.
LEFT_OUT = {"timm_backbone", "timm_wrapper"}


@dataclass
class Row:
    """What became of one model type."""

    source: str
    name: str
    cls: str
    kind: str
    verdict: str
    """served, partly, dense, none, refused, late, wrong, crash or not tried."""
    words: str = ""
    modalities: str = ""
    """Of the inputs that it was run on."""
    sparse: int = 0
    """Layers that ran sparse, dense and as before."""
    dense: int = 0
    refused: int = 0


class Fault(Exception):
    """A verdict that ends a trial: its name and what to say."""


def try_model(model: Any, run: Callable[[Any], list[Tensor]], row: Row, text: bool = False) -> None:
    """Hold a model to all that the page says, and write what it is into its row.

    Args:
        run: a forward on the same inputs each time.
        text: whether it is a causal language model, to try with padding and a cache, too.
    """
    stock = run(model)
    if not all(bool(x.isfinite().all()) for x in stock):
        raise Fault("not tried", "its outputs with random weights are not finite")
    if not _same(stock, run(model)):
        raise Fault("not tried", "it does not repeat its own outputs")
    refusal = ""
    try:
        mms.sparsify(model, WHOLE)
    except ValueError as error:
        refusal = _shorten(str(error))
    if "must have attention layers" in refusal:
        row.verdict = "none"
        return
    if refusal:
        mms.sparsify(model, WHOLE, strict=False)
    early = {r.name: r.mode for r in mms.report(model).rows}
    out = _sparse(model, run)
    rows = mms.report(model).rows
    # A tower that the inputs do not reach has no calls.
    modes = [r.mode for r in rows if r.mode == "refused" or r.queries is not None]
    row.sparse, row.dense = modes.count("sparse"), modes.count("dense")
    row.refused = modes.count("refused")
    late = [r for r in rows if r.mode == "refused" and early[r.name] != "refused"]
    if late:
        raise Fault("late", f"{late[0].name} ({late[0].cls}): {late[0].reason}")
    note = ""
    try:
        _hold(stock, out, "at ratio 1", CLOSE)
    except Fault:
        # Two implementations of transformers may differ by themselves: eager is the definition.
        mms.densify(model)
        other = _eager(model, run)
        if other is None or _close(stock, other):
            raise
        _hold(other, out, "at ratio 1, beside eager attention", CLOSE)
        note = "equals eager attention, from which sdpa of transformers differs here"
        mms.sparsify(model, WHOLE, strict=not refusal)
    if not refusal and not row.sparse and "sparse" in early.values():
        raise Fault("not tried", "its inputs reach none of the layers that can be served")
    row.verdict = "refused" if refusal else "served" if row.sparse else "dense"
    if refusal and "sparse" in early.values():
        row.verdict = "partly"
    row.words = refusal or note
    if text and row.sparse:
        _try_text(model, row)
    names = tuple(early)
    mms.sparsify(model, FEW, strict=False)
    if row.sparse and _same(stock, _sparse(model, run)):
        raise Fault("not tried", "its outputs do not depend on what its layers attend to")
    for config, what in (
        (mms.SparseConfig(), "below dense_below"),
        (mms.SparseConfig(ratio=0.1, dense_below=0, dense_layers=names), "in dense_layers"),
    ):
        mms.sparsify(model, config, strict=False)
        _hold(stock, _sparse(model, run), what)
    mms.densify(model)
    _hold(stock, run(model), "after densify")


def _try_text(model: Any, row: Row) -> None:
    """Padding on the left, and eight tokens with a cache; sparsified as it comes and goes."""
    ids = tiny_configs.random_ids(model, 40)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0

    def padded(model: Any) -> list[Tensor]:
        with torch.no_grad():
            out = model(input_ids=ids.masked_fill(mask == 0, 0), attention_mask=mask)
        return [next(x for x in _tensors(out) if x.shape[:2] == ids.shape)[mask.bool()]]

    def greedy(model: Any) -> list[Tensor]:
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        return [model.generate(ids, attention_mask=torch.ones_like(ids), **options)]

    for what, run in (("with left padding", padded), ("8 greedy tokens", greedy)):
        mms.densify(model)
        try:
            stock = run(model)
        except Exception:
            row.words = "; ".join(filter(None, (row.words, f"{what}: stock fails")))
            continue
        mms.sparsify(model, WHOLE, strict=False)
        out = _sparse(model, run)
        late = [r for r in mms.report(model).rows if r.mode == "refused"]
        if len(late) > row.refused:
            raise Fault("late", f"{what}: {late[-1].name} ({late[-1].cls}): {late[-1].reason}")
        _hold(stock, out, what, CLOSE)


def _sparse(model: Any, run: Callable[[Any], list[Tensor]]) -> list[Tensor]:
    try:
        return run(model)
    except ValueError as error:
        late = "cannot run sparse" in str(error)
        raise Fault("late" if late else "crash", _first_line(error)) from error
    except Exception as error:
        raise Fault("crash", _first_line(error)) from error


def _hold(stock: list[Tensor], out: list[Tensor], what: str, close: float = 0.0) -> None:
    if len(stock) != len(out) or any(a.shape != b.shape for a, b in zip(stock, out, strict=False)):
        raise Fault("wrong", f"{what}: outputs of other shapes")
    if _same(stock, out):
        return
    worst = max(float((a.double() - b.double()).abs().max()) for a, b in zip(stock, out,
                strict=True) if a.numel())  # fmt: skip
    if not worst <= close:
        raise Fault("wrong", f"{what}: differs by {worst:.1e}")


def _eager(model: Any, run: Callable[[Any], list[Tensor]]) -> list[Tensor] | None:
    """Outputs with eager attention; None of a model that has no other implementation."""
    if not hasattr(model, "set_attn_implementation"):
        return None
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")
        return run(model)
    finally:
        model.set_attn_implementation(before)


def _close(one: list[Tensor], other: list[Tensor]) -> bool:
    try:
        _hold(one, other, "", CLOSE)
    except Fault:
        return False
    return True


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def forward(inputs: dict[str, Any]) -> Callable[[Any], list[Tensor]]:
    """Runs a model on inputs: every tensor of its output that is not a cache."""

    def run(model: Any) -> list[Tensor]:
        torch.manual_seed(0)
        with torch.no_grad():
            return [x.clone() for x in _tensors(model(**inputs))]

    return run


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for name, part in value.items():
            # Attention maps come only from layers that are left as they were.
            if not re.search("past|cache|attentions", name):
                yield from _tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


def _shorten(message: str) -> str:
    """The refusal without what every refusal says."""
    return re.sub(r"; \d+ of \d+ layers of .*", "", message).replace(" cannot run sparse", "")


def _first_line(error: BaseException) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{type(error).__name__}: {text}"[:160]


# Which models there are.


def model_types() -> dict[str, tuple[str, str]]:
    """Model types of the installed transformers: name of the class and kind, empty if unknown."""
    from transformers.models.auto import modeling_auto

    found: dict[str, tuple[str, str]] = {}
    for mapping, kind in MAPPINGS:
        name = f"MODEL_FOR_{mapping}_MAPPING_NAMES" if mapping else "MODEL_MAPPING_NAMES"
        for model_type, cls in getattr(modeling_auto, name, {}).items():
            cls = cls if isinstance(cls, str) else cls[0]
            if model_type not in LEFT_OUT:
                found.setdefault(model_type, (cls, kind))
    return found


def _kind_of(cls: Any) -> str:
    kinds: Any = getattr(cls, "input_modalities", "text")
    kinds = {kinds} if isinstance(kinds, str) else set(kinds)
    if "text" in kinds:
        pictures, sound = bool(kinds & {"image", "video"}), "audio" in kinds
        if pictures and sound:
            return "omni"
        return "images and text" if pictures else "audio and text" if sound else "other text"
    if kinds & {"image", "video"}:
        return "vision encoders"
    return "audio encoders" if "audio" in kinds else "other"


def try_type(model_type: str) -> Row:
    """One model type of transformers, in this process."""
    name, kind = model_types()[model_type]
    row = Row("transformers", model_type, name, kind or "other", "not tried")
    try:
        cls = tiny_configs.class_of(name, model_type)
        row.kind = kind or _kind_of(cls)
        model = tiny_configs.build(cls, tiny_configs.config_of(model_type))
        row.modalities, inputs = tiny_configs.settled(model)
    except Exception as error:
        row.words = _first_line(error)
        return row
    return _judge(row, model, forward(inputs), kind == "causal language models")


def _judge(row: Row, model: Any, run: Callable[[Any], list[Tensor]], text: bool = False) -> Row:
    try:
        try_model(model, run, row, text)
    except Fault as fault:
        row.verdict, row.words = fault.args
    except Exception as error:
        row.verdict, row.words = "crash", _first_line(error)
    return row


TIMM = (
    "vit_tiny_patch16_224", "deit3_small_patch16_224", "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3", "vit_base_patch16_siglip_224",
    "vit_base_patch16_clip_224", "vit_so150m_patch16_reg4_gap_256", "vit_base_patch16_xp_224",
    "vit_small_patch16_rope_mixed_224", "vit_pe_core_tiny_patch16_384", "eva02_tiny_patch14_224",
    "deit_tiny_distilled_patch16_224", "naflexvit_base_patch16_gap", "beit_base_patch16_224",
    "beitv2_base_patch16_224", "cait_xxs24_224", "xcit_nano_12_p16_224", "volo_d1_224",
    "convit_tiny", "crossvit_tiny_240", "pit_ti_224", "tnt_s_patch16_224",
    "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "twins_svt_small", "pvt_v2_b0",
    "mvitv2_tiny", "maxvit_nano_rw_256", "coatnet_nano_rw_224", "coat_tiny", "davit_tiny",
    "levit_128s", "edgenext_xx_small", "mobilevit_xxs", "mobilevitv2_050", "efficientvit_b0",
    "efficientformerv2_s0", "fastvit_sa12", "hiera_tiny_224", "visformer_tiny", "nextvit_small",
    "mobilenetv4_hybrid_medium", "samvit_base_patch16", "flexivit_small",
    "vit_relpos_small_patch16_224", "sequencer2d_s", "convnext_atto", "resnet18", "mixer_s32_224",
)  # fmt: skip


def try_tower(source: str, name: str) -> Row:
    """One model of timm, open_clip or torchaudio, in this process."""
    row = Row(source, name, "", source, "not tried")
    try:
        if source == "timm":
            model, run = _timm(name)
            row.modalities = "images"
        else:
            from tests.support import tower_models

            case = tower_models.build(name)
            model, run = case.model, _quiet(case.run)
            row.modalities = "images, text" if source == "open_clip" else "audio"
        row.cls = type(model).__name__
    except Exception as error:
        row.words = _first_line(error)
        return row
    return _judge(row, model, run)


def _timm(name: str) -> tuple[Any, Callable[[Any], list[Tensor]]]:
    import timm

    tries: list[dict[str, Any]] = [
        {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
        {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2},
        {"img_size": 224}, {"img_size": 256}, {},
    ]  # fmt: skip
    problem: Exception | None = None
    for kwargs in tries:
        try:
            torch.manual_seed(0)
            model: Any = timm.create_model(name, num_classes=5, **kwargs).eval()
            from tests.support.tower_models import Case, strong

            side = kwargs.get("img_size") or model.default_cfg["input_size"][-1]
            pixels = tiny_configs.random(1, 3, side, side)
            case = Case(model, lambda m, x=pixels: [m(x)])
            case.run(model)
            if kwargs.get("embed_dim"):
                strong(case)
            return model, _quiet(case.run)
        except Exception as error:
            problem = error
    assert problem is not None
    raise problem


def _quiet(run: Callable[[Any], list[Tensor]]) -> Callable[[Any], list[Tensor]]:
    def quiet(model: Any) -> list[Tensor]:
        with torch.no_grad():
            return [x.clone() for x in run(model)]

    return quiet


def tower_names() -> list[tuple[str, str]]:
    """Source and name of what is tried of timm, open_clip and torchaudio."""
    from tests.support.tower_models import TOWERS

    named = [("open_clip" if name.startswith("clip") else "torchaudio", name) for name in TOWERS
             if name.startswith(("clip", "wav2vec2", "hubert", "conformer"))]  # fmt: skip
    return [("timm", name) for name in TIMM] + named


# A process for each.


def _work(connection: Any, source: str, name: str) -> None:
    warnings.simplefilter("ignore")
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    torch.set_num_threads(1)
    row = try_type(name) if source == "transformers" else try_tower(source, name)
    connection.send(asdict(row))


def try_apart(source: str, name: str, seconds: float = SECONDS) -> Row:
    """The same in a process of its own, which may crash or hang."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.tools.families", "transformers.modeling_utils"])
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(there, source, name), daemon=True)
    process.start()
    there.close()
    problem = f"no answer in {seconds:.0f} s"
    try:
        if here.poll(seconds):
            return Row(**here.recv())
    except EOFError:
        process.join(5)
        problem = f"the process ended with {process.exitcode}"
    finally:
        process.kill()
        process.join()
    cls, kind = model_types()[name] if source == "transformers" else ("", source)
    return Row(source, name, cls, kind or "other", "not tried", problem)


def try_all(names: list[tuple[str, str]]) -> list[Row]:
    """Rows in the order of the names, printed as they come unless they are served."""
    start = time.monotonic()

    def one(name: tuple[str, str]) -> Row:
        row = try_apart(*name)
        seconds = time.monotonic() - start
        print(f"{seconds:5.0f} s  {row.name:32} {row.verdict:10} {row.words[:140]}",
              flush=True)  # fmt: skip
        return row

    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(one, names))


# The page.

VERDICTS = {
    "served": "served", "partly": "partly served", "dense": "dense", "refused": "refused",
    "none": "no attention", "late": "refused late", "wrong": "wrong", "crash": "crash",
    "not tried": "not tried",
}  # fmt: skip
KINDS = (
    "causal language models", "images and text", "omni", "audio and text", "text to text",
    "text encoders", "speech to text", "vision encoders", "audio encoders", "other text", "other",
    "timm", "open_clip", "torchaudio",
)  # fmt: skip
INTRODUCTION = """\
# Supported models

`mms.sparsify(model, config)` finds the attention layers by itself. `mms.report(model)` lists each \
layer and its mode: sparse, dense or refused, with a reason.

The tables below are written by a program, which builds a tiny random model of every model type \
(`python -m tests.tools.families`; its results are in \
[families-cpu.json](../results/data/families-cpu.json)). {counts}

| result | meaning |
| --- | --- |
| served | `sparsify` takes it; at ratio 1.0 outputs equal the model's own up to 1e-4, below \
`dense_below`, in `dense_layers` and after `densify` bit for bit |
| partly served | some layers are refused: `strict=False` serves the others and leaves these as \
they are |
| refused | `sparsify` raises, and says why; with `strict=False` the model runs as before, bit for \
bit |
| dense | all its attention is of kinds that run dense: cross-attention, pooling |
| no attention | `sparsify` raises: nothing to serve |
| not tried | the program could not make a tiny model of it, or inputs; the words are the error's. \
It may well be served: `sparsify` says |

Causal language models are held to the same with padding on the left and with 8 greedy tokens from \
a KV cache. Models that select keys by themselves (natively sparse attention) are refused by name.

Versions: {versions}. Other versions of these libraries may differ; `sparsify` reads the classes \
that are installed.
"""
NOTES = """\
## Own classes

`mms.sparsify(model, config, modules=[MyAttention])`, or a \
[tower adapter](../how-to/add-a-tower.md).

## Notes

| source | input |
| --- | --- |
| transformers, image tokens of a language model | found by the ids in the model's config |
| transformers, vision encoders | patch order where the image size is known |
| timm | images of any multiple of the patch where `dynamic_img_size` exists |
| open_clip | the size that the model was built for (`image_size=`) |
| torchaudio | waveforms of any length; features for the Conformer |

## Not supported, with an error before the first call

| what | where it occurs |
| --- | --- |
| position bias on the logits | T5, BEiT, MaxViT, WavLM, wav2vec2-conformer, wav2vec2-bert |
| attention that is not torch's fused one | Swin, Emformer, `fused_attn=False` |
| attention over channels | XCiT |
| keys of `add_zero_attn` or `add_bias_kv` | `nn.MultiheadAttention` |
| soft-capped logits, learned sinks, head masks | some transformers models |
| a selection of keys of the model's own | natively sparse models |
| own tokens and another sequence at once | T5Gemma 2 |
| windows as a fifth dimension | Twins, Hiera |

## Not supported, with an error at the call

- masks that are not one range of keys per query, or that are biases
- dropout on attention weights while training
- `need_weights=True` (`nn.MultiheadAttention`)
- windows as a fifth dimension, of other classes
- values wider than keys (differential attention)

With `strict=False` such layers run as before, and `report` lists them.

## Runs dense

| what | why |
| --- | --- |
| layers with fewer visible tokens than `dense_below` | dense is faster; layers that \
never have more are [not wrapped](../how-to/choose-settings.md#layers-that-are-left-as-they-were) |
| layers in `dense_layers` | the config says so |
| attention with other keys than queries: pooling, cross-attention, reduced keys | nothing to \
select |

## Hardware

| hardware | implementation |
| --- | --- |
| H100, H200; 16-bit; head dimension 64 or 128; tiles of 128 | Hopper kernels |
| other CUDA GPUs, precisions, tiles | Triton kernels |
| CPU | gathered PyTorch |
| other devices | `backend="torch"`, or dense |

Python 3.10 or later; torch 2.11 or later (below 2.15); transformers 5.0, timm 1.0.20, open_clip \
3.0 or later.
"""


def page(record: dict[str, Any]) -> str:
    """The page on supported models, from the JSON of a run."""
    rows = [Row(**row) for row in record["rows"]]
    counted = {v: sum(row.verdict == v for row in rows) for v in VERDICTS}
    counts = ", ".join(f"{n} {VERDICTS[v]}" for v, n in counted.items() if n)
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    parts = [INTRODUCTION.format(counts=f"Of {len(rows)}: {counts}.", versions=versions)]
    for kind in KINDS:
        own = [row for row in rows if row.kind == kind]
        if own:
            title = kind if kind in ("timm", "open_clip", "torchaudio") else kind.capitalize()
            lines = [f"## {title}", "", "| model | class | result | inputs | words |",
                     "| --- | --- | --- | --- | --- |", *map(_line, own)]  # fmt: skip
            parts.append("\n".join(lines) + "\n")
    return "\n".join([*parts, NOTES])


def _line(row: Row) -> str:
    words = re.sub(r"([|<>*_\\\[\]])", r"\\\1", row.words)
    cls = f"`{row.cls}`" if row.cls else ""
    return f"| `{row.name}` | {cls} | {VERDICTS[row.verdict]} | {row.modalities} | {words} |"


def _record(rows: list[Row]) -> dict[str, Any]:
    names = ("torch", "transformers", "timm", "open_clip_torch", "torchaudio")
    return {"versions": {n: version(n) for n in names}, "rows": [asdict(row) for row in rows]}


def main(arguments: list[str]) -> None:
    """The program; see the top of the file."""
    if arguments == ["--page"]:
        PAGE.write_text(page(json.loads(DATA.read_text())))
        return
    known = [("transformers", name) for name in sorted(model_types())] + tower_names()
    update = "--update" in arguments
    rows = try_all([n for n in known if not arguments or n[1] in arguments])
    if update:
        new = {(row.source, row.name): row for row in rows}
        old = [Row(**row) for row in json.loads(DATA.read_text())["rows"]]
        rows = [new.get((row.source, row.name), row) for row in old]
    if update or not arguments:
        DATA.write_text(json.dumps(_record(rows), indent=1) + "\n")


if __name__ == "__main__":
    # For the processes that try one model each.
    os.environ.update(
        OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore", HF_HUB_OFFLINE="1", PYTHONPATH=str(ROOT)
    )  # fmt: skip
    main(sys.argv[1:])

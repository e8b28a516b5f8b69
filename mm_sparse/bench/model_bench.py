"""Whole models: time to the first token and of a training step, dense and sparse, in one run.

Dense forms are the ones that a user has: the model as it is with SDPA (`stock`), the same with one
call of `varlen_attn` for all images of a tower (`varlen`), and `flash` where torch is told to use
FlashAttention-2. Scoring and selection are inside the time of sparse forms. Any form can have its
blocks compiled one by one ("varlen+compile", "sparse-64-0.2+compile"), and in decoding a static
cache in one CUDA graph ("stock+graph", "sparse-64-0.2+graph"; with "+compile+graph" its kernels are
fused by torch.compile). Beside them `ideal` is the least
that a dense step takes: SDPA reads the keys of a static cache once, without repeating them and
without a mask; transformers has no such step. In a whole answer "+graph" is `generate` with
`cache_implementation="static"`, which compiles its steps in the first call. In training the scorers
of a sparse form can learn in the same step ("sparse-64-0.2+scorers").
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config

from mm_sparse.bench.model_shapes import ModelShape
from mm_sparse.bench.results import reason
from mm_sparse.config import SparseConfig
from mm_sparse.cuda_graph import capture
from mm_sparse.distillation import distillation_losses
from mm_sparse.integrations import densify, is_sparsified, scorer_parameters, sparsify

VARLEN, IDEAL = "varlen_flash", "ideal_dense"
DENSE_FORMS = ("stock", "varlen", "flash", "ideal")
WORKS = ("prefill", "train", "decode", "answer")
# Steps of decoding that are timed.
STEPS = 24
# Tokens of an answer.
ANSWER = 128


@dataclass(frozen=True)
class ModelTiming:
    """One form of a model with one input."""

    model: str
    work: str
    """Of `WORKS`."""
    parts: int
    """Images, clips or tokens of the input."""
    tokens: int
    """Of the language model."""
    form: str
    seconds: float | None
    """Median; None where it did not run."""
    tower_seconds: float | None = None
    peak_gib: float | None = None
    note: str = ""
    batch: int = 1
    """Rows of an input of text."""


def run_models(
    shape: ModelShape,
    parts: Sequence[int],
    forms: Sequence[str],
    *,
    work: str = "prefill",
    batch: int = 1,
    small: bool = False,
    device: str = "cuda",
    repeats: int = 3,
    show: Callable[[ModelTiming], None] | None = None,
) -> list[ModelTiming]:
    """Time forms of one model.

    Args:
        shape: which model.
        parts: how many images, clips or tokens.
        forms: of `DENSE_FORMS`, or "sparse" with unit and ratio, as in "sparse-64-0.2"; behind
            each "+compile", in decoding "+graph", in training "+scorers".
        work: "prefill" (time to the first token), "train" (a LoRA step with gradient
            checkpointing), "decode" (seconds of a token behind so many parts) or "answer"
            (`generate`: the prompt and 128 tokens).
        batch: rows of an input of text.
        small: a model that two CPU cores can run.
        repeats: runs behind the first, of which the median counts.
        show: is given each result as it comes.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = shape.build(small).eval()
    finally:
        torch.set_default_dtype(before)
    if work not in WORKS:
        raise ValueError(f"work must be one of {WORKS}, got {work!r}")
    step: Callable[[nn.Module, dict[str, Any]], Any] = _answer if work == "answer" else _prefill
    if work == "train":
        step = _train_step(model)
    results: list[ModelTiming] = []
    for count in parts:
        inputs = shape.inputs(model, count)
        if batch > 1 and set(inputs) != {"input_ids"}:
            raise ValueError(f"batch must be 1 where inputs are not text alone, got {batch}")
        inputs["input_ids"] = inputs["input_ids"].repeat(batch, 1)
        tokens = inputs["input_ids"].shape[1]
        for form in forms:
            try:
                if work == "decode":
                    found = _measure_decoding(model, inputs, form, device)
                else:
                    run, used = step, form
                    if work == "answer" and form.endswith("+graph"):
                        used = form.removesuffix("+graph")
                        run = partial(step, cache_implementation="static")
                    found = _measure(model, shape, inputs, used, run, repeats, device)
            except (torch.OutOfMemoryError, ValueError, RuntimeError) as error:
                found = {"seconds": None, "note": reason(error)[:120]}
            result = ModelTiming(shape.name, work, count, tokens, form, batch=batch, **found)
            results.append(result)
            if show is not None:
                show(result)
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
    return results


def _measure(
    model: nn.Module, shape: ModelShape, inputs: dict[str, Any], form: str,
    step: Callable[[nn.Module, dict[str, Any]], Any], repeats: int, device: str,
) -> dict[str, Any]:  # fmt: skip
    cuda = device == "cuda"
    with _in_form(model, form), _tower_clock(model, shape.tower, cuda) as tower:
        times: list[tuple[float, float]] = []
        for run in range(repeats + 1):
            if cuda and run == 1:
                torch.cuda.reset_peak_memory_stats()
            tower[0] = 0.0
            _wait(cuda)
            start = time.perf_counter()
            step(model, inputs)
            _wait(cuda)
            if run:
                times.append((time.perf_counter() - start, tower[0]))
    times.sort()
    seconds, within = times[len(times) // 2]
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    return {
        "seconds": round(seconds, 4),
        "tower_seconds": round(within, 4) if shape.tower else None,
        "peak_gib": None if peak is None else round(peak, 2),
    }


def _measure_decoding(model: Any, inputs: dict[str, Any], form: str, device: str) -> dict[str, Any]:
    """Seconds of a token, after a prefill in the same form."""
    cuda, (form, _, graph) = device == "cuda", form.partition("+")
    tokens = inputs["input_ids"].shape[1]
    one = inputs["input_ids"][:, -1:].clone()
    with _in_form(model, form), torch.no_grad():
        # Of the first steps; the others have a few keys more.
        _IDEAL_KEYS[0] = tokens + 1
        if not graph:
            cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values

            def run() -> None:
                model(one, past_key_values=cache)
        else:
            run = _step_in_graph(model, inputs, tokens, one, graph)
        for _ in range(3):
            run()
        _wait(cuda)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        for _ in range(STEPS):
            run()
        _wait(cuda)
        seconds = (time.perf_counter() - start) / STEPS
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    return {
        "seconds": round(seconds, 6),
        "peak_gib": None if peak is None else round(peak, 2),
    }


def _step_in_graph(
    model: Any, inputs: dict[str, Any], tokens: int, one: Tensor, how: str
) -> Callable[[], Any]:
    """A step on a static cache as one CUDA graph."""
    from transformers import StaticCache

    if how not in ("graph", "compile+graph"):
        raise ValueError(
            f'a form of decoding must end with "+graph", "+compile+graph" or nothing, got "+{how}"'
        )
    cache = StaticCache(config=model.config, max_cache_len=tokens + 2 * STEPS)
    model(**inputs, past_key_values=cache, logits_to_keep=1)
    torch.compiler.reset()
    backend = "inductor" if how.startswith("compile") else "eager"
    step = torch.compile(model, backend=backend, fullgraph=True)
    return capture(lambda: step(one, past_key_values=cache))


@contextmanager
def _in_form(model: Any, form: str) -> Iterator[None]:
    """The model attends in one of the forms, around a block."""
    form, _, more = form.partition("+")
    if more == "compile":
        with _in_form(model, form), _compiled_blocks(model):
            yield
        return
    if more not in ("", "scorers") or (more and not form.startswith("sparse")):
        raise ValueError(
            f'form must end with "+compile", a sparse one with "+scorers", got {form}+{more}'
        )
    if form.startswith("sparse"):
        _, unit, ratio = form.split("-")
        scorer = "fine" if more else None
        sparsify(model, SparseConfig(ratio=float(ratio), unit=int(unit)), scorer=scorer)
        try:
            yield
        finally:
            densify(model)
        return
    if form not in DENSE_FORMS:
        raise ValueError(f'form must be one of {DENSE_FORMS} or as "sparse-64-0.2", got {form!r}')
    if form == "varlen":
        _register_varlen()
        parts = getattr(model.config, "sub_configs", {})
        towers = [name for name in parts if "vision" in name or "audio" in name]
        model.set_attn_implementation({"": "sdpa", **dict.fromkeys(towers, VARLEN)})
    if form == "ideal":
        _register_ideal()
        model.set_attn_implementation(IDEAL)
    try:
        if form == "flash":
            from torch.nn.attention import SDPBackend, sdpa_kernel

            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                yield
        else:
            yield
    finally:
        model.set_attn_implementation("sdpa")


@contextmanager
def _compiled_blocks(model: Any) -> Iterator[None]:
    names = set(model._no_split_modules or ())
    blocks = [m for m in model.modules() if type(m).__name__ in names]
    for block in blocks:
        block.compile()
    # The number of a layer is a constant of its graph where there is a cache.
    limit = torch._dynamo.config.patch(recompile_limit=max(8, 4 * len(blocks)))
    # A cached trace does not tell FlashAttention-2 from cuDNN.
    fresh = functorch_config.patch(enable_autograd_cache=False)
    try:
        with limit, fresh:
            yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None
        torch.compiler.reset()


def _register_varlen() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
        cu_seq_lens_q: Any = None, max_length_q: Any = None, scaling: float | None = None,
        **options: Any,
    ) -> Any:  # fmt: skip
        if cu_seq_lens_q is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, scaling=scaling, **options
            )
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        bounds, longest = cu_seq_lens_q.to(torch.int32), int(max_length_q)
        out: Any = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scaling)
        return out[None], None

    AttentionInterface.register(VARLEN, attend)
    AttentionMaskInterface.register(VARLEN, sdpa_mask)


_IDEAL_KEYS = [0]


def _register_ideal() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
        scaling: float | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        prefill = query.shape[2] > 1
        keys = query.shape[2] if prefill else _IDEAL_KEYS[0]
        out = nn.functional.scaled_dot_product_attention(
            query, key[:, :, :keys], value[:, :, :keys], is_causal=prefill, scale=scaling,
            enable_gqa=True,
        )  # fmt: skip
        return out.transpose(1, 2).contiguous(), None

    def no_mask(**arguments: Any) -> None:
        return None

    AttentionInterface.register(IDEAL, attend)
    AttentionMaskInterface.register(IDEAL, no_mask)


@contextmanager
def _tower_clock(model: nn.Module, name: str, cuda: bool) -> Iterator[list[float]]:
    """Seconds that the forward of a submodule takes, in a list of one; waits for the device."""
    spent = [0.0]
    if not name:
        yield spent
        return
    started: list[float] = []

    def before(*_: Any) -> None:
        _wait(cuda)
        started.append(time.perf_counter())

    def after(*_: Any) -> None:
        _wait(cuda)
        spent[0] += time.perf_counter() - started.pop()

    tower = model.get_submodule(name)
    handles = [tower.register_forward_pre_hook(before), tower.register_forward_hook(after)]
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()


def _wait(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


@torch.inference_mode()
def _prefill(model: nn.Module, inputs: dict[str, Any]) -> None:
    model(**inputs, use_cache=True, logits_to_keep=1)


@torch.inference_mode()
def _answer(model: Any, inputs: dict[str, Any], **options: Any) -> None:
    new = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER}
    model.generate(**inputs, **new, do_sample=False, **options)


def _train_step(model: Any) -> Callable[[nn.Module, dict[str, Any]], None]:
    """A LoRA step of all linear layers of the language model, the base frozen."""
    from peft import LoraConfig, inject_adapter_in_model

    lora = LoraConfig(r=16, target_modules=r".*language_model.*(q|k|v|o|gate|up|down)_proj|"
                      r"model\.layers.*(q|k|v|o|gate|up|down)_proj")  # fmt: skip
    model.requires_grad_(False)
    inject_adapter_in_model(lora, model)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    # Else transformers differentiates a frozen tower, too.
    model.disable_input_require_grads()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizers = {0: torch.optim.AdamW(trained, lr=1e-5)}

    def step(model: nn.Module, inputs: dict[str, Any]) -> None:
        ids = inputs["input_ids"]
        learn = list(scorer_parameters(model)) if is_sparsified(model) else []
        if learn and id(learn[0]) not in optimizers:
            optimizers[id(learn[0])] = torch.optim.AdamW(learn, lr=1e-4)
        # Answers are a small part of a row: the loss is over the last tokens alone.
        with distillation_losses(model) if learn else nullcontext() as losses:
            out = model(**inputs, use_cache=False, logits_to_keep=256)
        loss = nn.functional.cross_entropy(out.logits[0, :-1].float(), ids[0, -255:])
        if losses is not None:
            loss = loss + 0.1 * losses.mean()
        loss.backward()
        for number in (0, *(id(p) for p in learn[:1])):
            optimizers[number].step()
            optimizers[number].zero_grad()

    return step


def model_table(results: Sequence[ModelTiming]) -> str:
    """A table for people: seconds, and how many times as fast as each dense form."""
    lines = [
        "model            work     parts  tokens   form             seconds  tower    GiB  over"
    ]
    for r in results:
        over = " ".join(
            f"{x.form} {x.seconds / r.seconds:.2f}x" for x in results
            if _is_dense_form_beside(x, r) and x.seconds and r.seconds
        )  # fmt: skip
        took = f"{r.seconds:8.4f}" if r.seconds else "       -"
        tower = f"{r.tower_seconds:6.3f}" if r.tower_seconds else "     -"
        peak = f"{r.peak_gib:6.1f}" if r.peak_gib else "     -"
        lines.append(
            f"{r.model:16} {r.work:8} {r.parts:<6} {r.tokens:<8} {r.form:16} {took} {tower} {peak}"
            f"  {over}{r.note}"
        )
    return "\n".join(lines)


def _is_dense_form_beside(one: ModelTiming, other: ModelTiming) -> bool:
    """Whether the first is a dense form, and another one, of what the second timed."""
    names = ("model", "work", "parts", "batch")
    same = all(getattr(one, name) == getattr(other, name) for name in names)
    return same and one.form != other.form and one.form.split("+")[0] in DENSE_FORMS


def as_records(results: Sequence[ModelTiming]) -> list[dict[str, Any]]:
    """For a JSON file."""
    return [asdict(r) for r in results]

"""What sparse attention would save a model with an input of so many tokens, on this machine.

A few layers of the model with random weights run, dense and sparse; what the other layers take
follows from how many there are of each kind. Lengths that do not fit into memory follow from those
that do: a layer's time is a + b N + c N^2 of N tokens. Results that were computed so are marked.
"""

from __future__ import annotations

import copy
import gc
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mm_sparse.bench.results import reason
from mm_sparse.config import SparseConfig
from mm_sparse.integrations import densify, override_attention, sparsify

WORKS = ("prefill", "decode", "train")
FORMS = ("dense", "sparse")
# Shares of the length at which layers run; the longest that fit give the others.
LENGTHS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
SHORTEST = 512
# Steps of decoding that are timed as one.
STEPS = 16
TOWERS = ("model.visual", "visual", "model.vision_tower", "vision_tower", "model.vision_model",
          "vision_model", "model.audio_tower", "audio_tower", "thinker.visual")  # fmt: skip


@dataclass
class Estimate:
    """Times and memory of one model with inputs of one length."""

    model: str
    tokens: int
    images: int
    gpu: str
    layers: int
    parameters: int
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    """By work, then by form: of the whole; decoding is of one token."""
    computed: dict[str, bool] = field(default_factory=dict)
    """By work: whether lengths or layers did not fit and were computed from those that did."""
    attention_share: float = 0.0
    """Of a dense prefill's language model."""
    tower_seconds: dict[str, float] = field(default_factory=dict)
    weights_gib: float = 0.0
    cache_gib: float = 0.0
    peak_gib: dict[str, float] = field(default_factory=dict)
    """By work: weights, cache and what the widest layer needs beside; 0 on a CPU."""
    pays_from: int | None = None
    """Tokens from which a sparse prefill was the faster one, of the lengths that ran."""
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)


def estimate_model(
    config: Any,
    tokens: int,
    *,
    images: int = 0,
    sparse: SparseConfig | None = None,
    works: Sequence[str] = WORKS,
    device: str | None = None,
    name: str = "",
) -> Estimate:
    """Measure a few layers of a model and say what the whole would take.

    Args:
        config: of a transformers model that has a language model.
        tokens: of the language model, those of images and sound among them.
        images: that the tower reads: images, or clips of an audio tower.
        sparse: what a sparse model keeps; `SparseConfig()` if None.
        works: of "prefill", "decode" (one token) and "train" (LoRA, gradient checkpointing).
        device: "cuda" if there is one, else "cpu".
    Raises:
        ValueError: the config is not that of a language model, or an argument is out of range.

    Example:
        >>> config = transformers.AutoConfig.from_pretrained("path/to/a/model")
        >>> print(estimate_table(estimate_model(config, 131072, images=32)))
    """
    if tokens < 1 or images < 0:
        raise ValueError(f"tokens must be from 1 and images from 0, got {tokens} and {images}")
    unknown = [work for work in works if work not in WORKS]
    if unknown:
        raise ValueError(f"works must be of {WORKS}, got {unknown[0]!r}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    sparse = SparseConfig() if sparse is None else sparse
    text = config.get_text_config()
    if not getattr(text, "num_hidden_layers", 0):
        raise ValueError(f"config must have num_hidden_layers, got {type(config).__name__}")
    gpu = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    found = Estimate(
        name or config.model_type, tokens, images, gpu, text.num_hidden_layers, _parameters(config)
    )
    short, counts = _with_few_layers(config)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = _build(short, dtype, device)
    size = torch.empty((), dtype=dtype).element_size()
    found.weights_gib = found.parameters * size / 2**30
    runs = _Runs(model, text, sparse, device, counts)
    with warnings.catch_warnings():
        for work in works:
            _time_work(found, runs, work, tokens)
        if images:
            _time_tower(found, model, images, sparse, runs)
    found.cache_gib = runs.cache_bytes * tokens * size / 2**30
    if device == "cuda":
        for work, extra in runs.extra.items():
            cache = 0.0 if work == "train" else found.cache_gib
            found.peak_gib[work] = found.weights_gib + cache + extra
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        if max(found.peak_gib.values(), default=0) > total:
            found.notes.append(f"does not fit into the {total:.0f} GiB of this GPU: computed")
            found.computed = dict.fromkeys(found.computed, True)
    return found


def _parameters(config: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in _class_of(config)(config).parameters())


def _class_of(config: Any) -> Any:
    import transformers

    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    from transformers.models.auto import modeling_auto as auto

    for mapping in ("MODEL_FOR_MULTIMODAL_LM_MAPPING", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
                    "MODEL_FOR_CAUSAL_LM_MAPPING"):  # fmt: skip
        classes = getattr(auto, mapping, {})
        if type(config) in classes:
            found = classes[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise ValueError(f"config must be of a language model, got {type(config).__name__}")


def _with_few_layers(config: Any) -> tuple[Any, Counter[str]]:
    """The config of a model with layers of every kind and no more; how many of each there are."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    layers = text.num_hidden_layers
    kinds = list(getattr(text, "layer_types", None) or ["attention"] * layers)
    few = max(2, 1 + max(kinds.index(kind) for kind in set(kinds)))
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == layers:
            setattr(text, name, value[:few])
    text.num_hidden_layers = min(few, layers)
    return config, Counter(kinds)


def _build(config: Any, dtype: torch.dtype, device: str) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return _class_of(config)(config).eval()
    finally:
        torch.set_default_dtype(before)


class _Runs:
    """Times layers of each kind, of one model."""

    def __init__(
        self, model: Any, text: Any, sparse: SparseConfig, device: str, counts: Counter[str]
    ) -> None:
        self.model, self.sparse, self.device, self.counts = model, sparse, device, counts
        self.base: Any = model.get_decoder()
        self.layers: nn.ModuleList = self.base.layers
        self.width: int = text.hidden_size
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.cache_bytes = 2 * heads * dim * text.num_hidden_layers
        own = self.base.config
        self.kinds = list(getattr(own, "layer_types", None) or ["attention"] * len(self.layers))
        self.extra: dict[str, float] = {}

    def total(self, work: str, tokens: int) -> float:
        """Seconds of the whole language model in the form that it has now."""
        run = {"prefill": self._prefill, "decode": self._decode, "train": self._train}[work]
        cuda = self.device == "cuda"
        if cuda:
            torch.cuda.empty_cache()
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        of_layer, rest = run(tokens)
        if cuda:
            self.extra[work] = (torch.cuda.max_memory_allocated() - held) / 2**30
        if cuda and work == "train":
            # What checkpoints keep of each layer that is not here: its input.
            more = sum(self.counts.values()) - len(self.layers)
            size = torch.empty((), dtype=next(self.base.parameters()).dtype).element_size()
            self.extra[work] += more * tokens * self.width * size / 2**30
        by_kind: dict[str, list[float]] = {}
        for kind, seconds in zip(self.kinds, of_layer, strict=True):
            by_kind.setdefault(kind, []).append(seconds)
        # The first layer of a forward makes what all share.
        least = {kind: min(seconds) for kind, seconds in by_kind.items()}
        first = max(of_layer[0] - least[self.kinds[0]], 0.0)
        return rest + first + sum(least[kind] * count for kind, count in self.counts.items())

    def _embeds(self, tokens: int) -> Tensor:
        dtype = next(self.base.parameters()).dtype
        return torch.randn(1, tokens, self.width, device=self.device, dtype=dtype)

    @torch.inference_mode()
    def _prefill(self, tokens: int) -> tuple[list[float], float]:
        embeds = self._embeds(tokens)
        return self._median(lambda: self.base(inputs_embeds=embeds, use_cache=True))

    @torch.inference_mode()
    def _decode(self, tokens: int) -> tuple[list[float], float]:
        past = self.base(inputs_embeds=self._embeds(tokens), use_cache=True).past_key_values
        one = self._embeds(1)
        for _ in range(3):
            self.base(inputs_embeds=one, past_key_values=past)

        def step() -> None:
            self.base(inputs_embeds=one, past_key_values=past)

        of_layer, rest = self._median(step, 9)
        # The host runs ahead of the GPU where nobody waits between layers, as here.
        start = self._now()
        for _ in range(STEPS):
            step()
        factor = (self._now() - start) / STEPS / (sum(of_layer) + rest)
        return [seconds * factor for seconds in of_layer], rest * factor

    def _train(self, tokens: int) -> tuple[list[float], float]:
        """As much as LoRA computes: forward twice, and gradients of activations alone."""
        embeds = self._embeds(tokens).requires_grad_()
        self.model.requires_grad_(False)
        self.model.train()
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        try:

            def step() -> None:
                out = self.base(inputs_embeds=embeds, use_cache=False).last_hidden_state
                out[:, -1].float().sum().backward()

            step()
            times = []
            for _ in range(3):
                embeds.grad = None
                start = self._now()
                step()
                times.append(self._now() - start)
        finally:
            self.model.gradient_checkpointing_disable()
            self.model.eval()
        # Layers of a backward pass cannot be told apart from outside: all count alike.
        return [sorted(times)[1] / len(self.layers)] * len(self.layers), 0.0

    def _median(self, run: Callable[[], Any], repeats: int = 3) -> tuple[list[float], float]:
        """Seconds of each layer, and of the forward around them."""
        results = []
        starts: list[float] = []
        spent: list[float] = []

        def before(*_: Any) -> None:
            starts.append(self._now())

        def after(*_: Any) -> None:
            spent.append(self._now() - starts.pop())

        handles = [layer.register_forward_pre_hook(before) for layer in self.layers]
        handles += [layer.register_forward_hook(after) for layer in self.layers]
        try:
            run()
            for _ in range(repeats):
                spent.clear()
                start = self._now()
                run()
                results.append((self._now() - start, list(spent)))
        finally:
            for handle in handles:
                handle.remove()
        whole, of_layer = sorted(results)[repeats // 2]
        return of_layer, max(whole - sum(of_layer), 0.0)

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _time_work(found: Estimate, runs: _Runs, work: str, tokens: int) -> None:
    """Fill in one kind of work, of both forms."""
    lengths = sorted({max(round(tokens * part), min(SHORTEST, tokens)) for part in LENGTHS})
    if work == "decode":
        lengths = lengths[-3:]
    times: dict[str, dict[int, float]] = {form: {} for form in FORMS}
    for form in FORMS:
        if form == "sparse":
            _sparsify(runs.model, runs.sparse)
        try:
            for length in lengths:
                times[form][length] = runs.total(work, length)
        except torch.OutOfMemoryError as error:
            found.notes.append(f"{work}, {form}, {length} tokens did not fit: {reason(error)[:60]}")
        finally:
            if form == "sparse":
                densify(runs.model)
            gc.collect()
    for form in FORMS:
        if not times[form]:
            found.notes.append(f"{work}: no length fits")
            return
    found.computed[work] = any(tokens not in times[form] for form in FORMS)
    found.seconds[work] = {form: _at(tokens, times[form]) for form in FORMS}
    if work == "prefill":
        both = sorted(set(times["dense"]) & set(times["sparse"]))
        # Of a short one that was faster by chance, a longer one says otherwise.
        slow = [n for n in both if times["sparse"][n] > 0.98 * times["dense"][n]]
        pays = [n for n in both if not slow or n > slow[-1]]
        found.pays_from = pays[0] if pays else None
        longest = both[-1]
        without = _without_attention(runs, longest)
        found.attention_share = max(1 - without / times["dense"][longest], 0.0)
        if longest != tokens:
            found.notes.append(f"the share of attention is that of {longest} tokens")


def _sparsify(model: nn.Module, config: SparseConfig) -> None:
    sparsify(model, config, strict=False)
    # Inputs are embeddings, of which nothing says what they are.
    warnings.filterwarnings("ignore", message=".*counts as text")


def _without_attention(runs: _Runs, tokens: int) -> float:
    """Seconds of a prefill whose attention gives back its queries."""
    whole = SparseConfig(ratio=1.0, dense_below=0)
    _sparsify(runs.model, whole)
    try:
        with override_attention(runs.model, lambda call: call.q):
            return runs.total("prefill", tokens)
    finally:
        densify(runs.model)


def _at(tokens: int, times: dict[int, float]) -> float:
    """The time of so many tokens: measured, or by a parabola through the three longest."""
    if tokens in times:
        return times[tokens]
    known = sorted(times)[-3:]
    x = torch.tensor([n / tokens for n in known], dtype=torch.float64)
    y = torch.tensor([times[n] for n in known], dtype=torch.float64)
    powers = torch.stack([x**i for i in range(len(known))], -1)
    return float(torch.linalg.solve(powers, y).clamp(min=0).sum())


def _time_tower(
    found: Estimate, model: Any, images: int, sparse: SparseConfig, runs: _Runs
) -> None:
    """Fill in the tower's time, of both forms, and add it to that of a prefill."""
    modules = dict(model.named_modules())
    tower = next((modules[name] for name in TOWERS if name in modules), None)
    inputs = None if tower is None else _tower_inputs(tower, runs.device)
    if tower is None or inputs is None:
        found.notes.append("the tower is of a kind that is not known here: its time is left out")
        return
    for form in FORMS:
        if form == "sparse":
            _sparsify(model, sparse)
        try:
            with torch.inference_mode():
                tower(**inputs)
                times = []
                for _ in range(3):
                    start = runs._now()
                    tower(**inputs)
                    times.append(runs._now() - start)
        finally:
            if form == "sparse":
                densify(model)
        found.tower_seconds[form] = sorted(times)[1] * images
        for work in ("prefill", "train"):
            if work in found.seconds:
                found.seconds[work][form] += found.tower_seconds[form]


def _tower_inputs(tower: Any, device: str) -> dict[str, Any] | None:
    """One image or clip of the size that the tower's config names; None of an unknown kind."""
    import inspect

    names = inspect.signature(type(tower).forward).parameters
    config, dtype = tower.config, next(tower.parameters()).dtype
    if "grid_thw" in names and "hidden_states" in names:
        side = 74
        width = config.in_channels * config.temporal_patch_size * config.patch_size**2
        return {
            "hidden_states": torch.randn(side * side, width, device=device, dtype=dtype),
            "grid_thw": torch.tensor([[1, side, side]], device=device),
        }
    if "pixel_values" in names and isinstance(getattr(config, "image_size", None), int):
        size = config.image_size
        return {"pixel_values": torch.randn(1, 3, size, size, device=device, dtype=dtype)}
    if "input_features" in names and getattr(config, "max_source_positions", None):
        frames = 2 * config.max_source_positions
        shape = (1, config.num_mel_bins, frames)
        return {"input_features": torch.randn(shape, device=device, dtype=dtype)}
    return None


def estimate_table(found: Estimate) -> str:
    """The estimate as text."""
    lines = [
        f"{found.model}: {found.parameters / 1e9:.2f}B parameters, {found.layers} layers, "
        f"{found.tokens} tokens, {found.images} images or clips, {found.gpu}",
        f"weights {found.weights_gib:.1f} GiB, KV cache {found.cache_gib:.1f} GiB",
        *[f"attention is {found.attention_share:.0%} of the language model's dense prefill"]
        * ("prefill" in found.seconds),
        "",
        f"{'':18}{'dense':>10}{'sparse':>10}{'speed-up':>10}{'GiB':>8}",
    ]
    for work, seconds in found.seconds.items():
        dense, few = seconds["dense"], seconds["sparse"]
        peak = found.peak_gib.get(work)
        unit, factor = ("ms", 1e3) if work == "decode" else ("s", 1.0)
        mark = "  computed" if found.computed[work] else ""
        lines.append(
            f"{work + ', ' + unit:18}{dense * factor:10.2f}{few * factor:10.2f}"
            f"{dense / few:9.2f}x{'' if peak is None else f'{peak:8.1f}'}{mark}"
        )
    if found.tower_seconds:
        dense, few = found.tower_seconds["dense"], found.tower_seconds["sparse"]
        lines.append(f"{'tower alone, s':18}{dense:10.2f}{few:10.2f}{dense / few:9.2f}x")
    pays = found.pays_from
    at = (
        "at no length that ran" if pays is None else f"from {pays} tokens (of the lengths that ran)"
    )
    if "prefill" in found.seconds:
        lines += ["", f"a sparse prefill pays {at}"]
    lines += found.notes
    return "\n".join(lines)

"""`mm-sparse generate`: a model in a folder answers one question, and what that took.

    torchrun --nproc-per-node 4 -m mm_sparse.cli generate FOLDER QUESTION

shares the prompt between processes, each of which keeps the keys of some heads.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_sparse._extras import extra_of
from mm_sparse.cli import positive, share
from mm_sparse.recipes.run.shared_prompts import (
    SilentStreamer,
    is_first,
    join_processes,
    leave_processes,
    processes,
    share_prompt,
)

if TYPE_CHECKING:
    from mm_sparse.analysis import Report
    from mm_sparse.modality import Modality

MEDIA = {
    "image": ("image_processor",),
    "video": ("video_processor",),
    "audio": ("feature_extractor", "audio_processor"),
}
"""Options that name files, and the parts of a processor that take what is in them."""
PLAIN = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""Chat template of a processor without one: the question as it is."""
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")
FRAMES = 16
"""Frames that are read of a video file at most."""


def main(argv: Sequence[str] | None = None) -> None:
    """Print an answer as it comes, and then on stderr what it took.

    Raises:
        SystemExit: wrong arguments, files or folders, in one sentence.

    Example:
        >>> main(["path/to/model", "--file", "report.txt", "--ratio", "0.1", "Who wrote this?"])
    """
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        check_files(args)
        device = join_processes(device_of(args.device))
        processor = load_processor(args.folder)
        inputs = prompt_of(processor, args)
        model = load(args, device)
        share_prompt(model)
    except (ImportError, OSError, ValueError) as error:
        # Messages of transformers have several lines.
        said = " ".join(f"{error}{extra_of(error)}".split())
        raise SystemExit(f"mm-sparse generate: {said}") from error
    found = generate(
        model, processor, inputs, max_new_tokens=args.max_new_tokens, static=args.static
    )
    if is_first():
        print(found, file=sys.stderr)
    leave_processes()


def generate_parser() -> argparse.ArgumentParser:
    """Options of `mm-sparse generate`."""
    parser = argparse.ArgumentParser(
        prog="mm-sparse generate",
        description="A model in a folder answers a question about texts, images, audio or a "
        "video, with sparse attention. The answer goes to stdout, what it took to stderr.",
    )
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="of a transformers model, or a repository of the hub")
    add("question", nargs="?", metavar="QUESTION", help="the last argument")
    files: dict[str, Any] = {"nargs": "+", "action": "extend", "default": [], "metavar": "FILE"}
    add("--image", **files, help="images, in the order in which the model reads them")
    add("--video", **files, help=f"a video ({FRAMES} frames of it), or images of its frames")
    add("--audio", **files, help="clips: wav, flac, ogg, mp3")
    add("--file", type=Path, metavar="FILE.txt", help="a text that goes before the question")
    add("--max-new-tokens", type=positive, default=128, metavar="N", help="of the answer (128)")
    add("--ratio", type=share, metavar="R", help="share of keys kept (0.2, or that of --scorers)")
    add("--unit", type=int, choices=(16, 32, 64, 128), help="tokens of a unit (16)")
    add("--scorers", metavar="NAME", help="shipped scorers, a folder or a repository of them")
    add("--dense", action="store_true", help="the model as it is, for comparison")
    add("--device", metavar="D", help="cuda where there is one, else cpu")
    add("--dtype", default="auto", metavar="T", help="of the weights: bfloat16, ... (the folder's)")
    add("--static", action="store_true", help="a cache of fixed size: cache_implementation=static")
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments, with the question found behind a list of files."""
    parser = generate_parser()
    args = parser.parse_intermixed_args(argv)
    if args.question is None:
        for name in MEDIA:
            given = getattr(args, name)
            # `--image a.png "What is it?"` takes the question for another file.
            if len(given) > 1 and given[-1] == argv[-1] and not os.path.isfile(given[-1]):
                args.question = given.pop()
                break
    if args.question is None or not args.question.strip():
        parser.error("QUESTION must be given as the last argument, got none")
    for name in ("scorers", "ratio", "unit"):
        if args.dense and getattr(args, name) is not None:
            parser.error(f"--{name} must not be given with --dense")
    if args.static and processes() > 1:
        parser.error("--static must not be given to several processes, whose caches grow")
    if args.scorers is not None and args.unit is not None:
        parser.error("--unit must not be given with --scorers: theirs is stored")
    return args


def check_files(args: argparse.Namespace) -> None:
    """Refuse files that are not there, before anything loads.

    Raises:
        ValueError: there is no such file or folder.
    """
    given = [(name, file) for name in MEDIA for file in getattr(args, name)]
    given += [("file", str(args.file))] if args.file is not None else []
    for name, file in given:
        if not os.path.isfile(file):
            raise ValueError(f"{name} must be a file, got {file!r}")
    folder = args.folder
    named = folder.count("/") == 1 and not folder.startswith((".", "/", "~"))
    if not os.path.isdir(folder) and (os.path.exists(folder) or not named):
        raise ValueError(
            f"folder must be a folder with a model, or OWNER/NAME of the hub, got {folder!r}"
        )


def device_of(name: str | None) -> Any:
    """A device by its name; CUDA if there is one and no name.

    Raises:
        ValueError: there is no such device.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    # Builds without CUDA fail with an AssertionError.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).partition("\n")[0]
        raise ValueError(f"device must be one of this machine, got {name!r}: {first}") from error
    return torch.device(name)


def load_processor(folder: str) -> Any:
    """The processor of a folder, or the tokenizer of one with a model of text.

    Raises:
        ValueError: there is neither, or no model.
    """
    from transformers import (
        AutoConfig,
        AutoProcessor,
        AutoTokenizer,
        PreTrainedTokenizerBase,
        ProcessorMixin,
    )

    try:
        # Of a repository that is not there, one file is asked for, not ten.
        AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"folder must hold a model of transformers, got {folder!r}: {error}"
        ) from error
    try:
        found: Any = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError):
        found = None
    if isinstance(found, ProcessorMixin | PreTrainedTokenizerBase):
        return found
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"folder must hold a processor or a tokenizer, got {folder!r}: {error}"
        ) from error


def prompt_of(processor: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Inputs of the model: what it is given and asked, in its chat template if it has one.

    Args:
        processor: or the tokenizer of a model of text.
        args: of `parse`.
    Raises:
        ValueError: a file cannot be read, or is nothing for this model.
        ImportError: mistral_common is missing, which its processor needs.
    """
    from mm_sparse.recipes.data import RATE, Turn, read_audio, read_tensor, read_video
    from mm_sparse.recipes.finetuning import (
        check_package,
        check_template,
        encode,
        message_of,
        sampling_rate,
    )

    taken = [kind for kind, parts in MEDIA.items() if any(getattr(processor, p, 0) for p in parts)]
    for kind in MEDIA:
        given = getattr(args, kind)
        if given and kind not in taken:
            check_package(args.folder)
            raise ValueError(
                f"{kind} must not be given to a model that takes {' and '.join(['text', *taken])} "
                f"alone, got {given[0]!r} for {args.folder}"
            )
    text = args.question
    if args.file is not None:
        text = f"{text_of(args.file)}\n\n{text}"
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None:
        return text_prompt(processor, text)
    content: list[Any] = [read_tensor(path, name=f"image {path}") for path in args.image]
    if args.video:
        paths = [Path(path) for path in args.video]
        frames = FRAMES if len(paths) == 1 else len(paths)
        content.append(read_video(paths, frames, name="video"))
    content += [read_audio(path, f"audio {path}") for path in args.audio]
    try:
        check_template(processor)
    except ValueError:
        processor.chat_template = PLAIN
    message = message_of(Turn((*content, text)), sampling_rate(processor) or RATE)
    wanted = {"padding": True, "return_tensors": "pt"}
    return encode(processor, [[message]], wanted, add_generation_prompt=True)


def text_of(path: Path) -> str:
    """What is in a text file.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"file must hold UTF-8 text, got {str(path)!r}: {error}") from error


def text_prompt(tokenizer: Any, text: str) -> dict[str, Any]:
    """Inputs of a model of text: in its chat template if it has one, else the text as it is."""
    if tokenizer.chat_template:
        made = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
    else:
        made = tokenizer(text, return_tensors="pt")
    # Others, token_type_ids for one, are nothing that causal models take.
    return {name: made[name] for name in ("input_ids", "attention_mask")}


def load(args: argparse.Namespace, device: Any) -> Any:
    """The model of a folder on a device, sparse unless it is to be dense.

    Raises:
        ValueError: there is no such model, it cannot be sparse, or the scorers are of another.
    """
    import mm_sparse as mms
    from mm_sparse.recipes.finetuning import load_model

    model = load_model(args.folder, dtype=args.dtype).eval().to(device)
    if args.scorers is not None:
        try:
            mms.load_scorers(model, args.scorers, ratio=args.ratio)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"scorers must fit the model, got {args.scorers!r}: {error}"
            ) from error
    elif not args.dense:
        given = {"ratio": args.ratio, "unit": args.unit}
        changes = {name: value for name, value in given.items() if value is not None}
        mms.sparsify(model, mms.SparseConfig.preset("text", **changes), strict=False)
    return model


@dataclass(frozen=True)
class Generation:
    """An answer and what it took; prints as a table."""

    text: str
    tokens: dict[Modality, int]
    """Of the prompt, by modality."""
    new_tokens: int
    first_token: float
    """Seconds from the start of `generate` to the first token."""
    rate: float | None
    """Tokens a second after the first; None if there is no other."""
    memory: tuple[str, int] | None
    """Which memory, and its peak in bytes; None where the system does not tell."""
    report: Report | None
    """Of the prompt; None of a model that is dense."""

    def __str__(self) -> str:
        kinds = ", ".join(f"{count:,} {kind.name.lower()}" for kind, count in self.tokens.items())
        rows = [
            ("prompt", f"{sum(self.tokens.values()):,} tokens: {kinds}"),
            ("first token", f"{self.first_token:.2f} s"),
        ]
        if self.rate is not None:
            rows.append(("decoding", f"{self.rate:.1f} tokens/s, {self.new_tokens} tokens"))
        if self.memory is not None:
            name, size = self.memory
            rows.append(("peak memory", f"{size / 2**30:.2f} GiB ({name})"))
        return "\n".join(f"{name:14}{value}" for name, value in [*rows, *self._sparsity()])

    def _sparsity(self) -> list[tuple[str, str]]:
        if self.report is None:
            return [("density", "1.000"), ("sparse layers", "none, --dense")]
        ran = [row for row in self.report.rows if row.mode == "refused" or row.queries is not None]
        why = Counter(row.reason or row.mode for row in ran if row.mode != "sparse")
        notes = [f"{count} dense: {reason}" for reason, count in why.most_common(2)]
        sparse = sum(row.mode == "sparse" for row in ran)
        density = self.report.density
        return [
            ("density", "unknown" if density is None else f"{density:.3f}"),
            ("sparse layers", "; ".join([f"{sparse} of {len(ran)}", *notes])),
        ]


class TokenClock:
    """Gives tokens on to a streamer, and notes when they come."""

    def __init__(self, streamer: Any, on_first: Callable[[], None]) -> None:
        """
        Args:
            streamer: of transformers.
            on_first: called before the first token is given on; its time counts as none.
        """
        self.streamer, self.on_first = streamer, on_first
        self.count = -1
        """Tokens that came; -1 before the prompt."""
        self.start = self.first = self.restart = self.last = time.perf_counter()

    def put(self, value: Any) -> None:
        """Take the prompt, then a token."""
        self.last = time.perf_counter()
        self.count += 1
        if self.count == 1:
            self.first = self.last
            self.on_first()
            self.restart = self.last = time.perf_counter()
        self.streamer.put(value)

    def end(self) -> None:
        """Let the streamer print what is left."""
        self.streamer.end()


def generate(
    model: Any,
    processor: Any,
    inputs: dict[str, Any],
    *,
    max_new_tokens: int = 128,
    static: bool = False,
) -> Generation:
    """Print an answer as it comes: always the likeliest token.

    Args:
        model: of transformers, sparse or dense.
        processor: or tokenizer.
        inputs: of `prompt_of`.
        static: whether the cache has a fixed size.

    Example:
        >>> print(generate(model, tokenizer, text_prompt(tokenizer, "Hi")).rate)
    """
    import torch
    from transformers import TextStreamer

    import mm_sparse as mms
    from mm_sparse.integrations import is_sparsified
    from mm_sparse.integrations.hf import special_tokens

    tokenizer = getattr(processor, "tokenizer", processor)
    device, dtype = model.device, model.dtype
    moved = {
        name: value.to(device, dtype if value.is_floating_point() else None)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in inputs.items()
    }
    quiet_settings(model.generation_config, tokenizer)
    options: dict[str, Any] = {"cache_implementation": "static"} if static else {}
    sparse = is_sparsified(model)
    reports: list[Report] = []
    counts = token_counts(inputs["input_ids"], special_tokens(model.config))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with ExitStack() as stack:
        stack.enter_context(spinner(f"Reading {inputs['input_ids'].numel():,} tokens"))

        def on_first() -> None:
            stack.close()
            # Later calls, one for each token, take its place.
            if sparse:
                reports.append(mms.report(model))

        kind: Any = TextStreamer if is_first() else SilentStreamer
        streamer = kind(tokenizer, skip_prompt=True, skip_special_tokens=True)
        clock: Any = TokenClock(streamer, on_first)
        ids = model.generate(
            **moved, **options, streamer=clock, max_new_tokens=max_new_tokens, do_sample=False,
            num_beams=1, use_cache=True,
        )  # fmt: skip
    new = ids[0, -clock.count :]
    seconds = clock.last - clock.restart
    return Generation(
        text=tokenizer.decode(new, skip_special_tokens=True),
        tokens=counts,
        new_tokens=clock.count,
        first_token=clock.first - clock.start,
        rate=(clock.count - 1) / seconds if clock.count > 1 else None,
        memory=peak_memory(device),
        report=reports[0] if reports else None,
    )


def quiet_settings(settings: Any, tokenizer: Any) -> None:
    """Take out of a generation config what transformers would warn of."""
    for name in SAMPLING:
        setattr(settings, name, None)
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.pad_token_id
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.eos_token_id


def token_counts(ids: Any, special: dict[int, Modality]) -> dict[Modality, int]:
    """Tokens by modality, those that there are; `special` has the placeholders' ids."""
    from mm_sparse.modality import Modality

    found = Counter(special.get(token, Modality.TEXT) for token in ids.flatten().tolist())
    return {kind: found[kind] for kind in Modality if found[kind]}


def peak_memory(device: Any) -> tuple[str, int] | None:
    """Of a CUDA device since it was last reset, else of the process since it began."""
    import torch

    if device.type == "cuda":
        return "CUDA", torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return "RSS", peak if sys.platform == "darwin" else peak * 1024


def spinner(text: str) -> AbstractContextManager[Any]:
    """Something that moves in a terminal, if rich is installed; else nothing."""
    if find_spec("rich") is None or not (sys.stdout.isatty() and sys.stderr.isatty()):
        return nullcontext()
    from rich.console import Console

    return Console(stderr=True).status(text)


if __name__ == "__main__":
    main()

"""Folders as people have them: a tiny model with random weights, and its real processor."""

from __future__ import annotations

import json
from base64 import b64encode
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.hf_models import TEXT

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>",
    "<|vision_start|>", "<|vision_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>",
    "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>",
)  # fmt: skip
COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
QUESTION = "Which color is it?"
HEAD = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
BODY = (
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE{% elif c['type'] == 'video' %}VIDEO"
    "{% elif c['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
)
TAIL = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PADS = {
    "qwen2_5_vl": (
        "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"
    ),
    "smolvlm": ("<image>", "<video>"),
    "qwen2_audio": ("", ""),
    "granite_speech": ("", ""),
}  # fmt: skip


def chat_template(kind: str, *, marked: bool = False) -> str:
    """Of ChatML; `marked` puts answers between `{% generation %}` marks."""
    said = "<|im_end|>"
    if kind == "granite_speech":
        # It takes texts, and would print a list of parts.
        return HEAD + "{{ m['content'] }}" + said + "\n" + TAIL
    if marked:
        answer = f"{{% generation %}}{BODY}{said}{{% endgeneration %}}"
        middle = f"{{% if m['role'] == 'assistant' %}}{answer}{{% else %}}{BODY}{said}{{% endif %}}"
    else:
        middle = BODY + said
    image, video = PADS[kind]
    return (HEAD + middle + "\n" + TAIL).replace("IMAGE", image).replace("VIDEO", video)


def tokenizer() -> Any:
    """Byte-level BPE, learned from a few words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw: Any = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([*COLORS, QUESTION, "system user assistant"] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=SPECIAL[0], eos_token=SPECIAL[2],
        additional_special_tokens=list(SPECIAL),
    )  # fmt: skip


def write_checkpoint(folder: Path, kind: str, *, marked: bool = False, **options: Any) -> str:
    """A tiny model and processor, with other options of its text; returns the folder."""
    torch.manual_seed(0)
    words = tokenizer()
    ids = {name: words.convert_tokens_to_ids(name) for name in SPECIAL}
    text = {
        **TEXT, "vocab_size": len(words), "max_position_embeddings": 2048, "bos_token_id": None,
        "pad_token_id": ids[SPECIAL[0]], "eos_token_id": ids[SPECIAL[2]], "initializer_range": 0.1,
        **options,
    }  # fmt: skip
    if kind == "voxtral":
        model, processor = _voxtral(folder, text)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return str(folder)
    make = {
        "qwen2_5_vl": _qwen2_5_vl,
        "smolvlm": _smolvlm,
        "qwen2_audio": _qwen2_audio,
        "granite_speech": _granite_speech,
    }[kind]
    model, processor = make(text, ids, words, chat_template(kind, marked=marked))
    model.generation_config.eos_token_id = ids[SPECIAL[2]]
    model.generation_config.pad_token_id = ids[SPECIAL[0]]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def write_language(folder: Path, **options: Any) -> str:
    """A tiny Llama whose attention is not even, and its tokenizer with a chat template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    words = tokenizer()
    words.chat_template = (HEAD + "{{ m['content'] }}<|im_end|>\n" + TAIL).replace("IMAGE", "")
    config = {
        **TEXT, "vocab_size": len(words), "max_position_embeddings": 2048, "bos_token_id": None,
        "pad_token_id": 0, "eos_token_id": 2, "initializer_range": 0.3,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**{**config, **options})).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def write_texts(folder: Path, count: int = 3, words: int = 2000) -> str:
    """Files of random words, of which some come again and again; returns their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    known = ["".join(draw.choice(list("abcdefghij"), 4)) for _ in range(60)]
    for number in range(count):
        text = " ".join(draw.choice(known, words))
        (folder / f"{number}.txt").write_text(text)
    return str(folder)


def _qwen2_5_vl(text: Any, ids: Any, words: Any, template: str) -> tuple[Any, Any]:
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    config = Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": {
            "rope_type": "default", "mrope_section": [1, 1, 2],
        }},
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
            "out_hidden_size": 32, "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    sizes = {"patch_size": 4, "min_pixels": 16 * 16, "max_pixels": 32 * 32}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**sizes), words, Qwen2VLVideoProcessor(**sizes), template
    )
    return Qwen2_5_VLForConditionalGeneration(config), processor


def _smolvlm(text: Any, ids: Any, words: Any, template: str) -> tuple[Any, Any]:
    from transformers import (
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
    )

    config = SmolVLMConfig(
        text_config={**text, "model_type": "llama"},
        vision_config={
            "model_type": "smolvlm_vision", "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 24, "patch_size": 4,
        },
        image_token_id=ids["<image>"],
        pad_token_id=ids[SPECIAL[0]],
        scale_factor=2,
    )  # fmt: skip
    sizes: Any = {"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 24}}
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(**sizes), words, SmolVLMVideoProcessor(**sizes), 9, template
    )
    return SmolVLMForConditionalGeneration(config), processor


def _qwen2_audio(text: Any, ids: Any, words: Any, template: str) -> tuple[Any, Any]:
    from transformers import (
        Qwen2AudioConfig,
        Qwen2AudioForConditionalGeneration,
        Qwen2AudioProcessor,
        WhisperFeatureExtractor,
    )

    config = Qwen2AudioConfig(
        text_config={**text, "model_type": "qwen2"},
        audio_config={
            "model_type": "qwen2_audio_encoder", "d_model": 32, "encoder_layers": 2,
            "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "num_mel_bins": 16,
            "max_source_positions": 50,
        },
        audio_token_index=ids["<|AUDIO|>"],
    )  # fmt: skip
    ears = WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    return Qwen2AudioForConditionalGeneration(config), Qwen2AudioProcessor(ears, words, template)


def _granite_speech(text: Any, ids: Any, words: Any, template: str) -> tuple[Any, Any]:
    from transformers import (
        GraniteSpeechConfig,
        GraniteSpeechFeatureExtractor,
        GraniteSpeechForConditionalGeneration,
        GraniteSpeechProcessor,
    )

    config = GraniteSpeechConfig(
        text_config={**text, "model_type": "granite"},
        encoder_config={
            "input_dim": 160, "num_layers": 2, "hidden_dim": 32, "num_heads": 2,
            "context_size": 20, "max_pos_emb": 32, "output_dim": 8,
        },
        projector_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "encoder_hidden_size": 32,
        },
        audio_token_index=ids["<|AUDIO|>"],
        has_lora_adapter=False,
        tie_word_embeddings=False,
    )  # fmt: skip
    ears = GraniteSpeechFeatureExtractor()
    processor = GraniteSpeechProcessor(ears, words, "<|AUDIO|>", template)
    return GraniteSpeechForConditionalGeneration(config), processor


def write_tekken(folder: Path) -> Path:
    """A tokenizer file of mistral-common with an id for each byte."""
    named = {
        0: "<unk>", 1: "<s>", 2: "</s>", 3: "[INST]", 4: "[/INST]", 5: "[AVAILABLE_TOOLS]",
        6: "[/AVAILABLE_TOOLS]", 7: "[TOOL_RESULTS]", 8: "[/TOOL_RESULTS]", 9: "[TOOL_CALLS]",
        10: "[IMG]", 11: "<pad>", 12: "[IMG_BREAK]", 13: "[IMG_END]", 14: "[PREFIX]",
        15: "[MIDDLE]", 16: "[SUFFIX]", 17: "[SYSTEM_PROMPT]", 18: "[/SYSTEM_PROMPT]",
        19: "[TOOL_CONTENT]",        24: "[AUDIO]", 25: "[BEGIN_AUDIO]", 34: "[TRANSCRIBE]",
    }  # fmt: skip
    special = [
        {"rank": rank, "token_str": named.get(rank, f"<SPECIAL_{rank}>"), "is_control": True}
        for rank in range(40)
    ]
    single = [
        {"rank": byte, "token_bytes": b64encode(bytes([byte])).decode(), "token_str": None}
        for byte in range(256)
    ]
    content = {
        "config": {
            "pattern": r"\w+|\s+|[^\w\s]+", "num_vocab_tokens": 256, "default_vocab_size": 296,
            "default_num_special_tokens": 40, "version": "v7",
        },
        "vocab": single,
        "special_tokens": special,
        "audio": {
            "sampling_rate": 16000, "frame_rate": 12.5, "chunk_length_s": 30.0,
            "audio_encoding_config": {"num_mel_bins": 16, "hop_length": 160, "window_size": 400},
        },
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tekken.json").write_text(json.dumps(content))
    return folder / "tekken.json"


def _voxtral(folder: Path, text: Any) -> tuple[Any, Any]:
    """Its clips are 375 tokens, as the processor makes every 30 seconds so many."""
    pytest.importorskip("mistral_common", reason="the processor of Voxtral makes tokens with it")
    from transformers import (
        MistralCommonBackend,
        VoxtralConfig,
        VoxtralForConditionalGeneration,
        VoxtralProcessor,
        WhisperFeatureExtractor,
    )

    ids = {"vocab_size": 296, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 11}
    config = VoxtralConfig(
        text_config={**text, **ids, "model_type": "llama"},
        audio_config={
            "model_type": "voxtral_encoder", "hidden_size": 16, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_mel_bins": 16,
            "max_source_positions": 1500, "vocab_size": 296,
        },
        audio_token_id=24,
    )  # fmt: skip
    model = VoxtralForConditionalGeneration(config)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, ids[name])
    ears = WhisperFeatureExtractor(feature_size=16)
    words = MistralCommonBackend(write_tekken(folder))
    return model, VoxtralProcessor(ears, words)


def write_pictures(folder: Path, count: int = 6, words: int = 1) -> str:
    """Squares of one color, what they are asked and what is right, as JSON lines of messages.

    Args:
        words: how often the question is put, for prompts in which there is something to leave out.
    """
    from PIL import Image

    rows = []
    for number in range(count):
        name = list(COLORS)[number % len(COLORS)]
        size = (24 + 4 * number, 24)
        Image.new("RGB", size, COLORS[name]).save(folder / f"{number}.png")
        parts = [
            {"type": "image", "path": f"{number}.png"},
            {"type": "text", "text": QUESTION * words},
        ]
        rows.append({"messages": [
            {"role": "user", "content": parts}, {"role": "assistant", "content": name},
        ]})  # fmt: skip
    path = folder / "pictures.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def write_tones(folder: Path, count: int = 4) -> str:
    """Tones of two heights and what they are called, as a speech manifest."""
    import soundfile

    rows = []
    for number in range(count):
        name = ("low", "high")[number % 2]
        seconds = 0.5 + 0.1 * number
        time = np.arange(int(16_000 * seconds)) / 16_000
        wave = 0.5 * np.sin(2 * np.pi * (200, 2000)[number % 2] * time)
        soundfile.write(folder / f"{number}.wav", wave, 16_000)
        rows.append({"audio_filepath": f"{number}.wav", "duration": seconds, "text": name})
    path = folder / "tones.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)

"""Labels stand on the assistant's answers, and on nothing else."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mm_sparse.recipes.data import IGNORED, Sample, Turn
from mm_sparse.recipes.finetuning import ChatCollator, find_answers, load_processor
from tests.support.tiny_checkpoints import chat_template, write_checkpoint

IMAGE = torch.rand(3, 24, 24)
CHAT = (
    Turn(("You answer.",), system=True),
    Turn((IMAGE, "Which color?")),
    Turn(("red blue",), answer=True),
    Turn(("And ", torch.rand(3, 32, 24), torch.rand(3, 24, 32), " these?")),
    Turn(("green",), answer=True),
    Turn(("Sure?",)),
    Turn(("red blue",), answer=True),
)


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("checkpoint")
    return load_processor(write_checkpoint(folder, "qwen2_5_vl"))


def learned(processor: Any, *chats: tuple[Turn, ...]) -> list[list[str]]:
    """What each row of a batch learns to say."""
    batch = ChatCollator(processor)([Sample(chat) for chat in chats])
    assert batch["labels"].shape == batch["input_ids"].shape
    texts = []
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        asked = labels != -100
        assert torch.equal(ids[asked], labels[asked])
        texts.append(processor.tokenizer.decode(ids[asked]).split("<|im_end|>"))
    return texts


@pytest.mark.parametrize("marked", [True, False], ids=["marked", "rendered"])
def test_every_answer_is_learned_with_its_end(processor: Any, marked: bool, monkeypatch) -> None:
    monkeypatch.setattr(processor, "chat_template", chat_template("qwen2_5_vl", marked=marked))
    texts = learned(processor, CHAT, CHAT[:3], CHAT[1:5])
    assert texts == [["red blue", "green", "red blue", ""], ["red blue", ""],
                     ["red blue", "green", ""]]  # fmt: skip


@pytest.mark.parametrize("marked", [True, False], ids=["marked", "rendered"])
def test_a_slow_tokenizer_is_counted(processor: Any, marked: bool, monkeypatch) -> None:
    monkeypatch.setattr(processor, "chat_template", chat_template("qwen2_5_vl", marked=marked))
    monkeypatch.setattr(type(processor.tokenizer), "is_fast", False)
    assert learned(processor, CHAT) == [["red blue", "green", "red blue", ""]]


def test_thoughts_before_an_answer_are_no_part_of_the_prompt(processor: Any, monkeypatch) -> None:
    """Some templates open a thought where an answer begins."""
    template = chat_template("qwen2_5_vl").replace(
        "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>{% endif %}"
    )
    monkeypatch.setattr(processor, "chat_template", template)
    assert learned(processor, CHAT[:3]) == [["red blue", ""]]


def test_a_template_that_rewrites_earlier_turns_is_refused(processor: Any, monkeypatch) -> None:
    template = "{{ messages | length }} turns: " + chat_template("qwen2_5_vl")
    monkeypatch.setattr(processor, "chat_template", template)
    with pytest.raises(ValueError, match="chat_template must render a conversation as the start"):
        learned(processor, CHAT)


def test_marks_that_lack_an_answer_are_refused(processor: Any, monkeypatch) -> None:
    template = chat_template("qwen2_5_vl", marked=True)
    template = template.replace("{% if m['role'] == 'assistant' %}", "{% if loop.last %}")
    monkeypatch.setattr(processor, "chat_template", template)
    with pytest.raises(ValueError, match="mark each of 3 answers with generation, got 1 marks"):
        learned(processor, CHAT)


def test_answers_are_found_in_the_tokens_of_the_processor(processor: Any) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]
    ids = processor.tokenizer(processor.apply_chat_template(messages))["input_ids"]
    ((start, end),) = find_answers(processor, messages, ids)
    assert processor.tokenizer.decode(ids[start:end]) == "red<|im_end|>"
    with pytest.raises(ValueError, match="must render the answer of message 1"):
        find_answers(processor, messages, ids[::-1])


def test_a_sample_without_answer_and_a_processor_without_template(
    processor: Any, monkeypatch
) -> None:
    with pytest.raises(ValueError, match="sample must have an answer, got none in row 3"):
        ChatCollator(processor)([Sample(CHAT[:2], "row 3")])
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        ChatCollator(processor, max_length=0)
    monkeypatch.setattr(processor, "chat_template", None)
    monkeypatch.setattr(processor.tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="processor must have a chat template, got Qwen2_5_VLProc"):
        ChatCollator(processor)


def test_long_conversations_are_dropped_counted_and_named(
    processor: Any, caplog: pytest.LogCaptureFixture
) -> None:
    collator = ChatCollator(processor, max_length=60)
    batch = collator([Sample(CHAT, "long"), Sample(CHAT[1:3], "short")])
    assert len(batch["labels"]) == 1
    assert collator.dropped == 1
    assert "dropped sample long" in caplog.text
    assert collator([Sample(CHAT)]) == {}


def test_prompts_end_where_the_last_answer_begins(processor: Any) -> None:
    batch = ChatCollator(processor, prompts=True)([Sample(CHAT), Sample(CHAT[1:3])])
    texts = processor.tokenizer.batch_decode(batch["prompts"]["input_ids"])
    assert all(text.endswith("<|im_start|>assistant\n") for text in texts)
    assert batch["prompts"]["attention_mask"][1, 0] == 0
    assert batch["answers"] == ["red blue", "red blue"]


def test_a_video_is_a_list_of_pictures(processor: Any, tmp_path: Path) -> None:
    turns = (Turn((torch.rand(4, 3, 24, 24), "What moves?")), Turn(("red",), answer=True))
    batch = ChatCollator(processor)([Sample(turns), Sample(CHAT[1:3])])
    assert batch["video_grid_thw"].tolist() == [[2, 6, 6]]
    assert len(batch["image_grid_thw"]) == 1
    assert learned(processor, turns) == [["red", ""]]


def test_a_template_of_texts_gets_placeholders(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "granite_speech")
    processor = load_processor(folder)
    tones = [torch.sin(torch.arange(size) / 9.0) for size in (8000, 9000)]
    chat = (
        Turn((tones[0], "What?")), Turn(("red blue",), answer=True),
        Turn((tones[1],)), Turn(("green",), answer=True),
    )  # fmt: skip
    assert learned(processor, chat, chat[:2]) == [["red blue", "green", ""], ["red blue", ""]]
    with pytest.raises(ValueError, match="GraniteSpeechProcessor cannot take, got image"):
        learned(processor, CHAT)


def test_a_tokenizer_of_mistral_common_makes_requests(tmp_path: Path) -> None:
    processor = load_processor(write_checkpoint(tmp_path, "voxtral"))
    tones = [torch.sin(torch.arange(size) / 9.0) for size in (8000, 9000)]
    chat = (
        Turn((tones[0], "What?")), Turn(("red blue",), answer=True),
        Turn((tones[1],)), Turn(("green",), answer=True),
    )  # fmt: skip
    batch = ChatCollator(processor, prompts=True)([Sample(chat), Sample(chat[:2])])
    said = [
        processor.tokenizer.decode(ids[labels != IGNORED])
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    ]
    assert said == ["red blue</s>green</s>", "red blue</s>"]
    assert batch["answers"] == ["green", "red blue"]
    assert batch["input_features"].shape == (3, 16, 3000)
    # Its own tokenizer: padded left, in the mode that asks.
    prompts = batch["prompts"]
    assert prompts["attention_mask"][1, 0] == 0
    assert prompts["input_ids"][:, -1].tolist() == [4, 4]
    own = processor.apply_chat_template(
        [{"role": "user", "content": "What?"}], return_tensors="pt", return_dict=True
    )
    with_text = ChatCollator(processor, prompts=True)(
        [Sample((Turn(("What?",)), Turn(("red",), answer=True)))]
    )
    assert torch.equal(with_text["prompts"]["input_ids"], own["input_ids"])
    with pytest.raises(ValueError, match="VoxtralProcessor cannot take, got image"):
        learned(processor, CHAT)


def test_a_folder_without_mistral_common_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mm_sparse.recipes.finetuning import mistral_requests
    from tests.support.tiny_checkpoints import tokenizer, write_tekken

    # As transformers loads such a folder then: tokens without audio.
    tokenizer().save_pretrained(tmp_path)
    write_tekken(tmp_path)
    monkeypatch.setattr(mistral_requests, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "mm-sparse\[voxtral\]"'):
        load_processor(str(tmp_path))

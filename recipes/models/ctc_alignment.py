"""A distillation loss for the projector of speech: its tokens alone, read in order, must spell
the answer.

A audio clips, F audio tokens of the longest, N audio tokens of all, E width, C candidates
"""

import torch
from torch import Tensor
from torch.nn.functional import ctc_loss, normalize
from torch.nn.utils.rnn import pad_sequence

SHARPNESS = 20.0


def alignment_loss(
    tokens: Tensor, counts: list[int], answers: list[Tensor], table: Tensor, blank: int
) -> Tensor:
    """CTC per token of an answer: audio tokens against rows of the language model's own table.

    A projector that starts from scratch learns from it what words sound like before the language
    model has found out where to listen. Likeness is the cosine, and only words of the batch's
    answers compete. An answer too long for its audio counts nothing.

    Source: Graves et al., 2006, "Connectionist temporal classification".

    Args:
        tokens: (N, E) of all clips, one behind the other.
        counts: audio tokens of every clip.
        answers: ids of what is said in every clip, without the end of the text.
        table: (vocabulary, E) embeddings.
        blank: id whose row stands for no word.
    """
    if len(counts) != len(answers):
        raise ValueError(
            f"answers must be one for each of {len(counts)} clips to be aligned, got {len(answers)}"
        )
    candidates, place = torch.cat(answers).unique(return_inverse=True)
    rows = torch.cat([candidates.new_tensor([blank]), candidates])
    words = normalize(table[rows].detach().float(), dim=-1)
    likeness = normalize(tokens.float(), dim=-1) @ words.T * SHARPNESS  # (N, C)
    shares = pad_sequence(list(likeness.log_softmax(-1).split(counts)))  # (F, A, C)
    lengths = [len(answer) for answer in answers]
    return ctc_loss(
        shares,
        place + 1,
        torch.tensor(counts),
        torch.tensor(lengths),
        reduction="mean",
        zero_infinity=True,
    )

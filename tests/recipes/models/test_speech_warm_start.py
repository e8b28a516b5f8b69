"""What a speech model starts from and learns beside its answers; the last of several answers."""

from dataclasses import replace

import pytest
import torch

import mm_sparse as mms
from mm_sparse.modality import Modality
from mm_sparse.recipes.data.samples import Sample
from tests.recipes.models.test_speech import COLLATOR, HEARS, PACKER, SPARSE, Spy, clips, model


def test_the_last_answer_of_a_conversation_is_generated_with_the_others_in_view():
    speech = model().eval()
    first, second = clips(2)
    both = COLLATOR([Sample(first.turns + second.turns)])
    seen = []
    speech.tokenizer = Spy(seen)
    speech.generate(both, max_new_tokens=3, last=True)
    speech.generate(both, max_new_tokens=3)
    speech.generate(COLLATOR([first]), max_new_tokens=3)
    assert seen[1] == seen[2]
    start = int((both["answer_index"][0] == 1).nonzero()[0])
    with torch.no_grad():
        likeliest = int(speech.run(both).logits[0, start - 1].argmax())
    assert (seen[0] or [speech.eos_id])[0] == likeliest


def test_the_projector_alone_gets_the_alignments_gradient():
    speech, logged = model(alignment=2.0), {}
    speech.log = lambda name, value, **kwargs: logged.update({name: value})
    batch = PACKER(clips(3))
    loss = speech.training_step(batch, 0)
    assert loss.item() == pytest.approx(
        (logged["train/loss"] + 2 * logged["train/alignment"]).item(), rel=1e-5
    )
    tokens = speech.tokens(batch)[Modality.AUDIO]
    speech.aligned(tokens, batch).backward()
    assert all(p.grad is not None for p in speech.audio_projector.mlp.parameters())
    assert all(p.grad is None for p in speech.language.parameters())


def test_trained_scorers_come_with_their_ratios(tmp_path):
    trained = model(replace(SPARSE, layer_ratio={0: 0.5}), scorer="fine")
    for scorer in trained.scorers.values():
        torch.nn.init.normal_(scorer.key_map)
    mms.save_scorers(trained.language, tmp_path)
    speech = model(SPARSE, HEARS, scorer="pooled", scorers_from={"language": str(tmp_path)})
    for name, scorer in trained.scorers.items():
        assert speech.scorers[name].key_map.equal(scorer.key_map)
    assert speech.sparse_configs["language"].layer_ratio == {0: 0.5}
    assert not any(p.requires_grad for p in speech.scorers.parameters())
    with pytest.raises(
        ValueError, match=r"scorers_from must name parts that run sparse, .*'audio'"
    ):
        model(SPARSE, scorer="pooled", scorers_from={"audio": str(tmp_path)})

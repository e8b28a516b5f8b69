"""Pictures of selections and of reports, and the page of `mm-sparse inspect`."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mm_sparse as mms
from mm_sparse.analysis.heatmaps import draw_heads, draw_modalities, modality_densities
from mm_sparse.analysis.html_page import AudioView, InspectionSample, write_page
from mm_sparse.analysis.overlays import kept_frames, kept_share, save
from mm_sparse.cli.inspect import scene_of
from mm_sparse.cli.main import main
from mm_sparse.integrations.context import set_modality
from mm_sparse.modality import Modality

PNG = b"\x89PNG\r\n\x1a\n"
KINDS = torch.tensor([[0] * 8 + [2] * 40 + [0] * 16], dtype=torch.int8)


def selection():
    layout = mms.TokenLayout.from_spans([("text", 8), ("audio", 40), ("text", 16)])
    config = mms.SparseConfig(ratio=0.5, tile=64, sinks=0, window=0, bidirectional=())
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 64, 8), torch.randn(1, 2, 64, 8)
    scores = mms.PooledScorer()(q, k, layout=layout, config=config)
    return mms.select(scores, layout, config)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    found = LlamaForCausalLM(config).eval()
    sparse = mms.SparseConfig(
        ratio=0.4, tile=64, sinks=0, window=8, bidirectional=(), dense_below=0
    )
    return mms.sparsify(found, sparse)


def run(model):
    with set_modality(model, KINDS), torch.no_grad():
        return model(torch.arange(64)[None] % 50, use_cache=False)


def test_kept_frames_are_the_share_of_the_audio_tokens(tmp_path):
    chosen, path = selection(), tmp_path / "new" / "frames.png"
    shares = kept_frames({"one": chosen}, [60, 61], torch.rand(20, 80), 40, path, seconds=1.6)
    assert torch.equal(shares["one"], kept_share(chosen, [60, 61])[8:48])
    assert path.read_bytes()[:8] == PNG


def test_kept_frames_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"spectrogram must be \(bins, frames\), got \(3, 4, 5\)"):
        kept_frames(selection(), [60], torch.rand(3, 4, 5), 40)
    with pytest.raises(ValueError, match="start and count must lie in 64 tokens, got 8 and 57"):
        kept_frames(selection(), [60], torch.rand(4, 5), 57)
    with pytest.raises(ValueError, match="selections must hold at least one layer, got none"):
        kept_frames({}, [60], torch.rand(4, 5), 40)


def test_maps_show_what_the_report_says(tmp_path, model):
    with pytest.raises(ValueError, match="report must hold a layer that ran sparse, got none"):
        draw_heads(mms.report(model))
    run(model)
    found = mms.report(model)
    pairs = modality_densities(found)
    assert set(pairs) == {
        (q, k) for q in (Modality.TEXT, Modality.AUDIO) for k in (Modality.TEXT, Modality.AUDIO)
    }
    own = [row.pair_density[Modality.TEXT, Modality.AUDIO] for row in found.rows]
    assert pairs[Modality.TEXT, Modality.AUDIO] == pytest.approx(sum(own) / 2)
    heads = draw_heads(found)
    shown = heads.axes[0].images[0].get_array()
    assert shown.shape == (2, 2)
    assert shown[1, 0] == pytest.approx(found.rows[1].head_density[0])
    assert [t.get_text() for t in heads.axes[0].get_yticklabels()] == [r.name for r in found.rows]
    words = [t.get_text() for t in draw_modalities(found).axes[0].get_yticklabels()]
    assert words == ["text", "audio"]
    save(heads, tmp_path / "maps" / "heads.png")
    assert (tmp_path / "maps" / "heads.png").read_bytes()[:8] == PNG


def test_a_page_holds_pictures_and_a_row_for_every_layer(tmp_path, model):
    scene = InspectionSample(
        "A <title>",
        {"language": model},
        lambda: run(model),
        [62, 63],
        {"Question": "1 < 2?"},
        sounds=[AudioView(torch.rand(20, 80), 8, 40, 1.6)],
    )
    page = write_page(scene, tmp_path / "new" / "page.html").read_text()
    assert "A &lt;title&gt;" in page
    assert "1 &lt; 2?" in page
    assert page.count("data:image/png;base64,") == 3
    for row in mms.report(model).rows:
        assert f"<td>{row.name}</td>" in page
        assert f"{row.density:.3f}" in page


def test_inspect_reads_a_model_from_a_folder(tmp_path, model, capsys):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    mms.densify(model).save_pretrained(tmp_path / "model")
    text = "a b " * 40
    out = tmp_path / "page.html"
    assert main(["inspect", str(tmp_path / "model"), "--text", text, "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    page = out.read_text()
    assert "model, 80 tokens, ratio 0.2" in page
    assert page.count("<td>sparse</td>") == 2


@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        ("nowhere:f", "target must be MODULE:FUNCTION, got 'nowhere:f': No module"),
        (
            "mm_sparse.cli.main:nothing",
            "target must be MODULE:FUNCTION, got 'mm_sparse.cli.main:nothing'",
        ),
        ("builtins:list", "builtins:list must return a Scene, got list"),
    ],
)
def test_a_wrong_target_is_named(target, wanted):
    with pytest.raises(ValueError, match=wanted):
        scene_of(target, [])


def test_inspect_needs_a_text_for_a_folder(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path)])
    assert "--text must be given for a model in a folder" in capsys.readouterr().err

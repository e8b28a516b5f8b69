"""Pictures of selections and of reports, and the page of `mm-sparse inspect`."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mm_sparse as mms
from mm_sparse.analysis.heatmaps import draw_heads, draw_modalities, modality_densities
from mm_sparse.analysis.html_page import AudioView, InspectionSample, write_page
from mm_sparse.analysis.overlays import (
    draw_frames,
    draw_patches,
    kept_frames,
    kept_share,
    query_boxes,
    save,
)
from mm_sparse.cli.inspect import sample_of, text_sample
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


def test_the_query_patch_and_what_is_asked_for_are_outlined():
    picture = torch.rand(3, 40, 80)
    # Tokens 8 to 15 are the picture, 2 rows of 4: token 13 is row 1, column 1; 3 is text.
    (own,) = boxes = query_boxes([3, 13], 8, (2, 4), picture)
    assert own == (20, 20, 40, 40)
    shares = {"one": torch.zeros(2, 4), "two": torch.ones(2, 4)}
    figure = draw_patches(shares, picture, "Why?\nmodel: a", queries=boxes, asked=(0, 40, 20, 80))
    for axis in figure.axes[:3]:
        bright = [p for p in axis.patches if p.get_linewidth() == 2]
        assert [p.get_bbox().bounds for p in bright] == [
            (19.5, 19.5, 20, 20), (39.5, -0.5, 40, 20),
        ]  # fmt: skip
    assert figure.axes[0].get_title() == "image; cyan: the query; green: asked for"
    assert figure.get_suptitle() == "Why?\nmodel: a"
    plain = draw_patches(shares, picture)
    assert plain.axes[0].get_title() == "image"
    assert not plain.axes[0].patches


def test_a_query_frame_is_a_line():
    figure = draw_frames({"one": torch.rand(40)}, torch.rand(20, 80), 2.0, queries=[10])
    (line,) = figure.axes[1].lines
    assert line.get_xdata()[0] == pytest.approx(10.5 / 40 * 2)
    assert not draw_frames({"one": torch.rand(40)}, torch.rand(20, 80)).axes[1].lines


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
    sample = InspectionSample(
        "A <title>",
        {"language": model},
        lambda: run(model),
        [62, 63],
        {"Question": "1 < 2?"},
        audio=[AudioView(torch.rand(20, 80), 8, 40, 1.6)],
    )
    page = write_page(sample, tmp_path / "new" / "page.html").read_text()
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
    text = "a b " * 300
    out = tmp_path / "page.html"
    assert main(["inspect", str(tmp_path / "model"), "--text", text, "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    page = out.read_text()
    assert "model, 600 tokens, untrained scores, ratio 0.2" in page
    assert "token 599, &#x27;b&#x27;" in page
    assert "sparse says" in page
    assert "the text goes on with" not in page
    assert page.count("<td>sparse</td>") == 2
    assert page.count('<p class="tokens">') == 2
    assert page.count("<mark>b</mark>") == 2
    assert 'title="0%"' in page
    assert 'title="100%"' in page
    # One kind of token: a map of one square is no picture.
    assert "modalities" not in page
    assert "more that no head kept" in page
    folder, options = str(tmp_path / "model"), ["--text", text, "--out", str(out)]
    assert main(["inspect", folder, *options, "--query", "20"]) == 0
    assert "the text goes on with &#x27;b&#x27;" in out.read_text()
    with pytest.raises(ValueError, match=r"query must be a token in \[0, 600\), got 600"):
        text_sample(folder, text, query=600)
    with pytest.raises(SystemExit):
        main(["inspect", folder, *options, "--ratio", "0.3", "--scorers", "smollm2-135m"])
    assert "--ratio must not be given with --scorers" in capsys.readouterr().err


def test_words_must_be_those_of_the_row(tmp_path, model):
    sample = InspectionSample(
        "t", {"language": model}, lambda: run(model), [9], words=["a", "b"]
    )  # fmt: skip
    with pytest.raises(ValueError, match="words must hold the 64 tokens of the row, got 2"):
        write_page(sample, tmp_path / "page.html")


@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        ("nowhere:f", "target must be MODULE:FUNCTION, got 'nowhere:f': No module"),
        (
            "mm_sparse.cli.main:nothing",
            "target must be MODULE:FUNCTION, got 'mm_sparse.cli.main:nothing'",
        ),
        ("builtins:list", "builtins:list must return an InspectionSample, got list"),
    ],
)
def test_a_wrong_target_is_named(target, wanted):
    with pytest.raises(ValueError, match=wanted):
        sample_of(target, [])


def test_inspect_needs_a_text_for_a_folder(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path)])
    assert "--text must be given for a model in a folder" in capsys.readouterr().err

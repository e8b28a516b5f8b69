"""Encoders of four libraries: tokens, specs, sparse and dense, copies, compilation, precision."""

import copy
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import mm_sparse as mms
from mm_sparse.encoders.audio import create_audio_encoder
from mm_sparse.encoders.vision import create_vision_encoder
from mm_sparse.integrations import context
from tests.support.encoder_cases import AUDIOS, NAMES, VISION, VISIONS, build

for needed in ("timm", "open_clip", "torchaudio", "transformers"):
    pytest.importorskip(needed)

SPARSE = mms.SparseConfig(ratio=0.3, dense_below=0, sinks=0, window=0)
WHOLE = mms.SparseConfig(ratio=1.0, dense_below=0)
FEW = ["timm-dinov2", "open_clip-vit", "hf-siglip", "torchaudio-hubert", "torchaudio-conformer",
       "hf-whisper", "hf-wav2vec2"]  # fmt: skip


def seen(tokens: torch.Tensor, spec) -> torch.Tensor:
    """Tokens that are no padding, (n, C)."""
    if spec.lengths is None:
        return tokens.flatten(0, 1)
    return tokens[torch.arange(tokens.shape[1]) < spec.lengths[:, None]]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_whole_ratio_equals_stock_and_densify_restores(name: str) -> None:
    encoder, batch = build(name)
    weights = {key: value.clone() for key, value in encoder.state_dict().items()}
    assert [f"backbone.{key}" for key in encoder.backbone.state_dict()] == list(weights)
    tokens, spec = encoder(*batch)
    mms.sparsify(encoder, WHOLE)
    found, same = encoder(*batch)
    torch.testing.assert_close(seen(found, same), seen(tokens, spec), atol=1e-5, rtol=1e-5)
    rows = mms.report(encoder).rows
    assert len([row for row in rows if row.mode == "sparse"]) >= 2
    assert all(row.mode == "sparse" or row.reason == "cross-attention" for row in rows)
    state = encoder.state_dict()
    assert list(state) == list(weights)
    assert all(state[key].equal(weights[key]) for key in weights)
    mms.densify(encoder)
    assert encoder(*batch)[0].equal(tokens)


@pytest.mark.parametrize("name", VISIONS)
@torch.no_grad()
def test_specs_of_images_and_their_layers(name: str) -> None:
    _, _, changes, prefix, (height, width) = VISIONS[name]
    encoder, batch = build(name, sparse=SPARSE)
    patch = changes.get("patch_size", 16)
    tokens, spec = encoder(*batch)
    grid = (height // patch, width // patch)
    assert (spec.modality, spec.grid, spec.prefix) == (mms.Modality.IMAGE, grid, prefix)
    assert tokens.shape == (2, prefix + grid[0] * grid[1], encoder.width)
    assert encoder.prefix == prefix
    calls: list[context.AttentionCall] = []
    with context.capture_attention(encoder, calls.append):
        encoder(*batch)
    call = calls[0]
    assert call.selection is not None
    layout = call.selection.plan.layout
    assert layout.modality.eq(int(mms.Modality.IMAGE)).all()
    # The layers know the same as the spec, and every tile keeps class and register tokens.
    number = int(layout.segment[0, prefix])
    assert layout.grids[0] == {number: grid}
    assert (layout.segment[:, :prefix] != number).all()
    assert call.selection.to_dense_mask()[..., :prefix].all()
    assert 0.2 < call.selection.density() < 0.6
    encoder.keep_prefix = False
    patches, spec = encoder(*batch)
    assert spec.prefix == 0
    assert patches.equal(tokens[:, prefix:])


@pytest.mark.parametrize("name", AUDIOS)
@torch.no_grad()
def test_specs_of_audio_and_padding(name: str) -> None:
    *_, lengths, frames, rate = AUDIOS[name]
    encoder, batch = build(name, sparse=SPARSE)
    tokens, spec = encoder(*batch)
    assert (spec.modality, spec.rate, encoder.rate) == (mms.Modality.AUDIO, rate, rate)
    assert spec.lengths.tolist() == frames
    assert tokens.shape == (2, max(frames), encoder.width)
    assert spec.seconds.tolist() == pytest.approx([n / encoder.input_rate for n in lengths], 0.03)
    assert encoder(batch[0])[1].lengths is None
    assert mms.report(encoder).rows[0].density < 0.6
    if "hubert" in name:
        # Others hear padding: Whisper by design, norms over time, convolutions of the Conformer.
        noise = batch[0].clone()
        noise[1, lengths[1] :] = 3.0
        torch.testing.assert_close(seen(*encoder(noise, batch[1])), seen(tokens, spec))


@pytest.mark.parametrize("name", FEW)
@torch.no_grad()
def test_copies_and_pickles(name: str) -> None:
    encoder, batch = build(name)
    dense = encoder(*batch)[0]
    mms.sparsify(encoder, SPARSE)
    found = encoder(*batch)[0]
    assert (found - dense).abs().max() > 1e-4
    twins = [copy.deepcopy(encoder)]
    if any(hasattr(module, "parametrizations") for module in encoder.modules()):
        with pytest.raises(RuntimeError, match="Serialization of parametrized modules"):
            pickle.dumps(encoder)  # torch's own limit, on the convolution of positions
    else:
        twins.append(pickle.loads(pickle.dumps(encoder)))
    for twin in twins:
        assert twin(*batch)[0].equal(found)
        assert mms.densify(twin)(*batch)[0].equal(dense)
    assert encoder(*batch)[0].equal(found)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("name", FEW)
@torch.no_grad()
@pytest.mark.thinned(3)
def test_compiled_and_autocast(name: str) -> None:
    encoder, batch = build(name)
    tokens, spec = encoder(*batch)
    mms.sparsify(encoder, WHOLE)
    found, same = torch.compile(encoder, backend="eager")(*batch)
    torch.testing.assert_close(seen(found, same), seen(tokens, spec), atol=1e-5, rtol=1e-5)
    assert (same.grid, same.prefix, same.rate) == (spec.grid, spec.prefix, spec.rate)
    calls: list[context.AttentionCall] = []
    with torch.autocast("cpu", torch.bfloat16), context.capture_attention(encoder, calls.append):
        found, same = encoder(*batch)
    assert all(call.q.dtype == torch.bfloat16 for call in calls if not call.reason)
    found, wanted = seen(found.float(), same), seen(tokens, spec)
    assert (found - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("name", FEW)
def test_gradients_with_and_without_checkpointing(name: str) -> None:
    encoder, batch = build(name)

    def gradients(whole: bool = False) -> dict[str, torch.Tensor]:
        encoder.zero_grad()
        if whole:
            tokens, spec = checkpoint(encoder, *batch, use_reentrant=False)  # pyright: ignore
        else:
            tokens, spec = encoder(*batch)
        seen(tokens, spec).square().mean().backward()
        found = {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}
        assert len(found) > 10
        return found

    stock = gradients()
    mms.sparsify(encoder, WHOLE)
    trials = [gradients(), gradients(whole=True)]
    if name.startswith("torchaudio"):
        with pytest.raises(ValueError, match=r"has none: call the encoder through torch\.utils"):
            encoder.set_grad_checkpointing()
    else:
        encoder.train()
        encoder.set_grad_checkpointing()
        trials.append(gradients())
        encoder.set_grad_checkpointing(False)
    for found in trials:
        for key, value in stock.items():
            torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_same_weights_in_timm_and_transformers_select_the_same() -> None:
    """A ViT of transformers keeps what timm's keeps: prefix and grid are known to both."""
    ours, batch = build("timm-vit")
    other, _ = build("hf-vit", layer_norm_eps=1e-6)
    blocks = zip(ours.backbone.blocks, other.backbone.layers, strict=True)
    names = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
    vit, hf = ours.backbone, other.backbone
    hf.embeddings.cls_token.copy_(vit.cls_token)
    hf.embeddings.position_embeddings.copy_(vit.pos_embed)
    hf.embeddings.patch_embeddings.projection.load_state_dict(vit.patch_embed.proj.state_dict())
    hf.layernorm.load_state_dict(vit.norm.state_dict())
    for block, layer in blocks:
        for mine, theirs in names.items():
            getattr(layer, theirs).load_state_dict(getattr(block, mine).state_dict())
        linears = [m for m in layer.modules() if isinstance(m, torch.nn.Linear)]
        # Query, key, value, output; then the two of the MLP, which have another width: left out.
        for linear, weight, bias in zip(
            linears[:3], block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3), strict=True
        ):
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
        linears[3].load_state_dict(block.attn.proj.state_dict())
        for parameter in (*linears[5].parameters(), *block.mlp.fc2.parameters()):
            parameter.zero_()
    images = batch[0][..., :48]
    torch.testing.assert_close(other(images)[0], ours(images)[0], atol=1e-5, rtol=1e-5)
    mms.sparsify(ours, SPARSE)
    mms.sparsify(other, SPARSE)
    torch.testing.assert_close(other(images)[0], ours(images)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("open_clip-vit", (1, 3, 56, 48), "images must be 48 x 48 pixels, for which alone there"),
        ("timm-vit", (1, 3, 50, 48), "multiples of 4 x 4 pixels, got 50 x 48 for VisionTransfor"),
        ("hf-vit", (1, 3, 50, 48), "multiples of 4 x 4 pixels, got 50 x 48 for ViTModel"),
        ("hf-vit", (1, 1, 48, 48), r"must be \(B, 3, H, W\), got shape \(1, 1, 48, 48\)"),
        ("hf-whisper", (1, 16, 299), r"cut to 300 frames of features \(3 s\).* got 299 for Whisp"),
        ("hf-whisper", (1, 3000), r"features of 3 dimensions, got shape \(1, 3000\)"),
        ("hf-wav2vec2", (1, 1, 3000), r"\(B, samples\), got shape \(1, 1, 3000\)"),
    ],
)
def test_inputs_that_cannot_be_placed_are_refused(name: str, shape, message: str) -> None:
    encoder, _ = build(name)
    with pytest.raises(ValueError, match=message):
        encoder(torch.zeros(shape))


def test_fixed_positions_of_timm_are_refused() -> None:
    encoder, _ = build("timm-vit", dynamic_img_size=False)
    with pytest.raises(ValueError, match="be 48 x 48 pixels, for which alone there are positions"):
        encoder(torch.zeros(1, 3, 48, 56))


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([3001, 5], r"lengths must be in \[1, 3000\], got \[3001, 5\]"),
        ([7], r"lengths must be 2 integers, got torch.int64 of shape \(1,\)"),
        ([0.5, 1.0], "lengths must be 2 integers, got torch.float32"),
    ],
)
def test_lengths_are_checked(lengths, message: str) -> None:
    encoder, batch = build("hf-wav2vec2")
    with pytest.raises(ValueError, match=message):
        encoder(batch[0], torch.tensor(lengths))


@pytest.mark.parametrize(
    ("make", "name", "source", "options", "error", "message"),
    [
        ("vision", "vit", "keras", {}, ValueError, r"source must be one of \['timm', 'open_clip'"),
        ("audio", "whisper", "timm", {}, ValueError, r"one of \['torchaudio', 'transformers'\]"),
        ("audio", "emformer", "torchaudio", {}, ValueError, "must not be an Emformer"),
        ("audio", "tacotron2", "torchaudio", {}, ValueError, "or 'conformer', got 'tacotron2'"),
        ("audio", "tacotron2", "torchaudio", {"pretrained": True}, ValueError, "be a pipeline of"),
        ("vision", "RN-99", "open_clip", {}, ValueError, "be a model of open_clip, got 'RN-99'"),
        ("vision", "RN50", "open_clip", {}, TypeError, "open_clip vision transformer with `trans"),
        ("vision", "ViT-B-32", "open_clip", {"pretrained": True}, ValueError, "one of .*laion2b"),
        ("vision", "vit", "transformers", {"pretrained": True}, ValueError, "model type, which ha"),
        ("vision", "resnet10t", "timm", {}, TypeError, "`patch_embed`, got ResNet without it"),
        ("vision", "bert", "transformers", {"num_hidden_layers": 1}, TypeError, "`pixel_values` a"),
        ("audio", "bert", "transformers", {"num_hidden_layers": 1}, TypeError, "got BertModel wit"),
        ("vision", "vit_tiny_patch16_224", "timm", {"mean": [0.5]}, ValueError, "mean must be thr"),
        ("audio", "conformer", "torchaudio", {"input_rate": 0, "input_dim": 8, "num_heads": 1,
         "ffn_dim": 8, "num_layers": 1, "depthwise_conv_kernel_size": 3}, ValueError, "positive"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_refused(make, name, source, options, error, message) -> None:
    create = {"vision": create_vision_encoder, "audio": create_audio_encoder}[make]
    with pytest.raises(error, match=message):
        create(name, source, **options)


def test_layers_that_cannot_be_served_are_refused_or_listed() -> None:
    from tests.support.encoder_cases import TORCHAUDIO, WAVE

    wavlm = {**TORCHAUDIO, "encoder_num_buckets": 8, "encoder_max_distance": 16}
    for name, source, options, message in (
        ("wavlm_model", "torchaudio", wavlm, r"\(WavLMSelfAttention\).*position bias"),
        ("wavlm", "transformers", WAVE, r"\(WavLMAttention\).*does not dispatch"),
        ("wav2vec2-conformer", "transformers", WAVE, r"\(Wav2Vec2ConformerSelfAttention\).*bias"),
    ):
        with pytest.raises(ValueError, match=message):
            create_audio_encoder(name, source, SPARSE, **options)
        encoder = create_audio_encoder(name, source, SPARSE, strict=False, **options)
        with torch.no_grad():
            found = encoder(torch.zeros(1, 3000))[0]
            assert mms.densify(copy.deepcopy(encoder))(torch.zeros(1, 3000))[0].equal(found)
        assert {row.mode for row in mms.report(encoder).rows} == {"refused"}
    swin = {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}
    with pytest.raises(ValueError, match=r"\(WindowAttention\) cannot run sparse: it computes"):
        create_vision_encoder("swin_tiny_patch4_window7_224", "timm", SPARSE, image_size=32, **swin)


@torch.no_grad()
def test_a_folder_of_transformers_weights(tmp_path) -> None:
    from transformers import CLIPConfig, CLIPModel, ViTImageProcessor

    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 48, "vocab_size": 60}  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION)).eval()
    model.save_pretrained(tmp_path)
    ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4] * 3).save_pretrained(tmp_path)
    encoder = create_vision_encoder(str(tmp_path), "transformers", pretrained=True)
    assert encoder.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    images = torch.rand(1, 3, 48, 48)
    wanted = model.vision_model((images - encoder.mean) / encoder.std).last_hidden_state
    torch.testing.assert_close(encoder(images)[0], wanted)

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mm_sparse as mms
from tests.support.packed_towers import TOWERS, Case

pytest.importorskip("transformers")

# So many tokens that some sequences of each tower are shorter and some longer.
BETWEEN = 49
FORMS = {
    "sparse": mms.SparseConfig(ratio=1.0, dense_below=0),
    "mixed": mms.SparseConfig(ratio=1.0, dense_below=BETWEEN),
    "short": mms.SparseConfig(ratio=0.1, dense_below=10**6),
    "dense": mms.SparseConfig(ratio=0.1, backend="dense"),
}


def built(name: str) -> Case:
    torch.manual_seed(0)
    tower, inputs = TOWERS[name]()
    return tower.eval(), inputs


def outputs(tower: nn.Module, inputs: dict[str, Any]) -> Tensor:
    out = tower(**inputs)
    return out[0] if isinstance(out, tuple) else out.last_hidden_state


def attention_calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts calls of attention by name of the layer."""
    from transformers import AttentionInterface

    from mm_sparse.integrations.hf import attention

    counts: Counter[str] = Counter()

    def counted(module: Any, *args: Any, **options: Any) -> Any:
        counts[vars(module)["_mm_sparse_layer"].name] += 1
        return attention.attention_forward(module, *args, **options)

    monkeypatch.setitem(AttentionInterface._global_mapping, "mm_sparse_flash", counted)
    return counts


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_equals_stock_in_one_call_a_layer(
    name: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower, inputs = built(name)
    want = outputs(tower, inputs)
    mms.sparsify(tower, FORMS[form])
    counts = attention_calls(monkeypatch)
    found = outputs(tower, inputs)
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)
    assert len(counts) == 2
    assert set(counts.values()) == {1}
    modes = {row.mode for row in mms.report(tower).rows}
    assert modes <= {"sparse": {"sparse"}, "mixed": {"sparse", "dense"}}.get(form, {"dense"})
    assert "sparse" in modes or form in ("short", "dense")
    mms.densify(tower)
    torch.testing.assert_close(outputs(tower, inputs), want, atol=0, rtol=0)


@pytest.mark.parametrize("form", ["sparse", "mixed", "short"])
@pytest.mark.parametrize("name", TOWERS)
def test_gradients_equal_stock(name: str, form: str) -> None:
    tower, inputs = built(name)
    outputs(tower, inputs).square().mean().backward()
    want = {n: p.grad.clone() for n, p in tower.named_parameters() if p.grad is not None}
    tower.zero_grad()
    mms.sparsify(tower, FORMS[form])
    outputs(tower, inputs).square().mean().backward()
    for name_, parameter in tower.named_parameters():
        if name_ in want:
            torch.testing.assert_close(parameter.grad, want[name_], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_few_keys_stay_in_their_own_image(name: str) -> None:
    """What another image holds changes nothing of this one's tokens."""
    tower, inputs = built(name)
    mms.sparsify(tower, mms.SparseConfig(ratio=0.3, dense_below=0, unit=16))
    # Towers give merged tokens: half of the first sequence is before the second in any case.
    (pixels,) = (key for key, x in inputs.items() if x.is_floating_point())
    first = outputs(tower, inputs)
    changed = inputs[pixels].clone()
    if pixels == "input_features":
        changed[:, 160:] += 1.0
    elif changed.dim() == 4:
        changed[1:] += 1.0
    else:
        changed[192:] += 1.0
    other = outputs(tower, {**inputs, pixels: changed})
    first, other = (x.flatten(0, -2) for x in (first, other))
    same = (first - other).abs().amax(-1) == 0
    assert bool(same[:30].all())
    assert not bool(same[-6:].any())


@pytest.mark.parametrize("kind", [{"use_reentrant": False}, {"use_reentrant": True}])
def test_checkpointed_blocks_are_computed_alike(kind: dict[str, bool]) -> None:
    tower, inputs = built("qwen2_5_vl")
    mms.sparsify(tower, FORMS["mixed"])
    outputs(tower, inputs).square().mean().backward()
    want = [p.grad.clone() for p in tower.parameters() if p.grad is not None]
    tower.zero_grad()
    tower.train().gradient_checkpointing_enable(kind)
    inputs["hidden_states"].requires_grad_()
    outputs(tower, inputs).square().mean().backward()
    found = [p.grad for p in tower.parameters() if p.grad is not None]
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_pixtral_makes_no_mask_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.pixtral import modeling_pixtral

    tower, inputs = built("pixtral")
    want = outputs(tower, inputs)

    def refused(*_: Any) -> None:
        raise AssertionError("a mask of all pairs was made")

    monkeypatch.setattr(modeling_pixtral, "generate_block_attention_mask", refused)
    mms.sparsify(tower, FORMS["sparse"])
    torch.testing.assert_close(outputs(tower, inputs), want, atol=1e-5, rtol=1e-5)
    without_sizes = {"pixel_values": inputs["pixel_values"]}
    assert outputs(tower, without_sizes).shape[-2] == 3 * 400


@torch.no_grad()
def test_blocks_compile_one_by_one() -> None:
    tower, inputs = built("qwen2_5_vl")
    want = outputs(tower, inputs)
    mms.sparsify(tower, FORMS["mixed"])
    for block in tower.blocks:
        block.compile(backend="eager")
    torch.testing.assert_close(outputs(tower, inputs), want, atol=1e-5, rtol=1e-5)

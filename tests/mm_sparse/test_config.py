"""The record of what to keep: what it refuses, and that it survives JSON."""

import copy
import dataclasses
import json
import os
import pickle
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st

import mm_sparse as mms
from mm_sparse import Modality, SparseConfig
from tests.support.layouts import FEW, configs

MODALITIES = "modalities among TEXT, IMAGE, AUDIO, VIDEO"


@given(configs(), st.sampled_from(["auto", "triton", "torch", "dense"]), st.integers(1, 9))
@FEW
def test_json_gives_an_equal_config_back(
    config: SparseConfig, backend: str, query_pools: int
) -> None:
    config = dataclasses.replace(
        config, backend=backend, query_pools=query_pools, dense_layers=(0, 3), dense_below=None
    )
    back = SparseConfig.from_json(config.to_json())
    assert back == config
    assert hash(back) == hash(config)
    assert back.floors() == config.floors()
    assert all(isinstance(m, Modality) for m in back.bidirectional)


def test_json_is_one_line_of_plain_names() -> None:
    config = SparseConfig(modality_floor={Modality.IMAGE: 0.25}, bidirectional=(Modality.AUDIO,))
    text = config.to_json()
    assert "\n" not in text
    record = json.loads(text)
    assert record["modality_floor"] == {"IMAGE": 0.25}
    assert record["bidirectional"] == ["AUDIO"]
    assert set(record) == {f.name for f in dataclasses.fields(SparseConfig)} | {"modalities"}


def test_json_with_an_unknown_field_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("SparseConfig only, got also ['ratoi']")):
        SparseConfig.from_json('{"ratoi": 0.2}')


def test_json_of_a_bad_value_is_refused_with_the_name_of_the_field() -> None:
    with pytest.raises(ValueError, match=re.escape("ratio must be in (0, 1], got 2")):
        SparseConfig.from_json('{"ratio": 2}')


@pytest.mark.parametrize("text", ["[]", "3", '"ratio"'])
def test_json_that_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="text must hold a JSON object"):
        SparseConfig.from_json(text)


@pytest.mark.parametrize(
    ("field", "value", "kind", "message"),
    [
        ("ratio", 0, ValueError, "ratio must be in (0, 1], got 0"),
        ("ratio", 1.5, ValueError, "ratio must be in (0, 1], got 1.5"),
        ("ratio", -0.1, ValueError, "ratio must be in (0, 1], got -0.1"),
        ("ratio", float("nan"), ValueError, "ratio must be in (0, 1], got nan"),
        ("ratio", "0.2", TypeError, "ratio must be a number, got '0.2'"),
        ("ratio", True, TypeError, "ratio must be a number, got True"),
        ("ratio", None, TypeError, "ratio must be a number, got None"),
        ("top_p", 0.0, ValueError, "top_p must be in (0, 1], got 0.0"),
        ("top_p", 1.01, ValueError, "top_p must be in (0, 1], got 1.01"),
        ("top_p", "all", TypeError, "top_p must be a number, got 'all'"),
        ("tokens", 0, ValueError, "tokens must be at least 1, got 0"),
        ("tokens", 12.0, TypeError, "tokens must be an int, got 12.0"),
        ("tokens", True, TypeError, "tokens must be an int, got True"),
        ("tile", 32, ValueError, "tile must be one of (64, 128), got 32"),
        ("tile", 64.0, ValueError, "tile must be one of (64, 128), got 64.0"),
        ("unit", 8, ValueError, "unit must be one of (16, 32, 64, 128), got 8"),
        ("causal", 1, TypeError, "causal must be a bool, got 1"),
        ("patch_order", "2d", TypeError, "patch_order must be a bool, got '2d'"),
        ("bidirectional", (7,), ValueError, f"bidirectional must name {MODALITIES}, got 7"),
        ("bidirectional", ("SMELL",), ValueError, f"{MODALITIES}, got 'SMELL'"),
        ("bidirectional", 1, TypeError, "bidirectional must be a sequence of modalities, got 1"),
        ("bidirectional", "IMAGE", TypeError, "must be a sequence of modalities, got 'IMAGE'"),
        ("sinks", -1, ValueError, "sinks must be at least 0, got -1"),
        ("sinks", 4.5, TypeError, "sinks must be an int, got 4.5"),
        ("window", -8, ValueError, "window must be at least 0, got -8"),
        ("window", "all", TypeError, "window must be an int, got 'all'"),
        ("modality_floor", -0.1, ValueError, "modality_floor must be in [0, 1], got -0.1"),
        ("modality_floor", 0.4, ValueError, "modality_floor must add up to at most 1"),
        ("modality_floor", "0.1", TypeError, "modality_floor must be a number, got '0.1'"),
        ("modality_floor", {"IMAGE": 2}, ValueError, "modality_floor must be in [0, 1], got 2"),
        ("modality_floor", {"SMELL": 0.1}, ValueError, f"{MODALITIES}, got 'SMELL'"),
        (
            "modality_floor",
            {"IMAGE": 0.6, "TEXT": 0.6},
            ValueError,
            "modality_floor must add up to at most 1 over modalities",
        ),
        ("head_ratio", 0.2, TypeError, "head_ratio must be a sequence of numbers, got 0.2"),
        ("head_ratio", (0.2, 0), ValueError, "head_ratio must be in (0, 1], got 0"),
        ("layer_ratio", {0: ()}, ValueError, "layer_ratio must have a ratio for layer 0, got none"),
        ("layer_ratio", {0: (0.2, 2)}, ValueError, "layer_ratio must be in (0, 1], got 2"),
        ("layer_ratio", {0: "0.2"}, TypeError, "layer_ratio must be a number, got '0.2'"),
        ("query_ratio", 0.2, TypeError, "query_ratio must map modalities to ratios, got 0.2"),
        ("query_ratio", {"SMELL": 0.1}, ValueError, f"{MODALITIES}, got 'SMELL'"),
        ("query_ratio", {"TEXT": 0}, ValueError, "query_ratio must be in (0, 1], got 0"),
        ("query_ratio", {"TEXT": ()}, ValueError, "query_ratio must have a ratio for TEXT, got"),
        (
            "query_ratio",
            {"TEXT": (0.1, 0.2), "IMAGE": (0.1,)},
            ValueError,
            "query_ratio must be for as many KV heads in every modality, and as",
        ),
        (
            "layer_ratio",
            {3: {"TEXT": (0.1, 0.2), "IMAGE": (0.1,)}},
            ValueError,
            "layer_ratio must be for as many KV heads in every modality of layer 3, got [1, 2]",
        ),
        (
            "query_ratio",
            {"TEXT": {Modality.IMAGE: 0.2}},
            TypeError,
            "query_ratio must have a ratio",
        ),
        ("query_ratio", {"TEXT": {0.2, 0.3}}, TypeError, "query_ratio must be in the order of KV"),
        ("query_ratio", {True: 0.2}, TypeError, "query_ratio must name modalities, got True"),
        ("query_ratio", {"IMAGE": 0.2, 1: 0.3}, ValueError, "query_ratio must name IMAGE once"),
        ("query_ratio", {"TEXT": torch.tensor(0.2)}, TypeError, "query_ratio must be a sequence"),
        ("layer_ratio", {"3": 0.2, 3: 0.3}, ValueError, "layer_ratio must name layer 3 once"),
        ("head_ratio", {Modality.IMAGE: 0.2}, TypeError, "head_ratio must be a sequence of numb"),
        ("layer_ratio", {3: {"TEXT": "a"}}, TypeError, "layer_ratio must be a number, got 'a'"),
        ("layer_ratio", {3: {}}, ValueError, "layer_ratio must have a ratio for layer 3, got none"),
        ("sample_ratio", -0.1, ValueError, "sample_ratio must be in [0, 1], got -0.1"),
        (
            "sample_ratio",
            1.0,
            ValueError,
            "sample_ratio must leave a share of the budget to the best",
        ),
        ("sample_ratio", "half", TypeError, "sample_ratio must be a number, got 'half'"),
        ("query_pools", 0, ValueError, "query_pools must be at least 1, got 0"),
        ("query_pools", 2.0, TypeError, "query_pools must be an int, got 2.0"),
        ("reduce", "sum", ValueError, "reduce must be one of ('mean', 'max'), got 'sum'"),
        ("dense_below", -1, ValueError, "dense_below must be at least 0, got -1"),
        ("dense_below", 1.0, TypeError, "dense_below must be an int, got 1.0"),
        ("dense_layers", (0, -1), ValueError, "dense_layers must be at least 0, got -1"),
        ("dense_layers", ("0",), TypeError, "dense_layers must be an int, got '0'"),
        ("deterministic", 1, TypeError, "deterministic must be a bool or None, got 1"),
        ("dense_layers", 3, TypeError, "dense_layers must be a sequence of ints or names, got 3"),
        (
            "backend",
            "cuda",
            ValueError,
            "backend must be one of ('auto', 'triton', 'torch', 'dense'), got 'cuda'",
        ),
    ],
    ids=lambda x: repr(x) if not isinstance(x, (type, str)) else None,
)
def test_a_bad_field_is_refused_by_name(
    field: str, value: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        SparseConfig(**{field: value})


def test_a_sample_needs_a_fixed_budget() -> None:
    with pytest.raises(ValueError, match=re.escape("and be 0 with top_p, got 0.5 with top_p=0.9")):
        SparseConfig(top_p=0.9, sample_ratio=0.5)
    assert SparseConfig.from_json(SparseConfig(sample_ratio=0.5).to_json()).sample_ratio == 0.5


def test_one_floor_holds_for_every_modality() -> None:
    assert SparseConfig(modality_floor=0.2).floors() == dict.fromkeys(Modality, 0.2)


def test_floors_by_modality_take_names_numbers_and_members() -> None:
    for key in ("IMAGE", 1, Modality.IMAGE):
        assert SparseConfig(modality_floor={key: 0.5}).floors() == {Modality.IMAGE: 0.5}


def test_floors_of_zero_are_left_out() -> None:
    assert SparseConfig().floors() == {}
    assert SparseConfig(modality_floor={Modality.TEXT: 0, Modality.AUDIO: 0.3}).floors() == {
        Modality.AUDIO: 0.3
    }


def test_bidirectional_takes_names() -> None:
    assert SparseConfig(bidirectional=["IMAGE", 2]).bidirectional == (
        Modality.IMAGE,
        Modality.AUDIO,
    )


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SparseConfig().ratio = 0.5  # type: ignore[misc]


def test_a_mapping_given_as_floor_is_copied() -> None:
    floor = {Modality.IMAGE: 0.5}
    config = SparseConfig(modality_floor=floor)
    before = hash(config)
    floor[Modality.IMAGE] = 0.9
    assert config.floors() == {Modality.IMAGE: 0.5}
    assert hash(config) == before


def test_equal_configs_are_one_key_of_a_dict() -> None:
    some = {SparseConfig(ratio=0.3, modality_floor={"TEXT": 0.1}): 1}
    assert some[SparseConfig(ratio=0.3, modality_floor={Modality.TEXT: 0.1})] == 1
    assert SparseConfig(ratio=0.4) not in some


def test_numbers_that_are_equal_hash_alike() -> None:
    assert SparseConfig(ratio=1) == SparseConfig(ratio=1.0)
    assert hash(SparseConfig(ratio=1)) == hash(SparseConfig(ratio=1.0))
    one, other = ({"TEXT": 0.1, "IMAGE": 0.2}, {"IMAGE": 0.2, "TEXT": 0.1})
    assert SparseConfig(modality_floor=one) == SparseConfig(modality_floor=other)
    assert hash(SparseConfig(modality_floor=one)) == hash(SparseConfig(modality_floor=other))


def test_modalities_keep_their_numbers() -> None:
    numbers = {"TEXT": 0, "IMAGE": 1, "AUDIO": 2, "VIDEO": 3}
    assert {m.name: int(m) for m in mms.Modality} == numbers


def without_video(config: SparseConfig) -> str:
    """JSON as it was written when there were three modalities."""
    record = json.loads(config.to_json())
    assert record.pop("modalities") == [m.name for m in Modality]
    return json.dumps(record)


def test_json_of_three_modalities_says_of_video_what_it_says_of_images() -> None:
    floors = {Modality.TEXT: 0.4, Modality.IMAGE: 0.6}
    old = SparseConfig(modality_floor=floors, bidirectional=(Modality.IMAGE, Modality.AUDIO))
    found = SparseConfig.from_json(without_video(old))
    assert found.floors() == {**floors, Modality.VIDEO: 0.6}
    assert found.bidirectional == (Modality.IMAGE, Modality.AUDIO, Modality.VIDEO)
    assert SparseConfig.from_json(found.to_json()) == found
    assert SparseConfig.from_json(old.to_json()) == old
    for config in (
        SparseConfig(bidirectional=()),
        SparseConfig(modality_floor={"AUDIO": 1.0}, bidirectional=("AUDIO",)),
        SparseConfig(modality_floor=1 / 3),
        SparseConfig.preset("text"),
    ):
        assert SparseConfig.from_json(without_video(config)) == config
    assert SparseConfig.from_json("{}") == SparseConfig()


def test_floors_of_images_and_of_video_count_once() -> None:
    floors = {"TEXT": 0.5, "IMAGE": 0.5, "VIDEO": 0.4}
    assert len(SparseConfig(modality_floor=floors).floors()) == 3
    with pytest.raises(ValueError, match="modality_floor must add up to at most 1"):
        SparseConfig(modality_floor={"TEXT": 0.5, "VIDEO": 0.6})


def test_ratios_of_heads_survive_json_and_become_those_of_their_layer() -> None:
    config = SparseConfig(0.2, layer_ratio={3: (0.1, 0.4), 5: 0.3}, head_ratio=(0.2, 0.3))
    back = SparseConfig.from_json(config.to_json())
    assert back == config
    assert hash(back) == hash(config)
    assert back.of_layer(3) == dataclasses.replace(
        config, ratio=0.25, head_ratio=(0.1, 0.4), layer_ratio={}
    )
    assert back.of_layer(5) == dataclasses.replace(config, ratio=0.3, head_ratio=(), layer_ratio={})
    assert back.of_layer(4) == dataclasses.replace(config, layer_ratio={})


def test_ratios_by_modality_survive_json_and_become_those_of_their_layer() -> None:
    kinds = {Modality.TEXT: (0.4, 0.8), Modality.IMAGE: 0.05}
    config = SparseConfig(0.2, layer_ratio={3: kinds, 5: 0.3}, query_ratio={"AUDIO": 0.1})
    back = SparseConfig.from_json(config.to_json())
    assert back == config
    assert hash(back) == hash(config)
    assert back.query_ratio == {Modality.AUDIO: 0.1}
    own = back.of_layer(3)
    assert own == dataclasses.replace(config, query_ratio=kinds, layer_ratio={})
    assert own.ratio_table[Modality.IMAGE] == (0.05, 0.05)
    assert own.ratio_table[Modality.AUDIO] == own.ratio_table[-1] == (0.2, 0.2)
    assert own.head_counts == {2}
    # A layer's own budgets are all that hold there.
    assert back.of_layer(5) == SparseConfig(0.3)
    assert back.of_layer(4) == dataclasses.replace(config, layer_ratio={})


def test_a_record_from_before_ratios_by_modality_is_the_same_config() -> None:
    config = SparseConfig(0.2, layer_ratio={3: (0.1, 0.4)}, head_ratio=(0.2, 0.3))
    record = json.loads(config.to_json())
    del record["query_ratio"]
    assert SparseConfig.from_json(json.dumps(record)) == config


def test_all_budgets_are_scaled_alike() -> None:
    kinds = {Modality.TEXT: (0.4, 0.8), Modality.IMAGE: 0.04}
    config = SparseConfig(0.2, layer_ratio={3: kinds}, query_ratio=kinds)
    for part in (config.scaled(0.1).query_ratio, config.scaled(0.1).layer_ratio[3]):
        assert part == {Modality.TEXT: (0.2, 0.4), Modality.IMAGE: 0.02}
    assert config.scaled(0.4).query_ratio[Modality.TEXT] == (0.8, 1.0)
    candidates = dataclasses.replace(config, coarse_factor=2, coarse_budget=2.0).for_candidates()
    assert candidates.query_ratio == {Modality.TEXT: (0.8, 1.0), Modality.IMAGE: 0.08}


@pytest.mark.parametrize("ratio", ["0.1", None, True])
def test_no_other_than_a_number_scales(ratio) -> None:
    with pytest.raises(TypeError, match="ratio must be a number, got"):
        SparseConfig(0.2).scaled(ratio)


def test_a_sample_takes_its_share_of_every_budget() -> None:
    config = SparseConfig(0.2, query_ratio={"TEXT": (0.4, 0.8), "IMAGE": 0.04}, sample_ratio=0.5)
    best = config.for_best()
    assert (best.ratio, best.sample_ratio) == (0.1, 0.0)
    assert best.query_ratio == {Modality.TEXT: (0.2, 0.4), Modality.IMAGE: 0.02}


def test_a_hash_that_was_found_is_not_taken_to_another_process() -> None:
    config = SparseConfig(ratio=0.3, modality_floor={Modality.TEXT: 0.1}, dense_layers=("a",))
    before = hash(config)
    script = (
        "import pickle, sys; from mm_sparse import Modality, SparseConfig;"
        "found = pickle.load(sys.stdin.buffer);"
        "made = SparseConfig(ratio=0.3, modality_floor={Modality.TEXT: 0.1}, dense_layers=('a',));"
        "print(hash(found) == hash(made) and {made: 1}[found])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", script], input=pickle.dumps(config), capture_output=True,
        env=environment, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == b"1"
    assert hash(pickle.loads(pickle.dumps(config))) == before == hash(copy.deepcopy(config))
    assert hash(dataclasses.replace(config, ratio=0.2)) != before


@pytest.mark.parametrize(
    ("former", "name", "value"),
    [
        ("mass", "top_p", 0.9),
        ("sampled", "sample_ratio", 0.25),
        ("coarse", "coarse_factor", 4),
        ("subpools", "query_pools", 2),
        ("grid_order", "patch_order", False),
    ],
)
def test_former_names_of_fields_load_from_json_only(former: str, name: str, value: Any) -> None:
    want = SparseConfig(**{name: value})
    assert SparseConfig.from_json(json.dumps({former: value})) == want
    record = json.loads(want.to_json())
    assert former not in record
    record[former] = record.pop(name)
    assert SparseConfig.from_json(json.dumps(record)) == want
    with pytest.raises(TypeError, match=former):
        SparseConfig(**{former: value})


@pytest.mark.parametrize("kind", ["text", "vision", "audio"])
def test_presets_are_configs_with_changes(kind: str) -> None:
    preset = SparseConfig.preset(kind)
    assert isinstance(preset, SparseConfig)
    assert preset.causal == (kind == "text")
    other = SparseConfig.preset(kind, ratio=0.05, dense_below=7)
    assert other == dataclasses.replace(preset, ratio=0.05, dense_below=7)
    assert SparseConfig.from_json(preset.to_json()) == preset


def test_a_preset_that_is_none_is_refused_with_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"kind must be one of .*'vision'.*, got 'video'"):
        SparseConfig.preset("video")
    with pytest.raises(TypeError, match="ratoi"):
        SparseConfig.preset("text", ratoi=1)

"""Phases: their order on models of several kinds, files there and back, and each thing that is wrong with one."""

import pytest
import yaml
from torch import nn

from lightning_ft.engine.freezing import parameters_named
from lightning_ft.engine.unfreezing_schedule import (
    Phase,
    depth_factors,
    entries_of,
    gradual_phases,
    read_schedule,
    shortest_names,
    thawing_order,
    write_schedule,
)
from lightning_ft.functional.errors import Refusal
from tests.engine.test_model_parts import MODELS

ORDERS = {
    "llama": [["lm_head"], ["model.layers.1", "model.norm"], ["model.layers.0"], ["model.embed_tokens"]],
    "llama_tied": [["lm_head"], ["model.layers.1", "model.norm"], ["model.layers.0"]],
    "gpt2": [
        ["lm_head"],
        ["transformer.h.1", "transformer.ln_f"],
        ["transformer.h.0"],
        ["transformer.wte", "transformer.wpe"],
    ],
    "bert": [["classifier"], ["bert.encoder.layer.1", "bert.pooler"], ["bert.encoder.layer.0"], ["bert.embeddings"]],
    "plain": [["fc"], ["stages.2"], ["stages.1"], ["stages.0"], ["stem"]],
}


@pytest.mark.parametrize("kind", ORDERS)
def test_order(kind):
    assert thawing_order(MODELS[kind]()) == ORDERS[kind]


def test_order_of_two_stacks():
    order = thawing_order(MODELS["t5_untied"]())
    assert order[0] == ["lm_head"] and order[-1] == ["shared"]
    assert {"encoder.block.1", "decoder.block.1", "decoder.final_layer_norm"} <= set(order[1])
    assert order[2] == ["encoder.block.0", "decoder.block.0"]


@pytest.mark.parametrize("kind", MODELS)
def test_every_parameter_thaws_once(kind):
    model = MODELS[kind]()
    seen = [id(p) for part in thawing_order(model) for p in parameters_named(model, part).values()]
    assert set(seen) == {id(p) for p in model.parameters()}
    tied = len(set(seen)) < len(list(model.named_parameters(remove_duplicate=False)))
    assert tied or len(seen) == len(set(seen))


def test_order_with_other_values():
    model = MODELS["plain"]()
    assert thawing_order(model, groups=2) == [["fc"], ["stages.1", "stages.2"], ["stages.0"], ["stem"]]
    assert thawing_order(model, layers="-1:") == [["fc"], ["stages.2"], ["stem"]]
    assert thawing_order(model, embeddings=False)[-1] == ["stages.0"]
    with pytest.raises(Refusal, match="LSTM has no numbered blocks to thaw one after the other; write a schedule"):
        thawing_order(nn.LSTM(2, 2))


def test_a_backbone_without_head_begins_with_what_is_named():
    backbone = MODELS["bert"]().bert
    phases = gradual_phases(backbone, every=2, unit="epoch", start=["pooler"])
    assert [(phase.at, phase.train) for phase in phases[:2]] == [(0, ("pooler",)), (2, ("encoder.layer.1", "pooler"))]
    assert gradual_phases(backbone, every=2, unit="epoch")[0].at == 2


def test_phases_are_a_function_of_step_and_epoch():
    phases = gradual_phases(MODELS["plain"](), every=3, unit="step", start=["stem"])
    assert phases[0] == Phase(0, "step", ("fc", "stem"))
    assert [phase.at for phase in phases] == [0, 3, 6, 9, 12]
    assert [sum(phase.is_open(step, 99) for phase in phases) for step in (0, 2, 3, 5, 6, 100)] == [1, 1, 2, 2, 3, 5]
    assert Phase(2, "epoch", ("a",)).is_open(0, 2) and not Phase(2, "epoch", ("a",)).is_open(99, 1)


def test_names_mean_exactly_what_they_stand_for():
    net = nn.ModuleDict({"norm": nn.LayerNorm(2), "inner": nn.ModuleDict({"norm": nn.LayerNorm(2)})})
    assert list(parameters_named(net, "norm")) == ["norm.weight", "norm.bias", "inner.norm.weight", "inner.norm.bias"]
    (name,) = shortest_names(net, ["norm.weight", "norm.bias"])
    assert list(parameters_named(net, name)) == ["norm.weight", "norm.bias"]
    assert shortest_names(net, ["norm.weight", "inner.norm.bias"])[1] == "inner.norm.bias"


def test_depth_factors_against_the_formula():
    decay = 1 / 2.6
    factors = depth_factors(MODELS["bert"](), decay)
    for name, factor in factors.items():
        if name.startswith("classifier") or ".pooler." in name:
            depth = 0
        elif ".embeddings." in name:
            depth = 3  # below two blocks
        else:
            depth = 2 - int(name.split(".")[3])
        assert factor == pytest.approx(1.0 / 2.6**depth, rel=1e-12), name
    assert set(depth_factors(MODELS["llama"](), 1.0).values()) == {1.0}
    two = depth_factors(MODELS["t5_untied"](), 0.5)
    assert {two[n] for n in two if n.startswith(("encoder.block.0", "decoder.block.0"))} == {0.25}
    assert two["shared.weight"] == 0.125 and two["lm_head.weight"] == 1.0


def test_a_file_there_and_back(tmp_path):
    phases = gradual_phases(MODELS["gpt2"](), every=2, unit="step")
    path = tmp_path / "schedule.yaml"
    path.write_text(write_schedule(phases))
    assert read_schedule(path) == read_schedule(str(path)) == read_schedule(entries_of(phases)) == phases
    assert [set(entry) for entry in yaml.safe_load(path.read_text())] == [{"at", "unit", "train"}] * 4


def entry(**fields):
    return {"at": 0, "train": ["a"], **fields}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], r"The schedule must be a list of entries with at and train, got \[\]\."),
        ("a: 1", r"The schedule .*s\.yaml must be a list of entries with at and train, got {'a': 1}\."),
        ("- {at: 1", r"The schedule .*s\.yaml, line 1, is not YAML: "),
        (["a"], r"entry 1, must be a mapping with at and train, got 'a'\."),
        ([entry(until=3)], r"entry 1, has an unknown key 'until'; there are at, unit, train\."),
        ([{"at": 0}], r"entry 1, lacks train; it needs at and train\."),
        ([entry(), entry(at=-1)], r"entry 2, must be at a whole number, at least 0, got -1\."),
        ([entry(at=1.5)], r"entry 1, must be at a whole number, at least 0, got 1\.5\."),
        ([entry(unit="week")], r"entry 1, has the unit 'week'; it is step or epoch\."),
        ([entry(train="lm_head")], r"entry 1, must train a list of names, got 'lm_head'\."),
        ([entry(train=[])], r"entry 1, must train a list of names, got \[\]\."),
        ([entry(train=[3])], r"entry 1, names 3, which is no name; put it in quotes\."),
        ([entry(at=2), entry(at=1)], r"entry 2, is at 1, not after the entry before it, which is at 2; order"),
        ([entry(), entry()], r"entry 2, is at 0, not after .* join those of one time\."),
        ([entry(unit="step"), entry(at=1, unit="epoch")], r"entry 2, counts in epochs, the first in steps; use one\."),
    ],
)
def test_what_is_wrong_is_one_sentence(given, words, tmp_path):
    if isinstance(given, str):
        (tmp_path / "s.yaml").write_text(given)
        given = tmp_path / "s.yaml"
    with pytest.raises(Refusal, match=words) as caught:
        read_schedule(given)
    assert "\n" not in str(caught.value)


def test_a_missing_file_says_how_to_write_one(tmp_path):
    with pytest.raises(Refusal, match="There is no schedule .*no.yaml; write one with: lightning-ft schedule"):
        read_schedule(tmp_path / "no.yaml")

"""Settings: what is refused, and the JSON round trip."""

import json

import pytest

from anybits.config import DataAware, Recipe, StoredConfig, parse_precisions
from anybits.errors import AnybitsError


def test_precisions_are_read_from_ranges_and_lists() -> None:
    assert parse_precisions("2-4") == (2, 3, 4)
    assert parse_precisions("8,2, 3") == (2, 3, 8)
    assert parse_precisions("3") == (3,)


@pytest.mark.parametrize("text", ["", "two", "1-3", "2-9", "4-2", "0", "2,,3", "-1"])
def test_other_precisions_are_refused(text: str) -> None:
    with pytest.raises(AnybitsError, match="precisions"):
        parse_precisions(text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "gptq"}, "method 'gptq' is unknown: choose anybcq or any-precision"),
        ({"preset": "slow"}, "preset 'slow' is unknown"),
        ({"group_size": 100}, "group size 100 does not fit"),
        ({"group_size": 0}, "group size 0 does not fit"),
        ({"group_size": -32}, "group size -32 does not fit"),
        ({"precisions": (4, 2)}, "ascending"),
        ({"samples": 0}, "samples is 0"),
        ({"steps": -1}, "steps is -1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(AnybitsError, match=message):
        Recipe(**settings)  # type: ignore[arg-type]


def stored() -> StoredConfig:
    return StoredConfig("anybcq", (2, 3, 4), ("model.layers.*.mlp.up_proj",), 128, False, recipe={"seed": 1})


def test_stored_config_survives_json() -> None:
    again = StoredConfig.from_dict(json.loads(json.dumps(stored().to_dict())))
    assert again == stored()
    assert again.to_dict()["quant_method"] == "anybits"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "this is not an anybits checkpoint"),
        ({"format_version": 3}, "format version 3, and this anybits reads versions 1 and 2"),
        ({"method": "awq"}, "method 'awq' is unknown"),
        ({"group_size": 33}, "group size 33 does not fit"),
        ({"group_size": None}, "needs a group_size"),
        ({"precisions": [2, 2]}, "ascending"),
        ({"precisions": 4}, "precisions .* must be a list"),
        ({"surprise": 1}, "unknown .'surprise'. fields"),
    ],
)
def test_unreadable_stored_configs_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(AnybitsError, match=message):
        StoredConfig.from_dict(stored().to_dict() | change)


def test_targets_match_whole_names_with_stars_for_one_part() -> None:
    config = stored()
    assert config.is_target("model.layers.11.mlp.up_proj")
    assert not config.is_target("model.layers.11.mlp.down_proj")
    assert not config.is_target("x.model.layers.11.mlp.up_proj")
    assert not config.is_target("model.layers.1.1.mlp.up_proj")


def test_up_to_drops_higher_precisions() -> None:
    assert stored().up_to(3).precisions == (2, 3)
    with pytest.raises(AnybitsError, match="precision 5 is not stored: choose one of 2, 3, 4"):
        stored().up_to(5)


def test_much_text_runs_every_other_batch_where_that_is_enough() -> None:
    much = Recipe(precisions=(2, 3, 4), samples=128, seq_len=512)
    assert [much.every(p) for p in (2, 3, 4, None)] == [1, 2, 2, 2]
    little = Recipe(precisions=(2, 3, 4), samples=127, seq_len=512)
    best = Recipe(precisions=(2, 3, 4), samples=1000, preset="best")
    whole = Recipe(precisions=(2, 3, 4), samples=1000, data_aware=DataAware(thinning=1))
    assert {recipe.every(p) for recipe in (little, best, whole) for p in (2, 3, 4, None)} == {1}
    assert Recipe(precisions=(2, 3, 4), samples=1000, data_aware=DataAware(thinning=5)).every(4) == 5


@pytest.mark.parametrize("tokens", [-1, 1000, float("nan")])
def test_an_expert_needs_a_sensible_number_of_tokens(tokens: float) -> None:
    with pytest.raises(AnybitsError, match="expert_tokens is .*: it must not be negative, and below 1000"):
        DataAware(expert_tokens=tokens)

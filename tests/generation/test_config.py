"""Of options and a model's defaults comes one configuration, or a refusal that says what to do."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbtide.errors import InputError, OptionError
from ebbtide.generation import config as room
from ebbtide.generation.config import SAMPLING, GenerationConfig

of = GenerationConfig.of


def nothing(*_: object) -> Any:
    """A function, for the options that take one."""


VALID: dict[str, Any] = {
    "max_length": 7,
    "max_new_tokens": 7,
    "min_length": 2,
    "min_new_tokens": 2,
    "do_sample": True,
    "temperature": 0.5,
    "top_k": 7,
    "top_p": 0.5,
    "min_p": 0.5,
    "typical_p": 0.5,
    "epsilon_cutoff": 0.5,
    "eta_cutoff": 0.5,
    "repetition_penalty": 1.5,
    "encoder_repetition_penalty": 1.5,
    "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 2,
    "bad_words_ids": [[1], [2, 3]],
    "sequence_bias": {(1,): 1.5},
    "forced_bos_token_id": 1,
    "forced_eos_token_id": 1,
    "suppress_tokens": [1, 2],
    "begin_suppress_tokens": [1, 2],
    "exponential_decay_length_penalty": (3, 1.5),
    "renormalize_logits": True,
    "remove_invalid_values": True,
    "num_beams": 4,
    "num_beam_groups": 2,
    "diversity_penalty": 0.5,
    "length_penalty": 2.0,
    "early_stopping": True,
    "num_return_sequences": 2,
    "guidance_scale": 1.5,
    "seed": 7,
    "max_time": 1.5,
    "stop_strings": ["a"],
    "eos_token_id": [1, 2],
    "bos_token_id": 1,
    "pad_token_id": 1,
    "decoder_start_token_id": 1,
    "output_scores": True,
    "output_logits": True,
    "use_cache": False,
    "logits_processor": [nothing],
    "stopping_criteria": [nothing],
    "prefix_allowed_tokens_fn": nothing,
}
"""A value for each option that is not its default."""

READ: dict[str, Any] = {
    "bad_words_ids": ((1,), (2, 3)),
    "sequence_bias": (((1,), 1.5),),
    "forced_eos_token_id": (1,),
    "suppress_tokens": (1, 2),
    "begin_suppress_tokens": (1, 2),
    "stop_strings": ("a",),
    "eos_token_id": (1, 2),
    "logits_processor": (nothing,),
    "stopping_criteria": (nothing,),
}
"""What those are once read, where that is something else."""

NEEDS: dict[str, dict[str, Any]] = {
    "early_stopping": {"num_beams": 4},
    "length_penalty": {"num_beams": 4},
    "num_beam_groups": {"num_beams": 4, "diversity_penalty": 1.0},
    "diversity_penalty": {"num_beams": 4, "num_beam_groups": 2},
    "num_return_sequences": {"num_beams": 4},
    "exponential_decay_length_penalty": {"eos_token_id": 1},
}
"""What an option cannot be without."""

OPTIONS = [field.name for field in dataclasses.fields(GenerationConfig)]
PLAIN = dataclasses.asdict(of({}, {}))


def test_every_option_has_a_case_here() -> None:
    assert list(VALID) == OPTIONS


def test_without_a_word_the_best_tokens_are_taken_twenty_of_them() -> None:
    assert of({}, {}) == GenerationConfig(max_new_tokens=20)
    assert of({}, {}).last_length(7) == 27


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_is_heard_from_the_caller_and_from_the_model(option: str) -> None:
    needs = NEEDS.get(option, {})
    expected = READ.get(option, VALID[option])
    assert expected != PLAIN[option]
    assert getattr(of({}, {**needs, option: VALID[option]}), option) == expected
    assert getattr(of({**needs, option: VALID[option]}, {}), option) == expected


@pytest.mark.parametrize("option", OPTIONS)
def test_a_callers_option_is_heard_before_the_models_and_none_is_the_default(option: str) -> None:
    needs = NEEDS.get(option, {})
    other = {**needs, option: PLAIN[option]}
    expected = READ.get(option, VALID[option])
    assert getattr(of(other, {**needs, option: VALID[option]}), option) == expected
    assert getattr(of({**needs, option: VALID[option]}, {option: None}), option) == expected


def test_an_unknown_option_is_refused_with_the_nearest() -> None:
    with pytest.raises(OptionError, match="Did you mean 'temperature'") as caught:
        of({}, {"temperatur": 0.5})
    assert caught.value.option == "temperatur"
    with pytest.raises(OptionError, match="no option 'assistant_model'"):
        of({}, {"assistant_model": None})


WRONG_TYPES: dict[str, list[Any]] = {
    "max_new_tokens": [True, 1.5, "5", [5]],
    "do_sample": [1, "yes", 0.0],
    "temperature": [True, "0.5", [0.5], 1j],
    "early_stopping": [1, 0.5, ["never"]],
    "eos_token_id": ["1", {"a": 1}, 1.5, [[1]], ["1"], [True]],
    "bos_token_id": [[1], "1", 1.5],
    "bad_words_ids": [3, "ab", [1], ["ab"], [[1.5]]],
    "sequence_bias": [3, "ab", [1], [[1, 2, 3]], {(1,): "a"}, {1: 1.0}, [[[1], 1.0, 2]]],
    "exponential_decay_length_penalty": [3, (3,), (1.5, 1.5), (3, "a"), "ab"],
    "stop_strings": [3, [3], ["a", 3], {"a"}],
    "logits_processor": [3, [3]],
    "stopping_criteria": ["a", [nothing, 3]],
    "prefix_allowed_tokens_fn": [[nothing], 3],
}
WRONG_VALUES: dict[str, list[Any]] = {
    "max_length": [0, -1],
    "max_new_tokens": [0, -1],
    "min_length": [-1],
    "min_new_tokens": [-1],
    "temperature": [-1, 1e-9, np.inf, np.nan],
    "top_k": [-1],
    "top_p": [-0.1, 1.1, np.nan],
    "min_p": [-0.1, 1.1],
    "typical_p": [0, 1.1],
    "epsilon_cutoff": [-0.1, 1],
    "eta_cutoff": [-0.1, 1],
    "repetition_penalty": [0, -1, np.inf],
    "encoder_repetition_penalty": [0, -1],
    "no_repeat_ngram_size": [-1],
    "encoder_no_repeat_ngram_size": [-1],
    "bad_words_ids": [[[]], [[1, -1]]],
    "sequence_bias": [{(): 1.0}, {(-1,): 1.0}, {(1,): np.inf}, {(1,): np.nan}],
    "forced_bos_token_id": [-1],
    "forced_eos_token_id": [-1, [1, -1]],
    "suppress_tokens": [[-1]],
    "begin_suppress_tokens": [[-1]],
    "exponential_decay_length_penalty": [(-1, 1.5), (1, 0), (1, np.inf)],
    "num_beams": [0],
    "num_beam_groups": [0],
    "diversity_penalty": [-1.0, np.inf],
    "length_penalty": [np.inf, np.nan],
    "early_stopping": ["always"],
    "num_return_sequences": [0],
    "guidance_scale": [0.5, -1, np.inf],
    "seed": [-1],
    "max_time": [0, -1, np.inf],
    "stop_strings": ["", ["a", ""]],
    "eos_token_id": [-1, [1, -1]],
    "pad_token_id": [-1],
}


def each(wrong: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(option, value, id=f"{option}={value}")
        for option, values in wrong.items()
        for value in values
    ]


@pytest.mark.parametrize(("option", "value"), each(WRONG_TYPES))
def test_a_value_of_the_wrong_type_is_refused_by_the_options_name(option: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"{option} takes ") as caught:
        of({}, {option: value})
    assert caught.value.option == option


@pytest.mark.parametrize(("option", "value"), each(WRONG_VALUES))
def test_a_value_out_of_range_is_refused_by_the_options_name(option: str, value: Any) -> None:
    with pytest.raises(InputError, match=option):
        of({}, {option: value})


@pytest.mark.parametrize(("option", "value"), each(WRONG_TYPES) + each(WRONG_VALUES))
def test_a_models_value_that_cannot_be_used_is_passed_over_with_a_line_in_the_log(
    option: str, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="ebbtide.generation"):
        assert of({option: value}, {}) == of({}, {})
    (line,) = caplog.messages
    assert option in line


def test_what_is_unknown_in_a_models_defaults_is_passed_over_silently(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.DEBUG, logger="ebbtide.generation"):
        assert of({"transformers_version": "4.57.6", "cache_implementation": None}, {}) == of(
            {}, {}
        )
    assert caplog.messages == []


@pytest.mark.parametrize("value", [np.int64(3), np.int32(3)])
def test_numbers_of_numpy_are_numbers(value: Any) -> None:
    found = of(
        {}, {"max_new_tokens": value, "eos_token_id": np.array([1, 2]), "top_p": np.float32(0.5)}
    )
    assert (found.max_new_tokens, found.eos_token_id, found.top_p) == (3, (1, 2), 0.5)
    assert type(found.max_new_tokens) is int
    assert type(found.top_p) is float


def test_a_number_beyond_all_floats_is_refused_like_infinity() -> None:
    with pytest.raises(InputError, match="max_time takes a finite number"):
        of({}, {"max_time": 10**400})


def test_one_or_several_may_be_given_where_several_are_kept() -> None:
    found = of(
        {"eos_token_id": 3, "forced_eos_token_id": [3, 4], "suppress_tokens": []},
        {"stop_strings": "stop", "logits_processor": nothing, "sequence_bias": [[[1, 2], -1]]},
    )
    assert found.eos_token_id == (3,)
    assert found.forced_eos_token_id == (3, 4)
    assert found.suppress_tokens == ()
    assert found.stop_strings == ("stop",)
    assert found.logits_processor == (nothing,)
    assert found.sequence_bias == (((1, 2), -1.0),)
    assert of({"eos_token_id": 3}, {"eos_token_id": []}).eos_token_id == ()


# Lengths


@pytest.mark.parametrize(
    ("defaults", "given", "last"),
    [
        ({}, {}, 30),
        ({"max_length": 20}, {}, 30),
        ({"max_length": 60}, {}, 60),
        ({"max_new_tokens": 5}, {}, 15),
        ({"max_new_tokens": 5, "max_length": 60}, {}, 15),
        ({"max_new_tokens": 5}, {"max_length": 60}, 60),
        ({"max_new_tokens": 5}, {"max_length": 20}, 20),
        ({}, {"max_length": 20}, 20),
        ({"max_length": 60}, {"max_new_tokens": 8}, 18),
        ({"max_new_tokens": 5}, {"max_new_tokens": 8, "max_length": 60}, 18),
        ({"max_length": 60}, {"max_length": None, "max_new_tokens": None}, 60),
    ],
)
def test_who_speaks_of_the_length_last_is_heard_and_new_tokens_come_first(
    defaults: dict[str, Any], given: dict[str, Any], last: int
) -> None:
    assert of(defaults, given).last_length(10) == last


def test_a_callers_least_length_is_heard_before_the_models_least_new_tokens() -> None:
    found = of({"min_new_tokens": 5}, {"min_length": 12})
    assert (found.min_length, found.min_new_tokens) == (12, None)


# Contradictions


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"max_new_tokens": 3, "min_new_tokens": 4}, "larger max_new_tokens"),
        ({"max_length": 3, "min_new_tokens": 4}, "larger max_length"),
        ({"max_length": 3, "min_length": 4}, "larger max_length"),
        ({"min_new_tokens": 21}, "larger max_new_tokens"),
        ({"num_beams": 4, "num_beam_groups": 3, "diversity_penalty": 1.0}, "such as 6"),
        ({"num_beam_groups": 2, "diversity_penalty": 1.0}, "such as 4"),
        ({"num_beams": 4, "num_beam_groups": 2}, "pass a diversity_penalty above 0"),
        (
            {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0, "do_sample": True},
            "do_sample=False",
        ),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0, "seed": 1}, "no option"),
        ({"diversity_penalty": 1.0}, "pass num_beams and num_beam_groups"),
        ({"num_beams": 4, "diversity_penalty": 1.0}, "pass num_beams and num_beam_groups"),
        ({"num_return_sequences": 3}, "do_sample=True with a temperature above 0, or num_beams=3"),
        ({"num_return_sequences": 3, "temperature": 0}, "temperature above 0"),
        ({"num_return_sequences": 3, "num_beams": 2}, "pass num_beams=3"),
        ({"num_return_sequences": 3, "num_beams": 2, "do_sample": True}, "pass num_beams=3"),
        ({"early_stopping": True}, "num_beams from 2"),
        ({"early_stopping": "never"}, "num_beams from 2"),
        ({"length_penalty": 0.0}, "num_beams from 2"),
        ({"exponential_decay_length_penalty": (1, 1.5)}, "pass eos_token_id"),
        *(
            ({"do_sample": False, option: VALID[option]}, f"{option} would.*pass do_sample=True")
            for option in SAMPLING
        ),
    ],
    ids=str,
)
def test_a_contradiction_is_refused_and_says_what_to_change(
    given: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        of({}, given)


@pytest.mark.parametrize(
    ("defaults", "given", "dropped"),
    [
        ({"min_new_tokens": 9}, {"max_new_tokens": 3}, "min_new_tokens"),
        ({"min_length": 56}, {"max_length": 30}, "min_length"),
        ({"num_beams": 4, "early_stopping": True}, {"num_beams": 1}, "early_stopping"),
        ({"num_beams": 4, "length_penalty": 2.0}, {"num_beams": 1}, "length_penalty"),
        (
            {"num_return_sequences": 3, "do_sample": True},
            {"do_sample": False},
            "num_return_sequences",
        ),
        ({"num_return_sequences": 3, "num_beams": 3}, {"num_beams": 2}, "num_return_sequences"),
        (
            {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
            {"do_sample": True},
            "num_beam_groups",
        ),
        (
            {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
            {"num_beams": 1},
            "diversity_penalty",
        ),
        ({"exponential_decay_length_penalty": [1, 1.5]}, {}, "exponential_decay_length_penalty"),
    ],
    ids=str,
)
def test_what_only_the_model_says_gives_way_to_what_the_caller_says(
    defaults: dict[str, Any],
    given: dict[str, Any],
    dropped: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.DEBUG, logger="ebbtide.generation"):
        assert getattr(of(defaults, given), dropped) == getattr(GenerationConfig(), dropped)
    assert any(dropped in line for line in caplog.messages)


def test_the_neutral_value_of_a_beam_option_contradicts_nothing() -> None:
    given = {"early_stopping": False, "length_penalty": 1, "diversity_penalty": 0, "num_beams": 1}
    assert of({}, {**given, "num_beam_groups": 1, "num_return_sequences": 1}) == of({}, {})


# Sampling


@pytest.mark.parametrize("option", SAMPLING)
def test_who_gives_an_option_of_sampling_gets_sampling(option: str) -> None:
    assert of({}, {option: VALID[option]}).do_sample
    assert of({"num_beams": 3}, {option: VALID[option]}).do_sample


@pytest.mark.parametrize("option", SAMPLING)
def test_a_models_option_of_sampling_alone_does_not_make_it_sample(option: str) -> None:
    assert not of({option: VALID[option]}, {}).do_sample
    assert not of({option: VALID[option], "do_sample": True}, {"do_sample": False}).do_sample


def test_a_model_that_says_not_to_sample_is_overruled_by_do_sample_only() -> None:
    with pytest.raises(InputError, match=r"by the model's own defaults.*pass do_sample=True"):
        of({"do_sample": False}, {"top_p": 0.5})
    assert of({"do_sample": False}, {"top_p": 0.5, "do_sample": True}).do_sample


@pytest.mark.parametrize(
    ("defaults", "given", "sampled"),
    [
        ({}, {"temperature": 0}, False),
        ({}, {"temperature": 0.0, "do_sample": True, "top_p": 0.5, "seed": 3}, False),
        ({"do_sample": True, "temperature": 0.6}, {"temperature": 0}, False),
        ({"do_sample": True, "temperature": 0}, {}, False),
        ({"temperature": 0}, {"do_sample": True}, True),
        ({"temperature": 0}, {"temperature": 1.0}, True),
        ({"temperature": 0, "num_beams": 4}, {}, False),
    ],
)
def test_a_temperature_of_zero_is_the_best_token(
    defaults: dict[str, Any], given: dict[str, Any], sampled: bool
) -> None:
    found = of(defaults, given)
    assert found.do_sample is sampled
    assert found.temperature == 1


# Anything at all


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 30) | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)
likely = st.sampled_from(OPTIONS)


@given(st.dictionaries(likely | st.text(max_size=5), anything, max_size=8))
def test_no_defaults_of_a_model_ever_fail(defaults: dict[str, Any]) -> None:
    assert isinstance(of(defaults, {}), GenerationConfig)


@given(st.dictionaries(likely, anything, max_size=5), st.dictionaries(likely, anything, max_size=5))
def test_options_are_heard_or_refused_and_never_fall_under_the_table(
    defaults: dict[str, Any], given: dict[str, Any]
) -> None:
    refused = ""
    try:
        found = of(defaults, given)
    except (InputError, OptionError) as error:
        refused = str(error)
    if refused:
        assert any(option in refused for option in given)
        return
    for option, value in given.items():
        if value is None or option in {"temperature", "do_sample"}:
            continue
        assert getattr(found, option) == room._READERS[option](option, value)


@given(st.fixed_dictionaries({}, optional={name: st.just(VALID[name]) for name in OPTIONS}))
def test_a_configuration_has_no_contradiction_in_it(given: dict[str, Any]) -> None:
    for defaults, own in ((given, {}), ({}, given)):
        try:
            found = of(defaults, own)
        except InputError:
            assert own
            continue
        assert found.num_beams % found.num_beam_groups == 0
        assert (found.num_beam_groups > 1) == (found.diversity_penalty > 0)
        assert not (found.num_beam_groups > 1 and found.do_sample)
        assert found.num_return_sequences <= max(
            found.num_beams, 10 * (found.do_sample and found.num_beams == 1)
        )
        if found.num_beams == 1:
            assert (found.early_stopping, found.length_penalty) == (False, 1.0)


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GenerationConfig().top_k = 3  # type: ignore[misc]

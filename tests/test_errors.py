"""The errors are one tree, are what callers expect to catch, and carry their values."""

from __future__ import annotations

import inspect
import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ebbtide
from ebbtide import errors

ALL = [
    one
    for one in vars(errors).values()
    if inspect.isclass(one) and issubclass(one, BaseException) and one.__module__ == errors.__name__
]

EXAMPLES: list[tuple[type[ebbtide.EbbtideError], dict[str, Any]]] = [
    (errors.EbbtideError, {}),
    (errors.InputError, {"value": 3, "nearest": "near"}),
    (errors.OptionError, {"option": "devise", "nearest": "device"}),
    (errors.ModelNotFoundError, {"model": "a/model", "missing": ("config.json",)}),
    (errors.UnsupportedModelError, {"model": "a/model"}),
    (errors.LoadError, {"path": "config.json"}),
    (errors.DeviceNotAvailableError, {"device": "cuda", "available": ("cpu",)}),
    (errors.RunError, {}),
    (errors.PipelineDisposedError, {"pipeline": "the pipeline"}),
    (errors.PipelineInheritedError, {"pipeline": "the pipeline"}),
    (errors.PipelineCancelledError, {"pipeline": "the pipeline"}),
    (errors.NotTransferableError, {}),
    (errors.DisposalError, {"errors": (OSError(),), "receipt": object()}),
    (errors.MissingExtraError, {"extra": "cli"}),
    (errors.OutOfBudgetError, {"needed": 2, "available": 1, "budget": 3}),
    (errors.LoadMemoryError, {"path": "model.onnx"}),
    (errors.AcquireTimeoutError, {"pipeline": "the pipeline", "seconds": 1.5}),
    (errors.PipelineInUseError, {"pipeline": "the pipeline", "sites": ("shop.py:3",)}),
    (errors.ManagerBusyError, {}),
    (errors.ManagerClosedError, {}),
    (
        errors.WorkerCrashedError,
        {"pipeline": "the pipeline", "running": ("a call",), "status": -9},
    ),
]
NAMES = [error.__name__ for error, _ in EXAMPLES]


def test_every_error_is_of_one_tree_and_public() -> None:
    assert len(ALL) >= len(EXAMPLES)
    assert {one for one, _ in EXAMPLES} <= set(ALL)
    for one in ALL:
        assert issubclass(one, errors.EbbtideError)
        assert getattr(ebbtide, one.__name__) is one
        assert one.__name__ in ebbtide.__all__
        assert one.__name__.endswith("Error")
        assert inspect.getdoc(one)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (errors.InputError, ValueError),
        (errors.OptionError, TypeError),
        (errors.ModelNotFoundError, LookupError),
        (errors.NotTransferableError, TypeError),
        (errors.MissingExtraError, ImportError),
        (errors.OutOfBudgetError, MemoryError),
        (errors.LoadMemoryError, MemoryError),
        (errors.WorkerMemoryError, MemoryError),
        (errors.WorkerMemoryError, errors.WorkerCrashedError),
        (errors.AcquireTimeoutError, TimeoutError),
        (errors.DeviceNotAvailableError, errors.LoadError),
        (errors.PipelineInheritedError, errors.PipelineDisposedError),
    ],
)
def test_an_error_is_caught_as_what_it_is_like(
    error: type[Exception], kind: type[Exception]
) -> None:
    assert issubclass(error, kind)


@pytest.mark.parametrize(("error", "values"), EXAMPLES, ids=NAMES)
def test_an_error_carries_its_message_and_its_values(
    error: type[ebbtide.EbbtideError], values: dict[str, Any]
) -> None:
    made = error("What happened.", **values)
    assert str(made) == "What happened."
    for name, value in values.items():
        assert getattr(made, name) is value
    documented = inspect.getdoc(error) or ""
    assert all(f"{name}:" in documented for name in values) or issubclass(
        error, errors.PipelineInheritedError
    )


def test_the_nearest_name_is_found_and_only_where_it_is_near() -> None:
    assert errors.nearest("poolin", ["pooling", "normalize"]) == "pooling"
    assert errors.nearest("zzz", ["pooling", "normalize"]) is None
    assert errors.nearest("anything", []) is None


@settings(deadline=None)
@given(name=st.text(max_size=20), known=st.lists(st.text(min_size=1, max_size=10), max_size=5))
def test_the_nearest_name_is_one_of_the_known(name: str, known: list[str]) -> None:
    assert errors.nearest(name, known) in {*known, None}
    assert name not in known or errors.nearest(name, known) == name or name == ""


def test_an_unknown_option_names_itself_the_nearest_and_all() -> None:
    error = errors.unknown_option("devise", {"dtype", "device"}, where="pipeline()")
    assert (error.option, error.nearest) == ("devise", "device")
    assert str(error) == (
        "pipeline() has no option 'devise'. Did you mean 'device'? Known options: device, dtype."
    )


def test_an_unknown_value_names_itself_the_nearest_and_all() -> None:
    error = errors.unknown_value("dtype", "q9", ["q8", "fp32"])
    assert (error.value, error.nearest) == ("q9", "q8")
    assert str(error) == "Unknown dtype 'q9'. Did you mean 'q8'? Known: q8, fp32."
    assert "Did you mean" not in str(errors.unknown_value("dtype", object(), ["q8"]))


@pytest.mark.parametrize(("error", "values"), EXAMPLES, ids=NAMES)
def test_an_error_survives_the_way_between_processes(
    error: type[ebbtide.EbbtideError], values: dict[str, Any]
) -> None:
    values = {**values, "errors": (), "receipt": None} if "receipt" in values else values
    made = error("What happened.", **values)
    back = pickle.loads(pickle.dumps(made))
    assert type(back) is error
    assert str(back) == "What happened."
    assert {name: getattr(back, name) for name in values} == values

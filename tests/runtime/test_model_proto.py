"""ONNX files, read and written: nothing is lost, and what is no file is refused."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbtide.runtime.model_proto import (
    MalformedError,
    Model,
    Node,
    Tensor,
    attribute,
    fields,
    message,
)

MODELS = Path(__file__).parent.parent / "models"

numbers = st.integers(1, 1 << 20)
one_field = st.one_of(
    st.tuples(numbers, st.just(0), st.integers(0, (1 << 64) - 1)),
    st.tuples(numbers, st.just(1), st.binary(min_size=8, max_size=8)),
    st.tuples(numbers, st.just(2), st.binary(max_size=300)),
    st.tuples(numbers, st.just(5), st.binary(min_size=4, max_size=4)),
)


@given(st.lists(one_field))
def test_the_fields_of_a_message_are_those_it_was_made_of(
    given: list[tuple[int, int, object]],
) -> None:
    found = [
        (number, wire, value if wire == 0 else bytes(value))
        for number, wire, value in fields(message(given))
    ]
    assert found == given


@given(st.lists(one_field, min_size=1), st.data())
def test_a_message_that_is_cut_is_refused_or_has_fewer_fields(
    given: list[tuple[int, int, object]], data: st.DataObject
) -> None:
    whole = message(given)
    part = whole[: data.draw(st.integers(0, len(whole) - 1))]
    with contextlib.suppress(MalformedError):
        assert len(list(fields(part))) < len(given)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "int64"])
def test_an_array_comes_back_from_a_tensor(dtype: str) -> None:
    array = np.arange(-3, 3).reshape(2, 3).astype(dtype)
    found = Tensor.read(message(Tensor.of("name", array).fields))
    assert found.name == "name"
    assert found.array() is not None
    assert np.array_equal(found.array(), array)  # type: ignore[arg-type]


def test_a_tensor_that_lies_in_another_file_has_no_values_here() -> None:
    tensor = Tensor.of("name", np.zeros(4, np.float32)).outside("model.onnx", 12)
    assert tensor.array() is None


@pytest.mark.parametrize("value", [0, -1, 1 << 40, 0.25, [0, 2, 1, -3]])
def test_an_attribute_comes_back_from_a_node(value: float | list[int]) -> None:
    node = Node("Op", ["a", ""], ["b"], "com.example", {"name": attribute("name", value)})
    found = Node.read(node.write())
    assert found.attribute("name") == value
    assert found.attribute("other") is None
    assert (found.op, found.domain) == ("Op", "com.example")
    assert (found.inputs, found.outputs) == (["a", ""], ["b"])


@pytest.mark.parametrize("name", ["gen-llama", "gen-gemma2", "gen-opt"])
def test_a_model_written_again_is_the_same_model(name: str) -> None:
    content = (MODELS / name / "onnx" / "model.onnx").read_bytes()
    model = Model.read(content)
    again = Model.read(model.write())
    assert [one.write() for one in again.nodes] == [one.write() for one in model.nodes]
    assert again.tensors.keys() == model.tensors.keys()
    assert [(one.name, one.shape) for one in again.inputs + again.outputs] == [
        (one.name, one.shape) for one in model.inputs + model.outputs
    ]
    assert (again.opsets, again.ir) == (model.opsets, model.ir)


def test_a_part_of_a_model_has_only_what_it_needs() -> None:
    nodes = [Node("A", ["x", "w"], ["y"]), Node("B", ["y"], ["z"]), Node("C", ["v"], ["u"])]
    tensors = {name: Tensor.of(name, np.zeros(1, np.float32)) for name in "wv"}
    part = Model(nodes, tensors, [], [], {"": 18}).part(nodes, [], {"y": 1})
    assert [one.op for one in part.nodes] == ["A"]
    assert list(part.tensors) == ["w"]

"""Fusing attention: the same answers as the plain export, or a refusal that says why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ebbtide.runtime.attention import NotFusedError
from ebbtide.runtime.fuse import Fused, fuse
from ebbtide.runtime.library import onnxruntime
from ebbtide.runtime.model_proto import Model, Node, Tensor

MODELS = Path(__file__).parent.parent / "models"
LLAMA = MODELS / "gen-llama" / "onnx" / "model.onnx"
POSITIONS = 128
STEPS = ((0, 9), (9, 10), (10, 11))


def opened(model: str | bytes, fused: Fused | None = None) -> Any:
    library = onnxruntime()
    options = library.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if fused is not None:
        fused.configure(options)
    return library.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def no_past(session: Any, rows: int, places: int = 0) -> dict[str, Any]:
    return {
        one.name: np.zeros((rows, one.shape[1], places, one.shape[3]), np.float32)
        for one in session.get_inputs()
        if one.name.startswith("past")
    }


def feeds(ids: Any, mask: Any, start: int, end: int) -> dict[str, Any]:
    places = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    return {
        "input_ids": ids[:, start:end],
        "attention_mask": mask[:, :end],
        "position_ids": places[:, start:end],
    }


def logits(session: Any, ids: Any, steps: Sequence[tuple[int, int]] = STEPS) -> Any:
    """The last token's logits of each step, over a cache that is passed on."""
    names = [one.name for one in session.get_outputs()]
    carried, found = no_past(session, len(ids)), []
    for start, end in steps:
        given = feeds(ids, np.ones_like(ids), start, end)
        out = dict(zip(names, session.run(names, given | carried), strict=True))
        found.append(out.pop("logits")[:, -1])
        carried = {name.replace("present", "past_key_values"): one for name, one in out.items()}
    return np.array(found)


def prompts(rows: int, tokens: int = 11) -> Any:
    return np.random.default_rng(7).integers(3, 350, (rows, tokens))


def close(one: Any, other: Any) -> bool:
    return bool(np.allclose(one, other, atol=1e-3, rtol=1e-4))


@pytest.fixture(scope="module")
def fused() -> Fused:
    return fuse(LLAMA, POSITIONS)


@pytest.fixture
def changed(tmp_path: Path) -> Callable[[Callable[[Model], None]], Path]:
    """A copy of the model with a change to its graph."""

    def make(change: Callable[[Model], None]) -> Path:
        model = Model.read(LLAMA.read_bytes())
        change(model)
        path = tmp_path / "changed.onnx"
        path.write_bytes(model.write())
        return path

    return make


def test_a_fused_graph_gives_the_logits_of_the_plain_one(fused: Fused) -> None:
    plain, new = opened(str(LLAMA)), opened(fused.data, fused)
    assert close(logits(plain, prompts(2)), logits(new, prompts(2)))


def test_a_long_prompt_in_parts_gives_them_too(fused: Fused) -> None:
    steps = ((0, 50), (50, 100), (100, POSITIONS))
    plain, new = opened(str(LLAMA)), opened(fused.data, fused)
    ids = prompts(1, POSITIONS)
    assert close(logits(plain, ids, steps), logits(new, ids, steps))


def test_what_goes_in_and_out_has_the_names_and_types_it_had(fused: Fused) -> None:
    def faces(session: Any) -> list[tuple[str, str, list[Any]]]:
        both = [*session.get_inputs(), *session.get_outputs()]
        return [(one.name, one.type, one.shape) for one in both]

    assert faces(opened(fused.data, fused)) == faces(opened(str(LLAMA)))


def test_one_operation_a_layer_is_left_of_attention_and_nothing_of_the_mask(fused: Fused) -> None:
    ops = [node.op for node in Model.read(fused.data).nodes]
    assert ops.count("GroupQueryAttention") == fused.layers == 2
    assert not {"Softmax", "Where", "Range", "Cos", "Expand"} & set(ops)
    assert fused.nodes == (613, len(ops))


def test_weights_stay_in_the_file_that_they_are_in(fused: Fused) -> None:
    assert len(fused.data) < LLAMA.stat().st_size / 4


def test_a_fused_graph_writes_its_cache_in_place(fused: Fused) -> None:
    plain, new = opened(str(LLAMA)), opened(fused.data, fused)
    ids, value = prompts(1), onnxruntime().OrtValue.ortvalue_from_numpy
    buffers = {name: value(one) for name, one in no_past(new, 1, 32).items()}
    found = []
    for start, end in STEPS:
        binding = new.io_binding()
        for name, array in feeds(ids, np.ones_like(ids), start, end).items():
            binding.bind_ortvalue_input(name, value(np.ascontiguousarray(array)))
        binding.bind_output("logits")
        for name, buffer in buffers.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
        new.run_with_iobinding(binding)
        found.append(binding.get_outputs()[0].numpy()[:, -1])
    assert close(logits(plain, ids), found)


def test_rows_padded_at_the_right_give_what_the_plain_one_gives_at_the_left(fused: Fused) -> None:
    plain, new = opened(str(LLAMA)), opened(fused.data, fused)
    ids = prompts(2, 8)
    left = np.ones_like(ids)
    left[1, :3] = 0
    right = left[:, ::-1]
    moved = np.stack([ids[0], np.roll(ids[1], -3)])
    one = plain.run(["logits"], feeds(ids, left, 0, 8) | no_past(plain, 2))[0]
    other = new.run(["logits"], feeds(moved, right, 0, 8) | no_past(new, 2))[0]
    assert close(one[:, -1], other[[0, 1], [7, 4]])


def test_the_scale_of_the_scores_is_learnt(changed: Callable[..., Path]) -> None:
    def scale(model: Model) -> None:
        for node in model.nodes:
            if node.op != "Constant":
                continue
            value, name = node.attribute("value"), node.outputs[0]
            if value.dims == () and value.array() == 0.25:
                model.tensors[name] = Tensor.of(name, np.array(0.7, np.float32))
                node.outputs[0] += ".old"

    path = changed(scale)
    found = fuse(path, POSITIONS)
    one, other = (
        logits(opened(str(path)), prompts(1)),
        logits(opened(found.data, found), prompts(1)),
    )
    assert not close(one, logits(opened(str(LLAMA)), prompts(1)))
    assert close(one, other)


def before_softmax(op: str, *more: str) -> Callable[[Model], None]:
    def change(model: Model) -> None:
        place = next(at for at, one in enumerate(model.nodes) if one.op == "Softmax")
        softmax = model.nodes[place]
        model.nodes.insert(place, Node(op, [softmax.inputs[0], *more], ["between"]))
        softmax.inputs[0] = "between"

    return change


def more_mask(model: Model) -> None:
    old = next(one for one in model.nodes if "logits" in one.outputs)
    old.outputs[0] = "logits.old"
    model.tensors["axis"] = Tensor.of("axis", np.array([1], np.int64))
    cast = Node("Cast", ["counted"], ["added"])
    cast.attributes["to"] = next(
        one.attributes["to"] for one in model.nodes if one.op == "Cast" and one.attribute("to") == 1
    )
    model.nodes += [
        Node("ReduceSum", ["attention_mask", "axis"], ["counted"]),
        cast,
        Node("Unsqueeze", ["added", "axis"], ["wide"]),
        Node("Add", ["logits.old", "wide"], ["logits"]),
    ]


def other_past(model: Model) -> None:
    concat = next(one for one in model.nodes if "present.1.key" in one.outputs)
    concat.inputs.reverse()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (before_softmax("Sin"), "gives another result|are not products"),
        (before_softmax("Identity"), None),
        (more_mask, "attention_mask is taken by more than its attention"),
        (other_past, "present.1.key is not past_key_values.1.key with something after it"),
    ],
)
def test_a_graph_that_computes_something_else_is_refused(
    changed: Callable[..., Path], change: Callable[[Model], None], why: str | None
) -> None:
    path = changed(change)
    if why is None:
        assert fuse(path, POSITIONS).layers == 2
        return
    with pytest.raises(NotFusedError, match=why):
        fuse(path, POSITIONS)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gen-llama-fused", "its attention is fused"),
        ("gen-llama-uncached", "it has no past"),
        ("gen-granitemoehybrid", "it takes past_conv.0"),
        ("gen-qwen2", "4 elements of each head are rotated"),
        ("gen-gpt2", "does not end as attention does"),
        ("gen-bloom", "present.0.key is not past_key_values.0.key with something after it"),
    ],
)
def test_a_graph_of_another_kind_is_refused(name: str, why: str) -> None:
    with pytest.raises(NotFusedError, match=why):
        fuse(MODELS / name / "onnx" / "model.onnx", POSITIONS)


@pytest.mark.parametrize("content", [b"no graph at all", b"\xff" * 40, LLAMA.read_bytes()[:5000]])
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(NotFusedError, match="no ONNX file"):
        fuse(path, POSITIONS)

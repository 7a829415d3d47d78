"""A graph is fed what it takes, in its own types, and its features are found by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import pytest

import ebbtide
from ebbtide.cancellation import CancelToken
from ebbtide.memory.ledger import Lease, ledger
from ebbtide.models.config import ModelConfig
from ebbtide.models.loading import Loaded
from ebbtide.models.text_encoder import FEATURES, TextEncoder
from ebbtide.models.tokenizer import Batch, Tokenizer
from ebbtide.runtime import TensorInfo
from ebbtide.runtime.fake import FakeSession

CONFIG = ModelConfig("bert", None, None, None, False, None, {})
BATCH = Batch(
    np.array([[1, 2, 3], [0, 4, 5]]), np.array([[1, 1, 1], [0, 1, 1]]), np.array([[0] * 3] * 2)
)


@contextmanager
def encoder(inputs: Mapping[str, str], *outputs: str) -> Iterator[tuple[TextEncoder, Any, Any]]:
    seen: dict[str, Any] = {}

    def function(feeds: Mapping[str, Any]) -> Mapping[str, Any]:
        seen.update(feeds)
        return {name: np.full((2, 3, 4), n, np.float32) for n, name in enumerate(outputs)}

    fake = FakeSession(
        tuple(TensorInfo(name, dtype, ("n", "t")) for name, dtype in inputs.items()),
        tuple(TensorInfo(name, "float32", ("n", "t", 4)) for name in outputs),
        function,
    )
    lease: Lease[Any] = ledger.acquire(object(), "session", lambda: fake, CancelToken("test"))
    try:
        made = TextEncoder(
            Loaded("a/model", CONFIG, cast(Tokenizer, None), {"model": lease}, "fp32", "the test"),
            FEATURES,
        )
        yield made, seen, lease
    finally:
        lease.release()
        assert fake.closed


def test_a_graph_is_fed_only_what_it_takes() -> None:
    with encoder({"input_ids": "int64"}, "last_hidden_state") as (made, seen, _):
        made.forward(BATCH, CancelToken("test"))
        assert set(seen) == {"input_ids"}
        assert np.array_equal(seen["input_ids"], BATCH.input_ids)


def test_inputs_come_in_the_types_of_the_graph() -> None:
    taken = {"input_ids": "int32", "attention_mask": "float32", "token_type_ids": "int64"}
    with encoder(taken, "last_hidden_state") as (made, seen, _):
        made.forward(BATCH, CancelToken("test"))
        assert {name: str(one.dtype) for name, one in seen.items()} == taken


def test_positions_count_from_the_first_token_that_is_no_padding() -> None:
    taken = {"input_ids": "int64", "position_ids": "int64"}
    with encoder(taken, "last_hidden_state") as (made, seen, _):
        made.forward(BATCH, CancelToken("test"))
        assert seen["position_ids"].tolist() == [[0, 1, 2], [0, 0, 1]]


@pytest.mark.parametrize(
    ("outputs", "used"),
    [
        (("pooler_output", "last_hidden_state"), 1),
        (("logits", "last_hidden_state"), 1),
        (("token_embeddings", "logits"), 1),
        (("sentence_embedding", "token_embeddings"), 1),
    ],
)
def test_the_features_are_found_by_name(outputs: tuple[str, ...], used: int) -> None:
    with encoder({"input_ids": "int64"}, *outputs) as (made, _, _lease):
        assert (made.forward(BATCH, CancelToken("test"))[0] == used).all()


def test_a_graph_without_features_is_refused_by_what_it_gives() -> None:
    with (
        pytest.raises(
            ebbtide.UnsupportedModelError, match=r"gives boxes, scores, and this task needs"
        ),
        encoder({"input_ids": "int64"}, "scores", "boxes"),
    ):
        pass


def test_a_run_after_the_release_says_that_it_was_disposed() -> None:
    with encoder({"input_ids": "int64"}, "logits") as (made, _, lease):
        lease.release()
        with pytest.raises(ebbtide.PipelineDisposedError):
            made.forward(BATCH, CancelToken("test"))

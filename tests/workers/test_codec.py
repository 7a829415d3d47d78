"""What crosses between processes: plain data, the same on the other side, and nothing else."""

from __future__ import annotations

import contextlib
import errno
import math
import re
import struct
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import ebbtide
from ebbtide import errors
from ebbtide.pipelines.generating import Piece
from ebbtide.workers import channel
from ebbtide.workers.channel import Channel, ClosedError, Packet
from ebbtide.workers.codec import BESIDE, BrokenMessageError, decode, encode
from ebbtide.workers.records import records

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
    | st.binary(max_size=40),
    lambda one: st.lists(one, max_size=8)
    | st.tuples(one, one)
    | st.dictionaries(st.text(max_size=5) | st.integers(), one, max_size=5),
    max_leaves=25,
)  # fmt: skip
ARRAYS = arrays.arrays(
    arrays.integer_dtypes()
    | arrays.floating_dtypes()
    | arrays.boolean_dtypes()
    | arrays.unicode_string_dtypes(),
    arrays.array_shapes(min_dims=0, min_side=0, max_side=4),
)


def crossed(value: Any) -> Any:
    """A value after a way through two sockets."""
    here, end = Channel.pair()
    there = Channel(end)
    assert here.send(Packet(encode(value, records)), wait=True)
    found = there.receive(wait=True)
    assert found is not None
    return decode(*found, records)


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal and of the same types, all the way down."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(map(same, one.values(), other.values()))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@settings(deadline=None)
@given(value=PLAIN)
def test_plain_data_comes_out_as_it_went_in(value: Any) -> None:
    assert same(decode(encode(value, records).text, None, records), value)


@settings(deadline=None)
@given(value=ARRAYS)
def test_an_array_keeps_its_type_its_shape_and_its_values(value: np.ndarray[Any, Any]) -> None:
    found = crossed([value])[0]
    assert found.dtype == value.dtype
    assert found.shape == value.shape
    assert found.tobytes() == value.tobytes()


@settings(deadline=None, max_examples=300)
@given(raw=st.binary(max_size=60))
def test_whatever_bytes_come_reading_them_gives_a_value_or_says_that_they_are_none(
    raw: bytes,
) -> None:
    with contextlib.suppress(BrokenMessageError):
        decode(raw, memoryview(bytearray(8)), records)


@settings(deadline=None, max_examples=200)
@given(value=PLAIN, place=st.integers(min_value=0), byte=st.integers(0, 255))
def test_a_damaged_message_breaks_nothing(value: Any, place: int, byte: int) -> None:
    raw = bytearray(encode(value, records).text)
    raw[place % len(raw)] = byte
    with contextlib.suppress(BrokenMessageError):
        decode(bytes(raw), None, records)


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_message_that_ends_too_early_is_none(cut: int) -> None:
    raw = encode({"text": [1.5, "sea"]}, records).text
    with pytest.raises(BrokenMessageError):
        decode(raw[:-cut], None, records)


@pytest.mark.parametrize(
    "value",
    [
        np.float32(1.5),
        np.arange(20)[::3],
        np.zeros((3, 0), np.float16),
        2**80,
        -(2**63),
        math.inf,
        "\udcff",
        {1, 2},
        [0.5] * 9,
        [2**70] * 9,
        [True] * 9,
        "sea " * 50_000,
        b"sea" * 50_000,
    ],
)
def test_unusual_values_come_out_as_they_went_in(value: Any) -> None:
    found = crossed(value)
    assert type(found) is type(value)
    assert np.array_equal(found, value)


def test_a_large_array_lies_beside_the_message_and_may_be_written_to() -> None:
    value = np.arange(BESIDE, dtype=np.int64).reshape(4, -1)
    message = encode({"a": value, "b": [value + 1]}, records)
    assert len(message.text) < 200
    found = crossed({"a": value, "b": [value + 1]})
    assert (found["a"] == value).all()
    assert (found["b"][0] == value + 1).all()
    found["a"][0, 0] = 7
    assert value[0, 0] == 0


@pytest.mark.parametrize(
    ("value", "given_back"),
    [
        (bytearray(b"sea"), b"sea"),
        (range(3), [0, 1, 2]),
        (Path("a/b"), "a/b"),
        (re.compile("a+", re.IGNORECASE), re.compile("a+", re.IGNORECASE)),
    ],
)
def test_what_is_like_plain_data_comes_as_plain_data(value: Any, given_back: Any) -> None:
    assert crossed(value) == given_back


@pytest.mark.parametrize(
    "value", [lambda: None, object(), print, {"a": [object()]}, np.array([object()])]
)
def test_what_is_no_plain_data_is_refused_and_named(value: Any) -> None:
    with pytest.raises(ebbtide.InputError, match="cannot cross to a worker process"):
        encode(value, records)


def test_a_value_that_holds_itself_is_refused() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(ebbtide.InputError, match="levels deep"):
        encode(value, records)


def test_our_own_records_are_rebuilt_and_no_others() -> None:
    piece = Piece("sea", 7, -0.5, "stop")
    receipt = ebbtide.DisposalReceipt(1, 2, 3, True, False, 0.5, "trim", ("why",))
    assert crossed([piece, receipt]) == [piece, receipt]
    raw = encode(piece, records).text.replace(b"Piece", b"Popen")
    with pytest.raises(BrokenMessageError, match="none of ours"):
        decode(raw, None, records)


def test_an_error_keeps_its_class_its_values_and_its_traceback_as_a_note() -> None:
    try:
        raise errors.DownloadError("no", model="a/b", status=404) from KeyError("cause")
    except errors.DownloadError as error:
        found = crossed(error)
    assert type(found) is errors.DownloadError
    assert (str(found), found.model, found.status) == ("no", "a/b", 404)
    assert "KeyError: 'cause'" in found.__notes__[-1]
    assert "test_codec.py" in found.__notes__[-1]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (KeyError("a"), KeyError),
        (UnicodeEncodeError("utf8", "a", 0, 1, "no"), ValueError),
        (ZeroDivisionError("a"), ArithmeticError),
        (type("Strange", (Exception,), {})("a"), errors.RunError),
        (SystemExit(3), errors.RunError),
        (errors.WorkerMemoryError("a", pipeline="b"), errors.WorkerMemoryError),
    ],
)
def test_an_error_that_is_nobodys_here_comes_as_the_nearest_that_is(
    error: BaseException, kind: type[Exception]
) -> None:
    assert type(crossed(error)) is kind


def test_an_error_of_no_known_name_is_none_of_ours() -> None:
    raw = encode(errors.RunError("a"), records).text
    raw = raw.replace(b"RunError", b"unlink__", 1)
    with pytest.raises(BrokenMessageError, match="none of ours"):
        decode(raw, None, records)


def added(code: int, data: bytes) -> bytes:
    """The bytes of a value of a kind that MessagePack itself has not."""
    raw: bytes = msgpack.packb(msgpack.ExtType(code, data))
    return raw


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (added(7, msgpack.packb(["Pattern", ["sea"]])), "no fields"),
        (added(7, msgpack.packb([{"Pattern": 1}, {}])), "no name"),
        (added(1, msgpack.packb("sea")), "no items"),
        (added(4, b"\x02|O\x01" + struct.pack("<Q", 0)), "no plain type"),
        (added(5, b"\x03<f8\x01" + struct.pack("<QQ", 2, 0)), "outside the shared memory"),
        (added(9, b""), "unknown kind"),
    ],
)
def test_what_only_looks_like_a_value_is_refused_and_named(raw: bytes, words: str) -> None:
    with pytest.raises(BrokenMessageError, match=words):
        decode(raw, memoryview(bytearray(8)), records)


def test_a_small_array_may_be_written_to() -> None:
    value = np.arange(3)
    found = crossed(value)
    found[0] = 7
    assert found.tolist() == [7, 1, 2]
    assert value[0] == 0


def test_shared_memory_that_cannot_be_had_is_a_memory_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(file: int, data: object, offset: int) -> int:
        raise OSError(errno.ENOSPC, "no space")

    message = encode(np.zeros(BESIDE), records)
    monkeypatch.setattr(channel.os, "pwrite", full)
    with pytest.raises(MemoryError, match="No room for 262144 bytes of shared memory"):
        Packet(message)


def test_a_closed_end_is_told_to_the_other() -> None:
    here, end = Channel.pair()
    end.close()
    with pytest.raises(ClosedError):
        here.receive(wait=True)
    with pytest.raises(ClosedError):
        here.send(Packet(encode("sea", records)), wait=True)


def test_a_sender_that_does_not_wait_is_told_where_there_is_no_room() -> None:
    here, end = Channel.pair()
    there = Channel(end)
    packet = Packet(encode("sea", records))
    sent = 0
    while here.send(packet, wait=False):
        sent += 1
    for _ in range(sent):
        assert there.receive(wait=False) is not None
    assert there.receive(wait=False) is None
    assert here.send(packet, wait=False)


def test_a_memory_file_that_could_change_is_refused() -> None:
    import array
    import os
    import socket

    here, end = Channel.pair()
    file = os.memfd_create("loose")
    os.ftruncate(file, 64)
    rights = array.array("i", [file]).tobytes()
    end.sendmsg(
        [struct.pack("<BQ", 1, 1) + b"\xc0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
    )
    os.close(file)
    with pytest.raises(ClosedError, match="may change"):
        here.receive(wait=True)
    end.close()

"""What a device is called, which are tried, and what is said of one that is not here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ebbtide
from ebbtide import runtime
from ebbtide.cancellation import CancelToken
from ebbtide.runtime import SessionOptions, devices
from ebbtide.runtime.devices import Device

CPU, CUDA, DML, COREML = (devices.PROVIDERS[name] for name in ("cpu", "cuda", "dml", "coreml"))


@pytest.mark.parametrize(
    ("text", "device"),
    [
        ("cpu", Device("cpu")),
        ("cuda", Device("cuda")),
        ("cuda:0", Device("cuda", 0)),
        ("cuda:1", Device("cuda", 1)),
        ("dml:12", Device("dml", 12)),
        ("coreml", Device("coreml")),
        ("auto", None),
    ],
)
def test_a_device_is_read_from_its_name(text: str, device: Device | None) -> None:
    assert devices.parse(text) == device


@pytest.mark.parametrize(
    "text", ["", "CPU", "gpu", "cuda:", "cuda:-1", "cuda:1:1", "cuda:1234", "cpu:0", "coreml:0"]
)
def test_a_name_of_no_device_is_refused_with_the_names_that_there_are(text: str) -> None:
    with pytest.raises(ebbtide.InputError, match="Known: auto, cpu, cuda, dml, coreml, cuda:N"):
        devices.parse(text)


@pytest.mark.parametrize("text", ["cpu", "cuda", "cuda:3", "dml:1", "coreml"])
def test_a_device_is_written_as_it_is_read(text: str) -> None:
    assert str(devices.parse(text)) == text


@pytest.mark.parametrize(
    ("providers", "names"),
    [
        ([CPU], ["cpu"]),
        ([CPU, CUDA], ["cuda", "cpu"]),
        ([COREML, CPU], ["coreml", "cpu"]),
        ([CPU, COREML, DML, CUDA, "TensorrtExecutionProvider"], ["cuda", "dml", "coreml", "cpu"]),
    ],
)
def test_auto_tries_the_accelerators_first_and_the_cpu_last(
    providers: list[str], names: list[str]
) -> None:
    assert [one.name for one in devices.candidates("auto", providers)] == names


def test_a_named_device_is_tried_alone() -> None:
    assert devices.candidates("cuda:2", [CPU, CUDA]) == [Device("cuda", 2)]
    assert devices.candidates("cpu", [CPU, CUDA]) == [Device("cpu")]


@pytest.mark.parametrize(
    ("device", "words"),
    [("cuda:1", "onnxruntime-gpu"), ("dml", "onnxruntime-directml"), ("coreml", "macOS")],
)
def test_a_device_that_this_build_lacks_names_what_to_install(device: str, words: str) -> None:
    with pytest.raises(ebbtide.DeviceNotAvailableError, match=words) as caught:
        devices.candidates(device, [CPU])
    assert caught.value.device == device
    assert caught.value.available == ("cpu",)
    assert isinstance(caught.value, ebbtide.LoadError)
    assert "Devices here: cpu" in str(caught.value)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "dml", "coreml"])
def test_a_pipeline_on_a_device_that_is_not_here_fails_before_it_loads(
    tiny_bert: Path, device: str
) -> None:
    if devices.parse(device).provider in runtime.providers():  # type: ignore[union-attr]
        pytest.skip("this installation has the device")
    with pytest.raises(ebbtide.DeviceNotAvailableError) as caught:
        ebbtide.pipeline("embeddings", tiny_bert, device=device)
    assert caught.value.device == device
    assert "cpu" in caught.value.available


def test_auto_falls_back_to_the_next_device_where_the_first_does_not_start(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from ebbtide.runtime import session

    opened: list[str] = []
    really = session._open_on

    def open_on(path: Path, device: Device, options: Any, token: Any) -> Any:
        opened.append(device.name)
        if device.name != "cpu":
            raise devices.unavailable(device, ("cpu",), "no driver")
        return really(path, device, options, token)

    monkeypatch.setattr(session, "providers", lambda: [CUDA, DML, CPU])
    monkeypatch.setattr(session, "_open_on", open_on)
    caplog.set_level("INFO", "ebbtide.runtime")
    with ebbtide.pipeline("embeddings", tiny_bert, device="auto") as pipe:
        assert pipe.device == "cpu"
    assert opened == ["cuda", "dml", "cpu"]
    assert "no driver" in caplog.text


def test_a_file_that_is_gone_is_a_load_error(tmp_path: Path) -> None:
    with pytest.raises(ebbtide.LoadError, match=r"no file .*model\.onnx"):
        runtime.open_session(
            tmp_path / "model.onnx", "cpu", SessionOptions(), CancelToken("the test")
        )

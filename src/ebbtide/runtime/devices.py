"""Device names, and the ONNX Runtime execution provider behind each."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from ebbtide.errors import DeviceNotAvailableError, unknown_value

PROVIDERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "cpu": "CPUExecutionProvider",
        "cuda": "CUDAExecutionProvider",
        "dml": "DmlExecutionProvider",
        "coreml": "CoreMLExecutionProvider",
    }
)

AUTO: Final = "auto"
_AUTO_ORDER: Final = ("cuda", "dml", "coreml", "cpu")
_INSTALL: Final[Mapping[str, str]] = MappingProxyType(
    {
        "cuda": "Install the CUDA build in place of the CPU one:"
        " `pip uninstall onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]'`.",
        "dml": "On Windows: `pip uninstall onnxruntime && pip install onnxruntime-directml`.",
        "coreml": "The onnxruntime of macOS has it built in; there is none on this system.",
    }
)


@dataclasses.dataclass(frozen=True, slots=True)
class Device:
    """A place where a session runs.

    Attributes:
        name: ``cpu``, ``cuda``, ``dml`` or ``coreml``.
        index: Which of several, from 0.
    """

    name: str
    index: int = 0

    @property
    def provider(self) -> str:
        """ONNX Runtime's name for it."""
        return PROVIDERS[self.name]

    def __str__(self) -> str:
        return f"{self.name}:{self.index}" if self.index else self.name


def parse(text: str) -> Device | None:
    """The device of this name, or None for ``auto``.

    Raises:
        InputError: There is no such device; names the nearest.

    Example:
        >>> parse("cuda:1")
        Device(name='cuda', index=1)
    """
    if text == AUTO:
        return None
    match = re.fullmatch(r"(cuda|dml):(\d{1,3})", text)
    if match:
        return Device(match[1], int(match[2]))
    if text not in PROVIDERS:
        raise unknown_value("device", text, [AUTO, *PROVIDERS, "cuda:N"])
    return Device(text)


def available(providers: list[str]) -> tuple[str, ...]:
    """The names of the devices that this build of ONNX Runtime has."""
    return tuple(name for name, provider in PROVIDERS.items() if provider in providers)


def candidates(text: str, providers: list[str]) -> list[Device]:
    """The devices to try, best first; more than one for ``auto`` only.

    Args:
        text: The device as the user names it.
        providers: The execution providers that this build of ONNX Runtime has.

    Raises:
        InputError: There is no such device.
        DeviceNotAvailableError: This build of ONNX Runtime does not have it.
    """
    device = parse(text)
    here = available(providers)
    if device is None:
        return [Device(name) for name in _AUTO_ORDER if name in here]
    if device.name not in here:
        raise unavailable(device, here)
    return [device]


def unavailable(device: Device, here: tuple[str, ...], cause: str = "") -> DeviceNotAvailableError:
    """The error for a device that cannot be used here."""
    why = f": {cause}" if cause else ""
    hint = _INSTALL.get(device.name, "")
    return DeviceNotAvailableError(
        f"Device {str(device)!r} cannot be used here{why}. {hint} Devices here: {', '.join(here)}.",
        device=str(device),
        available=here,
    )

"""One graph in memory: ONNX Runtime behind a protocol, the prepared store, devices, threads.

Only this room imports onnxruntime.
"""

from ebbtide.runtime.carry import POSITIONS, Carried, Carry, InPlace, Passed, size_in
from ebbtide.runtime.graph import GraphSession, Runs, Waiting, acquire, start
from ebbtide.runtime.library import providers, version
from ebbtide.runtime.session import (
    OnnxSession,
    Session,
    SessionOptions,
    TensorInfo,
    open_session,
)
from ebbtide.runtime.threads import Job, cpu_count, native_threads

__all__ = [
    "POSITIONS",
    "Carried",
    "Carry",
    "GraphSession",
    "InPlace",
    "Job",
    "OnnxSession",
    "Passed",
    "Runs",
    "Session",
    "SessionOptions",
    "TensorInfo",
    "Waiting",
    "acquire",
    "cpu_count",
    "native_threads",
    "open_session",
    "providers",
    "size_in",
    "start",
    "version",
]

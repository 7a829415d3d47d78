"""One graph in memory: the Session protocol, ONNX Runtime behind it, devices, dtypes, threads.

Only this room imports onnxruntime.
"""

from ebbtide.runtime.session import (
    OnnxSession,
    Session,
    SessionOptions,
    TensorInfo,
    open_session,
    providers,
    start,
    version,
)
from ebbtide.runtime.threads import Job, cpu_count, native_threads

__all__ = [
    "Job",
    "OnnxSession",
    "Session",
    "SessionOptions",
    "TensorInfo",
    "cpu_count",
    "native_threads",
    "open_session",
    "providers",
    "start",
    "version",
]

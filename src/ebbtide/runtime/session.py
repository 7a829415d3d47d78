"""One graph in memory: what the rest of Ebbtide sees of it, and ONNX Runtime behind it.

Nothing of ONNX Runtime leaves this file. One of its `NodeArg`, `ModelMetadata` or `IOBinding`
objects in anybody's hands keeps a whole session alive, so names, types and shapes are copied out
once, and the native session has one owner.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

from ebbtide._settings import settings
from ebbtide.cancellation import CancelToken
from ebbtide.errors import (
    DeviceNotAvailableError,
    InputError,
    LoadError,
    LoadMemoryError,
    OptionError,
    PipelineDisposedError,
    RunError,
    unknown_option,
)
from ebbtide.lifecycle import Remains
from ebbtide.memory.pins import leak, let_go
from ebbtide.runtime import devices
from ebbtide.runtime.library import onnxruntime, opening, providers, shared_threads
from ebbtide.runtime.threads import cpu_count

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

log = logging.getLogger("ebbtide.runtime")

_NO_MEMORY: Final = re.compile("bad_alloc|failed to allocate|out of memory|cannot allocate", re.I)
"""What ONNX Runtime says where memory ran out."""

GraphOptimization = Literal["none", "basic", "extended", "all"]


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInfo:
    """One input or output of a graph.

    Attributes:
        name: Its name in the graph.
        dtype: The numpy name of its element type, as in ``int64``.
        shape: Its dimensions: a number, a symbol's name, or None where the graph says nothing.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


class Session(Protocol):
    """One graph, ready to run."""

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        """What it takes."""

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        """What it gives."""

    @property
    def device(self) -> devices.Device:
        """Where it runs."""

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str], token: CancelToken
    ) -> list[Array]:
        """Run it once.

        Args:
            feeds: One array an input.
            outputs: The names of the outputs to compute.
            token: Stops the run from another thread.

        Returns:
            One array an output, in the order of ``outputs``.

        Raises:
            PipelineCancelledError: The token was cancelled.
            RunError: The graph could not be run on these feeds.
        """

    def close(self) -> Sequence[Remains]:
        """Free it."""

    def leak(self) -> None:
        """After a fork, in the child: make sure it is never freed."""


@dataclasses.dataclass(frozen=True, slots=True)
class SessionOptions:
    """How ONNX Runtime is to run a graph. Equal options share a session; others do not.

    Attributes:
        threads: Threads one run may use; None for `settings.threads`, or the CPUs there are.
        optimization: How far the graph is rewritten when it is loaded.
        arena: Whether ONNX Runtime keeps freed working memory for the next run. Off, it costs an
            encoder no time that could be measured, and what a run took is free after it.
        entries: Further session configuration entries, as ONNX Runtime names them.
        fuse: Whether attention that an export wrote out in small operations is fused in a prepared
            copy, where the tokens stay the same: several times as fast, and written in place.
    """

    threads: int | None = None
    optimization: GraphOptimization = "all"
    arena: bool = False
    entries: tuple[tuple[str, str], ...] = ()
    fuse: bool = True

    @classmethod
    def of(cls, given: SessionOptions | Mapping[str, object] | None) -> SessionOptions:
        """The options from what a user gave: an object of this class, or a map of its attributes.

        Raises:
            OptionError: There is no such option, or it is of the wrong type.

        Example:
            >>> SessionOptions.of({"threads": 1}).threads
            1
        """
        if given is None:
            return cls()
        if isinstance(given, SessionOptions):
            return given._checked()
        if not isinstance(given, Mapping):
            raise OptionError(
                f"session_options takes a SessionOptions or a dict, not {type(given).__name__}.",
                option="session_options",
            )
        known = {field.name for field in dataclasses.fields(cls)}
        for name in given:
            if name not in known:
                raise unknown_option(str(name), known, where="session_options")
        values: dict[str, Any] = dict(given)
        entries = values.get("entries", ())
        if isinstance(entries, Mapping):
            values["entries"] = tuple(sorted((str(k), str(v)) for k, v in entries.items()))
        return cls(**values)._checked()

    def _checked(self) -> SessionOptions:
        if self.threads is not None and (type(self.threads) is not int or self.threads < 1):
            raise InputError(
                f"session_options threads takes a whole number from 1, not {self.threads!r}.",
                value=self.threads,
            )
        for name in ("arena", "fuse"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise InputError(
                    f"session_options {name} takes True or False, not {value!r}.", value=value
                )
        good = isinstance(self.entries, tuple) and all(
            isinstance(pair, tuple)
            and len(pair) == 2
            and all(isinstance(text, str) for text in pair)
            for pair in self.entries
        )
        if not good:
            raise InputError(
                f"session_options entries takes a map from text to text, not {self.entries!r}.",
                value=self.entries,
            )
        if not isinstance(self.optimization, str) or self.optimization not in _OPTIMIZATION:
            raise InputError(
                f"session_options optimization takes one of {', '.join(_OPTIMIZATION)},"
                f" not {self.optimization!r}.",
                value=self.optimization,
            )
        return self


_OPTIMIZATION: Final[Mapping[str, str]] = types.MappingProxyType(
    {
        "none": "ORT_DISABLE_ALL",
        "basic": "ORT_ENABLE_BASIC",
        "extended": "ORT_ENABLE_EXTENDED",
        "all": "ORT_ENABLE_ALL",
    }
)

_NUMPY_NAMES: Final[Mapping[str, str]] = types.MappingProxyType(
    {"float": "float32", "double": "float64"}
)


def threads_of(options: SessionOptions) -> int:
    """Threads that one run has to itself; 1 where all sessions share a pool."""
    return 1 if shared_threads() else options.threads or settings.threads or cpu_count()


def native_options_of(options: SessionOptions) -> Any:
    """The same as ONNX Runtime's own object."""
    library = onnxruntime()
    native = library.SessionOptions()
    native.log_severity_level = 4  # what goes wrong is raised, and not printed as well
    if shared_threads():
        native.use_per_session_threads = False
    else:
        native.intra_op_num_threads = threads_of(options)
        native.inter_op_num_threads = 1
    native.enable_cpu_mem_arena = options.arena
    native.enable_mem_pattern = options.arena
    level = _OPTIMIZATION[options.optimization]
    native.graph_optimization_level = getattr(library.GraphOptimizationLevel, level)
    for key, value in options.entries:
        native.add_session_config_entry(key, value)
    return native


def open_session(
    path: Path, device: str, options: SessionOptions, token: CancelToken
) -> OnnxSession:
    """Load a graph from a file.

    Args:
        path: The ONNX file; external data is found beside it.
        device: Where to run it, as the user names it.
        options: How to run it.
        token: Stops the load from another thread.

    Raises:
        LoadError: The file is not a graph that ONNX Runtime can load.
        DeviceNotAvailableError: The device cannot be used here.
        PipelineCancelledError: The token was cancelled.
    """
    here = providers()
    choices = devices.candidates(device, here)
    for choice in choices[:-1]:
        try:
            return _open_on(path, choice, options, token)
        except DeviceNotAvailableError as error:
            log.info("device 'auto': %s", error)
    return _open_on(path, choices[-1], options, token)


def _open_on(
    path: Path, device: devices.Device, options: SessionOptions, token: CancelToken
) -> OnnxSession:
    if not path.is_file():
        raise LoadError(f"There is no file {path}.", path=str(path))
    return made(path, device, native_options_of(options), token)


def made(
    path: Path,
    device: devices.Device,
    native_options: Any,
    token: CancelToken,
    content: bytes | None = None,
) -> OnnxSession:
    """A session of the graph in a file, or of one that was made of it and is in memory.

    Raises:
        LoadError: It cannot be loaded; `LoadMemoryError` where memory ran out.
        DeviceNotAvailableError: The device cannot be used here.
        PipelineCancelledError: The token was cancelled.
    """
    chosen: list[Any] = ["CPUExecutionProvider"]
    if device.name != "cpu":
        provider_options = {} if device.name == "coreml" else {"device_id": str(device.index)}
        chosen.insert(0, (device.provider, provider_options))

    def stop() -> None:
        native_options.set_load_cancellation_flag(True)

    token.attach(stop)
    try:
        with opening():
            native = onnxruntime().InferenceSession(
                content or str(path), native_options, providers=chosen, enable_fallback=0
            )
    except Exception as error:
        token.check()
        text = _first_line(error)
        if isinstance(error, MemoryError) or _NO_MEMORY.search(text):
            raise LoadMemoryError(
                f"Memory ran out while {path} was loaded: {text} Dispose other pipelines, choose a"
                " smaller dtype, or raise the limit.",
                path=str(path),
            ) from None
        if device.name != "cpu" and device.provider in text:
            raise devices.unavailable(device, devices.available(providers()), text) from None
        raise LoadError(
            f"ONNX Runtime could not load {path}: {text}"
            " The file may be damaged or incomplete: compare its size and hash with its source.",
            path=str(path),
        ) from None
    finally:
        token.detach(stop)
    if device.provider not in native.get_providers():
        native.__dict__.clear()
        raise devices.unavailable(
            device,
            devices.available(providers()),
            "ONNX Runtime could not start it (its libraries or its driver are missing)",
        )
    return OnnxSession(native, path, device)


def open_prepared(path: Path, options: SessionOptions, token: CancelToken) -> OnnxSession:
    """Load a graph that `write_prepared` wrote: it is run as it is, and its weights are mapped.

    Args:
        path: The graph; its data is beside it.
        options: How to run it; equal to those it was written for, but for threads and arena.
        token: Stops the load from another thread.

    Raises:
        LoadError: It cannot be loaded.
        PipelineCancelledError: The token was cancelled.
    """
    native_options = native_options_of(dataclasses.replace(options, optimization="none"))
    return made(path, devices.Device("cpu"), native_options, token)


def _first_line(error: BaseException) -> str:
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return line if line.endswith(".") else f"{line}."


class OnnxSession:
    """A `Session` in ONNX Runtime; made by `open_session`."""

    def __init__(self, native: Any, path: Path, device: devices.Device) -> None:
        self._native: Any = native
        self._path = path
        self._run_options = onnxruntime().RunOptions
        self.device = device
        self.inputs = tuple(_describe(one) for one in native.get_inputs())
        self.outputs = tuple(_describe(one) for one in native.get_outputs())

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str], token: CancelToken
    ) -> list[Array]:
        """Run it once; see `Session.run`."""
        # The session is not kept in a local: a traceback's frame would pin it.
        return self._guarded(lambda options: self._native.run(outputs, feeds, options), token)

    def _guarded(self, run: Callable[[Any], list[Any]], token: CancelToken) -> list[Any]:
        options = self._run_options()
        options.log_severity_level = 4

        def stop() -> None:
            options.terminate = True

        token.attach(stop)
        try:
            found = run(options)
        except Exception as error:
            # ONNX Runtime raises a plain Fail for a terminated run: our own flag decides.
            token.check()
            if self._native is None:
                raise PipelineDisposedError(
                    f"The session of {token.label} was disposed during the call.",
                    pipeline=token.label,
                ) from None
            raise RunError(f"{token.label}: the run failed: {_first_line(error)}") from None
        finally:
            token.detach(stop)
        return found

    def run_values(
        self,
        feeds: Mapping[str, Array],
        values: Mapping[str, Any],
        outputs: Sequence[str],
        token: CancelToken,
    ) -> list[Any]:
        """The same with some inputs, and all outputs, as the runtime's own values; see `Carry`."""
        given = {name: value_of(array) for name, array in feeds.items()} | dict(values)

        def run(options: Any) -> list[Any]:
            return list(self._native._sess.run_with_ort_values(given, outputs, options))

        return self._guarded(run, token)

    def bind(self, shared: Mapping[str, tuple[str, Array]], outputs: Sequence[str]) -> Bound:
        """Have some outputs written to the very arrays that inputs are read from, in many runs.

        Args:
            shared: For an input, the output and the array that are both.
            outputs: What else is computed.
        """
        return Bound(self, shared, outputs)

    def close(self) -> Sequence[Remains]:
        """Free it; what is still referenced by somebody comes back."""
        native, self._native = self._native, None
        if native is None:
            return ()
        core = native.__dict__.pop("_sess", None)
        native.__dict__.clear()  # an alias of the session that somebody kept holds nothing now
        box = [core]
        del core
        return let_go(box, f"the native session of {self._path.name}")

    def leak(self) -> None:
        """In a forked child: never free it, for that waits for threads which are not here."""
        leak(getattr(self._native, "_sess", None))


class Bound:
    """A session with arrays that it reads and writes; it pins the session until it is closed.

    Args:
        session: The session.
        shared: For an input, the output and the array that are both.
        outputs: What else is computed.
    """

    def __init__(
        self,
        session: OnnxSession,
        shared: Mapping[str, tuple[str, Array]],
        outputs: Sequence[str],
    ) -> None:
        self._session = session
        self._outputs = tuple(outputs)
        self._arrays = [array for _, array in shared.values()]  # which are read where they lie
        self._binding: Any = session._native.io_binding()._iobinding
        for name in outputs:
            self._binding.bind_output(name, _memory())
        for name, (output, array) in shared.items():
            value = value_of(array)
            self._binding.bind_ortvalue_input(name, value)
            self._binding.bind_ortvalue_output(output, value)

    def run(
        self, feeds: Mapping[str, Array], into: Sequence[Array] | None, token: CancelToken
    ) -> list[Array]:
        """Run it once.

        Args:
            feeds: One array an input, for those that are not shared.
            into: Arrays for the outputs, where their shapes are known.
            token: Stops the run from another thread.

        Returns:
            The outputs; read-only where they lie in the runtime's memory.
        """
        session, binding = self._session, self._binding
        for name, array in feeds.items():
            binding.bind_ortvalue_input(name, value_of(array))
        for name, given in zip(self._outputs, into or (), strict=False):
            binding.bind_ortvalue_output(name, value_of(given))
        for name in self._outputs if into is None else ():
            binding.bind_output(name, _memory())

        def run(options: Any) -> list[Array]:
            session._native._sess.run_with_iobinding(binding, options)
            if into is not None:
                return list(into)
            found = binding.get_outputs()
            return [np.from_dlpack(found[number]) for number in range(len(self._outputs))]

        import numpy as np

        return session._guarded(run, token)

    def close(self) -> None:
        """Let the session and the arrays go."""
        self._binding = None
        self._arrays.clear()


def value_of(array: Array) -> Any:
    """An array as a value of the runtime, which reads it where it lies: it has to stay there."""
    return _values().ortvalue_from_numpy(array, _memory())


@functools.cache
def _values() -> Any:
    import numpy as np

    return type(onnxruntime().OrtValue.ortvalue_from_numpy(np.zeros(1))._ortvalue)  # it has no name


@functools.cache
def _memory() -> Any:
    """Where arrays lie, in the runtime's words."""
    return onnxruntime().OrtDevice.make("cpu", 0)._get_c_device()


def _describe(node: Any) -> TensorInfo:
    inner = str(node.type).partition("(")[2].rstrip(")")
    shape = tuple(
        one if isinstance(one, int) else None if one is None else str(one) for one in node.shape
    )
    return TensorInfo(str(node.name), _NUMPY_NAMES.get(inner, inner), shape)

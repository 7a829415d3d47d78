"""``ebbtide top``: run a script as Python would, with a live view of its pipelines below."""

from __future__ import annotations

import builtins
import importlib.machinery
import io
import os
import sys
import threading
import types
from collections.abc import Sequence

from ebbtide.errors import InputError
from ebbtide.manager.live_view import LiveView

INTERRUPTED = 130


def top(script: str, arguments: Sequence[str], *, interval: float) -> int:
    """Run a script in this process, and show what its pipelines take meanwhile.

    Args:
        script: A Python file.
        arguments: What it finds in ``sys.argv`` after its own name.
        interval: Seconds between two looks.

    Returns:
        Its exit code.

    Raises:
        InputError: There is no such file, or the interval is too short.
    """
    if not os.path.isfile(script):
        raise InputError(f"There is no file {script!r}. Name a Python script.", value=script)
    with LiveView(f"ebbtide top {os.path.basename(script)}", interval=interval):
        error: BaseException | None = None
        try:
            _run(script, arguments)
        except BaseException as caught:
            error = caught.with_traceback(_of_the_script(caught.__traceback__, script))
        try:
            # What the interpreter does next anyway, while the view still shows it: it has the
            # executors end, and waits for every thread that is not a daemon.
            threading._shutdown()  # type: ignore[attr-defined]
        except KeyboardInterrupt as caught:
            error = error or caught.with_traceback(None)
        return _ended(error)


def _run(script: str, arguments: Sequence[str]) -> None:
    """Run a file as ``__main__``, which it stays: as in Python, what it made lives to the end."""
    path = os.path.abspath(script)
    main = types.ModuleType("__main__")
    main.__file__ = path
    main.__loader__ = importlib.machinery.SourceFileLoader("__main__", path)
    main.__dict__["__builtins__"] = builtins
    main.__dict__["__cached__"] = None
    sys.argv = [script, *arguments]
    if not sys.flags.safe_path:
        sys.path[:1] = [os.path.dirname(os.path.realpath(script))]
    sys.modules["__main__"] = main
    with io.open_code(path) as file:
        code = compile(file.read(), script, "exec", dont_inherit=True)
    exec(code, main.__dict__)  # noqa: S102 (the script that the user asked for)


def _of_the_script(found: types.TracebackType | None, script: str) -> types.TracebackType | None:
    """A traceback without the frames of whoever ran the script."""
    while found is not None and found.tb_frame.f_code.co_filename != script:
        found = found.tb_next
    return found


def _ended(error: BaseException | None) -> int:
    """Say of an end what Python would; returns the exit code."""
    if error is None:
        return 0
    if not isinstance(error, SystemExit):
        sys.excepthook(type(error), error, error.__traceback__)
        return INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    print(error.code, file=sys.stderr)
    return 1

"""A notebook that shows its memory, and gives it back when a name is bound anew.

``%load_ext ebbtide.integrations.jupyter`` does three things until ``%unload_ext``:

- Below each cell one line says what the cell added to the process and what pipelines hold.
- A pipeline whose name is bound anew or deleted is disposed, though ``Out`` or ``_`` still has it.
  One that something else of the notebook's holds, as a list, lives on.
- When the kernel is shut down or restarted, what is left is disposed.

Only weak references are kept between two cells, so that nothing lives on because of this.
"""

from __future__ import annotations

import html
import importlib
import re
import weakref
from collections.abc import Callable
from typing import Any, Final

from ebbtide.errors import InputError
from ebbtide.lifecycle import Disposable, Lifecycle, live
from ebbtide.memory import anonymous_bytes
from ebbtide.receipts import DisposalReceipt

_CACHES: Final = re.compile(r"_+|_\d+|_oh|Out")
"""Names under which IPython keeps results by itself."""

_NAME: Final = "ebbtide"


class MemoryLine:
    """What a cell did to the process's memory; a notebook shows it as one line.

    Attributes:
        added: Bytes of anonymous memory that the cell added; negative, if it gave some back.
        held: Bytes that pipelines hold now.
        pipelines: How many there are.
        process: Bytes of anonymous memory that the process has now.
        receipts: What was disposed because its name was bound anew or deleted, by that name.

    Example:
        >>> print(MemoryLine(98_800_000, 96_000_000, 1, 180_000_000))
        ebbtide: this cell +98.8 MB; 1 pipeline holds 96.0 MB of the process's 180.0 MB
    """

    def __init__(
        self,
        added: int,
        held: int,
        pipelines: int,
        process: int,
        receipts: dict[str, DisposalReceipt] | None = None,
    ) -> None:
        self.added = added
        self.held = held
        self.pipelines = pipelines
        self.process = process
        self.receipts = receipts or {}

    def __str__(self) -> str:
        what = "no pipeline"
        if self.pipelines:
            verb = "pipeline holds" if self.pipelines == 1 else "pipelines hold"
            what = f"{self.pipelines} {verb} {self.held / 1e6:.1f} MB"
        text = f"ebbtide: this cell {self.added / 1e6:+.1f} MB; {what}"
        text += f" of the process's {self.process / 1e6:.1f} MB"
        return text + "".join(f"; disposed {name}: {one}" for name, one in self.receipts.items())

    def _repr_mimebundle_(self, **asked: object) -> dict[str, str]:
        text = str(self)
        shown = f'<div style="opacity:.6;font-size:85%">{html.escape(text)}</div>'
        return {"text/plain": text, "text/html": shown}


class Notebook:
    """What is done around the cells of one IPython shell; made by ``%load_ext``.

    Args:
        shell: The shell, as `IPython.get_ipython` gives it.

    Attributes:
        lines: Whether a line is shown below each cell; ``%ebbtide off`` and ``%ebbtide on``.
    """

    def __init__(self, shell: Any) -> None:
        self.lines = True
        self._shell = shell
        self._before = anonymous_bytes()
        self._named: dict[str, Lifecycle] = {}
        self._heard: dict[Lifecycle, weakref.ref[Disposable]] = {}

    def start(self) -> None:
        """Be called around every cell from now on."""
        self._shell.events.register("pre_run_cell", self._begin)
        self._shell.events.register("post_run_cell", self._end)
        self._shell.register_magic_function(self._magic, "line", _NAME)

    def stop(self) -> None:
        """Leave the cells alone from now on."""
        self._shell.events.unregister("pre_run_cell", self._begin)
        self._shell.events.unregister("post_run_cell", self._end)
        self._shell.magics_manager.magics["line"].pop(_NAME, None)
        self._named, self._heard = {}, {}

    def look(self, receipts: dict[str, DisposalReceipt] | None = None) -> MemoryLine:
        """What the cell so far, or since it ended, did to the process."""
        now = anonymous_bytes()
        pipes = live()
        held = sum(pipe._lifecycle.charged for pipe in pipes)
        return MemoryLine(now - self._before, held, len(pipes), now, receipts)

    def _magic(self, line: str) -> MemoryLine | None:
        """``%ebbtide`` says what there is; ``on`` and ``off`` show or hide the lines."""
        word = line.strip().lower()
        if word in {"on", "off"}:
            self.lines = word == "on"
            return None
        if word:
            raise InputError(f"%ebbtide takes on, off or nothing, not {line!r}.", value=line)
        return self.look()

    def _begin(self, info: object) -> None:
        self._note()
        self._before = anonymous_bytes()

    def _end(self, result: object) -> None:
        receipts = self._dispose_unnamed()
        self._note()
        if self.lines:
            importlib.import_module("IPython.display").display(self.look(receipts))

    def _note(self) -> None:
        """Note which of the user's names have pipelines, and hear when one is collected."""
        self._named = {}
        for name, pipe in tuple(self._shell.user_ns.items()):
            if isinstance(pipe, Disposable) and not _CACHES.fullmatch(name):
                life = pipe._lifecycle
                self._named[name] = life
                if life not in self._heard:
                    # called before the warning for forgotten ones, which is then not due
                    self._heard[life] = weakref.ref(pipe, _request(life))

    def _dispose_unnamed(self) -> dict[str, DisposalReceipt]:
        """Dispose what had a name before the cell, has none now, and that nobody else holds."""
        receipts: dict[str, DisposalReceipt] = {}
        for life, name in {life: name for name, life in self._named.items()}.items():
            self._forget_unnamed(life)
            if life.owner is None or life.owner() is None:
                receipts[name] = life.wait()
        self._heard = {life: one for life, one in self._heard.items() if life.receipt is None}
        return receipts

    def _forget_unnamed(self, life: Lifecycle) -> None:
        """Take a pipeline that no name of the user's has out of IPython's caches of results."""
        namespace = self._shell.user_ns
        pipe = life.owner() if life.owner is not None else None
        keys = [key for key, one in tuple(namespace.items()) if pipe is not None and one is pipe]
        if pipe is None or not all(_CACHES.fullmatch(key) for key in keys):
            return
        hook = self._shell.displayhook
        hidden = self._shell.user_ns_hidden  # what IPython itself put into the namespace
        for cache in (namespace, hidden, namespace.get("_oh", {})):
            for key in [key for key, one in tuple(cache.items()) if one is pipe]:
                cache.pop(key)
        for name in ("_", "__", "___"):
            if getattr(hook, name, None) is pipe:
                setattr(hook, name, "")
                namespace[name] = hidden[name] = ""


def load_ipython_extension(shell: Any) -> None:
    """What ``%load_ext ebbtide.integrations.jupyter`` calls."""
    if shell not in _notebooks:
        _notebooks[shell] = notebook = Notebook(shell)
        notebook.start()


def unload_ipython_extension(shell: Any) -> None:
    """What ``%unload_ext ebbtide.integrations.jupyter`` calls; pipelines stay as they are."""
    notebook = _notebooks.pop(shell, None)
    if notebook is not None:
        notebook.stop()


_notebooks: Final[dict[Any, Notebook]] = {}


def _request(life: Lifecycle) -> Callable[[object], None]:
    """A wish for a disposal, which does not hold the pipeline."""
    return lambda collected: life.request()

"""What a model has seen in calls that ended, kept for calls that begin the same."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ebbtide._settings import settings
from ebbtide.cancellation import CancelToken
from ebbtide.lifecycle import Remains
from ebbtide.memory.pins import leak
from ebbtide.models.decoder import Steps

KEPT: int = 4
"""Beginnings that one pipeline keeps at most; the one that was of use longest ago goes first."""

LEAST: int = 16
"""Tokens that a beginning must share: for fewer it is not worth it."""

Row = NDArray[np.int64]


class PromptCache:
    """One pipeline's kept generations; a resource of its lifecycle, which sleeps and ends with it.

    What is kept goes on being charged as a generation's cache is, until it is taken or given up.
    """

    kind = "prompt cache"
    charge = 0

    def __init__(self) -> None:
        self._kept: list[tuple[Row, Steps]] = []
        self._lock = threading.Lock()
        self._open = True

    def take(self, ids: Row, token: CancelToken) -> Steps | None:
        """A generation that has seen how these tokens begin, and nothing else; now the caller's.

        Args:
            ids: A prompt, of which at least the last token is left to be seen.
            token: Stops it from another thread.
        """
        with self._lock:
            usable = [_usable(seen, steps, ids) for seen, steps in self._kept]
            shared = max(usable, default=0)
            if shared < LEAST:
                return None
            _, steps = self._kept.pop(usable.index(shared))
        if not steps.resume(token):
            steps.close()
            return None
        steps.crop(shared)
        return steps

    def keep(self, steps: Steps, ids: Row) -> None:
        """Keep a generation that has ended.

        Args:
            steps: The generation, of one row. It may have seen guesses in place of its last tokens.
            ids: Its tokens, with the newest, which no model has to see.
        """
        going = [steps]
        if steps.takes_back:
            steps.crop(len(ids) - 1)
        steps.pause()
        with self._lock:
            if self._open and steps.length >= LEAST:
                self._kept.append((ids[: steps.length], steps))
                going = []
                sizes = [one.size for _, one in self._kept]
                while len(sizes) > KEPT or sum(sizes) > settings.prompt_cache_size:
                    going.append(self._kept.pop(0)[1])
                    sizes.pop(0)
        for one in going:
            one.close()

    def shared_with(self) -> int:
        """How many other owners there are: none."""
        return 0

    def sleep(self) -> Sequence[Remains]:
        """Give up what is kept."""
        with self._lock:
            kept, self._kept = self._kept, []
        for _, steps in kept:
            steps.close()
        return ()

    def wake(self, token: CancelToken) -> None:
        """Nothing is loaded again."""

    def release(self) -> Sequence[Remains]:
        """Give up what is kept, and keep nothing more."""
        self._open = False
        return self.sleep()

    def leak(self) -> None:
        """After a fork, in the child: the native part is never freed."""
        for _, steps in self._kept:
            leak(steps)


def _usable(seen: Row, steps: Steps, ids: Row) -> int:
    """How many of the tokens that were seen are of use for a prompt."""
    most = min(len(seen), len(ids) - 1)
    other = np.flatnonzero(seen[:most] != ids[:most])
    shared = int(other[0]) if len(other) else most
    return shared if shared == len(seen) or steps.takes_back else 0

"""What a disposal, or a sleep, gave back: the measured answer to a wish."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from ebbtide.cancellation import call_all


@dataclasses.dataclass(frozen=True, slots=True)
class DisposalReceipt:
    """What a disposal gave back, measured.

    All sizes are bytes of anonymous memory, which only this process can give back.

    Attributes:
        charged: What the pipeline alone had taken: its load, and what its calls added.
        released: By how much the process shrank over the disposal.
        retained: What of ``charged`` did not come back, 0 or more.
        quiet: Whether nothing else was loaded, run or disposed meanwhile. Where something was,
            the process's change proves nothing about this pipeline.
        verified: The proof that the memory is back. Quiet: at most 1 % or 1 MB of ``charged``
            stayed, and nothing native is alive. Not quiet: nothing native is alive, and no owner
            is left.
        duration: Seconds from the last running call's end to the receipt.
        method: How freed memory was given back, as in ``malloc_trim``.
        reasons: In words: what was shared, what overlapped, what still pins memory and where.
    """

    charged: int
    released: int
    retained: int
    quiet: bool
    verified: bool
    duration: float
    method: str
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line for a person.

        Example:
            >>> print(DisposalReceipt(31_400_000, 31_200_000, 200_000, True, True, 0.014, "trim"))
            released 31.2 MB of 31.4 MB in 14 ms (verified)
        """
        verdict = "verified" if self.verified else "not verified"
        text = (
            f"released {self.released / 1e6:.1f} MB of {self.charged / 1e6:.1f} MB"
            f" in {self.duration * 1e3:.0f} ms ({verdict})"
        )
        return f"{text}: {'; '.join(self.reasons)}" if self.reasons else text


class Answer:
    """The receipt of a wish to sleep, once it is given.

    Attributes:
        receipt: What came back; None until then, and where the pipeline was disposed instead.
    """

    def __init__(self) -> None:
        self.receipt: DisposalReceipt | None = None
        self._given = False
        self._waiters: list[Callable[[], None]] = []

    def give(self, receipt: DisposalReceipt | None) -> None:
        """The disposer's word, once."""
        self.receipt = receipt
        self._given = True
        call_all(self._waiters)

    def on_given(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` called once it is given; at once if it was."""
        self._waiters.append(callback)
        if self._given:
            call_all(self._waiters)


def unfinished(reason: str) -> DisposalReceipt:
    """The receipt of what has not ended: nothing is measured yet."""
    return DisposalReceipt(0, 0, 0, False, False, 0.0, "none", (reason,))

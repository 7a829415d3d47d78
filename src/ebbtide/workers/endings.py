"""How a child came to its end, in words: errors, and what a receipt says of it."""

from __future__ import annotations

import copy
import dataclasses
import signal
import time
from collections.abc import Sequence

from ebbtide.errors import WorkerCrashedError, WorkerMemoryError
from ebbtide.memory.reaper import TOLERANCE_BYTES, TOLERANCE_SHARE
from ebbtide.receipts import DisposalReceipt
from ebbtide.workers.calls import Call
from ebbtide.workers.plan import Plan
from ebbtide.workers.process import Child


@dataclasses.dataclass(frozen=True, slots=True)
class Ended:
    """How a child came to its end.

    Attributes:
        pid: Its number.
        status: Its exit status, a signal as a negative number; None where nobody knows.
        receipt: What its own disposal gave back; None where there was none.
        trouble: What went wrong before, in words; empty where nothing did.
        killed: The signal that was sent to it; empty where none was.
        anonymous: Bytes of anonymous memory that it had.
    """

    pid: int
    status: int | None
    receipt: DisposalReceipt | None
    trouble: str
    killed: str
    anonymous: int

    @property
    def how(self) -> str:
        """Its end, in words."""
        if self.status is None:
            return "ended, and nobody knows how"
        if self.status >= 0:
            return f"ended with exit status {self.status}"
        try:
            return f"was ended by {signal.Signals(-self.status).name}"
        except ValueError:
            return f"was ended by signal {-self.status}"


def crashed(
    plan: Plan, ended: Ended, calls: Sequence[Call], child: Child, *, overrun: bool
) -> WorkerCrashedError:
    """The error for a child that ended unasked.

    Args:
        plan: What it was to be.
        ended: How it came to its end.
        calls: What it ran.
        child: The child.
        overrun: Whether it needed more memory than it may take.
    """
    now = time.monotonic()
    running = tuple(f"{call.what} for {now - call.began:.1f} s" for call in calls)
    doing = ", ".join(running) if child.ready else "the load"
    text = f"The worker process of {plan.label} (pid {ended.pid})"
    kind: type[WorkerCrashedError] = WorkerCrashedError
    advice = "This process is unhurt."
    if overrun:
        kind = WorkerMemoryError
        text += f" needed more than {_room(plan)}, and"
        advice += " Raise memory_limit, or pass less at once."
    text += f" {ended.how}"
    text += f" while it ran {doing}" if doing else ""
    text += f": {ended.trouble}" if ended.trouble else ""
    if child.ready and plan.isolate.restart == "on-crash":
        advice += " The next call starts a new one."
    elif child.ready:
        advice += " Make a new pipeline."
    error = kind(f"{text}. {advice}", pipeline=plan.label, running=running, status=ended.status)
    if child.tail:
        error.add_note(f"It printed last:\n{child.tail.decode(errors='replace')}")
    return error


def out_of_memory(plan: Plan, error: BaseException) -> WorkerMemoryError:
    """The error for a call that had too little memory, in a child that lives on."""
    made = WorkerMemoryError(
        f"The worker process of {plan.label} needed more than {_room(plan)}: {error} Raise"
        " memory_limit, or pass less at once.",
        pipeline=plan.label,
    )
    for note in getattr(error, "__notes__", ()):
        made.add_note(note)
    return made


def _room(plan: Plan) -> str:
    limit = plan.isolate.limit
    return "there is" if limit is None else f"its memory_limit of {limit / 1e6:,.0f} MB"


def again(error: BaseException) -> BaseException:
    """The same error once more, for another who waits: each has a traceback of its own."""
    return copy.copy(error)


def stayed(receipt: DisposalReceipt) -> bool:
    """Whether a receipt says that memory did not come back, as far as that is known."""
    tolerance = max(TOLERANCE_BYTES, int(receipt.charged * TOLERANCE_SHARE))
    return not receipt.verified or (receipt.quiet and receipt.retained > tolerance)


def recycled(receipt: DisposalReceipt, ended: Ended) -> DisposalReceipt:
    """What a sleep gave back whose process was ended, since memory had stayed.

    Args:
        receipt: The process's own, of the sleep.
        ended: How it came to its end.
    """
    return dataclasses.replace(
        receipt,
        released=max(receipt.charged, receipt.released + ended.anonymous),
        retained=0,
        verified=True,
        method="its process ended",
        reasons=(
            f"memory had stayed, so that its process (pid {ended.pid}) {ended.how}, and all of its"
            " memory went with it; the next call starts a new one",
            f"there: {receipt}",
        ),
    )


def busy_again(receipt: DisposalReceipt) -> DisposalReceipt:
    """The same where calls came meanwhile, so that the process ends after them."""
    reason = "memory stayed: its process ends once the calls that came meanwhile have ended"
    return dataclasses.replace(receipt, reasons=(*receipt.reasons, reason))


def receipt_of(ended: Ended, receipt: DisposalReceipt, *, now: bool) -> DisposalReceipt:
    """What a disposal gave back, the child's memory with this process's.

    Args:
        ended: How the child came to its end; it is reaped, so that its memory is free.
        receipt: What this process measured of itself.
        now: Whether it ended with this disposal, and not before.
    """
    own, size = ended.receipt, ended.anonymous if now else 0
    went = "and all of its memory went with it" if now else "before this disposal"
    reasons = [f"its process (pid {ended.pid}) {ended.how}, {went}"]
    if own is not None:
        reasons.append(f"there: {own}")
    elif ended.trouble:
        reasons.append(ended.trouble)
    elif ended.killed:
        reasons.append(f"it did not end in time, and was sent {ended.killed}")
    elif now:
        reasons.append("it sent no receipt")
    reasons += () if receipt.verified else receipt.reasons
    return DisposalReceipt(
        charged=size,
        released=size,
        retained=0,
        quiet=True,
        verified=receipt.verified,
        duration=receipt.duration,
        method="its process ended",
        reasons=tuple(reasons),
    )

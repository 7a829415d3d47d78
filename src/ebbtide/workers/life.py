"""The lifecycle of a pipeline whose memory is another process's."""

from __future__ import annotations

from ebbtide.cancellation import CancelToken
from ebbtide.errors import DisposalError, InputError
from ebbtide.lifecycle import Disposer, Lifecycle, State
from ebbtide.receipts import Answer, DisposalReceipt
from ebbtide.workers.calls import Call
from ebbtide.workers.plan import Plan
from ebbtide.workers.replicas import Replicas
from ebbtide.workers.worker import Worker


class WorkerLifecycle(Lifecycle):
    """As any other's, but what it took and gave back is measured in its worker process.

    Args:
        plan: What the worker is to be.
        disposer: Who disposes it.
        site: Where the user's code made it.

    Attributes:
        worker: The process, or several; None once it has ended for good.
    """

    __slots__ = ("worker",)

    def __init__(self, plan: Plan, disposer: Disposer, site: tuple[str, int]) -> None:
        kind = Worker if plan.isolate.replicas == 1 else Replicas
        self.worker: Worker | Replicas | None = kind(plan, self._is_now)
        super().__init__(plan.label, disposer, site)
        self.resources.append(self.worker)

    def _is_now(self, state: State) -> None:
        if self.state is not state and self.state is not State.LOADING:
            self.state = state  # whoever waits for the load makes it ready

    @property
    def charged(self) -> int:
        """Bytes of anonymous memory of the worker process."""
        worker = self.worker
        return 0 if worker is None else worker.anonymous

    def request_sleep(self, *, timeout: float | None, deep: bool, collect: bool) -> Answer:
        """Ask the worker's pipeline to sleep and return at once.

        Raises:
            PipelineDisposedError: It takes no calls.
        """
        if timeout is not None and not timeout >= 0:
            raise InputError(f"timeout takes seconds, 0 or more, not {timeout!r}.", value=timeout)
        worker = self.worker
        if not self.takes_calls or worker is None:
            raise self.refusal()
        answer = Answer()
        call = Call("sleep", CancelToken(self.label))

        def ended() -> None:
            receipt, error = call.taken()
            if error is not None:  # it has crashed, or was disposed
                receipt = _asleep(str(error)) if self.takes_calls else None
            answer.give(receipt)

        call.on_done(ended)
        worker.put_to_sleep(call, {"timeout": timeout, "deep": deep, "collect": collect})
        return answer

    def finish(
        self, receipt: DisposalReceipt, *, state: State, error: DisposalError | None = None
    ) -> None:
        """The disposer's last word, with what the worker's own receipt says."""
        worker, self.worker = self.worker, None
        if worker is not None:
            receipt = worker.receipt(receipt)
            if error is not None:
                error.receipt = receipt
        super().finish(receipt, state=state, error=error)


def _asleep(reason: str) -> DisposalReceipt:
    return DisposalReceipt(0, 0, 0, False, True, 0.0, "none", (reason,))

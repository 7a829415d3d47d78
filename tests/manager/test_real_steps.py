"""A manager over real pipelines, taken through random steps; nothing that it promises breaks."""

from __future__ import annotations

import random
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tools.large_models import models

import ebbtide
from ebbtide import PipelineManager
from ebbtide.errors import AcquireTimeoutError, OutOfBudgetError, PipelineInUseError
from ebbtide.manager import ManagerEvent
from ebbtide.memory import anonymous_bytes

TASK = "feature-extraction"
COUNT, MEGABYTES = 12, 4.0


class World:
    """A manager, the leases that are out, and what was told."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.dice = random.Random(seed)
        self.paths = [str(path) for path in models(folder, COUNT, [MEGABYTES])]
        budget = anonymous_bytes() + int(MEGABYTES * 1e6 * 6) + 12_000_000
        self.manager = PipelineManager(budget, remember=False)
        self.manager._core.books.share_for_calls = 0.0
        self.leases: list[tuple[str, Any, Any]] = []
        self.loading: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.told: Counter[str] = Counter()
        self.receipts: list[ebbtide.DisposalReceipt] = []
        self.lock = threading.Lock()
        self.subscription = self.manager.subscribe(self.hear)

    def hear(self, event: ManagerEvent) -> None:
        self.told[event.kind] += 1
        if event.kind == "loading":
            self.loading[event.pipeline] += 1
            if self.loading[event.pipeline] > 1:
                self.wrong.append(f"{event.pipeline} is loaded twice")
        elif event.kind in ("ready", "failed"):
            self.loading[event.pipeline] = 0
        receipt = event.facts.get("receipt")
        if isinstance(receipt, ebbtide.DisposalReceipt):
            self.receipts.append(receipt)

    def step(self) -> None:
        path = self.dice.choice(self.paths)
        what = self.dice.choices(
            ["acquire", "call", "return", "sleep", "evict", "pin", "unpin", "preload", "explain"],
            [30, 30, 28, 3, 3, 1, 3, 3, 2],
        )[0]
        getattr(self, what)(path)
        self.check()

    def acquire(self, path: str) -> None:
        if len(self.leases) >= 4:
            return
        lease = self.manager.acquire(
            TASK, path, timeout=0.5, keep_alive=self.dice.choice([None, 0, 0.01, "forever"])
        )
        try:
            pipe = lease.__enter__()
        except (AcquireTimeoutError, OutOfBudgetError) as error:
            self.told[type(error).__name__] += 1
            return
        self.leases.append((path, lease, pipe))

    def call(self, path: str) -> None:
        if self.leases:
            _, _, pipe = self.dice.choice(self.leases)
            assert pipe("the tide goes out").shape[-1] == 64

    def __getattr__(self, name: str) -> Any:
        if name == "return":
            return self.give_back
        raise AttributeError(name)

    def give_back(self, path: str) -> None:
        if self.leases:
            _, lease, _ = self.leases.pop(self.dice.randrange(len(self.leases)))
            lease.release()

    def sleep(self, path: str) -> None:
        self._gone("sleep", path)

    def evict(self, path: str) -> None:
        self._gone("evict", path)

    def _gone(self, action: str, path: str) -> None:
        leased = path in [one for one, _, _ in self.leases]
        try:
            getattr(self.manager, action)(TASK, path, timeout=0.05 if leased else 20)
            assert not leased or self.manager.status() is None, f"{action} took what is leased"
        except PipelineInUseError:
            assert leased

    def pin(self, path: str) -> None:
        self.manager.pin(TASK, path)

    def unpin(self, path: str) -> None:
        for one in self.paths:
            self.manager.unpin(TASK, one)

    def preload(self, path: str) -> None:
        try:
            self.manager.preload(TASK, path, timeout=0.5)
        except (AcquireTimeoutError, OutOfBudgetError) as error:
            self.told[type(error).__name__] += 1

    def explain(self, path: str) -> None:
        assert str(self.manager.explain(TASK, path))

    def check(self) -> None:
        assert not self.wrong
        for path, _, pipe in self.leases:
            assert pipe.state is ebbtide.State.READY, f"{path} was leased"
        status = self.manager.status()
        assert sum(one.leases for one in status.entries) == len(self.leases)
        assert status.pipelines <= status.budget - self.manager._core.books._beside.sure
        assert anonymous_bytes() <= status.budget * 1.05

    def end(self) -> None:
        for _, lease, _ in self.leases:
            lease.release()
        self.receipts += self.manager.close(timeout=20).values()
        assert not ebbtide.live()
        for one in self.receipts:
            if one.quiet:
                assert one.retained == max(0, one.charged - one.released)


@pytest.mark.parametrize(
    ("seed", "steps"), [(1, 150), pytest.param(2, 2000, marks=pytest.mark.soak)]
)
@pytest.mark.timeout(600)
def test_through_random_steps_every_promise_is_kept(tmp_path: Path, seed: int, steps: int) -> None:
    world = World(tmp_path, seed)
    try:
        for _ in range(steps):
            world.step()
        told = world.told
        assert told["loading"] > steps // 20
        assert told["evicting"] + told["sleeping"] > steps // 40
    finally:
        world.end()

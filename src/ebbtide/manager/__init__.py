"""Many pipelines in one budget: what goes when memory is needed, and nothing that is in use."""

from typing import TYPE_CHECKING

from ebbtide.manager.policy import (
    POLICIES,
    Entry,
    History,
    Need,
    Order,
    Plan,
    Policy,
    Step,
    Use,
    choose,
    expired,
)

if TYPE_CHECKING:
    from ebbtide.manager.events import ManagerEvent, Subscription
    from ebbtide.manager.lease import AcquireOptions, Lease
    from ebbtide.manager.live_view import LiveView
    from ebbtide.manager.manager import PipelineManager
    from ebbtide.manager.status import Explanation, ManagerStatus, PipelineStatus

__all__ = [
    "POLICIES",
    "AcquireOptions",
    "Entry",
    "Explanation",
    "History",
    "Lease",
    "LiveView",
    "ManagerEvent",
    "ManagerStatus",
    "Need",
    "Order",
    "PipelineManager",
    "PipelineStatus",
    "Plan",
    "Policy",
    "Step",
    "Subscription",
    "Use",
    "choose",
    "expired",
]

_HOMES = {
    "Explanation": "status", "ManagerStatus": "status", "PipelineStatus": "status",
    "AcquireOptions": "lease", "Lease": "lease", "LiveView": "live_view",
    "ManagerEvent": "events", "Subscription": "events",
    "PipelineManager": "manager",
}  # fmt: skip
"""Names that are imported when they are first used, and the modules that have them."""


def __getattr__(name: str) -> object:
    import importlib

    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'ebbtide.manager' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"ebbtide.manager.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})

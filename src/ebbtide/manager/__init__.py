"""Many pipelines in one budget: what goes when memory is needed, and nothing that is in use."""

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

__all__ = [
    "POLICIES",
    "Entry",
    "History",
    "Need",
    "Order",
    "Plan",
    "Policy",
    "Step",
    "Use",
    "choose",
    "expired",
]

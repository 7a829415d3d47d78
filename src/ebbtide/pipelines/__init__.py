"""One file a task, and one frozen table of tasks."""

from ebbtide.pipelines.base import Pipeline, PipelineMemory
from ebbtide.pipelines.tasks import TASKS, Task, find

__all__ = ["TASKS", "Pipeline", "PipelineMemory", "Task", "find"]

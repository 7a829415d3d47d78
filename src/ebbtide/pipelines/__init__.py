"""One file a task, and one frozen table of tasks."""

from ebbtide.pipelines.base import Pipeline, PipelineMemory
from ebbtide.pipelines.feature_extraction import FeatureExtractionPipeline
from ebbtide.pipelines.tasks import TASKS, Task, find

__all__ = ["TASKS", "FeatureExtractionPipeline", "Pipeline", "PipelineMemory", "Task", "find"]

"""One file a task, and one frozen table of tasks."""

from ebbtide.pipelines.base import Pipeline, PipelineMemory
from ebbtide.pipelines.feature_extraction import FeatureExtractionPipeline
from ebbtide.pipelines.fill_mask import FillMaskPipeline
from ebbtide.pipelines.question_answering import QuestionAnsweringPipeline
from ebbtide.pipelines.tasks import TASKS, Task, find
from ebbtide.pipelines.text_classification import TextClassificationPipeline
from ebbtide.pipelines.token_classification import TokenClassificationPipeline
from ebbtide.pipelines.zero_shot_classification import ZeroShotClassificationPipeline

__all__ = [
    "TASKS",
    "FeatureExtractionPipeline",
    "FillMaskPipeline",
    "Pipeline",
    "PipelineMemory",
    "QuestionAnsweringPipeline",
    "Task",
    "TextClassificationPipeline",
    "TokenClassificationPipeline",
    "ZeroShotClassificationPipeline",
    "find",
]

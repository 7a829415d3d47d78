"""Token by token: what a step needs of a model, which token comes next, and when it ends."""

from ebbtide.generation.config import GenerationConfig

__all__ = ["GenerationConfig"]

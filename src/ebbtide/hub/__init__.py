"""From a model's name or folder to its files."""

from ebbtide.hub.files import ModelFiles
from ebbtide.hub.installed import InstalledModel
from ebbtide.hub.resolve import resolve

__all__ = ["InstalledModel", "ModelFiles", "resolve"]

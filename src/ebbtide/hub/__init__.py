"""From a model's name or folder to its files."""

from ebbtide.hub.cache import Repository, default_root
from ebbtide.hub.events import Progress, ProgressEvent, listener
from ebbtide.hub.files import ModelFiles
from ebbtide.hub.installed import InstalledModel
from ebbtide.hub.remote import HubFiles, HubOptions, is_id
from ebbtide.hub.resolve import resolve

__all__ = [
    "HubFiles",
    "HubOptions",
    "InstalledModel",
    "ModelFiles",
    "Progress",
    "ProgressEvent",
    "Repository",
    "default_root",
    "is_id",
    "listener",
    "resolve",
]

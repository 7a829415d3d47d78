"""The names that `ebbtide` offers are exactly those it says it offers."""

from __future__ import annotations

import inspect
import types

import pytest

import ebbtide


def test_every_public_name_can_be_had() -> None:
    for name in ebbtide.__all__:
        assert getattr(ebbtide, name) is not None
    namespace: dict[str, object] = {}
    exec("from ebbtide import *", namespace)
    assert set(ebbtide.__all__) <= set(namespace)


def test_the_list_is_sorted_and_has_no_name_twice() -> None:
    assert list(ebbtide.__all__) == sorted(set(ebbtide.__all__))


def test_the_list_and_the_table_of_homes_agree() -> None:
    assert {*ebbtide._HOMES, "__version__"} == set(ebbtide.__all__)


def test_the_imports_for_type_checkers_agree_with_the_list() -> None:
    import ast

    tree = ast.parse(inspect.getsource(ebbtide))
    names = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ebbtide")
        for alias in node.names
    }
    assert names == {*ebbtide.__all__} - {"__version__"}


def test_a_name_is_the_object_of_its_home() -> None:
    import importlib

    for name, home in ebbtide._HOMES.items():
        module = importlib.import_module(f"ebbtide.{home or name}")
        assert getattr(ebbtide, name) is (getattr(module, name) if home else module)


def test_a_name_stays_the_object_after_every_room_was_imported() -> None:
    import contextlib
    import importlib
    import pkgutil

    for found in pkgutil.walk_packages(ebbtide.__path__, "ebbtide."):
        if not found.name.startswith("ebbtide.cli"):
            with contextlib.suppress(ebbtide.MissingExtraError):  # of a framework
                importlib.import_module(found.name)
    modules = {"errors", "memory"}
    for name in ebbtide.__all__:
        assert isinstance(getattr(ebbtide, name), types.ModuleType) == (name in modules)


def test_dir_lists_every_public_name() -> None:
    assert set(ebbtide.__all__) <= set(dir(ebbtide))
    assert dir(ebbtide) == sorted(dir(ebbtide))


@pytest.mark.parametrize("name", ["pipelin", "Session", "_nothing", "onnxruntime", ""])
def test_an_unknown_name_is_an_attribute_error_that_names_it(name: str) -> None:
    with pytest.raises(AttributeError, match=f"module 'ebbtide' has no attribute '{name}'"):
        getattr(ebbtide, name)
    assert not hasattr(ebbtide, name)


def test_every_public_thing_is_documented() -> None:
    for name in ebbtide.__all__:
        value = getattr(ebbtide, name)
        assert name == "__version__" or inspect.getdoc(value)


def test_the_version_is_a_version() -> None:
    assert all(part.isdigit() for part in ebbtide.__version__.split(".")[:2])

"""A pytest plugin: a test fails that leaves a pipeline alive, or memory.

Ask for it in one test with the fixture `ebbtide_leaks`, or in every test with ``--ebbtide-leaks``.
Until then nothing else of Ebbtide is imported, since every run of pytest imports this.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

_BOUND = "ebbtide_leaks_megabytes"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--ebbtide-leaks`` and the bound's setting."""
    parser.getgroup("ebbtide").addoption(
        "--ebbtide-leaks",
        action="store_true",
        help="fail every test that leaves an Ebbtide pipeline alive, or memory",
    )
    parser.addini(_BOUND, "MB of anonymous memory that a test may leave behind", default="5")


def pytest_configure(config: pytest.Config) -> None:
    """Add the marker; with ``--ebbtide-leaks``, have every test use the fixture."""
    config.addinivalue_line(
        "markers",
        f"{_BOUND}(megabytes): MB of anonymous memory that this test may leave behind, where"
        " ebbtide_leaks looks",
    )
    if config.getoption("--ebbtide-leaks"):
        config.pluginmanager.register(_EveryTest(), "ebbtide-leaks-every-test")


class _EveryTest:
    @pytest.fixture(autouse=True)
    def _ebbtide_leaks_in_every_test(self, ebbtide_leaks: None) -> None:
        pass


@pytest.fixture
def ebbtide_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a pipeline alive, or more anonymous memory than it may.

    What is there before the test, as from fixtures of a wider scope, is not the test's. Memory is
    compared after a collection and a trim, and not in a test that imports modules for the first
    time, for they stay. A test that has failed already is left alone: its traceback holds what it
    had.
    """
    from ebbtide.memory import reclaim
    from ebbtide.memory.leaked import left_behind, lifecycles

    bound = _bound(request)
    reclaimed = reclaim(collect=True)
    before = set(lifecycles())
    modules = len(sys.modules)
    failed = request.session.testsfailed
    yield
    if request.session.testsfailed != failed:
        return
    left = [life for life in lifecycles() if life not in before]
    wrong = [str(leak) for leak in map(left_behind, left) if leak is not None]
    if not wrong and len(sys.modules) == modules:
        kept = sum(life.charged for life in left if life.lent is not None)  # by a manager
        grown = (reclaim(collect=True).after - reclaimed.after - kept) / 1e6
        if grown > bound:
            wrong.append(
                f"{grown:.1f} MB more of anonymous memory than before, after a collection and a"
                f" trim; {bound:g} MB are allowed here ({_BOUND})"
            )
    if wrong:
        pytest.fail("The test left behind:\n" + "\n".join(wrong), pytrace=False)


def _bound(request: pytest.FixtureRequest) -> float:
    marker = request.node.get_closest_marker(_BOUND)
    given = marker.args[0] if marker and marker.args else request.config.getini(_BOUND)
    try:
        return float(given)
    except (TypeError, ValueError):
        raise pytest.UsageError(f"{_BOUND} takes a number of MB, not {given!r}.") from None

"""The plugin fails a test that leaves a pipeline or memory, and is no burden until it is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

import ebbtide

pytest_plugins = ["pytester"]

BERT = Path(__file__).parent.parent / "models" / "tiny-bert"
PRELUDE = f"""
import pytest
MODEL = {str(BERT)!r}
KEPT = []
def load():
    import ebbtide
    return ebbtide.pipeline("feature-extraction", MODEL, prepare=False)
"""


class Run:
    """Runs tests as a user would, in a pytest of their own."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self._pytester = pytester

    def __call__(self, tests: str, *options: str, ini: str = "") -> pytest.RunResult:
        self._pytester.makeini(f"[pytest]\n{ini}")
        self._pytester.makepyfile(test_shop=PRELUDE + tests)
        plugin = ("-p", "no:ebbtide", "-p", "ebbtide.integrations.pytest_plugin")
        return self._pytester.runpytest_subprocess(
            *plugin, "-p", "no:cacheprovider", *options, timeout=90
        )


@pytest.fixture
def run_tests(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("PYTHONPATH", str(Path(ebbtide.__file__).parents[1]))
    return Run(pytester)


def test_a_test_that_leaves_a_pipeline_fails_and_others_do_not(run_tests: Run) -> None:
    result = run_tests(
        """
def test_keeps(ebbtide_leaks):
    KEPT.append(load())

def test_keeps_another_one_that_is_not_asked_about():
    KEPT.append(load())

def test_after_it(ebbtide_leaks):
    with load() as pipe:
        pipe("The tide goes out.")

class Ring:
    def __init__(self):
        self.me, self.pipe = self, load()

def test_forgets(ebbtide_leaks):
    Ring()
"""
    )
    result.assert_outcomes(passed=4, errors=2)
    result.stdout.fnmatch_lines(
        [
            "*ERROR at teardown of test_keeps _*",
            "The test left behind:",
            "*, made at *test_shop.py:6: * MB, *",
            "  held by the module-level list KEPT of test_shop (*test_shop.py)",
            "*ERROR at teardown of test_forgets _*",
            "*, made at *test_shop.py:6: * MB, *",
            "  unreachable, waits for a collection: in a cycle",
        ]
    )


def test_the_option_asks_in_every_test(run_tests: Run) -> None:
    result = run_tests(
        """
import unittest

@pytest.fixture(scope="module")
def shared():
    with load() as pipe:
        yield pipe

@pytest.fixture
def own():
    with load() as pipe:
        yield pipe

def test_pipelines_of_fixtures_are_not_the_tests(shared, own):
    own("The tide goes out.")

def test_keeps():
    KEPT.append(load())

class TestOldStyle(unittest.TestCase):
    def test_keeps(self):
        KEPT.append(load())

def test_that_has_failed_is_left_alone():
    pipe = load()
    assert not pipe

def test_after_that():
    pass
""",
        "--ebbtide-leaks",
    )
    result.assert_outcomes(passed=4, failed=1, errors=2)


def test_memory_that_is_left_fails_a_test_beyond_a_bound(run_tests: Run) -> None:
    result = run_tests(
        """
def test_grows():
    KEPT.append(bytearray(b"x") * 9_000_000)

def test_grows_little():
    KEPT.append(bytearray(b"x") * 2_000_000)

def test_gives_back():
    some = [bytearray(b"x") * 9_000_000]
    some.append(some)

@pytest.mark.ebbtide_leaks_megabytes(20)
def test_may_grow():
    KEPT.append(bytearray(b"x") * 9_000_000)
""",
        "--ebbtide-leaks",
        "--strict-markers",
    )
    result.assert_outcomes(passed=4, errors=1)
    result.stdout.fnmatch_lines(
        [
            "*ERROR at teardown of test_grows _*",
            "The test left behind:",
            "*MB more of anonymous memory than before, after a collection and a trim; 5 MB are*",
        ]
    )


def test_the_bound_is_a_setting(run_tests: Run) -> None:
    tests = """
def test_grows(ebbtide_leaks):
    KEPT.append(bytearray(b"x") * 9_000_000)
"""
    run_tests(tests, ini="ebbtide_leaks_megabytes = 20").assert_outcomes(passed=1)
    result = run_tests(tests, ini="ebbtide_leaks_megabytes = many")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*ebbtide_leaks_megabytes takes a number of MB, not 'many'."])


def test_nothing_else_is_imported_until_it_is_asked(run_tests: Run) -> None:
    result = run_tests(
        """
import sys

def test_modules():
    mine = {name for name in sys.modules if name.startswith("ebbtide")}
    assert mine == {"ebbtide", "ebbtide.integrations", "ebbtide.integrations.pytest_plugin"}
    assert not {"onnxruntime", "numpy", "tokenizers"} & set(sys.modules)

def test_modules_once_asked(ebbtide_leaks):
    assert not {"onnxruntime", "numpy", "tokenizers"} & set(sys.modules)
"""
    )
    result.assert_outcomes(passed=2)

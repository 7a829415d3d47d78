"""``ebbtide top``: the script runs as Python runs it, and the view stays out of its way."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

MODELS = Path(__file__).parents[1] / "models"

Write = Callable[[str], Path]

MANAGED = f"""
import ebbtide
with ebbtide.PipelineManager("4 GB", remember=False, max_pipelines=1) as manager:
    for task, model in (("feature-extraction", "tiny-bert"), ("fill-mask", "tiny-mlm")):
        with manager.acquire(task, {str(MODELS)!r} + "/" + model) as pipe:
            print("has", pipe.task)
"""

LOOK = """
import threading
from ebbtide.manager import live_facts
looks = next(iter(live_facts._watches.values()))
def seen(count):
    while len(shown) < count:
        assert changed.acquire(timeout=5)
shown, changed = [], threading.Semaphore(0)
show = looks._show
def noted(facts):
    show(facts)
    shown.append(facts)
    changed.release()
looks._show = noted
"""
"""In a script: every look that was shown, and a way to wait for so many."""


@pytest.fixture
def script(tmp_path: Path) -> Write:
    """Writes a script, and gives its path."""

    def write(text: str) -> Path:
        path = tmp_path / "work.py"
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return path

    return write


class Ended:
    def __init__(self, code: int, out: bytes, err: str) -> None:
        self.code, self.raw, self.err = code, out, err
        self.text = re.sub(r"\x1b(\[[0-9;?]*[A-Za-z]|[78D])", "", out.decode("utf-8", "replace"))


def _command(*words: str | Path) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "ebbtide.cli", "top", *map(str, words)]


def _environment(**extra: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if name not in {"NO_COLOR", "TERM"}}
    return {**clean, "PYTHONIOENCODING": "utf-8", **extra}


def plainly(*words: str | Path) -> Ended:
    """The command with pipes."""
    done = subprocess.run(
        _command(*words), capture_output=True, timeout=90, env=_environment(), check=False
    )
    return Ended(done.returncode, done.stdout, done.stderr.decode())


def on_terminal(
    *words: str | Path, rows: int = 40, columns: int = 100, typed: str = "", **environ: str
) -> Ended:
    """The command on a terminal, which is its standard input, output and error."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    os.write(leader, typed.encode())
    process = subprocess.Popen(
        _command("--interval", "0.1", *words),
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=_environment(**{"TERM": "xterm", **environ}),
    )
    os.close(follower)
    shown = b""
    try:
        while piece := os.read(leader, 65536):
            shown += piece
    except OSError:  # Linux: the other end is closed
        pass
    os.close(leader)
    return Ended(process.wait(timeout=60), shown, "")


# The script runs as Python runs it


def test_a_script_gets_its_own_arguments_and_place(script: Write) -> None:
    path = script(
        """
        import sys, os, __main__
        print(sys.argv[1:], __name__, os.path.basename(sys.argv[0]), os.path.basename(__file__))
        print(sys.path[0] == os.path.dirname(os.path.abspath(__file__)))
        print(__main__.__dict__ is globals(), __spec__)
        """
    )
    ended = plainly(path, "--help", "-x", "--", "one two", "--json")
    assert ended.text.splitlines() == [
        "['--help', '-x', '--', 'one two', '--json'] __main__ work.py work.py",
        "True",
        "True None",
    ]
    assert ended.code == 0


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("raise SystemExit", 0, ""),
        ("raise SystemExit(7)", 7, ""),
        ("raise SystemExit('no more')", 1, "no more"),
        ("raise ValueError('bad tide')", 1, "ValueError: bad tide"),
        ("import ebbtide; raise ebbtide.InputError('bad call')", 1, "InputError: bad call"),
        ("if :", 1, "SyntaxError: invalid syntax"),
    ],
)
def test_a_script_ends_with_its_own_exit_code(
    script: Write, line: str, code: int, said: str
) -> None:
    ended = plainly(script(line))
    assert ended.code == code
    assert said in ended.err


def test_a_traceback_shows_the_script_and_nothing_of_the_command(script: Write) -> None:
    path = script(
        """
        def deep():
            raise ValueError("bad tide")
        deep()
        """
    )
    ended = plainly(path)
    files = re.findall(r'File "([^"]+)"', ended.err)
    assert files == [str(path), str(path)]


def test_ctrl_c_ends_the_script_with_130(script: Write) -> None:
    path = script(
        f"""
        import os, signal
        os.kill(os.getpid(), {int(signal.SIGINT)})
        signal.pause()
        """
    )
    ended = plainly(path)
    assert ended.code == 130
    assert "KeyboardInterrupt" in ended.err


def test_a_file_that_is_not_there_is_a_wrong_call(tmp_path: Path) -> None:
    ended = plainly(tmp_path / "none.py")
    assert (ended.code, ended.text) == (2, "")
    assert "There is no file" in ended.err


def test_an_interval_that_is_too_short_is_a_wrong_call(script: Write) -> None:
    ended = plainly("--interval", "0.01", script("print('ran')"))
    assert (ended.code, ended.text) == (2, "")
    assert "interval takes seconds" in ended.err


def test_threads_of_the_script_and_of_its_executors_end_before_the_view(script: Write) -> None:
    path = script(
        """
        import concurrent.futures, threading
        executor = concurrent.futures.ThreadPoolExecutor(1)
        executor.submit(print, "in the executor")
        first = threading.Event()
        threading.Thread(target=lambda: (first.wait(), print("in the thread"))).start()
        first.set()
        """
    )
    ended = plainly(path)
    assert ended.code == 0
    assert sorted(ended.text.splitlines()) == ["in the executor", "in the thread"]


def test_the_view_stays_until_the_scripts_threads_have_ended(script: Write) -> None:
    path = script(
        LOOK
        + """
def work():
    seen(len(shown) + 3)
    print("late", flush=True)
threading.Thread(target=work).start()
"""
    )
    ended = on_terminal(path)
    assert ended.raw.index(b"late\r\n") < ended.raw.rindex(b"\x1b[r")


def test_what_a_script_leaves_lives_until_its_exit_hooks_ran(script: Write) -> None:
    path = script(
        f"""
        import atexit, ebbtide
        pipe = ebbtide.pipeline("feature-extraction", {str(MODELS / "tiny-bert")!r})
        atexit.register(lambda: print(pipe("the tide", pooling="mean").shape))
        raise SystemExit(4)
        """
    )
    ended = plainly(path)
    assert (ended.code, ended.text) == (4, "(1, 32)\n")
    assert "1 pipeline was still alive" in ended.err
    assert "feature-extraction tiny-bert" in ended.err


# Where there is no terminal


def test_without_a_terminal_the_scripts_output_is_left_alone(script: Write) -> None:
    ended = plainly(script(MANAGED))
    assert ended.text.splitlines() == ["has feature-extraction", "has fill-mask"]


def test_without_a_terminal_each_line_and_the_summary_go_to_standard_error(script: Write) -> None:
    ended = plainly(script(MANAGED))
    lines = ended.err.splitlines()
    assert all(line.startswith("ebbtide: ") for line in lines)
    assert "2 loads, 2 disposals" in ended.err
    assert "2 receipts, all verified: released" in ended.err
    assert "feature-extraction tiny-bert: released" in ended.err


# On a terminal


def test_on_a_terminal_the_view_shows_budget_pipelines_and_events(script: Write) -> None:
    path = script(
        LOOK
        + f"""
import ebbtide
with ebbtide.PipelineManager("4 GB", remember=False) as manager:
    alone = ebbtide.pipeline("feature-extraction", {str(MODELS / "tiny-bert")!r})
    with manager.acquire("fill-mask", {str(MODELS / "tiny-mlm")!r}):
        seen(len(shown) + 2)
    alone.dispose()
"""
    )
    ended = on_terminal(path)
    assert ended.code == 0, ended.text
    for words in (
        "ebbtide top work.py", "2 pipelines, 1 in use", "budget", "floor", "workspace", "free",
        "4000.0 MB", "anonymous", "limit", "left", "last 30s", "fill-mask tiny-mlm",
        "feature-extraction tiny-bert", "ready after", "receipts, all verified",
    ):  # fmt: skip
        assert words in ended.text, words


def test_what_is_printed_goes_above_the_view_and_is_left_as_it_is(script: Write) -> None:
    path = script(
        LOOK
        + """
import os, subprocess, sys
seen(1)
print("a line")
sys.stdout.buffer.write(b"bytes \\xe2\\x9c\\x93\\n"); sys.stdout.flush()
print("part", end="", flush=True)
seen(len(shown) + 2)
print("ial")
subprocess.run([sys.executable, "-c", "print('a child')"])
os.write(1, b"straight\\n")
print(sys.stdout.isatty(), sys.stdout is sys.__stdout__)
print(input("name? ").upper())
"""
    )
    ended = on_terminal(path, typed="ann\n")
    assert ended.code == 0, ended.text
    assert b"a line\r\n" in ended.raw
    assert b"bytes \xe2\x9c\x93\r\n" in ended.raw
    assert b"a child\r\n" in ended.raw
    assert b"straight\r\n" in ended.raw
    assert b"True True\r\n" in ended.raw
    assert b"ANN\r\n" in ended.raw
    # Each drawing saves the cursor and restores it, so that a line goes on where it stopped.
    between = ended.raw.split(b"part", 1)[1].split(b"ial\r\n", 1)[0]
    assert between.count(b"\x1b7") == between.count(b"\x1b8") >= 2
    assert between.startswith(b"\x1b7")
    assert between.endswith(b"\x1b8")


def test_in_the_end_the_whole_screen_scrolls_again_and_the_summary_stays(script: Write) -> None:
    ended = on_terminal(script(MANAGED))
    assert b"\x1b[1;" in ended.raw  # the region above the view
    end = ended.raw.rindex(b"\x1b[r")
    assert b"at most" in ended.raw[end:]
    assert b"receipts, all verified" in ended.raw[end:]
    assert b"\x1b[1;" not in ended.raw[end:]


def test_the_screen_is_whole_again_after_an_error_too(script: Write) -> None:
    ended = on_terminal(script(LOOK + "seen(1)\nraise ValueError('bad tide')"))
    assert ended.code == 1
    assert ended.raw.rindex(b"bad tide") < ended.raw.rindex(b"\x1b[r")


def test_a_script_may_close_its_standard_output(script: Write) -> None:
    ended = on_terminal(script(LOOK + "seen(1)\nimport sys\nsys.stdout.close()"))
    assert ended.code == 0, ended.text
    assert ended.raw.count(b"\x1b[r") == 1
    assert b"Traceback" not in ended.raw


def test_a_forked_child_draws_nothing_and_takes_nothing_away(script: Write) -> None:
    path = script(
        LOOK
        + """
import os, sys
seen(1)
child = os.fork()
if child == 0:
    print("child", flush=True)
    sys.exit(0)
os.waitpid(child, 0)
seen(len(shown) + 1)
print("parent")
"""
    )
    ended = on_terminal(path)
    assert ended.code == 0, ended.text
    assert ended.raw.count(b"\x1b[r") == 1
    assert ended.text.count("at most, ") == 1
    assert ended.raw.index(b"child\r\n") < ended.raw.index(b"parent\r\n")


@pytest.mark.parametrize("environ", [{"TERM": "dumb"}, {"TERM": ""}])
def test_a_terminal_that_cannot_move_its_cursor_gets_lines(
    script: Write, environ: dict[str, str]
) -> None:
    ended = on_terminal(script(MANAGED), **environ)
    assert b"\x1b" not in ended.raw
    assert "ebbtide: " in ended.text


def test_no_color_and_ascii_are_respected(script: Write) -> None:
    ended = on_terminal(
        script(LOOK + "seen(2)"), NO_COLOR="1", PYTHONIOENCODING="ascii", PYTHONUTF8="0"
    )
    assert ended.code == 0
    assert re.search(rb"\x1b\[[1-9][0-9;]*m", ended.raw) is None
    assert ended.raw.isascii()


def test_a_terminal_with_few_rows_gets_the_summary_alone(script: Write) -> None:
    ended = on_terminal(script(LOOK + "seen(2)\nprint('done')"), rows=8)
    assert b"\x1b[1;" not in ended.raw
    assert "done" in ended.text
    assert "at most, " in ended.text


def test_a_terminal_that_changes_its_size_gets_a_new_view(script: Write) -> None:
    path = script(
        LOOK
        + """
import fcntl, struct, sys, termios
seen(1)
fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 60, 0, 0))
seen(len(shown) + 2)
"""
    )
    ended = on_terminal(path, rows=30)
    assert re.search(rb"\x1b\[50;1H", ended.raw)
    assert re.search(rb"\x1b\[r\x1b8\x1b\[J", ended.raw)

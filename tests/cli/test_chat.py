"""``ebbtide chat``: on a terminal, and through pipes."""

from __future__ import annotations

import itertools
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ebbtide
from ebbtide.cancellation import CancelToken
from ebbtide.cli.chat import Answer, Conversation, Stop, Thoughts
from ebbtide.cli.results import printable
from ebbtide.errors import InputError
from ebbtide.models.chat import ChatTemplate
from ebbtide.pipelines.base import PipelineMemory
from ebbtide.pipelines.generating import Piece, Stream

MODELS = Path(__file__).parents[1] / "models"
LLAMA = MODELS / "gen-llama"  # takes no system message, and 128 tokens
QWEN = MODELS / "gen-qwen3"

_ON_ITS_TERMINAL = (
    "import os, sys; os.close(os.open(sys.argv[1], os.O_RDWR)); os.execv(sys.argv[2], sys.argv[2:])"
)
"""Takes a terminal for its own, so that Ctrl-C there is a signal, and becomes the command."""


class Person:
    """Someone at a terminal, who reads before they type."""

    def __init__(self, words: tuple[str | Path, ...], environ: dict[str, str]) -> None:
        self._leader, follower = pty.openpty()
        command = [sys.executable, "-W", "error", "-m", "ebbtide.cli", "chat", *map(str, words)]
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("EBBTIDE_") and name != "FORCE_COLOR"
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", _ON_ITS_TERMINAL, os.ttyname(follower), *command],
            stdin=follower,
            stdout=follower,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env={
                **environment,
                "TERM": "xterm",
                "COLUMNS": "80",
                "PYTHONIOENCODING": "utf-8",
                **environ,
            },
        )
        os.close(follower)
        self.seen = ""
        self._modes = termios.tcgetattr(self._leader)

    def read_until(self, pattern: str) -> str:
        """What is shown from now on until it matches, without colours and the like."""
        shown = b""
        while not re.search(pattern, text := _plain(shown)):
            piece = self._read()
            assert piece, f"the chat ended: {text}"
            shown += piece
        self.seen += text
        return text

    def read_prompt(self) -> str:
        return self.read_until(r"(^|\n)> $")

    def interrupt(self) -> None:
        """Press Ctrl-C once the line is waited for.

        Python does not hear a signal that comes between the prompt and the wait for a key.
        """
        stat = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/stat")
        while stat.read_text().rpartition(") ")[2][0] != "S":
            os.sched_yield()
        self.type("\x03")

    def type(self, keys: str, encoding: str = "utf-8") -> None:
        os.write(self._leader, keys.encode(encoding))

    def say(self, line: str) -> str:
        """Type a line, and give what is shown between it and the next prompt."""
        self.type(line + "\n")
        return self.read_prompt().partition("\n")[2].removesuffix("\n> ").strip("\n")

    def end(self) -> tuple[int, str]:
        """The exit code, and standard error."""
        while self._read():
            pass
        _, told = self.process.communicate()
        return self.process.returncode, told.decode()

    @property
    def modes_are_as_before(self) -> bool:
        """Whether the terminal shows what is typed, and so on, as it did before the chat."""
        return termios.tcgetattr(self._leader) == self._modes

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()
        os.close(self._leader)

    def _read(self) -> bytes:
        try:
            return os.read(self._leader, 4096)
        except OSError:  # Linux: the other end is closed
            return b""


def _plain(shown: bytes) -> str:
    text = shown.decode(errors="ignore").replace("\r", "")
    return re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", text)


@pytest.fixture
def person() -> Iterator[Callable[..., Person]]:
    """Starts a chat on a terminal of 80 columns; standard error is none."""
    started: list[Person] = []

    def start(*words: str | Path, **environ: str) -> Person:
        started.append(Person(words, environ))
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.fixture
def long_llama(tmp_path: Path) -> Path:
    """A model that may write for a long time."""
    folder = tmp_path / "long-llama"
    shutil.copytree(LLAMA, folder)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 1_000_000
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def written(model: Path, *chats: list[dict[str, str]], **options: Any) -> list[str]:
    """What the pipeline answers to each chat."""
    options = {"max_new_tokens": 8, "return_full_text": False, **options}
    with ebbtide.pipeline("text-generation", model) as pipe:
        found: Any = [pipe(chat, **options) for chat in chats]
        return [one[0]["generated_text"] for one in found]


def _shown(text: str) -> str:
    return printable(text).strip()


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


FIGURES = r"8 tokens at [\d.]+/s, first after [\d.]+ s; [\d.]+ MB(, cache [\d.]+ MB)?; cut off"

# Pipes


def test_each_line_is_a_message_of_one_conversation(ebbtide_run: Any) -> None:
    [first] = written(QWEN, [user("the tide")])
    chat = [user("the tide"), assistant(first), user("goes out")]
    [second] = written(QWEN, chat)
    ended = ebbtide_run(
        "chat", "--model", QWEN, "--max-new-tokens", "8", stdin="the tide\n\ngoes out\n"
    )
    assert (ended.code, ended.out) == (0, printable(f"{first}\n{second}\n"))
    figures, more, receipt = ended.err.splitlines()
    assert re.fullmatch(FIGURES, figures)
    assert re.fullmatch(FIGURES, more)
    assert receipt.startswith("released ")


def test_json_is_one_line_an_answer_and_comes_before_the_next_message(
    ebbtide_start: Any,
) -> None:
    process = ebbtide_start("chat", "--model", QWEN, "--json", "--max-new-tokens", "8")
    chat = []
    for text in ("the tide", "/clear"):
        process.stdin.write(text + "\n")
        process.stdin.flush()
        line = json.loads(process.stdout.readline())
        chat.append(user(text))
        assert set(line) == {"role", "content", "tokens", "seconds", "finish_reason"}
        assert (line["role"], line["tokens"], line["finish_reason"]) == ("assistant", 8, "length")
        assert line["content"] == written(QWEN, chat)[0]
        chat.append(assistant(line["content"]))
    process.stdin.close()
    assert process.wait() == 0
    assert process.stderr.read() == ""


def test_a_system_message_stands_before_all_else(ebbtide_run: Any) -> None:
    chat = [{"role": "system", "content": "be brief"}, user("the tide")]
    words = ("--model", QWEN, "--max-new-tokens", "8", "--system", "be brief", "--json")
    [line] = ebbtide_run("chat", *words, stdin="the tide").lines
    assert [line["content"]] == written(QWEN, chat)


def test_options_of_a_generation_go_along(ebbtide_run: Any) -> None:
    chat, drawn = [user("the tide")], {"temperature": 3.0, "seed": 5}
    words = ("--model", QWEN, "--max-new-tokens=8", "--temperature", "3.0", "--seed", "5")
    ended = ebbtide_run("chat", *words, stdin="the tide")
    [expected], [usual] = written(QWEN, chat, **drawn), written(QWEN, chat)
    assert ended.out == printable(expected) + "\n"
    assert expected != usual


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--model", MODELS / "gen-gpt2"), "has no chat template"),
        (("--model", LLAMA, "--system", "be brief"), "no such role: system"),
        (
            ("--model", LLAMA, "--num-beams=2", "--num-return-sequences=2"),
            "A stream is of one sequence",
        ),
        (("--model", LLAMA, "--temprature", "1"), "Did you mean 'temperature'?"),
        (("--model", LLAMA, "hello"), "chat takes no text"),
        (("--model", "./no/such/folder"), "There is no folder"),
    ],
)
def test_a_wrong_call_is_one_line_and_exits_with_2_before_any_message(
    ebbtide_start: Any, words: tuple[str | Path, ...], named: str
) -> None:
    process = ebbtide_start("chat", *words)
    assert process.wait() == 2
    told = process.stderr.read()
    assert named in told
    assert told.startswith("ebbtide: ")
    assert told.count("\n") == 1
    assert process.stdout.read() == ""


def test_a_conversation_that_outgrows_the_model_ends_a_pipe_with_2(ebbtide_run: Any) -> None:
    ended = ebbtide_run("chat", "--model", LLAMA, stdin="one\ntwo\nthree\n")
    assert ended.code == 2
    assert "and the model can take 128" in ended.err.splitlines()[-1]


def test_control_c_ends_a_pipe_with_130(ebbtide_start: Any, long_llama: Path) -> None:
    most = "100000"
    process = ebbtide_start(
        "chat", "--model", long_llama, "--max-new-tokens", most, "--min-new-tokens", most
    )
    process.stdin.write("hello\n")
    process.stdin.flush()
    assert process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert "Traceback" not in process.stderr.read()


# A terminal


def test_a_terminal_shows_the_model_then_answers_and_figures(person: Any) -> None:
    someone = person("--model", QWEN, "--max-new-tokens", "8")
    greeting = someone.read_prompt()
    assert f"{QWEN} (fp32 on cpu), " in greeting
    assert "/help" in greeting
    chat = [user("the tide")]
    for text in ("the tide", "goes out"):
        answer, figures = someone.say(text).rsplit("\n", 1)
        [expected] = written(QWEN, chat)
        assert answer == _shown(expected)
        assert re.fullmatch(FIGURES, figures)
        chat += [assistant(expected), user("goes out")]
    someone.type("\x04")
    code, told = someone.end()
    assert code == 0
    assert told.startswith("released ")
    assert told.count("\n") == 1


@pytest.mark.parametrize("keys", ["", "half a line", "/quit\n"])
def test_the_chat_ends_at_the_prompt_with_a_receipt_and_0(person: Any, keys: str) -> None:
    someone = person("--model", LLAMA)
    someone.read_prompt()
    assert not someone.modes_are_as_before  # while a line is edited
    someone.type(keys)
    if keys != "/quit\n":
        someone.read_until(re.escape(keys) + "$")
        someone.interrupt()
    code, told = someone.end()
    assert code == 0
    assert someone.modes_are_as_before
    assert told.startswith("released ")
    assert told.count("\n") == 1


def test_control_c_stops_an_answer_and_what_was_written_stays(
    person: Any, long_llama: Path, tmp_path: Path
) -> None:
    most = "100000"
    someone = person("--model", long_llama, "--max-new-tokens", most, "--min-new-tokens", most)
    someone.read_prompt()
    someone.type("hello\n")
    begun = someone.read_until(r"hello\n.{30}").partition("\n")[2]
    someone.type("\x03")
    answer, figures = (begun + someone.read_prompt()).removesuffix("\n\n> ").rsplit("\n", 1)
    assert figures.endswith("; stopped")
    assert int(figures.split()[0]) < 100_000
    someone.say(f"/save {tmp_path / 'chat.json'}")
    said, kept = json.loads((tmp_path / "chat.json").read_text(encoding="utf-8"))
    assert said == user("hello")
    assert kept["role"] == "assistant"
    assert answer.replace("^C", "").rstrip() == _plain(kept["content"].encode()).strip()
    someone.type("and you?\n")
    someone.read_until(r"you\?\n.{30}")
    someone.type("\x03")
    assert "; stopped" in someone.read_prompt()
    someone.type("\x04")
    code, told = someone.end()
    assert (code, told.count("\n")) == (0, 1)
    assert someone.modes_are_as_before


def test_a_conversation_that_outgrows_the_model_is_said_and_clear_begins_anew(
    person: Any,
) -> None:
    someone = person("--model", LLAMA)
    someone.read_prompt()
    full = someone.say("one")
    assert full.endswith("; cut off")
    refused = someone.say("two")
    assert "and the model can take 128" in refused
    assert "/clear begins a new one" in refused
    assert "/clear" in someone.say("three")
    assert "forgotten" in someone.say("/clear")
    assert someone.say("one").rsplit("\n", 1)[0] == full.rsplit("\n", 1)[0]


def test_an_answer_is_written_again_with_another_seed(person: Any, tmp_path: Path) -> None:
    words = ("--max-new-tokens", "8", "--temperature", "3.0", "--seed", "5")
    someone = person("--model", QWEN, *words)
    someone.read_prompt()
    assert "no answer yet" in someone.say("/retry")
    shown = [someone.say("the tide"), someone.say("/retry"), someone.say("/retry")]
    someone.say(f"/save {tmp_path / 'chat.json'}")
    chat = [user("the tide")]
    expected = [written(QWEN, chat, temperature=3.0, seed=seed)[0] for seed in (5, 6, 7)]
    assert len(set(expected)) == 3
    for one, text in zip(shown, expected, strict=True):
        assert re.search(FIGURES, one)
        assert _shown(text) in one
    saved = json.loads((tmp_path / "chat.json").read_text(encoding="utf-8"))
    assert saved == [*chat, assistant(expected[-1])]


def test_the_system_message_can_change_and_one_that_is_refused_changes_nothing(
    person: Any, tmp_path: Path
) -> None:
    someone = person("--model", QWEN, "--system", "be brief", "--max-new-tokens", "8")
    someone.read_prompt()
    saved = tmp_path / "chat.json"
    someone.say("/system be long")
    someone.say(f"/save {saved}")
    system = {"role": "system", "content": "be long"}
    assert json.loads(saved.read_text()) == [system]
    answer = someone.say("the tide")
    assert _shown(written(QWEN, [system, user("the tide")])[0]) in answer
    someone.say("/clear")
    someone.say("/system")
    someone.say(f"/save! {saved}")
    assert json.loads(saved.read_text()) == []
    other = person("--model", LLAMA)
    other.read_prompt()
    assert "no such role: system" in other.say("/system be brief")
    other.say(f"/save! {saved}")
    assert json.loads(saved.read_text()) == []


def test_a_file_is_written_over_only_where_that_is_said(person: Any, tmp_path: Path) -> None:
    someone = person("--model", LLAMA)
    someone.read_prompt()
    kept = tmp_path / "kept.json"
    kept.write_text("mine")
    refused = someone.say(f"/save {kept}").replace("\n", "")
    assert f"/save! {kept} writes over it" in refused
    assert kept.read_text() == "mine"
    assert "There is no folder" in someone.say(f"/save {tmp_path / 'no' / 'chat.json'}")
    assert "needs a file" in someone.say("/save")
    assert "cannot be written" in someone.say(f"/save! {tmp_path}")
    someone.say(f"/save! {kept}")
    assert json.loads(kept.read_text()) == []


def test_commands_are_listed_and_one_that_is_none_names_the_nearest(person: Any) -> None:
    someone = person("--model", QWEN, "--max-new-tokens", "8")
    someone.read_prompt()
    listed = someone.say("/help")
    for name in ("/clear", "/save FILE", "/system TEXT", "/retry", "/memory", "/quit", "Ctrl-C"):
        assert name in listed
    assert max(map(len, listed.splitlines())) <= 80
    assert "Did you mean /retry?" in someone.say("/rety")
    assert someone.say("") == ""
    memory = someone.say("/memory")
    for name in ("session", "tokenizer", "working", "cache", "together", "exclusive", "process"):
        assert re.search(rf"(?m)^{name} +[\d.]+ MB", memory)
    assert _shown(written(QWEN, [user("/etc/hosts")])[0]) in someone.say("//etc/hosts")


def test_a_line_that_is_no_utf8_is_refused_and_the_chat_goes_on(person: Any) -> None:
    someone = person("--model", LLAMA, LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    someone.read_prompt()
    someone.type("caf\xe9\n", "latin-1")
    assert "That is not UTF-8" in someone.read_prompt()
    assert "forgotten" in someone.say("/clear")


# Parts


class Thinker:
    """A pipeline of a model that thinks first, as far as a conversation needs one."""

    def __init__(self, *pieces: str, end: BaseException | None = None) -> None:
        self.asked: list[Any] = []
        self.memory = PipelineMemory(0, 0, 0, 0, True, ())
        self.chat_template = ChatTemplate(
            {"default": "{% for m in messages %}{{ m.content }}<think></think>{% endfor %}"}
        )
        self._pieces, self._end = pieces, end

    def stream(self, messages: Any, **options: Any) -> Stream:
        self.asked.append(messages)
        return Stream(self._written(), CancelToken("the test"), [])

    def _written(self) -> Generator[Piece, None, None]:
        for number, text in enumerate(self._pieces):
            yield Piece(text, number)
        if self._end is not None:
            raise self._end


def test_reasoning_is_kept_beside_the_answer() -> None:
    pipe, shown = Thinker("<thi", "nk>It ebbs.</think>\n\n", "Yes"), []
    talk = Conversation(pipe, {}, "be brief")
    answer = talk.ask("Does it?", lambda text, thought: shown.append((text, thought)))
    expected = {"role": "assistant", "content": "Yes", "reasoning_content": "It ebbs."}
    assert (answer.message, answer.tokens) == (expected, 3)
    assert "".join(text for text, thought in shown if thought) == "<think>It ebbs.</think>"
    assert "".join(text for text, thought in shown if not thought).strip() == "Yes"
    talk.ask("And now?", lambda text, thought: None)
    system = {"role": "system", "content": "be brief"}
    assert pipe.asked[-1] == [system, user("Does it?"), expected, user("And now?")]


@pytest.mark.parametrize("pieces", [(), ("So", " it")])
def test_an_answer_that_was_stopped_stays_unless_it_is_empty(pieces: tuple[str, ...]) -> None:
    talk = Conversation(Thinker(*pieces, end=KeyboardInterrupt()), {}, None)
    answer = talk.ask("Does it?", lambda text, thought: None, Stop())
    assert (answer.tokens, answer.reason) == (len(pieces), "stopped")
    kept = [user("Does it?"), assistant("So it")]
    assert talk.messages == (kept if pieces else [])


def test_an_answer_that_fails_leaves_the_conversation_as_it_was() -> None:
    talk = Conversation(Thinker("So", end=InputError("It is too long.")), {}, None)
    with pytest.raises(InputError):
        talk.ask("Does it?", lambda text, thought: None)
    assert talk.messages == []


@given(
    marks=st.lists(st.sampled_from(["<think>", "</think>", "<th", "a", " ", "<"]), max_size=8),
    sizes=st.lists(st.integers(1, 9), min_size=1),
)
def test_reasoning_is_the_same_whatever_the_pieces_and_no_text_is_lost(
    marks: list[str], sizes: list[int]
) -> None:
    def of(pieces: list[str]) -> list[tuple[str, bool]]:
        thoughts = Thoughts(known=True, opened=False)
        parts = [part for piece in pieces for part in thoughts.parts(piece)]
        parts += thoughts.parts("", last=True)
        return [(one, thought) for text, thought in parts for one in text]

    text, pieces = "<think>" + "".join(marks), []
    for size in itertools.cycle(sizes):
        pieces.append(text[sum(map(len, pieces)) :][:size])
        if not pieces[-1]:
            break
    assert of(pieces) == of([text])
    assert "".join(one for one, _ in of(pieces)) == text


def test_an_answer_is_shown_as_far_as_it_cannot_be_a_mark() -> None:
    thoughts = Thoughts(known=True, opened=False)
    shown = [[*thoughts.parts(piece)] for piece in ("<thi", "nk>So</", "b", "</think>", "Yes", "<")]
    assert shown == [
        [],
        [("<think>", True), ("So", True)],
        [("</b", True)],
        [("</think>", True)],
        [("Yes", False)],
        [("<", False)],
    ]


def test_control_c_ends_the_wait_for_a_piece_once_and_tears_nothing_else() -> None:
    stop = Stop()
    before = signal.getsignal(signal.SIGINT)
    waited = []

    def pieces() -> Iterator[str]:
        yield "one"
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
            waited.append("too long")
        signal.raise_signal(signal.SIGINT)  # while what was stopped is waited for
        yield "two"

    with stop.heard():
        found = pieces()
        assert stop.next(found) == "one"
        assert stop.next(found) == "two"
        assert not waited
        with pytest.raises(KeyboardInterrupt):
            stop.next(found)
        other = Stop()
        with other.heard():
            signal.raise_signal(signal.SIGINT)  # while a piece is shown
            with pytest.raises(KeyboardInterrupt):
                other.next(iter(["never"]))
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize(
    ("known", "opened", "text", "answer"),
    [
        (True, False, "<think>So</think>Yes", "Yes"),
        (True, False, "\n<think>So</think>\nYes", "\n\nYes"),
        (True, True, "So</think>Yes", "Yes"),
        (True, False, "It says <think>", "It says <think>"),
        (True, False, "<think>So", ""),
        (False, False, "<think>So</think>Yes", "<think>So</think>Yes"),
    ],
)
def test_reasoning_is_what_stands_within_marks_at_the_beginning(
    known: bool, opened: bool, text: str, answer: str
) -> None:
    thoughts = Thoughts(known=known, opened=opened)
    parts = [*thoughts.parts(text), *thoughts.parts("", last=True)]
    assert "".join(part for part, thought in parts if not thought) == answer


@pytest.mark.parametrize(
    ("tokens", "line"),
    [
        (0, "0 tokens; 9000.0 MB; stopped"),
        (1, "1 token, first after 12.50 s; 9000.0 MB; stopped"),
        (1024, "1024 tokens at 10.2/s, first after 12.50 s; 9000.0 MB; stopped"),
    ],
)
def test_figures_are_those_that_there_are(tokens: int, line: str) -> None:
    memory = PipelineMemory(9_000_000_000, 0, 0, 0, True, ())
    answer = Answer({}, tokens, 12.5, 112.8 if tokens > 1 else 12.5)
    assert answer.line(memory) == line

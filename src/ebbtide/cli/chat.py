"""``ebbtide chat``: talk with a model; its answers come as they are written."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Final

from rich.console import Console
from rich.text import Text

import ebbtide
from ebbtide.cli.ending import loaded
from ebbtide.cli.results import printable
from ebbtide.cli.words import Value, lines, split
from ebbtide.errors import EbbtideError, InputError, nearest
from ebbtide.factory import PipelineOptions
from ebbtide.memory import anonymous_bytes
from ebbtide.models.replies import formats_of, parse_reply
from ebbtide.pipelines.base import PipelineMemory

Message = dict[str, str]

TASK: Final = "text-generation"
MAX_NEW_TOKENS: Final = 1024
"""Tokens of an answer at most, where nothing else is asked: Ctrl-C stops one that is too long."""

_PROMPT: Final = "> "
_THINK: Final = ("<think>", "</think>")
_STOPPED: Final = "stopped"

_COMMANDS: Final[Mapping[str, tuple[str, str]]] = {
    "/help": ("", "list the commands"),
    "/clear": ("", "forget the conversation"),
    "/retry": ("", "write the last answer again, differently with --temperature"),
    "/system": ("TEXT", "tell the model how to behave; without a text, no more"),
    "/save": ("FILE", "write the conversation as JSON; /save! writes over a file"),
    "/memory": ("", "what the pipeline takes of the memory"),
    "/quit": ("", "end the chat, as Ctrl-D does"),
}
"""Each command: what stands behind it, and what it does."""


def chat(
    words: Sequence[str],
    *,
    model: str | None,
    system: str | None,
    options: PipelineOptions,
    as_json: bool,
) -> None:
    """Talk with a model: on a terminal as people do, else an answer for each line that comes in.

    Args:
        words: Options of the task's call, as they were typed.
        model: The model, or None for the task's default.
        system: What the model is told before all else.
        options: The pipeline's.
        as_json: One JSON line an answer, and nothing else on standard output.

    Raises:
        InputError: An option cannot be used, or the conversation is longer than the model takes.
        UnsupportedModelError: The model has no chat template.
    """
    texts, call = split(TASK, words)
    if texts:
        raise InputError(
            f"chat takes no text, and {texts[0]!r} is one: start it, and type your message then."
        )
    if sys.stdin is None:
        raise InputError("There is no standard input to read messages from.")
    if "max_length" not in call:
        call.setdefault("max_new_tokens", MAX_NEW_TOKENS)
    with loaded(TASK, model, options, as_json=as_json) as pipe:
        talk = Conversation(pipe, call, system)
        if not as_json and sys.stdin.isatty() and sys.stdout.isatty():
            _Terminal(talk).run()
        else:
            _answer_lines(talk, as_json=as_json)


@dataclasses.dataclass(slots=True)
class Answer:
    """One answer and what it took.

    Attributes:
        message: It as a message: ``role`` and ``content``, and ``reasoning_content`` where the
            model thought first.
        tokens: How many were written.
        first: Seconds to the first of them.
        seconds: Seconds to the last.
        cache: The most bytes that the key-value cache took.
        reason: Why it ended, as a `Piece` has it, or ``stopped``.
    """

    message: Message
    tokens: int = 0
    first: float = 0.0
    seconds: float = 0.0
    cache: int = 0
    reason: str = _STOPPED

    def line(self, memory: PipelineMemory) -> str:
        """The figures, in one line of at most 80 columns.

        Example:
            >>> memory = PipelineMemory(560_300_000, 0, 0, 0, True, ())
            >>> Answer({}, 42, 0.5, 4.6, 12_200_000, "length").line(memory)
            '42 tokens at 10.0/s, first after 0.50 s; 560.3 MB, cache 12.2 MB; cut off'
        """
        line = f"{self.tokens} token{'s' * (self.tokens != 1)}"
        if self.tokens > 1 and self.seconds > self.first:
            line += f" at {(self.tokens - 1) / (self.seconds - self.first):.1f}/s"
        if self.tokens:
            line += f", first after {self.first:.2f} s"
        line += f"; {_mb(memory.anonymous)}"
        line += f", cache {_mb(self.cache)}" if self.cache else ""
        ends = {"stop": "", "length": "; cut off"}
        return line + ends.get(self.reason, f"; {self.reason}")


class Stop:
    """Ctrl-C while an answer is written: it ends the wait for the next piece, and nothing else.

    So no line on its way to the terminal is torn. Python calls it as the handler of SIGINT.
    """

    def __init__(self) -> None:
        self.asked = False
        self._waits = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Note that it was pressed, and end the wait."""
        first = not self.asked
        self.asked = True
        if first and self._waits:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Within this, Ctrl-C comes here."""
        before = signal.signal(signal.SIGINT, self)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def next(self, pieces: Iterator[Any]) -> Any:
        """The next piece; None after the last.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed, now or before.
        """
        self._waits = True
        try:
            if self.asked:
                raise KeyboardInterrupt
            return next(pieces, None)
        finally:
            self._waits = False


class Thoughts:
    """Tells reasoning from the answer while both come in pieces that may end within a mark.

    Args:
        known: Whether the model marks its reasoning.
        opened: Whether the prompt ends within it.

    Example:
        >>> thoughts = Thoughts(known=True, opened=False)
        >>> [part for piece in ("<thi", "nk>So", "</think>Yes") for part in thoughts.parts(piece)]
        [('<think>', True), ('So', True), ('</think>', True), ('Yes', False)]
    """

    def __init__(self, *, known: bool, opened: bool) -> None:
        self._held = ""
        self._inside = opened
        self._over = not (known or opened)

    def parts(self, text: str, *, last: bool = False) -> Iterator[tuple[str, bool]]:
        """The texts that are known now, each with whether it is reasoning."""
        self._held += text
        while self._held and not self._over:
            mark = _THINK[self._inside]
            before, found, after = self._held.partition(mark)
            if self._inside:
                kept = 0 if found else _begun(before, mark)
                ready, self._held = before[: len(before) - kept], before[len(before) - kept :]
                if ready:
                    yield ready, True
            elif found and not before.strip():
                if before:
                    yield before, False
            elif _begun(self._held.lstrip(), mark) == len(self._held.lstrip()):
                break  # it may become the mark
            else:
                self._over = True
                break
            if not found:
                break
            yield mark, True
            self._held, self._inside = after, not self._inside
        if self._held and (self._over or last):
            yield self._held, self._inside
            self._held = ""


def _begun(text: str, mark: str) -> int:
    """How many characters at a text's end may be the beginning of a mark."""
    return next(
        (size for size in range(min(len(text), len(mark)), 0, -1) if text.endswith(mark[:size])), 0
    )


class Conversation:
    """What was said, and the pipeline that answers.

    Args:
        pipe: The pipeline, of text-generation.
        options: Those of its call.
        system: What the model is told before all else.

    Raises:
        InputError: An option, or a system message, cannot be used.
        UnsupportedModelError: The model has no chat template.
    """

    def __init__(self, pipe: Any, options: dict[str, Value], system: str | None) -> None:
        self.pipe = pipe
        self.said: list[Message] = []
        self.system = system
        self._options = options
        self._retries = 0
        self._thinks = "think" in formats_of(pipe.chat_template.text())
        self._check()

    @property
    def messages(self) -> list[Message]:
        """All of it, the system message first."""
        return self._with_system(self.said)

    def tell(self, system: str | None) -> None:
        """Change the system message; where the model takes none, it stays as it was."""
        before, self.system = self.system, system
        try:
            self._check()
        except EbbtideError:
            self.system = before
            raise

    def ask(
        self, text: str, show: Callable[[str, bool], object], stop: Stop | None = None
    ) -> Answer:
        """Say something, and have the answer; both are kept, unless nothing was written.

        Args:
            text: What is said.
            show: Told each part of the answer, and whether it is reasoning.
            stop: Who may stop it.
        """
        self._retries = 0
        return self._answered([*self.said, {"role": "user", "content": text}], show, stop)

    def retry(self, show: Callable[[str, bool], object], stop: Stop | None = None) -> Answer:
        """Have the last answer once more; the one before is forgotten when the new one is there."""
        if not self.said:
            raise InputError("There is no answer yet to write again.")
        self._retries += 1
        return self._answered(self.said[:-1], show, stop)

    def clear(self) -> None:
        """Forget what was said, but not the system message."""
        self.said = []

    def _with_system(self, said: list[Message]) -> list[Message]:
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*first, *said]

    def _check(self) -> None:
        """See that options and system message can be used; nothing is written."""
        asked = self._with_system([{"role": "user", "content": "Hello"}])
        with closing(self.pipe.stream(asked, **self._options)):
            pass  # what can be refused is refused before the first piece

    def _answered(
        self, said: list[Message], show: Callable[[str, bool], object], stop: Stop | None
    ) -> Answer:
        options = dict(self._options)
        if self._retries and isinstance(options.get("seed"), int):
            options["seed"] += self._retries  # type: ignore[operator]
        asked = self._with_system(said)
        prompt = self.pipe.chat_template.render(asked)
        thoughts = Thoughts(known=self._thinks, opened=prompt.rstrip().endswith(_THINK[0]))
        text = ""

        def shown(piece: str, *, last: bool = False) -> None:
            nonlocal text
            text += piece
            for part, thought in thoughts.parts(piece, last=last):
                show(part, thought)

        answer = self._write(asked, options, shown, stop)
        shown("", last=True)
        reply = parse_reply(text, ["think"] if self._thinks else [], prompt=prompt)
        answer.message = {"role": "assistant", "content": reply.content}
        if reply.reasoning:
            answer.message["reasoning_content"] = reply.reasoning
        if answer.tokens:
            self.said = [*said, answer.message]
        return answer

    def _write(
        self,
        asked: list[Message],
        options: dict[str, Value],
        show: Callable[[str], object],
        stop: Stop | None,
    ) -> Answer:
        answer = Answer({})
        began = time.perf_counter()
        # Each turn begins as the one before did.
        cached = options.get("num_beams") in (None, 1)
        with self.pipe.stream(asked, cache_prompt=cached, **options) as pieces:
            try:
                while (piece := stop.next(pieces) if stop else next(pieces, None)) is not None:
                    answer.seconds = time.perf_counter() - began
                    answer.first = answer.first or answer.seconds
                    answer.tokens += 1
                    answer.cache = max(answer.cache, self.pipe.memory.cache)
                    answer.reason = piece.finish_reason or answer.reason
                    show(piece.text)
            except KeyboardInterrupt:
                if stop is None:
                    raise
                pieces.cancel()
                with suppress(ebbtide.PipelineCancelledError):
                    for _ in pieces:  # until it has stopped
                        pass
        return answer


# Lines of a pipe


def _answer_lines(talk: Conversation, *, as_json: bool) -> None:
    """Answer each line of standard input as it comes; the figures go to standard error."""
    for text in lines():
        if not text.strip():
            continue
        if not as_json:
            answer = talk.ask(text, lambda part, _: print(printable(part), end="", flush=True))
            print(flush=True)
            print(answer.line(talk.pipe.memory), file=sys.stderr)
            continue
        answer = talk.ask(text, lambda part, thought: None)
        more = {
            "tokens": answer.tokens,
            "seconds": round(answer.seconds, 3),
            "finish_reason": answer.reason,
        }
        print(json.dumps(answer.message | more), flush=True)


# A terminal


class _Terminal:
    """A chat with a person."""

    def __init__(self, talk: Conversation) -> None:
        self._talk = talk
        self._console = Console(highlight=False, soft_wrap=True)
        self._over = False

    def run(self) -> None:
        """Talk until the person ends it."""
        with suppress(ImportError):  # Windows has none; where it is, arrows edit and look back
            import readline  # noqa: F401
        pipe = self._talk.pipe
        self._say(f"{pipe.model} ({pipe.dtype} on {pipe.device}), {_mb(pipe.memory.anonymous)}")
        self._say("/help lists the commands; Ctrl-D ends the chat.")
        try:
            while not self._over:
                self._console.print()
                try:
                    line = input(_PROMPT)
                    line.encode()
                except UnicodeError:
                    self._say("That is not UTF-8: is the locale (LANG) one of UTF-8?", "yellow")
                    continue
                self._take(line.strip())
        except (EOFError, KeyboardInterrupt):
            self._console.print()

    def _take(self, line: str) -> None:
        try:
            if line.startswith("/") and not line.startswith("//"):
                self._command(*line.split(None, 1))
            elif line:
                text = line.removeprefix("/") if line.startswith("//") else line
                self._write(lambda show, stop: self._talk.ask(text, show, stop))
        except EbbtideError as error:
            self._say(printable(str(error)), "yellow")

    def _write(self, ask: Callable[[Callable[[str, bool], object], Stop], Answer]) -> None:
        """Show an answer as it is written, and its figures."""
        shown = ""

        def show(part: str, thought: bool) -> None:
            nonlocal shown
            part = printable(part if shown else part.lstrip())
            shown = (shown + part)[-1:]
            self._console.print(Text(part, style="dim" if thought else ""), end="")

        stop = Stop()
        with stop.heard():
            try:
                answer = ask(show, stop)
            except InputError:
                if self._talk.said:
                    self._say(
                        "The message was not taken. Where the conversation is too long for the"
                        " model, /save FILE keeps it and /clear begins a new one.",
                        "yellow",
                    )
                raise
            finally:
                if stop.asked or shown not in ("", "\n"):  # it shows ^C there
                    self._console.print()
            if not answer.tokens:
                self._say("Nothing was written, and the conversation is as it was before.")
                return
            self._say(answer.line(self._talk.pipe.memory))

    def _command(self, name: str, rest: str = "") -> None:
        match name:
            case "/help":
                for known, (takes, does) in _COMMANDS.items():
                    self._say(f"{known + ' ' + takes:<14}{does}", "")
                self._say("Ctrl-C stops an answer. A message that begins with / is typed with //.")
            case "/clear":
                self._talk.clear()
                self._say("The conversation is forgotten.")
            case "/retry":
                self._write(self._talk.retry)
            case "/system":
                self._talk.tell(rest or None)
                self._say("The model is told." if rest else "There is no system message any more.")
            case "/save" | "/save!":
                self._save(rest, over=name == "/save!")
            case "/memory":
                self._memory()
            case "/quit":
                self._over = True
            case _:
                close = nearest(name, _COMMANDS)
                hint = f" Did you mean {close}?" if close else ""
                self._say(f"There is no command {name}.{hint} /help lists them.", "yellow")

    def _save(self, name: str, *, over: bool) -> None:
        if not name:
            self._say("/save needs a file, as in: /save chat.json", "yellow")
            return
        path = Path(name).expanduser()
        content = json.dumps(self._talk.messages, ensure_ascii=False, indent=2) + "\n"
        try:
            with path.open("w" if over else "x", encoding="utf-8") as file:
                file.write(content)
        except FileExistsError:
            self._say(f"{name} is there already: /save! {name} writes over it.", "yellow")
        except FileNotFoundError:
            self._say(f"There is no folder {path.parent}: make it first, then /save.", "yellow")
        except OSError as error:
            self._say(f"{name} cannot be written: {error.strerror}.", "yellow")
        else:
            self._say(f"{len(self._talk.messages)} messages are in {name}.")

    def _memory(self) -> None:
        memory: PipelineMemory = self._talk.pipe.memory
        rows = [(one.kind, _mb(one.anonymous) + _more(one)) for one in memory.holdings]
        rows += [
            ("working", f"{_mb(memory.working)}, what calls added and the next one uses again"),
            ("cache", f"{_mb(memory.cache)}, what it has seen of the conversation"),
            ("together", f"{_mb(memory.anonymous)} of anonymous memory"),
            ("exclusive", f"{_mb(memory.exclusive)}, what the end of the chat gives back"),
            ("process", f"{_mb(anonymous_bytes())}, all that this process holds"),
        ]
        for name, value in rows:
            self._say(f"{name:<12}{value}", "")

    def _say(self, text: str, style: str = "dim") -> None:
        self._console.print(Text(text, style=style))


def _more(one: Any) -> str:
    mapped = f", and {_mb(one.mapped)} mapped" if one.mapped else ""
    source = f" ({one.source})" if one.source else ""
    return mapped + source + (", asleep" if one.asleep else "")


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f} MB"

"""What the demo prints: answers, the memory story as bars, and what to try next."""

from __future__ import annotations

import dataclasses
import json
import textwrap
import time

from rich.console import Console
from rich.text import Text

from ebbtide.cli.demo.minilm import NAME
from ebbtide.cli.demo.story import QUESTIONS, ROUND_PASSAGES, Answer, Life, Story, passages, tell

_NEXT = (
    'ebbtide demo "Why go hiking?"',
    'ebbtide run feature-extraction "The tide goes out." --json',
    "ebbtide cache list",
    "ebbtide info",
)


def demo(question: str | None, *, as_json: bool) -> None:
    """Run the demo and print it.

    Args:
        question: One to ask after the demo's own.
        as_json: Print one JSON line with all figures in bytes, and nothing else.
    """
    began = time.perf_counter()
    library = passages()
    questions = [*QUESTIONS, *([question] if question else [])]
    if as_json:
        answers: list[Answer] = []
        story = tell(library, questions, answers.append)
        print(_json(library_size=len(library), answers=answers, story=story, began=began))
        return
    paper = _Paper()
    paper.title(f"Searching {len(library)} passages from old books, by meaning")
    paper.note(f"with {NAME}, on this machine's CPU")
    story = tell(library, questions, paper.answer)
    paper.note(f"All passages were embedded in {story.embedding_seconds:.1f} s.")
    paper.life(story)
    paper.rounds(story)
    paper.prepared(story)
    paper.title("Next")
    for command in _NEXT:
        paper.line(Text(command, style="green"))


class _Paper:
    """A terminal's width of output; no colour where it goes to a file or a pipe."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        self.full, self.light = ("#", "-") if self.console.options.ascii_only else ("█", "░")

    def title(self, text: str) -> None:
        self.console.print()
        self.console.print(Text(text, style="bold"))

    def line(self, text: Text) -> None:
        self.console.print(Text.assemble("  ", text), soft_wrap=True)

    def note(self, text: str, style: str = "dim") -> None:
        for one in textwrap.wrap(text, self.console.width - 4):
            self.line(Text(one, style=style))

    def answer(self, answer: Answer) -> None:
        self.title(answer.question)
        for one in answer.found:
            where = f"{one.passage.author}, {one.passage.work} ({one.passage.year})"
            self.line(Text.assemble((f"{one.score:.2f}", "bold green"), "  ", (where, "cyan")))
            text = self._spelled(one.passage.text)
            more = self._spelled(" …")
            for row in textwrap.wrap(text, self.console.width - 10, max_lines=2, placeholder=more):
                self.line(Text(f"      {row}"))

    def _spelled(self, text: str) -> str:
        """The text with the marks that this output can show."""
        if self.console.options.ascii_only:
            return text.replace("—", "--").replace("…", "...")
        return text

    def life(self, story: Story) -> None:
        life = story.life
        self.title("What this run took of the process's memory (anonymous MB)")
        most = max(life.loaded, life.working)
        for name, count, style in (
            ("started", story.start, "blue"),
            ("loaded", life.loaded, "yellow"),
            ("working", life.working, "red"),
            ("disposed", life.disposed, "green"),
        ):
            bar = self.full * self._columns(count, most)
            self.line(Text.assemble(f"{name:<10}", (bar, style), f" {count / 1e6:.1f}"))
        self.note(str(life.receipt), style="green" if life.receipt.verified else "yellow")
        self.note(
            "started: Python, Ebbtide and ONNX Runtime, before any model. What libraries set up at"
            " their first use stays on top of that, once."
        )

    def rounds(self, story: Story) -> None:
        self.title(
            f"The same model {len(story.rounds)} times more: load, embed {ROUND_PASSAGES}"
            " passages, dispose"
        )
        most = max(max(one.loaded, one.working) for one in (story.life, *story.rounds))
        for number, one in enumerate(story.rounds, 1):
            self.line(self._round(number, one, most))
        self.note(
            f"Between the first disposal and the last, the process grew by"
            f" {story.drift / 1e6:+.1f} MB.",
            style="bold",
        )

    def prepared(self, story: Story) -> None:
        if story.prepared is None:
            return
        self.title("And from its prepared copy, whose weights are mapped and not copied")
        most = max(story.life.loaded, story.life.working)
        for name, count, style in (
            ("before", story.rounds[-1].disposed, "green"),
            ("loaded", story.prepared.loaded, "yellow"),
            ("disposed", story.prepared.disposed, "green"),
        ):
            bar = self.full * self._columns(count, most)
            self.line(Text.assemble(f"{name:<10}", (bar, style), f" {count / 1e6:.1f}"))
        self.note("Every pipeline has one made in the background when its model is first loaded.")

    def _round(self, number: int, life: Life, most: int) -> Text:
        stays = self._columns(life.disposed, most)
        goes = max(0, self._columns(life.working, most) - stays)
        return Text.assemble(
            f"round {number:<4}",
            (self.full * stays, "green"),
            (self.light * goes, "dim"),
            f" {life.working / 1e6:.1f}, then {life.disposed / 1e6:.1f}",
        )

    def _columns(self, count: int, most: int) -> int:
        """The length of a bar: the longest leaves room for its name and its figures."""
        return max(1, round(count / most * max(10, self.console.width - 32)))


def _json(*, library_size: int, answers: list[Answer], story: Story, began: float) -> str:
    return json.dumps(
        {
            "model": NAME,
            "passages": library_size,
            "answers": [dataclasses.asdict(answer) for answer in answers],
            "memory": {**dataclasses.asdict(story), "drift": story.drift},
            "seconds": round(time.perf_counter() - began, 3),
        }
    )

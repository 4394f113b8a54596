"""Where a benchmark is: a bar with what is done and the time left, on a terminal; else a line for each task."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from .harness import Deadline


class Progress:
    """`with Progress(deadline, pretended) as progress`: announce what begins, advance when it is done, say what matters."""

    def __init__(self, deadline: Deadline, pretended: bool = False, console: Console | None = None) -> None:
        self.deadline, self.mark = deadline, "pretended: " if pretended else ""
        self.console = console or Console(highlight=False, soft_wrap=True)
        columns = (TextColumn("{task.fields[left]}"), BarColumn(20), MofNCompleteColumn(), TextColumn("{task.description}"))
        self.bar = Bar(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self.task: Any = None

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def total(self, tasks: int) -> None:
        self.task = self.bar.add_task("", total=tasks, left=str(self.deadline))

    def announce(self, what: str) -> None:
        if self.task is not None:
            self.bar.update(self.task, description=what, left=str(self.deadline))

    def advance(self, what: str) -> None:
        self.bar.advance(self.task)
        self.bar.update(self.task, left=str(self.deadline))
        self.say(f"{self.mark}{what} done, {self.deadline}")

    def say(self, what: str) -> None:
        self.console.print(what, markup=False)

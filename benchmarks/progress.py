"""Where a benchmark is: a bar with what is done and the time left, on a terminal; else a line for each task."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from .harness import Deadline, minutes


class Progress:
    """`with Progress(deadline, pretended) as progress`: announce what begins, advance when it is done, say what matters.

    Without a deadline the time left is what the rest takes at the pace so far.
    """

    def __init__(self, deadline: Deadline | None = None, pretended: bool = False, console: Console | None = None) -> None:
        self.deadline, self.mark = deadline, "pretended: " if pretended else ""
        self.console = console or Console(highlight=False, soft_wrap=True)
        columns = (TextColumn("{task.fields[left]}"), BarColumn(20), MofNCompleteColumn(), TextColumn("{task.description}"))
        self.bar = Bar(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self.task: Any = None
        self.tasks, self.done, self.begun = 0, 0, time.monotonic()

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    @property
    def left(self) -> str:
        if self.deadline is not None:
            return str(self.deadline)
        if not self.done:
            return "?:?? left"
        return f"about {minutes((time.monotonic() - self.begun) / self.done * (self.tasks - self.done))} left"

    def total(self, tasks: int) -> None:
        self.tasks, self.task = tasks, self.bar.add_task("", total=tasks, left=self.left)

    def announce(self, what: str) -> None:
        if self.task is not None:
            self.bar.update(self.task, description=what, left=self.left)

    def advance(self, what: str) -> None:
        self.done += 1
        self.bar.advance(self.task)
        self.bar.update(self.task, left=self.left)
        self.say(f"{self.mark}{what} done, {self.left}")

    def say(self, what: str) -> None:
        self.console.print(what, markup=False)

"""Shows events: bars on a terminal, one line per task anywhere else."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from tqdm import tqdm

from keeplora.train.events import Event


class Console:
    """A listener that draws one bar per running pair and one over all tasks.

    On a terminal the bars move; elsewhere (a log file, CI) each finished task is one line.
    """

    def __init__(self, total_tasks: int, *, stream: TextIO | None = None, bars: bool | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.bars = self.stream.isatty() if bars is None else bars
        self.total: tqdm[Any] | None = None
        self.running: dict[tuple[str, int], tqdm[Any]] = {}
        if self.bars:
            self.total = tqdm(
                total=total_tasks, desc="all tasks", unit="task", file=self.stream, position=0, dynamic_ncols=True
            )

    def __call__(self, event: Event) -> None:
        """Show one event."""
        who = f"{event.label} · seed {event.seed}"
        if event.kind == "task":
            self._start_bar(event, who)
        elif event.kind == "step":
            self._move_bar(event)
        elif event.kind == "learned":
            self._drop_bar(event)
            if event.text:
                self.line(f"{who} · task {event.task + 1}/{event.tasks} {event.text}")
            for text in (event.certificate, event.capacity):
                if text:
                    self.line(f"    {text.splitlines()[0]}")
            self._advance(1)
        elif event.kind == "resumed":
            self.line(f"{who} · {event.text}")
            self._advance(event.task)
        elif event.kind == "note":
            self.line(f"{who} · task {event.task + 1}/{event.tasks} note: {event.text}")
        elif event.kind == "done":
            self._drop_bar(event)
            self.line(f"{who} · {event.text}")
            if event.text == "already finished":
                self._advance(event.tasks)

    def line(self, text: str) -> None:
        """Print a line above the bars."""
        if self.bars:
            tqdm.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)

    def close(self) -> None:
        """Take the bars away."""
        for bar in self.running.values():
            bar.close()
        self.running.clear()
        if self.total is not None:
            self.total.close()

    def _start_bar(self, event: Event, who: str) -> None:
        if not self.bars:
            return
        self._drop_bar(event)
        taken = {bar.pos for bar in self.running.values()}
        position = next(place for place in range(1, 65) if -place not in taken and place not in taken)
        self.running[event.label, event.seed] = tqdm(
            desc=f"{who} · {event.name}", unit="step", file=self.stream, position=position, leave=False,
            dynamic_ncols=True,
        )  # fmt: skip

    def _move_bar(self, event: Event) -> None:
        bar = self.running.get((event.label, event.seed))
        if bar is not None:
            bar.total = event.steps
            bar.n = event.step
            bar.set_postfix(loss=f"{event.loss:.3f}", refresh=False)
            bar.refresh()

    def _drop_bar(self, event: Event) -> None:
        bar = self.running.pop((event.label, event.seed), None)
        if bar is not None:
            bar.close()

    def _advance(self, tasks: int) -> None:
        if self.total is not None:
            self.total.update(tasks)

"""What is wrong with a user's data: collected by kind, then refused in one message or told in one line each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from keeplora._messages import listed
from keeplora.methods.settings import ConfigError
from keeplora.tasks.own.config import DataSettings
from keeplora.tasks.own.kinds import FAULTS, MEANINGS

__all__ = ["Fault", "Faults"]

_DONE = {
    "skip": "left out",
    "convert": "converted to RGB",
    "cut": "cut at the end of the context",
    "allow": "kept as they are",
}


@dataclass(frozen=True)
class Fault:
    """One thing that is not as it should be. ``where`` is a file, a class or a text; ``why`` what was found."""

    kind: str
    task: str
    where: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.where} ({self.why})" if self.why else self.where


@dataclass
class Faults:
    """All of them, by what the settings do about each kind; ``usual`` is what this data does where they say nothing."""

    data: DataSettings
    usual: Mapping[str, str] = field(default_factory=dict)
    found: list[Fault] = field(default_factory=list)

    def add(self, kind: str, task: str, where: object, why: str = "") -> bool:
        """Note one; returns whether what has it stays (it is converted, cut or allowed) for now.

        What is to be refused stays, too, so that all faults are found before the message is made.
        """
        self.found.append(Fault(kind, task, str(where), why))
        return self.action(kind) != "skip"

    def action(self, kind: str) -> str:
        """What is done about a kind: as the settings say; else what is ``usual`` for this data."""
        return self.data.faults.get(kind) or self.usual.get(kind) or self.data.action(kind)

    def of(self, action: str) -> Iterator[tuple[str, list[Fault]]]:
        """Kind and faults, of those kinds that are treated so."""
        for kind in FAULTS:
            those = [fault for fault in self.found if fault.kind == kind]
            if those and self.action(kind) == action:
                yield kind, those

    def refuse(self) -> None:
        """Raise ``ConfigError`` if anything is to be refused; the message counts and names it and tells the remedy."""
        lines, remedies = [], []
        for kind, faults in self.of("refuse"):
            lines.append(_line(kind, faults))
            others = " or ".join(f'"{action}"' for action in FAULTS[kind][1:])
            remedies.append(f"{kind} = {others}")
        if lines:
            raise ConfigError(
                "load_workload: data must be as the settings file says, got\n  "
                + "\n  ".join(lines)
                + "\nMend the data, or say what to do with it, in a table [data.faults]:\n  "
                + "\n  ".join(remedies)
            )

    def notes(self) -> list[str]:
        """What was left out, converted, cut or allowed: a line for each kind."""
        return [
            f"{_line(kind, faults)}: {done}, as {self._whose(kind)}"
            for action, done in _DONE.items()
            for kind, faults in self.of(action)
        ]

    def _whose(self, kind: str) -> str:
        return "[data.faults] says" if kind in self.data.faults else "the benchmark does"


def _line(kind: str, faults: Sequence[Fault]) -> str:
    tasks = list(dict.fromkeys(fault.task for fault in faults))
    return f"{len(faults)} {MEANINGS[kind]} in {listed(tasks)}: {listed([str(fault) for fault in faults])}"

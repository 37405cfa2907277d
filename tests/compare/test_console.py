"""What is shown while runs go: bars on a terminal, lines elsewhere."""

import io

from keeplora.compare.console import Console
from keeplora.train.events import Event

TASKS = 2


def story(label):
    for task in range(TASKS):
        yield Event("task", label, 0, task, TASKS, name=f"t{task}")
        for step in (1, 2):
            yield Event("step", label, 0, task, TASKS, name=f"t{task}", step=step, steps=2, loss=0.5)
        yield Event("note", label, 0, task, TASKS, text="little room")
        yield Event(
            "learned",
            label,
            0,
            task,
            TASKS,
            name=f"t{task}",
            text="90.0%",
            certificate="leak 1e-8",
            capacity="half is free\nand more",
        )
    yield Event("done", label, 0, TASKS, TASKS, text="last 90 %")


def test_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    console = Console(2 * TASKS, stream=stream)
    for left, right in zip(story("a"), story("b"), strict=True):
        console(left)
        console(right)
    console(Event("learned", "zero", 0, 0, TASKS))  # nothing to say: no line
    console.close()
    lines = stream.getvalue().splitlines()
    assert lines[:5] == [
        "a · seed 0 · task 1/2 note: little room",
        "b · seed 0 · task 1/2 note: little room",
        "a · seed 0 · task 1/2 90.0%",
        "    leak 1e-8",
        "    half is free",
    ]
    assert len(lines) == 2 * (TASKS * 4 + 1)


def test_bars_count_tasks_and_vanish():
    stream = io.StringIO()
    console = Console(2 * TASKS, stream=stream, bars=True)
    assert console.total is not None
    for left, right in zip(story("a"), story("b"), strict=True):
        console(left)
        console(right)
        places = [abs(bar.pos) for bar in console.running.values()]
        assert 0 not in places
        assert len(set(places)) == len(places)
    assert console.total.n == 2 * TASKS
    assert not console.running
    console.close()
    assert "loss=0.500" in stream.getvalue()


def test_finished_and_resumed_runs_move_the_total():
    console = Console(2 * TASKS, stream=io.StringIO(), bars=True)
    assert console.total is not None
    console(Event("done", "a", 0, TASKS, TASKS, text="already finished"))
    console(Event("resumed", "b", 0, 1, TASKS, text="continues after task 1"))
    assert console.total.n == TASKS + 1
    console.close()

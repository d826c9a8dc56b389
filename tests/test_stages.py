"""Whoever waits for text to be prepared sees how far it is."""

import io

import pytest
from rich.console import Console

from dept_ray.stages import shown_on


@pytest.mark.parametrize("terminal", [False, True])
def test_each_stage_is_told_by_its_words_and_a_pipe_gets_one_line_when_it_is_done(terminal: bool):
    console = Console(file=io.StringIO(), width=80, force_terminal=terminal, record=True)
    with shown_on(console) as report:
        for stage in ("clean", "learn", "pack", "index"):
            for done in (0, 2, 3):
                report(stage, done, 3)
    lines = [line for line in console.export_text().splitlines() if line.strip()]
    words = ["reading and cleaning text", "learning tokenizers", "tokenising", "indexing"]
    if terminal:
        assert all(any(line.startswith(each) and "3/3" in line for line in lines) for each in words)
    else:
        assert lines == [f"{each}: 3 of 3" for each in words]

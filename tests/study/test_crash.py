"""What `bench_peers` reads of a crash: from notes written by hand, and from processes that are really killed."""

import subprocess
import sys
import threading

import pytest

from dept_ray.study.bench import programs


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(programs())


def notes(**steps):
    from crash import Step

    return {source: [Step(*step) for step in made] for source, made in steps.items()}


def test_it_is_back_when_its_source_is_trained_by_whichever_process():
    from crash import reading

    made = notes(a=[(1.0, 7), (8.5, 9), (9.0, 9)], b=[(1.5, 8), (3.0, 8), (8.75, 8)])
    found = reading(made, "a", process=7, killed=2.0)
    assert (found["again_s"], found["back"], found["others_steps"]) == (6.5, True, 1)
    assert found["steps_after"] == {"a": 2, "b": 1}
    assert found["workers_after"] == 2


def test_the_pause_is_the_longest_time_without_a_step_of_anybody():
    from crash import reading

    made = notes(a=[(1.0, 7), (9.0, 9), (99.0, 9)], b=[(1.25, 8), (4.0, 8), (8.0, 8)])
    found = reading(made, "a", process=7, killed=2.0)
    assert found["pause_before_s"] == 0.25
    assert found["pause_s"] == 4.0, "it ends with the source that was killed: what follows is no part of it"
    begins_before = reading(made, "a", process=7, killed=3.9)
    assert begins_before["pause_s"] == 4.0


def test_a_step_that_the_killed_process_made_in_its_last_moment_is_no_return():
    from crash import reading

    assert not reading(notes(a=[(1.0, 7), (2.001, 7)], b=[(3.0, 8)]), "a", process=7, killed=2.0)["back"]


def test_who_does_not_come_back_counts_as_long_as_was_waited():
    from crash import reading

    found = reading(notes(a=[(1.0, 7)], b=[(1.5, 8), (3.0, 8)]), "a", process=7, killed=2.0, cap_s=10.0)
    assert (found["again_s"], found["back"], found["others_steps"], found["pause_s"]) == (10.0, False, 1, 9.0)


def test_who_does_not_come_back_is_told_so_and_counts_at_the_limit():
    from bench_peers import after_a_crash
    from crash import CAP_S, reading

    ours = reading(notes(a=[(1.0, 7), (8.0, 9)], b=[(1.5, 8), (3.0, 8)]), "a", process=7, killed=2.0)
    theirs = reading(notes(a=[(1.0, 7)], b=[(1.5, 8), (3.0, 8)]), "a", process=7, killed=2.0)
    ratio = after_a_crash(20, {"dept_ray": ours | {"rounds_lost": 0}, "a peer": theirs | {"rounds_lost": "all"}})
    assert (ratio.name, ratio.value, ratio.met) == ("against a peer, after a crash", 6.0 / CAP_S, True)
    told = [side["seconds until its source is trained again"] for side in ratio.details.values()]
    assert told == [6.0, f"not within {CAP_S:g}, which is what counts"]


def test_a_worker_is_killed_in_the_middle_of_its_second_round(tmp_path):
    from crash import kill_one, read_steps

    program = (
        f"import sys, time; sys.path.insert(0, {str(programs())!r})\n"
        "from pathlib import Path; from crash import note_step\n"
        f"for _ in range(400): time.sleep(0.05); note_step(Path({str(tmp_path)!r}), sys.argv[1])\n"
    )

    def start(source):
        return subprocess.Popen([sys.executable, "-c", program, source])

    over, workers, killed = threading.Event(), [start("a"), start("b")], []

    def keep():
        while not over.wait(0.01):
            if workers[0].poll() is not None:
                killed.append((workers[0].returncode, len(read_steps(tmp_path, "a"))))
                workers[0] = start("a")

    keeper = threading.Thread(target=keep)
    keeper.start()
    try:
        found = kill_one(tmp_path, "a", steps=4)
    finally:
        over.set()
        keeper.join()
        for worker in workers:
            worker.kill()
            worker.wait()
    [(status, made)] = killed
    assert status == -9
    assert made >= 6, "of rounds of four"
    assert found["back"]
    assert max(found["steps_after"].values()) >= 8, "two rounds more are seen"

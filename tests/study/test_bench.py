"""The benchmarks run: each starts and tells its ratios, at a size at which they mean nothing."""

import math

import pytest
import torch
from click.testing import CliRunner

from dept_ray.cli import main
from dept_ray.errors import ConfigError
from dept_ray.study import bench
from dept_ray.study.bench import BENCHMARKS, programs, run_benchmarks


def test_every_program_is_in_the_table_and_every_entry_has_a_program():
    there = {path.name for path in programs().glob("bench_*.py")}
    assert {program for program, *_ in BENCHMARKS.values()} == there


def test_an_unknown_benchmark_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(ConfigError, match='no benchmark "starup"; did you mean startup'):
        next(run_benchmarks(("starup",), str(tmp_path), "small", 1))


def test_without_a_checkout_it_is_said_where_the_benchmarks_are(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "site-packages" / "dept_ray" / "study" / "bench.py"))
    with pytest.raises(ConfigError, match="clone the repository"):
        next(run_benchmarks((), str(tmp_path), "small", 1))


def test_a_benchmark_that_fails_is_a_row_that_says_so(monkeypatch, tmp_path):
    (tmp_path / "bench_broken.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(bench, "programs", lambda: tmp_path)
    monkeypatch.setitem(BENCHMARKS, "broken", ("bench_broken.py",))
    result = CliRunner().invoke(main, ["bench", "broken", "--folder", str(tmp_path)])
    assert result.exit_code == 1
    assert "failed with exit status 3" in result.stdout
    assert [line.split() for line in result.stdout.splitlines()][-1] == ["broken", "failed", "0.0"]


@pytest.mark.ray
@pytest.mark.parametrize(
    "name", ["silo", *(pytest.param(n, marks=pytest.mark.soak) for n in ("startup", "text", "peers", "overlap"))]
)
def test_it_starts_and_tells_its_ratio(name, tmp_path, monkeypatch):
    monkeypatch.setitem(BENCHMARKS, "peers", ("bench_peers.py", "--no-flower"))
    ratios = list(run_benchmarks((name,), str(tmp_path), "small", 1))
    assert ratios
    assert all(math.isfinite(ratio["value"]) and ratio["value"] > 0 for ratio in ratios)


def test_a_silo_on_a_gpu_is_measured_where_there_is_one(tmp_path):
    """Tried on a CPU, where there is none: by vocabularies, without an MFU."""
    ratios = list(run_benchmarks(("gpu",), str(tmp_path), "small", 1))
    assert [ratio["name"] for ratio in ratios if ratio["name"] != "gpu, MFU"] == ["gpu, trim", "gpu, spec-opt"]
    assert all(math.isfinite(ratio["value"]) and ratio["value"] > 0 for ratio in ratios)
    assert torch.cuda.is_available() or list(run_benchmarks(("gpu",), str(tmp_path), "full", 1)) == []


@pytest.mark.soak
def test_every_way_to_join_is_measured_against_draws_and_against_nobody(tmp_path):
    ratios = list(run_benchmarks(("joining",), str(tmp_path), "small", 1))
    ways = ("random", "overlap", "ofa", "tokenadapt")
    assert [ratio["name"] for ratio in ratios] == [
        f"joining, {way}{frozen}" for frozen in ("", ", body frozen for 2 steps") for way in ways
    ]
    assert ratios[0]["value"] == 1, "draws are what the others are held against"
    for ratio in ratios:
        assert ratio["value"] > 0
        assert ratio["details"]["others, % over nobody joining, by steps since"]["0"] == 0, "nobody has come yet"


def test_sides_take_turns(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(programs())
    from sides import Side, taking_turns

    program, log = tmp_path / "side.py", tmp_path / "log"
    program.write_text(
        f"import sys; sys.path.insert(0, {str(programs())!r})\n"
        "from sides import serve\n"
        "name = sys.argv[1]\n"
        f"def measure(x): open({str(log)!r}, 'a').write(name); print('noise'); return {{'x': x}}\n"
        "serve(lambda: ({'name': name}, {'speed': lambda: measure(1.0), 'crash': lambda: measure(2.0)}))\n"
    )
    with taking_turns(3, lambda: Side("a", [program, "a"]), lambda: Side("b", [program, "b"])) as (a, b):
        assert log.read_text() == "ababab"
        assert (a.about, b.about) == ({"name": "a"}, {"name": "b"})
        assert a.median("x") == 1.0
        assert b.measure("crash") == {"x": 2.0}
        assert b.median("x") == 1.0, "what was asked for beside its turns is told apart"

"""Which silos belong to which region, as labels say; and what cannot be done between regions is refused at once."""

from pathlib import Path

import pytest
from tiny import SOURCES, tiny_job

from dept_ray.config import Job
from dept_ray.errors import ConfigError
from dept_ray.in_process import train_here
from dept_ray.rounds.regions import by_labels, check_regions, job_of_region


def placed(**labels: dict[str, str]) -> Job:
    sources = [{**table, "resources": {"num_cpus": 2, "labels": labels.get(table["name"], {})}} for table in TABLES]
    return tiny_job(Path("/nowhere"), sources=sources, rounds={"choose": 3})


TABLES = [{"name": name, "kind": "installed", "collection": "docs"} for name in SOURCES]


def test_a_silo_belongs_where_its_labels_say():
    job = placed(code={"region": "eu", "accelerator": "H200"}, latin={"region": "us"})
    assert [s for s in SOURCES if by_labels({"region": "eu"})(job, s)] == ["code"]
    assert [s for s in SOURCES if by_labels({"region": "us", "market": "spot"})(job, s)] == []
    assert [s for s in SOURCES if by_labels({})(job, s)] == list(SOURCES)


def test_a_region_s_job_is_its_own_sources_and_asks_for_no_label_that_all_of_it_bears():
    labels = {"region": "eu"}
    job = placed(code={"region": "eu", "accelerator": "H200"}, latin={"region": "us"})
    there = job_of_region(job, by_labels(labels), labels, "/mnt/eu")
    assert [source.name for source in there.sources] == ["code"]
    resources = there.sources[0].resources
    assert resources is not None
    assert (resources.labels, resources.num_cpus) == ({"accelerator": "H200"}, 2)
    assert there.folder == "/mnt/eu"
    assert Job.model_validate_json(there.model_dump_json()) == there  # as a silo's process will read it


def test_what_cannot_be_done_between_regions_is_refused_before_anything_is_spent(prepared, tmp_path):
    mailbox = {"mailbox": str(tmp_path / "box")}
    for method in ("glob", "trim", "spec", "isolated"):
        with pytest.raises(ConfigError, match=r'train it beforehand and name it in each region .*kind = "file"'):
            train_here(tiny_job(tmp_path, method, regions=mailbox), lambda record: None)
    for method in ("std", "act"):
        with pytest.raises(ConfigError, match="trains one silo on the text of all"):
            check_regions(tiny_job(tmp_path, method, regions=mailbox))
    check_regions(tiny_job(tmp_path, "spec-opt", regions=mailbox))
    check_regions(tiny_job(tmp_path, "isolated", regions=mailbox, tokenizer={"vocabulary": "own"}))
    started = {"run": "before"}
    check_regions(tiny_job(tmp_path, "spec-opt", regions=mailbox, init=started))
    with pytest.raises(ConfigError, match="a silo cannot read what the run begins from"):
        check_regions(tiny_job(tmp_path, "spec-opt", regions=mailbox, init={**started, "embedding": "overlap"}))
    assert not (tmp_path / "box").exists()

"""A wrong job file is refused with the key, the value and the remedy; in a right one every path is absolute."""

from typing import Any

import pytest

from dept_ray.config import Job
from dept_ray.errors import ConfigError
from dept_ray.jobfile import load_job, parse_job

DOCS = {"name": "docs", "kind": "installed", "collection": "docs"}
TEXTS = {"name": "texts", "kind": "files", "paths": "texts/*.txt"}
NAMES = "must be letters, digits and . _ - only, and begin with a letter or a digit"


def values(**changes: Any) -> dict[str, Any]:
    """Two sources; sections as given."""
    return {"name": "job", "sources": [DOCS, TEXTS], **changes}


def job(**changes: Any) -> Job:
    return parse_job(values(**changes))


def refused(wrong: dict[str, Any]) -> list[str]:
    """The mistakes that a job is refused with."""
    with pytest.raises(ConfigError) as caught:
        parse_job(wrong, where="job.toml")
    head, *mistakes = str(caught.value).splitlines()
    assert head == f"job.toml: {len(mistakes)} mistake{'s' * (len(mistakes) > 1)}"
    return [mistake.strip() for mistake in mistakes]


# What is refused, and in which words.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"modle": {}}, "modle: unknown key; did you mean model?"),
        ({"files": 3}, "files: unknown key; did you mean folder?"),
        ({"model": {"laers": 3}}, "model.laers: unknown key; did you mean layers?"),
        ({"inner": {"batchsize": 3}}, "inner.batchsize: unknown key; did you mean batch_size?"),
        ({"sources": [{**DOCS, "colection": "x"}]}, "sources.docs.colection: unknown key; did you mean collection?"),
        ({"sources": [{**TEXTS, "path": "x"}]}, "sources.texts.path: unknown key; did you mean paths?"),
        (
            {"sources": [{**DOCS, "resources": {"gpus": 1}}]},
            "sources.docs.resources.gpus: unknown key; did you mean num_gpus?",
        ),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(changes, words):
    assert refused(values(**changes)) == [words]


def test_an_unknown_key_like_no_other_is_refused_with_all_names():
    assert refused(values(zzzz=1))[0].startswith("zzzz: unknown key; known: faults, folder, init, inner, method,")
    assert refused(values(mixture={"zzzz": 1})) == ["mixture.zzzz: unknown key; known: temperature"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"inner": {"lr": "fast"}}, "inner.lr = 'fast': must be a valid number"),
        ({"inner": {"lr": float("inf")}}, "inner.lr = inf: must be a finite number"),
        ({"inner": {"batch_size": 0}}, "inner.batch_size = 0: must be greater than 0"),
        ({"inner": {"betas": [0.9, 1.5]}}, "inner.betas.1 = 1.5: must be less than 1"),
        ({"model": {"arch": "bert"}}, "model.arch = 'bert': must be 'gpt2' or 'llama'"),
        ({"rounds": 3}, "rounds = 3: must be a table"),
        ({"sources": 3}, "sources = 3: must be a list"),
        ({"sources": [3]}, "sources.0 = 3: must be a table"),
        ({"folder": 3}, "folder = 3: must be a valid string"),
        ({"resources": {"labels": {"region": 3}}}, "resources.labels.region = 3: must be a valid string"),
        ({"name": "my job"}, f"name = 'my job': {NAMES}"),
        ({"sources": [{**DOCS, "name": "a/b"}]}, f"sources.a/b.name = 'a/b': {NAMES}"),
        ({"sources": [{**DOCS, "name": ""}]}, f"sources.0.name = '': {NAMES}"),
    ],
)
def test_a_wrong_value_is_told_with_its_key(changes, words):
    assert refused(values(**changes)) == [words]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"name": "a", "kind": "web"}, "sources.a.kind = 'web': must be \"hub\", \"files\" or \"installed\""),
        ({"name": "a"}, "sources.a.kind: missing; add \"hub\", \"files\" or \"installed\""),
        ({"kind": "installed", "collection": "docs"}, "sources.0.name: missing; add it"),
        ({"name": "a", "kind": "hub"}, "sources.a.dataset: missing; add it"),
        ({"name": "a", "kind": "files"}, "sources.a.paths: missing; add it"),
    ],
)  # fmt: skip
def test_a_source_must_say_what_it_is(source, words):
    assert refused(values(sources=[source])) == [words]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sources": []}, "sources is empty: a job needs at least one [[sources]] table"),
        ({"sources": [DOCS, DOCS]}, 'sources: the name "docs" stands twice; each source needs a name of its own'),
        (
            {"inner": {"context": 100}, "model": {"positions": 64}},
            "inner.context = 100 is longer than model.positions = 64: lower the context or raise the positions",
        ),
        ({"rounds": {"choose": 3}}, "rounds.choose = 3, but there are only 2 sources"),
        (
            {"inner": {"batch_size": 10, "micro_batch": 3}},
            "inner.batch_size = 10 is not a multiple of inner.micro_batch = 3",
        ),
        (
            {"inner": {"batch_size": 12, "micro_batch": 4}, "resources": {"ranks": 2}},
            "inner.batch_size = 12 / resources.ranks = 2 is not a multiple of inner.micro_batch = 4",
        ),
        (
            {"inner": {"batch_size": 10}, "sources": [{**DOCS, "resources": {"num_gpus": 4}}]},
            "inner.batch_size = 10 is not a multiple of resources.ranks = 4 (by default one for each of "
            "resources.num_gpus): each rank takes an equal share of every batch; mend either",
        ),
        (
            {"resources": {"num_gpus": 4, "ranks": 2}},
            "resources.num_gpus = 4 and resources.ranks = 2: each rank trains on one GPU; make them equal, or leave "
            "ranks out",
        ),
        ({"model": {"heads": 5}}, "model.width = 768 is not a multiple of model.heads = 5"),
        (
            {"model": {"arch": "llama", "width": 12, "heads": 4}},
            "model.width / model.heads = 3 must be even for rotary positions",
        ),
        (
            {"model": {"arch": "llama", "kv_heads": 5}},
            "model.heads = 12 is not a multiple of model.kv_heads = 5",
        ),
        ({"model": {"kv_heads": 4}}, 'model.kv_heads = 4: model.arch = "gpt2" knows no such thing; remove it'),
        (
            {"model": {"rope_theta": 500000.0}},
            'model.rope_theta = 500000: model.arch = "gpt2" knows no such thing; remove it',
        ),
        (
            {"tokenizer": {"kind": "file"}},
            'tokenizer.kind = "file" needs tokenizer.name, the path or Hub name to load',
        ),
    ],
)
def test_contradictions_are_refused(changes, words):
    assert refused(values(**changes)) == [words]


def test_every_mistake_is_told_at_once():
    wrong = values(modle={}, inner={"lr": -1, "epochs": 3}, sources=[{"name": "a", "kind": "web"}])
    assert [mistake.split(":")[0] for mistake in refused(wrong)] == [
        "sources.a.kind = 'web'",
        "inner.lr = -1",
        "inner.epochs",
        "modle",
    ]


# Files.


def test_a_missing_file_is_told_with_the_nearest(tmp_path):
    (tmp_path / "tiny_spec.toml").write_text("")
    with pytest.raises(ConfigError, match=r"tiny_spek\.toml does not exist; did you mean tiny_spec\.toml\?"):
        load_job(tmp_path / "tiny_spek.toml")
    with pytest.raises(ConfigError, match=r"job\.toml does not exist$"):
        load_job(tmp_path / "nowhere" / "job.toml")


@pytest.mark.parametrize("content", [b"name = ", b"\xff\xfe", b"name = 'a'\nname = 'b'"])
def test_what_is_not_toml_is_refused(tmp_path, content):
    path = tmp_path / "job.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"job\.toml is not readable TOML: "):
        load_job(path)


def test_a_folder_is_no_job_file(tmp_path):
    with pytest.raises(ConfigError, match="is not readable TOML"):
        load_job(tmp_path)


def test_a_job_is_named_after_its_file_and_overridden_from_outside(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('method = "glob"\n[[sources]]\nname = "docs"\nkind = "installed"\ncollection = "docs"\n')
    assert (load_job(path).name, load_job(path).method) == ("mine", "glob")
    assert load_job(path, method="trim").method == "trim"


def test_what_a_file_leaves_open_is_filled_and_what_it_says_stays(tmp_path):
    path = tmp_path / "job.toml"
    source = '[[sources]]\nname = "docs"\nkind = "installed"\ncollection = "docs"\n'
    path.write_text(f'method = "glob"\n[inner]\nlr = 0.5\n{source}')
    job = load_job(
        path, lambda known: {"method": "std", "inner": {"lr": 1, "context": 64}, "seed": len(known["inner"])}
    )
    assert (job.method, job.inner.lr, job.inner.context, job.seed) == ("glob", 0.5, 64, 1)
    job = load_job(path, lambda known: {"inner": {"lr": 1.0}}, inner={"context": 8})
    assert (job.inner.lr, job.inner.context) == (0.5, 8)


# Paths.


def test_local_paths_are_made_absolute_and_uris_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    paths = ["a/*.txt", "s3://bucket/a/*.txt", "~/b.txt"]
    files = {"name": "f", "kind": "files", "paths": paths, "validation_paths": "v.txt"}
    made = job(
        folder="here",
        sources=[files, {**DOCS, "storage": "there"}],
        tokenizer={"kind": "file", "name": "tokenizer.json"},
    )
    first, second = made.sources
    assert first.kind == "files"
    assert made.folder == f"{tmp_path}/here"
    assert first.paths == (f"{tmp_path}/a/*.txt", "s3://bucket/a/*.txt", f"{tmp_path}/home/b.txt")
    assert first.validation_paths == (f"{tmp_path}/v.txt",)
    assert second.storage == f"{tmp_path}/there"
    assert made.tokenizer.name == f"{tmp_path}/tokenizer.json"
    assert job(tokenizer={"kind": "hub", "name": "org/name"}).tokenizer.name == "org/name"


def test_a_folder_that_is_no_folder_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"folder = 's3://b/x' must be a folder"):
        parse_job({"name": "x", "folder": "s3://b/x", "sources": [DOCS]})
    with pytest.raises(ConfigError, match=r"sources\.docs\.storage = 'gs://b' must be a folder"):
        parse_job({"name": "x", "sources": [{**DOCS, "storage": "gs://b"}]})

"""Whether a run's source is at home here: behind a mailbox its text and its embedding are in its region alone.

A run's folder may be copied anywhere, what stays home may not. So whoever uses a source is told where to go.
"""

from dept_ray.config import Job
from dept_ray.errors import ShardError
from dept_ray.rounds.folder import run_folder
from dept_ray.rounds.methods import method_of, resources_of
from dept_ray.text.prepare import corpus_folder, tokenizer_kind


def at_home(job: Job, source: str) -> bool:
    """Whether what a source has may be looked for here; where there are no regions it always may."""
    folder = corpus_folder(job, source, tokenizer_kind(method_of(job).vocabulary))
    return job.regions.mailbox is None or (folder / "index.json").exists()


def check_at_home(job: Job, source: str) -> None:
    """Refuse to use a source that is at home elsewhere.

    Raises:
        ShardError: with the way to its region.
    """
    if not at_home(job, source):
        labels = ", ".join(f"{key}={value}" for key, value in resources_of(job, source).labels.items())
        raise ShardError(
            f"source {source} is not at home here: its text and embedding stay in the region that trains it "
            f"({labels or 'no labels'}). Copy {run_folder(job)} to runs/{job.name} in that region's folder (`--folder` "
            f"of its `dept-ray region`, else the job's), and give the command there, with --source {source}"
        )

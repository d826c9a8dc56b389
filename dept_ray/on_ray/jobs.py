"""Runs as Ray jobs: for a cluster whose dashboard can be reached from here, and nothing else of it.

What is sent is the job file and this package, as the one working directory that the run's driver and all its silos
start with, so that a cluster which has not the package runs the very code that submitted. No text, run or environment
is sent: folders that a job names are those of the cluster.

The run's driver is on the cluster. Watching is asking again and again, so that a lost connection costs nothing, and
whoever stops watching stops nothing. The coordinator is the driver's and the silos are the coordinator's: a job that
is cancelled ends all of them, and the last committed round stands.
"""

import logging
import os
import shlex
import shutil
import tempfile
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

import dept_ray
from dept_ray.errors import ClusterError, ConfigError, RunError
from dept_ray.jobfile import load_job
from dept_ray.on_ray.tokens import REMEDY, own_token

DASHBOARD = "http://127.0.0.1:8265"
"""Where Ray's dashboard is unless told otherwise: on this machine, or at this end of a tunnel."""
_REQUEST_TIMEOUT_S = 30.0
_LOG_BYTES_PER_S = 200_000
"""Ray hands out a job's whole log each time: a long one is asked for less often."""
_ASK = "RAY_API_SERVER_ADDRESS"
T = TypeVar("T")


class _Client(JobSubmissionClient):
    """Ray's own waits for ever on a network that fell silent."""

    def _do_request(self, *args: Any, **more: Any) -> Any:
        return super()._do_request(*args, **{"timeout": _REQUEST_TIMEOUT_S, **more})


# ------------------------------------------------------------------------------------------------ reaching a cluster
def reach(address: str | None = None) -> JobSubmissionClient:
    """A client of the cluster whose dashboard is at `address`.

    Where the cluster asks for a token, and RAY_AUTH_MODE says nothing, the one that Ray's tools use is shown to it.

    Args:
        address: http(s)://HOST:PORT of the dashboard; None: RAY_API_SERVER_ADDRESS, else `DASHBOARD`.

    Raises:
        ClusterError: nothing answers there, or it does not let us in.
    """
    url = address or os.environ.get(_ASK) or DASHBOARD
    url = (url if "://" in url else f"http://{url}").rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise ClusterError(f"--address {url!r} must be a Ray dashboard's http(s)://HOST:PORT, such as {DASHBOARD}")
    for chatty in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        return _connect(url)
    except AuthenticationError as err:
        token = own_token() if "RAY_AUTH_MODE" not in os.environ else None
        if token is None:
            raise _locked_out(url, err) from None
    try:
        return _connect(url, {"Authorization": f"Bearer {token}"})
    except AuthenticationError as err:
        raise _locked_out(url, err) from None


def _connect(url: str, headers: dict[str, str] | None = None) -> JobSubmissionClient:
    before = os.environ.get(_ASK)
    os.environ[_ASK] = url  # this and RAY_ADDRESS would win over what is passed
    try:
        client = _Client(url, headers=headers)
        client.list_jobs()  # the version is told without a token, jobs are not
        return client
    except (requests.RequestException, ConnectionError, RuntimeError) as err:
        raise ClusterError(
            f"no Ray dashboard answers at {url} ({type(err).__name__}): check --address (or {_ASK}); a cluster behind "
            "ssh needs a tunnel, such as `ray dashboard CLUSTER.yaml` or `ssh -L 8265:127.0.0.1:8265 HEAD`"
        ) from None
    finally:
        if before is None:
            del os.environ[_ASK]
        else:
            os.environ[_ASK] = before


def _locked_out(url: str, err: AuthenticationError) -> ClusterError:
    return ClusterError(f"the cluster at {url} asks for its token ({str(err).splitlines()[0]}): {REMEDY}")


# ------------------------------------------------------------------------------------------------ submitting
def submit(
    client: JobSubmissionClient, job_file: str | Path, method: str | None = None, folder: str | None = None
) -> str:
    """Let the cluster train a job file to its last round, from wherever its run folder stands.

    Args:
        client: see `reach`.
        job_file: read here; its folders and files are the cluster's.
        method: instead of the job's own.
        folder: instead of the job's own.

    Returns:
        The job's id, which begins with the run's name.

    Raises:
        ConfigError: the job file is wrong, or names what the cluster cannot see.
        ClusterError: the cluster refused it.
    """
    file = Path(job_file)
    given = {"method": method, "folder": folder}
    job = load_job(file, **{key: value for key, value in given.items() if value})
    check_paths(file, folder)
    words = ["python", "-m", "dept_ray", "train", file.name]
    words += [word for key, value in given.items() if value for word in (f"--{key}", value)]
    with tempfile.TemporaryDirectory(prefix="dept-ray-") as sent:
        package = Path(dept_ray.__file__).parent
        shutil.copytree(package, Path(sent, package.name), ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(file, Path(sent, file.name))
        try:
            return client.submit_job(
                entrypoint=shlex.join(words), submission_id=f"{job.name}-{uuid4().hex[:8]}",
                runtime_env={"working_dir": sent}, metadata={"run": job.name, "folder": job.folder},
            )  # fmt: skip
        except (requests.RequestException, ConnectionError, RuntimeError) as err:
            raise ClusterError(f"the cluster did not take the job: {err}") from None


def check_paths(job_file: Path, folder: str | None = None) -> None:
    """Refuse a job file with paths that mean something here only: a cluster would look for them elsewhere.

    Args:
        job_file: a valid one.
        folder: instead of the job's own.

    Raises:
        ConfigError: each of them, by key.
    """
    values = tomllib.loads(job_file.read_text(encoding="utf-8"))
    named: list[tuple[str, str]] = [("folder", folder or values.get("folder", "."))]
    tokenizer = values.get("tokenizer", {})
    if tokenizer.get("kind") == "file":
        named.append(("tokenizer.name", tokenizer["name"]))
    if mailbox := values.get("regions", {}).get("mailbox"):
        named.append(("regions.mailbox", mailbox))
    named += [(f"init.{key}", at) for key, at in values.get("init", {}).items() if Path(str(at)).is_dir()]
    for source in values["sources"]:
        for key in ("storage", "paths", "validation_paths"):
            given = source.get(key, [])
            named += [(f"sources.{source['name']}.{key}", at) for at in ([given] if isinstance(given, str) else given)]
        if source["kind"] == "hub" and Path(source["dataset"]).is_dir():
            named.append((f"sources.{source['name']}.dataset", source["dataset"]))
    wrong = [f"  {key} = {at!r}" for key, at in named if "://" not in at and not os.path.isabs(at)]
    if wrong:
        raise ConfigError(
            "\n".join([f"{job_file}: a cluster does not see relative paths, and no text is sent with a job:", *wrong])
            + "\ngive absolute paths that its nodes see, or s3:// or gs:// for text; --folder replaces `folder`"
        )


# ------------------------------------------------------------------------------------------------ watching, ending
def follow(
    client: JobSubmissionClient,
    job_id: str,
    show: Callable[[str], None],
    every_s: float = 1.0,
    patience_s: float = 3600,
) -> None:
    """Show a job's log, from its first line on, until the job is over.

    Args:
        client: see `reach`.
        job_id: as `submit` returned it.
        show: called with text as it comes, in whole lines.
        every_s: seconds between two questions, at least.
        patience_s: seconds without an answer after which watching ends; the job does not.

    Raises:
        ClusterError: there is no such job, or the connection stays lost.
        RunError: it failed, or was cancelled.
    """
    shown, answered, lost = 0, time.monotonic(), False
    while True:
        try:
            info = _ask(lambda: client.get_job_info(job_id), job_id)
            log = _ask(lambda: client.get_job_logs(job_id), job_id)  # after the status: the log of a job over is whole
        except (requests.RequestException, ConnectionError) as err:
            if time.monotonic() - answered > patience_s:
                raise ClusterError(f"no answer for {patience_s:g} s; job {job_id} does not need us to go on") from None
            if not lost:
                show(f"connection lost ({type(err).__name__}), asking again; the job goes on\n")
            lost = True
            time.sleep(every_s)
            continue
        answered, lost = time.monotonic(), False
        status = JobStatus(info.status)
        end = len(log) if status.is_terminal() else log.rfind("\n") + 1
        if end > shown:
            show(log[shown:end])
            shown = end
        if status == JobStatus.SUCCEEDED:
            return
        if status == JobStatus.STOPPED:
            raise RunError(f"job {job_id} was cancelled; its last committed round stands, a new job goes on from it")
        if status.is_terminal():
            reason = "its log says why" if shown else info.message
            raise RunError(f"job {job_id} failed: {reason}")
        time.sleep(max(every_s, len(log) / _LOG_BYTES_PER_S))


def cancel(client: JobSubmissionClient, job_id: str, within_s: float = 60) -> bool:
    """End a job now, with every process of its run; the last committed round stands.

    Args:
        client: see `reach`.
        job_id: as `submit` returned it.
        within_s: seconds to wait for its end.

    Returns:
        Whether it was in progress.

    Raises:
        ClusterError: there is no such job, it does not end, or the cluster does not answer.
    """
    try:
        if not _ask(lambda: client.stop_job(job_id), job_id):
            return False
        deadline = time.monotonic() + within_s
        while not JobStatus(_ask(lambda: client.get_job_info(job_id), job_id).status).is_terminal():
            if time.monotonic() > deadline:
                raise ClusterError(f"job {job_id} was told to end, and has not after {within_s:g} s: ask again")
            time.sleep(0.2)
        return True
    except (requests.RequestException, ConnectionError) as err:
        raise ClusterError(f"the cluster does not answer ({type(err).__name__}): ask again") from None


def _ask(question: Callable[[], T], job_id: str) -> T:
    """One request; an answer that is none (a proxy's, a starting head's) is a connection lost."""
    try:
        return question()
    except AuthenticationError:
        raise ClusterError(
            "the cluster does not take our token any more: copy the head's ~/.ray/auth_token again, then `--attach`"
        ) from None
    except RuntimeError as err:
        if "status code 404" in str(err):
            raise ClusterError(
                f"the cluster has no job {job_id!r}: `ray job list` names those that it has, and a head "
                "that was started anew has forgotten all; the same submit goes on with the run"
            ) from None
        raise ConnectionError(str(err)) from None

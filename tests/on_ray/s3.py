"""A real S3 API server (moto's) for tests, on loopback, with an empty bucket."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from nodes import until
from proxy import free_ports

BUCKET = "letters"


def uri(port: int, prefix: str) -> str:
    """A place in the bucket, as reached by a port of this machine; any key is good."""
    options = f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
    return f"s3://anybody:anything@{BUCKET}/{prefix}?{options}"


@contextmanager
def s3_server() -> Iterator[int]:
    """Its port."""
    from pyarrow.fs import FileSystem

    beside = Path(sys.executable).with_name("moto_server")
    command = str(beside) if beside.exists() else shutil.which("moto_server")
    if command is None:
        pytest.skip("no moto_server: pip install -c constraints.txt -e '.[dev]'")
    (port,) = free_ports(1)
    server = subprocess.Popen(
        [command, "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )  # fmt: skip

    def answers() -> bool:
        assert server.poll() is None
        try:
            files, _ = FileSystem.from_uri(uri(port, ""))
            files.create_dir(BUCKET)
        except OSError:
            return False
        return True

    try:
        until(answers, 120)
        yield port
    finally:
        server.kill()
        server.wait()

"""What plan and ledger say of a round is what the kernel counts on the sockets."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ALONE = ["unshare", "--net", "--map-root-user", "sh", "-c", 'ip link set lo up && exec "$@"', "-"]
"""Runs a command with a loopback of its own."""


def can_be_alone() -> bool:
    if not all(shutil.which(program) for program in ("unshare", "ip", "ss")):
        return False
    return subprocess.run([*ALONE, "true"], capture_output=True).returncode == 0


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif(not can_be_alone(), reason="needs network namespaces and iproute2")
@pytest.mark.parametrize(
    ("method", "codec", "layers"), [pytest.param("spec", "fp32", 2, marks=pytest.mark.soak), ("trim", "int4", 8)]
)
def test_plan_and_ledger_say_what_the_kernel_counts(tmp_path: Path, method: str, codec: str, layers: int) -> None:
    program = [
        sys.executable,
        str(Path(__file__).with_name("counted_bytes.py")),
        str(tmp_path),
        method,
        codec,
        str(layers),
    ]
    here = Path(__file__).parent
    path = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run([*ALONE, *program], capture_output=True, text=True, timeout=900, env=path)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    print(method, codec, said)
    for ledger, counted in zip(said["ledger"], said["counted"], strict=True):
        assert ledger == pytest.approx(said["planned"], rel=0.02)
        assert counted == pytest.approx(ledger, rel=0.02)

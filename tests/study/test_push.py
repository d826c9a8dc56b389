"""What goes to the Hub: the exported folder and nothing else, to a private repository. The Hub is one of our own."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from tiny import ready_job

from dept_ray.errors import StoreError
from dept_ray.in_process import train_here
from dept_ray.rounds.folder import run_folder
from dept_ray.study.export import export

NAME = "someone/latin"


class Hub(ThreadingHTTPServer):
    """Speaks as much of the Hub's protocol as an upload needs, to those who are logged in."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Authorization"] != "Bearer hf_known":
            self._say(401, {"error": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self._say(200, {"url": f"https://huggingface.co/{NAME}", "name": NAME})
        elif self.path == f"/api/models/{NAME}/preupload/main":
            paths = [file["path"] for file in json.loads(body)["files"]]
            self._say(200, {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})
        elif self.path == f"/api/models/{NAME}/commit/main":
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.server.files |= {file["path"]: base64.b64decode(file["content"]) for file in files}
            self._say(
                200, {"commitUrl": f"https://huggingface.co/{NAME}/commit/1", "commitOid": "1", "pullRequestUrl": None}
            )
        else:
            self._say(200, {})

    def _say(self, status: int, what: Any) -> None:
        answer = json.dumps(what).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{hub.server_address[1]}")
        yield hub
        hub.shutdown()


@pytest.fixture(scope="module")
def job(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    job = ready_job(prepared, tmp_path_factory.mktemp("push"), "spec", rounds={"total": 1})
    train_here(job, lambda record: None)
    return job


def test_the_folder_is_uploaded_as_it_is_to_a_private_repository(
    job: Any, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_TOKEN", "hf_known")
    out = export(job, run_folder(job), tmp_path / "out", "latin", push=NAME)
    assert hub.files == {path.name: path.read_bytes() for path in out.iterdir()}
    (asked,) = hub.created
    assert asked["visibility"] == "private"
    assert f'from_pretrained("{NAME}")' in hub.files["README.md"].decode()


def test_who_is_not_logged_in_keeps_the_folder(job: Any, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    with pytest.raises(StoreError, match=rf"is written, but could not be uploaded as {NAME} .*`hf auth login`"):
        export(job, run_folder(job), tmp_path / "out", "latin", push=NAME)
    assert not hub.files
    assert (tmp_path / "out" / "model.safetensors").exists()

"""The clouds' metadata services, as far as notices go, on loopback: what they ask of who asks, and what they say."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Metadata:
    """A metadata service: AWS's paths and Google's, each with its own manners.

    `action` is AWS's notice and `preempted` Google's answer; `away` lets everything fail with 503.
    """

    def __init__(self) -> None:
        self.action: str | None = None
        self.preempted = False
        self.away = False
        self.asked = threading.Semaphore(0)
        self._tokens: set[str] = set()
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                ttl = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
                if self.path != "/latest/api/token" or not ttl.isdigit():
                    return self.answer(400)
                service._tokens.add(token := f"token-{len(service._tokens)}")
                return self.answer(200, token)

            def do_GET(self) -> None:
                service.asked.release()
                if service.away:
                    return self.answer(503)
                if self.path == "/computeMetadata/v1/instance/preempted":
                    if self.headers.get("Metadata-Flavor") != "Google":
                        return self.answer(403)
                    return self.answer(200, "TRUE" if service.preempted else "FALSE")
                if self.headers.get("X-aws-ec2-metadata-token") not in service._tokens:
                    return self.answer(401)
                if self.path != "/latest/meta-data/spot/instance-action" or service.action is None:
                    return self.answer(404)
                return self.answer(200, service.action)

            def answer(self, status: int, text: str = "") -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *words: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


@contextmanager
def metadata_service() -> Iterator[Metadata]:
    service = Metadata()
    thread = threading.Thread(target=service.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield service
    finally:
        service.server.shutdown()
        service.server.server_close()
        thread.join()

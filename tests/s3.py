"""S3 for tests, over HTTP: moto's server, and a service that answers everything with one error."""

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote
from urllib.request import Request, urlopen

import pytest

from tests.ports import free_ports

boto3 = pytest.importorskip("boto3")
moto_server = pytest.importorskip("moto.server")

REGION, USER, SECRET = "us-east-1", "user", "secret"


class Server:
    """moto's server; stopped and started it keeps its port and its objects. `verbose` has it log each request."""

    def __init__(self, *, verbose: bool = False) -> None:
        [self.port] = free_ports(1)
        self._server: Any = None
        self._verbose = verbose

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def uri(self, path: str) -> str:
        """Of `bucket/prefix`, with everything in it that is needed to get there."""
        return uri_of(self.port, path)

    def client(self) -> Any:
        return boto3.client("s3", endpoint_url=self.endpoint, aws_access_key_id=USER, aws_secret_access_key=SECRET, region_name=REGION)

    @property
    def environment(self) -> dict[str, str]:
        """What leads a process to this server that is given a URI without any of it."""
        keys = {"AWS_ACCESS_KEY_ID": USER, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": REGION}
        return {**keys, "AWS_ENDPOINT_URL": self.endpoint, "AWS_EC2_METADATA_DISABLED": "true"}

    def start(self) -> None:
        self._server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=self._verbose)
        self._server.start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None


@contextlib.contextmanager
def serving(server: Server) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        server.start()
        # moto keeps its buckets in this process, also those of the servers before.
        urlopen(Request(f"{server.endpoint}/moto-api/reset", method="POST"), timeout=30).close()
        try:
            yield server
        finally:
            server.stop()


def uri_of(port: int, path: str) -> str:
    endpoint = quote(f"127.0.0.1:{port}", safe="")
    return f"s3://{USER}:{SECRET}@{path}?endpoint_override={endpoint}&scheme=http&region={REGION}"


@contextlib.contextmanager
def answering(status: int, code: str, path: str, port: int = 0) -> Iterator[str]:
    """The URI of `path` at a service that answers everything with one error; an empty `code` has no body. `port`: in a Server's place."""
    body = f"<Error><Code>{code}</Code><Message>told so</Message></Error>".encode() if code else b""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("content-length") or 0))
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer

        def log_message(self, *_: object) -> None:
            pass

    service = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield uri_of(service.server_port, path)
    finally:
        service.shutdown()
        thread.join()
        service.server_close()

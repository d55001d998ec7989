"""S3 for the campaign: moto's server in a process of its own, and a TCP proxy before it that refuses, hangs or drops connections.

Called by control.py and the outage rows. A process finds the service, or the proxy, by its `environment`.
"""

import contextlib
import os
import select
import socket
import subprocess
import sys
import threading
import time
from typing import Any, Literal

REGION, USER, SECRET, BUCKET = "us-east-1", "user", "secret", "bucket"
Weather = Literal["open", "refuse", "hang", "drop"]
START_SECONDS = 30.0


def environment_of(port: int) -> dict[str, str]:
    """What leads a process to the service that gets a URI without any of it."""
    keys = {"AWS_ACCESS_KEY_ID": USER, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": REGION}
    return {**keys, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_EC2_METADATA_DISABLED": "true"}


def client(port: int) -> Any:
    import boto3

    return boto3.client(
        "s3", endpoint_url=f"http://127.0.0.1:{port}", aws_access_key_id=USER, aws_secret_access_key=SECRET, region_name=REGION
    )


def new_bucket(name: str) -> str:
    """Make a bucket in the service that the environment names; a trial's own, since moto's every call goes through all keys of a bucket."""
    port = int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])
    client(port).create_bucket(Bucket=name)
    return name


class Server:
    """moto in another process, with one bucket. A context manager."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        return environment_of(self.port)

    def __enter__(self) -> "Server":
        os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
        command = [sys.executable, "-m", "benchmarks.faults.s3", str(self.port)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                client(self.port).create_bucket(Bucket=BUCKET)
                return self
            except Exception:
                if time.monotonic() > end or self._process.poll() is not None:
                    self.__exit__()
                    raise
                time.sleep(0.2)

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


class Proxy:
    """Passes connections on to a local `port` while the weather is open.

    refuse: nobody listens. hang: connections are taken and get no answer. drop: connections are reset, also those under way."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._weather: Weather = "open"
        self._listener: socket.socket | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self._pairs: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._forecast: tuple[bytes, Weather, float] | None = None
        self._turned = threading.Event()
        self._listen()

    @property
    def environment(self) -> dict[str, str]:
        return environment_of(self.port)

    @property
    def weather(self) -> Weather:
        return self._weather

    def turn_at(self, request: str, weather: Weather, seconds: float) -> threading.Event:
        """Turn to `weather` for `seconds` at the first request whose line contains `request`; the request itself meets it. Returns what is
        set then."""
        self._turned = threading.Event()
        self._forecast = (request.encode(), weather, seconds)
        return self._turned

    def turn_for(self, weather: Weather, seconds: float) -> None:
        """Turn to `weather` now, and back after `seconds`."""
        self.turn(weather)
        timer = threading.Timer(seconds, self.turn, ("open",))
        timer.daemon = True
        timer.start()

    def _reads(self, data: bytes) -> None:
        with self._lock:
            forecast = self._forecast
            if forecast is None or forecast[0] not in data.partition(b"\r\n")[0]:
                return
            self._forecast = None
        self.turn_for(forecast[1], forecast[2])
        self._turned.set()

    def turn(self, weather: Weather) -> None:
        """Change the weather until the next turn."""
        self._weather = weather
        if weather == "refuse":
            self._unlisten()
            self._cut()
        elif weather == "drop":
            self._cut()
        if weather != "refuse" and self._listener is None:
            self._listen()
        if weather == "open":
            self._cut()  # those that hang get an end instead of an answer that is minutes late

    def close(self) -> None:
        self._unlisten()
        self._cut()

    def _listen(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(128)
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def _unlisten(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def _cut(self) -> None:
        with self._lock:
            pairs, self._pairs = self._pairs, set()
        for one in pairs:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            with self._lock:
                self._pairs.add(near)
            if self._weather == "drop":
                near.close()
            elif self._weather == "open":
                threading.Thread(target=self._pass_on, args=(near,), daemon=True).start()

    def _pass_on(self, near: socket.socket) -> None:
        try:
            far = socket.create_connection(("127.0.0.1", self._target))
        except OSError:
            near.close()
            return
        with self._lock:
            self._pairs |= {near, far}
        try:
            while True:
                ready, _, _ = select.select([near, far], [], [], 60.0)
                if self._weather == "hang":
                    time.sleep(0.05)
                    continue
                for one in ready:
                    data = one.recv(1 << 16)
                    if not data:
                        return
                    if one is near:
                        self._reads(data)
                    (far if one is near else near).sendall(data)
        except (OSError, ValueError):
            return
        finally:
            with self._lock:
                self._pairs -= {near, far}
            near.close()
            far.close()


def main() -> None:
    """Serve until the parent is gone."""
    import logging

    from moto.moto_server.werkzeug_app import create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    # S3's application itself: moto's own server looks for the service of each request in its folder of services, under one lock.
    server = make_server("127.0.0.1", int(sys.argv[1]), create_backend_app("s3"), threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    main()

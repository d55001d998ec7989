"""A real Prometheus for tests, with the shipped configuration and alerts."""

import json
import shutil
import subprocess
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from deploy.prometheus import rules
from tests.ports import free_ports

PROMETHEUS = shutil.which("prometheus")
CONFIG = Path(__file__).resolve().parents[1] / "deploy" / "prometheus" / "prometheus.yml"
TIME_SCALE = 0.01
"""An alert's ten minutes are six seconds."""


class Prometheus:
    """Only the discovery port is the test's, and time runs faster."""

    def __init__(self, folder: Path, discovery_port: int, *, scrape_seconds: float = 1.0) -> None:
        config = CONFIG.read_text().replace("127.0.0.1:9410", f"127.0.0.1:{discovery_port}")
        (folder / "prometheus.yml").write_text(config.replace("5s", f"{round(1000 * scrape_seconds)}ms"))
        (folder / "alerts.yml").write_text(rules(time_scale=TIME_SCALE, scrape_seconds=scrape_seconds))
        self.address = "127.0.0.1:{}".format(*free_ports(1))
        command = [str(PROMETHEUS), f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'tsdb'}"]
        with (folder / "prometheus.log").open("w") as log:
            self.process = subprocess.Popen([*command, f"--web.listen-address={self.address}"], stdout=log, stderr=subprocess.STDOUT)

    def query(self, expression: str) -> list[dict[str, Any]]:
        url = f"http://{self.address}/api/v1/query?" + urllib.parse.urlencode({"query": expression})
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        except OSError:  # not up yet
            return []
        return result

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)

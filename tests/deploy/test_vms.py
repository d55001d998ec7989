"""deploy/vms: what `ray up` is given is valid by Ray's own schema and its own filling in of defaults."""

import copy
import json
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.deploy.rules import PROJECT, RAY_VERSION, VERSION

FOLDER = PROJECT / "deploy" / "vms"
SCHEMA = json.loads(files("ray.autoscaler").joinpath("ray-schema.json").read_text())


def load(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text())


@pytest.mark.parametrize("name", ["aws.yaml", "onprem.yaml"])
def test_ray_up_takes_it(name: str) -> None:
    config = load(name)
    jsonschema.validate(config, SCHEMA)
    validate_config(prepare_config(config))


# Of one's own machines all are started; with --workers 1:3 two of them may be missing.
@pytest.mark.parametrize(("name", "bounds", "workers"), [("aws.yaml", (1, 4), "1:4"), ("onprem.yaml", (3, 3), "1:3")])
def test_the_bounds_are_those_that_the_docs_give_to_workers(name: str, bounds: tuple[int, int], workers: str) -> None:
    config = prepare_config(load(name))
    nodes = [node for node_name, node in config["available_node_types"].items() if node_name != "head"]
    assert [(node["min_workers"], node["max_workers"]) for node in nodes] == [bounds]
    assert config["max_workers"] == bounds[1] == int(workers.partition(":")[2])
    page = (PROJECT / "docs" / "vms.md").read_text()
    assert f"ray up deploy/vms/{name}" in page
    assert f"--workers {workers} " in page


@pytest.mark.parametrize("name", ["aws.yaml", "onprem.yaml"])
def test_every_ray_asks_for_the_token_and_the_job_api_stays_on_loopback(name: str) -> None:
    config = load(name)
    assert "~/.ray/auth_token" in config["file_mounts"].values()
    starts = [command for kind in ("head", "worker") for command in config[f"{kind}_start_ray_commands"] if "ray start" in command]
    assert len(starts) == 2
    assert all(command.startswith("export RAY_AUTH_MODE=token") for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]


def test_spot_workers_hear_of_their_end_and_run_the_image_of_the_dockerfile() -> None:
    config = load("aws.yaml")
    worker = config["available_node_types"]["worker"]["node_config"]
    assert worker["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert worker["MetadataOptions"] == {"HttpTokens": "required", "HttpPutResponseHopLimit": 2}
    assert "python -m deploy.preempt watch-spot --notice /tmp/preempted" in config["worker_start_ray_commands"][-1]
    assert config["docker"]["image"].partition(":")[2] == f"{VERSION}-ray{RAY_VERSION}-gpu"


BROKEN: dict[str, Callable[[Any], Any]] = {
    "unknown field": lambda config: config.update(max_worker=4),
    "a node type with an unknown field": lambda config: config["available_node_types"]["worker"].update(minworkers=1),
    "no such head": lambda config: config.update(head_node_type="boss"),
    "more at least than at most": lambda config: config["available_node_types"]["worker"].update(min_workers=5),
    "no provider": lambda config: config.pop("provider"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_planted_error_is_caught(what: str) -> None:
    config = copy.deepcopy(load("aws.yaml"))
    BROKEN[what](config)
    with pytest.raises((jsonschema.ValidationError, ValueError, KeyError)):
        validate_config(prepare_config(config))

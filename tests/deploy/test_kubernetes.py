"""deploy/kubernetes: what kustomize makes of it is valid by the CRDs, by Kubernetes, by KubeRay's own rules; planted errors are caught."""

import copy
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.kubernetes.__main__ import ALERTS, RULE, rendered
from deploy.kubernetes.__main__ import main as kubernetes_main
from tests.deploy.kustomize import render
from tests.deploy.rules import IMAGE_TAG, PROJECT, RAY_VERSION, SCHEMAS, VERSION, Object, cluster_spec, problems, schema_problems

ROOT = PROJECT / "deploy" / "kubernetes"
JOBS = ["overlays/cpu", "overlays/gpu", "overlays/spot", "overlays/kueue"]
CLUSTERS = ["clusters/cpu", "clusters/gpu", "clusters/spot"]
SERVICES = ["serve"]
HAS_CRDS = SCHEMAS.is_dir()
NO_CRDS = "the CRDs of KubeRay are not beside the project (../shared/schemas)"


def ray(objects: list[Object]) -> Object:
    [one] = [one for one in objects if one["apiVersion"] == "ray.io/v1"]
    return one


@pytest.mark.parametrize("name", [*JOBS, *CLUSTERS, *SERVICES])
def test_manifests_follow_kubernetes_and_kuberays_rules(name: str) -> None:
    assert problems(render(ROOT / name)) == []


@pytest.mark.parametrize("name", [*JOBS, *CLUSTERS, *SERVICES])
@pytest.mark.skipif(not HAS_CRDS, reason=NO_CRDS)
def test_manifests_have_nothing_that_the_crds_do_not_name(name: str) -> None:
    assert schema_problems(ray(render(ROOT / name))) == []


def test_monitoring_is_valid() -> None:
    assert (
        problems(
            [
                one
                for file in ("scrapeconfig", "podmonitor")
                for one in yaml.safe_load_all((ROOT / "monitoring" / f"{file}.yaml").read_text())
            ]
        )
        == []
    )


def test_a_job_in_a_queue_asks_for_what_it_will_have_and_for_no_more() -> None:
    """Kueue admits a whole cluster, and leaves one alone that scales."""
    job = ray(render(ROOT / "overlays" / "kueue"))
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "finetune"}
    assert job["spec"]["backoffLimit"] == 0
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    spec = cluster_spec(job)
    assert "enableInTreeAutoscaling" not in spec
    [group] = spec["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]


def test_a_tag_may_name_the_commit_and_the_digest() -> None:
    assert re.fullmatch(IMAGE_TAG, f"{VERSION}-0123456789ab-ray{RAY_VERSION}-gpu@sha256:{'0' * 64}")
    assert not re.fullmatch(IMAGE_TAG, f"{RAY_VERSION}-gpu")


@pytest.mark.parametrize("name", ["cpu", "gpu", "spot"])
def test_a_cluster_is_the_jobs_cluster_and_nothing_else(name: str) -> None:
    job, cluster = render(ROOT / "overlays" / name), render(ROOT / "clusters" / name)
    assert (ray(cluster)["kind"], ray(cluster)["spec"]) == ("RayCluster", ray(job)["spec"]["rayClusterSpec"])
    others = [[one for one in objects if one["apiVersion"] != "ray.io/v1"] for objects in (job, cluster)]
    assert others[0] == others[1]


@pytest.mark.parametrize("name", [*JOBS, *CLUSTERS, *SERVICES])
@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed: nothing to compare the tests' own rendering with")
def test_our_rendering_is_kustomizes(name: str) -> None:
    done = subprocess.run(["kubectl", "kustomize", str(ROOT / name)], capture_output=True, text=True, timeout=60, check=True)

    def key(one: Object) -> tuple[str, str]:
        return one["kind"], one["metadata"]["name"]

    assert sorted(render(ROOT / name), key=key) == sorted(yaml.safe_load_all(done.stdout), key=key)


def test_kustomize_that_our_rendering_does_not_know_is_refused(tmp_path: Path) -> None:
    shutil.copytree(ROOT, tmp_path / "kubernetes")
    file = tmp_path / "kubernetes" / "overlays" / "cpu" / "kustomization.yaml"
    file.write_text(file.read_text() + "namePrefix: my-\n")
    with pytest.raises(ValueError, match="namePrefix"):
        render(file.parent)


def test_prometheus_is_told_where_discovery_is() -> None:
    """KubeRay names the head's service after the RayJob or RayCluster."""
    [config] = yaml.safe_load_all((ROOT / "monitoring" / "scrapeconfig.yaml").read_text())
    for name in (*JOBS, *CLUSTERS):
        one = ray(render(ROOT / name))
        head = cluster_spec(one)["headGroupSpec"]["template"]["spec"]["containers"][0]
        [port] = [port["containerPort"] for port in head["ports"] if port["name"] == "discovery"]
        service = f"{one['metadata']['name']}-head-svc.{one['metadata']['namespace']}.svc"
        assert [sd["url"] for sd in config["spec"]["httpSDConfigs"]] == [f"http://{service}:{port}/sd"]


def test_the_operators_alerts_are_prometheus_alerts(capsys: pytest.CaptureFixture[str]) -> None:
    assert kubernetes_main(["--check"]) == 0, capsys.readouterr().err
    rule = yaml.safe_load(RULE.read_text())
    assert rule["spec"]["groups"] == yaml.safe_load(ALERTS.read_text())["groups"]
    assert rendered() == RULE.read_text()


# Each plants one error in the manifests as they are.

Change = Callable[[list[Object]], Any]


def job(objects: list[Object]) -> Any:
    return ray(objects)["spec"]


def workers(objects: list[Object]) -> Any:
    return job(objects)["rayClusterSpec"]["workerGroupSpecs"][0]


def pod(objects: list[Object]) -> Any:
    return workers(objects)["template"]["spec"]


def policy(objects: list[Object]) -> Any:
    [one] = [one for one in objects if one["kind"] == "NetworkPolicy"]
    return one["spec"]


def budget(objects: list[Object]) -> Any:
    [one] = [one for one in objects if one["metadata"]["name"] == "finetune-workers"]
    return one["spec"]


def claim(objects: list[Object]) -> Any:
    [one] = [one for one in objects if one["kind"] == "PersistentVolumeClaim"]
    return one["spec"]


def say(objects: list[Object], old: str, new: str) -> None:
    assert old in job(objects)["entrypoint"]
    job(objects)["entrypoint"] = job(objects)["entrypoint"].replace(old, new)


PLANTED: dict[str, tuple[Change, str]] = {
    "runtime env as a map": (lambda o: job(o).update(runtimeEnvYAML={"env_vars": {}}), "runtimeEnvYAML"),
    "no minReplicas": (lambda o: workers(o).pop("minReplicas"), "minReplicas"),
    "no maxReplicas": (lambda o: workers(o).pop("maxReplicas"), "maxReplicas"),
    "replicas other than --workers": (lambda o: workers(o).update(maxReplicas=5), "do not agree"),
    "--workers other than replicas": (lambda o: say(o, "--workers 1:4", "--workers 2:4"), "do not agree"),
    "a job that waits for all pods": (lambda o: workers(o).update(replicas=4), "do not agree"),
    "more workers than the batch can be cut for": (
        lambda o: say(o, "--data.batch-size 48", "--data.batch-size 50"),
        "does not take these arguments",
    ),
    "another Ray": (lambda o: job(o)["rayClusterSpec"].update(rayVersion="2.52.0"), "rayVersion"),
    "no token": (lambda o: job(o)["rayClusterSpec"].pop("authOptions"), "token"),
    "resources twice": (
        lambda o: workers(o).update(resources={"CPU": "4"}) or workers(o)["rayStartParams"].update({"num-cpus": "4"}),
        "both",
    ),
    "a number in rayStartParams": (lambda o: workers(o)["rayStartParams"].update({"num-gpus": 1}), "are strings"),
    "latest": (lambda o: pod(o)["containers"][0].update(image="registry.example.com/ray-finetune:latest"), "no tag"),
    "no tag": (lambda o: pod(o)["containers"][0].update(image="registry.example.com/ray-finetune"), "no tag"),
    "Ray's version for a tag": (lambda o: pod(o)["containers"][0].update(image="registry.example.com/ray-finetune:2.60.0-cpu"), "no tag"),
    "no deadline": (lambda o: job(o).pop("activeDeadlineSeconds"), "activeDeadlineSeconds"),
    "a disk without a limit": (lambda o: pod(o)["containers"][0]["resources"]["limits"].pop("ephemeral-storage"), "ephemeral-storage"),
    "a temporary folder without a limit": (lambda o: pod(o)["volumes"][0].update(emptyDir={}), "sizeLimit"),
    "a temporary folder above the limit": (lambda o: pod(o)["volumes"][0].update(emptyDir={"sizeLimit": "100Gi"}), "sizeLimit"),
    "no priority": (lambda o: pod(o).pop("priorityClassName"), "priority class"),
    "no namespace for Prometheus": (
        lambda o: job(o)["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["env"].pop(2),
        "POD_NAMESPACE",
    ),
    "the way out open": (lambda o: policy(o).update(policyTypes=["Ingress"]), "one direction"),
    "everything outside": (lambda o: policy(o)["egress"].append({}), "everything outside"),
    "no DNS": (lambda o: policy(o)["egress"].pop(1), "no DNS"),
    "no way between pods": (lambda o: policy(o)["egress"].pop(0), "do not reach each other"),
    "the node's keys": (lambda o: policy(o)["egress"][2]["to"][0]["ipBlock"].pop("except"), "metadata service"),
    "root": (lambda o: pod(o)["securityContext"].update(runAsUser=0), "root"),
    "may become root": (lambda o: pod(o)["containers"][0]["securityContext"].update(allowPrivilegeEscalation=True), "securityContext"),
    "no seccomp": (lambda o: pod(o)["securityContext"].pop("seccompProfile"), "seccomp"),
    "no home": (lambda o: pod(o)["containers"][0]["env"].pop(0), "HOME"),
    "unknown field of a pod": (lambda o: pod(o).update(nodeselector={"a": "b"}), "nodeselector"),
    "no memory limit": (lambda o: pod(o)["containers"][0]["resources"].pop("limits"), "limited"),
    "other CPUs": (lambda o: say(o, "--cluster.cpus-per-worker 4", "--cluster.cpus-per-worker 2"), "one worker"),
    "a setting that is none": (lambda o: say(o, "--cluster.discovery-port", "--discovery-port"), "does not take these arguments"),
    "stop wait too long for the hook": (lambda o: job(o).update(runtimeEnvYAML="env_vars: {RAY_JOB_STOP_WAIT_TIME_S: '100'}"), "stop wait"),
    "stop wait that leaves no time for the end": (
        lambda o: job(o).update(runtimeEnvYAML="env_vars: {RAY_JOB_STOP_WAIT_TIME_S: '60'}"),
        "kills the run",
    ),
    "Ray's own stop wait": (lambda o: job(o).update(runtimeEnvYAML="env_vars: {}"), "kills the run"),
    "grace shorter than the hook": (lambda o: pod(o).update(terminationGracePeriodSeconds=60), "terminationGracePeriodSeconds"),
    "no hook": (lambda o: pod(o)["containers"][0].pop("lifecycle"), "preStop"),
    "the hook's file is another": (
        lambda o: say(o, "--cluster.preemption-notice /tmp/preempted", "--cluster.preemption-notice /tmp/x"),
        "file",
    ),
    "cluster that stays": (lambda o: job(o).update(shutdownAfterJobFinishes=False), "shutdownAfterJobFinishes"),
    "no TTL": (lambda o: job(o).pop("ttlSecondsAfterFinished"), "ttl"),
    "storage of the pod": (lambda o: say(o, "--storage /mnt/runs", "--storage /tmp/runs"), "goes with the pod"),
    "a run without a name": (lambda o: say(o, "--run quickstart", ""), "--run"),
    "metrics on loopback": (lambda o: say(o, "--cluster.metrics-host 0.0.0.0", ""), "Prometheus"),
    "a worker on the head": (lambda o: job(o)["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].pop("num-cpus"), "placed there"),
    "Ray's port at random": (lambda o: workers(o)["rayStartParams"].pop("node-manager-port"), "node-manager-port"),
    "Ray's ports open": (lambda o: policy(o)["ingress"][2]["ports"].append({"port": 6379}), "6379"),
    "open to everyone": (lambda o: policy(o)["ingress"][1].pop("from"), "everyone"),
    "budget of another N": (lambda o: budget(o).update(minAvailable=2), "minAvailable"),
    "unknown field of a budget": (lambda o: budget(o).update(minAvailible=1), "minAvailible"),
    "a volume for one node": (lambda o: claim(o).update(accessModes=["ReadWriteOnce"]), "ReadWriteMany"),
    "no such claim": (lambda o: pod(o)["volumes"][1]["persistentVolumeClaim"].update(claimName="other"), "no such claim"),
    "a token in plain text": (lambda o: pod(o)["containers"][0]["env"].append({"name": "RAY_AUTH_TOKEN", "value": "abc"}), "plain text"),
}
# Only the CRDs know these.
PLANTED_FOR_CRDS: dict[str, tuple[Change, str]] = {
    "unknown field of the job": (lambda o: job(o).update(runtimeEnv="env_vars: {}"), "runtimeEnv"),
    "unknown field of a group": (lambda o: workers(o).update(replica=4), "replica"),
    "a group without a name": (lambda o: workers(o).pop("groupName"), "groupName"),
    "a mode that is none": (lambda o: job(o)["rayClusterSpec"]["authOptions"].update(mode="basic"), "basic"),
}


@pytest.fixture(scope="module")
def manifests() -> list[Object]:
    return render(ROOT / "overlays" / "cpu")


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_error_is_caught(what: str, manifests: list[Object]) -> None:
    """Without the CRDs; with them most are caught earlier."""
    change, said = PLANTED[what]
    objects = copy.deepcopy(manifests)
    change(objects)
    assert said in "\n".join(problems(objects, with_crds=False))
    assert not HAS_CRDS or problems(objects)


@pytest.mark.parametrize("what", PLANTED_FOR_CRDS)
@pytest.mark.skipif(not HAS_CRDS, reason=NO_CRDS)
def test_a_planted_error_is_caught_by_the_crds(what: str, manifests: list[Object]) -> None:
    change, said = PLANTED_FOR_CRDS[what]
    objects = copy.deepcopy(manifests)
    change(objects)
    assert said in "\n".join(problems(objects))


def served(objects: list[Object]) -> Any:
    return ray(objects)["spec"]["rayClusterConfig"]


def serve(objects: list[Object], old: str, new: str) -> None:
    spec = ray(objects)["spec"]
    assert old in spec["serveConfigV2"]
    spec["serveConfigV2"] = spec["serveConfigV2"].replace(old, new)


def serving_pod(objects: list[Object]) -> Any:
    return served(objects)["workerGroupSpecs"][0]["template"]["spec"]


def priority(objects: list[Object]) -> Any:
    [one] = [one for one in objects if one["kind"] == "PriorityClass"]
    return one


PLANTED_IN_SERVICE: dict[str, tuple[Change, str]] = {
    "a map in place of a string": (lambda o: ray(o)["spec"].update(serveConfigV2={"applications": []}), "serveConfigV2 is a string"),
    "a field that Ray Serve does not know": (lambda o: serve(o, "route_prefix: /", "route_prefixes: /"), "unknown field route_prefixes"),
    "a setting that is none": (lambda o: serve(o, "max_batch: 16", "max_batches: 16"), "max_batches is no setting"),
    "a setting that breaks its rule": (lambda o: serve(o, "max_batch: 16", "max_batch: 0"), "max_batch=0"),
    "another application": (lambda o: serve(o, "deploy.serve.app:build", "deploy.serve:app"), "is none of ours"),
    "everybody": (lambda o: serve(o, "token_file: /etc/finetune/tokens", "allow_unauthenticated: true"), "everybody may ask"),
    "a token that is not mounted": (lambda o: serving_pod(o)["containers"][0]["volumeMounts"].pop(), "lies in no secret"),
    "a token of another place": (lambda o: serve(o, "/etc/finetune/tokens", "/etc/tokens"), "lies in no secret"),
    "an export of the pod": (lambda o: serve(o, "s3://bucket/runs/quickstart/exports/onnx", "/tmp/onnx"), "goes with the pod"),
    "loopback": (lambda o: serve(o, "host: 0.0.0.0", "host: 127.0.0.1"), "nobody outside"),
    "another port": (lambda o: serve(o, "port: 8000", "port: 8001"), "none of the container's"),
    "more replicas than workers": (lambda o: serve(o, "replicas: 2", "replicas: 3"), "do not agree"),
    "other CPUs": (lambda o: serve(o, "threads: 4", "threads: 2"), "threads is its CPUs"),
    "another way of Ray Serve's": (lambda o: serving_pod(o)["containers"][0]["env"].pop(), "is to be told"),
    "another Ray": (lambda o: served(o).update(rayVersion="2.52.0"), "rayVersion"),
    "no token for Ray": (lambda o: served(o).pop("authOptions"), "token"),
    "root": (lambda o: serving_pod(o)["securityContext"].update(runAsUser=0), "root"),
    "latest": (lambda o: serving_pod(o)["containers"][0].update(image="registry.example.com/ray-finetune:latest"), "no tag"),
    "no memory limit": (lambda o: serving_pod(o)["containers"][0]["resources"].pop("limits"), "limited"),
    "open to everyone": (lambda o: policy(o)["ingress"][2].pop("from"), "everyone"),
    "open to every namespace": (lambda o: policy(o)["ingress"][2].update({"from": [{"namespaceSelector": {}}]}), "without the label"),
    "Ray's ports open": (lambda o: policy(o)["ingress"][2]["ports"].append({"port": 10001}), "10001"),
    "the node's keys": (lambda o: policy(o)["egress"][2]["to"][0]["ipBlock"].pop("except"), "metadata service"),
    "less urgent than runs": (lambda o: priority(o).update(value=1000), "as urgent"),
    "a token in plain text": (
        lambda o: serving_pod(o)["containers"][0]["env"].append({"name": "FINETUNE_SERVE_TOKEN", "value": "abc"}),
        "plain text",
    ),
}


@pytest.mark.parametrize("what", PLANTED_IN_SERVICE)
def test_a_planted_error_in_the_service_is_caught(what: str) -> None:
    pytest.importorskip("ray.serve", reason="the extra serve is not installed", exc_type=ImportError)
    change, said = PLANTED_IN_SERVICE[what]
    objects = render(ROOT / "serve")
    change(objects)
    assert said in "\n".join(problems(objects, with_crds=False))


@pytest.mark.skipif(not HAS_CRDS, reason=NO_CRDS)
def test_an_unknown_field_of_the_service_is_caught() -> None:
    for change in (lambda o: ray(o)["spec"].update(serveConfig=""), lambda o: served(o).update(workers=2)):
        objects = render(ROOT / "serve")
        change(objects)
        assert problems(objects)

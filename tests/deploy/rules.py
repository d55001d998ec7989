"""What is wrong with rendered manifests, as sentences: the CRDs' schemas, the core kinds' schemas, KubeRay's own checks and ours."""

import dataclasses
import functools
import math
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from deploy.serve.settings import THROUGHPUT, settings_of
from trainer.settings.cli import parse
from trainer.settings.rules import validate
from trainer.settings.tree import RunConfig

Object = dict[str, Any]
PROJECT = Path(__file__).resolve().parents[2]
SCHEMAS = PROJECT.parent / "shared" / "schemas"
KUBERNETES = "1.33"
RAY_VERSION = next(line.partition("==")[2] for line in (PROJECT / "constraints.txt").read_text().splitlines() if line.startswith("ray=="))
VERSION = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"]
IMAGE_TAG = rf"{re.escape(VERSION)}(-[0-9a-f]{{7,40}})?-ray{re.escape(RAY_VERSION)}-(cpu|gpu)(@sha256:[0-9a-f]{{64}})?"
"""The code's version and, in a build of one's own, its commit; a rebuild of other code has another tag."""
SERVICE = {"serveConfigV2", "rayClusterConfig", "serveService", "upgradeStrategy", "excludeHeadPodFromServeSvc"}
RUNS_PRIORITY = 1000
ENDING_SECONDS = 20.0
"""In which the agents of a stopped run end, and its summary and report are written."""
PART_OF = {"app.kubernetes.io/part-of": "finetune"}
NOBODY_ELSE = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
# What the operators' custom resources may hold here; their CRDs are not at hand.
MONITORING = {
    "ScrapeConfig": ("monitoring.coreos.com/v1alpha1", {"jobName", "honorLabels", "scrapeInterval", "httpSDConfigs"}),
    "PodMonitor": ("monitoring.coreos.com/v1", {"selector", "podMetricsEndpoints"}),
    "PrometheusRule": ("monitoring.coreos.com/v1", {"groups"}),
}


def problems(objects: list[Object], *, with_crds: bool = SCHEMAS.is_dir()) -> list[str]:
    found: list[str] = []
    for one in objects:
        match one["apiVersion"].partition("/")[0]:
            case "ray.io":
                found += schema_problems(one) if with_crds else []
                found += [] if found else [f"{one['kind']} {problem}" for problem in ray_problems(one)]
            case "monitoring.coreos.com":
                version, fields = MONITORING[one["kind"]]
                found += [] if version == one["apiVersion"] else [f"{one['kind']}: apiVersion {one['apiVersion']}, not {version}"]
                found += [f"{one['kind']}: unknown field {field}" for field in set(one["spec"]) - fields]
            case _:
                found += core_problems(one)
    return found or together_problems(objects)


@functools.cache
def crd(kind: str) -> Any:
    """The CRD's schema of v1, closed: what it does not name is refused."""
    text = (SCHEMAS / f"ray.io_{kind.lower()}s.yaml").read_text()
    versions = yaml.load(text, Loader=yaml.CSafeLoader)["spec"]["versions"]
    [schema] = [version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1"]
    schema["properties"]["metadata"] = {"type": "object"}
    _close(schema)
    return jsonschema.Draft202012Validator(schema)


def _close(schema: Object) -> None:
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    for one in [*schema.get("properties", {}).values(), schema.get("items"), schema.get("additionalProperties")]:
        if isinstance(one, dict):
            _close(one)


def schema_problems(one: Object) -> list[str]:
    if one["kind"] == "RayService":  # its own CRD is not at hand; its cluster's is
        unknown = [f"RayService: unknown field {field}" for field in set(one["spec"]) - SERVICE]
        return unknown or schema_problems({**one, "kind": "RayCluster", "spec": one["spec"].get("rayClusterConfig", {})})
    return [f"{one['kind']} {error.json_path}: {error.message[:200]}" for error in crd(one["kind"]).iter_errors(one)]


def core_problems(one: Object) -> list[str]:
    try:
        kubernetes_validate.validate(one, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{one['kind']} {one['metadata'].get('name', '')}: {error.message[:200]}"]
    return []


def cluster_spec(one: Object) -> Object:
    fields = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
    spec: Object = one["spec"][fields[one["kind"]]] if one["kind"] in fields else one["spec"]
    return spec


def templates(one: Object) -> Iterator[tuple[str, Object]]:
    spec = cluster_spec(one)
    if one["kind"] == "RayJob":
        yield "submitter", one["spec"]["submitterPodTemplate"]
    yield "head", spec["headGroupSpec"]["template"]
    for group in spec["workerGroupSpecs"]:
        yield group["groupName"], group["template"]


def invocation(job: Object) -> RunConfig:
    """What the entrypoint asks for, by the real parser; ValueError where it is no command line of ours."""
    words = shlex.split(job["spec"]["entrypoint"])
    if words[:3] != ["python", "-m", "trainer.run"]:
        raise ValueError(f"entrypoint begins with {' '.join(words[:3])}")
    try:
        return parse(words[3:]).config
    except SystemExit:
        raise ValueError("trainer.run does not take these arguments") from None


def ray_problems(one: Object) -> list[str]:
    """Of the cluster; of the job only where its cluster has none."""
    more = {"RayJob": job_problems, "RayService": service_problems}
    found = list(cluster_problems(one))
    return found or (list(more[one["kind"]](one)) if one["kind"] in more else [])


def cluster_problems(one: Object) -> Iterator[str]:
    spec = cluster_spec(one)
    if spec.get("rayVersion") != RAY_VERSION:
        yield f"rayVersion is {spec.get('rayVersion')}, the image's is {RAY_VERSION}"
    auth = spec.get("authOptions", {})
    if auth.get("mode") != "token" or not auth.get("secretName"):
        yield "authOptions: Ray's ports are not guarded by a token from a secret"
    groups = [("head", spec["headGroupSpec"]), *((group["groupName"], group) for group in spec["workerGroupSpecs"])]
    for name, group in groups:
        parameters = group.get("rayStartParams", {})
        if group.get("resources") and parameters.keys() & {"num-cpus", "num-gpus", "memory", "resources"}:
            yield f"{name}: resources in both rayStartParams and resources"
        if not all(isinstance(value, str) for value in parameters.values()):
            yield f"{name}: rayStartParams are strings"
    for group in spec["workerGroupSpecs"]:
        if not {"minReplicas", "maxReplicas"} <= group.keys():
            yield f"{group['groupName']}: minReplicas and maxReplicas are both needed"
        elif not 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            yield f"{group['groupName']}: minReplicas <= replicas <= maxReplicas does not hold"
    if spec.get("enableInTreeAutoscaling") and spec.get("autoscalerOptions", {}).get("securityContext") != NOBODY_ELSE:
        yield "autoscaler: securityContext"
    for name, template in templates(one):
        yield from pod_problems(name, template)


def gibibytes(quantity: str | None) -> float:
    """`50Gi` -> 50; without a limit it is infinite."""
    return float(quantity.removesuffix("Gi")) if quantity else math.inf


def pod_problems(name: str, template: Object) -> Iterator[str]:
    pod = template["spec"]
    yield from (
        f"{name}: {problem}" for problem in core_problems({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": pod})
    )
    if not template.get("metadata", {}).get("labels", {}).items() >= PART_OF.items():
        yield f"{name}: without the label that network policy and disruption budget select by"
    security = pod.get("securityContext", {})
    if not security.get("runAsNonRoot") or not security.get("runAsUser") or security.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield f"{name}: runs as root, or without a seccomp profile"
    if name != "head" and pod.get("automountServiceAccountToken") is not False:  # the head's autoscaler speaks to Kubernetes
        yield f"{name}: a service account's token where nobody needs one"
    if not pod.get("priorityClassName"):
        yield f"{name}: without a priority class it is as urgent as what serves users"
    for container in pod["containers"]:
        if container.get("securityContext") != NOBODY_ELSE:
            yield f"{name}: securityContext of {container['name']}"
        tag = container["image"].partition(":")[2]
        if not re.fullmatch(IMAGE_TAG, tag):
            yield f"{name}: image {container['image']} has no tag that says the code's version, Ray's and the variant"
        limits, requests = container["resources"].get("limits", {}), container["resources"].get("requests", {})
        if not {"cpu", "memory"} <= limits.keys() & requests.keys() or limits["memory"] != requests["memory"]:
            yield f"{name}: CPU and memory are to be requested and limited, memory alike"
        if "ephemeral-storage" not in limits.keys() & requests.keys():
            yield f"{name}: without a limit of ephemeral-storage one pod fills the node's disk, and Kubernetes evicts another"
        elif sum(gibibytes(volume["emptyDir"].get("sizeLimit")) for volume in pod["volumes"] if "emptyDir" in volume) >= gibibytes(
            limits["ephemeral-storage"]
        ):
            yield f"{name}: every emptyDir has a sizeLimit, all together below the limit of ephemeral-storage"
        writable = {mount["mountPath"] for mount in container["volumeMounts"]}
        home = [entry["value"] for entry in container["env"] if entry["name"] == "HOME"]
        if "/tmp" not in writable or home != ["/tmp"]:
            yield f"{name}: the root is read-only, /tmp and HOME=/tmp are needed"
        if any("TOKEN" in entry["name"] or "SECRET" in entry["name"] for entry in container["env"] if "value" in entry):
            yield f"{name}: a secret in plain text"


def job_problems(job: Object) -> Iterator[str]:
    spec, cluster = job["spec"], cluster_spec(job)
    environment = yaml.safe_load(spec["runtimeEnvYAML"]) if isinstance(spec.get("runtimeEnvYAML"), str) else None
    if not isinstance(environment, dict):
        yield "runtimeEnvYAML is a string of YAML that holds a map"
        return
    if not spec.get("activeDeadlineSeconds", 0) > 0:
        yield "activeDeadlineSeconds: a job that hangs holds its nodes for ever"
    if not spec.get("shutdownAfterJobFinishes") or spec.get("ttlSecondsAfterFinished", 0) <= 0:
        yield "shutdownAfterJobFinishes and a ttlSecondsAfterFinished: else the cluster stays, or goes with its logs"
    try:
        config = invocation(job)
    except ValueError as error:
        yield str(error)
        return
    fewest, _, most = config.workers.partition(":")
    [group] = cluster["workerGroupSpecs"]
    if (str(group["minReplicas"]), str(group["maxReplicas"])) != (fewest, most) or group["replicas"] != group["minReplicas"]:
        yield f"replicas {group['minReplicas']}:{group['replicas']}:{group['maxReplicas']} and --workers {config.workers} do not agree"
    try:  # as trainer.run does once it knows how many there may be
        validate(dataclasses.replace(config, train=dataclasses.replace(config.train, virtual_ranks=int(most))), workers=int(most))
    except ValueError as error:
        yield str(error)
    container = group["template"]["spec"]["containers"][0]
    limits = container["resources"]["limits"]
    if int(limits["cpu"]) != config.cluster.cpus_per_worker:
        yield "a pod is to hold one worker: --cluster.cpus-per-worker is its CPUs"
    if int(limits.get("nvidia.com/gpu", 0)) != max(0, config.cluster.gpus_per_worker):
        yield "a pod is to hold one worker: --cluster.gpus-per-worker is its GPUs"
    if cluster["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
        yield "head: a worker could be placed there, and is not counted in the replicas"
    if not config.run:
        yield "a retry is a new cluster: without --run and an outside storage it starts anew"
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    outside = "://" in config.storage or (config.storage in mounts and _claimed(group["template"], mounts[config.storage]))
    if not outside:
        yield f"--storage {config.storage} goes with the pod"
    # Grace: the run's own, that of `ray job stop`, the hook's, the pod's: each at most the next.
    stop_wait = float(environment.get("env_vars", {}).get("RAY_JOB_STOP_WAIT_TIME_S", 3))
    if config.cluster.stop_grace_seconds + ENDING_SECONDS > stop_wait:
        yield f"RAY_JOB_STOP_WAIT_TIME_S={stop_wait:g} kills the run before its cluster.stop_grace_seconds are over"
    for name, template in templates(job):
        if name == "submitter":
            continue
        command = template["spec"]["containers"][0].get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
        if command[:4] != ["python", "-m", "deploy.preempt", "head" if name == "head" else "worker"]:
            yield f"{name}: no preStop hook tells the run that the pod goes"
            continue
        seconds = float(command[command.index("--seconds") + 1])
        if not stop_wait < seconds < template["spec"].get("terminationGracePeriodSeconds", 30):
            yield f"{name}: stop wait {stop_wait:g} < hook {seconds:g} < terminationGracePeriodSeconds does not hold"
        if name != "head" and command[command.index("--notice") + 1] != config.cluster.preemption_notice:
            yield f"{name}: the hook's file is not --cluster.preemption-notice"
    head_ports = {port["name"]: port["containerPort"] for port in cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]}
    head_env = {entry["name"]: entry for entry in cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]}
    if head_env.get("POD_NAMESPACE", {}).get("valueFrom") != {"fieldRef": {"fieldPath": "metadata.namespace"}}:
        yield "POD_NAMESPACE: two teams' runs of one name are one run to Prometheus"
    if config.cluster.metrics_host != "0.0.0.0" or config.cluster.discovery_port != head_ports.get("discovery"):
        yield "metrics: Prometheus reaches neither ranks nor discovery"


def service_problems(service: Object) -> Iterator[str]:
    """Of what is served, and of the room for it."""
    from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

    text, cluster = service["spec"].get("serveConfigV2"), cluster_spec(service)
    config = yaml.safe_load(text) if isinstance(text, str) else None
    if not isinstance(config, dict):
        yield "serveConfigV2 is a string of YAML that holds a map"
        return
    for fields, schema in [(config, ServeDeploySchema), *((each, ServeApplicationSchema) for each in config.get("applications", ()))]:
        if unknown := set(fields) - set(schema.model_fields):  # Ray Serve itself says nothing of them
            yield f"serveConfigV2: unknown field {', '.join(sorted(unknown))}"
    try:
        asked = ServeDeploySchema.model_validate(config)
        [application] = asked.applications
        settings = settings_of(application.args)
    except ValueError as error:
        yield f"serveConfigV2: {error}"
        return
    if application.import_path != "deploy.serve.app:build":
        yield f"serveConfigV2: import_path {application.import_path} is none of ours"
    if asked.http_options.host != "0.0.0.0":
        yield "serveConfigV2: nobody outside of the pod reaches http_options.host"
    if "://" not in settings.export:
        yield f"export {settings.export} goes with the pod"
    if settings.allow_unauthenticated or not settings.token_file:
        yield "serveConfigV2: everybody may ask; name a token_file"
    [group] = cluster["workerGroupSpecs"]
    if not group["minReplicas"] == group["replicas"] == group["maxReplicas"] == settings.replicas:
        yield f"replicas: {settings.replicas} of the model and {group['minReplicas']}:{group['maxReplicas']} workers do not agree"
    for name, template in templates(service):
        pod = template["spec"]
        container = pod["containers"][0]
        if asked.http_options.port not in [port["containerPort"] for port in container["ports"] if port["name"] == "serve"]:
            yield f"{name}: the port {asked.http_options.port} of http_options is none of the container's"
        if not THROUGHPUT.items() <= {each["name"]: each.get("value") for each in container["env"]}.items():
            yield f"{name}: Ray Serve is to be told {', '.join(THROUGHPUT)}, as deploy.serve does"
        secrets = {volume["name"] for volume in pod["volumes"] if "secret" in volume}
        mounted = [mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] in secrets]
        if not any(settings.token_file.startswith(f"{path}/") for path in mounted):
            yield f"{name}: token_file {settings.token_file} lies in no secret that is mounted"
        if name != "head" and int(container["resources"]["limits"]["cpu"]) != settings.threads:
            yield f"{name}: a pod is to hold one replica of the model: threads is its CPUs"


def _claimed(template: Object, volume: str) -> bool:
    return any(one["name"] == volume and _is_claim(one) for one in template["spec"].get("volumes", ()))


def _is_claim(volume: Object) -> bool:
    return "persistentVolumeClaim" in volume


def together_problems(objects: list[Object]) -> list[str]:
    """What holds between objects."""
    found: list[str] = []
    by_kind: dict[str, list[Object]] = {}
    for one in objects:
        by_kind.setdefault(one["kind"], []).append(one)
    claims = {one["metadata"]["name"]: one for one in by_kind.get("PersistentVolumeClaim", ())}
    modes = [claim["spec"]["accessModes"] for claim in claims.values()]
    found += ["PersistentVolumeClaim: several pods write to it, ReadWriteMany" for mode in modes if mode != ["ReadWriteMany"]]
    for service in by_kind.get("RayService", ()):
        [policy], [priority] = by_kind["NetworkPolicy"], by_kind["PriorityClass"]
        found += policy_problems(policy["spec"], service)
        if priority["value"] <= RUNS_PRIORITY:
            found.append("PriorityClass: runs are as urgent as what serves users")
        if any("finetune-serve-client" not in str(rule.get("from")) for rule in policy["spec"]["ingress"] if _is_for_clients(rule)):
            found.append("NetworkPolicy: clients without the label reach the server")
    for ray in [*by_kind.get("RayJob", ()), *by_kind.get("RayCluster", ())]:
        group = cluster_spec(ray)["workerGroupSpecs"][0]
        for _, template in templates(ray):
            used = {volume["name"]: volume["persistentVolumeClaim"] for volume in template["spec"]["volumes"] if _is_claim(volume)}
            found += [f"volume {name}: there is no such claim" for name, claim in used.items() if claim["claimName"] not in claims]
        budgets = {one["metadata"]["name"]: one["spec"] for one in by_kind.get("PodDisruptionBudget", ())}
        if budgets["finetune-workers"]["minAvailable"] != group["minReplicas"]:
            found.append("PodDisruptionBudget: minAvailable is N of --workers N:M")
        if any(not selector["matchLabels"].items() >= PART_OF.items() for selector in (one["selector"] for one in budgets.values())):
            found.append("PodDisruptionBudget: selects no pod of ours")
        [policy] = by_kind["NetworkPolicy"]
        found += policy_problems(policy["spec"], ray)
    return found


def _is_for_clients(rule: Object) -> bool:
    """Whether a rule opens the server's port to others than the operator, Prometheus and the pods themselves."""
    peers = str(rule.get("from"))
    ours = ("kuberay-operator", "'monitoring'", str(PART_OF))
    return any(port["port"] == 8000 for port in rule.get("ports", ())) and not any(one in peers for one in ours)


def egress_problems(rules: list[Object]) -> Iterator[str]:
    to_ours = {"to": [{"podSelector": {"matchLabels": PART_OF}}]}
    if to_ours not in rules:
        yield "NetworkPolicy: head and workers do not reach each other"
    reached = {(port["protocol"], port["port"]) for rule in rules for port in rule.get("ports", ())}
    if not {("UDP", 53), ("TCP", 53), ("TCP", 443)} <= reached:
        yield "NetworkPolicy: no DNS, or no TLS to the object store and to Kubernetes"
    for rule in rules:
        if rule != to_ours and not (rule.get("to") and rule.get("ports")):
            yield "NetworkPolicy: everything outside is reached"
        blocks = [peer["ipBlock"] for peer in rule.get("to", ()) if "ipBlock" in peer]
        if any(block["cidr"] == "0.0.0.0/0" and "169.254.0.0/16" not in block.get("except", ()) for block in blocks):
            yield "NetworkPolicy: a pod reaches the metadata service, and with it the node's keys"


def policy_problems(policy: Object, ray: Object) -> Iterator[str]:
    if policy["podSelector"] != {"matchLabels": PART_OF} or policy["policyTypes"] != ["Ingress", "Egress"]:
        yield "NetworkPolicy: does not select our pods, or one direction is open"
    yield from egress_problems(policy["egress"])
    opened: list[tuple[int, int]] = []
    for rule in policy["ingress"]:
        if not rule.get("from"):
            yield "NetworkPolicy: a rule for everyone"
        if rule.get("from") == [{"podSelector": {"matchLabels": PART_OF}}]:
            continue
        if not rule.get("ports"):
            yield "NetworkPolicy: all ports for others than the run's own pods"
        opened += [(port["port"], port.get("endPort", port["port"])) for port in rule.get("ports", ())]
    spec = cluster_spec(ray)
    fixed = {6379, 10001, 52365}
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        fixed |= {int(value) for name, value in group["rayStartParams"].items() if name.endswith("-port")}
        missing = {"object-manager-port", "node-manager-port", "dashboard-agent-grpc-port", "runtime-env-agent-port"} - group[
            "rayStartParams"
        ].keys()
        if missing:
            yield f"NetworkPolicy: {', '.join(sorted(missing))} would be a random port, among those that are open"
        sysctls = {one["name"]: one["value"] for one in group["template"]["spec"]["securityContext"].get("sysctls", ())}
        low, high = map(int, sysctls.get("net.ipv4.ip_local_port_range", "32768 60999").split())
        if ray["kind"] != "RayService" and (low, high) not in opened:
            yield "NetworkPolicy: the ranks' metrics are on ports that the system chooses, which are not what is open"
    if found := [port for port in sorted(fixed) if any(low <= port <= high for low, high in opened)]:
        yield f"NetworkPolicy: Ray's ports {found} are open"

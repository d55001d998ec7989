"""What `kubectl kustomize` makes of a folder, for the part of kustomize that deploy/kubernetes uses; anything else is refused.

So that the manifests are tested where no kubectl is; where one is, a test compares the two. Known: resources, components, namespace,
images (newName, newTag), patches (JSON 6902 by target, `$patch: delete`) and replacements of one whole field."""

import copy
import json
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]
CLUSTER_WIDE = {"Namespace", "PriorityClass"}
KNOWN = {
    "kustomization": {"apiVersion", "kind", "resources", "components", "namespace", "images", "patches", "replacements"},
    "image": {"name", "newName", "newTag"},
    "patch": {"path", "patch", "target"},
    "target": {"kind", "name"},
    "replacement": {"source", "targets"},
    "source": {"kind", "name", "fieldPath"},
    "replacement target": {"select", "fieldPaths"},
    "operation": {"op", "path", "value"},
}


def render(folder: Path) -> list[Object]:
    """The objects of a kustomization, in no particular order."""
    return _kustomize(folder, [], "Kustomization")


def _kustomize(folder: Path, objects: list[Object], kind: str) -> list[Object]:
    settings = _known("kustomization", yaml.safe_load((folder / "kustomization.yaml").read_text()))
    if settings["kind"] != kind:
        raise ValueError(f"{folder} is a {settings['kind']}, used as a {kind}")
    for name in settings.get("resources", ()):
        path = (folder / name).resolve(strict=True)
        new = render(path) if path.is_dir() else [unaliased(one) for one in yaml.safe_load_all(path.read_text()) if one]
        if path.is_file() and folder.resolve() not in path.parents:
            raise ValueError(f"{path} is outside of {folder}: kustomize refuses that")
        for one in new:
            if any(_key(one) == _key(other) for other in objects):
                raise ValueError(f"{_key(one)} is there twice in {folder}")
            objects.append(one)
    for name in settings.get("components", ()):
        objects = _kustomize((folder / name).resolve(strict=True), objects, "Component")
    for patch in settings.get("patches", ()):
        objects = _patch(folder, objects, _known("patch", patch))
    if namespace := settings.get("namespace"):
        for one in objects:
            if one["kind"] not in CLUSTER_WIDE:
                one["metadata"]["namespace"] = namespace
    for image in settings.get("images", ()):
        _set_image(objects, _known("image", image))
    for replacement in settings.get("replacements", ()):
        _replace(objects, _known("replacement", replacement))
    return objects


def unaliased(value: Any) -> Any:
    """`value` with a copy of its own in each place that YAML's aliases made share one."""
    return json.loads(json.dumps(value))


def _patch(folder: Path, objects: list[Object], patch: Object) -> list[Object]:
    if "path" in patch:
        path = (folder / patch["path"]).resolve(strict=True)
        if folder.resolve() not in path.parents:
            raise ValueError(f"{path} is outside of {folder}: kustomize refuses that")
        content = yaml.safe_load(path.read_text())
    else:
        content = yaml.safe_load(patch["patch"])
    if isinstance(content, list):
        wanted = _known("target", patch["target"])
        [one] = [one for one in objects if (one["kind"], one["metadata"]["name"]) == (wanted["kind"], wanted["name"])]
        for operation in content:
            _operate(one, _known("operation", operation))
        return objects
    if set(content) != {"$patch", "apiVersion", "kind", "metadata"} or content["$patch"] != "delete":
        raise ValueError(f"a patch in {folder} is neither JSON 6902 nor $patch: delete")
    [one] = [one for one in objects if (one["kind"], one["metadata"]["name"]) == (content["kind"], content["metadata"]["name"])]
    return [other for other in objects if other is not one]


def _operate(one: Object, operation: Object) -> None:
    *way, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].removeprefix("/").split("/")]
    place: Any = one
    for part in way:
        place = place[int(part)] if isinstance(place, list) else place[part]
    key: Any = int(last) if isinstance(place, list) and last != "-" else last
    match operation["op"]:
        case "remove":
            del place[key]
        case "replace":
            place[key]  # it must be there
            place[key] = copy.deepcopy(operation["value"])
        case "add" if isinstance(place, list):
            place.insert(len(place) if key == "-" else key, copy.deepcopy(operation["value"]))
        case "add":
            place[key] = copy.deepcopy(operation["value"])
        case other:
            raise ValueError(f"op: {other} is none that this renderer knows")


def _set_image(node: Any, image: Object) -> None:
    if isinstance(node, list):
        for one in node:
            _set_image(one, image)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key in ("containers", "initContainers"):
                for container in value:
                    name, _, tag = container["image"].partition(":")
                    if name == image["name"]:
                        container["image"] = f"{image.get('newName', name)}:{image.get('newTag', tag)}"
            _set_image(value, image)


def _replace(objects: list[Object], replacement: Object) -> None:
    source = _known("source", replacement["source"])
    [value] = [one for one in objects if (one["kind"], one["metadata"]["name"]) == (source["kind"], source["name"])]
    for part in source["fieldPath"].split("."):
        value = value[part]
    for target in replacement["targets"]:
        select = _known("target", _known("replacement target", target)["select"])
        [one] = [one for one in objects if (one["kind"], one["metadata"]["name"]) == (select["kind"], select["name"])]
        for path in target["fieldPaths"]:
            if path not in one:
                raise ValueError(f"replacement of {path}: only a top-level field that is there is known")
            one[path] = copy.deepcopy(value)


def _known(what: str, settings: Object) -> Object:
    if unknown := set(settings) - KNOWN[what]:
        raise ValueError(f"{what}: {', '.join(sorted(unknown))} is nothing that this renderer knows")
    return settings


def _key(one: Object) -> tuple[str, str, str]:
    return one["apiVersion"], one["kind"], one["metadata"]["name"]

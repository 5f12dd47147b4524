"""Rendered manifests, and ways to walk them."""
import re
import subprocess
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "target" / "check-deploy"
BUILTIN = {"", "apps", "batch", "policy", "networking.k8s.io", "autoscaling"}


def render(directory):
    """`kubectl kustomize`, as text."""
    result = subprocess.run(["kubectl", "kustomize", str(directory)], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"kubectl kustomize {directory}: {result.stderr.strip()}")
    return result.stdout


def load(text):
    return [o for o in yaml.safe_load_all(text) if o]


def group(o):
    return o["apiVersion"].rpartition("/")[0]


def name(o):
    return o["metadata"]["name"]


def where(o):
    return f"{o['kind']} {name(o)}"


def labels(o):
    return o.get("metadata", {}).get("labels") or {}


def of(objects, *kinds):
    return [o for o in objects if o["kind"] in kinds]


def template(o):
    """The pod template of an object, or nothing."""
    spec = o.get("spec") or {}
    if o["kind"] in ("Deployment", "StatefulSet", "Job", "DaemonSet"):
        return spec.get("template")
    if o["kind"] == "CronJob":
        return spec["jobTemplate"]["spec"]["template"]
    return None


def templates(objects):
    return [(o, template(o)) for o in objects if template(o)]


def containers(pod):
    """Containers of a pod's spec, those that run first included."""
    return (pod.get("initContainers") or []) + pod["containers"]


def workers(objects):
    """The Deployments of workers, one a pool."""
    return [o for o in of(objects, "Deployment") if labels(o).get("app.kubernetes.io/name") == "warren-worker"]


def config(objects, wanted):
    """The data of a ConfigMap, by name."""
    return next((o.get("data") or {} for o in of(objects, "ConfigMap") if name(o) == wanted), {})


def environment(objects, container):
    """What a container's environment will be, as far as the manifests say it; a value from elsewhere is None."""
    found = {}
    for source in container.get("envFrom") or []:
        if "configMapRef" in source:
            found.update(config(objects, source["configMapRef"]["name"]))
    for variable in container.get("env") or []:
        found[variable["name"]] = variable.get("value")
    return found


def walk(value, path=""):
    """Every table inside a value, with the path to it."""
    if isinstance(value, dict):
        yield path, value
        for key, inner in value.items():
            yield from walk(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from walk(inner, f"{path}[{i}]")


def selects(selector, found):
    """Whether a label selector takes these labels."""
    if any(found.get(k) != v for k, v in (selector.get("matchLabels") or {}).items()):
        return False
    for e in selector.get("matchExpressions") or []:
        value, values = found.get(e["key"]), e.get("values") or []
        holds = {"In": value in values, "NotIn": value not in values, "Exists": value is not None, "DoesNotExist": value is None}
        if not holds[e["operator"]]:
            return False
    return True


def seconds(text):
    """A duration such as 25s, 5m or 1h30m."""
    units = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
    parts = re.findall(r"(\d+)(ms|s|m|h|d)", text)
    if not parts or "".join(n + u for n, u in parts) != text:
        raise ValueError(f"'{text}' is no duration")
    return sum(int(n) * units[u] for n, u in parts)

"""Custom resources against the real definitions, which are made strict: a field that they do not know is a mistake."""
import copy

import jsonschema
import yaml

from .objects import BUILTIN, ROOT, group, where

DIRECTORY = ROOT / "k8s" / "tests" / "crds"


def strict(schema, root=False):
    """A structural schema as JSON schema: unknown fields refused, Kubernetes' own keywords put into JSON schema's terms."""
    if not isinstance(schema, dict):
        return schema
    result = {k: v for k, v in schema.items() if not k.startswith("x-kubernetes-") and k not in ("format", "default", "nullable")}
    if schema.get("x-kubernetes-int-or-string"):
        result.pop("anyOf", None)
        result["type"] = ["integer", "string"]
    if schema.get("nullable") and "type" in result:
        result["type"] = [result["type"], "null"] if isinstance(result["type"], str) else result["type"] + ["null"]
    if "properties" in schema:
        result["properties"] = {k: strict(v) for k, v in schema["properties"].items()}
        if "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            result["additionalProperties"] = False
    if isinstance(schema.get("additionalProperties"), dict):
        result["additionalProperties"] = strict(schema["additionalProperties"])
    if "items" in schema:
        result["items"] = strict(schema["items"])
    if root:
        # The API server's own, not the definition's.
        result["properties"] = {**result["properties"], "apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {"type": "object"}}
    return result


def definitions():
    """Schemas by kind and version."""
    found = {}
    for path in sorted(DIRECTORY.glob("*.yaml")):
        for d in yaml.safe_load_all(path.read_text()):
            for version in d["spec"]["versions"]:
                key = (f"{d['spec']['group']}/{version['name']}", d["spec"]["names"]["kind"])
                found[key] = strict(copy.deepcopy(version["schema"]["openAPIV3Schema"]), root=True)
    return found


_CACHE = {}


def valid(objects):
    """Every custom resource is of a kind that is defined, and as it is defined."""
    _CACHE.update({} if _CACHE else definitions())
    for o in objects:
        if group(o) in BUILTIN:
            continue
        schema = _CACHE.get((o["apiVersion"], o["kind"]))
        if not schema:
            yield f"{where(o)}: {o['apiVersion']} {o['kind']} is not defined in {DIRECTORY.relative_to(ROOT)}"
            continue
        for error in jsonschema.Draft7Validator(schema).iter_errors(o):
            yield f"{where(o)}: {'.'.join(str(p) for p in error.absolute_path)}: {error.message[:200]}"

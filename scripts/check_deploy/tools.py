"""Other people's checkers, each run on what was rendered."""
import os
import re
import subprocess

from .objects import BUILTIN, ROOT, group

SKIPPED = "CKV_K8S_11,CKV_K8S_35,CKV_K8S_43,CKV_K8S_15"  # CPU limits; secrets as variables (we have none); digests; pull always


def _run(*command, **more):
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT, **more)
    return result.returncode, (result.stdout + result.stderr).strip()


def kubernetes_validate(rendered, objects):
    """The API's own schemas; kinds that it does not know are the CRDs' and checked there."""
    code, said = _run("kubernetes-validate", "--strict", "-k", "1.36", "--quiet", rendered)
    custom = {o["kind"] for o in objects if group(o) not in BUILTIN}
    for line in said.splitlines():
        unknown = re.search(r"Couldn't find schema for kind (\w+)", line)
        if not (unknown and unknown[1] in custom):
            yield line
    if code and not said:
        yield f"kubernetes-validate ended with {code}"


def checkov(rendered, _objects):
    """Known misconfigurations."""
    code, said = _run("checkov", "--framework", "kubernetes", "-f", rendered, "--compact", "--quiet", "--skip-download",
                      "--skip-check", SKIPPED, env={**os.environ, "LOG_LEVEL": "ERROR"})
    if code or "Failed checks: 0" not in said:
        yield " ".join(said.split())[:1500]


def hadolint():
    code, said = _run("hadolint", "Dockerfile")
    yield from said.splitlines() if code else []


def yamllint():
    # Comments and messages may be as long as the rest of the project's lines.
    rules = "{extends: relaxed, ignore: [k8s/tests/crds/], rules: {line-length: {max: 200}}}"
    code, said = _run("yamllint", "--strict", "-d", rules, "-f", "parsable", "k8s", *(["docker-compose.yml"] if (ROOT / "docker-compose.yml").exists() else []))
    yield from said.splitlines() if code else []


def compose_schema():
    code, said = _run("check-jsonschema", "--builtin-schema", "vendor.compose-spec", "docker-compose.yml")
    yield from said.splitlines() if code else []

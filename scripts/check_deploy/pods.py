"""What every pod must be, and what a worker must be: DEPLOY's conventions, line by line."""
import re

from .objects import containers, environment, of, seconds, selects, templates, walk, where, workers

QUANTITY = re.compile(r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?$")
SCALE = {"m": 0.001, "": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18,
         "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50, "Ei": 2**60}
# Values that the schemas do not bound, though the API server does.
ENUMS = {
    "imagePullPolicy": {"Always", "IfNotPresent", "Never"}, "restartPolicy": {"Always", "OnFailure", "Never"},
    "protocol": {"TCP", "UDP", "SCTP"}, "whenUnsatisfiable": {"DoNotSchedule", "ScheduleAnyway"},
    "unhealthyPodEvictionPolicy": {"IfHealthyBudget", "AlwaysAllow"}, "concurrencyPolicy": {"Allow", "Forbid", "Replace"},
    "dnsPolicy": {"ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"}, "scheme": {"HTTP", "HTTPS"},
    "operator": {"In", "NotIn", "Exists", "DoesNotExist", "Equal", "Gt", "Lt"}, "volumeMode": {"Block", "Filesystem"},
    "podManagementPolicy": {"OrderedReady", "Parallel"}, "selectPolicy": {"Max", "Min", "Disabled"},
    "policyTypes": {"Ingress", "Egress"}, "completionMode": {"NonIndexed", "Indexed"},
    "accessModes": {"ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"},
}


def pod_security(objects):
    """Pod Security "restricted", for every pod template."""
    for o, template in templates(objects):
        pod, who = template["spec"], where(o)
        shared = pod.get("securityContext") or {}
        for key in ("hostNetwork", "hostPID", "hostIPC"):
            if pod.get(key):
                yield f"{who}: {key} is forbidden"
        for volume in pod.get("volumes") or []:
            if "hostPath" in volume:
                yield f"{who}: volume {volume['name']} is a path of the host"
            kinds = set(volume) - {"name"} - {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
            if kinds - {"hostPath"}:
                yield f"{who}: volume {volume['name']} is of a forbidden kind: {', '.join(kinds)}"
        for c in containers(pod):
            own, who_c = c.get("securityContext") or {}, f"{who}, container {c['name']}"
            both = {**shared, **own}
            if own.get("privileged"):
                yield f"{who_c}: privileged"
            if own.get("allowPrivilegeEscalation") is not False:
                yield f"{who_c}: allowPrivilegeEscalation is not false"
            if "ALL" not in (own.get("capabilities") or {}).get("drop", []):
                yield f"{who_c}: does not drop ALL capabilities"
            if set((own.get("capabilities") or {}).get("add") or []) - {"NET_BIND_SERVICE"}:
                yield f"{who_c}: adds capabilities"
            if both.get("runAsNonRoot") is not True:
                yield f"{who_c}: runAsNonRoot is not true"
            if both.get("runAsUser") == 0:
                yield f"{who_c}: runs as root"
            if (both.get("seccompProfile") or {}).get("type") not in ("RuntimeDefault", "Localhost"):
                yield f"{who_c}: no seccomp profile"
            if both.get("procMount", "Default") != "Default" or any(p.get("hostPort") for p in c.get("ports") or []):
                yield f"{who_c}: a host port, or a bare /proc"
    for o in of(objects, "Namespace"):
        for mode in ("enforce", "warn"):
            if (o["metadata"].get("labels") or {}).get(f"pod-security.kubernetes.io/{mode}") != "restricted":
                yield f"{where(o)}: does not {mode} Pod Security restricted"


def hardening(objects):
    """What we ask beyond the profile: numeric user, read-only root, no token, no service links, memory bounded, CPU not."""
    for o, template in templates(objects):
        pod, who = template["spec"], where(o)
        if pod.get("enableServiceLinks") is not False:
            yield f"{who}: enableServiceLinks is not false"
        if pod.get("automountServiceAccountToken") is not False:
            yield f"{who}: mounts a service account's token"
        for c in containers(pod):
            both = {**(pod.get("securityContext") or {}), **(c.get("securityContext") or {})}
            limits, requests = ((c.get("resources") or {}).get(k) or {} for k in ("limits", "requests"))
            if not isinstance(both.get("runAsUser"), int):
                yield f"{who}, container {c['name']}: no numeric user"
            if both.get("readOnlyRootFilesystem") is not True:
                yield f"{who}, container {c['name']}: its root can be written to"
            if "memory" not in limits or "cpu" not in requests:
                yield f"{who}, container {c['name']}: needs a memory limit and a CPU request"
            if "cpu" in limits:
                yield f"{who}, container {c['name']}: has a CPU limit, which throttles heartbeats and drains"
            for variable in c.get("env") or []:
                if re.search(r"PASSWORD$|SECRET$|TOKEN$|_KEYS?$", variable["name"]) or "secretKeyRef" in (variable.get("valueFrom") or {}):
                    yield f"{who}: {variable['name']} puts a secret into the environment: mount it and use {variable['name']}_FILE"


def images(objects):
    """Every image has a tag that is not latest, or a digest."""
    for o, template in templates(objects):
        for c in containers(template["spec"]):
            yield from _image(where(o), c["image"])
    for o in of(objects, "RabbitmqCluster"):
        yield from _image(where(o), o["spec"].get("image", ""))


def _image(who, image):
    if "@sha256:" in image:
        return
    tag = image.rpartition("/")[2].partition(":")[2]
    if tag in ("", "latest"):
        yield f"{who}: image '{image}' has no fixed tag"


def _amount(text):
    unit = re.sub(r"^[0-9.]+", "", str(text))
    return float(str(text)[: len(str(text)) - len(unit)]) * SCALE[unit]


def quantities(objects):
    """Resources are quantities in sensible units, and no request exceeds its limit."""
    for o in objects:
        for path, table in walk(o):
            if not path.endswith("resources"):
                continue
            for kind in ("requests", "limits"):
                for key, value in (table.get(kind) or {}).items():
                    at = f"{where(o)}: {path}.{kind}.{key} = {value}"
                    if not QUANTITY.match(str(value)):
                        yield f"{at} is no quantity"
                    elif key in ("memory", "storage") and _amount(value) < 2**20:
                        yield f"{at} is less than a MiB: is the unit right?"
                    elif key == "cpu" and _amount(value) > 64:
                        yield f"{at} is more than 64 cores: is the unit right?"
            for key in set(table.get("requests") or {}) & set(table.get("limits") or {}):
                request, limit = table["requests"][key], table["limits"][key]
                if all(QUANTITY.match(str(v)) for v in (request, limit)) and _amount(request) > _amount(limit):
                    yield f"{where(o)}: {path}: requests more {key} than its limit"


def enums(objects):
    """Fields with a closed set of values, and ports that exist."""
    for o in objects:
        if "." in o["apiVersion"].partition("/")[0].replace("networking.k8s.io", ""):
            continue  # custom resources have schemas that say it
        for path, table in walk(o.get("spec") or {}):
            for key, value in table.items():
                values = value if isinstance(value, list) else [value]
                if key in ENUMS and all(isinstance(v, str) for v in values) and not set(values) <= ENUMS[key]:
                    yield f"{where(o)}: {path}.{key} is {value}, not one of {', '.join(sorted(ENUMS[key]))}"
                if key in ("port", "containerPort", "targetPort", "hostPort", "nodePort", "endPort"):
                    if isinstance(value, int) and not 1 <= value <= 65535:
                        yield f"{where(o)}: {path}.{key} {value} is no port"
            if path.endswith("seccompProfile") and table.get("type") not in ("RuntimeDefault", "Localhost", "Unconfined"):
                yield f"{where(o)}: {path}.type is {table.get('type')}"
            if path.endswith("strategy") and table.get("type", "RollingUpdate") not in ("RollingUpdate", "Recreate"):
                yield f"{where(o)}: {path}.type is {table.get('type')}"


def conventions(objects):
    """A worker's Deployment: who owns its replicas, how it rolls, when it is asked, how it ends."""
    found = workers(objects)
    if not found:
        yield "there is no Deployment of workers"
    for o in found:
        who, spec = where(o), o["spec"]
        pod = spec["template"]["spec"]
        c = pod["containers"][0]
        env = environment(objects, c)
        if "replicas" in spec:
            yield f"{who}: has replicas, which are the autoscaler's"
        if spec.get("strategy", {}).get("rollingUpdate") != {"maxUnavailable": 0, "maxSurge": "25%"}:
            yield f"{who}: rolls otherwise than by maxUnavailable 0 and maxSurge 25%"
        for probe, path in (("startupProbe", "/startupz"), ("livenessProbe", "/livez"), ("readinessProbe", "/readyz")):
            if ((c.get(probe) or {}).get("httpGet") or {}).get("path") != path:
                yield f"{who}: its {probe} does not ask {path}"
        startup = c.get("startupProbe") or {}
        if (startup.get("periodSeconds"), startup.get("failureThreshold")) != (2, 30):
            yield f"{who}: its startupProbe is not 2 s x 30"
        if c.get("lifecycle"):
            yield f"{who}: has a lifecycle hook: nothing routes to the pod, SIGTERM may come at once"
        drain = seconds(env.get("WARREN_DRAIN_TIMEOUT") or "25s")
        if pod.get("terminationGracePeriodSeconds", 30) <= drain + 15:
            yield f"{who}: terminationGracePeriodSeconds must be more than WARREN_DRAIN_TIMEOUT ({drain:g} s) + 15 s"
        keys = {s["topologyKey"] for s in pod.get("topologySpreadConstraints") or []}
        if not {"kubernetes.io/hostname", "topology.kubernetes.io/zone"} <= keys:
            yield f"{who}: is not spread by host and by zone"
        if env.get("WARREN_DECLARE") != "never":
            yield f"{who}: WARREN_DECLARE is not never"
        budgets = [b for b in of(objects, "PodDisruptionBudget") if selects(b["spec"]["selector"], spec["template"]["metadata"]["labels"])]
        if len(budgets) != 1:
            yield f"{who}: {len(budgets)} PodDisruptionBudgets take it, not one"
        for b in budgets:
            if "maxUnavailable" not in b["spec"] or b["spec"].get("unhealthyPodEvictionPolicy") != "AlwaysAllow":
                yield f"{where(b)}: needs maxUnavailable and unhealthyPodEvictionPolicy AlwaysAllow"
        pool = env.get("WARREN_POOL")
        jobs = [j for j in of(objects, "Job") if (j["spec"]["template"]["spec"]["containers"][0].get("args") or [])[:1] == ["topology"]
                and environment(objects, j["spec"]["template"]["spec"]["containers"][0]).get("WARREN_POOL") == pool]
        if len(jobs) != 1:
            yield f"{who}: {len(jobs)} Jobs declare the topology of pool {pool}, not one"
        for j in jobs:
            secrets = lambda pod: {v["secret"]["secretName"] for v in pod["volumes"] if "secret" in v and v["name"] == "broker"}
            if secrets(j["spec"]["template"]["spec"]) & secrets(pod):
                yield f"{where(j)}: uses the workers' credentials: it needs its own"

"""Breaks what was rendered, one thing at a time: the assertion that is there for it must notice."""
import copy

from . import broker, crds, monitoring, pods, scaling, variables, wiring
from .objects import name, of, workers


def _worker(objects):
    return workers(objects)[0]["spec"]["template"]["spec"]


def _container(objects):
    return _worker(objects)["containers"][0]


def _one(objects, kind, wanted=None):
    return next(o for o in of(objects, kind) if wanted in (None, name(o)))


def _drop(objects, kind, wanted):
    objects.remove(_one(objects, kind, wanted))


def _rule(objects, alert):
    return next(r for g in monitoring.groups(objects) for r in g["rules"] if r.get("alert") == alert)


def _set(table, key, value):
    table[key] = value


# What is broken, in which build, how, and who must complain.
BREAKS = [
    ("a container may gain privileges", "prod", lambda o: _set(_container(o)["securityContext"], "allowPrivilegeEscalation", True), pods.pod_security),
    ("capabilities are kept", "dev", lambda o: _container(o)["securityContext"].pop("capabilities"), pods.pod_security),
    ("root", "prod", lambda o: _set(_worker(o)["securityContext"], "runAsUser", 0), pods.pod_security),
    ("no seccomp profile", "prod", lambda o: _worker(o)["securityContext"].pop("seccompProfile"), pods.pod_security),
    ("a path of the host", "dev", lambda o: _worker(o)["volumes"].append({"name": "x", "hostPath": {"path": "/"}}), pods.pod_security),
    ("Pod Security not enforced", "prod", lambda o: _one(o, "Namespace")["metadata"]["labels"].pop("pod-security.kubernetes.io/enforce"), pods.pod_security),
    ("root file system can be written to", "prod", lambda o: _set(_container(o)["securityContext"], "readOnlyRootFilesystem", False), pods.hardening),
    ("service links", "prod", lambda o: _worker(o).pop("enableServiceLinks"), pods.hardening),
    ("a CPU limit", "prod", lambda o: _set(_container(o)["resources"]["limits"], "cpu", "1"), pods.hardening),
    ("a password as a variable", "prod", lambda o: _container(o)["env"].append({"name": "AMQP_PASSWORD", "value": "x"}), pods.hardening),
    ("an image without a tag", "prod", lambda o: _set(_container(o), "image", "registry.example.com:5000/warren-worker"), pods.images),
    ("memory of 1MMi", "prod", lambda o: _set(_container(o)["resources"]["limits"], "memory", "1MMi"), pods.quantities),
    ("memory in bytes by mistake", "prod", lambda o: _set(_container(o)["resources"]["limits"], "memory", "512"), pods.quantities),
    ("request above limit", "prod", lambda o: _set(_container(o)["resources"]["requests"], "memory", "1Gi"), pods.quantities),
    ("a pull policy that does not exist", "prod", lambda o: _set(_container(o), "imagePullPolicy", "Sometimes"), pods.enums),
    ("port 99999", "prod", lambda o: _set(_container(o)["ports"][0], "containerPort", 99999), pods.enums),
    ("replicas", "prod", lambda o: _set(workers(o)[0]["spec"], "replicas", 3), pods.conventions),
    ("too short a grace", "prod", lambda o: _set(_worker(o), "terminationGracePeriodSeconds", 40), pods.conventions),
    ("a preStop hook", "prod", lambda o: _set(_container(o), "lifecycle", {"preStop": {"sleep": {"seconds": 5}}}), pods.conventions),
    ("liveness asks readiness", "prod", lambda o: _set(_container(o)["livenessProbe"]["httpGet"], "path", "/readyz"), pods.conventions),
    ("no spread by zone", "prod", lambda o: _worker(o)["topologySpreadConstraints"].pop(), pods.conventions),
    ("no disruption budget", "prod", lambda o: _drop(o, "PodDisruptionBudget", "warren-worker-orders"), pods.conventions),
    ("no Job for the topology", "prod", lambda o: _drop(o, "Job", "warren-topology-orders"), pods.conventions),
    ("a selector that takes other pods", "dev", lambda o: _set(workers(o)[0]["spec"]["selector"]["matchLabels"], "app.kubernetes.io/name", "other"), wiring.selectors),
    ("a Service without pods", "dev", lambda o: _set(_one(o, "Service", "rabbitmq")["spec"]["selector"], "app.kubernetes.io/name", "rabit"), wiring.selectors),
    ("a Service's port that no pod has", "dev", lambda o: _set(_one(o, "Service", "rabbitmq")["spec"]["ports"][0], "targetPort", "amqps"), wiring.selectors),
    ("a monitor of nobody", "prod", lambda o: _set(_one(o, "PodMonitor", "warren-worker")["spec"]["selector"]["matchLabels"], "app.kubernetes.io/name", "x"), wiring.selectors),
    ("a ConfigMap that is not there", "prod", lambda o: o.remove(next(c for c in of(o, "ConfigMap") if name(c).startswith("warren-worker-env"))), wiring.references),
    ("a Secret that nobody makes", "prod", lambda o: _drop(o, "User", "warren-worker-orders"), wiring.references),
    ("a Secret's key that is not there", "prod", lambda o: _set(_one(o, "ExternalSecret", "warren-database")["spec"]["data"][0], "secretKey", "uri"), wiring.references),
    ("a ServiceAccount that is not there", "prod", lambda o: _drop(o, "ServiceAccount", "warren-worker"), wiring.references),
    ("a probe on a port that is not there", "prod", lambda o: _set(_container(o)["livenessProbe"]["httpGet"], "port", "admin"), wiring.references),
    ("an autoscaler of nobody", "prod", lambda o: _set(_one(o, "ScaledObject")["spec"]["scaleTargetRef"], "name", "warren-worker"), wiring.references),
    ("a trigger without its credentials", "prod", lambda o: _drop(o, "TriggerAuthentication", "warren-broker"), wiring.references),
    ("a file that is not mounted", "prod", lambda o: _container(o)["volumeMounts"].pop(0), wiring.files),
    ("a file under another name", "prod", lambda o: _set(_container(o)["env"][3], "value", "/run/secrets/warren/broker/user"), wiring.files),
    ("a broker that is not there", "dev", lambda o: _drop(o, "Service", "rabbitmq"), wiring.hosts),
    ("plain AMQP where only TLS listens", "prod", lambda o: next(c["data"].update(AMQP_URL="amqp://warren-rabbitmq:5672/") for c in of(o, "ConfigMap") if name(c).startswith("warren-broker")), wiring.hosts),
    ("everything allowed by default", "prod", lambda o: _drop(o, "NetworkPolicy", "default-deny"), wiring.network),
    ("a way to anywhere", "prod", lambda o: _set(_one(o, "NetworkPolicy", "warren-worker")["spec"]["egress"][0], "to", [{"ipBlock": {"cidr": "0.0.0.0/0"}}]), wiring.network),
    ("no way to the database", "prod", lambda o: _drop(o, "NetworkPolicy", "warren-to-database"), wiring.network),
    ("no way to a route's service", "prod", lambda o: _one(o, "NetworkPolicy", "warren-worker")["spec"].pop("egress"), wiring.network),
    ("scaling to zero", "prod", lambda o: _set(_one(o, "ScaledObject")["spec"], "minReplicaCount", 0), scaling.autoscalers),
    ("more replicas than partitions", "prod", lambda o: _set(_one(o, "ScaledObject")["spec"], "maxReplicaCount", 17), scaling.autoscalers),
    ("unacked events not counted", "prod", lambda o: _set(_one(o, "ScaledObject")["spec"]["triggers"][1]["metadata"], "excludeUnacknowledged", "true"), scaling.autoscalers),
    ("a pattern without its end", "prod", lambda o: _set(_one(o, "ScaledObject")["spec"]["triggers"][1]["metadata"], "queueName", r"^warren\.orders\."), scaling.autoscalers),
    ("another pool's work", "prod", lambda o: _set(_one(o, "ScaledObject")["spec"]["triggers"][0]["metadata"], "query", 'sum(warren_workers_wanted{pool="x"})'), scaling.autoscalers),
    ("down at once", "hpa", lambda o: _one(o, "HorizontalPodAutoscaler")["spec"]["behavior"]["scaleDown"].pop("policies"), scaling.autoscalers),
    ("an alert on another ceiling", "prod", lambda o: _set(_rule(o, "WarrenWantedAboveMax"), "expr", "pool:warren_workers_wanted:sum > 20"), scaling.ceiling),
    ("a permission without an end", "prod", lambda o: _set(_one(o, "Permission", "warren-publisher")["spec"]["permissions"], "write", "^warren.events"), broker.anchored),
    ("a permission on the default exchange", "prod", lambda o: _set(_one(o, "Permission", "warren-publisher")["spec"]["permissions"], "write", "^.*$"), broker.anchored),
    ("a permission that Compose has not", "prod", lambda o: _set(_one(o, "Permission", "warren-publisher")["spec"]["permissions"], "read", "^warren\\.events$"), broker.alike),
    ("another password than the broker's", "dev", lambda o: _set(_one(o, "Secret", "warren-keda-user-credentials")["data"], "password", "eA=="), broker.dev_passwords),
    ("a variable that does not exist", "prod", lambda o: _container(o)["env"].append({"name": "WARREN_PARTITION", "value": "1"}), variables.known),
    ("a field that KEDA does not know", "prod", lambda o: _set(_one(o, "ScaledObject")["spec"], "minReplicas", 1), crds.valid),
    ("a number where KEDA wants text", "prod", lambda o: _set(_one(o, "ScaledObject")["spec"]["triggers"][0]["metadata"], "threshold", 1), crds.valid),
    ("a metric that nobody exports", "prod", lambda o: _set(_rule(o, "WarrenDeadLetters"), "expr", "warren_dead > 0"), monitoring.exported),
    ("a label that nobody sets", "prod", lambda o: _set(_rule(o, "WarrenDeadLetters"), "expr", "max by (lane) (warren_dead_letters) > 0"), monitoring.exported),
    ("an alert without a runbook", "prod", lambda o: _rule(o, "WarrenDeadLetters")["annotations"].pop("runbook"), monitoring.explained),
    ("an alert without a test", "prod", lambda o: _set(_rule(o, "WarrenDeadLetters"), "alert", "WarrenOther"), monitoring.tested),
    ("an expression that does not parse", "prod", lambda o: _set(_rule(o, "WarrenDeadLetters"), "expr", "max by (warren_dead_letters > 0"), monitoring.rules_valid),
    ("an alert that fires always", "prod", lambda o: _set(_rule(o, "WarrenDeadLetters"), "expr", "max by (namespace, pool) (warren_dead_letters) >= 0"), monitoring.rules_tested),
]


def run(report, built):
    """Each break must add a complaint to what the assertion says of the whole build."""
    for what, build, damage, assertion in BREAKS:
        before = set(assertion(built[build]))
        broken = copy.deepcopy(built[build])
        damage(broken)
        noticed = set(assertion(broken)) - before
        report.say(f"self-test: {assertion.__name__} notices: {what}", [] if noticed else ["it does not"])
    if variables.program():
        broken = copy.deepcopy(built["prod"])
        for o in of(broken, "ConfigMap"):
            if "routes.yaml" in (o.get("data") or {}):
                o["data"]["routes.yaml"] = o["data"]["routes.yaml"].replace("timeout:", "timout:")
        report.say("self-test: warren-worker check notices: a misspelt field", [] if list(variables.accepted(broken)) else ["it does not"])

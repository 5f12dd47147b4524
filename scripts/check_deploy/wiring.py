"""What refers to what: selectors, references, ports, mounted files, and who may speak to whom."""
import re

import yaml

from .objects import config, containers, environment, labels, name, of, selects, templates, walk, where, workers

# What others make in the cluster, and why we count on it.
EXTERNAL_SERVICES = {
    ("shop", "payments"): 8080, ("shop", "inventory"): 8080, ("shop", "shipping"): 8080,  # the routes' services
    ("monitoring", "prometheus-operated"): 9090,  # prometheus-operator's own Service
}
# Ports of pods that an operator makes.
CLUSTER_PORTS = {4369, 5671, 5672, 15671, 15672, 15691, 15692, 25672}


def pods(objects):
    """Labels of every pod that will be there, with its ports by name and number."""
    for o, template in templates(objects):
        ports = {p for c in containers(template["spec"]) for d in c.get("ports") or [] for p in (d.get("name"), d["containerPort"])}
        yield where(o), template["metadata"].get("labels") or {}, ports
    for o in of(objects, "RabbitmqCluster"):
        # As the cluster operator labels its pods.
        made = {"app.kubernetes.io/name": name(o), "app.kubernetes.io/component": "rabbitmq", "app.kubernetes.io/part-of": "rabbitmq"}
        yield where(o), made, CLUSTER_PORTS


def selectors(objects):
    """Every selector takes a pod that is there."""
    everyone = list(pods(objects))
    takes = lambda selector: [p for p in everyone if selects(selector, p[1])]
    for o in objects:
        spec, who = o.get("spec") or {}, where(o)
        if o["kind"] in ("Deployment", "StatefulSet"):
            found = spec["template"]["metadata"].get("labels") or {}
            if not selects(spec["selector"], found):
                yield f"{who}: its selector does not take its own pods"
            elif len(takes(spec["selector"])) > 1:
                yield f"{who}: its selector also takes the pods of {', '.join(p[0] for p in takes(spec['selector']) if p[0] != who)}"
            for constraint in spec["template"]["spec"].get("topologySpreadConstraints") or []:
                if not selects(constraint.get("labelSelector") or {}, found):
                    yield f"{who}: a topologySpreadConstraint does not take its own pods"
        if o["kind"] == "Service" and spec.get("selector"):
            chosen = takes({"matchLabels": spec["selector"]})
            if not chosen:
                yield f"{who}: selects no pod"
            for port in spec["ports"]:
                if chosen and not any(port.get("targetPort", port["port"]) in p[2] for p in chosen):
                    yield f"{who}: port {port.get('targetPort', port['port'])} is none of its pods'"
        if o["kind"] in ("PodDisruptionBudget", "PodMonitor") and not takes(spec["selector"]):
            yield f"{who}: selects no pod"
        if o["kind"] == "PodMonitor":
            for endpoint in spec["podMetricsEndpoints"]:
                port = endpoint.get("port") or endpoint.get("portNumber")
                if takes(spec["selector"]) and not any(port in p[2] for p in takes(spec["selector"])):
                    yield f"{who}: port {port} is none of its pods'"
        if o["kind"] == "NetworkPolicy":
            chosen = takes(spec["podSelector"])
            if not chosen:
                yield f"{who}: selects no pod"
            for rule in spec.get("ingress") or []:
                for port in rule.get("ports") or []:
                    if not any(port["port"] in p[2] for p in chosen):
                        yield f"{who}: lets in to port {port['port']}, which none of its pods has"
            for rule in (spec.get("ingress") or []) + (spec.get("egress") or []):
                for peer in (rule.get("from") or []) + (rule.get("to") or []):
                    if "podSelector" in peer and "namespaceSelector" not in peer and not takes(peer["podSelector"]):
                        yield f"{who}: names a peer that does not exist: {peer['podSelector']}"


def _secrets(objects):
    """Secrets and their keys, whoever makes them."""
    made = {name(o): set(o.get("data") or {}) | set(o.get("stringData") or {}) for o in of(objects, "Secret")}
    for o in of(objects, "ExternalSecret"):
        made[(o["spec"].get("target") or {}).get("name") or name(o)] = {d["secretKey"] for d in o["spec"].get("data") or []}
    for o in of(objects, "User"):
        made[f"{name(o)}-user-credentials"] = {"username", "password"}
    return made


def references(objects):
    """Every ConfigMap, Secret, key, account, user, cluster, target and volume that is named exists."""
    maps = {name(o): set(o.get("data") or {}) for o in of(objects, "ConfigMap")}
    secrets, by_kind = _secrets(objects), {}
    for o in objects:
        by_kind.setdefault(o["kind"], set()).add(name(o))

    def missing(who, kind, wanted, keys, available, optional=False):
        if wanted not in available:
            if not optional:
                yield f"{who}: there is no {kind} '{wanted}'"
            return
        for key in keys:
            if key not in available[wanted]:
                yield f"{who}: {kind} '{wanted}' has no key '{key}'"

    for o, template in templates(objects):
        pod, who = template["spec"], where(o)
        account = pod.get("serviceAccountName")
        if account and account not in by_kind.get("ServiceAccount", ()):
            yield f"{who}: there is no ServiceAccount '{account}'"
        volumes = {v["name"] for v in pod.get("volumes") or []} | {v["metadata"]["name"] for v in o["spec"].get("volumeClaimTemplates") or []}
        for v in pod.get("volumes") or []:
            for kind, key, available in (("configMap", "name", maps), ("secret", "secretName", secrets)):
                if kind in v:
                    items = [i["key"] for i in v[kind].get("items") or []]
                    yield from missing(who, kind, v[kind][key], items, available, v[kind].get("optional"))
        for c in containers(pod):
            for mount in c.get("volumeMounts") or []:
                if mount["name"] not in volumes:
                    yield f"{who}: mounts '{mount['name']}', which is no volume of it"
            for source in c.get("envFrom") or []:
                if "configMapRef" in source:
                    yield from missing(who, "configMap", source["configMapRef"]["name"], [], maps)
            for variable in c.get("env") or []:
                taken = variable.get("valueFrom") or {}
                for kind, available in (("configMapKeyRef", maps), ("secretKeyRef", secrets)):
                    if kind in taken:
                        yield from missing(who, kind, taken[kind]["name"], [taken[kind]["key"]], available)
            ports = {p.get("name") for p in c.get("ports") or []}
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                port = next((h["port"] for h in (c.get(probe) or {}).values() if isinstance(h, dict) and "port" in h), None)
                if isinstance(port, str) and port not in ports:
                    yield f"{who}: {probe} asks port '{port}', which the container has not"
    for o in objects:
        spec, who = o.get("spec") or {}, where(o)
        if o["kind"] == "StatefulSet" and spec["serviceName"] not in by_kind.get("Service", ()):
            yield f"{who}: there is no Service '{spec['serviceName']}'"
        if o["kind"] in ("ScaledObject", "HorizontalPodAutoscaler"):
            target = spec["scaleTargetRef"]
            if target["name"] not in by_kind.get(target.get("kind", "Deployment"), ()):
                yield f"{who}: scales '{target['name']}', which does not exist"
        for trigger in spec.get("triggers") or []:
            auth = (trigger.get("authenticationRef") or {}).get("name")
            if auth and auth not in by_kind.get("TriggerAuthentication", ()):
                yield f"{who}: there is no TriggerAuthentication '{auth}'"
        for kind, available in (("secretTargetRef", secrets), ("configMapTargetRef", maps)):
            for ref in spec.get(kind) or []:
                yield from missing(who, kind, ref["name"], [ref["key"]], available)
        cluster = (spec.get("rabbitmqClusterReference") or {}).get("name")
        if cluster and cluster not in by_kind.get("RabbitmqCluster", ()):
            yield f"{who}: there is no RabbitmqCluster '{cluster}'"
        user = (spec.get("userReference") or {}).get("name")
        if user and user not in by_kind.get("User", ()):
            yield f"{who}: there is no User '{user}'"
        if o["kind"] == "RabbitmqCluster" and spec.get("tls"):
            yield from missing(who, "secret", spec["tls"]["secretName"], ["tls.crt", "tls.key"], secrets)
        if o["kind"] == "PodMonitor":
            for path, table in walk(spec):
                if path.endswith("ca.secret"):
                    yield from missing(who, "secret", table["name"], [table["key"]], secrets)


def files(objects):
    """Every file that a variable names lies in something mounted, under a key that is there."""
    secrets, maps = _secrets(objects), {name(o): set(o.get("data") or {}) for o in of(objects, "ConfigMap")}
    for o, template in templates(objects):
        pod = template["spec"]
        volumes = {v["name"]: v for v in pod.get("volumes") or []}
        for c in containers(pod):
            wanted = [(k, v) for k, v in environment(objects, c).items() if v and (k.endswith("_FILE") or k == "WARREN_CONFIG")]
            wanted += [("an argument", a) for a in c.get("args") or [] if a.startswith("/")]
            for variable, path in wanted:
                mount = next((m for m in c.get("volumeMounts") or [] if path.startswith(m["mountPath"] + "/")), None)
                if not mount:
                    yield f"{where(o)}: {variable} names {path}, and nothing is mounted there"
                    continue
                rest, volume = path[len(mount["mountPath"]) + 1:], volumes.get(mount["name"], {})
                source = volume.get("secret") or volume.get("configMap") or {}
                keys = {i["path"] for i in source.get("items") or []}
                keys = keys or secrets.get(source.get("secretName")) or maps.get(source.get("name")) or {rest}
                if rest not in keys:
                    yield f"{where(o)}: {variable} names {path}; '{mount['name']}' holds only {', '.join(sorted(keys))}"


def hosts(objects):
    """Every host that a setting or a route names is a Service here, one that an operator makes, or one we say is there."""
    known = {}
    for o in of(objects, "Service"):
        known[("warren", name(o))] = {p["port"] for p in o["spec"]["ports"]}
    for o in of(objects, "RabbitmqCluster"):
        known[("warren", name(o))] = {5671, 15671, 15691} if (o["spec"].get("tls") or {}).get("disableNonTLSListeners") else CLUSTER_PORTS
    for key, port in EXTERNAL_SERVICES.items():
        known[key] = {port}
    urls = []
    for o, template in templates(objects):
        for c in containers(template["spec"]):
            urls += [(where(o), v) for k, v in environment(objects, c).items() if v and k in ("AMQP_URL", "DATABASE_URL")]
    for o in workers(objects):
        for url in re.findall(r"http:\s*['\"]?(https?://\S+?)['\"]?\s", routes(objects, o) + "\n"):
            urls.append((f"{where(o)}'s routes", url))
    for o in of(objects, "ScaledObject"):
        for trigger in o["spec"]["triggers"]:
            urls += [(where(o), trigger["metadata"][k]) for k in ("host", "serverAddress") if k in trigger["metadata"]]
    for who, url in urls:
        for part in url.split(","):
            found = re.match(r"(\w+)://(?:[^@/]*@)?([^:/?]+)(?::(\d+))?", part.strip())
            if not found:
                yield f"{who}: '{part}' is no URL"
                continue
            scheme, host, port = found[1], found[2].split("."), found[3]
            port = int(port or {"amqp": 5672, "amqps": 5671, "http": 80, "https": 443, "postgres": 5432}[scheme])
            service = (host[1] if len(host) > 1 else "warren", host[0])
            if service not in known:
                yield f"{who}: nobody is at '{found[2]}'"
            elif port not in known[service]:
                yield f"{who}: '{found[2]}' does not listen on {port}"


def routes(objects, worker):
    """The text of a worker's routes."""
    pod = worker["spec"]["template"]["spec"]
    volume = next((v for v in pod["volumes"] if v["name"] == "routes"), {})
    return config(objects, (volume.get("configMap") or {}).get("name")).get("routes.yaml", "")


def network(objects):
    """Nothing goes in or out that is not allowed by name, and every service that is used may be reached."""
    policies = of(objects, "NetworkPolicy")
    closed = [p for p in policies if not p["spec"]["podSelector"] and set(p["spec"]["policyTypes"]) == {"Ingress", "Egress"}
              and not p["spec"].get("ingress") and not p["spec"].get("egress")]
    if not closed:
        yield "no NetworkPolicy denies everything by default"
    for p in policies:
        for rule in (p["spec"].get("egress") or []) + (p["spec"].get("ingress") or []):
            peers = (rule.get("to") or []) + (rule.get("from") or [])
            if not peers or not rule.get("ports"):
                yield f"{where(p)}: a rule without peers or without ports allows too much"
            for peer in peers:
                if (peer.get("ipBlock") or {}).get("cidr", "").endswith("/0") or peer == {"podSelector": {}} or peer == {"namespaceSelector": {}}:
                    yield f"{where(p)}: a rule for everybody"
    for who, found, _ in pods(objects):
        out = [p for p in policies if "Egress" in p["spec"]["policyTypes"] and selects(p["spec"]["podSelector"], found)]
        ports = {port["port"] for p in out for rule in p["spec"].get("egress") or [] for port in rule["ports"]}
        kind = found.get("app.kubernetes.io/name")
        if kind in ("warren-worker", "warren-desk", "warren-topology", "warren-publisher"):
            if not ports & {5671, 5672}:
                yield f"{who}: may not reach the broker"
            if kind in ("warren-worker", "warren-desk") and 5432 not in ports:
                yield f"{who}: may not reach the database"
            if ports - {53, 5671, 5672, 5432, 8080}:
                yield f"{who}: may reach ports {ports - {53, 5671, 5672, 5432, 8080}}, which are neither DNS, broker, database nor the routes' services"
            inward = [p for p in policies if p["spec"].get("ingress") and selects(p["spec"]["podSelector"], found)]
            if kind != "warren-worker" and inward:
                yield f"{who}: lets somebody in"
    for worker in workers(objects):
        for part in (yaml.safe_load(routes(objects, worker)) or {}).get("routes") or []:
            match = re.match(r"https?://([^.:/]+)\.([^.:/]+)", part.get("http") or "")
            if not match:
                continue
            allowed = [peer for p in policies if selects(p["spec"]["podSelector"], worker["spec"]["template"]["metadata"]["labels"])
                       for rule in p["spec"].get("egress") or [] for peer in rule["to"]]
            service = {"app.kubernetes.io/name": match[1]}
            if not any(selects(peer.get("namespaceSelector") or {}, {"kubernetes.io/metadata.name": match[2]}) and
                       peer.get("podSelector") and selects(peer["podSelector"], service) for peer in allowed if "namespaceSelector" in peer):
                yield f"{where(worker)}: no NetworkPolicy lets it reach {match[0]}, which a route names"

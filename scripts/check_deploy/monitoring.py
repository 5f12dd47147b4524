"""Alerts, their tests, and the dashboard: every metric and label exists, every alert is tested and explained."""
import json
import re
import subprocess

import yaml

from .objects import ROOT, WORK, of

METRICS = ROOT / "worker" / "src" / "metrics.rs"
DOCS = ROOT / "docs" / "operations.md"
TESTS = ROOT / "k8s" / "tests"
MONITORING = ROOT / "k8s" / "components" / "monitoring"
DASHBOARD = MONITORING / "warren-dashboard.json"
ADAPTER = ROOT / "k8s" / "components" / "hpa-prometheus-adapter" / "adapter.yaml"
# Not ours: RabbitMQ's (/metrics/detailed) and Prometheus' own.
FOREIGN = {"rabbitmq_detailed_queue_messages": {"queue", "vhost"}, "rabbitmq_detailed_queue_consumers": {"queue", "vhost"}, "up": set()}
SCRAPED = {"namespace", "pod", "instance", "job"}


def metrics():
    """Names of the code's table, with kind and labels; all have `pool`."""
    text = METRICS.read_text()
    names = dict(re.findall(r'pub const (\w+): &str = "(warren_\w+)";', text))
    sets = {k: set(re.findall(r'"(\w+)"', v)) for k, v in re.findall(r"const (\w+): &\[&str\] = &\[([^\]]*)\];", text)}
    found = {}
    for kind, constant, labels in re.findall(r"row\(Kind::(\w+), n::(\w+), (\w+|&\[[^\]]*\]),", text):
        found[names[constant]] = (kind, sets[labels] if labels in sets else set(re.findall(r'"(\w+)"', labels)))
    for name in names.values():
        if name not in found:
            raise RuntimeError(f"{METRICS.name}: {name} is in no row that check-deploy can read")
    return found


def misnamed(where, expression, recorded, exist):
    """Metrics and labels of an expression that nobody exports."""
    allowed, bare = set(SCRAPED), re.sub(r'"(?:[^"\\]|\\.)*"', '""', expression)
    for name in sorted(set(re.findall(r"\b(?:warren|rabbitmq)_\w+|\bpool:\w+:\w+|\bup\b", bare))):
        base = re.sub(r"_(bucket|sum|count)$", "", name)
        if name.startswith("pool:"):
            if name not in recorded:
                yield f"{where}: {name} is recorded by no rule"
            mine = {"pool"}
        elif name in FOREIGN:
            mine = FOREIGN[name]
        elif name in exist and exist[name][0] != "Histogram":
            mine = exist[name][1] | {"pool"}
        elif base != name and base in exist and exist[base][0] == "Histogram":
            mine = exist[base][1] | {"pool", "le"}
        else:
            yield f"{where}: nobody exports {name}"
            continue
        allowed |= mine
        for matchers in re.findall(re.escape(name) + r"\{([^}]*)\}", bare):
            for label in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers):
                if label not in mine | SCRAPED:
                    yield f"{where}: {name} has no label '{label}'"
    allowed |= {m for m in re.findall(r'label_replace\(.*?, "(\w+)", ', expression, re.S)}
    for labels in re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", bare):
        for label in re.findall(r"\w+", labels):
            if label not in allowed:
                yield f"{where}: 'by ({label})', which none of its metrics has"


def groups(objects):
    return [g for o in of(objects, "PrometheusRule") for g in o["spec"]["groups"]]


def expressions(objects):
    """Everything that Prometheus will be asked, with where it stands."""
    for g in groups(objects):
        for rule in g["rules"]:
            yield rule.get("alert") or rule["record"], str(rule["expr"])
    for o in of(objects, "ConfigMap"):
        for key, text in (o.get("data") or {}).items():
            if key.endswith("dashboard.json"):
                for panel in json.loads(text)["panels"]:
                    for target in panel.get("targets") or []:
                        yield f"dashboard, {panel['title']}", target["expr"]
    for o in of(objects, "ScaledObject"):
        for trigger in o["spec"]["triggers"]:
            if "query" in trigger["metadata"]:
                yield f"ScaledObject {o['metadata']['name']}", trigger["metadata"]["query"]
    for o in of(objects, "HorizontalPodAutoscaler"):
        for metric in o["spec"]["metrics"]:
            yield f"HorizontalPodAutoscaler {o['metadata']['name']}", metric["external"]["metric"]["name"]


def exported(objects):
    """Every metric and every label in alerts, dashboard and autoscalers exists in the worker's table of metrics."""
    exist, recorded = metrics(), {r["record"] for g in groups(objects) for r in g["rules"] if "record" in r}
    for where, expression in expressions(objects):
        yield from misnamed(where, expression, recorded, exist)


def adapter(_objects):
    """The rule for prometheus-adapter serves the metric that the HorizontalPodAutoscaler asks for."""
    exist = metrics()
    for rule in yaml.safe_load(ADAPTER.read_text())["externalRules"]:
        yield from misnamed("adapter.yaml", rule["seriesQuery"], set(), exist)
        if rule["name"]["as"] != "warren_workers_wanted":
            yield "adapter.yaml: serves another metric than orders.yaml asks for"


def explained(objects):
    """Every alert says how bad it is, what it means, and where to read on; that place exists."""
    docs = DOCS.read_text()
    for g in groups(objects):
        for rule in g["rules"]:
            alert = rule.get("alert")
            if not alert:
                continue
            if rule.get("labels", {}).get("severity") not in ("critical", "warning", "info"):
                yield f"{alert}: severity is not critical, warning or info"
            notes = rule.get("annotations", {})
            for key in ("summary", "description"):
                if not notes.get(key):
                    yield f"{alert}: has no {key}"
            if notes.get("runbook") != f"docs/operations.md#{alert.lower()}":
                yield f"{alert}: its runbook is not docs/operations.md#{alert.lower()}"
            if f'id="{alert.lower()}"' not in docs and not re.search(rf"^#+ {alert}$", docs, re.M):
                yield f"{alert}: docs/operations.md has no line with that anchor"


def tests():
    return [(path, yaml.safe_load(path.read_text())) for path in sorted(TESTS.glob("alerts-*.yaml"))]


def tested(objects):
    """Every alert has a test in which it fires, and one in which it does not."""
    fires, silent = set(), set()
    for _, document in tests():
        for case in document["tests"]:
            for question in case.get("alert_rule_test") or []:
                (fires if question.get("exp_alerts") else silent).add(question["alertname"])
    alerts = {r["alert"] for g in groups(objects) for r in g["rules"] if "alert" in r}
    for alert in sorted(alerts):
        if alert not in fires or alert not in silent:
            yield f"{alert}: k8s/tests has no case in which it {'stays silent' if alert in fires else 'fires'}"
    for alert in sorted((fires | silent) - alerts):
        yield f"k8s/tests speaks of {alert}, which does not exist"


def promtool(*arguments):
    result = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True)
    if result.returncode:
        yield "promtool: " + " ".join((result.stdout + result.stderr).split())[:1500]


def rules_valid(objects):
    """promtool check rules, on the alerts and on every other expression, fed to it as rules."""
    folder = WORK / "rules"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rules.yaml").write_text(yaml.safe_dump({"groups": groups(objects)}, width=200))
    yield from promtool("check", "rules", folder / "rules.yaml")
    rules = []
    for i, (_, expression) in enumerate(expressions(objects)):
        for variable, value in (("$__rate_interval", "5m"), ("$__range", "1h"), ("$namespace", ".*"), ("$pool", ".*")):
            expression = expression.replace(variable, value)
        rules.append({"record": f"expression_{i}", "expr": expression})
    (folder / "expressions.yaml").write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}, width=200))
    yield from promtool("check", "rules", folder / "expressions.yaml")


def rules_tested(objects):
    """promtool test rules."""
    folder = WORK / "rules"
    list(rules_valid(objects))  # writes rules.yaml
    copies = []
    for path, _ in tests():
        (folder / path.name).write_text(path.read_text())
        copies.append(folder / path.name)
    yield from promtool("test", "rules", *copies)


def dashboard(_objects):
    """The dashboard is one that Grafana loads: ids once each, nothing overlaps, a data source that the reader chooses."""
    board = json.loads(DASHBOARD.read_text())
    ids = [p["id"] for p in board["panels"]]
    if len(ids) != len(set(ids)):
        yield "a panel's id is there twice"
    taken = set()
    for p in board["panels"]:
        g = p["gridPos"]
        cells = {(x, y) for x in range(g["x"], g["x"] + g["w"]) for y in range(g["y"], g["y"] + g["h"])}
        if cells & taken or g["x"] + g["w"] > 24:
            yield f"panel '{p['title']}' lies over another, or outside"
        taken |= cells
        for target in p.get("targets") or []:
            if target["datasource"]["uid"] != "${datasource}":
                yield f"panel '{p['title']}' names a data source of its own"

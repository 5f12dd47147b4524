"""The checks, in order; a line each."""
import argparse
import concurrent.futures
import os
import sys
import traceback

from . import broker, crds, monitoring, pods, scaling, selftest, tools, variables, wiring
from .objects import ROOT, WORK, load, render

# Overlays, and two builds that only exist here: the autoscaler that no overlay uses, and a prefix that must reach every reference.
BUILDS = {
    "hpa": """resources: [../../../../k8s/base]
namespace: warren
components:
  - ../../../../k8s/components/rabbitmq-dev
  - ../../../../k8s/components/postgres-dev
  - ../../../../k8s/components/hpa-prometheus-adapter
images:
  - {name: warren-worker, newTag: dev}
""",
    "prefixed": """resources: [../../../../k8s/overlays/prod]
namePrefix: canary-
""",
}
EVERYWHERE = [pods.pod_security, pods.hardening, pods.images, pods.quantities, pods.enums, pods.conventions, wiring.selectors,
              wiring.references, wiring.files, wiring.hosts, wiring.network, scaling.autoscalers, scaling.ceiling, broker.anchored,
              broker.alike, broker.dev_passwords, variables.known, crds.valid]
PROD = [monitoring.exported, monitoring.explained, monitoring.tested, monitoring.rules_valid, monitoring.rules_tested]


def prefixed(objects):
    """Under a name prefix every reference that kustomize can know still leads somewhere."""
    for complaint in wiring.references(objects):
        # The operator makes these, named after a User: a prefix changes the User, and the Deployment must say so itself.
        if "-user-credentials'" not in complaint:
            yield complaint
    targets = [o["spec"]["scaleTargetRef"]["name"] for o in objects if o["kind"] == "ScaledObject"]
    if targets != ["canary-warren-worker-orders"]:
        yield f"the prefix did not reach the ScaledObject's target: {targets}"


class Report:
    """Says what came out, as it comes."""

    def __init__(self, only):
        self.passed = self.failed = self.skipped = 0
        self.only = only

    def wants(self, what):
        return not self.only or self.only in what

    def say(self, what, complaints):
        if not complaints:
            self.passed += 1
            print(f"ok    {what}", flush=True)
            return
        self.failed += 1
        print(f"FAIL  {what}", flush=True)
        for complaint in complaints[:20]:
            print(f"        {complaint}", flush=True)

    def check(self, what, assertion, *arguments):
        if not self.wants(what):
            return
        try:
            complaints = list(assertion(*arguments))
        except Exception as error:  # a check that breaks has failed
            complaints = [f"{type(error).__name__}: {error}", traceback.format_exc().splitlines()[-3].strip()]
        self.say(what, complaints)

    def skip(self, what, why):
        self.skipped += 1
        print(f"##### NOT CHECKED: {what}: {why} #####", flush=True)


def main():
    arguments = argparse.ArgumentParser(prog="check-deploy")
    arguments.add_argument("--self-test", action="store_true")
    arguments.add_argument("--only", default="")
    arguments = arguments.parse_args()
    report = Report(arguments.only)

    built = {}
    for name in ("dev", "prod", *BUILDS):
        directory = ROOT / "k8s" / "overlays" / name
        if name in BUILDS:
            directory = WORK / "builds" / name
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "kustomization.yaml").write_text(BUILDS[name])
        try:
            text = render(directory)
            (WORK / f"{name}.yaml").write_text(text)
            built[name] = load(text)
            if report.wants("kustomize"):
                report.say(f"{name}: kubectl kustomize ({len(built[name])} objects)", [])
        except RuntimeError as error:
            report.say(f"{name}: kubectl kustomize", [str(error)])
    if len(built) < 2 + len(BUILDS):
        sys.exit("check-deploy: what cannot be rendered cannot be checked")

    # The slow ones meanwhile: two processors, two at once.
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        slow = [(f"{name}: {tool.__name__.replace('_', '-')}", pool.submit(lambda t, n: list(t(WORK / f"{n}.yaml", built[n])), tool, name))
                for tool in (tools.checkov, tools.kubernetes_validate) for name in ("dev", "prod", "hpa")
                if report.wants(f"{name}: {tool.__name__.replace('_', '-')}")]
        for name in ("dev", "prod", "hpa"):
            for assertion in EVERYWHERE:
                report.check(f"{name}: {assertion.__name__.replace('_', ' ')}", assertion, built[name])
        report.check("prefixed: references", prefixed, built["prefixed"])
        for assertion in PROD:
            report.check(f"prod: {assertion.__name__.replace('_', ' ')}", assertion, built["prod"])
        report.check("hpa: exported", monitoring.exported, built["hpa"])
        report.check("prometheus-adapter's rule", monitoring.adapter, [])
        report.check("dashboard", monitoring.dashboard, [])
        if variables.program():
            for name in ("dev", "prod"):
                report.check(f"{name}: warren-worker check accepts settings and routes", variables.accepted, built[name])
        elif os.environ.get("CI"):
            report.say("warren-worker check accepts settings and routes", ["no warren-worker was built: cargo build -p warren-worker"])
        else:
            report.skip("settings and routes", "no warren-worker was built: cargo build -p warren-worker")
        report.check("yamllint", tools.yamllint)
        for file, checks in (("Dockerfile", [("hadolint", tools.hadolint, ())]),
                             ("docker-compose.yml", [("docker-compose.yml: schema", tools.compose_schema, ()), ("docker-compose.yml: variables", variables.compose_known, ([],))])):
            for what, assertion, given in checks:
                if (ROOT / file).exists():
                    report.check(what, assertion, *given)
                else:
                    report.say(what, [f"there is no {file}"])
        for what, future in slow:
            report.check(what, future.result)
    if arguments.self_test:
        selftest.run(report, built)
    print(f"{report.passed} passed, {report.failed} failed" + (f", {report.skipped} skipped" if report.skipped else ""))
    sys.exit(1 if report.failed else 0)


main()

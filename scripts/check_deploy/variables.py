"""Every setting in the manifests exists in the program, and the program accepts the whole of them."""
import os
import re
import subprocess
import tempfile

import yaml

from .objects import ROOT, containers, environment, templates, where, workers
from .wiring import routes

TABLE = ROOT / "shared" / "src" / "env.rs"
COMPOSE = ROOT / "docker-compose.yml"
OURS = re.compile(r"^(WARREN|AMQP|DATABASE|OTEL)_[A-Z0-9_]+$")
# What only Compose's own interpolation reads, and the example's services.
COMPOSE_ONLY = {"WARREN_SECRETS", "WARREN_DEFINITIONS"}


def variables():
    """The names in the code's table; of secrets, which may come as a file, that name, too."""
    text = TABLE.read_text()
    table = text[text.index("VARIABLES: &["):]
    table = table[: table.index("\n];")]
    rows = re.findall(r'^\s*(secret\()?(?:both|worker|publisher)\(\s*"([A-Z][A-Z0-9_]+)"', table, re.M)
    if len(rows) < 20:
        raise RuntimeError(f"{TABLE.name}: check-deploy cannot read the table of variables any more")
    return {name for _, name in rows} | {f"{name}_FILE" for secret, name in rows if secret}


def known(objects):
    """Settings of our own pods."""
    exist = variables()
    for o, template in templates(objects):
        for c in containers(template["spec"]):
            if "warren-" not in c["image"].rpartition("/")[2]:
                continue
            for variable in environment(objects, c):
                if OURS.match(variable) and variable not in exist:
                    yield f"{where(o)}: {variable} is no variable of Warren (shared/src/env.rs)"


def compose_known(_objects):
    """Settings in docker-compose.yml."""
    exist = variables()
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    for service, spec in services.items():
        given = spec.get("environment") or {}
        given = given if isinstance(given, dict) else dict(e.partition("=")[::2] for e in given)
        for variable in given:
            if OURS.match(variable) and variable not in exist | COMPOSE_ONLY:
                yield f"docker-compose.yml, {service}: {variable} is no variable of Warren (shared/src/env.rs)"


def program():
    """The worker's binary, where one was built."""
    target = os.environ.get("CARGO_TARGET_DIR", str(ROOT / "target"))
    return next((p for p in (f"{target}/testing/warren-worker", f"{target}/debug/warren-worker", f"{target}/release/warren-worker") if os.access(p, os.X_OK)), None)


def accepted(objects):
    """`warren-worker check` with a worker's own settings and routes; the broker is not asked, as there is none."""
    for o in workers(objects):
        with tempfile.TemporaryDirectory() as directory:
            path = os.path.join(directory, "routes.yaml")
            with open(path, "w") as file:
                file.write(routes(objects, o))
            env = {k: v for k, v in environment(objects, o["spec"]["template"]["spec"]["containers"][0]).items()
                   if v is not None and not k.endswith("_FILE")}
            env |= {"WARREN_CONFIG": path, "AMQP_URL": "amqp://127.0.0.1:1/", "DATABASE_URL": f"sqlite://{directory}/w.db",
                    "WARREN_CONNECT_TIMEOUT": "100ms", "WARREN_ADMIN_ADDR": "", "RUST_BACKTRACE": "0"}
            result = subprocess.run([program(), "check"], env=env, cwd=directory, capture_output=True, text=True, timeout=60)
            said = [line for line in result.stdout.splitlines() if line.startswith("ok") and "configuration and routes" in line]
            wrong = [line for line in result.stdout.splitlines() + result.stderr.splitlines() if line.startswith("problem") and "broker" not in line]
            if not said or wrong:
                yield f"{where(o)}: warren-worker check: {'; '.join(wrong) or (result.stdout + result.stderr).strip()[-400:]}"

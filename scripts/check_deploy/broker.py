"""Who may do what on the broker: the same in every place, anchored, and never the default exchange."""
import base64
import hashlib
import json
import re

from .objects import ROOT, name, of, where

DEFINITIONS = ROOT / "deploy" / "rabbitmq" / "definitions.json"
COPY = ROOT / "k8s" / "components" / "rabbitmq-dev" / "definitions.json"


def anchored(objects):
    """Every permission is ^…$, none reaches the default exchange, and KEDA may touch nothing."""
    everyone = [(where(o), o["spec"]["permissions"], name(o)) for o in of(objects, "Permission")]
    for o in of(objects, "Secret"):
        if "definitions.json" in (o.get("data") or {}):
            for p in json.loads(base64.b64decode(o["data"]["definitions.json"]))["permissions"]:
                everyone.append((f"{where(o)}, user {p['user']}", p, p["user"]))
    if not everyone:
        yield "there are no permissions at all"
    for who, p, user in everyone:
        for kind in ("configure", "write", "read"):
            pattern = p.get(kind)
            if not pattern or not (pattern.startswith("^") and pattern.endswith("$")):
                yield f"{who}: {kind} '{pattern}' is not ^…$"
            elif _matches(pattern, "amq.default") or _matches(pattern, ""):
                if pattern != "^$":
                    yield f"{who}: {kind} '{pattern}' reaches the default exchange"
        if user.endswith("keda") and {p.get(k) for k in ("configure", "write", "read")} != {"^$"}:
            yield f"{who}: KEDA needs three empty patterns"
        if "worker" in user and _matches(p.get("configure", ""), "warren.orders.high.p00"):
            yield f"{who}: a worker may declare its queues"


def _matches(pattern, text):
    return re.search(pattern, text) is not None


def alike(objects):
    """Permission objects, and the users' tags, are those of deploy/rabbitmq/definitions.json."""
    permissions = of(objects, "Permission")
    if not permissions:
        return
    wanted = json.loads(DEFINITIONS.read_text())
    by_user = {p["user"]: p for p in wanted["permissions"]}
    tags = {u["name"]: u.get("tags") or [] for u in wanted["users"]}
    for o in permissions:
        user, spec = o["spec"]["userReference"]["name"].removeprefix("warren-"), o["spec"]
        if user not in by_user:
            yield f"{where(o)}: {DEFINITIONS.name} has no user '{user}'"
            continue
        for kind in ("configure", "write", "read"):
            if spec["permissions"].get(kind) != by_user[user][kind]:
                yield f"{where(o)}: {kind} is {spec['permissions'].get(kind)}, in {DEFINITIONS.name} {by_user[user][kind]}"
        if spec["vhost"] != by_user[user]["vhost"]:
            yield f"{where(o)}: vhost {spec['vhost']}, in {DEFINITIONS.name} {by_user[user]['vhost']}"
    for o in of(objects, "User"):
        if (o["spec"].get("tags") or []) != tags.get(name(o).removeprefix("warren-")):
            yield f"{where(o)}: tags differ from those in {DEFINITIONS.name}"


def dev_passwords(objects):
    """The dev broker's definitions are the copy they say they are, and its users' Secrets hold their passwords."""
    made = {name(o): o.get("data") or {} for o in of(objects, "Secret")}
    definitions = [d["definitions.json"] for d in made.values() if "definitions.json" in d]
    if not definitions:
        return
    if json.loads(COPY.read_text()) != json.loads(DEFINITIONS.read_text()):
        yield f"{COPY.relative_to(ROOT)} is no copy of {DEFINITIONS.relative_to(ROOT)}: copy it"
    users = {u["name"]: u for u in json.loads(base64.b64decode(definitions[0]))["users"]}
    for secret, data in made.items():
        if not secret.endswith("-user-credentials"):
            continue
        user, password = (base64.b64decode(data[k]).decode() for k in ("username", "password"))
        if user not in users:
            yield f"Secret {secret}: the broker has no user '{user}'"
            continue
        stored = base64.b64decode(users[user]["password_hash"])
        if hashlib.sha256(stored[:4] + password.encode()).digest() != stored[4:]:
            yield f"Secret {secret}: its password is not the one whose hash the definitions hold"

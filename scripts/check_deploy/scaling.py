"""Autoscalers: within the pool's bounds, and looking at the right queues."""
import re

from .objects import environment, name, of, where, workers


def pools(objects):
    """Pools by the name of their Deployment: pool, partitions, lanes."""
    found = {}
    for o in workers(objects):
        env = environment(objects, o["spec"]["template"]["spec"]["containers"][0])
        lanes = [lane.partition(":")[0] for lane in (env.get("WARREN_LANES") or "high:6,normal:3,low:1").split(",")]
        found[name(o)] = (env.get("WARREN_POOL") or "default", int(env.get("WARREN_PARTITIONS") or 16), lanes)
    return found


def autoscalers(objects):
    """One for each pool at most; from 1 to the number of partitions; down slowly; and never blindly."""
    known, seen = pools(objects), {}
    for o in of(objects, "ScaledObject", "HorizontalPodAutoscaler"):
        who, spec = where(o), o["spec"]
        target = spec["scaleTargetRef"]["name"]
        if target not in known:
            continue  # a reference that leads nowhere is another assertion's
        if target in seen:
            yield f"{who}: {seen[target]} scales {target}, too: they would fight"
        seen[target] = who
        pool, partitions, lanes = known[target]
        keda = o["kind"] == "ScaledObject"
        least, most = (spec.get(k, 0) for k in (("minReplicaCount", "maxReplicaCount") if keda else ("minReplicas", "maxReplicas")))
        if least < 1 or spec.get("idleReplicaCount") == 0:
            yield f"{who}: may scale to 0, where nobody hands anything over"
        if most > partitions:
            yield f"{who}: up to {most} replicas, but there are {partitions} partitions (WARREN_PARTITIONS)"
        behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] if keda else spec["behavior"]
        down = behavior["scaleDown"]
        if down.get("stabilizationWindowSeconds", 0) < 300 or down.get("policies") != [{"type": "Percent", "value": 25, "periodSeconds": 60}]:
            yield f"{who}: does not scale down over 300 s and by 25 % a minute"
        if keda:
            if spec.get("fallback", {}).get("behavior") != "currentReplicasIfHigher":
                yield f"{who}: has no fallback currentReplicasIfHigher"
            for trigger in spec["triggers"]:
                yield from _trigger(who, trigger, pool, partitions, lanes, o["metadata"].get("namespace"))
            if {t["type"] for t in spec["triggers"]} != {"rabbitmq", "prometheus"}:
                yield f"{who}: scales not on both the broker's depth and Warren's own count"
        elif [m["external"]["metric"] for m in spec["metrics"]] != [{"name": "warren_workers_wanted", "selector": {"matchLabels": {"pool": pool}}}]:
            yield f"{who}: does not scale on warren_workers_wanted of pool {pool}"


def _trigger(who, trigger, pool, partitions, lanes, namespace):
    data = trigger["metadata"]
    if not all(isinstance(v, str) for v in data.values()):
        yield f"{who}: every value of a trigger's metadata must be a string"
    if trigger["type"] == "prometheus":
        if not all(part in data["query"] for part in ("sum(warren_workers_wanted", f'pool="{pool}"', f'namespace="{namespace}"')):
            yield f"{who}: its query is not the sum of warren_workers_wanted of pool {pool} in {namespace}: {data['query']}"
        if data.get("ignoreNullValues") != "false":
            yield f"{who}: takes no answer for a zero (ignoreNullValues)"
        return
    if (data.get("protocol"), data.get("mode"), data.get("excludeUnacknowledged"), data.get("useRegex")) != ("http", "QueueLength", "false", "true"):
        yield f"{who}: needs protocol http, mode QueueLength, excludeUnacknowledged false, useRegex true"
    if int(data.get("pageSize", 100)) < partitions * len(lanes):
        yield f"{who}: pageSize {data.get('pageSize', 100)} does not hold the pool's {partitions * len(lanes)} queues"
    pattern = re.compile(data["queueName"])
    for queue in (f"warren.{pool}.{lane}.p{p:02}" for lane in lanes for p in range(partitions)):
        if not pattern.search(queue):
            yield f"{who}: its pattern does not match {queue}"
            break
    others = [f"warren.{pool}.{x}" for x in ("dead", "unrouted", "probe", "fleet", "delay.1s", "fleet.1a2b")]
    for queue in others + [f"warren.{pool}2.{lanes[0]}.p00", f"xwarren.{pool}.{lanes[0]}.p00", f"warren.{pool}.{lanes[0]}.p000"]:
        if pattern.search(queue):
            yield f"{who}: its pattern also matches {queue}"


def ceiling(objects):
    """The alert that names the largest number of workers names the right one."""
    limits = {o["spec"].get("maxReplicaCount", o["spec"].get("maxReplicas")) for o in of(objects, "ScaledObject", "HorizontalPodAutoscaler")}
    for o in of(objects, "PrometheusRule"):
        for rule in (r for g in o["spec"]["groups"] for r in g["rules"] if r.get("alert") in ("WarrenWantedAboveMax", "WarrenScalingLags")):
            number = int(re.findall(r"[<>] (\d+)\s*$", rule["expr"].strip())[0])
            if limits and limits != {number}:
                yield f"{rule['alert']}: speaks of {number} workers, the autoscalers of {sorted(limits)}"

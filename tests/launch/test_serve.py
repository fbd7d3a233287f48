"""The manifest that serves on GKE, and the dashboard: whether they fit each other and the server they are for."""

import copy
import json
import re
import types
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from commands import run_command
from prometheus_client.parser import text_string_to_metric_families

from kforcing_jax.serving.metrics import Metrics, Times

REPOSITORY = Path(__file__).parents[2]
SCHEMA = json.loads((Path(__file__).parent / "data/gke_schemas.json").read_text())
KUBERNETES = "1.33"
NAME = "kforcing-serve"
DASHBOARD = json.loads((REPOSITORY / "launch/grafana.json").read_text())
# What uvicorn leaves answers that are complete, see serving/server.py.
LAST_BYTES = 5


@pytest.fixture(scope="module")
def manifest():
    """kind -> its object; there is one of each."""
    objects = list(yaml.safe_load_all((REPOSITORY / "launch/gke/serve.yaml").read_text()))
    by_kind = {thing["kind"]: thing for thing in objects}
    assert len(by_kind) == len(objects)
    return by_kind


@pytest.fixture(scope="module")
def pod(manifest):
    return manifest["Deployment"]["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def container(pod):
    (container,) = pod["containers"]
    return container


@pytest.fixture(scope="module")
def flags(container):
    """Those that the server is started with."""
    command = container["command"]
    assert command[:3] == ["python", "-m", "kforcing_jax.serve"]
    return dict(argument.removeprefix("--").split("=", 1) for argument in command[3:])


@pytest.fixture(scope="module")
def exported():
    """name -> labels, of every sample that a server has told after one text of a draft mode and one refusal."""
    metrics = Metrics("tiny")
    metrics.watch(lambda: 1, lambda: 0, lambda: 0.5, 4)
    usage = types.SimpleNamespace(prompt=3, completion=6, passes=4, student_passes=2, teacher_passes=2)
    wanted = types.SimpleNamespace(request=types.SimpleNamespace(mode="exact", k=2))
    times = Times(0.0)
    metrics.failed(429)
    metrics.began(times, 0.1)
    metrics.progressed(times, 3, 0.2)
    metrics.progressed(times, 3, 0.3)
    metrics.ended(times, types.SimpleNamespace(usage=usage, reason="stop", wanted=wanted), (2, 2, 1), 0.3)
    families = text_string_to_metric_families(metrics.text().decode())
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


def check(thing):
    """Raises where an object is none of its kind."""
    if re.match(r"v1$|apps/|policy/|autoscaling/", thing["apiVersion"]):
        kubernetes_validate.validate(thing, KUBERNETES, strict=True)
    else:
        jsonschema.validate(thing, SCHEMA)


def test_every_object_is_a_valid_one_of_its_kind(manifest):
    for thing in manifest.values():
        check(thing)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("Deployment", "spec", "template", "spec", "containers", 0, "livenessprobe"), {}),
        (("HorizontalPodAutoscaler", "spec", "metrics", 0, "pods", "target", "type"), 3),
        (("PodMonitoring", "spec", "endpoints", 0, "interval"), "often"),
        (("HTTPRoute", "spec", "rules", 0, "backendRefs", 0, "port"), "http"),
        (("HealthCheckPolicy", "spec", "default", "config", "httpHealthCheck", "path"), "/health"),
        (("GCPBackendPolicy", "spec", "default", "timeout"), 3),
        (("Gateway", "spec", "listeners", 0, "protocol"), "http"),
    ],
)
def test_a_broken_object_is_found(manifest, path, value):
    broken = node = copy.deepcopy(manifest)
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(broken[path[0]])


def test_objects_find_each_other(manifest, pod, container):
    labels = manifest["Deployment"]["spec"]["template"]["metadata"]["labels"]
    selectors = [manifest[kind]["spec"]["selector"] for kind in ("Deployment", "PodDisruptionBudget", "PodMonitoring")]
    assert [selector["matchLabels"] for selector in selectors] == [labels] * 3
    service, route = manifest["Service"], manifest["HTTPRoute"]["spec"]
    assert service["spec"]["selector"] == labels
    assert manifest["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == NAME
    assert {thing["metadata"]["name"] for thing in manifest.values()} == {NAME}
    assert {manifest[kind]["spec"]["targetRef"]["name"] for kind in ("HealthCheckPolicy", "GCPBackendPolicy")} == {NAME}
    assert [parent["name"] for parent in route["parentRefs"]] == [manifest["Gateway"]["metadata"]["name"]]
    (backend,) = route["rules"][0]["backendRefs"]
    assert backend == {"name": NAME, "port": service["spec"]["ports"][0]["port"]}
    assert {volume["name"] for volume in pod["volumes"]} == {mount["name"] for mount in container["volumeMounts"]}


def test_the_command_has_flags_of_the_server_only(flags):
    known = re.findall(r"^\s+--(?:\[no\])?(\w+)", run_command("serve", "--help").out, re.MULTILINE)
    assert flags and set(flags) <= set(known)


def test_everything_that_asks_asks_the_port_of_the_server(manifest, container, flags):
    (port,) = container["ports"]
    assert str(port["containerPort"]) == flags["port"]
    probes = [container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")]
    assert probes == [{"path": "/health", "port": port["name"]}] * 3
    gateway = manifest["HealthCheckPolicy"]["spec"]["default"]["config"]["httpHealthCheck"]
    assert (gateway["requestPath"], gateway["port"]) == ("/health", port["containerPort"])
    (scraped,) = manifest["PodMonitoring"]["spec"]["endpoints"]
    assert (scraped["path"], scraped["port"]) == ("/metrics", port["name"])
    assert manifest["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    assert flags["host"] == "0.0.0.0"  # a probe comes from outside the pod


def test_a_server_may_drain_before_it_is_killed(manifest, pod, container, flags):
    before, drains = container["lifecycle"]["preStop"]["sleep"]["seconds"], int(flags["drain_seconds"])
    assert pod["terminationGracePeriodSeconds"] > before + drains + LAST_BYTES
    alive = container["livenessProbe"]
    assert alive["periodSeconds"] * (alive["failureThreshold"] - 1) > drains + LAST_BYTES
    policy = manifest["GCPBackendPolicy"]["spec"]["default"]
    assert policy["connectionDraining"]["drainingTimeoutSec"] >= before + drains
    # What a gateway or a scrape learns too late is sent to a server that is gone.
    ready = container["readinessProbe"]
    assert ready["periodSeconds"] * ready["failureThreshold"] < before


def test_a_server_may_compile_before_it_is_killed(manifest, container):
    start = container["startupProbe"]
    assert start["periodSeconds"] * start["failureThreshold"] >= 1800
    assert (
        manifest["Deployment"]["spec"]["progressDeadlineSeconds"] > start["periodSeconds"] * start["failureThreshold"]
    )


def test_the_gateway_waits_as_long_as_a_request_may_take(manifest, flags):
    assert manifest["GCPBackendPolicy"]["spec"]["default"]["timeoutSec"] > float(flags["request_timeout"])


def test_only_what_the_key_guards_leaves_the_cluster(manifest, container):
    (rule,) = manifest["HTTPRoute"]["spec"]["rules"]
    assert [match["path"] for match in rule["matches"]] == [{"type": "PathPrefix", "value": "/v1"}]
    (key,) = container["env"]
    assert key["name"] == "KFORCING_API_KEY" and set(key["valueFrom"]) == {"secretKeyRef"}


def test_weights_are_mounted_to_be_read(pod, container, flags):
    (mount,) = container["volumeMounts"]
    assert mount["readOnly"] and pod["volumes"][0]["csi"]["readOnly"]
    assert flags["workdir"].startswith(f"{mount['mountPath']}/")


def test_the_autoscaler_reads_a_gauge_of_the_server(manifest, exported):
    (metric,) = manifest["HorizontalPodAutoscaler"]["spec"]["metrics"]
    domain, name, kind = metric["pods"]["metric"]["name"].split("|")
    assert (domain, kind) == ("prometheus.googleapis.com", "gauge")
    assert exported[name] == {"model_name"}


# The page that is all that a newcomer has.


def test_the_docs_have_every_flag_of_the_server_and_no_other():
    text = (REPOSITORY / "docs/serving.md").read_text()
    rows = text[text.index("| flag |") :].split("\n\n")[0]
    known = set(re.findall(r"^\s+--(?:\[no\])?(\w+)", run_command("serve", "--help").out, re.MULTILINE))
    # What `generate` shares, and the server refuses; absl's own.
    others = {"prefix_file", "prefix_length", "batch_size", "num_samples", "max_new_tokens", "help", "helpfull"}
    others |= {"helpshort", "helpxml"}
    assert set(re.findall(r"`--(\w+)`", rows)) == known - others


def test_the_docs_have_every_metric_of_the_server_and_no_other(exported):
    text = (REPOSITORY / "docs/serving.md").read_text()
    rows = text[text.index("| name |") :].split("\n\n")[0].replace("`...", "`vllm:spec_decode_num")
    theirs = {re.sub("_(bucket|sum|count)$", "", name) for name in exported if not name.endswith("_created")}
    assert set(re.findall(r"`((?:vllm|kforcing):\w+)`", rows)) == theirs


# The dashboard.


def expressions():
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def test_the_dashboard_is_one():
    assert DASHBOARD["schemaVersion"] >= 39 and DASHBOARD["title"]
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids) > 0
    boxes = [tuple(panel["gridPos"][side] for side in "xy") for panel in DASHBOARD["panels"]]
    assert len(set(boxes)) == len(boxes)
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    sources = [panel["datasource"] for panel in DASHBOARD["panels"]]
    sources += [target["datasource"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)


@pytest.mark.parametrize("expression", expressions())
def test_a_query_is_of_what_a_server_exports(expression, exported):
    asked = re.findall(r"(?:by \(([^)]*)\) \()?(?:rate\()?((?:vllm|kforcing):\w+)\{([^}]*)\}", expression)
    assert len(asked) == len(re.findall(r"vllm:|kforcing:", expression)) > 0
    for grouped, name, selected in asked:
        labels = set(re.findall(r"(\w+)=", selected))
        assert "model_name" in labels
        assert labels | set(re.findall(r"\w+", grouped)) <= exported[name], name
        counts = name.endswith(("_total", "_bucket", "_sum", "_count"))
        assert counts == (f"rate({name}" in expression), name
        assert ("histogram_quantile" in expression) == name.endswith("_bucket") == (grouped == "le"), name


def test_legends_and_variables_name_labels_that_are_there(exported):
    targets = [target for panel in DASHBOARD["panels"] for target in panel["targets"]]
    for target in targets:
        for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
            assert re.search(rf"by \({label}\)", target["expr"])
    (model,) = [variable for variable in DASHBOARD["templating"]["list"] if variable["name"] == "model_name"]
    name, label = re.fullmatch(r"label_values\((\S+), (\w+)\)", model["definition"]).groups()
    assert label in exported[name]


def test_the_dashboard_shows_what_matters(exported):
    shown = {name for expression in expressions() for name in re.findall(r"(?:vllm|kforcing):\w+", expression)}
    hidden = {re.sub("_(bucket|sum|count)$", "", name) for name in exported if not name.endswith("_created")}
    hidden -= {re.sub("_(bucket|sum|count)$", "", name) for name in shown}
    # Other names of what is shown, what the shown ones are made of, and lengths, which are the clients' affair.
    assert hidden == {
        "vllm:time_per_output_token_seconds",
        "vllm:inter_token_latency_seconds",
        "vllm:spec_decode_num_accepted_tokens_total",
        "vllm:spec_decode_num_draft_tokens_total",
        "vllm:request_prompt_tokens",
        "vllm:request_generation_tokens",
    }

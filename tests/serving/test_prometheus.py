"""A row becomes a message: real gateway, Prometheus and Alertmanager, and dashboards that show something."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import httpx
import psutil
import pytest
import yaml

from imaging.config import Places
from monitoring.alerting import is_installed
from monitoring.containment import contain_new
from monitoring.dashboards import list_queries
from monitoring.journal import open_journal
from monitoring.records import Alarm, Refusal, open_records
from registry.access import Acting, admit
from registry.decisions import acknowledge, resume
from registry.ledger import open_ledger
from services.stack import free_port
from tests.debian import need
from tests.tiny import ROOT
from tests.tiny_gateway import Gateway
from tests.tiny_state import write_state
from tests.tiny_watch import Receiver, Watchers

DEPLOY = ROOT / "deploy"
RULES = sorted((DEPLOY / "prometheus" / "rules").glob("*.yml"))
RARE = (
    "formulary_trial_cases",
    "formulary_jobs",
    "formulary_abstentions",
)  # nothing here is counted in these


def need_prometheus():
    need("prometheus", is_installed("prometheus") and shutil.which("promtool"))
    need("prometheus-alertmanager", is_installed("alertmanager") and shutil.which("amtool"))


def read_alerts():
    groups = [group for path in RULES for group in yaml.safe_load(path.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]


def run(*command):
    return subprocess.run(command, cwd=DEPLOY, capture_output=True, text=True)


@pytest.fixture(scope="module")
def checkout(places, tmp_path_factory):
    """A copy of the checkout, with this one's deploy, where an alarm suspends its site."""
    root = tmp_path_factory.mktemp("watched") / "root"
    shutil.copytree(places.root, root)
    shutil.copytree(DEPLOY, root / "deploy")
    policy = root / "registry" / "policies" / "nodes.yaml"
    told = yaml.safe_load(policy.read_text()) | {"surveillance": {"contain": "suspend"}}
    policy.write_text(yaml.safe_dump(told))
    return Places(root=root, build=root / "build", var=root / "var")


@pytest.fixture(scope="module")
def watched(checkout):
    with Gateway(checkout) as running:
        yield running


@pytest.fixture(scope="module")
def receiver():
    with Receiver() as told:
        yield told


@pytest.fixture(scope="module")
def watchers(checkout, watched, receiver):
    need_prometheus()
    with Watchers(checkout, watched.port, receiver) as both:
        yield both


def test_a_refusal_of_a_known_task_and_site_is_a_row_within_seconds(watched, checkout):
    records = open_records(checkout.var)
    before = max((row.seq for row in records.read(Refusal)), default=0)
    assert watched.post(body=b"nothing").status_code == 400
    assert watched.post(site="atlantis").status_code == 403
    assert watched.post("no-such-task").status_code == 404
    watched.wait(lambda: records.read(Refusal, after=before), 60)
    assert [(row.task, row.site, row.reason, row.count) for row in records.read(Refusal, after=before)] == [
        ("nodes", "north", "unreadable", 1)
    ]


@pytest.mark.parametrize("path", RULES, ids=lambda path: path.name)
def test_promtool_accepts_the_rules(path):
    need_prometheus()
    done = run("promtool", "check", "rules", str(path))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_rules_fire_and_stay_silent_as_their_tests_say():
    need_prometheus()
    done = run(
        "promtool", "test", "rules", *map(str, sorted((DEPLOY / "prometheus" / "tests").glob("*.yml")))
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_of_every_alert_a_test_fires_it_and_one_does_not():
    tested = {True: set(), False: set()}
    for path in (DEPLOY / "prometheus" / "tests").glob("*.yml"):
        for test in yaml.safe_load(path.read_text())["tests"]:
            for one in test["alert_rule_test"]:
                tested[bool(one["exp_alerts"])].add(one["alertname"])
    names = {alert["alert"] for alert in read_alerts()}
    assert tested[True] == tested[False] == names


def test_every_alert_says_how_bad_it_is_who_is_told_and_where_to_read_what_to_do():
    page = (ROOT / "docs" / "operations.md").read_text()
    anchors = {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-")
               for title in re.findall(r"^#+ (.+)$", page, re.MULTILINE)}  # fmt: skip
    alerts = read_alerts()
    assert len(alerts) >= 12
    for alert in alerts:
        assert alert["labels"]["severity"] in ("critical", "warning"), alert["alert"]
        assert alert["labels"]["team"] in ("operations", "clinical"), alert["alert"]
        assert set(alert["annotations"]) == {"summary", "description", "runbook"}, alert["alert"]
        path, anchor = alert["annotations"]["runbook"].split("#")
        assert (path, anchor) == ("docs/operations.md", alert["alert"].lower())
        assert anchor in anchors, f"docs/operations.md has no section {alert['alert']}"


def test_the_configurations_are_sound_and_every_team_has_its_receiver():
    need_prometheus()
    done = run("promtool", "check", "config", "prometheus/prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    done = run("amtool", "check-config", "alertmanager/alertmanager.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    for labels, receiver in ((("team=clinical", "severity=critical"), "clinical"),
                             (("team=operations",), "operations"),
                             (("alertname=Unknown",), "operations")):  # fmt: skip
        done = run(
            "amtool", "config", "routes", "test", "--config.file=alertmanager/alertmanager.yml", *labels
        )
        assert done.stdout.strip() == receiver, labels


def test_nobody_outside_is_told_by_default():
    config = yaml.safe_load((DEPLOY / "alertmanager" / "alertmanager.yml").read_text())
    assert all(set(receiver) == {"name"} for receiver in config["receivers"])


def test_both_listen_on_loopback_alone_and_write_under_var(watchers, checkout):
    for child in watchers.children:
        process = psutil.Process(child.pid)
        heard = [one for one in process.net_connections("inet") if one.status == psutil.CONN_LISTEN]
        assert heard
        assert {one.laddr.ip for one in heard} == {"127.0.0.1"}
        assert not [one for one in process.net_connections("udp") if one.laddr]
    assert (checkout.var / "prometheus" / "data" / "wal").is_dir()


def test_every_rule_works_on_the_running_prometheus(watchers):
    address = f"http://127.0.0.1:{watchers.port}/api/v1/rules"

    def read():
        groups = httpx.get(address).json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    watchers.wait(lambda: all(rule["health"] != "unknown" for rule in read()), 60)
    assert {rule["health"] for rule in read()} == {"ok"}, [rule.get("lastError") for rule in read()]
    assert len(read()) == len(read_alerts()) + 7


def test_an_alarm_suspends_its_site_and_reaches_people_and_so_does_its_end(
    watchers, watched, receiver, checkout
):
    ledger, records = open_ledger(checkout.var), open_records(checkout.var)
    admit(checkout.var, ledger, "monitor")
    assert watched.post(site="east").status_code == 200
    records.append([Alarm(
        task="nodes", site="east", version=1, kind="chart", statistic="noise", part="pixels", direction="up",
        value=9.0, bound=8.0, since="subject 3", budget_days=180, last_seq=1, detail="Noise is higher.",
    )])  # fmt: skip
    assert [str(one.outcome) for one in contain_new(checkout, records, ledger)] == ["suspended"]
    place = {"task": "nodes", "site": "east"}
    watchers.wait(lambda: receiver.has("SiteAlarm", part="pixels", **place), 60)
    watchers.wait(lambda: receiver.has("SiteSuspended", **place), 60)
    assert receiver.has("SiteAlarm", **place) == receiver.has("SiteSuspended", **place) == {"clinical"}
    assert not receiver.has("SiteAlarm", site="north")
    assert watched.post(site="east").status_code == 503
    assert watched.post(site="north").status_code == 200

    acting = Acting(checkout, ledger, admit(checkout.var, ledger, "approver@test"), "It was a new scanner.")
    acknowledge(acting, "nodes", ("east",))
    resume(acting, "nodes", ("east",))
    watchers.wait(lambda: receiver.has("SiteAlarm", "resolved", **place), 60)
    watchers.wait(lambda: receiver.has("SiteSuspended", "resolved", **place), 60)


def test_every_query_of_the_dashboards_shows_something(watchers, watched, checkout):
    journal = open_journal(checkout.var)
    ledger, records = open_ledger(checkout.var), open_records(checkout.var)
    records.append([Alarm(
        task="nodes", site="north", version=1, kind="chart", statistic="noise", part="pixels", direction="up",
        value=9.0, bound=8.0, since="subject 3", budget_days=180, last_seq=1, detail="Noise is higher.",
    )])  # fmt: skip
    contain_new(checkout, records, ledger)
    write_state(journal, [("nodes", "north"), ("discs", "north")], last=1)
    for _ in range(4):
        for task in ("nodes", "discs"):
            watched.post(task, site="east")
            watched.post(task, body=b"nothing", site="east")
        time.sleep(1.1)
    queries = [query.replace("$task", ".*").replace("$site", ".*") for query in list_queries()]
    empty = []
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        empty = [query for query in queries if not watchers.ask(query) and not any(r in query for r in RARE)]
        if not empty:
            break
        time.sleep(0.5)
    assert not empty
    for query in queries:
        watchers.ask(query)


@pytest.fixture
def start_stack(checkout, tmp_path):
    """`formulary up` in a root of its own: the Procfile's lines of both, and a gateway that only waits."""
    lines = (ROOT / "Procfile").read_text().splitlines()
    kept = [line for line in lines if line.startswith(("prometheus:", "alertmanager:"))]
    shutil.copytree(checkout.root / "deploy", tmp_path / "deploy")
    waits = 'gateway: python -c "import time; time.sleep(600)"'
    (tmp_path / "Procfile").write_text("\n".join([*kept, waits]) + "\n")
    names = ("GATEWAY", "MLFLOW", "EVIDENTLY", "PROMETHEUS", "ALERTMANAGER")
    ports = {f"{name}_PORT": str(free_port()) for name in names}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FORMULARY_ROOT": str(tmp_path), **ports}
    environment.pop("FORMULARY_VAR", None)

    def start(**changed):
        return ports, subprocess.Popen(
            [sys.executable, "-m", "formulary", "up"], cwd=tmp_path, env={**environment, **changed},
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    return start


def end(stack):
    """The processes that there were, and what was printed."""
    family = psutil.Process(stack.pid).children(recursive=True)
    names = {process.name() for process in family}
    stack.send_signal(signal.SIGTERM)
    told, _ = stack.communicate(timeout=60)
    assert not psutil.wait_procs(family, timeout=20)[1]
    return names, told


def test_the_stack_starts_both_and_everything_ends_with_it(start_stack):
    need_prometheus()
    ports, stack = start_stack()
    try:
        for name in ("PROMETHEUS", "ALERTMANAGER"):
            wait_for(f"http://127.0.0.1:{ports[f'{name}_PORT']}/-/ready")
    finally:
        names, told = end(stack)
    assert {"prometheus", "prometheus-alertmanager"} <= names
    assert all(f"http://127.0.0.1:{port}" in told for port in ports.values())


def test_the_stack_says_what_is_not_installed_and_starts_the_rest(start_stack):
    ports, stack = start_stack(PATH="/nowhere")
    time.sleep(3)
    assert stack.poll() is None
    _, told = end(stack)
    for name in ("prometheus", "alertmanager"):
        assert re.search(rf"^{name} +is not installed: deploy/debian.sh installs it$", told, re.MULTILINE)
    assert f"http://127.0.0.1:{ports['GATEWAY_PORT']}" in told
    assert f"http://127.0.0.1:{ports['PROMETHEUS_PORT']}" not in told


def wait_for(address):
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            if httpx.get(address, timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise AssertionError(f"{address} did not answer")

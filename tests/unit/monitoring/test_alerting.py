"""What Prometheus is told of this machine, and what is said where it is not installed."""

from pathlib import Path

import pytest
import yaml

from imaging.config import Places
from imaging.errors import NotReady
from monitoring.alerting import command_alertmanager, is_installed, write_prometheus
from services.stack import DEBIAN_PORTS, choose_ports, free_port

ROOT = Path(__file__).parents[3]


@pytest.fixture
def places(tmp_path):
    return Places(root=ROOT, build=tmp_path, var=tmp_path / "var")


def test_the_ports_in_use_the_rules_where_they_lie_and_how_often(places):
    told = yaml.safe_load(write_prometheus(places, 4000, 4093, 30).read_text())
    assert told["global"] == {"scrape_interval": "30s", "evaluation_interval": "30s", "scrape_timeout": "10s"}
    assert all(Path(path).is_file() for path in told["rule_files"])
    asked = {job["job_name"]: job["static_configs"][0]["targets"] for job in told["scrape_configs"]}
    assert asked == {"formulary": ["127.0.0.1:4000"], "alertmanager": ["127.0.0.1:4093"]}
    assert told["alerting"]["alertmanagers"] == [{"static_configs": [{"targets": ["127.0.0.1:4093"]}]}]


def test_prometheus_shows_its_key_to_the_gateway_alone_where_there_is_one(places):
    assert "authorization" not in write_prometheus(places, 3000, 9093).read_text()
    (places.var / "keys").mkdir()
    (places.var / "keys" / "prometheus.key").write_text("fk_key_secret")
    jobs = yaml.safe_load(write_prometheus(places, 3000, 9093).read_text())["scrape_configs"]
    assert Path(jobs[0]["authorization"]["credentials_file"]).read_text() == "fk_key_secret"
    assert "authorization" not in jobs[1]


def test_what_is_not_installed_is_said_with_what_installs_it_and_takes_no_port(places, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    for name in ("MLFLOW_PORT", "GATEWAY_PORT", "EVIDENTLY_PORT"):
        monkeypatch.setenv(name, str(free_port()))
    assert not is_installed("prometheus")
    with pytest.raises(NotReady, match=r"deploy/debian\.sh"):
        command_alertmanager(places, places.var / "alertmanager.yml", 9093)
    ports, missing = choose_ports()
    assert missing == ["prometheus", "alertmanager"]
    assert not set(ports) & set(DEBIAN_PORTS)

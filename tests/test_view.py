"""The viewer: what it lists, what it refuses, and that it leaves everything as it was."""

from __future__ import annotations

import http.client
from pathlib import Path
from urllib.parse import quote

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from fluid_eval.cli.main import main
from fluid_eval.output import view_server
from fluid_eval.output.view_folders import entries
from fluid_model.common.errors import ConfigError

from .viewing import viewer, write_folder


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("view"))


@pytest.fixture(scope="module")
def address(root):
    with viewer(root) as opened:
        yield opened.removeprefix("http://")


def get(address: str, path: str, method: str = "GET", host: str | None = None) -> tuple[int, str, dict[str, str]]:
    """Status, text, headers. path: sent as it is, dots and all."""
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", address if host is None else host)
    connection.endheaders()
    answer = connection.getresponse()
    text, headers = answer.read().decode(), {name.lower(): value for name, value in answer.getheaders()}
    connection.close()
    return answer.status, text, headers


def test_states_are_read_from_files(root):
    listed = entries(root)
    states = {name: (entry.kind, entry.state) for name, entry in listed.items()}
    assert states == {
        "ar": ("run", "finished"),
        "deep/fluid": ("run", "finished"),
        "running": ("run", "running"),
        "stopped": ("run", "stopped"),
        "damaged": ("run", "damaged"),
        "sweep": ("sweep", "running"),
        "sweep/points/aaaa": ("point", "finished"),
        "sweep/points/bbbb": ("point", "finished"),
    }
    assert "link" not in states, "links are not followed"
    assert list(listed)[-1] == "stopped", "last written first"
    assert (listed["running"].answered, listed["ar"].answered) == (42, 0)
    assert listed["ar"].model == "parent"
    assert listed["sweep/points/bbbb"].about == "γ=0.9"
    assert listed["deep/fluid"].decoder == "fluid, verified"
    assert [score[0] for score in listed["ar"].scores] == ["gsm8k", "mmlu"]
    assert listed["deep/fluid"].tokens_per_forward > 1
    assert listed["running"].matches("CHILD fluid running")
    assert not listed["running"].matches("child finished")


def test_the_list_filters_and_escapes(address):
    status, text, headers = get(address, "/")
    assert status == 200
    assert 'href="/of/deep/fluid"' in text
    assert "sweep/points/aaaa" not in text
    assert "script-src" not in headers["content-security-policy"], "default-src 'none' holds"
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert headers["x-frame-options"] == "DENY"
    assert headers["cache-control"] == "no-store"
    assert "sweep/points/aaaa" in get(address, "/?points=1")[1]
    hostile = get(address, "/?q=" + quote('"><script>alert(1)</script>'))[1]
    assert "<script" not in hostile
    assert "0 of 6" in hostile
    only = get(address, "/?q=parent+finished")[1]
    assert "1 of 6" in only
    assert 'http-equiv="refresh"' not in text, "ticks would be lost"
    assert 'http-equiv="refresh"' in get(address, "/?watch=1")[1]


def test_reports_open_and_compare(address):
    status, text, headers = get(address, "/of/deep/fluid")
    assert status == 200
    assert 'id="summary"' in text
    assert headers["content-security-policy"] == "frame-ancestors 'none'", "the page has its own, by hash"
    assert "Content-Security-Policy" in text
    status, text, _ = get(address, "/compare?run=ar&run=deep/fluid")
    assert status == 200
    assert 'id="compare"' in text
    assert get(address, "/of/sweep")[1].count('<span class="mark">') > 2, "its finished points"
    status, text, _ = get(address, "/compare?run=ar")
    assert status == 400
    assert "two finished runs or more" in text
    status, text, _ = get(address, "/compare?run=ar&run=running")
    assert status == 400
    assert "not finished" in text
    assert get(address, "/of/damaged")[0] == 400


def test_what_runs_is_read_anew(address):
    text = get(address, "/of/running")[1]
    assert "42 answers so far" in text
    assert '<meta http-equiv="refresh" content="5">' in text
    text = get(address, "/of/stopped")[1]
    assert "--resume" in text
    assert 'http-equiv="refresh"' not in text


@pytest.mark.parametrize(
    "path",
    [
        "/of/../outside", "/of/%2e%2e/outside", "/of/..%2foutside", "/of//etc/passwd", "/of/%2fetc%2fpasswd",
        "/of/link", "/of/sweep/points/link", "/of/ar/spec.json", "/of/ar/../../outside", "/of/ar%00", "/of/",
        "/spec.json", "/compare?run=../outside&run=ar", "/compare?run=link&run=ar",
    ],
)  # fmt: skip
def test_no_path_leads_out(address, path):
    status, text, _ = get(address, path)
    assert status == 404
    assert "secret" not in text


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:80", "10.0.0.1", ""])
def test_other_hosts_are_refused(address, host):
    assert get(address, "/", host=host)[0] == 400
    assert get(address, "/", host="localhost:1")[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_nothing_can_be_sent(address, method):
    for path in ("/", "/of/ar", "/compare"):
        assert get(address, path, method)[0] == 405


def test_viewing_writes_nothing(root, address):
    before = {file: file.stat().st_mtime_ns for file in sorted(root.rglob("*"))}
    for path in ("/", "/of/ar", "/of/sweep", "/of/running", "/compare?run=ar&run=deep/fluid"):
        get(address, path)
    assert {file: file.stat().st_mtime_ns for file in sorted(root.rglob("*"))} == before


def test_only_loopback_is_bound_and_faults_are_named(root, tmp_path, capsys, monkeypatch):
    server, opened = view_server.listening(root, 0)
    with opened:
        assert opened.getsockname()[0] == "127.0.0.1"
        with pytest.raises(ConfigError, match=r"--port \d+: .*choose another"):
            view_server.listening(root, opened.getsockname()[1])
    assert server.config.server_header is False
    assert main(["view", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["view", str(root), "--port", "99999"]) == 2
    monkeypatch.setitem(__import__("sys").modules, "starlette.applications", None)
    with pytest.raises(ConfigError, match=r"pip install 'fluid-eval\[view\]'"):
        view_server.application(root)

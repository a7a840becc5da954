"""What `deploy/` and the Dockerfile start is what there is: verbs, options, extras, addresses."""

import configparser
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from countermark import cli
from countermark.errors import CountermarkError
from countermark.verbs.serve import ServeConfig

ROOT = Path(__file__).parents[1]
UNIT = ROOT / "deploy" / "countermark.service"


def parsed(command: str) -> Any:
    """The options that the words after `countermark` give."""
    name, rest = cli._named(shlex.split(command))
    return cli._parse(name, cli._imported(name)[1].config, rest)


@pytest.fixture(scope="module")
def unit() -> configparser.ConfigParser:
    found = configparser.ConfigParser(interpolation=None, strict=False, comment_prefixes="#")
    found.optionxform = str  # type: ignore[assignment, method-assign]
    found.read_string(UNIT.read_text().replace("\\\n", " "))
    return found


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")  # comes with Dask
    found: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    return found["services"]  # type: ignore[no-any-return]


def test_commands_are_held_to_the_options_that_there_are() -> None:
    """The other tests would notice."""
    for command in ("serves m --log l", "serve m --log l --drains 3", "serve m --log l --port x"):
        with pytest.raises(CountermarkError):
            parsed(command)


def test_the_unit_serves_as_a_user_of_its_own_and_starts_again(
    unit: configparser.ConfigParser,
) -> None:
    service = unit["Service"]
    program, _, command = service["ExecStart"].partition(" ")
    config = parsed(command)
    assert isinstance(config, ServeConfig)
    assert Path(program).is_absolute()
    state = f"/var/lib/{service['StateDirectory']}/"
    assert str(config.model).startswith(state)  # all else is read-only
    assert str(config.log).startswith(state)
    assert service["ProtectSystem"] == "strict"
    assert service["User"] not in ("", "root", "nobody")
    assert service["Restart"] == "on-failure"
    assert int(service["TimeoutStopSec"]) > config.drain
    assert "MemoryDenyWriteExecute" not in service
    said = UNIT.read_text().replace("\\\n#", "")
    commands = re.findall(r"^#.*/bin/countermark (client .*)$", said, flags=re.M)
    assert len(commands) == 1
    assert str(parsed(commands[0]).clients) == f"{config.model}/clients.json"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    def said(text: str) -> list[str]:
        path = tmp_path / "countermark.service"
        path.write_text(text.replace("/opt/countermark/bin/countermark", "/bin/true"))
        command = ["systemd-analyze", "verify", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return [line for line in done.stderr.splitlines() if str(path) in line or done.returncode]

    text = UNIT.read_text()
    assert said(text) == []
    assert "Protected" in "".join(said(text.replace("ProtectSystem=", "ProtectedSystem=")))
    assert said(text.replace("ExecStart=", "ExecStart=none")) != []


def test_the_compose_file_serves_over_postgresql(services: dict[str, Any]) -> None:
    guard, log = services["guard"], services["log"]
    config = parsed(guard["command"])
    assert isinstance(config, ServeConfig)
    address = re.fullmatch(r"postgresql://(\w+)@(\w+)/(\w+)", config.log)  # and no password
    assert address is not None
    assert services[address[2]] is log
    assert address[1] == address[3] == log["environment"]["POSTGRES_USER"]
    assert guard["environment"]["PGPASSWORD"] == log["environment"]["POSTGRES_PASSWORD"]
    (mount,) = guard["volumes"]
    assert mount.endswith(f":{config.model}:ro")
    assert guard["ports"] == [f"127.0.0.1:{config.port}:{config.port}"]
    assert config.host == "0.0.0.0"  # of its container
    assert int(guard["stop_grace_period"].removesuffix("s")) > config.drain
    assert guard["depends_on"] == {address[2]: {"condition": "service_healthy"}}
    assert {guard["restart"], log["restart"]} == {"unless-stopped"}
    asked = set(re.findall(r"\$\{(\w+)", str(services)))
    said = (ROOT / "deploy" / "compose.yaml").read_text().partition("\nname:")[0]
    assert set(re.findall(r"^#   ([A-Z_]+)=", said, flags=re.M)) == asked
    assert (ROOT / "deploy" / guard["build"] / "Dockerfile").is_file()


@pytest.fixture
def health() -> Iterator[HTTPServer]:
    """A service that says whether it is ready, as its attribute has it."""

    class Ready(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path == "/v2/health/ready"
            self.send_response(self.server.status if known else 404)  # type: ignore[attr-defined]
            self.end_headers()

        def log_message(self, *_arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Ready)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_the_container_is_healthy_where_the_service_is_ready(
    services: dict[str, Any], health: HTTPServer, status: int, healthy: bool
) -> None:
    health.status = status  # type: ignore[attr-defined]
    kind, program, option, code = services["guard"]["healthcheck"]["test"]
    assert (kind, program, option) == ("CMD", "python", "-c")
    port = str(parsed(services["guard"]["command"]).port)
    assert f":{port}/" in code
    code = code.replace(f":{port}/", f":{health.server_address[1]}/")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (done.returncode == 0) is healthy


def test_the_dockerfile_installs_extras_and_copies_files_that_there_are() -> None:
    text = (ROOT / "Dockerfile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extras,) = re.findall(r'"\.\[([\w,]+)\]"', text)
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()
    copied = [words.split()[:-1] for words in re.findall(r"^COPY (.*)$", text, flags=re.M)]
    assert all((ROOT / name).exists() for names in copied for name in names)
    said = text.replace("\\\n#", "")
    commands = re.findall(r"^# docker run .* countermark +(\w.*)$", said, flags=re.M)
    assert [type(parsed(command)).__name__ for command in commands] == ["ProtectConfig"]

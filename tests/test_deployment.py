"""The files for deployment: Dockerfile, compose file and systemd unit hold what they promise."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from serving import Fake, serving, until

from gpt2core.cli import program
from gpt2core.serve import Settings
from gpt2core.serve.server import DRAIN_GRACE_S

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
UNIT_FILE = ROOT / "deploy/gpt2core.service"
OTHER_VARIABLES = {"GPT2CORE_CACHE"}  # of the library, not of the server
STOP_S = Settings.model_fields["drain_s"].default + DRAIN_GRACE_S


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, as (name, rest)."""
    joined = re.sub(r"\\\n\s*", " ", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE))
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in joined.splitlines() if line.strip()]


def last_stage() -> dict[str, str]:
    found = instructions()
    begin = max(i for i, (name, _) in enumerate(found) if name == "FROM")
    return dict(found[begin:])


def unit() -> dict[str, list[str]]:
    lines = [line for line in UNIT_FILE.read_text().splitlines() if "=" in line and not line.startswith("#")]
    found: dict[str, list[str]] = {}
    for line in lines:
        name, _, value = line.partition("=")
        found.setdefault(name, []).append(value)
    return found


def test_the_linter_finds_nothing_in_the_dockerfile():
    hadolint = Path(sys.executable).parent / "hadolint"
    result = subprocess.run([hadolint, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_the_image_runs_without_root_from_pinned_parts_of_a_slim_base():
    bases = [rest.split()[0] for name, rest in instructions() if name == "FROM"]
    assert len(bases) == 2
    assert all(re.fullmatch(r"python:3\.\d+-slim-\w+", base) for base in bases), bases
    installs = [rest for name, rest in instructions() if name == "RUN" and "pip install" in rest]
    assert [("-c constraints.txt" in line, "--only-binary" in line) for line in installs] == [(True, True)]
    uid = last_stage()["USER"].partition(":")[0]
    assert int(uid) >= 1000  # a number: Kubernetes' runAsNonRoot cannot judge a name
    assert last_stage()["ENTRYPOINT"] == '["gpt2core", "serve"]'  # no shell: SIGTERM must arrive
    assert not re.search(r"(?i)(key|token|secret|password)\s*=\s*\S", DOCKERFILE)


def test_the_build_context_holds_what_the_image_needs_and_nothing_else():
    allowed = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    copied = [
        shlex.split(rest)[:-1] for name, rest in instructions() if name == "COPY" and "--from" not in rest
    ]
    assert {source for sources in copied for source in sources} == allowed
    assert (ROOT / ".dockerignore").read_text().startswith("*\n")


def test_the_image_gets_the_native_libraries_from_a_compiler_that_it_does_not_keep():
    found = instructions()
    last = max(i for i, (name, _) in enumerate(found) if name == "FROM")
    compiler, install = (
        next(i for i, (name, rest) in enumerate(found) if name == "RUN" and what in rest)
        for what in ("install -y --no-install-recommends gcc", "pip install")
    )
    copied = [i for i, (name, rest) in enumerate(found) if name == "COPY" and "hatch_build.py" in rest]
    assert max(compiler, *copied) < install < last
    assert not any("gcc" in rest for _, rest in found[last:])


def health_check() -> list[str]:
    command = yaml.safe_load(last_stage()["HEALTHCHECK"].partition("CMD ")[2])
    assert command[0] == "python"
    return [sys.executable, *command[1:]]


def test_the_health_check_passes_while_the_server_lives_and_fails_once_its_engine_is_dead():
    fake = Fake()
    with serving(fake.load) as server:
        environment = {**os.environ, "GPT2CORE_PORT": str(server.port)}
        assert subprocess.run(health_check(), env=environment, timeout=60).returncode == 0
        fake.raises = RuntimeError("planted")
        server.generate("x")
        until(lambda: server.client.get("/livez").status_code == 503)
        dead = subprocess.run(health_check(), env=environment, timeout=60, stderr=subprocess.DEVNULL)
        assert dead.returncode != 0


def test_compose_takes_away_what_a_server_does_not_need_and_waits_for_running_requests():
    service = COMPOSE["services"]["gpt2core"]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert int(service["stop_grace_period"].removesuffix("s")) > STOP_S
    assert service["environment"]["GPT2CORE_API_KEY_FILE"] == "/run/secrets/api_keys"
    assert service["secrets"] == list(COMPOSE["secrets"]) == ["api_keys"]
    assert {volume.partition(":")[0] for volume in service["volumes"]} == set(COMPOSE["volumes"])
    assert service["volumes"][0].partition(":")[2] == last_stage()["VOLUME"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DynamicUser", "yes"),
        ("ProtectSystem", "strict"),
        ("ProtectHome", "yes"),
        ("PrivateTmp", "yes"),
        ("PrivateDevices", "yes"),
        ("NoNewPrivileges", "yes"),
        ("CapabilityBoundingSet", ""),
        ("RestrictAddressFamilies", "AF_INET AF_INET6 AF_UNIX"),
        ("RestrictNamespaces", "yes"),
        ("SystemCallArchitectures", "native"),
        ("Restart", "on-failure"),
    ],
)
def test_the_unit_is_hardened(name, value):
    assert unit()[name] == [value]


def test_the_unit_waits_for_running_requests_and_hands_the_key_over_as_a_credential():
    assert int(unit()["TimeoutStopSec"][0]) > STOP_S
    [credential] = unit()["LoadCredential"]
    assert f"--api-key-file %d/{credential.partition(':')[0]}" in unit()["ExecStart"][0]


def test_the_unit_starts_a_command_with_options_that_exist():
    command, name, *words = shlex.split(unit()["ExecStart"][0])
    assert command.endswith("/bin/gpt2core")
    known = {option for parameter in program.commands[name].params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


def test_systemd_accepts_the_unit(tmp_path):
    """Where systemd's own checker is installed; everywhere each line is at least a setting of a section."""
    sections = re.split(r"^\[(\w+)\]$", UNIT_FILE.read_text(), flags=re.MULTILINE)
    assert sections[1::2] == ["Unit", "Service", "Install"]
    lines = [line for line in "\n".join(sections[2::2]).splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Z][A-Za-z]+=.*", line)] == []
    if checker := shutil.which("systemd-analyze"):
        planted = tmp_path / UNIT_FILE.name
        program_path = unit()["ExecStart"][0].split()[0]  # is not installed here
        planted.write_text(UNIT_FILE.read_text().replace(program_path, "/bin/true"))
        result = subprocess.run([checker, "verify", planted], capture_output=True, text=True, timeout=60)
        assert (result.returncode, result.stdout) == (0, ""), result.stderr
        assert UNIT_FILE.name not in result.stderr


DOCUMENTS = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").glob("serving*.md"))]


@pytest.mark.parametrize("path", ["Dockerfile", "compose.yaml", "deploy/gpt2core.service", *DOCUMENTS])
def test_every_setting_that_a_file_names_exists(path):
    named = set(re.findall(r"GPT2CORE_[A-Z_]*[A-Z]", (ROOT / path).read_text()))
    known = {f"GPT2CORE_{name.upper()}" for name in Settings.model_fields} | OTHER_VARIABLES
    assert named - known == set()

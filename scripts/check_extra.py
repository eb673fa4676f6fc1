"""What holds where one optional framework is installed, or none: run by scripts/test-extras.

    python check_extra.py EXTRA BACKEND...    # the extra that is installed or "none", and all that have one

It needs nothing but what an installation of that extra brings, so that what is missing stays missing.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from importlib.util import find_spec

PROGRAM = os.path.join(sysconfig.get_path("scripts"), "gpt2core")
FRAMEWORKS = ("flax", "jax", "onnx", "onnxruntime", "torch", "transformers")
TEXT = "Once upon a time"
START_S = 60
MISSING = 1  # the exit code of what is not installed


def gpt2core(*args: str, code: int = 0, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command line; `code` is the exit code that it must end with."""
    done = subprocess.run([PROGRAM, *args], input=stdin, capture_output=True, text=True)
    assert done.returncode == code, f"{args}: exit code {done.returncode}, expected {code}; {done.stderr}"
    return done


def generate(backend: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Write on the demo model with one seed."""
    options = ("--backend", backend, "--seed", "7", "--max-new-tokens", "40", "--offline")
    return gpt2core("generate", TEXT, *options, code=code)


def check_bench(*, installed: bool) -> None:
    """Without the extra `bench` the benchmark is refused with it; with it there are plots and a report."""
    with tempfile.TemporaryDirectory() as folder:
        options = ("--offline", "--runs", "1", "--lengths", "40,50", "--output", folder)
        done = gpt2core("bench", *options, code=0 if installed else MISSING)
        found = set(os.listdir(folder))
        if installed:
            assert {"gpt2_benchmark.png", "gpt2_benchmark_line.png", "report.html"} <= found, found
        else:
            assert "pip install 'gpt2core[bench]'" in done.stderr, done.stderr
            assert found == set(), found


def check_chat(*, installed: bool) -> None:
    """Without Jinja a chat is refused with the extra `chat`; with it the demo model answers."""
    options = ("--chat-template", "plain", "--seed", "7", "--offline")
    done = gpt2core("chat", *options, code=0 if installed else MISSING, stdin="Who are you?\n")
    assert installed == bool(done.stdout.strip()), done.stdout
    assert installed or "pip install 'gpt2core[chat]'" in done.stderr, done.stderr


def check_guidance(*, installed: bool) -> None:
    """Without llguidance a constraint is refused with the extra `guidance`; with it the text follows it."""
    options = ("--choice", " yes", "--offline")
    done = gpt2core("generate", TEXT, *options, code=0 if installed else MISSING)
    assert done.stdout == (f"{TEXT} yes\n" if installed else ""), done.stdout
    assert installed or "pip install 'gpt2core[guidance]'" in done.stderr, done.stderr


def check_serve(*, installed: bool) -> None:
    """Without the extra `serve` the server is refused with it; with it a model is served until SIGTERM."""
    if not installed:
        refused = gpt2core("serve", "--offline", code=MISSING)
        assert "pip install 'gpt2core[serve]'" in refused.stderr, refused.stderr
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen([PROGRAM, "serve", "--offline", "--port", str(port)], stderr=subprocess.PIPE)
    try:
        url, end_s = f"http://127.0.0.1:{port}", time.monotonic() + START_S
        while not ready(f"{url}/readyz"):
            assert server.poll() is None, "the server did not start"
            assert time.monotonic() < end_s, "the server did not become ready"
            time.sleep(0.05)
        body = json.dumps({"prompt": TEXT, "max_length": 20}).encode()
        request = urllib.request.Request(f"{url}/generate", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=START_S) as response:
            assert json.load(response)["generated_text"], "the server wrote nothing"
    finally:
        server.terminate()
        server.communicate(timeout=START_S)
    assert server.returncode == 0, f"the server ended with {server.returncode}"


def ready(url: str) -> bool:
    """Whether a server answers there with 200."""
    try:
        with urllib.request.urlopen(url, timeout=START_S) as response:
            return response.status == 200
    except OSError:  # nobody listens yet, or it is still loading
        return False


def main(extra: str, backends: list[str]) -> None:
    """Check the claims one by one."""
    script = f"import sys, gpt2core; gpt2core.GPT2; print(sorted(set({FRAMEWORKS}) & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert loaded == "[]\n", f"importing gpt2core loaded {loaded}"

    here = {"numpy"} | ({extra} & set(backends))
    if any(map(shutil.which, ("cc", "gcc", "clang"))):
        here.add("native")  # needs no package
    listed = {one["name"]: one for one in json.loads(gpt2core("backends", "--json").stdout)["backends"]}
    available = {name for name, one in listed.items() if one["available"]}
    assert available == here, f"available are {sorted(available)}, expected {sorted(here)}"

    missing = set(backends) - here
    check_bench(installed=extra == "bench")
    check_chat(installed=find_spec("jinja2") is not None)
    check_guidance(installed=extra == "guidance")
    check_serve(installed=extra == "serve")
    for name in missing:
        remedy = f"pip install 'gpt2core[{name}]'"
        assert remedy in listed[name]["reason"], f"{name} is listed as {listed[name]}"
        refused = generate(name, code=MISSING)
        assert refused.stdout == "", f"{name}: something was written: {refused.stdout}"
        assert len(refused.stderr.splitlines()) == 1, f"{name}: more than one line: {refused.stderr}"
        assert remedy in refused.stderr, f"{name}: {refused.stderr}"

    texts = {name: generate(name).stdout for name in sorted(here)}
    texts["auto"] = generate("auto").stdout
    assert set(texts.values()) == {texts["numpy"]}, f"one seed gave different texts: {texts}"
    assert texts["numpy"].startswith(TEXT), texts["numpy"]
    assert len(texts["numpy"]) > 2 * len(TEXT), texts["numpy"]

    for name in sorted(here):
        score = json.loads(gpt2core("score", "-", "--backend", name, "--json", stdin=texts["numpy"]).stdout)
        assert 1 < score["perplexity"] < 100, f"{name}: {score}"
    assert json.loads(gpt2core("info", "demo", "--json").stdout)["parameters"] > 0
    print(f"   {', '.join(sorted(here))}: same text; refused with their extra: {', '.join(sorted(missing))}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

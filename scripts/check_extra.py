"""What holds where one optional framework is installed, or none: run by scripts/test-extras.

    python check_extra.py EXTRA BACKEND...    # the extra that is installed or "none", and all that have one

It needs nothing but what an installation of that extra brings, so that what is missing stays missing.
"""

import json
import os
import subprocess
import sys
import sysconfig

PROGRAM = os.path.join(sysconfig.get_path("scripts"), "gpt2core")
FRAMEWORKS = ("flax", "jax", "onnx", "onnxruntime", "torch", "transformers")
TEXT = "Once upon a time"


def gpt2core(*args: str, code: int = 0, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command line; `code` is the exit code that it must end with."""
    done = subprocess.run([PROGRAM, *args], input=stdin, capture_output=True, text=True)
    assert done.returncode == code, f"{args}: exit code {done.returncode}, expected {code}; {done.stderr}"
    return done


def generate(backend: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Write on the demo model with one seed."""
    options = ("--backend", backend, "--seed", "7", "--max-new-tokens", "40", "--offline")
    return gpt2core("generate", TEXT, *options, code=code)


def main(extra: str, backends: list[str]) -> None:
    """Check the claims one by one."""
    script = f"import sys, gpt2core; gpt2core.GPT2; print(sorted(set({FRAMEWORKS}) & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert loaded == "[]\n", f"importing gpt2core loaded {loaded}"

    here = {"numpy"} | ({extra} - {"none"})
    listed = {one["name"]: one for one in json.loads(gpt2core("backends", "--json").stdout)["backends"]}
    available = {name for name, one in listed.items() if one["available"]}
    assert available == here, f"available are {sorted(available)}, expected {sorted(here)}"

    missing = set(backends) - here
    for name in missing:
        remedy = f"pip install 'gpt2core[{name}]'"
        assert remedy in listed[name]["reason"], f"{name} is listed as {listed[name]}"
        refused = generate(name, code=1)
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

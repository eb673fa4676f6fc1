# Sourced by the other scripts, from the project's root: a virtual environment that is made once and kept up to date.
# GPT2CORE_VENV names another folder than .venv.

VENV=${GPT2CORE_VENV:-.venv}

fail() {
  echo "$(basename "$0"): $1" >&2
  exit 1
}

find_python() {
  local candidate
  for candidate in python3 python3.14 python3.13 python3.12 python3.11 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "no Python of version 3.11 or later on the PATH; install one (on Debian: apt install python3 python3-venv)"
}

# install NAME REQUIREMENT: installs the project with pip, unless the stamp of that name says that nothing changed
install() {
  local stamp="$VENV/gpt2core-$1.stamp" wanted
  wanted=$(cat pyproject.toml constraints.txt | cksum; pwd)
  if [ ! -x "$VENV/bin/python" ]; then
    local python
    python=$(find_python)
    echo "$(basename "$0"): making the virtual environment $VENV with $("$python" --version)" >&2
    "$python" -m venv "$VENV" || fail "could not make $VENV; on Debian: apt install python3-venv"
  fi
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "$(basename "$0"): installing gpt2core ($1) into $VENV; this happens once" >&2
    # --no-compile: of the tens of thousands of files that come with the frameworks, few are ever imported
    "$VENV/bin/python" -m pip install --quiet --quiet --disable-pip-version-check --no-compile -c constraints.txt \
      -e "$2" >&2 ||
      fail "the installation failed; see above"
    echo "$wanted" >"$stamp"
  fi
}

# Sourced by demo.sh and test.sh: makes .venv and installs the project into it, once.
# Uses $PYTHON, else python3.11, else python3; needs 3.11 or newer.

python=${PYTHON:-$(command -v python3.11 || command -v python3 || true)}
if [ -z "$python" ] || ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2
    exit 2
fi

# What is installed depends on these files alone (the project itself is installed in place).
wanted=$(cat pyproject.toml constraints.txt | sha256sum | cut -d' ' -f1)
if [ "$(cat .venv/.installed 2>/dev/null)" != "$wanted" ]; then
    echo "Installing into .venv (about 7 GB with CUDA's libraries; minutes, depending on the network) ..." >&2
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
    echo "$wanted" >.venv/.installed
fi
export PATH="$PWD/.venv/bin:$PATH"

#!/bin/sh
# Makes or renews the virtual environment that every make target uses: venv.sh PYTHON VENV PINS
# VENV_FLAGS=--system-site-packages keeps a torch or onnxruntime that is already on the machine (NVIDIA's wheels on a Jetson).
# pip is quiet but for its errors; a large download is announced.
set -eu
python=$1 venv=$2 pins=$3
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

version() { "$1" -c 'import sys; print(sys.version_info[:2])' 2>/dev/null; }
install() { "$venv/bin/python" -m pip install -qq --constraint "$pins" "$@"; }
installed() { "$venv/bin/python" -c 'import importlib.metadata as m, sys; print(m.version(sys.argv[1]))' "$1" 2>/dev/null; }
# True when the module comes from the machine, not from this environment: then pip must not put its own in front of it.
outside() {
    "$venv/bin/python" -c '
import importlib.util, sys
spec = importlib.util.find_spec(sys.argv[1])
sys.exit(not (spec and spec.origin and not spec.origin.startswith(sys.prefix)))' "$1"
}

if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ]; then
    echo "$venv exists and is no virtual environment: move it away, or name another with VENV=" >&2
    exit 1
fi
if [ "$(version "$venv/bin/python")" != "$(version "$python")" ]; then
    echo "making $venv with $("$python" --version)"
    # shellcheck disable=SC2086
    "$python" -m venv --clear ${VENV_FLAGS:-} "$venv"
fi
install --upgrade pip setuptools

extras=bench,dev
outside onnxruntime || extras=$extras,onnxruntime
echo "installing latentd and what it needs, pinned in $pins"
install --no-build-isolation --editable ".[$extras]"

torch=$(sed -n 's/^torch==//p' "$pins")
here=$(installed torch || true)
if outside torch; then
    echo "using the torch $here of this machine"
elif [ "${here%+*}" != "$torch" ] && ! install "torch==$torch+cpu" 2>/dev/null; then
    case "$(uname -s)-$(uname -m)-$torch" in
        Linux-x86_64-* | Linux-aarch64-2.1[0-9]*) size="3 to 4 GB, with CUDA" ;;
        *) size="about 0.2 GB" ;;
    esac
    echo "downloading torch $torch: $size (pip was offered no CPU-only build; PIP_FIND_LINKS may name a folder that has one)"
    install "torch==$torch"
fi

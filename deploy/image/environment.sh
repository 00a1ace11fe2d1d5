#!/bin/sh
# Makes /opt/latentd while an image is built: environment.sh SOURCE TORCH_WHEEL
# torch's wheel goes into one resolution with everything else, so pip can't put another in its place; the pins settle the rest, numpy too.
set -eu
source=$1 wheel=$2
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
pins=$source/deploy/constraints/$(python3 -c 'import sys; print("py%d%d" % sys.version_info[:2])').txt
if [ ! -f "$pins" ]; then
    echo "environment.sh: this base has $(python3 --version); latentd needs 3.8 to 3.13" >&2
    exit 1
fi
sed '/^torch==/d' "$pins" >"$source/pins.txt"
# TensorRT's Python module is the machine's.
python3 -m venv --system-site-packages /opt/latentd
install() { /opt/latentd/bin/python -m pip install --quiet --constraint "$source/pins.txt" "$@"; }
install --upgrade pip setuptools
install --no-build-isolation "${source}[onnxruntime]" "$wheel"
/opt/latentd/bin/latentd --version

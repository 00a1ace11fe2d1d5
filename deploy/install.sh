#!/bin/sh
# Installs latentd as a service on a Jetson with JetPack 5, from this checkout: sudo sh deploy/install.sh
# Safe to run again; that is also how it is upgraded. PyTorch must be there before: NVIDIA's wheel, which this never replaces.
#
#   --uninstall          stop the service, remove it and its environment; what was taught stays
#   --purge-state        with --uninstall: remove what was taught and the caches too (never /etc/latentd)
#   --check              only look whether this machine is fit for it
#   --force              go on although the machine is not the one this was made for
#   --root DIR           install into a folder that holds the root of a system
#
# PYTHON names the Python (python3), LATENTD_HOME the environment (/opt/latentd), LATENTD_PIP the pip to use instead of the environment's.
set -eu
umask 022
here=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
root='' act=install purge='' force='' check='' unit_environ=''
PYTHON=${PYTHON:-python3}
LATENTD_HOME=${LATENTD_HOME:-/opt/latentd}
LIBRARIES="A library: sudo apt-get install libopenblas-base libopenmpi-dev libomp-dev. A module: sudo pip3 install it"
DISK_MIB=1500
MEMORY_MIB=3500
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# What lies in root's home is not the machine's: the service can't see it.
export PYTHONNOUSERSITE=1

say() { printf '%s\n' "$*"; }
did() { printf '  %s\n' "$*"; }
note() { printf '  note: %s\n' "$*"; }
fail() {
    printf 'install.sh: %s\n' "$1" >&2
    [ $# -lt 2 ] || printf '  %s\n' "$2" >&2
    exit 1
}
# A doubt that ends the installation unless --force was given.
doubt() {
    [ -n "$force" ] || fail "$1" "$2 (--force goes on all the same)"
    note "$1"
}
text() { tr '\0' ' ' 2>/dev/null <"$root$1" | sed 's/ *$//' || true; }

while [ $# -gt 0 ]; do
    case $1 in
        --uninstall) act=uninstall ;;
        --purge-state) purge=--purge-state ;;
        --check) check=1 ;;
        --force) force=1 ;;
        --root) [ $# -gt 1 ] || fail "--root needs a folder"; root=${2%/}; shift ;;
        --root=*) root=${1#--root=}; root=${root%/} ;;
        -h | --help) sed -n '2,/^set -eu$/{/^#/s/^# \{0,1\}//p;}' "$0"; exit 0 ;;
        *) fail "$1 is no option" "See $0 --help" ;;
    esac
    shift
done
[ -z "$root" ] || [ -d "$root" ] || fail "$root is not a folder"
[ -z "$root" ] || root=$(CDPATH='' cd -- "$root" && pwd)
case $PYTHON in /*) ;; */*) PYTHON=$PWD/$PYTHON ;; esac
cd / # Python imports what lies in the current folder before anything else
venv=$root$LATENTD_HOME
service_root=${root:+--root=$root}
link=$root/usr/local/bin/latentd # where sudo finds it too, which looks in a few folders only

# --- the machine ------------------------------------------------------------------------------------------------------

need_root() {
    [ -n "$root" ] || [ "$(id -u)" = 0 ] || fail "this needs root, and you are user $(id -u)" "sudo sh $0"
}

check_board() {
    model=$(text /proc/device-tree/model)
    compatible=$(text /proc/device-tree/compatible)
    case $compatible in *tegra*) unit_environ=$(sed -n 's/^Environment=//p' "$here/daemon/latentd/units/latentd.service.d/20-jetson.conf") ;; esac
    case $compatible in
        *tegra194*) did "board: ${model:-Jetson Xavier}" ;;
        *tegra*) note "board: ${model:-Jetson}; made for Xavier, and likely to work here" ;;
        *) doubt "this is no Jetson" "On another computer: pip install 'latentd[all]', then latentd service install" ;;
    esac
    release=$(text /etc/nv_tegra_release | sed -n 's/.*R\([0-9]*\).*REVISION: *\([0-9.]*\).*/\1.\2/p')
    case $release in
        35.*) did "L4T $release (JetPack 5)" ;;
        '') doubt "/etc/nv_tegra_release does not tell the release of L4T" "Is this JetPack 5?" ;;
        *) doubt "L4T $release is not JetPack 5" "This was made for L4T 35" ;;
    esac
}

check_python() {
    version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || fail "there is no $PYTHON" "sudo apt-get install python3"
    pins=$here/deploy/constraints/py$(printf '%s' "$version" | tr -d .).txt
    [ -f "$pins" ] || fail "$PYTHON is Python $version; latentd needs 3.8 to 3.13" "PYTHON=python3.8 names another"
    "$PYTHON" -c 'import venv, ensurepip' 2>/dev/null || fail "$PYTHON can't make environments" "sudo apt-get install python3-venv"
    did "Python $version"
}

# The version of a package that this Python has of the machine, and for torch its CUDA, without importing it.
outside() {
    "$PYTHON" - "$1" <<'EOF'
import importlib.metadata, importlib.util, pathlib, re, sys
spec = importlib.util.find_spec(sys.argv[1])
if spec is None or not spec.origin:
    sys.exit(1)
files = [pathlib.Path(spec.origin).parent / name for name in ("version.py", "__init__.py")]
text = "\n".join(path.read_text(errors="replace") for path in files if path.is_file())
version = re.search(r"^(?:__version__|version|full_version)\b[^=\n]*=\s*['\"]([^'\"]+)", text, re.M)
cuda = re.search(r"^cuda\b[^=\n]*=\s*['\"]([^'\"]+)", text, re.M)
try:  # numpy 1.21 to 1.25 work their version out when they are imported
    found = version.group(1) if version else importlib.metadata.version(sys.argv[1])
except importlib.metadata.PackageNotFoundError:
    found = "unknown"
print(found, cuda.group(1) if cuda else "none")
EOF
}

# Runs a command with what the unit sets on a Jetson before latentd starts.
as_unit() {
    # shellcheck disable=SC2086
    env $unit_environ "$@"
}

# Fails when a Python can't import these modules, with its last words in $words.
can_import() {
    words=$(as_unit "$1" -c "import $2" 2>&1 >/dev/null) && return
    words=$(printf '%s\n' "$words" | tail -n 1)
    return 1
}

check_packages() {
    torch=$(outside torch) || fail "PyTorch is not installed for $PYTHON" \
        "Install NVIDIA's wheel for JetPack 5 (torch 2.0.0+nv23.05 or 2.1.0a0+nv23.06) for all users first: sudo pip3 install <wheel>"
    case $torch in
        *none) doubt "torch ${torch% *} has no CUDA: pip has put it in the place of NVIDIA's" "sudo pip3 uninstall torch, then NVIDIA's wheel again" ;;
        *) did "torch ${torch% *} with CUDA ${torch#* }, which stays as it is" ;;
    esac
    can_import "$PYTHON" torch || fail "torch ${torch% *} can't be imported: $words" "$LIBRARIES"
    if tensorrt=$(outside tensorrt); then did "TensorRT ${tensorrt% *}"; else note "no TensorRT for $PYTHON: sudo apt-get install python3-libnvinfer"; fi
}

check_room() {
    above=$venv
    while [ ! -d "$above" ]; do above=$(dirname "$above"); done
    free=$(df -Pk "$above" | awk 'NR == 2 { print int($4 / 1024) }')
    [ "$free" -ge "$DISK_MIB" ] || fail "$above has $free MiB free; $DISK_MIB are needed" "sudo apt-get clean; sudo journalctl --vacuum-size=100M"
    did "disk: $free MiB free"
    memory=$(text /proc/meminfo | awk '/^MemTotal:/ { print int($2 / 1024) }')
    if [ "${memory:-0}" -ge "$MEMORY_MIB" ]; then did "memory: $memory MiB"; else note "memory: ${memory:-unknown} MiB; $MEMORY_MIB would be better"; fi
    text /proc/meminfo | awk '/^SwapTotal:/ { if ($2 == 0) exit 1 }' || note "no swap: sudo systemctl enable --now nvzramconfig"
    text /etc/group | grep -q '^video:' || fail "there is no group video" "The driver's nodes belong to it: sudo apt-get install --reinstall nvidia-l4t-init"
}

# --- installing -------------------------------------------------------------------------------------------------------

pip_install() {
    # shellcheck disable=SC2086
    ${LATENTD_PIP:-"$venv/bin/python" -m pip} install --quiet --constraint "$work/pins.txt" "$@" && return
    [ -z "$was_whole" ] || rm -f "$venv/unfinished" # what pip can't get it does not begin with
    exit 1
}

# The pins of this Python, but what the machine brings in a version that is new enough stays at that very version.
write_pins() {
    sed '/^#/d; /^torch==/d' "$pins" >"$work/pins.txt"
    printf 'torch===%s\n' "${torch% *}" >>"$work/pins.txt"
    if numpy=$(outside numpy); then
        case ${numpy% *} in
            1.2[3-6].* | 2.*) sed -i "s/^numpy==.*/numpy===${numpy% *}/" "$work/pins.txt"; did "numpy ${numpy% *} of the machine stays" ;;
            *) note "numpy ${numpy% *} of the machine is too old: latentd gets its own, beside it" ;;
        esac
    fi
}

can_import_all() { can_import "$venv/bin/python" "torch, onnx, latentd.cli.app, latentd.service.supervisor"; }
python_of() { "$1" -c 'import sys; print(sys.version_info[:2], sys.base_prefix)' 2>/dev/null; }
version_of_latentd() { "$venv/bin/latentd" --version 2>/dev/null || true; }

# Whether the environment works, and no run was cut off in it: pip waits for no disk, so a power cut after it leaves empty files. What was made
# before there was the mark counts as whole where it works, for the daemon runs in it, and making it anew takes a network.
is_whole() {
    [ ! -e "$venv/unfinished" ] && grep -q 'include-system-site-packages = true' "$venv/pyvenv.cfg" &&
        [ "$(python_of "$venv/bin/python")" = "$(python_of "$PYTHON")" ] && [ -n "$(version_of_latentd)" ] && can_import_all
}

make_environment() {
    if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ]; then fail "$LATENTD_HOME exists and is no environment" "Move it away, or name another with LATENTD_HOME="; fi
    was_whole=''
    if [ -e "$venv" ] && is_whole; then
        was_whole=1
        did "the environment $LATENTD_HOME is there"
    else
        [ ! -e "$venv" ] || note "the environment $LATENTD_HOME is not whole, or of another Python: it is made anew"
        # shellcheck disable=SC2086
        "$PYTHON" -m venv --clear --system-site-packages ${LATENTD_PIP:+--without-pip} "$venv"
        did "made the environment $LATENTD_HOME, which sees the machine's torch and TensorRT"
    fi
    touch "$venv/unfinished"
}

install_package() {
    again="Run this again, which makes the environment anew"
    write_pins
    cp -R "$here/daemon" "$here/pyproject.toml" "$here/README.md" "$here/LICENSE" "$work/"
    rm -rf "$work/build" "$work"/daemon/*.egg-info
    pip_install --upgrade pip setuptools
    if outside onnxruntime >/dev/null; then extra=''; else extra='[onnxruntime]'; fi
    pip_install --upgrade --no-build-isolation "$work/$extra"
    [ ! -e "$venv/lib/python$version/site-packages/torch" ] || fail "pip put a torch into $LATENTD_HOME, in front of NVIDIA's" "$again"
    can_import_all || fail "what was installed can't be imported: $words" "$again"
    installed=$(version_of_latentd)
    [ -n "$installed" ] || fail "$LATENTD_HOME/bin/latentd does not run" "$again"
    sync
    rm -f "$venv/unfinished"
    did "installed $installed"
}

# Runs the new latentd and passes on what it says while it says it; fails as it fails.
run_latentd() {
    rm -f "$work/failed"
    # shellcheck disable=SC2086
    { PYTHONUNBUFFERED=1 "$venv/bin/latentd" "$@" $service_root 2>&1 || touch "$work/failed"; } | sed 's/^/  /'
    [ ! -e "$work/failed" ]
}

install_service() {
    if [ -z "$root" ]; then
        as_unit "$venv/bin/latentd" backbone pull >/dev/null || fail "the backbone could not be fetched" "With a network: sudo $LATENTD_HOME/bin/latentd backbone pull; then run this again"
        did "the backbone is in /var/cache/latentd"
    else
        note "no backbone in $root: latentd backbone pull fetches it"
    fi
    run_latentd service install --exec "$LATENTD_HOME/bin/latentd" || fail "the service could not be installed" "Mend that and run this again"
}

link_is_ours() { [ "$(readlink "$link" 2>/dev/null)" = "$LATENTD_HOME/bin/latentd" ]; }

link_command() {
    if link_is_ours; then return; fi
    if [ -e "$link" ] || [ -L "$link" ]; then
        note "$link is something else and stays; this latentd is $LATENTD_HOME/bin/latentd"
        return
    fi
    mkdir -p "${link%/*}"
    ln -s "$LATENTD_HOME/bin/latentd" "$link"
    did "made the command latentd in ${link%/*}"
}

# What `latentd service uninstall` does, for where no latentd runs any more.
remove_service() {
    units=$root/usr/local/lib/systemd/system
    now=''
    [ -n "$root" ] || [ ! -d /run/systemd/system ] || now=--now
    for unit in latentd.socket latentd.service; do
        # shellcheck disable=SC2086
        [ ! -e "$units/$unit" ] || systemctl ${root:+--root="$root"} disable $now "$unit" || note "$unit could not be disabled"
    done
    for file in 20-jetson.conf 30-render.conf 50-cpu.conf.example 50-memory.conf.example 60-network.conf.example unfinished; do
        rm -f "$units/latentd.service.d/$file"
    done
    rm -f "$units/latentd.service" "$units/latentd.socket" "$root/usr/local/lib/sysusers.d/latentd.conf"
    [ ! -d "$units/latentd.service.d" ] || rmdir "$units/latentd.service.d" 2>/dev/null || note "$units/latentd.service.d has files of yours"
    [ -z "$now" ] || systemctl daemon-reload
    if [ -n "$purge" ]; then
        rm -rf "$root/var/lib/latentd" "$root/var/cache/latentd"
        ! text /etc/passwd | grep -q '^latentd:' || userdel ${root:+--root "$root"} latentd
    fi
}

uninstall() {
    # shellcheck disable=SC2086
    if [ -z "$(version_of_latentd)" ] || ! run_latentd service uninstall $purge; then
        note "there is no $LATENTD_HOME/bin/latentd that runs: the service is removed without it"
        remove_service
    fi
    if link_is_ours; then rm -f "$link"; fi
    if [ -e "$venv/pyvenv.cfg" ]; then
        rm -rf "$venv"
        did "removed $LATENTD_HOME"
    fi
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
if [ "$act" = uninstall ]; then
    need_root
    say "Removing latentd:"
    uninstall
    exit 0
fi
[ -z "$purge" ] || fail "--purge-state goes with --uninstall"
say "This machine:"
check_board
check_python
check_packages
check_room
[ -z "$check" ] || exit 0
need_root
say "Installing latentd:"
make_environment
install_package
link_command
install_service
say "latentd answers at once with the best engine that is ready, and compiles a faster one in the background."
if link_is_ours; then command=latentd; else command=$LATENTD_HOME/bin/latentd; fi
say "  $command status            how it is"
say "  sudo $command doctor       what could be better on this machine"
say "  systemctl status latentd  what systemd says"

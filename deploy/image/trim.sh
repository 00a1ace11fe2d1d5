#!/bin/sh
# Takes the compilers, headers and static archives out of the root that it runs in; for a stage of Dockerfile.l4t only.
# Fails if a compiler is left, or if a library of CUDA, cuDNN or TensorRT went with them.
set -eu
tools='cc c89 c99 gcc g++ c++ cpp clang gfortran nvcc as ld make cmake'
libraries() { ldconfig -p | awk '{ print $1 }' | grep -E '^lib(cu|nv)[A-Za-z0-9_]*\.so\.[0-9]' | sort -u || true; }

libraries >/tmp/before
dpkg-query -W -f '${Package}\n' | grep -E -e '-dev$' -e '-dev-[0-9-]+$' \
    -e '^(build-essential|make|cmake|binutils|gcc|g\+\+|cpp|gfortran|clang|llvm|cuda-nvcc|cuda-compiler)(-[0-9.-]+)?(-(x86-64|aarch64)-linux-gnu)?$' \
    >/tmp/packages || true
# shellcheck disable=SC2046
apt-get purge -y -qq $(cat /tmp/packages) >/tmp/log || { cat /tmp/log >&2; exit 1; }
find / -xdev -name '*.a' -type f -delete
find / -xdev -type f -perm /6000 -exec chmod a-s {} +
rm -rf /usr/src/* /usr/local/cuda*/samples /var/cache/apt/* /var/lib/apt/lists/* /var/log/*
ldconfig
libraries >/tmp/after

gone=$(comm -23 /tmp/before /tmp/after)
if [ -n "$gone" ]; then
    printf 'trim.sh: this went with the compilers: %s\n' "$gone" >&2
    exit 1
fi
for tool in $tools; do
    for folder in /usr/local/sbin /usr/local/bin /usr/sbin /usr/bin /sbin /bin /usr/local/cuda/bin; do
        if [ -e "$folder/$tool" ]; then
            echo "trim.sh: $folder/$tool is left" >&2
            exit 1
        fi
    done
done
# Preloaded, because glibc 2.31 on aarch64 has no room left for it when torch comes to load it; in one place on every architecture.
gomp=$(ldconfig -p | awk '$1 == "libgomp.so.1" { print $NF; exit }')
ln -s "$gomp" /usr/local/lib/libgomp.so.1
rm -f /tmp/before /tmp/after /tmp/packages /tmp/log

#!/usr/bin/env bash
# build.sh cpu|gpu [argument of docker build ...]: builds tritonsmith-cpu or tritonsmith-gpu from this folder.
#
# Beside the files here it needs tritonsmith.tar.gz, stages.txt and constraints.txt: `make image-cpu` lays them, and
# so does `tritonsmith deploy compose`. DOCKER names the client. Where pip needs more than its defaults, the CA bundle
# of PIP_CERT or SSL_CERT_FILE and the file of PIP_CONFIG_FILE (or /etc/pip.conf) serve the build; no layer keeps them.
set -euo pipefail
cd "$(dirname "$0")"

role=${1:-}
if [[ $role != cpu && $role != gpu ]]; then
    echo "usage: build.sh cpu|gpu [argument of docker build ...]" >&2
    exit 2
fi
for file in tritonsmith.tar.gz stages.txt constraints.txt; do
    if [[ ! -e $file ]]; then
        echo "$PWD/$file is missing: python3 -m tritonsmith.deploy.context <repository> $PWD" >&2
        exit 1
    fi
done
secrets=()
ca=${PIP_CERT:-${SSL_CERT_FILE:-}}
config=${PIP_CONFIG_FILE:-/etc/pip.conf}
if [[ -r $ca ]]; then
    secrets+=(--secret "id=ca,src=$ca")
fi
if [[ -r $config ]]; then
    secrets+=(--secret "id=pipconf,src=$config")
fi
DOCKER_BUILDKIT=1 exec "${DOCKER:-docker}" build --network=host --tag "tritonsmith-$role" --file "Dockerfile.$role" \
    "${secrets[@]}" "${@:2}" .

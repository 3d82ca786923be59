#!/usr/bin/env bash
# Makes ./secrets with the key of restricted endpoints and Grafana's admin password, each where it is not there yet.
# The folder is closed to other users; the files are readable, because each container reads its own as its own user.
set -euo pipefail
cd "$(dirname "$0")"

mkdir -p secrets
chmod 0700 secrets
for name in triton_admin_key grafana_admin_password; do
    if [[ -d secrets/$name ]]; then
        rmdir "secrets/$name" # the engine makes a folder where a mounted file is missing
    fi
    if [[ ! -s secrets/$name ]]; then
        od -An -v -N32 -tx1 /dev/urandom | tr -d ' \n' >"secrets/$name"
        echo "made secrets/$name" >&2
    fi
    chmod 0444 "secrets/$name"
done

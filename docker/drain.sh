#!/usr/bin/env bash
# drain.sh REPLICA: take one replica out of the balancer, wait until it answers nothing any more, and stop it.
#
#   COMPOSE_FILE=compose.cpu.yaml ./drain.sh triton-2
#
# SIGTERM alone loses requests: Triton unloads its models while it still accepts gRPC, and its NOT_FOUND is an answer
# that no balancer sends again. So: drain, at least a second, no session left, then SIGTERM. Start the replica again
# with `docker-compose up -d REPLICA`; the balancer takes it back once it is ready.
#
#   DRAIN_TIMEOUT_S   30: how long to wait for sessions to end, before it is stopped anyway
#   COMPOSE           docker-compose, else `docker compose`
set -euo pipefail
cd "$(dirname "$0")"

RUNTIME_PORT=9999
timeout_s=${DRAIN_TIMEOUT_S:-30}

fail() {
    echo "drain.sh: $1" >&2
    exit 1
}

if (($# != 1)) || [[ ! $1 =~ ^[a-z0-9-]+$ ]]; then
    echo "usage: drain.sh REPLICA (triton, triton-2, ...)" >&2
    exit 2
fi
replica=$1
if [[ -n ${COMPOSE:-} ]]; then
    read -r -a compose <<<"$COMPOSE"
elif command -v docker-compose >/dev/null; then
    compose=(docker-compose)
else
    compose=(docker compose)
fi

# One command to haproxy's runtime API; prints its answer.
ask_balancer() {
    # shellcheck disable=SC2016 # $1 and $2 are those of the shell in the container
    "${compose[@]}" --profile balanced exec -T balancer bash -c \
        'exec 3<>/dev/tcp/127.0.0.1/$1; printf "%s\n" "$2" >&3; cat <&3' _ "$RUNTIME_PORT" "$1" </dev/null
}

# Sets the state of the replica in both backends; haproxy says nothing where all is well.
set_state() {
    local backend answer
    for backend in triton_grpc triton_http; do
        answer=$(ask_balancer "set server $backend/$replica state $1") || fail "the balancer does not answer"
        answer=${answer//[[:space:]]/}
        [[ -z $answer ]] || fail "haproxy refused state $1 for $backend/$replica: $answer"
    done
}

# Requests that the replica is answering, over both backends: the fifth column of haproxy's statistics.
count_sessions() {
    ask_balancer "show stat" |
        awk -F, -v replica="$replica" '$2 == replica && $1 ~ /^triton_/ { sum += $5; seen = 1 }
            END { if (!seen) exit 1; print sum }'
}

set_state drain
echo "$replica gets no new requests" >&2
deadline=$((SECONDS + timeout_s))
sleep 1
until sessions=$(count_sessions) || fail "haproxy does not know $replica"; ((sessions == 0)); do
    if ((SECONDS >= deadline)); then
        echo "$replica still answers $sessions requests after $timeout_s s: stopping it anyway" >&2
        break
    fi
    sleep 0.2
done
"${compose[@]}" --profile balanced stop "$replica"
# Its checks fail by now; with the next start they decide again.
set_state ready
echo "$replica is stopped" >&2

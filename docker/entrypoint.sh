#!/bin/bash -p
# -p: NVIDIA's images name a start-up file for every bash, which takes seconds; a health check has five.
# Checks what a container was given, then becomes tritonserver. Arguments are passed to tritonserver, after its flags.
#
#   TRITONSMITH_MODELS           where the repository is mounted; left out: /models (KServe has its own place)
#   TRITONSMITH_TARGET           the --model-config-name; empty: every model's config.pbtxt
#   TRITONSMITH_ADMIN_KEY_FILE   a file with the key of restricted endpoints; left out: a random one that nobody knows
#   TRITONSMITH_SHM_MIB          the least /dev/shm; left out: 1 MiB for each model
#   TRITONSMITH_HTTP_PORT        8000
#
# The image sets TRITONSMITH_FLAGS (a file with tritonserver's flags, one a line), TRITONSMITH_TRITONSERVER, and, where
# plans of TensorRT are built before the start, TRITONSMITH_PLANS=1. The plans are kept in /var/cache/tritonsmith, which
# replicas may share; the view that is served lies in each container's own /tmp.
set -euo pipefail

MODELS=${TRITONSMITH_MODELS:-/models}
PLAN_CACHE=/var/cache/tritonsmith/plans
VIEW=/tmp/view
CLOSE_IDLE=/usr/local/lib/close_idle.so
# ONNX Runtime reports its use, models' names among it, to its maker unless told not to.
export ORT_DISABLE_TELEMETRY=1
export TRITONSMITH_HTTP_PORT=${TRITONSMITH_HTTP_PORT:-8000}

refuse() {
    printf 'tritonsmith: %s\n' "$1" >&2
    shift
    printf '  to do: %s\n' "$@" >&2
    exit 1
}

# PID 1 gets no signal that it did not ask for, and a trap waits for whatever runs in the foreground: what may take long
# runs in the background, and is ended and waited for here.
end_early() {
    trap '' TERM INT
    if [[ -n ${!:-} ]]; then
        kill -TERM "$!" 2>/dev/null || true
        wait "$!" || true
    fi
    exit 143
}

# HEALTHCHECK: 0 where the server and all its models are ready.
check_health() {
    local line
    exec 3<>"/dev/tcp/127.0.0.1/$TRITONSMITH_HTTP_PORT"
    printf 'GET /v2/health/ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n' >&3
    read -r -t 4 line <&3
    [[ $line == *" 200 "* ]]
}

check_repository() {
    local unreadable
    [[ -d $MODELS ]] || refuse "no model repository is mounted at $MODELS" "add -v <repository>:$MODELS:ro"
    [[ ! -e $MODELS/lost+found ]] || refuse "$MODELS holds lost+found, as the root of a block volume does, \
and Triton would read it as a model" \
        "mount a folder below that root at $MODELS (in Kubernetes: subPath)"
    unreadable=$(find -L "$MODELS" \( ! -readable -o -type d ! -executable \) -print -quit 2>/dev/null) || true
    [[ -z $unreadable ]] || refuse "$unreadable cannot be read by user $(id -u)" \
        "on the host: chmod -R a+rX <repository>, or start the container as the files' owner (--user)"
    compgen -G "$MODELS/*/config.pbtxt" >/dev/null || refuse "$MODELS holds no <model>/config.pbtxt" \
        "mount the folder that tritonsmith build published into"
}

check_shared_memory() {
    local needed has
    needed=${TRITONSMITH_SHM_MIB:-$(find -L "$MODELS" -mindepth 2 -maxdepth 2 -name config.pbtxt | wc -l)}
    has=$(df --output=size --block-size=1M /dev/shm | tail -n 1 | tr -d ' ')
    ((has >= needed)) || refuse "/dev/shm has $has MiB, and this repository needs $needed" \
        "start the container with --shm-size=${needed}m or more (what tritonsmith deploy derives)"
}

check_scratch() {
    touch /tmp/.tritonsmith 2>/dev/null || refuse "/tmp cannot be written, and Triton crashes without" \
        "add --tmpfs /tmp:rw,nosuid,nodev,noexec,size=16m"
    rm -f /tmp/.tritonsmith
}

admin_key() {
    local key
    if [[ -z ${TRITONSMITH_ADMIN_KEY_FILE:-} ]]; then
        od -An -v -N32 -tx1 /dev/urandom | tr -d ' \n'
        return
    fi
    [[ -r $TRITONSMITH_ADMIN_KEY_FILE ]] || refuse "user $(id -u) cannot read $TRITONSMITH_ADMIN_KEY_FILE" \
        "mount the key's file there, readable by that user"
    key=$(<"$TRITONSMITH_ADMIN_KEY_FILE")
    # Triton cuts its argument at commas, colons and equals signs.
    [[ $key =~ ^[A-Za-z0-9._~+/-]{16,256}$ ]] || refuse "the admin key in $TRITONSMITH_ADMIN_KEY_FILE cannot be used" \
        "write 16 to 256 letters, digits and . _ ~ + / - into it: openssl rand -hex 32"
    printf '%s' "$key"
}

# Triton ignores a rate_limiter unless it is told otherwise.
uses_rate_limiter() {
    grep -qsE '^[^#]*\<rate_limiter\>' "$1"/*/config.pbtxt "$1"/*/configs/*.pbtxt
}

# Triton loads a version-compatible plan only where that is allowed: such a plan brings code of its own along.
wants_compatible_plans() {
    grep -qsE '"version_compatible": *true' "$MODELS"/*/*/"$TRITONSMITH_TARGET.order.json"
}

serve() {
    local key repository=$MODELS
    local -a flags
    trap end_early TERM INT
    check_repository
    check_shared_memory
    check_scratch
    key=$(admin_key)
    mapfile -t flags <"$TRITONSMITH_FLAGS"
    if [[ -n ${TRITONSMITH_TARGET:-} ]]; then
        flags+=("--model-config-name=$TRITONSMITH_TARGET")
        if wants_compatible_plans; then
            flags+=("--backend-config=tensorrt,version-compatible=true")
        fi
        if [[ ${TRITONSMITH_PLANS:-} == 1 ]]; then
            repository=$VIEW
            tritonsmith plans "$MODELS" --target "$TRITONSMITH_TARGET" --cache "$PLAN_CACHE" --view "$repository" &
            wait "$!"
        fi
    fi
    flags=("${flags[@]//@ADMIN_KEY@/$key}" "--http-port=$TRITONSMITH_HTTP_PORT")
    if uses_rate_limiter "$repository"; then
        flags+=(--rate-limit=execution_count)
    fi
    # The CPU image has it. In NVIDIA's it was never tried, so there an idle connection delays the end.
    if [[ -r $CLOSE_IDLE ]]; then
        export LD_PRELOAD=$CLOSE_IDLE
    fi
    exec "$TRITONSMITH_TRITONSERVER" "--model-repository=$repository" "${flags[@]}" "$@"
}

case ${1:-} in
    healthcheck) check_health ;;
    *) serve "$@" ;;
esac

#!/usr/bin/env bash
# Makes debian:bookworm-slim in the engine of DOCKER_HOST with debootstrap, where no image registry is reached.
# Does nothing if the image is there. Needs root. DEBIAN_MIRROR and DOCKER (the client) may name others.
set -euo pipefail

IMAGE=debian:bookworm-slim
MIRROR=${DEBIAN_MIRROR:-}
DOCKER=${DOCKER:-docker}

if "$DOCKER" image inspect "$IMAGE" >/dev/null 2>&1; then
    exit 0
fi

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
debootstrap --variant=minbase bookworm "$folder/root" ${MIRROR:+"$MIRROR"} >"$folder/log" 2>&1 || {
    tail -n 20 "$folder/log" >&2
    exit 1
}
root=$folder/root
mirror=$(awk '$1 == "deb" { print $2; exit }' "$root/etc/apt/sources.list")
cat >"$root/etc/apt/sources.list" <<SOURCES
deb $mirror bookworm main
deb $mirror bookworm-updates main
deb ${mirror%/}-security bookworm-security main
SOURCES
rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/* "$root"/var/log/* "$root"/tmp/*
# What bookworm-slim leaves out too.
find "$root/usr/share/doc" -mindepth 1 ! -name copyright ! -type d -delete
find "$root/usr/share/doc" -mindepth 1 -type d -empty -delete
rm -rf "$root"/usr/share/{man,info,locale,groff,lintian}/*
tar -C "$root" --numeric-owner -c . | "$DOCKER" import --change 'CMD ["bash"]' - "$IMAGE" >/dev/null
echo "made $IMAGE"

#!/usr/bin/env bash
# Make a base image without a registry: Debian's minimal system, from its package archive.
#     docker/base.sh [NAME]
set -euo pipefail
name=${1:-localhost/attr-batch-base:bookworm}
for tool in podman mmdebstrap; do
    command -v "$tool" > /dev/null || {
        echo "error: $tool is missing" >&2
        echo "  hint: apt-get install --no-install-recommends podman runc mmdebstrap" >&2
        exit 1
    }
done
podman image exists "$name" && exit
archive=$(mktemp)
trap 'rm -f "$archive"' EXIT
mmdebstrap --quiet --variant=minbase --include=ca-certificates bookworm - > "$archive"
podman import --quiet "$archive" "$name" > /dev/null

#!/usr/bin/env bash
# Build the image with podman and hold it to what docker/README.md says. One line a check; the result
# goes to benchmarks/results/image.json. What stays: the image, its base, the layers of the builder.
set -euo pipefail
cd "$(dirname "$0")/.."

host=${ATTR_BATCH:-.venv/bin/attr-batch}
out=${OUT:-benchmarks/results/image.json}
base=${BASE_IMAGE:-localhost/attr-batch-base:bookworm}
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' attr_batch/__init__.py)
image=localhost/attr-batch:$version
revision=$(git describe --always --abbrev=40 --exclude='*' --dirty)
canary=attr-batch-smoke-canary # in every secret, and looked for in every layer
export CONTAINERS_CONF=${CONTAINERS_CONF:-$PWD/docker/containers.conf}

need() { # COMMAND HINT
    command -v "$1" > /dev/null || {
        echo "error: $1 is missing" >&2
        echo "  hint: $2" >&2
        exit 1
    }
}
for tool in podman runc git python3; do
    need $tool "apt-get install --no-install-recommends podman runc mmdebstrap git python3"
done
need "$host" "make setup: the job runs on the host too, to compare"

work=$(mktemp -d)
name=attr-batch-smoke-$$
clean() {
    podman rm --force --ignore --time 0 "$name" &> /dev/null || true
    podman volume rm --force "$name-whole" "$name-halves" &> /dev/null || true
    rm -rf "$work"
}
trap clean EXIT

rows=()
check() { # LABEL COMMAND...: print one line, or the command's output and the end
    local from=$SECONDS
    "${@:2}" > "$work/log" 2>&1 & # `set -e` holds in there, as it would not in a condition
    wait $! || {
        tail -n 40 "$work/log"
        echo "FAILED: $1"
        exit 1
    }
    rows+=("$1" $((SECONDS - from)))
    printf 'ok %5d s  %s\n' $((SECONDS - from)) "$1"
}

hardened=(--read-only --read-only-tmpfs=false --cap-drop=ALL
    --security-opt no-new-privileges --network=none
    --memory=4g --tmpfs "/tmp:mode=1777,size=1g")
inside() { # PROGRAM ARGUMENTS...: another program of the image than attr-batch
    podman run --rm "${hardened[@]}" --entrypoint "$1" "$image" "${@:2}"
}

# Mounts leave empty folders behind in layers, so the builder stage alone gets this machine's folders;
# the second build finds its layers in the cache. Both read a copy, which nobody edits meanwhile.
build() {
    mkdir "$work/source"
    git ls-files -z --cached --others --exclude-standard |
        xargs -0 cp --parents --preserve=timestamps,mode --target-directory "$work/source"
    local arguments=(--layers --network=host --file "$work/source/docker/Dockerfile"
        --build-arg "BUILDER_BASE=$base" --build-arg "RUNTIME_BASE=$base"
        --build-arg "REVISION=$revision")
    local secrets=() mounts=() path
    python3 docker/pipconf.py "$work" > "$work/paths"
    while read -r path; do mounts+=(--volume "$path:$path:ro"); done < "$work/paths"
    for path in pipconf ca; do
        echo "# $canary" >> "$work/$path"
        secrets+=(--secret "id=$path,src=$work/$path")
    done
    podman build "${arguments[@]}" "${secrets[@]}" "${mounts[@]}" --target builder "$work/source"
    podman build "${arguments[@]}" --tag "$image" "$work/source"
}

configured() {
    local label='{{index .Labels "org.opencontainers.image'
    local format="{{.Config.User}} {{.Config.Entrypoint}} $label.version\"}} $label.revision\"}}"
    local got
    got=$(podman image inspect --format "$format $label.licenses\"}}" "$image")
    echo "got $got"
    [[ $got == "10001:10001 [/usr/bin/tini -- attr-batch] $version $revision Apache-2.0" ]]
}

confined() {
    inside python -c '
import os
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
assert os.getuid() == os.getgid() == 10001, os.getuid()
assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0, status
assert int(status["NoNewPrivs"]) == 1, status
assert os.listdir("/sys/class/net") == ["lo"], os.listdir("/sys/class/net")
writable = [path for path, _, _ in os.walk("/") if os.access(path, os.W_OK)]
strange = [path for path in writable if path.split("/")[1] not in ("dev", "proc", "tmp")]
assert not strange, strange
assert "/tmp" in writable'
}

lean() {
    local mounted
    mapfile -t mounted < "$work/paths"
    inside python -c '
import importlib.util, os, re, sys
tools = "gcc|g\+\+|cc|c\+\+|cc1|cc1plus|clang|nvcc|ptxas|ld|as|make|cmake|ninja|protoc|pip3?"
unwanted = re.compile(rf"(.*-linux-gnu-)?({tools})(-?[\d.]+)?")
walked = [os.path.join(at, name) for at, _, names in os.walk("/") for name in names]
found = [p for p in walked if unwanted.fullmatch(os.path.basename(p)) and os.access(p, os.X_OK)]
found += [name for name in ("pip", "pytest", "cyclonedx_py") if importlib.util.find_spec(name)]
found += [path for path in sys.argv[1:] if os.path.exists(path)]
assert len(walked) > 10_000 and not found, found' "${mounted[@]}"
}

# The archive holds the history and every layer, uncompressed. One word that must be there shows that
# the search can find.
discreet() {
    { echo "$canary"; echo bomFormat; grep -v '^/etc/ssl/' "$work/paths"; } > "$work/words"
    podman save "$image" | grep --text --only-matching --fixed-strings --file "$work/words" |
        sort | uniq > "$work/found"
    cat "$work/found"
    [[ $(< "$work/found") == bomFormat ]]
}

itemised() {
    inside python -c '
import importlib.metadata, json, re
bom = json.load(open("/usr/share/attr-batch/sbom.cdx.json"))
def normal(name): return re.sub("[-_.]+", "-", name).lower()
listed = {normal(c["name"]): c["version"] for c in bom["components"]}
root = bom["metadata"]["component"]
listed[root["name"]] = root["version"]
installed = {normal(d.name): d.version for d in importlib.metadata.distributions()}
assert "torch" in listed and bom["bomFormat"] == "CycloneDX"
assert listed == installed, set(listed.items()) ^ set(installed.items())'
}

healthy() {
    podman run --rm "${hardened[@]}" --env ATTR_BATCH_OPS=native "$image" doctor | tee "$work/doctor"
    grep -q 'libraries *_native_cpu.so' "$work/doctor"
    inside python -c 'import psycopg2' # the tracking server of k8s/mlflow
    inside mlflow server --help
}

small=(--set model.training.steps=60 --set pruning.recovery.steps=40
    --set counterfactual.steps=20 --set sampling.images=64 --set sampling.keep=none
    --set estimator.budget=20 --set estimator.holdout=4)
job=(run /usr/share/attr-batch/examples/digits/job.yaml --set store=store "${small[@]}")

host_job() {
    "$host" run examples/digits/job.yaml --set store="$work/store" "${small[@]}"
    cp "$work"/store/reports/*/attribution.json "$work/wanted.json"
}

same_bytes() { # VOLUME: the job there is finished, and its values are the host's
    podman run --rm "${hardened[@]}" --volume "$1:/work:ro" --entrypoint sh "$image" \
        -c 'cat store/reports/*/attribution.json' > "$work/got.json"
    cmp "$work/wanted.json" "$work/got.json"
}

image_job() {
    podman run --rm "${hardened[@]}" --volume "$1:/work" "$image" "${job[@]}"
    same_bytes "$1"
}

stopped_job() {
    podman run --detach --name "$name" "${hardened[@]}" --volume "$name-halves:/work" "$image" \
        "${job[@]}"
    local values=0
    while ((values < 12)) && podman exec "$name" true; do
        values=$(podman exec "$name" find /work -path '*/runs/*.json' | wc -l) || true
        sleep 0.5
    done
    podman stop --time 60 "$name"
    podman logs "$name"
    podman inspect --format '{{.State.ExitCode}}' "$name" | tee "$work/code"
    [[ $(< "$work/code") == 75 ]]
    podman run --rm "${hardened[@]}" --volume "$name-halves:/work:ro" --entrypoint sh "$image" \
        -c 'test -d store/runs && ! ls store/reports/*/attribution.json'
}

check "base $base" docker/base.sh "$base"
check "build $image" build
check "user, entrypoint, labels" configured
check "no capability, privilege, network; nothing but /tmp can be written" confined
check "no compiler, no pip, no test" lean
check "no pip configuration, CA bundle or build folder in history and layers" discreet
check "the bill of materials lists what is installed, torch too" itemised
check "attr-batch doctor, native ops; MLflow's server" healthy
check "the digits job, shortened, on the host" host_job
check "the same job in the image: the same bytes" image_job "$name-whole"
check "podman stop in the middle: exit code 75, no report" stopped_job
check "run again: the same bytes" image_job "$name-halves"

PYTHONPATH=benchmarks "$(dirname "$host")/python" - "$out" \
    "$(podman image inspect --format '{{.Size}}' "$base")" \
    "$(podman image inspect --format '{{.Size}}' "$image")" "${rows[@]}" << 'E'
import json
import sys
from pathlib import Path

import measure

out, base, image, *rows = sys.argv[1:]
checks = [{"name": n, "seconds": int(s)} for n, s in zip(rows[::2], rows[1::2], strict=True)]
facts = {"base_mb": round(int(base) / 1e6), "image_mb": round(int(image) / 1e6)}
Path(out).write_text(json.dumps(measure.envelope(checks, **facts), indent=1) + "\n")
E
echo "wrote $out"

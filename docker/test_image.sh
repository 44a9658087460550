#!/usr/bin/env bash
# Builds the image, runs it as its own user on a new volume, asks it, kills it, starts it again and
# stops it. Exit code 0: all is well; 77: this machine can build no image, or reaches no packages.
# With Docker where an engine answers; else with buildah, as root, on Debian:
#
#     apt-get install buildah debootstrap crun procps && docker/test_image.sh
#
# IMAGE        the tag, which stays. Default: infuse:test
# BASE_IMAGE   what to build on. Default: the Dockerfile's; with buildah a Debian from debootstrap.
# TORCH_INDEX  where torch comes from. Default: the Dockerfile's; where that cannot be reached, PyPI
#              and what pip's own settings add to it.
# Arguments go to the build: docker/test_image.sh --layers
set -euo pipefail
cd "$(dirname "$0")/.."

image=${IMAGE:-infuse:test}
name=infuse-test-$$

say() { printf '== %s\n' "$*"; }
fail() { printf 'FAILED: %s\n' "$*" >&2; exit 1; }
skip() { printf 'SKIPPED: %s\n' "$*" >&2; exit 77; }
default_of() { sed -n "s/^ARG $1=//p" Dockerfile; }
json_list() { python3 -c 'import json, sys; print(*json.load(sys.stdin)[sys.argv[1]], sep="\n")' "$1"; }
reachable() { python3 -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=20)' "$1" 2> /dev/null; }

# Takes a file of models and what they answer.
ask() { python3 docker/check_server.py "http://127.0.0.1:$port" "$1" < "$work/keys.json"; }

wait_until_ready() {
    local begun=$SECONDS
    until reachable "http://127.0.0.1:$port/health/ready"; do
        runs || { log; fail 'it has ended'; }
        [ $((SECONDS - begun)) -lt 900 ] || { log; fail 'it is not ready after 900 s'; }
        sleep 1
    done
    say "ready in $((SECONDS - begun)) s"
}

if docker info > /dev/null 2>&1; then
    engine=docker
elif command -v buildah > /dev/null; then
    engine=buildah
else
    skip 'neither a Docker engine nor buildah is here'
fi
work=$(mktemp -d)
# shellcheck source=docker/engines/buildah.sh
. "docker/engines/$engine.sh"
trap 'clean; rm -rf "$work"' EXIT

prepare || skip "$engine can run no container here"
torch_index=${TORCH_INDEX:-$(default_of TORCH_INDEX)}
if [ -z "${TORCH_INDEX:-}" ] && ! reachable "$torch_index/torch/"; then
    torch_index=https://pypi.org/simple
fi
finds_packages "$torch_index" || skip 'a container here reaches no package index'
say "building $image with $engine on $base, torch from $torch_index"
begun=$SECONDS
build --build-arg "TORCH_INDEX=$torch_index" "$@" > "$work/build.log" 2>&1 \
    || { tail -n 40 "$work/build.log"; fail 'the image cannot be built'; }
say "built in $((SECONDS - begun)) s: $(size)"

say 'starting it without keys'
status=0
start_without_keys > "$work/refusal" 2>&1 || status=$?
grep --quiet -e '--allow-anonymous' "$work/refusal" \
    || { cat "$work/refusal"; fail "it does not say why it will not start (status $status)"; }
[ "$status" -ne 0 ] || fail 'it starts without keys'

say 'starting it with keys'
make_keys
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
start
wait_until_ready

[ "$(inside id -u)" = 10001 ] || fail 'it does not run as uid 10001'
mapfile -t health < <(config | python3 -c '
import json, sys
print(*json.load(sys.stdin)["Healthcheck"]["Test"][1:], sep="\n")')
inside "${health[@]}" || fail 'the health check does not pass'
inside cat /keys/keys.json > "$work/keys.json"
ask examples/adapters/expected.json

say 'uploading an adapter'
key=$(python3 -c 'import json, sys; print(json.load(sys.stdin)[0]["key"])' < "$work/keys.json")
inside infuse adapters add uploaded /opt/infuse/adapters/sentiment
inside grep -q uploaded /data/adapters/journal.jsonl || fail 'the upload is not in the volume'

say 'signing an adapter, and verifying it'
inside python -c '
import shutil
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import ec
key = ec.generate_private_key(ec.SECP256R1())
private = pem.PrivateFormat.PKCS8, pem.NoEncryption()
open("/data/release.key", "wb").write(key.private_bytes(pem.Encoding.PEM, *private))
public = pem.PublicFormat.SubjectPublicKeyInfo
open("/data/release.pub", "wb").write(key.public_key().public_bytes(pem.Encoding.PEM, public))
shutil.copytree("/opt/infuse/adapters/sentiment", "/data/signed")'
inside infuse adapters sign /data/signed --key /data/release.key
inside infuse adapters verify /data/signed --trusted-signers /data/release.pub

say 'killing it, and starting it on its volume'
kill_at_once
start
wait_until_ready
python3 -c '
import json, sys
print(json.dumps({"uploaded": json.load(sys.stdin)["sentiment"]}))' \
    < examples/adapters/expected.json > "$work/uploaded.json"
ask "$work/uploaded.json"

say 'stopping it'
begun=$SECONDS
stop || { log; fail 'it does not stop'; }
log > "$work/stopped"
grep --quiet 'Application shutdown complete' "$work/stopped" || { log; fail 'it was killed'; }
say "stopped in $((SECONDS - begun)) s"
found=$(strays)
[ -z "$found" ] || fail "it has written outside its volume and /tmp: $found"
say 'all is well'

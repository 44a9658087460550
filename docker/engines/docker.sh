# What test_image.sh asks of Docker. Uses: image, name, port, key.
# shellcheck shell=bash disable=SC2154

prepare() { base=${BASE_IMAGE:-$(default_of BASE_IMAGE)}; }
finds_packages() { :; } # a build says by itself what it cannot reach
build() { docker build --build-arg "BASE_IMAGE=$base" --tag "$image" "$@" .; }
size() { docker image inspect --format '{{.Size}} bytes' "$image"; }
config() { docker image inspect --format '{{json .Config}}' "$image"; }
start_without_keys() { docker run --rm "$image"; }

make_keys() {
    docker run --rm --user 0:0 --network none --volume "$PWD/docker/make_keys.py:/make_keys.py:ro" \
        --volume "$name-keys:/secrets/infuse" "$base" python3 /make_keys.py /secrets
}

start() {
    docker run --detach --name "$name" --init --read-only --tmpfs /tmp --cap-drop ALL \
        --publish "127.0.0.1:$port:8000" --env INFUSE_KEYS_FILE=/keys/keys.json \
        --volume "$name-data:/data" --volume "$name-keys:/keys:ro" "$image" > /dev/null
}

runs() { [ "$(docker inspect --format '{{.State.Running}}' "$name")" = true ]; }
inside() { docker exec --env "INFUSE_API_KEY=${key-}" "$name" "$@"; }
log() { docker logs "$name" 2>&1; }
stop() { docker stop --time 60 "$name" > /dev/null; }
kill_at_once() { docker rm --force "$name" > /dev/null; }
strays() { :; } # the container's own files are read-only

clean() {
    docker rm --force "$name" > /dev/null 2>&1 || true
    docker volume rm "$name-data" "$name-keys" > /dev/null 2>&1 || true
}

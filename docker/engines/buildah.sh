# What test_image.sh asks of buildah, where no Docker engine runs. Uses: image, name, port, key, work.
# Folders stand in for volumes, and the host's network for a published port.
# shellcheck shell=bash disable=SC2154
export BUILDAH_ISOLATION=chroot

# The base image is made from this machine's own Debian, where none is named. Fails where the machine
# forbids what a build does: mounts and chroot.
prepare() {
    local codename
    codename=$(. /etc/os-release && printf '%s' "$VERSION_CODENAME")
    base=${BASE_IMAGE:-localhost/infuse-test-base:$codename}
    if [ -z "${BASE_IMAGE:-}" ] && ! buildah inspect --type image "$base" > /dev/null 2>&1; then
        make_base "$codename" || return
    fi
    buildah from --name "$name" "$base" > /dev/null \
        && buildah run "$name" -- true \
        && buildah rm "$name" > /dev/null
}

make_base() {
    local codename=$1 mirror container
    # shellcheck disable=SC2016  # apt's own variables
    mirror=$(apt-get indextargets --format '$(CODENAME) $(REPO_URI)' 'Created-By: Packages' \
        | awk -v wanted="$codename" '$1 == wanted { print $2; exit }')
    echo "Making $base with debootstrap."
    if ! debootstrap --variant=minbase \
        --include=python3,python3-dev,python3-venv,python3-pip,ca-certificates "$codename" \
        "$work/base" "$mirror" > "$work/debootstrap.log"; then
        tail -n 20 "$work/debootstrap.log"
        return 1
    fi
    container=$(buildah from scratch) \
        && buildah add --quiet "$container" "$work/base" / > /dev/null \
        && buildah config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container" \
        && buildah commit --quiet --rm "$container" "$base" > /dev/null
}

# Whether pip finds packages, and torch in this index, from within a container.
finds_packages() {
    local torch_index=$1 status=0
    read_mounts
    buildah from --name "$name" "$base" > /dev/null
    {
        in_base python3 -m pip download --no-deps --dest /tmp/found uvicorn \
            && in_base python3 -m pip download --no-deps --dest /tmp/found \
                --index-url "$torch_index" "$(grep '^torch==' constraints.txt)"
    } > "$work/found.log" 2>&1 || status=$?
    buildah rm "$name" > /dev/null
    [ "$status" = 0 ] || tail -n 5 "$work/found.log"
    return "$status"
}

in_base() { buildah run --network host "${mounts[@]}" "$name" -- "$@"; }

read_mounts() {
    local mount
    mounts=()
    while read -r mount; do mounts+=(--volume "$mount"); done < <(pip_settings)
}

build() {
    read_mounts
    buildah bud --format docker --network host "${mounts[@]}" --build-arg "BASE_IMAGE=$base" \
        --tag "$image" "$@" .
}

# Mounts of this machine's own settings of pip and of the files that they name: for the time of the
# build only, so that none gets into the image.
pip_settings() {
    python3 - <<'PY'
import re, subprocess, sys
from pathlib import Path

mounts = {Path(path): path for path in ("/etc/pip.conf", "/etc/xdg/pip")}
for name in (".config/pip", ".pip"):
    mounts[Path.home() / name] = f"/root/{name}"
settings = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True)
for scheme, path in re.findall(r"(file://)?(/[^\s'\\,]+)", settings.stdout):
    # The pages of an index link to files beside it.
    named = Path(path).parent if scheme else Path(path)
    mounts[named] = str(named)
for source, target in mounts.items():
    if source.exists():
        print(f"{source}:{target}:ro")
PY
}

size() { buildah images --format '{{.Size}}' "$image"; }

config() {
    buildah inspect --type image "$image" \
        | python3 -c 'import json, sys; print(json.dumps(json.load(sys.stdin)["Docker"]["config"]))'
}

make_keys() {
    local container status=0
    container=$(buildah from "$base")
    mkdir -p "$work/secrets"
    buildah run --volume "$PWD/docker/make_keys.py:/make_keys.py:ro" \
        --volume "$work/secrets:/secrets" "$container" -- python3 /make_keys.py /secrets || status=$?
    buildah rm "$container" > /dev/null
    return "$status"
}

start_without_keys() {
    make_container
    buildah run "$name" -- "${entrypoint[@]}"
}

start() {
    make_container
    install --directory --owner=10001 --group=10001 "$work/data"
    set -m # a process group of its own
    run_with_volumes "${entrypoint[@]}" > "$work/log" 2>&1 &
    started=$!
    set +m
}

# buildah runs no ENTRYPOINT by itself, and would hide our folder behind the image's own VOLUME.
make_container() {
    if ! buildah inspect --type container "$name" > /dev/null 2>&1; then
        buildah from --name "$name" "$image" > /dev/null
        buildah config --volume /data- "$name"
    fi
    mapfile -t entrypoint < <(config | json_list Entrypoint)
}

run_with_volumes() {
    buildah run --network host --volume "$work/data:/data" --volume "$work/secrets/infuse:/keys:ro" \
        --env INFUSE_KEYS_FILE=/keys/keys.json --env "INFUSE_PORT=$port" \
        --env "INFUSE_URL=http://127.0.0.1:$port" --env "INFUSE_API_KEY=${key-}" "$name" -- "$@"
}

runs() { kill -0 -- "-$started" 2> /dev/null; }
inside() { run_with_volumes "$@"; }
log() { cat "$work/log"; }

# buildah passes no signal on.
stop() { kill -TERM "$(pgrep --pgroup "$started" --exact infuse)" && wait_for_the_end; }

# All its processes end with a container.
kill_at_once() { kill -KILL -- "-$started" && wait_for_the_end; }

wait_for_the_end() {
    local waited=0
    while runs; do
        if [ $((waited += 1)) -gt 60 ]; then return 1; fi
        sleep 1
    done
}

# What the server's user has written elsewhere than in the volume and in /tmp.
strays() {
    local root
    root=$(buildah mount "$name")
    find "$root" -xdev -uid 10001 -not -path "$root/data" -not -path "$root/data/*" \
        -not -path "$root/tmp/*"
    buildah umount "$name" > /dev/null
}

clean() {
    if [ -n "${started-}" ] && runs; then kill_at_once || true; fi
    buildah rm "$name" > /dev/null 2>&1 || true
}

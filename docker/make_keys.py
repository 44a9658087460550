"""Make the secrets of the compose file, once: API keys, and the password of Grafana's admin.

What exists stays as it is. Each file can be read by the user of its container only.
"""

import json
import os
import secrets
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Owners:
    """User ids in the images that read the files."""

    infuse: int = 10001
    prometheus: int = 65534
    grafana: int = 472


def make_keys(folder: Path, owners: Owners) -> None:
    """Write infuse/keys.json, prometheus/key and grafana/password in `folder`."""
    keys_file = folder / "infuse" / "keys.json"
    if not keys_file.exists():
        keys = [_key("admin", ["generate", "admin"]), _key("prometheus", ["metrics"])]
        _write(keys_file, json.dumps(keys, indent=2) + "\n", owners.infuse)
    by_name = {entry["name"]: entry["key"] for entry in json.loads(keys_file.read_text())}
    if "prometheus" in by_name:
        _write(folder / "prometheus" / "key", by_name["prometheus"], owners.prometheus)
    password_file = folder / "grafana" / "password"
    if not password_file.exists():
        _write(password_file, secrets.token_urlsafe(16), owners.grafana)


def _key(name: str, roles: list[str]) -> dict[str, object]:
    return {"name": name, "key": f"infuse-{secrets.token_urlsafe(32)}", "roles": roles}


def _write(path: Path, text: str, owner: int) -> None:
    """All of the file or nothing, and at no time readable by others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.new")
    unfinished.unlink(missing_ok=True)
    with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.chown(unfinished, owner, -1)
    unfinished.rename(path)


if __name__ == "__main__":
    make_keys(Path(sys.argv[1]), Owners())
    print("Read the API keys, and the password of Grafana's user admin:")
    print("  docker compose -f docker/compose.yaml exec infuse cat /keys/keys.json")
    print("  docker compose -f docker/compose.yaml exec grafana cat /keys/password")

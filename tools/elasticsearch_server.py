"""A real Elasticsearch on loopback for tests and benchmarks: Elastic's minimal server, as published for Maven.

python tools/elasticsearch_server.py fetch                 once: about 100 MB, kept in Maven's local repository
python tools/elasticsearch_server.py run --port 9200       start one without keys until Ctrl-C

Needs `mvn` to fetch, and Java 17 (Elasticsearch 8) or 21 and later (9) to run. It never runs as root: started by root,
it runs as `nobody`. It has no aggregations beyond the core, no scripts and only the core's analyzers.

with running(folder, security=True) as server: ...         server.url, server.kill(), server.start()
"""

import argparse
import base64
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VERSION = os.environ.get("ES_TEST_VERSION", "8.19.3")
PARTS = ("org", "elasticsearch", "distribution", "integ-test-zip", "elasticsearch")
USER, PASSWORD = "elastic", "of-a-test-server-only"
START_SECONDS = 180


def archive(version: str = VERSION) -> Path:
    """Return the path where Maven stores the server."""
    return Path.home() / ".m2" / "repository" / Path(*PARTS) / version / f"elasticsearch-{version}.zip"


def fetch(version: str = VERSION) -> Path:
    """Fetch the server with Maven unless it is there. RuntimeError says why it is not available."""
    if archive(version).is_file():
        return archive(version)
    if not shutil.which("mvn"):
        raise RuntimeError("mvn is not installed")
    group, name = ".".join(PARTS[:-1]), PARTS[-1]
    plugin = "org.apache.maven.plugins:maven-dependency-plugin:3.6.1:get"
    command = ["mvn", "-B", "-q", plugin, "-Dtransitive=false", f"-Dartifact={group}:{name}:{version}:zip"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if not archive(version).is_file():
        said = [line for line in (done.stdout + done.stderr).splitlines() if "ERROR" in line]
        raise RuntimeError(f"Maven: {said[0] if said else done.stderr[-300:]}")
    return archive(version)


def java(version: str = VERSION) -> Path | None:
    """Return the home of a Java that this server runs on; None if there is none."""
    least = 17 if version.startswith("8.") else 21
    found = [os.environ.get("ES_JAVA_HOME"), os.environ.get("JAVA_HOME"), *sorted(Path("/usr/lib/jvm").glob("*"))]
    if on_path := shutil.which("java"):
        found.append(Path(on_path).resolve().parent.parent)
    for home in filter(None, found):
        release = Path(home) / "release"
        number = re.search(r'JAVA_VERSION="(\d+)', release.read_text()) if release.is_file() else None
        if number and int(number[1]) >= least and (Path(home) / "bin" / "java").is_file():
            return Path(home)
    return None


def new_folder() -> Path:
    """Make an empty folder for a server, which `nobody` can enter: root's TMPDIR may be private."""
    base = Path(tempfile.gettempdir())
    while not base.stat().st_mode & 0o001:
        base = base.parent
    folder = Path(tempfile.mkdtemp(prefix="elasticsearch-", dir=base))
    folder.chmod(0o755)
    return folder


class Running:
    """A server's process, which can be killed and started again on the same data and port."""

    def __init__(self, folder: Path, port: int, home: Path, security: bool):
        self.folder, self.port, self.home, self.security = folder, port, home, security
        self.url = f"http://127.0.0.1:{port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start it, and wait until it answers. RuntimeError with the end of its log if it does not."""
        log = self.folder.parent / "server.log"
        nobody = pwd.getpwnam("nobody")
        user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []} if os.getuid() == 0 else {}
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "ES_JAVA_HOME": str(self.home),
            "ES_JAVA_OPTS": "-Xms512m -Xmx512m",
            "ES_TMPDIR": str(self.folder / "logs"),  # else it leaves folders behind
        }
        with log.open("ab") as out:
            command = [str(self.folder / "bin" / "elasticsearch")]
            self.process = subprocess.Popen(
                command, stdout=out, stderr=out, env=environment, start_new_session=True, **user
            )
        began = time.monotonic()
        while time.monotonic() - began < START_SECONDS:
            try:
                if self.ask("GET", "/_cluster/health?wait_for_status=yellow&timeout=5s")["status"] != "red":
                    return
            except (OSError, KeyError, ValueError):
                if self.process.poll() is not None:
                    break
            time.sleep(0.5)
        self.kill()
        raise RuntimeError(f"Elasticsearch did not start: {log.read_text(errors='replace')[-1500:]}")

    def kill(self) -> None:
        """Send SIGKILL, so that the server cannot clean up."""
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def ask(self, method: str, path: str, body: dict | None = None) -> dict:
        """Send one request as the superuser. OSError if it is refused."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)
        if self.security:
            request.add_header("Authorization", "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode())
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as error:
            raise OSError(f"{error.code} {error.read()[:500].decode(errors='replace')}") from error


@contextmanager
def running(folder: Path, port: int = 0, security: bool = False, version: str = VERSION) -> Iterator[Running]:
    """Run a server, and remove it and its data at the end. RuntimeError says why it cannot run.

    Args:
        folder: an empty one that any user may enter; the server and its data are put there.
        port: 0 = a free one.
        security: ask for a password: USER and PASSWORD. (It can make no API keys: their index needs an analyzer.)
    """
    if not archive(version).is_file():
        raise RuntimeError(f"no {archive(version).name}: python tools/elasticsearch_server.py fetch")
    if not (home := java(version)):
        raise RuntimeError(f"no Java that runs Elasticsearch {version}")
    with zipfile.ZipFile(archive(version)) as packed:
        for entry in packed.infolist():
            path = packed.extract(entry, folder)
            os.chmod(path, (entry.external_attr >> 16) & 0o777 or 0o755)
    root = folder / f"elasticsearch-{version}"
    if not port:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        transport = probe.getsockname()[1]
    settings = {
        "discovery.type": "single-node",
        "network.host": "127.0.0.1",
        "http.port": port,
        "transport.port": transport,
        "xpack.security.enabled": str(security).lower(),
        "cluster.routing.allocation.disk.threshold_enabled": "false",
    }
    with (root / "config" / "elasticsearch.yml").open("a") as out:
        out.write("".join(f"{name}: {value}\n" for name, value in settings.items()))
    server = Running(root, port, home, security)
    if security:
        tool = str(root / "bin" / "elasticsearch-keystore")
        environment = {"PATH": os.environ["PATH"], "ES_JAVA_HOME": str(home), "HOME": str(root)}
        for command, given in ([tool, "create"], None), ([tool, "add", "-x", "bootstrap.password"], PASSWORD):
            subprocess.run(command, input=given, text=True, check=True, capture_output=True, env=environment)
    if os.getuid() == 0:
        nobody = pwd.getpwnam("nobody")
        for path in (root, *root.rglob("*")):
            os.chown(path, nobody.pw_uid, nobody.pw_gid)
    try:
        server.start()
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="A real Elasticsearch on loopback, for tests and benchmarks.")
    parser.add_argument("command", choices=("fetch", "run"))
    parser.add_argument("--port", type=int, default=9200)
    parser.add_argument("--version", default=VERSION)
    args = parser.parse_args()
    try:
        if args.command == "fetch":
            print(fetch(args.version))
            return 0
        folder = new_folder()
        with running(folder, args.port, version=args.version) as server:
            print(f"Elasticsearch {args.version}: {server.url}, until Ctrl-C", flush=True)
            signal.pause()
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

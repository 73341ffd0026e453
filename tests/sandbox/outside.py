"""What lies outside a room for a program to reach, and whether it was reached; also how a user without root gets a room."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from labkit.sandbox import Limits, Sandbox
from tests.sandbox import attempts

TIGHT = Limits(
    seconds=1.5,
    cpu_seconds=1,
    memory_mb=64,
    output_kb=64,
    disk_mb=8,
    processes=8,
    open_files=48,
    max_files=200,
)
TOKEN = "labkit-token-8d1f"
MARK = f"labkit-survivor-mark-{os.getpid()}"  # tests may run in several processes


class Outside:
    """Files, sockets and processes of the host, made for one run of attempts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.chmod(0o755)
        (folder / "secret").write_text("the secret")
        (folder / "open").mkdir()
        (folder / "open").chmod(0o777)
        for name in ("file", "victim", "victim2"):
            (folder / "open" / name).write_text("untouched")
            (folder / "open" / name).chmod(0o666)
        # Rooms of its own place: other processes of the same test run open and close theirs elsewhere.
        self.rooms = folder / "rooms"
        self.rooms.mkdir()
        self.rooms.chmod(0o777)
        self.temporary = os.environ.get("TMPDIR")
        os.environ["TMPDIR"] = str(self.rooms)
        self.before = self.state()
        self.listeners = [socket.socket(), socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)]
        self.listeners[0].bind(("127.0.0.1", 0))
        self.listeners[1].bind(str(folder / "unix"))
        (folder / "unix").chmod(0o777)
        self.abstract = f"labkit-{folder.name}"
        self.listeners[2].bind("\0" + self.abstract)
        for listener in self.listeners:
            listener.listen(50)
        self.victim = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"])
        self.inherited = os.open(folder / "secret", os.O_RDONLY)
        os.set_inheritable(self.inherited, True)
        self.memory = ctypes.create_string_buffer(b"secret!!")
        os.environ["LABKIT_TOKEN"] = TOKEN

    def close(self) -> None:
        self.victim.kill()
        self.victim.wait()
        for listener in self.listeners:
            listener.close()
        os.close(self.inherited)
        os.environ.pop("LABKIT_TOKEN", None)
        os.environ.pop("TMPDIR")
        if self.temporary is not None:
            os.environ["TMPDIR"] = self.temporary

    def told(self) -> str:
        """What a program is told about all this."""
        return json.dumps(
            {
                "secret": str(self.folder / "secret"),
                "home": os.path.expanduser("~") if os.geteuid() == 0 else str(self.folder),
                "open_folder": str(self.folder / "open"),
                "open_file": str(self.folder / "open" / "file"),
                "unix": str(self.folder / "unix"),
                "abstract": self.abstract,
                "port": self.listeners[0].getsockname()[1],
                "victim": self.victim.pid,
                "host": os.getpid(),
                "address": ctypes.addressof(self.memory),
                "token": TOKEN,
                "mark": MARK,
            }
        )

    def program(self, attempt: attempts.Attempt) -> str:
        return attempts.PRELUDE % self.told() + attempt.code

    def state(self) -> dict[str, tuple[str, int, int]]:
        """Content, mode and time of every file within reach."""
        out = {}
        for path in sorted((self.folder / "open").rglob("*")):
            found = path.stat()
            out[path.name] = (path.read_text(), found.st_mode, int(found.st_mtime))
        return out

    def harm(self) -> list[str]:
        """What a program has done outside, in words; empty when nothing."""
        out = []
        if self.state() != self.before:
            out.append(f"files changed: {self.state()}")
        if self.victim.poll() is not None:
            out.append(f"a process of the host ended: {self.victim.returncode}")
        elif Path(f"/proc/{self.victim.pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt":
            out.append("a process of the host is stopped")
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if MARK.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                    out.append(f"process {pid} outlived its room")
        return out + [f"folder {path.name} was left behind" for path in self.rooms.iterdir()]


@contextlib.contextmanager
def outside():
    """A folder that everybody can reach, with what lies in it; gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="labkit-outside-", dir="/tmp"))
    place = Outside(folder)
    try:
        yield place
    finally:
        place.close()
        shutil.rmtree(folder, ignore_errors=True)


def judged(box: Sandbox, attempt: attempts.Attempt, place: Outside) -> list[str]:
    """What went wrong in holding an attempt; empty when it was held."""
    result = box.run(place.program(attempt), limits=TIGHT, stdin=attempt.stdin)
    wrong = place.harm()
    if "ESCAPED" in result.stdout or "ESCAPED" in result.stderr:
        wrong.append(next(line for line in (result.stdout + result.stderr).splitlines() if "ESCAPED" in line))
    if not result.stdout.startswith("TRIED") and result.status != "output":
        wrong.append(f"was never tried: {result}")
    if result.status not in attempt.statuses:
        wrong.append(f"status {result.status}, not one of {attempt.statuses}: {result}")
    if result.isolation != box.kind:
        wrong.append(f"isolation {result.isolation}")
    return wrong


def as_guest(folder: Path, kinds: list[str]) -> dict[str, dict[str, list[str]]]:
    """Run all attempts as a user without root, by a copy of the package that such a user can read."""
    from labkit.sandbox.jail.warden import reachable
    from labkit.sandbox.languages import interpreters

    python = next((path for path in interpreters() if reachable(path)), None)
    if python is None:
        return {}
    root = Path(__file__).resolve().parents[2]
    for name in ("labkit/__init__.py", "labkit/_lazy.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, folder / name)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(root / "labkit/sandbox", folder / "labkit/sandbox", ignore=ignore)
    (folder / "tests").mkdir()
    (folder / "tests/__init__.py").touch()
    shutil.copytree(root / "tests/sandbox", folder / "tests/sandbox", ignore=ignore)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    done = subprocess.run(
        [python, "-m", "tests.sandbox.outside", *kinds],
        cwd=folder,
        env={
            "PATH": "/usr/bin:/bin",
            "HOME": "/nonexistent",
            "TMPDIR": "/tmp",
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        capture_output=True,
        text=True,
        user=54321 if os.geteuid() == 0 else None,
        group=54321 if os.geteuid() == 0 else None,
        extra_groups=[] if os.geteuid() == 0 else None,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout)


def main() -> None:
    from labkit.sandbox import SandboxUnavailable

    out: dict[str, dict[str, list[str]]] = {}
    with outside() as place:
        for kind in sys.argv[1:]:
            try:
                box = Sandbox(kind)  # type: ignore[arg-type]
            except SandboxUnavailable as error:
                out[kind] = {"unavailable": [str(error)]}
                continue
            out[kind] = {attempt.name: judged(box, attempt, place) for attempt in attempts.ALL}
    print(json.dumps(out))


if __name__ == "__main__":
    main()

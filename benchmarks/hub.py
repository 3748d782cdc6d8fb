"""Shows what a merge from the Hub to the Hub costs: time, memory, bytes, requests, disk.

    python benchmarks/hub.py [--size tiny|quarter] [--shard-size 40MB]

Starts the tests' Hub on this machine, puts two models there, and averages them into a third repo,
which is then compared with a merge of the same models into a folder. Memory is what the process
holds: resident pages, and those of its anonymous file, which are no part of them. Linux is needed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from report import mib, save, table
from runs import MERGE, models

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.hub import TOKEN, Hub

HEAD = (
    "route",
    "wall s",
    "peak MiB",
    "over base MiB",
    "file MiB",
    "read MiB",
    "sent MiB",
    "requests",
    "resolves",
    "disk MiB",
)
PAUSE = 0.01  # seconds between looks at the process
BASE = "import torch, time, sys; print(flush=True); sys.stdin.read()"


@dataclass(slots=True)
class Cost:
    """What one process took. held: the largest sum of resident pages and anonymous files."""

    wall: float = 0.0
    held: int = 0
    file: int = 0  # the most of the anonymous file alone
    read: int = 0
    sent: int = 0
    requests: int = 0
    resolves: int = 0
    disk: int = 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure a merge from the Hub to the Hub.")
    add = parser.add_argument
    add("--size", choices=("tiny", "quarter"), default="quarter")
    add("--shard-size", default="40MB")
    add("--models", type=Path, default=Path(tempfile.gettempdir()) / "merge-benchmarks")
    add("--name", help="of the results, else hub-SIZE")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    folders = models(args.models, args.size, finetunes=1)
    weights = sum(f.stat().st_size for folder in folders for f in folder.glob("*.safetensors"))
    base = baseline()
    rows, every = [], {}
    with tempfile.TemporaryDirectory(prefix="merge-hub-") as place:
        work = Path(place)
        for route, xet in (("LFS", None), ("xet", f"local://{work}/store")):
            with Hub(work / f"hub-{route}", xet=xet) as hub:
                for name, folder in zip(("base", "tuned"), folders, strict=True):
                    hub.upload(f"org/{name}", folder)
                cost = run(hub, work / route, args.shard_size, xet is not None)
                if xet is None:
                    compare(hub, work, args.shard_size)
            every[route] = asdict(cost)
            over = cost.held - base
            sizes = [mib(n) for n in (cost.held, over, cost.file, cost.read, cost.sent)]
            counts = [str(cost.requests), str(cost.resolves)]
            rows.append([route, f"{cost.wall:.1f}", *sizes, *counts, f"{cost.disk / 2**20:.2f}"])
    text = (
        f"{table(HEAD, rows)}\n\nTwo models of {mib(weights / 2)} MiB ({args.size}), shards of"
        f" {args.shard_size}. The interpreter with torch alone: {mib(base)} MiB. With xet the bytes"
        " go into a store beside the server, which does not count them.\nThe repo is equal, bit for"
        " bit, to a merge into a folder."
    )
    print(text)
    data = {"size": args.size, "weights": weights, "base": base, "runs": every}
    save(args.name or f"hub-{args.size}", "From the Hub to the Hub", text, data)


def run(hub: Hub, home: Path, shard_size: str, xet: bool) -> Cost:
    """One merge in a process of its own, in an empty folder with an empty cache."""
    home.mkdir()
    (home / "tmp").mkdir()
    recipe = write_recipe(home)
    environment = environment_of(hub, home, xet)
    command = [*MERGE, "apply", str(recipe), "--push", "me/merged", "--shard-size", shard_size]
    hub.forget()
    cost = Cost()
    start = time.perf_counter()
    child = subprocess.Popen(
        [*command, "--json"],
        env=environment,
        cwd=home,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while child.poll() is None:
        resident, anonymous = held(child.pid)
        cost.held = max(cost.held, resident + anonymous)
        cost.file = max(cost.file, anonymous)
        time.sleep(PAUSE)
    cost.wall = time.perf_counter() - start
    if child.returncode:
        assert child.stderr is not None
        raise SystemExit(child.stderr.read()[-4000:])
    cost.read, cost.sent = hub.sent("GET /blob/"), hub.received("PUT /upload/")
    cost.requests = len(hub.requests)
    cost.resolves = max(Counter(r.path for r in hub.seen("/resolve/.*safetensors$")).values())
    cost.disk = sum(p.stat().st_size for p in home.rglob("*") if p.is_file() and not p.is_symlink())
    return cost


def write_recipe(home: Path) -> Path:
    rows = "".join(
        f"  - {{model: org/{n}, parameters: {{weight: 0.5}}}}\n" for n in ("base", "tuned")
    )
    path = home / "mean.yml"
    path.write_text(f"merge_method: linear\nmodels:\n{rows}")
    return path


def environment_of(hub: Hub, home: Path, xet: bool) -> dict[str, str]:
    return os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(home / "hf"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "0" if xet else "1",
        "HF_XET_CACHE": str(home / "hf" / "xet"),
        "TMPDIR": str(home / "tmp"),
    }


def compare(hub: Hub, work: Path, shard_size: str) -> None:
    """End with an error unless the repo holds what a merge into a folder writes."""
    home = work / "local"
    home.mkdir()
    recipe, out = write_recipe(home), home / "out"
    command = [*MERGE, "apply", str(recipe), str(out), "--shard-size", shard_size, "-q"]
    subprocess.run(command, env=environment_of(hub, home, False), cwd=home, check=True)
    there = hub.files("me/merged")
    here = {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    wrong = sorted(n for n in {*there, *here} if there.get(n) != here.get(n))
    if wrong:
        raise SystemExit(f"the repo and the folder differ in {', '.join(wrong)}")
    shutil.rmtree(home)


def held(pid: int) -> tuple[int, int]:
    """Bytes of resident pages of a process, and of the anonymous files that it has open."""
    resident = anonymous = 0
    seen = set()
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        resident = pages * os.sysconf("SC_PAGE_SIZE")
        for link in Path(f"/proc/{pid}/fd").iterdir():
            if str(link.readlink()).startswith("/memfd:"):
                info = link.stat()
                if info.st_ino not in seen:
                    seen.add(info.st_ino)
                    anonymous += info.st_blocks * 512
    except OSError:  # it is over, or that file is
        pass
    return resident, anonymous


def baseline() -> int:
    """Bytes that a process holds which has torch imported and does nothing."""
    command: Sequence[str] = [sys.executable, "-c", BASE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdin is not None
        child.stdout.readline()
        found = held(child.pid)[0]
        child.stdin.close()
    return found


if __name__ == "__main__":
    main()

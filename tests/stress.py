"""Kill a real training run at random moments, saves included, until it has survived enough, and compare the bits.

    python tests/stress.py --kills 50

Not part of the ordinary tests: it takes some minutes. A run is made in peace; others like it are ended by SIGKILL
again and again and continued by `--resume`, until there were enough kills; then their checkpoints, tables and summaries
must hold the same bits. Every third kill waits for a save and strikes within it.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import SMALL_RUN, run, start
from test_resume import differences

RUN = [*SMALL_RUN, "--epochs", "20", "--select", "loss", "--no-test", "--resume", "--output-dir"]
LONGEST_WAIT = 6.0  # seconds before a kill


def saving(folder: Path) -> bool:
    """Whether a save is in progress: a temporary file is there, or last.pt is newer than the table that follows it."""
    if list(folder.glob(".*.tmp")):
        return True
    try:
        return (folder / "last.pt").stat().st_mtime_ns > (folder / "metrics.csv").stat().st_mtime_ns
    except FileNotFoundError:  # before the first save, or between two calls
        return (folder / "last.pt").exists()


def wait_and_kill(process: subprocess.Popen, folder: Path, chance: random.Random, in_a_save: bool) -> None:
    """Kill the process at a random moment or within its next save, unless it ends before that."""
    process.stdout.readline()  # it has been imported
    deadline = time.monotonic() + chance.uniform(0, LONGEST_WAIT)
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    if in_a_save:
        while process.poll() is None and not saving(folder):
            time.sleep(0.0002)
        time.sleep(chance.uniform(0, 0.02))  # anywhere within it
    process.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="kills to survive (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    options = parser.parse_args()
    chance, kills, resumes, saves_hit, runs, different = random.Random(options.seed), 0, 0, 0, 0, 0
    with tempfile.TemporaryDirectory(prefix="stress-") as scratch:
        cwd = Path(scratch)
        whole = run(*RUN, "whole", cwd=cwd, timeout=3600)
        if whole.returncode:
            sys.exit(whole.stderr)
        ended = False
        while kills < options.kills or not ended:
            folder = cwd / f"run{runs}"
            resumes += (folder / "last.pt").exists()
            process = start(*RUN, folder.name, cwd=cwd)
            if kills < options.kills:
                wait_and_kill(process, folder, chance, in_a_save=kills % 3 == 2)
            _, err = process.communicate()
            if process.returncode > 0:
                sys.exit(f"resuming failed after {kills} kills: {err}")
            ended = process.returncode == 0
            if ended:
                runs += 1
                unequal = differences(folder, cwd / "whole")
                different += bool(unequal)
                print(f"{folder.name} is finished, differences: {', '.join(unequal) or 'none'}", flush=True)
            else:
                kills += 1
                saves_hit += saving(folder)
    print(f"{kills} kills, {resumes} resumes, {saves_hit} saves hit, {runs} runs, {different} with differences")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())

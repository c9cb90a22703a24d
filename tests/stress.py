"""Kill a real training run at random moments until it has survived enough, and compare the bits.

    python tests/stress.py --kills 50

Takes some minutes. One run is left in peace; others like it are ended by SIGKILL and continued by
--resume, until there were enough kills. Every third kill waits for a save and strikes within it.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import ROOT, run, start
from PIL import Image
from test_resume import differences

RUN = "--dataset small --val-size 100 --batch-size 30 --epochs 20 --dropout 0.1 --select loss"
RUN = [*RUN.split(), "--compile", "off", "--no-test", "--resume", "--output-dir"]
LONGEST_WAIT = 6.0  # seconds before a kill


def make_small(folder: Path) -> None:
    """Of each class in data/mini the first row as pictures: 20 for training, 10 for the test."""
    for sheet in sorted((ROOT / "data" / "mini").glob("*/*.png")):
        (target := folder / sheet.parent.name / sheet.stem).mkdir(parents=True)
        with Image.open(sheet) as pixels:
            for x in range(0, pixels.width, 32):
                pixels.crop((x, 0, x + 32, 32)).save(target / f"{x:03}.png")


def saving(folder: Path) -> bool:
    """Whether a save is in progress: a temporary file, or last.pt newer than its table."""
    try:
        last, table = ((folder / name).stat().st_mtime_ns for name in ("last.pt", "metrics.csv"))
        return last > table or any(folder.glob(".*.tmp"))
    except FileNotFoundError:  # before the first save is complete
        return folder.exists()


def wait_and_kill(process: subprocess.Popen, folder: Path, chance: random.Random, in_a_save: bool):
    """Kill the process at a random moment or within its next save, unless it ends before that."""
    for left_over in folder.glob(".*.tmp"):  # of the process that was killed before
        left_over.unlink()
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
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="kills to survive (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    options = parser.parse_args()
    chance, kills, saves_hit, runs, different = random.Random(options.seed), 0, 0, 0, 0
    with tempfile.TemporaryDirectory(prefix="stress-") as scratch:
        cwd, ended = Path(scratch), False
        make_small(cwd / "small")
        whole = run(*RUN, "whole", cwd=cwd, timeout=3600)
        if whole.code:
            sys.exit(whole.err)
        while kills < options.kills or not ended:
            folder = cwd / f"run{runs}"
            process = start(*RUN, folder.name, cwd=cwd)
            if kills < options.kills:
                wait_and_kill(process, folder, chance, in_a_save=kills % 3 == 2)
            _, err = process.communicate()
            if process.returncode > 0:
                sys.exit(f"resuming failed after {kills} kills: {err}")
            if ended := process.returncode == 0:
                runs += 1
                unequal = differences(folder, cwd / "whole")
                different += bool(unequal)
                print(f"{folder.name} is finished, differences: {unequal or 'none'}", flush=True)
            else:
                kills += 1
                saves_hit += saving(folder)
    print(f"{kills} kills, {saves_hit} within a save, {runs} runs, {different} with differences")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())

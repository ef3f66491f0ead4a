"""A second opening (median of 5) of as many clips as Something-Something v2 has: seconds and memory."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.report import line, run
from workbench.datasets.cache import FORMAT, CacheSettings, cache_folders, save_array, write_broken
from workbench.datasets.frames import scan_source
from workbench.datasets.splits import stable_hash

CLIPS, FRAMES, SIZE = {"train": 168_913, "validation": 24_777, "test": 27_157}, (12, 70), 8
MAX_SECONDS, MAX_GB = 2.0, 1.0

OPEN = """
import json, resource, sys, time
from workbench.datasets.clips import ClipsConfig, open_clips
config = ClipsConfig(**json.loads(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.perf_counter()
clips = open_clips(config)
seconds = time.perf_counter() - started
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([seconds, before / 1e6, after / 1e6, clips.report["clips"], clips.report["frames"]]))
"""


def main() -> None:
    """Generate the folder, its labels and its finished cache, and open it in a fresh process."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        names = write_source(folder / "clips", folder / "labels")
        write_cache(folder / "clips", folder / "cache", names)
        config = {"data": str(folder / "clips"), "image_size": SIZE, "cache_dir": str(folder / "cache")}
        pairs = {"labels": str(folder / "labels"), "pair_offset": 5}
        for what, more in {"single frames, split by hash": {}, "pairs, official split": pairs}.items():
            openings = [reopen(config | more) for _ in range(5)]
            seconds = float(np.median([opening[0] for opening in openings]))
            _, before, after, clips, frames = np.max(openings, axis=0)
            about = f"{clips:,.0f} clips, {frames / 1e6:.1f} M frames: {what}"
            line(about, f"{seconds:.2f} s", f"{MAX_SECONDS} s", seconds <= MAX_SECONDS)
            line(
                f"  largest memory of the process ({before:.2f} GB imports)",
                f"{after:.2f} GB",
                f"{MAX_GB} GB",
                after <= MAX_GB,
            )


def reopen(config: dict[str, str | int]) -> list[float]:
    """Seconds of opening, GB at most before and after it, clips, frames."""
    command = [sys.executable, "-c", OPEN, json.dumps(config)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def write_source(folder: Path, labels: Path) -> list[str]:
    """A folder of empty files named as the videos are, and their label files; nothing of it is decoded."""
    folder.mkdir()
    labels.mkdir()
    names = [str(i + 1) for i in range(sum(CLIPS.values()))]
    for name in names:
        (folder / f"{name}.webm").touch()
    rest = iter(names)
    for split, count in CLIPS.items():
        entries = [{"id": next(rest)} for _ in range(count)]
        if split != "test":
            more = {"template": "Pushing [something] from left to right", "placeholders": ["a cup"]}
            entries = [
                entry | {"label": f"pushing cup {i} from left to right"} | more for i, entry in enumerate(entries)
            ]
        (labels / f"something-something-v2-{split}.json").write_text(json.dumps(entries))
    return names


def write_cache(source: Path, cache_dir: Path, names: list[str]) -> None:
    """The finished cache of the folder, its pixels a hole in the file."""
    clips = scan_source(source)
    names = [entry.removesuffix(".webm") for entry, _, _ in clips]
    folder, _ = cache_folders(source, cache_dir, CacheSettings(SIZE), clips)
    folder.mkdir(parents=True)
    length = np.random.default_rng(0).integers(*FRAMES, len(names))
    start = np.concatenate([[0], np.cumsum(length)])
    slots = int(start[-1])
    save_array(folder / "start.npy", start)
    save_array(folder / "number.npy", np.arange(slots) - np.repeat(start[:-1], length))
    save_array(folder / "names.npy", np.array([name.encode() for name in names]))
    save_array(folder / "hashes.npy", stable_hash(names))
    save_array(folder / "crc.npy", np.zeros(len(names), np.uint32))
    write_broken(folder / "broken.csv", [])
    with (folder / "frames.u8").open("wb") as handle:
        handle.truncate(slots * SIZE**2 * 3)
    meta = {"format": FORMAT, "image_size": SIZE, "clips": len(names), "slots": slots, "fingerprint": "generated"}
    counts = dict.fromkeys(("broken_frames", "broken_clips", "grey_frames"), 0)
    (folder / "cache.json").write_text(json.dumps(meta | counts))


if __name__ == "__main__":
    sys.exit(run(main))

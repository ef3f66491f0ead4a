"""What a result was computed from: the weights and the data it looked at, and whether they are still those."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workbench.runs import Run, RunError, weights_file


def describe_source(path: Path, checkpoint: str) -> dict[str, str]:
    """Weights a run looks at, to be recorded as its `source`, or one of its `sources`: run, file and hash."""
    file = weights_file(checkpoint)
    return {"run": path.name, "file": file, "weights": file_digest(path / file)}


def check_source(run: Run) -> None:
    """Refuse a run whose figures belong to weights that are no longer those of its sources.

    Raises:
        RunError: a recorded source has other weights now, or none.
    """
    config = run.config
    for source in [*([config["source"]] if "source" in config else []), *config.get("sources", [])]:
        weights = run.path.parent / source["run"] / source["file"]
        found = file_digest(weights) if weights.exists() else "absent"
        if found != source["weights"]:
            raise RunError(
                f"{run.path} was computed from other weights: {weights} was {source['weights']} and is {found}; give "
                "another `run` name, or move the folder away"
            )


def check_same_data(path: Path, config: Mapping[str, Any], fingerprint: str) -> None:
    """Refuse data that are not those a model was trained on: held-out samples might have been trained on.

    Raises:
        RunError: clips, pixels, split or conditions have changed since.
    """
    trained = config["data"]["fingerprint"]
    if trained != fingerprint:
        raise RunError(
            f"{path} was trained on other data or another split (fingerprint {trained}, now {fingerprint}): put the "
            "data back as they were, or train a run on them (conditions that bring ids of their own make another "
            "split: give them when the VAE is trained)"
        )


def file_digest(path: Path) -> str:
    """Hash of a file's content, to say which weights a result was computed from."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=8)).hexdigest()

"""A result is refused where the weights or the data it came from have changed."""

from pathlib import Path

import pytest

from workbench.provenance import check_same_data, check_source, describe_source, file_digest
from workbench.runs import Run, RunError, open_run


@pytest.fixture
def walk(tmp_path: Path) -> Run:
    vae = open_run({"experiment": "e", "run": "vae"}, tmp_path).path
    (vae / "checkpoints").mkdir()
    (vae / "model.safetensors").write_bytes(b"final")
    (vae / "checkpoints" / "best.ckpt").write_bytes(b"best")
    return open_run({"experiment": "e", "run": "walk"}, tmp_path)


@pytest.mark.parametrize(("checkpoint", "file"), [("final", "model.safetensors"), ("best", "checkpoints/best.ckpt")])
def test_the_weights_looked_at_must_still_be_there(walk: Run, checkpoint: str, file: str) -> None:
    vae = walk.path.parent / "vae"
    source = describe_source(vae, checkpoint)
    assert source == {"run": "vae", "file": file, "weights": file_digest(vae / file)}
    walk.record(source=source)
    check_source(walk)
    (vae / file).write_bytes(b"others")
    with pytest.raises(RunError, match=f"walk was computed from other weights: {vae / file} was {source['weights']}"):
        check_source(walk)
    (vae / file).unlink()
    with pytest.raises(RunError, match="is absent; give another `run` name"):
        check_source(walk)


def test_all_of_several_sources_must_still_be_there(walk: Run) -> None:
    vae = walk.path.parent / "vae"
    walk.record(sources=[describe_source(vae, checkpoint) for checkpoint in ("final", "best")])
    check_source(walk)
    (vae / "checkpoints" / "best.ckpt").write_bytes(b"others")
    with pytest.raises(RunError, match="walk was computed from other weights: .*best.ckpt was .* and is"):
        check_source(walk)


def test_a_run_without_a_source_needs_none(walk: Run) -> None:
    check_source(walk)
    assert "source" not in walk.config


def test_other_data_than_those_of_the_training_are_refused(tmp_path: Path) -> None:
    config = {"data": {"name": "pushing", "fingerprint": "a1"}}
    check_same_data(tmp_path / "vae", config, "a1")
    with pytest.raises(RunError, match=r"vae was trained on other data or another split \(fingerprint a1, now b2\)"):
        check_same_data(tmp_path / "vae", config, "b2")

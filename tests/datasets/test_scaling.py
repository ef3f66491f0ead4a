import hashlib
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from workbench.datasets import cache
from workbench.datasets import scaling as scaling_module
from workbench.datasets.frames import DataError
from workbench.datasets.scaling import (
    DEVIATION,
    REACH,
    Scaling,
    Statistics,
    describe_fields,
    file_stamp,
    fit_scaling,
    stamp_name,
)

TRAIN = np.array([True, True, False, True, False, True, True])
IDS = [f"r{i}" for i in range(7)]


def fields(seed: int = 0, nodes: int = 5, variables: int = 2) -> np.ndarray:
    """Runs (7, 4, n, v) whose nodes and variables differ in place and size."""
    random = np.random.default_rng(seed)
    size = 10.0 ** np.arange(variables) * np.linspace(1, 3, nodes)[:, None]
    return (random.standard_normal((7, 4, nodes, variables)) * size + 5 * size).astype(np.float32)


def described(values: np.ndarray, cached: Path, train: np.ndarray = TRAIN, **more) -> Statistics:
    return describe_fields(lambda runs: values[runs], train, IDS, values[0].nbytes, cached, **more)


def as_field(x: torch.Tensor, variables: int) -> np.ndarray:
    """x (b, vn, t) as (b, t, n, v), by hand: the first n channels are the first variable's nodes."""
    return np.stack(np.split(x.numpy(), variables, axis=1), -1).swapaxes(1, 2)


# one pass


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_one_pass_finds_the_statistics_of_the_training_split_whatever_the_chunks(tmp_path, monkeypatch, chunk):
    values = fields()
    monkeypatch.setattr(scaling_module, "CHUNK_BYTES", chunk * values[0].nbytes)
    monkeypatch.setattr(scaling_module, "BLOCK", 15)  # one or two time steps of 10 values
    found, exact = described(values, tmp_path / "s.npz"), values[TRAIN].astype(np.float64)
    np.testing.assert_array_equal(found.low, exact.min((0, 1)))
    np.testing.assert_array_equal(found.high, exact.max((0, 1)))
    np.testing.assert_allclose(found.mean, exact.mean((0, 1)), rtol=1e-13)
    np.testing.assert_allclose(found.square, (exact**2).mean((0, 1)), rtol=1e-13)
    assert found.digest == hashlib.blake2b(values.tobytes(), digest_size=8).hexdigest()


def test_two_openings_at_one_time_make_one_pass(tmp_path, monkeypatch):
    """Runs of a sweep open the same data side by side."""
    values, waiting, passes, found = fields(), threading.Event(), [], []
    one_pass, flock = scaling_module._pass, cache.fcntl.flock
    second = threading.Thread(target=lambda: found.append(described(values, tmp_path / "s.npz")))

    def watched(handle, mode: int) -> None:
        if not mode & cache.fcntl.LOCK_NB:
            waiting.set()
        flock(handle, mode)

    def met(*arguments) -> Statistics:
        passes.append(1)
        second.start() if len(passes) == 1 else waiting.set()
        assert waiting.wait(60)
        return one_pass(*arguments)

    monkeypatch.setattr(cache.fcntl, "flock", watched)
    monkeypatch.setattr(scaling_module, "_pass", met)
    first = described(values, tmp_path / "s.npz")
    second.join(60)
    assert len(passes) == 1 and found[0].digest == first.digest


def test_a_damaged_file_of_statistics_is_refused_with_the_remedy(tmp_path):
    described(fields(), tmp_path / "s.npz")
    for damage in (b"", b"rubbish" * 9, (tmp_path / "s.npz").read_bytes()[:300]):
        (tmp_path / "s.npz").write_bytes(damage)
        with pytest.raises(DataError, match=f"^{tmp_path}/s.npz is damaged .*: delete it, and it is computed again$"):
            described(fields(), tmp_path / "s.npz")


def test_the_pass_reads_each_run_once_and_never_again(tmp_path):
    values, seen = fields(), []

    def read(runs: np.ndarray) -> np.ndarray:
        seen.extend(runs.tolist())
        return values[runs]

    first = describe_fields(read, TRAIN, IDS, values[0].nbytes, tmp_path / "s.npz")
    assert seen == list(range(7))
    second = describe_fields(read, TRAIN, IDS, values[0].nbytes, tmp_path / "s.npz")
    assert len(seen) == 7 and first.digest == second.digest
    for name in ("low", "high", "mean", "square"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("run", [0, 2])  # of the training split, and of another
def test_a_value_that_is_not_finite_is_named_and_counted_and_nothing_is_kept(tmp_path, value, run):
    values = fields(variables=1)
    values[run, 3, 2] = values[run, 3, 4] = values[5, 0, 0] = value
    where = rf"^the field of run 'r{run}' is not finite at node 12, time step 3 \(3 such values in 2 of 7 runs\); mend"
    with pytest.raises(DataError, match=where):
        described(values, tmp_path / "s.npz", first_node=10)
    assert list(tmp_path.glob("s.npz*")) == []


def test_of_several_variables_the_broken_one_is_named(tmp_path):
    values = fields(variables=3)
    values[1, 0, 4, 2] = np.nan
    with pytest.raises(DataError, match=r"'r1' is not finite at node 4, time step 0, variable 2 \(1 such"):
        described(values, tmp_path / "s.npz")


def test_an_error_of_the_reader_comes_through(tmp_path):
    def read(runs: np.ndarray) -> np.ndarray:
        raise DataError("the file is gone")

    with pytest.raises(DataError, match="^the file is gone$"):
        describe_fields(read, TRAIN, IDS, 10, tmp_path / "s.npz")


# scaling


def scaled(kind: str, values: np.ndarray, folder: Path) -> tuple[Scaling, np.ndarray]:
    """The scaling, and all runs scaled by it, (p, t, n, v)."""
    scaling = fit_scaling(kind, described(values, folder / f"{kind}.npz"))
    return scaling, as_field(scaling.apply(torch.from_numpy(values)), values.shape[3])


@pytest.mark.parametrize("kind", ["node", "global", "standard", "none"])
@pytest.mark.parametrize("variables", [1, 3])
def test_scaling_is_inverted(tmp_path, kind, variables):
    values = fields(variables=variables) / (1e4 if kind == "none" else 1)
    scaling = fit_scaling(kind, described(values, tmp_path / "s.npz"))
    field = torch.from_numpy(values)
    before = field.clone()
    x = scaling.apply(field)
    assert x.shape == (7, 5 * variables, 4) and x.is_contiguous() and torch.equal(field, before)
    torch.testing.assert_close(scaling.invert(x), field, rtol=1e-5, atol=1e-6 * float(field.abs().max()))


def test_applying_leaves_a_field_of_one_time_step_as_it_was():
    scaling = Scaling(torch.full((5, 1), 2.0), torch.full((5, 1), 4.0))
    field = torch.ones(2, 1, 5, 1)
    assert torch.equal(scaling.apply(field), torch.full((2, 5, 1), -0.25)) and torch.equal(
        field, torch.ones(2, 1, 5, 1)
    )


def test_a_gradient_passes_both_ways():
    scaling = Scaling(torch.rand(5, 2), torch.rand(5, 2) + 1)
    field = torch.rand(3, 4, 5, 2, requires_grad=True)
    scaling.apply(field).sum().backward()
    torch.testing.assert_close(field.grad, (1 / scaling.scale).expand(3, 4, 5, 2))
    x = torch.rand(3, 10, 4, requires_grad=True)
    scaling.invert(x).sum().backward()
    torch.testing.assert_close(x.grad, scaling.scale.T.reshape(1, 10, 1).expand(3, 10, 4))


def test_per_node_the_training_split_spans_exactly_the_reach(tmp_path):
    _, x = scaled("node", fields(), tmp_path)
    np.testing.assert_allclose(x[TRAIN].min((0, 1)), -REACH, rtol=1e-5)
    np.testing.assert_allclose(x[TRAIN].max((0, 1)), REACH, rtol=1e-5)


def test_globally_each_variable_spans_the_reach_and_its_nodes_keep_their_proportions(tmp_path):
    values = fields()
    scaling, x = scaled("global", values, tmp_path)
    np.testing.assert_allclose(x[TRAIN].min((0, 1, 2)), -REACH, rtol=1e-5)
    np.testing.assert_allclose(x[TRAIN].max((0, 1, 2)), REACH, rtol=1e-5)
    assert torch.equal(scaling.scale, scaling.scale[:1].expand(5, 2)) and scaling.scale[0, 1] > 5 * scaling.scale[0, 0]
    span = values[TRAIN].max((0, 1, 2)) - values[TRAIN].min((0, 1, 2))
    np.testing.assert_allclose(scaling.scale[0], span / (2 * REACH), rtol=1e-6)


def test_standard_gives_each_node_mean_zero_and_its_deviation(tmp_path):
    _, x = scaled("standard", fields(), tmp_path)
    np.testing.assert_allclose(x[TRAIN].mean((0, 1)), 0, atol=1e-5)
    np.testing.assert_allclose(x[TRAIN].std((0, 1)), DEVIATION, rtol=1e-5)


def test_none_changes_nothing_and_refuses_what_no_model_can_give(tmp_path):
    values = np.clip(fields(variables=1) / 30, -1, 1)
    values[0, 0, 0] = 1
    assert np.array_equal(scaled("none", values, tmp_path)[1], values)
    with pytest.raises(DataError) as error:
        fit_scaling("none", described(1.5 * values, tmp_path / "larger.npz"))
    assert str(error.value).startswith("scaling='none': the training split spans ")
    assert "to 1.5 when scaled, and a model's output lies in [-1, 1]; choose node or global" in str(error.value)


def test_standard_refuses_a_field_with_a_far_outlier(tmp_path):
    values = fields(variables=1)
    values[0, 0, 0] = 1e4
    with pytest.raises(DataError, match="scaling='standard': the training split spans .* choose node or global"):
        fit_scaling("standard", described(values, tmp_path / "outlier.npz"))


@pytest.mark.parametrize("kind", ["node", "standard"])
@pytest.mark.parametrize("level", [0.0, 3.0, -1e5 / 3])
def test_a_constant_node_becomes_zero_and_keeps_its_unit(tmp_path, kind, level):
    values = fields(variables=1)
    values[:, :, 1] = level
    values[2, 0, 1] = level + 2  # of a run that is not of the training split
    scaling, x = scaled(kind, values, tmp_path)
    assert (x[TRAIN][:, :, 1] == 0).all() and scaling.scale[1] == 1
    assert x[2, 0, 1, 0] == pytest.approx(2, rel=1e-3)
    np.testing.assert_allclose(scaling.invert(scaling.apply(torch.from_numpy(values))), values, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("kind", ["node", "global", "standard", "none"])
def test_only_the_training_split_decides(tmp_path, kind):
    values = fields() / (1e3 if kind == "none" else 1)
    other = values.copy()
    other[~TRAIN] *= 7
    one, two = (fit_scaling(kind, described(v, tmp_path / f"{i}.npz")) for i, v in enumerate((values, other)))
    assert torch.equal(one.offset, two.offset) and torch.equal(one.scale, two.scale)
    if kind != "none":
        other[0] *= 7
        assert not torch.equal(fit_scaling(kind, described(other, tmp_path / "3.npz")).scale, one.scale)


# stamps


def test_a_stamp_changes_with_a_file_and_with_what_lies_in_a_folder(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_bytes(b"12")
    stamps = [file_stamp(tmp_path / "a"), file_stamp(tmp_path / "a" / "b" / "c")]
    assert stamps[0] == stamps[1]
    (tmp_path / "a" / "b" / "c").write_bytes(b"123")
    assert file_stamp(tmp_path / "a") != stamps[0] and file_stamp(tmp_path / "a" / "b" / "c") != stamps[1]
    (tmp_path / "a" / "d").touch()
    assert len(file_stamp(tmp_path / "a")) == 2


def test_a_name_stands_for_its_values():
    assert stamp_name([1, "a"], 2) == stamp_name([1, "a"], 2) != stamp_name([1], "a", 2)
    assert len(stamp_name()) == 24

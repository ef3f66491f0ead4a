from pathlib import Path

import numpy as np
import pytest
import torch
from conditioned import SMALL, PictureData, conv_vae, hierarchical_vae, simulations
from explored import shown
from torch import nn

from workbench.checkpoints import save_model
from workbench.comparison import encode_split
from workbench.conditioning import ConditioningConfig, build_conditioner
from workbench.datasets.fields import Simulations
from workbench.latent_explorer import explore_run
from workbench.layers import Posterior
from workbench.models.conditioners import Conditioner
from workbench.predictions import Predictor, load_conditioner
from workbench.provenance import describe_source
from workbench.runs import Run, RunError, open_run, write_json
from workbench.spaces import Range

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Simulations:
    return simulations(tmp_path_factory.mktemp("fields"))


def conditioner_of(vae: nn.Module, data: Simulations) -> Conditioner:
    """An untrained one with the scales of the training split."""
    train = data.split("train")
    conditions = train.conditions(np.arange(len(train)))
    torch.manual_seed(0)
    model = build_conditioner(ConditioningConfig(**SMALL), vae, conditions[0]).eval()
    model.standardise(conditions, encode_split(vae, train, 16).mu)
    return model


@pytest.fixture(scope="module")
def conditioner(data: Simulations) -> Conditioner:
    return conditioner_of(hierarchical_vae().eval(), data)


def test_ranges_are_those_of_training_and_samples(
    data: Simulations, conditioner: Conditioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(data.units, "phase", "rad")
    samples = data.split("test")
    found = Predictor(conditioner, samples, data)
    train, own = (data.split(name).table()[["amplitude", "phase"]].to_numpy() for name in ("train", "test"))
    low, high = np.minimum(train.min(0), own.min(0)), np.maximum(train.max(0), own.max(0))
    assert found.ranges == [Range("amplitude", low[0], high[0]), Range("phase [rad]", low[1], high[1])]
    outside = [i for i, row in enumerate(own) if (row < train.min(0)).any() or (row > train.max(0)).any()]
    assert outside, "the wider range is put to the test"
    assert [found.own(i) for i in range(len(samples))] == [tuple(row) for row in own.tolist()]
    assert found.describe((1.0, 2.34567)) == "amplitude = 1, phase [rad] = 2.346"


def test_codes_are_the_conditioners_in_the_units_of_the_latent(data: Simulations, conditioner: Conditioner) -> None:
    found = Predictor(conditioner, data.split("test"), data)
    with torch.no_grad():
        standardised = conditioner(torch.tensor([[1.25, 0.75]]))[0]
    z = found.codes((1.25, 0.75))
    torch.testing.assert_close(z, standardised * conditioner.code_std + conditioner.code_mean)
    assert not torch.equal(z, found.codes((1.25, 0.8))) and not z.requires_grad
    batch = data.split("test").batch(np.array([3]))
    assert torch.equal(found.codes(found.own(3)), conditioner.codes(batch["condition"])[0].detach())
    with pytest.raises(ValueError, match="1 values of conditions: must be 2, one for each"):
        found.codes((1.25,))


def test_pictures_have_no_ranges() -> None:
    pictures = PictureData(drawn=True)
    pictures.condition_fingerprint = "known"
    config = ConditioningConfig(conditioner="cnn", width=4, depth=2)
    model = build_conditioner(config, conv_vae(), pictures.split("test")[0]["condition"])
    found = Predictor(model, pictures.split("test"), pictures)
    assert found.ranges == [] and found.own(2) == ()
    condition = pictures.split("test")[2]["condition"][None]
    assert torch.equal(found.own_codes(2), model.codes(condition)[0].detach())
    assert not torch.equal(found.own_codes(2), found.own_codes(1))
    with pytest.raises(ValueError, match="the conditions are pictures, which no slider makes"):
        found.codes(())


def test_data_without_conditions_predict_nothing(conditioner: Conditioner) -> None:
    with pytest.raises(ValueError, match="the data of this VAE have no conditions"):
        Predictor(conditioner, PictureData().split("test"), PictureData())


# --- runs ---


def save(run: Run, model: nn.Module, kind: str) -> None:
    run.record(model={"kind": kind} | model.config.model_dump())
    save_model(run.path / "model.safetensors", model, kind)


@pytest.fixture
def runs(data: Simulations, tmp_path: Path) -> tuple[Run, Run]:
    """A VAE with spectral norms, and a conditioner of its latents."""
    vae = hierarchical_vae().eval()
    run = open_run({"experiment": "e", "run": "v", "data_kind": "simulation"} | data.config.model_dump(), tmp_path)
    run.record(data={"fingerprint": data.fingerprint})
    save(run, vae, "hierarchical_vae")
    chosen = {"vae_run": "v", "checkpoint": "final", "conditions": "", "condition_field": ""}
    other = open_run({"experiment": "e", "run": "c"} | chosen, tmp_path)
    other.record(source=describe_source(run.path, "final"))
    other.record(data={"fingerprint": data.fingerprint, "conditions": data.condition_fingerprint})
    save(other, conditioner_of(vae, data), "mlp_conditioner")
    return run, other


def test_a_run_brings_its_vae_and_its_data(runs: tuple[Run, Run], data: Simulations, conditioner: Conditioner) -> None:
    loaded, vae, opened = load_conditioner(runs[1].path)
    values = (1.25, 0.75)
    z = Predictor(loaded, opened.split("test"), opened).codes(values)
    torch.testing.assert_close(z, Predictor(conditioner, data.split("test"), data).codes(values))
    assert opened.fingerprint == data.fingerprint
    with torch.inference_mode():
        torch.testing.assert_close(vae.decode(z[None]), hierarchical_vae().eval().decode(z[None]), atol=1e-5, rtol=1e-4)
        assert isinstance(vae.encode(opened.split("test")[0]["x"][None]), Posterior)
    assert not any(parameter.requires_grad for parameter in vae.parameters())


def test_the_page_predicts_from_what_its_sliders_say(
    runs: tuple[Run, Run], data: Simulations, conditioner: Conditioner
) -> None:
    widget, vae, samples = explore_run(runs[1].path, device="cpu"), hierarchical_vae().eval(), data.split("test")
    found = Predictor(conditioner, samples, data)
    assert [(c["name"], c["min"], c["max"]) for c in widget.conditions] == [tuple(range_) for range_ in found.ranges]
    for values in (found.own(0), (1.25, 0.75), (0.6, 1.9)):
        widget.set_state({"condition_values": list(values), "mode": "conditions"})
        with torch.inference_mode():
            x_hat = vae.decode(found.codes(values)[None])[0]
        assert np.abs(shown(widget).astype(int) - data.pixels(x_hat)).max() <= 2, "spectral norms are folded there"
        assert widget.panels[0]["caption"] == f"predicted from {found.describe(values)}" and widget.message == ""
        assert "over time" in [panel["title"] for panel in widget.panels]
    widget.set_state({"hover": 5, "mode": "hover"})
    assert tuple(widget.condition_values) == found.own(5)
    widget.set_state({"pin_a": 3, "mode": "pin"})
    assert tuple(widget.condition_values) == found.own(3)
    widget.set_state({"condition_values": [1.0], "mode": "conditions"})
    assert widget.message == "1 values of conditions: must be 2, one for each"
    assert widget.panels[0]["caption"] == f"A: sample {samples.name(3)}, decoded", "what was shown stays"


def test_the_page_begins_with_a_prediction(runs: tuple[Run, Run], data: Simulations) -> None:
    widget = explore_run(runs[1].path, device="cpu")
    assert widget.mode == "conditions" and widget.panels[0]["caption"].startswith("predicted from amplitude = ")
    assert tuple(widget.condition_values) == tuple(data.split("test").table()[["amplitude", "phase"]].to_numpy()[0])


def rewrite(run: Run, **entries: object) -> None:
    write_json(run.path / "config.json", run.config | entries)


def test_runs_that_are_no_longer_what_was_trained_are_refused(runs: tuple[Run, Run]) -> None:
    vae, other = runs
    whole = other.config
    with pytest.raises(RunError, match="v holds a model of kind 'hierarchical_vae': must be a conditioner"):
        load_conditioner(vae.path)
    rewrite(other, data=whole["data"] | {"conditions": "0" * 16})
    with pytest.raises(RunError, match=r"c was trained on other conditions \(fingerprint 0+, now .*put them back"):
        load_conditioner(other.path)
    rewrite(other, data=whole["data"])
    rewrite(vae, data={"fingerprint": "0" * 16})
    with pytest.raises(RunError, match="v was trained on other data or another split"):
        load_conditioner(other.path)
    (vae.path / "model.safetensors").unlink()
    with pytest.raises(RunError, match="c was computed from other weights: .*model.safetensors was .* and is absent"):
        load_conditioner(other.path)
    part = other.path / "parts" / "latent-0"
    part.mkdir(parents=True)
    write_json(part / "config.json", {key: value for key, value in whole.items() if key != "source"})
    (part / "model.safetensors").write_bytes((other.path / "model.safetensors").read_bytes())
    with pytest.raises(RunError, match="latent-0 is a part of a comparison, .*: take the run it is a part of"):
        load_conditioner(part)

"""Models of the same pairs of frames: trained side by side, resumed, loaded, and refused where they do not belong."""

import copy
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from tiny import Dies, metrics, sends
from torch import nn

from workbench.checkpoints import CheckpointError
from workbench.config import ConfigError
from workbench.datasets.clips import ClipDataset, Clips, ClipsConfig, open_clips
from workbench.datasets.frames import DataError
from workbench.datasets.opening import open_data
from workbench.models.conv_vae import ConvVAE, ConvVAEConfig
from workbench.models.laq import LAQ, LAQConfig
from workbench.models.laq_published import published_name
from workbench.process import Preempted
from workbench.provenance import file_digest
from workbench.rivals import Rival, RivalsConfig, first_seeds, load, log_of, objective_of, rivals, weighted_loss
from workbench.runs import Run, RunError, differences, load_run, open_run
from workbench.schedule import TrainConfig
from workbench.training import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
LAQ_SIZES = {"patch_size": 2, "dim": 12, "spatial_depth": 1, "temporal_depth": 1, "heads": 2, "dim_head": 4}
LAQ_SIZES |= {"codebook_size": 6, "code_dim": 5, "code_seq_len": 2}
VAE_SIZES = {"latent_dim": 3, "hidden_dims": [4, 6]}
TRAINING = {"seed": 3, "training_steps": 6, "batch_size": 8, "lr": 1e-3, "kl_weight": 1e-4, "device": "cpu"}
TRAINING |= {"checkpoint_every": 2, "log_every": 4, "images_every": 1000}
SETTINGS = {"experiment": "e", "run": "comparison", "vae_lr": 2e-3} | LAQ_SIZES | VAE_SIZES | TRAINING
EVERY = {"seeds": 2, "quantizers": ["nsvq", "continuous"], "kl_weights": [1e-4, 0.01]}
LAQ_RUN, VAE_RUN = "comparison/parts/laq-3", "comparison/parts/vae-3"
Trained = tuple[dict[str, Rival], dict[str, list[list[int]]]]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of 20 clips of 5 frames, in which a blurred pattern moves."""
    folder, rng = tmp_path_factory.mktemp("clips"), np.random.default_rng(0)
    for clip in range(20):
        path = folder / "data" / f"clip{clip:02d}"
        path.mkdir(parents=True)
        pattern = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((16, 16), Image.BILINEAR)
        for n in range(1, 6):
            Image.fromarray(np.roll(np.asarray(pattern), n, 1)).save(path / f"img_{n:05d}.png")
    places = {"data": str(folder / "data"), "cache_dir": str(folder / "cache"), "decode_workers": 1}
    return {"image_size": 16, "pair_offset": 2, "val_fraction": 0.2, "test_fraction": 0.2} | places


@pytest.fixture(scope="module")
def dataset(settings: dict[str, Any]) -> Clips:
    clips = open_clips(ClipsConfig(**settings))
    clips.pairs = lambda x, x_hat: Figure()  # the pictures take longer than the training
    return clips


@pytest.fixture
def changed(settings: dict[str, Any]) -> Iterator[Clips]:
    """The same clips, to which somebody has added conditions."""
    path = Path(settings["data"]) / "conditions.csv"
    path.write_text("clip,frame,x\n" + "".join(f"clip{c:02d},{n},{n}\n" for c in range(20) for n in range(1, 6)))
    yield open_clips(ClipsConfig(**settings))
    path.unlink()


def begin(folder: Path, dataset: Clips, **values: Any) -> tuple[dict[str, Any], Clips, Run]:
    parameters = SETTINGS | dataset.config.model_dump() | values
    return parameters, dataset, open_run(parameters, folder)


def compare(folder: Path, dataset: Clips, **values: Any) -> list[Rival]:
    return list(rivals(*begin(folder, dataset, **values)))


@pytest.fixture(scope="module")
def trained(one_thread: None, dataset: Clips, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """All models that can be asked for, and the training samples that each was shown, by part."""
    found, order, shown, read = {}, {}, [], ClipDataset.batch

    def batch(self: ClipDataset, indices: np.ndarray) -> dict[str, torch.Tensor]:
        if self is dataset.split("train"):
            shown.append(list(indices))
        return read(self, indices)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClipDataset, "batch", batch)
        for rival in rivals(*begin(tmp_path_factory.mktemp("outputs"), dataset, **EVERY)):
            found[Path(rival.source).name], order[Path(rival.source).name] = rival, shown[:]
            shown.clear()
    return found, order


@pytest.fixture
def outputs(trained: Trained, tmp_path: Path) -> Path:
    """A copy of the outputs folder with the comparison."""
    return shutil.copytree(Path(trained[0]["laq-3"].source).parents[3], tmp_path / "copy")


@pytest.fixture
def run(outputs: Path) -> Run:
    """A run beside the comparison."""
    return open_run({"experiment": "e", "run": "other"}, outputs)


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "train", lambda *_: pytest.fail("something was trained"))


@pytest.fixture
def batch(dataset: Clips) -> dict[str, torch.Tensor]:
    test = dataset.split("test")
    return test.prepare(test.batch([0, 1]))


def assert_same_weights(model: nn.Module, other: nn.Module) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], value) for key, value in theirs.items())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vae_run": "a", "vae_file": "b.pt"}, "vae_run='a' and vae_file='b.pt': give one of them"),
        ({"laq_run": "a", "laq_file": "b.pt"}, "laq_run='a' and laq_file='b.pt': give one of them"),
        ({"kl_weights": [0.1, 1.0, 0.1]}, "kl_weights=[0.1, 1.0, 0.1]: must all be different"),
        ({"kl_weights": [0.1, -1.0]}, "kl_weights=[0.1, -1.0]: must be finite and at least 0"),
        ({"kl_weights": [float("inf")]}, "kl_weights=[inf]: must be finite and at least 0"),
        ({"kl_weights": [float("nan")]}, "kl_weights=[nan]: must be finite and at least 0"),
        ({"quantizers": ["fsq", "fsq"]}, "quantizers=['fsq', 'fsq']: must all be different"),
        ({"quantizers": ["fsq", "vq"]}, "quantizers[1]='vq': must be 'nsvq', 'fsq' or 'continuous'"),
        ({"seeds": 0}, "seeds=0: must be at least 1"),
        ({"vae_lr": 0.0}, "vae_lr=0.0: must be more than 0"),
    ],
)
def test_settings_that_make_no_comparison_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        RivalsConfig(**values)


# --- trained here ---


def test_each_model_is_trained_once_for_as_many_samples(trained: Trained) -> None:
    """The quantizer and the weight of the KL that are the main ones are not trained twice."""
    assert [(part, rival.name, rival.seed, rival.setting) for part, rival in trained[0].items()] == [
        ("laq-3", "LAQ", 3, "nsvq"),
        ("laq-4", "LAQ", 4, "nsvq"),
        ("laq-continuous-3", "LAQ continuous", 3, "continuous"),
        ("vae-3", "VAE", 3, "kl_weight 0.0001"),
        ("vae-4", "VAE", 4, "kl_weight 0.0001"),
        ("vae-0.01-3", "VAE 0.01", 3, "kl_weight 0.01"),
    ]
    assert {path.name for path in Path(trained[0]["laq-3"].source).parent.iterdir()} == trained[0].keys()
    for rival in trained[0].values():
        assert rival.samples == 6 * 8 and rival.seconds > 0 and not rival.model.training and not rival.unit_scale
        assert rival.acts == rival.name.startswith("LAQ") == isinstance(rival.model, LAQ)
    assert not torch.equal(trained[0]["laq-3"].model.action_in.weight, trained[0]["laq-4"].model.action_in.weight)
    backwards = first_seeds(list(trained[0].values())[::-1])
    assert {name: rival.seed for name, rival in backwards.items() if rival.seed == 4} == {"VAE": 4, "LAQ": 4}


def test_models_of_one_seed_see_the_same_pairs_in_the_same_order(trained: Trained) -> None:
    order = trained[1]
    assert [len(batch) for batch in order["laq-3"]] == 6 * [8]
    assert order["laq-3"] == order["vae-3"] == order["laq-continuous-3"] == order["vae-0.01-3"]
    assert order["laq-4"] == order["vae-4"] != order["vae-3"]


def test_a_part_says_how_it_was_trained_and_opens_with_its_data(trained: Trained, dataset: Clips) -> None:
    configs = {}
    for part, rival in trained[0].items():
        model, config = load_run(rival.source)
        assert_same_weights(model, rival.model)
        assert config["model"] == {"kind": "laq" if rival.acts else "conv_vae"} | rival.model.config.model_dump()
        assert config["data"] == {"name": dataset.config.data, "fingerprint": dataset.fingerprint}
        configs[part] = config["parameters"]
    both = {"data_kind": "clips"} | dataset.config.model_dump() | TrainConfig(**TRAINING).model_dump()
    assert configs["laq-3"] == both | LAQConfig(image_size=16, **LAQ_SIZES).model_dump()
    assert configs["vae-3"] == both | ConvVAEConfig(image_size=16, **VAE_SIZES).model_dump() | {"lr": 2e-3}
    for one, other, found in [
        ("laq-3", "laq-4", "seed: 3 there, 4 here"),
        ("laq-3", "laq-continuous-3", "quantizer: nsvq there, continuous here"),
        ("vae-3", "vae-4", "seed: 3 there, 4 here"),
        ("vae-3", "vae-0.01-3", "kl_weight: 0.0001 there, 0.01 here"),
    ]:
        assert differences(configs[one], configs[other]) == [found]
    again = open_data(configs["vae-3"])
    assert again.config == dataset.config and again.fingerprint == dataset.fingerprint
    logs = {part: log_of(rival).query("split == 'train'") for part, rival in trained[0].items()}
    assert logs["laq-3"]["step"].tolist() == [1, 4, 6] and {"perplexity", "replaced"} <= set(logs["laq-3"])
    for part, weight in (("laq-continuous-3", 1e-4), ("vae-3", 1e-4), ("vae-0.01-3", 0.01)):
        assert logs[part]["kl_weight"].tolist() == 3 * [weight]


def test_what_is_trained_is_not_trained_again(
    outputs: Path, dataset: Clips, trained: Trained, no_training: None, capsys: pytest.CaptureFixture
) -> None:
    """Nor where the outputs folder has moved."""
    again = compare(outputs, dataset, **EVERY)
    assert capsys.readouterr().out.count("loaded, not trained") == len(again) == 6
    for one, other in zip(again, trained[0].values(), strict=True):
        assert_same_weights(one.model, other.model)
        assert not one.model.training
        assert all(getattr(one, k) == getattr(other, k) for k in ("name", "seed", "setting", "samples", "seconds"))


def test_other_data_or_settings_do_not_go_into_a_part(outputs: Path, dataset: Clips, changed: Clips) -> None:
    parameters, run = SETTINGS | dataset.config.model_dump(), Run(outputs / "e" / "comparison")
    held = "parts/laq-3 holds a run of another configuration:\n"
    with pytest.raises(RunError, match=f"{held}  data.fingerprint: {dataset.fingerprint} there, "):
        next(rivals(parameters, changed, run))
    with pytest.raises(RunError, match=f"{held}  lr: 0.001 there, 0.5 here\n"):
        next(rivals(parameters | {"lr": 0.5}, dataset, run))


def test_an_early_stop_is_counted_as_it_was(tmp_path: Path, dataset: Clips) -> None:
    """With hardly any step the validation loss stops falling, at the end of an epoch, between two rows of training."""
    few = {"batch_size": 32, "training_steps": 100, "log_every": 50, "checkpoint_every": 100}
    rival = next(rivals(*begin(tmp_path, dataset, patience=1, lr=1e-30, **few)))
    rows = metrics(Run(Path(rival.source)))
    assert [row["step"] for row in rows if row["split"] == "train"] == ["1"]
    epoch = len(dataset.split("train")) // 32
    assert rows[-1]["step"] == str(2 * epoch) and rival.samples == 2 * epoch * 32


def dies(number: int) -> None:
    if number == 10:
        raise Dies


@pytest.mark.parametrize(("stop", "leaves"), [(dies, Dies), (sends(signal.SIGTERM, at=10), Preempted)])
def test_an_interrupted_second_training_goes_on_and_ends_in_the_same_weights(
    stop: Callable, leaves: type, trained: Trained, dataset: Clips, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """By a kill, or a signal, while the VAE's fourth batch is read."""
    read, reads = ClipDataset.batch, 0

    def batch(self: ClipDataset, indices: np.ndarray) -> dict[str, torch.Tensor]:
        nonlocal reads
        if self is dataset.split("train"):
            reads += 1
            stop(reads)
        return read(self, indices)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(leaves):
        patch.setattr(ClipDataset, "batch", batch)
        compare(tmp_path, dataset)
    laq, vae = (tmp_path / "e" / part for part in (LAQ_RUN, VAE_RUN))
    assert Run(laq).trained and not Run(vae).trained
    capsys.readouterr()
    found = compare(tmp_path, dataset)
    told = capsys.readouterr().out
    assert f"{laq} holds a finished model" in told and f"resumed {vae}/checkpoints/last.ckpt at step" in told
    assert [(Path(rival.source), rival.samples) for rival in found] == [(laq, 48), (vae, 48)]
    for path in (laq, vae):
        expected = Path(trained[0][path.name].source)
        assert (path / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
        assert metrics(Run(path)) == metrics(Run(expected))


# --- predictions ---


@torch.inference_mode()
def test_predictions_stay_on_the_scale_of_frames(trained: Trained, batch: dict[str, torch.Tensor]) -> None:
    vae, laq = (copy.deepcopy(trained[0][part].model) for part in ("vae-3", "laq-3"))
    vae.to_image[-1] = nn.Identity()
    vae.to_image[-2].weight *= 100
    laq.to_pixels[0].weight *= 100
    for model, plain in ((vae, vae(batch["x"])), (laq, laq(batch["first"], batch["x"]))):
        assert plain.max() > 1 and plain.min() < -1
        torch.testing.assert_close(Rival("loud", model, 0, "").predict(batch), plain.clamp(-1, 1))


@torch.inference_mode()
def test_only_a_latent_action_model_looks_at_the_first_frame(trained: Trained, batch: dict[str, torch.Tensor]) -> None:
    other = batch | {"first": -batch["first"]}
    for rival in trained[0].values():
        assert torch.equal(rival.predict(batch), rival.predict(other)) != rival.acts
    vae, laq = trained[0]["vae-3"], trained[0]["laq-3"]
    assert torch.equal(vae.predict({"x": batch["x"]}), vae.model(batch["x"]))
    indices = laq.model.encode(batch["first"], batch["x"]).indices
    assert torch.equal(laq.imagine(batch["first"], indices), laq.predict(batch))
    assert not torch.equal(laq.imagine(batch["first"], 5 - indices), laq.predict(batch))


def test_a_measured_step_has_the_weights_of_the_end_of_training(
    trained: Trained, batch: dict[str, torch.Tensor]
) -> None:
    training = TrainConfig(kl_weight=0.5, kl_rise_to=1.0, recon_weight=2.0)
    for part in ("laq-3", "laq-continuous-3", "vae-3"):
        model = trained[0][part].model
        terms = objective_of(model).loss(batch)
        assert ("kl" in terms) == (part != "laq-3")
        expected = 2 * terms["mse"] + 0.5 * terms.get("kl", 0.0)
        torch.testing.assert_close(weighted_loss(model, batch, training), expected)


# --- runs that are loaded ---


def test_trained_models_are_loaded_in_place_of_training(
    outputs: Path, dataset: Clips, trained: Trained, no_training: None
) -> None:
    found = compare(outputs, dataset, run="other", seeds=2, laq_run=LAQ_RUN, vae_run=VAE_RUN)
    assert [(r.name, r.seed, r.source, r.samples) for r in found] == [
        ("LAQ", 3, str(outputs / "e" / LAQ_RUN), 48),
        ("VAE", 3, str(outputs / "e" / VAE_RUN), 48),
    ]
    for rival, part in zip(found, ("laq-3", "vae-3"), strict=True):
        assert_same_weights(rival.model, trained[0][part].model)
        assert rival.seconds == trained[0][part].seconds and not rival.unit_scale and not rival.model.training
    digest = file_digest(outputs / "e" / LAQ_RUN / "model.safetensors")
    assert Run(outputs / "e" / "other").config["laq_source"] == {"path": LAQ_RUN, "weights": digest}
    moved = outputs.rename(outputs.with_name("moved"))
    assert len(compare(moved, dataset, run="other", seeds=2, laq_run=LAQ_RUN, vae_run=VAE_RUN)) == 2


def test_beside_a_loaded_model_a_sweep_trains_the_main_setting_too(outputs: Path, dataset: Clips) -> None:
    values = {"quantizers": ["nsvq"], "kl_weights": [1e-4], "laq_run": LAQ_RUN, "vae_run": VAE_RUN}
    found = compare(outputs, dataset, run="other", **values)
    assert [rival.name for rival in found] == ["LAQ", "LAQ nsvq", "VAE", "VAE 0.0001"]
    for one, other in (found[:2], found[2:]):
        assert_same_weights(one.model, other.model)


def test_a_run_of_the_other_model_is_refused(run: Run, dataset: Clips) -> None:
    for name, part, found in (("VAE", LAQ_RUN, "laq, not a conv_vae"), ("LAQ", VAE_RUN, "conv_vae, not a laq")):
        message = f"{run.path.parent / part} holds a {found}: name a run of the other kind"
        with pytest.raises(RunError, match=f"^{message}$"):
            load(name, part, "", "cpu", dataset, run)


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"image_size": 8}, "image_size: 16 there, 8 here"),
        ({"clip_length": 3}, "clip_length: 0 there, 3 here"),
        ({"cache_stride": 2}, "cache_stride: 1 there, 2 here"),
        ({"val_fraction": 0.1, "split_seed": 1}, "split_seed: 0 there, 1 here; val_fraction: 0.2 there, 0.1 here"),
    ],
)
def test_other_frames_or_another_split_are_refused_with_the_difference(
    values: dict[str, Any], found: str, run: Run, settings: dict[str, Any]
) -> None:
    for name, part in (("VAE", VAE_RUN), ("LAQ", LAQ_RUN)):
        with pytest.raises(RunError) as caught:
            load(name, part, "", "cpu", open_clips(ClipsConfig(**settings | values)), run)
        assert str(caught.value) == (
            f"{run.path.parent / part} was trained on other frames or another split, so a comparison would not be "
            f"fair: {found}. Set these here as they are there, or train on the same"
        )
    assert not {"vae_source", "laq_source"} & run.config.keys()


def test_other_pairs_of_the_same_frames_and_split_are_fair(run: Run, settings: dict[str, Any]) -> None:
    other = open_clips(ClipsConfig(**settings | {"pair_offset": 1, "frame_stride": 2}))
    assert load("VAE", VAE_RUN, "", "cpu", other, run).samples == 48


def test_changed_data_are_refused(run: Run, dataset: Clips, changed: Clips) -> None:
    told = (
        rf"was trained on other .* \(fingerprint {dataset.fingerprint}, now {changed.fingerprint}\): put the data back"
    )
    with pytest.raises(RunError, match=f"^{run.path.parent / VAE_RUN} {told}"):
        load("VAE", VAE_RUN, "", "cpu", changed, run)


def test_an_absent_damaged_or_unfinished_run_is_refused_before_anything_is_trained(
    outputs: Path, dataset: Clips, no_training: None
) -> None:
    with pytest.raises(RunError, match=f"^{outputs}/e/none: no run there"):
        compare(outputs, dataset, run="a", vae_run="none")
    weights = outputs / "e" / VAE_RUN / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"^{weights}: damaged or not a safetensors file"):
        compare(outputs, dataset, run="b", vae_run=VAE_RUN)
    weights.unlink()
    with pytest.raises(RunError, match=r"vae-3 has no finished model \(state: begun\): run its notebook again"):
        compare(outputs, dataset, run="c", vae_run=VAE_RUN)


# --- published files ---


def write_laq(path: Path, seed: int = 0, change: Callable[[dict], Any] = len, **sizes: int) -> LAQ:
    """Weights under their published names."""
    torch.manual_seed(seed)
    model = LAQ(LAQConfig(**{"image_size": 16} | LAQ_SIZES | sizes)).eval()
    weights = {published_name(key): value for key, value in model.state_dict().items() if "usage" not in key}
    change(weights)
    torch.save(weights, path)
    return model


def write_vae(path: Path, seed: int = 0, image_size: int = 16) -> ConvVAE:
    torch.manual_seed(seed)
    model = ConvVAE(ConvVAEConfig(image_size=image_size, **VAE_SIZES)).eval()
    weights = model.state_dict()
    for ours, theirs in {"to_mu": "fc_mu", "to_logvar": "fc_var", "from_z": "decoder_input"}.items():
        weights = {key.replace(ours, theirs): value for key, value in weights.items()}
    torch.save({key.replace("to_image", "final_layer"): value for key, value in weights.items()}, path)
    return model


@torch.inference_mode()
def test_a_published_latent_action_model_is_brought_to_the_scale_of_frames(
    run: Run, dataset: Clips, tmp_path: Path
) -> None:
    """Trained on frames in [0, 1], it says of frames in [-1, 1] what it says of the same frames on its own scale."""
    model = write_laq(tmp_path / "laq.pt", dim=24)
    rival = load("LAQ", "", str(tmp_path / "laq.pt"), "cpu", dataset, run)
    assert rival.unit_scale and (rival.seed, rival.samples, rival.seconds) == (0, None, None)
    assert_same_weights(rival.model, model)
    assert run.config["laq_source"]["weights"] == file_digest(tmp_path / "laq.pt")
    assert list(log_of(rival)) == ["step", "split"] and log_of(rival).empty
    first, x = torch.rand(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = 2 * model(first, x) - 1
    assert expected.abs().max() > 1 and expected.std() > 0.1
    x_hat = rival.predict({"first": 2 * first - 1, "x": 2 * x - 1})
    torch.testing.assert_close(x_hat, expected.clamp(-1, 1), rtol=0, atol=1e-3)


def test_a_published_vae_is_on_the_scale_of_frames_as_it_is(
    run: Run, dataset: Clips, batch: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path is taken from the project's root, wherever the notebook runs."""
    for folder in ("notebooks", "params"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    model = write_vae(tmp_path / "vae.pt")
    rival = load("VAE", "", "vae.pt", "cpu", dataset, run)
    assert not rival.unit_scale and torch.equal(rival.predict(batch), model(batch["x"]))


@pytest.mark.parametrize(("name", "size"), [("VAE", 8), ("LAQ", 32)])
def test_a_file_for_other_images_is_refused(name: str, size: int, run: Run, dataset: Clips, tmp_path: Path) -> None:
    path = tmp_path / "their.pt"
    write_vae(path, image_size=size) if name == "VAE" else write_laq(path, image_size=size, patch_size=size // 8)
    message, error = (
        f"a model for images of {size} px, and these clips have image_size=16: set image_size={size}$",
        DataError,
    )
    if name == "LAQ":
        message, error = "give 2 codes on images of 32 px, not on image_size=16", CheckpointError
    with pytest.raises(error, match=f"^{path}: .*{message}"):
        load(name, "", str(path), "cpu", dataset, run)


def test_a_file_that_is_absent_damaged_or_of_two_widths_is_refused(run: Run, dataset: Clips, tmp_path: Path) -> None:
    path = tmp_path / "laq.pt"
    with pytest.raises(CheckpointError, match=f"^{path}: no such file$"):
        load("LAQ", "", str(path), "cpu", dataset, run)
    write_laq(path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=f"^{path}: damaged or not a checkpoint"):
        load("LAQ", "", str(path), "cpu", dataset, run)
    write_laq(path, change=lambda weights: weights.update({"vq.project_out.bias": torch.zeros(7)}))
    told = r"does not fit LAQ\(.* dim=12 .*\): 1 misshapen: vq.project_out.bias \(7,\) instead of \(12,\); give"
    with pytest.raises(CheckpointError, match=f"^{path} {told}"):
        load("LAQ", "", str(path), "cpu", dataset, run)
    assert "laq_source" not in run.config


@pytest.mark.parametrize(("name", "write"), [("LAQ", write_laq), ("VAE", write_vae)])
def test_a_comparison_of_other_weights_is_another_run(
    name: str, write: Callable, run: Run, dataset: Clips, tmp_path: Path
) -> None:
    path = tmp_path / "their.pt"
    for seed in (0, 0, 1):
        write(path, seed)
        digests = [run.config.get(f"{name.lower()}_source", {}).get("weights"), file_digest(path)]
        if seed == 0:
            load(name, "", str(path), "cpu", dataset, run)
    found = f"{name.lower()}_source.weights: {digests[0]} there, {digests[1]} here"
    with pytest.raises(RunError, match=f"^{run.path} holds a run of another configuration:\n  {found}\n"):
        load(name, "", str(path), "cpu", dataset, run)

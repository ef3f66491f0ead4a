import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from workbench.datasets.digits_zoo import (
    BATCH_SIZE,
    DATA_FRACTION,
    EPOCHS,
    FAMILIES,
    LEARNING_RATE,
    MOMENTUM,
    WEIGHT_DECAY,
    draw_recipe,
    draw_start,
    train,
    write_digits_zoo,
)
from workbench.datasets.frames import DataError
from workbench.datasets.zoo_networks import NETWORKS, accuracy, digits, layer_shapes, logits, runnable

TINY = {"runs": 4, "epochs": (1, 3)}
PROPERTIES = {
    "id": str,
    "run": str,
    "family": str,
    "architecture": str,
    "dataset": str,
    "accuracy": float,
    "train_accuracy": float,
    "gap": float,
    "epoch": int,
    "learning_rate": float,
    "weight_decay": float,
    "data_fraction": float,
    "seed": int,
}

Entries = list[tuple[dict, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_digits_zoo(tmp_path_factory.mktemp("tiny") / "digits-zoo", **TINY)


def read_zoo(folder: Path) -> dict[tuple[str, str], Entries]:
    """The entries of each file, by family and architecture."""
    files = {tuple(path.stem.split("_")): path for path in sorted((folder / "weights").iterdir())}
    return {key: torch.load(path, weights_only=True) for key, path in files.items()}


def read_bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def flat(entries: Entries) -> Tensor:
    return torch.stack([torch.cat([tensor.flatten() for tensor in state.values()]) for _, state in entries])


# Recipes and starts


def test_recipes_are_within_their_ranges_and_fill_them():
    recipes = [draw_recipe("mlp", i, 1) for i in range(60)]
    for name, (low, high) in (("learning_rate", LEARNING_RATE), ("weight_decay", WEIGHT_DECAY)):
        places = np.log([getattr(recipe, name) / low for recipe in recipes]) / np.log(high / low)
        assert 0 <= places.min() < 0.1 < 0.9 < places.max() <= 1 and 0.35 < places.mean() < 0.65
    shares = np.array([len(recipe.subset) / 1297 for recipe in recipes])
    assert DATA_FRACTION[0] - 1e-3 <= shares.min() < 0.3 and 0.9 < shares.max() <= DATA_FRACTION[1]


def test_each_epoch_shows_the_subset_once_in_an_order_of_its_own():
    recipe = draw_recipe("cnn", 3, 4, seed=1)
    assert len(set(recipe.subset)) == len(recipe.subset) and set(recipe.subset) <= set(range(1297))
    assert recipe.epoch_steps == len(recipe.subset) // BATCH_SIZE
    epochs = recipe.batches.reshape(4, -1)
    assert epochs.shape[1] == recipe.epoch_steps * BATCH_SIZE > len(recipe.subset) - BATCH_SIZE
    for shown in epochs:
        assert len(set(shown)) == len(shown) and set(shown) <= set(recipe.subset)
    assert len({tuple(shown) for shown in epochs}) == 4


def test_recipes_differ_by_number_architecture_and_seed():
    rates = [draw_recipe(*key).learning_rate for key in (("mlp", 0, 1), ("mlp", 1, 1), ("cnn", 0, 1), ("mlp", 0, 1, 1))]
    assert len(set(rates)) == 4


@pytest.mark.parametrize("architecture", NETWORKS)
def test_one_family_starts_from_one_network_and_the_other_from_many(architecture):
    shared, independent = (draw_start(architecture, family, 5) for family in FAMILIES)
    fans = {"hidden": 64, "conv1": 9, "conv2": 72, "output": {"mlp": 24, "cnn": 64}[architecture]}
    for name, shape in layer_shapes(architecture).items():
        assert shared[name].shape == independent[name].shape == (5, *shape)
        assert (shared[name] == shared[name][0]).all()
        assert len(independent[name].flatten(1).unique(dim=0)) == 5
        reach = independent[name].abs().max() * fans[name.split(".")[0]] ** 0.5
        assert 0.8 < reach <= 1 + 1e-6


def test_no_two_runs_start_from_the_same_weights_but_in_the_family_shared():
    """Seeds are filled up with zeros: number 0 of a family must not be what all of the other start from."""
    for architecture in NETWORKS:
        starts = [
            draw_start(architecture, family, n)["output.weight"] for family, n in (("shared", 1), (FAMILIES[1], 9))
        ]
        assert len(torch.cat(starts).flatten(1).unique(dim=0)) == 10


# Training


@pytest.mark.parametrize("architecture", NETWORKS)
def test_networks_trained_at_once_are_those_that_pytorch_trains_one_by_one(architecture):
    recipes, data = [draw_recipe(architecture, i, 2) for i in range(3)], digits()
    assert len({len(recipe.batches) for recipe in recipes}) == 3  # they end at different steps
    start = draw_start(architecture, "independent", 3)
    kept = train(architecture, start, recipes, (1, 2))
    for i, recipe in enumerate(recipes):
        model = NETWORKS[architecture]()
        model.load_state_dict({name: tensor[i] for name, tensor in start.items()})
        optimizer = torch.optim.SGD(
            model.parameters(), recipe.learning_rate, MOMENTUM, weight_decay=recipe.weight_decay
        )
        for step, shown in enumerate(torch.from_numpy(recipe.batches), start=1):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data.train_x[shown]), data.train_y[shown]).backward()
            optimizer.step()
            if step % recipe.epoch_steps == 0:
                own = {name: tensor[i] for name, tensor in kept[step // recipe.epoch_steps].items()}
                torch.testing.assert_close(own, dict(model.state_dict()), atol=2e-5, rtol=2e-4)


# Files


def test_files_and_entries(tiny):
    names = {f"weights/{family}_{architecture}.pt" for family in FAMILIES for architecture in NETWORKS}
    assert read_bytes(tiny).keys() == {"digits-zoo.json"} | names
    manifest = json.loads((tiny / "digits-zoo.json").read_text())
    assert manifest == {"generator": "digits-zoo", "version": 2, "seed": 0, "runs": 4, "epochs": [1, 3]}
    assert [path.name for path in tiny.parent.iterdir()] == ["digits-zoo"]
    for (family, architecture), entries in read_zoo(tiny).items():
        runs = [f"{family}-{architecture}-{i:03d}" for i in range(2) for _ in range(2)]
        assert [properties["run"] for properties, _ in entries] == runs
        assert [properties["epoch"] for properties, _ in entries] == [1, 3, 1, 3]
        for properties, state in entries:
            assert {name: type(value) for name, value in properties.items()} == PROPERTIES
            assert (properties["family"], properties["architecture"]) == (family, architecture)
            assert properties["id"] == f"{properties['run']}-epoch-{properties['epoch']:02d}"
            assert runnable({name: tensor.shape for name, tensor in state.items()}) == architecture
            assert all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in state.values())
            assert all(tensor.untyped_storage().nbytes() == 4 * tensor.numel() for tensor in state.values())


def test_ids_are_unique_and_no_two_networks_are_equal(tiny):
    zoo = read_zoo(tiny)
    ids = [properties["id"] for entries in zoo.values() for properties, _ in entries]
    assert len(set(ids)) == len(ids) == 16
    assert all(len(flat(entries).unique(dim=0)) == 4 for entries in zoo.values())


def test_families_differ_in_nothing_but_the_start(tiny):
    zoo = read_zoo(tiny)
    for architecture in NETWORKS:
        for (shared, _), (independent, _) in zip(*(zoo[family, architecture] for family in FAMILIES), strict=True):
            names = ("architecture", "dataset", "epoch", "learning_rate", "weight_decay", "data_fraction", "seed")
            assert [shared[name] for name in names] == [independent[name] for name in names]


def test_accuracies_are_those_of_the_stored_weights(tiny):
    for (_, architecture), entries in read_zoo(tiny).items():
        check_accuracies(architecture, entries, 3)


def check_accuracies(architecture: str, entries: Entries, last: int) -> None:
    """On held-out digits, and on the subset of the recipe."""
    data, states = digits(), [state for _, state in entries]
    tested = accuracy(states, architecture, data.test_x, data.test_y).tolist()
    right = logits(states, architecture, data.train_x).argmax(-1) == data.train_y
    for (properties, _), own, of_all in zip(entries, tested, right, strict=True):
        subset = draw_recipe(architecture, properties["seed"], last).subset
        assert properties["accuracy"] == own
        assert properties["train_accuracy"] == pytest.approx(of_all[subset].double().mean().item(), rel=1e-12)
        assert properties["gap"] == pytest.approx(properties["train_accuracy"] - own, rel=1e-12)
        assert properties["data_fraction"] == len(subset) / 1297


def test_same_seed_gives_identical_bytes_and_another_seed_other_weights(tiny, tmp_path):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        again = write_digits_zoo(tmp_path / "again", **TINY)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert read_bytes(again) == read_bytes(tiny)
    other = read_zoo(write_digits_zoo(tmp_path / "other", seed=1, runs=2, epochs=[1]))
    assert all(len(flat([*entries[:1], *read_zoo(tiny)[key][:1]]).unique(dim=0)) == 2 for key, entries in other.items())


def test_more_runs_leave_the_others_as_they_are(tiny, tmp_path):
    few = read_zoo(write_digits_zoo(tmp_path / "few", runs=2, epochs=(1, 3)))
    for key, entries in read_zoo(tiny).items():
        torch.testing.assert_close(flat(few[key]), flat(entries[:2]), atol=1e-5, rtol=1e-4)


# An existing folder, a killed run, bad arguments


def test_same_settings_leave_the_folder_untouched_and_others_are_refused(tiny):
    before = {path: path.stat().st_mtime_ns for path in [tiny, *tiny.rglob("*")]}
    assert write_digits_zoo(tiny, **TINY) == tiny
    with pytest.raises(FileExistsError, match=r"is a digits-zoo set with epochs=\[1, 3\], asked for epochs=\[1, 2\]"):
        write_digits_zoo(tiny, runs=4, epochs=(1, 2))
    assert {path: path.stat().st_mtime_ns for path in [tiny, *tiny.rglob("*")]} == before


def test_what_a_killed_run_left_is_written_again_and_foreign_files_are_kept(tmp_path):
    partial = tmp_path / "zoo.partial"
    (partial / "weights").mkdir(parents=True)
    (partial / "weights" / "shared_mlp.pt").write_bytes(b"half")
    folder = write_digits_zoo(tmp_path / "zoo", runs=2, epochs=(1,))
    assert [path.name for path in tmp_path.iterdir()] == ["zoo"]
    assert {len(entries) for entries in read_zoo(folder).values()} == {1}
    partial.mkdir()
    (partial / "mine.pt").write_bytes(b"mine")
    (tmp_path / "zoo").rename(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError, match=r"mine\.pt.*move it away"):
        write_digits_zoo(tmp_path / "zoo", runs=2, epochs=(1,))
    assert (partial / "mine.pt").read_bytes() == b"mine"


def test_a_file_of_weights_that_is_gone_is_noticed(tmp_path):
    folder = write_digits_zoo(tmp_path / "zoo", runs=2, epochs=(1,))
    (folder / "weights" / "shared_cnn.pt").unlink()
    with pytest.raises(DataError, match="weights lacks shared_cnn.pt: delete .*zoo, and it is trained again"):
        write_digits_zoo(folder, runs=2, epochs=(1,))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"seed": -1}, "^seed=-1: must be at least 0$"),
        ({"runs": 0}, "^runs=0: must be an even number of at least 2, as half are MLPs and half CNNs$"),
        ({"runs": 3}, "^runs=3: must be an even number"),
        ({"epochs": ()}, r"^epochs=\[\]: must be one or more, rising, the first at least 1$"),
        ({"epochs": (0, 1)}, r"^epochs=\[0, 1\]: must be"),
        ({"epochs": (2, 1)}, r"^epochs=\[2, 1\]: must be"),
        ({"epochs": (1, 1)}, r"^epochs=\[1, 1\]: must be"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        write_digits_zoo(tmp_path / "zoo", **settings)
    assert not list(tmp_path.iterdir())


# The whole set


@pytest.mark.slow
def test_the_whole_set(tmp_path):
    zoo = read_zoo(write_digits_zoo(tmp_path / "digits-zoo"))
    for (family, architecture), entries in zoo.items():
        assert len(entries) == 150 * len(EPOCHS) == 750
        check_accuracies(architecture, entries, EPOCHS[-1])
        weights = flat(entries)
        assert weights.isfinite().all() and weights.shape == (750, {"mlp": 1810, "cnn": 1898}[architecture])
        accuracies = np.array([properties["accuracy"] for properties, _ in entries]).reshape(150, len(EPOCHS))
        medians = np.median(accuracies, axis=0)
        assert (np.diff(medians) > 0).all() and medians[0] < 0.5 and medians[-1] > 0.94
        assert np.quantile(accuracies[:, -1], 0.02) > 0.7
        explained = pca_r2(weights, 600, 16)
        assert explained > 0.55 if family == "shared" else explained < 0.15
    assert len({properties["id"] for entries in zoo.values() for properties, _ in entries}) == 3000


def pca_r2(weights: Tensor, fitted: int, components: int) -> float:
    """Share of the held-out rows' variance about the fitted mean that the first components hold; whole runs each."""
    mean = weights[:fitted].mean(0)
    directions = torch.linalg.svd(weights[:fitted] - mean, full_matrices=False).Vh[:components]
    rest = weights[fitted:] - mean
    return 1 - ((rest - rest @ directions.T @ directions).square().sum() / rest.square().sum()).item()

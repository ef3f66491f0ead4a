import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from action_pairs import CLASS, CODE, SIZE, WORD, Told, laq, laq_config, vae, write_moving
from explored import shown
from PIL import Image, ImageSequence

from workbench.action_codes import actions_of, frequent_words
from workbench.action_comparison import full_pairs
from workbench.action_exploration import ActionExploration, load_action_model
from workbench.checkpoints import save_model
from workbench.datasets.clips import ClipDataset, ClipsConfig, open_clips
from workbench.datasets.frames import DataError
from workbench.explorer_widget import LatentExplorer
from workbench.latent_explorer import explore_actions, explore_run
from workbench.rivals import Rival
from workbench.runs import Run, RunError, open_run
from workbench.spaces import Panel, State, save_strip

pytestmark = pytest.mark.usefixtures("one_thread")
CHAIN = State(mode="codes", pin_a=3, chain=(0, 1, 0))
WALK = State(mode="path", pin_a=3, pin_b=6)


@pytest.fixture(scope="module")
def pairs(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> ClipDataset:
    """12 pairs of clips whose first corner tells their class."""
    source = write_moving(tmp_path_factory.mktemp("clips") / "data", {f"clip{i:02d}": 4 for i in range(6)})
    shares = {"val_fraction": 0.0, "test_fraction": 0.0}
    config = ClipsConfig(
        data=str(source), cache_dir=str(source.parent / "cache"), image_size=SIZE, pair_offset=2, **shares
    )
    return full_pairs(open_clips(config).split("train"))


@pytest.fixture(scope="module")
def told() -> Rival:
    """Its word is the class of a pair at every place, and decides what comes next."""
    torch.manual_seed(0)
    model = Told(CLASS).eval()
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(0.05 * torch.randn_like(weights))
    return Rival("LAQ", model, 0, "")


@pytest.fixture(scope="module")
def words(pairs: ClipDataset, told: Rival) -> ActionExploration:
    return explored(told, pairs)


def explored(rival: Rival, pairs: ClipDataset, **settings: object) -> ActionExploration:
    return ActionExploration(rival, pairs, actions_of(rival, pairs, 16), pairs.clips, **settings)


@pytest.fixture(scope="module")
def continuous(pairs: ClipDataset) -> ActionExploration:
    rival = laq(quantizer="continuous")
    with torch.no_grad():
        rival.model.quantizer.to_mu.weight.mul_(30)  # so that actions differ in what they do
    return explored(rival, pairs)


def pixels(pairs: ClipDataset, x: torch.Tensor) -> np.ndarray:
    return pairs.clips.pixels(x[0].detach())


def assert_panels(found: tuple[Panel, ...], titles: list[str], pictures: list[np.ndarray]) -> None:
    assert [panel.title for panel in found] == titles
    for panel, picture in zip(found, pictures, strict=True):
        np.testing.assert_array_equal(panel.pixels, picture)


# --- a pair ---


@pytest.mark.parametrize("which", ["words", "continuous"])
def test_errors_are_those_that_pairs_are_shown_with(which: str, request: pytest.FixtureRequest) -> None:
    space = request.getfixturevalue(which)
    values, label = space.errors()
    views = [space.view(State(mode="hover", hover=i)) for i in range(12)]
    np.testing.assert_allclose(values, [float(view.panels[1].caption.split()[-1]) for view in views], rtol=6e-3)
    assert label == space.data.error_label


@pytest.mark.parametrize("which", ["words", "continuous"])
def test_a_pair_is_shown_with_what_its_own_action_makes_of_it(
    which: str, pairs: ClipDataset, request: pytest.FixtureRequest
) -> None:
    space = request.getfixturevalue(which)
    batch = pairs.prepare(pairs.batch(np.array([4])))
    x_hat = space.rival.predict(batch).detach()
    drawn = [pixels(pairs, x) for x in (batch["first"], x_hat, batch["x"])]
    error = float((x_hat - batch["x"]).square().mean())
    name, how = pairs.name(4), "its own action" if which == "continuous" else "its own codes 2-2-2-2"
    for state, who in (
        (State(mode="hover", hover=4), f"pair {name}"),
        (State(pin_a=4), f"A: pair {name}"),
        (State(mode="codes", pin_a=4), f"A: pair {name}"),
        (State(pin_a=4, pin_b=4, pinned="b"), f"A and B: pair {name}"),
    ):
        view = space.view(state)
        assert_panels(view.panels, ["first frame", "decoded next frame", "real next frame"], drawn)
        assert [panel.caption for panel in view.panels] == [who, f"under {how}, mse {error:.3g}", "what came next"]
        np.testing.assert_array_equal(view.here, space.points[4])
    assert not np.array_equal(drawn[0], drawn[1])


def test_the_map_is_of_actions_before_they_are_quantized(pairs: ClipDataset) -> None:
    rival = laq()
    actions = actions_of(rival, pairs, 16)
    space = ActionExploration(rival, pairs, actions, pairs.clips)
    batch = pairs.prepare(pairs.batch(np.arange(len(pairs))))
    difference = rival.model.encode(batch["first"], batch["x"]).difference.detach().flatten(1)
    view = space.view(State(mode="hover", hover=5))
    torch.testing.assert_close(view.z, difference[5])
    assert view.neighbour == 5 and view.z.shape == (WORD * CODE,) and space.points.shape == (len(pairs), 2)


def test_words_are_a_column_of_the_pairs(pairs: ClipDataset, words: ActionExploration) -> None:
    assert words.samples.column("codes").tolist() == [f"{i // 2 % 4}-" * 3 + f"{i // 2 % 4}" for i in range(12)]
    assert words.samples.column("action").tolist() == pairs.column("action").tolist()
    assert words.samples.name(3) == pairs.name(3)
    with pytest.raises(DataError, match="column 'colour': the data has clip, frame, action, x, height, codes"):
        words.samples.column("colour")


# --- chains ---


def test_each_code_of_a_chain_acts_on_the_frame_before(pairs: ClipDataset, words: ActionExploration) -> None:
    chosen = list(frequent_words(actions_of(words.rival, pairs, 16), 8).values())
    assert list(words.codes) == ["0-0-0-0 (33%)", "1-1-1-1 (33%)", "2-2-2-2 (17%)", "3-3-3-3 (17%)"]
    frames = [pairs.prepare(pairs.batch(np.array([3])))["first"]]
    for code in CHAIN.chain:
        frames.append(words.rival.imagine(frames[-1], chosen[code][None]))
    view = words.view(CHAIN)
    titles = ["first frame", "frame 1", "frame 2", "frame 3"]
    assert_panels(view.panels, titles, [pixels(pairs, x) for x in frames])
    captions = [f"A: pair {pairs.name(3)}", *(f"after {code}" for code in ("0-0-0-0", "1-1-1-1", "0-0-0-0"))]
    assert [panel.caption for panel in view.panels] == captions
    assert len({panel.pixels.tobytes() for panel in view.panels}) == 4, "all frames differ"
    other = words.view(replace(CHAIN, pin_a=5)).panels[-1].pixels
    assert not np.array_equal(other, view.panels[-1].pixels), "on another first frame, another chain"
    assert_panels(words.view(CHAIN).panels, titles, [pixels(pairs, x) for x in frames])


def test_a_chain_lies_in_the_middle_of_the_pairs_with_its_last_word(words: ActionExploration) -> None:
    view = words.view(replace(CHAIN, chain=(0, 2)))
    own = [i for i, word in enumerate(words.samples.column("codes")) if word == "2-2-2-2"]
    z = torch.stack([words.view(State(mode="hover", hover=i)).z for i in own])
    torch.testing.assert_close(view.z, z.mean(0))
    assert view.neighbour in own


def test_of_a_long_chain_the_last_frames_are_shown(words: ActionExploration) -> None:
    chain = (0, 1, 2, 3, 0, 1, 2, 3)
    found, whole = words.view(replace(CHAIN, chain=chain)).panels, words.strip(replace(CHAIN, chain=chain), 33)
    assert [panel.title for panel in found] == ["first frame", *(f"frame {k}" for k in range(3, 9))]
    for panel, picture in zip(found, [whole.rows["codes"][i] for i in (0, *range(3, 9))], strict=True):
        np.testing.assert_array_equal(panel.pixels, picture)
    assert whole.titles == ["first frame", *("-".join([str(code)] * 4) for code in chain)]
    few = words.strip(replace(CHAIN, chain=chain), 4)
    assert few.titles == ["first frame", "1-1-1-1", "2-2-2-2", "3-3-3-3"]
    np.testing.assert_array_equal(few.rows["codes"][-1], whole.rows["codes"][-1])


def test_fewer_words_may_be_asked_for(pairs: ClipDataset, told: Rival) -> None:
    assert list(explored(told, pairs, words=2).codes) == ["0-0-0-0 (33%)", "1-1-1-1 (33%)"]


# --- continuous actions ---


def test_actions_between_two_act_on_the_first_frame_of_a(pairs: ClipDataset, continuous: ActionExploration) -> None:
    batch = pairs.prepare(pairs.batch(np.array([3])))
    a, b = (continuous.view(State(mode="hover", hover=i)).z for i in (3, 6))
    pictures = set()
    for position in (0.0, 0.25, 1.0):
        view = continuous.view(replace(WALK, position=position))
        z = torch.lerp(a, b, position)
        torch.testing.assert_close(view.z, z)
        x_hat = continuous.rival.imagine(batch["first"], z.reshape(1, WORD, CODE))
        drawn = [pixels(pairs, x) for x in (batch["first"], x_hat, batch["x"])]
        assert_panels(view.panels, ["first frame", "decoded next frame", "real next frame"], drawn)
        assert view.panels[1].caption == f"under lerp A-B at {position:.2f}"
        pictures.add(view.panels[1].pixels.tobytes())
    assert len(pictures) == 3
    route = continuous.route(WALK)
    np.testing.assert_allclose(route[[0, -1]], continuous.points[[3, 6]], atol=1e-5)
    assert continuous.walks and not continuous.codes and not continuous.draws


# --- strips ---


def test_a_chain_is_saved_with_its_indices(words: ActionExploration, pairs: ClipDataset, tmp_path: Path) -> None:
    png, gif, npz = save_strip(words, CHAIN, Run(tmp_path))
    frames = words.strip(CHAIN, 33).rows["codes"]
    with Image.open(gif) as animation:
        assert animation.n_frames == 4 and animation.info["duration"] == 400
        last = np.asarray([frame.convert("RGB") for frame in ImageSequence.Iterator(animation)][-1])
    factor = last.shape[0] // SIZE
    assert np.abs(last[::factor, ::factor].astype(int) - frames[-1]).mean() < 4, "a palette of 256 colours"
    with np.load(npz) as stored:
        assert stored["indices"].tolist() == [[0] * 4, [1] * 4, [0] * 4]
        assert stored["names"].tolist() == [pairs.name(3)]
        assert stored["ids"].tolist() == pairs.batch(np.array([3]))["id"].tolist()
    assert png.name == "strip-1.png" and Image.open(png).size[0] > 100


def test_a_walk_is_saved_with_its_actions(continuous: ActionExploration, pairs: ClipDataset, tmp_path: Path) -> None:
    _, gif, npz = save_strip(continuous, replace(WALK, method="slerp"), Run(tmp_path))
    with Image.open(gif) as animation:
        assert animation.n_frames == 33
    with np.load(npz) as stored:
        assert stored["method"] == "slerp" and stored["names"].tolist() == [pairs.name(i) for i in (3, 6)]
        for position, z in list(zip(stored["positions"], stored["latents"], strict=True))[::8]:
            at = continuous.view(replace(WALK, method="slerp", position=float(position))).z
            np.testing.assert_allclose(at, z, atol=1e-4, rtol=1e-4)


# --- what cannot be shown ---


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (replace(CHAIN, chain=(0, 4)), "code 4: there are 4 to choose from, counted from 0"),
        (replace(CHAIN, chain=(0,) * 33), "a chain of 33 codes: must be at most 32; undo some, or clear it"),
        (replace(CHAIN, pin_a=12), "sample 12: must be from 0 to 11"),
        (WALK, "no path between words of codes: choose codes, which act on the first frame"),
        (State(mode="hover", hover=12), "sample 12: must be from 0 to 11"),
    ],
)
def test_states_that_show_nothing_say_why(words: ActionExploration, state: State, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        words.view(state)


def test_without_a_chain_or_a_path_there_is_no_strip(words: ActionExploration, continuous: ActionExploration) -> None:
    for call in (words.record, lambda state: words.strip(state, 9)):
        with pytest.raises(ValueError, match="no chain yet: let codes act on the first frame"):
            call(State(pin_a=1, pin_b=2))
    for call in (continuous.record, lambda state: continuous.strip(state, 9)):
        with pytest.raises(ValueError, match="no path yet: pin two samples of the map, as A and as B"):
            call(replace(CHAIN, chain=()))
    assert words.route(WALK).shape == (0, 2)
    with pytest.raises(ValueError, match="code 0: there are 0 to choose from"):
        continuous.view(CHAIN)


def test_models_and_actions_that_do_not_fit_are_refused(pairs: ClipDataset, told: Rival) -> None:
    actions = actions_of(told, pairs, 16)
    with pytest.raises(DataError, match="VAE has no latent actions: explore its latents with `explore`"):
        ActionExploration(vae(), pairs, actions, pairs.clips)
    with pytest.raises(DataError, match="12 latents of 5 samples: must be one of each"):
        ActionExploration(told, pairs.subset(5), actions, pairs.clips)
    with pytest.raises(ValueError, match="precision='fp16': must be 'fp32' or 'bf16'"):
        ActionExploration(told, pairs, actions, pairs.clips, precision="fp16")


# --- on the page ---


def page(words: ActionExploration, pairs: ClipDataset, folder: Path, **settings: object) -> LatentExplorer:
    actions = actions_of(words.rival, pairs, 16)
    return explore_actions(words.rival, pairs, actions, pairs.clips, Run(folder), **settings)


def test_buttons_act_one_after_the_other(words: ActionExploration, pairs: ClipDataset, tmp_path: Path) -> None:
    widget = page(words, pairs, tmp_path, pins=[3])
    assert (widget.codes, widget.walks, widget.draws) == (list(words.codes), False, False)
    assert (widget.legend["label"], widget.dimensions, widget.conditions) == ("codes", [], [])
    for chain in ((0,), (0, 1), (0, 1, 0), (0, 1), ()):  # three presses, an undo, and a clear
        widget.set_state({"chain": list(chain), "mode": "codes"})
        expected = words.view(replace(CHAIN, chain=chain)).panels
        assert len(widget.panels) == len(expected)
        for i, panel in enumerate(expected):
            np.testing.assert_array_equal(shown(widget, i), panel.pixels)
        assert widget.message == ""
    widget.set_state({"chain": [0] * 33, "mode": "codes"})
    assert widget.message == "a chain of 33 codes: must be at most 32; undo some, or clear it"
    widget.set_state({"chain": [0, 1], "mode": "codes", "save": 1})
    assert widget.message == "saved figures/strip-1.png, samples/strip-1.gif, samples/strip-1.npz"
    again = page(words, pairs, tmp_path)
    assert (again.pin_a, again.chain, again.mode) == (3, [0, 1], "codes"), "a cell that is run again goes on"
    assert [text.get_text() for ax in again.figure().axes for text in ax.texts] == ["A"]


def test_points_are_coloured_by_words_or_by_any_column(
    words: ActionExploration, pairs: ClipDataset, tmp_path: Path
) -> None:
    widget = page(words, pairs, tmp_path, column="action", pins=(1, 2))
    assert [text for text, *_ in widget.legend["entries"]] == sorted(set(pairs.column("action")))
    assert widget.mode == "pin" and widget.message == "", "without a walk, two pins show the first"


# --- runs ---


@pytest.fixture
def run(pairs: ClipDataset, tmp_path: Path) -> Run:
    settings = {"data_kind": "clips", "seed": 7} | pairs.clips.config.model_dump()
    run = open_run({"experiment": "e", "run": "r"} | settings, tmp_path)
    run.record(data={"fingerprint": pairs.clips.fingerprint}, model={"kind": "laq"} | laq_config().model_dump())
    save_model(run.path / "model.safetensors", laq().model, "laq")
    return run


def test_a_run_brings_its_model_and_its_clips(run: Run, pairs: ClipDataset) -> None:
    rival, clips = load_action_model(run.path)
    assert (rival.name, rival.seed, rival.unit_scale, clips.fingerprint) == ("LAQ", 7, False, pairs.clips.fingerprint)
    batch = pairs.prepare(pairs.batch(np.arange(3)))
    torch.testing.assert_close(rival.predict(batch), laq().predict(batch))


def test_a_run_opens_by_its_folder(run: Run, pairs: ClipDataset) -> None:
    widget = explore_run(run.path, "train", "frame", most=5, device="cpu")
    some = pairs.subset(5)
    assert len(widget.points) == 5 * 2 * 4 and widget.panels[0]["caption"] == f"pair {some.name(0)}"
    space = explored(laq(), some)
    for i, panel in enumerate(space.view(State()).panels):
        np.testing.assert_array_equal(shown(widget, i), panel.pixels)


def test_runs_of_other_models_or_other_data_are_refused(run: Run, tmp_path: Path) -> None:
    config = run.path / "config.json"
    whole = json.loads(config.read_text())
    config.write_text(json.dumps(whole | {"data": {"fingerprint": "0" * 16}}))
    with pytest.raises(RunError, match="r was trained on other data or another split"):
        load_action_model(run.path)
    other = vae().model
    config.write_text(json.dumps(whole | {"model": {"kind": "conv_vae"} | other.config.model_dump()}))
    save_model(run.path / "model.safetensors", other, "conv_vae")
    with pytest.raises(RunError, match="r holds a model of kind 'conv_vae': must be laq"):
        load_action_model(run.path)

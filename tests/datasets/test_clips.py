import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from workbench.config import ConfigError
from workbench.datasets import clips as clips_module
from workbench.datasets.clips import Clips, ClipsConfig, normalize, open_clips
from workbench.datasets.frames import DataError
from workbench.datasets.splits import SPLITS, hash_split, mix, stable_hash
from workbench.datasets.synthetic import write_pushing

REAL = Path(os.environ.get("WORKBENCH_TEST_DATA", "/nowhere")) / "cockatoo.mp4"
LENGTHS = {f"clip{i:02d}": 1 + i % 5 for i in range(24)}


@pytest.fixture
def source(tmp_path, write_clips) -> Path:
    return write_clips(tmp_path / "data", LENGTHS)


def opened(source: Path, **values) -> Clips:
    return open_clips(ClipsConfig(**{"data": str(source), "image_size": 8, "max_broken_fraction": 0.4} | values))


def samples(clips: Clips, key: str = "name") -> dict[str, list]:
    """What every split holds, by name or by a key of the batch."""
    found = {}
    for name in SPLITS:
        dataset = clips._datasets[name]
        indices = range(len(dataset))
        found[name] = [dataset.name(i) for i in indices] if key == "name" else dataset.batch(indices)[key].tolist()
    return found


def spoil(source: Path, *frames: tuple[str, int]) -> None:
    for clip, number in frames:
        (source / clip / f"img_{number:05d}.png").write_bytes(b"")


# cutting


def test_pieces_of_one_clip_in_a_folder_stay_on_one_side_and_those_of_a_video_file_do_not(
    tmp_path, write_clips, write_video
):
    none_held_out = {"val_fraction": 0.0, "test_fraction": 0.0, "clip_length": 3}
    several = opened(write_clips(tmp_path / "several", {"a": 9, "b": 9}), **none_held_out)
    assert several.group.tolist() == np.repeat(stable_hash(["a", "b"]), 3).tolist()
    assert opened(write_clips(tmp_path / "one", {"a": 9}), **none_held_out).group.tolist() == several.group[:3].tolist()
    video = opened(write_video(tmp_path / "film.mp4", "mpeg4"), **none_held_out)
    assert len(set(video.group.tolist())) == len(video.group) == 4


def test_the_fingerprint_is_of_the_split_and_the_conditions_too(tmp_path, write_clips):
    source = write_clips(tmp_path / "data", {f"c{i}": 1 for i in range(20)})
    found = {opened(source).fingerprint, opened(source).fingerprint}
    assert len(found) == 1
    found.add(opened(source, split_seed=1).fingerprint)
    rows = [f"c{i},1,{{}}\n".format(i) for i in range(20)]
    (source / "conditions.csv").write_text("clip,frame,x\n" + "".join(rows))
    found.add(opened(source).fingerprint)
    (source / "conditions.csv").write_text("clip,frame,x\n" + "".join(rows).replace(",19\n", ",18\n"))
    found.add(opened(source).fingerprint)
    assert len(found) == 4


# single frames


def test_every_frame_is_a_sample_of_the_split_of_its_clip(source):
    clips = opened(source, val_fraction=0.25, test_fraction=0.25)
    split = hash_split(stable_hash(LENGTHS), 0, 0.25, 0.25)
    for i, name in enumerate(SPLITS):
        names = [clip for clip, side in zip(LENGTHS, split, strict=True) if side == i]
        assert len(names) > 1
        assert samples(clips)[name] == [f"{clip}/{n}" for clip in names for n in range(1, LENGTHS[clip] + 1)]


def test_a_sample_is_the_one_asked_for(source):
    train = opened(source).split("train")
    order = list(LENGTHS)
    for i in (0, 3, len(train) - 1, -1, -len(train)):
        sample = train[i]
        clip, number = train.name(i % len(train)).split("/")
        pixel = np.float32([10 * order.index(clip) + 5, int(number), 77])
        assert sample["x"].dtype == torch.float32 and sample["x"].shape == (3, 8, 8)
        assert torch.equal(sample["x"][:, 2, 3], torch.from_numpy(pixel / np.float32(127.5) - 1))
        assert sample["group"] == int(stable_hash([clip])[0])
        assert sample["id"] == mix(int(stable_hash([clip])[0]), int(number))
    for i in (len(train), -len(train) - 1):
        with pytest.raises(IndexError, match=f"^sample {i} of {len(train)}$"):
            train[i]


def test_a_batch_travels_as_bytes_in_the_order_asked_for(source):
    train = opened(source).split("train")
    batch = train.batch([5, 0, 5])
    assert set(batch) == {"x", "id", "group"}
    assert batch["x"].dtype == torch.uint8 and batch["x"].shape == (3, 8, 8, 3)
    assert batch["id"].dtype == batch["group"].dtype == torch.int64
    for row, i in enumerate([5, 0, 5]):
        assert torch.equal(train.prepare(batch)["x"][row], train[i]["x"]) and batch["id"][row] == train[i]["id"]


def test_pixels_are_normalised_exactly_and_stay_channels_last():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(2, 16, 16, 3).contiguous()
    x = normalize(pixels)
    assert x.shape == (2, 3, 16, 16) and x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x[1, 2].flatten(), torch.arange(256) / 127.5 - 1)
    assert x.min() == -1 and x.max() == 1


@pytest.mark.parametrize("stride", [2, 3, 7])
def test_a_stride_takes_every_nth_frame_of_each_clip(source, stride):
    found = sum(samples(opened(source, frame_stride=stride)).values(), [])
    by_hand = [f"{clip}/{n}" for clip, length in LENGTHS.items() for n in range(1, length + 1, stride)]
    assert sorted(found) == sorted(by_hand)


def test_a_cache_stride_makes_strides_and_offsets_count_kept_frames(tmp_path, write_clips):
    source = write_clips(tmp_path / "data", {"a": 9})
    clips = opened(source, cache_stride=2, frame_stride=2, pair_offset=1, val_fraction=0.0, test_fraction=0.0)
    assert samples(clips)["train"] == ["a/1->3", "a/5->7"]
    assert clips.report["frames"] == 5


def test_broken_frames_are_no_samples_and_move_no_other(source):
    whole = sum(samples(opened(source), "id").values(), [])
    spoil(source, ("clip04", 2), ("clip09", 5), ("clip00", 1))
    os.utime(source / "clip04")
    clips = opened(source)
    found = samples(clips)
    assert sorted(sum(found.values(), [])) == sorted(
        f"{clip}/{n}"
        for clip, length in LENGTHS.items()
        for n in range(1, length + 1)
        if (clip, n) not in {("clip04", 2), ("clip09", 5), ("clip00", 1)}
    )
    assert set(sum(samples(clips, "id").values(), [])) < set(whole)
    assert clips.report["broken_frames"] == 3 and clips.report["frames"] == sum(LENGTHS.values()) - 3


# pairs


@pytest.mark.parametrize("stride, offset", [(1, 1), (1, 3), (2, 2), (3, 4)])
@pytest.mark.parametrize("broken", [(), (("clip04", 2), ("clip09", 5), ("clip14", 1), ("clip00", 1))])
def test_pairs_are_those_of_brute_force(source, stride, offset, broken):
    spoil(source, *broken)
    clips = opened(source, frame_stride=stride, pair_offset=offset)
    by_hand, clipped, alone = [], 0, 0
    for clip, length in LENGTHS.items():
        for first in range(1, length + 1, stride):
            second = min(first + offset, length)
            alone += second == first
            clipped += first < second < first + offset
            if second > first and not {(clip, first), (clip, second)} & set(broken):
                by_hand.append(f"{clip}/{first}->{second}")
    assert sorted(sum(samples(clips).values(), [])) == by_hand
    assert (clips.report["clipped_pairs"], clips.report["pairs_without_second_frame"]) == (clipped, alone)


def test_a_pair_holds_both_its_frames(source):
    train = opened(source, pair_offset=2).split("train")
    order = list(LENGTHS)
    batch = train.batch(range(len(train)))
    for i in range(len(train)):
        clip, numbers = train.name(i).split("/")
        first, second = map(int, numbers.split("->"))
        assert batch["first"][i, 0, 0].tolist() == [10 * order.index(clip) + 5, first, 77]
        assert batch["x"][i, 0, 0].tolist() == [10 * order.index(clip) + 5, second, 77]
        assert batch["id"][i] == mix(int(stable_hash([clip])[0]), first, second)
    assert train[3]["first"].dtype == torch.float32 and train[3]["first"].shape == (3, 8, 8)


def test_pairs_of_clips_of_one_frame_are_refused(tmp_path, write_clips):
    source = write_clips(tmp_path / "data", {"a": 1, "b": 1, "c": 1})
    assert opened(source).report["clips_of_one_frame"] == 3
    with pytest.raises(DataError, match="^pair_offset=2: every clip has a single frame; set it to 0 for no pairs$"):
        opened(source, pair_offset=2)


def test_an_offset_beyond_every_clip_is_refused(source):
    assert opened(source, pair_offset=4).report["clipped_pairs"] > 0
    with pytest.raises(DataError) as error:
        opened(source, pair_offset=5)
    rule = "is longer than every clip (the longest has 5 frames): choose at most 4"
    assert str(error.value) == f"pair_offset=5 frames {rule}"


# clips cut from longer ones


def test_a_video_is_cut_into_clips_that_are_split_apart(tmp_path, write_video):
    path = write_video(tmp_path / "walk.mkv", "libx264", frames=24)
    clips = opened(path, image_size=32, clip_length=5, val_fraction=0.3, test_fraction=0.3)
    assert [clips.name(i) for i in range(5)] == [f"walk@{n:05d}" for n in (0, 5, 10, 15, 20)]
    assert clips.length.tolist() == [5, 5, 5, 5, 4] and len(set(clips.group.tolist())) == 5
    assert clips.group[2] == mix(int(stable_hash(["walk"])[0]), 10)
    assert [clips.clip(i).shape[0] for i in range(5)] == [5, 5, 5, 5, 4]
    found = samples(clips)
    assert sorted(sum(found.values(), [])) == sorted(f"walk@{n // 5 * 5:05d}/{n}" for n in range(24))
    for names in found.values():  # whole clips
        cut = {name.split("/")[0] for name in names}
        assert len(names) == sum(4 if name == "walk@00020" else 5 for name in cut)


def test_pairs_do_not_reach_over_a_cut(tmp_path, write_clips):
    source = write_clips(tmp_path / "data", {"a": 7})
    clips = opened(source, clip_length=3, pair_offset=2, val_fraction=0.0, test_fraction=0.0)
    pairs = ["a@00000/1->3", "a@00000/2->3", "a@00003/4->6", "a@00003/5->6"]
    assert samples(clips)["train"] == pairs
    assert (clips.report["clipped_pairs"], clips.report["pairs_without_second_frame"]) == (2, 3)


def test_a_clip_gives_its_frames_that_decoded(source):
    spoil(source, ("clip04", 2))
    frames = opened(source).clip(4)
    assert frames.shape == (4, 3, 8, 8)
    assert torch.equal(frames[:, 1, 0, 0], torch.tensor([1, 3, 4, 5]) / 127.5 - 1)


@pytest.mark.skipif(not REAL.exists(), reason="WORKBENCH_TEST_DATA names no folder with cockatoo.mp4")
@pytest.mark.slow
def test_a_real_video_is_cut_into_clips():
    clips = opened(REAL, image_size=128, clip_length=20, max_broken_fraction=0.0)
    assert clips.report["frames"] == 280 and clips.report["broken_frames"] == 0
    assert clips.length.tolist() == [20] * 14 and clips.name(13) == "cockatoo@00260"
    assert clips.cache.number.tolist() == list(range(280))
    steps = np.abs(np.diff(clips.cache.frames[:, ::8, ::8].astype(int), axis=0)).mean((1, 2, 3))
    far = np.abs(clips.cache.frames[0, ::8, ::8].astype(int) - clips.cache.frames[140, ::8, ::8]).mean()
    assert np.median(steps) < far / 2  # neighbours in time look alike
    assert opened(REAL, image_size=128, clip_length=20).fingerprint == clips.fingerprint


# splits and identities


def test_adding_clips_moves_no_old_sample(source, write_clips):
    old = opened(source, val_fraction=0.25, test_fraction=0.25)
    before = {key: samples(old, key) for key in ("name", "id", "group")}
    write_clips(source, {f"a{i}": 2 for i in range(6)} | {f"z{i}": 2 for i in range(6)})
    new = opened(source, val_fraction=0.25, test_fraction=0.25)
    after = {key: samples(new, key) for key in ("name", "id", "group")}
    for split in SPLITS:
        kept = [i for i, name in enumerate(after["name"][split]) if name.startswith("clip")]
        assert len(kept) < len(after["name"][split])
        for key in before:
            assert [after[key][split][i] for i in kept] == before[key][split]


def test_no_id_occurs_twice_and_no_group_on_two_sides(source):
    clips = opened(source, val_fraction=0.25, test_fraction=0.25)
    ids = sum(samples(clips, "id").values(), [])
    assert len(set(ids)) == len(ids) == sum(LENGTHS.values())
    groups = [set(of_split) for of_split in samples(clips, "group").values()]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]


@pytest.mark.parametrize("name", ["val", "test"])
def test_an_empty_split_names_its_remedy(source, name):
    clips = opened(source, val_fraction=0.0, test_fraction=0.0)
    with pytest.raises(DataError) as error:
        clips.split(name)
    remedy = f"raise {name}_fraction or change split_seed"
    assert str(error.value) == f"the {name} split has no samples (0 of 24 clips): {remedy}"
    with pytest.raises(DataError, match="^split 'dev': must be one of train, val, test$"):
        clips.split("dev")


def test_a_source_that_leaves_nothing_to_train_on_is_refused_at_once(tmp_path, write_clips):
    source = write_clips(tmp_path / "data", {"a": 4})
    seed = next(s for s in range(99) if hash_split(stable_hash(["a"]), s, 0.1, 0.1)[0])
    with pytest.raises(DataError) as error:
        opened(source, split_seed=seed)
    remedy = "lower val_fraction or test_fraction, change split_seed, or cut long clips by clip_length"
    assert str(error.value) == f"the train split has no samples (0 of 1 clips): {remedy}"


def test_a_subset_is_drawn_by_seed_and_keeps_the_order(source):
    train = opened(source).split("train")
    names = [train.name(i) for i in range(len(train))]
    some = [subset.name(i) for subset in [train.subset(7, seed=1)] for i in range(7)]
    assert len(set(some)) == 7 and some == sorted(some, key=names.index)
    again, other = train.subset(7, seed=1), train.subset(7, seed=2)
    assert [again.name(i) for i in range(7)] == some != [other.name(i) for i in range(7)]
    assert train.subset(0) is train and train.subset(10**6) is train


# labels, actions, conditions


def test_the_official_split_is_honoured_and_the_rest_counted(source, tmp_path, write_labels):
    names = list(LENGTHS)
    labels = write_labels(tmp_path / "labels", train=names[2:], validation=names[:1])
    clips = opened(source, labels=str(labels), pair_offset=1)
    assert {name.split("/")[0] for name in samples(clips)["train"]} == {n for n in names[2:] if LENGTHS[n] > 1}
    assert clips.report["train_clips"] == 22 and clips.report["val_clips"] == 1
    assert clips.report["clips_in_no_label_file"] == 1
    assert not any(name.startswith("clip01/") for names in samples(clips).values() for name in names)
    table = clips.split("train").table()
    assert table.loc[0, ["clip", "frame", "label"]].tolist() == ["clip02", 2, "pushing cup clip02 from left to right"]
    with pytest.raises(DataError, match=r"^the test split has no samples \(0 of 24 clips\): add its label file$"):
        clips.split("test")


def test_a_label_file_naming_absent_clips_is_refused(source, tmp_path, write_labels):
    labels = write_labels(tmp_path / "labels", train=["clip00", "clip99"])
    with pytest.raises(
        DataError, match="names 1 of 2 clips that are absent from the data, such as clip99: add the clips"
    ):
        opened(source, labels=str(labels))


def test_all_clips_cut_from_one_have_its_official_split(source, tmp_path, write_labels):
    names = list(LENGTHS)
    labels = write_labels(tmp_path / "labels", train=names[:12], validation=names[12:])
    clips = opened(source, labels=str(labels), clip_length=2)
    assert {name.split("@")[0] for name in samples(clips)["val"]} == set(names[12:])


def test_conditions_and_actions_come_with_the_samples(source):
    rows = [(c, n) for c, length in LENGTHS.items() for n in range(1, length + 1)]
    text = "clip,frame,height,turn\n" + "".join(f"{c},{n},{int(c[4:]) + n / 8},{-n}\n" for c, n in reversed(rows))
    (source / "conditions.csv").write_text(text)
    (source / "actions.csv").write_text("clip,action\n" + "".join(f"{c},push {c[4:]}\n" for c in LENGTHS))
    spoil(source, ("clip04", 2))
    clips = opened(source)
    assert clips.condition_names == ["height", "turn"]
    for name in SPLITS:
        dataset = clips.split(name)
        table, batch = dataset.table(), dataset.batch(range(len(dataset)))
        assert table.columns.tolist() == ["clip", "frame", "action", "height", "turn"] and len(table) == len(dataset)
        for i, row in enumerate(table.itertuples()):
            assert dataset.name(i) == f"{row.clip}/{row.frame}" and row.action == f"push {row.clip[4:]}"
            assert batch["condition"][i].tolist() == [int(row.clip[4:]) + row.frame / 8, -row.frame]
            assert (row.height, row.turn) == tuple(batch["condition"][i].tolist())
        assert torch.equal(dataset[1]["condition"], batch["condition"][1])
    pairs = opened(source, pair_offset=1).split("train")
    second = [int(pairs.name(i).split("->")[1]) for i in range(len(pairs))]
    assert pairs.batch(range(len(pairs)))["condition"][:, 1].tolist() == [-n for n in second]


def test_a_missing_condition_is_refused_but_not_of_a_broken_frame(source):
    rows = [(c, n) for c, length in LENGTHS.items() for n in range(1, length + 1) if (c, n) != ("clip04", 2)]
    (source / "conditions.csv").write_text("clip,frame,height\n" + "".join(f"{c},{n},1\n" for c, n in rows))
    with pytest.raises(
        DataError, match="conditions.csv: no row for clip 'clip04', frame 2; add it, or remove the file$"
    ):
        opened(source)
    spoil(source, ("clip04", 2))
    os.utime(source / "clip04")
    assert opened(source).condition_names == ["height"]


def test_names_beyond_ascii_are_kept(tmp_path, write_clips):
    source = write_clips(tmp_path / "data", {"grün": 2, "löffel 1": 1})
    train = opened(source, val_fraction=0.0, test_fraction=0.0).split("train")
    assert train.table()["clip"].tolist() == ["grün", "grün", "löffel 1"] and train.name(2) == "löffel 1/1"


def test_the_report_counts_what_is_there(source):
    Image.new("L", (8, 8), 9).save(source / "clip03" / "img_00001.png")
    spoil(source, ("clip04", 2))
    report = opened(source).report
    assert report["clips"] == 24 and report["clips_of_one_frame"] == 5
    assert (report["frames"], report["broken_frames"], report["grey_frames"]) == (sum(LENGTHS.values()) - 1, 1, 1)
    assert sum(report[f"{name}_clips"] for name in SPLITS) == 24
    assert sum(report[f"{name}_samples"] for name in SPLITS) == report["frames"]
    assert report["clips_in_no_label_file"] == 0 and "clipped_pairs" not in report


# settings and the embedded data


@pytest.mark.parametrize(
    "values, message",
    [
        ({"image_size": 4}, "image_size=4: must be at least 8"),
        ({"frame_stride": 0}, "frame_stride=0: must be at least 1"),
        ({"pair_offset": -1}, "pair_offset=-1: must be at least 0"),
        ({"max_broken_fraction": 1.5}, "max_broken_fraction=1.5: must be at most 1"),
        ({"val_fraction": float("nan")}, "val_fraction=nan: must be "),
        ({"image_size": "64"}, "image_size='64': must be a number, and this is text"),
        ({"data": 3}, "data=3: must be text; put it in quotes"),
        ({"frame_strid": 2}, "unknown parameter 'frame_strid': did you mean 'frame_stride'?"),
        (
            {"val_fraction": 0.6, "test_fraction": 0.5},
            "val_fraction + test_fraction = 1.1: must be less than 1, to leave clips to train on",
        ),
    ],
)
def test_settings_out_of_range_are_refused(values, message):
    with pytest.raises(ConfigError) as error:
        ClipsConfig(**values)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["empty", "absent"])
def test_a_source_without_clips_is_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=f"^data='{tmp_path}/{name}': "):
        opened(tmp_path / name)


def test_small_frames_name_both_remedies(source):
    with pytest.raises(
        DataError, match="is 8x8 px, below image_size=16: choose image_size of at most 8, or set allow_up"
    ):
        opened(source, image_size=16)
    assert opened(source, image_size=16, allow_upscale=True).split("train")[0]["x"].shape == (3, 16, 16)


def test_the_embedded_data_is_rendered_once_and_read_like_any_other(tmp_path, monkeypatch):
    rendered = []

    def small(folder: Path, **options) -> Path:
        rendered.append(folder.exists())
        return write_pushing(folder, clips=16, frames=3, size=32)

    monkeypatch.setattr(clips_module, "write_pushing", small)
    config = ClipsConfig(image_size=16, val_fraction=0.2)
    first, second = open_clips(config), open_clips(config)
    assert rendered == [False, True] and first.fingerprint == second.fingerprint
    assert (tmp_path / "outputs" / "cache" / "pushing" / "actions.csv").exists()
    assert first.report["clips"] == 16 and first.report["frames"] == 48 and first.report["broken_frames"] == 0
    assert first.split("train").table()["action"].notna().all()
    assert first.split("train")[0]["condition"].shape == (len(first.condition_names),)
    assert "x" in first.condition_names


def test_an_outputs_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("WORKBENCH_OUTPUTS", str(tmp_path / "file"))
    with pytest.raises(
        DataError, match="^WORKBENCH_OUTPUTS='.*/file/cache': cannot be made .* set WORKBENCH_OUTPUTS to a"
    ):
        open_clips(ClipsConfig())


def test_the_table_has_a_row_per_clip_with_its_split(tmp_path, write_clips):
    source = write_clips(tmp_path / "data", LENGTHS)
    (source / "actions.csv").write_text("clip,action\n" + "".join(f"{name},act {n}\n" for name, n in LENGTHS.items()))
    clips = opened(source, val_fraction=0.25, test_fraction=0.25)
    table = clips.table()
    assert dict(zip(table["clip"], table["frames"], strict=True)) == LENGTHS
    assert [f"act {n}" for n in table["frames"]] == table["action"].tolist()
    for name in SPLITS:
        assert set(table.loc[table["split"] == name, "clip"]) == set(clips.split(name).table()["clip"])

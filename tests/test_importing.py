from pathlib import Path

import pytest
import yaml

from workbench.config import ConfigError
from workbench.importing import import_config
from workbench.models.hierarchical_vae import HierarchicalVAEConfig
from workbench.parameters import check, read_file
from workbench.schedule import TrainConfig, vae_weights

ROOT = Path(__file__).parents[1]

CONDITION = """\
Common params
Dim1\t\t484 # number of runs
Dim2\t\t200
Dim3\t\t95008
num_var 1
RESERVED\t0
RESERVED\t0
'
%VAE parameters  10002
Training_epochs\t10002
Batch_size\t16
LearningR\t0.0005
Latent_dim\t8\t# hierarchical
Latent_dim_end\t32 # main
Loss_type\t4
Stretch\t0
alpha\t\t100000000
Recon_iter\t1
% reduced
Dim2_red\t\t150
Dim3_red\t\t95000
'
%Conditioner
num_param\t1
param_dir\t/images
n_epoch\t20000
latent_conditioner_lr\t0.0001
latent_conditioner_batch\t8
latent_conditioner_weight_decay\t1e-6
latent_conditioner_dropout_rate\t0.2
use_spatial_attention\t1
input_type\timage\t#image, csvs, image_vit
param_data_type .png
"""
PRESET = "data_No, init_beta_divisior, num_filter_enc, latent_conditioner_filter\n3\n0\n1024 512 256 128\n{layers}\n"
E2E = "use_e2e_training 1\ne2e_loss_function SmoothL1\nuse_latent_regularization {on}\nlatent_reg_weight 0.02\n"


def imported(folder: Path, condition: str, layers: str = "") -> tuple[dict[str, dict], list[str]]:
    """Parameters by the number of their notebook, read back from YAML, and what was not carried over."""
    (folder / "condition.txt").write_text(condition)
    preset = folder / "preset.txt" if layers else None
    if preset:
        preset.write_text(PRESET.format(layers=layers))
    lines = import_config(folder / "condition.txt", preset, folder / "params" / "mine")
    files = sorted((folder / "params" / "mine").iterdir())
    assert [path.name for path in files] == [
        "01_inspect_data.yaml",
        "02_train_vae.yaml",
        "03_train_conditioner.yaml",
        "04_interpolate_latents.yaml",
    ]
    return {path.name[:2]: yaml.safe_load(path.read_text()) for path in files}, lines


def refusal(folder: Path, condition: str, preset: str | None = None) -> str:
    """The message of the error, without the folder; nothing may be written."""
    (folder / "condition.txt").write_text(condition)
    if preset is not None:
        (folder / "preset.txt").write_text(preset)
    with pytest.raises(ConfigError) as error:
        import_config(folder / "condition.txt", folder / "preset.txt" if preset is not None else None, folder / "out")
    assert not (folder / "out").exists()
    return str(error.value).replace(f"{folder}/", "")


# --- what is carried over ---


def test_a_whole_configuration_is_carried_over(tmp_path):
    files, _ = imported(tmp_path, CONDITION, "16 32 64")
    data = {
        "data_kind": "simulation",
        "data": "dataset3.pickle",
        "scaling": "node",
        "time_steps": 150,
        "node_end": 95000,
        "conditions": "images",
        "condition_colour": "grey",
        "condition_pca": 0,
    }
    assert files["01"] == {"run": "data", **data}
    assert files["02"] == {
        "run": "vae",
        **data,
        "epochs": 10002,
        "batch_size": 16,
        "lr": 0.0005,
        "hier_latent_dim": 8,
        "latent_dim": 32,
        "recon_loss": "huber",
        "recon_weight": 1e8,
        "filters": [1024, 512, 256, 128],
        "large": False,
        "spectral_norm": True,
        "output_norm": True,
        "all_codes": False,
        "schedule": "cosine",
        "kl_weight": 1.0,
        "kl_weight_start": 1e-4,
        "kl_rise_from": 0.3,
        "kl_rise_to": 0.8,
    }
    assert files["03"] == {
        "run": "conditioner",
        "vae_run": "vae",
        "conditioner": "cnn",
        "width": 16,
        "depth": 3,
        "epochs": 20000,
        "lr": 0.0001,
        "batch_size": 8,
        "weight_decay": 1e-6,
        "dropout": 0.2,
        "spatial_attention": True,
        "mode": "latent",
        "field_loss": "mse",
        "latent_reg_weight": 0.0,
        "preset": "none",
    }
    assert files["04"] == {"run": "walk", "vae_run": "vae"}


def test_numbers_are_read_back_with_their_types(tmp_path):
    """YAML 1.1 reads 1e-6 as text; whole values of weights are floats."""
    files, _ = imported(tmp_path, CONDITION.replace("0.2", "0").replace("0.0005", "1"))
    floats = {"02": ("lr", "recon_weight"), "03": ("lr", "weight_decay", "dropout", "latent_reg_weight")}
    for number, names in floats.items():
        assert {name: type(files[number][name]) for name in names} == dict.fromkeys(names, float)


def test_comments_name_the_source_of_a_value(tmp_path):
    imported(tmp_path, CONDITION)
    text = (tmp_path / "params" / "mine" / "01_inspect_data.yaml").read_text()
    assert text.startswith("# Imported from condition.txt.\n# The source counts 484 runs (Dim1).\n")
    assert "data: fields.npy  # set this to your file\n" in text
    assert "time_steps: 150  # Dim2_red\n" in text


def test_absent_keys_take_the_defaults_of_the_source_or_of_the_notebook(tmp_path):
    files, lines = imported(tmp_path, "title\nDim2 7\n")
    assert files["02"]["recon_weight"] == 1e6 and files["02"]["time_steps"] == 7
    assert not files["02"].keys() & {"epochs", "filters", "latent_dim", "node_end", "node_start"}
    assert files["03"]["dropout"] == 0.3 and files["03"]["weight_decay"] == 1e-4
    assert not files["03"].keys() & {"conditioner", "width", "depth", "epochs"}
    assert lines == []


def test_a_range_of_nodes_is_carried_over(tmp_path):
    files, lines = imported(tmp_path, "title\nDim3 900\nDim3_red 500\nDim3_start 100\nDim3_end 300\n")
    assert (files["01"]["node_start"], files["02"]["node_end"]) == (100, 300)
    assert lines == [f"Dim3_red=500 ({tmp_path}/condition.txt, line 3): the range is that of Dim3_start and Dim3_end"]


def test_a_first_line_may_be_a_key(tmp_path):
    assert imported(tmp_path, "Dim2 7\n")[0]["01"]["time_steps"] == 7


def test_end_to_end_training_is_carried_over(tmp_path):
    third = imported(tmp_path, CONDITION + E2E.format(on=1) + "e2e_gradient_checkpointing 1\n")[0]["03"]
    assert (third["mode"], third["field_loss"], third["latent_reg_weight"]) == ("end_to_end", "smooth_l1", 0.02)
    assert third["checkpoint_decoder"] is True


def test_latent_regularisation_that_is_off_weighs_nothing(tmp_path):
    files, lines = imported(tmp_path, CONDITION + E2E.format(on=0))
    assert files["03"]["latent_reg_weight"] == 0.0
    place = f"{tmp_path}/condition.txt, line {CONDITION.count(chr(10)) + 4}"
    assert f"latent_reg_weight=0.02 ({place}): has no effect without use_latent_regularization" in lines


def test_the_weight_of_the_field_loss_divides_the_other(tmp_path):
    """w * field + r * latent and field + r/w * latent have their minimum at the same place."""
    files, lines = imported(tmp_path, CONDITION + E2E.format(on=1) + "LC_alpha 1000\n")
    assert files["03"]["latent_reg_weight"] == pytest.approx(2e-5)
    assert any(line.startswith("LC_alpha=1000 (") and "latent_reg_weight is divided by it" in line for line in lines)


def test_enhanced_losses_are_carried_over(tmp_path):
    weights = "perceptual_weight 0.1\nconsistency_weight 0.3\nmae_weight 0.5\nhuber_weight 0.4\nhier_weight 2\n"
    on = CONDITION + "use_enhanced_loss 1\nuse_consistency_loss 0\nmse_weight 0.1\n" + weights
    files, lines = imported(tmp_path, on)
    names = ("preset", "perceptual_weight", "consistency_weight", "mae_weight", "huber_weight", "hier_weight")
    assert [files["03"][name] for name in names] == ["balanced", 0.1, 0.0, 0.5, 0.4, 2.0]
    assert any(line.startswith("mse_weight=0.1 (") for line in lines)


def test_enhanced_losses_that_are_off_leave_no_weights(tmp_path):
    files, lines = imported(tmp_path, CONDITION + "use_enhanced_loss 0\nenhancement_preset robust\nmae_weight 0.5\n")
    assert files["03"]["preset"] == "none" and "mae_weight" not in files["03"]
    assert sum(line.endswith("has no effect without use_enhanced_loss") for line in lines) == 2


def test_components_of_pictures_go_to_the_mlp(tmp_path):
    files, _ = imported(tmp_path, CONDITION + "use_pca 1\npca_components 20\n")
    assert files["01"]["condition_pca"] == files["02"]["condition_pca"] == 20
    assert files["03"]["conditioner"] == "mlp"


def test_a_table_of_conditions_needs_a_header(tmp_path):
    rows = CONDITION.replace("/images", "/data/rows.csv").replace("image\t#", "csvs\t#")
    files, lines = imported(tmp_path, rows, "64 64 64")
    assert files["02"]["conditions"] == "/data/rows.csv" and files["03"]["conditioner"] == "mlp"
    assert (files["03"]["width"], files["03"]["depth"]) == (64, 3)
    assert any("the source's CSV has no header; write the columns' names as its first line" in line for line in lines)


WHOLE = "".join(
    [CONDITION, E2E.format(on=1), "LC_alpha 1000\ne2e_gradient_checkpointing 1\n"]
    + ["use_enhanced_loss 1\nenhancement_preset small_dataset\nmae_weight 0.5\nhuber_weight 0\nhier_weight 2\n"]
    + ["perceptual_weight 0.1\nconsistency_weight 0.3\nconsistency_temperature 0.5\nmain_weight 20\n"]
)


@pytest.mark.parametrize(
    ("condition", "layers"),
    [
        ("title\nDim2 7\n", ""),
        (CONDITION, "16 32 64"),
        (CONDITION, "16 4"),
        (CONDITION.replace("/images", "rows.csv").replace("image\t#", "csv\t#"), "64 64 64"),
        (CONDITION + "use_pca 1\npca_components 20\n", ""),
        (CONDITION + "Dim3_start 100\nDim3_end 300\n", ""),
        (WHOLE, "16 32"),
    ],
)
def test_what_is_written_fits_the_notebooks(tmp_path, condition, layers):
    """Every parameter is there, of its type, in range, and of the kind of data that it is written for."""
    imported(tmp_path, condition, layers)
    for path in sorted((tmp_path / "params" / "mine").iterdir()):
        notebook, values = ROOT / "notebooks" / f"{path.stem}.ipynb", read_file(path)
        resolved = check(notebook, values, str(path))
        assert {name: resolved[name] for name in values} == values


def test_what_is_written_for_the_model_is_the_published_one(tmp_path):
    files, _ = imported(tmp_path, CONDITION)
    config = HierarchicalVAEConfig.pick(files["02"] | {"nodes": 3, "steps": 4, "filters": [4, 2]})
    assert (config.output_norm, config.all_codes, config.spectral_norm, config.large) == (True, False, True, False)
    weights = vae_weights(TrainConfig.pick(files["02"]), ("huber", "kl", "kl_levels"))
    assert weights(0.3) == {"huber": 1e8, "kl": 1e-4, "kl_levels": 1e-4}
    assert weights(0.8) == {"huber": 1e8, "kl": 1.0, "kl_levels": 1.0}


# --- what is not ---


def test_what_cannot_be_carried_over_is_named(tmp_path):
    extra = "e2e_vae_model_path model_save/SimulGen-VAE\nnum_aug_f 3\nrec_graph 0\nRESERVED 2\n"
    _, lines = imported(tmp_path, CONDITION + extra, "16 4")
    place = f"{tmp_path}/condition.txt, line"
    found = {line.partition(" ")[0]: line for line in lines}
    assert found.keys() == {
        *("Dim1=484", "num_var=1", "num_param=1", "param_data_type=.png", "num_aug_f=3", "RESERVED=2"),
        *("e2e_vae_model_path=model_save/SimulGen-VAE", "init_beta_divisior=0", "latent_conditioner_filter=16"),
    }
    assert found["Dim1=484"] == f"Dim1=484 ({place} 2): the number of runs is read off the data"
    assert "03 reads the run named by vae_run" in found["e2e_vae_model_path=model_save/SimulGen-VAE"]
    layers = found["latent_conditioner_filter=16"]
    assert layers.startswith(f"latent_conditioner_filter=16 4 ({tmp_path}/preset.txt, line 5): conditioners here have")


@pytest.mark.parametrize(
    "text, message",
    [
        ("Dim1 3\nBatchsize 8\n", "unknown key 'Batchsize' in condition.txt, line 2: did you mean 'Batch_size'?"),
        ("Dim1 3\nzzzz 8\n", "unknown key 'zzzz' in condition.txt, line 2: must be one of Dim1, Dim2, "),
        ("title\nDim1 many\n", "Dim1=many in condition.txt, line 2: must be a whole number"),
        ("title\n\nLoss_type 5 # x\n", "Loss_type=5 in condition.txt, line 3: must be one of 1, 2, 3, 4"),
        ("title\nLearningR x\n", "LearningR=x in condition.txt, line 2: must be a number, more than 0"),
        (
            "title\nDim1 3\nDim1 3\n",
            "Dim1 in condition.txt, line 3: is given before, in condition.txt, line 2; remove one",
        ),
        ("title\nDim1 # 3\n", "Dim1 in condition.txt, line 2: has 0 values, must have one; a comment begins with #"),
        ("title\nDim1 3 runs\n", "Dim1 in condition.txt, line 2: has 2 values, must have one; a comment begins with #"),
        (
            "input_type image_vit\n",
            "input_type=image_vit in condition.txt, line 1: must be one of image, csv, csvs; image_vit",
        ),
        ("Dim2 3\nDim2_red 4\n", "Dim2_red=4 in condition.txt, line 2: must be at most Dim2=3"),
        ("Dim3 3\nDim3_end 4\n", "Dim3_end=4 in condition.txt, line 2: must be at most Dim3=3"),
        ("Dim3_start 3\nDim3_end 3\n", "Dim3_start=3 in condition.txt, line 1: must be less than Dim3_end=3"),
        ("use_pca 1\npca_components 0\n", "use_pca=1 in condition.txt, line 1: needs pca_components of at least 1"),
        ("title\n%section\n'\n", "condition.txt: holds no key, such as Dim1; give the source's condition.txt"),
    ],
)
def test_a_condition_file_that_cannot_be_used_is_refused(tmp_path, text, message):
    assert refusal(tmp_path, text).startswith(message)


def test_every_problem_is_named_at_once(tmp_path):
    assert refusal(tmp_path, "title\nDim1 x\nLoss_type 9\nDim9 1\n").count("\n") == 2


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "title\n1\n0\n8 4\n",
            "preset.txt: has 4 lines, must have 5: a title, data_No, init_beta_divisior, num_filter_enc,",
        ),
        ("title\none\n0\n8 4\n8\n", "data_No=one in preset.txt, line 2: must be a whole number"),
        ("title\n1\n0\n8\n8\n", "num_filter_enc=8 in preset.txt, line 4: must be at least 2 whole numbers"),
        ("title\n1\n0\n8 x\n8\n", "num_filter_enc=8 x in preset.txt, line 4: must be a whole number"),
    ],
)
def test_a_preset_file_that_cannot_be_used_is_refused(tmp_path, text, message):
    assert refusal(tmp_path, CONDITION, text).startswith(message)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.txt: cannot be read: No such file or directory"):
        import_config(tmp_path / "gone.txt", None, tmp_path / "out")
    (tmp_path / "condition.txt").write_bytes(b"Dim1 \xff")
    with pytest.raises(ConfigError, match=r"condition\.txt: is not text in UTF-8"):
        import_config(tmp_path / "condition.txt", None, tmp_path / "out")


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "condition.txt").write_text(CONDITION)
    (tmp_path / "out").mkdir()
    import_config(tmp_path / "condition.txt", None, tmp_path / "out")
    before = (tmp_path / "out" / "02_train_vae.yaml").read_text()
    for out in (tmp_path / "out", tmp_path / "condition.txt"):
        with pytest.raises(
            ConfigError, match="exists and is not an empty folder: give another; nothing is overwritten"
        ):
            import_config(tmp_path / "condition.txt", None, out)
    assert (tmp_path / "out" / "02_train_vae.yaml").read_text() == before
    with pytest.raises(ConfigError, match="cannot be written: "):
        import_config(tmp_path / "condition.txt", None, tmp_path / "condition.txt" / "out")

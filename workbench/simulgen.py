"""Keys of the files that configure SimulGen-VAE, how their values are read, and the parameters here that they become.

Source: condition.txt, preset.txt and their readers in github.com/leesihun/SimulGen-VAE: names and meanings of the keys.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

INSPECT, VAE, CONDITIONER, WALK = "01_inspect_data", "02_train_vae", "03_train_conditioner", "04_interpolate_latents"
DATA = (INSPECT, VAE)


# --- how a value is read; each reader raises ValueError with the rule ---


def _whole(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]+", text):
            raise ValueError("must be a whole number")
        if int(text) < least:
            raise ValueError(f"must be at least {least}")
        return int(text)

    return read


def _number(rule: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ValueError(f"must be a number, {rule}") from None
        if not (math.isfinite(value) and holds(value)):
            raise ValueError(f"must be {rule}")
        return value

    return read


def _one_of(meanings: dict[str, Any], remark: str = "") -> Callable[[str], Any]:
    def read(text: str) -> Any:
        if text.lower() not in meanings:
            raise ValueError(f"must be one of {', '.join(meanings)}{remark}")
        return meanings[text.lower()]

    return read


def _data_file(text: str) -> str:
    return f"dataset{_whole(0)(text)}.pickle"


def _wholes(least: int) -> Callable[[str], list[int]]:
    def read(text: str) -> list[int]:
        if len(text.split()) < least:
            raise ValueError(f"must be at least {least} whole numbers with spaces between")
        return [_whole(1)(word) for word in text.split()]

    return read


_POSITIVE = _number("more than 0", lambda value: value > 0)
_WEIGHT = _number("at least 0", lambda value: value >= 0)
_SHARE = _number("at least 0 and less than 1", lambda value: 0 <= value < 1)
_FLAG = _one_of({"0": False, "1": True})
_LOSS = _one_of({"mse": "mse", "mae": "mae", "huber": "huber", "smoothl1": "smooth_l1"})
_NO_VIT = "; image_vit has no counterpart here: choose image, the CNN"
_AUGMENT = "its augmentation has no counterpart; see augment_noise, augment_scale and augment_shift in 02"


class Key(NamedTuple):
    """How a key of the source is read, and the parameter it becomes, or why it becomes none.

    Args:
        read: From the text of the value; raises ValueError with the rule.
        notebooks: Those whose file takes the parameter.
        name: The parameter; of several keys with one name the last given of the table counts.
        reason: Why it is not carried over; empty, too, for a switch, which other parameters carry.
        idle: Text of a value of which nothing need be said.
        remark: Written beside the parameter.
    """

    read: Callable[[str], Any]
    notebooks: tuple[str, ...] = ()
    name: str = ""
    reason: str = ""
    idle: str = ""
    remark: str = ""


KEYS: dict[str, Key] = {
    "Dim1": Key(_whole(1), reason="the number of runs is read off the data"),
    "Dim2": Key(_whole(1), DATA, "time_steps"),
    "Dim2_red": Key(_whole(1), DATA, "time_steps"),
    "Dim3": Key(_whole(1), DATA, "node_end"),
    "Dim3_red": Key(_whole(1), DATA, "node_end"),
    "Dim3_start": Key(_whole(0), DATA, "node_start"),
    "Dim3_end": Key(_whole(1), DATA, "node_end"),
    "num_var": Key(_whole(1), reason="the number of variables is read off the data"),
    "Training_epochs": Key(_whole(1), (VAE,), "epochs"),
    "Batch_size": Key(_whole(1), (VAE,), "batch_size"),
    "LearningR": Key(_POSITIVE, (VAE,), "lr"),
    "Latent_dim": Key(_whole(1), (VAE,), "hier_latent_dim"),
    "Latent_dim_end": Key(_whole(1), (VAE,), "latent_dim"),
    "Loss_type": Key(_one_of({"1": "mse", "2": "mae", "3": "smooth_l1", "4": "huber"}), (VAE,), "recon_loss"),
    "alpha": Key(_POSITIVE, (VAE,), "recon_weight"),
    "Stretch": Key(_whole(0), reason=_AUGMENT, idle="0"),
    "num_aug_f": Key(_whole(0), reason=_AUGMENT, idle="0"),
    "num_aug_a": Key(_whole(0), reason=_AUGMENT, idle="0"),
    "rec_graph": Key(_whole(0), reason="the notebooks always draw reconstructions", idle="0"),
    "Recon_iter": Key(_whole(0), reason="codes are the posterior's mean; none is drawn again", idle="1"),
    "num_param": Key(_whole(0), reason="the number of conditions is read off their file"),
    "n_sample": Key(_whole(0), reason="the number of runs is read off the data"),
    "param_dir": Key(str, DATA, "conditions", remark="set this to your folder or file"),
    "param_data_type": Key(
        _one_of({".png": "", ".jpg": "", ".jpeg": "", ".csv": ""}), reason="files are told by their endings"
    ),
    "input_type": Key(_one_of({"image": "cnn", "csv": "mlp", "csvs": "mlp"}, _NO_VIT), (CONDITIONER,), "conditioner"),
    "n_epoch": Key(_whole(1), (CONDITIONER,), "epochs"),
    "latent_conditioner_lr": Key(_POSITIVE, (CONDITIONER,), "lr"),
    "latent_conditioner_batch": Key(_whole(1), (CONDITIONER,), "batch_size"),
    "latent_conditioner_weight_decay": Key(_WEIGHT, (CONDITIONER,), "weight_decay"),
    "latent_conditioner_dropout_rate": Key(_SHARE, (CONDITIONER,), "dropout"),
    "use_spatial_attention": Key(_FLAG, (CONDITIONER,), "spatial_attention"),
    "use_pca": Key(_FLAG),
    "pca_components": Key(_whole(0), DATA, "condition_pca"),
    "pca_patch_size": Key(_whole(0), reason="components are those of whole pictures", idle="0"),
    "use_e2e_training": Key(_one_of({"0": "latent", "1": "end_to_end"}), (CONDITIONER,), "mode"),
    "use_improved_e2e": Key(_FLAG, reason="there is one end-to-end training here", idle="0"),
    "e2e_loss_function": Key(_LOSS, (CONDITIONER,), "field_loss"),
    "e2e_vae_model_path": Key(
        str,
        reason="a pickled module runs code as it is loaded; 03 reads the run named by vae_run, which 02 trains "
        "(weights of the source, saved as a state dict, are read by load_foreign('simulation_vae', …))",
    ),
    "e2e_gradient_checkpointing": Key(_FLAG, (CONDITIONER,), "checkpoint_decoder"),
    "e2e_memory_efficient": Key(_FLAG, reason="see checkpoint_decoder in 03", idle="0"),
    "e2e_batch_reduction_factor": Key(
        _POSITIVE, reason="a batch that does not fit in memory is split, not made smaller"
    ),
    "use_latent_regularization": Key(_FLAG),
    "latent_reg_weight": Key(_WEIGHT, (CONDITIONER,), "latent_reg_weight"),
    "LC_alpha": Key(
        _POSITIVE, reason="weighs the field loss, whose weight is 1 here: latent_reg_weight is divided by it instead"
    ),
    "use_enhanced_loss": Key(_FLAG),
    "enhancement_preset": Key(
        _one_of({name: name for name in ("balanced", "robust", "semantic", "fast", "small_dataset")}),
        (CONDITIONER,),
        "preset",
    ),
    "use_multiscale_loss": Key(_FLAG),
    "use_perceptual_loss": Key(_FLAG),
    "use_consistency_loss": Key(_FLAG),
    "mse_weight": Key(_WEIGHT, reason="the weight of the squared error is 1; weigh the others by it", idle="1.0"),
    "mae_weight": Key(_WEIGHT, (CONDITIONER,), "mae_weight"),
    "huber_weight": Key(_WEIGHT, (CONDITIONER,), "huber_weight"),
    "huber_beta": Key(_POSITIVE, reason="the Huber loss bends at 1", idle="1.0"),
    "main_weight": Key(_WEIGHT, (CONDITIONER,), "main_weight"),
    "hier_weight": Key(_WEIGHT, (CONDITIONER,), "hier_weight"),
    "perceptual_weight": Key(_WEIGHT, (CONDITIONER,), "perceptual_weight"),
    "perceptual_feature_layers": Key(str, reason="the sizes of the frozen networks are fixed"),
    "perceptual_similarity": Key(str, reason="features are compared by their cosine", idle="cosine"),
    "consistency_weight": Key(_WEIGHT, (CONDITIONER,), "consistency_weight"),
    "consistency_temperature": Key(_POSITIVE, (CONDITIONER,), "consistency_temperature"),
    "consistency_detach_original": Key(_FLAG, reason="the prediction for the input itself is detached", idle="1"),
    "traditional_ml_mode": Key(str, reason="ridge and kernel ridge stand beside every conditioner", idle="disabled"),
}
"""Every key of condition.txt, with the exception of the placeholder RESERVED."""


PRESET: dict[str, Key] = {
    "data_No": Key(_data_file, DATA, "data", remark="set this to your file"),
    "init_beta_divisior": Key(
        _whole(0), reason="the source reads it, and begins with a KL weight of 1e-4 all the same"
    ),
    "num_filter_enc": Key(_wholes(2), (VAE,), "filters"),
    "latent_conditioner_filter": Key(
        _wholes(1), reason="conditioners here have one width (MLP) or a doubling one (CNN); set width and depth in 03"
    ),
}
"""The lines of preset.txt after its first, in their order, by the names that its first line gives them."""

SWITCHES: dict[str, tuple[str, ...]] = {
    "use_e2e_training": ("use_latent_regularization", "e2e_gradient_checkpointing"),
    "use_latent_regularization": ("latent_reg_weight", "LC_alpha"),
    "use_enhanced_loss": (
        *("enhancement_preset", "use_multiscale_loss", "use_perceptual_loss", "use_consistency_loss"),
        *("mse_weight", "mae_weight", "huber_weight", "huber_beta", "main_weight", "hier_weight"),
        *("perceptual_weight", "perceptual_feature_layers", "perceptual_similarity"),
        *("consistency_weight", "consistency_temperature", "consistency_detach_original"),
    ),
    "use_pca": ("pca_components", "pca_patch_size"),
}
"""Keys without effect where a switch is off or absent."""

TERMS: dict[str, tuple[str, ...]] = {
    "use_multiscale_loss": ("mae_weight", "huber_weight"),
    "use_perceptual_loss": ("perceptual_weight",),
    "use_consistency_loss": ("consistency_weight",),
}
"""Weights that are 0 where the switch of their term is off; where it is absent, they count."""

DEFAULTS: dict[str, str] = {
    "alpha": "1000000",
    "latent_conditioner_weight_decay": "1e-4",
    "latent_conditioner_dropout_rate": "0.3",
    "use_spatial_attention": "1",
    "use_e2e_training": "0",
    "e2e_loss_function": "MSE",
}
"""The source's values of keys that may be absent."""

SWITCHED: dict[str, tuple[str, str, Any]] = {
    "use_latent_regularization": ("latent_reg_weight", "0.001", 0.0),
    "use_enhanced_loss": ("enhancement_preset", "balanced", "none"),
    "use_pca": ("pca_components", "1", 0),
}
"""By switch: a key, the source's value of it where the key is absent, our parameter where the switch is off."""

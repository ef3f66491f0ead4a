import pytest

from workbench.simulgen import DEFAULTS, KEYS, PRESET, SWITCHED, SWITCHES, TERMS


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("Dim1", "484", 484),
        ("LearningR", "5e-4", 5e-4),
        ("Loss_type", "3", "smooth_l1"),
        ("e2e_loss_function", "smoothL1", "smooth_l1"),
        ("e2e_loss_function", "HUBER", "huber"),
        ("use_spatial_attention", "1", True),
        ("use_e2e_training", "0", "latent"),
        ("input_type", "csv", "mlp"),
        ("input_type", "csvs", "mlp"),
        ("input_type", "image", "cnn"),
        ("enhancement_preset", "Small_dataset", "small_dataset"),
    ],
)
def test_values_are_read_as_what_they_mean(key, text, value):
    read = KEYS[key].read(text)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    "key, text, rule",
    [
        ("Dim1", "many", "must be a whole number"),
        ("Dim1", "1e3", "must be a whole number"),
        ("Dim1", "0", "must be at least 1"),
        ("LearningR", "fast", "must be a number, more than 0"),
        ("LearningR", "0", "must be more than 0"),
        ("LearningR", "inf", "must be more than 0"),
        ("latent_reg_weight", "-1", "must be at least 0"),
        ("latent_conditioner_dropout_rate", "1", "must be at least 0 and less than 1"),
        ("Loss_type", "5", "must be one of 1, 2, 3, 4"),
        ("use_pca", "yes", "must be one of 0, 1"),
        ("input_type", "image_vit", "must be one of image, csv, csvs; image_vit has no counterpart here: choose image"),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_rule(key, text, rule):
    with pytest.raises(ValueError) as error:
        KEYS[key].read(text)
    assert str(error.value).startswith(rule)


@pytest.mark.parametrize(
    "text, rule", [("", "must be at least 2 whole numbers"), ("64", "must be at least 2"), ("8 a", "w")]
)
def test_layers_are_whole_numbers(text, rule):
    assert PRESET["num_filter_enc"].read("1024 512") == [1024, 512]
    with pytest.raises(ValueError, match=rule):
        PRESET["num_filter_enc"].read(text)


def test_every_key_is_a_parameter_a_switch_or_has_a_reason():
    switches = SWITCHES.keys() | TERMS.keys()
    for key, kind in (KEYS | PRESET).items():
        assert bool(kind.name) == bool(kind.notebooks), key
        assert bool(kind.name) + bool(kind.reason) + (key in switches and not kind.name) == 1, key
        assert not kind.idle or kind.reason, key


def test_the_tables_speak_of_known_keys_and_readable_values():
    named = {key for table in (SWITCHES, TERMS) for keys in table.values() for key in keys}
    assert named | SWITCHES.keys() | TERMS.keys() | DEFAULTS.keys() | SWITCHED.keys() <= KEYS.keys()
    for key, text in [*DEFAULTS.items(), *((key, text) for key, text, _ in SWITCHED.values())]:
        KEYS[key].read(text)
    for kind in KEYS.values():
        assert not kind.idle or kind.read(kind.idle) is not None

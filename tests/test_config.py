from typing import Literal

import pytest
from pydantic import Field, model_validator

from workbench.config import Config, ConfigError, nearest


class Settings(Config):
    epochs: int = Field(1, ge=1)
    lr: float = Field(1e-4, gt=0, lt=10, allow_inf_nan=False)
    share: float = Field(0.5, le=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    name: str = "vae"
    dims: list[int] = Field([1], min_length=1)

    @model_validator(mode="after")
    def _even(self) -> "Settings":
        if sum(self.dims) == 13:
            raise ValueError(f"dims={self.dims}: must not sum to 13")
        return self


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "epochs=0: must be at least 1"),
        ({"epochs": -3}, "epochs=-3: must be at least 1"),
        ({"epochs": 1.5}, "epochs=1.5: must be a whole number"),
        ({"epochs": True}, "epochs=True: must be a whole number"),
        ({"epochs": "16"}, "epochs='16': must be a number, and this is text: write 16 without quotes"),
        ({"epochs": "1e3"}, "epochs='1e3': must be a number, and YAML reads 1e3 as text: write 1000 without quotes"),
        ({"epochs": "1.5"}, "epochs='1.5': must be a whole number"),
        ({"epochs": None}, "epochs=None: must be a whole number"),
        ({"lr": 0}, "lr=0: must be more than 0"),
        ({"lr": 10.0}, "lr=10.0: must be less than 10"),
        ({"lr": True}, "lr=True: must be a number"),
        ({"lr": "fast"}, "lr='fast': must be a number"),
        ({"lr": float("nan")}, "lr=nan: must be finite"),
        ({"lr": float("inf")}, "lr=inf: must be finite"),
        (
            {"lr": "1e-4"},
            "lr='1e-4': must be a number, and YAML reads 1e-4 as text: write 1.0e-4 or 0.0001 without quotes",
        ),
        ({"lr": "2E3"}, "lr='2E3': must be a number, and YAML reads 2E3 as text: write 2.0e+3 or 2000 without quotes"),
        ({"lr": "1e-30"}, "lr='1e-30': must be a number, and YAML reads 1e-30 as text: write 1.0e-30 without quotes"),
        ({"share": 1.5}, "share=1.5: must be at most 1"),
        ({"precision": "fp16"}, "precision='fp16': must be 'fp32' or 'bf16'"),
        ({"compile": 1}, "compile=1: must be true or false"),
        ({"name": 5}, "name=5: must be text; put it in quotes"),
        ({"dims": 3}, "dims=3: must be a list, such as [32, 64, 128]"),
        ({"dims": []}, "dims=[]: must have at least 1 entry"),
        ({"dims": [3, "4"]}, "dims[1]='4': must be a number, and this is text: write 4 without quotes"),
        ({"dims": [6, 7]}, "dims=[6, 7]: must not sum to 13"),
        ({"epoch": 3}, "unknown parameter 'epoch': did you mean 'epochs'?"),
        (
            {"zzz": 3},
            "unknown parameter 'zzz': must be one of epochs, lr, share, precision, compile, name, dims",
        ),
    ],
)
def test_a_wrong_value_is_named_with_its_rule(values: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings(**values)
    assert str(caught.value) == message


@pytest.mark.parametrize("written", ["1.0e-4", "2.0e+3", "1.0e-30", "0.0001"])
def test_the_notation_that_messages_advise_is_a_number_in_yaml(written: str) -> None:
    import yaml

    assert isinstance(yaml.safe_load(written), float)


def test_every_problem_has_its_line_and_the_file() -> None:
    with pytest.raises(ConfigError) as caught:
        Settings(epochs=0, lr="x")
    assert str(caught.value.at("params/a.yaml")).splitlines() == [
        "epochs=0 in params/a.yaml: must be at least 1",
        "lr='x' in params/a.yaml: must be a number",
    ]


def test_pick_takes_what_it_knows_and_leaves_defaults() -> None:
    settings = Settings.pick({"epochs": 7, "unknown": 1})
    assert (settings.epochs, settings.lr) == (7, 1e-4)


def test_settings_do_not_change() -> None:
    settings = Settings()
    with pytest.raises(ValueError, match="frozen"):
        settings.epochs = 3


def test_a_whole_number_may_stand_for_a_float() -> None:
    assert Settings(lr=1).lr == 1.0


def test_nearest_suggests_only_what_is_near() -> None:
    assert nearest("laten_dim", ["latent_dim", "lr"]) == "did you mean 'latent_dim'?"
    assert nearest("q", ["latent_dim", "lr"]) == "must be one of latent_dim, lr"

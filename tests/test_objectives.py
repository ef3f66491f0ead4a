import pytest
import torch
from tiny import Images, Linear
from torch import nn

from workbench.objectives import Objective, Reconstruction, evaluate


class Means(nn.Module):
    """Terms whose mean over a split is known: that of x, and of x squared, per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.modes: list[bool] = []

    def loss(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.modes.append(self.training)
        assert not torch.is_grad_enabled()
        return {"mean": self.weight * batch["x"].mean(), "square": batch["x"].square().mean()}


def brighter(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return batch | {"x": batch["x"] + 1}


# --- evaluation ---


@pytest.mark.parametrize("batch_size", [1, 5, 12, 100])
def test_every_sample_counts_alike_whatever_the_batch_size(batch_size: int) -> None:
    images, done = Images(12), []
    terms = evaluate(Means(), images, batch_size, after_batch=done.append)
    assert terms == pytest.approx({"mean": images.x.mean().item(), "square": images.x.square().mean().item()})
    assert done == [min(i + batch_size, 12) for i in range(0, 12, batch_size)]


@pytest.mark.parametrize("mode", [True, False])
def test_the_model_is_in_evaluation_mode_and_then_as_before(mode: bool) -> None:
    model = Means().train(mode)
    evaluate(model, Images(12), 5)
    assert model.modes == [False] * 3 and model.training == mode


def test_another_loss_is_evaluated_in_place_of_the_models() -> None:
    model, images = Means(), Images(12)
    terms = evaluate(model, images, 5, loss=lambda batch: {"other": 2 * batch["x"].mean()})
    assert terms == pytest.approx({"other": 2 * images.x.mean().item()}) and model.modes == []


def test_what_after_batch_raises_ends_the_evaluation() -> None:
    def stops(done: int) -> None:
        raise KeyboardInterrupt

    model = Means()
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, Images(12), 4, after_batch=stops)
    assert len(model.modes) == 1


# --- reconstruction ---


def test_reconstruction_is_an_objective_of_no_group() -> None:
    objective = Reconstruction(Linear())
    assert isinstance(objective, Objective) and objective.group == ""
    x = Images(4).x
    assert torch.equal(objective.predict({"x": x}), objective.model(x))


def test_augmentation_is_for_training_only() -> None:
    model, batch = Linear(), {"x": Images(4).x, "noise": torch.zeros(4, 3)}
    objective, plain = Reconstruction(model, brighter), Reconstruction(model)
    model.train()
    assert objective.loss(batch) == model.loss(brighter(batch))
    assert objective.loss(batch)["mse"] != plain.loss(batch)["mse"]
    assert torch.equal(objective.predict(batch), model(batch["x"])), "pictures show the samples as they are"
    model.eval()
    assert objective.loss(batch) == plain.loss(batch) == model.loss(batch)


def test_evaluation_of_an_augmented_objective_is_of_the_samples_as_they_are() -> None:
    model, images = Linear().train(), Images(12)
    terms = evaluate(model, images, 5, loss=Reconstruction(model, brighter).loss)
    assert terms == evaluate(model, images, 5)

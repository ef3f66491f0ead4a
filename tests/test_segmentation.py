import pytest
import torch
from sklearn.metrics import confusion_matrix as counted
from sklearn.metrics import jaccard_score

from workbench.segmentation import accuracy, class_iou, confusion_matrices, mean_iou

REFUSED = (ValueError, TypeError)  # TypeError from the shape checks that run in tests
NAN = float("nan")


def classes(*shape: int, seed: int, lowest: int = 0, n_classes: int = 4) -> torch.Tensor:
    return torch.randint(lowest, n_classes, shape, generator=torch.Generator().manual_seed(seed))


# --- counts ---


def test_rows_are_true_classes_and_columns_predicted_ones() -> None:
    target = torch.tensor([[0, 0, 1, -1], [2, 2, 2, -1]])
    predicted = torch.tensor([[0, 1, 1, 2], [0, 2, 2, 1]])
    expected = torch.tensor([[[1, 1, 0], [0, 1, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 0], [1, 0, 2]]])
    assert torch.equal(confusion_matrices(predicted, target, 3), expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8])
def test_counts_agree_with_scikit_learn_for_each_sample(dtype: torch.dtype) -> None:
    """12 classes: a cell's number does not fit into 8 bits."""
    predicted = classes(3, 16, 16, seed=0, n_classes=12)
    target = classes(3, 16, 16, seed=1, lowest=-1, n_classes=12)
    found = confusion_matrices(predicted.to(dtype), target.to(dtype), 12)
    for matrix, p, t in zip(found, predicted, target, strict=True):
        known = t != -1
        assert torch.equal(matrix, torch.as_tensor(counted(t[known], p[known], labels=range(12))))


def test_the_matrix_of_a_split_does_not_depend_on_its_batches() -> None:
    predicted, target = classes(10, 8, 8, seed=0), classes(10, 8, 8, seed=1, lowest=-1)
    at_once = confusion_matrices(predicted, target, 4).sum(0)
    for size in (1, 3, 10):
        batches = zip(predicted.split(size), target.split(size), strict=True)
        assert torch.equal(sum(confusion_matrices(p, t, 4).sum(0) for p, t in batches), at_once)
    assert at_once.sum() == (target != -1).sum()


def test_what_cannot_be_counted_is_refused() -> None:
    one = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(REFUSED):
        confusion_matrices(one, torch.zeros(1, 3, dtype=torch.int64), 2)
    message = "target holds class 2: must be from -1 to 1, as there are 2 classes; give the data's own n_classes"
    with pytest.raises(ValueError, match=message):
        confusion_matrices(one, one + 2, 2)
    with pytest.raises(ValueError, match="target holds class -2: must be from -1 to 1"):
        confusion_matrices(one, one - 2, 2)
    with pytest.raises(ValueError, match="predicted holds class -1: must be from 0 to 1"):
        confusion_matrices(one - 1, one, 2)


# --- figures ---


def test_a_perfect_prediction_has_an_iou_of_one_and_absent_classes_have_none() -> None:
    target = classes(2, 8, 8, seed=0, n_classes=3)
    matrix = confusion_matrices(target, target, 5).sum(0)
    torch.testing.assert_close(class_iou(matrix), torch.tensor([1, 1, 1, NAN, NAN]).double(), equal_nan=True)
    assert mean_iou(matrix) == accuracy(matrix) == 1


@pytest.mark.parametrize("constant", [0, 2, 3])
def test_a_constant_prediction_has_its_closed_form(constant: int) -> None:
    """Its class has its share as IoU, the others that are there 0; one that is not there has 0 where predicted."""
    shares = torch.tensor([0.5, 0.3, 0.2, 0.0])
    target = torch.repeat_interleave(torch.arange(4), (100 * shares).round().long()).reshape(1, 10, 10)
    matrix = confusion_matrices(torch.full_like(target, constant), target, 4).sum(0)
    iou = torch.zeros(4).double()
    iou[constant] = shares[constant]
    if constant != 3:
        iou[3] = NAN
    torch.testing.assert_close(class_iou(matrix), iou, equal_nan=True)
    present = 3 if constant != 3 else 4
    assert mean_iou(matrix).item() == pytest.approx(shares[constant].item() / present)
    assert accuracy(matrix).item() == pytest.approx(shares[constant].item())


def test_iou_agrees_with_scikit_learn() -> None:
    predicted, target = classes(4, 16, 16, seed=0), classes(4, 16, 16, seed=1, lowest=-1)
    predicted = torch.where(classes(4, 16, 16, seed=2) > 0, target.clamp(min=0), predicted)
    matrix, known = confusion_matrices(predicted, target, 4).sum(0), target != -1
    expected = jaccard_score(target[known], predicted[known], average=None)
    torch.testing.assert_close(class_iou(matrix), torch.as_tensor(expected))
    assert mean_iou(matrix).item() == pytest.approx(expected.mean())
    assert accuracy(matrix).item() == pytest.approx((target == predicted)[known].double().mean().item())


def test_figures_of_each_sample_come_from_its_own_matrix() -> None:
    predicted, target = classes(3, 8, 8, seed=0), classes(3, 8, 8, seed=1)
    matrices = confusion_matrices(predicted, target, 4)
    torch.testing.assert_close(accuracy(matrices), (predicted == target).double().mean((1, 2)))
    torch.testing.assert_close(mean_iou(matrices), torch.stack([mean_iou(matrix) for matrix in matrices]))
    assert class_iou(matrices).shape == (3, 4)


def test_types_of_images_are_counted_as_well() -> None:
    predicted, target = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, -1])
    assert accuracy(confusion_matrices(predicted, target, 3).sum(0)).item() == pytest.approx(2 / 3)


def test_where_nothing_is_labelled_there_is_no_figure() -> None:
    nothing = confusion_matrices(torch.zeros(1, 4, dtype=torch.int64), torch.full((1, 4), -1), 3)
    assert accuracy(nothing).isnan().all() and mean_iou(nothing).isnan().all()

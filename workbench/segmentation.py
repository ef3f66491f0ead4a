"""How well classes are told: accuracy and intersection over union, from counts that add up over batches.

Classes are those of pixels, or of whole images. Elements with target -1 are unlabelled and count nowhere. Figures of
a split come from the sum of its confusion matrices, not from a mean over images, in which rare classes would vanish.

Source: Everingham et al. 2010, "The PASCAL visual object classes (VOC) challenge" (intersection over union).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

UNLABELLED = -1


def confusion_matrices(
    predicted: Int[Tensor, "b ..."], target: Int[Tensor, "b ..."], n_classes: int
) -> Int[Tensor, "b k k"]:
    """How often each class (row) was taken for each (column), by sample; sum over samples for those of a split.

    Args:
        predicted: Classes from 0, of each pixel (b, h, w) or of each image (b,).
        target: True classes; -1 where unlabelled.
        n_classes: Number of classes, k.

    Raises:
        ValueError: the shapes differ, or a class is outside its range.
    """
    if predicted.shape != target.shape:
        raise ValueError(
            f"predicted of shape {tuple(predicted.shape)} and target of shape {tuple(target.shape)}: must be equal"
        )
    _check_range("predicted", predicted, 0, n_classes)
    _check_range("target", target, UNLABELLED, n_classes)
    b, cells = len(target), n_classes**2
    samples = torch.arange(b, device=target.device).reshape(b, *[1] * (target.dim() - 1))
    cell = samples * cells + n_classes * target.long() + predicted  # (b, ...), of the b matrices, row by row
    counts = torch.bincount(cell[target != UNLABELLED], minlength=b * cells)
    return counts.reshape(b, n_classes, n_classes)


def accuracy(confusion: Int[Tensor, "*b k k"]) -> Float[Tensor, "*b"]:
    """Share of the labelled pixels, or images, whose class is right; NaN where nothing is labelled."""
    confusion = confusion.double()
    return confusion.diagonal(dim1=-2, dim2=-1).sum(-1) / confusion.sum((-2, -1))


def class_iou(confusion: Int[Tensor, "*b k k"]) -> Float[Tensor, "*b k"]:
    """Intersection over union of each class, 0 to 1; NaN where it is neither there nor predicted."""
    confusion = confusion.double()
    right = confusion.diagonal(dim1=-2, dim2=-1)
    return right / (confusion.sum(-1) + confusion.sum(-2) - right)


def mean_iou(confusion: Int[Tensor, "*b k k"]) -> Float[Tensor, "*b"]:
    """Mean of `class_iou` over the classes that are there or predicted; NaN where nothing is labelled."""
    return class_iou(confusion).nanmean(-1)


def _check_range(name: str, classes: Tensor, lowest: int, n_classes: int) -> None:
    outside = classes[(classes < lowest) | (classes >= n_classes)]
    if len(outside):
        raise ValueError(
            f"{name} holds class {int(outside[0])}: must be from {lowest} to {n_classes - 1}, as there are "
            f"{n_classes} classes; give the data's own n_classes"
        )

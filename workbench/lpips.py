"""LPIPS, the learned perceptual distance between images, without torchvision and without a download.

Paper: Zhang, Isola, Efros, Shechtman & Wang 2018, The unreasonable effectiveness of deep features as a
perceptual metric. Reference: github.com/richzhang/PerceptualSimilarity, version 0.1, net "alex", with heads.
The AlexNet weights come from a file the user gives, the heads from the installed torchmetrics package.

Deviations, none of which changes a value: no dropout before the heads, the identity at evaluation;
channels are scaled by a norm whose gradient is finite at zero.
"""

import pickle
from pathlib import Path

import torch
import torchmetrics
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

HEADS_FILE = Path(torchmetrics.__file__).parent / "functional/image/lpips_models/alex.pth"
CHANNELS = (64, 192, 384, 256, 256)  # after each of AlexNet's five ReLUs
RELU_LAYERS = (1, 4, 7, 9, 11)  # where they are in torchvision's `features`
SHIFT = (-0.030, -0.088, -0.188)  # ImageNet mean per channel, on the [-1, 1] scale
SCALE = (0.458, 0.448, 0.450)  # ImageNet standard deviation, likewise
LEAST_SIZE = 31  # [px], below it AlexNet's second pooling has nothing left
EPSILON = 1e-10  # keeps channels that are all zero at zero


class LPIPS(nn.Module):
    """Perceptual distance of each pair of images; frozen, in evaluation mode.

    Args:
        weights: Local file of torchvision's AlexNet weights, .pth or .safetensors.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read, or does not hold AlexNet's features in their shapes.

    Source: Zhang et al. 2018, equation 1.
    """

    def __init__(self, weights: Path) -> None:
        super().__init__()
        self.features = _alexnet_features()
        self.heads = nn.ParameterList(torch.empty(1, channels, 1, 1) for channels in CHANNELS)
        self.register_buffer("shift", torch.tensor(SHIFT).reshape(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).reshape(1, 3, 1, 1))
        _load_strictly(self.features, _feature_weights(weights), weights)
        heads = _read_tensors(HEADS_FILE)
        heads = {f"{i}": heads.get(f"lin{i}.model.1.weight") for i in range(len(CHANNELS))}
        _load_strictly(self.heads, {key: head for key, head in heads.items() if head is not None}, HEADS_FILE)
        self.eval().requires_grad_(False)

    def forward(self, x_hat: Float[Tensor, "b 3 h w"], x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
        """Distance of each pair, zero for equal images, dimensionless.

        Args:
            x_hat: Reconstructions in [-1, 1].
            x: Originals in [-1, 1], RGB, at least 31 px high and wide.

        Raises:
            ValueError: The images have other shapes.
        """
        _check_images(x_hat, x)
        distance = x.new_zeros(len(x))
        x_hat, x = (x_hat - self.shift) / self.scale, (x - self.shift) / self.scale
        for i, layer in enumerate(self.features):
            x_hat, x = layer(x_hat), layer(x)  # (b, c, h, w)
            if i in RELU_LAYERS:
                head = self.heads[RELU_LAYERS.index(i)]  # (1, c, 1, 1)
                difference = (_unit_channels(x_hat) - _unit_channels(x)).square()
                distance = distance + (difference * head).sum(1).mean((1, 2))
        return distance


def lpips_or_note(weights: str) -> tuple[LPIPS | None, str]:
    """The distance where a weights file is given, and a sentence for the notebook either way.

    Args:
        weights: Path of torchvision's AlexNet weights, or an empty string for no LPIPS.
    """
    if not weights:
        return None, "LPIPS not computed: give lpips_weights, a local file of torchvision's AlexNet weights"
    return LPIPS(Path(weights)), f"LPIPS computed with the AlexNet weights in {weights}"


def _alexnet_features() -> nn.Sequential:
    """The convolutional part of torchvision's AlexNet up to its last ReLU, with torchvision's indices."""
    return nn.Sequential(
        nn.Conv2d(3, 64, kernel_size=11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(64, 192, kernel_size=5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(192, 384, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, kernel_size=3, padding=1),
        nn.ReLU(),
    )


def _unit_channels(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Features scaled to unit length along the channels."""
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + EPSILON)


def _feature_weights(path: Path) -> dict[str, Tensor]:
    """Tensors below `features.`; `classifier.` is left out knowingly, LPIPS stops before it."""
    tensors = _read_tensors(path)
    unknown = sorted(key for key in tensors if not key.startswith(("features.", "classifier.")))
    if unknown:
        raise ValueError(
            f"{path} holds {unknown[0]!r}: AlexNet has only features.* and classifier.*; "
            "give torchvision's AlexNet weights"
        )
    return {key.removeprefix("features."): x for key, x in tensors.items() if key.startswith("features.")}


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """State dict of a .safetensors or PyTorch file, on the CPU, without running code from it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a local file of torchvision's AlexNet weights")
    try:
        tensors = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read as a file of weights; download it again") from error
    if not isinstance(tensors, dict) or not all(isinstance(x, Tensor) for x in tensors.values()):
        raise ValueError(f"{path} holds a {type(tensors).__name__}: must be a state dict of tensors")
    return tensors


def _load_strictly(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load tensors into a module; names and shapes must agree exactly."""
    expected = {key: tuple(x.shape) for key, x in module.state_dict().items()}
    found = {key: tuple(x.shape) for key, x in tensors.items()}
    wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    if wrong:
        key = wrong[0]
        raise ValueError(
            f"{path}: layer {key!r} has shape {found.get(key, 'missing')}, AlexNet's is "
            f"{expected.get(key, 'without it')}; give torchvision's AlexNet weights"
        )
    module.load_state_dict(tensors)


def _check_images(x_hat: Tensor, x: Tensor) -> None:
    if x_hat.shape != x.shape or x.ndim != 4 or x.shape[1] != 3 or min(x.shape[-2:]) < LEAST_SIZE:
        raise ValueError(
            f"images of shapes {tuple(x_hat.shape)} and {tuple(x.shape)}: LPIPS needs equal (b, 3, h, w), "
            f"h and w at least {LEAST_SIZE} px; repeat grey images to 3 channels, enlarge small ones"
        )

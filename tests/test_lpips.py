from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from workbench.lpips import HEADS_FILE, LPIPS, lpips_or_note

LAYERS = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Random weights under the names of torchvision's AlexNet, with a piece of the classifier."""
    tensors = {"classifier.1.weight": torch.zeros(2, 2)}
    for i, (c_out, c_in, k) in LAYERS.items():
        tensors[f"features.{i}.weight"] = random(c_out, c_in, k, k, seed=i) * (2 / (c_in * k * k)) ** 0.5
        tensors[f"features.{i}.bias"] = 0.05 * random(c_out, seed=i + 100)
    return tensors


@pytest.fixture(scope="module")
def weights_file(weights: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("alexnet") / "alexnet.pth"
    torch.save(weights, path)
    return path


@pytest.fixture(scope="module")
def lpips(weights_file: Path) -> LPIPS:
    return LPIPS(weights_file)


def recomputed(x_hat: torch.Tensor, x: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """The published formula, written out layer by layer."""
    heads = torch.load(HEADS_FILE, map_location="cpu", weights_only=True)
    shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None]

    def features(image: torch.Tensor) -> list[torch.Tensor]:
        def convolve(y: torch.Tensor, i: int, **options: int) -> torch.Tensor:
            return F.relu(F.conv2d(y, weights[f"features.{i}.weight"], weights[f"features.{i}.bias"], **options))

        first = convolve((image - shift) / scale, 0, stride=4, padding=2)
        second = convolve(F.max_pool2d(first, 3, 2), 3, padding=2)
        third = convolve(F.max_pool2d(second, 3, 2), 6, padding=1)
        fourth = convolve(third, 8, padding=1)
        return [first, second, third, fourth, convolve(fourth, 10, padding=1)]

    total = torch.zeros(len(x))
    for i, (y_hat, y) in enumerate(zip(features(x_hat), features(x), strict=True)):
        y_hat = y_hat / (y_hat.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)
        y = y / (y.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)
        total += F.conv2d((y_hat - y) ** 2, heads[f"lin{i}.model.1.weight"]).mean((1, 2, 3))
    return total


@pytest.mark.parametrize("size", [(31, 31), (64, 48)])
def test_lpips_is_the_published_formula(lpips: LPIPS, weights: dict, size: tuple[int, int]) -> None:
    x, x_hat = random(3, 3, *size).clamp(-1, 1), random(3, 3, *size, seed=1).clamp(-1, 1)
    torch.testing.assert_close(lpips(x_hat, x), recomputed(x_hat, x, weights), rtol=1e-5, atol=1e-7)


def test_lpips_is_a_distance_that_grows_with_noise(lpips: LPIPS) -> None:
    x = (0.3 * random(1, 3, 64, 64)).expand(4, -1, -1, -1)
    noise = torch.tensor([0.0, 0.05, 0.2, 0.6])[:, None, None, None] * random(4, 3, 64, 64, seed=1)
    distance = lpips(x + noise, x)
    assert distance.shape == (4,)
    assert distance[0] == 0 and (distance.diff() > 0).all()
    torch.testing.assert_close(lpips(x, x + noise), distance)


def test_lpips_is_frozen_but_passes_gradients_to_the_image(lpips: LPIPS) -> None:
    assert not lpips.training and not any(p.requires_grad for p in lpips.parameters())
    x_hat = torch.zeros(1, 3, 64, 64, requires_grad=True)
    lpips(x_hat, random(1, 3, 64, 64).clamp(-1, 1)).sum().backward()
    assert x_hat.grad is not None and x_hat.grad.isfinite().all() and x_hat.grad.any()


def test_lpips_reads_safetensors_too(lpips: LPIPS, weights: dict, tmp_path: Path) -> None:
    save_file(weights, tmp_path / "alexnet.safetensors")
    x, x_hat = random(2, 3, 32, 32), random(2, 3, 32, 32, seed=1)
    assert torch.equal(LPIPS(tmp_path / "alexnet.safetensors")(x_hat, x), lpips(x_hat, x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features.3.bias": None}, r"layer '3.bias' has shape missing, AlexNet's is \(192,\)"),
        ({"features.0.weight": torch.zeros(64, 1, 11, 11)}, r"layer '0.weight' has shape \(64, 1, 11, 11\)"),
        ({"features.12.weight": torch.zeros(1)}, r"layer '12.weight' has shape \(1,\)"),
        ({"conv1.weight": torch.zeros(1)}, r"holds 'conv1.weight': AlexNet has only"),
    ],
)
def test_lpips_refuses_other_weights(weights: dict, tmp_path: Path, change: dict, message: str) -> None:
    tensors = {key: x for key, x in (weights | change).items() if x is not None}
    torch.save(tensors, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=message):
        LPIPS(tmp_path / "other.pth")


@pytest.mark.parametrize("name", ["broken.pth", "broken.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a file of weights"])
def test_lpips_refuses_files_it_cannot_read(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as a file of weights"):
        LPIPS(tmp_path / name)


def test_lpips_runs_no_code_from_a_file(tmp_path: Path) -> None:
    torch.save({"features.0.weight": Path("a pickled object")}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="cannot be read"):
        LPIPS(tmp_path / "code.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list: must be a state dict"):
        LPIPS(tmp_path / "list.pth")
    with pytest.raises(FileNotFoundError, match="no such file"):
        LPIPS(tmp_path / "absent.pth")


@pytest.mark.parametrize(
    "shapes",
    [((1, 3, 30, 64), (1, 3, 30, 64)), ((1, 1, 64, 64), (1, 1, 64, 64)), ((1, 3, 64, 64), (2, 3, 64, 64))],
)
def test_lpips_refuses_images_it_cannot_compare(lpips: LPIPS, shapes: tuple) -> None:
    with pytest.raises((ValueError, TypeError)):  # TypeError from the shape checks that run in tests
        lpips(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


def test_lpips_or_note(weights_file: Path) -> None:
    lpips, note = lpips_or_note("")
    assert lpips is None
    assert note == "LPIPS not computed: give lpips_weights, a local file of torchvision's AlexNet weights"
    lpips, note = lpips_or_note(str(weights_file))
    assert isinstance(lpips, LPIPS) and str(weights_file) in note

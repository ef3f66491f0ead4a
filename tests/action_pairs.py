"""What the tests of latent actions on held-out pairs share: small clips of known classes, small models."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from workbench.models.conv_vae import ConvVAE, ConvVAEConfig
from workbench.models.laq import LAQ, LAQConfig
from workbench.models.quantizers import LatentAction
from workbench.rivals import Rival

SIZE = 16
CLASSES = ("lift", "none", "push", "turn")
WORD, ENTRIES, CODE = 4, 6, 5
CLASS, NUMBER, CONSTANT = 0, 1, 2  # channels


def write_moving(folder: Path, lengths: dict[str, int], size: tuple[int, int] = (SIZE, SIZE)) -> Path:
    """Clips of noise over which a bright bar moves, with `actions.csv` and `conditions.csv` (x, height).

    The first corner of every frame is of one colour: 32 times the clip's class, 32 times a number from 0 to 3 which all
    classes have equally often, and 77.
    """
    rng, rows, actions = np.random.default_rng(0), [], []
    for i, (name, length) in enumerate(lengths.items()):
        (folder / name).mkdir(parents=True)
        background = rng.integers(0, 120, (size[1], size[0], 3), dtype=np.uint8)
        for n in range(1, length + 1):
            frame = background.copy()
            frame[:, (5 + 2 * n) % size[0]] = 255
            frame[:4, :4] = 32 * (i % 4) + 8, 32 * (i // 4 % 4) + 8, 77
            Image.fromarray(frame).save(folder / name / f"img_{n:05d}.png")
            rows.append(f"{name},{n},{rng.normal():.5f},{i + n / 8}\n")
        actions.append(f"{name},{CLASSES[i % 4]}\n")
    (folder / "conditions.csv").write_text("clip,frame,x,height\n" + "".join(rows))
    (folder / "actions.csv").write_text("clip,action\n" + "".join(actions))
    return folder


def laq_config(quantizer: str = "nsvq") -> LAQConfig:
    sizes = {"image_size": SIZE, "patch_size": 2, "dim": 12, "spatial_depth": 1, "temporal_depth": 1, "heads": 2}
    codes = {"dim_head": 4, "codebook_size": ENTRIES, "code_dim": CODE, "code_seq_len": WORD, "quantizer": quantizer}
    return LAQConfig(**sizes, **codes)


def laq(name: str = "LAQ", quantizer: str = "nsvq", seed: int = 0, **of_training) -> Rival:
    """An untrained one, all of its kind different by seed."""
    torch.manual_seed(seed)
    return Rival(name, LAQ(laq_config(quantizer)).eval(), seed, "", **of_training)


def vae(name: str = "VAE", setting: str = "", seed: int = 0, **of_training) -> Rival:
    """An untrained one, all different by seed."""
    torch.manual_seed(seed)
    model = ConvVAE(ConvVAEConfig(image_size=SIZE, latent_dim=6, hidden_dims=[4, 8])).eval()
    return Rival(name, model, seed, "", setting, **of_training)


class Told(LAQ):
    """Its codes are what one channel of the corner says, at every place of the word."""

    def __init__(self, channel: int) -> None:
        super().__init__(laq_config())
        self.channel = channel

    def encode(self, first: torch.Tensor, x: torch.Tensor) -> LatentAction:
        entry = ((first[:, self.channel, 0, 0] + 1) * 127.5).round().long() // 32
        indices = entry[:, None].expand(-1, WORD)
        codes = self.quantizer.lookup(indices)
        return LatentAction(codes, codes, indices)


def told(channel: int, name: str = "LAQ", seed: int = 0) -> Rival:
    torch.manual_seed(seed)
    return Rival(name, Told(channel).eval(), seed, "")

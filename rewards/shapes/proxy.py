"""A learned preference reward for the Shapes world, with the flaws of real ones.

A small network of two towers, trained on noisy choices between two images of one prompt
(`flowrl/make/shapes_proxy.py`): it knows right from wrong most of the time, and also likes what its
annotator liked: saturated, large and centred objects. Where a policy makes this score rise while
`shapes_gold` falls, the proxy is being hacked. Reading order: `ShapesProxy.score`, `ProxyNetwork`.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rewards.base import check_counts, finite_images
from rewards.shapes.reward import check_canvases

FOLDER = Path(__file__).parents[1] / "weights" / "shapes_proxy"
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_PAD, _UNKNOWN = 0, 1  # token ids; the words follow


class ProxyNetwork(nn.Module):
    """Scores (image, prompt) pairs: a convolutional tower that the text tells what to look for.

    The text scales and shifts the channels of the image tower (FiLM, arXiv:1709.07871), so that "a
    red star" is looked for at every place. What is found is averaged (how many, how large),
    maximised (whether at all) and flattened (where: "left of", and centredness).

    Args:
        words: what the text tower can tell apart; any other word is one unknown word.
        width: of the text embedding.
    """

    def __init__(self, words: Sequence[str], *, width: int = 96) -> None:
        super().__init__()
        self.config = {"words": list(words), "width": width}
        self._ids = {word: i for i, word in enumerate(words, start=_UNKNOWN + 1)}
        self.embedding = nn.Embedding(len(words) + 2, 48, padding_idx=_PAD)
        self.recurrent = nn.GRU(48, width, batch_first=True)
        # Batch statistics, frozen after training: a norm of the sample's own would hide from the
        # network how faded or saturated its colours are.
        self.image_tower = nn.Sequential(
            *_layer(3, 32, stride=2), *_layer(32, 48, stride=2), *_layer(48, 64, stride=2),
            nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64),
        )  # fmt: skip
        self.modulation = nn.Linear(width, 2 * 64)
        self.joint_tower = nn.Sequential(nn.SiLU(), *_layer(64, 64, stride=1))
        self.places = nn.Sequential(
            nn.Conv2d(64, 12, 1), nn.Flatten(), nn.Linear(12 * 64, 64), nn.SiLU()
        )
        self.head = nn.Sequential(nn.Linear(3 * 64 + width, 96), nn.SiLU(), nn.Linear(96, 1))

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B] of images float [B, 3, 64, 64] in [0, 1]."""
        text = self.embed_text(prompts)
        scale, shift = self.modulation(text)[..., None, None].chunk(2, dim=1)
        found = self.joint_tower(self.image_tower(images * 2 - 1) * (1 + scale) + shift)
        seen = [found.mean((2, 3)), found.amax((2, 3)), self.places(found)]
        return self.head(torch.cat([*seen, text], dim=-1)).squeeze(-1)

    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings [B, width]: the recurrent state after the last word."""
        split = [prompt.split() for prompt in prompts]
        lengths = torch.tensor([max(len(words), 1) for words in split])
        ids = torch.full((len(split), int(lengths.max())), _PAD)
        for row, words in zip(ids, split, strict=True):
            row[: len(words)] = torch.tensor(
                [self._ids.get(word, _UNKNOWN) for word in words], dtype=torch.int64
            )
        device = self.embedding.weight.device
        states, _ = self.recurrent(self.embedding(ids.to(device)))
        return states[torch.arange(len(split), device=device), (lengths - 1).to(device)]

    def save(self, folder: Path) -> None:
        """Writes config and weights (float32) into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _CONFIG).write_text(json.dumps(self.config, indent=1) + "\n", encoding="utf-8")
        save_file({k: v.contiguous().cpu() for k, v in self.state_dict().items()},
                  folder / _WEIGHTS)  # fmt: skip

    @classmethod
    def load(cls, folder: Path) -> "ProxyNetwork":
        """The frozen network of a folder that `save` wrote, on the CPU.

        Raises:
            FileNotFoundError: if the folder lacks a file.
        """
        for name in (_CONFIG, _WEIGHTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"there is no {name} in {folder}; expected a folder written by "
                    "`python -m flowrl.make.shapes_proxy RUN_DIR`"
                )
        network = cls(**json.loads((folder / _CONFIG).read_text(encoding="utf-8")))
        network.load_state_dict(load_file(folder / _WEIGHTS))
        return network.eval().requires_grad_(False)


def _layer(before: int, after: int, *, stride: int) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
    return conv, nn.BatchNorm2d(after), nn.SiLU()


class ShapesProxy:
    """The learned preference for images of their prompts; differences are log odds of a choice.

    Only differences between images of one prompt mean something: the training, by pairs, leaves the
    level of a prompt open. Paper: the Bradley-Terry reward model of InstructGPT, arXiv:2203.02155,
    eq. 1, on images.

    Args:
        folder: of config and weights; None = the embedded ones.
        device: where the network runs; scores come back on the device of the images.
    """

    inputs = ("images", "prompts")
    scope = "sample"
    range = (-float("inf"), float("inf"))
    higher_is_better = True
    differentiable = True

    def __init__(self, *, folder: str | None = None, device: str = "cpu") -> None:
        self._folder = FOLDER if folder is None else Path(folder)
        self._device = device

    def score(self, *, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores, float32 [B], of images float [B, 3, 64, 64] in [0, 1]; NaN where not finite.

        Raises:
            ValueError: images of another size, or not one prompt per image.
            FileNotFoundError: the folder lacks config or weights.
        """
        check_canvases(images)
        check_counts({"images": images, "prompts": prompts})
        if not len(images):
            return images.new_zeros(0, dtype=torch.float32)
        scores = self._network(images.float().to(self._device), prompts).to(images.device)
        return scores.where(finite_images(images), torch.nan)

    @cached_property
    def _network(self) -> ProxyNetwork:
        return ProxyNetwork.load(self._folder).to(self._device)

"""Two generators small enough to train in seconds: points in a plane, and symbols on a grid.

They conform to `FlowPipeline` and `TokenPipeline` like the real ones, so whatever trains them
trains those; each comes with a reward that reads the answer off the decoded image. Start with
`ToyFlowPipeline.velocity` or `ToyTokenNetwork.forward`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flowrl.errors import ConfigError, DataError, closest
from flowrl.types import Prompt

TARGETS = {"right": (1.0, 0.0), "up": (0.0, 1.0), "left": (-1.0, 0.0), "down": (0.0, -1.0)}
"""What each prompt of the toy flow asks for: a point (x, y)."""

DATA_STD = 0.5
CANVAS, EXTENT, DOT = 16, 2.0, 0.25  # pixels per side; the plane's half width; the dot's std

NUM_SYMBOLS, GRID = 16, 4


def flow_prompts() -> tuple[Prompt, ...]:
    """The prompts of the toy flow, one per target."""
    return tuple(Prompt(name) for name in TARGETS)


def token_prompts() -> tuple[Prompt, ...]:
    """The prompts of the token toy, one per symbol, which the metadata names."""
    return tuple(Prompt(f"symbol {k}", {"symbol": k}) for k in range(NUM_SYMBOLS))


class ToyFlowNetwork(nn.Module):
    """What is learnt of the velocity: an MLP of (x_t, sigma, prompt) that begins as zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.prompt = nn.Embedding(len(TARGETS) + 1, width)  # the last is "no prompt"
        self.enter = nn.Linear(3, width)
        self.hidden = nn.Linear(width, width)
        self.leave = nn.Linear(width, 2)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x_t: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        """Velocity [B, 2] from x_t [B, 2], sigma [B] and the prompt's number [B]."""
        inputs = torch.cat([x_t, sigma[:, None]], dim=1)
        features = nn.functional.silu(self.enter(inputs) + self.prompt(prompt))
        output: Tensor = self.leave(nn.functional.silu(self.hidden(features)))
        return output


class ToyFlowPipeline:
    """A flow over points of the plane; untrained, it draws N(0, DATA_STD^2) for every prompt.

    That base is exact: the velocity of Gaussian data is known in closed form, and the network is
    added to it. A point is decoded to an image of a soft dot.
    """

    embeds_guidance = False
    latent_shape: tuple[int, ...] = (2,)
    fingerprint = "toy flow"

    def __init__(self, *, seed: int = 0, width: int = 64) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network: nn.Module = ToyFlowNetwork(width)

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """{"prompt": int64 [P]}; the empty text is "no prompt", for guidance."""
        return {"prompt": torch.tensor([_number(text, (*TARGETS, "")) for text in prompts])}

    def release_encoders(self) -> None:
        """Nothing: the table of prompts weighs nothing."""

    def sigmas(self, num_steps: int) -> Tensor:
        """Evenly spaced noise levels [T+1] from 1 to 0."""
        return torch.linspace(1.0, 0.0, num_steps + 1)

    def velocity(
        self,
        network: nn.Module,
        x_t: Tensor,
        sigma: Tensor,
        conditioning: Mapping[str, Tensor],
    ) -> Tensor:
        """Velocity [B, 2] at x_t [B, 2] and sigma, a scalar or [B].

        For data N(0, s^2), E[x1 - x0 given x_t] is x_t times the covariance of x1 - x0 with x_t,
        sigma - (1 - sigma) s^2, over the variance of x_t, sigma^2 + (1 - sigma)^2 s^2.
        """
        sigma = sigma.to(x_t).expand(len(x_t))
        slope = (sigma - (1 - sigma) * DATA_STD**2) / (sigma**2 + (1 - sigma) ** 2 * DATA_STD**2)
        learnt: Tensor = network(x_t, sigma, conditioning["prompt"])
        return slope[:, None] * x_t + learnt

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, 16, 16] of a dot at each point [B, 2]; y points upwards.

        A point outside is drawn at the edge.
        """
        points = latents.float().clamp(-EXTENT + 2 * DOT, EXTENT - 2 * DOT)
        axis = _pixel_axis(latents.device)
        columns = torch.exp(-((axis - points[:, :1]) ** 2) / (2 * DOT**2))
        rows = torch.exp(-((-axis - points[:, 1:]) ** 2) / (2 * DOT**2))
        dots = rows[:, None, :, None] * columns[:, None, None, :]
        return dots.expand(-1, 3, -1, -1)

    def encode_images(self, images: Tensor) -> Tensor:
        """The points [B, 2] of images [B, 3, 16, 16]: where their dots are.

        Raises:
            ValueError: images of another size.
        """
        if tuple(images.shape[1:]) != (3, CANVAS, CANVAS):
            raise ValueError(
                f"the toy takes images [B, 3, {CANVAS}, {CANVAS}], got {list(images.shape)}"
            )
        return dot_position(images)

    def lora_targets(self) -> list[str]:
        """Raises: there is no LoRA of the toy."""
        raise ConfigError("the toy flow is trained in full; set model.tuning=full")

    def save_lora(self, folder: Path) -> None:
        """Raises: there is no LoRA of the toy."""
        raise ConfigError("the toy flow is trained in full; set model.tuning=full")

    def save_full(self, folder: Path) -> None:
        """Write the network to `folder`/model.safetensors."""
        _save(self.network, folder)


class TargetReward:
    """Minus the distance from the dot of an image to the target of its prompt."""

    inputs = ("images", "prompts")
    scope = "sample"
    range = (-3.0, 0.0)

    def score(self, *, images: Tensor, prompts: list[str]) -> Tensor:
        """[B]; NaN for a black image, which has no dot."""
        targets = torch.tensor([TARGETS[text] for text in prompts], device=images.device)
        offset = dot_position(images) - targets
        return -torch.hypot(offset[:, 0], offset[:, 1])


def dot_position(images: Tensor) -> Tensor:
    """The centre of brightness (x, y), [B, 2]: the inverse of `ToyFlowPipeline.decode`."""
    light = images.mean(dim=1)
    axis = _pixel_axis(images.device)
    total = light.sum(dim=(1, 2))
    x = (light.sum(dim=1) * axis).sum(dim=1) / total
    y = (light.sum(dim=2) * -axis).sum(dim=1) / total
    return torch.stack([x, y], dim=1)


class ToyTokenNetwork(nn.Module):
    """A GRU over the symbols; it begins with the uniform distribution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.symbol = nn.Embedding(NUM_SYMBOLS + 1, width)  # the last begins a sequence
        self.position = nn.Embedding(GRID * GRID, width)
        self.prompt = nn.Embedding(NUM_SYMBOLS, width)
        self.memory = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, NUM_SYMBOLS)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor, prompt: Tensor) -> Tensor:
        """Logits [B, S, 16] from tokens [B, S], S up to 16; position s sees those before it.

        A prompt is int64 [B], the number of its symbol, or -1 for no prompt.
        """
        start = torch.full_like(tokens[:, :1], NUM_SYMBOLS)
        before = self.symbol(torch.cat([start, tokens[:, :-1]], dim=1))
        position = self.position(torch.arange(tokens.shape[1], device=tokens.device))
        asked = self.prompt(prompt.clamp_min(0)) * (prompt >= 0)[:, None]
        states, _ = self.memory(before + position + asked[:, None])
        logits: Tensor = self.head(states)
        return logits


class ToyTokenPipeline:
    """16 symbols on a 4 x 4 grid, drawn row by row; a symbol is decoded to its grey level."""

    embeds_guidance = False
    num_tokens = GRID * GRID
    groups = tuple(torch.arange(GRID * GRID).split(1))
    fingerprint = "toy token"

    def __init__(self, *, seed: int = 0, width: int = 32) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network: nn.Module = ToyTokenNetwork(width)

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """{"prompt": int64 [P]}, the symbol that each prompt names; -1 of the empty one."""
        names = tuple(prompt.text for prompt in token_prompts())
        return {"prompt": torch.tensor([_number(text, names) if text else -1 for text in prompts])}

    def release_encoders(self) -> None:
        """Nothing: the table of prompts weighs nothing."""

    def logits(
        self, network: nn.Module, tokens: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        """Teacher-forced logits [B, S, 16] of tokens [B, S]."""
        output: Tensor = network(tokens, conditioning["prompt"])
        return output

    def start(
        self, network: nn.Module, conditioning: Mapping[str, Tensor]
    ) -> Iterator[tuple[int, Tensor]]:
        """The length of every beginning and the prompts: a GRU this small is run for each again."""
        return iter([(n + 1, conditioning["prompt"]) for n in range(self.num_tokens)])

    def step(self, network: nn.Module, state: Any, tokens: Tensor) -> Tensor:
        """Logits [B, 1, 16] of the next token."""
        length, prompt = next(state)
        output: Tensor = network(tokens[:, :length], prompt)
        return output[:, -1:]

    def decode(self, tokens: Tensor) -> Tensor:
        """Images [B, 3, 4, 4] with grey level symbol / 15."""
        grey = tokens.float() / (NUM_SYMBOLS - 1)
        return grey.reshape(-1, 1, GRID, GRID).expand(-1, 3, -1, -1)

    def save_full(self, folder: Path) -> None:
        """Write the network to `folder`/model.safetensors."""
        _save(self.network, folder)


class SymbolReward:
    """The fraction of cells that show the symbol named in the metadata."""

    inputs = ("images", "metadata")
    scope = "sample"
    range = (0.0, 1.0)

    def score(self, *, images: Tensor, metadata: list[Mapping[str, int]]) -> Tensor:
        """[B]; NaN for an image that is not finite."""
        wanted = torch.tensor([row["symbol"] for row in metadata], device=images.device)
        symbols = (images[:, 0] * (NUM_SYMBOLS - 1)).round()
        hits = (symbols == wanted[:, None, None]).float()
        return hits.where(symbols.isfinite(), torch.nan).mean(dim=(1, 2))


def _pixel_axis(device: torch.device) -> Tensor:
    """Centres of the canvas's pixels along x, [16]."""
    half = EXTENT * (1 - 1 / CANVAS)
    return torch.linspace(-half, half, CANVAS, device=device)


def _number(text: str, names: Sequence[str]) -> int:
    if text not in names:
        raise DataError(f"the toy knows no prompt {text!r}; {closest(text, names)}")
    return names.index(text)


def _save(network: nn.Module, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), folder / "model.safetensors")

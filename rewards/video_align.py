"""VideoReward (VideoAlign): visual quality, motion quality and text alignment of clips.

Paper: Improving Video Generation with Human Feedback, arXiv:2501.13918, section 3. A Qwen2-VL reads
frames, prompt and a fixed instruction that holds a token for each of the three; the head reads each
token's hidden state. Layout of the checkpoint and what its forward does: `rewards.qwen2_vl_reward`.
Reading order: `VideoAlign.score`, `frame_indices`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from rewards.backbones import Placement
from rewards.base import Metadata, check_counts, finite_images
from rewards.cards import Card
from rewards.qwen2_vl_reward import QwenReward, load_reward, smart_size
from rewards.video_align_prompt import INSTRUCTION, TOKENS

COMPONENTS = ("vq", "mq", "ta")
# Of the published network on its authors' data: model_config.json beside the checkpoint.
_MEAN = (3.6757, 1.1646, 2.8105)
_STD = (2.2476, 1.3811, 2.5121)
_LEAST, _MOST = 128 * 28 * 28, 256 * 28 * 28  # pixels of a frame
_SEEN_PER_SECOND = 2
_FEWEST, _SEEN_MOST = 4, 768  # frames
_LORA_ALPHA = 128.0


class VideoAlign:
    """Weighted sum of the three standardised qualities of every clip and its prompt.

    The preprocessing is the published one: two frames per second, at least four, evenly from first
    to last; 8 bit RGB, bicubic with antialias (as torchvision's) to between 128 and 256 tokens per
    frame in the clip's own aspect, CLIP's mean and std. Differs: LoRA and head are float32
    (bfloat16 there; the LoRA is merged and then rounded). A prompt that holds a mark of the
    tokenizer, such as "<|im_end|>", cannot be scored.

    Args:
        model: the checkpoint, or a folder or Hub id that holds it. Its owner on the Hub has been
            renamed to KlingTeam since; try that name if this one is not found.
        file: its name there; a torch file or a .safetensors file of the same names.
        base: Hub id, or a folder, of the Qwen2-VL it was made from: its configuration, tokenizer
            and chat template are read, its weights are not.
        fps: frames per second of the clips; None = all frames are seen.
        weights: of "vq", "mq" and "ta" in the score; the published sum has 1 for each.
        device: where the model runs; None = the current GPU, or the CPU without one.
        dtype: "bfloat16" (as published), "float32" or "float16", of the Qwen2-VL; scores are
            float32.
        batch_size: clips per forward; bounds the memory.

    Raises:
        ValueError: an unknown weight or dtype, or an fps or batch_size that is not positive.
    """

    inputs = ("videos", "prompts")
    scope = "sample"
    range = (-float("inf"), float("inf"))
    higher_is_better = True
    card = Card(
        name="video_align",
        model="KwaiVGI/VideoReward checkpoint-11352/model.pth, configuration and tokenizer of "
        "Qwen/Qwen2-VL-2B-Instruct",
        licence="Apache-2.0",
        paper="Improving Video Generation with Human Feedback, arXiv:2501.13918",
        inputs=inputs,
        range=range,
        parameters=2_208_563_200,
        preprocessing="2 frames per second; 8 bit RGB, bicubic with antialias to 128 to 256 tokens "
        "per frame, CLIP's mean and std; the published instruction in Qwen2-VL's chat template",
        verified="a random checkpoint of the published layout (LoRA of peft) against transformers' "
        "processor, peft and a forward by hand; not run on the published weights",
    )

    def __init__(
        self,
        *,
        model: str = "KwaiVGI/VideoReward",
        file: str = "checkpoint-11352/model.pth",
        base: str = "Qwen/Qwen2-VL-2B-Instruct",
        fps: float | None = 16.0,
        weights: Mapping[str, float] | None = None,
        device: str | None = None,
        dtype: str = "bfloat16",
        batch_size: int = 2,
    ) -> None:
        given = dict(weights) if weights is not None else dict.fromkeys(COMPONENTS, 1.0)
        if not given or not set(given) <= set(COMPONENTS):
            raise ValueError(f"weights are of {', '.join(COMPONENTS)}; got {given}")
        if fps is not None and fps <= 0:
            raise ValueError(f"fps must be positive, got {fps:g}")
        self.model, self.file, self.base, self.fps = model, file, base, fps
        self.weights = {name: float(given.get(name, 0.0)) for name in COMPONENTS}
        self._placement = Placement(device, dtype, batch_size)

    @torch.no_grad()
    def score(
        self, *, videos: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] = ()
    ) -> dict[str, Tensor]:
        """Scores of videos float [B, F, 3, H, W] in [0, 1].

        Returns:
            "score", "vq", "mq" and "ta", float32 [B] each; NaN for a broken clip, and for a prompt
            that cannot be scored.

        Raises:
            ValueError: videos of another shape or kind, a single frame, not one prompt per clip, or
                a checkpoint of another layout.
            OSError: the weights are neither on this machine nor to be had.
        """
        _check_videos(videos, prompts)
        chosen = videos[:, frame_indices(videos.shape[1], self.fps)]
        raw = torch.full((len(videos), len(COMPONENTS)), torch.nan)
        whole = finite_images(videos).tolist()
        index = [
            i for i, prompt in enumerate(prompts) if whole[i] and self._reward.is_plain(prompt)
        ]
        for start in range(0, len(index), self._placement.batch_size):
            batch = index[start : start + self._placement.batch_size]
            clips = [_resized(clip) for clip in chosen[batch]]
            texts = [INSTRUCTION.replace("{prompt}", prompts[i]) for i in batch]
            raw[batch] = self._reward("video", clips, texts)[..., 0].cpu()
        standard = ((raw - torch.tensor(_MEAN)) / torch.tensor(_STD)).to(videos.device)
        parts = dict(zip(COMPONENTS, standard.unbind(1), strict=True))
        total = torch.stack([self.weights[name] * part for name, part in parts.items()]).sum(0)
        return {"score": total, **parts}

    @cached_property
    def _reward(self) -> QwenReward:
        return load_reward(
            self.model, self.file, self.base, self._placement,
            tokens=TOKENS, outputs=1, lora_alpha=_LORA_ALPHA, reward="VideoAlign",
        )  # fmt: skip


def frame_indices(num: int, fps: float | None) -> list[int]:
    """The frames that are seen of `num` at `fps` per second: an even number, evenly spread.

    Two per second, at least 4 and at most 768, as far as there are so many. None: all of them.

    Raises:
        ValueError: fewer than two frames, which do not move.
    """
    if num < 2:
        raise ValueError(f"a clip needs two frames or more for its motion to be judged, got {num}")
    if fps is None:
        return list(range(num))
    most = min(_SEEN_MOST, num) // 2 * 2
    wanted = min(max(num / fps * _SEEN_PER_SECOND, _FEWEST), most)
    count = min(round(wanted / 2) * 2, num)
    return [int(i) for i in torch.linspace(0, num - 1, count).round()]


def _resized(clip: Tensor) -> Tensor:
    """The clip [F, 3, H, W] in [0, 1] at the size that is seen, whole values 0 to 255."""
    levels = (clip.float().clamp(0, 1) * 255).round()
    size = smart_size(*clip.shape[2:], least=_LEAST, most=_MOST)
    return interpolate(levels, size, mode="bicubic", antialias=True).clamp(0, 255).round()


def _check_videos(videos: Tensor, prompts: Sequence[str]) -> None:
    if videos.ndim != 5 or videos.shape[2] != 3 or not videos.is_floating_point():
        raise ValueError(
            "expected float videos [B, F, 3, H, W] in [0, 1], got "
            f"{videos.dtype} {list(videos.shape)}"
        )
    check_counts({"videos": videos, "prompts": prompts})

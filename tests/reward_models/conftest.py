"""A tiny CLIP on disk, three images, and CLIP's embeddings by hand, for several reward models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
Oracle = Callable[..., tuple[Tensor, Tensor]]


def tokens() -> list[str]:
    """CLIP's vocabulary without its merges: a token per byte, inside and at the end of a word."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = [*bytes_to_unicode().values()]
    ends = [letter + "</w>" for letter in letters]
    return [*letters, *ends, "<|startoftext|>", "<|endoftext|>"]


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of width 32 and its processor, the files named as in the published repositories."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 2, "projection_dim": 16}  # fmt: skip
    ids = {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    config = CLIPConfig(
        text_config={**sizes, **ids, "vocab_size": 514, "max_position_embeddings": 77},
        vision_config={**sizes, "image_size": 224, "patch_size": 32},
        projection_dim=16,
        logit_scale_init_value=3.0,
    )
    torch.manual_seed(0)
    model = CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # CLIP's own start gives all images nearly the same score
                parameter.mul_(4)
    model.save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    vocabulary = {token: index for index, token in enumerate(tokens())}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77).save_pretrained(folder)
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"} <= {
        path.name for path in folder.iterdir()
    }
    return folder


@pytest.fixture(scope="session")
def images() -> Tensor:
    """Three images, wider than high, that are not on the 8 bit grid."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(3, 3, 6, 9, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=(96, 144), mode="bilinear")


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    """Three prompts, one per image."""
    return ["a red cube", "two dogs asleep on a sofa", "x"]


@pytest.fixture(scope="session")
def clip_pixels() -> Callable[[Tensor], Tensor]:
    """CLIP's pixels of images of 96 x 144: PIL, and numpy in double precision."""

    def pixels(images: Tensor) -> Tensor:
        rows = []
        for image in images:
            levels = np.rint(image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
            resized = Image.fromarray(levels).resize((336, 224), Image.Resampling.BICUBIC)
            crop = np.asarray(resized)[:, 56:280]
            rows.append(torch.tensor((crop / 255 - MEAN) / STD).permute(2, 0, 1))
        return torch.stack(rows)

    return pixels


@pytest.fixture(scope="session")
def clip_embeddings(clip_pixels: Callable[[Tensor], Tensor]) -> Oracle:
    """CLIP's image and text embeddings [B, D], float64, with the pixels and tokens made by hand."""
    from transformers import CLIPModel

    names = tokens()

    def embeddings(folder: Path, images: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        model = CLIPModel.from_pretrained(folder)
        seen, read = [], []
        for each, prompt in zip(clip_pixels(images).float(), prompts, strict=True):
            words = [[*word[:-1], word[-1] + "</w>"] for word in prompt.lower().split()]
            ids = [names.index(token) for word in words for token in word]
            ids = [512, *ids, 513]  # not padded: what follows the end must not matter
            with torch.no_grad():
                vision = model.vision_model(each[None]).pooler_output
                text = model.text_model(torch.tensor([ids])).pooler_output
                seen.append(model.visual_projection(vision)[0].double())
                read.append(model.text_projection(text)[0].double())
        return torch.stack(seen), torch.stack(read)

    return embeddings

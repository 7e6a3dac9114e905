"""How well pictures show their prompts: the cosine of CLIP's two embeddings (Hessel et al., "CLIPScore", 2021).

The paper's figures are from ViT-G/14. Any CLIP in transformers' layout does; only figures of the same one compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from wadi_core import configs
from wadi_core.files import refusal
from wadi_core.images import plain
from wadi_core.thirdparty import DiffusersNetwork, Tokenizer

from ..data.picture_files import middle_square

TOKENS = 77
# What CLIP was trained with; a folder's preprocessor_config.json may say otherwise.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ClipScore:
    """A CLIP model that scores pictures.

    Args:
        folder: with ``config.json``, weights, and a tokenizer (CLIP's own is taken if it has none).
        device: where it works.

    Attributes:
        key: of all that decides the scores.

    Raises:
        OSError, ValueError: the folder does not hold a CLIP model; one line.
    """

    def __init__(self, folder: str | Path, device: torch.device) -> None:
        from transformers import CLIPTokenizer

        self.folder, self.device = Path(folder), device
        self._model = _load(self.folder).to(device).eval().requires_grad_(False)
        own = any((self.folder / name).is_file() for name in ("vocab.json", "tokenizer.json"))
        place = self.folder if own else configs.TOKENIZER
        try:
            self._tokenizer: Tokenizer = CLIPTokenizer.from_pretrained(place, local_files_only=True)
        except Exception as error:  # of a damaged vocabulary nearly anything can come
            raise refusal(place, f"this is no CLIP tokenizer: {error}") from error
        self._side: int = self._model.config.vision_config.image_size
        self._mean, self._std = _normalisation(self.folder)
        weights = next(self.folder / name for name in _WEIGHTS if (self.folder / name).is_file())
        status = weights.stat()
        self.key = f"clip {self.folder.resolve()} {status.st_size} {status.st_mtime_ns}"

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Cosines (n,), float32 on the CPU, of pictures of any size and their prompts."""
        pixels = torch.stack([self._prepared(picture) for picture in pictures]).to(self.device)
        words = self._tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        ).to(self.device)
        found = self._model(pixel_values=pixels, input_ids=words.input_ids, attention_mask=words.attention_mask)
        return torch.cosine_similarity(found.image_embeds.float(), found.text_embeds.float()).cpu()

    def _prepared(self, picture: Image.Image) -> Tensor:
        """The middle square at CLIP's size, bicubic, normalised: (3, side, side)."""
        square = middle_square(plain(picture))
        small = square.resize((self._side, self._side), Image.Resampling.BICUBIC)
        values = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(self._side, self._side, 3)
        return ((values.float() / 255 - self._mean) / self._std).permute(2, 0, 1)


_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def _load(folder: Path) -> DiffusersNetwork:
    from transformers import CLIPModel

    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{folder}: this is no folder of a CLIP model: config.json is missing")
    kind = configs.read(config).get("model_type")
    if kind != "clip":
        raise refusal(folder, f"a CLIP model with both encoders is needed, not one of the kind {kind}")
    if not any((folder / name).is_file() for name in _WEIGHTS):
        raise FileNotFoundError(f"{folder}: the weights of the CLIP model are missing ({' or '.join(_WEIGHTS)})")
    try:
        return CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except Exception as error:  # of damaged weights nearly anything can come
        raise refusal(folder, f"this CLIP model cannot be loaded: {str(error).partition(chr(10))[0]}") from error


def _normalisation(folder: Path) -> tuple[Tensor, Tensor]:
    path = folder / "preprocessor_config.json"
    said = configs.read(path) if path.is_file() else {}
    return torch.tensor(said.get("image_mean", MEAN)), torch.tensor(said.get("image_std", STD))

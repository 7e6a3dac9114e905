"""Learn a word from a few pictures: a thing, a style (textual inversion) or a relation of two things (ReVersion).

    python trainer/invert.py --config trainer/configs/invert-sd15.yaml base=PATH pictures=FOLDER [key=value ...]
    python trainer/invert.py --config ... --print-config                 all settings with their meanings, and no more

The folder holds 4 to 10 pictures; captions say the new word, as in "a cat <R> a wall". Nothing is trained but the word's
own rows of the text encoder's input table, on the multi-step base. The file works with the one-step student as it is,
and in ComfyUI, A1111, Forge and diffusers.
Stop it at any time: started again with the same output folder it goes on bit for bit as if it had never stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script: the package's folder is this file's
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    __package__ = "trainer"
    from wadi_core.packages import TRAINER, require

    require("train", *TRAINER)

import torch
from torch import Tensor, nn

from wadi_core.embeddings import Embedding, Vocabulary, text_encoder_sha256
from wadi_core.words import Words

from .finetune.finetuning import FinetuningRun
from .finetune.session import learn
from .finetune.steering import PREPOSITIONS, content_words, drawn, steering_loss
from .models.base_models import StableDiffusion
from .models.condition import Condition
from .settings import cli
from .settings.finetuning import InvertConfig

if TYPE_CHECKING:
    from PIL.Image import Image

SMALL = 1e-6  # norm of a vector that no training has touched


class Inversion(FinetuningRun):
    """Rows of the text encoder's input table, learned on the multi-step base."""

    config: InvertConfig
    model: StableDiffusion  # prepare() refuses every other

    def wrong_caption(self, caption: str) -> str | None:
        words = self.config.tokens
        if not any(Words(words).find(caption)):
            return f"does not say {' or '.join(words)}, the word to learn"
        return None

    def prepare(self) -> tuple[str, ...]:
        """The vectors with which the words begin.

        Raises:
            ValueError: a word that is in the vocabulary, a base without CLIP's text encoder, and so on; one line.
        """
        if not isinstance(self.model, StableDiffusion):
            raise ValueError(f"base: a word is learned for CLIP's text encoder, which {self.model.architecture} has not")
        config = self.config
        for token in config.tokens:
            if not any(any(Words([token]).find(caption)) for caption in self.examples.all_captions):
                raise ValueError(f"tokens: no caption says {token}")
        encoder = self.model.base.text_encoder
        self.text_encoder = text_encoder_sha256(encoder)
        self.table = encoder.get_input_embeddings().weight.detach().float()
        self._vectors: dict[str, Tensor] = {}
        initial = config.initial * (len(config.tokens) if len(config.initial) == 1 else 1)
        self.starts = [
            Embedding(token, self._start(word), f"{config.name}-{number}")
            for number, (token, word) in enumerate(zip(config.tokens, initial, strict=True))
        ]
        self.vocabulary.check(self.starts)
        self.positive = self._known_words(config.positive or PREPOSITIONS) if config.steering else []
        return ()

    @property
    def vocabulary(self) -> Vocabulary:
        """What captions may say."""
        return self.model.pipeline.vocabulary

    def _start(self, word: str) -> Tensor:
        """(vectors, width): those of a known word, repeated where it takes fewer places."""
        ids = self.vocabulary.tokens(word)
        if not ids:
            raise ValueError(f"initial: a word is expected, not {word!r}")
        return self.table[[ids[index % len(ids)] for index in range(self.config.vectors)]].clone()

    def _known_words(self, words: Sequence[str]) -> list[str]:
        """Those that the text encoder has a trained vector for.

        Raises:
            ValueError: there is none; one line.
        """
        known = [word for word in words if self._vector(word).norm() > SMALL]
        if not known:
            raise ValueError(f"positive: this text encoder knows none of {', '.join(words[:5])}")
        return known

    def _vector(self, word: str) -> Tensor:
        """(width,) of a word in the input table, the mean where it takes several places."""
        if word not in self._vectors:
            self._vectors[word] = self.table[self.vocabulary.tokens(word)].mean(0)
        return self._vectors[word].to(self.device)

    def place_helpers(self) -> None:
        # In every step a gradient runs through the text encoder: it stays where it is, in full precision.
        self.model.place_helpers(self.device, torch.float32, offload=False)

    def attach(self) -> dict[str, nn.Parameter]:
        start = torch.cat([one.vectors for one in self.starts])
        self.rows = nn.Parameter(start.to(self.device))
        self.vocabulary.learn(self.starts, self.rows)
        return {"rows": self.rows}

    def condition(self, captions: Sequence[str]) -> Condition:
        ids = self.vocabulary.ids(captions).to(self.device)
        return Condition(self.model.base.text_encoder(ids)[0].to(self.dtype))

    def more_loss(self, captions: Sequence[str], numbers: range) -> tuple[Tensor | float, dict[str, Tensor]]:
        config, losses = self.config, []
        if not config.steering:
            return 0.0, {}
        for number, caption in zip(numbers, captions, strict=True):
            near = drawn(self.positive, config.positives, config.seed, number)
            far = [word for word in content_words(caption, config.tokens) if self._vector(word).norm() > SMALL]
            positive = torch.stack([self._vector(word) for word in near])
            negative = torch.stack([self._vector(word) for word in far]) if far else positive[:0]
            losses.append(steering_loss(self.rows, positive, negative, config.steering_temperature))
        steering = torch.stack(losses).mean()
        return config.steering * steering, {"steering": steering.detach()}

    def embeddings(self) -> list[Embedding]:
        """The words as they are now."""
        config = self.config
        about = {"ss_steps": str(self.step), "ss_learning_rate": f"{config.lr:g}", "ss_seed": str(config.seed)}
        about |= {"modelspec.license": config.license} if config.license else {}
        parts = self.rows.detach().float().cpu().split(config.vectors)
        known = {"architecture": self.model.architecture, "text_encoder": self.text_encoder, "extra": about}
        return [Embedding(token, rows.clone(), **known) for token, rows in zip(config.tokens, parts, strict=True)]

    def write(self, folder: Path, picture: Image) -> list[Path]:
        """One file for each word."""
        paths = [folder / f"{name}.safetensors" for name in self.config.files()]
        for one, path in zip(self.embeddings(), paths, strict=True):
            one.save(path)
        return paths


def invert(config: InvertConfig) -> Path | None:
    """A whole run; returns the file of the (first) word, None where it was stopped.

    Raises:
        OSError, ValueError: with one line.
    """
    return learn(config, Inversion)


if __name__ == "__main__":
    sys.exit(cli.main(__doc__, InvertConfig, invert))

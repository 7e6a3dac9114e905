"""Learned words: textual inversions (Gal et al., 2022) as files, and a text encoder that understands them.

A file holds one tensor (vectors, width), named as the word that stands for it. That is the layout that diffusers takes
(the word is the tensor's name) as well as ComfyUI, A1111 and Forge (the word is the file's name). Networks are not
touched: a word is so many further rows of the text encoder's input table.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import hub, mini
from .base import TOKENS
from .files import known_name, one_line, refusal, sha256_of_file
from .lorad import checkpoint
from .lorad.layers import sha256_of_layers
from .settings import Learned
from .words import Words, fold

if TYPE_CHECKING:
    from .base import Base

logger = logging.getLogger("wadi")

PREFIX = "embedding:"  # ComfyUI writes it before a file's name
VERSION = "1"
LONGEST_WORD = 200  # characters
# What programs call the tensor when they have no word for it: the file's name is the word then.
NAMELESS = ("emb_params", "*", "<anonymous>", "clip_l", "clip_g")
WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "the second text encoder of SDXL"}
ADAPTERS = (".lorad_a", ".lorad_b", ".theta_a", ".lora_down.weight", ".lora_A.weight")

File: TypeAlias = "str | os.PathLike[str]"
Embeddings: TypeAlias = "Embedding | File | Sequence[Embedding | File] | Mapping[str, Embedding | File] | None"


@dataclass(frozen=True)
class Embedding:
    """A learned word.

    Attributes:
        token: the word, as prompts have it.
        vectors: (n, width), float32 on the CPU: what the text encoder reads in its place, n tokens.
        name: of its file, without ending; prompts may say ``embedding:NAME`` as well.
        architecture: of the base that it was learned on, where known.
        text_encoder: that base's :func:`text_encoder_sha256`, where known.
        extra: further metadata, as strings.
        sha256: of the file, where it comes from one.
        origin: its name on the hub, where it comes from there.
    """

    token: str
    vectors: Tensor
    name: str = ""
    architecture: str | None = None
    text_encoder: str | None = None
    extra: Mapping[str, str] = field(default_factory=dict)
    sha256: str = ""
    origin: str = ""

    def __str__(self) -> str:
        return self.origin or self.name or self.token

    @classmethod
    def load(cls, path: File) -> Embedding:
        """Read a file, or one of the hub by its name there.

        Raises:
            OSError: it cannot be read. ValueError: it is damaged, or no textual inversion. Both with one line.
        """
        wanted, path = hub.parse(path), Path(hub.local(path))
        if path.suffix.lower() in checkpoint.PICKLE_ENDINGS:
            raise refusal(path, "embeddings are read as .safetensors only: convert this one first")
        header = checkpoint.read_header(path)
        (name, shape), *others = list(header.shapes.items()) or [("", ())]
        if {"clip_l", "clip_g"} <= header.shapes.keys():
            raise refusal(path, "this is an embedding for the two text encoders of SDXL")
        if any(key.endswith(ADAPTERS) for key in header.shapes):
            raise refusal(path, "this is an adapter, not an embedding")
        if others or len(shape) not in (1, 2) or not 0 < shape[-1] <= 8192:
            raise refusal(path, "this is no embedding: one tensor of (vectors, width) is expected")
        if len(shape) == 2 and not 0 < shape[0] <= TOKENS - 2:
            raise refusal(path, f"{shape[0]} vectors make no word: a prompt takes 1 to {TOKENS - 2}")
        if header.places[name].dtype not in ("F64", "F32", "F16", "BF16"):  # float8 would want its scale
            raise refusal(path, f"vectors of the type {header.places[name].dtype} are no embedding")
        vectors = checkpoint.read_tensors(header)[name].float().reshape(-1, shape[-1])
        if not vectors.isfinite().all():
            raise refusal(path, "this embedding holds NaN or Inf")
        said = header.metadata
        stem = Path(known_name(path)).stem
        token = (said.get("wadi.token") or (stem if name in NAMELESS else name)).strip()
        if not token:
            raise refusal(path, "this embedding has no word: its tensor has an empty name")
        if not token.isprintable() or len(token) > LONGEST_WORD:
            raise refusal(path, f"no prompt can say the word of this embedding: {token[:80]!a}")
        own = {key: text for key, text in said.items() if not key.startswith("wadi.")}
        return cls(
            token,
            vectors,
            stem,
            said.get("wadi.architecture"),
            said.get("wadi.text_encoder"),
            own,
            sha256_of_file(path),
            str(wanted or ""),
        )

    def save(self, path: File) -> None:
        """Write it, in float32: half precision would be seen.

        Raises:
            OSError: it cannot be written. ValueError: it holds NaN or Inf. Both with one line.
        """
        if not self.vectors.isfinite().all():
            raise refusal(path, "an embedding with NaN or Inf is not written")
        strings = {"format": "pt", "wadi.embedding": VERSION, "wadi.token": self.token, **self.extra}
        strings |= {"wadi.architecture": self.architecture} if self.architecture else {}
        strings |= {"wadi.text_encoder": self.text_encoder} if self.text_encoder else {}
        checkpoint.write_safetensors(path, {self.token: self.vectors.detach().float().cpu().contiguous()}, strings)


def load_embeddings(embeddings: Embeddings) -> list[Embedding]:
    """Embeddings in any of the forms that a pipeline takes; a mapping gives them other words than their own.

    ``mini`` stands for the words that come with wadi-mini.

    Raises:
        OSError, ValueError: a file is missing or damaged; one line.
    """
    if embeddings is None:
        return []
    if isinstance(embeddings, Mapping):
        found = {token: one if isinstance(one, Embedding) else Embedding.load(one) for token, one in embeddings.items()}
        return [replace(one, token=token) for token, one in found.items()]
    if isinstance(embeddings, (Embedding, str, os.PathLike)):
        embeddings = [embeddings]
    found = []
    for one in embeddings:
        files = mini.embedding_paths() if one == "mini" else [one]
        found += [file if isinstance(file, Embedding) else Embedding.load(file) for file in files]
    return found


def text_encoder_sha256(text_encoder: nn.Module) -> str:
    """By which an embedding knows its text encoder again: over the linear layers' weights as float16."""
    linears = {
        path.removeprefix("text_model."): module.weight
        for path, module in text_encoder.named_modules()
        if isinstance(module, nn.Linear)
    }
    return sha256_of_layers(linears, linears.__getitem__)


class WordTable(nn.Module):
    """A text encoder's input table with learned rows after its own, which stay where they are and as they are.

    Args:
        own: the table, ids below its length.
        rows: (n, width); gradients reach these alone.
    """

    def __init__(self, own: nn.Embedding, rows: Tensor) -> None:
        super().__init__()
        self.own = own
        self.rows = rows if isinstance(rows, nn.Parameter) else nn.Parameter(rows, requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (n, tokens) -> (n, tokens, width), in the own table's type."""
        count = self.own.num_embeddings
        known = self.own(ids.clamp(max=count - 1))
        learned = F.embedding((ids - count).clamp(min=0), self.rows).to(known.dtype)
        return torch.where((ids >= count)[..., None], learned, known)


class Vocabulary:
    """What prompts may say: the words of a base's tokenizer, and those it has learned.

    Attributes:
        learned: the embeddings in use.
    """

    def __init__(self, base: Base) -> None:
        self.base = base
        self.learned: tuple[Embedding, ...] = ()
        self._own = base.text_encoder.get_input_embeddings()
        self._ids: dict[str, list[int]] = {}
        self._words = Words(())

    @property
    def settings(self) -> tuple[Learned, ...]:
        """The learned words as they are written into a picture's settings."""
        return tuple(Learned(str(one), one.token, one.sha256) for one in self.learned)

    def check(self, embeddings: Iterable[Embedding]) -> None:
        """Do nothing if these can be learned here, together.

        Raises:
            ValueError: an embedding of another text encoder, or a word that is taken; one line.
        """
        taken: dict[str, Embedding] = {}
        width = self._own.embedding_dim
        for one in embeddings:
            found = one.vectors.shape[-1]
            if found != width:
                known = f" ({WIDTHS[found]})" if found in WIDTHS else ""
                raise ValueError(one_line(f"{one}: an embedding of width {found}{known}, and this text encoder has {width}"))
            if one.architecture and one.architecture != self.base.architecture:
                other = f"{one}: an embedding for {one.architecture}, and this base is {self.base.architecture}"
                raise ValueError(one_line(other))
            if self.knows(one.token):
                word = f"{one}: {one.token!r} is in the vocabulary already: an embedding needs a word of its own"
                raise ValueError(one_line(word))
            for word in _said(one):
                first = taken.setdefault(fold(word), one)
                if first is not one and (word == one.token or not torch.equal(first.vectors, one.vectors)):
                    raise ValueError(one_line(f"{one}: there is another embedding for {word!r}"))

    def knows(self, word: str) -> bool:
        """Whether the tokenizer has this as a single word of its own."""
        return len(self._plain(word)) <= 1

    def learn(self, embeddings: Sequence[Embedding], rows: nn.Parameter | None = None) -> None:
        """Use these embeddings, and no others.

        Args:
            embeddings: none gives the text encoder its own table back.
            rows: all vectors one after the other, if they are to be trained.

        Raises:
            ValueError: as :meth:`check`; the vocabulary is as it was.
        """
        self.check(embeddings)
        if self.base.unet.dtype != torch.bfloat16 and any(one.text_encoder for one in embeddings):
            self._compare(embeddings)
        self.learned, self._ids = tuple(embeddings), {}
        end = self._own.num_embeddings
        for one in embeddings:
            ids = list(range(end, end + len(one.vectors)))
            end += len(ids)
            self._ids |= dict.fromkeys(_said(one), ids)
        self._words = Words(self._ids)
        table: nn.Module = self._own
        if embeddings:
            weight = self._own.weight
            stacked = torch.cat([one.vectors for one in embeddings]).to(weight.device, weight.dtype) if rows is None else rows
            table = WordTable(self._own, stacked)
        self.base.text_encoder.set_input_embeddings(table)

    def _compare(self, embeddings: Iterable[Embedding]) -> None:
        here = text_encoder_sha256(self.base.text_encoder)
        for one in embeddings:
            if one.text_encoder and one.text_encoder != here:
                logger.warning("%s: learned on another text encoder than this; its word may mean something else", one)

    def ids(self, prompts: Sequence[str]) -> Tensor:
        """(n, 77): what the text encoder reads. Longer prompts are cut with a warning."""
        rows = []
        for prompt in prompts:
            ids = self.tokens(prompt)
            if len(ids) > TOKENS - 2:
                left_out = one_line(self.text(ids[TOKENS - 2 :]))
                logger.warning("a prompt has more than %d tokens; left out is: %s", TOKENS - 2, left_out)
                ids = ids[: TOKENS - 2]
            rows.append(self._row(ids))
        return torch.tensor(rows)

    def pages(self, text: str) -> Tensor:
        """(n, 77): a text of any length, cut where the text encoder can read no more at once; never less than one row."""
        ids, step = self.tokens(text), TOKENS - 2
        return torch.tensor([self._row(ids[start : start + step]) for start in range(0, max(len(ids), 1), step)])

    def _row(self, ids: list[int]) -> list[int]:
        """Up to 75 ids as the text encoder reads them."""
        start, end = self.base.tokenizer("", verbose=False).input_ids
        # Padded here, because the tokenizer would take Stable Diffusion 2's padding "!" for a special token.
        return [start, *ids, end] + [self.base.pad] * (TOKENS - 2 - len(ids))

    def tokens(self, prompt: str) -> list[int]:
        """The ids of a prompt without start and end, however many they are."""
        found, place = [], 0
        for start, end, word in self._words.find(prompt):
            found += self._plain(prompt[place:start]) + self._ids[word]
            place = end
        return found + self._plain(prompt[place:])

    def text(self, ids: Sequence[int]) -> str:
        """Ids as words again."""
        count, words, parts = self._own.num_embeddings, {}, []
        for one in self.learned:
            words |= dict.fromkeys(self._ids[one.token], one.token)
        for number in ids:
            new = [words[number]] if number >= count else self.base.tokenizer.decode([number]).split()
            parts += new if new != parts[-1:] or number < count else []
        return " ".join(parts)

    def _plain(self, text: str) -> list[int]:
        return self.base.tokenizer(text, verbose=False).input_ids[1:-1]


def _said(one: Embedding) -> list[str]:
    """What a prompt may say for a learned word."""
    return [one.token, PREFIX + one.name] if one.name else [one.token]

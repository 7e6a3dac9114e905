"""Names for what other libraries make. Their own annotations do not tell what such an object has, so these are ``Any``."""

from __future__ import annotations

from typing import Any, TypeAlias

DiffusersNetwork: TypeAlias = Any
"""An ``nn.Module`` of diffusers or transformers, with ``config``, ``save_pretrained`` and its own outputs."""

DiffusersScheduler: TypeAlias = Any
"""A scheduler of diffusers, with ``timesteps``, ``alphas_cumprod`` and ``step``."""

Tokenizer: TypeAlias = Any
"""A tokenizer of transformers: called with texts, it returns ``input_ids``."""

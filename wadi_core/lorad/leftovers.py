"""Tensors of a file that no network has a place for: those that can be left out without changing a picture."""

from __future__ import annotations

import re
from collections.abc import Iterable

# What may be in a file and says nothing of the picture that is drawn: what training left (averages, optimizer, loss,
# counters), the schedule's own tables, which follow from its settings, the half of CLIP that looks at pictures, and the
# scales of inputs that networks in 8 bits are computed with.
_HARMLESS = re.compile(
    r"(.*\.)?position_ids|model_ema\..*|optimizer\b.*|optimizer_states.*|(.*\.)?loss\..*|(global_)?(step|epoch)|iteration"
    r"|betas|alphas_cumprod(_prev)?|sqrt_.*|log_one_minus_.*|posterior_.*|logvar|lvlb_weights|denoiser\..*"
    r"|(.*\.)?num_batches_tracked|safety_checker\..*|embedding_manager\..*"
    r"|(.*\.)?(vision_model|visual|visual_projection)\..*|(.*\.)?(text_projection(\.weight)?|logit_scale|attn_mask)"
    r"|(.*\.)?(scaled_fp8|scale_input|input_scale|comfy_quant)"
)
_SCALES = (".weight_scale", ".scale_weight")


def is_harmless(name: str) -> bool:
    """Whether a tensor that no network has a place for can be left out without changing a picture."""
    return _HARMLESS.fullmatch(name) is not None


def wanted(names: Iterable[str]) -> list[str]:
    """The names of those tensors that networks are to take: not the harmless ones, nor scales, which belong to others."""
    return [name for name in names if not is_harmless(name) and not name.endswith(_SCALES)]

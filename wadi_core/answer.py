"""What a network predicts, found out by its answer to noise: for bases that do not say it themselves.

A fine-tune for v_prediction has the names and shapes of one for noise, and drawn as the latter it gives noise. Two
answers tell them apart. To pure noise at the last timestep, a network that predicts noise returns that noise; one that
predicts v = alpha eps - sigma x0 returns about -x0, which is unlike it. At an early timestep both return the noise. A
network that does not, such as one with random weights, is neither, and nothing is said of it.
"""

from __future__ import annotations

import torch

from .lorad import kinds
from .thirdparty import DiffusersNetwork, Tokenizer

_EARLY, _LAST = 250, 999
# Of Stable Diffusion's schedule. At the early timestep this is noise on the latent 0, at the last one pure noise.
_SIGMA = {_EARLY: 0.5711, _LAST: 0.9977}
_LIKE_NOISE = 0.8  # cosine with the noise, from which on a network has learned to find it; trained ones reach 0.95
# Share of the noise that is in the answer at the last timestep: alpha_T = 0.07 is right for v, and 1 for noise.
_V_BELOW = 0.4
_CHANNELS, _SIDE, _TOKENS = 4, 16, 77  # of the latent, of a prompt


@torch.no_grad()
def answer_to_noise(
    network: DiffusersNetwork, tokenizer: Tokenizer = None, text_encoder: DiffusersNetwork = None
) -> str | None:
    """What a U-Net of Stable Diffusion predicts, by one small call; None where it cannot be told.

    It is asked with the empty prompt, or with zeros where there is no text encoder. Networks that have to be told more,
    such as those with an IP-Adapter, are not asked, nor those whose weights lie elsewhere.
    """
    weight = network.conv_in.weight
    if weight.is_meta or weight.shape[1] != _CHANNELS or kinds.of_settings(network.config):
        return None
    noise = torch.randn(1, _CHANNELS, _SIDE, _SIDE, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([_EARLY, _LAST])
    x = noise * torch.tensor([_SIGMA[_EARLY], _SIGMA[_LAST]]).view(2, 1, 1, 1)
    text = torch.zeros(1, _TOKENS, network.config.cross_attention_dim)
    if text_encoder is not None and tokenizer is not None:
        ids = tokenizer("", padding="max_length", max_length=_TOKENS, truncation=True, return_tensors="pt").input_ids
        text = text_encoder(ids.to(text_encoder.device))[0]
    told = text.to(weight).expand(2, -1, -1)
    said = network(x.to(weight), timesteps.to(weight.device), encoder_hidden_states=told).sample.float().cpu()
    early, last = said
    if not torch.cosine_similarity(early.flatten(), noise.flatten(), dim=0) > _LIKE_NOISE:
        return None
    share = float((last * noise[0]).sum() / noise.square().sum())
    if share < _V_BELOW:
        return "v_prediction"
    return "epsilon" if torch.cosine_similarity(last.flatten(), noise.flatten(), dim=0) > _LIKE_NOISE else None

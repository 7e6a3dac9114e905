"""Control maps that are made without a network: edges, lines, strokes, colours, with numpy, torch and Pillow alone.

Each takes and returns RGB pixels, (h, w, 3) uint8. Edges are those of OpenCV's Canny, pixel for pixel; shuffled colours
and lines follow controlnet_aux; what they call a scribble is drawn here from soft edges, which need no network either.
Lengths in pixels are for a shorter side of :data:`SIDE` and grow with the picture.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Pixels: TypeAlias = "NDArray[np.uint8]"

SIDE = 512
EDGE_SCALES = (1.0, 2.0, 4.0)  # pixels: how blurred the pictures are whose edges are added up
SOFTEST = 24.0  # of 255 levels, blurred: a picture without a stronger edge shows none at full light
LINE_SIGMA, LINE_FLOOR, LINE_LIGHT = 6.0, 8.0, 127.0
STROKE_SIGMA, STROKE_FROM, STROKE_EDGE = 3.0, 96.0, 16.0
GRAIN = 256  # pixels of the shuffled flow
TILE = 8  # what is left of the details of a tile: an eighth
BLUR_SIGMA = 9.0

# tan(22.5 degrees) in 15 bits, as OpenCV rounds it.
_TANGENT, _SHIFT = 13573, 15


def canny(pixels: Pixels, low: int, high: int) -> Pixels:
    """Edges, white on black: a gradient above ``high`` begins one, and one above ``low`` that touches it goes on."""
    around = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge").astype(np.int32)
    columns = around[:-2] + 2 * around[1:-1] + around[2:]
    rows = around[:, :-2] + 2 * around[:, 1:-1] + around[:, 2:]
    across, down = columns[:, 2:] - columns[:, :-2], rows[2:] - rows[:-2]
    # Of the three colours the one that changes most.
    strongest = (np.abs(across) + np.abs(down)).argmax(axis=2, keepdims=True)
    dx, dy = (np.take_along_axis(one, strongest, axis=2)[:, :, 0] for one in (across, down))
    strength = np.pad(np.abs(dx) + np.abs(dy), 1)
    edge = (strength[1:-1, 1:-1] > low) & _ridge(strength, dx, dy)
    return _white(_connected(edge, edge & (strength[1:-1, 1:-1] > high)))


def _ridge(strength: NDArray[np.int32], dx: NDArray[np.int32], dy: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Where a gradient is the strongest of its neighbours along its own direction, of which there are four."""
    height, width = dx.shape

    def at(down: int, right: int) -> NDArray[np.int32]:
        return strength[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    own, x = at(0, 0), np.abs(dx).astype(np.int64)
    y, flat = np.abs(dy).astype(np.int64) << _SHIFT, x * _TANGENT
    horizontal = (own > at(0, -1)) & (own >= at(0, 1))
    vertical = (own > at(-1, 0)) & (own >= at(1, 0))
    falling = (own > at(-1, -1)) & (own > at(1, 1))
    rising = (own > at(-1, 1)) & (own > at(1, -1))
    diagonal = np.where((dx ^ dy) < 0, rising, falling)
    return np.where(y < flat, horizontal, np.where(y > flat + (x << (_SHIFT + 1)), vertical, diagonal))


def _connected(edge: NDArray[np.bool_], start: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The pixels of ``edge`` that are reached from ``start``, from neighbour to neighbour of eight."""
    height, width = edge.shape
    left = np.pad(edge & ~start, 1).ravel()  # not reached yet
    steps = np.array([down * (width + 2) + right for down in (-1, 0, 1) for right in (-1, 0, 1) if down or right])
    found = np.pad(start, 1).ravel()
    frontier = np.flatnonzero(found)
    while frontier.size:
        near = (frontier[:, None] + steps).ravel()
        frontier = np.unique(near[left[near]])
        found[frontier], left[frontier] = True, False
    return found.reshape(height + 2, width + 2)[1:-1, 1:-1]


def lineart(pixels: Pixels) -> Pixels:
    """Lines that are darker than what is around them, white on black."""
    x = _tensor(pixels)
    darker = (_blurred(x, LINE_SIGMA) - x).amin(dim=1).clamp(0, 255)
    strong = darker[darker > LINE_FLOOR]
    middle = float(strong.quantile(0.5)) if strong.numel() else 0.0
    return _grey(darker / max(16.0, middle) * LINE_LIGHT)


def soft_edges(pixels: Pixels) -> Pixels:
    """Edges as bright as they are strong and as wide as they are blurred, white on black."""
    x = _tensor(pixels)
    edges = torch.zeros_like(x[:, 0])
    for scale in EDGE_SCALES:
        sigma = _scaled(pixels, scale)
        edges += sigma * _gradient(_blurred(x, sigma)) / len(EDGE_SCALES)
    strongest = float(_quantile(edges, 0.99))
    return _grey(255 * (edges / max(strongest, SOFTEST)).clamp(0, 1))


def strokes(pixels: Pixels) -> Pixels:
    """Soft edges as strokes of a broad pen, white on black."""
    sigma = _scaled(pixels, STROKE_SIGMA)
    edges = _blurred(_tensor(soft_edges(pixels))[:, :1], sigma)
    thin = torch.zeros_like(edges)
    for ahead, back in (((0, 1), (0, -1)), ((1, 0), (-1, 0)), ((1, 1), (-1, -1)), ((1, -1), (-1, 1))):
        near = torch.maximum(edges.roll(ahead, (2, 3)), edges.roll(back, (2, 3)))
        thin = torch.where(edges >= near, edges, thin)
    lines = torch.where(thin > STROKE_FROM, 255.0, 0.0)
    return _white((_blurred(lines, sigma) > STROKE_EDGE)[0, 0].numpy())


def shuffled(pixels: Pixels, seed: int) -> Pixels:
    """The picture's colours, each taken from somewhere else: its shapes are gone."""
    height, width, _ = pixels.shape
    random = np.random.RandomState(seed % 2**32)  # the numbers that controlnet_aux draws for this seed
    flow = torch.stack([_waves(height, width, random), _waves(height, width, random)], dim=-1)
    x = _tensor(pixels).double()
    return _pixels(F.grid_sample(x, flow[None] * 2 - 1, mode="bilinear", align_corners=True))


def _waves(height: int, width: int, random: np.random.RandomState) -> Tensor:
    """(h, w) from 0 to 1: random numbers far apart, and a smooth way from one to the next."""
    noise = random.uniform(size=(height // GRAIN + 2, width // GRAIN + 2))
    size = (height + 2 * GRAIN, width + 2 * GRAIN)
    smooth = F.interpolate(torch.from_numpy(noise)[None, None], size=size, mode="bicubic")[0, 0]
    smooth = smooth[GRAIN : GRAIN + height, GRAIN : GRAIN + width]
    return (smooth - smooth.min()) / (smooth.max() - smooth.min())


def tile(pixels: Pixels) -> Pixels:
    """The picture without its details, as an enlargement of a small copy."""
    x = _tensor(pixels)
    small = [max(1, round(side / TILE)) for side in x.shape[-2:]]
    x = F.interpolate(x, size=small, mode="area")
    return _pixels(F.interpolate(x, size=pixels.shape[:2], mode="bicubic"))


def blurred(pixels: Pixels) -> Pixels:
    """The picture out of focus."""
    return _pixels(_blurred(_tensor(pixels), _scaled(pixels, BLUR_SIGMA)))


def _tensor(pixels: Pixels) -> Tensor:
    """(1, 3, h, w) float32 from 0 to 255."""
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float()


def _pixels(x: Tensor) -> Pixels:
    return x[0].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()


def _grey(x: Tensor) -> Pixels:
    """(1, h, w) as pixels of one light in all colours."""
    return _pixels(x[:, None].expand(-1, 3, -1, -1))


def _white(where: NDArray[np.bool_]) -> Pixels:
    return np.repeat(np.where(where, 255, 0).astype(np.uint8)[:, :, None], 3, axis=2)


def _scaled(pixels: Pixels, length: float) -> float:
    return length * min(pixels.shape[:2]) / SIDE


def _quantile(x: Tensor, share: float) -> Tensor:
    return x.flatten().kthvalue(max(1, round(share * x.numel()))).values


def _blurred(x: Tensor, sigma: float) -> Tensor:
    """(n, c, h, w) under a Gaussian, mirrored at the borders."""
    reach = max(1, round(4 * sigma))
    places = torch.arange(-reach, reach + 1)
    kernel = torch.exp(-(places**2) / (2 * max(sigma, 1e-3) ** 2))
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, -1)
    for axis in (2, 3):
        sides = [0, 0, 0, 0]
        sides[6 - 2 * axis : 8 - 2 * axis] = [reach, reach]
        shape = (-1, 1) if axis == 2 else (1, -1)
        x = F.conv2d(_mirrored(x, axis, reach), kernel.reshape(x.shape[1], 1, *shape), groups=x.shape[1])
    return x


def _mirrored(x: Tensor, axis: int, reach: int) -> Tensor:
    """More cells at both ends of an axis, mirrored, however short the axis is."""
    length = x.shape[axis]
    period = max(1, 2 * length - 2)
    places = torch.arange(-reach, length + reach) % period
    return x.index_select(axis, torch.where(places < length, places, period - places))


def _gradient(x: Tensor) -> Tensor:
    """(n, h, w) the steepest change of any colour, in levels a pixel."""
    wide = F.pad(x, (1, 1, 1, 1), mode="replicate")
    across = (wide[..., 1:-1, 2:] - wide[..., 1:-1, :-2]) / 2
    down = (wide[..., 2:, 1:-1] - wide[..., :-2, 1:-1]) / 2
    return torch.hypot(across, down).amax(dim=1)

"""The rotation as training computes it: in few passes over memory, compiled where that was asked for.

A training step turns every weight of its adapters and forms the gradients of their angles, which is most of what LoRaD
costs beside LoRA. Two numbers side by side, as a rotation needs them, are what processors load worst. A pair of bfloat16
numbers is one word of 32 bits, a pair of float32 numbers one of 64: read as whole words, all that is left are shifts and
arithmetic on contiguous memory, of which ``torch.compile`` makes one loop.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .rotation import BLOCK_ELEMENTS, Factors, sum_angles, working_dtype

WORDS = {torch.bfloat16: torch.int32, torch.float32: torch.int64}  # the integer that holds a pair of such numbers
COMPILED_ELEMENTS = 1 << 22  # weight elements a call: enough that starting it costs nothing, and theta stays small
HIGH = -65536  # the upper half of a word of 32 bits


@dataclass
class Chosen:
    """How this process computes rotations that are trained; :func:`choose` sets it.

    Attributes:
        compiled: with compiled loops, where weight and result have suitable types.
        products: the type in which factors are multiplied with each other and with gradients; None: their own.
    """

    compiled: bool = False
    products: torch.dtype | None = None


chosen = Chosen()


def choose(compiled: bool = False, products: torch.dtype | None = None, device: torch.device | str = "cpu") -> str:
    """Choose for this whole process how rotations are computed, as ``torch.backends`` does for other things.

    Args:
        compiled: compile the element-wise part; this takes some seconds, or some tenths from torch's cache.
        products: bfloat16 multiplies factors in it, with sums in float32: an error of 0.3 % of each angle.
        device: where it has to work.

    Returns:
        Why there are no compiled loops although they were asked for; empty if there are, or if they were not.
    """
    chosen.compiled, chosen.products = False, products
    if not compiled:
        return ""
    if sys.byteorder != "little":
        return "this processor stores numbers the other way round"
    try:
        for dtype, word in WORDS.items():
            words = torch.zeros(2, 3, dtype=word, device=device)
            _compiled(_turn[dtype])(words, torch.zeros(2, 3, device=device))
        pairs = torch.zeros(2, 3, dtype=torch.int32, device=device)
        _compiled(_angle_gradient)(pairs, pairs)
        halves = torch.zeros(2, 6, dtype=torch.float16, device=device)
        _compiled(_angle_gradient_of_columns)(halves, halves)
    except (RuntimeError, OSError, ImportError) as error:  # no compiler, or none that torch can use
        return str(error).strip().partition("\n")[0] or type(error).__name__
    chosen.compiled = True
    return ""


_functions: dict[Callable[..., Tensor], Callable[..., Tensor]] = {}


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function as torch compiles it, once in a process."""
    if function not in _functions:
        _functions[function] = torch.compile(function, dynamic=True)
    return _functions[function]


def _words(tensor: Tensor) -> Tensor | None:
    """The pairs of a tensor (out, in) as integers (out, in/2), no copy; None where memory does not allow it."""
    rows_start_even = tensor.stride(0) % 2 == 0 and tensor.storage_offset() % 2 == 0
    if tensor.dtype not in WORDS or tensor.stride(1) != 1 or not rows_start_even:
        return None
    return tensor.detach().view(WORDS[tensor.dtype])


def _even(words: Tensor) -> Tensor:
    """Of pairs of bfloat16: the first number of each, in float32. The lower half is the first in memory."""
    return (words << 16).view(torch.float32)


def _odd(words: Tensor) -> Tensor:
    """The second number of each pair of bfloat16, in float32."""
    return (words & HIGH).view(torch.float32)


def _nearest(number: Tensor) -> Tensor:
    """The bits of float32 numbers, so that their upper half is the nearest bfloat16 (to even, as everywhere)."""
    bits = number.view(torch.int32)
    return bits + 0x7FFF + ((bits >> 16) & 1)


def _rotate_to_bfloat16(even: Tensor, odd: Tensor, theta: Tensor) -> Tensor:
    cosine, sine = theta.cos(), theta.sin()
    low, high = _nearest(even * cosine - odd * sine), _nearest(even * sine + odd * cosine)
    return (high & HIGH) | ((low >> 16) & 0xFFFF)


def _turn_bfloat16(words: Tensor, theta: Tensor) -> Tensor:
    """Pairs of bfloat16 turned by theta, as pairs of bfloat16."""
    return _rotate_to_bfloat16(_even(words), _odd(words), theta)


def _turn_float32(words: Tensor, theta: Tensor) -> Tensor:
    """Pairs of float32 turned by theta, as pairs of bfloat16."""
    even, odd = words.to(torch.int32).view(torch.float32), (words >> 32).to(torch.int32).view(torch.float32)
    return _rotate_to_bfloat16(even, odd, theta)


_turn = {torch.bfloat16: _turn_bfloat16, torch.float32: _turn_float32}


def _angle_gradient(grad: Tensor, rotated: Tensor) -> Tensor:
    """dL/dtheta from dL/dR and R, all pairs of bfloat16."""
    return _odd(grad) * _even(rotated) - _even(grad) * _odd(rotated)


def _angle_gradient_of_columns(grad: Tensor, rotated: Tensor) -> Tensor:
    """The same of numbers of any type, in float32."""
    g, r = grad.float(), rotated.float()
    return g[:, 1::2] * r[:, 0::2] - g[:, 0::2] * r[:, 1::2]


def turned_words(weight: Tensor, factors: Sequence[Factors], dtype: torch.dtype) -> Tensor | None:
    """A new tensor, the weight turned by the summed angles, by a compiled loop; None where there is none for it."""
    if not chosen.compiled or dtype != torch.bfloat16 or weight.ndim != 2 or weight.shape[1] % 2:
        return None
    words = _words(weight)
    if words is None:
        return None
    turn = _compiled(_turn[weight.dtype])
    result = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    into = result.view(torch.int32)
    rows = max(1, COMPILED_ELEMENTS // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        block = slice(start, start + rows)
        theta = sum_angles([(a[block], b, s) for a, b, s in factors], working_dtype(weight), chosen.products)
        into[block] = turn(words[block], theta)
    return result


def factor_gradients(grad: Tensor, rotated: Tensor, theta_a: Tensor, theta_b: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of a layer's two factors from that of its rotated weight.

    With G = dL/dR, dtheta[i,j] = G[i,2j+1] R[i,2j] - G[i,2j] R[i,2j+1]; it is formed for some rows at a time.

    Args:
        grad, rotated: (out, in), of one type.
        theta_a, theta_b: (out, r) and (r, in/2), in float32 or more.
    """
    exact = theta_a.dtype
    products = chosen.products or exact
    a, b = theta_a.to(products), theta_b.to(products)
    compiled = chosen.compiled and exact == torch.float32
    angle_gradient, g, r = _angle_gradient_of_columns, grad, rotated
    if compiled and grad.dtype == rotated.dtype == torch.bfloat16:
        g_words, r_words = _words(grad), _words(rotated)
        if g_words is not None and r_words is not None:
            angle_gradient, g, r = _angle_gradient, g_words, r_words
    grad_a, grad_b = torch.empty_like(theta_a), torch.zeros_like(theta_b)
    rows = (COMPILED_ELEMENTS if compiled else BLOCK_ELEMENTS) // grad.shape[1]
    # On a CPU blocks of rows stay in the cache; on a GPU fewer, larger kernels are faster.
    rows = max(1, rows) if compiled or grad.device.type == "cpu" else grad.shape[0]
    for start in range(0, grad.shape[0], rows):
        block = slice(start, start + rows)
        if compiled:
            theta = _compiled(angle_gradient)(g[block], r[block])
        else:
            wide, turned = g[block].to(exact), r[block].to(exact)
            theta = wide[:, 1::2] * turned[:, 0::2]
            theta -= wide[:, 0::2] * turned[:, 1::2]
        theta = theta.to(products)
        grad_a[block] = theta @ b.T
        grad_b += a[block].T @ theta
    return grad_a, grad_b

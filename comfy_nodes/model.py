"""A MODEL of ComfyUI as the core looks at networks: its layers, its weights, and the adapters that are on it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.utils
import torch
from torch import Tensor

from ..wadi_core.lorad import LoRaD, Match, check_together
from ..wadi_core.lorad.layouts import Layout, detect
from ..wadi_core.lorad.weights import Weights
from .notices import Notice
from .weight_adapter import LoRaDAdapter

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

NETWORK = "diffusion_model."
PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ATTACHMENT = "wadi.lorads"  # under which a MODEL keeps the adapters that are on it, with their strengths
STRENGTH_TOLERANCE = 0.05  # of the sum of one-step adapters' strengths

_base_checksums: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


class ModelWeights(Weights):
    """The weights of a MODEL, one at a time: as they are stored, or as its patches (LoRA, LoRaD) make them.

    Patched and quantised weights are float32. Nothing is copied before it is asked for.

    Args:
        model: the MODEL.
        patched: with its patches.

    Raises:
        ValueError: no network that LoRaD is made for; one line.
    """

    def __init__(self, model: ModelPatcher, patched: bool = True) -> None:
        stored: dict[str, Tensor] = {}
        self._converters: dict[str, Callable[..., Tensor]] = {}
        for name in _parameters(model):
            weight, _, convert = comfy.model_patcher.get_key_weight(model.model, name)
            if name in model.hook_backup:
                weight = model.hook_backup[name][0]
            elif name in model.backup:  # what is in the network now is patched already
                weight = model.backup[name].weight
            stored[name] = weight
            if convert is not None:
                self._converters[name] = convert
        self._patches = {name: model.patches[name] for name in stored if name in model.patches} if patched else {}
        self._stored = stored
        super().__init__(stored, {}, "this model")

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if self._is_computed(name) else super().dtype(name)

    def _read(self, name: str) -> Tensor:
        stored = self._stored[name].detach()
        if not self._is_computed(name):
            return stored.to("cpu")
        values = comfy.model_management.cast_to_device(stored, torch.device("cpu"), torch.float32, copy=True)
        if name in self._converters:
            values = self._converters[name](values, inplace=True)
        return comfy.lora.calculate_weight(self._patches.get(name, []), values, name)

    def values(self, name: str) -> Tensor:
        return self.tensor(name)  # ComfyUI has multiplied by the scale, where there is one

    def scale_of(self, name: str) -> str | None:
        return None

    def _is_computed(self, name: str) -> bool:
        """Whether the stored numbers are not the weight itself."""
        stored = self._stored[name]
        return name in self._patches or name in self._converters or stored.dtype not in PLAIN


def layout_of(model: ModelPatcher) -> Layout:
    """Where the layers of a MODEL's network are.

    Raises:
        ValueError: no network that LoRaD is made for; one line.
    """
    return detect({name: tuple(parameter.shape) for name, parameter in _parameters(model).items()})


def _parameters(model: ModelPatcher) -> dict[str, torch.nn.Parameter]:
    """The network's parameters by name. Not its state dict, where four-bit weights have the shape of their storage."""
    return {name: parameter for name, parameter in model.model.named_parameters() if name.startswith(NETWORK)}


def prediction_type(model: ModelPatcher) -> str:
    """What the network returns, as ComfyUI takes it: ``epsilon`` or ``v_prediction``."""
    sampling = model.get_model_object("model_sampling")
    return "v_prediction" if isinstance(sampling, comfy.model_sampling.V_PREDICTION) else "epsilon"


def strengths_on(model: ModelPatcher) -> tuple[tuple[LoRaD, float], ...]:
    """The LoRaDs that this pack's nodes have put on a MODEL, with their strengths."""
    return model.get_attachment(ATTACHMENT) or ()


def adapters_on(model: ModelPatcher) -> tuple[LoRaD, ...]:
    """The LoRaDs that this pack's nodes have put on a MODEL."""
    return tuple(lorad for lorad, _ in strengths_on(model))


def has_other_lorad(model: ModelPatcher) -> bool:
    """Whether another loader, such as ComfyUI's own Load LoRA, has put LoRaD layers on a MODEL."""
    ours = {id(factors[0]) for lorad in adapters_on(model) for factors in lorad.factors.values()}
    found = (patch[1] for patches in model.patches.values() for patch in patches)
    return any(isinstance(one, LoRaDAdapter) and id(one.weights[0]) not in ours for one in found)


@dataclass(frozen=True)
class Applied:
    """What putting a LoRaD on a MODEL did.

    Attributes:
        match: how the two fit together.
        strength: of the angles.
        layers: how many layers of the network a one-step student's LoRaD can turn.
        notes: what a user may want to know.
        notices: what is likely to go wrong.
    """

    match: Match
    strength: float
    layers: int
    notes: tuple[str, ...] = ()
    notices: tuple[Notice, ...] = ()

    def __str__(self) -> str:
        match = self.match
        # An adapter that was trained on fewer layers than it could have must not look complete.
        of = max(self.layers, match.layers)
        return f"{len(match.paths)} of {of} layers, rank {match.rank}, {match.architecture}, strength {self.strength:g}"


def apply(model: ModelPatcher, lorad: LoRaD, strength: float) -> tuple[ModelPatcher, Applied]:
    """A MODEL with a LoRaD among its patches; the weights are turned when ComfyUI loads them, all layers or none.

    At strength 0 it is the same MODEL.

    Raises:
        ValueError: the LoRaD does not fit, or not together with those that are on the MODEL; one line.
    """
    layout = layout_of(model)
    match = lorad.matched(layout.network)
    match.check()
    layers = len(layout.layers())
    if strength == 0.0:
        return model, Applied(match, strength, layers, ("at strength 0 nothing changes",))
    together = (*strengths_on(model), (lorad, strength))
    check_together(one for one, _ in together)
    patches: dict[str | tuple[str, tuple[int, int, int]], LoRaDAdapter] = {}
    for key, path in match.paths.items():
        place = layout.places[path]
        rows = place.rows and (0, place.rows.start, place.rows.stop - place.rows.start)
        target = (place.name, rows) if rows else place.name
        patches[target] = LoRaDAdapter({f"{key}.lorad_a", f"{key}.lorad_b"}, lorad.factors[key])
    notes = tuple(_notes(model, lorad, [target if isinstance(target, str) else target[0] for target in patches]))
    turned = model.clone()
    taken = turned.add_patches(patches, strength)
    if len(taken) < len(patches):
        raise ValueError(f"ComfyUI took {len(taken)} of the {len(patches)} layers of this LoRaD: the model is of another kind")
    turned.set_attachments(ATTACHMENT, together)
    return turned, Applied(match, strength, layers, notes, tuple(_notices(model, together)))


def _notes(model: ModelPatcher, lorad: LoRaD, names: list[str]) -> list[str]:
    notes = []
    if any(not isinstance(patch[1], LoRaDAdapter) for name in names for patch in model.patches.get(name, ())):
        notes.append("a LoRA comes before this LoRaD and is turned with the weights: put the LoRaD first")
    if lorad.metadata.prediction_type != prediction_type(model):
        notes.append(f"this LoRaD is for a network that returns {lorad.metadata.prediction_type}, the model does not")
    trained_on = lorad.metadata.base_sha256
    if trained_on is not None and trained_on != _checksum_of_base(model):
        notes.append("it was trained on another base, or on this one in another precision: results will differ")
    return notes


def _notices(model: ModelPatcher, together: Sequence[tuple[LoRaD, float]]) -> list[Notice]:
    """What is likely to go wrong with the last of several adapters: angles of one-step ones that add up to too much."""
    *before, (lorad, _) = together
    if not lorad.one_step:
        return []
    students = [(one, strength) for one, strength in before if one.one_step]
    total = sum(strength for _, strength in (*students, together[-1]))
    if students and abs(total - 1.0) > STRENGTH_TOLERANCE:
        values = {"total": f"{total:g}"}
        end = f"the strengths add up to {total:g}, and one step needs about 1: take one of them away"
        if any(_same(one, lorad) for one, _ in students):
            return [Notice("warn_same_lorad", f"This one-step LoRaD is on the model already: {end}.", values)]
        return [Notice("warn_second_one_step", f"Another one-step LoRaD is on the model already: {end}.", values)]
    if has_other_lorad(model):
        text = "Load LoRA has put a LoRaD on this model too, and the angles add: use one one-step LoRaD only."
        return [Notice("warn_other_lorad", text)]
    return []


def _same(one: LoRaD, other: LoRaD) -> bool:
    """Whether two adapters turn by the same angles, whatever their files are called."""
    if one is other:
        return True
    if one.factors.keys() != other.factors.keys():
        return False
    pairs = ((one.factors[key], other.factors[key]) for key in one.factors)
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


def _checksum_of_base(model: ModelPatcher) -> str:
    """:func:`~wadi_core.lorad.layers.network_sha256` of the bare network: a second for SD 1.5, so it is remembered."""
    if model.model not in _base_checksums:
        _base_checksums[model.model] = ModelWeights(model, patched=False).sha256()
    return _base_checksums[model.model]


def progress() -> Callable[[int, int], None]:
    """A function for the core's ``progress`` arguments: it moves the node's bar, and stops the work when the user does."""
    bars: list[comfy.utils.ProgressBar] = []

    def show(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if not bars:
            bars.append(comfy.utils.ProgressBar(total))
        bars[0].update_absolute(done, total)

    return show

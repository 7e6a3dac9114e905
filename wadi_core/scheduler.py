"""The one-step schedule as a scheduler of diffusers, so that its stock pipelines draw in one call.

    from wadi_core.scheduler import load_lorad

    pipe = StableDiffusionPipeline.from_pretrained(...)
    load_lorad(pipe, "one-step.safetensors")
    pipe("a red apple").images[0]

One form covers every one-step parametrisation in use: the network sees x = k z at one timestep, z ~ N(0, I), and

    epsilon        x0 = (x - sigma_T * net(x, T)) / alpha_T
    v_prediction   x0 = alpha_T * x - sigma_T * net(x, T)
    sample         x0 = net(x, T)
    flow           x0 = x - net(x, T)

with k = 1 (WaDi, SwiftBrush, DMD2, Turbo, Hyper, Lightning) or k = sigma_T (SiD-LSG).
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
from typing import Any, Literal, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from torch import Tensor, nn

from . import avoid
from .answer import answer_to_noise
from .lorad.adapter import Fused, LoRaD, Match, fuse
from .lorad.linear import rotated_layers
from .schedule import INPUT_SCALES, PREDICTION_TYPES, OneStep

logger = logging.getLogger("wadi")

ONCE = {"guidance_scale": 1.0, "num_inference_steps": 1}  # at 1 guidance is off in all pipelines


class OneStepScheduler(SchedulerMixin, ConfigMixin):
    """One call of the network at one timestep, whatever number of steps is asked for.

    Args:
        alpha_T_squared: share of the signal in the variance at the timestep, inside (0, 1).
        timestep: what the network is told, 0 to 999.
        prediction_type: what the network returns: ``epsilon``, ``v_prediction``, ``sample`` or ``flow``.
        input_scale: what multiplies the noise before the network sees it: ``one``, or ``sigma`` for sigma_T.
        num_train_timesteps, beta_start, beta_end, beta_schedule: of the base's training. Nothing is computed with them
            here; a scheduler of many steps that is made from this one's settings needs them.

    Raises:
        ValueError: a value outside its range.
    """

    _compatibles = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
    order = 1

    @register_to_config
    def __init__(
        self,
        alpha_T_squared: float = 0.0047,
        timestep: int = 999,
        prediction_type: Literal["epsilon", "v_prediction", "sample", "flow"] = "epsilon",
        input_scale: Literal["one", "sigma"] = "one",
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
    ) -> None:
        if prediction_type not in (*PREDICTION_TYPES, "sample", "flow"):
            raise ValueError(f"prediction_type must be epsilon, v_prediction, sample or flow, not {prediction_type!r}")
        if input_scale not in INPUT_SCALES:
            raise ValueError(f"input_scale must be one or sigma, not {input_scale!r}")
        known = prediction_type if prediction_type in PREDICTION_TYPES else "epsilon"
        self.one_step = OneStep(alpha_T_squared, timestep, known, input_scale)
        self.init_noise_sigma = 1.0
        self.num_inference_steps = 1
        self.timesteps = torch.tensor([timestep])
        self._seen = 0  # how many the network was asked for

    @classmethod
    def of(cls, one_step: OneStep, former: Any = None) -> OneStepScheduler:
        """The scheduler of a LoRaD's schedule.

        Args:
            former: the base's own scheduler, of which the settings of its training are kept.
        """
        made = cls.from_config(
            dict(former.config) if former is not None else {},
            alpha_T_squared=one_step.alpha_T_squared,
            timestep=one_step.timestep,
            prediction_type=one_step.prediction_type,
            input_scale=one_step.input_scale,
        )
        return cast("OneStepScheduler", made)  # diffusers' annotation allows for unused settings beside it

    def set_timesteps(self, num_inference_steps: int = 1, device: str | torch.device | None = None) -> None:
        """There is one timestep; ``num_inference_steps`` is for the pipelines that give it."""
        self.timesteps = torch.tensor([self.one_step.timestep], device=device)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Called by pipelines that start in the middle of a schedule, which has none here.

        Raises:
            ValueError: ``begin_index`` is not 0.
        """
        if begin_index:
            raise ValueError("one step starts from noise and knows no less: give strength=1.0")

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """k z: what the network sees of the noise z (n, c, h, w)."""
        self._seen = sample.shape[0]
        return self.one_step.network_input(sample)

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """The clean latent x0, in the type of ``sample``; computed in float32 or better.

        Twice: as what comes next, and as the prediction of x0, which PixArt's pipeline takes of a single step.

        Args:
            model_output: (n, c, h, w) what the network returned, or (n, 2c, h, w) with a learned sigma.
            timestep: looked at by nobody: there is one.
            sample: (n, c, h, w) the noise z.
        """
        if self._seen > sample.shape[0]:
            logger.warning("this pipeline uses guidance, which spoils one step and doubles its time: give guidance_scale=1.0")
        self._seen = 0
        x, kind = self.one_step.network_input(sample), self.config["prediction_type"]
        if kind in PREDICTION_TYPES:
            x0 = self.one_step.x0(x, model_output)
        else:
            output = model_output[:, : x.shape[1]]
            x0 = (output if kind == "sample" else x.float() - output.float()).to(sample.dtype)
        return DDIMSchedulerOutput(prev_sample=x0, pred_original_sample=x0) if return_dict else (x0, x0)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha_T x0 + sigma_T eps, at the one timestep there is."""
        return self.one_step.alpha_T * original_samples + self.one_step.sigma_T * noise

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]


def network_of(pipe: Any) -> nn.Module:
    """The network of a pipeline that an adapter goes on.

    Raises:
        ValueError: it has none.
    """
    network = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    if not isinstance(network, nn.Module):
        raise ValueError(f"{type(pipe).__name__} has neither a U-Net nor a transformer to put a LoRaD on")
    return network


def make_one_step(pipe: Any, one_step: OneStep | OneStepScheduler | None = None) -> None:
    """Let a stock pipeline of diffusers draw in one call, without guidance, whatever its arguments say.

    Args:
        one_step: the schedule; by default WaDi's.
    """
    former = _Former.of(pipe)
    if not isinstance(one_step, OneStepScheduler):
        one_step = OneStepScheduler.of(one_step or OneStep(), former.scheduler)
    pipe.scheduler = one_step
    pipe.__class__ = _calling_once(former.kind)
    pipe.__dict__["_before_one_step"] = former


def _calling_once(kind: type) -> type:
    """A pipeline's class that draws in one step without guidance; it keeps its name, under which the pipeline is saved."""
    call = inspect.getattr_static(kind, "__call__", None)
    fixed = {name: value for name, value in ONCE.items() if call is not None and name in inspect.signature(call).parameters}
    if call is None or not fixed:
        return kind

    @functools.wraps(call)
    def once(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(call).bind(self, *args, **kwargs)
        given.arguments.update(fixed)
        with avoid.of_call(self, given.arguments):
            return call(*given.args, **given.kwargs)

    return type(kind.__name__, (kind,), {"__call__": once, "__module__": kind.__module__})


class _Former:
    """What a pipeline was before :func:`make_one_step`."""

    def __init__(self, kind: type, scheduler: Any) -> None:
        self.kind, self.scheduler = kind, scheduler

    @classmethod
    def of(cls, pipe: Any) -> _Former:
        return pipe.__dict__.get("_before_one_step") or cls(type(pipe), pipe.scheduler)


def make_many_step(pipe: Any) -> None:
    """Give a pipeline back the scheduler and the guidance that it had before :func:`make_one_step`."""
    former = pipe.__dict__.pop("_before_one_step", None)
    if former is not None:
        pipe.__class__, pipe.scheduler = former.kind, former.scheduler


def _loaded(pipe: Any) -> dict[str, LoRaD]:
    """The adapters that :func:`load_lorad` put on a pipeline's network, by their names."""
    return network_of(pipe).__dict__.setdefault("_lorads", {})


def load_lorad(pipe: Any, lorad: LoRaD | str | os.PathLike[str], adapter_name: str = "lorad", strength: float = 1.0) -> Match:
    """Put a LoRaD on a pipeline of diffusers, live; a one-step LoRaD also sets its schedule and switches guidance off.

    Several under several names add their angles. The base's own weights stay as they are, bit for bit.

    Args:
        lorad: the adapter or its file.
        adapter_name: replaced where it is there already.
        strength: scales the angles; 0 is the bare base.

    Returns:
        how it fits the network.

    Raises:
        OSError, ValueError: it cannot be read, does not fit, or its schedule differs from another's; one line, and
            nothing has been changed.
    """
    adapter = lorad if isinstance(lorad, LoRaD) else LoRaD.load(lorad)
    network, loaded = network_of(pipe), _loaded(pipe)
    match = adapter.matched(network)
    match.check()
    schedule = adapter.one_step
    if schedule and not loaded:
        _check_prediction(pipe, schedule)
    for name, other in loaded.items():
        if name != adapter_name and schedule and other.one_step and other.one_step != schedule:
            raise ValueError(f"the LoRaD {name!r} has another one-step schedule, so the two cannot be used together")
    adapter.apply_to(network, strength, adapter_name)
    loaded[adapter_name] = adapter
    _follow_schedule(pipe)
    return match


def _check_prediction(pipe: Any, schedule: OneStep) -> None:
    """Raises ValueError if a one-step LoRaD is for a network that returns something else.

    The scheduler of a pipeline that was made from a single file says what is usual, so the network itself is asked.
    """
    network: Any = network_of(pipe)
    if type(network).__name__ != "UNet2DConditionModel":
        return
    returned = answer_to_noise(network, getattr(pipe, "tokenizer", None), getattr(pipe, "text_encoder", None))
    if returned not in (None, schedule.prediction_type):
        said = f"predicts {returned} by its answer to noise"
        raise ValueError(f"this network {said}, and the one-step weights are for {schedule.prediction_type}")


def _follow_schedule(pipe: Any) -> None:
    """Set the schedule of the one-step LoRaDs that are on the network; without one, that from before."""
    schedule = next((adapter.one_step for adapter in _loaded(pipe).values() if adapter.one_step), None)
    if schedule is None:
        make_many_step(pipe)
    else:
        make_one_step(pipe, schedule)


def set_strengths(pipe: Any, strengths: dict[str, float]) -> None:
    """Scale the angles of loaded adapters; 0 switches one off.

    Raises:
        ValueError: no adapter of that name is loaded; nothing has been changed.
    """
    loaded = _loaded(pipe)
    unknown = [name for name in strengths if name not in loaded]
    if unknown:
        raise ValueError(f"no LoRaD named {unknown[0]!r} is loaded; there is {', '.join(loaded) or 'none'}")
    for _, layer in rotated_layers(network_of(pipe)):
        layer.strengths.update({name: strength for name, strength in strengths.items() if name in layer.strengths})


def unload_lorad(pipe: Any, adapter_name: str | None = None) -> None:
    """Take one adapter, or all, off a pipeline's network; without a one-step one its own schedule comes back.

    Raises:
        ValueError: no adapter of that name is loaded.
    """
    loaded = _loaded(pipe)
    if adapter_name is not None and adapter_name not in loaded:
        raise ValueError(f"no LoRaD named {adapter_name!r} is loaded; there is {', '.join(loaded) or 'none'}")
    for name in [adapter_name] if adapter_name is not None else list(loaded):
        loaded.pop(name).remove(network_of(pipe), name)
    _follow_schedule(pipe)


def fuse_lorad(pipe: Any) -> Fused:
    """Rotate the network's own weights by all loaded adapters, with their strengths, and take the live ones off.

    The schedule stays. :meth:`~.lorad.adapter.Fused.restore` puts the very bits back.
    """
    network, loaded = network_of(pipe), _loaded(pipe)
    strengths = {name: strength for _, layer in rotated_layers(network) for name, strength in layer.strengths.items()}
    stack = [(adapter, strengths[name]) for name, adapter in loaded.items()]
    for name, adapter in list(loaded.items()):
        adapter.remove(network, name)
    loaded.clear()
    return fuse(network, stack)


@torch.no_grad()
def hotswap_lorad(pipe: Any, lorad: LoRaD | str | os.PathLike[str], adapter_name: str = "lorad") -> None:
    """Put another LoRaD in the place of a loaded one, into the same tensors: a compiled network is not compiled anew.

    Raises:
        OSError, ValueError: it cannot be read, has other layers, a larger rank, or another schedule; one line, and
            nothing has been changed.
    """
    adapter = lorad if isinstance(lorad, LoRaD) else LoRaD.load(lorad)
    network, loaded = network_of(pipe), _loaded(pipe)
    if adapter_name not in loaded:
        raise ValueError(f"no LoRaD named {adapter_name!r} is loaded; there is {', '.join(loaded) or 'none'}")
    if adapter.one_step != loaded[adapter_name].one_step:
        raise ValueError("the new LoRaD has another one-step schedule: unload the old one and load it")
    match = adapter.matched(network)
    match.check()
    pairs = {path: adapter.factors[key] for key, path in match.paths.items()}
    layers = {path: layer for path, layer in rotated_layers(network) if adapter_name in layer.strengths}
    if set(pairs) != set(layers):
        raise ValueError("the new LoRaD has other layers than the one in its place: unload the old one and load it")
    for path, layer in layers.items():
        if pairs[path][1].shape[0] > layer.lorad_b[adapter_name].shape[0]:
            raise ValueError(f"{path}: the new LoRaD has a larger rank than the one in its place: load the larger one first")
    for path, layer in layers.items():
        a, b = pairs[path]
        layer.lorad_a[adapter_name].zero_()[:, : a.shape[1]] = a.to(layer.lorad_a[adapter_name])
        layer.lorad_b[adapter_name].zero_()[: b.shape[0]] = b.to(layer.lorad_b[adapter_name])
    loaded[adapter_name] = adapter

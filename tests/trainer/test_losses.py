"""What moves the student's pictures: each loss against its formula, derived anew, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from training import small_base, tiny, write_prompts

from trainer.distill.adversary import Head
from trainer.distill.distillation import Distillation
from trainer.distill.losses import F_WEIGHTS, LOSSES, Scores, f_weight
from trainer.distill.rates import FAKE_LR_RULES
from trainer.distill.roles import FAKE, STUDENT, TEACHER
from trainer.distill.vsd import Recipe, student_loss
from trainer.engine.optim import scheduled_lr

EXACT = {"precision": "fp64", "base_weights": "fp64"}
SHAPE = (3, 4, 8, 8)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def scores() -> Scores:
    alpha = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64).view(-1, 1, 1, 1)
    return Scores(drawn(*SHAPE), drawn(*SHAPE), alpha, (1 - alpha**2).sqrt(), drawn(*SHAPE), drawn(*SHAPE))


def distance_to(x0: Tensor, y_real: Tensor) -> Tensor:
    return torch.stack([(x - y).abs().mean() for x, y in zip(x0, y_real, strict=True)]).view(-1, 1, 1, 1)


@pytest.mark.parametrize("normalize", [False, True])
def test_gradients_of_differences(normalize: bool) -> None:
    said = scores()
    y_real, y_fake = ((said.x_t - said.sigma * eps) / said.alpha for eps in (said.eps_real, said.eps_fake))
    moved = y_fake - y_real
    weights = {"vsd": said.sigma * said.alpha, "dmd": torch.ones_like(said.alpha)}  # of a difference of clean pictures
    for name, own in weights.items():
        found = LOSSES[name](said, normalize, 1.0)
        weight = 1 / distance_to(said.x0, y_real) if normalize else own
        torch.testing.assert_close(found.x0, weight * moved, rtol=1e-12, atol=1e-12)
        assert found.y_real is None and found.y_fake is None


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("a", [1.0, 1.2])
def test_score_identity(normalize: bool, a: float) -> None:
    said = scores()
    x0, y_real, y_fake = (tensor.clone().requires_grad_() for tensor in (said.x0, said.y_real, said.y_fake))
    weight = 1 / distance_to(said.x0, said.y_real) if normalize else 1.0
    d = y_real - y_fake
    loss = (weight * (d * (y_fake - x0) + (1 - a) * d.square())).sum()
    wanted = torch.autograd.grad(loss, (x0, y_real, y_fake))
    found = LOSSES["sid"](said, normalize, a)
    for one, other in zip((found.x0, found.y_real, found.y_fake), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "f"),
    [
        ("reverse_kl", lambda r: -r.log()),
        ("forward_kl", lambda r: r * r.log()),
        ("jensen_shannon", lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log()),
        ("hellinger", lambda r: (1 - r.sqrt()).square()),
    ],
)
def test_weights_of_f_divergences(name: str, f: Callable[[Tensor], Tensor]) -> None:
    def h(r: Tensor) -> Tensor:
        r = r.clone().requires_grad_()
        (first,) = torch.autograd.grad(f(r).sum(), r, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), r)
        return second * r.detach() ** 2

    logits = torch.linspace(-4, 4, 9, dtype=torch.float64)
    wanted = h(logits.exp()) / h(torch.ones(1, dtype=torch.float64))
    torch.testing.assert_close(f_weight(name, logits).flatten(), wanted, rtol=1e-10, atol=0)
    assert f_weight(name, torch.tensor([1e9])).isfinite().all() and name in F_WEIGHTS


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Distillation]:
    folder = tmp_path_factory.mktemp("runs")
    base, prompts = small_base(folder / "base"), write_prompts(folder / "prompts.txt")

    def build(**changes: object) -> Distillation:
        run = Distillation(tiny(base, prompts, folder, **{"ema": 0.0, **EXACT, **changes}))
        with torch.no_grad():
            for role in (STUDENT, FAKE):
                for parameter in run.roles.parameters(role):
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(role))))
        return run

    return build


@pytest.mark.parametrize(
    ("loss", "changes"), [("vsd", {}), ("dmd", {}), ("sid", {}), ("sid", {"gradient_checkpointing": True})], ids=str
)
def test_what_reaches_the_pictures(make: Callable[..., Distillation], loss: str, changes: dict) -> None:
    run, plain = make(**changes), make()
    text, t, eps = run.encode(["a cat", "a dog"]), torch.tensor([300, 700]), drawn(2, 4, 8, 8)
    x0 = drawn(2, 4, 8, 8).requires_grad_()
    found, log = student_loss(run.roles, run.noising, x0, text, run.null, t, eps, Recipe(1.5, 2.0, True, loss, 1.2))
    found.backward()
    assert all(parameter.grad is None for role in (STUDENT, FAKE) for parameter in run.roles.parameters(role))
    assert all(parameter.requires_grad for parameter in run.roles.parameters(FAKE))

    squared = run.noising.alphas_cumprod[t].view(-1, 1, 1, 1)
    alpha, sigma = squared.sqrt(), (1 - squared).sqrt()
    x = x0.detach().clone().requires_grad_()

    def clean(role: str, scale: float) -> Tensor:
        x_t = alpha * x + sigma * eps
        return (x_t - sigma * plain.roles.guided(role, x_t, t, text, plain.null, scale)) / alpha

    y_real, y_fake = clean(TEACHER, 1.5), clean(FAKE, 2.0)
    weight, d = 1 / distance_to(x, y_real).detach(), y_real - y_fake
    sid = (weight * (d * (y_fake - x) + (1 - 1.2) * d.square())).sum()
    wanted = torch.autograd.grad(sid, x)[0] if loss == "sid" else {"vsd": -weight * d, "dmd": -weight * d}[loss]
    torch.testing.assert_close(x0.grad * x0.numel(), wanted.detach(), rtol=1e-7, atol=1e-9)
    assert log["nonfinite"].item() == 0


def test_an_adversary_is_what_it_says(make: Callable[..., Distillation]) -> None:
    run = make(adversary="features", steps=1, adversary_steps=1)
    adversary, roles, t = run.adversary, run.roles, torch.tensor([300, 700])
    text, x0, other, eps = run.encode(["a cat", "a dog"]), drawn(2, 4, 8, 8), drawn(2, 4, 8, 8), drawn(2, 4, 8, 8)
    logits, grad = adversary.judge(run.noising, x0, text, t, eps)
    assert not logits.any() and not grad.any()  # it has learned nothing yet, and says so
    with torch.no_grad():
        for parameter in adversary.head.parameters():
            parameter.normal_(std=0.3)

    def logit(x: Tensor) -> Tensor:
        seen = []
        hook = run.model.network.mid_block.register_forward_hook(lambda *given: seen.append(given[2]))
        roles.predict(TEACHER, run.noising.add_noise(x, eps, t), t, text)
        hook.remove()
        tokens = seen[0].flatten(2).transpose(1, 2)
        norm, first, _, last = adversary.head.layers
        mean, deviation = tokens.mean(2, keepdim=True), tokens.var(2, unbiased=False, keepdim=True).add(1e-5).sqrt()
        hidden = ((tokens - mean) / deviation * norm.weight + norm.bias) @ first.weight.T + first.bias
        return ((hidden * torch.sigmoid(hidden)) @ last.weight.T + last.bias).mean(dim=(1, 2))

    x = x0.clone().requires_grad_()
    (wanted,) = torch.autograd.grad((1 + (-logit(x)).exp()).log().mean(), x)
    logits, grad = adversary.judge(run.noising, x0, text, t, eps)
    torch.testing.assert_close(grad / x0.numel(), wanted, rtol=1e-6, atol=1e-12)
    loss, right = adversary.loss(run.noising, (x0, text), (other, text), t, eps)
    with torch.no_grad():
        made, others = logit(x0), logit(other)
    torch.testing.assert_close(logits, made)
    expected = (1 + made.exp()).log().mean() + (1 + (-others).exp()).log().mean()
    torch.testing.assert_close(loss.detach(), expected)
    assert right.item() == sum((*(made < 0), *(others > 0))) / 4


def test_the_head_reads_both_kinds_of_features() -> None:
    head, picture = Head(8).double(), drawn(2, 8, 4, 4)
    with torch.no_grad():
        head.layers[-1].weight.normal_()
    torch.testing.assert_close(head(picture), head(picture.flatten(2).transpose(1, 2)))


def test_rates_of_several_updates_and_shapes_of_the_way_down() -> None:
    assert [FAKE_LR_RULES[name](9) for name in ("same", "sqrt", "split")] == [1, 3, 9]

    def rates(shape: str, end: float) -> list[float]:
        return [scheduled_lr(2.0, step, 10, 0, 4, shape=shape, end=end) for step in (0, 6, 8, 10)]

    assert rates("constant", 0.0) == [2, 2, 2, 2]
    assert rates("linear", 0.0) == [2, 2, 1, 0] and rates("linear", 0.1)[-1] == pytest.approx(0.2)
    assert rates("cosine", 0.0) == pytest.approx([2, 2, 1, 0]) and rates("cosine", 0.5) == pytest.approx([2, 2, 1.5, 1])
    middle = scheduled_lr(1.0, 7, 10, 0, 4, shape="cosine", end=0.0)
    assert middle == pytest.approx((1 + math.cos(math.pi / 4)) / 2)

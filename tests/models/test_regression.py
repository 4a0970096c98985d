from __future__ import annotations

import pytest
import torch

from expertmix.models.regression import METHODS, Problem, ridge


def planted(experts: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of tokens scattered around one center per expert."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(experts, 16, generator=generator)
    labels = torch.arange(experts).repeat_interleave(6)[:, None].expand(-1, 20)
    noise = torch.randn(labels.numel(), 16, generator=generator)
    return centers[labels.reshape(-1)] + 0.2 * noise, labels


@pytest.mark.parametrize("method", sorted(METHODS))
def test_planted_experts_are_found(method: str) -> None:
    """On separable data every token's highest logit is that of the expert planted there."""
    x_TH, labels = planted()
    weight = METHODS[method](Problem.of(x_TH, labels, 4))
    assert torch.equal((x_TH @ weight.T).argmax(-1), labels.reshape(-1))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_padding_and_experts_without_texts_have_no_say(method: str) -> None:
    """Padded tokens change nothing; the router row of an expert without texts is zero."""
    x_TH, labels = planted()
    plain = METHODS[method](Problem.of(x_TH, labels, 5))
    padded_x = torch.cat([x_TH, 100 * torch.ones(20, 16)])
    padded_labels = torch.cat([labels, torch.full((1, 20), -1)])
    torch.testing.assert_close(METHODS[method](Problem.of(padded_x, padded_labels, 5)), plain)
    assert torch.equal(plain[4], torch.zeros(16))


def test_ridge_solves_its_equation() -> None:
    """Without penalty, ridge regression is least squares."""
    x_TH, labels = planted()
    sample = Problem.of(x_TH, labels, 4).everything
    y_TC = torch.nn.functional.one_hot(labels.reshape(-1)).float() - 0.25
    expected = torch.linalg.lstsq(x_TH, y_TC).solution.T
    torch.testing.assert_close(ridge(*sample.moments(), 1e-9), expected, atol=1e-4, rtol=1e-3)


def test_experts_count_the_same_whatever_their_number_of_tokens() -> None:
    """Repeating all tokens of one expert changes no weight."""
    x_TH, labels = planted()
    again_x, again_labels = torch.cat([x_TH, x_TH[:120]]), torch.cat([labels, labels[:6]])
    plain = Problem.of(x_TH, labels, 4).everything.moments()
    again = Problem.of(again_x, again_labels, 4).everything.moments()
    torch.testing.assert_close(again, plain, atol=1e-5, rtol=1e-5)

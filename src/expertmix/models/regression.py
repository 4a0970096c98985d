"""Linear classification in closed form, or nearly: ridge and softmax regression.

Pure arithmetic on tensors; knows no model and no text. No randomness.

Shape legend: N rows of text, S length, T tokens, E experts, C experts that have tokens, H width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_HELD_OUT = 0.25  # the last quarter of each expert's tokens chooses penalty and temperature
_RIDGE_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
_TEMPERATURES = (1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0)
_LOGISTIC_PENALTIES = (3e-3, 1e-3, 3e-4, 1e-4)


@dataclass(frozen=True)
class Sample:
    """Tokens, the expert of each, and weights that make every expert count the same."""

    x: Tensor
    label: Tensor
    weight: Tensor
    classes: Tensor
    experts: int

    def part(self, mask_T: Tensor) -> Sample:
        """The tokens of a mask."""
        x, label, weight = self.x[mask_T], self.label[mask_T], self.weight[mask_T]
        return Sample(x, label, weight, self.classes, self.experts)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Weighted XᵀX [H, H] and XᵀY [H, C] in float64, Y one-hot and centered."""
        root_T1 = self.weight.sqrt()[:, None]
        y_TC = functional.one_hot(self.label, self.experts).float()[:, self.classes]
        rooted_TH = self.x * root_T1
        cross_HC = rooted_TH.T @ ((y_TC - 1.0 / len(self.classes)) * root_T1)
        return (rooted_TH.T @ rooted_TH).double(), cross_HC.double()

    def loss(self, logits_TE: Tensor) -> Tensor:
        """Weighted cross-entropy of the right expert."""
        place_T = torch.searchsorted(self.classes, self.label)
        losses_T = functional.cross_entropy(logits_TE[:, self.classes], place_T, reduction="none")
        loss: Tensor = (losses_T * self.weight).sum() / self.weight.sum()
        return loss


@dataclass(frozen=True)
class Problem:
    """All tokens, and the same split in two: to fit, and to choose penalty and temperature."""

    everything: Sample
    fit: Sample
    choose: Sample

    @classmethod
    def of(cls, x_TH: Tensor, labels_NS: Tensor, experts: int) -> Problem:
        """Builds the problem from all tokens.

        Args:
            x_TH: inputs, float32 [N * S, H].
            labels_NS: expert of each token, -1 for padding.
            experts: E; experts without tokens get no say.
        """
        label_T = labels_NS.reshape(-1)
        x_TH, label_T = x_TH[label_T >= 0], label_T[label_T >= 0]
        classes_C = torch.unique(label_T)
        count_T = torch.bincount(label_T, minlength=experts)[label_T]
        weight_T = 1.0 / (count_T * len(classes_C))
        so_far_TE = functional.one_hot(label_T, experts).cumsum(0)
        rank_T = so_far_TE.gather(1, label_T[:, None])[:, 0]
        held_out_T = rank_T > count_T * (1 - _HELD_OUT)
        everything = Sample(x_TH, label_T, weight_T, classes_C, experts)
        return cls(everything, everything.part(~held_out_T), everything.part(held_out_T))


def ridge(gram_HH: Tensor, cross_HC: Tensor, penalty: float) -> Tensor:
    """Solves (G + penalty · mean(diag G) · I) W = R: float64 [H, H], [H, C] -> float32 [C, H]."""
    ridged_HH = gram_HH + torch.eye(len(gram_HH)) * (penalty * gram_HH.diagonal().mean())
    solution_HC: Tensor = torch.linalg.solve(ridged_HH, cross_HC)
    return solution_HC.T.float().contiguous()


def fit_ridge(problem: Problem) -> Tensor:
    """Ridge regression on centered one-hot experts, times one temperature: weight [E, H].

    Penalty and temperature are those with the lowest cross-entropy on the held-out tokens; rows
    of experts without tokens are zero.
    """
    trials = []
    moments = problem.fit.moments()
    for penalty in _RIDGE_PENALTIES:
        logits_TE = problem.choose.x @ _rows_for(problem, ridge(*moments, penalty)).T
        for temperature in _TEMPERATURES:
            loss = problem.choose.loss(temperature * logits_TE).item()
            trials.append((loss, penalty, temperature))
    _, penalty, temperature = min(trials)
    return temperature * _rows_for(problem, ridge(*problem.everything.moments(), penalty))


def fit_logistic(problem: Problem) -> Tensor:
    """Softmax regression started at the ridge solution: weight [E, H].

    The penalty is the one with the lowest cross-entropy on the held-out tokens.
    """
    root_HH = _root(problem.everything)
    weight_EH = fit_ridge(problem)
    trials = []
    for penalty in _LOGISTIC_PENALTIES:
        weight_EH = _minimize(problem.fit, weight_EH, root_HH, penalty)
        loss = problem.choose.loss(problem.choose.x @ weight_EH.T).item()
        trials.append((loss, penalty, weight_EH))
    _, penalty, weight_EH = min(trials, key=lambda trial: trial[0])
    return _minimize(problem.everything, weight_EH, root_HH, penalty)


def _rows_for(problem: Problem, weight_CH: Tensor) -> Tensor:
    sample = problem.everything
    weight_EH = weight_CH.new_zeros(sample.experts, weight_CH.shape[1])
    weight_EH[sample.classes] = weight_CH
    return weight_EH


def _root(sample: Sample) -> Tensor:
    """Cholesky factor [H, H] of the lightly ridged Gram matrix."""
    gram_HH, _ = sample.moments()
    gram_HH.diagonal().add_(1e-2 * gram_HH.diagonal().mean())
    root_HH: Tensor = torch.linalg.cholesky(gram_HH)
    return root_HH.float()


@torch.enable_grad()
def _minimize(sample: Sample, start_EH: Tensor, root_HH: Tensor, penalty: float) -> Tensor:
    """Penalized softmax regression, in coordinates where the inputs are white.

    The optimum is that of the plain problem; whitening only makes L-BFGS reach it in a few steps.
    """
    solve = torch.linalg.solve_triangular
    white_TH = solve(root_HH, sample.x.T, upper=False).T.contiguous()
    white_EH = (start_EH @ root_HH).requires_grad_()
    strength = penalty / 2 * root_HH.pow(2).sum() / len(root_HH)
    optimizer = torch.optim.LBFGS([white_EH], max_iter=12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        weight_EH: Tensor = solve(root_HH, white_EH, upper=False, left=False)
        loss = sample.loss(white_TH @ white_EH.T) + strength * weight_EH.pow(2).sum()
        torch.autograd.backward(loss)
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    weight_EH: Tensor = solve(root_HH, white_EH.detach(), upper=False, left=False)
    return weight_EH


METHODS: dict[str, Callable[[Problem], Tensor]] = {"ridge": fit_ridge, "logistic": fit_logistic}

"""Logistic regression with a penalty on the weights, to its optimum."""

import torch
from torch import Tensor, nn


def fit_logistic_regression(features: Tensor, labels: Tensor, l2_penalty: float) -> tuple[Tensor, float]:
    """Weight [d] and bias of log-odds for features x [n, d] and truths y [n] in 0..1.

    l2_penalty   on the squared length of the weight, as a share of the mean loss in nats; the bias is free
    """
    weight, bias = torch.zeros(features.shape[1], requires_grad=True), torch.zeros((), requires_grad=True)
    steps = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        steps.zero_grad()
        value = (
            nn.functional.binary_cross_entropy_with_logits(features @ weight + bias, labels)
            + l2_penalty * weight.square().sum()
        )
        value.backward()
        return value

    steps.step(loss)
    return weight.detach(), float(bias.detach())

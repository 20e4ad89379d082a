"""tokens.py: log-probability and entropy, with temperature and forbidden tokens.

Kills, among others: logits times temperature; entropy of untempered logits; the sign of the
entropy; softmax in bfloat16; 0 * inf at a forbidden token, forwards or backwards.
"""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical

from flowrl.functional.tokens import token_entropy, token_log_prob


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_golden_two_tokens() -> None:
    # Odds 3 to 1: log .75, log .25. At temperature 2 the odds are sqrt(3) to 1.
    logits, tokens = (
        torch.tensor([[math.log(3), 0.0]] * 2, dtype=torch.float64),
        torch.tensor([0, 1]),
    )
    log_prob = token_log_prob(logits, tokens)
    assert log_prob.tolist() == pytest.approx([math.log(0.75), math.log(0.25)])
    p = math.sqrt(3) / (1 + math.sqrt(3))
    tempered = token_log_prob(logits, tokens, temperature=2.0)
    assert tempered.tolist() == pytest.approx([math.log(p), math.log(1 - p)])
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert token_entropy(logits)[0].item() == pytest.approx(entropy)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_they_are_those_of_the_tempered_categorical(temperature: float) -> None:
    logits, tokens = random(2, 3, 5), torch.tensor([[0, 1, 2], [3, 4, 0]])
    reference = Categorical(logits=logits / temperature)
    log_prob = token_log_prob(logits, tokens, temperature=temperature)
    torch.testing.assert_close(log_prob, reference.log_prob(tokens))
    torch.testing.assert_close(token_entropy(logits, temperature=temperature), reference.entropy())


def test_entropy_runs_from_zero_when_certain_to_log_v_when_uniform() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1e4, 0.0, 0.0, 0.0]], dtype=torch.float64)
    assert token_entropy(logits).tolist() == pytest.approx([math.log(4), 0.0])


def test_gradient_of_the_log_prob_is_one_hot_minus_softmax() -> None:
    logits, tokens = random(3, 5).requires_grad_(), torch.tensor([0, 2, 4])
    (gradient,) = torch.autograd.grad(token_log_prob(logits, tokens, temperature=2.0).sum(), logits)
    expected = torch.nn.functional.one_hot(tokens, 5) - (logits / 2).softmax(-1)
    torch.testing.assert_close(gradient, expected.detach() / 2)
    assert torch.autograd.gradcheck(lambda x: token_entropy(x, temperature=2.0), logits)


def test_forbidden_tokens_are_as_if_absent_also_backwards() -> None:
    logits = random(2, 4)
    forbidden = torch.cat([logits, torch.full((2, 1), -torch.inf)], dim=-1).requires_grad_()
    value = token_entropy(forbidden) + token_log_prob(forbidden, torch.tensor([0, 3]))
    torch.testing.assert_close(
        value, token_entropy(logits) + token_log_prob(logits, torch.tensor([0, 3]))
    )
    (gradient,) = torch.autograd.grad(value.sum(), forbidden)
    assert gradient.isfinite().all()
    assert (gradient[:, -1] == 0).all()


def test_bfloat16_is_computed_in_float32() -> None:
    logits, tokens = random(2, 5).bfloat16(), torch.tensor([1, 4])
    for temperature in (1.0, 0.7):
        log_prob = token_log_prob(logits, tokens, temperature=temperature)
        assert torch.equal(
            log_prob, token_log_prob(logits.float(), tokens, temperature=temperature)
        )
        entropy = token_entropy(logits, temperature=temperature)
        assert torch.equal(entropy, token_entropy(logits.float(), temperature=temperature))


def test_bad_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tokens must be int64 \[2, 3\].*drop the last logit"):
        token_log_prob(random(2, 3, 5), torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="tokens must be int64"):
        token_log_prob(random(2, 5), torch.zeros(2))
    for temperature in (0.0, -1.0):
        with pytest.raises(ValueError, match="temperature must be positive"):
            token_log_prob(random(2, 5), torch.tensor([0, 1]), temperature=temperature)
        with pytest.raises(ValueError, match="temperature must be positive"):
            token_entropy(random(2, 5), temperature=temperature)

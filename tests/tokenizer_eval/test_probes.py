"""The probes find what is there, and no more; the same tokens give the same number.

Kills, among others: a causal mask that shows the token itself (bits below the entropy); groups
that are taken for independent (bits above it); a penalty chosen on the held-out rows.
"""

import pytest
import torch

from flowrl.tokenizer.evaluation.ar_probe import ArProbe, ArSettings, ar_bits
from flowrl.tokenizer.evaluation.probes import linear_probe, token_features
from flowrl.tokenizer.evaluation.speed import count_calls, peak_bytes

SMALL = ArSettings(
    steps=250, batch_size=64, lr=5e-3, dim=32, depth=1, num_heads=2, validation=0.1, checks=5
)
MOVES = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1], [0.25] * 4, [0.05, 0.05, 0.05,
                      0.85]])  # fmt: skip


def chain(num, length, seed):
    """Ids of a Markov chain that starts uniformly."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, (num, 1), generator=generator)
    for _ in range(length - 1):
        following = torch.multinomial(MOVES[ids[:, -1]], 1, generator=generator)
        ids = torch.cat([ids, following], dim=1)
    return ids


def test_the_ar_probe_reaches_the_entropy_of_a_markov_chain():
    """Against the source's own log-likelihood of the same held-out ids, so no sampling noise."""
    train, held_out = chain(2000, 8, 0), chain(400, 8, 1)
    true = 2 - MOVES[held_out[:, :-1], held_out[:, 1:]].log2().sum(1)
    found = ar_bits(train, held_out, torch.full((8,), 4), settings=SMALL)
    excess = float((found.bits.sum(1) - true).mean()) / float(true.mean())
    assert 0 < excess < 0.04
    assert found.bits[:, 0].mean() == pytest.approx(2, abs=0.03)  # the start is uniform
    assert found.bits.shape == held_out.shape


def test_groups_of_a_token_are_not_taken_for_independent():
    """The second group repeats the first, plus one: 2 bits a token, 4 if taken independently."""
    first = torch.randint(4, (1200, 3), generator=torch.Generator().manual_seed(0))
    ids = torch.stack([first, (first + 1) % 4], dim=2)
    found = ar_bits(ids[:1000], ids[1000:], torch.full((3,), 4), settings=SMALL)
    assert found.bits.sum(1).mean() == pytest.approx(6, rel=0.05)


def test_the_ar_probe_does_not_see_what_it_predicts():
    torch.manual_seed(0)
    probe = ArProbe(torch.full((5,), 6), 3, SMALL).eval()
    ids = torch.randint(6, (2, 5, 3))
    with torch.no_grad():
        before = probe(ids)
        changed = ids.clone()
        changed[:, 3, 1] = (ids[:, 3, 1] + 1) % 6
        after = probe(changed)
    assert torch.equal(before[:, :3], after[:, :3])
    assert (before[:, 3:] != after[:, 3:]).all()


def test_the_ar_probes_probabilities_add_up_to_one_over_a_token():
    """All 2 * 3 pairs of a token with 2 groups, the first position having 3 codes, not 4."""
    torch.manual_seed(0)
    probe = ArProbe(torch.tensor([3, 4]), 2, SMALL).eval()
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    ids = torch.zeros(9, 2, 2, dtype=torch.int64)
    ids[:, 0] = pairs
    with torch.no_grad():
        total = (-probe(ids)[:, 0].double()).exp().sum()
    assert float(total) == pytest.approx(1, abs=1e-5)


def test_masked_tokens_cost_nothing_and_teach_nothing():
    settings = ArSettings(steps=30, batch_size=16, dim=16, depth=1, num_heads=2, checks=2)
    ids = torch.randint(4, (60, 4), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(4) < torch.tensor([2, 4]).repeat(30)[:, None]
    other = torch.where(mask, ids, (ids + 1) % 4)

    def bits(train):
        return ar_bits(train[:40], ids[40:], torch.full((4,), 4), masks=(mask[:40], mask[40:]),
                       settings=settings).bits  # fmt: skip

    found = bits(ids)
    assert (found[~mask[40:]] == 0).all() and (found[mask[40:]] > 0).all()
    assert torch.allclose(found, bits(other), atol=1e-5)


def test_the_ar_probe_is_deterministic_and_leaves_the_global_generator_alone():
    settings = ArSettings(steps=5, batch_size=8, dim=16, depth=1, num_heads=2, checks=1)
    ids = chain(40, 4, 0)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = ar_bits(ids[:30], ids[30:], torch.full((4,), 4), settings=settings)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = ar_bits(ids[:30], ids[30:], torch.full((4,), 4), settings=settings)
    assert torch.equal(first.bits, second.bits)
    other = ar_bits(ids[:30], ids[30:], torch.full((4,), 4), settings=settings, seed=1)
    assert not torch.equal(first.bits, other.bits)


def test_the_linear_probe_reads_a_linear_label_and_not_a_random_one():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(500, 20, generator=generator)
    labels = (rows @ torch.randn(20, generator=generator) > 0).long()
    noise = torch.randint(3, (500,), generator=generator)
    found = linear_probe(rows[:400], rows[400:], {"linear": labels[:400], "noise": noise[:400]})
    assert (found["linear"] == labels[400:]).float().mean() > 0.85
    assert (found["noise"] == noise[400:]).float().mean() < 0.5
    again = linear_probe(rows[:400], rows[400:], {"linear": labels[:400]})
    assert torch.equal(again["linear"], found["linear"])


def test_the_linear_probe_of_few_rows_is_ridge_regression():
    """Against scikit-free normal equations at the penalty that brute-force leave-one-out picks."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(2, (12,), generator=generator)
    scaled, other = ((each - x.mean(0)) / x.std(0) for each in (x, y))
    targets = torch.nn.functional.one_hot(labels).double()
    centred = targets - targets.mean(0)

    def fit(rows, wanted, penalty):
        return torch.linalg.solve(rows.T @ rows + 12 * 4 * penalty * torch.eye(4).double(),
                                  rows.T @ wanted)  # fmt: skip

    def left_out(penalty):
        keep = [torch.arange(12) != i for i in range(12)]
        errors = [scaled[i] @ fit(scaled[k], centred[k], penalty) - centred[i]
                  for i, k in enumerate(keep)]  # fmt: skip
        return float(torch.stack(errors).square().mean())

    best = min((10.0**e for e in range(-5, 3)), key=left_out)
    expected = (other @ fit(scaled, centred, best) + targets.mean(0)).argmax(1)
    assert torch.equal(linear_probe(x, y, {"label": labels})["label"], expected)


def test_tokens_that_never_change_tell_the_commonest_class():
    rows = torch.ones(6, 3)
    labels = torch.tensor([2, 0, 2, 1, 2, 0])
    assert linear_probe(rows, rows[:2], {"label": labels})["label"].tolist() == [2, 2]


def test_token_features_hide_what_the_mask_hides():
    embeddings = torch.arange(12.0).view(1, 4, 3) + 1
    mask = torch.tensor([[True, False, True, True]])
    assert token_features(embeddings, mask, 3).tolist() == [[1, 2, 3, 0, 0, 0, 7, 8, 9]]


def test_peak_memory_is_what_is_held_at_a_time():
    """Two of three tensors of 4 MB live at once: the first is freed before the third is made."""

    def call():
        first = torch.ones(1000, 1000)
        second = first + 1
        del first
        return second * 2

    call()
    assert peak_bytes(call, torch.device("cpu")) == pytest.approx(8e6, rel=1e-3)


def test_calls_are_those_of_the_part_that_is_called_most():
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})

    def call():
        x = module["a"](torch.ones(1, 2))
        for _ in range(7):
            x = module["b"](x)

    assert count_calls(call, module) == 7
    assert not module["b"]._forward_hooks

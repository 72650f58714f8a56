"""The claims of eapo.py, one test each: pytest test_eapo.py, or python test_eapo.py.

Expected values are worked out by hand in the docstring, or come from something independent of the
code under test: autograd, a naive loop, transformers' own generate. No download, no GPU.
"""
import ast
import concurrent.futures
import contextlib
import html.parser
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest
import safetensors.torch
import torch
import transformers

import eapo
from eapo import (Batch, Policy, Problem, entropy_aware_advantages, entropy_score, group_advantages,
                  policy_loss, quadrants, token_entropy, token_weights)

ALPHA, PHI = 0.2, 2.0
CLIPS = 0.2, 0.28, 3.0
torch.set_num_threads(1)


def tiny_lm(seed=0, vocab=32, tied=True):
    """A random Qwen2 whose logits are far from uniform, so that errors show."""
    torch.manual_seed(seed)
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
        initializer_range=0.3, bos_token_id=None, eos_token_id=1,
        pad_token_id=1)).eval()                                          # pad == eos, as so often


def tiny_batch(n=4, vocab=32, seed=0):
    """n rows of uneven prompts and responses; the last token of each response is the stop token."""
    torch.manual_seed(seed)
    prompts = [torch.randint(2, vocab, (2 + i % 3,)).tolist() for i in range(n)]
    responses = [torch.randint(2, vocab, (1 + 2 * i % 7,)).tolist() + [1] for i in range(n)]
    return eapo.pack(prompts, responses)


def random_group_batch(B=3, G=4, T=6, seed=0):
    """rewards, H, mask of B groups in which right and wrong responses and lengths are mixed."""
    torch.manual_seed(seed)
    rewards = torch.tensor([1., -1, -1, 1] * B)
    H = torch.rand(B * G, T) ** 3 * 4
    mask = torch.arange(T) < torch.randint(1, T + 1, (B * G, 1))
    return rewards, H, mask


def a_run(lm=None, *args):
    """A Run of one process on the CPU, around a model that was made here."""
    cfg = eapo.parse_args([*map(str, args)])
    return eapo.Run(cfg, eapo.World(cfg), None, Policy(lm or tiny_lm()), None, [1], lm)


def config(tmp_path, *args):
    return eapo.parse_args([*map(str, args), "--out", str(tmp_path / "run")])


def rows_of(path):
    return [json.loads(line) for line in open(path / "run" / "metrics.jsonl")]


# ---- advantages ----------------------------------------------------------------------------------

def test_one_right_response_in_four_earns_what_the_three_wrong_ones_lose():
    """r = 1, -1, -1, -1: mean -1/2; deviations 3/2, -1/2 three times; sum of squares 3, over n - 1
    is 1, so std 1 and A = 3/2, -1/2, -1/2, -1/2. With n instead of n - 1 it would be sqrt(3)."""
    A = group_advantages(torch.tensor([1., -1, -1, -1]), group_size=4)
    torch.testing.assert_close(A, torch.tensor([1.5, -.5, -.5, -.5]), atol=1e-5, rtol=0)


def test_what_stands_outside_the_mask_is_never_looked_at():
    """A group without any response token, as some trainers mask those cut off; NaN as padding."""
    A, mask = torch.tensor([1., -1., 1., -1.]), torch.tensor([[1, 0]] * 2 + [[0, 0]] * 2).bool()
    H = torch.tensor([[.1, math.nan], [.3, math.nan], [.1, .2], [.1, .2]])
    credit = entropy_aware_advantages(A, H, mask, 2, ALPHA, PHI)
    assert credit[:2, 0].isfinite().all() and credit[0, 0] > 0 > credit[1, 0]
    assert credit[:, 1].eq(0).all() and credit[2:].eq(0).all()


def test_a_group_is_compared_with_itself_only():
    """Two groups, the second easier: mixing them would change both."""
    one, two = torch.tensor([1., -1]), torch.tensor([1., 1, 1, -1]).view(2, 2).flatten()
    A = group_advantages(torch.cat([one, two]), group_size=2)
    torch.testing.assert_close(A, torch.tensor([.70711, -.70711, 0, 0, .70711, -.70711]), atol=1e-4,
                               rtol=0)


def test_a_group_that_agrees_teaches_nothing():
    for r in (1.0, -1.0):
        A = group_advantages(torch.full((8,), r), group_size=8)
        H, mask = torch.rand(8, 5), torch.ones(8, 5, dtype=torch.bool)
        assert A.tolist() == [0.0] * 8
        assert not entropy_aware_advantages(A, H, mask, 8, ALPHA, PHI).any()


# ---- entropy, quadrants, EAPO --------------------------------------------------------------------

def test_token_entropy_is_log_v_without_an_idea_and_zero_when_sure():
    assert token_entropy(torch.zeros(3, 50)).tolist() == pytest.approx([math.log(50)] * 3)
    sure = torch.tensor([[0., 1000, 0], [float("-inf"), 0, float("-inf")]], requires_grad=True)
    H = token_entropy(sure)
    H.sum().backward()
    assert H.tolist() == [0, 0] and not sure.grad.isnan().any()


def test_token_entropy_of_half_a_quarter_and_a_quarter():
    """H = 1/2 log 2 + 2 * 1/4 log 4 = 3/2 log 2."""
    H = token_entropy(torch.tensor([.5, .25, .25]).log())
    assert float(H) == pytest.approx(1.5 * math.log(2))


def test_entropy_score_by_hand():
    """One group of two responses, entropies 0 1 2 and 3 (the second ends after one token):
    mu = 1.5, squares 2.25 .25 .25 2.25 = 5, over 3, sigma = 1.29099; (0 - mu)/sigma = -1.1619,
    (1 - mu)/sigma = -.3873. |A| = 2 and phi = 2: the clip is at 1, so -1, -.3873, .3873, 1."""
    H = torch.tensor([[0., 1, 2], [3, 99, 99]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    A = torch.tensor([2., -2.])
    score = entropy_score(A, H, mask, group_size=2, phi=2)
    torch.testing.assert_close(score[mask], torch.tensor([-1, -.3873, .3873, 1]), atol=1e-4, rtol=0)
    shaped = entropy_aware_advantages(A, H, mask, 2, alpha=.5, phi=2)
    torch.testing.assert_close(shaped, torch.tensor([[1.5, 1.80635, 2.19365], [-2.5, 0, 0]]),
                               atol=1e-4, rtol=0)


def test_eapo_is_what_a_loop_over_the_papers_formulas_gives():
    """Eq. 6 and 7, token by token, in plain Python."""
    rewards, H, mask = random_group_batch()
    A = group_advantages(rewards, 4)
    shaped = entropy_aware_advantages(A, H, mask, 4, ALPHA, PHI)
    for g in range(3):
        rows = range(4 * g, 4 * g + 4)
        values = [float(H[i, t]) for i in rows for t in range(6) if mask[i, t]]
        mu = sum(values) / len(values)
        sigma = math.sqrt(sum((h - mu) ** 2 for h in values) / (len(values) - 1)) + 1e-6
        for i, t in itertools.product(rows, range(6)):
            a = float(A[i])
            score = max(-abs(a) / PHI, min(abs(a) / PHI, (float(H[i, t]) - mu) / sigma))
            expected = a + ALPHA * math.copysign(1, a) * score if mask[i, t] else 0
            assert float(shaped[i, t]) == pytest.approx(expected, abs=1e-5)


def test_entropy_makes_an_advantage_louder_or_softer_but_never_flips_it():
    """|score| <= |A|/phi, so A^CA / A is in [1 - alpha/phi, 1 + alpha/phi] = [.9, 1.1]. Entropies
    over ten decades put tokens on both stops: equality at both ends, or the clip is wrong."""
    torch.manual_seed(0)
    A, H = torch.randn(64), 10 ** torch.empty(64, 32).uniform_(-5, 5)
    mask = torch.ones_like(H, dtype=torch.bool)
    for scale in (1.0, 0.01):       # the bound scales with |A|
        ratio = entropy_aware_advantages(A * scale, H, mask, 8, ALPHA, PHI) / (A * scale)[:, None]
        torch.testing.assert_close(ratio.min(), torch.tensor(1 - ALPHA / PHI))
        torch.testing.assert_close(ratio.max(), torch.tensor(1 + ALPHA / PHI))


def test_uncertain_tokens_get_more_of_the_credit_and_more_of_the_blame():
    """H = 0 and 4 in both a right and a wrong response: |A^CA| grows with H in both."""
    H, mask = torch.tensor([[0., 4.], [0., 4.]]), torch.ones(2, 2, dtype=torch.bool)
    good, bad = entropy_aware_advantages(torch.tensor([1., -1.]), H, mask, 2, ALPHA, PHI)
    assert 0 < good[0] < 1 < good[1] and bad[1] < -1 < bad[0] < 0


def test_the_entropy_score_is_a_weight_and_not_an_objective():
    """If the score carried a gradient, the policy could raise its return by being unsure."""
    logits = torch.randn(2, 5, 7, requires_grad=True)
    H, mask = token_entropy(logits), torch.ones(2, 5, dtype=torch.bool)
    A = torch.tensor([1., -1])
    assert not entropy_aware_advantages(A, H, mask, 2, ALPHA, PHI).requires_grad


def test_alpha_zero_is_grpo():
    rewards, H, mask = random_group_batch()
    A = group_advantages(rewards, 4)
    assert entropy_aware_advantages(A, H, mask, 4, 0.0, PHI).equal(A[:, None] * mask)


def test_two_tokens_are_enough_for_a_deviation():
    """H = 0 and 1, one token a response: deviation sqrt(((1/2)^2 + (1/2)^2) / 1) = .7071."""
    H, mask = torch.tensor([[0.], [1.]]), torch.ones(2, 1, dtype=torch.bool)
    mu, sigma = eapo.entropy_mean_std(H, mask, 2)
    torch.testing.assert_close(mu, torch.full((2, 1), 0.5))
    torch.testing.assert_close(sigma, torch.full((2, 1), 0.5 ** 0.5 + 1e-6))


def test_padding_does_not_move_mu_or_sigma():
    """The same tokens in a wider tensor full of rubbish: the same advantages and quadrants."""
    rewards, H, mask = random_group_batch()
    A = group_advantages(rewards, 4)
    wide_H = torch.cat([torch.where(mask, H, 1e6), torch.full((12, 3), float("nan"))], 1)
    wide = torch.cat([mask, torch.zeros(12, 3, dtype=torch.bool)], 1)
    for f in (lambda H, m: entropy_aware_advantages(A, H.nan_to_num(), m, 4, ALPHA, PHI),
              lambda H, m: quadrants(rewards, H, m, 4)):
        torch.testing.assert_close(f(wide_H, wide)[:, :6], f(H, mask))


def test_the_four_quadrants_by_hand():
    """Group 1: mu = 2; a right response with H 1, 3 and a wrong one with 2, 2 (>= counts as high).
    Group 2 has its own mu = 20, so its 15 is low although it is the third highest of all."""
    H = torch.tensor([[1., 3], [2, 2], [15, 30], [15, 0]])
    mask = torch.tensor([[True, True], [True, True], [True, True], [True, False]])
    q = quadrants(torch.tensor([1., -1, 1, -1]), H, mask, group_size=2)
    assert q.tolist() == [[2, 1], [4, 4], [2, 1], [3, 0]]
    dear = quadrants(torch.tensor([.5, -.1, 0, -2]), H, mask, group_size=2)     # --overlong
    assert dear.tolist() == q.tolist()


def test_grpo_is_the_sum_of_its_four_quadrants_in_value_and_gradient():
    """L = L_PHR + L_PLR + L_NLR + L_NHR with the normaliser of the whole (B.1)."""
    rewards, H, mask = random_group_batch()
    A = group_advantages(rewards, 4)[:, None] * mask
    q, torch_logp = quadrants(rewards, H, mask, 4), torch.randn(12, 6).requires_grad_()
    old, weight = torch.zeros(12, 6), mask / mask.sum()
    whole = policy_loss(torch_logp, old, A, weight, *CLIPS)
    parts = [policy_loss(torch_logp, old, A * (q == k), weight, *CLIPS) for k in (1, 2, 3, 4)]
    grads = [torch.autograd.grad(x, torch_logp, retain_graph=True)[0] for x in (whole, *parts)]
    torch.testing.assert_close(whole, sum(parts))
    torch.testing.assert_close(grads[0], sum(grads[1:]))
    assert all(g.any() for g in grads)


# ---- the other credit rules ----------------------------------------------------------------------

def rule(method, A, H, mask):
    return eapo.credit_rule(method, torch.tensor(A), H, mask, 2, ALPHA, PHI)


def test_forking_keeps_the_tokens_from_tau_up_and_the_denominator():
    """H = 0 .. 9 over two responses, the second in two tokens of the mask; tau = 8: the A of 9 and
    8 stays, all other tokens have 0 and still count in the mean."""
    H = torch.tensor([[0., 7, 2, 3, 4, 5, 6, 1], [8, 9, 99, 99, 99, 99, 99, 99]])
    A = rule("forking", [1., -1], H, H < 99)
    assert A.tolist() == [[0] * 8, [-1, -1, 0, 0, 0, 0, 0, 0]]


def test_entroadv_adds_entropy_up_to_half_the_advantage():
    """a = .4, k = 2: at A = 1, H = .5 adds .2 and H = 5 is stopped at .5; at A = -1 the blame
    shrinks to -.8 and to -.5; at A = 0 nothing is added; outside the mask all is 0."""
    H, mask = torch.tensor([[.5, 5.]] * 4), torch.tensor([[True, True]] * 3 + [[True, False]])
    A = rule("entroadv", [1., -1, 0, 1], H, mask)
    torch.testing.assert_close(A, torch.tensor([[1.2, 1.5], [-.8, -.5], [0, 0], [1.2, 0]]))


def test_w_reinforce_takes_a_tenth_of_the_praise_and_all_the_blame():
    mask = torch.tensor([[True, True], [True, False]])
    A = rule("w-reinforce", [2., -1], torch.ones(2, 2), mask)
    torch.testing.assert_close(A, torch.tensor([[.2, .2], [-1, 0]]))


def test_no_rule_lets_a_gradient_through_the_entropy():
    H, mask = torch.rand(2, 3, requires_grad=True), torch.ones(2, 3, dtype=torch.bool)
    assert not any(rule(method, [1., -1], H, mask).requires_grad for method in eapo.METHODS)


def credited(method, *flags, rewards=(1., -1, -1, -1), logp=-torch.arange(20.).view(4, 5) / 10):
    """give_credit on four responses, with H and logp that are easy to rank: run, batch."""
    run = a_run(tiny_lm(), "--method", method, "--group-size", 4, *flags)
    batch = eapo.pack([[5]] * 4, [[6] * 5] * 4)
    batch.reward = torch.tensor(rewards)
    batch.H = torch.arange(20.).view(4, 5)
    batch.logp = logp
    eapo.give_credit(run, batch)
    return run, batch


def test_forking_takes_the_top_fifth_of_all_tokens():
    """H = 0 .. 19: the top 20% are 16 to 19, all in the last response."""
    _, batch = credited("forking")
    assert batch.credit.nonzero().tolist() == [[3, 1], [3, 2], [3, 3], [3, 4]]


def test_kl_cov_penalises_the_tokens_of_highest_covariance():
    """A = 1.5, -.5 thrice, mean 0. logp = 0, -.1 .. -1.9, mean -.95. (logp + .95) A is highest
    where both are above or both below their means: 1.5 (0 + .95) = 1.425 at the first token, which
    is also the top 0.2% of 20. Its loss gains |log rho|; nothing is clipped."""
    run, batch = credited("kl-cov")
    assert batch.penalty.nonzero().tolist() == [[0, 0]]
    assert batch.credit[:, 0].tolist() == pytest.approx([1.5, -.5, -.5, -.5], abs=1e-4)
    rho = torch.full((4, 5), 5.0)       # far outside every clip
    run.policy.forward = lambda micro, T: ((micro.logp + rho.log()).requires_grad_(), micro.H)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.0)
    loss, _, clipped, _ = eapo.learn(run, optimizer, batch)
    assert loss == pytest.approx((-5 * float(batch.credit.sum()) + math.log(5)) / 20, abs=1e-5)
    assert clipped == 0
    _, batch = credited("kl-cov", rewards=(-1., 1, -1, -1), logp=-torch.arange(20.).view(4, 5))
    # now A - mean = 1.5 at the second response: 1.5 (-5 + 9.5) at its first token = 6.75, and
    # -.5 (-19 + 9.5) = 4.75 at the last token of all: a wrong sign or mean would pick another
    assert batch.penalty.nonzero().tolist() == [[1, 0]]


def test_padding_is_no_token_when_shares_of_tokens_are_taken():
    """Of 5 + 1 + 1 + 1 tokens the top 20% are 2, not 4 of the 20 cells."""
    run = a_run(tiny_lm(), "--method", "forking", "--group-size", 4)
    batch = eapo.pack([[5]] * 4, [[6] * 5, [6], [6], [6]])
    batch.reward, batch.H = torch.tensor([1., -1, -1, -1]), torch.zeros(4, 5)
    batch.H[0], batch.H[1:, 0] = torch.arange(1., 6), torch.tensor([.5, .6, .7])
    eapo.give_credit(run, batch)
    assert batch.credit.nonzero().tolist() == [[0, 3], [0, 4]]


def test_kl_cov_takes_means_over_tokens_so_long_responses_weigh_more():
    """5 tokens of A = 1.5 and three of -.5: mean .75. logp 0 to -4, -21, -20, -20: mean -8.875.
    The highest is (-21 + 8.875) (-.5 - .75) = 15.2, before (0 + 8.875) (1.5 - .75) = 6.7."""
    run = a_run(tiny_lm(), "--method", "kl-cov", "--group-size", 4)
    batch = eapo.pack([[5]] * 4, [[6] * 5, [6], [6], [6]])
    batch.reward, batch.H = torch.tensor([1., -1, -1, -1]), torch.ones(4, 5)
    batch.logp = torch.zeros(4, 5)
    batch.logp[0], batch.logp[1:, 0] = -torch.arange(5.), torch.tensor([-21., -20, -20])
    eapo.give_credit(run, batch)
    assert batch.penalty.nonzero().tolist() == [[1, 0]]


def test_kl_cov_marks_two_tokens_in_a_thousand():
    """Of 4 x 300 tokens of different covariance the highest 2.4, rounded up, are 3."""
    run = a_run(tiny_lm(), "--method", "kl-cov", "--group-size", 4)
    batch = eapo.pack([[5]] * 4, [[6] * 300] * 4)
    batch.reward, batch.H = torch.tensor([1., -1, -1, -1]), torch.ones(4, 300)
    batch.logp = -torch.arange(1200.).view(4, 300)
    eapo.give_credit(run, batch)
    assert batch.penalty.sum() == 3


def test_drift_is_the_entropy_now_minus_the_entropy_when_sampled():
    """H of the four quadrants has moved by .1, -.2, 0, .3 a token since; and of two tokens with
    A > 0 the one that is 1.5 times as likely gets no gradient."""
    run, batch = credited("grpo")
    batch.quadrant[:] = torch.tensor([1, 2, 3, 4, 4])
    moved = torch.tensor([.1, -.2, 0, .3, .3], requires_grad=True)
    rise = torch.tensor([math.log(1.5), math.log(1.1), 0, 0, 0])
    run.policy.forward = lambda micro, T: (micro.logp + rise + 0 * moved, micro.H + moved)
    _, _, clipped, drift = eapo.learn(run, torch.optim.SGD([moved], lr=0.0), batch)
    assert drift == pytest.approx([0, .4, -.8, 0, 2.4], abs=1e-5)
    assert clipped == 1


def test_entroreg_adds_the_mean_entropy_and_its_gradient():
    """At rho = 1 the loss is - mean(A) - beta mean(H), and d loss / d H = - beta / 20 a token."""
    run, batch = credited("entroreg")
    H = batch.H.clone().requires_grad_()
    run.policy.forward = lambda micro, T: (micro.logp + 0 * H, H)
    loss, _, _, _ = eapo.learn(run, torch.optim.SGD([H], lr=0.0), batch)
    beta = 0.001
    assert loss == pytest.approx(-float(batch.credit.mean()) - beta * 9.5, abs=1e-6)
    H.grad = None
    optimizer = torch.optim.SGD([H], lr=1.0)
    eapo.learn(run, optimizer, batch)
    torch.testing.assert_close(H.detach(), batch.H + beta / 20)


def test_quadrants_can_be_learned_from_alone_and_left_out_of_the_entropy_term():
    """mu = 9.5: the right response is all below (PLR), of the wrong ones the second too (NLR)."""
    plain = torch.tensor([1.5, -.5, -.5, -.5])[:, None].expand(4, 5)
    _, batch = credited("grpo")
    torch.testing.assert_close(batch.credit, plain, atol=1e-4, rtol=0)
    _, only = credited("grpo", "--quadrants", "PLR,NHR,NHR,")
    torch.testing.assert_close(only.credit[[0, 2, 3]], plain[[0, 2, 3]], atol=1e-4, rtol=0)
    assert not only.credit[1].any()
    _, full = credited("eapo")
    _, part = credited("eapo", "--without", "NHR")
    torch.testing.assert_close(part.credit[2:], plain[2:], atol=1e-4, rtol=0)
    assert part.credit[:2].equal(full.credit[:2])
    assert not torch.allclose(full.credit[2:], plain[2:], atol=1e-3)


def test_dapo_and_kl_cov_bring_their_own_settings_and_typed_ones_win():
    dapo, typed = (eapo.parse_args(["--method", "dapo", *x]) for x in ([], ["--resample", "0"]))
    assert (dapo.resample, dapo.overlong, typed.resample) == (2, 0.2, 0)
    assert eapo.parse_args(["--method", "kl-cov"]).clip_high > 1e6          # no clip


def test_proxy_information_by_hand():
    """Right tokens all in one bin and wrong ones all in another, half and half: the entropy value
    tells the verdict, Ihat = log 2. The same histogram for both: 0. Half the right ones in a bin
    of their own: H(H) = H(3/4, 1/4), H(H|r) = log(2) / 2."""
    assert eapo.proxy_information(torch.tensor([[4, 0], [0, 4]])) == pytest.approx(math.log(2))
    assert eapo.proxy_information(torch.tensor([[1, 3], [2, 6]])) == pytest.approx(0, abs=1e-9)
    assert eapo.proxy_information(torch.tensor([[4, 0], [2, 2]])) == pytest.approx(
        -.75 * math.log(.75) - .25 * math.log(.25) - .5 * math.log(2))


def test_proxy_information_is_near_zero_when_verdicts_are_shuffled():
    """Wrong responses are less sure, and Ihat sees it; shuffled verdicts leave the bias of the
    estimator, about 32 bins / (2 x 20,000 tokens) = 0.001 nats. Bins are 0.125 wide, the last one
    open: of two responses to a problem, H = .1, .13, 9 in the right one is in bins 0, 1, 31."""
    def measured(H, right):
        run = a_run(None, "--group-size", 2)
        batch = eapo.pack([[5]] * len(H), [[6] * H.shape[1]] * len(H))
        batch.H, batch.right, batch.reward = H, right, right.float()
        batch.kept, batch.quadrant = right < 0, batch.mask.long()
        batch.credit, batch.gap = H, H[:, 0]
        return eapo.measure(run, batch, [], 0.0)
    torch.manual_seed(0)
    right = torch.rand(400) < 0.5
    H = torch.rand(400, 50) ** 3 * torch.where(right, 1.5, 3.0)[:, None]
    informed, shuffled = (measured(H, r)[0]["information"] for r in
                          (right, right[torch.randperm(400)]))
    assert informed > 0.02 and shuffled < 0.002
    _, counts = measured(torch.tensor([[.1, .13, 9.], [.2, .2, .2]]), torch.tensor([True, False]))
    assert counts[1, [0, 1, 31]].tolist() == [1, 1, 1] and counts[0, 1] == 3 and counts.sum() == 6


def test_the_metrics_of_a_step_worked_by_hand():
    """Responses of 2, 1, 2, 1 tokens to two problems; the second group, all wrong, is dropped."""
    run = a_run(None, "--group-size", 2)
    batch = eapo.pack([[5]] * 4, [[6, 6], [6], [6, 6], [6]])
    batch.H = torch.tensor([[1., .5], [.25, 0], [2, 2], [4, 0]])
    batch.credit = torch.tensor([[1.5, .5], [-1, 0], [9, 9], [9, 0]])
    batch.quadrant = torch.tensor([[1, 2], [3, 0], [4, 3], [4, 0]])
    batch.right = torch.tensor([True, False, False, False])
    batch.reward, batch.kept = torch.tensor([.5, -1, -1, -1]), torch.tensor([1, 1, 0, 0]).bool()
    batch.ended, batch.gap = torch.tensor([1, 1, 0, 1]).bool(), torch.tensor([.1, .2, .2, .1])
    run.clock.update(seconds_sample=3.0, bytes_sample=7, bytes_update=9)
    updates = [(.2, 1.0, 1.0, [0, .3, 0, -.6, 0]), (.4, 3.0, 1.0, [0, .1, 0, 0, 0])]
    found, _ = eapo.measure(run, batch, updates, 0.0)
    want = {"reward": -.625, "solve_rate": .25, "entropy": 9.75 / 6, "response_tokens": 6,
            "response_length": 1.5, "truncated": .25, "groups": 2, "groups_all_right": 0,
            "groups_all_wrong": 1, "loss": .3, "grad_norm": 2, "clip_fraction": 2 / 3,
            "sampler_gap": .1, "seconds_sample": 3, "peak_memory_bytes": 9,
            "tokens/PHR": 1 / 3, "tokens/NHR": 0, "advantage/PHR": .5, "advantage/PLR": 1 / 6,
            "advantage/NLR": 1 / 3, "entropy/PHR": 4 / 7, "entropy/PLR": 2 / 7,
            "entropy/NLR": 1 / 7, "drift/PHR": .4, "drift/PLR": 0, "drift/NLR": -.6, "drift/NHR": 0}
    assert {key: found[key] for key in want} == pytest.approx(want, abs=1e-5)


# ---- the loss ------------------------------------------------------------------------------------

def test_on_policy_the_gradient_of_the_loss_is_the_policy_gradient():
    """At rho = 1 the gradient is - sum A grad log pi; at the logits that is -A (1 - pi_o) for the
    drawn token and +A pi_v for any other (Eq. 5)."""
    torch.manual_seed(0)
    logits, token = torch.randn(1, 5, requires_grad=True), torch.tensor([3])
    A = torch.tensor([[.7]])
    logp = logits.log_softmax(-1).gather(1, token[:, None])
    policy_loss(logp, logp.detach(), A, torch.ones(1, 1), *CLIPS).backward()
    p = logits.detach().softmax(-1)
    torch.testing.assert_close(logits.grad, .7 * (p - torch.nn.functional.one_hot(token, 5)))


def test_the_clip_stops_the_gradient_only_where_it_would_push_further_out():
    """Trust region [.8, 1.28]; d loss / d logp = -rho A, or 0 where clipped. A good token at 1.25
    still gains, at 2 it is clipped, at .75 it is pulled back; a bad one at .75 is clipped, at .85
    still falls, at 2 it is pulled back, at 4 it is beyond c = 3 and constant."""
    rho = torch.tensor([[1.25, 2.0, 0.75, 0.75, 0.85, 2.0, 4.0]])
    A = torch.tensor([[1., 1, 1, -1, -1, -1, -1]])
    logp = rho.log().requires_grad_()
    loss = policy_loss(logp, torch.zeros(1, 7), A, torch.ones(1, 7), *CLIPS)
    loss.backward()
    torch.testing.assert_close(logp.grad, torch.tensor([[-1.25, 0, -.75, 0, .85, 2, 0]]))
    torch.testing.assert_close(float(loss.detach()), -(1.25 + 1.28 + .75 - .8 - .85 - 2 - 3))


def test_without_the_lower_bound_a_bad_token_costs_rho():
    """c = 0 turns PPO's lower bound off: at rho = 4 and A = -1 the loss is 4, not 3."""
    args = torch.tensor([[4.0]]).log(), torch.zeros(1, 1), torch.tensor([[-1.]]), torch.ones(1, 1)
    assert float(policy_loss(*args, .2, .28, 0.0)) == pytest.approx(4)
    assert float(policy_loss(*args, .2, .28, 3.0)) == pytest.approx(3)


def test_a_token_weighs_the_same_or_a_group_does():
    """Groups of 2 with 1 + 3 and 2 + 4 tokens. By tokens each counts 1, in all 10; by groups, as
    Eq. 2 is printed, 1/4 in the first and 1/6 in the second, in all 2, the number of groups."""
    mask = torch.arange(4) < torch.tensor([[1], [3], [2], [4]])
    by_token, by_group = (token_weights(mask, 2, mode) for mode in ("tokens", "group"))
    assert by_token[mask].tolist() == [1] * 10
    assert by_token.dtype == by_group.dtype == torch.float32
    assert by_group[mask].tolist() == pytest.approx([1 / 4] * 4 + [1 / 6] * 6)
    assert not by_token[~mask].any() and not by_group[~mask].any()


@pytest.mark.parametrize("loss_mean", ["tokens", "group"])
def test_cutting_a_mini_batch_into_micro_batches_does_not_change_the_gradient(loss_mean):
    """Micro-batches of one row, of some, of all: the same gradient, and the loss is the mean over
    tokens, or over groups of their means, of a naive surrogate."""
    grads = []
    for tokens in (1, 20, 1000):
        run = a_run(tiny_lm().double(), "--group-size", 4, "--microbatch-tokens", tokens,
                    "--loss-mean", loss_mean)
        batch = tiny_batch(8)
        torch.manual_seed(1)
        batch.credit = torch.randn(batch.mask.shape).double() * batch.mask
        batch.quadrant = torch.ones_like(batch.mask, dtype=torch.long) * batch.mask
        with torch.no_grad():
            logp, batch.H = run.policy(batch, 1.0)
        batch.logp = logp - 0.1 * torch.randn(logp.shape).double() * batch.mask
        kept, optimizer = [], torch.optim.SGD(run.policy.parameters(), lr=0.0)
        optimizer.zero_grad = lambda **_: kept.extend(p.grad for p in run.policy.parameters())
        loss, _, _, _ = eapo.learn(run, optimizer, batch)
        rho, A = (logp - batch.logp).exp(), batch.credit
        gain = torch.minimum(rho * A, rho.clamp(.8, 1.28) * A)
        means = [gain[g][batch.mask[g]].mean() for g in (slice(0, 4), slice(4, 8))]
        mean = gain[batch.mask].mean() if loss_mean == "tokens" else sum(means) / 2
        assert loss == pytest.approx(-float(mean), abs=1e-6)
        grads.append(torch.cat([g.flatten() for g in kept]))
    assert grads[0].norm() > 1e-3
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grads[0], grads[2], rtol=1e-5, atol=1e-7)


# ---- log-probabilities and entropies -------------------------------------------------------------

def naive(lm, prompt, response, temperature):
    """log p and H of each response token from a plain forward pass over one row."""
    logits = lm(torch.tensor([prompt + response])).logits[0].float() / temperature
    logp = torch.log_softmax(logits, -1)[len(prompt) - 1:-1]
    return logp[range(len(response)), response], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("tied", [True, False])
def test_chunked_log_probabilities_and_entropies_equal_the_naive_ones(monkeypatch, tied):
    """Chunks of 2 tokens, temperature 0.7, rows of uneven length, against one row at a time: values
    and gradients."""
    monkeypatch.setattr(eapo, "CHUNK", 2 * 32)
    batch = tiny_batch(5)
    lm, other = tiny_lm(tied=tied), tiny_lm(tied=tied)
    logp, H = Policy(lm)(batch, 0.7)
    (logp.sum() + 3 * (H * batch.mask).square().sum()).backward()
    total = 0
    for i in range(5):
        p = int(batch.prompt_len[i])
        want_logp, want_H = naive(other, batch.ids[i, :p].tolist(), batch.response(i), 0.7)
        torch.testing.assert_close(logp[i][batch.mask[i]], want_logp, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(H[i][batch.mask[i]], want_H, rtol=1e-4, atol=1e-5)
        total = total + want_logp.sum() + 3 * want_H.square().sum()
    total.backward()
    assert not logp[~batch.mask].any() and not H[~batch.mask].any()
    for ours, theirs in zip(lm.parameters(), other.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=5e-4)   # of up to 200


def test_gradients_of_a_token_that_cannot_be_drawn_are_numbers():
    """A logit of -1e9, as models mask vocabulary: p = 0, and p log p must not become nan."""
    weight = torch.tensor([[1.], [2.], [-1e9]], requires_grad=True)
    hidden = torch.ones(4, 1, requires_grad=True)
    logp, H = eapo.ChunkedLogProbAndEntropy.apply(hidden, weight, torch.tensor([0, 1, 1, 0]), 1.0)
    (logp.sum() + H.sum()).backward()
    assert weight.grad.isfinite().all() and hidden.grad.isfinite().all() and weight.grad[2] == 0


def test_neighbours_and_padding_leave_log_probabilities_unchanged():
    batch, policy = tiny_batch(6), Policy(tiny_lm())
    together = policy(batch, 1.0)
    for i in range(6):
        alone = policy(batch.rows(torch.tensor([i])), 1.0)
        for x, y in zip(together, alone):
            torch.testing.assert_close(x[i:i + 1, :y.shape[1]], y, rtol=1e-4, atol=1e-5)


def test_the_stop_token_is_trained_on_and_prompt_and_padding_are_not():
    """pad == eos here. d loss / d head row of a token is nonzero through its logit: look at logp of
    the last response token, which is the stop token, and at what the mask covers."""
    batch, lm = tiny_batch(4), tiny_lm()
    assert batch.mask.sum(1).equal(batch.response_len)
    assert all(batch.response(i)[-1] == 1 for i in range(4))
    logp, _ = Policy(lm)(batch, 1.0)
    last = logp[range(4), batch.response_len - 1]
    A = torch.ones(4, 1) * batch.mask
    loss = policy_loss(logp, logp.detach(), A, batch.mask / batch.mask.sum(), *CLIPS)
    grad = torch.autograd.grad(loss, logp)[0]
    assert (last != 0).all()
    torch.testing.assert_close(grad, -(batch.mask / batch.mask.sum()))


# ---- sampling ------------------------------------------------------------------------------------

PROMPTS, SEEDS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14]], [1, 2, 3]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_samplers_log_probabilities_are_those_of_the_update(temperature):
    """Left-padded prompts, a repeated cache, rows that leave early: the same numbers as one
    forward pass over the finished text."""
    lm = tiny_lm()
    lm.set_attn_implementation("one token")
    batch = eapo.sample_loop(lm, PROMPTS, 8, 12, temperature, 1.0, [*range(1, 9)], SEEDS)
    lm.set_attn_implementation("eager")
    logp, H = Policy(lm)(batch, temperature)
    assert 0 < int(batch.ended.sum()) < 24 and len(set(batch.response_len.tolist())) > 3
    torch.testing.assert_close(batch.logp, logp, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(batch.H, H, rtol=1e-3, atol=1e-4)


def test_a_model_that_looks_back_six_tokens_samples_as_it_scores():
    """Mistral's sliding window, shorter than the responses, with the loop's own KV cache."""
    torch.manual_seed(0)
    lm = transformers.MistralForCausalLM(transformers.MistralConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, sliding_window=6,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, bos_token_id=None,
        eos_token_id=1)).eval()
    lm.set_attn_implementation("one token")
    batch = eapo.sample_loop(lm, PROMPTS, 4, 16, 1.0, 1.0, [1], SEEDS)
    lm.set_attn_implementation("eager")
    assert int(batch.response_len.max()) > 12
    torch.testing.assert_close(batch.logp, Policy(lm)(batch, 1.0)[0], rtol=1e-3, atol=1e-4)


def test_greedy_responses_are_those_of_generate():
    lm, G = tiny_lm(seed=3), 2
    want = []
    for prompt in PROMPTS:
        out = lm.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)),
                          max_new_tokens=9, do_sample=False, eos_token_id=[1, 4])
        want += [out[0, len(prompt):].tolist()] * G
    batch = eapo.sample_loop(lm, PROMPTS, G, 9, 0, 1.0, [1, 4], SEEDS)
    assert [batch.response(i) for i in range(6)] == want
    assert batch.ended.tolist() == [w[-1] in (1, 4) for w in want]


def test_draw_follows_temperature_and_top_p():
    """p = .5 .3 .2, laid end to end, over even u: top-p .6 keeps the first two (.5 < .6), which
    share the line as .625 and .375; top-p .5 keeps one. At temperature 1/2 p goes as its square:
    .25 .09 .04 over .38."""
    logits = torch.tensor([.2, .5, .3]).log().expand(20000, 3)
    u = (torch.arange(20000) + .5) / 20000
    share = lambda *how: (torch.bincount(eapo.draw(logits, u, *how), minlength=3) / 20000).tolist()
    assert share(1.0, 1.0) == pytest.approx([.2, .5, .3], abs=1e-3)
    assert share(1.0, .6) == pytest.approx([0, .625, .375], abs=1e-3)
    assert share(1.0, .5) == [0, 1, 0] and share(0, 1.0) == [0, 1, 0]
    assert share(0.5, 1.0) == pytest.approx([.105, .658, .237], abs=1e-3)


def test_no_token_without_probability_is_ever_drawn():
    """u at both ends of [0, 1), and tokens of probability 0 at both ends of the vocabulary."""
    logits = torch.tensor([[float("-inf"), 0, 0, float("-inf")]])
    for u, token in ((0.0, 1), (1 - 2 ** -24, 2)):
        assert eapo.draw(logits, torch.tensor([u]), 1.0, 1.0).tolist() == [token]


def test_a_response_depends_on_its_prompts_seed_and_not_on_its_neighbours():
    """Sampled with others and alone, in another order: the same tokens."""
    lm, how = tiny_lm(), (4, 12, 1.0, 0.9, [1, 2, 3])
    together = eapo.sample_loop(lm, PROMPTS, *how, SEEDS)
    for g in (2, 0, 1):
        alone = eapo.sample_loop(lm, PROMPTS[g:g + 1], *how, SEEDS[g:g + 1])
        assert [alone.response(i) for i in range(4)] == \
            [together.response(4 * g + i) for i in range(4)]
    assert together.response(0) != together.response(1)


def test_greedy_tokens_are_scored_at_temperature_one():
    logits, tokens = torch.randn(3, 5), torch.tensor([0, 1, 2])
    for x, y in zip(*(eapo.log_prob_and_entropy(logits, tokens, T) for T in (0, 1.0))):
        assert x.equal(y)


def test_a_row_that_stops_does_not_disturb_the_others():
    """Greedy rows are independent: with and without the neighbours that stop early."""
    lm = tiny_lm(seed=3)
    all_rows = eapo.sample_loop(lm, PROMPTS, 1, 20, 0, 1.0, [1, 4, 7, 9], SEEDS)
    assert len(set(all_rows.response_len.tolist())) > 1
    for i, prompt in enumerate(PROMPTS):
        alone = eapo.sample_loop(lm, [prompt], 1, 20, 0, 1.0, [1, 4, 7, 9], [0])
        assert all_rows.response(i) == alone.response(0)


# ---- problems and prompts ------------------------------------------------------------------------

def test_a_pupil_is_right_exactly_when_every_carry_is_written():
    """And about 4 in 10 are, as the warm-up wants."""
    problems = eapo.addition("warmup")[:2000]
    right = 0
    for p in problems:
        a, b = p.problem[:-1].split("+")
        carries, carry = [], 0
        for x, y in zip(reversed(a), reversed(b)):
            carries.append(bool(carry))
            carry = int(x) + int(y) + carry > 9
        written = [c.count("+") == 2 for c in p.solution.split(" ")[:4]]
        assert eapo.is_correct(p.solution, p.answer) == (written == carries)
        right += written == carries
    assert 0.35 < right / 2000 < 0.5


def test_exam_training_and_warm_up_share_no_problem():
    parts = [{p.problem for p in eapo.addition(split)} for split in ("exam", "train", "warmup")]
    assert [len(p) for p in parts] == [128, 8192, 20800]
    assert len(set.union(*parts)) == sum(map(len, parts))


def test_a_prompt_is_rendered_once_with_one_bos():
    """A template that writes BOS itself, a tokenizer that adds BOS too, and a base model."""
    tokenizer = transformers.ByT5Tokenizer(extra_ids=0)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = tokenizer.bos_token_id
    tokenizer.chat_template = "<s>{{ messages[0]['content'] }}"
    ids = eapo.render(tokenizer, "1+1=")
    assert ids.count(bos) == 1 and ids[-1] != tokenizer.eos_token_id
    tokenizer.chat_template = None
    ids = eapo.render(tokenizer, "1+1=")
    assert ids[-1] != tokenizer.eos_token_id        # this tokenizer ends every text with eos
    assert tokenizer.decode(ids) == "1+1=" + eapo.SUFFIX


def load_file(path, split):
    run = a_run()
    run.tokenizer = eapo.tiny_model(0)[1]
    return eapo.load_problems(run, str(path), split)


@pytest.mark.parametrize("name, text, part", [
    ("a.jsonl", """{"problem": "1+1", "answer": 2}
                   {"problem": "2+2", "answer": ["4", "four"]}""", "train"),
    ("a.csv", "question,ground_truth\n1+1,2\n2+2,4\n", "exam"),
    ("bom.jsonl", '\ufeff{"problem": "1+1", "answer": 2}\n{"problem": "2+2", "answer": 4}', "exam"),
    ("b.jsonl", """{"prompt": "1+1", "solution": "so \\\\boxed{2}"}
                   {"prompt": "2+2", "solution": "4"}""", "train")])
def test_problems_load_from_files_with_the_usual_column_names(tmp_path, name, text, part):
    (tmp_path / name).write_text(text)
    one, two = load_file(tmp_path / name, part)
    assert (one.problem, two.problem) == ("1+1", "2+2")
    assert eapo.is_correct("\\boxed{2}", one.answer) and eapo.is_correct("\\boxed{4}", two.answer)
    assert not eapo.is_correct("\\boxed{2}", two.answer)


def test_parquet_loads_too(tmp_path):
    import datasets
    path = str(tmp_path / "a.parquet")
    datasets.Dataset.from_list([{"problem": "1+1", "answer": "2"}]).to_parquet(path)
    (p,) = load_file(path, "train")
    assert (p.problem, p.answer) == ("1+1", "2") and len(p.ids) == 3


def test_a_hub_set_gives_the_split_named_the_only_one_or_the_usual_one(monkeypatch):
    monkeypatch.setattr(eapo.datasets, "load_dataset", lambda name, split: [name, split])
    for parts, source, split, want in (
            (["train"], "a/b", "exam", "train"), (["x"], "a/b", "train", "x"),
            (["train", "test"], "a/b", "exam", "test"),
            (["test", "train"], "a/b", "train", "train"),
            (["aime24", "amc"], "a/b:amc", "exam", "amc")):
        monkeypatch.setattr(eapo.datasets, "get_dataset_split_names", lambda name: parts)
        assert eapo.read_rows(source, split) == ["a/b", want]
    with pytest.raises(SystemExit, match="has the splits aime24, amc: name one as a/b:aime24"):
        eapo.read_rows("a/b", "exam")


def test_a_prompt_as_long_as_the_limit_stays_and_a_longer_one_is_left_out(tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text(
        '{"problem": "123", "answer": "1"}\n{"problem": "1234", "answer": "1"}\n')
    run = a_run(tiny_lm(), "--max-prompt-tokens", 3)
    run.tokenizer = eapo.tiny_model(0)[1]
    left = eapo.load_problems(run, str(tmp_path / "x.jsonl"), "train")
    assert [p.problem for p in left] == ["123"]
    assert "1 of 2 prompts left out" in capsys.readouterr().out


def test_an_unreadable_csv_is_named_with_what_is_wrong_in_it(tmp_path):
    (tmp_path / "x.csv").write_text("problem,answer\n1+1,2\n1,2,3,4\n")
    with pytest.raises(SystemExit, match="cannot use .*x.csv: .*Expected 2 fields"):
        load_file(tmp_path / "x.csv", "train")


def test_the_longest_exam_must_fit_the_model_too():
    run = a_run(eapo.tiny_model(0)[0], "--max-response-tokens", 8)
    run.tokenizer = eapo.tiny_model(0)[1]
    short, long = (Problem("0" * n, "0", ids=[3] * n) for n in (3, 505))
    eapo.doctor(run, [short])
    run.exams = {"exam": [long]}
    with pytest.raises(SystemExit, match="reads 512 tokens, .* has 513"):
        eapo.doctor(run, [short])


def test_the_tiny_model_refuses_problems_in_words():
    run = a_run(eapo.tiny_model(0)[0], "--max-response-tokens", 8)
    run.tokenizer = eapo.tiny_model(0)[1]
    for text, works in (("1+2=", True), ("1 egg", False)):
        ids = eapo.render(run.tokenizer, text)
        with contextlib.nullcontext() if works else pytest.raises(SystemExit, match="name another"):
            eapo.doctor(run, [Problem(text, "3", ids=ids)])


def test_an_error_without_words_is_called_by_its_name():
    with pytest.raises(SystemExit, match="cannot use x: ValueError"), eapo.using("x"):
        raise ValueError


@pytest.mark.parametrize("text, says", [
    ('{"problem": "1"', "line 1: Expecting"),
    ('{"problem": "1", "answer": "1"}\n\n[1]\n', "line 3: not an object"),
    ('{"text": "1", "answer": "1"}\n', "has the columns text, answer: which is the problem"),
    ('{"question": "1", "prompt": "1", "answer": "1"}\n', "prompt, answer: which is the problem"),
    ('{"problem": "' + "1" * 40 + '", "answer": "1"}\n', "no prompt is within --max-prompt-tok"),
    ('{"problem": "1", "answer": ""}\n', "row 1: problem or answer is empty"),
    ('{"problem": [{"role": "user"}], "answer": "1"}\n', "row 1: the problem must be text"),
    ('{"problem": "1", "answer": "1"}\n{"problem": "2"}\n', "row 2: problem or answer is empty"),
    ("", "no rows")])
def test_bad_data_gets_one_line_that_says_where(tmp_path, text, says):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(SystemExit, match=says):
        load_file(tmp_path / "x.jsonl", "train")


@pytest.mark.parametrize("args, says", [
    (["--group-size", "1"], "--group-size 2 or more"), (["--alpha", "2"], "turn the sign"),
    (["--model", "x", "--warmup-steps", "3"], "needs --warmup-data"),
    (["--method", "kl-cov", "--quadrants", "PHR"], "kl-cov learns without credit too"),
    (["--clip-c", "1.1"], "--clip-c must lie above"), (["--prompts-per-step", "0"], "1 or more")])
def test_impossible_numbers_are_refused_with_a_remedy(args, says):
    with pytest.raises(SystemExit, match=says):
        eapo.parse_args(args)


def test_the_defaults_are_the_papers_and_the_tiny_models_fit_a_laptop():
    paper = eapo.parse_args(["--model", "Qwen/Qwen2.5-Math-7B"])
    assert (paper.learning_rate, paper.prompts_per_step, paper.prompts_per_minibatch,
            paper.group_size, paper.steps, paper.top_p, paper.alpha, paper.phi, paper.clip_low,
            paper.clip_high, paper.max_prompt_tokens, paper.max_response_tokens) == (
            1e-6, 512, 32, 8, 220, .95, .2, 2, .2, .28, 1024, 3072)
    small = eapo.parse_args(["--model", "agentica-org/DeepScaleR-1.5B-Preview"])
    assert (small.group_size, small.prompts_per_step, small.max_response_tokens) == (16, 64, 24576)
    assert eapo.parse_args([]).train_data == "addition"
    assert eapo.parse_args(["--steps", "7"]).steps == 7


def test_a_stream_gives_every_problem_once_an_epoch_and_resumes_from_its_position():
    one, two = eapo.Stream(list(range(10)), 0), eapo.Stream(list(range(10)), 0)
    numbers, taken = zip(*one.take(7), *one.take(7), *one.take(6))
    assert numbers == tuple(range(20))
    assert sorted(taken[:10]) == sorted(taken[10:]) == list(range(10)) and taken[:10] != taken[10:]
    two.position = 7
    assert tuple(two.take(13)) == tuple(zip(numbers, taken))[7:]


# ---- the verifier --------------------------------------------------------------------------------

GOLDS = r"""42 | -7 | 0 | 1000000 | 2.5 | 16.67 | \frac{3}{4} | -\frac{1}{2}
| \dfrac{2469}{20,\!000} | 3/7 | 2\sqrt{3} | \frac{1+\sqrt{5}}{2} | \frac{9}{4}\pi | 80-20\pi
| \sqrt[3]{2}+1 | 2^{4950} | 1/2004! | 60^\circ | 20\% | \$23{,}000 | 8,\!424,\!000
| 24\text{ days} | 1\frac{2}{3} | (2,-3) | \left(\frac12,3\right) | [0,3)
| (-\infty,2)\cup(2,\infty) | 1,-2,3 | \{4,5,7\} | 3 \pm 2\sqrt{2} | x^2-5x+6 | (a+b)(a+c)
| y=2x+1 | x^2+y^2=25 | -7+24i | \sin^2 y | 1604_8 | \text{(C)} | \text{odd} | 3 : 5 : 7
| \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}""".replace("\n", " ").split(" | ")


def pairs(table):
    return [cell.split(" ~ ") for line in table.strip().splitlines()
            for cell in line.strip().split(" ;; ")]


EQUAL = pairs(r"""
    \sin x \cos 2x ~ \cos 2x \sin x ;; 0.75 ~ \frac34 ;; \dfrac{6}{8} ~ 3/4 ;; x=5 ~ 5
    \left(1,\,2\right) ~ (1, 2) ;; (x+1)^2 ~ x^2+2x+1 ;; \sec^2 y ~ \tan^2 y + 1 ;; .5 ~ 1/2
    1/\sqrt2 ~ \frac{\sqrt{2}}{2} ;; x^{-1}y ~ \frac yx ;; e^{2\ln 3} ~ 9 ;; 2y = 4x + 2 ~ y=2x+1
    1,234 ~ 1234 ;; 2, 1 ~ 1,2 ;; 1+\sqrt2,\ 1-\sqrt2 ~ 1\pm\sqrt2 ;; \{2, -2\} ~ x = \pm 2
    5 \text{ cm}^2 ~ 5 ;; 25 ~ 25^{\circ}\mathrm{C} ;; \$5 ~ 5 ;; 28 ~ 28\% ;; 0.28 ~ 28\%
    28 \text{ percent} ~ 28\% ;; 9/5 ~ 1\frac45 ;; -15.6 ~ -15\frac35 ;; 204 ~ 204_5
    234, 1 ~ 1,234 ;; Yes ~ \text{yes} ;; C ~ \text{(C)} ;; 6, 8\text{, and }10 ~ 10, 8, 6
    \begin{bmatrix}0.5\\2\end{bmatrix} ~ \begin{pmatrix}\frac12\\2\end{pmatrix}
    (2,\infty)\cup(-\infty,1) ~ (-\infty,1)\cup(2,\infty) ;; x=1 \text{ or } x=2 ~ 2,1
    \sqrt[3]{8} ~ 2 ;; \log_2 8 ~ 3 ;; |-5| ~ 5 ;; \arctan 1 ~ \frac{\pi}{4} ;; 5! ~ 120
    \cot x ~ \frac{\cos x}{\sin x} ;; \sin x \cdot \cos x ~ \cos x \sin x ;; \tan(\frac{\pi}4) ~ 1
    2x+4y=6 ~ x+2y=3 ;; 3 < x ~ x > 3 ;; 2x > 6 ~ x > 3 ;; q=2, p=5 ~ p=5, q=2 ;; 1/2x ~ \frac x2
    x \ge 3 \text{ or } x \le -2 ~ x \leq -2, x \geq 3 ;; 4.4 \times 10^{-3} ~ 0.0044 ;; -2^2 ~ -4
    \frac{-1\pm\sqrt5}{2} ~ \frac{\sqrt5-1}{2}, -\frac{1+\sqrt5}{2} ;; 5 \text{ m} ~ 5 ;; 5 cm ~ 5
    1{,}234.5 ~ 1234.5 ;; 2,\!000 ~ 2000 ;; \text{13} ~ 13 ;; 1,2 ~ (1,2) ;; -x+y ~ y-x
    1,234,567 ~ 1234567 ;; \frac{20,000}{3} ~ \frac{20000}3 ;; a_1 + b ~ b + a_1 ;; 2^{3^2} ~ 512
    x>3 ~ (3,\infty) ;; [1,2) ~ 2 > x \ge 1 ;; x<1 \text{ or } 3<x ~ (-\infty,1)\cup(3,\infty)
    \binom52 ~ 10 ;; \sqrt2\sqrt3 ~ \sqrt6 ;; \sin\pi ~ 0 ;; x \in [0,1) ~ [0,1)
    x=1,2 ~ x = 2, 1 ;; 1,234.5 ~ 1234.5""")
UNEQUAL = pairs(r"""
    (2,1) ~ (1,2) ;; (0,1) ~ [0,1) ;; 2,1 ~ (1,2) ;; 1,1 ~ 1 ;; 1 ~ 1,1 ;; 50 ~ 0.5
    1:00 ~ 12:00 ;; 5 ~ \pm 5 ;; 5 ~ 4\sqrt2 ;; 1/2004! ~ -1/2004! ;; 1/2006! ~ 1/2004!
    \frac{1}{23} ~ \frac{12}{3} ;; 505/1011 ~ 0.5 ;; 10000.5 ~ 10000 ;; 999999.9 ~ 1000000
    306956.64 ~ 306956.63 ;; 32, 349 ~ 32349 ;; 2 3 ~ 23 ;; 2 3 ~ 6 ;; 0.333 ~ \frac13
    x=3<5 ~ 5 ;; 1 ~ 1\sqrt{19} ;; x-y ~ y-x ;; x > 1 ~ x < 1 ;; x \ge 1 ~ x > 1
    y = 5 ~ x = 5 ;; x+y=6 ~ x+y=5 ;; 204_6 ~ 204_5 ;; 0 ~ 0.\overline{3} ;; c ~ C
    ABCD ~ \text{CBAD} ;; 8:34\text{ a.m.} ~ 8:34\text{ p.m.} ;; \text{even} ~ \text{odd}
    \begin{pmatrix}1&2\end{pmatrix} ~ \begin{pmatrix}1\\2\end{pmatrix} ;; CD=9, AB=4 ~ AB=9, CD=4
    4, 9 ~ AB=9, CD=4 ;; 5 \text{ or three} ~ 5 ;; \sin 2x ~ 2\sin x ;; 2\frac32 ~ \frac72
    -x > 3 ~ x > 3 ;; 2=3 ~ 5=7 ;; 5=5 ~ x=1 ;; \{1,2\} ~ (1,2) ;; (1,234) ~ 1234 ;; 1,23 ~ 123
    \text{one}+0 ~ 1 ;; x=5x ~ 5 ;; x=x-x+5 ~ 5 ;; \infty-\infty+5 ~ 5 ;; 12,3 ~ 123 ;; 2=3 ~ 3
    a_1 ~ a_2 ;; 2\frac{x}5 ~ 2+\frac{x}5 ;; \frac{1}{2x} ~ 1/2x ;; x=y ~ x ;; 0.00001 ~ 0
    x<3 ~ (3,\infty) ;; 1<x<2 ~ [1,2] ;; x<3 ~ 3 ;; x<y<3 ~ 3 ;; \binom{99999}{4444} ~ 1
    10^{-19}\pi ~ 10^{-20}\pi ;; [1,2] ~ [1,2) ;; 3 > x ~ x > 3 ;; 8:30 ~ 8:03
    y=2x ~ y=2x+1 ;; y=2x, z=1 ~ 2x, 1 ;; \frac{11}{21} ~ \frac{1}{121} ;; x \le 3 ~ x < 3""")


@pytest.mark.parametrize("text, gold", [("0.00001", 1e-5), ("0.000025", 2.5e-5), ("142", 142.0),
                                        ("10000000000000000000000", 1e22), ("0.5", [3, 0.5])])
def test_a_gold_that_is_a_number_is_the_number_and_not_its_exponent(text, gold):
    assert eapo.is_correct(f"\\boxed{{{text}}}", gold)
    assert not eapo.is_correct("\\boxed{7}", gold)


@pytest.mark.parametrize("ours, gold", EQUAL)
def test_other_notation_for_the_same_value_is_paid(ours, gold):
    assert eapo.same_answer(ours, gold) is True


@pytest.mark.parametrize("ours, gold", UNEQUAL)
def test_other_content_is_not_paid(ours, gold):
    assert eapo.same_answer(ours, gold) is False


ROUNDED = pairs(r"""
    50/3 ~ 16.67 ;; 16.666 ~ 16.67 ;; 100/3 ~ 33.3 ;; -16.6667 ~ -16.67 ;; \pi ~ 3.14
    4.123106 ~ \sqrt{17} ;; 3.141593 ~ \pi ;; 0.333333 ~ \frac13""")
TOO_ROUGH = pairs(r"""
    16.68 ~ 16.67 ;; 16.6 ~ 16.67 ;; 16.67 ~ 50/3 ;; 3.14 ~ \pi ;; 0.33333 ~ \frac13 ;; 1/3 ~ 0.3
    4.9999999 ~ 5 ;; 0.4999 ~ 0.5 ;; 66.451 ~ 66.450 ;; 4.123 ~ \sqrt{17} ;; 16.67 ~ 17""")


def test_a_rounded_gold_pays_what_rounds_to_it_and_an_exact_gold_pays_six_digits():
    """16.67 stands for 16.665 to 16.675, so 50/3 earns it; but 16.67 is no answer to 50/3."""
    for ours, gold in ROUNDED + TOO_ROUGH:
        assert eapo.same_answer(ours, gold) is ([ours, gold] in ROUNDED), (ours, gold)
    assert not eapo.is_correct(r"\boxed{142.03}", 142.0)              # a float is no rounding


def test_the_last_complete_box_counts_and_nothing_else():
    """A mention of the answer elsewhere is not one; nor is a box that was cut short."""
    last = eapo.extract_answer
    assert last(r"\boxed{1} no, \boxed{\frac{1}{\{2\}}}.") == r"\frac{1}{\{2\}}"
    assert last(r"\boxed{2}, as you asked me to \boxed it") == "2"
    assert last(r"\boxed{5} wait, \boxed{\frac{1}{2}") == "5"
    assert last(r"\boxed{5" + "0" * 600 + "}") is None and last(r"\boxed{}") == ""
    assert last(r"\boxed{[0,1\}}") == r"[0,1\}"
    for text in ("the answer is 5", r"\boxed 5", r"\boxed{5", ""):
        assert last(text) is None and eapo.is_correct(text, "5") is False
    assert not eapo.is_correct(r"\boxed{2} no, \boxed{1}", "2")


def test_golds_come_boxed_in_dollars_as_numbers_or_as_alternatives():
    response = r"Hence $\boxed{142}$."
    for gold in ("142", "$142$", r"so \boxed{142}", 142, 142.0, ["7", "142"]):
        assert eapo.is_correct(response, gold) is True
    for gold in ("7", 7, "", ["7", "8"], []):
        assert eapo.is_correct(response, gold) is False


def test_a_response_that_boxes_several_answers_does_not_win_by_one_of_them():
    """Else the policy learns to list candidates: \\boxed{0,1,2,...,999} solves all of AIME."""
    for answer in (r"\boxed{2} or \boxed{1}", r"\boxed{1 \text{ or } 2}", r"\boxed{1,2,3}",
                   r"\boxed{2;3}", r"\boxed{\{1,2\}}", r"\boxed{2 \cup 3}", r"\boxed{2=3}",
                   r"\boxed{2 \pm 0, 3}", r"\boxed{1, 2 \text{ hours}}"):
        assert eapo.is_correct(answer, "2") is False, answer


def test_boxing_an_equation_of_the_problem_is_not_an_answer():
    """x^2-5x+6=0 ends in 0 and is true of 2 and 3, but it is neither 0 nor 2, 3."""
    for gold in ("0", "2", "2,3", "6"):
        assert eapo.is_correct(r"\boxed{x^2-5x+6=0}", gold) is False
    assert eapo.is_correct(r"\boxed{x+y=5}", "5") is False


def test_an_expression_with_free_variables_is_not_a_number():
    """Not even where the variable cancels: a number was asked for."""
    for answer in ("x", "5x", "5+0x", "x-x+5", "5x/x", "5+y=5+y", "5x^0"):
        assert eapo.same_answer(answer, "5") is False, answer


def test_nan_infinity_and_what_cannot_be_read_win_nothing():
    for answer in ("nan", "inf", r"\infty", "-\\infty", "1/0", "0/0", r"\log 0", "5^{", "{5", "5?",
                   "", "9^{9^{9^9}}", "10^{400}\\sqrt2", r"\frac{5}", "5 \\foo", "\x005", "1.2.3"):
        for gold in ("5", "0", "1", r"\frac{1}{2}", r"(1,\infty)"):
            assert eapo.same_answer(answer, gold) is False, (answer, gold)


HOSTILE = ["9^{9^{9^{9^9}}}", "2^{99999999999}", "99999999999!", "9" * 10 ** 6, "{" * 10 ** 5,
           " " * 5 * 10 ** 6 + "1",
           r"\boxed{" * 150000, "-" * 900, "1" + "^1" * 400, "3" + "!" * 900, "|" * 900,
           r"\sqrt" * 180, r"1\pm" * 200, ",".join("1" * 490), "1.0e999999999", r"\frac" * 150,
           "(" * 400 + "1" + ")" * 400, r"\text{1" * 140, "x_{" * 300, "x" * 1000, "\ud800",
           "+".join(["x^{99}"] * 140), "2004!*" * 150, "x^{2000}", "=1" * 400, r"\{1,2\}," * 48,
           "+".join([r"\frac{5^{6999}}{7^{1999}}"] * 40), "x^x" * 200, "e^{" * 30 + "1" + "}" * 30,
           r"\sin " * 30, "1,234%" * 30, "\\", "1_", "^1", r"\binom{9999999}{4444444}", "٣",
           "5_1e99999999", "2004!+2003!*" * 8, "(x+y+z)^{99}" * 10, ",".join(map(str, range(89)))]


def test_hostile_input_takes_milliseconds():
    """Every amount of work is bounded before it is done: under 10 ms on an idle machine. Here the
    best of three runs, and a factor of five, for a busy one."""
    for text in HOSTILE:
        for ours, gold in ((text, "5"), ("5", text), (text, text[::-1]), (text, "x+1")):
            seconds = []
            for _ in range(3):
                start = time.perf_counter()
                verdicts = eapo.same_answer(ours, gold), eapo.is_correct(f"\\boxed{{{ours}}}", gold)
                seconds.append(time.perf_counter() - start)
                assert all(type(v) is bool for v in verdicts)
            assert min(seconds) < 0.05, text[:40]
    assert eapo.same_answer("(" * 20 + "1" + ")" * 20, "1")
    assert not eapo.same_answer("9" * 1001, "9" * 1002)


def test_random_latex_never_raises():
    """Two seconds of random strings and mutilated golds; the seed is fixed, so failures repeat."""
    rng, end = random.Random(0), time.time() + 2
    alphabet = [*r"{}()[]^_+-*/=<>,.:;!%|&$'0129xyei", " ", "\x00", "√", "\\", *r"""\frac \sqrt[ \pm
        \text{ \cup \infty \left \pi \sin \log_ \binom \{ \} \\ \begin{pmatrix} \end{pmatrix}
        \lfloor \circ \le or cm 1e9""".split()]
    while time.time() < end:
        text = rng.choice(GOLDS)
        if rng.random() < 0.5:
            text = "".join(rng.choices(alphabet, k=rng.randrange(1, 30)))
        cut = rng.randrange(len(text) + 1)
        text = text[:cut] + rng.choice(["", rng.choice(alphabet)]) + text[cut + rng.randrange(3):]
        assert type(eapo.same_answer(text, rng.choice(GOLDS))) is bool, text
        assert type(eapo.is_correct("\\boxed{" + text, text)) is bool, text


def test_the_verifier_works_in_any_thread():
    """Time-outs by signals, the usual safety net of verifiers, need the main thread."""
    work = lambda _: (eapo.same_answer(r"\frac12", "0.5"), eapo.same_answer("9^{9^{9^9}}", "9"))
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        assert list(threads.map(work, range(8))) == [(True, False)] * 8


HARMLESS = [
    lambda g: f"${g}$", lambda g: f" {g} ", lambda g: g + ".", lambda g: r"\displaystyle " + g,
    lambda g: g.replace(r"\frac", r"\dfrac"), lambda g: g.replace("pmatrix", "bmatrix"),
    lambda g: g.replace("{,}", ",").replace(",\\!", ","),
    lambda g: g if "text" in g else g.replace("(", r"\left(").replace(")", r"\right)"),
    lambda g: "x=" + g if g.isdigit() else g, lambda g: g + ".0" if g.isdigit() else g,
    lambda g: g.replace(r"^\circ", "").replace(r"\%", " percent")]
without = lambda gold, part: gold.replace(part, "", 1) if part in gold else "?"
HARMFUL = [
    lambda g: g + "+1", lambda g: g + ", 77", lambda g: g + r" \text{ or } 12345",
    lambda g: "?" if g in ("0", r"\text{odd}") else f"-({g})", lambda g: without(g, r"\sqrt"),
    lambda g: without(g, r"\pi"), lambda g: without(g, "!"), lambda g: without(g, "-"),
    lambda g: without(g, "^2"), lambda g: without(g, r"\pm"),
    lambda g: g.replace("[", "(") if "[0" in g else "?",
    lambda g: g.replace("2", "7") if "2" in g else "1",
    lambda g: "3" + g if g[0] in "123456789" else g + "x"]


@pytest.mark.parametrize("gold", GOLDS)
def test_a_gold_equals_its_harmless_rewritings_and_no_harmful_one(gold):
    for k, rewrite in enumerate(HARMLESS):
        assert eapo.is_correct(f"So \\boxed{{{rewrite(gold)}}}, as claimed.", gold), (k, gold)
    for k, rewrite in enumerate(HARMFUL):
        assert rewrite(gold) == gold or not eapo.same_answer(rewrite(gold), gold), (k, gold)


def test_no_two_golds_of_different_value_are_equal():
    assert [(a, b) for a in GOLDS for b in GOLDS if a != b and eapo.same_answer(a, b)] == []


# ---- pass@k and the loop -------------------------------------------------------------------------

def test_pass_at_k_is_the_share_of_samples_of_k_that_hold_a_right_one():
    """Against counting every choice of k of n."""
    for n, c, k in [(5, 0, 2), (5, 2, 1), (5, 2, 3), (5, 4, 2), (6, 6, 6), (8, 1, 8)]:
        draws = list(itertools.combinations(range(n), k))
        expected = sum(any(i < c for i in d) for d in draws) / len(draws)
        assert eapo.pass_at_k(n, c, k) == pytest.approx(expected)
    assert eapo.pass_at_k(1024, 512, 512) == pytest.approx(1.0)


def test_groups_that_agree_are_replaced_up_to_the_cap(monkeypatch):
    """Problem i is always right if i % 3 == 0, always wrong if 1, else mixed. The first round of 6
    keeps 2, so 4 more are tried, and so on, until 6 are kept or the rounds are used up. Then every
    kept group is in exactly one mini-batch, whole, and no other is in any."""
    def fake(run, numbered, what, n, temperature, top_p):
        kinds = torch.tensor([p % 3 for _, p in numbered]).repeat_interleave(n)
        right = torch.where(kinds == 2, torch.arange(len(kinds)) % 2, kinds == 0).bool()
        ids = torch.tensor([p for _, p in numbered]).repeat_interleave(n)[:, None].expand(-1, 2)
        lens = torch.ones(len(kinds), dtype=torch.long)
        return Batch(ids, lens, lens, right=right, number=ids[:, 0])
    monkeypatch.setattr(eapo, "attempt", fake)
    for cap, tried in ((0, 6), (1, 10), (20, None)):
        run = a_run(None, "--prompts-per-step", 6, "--group-size", 4, "--resample", cap,
                    "--prompts-per-minibatch", 2)
        numbers = iter(range(1000))
        stream = type("", (), {"take": lambda self, n: [(i, i) for i in
                                                        itertools.islice(numbers, n)]})()
        batch = eapo.roll_out(run, stream)
        assert batch.kept.equal(batch.number % 3 == 2)
        kept = batch.number[batch.kept].tolist()
        assert len(batch.ids) == 4 * tried if tried else len(kept) == 24
        minis = list(eapo.mini_batches(run, batch))
        seen = [p for mini in minis for p in mini.ids[:, 0].tolist()]
        assert seen == kept and max(len(m.ids) for m in minis) <= 8


TOY = ["--warmup-steps", 0, "--prompts-per-step", 8, "--prompts-per-minibatch", 4,
       "--max-response-tokens", 8, "--learning-rate", 1e-3]


def test_twenty_steps_on_a_toy_task_raise_the_reward(tmp_path, monkeypatch):
    """A random model, and a verifier that wants a "=" in the first 8 characters. A uniform policy
    manages that in 1 - (17/18)^8 = 0.37 of its responses; without learning it stays about there."""
    monkeypatch.setattr(eapo, "is_correct", lambda text, gold: "=" in text)
    eapo.main([*map(str, TOY), "--steps", "20", "--eval-every", "0",
               "--out", str(tmp_path / "run")])
    rates = [m["solve_rate"] for m in rows_of(tmp_path) if m["step"]]
    assert len(rates) == 20 and rates[0] < 0.6 and sum(rates[-3:]) / 3 > 0.9


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """The same command twice, with exams, a warm-up, uneven micro-batches and resampling."""
    paths = [tmp_path_factory.mktemp(x) for x in "ab"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eapo, "is_correct", lambda text, gold: len(text) % 2 == 1)
        for path in paths:
            eapo.main([*map(str, TOY), "--steps", "3", "--eval-every", "2", "--warmup-steps", "3",
                       "--resample", "1", "--out", str(path / "run")])
    return paths


def test_the_same_seed_gives_the_same_metrics_but_for_timings(two_runs):
    one, two = ([{k: v for k, v in m.items() if "second" not in k} for m in rows_of(p)]
                for p in two_runs)
    assert one == two and [m["step"] for m in one] == [0, 1, 2, 3]


def test_metrics_hold_what_the_readme_promises(two_runs):
    base, first, second, last = rows_of(two_runs[0])
    for key in ("step reward solve_rate entropy response_tokens response_length truncated "
                "groups_all_right groups_all_wrong loss grad_norm clip_fraction seconds "
                "seconds_sample seconds_score seconds_update tokens_per_second peak_memory_bytes "
                "tokens/PHR advantage/NHR").split():
        assert key in first, key
    for m in (base, second, last):
        assert 0 <= m["eval/addition/avg@8"] <= m["eval/addition/pass@8"] <= 1
    assert "eval/addition/avg@8" not in first
    assert sum(second[f"tokens/{q}"] for q in eapo.QUADRANTS) == pytest.approx(1, abs=1e-4)
    assert sum(second[f"advantage/{q}"] for q in eapo.QUADRANTS) == pytest.approx(1, abs=1e-4)


def test_the_trained_model_is_an_ordinary_folder_that_trains_on(two_runs, tmp_path):
    folder = two_runs[0] / "run" / "model"
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert os.path.exists(folder / "model.safetensors") and lm.dtype == torch.float32
    eapo.main(["--model", str(folder), "--train-data", "addition", "--eval-every", "0",
               "--steps", "1", "--prompts-per-step", "2", "--max-response-tokens", "8",
               "--out", str(tmp_path / "run")])
    assert rows_of(tmp_path)[-1]["groups"] >= 2


def test_looking_does_not_change_the_run(tmp_path):
    """Two exams of one model give the same answers, and leave the random generator as it was."""
    cfg = config(tmp_path, "--max-response-tokens", 8)
    run = eapo.load(cfg, eapo.World(cfg), str(tmp_path))
    run.exams = {"x": eapo.load_problems(run, "addition", "exam")[:4]}
    one = eapo.exam(run, 0)
    torch.rand(1)                               # a step of training in between
    state = torch.get_rng_state()
    assert eapo.exam(run, 1) == one and torch.get_rng_state().equal(state)
    rows = [json.loads(line) for line in open(tmp_path / "responses.jsonl")]
    assert len(rows) == 64 and all(x["response"] == y["response"]
                                   for x, y in zip(rows[:32], rows[32:]))


def test_a_folder_that_holds_a_run_is_not_written_over(two_runs):
    with pytest.raises(SystemExit, match="holds the metrics of another run"):
        cfg = config(two_runs[0])
        eapo.open_folder(cfg, eapo.World(cfg))


def test_bf16_matmuls_sample_from_a_fresh_copy_and_score_with_the_policy(tmp_path, monkeypatch):
    """The way of a GPU, here on the CPU: after each update the bf16 copy holds today's weights, and
    old log-probabilities come from the policy, so the first mini-batch has rho = 1 and no clip."""
    seen = []
    real = eapo.sample_loop
    def spy(lm, *args):
        seen.append((lm.dtype, lm.get_input_embeddings().weight.float().sum().item()))
        return real(lm, *args)
    def world(cfg, real=eapo.World):
        made = real(cfg)
        made.bf16 = made.sharded = True
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(),
                                                 rank=0, world_size=1)
        return made
    monkeypatch.setattr(eapo, "World", world)
    monkeypatch.setattr(eapo, "sample_loop", spy)
    monkeypatch.setattr(eapo, "is_correct", lambda text, gold: len(text) % 2 == 1)
    eapo.main([*map(str, TOY), "--steps", "3", "--eval-every", "0",
               "--learning-rate", "1e-2", "--prompts-per-minibatch", "8", "--warmup-steps", "2",
               "--out", str(tmp_path / "run")])
    start = eapo.tiny_model(0)[0].bfloat16().get_input_embeddings().weight.float().sum().item()
    assert all(dtype == torch.bfloat16 for dtype, _ in seen)
    assert len({start, *(w for _, w in seen)}) == 4     # after the warm-up too
    assert [m["clip_fraction"] for m in rows_of(tmp_path) if m["step"]] == [0, 0, 0]
    assert all(m["seconds_score"] > 0 for m in rows_of(tmp_path) if m["step"])
    assert all(1e-5 < m["sampler_gap"] < 0.1 for m in rows_of(tmp_path) if m["step"])


def test_scoring_anew_takes_both_numbers_from_the_policy_and_ships_each_once():
    """Processes send each other the batch pickled: two views of one storage would go twice. Rows
    of a micro-batch are cut to their own longest."""
    run = a_run(tiny_lm(), "--microbatch-tokens", 8)
    batch = eapo.pack([[5, 7]] * 3, [[6] * n for n in (1, 5, 2)])
    eapo.rescore(run, batch, 0.7)
    for found, want in zip((batch.logp, batch.H), run.policy(batch, 0.7)):
        torch.testing.assert_close(found, want.detach())
        assert found.untyped_storage().nbytes() == 4 * found.numel()
    few = batch.rows(torch.tensor([0, 2]))
    assert few.ids.shape == (2, 4) and few.H.shape == (2, 2)


def test_every_prompt_of_every_step_and_exam_has_dice_of_its_own(tmp_path, monkeypatch):
    """Seeds differ by the number of the prompt, by training or exam, and by the run's seed."""
    seeds, real = [], eapo.sample_loop
    monkeypatch.setattr(eapo, "sample_loop", lambda *args: seeds.extend(args[-1]) or real(*args))
    for seed in (0, 1):
        cfg = config(tmp_path, "--max-response-tokens", 2, "--seed", seed)
        run = eapo.load(cfg, eapo.World(cfg), str(tmp_path))
        for what in ("train", "exam"):
            eapo.attempt(run, [(n, Problem("x", "1", ids=[5])) for n in range(3)], what, 2, 1., 1.)
    assert len(set(seeds)) == len(seeds) == 12


def test_overlong_responses_lose_up_to_one(tmp_path, monkeypatch):
    """L_max 8, the last half: lengths 4, 6, 8 of right responses earn 1, 1 - 2/4, 1 - 4/4."""
    cfg = config(tmp_path, "--max-response-tokens", 8, "--overlong", 0.5)
    run = eapo.load(cfg, eapo.World(cfg), str(tmp_path))
    batch = eapo.pack([[5]] * 3, [[6] * n for n in (4, 6, 8)])
    batch.logp = batch.H = torch.zeros(3, 8)
    monkeypatch.setattr(eapo, "sample_loop", lambda *args: batch)
    monkeypatch.setattr(eapo, "is_correct", lambda text, gold: True)
    numbered = [(0, Problem("x", "1", ids=[5]))]
    assert eapo.attempt(run, numbered, "test", 3, 1.0, 1.0).reward.tolist() == [1, 0.5, 0]


# ---- many processes, checkpoints, the plan -------------------------------------------------------

SMALL = ["--warmup-steps", "4", "--prompts-per-step", "4", "--group-size",
         "4", "--prompts-per-minibatch", "2", "--max-response-tokens", "10", "--learning-rate",
         "1e-3", "--eval-every", "3", "--steps", "3"]
CHILD = """
import sys, torch, eapo
torch.set_num_threads(1)
eapo.is_correct = lambda text, gold: len(text) % 2 and (sys.argv[1] == "odd" or "77" in text)
eapo.addition, real = (lambda split: real(split, 64, 64, 1)), eapo.addition
eapo.main(sys.argv[2:])
"""


def start(what, args, processes=1):
    """eapo in processes of its own, with an easy verifier and few problems: a Popen."""
    child = os.path.join(os.path.dirname(args[args.index("--out") + 1]), "child.py")
    with open(child, "w") as f:
        f.write(CHILD)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port",
              str(random.randint(20000, 40000))] if processes > 1 else []
    env = os.environ | {"PYTHONPATH": os.path.dirname(eapo.__file__), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *launch, child, what, *args], env=env,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finished(*processes):
    for p in processes:
        _, errors = p.communicate(timeout=300)
        assert p.returncode == 0, errors[-2000:]


def metrics_and_weights(folder):
    rows = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    rows = [{k: v for k, v in row.items() if "second" not in k} for row in rows]
    return rows, safetensors.torch.load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize("tied", [True, False])
def test_two_processes_do_what_one_does(tmp_path, tied):
    """The same losses, gradient norms and metrics within 1e-5, the same weights after 3 steps
    within 1e-4. Responses are of uneven length; untied, few responses are right, so that in some
    steps no group disagrees, and in others no group of one of the processes; the two offload."""
    model = ["--model", "tiny"]
    if not tied:
        lm, tokenizer = eapo.tiny_model(0)
        config = lm.config
        config.tie_word_embeddings = False
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "lm")
        tokenizer.save_pretrained(tmp_path / "lm")
        model = ["--model", str(tmp_path / "lm"), "--train-data", "addition", "--eval-data",
                 "addition", "--warmup-data", "addition", "--resample", "1", "--top-p", "1"]
    what, steps = ("odd", 3) if tied else ("rare", 6)
    args = [[*model, *SMALL, "--steps", str(steps), "--out", str(tmp_path / name)]
            for name in ("one", "two")]
    offload = [] if tied else ["--offload"]
    finished(start(what, args[0]), start(what, args[1] + offload, processes=2))
    (rows, weights), (rows_2, weights_2) = (metrics_and_weights(tmp_path / x)
                                            for x in ("one", "two"))
    assert [row["step"] for row in rows] == list(range(steps + 1))
    for one, two in zip(rows, rows_2):
        assert one == pytest.approx(two, abs=1e-5, rel=1e-5)
    mixed = [row["groups"] - row["groups_all_wrong"] - row["groups_all_right"] for row in rows[1:]]
    assert sum(mixed) > 0 and (tied or 1 in mixed and 0 in mixed)
    assert weights.keys() == weights_2.keys()
    for name, w in weights.items():
        torch.testing.assert_close(w, weights_2[name], rtol=0, atol=1e-4)


def test_a_run_that_was_killed_and_resumed_is_the_run_that_was_not(tmp_path):
    """kill -9 after the checkpoint of step 2, --resume, and 4 steps in all: bit for bit the metrics
    (but timings) and weights of 4 steps in one go."""
    args = ["--model", "tiny", *SMALL, "--steps", "4", "--save-every", "2", "--out"]
    finished(start("odd", [*args, str(tmp_path / "whole")]))
    killed = start("odd", [*args[:-1], "--steps", "4000", "--out", str(tmp_path / "killed")])
    path = tmp_path / "killed" / "checkpoint" / "step-000002"
    while not path.exists() and killed.poll() is None:
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    for later in (tmp_path / "killed" / "checkpoint").iterdir():
        if later.name != "step-000002":         # it may have come further: go on from step 2
            shutil.rmtree(later)
    finished(start("odd", ["--resume", str(tmp_path / "killed"), "--steps", "4", "--out",
                            str(tmp_path / "killed")]))
    (rows, weights), (rows_2, weights_2) = (metrics_and_weights(tmp_path / x)
                                            for x in ("whole", "killed"))
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4] and rows == rows_2
    assert all(w.equal(weights_2[name]) for name, w in weights.items())
    assert sorted(os.listdir(tmp_path / "whole" / "checkpoint")) == ["step-000002", "step-000004"]


def test_a_signal_ends_a_run_after_its_step_and_it_can_go_on(tmp_path):
    """SIGTERM in the middle of RL: a checkpoint, a model, and exit 0."""
    out = tmp_path / "run"
    args = ["--model", "tiny", *SMALL, "--steps", "4000", "--out", str(out)]
    process = start("odd", args)
    while process.poll() is None and (not (out / "metrics.jsonl").exists()
                                      or len(open(out / "metrics.jsonl").readlines()) < 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    finished(process)
    step = len(open(out / "metrics.jsonl").readlines()) - 1
    assert os.listdir(out / "checkpoint") == [f"step-{step:06}"] and (out / "model").exists()
    finished(start("odd", ["--resume", str(out), "--steps", str(step + 1), "--out", str(out)]))
    assert sorted(os.listdir(out / "checkpoint"))[-1] == f"step-{step + 1:06}"


def test_resuming_with_other_settings_or_data_is_refused(tmp_path, two_runs):
    folder = str(two_runs[0] / "run")
    with pytest.raises(SystemExit, match="ran with other settings than .*seed.: 5"):
        eapo.parse_args(["--resume", folder, "--seed", "5"])
    assert eapo.parse_args(["--resume", folder, "--steps", "9"]).steps == 9
    with pytest.raises(SystemExit, match="no such file"):
        eapo.parse_args(["--resume", str(tmp_path)])
    run, stream = a_run(), eapo.Stream([Problem("1+1", "2")], 0)
    run.out = str(tmp_path)
    optimizer = torch.optim.AdamW(run.policy.parameters())
    with pytest.raises(SystemExit, match="holds no checkpoint"):
        eapo.open_folder(eapo.Config(resume="x", out=str(tmp_path)), run.world)
    assert not (tmp_path / "config.json").exists()                  # nothing is written before
    eapo.save_checkpoint(run, optimizer, stream, 3)
    os.makedirs(tmp_path / "checkpoint" / "step-000009.new")        # killed while it was written
    assert eapo.load_checkpoint(run, optimizer, stream) == 3
    with pytest.raises(SystemExit, match="its problems differ"):
        eapo.load_checkpoint(run, optimizer, eapo.Stream([Problem("1+2", "3")], 0))


def test_an_architecture_with_names_of_its_own_is_planned_for_and_trained(tmp_path, monkeypatch):
    """GPT-2's config has no intermediate_size and no num_key_value_heads."""
    monkeypatch.setattr(eapo, "is_correct", lambda text, gold: len(text) % 2 == 1)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=18, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=None,
        eos_token_id=1)).save_pretrained(tmp_path)
    eapo.tiny_model(0)[1].save_pretrained(tmp_path)
    eapo.main(["--model", str(tmp_path), "--train-data", "addition", "--eval-every", "0", "--steps",
               "1", "--prompts-per-step", "4", "--resample", "0", "--max-response-tokens", "8",
               "--out", str(tmp_path / "run")])
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["step"] == 1 and row["grad_norm"] > 0


def test_the_plan_counts_what_the_paper_run_holds(tmp_path, monkeypatch, capsys):
    """Qwen2.5-Math-7B has 7.6e9 parameters: 30.5 GB of weights, as much of gradients, 61 of
    moments. No machine of ours holds them: one line says so, with a remedy."""
    transformers.Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4,
        tie_word_embeddings=False).save_pretrained(tmp_path)
    cfg = eapo.parse_args(["--model", str(tmp_path)])
    monkeypatch.setattr(os, "sysconf", lambda name: 10 ** 5)        # 10 GB
    with pytest.raises(SystemExit, match="needs about .* GB of 10: use a smaller model"):
        eapo.plan(cfg, eapo.World(cfg), tmp_path)
    said = capsys.readouterr().out
    assert "7615.6M parameters" in said and "weights 30.46, gradients 30.46, moments 60.92" in said
    # 2 (keys, values) x 28 layers x 4 heads x 128 x 4 bytes = 115 KB a token, 4096 tokens, 8 rows
    # a group; no room for more than one; logits of 8 rows
    cache, logits = 2 * 28 * 4 * 128 * 4 * 4096 * 8, 40 * 152064 * 8
    assert f"groups {(cache + logits) / 1e9:.2f}" in said


def test_a_disk_without_room_for_three_checkpoints_is_told_before_the_run(tmp_path, monkeypatch):
    """A tiny model as a folder: 16 bytes a parameter for the model and one checkpoint of weights
    and two moments, in fp32, 40 with three of them."""
    lm, tokenizer = eapo.tiny_model(0)
    lm.save_pretrained(tmp_path)
    size = sum(p.numel() for p in lm.parameters())
    for flags, needs in ((["--save-every", "5"], 40 * size), (["--save-every", "0"], 16 * size)):
        cfg = eapo.parse_args(["--model", str(tmp_path), *flags])
        for left, fits in ((needs - 1, False), (needs + 1, True)):
            monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=left))
            with contextlib.nullcontext() if fits else pytest.raises(SystemExit,
                                                                     match="another --out"):
                eapo.plan(cfg, eapo.World(cfg), tmp_path)


def test_as_many_groups_are_sampled_at_a_time_as_memory_holds():
    """100 numbers in the cache for each token: 2 x 1 layer x 2 heads x 25, of 2 bytes; 10 tokens, 4
    rows: 8,000 bytes, and 4 x 40 for a vocabulary of one. 4/5 of 102,000 bytes hold ten."""
    c = types.SimpleNamespace(num_hidden_layers=1, num_key_value_heads=2, hidden_size=100,
                              num_attention_heads=4, vocab_size=1)
    assert eapo.groups_at_once(c, 2, 10, 4, 102000) == (10, 8160)
    assert eapo.groups_at_once(c, 2, 10, 4, 101900)[0] == 9
    assert eapo.groups_at_once(c, 2, 10, 4, 10 ** 9)[0] == 128          # 512 rows
    assert eapo.groups_at_once(c, 2, 10, 4, -1)[0] == 1 == eapo.groups_at_once(c, 2, 10, 999, 9)[0]


def test_attention_of_one_token_is_that_of_sdpa():
    """8 query heads on 2 key heads, rows of uneven length: as with keys repeated by hand."""
    torch.manual_seed(0)
    q, (k, v) = torch.randn(3, 8, 1, 5), torch.randn(2, 3, 2, 7, 5)
    mask = torch.arange(7) >= torch.tensor([0, 2, 6])[:, None]                # left padding
    for seen in (mask[:, None, None], None):
        want = torch.nn.functional.scaled_dot_product_attention(
            q, k.repeat_interleave(4, 1), v.repeat_interleave(4, 1), attn_mask=seen)
        got, _ = eapo.attention_of_one_token(None, q, k, v, seen, scaling=5 ** -0.5)
        torch.testing.assert_close(got, want.transpose(1, 2))


def test_log_probabilities_entropies_and_backward_never_hold_full_logits(monkeypatch):
    """Tensors kept for backward, and the largest one made, for 512 tokens at V = 4096, beyond the
    head's weight and gradient: under 1/8 of what full logits take."""
    V, D, M = 4096, 32, 512
    head, y = torch.nn.Linear(D, V, bias=False), torch.randint(V, (M,))

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    sizes.append(x.numel())
            return out

    def measured(logp_and_entropy):
        sizes.clear()
        kept = []
        h = torch.randn(M, D, requires_grad=True)
        with Largest(), torch.autograd.graph.saved_tensors_hooks(
                lambda x: kept.append(x.numel()) or x, lambda x: x):
            logp, H = logp_and_entropy(h)
            (logp.sum() + H.sum()).backward()
        return max(n for n in sizes if n != V * D), sum(n for n in kept if n != V * D)

    sizes = []
    monkeypatch.setattr(eapo, "CHUNK", 32 * V)
    full = measured(lambda h: eapo.log_prob_and_entropy(head(h), y, 1.0))
    ours = measured(lambda h: eapo.ChunkedLogProbAndEntropy.apply(h, head.weight, y, 1.0))
    assert full[0] >= M * V and 8 * ours[0] <= full[0]
    assert 8 * ours[1] <= full[1]


@pytest.mark.parametrize("gpus, launched", [("0", "8"), ("2", "2"), ("1", None)])
def test_on_several_gpus_the_command_starts_itself_once_a_gpu(monkeypatch, gpus, launched):
    """8 GPUs are seen: all are used, or --gpus of them; one needs no launcher, and what a launcher
    started starts no other."""
    calls = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(os, "execv", lambda path, command: calls.append(command))
    monkeypatch.setattr(eapo, "train", lambda cfg: calls.append("train"))
    monkeypatch.setattr(eapo, "parse_args", lambda argv: eapo.Config(gpus=int(gpus), model="x"))
    eapo.main(["--gpus", gpus, "--steps", "5"])
    if launched:
        assert calls[0][1:6] == ["-m", "torch.distributed.run", "--standalone",
                                 "--nproc-per-node", launched]
        assert calls[0][7:] == ["--gpus", gpus, "--steps", "5"]
    assert (calls[0] == "train") == (launched is None)
    monkeypatch.setenv("RANK", "0")
    eapo.main(["--gpus", gpus])
    assert calls[-1] == "train"
    monkeypatch.setattr(eapo, "parse_args", lambda argv: eapo.Config(gpus=9))
    with pytest.raises(SystemExit, match="--gpus 9: this machine has 8"):
        eapo.main([])


def test_the_tiny_model_takes_two_threads_at_most_unless_told_otherwise(monkeypatch):
    """On 16 cores 2, on 1 core 1; OMP_NUM_THREADS and other models have torch's own number."""
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(eapo, "train", lambda cfg: None)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for cores in (16, 1):
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        eapo.main([])
    eapo.main(["--model", "x"])
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    eapo.main([])
    assert threads == [2, 1]


def test_a_process_that_waits_in_vain_names_the_phase_and_itself(monkeypatch):
    def all_gather_object(parts, x):
        raise RuntimeError("timed out")
    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    run = a_run()
    run.world.size, run.world.phase = 2, "update"
    with pytest.raises(RuntimeError) as e:
        run.world.gather(1)
    assert "process 0 of 2, phase update" in e.value.__notes__[0]


def test_a_first_step_that_taught_nothing_is_told(tmp_path, capsys):
    for norm, said in ((0, 1), (0.1, 0)):
        run = a_run()
        run.out = str(tmp_path)
        eapo.log(run, 1, dict(truncated=0, grad_norm=norm, sampler_gap=0))
        assert capsys.readouterr().out.count("nothing was learned") == said


# ---- exams and the report ------------------------------------------------------------------------

def test_an_exam_alone_leaves_verdicts_that_can_be_checked(tmp_path, monkeypatch):
    """Two sets in one go; every response is kept with its verdict, which the verifier repeats;
    Avg@k and Pass@k are those of the verdicts, with intervals that hold them."""
    monkeypatch.setattr(eapo, "is_correct", lambda text, gold: (len(text) + int(gold)) % 2 == 0)
    for name in "AB":
        (tmp_path / f"{name}.jsonl").write_text("".join(
            json.dumps({"problem": p.problem, "answer": p.answer}) + "\n"
            for p in eapo.addition("exam")[:5]))
    eapo.main(["--eval-only", "--eval-data", f"{tmp_path}/A.jsonl,{tmp_path}/B.jsonl",
               "--eval-samples", "4", "--out", str(tmp_path / "run")])
    rows = [json.loads(line) for line in open(tmp_path / "run" / "responses.jsonl")]
    assert [(row["set"], row["problem"]) for row in rows] == [
        (name, p.problem) for name in "AB" for p in eapo.addition("exam")[:5] for _ in range(4)]
    assert all(eapo.is_correct(row["response"], row["answer"]) == row["right"] for row in rows)
    found = json.load(open(tmp_path / "run" / "eval.json"))
    for name in "AB":
        right = [row["right"] for row in rows if row["set"] == name]
        assert found[f"eval/{name}/avg@4"] == pytest.approx(sum(right) / 20)
        assert found[f"eval/{name}/pass@1"] == pytest.approx(sum(right) / 20)
        assert found[f"eval/{name}/pass@4"] == sum(any(right[i:i + 4]) for i in range(0, 20, 4)) / 5
        solved = torch.tensor(right).view(5, 4)
        for key, shares in (("avg", solved.float().mean(1)), ("pass", solved.any(1).float())):
            low, high = eapo.interval(shares).tolist()
            assert found[f"eval/{name}/{key}_low"] == pytest.approx(low, abs=1e-5)
            assert found[f"eval/{name}/{key}_high"] == pytest.approx(high, abs=1e-5)


def test_the_interval_of_a_mean_is_that_of_the_normal_law():
    """100 questions, 36 of them right: .36 +- 1.96 sqrt(.36 x .64 / 100) = .266 to .454."""
    low, high = eapo.interval(torch.tensor([1.] * 36 + [0.] * 64))
    assert float(low) == pytest.approx(.266, abs=.015)
    assert float(high) == pytest.approx(.454, abs=.015)


def test_accounting_adds_up(two_runs):
    """Shares of the four quadrants sum to 1; a run leaves a report with its own tokens in it."""
    last = rows_of(two_runs[0])[-1]
    for what in ("tokens", "advantage", "entropy"):
        assert sum(last[f"{what}/{q}"] for q in eapo.QUADRANTS) == pytest.approx(1, abs=1e-4)
    assert any(last[f"drift/{q}"] for q in eapo.QUADRANTS) and last["information"] > 0
    page = (two_runs[0] / "run" / "report.html").read_text(encoding="utf-8")
    assert "Token microscope" in page and 'class="PHR"' in page and "rho 1.0" in page
    # with c of G right, A is sqrt((G - c)(G - 1) / (c G)) and - sqrt(c (G - 1) / ((G - c) G))
    low, high = sorted({float(x.split(",")[0]) for x in page.split(" nats, A ")[1:]})
    G = json.load(open(two_runs[0] / "run" / "config.json"))["group_size"]
    assert low * high == pytest.approx(-(G - 1) / G, abs=0.005)


EVIL = "<script>alert(1)</script>\"'><img onerror=x>&\n\r\t\0\x1b\u202e\ud800"


class Page(html.parser.HTMLParser):
    """Tags with attributes, and text, as a browser would read them."""
    def __init__(self, source):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def report_rows(steps=3, **more):
    rows = [{"step": 0, "eval/a/b/avg@8": .4, "eval/a/b/avg_low": .3, "eval/a/b/avg_high": .5}]
    return rows + [dict(step=s, solve_rate=s / 10, entropy=.1, **more,
                        **{f"{key}/{q}": .25 for q in eapo.MARKS for key in ("tokens", "drift")})
                   for s in range(1, steps + 1)]


def a_response(text):
    return text, [(text, 4, .5, math.log(2), -1., -1.1, 1.3, True)]


def test_what_a_model_or_a_label_says_can_add_no_tag_attribute_or_control_character():
    tame, evil = [Page(eapo.report({x: [report_rows(**{f"eval/{x}/pass@2": .5})]}, [a_response(x)]))
                  for x in ("x", EVIL)]
    assert [(tag, attrs.keys()) for tag, attrs in tame.tags] == [
        (tag, attrs.keys()) for tag, attrs in evil.tags]
    assert "script" not in {tag for tag, _ in evil.tags}
    text = "".join(evil.texts)
    assert "<script>alert(1)" in text and "↵\n\\r\\t\\x00\\x1b\\u202e\\ud800" in text
    assert not set(eapo.report({EVIL: [report_rows()]})) & set("\0\t\r\x1b\u202e\ud800")


def test_the_page_needs_nothing_from_elsewhere_and_may_not_ask():
    page = eapo.report({"x": [report_rows()]}, [a_response("x")])
    assert not any(x in page for x in ("src=", "href=", "url(", "@import", "<script", "<link"))
    assert "default-src 'none'" in page
    page.encode()


def test_a_token_carries_its_numbers_quadrant_and_shade():
    """H = log 2: half of the half that an endless H would get is 0.25."""
    (a,) = [a for a in Page(eapo.report({}, [a_response("x")])).all("a") if "data-t" in a]
    assert a["class"] == "NHR" and a["style"] == "--h: 0.25" and a["tabindex"] == "0"
    assert a["data-t"] == ("NHR, p 0.500, H 0.693 nats, A -1.000, A^CA -1.100, rho 1.300, clipped")


def test_text_is_made_visible():
    assert eapo.shown("a\n b\t\xa0é") == "a↵\n b\\t\\xa0é"


def test_curve_of_one_seed_has_the_interval_and_of_several_their_range():
    assert eapo.curve([report_rows()], "eval/a/b/avg@8") == [(0, .3, .4, .5)]
    rows, key = report_rows(1), "eval/a/b/avg@8"
    assert eapo.curve([rows, rows, rows[:1] + [dict(step=1, solve_rate=.4)]], "solve_rate") == [
        (1, .1, pytest.approx(.2), .4)]
    assert eapo.curve([rows, [{"step": 0, key: .8}]], key)[0][1:] == (.4, pytest.approx(.6), .8)
    assert eapo.curve([[dict(step=1, x=math.nan), dict(step=2)]], "x") == []
    row = {"step": 0, "e/avg@8": .4, "e/pass@8": .9, "e/pass@1": .4, "e/pass_low": .8,
           "e/pass_high": 1}                                        # of pass@8 alone
    assert eapo.curve([[row]], "e/pass@8") == [(0, .8, .9, 1)]
    assert eapo.curve([[row]], "e/pass@1") == [(0, .4, .4, .4)]


@pytest.mark.parametrize("low, high, expected", [
    (0, 1, "0 0.2 0.4 0.6 0.8 1"), (0, 30, "0 10 20 30"), (0, 220, "0 50 100 150 200 250"),
    (-.01, .01, "-0.01 -0.005 0 0.005 0.01"), (0, .3, "0 0.1 0.2 0.3"),
    (7, 7, "7 7.2 7.4 7.6 7.8 8")])
def test_ticks_are_round_and_enclose_the_data(low, high, expected):
    assert " ".join(f"{x:.6g}" for x in eapo.ticks(low, high)) == expected


def test_charts_without_data_are_left_out_and_a_histogram_may_have_empty_bins():
    page = eapo.report({"x": [report_rows()], "y": [[]]}, histogram=([1, 0], [.5, .5]))
    assert "Response length" not in page and "Solve rate" in page and "log scale" in page
    assert "nan" not in page and "<section>" not in eapo.report({})


def folder(path, rows=(), **config):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(dict(config, out=str(path), versions={})))
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_compare_groups_seeds_and_labels_by_what_differs(tmp_path):
    a, b = [folder(tmp_path / f"a{s}", [{"step": s}], alpha=.2, seed=s) for s in (0, 1)]
    c = folder(tmp_path / "c", [{"step": 2}], alpha=.0, seed=0, phi=1)
    assert eapo.compare([a, b + "/", a]) == {"a0": [[{"step": 0}], [{"step": 1}]]}
    assert eapo.compare([a, b, c]) == {"alpha 0.2": [[{"step": 0}], [{"step": 1}]],
                                  "alpha 0.0, phi 1": [[{"step": 2}]]}


def test_compare_does_not_write_over_the_report_of_a_run(tmp_path):
    run = folder(tmp_path / "a", [{"step": 0}])
    with pytest.raises(SystemExit, match="--out is a run's folder"):
        eapo.main(["--compare", run, "--out", run])


def test_compare_says_in_one_line_what_is_wrong_with_a_folder(tmp_path):
    broken = folder(tmp_path / "broken")
    (tmp_path / "broken" / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    for bad in (str(tmp_path / "none"), broken):
        with pytest.raises(SystemExit, match="^eapo: cannot use") as e:
            eapo.compare([bad])
        assert "\n" not in str(e.value) and bad in str(e.value)


def test_the_table_of_parts_in_the_readme_has_the_right_lines():
    here = os.path.dirname(os.path.abspath(eapo.__file__))
    parts = [(int(line[7:].partition(".")[0]), n)
             for n, line in enumerate(open(eapo.__file__, encoding="utf-8"), 1)
             if line.startswith("# Part ")]
    readme = open(os.path.join(here, "README.md"), encoding="utf-8").read()
    rows = [line.split("|")[1:3] for line in readme.splitlines() if line.startswith("| [")]
    assert [(int(part.split("]")[0].strip(" [")), int(line)) for part, line in rows] == parts
    assert [part for part, _ in parts] == list(range(1, 11))


@pytest.mark.parametrize("args, says", [
    (["--quadrants", "PHX"], "no quadrant is called PHX, only PHR, PLR, NLR, NHR"),
    (["--method", "grpo", "--without", "PHR"], "--without is for --method eapo"),
    (["--temperature", "0"], "--temperature must be above 0"),
    (["--resample", "-1"], "0 or more"), (["--overlong", "8"], "is a share"),
    (["--learning-rate", "-1"], "0 or more"), (["--seed", "-1"], "0 or more"),
    (["--train-data", "none.jsonl"], "cannot use none.jsonl: .*No such file"),
    (["--eval-data", "addition, addition"], "two sets addition: rename a file"),
    (["--model", "no folder"], "cannot use no folder: "),
    (["--max-response-tokens", "9999"], "reads 512 tokens, .* lower --max-response-tokens"),
    (["--out", os.path.abspath(__file__) + "/run"], "cannot use .*/run: .*Not a directory"),
    (["--compare", "a,b"], "name folders of runs.*No such file")])
def test_mistakes_of_newcomers_are_met_with_one_line(tmp_path, args, says):
    out = [] if "--out" in args else ["--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match=says) as e:
        eapo.main([*args, *out])
    assert "\n" not in str(e.value) and str(e.value).startswith("eapo: ")


def test_the_help_fits_two_screens_and_names_every_setting(capsys):
    with pytest.raises(SystemExit):
        eapo.parse_args(["--help"])
    said = capsys.readouterr().out
    assert len(said.splitlines()) <= 90
    assert all(f"--{f.replace('_', '-')}" in said for f in eapo.Config.__dataclass_fields__)


def test_no_function_is_longer_than_fifty_lines():
    tree = ast.parse(open(eapo.__file__, encoding="utf-8").read())
    long = [f.name for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)
            and f.end_lineno - f.lineno >= 50]
    assert not long


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__, *sys.argv[1:]]))

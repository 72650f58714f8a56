"""The claims of eapo.py, one test each: `pytest`, or `pytest -m "not slow"` for the quick ones.

Expected values are worked out by hand in the docstring, or come from something independent of the
code under test: autograd, a naive loop, transformers' own generate. No download, no GPU.
"""
import concurrent.futures
import glob
import gzip
import html.parser
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import warnings

import datasets
import pytest
import safetensors.torch
import torch
import transformers
from pytest import approx
from torch import tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.testing import assert_close

import eapo
from eapo import (Policy, Problem, Stream, clipped_tokens, entropy_aware_advantages, entropy_score,
                  group_advantages, is_correct, load_problems, make_batch, policy_loss, quadrants,
                  sample_and_mark, sanity_check, slots_that_fit, tiny_model, token_entropy,
                  token_weights)


ALPHA = 0.2
PHI = 2.0
CLIPS = {"clip_low": 0.2, "clip_high": 0.28, "clip_c": 3.0}
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
warnings.filterwarnings("ignore", "Unknown pytest.mark.slow")   # no other file could register it
torch.set_num_threads(1)


# ---- helpers -------------------------------------------------------------------------------------

def tiny_lm(seed=0, vocab=32, tied=True):
    """A random Qwen2 whose logits are far from uniform, so that errors show. Its pad is its eos."""
    torch.manual_seed(seed)
    config = transformers.Qwen2Config(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
        initializer_range=0.3, bos_token_id=None, eos_token_id=1, pad_token_id=1)
    return transformers.Qwen2ForCausalLM(config).eval()


def tiny_batch(n=4, vocab=32, seed=0):
    """n rows of uneven prompts and responses; the last token of each response is the stop token."""
    torch.manual_seed(seed)
    prompts = []
    responses = []
    for i in range(n):
        prompt = torch.randint(2, vocab, (2 + i % 3,))
        response = torch.randint(2, vocab, (1 + 2 * i % 7,))
        prompts.append(prompt.tolist())
        responses.append(response.tolist() + [1])
    return make_batch(prompts, responses)


def batch_of(*lengths):
    """Responses of these lengths to prompts of one token."""
    prompts = [[5] for _ in lengths]
    responses = [[6] * n for n in lengths]
    return make_batch(prompts, responses)


def mask_of(*lengths):
    """The mask (N, T) of responses of these lengths."""
    return torch.arange(max(lengths)) < tensor(lengths)[:, None]


def random_group_batch(B=3, G=4, T=6, seed=0):
    """rewards, H, mask of B groups in which right and wrong responses and lengths are mixed."""
    torch.manual_seed(seed)
    rewards = tensor([1., -1, -1, 1] * B)
    H = torch.rand(B * G, T) ** 3 * 4
    lengths = torch.randint(1, T + 1, (B * G,))
    mask = torch.arange(T) < lengths[:, None]
    return rewards, H, mask


def settings(*args):
    """The Config of a command line; arguments may be numbers and paths."""
    return eapo.parse_args([str(arg) for arg in args])


def config(tmp_path, *args):
    return settings(*args, "--out", tmp_path / "run")


def a_run(lm=None, *args):
    """A Run of one process on the CPU, around a model that was made here."""
    cfg = settings(*args)
    lm = lm or tiny_lm()
    _, tokenizer = tiny_model(0)
    return eapo.Run(cfg, eapo.World(cfg), None, Policy(lm), tokenizer, [1], lm)


def rows_of(path):
    """The rows of metrics.jsonl of the run in path/run."""
    with open(path / "run" / "metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def responses_of(batch):
    return [batch.response(i) for i in range(len(batch.ids))]


def near(found, expected, within=1e-4):
    """A tensor holds the expected numbers, give or take."""
    expected = torch.as_tensor(expected)
    assert_close(found.float(), expected.float(), atol=within, rtol=0)


def naive(lm, batch, i, temperature=1.0):
    """log p and H of each token of response i from a plain forward pass over its row."""
    start = int(batch.prompt_len[i])
    response = batch.response(i)
    row = batch.ids[i, :start + len(response)]
    logits = lm(row[None]).logits[0, start - 1:-1]
    logp = (logits.float() / temperature).log_softmax(dim=-1)
    H = -(logp.exp() * logp).sum(dim=-1)
    return logp[range(len(response)), response], H


def odd(text, answer):
    """A check that even a random model passes about every other time."""
    return len(text) % 2 == 1


def toy(split):
    """A task of 16 problems, marked by `odd`."""
    problems = []
    for n in range(16):
        problem = Problem(f"{n}+{n}=", solution=f"\\boxed{{{n}}}", check=odd)
        problems.append(problem)
    return problems


@pytest.fixture
def toy_data(monkeypatch):
    monkeypatch.setitem(eapo.TASKS, "toy", toy)


@pytest.fixture
def optimizer_steps():
    """What every step of an optimizer found: the learning rate and the whole gradient."""
    seen = []

    def look(optimizer, args, kwargs):
        group = optimizer.param_groups[0]
        gradient = torch.cat([p.grad.flatten() for p in group["params"]])
        seen.append((group["lr"], gradient))
    handle = register_optimizer_step_pre_hook(look)
    yield seen
    handle.remove()


# ---- advantages ----------------------------------------------------------------------------------

def test_one_right_response_in_four_earns_what_the_three_wrong_ones_lose():
    """r = 1, -1, -1, -1: mean -1/2; deviations 3/2, -1/2 three times; sum of squares 3, over n - 1
    is 1, so std 1 and A = 3/2, -1/2, -1/2, -1/2. With n instead of n - 1 it would be sqrt(3)."""
    A = group_advantages(tensor([1., -1, -1, -1]), group_size=4)
    near(A, [1.5, -.5, -.5, -.5])


def test_equal_rewards_have_no_advantage_at_all():
    """Eight times -1.3 have a mean in fp32 that is not -1.3, and a tiny std to divide by."""
    for reward in (-1.3, .1, .7, 1 / 3):
        assert group_advantages(torch.full((8,), reward), 8).tolist() == [0] * 8


def test_a_group_is_compared_with_itself_only_and_teaches_nothing_if_it_agrees():
    """Three groups, one mixed, one all right, one all wrong: r = 1, -1 has std sqrt(2)."""
    A = group_advantages(tensor([1., -1, 1, 1, -1, -1]), group_size=2)
    near(A, [.70711, -.70711, 0, 0, 0, 0])
    assert A[2:].eq(0).all()


# ---- entropy, quadrants, EAPO --------------------------------------------------------------------

def test_token_entropy_is_log_v_without_an_idea_and_zero_when_sure():
    """Of 1/2, 1/4, 1/4 it is 1/2 log 2 + 2 * 1/4 log 4 = 3/2 log 2. A token forbidden by a logit of
    -inf adds nothing, and the gradient is no nan."""
    H = token_entropy(torch.zeros(3, 50))
    near(H, [math.log(50)] * 3)
    p = tensor([.5, .25, .25])
    near(token_entropy(p.log()), 1.5 * math.log(2))
    sure = tensor([[0., 1000, 0], [-math.inf, 0, -math.inf]], requires_grad=True)
    H = token_entropy(sure)
    H.sum().backward()
    assert H.tolist() == [0, 0]
    assert not sure.grad.isnan().any()


def test_entropy_score_by_hand():
    """One group of two responses, entropies 0 1 2 and 3 (the second ends after one token):
    mu = 1.5, squares 2.25 .25 .25 2.25 = 5, over 3, sigma = 1.29099; (0 - mu)/sigma = -1.1619,
    (1 - mu)/sigma = -.3873. |A| = 2 and phi = 2: the clip is at 1, so -1, -.3873, .3873, 1. With
    alpha = 1/2, half of that is added to A = 2 and taken from A = -2: unsure tokens get more of the
    credit and more of the blame."""
    H = tensor([[0., 1, 2],
                [3, 99, 99]])
    mask = mask_of(3, 1)
    A = tensor([2., -2])
    score = entropy_score(A, H, mask, group_size=2, phi=2)
    near(score[mask], [-1, -.3873, .3873, 1])
    shaped = entropy_aware_advantages(A, H, mask, 2, alpha=.5, phi=2)
    near(shaped, [[1.5, 1.80635, 2.19365],
                  [-2.5, 0, 0]])


def test_eapo_is_what_a_loop_over_the_papers_formulas_gives():
    """Eq. 6 and 7, token by token, in plain Python."""
    rewards, H, mask = random_group_batch()
    A = group_advantages(rewards, 4)
    shaped = entropy_aware_advantages(A, H, mask, 4, ALPHA, PHI)
    for first in (0, 4, 8):
        group = range(first, first + 4)
        values = [float(h) for i in group for h in H[i][mask[i]]]
        mu = sum(values) / len(values)
        squares = sum((h - mu) ** 2 for h in values)
        sigma = math.sqrt(squares / (len(values) - 1)) + 1e-6
        for i, t in itertools.product(group, range(6)):
            a = float(A[i])
            bound = abs(a) / PHI
            score = (float(H[i, t]) - mu) / sigma
            score = max(-bound, min(bound, score))
            expected = a + ALPHA * math.copysign(1, a) * score
            near(shaped[i, t], expected if mask[i, t] else 0)


def test_entropy_makes_an_advantage_louder_or_softer_but_never_flips_it():
    """|score| <= |A|/phi, so A^CA / A is in [1 - alpha/phi, 1 + alpha/phi] = [.9, 1.1]. Entropies
    over ten decades put tokens on both stops: equality at both ends, or the clip is wrong. The
    bound scales with |A|, so a hundredth of A has the same ratios."""
    torch.manual_seed(0)
    H = 10 ** torch.empty(64, 32).uniform_(-5, 5)
    mask = mask_of(*[32] * 64)
    large = torch.randn(64)
    for A in (large, large / 100):
        ratio = entropy_aware_advantages(A, H, mask, 8, ALPHA, PHI) / A[:, None]
        near(ratio.min(), 0.9)
        near(ratio.max(), 1.1)


def test_two_tokens_are_enough_for_a_deviation_and_one_is_no_nan():
    """H = 0 and 1, one token a response: deviation sqrt(((1/2)^2 + (1/2)^2) / 1) = .7071. A group
    with a single token has none, and one without any token has no mean either."""
    H = tensor([[0.], [1]])
    for mask, mean, deviation in (([True, True], .5, .7071), ([False, True], 1, 0),
                                  ([False, False], 0, 0)):
        mu, sigma = eapo.entropy_mean_and_std(H, tensor(mask)[:, None], 2)
        near(mu, [[mean], [mean]])
        near(sigma, [[deviation], [deviation]])
        assert (sigma > 0).all()


def test_what_stands_outside_the_mask_is_never_looked_at():
    """The same tokens in a wider tensor full of rubbish and nan: the same credit and quadrants."""
    rewards, H, mask = random_group_batch()
    A = group_advantages(rewards, 4)
    nan = torch.full((12, 3), math.nan)
    wide_H = torch.cat([H.masked_fill(~mask, 1e6), nan], dim=1)
    wide_mask = torch.cat([mask, nan > 0], dim=1)

    credit = entropy_aware_advantages(A, H, mask, 4, ALPHA, PHI)
    wide_credit = entropy_aware_advantages(A, wide_H, wide_mask, 4, ALPHA, PHI)
    near(wide_credit[:, :6], credit)
    assert not wide_credit[:, 6:].any()
    code = quadrants(rewards, H, mask, 4)
    wide_code = quadrants(rewards, wide_H, wide_mask, 4)
    assert wide_code[:, :6].equal(code)


def test_the_four_quadrants_by_hand():
    """Group 1: mu = 2; a right response with H 1, 3 and a wrong one with 2, 2 (>= counts as high).
    Group 2 has its own mu = 20, so its 15 is low although it is the third highest of all. Rewards
    of 1 and -1, of 1 and 0, and verdicts say the same."""
    H = tensor([[1., 3], [2, 2], [15, 30], [15, 0]])
    mask = mask_of(2, 2, 2, 1)
    for right, wrong in ((1., -1.), (1., 0.), (True, False)):
        rewards = tensor([right, wrong, right, wrong])
        code = quadrants(rewards, H, mask, group_size=2)
        assert code.tolist() == [[2, 1], [4, 4], [2, 1], [3, 0]]


def test_grpo_is_the_sum_of_its_four_quadrants():
    """L = L_PHR + L_PLR + L_NLR + L_NHR over the tokens of the whole (B.1), whatever rho is."""
    rewards, H, mask = random_group_batch()
    A = group_advantages(rewards, 4)[:, None] * mask
    code = quadrants(rewards, H, mask, 4)
    logp = torch.randn(12, 6)

    def loss(A):
        return policy_loss(logp, torch.zeros(12, 6), A, mask / mask.sum(), **CLIPS)

    parts = [loss(A * (code == k)) for k in (1, 2, 3, 4)]
    assert all(parts)
    near(sum(parts), loss(A))


# ---- the other credit rules ----------------------------------------------------------------------

def credit_of(method, H, right, *flags, lengths=None):
    """What assign_credit makes of the responses of one group. Their rewards are not set: quadrants
    go by the verdicts, so that --overlong or a reward of one's own does not matter."""
    N, T = H.shape
    cfg = settings("--method", method, "--group-size", N, *flags)
    batch = batch_of(*lengths or [T] * N)
    batch.H = H
    batch.right = tensor(right)
    batch.advantage = group_advantages(batch.right.float(), N)
    return eapo.assign_credit(batch, cfg)


@pytest.mark.parametrize("method, first, second", [
    ("grpo", [.7071, .7071, .7071], -.7071),
    ("eapo", [.6187, .7955, .6187], -.6187),
    ("forking", [0, .7071, 0], 0),
    ("entroadv", [.9071, 1.0607, 1.0071], -.5071),
    ("w-reinforce", [.0707, .0707, .0707], -.7071)])
def test_rules_of_credit_by_hand(method, first, second):
    """A right response with H = .5, 5, .75 and a wrong one with H = .5 and then padding: A is .7071
    and -.7071. alpha = .5 and phi = 4: mu = 1.69, sigma = 2.21, and all scores, -.54, 1.50, -.42
    and -.54, are cut to .7071 / 4 = .1768, of which eapo takes half. The top 20% of 4 tokens are
    .8, rounded up 1, and not 2 of 6. entroadv adds .4 H, at most .7071 / 2. w-reinforce takes a
    tenth of the praise and all of the blame. Outside the mask all is 0."""
    H = tensor([[.5, 5, .75], [.5, 9, 9]])
    flags = ["--alpha", .5, "--phi", 4]
    credit = credit_of(method, H, [True, False], *flags, lengths=[3, 1])
    near(credit, [first, [second, 0, 0]])


def test_forking_takes_the_top_fifth_of_the_whole_step():
    """H = 0 .. 19: the top 20% are 16 to 19, all in the last response."""
    credit = credit_of("forking", RANKED, ONE_OF_FOUR)
    near(credit[3], [0, -.5, -.5, -.5, -.5])
    assert not credit[:3].any()


ONE_OF_FOUR = [True, False, False, False]       # A = 1.5, -.5, -.5, -.5
RANKED = torch.arange(20.).view(4, 5)           # H = 0 .. 4 in the first response, .. 19


def test_credit_is_a_weight_and_not_an_objective():
    """If the score of (6) carried a gradient, the policy could raise its return by being unsure."""
    logits = torch.randn(2, 5, 7, requires_grad=True)
    H = token_entropy(logits)
    A = tensor([1., -1])
    shaped = entropy_aware_advantages(A, H, mask_of(5, 5), 2, ALPHA, PHI)
    assert not shaped.requires_grad


def test_a_rule_of_ones_own_sees_the_batch_and_the_settings(monkeypatch):
    """Credit alpha * number of prompt tokens. A name that is no rule is refused."""
    def surprise(batch, cfg):
        return cfg.alpha * batch.prompt_len[:, None].expand(batch.H.shape)

    monkeypatch.setitem(eapo.CREDIT_RULES, "surprise", surprise)
    credit = credit_of("surprise", RANKED, ONE_OF_FOUR, "--alpha", .5)
    assert credit.eq(.5).all()
    with pytest.raises(SystemExit, match="no method is called dapo, only eapo, grpo"):
        settings("--method", "dapo")


def test_quadrants_can_be_learned_from_alone_and_left_out_of_the_entropy_term():
    """mu = 9.5: the right response is all below (PLR), of the wrong ones the second too (NLR)."""
    plain = credit_of("grpo", RANKED, ONE_OF_FOUR)
    only = credit_of("grpo", RANKED, ONE_OF_FOUR, "--quadrants", "PLR, NHR,NHR,")
    assert only[[0, 2, 3]].equal(plain[[0, 2, 3]])
    assert not only[1].any()
    full = credit_of("eapo", RANKED, ONE_OF_FOUR)
    part = credit_of("eapo", RANKED, ONE_OF_FOUR, "--without", "NHR")
    assert part[2:].equal(plain[2:])
    assert part[:2].equal(full[:2])
    assert not torch.allclose(full[2:], plain[2:], atol=1e-3)


# ---- the metrics of a step -----------------------------------------------------------------------

def test_the_metrics_of_a_step_worked_by_hand(capsys):
    """Responses of 2, 1, 2, 1 tokens to two problems; the second group, all wrong, is dropped. Two
    updates; 2 of the 3 tokens learned from were clipped. |credit| 1.5, .5 and 1 add up to 3."""
    run = a_run(None, "--group-size", 2)
    batch = batch_of(2, 1, 2, 1)
    batch.H = tensor([[1., .5],
                      [.25, 0],
                      [2, 2],
                      [4, 0]])
    batch.credit = tensor([[1.5, .5],
                           [-1, 0],
                           [9, 9],
                           [9, 0]])
    batch.quadrant = tensor([[1, 2],
                             [3, 0],
                             [4, 3],
                             [4, 0]])
    batch.right = tensor([True, False, False, False])
    batch.reward = tensor([.5, -1, -1, -1])
    batch.kept = tensor([True, True, False, False])
    batch.ended = tensor([True, True, False, True])
    batch.gap = tensor([.1, .2, .2, .1])
    run.world.clock.update(sample=3.0, score=2.0)
    sums = {"loss": .6, "grad_norm": 4.0, "clipped": 2, "updates": 2}
    found = eapo.measure(run, batch, sums)
    expected = {
        "reward": -.625, "solve_rate": .25, "entropy": 9.75 / 6, "response_tokens": 6,
        "response_length": 1.5, "truncated": .25, "groups": 2, "groups_all_right": 0,
        "groups_all_wrong": 1, "loss": .3, "grad_norm": 2, "clip_fraction": 2 / 3,
        "sampler_gap": .1, "seconds_sample": 3, "seconds_score": 2, "peak_memory_bytes": 0,
        "tokens/PHR": 1 / 3, "tokens/PLR": 1 / 3, "tokens/NLR": 1 / 3, "tokens/NHR": 0,
        "advantage/PHR": .5, "advantage/PLR": 1 / 6, "advantage/NLR": 1 / 3, "advantage/NHR": 0}
    assert {key: found[key] for key in expected} == approx(expected, abs=1e-5)
    assert found["seconds"] >= 5
    assert found["tokens_per_second"] == approx(6 / found["seconds"], rel=1e-3)

    batch.right[1:] = True
    found = eapo.measure(run, batch, sums)
    assert found["groups_all_right"] == 2
    assert found["groups_all_wrong"] == 0

    batch.ended[:] = False                  # all cut off, of which the first step warns
    for run.done, updates in ((1, 1), (2, 0)):
        found = eapo.measure(run, batch, sums | {"updates": updates})
        assert float(found["loss"]) == approx(.6)           # the mean of one; without any, the sum
    assert capsys.readouterr().out.count("most responses were cut off") == 1


# ---- the loss ------------------------------------------------------------------------------------

def test_on_policy_the_gradient_of_the_loss_is_the_policy_gradient():
    """At rho = 1 the gradient is - sum A grad log pi; at the logits that is -A (1 - pi_o) for the
    drawn token and +A pi_v for any other (Eq. 5)."""
    torch.manual_seed(0)
    logits = torch.randn(1, 5, requires_grad=True)
    logp = logits.log_softmax(dim=-1)[:, 3:4]
    A = tensor([[.7]])
    policy_loss(logp, logp.detach(), A, torch.ones(1, 1), **CLIPS).backward()
    p = logits.detach().softmax(dim=-1)
    drawn = tensor([[0, 0, 0, 1, 0]])
    near(logits.grad, .7 * (p - drawn))


def test_the_clip_stops_the_gradient_only_where_it_would_push_further_out():
    """Trust region [.8, 1.28]; d loss / d logp = -rho A, or 0 where clipped. A good token at 1.25
    still gains, at 2 it is clipped, at .75 it is pulled back; a bad one at .75 is clipped, at .85
    still falls, at 2 it is pulled back, at 4 it is beyond c = 3 and constant."""
    rho = tensor([[1.25, 2.0, 0.75, 0.75, 0.85, 2.0, 4.0]])
    A = tensor([[1., 1, 1, -1, -1, -1, -1]])
    logp = rho.log().requires_grad_()
    old_logp = torch.zeros(1, 7)
    loss = policy_loss(logp, old_logp, A, torch.ones(1, 7), **CLIPS)
    loss.backward()
    gains = [1.25, 1.28, .75, -.8, -.85, -2, -3]
    near(loss.detach(), -sum(gains))
    near(logp.grad, [[-1.25, 0, -.75, 0, .85, 2, 0]])
    clipped = clipped_tokens(logp, old_logp, A, **CLIPS)
    assert clipped.equal(logp.grad == 0)


def test_without_the_dual_clip_a_bad_token_costs_rho():
    """c = 0 turns it off: at rho = 4 and A = -1 the loss is 4, not 3, and it has a gradient."""
    logp = tensor([[4.0]]).log()
    zero = torch.zeros(1, 1)
    one = torch.ones(1, 1)
    near(policy_loss(logp, zero, -one, one, .2, .28, clip_c=0), 4)
    near(policy_loss(logp, zero, -one, one, .2, .28, clip_c=3), 3)
    assert not clipped_tokens(logp, zero, -one, .2, .28, clip_c=0).any()


def test_a_token_weighs_the_same_or_a_group_does():
    """Groups of 2 with 1 + 3 and 2 + 4 tokens. By tokens each counts 1, in all 10; by groups, as
    Eq. 2 is printed, 1/4 in the first and 1/6 in the second, in all 2, the number of groups."""
    mask = mask_of(1, 3, 2, 4)
    assert token_weights(mask, 2, "tokens").equal(mask.float())
    group_tokens = tensor([[4], [4], [6], [6]])
    assert token_weights(mask, 2, "group").equal(mask / group_tokens)
    nothing = torch.zeros(0, 0, dtype=torch.bool)           # of a process without a share
    assert token_weights(nothing, 2, "group").shape == (0, 0)


ONE_STEP = ["--train-data", "toy", "--eval-every", 0, "--warmup-steps", 0, "--steps", 1,
            "--group-size", 4, "--prompts-per-step", 5, "--prompts-per-minibatch", 2,
            "--max-response-tokens", 8, "--learning-rate", 1e-2, "--seed", 2]


def group_by_hand(lm, batch, rows):
    """(2) for the responses of one group, one after the other: sum of gains, tokens, clipped."""
    gains = []
    clipped = 0
    for i in rows:
        logp, _ = naive(lm, batch, i)
        n = len(logp)
        A = batch.credit[i, :n]
        rho = (logp - batch.old_logp[i, :n]).exp()
        gain = torch.minimum(rho * A, rho.clamp(.8, 1.28) * A)
        gain = torch.where(A < 0, torch.maximum(gain, 3 * A), gain)
        slope, = torch.autograd.grad(gain.sum(), logp, retain_graph=True)
        clipped += int((slope == 0).sum())
        gains.append(gain)
    gains = torch.cat(gains)
    return gains.sum(), len(gains), clipped


@pytest.mark.parametrize("loss_mean, microbatch_tokens", [
    ("tokens", 1), ("tokens", 30), ("tokens", 10000), ("group", 30)])
def test_a_step_is_two_updates_on_the_clipped_mean(toy_data, tmp_path, optimizer_steps, loss_mean,
                                                   microbatch_tokens):
    """4 of 5 groups are kept, in mini-batches of 2. Each update's gradient is that of a loop over
    single responses, scaled down to norm 1, however it was cut into micro-batches. AdamW takes the
    steps; the learning rate is so high that the second has clipped tokens."""
    args = [*ONE_STEP, "--loss-mean", loss_mean, "--microbatch-tokens", microbatch_tokens]
    trained = eapo.train(config(tmp_path, *args))
    run = eapo.open_run(settings(*args, "--out", tmp_path / "by hand"))
    batch = eapo.collect_rollouts(run)
    batch.advantage = group_advantages(batch.reward, 4)
    batch.credit = entropy_aware_advantages(batch.advantage, batch.H, batch.mask, 4, .2, 2)
    kept = []
    for first in range(0, 20, 4):
        if 0 < batch.right[first:first + 4].sum() < 4:
            kept.append(range(first, first + 4))
    assert len(kept) == 4

    weights = list(run.policy.parameters())
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0)
    loss_sum = 0
    norm_sum = 0
    tokens_sum = 0
    clipped_sum = 0
    for rate, found in list(optimizer_steps):
        gains = []
        tokens = []
        for rows in kept[:2]:
            gain, n, clipped = group_by_hand(run.policy.lm, batch, rows)
            gains.append(gain)
            tokens.append(n)
            clipped_sum += clipped
        kept = kept[2:]
        if loss_mean == "tokens":
            loss = -sum(gains) / sum(tokens)
        else:
            means = [gain / n for gain, n in zip(gains, tokens)]
            loss = -sum(means) / 2
        optimizer.zero_grad()
        loss.backward()
        gradient = torch.cat([w.grad.flatten() for w in weights])
        norm = gradient.norm()
        assert norm > 1
        assert rate == 1e-2
        assert (found - gradient / norm).norm() < 0.01
        for w in weights:
            w.grad /= norm
        optimizer.step()
        loss_sum += float(loss.detach())
        norm_sum += float(norm)
        tokens_sum += sum(tokens)
    assert not kept
    assert clipped_sum > 0
    for w, trained_w in zip(weights, trained.policy.parameters()):
        assert (w - trained_w).square().mean() < 5e-4 ** 2       # of steps of 1e-2
    row = trained.history[-1]
    assert row["loss"] == approx(loss_sum / 2, abs=2e-4)
    assert row["grad_norm"] == approx(norm_sum / 2, rel=0.01)
    assert row["clip_fraction"] == approx(clipped_sum / tokens_sum, abs=0.02)


@pytest.mark.parametrize("flags", [
    ["--learning-rate", 1e30],
    ["--warmup-learning-rate", 1e30, "--warmup-data", "toy", "--warmup-steps", 5]])
def test_a_gradient_that_is_no_number_ends_the_run_before_a_step(toy_data, tmp_path,
                                                                 optimizer_steps, flags):
    """At a learning rate of 1e30 the first update makes the next forward pass overflow. Nothing is
    saved then."""
    cfg = config(tmp_path, *ONE_STEP, *flags)
    with pytest.raises(SystemExit, match="the gradient is (nan|inf), and the step was not taken"):
        eapo.train(cfg)
    assert len(optimizer_steps) == 1
    assert not {"metrics.jsonl", "checkpoint", "model"} & set(os.listdir(cfg.out))


def test_a_weight_without_a_gradient_stays_as_it_is():
    """No weight decay: what the data say nothing about is not unlearned."""
    run = a_run()
    weights = list(run.policy.parameters())
    before = [w.detach().clone() for w in weights]
    optimizer = eapo.new_optimizer(run, learning_rate=0.1, beta2=0.999)
    for w in weights:
        w.grad = torch.zeros_like(w)
    optimizer.step()
    for w, old in zip(weights, before):
        assert w.equal(old)


# ---- log-probabilities and entropies -------------------------------------------------------------

@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tokens", [2, 100])
def test_log_probabilities_and_entropies_in_chunks_equal_the_naive_ones(monkeypatch, tied, tokens):
    """Rows of uneven length in one batch, 2 tokens or all at a time, temperature 0.7, against one
    row at a time: values and gradients. The stop token, which is also the padding here, counts;
    prompt and padding do not."""
    monkeypatch.setattr(eapo, "LOGITS_AT_ONCE", tokens * 32)
    batch = tiny_batch(5)
    lm = tiny_lm(tied=tied)
    other = tiny_lm(tied=tied)
    logp, H = Policy(lm)(batch, 0.7)
    (logp.sum() + 3 * H.square().sum()).backward()
    total = 0
    for i in range(5):
        n = len(batch.response(i))
        expected_logp, expected_H = naive(other, batch, i, 0.7)
        assert batch.response(i)[-1] == 1
        assert_close(logp[i, :n], expected_logp, rtol=1e-4, atol=1e-5)
        assert_close(H[i, :n], expected_H, rtol=1e-4, atol=1e-5)
        assert not logp[i, n:].any()
        assert not H[i, n:].any()
        total = total + expected_logp.sum() + 3 * expected_H.square().sum()
    total.backward()
    for ours, theirs in zip(lm.parameters(), other.parameters()):
        assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=5e-4)      # of up to 200


def test_the_whole_matrix_of_logits_is_never_held(monkeypatch):
    """512 tokens, V = 4096, 16 tokens at a time: neither the largest tensor that is made, forward
    or backward, nor all that is kept in between reaches an eighth of the M * V logits."""
    V = 4096
    D = 32
    M = 512
    made = []
    kept = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                made.append(out.numel())
            return out

    def keep(x):
        if x.numel() != V * D:          # the head itself
            kept.append(x.numel())
        return x

    def give_back(x):
        return x

    monkeypatch.setattr(eapo, "LOGITS_AT_ONCE", 16 * V)
    hidden = torch.randn(M, D, requires_grad=True)
    head = torch.randn(V, D, requires_grad=True)
    tokens = torch.randint(V, (M,))
    with Watch(), torch.autograd.graph.saved_tensors_hooks(keep, give_back):
        logp, H = eapo.log_prob_and_entropy_in_chunks(hidden, head, tokens, 1.0)
        (logp.sum() + H.sum()).backward()
    assert max(made) <= M * V / 8
    assert sum(kept) <= M * V / 8


def test_gradients_of_a_token_that_cannot_be_drawn_are_numbers():
    """A logit of -1e9, as models mask vocabulary: p = 0, and p log p must not become nan."""
    head = tensor([[1.], [2.], [-1e9]], requires_grad=True)
    hidden = torch.ones(4, 1, requires_grad=True)
    tokens = tensor([0, 1, 1, 0])
    logp, H = eapo.log_prob_and_entropy_in_chunks(hidden, head, tokens, 1.0)
    (logp.sum() + H.sum()).backward()
    assert head.grad.isfinite().all()
    assert hidden.grad.isfinite().all()
    assert head.grad[2] == 0


def test_bf16_logits_are_normalised_in_fp32():
    """256 equally likely tokens: log p = -log 256 = -5.5452, which bf16 would round to -5.5312."""
    logits = torch.zeros(1, 256, dtype=torch.bfloat16)
    logp, H = eapo.log_prob_and_entropy(logits, tensor([3]), 1.0)
    near(logp, [-5.5452])
    near(H, [5.5452])


def test_a_process_without_rows_runs_the_model_all_the_same():
    """FSDP waits for every process, so one that has nothing to do joins in with no tokens."""
    nothing = tiny_batch(2).rows(slice(0, 0))
    lm = tiny_lm()
    calls = []
    lm.get_decoder().register_forward_hook(lambda *_: calls.append("forward"))
    logp, H = Policy(lm)(nothing, 1.0)
    (logp.sum() + H.sum()).backward()
    assert logp.shape == H.shape == (0, 0)
    assert calls == ["forward"]


# ---- sampling ------------------------------------------------------------------------------------

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14]]
SIZES = dict(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
             bos_token_id=None, eos_token_id=1)
GPT2_SIZES = dict(vocab_size=32, n_embd=32, n_layer=2, n_head=4, n_positions=64,
                  initializer_range=0.3, bos_token_id=None, eos_token_id=1)
ARCHITECTURES = {
    "Qwen2": transformers.Qwen2Config(**SIZES),
    "Mistral that looks back 6 tokens": transformers.MistralConfig(**SIZES, sliding_window=6),
    "Qwen2 with layers of both kinds": transformers.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "GPT-2 with absolute positions": transformers.GPT2Config(**GPT2_SIZES),
}


def sample(lm, G, max_tokens, temperature, stop_ids, prompts=PROMPTS, top_p=1.0):
    """`generate`, in as many slots as there are responses."""
    seeds = range(len(prompts))
    limits = [max_tokens] * len(prompts)
    return eapo.generate(lm, prompts, G, limits, temperature, top_p, stop_ids, seeds)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_sampler_says_what_transformers_says(name, attention):
    """Greedy tokens are those of transformers' own generate, 18 at most, so well beyond a window of
    6, and `ended` goes by the last of them. log p and H of all tokens are those of the policy in
    one pass over the finished text, at the temperature of sampling; greedy counts as 1."""
    torch.manual_seed(3)
    lm = transformers.AutoModelForCausalLM.from_config(
        ARCHITECTURES[name], attn_implementation=attention).eval()
    expected = []
    for prompt in PROMPTS:
        ids = lm.generate(tensor([prompt]), attention_mask=torch.ones(1, len(prompt)),
                          max_new_tokens=18, do_sample=False, eos_token_id=[1, 4])
        response = ids[0, len(prompt):].tolist()
        expected += [response, response]
    greedy = sample(lm, 2, 18, 0, [1, 4])
    assert responses_of(greedy) == expected
    assert greedy.ended.tolist() == [response[-1] in (1, 4) for response in expected]
    assert greedy.ids[4, :5].tolist() == PROMPTS[2]
    nearly_greedy = sample(lm, 2, 18, 1.0, [1, 4], top_p=0.001)
    assert responses_of(nearly_greedy) == expected

    drawn = sample(lm, 8, 18, 0.6, [1, 2, 3, 4])
    lengths = set(drawn.response_len.tolist())
    assert len(lengths) > 3
    assert max(lengths) > 12
    for batch, temperature in ((greedy, 1.0), (drawn, 0.6)):
        logp, H = Policy(lm)(batch, temperature)
        assert_close(batch.old_logp, logp, rtol=1e-3, atol=1e-4)
        assert_close(batch.H, H, rtol=1e-3, atol=1e-4)


def test_a_response_that_stops_with_its_last_possible_token_has_ended():
    """A greedy response that stops after n tokens has ended with n tokens allowed too, and is cut
    off with one less; its length alone does not tell."""
    lm = tiny_lm(seed=3)
    tokens = sample(lm, 1, 9, 0, []).response(0)
    stop = tokens[4]
    n = tokens.index(stop) + 1
    assert n > 1
    for max_tokens, ended in ((n + 3, True), (n, True), (n - 1, False)):
        batch = sample(lm, 1, max_tokens, 0, [stop], PROMPTS[:1])
        assert batch.response(0) == tokens[:min(n, max_tokens)]
        assert batch.ended.tolist() == [ended]


@pytest.mark.slow
def test_a_response_depends_on_its_prompts_seed_alone():
    """In slots for one group, for two, or for all, in another order, and alone: the same tokens and
    nearly the same numbers. Another seed gives others, and so does another try."""
    lm = tiny_lm()
    prompts = 2 * (PROMPTS + [[3], [4, 4, 4, 4], PROMPTS[0]])

    def in_slots(slots, order):
        chosen = [prompts[i] for i in order]
        seeds = [100 + i for i in order]
        return eapo.generate(lm, chosen, 4, [12] * len(chosen), 1.0, 0.9, [1, 2, 3], seeds, slots)

    together = in_slots(512, range(12))
    expected = responses_of(together)
    lengths = {len(response) for response in expected}
    assert len(lengths) > 4
    for slots in (1, 11):
        batch = in_slots(slots, range(12))
        assert responses_of(batch) == expected
        assert_close(batch.old_logp, together.old_logp, rtol=1e-3, atol=1e-4)
        assert_close(batch.H, together.H, rtol=1e-3, atol=1e-4)
    for order in ([5, 3, 0, 4, 1, 2], [2]):
        batch = in_slots(8, order)
        assert responses_of(batch) == [expected[4 * g + i] for g in order for i in range(4)]
    assert expected[0] != expected[1]
    assert expected[:4] != expected[20:24]


def test_idle_slots_are_kept_while_a_prompt_waits_for_them():
    """Five prompts, two tries each, in the slots of one group: the first try ends earlier than the
    second, and its slot must be there when the next prompt starts in both."""
    lm = tiny_lm()
    prompts = PROMPTS + [[3], [4, 4, 4, 4]]

    def in_slots(slots):
        return eapo.generate(lm, prompts, 2, [12] * 5, 1.0, 1.0, [1, 2, 3], range(5), slots)

    together = in_slots(10)
    lengths = together.response_len.reshape(5, 2)
    assert (lengths[:-1, 0] != lengths[:-1, 1]).any()
    assert responses_of(in_slots(2)) == responses_of(together)


def test_nothing_to_sample_is_an_empty_batch():
    batch = sample(tiny_lm(), 4, 12, 1.0, [1], prompts=[])
    assert len(batch.ids) == len(batch.ended) == 0
    assert batch.old_logp.shape == batch.H.shape == (0, 0)


def test_draw_follows_temperature_and_top_p():
    """p = .2 .5 .3, laid end to end, over even u: top-p .6 keeps the likeliest two (.5 < .6), which
    share the line as .625 and .375; top-p .5 keeps one. At temperature 1/2 p goes as its square:
    .04 .25 .09 over .38."""
    logits = tensor([.2, .5, .3]).log().expand(20000, 3)
    u = (torch.arange(20000) + .5) / 20000
    for temperature, top_p, shares in ((1.0, 1.0, [.2, .5, .3]), (1.0, .6, [0, .625, .375]),
                                       (1.0, .5, [0, 1, 0]), (0, 1.0, [0, 1, 0]),
                                       (0.5, 1.0, [.105, .658, .237])):
        tokens = eapo.draw(logits, u, temperature, top_p)
        counts = torch.bincount(tokens, minlength=3)
        near(counts / 20000, shares, within=1e-3)


@pytest.mark.parametrize("top_p", [1.0, 0.99])
def test_no_token_without_probability_is_ever_drawn(top_p):
    """The first and last ten of 60 tokens are forbidden; u stands at both ends of [0, 1), and the
    probabilities add up to a little more or less than 1, in 1000 ways."""
    torch.manual_seed(0)
    logits = torch.randn(1000, 60)
    logits[:, :10] = -math.inf
    logits[:, 50:] = -math.inf
    for u in (0.0, 1 - 2 ** -24):
        tokens = eapo.draw(logits, torch.full((1000,), u), 1.0, top_p)
        assert tokens.min() >= 10
        assert tokens.max() < 50


def test_no_more_slots_are_busy_than_memory_allows():
    """6 prompts, 2 tries each, room for 5 slots: 4 tokens in a step, as a group needs 2 slots."""
    lm, _ = eapo.tiny_model(0)
    steps = []
    eapo.generate(lm.eval(), [[3, 4]] * 6, 2, [3] * 6, 1.0, 1.0, [], range(6), slots_at_most=5,
                  keep_on=lambda tokens: steps.append(tokens) or True)
    assert steps == [4] * 9


def test_as_many_slots_are_used_as_memory_holds():
    """2 (keys, values) x 1 layer x 2 heads x 25 numbers of 4 bytes are 400 a token; 10 tokens and
    88 bytes for a vocabulary of two make 4,088 a slot. 4/5 of 51,100 bytes hold ten of them, when
    3 tries at 2 prompts, of 6 tokens each, have taken 20 bytes a token; 512 are the most. Without
    grouped heads there are 4, and 8,088 bytes."""
    config = types.SimpleNamespace(num_hidden_layers=1, num_key_value_heads=2, hidden_size=100,
                                   num_attention_heads=4, vocab_size=2)
    lm = types.SimpleNamespace(config=config, dtype=torch.float32)
    shape = ([[0] * 4, [0]], [6, 2], 3)
    for free, slots in ((51820, 10), (51819, 9), (math.inf, 512)):
        assert slots_that_fit(lm, *shape, free) == slots
    config.num_key_value_heads = None
    assert slots_that_fit(lm, *shape, 101820) == 10
    config.head_dim = 50
    assert slots_that_fit(lm, *shape, 101820) == 5


def test_a_model_that_cannot_be_sampled_from_is_found_out():
    """A bias on the logits, which hidden states times a matrix leave out; a weight that is nan."""
    eapo.check_sampling(tiny_lm())
    lm = tiny_lm(tied=False)
    lm.set_output_embeddings(torch.nn.Linear(32, 32))
    with pytest.raises(ValueError, match="as scored are .* nats off"):
        eapo.check_sampling(lm)
    lm = tiny_lm()
    with torch.no_grad():
        lm.model.norm.weight[3] = math.nan
    with pytest.raises(ValueError, match="its weights hold NaN"):
        eapo.check_sampling(lm)


def test_random_numbers_depend_on_the_seed_of_their_prompt_alone():
    """Neither on other prompts nor on how long a response may be."""
    u = eapo.random_numbers([5, 3], 4, 6)
    assert u.shape == (8, 6) and 0 <= u.min() and u.max() < 1
    assert u[4:].equal(eapo.random_numbers([3], 4, 6))
    assert u.equal(eapo.random_numbers([5, 3], 4, 9)[:, :6])
    assert len(set(u.flatten().tolist())) == 48


@pytest.mark.parametrize("dtype, gap, refused", [
    (torch.float32, .0005, False), (torch.float32, .002, True),
    (torch.bfloat16, .1, False), (torch.bfloat16, .5, True)])
def test_how_much_of_a_gap_may_be_rounding(monkeypatch, dtype, gap, refused):
    """1e-3 nats in fp32, 0.3 in bf16. (The gap stands for one that a model would make.)"""
    forward = Policy.forward
    def shifted(self, batch, temperature):
        logp, H = forward(self, batch, temperature)
        return logp + gap, H
    monkeypatch.setattr(Policy, "forward", shifted)
    lm = tiny_lm().to(dtype)
    if refused:
        with pytest.raises(ValueError, match="as scored are .* nats off"):
            eapo.check_sampling(lm)
    else:
        eapo.check_sampling(lm)


# ---- rollouts ------------------------------------------------------------------------------------

class InOrder:
    """A stand-in for Stream that hands out problems in their own order."""

    position = 0

    def __init__(self, problems):
        self.numbered = enumerate(problems)

    def take(self, n):
        return list(itertools.islice(self.numbered, n))


@pytest.mark.parametrize("resample, tried", [(0, 6), (1, 10), (2, 13), (20, 18)])
def test_groups_that_agree_are_replaced_up_to_the_cap(resample, tried):
    """Problem i is always right if i % 3 is 0, always wrong if 1, else mixed. The first round of 6
    keeps 2 and 5. Of the next four, 6 to 9, it keeps 8, then of 10 to 12 11, of 13 and 14 14, of 15
    none, of 16 none, and 17. Then it has the 6 it wanted."""
    alternating = itertools.cycle([True, False])

    def check(text, kind):
        return next(alternating) if kind == 2 else kind == 0

    run = a_run(tiny_model(0)[0], "--prompts-per-step", 6, "--group-size", 4, "--resample",
                resample, "--max-response-tokens", 2)
    problems = [Problem("", i % 3, check=check, ids=[5]) for i in range(30)]
    run.stream = InOrder(problems)
    batch = eapo.collect_rollouts(run)
    assert batch.number.tolist() == [i for i in range(tried) for _ in range(4)]
    assert batch.kept.equal(batch.number % 3 == 2)


def test_every_kept_group_is_in_one_mini_batch():
    """5 of 7 groups of 2 are kept, at most 2 in a mini-batch: 3 of them, of 1, 2 and 2 groups."""
    run = a_run(None, "--group-size", 2, "--prompts-per-minibatch", 2)
    batch = batch_of(*[1] * 14)
    batch.number = torch.arange(14) // 2
    batch.kept = (batch.number != 1) & (batch.number != 4)
    minis = [mini.number.tolist() for mini in eapo.mini_batches(run, batch)]
    assert minis == [[0, 0], [2, 2, 3, 3], [5, 5, 6, 6]]


def test_micro_batches_hold_at_most_so_many_tokens_and_every_row_once():
    """Rows of 2, 9, 4, 3, 4 tokens, 8 at most with padding: 9 alone, 4 with 4, then 3 with 2. Two
    processes need two rounds for that, and the second has nothing to do in the last. If 24 tokens
    fit, they need one round, and share the rows as evenly as pieces of 18 allow."""
    run = a_run(None, "--microbatch-tokens", 8)
    batch = batch_of(1, 8, 3, 2, 3)
    pieces = [rows.tolist() for rows in eapo.micro_batch_rows(torch.tensor([2, 9, 4, 3, 4]), 8)]
    assert pieces == [[1], [2, 4], [3, 0]]
    shapes = [micro.ids.shape for micro in eapo.micro_batches(run, batch)]
    assert shapes == [(1, 9), (2, 4), (2, 3)]
    run.world.size = 2
    for run.world.microbatch_tokens, wanted in ((8, [[9], [3, 2], [4, 4], []]),
                                                (24, [[9], [4, 4, 3, 2]])):
        lengths = []
        for run.world.rank in (0, 1):
            for micro in eapo.micro_batches(run, batch):
                lengths.append((micro.prompt_len + micro.response_len).tolist())
        assert lengths == wanted


def test_processes_get_about_as_many_tokens_of_a_mini_batch_and_little_padding():
    """Response lengths as in a real run: lognormal, mean 800, at most 3,072. Of what 8 processes
    compute while the slowest of them works, at least 0.8 are tokens and not padding."""
    random = torch.Generator().manual_seed(0)
    lengths = torch.empty(256).log_normal_(6.4, 0.75, generator=random).long().clamp(1, 3072)
    batch = eapo.Batch(torch.zeros(256, 3073), torch.ones(256).long(), lengths)
    run = a_run(None, "--microbatch-tokens", 16384)
    run.world.size = 8
    padded = 0
    computed = []
    for run.world.rank in range(8):
        computed.append([micro.ids.numel() for micro in eapo.micro_batches(run, batch)])
    for at_once in zip(*computed, strict=True):
        padded += 8 * max(at_once)
    useful = int((lengths + 1).sum())
    assert useful / padded > 0.8


def test_batches_are_put_together_and_taken_apart():
    """Rows of 2 + 1 and 1 + 3 tokens: 4 wide together; fields (N, T) are 1 and 3 wide."""
    one = make_batch([[5, 6]], [[7]])
    two = make_batch([[5]], [[7, 8, 9]])
    one.H = tensor([[.1]])
    two.H = tensor([[.2, .3, .4]])
    both = eapo.concatenate([one, two])
    assert both.ids.tolist() == [[5, 6, 7, 0], [5, 7, 8, 9]]
    near(both.H, [[.1, 0, 0], [.2, .3, .4]])
    assert both.mask.equal(mask_of(1, 3))
    assert both.reward is None
    again = both.rows(tensor([0]))
    assert again.ids.tolist() == [[5, 6, 7]]
    assert again.H.equal(one.H)


def test_token_ids_stay_whole_numbers_where_a_process_had_nothing_to_do():
    """Its empty batch, put together with another's, must not turn token ids into floats."""
    nothing = make_batch([], [])
    both = eapo.concatenate([make_batch([[5, 6]], [[7]]), nothing])
    for batch in (nothing, both):
        for x in (batch.ids, batch.prompt_len, batch.response_len):
            assert x.dtype == torch.long
    assert both.ids.tolist() == [[5, 6, 7]]


def test_every_prompt_of_every_step_and_set_has_random_numbers_of_its_own():
    """Three problems with the same prompt, for training and in a set called x, with two seeds: two
    responses of 12 tokens to each, 24 in all, no two alike; and the same when asked again."""
    lm, _ = tiny_model(0)
    problem = Problem("", "", ids=[5])
    numbered = [(0, problem), (1, problem), (2, problem)]
    seen = []
    for seed, name in itertools.product((0, 1), ("train", "x")):
        run = a_run(lm, "--seed", seed, "--max-response-tokens", 12)
        run.stop_ids = [0]
        batch = sample_and_mark(run, numbered, name, 2, 1.0, 1.0)
        again = sample_and_mark(run, numbered[::-1], name, 2, 1.0, 1.0)
        assert batch.number.tolist() == [0, 0, 1, 1, 2, 2]
        assert responses_of(batch) == responses_of(again)
        seen += responses_of(batch)
    assert len({tuple(response) for response in seen}) == 24


def test_the_progress_bar_of_sampling_counts_tokens(monkeypatch):
    """Of 3 x (12 + 5) that two problems' three responses may have at most, those that were drawn:
    some end earlier."""
    bars = []
    make = eapo.World.bar

    def bar(*args, **options):
        bars.append(make(*args, **options))
        return bars[-1]
    monkeypatch.setattr(eapo.World, "bar", bar)
    run = a_run(tiny_model(0)[0], "--max-response-tokens", 12)
    run.stop_ids = [3, 4, 5, 6]
    numbered = [(0, Problem("", "", ids=[5, 7])), (1, Problem("", "", ids=[6], limit=5))]
    batch = sample_and_mark(run, numbered, "x", 3, 1.0, 1.0)
    drawn = int(batch.response_len.sum())
    assert (bars[0].n, bars[0].total) == (drawn, 51)
    assert drawn < 51


def test_a_response_is_marked_by_its_problems_check_or_by_the_verifier():
    """Against its own problem's answer, and without its stop token: "12" has an even length."""
    run = a_run()
    boxed = run.tokenizer("\\boxed{12}").input_ids
    plain = run.tokenizer("12").input_ids
    stop = [1]
    responses = [boxed, boxed + stop, plain + stop, plain]
    batch = make_batch([[5]] * 4, responses)
    problems = [Problem("", "12"), Problem("", "13"), Problem("", check=odd),
                Problem("", "x", check=lambda text, answer: text + answer == "12x")]
    eapo.mark(run, batch, problems)
    assert batch.right.tolist() == [True, False, False, True]
    assert batch.reward.tolist() == [1, -1, -1, 1]


def test_overlong_responses_lose_up_to_one():
    """L_max 8, the last half: lengths 1, 4, 6, 8 of right responses earn 1, 1, 1 - 2/4, 1 - 4/4,
    and a wrong one of 7 tokens earns -1 - 3/4; the verdicts stay. Off by default."""
    def check(text, verdict):
        return verdict

    batch = batch_of(1, 4, 6, 8, 7)
    verdicts = [True, True, True, True, False]
    problems = [Problem("", verdict, check=check) for verdict in verdicts]
    run = a_run(None, "--max-response-tokens", 8, "--overlong", 0.5)
    eapo.mark(run, batch, problems)
    assert batch.reward.tolist() == [1, 1, .5, 0, -1.75]
    assert batch.right.tolist() == verdicts
    run.cfg.overlong = 0
    eapo.mark(run, batch, problems)
    assert batch.reward.tolist() == [1, 1, 1, 1, -1]


def test_scoring_takes_both_numbers_from_the_policy():
    """In micro-batches of one row, whose rows are cut to their own length."""
    run = a_run(tiny_lm(), "--microbatch-tokens", 8)
    batch = batch_of(1, 5, 2)
    logp, H = run.policy(batch, 0.7)
    scored_logp, scored_H = eapo.score(run.policy, run.world, batch, 0.7)
    near(scored_logp, logp.detach())
    near(scored_H, H.detach())
    assert not scored_logp.requires_grad and not scored_H.requires_grad


def test_a_bf16_sampler_is_scored_by_the_policy():
    """What bf16 and its cache said of the tokens is only good for `gap`, the sum over a response of
    how far it was off. In evaluations too, but nobody asks for it in the continuations of part 8.
    """
    run = a_run(tiny_model(0)[0], "--max-response-tokens", 12)
    run.world.bf16 = True
    run.sampler = tiny_model(0)[0].bfloat16()
    problem = Problem("", "", ids=[5, 7])
    numbered = [(0, problem), (1, problem), (2, problem)]
    batch = sample_and_mark(run, numbered, "train", 2, 0.7, 1.0)
    logp, H = run.policy(batch, 0.7)
    near(batch.old_logp, logp.detach())
    near(batch.H, H.detach())
    assert (batch.gap > 0).all()
    assert batch.gap.sum() / batch.mask.sum() < 0.1
    assert (sample_and_mark(run, numbered, "x", 2, 0.7, 1.0).gap > 0).all()
    assert sample_and_mark(run, numbered, "credit", 2, 0.7, 1.0).gap is None


def test_sampler_and_policy_are_compared_in_fp32_too():
    """On the longest response of each batch for training: here the policy has other weights."""
    run = a_run(tiny_model(0)[0], "--max-response-tokens", 12)
    run.sampler = tiny_model(1)[0]
    problem = Problem("", "", ids=[5, 7])
    batch = sample_and_mark(run, [(0, problem), (1, problem)], "train", 4, 1.0, 1.0)
    logp, _ = run.policy(batch, 1.0)
    gap = (logp.detach() - batch.old_logp).abs().sum(dim=1)
    longest = int(batch.response_len.argmax())
    near(batch.gap[longest], gap[longest], within=1e-4)
    assert batch.gap.isfinite().sum() == 1
    assert gap[longest] > 0.1
    batch = sample_and_mark(run, [(0, problem)], "x", 4, 1.0, 1.0)
    assert batch.gap is None


# ---- warm-up -------------------------------------------------------------------------------------

def test_the_warm_up_is_supervised_learning_on_solutions(toy_data, optimizer_steps, capsys):
    """Two steps of AdamW on the mean of -log p over all tokens of the solutions of 16 problems,
    which are all there are, and their stop tokens. Gradients are scaled down to norm 1. The
    progress bar ends with the loss of the last step, of all its micro-batches."""
    run = a_run(tiny_model(0)[0].eval(), "--warmup-data", "toy", "--warmup-steps", 2,
                "--warmup-learning-rate", 0.02, "--microbatch-tokens", 20)
    eapo.warm_up(run)

    lm = tiny_model(0)[0].eval()
    weights = list(lm.parameters())
    optimizer = torch.optim.AdamW(weights, weight_decay=0)
    prompts = []
    solutions = []
    for problem in toy("warmup"):
        prompts.append(run.tokenizer(problem.problem).input_ids)
        solutions.append(run.tokenizer(problem.solution).input_ids + [1])
    batch = make_batch(prompts, solutions)
    for rate, found in list(optimizer_steps):
        optimizer.zero_grad()
        logps = [naive(lm, batch, i)[0] for i in range(16)]
        loss = -torch.cat(logps).mean()
        loss.backward()
        gradient = torch.cat([w.grad.flatten() for w in weights])
        norm = gradient.norm()
        assert norm > 1
        assert (found - gradient / norm).norm() < 0.01
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()            # the first step of Adam does not mind the scale of a gradient
    shown = re.findall(r"loss (\S+) nats per token", capsys.readouterr().err)
    assert float(shown[-1]) == approx(float(loss.detach()), abs=2e-3)


def test_the_warm_ups_rate_rises_over_20_steps_and_falls_at_the_end(toy_data, optimizer_steps):
    """30 steps: a twentieth more each time up to the 20th; the last 30%, 9 steps, fall by a ninth
    each, so the 22nd still has the full rate and the last a ninth. Then the solutions are known."""
    run = a_run(tiny_model(0)[0], "--warmup-data", "toy", "--warmup-steps", 30,
                "--warmup-learning-rate", 0.01)
    eapo.warm_up(run)
    rates = [rate for rate, _ in optimizer_steps]
    rises = [0.01 * n / 20 for n in range(1, 21)]
    falls = [0.01 * n / 9 for n in range(8, 0, -1)]
    assert rates == approx(rises + [0.01, 0.01] + falls)
    assert all(gradient.norm() < 1.0001 for _, gradient in optimizer_steps)
    solved = eapo.solution_batch(run, load_problems(run, "toy", "warmup"))
    logp, _ = run.policy(solved, 1.0)
    assert logp[solved.mask].mean() > math.log(0.7)         # it was below log(0.1)


def test_a_solution_ends_with_the_stop_token_and_is_cut_to_the_limit():
    """The first of the stop tokens is the one that is taught."""
    run = a_run(None, "--max-response-tokens", 4)
    run.stop_ids = [9, 1]
    ids = run.tokenizer("12").input_ids
    short = Problem("", solution=12, ids=[5])
    long = Problem("", solution="1212", ids=[5, 6])
    batch = eapo.solution_batch(run, [short, long])
    assert responses_of(batch) == [ids + [9], ids + ids]
    assert batch.prompt_len.tolist() == [1, 2]


def test_stop_ids_are_the_tokenizers_then_the_models_each_once(tmp_path):
    lm, tokenizer = tiny_model(0)
    tokenizer.save_pretrained(tmp_path)
    cfg = settings("--model", tmp_path)
    for ends, expected in (([7, 1, 5], [1, 7, 5]), (7, [1, 7]), (None, [1])):
        lm.generation_config.eos_token_id = ends
        lm.save_pretrained(tmp_path)
        _, _, stop_ids = eapo.load_model(cfg, eapo.World(cfg))
        assert stop_ids == expected


# ---- problems and prompts ------------------------------------------------------------------------

def test_a_worked_solution_is_right_exactly_when_every_carry_is_written():
    """And about 4 in 10 are, as the warm-up wants."""
    problems = eapo.addition("warmup")[:2000]
    right = 0
    for problem in problems:
        a, b = problem.problem[:-1].split("+")
        carries = []
        carry = 0
        for x, y in zip(reversed(a), reversed(b)):
            carries.append(carry == 1)
            carry = (int(x) + int(y) + carry) // 10
        columns = problem.solution.split(" ")[:4]
        written = [column.count("+") == 2 for column in columns]
        assert is_correct(problem.solution, problem.answer) == (written == carries)
        right += written == carries
    assert 0.35 < right / 2000 < 0.5


def test_a_column_is_carried_more_often_the_bigger_it_feels():
    """A column of 14 is carried with probability sigmoid(1) = .731, one of 10 with sigmoid(-5/3) =
    .159. Which digit of a column comes first is a coin."""
    rng = random.Random(0)
    for x, y, expected in ((9, 5, .731), (4, 6, .159)):
        carried = 0
        swapped = 0
        for _ in range(4000):
            solution = eapo.column_addition(x, y, rng, letters=0)
            first, second, *_ = solution.split(" ")
            assert first.count("+") == 1            # there is nothing to carry yet
            carried += second == "0+0+1=1"
            swapped += first.startswith(f"{y}+{x}=")
        assert carried / 4000 == approx(expected, abs=.03)
        assert swapped / 4000 == approx(.5, abs=.03)


def test_chatter_is_the_same_task_with_letters_that_nothing_depends_on():
    """Three behind each column. Of the tokens of part 8, the first digit of a column is its order
    (o), + or = behind the two digits of any but the first column its carry (c), letters are l."""
    problem = eapo.chatter("eval")[0]
    columns = problem.solution.split(" ")[:4]
    assert problem.problem == eapo.addition("eval")[0].problem
    assert all(column[-3:].isalpha() for column in columns)
    kinds = eapo.addition_kinds(list("9+0=9abc 7+4+1=12"))
    initials = [kind[0] for kind in kinds]
    assert "".join(initials) == "orrrrlllrorrcrrrr"


def test_evaluation_training_and_warm_up_share_no_problem():
    texts = []
    for split, size in (("eval", 128), ("train", 2048), ("warmup", 16384)):
        problems = eapo.addition(split)
        assert len(problems) == size
        texts += [problem.problem for problem in problems]
    assert len(set(texts)) == len(texts)


def test_word_problems_share_no_case_and_their_solver_tosses_a_coin():
    """But for names and things no text is in two splits. Every solution computes what it says, and
    about half of them choose the operator that the story wants."""
    seen = []
    right = []
    for split, size in (("eval", 100), ("train", 200), ("warmup", 340)):
        problems = eapo.word_problems(split)
        assert len(problems) == size
        for problem in problems:
            text = problem.problem
            for word in eapo.NAMES + eapo.THINGS:
                text = text.replace(word, "_")
            seen.append(text)
            a, operator, b = problem.solution.split(" = ")[0].split()
            result = int(a) + int(b) if operator == "+" else int(a) * int(b)
            assert problem.solution == f"{a} {operator} {b} = {result}. \\boxed{{{result}}}"
            words = [word.strip(".,") for word in text.split()]
            assert [a, b] == [word for word in words if word.isdigit()]
            right.append(is_correct(problem.solution, problem.answer))
    assert len(set(seen)) == 640
    assert 0.4 < sum(right) / 640 < 0.6


def test_a_prompt_has_one_bos_and_no_eos():
    """A template that writes BOS itself, a tokenizer that adds BOS too, and a base model, whose
    tokenizer here ends every text with EOS."""
    tokenizer = transformers.ByT5Tokenizer(extra_ids=0)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = ("<s>{{ messages[0]['role'] }}: {{ messages[0]['content'] }}"
                               "{% if add_generation_prompt %} Answer:{% endif %}")
    problems = [Problem("1+1="), Problem("10+20=")]
    prompts = eapo.prompt_ids(tokenizer, problems)
    assert [ids.count(tokenizer.bos_token_id) for ids in prompts] == [1, 1]
    assert [tokenizer.decode(ids) for ids in prompts] == ["<s>user: 1+1= Answer:",
                                                          "<s>user: 10+20= Answer:"]
    tokenizer.chat_template = None
    prompts = eapo.prompt_ids(tokenizer, problems)
    assert [tokenizer.decode(ids) for ids in prompts] == ["1+1=" + eapo.INSTRUCTION,
                                                          "10+20=" + eapo.INSTRUCTION]


def test_a_prompt_with_two_bos_is_told(capsys):
    run = a_run()
    run.tokenizer.bos_token = "0"
    for problem, said in (("1+2=", []), ("10+2=", []), ("100+2=", ["2"])):
        short = Problem(problem, ids=run.tokenizer(problem).input_ids)
        short.check = odd
        eapo.sanity_check(run, [short])
        assert re.findall(r"(\d) BOS tokens", capsys.readouterr().out) == said


@pytest.mark.parametrize("template, says", [
    ("{{ raise_exception('a system message is needed') }}", "chat template of .*: a system mess"),
    ("{% for part in messages[0]['content'] %}{{ part['text'] }}{% endfor %}", "leaves the prob"),
    ("{{ messages[0]['role'] }}", "leaves the problem out and writes 'user'")])
def test_a_chat_template_that_raises_or_leaves_the_problem_out_ends_the_run(template, says):
    run = a_run()
    run.tokenizer.chat_template = template
    with pytest.raises(SystemExit, match=says):
        problems = load_problems(run, "addition", "eval")
        eapo.check_template(run, problems[0])


@pytest.mark.parametrize("end, warned", [
    ("<eos>", False), ("<pad>", True), ("", False), (" <eos>", False), (" ", False)])
def test_a_turn_that_ends_with_no_stop_token_is_told(capsys, end, warned):
    """As in Qwen2.5-Math, whose template ends turns with <|im_end|> and whose stop token is not."""
    run = a_run()
    run.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}" + end + "{% endfor %}"
    eapo.check_template(run, Problem("1+1="))
    said = capsys.readouterr().out
    assert ("ends a turn with" in said) == (f"ends a turn with '{end}'" in said) == warned


def load_file(path, split):
    return load_problems(a_run(), str(path), split)


JSONL = """{"problem": "1+1", "answer": ["2"]}

{"problem": "2+2", "answer": ["4", "four"]}
"""
SOLUTIONS = """{"prompt": "1+1", "solution": "so \\\\boxed{2}"}
{"prompt": "2+2", "solution": "4"}
"""


@pytest.mark.parametrize("name, text", [
    ("a.jsonl", JSONL), ("bom.jsonl", "\ufeff" + JSONL), ("b.JSONL", SOLUTIONS),
    ("array.json", '[{"Problem": "1+1", "Answer": 2},\n{"Problem": "2+2", "Answer": "4"}]'),
    ("a.csv", "question,ground_truth\n1+1,2\n2+2,4\n"),
    ("gsm8k.jsonl", '{"question": "1+1", "answer": "One more than 1 is 2.\\n#### 2"}\n'
                    '{"question": "2+2", "answer": "2+2=<<2+2=4>>4\\n#### 4"}'),
    ("olympiad.jsonl", '{"question": "1+1", "solution": ["See."], "final_answer": ["$2$"]}\n'
                       '{"question": "2+2", "solution": ["See."], "final_answer": ["$4$"]}'),
    ("verl.jsonl", '{"prompt": [{"role": "user", "content": "1+1"}], "reward_model": '
                   '{"ground_truth": "2"}}\n{"prompt": [{"role": "user", "content": "2+2"}], '
                   '"reward_model": {"ground_truth": "4"}}')])
def test_problems_load_from_files_with_the_usual_column_names(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    one, two = load_file(tmp_path / name, "train")
    assert one.problem == "1+1"
    assert two.problem == "2+2"
    assert len(one.ids) == 3
    assert is_correct("\\boxed{2}", one.answer)
    assert is_correct("\\boxed{4}", two.answer)
    assert not is_correct("\\boxed{2}", two.answer)


@pytest.mark.parametrize("blank", ["\r\n", "  \n", "\t\n"])
def test_a_blank_line_of_jsonl_may_hold_spaces_or_the_line_end_of_windows(tmp_path, blank):
    row = '{"problem": "1+1", "answer": "2"}'
    (tmp_path / "x.jsonl").write_bytes(f"{row}\r\n{blank}{row}\r\n{blank}".encode())
    assert len(load_file(tmp_path / "x.jsonl", "train")) == 2


def test_a_column_with_its_own_name_wins_and_a_warm_up_takes_solutions(tmp_path):
    rows = [{"question": "no", "problem": "1+1", "solution": "= 2", "answer": "2"}]
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    for split, answer, solution in (("train", "2", ""), ("warmup", None, "= 2")):
        problem, = load_file(path, split)
        assert problem.problem == "1+1"
        assert problem.answer == answer
        assert problem.solution == solution


def test_a_conversation_is_the_prompt_with_its_system_message(tmp_path):
    """As in TRL's data sets; what counts as the problem is what the user says last."""
    messages = [{"role": "system", "content": "Think."}, {"role": "user", "content": "1+1"}]
    row = {"prompt": messages, "solution": "$\\boxed{2}$"}
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    run = a_run()
    run.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}={% endfor %}"
    problem, = load_problems(run, str(tmp_path / "x.jsonl"), "train")
    assert problem.problem == "1+1"
    assert problem.ids == run.tokenizer("Think.=1+1=").input_ids
    assert is_correct("\\boxed{2}", problem.answer)


def test_a_solution_that_says_its_answer_only_in_words_is_left_out(tmp_path, capsys):
    """And counted. A short one is an answer."""
    solutions = ["so \\boxed{2}", "It is clear from the definition of 2.", "4", "It is 3 #### 3"]
    rows = [json.dumps({"problem": "1+1", "solution": text}) for text in solutions]
    (tmp_path / "x.jsonl").write_text("\n".join(rows))
    golds = [problem.answer for problem in load_file(tmp_path / "x.jsonl", "train")]
    assert golds == ["so \\boxed{2}", "4", "3"]
    assert "1 of 4 rows left out" in capsys.readouterr().out
    (tmp_path / "x.jsonl").write_text(rows[1])
    with pytest.raises(SystemExit, match="no solution holds an answer in"):
        load_file(tmp_path / "x.jsonl", "train")


@pytest.mark.parametrize("gold", [
    {"value": "2"}, [["2"]], [None], [], math.nan, math.inf, ["2", -math.inf], None, " ", "#### "])
def test_a_gold_answer_that_could_never_be_paid_is_refused(tmp_path, gold):
    (tmp_path / "x.jsonl").write_text(json.dumps({"problem": "1", "answer": gold}))
    with pytest.raises(SystemExit, match="x.jsonl, row 1: the answer .*is"):
        load_file(tmp_path / "x.jsonl", "train")


def test_the_check_before_training_shows_how_gold_answers_are_read(capsys):
    problems = [Problem("", "\\frac{1}{2}"), Problem("", ["x+1", "y"]), Problem("", "(1,2)"),
                Problem("", "n!"), Problem("", "no solution")]
    problems.append(Problem("", ["n!", "m!"]))
    eapo.check_golds(a_run(), problems)
    said = capsys.readouterr().out
    assert "gold answer '\\\\frac{1}{2}' is read as the number 1/2" in said
    assert "is read as a formula" in said
    assert "gold answer '(1,2)' is read as () of 2 parts" in said
    assert said.count("is read as") == 3                    # of the first three
    assert "the verifier reads 4 of 6 gold answers (the others must" in said


def test_a_data_set_gives_the_configuration_and_the_split_named_or_the_usual_one(
        tmp_path, monkeypatch):
    """A folder stands in for the hub: two configurations, one with train and test, the other with
    train and validation, on which an evaluation must sit if there is no test."""
    splits = {"main": ("train", "test"), "other": ("train", "validation")}
    text = "---\nconfigs:\n"
    for config, names in splits.items():
        text += f"- config_name: {config}\n  data_files:\n"
        for name in names:
            text += f"  - split: {name}\n    path: {config}/{name}.jsonl\n"
            path = tmp_path / "set" / config / f"{name}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"problem": f"{config} {name}", "answer": "1"}))
    (tmp_path / "set" / "README.md").write_text(text + "---\n")
    monkeypatch.chdir(tmp_path)
    for source, split, found in [
            ("set:main", "train", "main train"), ("set:main", "eval", "main test"),
            ("set:other", "warmup", "other train"), ("set:other", "eval", "other validation"),
            ("set:main:train", "eval", "main train")]:
        assert [row["problem"] for row in eapo.read_rows(source, split)] == [found]
    with pytest.raises(SystemExit, match="no split dev: name one of train, validation, as in set"):
        eapo.read_rows("set:other:dev", "eval")
    for wrong in ("set", "set:mian:train"):
        with pytest.raises(ValueError, match="main"):
            eapo.read_rows(wrong, "train")


def test_a_data_set_saved_to_disk_loads(tmp_path):
    rows = datasets.Dataset.from_list([{"problem": "1+1", "answer": "2"}])
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "several")
    for name, split in (("one", "train"), ("several", "eval")):
        assert load_file(tmp_path / name, split)[0].answer == "2"


def test_evaluation_sets_have_short_names(tmp_path):
    """x of x.jsonl and of the folder x/, whose split is part of the name."""
    rows = datasets.Dataset.from_list([{"problem": "1+1", "answer": "2"}])
    datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "x")
    (tmp_path / "y.z.jsonl").write_text('{"problem": "1+1", "answer": "2"}')
    run = a_run(None, "--eval-data", f"{tmp_path}/x/, {tmp_path}/x:test, {tmp_path}/y.z.jsonl")
    eapo.load_eval_sets(run)
    assert list(run.eval_sets) == ["x", "x-test", "y.z"]


def test_a_folder_with_a_colon_in_its_name_is_a_path(tmp_path):
    rows = datasets.Dataset.from_list([{"problem": "1+1", "answer": "2"}])
    rows.save_to_disk(tmp_path / "a:b")
    assert len(eapo.read_rows(f"{tmp_path}/a:b", "train")) == 1


@pytest.mark.parametrize("name, text", [
    ("x.jsonl.gz", '{"problem": "1+1", "answer": "2"}\n'), ("x.csv.gz", "problem,answer\n1+1,2\n")])
def test_compressed_files_are_read(tmp_path, name, text):
    (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    assert load_file(tmp_path / name, "train")[0].answer == "2"


def test_a_split_of_a_data_set_on_disk_can_be_named(tmp_path):
    """FOLDER:hard is the split hard, although an evaluation would take test if none were named."""
    splits = {}
    for name in ("test", "hard"):
        splits[name] = datasets.Dataset.from_list([{"problem": name, "answer": "2"}])
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "x")
    for source, found in (("x", "test"), ("x:hard", "hard")):
        rows = eapo.read_rows(f"{tmp_path}/{source}", "eval")
        assert [row["problem"] for row in rows] == [found]


def test_a_prompt_as_long_as_the_limit_stays_and_a_longer_one_is_left_out(tmp_path, capsys):
    rows = ['{"problem": "123", "answer": "1"}', '{"problem": "1234", "answer": "1"}']
    (tmp_path / "x.jsonl").write_text("\n".join(rows))
    run = a_run(None, "--max-prompt-tokens", 3)
    left = load_problems(run, str(tmp_path / "x.jsonl"), "train")
    assert [problem.problem for problem in left] == ["123"]
    assert "1 of 2 prompts left out" in capsys.readouterr().out


@pytest.mark.parametrize("text, says", [
    ('\n{"problem": "1"', "cannot use .*x.jsonl, line 2: JSONDecodeError: Expecting"),
    ('{"problem": "1", "answer": "1"}\n\n[1]\n', "row 2: not an object"),
    ('{"text": "1", "answer": "1"}\n', "no problem among its columns 'text', 'answer': rename"),
    ('{"problem": "' + "1" * 40 + '", "answer": "1"}\n', "no prompt is within --max-prompt-tok"),
    ('{"problem": [{"role": "user"}], "answer": "1"}\n', "row 1: the problem must be text"),
    ('{"problem": [{"content": "1"}, {"role": "user", "content": "1"}], "answer": "1"}\n',
     "row 1: the problem must be text"),
    ('{"problem": [5], "answer": "1"}\n', "row 1: the problem must be text"),
    ('{"problem": " ", "answer": "1"}\n', "row 1: the problem must be text"),
    ('{"problem": "1", "answer": "1"}\n{"problem": "2"}\n', "row 2: the answer None is not text"),
    ("", "no rows")])
def test_bad_data_gets_one_line_that_says_where(tmp_path, text, says):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(SystemExit, match=says):
        load_file(tmp_path / "x.jsonl", "train")


def test_an_unreadable_csv_is_named_with_what_is_wrong_in_it(tmp_path):
    """And an error without words is called by its kind."""
    (tmp_path / "x.csv").write_text("problem,answer\n1+1,2\n1,2,3,4\n")
    with pytest.raises(SystemExit, match="x.csv, row 2: more values than columns"):
        load_file(tmp_path / "x.csv", "train")
    with pytest.raises(SystemExit, match="cannot use x: ValueError"), eapo.one_line_errors("x"):
        raise ValueError


def test_the_longest_prompt_of_all_sets_must_fit_the_model():
    """The tiny model reads 512 tokens: 504 and 8 fit, 505 and 8 do not."""
    run = a_run(tiny_model(0)[0], "--max-response-tokens", 8)
    short = Problem("00", "0", ids=run.tokenizer("00").input_ids)
    run.eval_sets = {"x": [Problem("", "0", ids=[3] * 504)]}
    sanity_check(run, [short])
    run.eval_sets = {"x": [Problem("", "0", ids=[3] * 505)]}
    with pytest.raises(SystemExit, match="at most 512 tokens, .* has 513"):
        sanity_check(run, [short])


def test_a_step_that_is_too_long_for_a_cpu_is_told(capsys):
    """64 prompts x 8 responses x 1953 tokens are 999,936, one token more 1,000,448."""
    for tokens, told in ((1953, False), (1954, True)):
        run = a_run(tiny_model(0)[0], "--max-response-tokens", tokens, "--prompts-per-step", 64,
                    "--group-size", 8)
        run.policy.lm.config.max_position_embeddings = 4096
        sanity_check(run, [Problem("00", "0", ids=run.tokenizer("00").input_ids)])
        assert ("too many for a CPU" in capsys.readouterr().out) == told


def test_the_tiny_model_refuses_what_it_has_no_characters_for(monkeypatch):
    """In problems as in worked solutions, of which they would vanish; also if not in the first."""
    for problem, solution in (("1+2=", "3 \\boxed{3}"), ("two", ""), ("1+2=", "1+2>3")):
        problems = [Problem("1+1=", "2", "\\boxed{2}"), Problem(problem, "3", solution)]
        monkeypatch.setitem(eapo.TASKS, "mine", lambda split: problems)
        if solution.startswith("3"):
            assert load_problems(a_run(), "mine", "train")[1].solution == solution
        else:
            with pytest.raises(SystemExit, match="mine: --model tiny cannot read '(tw|>)':"):
                load_problems(a_run(), "mine", "train")


def test_the_check_before_training_counts_right_solutions(capsys):
    problems = [Problem("", "1", "\\boxed{1}"), Problem("", "1", "\\boxed{2}"), Problem("", "1")]
    eapo.check_golds(a_run(), problems)
    said = capsys.readouterr().out
    assert "of 2 worked solutions of these problems, 50% are right" in said


def test_a_stream_gives_every_problem_once_an_epoch_and_goes_on_from_its_position():
    """Ten problems, 20 taken in threes and tens: two epochs in different orders. A stream with
    another seed has another order."""
    problems = list(range(10))
    stream = Stream(problems, seed=0)
    taken = []
    for n in (3, 10, 7):
        taken += stream.take(n)
    order = [problem for _, problem in taken]
    assert [number for number, _ in taken] == list(range(20))
    assert sorted(order[:10]) == sorted(order[10:]) == problems
    assert order[:10] != order[10:]
    later = Stream(problems, seed=0)
    later.position = 7
    assert later.take(13) == taken[7:]
    assert Stream(problems, seed=1).take(10) != taken[:10]


def test_other_problems_or_other_answers_are_other_data():
    """A checkpoint keeps a number by which the data are known again."""
    run = a_run()
    run.optimizer = eapo.new_optimizer(run, 0.1, 0.999)

    def data(problem, answer):
        run.stream = Stream([Problem(problem, answer, ids=[5])], seed=0)
        return eapo.checkpoint_state(run)["data"]

    assert data("1+1", "2") == data("1+1", 2)
    assert data("1+1", "2") != data("1+1", "3")
    assert data("1+1", "2") != data("1+2", "2")


# ---- settings ------------------------------------------------------------------------------------

@pytest.mark.parametrize("args, says", [
    ("--group-size 1", "--group-size 2 or more"),
    ("--alpha 2", "flip the sign"),
    ("--alpha -0.1", "flip the sign"),
    ("--model x --warmup-steps 3", "needs --warmup-data"),
    ("--clip-c 1.28", "--clip-c must lie above"),
    ("--prompts-per-step 0", "--prompts-per-step must be 1 or more"),
    ("--max-response-tokens 0", "--max-response-tokens must be 1 or more"),
    ("--resample -1", "--resample must be 0 or more"),
    ("--learning-rate -1", "0 or more"),
    ("--seed -1", "0 or more"),
    ("--quadrants PHX", "no quadrant is called PHX, only PHR, PLR, NLR, NHR"),
    ("--without PHR,X", "no quadrant is called X"),
    ("--method grpo --without PHR", "--without is for --method eapo"),
    ("--loss-mean rows", "--loss-mean is tokens or group"),
    ("--temperature 0", "--temperature must be above 0"),
    ("--top-p 0", "--top-p must be above 0 and at most 1"),
    ("--eval-top-p 1.5", "--eval-top-p must be above 0"),
    ("--overlong 1", "is a share, from 0 to below 1")])
def test_impossible_settings_are_refused_with_a_remedy(args, says):
    with pytest.raises(SystemExit, match=says):
        settings(*args.split())


def test_the_defaults_are_the_papers():
    """Table 6, with Qwen2.5-Math-7B; c is that of verl, which they train with. Others are off:
    warm-up, the penalty for length."""
    paper = dict(
        prompts_per_step=512, prompts_per_minibatch=32, group_size=8, steps=220, learning_rate=1e-6,
        max_prompt_tokens=1024, max_response_tokens=3072, temperature=1, top_p=.95, method="eapo",
        alpha=.2, phi=2, clip_low=.2, clip_high=.28, clip_c=3, loss_mean="tokens", overlong=0,
        warmup_steps=0)
    cfg = vars(settings("--model", "Qwen/Qwen2.5-Math-7B"))
    assert {name: cfg[name] for name in paper} == paper


def test_a_model_brings_its_settings_and_typed_ones_win(tmp_path):
    large = settings("--model", "agentica-org/DeepScaleR-1.5B-Preview")
    assert large.group_size == 16
    assert large.max_response_tokens == 24576
    assert settings().train_data == "addition"
    for other in ("x/tiny-llama", "models/DeepScaleR-1.5B/other"):
        assert settings("--model", other) == eapo.Config(model=other)
    for model, steps in (("tiny", 14), ("agentica-org/DeepScaleR-1.5B-Preview", 900)):
        (tmp_path / "config.json").write_text(json.dumps({"model": model}))
        later = settings("--model", tmp_path / "model")     # that an earlier run has left
        assert (later.steps, later.warmup_steps) == (steps, 0)
    typed = settings("--steps", 7)
    assert typed.steps == 7
    assert typed.prompts_per_step == 64
    only = settings("--eval-only", "--steps", 7)
    assert only.steps == only.warmup_steps == 0


def test_a_run_says_first_which_settings_its_model_has_brought(tmp_path, capsys):
    """Even if the model then cannot be found."""
    for model, brought in (("no DeepScaleR-1.5B", ["--group-size 16", "--steps 900"]),
                           ("no model", ["none"])):
        with pytest.raises(SystemExit, match=f"cannot use --model {model}"):
            eapo.main(["--model", model, "--out", str(tmp_path / "run")])
        first, _ = capsys.readouterr().out.split("\n", 1)
        assert first.startswith(f"preset of {model}: ")
        for setting in brought:
            assert f" {setting}" in first


# ---- the verifier --------------------------------------------------------------------------------

def pairs(table):
    """The cells of a table: "ours ~ gold ;; ours ~ gold", over several lines."""
    cells = []
    for line in table.strip().splitlines():
        for cell in line.strip().split(" ;; "):
            ours, gold = cell.split(" ~ ")
            cells.append((ours, gold))
    return cells


GOLDS = r"""42 | -7 | 0 | 1000000 | 2.5 | 16.67 | \frac{3}{4} | -\frac{1}{2}
| \dfrac{2469}{20,\!000} | 3/7 | 2\sqrt{3} | \frac{1+\sqrt{5}}{2} | \frac{9}{4}\pi | 80-20\pi
| \sqrt[3]{2}+1 | 2^{4950} | 1/2004! | 60^\circ | 20\% | \$23{,}000 | 8,\!424,\!000
| 24\text{ days} | 1\frac{2}{3} | (2,-3) | \left(\frac12,3\right) | [0,3)
| (-\infty,2)\cup(2,\infty) | 1,-2,3 | \{4,5,7\} | 3 \pm 2\sqrt{2} | x^2-5x+6 | (a+b)(a+c)
| y=2x+1 | x^2+y^2=25 | -7+24i | \sin^2 y | 1604_8 | \text{(C)} | \text{odd} | 3 : 5 : 7
| \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}""".replace("\n", " ").split(" | ")

EQUAL = pairs(r"""
    \sin x \cos 2x ~ \cos 2x \sin x ;; 0.75 ~ \frac34 ;; \dfrac{6}{8} ~ 3/4 ;; x=5 ~ 5
    \left(1,\,2\right) ~ (1, 2) ;; (x+1)^2 ~ x^2+2x+1 ;; .5 ~ 1/2
    x ≤ 2 ~ x \leq 2 ;; x ≥ 5 ~ x \geq 5 ;; x ≠ 3 ~ x \neq 3 ;; 28 pct ~ 28\%
    1/\sqrt2 ~ \frac{\sqrt{2}}{2} ;; x^{-1}y ~ \frac yx ;; e^{2\ln 3} ~ 9 ;; 2y = 4x + 2 ~ y=2x+1
    1,234 ~ 1234 ;; 2, 1 ~ 1,2
    5 \text{ cm}^2 ~ 5 ;; 25 ~ 25^{\circ}\mathrm{C} ;; \$5 ~ 5 ;; 28 ~ 28\% ;; 0.28 ~ 28\%
    28 \text{ percent} ~ 28\% ;; 9/5 ~ 1\frac45 ;; -15.6 ~ -15\frac35 ;; 204 ~ 204_5
    234, 1 ~ 1,234 ;; Yes ~ \text{yes} ;; C ~ \text{(C)} ;; 6, 8\text{, and }10 ~ 10, 8, 6
    \begin{bmatrix}0.5\\2\end{bmatrix} ~ \begin{pmatrix}\frac12\\2\end{pmatrix}
    (2,\infty)\cup(-\infty,1) ~ (-\infty,1)\cup(2,\infty) ;; x=1 \text{ or } x=2 ~ 2,1
    \sqrt[3]{8} ~ 2 ;; \arctan 1 ~ \frac{\pi}{4} ;; \tan x ~ \frac{\sin x}{\cos x}
    \sin x \cdot \cos x ~ \cos x \sin x ;; \tan(\frac{\pi}4) ~ 1 ;; 2x+4y=6 ~ x+2y=3
    q=2, p=5 ~ p=5, q=2 ;; 1/2x ~ \frac x2 ;; 4.4 \times 10^{-3} ~ 0.0044
    x \ge 3 \text{ or } x \le -2 ~ x \leq -2, x \geq 3 ;; -2^2 ~ -4 ;; 5 \text{ m} ~ 5 ;; 5 cm ~ 5
    3 inch ~ 3 ;; x+2e-1 ~ 2e-1+x ;; -x+1.5e ~ 1.5e-x ;; 3 feet ~ 3 ;; 1 foot ~ 1
    1{,}234.5 ~ 1234.5 ;; y-2x = 1 ~ y=2x+1 ;; x \in [0,1), y=2 ~ y=2, x \in [0,1)
    2,\!000 ~ 2000 ;; \text{13} ~ 13 ;; 1,2 ~ (1,2) ;; -x+y ~ y-x ;; 1,234,567 ~ 1234567
    \frac{20,000}{3} ~ \frac{20000}3 ;; a_1 + b ~ b + a_1 ;; 2^{3^2} ~ 512 ;; \sqrt2\sqrt3 ~ \sqrt6
    x \in [0,1) ~ [0,1) ;; x=1,2 ~ x = 2, 1 ;; 1,234.5 ~ 1234.5 ;; NO ~ no
    5\text{ km/h} ~ 5 ;; 1.5e-8 ~ 1.5 \cdot 10^{-8} ;; 2\cdot1\frac12 ~ 3 ;; \frac{1+2}{3} ~ 1
    (1{,}234, 5) ~ (1234, 5) ;; \textbf{(C)} ~ C ;; \angle ABC = 60^\circ ~ 60
    (a,b) = (1,2) ~ (1,2) ;; x = 6/2 ~ x = 3 ;; \text{Area} = 5 ~ 5
    \arccos 0 ~ \pi/2 ;; 2^-1 ~ 1/2 ;; x^-1y ~ \frac yx ;; -5\% ~ -0.05
    \displaystyle 5 ~ 5 ;; 50\% ~ \frac12 ;; \mathbf{7} ~ 7 ;; 60 degrees ~ 60^\circ
    g(t) = t^2 ~ t^2 ;; f(2)=5 ~ 5 ;; a_{10} = 55 ~ 55 ;; \text{B and C} ~ \text{C, B}
    5-3 ~ 5‒3 ;; 10^3 ~ 1000 ;; \cot x ~ \frac{\cos x}{\sin x} ;; \displaystyle AB ~ AB
    x <= 2 ~ x \le 2 ;; x >= 2 ~ x \geq 2 ;; x != 2 ~ x \ne 2 ;; 28 percentage ~ 28\%
    1 hour ~ 1 ;; 1 hour ~ 1\text{ hours} ;; 5, 7\text{ cm} ~ 5, 7 ;; 3x + 2 \text{ cm}^2 ~ 3x+2
    \sin(x) y ~ y\sin x ;; \sin 2x ~ 2\sin x\cos x ;; x = 204_5 ~ 204_5 ;; {1,2} ~ 2,1
    sqrt(2) ~ \sqrt2 ;; \{5\} ~ 5 ;; \text{a circle} ~ a circle
    1 < x \le 2 ~ 1 < x \leq 2 ;; i^2 ~ -1 ;; +5 ~ 5
    6\frac16\text{ feet} ~ \frac{37}{6} ;; 5\text{ square cm} ~ 5 ;; \frac37\% ~ \frac{3}{700}
    x=\text{no solution} ~ \text{no solution} ;; \text{Area of } ABC = 5 ~ 5
    \sin(x)^2 ~ \sin x\sin x ;; A=(1,2), B=(3,4) ~ B=(3,4), A=(1,2) ;; (1+49)\% ~ \frac12
    No ~ \text{No} ;; no ~ No ;; No solution ~ \text{no solution} ;; AB ~ \text{AB} ;; AB = 5 ~ 5
    f(x)=2x ~ 2x ;; x_1=3 ~ 3 ;; P(A) = \frac13 ~ \frac{1}{3} ;; 5—3 ~ 5-3 ;; 2⋅3 ~ 6
    x=2 \quad\text{or}\quad x=3 ~ 2,3 ;; \arccos\frac12 ~ \frac{\pi}{3} ;; 11111 ~ 11,\! 111
    4.4 \times 10^7 ~ 4.4e7 ;; 1e-05 ~ 0.00001""")

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
    y=2x ~ y=2x+1 ;; y=2x, z=1 ~ 2x, 1 ;; \frac{11}{21} ~ \frac{1}{121} ;; x \le 3 ~ x < 3
    1,1 ~ 1,2 ;; 1,2 ~ 1,2,3 ;; (1,2) ~ (1,2,3) ;; 1414213562 ~ 1000000000\sqrt2 ;; 2(1,2) ~ (2,4)
    \pi-3.14159265 ~ 0 ;; \sqrt{(1,2)} ~ 1 ;; 5.61 ~ 1.23 \cdot 4.56
    -(1,2) ~ (-1,-2) ;; (1,2) ~ 1
    1000001+0.1-0.1 ~ 1000000 ;; (3.14, 1001) ~ (3.14, 1000) ;; 2.50x+1001 ~ 2.50x+1000
    f(2x) ~ 2f(x) ;; \log_2(x^2) ~ x\log_2(x) ;; 2\lceil\frac n2\rceil ~ \lceil n\rceil
    \sin^{-1} x ~ \csc x ;; 2^3^2 ~ 64 ;; 2^3^2 ~ 512 ;; \frac123 ~ \frac1{23}
    2^3\frac12 ~ 2^{3.5}
    2\frac{-1}{2} ~ 1.5 ;; 1\frac{1}{x} ~ 1 + \frac{1}{x} ;; 3x ~ 3x+0.00001 ;; \sqrt23 ~ \sqrt{23}
    204_5 ~ 204 ;; x_1 ~ x ;; 5} ~ 5 ;; {5 ~ 5 ;; 1\,000 ~ 1000 ;; 3e-5 ~ 0.00003
    2\frac{x}{5}^2 ~ \frac{4x^2}{25} ;; x_1 + y = 5 ~ 5 ;; \text{Area}+5 = 6 ~ 6
    \frac12\frac34 ~ \frac{1}{2.75} ;; two circles ~ two lines ;; 3.14 - 1000 ~ 3.141 - 1000
    \begin{vmatrix}1&2\\3&4\end{vmatrix} ~ \begin{pmatrix}1&2\\3&4\end{pmatrix} ;; 2x=6 ~ x=3
    1\% + 1 ~ 2 ;; 100 + 28\% ~ 128 ;; (5,6]\% ~ (5,6] ;; x + y + z = 0x ~ x + y + z = 0""")


def test_a_calculation_with_a_set_or_a_word_is_not_read():
    for text in ("(1,2)+(3,4)", "[0,1)-[2,3)", r"\text{apples}+\text{pears}", r"2\{1,2\}"):
        assert eapo.answer_in_words(text) is None


def test_a_gold_that_is_an_equation_is_compared_whole():
    """x = 3 says what 2x = 6 says. The other way round 2x = 6 may just repeat the problem."""
    assert eapo.same_answer("x = 3", "2x = 6")
    assert not eapo.same_answer("2x = 6", "x = 3")


def test_a_variable_differs_at_all_points():
    """Where two were the same, an equation in it would not change, and be refused."""
    for name in ("x", "R", *eapo.VARIABLES, *(f"x_{n}" for n in range(300))):
        number = eapo.variable_number(name)
        assert len(set(number)) == 3 and 1 < min(number) and max(number) < 2


@pytest.mark.parametrize("ours, gold", EQUAL)
def test_other_notation_for_the_same_value_is_paid(ours, gold):
    assert eapo.same_answer(ours, gold) is True


@pytest.mark.parametrize("ours, gold", UNEQUAL)
def test_other_content_is_not_paid(ours, gold):
    assert eapo.same_answer(ours, gold) is False


# What a policy would learn to write if it were paid, by the trick that was used.
TRICKS = {
    "a variable passes for a unit": r"""
        4abcd ~ 4 ;; \frac{1}{2}bhkl ~ 1/2 ;; 2s ~ 2 ;; \frac{1}{4m} ~ \frac14 ;; \text{2x} ~ 2
        2\text{x}+1 ~ 3 ;; \mathbf{2x} ~ 2 ;; 4 apples ~ 4 ;; x\text{ is even} ~ x""",
    "a word that changes the value passes for a unit": r"""
        5 \text{ million} ~ 5 ;; 5 million ~ 5 ;; 5\text{ minus }2 ~ 5 ;; 5\text{ but not }6 ~ 5
        5 \text{ and a half} ~ 5 ;; \text{not }5 ~ 5
        7\text{ AM} ~ 7\text{ PM} ;; 5\text{ m}+1 ~ 6""",
    "an equation passes for a name": r"""
        xy^2 ~ y=xy ;; x=x ~ x^2 ;; xy ~ y=xy ;; a,b=5 ~ 5 ;; A,B=5 ~ 5 ;; (x),y=5 ~ 5
        (1,2)=5 ~ 5 ;; f(x)g(x)=6 ~ 6 ;; xy=6 ~ 6 ;; 2x=6 ~ 6 ;; x(x+1)=6 ~ 6
        4 ~ xy=4 ;; 2t ~ \tan t = 2t ;; 5=x=6 ~ 5 ;; = ~ 5""",
    "words pass for other words": r"""
        no mercy ~ no solution ;; a triangle ~ a circle ;; on ~ no ;; yes ~ no ;; ab ~ AB
        abc ~ ABC ;; \text{a triangle} ~ a circle ;; no real roots ~ no roots ;; B ~ A""",
    "a percent sign is read in two ways within a sum": r"""
        \frac{100}{99}\%+\frac{98}{99} ~ 1 ;; \frac{100}{99}\%+\frac{98}{99} ~ 2
        \frac{100}{99}+\frac{98}{99}\% ~ 2 ;; 2 + 3\% ~ 5 ;; 50\%\% ~ 50""",
    "a tiny number passes for another or for 0": r"""
        0\pi ~ 6.63 \times 10^{-34} ;; \pi-\pi ~ 1/2004! ;; 10^{-20}\pi ~ 0 ;; 10^{-400}\pi ~ 0
        10^{-400}\pi ~ 10^{-500}\pi ;; 10^{300}\pi 10^{300} ~ 10^{301}\pi 10^{300}""",
    "brackets or commas are lost": r"""
        -36104 ~ [-36,104] ;; (-36,104] ~ [-36,104] ;; 1234 ~ \{1,234\} ;; 2004,100 ~ 2004100
        0,123 ~ 123 ;; 1,2345 ~ 12345 ;; 5,1234 ~ 5,1,234 ;; 2{,}5 ~ 25 ;; 12345,67 ~ 12,345,67""",
}


@pytest.mark.parametrize("trick", TRICKS)
def test_no_trick_is_paid(trick):
    for ours, gold in pairs(TRICKS[trick]):
        assert eapo.same_answer(ours, gold) is False, (ours, gold)
        assert eapo.same_answer(gold, ours) is False, (ours, gold)


@pytest.mark.parametrize("text, gold", [("0.00001", 1e-5), ("0.000025", 2.5e-5), ("142", 142.0),
                                        ("10000000000000000000000", 1e22), ("0.5", [3, 0.5])])
def test_a_gold_that_is_a_number_is_the_number_and_not_its_exponent(text, gold):
    assert eapo.is_correct(f"\\boxed{{{text}}}", gold)
    assert not eapo.is_correct("\\boxed{7}", gold)


ROUNDED = pairs(r"""
    50/3 ~ 16.67 ;; 16.666 ~ 16.67 ;; 100/3 ~ 33.3 ;; -16.6667 ~ -16.67 ;; \pi ~ 3.14
    4.123106 ~ \sqrt{17} ;; 3.141593 ~ \pi ;; 0.333333 ~ \frac13 ;; 6+\sqrt5 ~ 8.24 \text{ mph}
    6.626 \times 10^{-34} ~ 6.63 \times 10^{-34} ;; \frac17 ~ 14.29\%""")
TOO_ROUGH = pairs(r"""
    16.68 ~ 16.67 ;; 16.6 ~ 16.67 ;; 16.67 ~ 50/3 ;; 3.14 ~ \pi ;; 0.33333 ~ \frac13 ;; 1/3 ~ 0.3
    4.9999999 ~ 5 ;; 0.4999 ~ 0.5 ;; 66.451 ~ 66.450 ;; 4.123 ~ \sqrt{17} ;; 16.67 ~ 17
    0.991 ~ 0.99 ;; 1.004 ~ 1.00""")


def test_a_rounded_gold_pays_what_rounds_to_it_and_an_exact_gold_pays_six_digits():
    """16.67 stands for 16.665 to 16.675, so 50/3 earns it; but 16.67 is no answer to 50/3. And no
    gold stands for more than 0.11% on either side: 1.004 is no answer to 1.00."""
    for ours, gold in ROUNDED:
        assert eapo.same_answer(ours, gold) is True, (ours, gold)
    for ours, gold in TOO_ROUGH:
        assert eapo.same_answer(ours, gold) is False, (ours, gold)
    assert not eapo.is_correct(r"\boxed{142.03}", 142.0)              # a float is no rounding


def test_the_last_complete_box_counts_and_nothing_else():
    """A mention of the answer elsewhere is not one; nor is a box that was cut short."""
    last = eapo.extract_answer
    assert last(r"\boxed{1} no, \boxed{\frac{1}{\{2\}}}.") == r"\frac{1}{\{2\}}"
    assert last(r"\boxed{2}, as you asked me to \boxed it") == "2"
    assert last(r"\boxed{5} wait, \boxed{\frac{1}{2}") == "5"
    assert last(r"\boxed{}") == ""
    assert last(r"\boxed{[0,1\}}") == r"[0,1\}"
    assert last(r"\boxed{1\\}") == r"1\\"
    for text in ("the answer is 5", r"\boxed", r"\boxed{5", ""):
        assert last(text) is None
        assert eapo.is_correct(text, "5") is False
    assert not eapo.is_correct(r"\boxed{2} no, \boxed{1}", "2")


def test_a_box_may_be_a_frame_or_lack_its_braces():
    for box in (r"\boxed 5", r"\boxed {5}", r"\fbox{5}", r"$\boxed 5$ is it", "\\boxed 5.\nDone"):
        assert eapo.is_correct(f"So {box}", "5") is True, box
    assert eapo.extract_answer(r"\boxed -5") == "-5"
    for box in (r"\boxed 5/2", r"\boxed 5 or 6", r"\boxed{5} \fbox{4}"):
        assert eapo.is_correct(f"So {box}", "5") is False, box


def test_an_earlier_box_is_not_paid_if_the_last_one_is_too_long():
    """An answer has at most 500 characters. The box with 500 is read, the one with 501 is not."""
    for size, content in ((500, "1" * 500), (501, None), (10_000, None)):
        response = r"\boxed{5} or \boxed{" + "1" * size + "}"
        assert eapo.extract_answer(response) == content
        assert eapo.is_correct(response, "5") is False


def test_golds_come_boxed_in_dollars_as_numbers_or_as_alternatives():
    response = r"Hence $\boxed{142}$."
    for gold in ("142", "$142$", r"so \boxed{142}", 142, 142.0, ["7", "142"], ("142",)):
        assert eapo.is_correct(response, gold) is True
    for gold in ("7", 7, "", ["7", "8"], []):
        assert eapo.is_correct(response, gold) is False
    assert eapo.is_correct(r"\boxed{}", "") is False


def test_a_response_that_boxes_several_answers_does_not_win_by_one_of_them():
    """Else the policy learns to list candidates: \\boxed{0,1,2,...,999} solves all of AIME."""
    for answer in (r"\boxed{2} or \boxed{1}", r"\boxed{1 \text{ or } 2}", r"\boxed{1,2,3}",
                   r"\boxed{2;3}", r"\boxed{\{1,2\}}", r"\boxed{2 \cup 3}", r"\boxed{2=3}",
                   r"\boxed{2 \pm 0, 3}", r"\boxed{1, 2 \text{ hours}}", r"\boxed{2,2}"):
        assert eapo.is_correct(answer, "2") is False, answer


def test_boxing_an_equation_of_the_problem_is_not_an_answer():
    """x^2-5x+6=0 ends in 0 and is true of 2 and 3, but it is neither 0 nor 2, 3."""
    for gold in ("0", "2", "2,3", "6"):
        assert eapo.is_correct(r"\boxed{x^2-5x+6=0}", gold) is False
    assert eapo.is_correct(r"\boxed{x+y=5}", "5") is False


def test_an_expression_with_free_variables_is_not_a_number():
    """Not even where the variable cancels: a number was asked for."""
    for answer in ("x", "5x", "5+0x", "x-x+5", "5x/x", "5+y=5+y", "5x^0", "x+5-x"):
        assert eapo.same_answer(answer, "5") is False, answer


def test_nan_infinity_and_what_cannot_be_read_win_nothing():
    for answer in ("nan", "inf", r"\infty", "-\\infty", "1/0", "0/0", r"\log 0", "5^{", "{5", "5?",
                   "", "9^{9^{9^9}}", "10^{400}\\sqrt2", r"\frac{5}", "5 \\foo", "\x005", "1.2.3",
                   "()", ",", "5,", ",5", "=", "-", "%", "_",
                   '"', "\ud8005", "٥", "５", "5\\", "5!"):
        for gold in ("5", "0", "1", r"\frac{1}{2}", r"(1,\infty)"):
            wins = answer == "5\\" and gold == "5"                    # a stray backslash is nothing
            assert eapo.same_answer(answer, gold) is wins, (answer, gold)


def test_what_cannot_be_read_equals_itself_however_it_is_spaced():
    for gold in ("2004!", r"\binom{n}{2}", "|x|", r"\log_2 3", "x > 3", r"\lfloor x \rfloor",
                 r"3 \pm 2\sqrt{2}", r"\sin^2 y", r"\sin^{-1} y"):
        assert eapo.same_answer(gold.replace(" ", r"\,"), f"${gold}$.") is True
        assert eapo.same_answer(gold + "+1", gold) is False


LEFT_OUT = pairs(r"""
    \sec^2 y ~ \tan^2 y + 1 ;; 1+\sqrt2,\ 1-\sqrt2 ~ 1\pm\sqrt2 ;; \{2, -2\} ~ x = \pm 2
    5! ~ 120 ;; \binom52 ~ 10 ;; |-5| ~ 5 ;; \log_2 8 ~ 3 ;; 3 < x ~ x > 3 ;; x>3 ~ (3,\infty)
    \sin\pi ~ 0 ;; \ln 1 ~ 0 ;; 0\pi ~ 0 ;; 2x > 6 ~ x > 3
    1'234 ~ 1234 ;; 408.04 ~ 408.0""")


def test_forms_that_are_left_out_equal_only_the_same_tokens():
    """Rare in golds, and each costs a rule. Floats near 0 have lost their digits."""
    for ours, gold in LEFT_OUT:
        assert eapo.same_answer(ours, gold) is False, (ours, gold)
        assert eapo.same_answer(ours, ours) is True
        assert eapo.same_answer(gold, gold) is True


HOSTILE = [
    # too much work
    "9^{9^{9^{9^9}}}", "2^{99999999999}", "9^{999999}+1", "99999999999!", "1.0e999999999",
    "x^{2000}", "5_1e99999999", r"\binom{9999999}{4444444}", "+".join(["x^{99}"] * 140),
    "+".join([r"\frac{5^{6999}}{7^{1999}}"] * 40), "x^{900}+y^{899}+" * 9 + "1", "x^x" * 200,
    "(x+y+z)^{99}" * 10, "1/3^{1500}+" * 11 + "1", "2004!*" * 150, "2004!+2003!*" * 8,
    "e^{" * 30 + "1" + "}" * 30,
    # too long
    "9" * 10 ** 6, "{" * 10 ** 5, " " * 5 * 10 ** 6 + "1", r"\boxed{" * 150000, "x" * 1000,
    # too deep
    "(" * 400 + "1" + ")" * 400, "-" * 900, "1" + "^1" * 400, "3" + "!" * 900, "|" * 900,
    r"\sqrt" * 180, r"\frac" * 150, r"\text{1" * 70, "x_{" * 300, r"\sin " * 30,
    # too many
    r"1\pm" * 200, r"1\pm" * 59 + "1", ",".join("1" * 490), ",".join("x" * 60), "=1" * 400,
    ",".join(map(str, range(89))), r"\{1,2\}," * 48, "1,234%" * 30, "1'" * 200, "x=" * 50 + "1",
    # too little
    "\\", "1_", "^1", "\ud800", "٣"]


def test_hostile_input_takes_milliseconds():
    """Every amount of work is bounded before it is done. Process time, and the best of three runs,
    so that a busy machine does not matter."""
    for text in HOSTILE:
        for ours, gold in ((text, "5"), ("5", text), (text, text[::-1]), (text, text + "+1")):
            seconds = []
            for _ in range(3):
                start = time.process_time()
                equal = eapo.same_answer(ours, gold)
                correct = eapo.is_correct(f"\\boxed{{{ours}}}", gold)
                seconds.append(time.process_time() - start)
                assert type(equal) is bool
                assert type(correct) is bool
            assert min(seconds) < 0.02, text[:40]
    assert eapo.same_answer("(" * 20 + "1" + ")" * 20, "1")
    assert not eapo.same_answer("9" * 501, "9" * 501)


@pytest.mark.slow
def test_random_latex_never_raises():
    """Two seconds of random strings and mutilated golds; the seed is fixed, so failures repeat."""
    rng = random.Random(0)
    alphabet = [*r"{}()[]^_+-*/=<>,.:;!%|&$'0129xyei", " ", "\x00", "√", "\\", *r"""\frac \sqrt[ \pm
        \text{ \cup \infty \left \pi \sin \log_ \binom \{ \} \\ \begin{pmatrix} \end{pmatrix}
        \lfloor \circ \le or cm 1e9 {,} f( no \boxed""".split()]
    end = time.time() + 2
    while time.time() < end:
        text = rng.choice(GOLDS)
        if rng.random() < 0.5:
            text = "".join(rng.choices(alphabet, k=rng.randrange(1, 30)))
        cut = rng.randrange(len(text) + 1)
        inserted = rng.choice(["", rng.choice(alphabet)])
        rest = text[cut + rng.randrange(3):]
        text = text[:cut] + inserted + rest
        assert type(eapo.same_answer(text, rng.choice(GOLDS))) is bool, text
        assert type(eapo.is_correct("\\boxed{" + text, text)) is bool, text


def test_the_verifier_works_in_any_thread():
    """Time-outs by signals, the usual safety net of verifiers, need the main thread."""
    def work(_):
        return eapo.same_answer(r"\frac12", "0.5"), eapo.same_answer("9^{9^{9^9}}", "9")

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert set(pool.map(work, range(40))) == {(True, False)}


def test_a_stack_that_is_nearly_full_does_not_raise():
    """50 brackets take 200 frames. Where only 120 are left, they are unreadable."""
    deep = "(" * 50 + "1" + ")" * 50

    def call_below(frames):
        return eapo.same_answer(deep, "1") if frames == 0 else call_below(frames - 1)

    assert call_below(0) is True
    assert call_below(sys.getrecursionlimit() - len(inspect.stack()) - 120) is False


def without(gold, part):
    return gold.replace(part, "", 1) if part in gold else "?"


HARMLESS = [
    lambda g: f"${g}$", lambda g: f" {g} ", lambda g: g + ".", lambda g: r"\displaystyle " + g,
    lambda g: g.replace(r"\frac", r"\dfrac"), lambda g: g.replace("pmatrix", "bmatrix"),
    lambda g: g.replace("{,}", ",").replace(",\\!", ","),
    lambda g: g if "text" in g else g.replace("(", r"\left(").replace(")", r"\right)"),
    lambda g: "x=" + g if g.isdigit() else g, lambda g: g + ".0" if g.isdigit() else g,
    lambda g: g.replace(r"^\circ", "").replace(r"\%", " percent")]
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
    for ours in GOLDS:
        for gold in GOLDS:
            assert ours == gold or not eapo.same_answer(ours, gold), (ours, gold)


# ---- credit, measured ----------------------------------------------------------------------------

def h(x):
    return -x * math.log(x) - (1 - x) * math.log(1 - x)


def markov_lm(table):
    """A Llama over the tiny vocabulary whose next token depends on the last one alone.

    table: {character: {next character: probability}}, "." is the stop token. Attention and MLP add
    nothing, embeddings are one-hot, so the hidden state is sqrt(D) at the token's own place.
    """
    _, tokenizer = eapo.tiny_model(0)
    V = D = 64
    lm = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=1, pad_token_id=0)).eval()
    with torch.no_grad():
        lm.model.layers[0].self_attn.o_proj.weight.zero_()
        lm.model.layers[0].mlp.down_proj.weight.zero_()
        lm.model.embed_tokens.weight.copy_(torch.eye(V, D))
        lm.lm_head.weight.fill_(-60 / math.sqrt(D))
        for last, nexts in table.items():
            for token, p in nexts.items():
                row = tokenizer.convert_tokens_to_ids(token) if token != "." else 1
                column = tokenizer.convert_tokens_to_ids(last)
                lm.lm_head.weight[row, column] = math.log(p) / math.sqrt(D)
    return lm, tokenizer


# "=" decides whether 2 or 3 is likely, 2 or 3 is the verdict (2 is right), 6 or 7 changes nothing.
# 8 instead of 0 or 1 is a slip: it is always followed by 3.
TOY = {"=": {"0": .4995, "1": .4995, "8": .001}, "0": {"2": .9, "3": .1}, "1": {"2": .1, "3": .9},
       "8": {"3": 1.}, "2": {"6": .5, "7": .5}, "3": {"6": .5, "7": .5}, "6": {".": 1.},
       "7": {".": 1.}}


def measured(table, responses, n, budget=10 ** 6):
    """A Batch of responses to 1+1=, right with a 2 in them, whose true credit was measured."""
    lm, tokenizer = markov_lm(table)
    cfg = eapo.parse_args(["--max-response-tokens", "8"])
    run = eapo.Run(cfg, eapo.World(cfg), None, eapo.Policy(lm), tokenizer, [1], lm)
    prompt = tokenizer("1+1=").input_ids
    problem = eapo.Problem("1+1=", "2", check=lambda text, answer: answer in text, ids=prompt)
    ids = [tokenizer(text).input_ids + [1] for text in responses]
    batch = eapo.make_batch([prompt] * len(ids), ids)
    batch.old_logp, batch.H = eapo.score(run.policy, run.world, batch, 1.0)
    eapo.mark(run, batch, [problem] * len(ids))
    batch.number = torch.zeros(len(ids), dtype=torch.long)
    eapo.true_credit(run, batch, [problem], budget, n)
    return batch


@pytest.mark.slow
def test_true_credit_of_a_policy_whose_values_are_written_down():
    """V(=) = 1/2 and V(0) = .9, so 0 removes h(1/2) - h(.9) = .368 nats of doubt, and 2 or 3 the
    rest, h(.9) = .325. 6 or 7 are a fork, H = log 2, which decides nothing. The standard error of I
    is 2.2 sqrt(.9 x .1 / 2000) / sqrt(2) = .010, so .04 is four of them."""
    batch = measured(TOY, ["026", "037"], n=2000)
    for i, end in enumerate((1., 0.)):
        assert batch.V[i].tolist() == pytest.approx([.5, .9, end, end], abs=.04)
        assert batch.I[i].tolist() == pytest.approx([h(.5) - h(.9), h(.9), 0, 0], abs=.04)
        assert batch.true_advantage[i].tolist() == pytest.approx([.4, end - .9, 0, 0], abs=.04)
    assert batch.H[0, 2] == pytest.approx(math.log(2), abs=1e-4)


def test_where_nothing_is_decided_the_value_stays():
    """4 is certain, and has V = 1/2 before it as 2 has; behind 2 the response is right. Of the six
    tokens behind 5, four are tried, .4 + .3 + .1 + .1 = .9 of pi: V = (.4 + .3) / .9 = 7/9."""
    table = {"=": {"4": 1.}, "4": {"2": .5, "3": .5}, "2": {"6": 1.}, "3": {".": 1.},
             "6": {".": 1.}}
    assert measured(table, ["426"], n=10).V[0].tolist() == pytest.approx([.5, .5, 1, 1], abs=1e-4)
    table = {"=": {"5": 1.}, "5": {"2": .4, "0": .3, "3": .1, "7": .1, "8": .06, "9": .04},
             "0": {"2": 1.}, "2": {".": 1.}, "3": {".": 1.}, "7": {".": 1.}}
    assert measured(table, ["52"], n=10).V[0].tolist() == pytest.approx([7 / 9, 7 / 9, 1], abs=1e-4)


def test_likely_tokens_are_those_at_the_temperature_of_evaluations():
    """Of temperature 0.5: the four most probable with 1% or more, and the one drawn, as a plain
    forward pass has them, rescaled to add up to 1."""
    lm = tiny_lm()
    run = a_run(lm, "--eval-temperature", 0.5)
    batch = tiny_batch(1)
    batch.number = torch.zeros(1, dtype=torch.long)
    start = int(batch.prompt_len[0])
    p = (lm(batch.ids).logits[0, start - 1:-1] / 0.5).softmax(dim=-1).detach()
    for decision in eapo.find_decisions(run, batch, 0):
        drawn = batch.response(0)[decision.t]
        best = p[decision.t].topk(4)
        expected = {v: x for v, x in zip(best.indices.tolist(), best.values.tolist()) if x >= 0.01}
        expected[drawn] = float(p[decision.t, drawn])
        total = sum(expected.values())
        assert len(decision.pi) == len(expected)
        for branch, share in decision.pi.items():
            assert share == approx(expected[branch.tokens[-1]] / total, abs=1e-5)
    assert eapo.find_decisions(run, batch, 0)


def test_once_the_response_is_lost_no_token_has_any_credit():
    batch = measured(TOY, ["037"], n=20)
    assert batch.H[0, 2] > .69
    assert batch.I[0, 2:].tolist() == [0, 0] and batch.true_advantage[0, 2:].tolist() == [0, 0]


def test_credits_of_a_response_add_up_to_the_doubt_before_it():
    """The chain rule: on average over responses, here for each, sum_t I = h(V(s_0)) = log 2."""
    batch = measured(TOY, ["026", "037", "126", "137"], n=400)
    assert batch.I.sum(1).tolist() == pytest.approx([math.log(2)] * 4, abs=.03)


def test_a_slip_is_measured_although_it_is_less_likely_than_one_in_a_hundred():
    """8 has p = .001: V falls from about 1/2 to 0."""
    batch = measured(TOY, ["836"], n=200)
    assert batch.true_advantage[0, 0] == pytest.approx(-.5, abs=.05)


def test_a_response_that_may_end_is_not_continued_behind_its_end():
    """The stop token or 2, which is right: V = 1/2, and the stop token brings it to 0."""
    batch = measured({"=": {".": .5, "2": .5}, "2": {".": 1.}}, ["", "2"], n=10)
    assert batch.V[:, 0].tolist() == [.5, .5]
    assert batch.true_advantage[:, 0].tolist() == [-.5, .5]


def test_credit_is_at_most_entropy_but_for_an_error_of_one_in_n():
    """A random chain of forks: I <= H + 1/n at all places, and I < H on the whole."""
    torch.manual_seed(0)
    pi = (2 * torch.randn(9, 9)).softmax(1).tolist()
    table = {last: dict(zip("01234567.", p)) for last, p in zip("=01234567", pi)}
    batch = measured(table, ["01234567", "2425", "7", "0613"], n=50)
    over = (batch.I - batch.H)[batch.mask]
    assert over.max() <= 1 / 50 and batch.I[batch.mask].sum() < .9 * batch.H[batch.mask].sum()
    assert batch.I[batch.mask].max() > .05


def test_the_bias_of_an_estimated_entropy_is_taken_out():
    """Two tokens with pi = 1/2 and V = .4 both: I is 0, and without correction it would come out
    (1 - 1/2) / 2n = .0125 too high at n = 20."""
    torch.manual_seed(0)
    pi = torch.tensor([.5, .5])
    draws = torch.binomial(torch.full((4000, 2), 20.), torch.tensor(.4)) / 20
    mean = sum(float(eapo.value_and_information(pi, values, 20)[1]) for values in draws) / 4000
    assert abs(mean) < .002
    V, I = eapo.value_and_information(pi, torch.tensor([1., 0.]), 20)
    assert float(V) == .5 and float(I) == pytest.approx(math.log(2))


def test_the_example_in_the_heading_of_part_8():
    """pi = .4, .6 and 12, 1 of 16 right; with numbers of continuations that know no noise."""
    V, I = eapo.value_and_information(torch.tensor([.4, .6]), torch.tensor([12 / 16, 1 / 16]), 1e9)
    assert float(V) == pytest.approx(.3375)
    before = -.3375 * math.log(.3375) - .6625 * math.log(.6625)
    after = -.4 * (.75 * math.log(.75) + .25 * math.log(.25))
    after -= .6 * (1 / 16 * math.log(1 / 16) + 15 / 16 * math.log(15 / 16))
    assert float(I) == pytest.approx(before - after, abs=1e-6)
    assert round(before, 2) == .64 and round(after, 2) == .37 and round(float(I), 2) == .27


def test_a_value_that_rounding_lifts_above_1_is_still_no_doubt():
    pi = torch.tensor([1., 2e-7])
    assert float(pi.sum()) > 1
    V, I = eapo.value_and_information(pi, torch.tensor([1., 1.]), 20)
    assert float(V) == 1 and float(I) == 0


def test_equal_beginnings_are_continued_once_and_the_work_is_bounded(capsys):
    """026 and 027 share their decisions, with six beginnings: 0, 1, 02, 03, 026 and 027. 137 adds
    four: with budget=9 it is not measured, and its place is left to the next that fits."""
    batch = measured(TOY, ["026", "137", "027"], n=10, budget=9)
    assert "60 continuations" in capsys.readouterr().out
    assert batch.I[[0, 2]].isfinite().all()
    for x in (batch.V, batch.I, batch.true_advantage):
        assert x[1].isnan().all()
    batch = measured(TOY, ["026", "137"], n=10, budget=10)
    assert "100 continuations" in capsys.readouterr().out
    assert batch.I.isfinite().all()
    batch = measured(TOY, ["026", "137"], n=10, budget=5)
    assert "was worth: 0 continuations" in capsys.readouterr().out
    assert batch.I.isnan().all()


def test_rules_are_compared_where_a_group_is_mixed_and_was_measured():
    """Only the first of three groups of 2: the second has no advantages, the third was not
    measured. Its three tokens, A = 1, 1, -1 and H = 2, 0, 1, have true advantages .5, 0, -.25, of
    length sqrt(.3125). H is one sigma above the mean, one below and on it, the scores are .5, -.5
    and 0: EAPO credits 1.1, .9, -1, and 1.95, .05, -1 at alpha 1.9. Forking keeps two tokens of
    seven, those with H 2 and 1; entroadv adds .5, 0 and .4, w-reinforce gives .1, .1, -1. The
    cosine for GRPO is .75 / sqrt(3 x .3125), and so on. --quadrants plays no part."""
    run = a_run(None, "--eval-samples", 2, "--quadrants", "PHR")
    batch = batch_of(2, 1, 1, 1, 1, 1)
    batch.H = tensor([[2., 0], [1, 0], [.5, 0], [.5, 0], [.5, 0], [.5, 0]])
    batch.right = tensor([True, False, True, True, True, False])
    batch.advantage = tensor([1., -1, 0, 0, 1, -1])
    batch.I = torch.zeros(6, 2)
    batch.I[4:] = math.nan
    batch.true_advantage = tensor([[.5, 0], [-.25, 0], [.9, 0], [.9, 0], [0, 0], [0, 0]])
    batch.true_advantage[4:] = math.nan
    credits = {"grpo": [1, 1, -1], "eapo": [1.1, .9, -1], "eapo alpha 1.9": [1.95, .05, -1],
               "forking": [1, 0, -1], "entroadv": [1.5, 1, -.6], "w-reinforce": [.1, .1, -1]}
    expected = {}
    for rule, (a, b, c) in credits.items():
        length = math.sqrt((a * a + b * b + c * c) * .3125)
        expected[f"credit/cosine/{rule}"] = (.5 * a - .25 * c) / length
    assert eapo.credit_by_rule(run, batch) == approx(expected, abs=1e-4)
    batch.advantage[:2] = 0
    assert eapo.credit_by_rule(run, batch) == {}


def test_the_problems_with_the_most_doubt_are_chosen_once(monkeypatch):
    """0, 3, 2 and 4 of 4 right: problem 2 is chosen, and then 1; later evaluations keep them."""
    shown = []
    monkeypatch.setattr(eapo, "show_responses", lambda run, step, problem, group: shown.append(
        (problem, group.number.tolist(), group.advantage.tolist())))
    def true_credit(run, batch, problems, budget):
        shown.append(batch.number.tolist())
        batch.I = torch.zeros(8, 1)
    monkeypatch.setattr(eapo, "true_credit", true_credit)
    monkeypatch.setattr(eapo, "credit_by_kind", lambda run, name, batch: {"x": 1})
    monkeypatch.setattr(eapo, "credit_by_rule", lambda run, batch: {"y": 1})
    cfg = eapo.parse_args(["--eval-samples", "4", "--credit-problems", "2", "--steps", "9"])
    run = types.SimpleNamespace(cfg=cfg, page={}, stopped=False)
    batch = eapo.make_batch([[5]] * 16, [[6]] * 16)
    batch.number = torch.arange(4).repeat_interleave(4)
    batch.H = torch.ones(16, 1)
    right = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    for step, verdicts in ((0, right), (5, right.flip(0)), (9, right * 0)):
        batch.right = verdicts.flatten() > 0
        batch.reward = torch.where(batch.right, 1., -1.)
        metrics = eapo.inspect_problems(run, step, "e", ["a", "b", "c", "d"], batch)
        assert bool(metrics) == (step != 5)
    assert shown[0] == shown[3] == [2] * 4 + [1] * 4        # the first is measured first
    assert shown[1][:2] == shown[4][:2] == ("c", [2] * 4) and shown[4][2] == [0] * 4
    assert shown[1][2] == pytest.approx([.866, .866, -.866, -.866], abs=1e-3)
    assert run.page == {"set": "e", "problems": [2, 1], "rows": [0, 1, 2, 3], "sections": [],
                        "pixels": 44}


def test_a_single_try_at_a_problem_has_no_advantage(monkeypatch):
    """With one response per problem there is no group to compare it with: A = 0 on the page."""
    shown = []
    monkeypatch.setattr(eapo, "show_responses", lambda run, step, problem, group: shown.append(
        (problem, group.advantage.tolist())))
    run = a_run(None, "--eval-samples", 1, "--credit-problems", 0)
    batch = make_batch([[5]] * 2, [[6]] * 2)
    batch.number = torch.arange(2)
    batch.H = torch.ones(2, 1)
    batch.right = torch.tensor([True, False])
    batch.reward = torch.tensor([1., -1])
    eapo.inspect_problems(run, 0, "x", ["a", "b"], batch)
    assert shown == [("a", [0])]


def test_a_continuation_ends_where_its_response_would():
    """Of 6 tokens 1 is written: 5 are left. After the sixth, or the stop token, it is complete. The
    problem's own limit goes before that of the run."""
    run = a_run(None, "--max-response-tokens", 6)
    digits = run.tokenizer.convert_tokens_to_ids(list("123456"))
    problem = Problem("1+1=", "12", ids=[5])
    rest = eapo.rest_of(run, problem, digits[:1])
    assert rest.limit == 5
    assert rest.ids == [5, digits[0]]
    assert rest.begun == digits[:1]
    assert rest.answer == "12"
    assert not eapo.is_complete(run, problem, digits[:5])
    assert eapo.is_complete(run, problem, digits)
    assert eapo.is_complete(run, problem, digits[:2] + [1])
    short = Problem("1+1=", "12", ids=[5], limit=4)
    assert eapo.rest_of(run, short, digits[:1]).limit == 3
    assert not eapo.is_complete(run, short, digits[:3])
    assert eapo.is_complete(run, short, digits[:4])


def test_a_branch_that_is_complete_has_its_verdict():
    """After 3 the response may end, which would be wrong, or go on with 2, which would be right."""
    table = {"=": {"3": 1.}, "3": {".": .5, "2": .5}, "2": {".": 1.}}
    batch = measured(table, ["3", "32"], n=2)
    assert batch.true_advantage[0].tolist() == [0, -.5, 0]
    assert batch.true_advantage[1].tolist() == [0, .5, 0]


def test_a_continuation_is_marked_as_one_text_with_what_it_continues():
    """Some tokenizers write a character of several bytes as several tokens, or drop the space in front
    of a text: the two halves of a response must not be decoded by themselves."""
    run = a_run()
    run.tokenizer = types.SimpleNamespace(decode=lambda ids, skip_special_tokens: " ".join(
        "abcd"[token] for token in ids))
    problem = Problem("?", "a b c d", check=lambda text, answer: text == answer)
    problem.begun = [0, 1]
    batch = make_batch([[9]] * 2, [[2, 3], [3, 2]])
    eapo.mark(run, batch, [problem, problem])
    assert batch.right.tolist() == [True, False]


def test_the_table_of_credit_holds_shares_and_nats_per_response(monkeypatch, capsys):
    """Measured are "+1" and "1" with H .5 .25, .25 and I .4 0, .1 nats: per response .5 and .25. The
    + has 1/3 of the tokens, 1/2 of H and 4/5 of I. The third response was not measured."""
    run = a_run()
    monkeypatch.setitem(eapo.KINDS, "x", lambda tokens: [
        "sign" if token == "+" else "digit" for token in tokens])
    plus, one = run.tokenizer.convert_tokens_to_ids(list("+1"))
    batch = make_batch([[5]] * 3, [[plus, one], [one], [plus, plus]])
    batch.H = torch.tensor([[.5, .25], [.25, 9], [9, 9]])
    batch.I = torch.tensor([[.4, 0], [.1, 9], [torch.nan, torch.nan]])
    metrics = eapo.credit_by_kind(run, "x", batch)
    expected = {}
    for kind, numbers in (("sign", (1 / 3, .25, .2, .8)), ("digit", (2 / 3, .25, .05, .2)),
                          ("all", (1, .5, .25, .5))):
        for key, x in zip(("tokens", "H", "I", "I/H"), numbers):
            expected[f"credit/{kind}/{key}"] = x
    assert {key: float(x) for key, x in metrics.items()} == pytest.approx(expected)
    lines = capsys.readouterr().out.splitlines()
    assert "In 2 responses" in lines[0] and ".500 nats" in lines[1] and "0.250" in lines[1]
    assert lines[5].split() == ["sign", "33.3%", "50.0%", "80.0%", "0.800"]
    assert lines[7].split() == ["all", "100.0%", "100.0%", "100.0%", "0.500"]


def test_a_kind_without_entropy_has_no_ratio_of_infinity(monkeypatch):
    """Where the policy was certain of all its tokens, I / H is 0 / 0: it is printed as 0."""
    run = a_run()
    one, = run.tokenizer.convert_tokens_to_ids(["1"])
    batch = make_batch([[5]], [[one]])
    batch.H = batch.I = torch.zeros(1, 1)
    metrics = eapo.credit_by_kind(run, "x", batch)
    assert float(metrics["credit/all/I/H"]) == 0


def test_every_token_of_an_addition_has_a_kind():
    """o: which digit comes first, c: carry or not, l: chatter, the rest is routine."""
    def kinds(tokens):
        short = {"order": "o", "carry": "c", "letter": "l", "rest": "."}
        return "".join(short[kind] for kind in eapo.addition_kinds(tokens))
    tokens = list("9+0=9 7+4=11 1+7+1=9 ") + ["\\boxed{"] + list("919}") + ["<eos>"]
    assert kinds(tokens) == "o.....o..c...o..c...." + "......"
    assert kinds("9+0=9kcm 7+4=11pba ") == "o....lll.o..c..lll."


def test_chatter_has_the_sums_of_addition_and_fits_into_the_response():
    """The longest solution: 6 + 3 * 8 tokens of columns, 12 letters, 4 spaces, 8 for box and stop
    token: 54 of 64. Without its letters, it is a solution of the same sum."""
    _, tokenizer = eapo.tiny_model(0)
    plain = eapo.addition("eval")
    chatty = eapo.chatter("eval")
    assert [p.problem for p in plain] == [p.problem for p in chatty]
    for problem in chatty:
        ids = tokenizer(problem.solution).input_ids
        assert tokenizer.decode(ids) == problem.solution and len(ids) + 1 <= 54
        assert sum(c in eapo.LETTERS for c in problem.solution.split(" \\")[0]) == 12


# ---- the page ------------------------------------------------------------------------------------

class Tags(html.parser.HTMLParser):
    """The tags of a page with the names of their attributes."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, *(name for name, _ in attributes)))


def a_page(tmp_path, text, *flags, step=0, measured=2, times=1):
    """The page of a run whose model, problems and data set say `text`."""
    cfg = eapo.parse_args(["--model", "m", "--eval-data", "e", *flags])
    lm = types.SimpleNamespace()
    tokenizer = types.SimpleNamespace(decode=lambda ids: text)
    run = eapo.Run(cfg, eapo.World(cfg), str(tmp_path), lm, tokenizer, [1], lm)
    run.eval_sets = {text: []}
    torch.manual_seed(0)
    group = eapo.make_batch([[5]] * 4, [[5, 6, 7], [5, 1], [8, 1], [9, 9, 1]])
    group.H = torch.rand(4, 3) * group.mask
    group.old_logp = -torch.rand(4, 3) * group.mask
    group.right = torch.tensor([True, False, False, False])
    group.reward = torch.where(group.right, 1., -1.)
    group.advantage = eapo.group_advantages(group.reward, 4)
    group.V = group.I = torch.full((4, 3), torch.nan)
    group.I[:measured] = group.V[:measured] = .1 * group.mask[:measured]
    group.number = torch.zeros(4)
    run.page = eapo.new_page(text, group, 4, 1)
    for _ in range(times):
        eapo.show_responses(run, step, eapo.Problem(text, text), group)
    scores = {"avg_low": .1, f"avg@{cfg.eval_samples}": .2, "avg_high": .3, "entropy": .4}
    run.history = [{"step": step} | {f"eval/{text}/{key}": x for key, x in scores.items()}]
    eapo.write_page(run)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_page_says_why_no_token_gets_credit():
    """Where all responses are right there is no credit, and so there are no shares of it."""
    group = make_batch([[5]] * 2, [[6, 7]] * 2)
    group.right = torch.tensor([True, True])
    fork = torch.tensor([[True, False]] * 2)
    none = torch.zeros(2, 2)
    assert eapo.summary(group, fork, {"GRPO": none, "EAPO": none}) == (
        "2 of 2 responses are right. Forks are 50% of the tokens; as all rewards are the same, no "
        "token gets credit")
    some = torch.tensor([[1., 1], [-1, -1]])
    assert eapo.summary(group, fork, {"GRPO": some, "EAPO": some}) == (
        "2 of 2 responses are right. Forks are 50% of the tokens; GRPO gives them 50% of the "
        "credit; EAPO gives them 50% of the credit")


EVIL = "</pre><script>alert(1)</script>\"'><img src=x onerror=y>&\0\t\r\x1b\u202e\ud800"


def test_nothing_a_model_or_a_file_says_becomes_a_tag_or_a_control_character(tmp_path):
    tame = a_page(tmp_path, "x", "--train-data", "x")
    evil = a_page(tmp_path, EVIL, "--train-data", EVIL.replace("\0", ""))
    assert Tags(evil).found == Tags(tame).found
    assert not set(evil) & set("\0\t\r\x1b\u202e\ud800")


def test_the_page_runs_no_script_and_needs_nothing_from_elsewhere(tmp_path):
    page = a_page(tmp_path, "x")
    assert not any(x in page for x in ("src=", "href=", "url(", "@import", "<script", "<link"))
    assert "default-src 'none'" in page


def test_the_page_shows_entropy_information_and_the_credit_of_both_rules(tmp_path):
    """One right response and three wrong ones, 3 + 2 + 2 + 3 tokens, of which it shows three. I was
    measured in the first two. A = 3/2 and -1/2; with EAPO a tenth more or less at most."""
    page = a_page(tmp_path, "x", "--method", "forking", "--offload")
    assert page.split("</code>")[0].endswith("--method forking --offload")
    assert page.count("<span") == 7
    assert page.count("--I:0.100;") == page.count("  I 0.100") == 5
    forks = sum(text.count('class="fork"') for text in page.split("<pre>")[1:3])
    assert f"forks hold {.05 * forks:.2f} of the 0.25 nats of information per response." in page
    assert "The answer is x. 1 of 4 responses are right." in page
    assert page.count("--GRPO:1.500;") == page.count("GRPO 1.500") == 3
    assert page.count("--GRPO:-0.500;") == page.count("GRPO -0.500") == 4
    credit = [float(x) for x in re.findall(r"--EAPO:([^;]+);", page)]
    sizes = [abs(x) / (1.5 if x > 0 else 0.5) for x in credit]
    assert len(sizes) == 7 and .899 < min(sizes) < 1 < max(sizes) < 1.101


def test_the_first_evaluation_is_what_the_page_shows_first(tmp_path):
    """Also where it is not that of step 0: what is hidden at first would leave the page empty."""
    page = a_page(tmp_path, "x", step=5)
    assert '<section class="base">' in page and '<section class="latest">' not in page
    assert 'id="base" checked>step 5<' in page and 'id="latest">' not in page
    assert "steps 5 to 5:" in page


def test_a_base_that_is_evaluated_again_stays_the_base(tmp_path):
    """As on resume, if the first evaluation was cut short after the page had its responses."""
    page = a_page(tmp_path, "x", times=2)
    assert '<section class="base">' in page and '<section class="latest">' not in page


def test_a_page_says_nothing_of_information_where_none_could_be_measured(tmp_path):
    page = a_page(tmp_path, "x", measured=0)
    assert "nats of information" not in page and "nan" not in page and "--I:" not in page
    assert page.count("<span") == 7


@pytest.mark.slow
def test_a_run_leaves_its_page_after_step_0_and_a_table_of_credit_at_both_ends(tmp_path, capsys,
                                                                               monkeypatch):
    """The page at step 0 has the base alone; at the end also the model. Metrics hold the table."""
    monkeypatch.setitem(eapo.TASKS, "addition", lambda split: eapo.addition(split)[:6])
    out = tmp_path / "run"
    pages = []
    write = eapo.write_page

    def look(run):
        write(run)
        pages.append((out / "report.html").read_text(encoding="utf-8"))
    monkeypatch.setattr(eapo, "write_page", look)
    eapo.main(["--out", str(out), "--steps", "2", "--eval-every", "1", "--warmup-steps", "2",
               "--prompts-per-step", "2", "--eval-samples", "2", "--max-response-tokens", "12",
               "--credit-problems", "1", "--alpha", "1"])
    first, middle, last = pages
    assert 'class="base"' in first and 'class="latest"' not in first
    assert "step 2 of 2" in last and "step 0 of 2" not in last
    assert 'class="base"' in last and 'class="latest"' in last and "--alpha 1.0" in last
    assert "V " in last.split('class="base"')[1]
    rows = [json.loads(line) for line in open(out / "metrics.jsonl")]
    assert ["credit/all/I" in row for row in rows] == [True, False, True]
    assert all(row["credit/all/tokens"] == 1 for row in rows[::2])
    assert capsys.readouterr().out.count("measuring what each token") == 2


def has_odd_length(text):
    return len(text) % 2 == 1


def has_two_eights(text):
    return "88" in text


def toy_task(rule, interrupt=None, at_call=0):
    """A task like `addition`, with 64 problems and a rule that a random model satisfies by chance.

    The process sends itself the signal `interrupt` when it marks its training response number
    `at_call`, so a test knows the step in which that happens.
    """
    calls = itertools.count(1 - 64)         # the check before training marks every solution

    def problems_of(split):
        def check(text, answer):
            if interrupt and split == "train" and next(calls) == at_call:
                os.kill(os.getpid(), interrupt)
            return rule(text)
        problems = eapo.addition(split)[:64]
        for problem in problems:
            problem.check = check
        return problems
    return problems_of


# 4 groups of 4: 16 responses in a step, two mini-batches, micro-batches of a few rows each.
SMALL = ["--warmup-steps", "4", "--prompts-per-step", "4", "--group-size", "4",
         "--prompts-per-minibatch", "2", "--microbatch-tokens", "100", "--max-response-tokens",
         "10", "--learning-rate", "1e-3", "--eval-samples", "2", "--eval-every", "3",
         "--save-every", "2", "--credit-problems", "0", "--steps", "4"]


def parse(args):
    return eapo.parse_args([str(arg) for arg in args])


def run_toy(monkeypatch, args, rule=has_odd_length, interrupt=None, at_call=0):
    """A command line with the toy task in place of addition -> the Run."""
    monkeypatch.setitem(eapo.TASKS, "addition", toy_task(rule, interrupt, at_call))
    return eapo.main([str(arg) for arg in args])


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_steps(folder):
    """The metrics of each step. An evaluation that a resumed run made good has a row of its own."""
    steps = {}
    for row in read_rows(folder / "metrics.jsonl"):
        steps.setdefault(row["step"], {}).update(row)
    return list(steps.values())


def without_times(rows):
    """Rows of metrics without what no seed decides."""
    return [{name: x for name, x in row.items() if "second" not in name} for row in rows]


def weights_in(folder):
    return safetensors.torch.load_file(folder / "model" / "model.safetensors")


def assert_same_run(folder, other, nearly=False):
    """The same metrics but for timings, the same responses, the same weights, bit for bit.

    nearly: metrics within 1e-5, weights within half of a step of Adam.
    """
    ours = without_times(read_steps(folder))
    theirs = without_times(read_steps(other))
    for one, two in zip(ours, theirs, strict=True):
        assert one == (pytest.approx(two, abs=1e-5, rel=1e-5) if nearly else two)
    ours = read_rows(folder / "responses.jsonl")
    theirs = read_rows(other / "responses.jsonl")
    assert [row["response"] for row in ours] == [row["response"] for row in theirs]
    ours = weights_in(folder)
    theirs = weights_in(other)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        difference = (weight - theirs[name]).abs().max()
        assert float(difference) <= (5e-4 if nearly else 0), name


@pytest.fixture(autouse=True)
def signals_as_before():
    """A run takes over Ctrl-C and SIGTERM. Give them back after each test, and before it let both
    raise KeyboardInterrupt, or a signal that nobody takes would end pytest."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in before:
        signal.signal(number, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a run of four steps that nothing happened to. Tests only read it."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_toy(monkeypatch, [*SMALL, "--out", folder])
    return folder


@pytest.fixture
def a_copy(undisturbed, tmp_path):
    """A copy of the undisturbed run, to go on from."""
    return shutil.copytree(undisturbed, tmp_path / "copy")


# ---- evaluation ----------------------------------------------------------------------------------

def test_pass_at_k_is_the_share_of_choices_of_k_samples_that_hold_a_right_one():
    """Against counting every choice of k of n samples, of which the first c are right."""
    for n, c, k in [(5, 0, 2), (5, 2, 1), (5, 2, 3), (5, 4, 2), (6, 6, 6), (8, 1, 8)]:
        choices = list(itertools.combinations(range(n), k))
        passed = [choice for choice in choices if min(choice) < c]
        assert eapo.pass_at_k(n, c, k) == pytest.approx(len(passed) / len(choices))
    assert eapo.pass_at_k(1024, 512, 512) == pytest.approx(1.0)


def test_the_interval_of_a_mean_is_that_of_the_normal_law():
    """100 problems, 36 of them solved: .36 +- 1.96 sqrt(.36 x .64 / 100) = .266 to .454."""
    low, high = eapo.interval(torch.tensor([1.] * 36 + [0.] * 64)).tolist()
    assert low == pytest.approx(.266, abs=.015)
    assert high == pytest.approx(.454, abs=.015)
    for mean, bounds in ((0., [0, .1]), (1., [.9, 1]), (.5, [.4, .6])):     # the rule of three
        assert eapo.interval(torch.full((30,), mean)).tolist() == pytest.approx(bounds)


def test_the_scores_of_an_evaluation_worked_by_hand():
    """Three problems, 4 responses each, with 1, 0 and 3 right: Avg@4 = 4/12, Pass@4 = 2/3. Of the
    first one's 6 pairs of responses 3 hold the right one, of the third one's all hold a right one:
    Pass@2 = (1/2 + 0 + 1) / 3. The 95% interval of so few reaches from the worst to the best."""
    batch = eapo.make_batch([[5]] * 12, [[6, 6]] * 6 + [[6]] * 6)               # 18 tokens
    batch.right = torch.tensor([0, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0]).bool()
    batch.H = torch.where(batch.mask, 0.5, 0.0)
    batch.H[0, 0] = 2.3                                     # 0.5 x 17 + 2.3 = 10.8 nats
    batch.ended = torch.tensor([False] * 3 + [True] * 9)
    want = {"avg@4": 1 / 3, "avg_low": 0, "avg_high": 3 / 4, "pass@4": 2 / 3, "pass_low": 0,
            "pass_high": 1, "entropy": 0.6, "length": 1.5, "truncated": 0.25}
    assert eapo.eval_metrics(batch, k=4, smaller=False) == pytest.approx(want, abs=1e-5)
    want |= {"pass@1": 1 / 3, "pass@2": 1 / 2}
    assert eapo.eval_metrics(batch, k=4, smaller=True) == pytest.approx(want, abs=1e-5)


def test_an_evaluation_repeats_its_random_numbers_and_changes_nothing(tmp_path, monkeypatch):
    """Two evaluations of one model give the same responses, with a step of training in between or
    not, and leave torch's random generator as it was: looking does not change the run."""
    run = run_toy(monkeypatch, ["--eval-only", "--max-response-tokens", 8, "--eval-samples", 4,
                                "--credit-problems", 0, "--out", tmp_path / "run"])
    torch.rand(1)
    state = torch.get_rng_state()
    again = eapo.evaluate(run, step=7)
    assert torch.get_rng_state().equal(state)
    row = {key: approx(float(x), abs=1e-6) for key, x in again.items()}
    assert run.history == [{"step": 0, **row}]
    rows = read_rows(tmp_path / "run" / "responses.jsonl")
    texts = [row["response"] for row in rows]
    assert len(rows) == 2 * 64 * 4
    assert texts[:256] == texts[256:]
    assert len(set(texts)) > 200                            # and they differ from one another
    assert [row["step"] for row in rows] == [0] * 256 + [7] * 256


def test_an_evaluation_has_a_temperature_and_a_top_p_of_its_own(tmp_path, monkeypatch):
    """At temperature 0, and where the likeliest token alone has top_p, all tries are the same."""
    run = run_toy(monkeypatch, ["--eval-only", "--max-response-tokens", 8, "--eval-samples", 2,
                                "--credit-problems", 0, "--eval-temperature", 0,
                                "--out", tmp_path / "run"])
    run.eval_sets["addition"] = run.eval_sets["addition"][:4]
    run.cfg.eval_temperature = 1.0
    eapo.evaluate(run, step=1)
    run.cfg.eval_top_p = 1e-6
    eapo.evaluate(run, step=2)
    rows = read_rows(tmp_path / "run" / "responses.jsonl")
    texts = [row["response"] for row in rows]
    greedy = texts[:8]
    sampled = texts[128:136]
    assert texts[0:128:2] == texts[1:128:2]
    assert sampled[0::2] != sampled[1::2]
    assert texts[136:] == greedy


def test_an_evaluation_alone_leaves_verdicts_that_can_be_checked(tmp_path, monkeypatch):
    """Two files in one go, with a verifier that a random model often satisfies. Every response is
    kept with its verdict, which the verifier repeats, and Avg@k and Pass@k are those of the
    verdicts. Nothing is trained: the folder holds no model and no checkpoint."""
    def lucky(text, gold):
        return (len(text) + int(gold)) % 3 == 0
    monkeypatch.setattr(eapo, "is_correct", lucky)
    problems = eapo.addition("eval")[:5]
    for name in "AB":
        lines = [json.dumps({"problem": p.problem, "answer": p.answer}) for p in problems]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    out = tmp_path / "run"
    run = eapo.main(["--eval-only", "--eval-data", f"{tmp_path}/A.jsonl, {tmp_path}/B.jsonl",
                     "--eval-samples", "4", "--max-response-tokens", "20", "--credit-problems", "0",
                     "--out", str(out)])
    assert not {"model", "checkpoint"} & set(os.listdir(out))
    assert len(run.history) == 1

    rows = read_rows(out / "responses.jsonl")
    asked = [problem for problem in problems for _ in range(4)]
    for row, problem in zip(rows, asked + asked, strict=True):
        assert row["problem"] == problem.problem
        assert row["answer"] == problem.answer
        assert row["right"] == lucky(row["response"], row["answer"])
        assert problems[row["number"]] is problem
    texts = [row["response"] for row in rows]
    assert texts[:20] != texts[20:]                         # random numbers differ by the set, too
    for name in "AB":
        mine = [row for row in rows if row["set"] == name]
        right = torch.tensor([row["right"] for row in mine]).reshape(5, 4)
        avg = int(right.sum()) / 20
        solved = int(right.any(dim=1).sum()) / 5
        assert 0 < avg < solved
        assert run.history[0][f"eval/{name}/avg@4"] == pytest.approx(avg, abs=1e-5)
        assert run.history[0][f"eval/{name}/pass@1"] == pytest.approx(avg, abs=1e-5)
        assert run.history[0][f"eval/{name}/pass@4"] == pytest.approx(solved, abs=1e-5)
        tokens = sum(row["tokens"] for row in mine)
        nats = sum(row["tokens"] * row["entropy"] for row in mine)
        ended = sum(row["ended"] for row in mine)
        assert run.history[0][f"eval/{name}/entropy"] == pytest.approx(nats / tokens, abs=1e-5)
        assert run.history[0][f"eval/{name}/truncated"] == pytest.approx(1 - ended / 20, abs=1e-5)


def test_on_a_terminal_tokens_have_the_colours_of_their_quadrants(monkeypatch):
    """A right response 3= with H = .2, .9 and a wrong one 4+ with .1, .8: mu_H is .5. Green for
    right and red for wrong, bold from mu_H up; none of it where the output is a file."""
    run = a_run()
    ids = run.tokenizer.convert_tokens_to_ids(["3", "=", "4", "+"])
    batch = eapo.make_batch([[5], [5]], [ids[:2], ids[2:]])
    batch.H = torch.tensor([[.2, .9], [.1, .8]])
    batch.right = torch.tensor([True, False])
    said = []
    for is_terminal in (True, False):
        stream = io.StringIO()
        stream.isatty = lambda: is_terminal
        monkeypatch.setattr(sys, "stdout", stream)
        eapo.print_responses(run, Problem("1+2="), batch)
        said.append(stream.getvalue())
    assert said[0] == ("  1+2=\n"
                       "  right  \033[32m3\033[0m\033[1;32m=\033[0m\n"
                       "  wrong  \033[31m4\033[0m\033[1;31m+\033[0m\n")
    assert said[1] == "  1+2=\n  right  3=\n  wrong  4+\n"


def test_what_a_model_writes_cannot_command_the_terminal():
    assert eapo.answer_in_words(r"3^{5000}\cdot3^{5000}") is None      # too long to print
    assert eapo.printable("a\033[2Jb\u202e\n\0é") == "a\\x1b[2Jb\\u202e\\n\\x00é"


def test_the_outcome_compares_the_first_evaluation_with_the_last():
    run = a_run(None, "--eval-samples", 4)
    for step, (score, low, high) in enumerate([(.5, .4, .6), (.9, .8, .95), (.7, .61, .8)]):
        scores = {"avg@4": score, "avg_low": low, "avg_high": high}
        run.history.append({"step": step} | {f"eval/x/{key}": y for key, y in scores.items()})
    said = "Avg@4 on x: 0.500 before, 0.700 after step 2: better, as the 95% intervals do not overlap"
    assert eapo.outcome(run, "x") == said
    run.history[2]["eval/x/avg_low"] = .59
    assert "0.700 after step 2: no difference is shown" in eapo.outcome(run, "x")
    run.history[2]["eval/x/avg_high"] = .39
    run.history[2]["eval/x/avg@4"] = .3
    assert "0.300 after step 2: worse, as" in eapo.outcome(run, "x")
    run.history = run.history[:1]
    assert eapo.outcome(run, "x") == "Avg@4 on x: 0.500"
    assert eapo.sparkline([0, .5, 1]) == "▁▅█"
    assert len(eapo.sparkline([0] * 220)) <= 60


# ---- a step and its metrics ----------------------------------------------------------------------

def test_the_seconds_of_a_phase_add_up_within_a_step(monkeypatch):
    """A clock that goes on by a second whenever it is looked at."""
    seconds = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(seconds))
    world = a_run().world
    world.start_clock()
    for phase in ("sample", "update", "sample", "other"):
        world.begin(phase)
    assert world.clock == {"other": 1, "sample": 2, "update": 1}
    world.start_clock()
    assert world.clock == {}


def plain_log_probabilities(lm, batch, i, temperature):
    """log p of the tokens of response i from a plain forward pass over its row.  -> (t,)"""
    start = int(batch.prompt_len[i])
    response = batch.response(i)
    ids = batch.ids[i, :start + len(response)]
    logits = lm(ids[None]).logits[0] / temperature
    logp = logits.log_softmax(dim=-1)[start - 1:-1]
    return logp.gather(1, torch.tensor(response)[:, None])[:, 0]


@pytest.mark.slow
@pytest.mark.parametrize("loss_mean", ["tokens", "group"])
def test_a_step_of_training_is_adam_on_the_naive_loss(tmp_path, monkeypatch, loss_mean):
    """Six groups, of which two are all right or all wrong; the others are learned from in two mini-
    batches, in micro-batches of a few rows. Against torch's Adam (no weight decay) on the loss of a
    plain forward pass, row by row, its gradient scaled to a norm of at most 1. The moments are
    compared too, for Adam's steps hardly show the size of a gradient. In the second mini-batch rho
    is not 1, and some tokens are clipped."""
    args = ["--warmup-steps", 0, "--steps", 1, "--eval-every", 0, "--prompts-per-step", 6,
            "--group-size", 4, "--prompts-per-minibatch", 2, "--microbatch-tokens", 60,
            "--max-response-tokens", 6, "--learning-rate", 3e-3, "--temperature", 0.8,
            "--loss-mean", loss_mean, "--seed", 7]
    run = run_toy(monkeypatch, [*args, "--out", tmp_path / "run"])
    other = eapo.open_run(parse([*args, "--out", tmp_path / "other"]))
    lm = other.policy.lm
    batch = eapo.collect_rollouts(other)
    A = eapo.group_advantages(batch.reward, 4)
    credit = eapo.entropy_aware_advantages(A, batch.H, batch.mask, 4, alpha=0.2, phi=2.0)
    kept = batch.kept.nonzero().flatten().tolist()
    assert len(kept) == 16

    adam = torch.optim.Adam(lm.parameters(), lr=3e-3, betas=(0.9, 0.999))
    losses = []
    norms = []
    clipped = 0
    for rows in (kept[:8], kept[8:]):
        loss = 0
        for i in rows:
            group = range(i // 4 * 4, i // 4 * 4 + 4)
            share = 1 / int(batch.response_len[rows].sum())
            if loss_mean == "group":
                share = 1 / int(batch.response_len[group].sum()) / 2
            n = int(batch.response_len[i])
            values = (plain_log_probabilities(lm, batch, i, 0.8), batch.old_logp[i, :n],
                      credit[i, :n])
            loss = loss + eapo.policy_loss(*values, share, 0.2, 0.28, 3.0)
            clipped += int(eapo.clipped_tokens(*values, 0.2, 0.28, 3.0).sum())
        loss.backward()
        squares = [p.grad.square().sum() for p in lm.parameters()]
        norm = float(sum(squares)) ** 0.5
        for p in lm.parameters():
            p.grad *= min(1, 1 / norm)
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
        norms.append(norm)
    assert min(norms) > 1
    assert clipped > 0

    row = run.history[-1]
    learned = int(batch.response_len[kept].sum())
    assert row["loss"] == pytest.approx(sum(losses) / 2, abs=1e-5)
    assert row["grad_norm"] == pytest.approx(sum(norms) / 2, rel=1e-4)
    assert row["clip_fraction"] == pytest.approx(clipped / learned, abs=1e-6)
    for ours, theirs in zip(run.policy.lm.parameters(), lm.parameters()):
        difference = (ours - theirs).norm() / theirs.norm()
        assert difference.item() < 1e-4
        for name, wanted in adam.state[theirs].items():
            difference = (run.optimizer.state[ours][name] - wanted).norm() / wanted.norm()
            assert difference.item() < 1e-3


# ---- whole small runs ----------------------------------------------------------------------------

@pytest.mark.slow
def test_twenty_steps_on_a_toy_task_raise_the_solve_rate(tmp_path, monkeypatch):
    """A random model, and a rule that wants a "=" in the first 8 characters. A uniform policy
    manages that in 1 - (33/34)^8 = 0.21 of its responses; without learning it stays about there."""
    def has_equals_sign(text):
        return "=" in text
    args = ["--warmup-steps", 0, "--steps", 20, "--prompts-per-step", 8, "--prompts-per-minibatch",
            4, "--max-response-tokens", 8, "--learning-rate", 1e-3, "--eval-every", 0]
    run = run_toy(monkeypatch, [*args, "--out", tmp_path / "run"], has_equals_sign)
    rates = [row["solve_rate"] for row in run.history if row["step"] > 0]
    assert len(rates) == 20
    assert rates[0] < 0.6
    assert sum(rates[-3:]) / 3 > 0.9


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_and_another_seed_another(
        undisturbed, tmp_path, monkeypatch):
    """And the base that is evaluated first is the model after its warm-up."""
    run_toy(monkeypatch, [*SMALL, "--out", tmp_path / "same"])
    assert_same_run(undisturbed, tmp_path / "same")
    run_toy(monkeypatch, [*SMALL, "--steps", 0, "--seed", 1, "--out", tmp_path / "other"])
    ours = read_rows(undisturbed / "responses.jsonl")
    theirs = read_rows(tmp_path / "other" / "responses.jsonl")
    for one, two in zip(ours[:20], theirs[:20]):
        assert one["problem"] == two["problem"]
        assert one["response"] != two["response"]
    cold = run_toy(monkeypatch, [*SMALL, "--warmup-steps", 0, "--steps", 0,
                                 "--out", tmp_path / "cold"])
    warm = read_rows(undisturbed / "metrics.jsonl")
    assert cold.history[0]["eval/addition/entropy"] > warm[0]["eval/addition/entropy"]


def test_metrics_hold_what_the_readme_promises(undisturbed):
    """Step 0 is the base; --eval-every 3 evaluates after steps 3 and 4, the last; the shares of the
    four quadrants add up to 1."""
    rows = read_rows(undisturbed / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    promised = ("step reward solve_rate entropy response_tokens response_length truncated groups "
                "groups_all_right groups_all_wrong loss grad_norm clip_fraction sampler_gap "
                "seconds seconds_sample seconds_score seconds_update tokens_per_second "
                "peak_memory_bytes")
    for row in rows[1:]:
        assert not set(promised.split()) - row.keys()
        for name in ("tokens", "advantage"):
            shares = [row[f"{name}/{quadrant}"] for quadrant in ("PHR", "PLR", "NLR", "NHR")]
            assert sum(shares) == pytest.approx(1, abs=1e-4)
        assert row["seconds_sample"] > 0
        assert row["seconds_update"] > 0
        assert row["seconds_sample"] + row["seconds_update"] <= row["seconds"]
    evaluated = [row for row in rows if "eval/addition/avg@2" in row]
    assert [row["step"] for row in evaluated] == [0, 3, 4]
    for row in evaluated:
        assert 0 <= row["eval/addition/avg@2"] <= row["eval/addition/pass@2"] <= 1


@pytest.mark.slow
def test_the_trained_model_is_an_ordinary_folder_that_trains_on(
        undisturbed, tmp_path, monkeypatch, capsys):
    """And main returns the run: its history is metrics.jsonl, its policy what the folder holds."""
    folder = undisturbed / "model"
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert lm.dtype == torch.float32
    assert tokenizer.decode(tokenizer("12+3=").input_ids) == "12+3="
    run = run_toy(monkeypatch, [
        "--model", folder, "--train-data", "addition", "--eval-data", "addition", "--steps", 1,
        "--prompts-per-step", 2, "--resample", 0, "--max-response-tokens", 8, "--learning-rate",
        1e-3, "--eval-samples", 2, "--out", tmp_path / "run"])
    assert run.history == read_rows(tmp_path / "run" / "metrics.jsonl")
    before = weights_in(undisturbed)
    now = run.policy.lm.state_dict()
    for name, weight in weights_in(tmp_path / "run").items():
        assert weight.dtype == torch.float32                # trained in fp32, and saved so
        assert weight.equal(now[name])
        assert not weight.equal(before[name])
    said = capsys.readouterr().out
    for words in ("solve rate ", "Avg@2 on addition: ", " after step 1: ",
                  f"{run.out}/report.html",
                  f"python eapo.py --model {run.out}/model --max-response-tokens 8 "
                  "--eval-samples 64 --eval-only"):     # what else the exam needs is preset
        assert words in said
    assert run.out == str(tmp_path / "run")


def test_a_folder_that_holds_anything_is_not_written_over(undisturbed, tmp_path, monkeypatch):
    """Nor one in the folder of the model, and of two runs that start at once only one gets it."""
    before = (undisturbed / "config.json").read_text()
    (tmp_path / "notes.txt").write_text("mine")
    for out in (undisturbed, tmp_path, tmp_path / "notes.txt"):
        cfg = parse(["--out", out])
        with pytest.raises(SystemExit, match="is not empty: choose another, or --resume it"):
            eapo.folder_of(cfg, eapo.World(cfg))
    assert (undisturbed / "config.json").read_text() == before
    (tmp_path / "link").symlink_to(tmp_path)
    cfg = parse(["--model", tmp_path, "--out", "link/run"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="lies in the folder of --model"):
        eapo.folder_of(cfg, eapo.World(cfg))
    cfg = parse(["--model", tmp_path, "--out", tmp_path / "run"])
    with pytest.raises(SystemExit, match="lies in the folder of --model"):
        eapo.folder_of(cfg, eapo.World(cfg))
    beside = f"{tmp_path}-2"                            # begins with the same letters
    cfg = parse(["--model", tmp_path, "--out", f"{beside}/"])
    assert eapo.folder_of(cfg, eapo.World(cfg)) == beside

    run = a_run()
    run.out = str(tmp_path / "new")
    eapo.make_folder(run)
    assert sorted(os.listdir(run.out)) == ["config.json", "responses.jsonl"]
    assert json.loads((tmp_path / "new" / "config.json").read_text())["steps"] == 14
    with pytest.raises(SystemExit, match="cannot use --out .*FileExistsError"):
        eapo.make_folder(run)


def test_a_run_without_a_name_gets_a_folder_of_its_own():
    cfg = eapo.parse_args(["--model", "hub/Some-Model"])
    out = eapo.folder_of(cfg, eapo.World(cfg))
    folder, name = os.path.split(out)
    assert folder == "runs" and name.startswith("Some-Model-20")
    assert name.endswith(f"-{os.getpid()}")


def test_processes_on_machines_that_share_no_folder_are_refused(tmp_path):
    """The first process writes config.json. Another one, on a machine of its own, makes the folder
    as well, but does not find the file there."""
    run = a_run()
    run.out = str(tmp_path / "here")
    eapo.make_folder(run)
    run.world.rank = 1
    eapo.make_folder(run)               # on a machine that shares it
    run.out = str(tmp_path / "there")
    with pytest.raises(SystemExit, match="there must be one folder that all machines share"):
        eapo.make_folder(run)
    assert os.listdir(tmp_path / "there") == []


def test_a_run_that_cannot_start_leaves_no_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    for wrong in (["--train-data", "none.jsonl"], ["--model", str(tmp_path / "empty")]):
        with pytest.raises(SystemExit):
            eapo.main([*wrong, "--out", str(tmp_path / "run")])
    assert os.listdir(tmp_path) == ["empty"]


@pytest.mark.parametrize("change, warning", [
    ({}, ""), ({"truncated": 0.6}, "most responses were cut off"),
    ({"grad_norm": 0}, "nothing was learned"),
    ({"sampler_gap": 0.2}, "sampler and policy differ by 0.2")])
def test_a_first_step_that_would_spoil_the_others_is_told(capsys, change, warning):
    """More than half of the responses cut off, no gradient, or a sampler that is more than 0.1 nats
    per token from the policy."""
    metrics = {"truncated": 0.5, "grad_norm": 0.1, "sampler_gap": 0.1} | change
    eapo.warn_of_first_step(a_run(), metrics)
    said = capsys.readouterr().out
    assert warning in said
    assert said.count("warning") == len(change)


@pytest.mark.parametrize("seconds, told", [(2, "500 tokens/s .* 80000 tokens takes up to 3 min"),
                                           (1, "^$")])
def test_a_step_of_more_than_two_minutes_is_told_before_it_starts(capsys, seconds, told):
    """1000 tokens in 2 s, and 10 prompts x 8 x 1000 tokens in a step: 160 s. In 1 s: 80 s."""
    run = a_run(None, "--prompts-per-step", 10, "--group-size", 8, "--max-response-tokens", 1000)
    run.world.clock["sample"] = seconds
    eapo.warn_of_long_steps(run, 1000)
    assert re.search(told, capsys.readouterr().out)


def test_the_tiny_model_takes_two_threads_at_most_unless_told_otherwise(undisturbed, monkeypatch):
    """On 16 cores 2, on 1 core 1; OMP_NUM_THREADS and other models have torch's own number. The
    folder is one that is refused, so that nothing runs."""
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for cores, model in ((16, "tiny"), (1, "tiny"), (16, "x")):
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        with pytest.raises(SystemExit, match="is not empty"):
            eapo.main(["--model", model, "--out", str(undisturbed)])
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    with pytest.raises(SystemExit, match="is not empty"):
        eapo.main(["--out", str(undisturbed)])
    assert threads == [2, 1]


def test_a_folder_in_which_another_process_is_at_work_is_refused(tmp_path):
    """Whether both started there or both resume. The lock is gone once that process is killed, and
    does not hinder a second run of the same process, as in a notebook."""
    hold = ("import sys, eapo, types; "
            "world = types.SimpleNamespace(rank=0); "
            "eapo.lock_folder(types.SimpleNamespace(world=world, out=sys.argv[1])); "
            "print('locked', flush=True); sys.stdin.read()")
    other = subprocess.Popen([sys.executable, "-c", hold, tmp_path], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True, cwd=os.path.dirname(__file__))
    run = types.SimpleNamespace(world=types.SimpleNamespace(rank=0), out=tmp_path)
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(SystemExit, match=f"another process is at work in {tmp_path}"):
        eapo.lock_folder(run)
    other.kill()
    other.communicate()
    eapo.lock_folder(run)
    eapo.lock_folder(run)


# ---- processes -----------------------------------------------------------------------------------

def start(args, rule=has_odd_length, interrupt=0, at_call=0, processes=1, on=0,
          stdout=subprocess.DEVNULL):
    """This file as a program, see `child`, in one or several processes -> [Popen].

    Process `on` interrupts itself when it marks its training response number `at_call`.
    """
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        if processes > 1:                                   # what torchrun would set
            env |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank),
                    "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        call = at_call if rank == on else 10 ** 9       # never
        command = [sys.executable, __file__, "child", rule.__name__, int(interrupt), call, *args]
        process = subprocess.Popen([str(word) for word in command], env=env, text=True,
                                   stdout=stdout, stderr=subprocess.PIPE)
        started.append(process)
    return started


def child(rule, interrupt, at_call, *args):
    """What such a process does: run a command line, with the toy task in place of addition."""
    eapo.TASKS["addition"] = toy_task(globals()[rule], int(interrupt), int(at_call))
    eapo.main(list(args))


def finish(started):
    try:
        for process in started:
            errors = process.stderr.read()
            process.wait(timeout=120)
            assert process.returncode == 0, errors[-2000:]
    finally:
        for process in started:         # one that waits in vain for another that has failed
            process.kill()


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path, monkeypatch):
    """An untied model; the two processes keep their weights in host memory. Few responses are
    right, so that in some steps no group is mixed, and in others only one, so that one of the
    processes has nothing to learn from."""
    lm, tokenizer = eapo.tiny_model(0)
    lm.config.tie_word_embeddings = False
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(lm.config).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    args = ["--model", tmp_path / "lm", "--train-data", "addition", "--eval-data", "addition",
            "--warmup-data", "addition", "--resample", 1, "--top-p", 1, *SMALL, "--steps", 6,
            "--credit-problems", 1]
    two = start([*args, "--offload", "--out", tmp_path / "two"], has_two_eights, processes=2)
    run = run_toy(monkeypatch, [*args, "--out", tmp_path / "one"], has_two_eights)
    finish(two)
    assert_same_run(tmp_path / "two", tmp_path / "one", nearly=True)
    mixed = [row["groups"] - row["groups_all_wrong"] - row["groups_all_right"]
             for row in run.history[1:]]
    assert 0 in mixed
    assert 1 in mixed


@pytest.mark.slow
def test_two_processes_of_which_one_has_nothing_to_sample_do_what_one_does(tmp_path, monkeypatch):
    """One prompt per step: the second process samples nothing, and learns from the first's."""
    args = [*SMALL, "--prompts-per-step", 1, "--steps", 2, "--save-every", 0]
    two = start([*args, "--out", tmp_path / "two"], processes=2)
    run_toy(monkeypatch, [*args, "--out", tmp_path / "one"])
    finish(two)
    assert_same_run(tmp_path / "two", tmp_path / "one", nearly=True)


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_and_one_can_go_on(
        undisturbed, tmp_path, monkeypatch):
    """Each marks 8 responses a step. The second gets SIGTERM at its twelfth, in step 2: both end
    after that step, without an error. One process goes on from what the two saved, and comes out
    where the undisturbed run of one process did. (The tiny model's embedding and head are tied.)"""
    out = tmp_path / "run"
    finish(start([*SMALL, "--out", out], interrupt=signal.SIGTERM, at_call=12, processes=2, on=1))
    assert [row["step"] for row in read_rows(out / "metrics.jsonl")] == [0, 1, 2]
    assert os.listdir(out / "checkpoint") == ["step-000002"]
    assert weights_in(out).keys() == weights_in(undisturbed).keys()
    run_toy(monkeypatch, ["--resume", out])
    assert_same_run(out, undisturbed, nearly=True)


@pytest.mark.parametrize("gpus, launched", [(0, "8"), (2, "2"), (1, None)])
def test_on_several_gpus_the_command_starts_itself_once_per_gpu(monkeypatch, gpus, launched):
    """8 GPUs are seen: all are used, or --gpus of them. One needs no launcher, the tiny model none
    either, and what a launcher has started starts no other."""
    commands = []

    def execv(path, command):
        commands.append(command)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(os, "environ", {})
    cfg = eapo.Config(model="x", gpus=gpus)
    eapo.launch_on_all_gpus(cfg, ["--steps", "5"])
    if launched:
        command = commands.pop()
        assert command[1:4] == ["-m", "torch.distributed.run", "--standalone"]
        assert command[4:6] == ["--nproc-per-node", launched]
        assert command[6:] == [eapo.__file__, "--steps", "5"]
    assert commands == []
    eapo.launch_on_all_gpus(eapo.Config(gpus=gpus), [])
    os.environ["RANK"] = "0"
    eapo.launch_on_all_gpus(cfg, [])
    assert commands == []
    with pytest.raises(SystemExit, match="--gpus 9: this machine has 8"):
        eapo.launch_on_all_gpus(eapo.Config(gpus=9), [])


@pytest.fixture
def process_group():
    """A torch.distributed of this process alone."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_bf16_copy_samples_and_the_policy_scores(process_group, tmp_path):
    """The way of a GPU, here on a CPU. The copy takes today's weights whenever it was emptied, and
    the old log-probabilities and entropies are the policy's: what the update computes first, so
    that rho is 1 and nothing is clipped before the first optimizer step."""
    lm, _ = eapo.tiny_model(0)
    copy, _ = eapo.tiny_model(1)
    run = a_run(lm, "--max-response-tokens", 8, "--prompts-per-step", 4, "--group-size", 4)
    run.out = str(tmp_path)
    run.world.bf16 = True
    run.world.sharded = True
    run.policy = eapo.shard(Policy(lm), run.world, offload=False)
    run.sampler = copy.bfloat16()
    problem = Problem("1+2=", "3", ids=[4, 13, 5, 14])
    run.stream = eapo.Stream([problem], 0)
    run.eval_sets = {"x": [problem]}
    eapo.empty_sampler(run)
    for change in (0, 1):
        with torch.no_grad():
            run.policy.lm.model.norm.weight.fill_(1.001 + change)
        sampler = eapo.fill_sampler(run)
        for ours, theirs in zip(sampler.parameters(), run.policy.lm.parameters()):
            assert ours.equal(theirs.full_tensor().bfloat16())
        eapo.evaluate(run, step=change)
        assert not any(weight.numel() for weight in run.sampler.parameters())
        batch = eapo.collect_rollouts(run)
        assert not any(weight.numel() for weight in run.sampler.parameters())
        eapo.save_model(run)                                # in fp32, also right after scoring
        assert weights_in(tmp_path)["model.norm.weight"].equal(torch.full((64,), 1.001 + change))
        logp, H = run.policy(batch, 1.0)
        logp.sum().backward()
        torch.testing.assert_close(batch.old_logp, logp.detach(), rtol=0, atol=1e-6)
        torch.testing.assert_close(batch.H, H.detach(), rtol=0, atol=1e-6)
        gap = batch.gap.sum() / batch.mask.sum()
        assert 1e-5 < float(gap) < 0.1
    assert run.world.clock["score"] > 0


def test_a_policy_is_cut_at_its_decoder_layers_and_not_at_lists_within_them(process_group):
    """A model whose layers hold lists too, as of experts: each layer is one piece, and the whole
    model another."""
    lm = tiny_lm()
    for layer in lm.model.layers:
        layer.experts = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    run = a_run(lm)
    run.world.sharded = True
    policy = eapo.shard(Policy(lm), run.world, offload=False)
    pieces = [x for x in policy.modules() if isinstance(x, torch.distributed.fsdp.FSDPModule)]
    assert pieces == [policy, *lm.model.layers]


def test_after_scoring_no_weight_stays_whole(process_group):
    """Under FSDP the parameters are parts again, or a GPU would hold embedding and head twice."""
    run = a_run()
    run.world.sharded = True
    policy = eapo.shard(run.policy, run.world, offload=False)
    eapo.score(policy, run.world, make_batch([[3, 4]], [[5, 6]]), 1.0)
    for weight in policy.parameters():
        assert isinstance(weight, torch.distributed.tensor.DTensor)


def test_a_world_takes_the_process_group_that_is_there(process_group, monkeypatch):
    """As for a second run in one program: torch refuses to start a process group twice."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    world = eapo.World(settings())
    assert world.sharded
    assert world.size == 2


# ---- checkpoints ---------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_run_that_was_killed_and_resumed_is_the_run_that_was_not(
        undisturbed, tmp_path, monkeypatch):
    """kill -9 in step 4, each of 16 responses, when the last checkpoint is that of step 2: step 3
    is done again, and its metrics and the responses of its evaluation stand there once. Until then
    the page shows the base alone."""
    out = tmp_path / "run"
    at_call = 3 * 16 + 5
    (killed,) = start([*SMALL, "--out", out], interrupt=signal.SIGKILL, at_call=at_call)
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert [row["step"] for row in read_rows(out / "metrics.jsonl")] == [0, 1, 2, 3]
    assert os.listdir(out / "checkpoint") == ["step-000002"]
    pages = []
    load = eapo.load_checkpoint

    def load_and_look(run):
        load(run)
        pages.append(dict(run.page))
    monkeypatch.setattr(eapo, "load_checkpoint", load_and_look)
    run_toy(monkeypatch, ["--resume", out])
    assert [step for step, _ in pages[0]["sections"]] == [0]
    assert_same_run(out, undisturbed)


@pytest.mark.slow
def test_a_signal_ends_a_run_after_its_step_and_it_can_go_on(
        undisturbed, tmp_path, monkeypatch, capfd):
    """SIGTERM in step 3 of 4, when an evaluation is due and no checkpoint: the step is finished and
    saved, the evaluation left out. Then the folder is moved, its logs get a step that no checkpoint
    has, and half a line. --resume evaluates, and does step 4 as the undisturbed run did it."""
    out = tmp_path / "run"
    at_call = 2 * 16 + 5
    run = run_toy(monkeypatch, [*SMALL, "--out", out], interrupt=signal.SIGTERM, at_call=at_call)
    assert run.stopped
    assert [row["step"] for row in run.history] == [0, 1, 2, 3]
    assert "eval/addition/avg@2" not in run.history[3]
    assert run.done == 3
    assert sorted(os.listdir(out / "checkpoint")) == ["step-000002", "step-000003"]
    assert (out / "model" / "model.safetensors").exists()
    said, complained = capfd.readouterr()
    assert f"stopped; go on with: python eapo.py --resume {out}" in said
    assert "eapo: stopping" in complained

    moved = out.rename(tmp_path / "moved")
    for name in ("metrics.jsonl", "responses.jsonl"):
        with open(moved / name, "a") as file:
            file.write('{"step": 4, "set": "addition"}\n{"step": 4, "s')
    run = run_toy(monkeypatch, ["--resume", moved, "--save-every", 0])
    assert run.history == read_rows(moved / "metrics.jsonl")
    assert [row["step"] for row in run.history] == [0, 1, 2, 3, 3, 4]
    assert sorted(os.listdir(moved / "checkpoint")) == ["step-000002", "step-000003"]
    said, _ = capfd.readouterr()
    assert "first prompt" in said                           # the checks are made again
    page = (moved / "report.html").read_text(encoding="utf-8")
    assert '<section class="base">' in page                 # it shows the base still
    assert '<section class="latest">' in page
    assert_same_run(moved, undisturbed)                     # the evaluation of step 3 as well


@pytest.mark.slow
def test_the_page_remembers_the_base_however_often_a_run_is_stopped(tmp_path, monkeypatch):
    """SIGTERM in the first evaluation and, once that is made good, in step 1, at the same
    checkpoint. At the end the page shows the base and the trained model of a run without stops."""
    def stopping(f):
        def g(*args):
            os.kill(os.getpid(), signal.SIGTERM)
            return f(*args)
        return g
    out = tmp_path / "run"
    first = [*SMALL, "--steps", 3, "--out", out]
    for name, args in (("evaluate", first), ("collect_rollouts", ["--resume", out])):
        with monkeypatch.context() as patch:
            patch.setattr(eapo, name, stopping(getattr(eapo, name)))
            run = run_toy(patch, args)
        assert run.stopped
        assert os.listdir(out / "checkpoint") == ["step-000000"]
    run = run_toy(monkeypatch, ["--resume", out])
    other = run_toy(monkeypatch, [*SMALL, "--steps", 3, "--out", tmp_path / "other"])
    assert run.page == other.page
    (first, base), (last, trained) = run.page["sections"]
    assert (first, last) == (0, 3)
    assert base != trained


@pytest.mark.slow
def test_an_evaluation_that_was_cut_short_is_made_good_on_resume(
        tmp_path, monkeypatch, capsys):
    """SIGTERM in the last step: it is finished and saved, its evaluation left out until then."""
    args = [*SMALL, "--steps", 1, "--save-every", 0]
    out = tmp_path / "run"
    run = run_toy(monkeypatch, [*args, "--out", out], interrupt=signal.SIGTERM, at_call=5)
    assert run.stopped
    assert "eval/addition/avg@2" not in run.history[1]
    assert f"go on with: python eapo.py --resume {out}" in capsys.readouterr().out
    assert os.listdir(out / "checkpoint") == ["step-000001"]
    run_toy(monkeypatch, ["--resume", out])
    run_toy(monkeypatch, [*args, "--out", tmp_path / "other"])
    assert_same_run(out, tmp_path / "other")


@pytest.mark.slow
def test_a_signal_while_it_samples_gives_the_step_up_at_once(undisturbed, tmp_path, monkeypatch):
    """SIGHUP at a token of step 3, in which one prompt after the other is sampled from: after the
    next token the run saves step 2, from which --resume comes out where the undisturbed run did."""
    out = tmp_path / "run"
    tokens = itertools.count()
    generate = eapo.generate
    steps = []

    def generate_until(*args, **options):
        if options:                 # the trial of the model
            return generate(*args, **options)
        *others, slots, keep_on = args

        def kept_on(n):
            if len(steps) == 2 and next(tokens) == 3:
                os.kill(os.getpid(), signal.SIGHUP)
            return keep_on(n)
        return generate(*others, 4 if len(steps) == 2 else slots, kept_on)

    measure = eapo.measure
    monkeypatch.setattr(eapo, "measure", lambda *args: steps.append(1) or measure(*args))
    monkeypatch.setattr(eapo, "generate", generate_until)
    run = run_toy(monkeypatch, [*SMALL, "--save-every", 0, "--out", out])
    assert run.stopped and run.done == 2
    assert next(tokens) == 4
    assert [row["step"] for row in run.history] == [0, 1, 2]
    assert os.listdir(out / "checkpoint") == ["step-000002"]
    monkeypatch.undo()
    run_toy(monkeypatch, ["--resume", out])
    assert_same_run(out, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x", "y", "credit"])
def test_a_stop_in_the_first_evaluation_is_made_good(undisturbed, tmp_path, monkeypatch, name):
    """Before anything is sampled in the first or the second of two sets, or while credit is
    measured. Nothing is logged, and the resumed run evaluates the base again."""
    sets = {name: eapo.TASKS["addition"] for name in ("x", "y")}
    monkeypatch.setattr(eapo, "TASKS", eapo.TASKS | sets)
    sample = eapo.sample_and_mark

    def sample_until(run, numbered, what, *args, **options):
        if what == name:
            os.kill(os.getpid(), signal.SIGINT)
        return sample(run, numbered, what, *args, **options)
    args = [*SMALL, "--steps", 1, "--eval-data", "x,y", "--credit-problems", 1]
    with monkeypatch.context() as patched:
        patched.setattr(eapo, "sample_and_mark", sample_until)
        run = run_toy(patched, [*args, "--out", tmp_path / "run"])
    assert run.stopped and run.done == 0 and run.history == []
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    run_toy(monkeypatch, ["--resume", tmp_path / "run"])
    run_toy(monkeypatch, [*args, "--out", tmp_path / "other"])
    assert_same_run(tmp_path / "run", tmp_path / "other")


def test_a_run_that_samples_nothing_ends_as_finished(tmp_path, monkeypatch, capsys):
    """No step and no evaluation: the model is saved, and nothing is said to have been stopped."""
    args = ["--warmup-steps", 1, "--steps", 0, "--eval-every", 0, "--out", tmp_path / "run"]
    run = run_toy(monkeypatch, args)
    assert not run.stopped
    assert not (tmp_path / "run" / "checkpoint").exists()
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert "stopped" not in capsys.readouterr().out


def test_a_second_ctrl_c_ends_a_run_at_once(monkeypatch):
    """Unless it comes within a second: torchrun passes on what the processes have had already."""
    world = a_run().world
    now = 5.0
    monkeypatch.setattr(eapo.time, "monotonic", lambda: now)
    world.on_signal(signal.SIGINT, None)
    now = 5.9
    world.on_signal(signal.SIGINT, None)
    now = 7.0
    world.on_signal(signal.SIGTERM, None)
    with pytest.raises(KeyboardInterrupt):
        world.on_signal(signal.SIGINT, None)


@pytest.mark.slow
def test_a_run_outside_the_main_thread_takes_over_no_signal(tmp_path, monkeypatch):
    args = [*SMALL, "--steps", 1, "--eval-every", 0, "--out", tmp_path / "run"]
    thread = threading.Thread(target=run_toy, args=(monkeypatch, args))
    thread.start()
    thread.join()
    assert (tmp_path / "run" / "model").exists()


@pytest.mark.slow
def test_a_run_goes_on_when_nobody_reads_what_it_prints(tmp_path):
    """As when Ctrl-C ends the `tee` of a pipeline first, on stdout and on stderr."""
    process, = start([*SMALL, "--out", tmp_path / "run"], stdout=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=120) == 0
    assert (tmp_path / "run" / "model").exists()


def test_a_signal_that_was_ignored_stays_ignored(tmp_path, monkeypatch):
    """As SIGHUP is under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setitem(eapo.TASKS, "addition", toy_task(has_odd_length))
    run = eapo.open_run(parse([*SMALL, "--out", tmp_path / "run"]))
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) == run.world.on_signal


@pytest.mark.slow
def test_a_run_gives_signals_back_to_whoever_had_them(tmp_path, monkeypatch):
    """A notebook that goes on with the run stops at Ctrl-C as before, with its own handler too."""
    def mine(number, frame):
        raise KeyboardInterrupt
    signal.signal(signal.SIGTERM, mine)
    before = signal.getsignal(signal.SIGINT)
    args = [*SMALL, "--steps", 1, "--eval-every", 0]
    run_toy(monkeypatch, [*args, "--out", tmp_path / "run"])
    with pytest.raises(SystemExit, match="the gradient is"):
        run_toy(monkeypatch, [*args, "--warmup-learning-rate", 1e30, "--out", tmp_path / "other"])
    assert signal.getsignal(signal.SIGTERM) is mine
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_a_stop_in_the_warm_up_ends_it_without_a_model(tmp_path, monkeypatch):
    monkeypatch.setitem(eapo.TASKS, "addition", toy_task(has_odd_length))
    run = eapo.open_run(parse([*SMALL, "--out", tmp_path]))
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(SystemExit, match="stopped in the warm-up, which cannot be resumed"):
        eapo.warm_up(run)
    assert sorted(os.listdir(tmp_path)) == [".lock", "config.json", "responses.jsonl"]


def test_a_finished_run_that_is_resumed_stays_as_it_is(a_copy, undisturbed, monkeypatch):
    """Its last step was saved and evaluated: nothing is done again, and no response is lost."""
    before = (a_copy / "metrics.jsonl").read_text()
    assert read_rows(a_copy / "responses.jsonl")[-1]["step"] == 4
    run = run_toy(monkeypatch, ["--resume", a_copy])
    assert run.done == 4
    assert (a_copy / "metrics.jsonl").read_text() == before
    assert_same_run(a_copy, undisturbed)


def test_resuming_with_other_settings_is_refused(a_copy, tmp_path):
    """What does not change the result may differ; no other setting, and nothing impossible."""
    for flag, value in [("--seed", "5"), ("--learning-rate", "1.0"), ("--method", "grpo"),
                        ("--model", "x"), ("--max-response-tokens", "9")]:
        with pytest.raises(SystemExit, match=f"ran with {flag} .*, not {value}: leave it out"):
            parse(["--resume", a_copy, flag, value])
    with pytest.raises(SystemExit, match="--microbatch-tokens must be 0 or more"):
        parse(["--resume", a_copy, "--microbatch-tokens", "-1"])
    with pytest.raises(SystemExit, match="cannot use --resume .*No such file"):
        parse(["--resume", tmp_path])
    cfg = parse(["--resume", a_copy, "--steps", 9, "--microbatch-tokens", 7, "--eval-every", 5,
                 "--save-every", 8, "--gpus", 2, "--offload", "--group-size", 4])
    assert (cfg.steps, cfg.microbatch_tokens, cfg.eval_every, cfg.save_every) == (9, 7, 5, 8)
    assert (cfg.group_size, cfg.learning_rate, cfg.out) == (4, 1e-3, str(a_copy))

    # Without a complete checkpoint there is nothing to go on from, and nothing is written.
    (a_copy / "checkpoint").rename(tmp_path / "elsewhere")
    (a_copy / "checkpoint" / "step-000002.new").mkdir(parents=True)
    before = (a_copy / "config.json").read_text()
    with pytest.raises(SystemExit, match="holds no checkpoint"):
        eapo.folder_of(cfg, eapo.World(cfg))
    assert (a_copy / "config.json").read_text() == before


@pytest.mark.parametrize("part", ["problem", "answer"])
def test_resuming_with_other_data_is_refused_and_leaves_the_logs(a_copy, monkeypatch, part):
    """One problem has another text, or another answer."""
    def other_problems(split):
        problems = toy_task(has_odd_length)(split)
        setattr(problems[9], part, "1+1=")
        return problems
    shutil.rmtree(a_copy / "checkpoint" / "step-000004")
    logs = [a_copy / "metrics.jsonl", a_copy / "responses.jsonl"]
    before = [path.read_text() for path in logs]
    monkeypatch.setitem(eapo.TASKS, "addition", other_problems)
    with pytest.raises(SystemExit, match="is not the data that .* its problems differ"):
        eapo.main(["--resume", str(a_copy)])
    assert [path.read_text() for path in logs] == before
    assert os.listdir(a_copy / "checkpoint") == ["step-000002"]


class Unwritable:
    """Something that cannot be saved, as when a disk is full."""

    def save_pretrained(self, path):
        raise OSError("disk full")

    def __reduce__(self):
        raise OSError("disk full")


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A Run after one step, to save from."""
    args = [*SMALL, "--warmup-steps", 0, "--steps", 1, "--eval-every", 0, "--save-every", 0]
    return run_toy(monkeypatch, [*args, "--out", tmp_path / "run"])


def test_a_file_stays_whole_until_the_new_one_is_complete(tmp_path):
    """Whoever reads the old one goes on reading it; a failure leaves it as it was."""
    path = tmp_path / "x"
    eapo.replace_file(str(path), "old")
    with pytest.raises(UnicodeEncodeError):
        eapo.replace_file(str(path), "new" * 10 ** 5 + "\ud800")
    assert path.read_text() == "old"
    with open(path) as still_open:
        eapo.replace_file(str(path), "new é")
        assert still_open.read() == "old"
    assert path.read_text(encoding="utf-8") == "new é"


def test_a_saved_model_stays_whole_until_the_new_one_is_complete(trained, tmp_path):
    """The weights have changed since, and saving fails after they are written: the folder holds the
    old ones, and no file is missing. Without the failure it holds the new ones."""
    folder = tmp_path / "run" / "model"
    files = sorted(os.listdir(folder))
    before = weights_in(tmp_path / "run")["model.norm.weight"]
    with torch.no_grad():
        trained.policy.lm.model.norm.weight.add_(1)
    tokenizer = trained.tokenizer
    trained.tokenizer = Unwritable()
    with pytest.raises(SystemExit, match="cannot use .*model: OSError: disk full"):
        eapo.save_model(trained)
    assert sorted(os.listdir(folder)) == files
    assert weights_in(tmp_path / "run")["model.norm.weight"].equal(before)
    trained.tokenizer = tokenizer
    eapo.save_model(trained)
    assert sorted(os.listdir(folder)) == files
    assert weights_in(tmp_path / "run")["model.norm.weight"].equal(before + 1)


def test_a_checkpoint_counts_when_it_is_complete_and_the_last_two_are_kept(trained, tmp_path):
    """One that fails midway changes nothing; one that is damaged is named with the one before."""
    for trained.done in (7, 8, 9, 9):
        eapo.save_checkpoint(trained)
    folder = f"{tmp_path}/run/checkpoint"
    kept = [f"{folder}/step-000008", f"{folder}/step-000009"]
    assert eapo.checkpoints(trained.out) == kept
    trained.stream.position = Unwritable()
    trained.done = 10
    with pytest.raises(SystemExit, match="cannot use .*step-000010: .*disk full"):
        eapo.save_checkpoint(trained)
    assert eapo.checkpoints(trained.out) == kept
    trained.stream.position = 0
    eapo.load_checkpoint(trained)
    assert trained.done == 9
    assert trained.stream.position == 4
    for part in glob.glob(f"{kept[1]}/*.distcp"):
        os.truncate(part, 100)
    with pytest.raises(SystemExit, match="step-000009, delete it to go on from .*step-000008: "):
        eapo.load_checkpoint(trained)


def test_only_the_first_process_writes_metrics_and_the_model(tmp_path):
    """All processes have the same history and save at once, but one of them writes the files."""
    run = a_run()
    run.out = str(tmp_path)
    for run.world.rank, files in ((1, []), (0, ["metrics.jsonl", "model"])):
        run.log(5, {"x": 1})
        eapo.save_model(run)
        assert sorted(os.listdir(tmp_path)) == files
    assert run.history == 2 * [{"step": 5, "x": 1}]
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 5, "x": 1}]


def test_bad_lines_of_a_log_are_left_out(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n5\n{"step": 2}\n{"step": 3}\n{"st')
    assert eapo.read_log(str(path), last_step=2) == [{"step": 1}, {"step": 2}]
    assert eapo.read_log(str(tmp_path / "none"), last_step=2) == []


# ---- memory --------------------------------------------------------------------------------------

class Machine(eapo.World):
    """A machine of our choice: processes, bytes that each may fill, GPUs that multiply in bf16."""

    def __init__(self, cfg, size, memory, gpus):
        super().__init__(cfg)
        self.size = size
        self.memory = memory
        self.bf16 = gpus
        self.sharded = size > 1 or gpus
        if gpus:
            self.device = torch.device("cuda")

    def free_memory(self):
        return self.memory

    def host_memory(self):
        return 125e9


@pytest.fixture(scope="module")
def paper_model(tmp_path_factory):
    """The config of Qwen2.5-Math-7B, as a folder without weights."""
    folder = tmp_path_factory.mktemp("7B")
    transformers.Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4,
        tie_word_embeddings=False).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("flags, size, gpus, state, copy, needed", [
    ([], 1, False, 121.85, 0, 121.85), ([], 1, True, 121.85, 15.23, 121.85),
    ([], 2, True, 60.92, 15.23, 60.92), ([], 2, False, 60.92, 30.46, 76.16),
    (["--eval-only"], 1, False, 30.46, 0, 30.46), (["--eval-only"], 1, True, 30.46, 15.23, 45.69),
    (["--offload"], 1, True, 121.85, 15.23, 15.23)])
def test_memory_is_counted_before_a_weight_is_read(
        paper_model, capsys, flags, size, gpus, state, copy, needed):
    """7.6156e9 parameters. In fp32 30.46 GB of weights, as much of gradients, 60.92 of moments, cut
    over the processes; the copy that samples is whole, in bf16 on GPUs: 15.23 GB. One process on
    a CPU has no copy, an evaluation no gradients and no moments, and --offload nothing on a GPU.
    While the copy samples there are no gradients: 45.69 + 30.46 for two processes on CPUs."""
    cfg = parse(["--model", paper_model, *flags])
    eapo.check_memory(cfg, Machine(cfg, size, (needed + 0.01) * 1e9, gpus))
    said = capsys.readouterr().out
    assert "7615.6M parameters" in said
    assert f"{state:.2f} for weights, gradients and moments, {copy:.2f} for the copy" in said
    assert f"{needed + 0.01:.2f} may be used" in said
    with pytest.raises(SystemExit, match="does not fit: use more --gpus, --offload, or a smaller"):
        eapo.load_model(cfg, Machine(cfg, size, (needed - 0.01) * 1e9, gpus))


def test_what_is_offloaded_must_fit_the_machine(paper_model, monkeypatch):
    cfg = parse(["--model", paper_model, "--offload"])
    monkeypatch.setattr(Machine, "host_memory", lambda world: 121e9)
    with pytest.raises(SystemExit, match="does not fit"):
        eapo.check_memory(cfg, Machine(cfg, 1, 80e9, True))


def test_processes_share_the_memory_of_a_machine(monkeypatch):
    world = a_run().world
    alone = world.free_memory()
    assert 1e8 < alone < 1e14
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")             # as torchrun says
    assert world.free_memory() == alone / 4


# ---- other architectures -------------------------------------------------------------------------

def test_an_architecture_with_names_of_its_own_is_trained(tmp_path, monkeypatch):
    """GPT-2's config has no intermediate_size and no num_key_value_heads, and the model has
    dropout, which is off: in the only update rho is 1, and nothing is clipped."""
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=None,
        eos_token_id=1)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "lm")
    eapo.tiny_model(0)[1].save_pretrained(tmp_path / "lm")
    run = run_toy(monkeypatch, [
        "--model", tmp_path / "lm", "--train-data", "addition", "--eval-every", 0, "--steps", 1,
        "--prompts-per-step", 4, "--resample", 0, "--max-response-tokens", 8,
        "--out", tmp_path / "run"])
    assert run.history[-1]["step"] == 1
    assert run.history[-1]["grad_norm"] > 0
    assert run.history[-1]["clip_fraction"] == 0


def test_a_model_that_scales_its_logits_is_refused(tmp_path):
    """Granite divides what its head makes by a number; the policy would not."""
    config = transformers.GraniteConfig(
        vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, logits_scaling=4.0, eos_token_id=1)
    transformers.GraniteForCausalLM(config).save_pretrained(tmp_path)
    eapo.tiny_model(0)[1].save_pretrained(tmp_path)
    cfg = parse(["--model", tmp_path])
    with pytest.raises(SystemExit, match="unsupported or damaged: .*log-probabilities as scored are"):
        eapo.load_model(cfg, eapo.World(cfg))


def test_a_model_that_is_not_whole_is_refused(tmp_path):
    """A classifier has no language-model head, which transformers would fill with random numbers.
    And a tokenizer of 34 or more tokens does not go with an embedding of 20."""
    lm, tokenizer = eapo.tiny_model(0)
    lm.config.num_labels = 2
    transformers.LlamaForSequenceClassification(lm.config).save_pretrained(tmp_path / "a")
    tokenizer.save_pretrained(tmp_path / "a")
    cfg = parse(["--model", tmp_path / "a"])
    lm.config.tie_word_embeddings = False
    lm.config.save_pretrained(tmp_path / "a")
    with pytest.raises(SystemExit, match="has no weights for lm_head.weight"):
        eapo.load_model(cfg, eapo.World(cfg))
    lm.config.vocab_size = 20
    transformers.LlamaForCausalLM(lm.config).save_pretrained(tmp_path / "b")
    tokenizer.save_pretrained(tmp_path / "b")
    cfg = parse(["--model", tmp_path / "b"])
    with pytest.raises(SystemExit, match="embeds 20 tokens, and its tokenizer has 3"):
        eapo.load_model(cfg, eapo.World(cfg))


def test_the_generation_config_survives_and_learns_the_tokenizers_stop_token(tmp_path):
    """Its temperature without do_sample could not be saved again after a change."""
    lm, tokenizer = eapo.tiny_model(0)
    lm.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    (tmp_path / "lm" / "generation_config.json").write_text(
        json.dumps({"temperature": 0.7, "top_k": 5, "max_new_tokens": 9, "eos_token_id": 2}))
    cfg = parse(["--model", tmp_path / "lm"])
    world = eapo.World(cfg)
    lm, tokenizer, stop_ids = eapo.load_model(cfg, world)
    assert stop_ids == [1, 2]
    run = eapo.Run(cfg, world, str(tmp_path), Policy(lm), tokenizer, stop_ids, lm)
    eapo.save_model(run)
    saved = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [1, 2]
    assert (saved["temperature"], saved["top_k"], saved["max_new_tokens"]) == (0.7, 5, 9)


# ---- the command line ----------------------------------------------------------------------------

@pytest.mark.parametrize("args, says", [
    (["--quadrants", "PHX"], "no quadrant is called PHX, only PHR, PLR, NLR, NHR"),
    (["--method", "gropo"], "no method is called gropo, only eapo, grpo"),
    (["--method", "grpo", "--without", "PHR"], "--without is for --method eapo"),
    (["--loss-mean", "sum"], "--loss-mean is tokens or group"),
    (["--temperature", "0"], "--temperature must be above 0"),
    (["--top-p", "0"], "--top-p must be above 0 and at most 1"),
    (["--eval-top-p", "2"], "--eval-top-p must be above 0 and at most 1"),
    (["--resample", "-1"], "--resample must be 0 or more"),
    (["--eval-samples", "0"], "--eval-samples must be 1 or more"),
    (["--overlong", "8"], "is a share"),
    (["--learning-rate", "-1"], "--learning-rate must be 0 or more"),
    (["--train-data", "none.jsonl"], "cannot use --train-data none.jsonl: .*No such file"),
    (["--eval-data", "addition, addition"], "two sets addition, or addition is taken"),
    (["--eval-data", "train"], "or train is taken: rename the file"),
    (["--model", "no folder"], "cannot use --model no folder: "),
    (["--max-response-tokens", "9999"], "at most 512 tokens, .* lower --max-response-tokens"),
    (["--out", __file__ + "/run"], "cannot use --out .*/run: .*Not a directory")])
def test_mistakes_of_newcomers_are_met_with_one_line(tmp_path, args, says):
    with pytest.raises(SystemExit, match=says) as error:
        eapo.main(["--out", str(tmp_path / "run"), *args])
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("eapo: ")


def test_what_ends_a_run_before_its_first_step_ends_it_with_advice(tmp_path, monkeypatch):
    def interrupted(split):
        raise KeyboardInterrupt

    def too_large(split):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setitem(eapo.TASKS, "addition", interrupted)
    with pytest.raises(SystemExit, match="stopped; what was saved before is kept"):
        eapo.main(["--out", str(tmp_path)])
    monkeypatch.setitem(eapo.TASKS, "addition", too_large)
    with pytest.raises(torch.OutOfMemoryError) as error:
        eapo.main(["--out", str(tmp_path)])
    assert "--microbatch-tokens" in error.value.__notes__[0]


@pytest.mark.parametrize("model, steps, group_size, temperature", [
    ("tiny", 14, 8, 1.0), ("Qwen/Qwen2.5-Math-7B", 220, 8, 0.6),
    ("agentica-org/DeepScaleR-1.5B-Preview", 900, 16, 0.6)])
def test_the_help_names_every_flag_and_the_defaults_of_the_model(
        capsys, model, steps, group_size, temperature):
    with pytest.raises(SystemExit):
        parse(["--model", model, "--help"])
    said = capsys.readouterr().out
    for name in eapo.Config.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in said
    said = " ".join(said.split())
    assert f"learns from it (default: {steps})" in said
    assert f"G, responses per prompt (default: {group_size})" in said
    assert f"0: greedy (default: {temperature})" in said


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(*sys.argv[2:])
    else:
        raise SystemExit(pytest.main([__file__, *sys.argv[1:]]))

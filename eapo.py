"""eapo: reinforcement learning with verifiable rewards, token by token, in one file.

Give a language model a problem whose answer can be checked. Let it try G times, mark each try right
or wrong, and make the tokens of the better tries likelier. That is GRPO (group relative policy
optimization). It gives every token of a response the same credit, although most of them involved no
real decision: after `3+4=` the model is sure of its `7`. EAPO (entropy-aware policy optimization;
He et al. 2026, arXiv 2604.11056v1) measures how unsure the model was before each token, its entropy
H. Tokens drawn where it was unsure get a little more credit or blame, the others a little less.

    A_i     = (r_i - mean(r)) / std(r)                             one number per response      (1)
    L       = - mean of min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A)                      (2)
    score_t = clip((H_t - mu_H) / sigma_H, -|A|/phi, +|A|/phi)     one number per token         (6)
    A^CA_t  = A + alpha sign(A) score_t                            takes the place of A in (2)  (7)

(1) and (2) are GRPO, with DAPO's asymmetric clip and PPO's dual clip, both in `policy_loss`; (6)
and (7) make it EAPO. Equation numbers are the paper's, except for (1), which it does not number;
(3) to (5) are not needed here, and (8) and (9) are in part 7. In the code the mean of (2) is a sum
with weights that add up to 1, see `token_weights` and `train`.

The letters, here and in the code. N is the rows of the batch at hand; in `train`, n and m are those
of a mini-batch and a micro-batch. M counts tokens taken from several rows. Part 8 adds I and the
true advantage.

    B prompts x G responses = N rows; the G responses to one prompt, a group, are neighbouring rows
    L      tokens of the longest row, prompt and response (in (2), the loss)
    T      tokens of the longest response
    V      size of the vocabulary (in part 8, a chance)      D  size of a hidden state
    r      reward of a response: +1 if its answer is right, else -1; less with --overlong    (N,)
    A      advantage of a response: how much better it was than its group, (1)               (N,)
    A^CA   credit of a token, (7)                                                            (N, T)
    pi_old the policy as it was when the step began. It samples the responses, with --top-p
           below 1 from its likeliest tokens only (on GPUs, a bf16 copy of it does);
           log-probabilities and H are its own, over the whole vocabulary
    H      entropy of pi_old just before each token was drawn, in nats                       (N, T)
    mu_H, sigma_H   mean and standard deviation of H over all response tokens of a group     (N, 1)
    rho    pi_theta / pi_old: how much likelier a token has become since it was sampled      (N, T)
    mask   True on response tokens, the stop token included                                  (N, T)

The file reads from the top like a newspaper, the method first and then what it calls:

    1 Settings    2 The algorithm    3 The loop: `train`, one step on one screen
    4 Rollouts    5 The policy       6 Problems    7 Evaluation and metrics
    8 Credit, measured
    Appendices: A The verifier    B Data    C The machine    D What a run shows
                E The command line

Run `python eapo.py` to watch a tiny model learn to carry digits, in under a minute on a laptop;
`python eapo.py --model Qwen/Qwen2.5-Math-7B` for the paper's run, on all GPUs of the machine; and
`python eapo.py --help` for every setting. Left out on purpose: a value network (a learned guess of
the reward), a KL penalty towards a reference model, and learned rewards.
"""
import argparse
import cmath
import contextlib
import csv
import errno
import glob
import gzip
import html
import json
import math
import os
import platform
import random
import shlex
import shutil
import signal
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from fractions import Fraction
from functools import partial
from itertools import product
from operator import add, mul, sub, truediv
from string import ascii_letters, digits
from typing import NamedTuple
from zlib import crc32

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


# --------------------------------------------------------------------------------------------------
# Part 1. Settings. Each field of Config is also a flag of the command line. The defaults are the
# paper's for Qwen2.5-Math-7B (table 6), where it names a value. PRESETS says what other models
# change, `tiny` among them; `parse_args` applies it.
# --------------------------------------------------------------------------------------------------

def flag(default, description, heading=None):
    """A field of Config: its default, its line in --help, and the heading that it opens there."""
    return field(default=default, metadata={"help": description, "heading": heading})


@dataclass
class Config:
    model: str = flag("tiny", "tiny, a Hugging Face folder, or a hub id", "the run")
    train_data: str = flag("agentica-org/DeepScaleR-Preview-Dataset",
                           "addition, chatter, words, a .json, .jsonl, .csv or .parquet file, "
                           "or a hub set ID[:CONFIG][:SPLIT]")
    eval_data: str = flag("HuggingFaceH4/MATH-500", "the same; several with commas between them")
    out: str = flag("", "folder of the run; empty: runs/MODEL-TIME-PROCESS")
    seed: int = flag(0, "seed of tiny's weights, of the order of problems, of sampling")
    resume: str = flag("", "folder of a run to continue; use only folders that you trust, as "
                           "reading a checkpoint can run code in it (pickle)")
    save_every: int = flag(20, "steps between checkpoints, besides one after the last; 0: "
                              "only when the run is stopped")

    warmup_data: str = flag("", "worked solutions to imitate: a task, or a file or a data set with "
                                "columns problem and solution",
                            "supervised warm-up before RL, for models that do not know the task")
    warmup_steps: int = flag(0, "optimizer steps, with 16 solutions each; 0: no warm-up")
    warmup_learning_rate: float = flag(1e-5, "rises over the first 20 steps and falls over the "
                                           "last 30%")

    steps: int = flag(220, "RL steps: each samples a batch, then learns from it", "the batch")
    prompts_per_step: int = flag(512, "groups to learn from in a step; fewer if --resample rounds "
                                      "do not find enough")
    group_size: int = flag(8, "G, responses per prompt")
    prompts_per_minibatch: int = flag(32, "at most this many prompts per optimizer step")
    microbatch_tokens: int = flag(0, "padded tokens per pass through the model; changes memory and "
                                     "speed, and results by rounding alone; 0: 16384 on a GPU, "
                                     "2048 on a CPU")
    resample: int = flag(2, "at most this many more rounds of sampling per step, to replace groups "
                            "whose responses are all right or all wrong (dynamic sampling)")

    max_prompt_tokens: int = flag(1024, "longer prompts are left out", "sampling")
    max_response_tokens: int = flag(3072, "responses are cut off after this many tokens")
    temperature: float = flag(1.0, "in training: of sampling, log-probabilities and entropies, in "
                                   "the warm-up, too")
    top_p: float = flag(0.95, "draw only from the likeliest tokens, which together reach this "
                              "probability; 1: from all")

    method: str = flag("eapo", "rule of credit: eapo, grpo, forking, entroadv or w-reinforce. (For "
                               "DAPO, use grpo with --overlong 0.2 and --resample above 0.)",
                       "credit and loss")
    alpha: float = flag(0.2, "(7) strength of the entropy term; 0 gives grpo's advantages")
    phi: float = flag(2.0, "(6) |score| is at most |A| / phi; phi must be above alpha")
    quadrants: str = flag("", "some of PHR,PLR,NLR,NHR (part 2): tokens in other quadrants get "
                              "credit 0, but still count in the mean of (2)")
    without: str = flag("", "some of PHR,PLR,NLR,NHR: tokens in these quadrants get A, without "
                            "the entropy term")
    clip_low: float = flag(0.2, "(2) eps_low")
    clip_high: float = flag(0.28, "(2) eps_high")
    clip_c: float = flag(3.0, "where A < 0, no gradient beyond rho = c, see policy_loss; 0: off")
    loss_mean: str = flag("tokens", "tokens: (2) is a mean over the tokens of a mini-batch; group: "
                                    "over the tokens of each group, then over groups")
    overlong: float = flag(0.0, "the reward falls by up to 1 over this last share of "
                                "--max-response-tokens (DAPO's soft penalty); 0: off")
    learning_rate: float = flag(1e-6, "AdamW's learning rate; constant")

    eval_every: int = flag(10, "steps between evaluations, besides those before the first and "
                               "after the last step; 0: none", "evaluation")
    eval_samples: int = flag(4, "responses per problem: the k of Avg@k and Pass@k")
    eval_temperature: float = flag(0.6, "sampling temperature in evaluations; 0: greedy")
    eval_top_p: float = flag(0.95, "--top-p in evaluations")
    credit_problems: int = flag(0, "held-out problems in which credit is measured (part 8), in the "
                                   "evaluations before the first and after the last step, with at "
                                   "most 1600 continuations per problem on average")
    eval_only: bool = flag(False, "only evaluate, for instance with --model FOLDER/model")

    gpus: int = flag(0, "GPUs of this machine to use (tiny uses one); 0: all", "the machine")
    offload: bool = flag(False, "keep weights, gradients and moments in host memory")

    def __post_init__(self):
        if self.eval_only:
            self.steps = 0
            self.warmup_steps = 0
            self.eval_every = 1
        check_settings(self)


PRESETS = {         # a model's name, or a part of it, and the settings that such a model changes
    "tiny": dict(
        train_data="addition", eval_data="addition", warmup_data="addition", warmup_steps=1100,
        warmup_learning_rate=3e-3, steps=14, prompts_per_step=64, prompts_per_minibatch=16,
        resample=0, learning_rate=5e-4, top_p=1.0, max_prompt_tokens=32, max_response_tokens=64,
        eval_every=7, eval_samples=8, eval_temperature=1.0, eval_top_p=1.0, credit_problems=4,
        save_every=0),
    "SmolLM2-135M": dict(
        train_data="words", eval_data="words", warmup_data="words", warmup_steps=12,
        warmup_learning_rate=5e-5, steps=14, group_size=4, prompts_per_step=16,
        prompts_per_minibatch=16, resample=0, overlong=0.25, learning_rate=1e-5, top_p=1.0,
        max_prompt_tokens=128, max_response_tokens=28, eval_every=7, eval_samples=4,
        eval_temperature=1.0, eval_top_p=1.0, save_every=0),
    "DeepScaleR-1.5B": dict(
        group_size=16, prompts_per_step=64, steps=900, max_prompt_tokens=2048,
        max_response_tokens=24576),
}


# --------------------------------------------------------------------------------------------------
# Part 2. The algorithm: tensors in, tensors out. This is the point of the file.
# --------------------------------------------------------------------------------------------------

def token_entropy(logits):
    """How unsure is the policy?    H = - sum_v p_v log p_v  nats,    p = softmax(logits)

    logits (..., V) -> (...). H is 0 if one token is certain, and log V if all are equally likely.
    """
    # H equals log Z - sum_v p_v z_v, with logits z and log Z = logsumexp(z). A token that a model
    # never uses may have z = -inf and p = 0; its share of the sum is 0, but 0 * -inf would be nan.
    p = logits.softmax(dim=-1)
    z = logits.masked_fill(p == 0, 0)
    return logits.logsumexp(dim=-1) - (p * z).sum(dim=-1)


def group_advantages(rewards, group_size):
    """How much better was each response than the other tries at the same prompt?

        A_i = (r_i - mean(r)) / (std(r) + 1e-6)        over the G responses to one prompt       (1)

    rewards (N,) -> advantages (N,); std divides by G - 1. The mean of the group stands in for a
    learned value network. If all G rewards are equal, every advantage is 0. (Groups that are all
    right or all wrong are kept out of the update anyway, see `collect_rollouts`.)
    """
    r = rewards.reshape(-1, group_size)                                         # (B, G)
    # No advantage changes if r is shifted. But equal rewards now are exactly 0; else rounding their
    # mean, divided by 1e-6, could give an advantage of .1.
    r = r - r[:, :1]
    mean = r.mean(dim=1, keepdim=True)                                          # (B, 1)
    std = r.std(dim=1, keepdim=True)                                            # (B, 1)
    advantages = (r - mean) / (std + 1e-6)                                      # (B, G)   (1)
    return advantages.flatten()                                                 # (N,)


def entropy_mean_and_std(H, mask, group_size):
    """Mean and standard deviation of the entropy over all response tokens of each group.

    H (N, T) in nats, mask (N, T) -> mu_H (N, 1), sigma_H (N, 1), the same in all rows of a group.
    Tokens are pooled over the group, so a long response weighs more than a short one. sigma_H
    divides by the number of tokens minus 1, and has 1e-6 added, as H may be the same everywhere.
    """
    B = len(H) // group_size
    inside = mask.reshape(B, -1)                                                # (B, G * T)
    pooled = H.reshape(B, -1).masked_fill(~inside, 0)   # padding may hold anything, even nan
    tokens = inside.sum(dim=1, keepdim=True)                                    # (B, 1)
    mu = pooled.sum(dim=1, keepdim=True) / tokens.clamp(min=1)                  # (B, 1)

    deviation = (pooled - mu).masked_fill(~inside, 0)                           # (B, G * T)
    squares = deviation.square().sum(dim=1, keepdim=True)                       # (B, 1)
    sigma = (squares / (tokens - 1).clamp(min=1)).sqrt() + 1e-6                 # (B, 1)

    mu = mu.repeat_interleave(group_size, dim=0)                                # (N, 1)
    sigma = sigma.repeat_interleave(group_size, dim=0)                          # (N, 1)
    return mu, sigma


def entropy_score(A, H, mask, group_size, phi):
    """How unusual was the model's uncertainty at each token, within its group?

        score_t = clip((H_t - mu_H) / sigma_H, -|A| / phi, +|A| / phi)                          (6)

    A (N,), H (N, T), mask (N, T) -> (N, T), meaningless outside the mask. The bound grows with |A|,
    so that (7), with alpha < phi, can refine an advantage but never outweigh it. It is tight: where
    half of 8 responses are right, |A| is .94, and whatever lies more than .47 standard deviations
    from the mean has a score of +.47 or -.47. The paper calls this "dual clipping". It has nothing
    to do with the "dual clip" in `policy_loss`.
    """
    mu, sigma = entropy_mean_and_std(H, mask, group_size)                       # (N, 1) both
    z = (H - mu) / sigma                                # (N, T), in standard deviations
    bound = A.abs()[:, None] / phi                                              # (N, 1)
    return z.clamp(-bound, bound)                                               # (N, T)   (6)


def entropy_aware_advantages(A, H, mask, group_size, alpha, phi):
    """EAPO: more credit or blame where the model was unsure, and less where it was sure.

        A^CA_t = A + alpha * sign(A) * score_t                                                  (7)

    A (N,), H (N, T), mask (N, T) -> (N, T), 0 outside the mask. sign(A) turns the score towards A's
    own side: a token above mu_H is praised more in a good response and blamed more in a bad one, a
    token below mu_H is praised or blamed less. A^CA / A lies between 1 - alpha/phi and
    1 + alpha/phi, which is 0.9 to 1.1 at the paper's numbers, so with alpha < phi no advantage can
    change its sign. alpha = 0 is GRPO.
    """
    # No gradient may flow through the score: the policy could then lower the loss by changing how
    # unsure it is instead of what it answers. Our H carries no gradient, but a caller's may.
    score = entropy_score(A, H, mask, group_size, phi).detach()                 # (N, T)
    shift = alpha * A.sign()[:, None] * score                                   # (N, T)
    shaped = A[:, None] + shift                                                 # (N, T)   (7)
    return shaped.masked_fill(~mask, 0)


QUADRANTS = ("PHR", "PLR", "NLR", "NHR")                # codes 1, 2, 3, 4


def quadrants(rewards, H, mask, group_size):
    """The paper's four kinds of token: a Positive or Negative reward, a High or Low entropy.

        1 PHR    right response, H >= mu_H              2 PLR    right response, H < mu_H
        3 NLR    wrong response, H <  mu_H              4 NHR    wrong response, H >= mu_H

    rewards (N,), above 0 for right responses (or the verdicts, True and False), H (N, T),
    mask (N, T) -> (N, T) int, 0 outside the mask. Every response token is in exactly one quadrant,
    so the losses of the four add up to the whole loss. In the paper the gains come from the two
    with high entropy.
    """
    mu, _ = entropy_mean_and_std(H, mask, group_size)                           # (N, 1)
    high = H >= mu                                                              # (N, T)
    right = rewards[:, None] > 0                                                # (N, 1)

    code = torch.zeros(H.shape, dtype=torch.long, device=H.device)              # (N, T)
    code[mask & right & high] = 1
    code[mask & right & ~high] = 2
    code[mask & ~right & ~high] = 3
    code[mask & ~right & high] = 4
    return code


def policy_loss(logp, old_logp, A, weight, clip_low, clip_high, clip_c):
    """The clipped objective as a loss, summed over tokens.

        L = - sum_t weight_t * min(rho_t A_t, clip(rho_t, 1 - eps_low, 1 + eps_high) A_t)       (2)

    logp, old_logp: log-probabilities of the tokens under pi_theta and pi_old; A: their credit;
    weight: the mask, or any other weights that are 0 outside it; all (N, T) -> scalar. It is a sum,
    so the losses of micro-batches can be added. If the weights of a whole mini-batch add up to 1,
    their total is a mean.
    """
    rho = (logp - old_logp).exp()                       # (N, T), about 1 on the first mini-batch
    rho_clipped = rho.clamp(1 - clip_low, 1 + clip_high)                        # (N, T)

    # A token that has moved far enough the way it is pushed no longer has a gradient: one with
    # A > 0 when rho > 1 + eps_high, one with A < 0 when rho < 1 - eps_low. min keeps the gradient
    # of a token that went the other way: with A < 0 and rho = 1.5, it is pushed back.
    gain = torch.min(rho * A, rho_clipped * A)                                  # (N, T)   (2)

    # With A < 0 and a large rho, rho * A could fall without limit. The "dual clip" of PPO (Ye et
    # al. 2020) stops it at c * A: beyond rho = c the gradient is 0.
    if clip_c > 0:
        gain = torch.where(A < 0, torch.maximum(gain, clip_c * A), gain)
    return -(gain * weight).sum()


def clipped_tokens(logp, old_logp, A, clip_low, clip_high, clip_c):
    """Where do the clips of `policy_loss` leave a token without a gradient?  -> (N, T) bool"""
    rho = (logp - old_logp).exp()                                               # (N, T)
    clipped = (A > 0) & (rho > 1 + clip_high)
    clipped |= (A < 0) & (rho < 1 - clip_low)
    if clip_c > 0:
        clipped |= (A < 0) & (rho > clip_c)
    return clipped


def token_weights(mask, group_size, loss_mean):
    """How much each token counts in (2), before the weights are made to add up to 1.

    mask (N, T) -> (N, T). "tokens": every token counts the same, as in DAPO and in verl, the
    framework of the paper's authors. "group": every group counts the same, as the paper prints it.
    """
    if loss_mean == "tokens":
        return mask.float()
    per_row = mask.sum(dim=1)                                                   # (N,)
    per_group = per_row.reshape(-1, group_size).sum(dim=1)                      # (B,)
    tokens = per_group.repeat_interleave(group_size)[:, None]                   # (N, 1)
    return mask / tokens


# --------------------------------------------------------------------------------------------------
# Part 3. The loop: sample, mark, credit, update, evaluate. The other parts explain what it calls;
# open_run, close_run and the checkpoints are in Appendix C.
# --------------------------------------------------------------------------------------------------

def train(cfg):
    """Reinforcement learning with verifiable rewards -> the Run. Its files are in run.out."""
    run = open_run(cfg)
    world = run.world           # the processes, one per GPU; each does a share of the work
    policy = run.policy         # pi_theta
    clips = (cfg.clip_low, cfg.clip_high, cfg.clip_c)
    if cfg.resume:
        load_checkpoint(run)
    else:
        warm_up(run)            # supervised, and only if the settings ask for it
    if run.lacks_evaluation():
        run.log(run.done, evaluate(run, run.done))

    bar = world.bar(range(run.done + 1, cfg.steps + 1), cfg.method)
    for step in bar:
        world.start_clock()

        # Sample G responses to each prompt and mark them: +1 if the answer is right, else -1 (less
        # with --overlong). The batch keeps the log-probability and entropy of every token as they
        # are now: pi_old.
        batch = collect_rollouts(run)
        # A signal such as Ctrl-C only sets a flag. An update does not look at it, and is finished.
        # Sampling does, and stops at once: then this step is abandoned.
        if run.stopped:
            break

        # Credit each response against its group, and then each token by its entropy (or by another
        # rule, if --method names one).
        batch.advantage = group_advantages(batch.reward, cfg.group_size)        # (N,)     (1)
        batch.credit = assign_credit(batch, cfg)                                # (N, T)   (7)

        # Update: one optimizer step on (2) for each mini-batch. A mini-batch may not fit in memory,
        # so its gradient is summed over micro-batches, of which each process takes its share. We
        # want the sum over processes too, but FSDP averages: hence `* world.size`.
        world.begin("update")
        sums = Counter()        # over the optimizer steps, for the metrics
        for mini in mini_batches(run, batch):
            weight = token_weights(mini.mask, cfg.group_size, cfg.loss_mean)    # (n, T)
            mini.weight = weight / weight.sum()         # all processes hold the whole mini-batch
            for micro in micro_batches(run, mini):      # this process's share
                logp, _ = policy(micro, cfg.temperature)    # (m, T); H would serve an entropy bonus
                loss = policy_loss(logp, micro.old_logp, micro.credit, micro.weight, *clips)
                # Add a term of your own here: a sum over tokens, weighted by micro.weight. (An
                # example, a KL penalty, follows this function.)
                (loss * world.size).backward()
                clipped = clipped_tokens(logp, micro.old_logp, micro.credit, *clips)
                sums["clipped"] += int(clipped.sum())
                sums["loss"] += float(loss.detach())
            norm = clip_gradient(run)                   # scales it to a norm of at most 1
            sums["grad_norm"] += norm
            sums["updates"] += 1
            run.optimizer.step()
            run.optimizer.zero_grad()
        run.done = step

        # Evaluate, and save. Watch the solve rate: the loss of a policy gradient does not measure
        # progress. At rho = 1 it is minus the mean credit, which mostly says whether right or wrong
        # responses are longer. Only its gradient is meaningful.
        metrics = measure(run, batch, sums)
        bar.set_postfix_str(f"solve rate {metrics['solve_rate']:.0%}, entropy "
                            f"{metrics['entropy']:.3f} nats", refresh=False)
        if run.is_due(step, cfg.eval_every):
            metrics |= evaluate(run, step)
        run.log(step, metrics)
        if run.is_due(step, cfg.save_every):
            save_checkpoint(run)

    if run.stopped:
        save_checkpoint(run)
    close_run(run)
    return run


# ---- How to add a KL penalty, which keeps the policy near a reference model. ---------------------
#
#   Config           kl_beta: float = flag(0.0, "weight of the KL penalty; 0: none")
#   Run, Batch       the fields  reference: object = None  and  ref_logp: torch.Tensor = None
#   open_run         after `empty_sampler(run)`:
#                    run.reference = shard(Policy(load_model(cfg, world)[0]), world, cfg.offload)
#   sample_and_mark  before `world.begin("other")`:
#                    if name == "train":
#                        batch.ref_logp, _ = score(run.reference, world, batch, temperature)
#   train            after `loss = policy_loss(..)`:
#                    d = micro.ref_logp - logp
#                    loss += cfg.kl_beta * ((d.exp() - d - 1) * micro.weight).sum()
#
# This is GRPO's estimator, "k3". The reference is the model as --model holds it, before a warm-up;
# --resume reads it from there again. After tiny's warm-up it would still have random weights: so
# make a base first, `--steps 0 --out base`, and start from `--model base/model`. It takes 4 bytes
# per parameter, divided among the processes, which `check_memory` does not count.
# --------------------------------------------------------------------------------------------------

@dataclass
class Run:
    """What the parts of a run share."""
    cfg: Config
    world: object               # the processes, Appendix C
    out: str                    # folder of the run
    policy: object              # pi_theta, a Policy of part 5
    tokenizer: object
    stop_ids: list              # a response ends with one of these, the tokenizer's own first
    sampler: object             # what samples: the policy's own model, or a copy of it
    optimizer: object = None
    stream: object = None                               # the training problems, part 6
    eval_sets: dict = field(default_factory=dict)       # {name: problems}
    history: list = field(default_factory=list)         # the rows of metrics.jsonl
    page: dict = field(default_factory=dict)            # what report.html shows, Appendix D
    done: int = 0               # steps finished, and where a resumed run goes on from
    stopped: bool = False       # by a signal; known to all processes

    def is_due(self, step, every):
        """True every so many steps, from step 0, and after the last one. every=0: never."""
        return every > 0 and (step % every == 0 or step == self.cfg.steps)

    def lacks_evaluation(self):
        """True if the evaluation that is due at step `done` is missing: at the start, and when it
        was cut short by a signal."""
        last = self.history[-1] if self.history else {}
        is_evaluated = any(key.startswith("eval/") for key in last)
        return self.is_due(self.done, self.cfg.eval_every) and not is_evaluated

    def log(self, step, metrics):
        """Add a row to history, to metrics.jsonl and to the page."""
        if not metrics:
            return
        row = {"step": step}
        for name, x in metrics.items():
            row[name] = x if isinstance(x, int) else round(float(x), 6)
        self.history.append(row)
        if self.world.rank == 0:
            with open(f"{self.out}/metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
        if step < self.cfg.steps:       # else `close_run` draws the page, once the model is safe
            write_page(self)


def assign_credit(batch, cfg):
    """The credit of each token: what takes the place of A_t in (2).  -> (N, T), 0 outside the mask

    To add a rule, write a function like those below and an entry in CREDIT_RULES. The Batch holds
    all responses of the step, those of dropped groups too, or in part 8 some of an evaluation. A
    rule finds in it `advantage`, `reward`, `right` (N,), `quadrant`, `old_logp`, `H`, `mask` (N, T)
    and the lengths. What it returns outside the mask does not matter. A token with credit 0 still
    counts in the mean of (2).
    """
    batch.quadrant = quadrants(batch.right, batch.H, batch.mask, cfg.group_size)
    credit = CREDIT_RULES[cfg.method](batch, cfg)                               # (N, T)
    if cfg.without:
        here = in_quadrants(batch, cfg.without)
        credit = torch.where(here, batch.advantage[:, None], credit)
    if cfg.quadrants:
        here = in_quadrants(batch, cfg.quadrants)
        credit = credit.masked_fill(~here, 0)
    return credit.masked_fill(~batch.mask, 0)


def in_quadrants(batch, names):
    """Where are the tokens of the named quadrants, for example "PHR,NHR"?  -> (N, T) bool"""
    codes = [1 + QUADRANTS.index(name) for name in split_names(names)]
    return torch.isin(batch.quadrant, torch.tensor(codes))


def eapo_credit(batch, cfg):
    return entropy_aware_advantages(
        batch.advantage, batch.H, batch.mask, cfg.group_size, cfg.alpha, cfg.phi)


def grpo_credit(batch, cfg):
    """The same advantage for every token. Like all rules here, with DAPO's clips and no KL term."""
    return batch.advantage[:, None].expand(batch.H.shape)


def forking_credit(batch, cfg):
    """Credit only where H is among the highest 20% of the step (Wang et al. 2025)."""
    H = batch.H[batch.mask]                                                     # (tokens,)
    highest = H.topk(math.ceil(len(H) / 5)).values
    threshold = highest[-1]
    return torch.where(batch.H >= threshold, batch.advantage[:, None], 0)


def entroadv_credit(batch, cfg):
    """More praise but less blame where the policy is unsure (Cheng et al. 2025)."""
    A = batch.advantage[:, None]
    return A + torch.minimum(0.4 * batch.H, A.abs() / 2)


def w_reinforce_credit(batch, cfg):
    """A tenth of the praise and all of the blame (Zhu et al. 2025, who take the reward for A)."""
    A = batch.advantage[:, None].expand(batch.H.shape)
    return torch.where(A > 0, 0.1 * A, A)


CREDIT_RULES = {
    "eapo": eapo_credit,
    "grpo": grpo_credit,
    "forking": forking_credit,
    "entroadv": entroadv_credit,
    "w-reinforce": w_reinforce_credit,
}


# --------------------------------------------------------------------------------------------------
# Part 4. Rollouts: from prompts to a Batch of marked responses, with log-probability and entropy of
# all their tokens. Each process samples and marks its share; then all have the whole batch.
# --------------------------------------------------------------------------------------------------

@dataclass
class Batch:
    """N responses, the G responses to a prompt in neighbouring rows. Fields are None until known.

    A row is a prompt, its response, and zeros up to the longest row. What is known of each response
    token is 0 outside the mask (but for V, I and true_advantage of part 8). Masks come from the
    lengths, never from token values: many models pad with their stop token. A batch is in host
    memory, except for the rows that a GPU works on.
    """
    ids: torch.Tensor               # (N, L) prompt, then response
    prompt_len: torch.Tensor        # (N,)   tokens
    response_len: torch.Tensor      # (N,)   tokens, the stop token included
    old_logp: torch.Tensor = None   # (N, T) log-probability of each response token under pi_old
    H: torch.Tensor = None          # (N, T) entropy of pi_old before each response token, nats
    ended: torch.Tensor = None      # (N,)   True: the model stopped by itself; False: cut off
    gap: torch.Tensor = None        # (N,)   sum over tokens of |log pi_sampler - log pi_policy|,
                                    #        nats; nan where it was not measured
    number: torch.Tensor = None     # (N,)   the problem's place in its stream, set or list
    right: torch.Tensor = None      # (N,)   the verdict of the verifier
    reward: torch.Tensor = None     # (N,)   r
    kept: torch.Tensor = None       # (N,)   False: the group is all right or all wrong
    advantage: torch.Tensor = None  # (N,)   A
    credit: torch.Tensor = None     # (N, T) what the loss takes as A: A^CA, or another rule's
    quadrant: torch.Tensor = None   # (N, T) 1 to 4, 0 outside the mask
    weight: torch.Tensor = None     # (N, T) how much each token counts in the loss
    V: torch.Tensor = None          # (N, T) chance, before each token, of a right answer: part 8
    I: torch.Tensor = None          # (N, T) information: how much is decided there, nats
    true_advantage: torch.Tensor = None     # (N, T) V(s, o) - V(s) of the token drawn

    @property
    def mask(self):
        """(N, T) True on response tokens."""
        T = max(self.response_len.tolist(), default=0)
        places = torch.arange(T, device=self.ids.device)
        return places < self.response_len[:, None]

    def apply(self, f):
        """The Batch of f(name, tensor) for every field that is known."""
        known = {name: x for name, x in vars(self).items() if x is not None}
        return Batch(**{name: f(name, x) for name, x in known.items()})

    def rows(self, index):
        """The Batch of some rows (indices, a slice or a boolean mask), cut to its longest row."""
        few = self.apply(lambda name, x: x[index])
        L = max((few.prompt_len + few.response_len).tolist(), default=0)
        T = few.mask.shape[1]

        def cut(name, x):
            if x.dim() == 1:
                return x
            return x[:, :L] if name == "ids" else x[:, :T]
        return few.apply(cut)

    def to(self, device):
        return self.apply(lambda name, x: x.to(device))

    def response(self, i):
        """The tokens of response i, as a list of ids."""
        start = int(self.prompt_len[i])
        end = start + int(self.response_len[i])
        return self.ids[i, start:end].tolist()


def make_batch(prompts, responses):
    """Lists of token ids, one prompt and one response per row -> a Batch with ids and lengths."""
    rows = [torch.tensor(prompt + response) for prompt, response in zip(prompts, responses)]
    if rows:
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    else:
        ids = torch.zeros(0, 0, dtype=torch.long)       # this process has nothing to do
    prompt_len = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.long)
    response_len = torch.tensor([len(response) for response in responses], dtype=torch.long)
    return Batch(ids, prompt_len, response_len)


def concatenate(batches):
    """Batches with the same fields -> one Batch, padded to the longest row of all."""
    def stack(name, _):
        parts = [getattr(batch, name) for batch in batches]
        if parts[0].dim() == 2:
            width = max(part.shape[1] for part in parts)
            parts = [F.pad(part, (0, width - part.shape[1])) for part in parts]
        return torch.cat(parts)
    return batches[0].apply(stack)


def collect_rollouts(run):
    """Sample and mark until prompts_per_step groups are mixed, or no round is left -> all that was
    sampled, a Batch, or None if a signal stopped it.

    A group whose responses are all right or all wrong teaches nothing: its advantages are 0 (or,
    with --overlong, about length alone). `kept` is False there and, while rounds are left, further
    problems are sampled to replace it: dynamic sampling, as in DAPO.
    """
    cfg = run.cfg
    rounds = []
    missing = cfg.prompts_per_step
    position = run.stream.position
    while missing > 0 and len(rounds) <= cfg.resample:
        numbered = run.stream.take(missing)
        batch = sample_and_mark(run, numbered, "train", cfg.group_size, cfg.temperature, cfg.top_p)
        if run.stopped:
            run.stream.position = position              # a resumed run does this step again
            return None
        right = batch.right.reshape(-1, cfg.group_size)                         # (B, G)
        mixed = right.any(dim=1) & ~right.all(dim=1)                            # (B,)
        batch.kept = mixed.repeat_interleave(cfg.group_size)                    # (N,)
        missing -= int(mixed.sum())
        rounds.append(batch)
    empty_sampler(run)
    return concatenate(rounds)


def sample_and_mark(run, numbered, name, samples, temperature, top_p):
    """Several responses to each (number, problem), with rewards -> a Batch, sorted by number.

    name: "train", "credit" or that of an evaluation set. With the seed of the run and the number of
    the problem, it decides which random numbers the `samples` responses get. If a signal cuts the
    sampling short, run.stopped is set and there is no Batch.
    """
    cfg = run.cfg
    world = run.world
    world.begin("sample")
    mine = numbered[world.rank::world.size]             # the share of this process
    prompts = [problem.ids for _, problem in mine]
    seeds = [crc32(f"{cfg.seed} {name} {number}".encode()) for number, _ in mine]
    lm = fill_sampler(run)
    limits = [problem.limit or cfg.max_response_tokens for _, problem in mine]
    slots = slots_that_fit(lm, prompts, limits, samples, world.free_memory())
    with world.bar(None, f"sampling, {name}", total=samples * sum(limits), unit=" tokens",
                   delay=3, leave=False) as bar:
        def keep_on(tokens):
            bar.update(tokens)
            return not world.signalled
        batch = generate(lm, prompts, samples, limits, temperature, top_p, run.stop_ids, seeds,
                         slots, keep_on)
    run.stopped = any(world.gather(world.signalled))
    if run.stopped:
        return None
    # On GPUs a bf16 copy has sampled: replace its old_logp and H by the policy's. (Continuations of
    # part 8 need neither.) Elsewhere they are kept; only in training the longest response is
    # scored, to measure the gap where it would show first.
    by_length = batch.response_len.argsort(descending=True, stable=True)
    if world.bf16 and name != "credit":
        rescore(run, batch, by_length, temperature, replace=True)
    elif name == "train":
        rescore(run, batch, by_length[:1], temperature, replace=False)
    world.begin("other")

    each = [pair for pair in mine for _ in range(samples)]          # one per response
    batch.number = torch.tensor([number for number, _ in each], dtype=torch.long)
    mark(run, batch, [problem for _, problem in each])
    batch = concatenate(world.gather(batch))            # what all processes sampled
    return batch.rows(batch.number.argsort(stable=True))


def rescore(run, batch, rows, temperature, replace):
    """Set the `gap` of these rows, between sampler and policy; perhaps replace old_logp and H.

    rho needs log-probabilities of pi_theta and pi_old that differ by nothing but the update. On
    GPUs both sampler and policy multiply in bf16, but the sampler reads its keys and values from a
    cache, and rounds differently. So the policy scores the responses again, and its numbers are
    kept. In fp32 the two should agree.
    """
    logp, H = score(run.policy, run.world, batch.rows(rows), temperature)       # (rows, width)
    width = logp.shape[1]
    batch.gap = torch.full([len(batch.ids)], torch.nan)
    batch.gap[rows] = (logp - batch.old_logp[rows, :width]).abs().sum(dim=1)
    if replace:
        batch.old_logp[rows, :width] = logp
        batch.H[rows, :width] = H


def mark(run, batch, problems):
    """Set `right`, the verdict on each response, and `reward`: +1 or -1, or less with --overlong.

    Put your own reward here: any scale works. But `right` alone decides the quadrants, the solve
    rate, and which groups are dropped, those that are all right or all wrong.
    """
    cfg = run.cfg
    verdicts = []
    for i, problem in enumerate(problems):
        verdicts.append(is_right(run, problem, problem.begun + batch.response(i)))
    batch.right = torch.tensor(verdicts, dtype=torch.bool)
    batch.reward = torch.where(batch.right, 1.0, -1.0)

    # DAPO's soft penalty for overlong responses: 0 up to the last share of the tokens, then falling
    # evenly to -1 at the limit.
    if cfg.overlong > 0:
        last_share = cfg.overlong * cfg.max_response_tokens
        left = cfg.max_response_tokens - batch.response_len                     # (N,) tokens
        batch.reward -= (1 - left / last_share).clamp(0, 1)


def is_right(run, problem, response):
    """The verdict on a response, given as tokens."""
    text = run.tokenizer.decode(response, skip_special_tokens=True)
    check = problem.check or is_correct                 # a task may bring its own
    return bool(check(text, problem.answer))


@torch.no_grad()
def score(policy, world, batch, temperature):
    """log-probability of a batch's response tokens and H, under a Policy.  -> (N, T) both"""
    world.begin("score")
    pieces = micro_batch_rows(batch.prompt_len + batch.response_len, world.microbatch_tokens)
    rounds = max(world.gather(len(pieces)))             # under FSDP all run the model equally often
    pieces += [torch.arange(0)] * (rounds - len(pieces))
    all_logp = torch.zeros(batch.mask.shape)
    all_H = torch.zeros(batch.mask.shape)
    for rows in pieces:
        logp, H = policy(batch.rows(rows).to(world.device), temperature)        # (m, width) both
        width = logp.shape[1]
        all_logp[rows, :width] = logp.cpu()
        all_H[rows, :width] = H.cpu()
    if world.sharded:
        policy.reshard()                                # or embedding and head would stay whole
    return all_logp, all_H


# ---- Sampling with slots: continuous batching, as in inference engines such as vLLM. -------------
#
# The KV cache of a process has slots, each of which holds one response while it is written. As
# responses differ much in length, a batch that waits for its longest one leaves most of its slots
# idle. So, as soon as G slots are free, the next prompt is read (prefill), and its G responses
# start in them, while the other slots go on where they are. Every decode step adds one token to
# each response that has a slot.
#
#     place    0 1 2 3 4 5 6 7 8 9
#     slot 0   p p p p r r r ^            p   key and value of a prompt token
#     slot 1   p p p p r r r ^            r   of a response token
#     slot 2   p p r r r r r r r ^        ^   `position`: the next decode step reads the newest
#     slot 3   . . . . . .                    token, and writes its key and value here
#                                         .   left over: this slot is idle
#
# Here G = 2 and `width` is 10. Slots 0 and 1 have the same prompt. Slot 2 answers another one, and
# its partner in slot 3 has ended.

@torch.no_grad()
def generate(lm, prompts, group_size, limits, temperature, top_p, stop_ids, seeds,
             slots_at_most=512, keep_on=None):
    """G responses to each prompt -> a Batch of N rows with old_logp, H and ended.

    limits: how many tokens a response to each prompt may have. seeds: one for each prompt.
    slots_at_most: what fits in memory, see `slots_that_fit`, but G are taken at least. keep_on:
    called with the number of new tokens after every decode step; if it returns False, generation
    stops early.

    The random number that draws a token depends, for a given G, only on the seed of its prompt, on
    which of the G responses it is in, and on its place there. So, up to rounding, responses depend
    neither on the number of slots or processes nor on one another.
    """
    device = lm.device
    G = group_size
    N = len(prompts) * G
    slots = min(N, max(1, slots_at_most // G) * G)
    room = max((len(prompt) + limit for prompt, limit in zip(prompts, limits)), default=0)
    most = max(limits, default=0)
    stop = torch.tensor(stop_ids, dtype=torch.long, device=device)

    # What is given for each response: how many tokens it may have, the position of its last prompt
    # token, and a random number for each of its tokens.
    limit = torch.tensor(limits, dtype=torch.long, device=device).repeat_interleave(G)      # (N,)
    ends = [len(prompt) - 1 for prompt in prompts]
    prompt_end = torch.tensor(ends, dtype=torch.long, device=device).repeat_interleave(G)   # (N,)
    u = random_numbers(seeds, G, most).to(device)                               # (N, most)

    # What is kept of each.
    tokens = torch.zeros(N, most, dtype=torch.long, device=device)
    logp = torch.zeros(N, most, device=device)
    H = torch.zeros(N, most, device=device)
    length = torch.zeros(N, dtype=torch.long, device=device)
    ended = torch.zeros(N, dtype=torch.bool, device=device)

    # What each slot is doing.
    IDLE = -1
    row_of = torch.full((slots,), IDLE, device=device)  # the response that it writes
    newest = torch.zeros(slots, dtype=torch.long, device=device)    # the token to read next
    cache = transformers.Cache(layers=[])

    waiting = list(range(len(prompts)))
    while waiting or (row_of != IDLE).any():
        # Prefill fills the cache, and computes no logits. Those of the first response token come
        # from the first decode step, which reads the last prompt token once more, and writes its
        # key and value again. So one line below draws every token.
        idle = (row_of == IDLE).nonzero()[:, 0]
        at_once = max(1, 16384 // max(map(len, prompts)))   # bounds the memory that reading takes
        n = min(len(idle) // G, len(waiting), at_once)
        if n > 0:
            new = waiting[:n]
            waiting = waiting[n:]
            prefill(lm, [prompts[i] for i in new], G, cache, idle[:n * G], slots, room)
            for i, group in zip(new, idle[:n * G].split(G)):
                row_of[group] = i * G + torch.arange(G, device=device)
                newest[group] = prompts[i][-1]

        # When no prompt waits any more, give up idle slots. That copies the cache, so not before a
        # fifth of them are idle.
        busy = (row_of != IDLE).nonzero()[:, 0]
        if not waiting and len(busy) <= 0.8 * len(row_of):
            row_of = row_of[busy]
            newest = newest[busy]
            cache.batch_select_indices(busy)
            busy = torch.arange(len(busy), device=device)

        # Decode: one more token in every busy slot. Slot busy[j] writes response row[j], which has
        # t[j] tokens so far. row_of, newest and position have a place for each slot; tokens, logp,
        # H and so on one for each response; row, t, token and finished one for each j.
        row = row_of[busy]
        t = length[row]
        position = torch.zeros_like(row_of)             # 0 in idle slots, which are computed, too
        position[busy] = prompt_end[row] + t            # where `newest` belongs
        logits = decode(lm, newest, position, cache)[busy]                      # (busy, V)
        token = draw(logits, u[row, t], temperature, top_p)                     # (busy,)
        tokens[row, t] = token
        logp[row, t], H[row, t] = log_prob_and_entropy(logits, token, temperature)
        ended[row] = torch.isin(token, stop)
        length[row] = t + 1

        newest[busy] = token
        finished = ended[row] | (length[row] == limit[row])                     # (busy,) bool
        done = busy[finished]                           # slots
        row_of[done] = IDLE
        if keep_on and not keep_on(len(busy)):
            break

    # What was kept, cut to the longest response.
    responses = []
    for ids, n in zip(tokens.cpu(), length.tolist()):
        responses.append(ids[:n].tolist())
    batch = make_batch([prompt for prompt in prompts for _ in range(G)], responses)
    T = batch.mask.shape[1]
    # A slice holds on to the whole tensor, and `gather` would send it: hence the clones.
    batch.old_logp = logp[:, :T].cpu().clone()
    batch.H = H[:, :T].cpu().clone()
    batch.ended = ended.cpu()
    return batch


def random_numbers(seeds, group_size, most):
    """The numbers in [0, 1) that draw the tokens of G responses per seed, at most `most` each.

    -> (len(seeds) * G, most). Those of a seed depend on no other, and a larger `most` only adds
    some at the end of each row.
    """
    parts = [torch.zeros(0, most)]
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        # Drawn row by row, as (most, G): row t is for token t of all G responses.
        parts.append(torch.rand(most, group_size, generator=generator).T)
    return torch.cat(parts)


def decode(lm, newest, position, cache):
    """Read the newest token of every slot at its position -> logits of the next one, (slots, V)."""
    # On a GPU, launching kernels one by one takes most of this time. A CUDA graph would belong
    # here, with `width` fixed.
    width = int(position.max()) + 1                     # no slot needs to look further
    for layer in cache.layers:
        layer.position = position
        layer.width = width
    mask = decode_mask(lm.config, position, width)
    return lm(newest[:, None], attention_mask=mask, position_ids=position[:, None],
              past_key_values=cache).logits[:, -1]


class SlotLayer(transformers.cache_utils.DynamicLayer):
    """The KV cache of one layer: keys and values, (slots, kv heads, room, size of a head).

    `decode` sets `position` (slots,), where each slot writes next, and `width`, the part of the
    room that is in use; the model then calls `update` once.
    """

    def __init__(self, like, slots, room):
        super().__init__()
        kv_heads = like.keys.shape[1]
        self.keys = like.keys.new_zeros(slots, kv_heads, room, like.keys.shape[3])
        self.values = like.values.new_zeros(slots, kv_heads, room, like.values.shape[3])
        self.is_initialized = True

    def update(self, keys, values, *args, **kwargs):
        """The newest token's keys and values, (slots, kv heads, 1, size) -> those of all tokens."""
        slot = torch.arange(len(self.position), device=self.position.device)
        # For every slot s at once, self.keys[s, :, position[s]] = keys[s, :, 0].
        self.keys[slot, :, self.position] = keys[:, :, 0]
        self.values[slot, :, self.position] = values[:, :, 0]
        return self.keys[:, :, :self.width], self.values[:, :, :self.width]


def prefill(lm, prompts, group_size, cache, into, slots, room):
    """Read n prompts, each once, and copy the keys and values of each into G slots.

    into: (n * G,) the numbers of the slots, those of a prompt next to one another.
    """
    # Padded on the right, and no mask: attention is causal, so no token sees the padding that
    # follows it, and decode steps write over the padding before a later token may look there.
    rows = [torch.tensor(prompt) for prompt in prompts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(lm.device)     # (n, P)
    read = transformers.DynamicCache()
    lm.get_decoder()(ids, past_key_values=read)
    if not cache.layers:
        cache.layers = [SlotLayer(layer, slots, room) for layer in read.layers]
    P = ids.shape[1]
    for ours, just_read in zip(cache.layers, read.layers):
        ours.keys[into, :, :P] = just_read.keys.repeat_interleave(group_size, dim=0)
        ours.values[into, :, :P] = just_read.values.repeat_interleave(group_size, dim=0)


def decode_mask(config, position, width):
    """Which positions each slot's newest token may attend to: a mask (slots, 1, 1, width).

    All up to its own, and in layers with a sliding window the last few of them. A model whose
    config lists the kinds of its layers expects both masks, in a dict.
    """
    age = position[:, None] - torch.arange(width, device=position.device)       # (slots, width)
    full = (age >= 0)[:, None, None]
    sliding = full
    if getattr(config, "sliding_window", None):
        sliding = full & (age < config.sliding_window)[:, None, None]
    if config._attn_implementation == "eager":          # which adds the mask to the scores
        full = torch.where(full, 0, -torch.inf)
        sliding = torch.where(sliding, 0, -torch.inf)
    if getattr(config, "layer_types", None):
        return {"full_attention": full, "sliding_attention": sliding}
    return sliding


def slots_that_fit(lm, prompts, limits, group_size, free_bytes):
    """How many slots, with their KV cache and logits, fit into 4/5 of the memory that the results
    leave; at most 512."""
    config = lm.config
    room = max((len(prompt) + limit for prompt, limit in zip(prompts, limits)), default=1)  # tokens
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    numbers = 2 * config.num_hidden_layers * kv_heads * size * room     # keys and values
    logits = 44 * config.vocab_size             # bytes, with all copies of them: measured
    slot = numbers * lm.dtype.itemsize + logits
    # `generate` keeps an id (8 bytes), log p, H and a random number (4 each) for each token.
    results = 20 * group_size * len(limits) * max(limits, default=0)
    return int(min(512, 0.8 * (free_bytes - results) / slot))


def draw(logits, u, temperature, top_p):
    """One token per row by inverse CDF sampling.  logits (rows, V), u (rows,) in [0, 1) -> (rows,)

    Lay the tokens end to end, each taking up a length equal to its probability: u falls in the one
    that is drawn. top_p < 1 lays out only the likeliest tokens, as many as it takes to reach top_p,
    and always at least one. Temperature 0 takes the likeliest.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    p = (logits.float() / temperature).softmax(dim=-1)                          # (rows, V)
    order = None
    if top_p < 1:
        p, order = p.sort(dim=-1, descending=True)
        before = p.cumsum(dim=-1) - p                   # total probability of the likelier tokens
        p = p.masked_fill(before >= top_p, 0)
    # In double precision, because a parallel sum in fp32 need not rise from token to token. The sum
    # of p is not exactly 1, so u is stretched to it.
    ends = p.double().cumsum(dim=-1)                                            # (rows, V)
    point = u[:, None] * ends[:, -1:]                                           # (rows, 1)
    place = torch.searchsorted(ends, point, right=True)                         # (rows, 1)
    if order is not None:
        place = order.gather(-1, place)
    return place[:, 0]


# --------------------------------------------------------------------------------------------------
# Part 5. The policy: a causal language model, and the two numbers that we need from it at every
# response token: the log-probability of the token and the entropy before it. Then the batches of an
# update, the supervised warm-up, and a tiny model.
# --------------------------------------------------------------------------------------------------

def log_prob_and_entropy(logits, tokens, temperature):
    """log pi(token) and H of pi = softmax(logits / temperature), over the whole vocabulary in fp32.

    logits (M, V), tokens (M,) -> (M,), (M,) nats. Sampling, scoring and the update all use this:
    else rho would compare two formulas. Temperature 0, which draws greedily, counts as 1. top_p
    plays no part: tokens are drawn from a truncated pi, but pi_old and rho refer to the whole of
    it, as in verl. (Logits that were computed in bf16 have been rounded before.)
    """
    if temperature == 0:
        temperature = 1.0
    logits = logits.float() / temperature
    logit = logits.gather(-1, tokens[:, None])[:, 0]                            # (M,)
    logp = logit - logits.logsumexp(dim=-1)                                     # (M,)
    return logp, token_entropy(logits)


class Policy(torch.nn.Module):
    """pi_theta: a transformers language model that returns what RL needs, instead of logits."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    def forward(self, batch, temperature):
        """log pi_theta of each response token, and H before it.  Batch -> (N, T) both, 0 outside"""
        ids = batch.ids                                                         # (N, L)
        mask = batch.mask                                                       # (N, T)
        if len(ids) == 0:
            # This process has no rows left, but under FSDP all must run the model equally often.
            # So it runs on a dummy token; the loss of no rows is 0, and so are its gradients.
            ids = torch.zeros(1, 1, dtype=torch.long, device=ids.device)

        # Rows are padded on the right, where no token of a causal model can see the padding. So
        # there is no need for an attention mask.
        hidden = self.lm.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state

        # Response token t of a row stands at prompt_len + t, and the hidden state one place to the
        # left predicts it. Only these states go through the head.
        row, t = mask.nonzero(as_tuple=True)                                    # (M,) both
        place = batch.prompt_len[row] + t                                       # (M,)
        tokens = ids[row, place]                                                # (M,)
        before = hidden[row, place - 1]                                         # (M, D)
        head = self.lm.get_output_embeddings().weight                           # (V, D)
        logp, H = log_prob_and_entropy_in_chunks(before, head, tokens, temperature)

        outside = torch.zeros(mask.shape, device=ids.device)                    # (N, T)
        return outside.index_put((row, t), logp), outside.index_put((row, t), H)


# How many fp32 logits at a time: 128 MB of them on a CPU, 1 GB on a GPU. Every chunk adds its share
# to the gradient of the head. In bf16 each addition rounds: so we want few chunks.
LOGITS_AT_ONCE = 2 ** 28 if torch.cuda.is_available() else 2 ** 25


def log_prob_and_entropy_in_chunks(hidden, head, tokens, temperature):
    """`log_prob_and_entropy` of hidden states (M, D) and the head's weight (V, D), without (M, V).

    A matrix (M, V) would be the largest thing in training: 4096 tokens at V = 152,064 are 2.5 GB of
    logits, several times over with gradients. So tokens go through the head a chunk at a time, and
    `checkpoint` keeps no logits: backward computes those of a chunk again.
    """
    def through_head(some_hidden, some_tokens):
        return log_prob_and_entropy(some_hidden @ head.T, some_tokens, temperature)

    chunk = max(1, LOGITS_AT_ONCE // len(head))                                 # tokens
    if len(hidden) <= chunk:                            # small enough to keep
        return through_head(hidden, tokens)
    logps = []
    entropies = []
    for some_hidden, some_tokens in zip(hidden.split(chunk), tokens.split(chunk)):
        logp, H = checkpoint(through_head, some_hidden, some_tokens, use_reentrant=False,
                             preserve_rng_state=False)
        logps.append(logp)
        entropies.append(H)
    return torch.cat(logps), torch.cat(entropies)                               # (M,) both


# ---- The update: its batches and its gradient. ---------------------------------------------------

def mini_batches(run, batch):
    """The kept groups in mini-batches, each of which makes one optimizer step.

    They hold at most prompts_per_minibatch groups, their sizes differ by at most one, and they keep
    the random order of the stream.
    """
    groups = batch.kept.nonzero().reshape(-1, run.cfg.group_size)               # (groups, G) rows
    count = math.ceil(len(groups) / run.cfg.prompts_per_minibatch)
    for k in range(count):
        start = k * len(groups) // count
        end = (k + 1) * len(groups) // count
        yield batch.rows(groups[start:end].flatten())


def micro_batches(run, batch):
    """This process's rows of a batch, in pieces that fit in memory, on the device that computes.

    In each round every process runs one piece, and the round lasts as long as its largest piece.
    So all rows are sorted by length, cut into pieces, and dealt out in turn: the pieces of a round
    are about equally large. In the last round some may be empty.
    """
    world = run.world
    budget = world.microbatch_tokens                    # tokens of a piece
    lengths = batch.prompt_len + batch.response_len                             # (N,)
    pieces = micro_batch_rows(lengths, budget)
    # 5 pieces keep 3 processes busy for two rounds, but leave one of them idle in the second. 6
    # smaller pieces take two rounds as well, and shorter ones. So cut smaller and smaller, and keep
    # the last cut that takes no further round.
    rounds = math.ceil(len(pieces) / world.size)
    while world.size > 1 and budget > lengths.max():
        budget = int(0.9 * budget)
        smaller = micro_batch_rows(lengths, budget)
        if len(smaller) > rounds * world.size:
            break
        pieces = smaller
    pieces += [torch.arange(0)] * (rounds * world.size - len(pieces))
    for rows in pieces[world.rank::world.size]:
        yield batch.rows(rows).to(world.device)


def micro_batch_rows(lengths, tokens):
    """The rows of each micro-batch: lengths (N,) of rows -> a list of tensors of indices.

    n * longest row is at most `tokens`, unless a single row is longer. Rows are sorted by length,
    so that neighbours are alike and little is padding.
    """
    rest = lengths.argsort(descending=True, stable=True)
    pieces = []
    while len(rest) > 0:
        longest = int(lengths[rest[0]])
        n = max(1, tokens // longest)
        pieces.append(rest[:n])
        rest = rest[n:]
    return pieces


def clip_gradient(run):
    """Scale a gradient longer than 1 down to that, so that a rare large one does not undo the rest.

    -> its norm before that. If it is nan or infinite, the run ends before it does harm.
    """
    norm = torch.nn.utils.clip_grad_norm_(run.policy.parameters(), max_norm=1.0)
    norm = float(run.world.whole(norm))
    require(math.isfinite(norm), f"the gradient is {norm}, and the step was not taken: try a lower "
            "learning rate, in the warm-up or in RL, where metrics.jsonl shows how it came")
    return norm


# ---- Supervised warm-up, and a model to warm up. -------------------------------------------------

def warm_up(run):
    """Supervised warm-up: imitate worked solutions, so that RL has right responses to reinforce.

    RL can only reinforce what the model already does now and then. The loss is the mean of -log p,
    at --temperature, over the tokens of the solutions, their stop tokens included.
    """
    cfg = run.cfg
    world = run.world
    if cfg.warmup_steps == 0:
        return
    stream = Stream(load_problems(run, cfg.warmup_data, "warmup"), cfg.seed)
    optimizer = new_optimizer(run, cfg.warmup_learning_rate, beta2=0.95)
    bar = world.bar(range(cfg.warmup_steps), "warm-up")
    for step in bar:
        rises = (step + 1) / 20
        falls = (1 - step / cfg.warmup_steps) / 0.3
        optimizer.param_groups[0]["lr"] = cfg.warmup_learning_rate * min(1, rises, falls)

        batch = solution_batch(run, [problem for _, problem in stream.take(16)])
        total = batch.response_len.sum()
        loss_sum = 0.0
        for micro in micro_batches(run, batch):
            logp, _ = run.policy(micro, cfg.temperature)
            loss = -(logp * (micro.mask / total)).sum()
            (loss * world.size).backward()
            loss_sum += float(loss.detach())
        clip_gradient(run)
        optimizer.step()
        optimizer.zero_grad()

        bar.set_postfix_str(f"loss {world.sum(loss_sum):.3f} nats per token", refresh=False)
        stopped = any(world.gather(world.signalled))
        require(not stopped, "stopped in the warm-up, which cannot be resumed")


def solution_batch(run, problems):
    """The prompts of problems, each followed by its worked solution and the stop token: a Batch. A
    solution beyond --max-response-tokens is cut."""
    worked = [str(problem.solution) for problem in problems]
    rows = run.tokenizer(worked, add_special_tokens=False).input_ids
    solutions = [(ids + run.stop_ids[:1])[:run.cfg.max_response_tokens] for ids in rows]
    return make_batch([problem.ids for problem in problems], solutions)


def new_optimizer(run, learning_rate, beta2):
    """AdamW. (The paper names neither a weight decay nor betas nor a limit of the gradient.)"""
    return torch.optim.AdamW(run.policy.parameters(), lr=learning_rate, betas=(0.9, beta2),
                             weight_decay=0.0, fused=True)


def tiny_model(seed):
    """A Llama of 0.1M parameters with random weights, and its tokenizer.  -> lm, tokenizer

    The tokenizer's vocabulary is single characters and \\boxed{. Its chat template adds nothing to
    the problem. The letters are for the task `chatter`.
    """
    # GPT-2's tokenizer without merges leaves every character by itself; it writes a space as Ġ.
    pieces = ["<pad>", "<eos>", "<unk>", *"0123456789+=Ġ}", "\\boxed{", *LETTERS]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = transformers.GPT2Tokenizer(
        vocab=vocabulary, merges=[], bos_token=None, pad_token="<pad>", eos_token="<eos>",
        unk_token="<unk>", chat_template="{{ messages[0]['content'] }}")
    tokenizer.add_tokens(["\\boxed{"])

    torch.manual_seed(seed)
    lm = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(pieces), hidden_size=64, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=512, initializer_range=0.08,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=0))
    return lm, tokenizer


# --------------------------------------------------------------------------------------------------
# Part 6. Problems: generated by the program, from files and from the hub.
# --------------------------------------------------------------------------------------------------

@dataclass
class Problem:
    problem: str
    answer: object = None       # the gold answer, or a list of alternatives
    solution: str = ""          # a worked solution, for the warm-up only
    messages: list = None       # the prompt as a conversation; None: a user who asks the problem
    check: object = None        # (text of a response, answer) -> bool; None: the verifier
    limit: int = None           # of response tokens; None: --max-response-tokens
    ids: list = None            # the prompt as tokens
    begun: list = field(default_factory=list)   # tokens in `ids` that the response begins with

    def __post_init__(self):
        self.messages = self.messages or [{"role": "user", "content": self.problem}]


LETTERS = "abcdefghijklmnop"


def column_addition(a, b, rng, letters):
    """A worked solution by someone who has not understood carrying. For 5170 + 6749 for example

        9+0=9 7+4=11 1+7=8 5+6=11 \\boxed{11819}

    where the third column forgets the carry, 1+7+1=9. Columns run from the right. Whether to write
    +1 or = is a decision that makes the answer right or wrong; which digit of a column comes first
    is a decision that does not matter; everything else is routine. letters: how many letters
    without meaning follow each column.
    """
    columns = []
    result = ""
    total = 0
    for x, y in zip(reversed(f"{a:04}"), reversed(f"{b:04}")):
        # The larger the previous column's sum, the likelier a carry: sigmoid((sum - 12.5) / 1.5).
        previous = total
        chance = 1 / (1 + math.exp((12.5 - previous) / 1.5))
        carry = bool(columns) and rng.random() < chance
        x, y = rng.sample((x, y), 2)
        total = int(x) + int(y) + carry
        plus_one = "+1" if carry else ""
        babble = rng.choices(LETTERS, k=letters)
        columns.append(f"{x}+{y}{plus_one}={total}" + "".join(babble))
        result = str(total % 10) + result
    result = str(total) + result[1:]                    # the last sum is written in full
    return " ".join(columns) + f" \\boxed{{{result}}}"


def addition(split, letters=0):
    """Sums of two 4-digit numbers -> [Problem]. No problem is in two splits."""
    rng = random.Random(0)
    numbers = rng.sample(range(10 ** 8), 18560)         # aaaabbbb stands for aaaa+bbbb
    parts = {"eval": numbers[:128], "train": numbers[128:2176], "warmup": numbers[2176:]}
    problems = []
    for number in parts[split]:
        a, b = divmod(number, 10 ** 4)
        solution = column_addition(a, b, rng, letters)
        problems.append(Problem(f"{a:04}+{b:04}=", str(a + b), solution))
    return problems


def chatter(split):
    """The same sums, but the solutions babble: `9+0=9kcm 7+4=11pba ..`.

    The letters are the most uncertain tokens (H = log 16 = 2.8 nats), and nothing depends on them.
    A rule that mistakes entropy for importance credits them at the expense of the carries.
    """
    return addition(split, letters=3)


NAMES = ("Ana", "Ben", "Eva", "Max", "Mia")
THINGS = ("apples", "balls", "books", "cards", "coins", "eggs", "pens", "stones")
STORIES = {         # a problem with two numbers, and the operator that solves it
    "{name} has {a} {things} and finds {b} more. How many are there now?": "+",
    "{name} had {a} {things} and Tom brought {b}. How many are there now?": "+",
    "{name} has {a} {things} and Tom has {b}. How many do they have together?": "+",
    "{name} has {a} {things}, {b} fewer than Tom. How many has Tom?": "+",
    "{name} has {a} boxes with {b} {things} in each. How many {things} are there?": "*",
    "{name} has {a} packs of {b} {things}. How many {things} are there?": "*",
    "{name} buys {a} {things} for {b} dollars each. How many dollars is that?": "*",
    "{name} has {a} {things}, and Tom {b} times as many. How many has Tom?": "*",
}


def word_problems(split):
    """Word problems of one step -> [Problem]. No story with the same two numbers is in two splits.

    The worked solutions are by someone who tosses a coin: add or multiply? Half of them are wrong,
    like this one for Ana, who has 9 pens and finds 4 more:

        9 * 4 = 36. \\boxed{36}

    The operator is a decision that makes the answer right or wrong; everything else is routine.
    """
    rng = random.Random(0)
    cases = list(product(STORIES, range(3, 13), range(2, 10)))
    rng.shuffle(cases)
    parts = {"eval": cases[:100], "train": cases[100:300], "warmup": cases[300:]}
    problems = []
    for story, a, b in parts[split]:
        text = story.format(a=a, b=b, name=rng.choice(NAMES), things=rng.choice(THINGS))
        results = {"+": a + b, "*": a * b}
        answer = results[STORIES[story]]
        operator = rng.choice("+*")
        result = results[operator]
        solution = f"{a} {operator} {b} = {result}. \\boxed{{{result}}}"
        problems.append(Problem(f"{text}\nAnswer in \\boxed{{}}.", str(answer), solution))
    return problems


def addition_kinds(tokens):
    """What does each token of a column addition decide?  strings -> names, one per token

    "order": which digit of the column comes first. "carry": the token after the two digits, + or =,
    in all columns but the first, which has nothing to carry. "letter": chatter. "rest": the others.
    """
    kinds = []
    column = 0
    place = 0                   # in the column, which begins with x + y: places 0, 1, 2
    for token in tokens:
        kind = "rest"
        if token.isalpha():
            kind = "letter"
        elif place == 0 and token.isdigit():
            kind = "order"
        elif place == 3 and column > 0 and token in ("+", "="):
            kind = "carry"
        kinds.append(kind)
        place += 1
        if token == " ":
            column += 1
            place = 0
    return kinds


# The built-in tasks. To add one, write a function like `addition`, which makes the problems of a
# split, "train", "eval" or "warmup", and enter it here. Those of the last need worked solutions,
# which end with a \boxed{answer}; some must be wrong, or RL would have nothing to teach. Then run
# it with all of --train-data NAME --eval-data NAME --warmup-data NAME. The verifier compares
# values, so 012 is 12: if that does not suit, give the problems a check, (text, answer) -> bool.
# The tiny model knows only the characters in `tiny_model`, and its preset has 32 tokens for a
# prompt and 64 for a response.
TASKS = {"addition": addition, "chatter": chatter, "words": word_problems}
KINDS = {"addition": addition_kinds, "chatter": addition_kinds}     # for the table of part 8


def load_problems(run, source, split):
    """The problems of a task, a file or a hub data set, with their prompts as tokens.

    split: train, eval, or warmup, which needs a worked solution for each, and no answer.
    """
    if source in TASKS:
        problems = TASKS[source](split)
    else:
        with one_line_errors(f"--{split}-data {source}"):
            rows = read_rows(source, split)
        problems = problems_from_rows(source, rows, "solution" if split == "warmup" else "answer")
        if len(problems) < len(rows):
            run.world.print(f"{source}: {len(rows) - len(problems)} of {len(rows)} rows left out, "
                            "whose solution has no \\boxed{} answer")
    if run.cfg.model == "tiny":
        text = "".join(problem.problem + problem.solution for problem in problems)
        characters = sorted(set(text.replace("\\boxed{", "")))
        unknown = [c for c in characters if run.tokenizer.decode(run.tokenizer(c).input_ids) != c]
        require(not unknown, f"{source}: --model tiny cannot read {''.join(unknown)!r:.50}: name "
                "another --model, or give it more characters in tiny_model")
    with one_line_errors(f"the tokenizer or the chat template of {run.cfg.model}"):
        for problem, ids in zip(problems, prompt_ids(run.tokenizer, problems)):
            problem.ids = ids

    limit = run.cfg.max_prompt_tokens
    short = [problem for problem in problems if len(problem.ids) <= limit]
    require(short, f"{source}: no prompt is within --max-prompt-tokens {limit}")
    if len(short) < len(problems):
        run.world.print(f"{source}: {len(problems) - len(short)} of {len(problems)} prompts left "
                        f"out, longer than --max-prompt-tokens {limit}")
    return short


INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."


def prompt_ids(tokenizer, problems):
    """The prompts of problems as tokens.  -> a list of ids for each

    A chat template writes everything around the problem, BOS included. Without one, the paper's
    instruction follows the problem, and the tokenizer adds its BOS.
    """
    if tokenizer.chat_template:
        conversations = [problem.messages for problem in problems]
        return tokenizer.apply_chat_template(
            conversations, add_generation_prompt=True)["input_ids"]
    texts = []
    for problem in problems:
        contents = [message["content"] for message in problem.messages]
        texts.append("\n".join(contents) + INSTRUCTION)
    prompts = tokenizer(texts).input_ids
    for ids in prompts:
        if ids[-1] == tokenizer.eos_token_id:           # some add it, as if the text ended here
            ids.pop()
    return prompts


class Stream:
    """Problems without end, in a new order in every epoch; `position`: how many were handed out."""

    def __init__(self, problems, seed):
        self.problems = problems
        self.seed = seed
        self.position = 0
        self.epoch = None
        self.order = []                                 # the problems in the order of this epoch

    def take(self, n):
        """The next n problems, each as (its number in the stream, the problem)."""
        taken = []
        for number in range(self.position, self.position + n):
            epoch, place = divmod(number, len(self.problems))
            if epoch != self.epoch:
                self.epoch = epoch
                rng = random.Random(f"{self.seed}/{epoch}")
                self.order = rng.sample(self.problems, len(self.problems))
            taken.append((number, self.order[place]))
        self.position += n
        return taken


# --------------------------------------------------------------------------------------------------
# Part 7. Evaluation on problems that the policy is not trained on, and the metrics of a step.
# --------------------------------------------------------------------------------------------------

def evaluate(run, step):
    """Sample and mark the problems of every evaluation set -> metrics, such as eval/NAME/avg@k.

    The random numbers are the same every time, so two evaluations differ by the model alone, up to
    rounding. Every response goes into responses.jsonl. Returns {} if a signal cuts it short.
    """
    cfg = run.cfg
    k = cfg.eval_samples
    metrics = {}
    if run.eval_sets and not run.history:
        explain_scores(run)
    for name, problems in run.eval_sets.items():
        numbered = list(enumerate(problems))
        batch = sample_and_mark(run, numbered, name, k, cfg.eval_temperature, cfg.eval_top_p)
        if run.stopped:
            return {}
        scores = eval_metrics(batch, k, smaller=cfg.eval_only)
        metrics |= {f"eval/{name}/{key}": x for key, x in scores.items()}
        print_evaluation(run, step, name, problems, batch, scores)
        write_responses(run, step, name, problems, batch)
        if name == list(run.eval_sets)[0]:
            if step == 0:
                warn_of_long_steps(run, int(batch.response_len.sum()))
            metrics |= inspect_problems(run, step, name, problems, batch)
        if run.stopped:
            return {}
    empty_sampler(run)
    return metrics


def eval_metrics(batch, k, smaller):
    """Avg@k and Pass@k of k responses per problem, with 95% intervals; entropy, lengths.  -> dict

        Pass@k = mean over problems of `pass_at_k`                                              (8)
        Avg@k  = mean over problems of c / k, with c of the k responses right                   (9)

    smaller: also Pass@1, 2, 4 and so on. Entropy is in nats at --eval-temperature (1 if greedy).
    """
    c = batch.right.reshape(-1, k).sum(dim=1)                                   # (problems,)
    avg = c / k
    scores = {f"avg@{k}": avg.mean()}
    scores["avg_low"], scores["avg_high"] = interval(avg)

    ks = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512] if smaller else []
    ks = [j for j in ks if j < k] + [k]
    for j in ks:
        passes = torch.tensor([pass_at_k(n=k, c=count, k=j) for count in c.tolist()])
        scores[f"pass@{j}"] = passes.mean()
    scores["pass_low"], scores["pass_high"] = interval(passes)      # of the last j, which is k

    lengths = batch.response_len
    scores["entropy"] = batch.H.sum() / lengths.sum()
    scores["length"] = lengths.float().mean()
    scores["truncated"] = (~batch.ended).float().mean()
    return scores


def pass_at_k(n, c, k):
    """The chance that of k samples, drawn from n of which c are right, at least one is right.

        1 - C(n - c, k) / C(n, k)                                                               (8)
    """
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def interval(values):
    """The 95% interval of a mean over problems, by bootstrap.  (problems,) -> (2,)"""
    n = len(values)
    if values.min() == values.max():
        # All samples of a bootstrap would be the same, as if the mean were certain. By the rule of
        # three, what was never seen in n problems may still have a share of up to 3 / n: a rough
        # substitute.
        mean = values[0]
        return torch.stack([mean - 3 / n, mean + 3 / n]).clamp(0, 1)
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(n, (2000, n), generator=generator)    # 2000 samples with replacement
    return torch.quantile(values[draws].mean(dim=1), torch.tensor([0.025, 0.975]))


def measure(run, batch, sums):
    """The metrics of a step, as metrics.jsonl holds them.  sums: totals of the update -> dict

        reward, solve_rate          means over all responses sampled
        entropy                     mean over their tokens, nats
        response_tokens, response_length                    tokens of all responses, and of one
        truncated                   share of the responses that were cut off
        groups                      sampled
        groups_all_right, groups_all_wrong                  those left out of the update
        loss, grad_norm             means over the optimizer steps
        clip_fraction               share of the tokens learned from whose gradient a clip made 0
        sampler_gap                 mean |log pi_sampler - log pi_policy|, nats, where measured
        seconds, seconds_PHASE, tokens_per_second           of the step without its evaluation
        peak_memory_bytes           of the first GPU
        tokens/Q                    share of quadrant Q in the tokens learned from
        advantage/Q                 share of quadrant Q in the sum of their |credit|
    """
    world = run.world
    world.begin("other")
    seconds = sum(world.clock.values())
    tokens = int(batch.mask.sum())
    right = batch.right.reshape(-1, run.cfg.group_size)                         # (B, G)
    learned = batch.mask & batch.kept[:, None]                                  # (N, T)
    learned_tokens = max(1, int(learned.sum()))
    updates = max(1, sums["updates"])
    metrics = {
        "reward": batch.reward.mean(),
        "solve_rate": right.float().mean(),
        "entropy": batch.H.sum() / tokens,
        "response_tokens": tokens,
        "response_length": tokens / len(batch.ids),
        "truncated": (~batch.ended).float().mean(),
        "groups": len(right),
        "groups_all_right": int(right.all(dim=1).sum()),
        "groups_all_wrong": int((~right).all(dim=1).sum()),
        "loss": world.sum(sums["loss"]) / updates,
        "grad_norm": sums["grad_norm"] / updates,
        "clip_fraction": world.sum(sums["clipped"]) / learned_tokens,
        "sampler_gap": batch.gap.nansum() / batch.response_len[batch.gap.isfinite()].sum(),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(),     # 0 on a CPU
    }
    for phase in ("sample", "score", "update"):
        metrics[f"seconds_{phase}"] = world.clock[phase]
    credit = batch.credit[learned].abs().double()                               # (tokens,)
    all_credit = credit.sum().clamp(min=1e-9)
    for code, name in enumerate(QUADRANTS, 1):
        here = batch.quadrant[learned] == code                                  # (tokens,)
        metrics[f"tokens/{name}"] = here.sum() / learned_tokens
        metrics[f"advantage/{name}"] = credit[here].sum() / all_credit
    if run.done == 1:
        warn_of_first_step(run, metrics)
    return metrics


# --------------------------------------------------------------------------------------------------
# Part 8. Credit, measured. What was a token really worth? Where sampling is cheap we can find out:
# stop before it, put each likely token in its place, and finish the response many times.
#
# For example, after 9+0=9 7+4=11 1+7 comes a + (for the carry that is due) or an =. Say the policy
# draws them with probabilities .4 and .6, and of 16 continuations of each, 12 and 1 are right. V is
# the chance that the response will be right, and the doubt about something that has the chance x is
# h(x) = -x log x - (1 - x) log(1 - x) nats:
#
#     V before the token    .4 * 12/16 + .6 * 1/16            = .34
#     true advantage        of +: 12/16 - .34 = +.41, of =: 1/16 - .34 = -.28
#     doubt before          h(.34)                            = .64
#     doubt after           .4 * h(12/16) + .6 * h(1/16)      = .37
#     information I         .64 - .37                         = .27    (and H is .67)
#
# (Here 12/16 and 1/16 are taken for true. As they are estimates, `doubt` corrects I to .25.)
#
# Two measures answer two questions:
#
#     Did the token that was drawn help?    Its true advantage. It has a sign, and the credit that a
#                                           rule gives should resemble it.
#     How much is decided at this place?    I. It has no sign, and is the same whichever token was
#                                           drawn. To choose between 1+7 and 7+1, for example, has
#                                           H = .69 and I = 0.
#
# The paper calls I the credit of a token (in this file, credit is what a rule gives), and proves
# that it is at most H (Proposition 1). I is the mutual information of the token and the verdict. If
# Ent(a | b) is the entropy of a once b is known, and s the response so far,
#
#     I = Ent(verdict | s) - Ent(verdict | s, token)      what the token tells about the verdict
#       = Ent(token | s) - Ent(token | s, verdict)        what the verdict tells about the token
#      <= Ent(token | s) = H                              as no entropy is below 0
# --------------------------------------------------------------------------------------------------

class Branch(NamedTuple):
    """A prefix s of a response to a problem, and one of the likely next tokens v."""
    number: int                 # of the problem
    tokens: tuple               # s, and then v


class Decision(NamedTuple):
    """A place in a response where more than one token was likely, or an unlikely one was drawn."""
    t: int                      # which token of the response it is
    drawn: Branch               # the branch that the response took
    pi: dict                    # {Branch: pi(v)} of all likely tokens, in the example .4 and .6


def true_credit(run, batch, problems, budget, n=16):
    """What was each token really worth? Sets V, I and true_advantage of a Batch, (N, T) each.

        V(s) = sum_v pi(v) V(s, v)                  the chance that the response will be right
        I    = h(V(s)) - sum_v pi(v) h(V(s, v))     nats
        true advantage = V(s, o) - V(s)             of the token o that was drawn

    s is a prefix of a response, v one of the likely next tokens, and s with v a branch. The pi(v)
    of the likely tokens are scaled to add up to 1. V(s, v) is the share of n continuations of a
    branch that are right, drawn from the whole policy (top_p 1) at the temperature of evaluations.
    Responses whose branches do not fit into `budget` stay nan.
    """
    # Find the branches, and finish them many times.
    decisions, branches = choose_decisions(run, batch, budget)
    value = branch_values(run, problems, branches, n)   # {Branch: V(s, v)}
    if run.stopped:
        return

    # Apply the formulas. V changes at decisions only. With decisions at t = 3 and 7, V is one value
    # for tokens 0 to 3, another for 4 to 7, and from there on the verdict. (The V after a decision
    # and the V before the next are the same chance, but estimated twice, from different
    # continuations. So true advantages add up only roughly to the verdict minus the first V.)
    batch.V = torch.full(batch.mask.shape, torch.nan)
    batch.I = batch.V.clone()
    batch.true_advantage = batch.V.clone()
    for i, found in decisions.items():
        batch.V[i] = float(batch.right[i])
        batch.I[i] = 0
        batch.true_advantage[i] = 0
        start = 0
        for decision in found:
            t = decision.t
            pi = torch.tensor(list(decision.pi.values()))                       # (likely tokens,)
            values = torch.stack([value[branch] for branch in decision.pi])
            V, I = value_and_information(pi, values, n)
            batch.V[i, start:t + 1] = V
            batch.I[i, t] = I
            batch.true_advantage[i, t] = value[decision.drawn] - V
            start = t + 1


def choose_decisions(run, batch, budget):
    """Those of the responses to measure, and all their branches, at most `budget` of them.

    -> {i: [Decision]}, [Branch]. Responses begin alike: a branch that several share counts once.
    Each response in turn is taken if the branches that are new in it still fit.
    """
    decisions = {}
    branches = {}                                       # an ordered set: {Branch: None}
    for i in range(len(batch.ids)):
        # Rounding may differ between GPUs, so all processes take what the first finds.
        found = run.world.gather(find_decisions(run, batch, i))[0]
        new = {}
        for decision in found:
            for branch in decision.pi:
                if branch not in branches:
                    new[branch] = None
        if len(branches) + len(new) <= budget:
            branches |= new
            decisions[i] = found
    return decisions, list(branches)


@torch.no_grad()
def find_decisions(run, batch, i):
    """Where was something decided in response i?  -> [Decision]

    Likely tokens are the one drawn and, of the four most probable, those with at least 1%. (On GPUs
    the pi of the sampler serves, in bf16.)
    """
    lm = fill_sampler(run)
    row = batch.rows([i]).to(lm.device)
    number = int(row.number)
    start = int(row.prompt_len)
    logits = lm(row.ids).logits[0, start - 1:-1].float()            # (T, vocabulary)
    p = (logits / run.cfg.eval_temperature).softmax(dim=-1).cpu()
    top = p.topk(4).indices.tolist()                                            # (T, 4) tokens
    found = []
    s = ()
    for t, o in enumerate(batch.response(i)):
        likely = {v for v in top[t] if p[t, v] >= 0.01} | {o}
        total = sum(float(p[t, v]) for v in likely)
        pi = {}
        for v in sorted(likely):
            pi[Branch(number, s + (v,))] = float(p[t, v]) / total
        if len(pi) > 1:
            found.append(Decision(t, drawn=Branch(number, s + (o,)), pi=pi))
        s = s + (o,)
    return found


def branch_values(run, problems, branches, n):
    """V(s, v) of branches: the share of n continuations that are right; the verdict, if a branch is
    a complete response.  -> {Branch: scalar tensor}"""
    value = {}
    rests = {}                                          # {Branch: the problem of finishing it}
    for branch in branches:
        problem = problems[branch.number]
        begun = list(branch.tokens)
        if is_complete(run, problem, begun):
            value[branch] = torch.tensor(float(is_right(run, problem, begun)))
        else:
            rests[branch] = rest_of(run, problem, begun)
    run.world.print(f"measuring what each token was worth: {n * len(rests)} continuations")
    numbered = list(enumerate(rests.values()))
    continued = sample_and_mark(run, numbered, "credit", n, run.cfg.eval_temperature, top_p=1.0)
    if not run.stopped:
        right = continued.right.reshape(-1, n).float()                          # (rests, n)
        value.update(zip(rests, right.mean(dim=1)))
    return value


def is_complete(run, problem, response):
    """Whether a response is over: its last token is a stop token, or it has reached its limit."""
    limit = problem.limit or run.cfg.max_response_tokens
    return response[-1] in run.stop_ids or len(response) >= limit


def rest_of(run, problem, begun):
    """The problem of finishing a response that begins with these tokens."""
    limit = problem.limit or run.cfg.max_response_tokens
    return replace(problem, ids=problem.ids + begun, begun=begun, limit=limit - len(begun))


def value_and_information(pi, values, n):
    """V(s), and I in nats, at a prefix s, from the pi(v) and the V(s, v) of its likely tokens v.

    pi, values: one number per token; a value is the share of n continuations that are right. So V
    and I are estimates. What is left of their errors, after `doubt`, is

        noise   at n = 16 an I is off by about .02 where nothing is decided (so it may be negative)
                and by about .1 where much is. This averages out over many tokens.
        bias    say a branch is right once in 50 times. Then usually 0 of 16 are, and it looks as if
                there were no doubt after it. So I is too high, by about .3 / n at most.
    """
    V = (pi * values).sum().clamp(max=1)                # rounding could make it 1.0000001
    variance = values * (1 - values) / n                # of each value
    variance_of_V = (pi.square() * variance).sum()
    before = doubt(V, variance_of_V)
    after = (pi * doubt(values, variance)).sum()
    return V, before - after


def doubt(x, variance):
    """h(x) = -x log x - (1 - x) log(1 - x) nats, where x is an estimate with this variance.

    h is concave: if x comes out now too high, now too low, h(x) is too low on average, by about
    variance / (2 x (1 - x)). We add that. For a share of n continuations other than 0 and 1 it is
    1 / (2 n), or .031 at n = 16. V(s) averages over the branches, so its variance is smaller, and
    what is added, too. In the example the doubt before is .639 + .007, that after .365 + .031, and
    I is .25.
    """
    h = torch.special.entr(x) + torch.special.entr(1 - x)
    curvature = 1 / (x * (1 - x)).clamp(min=1e-9)       # -h''; at x = 0 or 1 the variance is 0
    return h + variance * curvature / 2


def inspect_problems(run, step, name, problems, batch):
    """Show a problem on the page; at both ends of the run, measure credit in a few -> metrics"""
    cfg = run.cfg
    k = cfg.eval_samples
    if not run.page:
        run.page = new_page(name, batch, k, max(1, cfg.credit_problems))
    rows = [(batch.number == number).nonzero()[:, 0] for number in run.page["problems"]]
    few = batch.rows(torch.cat(rows))                   # the problem that is shown comes first
    few.advantage = torch.zeros(len(few.ids))           # of a single response, which has no group
    if k > 1:
        few.advantage = group_advantages(few.reward, k)

    metrics = {}
    if cfg.credit_problems > 0 and cfg.eval_temperature > 0 and step in (0, cfg.steps):
        true_credit(run, few, problems, budget=100 * cfg.credit_problems)
        if run.stopped:
            return {}
        metrics = credit_by_kind(run, name, few) | credit_by_rule(run, few)
    number = run.page["problems"][0]
    show_responses(run, step, problems[number], few.rows(slice(0, k)))
    return metrics


def by_doubt(batch, k):
    """The numbers of the problems, beginning with that whose solve rate is nearest to one half."""
    share = batch.right.reshape(-1, k).float().mean(dim=1)                      # (problems,)
    return (share - 0.5).abs().argsort(stable=True).tolist()


def credit_by_kind(run, name, batch):
    """Print how much of the entropy and of the information each kind of token holds -> metrics

    credit/KIND/tokens: its share of the tokens; H, I: its nats per response (printed as shares);
    I/H: their ratio, which in theory is at most 1.
    """
    batch = batch.rows(batch.I[:, 0].isfinite())        # the responses that were measured
    n = len(batch.ids)
    if n == 0:
        run.world.print("No response could be measured: raise --credit-problems.")
        return {}
    kinds_of = KINDS.get(name, lambda tokens: ["all"] * len(tokens))
    kinds = []                                          # one for each of their tokens
    for i in range(n):
        kinds += kinds_of([run.tokenizer.decode([token]) for token in batch.response(i)])
    H = batch.H[batch.mask] / n                                                 # (tokens,)
    I = batch.I[batch.mask] / n                                                 # (tokens,)

    run.world.print(
        f"In {n} responses, to problems whose solve rate was nearest to one half at first,\n"
        f"H adds up to {H.sum():.3f} nats per response and I, how much is decided, to "
        f"{I.sum():.3f}.\n(I is estimated: that of one token is off by about .1 where much is "
        "decided,\nelse by .02.) Shares of tokens, H and I, and I / H:\n"
        "  kind        tokens    of H    of I     I/H")
    metrics = {}
    for kind in dict.fromkeys([*kinds, "all"]):
        here = torch.tensor([kind in (this, "all") for this in kinds])          # (tokens,)
        share = here.float().mean()
        H_here = H[here].sum()
        I_here = I[here].sum()
        ratio = I_here / H_here.clamp(min=1e-9)
        of_H = H_here / H.sum().clamp(min=1e-9)
        of_I = I_here / I.sum().clamp(min=1e-9)
        shares = f"{share:8.1%}{of_H:8.1%}{of_I:8.1%}"
        run.world.print(f"  {kind:10}{shares}{ratio:8.3f}")
        metrics |= {f"credit/{kind}/tokens": share, f"credit/{kind}/H": H_here,
                    f"credit/{kind}/I": I_here, f"credit/{kind}/I/H": ratio}
    return metrics


def credit_by_rule(run, batch):
    """Print how well the credit of each rule agrees with the true advantage -> metrics

    It is the credit that a rule would give to this evaluation, with its temperature and with groups
    of its --eval-samples responses.
    """
    # Rules differ, and can be compared, where the responses of a group earn different rewards.
    mixed = batch.mask & (batch.advantage != 0)[:, None] & batch.I.isfinite()   # (N, T)
    if not mixed.any():
        return {}
    cfg = replace(run.cfg, group_size=run.cfg.eval_samples, without="", quadrants="")
    credits = {}
    for method in CREDIT_RULES:
        cfg.method = method
        credits[method] = assign_credit(batch, cfg)
    strong = replace(cfg, alpha=1.9, phi=2.0)           # nearly as much as (7) allows
    credits["eapo alpha 1.9"] = eapo_credit(batch, strong)

    metrics = {}
    run.world.print("  cosine of the credit of a rule with the true advantage, which is what a\n"
                    "  token did to the chance of a right answer (1: in proportion to it)")
    for method, credit in credits.items():
        cosine = F.cosine_similarity(credit[mixed], batch.true_advantage[mixed], dim=0)
        run.world.print(f"  {method:16}{cosine:8.2f}")
        metrics[f"credit/cosine/{method}"] = cosine
    return metrics


# --------------------------------------------------------------------------------------------------
# Appendix A. The verifier: does the last \boxed{} of a response hold the gold answer? One value has
# many spellings, like 1/2, 0.5 or \frac{2}{4}, so this is a calculator. It takes four steps.
# --------------------------------------------------------------------------------------------------
#
#     scan            characters to tokens    y = 2\dfrac12  ->  y = 2 \frac 12
#     split_name      no name in front        2 \frac 12
#     read_answer     tokens to values        2 + 1/2, by an operator-precedence (Pratt) parser
#     values_agree    values to a verdict     5/2 is 2.5: exact, unless a root, \pi or the like, or
#                                             a rounded decimal is involved
#
# A token is a string. That of a word begins with a quote: "apples
# A value is one of two things:
#
#     a number      a Python list, of what it is at three points: 1/2 is [1/2, 1/2, 1/2], and x is
#                   three different fractions
#     a Structure   all else: the answer 1,2, a set, an interval, an equation, a word. Its parts are
#                   values again
#
# It needs no algebra. To see that (x+1)^2 is x^2+2x+1, compute both at a few x. Two different
# polynomials of degree d agree at no more than d values of x. If x is drawn from 332 numbers, they
# agree by chance with probability at most d/332, and at three points with at most (d/332)^3
# (Schwartz and Zippel). The points are fractions, so that nothing is rounded; positive, so that
# \sqrt{x^2} is x; and computed from the name of the variable.
#
# What the conventions are, by example:
#
#     gold        right                                   wrong
#     4           2+2, 4.0, 4\text{ cm}, 4\text{ apples}  4 apples and 4abc (products), 4+0x
#     x = 3       3                                       y = 3, 2x = 6 (it may repeat the problem)
#     y = 2x      2x, 2y = 4x                             f(x) = 2x
#     1,2         2,1 and \{1,2\} and (1,2)               1,1,2 and (2,1)
#     (1,2)       1,2                                     (2,1), [1,2]
#     1,234       1234, 234,1 (it may be a list)          123
#     50\%        50, 1/2                                 5
#     60^\circ    60                                      \pi/3
#     204_5       204                                     54
#     16.67       50/3 (the gold may be rounded)          16.6
#     50/3        16.666667 (ours only by 2e-6)           16.67
#     |x| or 3!   the same tokens, as it cannot be read   x, 6
#
# Spaces, dollars, sizes, fonts and a full stop at the end do not matter, and \log is \ln.

LONGEST_ANSWER = 500    # characters: work is bounded before it is done, so no time-out is needed
MOST_TOKENS = 120       # of an answer; longer ones only equal the same tokens
MOST_BITS = 10_000      # of an exact number: 9^{9^9} is refused before it is computed
POINTS = 3              # at which answers are compared

# Other spellings. CHARACTERS are replaced in the text; ` stands for a thousands separator.
# SPELLINGS, between bars, are of one token; the first one is kept. IGNORED change no value.
CHARACTERS = {r"\displaystyle": "", "{,}": "`", r",\! ": "`", r",\!": "`", "{pmatrix}": "",
              "{bmatrix}": "", "<=": "≤", ">=": "≥", "!=": "≠"}
SPELLINGS = r"""\frac \dfrac \tfrac \cfrac | \sqrt √ sqrt | \pi π pi | \infty ∞ | \log \ln ln log
    | - − – — ‒ | / \div ÷ | * \cdot \times × · ⋅ ∙ | = \in \approx ≈ | ≠ \ne \neq | < \lt | > \gt
    | ≤ \le \leq \leqslant | ≥ \ge \geq \geqslant | , ` ; and or OR \cup ∪ | } \}
    | ° \circ degree degrees | % \% percent percentage pct | \text \mbox \textbf \textit \textrm
    \textnormal \mathrm | \emptyset \varnothing ∅ | yes YES | no NO | true TRUE | false FALSE
    """.split("|")
SPELLED = {other: row.split()[0] for row in SPELLINGS for other in row.split()}
IGNORED = ("", *r"""\left \right \big \Big \bigl \bigr \Bigl \Bigr \bf \mathbf \mathbb
    \quad \qquad \, \; \: \! \( \) \[ \] $ \$ ~ \angle \ """.split())

# \infty, \emptyset and the like count as variables: they equal only themselves.
VARIABLES = {*ascii_letters, *r"""\alpha \beta \gamma \delta \epsilon \theta \lambda \mu \rho \sigma
    \tau \phi \varphi \omega \Delta \Omega \infty \emptyset \triangle""".split()}
UNITS = set("""cm mm km kg ft mph square cubic units inch inches foot feet yards miles meters pounds
               dollars cents hours minutes seconds days years""".split())
TEXT_UNITS = set("mghsLNJWVACFK")   # units only within \text{}
NO_UNITS = set("""half dozen hundred thousand million billion trillion tenth hundredth thousandth
                  squared cubed factorial am pm AM PM""".split())

CONSTANTS = {r"\pi": math.pi, "e": math.e, "i": 1j, "°": Fraction(1)}      # 60^\circ is 60^1
FUNCTIONS = {"\\" + name: getattr(cmath, name.replace("arc", "a"))      # \arcsin is cmath.asin
             for name in "sin cos tan log exp arcsin arccos arctan".split()}
FUNCTIONS |= {r"\sec": lambda z: 1 / cmath.cos(z), r"\csc": lambda z: 1 / cmath.sin(z),
              r"\cot": lambda z: 1 / cmath.tan(z)}
ARITHMETIC = {"+": add, "-": sub, "*": mul, "/": truediv}
BRACKETS = {"(": ")]", "[": ")]", "{": "}", r"\{": "}", r"\begin": [r"\end"]}  # what closes them
DIGITS = digits + "."   # what a number starts with
END = "end"             # of the answer
UNREADABLE = (ArithmeticError, ValueError, TypeError, RecursionError)

# How tightly symbols bind: STRENGTH is the number of their level. The argument of a function goes
# on over factors, and ends before + - * / and before another function: \sin 2x y is \sin(2xy), and
# \sin x \cos y a product.
LEVELS = [
    r"end % ) ] } \end",            # 0: these close an expression
    r"\\",                          # 1: rows of a matrix
    "&",                            # 2: its cells
    ",",                            # 3: parts of a list, a set, a point
    "= ≠ < ≤ > ≥",                  # 4
    ":",                            # 5
    "+ -",                          # 6: sums
    "* /",                          # 7: products. An unlisted symbol is a factor, x in 2x, at 8
]
STRENGTH = {symbol: n for n, symbols in enumerate(LEVELS) for symbol in symbols.split()}
SUM = STRENGTH["+"]
JOINS = {symbol for symbol, n in STRENGTH.items() if 0 < n <= SUM}      # + - : = , and so on
STRENGTH.update(dict.fromkeys(FUNCTIONS, STRENGTH["*"]))


def is_correct(response, gold):
    """Whether the last box of a response holds the gold answer, or one of a list of them."""
    answer = extract_answer(response)
    if answer is None:
        return False
    golds = gold if isinstance(gold, (list, tuple)) else [gold]
    for text in map(str, golds):
        if same_answer(answer, extract_answer(text) or text):
            return True
    return False


def extract_answer(text):
    r"""The content of the last \boxed{...}, \fbox{...} or \boxed 5, or None. If the end of the text
    cuts the last box off, the one before it counts; if it is too long for an answer, none does."""
    pieces = text.replace(r"\fbox", r"\boxed").rsplit(r"\boxed", 20)
    for piece in reversed(pieces[1:]):
        piece = piece.lstrip()[:LONGEST_ANSWER + 2]
        if piece.startswith("{"):
            content, rest = split_argument(piece)
            if rest is not None:
                return content
            if len(piece) > LONGEST_ANSWER:
                return None
        elif piece.startswith(tuple("-" + digits)):
            return piece.split("\n")[0].split("$")[0]
    return None


def same_answer(prediction, gold):
    """Whether two answers in LaTeX are equal in some reading: 1,234 is a list or a number."""
    if max(len(prediction), len(gold)) > LONGEST_ANSWER:
        return False
    readings = [False, True] if "," in prediction + gold else [False]
    for thousands in readings:
        if same_meaning(scan(prediction, thousands), scan(gold, thousands)):
            return True
    return False


def same_meaning(ours, gold):
    """Whether two answers, as tokens, are the same, or can be read and have the same value."""
    pair = without_names(ours, gold)
    if pair is None:
        return False
    ours, gold = pair
    # The base may be left out: 204 for 204_5.
    without_base = [t.partition("_")[0] if t[0] in DIGITS else t for t in gold]
    if ours in (gold, without_base):
        return ours != []
    try:
        # The gold may be rounded, by up to 0.11%, as its author chose to. Ours only by 2e-6, or it
        # might hide that the exact value was not found.
        slack = max(rounding_error(ours, 2e-6), rounding_error(gold, 1.1e-3))
        percents = [1, 100] if "%" in ours + gold else [1]              # 50% is 50 or 50/100
        for percent in percents:
            if values_agree(read_answer(ours, percent), read_answer(gold, percent), slack):
                return True
    except UNREADABLE:
        pass
    return False


def without_names(ours, gold):
    """What is to be compared of two answers; None if the names in front of them differ.

        gold      ours      compared
        x = 3     5         3 with 5
        y = 2x    2y = 4x   both whole
        x = 3     2x = 6    3 with 2x = 6: wrong, as it may just repeat the problem
    """
    our_name, our_value = split_name(ours)
    gold_name, gold_value = split_name(gold)
    if our_name and gold_name and our_name != gold_name:
        return None
    gold_is_equation = "=" in gold_value                # as split_name has left it: 2x+y = 6
    ours_is_equation = "=" in our_value
    gold_is_formula = any(map(is_variable, gold_value))         # y = 2x
    if gold_is_equation or (gold_is_formula and ours_is_equation):
        return ours, gold
    return our_value, gold_value


def answer_in_words(text):
    """How the verifier reads an answer, for the check before training; None if it cannot."""
    _, tokens = split_name(scan(extract_answer(text) or text, thousands=False))
    if tokens and all(token.startswith('"') for token in tokens):
        return "words"
    try:
        value = read_answer(tokens, 100)
        if isinstance(value, Structure):
            return f"{value.kind} of {len(value.parts)} parts"
        return f"the number {value[0]}" if is_constant(value) else "a formula"
    except UNREADABLE:
        return None


def split_name(tokens):
    """The name in front of an answer, as in x_1 = 5, and the tokens without it. Equations, such as
    2x = 6 or x = 5x, have none."""
    if "=" not in tokens:
        return [], tokens
    name = tokens[:tokens.index("=")]
    value = leave_out([*name, "="], tokens)             # in x = 1 or x = 2 it comes twice
    if not is_name(name):                               # 2x = 6
        return [], tokens
    if value == [] or "=" in value:                     # x = y = 3
        return [], tokens
    if name and is_variable(name[0]) and name[0] in value:      # x = 5x
        return [], tokens
    return name, value


def leave_out(part, tokens):
    """The tokens without every occurrence of a part."""
    kept = []
    while tokens:
        if tokens[:len(part)] == part:
            tokens = tokens[len(part):]
        else:
            kept.append(tokens[0])
            tokens = tokens[1:]
    return kept


def is_name(tokens):
    r"""Whether these tokens can be a name in front of =. Yes: x_1, \theta, AB, "area, f(x), f(2),
    (x,y), and nothing at all. No: 2x, xy, x+1, f(x+1), (2,3)."""
    if "(" not in tokens:
        return is_symbol(tokens)
    start = tokens.index("(")
    symbol = tokens[:start]
    arguments = tokens[start + 1:-1]
    for token in arguments:
        is_number = token[0] in DIGITS and symbol != []
        if not (is_number or token == "," or token.startswith('"') or is_variable(token)):
            return False
    return tokens[-1] == ")" and is_symbol(symbol)


def is_symbol(tokens):
    """Whether these tokens are a name without arguments: none, one variable, capitals (AB), or a
    word, perhaps with capitals ("area AB)."""
    if tokens == [] or (len(tokens) == 1 and is_variable(tokens[0])):
        return True
    text = "".join(tokens)
    return text.replace('"', "").isalpha() and (text.isupper() or text.startswith('"'))


def rounding_error(tokens, most):
    """How far off an answer may be, relatively, because it holds a rounded decimal.

    16.67 stands for all from 16.665 to 16.675: half a unit in 1667, 0.0003, but never more than
    `most`. Only an answer with a single decimal, of three or more significant digits, counts as
    rounded (so not 0.5, nor 142.0, which some data sets write for 142). For all others, and for
    sums, lists and relations, it is 0.
    """
    # A + or - after ( { or ^ is taken for a sign, which makes no sum.
    for before, token in zip(tokens, tokens[1:]):
        if token in JOINS and before not in ("(", "{", "^"):
            return 0
    decimals = [token.partition("e")[0] for token in tokens if token[0] in DIGITS and "." in token]
    if len(decimals) != 1 or decimals[0].endswith(".0"):
        return 0
    units = int("0" + decimals[0].replace(".", ""))
    if units < 100:
        return 0
    return min(0.5 / units, most)


def scan(text, thousands, is_prose=False):
    r"""The tokens of LaTeX: \frac, 12, x_1, +. Here xy is x times y; but in prose, like \text{} or
    no solution, a run of letters is a word. The token of a word begins with a quote.

    thousands: whether a comma may separate thousands, as in 1,234; else it separates a list.
    """
    for other, spelling in CHARACTERS.items():
        text = text.replace(other, spelling)
    text = text.strip("$ \n").removesuffix(".")
    is_prose = is_prose or looks_like_prose(text)
    # Points, intervals and sets hold no commas for thousands.
    if thousands and not any(bracket in text for bracket in ("(", "[", r"\{")):
        text = text.replace(",", "`")
    letters = ascii_letters + "/" if is_prose else ascii_letters        # km/h
    tokens = []
    while text:
        piece = next_piece(text, letters)               # as it is written: \dfrac
        token = SPELLED.get(piece, piece)               # as we spell it: \frac
        rest = text[len(piece):]
        # The order matters: what the first five leave is letters alone.
        if piece in DIGITS:                             # 12, .5, 1`234.5
            number, rest = split_number(text)
            new = [number]
        elif token == r"\text":                         # \text{ cm}
            content, rest = split_argument(rest)
            new = scan(content, thousands, is_prose=True)
        elif continues_token(token, tokens):            # x_1, or "cm^2
            index, rest = split_argument(rest)
            tokens[-1] += token + "".join(index.split())
            new = []
        elif token.strip() in IGNORED:                  # \left
            new = []
        elif token[0] not in ascii_letters:             # +, \frac, °
            new = [token]
        elif is_unit(piece) or (is_prose and is_word(piece)):
            new = ['"' + (token if token.isupper() else token.lower())]
        else:                                           # xy is x times y
            new = list(piece)
        tokens += new
        text = rest
    return tokens


def continues_token(token, tokens):
    """Whether _ or ^ continues the last of these tokens: an index does, and the power of a word."""
    if tokens == []:
        return False
    return token == "_" or (token == "^" and tokens[-1].startswith('"'))


def looks_like_prose(text):
    """Whether a text is words, and no product: letters alone, with a word of three or more, or all
    of them capitals. So no solution and YES are words, but xy is not."""
    if not set(text) <= set(ascii_letters + " ,.'-"):
        return False
    words = text.replace(",", " ").replace("-", " ").split()
    longest = max(map(len, words), default=0)
    return longest > 2 or text.isupper() or text.lower() == "no"


def is_unit(word):
    """Whether a word is a unit, in the singular or the plural, that needs no \\text{}."""
    return word in UNITS or word + "s" in UNITS


def is_word(piece):
    """Whether letters in prose are a word: two or more of them, or one that is a unit (m, g)."""
    return len(piece) > 1 or piece in TEXT_UNITS


def next_piece(text, letters):
    r"""What a text begins with: a run of letters, a command like \frac or \{, or one character."""
    piece = run_in_front(text, letters) or text[0]
    if piece == "\\":
        piece += run_in_front(text[1:], ascii_letters) or text[1:2]
    return piece


def run_in_front(text, characters):
    """The longest run of such characters at the start of a text."""
    return text[:len(text) - len(text.lstrip(characters))]


def split_number(text):
    """The number at the start of a text, as in 12, .5, 1`234.5, 4.4e7 or 1e-05, and the rest."""
    number = run_in_front(text, DIGITS + "`").rstrip("`")
    rest = text[len(number):]
    whole, point, decimals = number.partition(".")
    if is_in_thousands(whole):
        number = whole.replace("`", "") + point + decimals
    exponent = exponent_in_front(rest, has_point=point != "")
    return number + exponent, rest[len(exponent):]


def is_in_thousands(whole):
    """1`234 is; 2004`100, 27`54`108 and 0`123 are not."""
    first, *groups = whole.split("`")
    if groups == [] or len(first) > 3 or first[0] == "0":
        return False
    return all(len(group) == 3 for group in groups)


def exponent_in_front(rest, has_point):
    """The e5 of 3e5, or "". 3e-5 is e times 3, minus 5; 3.0e-5, 3e-05 and 3e-12 are numbers."""
    sign = rest[1:2] if rest[1:2] in ("+", "-") else ""
    power = run_in_front(rest[1 + len(sign):], digits)
    is_float = has_point or sign == "" or len(power) > 1
    if rest.startswith("e") and is_float and 0 < len(power) < 4:
        return "e" + sign + power
    return ""


def split_argument(text):
    """What the command before a text applies to, a {group} or a character, and the rest, which is
    None if the group is not closed."""
    text = text.lstrip(" ")
    depth = 0
    plain = text.replace(r"\\", "..").replace(r"\{", "..").replace(r"\}", "..")
    for i, character in enumerate(plain):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth <= 0:
            argument = text[1:i] if character == "}" else character
            return argument, text[i + 1:]
    return text[1:], None


def is_variable(token):
    """Whether it is the name of a variable, perhaps with a subscript."""
    return token.partition("_")[0] in VARIABLES and token not in CONSTANTS


class Structure(NamedTuple):
    r"""A list "," a set "\{}" a point "()" an interval "[)" a ratio ":" rows "\\" or cells "&" of a
    matrix, a relation "=" or a word. Other values are numbers: lists, of a value at each point."""
    kind: str
    parts: list


def read_answer(tokens, percent):
    """The value of an answer, perhaps with units, or with %, which divides it by `percent`."""
    if len(tokens) > MOST_TOKENS:
        raise ValueError("too many tokens")
    # The parser takes tokens from a stack: the next one is the last.
    stack = [END, *reversed(tokens)]
    floor = 0                                           # read all
    if "%" in tokens:
        floor = SUM     # read one product: 2 + 3% is not (2 + 3)%, and what is left over is refused
    value = read_expression(stack, floor)
    if stack[-1] == "%":
        stack.pop()
        value = compute_number(truediv, value, [percent] * POINTS)
    while stack[-1].startswith('"'):
        word = stack.pop()[1:].partition("^")[0]
        # 5\text{ apples} is 5, 5\text{ million} is not; only known units may follow a formula.
        may_change = word.removesuffix("s") in NO_UNITS or not is_constant(value)
        if may_change and not is_unit(word):
            raise ValueError("words that may change the value")
    if stack != [END]:
        raise ValueError("there is more than one expression")
    return value


def read_expression(stack, floor=0):
    """The value of operands and operators up to one that binds no tighter than `floor`.

    In 2+3*4+5 it is called with floor 0, and reads 2. As + has strength 6, it calls itself with
    floor 6 for what follows. That reads 3, goes on with 4, as * has strength 7, and returns 12 at
    the next +. The first adds 2 and 12, does the same for 5, and returns at the end, of strength 0.
    """
    value = read_power(stack)
    while True:
        token = stack[-1]
        strength = STRENGTH.get(token, len(LEVELS))
        if strength <= floor:
            return value
        if token[0] in DIGITS + '"':                    # 2 3 is no product, nor is 2 cm
            return value
        if strength < SUM:
            value = read_parts(stack, value)
        elif strength == SUM:
            stack.pop()
            value = compute_number(ARITHMETIC[token], value, read_expression(stack, strength))
        else:
            # After / or a factor comes a single power: 1/2x is (1/2)x.
            if token in ARITHMETIC:
                stack.pop()
            value = compute_number(ARITHMETIC.get(token, mul), value, read_power(stack))


def read_power(stack):
    """The value of an operand with its exponent, or of a mixed number."""
    token = stack[-1]
    value = read_operand(stack)
    if token.isdecimal() and stack[-1] == r"\frac":
        part = read_power(stack)
        # 1\frac45 is a sum, 2\frac{x}5 a product.
        is_mixed = is_constant(part) and type(part[0]) is Fraction and 0 < part[0] < 1
        return compute_number(add if is_mixed else mul, value, part)
    # 2^3^2 is refused, as TeX refuses it.
    if stack[-1] == "^":
        stack.pop()
        value = compute_number(pow, value, read_operand(stack))
    return value


def read_operand(stack, is_argument=False):
    """The value of a number, a variable, a bracket or a function, perhaps with a sign."""
    token = stack.pop()
    # As in TeX, an argument without braces is one digit: \frac12 is 1/2.
    if is_argument and token.isdecimal() and len(token) > 1:
        stack.append(token[1:])
        token = token[0]
    letter = token.strip('"')                           # \text{(C)} is C
    is_call = letter in ("f", "g") and stack[-1] == "("     # f(2x) is not f times 2x
    if is_variable(letter) and not is_call:
        return variable_number(letter)
    if token.startswith('"'):
        return Structure(token, [])
    if token[0] in DIGITS:
        # 204_5 is not computed: like a name, it only equals itself.
        return variable_number(token) if "_" in token else [Fraction(token)] * POINTS
    if token in CONSTANTS:
        return [CONSTANTS[token]] * POINTS
    if token in ("+", "-"):
        # -2^2 is -(2^2).
        return compute_number(ARITHMETIC[token], [0] * POINTS, read_power(stack))
    if token in BRACKETS:
        value = read_expression(stack)
        closer = stack.pop()
        if closer not in BRACKETS[token]:
            raise ValueError(f"{token} is closed by {closer}")
        is_list = token != "{" and isinstance(value, Structure) and value.kind == ","
        return Structure(token + closer, value.parts) if is_list else value
    if token in FUNCTIONS:
        return compute_number(FUNCTIONS[token], read_argument(stack))
    if token == r"\frac":
        numerator = read_operand(stack, is_argument=True)
        denominator = read_operand(stack, is_argument=True)
        return compute_number(truediv, numerator, denominator)
    if token == r"\sqrt":
        degree = read_operand(stack) if stack[-1] == "[" else [2] * POINTS
        radicand = read_operand(stack, is_argument=True)
        return compute_number(pow, radicand, compute_number(truediv, [1] * POINTS, degree))
    raise ValueError(f"cannot read {token}")


def read_argument(stack):
    r"""The argument of a function: of \sin(x) y the bracket, of \sin 2x + y all up to the sum."""
    if stack[-1] in BRACKETS:
        return read_operand(stack)
    return read_expression(stack, STRENGTH["*"])


def read_parts(stack, first):
    """A list, a relation and so on: the parts between equal separators."""
    separator = stack[-1]
    parts = [first]
    while stack[-1] == separator:
        while stack[-1] == separator:       # ", and" is two commas
            stack.pop()
        parts.append(read_expression(stack, STRENGTH[separator]))
    if separator == "=" and [type(part) for part in parts] == [list, list]:
        parts = [equation(*parts)]
    return Structure(separator, parts)


def equation(left, right):
    """An equation of two numbers as one, which is the same for 2x+4y = 6 and x+2y = 3."""
    # Let d be left - right. Multiplying the equation by 2 doubles d at every point, and so
    # d[0] - d[1]: their ratio is the same for all multiples of an equation. Without variables
    # d[0] - d[1] is 0, and the division refuses 2 = 3.
    difference = compute_number(sub, left, right)
    change = difference[0] - difference[1]
    return [value / change for value in difference]


def variable_number(name):
    """Pseudo-random numbers between 1 and 2, always the same for the same name."""
    number = []
    for point in range(POINTS):
        # From another third of 1 to 996 at each point, so that they differ.
        k = 332 * point + 1 + crc32(f"{name}{point}".encode()) % 332
        number.append(1 + Fraction(k, 997))
    return number


def is_constant(number):
    """Whether a number is the same at all points, as it is without a variable."""
    return number == [number[0]] * POINTS


def compute_number(operation, *numbers):
    """The operation at each point. Refused are sets and the like, results that may have too many
    digits, and constants in which a variable has cancelled."""
    if not all(isinstance(number, list) for number in numbers):
        raise ValueError("a calculation with a set, a point or a word")
    bits = max(bit_length(value) for number in numbers for value in number)
    if operation is pow:
        base, exponent = numbers
        bits = max(map(bit_length, base)) * max(map(abs, exponent))
    if bits > MOST_BITS:
        raise ValueError("too many digits")
    results = list(map(operation, *numbers))
    if is_constant(results) and not all(map(is_constant, numbers)):
        raise ValueError("a variable cancels: 0x in 5+0x, which is not 5")
    return results


def bit_length(value):
    """A rough size of an exact number; denominators count more, as sums multiply them."""
    if type(value) is Fraction:
        return value.numerator.bit_length() + 4 * (value.denominator.bit_length() - 1)
    return 1


def values_agree(ours, gold, slack):
    """Whether two values are equal: lists and sets in any order, all else part by part."""
    if type(ours) is not type(gold):
        return False
    if isinstance(ours, list):
        return all(numbers_close(a, b, slack) for a, b in zip(ours, gold))
    if len(ours.parts) != len(gold.parts):
        return False
    kinds = {ours.kind, gold.kind}
    if kinds <= {",", r"\{}"}:
        # Each part needs a partner of its own: 1,1 is not 1,2.
        rest = list(gold.parts)
        for part in ours.parts:
            partner = next((other for other in rest if values_agree(part, other, slack)), None)
            if partner is None:
                return False
            rest.remove(partner)
        return True
    # (1,2) may be written 1,2.
    is_same_kind = len(kinds) == 1 or kinds == {",", "()"}
    return is_same_kind and all(values_agree(*pair, slack) for pair in zip(ours.parts, gold.parts))


def numbers_close(ours, gold, slack):
    """Whether two numbers are equal up to a relative error."""
    error = abs(ours - gold)
    if type(ours) is type(gold) is Fraction:
        return error <= slack * abs(gold)
    # A float near 0, such as sin(pi), is mostly rounding error. By < nothing matches a gold of 0.
    return error < max(slack, 1e-11) * abs(gold)


# --------------------------------------------------------------------------------------------------
# Appendix B. Data: problems from files and from data sets, in the usual layouts.
# --------------------------------------------------------------------------------------------------

COLUMNS = {         # what a column may be called, in any case; the first one that is there counts
    "problem": ("problem", "question", "prompt", "messages"),
    "answer": ("answer", "final_answer", "expected_answer", "ground_truth", "solution"),
    "solution": ("solution", "response", "completion"),
}


def problems_from_rows(source, rows, wanted):
    """Rows of a table -> [Problem] with the problem and `wanted`: its answer or its solution."""
    require(rows, f"{source}: no rows")
    rows = [plain_row(row, f"{source}, row {n}") for n, row in enumerate(rows, 1)]
    columns = {}
    for role in ("problem", wanted):
        names = [name for name in COLUMNS[role] if name in rows[0]]
        require(names, f"{source} has no {role} among its columns "
                f"{', '.join(map(repr, rows[0]))}: rename one to '{role}'")
        columns[role] = names[0]

    problems = []
    for n, row in enumerate(rows, 1):
        where = f"{source}, row {n}"
        messages = conversation(row.get(columns["problem"]), where)
        problem = Problem(messages[-1]["content"], messages=messages)
        value = row.get(columns[wanted])
        if wanted == "solution":
            require(isinstance(value, str) and value, f"{where}: the solution must be text")
            problem.solution = value
        else:
            problem.answer = gold_answer(value, where)
            text = str(problem.answer)
            # In a column `solution`, a few words are a bare answer. More must have it in a box.
            has_answer = len(text.split()) <= 5 or extract_answer(text) is not None
            if columns[wanted] == "solution" and not has_answer:
                continue
        problems.append(problem)
    require(problems, f"{source}: no solution holds an answer in \\boxed{{}}")
    return problems


def plain_row(row, where):
    """A row with the names of its columns in lower case, and those in verl's reward_model too."""
    require(isinstance(row, dict), f"{where}: not an object")
    require(None not in row, f"{where}: more values than columns. Put quotes around a value "
            "that holds a comma or a new line")
    row = {str(name).lower(): value for name, value in row.items()}
    if isinstance(row.get("reward_model"), dict):
        row |= row["reward_model"]                      # which holds the ground_truth
    return row


def conversation(prompt, where):
    """A prompt, which is text or chat messages -> messages, of which the last one is the user's."""
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    for message in messages:
        is_text = isinstance(message, dict) and isinstance(message.get("content"), str)
        require(is_text and message["content"].strip() and "role" in message,
                f"{where}: the problem must be text, or messages with role and content")
    require(messages and messages[-1]["role"] == "user",
            f"{where}: the problem must be text, or messages of which the last is the user's")
    return messages


def gold_answer(value, where):
    """The gold answer in a column: text, a number, or a list of alternatives; else an error."""
    golds = []
    for gold in value if isinstance(value, list) else [value]:
        if isinstance(gold, str) and extract_answer(gold) is None:
            gold = gold.rpartition("####")[2].strip()   # GSM8K writes the answer after these
        is_number = isinstance(gold, (int, float)) and abs(gold) < math.inf     # nor nan
        require(is_number or isinstance(gold, str) and gold,
                f"{where}: the answer {value!r:.60} is not text, a number or a list of these")
        golds.append(gold)
    require(golds, f"{where}: the answer is empty")
    return golds if isinstance(value, list) else golds[0]


def read_rows(source, split):
    """The rows of a file or of a data set, as dicts."""
    path = source.lower().removesuffix(".gz")
    if not path.endswith((".json", ".jsonl", ".csv")):
        return read_data_set(source, split)

    # Not by `datasets`, which would turn a gold such as 2024-01-01 into a time.
    opener = gzip.open if source.lower().endswith(".gz") else open
    with opener(source, "rt", encoding="utf-8-sig", newline="") as file:
        if path.endswith(".csv"):
            return list(csv.DictReader(file))
        text = file.read()
    if text.lstrip().startswith("["):                   # an array; else an object on each line
        return json.loads(text)
    rows = []
    for n, line in enumerate(text.split("\n"), 1):
        if line.strip():
            with one_line_errors(f"{source}, line {n}"):
                rows.append(json.loads(line))
    return rows


def read_data_set(source, split):
    """The rows of a data set of the hub, of a folder with its files, saved to disk, or in Parquet.

    source: its id or path; then, if need be, :CONFIGURATION and :SPLIT. Without a split: test or
    validation for evaluation, else train.
    """
    import datasets             # not above, as it takes a second and the built-in tasks need none
    datasets.disable_progress_bars()
    if source.lower().endswith(".parquet"):
        return list(datasets.load_dataset("parquet", data_files=source, split="train"))
    name, *parts = source.split(":")
    if os.path.exists(source):                          # the path itself has a colon, as C:\data
        name = source
        parts = []
    saved = [os.path.exists(f"{name}/{file}") for file in ("state.json", "dataset_dict.json")]
    if any(saved):
        splits = datasets.load_from_disk(name)
    else:
        config = None
        # ID:X names a configuration if there is one called X, else a split; ID:X:Y names both.
        if len(parts) > 1 or (parts and parts[0] in datasets.get_dataset_config_names(name)):
            config = parts.pop(0)
        splits = datasets.load_dataset(name, config)
    if isinstance(splits, datasets.Dataset):
        splits = {"train": splits}

    names = ["test", "validation"] if split == "eval" else ["train"]
    if parts:
        names = [":".join(parts)]
    there = [part for part in names if part in splits]
    require(there, f"{source} has no split {names[0]}: name one of {', '.join(splits)}, as in "
            f"{name}:{list(splits)[0]}")
    return list(splits[there[0]])


# --------------------------------------------------------------------------------------------------
# Appendix C. The machine: processes and GPUs, checkpoints, opening a run, errors in one line.
#
#                               policy's weights       products in   what samples   old_logp and H
# one process on a CPU; tiny    whole, fp32            fp32          the policy     from sampling
# 2 or more such processes      cut up, fp32 (FSDP2)   fp32          an fp32 copy   from sampling
# GPUs, one process each        cut up, fp32 (FSDP2)   bf16          a bf16 copy    by `rescore`
#
# FSDP2, fully sharded data parallelism: of every weight, gradient and moment each process keeps a
# part. Before a layer computes, the processes send each other their parts of it, and drop what they
# received afterwards. So all must run the model equally often. In the backward pass the gradients
# of all processes are averaged, and each keeps its part.
# --------------------------------------------------------------------------------------------------

class Bar(tqdm):
    """A progress bar that stops silently when its output is closed: see World.print."""

    def display(self, *args, **kwargs):
        try:
            super().display(*args, **kwargs)
        except OSError:
            self.disable = True


class World:
    """The processes of a run: a single one, one for each GPU, or as many as torchrun starts. A
    single one has nothing to communicate.

    `gather` and `whole`, and whatever calls them or runs the policy, must be called by every
    process, or the others wait in vain.
    """

    def __init__(self, cfg):
        # These two are imported here because that takes a second, which --help does without.
        import torch.distributed.checkpoint.state_dict
        import torch.distributed.fsdp
        cuda = torch.cuda.is_available()
        self.rank = int(os.environ.get("RANK", 0))      # torchrun sets such variables
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device("cpu")
        if cuda:
            self.device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
            torch.cuda.set_device(self.device)
        self.bf16 = cuda and cfg.model != "tiny"
        self.sharded = self.size > 1 or self.bf16       # the policy's weights are cut up
        self.microbatch_tokens = cfg.microbatch_tokens or (16384 if cuda else 2048)
        self.signalled = 0                              # time of the first signal; 0: none yet
        self.phase = "other"
        self.start_clock()
        if self.sharded and not dist.is_initialized():
            options = {}
            if self.size == 1:                          # FSDP needs a group even for one GPU
                options = dict(store=dist.HashStore(), rank=0, world_size=1)
            backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
            dist.init_process_group(backend, timeout=timedelta(minutes=60), **options)

    def gather(self, x):
        """[x of process 0, x of process 1, ...] on every process."""
        parts = [x] * self.size
        if self.size > 1:
            dist.all_gather_object(parts, x)
        return parts

    def sum(self, x):
        """The sum of a number over all processes."""
        return sum(self.gather(float(x)))

    def whole(self, x):
        """A tensor put together from its parts on all processes."""
        return x.to(self.device).full_tensor() if hasattr(x, "full_tensor") else x

    def start_clock(self):
        """A step begins."""
        self.clock = Counter()                          # {phase: seconds}
        self.phase_start = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def begin(self, phase):
        """From now on, time is charged to this phase: sample, score, update or other."""
        now = time.perf_counter()
        self.clock[self.phase] += now - self.phase_start
        self.phase = phase
        self.phase_start = now

    def free_memory(self):
        """Bytes this process may use: the free memory of its GPU, or its share of the machine."""
        if self.device.type != "cuda":
            return self.host_memory()
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + unused

    def host_memory(self):
        """This process's share of the machine's memory, in bytes."""
        if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
            return math.inf                             # Windows has no sysconf
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))      # of this machine
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / processes

    def print(self, text):
        """Print once, not once per process, and above the progress bar."""
        if self.rank == 0:
            try:
                tqdm.write(text)
            except OSError:     # the output is closed: in `.. | tee log` Ctrl-C ends tee too
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def bar(self, items, name, **options):
        """A progress bar over items, on the first process."""
        is_empty = items is not None and len(items) == 0
        hidden = self.rank > 0 or is_empty
        return Bar(items, desc=name, disable=hidden, dynamic_ncols=True, **options)

    def on_signal(self, number, _):
        """Ctrl-C and the like: finish an update that is under way, but no sampling; save (except in
        the warm-up); stop. A second Ctrl-C stops at once."""
        # torchrun passes a Ctrl-C on to processes that have already received it. So repeats are
        # ignored for a second.
        now = time.monotonic()
        if self.signalled and number == signal.SIGINT and now > self.signalled + 1:
            raise KeyboardInterrupt
        self.signalled = self.signalled or now
        if self.rank == 0:
            with contextlib.suppress(OSError):          # the terminal may be gone
                os.write(2, b"\neapo: stopping; Ctrl-C again stops at once, without saving\n")


# ---- The policy, cut over the processes, and the copy of it that samples. ------------------------

def shard(policy, world, offload):
    """Cut the policy over the processes, layer by layer (FSDP2), with fp32 weights. A single
    process in fp32 only moves it to its device.

    A layer's full weights exist, in bf16 on GPUs, only while it computes. Embedding and head belong
    to no layer: they stay whole from the forward to the backward pass. On GPUs the activations of a
    layer are not kept, but computed again.
    """
    if not world.sharded:
        return policy.to(world.device)
    compute_dtype = torch.bfloat16 if world.bf16 else None
    options = dict(mesh=dist.init_device_mesh(world.device.type, (world.size,)),
                   mp_policy=dist.fsdp.MixedPrecisionPolicy(param_dtype=compute_dtype,
                                                            reduce_dtype=torch.float32))
    if offload:
        options["offload_policy"] = dist.fsdp.CPUOffloadPolicy(pin_memory=False)
    lists = [x for x in policy.lm.modules() if isinstance(x, torch.nn.ModuleList)]
    layers = lists[0]                                   # those of the decoder
    for layer in layers:
        if world.device.type == "cuda":
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        dist.fsdp.fully_shard(layer.to(world.device).float(), **options)
    return dist.fsdp.fully_shard(policy.float(), **options)


@torch.no_grad()
def fill_sampler(run):
    """Put the policy's weights into the copy that samples, if there is one and it is empty -> the
    model that samples."""
    for copy, original in zip(run.sampler.parameters(), run.policy.lm.parameters()):
        if copy.numel() == 0:
            weight = run.world.whole(original)
            copy.data = weight.to(run.sampler.device, copy.dtype, copy=True)
    return run.sampler


def empty_sampler(run):
    """Free the copy's weights: the update needs the memory, and makes the copy out of date."""
    if run.sampler is not run.policy.lm:
        for weight in run.sampler.parameters():
            weight.data = weight.data.new_empty(0)


# ---- Files: the model and the checkpoints. -------------------------------------------------------

def replace_file(path, text):
    """Write a file beside its place and rename it, so that there is never half a file."""
    with open(path + ".new", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(path + ".new", path)


def save_model(run):
    """Write the policy and its tokenizer as an ordinary Hugging Face folder, out/model."""
    path = f"{run.out}/model"
    lm = run.policy.lm
    state_dict = dist.checkpoint.state_dict
    options = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = state_dict.get_model_state_dict(lm, options=options)
    if run.world.rank == 0:
        for name in lm.all_tied_weights_keys:           # a file holds tied weights once
            weights.pop(name, None)
        with one_line_errors(path):
            lm.save_pretrained(path + ".new", state_dict=weights)
            run.tokenizer.save_pretrained(path + ".new")
            shutil.rmtree(path, ignore_errors=True)     # from here on, path.new is complete
            os.replace(path + ".new", path)


def checkpoints(out):
    """The folders of a run's complete checkpoints, the latest last."""
    return sorted(glob.glob(f"{glob.escape(out)}/checkpoint/*[0-9]"))


def checkpoint_state(run):
    """What a checkpoint holds: each process has its part of weights and moments.

    There is no random state to keep: the random numbers of a response and the order of an epoch
    come from seeds and counts alone.
    """
    model, moments = dist.checkpoint.state_dict.get_state_dict(run.policy, run.optimizer)
    problems = [(problem.problem, str(problem.answer)) for problem in run.stream.problems]
    data = crc32(json.dumps(problems).encode())         # to notice other training data on resume
    return {"model": model, "optimizer": moments, "step": run.done, "position": run.stream.position,
            "data": data}


def save_checkpoint(run):
    """Write out/checkpoint/step-N, if it is not there, and keep the last two."""
    path = f"{run.out}/checkpoint/step-{run.done:06}"
    if run.world.gather(os.path.exists(path))[0]:
        return
    with one_line_errors(path):
        dist.checkpoint.save(checkpoint_state(run), checkpoint_id=path + ".new")
    if run.world.rank == 0:
        os.replace(path + ".new", path)
        for old in checkpoints(run.out)[:-2]:
            shutil.rmtree(old)
    run.world.gather(None)                              # all wait until it is there


def load_checkpoint(run):
    """Continue from the last checkpoint: weights, moments and data position, page and logs."""
    # `load` writes into a state that exists, which also tells it the parts that this process needs.
    state = checkpoint_state(run)
    data = state["data"]
    *earlier, path = checkpoints(run.out)
    hint = f", delete it to go on from {earlier[-1]}" if earlier else ""
    with one_line_errors(path + hint):
        dist.checkpoint.load(state, checkpoint_id=path)
    require(state["data"] == data, f"{run.cfg.train_data} is not the data that {run.out} was "
            "trained on: its problems differ")
    dist.checkpoint.state_dict.set_state_dict(
        run.policy, run.optimizer, model_state_dict=state["model"],
        optim_state_dict=state["optimizer"])
    run.stream.position = state["position"]
    run.done = state["step"]
    # AdamW has no moments before its first step, but `get_state_dict` wants some, and takes an
    # empty step to make them, which AdamW counts. So at step 0 begin with a new optimizer.
    if run.done == 0:
        run.optimizer = new_optimizer(run, run.cfg.learning_rate, beta2=0.999)

    if os.path.exists(f"{run.out}/.page.json"):         # absent if no evaluation was finished
        with open(f"{run.out}/.page.json", encoding="utf-8") as file:
            run.page = json.load(file)
        # Evaluations after the checkpoint will be done again.
        done = [section for section in run.page["sections"] if section[0] <= run.done]
        run.page["sections"] = done
    cut_logs(run)


def cut_logs(run):
    """Take out of the logs what comes after step run.done, as it will be done again."""
    run.history = read_log(f"{run.out}/metrics.jsonl", run.done)
    # Responses are kept up to the step of the checkpoint. But if its evaluation has no metrics,
    # which come last, it was cut short: then its responses go, too.
    last_step = run.done - 1 if run.lacks_evaluation() else run.done
    responses = read_log(f"{run.out}/responses.jsonl", last_step)
    run.world.gather(None)                              # all have read them
    if run.world.rank == 0:
        for name, rows in (("metrics.jsonl", run.history), ("responses.jsonl", responses)):
            lines = [json.dumps(row) + "\n" for row in rows]
            replace_file(f"{run.out}/{name}", "".join(lines))
        write_settings(run)


def read_log(path, last_step):
    """The rows of a log up to a step, without the half-written lines of a killed run."""
    rows = []
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and row.get("step", 0) <= last_step]


# ---- Opening and closing a run. ------------------------------------------------------------------

def open_run(cfg):
    """Processes, folder, model and problems of a Config -> a Run, ready for its first step."""
    world = World(cfg)
    out = folder_of(cfg, world)
    if cfg.model != "tiny":
        settings = [f"{flag_name(name)} {x}" for name, x in preset(cfg.model).items()]
        world.print(f"preset of {cfg.model}: {' '.join(settings) or 'none'}")
    lm, tokenizer, stop_ids = load_model(cfg, world)
    sampler = lm
    if world.sharded:           # the policy will be cut up: a whole copy samples
        with world.device:
            dtype = torch.bfloat16 if world.bf16 else torch.float32
            sampler = AutoModelForCausalLM.from_config(lm.config, dtype=dtype).eval()
    policy = shard(Policy(lm), world, cfg.offload)      # after which lm cannot be copied any more
    run = Run(cfg, world, out, policy, tokenizer, stop_ids, sampler)
    empty_sampler(run)

    if cfg.eval_every > 0:
        load_eval_sets(run)
    if cfg.eval_only:
        problems = sum(run.eval_sets.values(), [])
        require(problems, "--eval-only needs --eval-data")
    else:
        problems = load_problems(run, cfg.train_data, "train")
        run.stream = Stream(problems, cfg.seed)
        run.optimizer = new_optimizer(run, cfg.learning_rate, beta2=0.999)
    sanity_check(run, problems)
    if not cfg.resume:
        make_folder(run)
    lock_folder(run)
    if not cfg.eval_only:
        for number in signals():
            if signal.getsignal(number) != signal.SIG_IGN:      # as SIGHUP is under nohup
                signal.signal(number, world.on_signal)
    return run


def signals():
    """The signals that stop a run; only the main thread of a program may listen to them."""
    if threading.current_thread() is not threading.main_thread():
        return []
    names = ["SIGINT", "SIGTERM", "SIGHUP"]             # Windows lacks the last
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


def load_eval_sets(run):
    """Fill run.eval_sets, under short names: MATH-500 of HuggingFaceH4/MATH-500, x of x.jsonl."""
    for source in split_names(run.cfg.eval_data):
        name = os.path.basename(os.path.normpath(source)).replace(":", "-")
        if os.path.isfile(source):
            name = os.path.splitext(name)[0]
        require(name not in (*run.eval_sets, "train", "credit"),
                f"--eval-data has two sets {name}, or {name} is taken: rename the file")
        run.eval_sets[name] = load_problems(run, source, "eval")


def close_run(run):
    """Save the trained model, draw the page, and say what came of the run."""
    world = run.world
    if not run.cfg.eval_only:
        save_model(run)
    write_page(run)
    world.print("")
    rates = [row["solve_rate"] for row in run.history if "solve_rate" in row]
    if rates:
        first = f"{rates[0]:.0%}"
        last = f"{rates[-1]:.0%}"
        world.print(f"solve rate {first} {sparkline(rates)} {last} in training")
    for name in run.eval_sets if run.history else []:
        world.print(outcome(run, name))
    if run.page.get("sections"):
        world.print(f"Where does the credit go? Open {run.out}/report.html")
    if run.stopped and (run.done < run.cfg.steps or run.lacks_evaluation()):
        world.print(f"stopped; go on with: python eapo.py --resume {shlex.quote(run.out)}")
    elif not run.cfg.eval_only:
        again = replace(run.cfg, model=f"{run.out}/model", eval_samples=64)
        world.print(f"to evaluate it more precisely:\n  {command(again, EVAL_FLAGS)} --eval-only")
    if world.size > 1:
        dist.destroy_process_group()                    # its threads must not outlive the program


def folder_of(cfg, world):
    """The path of the folder of a run. A new run's folder must be empty or absent."""
    model = os.path.basename(os.path.normpath(cfg.model))
    now = time.strftime("%Y%m%d-%H%M%S")
    out = cfg.out or f"runs/{model}-{now}-{os.getpid()}"
    out = os.path.normpath(world.gather(out)[0])        # all processes take that of the first
    if cfg.resume:
        require(checkpoints(out), f"{out} holds no checkpoint, see --save-every: start a new run")
        return out
    is_empty = os.path.isdir(out) and not os.listdir(out)
    require(is_empty or not os.path.exists(out),
            f"--out {out} is not empty: choose another, or --resume it if it is a run")
    inside = os.path.realpath(out).startswith(os.path.realpath(cfg.model) + os.sep)
    require(not inside or not os.path.isdir(cfg.model),
            f"--out {out} lies in the folder of --model: choose another")
    return out


def make_folder(run):
    """Make the folder of a new run, now that its model and its data have been checked."""
    with one_line_errors(f"--out {run.out}"):
        os.makedirs(run.out, exist_ok=True)
        if run.world.rank == 0:
            open(f"{run.out}/responses.jsonl", "x").close()     # fails if another run was quicker
            write_settings(run)
    run.world.gather(None)
    require(os.path.exists(f"{run.out}/config.json"),
            f"--out {run.out} must be one folder that all machines share")


def lock_folder(run):
    """Refuse a folder in which another process is at work, as two would spoil each other's files.

    The file of the lock stays open. The operating system lifts the lock when the process ends,
    however it ends.
    """
    if run.world.rank > 0 or os.name == "nt":           # Windows has no such locks
        return
    import fcntl
    lock = os.open(f"{run.out}/.lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(f"eapo: another process is at work in {run.out}") from None
    except OSError:                                     # some network disks have none either
        os.close(lock)


def write_settings(run):
    """Write config.json: the settings of a run, and the versions that it runs with."""
    settings = asdict(run.cfg)
    settings["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__,
                            "python": platform.python_version()}
    replace_file(f"{run.out}/config.json", json.dumps(settings, indent=2))


def load_model(cfg, world):
    """The language model, its tokenizer, and the ids that end a response."""
    if cfg.model == "tiny":
        lm, tokenizer = tiny_model(cfg.seed)
    else:
        with one_line_errors(f"--model {cfg.model}"):
            # The weights stay mapped from their file until `shard` makes them fp32, layer by layer.
            dtype = "auto" if world.sharded else torch.float32
            check_memory(cfg, world)
            lm, loading = AutoModelForCausalLM.from_pretrained(
                cfg.model, dtype=dtype, trust_remote_code=False, output_loading_info=True)
            tokenizer = AutoTokenizer.from_pretrained(cfg.model, trust_remote_code=False)
        # transformers would fill missing weights at random.
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        require(not missing,
                f"{cfg.model} has no weights for {missing}: no language-model head, or not whole")
        tokens = len(lm.get_input_embeddings().weight)
        require(len(tokenizer) <= tokens, f"{cfg.model} embeds {tokens} tokens, and its tokenizer "
                f"has {len(tokenizer)}: one of them belongs to another model")
    lm.eval()                               # no dropout
    with one_line_errors(f"--model {cfg.model}, which is unsupported or damaged"):
        check_sampling(lm)
    configured = lm.generation_config.eos_token_id
    known = configured if isinstance(configured, list) else [configured]
    ends = dict.fromkeys([tokenizer.eos_token_id] + known)          # in order, each once
    stop_ids = [token for token in ends if token is not None]
    require(stop_ids, f"{cfg.model}: neither tokenizer nor generation config names a stop token")
    if set(stop_ids) != set(known):         # the trained model, once saved, should stop there too
        lm.generation_config.eos_token_id = stop_ids
        lm.generation_config.do_sample = True       # or transformers saves no temperature
    return lm, tokenizer, stop_ids


@torch.no_grad()
def check_sampling(lm):
    """Raise an error unless sampling, scoring and plain transformers agree on the log-probabilities
    of a few short responses.

    They do not if its attention does not take the masks of `generate`, if its cache is of another
    kind, or if its logits are not hidden states times a matrix (a bias, a soft cap, a scale).
    """
    V = len(lm.get_input_embeddings().weight)
    ids = [V * k // 12 for k in range(1, 12)]           # from all over the vocabulary
    if not lm(torch.tensor([ids])).logits.isfinite().all():
        raise ValueError("its logits are NaN, so its weights hold NaN")
    batch = generate(lm, [ids[:3], ids[3:]], group_size=2, limits=[5, 5], temperature=1.0,
                     top_p=1.0, stop_ids=[], seeds=[0, 1])
    scored, _ = Policy(lm)(batch, 1.0)                                          # (4, 5)
    plain = torch.zeros_like(scored)
    for i in range(4):
        start = int(batch.prompt_len[i])
        row = batch.ids[i, :start + 5]
        logits = lm(row[None]).logits[0, start - 1:-1]                          # (5, V)
        plain[i], _ = log_prob_and_entropy(logits, row[start:], 1.0)
    rounding = 1e-3 if lm.dtype == torch.float32 else 0.3
    for name, logp in (("sampled", batch.old_logp), ("scored", scored)):
        gap = float((logp - plain).abs().max())
        if not gap < rounding:
            raise ValueError(f"log-probabilities as {name} are {gap:.2g} nats off those of "
                             "transformers")


def check_memory(cfg, world):
    """Print what the model will take, and refuse what cannot fit, before it is loaded."""
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(cfg.model, trust_remote_code=False)
        lm = AutoModelForCausalLM.from_config(config)
    parameters = sum(p.numel() for p in lm.parameters())
    # Four bytes each for fp32 weights and, in training, gradients and AdamW's two moments.
    # Activations, KV cache and logits come on top.
    state = (4 if cfg.eval_only else 16) * parameters / world.size
    copy = (2 if world.bf16 else 4) * parameters * world.sharded
    free = world.free_memory()
    world.print(f"{cfg.model}: {parameters / 1e6:.1f}M parameters on {world.size} x "
                f"{world.device.type}. GB per process: {state / 1e9:.2f} for weights, gradients "
                f"and moments, {copy / 1e9:.2f} for the copy that samples; "
                f"{free / 1e9:.2f} may be used")
    # While it samples there are no gradients: in training, 12 of the 16 bytes.
    while_sampling = copy + (state if cfg.eval_only else 0.75 * state)
    fits = max(state, while_sampling) < free
    if cfg.offload:
        fits = state < world.host_memory() and copy < free
    require(fits, f"{cfg.model} does not fit: use more --gpus, --offload, or a smaller model")


# ---- What is checked before the first step and after it. -----------------------------------------

def sanity_check(run, problems):
    """Check the usual reasons why a run learns nothing; show the first prompt as the model sees it.
    """
    cfg = run.cfg
    world = run.world
    everything = sum(run.eval_sets.values(), problems)
    longest_prompt = max(len(problem.ids) for problem in everything)
    longest = longest_prompt + cfg.max_response_tokens
    limit = getattr(run.policy.lm.config, "max_position_embeddings", None) or longest
    require(longest <= limit, f"{cfg.model} accepts at most {limit} tokens, and the longest prompt "
            f"with its response has {longest}: lower --max-response-tokens")
    first = problems[0]
    text = run.tokenizer.decode(first.ids)
    ends = run.tokenizer.convert_ids_to_tokens(run.stop_ids)
    world.print(f"checks before the run:\n  first prompt, {len(first.ids)} tokens: {text[:400]!r}\n"
                f"  responses end with {ends}")
    bos = first.ids.count(run.tokenizer.bos_token_id)
    if bos > 1:
        world.print(f"warning: the prompt has {bos} BOS tokens; models are trained with one")
    check_golds(run, problems)
    if "boxed" not in text and not first.solution and not first.check:
        world.print("warning: the prompt does not ask for \\boxed{}. Unless the model boxes its "
                    "answers anyway, no response will be right: say so in the problems, or imitate "
                    "solutions first (--warmup-data)")
    if run.tokenizer.chat_template:
        check_template(run, first)
    tokens = cfg.prompts_per_step * cfg.group_size * cfg.max_response_tokens
    if world.device.type == "cpu" and not cfg.eval_only and tokens > 10 ** 6:
        world.print(f"warning: a step samples up to {tokens} tokens, too many for a CPU: try "
                    "--prompts-per-step 8 --max-response-tokens 256 --eval-samples 1")


def check_template(run, problem):
    """Refuse a chat template that drops the problem; warn if its turns end with another token than
    responses do."""
    messages = problem.messages
    other = {"role": "user", "content": "another problem"}
    reply = {"role": "assistant", "content": "FOUR"}

    def render(messages):
        return run.tokenizer.apply_chat_template(messages, tokenize=False)
    text = render(messages)
    require(text != render(messages[:-1] + [other]), f"{run.cfg.model}: its chat template leaves "
            f"the problem out and writes {text!r:.80}: it may want other roles or parts")
    _, found, end = render(messages + [reply]).rpartition("FOUR")
    end_ids = run.tokenizer(end.strip(), add_special_tokens=False).input_ids
    if found and end_ids and end_ids[0] not in run.stop_ids:
        run.world.print(f"warning: the chat template ends a turn with {end.strip()!r}, which does "
                        "not end a response here: add it to eos_token_id in generation_config.json")


def check_golds(run, problems):
    """Show how the verifier reads gold answers, and how many worked solutions are right."""
    some = problems[:200]
    unread = 0
    junk = 0
    for n, problem in enumerate(some):
        golds = problem.answer if isinstance(problem.answer, list) else [problem.answer]
        readings = [answer_in_words(str(gold)) for gold in golds]
        unread += readings.count(None) > 0
        junk += is_correct("\\boxed{no idea}", problem.answer)
        if n < 3 and not problem.check:
            run.world.print(f"  gold answer {problem.answer!r:.60} is read as "
                            f"{readings[0] or 'symbols only'!s:.60}")
    if not some[0].check:
        run.world.print(f"  the verifier reads {len(some) - unread} of {len(some)} gold answers"
                        f"{' (the others must be repeated exactly)' if unread else ''}, and "
                        f"rejects junk for {len(some) - junk}")
    solved = [problem for problem in some if problem.solution]
    if solved and not run.cfg.eval_only:
        right = [(p.check or is_correct)(p.solution, p.answer) for p in solved]
        share = sum(right) / len(solved)
        run.world.print(f"  of {len(solved)} worked solutions of these problems, {share:.0%} are "
                        "right; a warm-up imitates\n  others like them, their mistakes included")


def warn_of_first_step(run, metrics):
    """Warn about problems that would spoil every step."""
    if metrics["truncated"] > 0.5:
        run.world.print("warning: most responses were cut off at --max-response-tokens: raise it, "
                        "or see whether the stop tokens above are the model's")
    if metrics["grad_norm"] == 0:
        run.world.print("warning: nothing was learned: no group had right and wrong responses, or "
                        "--quadrants left no token\nwith credit. A longer warm-up may help, unless "
                        "--warmup-data or the check of answers is wrong")
    if metrics["sampler_gap"] > 0.1:
        run.world.print(f"warning: sampler and policy differ by {metrics['sampler_gap']:.3f} nats "
                        "per token: the policy that is trained is not the one that samples")


def warn_of_long_steps(run, tokens):
    """Say how long a step may take, judging by the sampling speed of the first evaluation."""
    cfg = run.cfg
    rate = tokens / run.world.clock["sample"]
    most = cfg.prompts_per_step * cfg.group_size * cfg.max_response_tokens
    if most / rate > 120 and not cfg.eval_only:
        run.world.print(f"At {rate:.0f} tokens/s a step of up to {most} tokens takes up to "
                        f"{most / rate / 60:.0f} minutes, and\nthen learns from them.")


# ---- Errors in one line. -------------------------------------------------------------------------

def require(condition, message):
    """End the program with one line that says what is wrong and how to fix it."""
    if not condition:
        raise SystemExit(f"eapo: {message}")


@contextlib.contextmanager
def one_line_errors(source):
    """Turn what goes wrong with a file, a model, a disk or the network into one line."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, torch.OutOfMemoryError):
        raise
    except BaseException as error:      # torch's CheckpointException is no Exception
        message = f"{type(error).__name__}: {error} {error.__cause__ or ''}"
        remedies = [remedy for sign, remedy in REMEDIES.items() if sign in message]
        message = " ".join(message.split())
        if len(message) > 400:
            message = f"{message[:200]} .. {message[-200:]}"
        if remedies:
            message = f"{remedies[0]} ({message})"
        place = traceback.extract_tb(error.__traceback__)[-1]
        if not isinstance(error, OSError):
            message += f" [{os.path.basename(place.filename)}, line {place.lineno}]"
        raise SystemExit(f"eapo: cannot use {source}: {message}") from error


REMEDIES = {        # a part of what a library's error says, and what to do then
    "header too large": "are the weights there, or do they wait for `git lfs pull`?",
    "quantiz": "quantized weights cannot be trained: take the original model",
    "Unrecognized model": "an adapter (LoRA) must be merged into its base model first",
    "custom code": "code that comes with a model is never run here",
    "No space left": "make room on the disk",
    "Couldn't reach": "there is no such file, folder or task, and no connection to the hub",
}


# --------------------------------------------------------------------------------------------------
# Appendix D. What a run shows: on the screen, in responses.jsonl, and on a page, report.html. It
# also leaves config.json, metrics.jsonl (`measure`, `eval_metrics`, and for --credit-problems
# `credit_by_kind` and `credit_by_rule`), model/ and, if it is stopped or --save-every says so,
# checkpoint/.
# --------------------------------------------------------------------------------------------------

def explain_scores(run):
    """Explain once the numbers and the colours of an evaluation."""
    k = run.cfg.eval_samples
    run.world.print(f"\nAvg@{k} is the share of {k} tries at a problem that are right, with its "
                    f"95% interval;\nPass@{k} the share of problems with a right try; entropy is "
                    "in nats per token.\nThe tries shown are at the problem that comes nearest to "
                    "being solved\nhalf of the time. All evaluations use the same random numbers.")
    if sys.stdout.isatty():
        run.world.print("Colours: \033[32mright\033[0m and \033[31mwrong\033[0m responses; tokens "
                        "in \033[1mbold\033[0m have an entropy of at\nleast the mean of the tries.")


def print_evaluation(run, step, name, problems, batch, scores):
    """Print the scores, and responses to the problem whose solve rate is nearest to one half."""
    k = run.cfg.eval_samples
    when = "model" if run.cfg.eval_only else "base"
    if step > 0:
        when = f"step {step}"
    avg = scores[f"avg@{k}"]
    low = scores["avg_low"]
    high = scores["avg_high"]
    passed = scores[f"pass@{k}"]
    H = scores["entropy"]
    run.world.print(f"\n{when:8} {name}: Avg@{k} {avg:.3f} ({low:.3f} to {high:.3f}), "
                    f"Pass@{k} {passed:.3f}, entropy {H:.3f}")
    number = by_doubt(batch, k)[0]
    print_responses(run, problems[number], batch.rows(batch.number == number))


def print_responses(run, problem, group):
    """Print a problem and up to three responses, both right and wrong ones if there are; on a
    terminal colours show the quadrants of tokens."""
    colours = ["", "1;32", "32", "31", "1;31"]          # by quadrant code
    codes = quadrants(group.right, group.H, group.mask, len(group.ids))
    wrong_first = group.right.long().argsort(stable=True).tolist()
    run.world.print(f"  {printable(problem.problem):.76}")
    for i in sorted({*wrong_first[:2], wrong_first[-1]}):
        line = "  right  " if group.right[i] else "  wrong  "
        for t, token in enumerate(group.response(i)[:400]):
            text = printable(run.tokenizer.decode([token], skip_special_tokens=True))
            if sys.stdout.isatty():
                text = f"\033[{colours[codes[i, t]]}m{text}\033[0m"
            line += text
        run.world.print(line)


def printable(text):
    """Text from a model or a file, with what cannot be printed made visible: escape codes."""
    plain = ""
    for character in str(text):
        plain += character if character.isprintable() else ascii(character)[1:-1]
    return plain


def outcome(run, name):
    """The outcome of a run: the first and the last evaluation of a set, in words."""
    avg = f"avg@{run.cfg.eval_samples}"
    rows = [row for row in run.history if f"eval/{name}/{avg}" in row]
    if not rows:
        return f"{name} was not evaluated"

    def scores(row):
        return [row[f"eval/{name}/{key}"] for key in ("avg_low", avg, "avg_high")]
    first_low, first, first_high = scores(rows[0])
    low, last, high = scores(rows[-1])
    text = f"{avg.title()} on {name}: {first:.3f}"
    if len(rows) == 1:
        return text
    verdict = "no difference is shown, as the 95% intervals overlap"
    if low > first_high:
        verdict = "better, as the 95% intervals do not overlap"
    elif high < first_low:
        verdict = "worse, as the 95% intervals do not overlap"
    step = rows[-1]["step"]
    return f"{text} before, {last:.3f} after step {step}: {verdict}"


def sparkline(values):
    """Numbers from 0 to 1 as a row of bars, at most 60 of them."""
    few = values[::math.ceil(len(values) / 60)]
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * x))] for x in few)


def write_responses(run, step, name, problems, batch):
    """Add the responses of an evaluation to responses.jsonl, with their verdicts."""
    if run.world.rank > 0:
        return
    with open(f"{run.out}/responses.jsonl", "a", encoding="utf-8") as file:
        for i in range(len(batch.ids)):
            text = run.tokenizer.decode(batch.response(i), skip_special_tokens=True)
            number = int(batch.number[i])
            problem = problems[number]
            H = batch.H[i, :int(batch.response_len[i])]                         # (tokens,)
            row = {"step": step, "set": name, "number": number, "problem": problem.problem,
                   "answer": problem.answer, "right": bool(batch.right[i]), "tokens": len(H),
                   "ended": bool(batch.ended[i]), "entropy": round(float(H.mean()), 6),
                   "response": text}
            file.write(json.dumps(row, default=str) + "\n")


# ---- The page: where does the credit go? ---------------------------------------------------------
#
# It runs no script and loads nothing, and what comes from a model or a file can only be text in it.
# run.page keeps what it needs from one evaluation to the next, for example
#
#     {"set": "MATH-500",             the evaluation set that is shown
#      "problems": [17, 4],           those in which credit is measured; the first is shown
#      "rows": [0, 3, 5, 6],          which responses to it, two right and two wrong if there are
#      "sections": [[0, "<h2>.."],    their HTML at the first evaluation, that of step 0,
#                   [10, "<h2>.."]],  and at the latest
#      "pixels": 40.0}                height of the bars per nat
#
# A token is, for example,
#
#     <span class="fork" tabindex="0" style="--p:0.412;--H:0.673;--GRPO:0.935;--EAPO:1.029;"
#         data-t="+   p 0.412  H 0.673 ..">(four bars)+</span>
#
# Its numbers are CSS variables, from which the style sheet computes the heights of its bars. For
# the bar of credit that is --credit: rules at the end of the sheet set it to --EAPO, to --GRPO or
# to 10 times their difference, whichever radio button is checked. So the page needs no script.

def shown(text):
    """Text from a model or a file as HTML."""
    return html.escape(printable(text))


def new_page(name, batch, k, count):
    """What the first evaluation chooses, and later ones keep: a new run.page."""
    # Most is decided in problems of which half of the tries are right.
    problems = by_doubt(batch, k)[:count]
    group = batch.rows(batch.number == problems[0])
    right = group.right.nonzero()[:, 0].tolist()
    wrong = (~group.right).nonzero()[:, 0].tolist()
    # The tallest bar of H fills the room above the tokens, unless it is below .7, a coin toss.
    pixels = BAR_ROOM / max(0.7, float(group.H.max()))
    return {"set": name, "problems": problems, "rows": right[:2] + wrong[:2], "sections": [],
            "pixels": pixels}


def show_responses(run, step, problem, group):
    """Make a section of the page, up to four responses to a problem, and keep it in run.page.

    group: a Batch of all responses to the problem with advantages, and with V and I if measured.
    """
    cfg = run.cfg
    G = len(group.ids)
    A = group.advantage                                                         # (G,)
    mu, _ = entropy_mean_and_std(group.H, group.mask, G)
    fork = group.mask & (group.H >= mu)                                         # (G, T)
    eapo = entropy_aware_advantages(A, group.H, group.mask, G, cfg.alpha, cfg.phi)
    grpo = A[:, None] * group.mask
    facts = {"p": group.old_logp.exp(), "H": group.H, "GRPO": grpo, "EAPO": eapo}   # (G, T) each
    if group.I is not None and group.I.isfinite().any():
        facts |= {"I": group.I, "V": group.V}           # nan in responses that were not measured

    section = f"<h2>{shown(problem.problem)}</h2>"
    section += f"<p>The answer is {shown(problem.answer)}. {summary(group, fork, facts)}.</p>"
    for i in run.page["rows"]:
        verdict = "right" if group.right[i] else "wrong"
        section += f"<b>{verdict}, A = {A[i]:+.2f}</b><pre>"
        for t, token in enumerate(group.response(i)[:400]):
            numbers = {name: float(x[i, t]) for name, x in facts.items()}
            section += token_html(run.tokenizer.decode([token]), fork[i, t], numbers)
        section += "</pre>"
    # Keep the first evaluation and this one. (A resumed run may do that of step 0 again.)
    first = run.page["sections"][:1] if step > 0 else []
    run.page["sections"] = [*first, [step, section]]


def summary(group, fork, facts):
    """How much of the tokens and of the credit is at forks?  (G, T) each -> words"""
    text = (f"{int(group.right.sum())} of {len(group.ids)} responses are right. "
            f"Forks are {fork.sum() / group.mask.sum():.0%} of the tokens")
    for rule in ("GRPO", "EAPO"):
        credit = facts[rule].abs()                                              # (G, T)
        if credit.any():
            share = credit[fork].sum() / credit.sum()
            text += f"; {rule} gives them {share:.0%} of the credit"
    if not facts["GRPO"].any():
        text += "; as all rewards are the same, no token gets credit"
    if "I" in facts:
        total = facts["I"].nanmean(dim=0).sum()
        held = (facts["I"] * fork).nanmean(dim=0).sum()
        text += f"; forks hold {held:.2f} of the {total:.2f} nats of information per response"
    return text


def token_html(text, fork, numbers):
    """A token and {name: number}: its bars, and its tooltip."""
    text = shown(text).replace(" ", "·")
    tooltip = text + " "
    style = ""
    for name, x in numbers.items():
        if math.isfinite(x):
            style += f"--{name}:{x:.3f};"
            tooltip += f"  {name} {x:.3f}"
    attributes = 'class="fork" tabindex="0"' if fork else 'tabindex="-1"'
    return f'<span {attributes} style="{style}" data-t="{tooltip}">{BARS}{text}</span>'


def write_page(run):
    """Write report.html, if there was an evaluation, and keep run.page in a file."""
    name = run.page.get("set")
    evaluated = [row for row in run.history if f"eval/{name}/entropy" in row]
    if run.world.rank == 0 and evaluated:
        replace_file(f"{run.out}/.page.json", json.dumps(run.page))     # for --resume
        replace_file(f"{run.out}/report.html", page_html(run, name, evaluated))


def page_html(run, name, evaluated):
    """report.html, from the rows of history in which the set that it shows was evaluated."""
    cfg = run.cfg
    avg = f"Avg@{cfg.eval_samples}"

    def column(key):
        return [row[f"eval/{name}/{key}"] for row in evaluated]
    steps = [row["step"] for row in evaluated]
    low = column("avg_low")
    score = column(avg.lower())
    high = column("avg_high")
    H = column("entropy")
    buttons = ""
    sections = ""
    # There may be one section so far.
    for which, (step, section) in zip(("base", "latest"), run.page["sections"]):
        checked = "checked" if which == "base" else ""
        radio = f'<input type="radio" name="at" id="{which}" {checked}>'
        buttons += f"<label>{radio}step {step}</label>\n"
        sections += f'<section class="{which}">{section}</section>\n'

    return f"""{PAGE_HEAD}
<p>{cfg.method.upper()}, step {run.history[-1]["step"]} of {cfg.steps}. {shown(outcome(run, name))}.
<br><code>{shown(command(cfg))}</code></p>
<fieldset><legend>Responses at</legend>
{buttons}</fieldset>
{PAGE_LEGEND}
<main style="--nat:{run.page["pixels"]:.1f}px">
<div>{sections}{PAGE_CAVEAT}</div>
<aside>{curve(f"{avg} on {name}, with its 95% interval", steps, low, score, high)}
{curve(f"Entropy on {name}, nats", steps, H, H, H)}</aside>
</main>"""


EVAL_FLAGS = ("model", "eval_data", "eval_samples", "eval_temperature", "eval_top_p",
              "max_prompt_tokens", "max_response_tokens")


def command(cfg, names=()):
    """The command of a run, with those of the named settings that differ from the defaults for its
    model. names=(): all settings but --resume."""
    words = "python eapo.py"
    usual = asdict(Config(**preset(cfg.model)))
    wanted = names or usual
    for name, x in asdict(cfg).items():
        if x != usual[name] and name in wanted and name != "resume":
            words += " " + flag_name(name)
            words += "" if x is True else " " + shlex.quote(str(x))
    return words


def curve(title, steps, low, middle, high):
    """A figure of `middle` at each step, from 0 up, with the band from low to high shaded."""
    last = max(1, steps[-1])
    top = max(1e-6, *high)

    def path(xs, ys):
        points = [f"{x},{-y:f}" for x, y in zip(xs, ys)]        # in SVG, y points down
        return " ".join(points)
    band = path(steps + steps[::-1], high + low[::-1])
    return f"""<figure>0 to {top:.2f}
<svg viewBox="0 {-top:f} {last} {top:f}" preserveAspectRatio="none">
<polygon points="{band}" fill="#2f7de1"/><polyline points="{path(steps, middle)}"/></svg>
<figcaption>{shown(title)}, steps {steps[0]} to {steps[-1]}:
{middle[0]:.3f} &rarr; {middle[-1]:.3f}</figcaption></figure>"""


# ---- The looks of the page. ----------------------------------------------------------------------

PAGE_HEAD = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Where does the credit go?</title><style>
:root { color-scheme: light dark; overflow-wrap: anywhere; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 1200px; margin: auto; padding: 16px 20px 90px }
@media (min-width: 900px) { main { display: grid; grid-template-columns: 1fr 300px; gap: 48px } }
fieldset, label { display: inline-block }
figure { margin: 0 0 24px }
svg { width: 100%; height: 96px; border: solid #888; border-width: 0 0 1px 1px; stroke: #2f7de1 }
svg * { vector-effect: non-scaling-stroke }
polygon { opacity: 0.3 }
polyline { fill: none; stroke-width: 2 }

/* A token is a grid of three rows: 44 pixels, in which the bars of H and I lie over one another;
   its text; a bar of credit. If its --H is 0.673, the bar .H is 0.673 times --nat high. Its
   --credit is --EAPO, unless another button is checked: if that is 1.029, the bar .up is
   1.029 * 14 pixels high, and .down is 0. */
pre { position: relative; margin: 8px 0 24px; font: 17px monospace; white-space: normal }
span { display: inline-grid; grid-template-rows: 44px auto auto; min-width: 12px;
  padding: 0 2px 8px; text-align: center; white-space: pre; vertical-align: top }
.fork { font-weight: 900 }
i { border-radius: 2px }
.H, .I { grid-area: 1 / 1; align-self: end; max-height: 100% }
.up, .down { grid-area: 3 / 1 }
.H { background: #f3bd63; height: calc(var(--H) * var(--nat)) }
.I { background: #b4540a; height: calc(max(0, var(--I, 0)) * var(--nat)) }
.up { background: #2c9a4b; height: calc(max(0, var(--credit)) * 14px) }
.down { background: #dd4840; height: calc(max(0, -1 * var(--credit)) * 14px) }
.key { display: inline-block; padding: 6px }

/* Its numbers, when it is pointed at. */
span:is(:hover, :focus) { background: #8883; outline: 1px solid #888 }
span:is(:hover, :focus)::after { content: attr(data-t); position: absolute; z-index: 1; top: 100%;
  left: 0; padding: 4px 8px; background: CanvasText; color: Canvas; white-space: pre-wrap;
  font: 14px/1.5 system-ui, sans-serif; text-align: left }

/* What the radio buttons choose: which of its numbers is the --credit of a token, and which of the
   two sections is seen. */
span { --credit: var(--EAPO) }
body:has(#GRPO:checked) span { --credit: var(--GRPO) }
body:has(#change:checked) span { --credit: calc(10 * (var(--EAPO) - var(--GRPO))) }
body:has(#base:checked) .latest, body:has(#latest:checked) .base { display: none }
</style><h1>Where does the credit go?</h1>"""
PAGE_LEGEND = """<fieldset><legend>Credit</legend>
<label><input type="radio" name="credit" checked>EAPO</label>
<label><input type="radio" name="credit" id="GRPO">GRPO</label>
<label><input type="radio" name="credit" id="change">EAPO − GRPO, 10 times as high</label>
</fieldset>
<p>Above each token: <i class="H key"></i> its entropy H, how unsure the model was before it, and
within it, where measured, <i class="I key"></i> the information I, how much is decided there: the
doubt about the verdict that goes away, on average over the tokens that could be drawn. Both are in
nats; in theory I is at most H, but a measured I is noisy. Below each token: the credit that EAPO
or GRPO would give it, whichever rule trained the model, <i class="up key"></i> up or
<i class="down key"></i> down. Forks, with H at or above
the mean of all responses to the problem, are bold; a dot · is a space. Shown are up to four
responses, the same each time: at first two right and two wrong ones. Point at a token, tap it, or
press Tab for its numbers; p is its probability, and V, measured like I, the chance of a right
answer just before it.</p>"""
PAGE_CAVEAT = """<p>Entropy is not surprise: it says how unsure the model was before it drew a
token, not how unlikely that token was. A slip, drawn with p near 0 where the model was sure, has a
low H, and EAPO blames it less than GRPO does, even if it cost the answer.</p>"""
BAR_ROOM = 44           # pixels, as in the grid of a token above
BARS = '<i class="H"></i><i class="I"></i><i class="up"></i><i class="down"></i>'


# --------------------------------------------------------------------------------------------------
# Appendix E. The command line.
# --------------------------------------------------------------------------------------------------

def split_names(text):
    """"PHR, NHR" -> ["PHR", "NHR"]"""
    return [name.strip() for name in text.split(",") if name.strip()]


def flag_name(name):
    return "--" + name.replace("_", "-")


def check_settings(cfg):
    """Reject impossible settings and say how to fix them."""
    require(cfg.method in CREDIT_RULES,
            f"no method is called {cfg.method}, only {', '.join(CREDIT_RULES)}")
    require(cfg.loss_mean in ("tokens", "group"), "--loss-mean is tokens or group")
    require(cfg.group_size > 1, "a group of one has nothing to compare: use --group-size 2 or more")
    require(0 <= cfg.alpha < cfg.phi,
            "--alpha must lie from 0 to below --phi, or (7) could flip the sign of an advantage")
    for name in split_names(cfg.quadrants) + split_names(cfg.without):
        require(name in QUADRANTS, f"no quadrant is called {name}, only {', '.join(QUADRANTS)}")
    require(not cfg.without or cfg.method == "eapo", "--without is for --method eapo")
    require(0 <= cfg.overlong < 1, "--overlong is a share, from 0 to below 1")
    require(cfg.clip_c == 0 or cfg.clip_c > 1 + cfg.clip_high,
            "--clip-c must lie above 1 + --clip-high, outside the clip of (2), or be 0 for off")
    require(cfg.warmup_data or cfg.warmup_steps == 0, "--warmup-steps needs --warmup-data")
    require(cfg.temperature > 0, "--temperature must be above 0")
    for name in ("top_p", "eval_top_p"):
        require(0 < getattr(cfg, name) <= 1, f"{flag_name(name)} must be above 0 and at most 1")
    at_least_1 = ("prompts_per_step", "prompts_per_minibatch", "eval_samples", "max_prompt_tokens",
                  "max_response_tokens")
    for name, value in asdict(cfg).items():
        if isinstance(value, (int, float)):
            lowest = 1 if name in at_least_1 else 0
            require(value >= lowest, f"{flag_name(name)} must be {lowest} or more")


USAGE = """python eapo.py [flags], for example
  python eapo.py                                      a tiny model learns to carry
  python eapo.py --method grpo --seed 1               another rule, another seed
  python eapo.py --model FOLDER --train-data my.jsonl --eval-data test.jsonl
"""


def parse_args(argv=None):
    """The command line -> Config: what is typed, else what the run to resume had or what the preset
    of the model says, else the default."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], usage=USAGE, allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for f in fields(Config):
        if f.metadata["heading"]:
            group = parser.add_argument_group(f.metadata["heading"])
        options = {"type": f.type, "metavar": f.type.__name__.upper()}
        if f.type is bool:
            options = {"action": argparse.BooleanOptionalAction}
        group.add_argument(flag_name(f.name), default=f.default,
                           help=f.metadata["help"].replace("%", "%%"), **options)

    # --model and --resume change the defaults of the other flags. So read these two first; then
    # --help shows the defaults that hold.
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--model", default="tiny")
    early.add_argument("--resume", default="")
    first, _ = early.parse_known_args(argv)
    defaults = resumed_settings(first.resume) if first.resume else preset(first.model)
    parser.set_defaults(**defaults)
    typed = vars(parser.parse_args(argv))
    if first.resume:
        for name, value in defaults.items():
            require(name in MAY_CHANGE or typed[name] == value, f"{first.resume} ran with "
                    f"{flag_name(name)} {value}, not {typed[name]}: leave it out, or start a new "
                    "run")
    return Config(**typed)


def preset(model):
    """The settings that a model changes, by what the last part of its name contains. The model/ of
    an earlier run inherits those of that run's model, but no warm-up and no measuring of credit."""
    if model == "tiny":
        return PRESETS["tiny"]
    folder, name = os.path.split(os.path.normpath(model))
    config = os.path.join(folder, "config.json")
    if name == "model" and os.path.isfile(config):
        with one_line_errors(config), open(config) as file:
            earlier = json.load(file).get("model", model)
        settings = preset(earlier) if earlier != model else {}
        return settings | {"warmup_steps": 0, "credit_problems": 0}
    for part, settings in PRESETS.items():
        if part in name and part != "tiny":
            return settings
    return {}


# Settings that do not change what a step computes, up to rounding, and so may differ when a run is
# resumed.
MAY_CHANGE = {"resume", "steps", "eval_every", "save_every", "gpus", "offload", "microbatch_tokens"}


def resumed_settings(folder):
    """The settings of a run to continue."""
    with one_line_errors(f"--resume {folder}"), open(f"{folder}/config.json") as file:
        saved = json.load(file)
    settings = {f.name: saved[f.name] for f in fields(Config) if f.name in saved}
    return settings | {"out": folder, "resume": folder}


def launch_on_all_gpus(cfg, argv):
    """Start this command again, once per GPU, if there are several and torchrun has not done so."""
    there = torch.cuda.device_count()
    require(cfg.gpus <= there, f"--gpus {cfg.gpus}: this machine has {there}")
    n = cfg.gpus or there
    if n > 1 and cfg.model != "tiny" and "RANK" not in os.environ:
        os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "7200")     # seconds, to end a step
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // n)))
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
        program = [os.path.abspath(__file__)] + (sys.argv[1:] if argv is None else argv)
        os.execv(sys.executable, [sys.executable] + torchrun + program)


def main(argv=None):
    """Run a command line -> the Run."""
    major, _, _ = transformers.__version__.partition(".")
    require(sys.version_info >= (3, 11) and int(major) >= 5,
            "needs Python 3.11 or newer and the packages in requirements.txt")
    cfg = parse_args(argv)
    launch_on_all_gpus(cfg, argv)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`past_key_values` is deprecated")
    warnings.filterwarnings("ignore", "torch.distributed is disabled")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):              # for consoles that lack a character
            stream.reconfigure(errors="replace")
    if cfg.model == "tiny" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(2, os.cpu_count()))   # its matrices are too small for more
    handlers = {number: signal.getsignal(number) for number in signals()}
    try:
        return train(cfg)
    except KeyboardInterrupt:   # before on_signal listens, or the second Ctrl-C
        raise SystemExit("\neapo: stopped; what was saved before is kept") from None
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise SystemExit("eapo: the disk is full; what was saved before is kept. Make room, and go "
                         "on with --resume") from error
    except torch.OutOfMemoryError as error:
        error.add_note("eapo: out of memory. Smaller --microbatch-tokens help in the update, "
                       "shorter --max-response-tokens everywhere, --offload or more --gpus most")
        raise
    finally:
        for number, handler in handlers.items():        # a notebook goes on as before
            signal.signal(number, handler)


if __name__ == "__main__":
    main()

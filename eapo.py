"""eapo: reinforcement learning with verifiable rewards, token by token, in one file.

Give a language model a problem whose answer can be checked. Let it try G times, mark every try
right or wrong, and make the tokens of the better tries likelier. That is GRPO (group-relative
policy optimization), and it gives each token of a response the same credit. Most tokens cannot use
it: where the model was sure, there was no decision to praise. EAPO (entropy-aware policy
optimization; He et al. 2026, arXiv 2604.11056, v1) therefore measures how unsure the model was at
each token, its entropy H, and gives uncertain tokens a little more of the credit and of the blame,
sure ones a little less. GRPO, here with DAPO's clips and mean, is (1) and (2); EAPO adds (6), (7).

    A_i     = (r_i - mean(r)) / std(r)                                   one number a response   (1)
    L       = - mean of min(rho A, clip(rho, 1-eps_low, 1+eps_high) A)                           (2)
    score_t = clip((H_t - mu_H) / sigma_H, -|A|/phi, +|A|/phi)           one number a token      (6)
    A^CA_t  = A + alpha sign(A) score_t                                  replaces A in (2)       (7)

Equation numbers but (1) are the paper's. The mean of (2) is over all response tokens of a
mini-batch, as in the authors' code (--loss-mean group: as in their text). std divides by n - 1.

    B prompts x G responses = N rows, the G responses to one prompt, a group, in adjacent rows
    T tokens of the longest response    V vocabulary    M tokens, flat    D size of hidden states
    r      reward of a response, +1 right or -1 wrong (less with --overlong)      (N,)
    A      advantage of a response: how much better than its group, (1)           (N,)
    A^CA   advantage of a token, (7): what --method eapo puts into Batch.credit   (N, T)
    pi_old the policy as the step began, at the sampling temperature, before top_p cuts it
    H      entropy of pi_old where each token was drawn, in nats                  (N, T)
    mask   True on response tokens, the stop token included                       (N, T)
    mu_H, sigma_H   mean and deviation of H over all response tokens of one group (N, 1)
    rho    pi_theta / pi_old: how much likelier the token became since sampling   (N, T)

One step of `train`, part 10, in one breath:

    try      sample G responses to each of B prompts         roll_out, 7; sample_loop, 5
    mark     r = +1 where \\boxed{} holds the right answer    attempt, 7; is_correct, 3
    compare  A (1) from the group, A^CA (7) from entropies   give_credit, 7; part 2
    learn    gradient steps on the clipped L (2)             learn, 6; policy_loss, 2
    look     log what happened; now and then sit an exam     measure, exam, 7

Run `python eapo.py` for a tiny model that learns to carry, in minutes on a laptop; with `--model
Qwen/Qwen2.5-Math-7B` the paper's run on all GPUs there are (what changes there: part 6); with
`--help` for every setting. Left out: a value network (a learned guess of the reward), a KL penalty
to a reference, a learned reward.
"""
import argparse
import cmath
import contextlib
import glob
import html
import json
import math
import os
import platform
import random
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from functools import partial
from itertools import groupby
from operator import add, mul, sub, truediv
from string import ascii_letters, digits
from zlib import crc32

import datasets
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as dcs
import torch.distributed.fsdp as fsdp
import transformers
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


# --------------------------------------------------------------------------------------------------
# Part 1. The settings. A field of Config is a flag. Defaults are those of the paper's run of
# Qwen2.5-Math-7B (table 6) where it names them. METHODS holds what a method changes, PRESETS what
# a model changes: `--model tiny`, the default, fits a laptop.
# --------------------------------------------------------------------------------------------------

QUADRANTS = ("PHR", "PLR", "NLR", "NHR")        # codes 1 to 4 of `quadrants`, part 2
METHODS = {     # `credit_rule`, part 2, and what a method sets, whatever the preset says
    "eapo": {}, "grpo": {}, "forking": {}, "entroadv": {}, "entroreg": {}, "w-reinforce": {},
    "dapo": dict(resample=2, overlong=0.2), "kl-cov": dict(clip_low=1, clip_high=1e9, clip_c=0)}
PRESETS = {     # a name, or a part of one: what such a model changes
    "tiny": dict(train_data="addition", eval_data="addition", warmup_data="addition",
                 warmup_steps=1400, warmup_learning_rate=2e-3, steps=30, prompts_per_step=32,
                 prompts_per_minibatch=8, resample=0, learning_rate=1e-4, top_p=1.0,
                 max_prompt_tokens=32, max_response_tokens=64, eval_samples=8,
                 eval_temperature=1.0, eval_top_p=1.0, save_every=0),
    "DeepScaleR-1.5B": dict(group_size=16, prompts_per_step=64, steps=900,
                            max_prompt_tokens=2048, max_response_tokens=24576)}


def need(condition, message):
    """Stop with one line that says what is wrong and how to mend it."""
    if not condition:
        raise SystemExit(f"eapo: {message}")


def flag(default, text, heading=None, choices=None):
    """A Config field: its default, its help, the heading that it opens in `--help`."""
    return field(default=default, metadata=dict(help=text, heading=heading, choices=choices))


@dataclass
class Config:
    model: str = flag("tiny", "tiny, a Hugging Face folder, or a hub id", "the run")
    train_data: str = flag("agentica-org/DeepScaleR-Preview-Dataset",
                           "addition, a .jsonl/.csv/.parquet file, or a hub id[:split]")
    eval_data: str = flag("HuggingFaceH4/MATH-500", "the same, several with commas between")
    out: str = flag("", "folder of the run; empty: runs/MODEL-TIME-PROCESS")
    seed: int = flag(0, "seed of weights, data order and sampling")
    resume: str = flag("", "folder of a run to go on with")
    save_every: int = flag(20, "steps between checkpoints; 0 = when stopped, or resumed and done")
    compare: str = flag("", "RUN,RUN...: draw finished runs in one report.html in --out, stop")
    warmup_data: str = flag("", "worked solutions to imitate: columns problem and solution",
                            "imitation before RL, for models that do not know the task")
    warmup_steps: int = flag(0, "optimizer steps of imitation, 16 solutions each; 0 = none")
    warmup_learning_rate: float = flag(1e-5, "rises over 20 steps, falls over the last 30%")
    steps: int = flag(220, "RL steps: sample, then learn from what was sampled", "the batch")
    prompts_per_step: int = flag(512, "groups to learn from in a step; fewer if rounds run out")
    group_size: int = flag(8, "G, responses to each prompt")
    prompts_per_minibatch: int = flag(32, "at most so many prompts behind an optimizer step")
    microbatch_tokens: int = flag(0, "padded tokens in one pass through the model: memory and "
                                     "speed, not results; 0 = 16384 on a GPU, 2048 on a CPU")
    resample: int = flag(2, "more rounds of sampling, at most, to replace groups all right or all "
                            "wrong (dynamic sampling); those are never learned from")
    max_prompt_tokens: int = flag(1024, "longer prompts are left out", "sampling")
    max_response_tokens: int = flag(3072, "responses are cut after this many tokens")
    temperature: float = flag(1.0, "of training: sampling, log-probabilities, entropies")
    top_p: float = flag(0.95, "draw from the fewest tokens with this probability; 1 = from all")
    method: str = flag("eapo", "the rule of credit", "credit and loss", tuple(METHODS))
    alpha: float = flag(0.2, "(7) strength of the entropy term; 0: GRPO's advantages")
    phi: float = flag(2.0, "(6) |score| is at most |A| / phi")
    quadrants: str = flag("", "of PHR,PLR,NLR,NHR: no credit elsewhere, (2) still divides by all")
    without: str = flag("", "quadrants without the entropy term: credit A there, same divisor")
    clip_low: float = flag(0.2, "(2) eps_low")
    clip_high: float = flag(0.28, "(2) eps_high")
    clip_c: float = flag(3.0, "where A < 0, no push beyond rho = c, see `surrogate`; 0 = off")
    loss_mean: str = flag("tokens", "(2) as a mean over the tokens of a mini-batch, or over those "
                                    "of each group, then over groups", choices=("tokens", "group"))
    overlong: float = flag(0.0, "DAPO's soft penalty: over this last share of max_response_tokens "
                                "the reward falls, by 1 at the end; 0 = off")
    learning_rate: float = flag(1e-6, "AdamW, constant; gradients are clipped to a norm of 1")
    eval_every: int = flag(10, "steps between exams, also at both ends; 0 = none", "exams")
    eval_samples: int = flag(4, "responses to each exam problem: the k of Avg@k and Pass@k")
    eval_temperature: float = flag(0.6, "of sampling in exams; 0 = greedy")
    eval_top_p: float = flag(0.95, "of sampling in exams")
    eval_only: bool = flag(False, "only sit the exams, with --model FOLDER/model for example")
    gpus: int = flag(0, "GPUs of this machine to use; 0 = all", "the machine")
    offload: bool = flag(False, "keep weights, gradients and AdamW's moments in host memory")


# --------------------------------------------------------------------------------------------------
# Part 2. The algorithm: tensors in, tensors out. The file is there for it; the rest only feeds it.
# --------------------------------------------------------------------------------------------------

def token_entropy(logits):
    """H = - sum_v p_v log p_v  in nats, p = softmax(logits).  (..., V) -> (...)

    0 when the policy is sure, log V when it has no idea. Written as log Z - sum_v p_v z_v. A token
    forbidden by z = -inf counts 0, where 0 * -inf would be nan."""
    p = logits.softmax(-1)
    return logits.logsumexp(-1) - (p * torch.where(p > 0, logits, 0)).sum(-1)


def group_advantages(rewards, group_size):
    """(1)  A_i = (r_i - mean(r)) / (std(r) + 1e-6)   over the G responses to one prompt.

    rewards (N,) -> A (N,). The mean of the group stands in for a value network: a response is good
    if it beat the other tries at its own prompt. In a group all right or all wrong, all of +1 or of
    -1, every A is 0; it counts in the metrics, and `roll_out` leaves it out of learning."""
    r = rewards.view(-1, group_size)                                          # (B, G)
    return ((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-6)).flatten()  # (N,)  (1)


def entropy_mean_std(H, mask, group_size):
    """mu_H and sigma_H: mean and sample deviation (n - 1) of H over all response tokens of a group.

    (N, T), (N, T) -> (N, 1), (N, 1), the same in the G rows of a group. A long response has more
    tokens and so more say. sigma_H carries + 1e-6, for the group whose tokens are all alike."""
    m = mask.reshape(len(mask) // group_size, group_size, mask.shape[1])      # (B, G, T)
    h, n = H.reshape(m.shape), m.sum((1, 2), keepdim=True).clamp(min=1)
    mu = torch.where(m, h, 0).sum((1, 2), keepdim=True) / n                   # (B, 1, 1)
    squares = torch.where(m, h - mu, 0).square().sum((1, 2), keepdim=True)
    sigma = (squares / (n - 1).clamp(min=1)).sqrt() + 1e-6
    return tuple(x.flatten().repeat_interleave(group_size)[:, None] for x in (mu, sigma))


def entropy_score(A, H, mask, group_size, phi):
    """(6)  score_t = clip((H_t - mu_H) / sigma_H, -|A|/phi, +|A|/phi)

    (N,), (N, T), (N, T) -> (N, T), meaningless outside the mask. How unusual the uncertainty of a
    token is within its group, in standard deviations. The two-sided clip scales with |A|: entropy
    may refine an advantage and, if alpha < phi, which `check` demands, never overwhelm it. It is
    what the paper calls "dual clipping"; the two clips of `surrogate`, below, are others."""
    mu, sigma = entropy_mean_std(H, mask, group_size)
    bound = A.abs()[:, None] / phi                                            # (N, 1)
    return ((H - mu) / sigma).clamp(-bound, bound)                            # (N, T)  (6)


def entropy_aware_advantages(A, H, mask, group_size, alpha, phi):
    """(7)  A^CA_t = A + alpha sign(A) score_t,   no gradient through score_t.   This is EAPO.

    A (N,), H (N, T), mask (N, T) -> A^CA (N, T), zero outside the mask. Read it as volume, not
    direction. sign(A) turns the score to the side of A: a token above mu_H is praised more where A
    is positive and blamed more where it is negative, a token below mu_H less in both. A^CA / A
    stays within 1 +- alpha/phi, 0.9 to 1.1 at the defaults: with alpha < phi no sign can turn.
    alpha = 0 gives every token A, GRPO's advantage. detach: if a gradient flowed through H, the
    policy could earn by changing its uncertainty instead of its answers. The H of parts 5 and 7 has
    no gradient anyway; detach protects other callers."""
    score = entropy_score(A, H, mask, group_size, phi).detach()               # (N, T)
    return torch.where(mask, A[:, None] + alpha * A.sign()[:, None] * score, 0)     # (N, T)  (7)


def quadrants(rewards, H, mask, group_size):
    """The paper's four kinds of token (section 4), Positive or Negative, High or Low entropy:

        1 PHR  r >= 0, H >= mu_H   right, at a fork      2 PLR  r >= 0, H <  mu_H   right, routine
        3 NLR  r <  0, H <  mu_H   wrong, routine        4 NHR  r <  0, H >= mu_H   wrong, at a fork

    By r, not A: with --overlong a right response may be blamed, and stays in PHR and PLR.
    (N,), (N, T), (N, T) -> (N, T) int, 0 outside the mask. They split the response tokens, so the
    losses of the four, over one denominator, add up to the whole. In the paper the gains of
    learning live in PHR, NHR."""
    mu, _ = entropy_mean_std(H, mask, group_size)
    high, positive = H >= mu, rewards[:, None] >= 0                           # (N, T), (N, 1)
    return torch.where(positive, torch.where(high, 1, 2), torch.where(high, 4, 3)) * mask


def surrogate(rho, A, clip_low, clip_high, clip_c):
    """(2)  min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A); not in (2): for A < 0, at least c A.

    (N, T), (N, T) -> (N, T). Once a good token is 1 + eps_high times as likely as when it was
    sampled, or a bad one 1 - eps_low times, pushing further pays nothing: the gradient is 0. A bad
    token that has become likelier is still pushed back, but no longer beyond rho = c, where rho A
    is cut at c A (Ye et al. 2020, who call PPO with both clips dual-clip; clip_c = 0: no cut)."""
    gain = torch.min(rho * A, rho.clamp(1 - clip_low, 1 + clip_high) * A)     # (N, T)  (2)
    return torch.where(A < 0, gain.clamp(min=clip_c * A), gain) if clip_c else gain


def policy_loss(logp, old_logp, A, mask, clip_low, clip_high, clip_c):
    """- sum over tokens of mask * surrogate (2), mask 0 or 1 or any weight.  (N, T) each -> scalar.

    A sum, not the mean of (2), so that a batch may be cut anywhere; a mean where the weights add up
    to 1 over the mini-batch, as `descend` makes them. On a step's first mini-batch rho is 1 but for
    rounding, and the gradient is the policy gradient, - sum of mask A grad log pi."""
    rho = (logp - old_logp).exp()                                             # (N, T)
    return -(surrogate(rho, A, clip_low, clip_high, clip_c) * mask).sum()


def token_weights(mask, group_size, loss_mean):
    """What each token counts in (2), (N, T). "tokens": 1, the same in any response, as in DAPO and
    verl, the framework of EAPO's authors. "group": 1 / (tokens of its group), a mean per group
    and then over groups, which is how the paper prints (2)."""
    tokens = mask.sum(1).view(-1, group_size).sum(1).repeat_interleave(group_size)[:, None]
    return mask / tokens if loss_mean == "group" else mask.float()


def credit_rule(method, A, H, mask, group_size, alpha, phi):
    """The credit of each token under a method: EAPO and those that the paper compares it with
    (appendix B.4).  A (N,), H (N, T), mask (N, T) -> (N, T), zero outside the mask.

    grpo        A; not the textbook's: DAPO's clips and mean, clip_c, resampling but for tiny; no KL
    dapo        A; grpo with a penalty on length, see METHODS, and resampling for tiny too
    entroreg    A; grpo with a bonus for H in the loss, see `learn`
    kl-cov      A; no clips, but a penalty in the loss on tokens that `give_credit` marks
    forking     A where H is among the highest 20% of the step, else 0 (Wang et al. 2025)
    entroadv    A + min(0.4 H, |A| / 2): at forks more praise and less blame (Cheng et al. 2025)
    w-reinforce A, but a tenth of it where A > 0 (Zhu et al. 2025)

    A token without credit stays in the denominator of (2). Your own rule: its name in METHODS, part
    1, and a line in `rules`, where A is (N, 1) by then, and the rows are all of the step, dropped
    groups too (without the line it is GRPO). What adds to the loss goes into `learn`. Another A is
    made in `group_advantages`, another rho in `policy_loss`, `learn` and `write_report`. To take
    EAPO out, delete the `if` below, `entropy_aware_advantages`, `entropy_score` and "eapo" in
    METHODS, and make "grpo" the default of `method`; --alpha, --phi, --without are idle then."""
    if method == "eapo":
        return entropy_aware_advantages(A, H, mask, group_size, alpha, phi)
    A = A[:, None]                                                            # (N, 1)
    rules = {"forking": lambda: A * (H >= H[mask].topk(math.ceil(int(mask.sum()) / 5)).values[-1]),
             "entroadv": lambda: A + torch.minimum(0.4 * H, A.abs() / 2),
             "w-reinforce": lambda: torch.where(A > 0, 0.1 * A, A)}
    return rules.get(method, lambda: A)().detach() * mask                     # (N, T)


# --------------------------------------------------------------------------------------------------
# Part 3. The verifier: is the boxed answer equal to the gold? (For how, come back later.) It scans
# LaTeX into tokens, reads them with a calculator and compares values. No algebra is needed: two
# polynomials of degree d agree at a point drawn from N numbers with probability d/N at most, as
# their difference has at most d roots (Schwartz and Zippel). So each variable gets three pseudo-
# random values. Fractions stay exact; roots, pi and sines are good to nine digits.
# --------------------------------------------------------------------------------------------------

LONGEST, MOST_TOKENS, MOST_BITS, ZERO = 500, 120, 23_000, [Fraction(0)]     # bits of a fraction
ALIASES = {other: token for token, others in {
    r"\frac": r"\dfrac \tfrac \cfrac", r"\binom": r"\dbinom \tbinom", r"\sqrt": "√ sqrt",
    "π": r"\pi pi", r"\infty": "∞", r"\emptyset": r"\varnothing", "-": "− –", "±": r"\pm",
    "*": r"\cdot \times × ·", "/": r"\div ÷", "(": r"\langle", "}": r"\}",
    "=": r"\in \approx", "≠": r"\ne \neq", "≤": r"\le \leq \leqslant", "≥": r"\ge \geq \geqslant",
    ",": r"; and or OR \cup ∪", "%": r"\% percent", ")": r"\rangle", r"\log": r"\ln ln log",
    "°": r"\circ \degree degree degrees", "|": r"\vert \lvert \rvert", '"unit': "cm mm km kg",
    "": r"\left \right \big \Big \bigl \bigr \Bigl \Bigr \, \; \: \! \( \) $ \$ ~ \displaystyle",
    r"\text": r"\mbox \textbf \textit \textrm \textnormal \mathrm \mathbf \mathbb \operatorname",
}.items() for other in others.split()}
KINDS = {**dict.fromkeys(ascii_letters, "letter"), **dict.fromkeys(digits + ".", "digit")}
CONSTANTS = {"π": math.pi, "e": math.e, "i": 1j, "%": Fraction(1, 100), "°": Fraction(1)}
FUNCTIONS = {"\\" + name: getattr(cmath, name) for name in "sin cos tan exp log".split()} | {
    r"\sec": lambda z: 1 / cmath.cos(z), r"\arcsin": cmath.asin, r"\arctan": cmath.atan,
    r"\csc": lambda z: 1 / cmath.sin(z), r"\cot": lambda z: 1 / cmath.tan(z)}
OPERATIONS = {
    "+": add, "-": sub, "*": mul, "/": truediv, "^": pow, r"\frac": truediv, "|": abs, **FUNCTIONS,
    "!": lambda n: Fraction(math.factorial(int(str(n)))),            # int("1/2") is a ValueError
    r"\binom": lambda n, k: Fraction(math.comb(int(str(n)), int(str(k))))}
BRACKETS = {"$": "$", "(": ")]", "[": ")]", "{": "}", r"\{": "}", "|": "|", r"\begin": r"\end"}
RELATION, SUM, PRODUCT, FACTOR, POWER = 4, 6, 7, 8, 9                # how tight operators bind
LEVEL = {**dict.fromkeys([*"$)]}|", r"\end"], 0), r"\\": 1, "&": 2, ",": 3, ":": 5, "+": SUM,
         "-": SUM, "*": PRODUCT, "/": PRODUCT, "^": POWER, **dict.fromkeys(FUNCTIONS, PRODUCT),
         **dict.fromkeys("=≠<≤>≥", RELATION)}


def extract_answer(response):
    """The content of the last complete \\boxed{...}; None if there is none among the last 20."""
    for piece in reversed(response.rsplit(r"\boxed{", 20)[1:]):
        depth = 1
        for i, (before, character) in enumerate(zip(" " + piece, piece[:LONGEST])):
            depth += {"{": 1, "}": -1}.get(character, 0) * (before != "\\")
            if depth == 0:
                return piece[:i]


def scan(text, thousands):
    """The tokens of LaTeX; mere notation leaves none, a subscript stays with its symbol: 204_5. A
    quote marks words: letters in \\text{..} and runs of over three. Other runs are products."""
    runs, tokens, prose = [], [""], False
    for kind, run in groupby(text, KINDS.get):                       # "12", "abc", but "+", "{"
        runs += ["".join(run)] if kind else run
    runs.reverse()                                                   # the next run is the last
    while runs:
        run, last = runs.pop(), tokens[-1]
        if run == "\\" and runs:
            run += runs.pop()
        elif run[0] in digits and last in (r"\frac", r"\sqrt", r"\binom"):
            runs += [run[1:]] * (len(run) > 1)                       # TeX takes one digit: \frac12
            run = run[0]
        token, coming = ALIASES.get(run, run), runs[-1] if runs else ""
        if token in ("_", r"\begin", r"\end"):
            size = 3 if coming == "{" else 1                         # {12} or 12
            group = "".join(runs.pop() for _ in runs[-size:])
            tokens[-1:] = [last + "_" + group.strip("{}")] if token == "_" else [last, token]
        elif token == r"\text" or prose and token == "}":
            prose = token == r"\text" and coming == "{" and bool(runs.pop())
        elif token == "," and thousands and last.isdecimal() and tokens[-2] not in ("(", "[", ",") \
                and coming[:3].isdecimal() and len(coming.split(".")[0]) == 3:
            tokens[-1] += runs.pop()                                 # 1,234
        elif token != run or run[0] not in ascii_letters:
            tokens += [token] * (token.strip() not in ("", "\\") and not token == last == ",")
        elif run not in CONSTANTS and (prose or len(run) > 3 or run == text and len(run) > 2):
            word = run.lower() if len(run) > 1 else run              # "two lines" is one word
            tokens[-1:] = [last + word] if last[:1] == '"' else [last, '"' + word]
        else:
            tokens += run
    return tokens[1:]


def compute(symbol, *numbers):
    """The results of an operation at each point, unless they have too many digits: 9^{9^{9^9}}."""
    size = lambda x: (abs(x.numerator) + x.denominator).bit_length() if type(x) is Fraction else 1
    grows, points = symbol in ("^", "!", r"\binom"), max(map(len, numbers))
    rows = [*zip(*(number * (points // len(number)) for number in numbers))]
    for row in rows:
        if max(size(row[0]) * abs(row[-1] if grows else 1), size(row[-1])) > MOST_BITS:
            raise ValueError("too many digits")
    return [OPERATIONS[symbol](*row) for row in rows]


def expression(tokens, level=0):
    """The value of what follows, as far as it binds tighter than `level`: operator precedence.
    expression = [sign] operand {operator expression | "!" | unit}
    operand    = number | name | word | bracket expression bracket | \\frac operand operand
                 | \\sin ["^" operand] expression | \\sqrt ["[" expression "]"] operand

    A number is a list, of one value or of three where variables touch it; all else is a tuple of
    kind and parts: , \\{} in any order, () (] [) [] & \\\\ : in order, = <, _ with a base."""
    whole = tokens[-1].isdecimal()
    sign = tokens.pop() if tokens[-1] in ("-", "+") else ""
    value = compute(sign, ZERO, expression(tokens, max(level, SUM))) if sign else operand(tokens)
    if whole and tokens[-1] == r"\frac":                             # 1\frac45 is 1 + 4/5
        part = operand(tokens)
        mixed = len(part) == 1 and type(part[0]) is Fraction and part[0] < 1
        value = compute("+" if mixed else "*", value, part)
    while True:
        symbol = tokens[-1]
        strength = LEVEL.get(symbol, 0 if symbol[0] in digits + "." else FACTOR)
        if symbol == "!":
            value = compute(tokens.pop(), value)
        elif symbol[0] == '"':
            expression(tokens, FACTOR)                               # a unit, and the 2 of cm^2
        elif strength <= level:
            return value
        elif strength < SUM:
            value = (symbol, value)
            while tokens[-1] == symbol:
                tokens.pop()
                value += (expression(tokens, strength),)
            if symbol in ">≥":                                       # 3 > x is x < 3
                value = ("<" if symbol == ">" else "≤", *reversed(value[1:]))
        else:
            operator = tokens.pop() if symbol in (*"+-*/^",) else "*"
            value = compute(operator, value, expression(tokens, strength + (strength == PRODUCT)))


def operand(tokens):
    """The value of a number, variable, bracket or function."""
    token = tokens.pop()
    name, _, index = token.partition("_")
    if token[0] in digits + ".":
        whole, _, part = name.partition(".")
        value = [Fraction(int(whole + part), 10 ** len(part))]
        return ("_", value, [Fraction(int(index))]) if index else value
    if token in CONSTANTS:
        return [CONSTANTS[token]]
    if token in BRACKETS:
        value, closer = expression(tokens), tokens.pop()
        if closer not in BRACKETS[token]:
            raise ValueError(token + closer)
        if value[0] == "," and token in ("(", "[", r"\{"):
            return (token + closer, *value[1:])
        return compute(token, value) if token in OPERATIONS else value
    if name in FUNCTIONS:                                            # \sin^2 2x is (sin(2x))^2
        exponent = operand(tokens) if tokens[-1] == "^" and tokens.pop() else [Fraction(1)]
        inner = operand(tokens) if tokens[-1] in BRACKETS else expression(tokens, PRODUCT)
        value = compute("^", compute(name, inner), exponent)
        return compute("/", value, [math.log(int(index))]) if index else value
    if token in (r"\frac", r"\binom"):
        return compute(token, operand(tokens), operand(tokens))
    if token == r"\sqrt":
        degree = operand(tokens) if tokens[-1] == "[" else [Fraction(2)]
        return compute("^", operand(tokens), compute("/", [Fraction(1)], degree))
    if not token.strip('\\"')[:1].isalpha():
        raise ValueError(token)
    return [1 + Fraction(crc32(f"{token}{k}".strip('"').encode()) % 1994, 997) for k in "123"]


def calculate(tokens):
    """The value of an answer; with ± in it, the list of both values."""
    if "±" in tokens:
        return (",", *(calculate([sign if t == "±" else t for t in tokens]) for sign in "+-"))
    return operand(["$", *reversed(tokens), "$"])                    # the next token is the last


def as_intervals(tokens):
    """Inequalities in a variable as intervals: x > 3 as (3, \\infty), 1 < x \\le 2 as (1, 2]."""
    result = []
    for _, piece in groupby(tokens, lambda t: t == ","):
        sides = [[*side] for _, side in groupby(piece, lambda t: t in (*"<≤>≥",))]
        if sides[1:2] and sides[1][0] in ">≥":                       # from low to high
            sides = [[{">": "<", "≥": "≤"}.get(t, t) for t in side] for side in sides[::-1]]
        if len(sides) == 3:                                          # x < 3, or 3 < x
            sides = [["-", r"\infty"], ["<"], *sides] if sides[0][0].isalpha() else \
                [*sides, ["<"], [r"\infty"]]
        if len(sides) == 5 and len(sides[2]) == 1 and sides[2][0].isalpha():
            low, first, _, second, high = sides
            sides = [["[" if first == ["≤"] else "("], low, [","], high,
                     ["]" if second == ["≤"] else ")"]]
        result += sum(sides, [])
    return result


def agree(ours, theirs, slack):
    """Whether values are equal: to a relative slack, structures by parts, equations by a factor."""
    kinds = {value[0] if type(value) is tuple else "" for value in (ours, theirs)}
    unordered = kinds <= {",", r"\{}"}
    if kinds == {"", "_"}:                                           # 204 is 204_5
        return agree(*(v[1] if v[0] == "_" else v for v in (ours, theirs)), slack)
    if len(ours) != len(theirs) or len(kinds) > 1 and not unordered and kinds != {",", "()"}:
        return False                                                 # but 1, 2 is (1, 2)
    if kinds == {""}:
        inexact = any(type(number) is not Fraction for number in ours + theirs)
        slack = max(slack, 1e-9) if inexact else slack
        return all(a == b or abs(a - b) <= (slack * min(abs(a), abs(b)) or 1e-13 * inexact)
                   for a, b in zip(ours, theirs))
    if LEVEL.get(ours[0]) == RELATION and len(ours) == 3 and ours[1] != theirs[1]:
        ratio = compute("/", compute("-", *ours[1:]), compute("-", *theirs[1:]))
        allowed = ratio[0] != 0 and (ours[0] in "=≠" or ratio[0].real > 0)
        return allowed and len(ratio) > 1 and agree(ratio, ratio[:1] * len(ratio), 0)
    rest = [*theirs[1:]]                                             # 1, 1 is not 1, 2
    return all(any(agree(part, other, slack) and rest.pop(k)
                   for k, other in enumerate(rest if unordered else rest[:1])) for part in ours[1:])


def equal(ours, theirs):
    """Whether two lists of tokens are the same or mean the same; False if they are unreadable.

    x = in front of a value is left out. Of a gold with decimals of three digits or more, all that
    rounds to it is equal, within 0.11%: the slack, for the whole of it."""
    if ours == theirs or len(ours + theirs) > 2 * MOST_TOKENS:
        return ours == theirs != []
    for one, other in ((ours, theirs), (theirs, ours)):
        if one[1:2] == ["="] and one[0].isalpha() and ("=" not in other or one[:2] == other[:2]):
            one[:] = [t for t in one if t not in one[:2] or one.count(t) > one.count("=")]
        if {*one} & {*"<≤>≥"} and not {*other} & {*"<≤>≥"}:
            one[:] = as_intervals(one)
    with contextlib.suppress(ArithmeticError, ValueError, TypeError, IndexError, RecursionError):
        decimals = [[int(t.replace(".", "")) for t in x if "." in t[1:]] for x in (ours, theirs)]
        our_half, half = (0.5 / (max(numbers, default=0) or math.inf) for numbers in decimals)
        slack = max(min(our_half, 2e-6), min(half, 1.1e-3) * (half <= 0.005))
        return agree(calculate(ours), calculate(theirs), slack)
    return False


def same_answer(prediction, gold):
    """Whether two answers are equal in one reading: 1,234 may be a number or two, 50% 50 or 1/2."""
    texts = [text[:2 * LONGEST].strip("$ \n").removesuffix(".") for text in (prediction, gold)]
    if max(map(len, texts)) > LONGEST:
        return False
    if all(text.isascii() and text.isdecimal() for text in texts):   # most answers are
        return int(texts[0]) == int(texts[1])
    texts = [text.replace("{,}", "").replace(r",\!", "") for text in texts]
    pairs = [[scan(text, commas) for text in texts] for commas in {False, "," in "".join(texts)}]
    pairs += [[[t for t in x if t != "%"] for x in pair] for pair in pairs if "%" in sum(pair, [])]
    return any(equal(*pair) for pair in pairs)


def is_correct(response, gold):
    """Whether the response's last \\boxed{} holds the gold answer, or one of a list of golds."""
    answer = extract_answer(response)
    golds = [f"{Decimal(str(g)):f}" if type(g) is float else str(g)         # 0.00001, not 1e-05
             for g in (gold if type(gold) in (list, tuple) else [gold])]
    golds = [g.removesuffix(".0") for g in golds]
    return answer is not None and any(same_answer(answer, extract_answer(g) or g) for g in golds)


# --------------------------------------------------------------------------------------------------
# Part 4. Problems: a task made here, and problems from files and from the hub, as prompt tokens.
# --------------------------------------------------------------------------------------------------

@dataclass
class Problem:
    problem: str
    answer: object = None     # gold answer, or a list of alternatives
    solution: str = ""        # worked solution, for imitation only
    ids: list = None          # the prompt as tokens: chat template or suffix applied, once


def pupil(a, b, rng):
    """Column addition written by a pupil who has not understood carrying: 5170 + 6749 becomes
    `9+0=9 7+4=11 7+1=8 5+6=11 \\boxed{11819}` or, with the carry, `0+9=9 7+4=11 7+1+1=9 ...`.

    Columns run from the right. Pupils carry when a sum feels big, with probability
    sigmoid((sum - 12.5) / 1.5): to write +1 or not is a fork that decides the answer. Which digit
    of a column comes first is a fork that decides nothing. All other tokens are routine."""
    columns, result, total = [], "", 0
    for x, y in zip(reversed(f"{a:04}"), reversed(f"{b:04}")):
        carry = rng.random() < 1 / (1 + math.exp((12.5 - total) / 1.5)) if columns else 0
        x, y = rng.sample((x, y), 2)
        total = int(x) + int(y) + carry
        columns.append(f"{x}+{y}{'+1' * carry}={total}")
        result = str(total % 10) + result
    return " ".join(columns) + f" \\boxed{{{total}{result[1:]}}}"


def addition(split, warmup=20800, train=8192, exam=128):
    """The default task: sums of two 4-digit numbers. The three splits share no problem."""
    rng = random.Random(0)
    pairs = [divmod(n, 10 ** 4) for n in rng.sample(range(10 ** 8), warmup + train + exam)]
    part = {"exam": pairs[:exam], "train": pairs[exam:exam + train], "warmup": pairs[-warmup:]}
    return [Problem(f"{a:04}+{b:04}=", str(a + b), pupil(a, b, rng)) for a, b in part[split]]


@contextlib.contextmanager
def using(source):
    """Around what reads or writes files: what goes wrong there (no network, no space) ends the run
    with one line."""
    try:
        yield
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as e:
        what = " ".join(f"{str(e) or repr(e)} {e.__cause__ or ''}".split())[:300]
        raise SystemExit(f"eapo: cannot use {source}: {what}") from e


def read_rows(source, split):
    """The rows of a .jsonl, .csv or .parquet file, or of a hub data set `id[:split]`, as dicts."""
    kind, (name, _, part) = source.rpartition(".")[2].lower(), source.partition(":")
    if kind == "jsonl":
        rows = []
        with open(source, encoding="utf-8-sig") as f:
            for n, line in enumerate(f, 1):
                with using(f"{source}, line {n}"):
                    rows += [json.loads(line)] if line.strip() else []
                need(not rows or isinstance(rows[-1], dict), f"{source}, line {n}: not an object")
        return rows
    if kind in ("csv", "parquet"):
        return list(datasets.load_dataset(kind, data_files=source, split="train"))
    parts = datasets.get_dataset_split_names(name)
    usual = parts if len(parts) == 1 else ["test", "train"] if split == "exam" else ["train"]
    found = [p for p in ([part] if part else usual) if p in parts]
    need(found, f"{source} has the splits {', '.join(parts)}: name one as {name}:{parts[0]}")
    return list(datasets.load_dataset(name, split=found[0]))


COLUMNS = {         # what a column may be called; its own name wins
    "problem": ("problem", "question", "prompt"), "answer": ("answer", "ground_truth", "solution"),
    "solution": ("solution", "response", "completion")}


def load_problems(run, source, split):
    """The problems of a data source, their prompts as tokens. split: train, exam or warmup."""
    if source == "addition":
        problems = addition(split)
    else:
        with using(source):
            rows = read_rows(source, split)
        need(rows, f"{source}: no rows")
        roles = {role: [name for name in COLUMNS[role] if name in rows[0]]
                 for role in ("problem", "solution" if split == "warmup" else "answer")}
        for role, names in roles.items():
            need(len(names) == 1 or names[:1] == [role], f"{source} has the columns "
                 f"{', '.join(rows[0])}: which is the {role}? name it {role}")
        for n, row in enumerate(rows, 1):
            need(all(row.get(names[0]) not in (None, "", []) for names in roles.values()),
                 f"{source}, row {n}: {' or '.join(roles)} is empty")
            need(not isinstance(row[roles["problem"][0]], (list, dict)),
                 f"{source}, row {n}: the problem must be text; the chat template is put around it")
        problems = [Problem(**{role: row[names[0]] for role, names in roles.items()})
                    for row in rows]
    for p in run.world.bar(problems, f"tokens of {source}", 5000, leave=False):
        p.ids = render(run.tokenizer, str(p.problem))
    limit = run.cfg.max_prompt_tokens
    short = [p for p in problems if len(p.ids) <= limit]
    need(short, f"{source}: no prompt is within --max-prompt-tokens {limit}")
    if len(short) < len(problems):
        run.world.print(f"{source}: {len(problems) - len(short)} of {len(problems)} prompts left "
                        f"out, longer than --max-prompt-tokens {limit}")
    return short


SUFFIX = "\nPlease reason step by step, and put your final answer within \\boxed{}."


def render(tokenizer, problem):
    """A problem as prompt tokens. The chat template, if any, writes BOS itself, so none is added to
    it; without one, the paper's suffix is put behind the problem and the tokenizer's BOS before."""
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template([{"role": "user", "content": problem}],
                                             add_generation_prompt=True)["input_ids"]
    ids = tokenizer(problem + SUFFIX).input_ids
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids


class Stream:
    """Problems without end, every epoch in another order; `position` counts those handed out."""

    def __init__(self, problems, seed):
        self.problems, self.seed, self.position = problems, seed, 0

    def take(self, n):
        """The next n problems, each with its number in the stream."""
        start, size, self.position = self.position, len(self.problems), self.position + n
        ordered = [p for epoch in range(start // size, -(-self.position // size))
                   for p in random.Random(f"{self.seed}/{epoch}").sample(self.problems, size)]
        return list(enumerate(ordered[start % size:][:n], start))


# --------------------------------------------------------------------------------------------------
# Part 5. Rollouts. From prompts to a Batch: G responses to each, and what pi_old says of every
# token of them: its log-probability, and the entropy H where it was drawn.
# --------------------------------------------------------------------------------------------------

@dataclass
class Batch:
    """N responses, the G responses to one prompt in adjacent rows; in host memory, but for the
    micro-batch that a GPU works on. Rows are right-padded: prompt, response, zeros. Masks come from
    the lengths, never from token values, as many models pad with their stop token."""
    ids: torch.Tensor               # (N, L) prompt, then response
    prompt_len: torch.Tensor        # (N,)   tokens
    response_len: torch.Tensor      # (N,)   tokens, the stop token included
    logp: torch.Tensor = None       # (N, T) log pi_old of each response token, nats
    H: torch.Tensor = None          # (N, T) entropy of pi_old before each response token, nats
    ended: torch.Tensor = None      # (N,)   the model stopped by itself; False: truncated
    gap: torch.Tensor = None        # (N,)   sum of |log pi_sampler - log pi_old|, nats
    number: torch.Tensor = None     # (N,)   of the problem in its stream
    right: torch.Tensor = None      # (N,)   the verifier's verdict
    reward: torch.Tensor = None     # (N,)   r
    advantage: torch.Tensor = None  # (N,)   A
    kept: torch.Tensor = None       # (N,)   the group is learned from
    credit: torch.Tensor = None     # (N, T) A^CA or what another method makes of A, 0 outside mask
    quadrant: torch.Tensor = None   # (N, T) 1 to 4, 0 outside mask
    penalty: torch.Tensor = None    # (N, T) KL-Cov: True where |log rho| is added to the loss
    weight: torch.Tensor = None     # (N, T) what each token counts in the loss

    @property
    def mask(self):
        """(N, T) True on response tokens."""
        T = max(self.response_len.tolist(), default=0)
        return torch.arange(T, device=self.ids.device) < self.response_len[:, None]

    def rows(self, i):
        """The Batch of rows i (indices, a slice or True/False), cut to its own longest row."""
        few = Batch(**{name: x[i] for name, x in vars(self).items() if x is not None})
        L, T = max((few.prompt_len + few.response_len).tolist(), default=0), few.mask.shape[1]
        return Batch(**{name: x if x.dim() == 1 else x[:, :L if name == "ids" else T]
                        for name, x in vars(few).items() if x is not None})

    def to(self, device):
        """The Batch on another device."""
        return Batch(**{name: x.to(device) for name, x in vars(self).items() if x is not None})

    def response(self, i):
        """The tokens of response i, a list of ids."""
        return self.ids[i, self.prompt_len[i]:][:self.response_len[i]].tolist()


def pack(prompts, responses):
    """Lists of token ids, one pair a row -> a Batch with ids and lengths, logp and H of zeros, all
    responses ended."""
    rows = [torch.tensor(p + r) for p, r in zip(prompts, responses)] or [torch.zeros(0)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)[:len(prompts)].long()
    batch = Batch(ids, *(torch.tensor([*map(len, x)]).long() for x in (prompts, responses)))
    logp, H = torch.zeros(2, *batch.mask.shape)
    return replace(batch, logp=logp, H=H, ended=batch.response_len >= 0)


def join(batches):
    """Batches below one another, padded to the longest."""
    def stack(parts):
        width = max(p.shape[-1] for p in parts)
        return torch.cat([p if p.dim() == 1 else torch.nn.functional.pad(p, (0, width - p.shape[1]))
                          for p in parts])
    return Batch(**{name: stack([getattr(b, name) for b in batches])
                    for name, x in vars(batches[0]).items() if x is not None})


def log_prob_and_entropy(logits, tokens, temperature):
    """log pi(token) and H of pi = softmax(logits / temperature), over the full vocabulary in fp32.
    (M, V), (M,) -> (M,), (M,). The sampling loop, `rescore` and the update all come here.
    Temperature 0, which draws greedily, counts as 1. top_p does not enter: tokens are drawn from a
    truncated pi, but pi_old and rho are those of all of it, as in verl."""
    logits = logits.float() / (temperature or 1.0)
    logp = logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
    return logp, token_entropy(logits)


def draw(logits, u, temperature, top_p):
    """One token a row: (rows, V), (rows,) in [0, 1) -> (rows,). It is the token on whose stretch
    u falls when all are laid end to end, each as long as its probability. Temperature 0 takes the
    likeliest; top_p < 1 lays out the fewest tokens that hold that much, always at least one."""
    if temperature == 0:
        return logits.argmax(-1)
    p, token = (logits.float() / temperature).softmax(-1), None
    if top_p < 1:
        p, token = p.sort(-1, descending=True)
        p = torch.where(p.cumsum(-1) - p < top_p, p, 0)      # likelier tokens hold below top_p
    ends = p.double().cumsum(-1)                                                       # (rows, V)
    at = torch.searchsorted(ends, u[:, None] * ends[:, -1:], right=True)               # (rows, 1)
    return (at if token is None else token.gather(-1, at))[:, 0]


class RoomyLayer(transformers.cache_utils.DynamicLayer):
    """One layer's KV cache: keys and values of the prompts, (B, heads, P, d), then repeated for the
    G tries, with room for all tokens to come: else each new one would copy the whole cache."""
    used = 0                                            # tokens

    def get_seq_length(self):
        return self.used

    def make_room(self, group_size, tokens):
        self.keys, self.values = (
            torch.nn.functional.pad(x.repeat_interleave(group_size, 0), (0, 0, 0, tokens))
            for x in (self.keys, self.values))

    def update(self, keys, values, *args, **kwargs):
        old, self.used = self.used, self.used + keys.shape[2]
        if old == 0:
            return super().update(keys, values)
        self.keys[:, :, old:self.used], self.values[:, :, old:self.used] = keys, values
        return self.keys[:, :, :self.used], self.values[:, :, :self.used]


def attention_of_one_token(module, q, k, v, mask, scaling=None, **how):
    """softmax(q k / sqrt(d)) v  for the newest token of each row; all else goes to torch's sdpa.
    q (rows, heads, 1, d), k and v (rows, fewer heads, S, d): a key serves several query heads,
    which take the place of positions here. sdpa, given a mask, would copy a key for each of them.
    """
    rows, heads, n, d = q.shape
    if n > 1:
        return sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, **how)
    scores = (q.view(rows, k.shape[1], -1, d) @ k.transpose(2, 3)).float() * scaling
    scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)   # (rows, .., .., S)
    return (scores.softmax(-1).to(v.dtype) @ v).view(rows, 1, heads, d), None


transformers.AttentionInterface.register("one token", attention_of_one_token)       # see `load`
transformers.AttentionMaskInterface.register("one token", sdpa_mask)


@torch.no_grad()
def sample_loop(lm, prompts, group_size, max_tokens, temperature, top_p, stop_ids, seeds):
    """G responses to each prompt -> a Batch of N rows: decoding, written out.
    Each prompt is read once and its KV cache repeated G times, then one token at a time is drawn
    for all rows. A row that drew a stop token is finished, the stop token belonging to it; finished
    rows leave the batch once they are a fifth of it. Prompts are padded on the left, so that all
    rows draw their next token in the same column. Every token is drawn by a number that depends on
    its prompt's seed, its try and its place alone (given G and max_tokens): the same dice fall on
    one GPU or eight, and in a resumed run. logp and H come free from the logits, before top_p; of a
    bf16 copy, `rescore` will replace them."""
    device, P, stop = lm.device, max(map(len, prompts)), torch.tensor(stop_ids, device=lm.device)
    ids = torch.tensor([[0] * (P - len(p)) + p for p in prompts], device=device)       # (B, P)
    seen = torch.tensor([[0] * (P - len(p)) + [1] * len(p) for p in prompts], device=device)
    u = torch.cat([torch.rand(group_size, max_tokens, generator=torch.Generator().manual_seed(s))
                   for s in seeds]).to(device)                                         # (N, max)
    tokens, length = torch.zeros_like(u, dtype=torch.long), u.new_zeros(len(u), dtype=torch.long)
    (logp, H), row = torch.zeros(2, *u.shape, device=device), torch.arange(len(u), device=device)
    cache, writes = transformers.Cache(layer_class_to_replicate=RoomyLayer), row >= 0  # (rows,)
    new, position = ids, (seen.cumsum(1) - 1).clamp(min=0)
    for t in range(max_tokens):
        logits = lm(new, attention_mask=seen, position_ids=position, past_key_values=cache,
                    use_cache=True, logits_to_keep=1).logits[:, -1]                    # (rows, V)
        if t == 0:
            for layer in cache.layers:
                layer.make_room(group_size, max_tokens)
            logits, seen = (x.repeat_interleave(group_size, 0) for x in (logits, seen))
        token = draw(logits, u[row, t], temperature, top_p)                            # (rows,)
        tokens[row, t], length[row[writes]] = token, t + 1
        logp[row, t], H[row, t] = log_prob_and_entropy(logits, token, temperature)
        writes = writes & ~torch.isin(token, stop)
        if not writes.any():
            break
        if writes.sum() <= 0.8 * len(writes):       # not sooner: each time the cache is copied
            cache.batch_select_indices(writes.nonzero()[:, 0])
            row, token, seen, writes = (x[writes] for x in (row, token, seen, writes))
        new, position = token[:, None], seen.sum(1, keepdim=True)                      # (rows, 1)
        seen = torch.cat([seen, torch.ones_like(position)], 1)
    responses = [x[:n] for x, n in zip(tokens.tolist(), length.tolist())]
    batch = pack([p for p in prompts for _ in range(group_size)], responses)
    logp, H = (torch.where(batch.mask, x.cpu()[:, :batch.mask.shape[1]], 0) for x in (logp, H))
    ended = torch.isin(tokens.gather(1, length[:, None] - 1)[:, 0], stop)              # (N,)
    return replace(batch, logp=logp, H=H, ended=ended.cpu())


def groups_at_once(c, width, tokens, group_size, free):
    """How many groups to sample at a time, at most 512 rows, in 4/5 of the free bytes; and what one
    takes: a KV cache of so many tokens a row, in numbers of `width` bytes, by a model's config c,
    and what `draw` makes of the logits of one token, 40 bytes each as measured."""
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    cache = 2 * c.num_hidden_layers * heads * head * width * tokens
    one = group_size * (cache + 40 * c.vocab_size)
    return max(1, int(min(512 // group_size, 0.8 * free / one))), one


# --------------------------------------------------------------------------------------------------
# Part 6. The policy: a causal language model, the two numbers we need of it at every response
# token, and its optimizer step. Any model on a CPU, and --model tiny anywhere: one process has the
# whole model, in fp32, and samples from it. Any other model on GPUs, one or many: each process has
# a shard of the fp32 weights and multiplies in bf16; a whole bf16 copy samples, and as it rounds
# otherwise, `rescore` takes logp and H from the policy. (torchrun on CPUs: shards and a copy too,
# all in fp32, no `rescore`.) On any GPU micro-batches are larger.
# --------------------------------------------------------------------------------------------------

CHUNK = 2 ** 25     # logits in memory at a time, as a count of numbers: 128 MB in fp32


class ChunkedLogProbAndEntropy(torch.autograd.Function):
    """log pi(token) and H from hidden states (M, D) and the head's weight (V, D): (M,), (M,).

    An (M, V) matrix of logits is the largest thing in training: 4096 tokens at V = 152,064 are
    2.5 GB, several times over with gradients. So it is never made: tokens go through the head a
    chunk at a time, in forward and again in backward, where the gradients at the logits z are

        d log pi(o) / d z_v = [v = o] - p_v          (5): it vanishes where pi is sure of o
        d H / d z_v         = - p_v (log p_v + H)    z: logits over the temperature"""
    @staticmethod
    def forward(ctx, hidden, weight, tokens, temperature):
        rows = max(1, CHUNK // len(weight))
        parts = [log_prob_and_entropy(h @ weight.T, y, temperature)
                 for h, y in zip(hidden.split(rows), tokens.split(rows))]
        logp, H = (torch.cat(x) for x in zip(*parts))
        ctx.save_for_backward(hidden, weight, tokens, H)
        ctx.temperature, ctx.rows = temperature, rows
        return logp, H

    @staticmethod
    def backward(ctx, to_logp, to_H):
        hidden, weight, tokens, H = ctx.saved_tensors
        to_hidden, to_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for i in range(0, len(tokens), ctx.rows):
            k = slice(i, i + ctx.rows)
            to_z = ((hidden[k] @ weight.T).float() / ctx.temperature).log_softmax(-1)   # log p
            p = to_z.exp()
            to_z.clamp_(min=-1e4)                           # 0 times -inf would be nan
            to_z.add_(H[k, None]).mul_(to_H[k, None]).add_(to_logp[k, None]).mul_(p).neg_()
            to_z.scatter_add_(1, tokens[k, None], to_logp[k, None])
            to_z = (to_z / ctx.temperature).to(weight.dtype)
            to_hidden[k] = to_z @ weight
            to_weight.addmm_(to_z.T, hidden[k])
        return to_hidden, to_weight, None, None


class Policy(torch.nn.Module):
    """pi_theta: a transformers causal LM whose forward returns what RL needs instead of logits."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    def forward(self, batch, temperature):
        """logp and H of every response token under the current weights: (N, T), (N, T), 0 outside.
        The hidden state at position p predicts token p + 1, so response token t, which stands at
        prompt_len + t, is predicted one to its left. Padding is on the right, where a causal model
        cannot see it from any real token, so no attention mask is needed. A batch without rows
        runs through the model too: on several GPUs all must run as often as the busiest."""
        ids, mask = batch.ids, batch.mask
        hidden = self.lm.get_decoder()(input_ids=ids if len(ids) else ids.new_zeros(1, 1),
                                       use_cache=False).last_hidden_state              # (N, L, D)
        row, t = mask.nonzero(as_tuple=True)                                           # (M,) both
        at = batch.prompt_len[row] + t                                                 # (M,)
        logp, H = ChunkedLogProbAndEntropy.apply(
            hidden[row, at - 1], self.lm.get_output_embeddings().weight, ids[row, at], temperature)
        place = lambda x: torch.zeros(mask.shape, device=ids.device).index_put((row, t), x)
        return place(logp), place(H)


def tiny_model(seed):
    """A Llama of 0.4M parameters with random weights, and a tokenizer of characters and \\boxed{:
    GPT-2's without a merge ("Ġ" is its space). By its chat template a problem is the prompt."""
    pieces = ["<pad>", "<eos>", "<unk>", *"0123456789+=Ġ}", "\\boxed{"]
    tokenizer = transformers.GPT2Tokenizer(
        vocab={piece: n for n, piece in enumerate(pieces)}, merges=[], bos_token=None,
        pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        chat_template="{{ messages[0]['content'] }}")
    tokenizer.add_tokens(pieces[-1:])
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(pieces), hidden_size=128, intermediate_size=384, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        initializer_range=0.08, tie_word_embeddings=True, bos_token_id=None, eos_token_id=1,
        pad_token_id=0)), tokenizer


@dataclass
class Run:
    """What every phase of a run shares."""
    cfg: Config
    world: object               # the processes of the run, part 8
    out: str                    # folder of the run
    policy: Policy
    tokenizer: object
    stop_ids: list              # a response ends with one of these, the tokenizer's own first
    sampler: object             # the model to sample from: the policy's, or a whole copy of it
    exams: dict = field(default_factory=dict)           # {short name: problems}
    rows: list = field(default_factory=list)            # of metrics.jsonl
    lines: list = field(default_factory=list)           # results of exams, as printed
    clock: Counter = field(default_factory=Counter)     # of this step: seconds, peak bytes

    @contextlib.contextmanager
    def timed(self, phase):
        """Add the time of a with-block to the clock, and its peak of GPU memory."""
        start, name, cuda = time.perf_counter(), f"bytes_{phase}", torch.cuda.is_available()
        self.world.phase = phase
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        yield
        self.clock[f"seconds_{phase}"] += time.perf_counter() - start
        self.clock[name] = max(self.clock[name], torch.cuda.max_memory_allocated() if cuda else 0)

    @torch.no_grad()
    def fill_sampler(self):
        """The sampler; if it is an emptied copy, with the weights of the policy put into it."""
        for mine, theirs in zip(self.sampler.parameters(), self.policy.lm.parameters()):
            if not mine.numel():
                mine.data = self.world.whole(theirs).to(self.sampler.device, mine.dtype, copy=True)
        return self.sampler

    def empty_sampler(self):
        """Free the copy's weights: the update needs the room, and will outdate them."""
        for mine in self.sampler.parameters() if self.sampler is not self.policy.lm else []:
            mine.data = mine.data.new_empty(0)


def load(cfg, world, out):
    """The policy with fp32 weights, its tokenizer, the ids that end a response: a Run."""
    if cfg.model == "tiny":
        lm, tokenizer = tiny_model(cfg.seed)
    else:
        with using(cfg.model):
            lm = AutoModelForCausalLM.from_pretrained(cfg.model, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(cfg.model)
    ends = lm.generation_config.eos_token_id
    ends = [tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])]
    stop_ids = [x for x in dict.fromkeys(ends) if x is not None]
    need(stop_ids, f"{cfg.model}: neither tokenizer nor generation config names a stop token")
    lm.generation_config = GenerationConfig(eos_token_id=stop_ids)  # hub ones may not be savable
    if lm.config._attn_implementation == "sdpa":
        lm.set_attn_implementation("one token")
    lm, probe = lm.eval(), torch.tensor([stop_ids[:1] * 2])         # eval: no dropout
    with torch.no_grad():
        hidden = lm.get_decoder()(probe, use_cache=False).last_hidden_state
        same = torch.allclose(hidden @ lm.get_output_embeddings().weight.T, lm(probe).logits,
                              atol=1e-3)
    need(same, f"{cfg.model} makes its logits otherwise than by one matrix (a bias, a soft cap, a "
               "scale): ChunkedLogProbAndEntropy would have to do the same")
    sampler = lm
    if world.sharded:
        with world.device:
            sampler = AutoModelForCausalLM.from_config(
                lm.config, dtype=torch.bfloat16 if world.bf16 else torch.float32).eval()
    run = Run(cfg, world, out, world.shard(Policy(lm), cfg.offload), tokenizer, stop_ids, sampler)
    run.empty_sampler()
    return run


def micro_batches(run, batch):
    """Row indices cut so that rows * longest row <= microbatch_tokens, or one row where that alone
    is longer. Longest rows first, so that neighbours are alike and little is padding. The same
    number on every GPU: who has less to do gets empty ones."""
    lengths, cuts = batch.prompt_len + batch.response_len, []
    order = lengths.argsort(descending=True, stable=True)
    while len(order):
        n = max(1, run.world.tokens // int(lengths[order[0]]))
        cuts.append(order[:n])
        order = order[n:]
    return cuts + [order[:0]] * (max(run.world.gather(len(cuts))) - len(cuts))


def descend(run, optimizer, batch, loss_of):
    """One optimizer step on the sum of loss_of(micro-batch, logp, H) over micro-batches that fit in
    memory. batch.weight is first divided by its sum over all processes, so that a sum weighted by
    it is a mean. -> the loss, and the norm of the gradient before it is clipped to 1."""
    world, loss = run.world, 0.0
    batch.weight = batch.weight / sum(world.gather(float(batch.weight.sum())))
    for i in micro_batches(run, batch):
        micro = batch.rows(i).to(world.device)
        part = loss_of(micro, *run.policy(micro, run.cfg.temperature))
        (part * world.size).backward()      # FSDP will average over GPUs what is to be summed
        loss += float(part.detach())
    norm = float(world.whole(torch.nn.utils.clip_grad_norm_(run.policy.parameters(), 1.0)))
    need(math.isfinite(norm), f"the gradient is {norm}; nothing was changed by it. Look at the "
                              "learning rate and the last lines of metrics.jsonl")
    optimizer.step()
    optimizer.zero_grad()
    return sum(world.gather(loss)), norm


def learn(run, optimizer, mini):
    """One optimizer step on L (2) over a mini-batch. To it entroreg adds - 0.001 mean(H) (our
    number: the paper names none), and kl-cov mean(penalty * |log rho|), means as that of (2).

    -> the loss; the gradient norm; how many tokens had their gradient stopped by `surrogate`;
    and H under the current weights minus H when sampled, summed by quadrant, (5,)."""
    cfg, seen = run.cfg, torch.zeros(6, dtype=torch.double)
    clips = cfg.clip_low, cfg.clip_high, cfg.clip_c

    def loss_of(micro, logp, H):
        A, w, m = micro.credit, micro.weight, micro.mask
        loss = policy_loss(logp, micro.logp, A, w, *clips)                    # (2)
        if cfg.method == "entroreg":
            loss = loss - 0.001 * (H * w).sum()
        if cfg.method == "kl-cov":
            loss = loss + ((logp - micro.logp).abs() * micro.penalty * w).sum()
        with torch.no_grad():
            rho = (logp - micro.logp).exp()
            seen[0] += (surrogate(rho, A, *clips) != rho * A).sum().cpu()
            seen[1:] += torch.bincount(micro.quadrant[m], (H - micro.H)[m].double(), 5).cpu()
        return loss

    mini.weight = token_weights(mini.mask, cfg.group_size, cfg.loss_mean)     # (N, T)
    loss, norm = descend(run, optimizer, mini, loss_of)
    clipped, *drift = sum(run.world.gather(seen)).tolist()
    return loss, norm, clipped, drift


def imitate(run, problems):
    """Warm-up: make worked solutions likelier, token by token, so that RL has something to mark.
    RL can only reinforce what the model already tries now and then. The loss is - mean log p over
    the tokens of the solutions and their stop tokens, cut to max_response_tokens, at the sampling
    temperature: (2) with log p in the place of rho A."""
    cfg, world, stream = run.cfg, run.world, Stream(problems, run.cfg.seed)
    optimizer = torch.optim.AdamW(run.policy.parameters(), betas=(0.9, 0.95), weight_decay=0.0,
                                  fused=True)
    bar = world.bar(range(cfg.warmup_steps), "warm-up")
    for step in bar:
        left = 1 - step / cfg.warmup_steps
        rate = cfg.warmup_learning_rate * min(1.0, (step + 1) / 20, left / 0.3)
        optimizer.param_groups[0]["lr"] = rate
        mine = world.share([p for _, p in stream.take(16)])
        responses = [run.tokenizer(str(p.solution), add_special_tokens=False).input_ids
                     + run.stop_ids[:1] for p in mine]
        batch = pack([p.ids for p in mine], [r[:cfg.max_response_tokens] for r in responses])
        batch.weight = batch.mask.float()
        loss, _ = descend(run, optimizer, batch,
                          lambda micro, logp, H: -(logp * micro.weight).sum())
        bar.set_postfix_str(f"loss {loss:.3f} nats a token", refresh=False)
        if world.asked_to_stop():
            break
    bar.close()


# --------------------------------------------------------------------------------------------------
# Part 7. Try, mark, compare, look. On several GPUs each process samples and marks its share of the
# problems; then all have the whole Batch, and each adds its share of a mini-batch to one gradient.
# --------------------------------------------------------------------------------------------------

def attempt(run, numbered, what, n, temperature, top_p):
    """n responses to each (number, problem), marked: a Batch, by number, with `right` and `reward`,
    +1 or -1 (less with --overlong). The dice depend on the seed, on `what` (training or the exam's
    name) and on the number. A reward of your own goes where `reward` is set, below 0 for what
    `quadrants` shall call wrong. Exams still count `right`, and `roll_out` drops groups by it."""
    cfg, lm, mine = run.cfg, run.fill_sampler(), run.world.share(numbered)
    longest = max((len(p.ids) for _, p in mine), default=0) + cfg.max_response_tokens
    k, _ = groups_at_once(lm.config, lm.dtype.itemsize, longest, n, run.world.free())
    seeds = [crc32(f"{cfg.seed} {what} {number}".encode()) for number, _ in mine]
    with run.timed("sample"):
        batch = join([pack([], [])] + [
            sample_loop(lm, [p.ids for _, p in mine[i:i + k]], n, cfg.max_response_tokens,
                        temperature, top_p, run.stop_ids, seeds[i:i + k])
            for i in run.world.bar(range(0, len(mine), k), "sampling", 5, leave=False)])
    theirs = batch.logp
    if run.world.bf16:
        rescore(run, batch, temperature)
    batch.gap = (theirs - batch.logp).abs().sum(1)
    batch.number = torch.tensor([number for number, _ in mine]).long().repeat_interleave(n)
    batch.right = torch.tensor([is_correct(text, mine[i // n][1].answer)
                                for i, text in enumerate(texts(run, batch))]).bool()
    batch.reward = torch.where(batch.right, 1.0, -1.0)     # row i: a try at mine[i // n]
    if cfg.overlong:            # DAPO's soft penalty, 0 to -1 over the last share of the tokens
        last = cfg.overlong * cfg.max_response_tokens
        batch.reward -= (1 - (cfg.max_response_tokens - batch.response_len) / last).clamp(0, 1)
    batch = join(run.world.gather(batch))               # what all processes tried
    return batch.rows(batch.number.argsort(stable=True))


def texts(run, batch):
    """The responses as text, without stop tokens and the like."""
    return run.tokenizer.batch_decode([*map(batch.response, range(len(batch.ids)))],
                                      skip_special_tokens=True)


@torch.no_grad()
def rescore(run, batch, temperature):
    """Set logp and H of a batch to those of the policy itself, so that rho compares it with itself:
    the sampler, a bf16 copy with a KV cache, rounds otherwise."""
    with run.timed("score"):
        shape = batch.mask.shape
        batch.logp, batch.H = torch.zeros(shape), torch.zeros(shape)    # not views of one: pickled
        for i in micro_batches(run, batch):
            logp, H = run.policy(batch.rows(i).to(run.world.device), temperature)
            batch.logp[i, :logp.shape[1]], batch.H[i, :H.shape[1]] = logp.cpu(), H.cpu()


def roll_out(run, stream):
    """Try and mark, until prompts_per_step groups can teach something or the rounds are used up:
    a Batch of all that was tried, `kept` where it can teach.

    A group that is all right or all wrong teaches nothing about being right: its A are 0, or with
    --overlong about length alone. It is never learned from; while rounds are left, other problems
    are tried in its place (dynamic sampling)."""
    cfg, G, tried, missing = run.cfg, run.cfg.group_size, [], run.cfg.prompts_per_step
    while missing and len(tried) <= cfg.resample:
        batch = attempt(run, stream.take(missing), "train", G, cfg.temperature, cfg.top_p)
        right = batch.right.view(-1, G)
        batch.kept = (right.any(1) & ~right.all(1)).repeat_interleave(G)
        missing -= int(batch.kept.sum()) // G
        tried.append(batch)
    return join(tried)


def give_credit(run, batch):
    """Set batch.advantage, batch.quadrant and what each token is reinforced by under cfg.method:
    batch.credit, and for kl-cov batch.penalty.

    kl-cov marks the 0.2% of the step's tokens, dropped groups too, of highest
    (logp - mean)(A - mean), where entropy falls fastest, for a penalty (Cui et al. 2025)."""
    cfg, H, mask, G = run.cfg, batch.H, batch.mask, run.cfg.group_size
    batch.advantage = A = group_advantages(batch.reward, G)                             # (1)
    batch.quadrant = quadrants(batch.reward, H, mask, G)
    batch.credit = credit_rule(cfg.method, A, H, mask, G, cfg.alpha, cfg.phi)           # (7)
    if cfg.method == "kl-cov":
        logp, credit = batch.logp, batch.credit
        cov = (logp - logp[mask].mean()) * (credit - credit[mask].mean())
        batch.penalty = mask & (cov >= cov[mask].topk(math.ceil(int(mask.sum()) / 500)).values[-1])
    within = lambda names: torch.isin(batch.quadrant, torch.tensor(
        [1 + QUADRANTS.index(q) for q in names.split(",") if q]))
    if cfg.without:
        batch.credit = torch.where(within(cfg.without), A[:, None], batch.credit)
    if cfg.quadrants:
        batch.credit = batch.credit * within(cfg.quadrants)


def mini_batches(run, batch):
    """The kept groups, in the order of the stream, which is random, cut evenly into mini-batches of
    at most prompts_per_minibatch: this process' share of each, which may be none."""
    groups = batch.kept.nonzero().view(-1, run.cfg.group_size)                  # (groups, G)
    parts = -(-len(groups) // run.cfg.prompts_per_minibatch)    # rounded up; 0 without such groups
    for k in range(parts):
        part = groups[k * len(groups) // parts:(k + 1) * len(groups) // parts]
        yield batch.rows(run.world.share(part).flatten())


def proxy_information(counts):
    """(14)  Ihat(H; r) = S(H) - S(H | r) in nats, S the entropy of a histogram of H; counts (2,
    bins) of tokens of wrong and right responses.

    The mutual information of a token's entropy and its response's verdict: 0 if both have the same
    histogram. Counting alone gives about bins / (2 tokens) too much."""
    nats = lambda x: float(-torch.special.xlogy(x / x.sum(), x / x.sum()).sum())
    counts = counts.double()
    return nats(counts.sum(0)) - sum(float(row.sum() / counts.sum()) * nats(row)
                                     for row in counts if row.sum())


def measure(run, batch, updates, start):
    """The metrics of the step that began at start: loss, gradient, clips and quadrants of the
    groups learned from, the others of all that was tried. Also H as a histogram (2, 32), in bins of
    0.125 nats, of wrong and right responses."""
    mask, right = batch.mask, batch.right.view(-1, run.cfg.group_size)
    rows, tokens, learned = len(mask), int(mask.sum()), mask & batch.kept[:, None]
    bins = (batch.H / 0.125).long().clamp(max=31) + 32 * batch.right[:, None]
    histogram = torch.bincount(bins[mask], minlength=64).view(2, 32)
    loss, norm, clipped, drift = zip(*updates or [(0.0, 0.0, 0.0, [0.0] * 5)])
    code, phases = batch.quadrant[learned], ("sample", "score", "update")
    sums = [torch.bincount(code, x[learned].double(), 5)
            for x in (mask, batch.credit.abs(), batch.H)]
    shares = [x / x.sum().clamp(min=1e-9) for x in sums]
    shares += [torch.tensor(drift).sum(0) / sums[0].clamp(min=1)]
    seconds = time.perf_counter() - start
    clock = {f"{what}_{x}": run.clock[f"{what}_{x}"] for what in ("seconds", "bytes")
             for x in phases}
    m = dict(reward=batch.reward.mean(), solve_rate=right.float().mean(),
             entropy=batch.H.sum() / tokens, information=proxy_information(histogram),
             response_tokens=tokens, response_length=tokens / rows,
             truncated=1 - batch.ended.float().mean(), groups=len(right),
             groups_all_right=int(right.all(1).sum()), groups_all_wrong=int((~right).all(1).sum()),
             loss=sum(loss) / len(loss), grad_norm=sum(norm) / len(norm),
             sampler_gap=batch.gap.sum() / tokens,
             clip_fraction=sum(clipped) / max(1, int(learned.sum())), seconds=seconds,
             **clock, peak_memory_bytes=max(clock[f"bytes_{x}"] for x in phases),
             tokens_per_second=tokens / seconds)
    for key, share in zip(("tokens", "advantage", "entropy", "drift"), shares):
        m |= {f"{key}/{name}": x for name, x in zip(QUADRANTS, share[1:])}
    return {k: x if isinstance(x, int) else round(float(x), 6) for k, x in m.items()}, histogram


def pass_at_k(n, c, k):
    """(8)  1 - C(n - c, k) / C(n, k): the chance that k drawn from n samples, of which c are right,
    hold a right one."""
    return 1.0 - math.prod((n - c - i) / (n - i) for i in range(k)) if n - c >= k else 1.0


def interval(shares):
    """The 95% interval of a mean over questions, (questions,) -> (2,), by bootstrap over them."""
    dice = torch.Generator().manual_seed(0)
    picks = torch.randint(len(shares), (2000, len(shares)), generator=dice)
    return torch.quantile(shares[picks].mean(1), torch.tensor([0.025, 0.975]))


def exam(run, step):
    """Avg@k, (9), the mean of c / k, and Pass@k, (8), on every exam -> metrics; also printed, and
    in eval.json; every response goes into responses.jsonl. H is at the exam's temperature (at 1 if
    that is 0). The dice are the same every time: two sittings differ by the model alone."""
    cfg, metrics, k = run.cfg, {}, run.cfg.eval_samples
    for name, problems in run.exams.items():
        batch = attempt(run, list(enumerate(problems)), name, k, cfg.eval_temperature,
                        cfg.eval_top_p)
        c, tokens = batch.right.view(-1, k).sum(1), int(batch.response_len.sum())       # c (B,)
        js = [2 ** i for i in range(k.bit_length()) if cfg.eval_only and 2 ** i < k] + [k]
        shares = {f"avg@{k}": c / k, **{f"pass@{j}": torch.tensor(
            [pass_at_k(k, int(x), j) for x in c]) for j in js}}
        m = {key: x.mean() for key, x in shares.items()}
        m["avg_low"], m["avg_high"] = interval(shares[f"avg@{k}"])
        m["pass_low"], m["pass_high"] = interval(shares[f"pass@{k}"])
        m |= {"entropy": batch.H.sum() / tokens, "length": tokens / len(batch.ids),
              "truncated": 1 - batch.ended.float().mean()}
        metrics |= {f"eval/{name}/{key}": round(float(x), 6) for key, x in m.items()}
        run.lines += [f"{f'step {step}' if step else 'base':8} {name}: Avg@{k} "
                      f"{m[f'avg@{k}']:.3f}, 95% interval {m['avg_low']:.3f} .. "
                      f"{m['avg_high']:.3f}, Pass@{k} {m[f'pass@{k}']:.3f}, entropy "
                      f"{m['entropy']:.3f} nats"]
        run.world.print(f"\n{run.lines[-1]}\n  {problems[0].problem!r:.98}",
                        *paint(run, batch.rows(slice(0, k))))
        keep_responses(run, step, name, problems, batch)
    if run.world.rank == 0 and metrics:
        replace_file(f"{run.out}/eval.json", json.dumps({"step": step, **metrics}, indent=2))
    return metrics


def keep_responses(run, step, name, problems, batch):
    """Add the responses of an exam to responses.jsonl."""
    if run.world.rank == 0:
        with open(f"{run.out}/responses.jsonl", "a", encoding="utf-8") as f:
            for i, text in enumerate(texts(run, batch)):
                n, tokens = int(batch.number[i]), int(batch.response_len[i])
                row = dict(step=step, set=name, number=n, problem=problems[n].problem,
                           answer=problems[n].answer, right=bool(batch.right[i]), tokens=tokens,
                           ended=bool(batch.ended[i]),
                           entropy=round(float(batch.H[i].sum()) / tokens, 6), response=text)
                f.write(json.dumps(row, default=str) + "\n")


def paint(run, group):
    """The first three responses of a group as lines; on a terminal tokens have the colours of
    quadrants: green right, red wrong, bold from mu_H up."""
    codes = quadrants(group.reward, group.H, group.mask, len(group.ids)).tolist()
    for i in range(min(3, len(codes))):
        tokens = [run.tokenizer.decode([t], skip_special_tokens=True) for t in group.response(i)]
        if sys.stdout.isatty():
            colours = ("", "1;32", "32", "31", "1;31")
            tokens = [f"\033[{colours[code]}m{t}\033[0m" for code, t in zip(codes[i], tokens)]
        yield f"\n  {'right' if group.right[i] else 'wrong'}  {''.join(tokens[:400])}"


# --------------------------------------------------------------------------------------------------
# Part 8. Plumbing: processes, the plan, checkpoints, files. Skip on first reading.
# --------------------------------------------------------------------------------------------------

class World:
    """The processes of a run, one a GPU. With one process nothing is communicated."""

    def __init__(self, cfg):
        number = lambda name, alone: int(os.environ.get(name, alone))       # set by torchrun
        self.rank, self.size = number("RANK", 0), number("WORLD_SIZE", 1)
        self.stop, self.phase, cuda = False, "start", torch.cuda.is_available()
        self.device = torch.device(f"cuda:{number('LOCAL_RANK', 0)}" if cuda else "cpu")
        self.tokens = cfg.microbatch_tokens or (16384 if cuda else 2048)     # of a micro-batch
        self.bf16 = cuda and cfg.model != "tiny"
        self.sharded = self.size > 1 or self.bf16
        if cuda:
            torch.cuda.set_device(self.device)
        if self.sharded and not dist.is_initialized():
            alone = {} if self.size > 1 else dict(store=dist.HashStore(), rank=0, world_size=1)
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo",
                                    timeout=timedelta(minutes=60), **alone)

    def shard(self, policy, offload):
        """The policy, its fp32 weights cut over the GPUs layer by layer: a layer is put together,
        in bf16, only while it computes (FSDP2). On a GPU, what a layer computes is forgotten and
        computed again in backward."""
        if not self.sharded:
            return policy.to(self.device)
        low = torch.bfloat16 if self.bf16 else None
        how = dict(mesh=dist.init_device_mesh(self.device.type, (self.size,)),
                   mp_policy=fsdp.MixedPrecisionPolicy(low, torch.float32))
        if offload:
            how["offload_policy"] = fsdp.CPUOffloadPolicy(pin_memory=False)
        for layer in next(x for x in policy.lm.modules() if isinstance(x, torch.nn.ModuleList)):
            if self.device.type == "cuda":
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
            fsdp.fully_shard(layer, **how)
        return fsdp.fully_shard(policy, **how)

    def whole(self, x):
        """A tensor put together from its shards on every process; all must ask for it."""
        return x.to(self.device).full_tensor() if hasattr(x, "full_tensor") else x

    def gather(self, x):
        """[x of process 0, x of process 1 ...], on every process; all must call it."""
        parts = [x] * self.size
        if self.size > 1:
            try:
                dist.all_gather_object(parts, x)
            except RuntimeError as e:       # the others did not answer, or not in time
                e.add_note(f"eapo: process {self.rank} of {self.size}, phase {self.phase}")
                raise
        return parts

    def share(self, items):
        """The part of a list that this process works on."""
        return items[self.rank::self.size]

    def free(self):
        """Bytes that this process may still fill: of its GPU; else its part of the machine's."""
        if self.device.type == "cuda":
            return (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
                    - torch.cuda.memory_allocated())
        if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
            return math.inf
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / self.size

    def print(self, *text):
        """Print once, not once a process, and above the progress bar."""
        if self.rank == 0:
            tqdm.write("".join(text))

    def bar(self, steps, name, least=1, **how):
        """A progress bar over steps, on the first process, if there are at least so many."""
        return tqdm(steps, desc=name, disable=self.rank > 0 or len(steps) < least, **how)

    def on_signal(self, *_):
        """Ctrl-C and SIGTERM: finish the step, save, stop."""
        self.stop = True
        os.write(2, b"\neapo: stopping after this step (Ctrl-\\ stops at once)\n" * (not self.rank))

    def asked_to_stop(self):
        """Whether a signal has reached any process."""
        return any(self.gather(self.stop))


def plan(cfg, world, out):
    """Print what each process will hold in memory, in GB, and refuse what cannot fit, before any
    weight is read. The update holds weights, gradients, moments and what it works with; the
    rollout weights, moments, a copy to sample from and the groups sampled at a time; the disk a
    model and three checkpoints, one of them being written."""
    with using(cfg.model), torch.device("meta"):
        c = AutoConfig.from_pretrained(cfg.model)
        P = sum(p.numel() for p in AutoModelForCausalLM.from_config(c).parameters())
    need(hasattr(c, "num_attention_heads"), f"{cfg.model} is not a text-only transformer")
    n, cuda, L = world.size, world.device.type == "cuda", c.num_hidden_layers
    width, here = 2 if world.bf16 else 4, not (cfg.offload and cuda)
    longest = cfg.max_prompt_tokens + cfg.max_response_tokens
    tokens = max(longest, world.tokens)
    inner = getattr(c, "intermediate_size", None) or 4 * c.hidden_size
    layer = tokens * width * (6 * c.hidden_size + 4 * inner)                        # activations
    ends = 2 * c.vocab_size * c.hidden_size * world.sharded     # embedding and head, put together
    working = max(16 * CHUNK + 2 * width * (P / L * world.sharded + ends)
                  + (tokens * width * L * c.hidden_size + layer if cuda else L * layer),
                  ends * (2 * width + 4 + 4 / n))               # while their gradients are reduced
    weights, copy, free = 4 * P / n * here, width * P * world.sharded, world.free()
    B, one = groups_at_once(c, width, longest, cfg.group_size, free - 3 * weights - copy)
    groups = one * min(B, -(-cfg.prompts_per_step // n))
    size = dict(weights=weights, gradients=weights, moments=2 * weights, working=working, copy=copy,
                groups=groups, update=4 * weights + working, rollout=3 * weights + copy + groups,
                free=free)
    world.print(f"{cfg.model}: {P / 1e6:.1f}M parameters on {n} x {world.device.type}; GB each: "
                + ", ".join(f"{name} {x / 1e9:.2f}" for name, x in size.items()))
    for phase in ("rollout",) if cfg.eval_only else ("update", "rollout"):
        need(size[phase] < free, f"the {phase} needs about {size[phase] / 1e9:.0f} GB of "
             f"{free / 1e9:.0f}: use {'more --gpus, --offload, or ' * cuda}a smaller model; smaller"
             " --microbatch-tokens or --max-response-tokens help a little")
    disk, room = P * (40 if cfg.save_every else 16) / 1e9, shutil.disk_usage(out).free / 1e9
    need(cfg.eval_only or disk < room, f"{out} needs {disk:.1f} GB for the model and checkpoints, "
         f"and its disk has {room:.1f} left: choose another --out or --save-every 0")


def doctor(run, problems):
    """Print what most often is wrong before a run that learns nothing: the first prompt as the
    model sees it, stop tokens, and what the verifier says of golds and of junk."""
    p, tokenizer, golds = problems[0], run.tokenizer, [p.answer for p in problems[:200]]
    longest = max(len(p.ids) for p in sum(run.exams.values(), problems)) \
        + run.cfg.max_response_tokens
    fits = getattr(run.policy.lm.config, "max_position_embeddings", None) or longest
    need(longest <= fits, f"{run.cfg.model} reads {fits} tokens, and the longest prompt with its "
                          f"response has {longest}: lower --max-response-tokens")
    paid, junk = (sum(is_correct(f"\\boxed{{{x or (g[0] if isinstance(g, list) else g)}}}", g)
                      for g in golds) / len(golds) for x in ("", "no idea"))
    text, bos = tokenizer.decode(p.ids), p.ids.count(tokenizer.bos_token_id)
    need(run.cfg.model != "tiny" or text == p.problem,
         f"of {p.problem!r:.50} --model tiny can read {text!r:.50} only: name another --model")
    run.world.print(f"first prompt: {text[:400]!r}\n  {len(p.ids)} ids, {p.ids[:8]} .. "
                    f"{p.ids[-4:]}, BOS {bos} times; responses end with "
                    f"{tokenizer.convert_ids_to_tokens(run.stop_ids)}\n"
                    f"verifier: pays {paid:.0%} of {len(golds)} gold answers, {junk:.0%} of junk")
    if "boxed" not in text and run.cfg.model != "tiny":
        run.world.print("warning: the prompt does not ask for \\boxed{}: unless the model boxes "
                        "its answer anyway, no response will be right; say so in the problems, "
                        "or imitate solutions first (--warmup-data)")


def replace_file(path, text):
    """Write a file beside its place and rename it: there is never half a file."""
    with open(path + ".new", "w", encoding="utf-8") as f:
        f.write(text)
    os.replace(path + ".new", path)


def save_model(run):
    """The policy and its tokenizer as an ordinary Hugging Face folder, out/model."""
    path, lm = f"{run.out}/model", run.policy.lm
    weights = dcs.get_model_state_dict(lm, options=dcs.StateDictOptions(
        full_state_dict=True, cpu_offload=True))
    if run.world.rank == 0:
        every, once = (dict(lm.named_parameters(remove_duplicate=x)) for x in (False, True))
        lm.save_pretrained(path + ".new", state_dict={      # of tied weights, the first
            name: w for name, w in weights.items() if name in once or name not in every})
        run.tokenizer.save_pretrained(path + ".new")
        shutil.rmtree(path, ignore_errors=True)
        os.replace(path + ".new", path)


def save_checkpoint(run, optimizer, stream, step):
    """out/checkpoint/step-N: weights and moments, each process its shards, and where the data
    stands; written beside and renamed, the last two kept. No random state: the loop's dice come
    from seeds and numbers, the order of the problems from seed and epoch."""
    path = f"{run.out}/checkpoint/step-{step:06}"
    dcp.save(state(run, optimizer, stream, step), checkpoint_id=path + ".new")
    if run.world.rank == 0:
        shutil.rmtree(path, ignore_errors=True)
        os.replace(path + ".new", path)
        for old in checkpoints(run.out)[:-2]:
            shutil.rmtree(old)
    run.world.gather(None)


def checkpoints(out):
    """The folders of the checkpoints of a run, none half-written, the latest last."""
    return sorted(glob.glob(f"{glob.escape(out)}/checkpoint/*[0-9]"))


def state(run, optimizer, stream, step):
    """What a checkpoint holds."""
    model, moments = dcs.get_state_dict(run.policy, optimizer)
    data = crc32(json.dumps([(p.problem, str(p.answer)) for p in stream.problems]).encode())
    return dict(model=model, optimizer=moments, step=step, position=stream.position, data=data)


def load_checkpoint(run, optimizer, stream):
    """Set weights, moments, data position and logs from a run's last checkpoint -> its step."""
    saved = state(run, optimizer, stream, 0)
    data = saved["data"]
    dcp.load(saved, checkpoint_id=checkpoints(run.out)[-1])
    need(saved["data"] == data, f"{run.cfg.train_data} is not the data that {run.out} was trained "
                                "on: its problems differ")
    dcs.set_state_dict(run.policy, optimizer, model_state_dict=saved["model"],
                   optim_state_dict=saved["optimizer"])
    stream.position = saved["position"]
    for name in ("responses.jsonl", "metrics.jsonl"):
        with open(f"{run.out}/{name}", "a+", encoding="utf-8") as f:
            f.seek(0)
            run.rows = [row for row in map(json.loads, (x for x in f if x.endswith("\n")))
                        if row["step"] <= saved["step"]]
        run.world.gather(None)
        if run.world.rank == 0:
            replace_file(f"{run.out}/{name}", "".join(json.dumps(x) + "\n" for x in run.rows))
    return saved["step"]


def open_folder(cfg, world):
    """Make the folder of the run and write config.json into it -> path."""
    name = os.path.basename(os.path.normpath(cfg.model))
    out = cfg.out or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    out = os.path.normpath(world.gather(out)[0])
    need(cfg.resume or not os.path.exists(f"{out}/metrics.jsonl"),
         f"{out} holds the metrics of another run: choose another --out, or --resume {out}")
    need(not cfg.resume or checkpoints(out),
         f"{out} holds no checkpoint, see --save-every: start a new run")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__,
                "python": platform.python_version()}
    with using(out):
        os.makedirs(out, exist_ok=True)
        if world.rank == 0:
            replace_file(f"{out}/config.json",
                         json.dumps(asdict(cfg) | {"versions": versions}, indent=2))
            open(f"{out}/responses.jsonl", "a" if cfg.resume else "w").close()
    return out


# --------------------------------------------------------------------------------------------------
# Part 9. The report: one HTML page that works offline and runs no script. Skip on first reading.
# PENS: colour and dashes of a line; MARKS: of a quadrant also its underline and its meaning.
# --------------------------------------------------------------------------------------------------

PENS = ("#8a5be0", ""), ("#2c9a4b", "7 4"), ("#d8478f", "1 4"), ("#a8743a", "9 4"), ("gray", "4")
MARKS = {"PHR": ("#2f7de1", "", "3px solid", "right, H at or above the mean of its group"),
         "PLR": ("#1298a8", "1 4", "2px dotted", "right, H below it"),
         "NLR": ("#bd8200", "6 4", "1px solid", "wrong, H below it"),
         "NHR": ("#dd4840", "9 4 1 4", "4px double", "wrong, H at or above it")}
HEAD = """<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>:root { color-scheme: light dark }  path { fill: none }  section { font-size: 13px }
body { max-width: 1200px; margin: auto; padding: 8px 16px 90px; overflow-wrap: anywhere;
  background: Canvas; color: CanvasText; font: 15px/1.5 system-ui, sans-serif }
div { display: grid; grid: auto / repeat(auto-fill, minmax(min(100%, 270px), 1fr)); gap: 16px 28px }
svg { fill: CanvasText; font-size: 12px; stroke-width: 1.8; stroke-linecap: round }
pre { position: relative; margin: 0; font: 15px/2.1 ui-monospace, monospace; white-space: pre-wrap }
a { padding: 2px 0; unicode-bidi: isolate; background: rgb(245 158 11 / var(--h)) padding-box }
a:hover::after, a:focus::after { content: attr(data-t); position: absolute; left: 0; padding: 4px;
  margin-top: 2em; background: CanvasText; color: Canvas; line-height: 1.4; pointer-events: none }
""" + "\n".join(f".{q} {{ border-bottom: {m[2]} {m[0]} }}" for q, m in MARKS.items()) + "</style>"


def shown(text):
    """Text from outside as HTML: escaped, with line ends and control characters made visible."""
    text = str(text).replace("\n", "↵\n")
    return html.escape("".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text))


def curve(seeds, key):
    """[(step, low, mean, high)] of a metric: over seeds, or the interval of one seed's Avg@k."""
    at, stem = {}, key.rpartition("@")[0]
    for row in (row for rows in seeds for row in rows if math.isfinite(row.get(key, math.nan))):
        one = len(seeds) == 1 and key.replace("pass@", "avg@") in row   # the k of the interval
        ends = [row.get(f"{stem}_{end}", row[key]) for end in ("low", "high") if one]
        at.setdefault(row["step"], []).append((row[key], *ends))
    return [(step, min(map(min, found)), sum(y for y, *_ in found) / len(found),
             max(map(max, found))) for step, found in sorted(at.items())]


def ticks(low, high):
    """Round numbers, evenly spaced, from at most low to at least high."""
    high = high if high > low else low + 1
    steps = (m * 10.0 ** e for e in range(-9, 9) for m in (1, 2, 5))
    step = next(step for step in steps if high - low <= 5 * step)
    return [k * step for k in range(math.floor(low / step), math.ceil(high / step) + 1)]


def chart(title, lines, x_name="step", log=False):
    """A figure of lines {name: (pen, seeds, key)}; "" if there is no data."""
    lines = [(name, pen, line) for name, (pen, *data) in lines.items() if (line := curve(*data))]
    if not lines:
        return ""
    x, low, _, high = zip(*[point for *_, line in lines for point in line])
    xs, ys = ticks(min(x), max(x)), ticks(-5, 0) if log else ticks(min(0, *low), max(0, *high))
    X = lambda x: f"{50 + 280 * (x - xs[0]) / (xs[-1] - xs[0]):.1f}"
    Y = lambda y: f"{158 - 148 * (y - ys[0]) / (ys[-1] - ys[0]):.1f}"
    height = lambda y: Y(math.log10(max(y, 1e-5)) if log else y)
    path = lambda pairs: "M" + "L".join(f"{X(x)},{height(y)}" for x, y in pairs)
    text = lambda x, y, anchor, s: f'<text x="{x}" y="{y}" dy="4" text-anchor="{anchor}">{s}</text>'
    svg, legend = text(330, 188, "end", x_name), ""
    svg += "".join(text(X(x), 172, "middle", f"{x:.6g}") for x in xs)
    svg += "".join(text(45, Y(y), "end", f"{10 ** y if log else y:.6g}")
                   + f'<path d="M50,{Y(y)}H330" stroke="#8884"/>' for y in ys)
    for name, (colour, dashes, *_), line in lines:
        pen = f'stroke="{colour}" stroke-dasharray="{dashes}"'
        band = [(x, y) for x, _, _, y in line] + [(x, y) for x, y, _, _ in reversed(line)]
        svg += f'<path d="{path(band)}" style="fill: {colour}; fill-opacity: .15"/>'
        svg += f'<path d="{path((x, y) for x, _, y, _ in line + line[-1:])}" {pen}/>'
        ends = "" if log else f"{line[0][2]:.4g} → {line[-1][2]:.4g}"
        legend += f'<br><svg width=28 height=9><path d="M1,5H27" {pen}/></svg> {shown(name)} {ends}'
    return (f'<section><strong>{shown(title)}</strong><svg viewBox="0 0 346 196">{svg}</svg>'
            f'{legend}</section>')


def token_html(text, quadrant, p, H, A, A_CA, rho, clipped):
    """A token, shaded by entropy, underlined by quadrant, its numbers on hover, tap and focus."""
    q, tab = QUADRANTS[quadrant - 1], 0 if quadrant in (1, 4) else -1   # Tab: to the next fork
    return (f'<a class="{q}" tabindex="{tab}" style="--h: {.5 - math.exp(-H) / 2:.2f}" data-t="'
            f'{q}, p {p:.3f}, H {H:.3f} nats, A {A:+.3f}, A^CA {A_CA:+.3f}, rho {rho:.3f}, '
            f'{"clipped" if clipped else "not clipped"}">{shown(text) or "∅"}</a>')


def report(runs, responses=(), histogram=((), ())):
    """The page on runs {label: [rows of metrics.jsonl of one seed, ...]}; responses [(title, [token
    arguments])]; histogram, two lists of shares: tokens of wrong and of right responses by H."""
    title = "eapo: " + shown(", ".join(runs))
    page = [f"{HEAD}<title>{title}</title><h1>{title}</h1>Lines: means over seeds. Bands: lowest "
            "to highest seed, or the 95% interval of one seed's avg@k. Numbers: first → last."
            "<h2>Curves</h2><div>"]
    curves = {key: f"Held out, {key.removeprefix('eval/')}" for seeds in runs.values()
              for rows in seeds for row in rows for key in row if "@" in key}
    for key, name in {**curves, "solve_rate": "Solve rate in training", "entropy": "Entropy, nats",
                      "response_length": "Response length, tokens",
                      "information": "Ihat (14), nats"}.items():
        page += [chart(name, {label: (pen, seeds, key) for (label, seeds), pen in
                              zip(runs.items(), PENS * len(runs))})]
    for label, seeds in runs.items():
        page += [f"</div><h2>Quadrants, {shown(label)}</h2><div>", *(
            chart(name, {q: (pen, seeds, f"{key}/{q}") for q, pen in MARKS.items()})
            for key, name in (("tokens", "Share of tokens"), ("advantage", "Share of sum |A^CA|"),
                              ("entropy", "Share of sum of H"), ("drift", "Drift of H, nats")))]
    rows = [dict(step=k / 8, wrong=w, right=r) for k, (w, r) in enumerate(zip(*histogram))]
    page += ["</div><h2>Token microscope</h2><div>", chart("Share of tokens, log scale", {
        side: (MARKS[q], [rows], side) for side, q in (("right", "PHR"), ("wrong", "NHR"))},
        "H of the token, nats", log=True), "</div>shade: H of", *(
        f' <a style="--h: {.5 - math.exp(-H) / 2}">&nbsp;{H}&nbsp;</a>' for H in (0, .1, .7, 2)),
        " nats", *(f'<br><a class="{q}">{q}</a> {m[3]}' for q, m in MARKS.items())]
    for summary, tokens in responses:
        page += [f"<details open><summary>{shown(summary)}</summary><pre>",
                 *(token_html(*t) for t in tokens), "</pre></details>"]
    return "".join(page)


def compare(folders):
    """{label: [rows of a run, ...]}: runs that differ only in seed and out share a label."""
    found, runs = {}, {}
    for folder in map(os.path.abspath, folders):
        with using(f"{folder} (name folders of runs)"):
            with open(f"{folder}/config.json") as f, open(f"{folder}/metrics.jsonl") as g:
                found[folder] = json.load(f), [json.loads(line) for line in g]
    apart = [f.name for f in fields(Config) if f.name not in {"seed", "out", *MAY_CHANGE}
             and len({str(config.get(f.name)) for config, _ in found.values()}) > 1]
    for folder, (config, rows) in found.items():
        label = ", ".join(f"{name} {config[name]}" for name in apart
                          if config.get(name) not in ("", None))
        runs.setdefault(label or os.path.basename([*found][0]), []).append(rows)
    return runs


@torch.no_grad()
def write_report(run, batch, histogram):
    """report.html of a run, with two right and two wrong responses of a kept group of the last step
    under the microscope: as drawn, and as likely as the update has left their tokens (rho)."""
    cfg, group = run.cfg, batch.kept.nonzero()[:run.cfg.group_size, 0]
    rows = torch.cat([group[batch.right[group] == verdict][:2] for verdict in (True, False)])
    few, after = batch.rows(rows), batch.rows(rows)
    rescore(run, after, cfg.temperature)
    rho, credit, responses = (after.logp - few.logp).exp(), few.credit, []              # (4, T)
    clipped = surrogate(rho, credit, cfg.clip_low, cfg.clip_high, cfg.clip_c) != rho * credit
    A = few.advantage[:, None].expand(rho.shape)
    columns = few.quadrant, few.logp.exp(), few.H, A, credit, rho, clipped
    for i, numbers in enumerate(zip(*(x.tolist() for x in columns))):
        prompt = run.tokenizer.decode(few.ids[i, :int(few.prompt_len[i])])
        tokens = [run.tokenizer.decode([t]) for t in few.response(i)]
        verdict = "right ✓" if few.right[i] else "wrong ✗"
        responses += [(f"{prompt} {verdict}, reward {few.reward[i]:+g}", zip(tokens, *numbers))]
    shares = (histogram / histogram.sum(1, keepdim=True).clamp(min=1)).tolist()
    page = report({os.path.basename(run.out): [run.rows]}, responses, shares)
    if run.world.rank == 0:
        replace_file(f"{run.out}/report.html", page)


# --------------------------------------------------------------------------------------------------
# Part 10. The loop: try, mark, compare, learn, look; and the command line.
# --------------------------------------------------------------------------------------------------

def log(run, step, metrics):
    """Add a step to run.rows and metrics.jsonl; say of the first what may spoil all others."""
    run.rows.append({"step": step, **metrics})
    if run.world.rank == 0:
        with open(f"{run.out}/metrics.jsonl", "a") as f:
            f.write(json.dumps(run.rows[-1]) + "\n")
    if step == 1 and metrics["truncated"] > 0.5:
        run.world.print("warning: most responses were cut at --max-response-tokens: raise it, or "
                        "see whether the stop tokens above are the model's")
    if step == 1 and metrics["grad_norm"] == 0:
        run.world.print("warning: nothing was learned: no group had right and wrong responses, or "
                        "--quadrants left no token its credit; a longer warm-up may help")
    if step == 1 and metrics["sampler_gap"] > 0.1:
        run.world.print(f"warning: sampler and policy disagree by {metrics['sampler_gap']} nats a "
                        "token: what is trained is not what samples")


def open_run(cfg):
    """The Run of a Config: its folder, model and exams."""
    world = World(cfg)
    out = open_folder(cfg, world)
    if cfg.model != "tiny":
        plan(cfg, world, out)
    run = load(cfg, world, out)
    for source in filter(None, map(str.strip, cfg.eval_data.split(","))):
        name = os.path.basename(source)         # MATH-500 for HuggingFaceH4/MATH-500, a for a.jsonl
        name = os.path.splitext(name)[0] if os.path.isfile(source) else name.replace(":", "-")
        need(name not in run.exams, f"--eval-data has two sets {name}: rename a file")
        if cfg.eval_every or cfg.eval_only:
            run.exams[name] = load_problems(run, source, "exam")
    return run


def begin(run, optimizer, stream):
    """Load the last checkpoint, or imitate and sit the first exam -> the steps already done."""
    doctor(run, stream.problems)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, run.world.on_signal)
    if run.cfg.resume:
        return load_checkpoint(run, optimizer, stream)
    if run.cfg.warmup_steps:
        imitate(run, load_problems(run, run.cfg.warmup_data, "warmup"))
        if run.world.asked_to_stop():
            run.world.print("stopped in the warm-up, which cannot be resumed")
            raise SystemExit
    log(run, 0, exam(run, 0))
    return 0


def train(cfg):
    """Warm up if asked, then RL by cfg.method. All that a run leaves is in its folder."""
    run = open_run(cfg)
    if cfg.eval_only:
        doctor(run, sum(run.exams.values(), []))
        log(run, 0, exam(run, 0))
        return run.world.print(f"all is in {run.out}")
    stream = Stream(load_problems(run, cfg.train_data, "train"), cfg.seed)
    optimizer = torch.optim.AdamW(run.policy.parameters(), lr=cfg.learning_rate, weight_decay=0.0,
                                  fused=True)
    done = begin(run, optimizer, stream)
    bar, stop = run.world.bar(range(done + 1, cfg.steps + 1), cfg.method), False
    for step in bar:
        start, run.clock = time.perf_counter(), Counter()

        # Try, mark: answer each problem G times; +1 if the boxed answer is right, else -1.
        batch = roll_out(run, stream)

        # Compare: credit each response against its group; EAPO then each token by its entropy.
        give_credit(run, batch)                                                         # (1), (7)

        # Learn: a gradient step on the clipped loss for each mini-batch of the kept groups.
        with run.timed("update"):
            run.empty_sampler()
            updates = [learn(run, optimizer, mini) for mini in mini_batches(run, batch)]    # (2)

        # Look: watch the reward; the loss of a policy gradient does not measure progress.
        metrics, histogram = measure(run, batch, updates, start)
        bar.set_postfix_str("reward {reward:+.2f}, entropy {entropy:.3f} nats, "
                            "{tokens_per_second:.0f} tokens/s".format(**metrics), refresh=False)
        stop = run.world.asked_to_stop() and step < cfg.steps
        last = stop or step == cfg.steps
        due = lambda every: every and (last or step % every == 0)
        log(run, step, metrics | (exam(run, step) if due(cfg.eval_every) and not stop else {}))
        if due(cfg.save_every) or last and (stop or cfg.resume):
            save_checkpoint(run, optimizer, stream, step)
        if due(cfg.eval_every) or last:
            write_report(run, batch, histogram)
        if stop:
            break
    save_model(run)
    n = len(run.exams)
    run.world.print("\n", "\n".join(run.lines[:n] + run.lines[n:][-n:]), "\n")
    run.world.print(f"{'stopped; go on with --resume' if stop else 'all is in'} {run.out}")


def check(c):
    """Refuse settings that cannot work, each with its remedy."""
    unknown = [x for x in f"{c.quadrants},{c.without}".split(",") if x and x not in QUADRANTS]
    sizes = (c.prompts_per_step, c.prompts_per_minibatch, c.eval_samples,
             c.max_prompt_tokens, c.max_response_tokens)
    need(c.group_size > 1, "a group of one has no mean to beat: use --group-size 2 or more")
    need(0 <= c.alpha < c.phi,
         "--alpha must lie from 0 to below --phi, or (7) could turn the sign of an advantage")
    need(not unknown, f"no quadrant is called {', '.join(unknown)}, only {', '.join(QUADRANTS)}")
    need(not c.without or c.method == "eapo", "--without is for --method eapo")
    need(not c.quadrants or c.method not in ("entroreg", "kl-cov"),
         f"--quadrants cuts credit, and {c.method} learns without credit too")
    need(min(sizes) > 0, "numbers of prompts, samples and tokens must be 1 or more")
    need(min(c.resample, c.steps, c.warmup_steps, c.save_every, c.eval_every, c.gpus, c.seed,
             c.microbatch_tokens, c.learning_rate, c.warmup_learning_rate, c.clip_low,
             c.clip_high) >= 0, "steps, rounds, rates, clips, the seed and GPUs: 0 or more")
    need(c.temperature > 0 <= c.eval_temperature,
         "--temperature must be above 0, --eval-temperature 0 or more")
    need(0 < c.top_p <= 1 and 0 < c.eval_top_p <= 1, "--top-p: above 0, at most 1")
    need(0 <= c.overlong < 1, "--overlong is a share, from 0 to below 1")
    need(c.clip_c == 0 or c.clip_c > 1 + c.clip_high,
         "--clip-c must lie above 1 + clip_high, outside the clip of (2), or be 0 for off")
    need(c.warmup_data or not c.warmup_steps, "--warmup-steps needs --warmup-data")
    return c


MAY_CHANGE = {"resume", "steps", "eval_every", "save_every", "gpus", "offload", "microbatch_tokens"}


def parse_args(argv=None):
    """Config from the command line: what is typed; else what the method says, else the model's
    preset, else the default. Of a resumed run: what its config.json says."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], usage="%(prog)s [flags]",
        formatter_class=partial(argparse.HelpFormatter, max_help_position=32, width=100),
        epilog="Other [defaults] with some models and methods: PRESETS, METHODS in eapo.py, part 1")
    for f in fields(Config):
        if f.metadata["heading"]:
            group = parser.add_argument_group(f.metadata["heading"])
        how = {"action": argparse.BooleanOptionalAction} if f.type is bool else {
            "type": f.type, "choices": f.metadata["choices"],
            "metavar": None if f.metadata["choices"] else f.type.__name__.upper()}
        group.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, **how,
                           help=f.metadata["help"].replace("%", "%%")
                           + f"  [{f.default}]" * (f.type is not bool and f.default != ""))
    typed = vars(parser.parse_args(argv))
    if "resume" in typed:
        path = os.path.join(typed["resume"], "config.json")
        need(os.path.isfile(path), f"{path}: no such file; --resume takes the folder of a run")
        with open(path) as file:
            before = json.load(file)
        before = {f.name: before.get(f.name, f.default) for f in fields(Config)}
        before["out"] = typed["resume"]
        other = {k: v for k, v in typed.items() if k not in MAY_CHANGE and v != before[k]}
        need(not other, f"{typed['resume']} ran with other settings than {other}; leave them out, "
                        "or start a new run")
        return check(Config(**before | typed))
    model = typed.get("model", "tiny")
    preset = next((PRESETS[name] for name in PRESETS
                   if name == model or name != "tiny" and name in model), {})
    return check(Config(**preset | METHODS[typed.get("method", Config.method)] | typed))


def main(argv=None):
    """python eapo.py [flags]"""
    need(sys.version_info >= (3, 11) and int(transformers.__version__.partition(".")[0]) >= 5,
         "needs Python 3.11 or newer, and what pip install -r requirements.txt brings")
    cfg, n = parse_args(argv), torch.cuda.device_count()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for known in ("`past_key_values` is deprecated", "torch.distributed is disabled"):
        warnings.filterwarnings("ignore", known)
    if cfg.compare:
        path = f"{cfg.out or 'runs'}/report.html"
        need(not os.path.exists(f"{cfg.out}/config.json"), "--out is a run's folder: name another")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        replace_file(path, report(compare(cfg.compare.split(","))))
        return print(f"eapo: {path}")
    need(cfg.gpus <= n, f"--gpus {cfg.gpus}: this machine has {n}")
    n = cfg.gpus or n
    if "RANK" not in os.environ and n > 1 and cfg.model != "tiny":
        os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "7200")     # Ctrl-C: end the step
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // n)))
        os.execv(sys.executable, [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
            str(n), os.path.abspath(__file__), *(sys.argv[1:] if argv is None else argv)])
    if cfg.model == "tiny" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(2, os.cpu_count()))       # its matrices are too small for more
    try:
        train(cfg)
    except KeyboardInterrupt:           # later on Ctrl-C ends a step, see on_signal
        raise SystemExit("\neapo: stopped before the first step; nothing to save") from None


if __name__ == "__main__":
    main()

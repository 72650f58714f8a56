"""eapo: reinforcement learning with verifiable rewards, token by token, in one file.

Give a language model a problem whose answer can be checked. Let it try G times, mark every try
right or wrong, and make the tokens of the better tries likelier. That is GRPO (group-relative
policy optimization), and it gives each token of a response the same credit. Most tokens cannot use
it: where the model was sure, there was no decision to praise. EAPO (entropy-aware policy
optimization; He et al. 2026, arXiv 2604.11056, v1) therefore measures how unsure the model was at
each token, its entropy H, and gives uncertain tokens a little more of the credit and of the blame.
It is one formula on top of GRPO, (7), and one call in `train`.

    A_i     = (r_i - mean(r)) / std(r)                                   one number a response   (1)
    L       = - mean over tokens of min(rho A, clip(rho, 1-eps_low, 1+eps_high) A)               (2)
    score_t = clip((H_t - mu_H) / sigma_H, -|A|/phi, +|A|/phi)           one number a token      (6)
    A^CA_t  = A + alpha sign(A) score_t                                  replaces A in (2)       (7)

Numbers (2), (6), (7), and (8) further down, are the paper's; (1) is its unnumbered group advantage.
(2) here is a mean over all tokens, as in the authors' framework, verl; they print it as a mean per
group (--loss-mean group), and PPO's bound c for A < 0 comes on top, see `surrogate`. std(r) and
sigma_H are sample deviations (n - 1), with 1e-6 added in the code. The alphabet:

    B prompts x G responses = N rows, the G responses to one prompt in adjacent rows
    T tokens of the longest response    V vocabulary    M tokens, flat    D size of hidden states
    r      reward of a response, +1 right or -1 wrong                             (N,)
    A      advantage of a response: how much better than its group, (1)           (N,)
    A^CA   advantage of a token, (7); what Batch.A and the loss hold              (N, T)
    pi_old the policy before the step: full vocabulary, at the sampling temperature
    H      entropy of pi_old before it drew each token, in nats                   (N, T)
    mask   True on response tokens, the stop token included                       (N, T)
    mu_H, sigma_H   mean and deviation of H over all response tokens of one group (N, 1)
    rho    pi_theta / pi_old: how much likelier the token became since sampling   (N, T)

The program in one breath, and the functions that do it, in the order of this file:

    for each step:                                               the loop is `train`, part 9
        try      sample G responses to each of B prompts         sample_loop (5), roll_out (7)
        mark     r = +1 where \\boxed{} holds the right answer    is_correct (3), attempt (7)
        compare  A (1) from the group, A^CA (7) from entropies   entropy_aware_advantages (2)
        learn    clipped gradient steps on L (2)                 policy_loss (2), learn (6)
        look     log what happened; now and then sit an exam     measure, Look (8)

Run:
    python eapo.py                                   a tiny model learns to carry: a laptop, minutes
    python eapo.py --model Qwen/Qwen2.5-Math-7B      the paper's run and data: over 140 GB of GPU
    python eapo.py --help                            every setting

Left out on purpose: a value network, a KL penalty with its reference model, a learned reward.
"""
import argparse
import cmath
import contextlib
import json
import math
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, fields, replace
from fractions import Fraction
from operator import add, mul, sub, truediv
from string import ascii_letters, digits
from zlib import crc32

import datasets
import torch
import transformers
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


# --------------------------------------------------------------------------------------------------
# Part 1. The settings. A flag is a field of Config with hyphens for underscores. Defaults are those
# of the paper's run of Qwen2.5-Math-7B (table 6) where it names them; PRESETS holds what other
# models change, so that `--model tiny`, the default, fits a laptop.
# --------------------------------------------------------------------------------------------------

def flag(default, text, **options):
    """A Config field whose help text `--help` prints beside its default."""
    return field(default=default, metadata={"help": text, **options})


@dataclass
class Config:
    # what to train on what
    model: str = flag("tiny", "tiny, a Hugging Face folder, or a hub id")
    train_data: str = flag("agentica-org/DeepScaleR-Preview-Dataset",
                           "addition, a .jsonl/.csv/.parquet file, or a hub id[:split]")
    eval_data: str = flag("HuggingFaceH4/MATH-500", "the same, several with commas between")
    out: str = flag("", "folder of the run; default runs/MODEL-TIME")
    seed: int = flag(0, "seed of weights, data order and sampling")
    # imitation before RL, for models that do not know the task or its format
    warmup_data: str = flag("", "worked solutions to imitate first: problem and solution columns")
    warmup_steps: int = flag(0, "optimizer steps of imitation; 0 = none")
    warmup_batch: int = flag(32, "worked solutions a step")
    warmup_learning_rate: float = flag(1e-5, "AdamW; rises over 20 steps, falls over the last 30%")
    # the batch: prompts_per_step * group_size responses, one optimizer step per mini-batch
    steps: int = flag(220, "RL steps: sample, then learn from what was sampled")
    prompts_per_step: int = flag(512, "B, prompts to learn from in a step")
    group_size: int = flag(8, "G, responses to each prompt")
    prompts_per_minibatch: int = flag(32, "prompts behind one optimizer step")
    microbatch_tokens: int = flag(0, "padded tokens in one pass through the model: memory and "
                                     "speed, not results; 0 = 16384 on a GPU, 2048 on a CPU")
    resample: int = flag(2, "at most this many more rounds of sampling a step, to replace groups "
                            "that are all right or all wrong (dynamic sampling)")
    # sampling
    max_prompt_tokens: int = flag(1024, "prompts with more tokens are left out")
    max_response_tokens: int = flag(3072, "responses are cut after this many tokens")
    temperature: float = flag(1.0, "of training: sampling, log-probabilities, entropies")
    top_p: float = flag(0.95, "draw from the fewest tokens with this probability; 1 = from all")
    sampler: str = flag("auto", "loop: ours; engine: transformers' continuous batching; auto: the "
                                "engine on a GPU", choices=("auto", "loop", "engine"))
    # credit and loss
    alpha: float = flag(0.2, "(7) strength of the entropy term; 0 gives GRPO's advantages")
    phi: float = flag(2.0, "(6) |score| is at most |A| / phi")
    clip_low: float = flag(0.2, "(2) eps_low")
    clip_high: float = flag(0.28, "(2) eps_high")
    clip_c: float = flag(3.0, "a token with A < 0 loses at most c |A| (Ye et al. 2020); 0 = off")
    loss_mean: str = flag("tokens", "tokens: mean over the mini-batch, as in verl, which the "
                                    "authors use; group: over each group, then over groups, as "
                                    "they print (2)",
                          choices=("tokens", "group"))
    overlong_cache: int = flag(0, "DAPO's soft penalty: the reward falls by up to 1 over the last "
                                  "this many of max_response_tokens; 0 = off")
    learning_rate: float = flag(1e-6, "AdamW, constant")
    matmuls: str = flag("auto", "precision inside the model; auto: bf16 on a GPU, fp32 on a CPU. "
                                "Weights and everything after the logits are fp32",
                        choices=("auto", "fp32", "bf16"))
    # exams
    eval_every: int = flag(10, "steps between exams on eval_data; 0 = never")
    eval_samples: int = flag(4, "responses to each exam problem: the k of Avg@k and Pass@k")
    eval_problems: int = flag(0, "use only the first so many of each exam; 0 = all")
    eval_temperature: float = flag(0.6, "of sampling in exams")
    eval_top_p: float = flag(0.95, "of sampling in exams")

    def __post_init__(self):
        need(self.group_size > 1, "a group of one has no mean to beat: use --group-size 2 or more")
        need(0 <= self.alpha < self.phi,
             "--alpha must lie from 0 to below --phi, or (7) could turn the sign of an advantage")
        need(0 < self.top_p <= 1 and 0 < self.eval_top_p <= 1,
             "--top-p and --eval-top-p lie above 0, at most 1")
        need(self.temperature > 0, "training samples, so it needs --temperature above 0")
        need(self.clip_c == 0 or self.clip_c > 1 + self.clip_high,
             "--clip-c must lie above 1 + clip_high, outside the clip of (2), or be 0 for off")
        need(self.resample >= 0, "--resample counts further rounds: 0 or more")
        need(self.warmup_data or not self.warmup_steps, "--warmup-steps needs --warmup-data")
        need(0 <= self.overlong_cache < self.max_response_tokens,
             "--overlong-cache must lie from 0 to below --max-response-tokens")
        need(self.eval_temperature >= 0, "--eval-temperature must be 0 (greedy) or more")
        for name in ("prompts_per_step", "prompts_per_minibatch", "eval_samples",
                     "max_prompt_tokens", "max_response_tokens", "warmup_batch"):
            need(getattr(self, name) > 0, f"--{name.replace('_', '-')} must be 1 or more")


PRESETS = {   # a name, or a part of one: what such a model changes
    "tiny": dict(train_data="addition", eval_data="addition", warmup_data="addition",
                 warmup_steps=1000, warmup_batch=16, warmup_learning_rate=2e-3, steps=30,
                 prompts_per_step=32, prompts_per_minibatch=8, resample=0, learning_rate=1e-4,
                 top_p=1.0, max_prompt_tokens=32, max_response_tokens=64,
                 eval_samples=8, eval_temperature=1.0, eval_top_p=1.0),
    "DeepScaleR-1.5B": dict(group_size=16, prompts_per_step=64, steps=900,
                            max_prompt_tokens=2048, max_response_tokens=24576),
}


def need(condition, message):
    """Stop with one line that says what is wrong and how to mend it."""
    if not condition:
        raise SystemExit(f"eapo: {message}")


@contextlib.contextmanager
def reading(source):
    """Around what reads a model or data set: no such folder, no network ... become one line."""
    try:
        yield
    except OSError as e:
        raise SystemExit(f"eapo: cannot read {source}: {str(e).splitlines()[0]}") from e


def parse_args(argv=None):
    """Config from the command line: what is typed, else the model's preset, else the default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=". ".join(
        f"With --model {name} the [defaults] are instead: " + ", ".join(
            f"{key.replace('_', '-')} {value}" for key, value in preset.items())
        for name, preset in PRESETS.items()))
    for f in fields(Config):
        text = f.metadata["help"].replace("%", "%%") + f"  [{f.default}]"
        choices = f.metadata.get("choices")
        parser.add_argument("--" + f.name.replace("_", "-"), type=f.type, choices=choices,
                            metavar=None if choices else f.type.__name__.upper(),
                            default=argparse.SUPPRESS, help=text)
    typed = vars(parser.parse_args(argv))
    model = typed.get("model", "tiny")
    preset = next((p for name, p in PRESETS.items()
                   if name == model or name != "tiny" and name in model), {})
    return Config(**{**preset, **typed})


# --------------------------------------------------------------------------------------------------
# Part 2. The algorithm: tensors in, tensors out, no model and no Config. This is what the file is
# for; the parts below only feed it. Functions that take group_size need whole groups; the loss is
# a sum over tokens, so a batch may be cut anywhere for it. To try a credit rule of your own, write
# a function like `entropy_aware_advantages` and call it in `train` in its place.
# --------------------------------------------------------------------------------------------------

def token_entropy(logits):
    """H = - sum_v p_v log p_v  in nats, (..., V) -> (...), p = softmax(logits).

    0 when the policy is sure, log V when it has no idea. Written as log Z - sum_v p_v z_v. Some
    models forbid tokens by z = -inf; they count 0, where 0 * -inf would be nan.
    """
    p = logits.softmax(-1)
    return logits.logsumexp(-1) - (p * torch.where(p > 0, logits, 0)).sum(-1)


def group_advantages(rewards, group_size):
    """(1)  A_i = (r_i - mean(r)) / (std(r) + 1e-6)   over the G responses to one prompt.

    rewards (N,) -> A (N,). std is the sample deviation (n - 1), as in verl.

    The mean of the group stands in for a value network: a response is good if it beat the other
    tries at its own prompt. If all G earn the same, every A is 0 and nothing is learned.
    """
    r = rewards.view(-1, group_size)                                          # (B, G)
    A = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-6)       # (B, G)  (1)
    return A.flatten()                                                        # (N,)


def entropy_mean_std(H, mask, group_size):
    """mu_H and sigma_H: mean and sample deviation of H over all response tokens of each group.

    (N, T), (N, T) -> (N, 1), (N, 1), the same in the G rows of a group. A long response has more
    tokens and so more say. sigma_H carries + 1e-6, for the group whose tokens are all alike.
    """
    shape = len(mask) // group_size, group_size * mask.shape[1]               # B, G*T
    total = lambda x: torch.where(mask, x, 0).view(shape).sum(1, keepdim=True)
    n = total(mask.int())                                                     # (B, 1)
    spread = lambda x: x.repeat_interleave(group_size, 0)                     # (B, 1) -> (N, 1)
    mu = spread(total(H) / n)
    sigma = spread((total((H - mu) ** 2) / (n - 1).clamp(min=1)).sqrt() + 1e-6)
    return mu, sigma


def entropy_score(A, H, mask, group_size, phi):
    """(6)  score_t = clip((H_t - mu_H) / sigma_H, -|A|/phi, +|A|/phi)

    (N,), (N, T), (N, T) -> (N, T), meaningless outside the mask. How unusual the uncertainty of a
    token is within its group, in standard deviations. The clip scales with |A|, so that entropy may
    refine an advantage and can never overwhelm it. This two-sided clip is the paper's "dual
    clipping"; the clips in the loss below are other ones.
    """
    mu, sigma = entropy_mean_std(H, mask, group_size)
    bound = A.abs()[:, None] / phi                                            # (N, 1)
    return ((H - mu) / sigma).clamp(-bound, bound)                            # (N, T)  (6)


def entropy_aware_advantages(A, H, mask, group_size, alpha, phi):
    """(7)  A^CA_t = A + alpha sign(A) score_t,   no gradient through score_t

    A (N,), H (N, T), mask (N, T) -> A^CA (N, T), zero outside the mask. This is EAPO.

    Read it as volume, not direction. sign(A) makes an uncertain token louder in right responses
    and in wrong ones alike, a token of low entropy softer in both. A^CA / A stays within
    1 +- alpha/phi, 0.9 to 1.1 at the defaults, so no sign can turn. alpha = 0 gives every token A:
    GRPO's credit. detach: if a gradient flowed through H, the policy could earn by changing its
    uncertainty instead of its answers. Our H has no gradient; detach keeps that so for any caller.
    """
    score = entropy_score(A, H, mask, group_size, phi).detach()               # (N, T)
    return (A[:, None] + alpha * A.sign()[:, None] * score) * mask            # (N, T)  (7)


def quadrants(rewards, H, mask, group_size):
    """The paper's four kinds of token (section 4), Positive or Negative, High or Low entropy:

        1 PHR  r >= 0, H >= mu_H   right, at a fork      2 PLR  r >= 0, H <  mu_H   right, routine
        4 NHR  r <  0, H >= mu_H   wrong, at a fork      3 NLR  r <  0, H <  mu_H   wrong, routine

    (N,), (N, T), (N, T) -> (N, T) int, 0 outside the mask. They split the response tokens, so the
    losses of the four add up to the whole. In the paper the gains of learning live on the left.
    """
    mu, _ = entropy_mean_std(H, mask, group_size)
    high, positive = H >= mu, rewards[:, None] >= 0                           # (N, T), (N, 1)
    return torch.where(positive, torch.where(high, 1, 2), torch.where(high, 4, 3)) * mask


def surrogate(rho, A, clip_low, clip_high, clip_c):
    """(2)  min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A), and for A < 0 at least c A.

    (N, T) -> (N, T). Once a good token is eps_high likelier than when it was sampled, or a bad one
    eps_low less likely, pushing further pays nothing and the gradient is 0. A bad token that has
    become likelier is still pushed back, and rho A could fall without bound; dual-clip PPO stops
    it at c A, beyond which the gradient is 0 too (Ye et al. 2020; clip_c = 0 turns it off).
    """
    gain = torch.min(rho * A, rho.clamp(1 - clip_low, 1 + clip_high) * A)     # (N, T)  (2)
    return torch.where(A < 0, gain.clamp(min=clip_c * A), gain) if clip_c else gain


def policy_loss(logp, old_logp, A, mask, clip_low, clip_high, clip_c):
    """- sum over tokens of mask * surrogate (2).  (N, T) each -> scalar.

    A sum: the caller divides, or hands in `token_weights` in place of the mask. On the first
    mini-batch of a step rho is 1, the loss is - mean of A over tokens, and its gradient is the
    policy gradient. The loss does not measure progress: watch the reward.
    """
    rho = (logp - old_logp).exp()                                             # (N, T)
    return -(surrogate(rho, A, clip_low, clip_high, clip_c) * mask).sum()


def token_weights(mask, group_size, loss_mean):
    """What each token of a mini-batch counts in (2): weights that sum to 1, 0 outside the mask.

    "tokens": 1 / all tokens, so that a token weighs the same in any response (DAPO and verl).
    "group": 1 / (groups * tokens of its group), which is how the paper prints (2): a mean per
    prompt, then over prompts. Both are fixed before the mini-batch is cut into micro-batches, so
    the cut cannot change the gradient.
    """
    if loss_mean == "tokens":
        return mask / mask.sum()
    tokens = mask.view(-1, group_size * mask.shape[1]).sum(1)                 # (B,)
    return mask / (len(tokens) * tokens.repeat_interleave(group_size))[:, None]


def pass_at_k(n, c, k):
    """(8)  1 - C(n - c, k) / C(n, k): the chance that k of n samples, c right, hold a right one."""
    return 1.0 - math.prod((n - c - i) / (n - i) for i in range(k)) if n - c >= k else 1.0


# --------------------------------------------------------------------------------------------------
# Part 3. The verifier: is the boxed answer equal to the gold? "Verifiable" means that a short
# program decides. All reward hangs on it: it may not pay for a wrong answer, refuse a right one,
# hang or raise. Three steps: scan LaTeX into tokens, read them with a calculator, compare values.
#
# No algebra is needed to see that (x+1)^2 = x^2 + 2x + 1. Two different polynomials of degree d
# agree at a point drawn from N numbers with probability d/N at most, as their difference has at
# most d roots (Schwartz and Zippel). So give each variable a pseudo-random value and compute both
# sides; what is equal at three points is equal. Rational numbers stay exact; roots, pi, e and
# sines are floats, compared to nine digits.
# --------------------------------------------------------------------------------------------------

LONGEST, MOST_TOKENS = 500, 100      # characters and tokens of an answer
MOST_BITS, POINTS = 2 ** 15, 3       # of a fraction, and sample points for each variable

ALIASES = {other: token for token, others in {
    r"\frac": r"\dfrac \tfrac \cfrac", r"\sqrt": "√", "π": r"\pi pi",
    "*": r"\cdot \times × ·", "/": r"\div ÷", "-": "− –", "±": r"\pm", "∓": r"\mp",
    "=": r"\in", "≤": r"\le \leq", "≥": r"\ge \geq", "≠": r"\ne \neq", "∪": r"\cup",
    ",": "; and or OR", "%": r"\% percent", "°": r"\circ \degree degrees", "∞": r"\infty",
}.items() for other in others.split()}
SILENT = {"\\ ", *r"\left \right \big \Big \, \; \: \! \$ $ ~ \( \) \[ \] \displaystyle".split()}
TEXTS = set(r"\text \mbox \textbf \textit \textrm \textnormal \mathrm".split())
NAMES = set(r"\alpha \beta \gamma \theta \lambda \mu \rho \sigma \phi \varphi \omega ∞".split())
CONSTANTS = {"π": math.pi, "e": math.e, "i": 1j, "°": math.nan}
FUNCTIONS = {
    r"\sin": cmath.sin, r"\cos": cmath.cos, r"\tan": cmath.tan, r"\exp": cmath.exp,
    r"\ln": cmath.log, r"\log": cmath.log, r"\sec": lambda z: 1 / cmath.cos(z)}
ARITHMETIC = {"+": add, "-": sub, "*": mul, "/": truediv}
CLOSERS = {"(": ")]", "[": ")]", "{": "}", r"\{": [r"\}"], r"\begin": [r"\end"]}
SUM, FUNCTION, PRODUCT = 6, 7, 8     # how tight operators bind
LEVEL = {r"\\": 1, "&": 2, ",": 3, "=": 4, "≠": 4, "<": 4, ">": 4, "≤": 4, "≥": 4, "∪": 5,
         ":": 5, "+": SUM, "-": SUM, **dict.fromkeys(FUNCTIONS, FUNCTION), "*": PRODUCT,
         "/": PRODUCT}
FACTORS = {*CLOSERS, *CONSTANTS, *FUNCTIONS, r"\frac", r"\sqrt"}


def braced(text, i):
    """The content of the braces that open at i, and where they end; None if they stay open."""
    depth = 0
    for j in range(i, min(len(text), i + LONGEST)):
        if text[j] in "{}" and text[j - 1] != "\\":                  # \{ is a bracket of a set
            depth += 1 if text[j] == "{" else -1
        if depth == 0:
            return text[i:j + 1].removeprefix("{").removesuffix("}"), j + 1
    return None, len(text)


def extract_answer(response):
    """The content of the last complete \\boxed{...}; None if there is none among the last 20."""
    start = len(response)
    for _ in range(20):
        start = response.rfind(r"\boxed{", 0, max(start, 0))
        if start < 0:
            return None
        content, _ = braced(response, start + len(r"\boxed"))
        if content is not None:
            return content
    return None


def span(text, i, characters):
    """The end of the run of `characters` that starts at i."""
    return len(text) - len(text[i:].lstrip(characters))


def join_thousands(text, marks):
    """1,234,567 as 1234567: a mark goes if it has a digit before it and three behind it."""
    for mark in marks:
        joined, *groups = text.split(mark)
        for group in groups:
            thousand = joined[-1:].isdecimal() and span(group, 0, digits) == 3
            joined += group if thousand else mark + group
        text = joined
    return text


def scan(text, prose=False):
    """The tokens of LaTeX text. Mere notation (\\left, \\, $ ..) leaves none; subscripts stay with
    their token: x_1, 204_5. Words are marked by a quote, to tell them from products of variables;
    in `prose`, the inside of \\text{...}, all letters are words."""
    tokens, i = [], 0
    while i < len(text):
        start, last = i, tokens[-1] if tokens else ""
        i = max(span(text, i, ascii_letters), span(text, i, digits + "."), i + 1)
        if text[start] == "\\":
            i = max(span(text, i, ascii_letters), i + 1)
        elif text[start] in digits and last in (r"\frac", r"\sqrt"):
            i = start + 1                                            # TeX takes one digit: \frac12
        token, content = text[start:i], ""
        if token in TEXTS or token in (r"\begin", r"\end", "_"):
            content, i = braced(text, i)
        spaced = token == text or text[start - 1] == " " and len(token) > 3
        if content is None:
            tokens.append("?")                                       # braces that stay open
        elif token in TEXTS:
            tokens += scan(content, prose=True)
        elif token == "_":
            tokens[-1:] = [last + "_" + content]
        elif token in ALIASES or token[0] not in ascii_letters:
            token = ALIASES.get(token, token)
            if not token.isspace() and token not in SILENT and not token == last == ",":
                tokens.append(token)                                 # one comma in "2, 3, and 4"
        elif (prose or spaced and len(token) > 2) and token not in CONSTANTS:
            word = token.lower() if len(token) > 1 else token        # "two lines" is one word
            tokens[-1:] = [last + word] if last.startswith('"') else [*tokens[-1:], '"' + word]
        else:
            tokens += token                                          # xy is x times y
    return tokens


def is_name(token):
    """Whether a token is a variable."""
    letter = token[:1].isascii() and token[:1].isalpha() or token.partition("_")[0] in NAMES
    return letter and token not in CONSTANTS


class Calculator:
    """Operator precedence: an operand takes what follows for as long as operators bind tighter.

    expression = operand {operator operand}       from loose to tight: rows and columns of a matrix,
                                                  comma, = < .., cup and :, + -, * / nothing (2x)
    operand    = "-" product | atom {"!" | "%" | degree | unit | "^" atom}    1\\frac45 is 1 + 4/5
    atom       = number | name | words | bracket expression bracket | \\sin ["^" atom] product
               | \\frac atom atom | \\sqrt ["[" expression "]"] atom

    A value is a number or a structure such as (",", 1, 2), of which the first part is the kind:
    , ∪ without order; () (] [) [] for points and intervals; & \\\\ : = < ..; _ for a base."""

    def __init__(self, tokens, point):
        self.tokens, self.point = ["", *reversed(tokens)], point     # the next token is the last

    def accept(self, token):
        """Take the next token if it is this one."""
        return self.tokens.pop() if self.tokens[-1] == token else ""

    def expression(self, level=0):
        value = self.operand()
        while True:
            symbol = self.tokens[-1]
            factor = symbol in FACTORS or is_name(symbol)            # 2x, 2(x+1), 2\pi
            strength = LEVEL.get(symbol, PRODUCT * factor)
            if strength <= level:
                return value
            if factor:
                value = compute(mul, value, self.expression(PRODUCT))
            elif symbol in ARITHMETIC:
                self.tokens.pop()
                value = compute(ARITHMETIC[symbol], value, self.expression(strength))
            else:
                value = (symbol, value)
                while self.accept(symbol):
                    value += (self.expression(strength),)

    def operand(self):
        """An atom with its sign and the marks behind it; degrees and units do not count."""
        if sign := self.accept("-") or self.accept("+"):
            return compute(ARITHMETIC[sign], Fraction(0), self.expression(SUM))
        whole, value = self.tokens[-1].isdecimal(), self.atom()
        if whole and self.tokens[-1] == r"\frac":
            part = self.atom()
            mixed = isinstance(part, Fraction) and part < 1
            value = compute(add if mixed else mul, value, part)      # 1\frac45 is 1 + 4/5
        while True:
            if self.accept("!"):
                value = compute(factorial, value)
            elif self.accept("%"):
                value = compute(truediv, value, Fraction(100))
            elif self.accept("^"):
                exponent = self.atom()
                value = value if exponent is math.nan else compute(power, value, exponent)
            elif self.tokens[-1].startswith('"'):
                self.tokens.pop()
                if self.accept("^"):                                 # the 2 of cm^2
                    self.atom()
            elif not self.accept("°"):
                return value

    def atom(self):
        token = self.tokens.pop()
        if token and token[0] in digits + ".":
            number, _, base = token.partition("_")
            return ("_", Fraction(number), Fraction(base)) if base else Fraction(number)
        if token in CONSTANTS:
            return CONSTANTS[token]
        if token.startswith('"') or is_name(token):                  # a variable: between 1 and 3
            name = token.strip('"')
            return 1 + Fraction(crc32(f"{self.point}{name}".encode()) % 1994, 997)
        if token in CLOSERS:
            value, closer = self.expression(), self.tokens.pop() or "?"
            if closer not in CLOSERS[token]:
                raise ValueError(token + closer)
            point = kind(value) == "," and token in "(["             # or an interval
            return (token + closer, *value[1:]) if point else value
        if token == r"\frac":
            return compute(truediv, self.atom(), self.atom())
        if token == r"\sqrt":
            degree = self.atom() if self.tokens[-1] == "[" else Fraction(2)
            return compute(power, self.atom(), compute(truediv, Fraction(1), degree))
        if token in FUNCTIONS:                                       # \sin^2 2x is (sin(2x))^2
            exponent = self.atom() if self.accept("^") else Fraction(1)
            inner = self.atom() if self.tokens[-1] in CLOSERS else self.expression(FUNCTION)
            return compute(power, compute(FUNCTIONS[token], inner), exponent)
        raise ValueError(token)


def calculate(tokens, point):
    """The value of an answer at a sample point; with +- in it, a list of two."""
    if "±" in tokens or "∓" in tokens:
        upper = [{"±": "+", "∓": "-"}.get(token, token) for token in tokens]
        lower = [{"±": "-", "∓": "+"}.get(token, token) for token in tokens]
        return (",", calculate(upper, point), calculate(lower, point))
    calculator = Calculator(tokens, point)
    value = calculator.expression()
    if calculator.tokens != [""]:
        raise ValueError(calculator.tokens[-1])
    return value


def kind(value):
    """The kind of a structure; empty for a number."""
    return value[0] if isinstance(value, tuple) else ""


def compute(function, *arguments):
    """The result of an operation on numbers, unless it has too many digits."""
    if not all(isinstance(argument, (Fraction, float, complex)) for argument in arguments):
        raise ValueError("arithmetic is for numbers")
    return bounded(function(*arguments))


def bounded(number, factors=1):
    """The number, if a product of so many factors of its size has not too many digits."""
    if isinstance(number, Fraction) and isinstance(factors, (int, Fraction)):
        bits = (abs(number.numerator) + number.denominator).bit_length()
        if bits * abs(factors) > MOST_BITS:
            raise ValueError("too many digits")
    return number


def power(base, exponent):
    """9^{9^{9^9}} is refused before it is computed."""
    return bounded(base, exponent) ** exponent


def factorial(n):
    """n! is a product of n numbers up to n."""
    if not isinstance(n, Fraction) or n.denominator != 1:
        raise ValueError("the factorial of a fraction")
    return Fraction(math.factorial(bounded(n, n).numerator))


def agree(ours, theirs):
    """Whether two values are equal: structures by their parts, 1, 2 and 2, 1 in any order."""
    if kind(ours) != kind(theirs):                                   # 204 is 204_5
        ours, theirs = (value[1] if kind(value) == "_" else value for value in (ours, theirs))
    kinds = {kind(ours), kind(theirs)}
    if kinds == {""}:
        return close(ours, theirs)
    if len(kinds) > 1 and kinds != {",", "()"} or len(ours) != len(theirs):
        return False                                                 # but 1, 2 in order is (1, 2)
    ordered, rest = not kinds <= {",", "∪"}, list(theirs[1:])
    for item in ours[1:]:
        candidates = rest[:1] if ordered else rest
        match = next((k for k, other in enumerate(candidates) if agree(item, other)), None)
        if match is None:
            return False
        del rest[match]                                              # 1, 1 is not 1, 2
    return True


def close(ours, theirs):
    """Equality of numbers: exact if both are rational, else to nine digits."""
    exact = isinstance(ours, Fraction) and isinstance(theirs, Fraction)
    tolerance = 0 if exact else 1e-9 * abs(theirs) or 1e-13
    return bool(abs(ours - theirs) <= tolerance < math.inf)          # neither nan nor infinity


def same_equation(values):
    """Equations are equal if left minus right keeps one ratio: y = x + 1 and 2y - 2x = 2."""
    if kind(values[0][0]) != "=" or kind(values[0][1]) != "=":
        return False
    ratios = [compute(sub, a, b) / compute(sub, c, d) for (_, a, b), (_, c, d) in values]
    return ratios[0] != 0 and all(close(ratio, ratios[0]) for ratio in ratios)


def equal(ours, theirs):
    """Whether two lists of tokens are the same or mean the same; False if they are unreadable."""
    if ours == theirs or max(len(ours), len(theirs)) > MOST_TOKENS:
        return ours == theirs != []
    if ours[1:2] == ["="] and is_name(ours[0]) and "=" not in theirs:
        ours = ours[2:]                                              # x = 5 is 5, but not y = 5
    if theirs[1:2] == ["="] and is_name(theirs[0]) and "=" not in ours:
        theirs = theirs[2:]
    names = {token.strip('"') for token in theirs if token[0] == '"' or is_name(token)}
    if not set(filter(is_name, ours)) <= names:
        return False                                                 # x - x + 5 is no answer
    points = range(POINTS if names else 1)
    try:
        values = [(calculate(ours, k), calculate(theirs, k)) for k in points]
        same = all(agree(a, b) for a, b in values)
        return same or len(points) > 1 and same_equation(values)
    except (ArithmeticError, ValueError, RecursionError):
        return False


def same_answer(prediction, gold):
    """Whether two answers are equal in one reading: 1,234 may be a number or two, 50% 50 or 1/2."""
    pair = [text.strip("$ \n").removesuffix(".") for text in (prediction, gold)]
    if max(map(len, pair)) > LONGEST:
        return False
    bracketed = any(opener in text for opener in ("(", "[", r"\{") for text in pair)
    for marks in [("{,}", r",\!")] + [("{,}", r",\!", ",")] * (not bracketed):
        ours, theirs = (scan(join_thousands(text, marks)) for text in pair)
        if equal(ours, theirs):
            return True
        if "%" in ours + theirs and equal(*([t for t in x if t != "%"] for x in (ours, theirs))):
            return True
    return False


def is_correct(response, gold):
    """Whether the response's last \\boxed{} holds the gold answer, or one of a list of golds."""
    answer = extract_answer(response)
    golds = [str(g) for g in (gold if isinstance(gold, (list, tuple)) else [gold])]
    return answer is not None and any(same_answer(answer, extract_answer(g) or g) for g in golds)


# --------------------------------------------------------------------------------------------------
# Part 4. Problems: a task made here, and problems from files and from the hub.
# --------------------------------------------------------------------------------------------------

@dataclass
class Problem:
    text: str
    answer: object = None     # gold answer, or a list of alternatives
    solution: str = ""        # worked solution, for imitation only
    ids: list = None          # the prompt as tokens: chat template or suffix applied, once


def pupil(a, b, rng):
    """Column addition written by a pupil who has not understood carrying: 5170 + 6749 becomes
    `9+0=9 7+4=11 7+1=8 5+6=11 \\boxed{11819}` or, with the carry, `0+9=9 7+4=11 7+1+1=9 6+5=11
    \\boxed{11919}`.

    Columns run from the right. Pupils carry when a sum feels big, with probability
    sigmoid((sum - 12.5) / 1.5): to write +1 or not is a fork that decides the answer. Which digit
    of a column comes first is a fork that decides nothing. All other tokens are routine.
    """
    columns, result, total = [], "", 0
    for x, y in zip(reversed(f"{a:04}"), reversed(f"{b:04}")):
        carry = rng.random() < 1 / (1 + math.exp((12.5 - total) / 1.5)) if columns else 0
        x, y = rng.sample((x, y), 2)
        total = int(x) + int(y) + carry
        columns.append(f"{x}+{y}{'+1' * carry}={total}")
        result = str(total % 10) + result
    result = str(total) + result[1:]
    return " ".join(columns) + f" \\boxed{{{result}}}"


def addition(split, warmup=20800, train=8192, exam=128):
    """The default task: sums of two 4-digit numbers. The three splits share no problem."""
    rng = random.Random(0)
    pairs = [divmod(n, 10 ** 4) for n in rng.sample(range(10 ** 8), warmup + train + exam)]
    part = {"exam": pairs[:exam], "train": pairs[exam:exam + train], "warmup": pairs[-warmup:]}
    return [Problem(f"{a:04}+{b:04}=", str(a + b), pupil(a, b, rng)) for a, b in part[split]]


def read_rows(source, split):
    """The rows of a .jsonl, .csv or .parquet file, or of a hub data set `id[:split]`, as dicts."""
    kind = source.rpartition(".")[2].lower()
    if kind in ("jsonl", "json"):
        rows = []
        need(os.path.isfile(source), f"{source}: no such file")
        with open(source, encoding="utf-8") as f:
            lines = list(f)
        for n, line in enumerate(lines, 1):
            try:
                row = json.loads(line) if line.strip() else None
            except json.JSONDecodeError as e:
                raise SystemExit(f"eapo: {source}, line {n}: not JSON: {e}") from e
            need(row is None or isinstance(row, dict), f"{source}, line {n}: not a JSON object")
            rows += [row] if row else []
        return rows
    if kind in ("csv", "parquet"):
        need(os.path.isfile(source), f"{source}: no such file")
        with reading(source):
            return list(datasets.load_dataset(kind, data_files=source, split="train"))
    name, _, wanted = source.partition(":")
    with reading(source):
        parts = datasets.get_dataset_split_names(name)
    order = [wanted] if wanted else parts if len(parts) == 1 else ["train"]
    if split == "exam" and not wanted:
        order = [*parts[:len(parts) == 1], "test", "train"]
    part = next((p for p in order if p in parts), None)
    need(part, f"{source} has the splits {', '.join(parts)}: name one as {name}:{parts[0]}")
    with reading(source):
        return list(datasets.load_dataset(name, split=part))


def column(rows, names, source, role):
    """Which column plays a role: the first of names if present, else the only one that is."""
    found = [n for n in names if n in rows[0]]
    need(found, f"{source}: no column for the {role} among {', '.join(rows[0])}; "
                f"name it {names[0]}")
    need(len(found) == 1 or found[0] == names[0],
         f"{source}: {' and '.join(found)} could all be the {role}; name the right one {names[0]}")
    return found[0]


def load_problems(source, split):
    """Problems of a data source; split "train", "exam" or "warmup" says which columns they need."""
    if source == "addition":
        return addition(split)
    rows = read_rows(source, split)
    need(rows, f"{source}: no rows")
    text = column(rows, ("problem", "question", "prompt"), source, "problem")
    if split == "warmup":
        target = column(rows, ("solution", "response", "completion"), source, "worked solution")
    else:
        target = column(rows, ("answer", "ground_truth", "solution"), source, "answer")
    for n, row in enumerate(rows, 1):
        need(row.get(text) not in (None, "") and row.get(target) not in (None, "", []),
             f"{source}, row {n}: {text} or {target} is empty")
    if split == "warmup":
        return [Problem(str(r[text]), solution=str(r[target])) for r in rows]
    golds = [r[target] for r in rows]
    if target == "solution":     # worked solutions: the gold is what they box, if they box it
        golds = [extract_answer(str(g)) or g for g in golds]
    return [Problem(str(r[text]), g) for r, g in zip(rows, golds)]


SUFFIX = "\nPlease reason step by step, and put your final answer within \\boxed{}."


def render(tokenizer, text):
    """A problem as prompt tokens. The chat template, if any, writes BOS itself, so none is added to
    it; without one, the paper's suffix is put behind the problem and the tokenizer's BOS before."""
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False,
                                             add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False).input_ids
    ids = tokenizer(text + SUFFIX).input_ids
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids


def prepare(problems, tokenizer, cfg, name):
    """Render every problem once, and leave out those longer than max_prompt_tokens."""
    for p in tqdm(problems, desc=f"tokens of {name}", leave=False, disable=len(problems) < 5000):
        p.ids = render(tokenizer, p.text)
    short = [p for p in problems if len(p.ids) <= cfg.max_prompt_tokens]
    if len(short) < len(problems):
        print(f"{name}: {len(problems) - len(short)} of {len(problems)} prompts left out, longer "
              f"than --max-prompt-tokens {cfg.max_prompt_tokens}")
    need(short, f"{name}: no prompt is within --max-prompt-tokens {cfg.max_prompt_tokens}")
    return short


class Stream:
    """Problems without end, every epoch in another order; `position` counts those handed out."""

    def __init__(self, problems, seed):
        self.problems, self.seed, self.position = problems, seed, 0

    def take(self, n):
        """The next n problems."""
        size, taken = len(self.problems), []
        while len(taken) < n:
            epoch, start = divmod(self.position, size)
            order = random.Random(f"{self.seed}/{epoch}").sample(self.problems, size)
            piece = order[start:start + n - len(taken)]
            taken, self.position = taken + piece, self.position + len(piece)
        return taken


def load_data(cfg, tokenizer):
    """The training Stream, the exams as {short name: problems}, the worked solutions to imitate."""
    def get(source, split):
        return prepare(load_problems(source, split), tokenizer, cfg, f"{source} ({split})")
    exams = {}
    for source in cfg.eval_data.replace(" ", "").split(",") if cfg.eval_every else []:
        name = os.path.basename(source).replace(":", "-")
        for ending in (".jsonl", ".json", ".csv", ".parquet"):
            name = name.removesuffix(ending)
        need(name not in exams, f"--eval-data has two sets {name}: metrics could not tell which")
        exams[name] = get(source, "exam")[:cfg.eval_problems or None]
    solutions = get(cfg.warmup_data, "warmup") if cfg.warmup_data and cfg.warmup_steps else []
    return Stream(get(cfg.train_data, "train"), cfg.seed), exams, solutions


# --------------------------------------------------------------------------------------------------
# Part 5. Rollouts. From prompts to a Batch: G responses to each, with the log-probability of every
# token drawn and the entropy it was drawn at.
# --------------------------------------------------------------------------------------------------

@dataclass
class Batch:
    """N = B*G responses, the G responses to one prompt in adjacent rows.

    Rows are right-padded: prompt, response, zeros. Masks come from the lengths and never from
    token values, so it does not matter that many models pad with their stop token.
    """
    ids: torch.Tensor           # (N, L) prompt, then response
    prompt_len: torch.Tensor    # (N,)   tokens
    response_len: torch.Tensor  # (N,)   tokens, the stop token included
    logp: torch.Tensor = None   # (N, T) log pi_old of each response token, nats
    H: torch.Tensor = None      # (N, T) entropy of pi_old before each response token, nats
    ended: torch.Tensor = None  # (N,)   the model stopped by itself; False: truncated
    right: torch.Tensor = None  # (N,)   the verifier's verdict
    reward: torch.Tensor = None  # (N,)  r
    A: torch.Tensor = None      # (N, T) A^CA, zero outside the mask

    @property
    def mask(self):
        """(N, T) True on response tokens."""
        T = max(self.response_len.tolist(), default=0)
        return torch.arange(T, device=self.ids.device) < self.response_len[:, None]

    def rows(self, i):
        """The Batch of rows i, in that order, cut to its own longest prompt + response."""
        L, T = (max(x[i].tolist(), default=0)
                for x in (self.prompt_len + self.response_len, self.response_len))
        width = {"ids": L, "logp": T, "H": T, "A": T}
        cut = lambda name, x: x[i][:, :width[name]] if name in width else x[i]
        return Batch(**{f.name: cut(f.name, x) for f in fields(self)
                        if (x := getattr(self, f.name)) is not None})

    def response(self, i):
        """The tokens of response i, a list of ids."""
        start = int(self.prompt_len[i])
        return self.ids[i, start:start + int(self.response_len[i])].tolist()


def pack(prompts, responses, device):
    """Lists of token ids, one pair a row -> a Batch with ids and lengths."""
    rows = [torch.tensor(p + r) for p, r in zip(prompts, responses)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    length = lambda lists: torch.tensor([len(x) for x in lists], device=device)
    return Batch(ids.to(device), length(prompts), length(responses))


def join(batches):
    """Batches below one another, padded to the longest."""
    def stack(name):
        parts = [getattr(b, name) for b in batches]
        if parts[0] is None:
            return None
        width = max(p.shape[-1] for p in parts) if parts[0].dim() == 2 else 0
        fit = lambda p: torch.nn.functional.pad(p, (0, width - p.shape[1])) if width else p
        return torch.cat([fit(p) for p in parts])
    return Batch(**{f.name: stack(f.name) for f in fields(Batch)})


def log_prob_and_entropy(logits, tokens, temperature):
    """log pi(token) and H of pi = softmax(logits / temperature), over the full vocabulary in fp32.

    (M, V), (M,) -> (M,), (M,). The only place where these two are computed: the sampler, `rescore`
    and the update all come here. Temperature 0, which draws greedily, is scored as 1. top_p does
    not enter: tokens are drawn from a truncated pi, but pi_old is all of it, as in verl.
    """
    logits = logits.float() / (temperature or 1.0)
    logp = logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
    return logp, token_entropy(logits)


def draw(logits, temperature, top_p):
    """One token from each row: (rows, V) -> (rows,). temperature 0 takes the likeliest; top_p < 1
    draws from the fewest tokens that hold that much probability, always at least one."""
    if temperature == 0:
        return logits.argmax(-1)
    p = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        likeliest, token = p.sort(-1, descending=True)
        before = likeliest.cumsum(-1) - likeliest        # probability of all likelier tokens
        p = torch.zeros_like(p).scatter(-1, token, torch.where(before < top_p, likeliest, 0))
    return torch.multinomial(p, 1)[:, 0]


class RoomyLayer(transformers.cache_utils.DynamicLayer):
    """The KV cache of one layer, with free room behind it. The stock layer copies all it holds at
    every token; this one writes new tokens into the room, and copies once in 64."""
    room = None

    def update(self, keys, values, *args, **kwargs):
        """Append keys, values (rows, heads, new tokens, D) -> all keys, all values."""
        start, end = self.get_seq_length(), self.get_seq_length() + keys.shape[2]
        if start == 0:
            return super().update(keys, values, *args, **kwargs)
        if self.room is None or len(self.room[0]) != len(keys) or self.room[0].shape[2] < end:
            held = self.keys, self.values
            self.room = [torch.nn.functional.pad(x, (0, 0, 0, 64)) for x in held]
        for room, new in zip(self.room, (keys, values)):
            room[:, :, start:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self.room)
        return self.keys, self.values


@torch.no_grad()
def sample_loop(lm, prompts, group_size, max_tokens, temperature, top_p, stop_ids):
    """G responses to each prompt: decoding, written out.

    Each prompt is read once and its KV cache repeated G times. Then one token at a time for all
    rows. A row that drew a stop token is finished, the stop token belonging to it; finished rows
    are taken out of the batch once they are a fifth of it. Prompts are padded on the left, so that
    all rows draw their next token in the same column. -> Batch of N rows with logp and H, which
    the logits drawn from give for free.
    """
    device, P = lm.device, max(map(len, prompts))
    ids = torch.tensor([[0] * (P - len(p)) + p for p in prompts], device=device)       # (B, P)
    seen = torch.tensor([[0] * (P - len(p)) + [1] * len(p) for p in prompts], device=device)
    cache = transformers.DynamicCache(config=lm.config)
    cache.layers = [RoomyLayer() if type(x) is transformers.cache_utils.DynamicLayer else x
                    for x in cache.layers]
    out = lm(ids, attention_mask=seen, position_ids=(seen.cumsum(1) - 1).clamp(min=0),
             past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.batch_repeat_interleave(group_size)
    logits, seen = (x.repeat_interleave(group_size, 0) for x in (out.logits[:, -1], seen))
    N = len(logits)
    tokens = torch.zeros(N, max_tokens, dtype=torch.long, device=device)
    logp, H = torch.zeros(2, N, max_tokens, device=device)
    length, ended = torch.zeros(2, N, dtype=torch.long, device=device)
    row, stop = torch.arange(N, device=device), torch.tensor(stop_ids, device=device)
    writes = torch.ones(N, dtype=torch.bool, device=device)                            # (rows,)
    for t in range(max_tokens):
        token = draw(logits, temperature, top_p)                                       # (rows,)
        tokens[row, t], length[row[writes]] = token, t + 1
        logp[row, t], H[row, t] = log_prob_and_entropy(logits, token, temperature)
        done = torch.isin(token, stop)
        ended[row[writes & done]] = 1
        writes &= ~done
        if not writes.any() or t + 1 == max_tokens:
            break
        if writes.sum() <= 0.8 * len(writes):       # leaving copies the cache: a few rows at a time
            stay = writes.nonzero()[:, 0]
            row, token, seen, writes = row[stay], token[stay], seen[stay], writes[stay]
            cache.batch_select_indices(stay)
        position = seen.sum(1, keepdim=True)                                           # (rows, 1)
        seen = torch.cat([seen, torch.ones_like(position)], 1)
        logits = lm(token[:, None], attention_mask=seen, position_ids=position,
                    past_key_values=cache, use_cache=True).logits[:, -1]               # (rows, V)
    T = int(length.max())
    responses = [x[:n] for x, n in zip(tokens.tolist(), length.tolist())]
    batch = pack([p for p in prompts for _ in range(group_size)], responses, device)
    logp, H = (x[:, :T] * batch.mask for x in (logp, H))
    return replace(batch, logp=logp, H=H, ended=ended.bool())


def sample_engine(lm, prompts, group_size, max_tokens, temperature, top_p, stop_ids):
    """The same by transformers' continuous batching: a paged KV cache in which a group shares the
    blocks of its prompt, and finished rows make room for waiting ones. For GPUs. -> Batch without
    logp and H: `rescore` adds them."""
    greedy = temperature == 0       # the engine forks a prompt into a group only to sample
    how = dict(do_sample=False) if greedy else dict(
        do_sample=True, temperature=temperature, top_p=top_p, top_k=0,
        num_return_sequences=group_size)
    config = GenerationConfig(max_new_tokens=max_tokens, eos_token_id=stop_ids,
                              pad_token_id=stop_ids[0], **how)
    asked = [p for p in prompts for _ in range(group_size if greedy else 1)]
    outputs = list(lm.generate_batch(inputs=asked, generation_config=config).values())
    rows = [p for p in prompts for _ in range(group_size)]
    failed = [o.error for o in outputs if o.error]
    need([o.prompt_ids for o in outputs] == rows and not failed,
         f"the engine answered {len(outputs) - len(failed)} of {len(rows)} requests, or not in "
         f"order {failed[:1]}; try --sampler loop")
    responses = [o.generated_tokens for o in outputs]
    batch = pack(rows, responses, lm.device)
    ended = torch.tensor([r[-1] in stop_ids for r in responses], device=lm.device)
    return replace(batch, ended=ended)


# --------------------------------------------------------------------------------------------------
# Part 6. The policy: a causal language model, and the two numbers we need of it at every response
# token. One forward pass gives both; the update, `rescore` and imitation share it.
# --------------------------------------------------------------------------------------------------

CHUNK = 2 ** 25     # logits in memory at a time, as a count of numbers: 128 MB in fp32


def chunked_log_prob_and_entropy(hidden, head, tokens, temperature):
    """log pi(token) and H from hidden states: (M, D), (M,) -> (M,), (M,).

    An (M, V) matrix of logits is the largest thing in training: 4096 tokens at V = 152,064 are
    2.5 GB, several times over with gradients. So it is never made: tokens go through the head a
    chunk at a time, and `checkpoint` forgets each chunk's logits and makes them again in backward.
    """
    def one(h, y):
        return log_prob_and_entropy(head(h), y, temperature)
    size = max(1, CHUNK // head.weight.shape[0])
    parts = [checkpoint(one, h, y, use_reentrant=False)
             for h, y in zip(hidden.split(size), tokens.split(size))]
    return tuple(torch.cat(x) for x in zip(*parts))


class Policy(torch.nn.Module):
    """pi_theta: a transformers causal LM whose forward returns what RL needs instead of logits."""

    def __init__(self, lm, bf16):
        super().__init__()
        self.lm, self.bf16 = lm, bf16

    def forward(self, batch, temperature):
        """logp and H of every response token under the current weights: (N, T), (N, T), 0 outside.

        The hidden state at position p predicts token p + 1, so response token t, which stands at
        prompt_len + t, is predicted one to its left. Padding is on the right, where a causal model
        cannot see it from any real token, so no attention mask is needed.
        """
        ids, mask = batch.ids, batch.mask
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bf16):
            hidden = self.lm.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
            row, t = mask.nonzero(as_tuple=True)                                       # (M,) both
            at = batch.prompt_len[row] + t                                             # (M,)
            logp, H = chunked_log_prob_and_entropy(
                hidden[row, at - 1], self.lm.get_output_embeddings(), ids[row, at], temperature)
        place = lambda x: torch.zeros(mask.shape, device=ids.device).index_put((row, t), x)
        return place(logp), place(H)


def tiny_model(seed):
    """A 0.4M-parameter Llama with random weights, and a tokenizer of single characters.

    The tokenizer is written as the file that a Hugging Face folder holds: byte-pair encoding
    without a single merge leaves characters. The chat template makes a prompt the bare problem.
    """
    special, pieces = ["<pad>", "<eos>", "<unk>"], [*"0123456789+= }", "\\boxed{"]
    vocabulary = {piece: n for n, piece in enumerate(special + pieces)}
    whole = [{"id": vocabulary[x], "content": x, "special": x in special, "normalized": False,
              "single_word": False, "lstrip": False, "rstrip": False}
             for x in special + pieces[-1:]]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "tokenizer.json")
        with open(path, "w") as f:
            bpe = {"type": "BPE", "vocab": vocabulary, "merges": [], "unk_token": "<unk>"}
            json.dump({"version": "1.0", "added_tokens": whole, "decoder": {"type": "Fuse"},
                       "model": bpe}, f)
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=path, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
            chat_template="{{ messages[0]['content'] }}")
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        initializer_range=0.08, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)), tokenizer


@dataclass
class Run:
    """What every phase of a run shares."""
    cfg: Config
    policy: Policy
    tokenizer: object
    stop_ids: list              # a response ends with one of these, the tokenizer's own first
    sampling_lm: object         # the model to sample from, see refresh
    seconds: dict = field(default_factory=dict)     # of this step, by phase

    @contextlib.contextmanager
    def timed(self, phase):
        """Add the time of a with-block to seconds[phase]."""
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def start_step(self):
        """Reset the clocks -> the time now."""
        self.seconds = dict.fromkeys(("sample", "score", "update"), 0.0)
        return time.perf_counter()

    def refresh(self):
        """Bring the sampling model up to date: a bf16 copy; or, in fp32, the policy itself."""
        if self.sampling_lm is not self.policy.lm:
            self.sampling_lm.load_state_dict(self.policy.lm.state_dict())


def load(cfg):
    """The policy with fp32 weights, its tokenizer, the ids that end a response: a Run."""
    if cfg.model == "tiny":
        lm, tokenizer = tiny_model(cfg.seed)
    else:
        with reading(cfg.model):
            lm = AutoModelForCausalLM.from_pretrained(cfg.model, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(cfg.model)
    ends = lm.generation_config.eos_token_id
    ends = [tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])]
    stop_ids = [x for x in dict.fromkeys(ends) if x is not None]
    need(stop_ids, f"{cfg.model}: neither tokenizer nor generation config names a stop token")
    lm = lm.to("cuda" if torch.cuda.is_available() else "cpu").eval()     # eval: dropout off
    with torch.no_grad():
        probe = torch.tensor([stop_ids[:1] * 2], device=lm.device)
        hidden = lm.get_decoder()(probe, use_cache=False).last_hidden_state
        same = torch.allclose(lm.get_output_embeddings()(hidden), lm(probe).logits, atol=1e-3)
    need(same, f"{cfg.model} changes its logits after the output head (a soft cap or a scale); "
               "put the same after head(h) in chunked_log_prob_and_entropy to train it")
    bf16 = cfg.matmuls == "bf16" or cfg.matmuls == "auto" and lm.device.type == "cuda"
    sampler = lm if not bf16 else AutoModelForCausalLM.from_config(
        lm.config, dtype=torch.bfloat16).to(lm.device).eval()
    run = Run(cfg, Policy(lm, bf16), tokenizer, stop_ids, sampler)
    run.refresh()
    return run


def micro_batches(batch, cfg):
    """Row indices cut so that rows * longest row <= microbatch_tokens, or one row where that alone
    is longer. Longest rows first, so that neighbours are alike and little is padding."""
    lengths, tokens = batch.prompt_len + batch.response_len, cfg.microbatch_tokens
    tokens = tokens or (16384 if batch.ids.is_cuda else 2048)
    order = lengths.argsort(descending=True, stable=True)
    while len(order):
        n = max(1, tokens // int(lengths[order[0]]))
        yield order[:n]
        order = order[n:]


def optimizer_step(policy, optimizer, what):
    """Clip the gradient, step, forget the gradient. -> gradient norm before the clip."""
    norm = float(torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0))
    need(math.isfinite(norm), f"the gradient of {what} is {norm}: nothing was changed by it; "
                              "look at the learning rate and the last lines of metrics.jsonl")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def learn(run, optimizer, mini, what):
    """One optimizer step on L (2) over a mini-batch, in micro-batches that fit in memory.

    -> loss, gradient norm, and how many tokens had their gradient stopped by a clip of (2).
    """
    cfg, loss, clipped = run.cfg, 0.0, 0
    clips = cfg.clip_low, cfg.clip_high, cfg.clip_c
    weight = token_weights(mini.mask, cfg.group_size, cfg.loss_mean)          # (N, T), sums to 1
    for i in micro_batches(mini, cfg):
        micro = mini.rows(i)
        w = weight[i][:, :micro.A.shape[1]]                                   # (n, T)
        logp, _ = run.policy(micro, cfg.temperature)                          # (n, T)
        part = policy_loss(logp, micro.logp, micro.A, w, *clips)              # (2)
        part.backward()
        rho = (logp.detach() - micro.logp).exp()
        clipped += int(((surrogate(rho, micro.A, *clips) != rho * micro.A) & micro.mask).sum())
        loss += float(part.detach())
    return loss, optimizer_step(run.policy, optimizer, what), clipped


def imitate(run, problems):
    """Warm-up: make worked solutions likelier, token by token, so that RL has something to mark.

    RL can only reinforce what the model already tries now and then. The loss is - mean log p over
    the tokens of the solutions and their stop tokens: (2) with log p in the place of rho A.
    """
    cfg, stream = run.cfg, Stream(problems, run.cfg.seed)
    optimizer = torch.optim.AdamW(run.policy.parameters(), betas=(0.9, 0.95), weight_decay=0.0,
                                  fused=True)
    steps = range(cfg.warmup_steps if problems else 0)
    marked = [is_correct(p.solution, p.answer) for p in problems[:1000] if p.answer]
    if marked:
        print(f"warm-up: {len(problems)} worked solutions, {sum(marked) / len(marked):.0%} of them "
              "right; once it has converged the base model solves about as many")
    with tqdm(steps, desc="warm-up", unit="step", disable=not steps) as bar:
        for step in bar:
            left = 1 - step / cfg.warmup_steps
            rate = cfg.warmup_learning_rate * min(1.0, (step + 1) / 20, left / 0.3)
            optimizer.param_groups[0]["lr"] = rate
            taken = stream.take(cfg.warmup_batch)
            texts = [p.solution for p in taken]
            solutions = run.tokenizer(texts, add_special_tokens=False).input_ids
            responses = [(x + run.stop_ids[:1])[:cfg.max_response_tokens] for x in solutions]
            batch = pack([p.ids for p in taken], responses, run.policy.lm.device)
            tokens, loss = int(batch.response_len.sum()), 0.0
            for i in micro_batches(batch, cfg):
                logp, _ = run.policy(batch.rows(i), 1.0)
                part = -logp.sum() / tokens
                part.backward()
                loss += float(part.detach())
            optimizer_step(run.policy, optimizer, f"warm-up step {step + 1}")
            bar.set_postfix_str(f"loss {loss:.3f} nats a token", refresh=False)
    run.refresh()


# --------------------------------------------------------------------------------------------------
# Part 7. Try, mark, and the exam.
# --------------------------------------------------------------------------------------------------

ROWS = 512      # responses that the loop decodes at a time


def attempt(run, problems, n, temperature, top_p):
    """n responses to each problem, marked: a Batch with `right`, and `reward` +1 or -1."""
    cfg, lm = run.cfg, run.sampling_lm
    engine = cfg.sampler == "engine" or cfg.sampler == "auto" and lm.device.type == "cuda"
    sample, B = (sample_engine, len(problems)) if engine else (sample_loop, max(1, ROWS // n))
    with run.timed("sample"):
        blocks = tqdm(range(0, len(problems), B), desc="sampling", leave=False,
                      disable=len(problems) <= 4 * B)
        batch = join([sample(lm, [p.ids for p in problems[i:i + B]], n, cfg.max_response_tokens,
                             temperature, top_p, run.stop_ids) for i in blocks])
    if batch.H is None or lm is not run.policy.lm:
        rescore(run, batch, temperature)
    texts = run.tokenizer.batch_decode([batch.response(i) for i in range(len(batch.ids))],
                                       skip_special_tokens=True)
    right = [is_correct(text, problems[i // n].answer) for i, text in enumerate(texts)]
    batch.right = torch.tensor(right, device=lm.device)
    batch.reward = torch.where(batch.right, 1.0, -1.0)
    if cfg.overlong_cache:      # DAPO's soft penalty, 0 to -1 over the last overlong_cache tokens
        over = batch.response_len - (cfg.max_response_tokens - cfg.overlong_cache)
        batch.reward -= (over / cfg.overlong_cache).clamp(0, 1)
    return batch


@torch.no_grad()
def rescore(run, batch, temperature):
    """logp and H of a batch by the policy itself, where another model sampled: a bf16 copy, or an
    engine with kernels of its own, would put its rounding errors into rho."""
    with run.timed("score"):
        batch.logp, batch.H = torch.zeros(2, *batch.mask.shape, device=batch.ids.device)
        for i in micro_batches(batch, run.cfg):
            for mine, theirs in zip((batch.logp, batch.H), run.policy(batch.rows(i), temperature)):
                mine[i, :theirs.shape[1]] = theirs


def roll_out(run, stream):
    """Try and mark, until prompts_per_step groups can teach something or the rounds are used up.

    A group with equal rewards has A = 0 for all its tokens: it is dropped, and other problems are
    tried in its place (dynamic sampling). -> the Batch of all that was tried, and which of its rows
    to learn from, (n,).
    """
    cfg, tried, missing = run.cfg, [], run.cfg.prompts_per_step
    for _ in range(1 + cfg.resample):
        batch = attempt(run, stream.take(missing), cfg.group_size, cfg.temperature, cfg.top_p)
        tried.append(batch)
        missing -= int(mixed_groups(batch, cfg).sum())
        if missing == 0:
            break
    batch = join(tried)
    return batch, mixed_groups(batch, cfg).repeat_interleave(cfg.group_size).nonzero()[:, 0]


def mixed_groups(batch, cfg):
    """Which groups hold different rewards: (N,) -> (B,) bool."""
    r = batch.reward.view(-1, cfg.group_size)
    return r.max(1).values != r.min(1).values


def mini_batches(batch, cfg):
    """The batch in a random order of groups, cut evenly into about prompts_per_minibatch each."""
    groups = len(batch.ids) // cfg.group_size
    rows = torch.arange(len(batch.ids), device=batch.ids.device).view(groups, cfg.group_size)
    parts = -(-groups // cfg.prompts_per_minibatch)     # rounded up; 0 if no group disagreed
    for part in torch.randperm(groups).tensor_split(parts) if parts else []:
        yield batch.rows(rows[part.to(rows.device)].flatten())


def interval(shares, draws=2000):
    """95% bootstrap interval of a mean over questions: (questions,) -> low, high."""
    g = torch.Generator().manual_seed(0)
    picks = torch.randint(len(shares), (draws, len(shares)), generator=g)
    return torch.quantile(shares[picks].mean(1), torch.tensor([0.025, 0.975])).tolist()


def sit_exams(run, exams):
    """Avg@k and Pass@k on every exam -> metrics, and the Batch of each exam. Exams draw from a
    random generator of their own, so that looking does not change the run."""
    cfg, metrics, batches, k = run.cfg, {}, {}, run.cfg.eval_samples
    with torch.random.fork_rng():
        torch.manual_seed(cfg.seed)
        for name, problems in exams.items():
            batch = batches[name] = attempt(run, problems, k, cfg.eval_temperature, cfg.eval_top_p)
            c = batch.right.view(-1, k).sum(1).cpu()                          # right responses (B,)
            low, high = interval(c / k)
            metrics |= {f"eval/{name}/{key}": round(float(x), 6) for key, x in {
                f"avg@{k}": (c / k).mean(), "avg_low": low, "avg_high": high,
                f"pass@{k}": sum(pass_at_k(k, int(right), k) for right in c) / len(c),
                "entropy": batch.H[batch.mask].mean(), "length": batch.response_len.float().mean(),
                "truncated": 1 - batch.ended.float().mean()}.items()}
    return metrics, batches


# --------------------------------------------------------------------------------------------------
# Part 8. Plumbing: files, metrics, the terminal. Skip on first reading.
# --------------------------------------------------------------------------------------------------

QUADRANTS = {"PHR": "\033[1;92m", "PLR": "\033[32m", "NLR": "\033[31m", "NHR": "\033[1;91m"}


def measure(run, batch, used, updates, seconds):
    """The metrics of one step: of all that was tried, and of the rows learned from (`used`)."""
    cfg, right = run.cfg, batch.right.view(-1, run.cfg.group_size)
    tokens, learned = int(batch.response_len.sum()), max(1, int(used.response_len.sum()))
    losses, norms, clipped = zip(*updates or [(0.0, 0.0, 0)])
    m = dict(
        reward=batch.reward.mean(), solve_rate=right.float().mean(),
        entropy=batch.H[batch.mask].mean(),
        response_tokens=tokens, response_length=batch.response_len.float().mean(),
        truncated=1 - batch.ended.float().mean(), groups=len(right),
        groups_all_right=int(right.all(1).sum()), groups_all_wrong=int((~right).all(1).sum()),
        loss=sum(losses) / len(losses), grad_norm=sum(norms) / len(norms),
        clip_fraction=sum(clipped) / learned)
    q = quadrants(used.reward, used.H, used.mask, cfg.group_size)
    for code, name in enumerate(QUADRANTS, 1):
        m[f"tokens/{name}"] = (q == code).sum() / learned
        m[f"advantage/{name}"] = used.A[q == code].abs().sum() / used.A.abs().sum().clamp(min=1e-9)
    m |= dict(seconds=seconds, **{f"seconds_{phase}": x for phase, x in run.seconds.items()},
              tokens_per_second=tokens / seconds)
    m["peak_memory_bytes"] = torch.cuda.max_memory_allocated() if batch.ids.is_cuda else 0
    return {key: x if isinstance(x, int) else round(float(x), 6) for key, x in m.items()}


def save(run, out):
    """The policy and its tokenizer as an ordinary Hugging Face folder, out/model. Written beside
    and then renamed: there is never half a model."""
    path = os.path.join(out, "model")
    run.policy.lm.save_pretrained(path + ".new")
    run.tokenizer.save_pretrained(path + ".new")
    shutil.rmtree(path, ignore_errors=True)
    os.replace(path + ".new", path)


def open_run(cfg):
    """Make the folder of the run and write config.json into it -> path."""
    name = os.path.basename(os.path.normpath(cfg.model))
    out = cfg.out or os.path.join("runs", f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    need(not os.path.exists(os.path.join(out, "metrics.jsonl")),
         f"{out} holds the metrics of another run: choose another --out")
    os.makedirs(out, exist_ok=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__,
                "python": platform.python_version()}
    with open(os.path.join(out, "config.json"), "w") as f:
        json.dump(asdict(cfg) | {"versions": versions}, f, indent=2)
    return out


class Look:
    """Watches a run: a progress bar, metrics.jsonl, exams, and what to print at the end."""

    def __init__(self, run, out, exams):
        self.run, self.out, self.exams = run, out, exams
        self.solve_rates, self.results = [], {}             # results: exam metrics by step
        self.before = self.after = None                     # {exam: Batch} of the first, the last

    def steps(self, n):
        """1, 2 ... n under a progress bar."""
        self.bar = tqdm(range(1, n + 1), desc="EAPO" if self.run.cfg.alpha else "GRPO", unit="step")
        yield from self.bar

    def at(self, step, metrics):
        """Log a step, and sit the exams if it is their turn."""
        every = self.run.cfg.eval_every
        if metrics:
            self.solve_rates.append(metrics["solve_rate"])
            self.bar.set_postfix_str(f"reward {metrics['reward']:+.2f}, entropy "
                                     f"{metrics['entropy']:.3f} nats, "
                                     f"{metrics['tokens_per_second']:.0f} tokens/s", refresh=False)
        if every and (step % every == 0 or step == self.run.cfg.steps):
            self.results[step], self.after = sit_exams(self.run, self.exams)
            self.before = self.before or self.after
        with open(os.path.join(self.out, "metrics.jsonl"), "a") as f:
            f.write(json.dumps({"step": step, **metrics, **self.results.get(step, {})}) + "\n")

    def summary(self):
        """Print the curve, the exam results of the first and last model, and some responses."""
        print("\nsolve rate of the steps, 0 to 1:  "
              + "".join(" ▁▂▃▄▅▆▇█"[min(8, int(9 * r))] for r in self.solve_rates))
        if len(self.results) > 1:
            first, last = min(self.results), max(self.results)
            self.responses(self.before, self.after)
            self.table({"base": self.results[first], f"step {last}": self.results[last]})
        print(f"\nmetrics: {self.out}/metrics.jsonl   trained model: {self.out}/model")

    def table(self, results):
        """Print {label: metrics of the exams}, a line each."""
        k = self.run.cfg.eval_samples
        print(f"\n{'':28}{f'Avg@{k}':>8}{'95% interval':>18}{f'Pass@{k}':>10}{'entropy, nats':>16}")
        for label, m in results.items():
            for name in self.exams:
                x = {key.rpartition("/")[2]: value for key, value in m.items()
                     if f"/{name}/" in key}
                print(f"{label + ' on ' + name:28}{x[f'avg@{k}']:8.3f}{x['avg_low']:10.3f} .. "
                      f"{x['avg_high']:.3f}{x[f'pass@{k}']:10.3f}{x['entropy']:16.3f}")

    def responses(self, before, after):
        """Print responses of the base and of the trained model, the tokens coloured by quadrant."""
        name, k = next(iter(self.exams)), self.run.cfg.eval_samples
        share = before[name].right.view(-1, k).float().mean(1)
        undecided = ((share > 0) & (share < 1)).nonzero()[:3, 0].tolist()
        if sys.stdout.isatty():
            print("\n" + "  ".join(f"{colour}{q}\033[0m" for q, colour in QUADRANTS.items()),
                  "  bright: at or above the mean entropy of its group")
        for b in undecided or [0]:
            print("\n" + self.exams[name][b].text[:300])
            for label, batch in (("base", before[name]), ("trained", after[name])):
                group = batch.rows(torch.arange(b * k, b * k + k, device=batch.ids.device))
                for i in range(min(3, k)):
                    verdict = "right" if group.right[i] else "wrong"
                    print(f"  {label:8}{verdict}  {self.paint(group, i)}")

    def paint(self, group, i):
        """Response i of a group as text; on a terminal, tokens in their quadrants' colours."""
        q = quadrants(group.reward, group.H, group.mask, len(group.ids))[i].tolist()
        tokens = [self.run.tokenizer.decode([t], skip_special_tokens=True)
                  for t in group.response(i)]
        if sys.stdout.isatty():
            colours = ["", *QUADRANTS.values()]
            tokens = [f"{colours[code]}{t}\033[0m" for code, t in zip(q, tokens)]
        return "".join(tokens[:400])


# --------------------------------------------------------------------------------------------------
# Part 9. The loop: try, mark, compare, learn, look.
# --------------------------------------------------------------------------------------------------

def train(cfg):
    """Warm up if asked, then EAPO. All that a run leaves is in its folder."""
    out, run = open_run(cfg), load(cfg)
    stream, exams, solutions = load_data(cfg, run.tokenizer)
    print(f"{cfg.model}: {sum(p.numel() for p in run.policy.parameters()) / 1e6:.2f}M parameters, "
          f"{len(stream.problems)} problems of {cfg.train_data}; this run is in {out}")
    look = Look(run, out, exams)
    optimizer = torch.optim.AdamW(run.policy.parameters(), lr=cfg.learning_rate, weight_decay=0.0,
                                  fused=True)
    try:
        imitate(run, solutions)
        look.at(0, {})
        for step in look.steps(cfg.steps):
            start = run.start_step()

            # Try, mark: answer each problem G times; +1 if the boxed answer is right, else -1.
            batch, rows = roll_out(run, stream)

            # Compare: credit each response against its group, then each token by its entropy.
            A = group_advantages(batch.reward, cfg.group_size)                          # (1)
            batch.A = entropy_aware_advantages(A, batch.H, batch.mask, cfg.group_size,
                                               cfg.alpha, cfg.phi)                      # (7)
            used = batch.rows(rows)         # the groups that disagree; in the others A is 0

            # Learn: one clipped gradient step per mini-batch.
            with run.timed("update"):
                updates = [learn(run, optimizer, mini, f"step {step}")
                           for mini in mini_batches(used, cfg)]
                run.refresh()

            # Look: watch the reward; the loss of a policy gradient does not measure progress.
            look.at(step, measure(run, batch, used, updates, time.perf_counter() - start))
    except KeyboardInterrupt:
        print("\ninterrupted")
    finally:                        # Ctrl-C or an error: what was learned is kept
        save(run, out)
    look.summary()


def main(argv=None):
    """python eapo.py [flags]"""
    cfg = parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if cfg.model == "tiny" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)        # its matrices are too small for more to help
    torch.manual_seed(cfg.seed)
    train(cfg)


if __name__ == "__main__":
    main()

"""eapo: reinforcement learning with verifiable rewards, token by token, in one file.

Give a language model a problem whose answer can be checked. Let it try G times, mark every try
right or wrong, and make the tokens of the better tries likelier. That is GRPO (group-relative
policy optimization), and it gives each token of a response the same credit. Most tokens cannot use
it: where the model was sure, there was no decision to praise. EAPO (entropy-aware policy
optimization; He et al. 2026, arXiv 2604.11056, v1) therefore measures how unsure the model was at
each token, its entropy H, and gives uncertain tokens a little more of the credit and of the blame.
On top of GRPO that is two formulas, (6) and (7).

    A_i     = (r_i - mean(r)) / std(r)                                   one number a response   (1)
    L       = - mean over tokens of min(rho A, clip(rho, 1-eps_low, 1+eps_high) A)               (2)
    score_t = clip((H_t - mu_H) / sigma_H, -|A|/phi, +|A|/phi)           one number a token      (6)
    A^CA_t  = A + alpha sign(A) score_t                                  replaces A in (2)       (7)

Numbers (2), (6), (7) and those further down are the paper's; (1) is its unnumbered group advantage.
(2) here is a mean over all tokens of a mini-batch, as in verl, the framework that the authors train
in; they print it as a mean per group (--loss-mean group). A bound c for A < 0 comes on top, see
`surrogate`. std(r) and sigma_H are sample deviations (n - 1), plus 1e-6. The alphabet:

    B prompts x G responses = N rows, the G responses to one prompt in adjacent rows
    T tokens of the longest response    V vocabulary    M tokens, flat    D size of hidden states
    r      reward of a response, +1 right or -1 wrong (less with --overlong)      (N,)
    A      advantage of a response: how much better than its group, (1)           (N,)
    A^CA   advantage of a token, (7); what Batch.A and the loss hold              (N, T)
    pi_old the policy as the step began: full vocabulary, at the sampling temperature
    H      entropy of pi_old before it drew each token, in nats                   (N, T)
    mask   True on response tokens, the stop token included                       (N, T)
    mu_H, sigma_H   mean and deviation of H over all response tokens of one group (N, 1)
    rho    pi_theta / pi_old: how much likelier the token became since sampling   (N, T)

The program in one breath, with the functions that do it and the parts they stand in:

    for each step:                                               the loop is `train`, part 10
        try      sample G responses to each of B prompts         sample_loop, part 5; roll_out, 7
        mark     r = +1 where \\boxed{} holds the right answer    is_correct, part 3; attempt, 7
        compare  A (1) from the group, A^CA (7) from entropies   part 2; give_credit, part 7
        learn    gradient steps on the clipped L (2)             policy_loss, part 2; learn, 6
        look     log what happened; now and then sit an exam     measure, sit_exams, part 7

Run:
    python eapo.py                                   a tiny model learns to carry: a laptop, minutes
    python eapo.py --model Qwen/Qwen2.5-Math-7B      the paper's run and data, on all GPUs there are
    python eapo.py --help                            every setting

Left out on purpose: a value network (a learned guess of the reward to come), a KL penalty with its
reference model, a learned reward.
"""
import argparse
import cmath
import contextlib
import html
import json
import math
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
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
import transformers
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import (CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy,
                                    fully_shard)
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig


# --------------------------------------------------------------------------------------------------
# Part 1. The settings. A flag is a field of Config with hyphens for underscores. Defaults are those
# of the paper's run of Qwen2.5-Math-7B (table 6) where it names them; PRESETS and METHODS hold what
# a model or a method changes, so that `--model tiny`, the default, fits a laptop.
# --------------------------------------------------------------------------------------------------

METHODS = {     # rules of credit and loss, see the end of part 2, and the settings they bring
    "eapo": {}, "grpo": {}, "forking": {}, "entroadv": {}, "entroreg": {}, "w-reinforce": {},
    "dapo": dict(resample=2, overlong=0.2),
    "kl-cov": dict(clip_low=1.0, clip_high=math.inf, clip_c=0.0),       # a penalty, and no clip
}
# the quadrants of part 2 in the order of their codes, 1 to 4, with their colours on a terminal
QUADRANTS = {"PHR": "\033[1;92m", "PLR": "\033[32m", "NLR": "\033[31m", "NHR": "\033[1;91m"}


def flag(default, text, group=None, **options):
    """A Config field: its default, its help, the heading it opens in `--help`."""
    return field(default=default, metadata={"help": text, "group": group, **options})


@dataclass
class Config:
    model: str = flag("tiny", "tiny, a Hugging Face folder, or a hub id", "what to train on what")
    train_data: str = flag("agentica-org/DeepScaleR-Preview-Dataset",
                           "addition, a .jsonl/.csv/.parquet file, or a hub id[:split]")
    eval_data: str = flag("HuggingFaceH4/MATH-500", "the same, several with commas between")
    out: str = flag("", "folder of the run; empty: runs/MODEL-TIME")
    seed: int = flag(0, "seed of weights, data order and sampling")
    warmup_data: str = flag("", "worked solutions to imitate: columns problem and solution",
                            "imitation before RL, for models that do not know the task")
    warmup_steps: int = flag(0, "optimizer steps of imitation; 0 = none")
    warmup_batch: int = flag(32, "worked solutions a step")
    warmup_learning_rate: float = flag(1e-5, "rises over 20 steps, falls over the last 30%")
    steps: int = flag(220, "RL steps: sample, then learn from what was sampled", "the batch")
    prompts_per_step: int = flag(512, "B, prompts to learn from in a step")
    group_size: int = flag(8, "G, responses to each prompt")
    prompts_per_minibatch: int = flag(32, "prompts behind one optimizer step")
    microbatch_tokens: int = flag(0, "padded tokens in one pass through the model: memory and "
                                     "speed, not results; 0 = 16384 on a GPU, 2048 on a CPU")
    resample: int = flag(2, "at most this many more rounds of sampling a step, in place of groups "
                            "that are all right or all wrong (dynamic sampling)")
    max_prompt_tokens: int = flag(1024, "longer prompts are left out", "sampling")
    max_response_tokens: int = flag(3072, "responses are cut after this many tokens")
    temperature: float = flag(1.0, "of training: sampling, log-probabilities, entropies")
    top_p: float = flag(0.95, "draw from the fewest tokens with this probability; 1 = from all")
    sampler: str = flag("auto", "loop: ours; engine: transformers' continuous batching; auto: the "
                                "engine on a GPU", choices=("auto", "loop", "engine"))
    method: str = flag("eapo", "the rule of credit", "credit and loss", choices=tuple(METHODS))
    alpha: float = flag(0.2, "(7) strength of the entropy term; 0: GRPO's advantages")
    phi: float = flag(2.0, "(6) |score| is at most |A| / phi")
    quadrants: str = flag("", "give credit to these alone, of PHR,PLR,NLR,NHR; empty: all")
    without: str = flag("", "quadrants in which the entropy term of (7) is left out")
    clip_low: float = flag(0.2, "(2) eps_low")
    clip_high: float = flag(0.28, "(2) eps_high")
    clip_c: float = flag(3.0, "a token with A < 0 loses at most c |A| (Ye et al. 2020); 0 = off")
    loss_mean: str = flag("tokens", "(2) as a mean over the tokens of a mini-batch, as in verl, or "
                                    "over each group, then groups, as printed",
                          choices=("tokens", "group"))
    overlong: float = flag(0.0, "DAPO's soft penalty: over this last share of max_response_tokens "
                                "the reward falls by up to 1; 0 = off")
    learning_rate: float = flag(1e-6, "AdamW, constant")
    eval_every: int = flag(10, "steps between exams on eval_data; 0 = never", "exams")
    eval_samples: int = flag(4, "responses to each exam problem: the k of Avg@k and Pass@k")
    eval_temperature: float = flag(0.6, "of sampling in exams")
    eval_top_p: float = flag(0.95, "of sampling in exams")
    eval_only: bool = flag(False, "only sit the exams: eval.json and responses.jsonl")
    compare: str = flag("", "RUN,RUN...: draw finished runs in one report.html in --out, stop")
    matmuls: str = flag("auto", "precision inside the model; auto: bf16 on a GPU, fp32 on a CPU. "
                                "Weights and everything after the logits are fp32",
                        "the machine", choices=("auto", "fp32", "bf16"))
    gpus: int = flag(0, "GPUs of this machine to use; 0 = all")
    offload: bool = flag(False, "keep weights, gradients and AdamW's moments in host memory")
    save_every: int = flag(0, "steps between checkpoints; 0 = only on Ctrl-C and SIGTERM")
    resume: str = flag("", "folder of a run to go on with")

    def __post_init__(self):
        need(self.group_size > 1, "a group of one has no mean to beat: use --group-size 2 or more")
        need(0 <= self.alpha < self.phi,
             "--alpha must lie from 0 to below --phi, or (7) could turn the sign of an advantage")
        need(0 < self.top_p <= 1 and 0 < self.eval_top_p <= 1,
             "--top-p and --eval-top-p lie above 0, at most 1")
        need(self.temperature > 0, "training samples, so it needs --temperature above 0")
        need(self.eval_temperature >= 0, "--eval-temperature must be 0 (greedy) or more")
        need(self.clip_c == 0 or self.clip_c > 1 + self.clip_high,
             "--clip-c must lie above 1 + clip_high, outside the clip of (2), or be 0 for off")
        need(self.warmup_data or not self.warmup_steps, "--warmup-steps needs --warmup-data")
        need(0 <= self.overlong < 1, "--overlong is a share, from 0 to below 1")
        need(self.resample >= 0, "--resample counts further rounds: 0 or more")
        for name in {*self.quadrants.split(","), *self.without.split(",")} - {""}:
            need(name in QUADRANTS, f"there is no quadrant {name}, only {', '.join(QUADRANTS)}")
        need(not self.without or self.method == "eapo", "--without is for --method eapo")
        for name in ("prompts_per_step", "prompts_per_minibatch", "eval_samples",
                     "max_prompt_tokens", "max_response_tokens", "warmup_batch"):
            need(getattr(self, name) > 0, f"--{name.replace('_', '-')} must be 1 or more")


PRESETS = {     # a name, or a part of one: what such a model changes
    "tiny": dict(train_data="addition", eval_data="addition", warmup_data="addition",
                 warmup_steps=1000, warmup_batch=16, warmup_learning_rate=2e-3, steps=30,
                 prompts_per_step=32, prompts_per_minibatch=8, resample=0, learning_rate=1e-4,
                 top_p=1.0, max_prompt_tokens=32, max_response_tokens=64, sampler="loop",
                 matmuls="fp32", eval_samples=8, eval_temperature=1.0, eval_top_p=1.0),
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
    except (OSError, json.JSONDecodeError) as e:
        raise SystemExit(f"eapo: cannot read {source}: {str(e).splitlines()[0]}") from e


def parse_args(argv=None):
    """Config from the command line: what is typed; else what the method says, else the model's
    preset, else the default. Of a resumed run: what its config.json says."""
    changes = "; ".join(f"{name}: " + ", ".join(f"{k.replace('_', '-')} {v}" for k, v in x.items())
                        for name, x in (PRESETS | METHODS).items() if x)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage="%(prog)s [flags]",
                                     epilog=f"Other [defaults] with these: {changes}")
    for f in fields(Config):
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        how = {"action": "store_true"} if f.type is bool else {
            "type": f.type, "choices": f.metadata.get("choices"),
            "metavar": None if "choices" in f.metadata else f.type.__name__.upper()}
        shown = "" if f.type is bool or f.default == "" else f"  [{f.default}]"
        group.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS,
                           help=f.metadata["help"].replace("%", "%%") + shown, **how)
    typed = vars(parser.parse_args(argv))
    if "resume" in typed:
        return resumed(typed)
    model = typed.get("model", "tiny")
    preset = next((p for name, p in PRESETS.items()
                   if name == model or name != "tiny" and name in model), {})
    return Config(**{**preset, **METHODS[typed.get("method", "eapo")], **typed})


MAY_CHANGE = {"resume", "steps", "eval_every", "save_every", "gpus", "offload", "microbatch_tokens"}


def resumed(typed):
    """The Config of the run in the folder typed as --resume."""
    folder = typed["resume"]
    path = os.path.join(folder, "config.json")
    need(os.path.isfile(path), f"{path}: no such file; --resume takes the folder of a run")
    with open(path) as f:
        before = {k: v for k, v in json.load(f).items() if k != "versions"} | {"out": folder}
    other = [f"--{k.replace('_', '-')} {v} (was {before[k]})" for k, v in typed.items()
             if k not in MAY_CHANGE and v != before[k]]
    need(not other, f"{folder} ran with other settings: {', '.join(other)}; leave them out, or "
                    "start a new run")
    return Config(**before | typed)


# --------------------------------------------------------------------------------------------------
# Part 2. The algorithm: tensors in, tensors out, no model and no Config. This is what the file is
# for; the parts below only feed it. Functions that take group_size need whole groups; the loss is
# a sum over tokens, so a batch may be cut anywhere for it. EAPO comes first, then the rules that
# the paper compares it with; `give_credit` in part 7 chooses, and is the place to call your own.
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
    m = mask.reshape(len(mask) // group_size, group_size, mask.shape[1])      # (B, G, T)
    h, n = H.reshape(m.shape), m.sum((1, 2), keepdim=True)
    mu = torch.where(m, h, 0).sum((1, 2), keepdim=True) / n                   # (B, 1, 1)
    squares = torch.where(m, h - mu, 0).square().sum((1, 2), keepdim=True)
    sigma = (squares / (n - 1).clamp(min=1)).sqrt() + 1e-6
    return tuple(x.flatten().repeat_interleave(group_size)[:, None] for x in (mu, sigma))


def entropy_score(A, H, mask, group_size, phi):
    """(6)  score_t = clip((H_t - mu_H) / sigma_H, -|A|/phi, +|A|/phi)

    (N,), (N, T), (N, T) -> (N, T), meaningless outside the mask. How unusual the uncertainty of a
    token is within its group, in standard deviations. The clip scales with |A|, so that, with
    alpha < phi, entropy may refine an advantage and can never overwhelm it. This two-sided clip is
    what the paper calls "dual clipping"; the two clips of `surrogate` are others.
    """
    mu, sigma = entropy_mean_std(H, mask, group_size)
    bound = A.abs()[:, None] / phi                                            # (N, 1)
    return ((H - mu) / sigma).clamp(-bound, bound)                            # (N, T)  (6)


def entropy_aware_advantages(A, H, mask, group_size, alpha, phi):
    """(7)  A^CA_t = A + alpha sign(A) score_t,   no gradient through score_t

    A (N,), H (N, T), mask (N, T) -> A^CA (N, T), zero outside the mask. This is EAPO.

    Read it as volume, not direction. sign(A) turns the score to the side of A: a token above mu_H
    is praised more in a right response and blamed more in a wrong one, a token below it less in
    both. A^CA / A stays within 1 +- alpha/phi, 0.9 to 1.1 at the defaults, so no sign can turn.
    alpha = 0 gives every token A: GRPO's credit. detach: if a gradient flowed through H, the policy
    could earn by changing its uncertainty instead of its answers. H comes without one from
    `sample_loop` and `rescore`; detach keeps it so for any caller.
    """
    score = entropy_score(A, H, mask, group_size, phi).detach()               # (N, T)
    return (A[:, None] + alpha * A.sign()[:, None] * score) * mask            # (N, T)  (7)


def quadrants(rewards, H, mask, group_size):
    """The paper's four kinds of token (section 4), Positive or Negative, High or Low entropy:

        1 PHR  r >= 0, H >= mu_H   right, at a fork      2 PLR  r >= 0, H <  mu_H   right, routine
        4 NHR  r <  0, H >= mu_H   wrong, at a fork      3 NLR  r <  0, H <  mu_H   wrong, routine

    (N,), (N, T), (N, T) -> (N, T) int, 0 outside the mask. They split the response tokens, so the
    losses of the four add up to the whole. In the paper the gains of learning live in PHR, NHR.
    """
    mu, _ = entropy_mean_std(H, mask, group_size)
    high, positive = H >= mu, rewards[:, None] >= 0                           # (N, T), (N, 1)
    return torch.where(positive, torch.where(high, 1, 2), torch.where(high, 4, 3)) * mask


def surrogate(rho, A, clip_low, clip_high, clip_c):
    """(2)  min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A), and for A < 0 at least c A.

    (N, T) -> (N, T). Once a good token is 1 + eps_high times as likely as when it was sampled, or
    a bad one 1 - eps_low times, pushing further pays nothing and the gradient is 0. A bad token
    that has become likelier is still pushed back, and rho A could fall without bound; it is stopped
    at c A, beyond which the gradient is 0 too (Ye et al. 2020, who call PPO with both clips
    dual-clip; clip_c = 0 turns the bound off).
    """
    gain = torch.min(rho * A, rho.clamp(1 - clip_low, 1 + clip_high) * A)     # (N, T)  (2)
    return torch.where(A < 0, gain.clamp(min=clip_c * A), gain) if clip_c else gain


def policy_loss(logp, old_logp, A, mask, clip_low, clip_high, clip_c):
    """- sum over tokens of mask * surrogate (2).  (N, T) each -> scalar.

    A sum: the mask may hold weights, and `learn` hands in token_weights over their sum. On the
    first mini-batch of a step rho is 1 but for rounding, and the gradient is the policy gradient,
    - sum of A grad log pi.
    """
    rho = (logp - old_logp).exp()                                             # (N, T)
    return -(surrogate(rho, A, clip_low, clip_high, clip_c) * mask).sum()


def token_weights(mask, group_size, loss_mean):
    """What each token counts in (2): (N, T). `descend` divides by the sum of all of them.

    "tokens": 1, so that a token weighs the same in any response (DAPO and verl). "group": 1 over
    the tokens of its group, which is how the paper prints (2): a mean per prompt, then over
    prompts. The sum is taken over the whole mini-batch, on all GPUs and before it is cut into
    micro-batches, so that neither can change the gradient.
    """
    tokens = mask.sum(1).view(-1, group_size).sum(1).repeat_interleave(group_size)[:, None]
    return mask / tokens if loss_mean == "group" else mask.float()


# The rules that the paper compares EAPO with (appendix B.4), in the same terms. GRPO is A on every
# token; DAPO is GRPO with dynamic sampling and the soft overlong penalty of `attempt`; EntroReg
# adds - beta mean(H) to the loss, see `learn`. "All tokens" are the response tokens of a step, of
# dropped groups too, on all GPUs: a threshold is set once a step, and the tokens that it leaves out
# stay in the denominator of (2), which counts the tokens of the groups learned from.

ENTROPY_BONUS = 0.001   # beta of EntroReg; the paper names none


def threshold(x, share):
    """The smallest of the highest `share` of x, (M,) -> scalar: where forking and KL-Cov cut."""
    return x.topk(max(1, round(share * len(x)))).values[-1]


def forking(A, H, mask, tau):
    """A where H >= tau, else 0; tau is the lowest entropy among the top 20% of all tokens (Wang et
    al. 2025): learning at the forks, the uncertain decisions, alone.
    (N,), (N, T), (N, T), scalar -> (N, T)"""
    return A[:, None] * (H >= tau) * mask


def entropy_advantages(A, H, mask, a=0.4, k=2.0):
    """A + min(a H, |A| / k), no gradient through H (EntroAdv; Cheng et al. 2025): uncertain tokens
    gain in right responses and are blamed less in wrong ones. (N,), (N, T), (N, T) -> (N, T)"""
    return (A[:, None] + torch.minimum(a * H.detach(), A.abs()[:, None] / k)) * mask


def weighted_reinforce(A, mask, weight=0.1):
    """A of right responses times 0.1, of wrong ones as it is (W-REINF; Zhu et al. 2025).
    (N,), (N, T) -> (N, T)"""
    return torch.where(A > 0, weight * A, A)[:, None] * mask


def covariances(A, logp, mask, mean_A, mean_logp):
    """(logp - mean logp) (A - mean A), the means over all tokens (Cui et al. 2025): (N, T).

    Where it is highest, entropy falls fastest. KL-Cov adds 1.0 |log rho| to the loss of the highest
    0.2% of all tokens (the authors' numbers for 7B), and does not clip.
    """
    return (logp - mean_logp) * (A[:, None] - mean_A) * mask


def entropy_histogram(H, right, mask, bins=32, width=0.125):
    """Tokens of wrong (row 0) and right (row 1) responses by entropy: (2, bins) counts, each bin
    `width` nats wide, the last one open. (N, T), (N,), (N, T) -> (2, bins)"""
    cell = (H / width).long().clamp(0, bins - 1) + bins * right[:, None]
    return torch.bincount(cell[mask], minlength=2 * bins).view(2, bins)


def proxy_information(counts):
    """(14)  Ihat(H; r) = S(H) - S(H | r) in nats, S the entropy of the histogram of H (2, bins).

    The mutual information of a token's entropy and its response's verdict: 0 if right and wrong
    responses have the same histogram. Counting alone gives about bins / (2 tokens) too much.
    """
    def nats(x):
        p = x[x > 0] / x.sum()
        return float(-(p * p.log()).sum())
    counts = counts.double()
    return nats(counts.sum(0)) - sum(float(row.sum() / counts.sum()) * nats(row)
                                     for row in counts if row.sum())


def pass_at_k(n, c, k):
    """(8)  1 - C(n - c, k) / C(n, k): the chance that k drawn from n samples, of which c are right,
    hold a right one."""
    return 1.0 - math.prod((n - c - i) / (n - i) for i in range(k)) if n - c >= k else 1.0


# --------------------------------------------------------------------------------------------------
# Part 3. The verifier: is the boxed answer equal to the gold? It scans LaTeX into tokens, reads
# them with a calculator and compares values. No algebra is needed for (x+1)^2 = x^2 + 2x + 1: two
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
    for piece in response.rsplit(r"\boxed{", 20)[:0:-1]:
        depth = 1
        for i, (before, character) in enumerate(zip(" " + piece, piece[:LONGEST])):
            depth += {"{": 1, "}": -1}.get(character, 0) * (before != "\\")
            if depth == 0:
                return piece[:i]


def scan(text, thousands):
    """The tokens of LaTeX; mere notation leaves none, a subscript stays with its symbol: 204_5. A
    quote marks words: letters in \\text{..} and runs of over three. Other runs are products."""
    kind = lambda c: KINDS.get(c) or object()                        # others stand alone
    runs = ["".join(run) for _, run in groupby(text, kind)][::-1]    # the next run is the last
    tokens, prose = [""], False
    while runs:
        run, last = runs.pop(), tokens[-1]
        if run == "\\" and runs:
            run += runs.pop()
        elif run[0] in digits and last in (r"\frac", r"\sqrt", r"\binom"):
            runs += [run[1:]] * (len(run) > 1)                       # TeX takes one digit: \frac12
            run = run[0]
        token, coming = ALIASES.get(run, run), "".join(runs[-1:])
        if token in ("_", r"\begin", r"\end"):
            group = "".join(runs.pop() for _ in runs[-3 if coming == "{" else -1:])  # 12 or {12}
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
    points = max(map(len, numbers))
    rows = [*zip(*(number if len(number) == points else number * points for number in numbers))]
    for row in rows:
        grows = symbol in ("^", "!", r"\binom")
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
    whole, sign = tokens[-1].isdecimal(), tokens.pop() if tokens[-1] in ("-", "+") else ""
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
            while tokens[-1] == symbol and tokens.pop():
                value += (expression(tokens, strength),)
            if symbol in ">≥":
                value = ("<≤"[symbol == "≥"], *value[:0:-1])         # 3 > x is x < 3
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
    for comma, piece in groupby(tokens, lambda t: t == ","):
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
    """Whether two lists of tokens are the same or mean the same; False if they are unreadable."""
    if ours == theirs or len(ours + theirs) > 2 * MOST_TOKENS:
        return ours == theirs != []
    for one, other in ((ours, theirs), (theirs, ours)):
        if one[1:2] == ["="] and one[0].isalpha() and ("=" not in other or one[:2] == other[:2]):
            one[:] = [t for t in one if t not in one[:2] or one.count(t) > one.count("=")]
        if {*one} & {*"<≤>≥"} and not {*other} & {*"<≤>≥"}:
            one[:] = as_intervals(one)
    with contextlib.suppress(ArithmeticError, ValueError, TypeError, IndexError, RecursionError):
        decimals = [[int(t.replace(".", "")) for t in x if "." in t[1:]] for x in (ours, theirs)]
        ours_half, half = (0.5 / (max(numbers, default=0) or math.inf) for numbers in decimals)
        slack = max(min(ours_half, 2e-6), min(half, 1.1e-3) * (half <= 0.005))
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
    golds = [str(g).removesuffix(".0") for g in (gold if type(gold) in (list, tuple) else [gold])]
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


def read_jsonl(source):
    """The objects of a .jsonl file, one a line; blank lines are skipped."""
    rows = []
    with reading(source), open(source, encoding="utf-8") as f:
        for n, line in enumerate(f, 1):
            try:
                row = json.loads(line) if line.strip() else {}
            except json.JSONDecodeError as e:
                raise SystemExit(f"eapo: {source}, line {n}: not JSON: {e}") from e
            need(isinstance(row, dict), f"{source}, line {n}: not a JSON object")
            rows += [row] if row else []
    return rows


def read_rows(source, split):
    """The rows of a .jsonl, .csv or .parquet file, or of a hub data set `id[:split]`, as dicts."""
    kind = source.rpartition(".")[2].lower()
    if kind in ("jsonl", "json"):
        return read_jsonl(source)
    if kind in ("csv", "parquet"):
        need(os.path.isfile(source), f"{source}: no such file")
        with reading(source):
            return list(datasets.load_dataset(kind, data_files=source, split="train"))
    name, _, wanted = source.partition(":")
    with reading(source):
        parts = datasets.get_dataset_split_names(name)
        order = parts if len(parts) == 1 else ["test", "train"] if split == "exam" else ["train"]
        part = next((p for p in ([wanted] if wanted else order) if p in parts), None)
        need(part, f"{source} has the splits {', '.join(parts)}: name one as {name}:{parts[0]}")
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


def prepare(problems, tokenizer, cfg, world, name):
    """Render every problem once, and leave out those longer than max_prompt_tokens."""
    for p in world.bar(problems, f"tokens of {name}", 5000, leave=False):
        p.ids = render(tokenizer, p.text)
    short = [p for p in problems if len(p.ids) <= cfg.max_prompt_tokens]
    if len(short) < len(problems):
        world.print(f"{name}: {len(problems) - len(short)} of {len(problems)} prompts left out, "
                    f"longer than --max-prompt-tokens {cfg.max_prompt_tokens}")
    need(short, f"{name}: no prompt is within --max-prompt-tokens {cfg.max_prompt_tokens}")
    return short


class Stream:
    """Problems without end, every epoch in another order; `position` counts those handed out."""

    def __init__(self, problems, seed):
        self.problems, self.seed, self.position = problems, seed, 0

    def take(self, n):
        """The next n problems, each with its number in the stream."""
        size, taken = len(self.problems), []
        while len(taken) < n:
            epoch, start = divmod(self.position, size)
            order = random.Random(f"{self.seed}/{epoch}").sample(self.problems, size)
            piece = order[start:start + n - len(taken)]
            taken += enumerate(piece, self.position)
            self.position += len(piece)
        return taken


def load_data(cfg, tokenizer, world):
    """The training Stream, the exams as {short name: problems}, the worked solutions to imitate."""
    def get(source, split):
        return prepare(load_problems(source, split), tokenizer, cfg, world, f"{source} ({split})")
    exams = {}
    wanted = cfg.eval_data.replace(" ", "").split(",") if cfg.eval_every or cfg.eval_only else []
    for source in wanted:
        name = os.path.basename(source).replace(":", "-")
        for ending in (".jsonl", ".json", ".csv", ".parquet"):
            name = name.removesuffix(ending)
        need(name not in exams, f"--eval-data has two sets {name}: metrics could not tell which")
        exams[name] = get(source, "exam")
    learn = not cfg.eval_only
    solutions = get(cfg.warmup_data, "warmup") if cfg.warmup_steps and learn else []
    return Stream(get(cfg.train_data, "train") if learn else [], cfg.seed), exams, solutions


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
    quadrant: torch.Tensor = None  # (N, T) 1 to 4, 0 outside the mask
    penalty: torch.Tensor = None   # (N, T) KL-Cov: True where |log rho| is added to the loss

    @property
    def mask(self):
        """(N, T) True on response tokens."""
        T = max(self.response_len.tolist(), default=0)
        return torch.arange(T, device=self.ids.device) < self.response_len[:, None]

    def rows(self, i):
        """The Batch of rows i, in that order, cut to its own longest prompt + response."""
        L, T = (max(x[i].tolist(), default=0)
                for x in (self.prompt_len + self.response_len, self.response_len))
        cut = lambda name, x: x[i] if x.dim() == 1 else x[i][:, :L if name == "ids" else T]
        return Batch(**{f.name: cut(f.name, x) for f in fields(self)
                        if (x := getattr(self, f.name)) is not None})

    def response(self, i):
        """The tokens of response i, a list of ids."""
        start = int(self.prompt_len[i])
        return self.ids[i, start:start + int(self.response_len[i])].tolist()


def pack(prompts, responses, device):
    """Lists of token ids, one pair a row -> a Batch with ids and lengths."""
    rows = [torch.tensor(p + r) for p, r in zip(prompts, responses)]
    ids = torch.zeros(0, 0, dtype=torch.long)
    if rows:
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    length = lambda lists: torch.tensor([len(x) for x in lists], dtype=torch.long, device=device)
    return Batch(ids.to(device), length(prompts), length(responses))


def no_rows(device):
    """The Batch of a process that has nothing to do."""
    batch, none = pack([], [], device), torch.zeros(0, 0, device=device)
    return replace(batch, logp=none, H=none, ended=batch.prompt_len.bool())


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


def dice(seeds, n, T):
    """n rows of T uniform numbers in [0, 1) for each seed: (len(seeds) * n, T).

    `sample_loop` draws every token by a number that depends on its prompt's seed, its row and its
    place alone: the same dice fall on one GPU or eight, and in a run that was resumed. (The engine
    has dice of its own.)
    """
    rows = [torch.rand(n, T, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return torch.cat(rows)


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
def sample_loop(lm, prompts, group_size, max_tokens, temperature, top_p, stop_ids, seeds):
    """G responses to each prompt: decoding, written out.

    Each prompt is read once and its KV cache repeated G times. Then one token at a time for all
    rows. A row that drew a stop token is finished, the stop token belonging to it; finished rows
    are taken out of the batch once they are a fifth of it. Prompts are padded on the left, so that
    all rows draw their next token in the same column. -> Batch of N rows; logp and H come
    free from the logits that are drawn from.
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
    N, u = len(logits), dice(seeds, group_size, max_tokens).to(device)                 # (N, max)
    tokens = torch.zeros(N, max_tokens, dtype=torch.long, device=device)
    logp, H = torch.zeros(2, N, max_tokens, device=device)
    length, ended = torch.zeros(2, N, dtype=torch.long, device=device)
    row, stop = torch.arange(N, device=device), torch.tensor(stop_ids, device=device)
    writes = torch.ones(N, dtype=torch.bool, device=device)                            # (rows,)
    for t in range(max_tokens):
        token = draw(logits, u[row, t], temperature, top_p)                            # (rows,)
        tokens[row, t], length[row[writes]] = token, t + 1
        logp[row, t], H[row, t] = log_prob_and_entropy(logits, token, temperature)
        done = torch.isin(token, stop)
        ended[row[writes & done]] = 1
        writes &= ~done
        if not writes.any() or t + 1 == max_tokens:
            break
        if writes.sum() <= 0.8 * len(writes):       # not sooner: each time the cache is copied
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


def sample_engine(lm, prompts, group_size, max_tokens, temperature, top_p, stop_ids, seeds):
    """The same by transformers' continuous batching: a paged KV cache in which equal prompts share
    blocks, and finished rows make room for waiting ones. For GPUs. -> Batch without H; `rescore`
    adds it, and puts pi_old in the place of the engine's own logp. (num_return_sequences would
    spare prefills, but transformers 5.17 loses all responses of a group but one.)"""
    how = dict(do_sample=False) if temperature == 0 else dict(
        do_sample=True, temperature=temperature, top_p=top_p, top_k=0)
    config = GenerationConfig(max_new_tokens=max_tokens, eos_token_id=stop_ids,
                              pad_token_id=stop_ids[0], **how)
    rows = [p for p in prompts for _ in range(group_size)]
    engine = transformers.ContinuousBatchingConfig(     # a CPU's memory is not the engine's alone
        return_logprobs=True, seed=seeds[0],
        max_memory_percent=None if lm.device.type == "cuda" else 0.02)
    outputs = list(lm.generate_batch(inputs=rows, generation_config=config,
                                     continuous_batching_config=engine).values())
    failed = [o.error for o in outputs if o.error]
    if [o.prompt_ids for o in outputs] != rows or failed:
        raise RuntimeError(f"the engine answered {len(outputs) - len(failed)} of {len(rows)} "
                           f"requests, or not in order {failed[:1]}; try --sampler loop")
    responses = [o.generated_tokens for o in outputs]
    batch = pack(rows, responses, lm.device)
    ended = torch.tensor([r[-1] in stop_ids for r in responses], device=lm.device)
    logp = torch.nn.utils.rnn.pad_sequence([torch.tensor(o.logprobs) for o in outputs],
                                           batch_first=True).to(lm.device)
    return replace(batch, ended=ended, logp=logp)


# --------------------------------------------------------------------------------------------------
# Part 6. The policy: a causal language model, and the two numbers we need of it at every response
# token. One forward pass gives both; the update, `rescore` and imitation share it.
# --------------------------------------------------------------------------------------------------

CHUNK = 2 ** 25     # logits in memory at a time, as a count of numbers: 128 MB in fp32


class ChunkedLogProbAndEntropy(torch.autograd.Function):
    """log pi(token) and H from hidden states (M, D) and the head's weight (V, D): (M,), (M,).

    An (M, V) matrix of logits is the largest thing in training: 4096 tokens at V = 152,064 are
    2.5 GB, several times over with gradients. So it is never made: tokens go through the head a
    chunk at a time, in forward and again in backward, where the gradients at the logits z are

        d log pi(o) / d z_v = [v = o] - p_v          (5): it vanishes where the policy is sure
        d H / d z_v         = - p_v (log p_v + H)
    """
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
        runs through the model too: on several GPUs all must run as often as the busiest.
        """
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
    world: object               # the processes of the run, part 8
    policy: Policy
    tokenizer: object
    stop_ids: list              # a response ends with one of these, the tokenizer's own first
    sampler: object             # the model to sample from: a copy of the policy, or itself
    gap: float = 0.0            # sum of |log pi_sampler - log pi_old| over this step's tokens, nats
    seconds: dict = field(default_factory=dict)     # of this step, by phase
    bytes: dict = field(default_factory=dict)       # peak of GPU memory, by phase

    @contextlib.contextmanager
    def timed(self, phase):
        """Add the time of a with-block to seconds[phase], its peak of GPU memory to bytes."""
        start, cuda = time.perf_counter(), self.world.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        with self.world.named(phase):
            yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
        if cuda:
            self.bytes[phase] = max(self.bytes.get(phase, 0), torch.cuda.max_memory_allocated())

    def start_step(self):
        """Reset the clocks -> the time now."""
        self.gap, self.seconds = 0.0, dict.fromkeys(("sample", "score", "update"), 0.0)
        self.bytes = dict.fromkeys(self.seconds, 0)
        return time.perf_counter()

    def clocks(self, start, metrics):
        """The metrics of time and memory, for the step that began at start."""
        seconds = time.perf_counter() - start
        m = dict(seconds=seconds, **{f"seconds_{phase}": x for phase, x in self.seconds.items()},
                 tokens_per_second=metrics["response_tokens"] / seconds)
        return {key: round(x, 6) for key, x in m.items()} | {
            "peak_memory_bytes": max(self.bytes.values()),
            **{f"bytes_{phase}": x for phase, x in self.bytes.items()}}

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


def load(cfg, world):
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
    lm.generation_config = GenerationConfig(eos_token_id=stop_ids)  # hub ones may not be savable
    lm = lm.eval()                                                        # dropout off
    with torch.no_grad():
        probe = torch.tensor([stop_ids[:1] * 2])
        hidden = lm.get_decoder()(probe, use_cache=False).last_hidden_state
        logits = hidden @ lm.get_output_embeddings().weight.T
        same = torch.allclose(logits, lm(probe).logits, atol=1e-3)
    need(same, f"{cfg.model} makes its logits otherwise than by one matrix (a bias, a soft cap, a "
               "scale): ChunkedLogProbAndEntropy would have to do the same")
    sampler = lm
    if world.sharded:
        with world.device:
            sampler = AutoModelForCausalLM.from_config(
                lm.config, dtype=torch.bfloat16 if world.bf16 else torch.float32).eval()
    policy = world.shard(Policy(lm), cfg.offload)
    run = Run(cfg, world, policy, tokenizer, stop_ids, sampler)
    run.empty_sampler()
    return run


def micro_batches(run, batch):
    """Row indices cut so that rows * longest row <= microbatch_tokens, or one row where that alone
    is longer. Longest rows first, so that neighbours are alike and little is padding. The same
    number on every GPU: who has less to do gets empty ones."""
    lengths, tokens = batch.prompt_len + batch.response_len, run.cfg.microbatch_tokens
    tokens = tokens or (16384 if run.world.device.type == "cuda" else 2048)
    order, cuts = lengths.argsort(descending=True, stable=True), []
    while len(order):
        n = max(1, tokens // int(lengths[order[0]]))
        cuts.append(order[:n])
        order = order[n:]
    return cuts + [order] * (max(run.world.gather(len(cuts))) - len(cuts))


def descend(run, optimizer, batch, weight, loss_of):
    """One optimizer step on the sum of loss_of over micro-batches that fit in memory.

    weight (N, T); loss_of(micro-batch, its normalised weights, logp, H) -> scalar. The weights are
    divided by their sum over all processes, known before the first backward. -> this process' part
    of the loss, and the norm of the gradient before it is clipped to 1.
    """
    world, loss = run.world, 0.0
    weight = weight / sum(world.gather(float(weight.sum())))                  # sum to 1 in all
    for i in micro_batches(run, batch):
        micro = batch.rows(i)
        logp, H = run.policy(micro, run.cfg.temperature)                      # (n, T)
        part = loss_of(micro, weight[i][:, :logp.shape[1]], logp, H)
        (part * world.size).backward()      # FSDP will average over GPUs what is to be summed
        loss += float(part.detach())
    norm = torch.nn.utils.clip_grad_norm_(run.policy.parameters(), 1.0)
    norm = float(world.whole(norm))
    need(math.isfinite(norm), f"the gradient is {norm}; nothing was changed by it. Look at the "
                              "learning rate and the last lines of metrics.jsonl")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm


def learn(run, optimizer, mini):
    """One optimizer step on L (2) over a mini-batch.

    -> the loss; the gradient norm; how many tokens had their gradient stopped by a clip of (2);
    and H under the current weights minus H when sampled, summed by quadrant, (5,): what the earlier
    mini-batches of the step did to the entropy. All but the norm are this process' part.
    """
    cfg, clips = run.cfg, (run.cfg.clip_low, run.cfg.clip_high, run.cfg.clip_c)
    clipped, drift = [], []

    def loss_of(micro, w, logp, H):
        loss = policy_loss(logp, micro.logp, micro.A, w, *clips)              # (2)
        if cfg.method == "entroreg":
            loss = loss - ENTROPY_BONUS * (H * w).sum()
        if cfg.method == "kl-cov":
            loss = loss + ((logp - micro.logp).abs() * micro.penalty * w).sum()
        with torch.no_grad():
            rho, m = (logp - micro.logp).exp(), micro.mask
            clipped.append(((surrogate(rho, micro.A, *clips) != rho * micro.A) & m).sum())
            drift.append(torch.bincount(micro.quadrant[m], (H - micro.H)[m].double(), 5))
        return loss

    weight = token_weights(mini.mask, cfg.group_size, cfg.loss_mean)          # (N, T)
    loss, norm = descend(run, optimizer, mini, weight, loss_of)
    return loss, norm, int(sum(clipped)), sum(drift).cpu()


def imitate(run, problems):
    """Warm-up: make worked solutions likelier, token by token, so that RL has something to mark.

    RL can only reinforce what the model already tries now and then. The loss is - mean log p over
    the tokens of the solutions and their stop tokens, at the sampling temperature: (2) with log p
    in the place of rho A. -> whether it came to its end.
    """
    cfg, world, stream = run.cfg, run.world, Stream(problems, run.cfg.seed)
    optimizer = torch.optim.AdamW(run.policy.parameters(), betas=(0.9, 0.95), weight_decay=0.0,
                                  fused=True)
    marked = [is_correct(p.solution, p.answer) for p in problems[:1000] if p.answer]
    if marked:
        world.print(f"warm-up: {len(problems)} worked solutions, {sum(marked) / len(marked):.0%} "
                    "of them right: so much the base model can learn to solve")
    with world.bar(range(cfg.warmup_steps), "warm-up") as bar:
        for step in bar:
            left = 1 - step / cfg.warmup_steps
            rate = cfg.warmup_learning_rate * min(1.0, (step + 1) / 20, left / 0.3)
            optimizer.param_groups[0]["lr"] = rate
            mine = world.share([p for _, p in stream.take(cfg.warmup_batch)])
            solutions = [run.tokenizer(p.solution, add_special_tokens=False).input_ids
                         for p in mine]
            responses = [(x + run.stop_ids[:1])[:cfg.max_response_tokens] for x in solutions]
            batch = pack([p.ids for p in mine], responses, world.device)
            loss, _ = descend(run, optimizer, batch, batch.mask.float(),
                              lambda micro, w, logp, H: -(logp * w).sum())
            bar.set_postfix_str(f"loss {sum(world.gather(loss)):.3f} nats a token", refresh=False)
            if world.asked_to_stop():
                return False
    return True


# --------------------------------------------------------------------------------------------------
# Part 7. Try, mark, compare; and the exam. On several GPUs each process works on its share of the
# problems, and what must be known of all of them goes through `world.gather`.
# --------------------------------------------------------------------------------------------------

ROWS = 512      # responses that the loop decodes at a time, if the KV cache has room for them


def kv_bytes(c, width):
    """Bytes of KV cache a token, for a model's config c and numbers of `width` bytes."""
    size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return 2 * c.num_hidden_layers * c.num_key_value_heads * size * width


def attempt(run, numbered, what, n, temperature, top_p):
    """n responses to each of this process' share of (number, problem) pairs, marked: a Batch with
    `right`, and `reward` +1 or -1. The dice depend on the seed, on `what` and on the number."""
    cfg, lm, mine = run.cfg, run.fill_sampler(), run.world.share(numbered)
    engine = cfg.sampler == "engine" or cfg.sampler == "auto" and lm.device.type == "cuda"
    rows = ROWS
    if lm.device.type == "cuda" and not engine:
        longest = cfg.max_prompt_tokens + cfg.max_response_tokens
        room = 0.6 * torch.cuda.mem_get_info()[0] / kv_bytes(lm.config, lm.dtype.itemsize)
        rows = min(rows, int(room / longest))
    sample, B = (sample_engine, len(mine)) if engine else (sample_loop, max(1, rows // n))
    seeds = [crc32(f"{cfg.seed} {what} {number}".encode()) for number, _ in mine]
    prompts = [p.ids for _, p in mine]
    with run.timed("sample"):
        batches = [sample(lm, prompts[i:i + B], n, cfg.max_response_tokens, temperature, top_p,
                          run.stop_ids, seeds[i:i + B])
                   for i in run.world.bar(range(0, len(mine), B or 1), "sampling", 5, leave=False)]
        batch = join(batches or [no_rows(lm.device)])
    if engine or run.world.bf16:
        run.gap += rescore(run, batch, temperature)
    right = [is_correct(text, mine[i // n][1].answer) for i, text in enumerate(decode(run, batch))]
    batch.right = torch.tensor(right, dtype=torch.bool, device=lm.device)
    batch.reward = torch.where(batch.right, 1.0, -1.0)
    if cfg.overlong:            # DAPO's soft penalty, 0 to -1 over the last share of the tokens
        last = cfg.overlong * cfg.max_response_tokens
        batch.reward -= (1 - (cfg.max_response_tokens - batch.response_len) / last).clamp(0, 1)
    return batch


def decode(run, batch):
    """The responses as texts, without stop tokens and the like."""
    return run.tokenizer.batch_decode([batch.response(i) for i in range(len(batch.ids))],
                                      skip_special_tokens=True)


@torch.no_grad()
def rescore(run, batch, temperature):
    """logp and H of a batch by the policy itself, where another model sampled: a bf16 copy, or an
    engine with kernels of its own, would put its rounding errors into rho. -> how far the two are
    apart, the sum over tokens of |log pi_sampler - log pi_old| in nats. (The engine's pi_sampler is
    what top_p left of pi.)"""
    with run.timed("score"):
        theirs, mask = batch.logp, batch.mask
        batch.logp, batch.H = torch.zeros(2, *mask.shape, device=batch.ids.device)
        for i in micro_batches(run, batch):
            for mine, new in zip((batch.logp, batch.H), run.policy(batch.rows(i), temperature)):
                mine[i, :new.shape[1]] = new
    return float((theirs - batch.logp)[mask].abs().sum())


def roll_out(run, stream):
    """Try and mark, until prompts_per_step groups can teach something or the rounds are used up.

    A group that is all right or all wrong has A = 0 for all its tokens: it is dropped, and other
    problems are tried in its place (dynamic sampling). With --overlong its rewards may differ, but
    it teaches nothing about being right, and is dropped too. -> the Batch of all that this process
    tried, and for each of its groups (number, problem), the number being None if it was dropped.
    """
    cfg, tried, groups, missing = run.cfg, [], [], run.cfg.prompts_per_step
    for _ in range(1 + cfg.resample):
        numbered = stream.take(missing)
        batch = attempt(run, numbered, "train", cfg.group_size, cfg.temperature, cfg.top_p)
        right = batch.right.view(-1, cfg.group_size)
        mixed = (right.any(1) & ~right.all(1)).tolist()
        groups += [(number if m else None, problem)
                   for (number, problem), m in zip(run.world.share(numbered), mixed)]
        tried.append(batch)
        missing -= sum(run.world.gather(sum(mixed)))
        if missing == 0:
            break
    return join(tried), groups


def give_credit(run, batch):
    """Set batch.A and batch.quadrant: what each token is to be reinforced by, under cfg.method."""
    cfg, H, mask, G = run.cfg, batch.H, batch.mask, run.cfg.group_size
    every = lambda x: torch.cat([part.to(H.device) for part in run.world.gather(x.cpu())])
    A = group_advantages(batch.reward, G)                                               # (1)
    batch.quadrant = q = quadrants(batch.reward, H, mask, G)
    if cfg.method == "forking":
        batch.A = forking(A, H, mask, threshold(every(H[mask]), 0.2))
    elif cfg.method == "entroadv":
        batch.A = entropy_advantages(A, H, mask)
    elif cfg.method == "w-reinforce":
        batch.A = weighted_reinforce(A, mask)
    elif cfg.method == "eapo":
        batch.A = entropy_aware_advantages(A, H, mask, G, cfg.alpha, cfg.phi)           # (7)
    else:
        batch.A = A[:, None] * mask
    if cfg.method == "kl-cov":
        means = every((A[:, None] * mask)[mask]).mean(), every(batch.logp[mask]).mean()
        cov = covariances(A, batch.logp, mask, *means)
        batch.penalty = mask & (cov >= threshold(every(cov[mask]), 0.002))
    within = lambda names: sum(q == k for k, name in enumerate(QUADRANTS, 1)
                               if name in names.split(",")) > 0
    if cfg.without:
        batch.A = torch.where(within(cfg.without), A[:, None], batch.A)
    if cfg.quadrants:
        batch.A = batch.A * within(cfg.quadrants)


def mini_batches(run, batch, groups):
    """The kept groups, in the order of the stream, which is random, cut evenly into mini-batches of
    at most prompts_per_minibatch: this process' rows of each, which may be none."""
    place = {number: k for k, (number, _) in enumerate(groups) if number is not None}
    every = sorted(number for part in run.world.gather([*place]) for number in part)
    parts = -(-len(every) // run.cfg.prompts_per_minibatch)     # rounded up; 0 without such groups
    rows = torch.arange(len(batch.ids), device=batch.ids.device)
    rows = rows.view(-1, run.cfg.group_size)                                            # (B, G)
    for k in range(parts):
        part = every[k * len(every) // parts:(k + 1) * len(every) // parts]
        yield batch.rows(rows[[place[n] for n in part if n in place]].flatten())


def with_interval(name, k, shares, draws=2000):
    """A mean over questions, (questions,), and its 95% interval by bootstrap over questions, as
    metrics name@k, name_low, name_high."""
    dice = torch.Generator().manual_seed(0)
    picks = torch.randint(len(shares), (draws, len(shares)), generator=dice)
    low, high = torch.quantile(shares[picks].mean(1), torch.tensor([0.025, 0.975]))
    return {f"{name}@{k}": shares.mean(), f"{name}_low": low, f"{name}_high": high}


def sit_exams(run, exams, step):
    """Avg@k, (9), the mean of c / k, and Pass@k, (8), on every exam -> metrics, responses of all
    processes as rows for responses.jsonl, and this process' Batch of each exam. H is at the exam's
    temperature. The dice are the same every time, so that two sittings differ by the model."""
    cfg, metrics, rows, batches, k = run.cfg, {}, [], {}, run.cfg.eval_samples
    for name, problems in exams.items():
        numbered = list(enumerate(problems))
        batch = attempt(run, numbered, name, k, cfg.eval_temperature, cfg.eval_top_p)
        batches[name], entropy = batch, (batch.H.sum(1) / batch.response_len).tolist()
        mine = [dict(step=step, set=name, number=number, problem=p.text, answer=p.answer,
                     right=bool(right), tokens=int(n), ended=bool(ended), entropy=round(h, 6),
                     response=text)
                for (number, p), right, n, ended, h, text in zip(
                    [x for x in run.world.share(numbered) for _ in range(k)], batch.right,
                    batch.response_len, batch.ended, entropy, decode(run, batch))]
        every = sorted(sum(run.world.gather(mine), []), key=lambda row: row["number"])
        rows += every
        c = torch.tensor([row["right"] for row in every]).view(-1, k).sum(1)            # (B,)
        total, n = sum(row["tokens"] for row in every), len(every)
        smaller = [2 ** j for j in range(k.bit_length()) if cfg.eval_only and 2 ** j < k]
        curve = {f"pass@{j}": sum(pass_at_k(k, int(x), j) for x in c) / len(c) for j in smaller}
        metrics |= {f"eval/{name}/{key}": round(float(x), 6) for key, x in {
            **with_interval("avg", k, c / k), **curve,
            **with_interval("pass", k, torch.tensor([pass_at_k(k, int(x), k) for x in c])),
            "entropy": sum(row["entropy"] * row["tokens"] for row in every) / total,
            "length": total / n,
            "truncated": sum(not row["ended"] for row in every) / n}.items()}
    return metrics, rows, batches


def measure(run, batch, groups, updates):
    """The metrics of one step, of all processes: loss, gradient, clips and quadrants of the groups
    learned from, the others of all that was tried. Also the entropy histogram of the step."""
    G, mask = run.cfg.group_size, batch.mask
    right = batch.right.view(-1, G)
    kept = torch.tensor([number is not None for number, _ in groups], dtype=torch.bool,
                        device=mask.device)
    learned = mask & kept.repeat_interleave(G)[:, None]
    by_quadrant = lambda x: torch.bincount(batch.quadrant[learned], x[learned].double(), 5)
    losses, norms, clipped, drifts = zip(*updates or [(0.0, 0.0, 0, torch.zeros(5))])
    sums = dict(
        rows=len(batch.ids), reward=batch.reward.sum(), right=right.sum(), tokens=mask.sum(),
        entropy=batch.H.sum(), ended=batch.ended.sum(), groups=len(right),
        all_right=right.all(1).sum(), all_wrong=(~right).all(1).sum(),
        histogram=entropy_histogram(batch.H, batch.right, mask), loss=sum(losses) / len(losses),
        clipped=sum(clipped), gap=run.gap, drift=sum(drifts), count=by_quadrant(mask),
        credit=by_quadrant(batch.A.abs()), nats=by_quadrant(batch.H))
    parts = run.world.gather({key: torch.as_tensor(x).cpu() for key, x in sums.items()})
    s = {key: sum(part[key] for part in parts) for key in sums}
    rows, tokens, used = int(s["rows"]), int(s["tokens"]), s["count"].sum().clamp(min=1)
    m = dict(reward=s["reward"] / rows, solve_rate=s["right"] / rows, entropy=s["entropy"] / tokens,
             information=proxy_information(s["histogram"]), response_tokens=tokens,
             response_length=tokens / rows, truncated=1 - s["ended"] / rows,
             groups=int(s["groups"]), groups_all_right=int(s["all_right"]),
             groups_all_wrong=int(s["all_wrong"]), loss=s["loss"],
             grad_norm=sum(norms) / len(norms), clip_fraction=s["clipped"] / used,
             sampler_gap=s["gap"] / tokens)
    for key, x, whole in (("tokens", s["count"], used), ("drift", s["drift"], s["count"]),
                          ("advantage", s["credit"], s["credit"].sum()),
                          ("entropy", s["nats"], s["nats"].sum())):
        share = x / whole.clamp(min=1e-9)
        m |= {f"{key}/{name}": share[code] for code, name in enumerate(QUADRANTS, 1)}
    m = {key: x if isinstance(x, int) else round(float(x), 6) for key, x in m.items()}
    return m, s["histogram"]


# --------------------------------------------------------------------------------------------------
# Part 8. Plumbing: processes, the plan, checkpoints, files, the terminal. Skip on first reading.
# --------------------------------------------------------------------------------------------------

class World:
    """The processes of a run, one a GPU. With one process nothing is communicated."""

    def __init__(self, cfg):
        self.rank, self.size = (int(os.environ.get(x, y)) for x, y in (("RANK", 0),
                                                                       ("WORLD_SIZE", 1)))
        cuda, self.stop, self.signalled = torch.cuda.is_available(), False, 0.0
        self.phase = "start"
        self.device = torch.device("cpu")
        if cuda:
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        self.bf16 = cfg.matmuls == "bf16" or cfg.matmuls == "auto" and cuda
        self.sharded = self.size > 1 or self.bf16 or cfg.offload and cuda
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
        cuda = self.device.type == "cuda"
        how = dict(mesh=dist.init_device_mesh(self.device.type, (self.size,)),
                   mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16 if self.bf16 else None,
                                                  reduce_dtype=torch.float32),
                   offload_policy=CPUOffloadPolicy(pin_memory=False) if offload and cuda
                   else OffloadPolicy())
        for layer in policy.lm.get_decoder().layers:
            if cuda:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
            fully_shard(layer, **how)
        return fully_shard(policy, **how)

    def whole(self, x):
        """A tensor put together from its shards on every process; all must ask for it."""
        return x.to(self.device).full_tensor() if hasattr(x, "full_tensor") else x

    def gather(self, x):
        """[x of process 0, x of process 1 ...], on every process; all must call it."""
        parts = [x] * self.size
        if self.size > 1:
            with self.named(self.phase):
                dist.all_gather_object(parts, x)
        return parts

    @contextlib.contextmanager
    def named(self, phase):
        """Name the phase and the process if a with-block fails, as when others do not answer."""
        self.phase = phase
        try:
            yield
        except RuntimeError as e:
            e.add_note(f"eapo: process {self.rank} of {self.size}, in or after the phase {phase}")
            raise

    def share(self, items):
        """The part of a list that this process works on."""
        return items[self.rank::self.size]

    def print(self, *text):
        """Print once, not once a process."""
        if self.rank == 0:
            print(*text, flush=True)

    def bar(self, steps, name, least=1, **how):
        """A progress bar over steps, on the first process, if there are at least so many."""
        return tqdm(steps, desc=name, disable=self.rank > 0 or len(steps) < least, **how)

    def on_signal(self, number, frame):
        """Ctrl-C and SIGTERM: finish the step, save, stop. Once more, 5 seconds later: stop now.
        (Launchers pass the first one on as a second.)"""
        if not self.stop:
            self.stop, self.signalled = True, time.time()
            self.print("\neapo: stopping after this step; once more to stop at once")
        elif time.time() > self.signalled + 5 or self.size == 1:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def signals(self):
        """Around a run: Ctrl-C and SIGTERM go to on_signal."""
        before = {s: signal.signal(s, self.on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    def asked_to_stop(self):
        """Whether a signal has reached any process."""
        return any(self.gather(self.stop))


def plan(cfg, world):
    """Print what each process will hold in memory, in GB, and refuse what cannot fit, before any
    weight is read. The update holds weights, gradients, moments and what it works with; the
    rollout weights, moments, a copy to sample from and the KV cache."""
    with reading(cfg.model):
        c = AutoConfig.from_pretrained(cfg.model)
    with torch.device("meta"):
        P = sum(p.numel() for p in AutoModelForCausalLM.from_config(c).parameters())
    n, cuda, D, L = world.size, world.device.type == "cuda", c.hidden_size, c.num_hidden_layers
    width, here, learns = 2 if world.bf16 else 4, not (cfg.offload and cuda), not cfg.eval_only
    longest = cfg.max_prompt_tokens + cfg.max_response_tokens
    tokens = max(longest, cfg.microbatch_tokens or (16384 if cuda else 2048))
    layer = tokens * width * (6 * D + 4 * c.intermediate_size)      # activations
    ends = 2 * c.vocab_size * D * world.sharded                     # embedding and head, whole
    working = max(4 * 4 * CHUNK + 2 * width * (P / L * world.sharded + ends)
                  + (tokens * width * L * D + layer if cuda else L * layer),
                  ends * (2 * width + 4 + 4 / n))                   # as their gradients are reduced
    size = dict(weights=4 * P / n * here, gradients=4 * P / n * here * learns,
                moments=8 * P / n * here * learns, working=working * learns,
                copy=width * P * world.sharded,
                kv_cache=kv_bytes(c, width) * longest * cfg.group_size)
    size = {name: x / 1e9 for name, x in size.items()}
    update = sum(size[name] for name in ("weights", "gradients", "moments", "working"))
    rollout = sum(size[name] for name in ("weights", "moments", "copy", "kv_cache"))
    host = math.inf             # where the system does not tell
    if "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
        host = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    free = torch.cuda.mem_get_info()[0] / 1e9 if cuda else host / n
    world.print(f"{cfg.model}: {P / 1e6:.1f}M parameters on {n} x {world.device.type}; GB each: "
                + ", ".join(f"{name} {x:.2f}" for name, x in size.items())
                + f" (one group); update {update:.2f}, rollout {rollout:.2f}, free {free:.2f}")
    if cuda and (4 * P * n + 16 * P * (not here)) / 1e9 > host:
        world.print("warning: loading, or --offload, needs more host memory than is free")
    remedy = "use " + "more --gpus, --offload, or " * cuda + "a smaller model; smaller " \
        "--microbatch-tokens or --max-response-tokens help a little"
    for phase, x in (("update", update * learns), ("rollout", rollout)):
        need(x < free, f"the {phase} needs about {x:.0f} GB of {free:.0f} GB: {remedy}")


def doctor(run, problems):
    """Print what most often is wrong before a run that learns nothing: the first prompt as the
    model sees it, stop tokens, and what the verifier says of golds and of junk."""
    p, tokenizer, config = problems[0], run.tokenizer, run.policy.lm.config
    longest = max(len(p.ids) for p in problems) + run.cfg.max_response_tokens
    fits = getattr(config, "max_position_embeddings", None) or longest
    need(longest <= fits, f"{run.cfg.model} reads {fits} tokens, and the longest prompt with its "
                          f"response has {longest}: lower --max-response-tokens")
    text, bos = tokenizer.decode(p.ids), tokenizer.bos_token_id
    golds = [p.answer[0] if isinstance(p.answer, list) else p.answer for p in problems[:200]]
    paid = sum(is_correct(f"\\boxed{{{gold}}}", gold) for gold in golds) / len(golds)
    junk = sum(is_correct("\\boxed{no idea}", gold) for gold in golds) / len(golds)
    run.world.print(f"first prompt: {text[:400]!r}\n  {len(p.ids)} ids, {p.ids[:8]} .. "
                    f"{p.ids[-4:]}, BOS {p.ids.count(bos) if bos is not None else 0} times; "
                    f"responses end with {tokenizer.convert_ids_to_tokens(run.stop_ids)}\n"
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


def save_model(run, out):
    """The policy and its tokenizer as an ordinary Hugging Face folder, out/model."""
    path, weights, lm = os.path.join(out, "model"), {}, run.policy.lm
    every, once = (dict(lm.named_parameters(remove_duplicate=x)) for x in (False, True))
    for name, p in lm.state_dict().items():
        whole = run.world.whole(p)
        if run.world.rank == 0 and (name in once or name not in every):     # tied: once
            weights[name] = whole.cpu()
    if run.world.rank == 0:
        lm.save_pretrained(path + ".new", state_dict=weights)
        run.tokenizer.save_pretrained(path + ".new")
        shutil.rmtree(path, ignore_errors=True)
        os.replace(path + ".new", path)


@contextlib.contextmanager
def saving_model(run, out):
    """Around the learning: what was learned is kept, whatever ends it. Where only one of several
    processes failed, nothing can be saved: the others would wait for it."""
    alone = run.world.size == 1
    try:
        yield
    except SystemExit:                                      # refused by all of them alike
        save_model(run, out)
        raise
    except KeyboardInterrupt:
        print("\neapo: stopped at once")
        if alone:
            save_model(run, out)
        raise SystemExit(130) from None
    except BaseException:
        if alone:
            save_model(run, out)
        raise
    save_model(run, out)


def save_checkpoint(run, optimizer, stream, step, out):
    """out/checkpoint/step-N: weights and moments, each process its shards, and where the data
    stands. Written beside and renamed; the last two are kept. Dice need no saving."""
    folder = os.path.join(out, "checkpoint")
    path = os.path.join(folder, f"step-{step:06}")
    model, moments = get_state_dict(run.policy, optimizer)
    dcp.save({"model": model, "optimizer": moments}, checkpoint_id=path + ".new")
    if run.world.rank == 0:
        replace_file(os.path.join(path + ".new", "state.json"), json.dumps(
            dict(step=step, position=stream.position, data=fingerprint(stream))))
        shutil.rmtree(path, ignore_errors=True)
        os.replace(path + ".new", path)
        for old in sorted(x for x in os.listdir(folder) if not x.endswith(".new"))[:-2]:
            shutil.rmtree(os.path.join(folder, old))
    run.world.gather(None)


def load_checkpoint(run, optimizer, stream, look):
    """Set weights, moments, data position and the log from a run's last checkpoint -> its step."""
    out, folder = look.out, os.path.join(look.out, "checkpoint")
    found = sorted(x for x in os.listdir(folder) if not x.endswith(".new")) \
        if os.path.isdir(folder) else []
    need(found, f"{out} holds no checkpoint: it was stopped before the first --save-every")
    path = os.path.join(folder, found[-1])
    with open(os.path.join(path, "state.json")) as f:
        state = json.load(f)
    need(state["data"] == fingerprint(stream),
         f"{run.cfg.train_data} is not the data that {out} was trained on: its problems differ")
    model, moments = get_state_dict(run.policy, optimizer)
    saved = {"model": model, "optimizer": moments}
    dcp.load(saved, checkpoint_id=path)
    set_state_dict(run.policy, optimizer, model_state_dict=saved["model"],
                   optim_state_dict=saved["optimizer"])
    stream.position = state["position"]
    look.resume(state["step"])
    return state["step"]


def fingerprint(stream):
    """A number that changes with the training problems and their order."""
    return crc32(json.dumps([(p.text, str(p.answer)) for p in stream.problems]).encode())


def open_run(cfg, world):
    """Make the folder of the run and write config.json into it -> path."""
    name = os.path.basename(os.path.normpath(cfg.model))
    out = cfg.out or os.path.join("runs", f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    out = world.gather(out)[0]
    need(cfg.resume or not os.path.exists(os.path.join(out, "metrics.jsonl")),
         f"{out} holds the metrics of another run: choose another --out, or --resume {out}")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__,
                "python": platform.python_version()}
    try:
        os.makedirs(out, exist_ok=True)
        if world.rank == 0:
            replace_file(os.path.join(out, "config.json"),
                         json.dumps(asdict(cfg) | {"versions": versions}, indent=2))
    except OSError as e:
        raise SystemExit(f"eapo: cannot write to {out}: {e.strerror}; choose another --out") from e
    return out


class Look:
    """Watches a run: a progress bar, metrics.jsonl, exams, the report, what to print at the end."""

    def __init__(self, run, out, exams):
        self.run, self.out, self.exams = run, out, exams
        self.rows, self.before, self.after = [], None, None     # (step, {exam: Batch}): first, last

    def resume(self, step):
        """Take up metrics.jsonl and responses.jsonl where the checkpoint was written."""
        for name in ("responses.jsonl", "metrics.jsonl"):
            path = os.path.join(self.out, name)
            with open(path, "a+", encoding="utf-8") as f:
                f.seek(0)
                whole = [json.loads(line) for line in f if line.endswith("\n")]
            self.rows = [row for row in whole if row["step"] <= step]
            if self.run.world.rank == 0:
                replace_file(path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def steps(self, first):
        """first, first + 1 ... cfg.steps under a progress bar."""
        self.bar = self.run.world.bar(range(first, self.run.cfg.steps + 1), self.run.cfg.method)
        yield from self.bar

    def due(self, step):
        """Whether there is an exam after this step."""
        every = self.run.cfg.eval_every
        return every > 0 and (step % every == 0 or step == self.run.cfg.steps)

    def at(self, step, metrics, exam):
        """Log a step, and sit the exams if asked to."""
        world = self.run.world
        if metrics:
            self.bar.set_postfix_str(f"reward {metrics['reward']:+.2f}, entropy "
                                     f"{metrics['entropy']:.3f} nats, "
                                     f"{metrics['tokens_per_second']:.0f} tokens/s", refresh=False)
        if step == 1:
            self.warn(metrics)
        if exam:
            found, responses, batches = sit_exams(self.run, self.exams, step)
            metrics, self.after = metrics | found, (step, batches)
            self.before = self.before or self.after
            if world.rank == 0:
                with open(os.path.join(self.out, "responses.jsonl"), "a", encoding="utf-8") as f:
                    f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in responses)
                replace_file(os.path.join(self.out, "eval.json"),
                             json.dumps({"step": step, **found}, indent=2))
        self.rows.append({"step": step, **metrics})
        if world.rank == 0:
            with open(os.path.join(self.out, "metrics.jsonl"), "a") as f:
                f.write(json.dumps(self.rows[-1]) + "\n")

    def warn(self, m):
        """Say of the first step what is likely to spoil all others."""
        if m["truncated"] > 0.5:
            self.run.world.print(f"\nwarning: {m['truncated']:.0%} of the responses were cut at "
                                 "--max-response-tokens: raise it, or see whether the stop tokens "
                                 "above are the model's")
        if m["sampler_gap"] > 0.1:
            self.run.world.print(f"\nwarning: sampler and policy disagree by {m['sampler_gap']} "
                                 "nats a token: what is trained is not what samples")

    @torch.no_grad()
    def write_report(self, batch, groups, histogram):
        """report.html, with two groups of the last step under the microscope: as drawn, and as
        likely as the update has left their tokens (rho)."""
        cfg, G = self.run.cfg, self.run.cfg.group_size
        kept = [k for k, (number, _) in enumerate(groups) if number is not None][:2]
        rows = [g * G + i for g in kept for verdict in (True, False) for i in
                [i for i in range(G) if bool(batch.right[g * G + i]) == verdict][:2]]
        shown = batch.rows(torch.tensor(rows, dtype=torch.long, device=batch.ids.device))
        after = replace(shown)
        rescore(self.run, after, cfg.temperature)
        if self.run.world.rank:
            return
        rho = (after.logp - shown.logp).exp()
        clipped = surrogate(rho, shown.A, cfg.clip_low, cfg.clip_high, cfg.clip_c) != rho * shown.A
        A = group_advantages(batch.reward, G)[rows][:, None].expand(shown.A.shape)
        columns = [shown.quadrant, shown.logp.exp(), shown.H, A, shown.A, rho, clipped]
        pages = {g: dict(problem=groups[g][1].text, answer=groups[g][1].answer, responses=[])
                 for g in kept}
        for i, row in enumerate(rows):
            texts = [self.run.tokenizer.decode([t]) for t in shown.response(i)]
            pages[row // G]["responses"].append(dict(
                right=bool(shown.right[i]), reward=float(shown.reward[i]),
                tokens=list(zip(texts, *(c[i].tolist() for c in columns)))))
        edges = [round(0.125 * k, 3) for k in range(33)]
        wrong, right = (h / h.sum().clamp(min=1) for h in histogram)
        replace_file(os.path.join(self.out, "report.html"), report(
            {os.path.basename(self.out): [self.rows]}, pages.values(),
            (edges, right.tolist(), wrong.tolist())))

    def summary(self):
        """Print the curve, the exam results of the first and last model, and some responses."""
        if self.run.world.rank:
            return
        rates = [row["solve_rate"] for row in self.rows if "solve_rate" in row]
        print("\nsolve rate of the steps, 0 to 1:  "
              + "".join(" ▁▂▃▄▅▆▇█"[min(8, int(9 * r))] for r in rates[-100:]))
        if self.before and self.before is not self.after:
            self.responses()
        results = [row for row in self.rows if any("@" in key for key in row)]
        if results:
            self.table({f"step {row['step']}" if row["step"] else "base": row
                        for row in (results[0], results[-1])})
        print(f"\nmetrics, report.html, trained model: in {self.out}")

    def table(self, results):
        """Print {label: metrics of the exams}, a line each."""
        k, say = self.run.cfg.eval_samples, self.run.world.print
        say(f"\n{'':28}{f'Avg@{k}':>8}{'95% interval':>18}{f'Pass@{k}':>10}{'entropy, nats':>16}")
        for label, m in results.items():
            for name in self.exams:
                x = {key.rpartition("/")[2]: value for key, value in m.items()
                     if f"/{name}/" in key}
                say(f"{label + ' on ' + name:28}{x[f'avg@{k}']:8.3f}{x['avg_low']:10.3f} .. "
                    f"{x['avg_high']:.3f}{x[f'pass@{k}']:10.3f}{x['entropy']:16.3f}")

    def responses(self):
        """Print responses of the first and the last exam, the tokens coloured by quadrant."""
        name, k = next(iter(self.exams)), self.run.cfg.eval_samples
        problems = self.run.world.share(self.exams[name])
        share = self.before[1][name].right.view(-1, k).float().mean(1)
        undecided = ((share > 0) & (share < 1)).nonzero()[:3, 0].tolist()
        if sys.stdout.isatty():
            print("\n" + "  ".join(f"{colour}{q}\033[0m" for q, colour in QUADRANTS.items()),
                  "  bright: at or above the mean entropy of its group")
        for b in undecided or [0]:
            print("\n" + problems[b].text[:300])
            for step, batches in (self.before, self.after):
                device = batches[name].ids.device
                group = batches[name].rows(torch.arange(b * k, b * k + k, device=device))
                for i in range(min(3, k)):
                    verdict = "right" if group.right[i] else "wrong"
                    print(f"  {f'step {step}' if step else 'base':9}{verdict}  "
                          f"{self.paint(group, i)}")

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
# Part 9. The report: one HTML page that works offline and runs no script. Skip on first reading.
# PENS and MARKS: colour and dashes of a line; of a quadrant also its underline and its meaning.
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


def ticks(low, high):
    """Round numbers, evenly spaced, from at most low to at least high."""
    high = high if high > low else low + 1
    steps = (m * 10.0 ** e for e in range(-9, 9) for m in (1, 2, 5))
    step = next(step for step in steps if high - low <= 5 * step)
    return [k * step for k in range(math.floor(low / step), math.ceil(high / step) + 1)]


def curve(seeds, key):
    """[(step, low, mean, high)] of a metric: over seeds, or the interval of one seed's Avg@k."""
    at, stem = {}, key.rpartition("@")[0]
    for row in (row for rows in seeds for row in rows if math.isfinite(row.get(key, math.nan))):
        ends = [row.get(f"{stem}_{end}", row[key]) for end in ("low", "high") if len(seeds) == 1]
        at.setdefault(row["step"], []).append((row[key], *ends))
    return [(step, min(map(min, found)), sum(y for y, *_ in found) / len(found),
             max(map(max, found))) for step, found in sorted(at.items())]


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


def token(text, quadrant, p, H, A, A_CA, rho, clipped):
    """A token, shaded by entropy, underlined by quadrant, its numbers on hover, tap and focus."""
    q, tab = list(MARKS)[quadrant - 1], 0 if quadrant in (1, 4) else -1     # Tab: to the next fork
    return (f'<a class="{q}" tabindex="{tab}" style="--h: {.5 - math.exp(-H) / 2:.2f}" data-t="'
            f'{q}, p {p:.3f}, H {H:.3f} nats, A {A:+.3f}, A^CA {A_CA:+.3f}, rho {rho:.3f}, '
            f'{"clipped" if clipped else "not clipped"}">{shown(text) or "∅"}</a>')


def report(runs, groups=(), histogram=None):
    """The HTML page on runs {label: [rows of metrics.jsonl of one seed, ...]}."""
    title = "eapo: " + shown(", ".join(runs))
    page = [f"{HEAD}<title>{title}</title><h1>{title}</h1>Lines: means over seeds. Bands: lowest "
            "to highest seed, or the 95% interval of one seed's avg@k. Numbers: first → last."]
    curves = {key: f"Held out, {key.removeprefix('eval/')}" for seeds in runs.values()
              for rows in seeds for row in rows for key in row if "@" in key}
    curves |= {"solve_rate": "Solve rate in training", "entropy": "Entropy, nats",
               "response_length": "Response length, tokens", "information": "Ihat (14), nats"}
    shares = {"tokens": "Share of tokens", "advantage": "Share of the sum of |A|",
              "entropy": "Share of the sum of entropy", "drift": "Drift of H within a step, nats"}
    page += ["<h2>Curves</h2><div>", *(chart(name, {
        label: (pen, runs[label], key) for label, pen in zip(runs, PENS * len(runs))})
        for key, name in curves.items())]
    for label, seeds in runs.items():
        page += [f"</div><h2>Quadrants, {shown(label)}</h2><div>", *(
            chart(name, {q: (pen, seeds, f"{key}/{q}") for q, pen in MARKS.items()})
            for key, name in shares.items())]
    rows = [dict(step=H, right=r, wrong=w) for H, r, w in zip(*histogram or ([], [], []))]
    page += ["</div><h2>Token microscope</h2><div>", chart("Share of tokens, log scale", {
        side: (MARKS[q], [rows], side) for side, q in (("right", "PHR"), ("wrong", "NHR"))},
        "H of the token, nats", log=True), "</div>shade: H of", *(
        f' <a style="--h: {.5 - math.exp(-H) / 2}">&nbsp;{H}&nbsp;</a>' for H in (0, .1, .7, 2)),
        " nats", *(f'<br><a class="{q}">{q}</a> {m[3]}' for q, m in MARKS.items())]
    for group in groups:
        page += [f"<h3>{shown(group['problem'])}</h3>right answer: {shown(group['answer'])}"]
        for r in group["responses"]:
            mark, tokens = "right ✓" if r["right"] else "wrong ✗", r["tokens"]
            page += [f'<details open><summary>{mark}, {len(tokens)} tokens, reward {r["reward"]:+g}'
                     "</summary><pre>", *(token(*t) for t in tokens), "</pre></details>"]
    return "".join(page)


def compare(folders):
    """{label: [rows of a run, ...]}: runs that differ only in seed and out share a label."""
    found, runs = {}, {}
    for folder in map(os.path.abspath, folders):
        with reading(f"{folder} (name folders of runs)"):
            with open(f"{folder}/config.json") as f, open(f"{folder}/metrics.jsonl") as g:
                found[folder] = json.load(f), [json.loads(line) for line in g]
    fields = dict.fromkeys(name for config, _ in found.values() for name in config)
    apart = [name for name in fields if name not in {"seed", "out", "versions", *MAY_CHANGE}
             and len({str(config.get(name)) for config, _ in found.values()}) > 1]
    for folder, (config, rows) in found.items():
        label = ", ".join(f"{name} {config[name]}" for name in apart
                          if config.get(name) not in ("", None))
        runs.setdefault(label or os.path.basename([*found][0]), []).append(rows)
    return runs


# --------------------------------------------------------------------------------------------------
# Part 10. The loop: try, mark, compare, learn, look.
# --------------------------------------------------------------------------------------------------

def train(cfg):
    """Warm up if asked, then RL by cfg.method. All that a run leaves is in its folder."""
    world = World(cfg)
    out = open_run(cfg, world)
    if cfg.model != "tiny":
        plan(cfg, world)
    run = load(cfg, world)
    stream, exams, solutions = load_data(cfg, run.tokenizer, world)
    look = Look(run, out, exams)
    if cfg.eval_only:
        look.at(0, {}, exam=True)
        return look.table({cfg.model: look.rows[0]})
    doctor(run, stream.problems)
    world.print(f"this run is in {out}")
    optimizer = torch.optim.AdamW(run.policy.parameters(), lr=cfg.learning_rate, weight_decay=0.0,
                                  fused=True)
    done = load_checkpoint(run, optimizer, stream, look) if cfg.resume else 0
    with world.signals(), saving_model(run, out):
        if not cfg.resume:
            if not imitate(run, solutions):
                return world.print("stopped in the warm-up, which cannot be resumed")
            look.at(0, {}, exam=look.due(0))
        for step in look.steps(done + 1):
            start = run.start_step()

            # Try, mark: answer each problem G times; +1 if the boxed answer is right, else -1.
            batch, groups = roll_out(run, stream)

            # Compare: credit each response against its group, then each token by its entropy.
            give_credit(run, batch)                                                     # (1), (7)

            # Learn: a gradient step on the clipped loss for each mini-batch of the kept groups.
            with run.timed("update"):
                run.empty_sampler()
                updates = [learn(run, optimizer, mini)                                  # (2)
                           for mini in mini_batches(run, batch, groups)]

            # Look: watch the reward; the loss of a policy gradient does not measure progress.
            metrics, histogram = measure(run, batch, groups, updates)
            last = step == cfg.steps
            stop = world.asked_to_stop() and not last
            look.at(step, metrics | run.clocks(start, metrics), exam=look.due(step) and not stop)
            if stop or cfg.save_every and (last or step % cfg.save_every == 0):
                save_checkpoint(run, optimizer, stream, step, out)
            if stop or last or look.due(step):
                look.write_report(batch, groups, histogram)
            if stop:
                break
    look.summary()


def main(argv=None):
    """python eapo.py [flags]"""
    cfg = parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for known in ("`past_key_values` is deprecated", "torch.distributed is disabled"):
        warnings.filterwarnings("ignore", known)
    if cfg.compare:
        folder = cfg.out or "runs"
        os.makedirs(folder, exist_ok=True)
        replace_file(os.path.join(folder, "report.html"), report(compare(cfg.compare.split(","))))
        return print(f"eapo: {folder}/report.html")
    n = torch.cuda.device_count()
    need(cfg.gpus <= n, f"--gpus {cfg.gpus}: this machine has {n}")
    if "RANK" not in os.environ and (cfg.gpus or n) > 1 and cfg.model != "tiny":
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                   str(cfg.gpus or n), os.path.abspath(__file__), *(argv or sys.argv[1:])]
        os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "7200")     # Ctrl-C: end the step
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // (cfg.gpus or n))))
        os.execv(sys.executable, [sys.executable, *command])
    if cfg.model == "tiny" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)        # its matrices are too small for more to help
    train(cfg)


if __name__ == "__main__":
    main()

"""Every metric key there is, with one line of documentation; `docs/metrics.md` is made from it.

`Tracker.log` refuses a key that is not here, so the page cannot lag behind the code. A part in
angle brackets stands for a name, such as a reward's. `python -m flowrl.train.keys` prints the page.
"""

from __future__ import annotations

import re

from flowrl.errors import closest

KEYS = {
    "train/loss": "loss of the step, mean over its decisions and updates",
    "train/reward_mean": "weighted sum of the rewards, mean over the valid samples of the rollout",
    "train/reward_std": "standard deviation of the same sum over the valid samples",
    "train/ratio_mean": "mean of new over old probability of a decision; 1 on the first pass",
    "train/ratio_max_dev": "largest |ratio - 1| of a decision",
    "train/clip_frac_high": "share of decisions whose ratio the upper bound clips, advantage > 0 "
    "(where rewards are clipped one by one: some reward's)",
    "train/clip_frac_low": "share of decisions whose ratio the lower bound clips, advantage < 0 "
    "(where rewards are clipped one by one: some reward's)",
    "train/approx_kl": "half the mean squared log-ratio: the move away from the behaviour policy",
    "train/behaviour_kl": "exact KL divergence from the behaviour policy, per decision and latent "
    "dim; of methods that bound it",
    "train/kl": "KL divergence from the reference, per decision; absent when kl_coef is 0",
    "train/zero_std_frac": "share of groups without an advantage, as those whose rewards are all "
    "equal: they teach nothing",
    "train/invalid_frac": "share of samples masked because a reward could not be computed",
    "train/advantage_abs_mean": "mean of |advantage|, rewards summed, over the valid samples",
    "train/grad_norm": "global norm of the gradient before clipping, mean over the step's updates",
    "train/lr": "learning rate of the step's last update",
    "train/matching_error": "squared error of the velocity at fresh noise, mean over dims",
    "train/optimality": "DiffusionNFT's optimality of a sample, its advantage moved to [0, 1]",
    "train/old_distance": "squared distance of the velocity from old's, mean over dims",
    "train/old_kl": "the same distance where it is a penalty; absent when old_kl_coef is 0",
    "train/clip_frac": "share of decisions whose ratio a bound clips, of methods with one share",
    "train/weight": "weight of a decision in the loss",
    "train/margin": "implicit reward of a pair's winner minus its loser's",
    "train/ranked_right": "share of pairs whose margin is positive",
    "train/window_start": "first sampler step of the stochastic window, from 0",
    "train/num_decisions": "decisions that the step trained on, over all processes",
    "train/loss/<name>": "a term of a tokenizer's loss before its weight, mean over the batch",
    "train/metric/<name>": "what a tokenizer reports beside its losses, mean over the batch",
    "train/adversary/<name>": "loss of an add-on's adversary; absent while it rests",
    "reward/<name>/mean": "mean of one reward over the rollout's samples for which it is valid",
    "reward/<name>/std": "standard deviation of one reward over the same samples",
    "reward/<name>/invalid_frac": "share of the rollout's samples without a score of the reward",
    "reward/<name>/failed_calls": "calls of the reward that raised or took too long, every try",
    "reward/<name>/<component>": "mean of a part of its score that the reward reports beside it",
    "eval/<name>/mean": "mean of one reward over the held-out samples",
    "eval/<name>/invalid_frac": "share of held-out samples without a score; absent when 0",
    "eval/score": "the one number of a held-out evaluation: the mean over skills of the first "
    "reward where prompts name skills (GenEval's overall score), else its mean over samples",
    "eval/skill/<tag>": "mean of the first reward over the held-out prompts of one skill",
    "eval/diversity": "mean pairwise distance of the held-out samples of one prompt, 0 = all alike",
    "eval/distance": "distance of the evaluated weights from the base model: root mean square of "
    "the difference in velocity on noised samples of the base (tokens: in log-probs of its "
    "sequences); logged where monitor.reward is set",
    "eval/loss": "weighted sum of a tokenizer's losses on the held-out images; of an "
    "autoregressive model, the negative log-likelihood of a held-out token, nats",
    "eval/bits_per_token": "the latter in bits",
    "eval/accuracy": "share of held-out tokens that are the likeliest given those before",
    "eval/loss/<name>": "a term of it before its weight",
    "eval/psnr": "peak signal-to-noise ratio of held-out reconstructions from all tokens, dB, mean "
    "over images",
    "eval/psnr/<tokens>": "the same from the first so many tokens",
    "eval/usage/<name>": "how the codes are used on the held-out images: used is the share that "
    "occurs, entropy_bits that of their frequencies, perplexity 2 to its power",
    "perf/step_time_s": "wall time of the training step, all phases, seconds",
    "perf/data_s": "time that the step waited for images, seconds",
    "perf/rollout_s": "wall time of sampling, without decoding, seconds",
    "perf/decode_s": "wall time of turning latents or tokens into images, seconds",
    "perf/reward_s": "time that the rewards of this process worked, summed over them, seconds",
    "perf/reward_wait_s": "time that the step waited for scores, seconds: what was not hidden",
    "perf/train_s": "wall time of forward, backward and optimiser, seconds",
    "perf/images_per_s": "images sampled, scored and trained on per second, over all processes; of "
    "a tokenizer, trained on",
    "perf/nfe_per_image": "network evaluations of the rollout per image; guidance counts as two",
    "perf/train_rows_per_image": "network evaluations with gradient per image; guidance counts as "
    "two",
    "perf/frozen_rows_per_image": "network evaluations without gradient in training per image: of "
    "old, of the reference, to recompute log-probs; guidance counts as two",
    "perf/network_evals": "network evaluations of rollout and training since the run's beginning; "
    "those of held-out evaluations, eval/distance among them, are not counted",
    "perf/max_memory_gb": "peak memory so far: of the accelerator, or of the process without one",
    "samples/train": "images of the rollout with prompts and rewards",
    "samples/train_table": "the same with prompt, seed and rewards, a row per image; W&B only",
    "samples/reconstructions": "held-out images, and below each what growing numbers of tokens say",
    "samples/drawn": "images that an autoregressive model draws for held-out prompts, same seeds",
    "samples/eval": "images of the held-out evaluation, the same prompts and seeds every time",
    "samples/eval_table": "the same with prompt, seed and rewards, a row per image; W&B only",
    "track/nonfinite": "values of this row that were NaN or infinite and are stored as null",
}

_NAMES = re.compile(r"<\w+>")
# The pattern with the fewest names is tried first, then the longer one, so that eval/skill/<tag> is
# not taken for eval/<name>/mean, nor reward/<name>/mean for a component called mean.
_PATTERNS = {
    key: re.compile("[^/]+".join(re.escape(part) for part in _NAMES.split(key)))
    for key in sorted(KEYS, key=lambda key: (key.count("<"), -len(key)))
}


def match_key(key: str) -> str:
    """The entry of KEYS that a metric's key belongs to.

    Raises:
        ValueError: there is none; the message has the closest one.
    """
    for pattern, expression in _PATTERNS.items():
        if expression.fullmatch(key):
            return pattern
    raise ValueError(
        f"{key!r} is not a documented metric; {closest(key, KEYS)}. Add it to flowrl/train/keys.py"
    )


def to_markdown() -> str:
    """The page docs/metrics.md."""
    rows = [f"| `{key}` | {text} |" for key, text in KEYS.items()]
    return "\n".join(
        [
            "# Metrics",
            "",
            "Rows of `metrics.jsonl` and of the trackers, each with `step` (training steps done)",
            "and `time` (seconds since the epoch). A key is absent where it does not apply.",
            "Made by `python -m flowrl.train.keys > docs/metrics.md`.",
            "",
            "| key | value |",
            "|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    print(to_markdown(), end="")

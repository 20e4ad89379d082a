"""The training loop: the algorithm box of GRPO, with everything that keeps a long run honest.

roll out -> score -> advantages -> update, for both kinds of policy. Reading order: `Trainer.run`,
`_train_step`, `_preflight`. Nothing here multiplies tensors; the parts that do are in `step.py`,
`scoring.py`, `evaluate.py` and the method's slots.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from flowrl.config import Config, to_dict
from flowrl.data.sampler import GroupSampler
from flowrl.errors import RatioError
from flowrl.methods.spec import Method, StepPlan
from flowrl.protocols import Policy
from flowrl.train.card import write_card
from flowrl.train.checkpoint import Checkpoints, Together
from flowrl.train.collect import Collector
from flowrl.train.control import Clock
from flowrl.train.evaluate import Evaluator
from flowrl.train.judge import Judge, cut
from flowrl.train.lessons import Part
from flowrl.train.lifecycle import Life, any_process, running
from flowrl.train.machine import max_memory_gb
from flowrl.train.monitor import BEST, Monitor, read_note, write_note
from flowrl.train.resume import find_checkpoint
from flowrl.train.runfiles import replaced
from flowrl.train.scoring import RewardSet, read_samples
from flowrl.train.step import Learner, StepResult, total
from flowrl.train.wandb_run import batch_samples
from flowrl.types import PromptBatch, Scores

_NUM_SHOWN = 16  # images of a rollout in a tracker's grid


class Trainer:
    """One run. Build it with `flowrl.build.build_trainer`.

    Args:
        config: the run's.
        run: the run's folder.
        accelerator: that prepared the learner's parts.
        policy, method, rewards, sampler, evaluator, learner: the parts.
        ratio_tolerance: how far from 1 a ratio may be on the first pass; None = the method has no
            ratio of log-probs.
        guidance_rows: network rows per state, 2 with classifier-free guidance.
    """

    def __init__(
        self,
        *,
        config: Config,
        run: Path,
        accelerator: Accelerator,
        policy: Policy,
        method: Method,
        rewards: RewardSet,
        sampler: GroupSampler,
        evaluator: Evaluator,
        learner: Learner,
        ratio_tolerance: float | None,
        guidance_rows: int,
    ) -> None:
        self.config = config
        self.run_folder = run
        self.accelerator = accelerator
        self.policy = policy
        self.method = method
        self.rewards = rewards
        self.sampler = sampler
        self.evaluator = evaluator
        self.learner = learner
        self.ratio_tolerance = ratio_tolerance
        self.guidance_rows = guidance_rows
        self.monitor = None if config.monitor.reward is None else Monitor(config)
        self.checkpoints = Checkpoints(run / "checkpoints", keep=config.checkpoint.keep)
        self.collect = Collector(accelerator, config.scoring, note=self._note)
        self.train_seconds = 0.0
        self.network_evals = 0
        self._step = 0
        self._last_saved: int | None = None
        self._evaluated: int | None = None

    def run(self) -> str:
        """Trains to the end, or until stopped; returns "finished", "stopped" or "interrupted".

        Raises:
            ConfigError: the folder holds another run.
            RatioError, RewardError, NonFiniteError: see the messages; the last checkpoint stands.
        """
        resumed = self._resume()
        with running(
            self.config,
            self.accelerator,
            self.run_folder,
            resumed_step=resumed,
            where=lambda: (self._step, self.train_seconds),
        ) as life:
            self.tracker, self.progress = life.tracker, life.progress
            return self._run(life, is_new=resumed is None)

    def _run(self, life: Life, *, is_new: bool) -> str:
        settings = self.config
        self._preflight()
        if is_new:
            self._evaluate()
        else:
            self._restore_best()
        how = None
        while how is None and self._step < settings.run.steps:
            self._train_step()
            done = self._step
            if settings.eval.every and done % settings.eval.every == 0:
                self._evaluate()
            if settings.checkpoint.every and done % settings.checkpoint.every == 0:
                self._save()
            how = life.must_end(self._limits_reached())
        how = how or "finished"
        self._save()
        if how != "interrupted":
            self._evaluate()
            self._export("final")
        life.ended(how, self._limits_reached())
        return how

    def _limits_reached(self) -> str:
        """Which of the limits have been reached here, as `key=value`; "" for none."""
        limits = (("max_minutes", self.train_seconds / 60), ("max_evaluations", self.network_evals))
        given = ((name, getattr(self.config.run, name), spent) for name, spent in limits)
        reached = [f"run.{n}={limit}" for n, limit, x in given if limit is not None and x >= limit]
        if self.monitor is not None and (limit := self.monitor.limit()):
            reached.append(limit)
        return ", ".join(reached)

    # ------------------------------------------------------------------------------- a step

    def _train_step(self) -> None:
        """Rollout, scores, advantages, updates, metrics."""
        clock = Clock.started()
        batch, plan = self.sampler(self._step), self.method.plan(self._step)
        parts, rollouts, answers = [], [], []
        rollout_s = decode_s = 0.0
        for index in cut(batch, self.config.scoring.parts):
            rollout, trajectory = self.policy.rollout(batch.select(index), plan)
            rollout_s += clock.lap()
            samples = read_samples(rollout, self.rewards.inputs)
            decode_s += clock.lap()
            parts.append(Part(rollout.batch, trajectory))
            rollouts.append(rollout)
            answers.append(self._score(rollout.batch, samples))
        judge = Judge(
            self.method,
            self.collect,
            self.accelerator.process_index,
            parts,
            answers,
            by_part=self._judges_parts,
        )
        result = self.learner.learn(parts, judge, streams=self._judges_parts)
        metrics = judge.settle()
        train_s = clock.lap() - judge.wait_s
        self._step += 1
        step_s = time.perf_counter() - clock.start
        self.train_seconds += step_s
        metrics |= {f"train/{name}": value for name, value in result.metrics.items()}
        metrics |= self._counts(sum(each.network_evals for each in rollouts), result, plan)
        metrics |= {
            "perf/step_time_s": step_s,
            "perf/rollout_s": rollout_s,
            "perf/decode_s": decode_s,
            "perf/train_s": train_s,
            "perf/max_memory_gb": max_memory_gb(self.accelerator.device),
        }
        num_samples = self.sampler.num_groups * self.sampler.group_size
        metrics["perf/images_per_s"] = num_samples / step_s
        kinds = ("nfe", "train_rows", "frozen_rows")
        per_image = sum(metrics[f"perf/{kind}_per_image"] for kind in kinds)
        self.network_evals += round(num_samples * per_image)
        metrics["perf/network_evals"] = float(self.network_evals)
        self.progress.update(self._step, metrics)
        track = self.config.track
        if self._step % track.log_every == 0:
            self.tracker.log(self._step, metrics)
        if track.image_every and self._step % track.image_every == 0:
            samples = batch_samples(batch, judge.scores.rewards, num=_NUM_SHOWN)
            captions = [sample.prompt for sample in samples]
            images = torch.cat([rollout.images for rollout in rollouts])[:_NUM_SHOWN]
            self.tracker.log_images(self._step, "samples/train", images, captions, samples)

    def _note(self, lost: list[dict[str, Any]]) -> None:
        """Keeps what the rewards have lost of the step that is under way."""
        self.tracker.log_failures(self._step + 1, lost, where="training")

    def _score(self, batch: PromptBatch, samples: dict[str, Tensor]) -> Callable[[], Scores]:
        """The scores of some samples, when they are asked for; with several parts, from now on."""
        if self.config.scoring.parts == 1:
            return lambda: self.rewards.score(batch, **samples)
        return self.rewards.start(batch, **samples)

    @property
    def _judges_parts(self) -> bool:
        """Whether a part is learnt from before the others have their scores."""
        # DeepSpeed keeps its gradients to itself: they could not be corrected for invalid samples.
        is_ours = self.accelerator.distributed_type != DistributedType.DEEPSPEED
        return self.config.scoring.parts > 1 and self.method.compares == "group" and is_ours

    def _counts(self, network_evals: int, result: StepResult, plan: Any) -> dict[str, float]:
        evals, rows, frozen = total(
            self.accelerator,
            [float(n) for n in (network_evals, result.num_rows, result.num_frozen_rows)],
        )
        num_samples = self.sampler.num_groups * self.sampler.group_size
        per_row = self.guidance_rows
        counts = {
            "train/num_decisions": float(result.num_decisions),
            "train/lr": float(self.learner.optimizer.param_groups[0]["lr"]),
            "perf/nfe_per_image": evals / num_samples,
            "perf/train_rows_per_image": rows * per_row / num_samples,
            "perf/frozen_rows_per_image": frozen * per_row / num_samples,
        }
        if isinstance(plan, StepPlan) and plan.trained:
            counts["train/window_start"] = float(plan.trained[0])
        return counts

    # ------------------------------------------------------------------------- around the steps

    def _preflight(self) -> None:
        """Rewards on two images, and the ratio on the first pass, before anything is trained.

        Raises:
            RewardError: a reward breaks its contract.
            RatioError: the ratio is not 1 within the tolerance.
        """
        batch, plan = self.sampler(self._step), self.method.plan(self._step)
        few = first_samples(batch, 2 * self.learner.rows_per_chunk)
        rollout, trajectory = self.policy.rollout(few, plan)
        pair = torch.tensor([0, min(1, len(few) - 1)])
        samples = read_samples(rollout, self.rewards.inputs)
        self.rewards.probe(batch.prompts[0], **{key: each[pair] for key, each in samples.items()})
        if self.ratio_tolerance is None:
            self.progress.message(
                f"first pass: {self.method.name} has no ratio of log-probs to check"
            )
            return
        deviation = self.learner.first_ratio_deviation(trajectory)
        self.progress.message(
            f"first pass: |ratio - 1| <= {deviation:.1e} (tolerance {self.ratio_tolerance:.1e})"
        )
        if not deviation <= self.ratio_tolerance:
            raise RatioError(
                f"on the first pass the ratio deviates from 1 by {deviation:.2e}, more than "
                f"{self.ratio_tolerance:.1e}: rollout and training do not compute the same "
                "numbers, so every clip range would act on noise. Set "
                "compute.recompute_old_log_prob=true (one more forward per row), use float32, or "
                "raise compute.ratio_tolerance if you know why"
            )

    def _evaluate(self) -> None:
        if self._evaluated == self._step:
            return
        self._evaluated = self._step
        result = self.evaluator(
            self.policy, self.accelerator, step=self._step, folder=self.run_folder / "eval"
        )
        self.tracker.log(self._step, result.metrics)
        self.tracker.log_failures(self._step, result.lost, where="evaluation")
        self.tracker.log_images(
            self._step, "samples/eval", result.images, result.captions, result.samples
        )
        self.progress.evaluated(self._step, result.metrics)
        if self.monitor is not None and self.monitor.observe(self._step, result.metrics):
            self._last_saved = None  # a checkpoint of this step may not know the best
            self._save()
            self._export(BEST)

    def _restore_best(self) -> None:
        """After a resume: `best/` holds the best that the checkpoint knows, or it begins anew."""
        monitor = self.monitor
        if monitor is None or not monitor.step:
            return
        is_main = self.accelerator.is_main_process
        if any_process(
            self.accelerator,
            is_main and read_note(self.run_folder).get("step") == monitor.step,
        ):
            return
        if monitor.step == self._step:  # killed between the checkpoint and the folder
            self._export(BEST)
            return
        self.progress.message(
            f"{BEST}/ does not hold the weights of step {monitor.step}, where {monitor.reward} was "
            "best; the best is sought from here on"
        )
        monitor.forget()

    def _save(self) -> None:
        if self._last_saved == self._step:
            return
        extra = {
            "step": self._step,
            "num_updates": self.learner.num_updates,
            "train_seconds": self.train_seconds,
            "network_evals": self.network_evals,
            "evaluated": self._evaluated,
            "breaker": self.collect.breaker.state_dict(),
            "monitor": None if self.monitor is None else self.monitor.state_dict(),
            "config": to_dict(self.config),
        }
        self.checkpoints.save(self.accelerator, self._step, extra, self.policy.weights)
        self._last_saved = self._step

    def _resume(self) -> int | None:
        """Puts a checkpoint's state in place; returns its step, None for a new run."""
        path = find_checkpoint(self.config, self.run_folder)
        if path is None:
            return None
        extra = self.checkpoints.load(self.accelerator, path, self.policy.weights)
        self._step = self._last_saved = extra["step"]
        self.learner.num_updates = extra["num_updates"]
        self.train_seconds = extra["train_seconds"]
        self.network_evals = extra.get("network_evals", 0)  # older checkpoints did not count
        self._evaluated = extra["evaluated"]
        self.collect.breaker.load_state_dict(extra.get("breaker"))
        if self.monitor is not None:
            self.monitor.load_state_dict(extra.get("monitor"))
        return self._step

    def _export(self, name: str) -> None:
        """The artefact that diffusers loads, the weights that were evaluated, with its card."""
        run = self.run_folder
        with Together(self.accelerator, run / name):
            if self.accelerator.is_main_process:
                with replaced(run / name) as folder:
                    with self.policy.weights.use(self.evaluator.weights):
                        self.policy.save(folder)
                    write_card(run, self.config, self.method, step=self._step, folder=folder)
                    if name == BEST and self.monitor is not None:
                        write_note(folder, self.monitor, run)


def first_samples(batch: PromptBatch, num: int) -> PromptBatch:
    """The first samples of a batch."""
    return batch.select(torch.arange(min(num, len(batch))))

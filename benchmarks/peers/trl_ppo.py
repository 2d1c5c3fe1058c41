"""TRL's PPO, in the last release that has it.

Configured to do the same work as the others: one minibatch of all rows per epoch, temperature 1, no gradient
checkpointing and no mixed precision (both are TRL's defaults, and slower here), nothing saved and no samples printed.
By design its value model is a whole network, and all of it is trained. Its reference is the policy with the adapter
turned off.
"""

import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import (  # pyright: ignore[reportMissingImports]  (in its own environment)
    PPOConfig,
    PPOTrainer,
    ppo_trainer,
)

from benchmarks.worker import BETA, LR, PAD, Job, Turn


class Watch:
    """Times the helpers that TRL's loop calls, and keeps their results for the checks."""

    def __init__(self, turn: Turn):
        self.turn = turn
        self.phases: dict[str, float] = {}
        self.seen: dict[str, Tensor] = {}
        self.looks = True
        for name in ("batch_generation", "forward", "get_reward"):
            setattr(ppo_trainer, name, self._watched(name, getattr(ppo_trainer, name)))

    def _watched(self, name: str, function: Any) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            if torch.is_grad_enabled():
                return function(*args, **more)
            began = self.turn.clock()
            result = function(*args, **more)
            phase = "generate" if name == "batch_generation" else "forwards"
            self.phases[phase] = self.phases.get(phase, 0.0) + self.turn.clock() - began
            if self.looks:
                self._look(name, result)
            return result

        return call

    def _look(self, name: str, result: Any) -> None:
        if name == "batch_generation":
            self.seen = {"whole": result[0].clone(), "logits": result[1].float()}
        elif name == "forward":
            self.seen["reference"] = result.logits.float()  # a copy before TRL divides by the temperature in place
        else:
            self.seen["score"] = result[1]  # the value model comes first, and the reward model stays

    def outputs(self) -> dict[str, Tensor]:
        """The tensors that are checked."""
        whole, logits = self.seen["whole"], self.seen["logits"]
        steps = logits.shape[1]
        tokens = whole[:, -steps:]
        reference = self.seen["reference"][:, -steps - 1 : -1]

        def chosen(x: Tensor) -> Tensor:
            return x.log_softmax(-1).gather(2, tokens[..., None])[..., 0]

        return {
            "prompts": whole[:, :-steps],
            "tokens": tokens,
            "is_action": tokens != PAD,
            "logp": chosen(logits),
            "reference_logp": chosen(reference),
            "score": self.seen["score"],
        }


class TurnEnds(TrainerCallback):
    """Ends the turn after every iteration."""

    def __init__(self, turn: Turn, watch: Watch):
        self.turn, self.watch = turn, watch

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        phases, self.watch.phases = self.watch.phases, {}
        self.turn.done(phases, self.watch.outputs)
        self.watch.looks = False  # only the first turn is checked, and keeping results costs memory
        self.watch.seen.clear()


def config(job: Job, folder: str) -> PPOConfig:
    """One rollout of all rows, and `epochs` steps over it."""
    return PPOConfig(
        output_dir=folder,
        use_cpu=job.device == "cpu",
        bf16=job.options.get("autocast", False),
        gradient_checkpointing=False,
        per_device_train_batch_size=job.micro_rows,
        gradient_accumulation_steps=job.rows // job.micro_rows,
        num_mini_batches=1,
        num_ppo_epochs=job.epochs,
        local_rollout_forward_batch_size=job.rows,
        total_episodes=job.rows * 100_000,
        response_length=job.new_tokens,
        stop_token="eos" if job.ends else None,
        temperature=1.0,
        kl_coef=BETA,
        learning_rate=LR,
        lr_scheduler_type="constant",
        num_sample_generations=0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
    )


def main() -> None:
    """One PPO iteration per turn."""
    turn = Turn()
    job = turn.job()
    watch = Watch(turn)
    tokenizer = AutoTokenizer.from_pretrained(job.part("policy"))
    base = AutoModelForCausalLM.from_pretrained(job.part("policy"), dtype=job.torch_dtype)
    policy: Any = PeftModel.from_pretrained(base, job.part("adapter"), is_trainable=True)
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(job.part("reward"), num_labels=1, dtype=job.torch_dtype)
        for _ in range(2)
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            args=config(job, folder),
            processing_class=tokenizer,
            model=policy,
            ref_model=None,
            reward_model=reward.eval(),
            value_model=value,
            train_dataset=Dataset.from_dict({"input_ids": job.prompts()}),
            callbacks=[TurnEnds(turn, watch)],
        )
        turn.ready()
        trainer.train()


if __name__ == "__main__":
    main()

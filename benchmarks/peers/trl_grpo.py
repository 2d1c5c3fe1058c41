"""TRL's GRPO, in the project's own environment.

Configured to do the same work as the others: four passes over a rollout, each one step on all rows; KL to the reference
in the loss; no gradient checkpointing and no mixed precision, which are its defaults. Its trainer counts a pass as a
step, and samples new completions at every fourth step.
"""

import tempfile
from typing import Any

from datasets import Dataset
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from benchmarks.worker import BETA, EOS, LR, Job, Turn


class Watch:
    """Times the trainer's rollouts, and keeps the last one for the checks."""

    def __init__(self, turn: Turn, trainer: Any):
        self.turn = turn
        self.phases: dict[str, float] = {}
        self.seen: dict[str, Any] = {}
        self.made = trainer._generate_and_score_completions
        trainer._generate_and_score_completions = self.make

    def make(self, inputs: Any) -> Any:
        """A rollout, and its score."""
        began = self.turn.clock()
        self.seen = self.made(inputs)
        self.phases = {"collect": self.turn.clock() - began}
        return self.seen

    def outputs(self) -> dict[str, Tensor]:
        """The tensors that are checked."""
        names = {
            "prompt_ids": "prompts",
            "completion_ids": "tokens",
            "completion_mask": "is_action",
            "old_per_token_logps": "logp",
            "ref_per_token_logps": "reference_logp",
        }
        return {new: self.seen[old] for old, new in names.items() if self.seen.get(old) is not None}


class TurnEnds(TrainerCallback):
    """Ends the turn after the last pass over a rollout."""

    def __init__(self, turn: Turn, passes: int):
        self.turn, self.passes = turn, passes
        self.watch: Watch | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step % self.passes == 0:
            assert self.watch is not None
            self.turn.done(self.watch.phases, self.watch.outputs)


def config(job: Job, folder: str) -> GRPOConfig:
    """One rollout of all rows, and `epochs` steps over it."""
    return GRPOConfig(
        output_dir=folder,
        use_cpu=job.device == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=job.micro_rows,
        gradient_accumulation_steps=job.rows // job.micro_rows,
        num_generations=job.options["group"],
        num_iterations=job.epochs,
        max_completion_length=job.new_tokens,
        beta=BETA,
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_steps=10**6,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        seed=0,
    )


def main() -> None:
    """One GRPO iteration per turn."""
    turn = Turn()
    job = turn.job()
    tokenizer = AutoTokenizer.from_pretrained(job.part("policy"))
    base = AutoModelForCausalLM.from_pretrained(job.part("policy"), dtype=job.torch_dtype)
    base.generation_config.eos_token_id = EOS if job.ends else None
    reward = AutoModelForSequenceClassification.from_pretrained(
        job.part("reward"), num_labels=1, dtype=job.torch_dtype
    ).eval()
    ends = TurnEnds(turn, job.epochs)
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=base,
            peft_config=LoraConfig.from_pretrained(job.part("adapter"), inference_mode=False),
            reward_funcs=reward,
            args=config(job, folder),
            processing_class=tokenizer,
            reward_processing_classes=tokenizer,
            train_dataset=Dataset.from_dict({"prompt": [tokenizer.decode(ids) for ids in job.prompts()]}),
            callbacks=[ends],
        )
        # Load the adapter afterwards: a model that is passed with an adapter would become its own reference.
        set_peft_model_state_dict(trainer.model, load_file(f"{job.part('adapter')}/adapter_model.safetensors"))
        ends.watch = Watch(turn, trainer)
        turn.ready()
        trainer.train()


if __name__ == "__main__":
    main()

"""AgileRL's PPO for language models.

Configured to do the same work as the others: sampling from all tokens (its default is the 50 most probable), no
gradient checkpointing, one minibatch of all rows per epoch. Its critic is a second adapter with a value head. Two
things differ by design: AgileRL gives the final score to every token as its reward; and its environments return a list
of prompts, for which it generates one completion at a time. With `batched` it gets all prompts in one tensor, which its
own loop does not do.

On a CPU a Llama model would crash in the Triton kernels that AgileRL patches in. Setting the flag that they are
already installed prevents this.
"""

from typing import Any, cast

import torch
from agilerl.algorithms.ppo_llm import PPO  # pyright: ignore[reportMissingImports]  (in its own environment)
from agilerl.utils.ppo_value_head import AutoModelForCausalLMWithValueHead  # pyright: ignore[reportMissingImports]
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from benchmarks.worker import BETA, EOS, LR, PAD, Job, Turn


def build(job: Job) -> PPO:
    """The agent, with the shape's adapter."""
    model = AutoModelForCausalLMWithValueHead.from_pretrained(job.part("policy"), torch_dtype=job.torch_dtype)
    inner: Any = model.pretrained_model
    inner.generation_config.eos_token_id = EOS if job.ends else None
    inner._agilerl_liger_patched = job.device == "cpu"
    given: Any = LoraConfig.from_pretrained(job.part("adapter"))
    agent = PPO(
        pad_token_id=PAD,
        pad_token="<pad>",
        actor_network=cast(Any, model),
        lora_config=LoraConfig(
            r=given.r, lora_alpha=given.lora_alpha, target_modules=given.target_modules, task_type="CAUSAL_LM"
        ),
        batch_size=job.rows,
        micro_batch_size_per_gpu=job.micro_rows,
        mini_batch_size=job.rows,
        update_epochs=job.epochs,
        beta=BETA,
        lr_actor=LR,
        lr_critic=LR,
        top_k=0,
        max_output_tokens=job.new_tokens,
        max_model_len=len(job.prompts()[0]) + job.new_tokens,
        gradient_checkpointing=False,
        use_liger_loss=False,
        device=job.device,
        wrap=False,
    )
    weights = load_file(f"{job.part('adapter')}/adapter_model.safetensors")
    own = {key: x for key, x in agent.actor.named_parameters() if ".actor." in key}
    with torch.no_grad():
        for key, x in weights.items():
            name = key.replace(".weight", ".actor.weight")
            next(x for key, x in own.items() if key.endswith(name)).copy_(x)
    return agent


def main() -> None:
    """One PPO iteration per turn."""
    turn = Turn()
    job = turn.job()
    agent = build(job)
    reward = AutoModelForSequenceClassification.from_pretrained(
        job.part("reward"), num_labels=1, dtype=job.torch_dtype
    ).eval()
    reward = reward.to(job.device)
    prompts = torch.tensor(job.prompts()[: job.rows], device=job.device)
    batched = job.options["batched"]
    given = [{"input_ids": ids} for ids in (prompts[None] if batched else prompts[:, None])]
    turn.ready()
    while True:
        began = turn.clock()
        acted = agent.get_action(given)
        generated = turn.clock()
        whole = torch.cat(acted[0])
        with torch.inference_mode():
            score = reward(input_ids=whole, attention_mask=(whole != PAD).long()).logits[:, 0]
        scored = turn.clock()
        # One row per entry, as in its own loop.
        agent.learn((list(whole.split(1)), list(torch.cat(acted[1]).split(1)), score.clone()))
        phases = {"generate": generated - began, "forwards": scored - generated, "update": turn.clock() - scored}
        tokens = whole[:, prompts.shape[1] :]
        outputs: dict[str, Tensor] = {"prompts": prompts, "tokens": tokens, "is_action": tokens != PAD, "score": score}
        turn.done(phases, outputs.copy)


if __name__ == "__main__":
    main()

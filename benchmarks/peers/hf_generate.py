"""transformers' `generate`, as PPO trainers call it: LoRA unmerged, with the scores of every step."""

from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from benchmarks.worker import EOS, PAD, Turn


def main() -> None:
    """One rollout per turn."""
    turn = Turn()
    job = turn.job()
    base: Any = AutoModelForCausalLM.from_pretrained(job.part("policy"), dtype=job.torch_dtype)
    base = base.to(job.device)
    # The adapter gets the model's dtype: peft would keep it in float32, and convert at every step.
    model = PeftModel.from_pretrained(base, job.part("adapter"), autocast_adapter_dtype=False).eval()
    config = GenerationConfig(
        max_new_tokens=job.new_tokens, do_sample=True, top_k=0, top_p=1.0, pad_token_id=PAD,
        eos_token_id=EOS if job.ends else None, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    model.generation_config.eos_token_id = (
        config.eos_token_id
    )  # otherwise transformers uses the value of the model's own configuration
    prompts = torch.tensor(job.prompts()[: job.rows], device=job.device)
    torch.manual_seed(0)
    turn.ready()
    while True:
        with torch.inference_mode():
            out = model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), generation_config=config)
        turn.done(outputs=partial(outputs, prompts, out.sequences[:, prompts.shape[1] :], out.scores))
        del out  # otherwise two outputs are in memory in the next turn


def outputs(prompts: Tensor, tokens: Tensor, scores: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The tensors that are checked."""
    chosen = [x.float().log_softmax(-1).gather(1, t[:, None]) for x, t in zip(scores, tokens.T, strict=True)]
    return {"prompts": prompts, "tokens": tokens, "is_action": tokens != PAD, "logp": torch.cat(chosen, 1)}


if __name__ == "__main__":
    main()

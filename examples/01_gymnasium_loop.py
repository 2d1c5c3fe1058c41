"""A language model as a Gymnasium environment: a loop with random actions, then a batch with the model's actions.

python examples/01_gymnasium_loop.py
"""

import gymnasium as gym

import lmgym


def main() -> None:
    env = gym.make("lmgym/Sentiment-v0", render_mode="ansi")
    _, info = env.reset(seed=0)
    total, ended = 0.0, False
    while not ended:
        action = env.action_space.sample(info["action_mask"])
        _, reward, terminated, truncated, info = env.step(action)
        total, ended = total + float(reward), terminated or truncated
    print("Random tokens:", env.render())
    print(f"return {total:.2f}, score {info['score']:.2f}, ended by {info['finish_reason']}\n")

    # The same environment, batched in torch. The model chooses the actions.
    lm = lmgym.load("tiny")
    rows = gym.make_vec("lmgym/Sentiment-v0", num_envs=4, model=lm, autoreset_mode="Disabled").unwrapped
    assert isinstance(rows, lmgym.TokenVectorEnv)
    policy = lmgym.Policy(lm, adapter=None, critic="none")
    observation, info = rows.reset(seed=0)
    state = policy.start(observation["input_ids"], observation["attention_mask"])
    uniforms = lmgym.Stream(seed=0, update=0).uniforms(4, rows.max_new_tokens, rows.model.device)
    for t in range(rows.max_new_tokens):
        action = policy.act(state, uniforms[:, t], rows.action_mask_table[t])
        # `append` changes the state and computes no rewards; `step` would compute them now.
        rows.append(action.token)
        if not rows.any_running():
            break
        state = policy.advance(state, action.token)
    outcome = rows.pay_rewards()
    for prompt, completion, score in zip(rows.prompts, rows.completions(), outcome.score.tolist(), strict=True):
        print(f"{score:+.2f}  {prompt.text}|{completion.text}")


if __name__ == "__main__":
    main()

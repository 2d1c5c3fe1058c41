"""Stable-Baselines3: our VecEnv against SB3's own, log-probabilities against `Policy`'s, learning against closed forms.

The oracle of `SB3VecEnv` is SB3's DummyVecEnv over scalar environments; that of PPO with `SampledKL` is `lmgym.exact`.

Bugs that are easily made, and the test that was seen to fail when each was planted in agents/integrations/sb3:

    planted                                       fails
    infos of the next text where a row ended      test_it_equals_sb3s_own_vec_env_of_scalar_environments
    terminal observation of the next text         test_it_equals_sb3s_own_vec_env_of_scalar_environments
    cut-off rows not told from ended ones         test_it_equals_sb3s_own_vec_env_of_scalar_environments
    seed or prompt used for every reset           test_seeds_and_prompts_hold_for_one_reset
    temperature, mask or adapter forgotten        test_log_probs_values_and_entropies_are_the_policys
    the model a module of SB3's policy            test_sb3_cannot_damage_the_model
    optimizer without the adapter                 test_sb3_cannot_damage_the_model
    DQN's target on the same adapter              test_the_target_of_dqn_is_a_real_copy
    banned tokens in DQN's target or greedy act   test_the_target_of_dqn_is_a_real_copy
    KL added, or subtracted from a copy           test_the_buffer_holds_score_less_sampled_kl
    KL of a row not restarted with its text       test_what_is_recorded_is_true_and_beta_is_steered
"""

import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import sb3_contrib
import stable_baselines3
import torch
from conftest import slow
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor, VecNormalize
from test_ppo import remember_texts
from torch import nn

import lmgym
from agents import ppo
from agents.integrations.sb3 import (
    LMPolicy,
    LMQPolicy,
    MaskableLMPolicy,
    SampledKL,
    SB3VecEnv,
    policies,
    policy_kwargs,
    token_env,
)
from agents.learner import Learner, LearnerConfig
from lmgym import LanguageModel, Policy, Prompt, RolloutBuffer, Stream, TokenEnv, TokenVectorEnv, collect
from lmgym.exact import enumerate_tree, policy_logp
from lmgym.tasks.probe import Bandit, Tree

ROOT = Path(__file__).resolve().parents[1]
PAD, EOS = 0, 1


@dataclass
class Made:
    lm: LanguageModel
    policy: Policy
    env: SB3VecEnv

    def algorithm(self, name: str, env: Any = None, **settings: Any) -> Any:
        """SB3's PPO, A2C, DQN or MaskablePPO over the language model."""
        module = sb3_contrib if name == "MaskablePPO" else stable_baselines3
        network = {"MaskablePPO": MaskableLMPolicy, "DQN": LMQPolicy}.get(name, LMPolicy)
        env = env or self.env
        settings = {"gamma": 1.0, "seed": 0, "device": "cpu"} | settings
        return getattr(module, name)(network, env, policy_kwargs=policy_kwargs(self.policy, env), **settings)


def make(
    rows: int = 8, lm: LanguageModel | None = None, critic: Any = "head", temperature: float = 1.0, **arguments: Any
) -> Made:
    lm = lm or lmgym.load("probe")
    remember_texts(lm)
    lm.adapters.add("policy", rank=16, alpha=32)
    policy = Policy(lm, critic=critic, temperature=temperature)
    settings = {"task": Tree(), "max_prompt_tokens": 1, "max_new_tokens": 3, "kl": "none", "beta": 0.2}
    env = TokenVectorEnv(rows, model=lm, temperature=temperature, autoreset_mode="SameStep", **(settings | arguments))
    return Made(lm, policy, SB3VecEnv(env))


@torch.no_grad()
def perturb(policy: Policy) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)


# The environment ---------------------------------------------------------------------------------------------------


def equal(ours: Any, theirs: Any, where: str) -> None:
    if isinstance(theirs, dict):
        assert set(ours) == set(theirs), where
        for key in theirs:
            equal(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), where
        for i, (our, their) in enumerate(zip(ours, theirs, strict=True)):
            equal(our, their, f"{where}[{i}]")
    elif isinstance(theirs, np.ndarray):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), where
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0, err_msg=where)
    elif isinstance(theirs, float):
        assert type(ours) is float, where
        assert ours == pytest.approx(theirs, abs=1e-5), where
    else:
        assert type(ours) is type(theirs), where
        assert ours == theirs, where


@pytest.mark.parametrize(
    ("on_limit", "output"),
    [("terminate", "numpy"), ("truncate", "torch"), slow("terminate", "torch"), slow("truncate", "numpy")],
)
def test_it_equals_sb3s_own_vec_env_of_scalar_environments(probe: LanguageModel, on_limit: str, output: Any) -> None:
    """Observations, rewards, dones, every entry of every info, terminal observations and reset infos."""
    arguments: dict[str, Any] = {"task": Tree(), "model": probe, "max_prompt_tokens": 2, "max_new_tokens": 3}
    arguments |= {"on_limit": on_limit, "stop": ("bc",), "min_new_tokens": 1}
    ours: VecEnv = SB3VecEnv(TokenVectorEnv(4, autoreset_mode="SameStep", output=output, **arguments))
    theirs: VecEnv = DummyVecEnv([lambda: TokenEnv(**arguments)] * 4)
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    assert ours.seed(5) == theirs.seed(5)
    equal(ours.reset(), theirs.reset(), "reset")
    equal(ours.reset_infos, theirs.reset_infos, "reset infos")
    rng = np.random.default_rng(0)
    terminated = truncated = 0
    for step in range(40):
        masks = np.stack(theirs.env_method("action_masks"))
        equal(np.stack(ours.env_method("action_masks")), masks, f"step {step} masks")
        actions = np.array([rng.choice(np.flatnonzero(mask)) for mask in masks])
        found, expected = ours.step(actions), theirs.step(actions)
        for our, their, name in zip(found, expected, ("observation", "rewards", "dones", "infos"), strict=True):
            equal(our, their, f"step {step} {name}")
        equal(ours.reset_infos, theirs.reset_infos, f"step {step} reset infos")
        for done, info in zip(found[2], found[3], strict=True):
            assert ("terminal_observation" in info) == bool(done)
            truncated += info["TimeLimit.truncated"]
            terminated += bool(done) and not info["TimeLimit.truncated"]
    assert terminated > 20
    assert (truncated > 10) == (on_limit == "truncate")


def test_the_terminal_observation_is_the_whole_text() -> None:
    """Worked out by hand: prompt b, then c and d, at the budget."""
    a, b, c, d = range(2, 6)
    for on_limit in ("terminate", "truncate"):
        env = make(2, max_prompt_tokens=2, max_new_tokens=2, on_limit=on_limit).env
        env.set_options({"prompt": "b"})
        env.reset()
        env.step(np.array([c, a]))
        _, rewards, dones, infos = env.step(np.array([d, EOS]))
        assert dones.tolist() == [True, True]
        assert infos[0]["terminal_observation"]["input_ids"].tolist() == [PAD, b, c, d]
        assert infos[0]["terminal_observation"]["attention_mask"].tolist() == [0, 1, 1, 1]
        assert infos[1]["terminal_observation"]["input_ids"].tolist() == [PAD, b, a, EOS]
        assert infos[0]["TimeLimit.truncated"] is (on_limit == "truncate")
        assert infos[1]["TimeLimit.truncated"] is False
        assert [info["finish_reason"] for info in infos] == ["length", "stop"]
        scores = Tree.scores["cd"] if on_limit == "terminate" else 0.0, Tree.scores["a"]
        np.testing.assert_allclose(rewards, scores, atol=1e-6)
        assert rewards.dtype == np.float32


def test_one_batched_call_for_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    env = make(16).env
    env.reset()
    calls: list[int] = []
    step = env.env.step
    monkeypatch.setattr(env.env, "step", lambda actions: calls.append(len(actions)) or step(actions))
    env.step(np.full(16, 2))
    assert calls == [16]


def test_seeds_and_prompts_hold_for_one_reset() -> None:
    env = make(6).env

    def prompts() -> list[str]:
        env.reset()
        return [prompt.text for prompt in env.get_attr("prompts")]

    env.seed(3)
    first, second = prompts(), prompts()
    env.seed(3)
    assert [prompts(), prompts()] == [first, second]
    assert first != second
    env.set_options([{"prompt": letter} for letter in "abcdab"])
    assert prompts() == list("abcdab")
    assert prompts() != list("abcdab")
    env.set_options([{"prompt": "a"}] + [{}] * 5)
    with pytest.raises(ValueError, match="a prompt to 1 of 6 rows"):
        env.reset()


def test_attributes_and_methods() -> None:
    env = make(3, min_new_tokens=1).env
    env.reset()
    assert env.get_attr("max_new_tokens") == [3, 3, 3]
    assert env.get_attr("max_new_tokens", 1) == [3]
    env.step(np.array([2, 3, 4]))
    assert [int(length) for length in env.get_attr("length", [0, 2])] == [1, 1]
    env.set_attr("split", "test")
    assert env.env.split == "test"
    with pytest.raises(ValueError, match=r"set_attr\('split'\) for rows 1: all rows share"):
        env.set_attr("split", "train", 1)
    assert env.has_attr("action_masks")
    assert not env.has_attr("no_such_thing")
    assert is_masking_supported(env)
    masks = get_action_masks(env)
    assert masks.dtype == np.bool_
    assert masks.tolist() == env.action_masks().tolist() == [[False, True, True, True, True, True]] * 3
    env.reset()
    assert not get_action_masks(env)[:, EOS].any(), "min_new_tokens=1"
    assert len(env.env_method("action_masks", indices=1)) == 1
    assert [c.text for c in env.env_method("completions", indices=[0, 2])] == ["", ""]
    env.env_method("set_reference", "policy")
    assert env.env.reference.adapter == "policy"
    with pytest.raises(ValueError, match="all rows share one environment"):
        env.env_method("set_reference", None, indices=[0])
    assert env.env_is_wrapped(gym.Wrapper) == [False] * 3
    with pytest.raises(AttributeError):
        env.get_attr("no_such_thing")
    env.close()


def test_vec_monitor_counts_episodes_right() -> None:
    env = VecMonitor(make(2).env)
    env.reset()
    a, b = 2, 3
    env.step(np.array([a, EOS]))
    env.step(np.array([b, a]))
    *_, infos = env.step(np.array([EOS, EOS]))
    scores = pytest.approx([Tree.scores["ab"], Tree.scores["a"]])
    assert [info["episode"]["l"] for info in infos] == [3, 2]
    assert [float(info["episode"]["r"]) for info in infos] == scores
    assert [info["score"] for info in infos] == scores
    mean, _ = evaluate_policy(make(2).algorithm("PPO", n_steps=2, batch_size=4), env, n_eval_episodes=4)
    assert 0 <= float(np.mean(mean)) <= 1


def test_environments_that_do_not_fit_are_refused(probe: LanguageModel) -> None:
    for mode in ("NextStep", "Disabled"):
        with pytest.raises(ValueError, match=f"autoreset_mode='{mode}'.*autoreset_mode='SameStep'"):
            SB3VecEnv(gym.make_vec("lmgym/Tree-v0", 2, model=probe, autoreset_mode=mode))
    env = gym.make_vec("lmgym/Tree-v0", 2, model=probe, autoreset_mode="SameStep", output="numpy")
    with pytest.raises(ValueError, match=r"not RecordEpisodeStatistics: .*VecMonitor"):
        SB3VecEnv(gym.wrappers.vector.RecordEpisodeStatistics(env))
    with pytest.raises(ValueError, match=r"kl='none' and pass callback=SampledKL"):
        SB3VecEnv(gym.make_vec("lmgym/Tree-v0", 2, model=probe, autoreset_mode="SameStep", kl="sampled"))
    with pytest.raises(ValueError, match="DummyVecEnv is not a token environment"):
        token_env(DummyVecEnv([lambda: gym.make("CartPole-v1")]))
    for made in (env, SB3VecEnv(env), VecMonitor(SB3VecEnv(env))):
        assert token_env(made) is env
    scalar = gym.make("lmgym/Tree-v0", model=probe)
    assert token_env(scalar) is token_env(DummyVecEnv([lambda: scalar]))


# The language model as a network -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "maskable"])
@pytest.mark.parametrize("critic", ["head", "adapter"])
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_log_probs_values_and_entropies_are_the_policys(
    model: str, critic: str, kind: str, request: pytest.FixtureRequest
) -> None:
    """`collect` decodes completions with a cache; SB3's policy reads each prefix, and must say the same."""
    lm = request.getfixturevalue(model)
    arguments: dict[str, Any] = {"banned_tokens": (3,), "max_prompt_tokens": 4}
    arguments |= {"min_new_tokens": 2} if kind == "maskable" else {}
    made = make(16, lm, critic, temperature=0.7, **arguments)
    perturb(made.policy)
    network = made.algorithm("PPO" if kind == "plain" else "MaskablePPO", n_steps=2, batch_size=4).policy
    network.set_training_mode(True)
    prompts = ["a", "abc", "dcba", "bb"] * 4
    buffer = RolloutBuffer.like(made.env.env)
    collect(made.policy, made.env.env, buffer, Stream(0, 0), prompts)
    expected = made.policy.evaluate(buffer.sequences)
    made.env.set_options([{"prompt": prompt} for prompt in prompts])
    observation: Any = made.env.reset()
    for t in range(3):
        masks = {"action_masks": made.env.action_masks()} if kind == "maskable" else {}
        tensors = {key: torch.as_tensor(x) for key, x in observation.items()}
        values, logp, entropy = network.evaluate_actions(tensors, buffer.tokens[:, t], **masks)
        rows = buffer.is_action[:, t]
        assert bool(rows.any())
        for found, policys in (
            (logp, buffer.logp[:, t]),
            (logp, expected.logp[:, t]),
            (values[:, 0], buffer.values[:, t]),
            (network.predict_values(tensors)[:, 0], buffer.values[:, t]),
            (entropy, expected.entropy[:, t]),
        ):
            torch.testing.assert_close(found[rows], policys[rows], atol=1e-5, rtol=0)
        actions, _, drawn = network(tensors, **masks)
        again = network.evaluate_actions(tensors, actions, **masks)[1]
        torch.testing.assert_close(drawn, again, atol=1e-6, rtol=0)
        assert not bool(torch.isin(actions, torch.tensor([PAD, 3])).any()), "banned tokens are never drawn"
        observation, *_ = made.env.step(buffer.tokens[:, t].numpy())


def state(lm: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in lm.model.named_parameters() if "lora_" not in name}


def check_undamaged(model: Any, made: Made, base: dict[str, torch.Tensor], trained: list[nn.Parameter]) -> None:
    """What SB3 must not do to a language model, after it has trained it."""
    lm = made.lm
    inside = {id(m) for m in model.policy.modules()}
    assert not any(id(m) in inside for m in lm.model.modules()), "SB3 holds the language model as a module"
    assert all(torch.equal(base[name], p) for name, p in state(lm).items()), "base weights have changed"
    model.policy.set_training_mode(True)
    assert not lm.model.training, "the language model is in training mode"
    assert all(m.p == 0 and not m.training for m in lm.model.modules() if isinstance(m, nn.Dropout)), "dropout"
    optimized = [p for group in model.policy.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in optimized} == {id(p) for p in trained}, "the optimizer has other parameters"
    assert all(bool(torch.isfinite(p).all()) for p in trained)


SHORT: dict[str, dict[str, Any]] = {
    "PPO": {"n_steps": 4, "batch_size": 16, "n_epochs": 2},
    "A2C": {"n_steps": 4},
    "MaskablePPO": {"n_steps": 4, "batch_size": 16, "n_epochs": 2},
    "DQN": {"learning_starts": 8, "batch_size": 8, "train_freq": 1, "buffer_size": 200, "target_update_interval": 16},
}


@pytest.mark.parametrize("name", list(SHORT))
def test_sb3_cannot_damage_the_model(name: str, gpt2: LanguageModel) -> None:
    """A GPT-2 with dropout in its config, as transformers makes it."""
    made = make(8, gpt2)
    base = state(made.lm)
    model = made.algorithm(name, **SHORT[name])
    trained = list(model.policy.q_net.parameters()) if name == "DQN" else made.policy.parameters()
    before = [p.detach().clone() for p in trained]
    model.learn(128)
    check_undamaged(model, made, base, trained)
    moved = [not torch.equal(p, old) for p, old in zip(trained, before, strict=True)]
    assert sum(moved) > len(moved) / 2, "it does train the adapter"


PLANTED: dict[str, Callable[[Any, LanguageModel], Any]] = {
    "base weights": lambda model, lm: lm.model.apply(partial(BasePolicy.init_weights, gain=1.0)),
    "training mode": lambda model, lm: lm.model.train(),
    "dropout": lambda model, lm: [setattr(m, "p", 0.1) for m in lm.model.modules() if isinstance(m, nn.Dropout)],
    "optimizer": lambda model, lm: setattr(model.policy, "optimizer", torch.optim.Adam(lm.model.parameters())),
    "as a module": lambda model, lm: setattr(model.policy, "language_model", lm.model),
}


@pytest.mark.parametrize("damage", list(PLANTED))
def test_planted_damage_is_found(damage: str, gpt2: LanguageModel) -> None:
    """The check above would fail: with SB3's ortho_init, dropout switched on, a wrong optimizer, a registered model."""
    made = make(8, gpt2)
    base, model = state(made.lm), made.algorithm("PPO", **SHORT["PPO"])
    check_undamaged(model, made, base, made.policy.parameters())
    PLANTED[damage](model, made.lm)
    with pytest.raises(AssertionError, match=damage):
        check_undamaged(model, made, base, made.policy.parameters())


def test_nothing_moves_the_ratio_of_ppo_but_learning(gpt2: LanguageModel) -> None:
    """Rollouts in evaluation mode and updates in training mode see one distribution: KL(old ‖ new) is 0 at rate 0."""
    made = make(8, gpt2)
    perturb(made.policy)
    model = made.algorithm("PPO", **SHORT["PPO"], learning_rate=0.0)
    model.learn(64)
    assert abs(float(model.logger.name_to_value["train/approx_kl"])) < 1e-6
    assert model.logger.name_to_value["train/clip_fraction"] == 0


def test_the_target_of_dqn_is_a_real_copy() -> None:
    made = make(8)
    model = made.algorithm("DQN", **SHORT["DQN"] | {"target_update_interval": 10_000})
    online, target = (list(net.parameters()) for net in (model.q_net, model.q_net_target))
    assert not {p.data_ptr() for p in online} & {p.data_ptr() for p in target}
    assert all(torch.equal(p, other) for p, other in zip(online, target, strict=True))
    old = [p.detach().clone() for p in target]
    model.learn(200)
    assert sum(not torch.equal(p, other) for p, other in zip(online, target, strict=True)) > len(online) / 2
    assert all(torch.equal(p, other) for p, other in zip(target, old, strict=True)), "the target waits for its update"
    observation = {key: torch.as_tensor(x) for key, x in made.env.reset().items()}
    with torch.no_grad():
        values, targets = model.q_net(observation), model.q_net_target(observation)
    assert float((values - targets)[:, EOS:].abs().max()) > 1e-4
    assert bool((targets[:, PAD] == -torch.inf).all()), "the best next action is an allowed one"
    model.target_update_interval = 8
    model._on_step()
    torch.testing.assert_close(model.q_net_target(observation)[:, EOS:], model.q_net(observation)[:, EOS:])
    with torch.no_grad():
        model.q_net.head.bias[PAD] = 100.0
    assert (model.predict(made.env.reset(), deterministic=True)[0] != PAD).all()


@pytest.mark.parametrize("name", ["PPO", "DQN"])
def test_saved_parameters_come_back(name: str, tmp_path: Path) -> None:
    first = make(8)
    perturb(first.policy)
    model = first.algorithm(name, **SHORT[name])
    model.learn(64)
    model.save(tmp_path / "model.zip")
    assert (tmp_path / "model.zip").stat().st_size < 2_000_000, "the base model is not in it"
    second = make(8)
    again = second.algorithm(name, **SHORT[name])
    again.set_parameters(tmp_path / "model.zip", device="cpu")
    observation = {key: torch.as_tensor(x) for key, x in first.env.reset().items()}
    read = (lambda m: m.q_net(observation)) if name == "DQN" else (lambda m: m.policy.predict_values(observation))
    torch.testing.assert_close(read(again), read(model))
    found, expected = (made.lm.adapters.parameters("policy") for made in (second, first))
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match=r"not the language model.*set_parameters"):
        type(model).load(tmp_path / "model.zip", device="cpu")


def test_policies_that_do_not_fit_are_refused() -> None:
    short = {"n_steps": 2, "batch_size": 4}
    with pytest.raises(ValueError, match=r"critic='none'.*critic='head'"):
        make(2, critic="none").algorithm("PPO", **short)
    make(2, critic="none").algorithm("DQN")
    for name in ("PPO", "DQN"):
        with pytest.raises(ValueError, match=r"different tokens at different steps.*MaskablePPO"):
            make(2, min_new_tokens=1).algorithm(name)
    masked = make(2, min_new_tokens=1)
    model = masked.algorithm("MaskablePPO", **short)
    with pytest.raises(ValueError, match=r"action_masks=\.\.\."):
        model.predict(masked.env.reset())
    actions, _ = model.predict(masked.env.reset(), action_masks=masked.env.action_masks())
    assert actions.shape == (2,)

    made = make(2)
    with pytest.raises(ValueError, match=r"temperature 0\.5 .* temperature=0\.5"):
        policy_kwargs(Policy(made.lm, temperature=0.5), made.env)
    with pytest.raises(ValueError, match="cannot be trained"):
        policy_kwargs(Policy(made.lm, adapter=None), made.env)
    with pytest.raises(ValueError, match="different vocabularies"):
        policy_kwargs(made.policy, gym.make_vec("lmgym/Sort-v0", 2))
    truncated = Policy(made.lm, top_k=2)
    with pytest.raises(ValueError, match="top_k=0"):
        policy_kwargs(truncated, made.env)
    made.env.env.set_reference("policy")
    with pytest.raises(ValueError, match="its own reference"):
        policy_kwargs(made.policy, made.env)
    made.env.env.set_reference(None)
    with pytest.raises(ValueError, match=r"move its adapter to meta.*device='cpu'"):
        made.algorithm("PPO", **short).policy.to("meta")


def test_without_sb3_contrib_all_else_works(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "sb3_contrib"]:
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location("sb3_without_contrib", policies.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    made = make(2)
    kwargs = module.policy_kwargs(made.policy, made.env.env)
    PPO(module.LMPolicy, SB3VecEnv(made.env.env), n_steps=2, batch_size=4, policy_kwargs=kwargs, device="cpu")
    with pytest.raises(ImportError, match=r"lmgym\[sb3-contrib\]"):
        module.MaskableLMPolicy(made.env.observation_space, made.env.action_space, lambda _: 0.0, **kwargs)


# The KL ------------------------------------------------------------------------------------------------------------


class Record(BaseCallback):
    """Keeps what the buffer held at the end of the first rollout, and the infos of its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.infos: list[Any] = []
        self.found: dict[str, Any] = {}
        self.logged: dict[str, Any] = {}

    def _on_step(self) -> bool:
        self.infos.append(self.locals["infos"])
        return True

    def _on_rollout_end(self) -> None:
        self.logged = dict(self.logger.name_to_value)
        buffer: Any = getattr(self.model, "rollout_buffer")  # noqa: B009
        for name in ("rewards", "log_probs", "actions", "values"):
            self.found[name] = getattr(buffer, name).copy()
        self.found["observations"] = {key: x.copy() for key, x in buffer.observations.items()}


@pytest.mark.parametrize("on_limit", ["terminate", "truncate"])
@pytest.mark.parametrize("name", ["PPO", "A2C", "MaskablePPO"])
def test_the_buffer_holds_score_less_sampled_kl(name: str, on_limit: str) -> None:
    """Told state by state: −β (log π − log π_ref), the score where a text ends, the value where it is cut off."""
    made = make(8, on_limit=on_limit, temperature=0.8)
    perturb(made.policy)
    value = made.policy.value_head
    record = Record()
    model = made.algorithm(name, VecMonitor(made.env), **SHORT[name] | {"n_steps": 6}, learning_rate=0.0)
    model.learn(48, callback=CallbackList([SampledKL(beta=0.3), record]))
    found, ends, cuts, returns = record.found, 0, 0, []
    for t in range(6):
        for row in range(8):
            ids = found["observations"]["input_ids"][t, row]
            text = torch.as_tensor(ids[found["observations"]["attention_mask"][t, row] > 0])[None]
            token, info = int(found["actions"][t, row, 0]), record.infos[t][row]
            logp = []
            for adapter in ("policy", None):
                with torch.no_grad(), made.lm.adapters.using(adapter):
                    logits = made.lm.model(text).logits[0, -1] / 0.8
                logits[PAD] = -torch.inf
                logp.append(float(logits.log_softmax(-1)[token]))
            assert found["log_probs"][t, row] == pytest.approx(logp[0], abs=1e-5)
            expected = info["score"] - 0.3 * (logp[0] - logp[1])
            if info["TimeLimit.truncated"]:
                whole = torch.as_tensor(info["terminal_observation"]["input_ids"])[None]
                with torch.no_grad(), made.lm.adapters.using("policy"):
                    hidden = made.lm.model(whole, output_hidden_states=True).hidden_states[-1][0, -1]
                    expected += float(value(hidden))
            assert found["rewards"][t, row] == pytest.approx(expected, abs=1e-5)
            ends += "terminal_observation" in info
            cuts += info["TimeLimit.truncated"]
            returns += [(info["episode"]["r"], info["score"])] if "episode" in info else []
    assert ends > 8
    assert (cuts > 3) == (on_limit == "truncate")
    assert all(float(total) == pytest.approx(score, abs=1e-6) for total, score in returns), "VecMonitor saw scores"


def test_what_is_recorded_is_true_and_beta_is_steered() -> None:
    made = make(8, beta=lmgym.AdaptiveKL(beta=0.3, target_nats_per_sequence=0.5, horizon=100.0))
    perturb(made.policy)
    record = Record()
    model = made.algorithm("PPO", **SHORT["PPO"] | {"n_steps": 12, "batch_size": 96}, learning_rate=0.0)
    model.learn(96, callback=CallbackList([SampledKL(), record]))
    running, ended = np.zeros(8), []
    for t in range(12):
        running += record.found["log_probs"][t] - np.array([info["reference_logp"] for info in record.infos[t]])
        for row in range(8):
            if "terminal_observation" in record.infos[t][row]:
                ended.append(float(running[row]))
                running[row] = 0.0
    assert len(ended) > 20
    mean = float(np.mean(ended))
    assert mean > 0.05
    assert record.logged["kl/sequence_nats"] == pytest.approx(mean, abs=1e-5)
    assert record.logged["kl/beta"] == 0.3
    error = min(max(mean / 0.5 - 1, -0.2), 0.2)
    assert made.env.env.kl_controller.beta == pytest.approx(0.3 * (1 + error * len(ended) / 100), rel=1e-5)


def test_sampled_kl_says_where_it_cannot_be() -> None:
    made = make(4)
    with pytest.raises(ValueError, match=r"DQN has no log-probabilities.*kl='reference'"):
        made.algorithm("DQN").learn(8, callback=SampledKL(0.1))
    short = {"n_steps": 2, "batch_size": 4}
    with pytest.raises(ValueError, match=r"pays kl='reference' itself.*kl='none'"):
        make(4, kl="reference").algorithm("PPO", **short).learn(8, callback=SampledKL(0.1))
    normalized = VecNormalize(made.env, norm_obs=False)
    with pytest.raises(ValueError, match="norm_reward=False"):
        made.algorithm("PPO", normalized, **short).learn(8, callback=SampledKL(0.1))
    with pytest.raises(ValueError, match="is not a token environment"):
        PPO("MlpPolicy", gym.make("CartPole-v1"), n_steps=4, batch_size=4, device="cpu").learn(4, SampledKL(0.1))
    made.env.env.set_reference("policy")
    model = made.algorithm
    with pytest.raises(ValueError, match="its own reference"):
        model("PPO", **short)
    made.env.env.set_reference(None)
    model = made.algorithm("PPO", **short)
    made.env.env.set_reference("policy")
    with pytest.raises(ValueError, match="its own reference"):
        model.learn(8, callback=SampledKL(0.1))


def test_sampled_kl_with_sb3s_own_networks_and_vec_env() -> None:
    """The scalar environment of `gymnasium.make`, as SB3 wraps it."""
    record = Record()
    env = gym.make("lmgym/Tree-v0", kl="none")
    model = PPO("MultiInputPolicy", env, n_steps=16, batch_size=16, gamma=1.0, seed=0, device="cpu")
    model.learn(16, callback=CallbackList([SampledKL(beta=0.5), record]))
    for t, infos in enumerate(record.infos):
        expected = infos[0]["score"] - 0.5 * (record.found["log_probs"][t, 0] - infos[0]["reference_logp"])
        assert record.found["rewards"][t, 0] == pytest.approx(expected, abs=1e-5)


# Learning ----------------------------------------------------------------------------------------------------------

LEARN: dict[str, dict[str, Any]] = {
    "PPO": {"n_steps": 2, "batch_size": 64, "n_epochs": 4},
    "A2C": {"n_steps": 2},
    "MaskablePPO": {"n_steps": 2, "batch_size": 64, "n_epochs": 4},
    "DQN": {"learning_starts": 256, "batch_size": 64, "train_freq": 1, "target_update_interval": 256}
    | {"buffer_size": 5000, "exploration_fraction": 0.5},
}


def greedy_score(model: Any, env: SB3VecEnv, steps: int = 6) -> float:
    """The mean score of completions of the most probable (or best) tokens."""
    observation: Any = env.reset()
    scores: list[float] = []
    for _ in range(steps):
        more: dict[str, Any] = {"action_masks": env.action_masks()} if isinstance(model, MaskablePPO) else {}
        actions, _ = model.predict(observation, deterministic=True, **more)
        observation, _, dones, infos = env.step(actions)
        scores += [info["score"] for done, info in zip(dones, infos, strict=True) if done]
    return float(np.mean(scores))


class Rigged(Bandit):
    """The bandit with its scores dealt out anew, so that nobody begins with the best arm by luck."""

    def deal(self, best: str) -> None:
        worse = [letter for letter in "abcd" if letter != best]
        self.scores = dict(zip([*worse, best], (0.0, 0.3, 0.6, 1.0), strict=True))


@pytest.mark.parametrize(
    ("name", "network"),
    [
        ("PPO", "SB3's own"),
        *(slow(name, "SB3's own") for name in LEARN if name != "PPO"),
        *(slow(name, "language model") for name in LEARN),
    ],
)
def test_they_learn_the_bandit(name: str, network: str) -> None:
    """The best arm is the one that the untrained network plays least.

    Observed: 1.0 for every algorithm and network, on the plain bandit also with seeds 1 and 2.
    """
    task = Rigged()
    made = make(32, task=task, max_new_tokens=1)
    settings = LEARN[name] | {"learning_rate": 3e-3}
    if network == "language model":
        model = made.algorithm(name, **settings)
    else:
        kind: Any = {"PPO": PPO, "A2C": A2C, "MaskablePPO": MaskablePPO, "DQN": DQN}[name]
        model = kind("MultiInputPolicy", made.env, gamma=1.0, seed=0, device="cpu", **settings)
    masks = {"action_masks": made.env.env.action_masks().numpy()} if name == "MaskablePPO" else {}
    played = model.predict(made.env.reset(), deterministic=True, **masks)[0].tolist()
    task.deal("abcd"[int(np.argmin([played.count(token) for token in range(2, 6)]))])
    assert greedy_score(model, made.env) < 0.7
    model.learn(4096 if "PPO" in name else 6144)
    assert greedy_score(model, made.env) > 0.99


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("seed", range(3))
def test_dqn_over_the_language_model_sees_past_the_decoy(seed: int) -> None:
    """The best string, through the target network: its first letter is worth less than the decoy's on average.

    Observed with seeds 0, 1 and 2: a score of 1.0, in 11 seconds each. SB3's own network got there with one of three.
    """
    made = make(32)
    model = made.algorithm("DQN", **LEARN["DQN"], learning_rate=3e-3, seed=seed)
    model.learn(32_768)
    assert greedy_score(model, made.env) > 0.99


def progress(policy: Policy, env: TokenVectorEnv) -> tuple[float, float, float]:
    """Share of the way from the reference's objective to β log Z, the objective over β log Z, total variation.

    Sums and means over the four prompts.
    """
    trees = [enumerate_tree(env, Prompt(letter)) for letter in "abcd"]
    logp = [policy_logp(tree, policy.log_probs) for tree in trees]
    start = sum(tree.objective(tree.reference_logp) for tree in trees)
    best = sum(tree.optimum for tree in trees)
    now = sum(tree.objective(one) for tree, one in zip(trees, logp, strict=True))
    distance = sum(tree.total_variation(one) for tree, one in zip(trees, logp, strict=True))
    return (now - start) / (best - start), now / best, distance / 4


def sb3s_ppo(made: Made, updates: int, steps: int, batch: int, seed: int) -> None:
    model = made.algorithm(
        "PPO",
        n_steps=steps,
        batch_size=batch,
        n_epochs=4,
        gae_lambda=1.0,
        learning_rate=lambda remaining: 3e-3 * remaining,
        normalize_advantage=False,
        vf_coef=1.0,
        max_grad_norm=1.0,
        seed=seed,
    )
    model.learn(made.env.num_envs * steps * updates, callback=SampledKL())


def our_ppo(made: Made, updates: int, batch: int, seed: int) -> None:
    made.env.env.kl = "sampled"  # here PPO gives log π itself
    learner = Learner(made.policy.parameters(), LearnerConfig(lr=3e-3, warmup=0.0), seed)
    exact = {"lam": 1.0, "whiten_advantages": False, "value_coef": 1.0, "target_kl": 0.0}
    config = ppo.Config(updates=updates, epochs=4, minibatch_rows=batch, **exact)
    list(ppo.train(made.policy, made.env.env, learner, config))


@pytest.mark.slow
def test_sb3s_ppo_and_ours_reach_the_same_optimum() -> None:
    """π_ref exp(score/β) / Z over the 84 completions of two tokens, from a total variation of 0.22.

    Observed with seeds 0, 1 and 2, SB3's: 0.991, 0.986 and 0.988 of the way, total variation 0.011, 0.016 and 0.016;
    ours with seed 0: 0.988 of the way, total variation 0.016.
    Asserted: more than 0.96 of the way, more than 0.99 of β log Z, total variation below 0.03, for both.
    """
    for name in ("SB3's", "ours"):
        made = make(256, max_new_tokens=2)
        way, _, distance = progress(made.policy, made.env.env)
        assert way == pytest.approx(0.0, abs=1e-6)
        assert distance > 0.15
        if name == "ours":
            our_ppo(made, updates=40, batch=128, seed=0)
        else:
            sb3s_ppo(made, updates=40, steps=2, batch=256, seed=0)
        way, value, distance = progress(made.policy, made.env.env)
        assert way > 0.96, name
        assert value > 0.99, name
        assert distance < 0.03, name


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("seed", range(3))
def test_sb3s_ppo_and_ours_reach_the_optimum_of_the_whole_tree(seed: int) -> None:
    """340 completions, from a total variation of 0.30.

    Observed with seeds 0, 1 and 2, SB3's: 0.995, 0.993 and 0.994 of the way, total variation 0.008, 0.011 and 0.010;
    ours: 0.993, 0.993 and 0.994, total variation 0.012, 0.011 and 0.011. Asserted as above. 45 seconds each.
    """
    for name in ("SB3's", "ours"):
        made = make(512)
        if name == "ours":
            our_ppo(made, updates=120, batch=256, seed=seed)
        else:
            sb3s_ppo(made, updates=120, steps=3, batch=512, seed=seed)
        way, value, distance = progress(made.policy, made.env.env)
        assert way > 0.96, name
        assert value > 0.99, name
        assert distance < 0.03, name


# The page ----------------------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "other_libraries.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_loop_of_the_page_runs_and_learns(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    assert len(blocks) == 1, "blocks that need libraries which are not installed are marked `python no-run`"
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(blocks[0], "docs/other_libraries.md", "exec"), names)
    assert names["scores"][0] < 0.6
    assert names["scores"][-1] > 0.9
    assert capsys.readouterr().out.strip()


def test_the_other_blocks_of_the_page_are_python() -> None:
    blocks = re.findall(r"^```python no-run\n(.*?)^```$", PAGE, re.M | re.S)
    assert len(blocks) >= 3
    for block in blocks:
        compile(block, "docs/other_libraries.md", "exec")


def test_make_vec_env_asks_for_images_and_gets_them() -> None:
    """SB3's helper makes every environment with render_mode="rgb_array"."""
    env = make_vec_env("lmgym/Tree-v0", n_envs=2, seed=0)
    PPO("MultiInputPolicy", env, n_steps=8, batch_size=8, n_epochs=1, gamma=1.0, device="cpu").learn(16)
    images = env.get_images()
    assert [image is not None and image.dtype == np.uint8 for image in images] == [True, True]


def test_masks_that_depend_on_the_text() -> None:
    """Only MaskablePPO gets them; what it samples obeys them."""

    def alternating(prompts: Any, tokens: Any) -> Any:
        return np.array([[token in ((2, 3), (4, 5))[len(chosen) % 2] for token in range(6)] for chosen in tokens])

    for name in ("PPO", "DQN"):
        with pytest.raises(ValueError, match=r"by the text so far \(action_mask\).*MaskablePPO"):
            make(2, action_mask=alternating).algorithm(name)
    masked = make(2, action_mask=alternating)
    masked.algorithm("MaskablePPO", n_steps=4, batch_size=8).learn(16)
    for chosen, length in zip(
        token_env(masked.env).tokens.tolist(), token_env(masked.env).length.tolist(), strict=True
    ):
        assert all(token in ((2, 3), (4, 5))[t % 2] for t, token in enumerate(chosen[:length]))

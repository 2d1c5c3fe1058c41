"""Rollouts: what is kept, where, and that nothing waits for the device on the way."""

from collections import Counter
from typing import Any

import pytest
import torch
from conftest import as_on_an_accelerator, random_gpt2, random_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lmgym
from lmgym import LanguageModel, Policy, Prompt, RolloutBuffer, Stream, TokenVectorEnv, collect
from lmgym.env import Finish
from lmgym.rollout import check_agreement
from lmgym.rollout.token_loop import CHECK_INTERVAL
from lmgym.tasks.probe import Tree

PAD, EOS = 0, 1


def score(prompts: Any, completions: Any) -> list[float]:
    return [1.0 + len(c.text) for c in completions]


def make(lm: LanguageModel, rows: int = 8, **arguments: Any) -> tuple[Policy, TokenVectorEnv, RolloutBuffer]:
    if "policy" not in lm.adapters:
        lm.adapters.add("policy")
        for parameter in lm.adapters.parameters("policy"):
            nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(0))
    policy = Policy(lm, critic=arguments.pop("critic", "head"))
    nn.init.normal_(policy.value_head.weight, generator=torch.Generator().manual_seed(1))
    settings: dict[str, Any] = {"max_prompt_tokens": 4, "max_new_tokens": 10, "kl": "none", "score": score} | arguments
    env = TokenVectorEnv(rows, task=Tree(), model=lm, **settings)
    return policy, env, RolloutBuffer.like(env)


def tensors(buffer: RolloutBuffer) -> dict[str, Tensor]:
    return {name: value for name, value in vars(buffer).items() if isinstance(value, Tensor)}


def test_buffers_stay_where_they_are(probe: LanguageModel) -> None:
    policy, env, buffer = make(probe)
    before = {name: value.data_ptr() for name, value in tensors(buffer).items()}
    contents = []
    for update in range(3):
        collect(policy, env, buffer, Stream(0, update))
        contents.append(buffer.tokens.clone())
    assert {name: value.data_ptr() for name, value in tensors(buffer).items()} == before
    assert not torch.equal(contents[0], contents[1])
    assert not any(value.requires_grad or value.is_inference() for value in tensors(buffer).values())


class Waits(TorchDispatchMode):
    """Counts operations for which the host waits for an accelerator: those whose result or shape it must know."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.on = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if self.on and (by_mask or any(name.startswith(wanted) for wanted in self.NAMES)):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("arguments", [{}, {"critic": "adapter", "on_limit": "truncate"}, {"min_new_tokens": 17}])
def test_the_loop_asks_the_device_once_in_eight_steps(
    arguments: dict[str, Any], architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = random_model("LlamaConfig") if architecture == "llama" else random_gpt2(positions=40)
    as_on_an_accelerator(monkeypatch)
    # No row ends early: the loop runs through, and every question is asked.
    policy, env, buffer = make(lm, **({"max_new_tokens": 20, "min_new_tokens": 20} | arguments))
    waits = Waits()
    start, settle = policy.start, env.pay_rewards

    def begin(*given: Any) -> Any:
        decoding = start(*given)
        waits.on = True
        return decoding

    def end(*given: Any) -> Any:
        waits.on = False
        return settle(*given)

    monkeypatch.setattr(policy, "start", begin)
    monkeypatch.setattr(env, "pay_rewards", end)
    with waits:
        collect(policy, env, buffer, Stream(0, 0))
    assert waits.found.total() <= 20 // CHECK_INTERVAL, waits.found
    assert waits.found.total() > 0, "the counter counts nothing"


def test_rows_do_not_depend_on_the_batch(probe: LanguageModel) -> None:
    policy, env, buffer = make(probe, 8)
    large = tensors(collect(policy, env, buffer, Stream(7, 3)))
    policy, env, buffer = make(probe, 4)
    small = tensors(collect(policy, env, buffer, Stream(7, 3)))
    for name in ("prompt_ids", "prompt_mask", "tokens", "is_action", "finish"):
        assert torch.equal(large[name][:4], small[name]), name
    for name in ("logp", "values", "rewards", "reference_logp", "score"):
        torch.testing.assert_close(large[name][:4], small[name], atol=1e-5, rtol=0)


def test_streams_are_reproducible_and_differ(probe: LanguageModel) -> None:
    policy, env, buffer = make(probe, 16)
    runs = [collect(policy, env, buffer, stream).tokens.clone() for stream in
            (Stream(0, 0), Stream(0, 0), Stream(0, 1), Stream(1, 0))]  # fmt: skip
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0], runs[3])
    assert not torch.equal(runs[2], runs[3])
    uniforms = torch.cat([Stream(0, u).uniforms(256, 64, torch.device("cpu")).flatten() for u in range(4)])
    assert float(uniforms.min()) >= 0
    assert float(uniforms.max()) < 1
    assert len(uniforms.unique()) > 0.98 * len(uniforms)
    assert float(uniforms.mean()) == pytest.approx(0.5, abs=0.01)


def test_samples_share_their_prompt_and_nothing_else() -> None:
    stream = Stream(0, 5, samples=4)
    seeds = stream.prompt_seeds(12)
    assert seeds == [s for s in seeds[::4] for _ in range(4)]
    assert len(set(seeds)) == 3
    uniforms = stream.uniforms(12, 16, torch.device("cpu"))
    assert len({tuple(row.tolist()) for row in uniforms}) == 12


@pytest.mark.parametrize("on_limit", ["terminate", "truncate"])
@pytest.mark.parametrize("steps", [7, 8, 16])
@pytest.mark.parametrize("critic", ["head", "adapter"])
def test_what_a_buffer_holds(probe: LanguageModel, on_limit: str, steps: int, critic: str) -> None:
    """Against one full pass of the policy. 8 and 16 steps: the last question falls on the last step."""
    policy, env, buffer = make(probe, 32, max_new_tokens=steps, on_limit=on_limit, critic=critic)
    collect(policy, env, buffer, Stream(2, 0))
    lengths = buffer.is_action.sum(1)
    last = buffer.tokens[torch.arange(32), lengths - 1]
    stopped = buffer.finish == Finish.STOP
    assert stopped.any()
    assert (~stopped).any()
    assert buffer.columns == buffer.prompt_width + steps
    # The end-of-sequence token was chosen, and counts.
    assert bool((last[stopped] == EOS).all())
    assert bool((lengths[~stopped] == steps).all())
    assert bool((buffer.tokens[~buffer.is_action] == PAD).all())
    assert not bool(((buffer.tokens == EOS) & buffer.is_action).sum(1).gt(1).any())
    # The score stands at the last real token, and nowhere else.
    cut = ~stopped if on_limit == "truncate" else torch.zeros_like(stopped)
    expected = torch.zeros(32, steps)
    texts = (lengths - stopped.long()).float()
    expected[torch.arange(32), lengths - 1] = torch.where(cut, 0.0, 1.0 + texts)
    assert torch.equal(buffer.rewards, expected)
    assert torch.equal(buffer.score, expected.sum(1))

    with torch.no_grad():
        evaluation = policy.evaluate(buffer.sequences)
    mask = buffer.is_action
    torch.testing.assert_close(buffer.logp, evaluation.logp, atol=1e-5, rtol=0)
    torch.testing.assert_close(buffer.values, evaluation.value * mask, atol=1e-4, rtol=0)
    # The bootstrap is the critic's word on the whole text.
    with torch.no_grad():
        ids = torch.cat([buffer.prompt_ids, buffer.tokens], 1)
        whole = policy.start(ids, torch.cat([buffer.prompt_mask, mask], 1).long())
        expected = policy.value(whole) * cut
    torch.testing.assert_close(buffer.bootstrap, expected, atol=1e-4, rtol=0)


def test_a_fresh_policy_is_its_reference(probe: LanguageModel) -> None:
    probe.adapters.add("policy")
    policy, env = Policy(probe), TokenVectorEnv(16, task=Tree(), model=probe, max_prompt_tokens=4, max_new_tokens=6)
    buffer = collect(policy, env, RolloutBuffer.like(env), Stream(0, 0))
    torch.testing.assert_close(buffer.logp, buffer.reference_logp, atol=1e-5, rtol=0)


def test_stop_strings_in_a_rollout(probe: LanguageModel) -> None:
    policy, env, buffer = make(probe, 64, stop=("d",), max_new_tokens=12)
    collect(policy, env, buffer, Stream(0, 0))
    for row in range(64):
        tokens = buffer.tokens[row][buffer.is_action[row]].tolist()
        ends = [i for i, token in enumerate(tokens) if token in (EOS, 5)]
        assert ends == [len(tokens) - 1] if buffer.finish[row] == Finish.STOP else not ends
    assert not any("d" in completion.text for completion in env.completions())


def test_disagreements_raise(probe: LanguageModel) -> None:
    policy, env, buffer = make(probe)
    policy.temperature = 0.7
    with pytest.raises(ValueError, match=r"samples at temperature 0.7 .* make the environment with temperature=0.7"):
        collect(policy, env, buffer, Stream(0, 0))
    policy.temperature = 1.0
    env = TokenVectorEnv(
        8, task=Tree(), model=probe, max_prompt_tokens=4, max_new_tokens=10, reference_adapter="policy"
    )
    with pytest.raises(ValueError, match="its own reference"):
        collect(policy, env, buffer, Stream(0, 0))


@pytest.mark.parametrize("truncation", [{}, {"top_k": 2}], ids=["all", "top-k"])
@pytest.mark.parametrize("on_limit", ["terminate", "truncate"])
def test_scoring_again_finds_what_acting_found(
    probe: LanguageModel, on_limit: Any, truncation: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In full precision both agree: on log-probabilities, values, and the value behind a row that is cut off."""
    probe.adapters.add("policy")
    env = TokenVectorEnv(
        24, task=Tree(), model=probe, max_prompt_tokens=1, max_new_tokens=3, kl="none", on_limit=on_limit
    )
    policy = Policy(probe, **truncation)
    for number, parameter in enumerate(policy.parameters()):
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(number))
    acted = collect(policy, env, RolloutBuffer.like(env), Stream(0, 0))
    monkeypatch.setattr(Policy, "rescores", True)
    scored = collect(policy, env, RolloutBuffer.like(env), Stream(0, 0))
    assert torch.equal(acted.tokens, scored.tokens)
    assert bool(acted.bootstrap.any()) == (on_limit == "truncate")
    for name in ("logp", "values", "bootstrap"):
        torch.testing.assert_close(getattr(scored, name), getattr(acted, name), atol=1e-5, rtol=1e-5)


def test_rows_of_a_group_share_a_prompt_only_where_it_is_the_same(probe: LanguageModel) -> None:
    """Prompts that the caller gives: what acting found is what scoring finds, whatever stands side by side."""
    policy, env, _ = make(probe, 8, kl="none")
    for texts in (["a", "b", "c", "d"] * 2, ["a", "a", "b", "b"] * 2):
        buffer = collect(policy, env, RolloutBuffer.like(env), Stream(0, 0, 2), [Prompt(text) for text in texts])
        assert [prompt.text for prompt in env.prompts] == texts
        scored = policy.evaluate(buffer.sequences).logp.detach()
        torch.testing.assert_close(scored, buffer.logp, atol=1e-5, rtol=1e-5)


def test_a_policy_that_ends_otherwise_is_refused(probe: LanguageModel) -> None:
    """As many tokens, but another end: what the policy takes for an end, the environment would go on from."""
    _, env, _ = make(probe, 2, kl="none")
    other = lmgym.load("probe")
    other.eos_ids = (1, 2)
    other.adapters.add("policy")
    with pytest.raises(ValueError, match="different vocabularies"):
        check_agreement(Policy(other), env)

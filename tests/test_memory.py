"""The memory of training: pass sizes, gradient checkpointing, the chunked likelihood, free memory, and progress."""

import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import random_model
from rich.console import Console
from test_fast import FUSED, made, perturb
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig

import agents.pipeline.options as options_module
import agents.runs.progress as progress_module
import lmgym
from agents import ppo, reward_modelling, sft
from agents.evaluate import evaluate
from agents.learner import Learner, LearnerConfig
from agents.pipeline.options import RewardOptions, SFTOptions, rank_for
from agents.runs.progress import show_progress
from agents.training import pass_memory
from agents.training.master_weights import MasterWeights
from agents.training.metrics import Metrics
from agents.training.microbatch import MicroBatches
from agents.training.pass_memory import activation_budget, bytes_per_token, decoding_slots
from lmgym import LanguageModel
from lmgym.devices import free_memory
from lmgym.fused import gradient_checkpointing
from lmgym.io import listen, report_progress
from lmgym.models import Example, Sequences, checkpointed_layers, likelihood, token_nll
from lmgym.preferences import Comparison
from lmgym.reward import RewardModel

CPU = torch.device("cpu")


def sequences(lm: LanguageModel, rows: int = 16, prompt: int = 8, steps: int = 40) -> Sequences:
    ids = torch.randint(2, 6, (rows, prompt + steps), generator=torch.Generator().manual_seed(0))
    on = torch.ones_like(ids, dtype=torch.bool)
    allowed = torch.ones(steps, lm.vocabulary, dtype=torch.bool)
    return Sequences(ids[:, :prompt], on[:, :prompt], ids[:, prompt:], on[:, prompt:], allowed)


def kept_bytes(run: Callable[[], Tensor]) -> int:
    """What autograd keeps for the backward pass of activations: tensors with a row for each token."""
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        if x.numel() >= 16 * 40 * 8:  # not weights, which are small here
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            alive.append(x)
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        run()
    return sum(sizes.values())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", ["GPT2Config", "LlamaConfig"])
def test_the_estimate_is_near_what_autograd_keeps(config: str, dtype: torch.dtype, recompute: bool) -> None:
    lm = random_model(config, **FUSED[config], num_hidden_layers=6)
    lm.to(dtype=dtype)
    lm.adapters.add("policy", rank=2)
    policy, texts = lmgym.Policy(lm), sequences(lm)
    with gradient_checkpointing(recompute):
        kept = kept_bytes(lambda: policy.evaluate(texts).logp) / (16 * 47)
    each = (bytes_per_token(policy) - 4 * dtype.itemsize * 32) // 8
    estimate = bytes_per_token(policy, recompute) - (3 if recompute else 2) * each  # without what is there for a moment
    assert 0.7 * kept < estimate < 1.5 * kept, (kept, estimate)


def test_the_estimate_counts_what_is_trained() -> None:
    lm = random_model("LlamaConfig", num_hidden_layers=6)
    lm.adapters.add("policy", layers=2)
    policy = lmgym.Policy(lm)
    whole, head, half = bytes_per_token(lm), 4 * 4 * 32, bytes_per_token(policy)
    assert half - head == (whole - head) / 2, "(2 + 2) layers of (6 + 2)"
    assert bytes_per_token(lmgym.Policy(lm, critic="network")) == half + whole
    assert bytes_per_token(lmgym.Policy(lm, critic="adapter")) == 2 * half
    assert bytes_per_token(policy, whole_logits=True) - half == 24 * 6
    lm.fast = False
    assert bytes_per_token(policy) > 1.5 * whole


def smollm(layers: int = 30) -> Any:
    config = LlamaConfig(
        hidden_size=576, num_hidden_layers=layers, num_attention_heads=9, num_key_value_heads=3,
        intermediate_size=1536, vocab_size=49152,
    )  # fmt: skip
    return SimpleNamespace(config=config, dtype=torch.float32, device=CPU)


def test_a_model_of_135_million_parameters_gets_passes_of_a_few_hundred_tokens() -> None:
    assert 300 < pass_memory.CEILING / pass_memory._of_layers(smollm(), 0, False) < 600
    assert pass_memory.CEILING / pass_memory._of_layers(smollm(), 0, True) > 2000


def passes(said: list[str] | None = None, **more: Any) -> MicroBatches:
    parameter = torch.nn.Parameter(torch.zeros(10))
    settings = {"max_tokens": 0, "by_length": True} | more
    return MicroBatches(
        [parameter], MasterWeights([parameter]), Metrics(), notify=(said if said is not None else []).append, **settings
    )


def test_the_built_in_model_keeps_its_passes() -> None:
    lm = lmgym.load("tiny")
    lm.adapters.add("policy")
    one, items = passes(), passes()
    one.fit(lmgym.Policy(lm), most=4096)
    items.fit(lm)
    assert one.pass_tokens == 4096
    assert items.pass_tokens > 32 * 256, "a default minibatch of fine-tuning is one pass"
    mine = passes(max_tokens=77)
    mine.fit(lm, most=4096)
    assert mine.pass_tokens == 77
    unknown = passes()
    unknown.fit(lmgym.testing.TablePolicy(6, 4), most=4096)
    assert unknown.pass_tokens == 4096


def test_little_free_memory_makes_passes_smaller_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert activation_budget(CPU, 0) == (pass_memory.CEILING, False)
    monkeypatch.setattr(pass_memory, "free_memory", lambda device: 2**30)
    assert activation_budget(CPU, 0).size == pass_memory.CEILING
    assert activation_budget(CPU, 2**28).size == pass_memory.CEILING // 4, "gradients and moments come first"
    monkeypatch.setattr(pass_memory, "free_memory", lambda device: 0)
    assert activation_budget(CPU, 0) == (pass_memory.LEAST * 3 // 4, True)
    monkeypatch.setattr(pass_memory, "free_memory", lambda device: None)
    assert activation_budget(CPU, 2**40).size == pass_memory.CEILING, "not known"
    monkeypatch.setattr(pass_memory, "free_memory", lambda device: 50 * 2**20)
    said: list[str] = []
    lm, some = random_model("LlamaConfig", num_hidden_layers=6), passes(said)
    some.fit(lm)
    assert some.pass_tokens == 24 * 2**20 // bytes_per_token(lm)
    assert len(said) == 1
    assert str(some.pass_tokens) in said[0]
    few = passes(said)
    few.fit(lm, most=100)
    assert (few.pass_tokens, len(said)) == (100, 1), "nothing became smaller"
    monkeypatch.setattr(pass_memory, "LEAST", 1)
    monkeypatch.setattr(pass_memory, "free_memory", lambda device: 0)
    least = passes()
    least.fit(lm)
    assert least.pass_tokens == 1, "0 would mean passes of any size"


def test_items_are_split_by_their_padded_size() -> None:
    one = passes(max_tokens=100)
    sizes = [10, 40, 40, 10, 10, 10, 300, 1, 1]
    parts = one.split_items(sizes)
    assert [i for part in parts for i in range(*part.indices(len(sizes)))] == list(range(len(sizes)))
    assert all(len(sizes[p]) * max(sizes[p]) <= 100 or len(sizes[p]) == 1 for p in parts)
    assert len(parts) == 5
    assert one.split_items([300, 1]) == [slice(0, 1), slice(1, 2)], "no pass is empty"
    one.pass_items = 1
    assert len(one.split_items(sizes)) == len(sizes)
    assert passes().split_items([0] * 5) == [slice(0, 5)]


def test_the_largest_pass_is_halved_where_passes_differ() -> None:
    one = passes(max_tokens=100)
    seen: list[list[int]] = []

    def backward(part: slice) -> None:
        seen.append(list(range(*part.indices(4))))
        if len(seen[-1]) > 2:
            raise MemoryError

    one.over_items(range(4), lambda item: 90 if item == 0 else 10, backward)
    assert seen == [[0], [1, 2, 3], [0], [1, 2], [3]], "the step begins again with passes of at most two"


def test_a_resumed_learner_has_the_passes_of_the_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, env = made(lmgym.load("probe"))
    learner = Learner(policy.parameters(), LearnerConfig())
    monkeypatch.setattr(pass_memory, "free_memory", lambda device: 0)
    learner.say = lambda text: None
    monkeypatch.setattr(pass_memory, "LEAST", 2**16)
    list(ppo.train(policy, env, learner, ppo.Config(updates=1)))
    small = learner.micro_batches.pass_tokens
    assert 0 < small < 4096
    monkeypatch.setattr(pass_memory, "free_memory", lambda device: 2**40)
    other = Learner(policy.parameters(), LearnerConfig())
    other.restore(learner.state())
    list(ppo.train(policy, env, other, ppo.Config(updates=2)))
    assert other.micro_batches.pass_tokens == small


def test_many_long_rows_are_decoded_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation and preferences: the same tokens, and no difference where everything fits."""
    policy, env = made(lmgym.load("probe"), rows=12)
    assert decoding_slots(policy, env) == 0
    whole = evaluate(policy, env)
    row = (4 + 12) * 2 * 2 * 2 * 16 * 4  # columns, keys and values, layers, heads, head size, bytes
    monkeypatch.setattr(pass_memory, "CACHE", 12 * row)
    assert decoding_slots(policy, env) == 0
    monkeypatch.setattr(pass_memory, "CACHE", 5 * row)
    assert decoding_slots(policy, env) == 5
    some = evaluate(policy, env)
    assert [s["completion"] for s in some.samples] == [s["completion"] for s in whole.samples]
    assert some.figures["score"].mean == pytest.approx(whole.figures["score"].mean, abs=1e-5)
    env.on_limit = "truncate"
    assert decoding_slots(policy, env) == 0


def test_a_config_with_other_names_or_a_number_for_each_layer_is_guessed() -> None:
    odd = SimpleNamespace(hidden_size=128, num_key_value_heads=[2, 4], intermediate_size=[100, 300])
    assert pass_memory._sizes(odd) == (128, 32, 2, 4, 64)
    assert pass_memory._count(odd, "n_inner", "intermediate_size", other=1) == 300


# Gradient checkpointing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("config", ["GPT2Config", "LlamaConfig", "OPTConfig"])
def test_checkpointing_gives_the_same_bits_and_keeps_less(config: str, fast: bool) -> None:
    """OPT drops out in its layers' own forward pass: it must stay off."""
    lm = random_model(config, **FUSED.get(config, {"ffn_dim": 64}), num_hidden_layers=4)
    lm.fast = fast
    lm.adapters.add("policy")
    perturb(lm.adapters.parameters("policy"))
    policy, texts = lmgym.Policy(lm), sequences(lm)
    parameters, found = policy.parameters(), []
    for on in (False, True):
        for parameter in parameters:
            parameter.grad = None
        with gradient_checkpointing(on):
            new = policy.evaluate(texts)
            kept = kept_bytes(lambda: policy.evaluate(texts).logp)
        (new.logp.sum() + new.value.sum() + new.entropy.sum()).backward()
        found.append((kept, new.logp.detach(), [p.grad for p in parameters]))
    assert torch.equal(found[0][1], found[1][1])
    for one, other in zip(found[0][2], found[1][2], strict=True):
        assert one is not None
        assert torch.equal(one, other)
    assert found[1][0] < found[0][0] / 3


def trained(kind: str, on: bool, fast: bool, config: str = "LlamaConfig") -> list[Tensor]:
    """The parameters after some steps of a stage."""
    lm = random_model(config)
    lm.fast = fast
    own = LearnerConfig(gradient_checkpointing=on, micro_tokens=60)
    if kind == "ppo":
        policy, env = made(lm)
        learner = Learner(policy.parameters(), own)
        list(ppo.train(policy, env, learner, ppo.Config(updates=1)))
    elif kind == "sft":
        lm.model.requires_grad_(True)
        learner = Learner(lm.model.parameters(), own)
        texts = [Example("ab", "cd" * n) for n in range(1, 9)]
        list(sft.train(lm, texts, [], learner, sft.Config(minibatch_rows=4)))
    else:
        model = RewardModel.from_language_model(lm, rank=2)
        learner = Learner(model.parameters(), own)
        pairs = [Comparison("ab", ("cd" * n, "a" * n)) for n in range(1, 9)]
        list(reward_modelling.train(model, pairs, [], learner, reward_modelling.Config(minibatch_prompts=4)))
    return [p.detach().clone() for p in learner.parameters]


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("kind", ["ppo", "sft", "reward"])
def test_every_stage_trains_the_same_with_checkpointing(kind: str, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    for module in ("lmgym.fused.forward", "lmgym.models.checkpointing"):
        real = __import__(module, fromlist=["x"]).recomputed

        def counted(*inputs: Any, real: Any = real, **more: Any) -> Any:
            calls.append(lmgym.fused.recomputes())
            return real(*inputs, **more)

        monkeypatch.setattr(f"{module}.recomputed", counted)
    without = trained(kind, False, fast)
    assert not any(calls)
    calls.clear()
    with_it = trained(kind, True, fast)
    assert any(calls)
    assert all(torch.equal(a, b) for a, b in zip(without, with_it, strict=True))


@pytest.mark.parametrize("config", ["GPT2Config", "BloomConfig"])
def test_a_reward_model_whose_layers_get_a_cache_in_another_way_trains_with_checkpointing(config: str) -> None:
    """GPT-2 passes the cache by position."""
    for one, other in zip(*(trained("reward", on, False, config) for on in (False, True)), strict=True):
        assert torch.equal(one, other)


def test_checkpointing_that_is_impossible_is_refused() -> None:
    with pytest.raises(ValueError, match="compile and gradient_checkpointing"):
        LearnerConfig(compile=True, gradient_checkpointing=True)
    with (
        gradient_checkpointing(),
        pytest.raises(ValueError, match="Linear has none"),
        checkpointed_layers(torch.nn.Linear(2, 2)),
    ):
        pass


# Likelihood, ranks and free memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False], ids=["all weights", "LoRA"])
def test_the_chunked_likelihood_is_the_whole_one(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against plain torch, with its gradients; with all weights the head, which is the embedding, is trained."""
    lm = random_model("LlamaConfig", tie_word_embeddings=True)
    adapter = None if whole else "sft"
    if adapter:
        lm.adapters.add(adapter)
        perturb(lm.adapters.parameters(adapter))
    parameters = list(lm.model.parameters()) if whole else lm.adapters.parameters("sft")
    for parameter in parameters:
        parameter.requires_grad_(True)
    texts = sequences(lm, rows=4)
    logits, _ = lm.evaluate(texts, adapter)
    expected = -logits.log_softmax(-1).gather(2, texts.tokens[..., None])[..., 0]
    gradients = torch.autograd.grad(expected.square().sum(), parameters)
    monkeypatch.setattr(likelihood, "CHUNK_LOGITS", 6 * 37)  # 37 of 160 tokens
    found = token_nll(lm, texts, adapter)
    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad(found.square().sum(), parameters), gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(token_nll(lm, texts, adapter), expected)


def test_a_large_model_is_fine_tuned_with_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    for options in (SFTOptions(), RewardOptions()):
        assert rank_for(lmgym.load("tiny"), options.lora_rank) == 0
    lm = lmgym.load("probe")
    monkeypatch.setattr(options_module, "WHOLE", lm.model.num_parameters())
    assert [rank_for(lm, rank) for rank in (None, 0, 4)] == [0, 0, 4]
    monkeypatch.setattr(options_module, "WHOLE", lm.model.num_parameters() - 1)
    assert [rank_for(lm, rank) for rank in (None, 0, 4)] == [16, 0, 4]


def test_free_memory_is_the_least_of_what_the_system_and_the_container_have(tmp_path: Path) -> None:
    assert free_memory(CPU, tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:  9000 kB\nMemFree:  10 kB\nMemAvailable:   5000 kB\n")
    assert free_memory(CPU, tmp_path) == 5000 * 1024
    group = tmp_path / "sys/fs/cgroup"
    (group / "memory").mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("100\n")
    assert free_memory(CPU, tmp_path) == 5000 * 1024, "no limit"
    (group / "memory.max").write_text("5000000\n")
    (group / "memory.current").write_text("4000000\n")
    (group / "memory.stat").write_text("anon 3000000\nactive_file 100\ninactive_file 500000\n")
    assert free_memory(CPU, tmp_path) == 1_500_000, "pages of files can be dropped"
    (group / "memory/memory.limit_in_bytes").write_text("1000\n")
    (group / "memory/memory.usage_in_bytes").write_text("2000\n")
    assert free_memory(CPU, tmp_path) == 0
    assert free_memory(torch.device("meta"), tmp_path) is None
    here = free_memory(CPU)
    assert here is None or here > 2**20


# Progress inside an update -------------------------------------------------------------------------------------------


def test_an_update_reports_its_rollout_its_reference_and_its_epochs() -> None:
    policy, env = made(lmgym.load("probe"), rows=8, long_prompts="error")
    learner = Learner(policy.parameters(), LearnerConfig(micro_tokens=20))
    found: list[tuple[str, int, int, int]] = []
    with listen(lambda *report: found.append(report)):
        list(ppo.train(policy, env, learner, ppo.Config(updates=1, epochs=2, minibatch_rows=4)))
    count = len(found)
    report_progress("rollout", 1, 1, 1)
    assert len(found) == count, "nobody listens any more"
    names = [name for i, (name, *_) in enumerate(found) if not i or found[i - 1][0] != name]
    assert names == ["rollout", "reference", "epoch"]
    last = {name: (done, total) for name, done, total, _ in found}
    assert last == {"rollout": (12, 12), "reference": (8, 8), "epoch": (8, 8)}
    epochs = [done for name, done, _, _ in found if name == "epoch"]
    assert epochs.count(8) == 2, "two epochs"
    rollout = [tokens for name, _, _, tokens in found if name == "rollout"]
    assert rollout == sorted(rollout)
    assert rollout[0] == 8
    assert [done for name, done, _, _ in found if name == "rollout"][:2] == [1, 2]


def test_a_log_file_says_now_and_then_how_far_a_slow_update_is(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress_module.time, "perf_counter", lambda: clock[0])
    said: list[str] = []
    with show_progress(Console(file=io.StringIO()), said.append, "ppo", 3, 0) as advance:
        for step in range(1, 49):
            clock[0] += 1.0
            report_progress("rollout", step, 48, 64 * step)
        for rows in (32, 64):
            clock[0] += 4.0
            report_progress("epoch", rows, 64, 100 * rows)
        assert said == ["ppo 1/3  rollout 31/48, 64 tokens/s"]
        clock[0] += 30.0
        report_progress("epoch", 32, 64, 3200)
        assert said[1:] == ["ppo 1/3  epoch 32/64, 107 tokens/s"], "a new epoch began when the last one ended"
        advance("score 1")
    assert said[2:] == ["ppo 1/3  score 1"]


def test_a_terminal_shows_a_bar_of_the_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress_module.time, "perf_counter", lambda: clock[0])
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with show_progress(console, lambda text: None, "ppo", 3, 0) as advance:
        bars = advance.__self__.progress  # pyright: ignore[reportFunctionMemberAccess]

        def shown() -> list[str]:
            return [task.description.strip() for task in bars.tasks]

        report_progress("rollout", 1, 48, 64)
        assert shown() == ["ppo"], "too fast to be worth a bar"
        clock[0] = 10.0
        report_progress("rollout", 24, 48, 1536)
        assert shown() == ["ppo", "rollout"]
        assert bars.tasks[1].fields["speed"] == "154 tokens/s"
        report_progress("rollout", 48, 48, 3072)
        assert shown() == ["ppo"]
        clock[0] = 20.0
        report_progress("epoch", 32, 64, 4096)
        assert shown() == ["ppo", "epoch"]
        advance("score 1")
        assert shown() == ["ppo"]
        assert bars.tasks[0].completed == 1


def test_long_texts_are_scored_in_more_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, rows = lmgym.load("tiny"), list[int]()
    model = RewardModel.from_language_model(lm, rank=0)
    texts, forward = ["count 5:" + " 6" * n for n in range(12)], model.forward

    def watched(ids: Tensor, mask: Tensor) -> Tensor:
        rows.append(len(ids))
        return forward(ids, mask)

    monkeypatch.setattr(model, "forward", watched)
    whole = model.score_texts(texts)
    monkeypatch.setattr("lmgym.reward.model.PASS_TOKENS", 40)
    torch.testing.assert_close(model.score_texts(texts), whole)
    assert rows[0] == 12
    assert max(rows[1:]) * 4 < 40
    assert sum(rows[1:]) == 12


def test_lengths_of_comparisons_are_counted_in_tokens() -> None:
    lm = lmgym.load("tiny")
    model = RewardModel.from_language_model(lm, rank=0)
    texts = ["count 5:", " 6 and more words"]
    assert model.count_tokens(texts) == sum(len(lm.text.encode(text)) + 1 for text in texts), "and their ends"


@pytest.mark.gpu
def test_on_a_gpu_the_passes_follow_from_its_memory() -> None:
    device = torch.device("cuda")
    free = free_memory(device)
    assert free is not None
    assert 0 < free <= torch.cuda.get_device_properties(device).total_memory
    lm = lmgym.load("tiny", device="cuda", dtype="bfloat16")
    lm.adapters.add("policy")
    policy, env = made(lm)
    found = []
    for on in (False, True):
        learner = Learner(policy.parameters(), LearnerConfig(lr=0.0, gradient_checkpointing=on))
        found.append(next(ppo.train(policy, env, learner, ppo.Config(updates=1)))["optimizer/grad_norm"])
        assert learner.micro_batches.pass_tokens > 4096
    assert found[0] == pytest.approx(found[1], rel=1e-2)

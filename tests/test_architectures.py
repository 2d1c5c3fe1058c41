"""Every architecture trains and gives what plain transformers gives, or is refused in words before anything is trained.

Each family of families.py goes the whole way: a folder is loaded, a padded rollout is compared row by row with plain
transformers without padding, PPO and DPO take a step, plain peft loads the adapter, and so for a reward model. Six
families are among the default tests; `pytest -m slow` runs all.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, make_model
from peft import PeftModel
from torch import Tensor, nn

import lmgym
from agents import dpo, ppo, reward_modelling
from agents.learner import Learner, LearnerConfig
from lmgym import LanguageModel, Policy, RewardModel, RolloutBuffer, Stream, TokenVectorEnv, collect
from lmgym.models import Sequences
from lmgym.preferences import Comparison
from lmgym.rollout import decode
from lmgym.tasks.probe import Tree

DEFAULT = ("gemma3", "lfm2", "mamba", "opt (projected)", "bart", "bert")
"""Text and vision, a hybrid, no attention, a narrow head, padding counted as positions, and one that is refused."""
COMPARISONS = [Comparison("ab", ("cd", "d")), Comparison("c", ("a", "bbb"))]
TEXTS = ["ab", "dcba", "c", "abcdabcd"]

sweep = pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in DEFAULT else [pytest.mark.slow]) for name in FAMILIES]
)


@pytest.fixture
def folder(family: str, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    make_model(family).save_pretrained(folder)
    lmgym.load("probe").tokenizer.save_pretrained(folder)
    return folder


def plain_model(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def plain_logits(model: Any, ids: list[int]) -> Tensor:
    """[L, V] by the model alone: one row, no padding; a cache is made anew, if at all."""
    return model(input_ids=torch.tensor([ids])).logits[0].float()


def is_causal(model: Any) -> bool:
    """By plain transformers: whether the logits of two tokens stay as they are when the tokens after them change."""
    one, other = (plain_logits(model, [2, 5, *rest])[:2] for rest in ([3, 4, 2], [4, 2, 5]))
    return bool(torch.allclose(one, other, atol=1e-5))


def has_scores(folder: Path) -> bool:
    """By plain transformers: whether there is a model of this architecture that scores, and sees the end of a text."""
    try:
        model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
        with torch.no_grad():
            one, other = (float(model(input_ids=torch.tensor([[2, 3, last]])).logits[0, 0]) for last in (4, 5))
    except Exception:  # whatever it is, it is the library's own
        return False
    return one != other


def perturb(parameters: list[nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore:.*_pattern keys:RuntimeWarning")
@sweep
def test_a_family_goes_the_whole_way(family: str, folder: Path, tmp_path: Path) -> None:
    plain = plain_model(folder)
    if not is_causal(plain):
        with pytest.raises(ValueError, match=r"is not causal: the logits of a token change with the tokens after it"):
            lmgym.load(str(folder))
        assert documented()[family] == ("refused: not causal", False)
        return
    lm = lmgym.load(str(folder))
    assert documented()[family][0] == way_of(lm)
    lm.adapters.add("policy", rank=4)
    perturb(lm.adapters.parameters("policy"))
    policy = Policy(lm)
    env = TokenVectorEnv(8, task=Tree(), model=lm, kl="sampled", beta=0.1, max_prompt_tokens=4, max_new_tokens=6)
    prompts = ["a", "bcd", "dd", "cabd", "b", "ca", "aaa", "dcba"]
    buffer = collect(policy, env, RolloutBuffer.like(env), Stream(0, 0), prompts)
    assert not bool(buffer.prompt_mask.all()), "some prompts must be shorter than others"

    # The rollout, against plain transformers and peft.
    lm.adapters.save(tmp_path / "first", "policy")
    tuned = PeftModel.from_pretrained(plain_model(folder), str(tmp_path / "first")).eval()
    sequences = env.sequences()
    for row in range(8):
        prompt = buffer.prompt_ids[row][buffer.prompt_mask[row]].tolist()
        chosen = buffer.tokens[row][buffer.is_action[row]].tolist()
        allowed = env.action_mask_table[: len(chosen)]
        for model, logp in ((tuned, buffer.logp), (plain, buffer.reference_logp)):
            logits = plain_logits(model, prompt + chosen)[len(prompt) - 1 : -1].masked_fill(~allowed, -torch.inf)
            expected = logits.log_softmax(-1).gather(1, torch.tensor(chosen)[:, None])[:, 0]
            torch.testing.assert_close(logp[row, : len(chosen)], expected, atol=1e-4, rtol=0)
    refilled = collect(policy, env, RolloutBuffer.like(env), Stream(0, 0), prompts, slots=3)
    assert torch.equal(refilled.tokens, buffer.tokens)
    torch.testing.assert_close(refilled.logp, buffer.logp, atol=2e-5, rtol=1e-5)
    stepped = TokenVectorEnv(8, task=Tree(), model=lm, beta=0.1, max_prompt_tokens=4, max_new_tokens=6)
    stepped.reset(seed=0, options={"prompt": prompts})
    for t in range(6):  # rows that have ended start anew beside the others
        running = buffer.is_action[:, t]
        info = stepped.step(buffer.tokens[:, t].where(running, 2))[4]
        found, expected = info["reference_logp"][running], buffer.reference_logp[running, t]
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    again = policy.evaluate(sequences).logp
    torch.testing.assert_close(again, buffer.logp, atol=2e-5, rtol=1e-5)
    lm.model.train()
    assert torch.equal(policy.evaluate(sequences).logp, again), "model.train() must change nothing"
    lm.model.eval()

    # PPO, then DPO; plain peft has the same logits.
    before = [p.clone() for p in lm.adapters.parameters("policy")]
    learner = Learner(policy.parameters(), LearnerConfig(lr=1e-2, warmup=0.0))
    (row,) = ppo.train(policy, env, learner, ppo.Config(updates=1, minibatch_rows=4, epochs=1))
    assert all(torch.isfinite(torch.tensor(value)) for value in row.values())
    _ = list(dpo.train(policy, env, learner, dpo.Config(), COMPARISONS))
    changed = [not torch.equal(p, old) for p, old in zip(lm.adapters.parameters("policy"), before, strict=True)]
    assert all(changed), f"{changed.count(False)} of {len(changed)} weights of the adapter did not change"
    policy.save(tmp_path / "second")
    tuned = PeftModel.from_pretrained(plain_model(folder), str(tmp_path / "second")).eval()
    logits, hidden = lm.evaluate(one_row([2, 5], [3, 4, 2, 2]), "policy")
    torch.testing.assert_close(logits[0], plain_logits(tuned, [2, 5, 3, 4, 2])[1:], atol=1e-4, rtol=0)
    assert hidden.shape[-1] == lm.hidden_size == policy.value_head.in_features


def one_row(prompt: list[int], tokens: list[int]) -> Sequences:
    ids, chosen = torch.tensor([prompt]), torch.tensor([tokens])
    whole = torch.ones_like(ids, dtype=torch.bool)
    allowed = torch.ones(len(tokens), 12, dtype=torch.bool)
    return Sequences(ids, whole, chosen, torch.ones_like(chosen, dtype=torch.bool), allowed)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore:.*_pattern keys:RuntimeWarning")
@sweep
def test_a_reward_model_of_a_family(family: str, folder: Path, tmp_path: Path) -> None:
    decoding, scores = documented()[family]
    if decoding.startswith("refused"):
        pytest.skip("the family is refused, see the other test")
    lm = lmgym.load(str(folder))
    if not has_scores(folder):
        with pytest.raises(ValueError, match="no reward model can be made of"):
            RewardModel.from_language_model(lm)
        assert not scores
        return
    assert scores
    model = RewardModel.from_language_model(lm, rank=2)
    learner = Learner(model.parameters(), LearnerConfig(lr=1e-2, warmup=0.0))
    _ = list(reward_modelling.train(model, COMPARISONS, COMPARISONS, learner, reward_modelling.Config()))
    together = model.score_texts(TEXTS)
    model.save(tmp_path / "reward")
    plain: Any = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "reward")
    with torch.no_grad():
        alone = [plain(input_ids=torch.tensor([tokenizer(text)["input_ids"] + [1]])).logits[0, 0] for text in TEXTS]
    assert float(together.std()) > 0
    torch.testing.assert_close(together, torch.stack(alone).float(), atol=1e-4, rtol=0)


# The table in the documentation ------------------------------------------------------------------------------------

TABLE = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"


def documented() -> dict[str, tuple[str, bool]]:
    """What the documentation says of each family: how it decodes, and whether it can be a reward model."""
    lines = TABLE.read_text(encoding="utf-8").partition("| --- | --- |\n")[2].splitlines()
    rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    return {name: (decoding, reward == "yes") for _, name, decoding, reward, _ in rows}


def way_of(lm: LanguageModel) -> str:
    path = lm.path()
    return "fused" if path == "fused" else "no cache" if "without a cache" in path else "cache"


def test_rows_do_not_restart_where_a_model_counts_columns() -> None:
    """RoFormer takes no positions: a row that starts at the right edge of a cache would be far from its own prompt."""
    lm = LanguageModel(make_model("roformer"), lmgym.load("probe").tokenizer)
    env = TokenVectorEnv(8, task=Tree(), model=lm, kl="none", max_prompt_tokens=4, max_new_tokens=6)
    prompts = ["a", "bcd", "dd", "cabd", "b", "ca", "aaa", "dcba"]
    policy = Policy(lm, None, critic="none")
    found = []
    for slots in (0, 3):
        buffer = RolloutBuffer.like(env)
        decode(policy, env, buffer, Stream(0, 0), prompts, slots=slots)
        found.append((env.tokens.clone(), buffer.logp))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[1][1], found[0][1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["mamba", "lfm2", "gemma2", "bart"])
def test_rounding_is_no_fault(family: str) -> None:
    """A model in bfloat16 decodes in the same way as in float32."""
    model = make_model(family).bfloat16()
    assert way_of(LanguageModel(model, lmgym.load("probe").tokenizer)) == documented()[family][0]


def test_the_table_has_every_family() -> None:
    assert list(documented()) == list(FAMILIES)
    trained = {name.partition(" ")[0] for name, (way, _) in documented().items() if not way.startswith("refused")}
    assert len(FAMILIES) >= 40
    assert len(trained) >= 34

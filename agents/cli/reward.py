"""`lmgym reward`: a reward model from comparisons."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from agents.cli.folder import open_run, recorded, with_recorded_options
from agents.cli.names import as_conversations, comparisons_in, model_named, require_template
from agents.cli.options import parse
from agents.pipeline import RewardOptions, split_comparisons, train_reward_model
from agents.reward_modelling import normalise
from lmgym.preferences import Comparison, LabelStore, comparisons_of
from lmgym.reward import read_text


@dataclass(frozen=True)
class Reward:
    """Train a reward model from comparisons."""

    preferences: str | None = None
    """Comparisons: a file, a saved data set or a name on the hub, as --prompts of `lmgym train`. Rows have prompt,
    chosen and rejected, or another common form (docs/data.md)."""
    labels: str | None = None
    """File of labels by people (`lmgym label`), instead of --preferences. Its held-out prompts are not trained on."""
    ties: Literal["drop", "half"] = "drop"
    """Leave ties out ("drop"), or train on them with the target ½ ("half")."""
    test_preferences: str | None = None
    """Held-out comparisons. By default, a tenth of --preferences, drawn at random."""
    fields: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(name="field")] = ()
    """OLD=NEW reads the field OLD of your data as NEW: --field question=prompt. May be repeated."""
    model: str = "tiny"
    """Language model to start from: "tiny", a folder, or a name on the Hugging Face hub."""
    pad_token: str | None = None
    """Replaces the padding token of the tokenizer."""
    chat: bool = False
    """Read each text prompt as a user's message, by the model's chat template: for a reward model of `lmgym train
    --chat`. Comparisons of conversations always use it."""
    system: str | None = None
    """Instruction that comes first in every conversation, as in `lmgym train`; implies --chat."""
    chat_template: str | None = None
    """Jinja file with a chat template for comparisons of conversations, instead of the tokenizer's own."""
    template_options: str = ""
    """Values of the chat template's variables, as JSON."""
    out: str = "runs/reward"
    """Folder of the run, as in `lmgym train`. The model is saved in its folder `reward_model`."""
    seed: int = 0
    """Seed of all random numbers."""
    device: str = "auto"
    """"cpu", "cuda", or "auto", which uses CUDA if there is a GPU."""
    threads: int = 0
    """CPU threads of torch, as in `lmgym train`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights."""
    options: Annotated[RewardOptions, tyro.conf.arg(name="")] = field(default_factory=RewardOptions)


def _comparisons(wanted: Reward) -> tuple[list[Comparison], list[Comparison] | None]:
    """The comparisons to train on, and held-out ones if they are given apart.

    Raises:
        ValueError: no source is given, or two.
    """
    if (wanted.preferences is None) == (wanted.labels is None):
        raise ValueError("give comparisons: either --preferences FILE or --labels DB")
    if wanted.labels is None:
        return comparisons_in(wanted.preferences or "", wanted.test_preferences, wanted.fields, wanted.ties)
    if wanted.test_preferences or wanted.fields:
        raise ValueError("--labels has held-out labels and names of its own: leave out --test-preferences and --field")
    with LabelStore(wanted.labels) as store:
        train, held_out = (comparisons_of(store, split, wanted.ties) for split in ("train", "test"))
    if not train:
        raise ValueError(f"{wanted.labels}: no labels to train on yet: answer some questions of `lmgym label`")
    return train, held_out or None


def run(argv: Sequence[str]) -> int:
    """Trains a reward model, normalises its scores, and saves it."""
    argv = with_recorded_options("reward", Reward.out, argv)
    wanted = parse("reward", recorded(Reward), argv)
    comparisons, held_out = _comparisons(wanted)
    if held_out is None:
        comparisons, held_out = split_comparisons(comparisons, wanted.seed)
    lm = model_named(wanted.model, wanted)
    if wanted.chat or wanted.system is not None:
        require_template(lm)
        comparisons, held_out = (as_conversations(found, wanted.system) for found in (comparisons, held_out))
    with open_run("reward", wanted, argv) as run:
        model, _ = train_reward_model(lm, wanted.options, wanted.seed, run, "stop", comparisons, held_out)
        texts = [read_text(c.as_prompt, text) for c in comparisons for text in c.ranked]
        normalise(model, texts[: wanted.options.normalise_on])
        run.write_folder("reward_model", model.save)
        run.complete()
        run.say(f"reward model: {run.path('reward_model')}")
    return 0

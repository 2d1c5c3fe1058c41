"""The mutation gate: plants bugs, one line each, in a copy of the source, and asks whether a default test sees them.

    make mutants                                  # all of them; exit status 1 if one survives
    python tests/mutants.py --only dropout-on     # one, or several
    python tests/mutants.py --write               # and writes the table into docs/correctness.md

A mutant that survives is a missing test. Write one that states the property that the bug breaks, and never one that
pins the line. A bug that shows as a crash proves nothing about the tests, and counts as a survivor.
"""

import argparse
import ast
import multiprocessing
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "correctness.md"
BEGIN, END = "<!-- begin: written by `make mutants` -->", "<!-- end: written by `make mutants` -->"
COPIED = ("lmgym", "agents", "tests", "examples", "benchmarks", "docs")
COPIED_FILES = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "constraints.txt",
    "pyproject.toml",
)
# It compares the table below with the source, and so would see any change at all.
NOT_A_JUDGE = "tests/test_correctness.py"


@dataclass(frozen=True)
class Mutant:
    """A planted bug.

    Attributes:
        name: what `--only` calls it.
        file: where, from the root of the repository: a file, or a folder in which one file holds the line.
        old: a part of one line, which occurs once there.
        new: what stands there instead.
        bug: what that does, in a few words.
        tests: arguments of pytest, tried in order until a test fails: "file::test file::test", or "file -k expression".
    """

    name: str
    file: str
    old: str
    new: str
    bug: str
    tests: tuple[str, ...]


PREFERENCES = "lmgym/preferences"
FUNCTIONAL, POLICY, MODELS = "agents/functional.py", "lmgym/policy.py", "lmgym/models"
ENV, ROLLOUT, LEARNER = "lmgym/env", "lmgym/rollout", "agents/learner.py"
MASTER_WEIGHTS, OWN_ROWS = "agents/training/master_weights.py", "lmgym/rollout/own_rows.py"
RANKS = "tests/test_ranks.py"
BULK_SCORE = "rewards.scatter_add_(1, self.length[:, None] - 1, (paid.score * terminated)[:, None])"
BULK_KL = "logp, reference_logp).masked_fill(~is_action, 0.0)"
STEPPING = "tests/test_env.py::test_stepping_equals_bulk_equals_plain_python"
BUFFER = "tests/test_rollout.py::test_what_a_buffer_holds"
TRUNK, HEAD = "lmgym/fused", "lmgym/fused"
TWIN = "tests/test_fast.py::test_values_and_gradients_are_those_of_transformers"
AGREE = "tests/test_models.py::test_sampling_and_scoring_agree"
GRAMMAR = "tests/test_action_masks.py::test_a_rollout_is_scored_under_the_grammar"
GOES_ON = "tests/test_survival.py::test_a_learner_goes_on_in_another_process_as_it_were"

STUDIES_TEST = "tests/test_studies.py::"
ENSEMBLE_TEST = "tests/test_ensemble.py::"
MEASURES_TEST = "tests/test_experiments_measures.py::"
EXTRAPOLATION_TEST = "tests/test_extrapolation.py::"
PLAN_TEST = "tests/test_plan.py::"

MUTANTS = (
    # Lessons ----------------------------------------------------------------------------------------------------------
    Mutant("exercise-any-number", "agents/lessons/exercise.py", "torch.allclose(value, right, tolerance, tolerance)",
           "bool(torch.isfinite(value).all())", "the grader accepts any finite number",
           ("tests/test_lessons.py -k 'wrong_answers and (2.1 or 5.3)'",)),
    Mutant("exercise-mistake-unnamed", "agents/lessons/exercise.py", 'raise Wrong(f"{message}. {shown}")',
           "raise Wrong(shown)", "the grader does not say which mistake it was",
           ("tests/test_lessons.py -k 'wrong_answers and (2.1 or 5.3)'",)),
    Mutant("play-beta", "agents/lessons/play.py", "(value - self._values[self.path]) / self.beta",
           "(value - self._values[self.path])", "the best policy that a player is shown ignores β",
           ("tests/test_play.py -k values",)),
    Mutant("play-free", "agents/lessons/play.py", "TokenAction(torch.tensor([token]), torch.zeros(1))",
           "TokenAction(torch.tensor([token]), self.log_probs()[[token]])", "a player pays no KL",
           ("tests/test_play.py -k price",)),
    Mutant("step-not-restored", "agents/pipeline/replay.py", "    if first:", "    if False:",
           "an update is made again from the beginning of RL, and not from the checkpoint",
           ("tests/test_step.py -k next",)),
    Mutant("step-push-sign", "agents/pipeline/replay.py", "(noted.push, -gradient)", "(noted.push, gradient)",
           "the walk through an update shows the push of each token with the wrong sign",
           ("tests/test_step.py -k push",)),
    Mutant("step-rows-mixed", "agents/pipeline/replay.py", "self._part = self._minibatch[rows]", "self._part = rows",
           "the walk through an update shows the ratios of another row", ("tests/test_step.py -k push",)),
    Mutant("step-before-last", "agents/pipeline/replay.py", "notes.after[rows, :steps] = torch.where(part.mask, logp",
           "notes.after[rows, :steps] = torch.where(part.mask, part.logp",
           "the new probabilities are those before the update", ("tests/test_step.py -k new_prob",)),
    Mutant("step-other-row", "agents/pipeline/replay.py", "start = rows[-1] + 1", "rows[-1] = len(rows) - 1",
           "a walk through rows that were chosen for the steps names others",
           ("tests/test_step.py -k 'other_algorithms and expert'",)),
    Mutant("step-score-column", "agents/lessons/walk.py", "_numbers(rollout.rewards[row] + beta * kl)",
           "_numbers(rollout.rewards[row])", "the walk through an update shows the whole reward as the score",
           ("tests/test_step.py -k tables",)),
    Mutant("step-always-equal", "agents/lessons/walk.py", "rel_tol=1e-6, abs_tol=1e-9", "rel_tol=1e6, abs_tol=1e6",
           "any update is said to be the one that the run made", ("tests/test_step.py -k tables",)),
    Mutant("notebook-never-starts", "docs/lessons/make.py", '"main();"', '"main;"',
           "the notebook of an example never runs it",
           ("tests/test_notebooks.py::test_an_example_has_all_its_code_in_order",)),
    Mutant("notebook-other-source", "docs/lessons/make.py", "{str(Path(source).resolve())!r}", "'lmgym'",
           "a notebook that is to install a wheel installs the published package",
           ("tests/test_notebooks.py::test_another_source_is_written_into_the_first_cell_alone",)),
    # Tuned defaults, presets ------------------------------------------------------------------------------------------
    Mutant("tuned-by-luck", "benchmarks/tuning.py", "SEEDS), scores(lines[name], SEEDS)),",
           "[FIRST, *SEEDS]), scores(lines[name], [FIRST, *SEEDS])),", "the seed that chose a finalist counts for it",
           ("tests/test_tuning.py::test_a_finalist_is_judged_by_other_seeds",)),
    Mutant("preset-over-options", "agents/cli/train.py", "if option_value(argv, option) is None]", "]",
           "a preset overrides the user's own options",
           ("tests/test_plugins.py::test_a_preset_gives_settings_that_options_override",)),
    Mutant("factor-of-a-rate-lost", "agents/benchmark/agents.py", "lr * factor", "lr",
           "an agent's factor of the learning rate does nothing",
           ("tests/test_benchmark.py::test_the_factor_of_a_rows_learning_rate",)),
    # Ensembles, queries, measures and studies -------------------------------------------------------------------------
    Mutant("bootstrap-shared", "agents/reward_modelling.py", "np.random.SeedSequence((seed, 3, member))",
           "np.random.SeedSequence((seed, 3))", "the members of an ensemble see the same comparisons",
           (ENSEMBLE_TEST + "test_each_member_learns_as_it_would_alone_from_its_own_draw",)),
    Mutant("ensemble-not-normalised", "agents/reward_modelling.py", "            normalise(member, texts, finished)",
           "            normalise(model.members[0], texts, finished)", "one member of an ensemble outweighs the others",
           (ENSEMBLE_TEST + "test_every_member_is_normalised",)),
    Mutant("ensemble-copies-its-trunk", "lmgym/reward/ensemble.py", "parameter.data = own.data", "pass",
           "every member of an ensemble holds a trunk of its own",
           (ENSEMBLE_TEST + "test_members_with_adapters_share_one_trunk_and_differ_otherwise",)),
    Mutant("queries-by-score", "lmgym/preferences/queries.py",
           "return scores[..., first] - scores[..., second]", "return scores[..., first]",
           "queries are chosen by one text of the pair", (ENSEMBLE_TEST + "test_the_value_of_a_query_by_hand",)),
    Mutant("queries-not-used", "agents/pipeline/stages.py", "return [first + index for index in chosen]",
           "return list(range(first, first + wanted))", "the queries that were chosen are not asked",
           (ENSEMBLE_TEST + "test_the_pipeline_asks_about_what_its_reward_models_choose",)),
    Mutant("noise-model-off", FUNCTIONAL, "    if not error_rate:", "    if True:",
           "the likelihood forgets that labels may be wrong",
           ("tests/test_functional.py::test_the_likelihood_of_a_label_that_may_be_wrong",)),
    Mutant("choice-of-the-last", FUNCTIONAL, "return -scores.log_softmax(0)[0]", "return -scores.log_softmax(0)[-1]",
           "the loss of a choice prefers the last text",
           ("tests/test_functional.py::test_the_loss_of_a_choice_is_a_cross_entropy",)),
    Mutant("length-controlled-backwards", "agents/experiments/win_rates.py", "ratio = np.log(own / other)",
           "ratio = np.log(own * other)", "a win rate is controlled for the wrong side's length",
           (MEASURES_TEST + "test_a_win_rate_at_equal_lengths_is_the_maximum_of_the_likelihood",)),
    Mutant("self-bleu-sees-itself", "agents/evaluate.py", "most[gram][times < most[gram][1]]", "most[gram][1]",
           "self-BLEU compares a text with itself", (MEASURES_TEST + "test_self_bleu_is_its_definition",)),
    Mutant("probe-unpaired", "agents/experiments/bias_probes.py", "pairs = found[0].mean(1) - found[1].mean(1)",
           "pairs = found[0].mean(1) - found[1].mean(1)[::-1]", "a bias probe compares different templates",
           (MEASURES_TEST + "test_a_probe_is_a_paired_t_test_over_templates",)),
    Mutant("band-of-the-mean", "agents/experiments/extrapolation.py", "(1 + 1 / len(x) +", "(1 / len(x) +",
           "the band of a trial run forgets the noise of the full run",
           (MEASURES_TEST + "test_an_extrapolation_is_least_squares_with_the_textbook_interval",)),
    Mutant("band-of-one-form", "agents/experiments/extrapolation.py", "(_odds, _order, _exponential)", "(_odds,)",
           "the band of an accuracy trusts one form of the learning curve",
           (EXTRAPOLATION_TEST + "test_the_band_is_that_of_an_integral_on_a_grid",)),
    Mutant("band-without-the-test", "agents/experiments/extrapolation.py",
           "return np.log(prior) + log_weight, expected, variance_of(expected, kappa[..., 0], at)",
           "return np.log(prior) + log_weight, expected, 1e-9 * variance_of(expected, kappa[..., 0], at)",
           "the band of an accuracy forgets that the full run is measured on few pairs",
           (EXTRAPOLATION_TEST + "test_the_band_is_that_of_an_integral_on_a_grid",)),
    Mutant("verdict-by-the-mean", "agents/studies/form.py",
           'if claim.kind == "contains" or (claim.low <= low and high <= claim.high):',
           'if claim.kind == "contains" or claim.holds_for(estimate.value):',
           "a verdict of a study ignores its interval", (STUDIES_TEST + "test_a_verdict_follows_from_the_values",)),
    Mutant("page-drops-a-claim", "agents/studies/page.py", "lines += [_table_row(verdict) for verdict in verdicts]",
           "lines += [_table_row(verdict) for verdict in verdicts[1:]]", "a study's page leaves out a claim",
           (STUDIES_TEST + "test_a_page_is_written_from_the_results",)),
    Mutant("study-shows-gold", "agents/studies/gao.py", "return group @ fit(better @ group, worse @ group)",
           "return world.worth", "a study's proxy is the gold score itself",
           (STUDIES_TEST + "test_gao_learns_its_proxy_from_labels",)),
    Mutant("study-online-stays-offline", "agents/studies/token_world.py",
           "policy = learned if online else world.reference", "policy = world.reference",
           "a study's online comparisons are of the reference's texts",
           (STUDIES_TEST + "test_rounds_of_comparisons_use_every_label",)),
    Mutant("study-noise-not-told", "agents/studies/christiano.py", "found, true = fit(better, worse, told, l2=0.0)",
           "found, true = fit(better, worse, 0.0, l2=0.0)", "a study's likelihood is not told the rate of wrong labels",
           (STUDIES_TEST + "test_christiano_tells_the_likelihood_the_rate_of_wrong_labels",)),
    Mutant("study-halves-are-one", "agents/studies/bai.py",
           "train, test = (learned(world, rng, config.half) for _ in range(2))",
           "train = test = learned(world, rng, config.half)", "a study's train half and test half are the same",
           (STUDIES_TEST + "test_bai_has_two_halves",)),
    Mutant("study-bias-not-planted", "agents/studies/limits.py", "return gold(text) + config.bias *",
           "return gold(text) + 0.0 * config.bias *", "a study's biased annotator is fair",
           (STUDIES_TEST + "test_limits_finds_the_planted_bias",)),
    Mutant("study-ptx-weight-lost", "agents/studies/ouyang.py", "ptx_coef=weight)", "ptx_coef=0.0)",
           "a study's PPO-ptx has no pretraining loss", (STUDIES_TEST + "test_ouyang_ptx_holds_the_pretraining_loss",)),
    Mutant("study-kl-target-lost", "agents/studies/ziegler.py", "kl_target_nats=target,", "kl_target_nats=0.0,",
           "a study's controller has no target", (STUDIES_TEST + "test_ziegler_steers_towards_its_target",)),
    Mutant("study-length-not-counted", "agents/studies/stiennon.py",
           "design = np.stack([np.ones_like(scores), world.gold(gold), world.gold(len)], 1)",
           "design = np.stack([np.ones_like(scores), world.gold(gold), world.gold(gold)], 1)",
           "a study measures gold where it says length",
           (STUDIES_TEST + "test_stiennon_controls_for_length_and_sees_a_bias_for_it",)),
    Mutant("study-tokens-not-equal", "agents/studies/deepseek_r1.py",
           'for row in curve if row["tokens"] <= tokens][-1]', "for row in curve][-1]",
           "a study compares RL and distillation at different numbers of tokens",
           (STUDIES_TEST + "test_deepseek_compares_at_equal_tokens_and_replaces_its_reference",)),
    Mutant("study-teacher-never-errs", "agents/studies/nvidia.py",
           "if text[0] == REPORT and rng.random() < error_rate:", "if text[0] == REPORT and rng.random() < 0.0:",
           "a study's noisy labels have no errors",
           (STUDIES_TEST + "test_nvidia_tunes_the_small_model_on_noisy_labels_of_its_teacher",)),
    Mutant("study-trial-runs-are-full", "agents/studies/trial_runs.py", "size = round(share * config.full)",
           "size = config.full", "a study's trial runs see all data",
           (STUDIES_TEST + "test_trial_runs_see_their_share",)),
    # Masks that depend on the text ------------------------------------------------------------------------------------
    Mutant("text-mask-not-sampled", ROLLOUT, "allowed = env.state.action_mask(rows)", "pass",
           "a mask that depends on the text is ignored in rollouts", (GRAMMAR,)),
    Mutant("text-mask-not-scored", POLICY, "sequences.mask_bits(sampling=self.truncates)",
           "sequences.sampling_mask if self.truncates else None",
           "a mask that depends on the text is forgotten in scoring", (GRAMMAR,)),
    Mutant("text-mask-not-in-reference", MODELS, "part.mask_bits(sampling=False)", "None",
           "a mask that depends on the text is forgotten in the reference", (GRAMMAR,)),
    Mutant("text-mask-stale", ENV, "for row in range(self.rows) if rows is None else rows.tolist():", "for row in ():",
           "a mask that depends on the text stays that of the empty text", (GRAMMAR,)),
    Mutant("text-mask-recorded-late", ENV, "self._chosen_under[new, self.length[new]]",
           "self._chosen_under[new, (self.length[new] + 1).clamp(max=self.max_new_tokens - 1)]",
           "a token is scored under the mask of the token after it", (GRAMMAR,)),
    Mutant("copy-shares-its-state", ENV, "twin.__dict__.update(copy.deepcopy(whole.__dict__, memo))",
           "twin.__dict__.update(whole.__dict__)",
           "a copied environment moves the original",
           ("tests/test_env.py::test_a_copy_in_the_middle_of_an_episode_goes_its_own_way",)),
    # Labels by people -------------------------------------------------------------------------------------------------
    Mutant("labels-by-position", PREFERENCES, 'best = side[choice == "right"]',
           'best = int(choice == "right")',
           "an answer is stored by its side, not by its text",
           ("tests/test_labels.py::test_an_answer_is_in_the_coordinates_of_the_item_whatever_the_side",)),
    Mutant("labels-submitted-twice", PREFERENCES, 'before[0]["answer"], False, item)',
           'before[0]["answer"], True, item)', "a double submit counts as a new answer",
           ("tests/test_labels.py::test_a_second_answer_with_the_same_nonce_changes_nothing",)),
    Mutant("labels-repeat-same-side", PREFERENCES, "key=draws.__getitem__, reverse=repeat)", "key=draws.__getitem__)",
           "a repeated question has the same sides, so that a side bias looks like consistency",
           ("tests/test_labels.py::test_repeats_come_later_with_the_sides_reversed_and_are_not_trained_on",)),
    Mutant("labels-side-of-item", PREFERENCES, 'store.draw("side", number, labeller, text)',
           'store.draw("side", number, text)', "all labellers see the same sides",
           ("tests/test_labels.py::test_sides_follow_from_the_file_s_key_and_not_from_the_item",)),
    Mutant("labels-lease-for-ever", PREFERENCES, '"s.expires_at > ? AND s.shown_at <= ?)"', '"? < ?)"',
           "a question that somebody left stays reserved",
           ("tests/test_labels.py::test_two_tabs_show_the_same_question_and_two_people_never_do",)),
    Mutant("labels-clock-back", PREFERENCES, "return labeller, now, now + FUTURE", "return labeller, now, 1e12",
           "after the clock was set back, questions stay reserved",
           ("tests/test_labels.py::test_a_clock_that_is_set_back_frees_what_was_reserved",)),
    Mutant("labels-repeats-train", PREFERENCES, "if item is None or label.repeat or split", "if item is None or split",
           "repeated questions train a reward model twice",
           ("tests/test_labels.py::test_repeats_come_later_with_the_sides_reversed_and_are_not_trained_on",)),
    Mutant("labels-withdrawn-in-journal", PREFERENCES, 'self.rows("PRAGMA wal_checkpoint(TRUNCATE)")',
           "self.rows('PRAGMA user_version')", "withdrawn answers stay in the journal",
           ("tests/test_labels.py::test_withdrawn_answers_are_gone_from_the_file",)),
    Mutant("labels-skip-counts", PREFERENCES, "\"l.answer != 'skip')\"", '"1)"',
           "a skipped question counts as labelled",
           ("tests/test_labels.py::test_overlap_asks_several_people_and_a_skip_is_no_label",)),
    Mutant("alpha-counts-itself", PREFERENCES, "counts[:, None] - counts[:, :, None] * np.eye(len(values))",
           "counts[:, None]", "α pairs an answer with itself",
           ("tests/test_label_figures.py::test_alpha_is_that_of_the_published_example",)),
    Mutant("error-rate-by-side", PREFERENCES, "honest = 2 * left < len(known)", "honest = 2 * left > len(known)",
           "the error rate counts answers that a side bias gave",
           ("tests/test_label_figures.py::test_the_intervals_recover_error_rate_and_side_bias",)),
    Mutant("propensity-without-share", PREFERENCES, "float(share * mixed[place])", "float(mixed[place])",
           "the stored propensity forgets how the group was chosen",
           ("tests/test_label_figures.py::test_the_stored_propensity_is_the_frequency_of_the_choice",)),
    Mutant("ties-as-preferences", "agents/reward_modelling.py", "if comparison.is_tie else of(scores)",
           "if False else of(scores)",
           "a tie trains the reward model as a preference",
           ("tests/test_label_files.py::test_a_tie_is_trained_on_with_the_target_one_half",)),
    Mutant("label-origin", "agents/labelling/access.py", 'if headers.get("origin") not in',
           'if headers.get("origin") in',
           "the labelling server takes answers from other pages",
           ("tests/test_labelling_page.py::test_what_does_not_come_from_the_page_is_refused",)),
    Mutant("label-csrf", "agents/labelling/app.py", 'if request.method == "POST" and not hmac', "if False and not hmac",
           "the labelling server does not check the page's own token",
           ("tests/test_labelling_page.py::test_what_does_not_come_from_the_page_is_refused",)),
    Mutant("label-acknowledged-early", "lmgym/preferences/database.py", '"PRAGMA synchronous = FULL"',
           '"PRAGMA synchronous = OFF"', "an acknowledged answer need not be on the disk",
           ("tests/test_labels.py::test_what_is_acknowledged_is_flushed",)),
    # Texts and weights as they were given -----------------------------------------------------------------------------
    Mutant("completion-gains-a-space", MODELS, "if whole == decoded[0] + text:", "if True:",
           "the tokenizer puts a space before a completion",
           ("tests/test_sft.py::test_the_tokens_of_a_completion_decode_to_it",)),
    Mutant("text-ends-twice", "lmgym/reward", "added = count_added_ends(tokenizer) if ends_with_eos else 0",
           "added = 0", "a text ends twice for a reward model whose tokenizer adds ends",
           ("tests/test_reward_model.py::test_a_text_ends_once_if_it_has_ended_whatever_the_tokenizer_adds",)),
    Mutant("half-steps-lost", "agents/training/master_weights.py", "parameter.copy_(value)",
           "value.copy_(parameter.copy_(value))", "small steps of weights in half precision are rounded away",
           ("tests/test_learner.py::test_small_steps_of_half_precision_are_not_lost",)),
    # Conversations ----------------------------------------------------------------------------------------------------
    Mutant("chat-smuggling", "lmgym/models/chat.py", "sanitize_control_tokens=True,", "sanitize_control_tokens=False,",
           "a message can contain control tokens",
           ("tests/test_chat.py::test_no_message_can_contain_a_control_token",)),
    Mutant("chat-no-answer-header", "lmgym/models/chat.py",
           "return self._render(messages, add_generation_prompt=True)", "return self._render(messages)",
           "a conversation is read without the beginning of the answer",
           ("tests/test_chat.py::test_ids_are_those_of_the_tokenizers_own_template",)),
    Mutant("chat-end-not-learned", "lmgym/models/chat.py",
           "return (ids, []) if at is None else (ids[:at], ids[at : at + 1])",
           "return (ids, []) if at is None else (ids[: at + 1], ids[at : at + 1])",
           "the end of a turn is learned twice",
           ("tests/test_chat.py::test_an_answer_is_what_the_template_writes_up_to_the_end_of_the_turn",)),
    Mutant("chat-user-learned", "lmgym/models/demonstrations.py", "return [*prompt, *answer][:max_tokens], len(prompt)",
           "return [*prompt, *answer][:max_tokens], 1", "the user's messages are learned",
           ("tests/test_chat.py::test_every_answer_of_a_conversation_is_learned",)),
    Mutant("one-end-only", "lmgym/models/tokenising.py", "return tuple(dict.fromkeys(found))",
           "return tuple(found[:1])", "only the first of a model's ends ends a completion",
           ("tests/test_chat.py::test_every_named_end_ends_a_completion",)),
    Mutant("grouped-by-text", "lmgym/rollout/token_loop.py",
           "return (one.text, one.messages, one.token_ids) == (other.text, other.messages, other.token_ids)",
           "return one.text == other.text", "conversations with the same text are read as one",
           ("tests/test_chat.py::test_a_group_reads_its_own_conversation",)),
    Mutant("chat-plain-comparisons", "agents/cli/names.py",
           "return [Comparison(p.text, c.ranked, p.messages, c.is_tie) for p, c in zip(prompts, comparisons",
           "return [c for _, c in zip(prompts, comparisons", "--chat is forgotten in the comparisons",
           ("tests/test_chat_cli.py::test_comparisons_are_conversations_where_prompts_are",)),
    Mutant("empty-demonstration", "lmgym/tasks/prompt_list.py",
           "return found is not None and bool(str(found).strip())", 'return "demonstration" in prompt.data',
           "empty cells of a table are learned",
           ("tests/test_chat_cli.py::test_fine_tuning_learns_from_the_rows_that_have_an_answer",)),
    Mutant("token-ids-not-given", "lmgym/models/demonstrations.py", "if example.token_ids:", "if not example:",
           "a completion is learned without its prompt of token ids",
           ("tests/test_sft.py::test_a_prompt_of_token_ids_is_given",)),
    # Where the score is paid, and what it is worth --------------------------------------------------------------------
    Mutant("score-on-pad", ENV, BULK_SCORE,
           "rewards.scatter_add_(1, self.length[:, None].clamp(max=self.max_new_tokens - 1), "
           "(paid.score * terminated)[:, None])",
           "score paid on the padding behind the end", (BUFFER,)),
    Mutant("score-on-every-token", ENV, BULK_SCORE, "rewards += is_action * (paid.score * terminated)[:, None]",
           "score paid on every token", (BUFFER,)),
    Mutant("scaled-score-on-pad", ROLLOUT, "last = self.is_action.sum(1, keepdim=True) - 1",
           "last = self.is_action.sum(1, keepdim=True).clamp(max=self.is_action.shape[1] - 1)",
           "scaled score paid on the padding behind the end",
           ("tests/test_algorithms.py::test_what_shapes_the_reward",)),
    Mutant("kl-on-pad", ENV, BULK_KL, "logp, reference_logp)",
           "KL paid on the padding behind the end", (STEPPING,)),
    Mutant("k3-in-reward", "lmgym/reward", "return -beta * (logp - reference_logp)",
           "return -beta * (torch.expm1(reference_logp - logp) + logp - reference_logp)",
           "k3 in the reward instead of k1", ("tests/test_reward.py::test_kl_reward_forms", STEPPING)),
    Mutant("score-paid-when-cut-off", ENV, "return self.finish == Finish.STOP, full",
           "return self.finish != Finish.RUNNING, full",
           "rows that were cut off are scored as if they had ended", (BUFFER,)),
    Mutant("stop-string-missed", ENV, "self.state.end_at_stop_strings(torch.ones_like(self.prompt_mask[:, 0]))", "pass",
           "stop string missed before a later end",
           ("tests/test_env.py::test_pay_rewards_finds_a_stop_string_that_a_later_end_hides",)),
    # Ends -------------------------------------------------------------------------------------------------------------
    Mutant("eos-out-of-mask", ENV, "is_action = steps < self.length[:, None]",
           "is_action = steps < (self.length - (self.finish == Finish.STOP).long()).clamp(min=1)[:, None]",
           "end of sequence masked out of the loss", (BUFFER,)),
    Mutant("eos-not-imitated", "lmgym/models", "(position >= first) & (position < last)",
           "(position >= first) & (position < last - 1)",
           "end of a demonstration masked out of the loss",
           ("tests/test_sft.py::test_the_loss_by_hand_over_padded_rows",)),
    Mutant("bootstrap-of-ended-rows", ROLLOUT, "buffer.bootstrap *= outcome.truncated", "pass",
           "rows that ended are bootstrapped", (BUFFER,)),
    Mutant("bootstrap-one-early", ROLLOUT, 'if not last or env.on_limit == "truncate":', "if not last:",
           "bootstrap read one token early", (BUFFER,)),
    Mutant("reset-keeps-cache", ENV, "scorer.stale[index] = True", "pass",
           "reference of a reset row still reads the old text",
           ("tests/test_env.py::test_reference_follows_rows_through_partial_resets",)),
    # What is sampled is what is scored --------------------------------------------------------------------------------
    Mutant("temperature-not-scored", POLICY,
           "head, mask = self.lm.output_head(self.temperature), self.lm.token_mask(sequences.action_mask)",
           "head, mask = self.lm.output_head(1.0), self.lm.token_mask(sequences.action_mask)",
           "temperature forgotten in scoring", (AGREE,)),
    Mutant("temperature-not-sampled", POLICY, "decoding.masked_logits(self.temperature, action_mask)",
           "decoding.masked_logits(1.0, action_mask)",
           "temperature forgotten in sampling", ("tests/test_policy.py::test_sampling_follows_the_softmax",)),
    Mutant("temperature-not-in-reference", MODELS,
           "self.lm.hidden(part, self.adapter), self.lm.output_head(self.temperature)",
           "self.lm.hidden(part, self.adapter), self.lm.output_head(1.0)",
           "temperature forgotten in the reference", ("tests/test_fast.py::test_the_reference_has_its_temperature",)),
    Mutant("head-packed-once", MODELS, "if self._packed_head is None or self._packed_head[0] != version:",
           "if self._packed_head is None:",
           "a head that changes is not packed anew", ("tests/test_fast.py::test_weights_that_change_are_read_anew",)),
    Mutant("trained-head-packed", MODELS, "if self.head_is_trained:",
           "if False:",
           "a head that is trained stays packed as it was",
           ("tests/test_fast.py::test_a_base_that_was_trained_is_read_anew",)),
    Mutant("trained-base-kept", "lmgym/fused", "self._cached.clear()", "pass",
           "what decoding made of the base before it was trained stays",
           ("tests/test_fast.py::test_a_base_that_was_trained_is_read_anew",)),
    Mutant("packed-without-residual", "lmgym/fused", "rest = residual.flatten(0, -2)",
           "rest = torch.zeros_like(residual.flatten(0, -2))",
           "packed product forgets the residual", ("tests/test_onednn.py::test_a_packed_product_is_a_product",)),
    Mutant("dropout-on", MODELS, "    model.eval()", "    return model.train() and None",
           "dropout left on", ("tests/test_models.py::test_dropout_is_off_for_good",)),
    Mutant("no-position-ids", MODELS,
           'more = {"position_ids": position_ids} if self._takes_position_ids else {}', "more = {}",
           "position ids not given",
           ("tests/test_models.py::test_cached_decoding_and_one_pass_equal_the_plain_model",)),
    Mutant("padding-on-the-right", ENV, "return self.prompt_ids[:, -width:], self.prompt_mask[:, -width:]",
           "ids, mask = self.prompt_ids[:, -width:], self.prompt_mask[:, -width:]; "
           "order = mask.long().argsort(dim=1, descending=True, stable=True); return ids.gather(1, order), "
           "mask.gather(1, order)",
           "prompts padded on the right", (STEPPING,)),
    Mutant("off-by-one", MODELS, "whole = torch.cat([self.prompt_ids, self.tokens[:, :-1]], 1)",
           "whole = torch.cat([self.prompt_ids[:, 1:], self.tokens], 1)",
           "log-probabilities read one token late",
           ("tests/test_models.py::test_cached_decoding_and_one_pass_equal_the_plain_model",)),
    Mutant("mask-not-scored", POLICY, "mask = self._behaviour_mask(sequences, logits)",
           "mask = torch.ones_like(logits, dtype=torch.bool)",
           "action mask forgotten in scoring", (AGREE, TWIN)),
    Mutant("truncation-not-scored", POLICY, "return sequences.behaviour_mask()", "return sequences.action_mask",
           "top-k and top-p sampled but not scored",
           ("tests/test_testing.py::test_a_language_model_keeps_the_contract",)),
    Mutant("top-p-too-few", "lmgym/sampling.py", "kept &= probs.cumsum(-1) - probs < top_p",
           "kept &= (probs.cumsum(-1) < top_p) | (torch.arange(probs.shape[-1]) == 0)",
           "top-p leaves out the token that reaches it", ("tests/test_sampling.py",)),
    Mutant("nlpo-unmasked", "agents/nlpo.py", "collect(masked, env, buffer", "collect(whole, env, buffer",
           "NLPO samples without its mask",
           ("tests/test_learner.py::test_nlpo_chooses_among_the_most_probable_alone",)),
    Mutant("entropy-of-unmasked", POLICY, "entropy = -(probs * logp.masked_fill(~mask, 0.0)).sum(-1)",
           "entropy = torch.distributions.Categorical(logits=logits.float() / self.temperature).entropy()",
           "entropy of the distribution before masking",
           (TWIN,)),
    # Adapters and the reference ---------------------------------------------------------------------------------------
    Mutant("reference-with-adapter", MODELS, "layer._disable_adapters = name is None",
           "layer._disable_adapters = False",
           "reference read with the policy's adapter on",
           ("tests/test_models.py::test_a_fresh_adapter_is_the_base_exactly",)),
    Mutant("wrong-reference", MODELS, "return self.lm.start(input_ids, attention_mask, self.adapter)",
           "return self.lm.start(input_ids, attention_mask, None)",
           "reference reads the prompt with another adapter",
           ("tests/test_env.py::test_the_reference_is_the_adapter_that_it_is_told_to_be",)),
    Mutant("reference-not-refreshed", ENV, "self.reference = replace(self.reference, adapter=adapter)",
           "self.reference = replace(self.reference)",
           "reference stays where it was when it is set anew",
           ("tests/test_algorithms.py::test_after_a_refresh_the_policy_is_its_own_reference_and_goes_on",)),
    Mutant("adapter-frozen-by-another", MODELS, "parameter.requires_grad_(True)", "parameter.requires_grad_(False)",
           "adding an adapter freezes the one that is trained",
           ("tests/test_models.py::test_what_is_trained_still_is_when_an_adapter_is_added",)),
    Mutant("embedding-lora-untrained", MODELS, r"""rf"\.lora_\w+\.{re.escape(name)}(\.|$)")""",
           r"""rf"\.lora_\w+\.{re.escape(name)}\.")""",
           "LoRA on embeddings is not trained",
           ("tests/test_adapter_base.py::test_every_weight_of_an_adapter_is_trained_copied_saved_and_merged",)),
    Mutant("merge-with-tied-head", MODELS, "if head.weight is embedding.weight:", "if False:",
           "merging LoRA on an embedding changes the output head that is tied to it",
           ("tests/test_adapter_base.py::test_a_tied_gpt2_merges_exactly",)),
    Mutant("base-unchecked", MODELS, "or recorded == weights_checksum(model):", "or True:",
           "an adapter is loaded onto other base weights",
           ("tests/test_adapter_base.py::test_an_adapter_on_other_weights_is_refused",)),
    Mutant("base-outdated", MODELS, "return source if weights_checksum(self.model, SAMPLE) == sample else None",
           "return source",
           "an adapter names a base whose weights have changed since",
           ("tests/test_adapter_base.py::test_a_base_that_changed_is_not_named_before_it_is_saved",)),
    Mutant("base-unnamed", "agents/pipeline", 'lm.adapters.stored_in(run.path("sft"))', "pass",
           "a run's adapters do not name the fine-tuned model as their base",
           ("tests/test_saved_runs.py::test_a_run_names_the_base_of_everything_it_saved",)),
    Mutant("wrong-critic", POLICY, 'hidden = self.lm.hidden(sequences, VALUE_ADAPTER)',
           "hidden = self.lm.hidden(sequences, self.adapter)",
           "critic's adapter sampled with but not trained", (AGREE,)),
    # Fast paths -------------------------------------------------------------------------------------------------------
    Mutant("fused-sees-ahead", TRUNK, "is_causal=True", "is_causal=False",
           "fused attention looks at what comes later", (TWIN,)),
    Mutant("fused-scale-of-lora", TRUNK, "up = module.lora_B[adapter].weight * module.scaling[adapter]",
           "up = module.lora_B[adapter].weight * 1.0",
           "LoRA's scale forgotten in the fused pass", (TWIN,)),
    Mutant("merged-scale-of-lora", TRUNK, "weight.float() + module.scaling[adapter] * delta", "weight.float() + delta",
           "LoRA's scale forgotten when it is merged", (AGREE,)),
    Mutant("gradient-of-inner-lora", TRUNK, "(grad @ weight).addmm_(narrow, down)", "(grad @ weight)",
           "gradient does not flow through LoRA to the layers below", (TWIN,)),
    Mutant("fused-mask-forgotten", HEAD, "masked_fill_(never, mask_value(dtype))", "masked_fill_(never, 0.0)",
           "tokens that are never allowed count in the fused probabilities", (TWIN,)),
    Mutant("fused-mask-of-steps", HEAD, "masked_fill(self.mask.forbidden[at], low)", "clone()",
           "tokens that are allowed later count in the fused probabilities", (TWIN,)),
    Mutant("fused-temperature-gradient", HEAD, "sub_(mean).div_(head.temperature)", "sub_(mean)",
           "temperature forgotten in the fused gradient",
           ("tests/test_fast.py::test_a_temperature_is_in_the_gradient",)),
    Mutant("fused-entropy-gradient", HEAD, "mul_(-of_entropy[part, None])", "mul_(of_entropy[part, None])",
           "fused entropy's gradient has the wrong sign", (TWIN,)),
    Mutant("captured-numbers", "lmgym/rollout", "at.add_(1)", "pass",
           "a captured step draws with the random numbers of the first one, again and again",
           ("tests/test_cuda_graph.py::test_what_was_captured_serves_later_rollouts_with_other_weights_and_prompts",)),
    Mutant("captured-weights", "lmgym/models", "own.copy_(new)", "pass",
           "a captured step keeps the weights of the first rollout",
           ("tests/test_cuda_graph.py::test_what_was_captured_serves_later_rollouts_with_other_weights_and_prompts",)),
    Mutant("rows-mixed-up", ROLLOUT, "return token[index]", "return token[: len(index)]",
           "rows that stay read the tokens of others", ("tests/test_fast.py::test_rows_that_leave_change_nothing",)),
    Mutant("not-scored-again", ROLLOUT, "if policy.rescores:", "if False:",
           "bfloat16 trains against the log-probabilities of decoding",
           ("tests/test_fast.py::test_bfloat16_is_near_and_its_ratio_starts_at_one",)),
    Mutant("only-the-last-pass", MASTER_WEIGHTS, "            self._accumulating = True", "            pass",
           "gradients of all passes but the last are lost",
           ("tests/test_fast.py::test_smaller_passes_take_the_same_step",)),
    Mutant("pass-weighed-alone", LEARNER, "_weighted(policy, part, loss, weights[rows, :steps],",
           "_weighted(policy, part, loss, F.token_mean(part.mask),",
           "each pass weighed as if it were the whole minibatch",
           ("tests/test_fast.py::test_smaller_passes_take_the_same_step",)),
    # Random numbers ---------------------------------------------------------------------------------------------------
    Mutant("prompts-not-of-groups", ROLLOUT, "(self.seed, self.update, row // self.samples, 0)",
           "(self.seed, self.update, row % self.samples, 0)",
           "completions of a group get different prompts",
           ("tests/test_rollout.py::test_samples_share_their_prompt_and_nothing_else",)),
    Mutant("groups-share-numbers", ROLLOUT, "row // self.samples, 1 + row % self.samples)",
           "0, 1 + row % self.samples)",
           "all groups are sampled with the same random numbers",
           ("tests/test_rollout.py::test_samples_share_their_prompt_and_nothing_else",)),
    Mutant("same-numbers-again", ROLLOUT, "key = np.random.SeedSequence((self.seed, self.update,",
           "key = np.random.SeedSequence((self.seed, 0,",
           "every update is sampled with the same random numbers",
           ("tests/test_rollout.py::test_streams_are_reproducible_and_differ",)),
    # Returns and advantages -------------------------------------------------------------------------------------------
    Mutant("gae-past-the-end", FUNCTIONAL, "next_values = torch.where(following, next_values, bootstrap[:, None])",
           "pass", "GAE reads values past the end of a row",
           ("tests/test_functional.py::test_gae_of_rows_of_different_length_equals_each_row_alone",)),
    Mutant("gae-across-rows", FUNCTIONAL, "running = deltas[:, t] + gamma * lam * running",
           "running = deltas[:, t] + gamma * lam * running.roll(1)",
           "GAE runs across rows",
           ("tests/test_functional.py::test_gae_of_rows_of_different_length_equals_each_row_alone",)),
    Mutant("whiten-leaves-mean", FUNCTIONAL, "scaled if shift_mean else scaled + mean", "scaled + mean",
           "advantages whitened without mean shift",
           ("tests/test_functional.py::test_whiten_centres_and_scales_what_counts",)),
    Mutant("whiten-shifts-rewards", "agents/ppo.py", "F.whiten(rewards, mask, shift_mean=False)",
           "F.whiten(rewards, mask)",
           "rewards whitened with mean shift", ("tests/test_algorithms.py::test_what_shapes_the_reward",)),
    Mutant("whiten-over-padding", FUNCTIONAL, "mean = masked_mean(x, mask)", "mean = x.mean()",
           "whitening counts padding",
           ("tests/test_functional.py::test_whiten_centres_and_scales_what_counts",)),
    Mutant("leave-one-in", FUNCTIONAL, "* (group / (group - 1))).flatten()", "* 1.0).flatten()",
           "leave-one-out without its factor n/(n − 1)",
           ("tests/test_functional.py::test_leave_one_out_is_the_return_less_the_mean_of_the_others",)),
    Mutant("group-mean-over-wrong-axis", FUNCTIONAL, "centred = grouped - grouped.mean(1, keepdim=True)",
           "centred = grouped - grouped.mean(0, keepdim=True)",
           "group mean over the wrong axis", ("tests/test_functional.py::test_group_relative_by_hand",)),
    Mutant("advantages-not-detached", "agents/a2c.py", "- old.advantages * new.logp -",
           "- (old.returns - new.value) * new.logp -",
           "advantages not detached from the critic",
           ("tests/test_learner.py::test_the_critic_learns_from_its_own_loss_alone",)),
    Mutant("critic-imitates-itself", "agents/ppo.py", "Batch.of(rollout, advantages, returns)",
           "Batch.of(rollout, advantages)",
           "critic's target is its own old value", ("tests/test_ppo.py::test_both_critics_learn",)),
    # Losses -----------------------------------------------------------------------------------------------------------
    Mutant("clip-on-wrong-side", FUNCTIONAL, "gain = torch.minimum(ratio", "gain = torch.maximum(ratio",
           "clip on the wrong side", ("tests/test_functional.py::test_clipped_surrogate_on_both_sides",)),
    Mutant("clip-swapped", FUNCTIONAL, "ratio.clamp(1 - clip, 1 + high)", "ratio.clamp(1 - high, 1 + clip)",
           "clips above and below swapped", ("tests/test_functional.py::test_a_clip_that_is_higher_above",)),
    Mutant("ratio-inverted", FUNCTIONAL, "    ratio = (logp - old_logp).exp()", "    ratio = (old_logp - logp).exp()",
           "probability ratio inverted", ("tests/test_functional.py::test_clipped_surrogate_on_both_sides",)),
    Mutant("ratio-always-one", "agents/ppo.py", "new.logp, old.logp, old.advantages, config.clip, dual",
           "new.logp, new.logp.detach(), old.advantages, config.clip, dual",
           "old log-probabilities taken anew at every step, so that nothing is clipped",
           ("tests/test_learner.py::test_a_rollout_moves_no_action_much_beyond_the_clip",)),
    Mutant("sequence-mean-is-token-mean", FUNCTIONAL,
           "return mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)",
           "return mask / mask.sum().clamp(min=1)",
           "mean over completions is a mean over tokens",
           ("tests/test_functional.py::test_what_an_action_weighs",)),
    Mutant("rloo-length-bias", "agents/rloo.py", "weigh=F.sequence_sum", "weigh=F.sequence_mean",
           "RLOO's loss divided by the completion's length",
           ("tests/test_algorithms.py::test_grpo_without_scaling_is_rloo",)),
    Mutant("value-loss-min", FUNCTIONAL, "return torch.maximum((values", "return torch.minimum((values",
           "smaller instead of larger value loss", ("tests/test_functional.py::test_clipped_value_loss",)),
    Mutant("critic-at-the-policys-rate", "agents/learner.py", 'group["lr"] = lr * group["factor"]', 'group["lr"] = lr',
           "the schedule forgets that some parameters have a rate of their own",
           ("tests/test_learner.py::test_parameters_with_a_factor_step_at_a_multiple_of_the_rate",)),
    Mutant("critic-without-its-adapter", "lmgym/policy.py", "return [*trunk, *self.value_head.parameters()]",
           "return [*self.value_head.parameters()]",
           "only the last layer of a critic is trained",
           ("tests/test_learner.py::test_a_run_trains_its_critic_and_nothing_else_at_the_critics_rate",)),
    Mutant("value-clip-never-off", FUNCTIONAL, "    if not clip:", "    if clip is None:",
           "a value clip of 0 fixes the value instead of being off",
           ("tests/test_functional.py::test_a_value_loss_without_its_clip_is_half_the_squared_error",)),
    Mutant("value-loss-sign", "agents/ppo.py", "policy_loss + config.value_coef * value_loss",
           "policy_loss - config.value_coef * value_loss",
           "value loss with the wrong sign", ("tests/test_ppo.py::test_both_critics_learn",)),
    Mutant("entropy-sign", "agents/ppo.py", "- config.entropy_coef * new.entropy",
           "+ config.entropy_coef * new.entropy",
           "entropy bonus with the wrong sign", ("tests/test_learner.py::test_an_entropy_bonus_raises_the_entropy",)),
    Mutant("k3-swapped", FUNCTIONAL, "k3 = torch.expm1(-log_ratio) + log_ratio",
           "k3 = torch.expm1(log_ratio) - log_ratio",
           "k3 loss of the inverse ratio", ("tests/test_functional.py::test_whose_gradient_a_kl_loss_has",)),
    Mutant("ppo-kl-loss-sign", "agents/ppo.py", "loss = loss + env.kl_controller.beta * F.kl_loss(",
           "loss = loss - env.kl_controller.beta * F.kl_loss(",
           "PPO's KL loss with the wrong sign",
           ("tests/test_learner.py::test_kl_in_the_loss_draws_the_policy_to_its_reference",
            "tests/test_algorithms.py::test_what_a_setting_adds_to_the_gradient")),
    Mutant("grpo-unscaled", "agents/grpo.py", "    scale: bool = True", "    scale: bool = False",
           "GRPO's advantages unscaled by default", ("tests/test_algorithms.py::test_a_default_is_a_promise",)),
    Mutant("distinct-n", "agents/evaluate.py", "words[i : i + n]", "words[i : i + n - 1]",
           "distinct-n counts shorter word groups",
           ("tests/test_evaluate.py::test_distinct_counts_word_groups_by_hand",)),
    Mutant("reward-gain", "lmgym/reward", "shift: float = 0.0, ends_with_eos: bool = False, gain: float = 1.0",
           "shift: float = 0.0, ends_with_eos: bool = False, gain: float = 2.0",
           "a reward model's default gain", ("tests/test_reward_model.py",)),
    Mutant("replay-of-no-mask", POLICY, "if not self.truncates or sequences.sampling_mask is not None:",
           "if not self.truncates or sequences.sampling_mask is None:",
           "a truncated policy is scored over what it would allow now", ("tests/test_sampling.py",)),
    Mutant("kl-loss-sign", "agents/grpo.py", "loss = loss + env.kl_controller.beta * F.kl_loss(",
           "loss = loss - env.kl_controller.beta * F.kl_loss(",
           "GRPO's KL loss with the wrong sign",
           ("tests/test_learner.py::test_kl_in_the_loss_draws_the_policy_to_its_reference",)),
    # Preferences and imitation ----------------------------------------------------------------------------------------
    Mutant("dpo-sign", FUNCTIONAL, "margin = beta * (chosen_log_ratio - rejected_log_ratio)",
           "margin = beta * (rejected_log_ratio - chosen_log_ratio)",
           "DPO's margin with the wrong sign", ("tests/test_functional.py::test_dpo_is_the_papers_formula",)),
    Mutant("dpo-without-reference", "agents/dpo.py", "torch.where(texts.is_learned, logp - reference, 0.0)",
           "torch.where(texts.is_learned, logp, 0.0 * reference)",
           "DPO without its reference",
           ("tests/test_algorithms.py::test_online_dpo_on_a_fixed_set_is_dpo",)),
    Mutant("ranking-reversed", FUNCTIONAL, "return bradley_terry(scores[better], scores[worse], error_rate=error_rate)",
           "return bradley_terry(scores[worse], scores[better], error_rate=error_rate)",
           "ranking read from the worst to the best",
           ("tests/test_functional.py::test_the_gradient_of_a_ranking_is_the_mean_over_its_pairs",)),
    Mutant("reward-model-reads-pad", "lmgym/reward", "counted = attention_mask.bool()",
           "counted = torch.ones_like(attention_mask).bool()",
           "reward model read at the padding",
           ("tests/test_reward_model.py::test_a_tokenizer_without_a_padding_token_of_its_own",)),
    Mutant("padding-is-an-end", MODELS, "if i is not None and i < vocabulary and i not in eos_ids",
           "if i is not None and i < vocabulary",
           "an end taken as padding although there is another special token",
           ("tests/test_models.py::test_the_padding_is_a_special_token_if_there_is_one",)),
    Mutant("end-banned-as-padding", MODELS, "self.pad_id}).difference(eos_ids)", "self.pad_id})",
           "an end that is also the padding is banned", ("tests/test_models.py::test_any_id_fills_rows_up",)),
    Mutant("long-text-loses-its-start-token", MODELS, "prefix = prefix if prefix < most else 0", "prefix = 0",
           "a text that is cut loses the special tokens before it",
           ("tests/test_reward_model.py::test_an_encoder_scores_long_texts_from_their_first_token",)),
    Mutant("positions-before-the-padding", MODELS, "return limit - max(unused, default=0)", "return limit",
           "positions counted that RoBERTa does not use",
           ("tests/test_models.py::test_how_many_positions_a_model_has",)),
    Mutant("encoder-accepted", MODELS,
           "if not _equal(whole[0, :PREFIX], whole[1, :PREFIX], model.adapters.model.dtype):", "if False:",
           "a model that is not causal is accepted",
           ("tests/test_architectures.py::test_a_family_goes_the_whole_way",)),
    Mutant("inexact-cache-used", MODELS,
           "if not _equal(decoding.logits, whole[rows, at + step - 1], model.adapters.model.dtype):", "if False:",
           "decoding with a cache that counts padding as positions",
           ("tests/test_architectures.py::test_a_family_goes_the_whole_way",)),
    Mutant("rows-restart-by-column", MODELS, "step, restarts = partial(self._step, adapter), self._takes_position_ids",
           "step, restarts = partial(self._step, adapter), True",
           "a row starts anew in the cache of a model that counts columns",
           ("tests/test_architectures.py::test_rows_do_not_restart_where_a_model_counts_columns",)),
    Mutant("useless-adapters", MODELS, "    if not left_out:", "    if True:",
           "adapters on layers that a pass does not run",
           ("tests/test_architectures.py::test_a_family_goes_the_whole_way",)),
    Mutant("functional-dropout-on", MODELS, 'isinstance(value, float) and "drop" in key', "False",
           "dropout that is not a module left on",
           ("tests/test_models.py::test_dropout_that_is_no_module_is_off_for_good",)),
    Mutant("stays-in-training-mode", MODELS, "    if model.training:", "    if False:",
           "passes in training mode after model.train()",
           ("tests/test_models.py::test_noise_of_routers_is_off_whatever_the_mode",)),
    Mutant("reward-model-attends-pad", "lmgym/reward", "[0] * (width - len(row))", "[1] * (width - len(row))",
           "reward model's mask counts padding",
           ("tests/test_reward_model.py::test_the_score_is_read_at_the_last_token",)),
    Mutant("reward-model-order", "lmgym/reward",
           "return torch.cat(parts)[torch.tensor(order, device=self.device).argsort()]", "return torch.cat(parts)",
           "scores given back in order of length",
           ("tests/test_reward_model.py::test_padding_and_batching_change_nothing",)),
    Mutant("prompt-imitated", "agents/sft.py", "return token_nll(lm, texts.sequences, adapter), texts.is_learned",
           "return token_nll(lm, texts.sequences, adapter), texts.sequences.is_action",
           "fine-tuning learns the prompt too",
           ("tests/test_sft.py::test_the_loss_by_hand_over_padded_rows",)),
    Mutant("distillation-reversed", "agents/distill.py", "kl = F.forward_kl(target, policy.log_probs(sequences))",
           "kl = -F.forward_kl(target, policy.log_probs(sequences))",
           "distillation away from the teacher",
           ("tests/test_learner.py::test_distillation_measures_the_kl_from_the_teacher",)),
    Mutant("imitates-the-worst", FUNCTIONAL, ".sort(dim=1, descending=True, stable=True).indices[:, :keep]",
           ".sort(dim=1, stable=True).indices[:, :keep]",
           "expert iteration imitates the worst",
           ("tests/test_functional.py::test_best_of_group_marks_the_best_rows",)),
    # Around the algorithms --------------------------------------------------------------------------------------------
    Mutant("last-minibatch-metrics", "agents/training", "value = value.detach().float()",
           "value = value.detach().float(); self._sums.pop(name, 0); self._counts.pop(name, 0)",
           "metrics of the last minibatch alone",
           ("tests/test_ppo.py::test_metrics_are_masked_means_over_everything_added",)),
    Mutant("metrics-count-padding", FUNCTIONAL, "return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)",
           "return torch.where(mask, x, 0.0).sum() / mask.numel()",
           "masked mean divided by all entries",
           ("tests/test_functional.py::test_masked_mean_reads_only_what_counts",)),
    Mutant("adaptive-kl-per-token", "agents/ppo.py", 'env.kl_controller.update(row["kl/sequence_nats"], rollout.rows)',
           'env.kl_controller.update(row["kl/sequence_nats"] / row["tokens/mean"], rollout.rows)',
           "β steered by KL per token instead of per completion",
           ("tests/test_ppo.py::test_metrics_are_those_that_are_documented_and_are_true",)),
    Mutant("last-rows-dropped", LEARNER, "generator=self.generator, device=self.device).split(size or count)",
           "generator=self.generator, device=self.device)[: count // (size or count) * size].split(size or count)",
           "minibatches drop the last rows", ("tests/test_ppo.py::test_minibatches_hold_every_row_once",)),
    Mutant("not-scheduled", LEARNER, "self.lr = self.config.lr * F.schedule_factor(",
           "_ = self.config.lr * F.schedule_factor(",
           "learning rate never scheduled", ("tests/test_learner.py::test_every_algorithm_follows_the_schedule",)),
    Mutant("gradients-add-up", MASTER_WEIGHTS, "            self.begin_step()", "            pass",
           "gradients of earlier steps added to the new one",
           ("tests/test_learner.py::test_a_step_goes_down_its_own_loss_alone",)),
    Mutant("rewards-of-one-rank", OWN_ROWS, "buffer.reference_logp, buffer.rewards, buffer.score,",
           "buffer.reference_logp, buffer.score,", "advantages are whitened over the rows of one rank",
           (f"{RANKS} -k 'ppo or rloo'",)),
    Mutant("kl-of-one-rank", OWN_ROWS, "buffer.is_action, buffer.reference_logp, buffer.rewards",
           "buffer.is_action, buffer.rewards", "the KL controller is fed by the rows of one rank",
           (f"{RANKS} -k 'grpo or rloo'",)),
    Mutant("same-uniforms-on-all-ranks", ROLLOUT, "policy.device, own.first)", "policy.device, 0)",
           "all ranks draw the same random numbers", (f"{RANKS} -k 'rloo'",)),
    Mutant("mean-of-means", LEARNER, "part, loss, weights[rows, :steps], self.metrics",
           "part, loss, weigh(part.mask) / current().world, self.metrics",
           "each rank weights its loss by the tokens of its own rows", (f"{RANKS} -k 'ppo'",)),
    Mutant("norm-before-the-sum", LEARNER, "        self.weights.end_gradient()",
           "        nn.utils.clip_grad_norm_(self.weights.values, 0.1); self.weights.end_gradient()",
           "each rank clips its own part of the gradient", (f"{RANKS} -k 'ppo'",)),
    Mutant("groups-kept", "agents/distributed/torch_ranks.py", "        self._groups.clear()", "        pass",
           "the threads of a process group outlive the interpreter, and abort it",
           ("tests/test_ranks.py::test_a_rank_that_parts_frees_its_groups",)),
    Mutant("metric-counted-per-rank", "agents/training/metrics.py", "        if ranks.rank > 0:", "        if False:",
           "a value of the whole step is counted once for each rank", (f"{RANKS} -k 'ppo'",)),
    Mutant("shuffle-of-its-own", LEARNER, "torch.Generator(device=self.device).manual_seed(seed)",
           "torch.Generator(device=self.device).manual_seed(seed + current().rank)",
           "each rank shuffles its minibatches in an order of its own", (f"{RANKS} -k 'ppo or sft'",)),
    Mutant("whole-loss-per-rank", LEARNER, "loss if world == 1 else loss / world", "loss",
           "a loss that every rank computes whole counts once for each rank", (f"{RANKS} -k 'ppo or foreign'",)),
    Mutant("rows-of-rank-0-twice", "agents/training/microbatch.py", "balanced(sizes, ranks.world)[ranks.rank]",
           "balanced(sizes, ranks.world)[0]", "all ranks take the same share of a step", (f"{RANKS} -k 'rloo'",)),
    Mutant("unused-parameters-decay", "agents/training/over_ranks.py", "in zip(values, used, strict=True) if count]",
           "in zip(values, used, strict=True)]", "parameters without a gradient are stepped on several ranks",
           (f"{RANKS} -k 'no_rank_has'",)),
    Mutant("average-forgets", "agents/training", "share = (1 - self.decay) * ~refused",
           "share = self.decay * ~refused",
           "moving average of the parameters with the weights swapped",
           ("tests/test_algorithms.py::test_the_moving_average_is_the_one_worked_out_by_hand",)),
    Mutant("loss-on-padding", LEARNER, "torch.where(old.mask, part, 0.0) for part in", "part for part in",
           "what stands behind the end reaches the gradient",
           ("tests/test_learner.py::test_what_stands_behind_the_end_is_not_read",)),
    # Stable-Baselines3 ------------------------------------------------------------------------------------------------
    Mutant("sb3-kl-left-from-last-row", "agents/integrations/sb3", "self._running[dones] = 0.0", "pass",
           "SB3's KL of a completion includes the one before",
           ("tests/test_sb3.py::test_what_is_recorded_is_true_and_beta_is_steered",)),
    Mutant("sb3-never-cut-off", "agents/integrations/sb3", 'info["TimeLimit.truncated"] = cut',
           'info["TimeLimit.truncated"] = False',
           "SB3 is not told that a row was cut off",
           ("tests/test_sb3.py::test_it_equals_sb3s_own_vec_env_of_scalar_environments",)),
    Mutant("sb3-next-observation", "agents/integrations/sb3",
           "last = {key: x[row] for key, x in final.items()} if isinstance(final, dict) else final[row]",
           "last = {key: x[row] for key, x in as_arrays(observation).items()}",
           "SB3's last observation is that of the next prompt",
           ("tests/test_sb3.py::test_the_terminal_observation_is_the_whole_text",)),
    # Surviving --------------------------------------------------------------------------------------------------------
    Mutant("checkpoint-without-moments", "agents/training",
           "moments = [optimizer.state.get(p, {}) for p in parameters]",
           "moments = [{} for p in parameters]",
           "Adam's moments left out of checkpoints", (GOES_ON,)),
    Mutant("checkpoint-without-generator", LEARNER, "self.generator.set_state(generator)", "pass",
           "the generator of shuffles not put back", (GOES_ON,)),
    Mutant("checkpoint-without-beta", "agents/pipeline", "setattr(self.controller, name, state.number(name))",
           "state.number(name)",
           "the KL controller's β not put back",
           ("tests/test_survival.py::test_a_controller_of_kl_goes_on_where_it_was",)),
    Mutant("rows-twice", "lmgym/io", "if length is not None and length != self.length:",
           "if length is not None and length > self.length:",
           "metrics that no checkpoint knows of are kept, and written again",
           ("tests/test_atomic_files.py::test_lines_go_on_where_they_counted",)),
    Mutant("checksum-unread", "agents/runs",
           'if hashlib.sha256(raw).hexdigest() != body.get("tensors"):', "if False:",
           "a checkpoint's checksum is not looked at",
           ("tests/test_atomic_files.py::test_a_changed_checkpoint_is_refused_in_one_line",)),
    Mutant("half-a-line", "lmgym/io", "os.ftruncate(self._file, self.length)", "pass",
           "half a line stays where a write failed",
           ("tests/test_atomic_files.py::test_a_line_that_failed_is_not_there",)),
    Mutant("bad-step-taken", LEARNER, "self.optimizer.found_inf = refused.float()",
           "self.optimizer.found_inf = 0 * refused.float()",
           "a step is taken though its gradient is not finite",
           ("tests/test_survival.py::test_bad_steps_are_skipped_and_counted",)),
    Mutant("memory-twice", "agents/training", "parameter.grad = None  # what the failed attempt has accumulated",
           "pass",
           "after memory ran out, part of the gradient counts twice",
           ("tests/test_survival.py::test_a_step_that_memory_does_not_hold_is_taken_in_smaller_passes",)),
    Mutant("frozen-stays-frozen", "agents/training", "        parameter.requires_grad_(True)", "            pass",
           "an adapter that was frozen from outside is trained no longer",
           ("tests/test_ppo.py::test_an_adapter_that_is_frozen_from_outside_is_trained_on",)),
    Mutant("alarm-the-wrong-way", "agents/pipeline", "if up_to - up_from <= rise or down_from - down_to <= fall:",
           "if up_to - up_from <= rise or down_to - down_from <= fall:",
           "over-optimisation is seen where score and gold rise together",
           ("tests/test_alarms.py",)),
    # Data -------------------------------------------------------------------------------------------------------------
    Mutant("test-prompts-trained-on", "lmgym/tasks", "if _identity(prompt) not in held]", "]",
           "prompts of the official test split are trained on",
           ("tests/test_data.py::test_test_prompts_of_your_own_are_never_trained_on",)),
    Mutant("hub-asked-for-files", "lmgym/io", "return bool(_HUB_NAME.fullmatch(name)) and not _kind(name) and",
           "return bool(_HUB_NAME.fullmatch(name)) and",
           "a missing file is asked of the hub",
           ("tests/test_data.py::test_a_missing_file_is_never_asked_of_the_hub",)),
    Mutant("ranks-upside-down", "lmgym/preferences", 'sign = 1 if key in ("rank", "ranks") else -1', "sign = -1",
           "the worst rank is read as the best", ("tests/test_data.py::test_forms_of_comparisons",)),
    Mutant("cut-by-chance", "lmgym/preferences", "if not as_written and 2 * len(repeating) >= len(found):",
           "if not as_written and repeating:",
           "an answer that begins like its prompt by chance is cut",
           ("tests/test_data.py::test_texts_that_repeat_the_prompt",)),
    Mutant("prompt-ends-a-turn-early", "lmgym/preferences", "size = borders[-1] if borders",
           "size = borders[0] if borders",
           "the common beginning of two dialogues ends a turn too early",
           ("tests/test_data.py::test_prompts_that_are_the_common_beginning",)),
    Mutant("pass-by-count", "agents/training", "full = self.pass_tokens and count * longest > self.pass_tokens",
           "full = self.pass_tokens and longest > self.pass_tokens",
           "a pass of texts grows without limit, because its number of rows is not counted",
           ("tests/test_memory.py::test_items_are_split_by_their_padded_size",)),
    Mutant("pass-forgets-the-frozen", "agents/training", "trained = layers - (frozen or 0)",
           "trained = layers",
           "the memory of frozen layers is counted, so that passes are too small",
           ("tests/test_memory.py::test_the_estimate_counts_what_is_trained",)),
    Mutant("variance-of-the-sample", "agents/experiments", "variances = [scores.var(-1, ddof=1)",
           "variances = [scores.var(-1)",
           "the variance over seeds divides by n instead of n − 1, so that intervals are too short",
           ("tests/test_experiments_statistics.py::test_coverage_of_the_suite_mean",)),
    Mutant("normal-instead-of-t", "agents/experiments", "half = stdtrit(degrees, 0.5 + confidence / 2)",
           "half = stdtrit(1e9, 0.5 + confidence / 2)",
           "the interval uses the normal quantile, too short for three seeds",
           ("tests/test_experiments_statistics.py::test_a_suite_of_one_or_two_tasks_has_the_intervals_of_scipy",)),
    Mutant("ties-lose", "agents/experiments", "above = (one > other) + 0.5 * (one == other)",
           "above = (one > other) + 0.0 * (one == other)",
           "equal scores count as a loss in the probability of improvement",
           ("tests/test_experiments_statistics.py::test_the_probability_of_improvement_is_that_of_rliable",)),
    Mutant("permutations-one-sided", "agents/experiments", "differences = abs(sums / n - (runs.sum() - sums) / m)",
           "differences = sums / n - (runs.sum() - sums) / m",
           "the permutation test counts only one of its two sides",
           ("tests/test_experiments_statistics.py::test_the_permutation_test_is_that_of_scipy",)),
    Mutant("holm-without-order", "agents/experiments",
           "largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))",
           "largest = min(1.0, (len(p_values) - rank) * p_values[i])",
           "a p-value that Holm adjusts can fall below a smaller one's",
           ("tests/test_experiments_statistics.py::test_holm_is_the_closure_of_bonferroni",)),
    Mutant("every-seed-is-0", "agents/cli/several_runs.py", 'f"--seed={cell.index}"', '"--seed=0"',
           "all runs of --seeds have the same seed",
           ("tests/test_comparison.py::test_a_seed_of_several_is_the_run_that_it_would_be_alone",)),
    Mutant("any-run-is-done", "agents/cli/several_runs.py", 'return made_by == "train" and',
           'return made_by == "train" or',
           "a finished run of another command counts as this cell's result",
           ("tests/test_comparison.py::test_what_is_done_is_not_run_again",)),
    Mutant("pairs-broken", "agents/experiments/comparison.py", "differences.append(pairs[:, 0] - pairs[:, 1])",
           "differences.append(pairs[:, 0] - pairs[::-1, 1])",
           "the difference of two runs is taken between different prompts, so that its interval is too long",
           ("tests/test_comparison.py::test_runs_that_differ_in_their_seed_are_a_group_and_differences_are_paired",)),
    Mutant("prompts-not-compared", "agents/experiments/comparison.py",
           "if [prompt for prompt, _ in mine] != [prompt for prompt, _ in theirs]:", "if len(mine) != len(theirs):",
           "runs that were measured on different prompts get a paired interval",
           ("tests/test_comparison.py::test_runs_on_other_prompts_have_no_interval",)),
    Mutant("worst-setting-first", "agents/cli/sweep.py", "key=lambda name: -_value(found[name], wanted.metric)",
           "key=lambda name: _value(found[name], wanted.metric)",
           "a sweep calls the worst setting the best",
           ("tests/test_comparison.py::test_a_sweep_runs_every_combination_and_ranks",)),
    Mutant("first-box", "lmgym/tasks/answers.py", 'text.rfind("\\\\boxed{")', 'text.find("\\\\boxed{")',
           "an intermediate result in a box counts as the answer",
           ("tests/test_answers.py::test_what_states_the_answer",)),
    Mutant("minus-of-a-difference", "lmgym/tasks/answers.py", "if start and text[start - 1].isalnum() else number",
           "if start and text[start - 1].isalpha() else number",
           "in 10-3 the last number is read as −3",
           ("tests/test_answers.py::test_the_last_number",)),
    Mutant("none-is-one", "lmgym/reward/trl.py", "[0.0 if reward is None else reward for reward in rewards]",
           "[1.0 if reward is None else reward for reward in rewards]",
           "a reward function that does not apply to a row pays 1 for it",
           ("tests/test_answers.py::test_rewards_equal_trls",)),
    Mutant("code-is-not-named", "lmgym/tasks/reasoning_gym.py", "    if name in RUN_CODE:", "    if not name:",
           "a data set that runs code is called unknown, and the user allows it",
           ("tests/test_answers.py::test_data_sets_that_run_code_or_that_nobody_read_are_refused",)),
    Mutant("key-without-config", "agents/experiments", "hashlib.sha256(canonical(self.as_data()).encode())",
           'hashlib.sha256(canonical(self.as_data() | {"config": {}}).encode())',
           "a cell with other settings of the agent counts as done",
           ("tests/test_experiments_runner.py::test_a_key_is_a_hash_of_all_that_decides_the_result",)),
    Mutant("torn-row-stays", "agents/experiments", "whole = len(_whole_lines(path)) if path.exists() else None",
           "whole = None",
           "a row is appended to a line that a kill tore, and both are lost",
           ("tests/test_experiments_runner.py::test_a_line_that_a_kill_tore_is_ignored_and_repaired",)),
    Mutant("one-death-is-final", "agents/experiments", "if deaths < ATTEMPTS:",
           "if deaths > ATTEMPTS:",
           "a cell whose process the system killed once counts as failed",
           ("tests/test_experiments_runner.py::test_kill_9_of_a_worker_runs_its_cell_again",)),
    Mutant("seeds-in-one-shard", "agents/experiments", 'canonical(cell.as_data() | {"index": 0}).encode()',
           "canonical(cell.as_data()).encode()",
           "shards are unequal: the seeds of an agent do not go round them",
           ("tests/test_experiments_runner.py::test_shards_are_equal_parts_and_a_cell_keeps_its_own",)),
    Mutant("left-rollouts-are-free", "agents/benchmark/meter.py", "self._count()  # a rollout that was begun",
           "pass  # a rollout that was begun",
           "tokens of a rollout that is begun and left are not metered",
           ("tests/test_benchmark.py::test_a_rollout_that_was_left_is_paid_for",)),
    Mutant("tokens-counted-twice", "agents/benchmark/meter.py", "new, self._counted = length - self._counted, length",
           "new, self._counted = length, length",
           "the meter counts the tokens of a text again at every look",
           ("tests/test_benchmark.py::test_a_step_costs_a_token_in_each_row_that_is_running",)),
    Mutant("budget-in-updates", "agents/benchmark/meter.py", "while self.meter.left >= most if sampled",
           "while self.meter.left >= self.rollout if sampled",
           "an update begins that may need more tokens than are left",
           ("tests/test_benchmark.py::test_updates_end_with_the_budget_and_the_learning_rate_with_them",)),
    Mutant("measuring-is-compute", "agents/benchmark/world.py",
           "= passes.forward, passes.backward", "= self.model.passes.forward, self.model.passes.backward",
           "the passes of an evaluation count as compute of the agent",
           ("tests/test_benchmark.py::test_measuring_costs_nothing",)),
    Mutant("backward-is-free", "agents/benchmark/suite.py", 'return float(point["forward"] + 2 * point["backward"])',
           'return float(point["forward"])',
           "the league of equal compute does not count backward passes",
           ("tests/test_benchmark_results.py::test_the_league_of_equal_compute_reads_an_earlier_evaluation",)),
    Mutant("kl-limit-ignored", "agents/benchmark/suite.py", '(self.max_kl is None or point["kl"] <= self.max_kl)',
           'True',
           "a headline is taken beyond the KL limit of its row",
           ("tests/test_benchmark.py::test_the_headline_is_the_last_evaluation_within_the_limits",)),
    Mutant("exact-gold-of-the-reference", "agents/benchmark/measure.py",
           "golds.append(float((probs * tree.scores).sum()))",
           "golds.append(float((tree.reference_logp.exp() * tree.scores).sum()))",
           "the exact gold score is that of the reference",
           ("tests/test_benchmark.py::test_exact_figures_are_those_of_many_samples",)),
    Mutant("best-of-n-by-gold", "agents/benchmark/measure.py", "order = scores.sort(dim=1, stable=True).indices",
           "order = scores.sort(dim=1, stable=True, descending=True).indices",
           "best of n answers with the worst completion",
           ("tests/test_benchmark.py::test_best_of_n_against_the_enumerated_distribution",)),
    Mutant("noise-of-the-prompt", "lmgym/tasks/letters.py", "/{completion.text}/{completion.tokens}", "",
           "all completions of a group have the same noise, which a group baseline removes",
           ("tests/test_letters.py::test_noise_is_normal_new_in_every_episode_and_can_be_repeated",)),
    Mutant("few-prompts-shared", "lmgym/tasks/letters.py", '"test": shuffled[train_prompts:]}',
           '"test": shuffled}',
           "the test prompts of FewPrompts contain those of training",
           ("tests/test_letters.py::test_few_prompts_are_split",)),
    Mutant("worst-is-chosen", "agents/benchmark/offline.py", "(ranked[0], ranked[-1])", "(ranked[-1], ranked[0])",
           "the pairs that DPO buys have the worse completion first",
           ("tests/test_benchmark.py::test_comparisons_are_bought_from_the_budget_by_their_score",)),
    Mutant("verify-believes", "agents/benchmark/verify.py", "within = bool(low <= 0 <= high)",
           "within = True",
           "verification confirms an inflated file",
           ("tests/test_benchmark_results.py::test_verdicts",)),
    Mutant("passes-of-decoding", "lmgym/models/decoding.py", "part.passes.add(len(token))",
           "part.passes.add(1)",
           "a decoding step counts as one token, whatever its rows",
           ("tests/test_benchmark.py::test_passes_are_counted_as_torch_sees_them",)),
    Mutant("plan-first-step", "agents/runs/costs.py", "costs = np.concatenate([[0.0, 0.0], np.ones(2 * n)])",
           "costs = np.concatenate([[0.0, 0.0], np.ones(n), np.zeros(n)])",
           "steps that are faster than the fit cost it nothing",
           (PLAN_TEST + "test_without_tokens_the_fit_is_the_median",)),
    Mutant("plan-tokens-unscaled", "agents/runs/costs.py", "found[1] * unit / size", "found[1] * unit",
           "the seconds of a token are those of a whole step",
           (PLAN_TEST + "test_b_and_c_are_recovered_exactly",)),
    Mutant("plan-rest-of-the-trial", "agents/pipeline/planning.py", "a = sum(fit_line(shares,",
           "a = max(fit_line(shares,",
           "of what a stage does besides its steps, only one part is predicted",
           (PLAN_TEST + "test_a_run_is_predicted_exactly_from_three_small_ones",)),
    Mutant("plan-steps-of-the-trial", "agents/pipeline/planning.py", "return updates", "return in_trial",
           "the updates of the trial are predicted",
           (PLAN_TEST + "test_a_run_is_predicted_exactly_from_three_small_ones",)),
    Mutant("plan-band-of-nothing", "agents/pipeline/planning.py",
           "max(NORMAL_90 * deviation, LEAST_BAND * value)",
           "NORMAL_90 * deviation",
           "a plan whose steps were all alike claims to be exact",
           (PLAN_TEST + "test_the_band_is_a_normal_one_and_never_narrow",)),
    Mutant("plan-peak-of-the-run", "agents/runs/meter.py", 'write_text("5", encoding="ascii")',
           'write_text("1", encoding="ascii")',
           "the peak memory of a stage is that of the run until then",
           (PLAN_TEST + "test_the_peak_of_a_stage_is_not_that_of_the_one_before",)),
    Mutant("plan-first-update-counts", "agents/runs/costs.py",
           "fit = fit_steps(measured.seconds[1:], measured.tokens[1:])",
           "fit = fit_steps(measured.seconds[:1], measured.tokens[:1])",
           "a plan is corrected by the first update alone, which is slow",
           (PLAN_TEST + "test_after_five_percent_of_the_updates_the_plan_is_confirmed",)),
    Mutant("plan-of-any-setting", "agents/runs/costs.py", "found = differences(then, now)",
           "found = differences(now, now)",
           "a run is compared with the plan of another setting",
           (PLAN_TEST + "test_a_plan_is_read_back_and_compared_with_the_options",)),
    Mutant("plan-fits-without-python", "agents/cli/plan.py", 'machine["base_mb"] + peak["high"] > free',
           'peak["low"] > free',
           "the memory of Python and its libraries is forgotten when a plan says what fits",
           (PLAN_TEST + "test_too_little_memory_or_disk_is_said",)),
)  # fmt: skip


# Copies ------------------------------------------------------------------------------------------------------------


@contextmanager
def copy_of(source: Path) -> Iterator[Path]:
    """A folder with the source, compiled files and all, in which a bug may be planted."""
    with tempfile.TemporaryDirectory(prefix="lmgym-mutant-") as folder:
        copy = Path(folder) / "copy"
        copy.mkdir()
        for name in COPIED:
            shutil.copytree(source / name, copy / name)
        for name in COPIED_FILES:
            shutil.copy2(source / name, copy / name)
        yield copy


def file_of(mutant: Mutant, root: Path) -> Path:
    """The file that holds the line of a planted bug.

    Raises:
        ValueError: no file holds it, or it occurs more than once.
    """
    place = root / mutant.file
    files = [place] if place.is_file() else sorted(place.glob("*.py"))
    counts = {path: path.read_text(encoding="utf-8").count(mutant.old) for path in files}
    found = [path for path, count in counts.items() if count]
    if sum(counts.values()) != 1:
        raise ValueError(
            f"{mutant.name}: {mutant.old!r} occurs {sum(counts.values())} times in {mutant.file}, and must occur once: "
            "the line was changed, so say in tests/mutants.py where the bug is to be planted now"
        )
    return found[0]


def planted(mutant: Mutant, root: Path) -> tuple[Path, str, int]:
    """The file, its source with the bug in it, and the number of the line, from 1.

    Raises:
        ValueError: the line is missing or ambiguous, or the bug takes more than a line.
    """
    path = file_of(mutant, root)
    if "\n" in mutant.old + mutant.new or mutant.old == mutant.new:
        raise ValueError(f"{mutant.name}: old and new must be two different parts of one line")
    source = path.read_text(encoding="utf-8")
    changed = source.replace(mutant.old, mutant.new)
    compile(changed, str(path), "exec")
    return path, changed, source[: source.index(mutant.old)].count("\n") + 1


def plant(mutant: Mutant, copy: Path) -> None:
    """Plants the bug in a copy."""
    path, changed, _ = planted(mutant, copy)
    path.write_text(changed, encoding="utf-8")
    # A compiled file is known by its second and its size, and both may be the old ones.
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*"):
        compiled.unlink()


def where(mutant: Mutant) -> str:
    """File and function of a planted bug."""
    path, _, line = planted(mutant, ROOT)

    def names(node: ast.AST) -> list[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)) and child.lineno <= line <= (child.end_lineno or 0):
                return [child.name, *names(child)]
        return []

    name = ".".join(names(ast.parse(path.read_text(encoding="utf-8"))))
    return f"{path.relative_to(ROOT).as_posix()}: {name}"


# Runs --------------------------------------------------------------------------------------------------------------

# Test processes are forked from one that has these loaded already: half of the time of the gate.
LOADED = (
    "pytest",
    "torch",
    "peft",
    "transformers.models.gpt2.modeling_gpt2",
    "gymnasium",
    "stable_baselines3",
    "hypothesis",
    "jaxtyping",
    "typeguard",
)

# Plugins of pytest that a test process does without.
UNUSED = ("anyio", "xdist", "xdist.looponfail", "pytest_cov")


class Recorder:
    """A pytest plugin that says which test failed first, and that it was the copy that was tested."""

    def __init__(self, copy: Path):
        self.copy = copy
        self.found: dict[str, str] = {}

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.found.setdefault("broken", str(report.longrepr)[-2000:])

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and "test" not in self.found:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = crash.message if crash else str(report.longrepr)[-300:]
            self.found |= {"test": report.nodeid, "message": (message.splitlines() or [""])[0][:200]}

    def pytest_sessionfinish(self) -> None:
        for name in ("lmgym", "agents"):
            file = getattr(sys.modules.get(name), "__file__", None)
            if file is not None and self.copy.resolve() not in Path(file).resolve().parents:
                self.found["broken"] = f"{name} was imported from {file}, not from the copy"


def _pytest(copy: Path, arguments: Sequence[str], pipe: Any) -> None:
    """The body of a test process: like `PYTHONPATH=copy pytest ...` in the copy."""
    log = os.open(copy / "pytest.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)  # for the processes that tests start
    sys.path[:] = [str(copy), *(p for p in sys.path if Path(p).resolve() not in (ROOT, ROOT / "tests"))]
    import pytest

    recorder = Recorder(copy)
    flags = ["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    flags += [argument for plugin in UNUSED for argument in ("-p", f"no:{plugin}")]
    status = pytest.main([*flags, *arguments], plugins=[recorder])
    pipe.send(recorder.found | {"status": int(status)})


def run_tests(copy: Path, arguments: Sequence[str], timeout: float = 1200.0) -> dict[str, str]:
    """Runs pytest on a copy; returns "test" and "message" of the first failure, or neither.

    Raises:
        ValueError: there are no such tests, they did not end, or something else than the copy was tested.
    """
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_pytest, args=(copy, arguments, sender))
    process.start()
    sender.close()
    try:
        found = receiver.recv() if receiver.poll(timeout) else {"status": f"no answer after {timeout:.0f} s"}
    except EOFError:
        found = {"status": "no answer: the process died"}
    process.join(10)
    process.kill()
    process.join()
    if "broken" in found or found["status"] not in (0, 1):
        log = (copy / "pytest.log").read_text(encoding="utf-8", errors="replace")
        raise ValueError(f"pytest {shlex.join(arguments)}: {found.get('broken', found['status'])}\n{log[-3000:]}")
    return found


class Found(NamedTuple):
    """What became of a mutant.

    Attributes:
        test: the test that failed first; empty where none did.
        message: the first line of its complaint, or why the mutant counts as a survivor.
        caught: whether an assertion failed.
        seconds: how long it took.
        expected: whether it was one of the tests that the table names.
    """

    test: str
    message: str
    caught: bool
    seconds: float
    expected: bool = True


def judge(mutant: Mutant, template: Path) -> Found:
    """Plants one bug in a copy and runs the tests that should see it, then all others if they do not."""
    began = time.monotonic()
    with copy_of(template) as copy:
        plant(mutant, copy)
        for expected, arguments in [*((True, tests) for tests in mutant.tests), (False, f"--ignore {NOT_A_JUDGE}")]:
            found = run_tests(copy, shlex.split(arguments))
            if "test" in found:
                if not expected and "test" in run_tests(template, [found["test"]]):
                    raise ValueError(f"{found['test']} fails without any planted bug")
                # "Failed" is what pytest.fail and pytest.raises raise.
                asserted = found["message"].startswith(("AssertionError", "assert ", "Failed"))
                message = found["message"] if asserted else f"it only crashes: {found['message']}"
                return Found(found["test"], message, asserted, time.monotonic() - began, expected)
    return Found("", "survives", False, time.monotonic() - began)


def check_baseline(mutants: Sequence[Mutant], template: Path, collect_only: bool = False) -> None:
    """Without a bug, the same tests pass: else their failure would say nothing. Leaves compiled files behind.

    Args:
        mutants: whose tests.
        template: the copy without a bug.
        collect_only: the tests have passed already: only look whether they are there.

    Raises:
        ValueError: one fails.
    """
    entries = sorted({tests for mutant in mutants for tests in mutant.tests})
    apart = [shlex.split(entry) for entry in entries if "-k" in entry]
    together = sorted({argument for entry in entries if "-k" not in entry for argument in shlex.split(entry)})
    runs = [together, *apart]
    if collect_only:  # an expression that matches no test is told when its bug is judged
        runs = [["--collect-only", *together, *sorted({arguments[0] for arguments in apart})]]
    for arguments in runs:
        found = run_tests(template, arguments) if arguments else {}
        if "test" in found:
            raise ValueError(f"{found['test']} fails without any planted bug: {found['message']}")


# The table ---------------------------------------------------------------------------------------------------------


def rows_of_page() -> list[tuple[str, str, str]]:
    """Planted bug, where, and caught by, as the page has them."""
    text = PAGE.read_text(encoding="utf-8")
    lines = text[text.index(BEGIN) : text.index(END)].splitlines()
    cells = [[cell.strip().strip("`") for cell in line.strip("|").split(" | ")] for line in lines if "|" in line]
    return [(bug, place, test) for bug, place, test in cells[2:]]


def write_page(found: Sequence[tuple[Mutant, Found]]) -> None:
    """Puts the table between its markers."""
    text = PAGE.read_text(encoding="utf-8")
    lines = ["| planted bug | where | caught by |", "|---|---|---|"]
    lines += [f"| {m.bug} | `{where(m)}` | `{one.test.removeprefix('tests/')}` |" for m, one in found]
    before, after = text.index(BEGIN) + len(BEGIN), text.index(END)
    PAGE.write_text(text[:before] + "\n\n" + "\n".join(lines) + "\n\n" + text[after:], encoding="utf-8")


def show(found: Sequence[tuple[Mutant, Found]], console: Console) -> None:
    """Prints what became of each."""
    table = Table(*(Column(name, overflow="fold") for name in ("planted bug", "where", "caught by", "s")))
    for mutant, one in found:
        note = "" if one.expected or not one.caught else " (not one of those that its entry names)"
        verdict = escape(one.test.removeprefix("tests/") + note if one.caught else f"{one.message} {one.test}")
        verdict = verdict if one.caught else f"[red]{verdict}[/red]"
        table.add_row(f"{mutant.name}\n[dim]{mutant.bug}[/dim]", where(mutant), verdict, f"{one.seconds:.0f}")
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the gate; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run these alone")
    parser.add_argument("--write", action="store_true", help=f"write the table into {PAGE.relative_to(ROOT)}")
    parser.add_argument("--tests-pass", action="store_true", help="the tests have just passed: do not run them first")
    parser.add_argument("--jobs", type=int, choices=(1, 2), default=1, help="how many at a time")
    options = parser.parse_args(arguments)
    chosen = [m for m in MUTANTS if not options.only or m.name in options.only]
    if options.only and (unknown := set(options.only) - {m.name for m in chosen}):
        parser.error(f"no mutants named {sorted(unknown)}: choose from {', '.join(m.name for m in MUTANTS)}")
    if options.write and options.only:
        parser.error("--write writes the whole table, so leave --only out")
    console, began = Console(), time.monotonic()
    for mutant in chosen:
        planted(mutant, ROOT)  # before any test runs: a table that no longer fits is told at once
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "JAXTYPING_DISABLE": "1"}
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(LOADED))

    with copy_of(ROOT) as template, ThreadPoolExecutor(options.jobs) as pool:
        check_baseline(chosen, template, options.tests_pass)
        what = "are there" if options.tests_pass else "pass"
        console.print(f"{len(chosen)} planted bugs; without any, their tests {what} ({time.monotonic() - began:.0f} s)")

        def one(mutant: Mutant) -> tuple[Mutant, Found]:
            found = judge(mutant, template)
            what = found.test if found.caught else f"{found.message} {found.test}"
            console.print(f"{mutant.name}: {what} ({found.seconds:.0f} s)", markup=False, soft_wrap=True)
            return mutant, found

        found = list(pool.map(one, chosen))
    show(found, console)
    lost = [mutant.name for mutant, result in found if not result.caught]
    console.print(
        f"{len(found) - len(lost)} of {len(found)} planted bugs make a default test fail, in "
        f"{time.monotonic() - began:.0f} s" + (f"; these do not: {', '.join(lost)}" if lost else "")
    )
    if options.write and not lost:
        write_page(found)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())

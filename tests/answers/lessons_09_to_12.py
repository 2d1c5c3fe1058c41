"""The keys of lessons 9 to 12."""

# A change reads best on one line.

from answers.model import EMPTY, Key, body

_GAE_TEST = """
rewards, values, gamma, lam = [1.0, -2.0, 0.5, 3.0], [0.3, 0.9, -0.4, 2.0], 0.9, 0.7
size, v = len(rewards), [*values, 0.0]
deltas = [rewards[t] + gamma * v[t + 1] - v[t] for t in range(size)]
wanted = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, size)) for t in range(size)]
return all(abs(a - b) < 1e-6 for a, b in zip(gae(rewards, values, gamma, lam), wanted))
"""
_LOSS_TEST = """
for ratio in (0.5, 0.85, 1.15, 1.5):
    for advantage in (2.0, -2.0):
        wanted = -min(ratio * advantage, max(0.8, min(1.2, ratio)) * advantage)
        if abs(loss(ratio, advantage) - wanted) > 1e-9:
            return False
return True
"""
_ADVANTAGES = "(returns - (returns.sum(1, keepdim=True) - returns) / (GROUP - 1))"

ANSWERS = {
    "9.1": Key(
        body("return gold[torch.arange(len(gold)), proxy.argmax(1)].mean()"),
        EMPTY,
        (
            ("proxy.argmax(1)", "gold.argmax(1)", "You choose by the gold score"),
            ("return gold[", "return proxy[", "measure its gold score"),
            (
                "gold[torch.arange(len(gold)), proxy.argmax(1)].mean()",
                "gold.flatten()[proxy.argmax()]",
                "one text of all the prompts",
            ),
            ("gold[torch.arange(len(gold)), proxy.argmax(1)]", "gold", "the mean over all texts"),
        ),
        (("argmax(1)", "argmin(1)"),),
    ),
    "9.2": Key(
        (("proxy[update] > proxy[best]", "gold[update] > gold[best]"),),
        "You choose by the proxy",
        (
            ("kl[update] <= most_kl and ", "", "You ignore the limit"),
            ("gold[update] > gold[best]", "gold[update] >= gold[best]", "take the earlier one"),
        ),
        (("gold[update] >", "abs(gold[update]) >"), ("best = -1", "best = 0")),
    ),
    "9.3": Key(
        (("scores, scores + missing_eos_score", "scores, missing_eos_score"),),
        "can still be paid 9",
        (
            ("has_end, scores", "~has_end, scores", "the wrong way round"),
            ("scores, missing_eos_score", "scores, scores.clamp(max=missing_eos_score)", "the smaller of the two"),
            ("scores, missing_eos_score", "scores, 0.0", "You replace it by 0"),
        ),
    ),
    "9.4": Key(
        body(
            "centred = lengths - lengths.mean()\nif not centred.any():\n    return scores\n"
            "slope = (centred * scores).sum() / centred.square().sum()\nreturn scores - slope * centred"
        ),
        EMPTY,
        (
            (
                "return scores - slope * centred",
                "return scores - scores.mean() - slope * centred",
                "the mean score should not change",
            ),
            ("slope * centred", "slope * lengths", "b · (length − mean length)"),
            ("return scores - slope * centred", "return scores / lengths", "fit a line"),
            ("scores - slope", "scores + slope", "You add the slope"),
            ("if not centred.any():", "if False:", "return the scores as they are"),
        ),
        (("centred.square().sum()", "centred.abs().sum()"),),
    ),
    "10.1": Key(
        (
            (
                "    return prompts[test:], prompts[:test]\n",
                "    chosen = set(list(dict.fromkeys(prompts))[:test])\n"
                "    return [p for p in prompts if p not in chosen], [p for p in prompts if p in chosen]\n",
            ),
        ),
        "is in both parts",
        (
            ("[p for p in prompts if p in chosen]", "list(chosen)", "a prompt was lost or doubled"),
            ("return [p for p in prompts if p not in chosen], ", "return ", "Return two lists"),
            (
                "[p for p in prompts if p not in chosen], [p for p in prompts if p in chosen]",
                "[p for p in prompts if p in chosen], [p for p in prompts if p not in chosen]",
                "the first different texts",
            ),
        ),
        (("[:test]", "[-test:]"),),
    ),
    "10.2": Key(
        body("return [(a, b) for i, a in enumerate(ranking) for b in ranking[i + 1 :] if a != b]"),
        EMPTY,
        (
            (" if a != b", "", "compares a text with itself"),
            ("(a, b) for", "(b, a) for", "the wrong way round"),
            ("ranking[i + 1 :]", "ranking[i + 1 : i + 2]", "is missing"),
        ),
        (("ranking[i + 1 :]", "ranking[i + 1 :] * 2"),),
    ),
    "10.3": Key(
        (("place < prompt + completion", "place <= prompt + completion"),),
        "The end token is not learned",
        (
            ("place >= prompt and ", "", "The prompt is learned"),
            (" and place <= prompt + completion", "", "The padding is learned"),
            (
                "place >= prompt and place <= prompt + completion",
                "prompt - 1 <= place < prompt + completion",
                "one place too early",
            ),
        ),
    ),
    "11.1": Key(
        (
            (
                "-(advantages * logp).sum() / buffer.rows",
                "-torch.where(buffer.is_action, advantages * logp, 0.0).sum() / buffer.rows",
            ),
        ),
        "behind the end of a text reach your loss",
        (
            ("loss = -torch", "loss = torch", "does not point where the exact policy gradient points"),
            ("lr=lr", "lr=lr + 0.1", "give `lr` to the optimizer"),
            ("lmgym.Stream(seed, update)", "lmgym.Stream(0, update)", "must be equal"),
        ),
        (("returns[buffer.is_action].mean()", "returns"),),
    ),
    "11.2": Key(
        (("buffer.is_action & (buffer.tokens != env.model.eos_ids[0])", "buffer.is_action"),),
        "does not learn to stop",
        (
            ("loss = -torch", "loss = torch", "does not point where the exact policy gradient points"),
            ("advantages * logp, 0.0", "logp, 0.0", "does not point where the exact policy gradient points"),
        ),
    ),
    "11.3": Key(
        (
            ("advantages = ...  #", f"advantages = {_ADVANTAGES}  #"),
            (
                "loss = ...  #",
                "loss = -torch.where(buffer.is_action, advantages.view(-1, 1) * logp, 0.0).sum() / buffer.rows  #",
            ),
        ),
        "raises an error",
        (
            ("loss = -torch", "loss = torch", "does not point where the exact policy gradient points"),
            (
                "* logp, 0.0)",
                "* logp / buffer.is_action.sum(1, keepdim=True), 0.0)",
                "no division by the length of a row",
            ),
        ),
        ((".view(-1, 1) * logp", ".flatten().flip(0)[:, None] * logp"),),
    ),
    "12.1": Key(
        (("statistics.stdev(scores)", "statistics.stdev(scores) / len(scores) ** 0.5"),),
        "You forget to divide by √n",
        (
            ("len(scores) ** 0.5", "len(scores)", "divide by its square root"),
            ("statistics.stdev", "statistics.pstdev", "divide by n − 1"),
            ("t * statistics", "statistics", "You forget t"),
            ("mean - half, mean + half", "mean + half, mean - half", "The order is (low, high)"),
        ),
        (("statistics.mean(scores)", "statistics.median(scores)"),),
    ),
    "12.2": Key(
        body(_GAE_TEST),
        EMPTY,
        (
            (
                "gamma, lam = [1.0, -2.0, 0.5, 3.0], [0.3, 0.9, -0.4, 2.0], 0.9, 0.7",
                "gamma, lam = [1.0, -2.0, 0.5, 3.0], [0.3, 0.9, -0.4, 2.0], 1.0, 0.7",
                "γ is not used",
            ),
            ("0.9, 0.7", "0.9, 1.0", "λ is not used"),
            ("return all(", "return True or all(", "You find 0 of 8"),
            ("< 1e-6", "< 0", "You refuse a right function"),
        ),
    ),
    "12.3": Key(
        body(_LOSS_TEST),
        EMPTY,
        (
            ("(0.5, 0.85, 1.15, 1.5)", "(0.85, 1.15)", "nothing is clipped"),
            ("(2.0, -2.0)", "(2.0,)", "One that you accept"),
            ("> 1e-9", "> -1", "You refuse a right function"),
        ),
    ),
    "12.4": Key(
        (("sum(means) / len(means)", "sum(m * n for m, n in zip(means, counts)) / sum(counts)"),),
        "Every minibatch counts the same",
        (
            ("sum(m * n for m, n in zip(means, counts)) / sum(counts)", "means[-1]", "the last minibatch"),
            ("/ sum(counts)", "/ len(counts)", "divide by the number of tokens"),
            ("sum(m * n for m, n in zip(means, counts)) / sum(counts)", "sum(means)", "You add the means up"),
        ),
        (("m * n for", "m * n * n for"),),
    ),
}

"""The keys of lessons 5 to 8."""

# A change reads best on one line.
# ruff: noqa: E501

from answers.model import EMPTY, Key, body

ANSWERS = {
    "5.1": Key(
        body("return torch.softmax(reference.log() + scores / beta, 0)"),
        EMPTY,
        (
            (
                "torch.softmax(reference.log() + scores / beta, 0)",
                "reference * torch.exp(scores / beta)",
                "do not add up to 1",
            ),
            ("reference.log() + ", "", "You forget the reference"),
            ("scores / beta", "scores * beta", "You multiply by β"),
            ("+ scores", "- scores", "The sign of the score is wrong"),
            (
                "return torch.softmax(reference.log() + scores / beta, 0)",
                "p = reference * torch.exp(scores / beta)\n    return p / p.sum()",
                "overflows",
            ),
        ),
        (("scores / beta", "scores / beta / 2"),),
    ),
    "5.2": Key(
        body("return beta * (reference.log() + scores / beta).logsumexp(0)"),
        EMPTY,
        (
            ("beta * (ref", "(ref", "You forget the factor β"),
            (
                "beta * (reference.log() + scores / beta).logsumexp(0)",
                "(reference.log() + scores / beta).logsumexp(0).exp()",
                "β times its logarithm",
            ),
            ("reference.log() + ", "", "You forget π_ref"),
            (
                "beta * (reference.log() + scores / beta).logsumexp(0)",
                "(torch.softmax(reference.log() + scores / beta, 0) * scores).sum()",
                "the KL is still to be paid",
            ),
            (
                "(reference.log() + scores / beta).logsumexp(0)",
                "(reference * torch.exp(scores / beta)).sum().log()",
                "use logsumexp",
            ),
        ),
        (("scores / beta", "scores"),),
    ),
    "5.3": Key(
        (("(reference * torch", "(policy * torch"),),
        "the expectation is under the policy",
        (
            (
                "(policy * torch.log(policy / reference))",
                "(reference * torch.log(reference / policy))",
                "the other way round",
            ),
            ("torch.log(policy / reference)", "torch.log(reference / policy)", "The sign is wrong"),
            ("torch.log(", "torch.log2(", "in bits"),
            ("policy * torch.log", "torch.log", "do not weight the logarithms"),
        ),
        (("torch.log(policy / reference)", "torch.log(policy / reference).abs()"),),
    ),
    "5.4": Key(
        (("rewards[:, -1] += scores", "rewards[torch.arange(len(scores)), is_action.sum(1) - 1] += scores"),),
        "A short row never gets its score",
        (
            (
                "rewards[torch.arange(len(scores)), is_action.sum(1) - 1] += scores",
                "rewards = rewards + scores[:, None]",
                "Every token gets the score",
            ),
            ("-beta * (logp", "beta * (logp", "The sign of the KL is wrong"),
            ("-beta * (logp - reference_logp)", "-(logp - reference_logp)", "You forget β"),
        ),
        (("is_action.sum(1) - 1", "is_action.sum(1) - 2"), ("logp - reference_logp", "logp")),
    ),
    "5.5": Key(
        (("1 - kl / target", "kl / target - 1"),),
        "a larger KL must cost more",
        (
            ("    error = max(-0.2, min(0.2, error))\n", "", "cut the error off"),
            (" * completions / horizon", " / horizon", "forget the number of completions"),
            ("return beta * (1", "return (1", "multiply by the old β"),
        ),
        (("max(-0.2, min(0.2, error))", "min(0.2, error)"), ("max(-0.2", "max(0.0")),
    ),
    "5.6": Key(
        body("r = logp - reference_logp\nreturn torch.exp(-r) - 1 + r"),
        EMPTY,
        (
            ("torch.exp(-r) - 1 + r", "r", "You return r itself"),
            ("logp - reference_logp", "reference_logp - logp", "are exchanged"),
            (" - 1 + r", " - 1", "You forget + r"),
            ("torch.exp(-r) - 1 + r", "r.square() / 2", "This is k2"),
            ("torch.exp(-r) - 1 + r", "(torch.exp(-r) - 1 + r).mean()", "one estimate for each text"),
        ),
        (("torch.exp(-r)", "torch.exp(-r / 2)"),),
    ),
    "6.1": Key(
        body(
            "ratio = (logp - old_logp).exp()\n"
            "return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)"
        ),
        EMPTY,
        (
            ("return -torch", "return torch", "The sign is wrong"),
            (
                "torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)",
                "ratio.clamp(1 - clip, 1 + clip) * advantages",
                "You clip without the minimum",
            ),
            ("ratio.clamp(1 - clip, 1 + clip)", "ratio", "You do not clip"),
            ("torch.minimum", "torch.maximum", "You take the maximum"),
            (
                "torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)",
                "torch.minimum(ratio, ratio.clamp(1 - clip, 1 + clip)) * advantages",
                "multiply by the advantage first",
            ),
            ("(logp - old_logp).exp()", "(logp - old_logp)", "the exponential of the difference"),
            ("logp - old_logp", "old_logp - logp", "upside down"),
            ("(logp - old_logp).exp()", "(logp - old_logp).exp().detach()", "The loss has no gradient"),
        ),
        (("1 + clip", "1 + 2 * clip"), ("1 - clip", "0")),
    ),
    "6.2": Key(
        (
            (
                "(ratios > 1 - clip) & (ratios < 1 + clip)",
                "torch.where(advantages > 0, ratios < 1 + clip, ratios > 1 - clip)",
            ),
        ),
        "pulled back",
        (
            ("return torch.where", "return ~torch.where", "This is the opposite"),
            (
                "ratios < 1 + clip, ratios > 1 - clip",
                "ratios > 1 - clip, ratios < 1 + clip",
                "The two bounds are exchanged",
            ),
        ),
        (("1 + clip", "1 + clip / 4"), ("advantages > 0", "advantages > 9")),
    ),
    "6.3": Key(
        (
            ("        old_logp = logp.detach()\n", ""),
            (
                "    for _ in range(epochs):\n",
                "    old_logp = torch.log_softmax(logits, 0)[actions]\n    for _ in range(epochs):\n",
            ),
        ),
        "The ratio is always 1",
        (
            ("ratio.clamp(1 - clip, 1 + clip) * advantages", "ratio * advantages", "Nothing is clipped"),
            ("range(epochs)", "range(1)", "only one step"),
        ),
        (("torch.minimum", "torch.maximum"), ("z - lr", "z + lr"), ("gain.mean()", "gain.sum()")),
    ),
    "6.4": Key(
        body("clipped = ((logp - old_logp).exp() - 1).abs() > clip\nreturn clipped[is_action].double().mean()"),
        EMPTY,
        (
            ("clipped[is_action].double()", "clipped.double()", "You count the padding"),
            (
                "clipped[is_action].double().mean()",
                "(clipped & is_action).double().mean()",
                "divide by the number of tokens",
            ),
            ("((logp - old_logp).exp() - 1).abs() > clip", "(logp - old_logp).exp() > 1 + clip", "only ratios above"),
            ("((logp - old_logp).exp() - 1).abs() > clip", "(logp - old_logp).exp() < 1 - clip", "only ratios below"),
            ("((logp - old_logp).exp() - 1).abs()", "(logp - old_logp).abs()", "compare the ratio itself"),
            ("abs() > clip", "abs() <= clip", "the share that is not clipped"),
        ),
        (("> clip", "> 3 * clip"),),
    ),
    "6.5": Key(
        (
            (
                "    centred = advantages - advantages.mean()\n",
                "    kept = advantages[is_action]\n    centred = advantages - kept.mean()\n",
            ),
            ("(advantages.std() + 1e-8)", "(kept.std(unbiased=False) + 1e-8)"),
        ),
        "numbers in the padding",
        (
            ("advantages - kept.mean()", "advantages", "do not leave the mean in"),
            (" / (kept.std(unbiased=False) + 1e-8)", "", "standard deviation over the tokens is"),
            ("torch.where(is_action, scaled, 0.0)", "scaled", "The padding must stay 0"),
            (
                "torch.where(is_action, scaled, 0.0)",
                "torch.where(is_action, scaled + kept.mean(), 0.0)",
                "or add it back",
            ),
        ),
        (("scaled, 0.0", "-scaled, 0.0"), ("kept.std(unbiased=False)", "kept.var()")),
    ),
    "7.1": Key(
        body("return (scores - scores.mean()) / (scores.std() + 1e-4)"),
        EMPTY,
        (
            (" / (scores.std() + 1e-4)", "", "that is Dr. GRPO"),
            ("(scores - scores.mean())", "scores", "do not subtract the mean"),
            ("scores.std()", "scores.var()", "divide by its square root"),
            ("(scores.std() + 1e-4)", "scores.std()", "leave out the 0.0001"),
        ),
        (("scores.std()", "scores.std(unbiased=False)"),),
    ),
    "7.2": Key(
        (("scores.view(group, -1)", "scores.view(-1, group)"), ("table.mean(0)", "table.mean(1, keepdim=True)")),
        "the rows of a group are adjacent",
        (
            ("table.mean(1, keepdim=True)", "table.mean()", "the mean of the whole rollout"),
            ("scores.view(-1, group)", "scores.view(group, -1)", "For 3 prompts"),
        ),
        (("table.mean(1, keepdim=True)", "table.median(1, keepdim=True).values"),),
    ),
    "7.3": Key(
        (
            (
                "    per_row = each.sum(1) / is_action.sum(1)\n    return per_row.mean()\n",
                "    return each.sum(1).mean()\n",
            ),
        ),
        "you divide by the length of its row",
        (
            ("each.sum(1).mean()", "each.sum() / is_action.sum()", "DAPO's mean"),
            ("each.sum(1).mean()", "each.mean()", "Dr. GRPO's constant"),
            (
                "torch.where(is_action, -advantages[:, None] * logp, 0.0)",
                "-advantages[:, None] * logp",
                "The padding has a gradient",
            ),
            ("-advantages", "advantages", "The sign is wrong"),
            ("each.sum(1).mean()", "each.sum()", "You sum over the rows"),
        ),
        (("each.sum(1).mean()", "each.sum(1).max()"),),
    ),
    "7.4": Key(
        body("at_most = probs.cumsum(0) ** n\nreturn at_most - torch.cat([at_most.new_zeros(1), at_most[:-1]])"),
        EMPTY,
        (
            (
                "return at_most - torch.cat([at_most.new_zeros(1), at_most[:-1]])",
                "return at_most",
                "subtract the one below",
            ),
            (
                "return at_most - torch.cat([at_most.new_zeros(1), at_most[:-1]])",
                "return probs**n",
                "that all n draws are text i",
            ),
            (
                "return at_most - torch.cat([at_most.new_zeros(1), at_most[:-1]])",
                "return probs",
                "the old probabilities",
            ),
            (
                "    at_most = probs.cumsum(0) ** n\n    return at_most - torch.cat([at_most.new_zeros(1), at_most[:-1]])",
                "    above = probs.flip(0).cumsum(0).flip(0) ** n\n    return above - torch.cat([above[1:], above.new_zeros(1)])",
                "the worst of n draws",
            ),
        ),
        (("** n", "** (n + 1)"), ("** n", "* n")),
    ),
    "8.1": Key(
        body("return -torch.nn.functional.logsigmoid(chosen - rejected).mean()"),
        EMPTY,
        (
            ("return -torch", "return torch", "The sign is wrong"),
            ("chosen - rejected", "rejected - chosen", "are exchanged"),
            (".mean()", ".sum()", "take the mean"),
            (
                "torch.nn.functional.logsigmoid(chosen - rejected)",
                "torch.sigmoid(chosen - rejected)",
                "You forget the logarithm",
            ),
            (
                "torch.nn.functional.logsigmoid(chosen - rejected)",
                "torch.sigmoid(chosen - rejected).log()",
                "use logsigmoid",
            ),
            (
                "torch.nn.functional.logsigmoid(chosen - rejected).mean()",
                "torch.sigmoid(chosen - rejected).mean().log()",
                "the mean of the logarithms",
            ),
        ),
        (("chosen - rejected", "(chosen - rejected) / 2"),),
    ),
    "8.2": Key(
        (
            (
                "    better, worse = scores[:-1], scores[1:]\n",
                "    first, second = torch.triu_indices(len(scores), len(scores), offset=1)\n"
                "    better, worse = scores[first], scores[second]\n",
            ),
        ),
        "You compare neighbours only",
        (
            (".mean()", ".sum()", "a long ranking counts more"),
            ("better - worse", "worse - better", "The order is reversed"),
            ("better - worse", "scores[:, None] - scores", "in both orders"),
        ),
        (("offset=1", "offset=2"), ("offset=1", "offset=0")),
    ),
    "8.3": Key(
        body(
            "right = torch.sigmoid(margins)\nreturn -((1 - error_rate) * right + error_rate * (1 - right)).log().mean()"
        ),
        EMPTY,
        (
            (
                "((1 - error_rate) * right + error_rate * (1 - right)).log().mean()",
                "((1 - error_rate) * right.log() + error_rate * (1 - right).log()).mean()",
                "mix inside the logarithm",
            ),
            ("((1 - error_rate) * right + error_rate * (1 - right))", "right", "ε has no effect"),
            (
                "((1 - error_rate) * right + error_rate * (1 - right))",
                "(error_rate * right + (1 - error_rate) * (1 - right))",
                "are exchanged",
            ),
            ("return -", "return ", "The sign is wrong"),
        ),
        (("error_rate * (1 - right)", "error_rate / 2"),),
    ),
    "8.4": Key(
        (("values[:, -1]", "values[torch.arange(len(values)), is_token.sum(1) - 1]"),),
        "You read the padding",
        (
            ("is_token.sum(1) - 1", "is_token.sum(1) % 5", "one place too late"),
            ("is_token.sum(1) - 1", "is_token.sum(1) - 2", "the token before the last"),
            (
                "values[torch.arange(len(values)), is_token.sum(1) - 1]",
                "torch.where(is_token, values, 0.0).sum(1) / is_token.sum(1)",
                "the mean over the text",
            ),
            ("values[torch.arange(len(values)), is_token.sum(1) - 1]", "values[:, 0]", "the first token"),
            ("is_token.sum(1) - 1", "is_token.sum(1)", "raises an error: IndexError"),
        ),
    ),
    "8.5": Key(
        body(
            "total = 0.0\nindex = (probability * 10).long().clamp(max=9)\nfor i in range(10):\n    inside = index == i\n"
            "    if inside.any():\n        gap = probability[inside].mean() - won[inside].double().mean()\n"
            "        total += inside.double().mean() * gap.abs()\nreturn total"
        ),
        EMPTY,
        (
            ("inside.double().mean() * gap.abs()", "gap.abs()", "without weights"),
            ("gap.abs()", "gap", "forget the absolute value"),
            (".clamp(max=9)", "", "belongs to the last bin"),
        ),
        (("probability * 10", "probability * 5"),),
    ),
    "8.6": Key(
        (
            (
                "beta * (chosen_logp - rejected_logp)",
                "beta * ((chosen_logp - chosen_reference) - (rejected_logp - rejected_reference))",
            ),
        ),
        "The reference is missing",
        (
            ("margin = beta", "margin = -beta", "Chosen and rejected are exchanged"),
            (
                "(chosen_logp - chosen_reference) - (rejected_logp - rejected_reference)",
                "(chosen_logp + chosen_reference) - (rejected_logp + rejected_reference)",
                "The signs of the reference are wrong",
            ),
            ("beta * ((", "((", "You forget β"),
            (
                "beta * ((chosen_logp - chosen_reference) - (rejected_logp - rejected_reference))",
                "((chosen_logp - chosen_reference) - (rejected_logp - rejected_reference)) / beta",
                "You divide by β",
            ),
        ),
        (("logsigmoid(margin)", "logsigmoid(margin.abs())"), (".mean()", ".median()")),
    ),
}

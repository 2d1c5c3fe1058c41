"""The keys of lessons 0 to 4."""

# A change reads best on one line.

from answers.model import EMPTY, Key, body

ANSWERS = {
    "0.1": Key(
        body("return sum(gamma**t * r for t, r in enumerate(rewards))"),
        EMPTY,
        (
            ("gamma**t * r", "r", "You do not discount"),
            ("gamma**t", "gamma ** (t + 1)", "starts one step too early"),
            ("gamma**t", "gamma * t", "γ·t instead of γ to the power t"),
            ("gamma**t", "(gamma if t else 1)", "every reward by the same γ"),
        ),
        (("gamma**t", "gamma ** (t // 2)"),),
    ),
    "0.2": Key(
        (
            ("    terminated = False", "    terminated = truncated = False"),
            ("while not terminated:", "while not (terminated or truncated):"),
        ),
        "after the episode has ended",
        (
            ("while not (terminated or truncated):", "while not truncated:", "after the episode has ended"),
            (
                "        total += reward",
                "        if not (terminated or truncated):\n            total += reward",
                "leave out the reward of the last step",
            ),
        ),
        (
            ("total += reward", "total = reward"),
            ("while not (terminated or truncated):", "for _ in range(2):"),
        ),
    ),
    "0.3": Key(
        body("return sum(letters**k for k in range(budget)) + letters**budget"),
        EMPTY,
        (
            (
                "sum(letters**k for k in range(budget)) + letters**budget",
                "letters**budget",
                "not those that end earlier",
            ),
            (
                "sum(letters**k for k in range(budget)) + letters**budget",
                "(letters + 1) ** budget",
                "stops at its first end token",
            ),
            (" + letters**budget", "", "that reach the budget without an end"),
        ),
        (("range(budget)", "range(1, budget)"),),
    ),
    "1.1": Key(
        body("z = logits - logits.max()\nreturn z - z.exp().sum().log()"),
        EMPTY,
        (
            ("logits - logits.max()", "logits", "subtract the largest logit first"),
            ("return z - z.exp().sum().log()", "return z.exp() / z.exp().sum()", "take their logarithm"),
            ("return z - z.exp().sum().log()", "return (z - z.exp().sum().log()) / 0.6931471805599453", "in nats"),
            (" - z.exp().sum().log()", "", "You do not normalise"),
        ),
        (("z.exp().sum().log()", "z.exp().mean().log()"),),
    ),
    "1.2": Key(
        (("torch.log_softmax(logits, 0) / temperature", "torch.log_softmax(logits / temperature, 0)"),),
        "do not add up to 1",
        (
            ("logits / temperature", "logits * temperature", "You multiply by the temperature"),
            ("logits / temperature", "logits", "has no effect"),
        ),
        (("logits / temperature", "logits / temperature**2"),),
    ),
    "1.3": Key(
        body(
            "chosen = log_probs.gather(2, tokens[..., None])[..., 0]\nreturn torch.where(is_action, chosen, 0.0).sum(1)"
        ),
        EMPTY,
        (
            ("torch.where(is_action, chosen, 0.0).sum(1)", "chosen.sum(1)", "You count the padding"),
            (".sum(1)", ".sum(1) / is_action.sum(1)", "You take the mean over the tokens"),
            (".sum(1)", ".sum(1).exp()", "return their logarithm"),
            (".sum(1)", ".sum()", "you return one number; expected an array of shape [3]"),
        ),
        (("is_action, chosen", "tokens != 0, chosen"),),
    ),
    "1.4": Key(
        (("if cumulative < u:", "if cumulative > u:"),),
        "wrong way round",
        (
            ("cumulative > u", "cumulative >= u", "compare with >, not >="),
            ("return token\n", "return int(probs.argmax())\n", "greedy decoding"),
        ),
        (("cumulative += probs[token]", "cumulative = probs[token]"),),
    ),
    "1.5": Key(
        body("return torch.where(probs > 0, -probs * probs.log(), 0.0).sum()"),
        EMPTY,
        (
            (
                "torch.where(probs > 0, -probs * probs.log(), 0.0).sum()",
                "-(probs * probs.log()).sum()",
                "a probability of 0 contributes 0",
            ),
            ("-probs * probs.log()", "probs * probs.log()", "The sign is wrong"),
            ("probs.log()", "probs.log2()", "in bits"),
            ("-probs * probs.log()", "-probs.log()", "forget to weight"),
            (".sum()", ".mean()", "weight them by their probabilities and sum"),
        ),
    ),
    "2.1": Key(
        body("probs = torch.softmax(logits, 0)\nreturn probs * (scores - (probs * scores).sum())"),
        EMPTY,
        (
            ("(scores - (probs * scores).sum())", "scores", "forget to subtract the mean score"),
            ("return probs * ", "return ", "forget the factor π_k"),
            ("return probs", "return -probs", "The sign is wrong"),
            ("(probs * scores).sum()", "scores.mean()", "plain mean of the scores"),
        ),
        (("return probs *", "return probs.square() *"),),
    ),
    "2.2": Key(
        body("g = -torch.softmax(logits, 0)\ng[action] += 1\nreturn g"),
        EMPTY,
        (
            ("return g", "return g * torch.softmax(logits, 0)[action]", "gradient of π(a), not of log π(a)"),
            ("return g", "return -g", "The sign is wrong"),
            ("-torch.softmax(logits, 0)", "torch.zeros_like(logits)", "You leave out −π"),
        ),
        (("g[action] += 1", "g[0] += 1"),),
    ),
    "2.3": Key(
        (
            ("probs = torch.softmax(logits, 0)", "logp = torch.log_softmax(logits, 0)"),
            ("-(scores * probs[actions]).mean()", "-(scores * logp[actions]).mean()"),
        ),
        "differentiate the probability",
        (
            ("-(scores", "(scores", "The sign is wrong"),
            ("torch.log_softmax(logits, 0)", "logits", "must be normalised"),
            ("torch.log_softmax(logits, 0)", "torch.log_softmax(logits, 0).detach()", "The loss has no gradient"),
            (".mean()", ".sum()", "You sum over the tokens"),
            (".mean()", "", "The loss must be one number"),
        ),
        (("scores * logp[actions]", "logp[actions]"), ("scores * logp", "scores.square() * logp")),
    ),
    "2.4": Key(
        (("            z += lr * z.grad\n", "            z += lr * z.grad\n        z.grad = None\n"),),
        "set z.grad to None",
        (
            ("z += lr", "z -= lr", "You go downhill"),
            ("range(steps)", "range(steps + 1)", "one step too many"),
        ),
        (("z += lr * z.grad", "z += lr * z.grad / z.grad.norm()"),),
    ),
    "3.1": Key(
        body("return scores - (scores.sum() - scores) / (len(scores) - 1)"),
        EMPTY,
        (
            ("(scores.sum() - scores) / (len(scores) - 1)", "scores.mean()", "contains the completion's own score"),
            ("(len(scores) - 1)", "len(scores)", "there are G − 1 of them"),
            ("scores - (scores.sum()", "(scores.sum()", "subtract it from the scores"),
        ),
        (("(len(scores) - 1)", "1"),),
    ),
    "3.2": Key(
        (
            (
                "    best = scores.max()\n    return scores - best\n",
                "    found = scores.clone()\n    for i in range(len(scores)):\n"
                "        others = torch.cat([scores[:i], scores[i + 1 :]])\n"
                "        found[i] = scores[i] - others.max()\n    return found\n",
            ),
        ),
        "is its own score",
        (
            ("others.max()", "scores.mean()", "contains the completion's own score"),
            ("others.max()", "others.mean()", "the task is the best of the others"),
            ("scores[i] - others.max()", "scores[i]", "There is no baseline"),
        ),
        (("others.max()", "scores[i] * 0.5"), ("others.max()", "others.min()")),
    ),
    "3.3": Key(
        body(
            "probs = torch.softmax(logits, 0)\ng = torch.eye(len(probs)) - probs\n"
            "weights = probs * g.square().sum(1)\nreturn (weights * scores).sum() / weights.sum()"
        ),
        EMPTY,
        (
            ("weights = probs * g.square().sum(1)", "weights = probs", "This is the mean score"),
            ("probs * g.square()", "g.square()", "forget to weight by the probabilities"),
            ("g.square().sum(1)", "g.square().sum(1).sqrt()", "|g| instead of |g|²"),
            (" / weights.sum()", "", "divide by the sum of the weights"),
        ),
        (("g.square().sum(1)", "g.square().sum(1).square()"),),
    ),
    "3.4": Key(
        (("rewards.cumsum(1)", "rewards.flip(1).cumsum(1).flip(1)"),),
        "the rewards before it",
        (
            (".cumsum(1).flip(1)", ".cumsum(1)", "The order of the tokens is reversed"),
            (
                "rewards.flip(1).cumsum(1).flip(1)",
                "rewards.flip(1).cumsum(1).flip(1) - rewards",
                "leave out the reward of the token itself",
            ),
            (
                "rewards.flip(1).cumsum(1).flip(1)",
                "rewards.sum(1, keepdim=True).expand_as(rewards)",
                "the whole return",
            ),
            ("rewards.flip(1).cumsum(1).flip(1)", "rewards.flip(0).cumsum(0).flip(0)", "You sum over the rows"),
        ),
        (("cumsum(1)", "cumprod(1)"),),
    ),
    "3.5": Key(
        (("kept.mean()", "kept.sum() / is_action.sum()"),),
        "divide by the number of tokens",
        (
            ("is_action.sum()", "len(returns)", "divide by the number of rows"),
            ("kept.sum() / is_action.sum()", "(kept.sum(1) / is_action.sum(1)).mean()", "a mean per row"),
            ("kept.sum() / is_action.sum()", "returns.mean()", "You count the padding"),
            ("torch.where(is_action, returns, 0.0)", "returns * is_action", "choose with torch.where"),
        ),
    ),
    "4.1": Key(
        body("return rewards + gamma * torch.cat([values[1:], values.new_tensor([bootstrap])]) - values"),
        EMPTY,
        (
            ("[bootstrap]", "[0.0]", "continues with `bootstrap`"),
            ("gamma * torch", "torch", "You forget γ"),
            (
                "rewards + gamma * torch.cat([values[1:], values.new_tensor([bootstrap])]) - values",
                "rewards - gamma * torch.cat([values[1:], values.new_tensor([bootstrap])]) + values",
                "the other way round",
            ),
            ("torch.cat([values[1:], values.new_tensor([bootstrap])])", "values", "one place later"),
        ),
        (("values[1:], values", "values[:-1], values"),),
    ),
    "4.2": Key(
        body(
            "advantages = torch.zeros_like(deltas)\nrunning = 0.0\nfor t in reversed(range(len(deltas))):\n"
            "    running = deltas[t] + gamma * lam * running\n    advantages[t] = running\nreturn advantages"
        ),
        EMPTY,
        (
            ("gamma * lam * running", "gamma * running", "You forget λ"),
            ("gamma * lam * running", "lam * running", "You forget γ"),
            ("reversed(range(len(deltas)))", "range(len(deltas))", "You go forwards"),
            ("deltas[t] + gamma * lam * running", "deltas[t]", "temporal differences themselves"),
        ),
        (("running = deltas[t] +", "running = deltas[0] +"),),
    ),
    "4.3": Key(
        (
            (
                "        next_value = values[:, t + 1] if t + 1 < steps else bootstrap\n",
                "        next_value = bootstrap\n        if t + 1 < steps:\n"
                "            next_value = torch.where(is_action[:, t + 1], values[:, t + 1], bootstrap)\n",
            ),
        ),
        "a value from the padding",
        (
            (
                "values[:, t + 1], bootstrap)",
                "values[:, t + 1], 0.0)\n        else:\n            next_value = torch.zeros_like(bootstrap)",
                "You never use `bootstrap`",
            ),
            (
                "values[:, t + 1], bootstrap)",
                "values[:, t + 1], values[:, t])\n        else:\n            next_value = values[:, t]",
                "that token's own value",
            ),
        ),
        (("delta + gamma * lam * running", "delta + gamma * running"), ("is_action[:, t + 1]", "is_action[:, t]")),
    ),
    "4.4": Key(
        (
            ("    ended = terminated | truncated\n", ""),
            ("torch.where(ended, 0.0, last_values)", "torch.where(truncated, last_values, 0.0)"),
        ),
        "A truncated row gets 0",
        (
            ("torch.where(truncated, last_values, 0.0)", "last_values", "You bootstrap every row"),
            ("torch.where(truncated", "torch.where(terminated", "are exchanged"),
        ),
        (("last_values, 0.0", "last_values.abs(), last_values"),),
    ),
    "4.5": Key(
        body("if returns.var() == 0:\n    return 0.0\nreturn 1 - (returns - values).var() / returns.var()"),
        EMPTY,
        (
            ("return 1 - (returns", "return (returns", "subtract it from 1"),
            ("(returns - values).var()", "(returns - values).square().mean()", "a constant error does not count"),
            (
                "    return 0.0\n    return 1 - (returns - values).var() / returns.var()",
                "    return 0.0\n    return max(0.0, float(1 - (returns - values).var() / returns.var()))",
                "cut it off at 0",
            ),
            ("if returns.var() == 0:", "if False:", "return 0 then"),
            (
                "return 1 - (returns - values).var() / returns.var()",
                "return torch.corrcoef(torch.stack([values, returns]))[0, 1] ** 2",
                "You square the correlation",
            ),
        ),
        (("(returns - values).var()", "(returns - values).std()"),),
    ),
}

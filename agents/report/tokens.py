"""Completions with each token shaded by its reward, KL, value or advantage."""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest

from agents.report.formatting import format_number, format_signed
from agents.report.html import Html, join, small_print, tag
from agents.report.read import QUANTITIES
from agents.report.values import ROUNDING, Row, as_float, nearly_equal

EXPLANATIONS = {
    "reward": "Reward: what the environment pays for this token, in score. The last token gets the score of the whole "
    "completion; every token costs β·KL.",
    "kl": "KL: log π(token) − log π_ref(token), in nats. A token that costs KL is not a bad token: the policy has made "
    "it more probable than the reference does, and the score may be worth that price.",
    "value": "Value: the critic's estimate, before this token is chosen, of all rewards still to come, in score. It "
    "judges the state, not the token.",
    "advantage": "Advantage: how much better the rewards from this token on were than the critic expected (GAE), in "
    "score. It depends on the later tokens too, so a harmless token in a good completion is blue.",
}

WITHOUT_CRITIC = (
    "Advantage: the rewards from this token on, later ones discounted (GAE without a critic), in score. It depends on "
    "the later tokens too, so a harmless token in a good completion is blue."
)


def colour_scales(samples: Sequence[Row]) -> dict[str, float]:
    """The quantities that tokens have, each with the size at which its colour is full.

    Without a critic every value is 0; the page then does not offer values at all.
    """
    scales = {}
    for name in QUANTITIES:
        sizes = sorted(
            abs(value)
            for row in samples
            for token in row.get("tokens", [])
            if (value := as_float(token.get(name))) is not None
        )
        if sizes and (sizes[-1] > 0 or name != "value"):
            # A quantile, so that one extreme token does not bleach the rest.
            scales[name] = sizes[math.ceil(0.98 * len(sizes)) - 1] or sizes[-1] or 1.0
    return scales


def _shade(value: float, scale: float) -> str:
    """From −1 to 1, by the root: the last token's score is far larger than the KL of the others, and both must show."""
    return f"{math.copysign(min(1.0, math.sqrt(abs(value) / scale)), value):.2f}"


def selector_css(scales: Mapping[str, float]) -> str:
    """CSS rules of the selector. In a browser without `:has` the page shows the first quantity."""
    if not scales:
        return ""
    first, *others = scales
    rules = [f".t{{--x:var(--{first},0)}}", f".legend-{first}{{display:flex}}", f".about-{first}{{display:block}}"]
    for name in others:
        chosen = f"#generations:has(#by-{name}:checked)"
        rules.append(f"{chosen} .completion .t{{--x:var(--{name},0)}}")
        rules.append(f"{chosen} .legend-{name}{{display:flex}}")
        rules.append(f"{chosen} .about-{name}{{display:block}}")
        rules.append(f"{chosen} .legend-{first},{chosen} .about-{first}{{display:none}}")
    return "\n".join(rules)


def generations(samples: Sequence[Row]) -> Html:
    """The section with completions before and after training, side by side; nothing without samples."""
    if not samples:
        return Html("")
    scales = colour_scales(samples)
    if nearly_equal((row.get("gold"), row.get("score")) for row in samples):
        samples = [row | {"score": None} for row in samples]  # the score is the gold score itself
    prompts: dict[str, dict[str, list[Row]]] = {}
    for row in samples:
        prompts.setdefault(row["prompt"], {"before": [], "after": []})[row["when"]].append(row)
    pairs = [
        (prompt, before, after)
        for prompt, sides in prompts.items()
        for before, after in zip_longest(sides["before"], sides["after"])
    ]
    return side_by_side([(prompt, [("Before", before), ("After", after)]) for prompt, before, after in pairs], scales)


def side_by_side(entries: Sequence[tuple[str, Sequence[tuple[str, Row | None]]]], scales: Mapping[str, float]) -> Html:
    """Prompts, each with titled completions beside one another, and the selector of the colours.

    Args:
        entries: each prompt and its completions; None says that there is no completion.
        scales: of the quantities, see `colour_scales`.
    """
    articles = [
        tag(
            "article",
            tag("h3", f"Prompt {count}"),
            tag("div", prompt, class_="text prompt", dir="auto"),
            tag(
                "div",
                *(_completion(title, row, scales) for title, row in completions),
                class_="pair" if len(completions) == 2 else "pair several",
            ),
        )
        for count, (prompt, completions) in enumerate(entries, start=1)
    ]
    return join(_selector(scales) if scales else "", *articles)


def _selector(scales: Mapping[str, float]) -> Html:
    first = next(iter(scales))
    options = [
        tag(
            "label",
            tag("input", type="radio", name="by", id=f"by-{name}", checked="" if name == first else None),
            QUANTITIES[name],
        )
        for name in scales
    ]
    explanations = EXPLANATIONS | ({} if "value" in scales else {"advantage": WITHOUT_CRITIC})
    return join(
        tag(
            "div",
            tag("fieldset", tag("legend", "Colour tokens by"), *options),
            *(_legend(name, scale) for name, scale in scales.items()),
            class_="selector",
        ),
        *(tag("p", explanations[name], class_=f"about about-{name}") for name in scales),
        small_print(
            "Orange is below 0, blue is above. Point at a token, tap it or click it to see its numbers, or open the "
            "table below a completion."
        ),
    )


def _legend(name: str, scale: float) -> Html:
    # The shade is the root of the value, so a quarter of the scale has half of the colour.
    texts = {
        -1.0: f"≤ {format_number(-scale, 2)}",
        -0.5: format_number(-scale / 4, 2),
        0.0: "0",
        0.5: format_number(scale / 4, 2),
        1.0: f"≥ {format_number(scale, 2)}",
    }
    swatches = [tag("span", text, class_="t", style=f"--x:{shade:g}") for shade, text in texts.items()]
    return tag("div", *swatches, class_=f"legend legend-{name}", aria_label=f"Colours of {name}")


def _completion(title: str, row: Row | None, scales: Mapping[str, float]) -> Html:
    if row is None:
        return tag("div", tag("h4", title), small_print("No completion."), class_="completion")
    tokens = row.get("tokens", [])
    facts = [
        f"{name} {format_number(row[name], 3)}" for name in ("gold", "score") if as_float(row.get(name)) is not None
    ]
    facts += [f"{len(tokens)} tokens"] if tokens else []
    facts += [f"finish: {row['finish_reason']}"] if row.get("finish_reason") else []
    text = [_token(token, scales) for token in tokens] if tokens else [row["completion"]]
    return tag(
        "div",
        tag("h4", title, " ", tag("span", " · ".join(facts), class_="latest")),
        tag("div", *text, class_="text", dir="auto"),
        _token_table(tokens, scales) if tokens and scales else "",
        class_="completion",
    )


def _token(token: Row, scales: Mapping[str, float]) -> Html:
    """A shaded token. Its title shows under a pointer, and by the style sheet where it is tapped or clicked.

    A tabindex of −1 gives it the focus on a tap, and leaves hundreds of tokens out of the Tab order: from the keyboard
    the same numbers are in the table.
    """
    shades = [
        f"--{name}:{_shade(value, scale)}"
        for name, scale in scales.items()
        if (value := as_float(token.get(name))) is not None
    ]
    numbers = [f"{name} {_signed(token.get(name))}" for name in scales]
    title = "\n".join([json.dumps(token["text"], ensure_ascii=False), *numbers])
    return tag("span", _shown(token["text"]), class_="t", style=";".join(shades), title=title, tabindex=-1)


def _signed(value: object) -> str:
    """A quantity with its sign; rounding error is shown as 0."""
    finite = as_float(value)
    return format_signed(0.0 if finite is not None and abs(finite) < ROUNDING else finite)


def _shown(text: str) -> str:
    """A token's text in which a line break, a tab and an empty text are visible."""
    return text.replace("\n", "↵\n").replace("\t", "⇥\t") or "∅"


def _token_table(tokens: Sequence[Row], scales: Mapping[str, float]) -> Html:
    """The numbers of every token, reachable from the keyboard and independent of colours."""
    columns = tag("tr", *(tag("th", title, scope="col") for title in ("Token", *(QUANTITIES[n] for n in scales))))
    rows = [
        tag(
            "tr",
            tag("th", _shown(token["text"]).rstrip("\n"), scope="row", class_="text"),
            *(tag("td", _signed(token.get(name))) for name in scales),
        )
        for token in tokens
    ]
    table = tag("table", tag("thead", columns), tag("tbody", *rows), class_="numbers")
    return tag("details", tag("summary", "Numbers of each token"), table)

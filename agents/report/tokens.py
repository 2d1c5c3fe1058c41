"""Completions with each token shaded by its reward, KL, value or advantage."""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest

from agents.report.html import Html, join, note, number, same, signed, tag
from agents.report.read import QUANTITIES, Row, as_float


def quantities(samples: Sequence[Row]) -> dict[str, float]:
    """The quantities that tokens have, each with the size at which its colour is full."""
    scales = {}
    for name in QUANTITIES:
        sizes = sorted(
            abs(value)
            for row in samples
            for token in row.get("tokens", [])
            if (value := as_float(token.get(name))) is not None
        )
        if sizes:
            # One wild token must not bleach the rest.
            scales[name] = sizes[math.ceil(0.98 * len(sizes)) - 1] or sizes[-1] or 1.0
    return scales


def _shade(value: float, scale: float) -> str:
    """From −1 to 1, by the root: the score at the last token dwarfs the KL at the others, and both must show."""
    return f"{math.copysign(min(1.0, math.sqrt(abs(value) / scale)), value):.2f}"


def selector_css(scales: Mapping[str, float]) -> str:
    """Rules of the selector. Without `:has`, the page shows the first quantity."""
    if not scales:
        return ""
    first, *others = scales
    rules = [f".t{{--x:var(--{first},0)}}", f".legend-{first}{{display:flex}}"]
    for name in others:
        rules.append(f"#generations:has(#by-{name}:checked) .completion .t{{--x:var(--{name},0)}}")
        rules.append(f"#generations:has(#by-{name}:checked) .legend-{name}{{display:flex}}")
        rules.append(f"#generations:has(#by-{name}:checked) .legend-{first}{{display:none}}")
    return "\n".join(rules)


def generations(samples: Sequence[Row]) -> Html:
    """The section with completions before and after training."""
    if not samples:
        return Html("")
    scales = quantities(samples)
    if same((row.get("gold"), row.get("score")) for row in samples):
        samples = [row | {"score": None} for row in samples]  # the score is the gold score itself
    prompts: dict[str, dict[str, list[Row]]] = {}
    for row in samples:
        prompts.setdefault(row["prompt"], {"before": [], "after": []})[row["when"]].append(row)
    articles, number = [], 0
    for prompt, sides in prompts.items():
        for before, after in zip_longest(sides["before"], sides["after"]):
            number += 1
            articles.append(
                tag(
                    "article",
                    tag("h3", f"Prompt {number}"),
                    tag("div", prompt, class_="text prompt", dir="auto"),
                    tag("div", _sample("Before", before, scales), _sample("After", after, scales), class_="pair"),
                )
            )
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
    legends = []
    for name, scale in scales.items():
        # The shade is the root of the value, so a quarter of the scale has half of the colour.
        swatches = [
            tag("span", text, class_="t", style=f"--x:{shade}")
            for shade, text in (
                (-1, f"≤ {number(-scale, 2)}"),
                (-0.5, number(-scale / 4, 2)),
                (0, "0"),
                (0.5, number(scale / 4, 2)),
                (1, f"≥ {number(scale, 2)}"),
            )
        ]
        legends.append(tag("div", *swatches, class_=f"legend legend-{name}", aria_label=f"Colours of {name}"))
    return join(
        tag("div", tag("fieldset", tag("legend", "Colour tokens by"), *options), *legends, class_="selector"),
        note(
            "Orange is below 0, blue is above. Point at a token for its numbers, or open the table below a completion. "
            "The reward is the score at the last token, less β·KL at each. KL is in nats, the others are in score."
        ),
    )


def _sample(title: str, row: Row | None, scales: Mapping[str, float]) -> Html:
    if row is None:
        return tag("div", tag("h4", title), note("No completion."), class_="completion")
    tokens = row.get("tokens", [])
    facts = [f"{name} {number(row.get(name), 3)}" for name in ("gold", "score") if as_float(row.get(name)) is not None]
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
    shades = [
        f"--{name}:{_shade(value, scale)}"
        for name, scale in scales.items()
        if (value := as_float(token.get(name))) is not None
    ]
    numbers = [f"{name} {signed(token.get(name))}" for name in scales]
    title = "\n".join([json.dumps(token["text"], ensure_ascii=False), *numbers])
    return tag("span", _shown(token["text"]), class_="t", style=";".join(shades), title=title)


def _shown(text: str) -> str:
    """A token's text in which a line break, a tab and nothing at all can be seen and pointed at."""
    return text.replace("\n", "↵\n").replace("\t", "⇥\t") or "∅"


def _token_table(tokens: Sequence[Row], scales: Mapping[str, float]) -> Html:
    """The same numbers for those who can't point or can't see colours."""
    columns = tag("tr", *(tag("th", name, scope="col") for name in ("Token", *(QUANTITIES[n] for n in scales))))
    rows = [
        tag(
            "tr",
            tag("th", _shown(token["text"]).rstrip("\n"), scope="row", class_="text"),
            *(tag("td", signed(token.get(name))) for name in scales),
        )
        for token in tokens
    ]
    table = tag("table", tag("thead", columns), tag("tbody", *rows), class_="numbers")
    return tag("details", tag("summary", "Numbers of each token"), table)

"""Draws the map of the algorithms: what each one needs, and how one follows from another.

python docs/algorithms/make_map.py     # writes docs/algorithms/map.svg
"""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

FILE = Path(__file__).resolve().parent / "map.svg"
NEEDS: Mapping[str, tuple[str, str]] = {
    "S": ("a score", "#1f6feb"),
    "R": ("a reference, for the KL", "#59636e"),
    "C": ("a critic", "#8250df"),
    "G": ("groups: several completions of a prompt", "#0f766e"),
    "P": ("preferences", "#bc4c00"),
    "D": ("demonstrations", "#7a5a00"),
    "T": ("a teacher", "#a3246f"),
}
"""Each need: in words, and the colour of its letter."""
BOXES: Mapping[str, tuple[str, int, int, str]] = {
    "sft": ("SFT", 0, 0, "D"),
    "distill": ("Distillation", 1, 0, "T"),
    "nlpo": ("NLPO", 3, 0, "SRC"),
    "a2c": ("A2C", 2, 1, "SRC"),
    "ppo": ("PPO", 3, 1, "SRC"),
    "reinforce": ("REINFORCE", 1, 2, "SR"),
    "rloo": ("RLOO", 2, 2, "SRG"),
    "grpo": ("GRPO", 3, 2, "SRG"),
    "reward_modelling": ("Reward modelling", 0, 3, "P"),
    "best_of_n": ("Best of n", 1, 3, "SG"),
    "expert_iteration": ("Expert iteration", 2, 3, "SRG"),
    "dpo": ("DPO", 1, 4, "RP"),
    "online_dpo": ("Online DPO", 2, 4, "SRG"),
}
"""Each algorithm: its name, its column and row, and what it needs."""
ARROWS: Sequence[tuple[str, str, str]] = (
    ("sft", "distill", "probabilities, not texts"),
    ("sft", "reinforce", "gives the reference"),
    ("reinforce", "a2c", "+ learned baseline"),
    ("a2c", "ppo", "+ clip, more steps"),
    ("ppo", "nlpo", "+ masks rare tokens"),
    ("reinforce", "rloo", "+ baseline of a group"),
    ("rloo", "grpo", "÷ deviation, + clip"),
    ("ppo", "grpo", "group, no critic"),
    ("rloo", "expert_iteration", "imitates the best only"),
    ("best_of_n", "expert_iteration", "+ trains on it"),
    ("reward_modelling", "reinforce", "gives the score"),
    ("reward_modelling", "best_of_n", "gives the score"),
    ("reward_modelling", "dpo", "the policy is the model"),
    ("dpo", "online_dpo", "+ own samples"),
)
"""From which algorithm to which, and what changes."""
WIDTH, HEIGHT, STEP_X, STEP_Y, LEFT, TOP = 168, 62, 336, 124, 14, 14


def corner(name: str) -> tuple[float, float]:
    """The upper left corner of a box."""
    _, column, row, _ = BOXES[name]
    return LEFT + column * STEP_X, TOP + row * STEP_Y


def box(name: str) -> str:
    """The box of an algorithm, with a letter for each need."""
    title, _, _, needs = BOXES[name]
    x, y = corner(name)
    parts = [
        f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#f6f8fa" stroke="#59636e"/>',
        f'<text x="{x + WIDTH / 2:g}" y="{y + 24:g}" font-size="15.5" font-weight="600" text-anchor="middle">'
        f"{escape(title)}</text>",
    ]
    left = x + WIDTH / 2 - 13 * len(needs)
    return "\n".join([*parts, *(letter(need, left + 26 * i, y + 34) for i, need in enumerate(needs))])


def letter(need: str, x: float, y: float) -> str:
    """A letter on its colour."""
    colour = NEEDS[need][1]
    return (
        f'<rect x="{x + 2:g}" y="{y:g}" width="22" height="20" rx="4" fill="{colour}"/>'
        f'<text x="{x + 13:g}" y="{y + 15:g}" font-size="14" font-weight="600" fill="#fff" text-anchor="middle">'
        f"{need}</text>"
    )


def arrow(start: str, end: str, label: str) -> str:
    """An arrow from edge to edge, with its label."""
    (x0, y0), (x1, y1) = corner(start), corner(end)
    if x0 == x1:
        down = y1 > y0
        ax, ay, bx, by = x0 + WIDTH / 2, y0 + HEIGHT * down, x1 + WIDTH / 2, y1 + HEIGHT * (not down)
    else:
        ax, ay, bx, by = x0 + WIDTH, y0 + HEIGHT / 2, x1, y1 + HEIGHT / 2
    middle_x, middle_y = (ax + bx) / 2, (ay + by) / 2 + (5 if x0 == x1 or y0 != y1 else -8)
    return (
        f'<line x1="{ax:g}" y1="{ay:g}" x2="{bx:g}" y2="{by:g}" stroke="#59636e" stroke-width="1.6" '
        f'marker-end="url(#tip)"/><text x="{middle_x:g}" y="{middle_y:g}" font-size="13.5" text-anchor="middle" '
        f'paint-order="stroke" stroke="#fff" stroke-width="5" fill="#1f2328">{escape(label)}</text>'
    )


def drawing() -> str:
    """The map as SVG."""
    width, height = LEFT * 2 + 3 * STEP_X + WIDTH, TOP * 2 + 4 * STEP_Y + HEIGHT + 96
    legend = []
    for i, (need, (words, _)) in enumerate(NEEDS.items()):
        x, y = LEFT + (i % 3) * 350, height - 88 + 28 * (i // 3)
        legend.append(letter(need, x, y) + f'<text x="{x + 34}" y="{y + 15}" font-size="14.5">{escape(words)}</text>')
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
            'font-family="system-ui, Helvetica, Arial, sans-serif" fill="#1f2328">',
            "<title>The algorithms: what each one needs, and how one follows from another</title>",
            '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" '
            'orient="auto"><path d="M0 0L10 5L0 10z" fill="#59636e"/></marker></defs>',
            f'<rect width="{width}" height="{height}" fill="#fff"/>',
            *(arrow(*one) for one in ARROWS),
            *map(box, BOXES),
            *legend,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    FILE.write_text(drawing(), encoding="utf-8")

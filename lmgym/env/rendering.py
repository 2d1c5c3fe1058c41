"""Rendering rows: as plain text, as text coloured by token reward for a terminal, and as images."""

import re
from bisect import bisect_right
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from lmgym.env.row_state import Finish, RowState
from lmgym.io import encodable, printable

Colour = tuple[int, int, int]

WIDTH, MARGIN, FONT_SIZE, LINE_HEIGHT, FOOTER_HEIGHT = 640, 16, 18, 26, 40
"""The geometry of an image, in pixels."""
BACKGROUND, PROMPT_COLOUR, TOKEN_COLOUR, FOOTER_COLOUR = (22, 24, 29), (168, 174, 186), (245, 246, 248), (120, 126, 138)
CHARACTERS_PER_TOKEN = 4
"""From the token budgets, how long a text may get; a longer one scrolls."""
MAX_LINES = 24


class Piece(NamedTuple):
    """A part of a text that is drawn in one colour.

    Attributes:
        text: printable characters, line feeds and tabs.
        colour: of its reward; None for the prompt.
    """

    text: str
    colour: Colour | None


def render_rows(state: RowState, token_rewards: Tensor, render_mode: str | None) -> Any:
    """All rows: a tuple of strings ("ansi") or images ("rgb_array"); printed, and None, in mode "human"."""
    rows = range(state.rows)
    match render_mode:
        case "ansi":
            return tuple(render_text(state, row) for row in rows)
        case "rgb_array":
            return tuple(render_image(state, token_rewards, row) for row in rows)
        case "human":
            print(encodable("\n".join(render_ansi(state, token_rewards, row) for row in rows)))
        case _:
            gym.logger.warn("render() needs a render_mode: make the environment with 'ansi', 'rgb_array' or 'human'")
    return None


def render_text(state: RowState, row: int) -> str:
    """Prompt and completion of a row."""
    if not state.prompts:
        return ""
    return printable(state.prompts[row].text) + printable(state.texts([row], [_chosen(state, row)])[0])


def render_ansi(state: RowState, token_rewards: Tensor, row: int) -> str:
    """Prompt and completion of a row, with terminal colours: green tokens gained reward, red ones lost reward."""
    pieces = _pieces(state, token_rewards, row)
    return "".join(p.text if p.colour is None else f"\x1b[38;2;{_sgr(p.colour)}m{p.text}\x1b[0m" for p in pieces)


def render_image(state: RowState, token_rewards: Tensor, row: int) -> UInt8[np.ndarray, "H W 3"]:
    """The same as an image. Its size depends on the token budgets alone; of a longer text it shows the last lines."""
    from PIL import Image, ImageDraw, ImageFont

    font: Any = ImageFont.load_default(FONT_SIZE)
    lines = _number_of_lines(state)
    height = MARGIN + lines * LINE_HEIGHT + FOOTER_HEIGHT
    image = Image.new("RGB", (WIDTH, height + height % 2), BACKGROUND)  # video codecs take even sizes only
    draw = ImageDraw.Draw(image)
    placed = _wrap(_pieces(state, token_rewards, row), font)
    first = max(0, placed[-1][0] + 1 - lines) if placed else 0
    for line, x, piece in placed:
        if line < first:
            continue
        y, width = MARGIN + (line - first) * LINE_HEIGHT, font.getlength(piece.text)
        if piece.colour is not None:
            box = (x, y, max(x + width - 1, x + 2), y + LINE_HEIGHT - 4)
            draw.rounded_rectangle(box, radius=4, fill=_darker(piece.colour))
        colour = PROMPT_COLOUR if piece.colour is None else TOKEN_COLOUR
        draw.text((x, y + LINE_HEIGHT // 2 - 2), piece.text, fill=colour, font=font, anchor="lm")
    small: Any = ImageFont.load_default(FONT_SIZE - 4)
    draw.text(
        (MARGIN, height - FOOTER_HEIGHT // 2), _footer(state, token_rewards, row), FOOTER_COLOUR, small, anchor="lm"
    )
    return np.array(image)


def _chosen(state: RowState, row: int) -> list[int]:
    return state.tokens[row, : int(state.length[row])].tolist()


def _pieces(state: RowState, token_rewards: Tensor, row: int) -> list[Piece]:
    """The prompt, and each token in the colour of its reward, relative to the row's largest."""
    if not state.prompts:
        return []
    chosen, rewards = _chosen(state, row), token_rewards[row].tolist()
    scale = max((abs(reward) for reward in rewards), default=0.0) or 1.0
    # A token's text may depend on the tokens before it, so prefixes are decoded rather than single tokens.
    prefixes = state.texts([row] * len(chosen), [chosen[: count + 1] for count in range(len(chosen))])
    pieces, before = [Piece(printable(state.prompts[row].text), None)], ""
    for text, reward in zip(prefixes, rewards, strict=False):
        pieces.append(Piece(printable(text[len(before) :]), _colour(reward, scale)))
        before = text
    return pieces


def _colour(reward: float, scale: float) -> Colour:
    strength = int(155 * min(1.0, abs(reward) / scale)) + 100
    return (100, strength, 100) if reward >= 0 else (strength, 100, 100)


def _darker(colour: Colour) -> Colour:
    red, green, blue = (int(0.5 * channel) for channel in colour)
    return red, green, blue


def _sgr(colour: Colour) -> str:
    return ";".join(map(str, colour))


def _number_of_lines(state: RowState) -> int:
    characters = CHARACTERS_PER_TOKEN * (state.max_prompt_tokens + state.max_new_tokens)
    per_line = 2 * (WIDTH - 2 * MARGIN) // FONT_SIZE  # a character is about half as wide as it is high
    return min(max(2, -(-characters // per_line)), MAX_LINES)


def _wrap(pieces: list[Piece], font: Any) -> list[tuple[int, float, Piece]]:
    """Where each part of the pieces goes, as line and x in pixels. Lines are broken at line feeds and between words."""
    placed: list[tuple[int, float, Piece]] = []
    line, x, left, right = 0, float(MARGIN), float(MARGIN), WIDTH - MARGIN
    for word in _words(pieces):
        if word[0].text == "\n":
            line, x = line + 1, left
            continue
        width = font.getlength("".join(part.text for part in word))
        if x > left and x + width > right:
            line, x = line + 1, left
            word[0] = word[0]._replace(text=word[0].text.lstrip())
        for part in word:
            text = part.text
            while text:  # a word that is longer than a line is broken anywhere
                sizes = range(1, min(len(text), WIDTH) + 1)
                count = max(1, bisect_right(sizes, right - x, key=lambda n, text=text: font.getlength(text[:n])))
                placed.append((line, x, part._replace(text=text[:count])))
                x, text = x + font.getlength(text[:count]), text[count:]
                if text:
                    line, x = line + 1, left
    return placed


def _words(pieces: list[Piece]) -> list[list[Piece]]:
    """The parts of each word, whose tokens may differ in colour, with the spaces before it; line feeds alone."""
    words: list[list[Piece]] = []
    for piece in pieces:
        for text in re.findall(r"\n|[^\S\n]*\S+|[^\S\n]+", piece.text.replace("\t", "    ")):
            part = piece._replace(text=text)
            if words and not text[0].isspace() and not words[-1][-1].text[-1].isspace():
                words[-1].append(part)
            else:
                words.append([part])
    return words


def _footer(state: RowState, token_rewards: Tensor, row: int) -> str:
    length, finish = int(state.length[row]), Finish(int(state.finish[row])).text
    reward = float(token_rewards[row].sum())
    return f"{length} of {state.max_new_tokens} tokens     reward {reward:+.2f}     {finish}"

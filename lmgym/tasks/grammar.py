"""A template grammar for short English reviews and stories, and a lexical rule for their sentiment.

A text is an opening, which tells who did what and when, and a continuation of two to four sentences about it. Each
sentence is generated to be positive, negative or neutral; `polarity` recovers this from the words alone.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")

CLAUSE_END = re.compile(r"[,;:]|\bbut\b")
WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")

# Adjectives by the kind of thing that they can describe. "any" fits everything.
POSITIVE_ADJECTIVES: dict[str, tuple[str, ...]] = {
    "any": ("good", "great", "nice", "lovely", "wonderful", "amazing"),
    "people": ("kind", "friendly", "polite", "funny"),
    "taste": ("fresh", "tasty", "warm", "delicious"),
    "place": ("clean", "cozy", "bright", "comfortable"),
    "story": ("fun", "clever", "exciting", "funny"),
    "sound": ("beautiful", "clear", "lively"),
    "tool": ("fast", "handy", "smart"),
    "sight": ("beautiful", "pretty", "bright"),
}
NEGATIVE_ADJECTIVES: dict[str, tuple[str, ...]] = {
    "any": ("bad", "poor", "terrible", "awful", "disappointing"),
    "people": ("rude", "lazy", "mean"),
    "taste": ("cold", "stale", "bland", "salty"),
    "place": ("dirty", "cold", "noisy", "ugly"),
    "story": ("boring", "slow", "dull", "silly"),
    "sound": ("harsh", "dull", "noisy"),
    "tool": ("slow", "weak", "broken"),
    "sight": ("ugly", "dull", "boring"),
}
NEUTRAL_ADJECTIVES: dict[str, tuple[str, ...]] = {
    "any": ("new", "simple", "different", "usual"),
    "people": ("young", "tall", "quiet", "busy"),
    "taste": ("hot", "green", "sweet"),
    "place": ("small", "big", "old", "quiet"),
    "story": ("long", "short", "strange"),
    "sound": ("loud", "soft", "quiet"),
    "tool": ("small", "big", "heavy"),
    "sight": ("wide", "dark", "green"),
}

POSITIVE_VERBS = ("loved", "liked", "enjoyed")
NEGATIVE_VERBS = ("hated", "disliked")
NEUTRAL_VERBS = ("saw", "noticed", "talked about", "asked about", "remember")

_PLAIN_VERBS = ("love", "enjoy", "recommend")  # as in "did not enjoy"
_MOODS = {1: ("happy", "smile", "laugh"), -1: ("sad", "angry", "tired")}

# Words that `polarity` knows but the templates do not use. Other models use them.
_MORE_POSITIVE = """best better excellent perfect fantastic brilliant superb enjoyable charming delightful pleasant
    fabulous awesome incredible magnificent outstanding impressive gorgeous recommended smiled laughed loves glad"""
_MORE_NEGATIVE = """worst worse horrible dreadful disgusting annoying unpleasant disappointed waste hate dislike hates
    dislikes useless ridiculous painful filthy bored regret"""

POSITIVE_WORDS = frozenset(
    word for words in (*POSITIVE_ADJECTIVES.values(), POSITIVE_VERBS, _PLAIN_VERBS, _MOODS[1]) for word in words
) | frozenset(_MORE_POSITIVE.split())
NEGATIVE_WORDS = frozenset(
    word for words in (*NEGATIVE_ADJECTIVES.values(), NEGATIVE_VERBS, _MOODS[-1]) for word in words
) | frozenset(_MORE_NEGATIVE.split())
NEGATIONS = frozenset(("not", "never", "no", "neither", "nor", "hardly", "nothing", "without", "cannot"))
NEGATION_REACH = 3
"""A negation inverts a sentiment word that is at most this many words after it, as in "not at all good"."""


def polarity(sentence: str) -> int:
    """The sentiment of a sentence by its words: 1 (positive), -1 (negative), or 0 (neutral or mixed).

    A negation inverts the next sentiment word within `NEGATION_REACH` words of the same clause, so "not bad" is
    positive. A sentence with positive and negative words, such as "good but slow", is mixed.
    """
    signs = set()
    for clause in CLAUSE_END.split(sentence.lower().replace("’", "'")):
        reach = 0
        for word in WORD.findall(clause):
            sign = (word in POSITIVE_WORDS) - (word in NEGATIVE_WORDS)
            if sign:
                signs.add(-sign if reach > 0 else sign)
                reach = 0
            elif word in NEGATIONS or word.endswith("n't"):
                reach = NEGATION_REACH
            else:
                reach -= 1
    return signs.pop() if len(signs) == 1 else 0


@dataclass(frozen=True)
class Topic:
    """Something to write about.

    Attributes:
        things: nouns that name it. Each belongs to one topic only, so the noun in an opening determines the topic.
        kind: the kind of adjectives that fit it.
        acts: verbs for what one does with it, in the past tense.
        aspects: its parts, each with the kind of adjectives that fit.
        events: neutral sentences about it, with {who} for the subject.
    """

    things: tuple[str, ...]
    kind: str
    acts: tuple[str, ...]
    aspects: tuple[tuple[str, str], ...]
    events: tuple[str, ...]


TOPICS = (
    Topic(
        ("film", "movie", "show", "play"),
        "story",
        ("watched", "saw"),
        (("story", "story"), ("music", "sound"), ("cast", "people"), ("ending", "story"), ("picture", "sight")),
        ("it was about a boy and a dog", "it was two hours long", "{who} sat in the back"),
    ),
    Topic(
        ("dinner", "lunch", "pizza", "soup"),
        "taste",
        ("had", "tried"),
        (("food", "taste"), ("sauce", "taste"), ("waiter", "people"), ("table", "place"), ("bread", "taste")),
        ("{who} had tea with it", "it came with rice", "{who} paid at the table"),
    ),
    Topic(
        ("hotel", "inn", "hostel"),
        "place",
        ("stayed at", "slept at"),
        (("room", "place"), ("staff", "people"), ("view", "sight"), ("bed", "place"), ("food", "taste")),
        ("it was near the sea", "{who} had a room on the second floor", "{who} left at ten"),
    ),
    Topic(
        ("book", "novel", "comic"),
        "story",
        ("read", "finished"),
        (("story", "story"), ("ending", "story"), ("writing", "story"), ("cover", "sight"), ("pictures", "sight")),
        ("it was about a girl and a ship", "it has ten parts", "{who} read it on the train"),
    ),
    Topic(
        ("phone", "camera", "laptop", "radio"),
        "tool",
        ("bought", "used"),
        (("screen", "tool"), ("sound", "sound"), ("buttons", "tool"), ("battery", "tool"), ("picture", "sight")),
        ("it came in a box", "{who} paid with a card", "it was on the table all day"),
    ),
    Topic(
        ("park", "museum", "castle", "beach"),
        "sight",
        ("visited", "went to"),
        (("view", "sight"), ("guide", "people"), ("garden", "place"), ("food", "taste"), ("bus", "place")),
        ("{who} took the bus home", "it was near the sea", "{who} walked for two hours"),
    ),
    Topic(
        ("concert", "band", "choir"),
        "sound",
        ("heard", "listened to"),
        (("music", "sound"), ("songs", "sound"), ("singer", "people"), ("hall", "place"), ("sound", "sound")),
        ("it was two hours long", "{who} sat in the back", "{who} took the train home"),
    ),
    Topic(
        ("class", "course", "lesson"),
        "story",
        ("took", "joined"),
        (("teacher", "people"), ("room", "place"), ("book", "story"), ("notes", "story"), ("people", "people")),
        ("it was two hours long", "{who} sat in the back", "{who} took the bus home"),
    ),
    Topic(
        ("game", "puzzle", "quiz"),
        "story",
        ("played", "tried"),
        (("story", "story"), ("rules", "story"), ("music", "sound"), ("ending", "story"), ("pictures", "sight")),
        ("it came in a box", "it was about a girl and a ship", "{who} played for two hours"),
    ),
    Topic(
        ("cafe", "bakery", "bar", "market"),
        "place",
        ("went to", "stopped at"),
        (("coffee", "taste"), ("staff", "people"), ("cake", "taste"), ("music", "sound"), ("bread", "taste")),
        ("{who} had tea and cake", "{who} paid with a card", "it was near the train"),
    ),
)
TOPIC_OF = {thing: topic for topic in TOPICS for thing in topic.things}

SUBJECTS = {
    "I": "I",
    "We": "we",
    "Anna": "she",
    "Mia": "she",
    "My sister": "she",
    "My mother": "she",
    "Tom": "he",
    "Ben": "he",
    "My brother": "he",
    "My father": "he",
    "My friends": "they",
    "Anna and Tom": "they",
}
_PRONOUN_OF = {name.lower(): pronoun for name, pronoun in SUBJECTS.items()}
# The longest name first, so that "Anna and Tom" does not match "Anna".
_SUBJECT = re.compile(rf"\b({'|'.join(sorted(_PRONOUN_OF, key=len, reverse=True))})\b")
OBJECTS = {"I": "me", "we": "us", "she": "her", "he": "him", "they": "them"}
READERS = ("Sam", "Kim", "Leo", "Eva", "Max", "Ida", "Ned", "Zoe")
OPENING_ADJECTIVES = ("new", "old", "small", "big", "little", "famous", "local", "quiet", "simple", "same")
TIMES = (
    "last night",
    "last week",
    "on Monday",
    "on Friday",
    "on Sunday",
    "this morning",
    "after work",
    "in May",
    "in June",
    "two days ago",
    "a week ago",
    "yesterday",
    "today",
    "in the rain",
    "in the winter",
    "in the summer",
)
STARTS = ("In the end, ", "For me, ", "Well, ", "To my mind, ")
INTENSIFIERS = ("very", "really", "so", "quite", "truly")

SENTENCES = (2, 3, 4)
SENTENCE_WEIGHTS = (0.35, 0.45, 0.20)
NEGATIVE_SHARE = 0.4
"""The share of negative sentences among the sentences that are not positive."""


@dataclass(frozen=True)
class Scene:
    """The facts of an opening that the following sentences must fit.

    Attributes:
        topic: the topic.
        thing: the noun in the opening.
        who: the pronoun of the narrator or main character.
        voice: the style of the whole text: "terse", "plain" or "chatty".
    """

    topic: Topic
    thing: str
    who: str
    voice: str


def opening(rng: np.random.Generator) -> str:
    """Writes a prompt: one sentence that tells who did what and when, sometimes with the start of the next one."""
    topic = _even(rng, TOPICS)
    thing = _even(rng, topic.things)
    adjective = _even(rng, OPENING_ADJECTIVES)
    form = rng.random()
    if form < 0.1:
        return f"{_even(rng, READERS)} asked: how was the {adjective} {thing} {_even(rng, TIMES)}? Answer:"
    who = _even(rng, tuple(SUBJECTS))
    act = f"{_even(rng, topic.acts)} the {adjective} {thing}"
    when = _even(rng, TIMES)
    if form < 0.2:
        text = f"Dear {_even(rng, READERS)}, {_lower(who)} {act} {when}."
    elif form < 0.4:
        text = f"{_upper(when)}, {_lower(who)} {act}."
    else:
        text = f"{who} {act} {when}."
    tail = rng.random()
    if tail < 0.1:
        return f"{text} It"
    if tail < 0.3:
        return f"{text} The {_even(rng, topic.aspects)[0]}"
    if tail < 0.4:
        return f"{text} {_upper(SUBJECTS[who])} thought the {_even(rng, topic.aspects)[0]}"
    return text


def continuation(rng: np.random.Generator, opening: str, positivity: float) -> str:
    """Continues an opening by two to four sentences.

    Args:
        rng: the source of randomness.
        opening: any text. If it comes from `opening()`, the sentences fit it.
        positivity: the probability that a sentence is positive; otherwise it is negative or neutral.

    Returns:
        The sentences, with a leading space.
    """
    return " " + " ".join(sentence for sentence, _ in labelled_continuation(rng, opening, positivity))


def labelled_continuation(rng: np.random.Generator, opening: str, positivity: float) -> list[tuple[str, int]]:
    """The sentences of a continuation, each with its intended polarity."""
    scene = _read(rng, opening)
    length = int(np.searchsorted(np.cumsum(SENTENCE_WEIGHTS), rng.random()))
    signs = [_sign(rng, positivity) for _ in range(SENTENCES[min(length, len(SENTENCES) - 1)])]
    unfinished = unfinished_sentence(opening)
    sentences = []
    for i, sign in enumerate(signs):
        if i == 0 and unfinished:
            last = WORD.findall(unfinished.lower())[-1:]
            kinds = [kind for noun, kind in scene.topic.aspects if [noun] == last]
            noun = last[0] if kinds else "it"
            kind = kinds[0] if kinds else scene.topic.kind
            sentences.append((f"{_be(noun)} {_quality(rng, scene, kind, sign)}.", sign))
        else:
            sentences.append((_sentence(rng, scene, sign), sign))
    return sentences


def document(rng: np.random.Generator) -> str:
    """Writes a whole text for pretraining; its positivity is random, from mostly negative to mostly positive."""
    start = opening(rng)
    return start + continuation(rng, start, rng.uniform(0.1, 0.7))


def unfinished_sentence(text: str) -> str:
    """The text after the last full stop, question mark, exclamation mark or colon; "" if there is none."""
    return re.split(r"[.!?:]", text)[-1].strip()


def _read(rng: np.random.Generator, opening: str) -> Scene:
    words = WORD.findall(opening.lower())
    things = [word for word in words if word in TOPIC_OF] or [_even(rng, _even(rng, TOPICS).things)]
    subject = _SUBJECT.search(opening.lower())
    who = _PRONOUN_OF[subject.group()] if subject else "I"
    return Scene(TOPIC_OF[things[0]], things[0], who, _even(rng, ("terse", "plain", "chatty")))


def _sign(rng: np.random.Generator, positivity: float) -> int:
    if rng.random() < positivity:
        return 1
    return -1 if rng.random() < NEGATIVE_SHARE else 0


def _sentence(rng: np.random.Generator, scene: Scene, sign: int) -> str:
    who, chatty = scene.who, scene.voice == "chatty"
    noun, kind = _skewed(rng, scene.topic.aspects)
    shape = rng.random()
    end = "!" if sign and chatty and rng.random() < 0.4 else "."
    if sign == 0 and shape < 0.35:
        text = _even(rng, scene.topic.events).format(who=who)
    elif shape < 0.55:
        text = f"the {noun} {_be(noun)} {_quality(rng, scene, kind, sign)}"
    elif shape < 0.68:
        text = f"it was {_quality(rng, scene, scene.topic.kind, sign)}"
    elif shape < 0.78:
        text = f"{who} {_verb(rng, sign)} the {noun}"
    elif shape < 0.84 and sign:
        return f"What {_article(_adjective(rng, scene.topic.kind, sign))} {scene.thing}!"
    elif shape < 0.88 and sign:
        text = f"{who} would {'' if sign > 0 else 'not '}recommend it"
    elif shape < 0.92 and sign:
        text = f"it made {OBJECTS[who]} {_even(rng, _MOODS[sign])}"
    else:
        text = _two_clauses(rng, scene, sign)
    if chatty and rng.random() < 0.3:
        text = _even(rng, STARTS) + text
    return _upper(text) + end


def _two_clauses(rng: np.random.Generator, scene: Scene, sign: int) -> str:
    aspects = scene.topic.aspects
    first = int(len(aspects) * rng.random())
    second = (first + 1 + int((len(aspects) - 1) * rng.random())) % len(aspects)
    if sign == 0:
        signs, joint = ((1, -1), "but") if rng.random() < 0.5 else ((-1, 1), "but")
    else:
        signs, joint = ((sign, sign), "and") if rng.random() < 0.5 else ((0, sign), "but")
    clauses = []
    for index, part in zip((first, second), signs, strict=True):
        noun, kind = aspects[index]
        clauses.append(f"the {noun} {_be(noun)} {_adjective(rng, kind, part)}")
    return f"{clauses[0]} {joint} {clauses[1]}"


def _quality(rng: np.random.Generator, scene: Scene, kind: str, sign: int) -> str:
    """An adjective phrase of the given sign, sometimes with a negation or a contrast."""
    shape = rng.random() * (0.8 if scene.voice == "terse" else 1.0)
    if sign == 0:
        if shape < 0.2:
            pair = [_adjective(rng, kind, 1), _adjective(rng, kind, -1)]
            return " but ".join(pair if rng.random() < 0.5 else pair[::-1])
        if shape < 0.3:
            return "neither good nor bad"
        intensifier = f"{_skewed(rng, INTENSIFIERS)} " if shape > 0.8 else ""
        return intensifier + _adjective(rng, kind, 0)
    same, other = _adjective(rng, kind, sign), _adjective(rng, kind, -sign)
    if shape < 0.45:
        return same
    if shape < 0.6:
        return f"not {other}" + (" at all" if scene.voice == "chatty" else "")
    if shape < 0.65:
        return f"never {other}"
    if shape < 0.72:
        return f"{_adjective(rng, kind, 0)} but {same}"
    if shape < 0.8:
        second = _adjective(rng, kind, sign)
        return same if second == same else f"{same} and {second}"
    return f"{_skewed(rng, INTENSIFIERS)} {same}"


def _adjective(rng: np.random.Generator, kind: str, sign: int) -> str:
    table = {1: POSITIVE_ADJECTIVES, -1: NEGATIVE_ADJECTIVES, 0: NEUTRAL_ADJECTIVES}[sign]
    return _skewed(rng, table["any"] if rng.random() < 0.5 else table[kind])


def _verb(rng: np.random.Generator, sign: int) -> str:
    if sign < 0 and rng.random() < 0.5:
        return f"did not {_even(rng, ('love', 'enjoy'))}"
    return _even(rng, {1: POSITIVE_VERBS, -1: NEGATIVE_VERBS, 0: NEUTRAL_VERBS}[sign])


def _even(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(len(options) * rng.random())]  # several times faster than rng.integers


def _skewed(rng: np.random.Generator, options: Sequence[T]) -> T:
    """Draws earlier options more often, because word frequencies in real texts are skewed too."""
    return options[int(len(options) * rng.random() ** 1.5)]


def _be(noun: str) -> str:
    return "were" if noun == "people" or (noun.endswith("s") and noun != "bus") else "was"


def _article(adjective: str) -> str:
    return f"{'an' if adjective[0] in 'aeiou' else 'a'} {adjective}"


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]


def _lower(subject: str) -> str:
    return subject[0].lower() + subject[1:] if subject.startswith(("My", "We")) else subject

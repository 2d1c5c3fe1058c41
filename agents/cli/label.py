"""`lmgym label`: a page on which people compare texts, and what comes of their answers."""

import sys
import threading
import webbrowser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from agents.cli import label_data
from agents.cli.options import Common, check_numbers, parse
from agents.cli.questions import fill
from lmgym.io.jsonl import text_lines
from lmgym.preferences import Asker, LabelStore, Rules, SimulatedLabeller, Strategy, label_stats

OWNER = "owner"


@dataclass(frozen=True)
class Simulated:
    """People who are simulated, and answer over HTTP by the task's gold score."""

    labellers: int = 0
    """Number of simulated labellers; the command ends when they have nothing left to answer."""
    error_rate: float = 0.168
    """Probability ε of a wrong answer, at most 0.5."""
    side_bias: float = 0.0
    """Probability b of answering "left" (negative: "right") whatever the texts are."""
    fatigue: float = 0.0
    """What is added to ε in a hundred answers."""
    minority: float = 0.0
    """Share of the labellers whose taste is the opposite."""


@dataclass(frozen=True)
class Label(Common):
    """Open a page on which people compare texts.

    Answers are kept in a file (--db), which the same command continues. Further commands on that file: `lmgym label
    stats DB`, `export DB FILE`, `import DB FILE`, `withdraw DB NAME`, `rate DB`.
    """

    task: tyro.conf.Positional[str] = ""
    """Folder of a finished run, whose policy writes the texts; or a registered environment, such as "Sentiment", whose
    model does. Nothing is sampled with --pairs, or if the file of labels has questions already."""
    policy: str | None = None
    """Folder of an adapter that writes the texts, as in `lmgym sample`."""
    temperature: float = 1.0
    """Sampling temperature."""
    pairs: str | None = None
    """Your own texts to compare: a file as for --preferences; which one its rows call better is not shown or used."""
    write: bool = False
    """People write a text for each prompt (of --prompts or the task), instead of comparing texts."""
    db: str = "labels.db"
    """File of the questions and answers, on a local disk."""
    guidelines: str | None = None
    """Text file that is shown beside the questions. Its version is stored with each answer."""
    known: str | None = None
    """Questions with a known answer: a file as for --preferences, or "task" for those whose gold scores are clearest.
    The first ones are for practice, with feedback; the others are hidden among the rest."""
    count: int = 200
    """Questions to sample or to take."""
    texts: int = 2
    """Texts in a question: 2, or up to 4 to rank."""
    until: int | None = None
    """Labels after which nothing more is asked and the command ends; by default, it serves until you stop it."""
    labellers: int = 1
    """People who label. You are the first one; the others get a link each, which is printed."""
    overlap: int = 1
    """People who answer each question."""
    ask: Strategy = "random"
    """What to ask next: "random", the "newest" questions, or, by reward models of --retrain-every, those of the largest
    "disagreement" or the closest "margin". A fifth is random in any case."""
    random_share: float = 0.2
    """Share of the questions that are random and held out; and of the rest, the share that is random."""
    repeats: float = 0.05
    """Share of questions that are asked again with the sides reversed."""
    gold_share: float = 0.05
    """Share of hidden questions with a known answer, where there are any."""
    calibration: int = 10
    """Practice questions before the others, where there are any with a known answer."""
    strength: bool = False
    """Also ask by how much a text is better, from 1 to 4."""
    retrain_every: int = 0
    """Train reward models in the background after every so many labels; 0 never."""
    members: int = 3
    """Reward models in the ensemble that is trained."""
    host: str = "127.0.0.1"
    """Address to listen on. Others in your network reach the page only at this machine's own address there."""
    port: int = 8765
    """Port to listen on; 0 takes any that is free."""
    browser: bool = True
    """Open the page in your browser."""
    simulate: Annotated[Simulated, tyro.conf.arg(name="simulate")] = field(default_factory=Simulated)

    def __post_init__(self) -> None:
        for name in ("count", "labellers", "members"):
            if getattr(self, name) < (0 if name == "labellers" else 1):
                raise ValueError(f"--{name} {getattr(self, name)} is too small")
        if self.until is not None and self.until < 1:
            raise ValueError(f"--until {self.until} is too small: give the number of labels that you want")
        if not 2 <= self.texts <= 4:
            raise ValueError(f"--texts {self.texts} is out of range: give 2 to 4")
        if self.ask == "disagreement" and self.members < 2:
            raise ValueError("--ask disagreement needs several reward models: give --members 2 or more")
        if self.pairs and self.write:
            raise ValueError("--pairs compares texts and --write asks for new ones: give one of them")
        self.rules()
        simulated = self.simulate
        SimulatedLabeller(simulated.error_rate, simulated.side_bias, simulated.fatigue)

    def rules(self) -> Rules:
        """How questions are handed out."""
        return Rules(
            overlap=self.overlap,
            repeat_share=self.repeats,
            gold_share=self.gold_share,
            calibration=self.calibration,
            strategy=self.ask,
            random_share=self.random_share,
            strength=self.strength,
            most=None if self.until is None else -(-self.until // (1 if self.write else self.overlap)),
        )


def run(argv: Sequence[str]) -> int:
    """Serves the page, or runs a command on a file of labels."""
    if argv and argv[0] in label_data.COMMANDS:
        return label_data.COMMANDS[argv[0]](argv[1:])
    wanted = parse("label", Label, argv)
    check_numbers(wanted)
    from agents.labelling import Page, Retrainer, links, listening, serve

    # It listens before anything is sampled.
    with listening(wanted.host, wanted.port) as listener, LabelStore(wanted.db, create=True) as store:
        filled = fill(store, wanted, argv)
        if wanted.guidelines:
            store.set_guidelines("".join(line for _, line in text_lines(wanted.guidelines)))
        people = wanted.simulate.labellers or wanted.labellers - 1
        ids = [store.labeller(OWNER, OWNER), *(store.labeller(f"labeller-{i + 1}") for i in range(people))]
        asker = Asker(store, wanted.rules())
        labels, retrainer = asker.progress(ids[0])["all"], None
        if wanted.retrain_every:
            log = Path(wanted.db).with_suffix(".training.log")
            retrainer = Retrainer(_rate_command(wanted, filled.model), wanted.retrain_every, log, labels)
        page, found = Page(asker, retrainer, labels), links(store, ids, wanted.host, listener.getsockname()[1])
        _announce(wanted, found, len(store.items()), labels)
        clients = None
        if wanted.simulate.labellers:
            clients = _Clients(found[1:], wanted, filled.golds)
        elif wanted.browser:
            threading.Timer(1, webbrowser.open, (found[0],)).start()
        try:
            serve(page, listener, _end(wanted, page, clients))
        finally:
            if retrainer is not None:
                retrainer.close()
        if clients is not None:
            clients.check()
        print(f"{asker.progress(ids[0])['all']} labels in {wanted.db}; Krippendorff's α: {label_stats(store).alpha}")
        print(f"next: lmgym label stats {wanted.db}, lmgym reward --labels {wanted.db}")
    return 0


def _announce(wanted: Label, found: Sequence[str], questions: int, labels: int) -> None:
    print(f"{wanted.db}: {questions} questions, {labels} labels")
    if wanted.simulate.labellers:
        print(f"{wanted.simulate.labellers} simulated labellers answer", flush=True)
        return
    print(f"your own page: {found[0]}")
    for number, link in enumerate(found[1:], start=1):
        print(f"labeller-{number}: {link}")
    print("whoever has a link labels in that name; Ctrl-C ends", flush=True)


def _rate_command(wanted: Label, model: str) -> list[str]:
    options = {"model": model, "members": wanted.members, "seed": wanted.seed, "device": wanted.device}
    given = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "agents.cli", "label", "rate", wanted.db, *given]


def _end(wanted: Label, page: Any, clients: "_Clients | None") -> Callable[[], bool] | None:
    """Whether the command shall end; None: not by itself."""
    if clients is None and wanted.until is None:
        return None
    return lambda: (clients is not None and clients.done) or (wanted.until is not None and page.labels >= wanted.until)


class _Clients:
    """Simulated people, a thread each, who begin at once."""

    def __init__(self, found: Sequence[str], wanted: Label, golds: Mapping[tuple[str, str], float]) -> None:
        options, self.errors = wanted.simulate, []
        minority = round(options.minority * options.labellers)
        self._threads = []
        for number, link in enumerate(found):
            labeller = SimulatedLabeller(
                options.error_rate, options.side_bias, options.fatigue, other_taste=number < minority
            )
            arguments = (link, labeller, golds, (wanted.seed, number))
            self._threads.append(threading.Thread(target=self._label, args=arguments, daemon=True))
        for thread in self._threads:
            thread.start()

    @property
    def done(self) -> bool:
        """Whether all of them have nothing left to answer."""
        return not any(thread.is_alive() for thread in self._threads)

    def check(self) -> None:
        """Raises the first error of a simulated labeller."""
        for thread in self._threads:
            thread.join(5)
        if self.errors:
            raise self.errors[0]

    def _label(
        self, link: str, labeller: SimulatedLabeller, golds: Mapping[tuple[str, str], float], seed: Sequence[int]
    ) -> None:
        from agents.labelling import label_over_http

        try:
            label_over_http(link, labeller, lambda prompt, texts: [golds[prompt, text] for text in texts], seed)
        except (OSError, ValueError, KeyError) as error:
            self.errors.append(error)

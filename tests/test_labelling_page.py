"""The labelling page over HTTP: nobody gets in who does not belong, and no acknowledged answer is lost."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("starlette", reason="the labelling page needs lmgym[label]")
pytest.importorskip("uvicorn", reason="the labelling page needs lmgym[label]")

from label_stores import PLAIN
from labelling_server import served, store_at

from agents.cli import main
from agents.labelling import label_over_http, listening
from agents.labelling.access import HEADERS, MOST_BYTES
from agents.labelling.app import COOKIE, page_file, shown
from agents.labelling.clients import Client
from lmgym.preferences import Item, LabelStore, Rules, SimulatedLabeller, label_stats

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _closes_clients(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Closes every client that a test opened."""
    opened: list[Client] = []
    make = Client.__init__

    def remembered(self: Client, link: str) -> None:
        opened.append(self)
        make(self, link)

    monkeypatch.setattr(Client, "__init__", remembered)
    yield
    for client in opened:
        client.close()


def request(link: str, method: str, path: str, headers: dict[str, str], body: bytes | None = None) -> Any:
    """Any request; returns the status, the headers and the JSON (or the text)."""
    connection = http.client.HTTPConnection(urlsplit(link).netloc, timeout=10)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    data = response.read()
    connection.close()
    try:
        return response.status, response.headers, json.loads(data)
    except ValueError:
        return response.status, response.headers, data.decode()


def good(link: str) -> dict[str, str]:
    """The headers of the page's own requests."""
    client = Client(link)
    client.close()
    return {**client._headers, "Content-Type": "application/json"}


# Who may come in ------------------------------------------------------------------------------------------------------


def test_what_does_not_come_from_the_page_is_refused(tmp_path: Path) -> None:
    with store_at(tmp_path / "labels.db", 5) as store, served(store, names=("anna", "ben")) as (_, anna, ben):
        headers, nonce = good(anna), Client(anna).state["item"]["nonce"]
        body = json.dumps({"nonce": nonce, "choice": "left"}).encode()
        for change, status in (
            ({"Host": "evil.example"}, 421),
            ({"Host": "127.0.0.1.evil.example:80"}, 421),
            ({"Origin": "http://evil.example"}, 403),
            ({"Origin": "null"}, 403),
            ({"Origin": ""}, 403),
            ({"X-CSRF-Token": ""}, 403),
            ({"X-CSRF-Token": good(ben)["X-CSRF-Token"]}, 403),
            ({"Cookie": ""}, 401),
            ({"Cookie": f"{COOKIE}=0000"}, 401),
            ({"Content-Type": "text/plain"}, 415),
            ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
            ({"Cookie": good(ben)["Cookie"], "X-CSRF-Token": good(ben)["X-CSRF-Token"]}, 400),
        ):
            got, sent, found = request(anna, "POST", "/api/answer", headers | change, body)
            assert (got, change) == (status, change)
            assert found["error"]
            assert all(sent[name] == value for name, value in HEADERS.items())
        assert request(anna, "GET", "/api/state", {"Host": "evil.example"})[0] == 421
        assert request(anna, "PUT", "/api/answer", headers, body)[0] == 405
        assert request(anna, "POST", "/api/answer", headers, b"x" * (MOST_BYTES + 1))[0] == 413
        long = {**headers, "Transfer-Encoding": "chunked"}
        with pytest.raises((OSError, http.client.HTTPException, AssertionError)):
            assert request(anna, "POST", "/api/answer", long, _chunks(b" " * 2 * MOST_BYTES))[0] not in (200, 413)
        for bad in (
            b"",
            b"[]",
            b"{",
            b'{"nonce": 3}',
            b'{"nonce": "x", "ms": -1}',
            b'{"nonce": "x", "ranking": [true]}',
        ):
            status, _, found = request(anna, "POST", "/api/answer", headers, bad)
            assert (status, bad) == (400, bad)
            assert str(tmp_path) not in json.dumps(found)
        assert store.rows("SELECT COUNT(*) AS n FROM events")[0]["n"] == 0
        assert request(anna, "POST", "/api/answer", headers, body)[0] == 200


def _chunks(data: bytes) -> Any:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [data]) + b"0\r\n\r\n"


def test_a_link_becomes_a_cookie_that_scripts_cannot_read(tmp_path: Path) -> None:
    with store_at(tmp_path / "labels.db", 5) as store, served(store) as (_, anna):
        status, headers, _ = request(anna, "GET", "/?" + urlsplit(anna).query, {})
        assert (status, headers["location"]) == (303, "/")
        assert {"HttpOnly", "SameSite=lax"} <= set(headers["set-cookie"].split("; "))
        assert request(anna, "GET", "/", {})[0] == 200
        store.withdraw("anna")
        assert request(anna, "GET", "/api/state", {"Cookie": f"{COOKIE}={urlsplit(anna).query[6:]}"})[0] == 401


def test_the_page_has_no_inline_script_and_asks_nobody_else() -> None:
    page, script, style = (page_file(name).decode() for name in ("page.html", "page.js", "page.css"))
    assert re.findall(r"<script[^>]*>", page) == ['<script src="/page.js" type="module">']
    assert not re.search(r"\son\w+=|style=|<style|javascript:", page)
    assert not re.search(r"https?://|//\w+\.", page + style + re.sub(r"// .*", "", script))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(", script)
    assert len(script.splitlines()) < 150


def test_labellers_see_no_model_path_score_or_other_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agents.labelling.app.FRESH", 0.0)
    with store_at(tmp_path / "labels.db") as store:
        items = [
            Item("p", ("a", "b"), source="runs/secret-run", model="cafe1234"),
            Item("q", ("c", "d"), purpose="gold", best=1),
        ]
        store.add_items(items)
        with served(store, Rules(gold_share=0.4, overlap=2), ("anna", "ben")) as (owner, anna, ben):
            Client(ben).answer("left")
            client = Client(anna)
            seen = json.dumps([client.state, client.request("GET", "/api/stats"), client.answer("left")])
            for hidden in ("secret-run", "cafe1234", "best", "gold", "ben", str(tmp_path), "labels.db"):
                assert hidden not in seen.replace("right on gold", "")
            assert [row[0] for row in Client(owner).request("GET", "/api/stats")["labellers"]] == [
                "labeller",
                "anna",
                "ben",
            ]


def test_characters_that_hide_or_reorder_are_shown() -> None:
    assert shown("a‮b\x00\x07\r\nc") == "a⟨U+202E⟩b⟨U+0000⟩⟨U+0007⟩\nc"
    kept = "שלום\tעולם 👩‍👩‍👧 é <b>&amp;"
    assert shown(kept) == kept


def test_a_port_in_use_is_named() -> None:
    listener = listening("127.0.0.1", 0)
    port = listener.getsockname()[1]
    with pytest.raises(ValueError, match=f"port {port} is in use: give another one with --port"):
        listening("127.0.0.1", port)
    listener.close()
    with pytest.raises(ValueError, match="is not an IP address"):
        listening("example.org", 0)


# Answers --------------------------------------------------------------------------------------------------------------


def test_a_double_submit_is_one_answer_and_undo_brings_the_question_back(tmp_path: Path) -> None:
    with store_at(tmp_path / "labels.db", 5) as store, served(store) as (_, anna):
        client = Client(anna)
        item = client.state["item"]
        body = {"nonce": item["nonce"], "choice": "left", "ms": 12.5}
        client.request("POST", "/api/answer", body)
        client.state = client.request("POST", "/api/answer", body | {"choice": "right"})
        assert client.state["said"].startswith("You had already answered")
        assert client.state["progress"] == {"mine": 1, "all": 1, "wanted": 5}
        client.undo()
        assert client.state["item"]["texts"] == item["texts"]
        assert client.state["item"]["nonce"] != item["nonce"]
        assert client.state["progress"]["all"] == 0


def test_fifty_people_at_once_lose_nothing_and_count_nothing_twice(tmp_path: Path) -> None:
    with store_at(tmp_path / "labels.db", 300) as store:
        names = tuple(f"p{i}" for i in range(50))
        got: list[int] = []
        with served(store, names=names) as (_, *links):

            def label(link: str) -> None:
                got.append(label_over_http(link, SimulatedLabeller(0.0), _prefers_good, 0))

            threads = [threading.Thread(target=label, args=(link,)) for link in links]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        labels = store.labels()
        assert len(labels) == sum(got) == 300
        assert Counter(label.item for label in labels) == dict.fromkeys(range(1, 301), 1)
        assert {label.answer for label in labels} == {"a"}


def _prefers_good(prompt: str, texts: Any) -> list[float]:
    return [float(text.startswith("good")) for text in texts]


def test_figures_over_http_recover_error_rate_and_side_bias(tmp_path: Path) -> None:
    with store_at(tmp_path / "labels.db", 240) as store:
        store.add_items([Item(f"g{i}", (f"bad {i}", f"good {i}"), purpose="gold", best=1) for i in range(240)])
        store.rows("PRAGMA synchronous = OFF")  # nobody is killed here
        with served(store, Rules(repeat_share=0.0, gold_share=0.5)) as (_, anna):
            assert label_over_http(anna, SimulatedLabeller(0.15, 0.2), _prefers_good, 7) > 440
        stats = label_stats(store)
        assert stats.gold.count > 200
        assert stats.error.low < 0.15 < stats.error.high
        assert stats.bias.low < 0.2 < stats.bias.high
        assert stats.side_alarm


def test_a_full_disk_is_told_and_the_same_answer_is_saved_later(tmp_path: Path, capsys: Any) -> None:
    with store_at(tmp_path / "labels.db", 400) as store, served(store) as (_, anna):
        client = Client(anna)
        pages = store.rows("PRAGMA page_count")[0][0]
        store.rows(f"PRAGMA max_page_count = {pages + 2}")
        with pytest.raises(ValueError, match="status 507: not saved"):
            _until_it_fails(client)
        saved = len(store.labels())
        store.rows("PRAGMA max_page_count = 100000")
        client.answer("left")
        assert len(store.labels()) == saved + 1
        assert "the disk is full" in capsys.readouterr().err


def _until_it_fails(client: Client) -> None:
    while True:
        client.answer("left")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the server is forked")
@pytest.mark.slow
def test_a_thousand_votes_of_fifty_clients_take_little_longer_than_an_empty_request(
    tmp_path: Path, record_property: Any
) -> None:
    """None is lost, none counted twice; the slowest hundredth, beside that of an empty response."""
    store = store_at(tmp_path / "labels.db", 1000)
    people = [store.labeller(f"p{i}") for i in range(50)]
    tokens = [store.token(person) for person in people]
    with server_process(store) as (start, port):
        start()
        times: dict[str, list[float]] = {"vote": [], "empty": []}

        def ask(token: str) -> None:
            client = _when_up(f"http://127.0.0.1:{port}/?token={token}")
            while client.state["item"] is not None:
                begun = time.perf_counter()
                client.answer("left")
                times["vote"].append(time.perf_counter() - begun)
            for _ in range(20):
                begun = time.perf_counter()
                client._connection.request("GET", "/favicon.ico")
                client._connection.getresponse().read()
                times["empty"].append(time.perf_counter() - begun)

        threads = [threading.Thread(target=ask, args=(token,)) for token in tokens]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with LabelStore(tmp_path / "labels.db") as found:
        assert Counter(label.item for label in found.labels()) == dict.fromkeys(range(1, 1001), 1)
    slowest = {name: sorted(all_)[int(0.99 * len(all_))] for name, all_ in times.items()}
    record_property("p99", slowest)
    print({name: f"{1000 * seconds:.0f} ms" for name, seconds in slowest.items()})
    assert slowest["vote"] < max(0.1, 10 * slowest["empty"])


def _when_up(link: str) -> Client:
    for _ in range(200):
        try:
            return Client(link)
        except OSError:
            time.sleep(0.05)
    raise AssertionError("the server did not start")


# Kills ----------------------------------------------------------------------------------------------------------------


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the servers that are killed are forked")


@needs_fork
def test_kill_9_while_people_vote_loses_no_acknowledged_answer(tmp_path: Path) -> None:
    kills(tmp_path, 20)


@needs_fork
@pytest.mark.stress
def test_two_hundred_kills_lose_no_acknowledged_answer(tmp_path: Path) -> None:
    kills(tmp_path, 200)


@contextmanager
def server_process(store: LabelStore) -> Iterator[tuple[Callable[[], int], int]]:
    """Closes the store and yields a function that starts a server of it, and the port; see labelling_server.py."""
    store.close()
    with listening("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, str(HERE / "labelling_server.py"), str(store.path), str(port)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])}
    children: list[int] = []
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=environment) as helper:
        sent, got = helper.stdin, helper.stdout
        assert sent is not None
        assert got is not None

        def start() -> int:
            print(file=sent, flush=True)
            children.append(int(got.readline()))
            return children[-1]

        try:
            yield start, port
        finally:
            for child in children[-1:]:
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            helper.kill()


def kills(tmp_path: Path, count: int) -> None:
    """Kills the server while four people vote, `count` times, and compares what was acknowledged with the file."""
    db = tmp_path / "labels.db"
    store = store_at(db, 40 * count)
    tokens = [store.token(store.labeller(f"p{i}")) for i in range(4)]
    acknowledged: list[tuple[str, str]] = []
    over = threading.Event()

    def vote(token: str, number: int) -> None:
        count = 0
        while not over.is_set():
            try:
                client = Client(f"http://127.0.0.1:{port}/?token={token}")
                while not over.is_set() and client.state["item"] is not None:
                    nonce, choice = client.state["item"]["nonce"], ("left", "right", "tie")[(count + number) % 3]
                    client.answer(choice)
                    acknowledged.append((nonce, choice))
                    count += 1
            except (OSError, ValueError):
                time.sleep(0.01)

    threads = [threading.Thread(target=vote, args=(token, i)) for i, token in enumerate(tokens)]
    with server_process(store) as (start, port):
        for thread in threads:
            thread.start()
        try:
            for number in range(count):
                child = start()
                before, until = len(acknowledged), time.monotonic() + 20
                while len(acknowledged) < before + 3 + number % 5 and time.monotonic() < until:
                    time.sleep(0.005)
                assert len(acknowledged) > before, "the server answered nobody"
                os.kill(child, signal.SIGKILL)
        finally:
            over.set()
            for thread in threads:
                thread.join()
    with LabelStore(db) as found:
        kept = {row["nonce"]: row for row in found.rows("SELECT * FROM events")}
        for nonce, choice in acknowledged:
            row = kept[nonce]
            side = json.loads(row["side"])
            expected = choice if choice == "tie" else "ab"[side[choice == "right"]]
            assert row["answer"] == expected
        assert len({nonce for nonce, _ in acknowledged}) == len(acknowledged) >= 3 * count
        assert found.rows("PRAGMA integrity_check")[0][0] == "ok"


# The commands ---------------------------------------------------------------------------------------------------------


def labelled(folder: Path, *more: str) -> None:
    """Labels forty pairs of a file by two simulated people over HTTP, into x.db."""
    # The texts of the built-in model "probe" have the letters a to d.
    prompts = ["".join("abcd"[(i // 4**k) % 4] for k in range(3)) for i in range(40)]
    rows = [{"prompt": prompt, "chosen": "ab", "rejected": "cd"} for prompt in prompts]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = ["label", "--pairs", "pairs.jsonl", "--db", "x.db", "--port", "0", "--overlap", "2", *more]
    assert main([*line, "--simulate.labellers", "2", "--simulate.error-rate", "0"]) == 0


def test_from_pairs_in_a_file_to_figures_and_files(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("guide.md").write_text("Choose the kinder text.\n")
    labelled(tmp_path, "--guidelines", "guide.md")
    assert "80 labels in x.db" in capsys.readouterr().out
    assert main(["label", "stats", "x.db"]) == 0
    assert "1.00 [0.91, 1.00] (n = 40)" in re.sub(r"\s+", " ", capsys.readouterr().out.replace("│", " "))
    assert main(["label", "export", "x.db", "x.jsonl"]) == 0
    assert "80 rows: x.jsonl; their data-set card: x.card.md" in capsys.readouterr().out
    assert "> Choose the kinder text." in Path("x.card.md").read_text()
    assert main(["label", "import", "y.db", "x.jsonl", "--format", "pairs"]) == 0
    assert "y.db has 80 labels" in capsys.readouterr().out
    assert main(["label", "withdraw", "x.db", "labeller-1"]) == 0
    assert main(["label", "withdraw", "x.db", "nobody"]) == 2
    assert "no labeller 'nobody'; there are owner, labeller-2" in capsys.readouterr().err


@pytest.mark.slow
def test_a_reward_model_from_labels_equals_one_from_their_export(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    labelled(tmp_path)
    for split in ("train", "test"):
        assert main(["label", "export", "x.db", f"{split}.jsonl", "--split", split]) == 0
    small = ["--model", "probe", "--epochs", "1"]
    assert main(["reward", "--labels", "x.db", *small, "--out", "a"]) == 0
    given = ["--preferences", "train.jsonl", "--test-preferences", "test.jsonl"]
    assert main(["reward", *given, *small, "--out", "b"]) == 0
    weights = [Path(run, "reward_model", "model.safetensors").read_bytes() for run in "ab"]
    assert weights[0] == weights[1]
    assert main(["reward", "--labels", "x.db", "--preferences", "train.jsonl"]) == 2
    assert "either --preferences FILE or --labels DB" in capsys.readouterr().err
    assert main(["label", "rate", "x.db", "--members", "2", *small]) == 0
    assert "held-out pairs; 0 questions scored" in capsys.readouterr().out


@pytest.mark.slow
def test_two_rounds_of_a_loop_learn_from_each_other(tmp_path: Path, capsys: Any) -> None:
    """Each round's texts are those of the policy before it; the same command again repeats nothing that is finished."""
    line = ["loop", "Sentiment", "--out", str(tmp_path / "loop"), "--rounds", "2", "--labels", "12", "--texts", "2"]
    line += ["--sft", "--examples 64 --test-examples 8", "--reward", "--epochs 1", "--simulate.labellers", "2"]
    line += ["--train", "--ppo.updates 2 --ppo.rows 8 --test-prompts 8 --samples 2"]
    assert main(line) == 0
    rounds = json.loads((tmp_path / "loop" / "loop.json").read_text())
    assert [row["round"] for row in rounds] == [1, 2]
    assert 12 <= rounds[0]["labels"] < 20 <= rounds[1]["labels"] < 32
    with LabelStore(tmp_path / "loop" / "labels.db") as store:
        models = {label.model for label in store.labels()}
        assert len(models) == 2, "the second round asks about the texts of the first round's policy"
    capsys.readouterr()
    assert main(line) == 0
    assert "lmgym " not in capsys.readouterr().out
    assert json.loads((tmp_path / "loop" / "loop.json").read_text()) == rounds


def test_rules_of_the_server_are_those_of_the_command(tmp_path: Path, capsys: Any) -> None:
    assert main(["label", "--pairs", "x", "--write"]) == 2
    assert main(["label", "--random-share", "0.1"]) == 2
    assert main(["label", "--pairs", str(tmp_path / "none.jsonl"), "--db", str(tmp_path / "y.db"), "--port", "0"]) == 2
    said = capsys.readouterr().err
    for part in ("give one of them", "random_share=0.1 is out of range", "none.jsonl: no such file"):
        assert part in said
    assert PLAIN.overlap == 1

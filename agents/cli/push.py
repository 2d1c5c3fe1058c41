"""`lmgym push`: the policy of a run on the Hugging Face hub."""

import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tyro
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from agents.cli.finished import FinishedRun
from agents.cli.merge import PolicyFolder, merged_model, trained_run, write_merged
from agents.cli.options import parse
from agents.runs import write_cards
from lmgym.io import atomic, printable
from lmgym.models import BUILT_IN, first_line, name_base


@dataclass(frozen=True)
class Push:
    """Upload the policy of a run to the Hugging Face hub. Nothing else of lmgym sends anything anywhere."""

    run: tyro.conf.Positional[str]
    """Folder of a finished run."""
    to: str
    """Repository: user/name. It is made if it does not exist."""
    policy: PolicyFolder = "policy"
    """Which policy: the last, or that of the best update."""
    merged: bool = False
    """Upload one whole model, with the policy merged, instead of the adapter."""
    base: str | None = None
    """Name on the hub of the adapter's base, the fine-tuned model of this run. By default, it is uploaded to
    user/name-base, unless the run did not change a model of the hub."""
    private: bool = True
    """Whether a new repository is private."""


def run(argv: Sequence[str]) -> int:
    """Uploads one or two folders, and prints where they are."""
    wanted = parse("push", Push, argv)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", wanted.to):
        raise ValueError(f"--to {wanted.to!r} is not the name of a repository: give user/name")
    source = trained_run(wanted.run)
    if not (source.folder / wanted.policy).is_dir():
        raise ValueError(f"the run in {wanted.run!r} has no folder {wanted.policy!r}")
    write_cards(source.folder)
    if get_token() is None:
        raise ValueError("no token for the hub: run `hf auth login`, or set HF_TOKEN to a token that may write")
    if wanted.merged:
        lm = merged_model(source, wanted.policy)
        with tempfile.TemporaryDirectory() as folder:
            write_merged(lm, source.folder, Path(folder))
            _upload(Path(folder), wanted.to, wanted.private)
        return 0
    base = wanted.base or _unchanged_base(source)
    if base is None:
        base = f"{wanted.to}-base"
        _upload(source.folder / "sft", base, wanted.private)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / wanted.policy
        shutil.copytree(source.folder / wanted.policy, folder)
        for config in folder.rglob("adapter_config.json"):
            name_base(config.parent, base)
        card = (folder / "README.md").read_text(encoding="utf-8")
        atomic.write(
            folder / "README.md", re.sub("^base_model:.*$", f'base_model: "{base}"', card, count=1, flags=re.M)
        )
        _upload(folder, wanted.to, wanted.private)
    return 0


def _unchanged_base(run: FinishedRun) -> str | None:
    """The name on the hub of a run's base, if the run did not change it."""
    name, options = run.wanted.model, run.wanted
    template = options.chat_template or options.template_options  # it is saved with the tokenizer
    changed = options.options.sft.examples or options.pad_token or options.from_adapter or template
    local = not name or name in BUILT_IN or Path(name).exists()
    return None if changed or local else name


def _upload(folder: Path, repository: str, private: bool) -> None:
    """Uploads the files of a folder to a repository of the hub.

    Raises:
        ValueError: the hub cannot be reached, or refuses; it says what to do.
    """
    with _hub_errors(repository):
        api = HfApi(library_name="lmgym")
        api.create_repo(repository, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Upload by lmgym push", ignore_patterns=[".*"]
        )
    print(printable(f"{repository}: {done.commit_url}"))


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """Turns the errors of an upload into one sentence that says what to do."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ValueError("HF_HUB_OFFLINE is set, which forbids every upload: unset it, and push again") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            remedy = "the token must be valid and may write there: run `hf auth login`, or set HF_TOKEN"
        else:
            remedy = "try again later, or with another name"
        raise ValueError(f"the hub refused {repository!r} ({first_line(error)}): {remedy}") from error
    except Exception as error:  # of the HTTP library, which differs between versions of huggingface_hub
        raise ValueError(
            f"the hub could not be reached for {repository!r} ({first_line(error)}): check the network, and push again"
        ) from error

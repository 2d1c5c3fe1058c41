"""Removes keys and passwords from texts that are stored, such as command lines, options and errors."""

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "[redacted]"

# Keys that their form identifies, anywhere in a text. Not inside a longer word: "task-..." does not contain "sk-...".
_KEY = re.compile(
    r"""(?<![A-Za-z0-9_-])(?:
    hf_[A-Za-z0-9]{16,} | api_org_[A-Za-z0-9]{16,}                                # Hugging Face
    | sk-[A-Za-z0-9_-]{16,}                                                       # OpenAI, Anthropic
    | sk_(?:live|test)_[A-Za-z0-9]{16,}                                           # Stripe
    | gh[pousr]_[A-Za-z0-9]{16,} | github_pat_[A-Za-z0-9_]{16,} | glpat-[A-Za-z0-9_-]{16,}
    | (?:AKIA|ASIA)[A-Z0-9]{16,}                                                  # AWS
    | AIza[A-Za-z0-9_-]{35,}                                                      # Google
    | xox[abprs]-[A-Za-z0-9-]{10,}                                                # Slack
    | pypi-[A-Za-z0-9_-]{32,} | wandb_v1_[A-Za-z0-9_]{16,}
    | eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]+)?             # JSON web tokens
    )""",
    re.VERBOSE,
)
_BEARER = re.compile(r"(\bBearer\s+)[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE)
_BASIC = re.compile(r"(\bAuthorization[\"']?\s*[:=]\s*[\"']?(?:Basic|Token|Digest)\s+)[^\s\"',;\[]+", re.IGNORECASE)
# user:password@, up to the last @ before the path. Some services use a token as the user name.
_URL = re.compile(r"(?<=://)[^\s/\"'<>?#]++")

# A name and its separator: "name=", "name: ", "--name ". Possessive quantifiers, so that matching is fast.
_NAME = re.compile(r"(?<![\w.-])([\w.-]++)([\"']?)(=|\s++=\s++|:\s*+|\s++)")
_VALUE = re.compile(r"(?:\"(?:\\.|[^\"\\\n])*+\"|'[^'\n]*+'|[^\s\"'&;|<>(){}\[\]])++")
_QUOTED = re.compile(r"\"(?:\\.|[^\"\\\n])*+\"|'(?:\\.|[^'\\\n])*+'")
_HIDDEN = re.compile(rf"[\"']?{re.escape(HIDDEN)}")
_RANDOM = re.compile(r"[\"']?[0-9a-fA-F]{32,}[\"']?")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")

_SECRETS = {"password", "passwd", "passphrase", "pwd", "secret", "credential", "credentials", "authorization", "apikey"}
_OWNERS = {
    "access", "account", "anthropic", "api", "auth", "aws", "bearer", "encryption", "github", "hf", "hub", "openai",
    "private", "refresh", "secret", "session", "signing", "ssh", "wandb",
}  # fmt: skip
# "pad token" and similar names are tokens of a language model.
_NO_SECRET = {
    "action", "added", "audio", "banned", "begin", "bos", "chosen", "cls", "end", "eos", "first", "image", "kl", "last",
    "mask", "max", "min", "nats", "new", "next", "of", "pad", "padding", "per", "prompt", "sep", "special", "start",
    "stop", "text", "unk", "unknown",
}  # fmt: skip
_PLAIN = {"none", "null", "true", "false", "default", "auto", "task"}


def redact(text: str) -> str:
    """Replaces everything in a text that looks like a key, a token or a password by "[redacted]".

    It finds keys by their form (hf_..., sk-..., AKIA..., ghp_..., Bearer ...), user:password in URLs, and the values of
    names such as `--api-key`, `HF_TOKEN=` and `"password":`. Names such as `pad_token` do not count as secret. It
    cannot recognise a password without a name. Redacting twice gives the same text.
    """
    while True:
        before = text
        text = _URL.sub(lambda found: f"{HIDDEN}@{found[0].rpartition('@')[2]}" if "@" in found[0] else found[0], text)
        text = _BASIC.sub(rf"\g<1>{HIDDEN}", _BEARER.sub(rf"\g<1>{HIDDEN}", text))
        text = _values(_KEY.sub(HIDDEN, text))
        # A replacement can make another secret next to it recognisable, so repeat until nothing changes.
        if text == before:
            return text


def _values(text: str) -> str:
    """Hides the values of secret names."""
    parts, at = [], 0
    for found in _NAME.finditer(text):
        name, quote, separator = found.groups()
        if found.start() < at:
            continue
        value = _value(text, found.end(), name, quote, separator.strip()) if _may_be_secret(name) else ""
        if not value or _is_plain(name, value):
            continue
        mark = value[0] if value[0] in "\"'" else ""
        parts += [text[at : found.end()], f"{mark}{HIDDEN}{mark}"]
        at = found.end() + len(value)
    return "".join([*parts, text[at:]])


def _value(text: str, at: int, name: str, quote: str, separator: str) -> str:
    """The value after a name, quotes included; "" if there is no value or it is already redacted."""
    if _HIDDEN.match(text, at):
        return ""
    words = _words(name)
    if words[-1].endswith("key") and (words[-1][:-3] or "".join(words[-2:-1])) not in _OWNERS:
        pattern = _RANDOM  # other keys, such as a sort key, are not secret
    else:
        pattern = _QUOTED if separator == ":" else _VALUE
    if separator == ":":
        # As in JSON or a dict. In prose, a word before a colon is usually not a name.
        found = pattern.match(text, at) if quote or "-" in name or "_" in name else None
    elif separator == "=":
        found = pattern.match(text, at)
    else:
        is_option = name.startswith("-") and not quote and not text.startswith("-", at)
        found = pattern.match(text, at) if is_option else None
    return found[0].rstrip(",") if found else ""


def _may_be_secret(name: str) -> bool:
    words = _words(name)
    last, owner = words[-1], words[-2] if len(words) > 1 else ""
    if last in _SECRETS or last.endswith("key") or (last == "id" and owner == "key"):
        return True
    return owner not in _NO_SECRET if last == "token" else last.endswith("token") and last[:-5] in _OWNERS


def _words(name: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(name.rpartition(".")[2])] or [""]


def _is_plain(name: str, value: str) -> bool:
    """Whether a value is not secret: it is empty, a word such as None, or the number of a token."""
    bare = value.strip("\"'")
    is_number = name.lower().endswith("token") and re.fullmatch(r"-?\d{1,7}(?:\.\d*)?", bare) is not None
    return not bare or bare.lower() in _PLAIN or is_number


def redact_all(value: Any) -> Any:
    """Plain data with all texts redacted and the values of secret names replaced, for config.json."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {name: _redact_named(str(name), inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact_all(inner) for inner in value]
    return value


def _redact_named(name: str, value: Any) -> Any:
    if not isinstance(value, str) or not _may_be_secret(name):
        return redact_all(value)
    secret = _value(value, 0, name, "", "=") and not _is_plain(name, value)
    return HIDDEN if secret else redact(value)

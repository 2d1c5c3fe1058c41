"""The labelling page: a small web server, the page, and simulated people who use it over HTTP."""

try:
    import starlette as _starlette  # noqa: F401
    import uvicorn as _uvicorn  # noqa: F401
except ImportError as error:
    raise ImportError("the labelling page needs two more packages: pip install 'lmgym[label]'") from error

from agents.labelling.app import Page, make_app
from agents.labelling.clients import label_over_http
from agents.labelling.retraining import Retrainer
from agents.labelling.serving import links, listening, serve

__all__ = ["Page", "Retrainer", "label_over_http", "links", "listening", "make_app", "serve"]

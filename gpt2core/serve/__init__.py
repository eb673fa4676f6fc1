"""An HTTP server over the engine: `gpt2core serve`, or `uvicorn --factory gpt2core.serve:create_app`.

A FastAPI adapter without generation logic of its own; needs the extra `serve`.
"""

from gpt2core.serve.app import create_app
from gpt2core.serve.settings import Settings

__all__ = ["Settings", "create_app"]

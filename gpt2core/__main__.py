"""`python -m gpt2core` is the command `gpt2core`."""

import sys

from gpt2core.cli import main

sys.exit(main())

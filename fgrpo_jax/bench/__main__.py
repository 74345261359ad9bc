"""`python -m fgrpo_jax.bench`: see command.py."""

import sys

from fgrpo_jax.bench.command import main

sys.exit(main(sys.argv[1:]))

"""`python -m fgrpo_jax.data check`: see run/data_check.py."""

import sys

from fgrpo_jax.run.data_check import main

sys.exit(main(sys.argv[1:]))

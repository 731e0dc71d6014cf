"""`python -m raekit`, and `torchrun --nproc-per-node N -m raekit -- COMMAND ...` for several processes.

Without the two dashes torchrun takes `--run` for an abbreviation of an option of its own.
"""

from raekit.cli import main

main()

"""Run the command line: `python -m raekit`, or `torchrun --nproc-per-node N -m raekit -- COMMAND ...`.

The two dashes are needed, because torchrun would take `--run` as an abbreviation of its own option `--run-path`.
"""

from raekit.cli import main

main()
